//! The host's own processor: leaves that KVM does not report, and the permission for guests to use AMX.

use std::arch::x86_64::{__cpuid, CpuidResult};

/// `arch_prctl` code (Linux's arch/x86/include/uapi/asm/prctl.h): get the state components that this host supports.
const ARCH_GET_XCOMP_SUPP: i32 = 0x1021;
/// `arch_prctl` code: request permission for guests to use a state component, for the process and its threads.
const ARCH_REQ_XCOMP_GUEST_PERM: i32 = 0x1025;
/// The state component of AMX's tiles, the only one that needs permission.
const XTILEDATA: u64 = 18;

/// Reads a CPUID leaf of the processor that this thread runs on.
pub(super) fn leaf(function: u32) -> CpuidResult {
    // A leaf above the highest one would return the data of another leaf (Intel SDM, volume 2, CPUID).
    let highest = cpuid(function & 0x8000_0000).eax;
    if function > highest { CpuidResult { eax: 0, ebx: 0, ecx: 0, edx: 0 } } else { cpuid(function) }
}

#[allow(unsafe_code, unused_unsafe)]
fn cpuid(function: u32) -> CpuidResult {
    // SAFETY: every x86-64 processor has the instruction. (Newer compilers declare the function safe.)
    unsafe { __cpuid(function) }
}

/// Asks the kernel to let guests use AMX. This must happen before asking KVM for its supported features: since Linux
/// 5.17, KVM offers AMX's tiles only to processes with this permission. If the kernel refuses, guests do not have AMX
/// (see [`super::xstate`]).
pub(super) fn permit_amx() {
    let mut supported = 0u64;
    if arch_prctl(ARCH_GET_XCOMP_SUPP, std::ptr::from_mut(&mut supported) as usize).is_err()
        || supported & 1 << XTILEDATA == 0
    {
        return;
    }
    if let Err(e) = arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM, XTILEDATA as usize) {
        log::info!("guests cannot use AMX on this host: {e}");
    }
}

#[allow(unsafe_code)]
fn arch_prctl(code: i32, argument: usize) -> std::io::Result<()> {
    // SAFETY: one of the two codes takes a pointer, to which the kernel writes the 64-bit number that the caller keeps
    // there; the other code takes a number.
    match unsafe { libc::syscall(libc::SYS_arch_prctl, code, argument) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaves_above_the_highest_one_are_empty() {
        assert_ne!(leaf(0).eax, 0);
        for function in [0x7FFF_FFFF, 0xFFFF_FFFF] {
            let CpuidResult { eax, ebx, ecx, edx } = leaf(function);
            assert_eq!([eax, ebx, ecx, edx], [0; 4], "{function:#x}");
        }
        // The kernel may grant or refuse this.
        permit_amx();
    }
}
