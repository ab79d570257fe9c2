//! Interrupt lines: an eventfd that KVM turns into an edge on a GSI (irqfd), so raising one is a single `write`
//! from any thread and no vCPU leaves the guest for it.

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
    /// A line for `gsi`, not yet known to KVM: the machine registers [`IrqLine::fd`] as an irqfd.
    pub fn new(gsi: u32) -> io::Result<Self> {
        Ok(IrqLine { gsi, fd: Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?) })
    }

    /// The global system interrupt it raises.
    pub fn gsi(&self) -> u32 {
        self.gsi
    }

    /// The eventfd behind it.
    pub fn fd(&self) -> &EventFd {
        &self.fd
    }

    /// Raises the interrupt once. Cannot fail in a way that matters: a full counter means that one is pending.
    pub fn trigger(&self) {
        let _ = self.fd.write(1);
    }

    /// How often it was raised since the last call; for tests, where no KVM consumes the eventfd.
    pub fn take_count(&self) -> u64 {
        self.fd.read().unwrap_or(0)
    }
}
