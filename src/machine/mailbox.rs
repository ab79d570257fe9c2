//! Where a running machine hears from other threads: what it is asked for, and which vCPUs have ended.

use std::collections::VecDeque;
use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use vmm_sys_util::eventfd::EventFd;

use crate::event;
use crate::kvm::debug::{self, Trap};
use crate::outcome::Outcome;
use crate::vcpu::{End, Reply as VcpuReply};
use crate::virtio::control::{Control, ControlError, Reply};

/// What a running machine can be asked for, through its [`Mailbox`].
pub enum Request {
    /// Stop the vCPUs and devices with nothing half done; answered when it is so.
    Pause(Sender<()>),
    /// Go on: all vCPUs, or only these.
    Resume(Option<Vec<u32>>, Sender<()>),
    /// Tell these of vCPUs that stop for the debugger, as long as somebody has them.
    Attach(Weak<Traps>),
    /// Have a vCPU do something for a debugger while the machine is paused.
    Debug(u32, Box<debug::Request>, Sender<VcpuReply>),
    /// Ask the device of that name for something; answered with what it says.
    Device(String, Control, Sender<Result<Reply, ControlError>>),
    /// Note that the guest's init runs ([`Mark::InitStarted`](crate::outcome::Mark::InitStarted)).
    InitStarted,
    /// Press the ACPI power button.
    PressPowerButton,
    /// End the guest now, with this outcome.
    Stop(Outcome),
}

/// Where requests and the ends of vCPUs arrive.
pub struct Mailbox {
    pub(super) fd: EventFd,
    /// `None` once the machine has ended: what is asked then is dropped, which whoever waits for an answer notices.
    requests: Mutex<Option<VecDeque<Request>>>,
    ends: Mutex<VecDeque<(u32, End)>>,
}

impl Mailbox {
    /// An empty mailbox.
    pub fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Mailbox {
            fd: event::eventfd()?,
            requests: Mutex::new(Some(VecDeque::new())),
            ends: Mutex::default(),
        }))
    }

    /// Asks for something.
    pub fn send(&self, request: Request) {
        if let Some(requests) = self.requests.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            requests.push_back(request);
            let _ = self.fd.write(1);
        }
    }

    pub(super) fn close(&self) {
        *self.requests.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(super) fn vcpu_ended(&self, id: u32, end: End) {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner).push_back((id, end));
        let _ = self.fd.write(1);
    }

    pub(crate) fn take_request(&self) -> Option<Request> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner).as_mut()?.pop_front()
    }

    pub(super) fn take_end(&self) -> Option<(u32, End)> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }
}

/// Where a debugger hears of the vCPUs that stopped for it.
pub struct Traps {
    queue: Mutex<VecDeque<Trap>>,
    fd: EventFd,
}

impl Traps {
    /// None yet.
    pub fn new() -> io::Result<Self> {
        Ok(Traps { queue: Mutex::default(), fd: event::eventfd()? })
    }

    /// Adds one. A vCPU that stopped stops again only after it went on, so there are no more than the debugger lets be.
    pub fn push(&self, trap: Trap) {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).push_back(trap);
        let _ = self.fd.write(1);
    }

    /// The oldest one.
    pub fn take(&self) -> Option<Trap> {
        let _ = self.fd.read();
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    /// Becomes readable when one comes.
    pub fn fd(&self) -> &EventFd {
        &self.fd
    }
}

/// A one-shot answer channel for [`Request`]s.
pub fn answer<T>() -> (Sender<T>, Receiver<T>) {
    channel()
}
