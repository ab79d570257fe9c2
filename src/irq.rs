//! Interrupt lines: eventfds that KVM turns into an edge on a GSI (irqfd). Raising an interrupt is a single `write`
//! from any thread, and no vCPU leaves the guest for it.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// An edge-triggered interrupt line. Cloning shares it.
#[derive(Clone, Debug)]
pub struct IrqLine {
    gsi: u32,
    fd: Arc<EventFd>,
}

impl IrqLine {
    /// Creates a line for `gsi`. KVM does not know it yet: the machine registers [`IrqLine::fd`] as an irqfd.
    pub fn new(gsi: u32) -> io::Result<Self> {
        Ok(IrqLine { gsi, fd: Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?) })
    }

    /// Returns the global system interrupt that the line raises.
    pub fn gsi(&self) -> u32 {
        self.gsi
    }

    /// Returns the line's eventfd.
    pub fn fd(&self) -> &EventFd {
        &self.fd
    }

    /// Raises the interrupt once. A failure does not matter: a full counter means that an interrupt is already pending.
    pub fn trigger(&self) {
        let _ = self.fd.write(1);
    }

    /// Returns the number of interrupts since the last call; for tests, where no KVM consumes the eventfd.
    pub fn take_count(&self) -> u64 {
        self.fd.read().unwrap_or(0)
    }
}
