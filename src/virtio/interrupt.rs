//! Interrupt of a device: its reasons, which the driver reads and acknowledges, and its line.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};

use crate::irq::IrqLine;
use crate::log_limit::LogLimit;

/// All reasons for an interrupt.
const REASONS: u32 = VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG;
/// Shift, within [`Shared::reasons`], of the reasons that the driver has read.
const READ: u32 = 8;

/// Interrupt from a device to its driver: reasons and line. Clones share both.
#[derive(Clone, Debug)]
pub struct Interrupt(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    line: IrqLine,
    /// `InterruptStatus` (4.2.2): the low bits are reasons that the driver has not read yet, the bits from [`READ`] on
    /// are reasons that it has read and not acknowledged.
    reasons: AtomicU32,
    /// `ConfigGeneration` (4.2.2).
    generation: AtomicU32,
    needs_reset: AtomicBool,
    faults: LogLimit,
}

impl Interrupt {
    /// Creates an interrupt without pending reasons.
    pub fn new(line: IrqLine) -> Self {
        let [reasons, generation] = [0; 2].map(AtomicU32::new);
        let (needs_reset, faults) = (AtomicBool::new(false), LogLimit::default());
        Interrupt(Arc::new(Shared { line, reasons, generation, needs_reset, faults }))
    }

    /// Announces used buffers (2.7.7). The reason is set before the line is raised, because the driver reads it first.
    pub fn used_buffers(&self) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    /// Announces a change of configuration space (2.3, 2.5). If a driver may read the space during the change, the
    /// caller must hold the lock of those reads until this returns: a driver that has seen part of the old bytes then
    /// sees a new generation afterwards.
    pub fn config_changed(&self) {
        self.new_generation();
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    /// Starts a new generation without an interrupt: the configuration that the driver has read so far is void.
    pub(super) fn new_generation(&self) {
        self.0.generation.fetch_add(1, Ordering::SeqCst);
    }

    /// Puts the device into a state that only a reset ends: sets `DEVICE_NEEDS_RESET` for the driver (2.1.2) and logs
    /// `why`, once per reset and within the log's limit.
    pub fn needs_reset(&self, device: &str, why: impl std::fmt::Display) {
        if self.is_reset_needed() {
            return;
        }
        // The status comes last: a driver that polls it finds the reason and the generation in their final state.
        self.new_generation();
        self.0.reasons.fetch_or(VIRTIO_MMIO_INT_CONFIG, Ordering::SeqCst);
        if self.0.needs_reset.swap(true, Ordering::SeqCst) {
            return;
        }
        self.0.line.trigger();
        self.0.faults.warn(format_args!("{device} stopped; its driver must reset it: {why}"));
    }

    /// Returns the line; vhost backends signal its descriptor directly.
    pub fn line(&self) -> &IrqLine {
        &self.0.line
    }

    /// Raises the line even if the reason is already set: the driver may look at the ring before or after it
    /// acknowledges.
    fn raise(&self, reason: u32) {
        self.0.reasons.fetch_or(reason, Ordering::SeqCst);
        self.0.line.trigger();
    }
}

/// Registers of the transport.
impl Interrupt {
    /// Reads `InterruptStatus`: a reason stays until it is acknowledged.
    pub(super) fn read_reasons(&self) -> u32 {
        let note = |reasons: u32| Some((reasons | reasons << READ) & REASONS << READ);
        let before =
            self.0.reasons.fetch_update(Ordering::SeqCst, Ordering::SeqCst, note).unwrap_or_else(|before| before);
        (before | before >> READ) & REASONS
    }

    /// Writes `InterruptACK`. Clears only reasons that the driver has read: KVM delivers this write with the next exit,
    /// and by then the same reason may be pending again.
    pub(super) fn acknowledge(&self, reasons: u32) {
        self.0.reasons.fetch_and(!((reasons & REASONS) << READ), Ordering::SeqCst);
    }

    /// Returns whether there is a reason that the driver has not read.
    pub(super) fn is_unread(&self) -> bool {
        self.0.reasons.load(Ordering::SeqCst) & REASONS != 0
    }

    /// Returns `ConfigGeneration`.
    pub(super) fn generation(&self) -> u32 {
        self.0.generation.load(Ordering::SeqCst)
    }

    /// Returns whether `DEVICE_NEEDS_RESET` is set.
    pub(super) fn is_reset_needed(&self) -> bool {
        self.0.needs_reset.load(Ordering::SeqCst)
    }

    /// Clears the state for a reset of the device; the generation continues.
    pub(super) fn reset(&self) {
        self.0.needs_reset.store(false, Ordering::SeqCst);
        self.0.reasons.store(0, Ordering::SeqCst);
    }

    /// Returns the reasons to save: those that were not acknowledged.
    pub(super) fn saved_reasons(&self) -> u32 {
        let reasons = self.0.reasons.load(Ordering::SeqCst);
        (reasons | reasons >> READ) & REASONS
    }

    /// Restores saved state. A reason that the driver had read before is reported to it again.
    pub(super) fn restore(&self, reasons: u32, generation: u32, needs_reset: bool) {
        self.0.reasons.store(reasons & REASONS, Ordering::SeqCst);
        self.0.generation.store(generation, Ordering::SeqCst);
        self.0.needs_reset.store(needs_reset, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VRING: u32 = VIRTIO_MMIO_INT_VRING;
    const CONFIG: u32 = VIRTIO_MMIO_INT_CONFIG;

    #[test]
    fn a_reason_stays_until_it_is_acknowledged() {
        let interrupt = Interrupt::new(IrqLine::new(5).unwrap());
        interrupt.used_buffers();
        assert_eq!([interrupt.read_reasons(), interrupt.read_reasons()], [VRING, VRING]);
        interrupt.config_changed();
        assert_eq!(interrupt.read_reasons(), VRING | CONFIG);
        interrupt.acknowledge(VRING);
        assert_eq!([interrupt.read_reasons(), interrupt.read_reasons()], [CONFIG, CONFIG]);
        interrupt.acknowledge(u32::MAX);
        assert_eq!(interrupt.read_reasons(), 0);
    }

    #[test]
    fn an_acknowledgement_takes_no_reason_that_was_not_read() {
        let interrupt = Interrupt::new(IrqLine::new(5).unwrap());
        interrupt.used_buffers();
        assert_eq!(interrupt.read_reasons(), VRING);
        // The driver has acknowledged, but the write is still in KVM's ring when the next buffer is used.
        interrupt.used_buffers();
        interrupt.acknowledge(VRING);
        assert!(interrupt.is_unread());
        assert_eq!(interrupt.read_reasons(), VRING);
        interrupt.acknowledge(VRING);
        assert_eq!((interrupt.read_reasons(), interrupt.is_unread()), (0, false));
    }

    #[test]
    fn what_was_read_is_saved_and_comes_again() {
        let interrupt = Interrupt::new(IrqLine::new(5).unwrap());
        interrupt.config_changed();
        interrupt.read_reasons();
        let saved = interrupt.saved_reasons();
        assert_eq!(saved, CONFIG);
        let restored = Interrupt::new(IrqLine::new(5).unwrap());
        restored.restore(saved | 0xF0, 7, false);
        assert!(restored.is_unread());
        assert_eq!((restored.read_reasons(), restored.generation()), (CONFIG, 7));
    }
}
