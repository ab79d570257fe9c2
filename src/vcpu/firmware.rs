//! State of a processor after its firmware, where it differs from a reset.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::Vcpu;
use crate::kvm::{Error, failed};

/// MSRs as firmware leaves them: fast string operations are on, and the default memory type is write-back, because a
/// guest that finds memory types undefined maps its memory uncached.
const MSRS: [(u32, u64); 2] = [(0x1A0, 1), (0x2FF, 1 << 11 | 6)];

/// Sets [`MSRS`]. KVM stops at the first MSR that it refuses, and returns the number of MSRs that it set.
pub(super) fn set_msrs(fd: &VcpuFd) -> Result<(), Error> {
    let entries = MSRS.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    let list = Msrs::from_entries(&entries).map_err(|_| Error::Lacks("room for MSRs"))?;
    all_taken(fd.set_msrs(&list).map_err(failed("KVM_SET_MSRS"))?)
}

/// Fails with the first refused MSR unless KVM set all of [`MSRS`].
fn all_taken(taken: usize) -> Result<(), Error> {
    match MSRS.get(taken) {
        Some((index, value)) => Err(Error::Msr { index: *index, value: *value }),
        None => Ok(()),
    }
}

impl Vcpu {
    /// Routes the local interrupt pins as firmware does for a guest that may use the 8259 (`--acpi off`): LINT0
    /// receives its interrupts, LINT1 is the NMI (Intel SDM, 11.5.1).
    pub fn connect_pic(&self) -> Result<(), Error> {
        const LVT_LINT0: usize = 0x350;
        const LVT_LINT1: usize = 0x360;
        let mut lapic = self.fd.get_lapic().map_err(failed("KVM_GET_LAPIC"))?;
        for (offset, mode) in [(LVT_LINT0, 7u32), (LVT_LINT1, 4)] {
            for (i, byte) in (mode << 8).to_le_bytes().into_iter().enumerate() {
                lapic.regs[offset + i] = byte as _;
            }
        }
        self.fd.set_lapic(&lapic).map_err(failed("KVM_SET_LAPIC"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_msr_that_kvm_does_not_take_is_named() {
        assert!(all_taken(2).is_ok());
        let error = all_taken(1).unwrap_err().to_string();
        assert_eq!(error, "this host's KVM refuses to set a guest's MSR 0x2ff to 0x806");
    }
}
