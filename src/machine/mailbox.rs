//! Where a running machine hears from other threads: what it is asked for, and which vCPUs have ended.

use std::collections::VecDeque;
use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use crate::event;
use crate::outcome::Outcome;
use crate::vcpu::End;
use crate::virtio::control::{Control, ControlError, Reply};

/// What a running machine can be asked for, through its [`Mailbox`].
pub enum Request {
    /// Stop the vCPUs and devices with nothing half done; answered when it is so.
    Pause(Sender<()>),
    /// Go on.
    Resume(Sender<()>),
    /// Ask the device of that name for something; answered with what it says.
    Device(String, Control, Sender<Result<Reply, ControlError>>),
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

/// A one-shot answer channel for [`Request`]s.
pub fn answer<T>() -> (Sender<T>, Receiver<T>) {
    channel()
}
