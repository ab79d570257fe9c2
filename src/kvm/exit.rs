//! Entering the guest and decoding the reason of its exit.
//!
//! The exit is decoded from the run page by hand because vireo needs details that kvm-ioctls leaves out: the width of
//! string port accesses, and the data of internal errors.

#![allow(unsafe_code)]

use std::io;

use kvm_bindings as kb;
use kvm_ioctls::VcpuFd;

/// Reason why a vCPU left the guest. [`crate::vcpu`] decides what to do about it.
#[derive(Debug, PartialEq, Eq)]
pub enum Exit<'a> {
    /// `in`: fill `data`, element by element of `size` bytes (more than one for `rep ins`).
    PioIn {
        /// The port.
        port: u16,
        /// 1, 2 or 4.
        size: usize,
        /// A multiple of `size`.
        data: &'a mut [u8],
    },
    /// `out`: take `data`, element by element of `size` bytes.
    PioOut {
        /// The port.
        port: u16,
        /// 1, 2 or 4.
        size: usize,
        /// A multiple of `size`.
        data: &'a [u8],
    },
    /// A load outside RAM.
    MmioRead {
        /// Guest-physical address.
        addr: u64,
        /// 1 to 8 bytes to fill.
        data: &'a mut [u8],
    },
    /// A store outside RAM.
    MmioWrite {
        /// Guest-physical address.
        addr: u64,
        /// 1 to 8 bytes.
        data: &'a [u8],
    },
    /// A signal, or `immediate_exit`.
    Interrupted,
    /// Halt; only without an in-kernel irqchip.
    Halt,
    /// Triple fault.
    Shutdown,
    /// KVM could not continue at an instruction.
    InternalError {
        /// KVM_INTERNAL_ERROR_*.
        suberror: u32,
        /// Additional data from KVM; the meaning of some depends on the suberror.
        data: Vec<u64>,
    },
    /// The processor refused to enter the guest.
    FailEntry {
        /// Processor-specific reason.
        reason: u64,
    },
    /// A trap that KVM_SET_GUEST_DEBUG asked for, or one of the guest's own.
    Debug {
        /// Vector.
        exception: u32,
        /// Linear address of the instruction.
        pc: u64,
        /// Value of DR6.
        dr6: u64,
    },
    /// An exit that vireo did not ask for.
    Other(u32),
}

/// Runs the guest until an exit. `EAGAIN` is an error here: KVM returns it now and then for a vCPU that waits to be
/// started, and also if the host refused KVM a thread.
pub fn enter(vcpu: &mut VcpuFd) -> io::Result<Exit<'_>> {
    if let Err(e) = vcpu.run().map(|_| ()) {
        return match e.errno() {
            libc::EINTR => Ok(Exit::Interrupted),
            errno => Err(io::Error::from_raw_os_error(errno)),
        };
    }
    Ok(decode(vcpu.get_kvm_run()))
}

/// Largest `data` that KVM passes for one string port access: the page after the run page.
const PIO_DATA_MAX: usize = 4096;

fn decode(run: &mut kb::kvm_run) -> Exit<'_> {
    let base = std::ptr::from_mut(run).cast::<u8>();
    let exit = &mut run.__bindgen_anon_1;
    // SAFETY: in each arm, the exit reason says which member of the union the kernel filled in. The port data lie at an
    // offset that the kernel chose inside the mapping of the run page (KVM_GET_VCPU_MMAP_SIZE covers it).
    unsafe {
        match run.exit_reason {
            kb::KVM_EXIT_IO => {
                let io = exit.io;
                let size = usize::from(io.size).max(1);
                let len = (size * io.count as usize).min(PIO_DATA_MAX);
                let data = std::slice::from_raw_parts_mut(base.add(io.data_offset as usize), len);
                if u32::from(io.direction) == kb::KVM_EXIT_IO_IN {
                    Exit::PioIn { port: io.port, size, data }
                } else {
                    Exit::PioOut { port: io.port, size, data }
                }
            }
            kb::KVM_EXIT_MMIO => {
                let mmio = &mut exit.mmio;
                let (addr, len) = (mmio.phys_addr, (mmio.len as usize).min(mmio.data.len()));
                if mmio.is_write == 0 {
                    Exit::MmioRead { addr, data: &mut mmio.data[..len] }
                } else {
                    Exit::MmioWrite { addr, data: &mmio.data[..len] }
                }
            }
            kb::KVM_EXIT_INTR => Exit::Interrupted,
            kb::KVM_EXIT_HLT => Exit::Halt,
            kb::KVM_EXIT_SHUTDOWN => Exit::Shutdown,
            kb::KVM_EXIT_INTERNAL_ERROR => {
                let internal = exit.internal;
                let count = (internal.ndata as usize).min(internal.data.len());
                Exit::InternalError { suberror: internal.suberror, data: internal.data[..count].to_vec() }
            }
            kb::KVM_EXIT_FAIL_ENTRY => Exit::FailEntry { reason: exit.fail_entry.hardware_entry_failure_reason },
            kb::KVM_EXIT_DEBUG => {
                let debug = exit.debug.arch;
                Exit::Debug { exception: debug.exception, pc: debug.pc, dr6: debug.dr6 }
            }
            reason => Exit::Other(reason),
        }
    }
}
