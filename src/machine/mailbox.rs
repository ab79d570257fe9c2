//! Messages from other threads to a running machine: requests, and the ends of vCPUs.

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

/// Request to a running machine, sent through its [`Mailbox`].
pub enum Request {
    /// Pause the vCPUs and devices with no operation half done; answered when that is done.
    Pause(Sender<()>),
    /// Resume all vCPUs, or only the given ones.
    Resume(Option<Vec<u32>>, Sender<()>),
    /// Report vCPUs that stop for the debugger to these traps, as long as they exist.
    Attach(Weak<Traps>),
    /// Make a vCPU handle a debugger's request while the machine is paused.
    Debug(u32, Box<debug::Request>, Sender<VcpuReply>),
    /// Send a control to the device with that name; answered with the device's reply.
    Device(String, Control, Sender<Result<Reply, ControlError>>),
    /// Note that the guest's init runs ([`Mark::InitStarted`](crate::report::Mark::InitStarted)).
    InitStarted,
    /// Press the ACPI power button.
    PressPowerButton,
    /// End the guest now, with this outcome.
    Stop(Outcome),
}

/// Queue of requests and of ended vCPUs.
pub struct Mailbox {
    pub(super) fd: EventFd,
    /// `None` once the machine has ended. Requests are then dropped, which a sender that waits for an answer notices.
    requests: Mutex<Option<VecDeque<Request>>>,
    ends: Mutex<VecDeque<(u32, End)>>,
}

impl Mailbox {
    /// Creates an empty mailbox.
    pub fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Mailbox {
            fd: event::eventfd()?,
            requests: Mutex::new(Some(VecDeque::new())),
            ends: Mutex::default(),
        }))
    }

    /// Sends a request.
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

/// Queue of vCPUs that stopped for a debugger.
pub struct Traps {
    queue: Mutex<VecDeque<Trap>>,
    fd: EventFd,
}

impl Traps {
    /// Creates an empty queue.
    pub fn new() -> io::Result<Self> {
        Ok(Traps { queue: Mutex::default(), fd: event::eventfd()? })
    }

    /// Adds a trap. A stopped vCPU stops again only after it was resumed, so at most one trap per vCPU is queued.
    pub fn push(&self, trap: Trap) {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).push_back(trap);
        let _ = self.fd.write(1);
    }

    /// Takes the oldest trap.
    pub fn take(&self) -> Option<Trap> {
        let _ = self.fd.read();
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    /// Returns a descriptor that becomes readable when a trap arrives.
    pub fn fd(&self) -> &EventFd {
        &self.fd
    }
}

/// Creates a one-shot answer channel for a [`Request`].
pub fn answer<T>() -> (Sender<T>, Receiver<T>) {
    channel()
}
