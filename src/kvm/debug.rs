//! A debugger's operations on a vCPU: registers as plain values, address translation by the vCPU's page tables, and
//! KVM_SET_GUEST_DEBUG (Documentation/virt/kvm/api.rst, 4.87), including the decision whether a trap belongs to the
//! debugger or to the guest.

use std::io;
use std::sync::Arc;

use kvm_bindings as kb;
use kvm_bindings::{Xsave, kvm_fpu, kvm_guest_debug, kvm_regs, kvm_sregs, kvm_xsave};
use kvm_ioctls::VcpuFd;

/// Number of debug registers that hold an address (Intel SDM, volume 3, 18.2.1).
pub const HARDWARE_SLOTS: usize = 4;

/// A request to a paused vCPU.
#[derive(Clone, Debug)]
pub enum Request {
    /// Reads all registers; answered by [`Answer::Registers`].
    Read,
    /// Sets the registers that differ.
    Write(Box<Registers>),
    /// Translates a linear to a guest-physical address; answered by [`Answer::Address`].
    Translate(u64),
    /// Sets the conditions that make the vCPU stop from now on.
    Control(Control),
}

/// A vCPU's answer to a [`Request`].
#[derive(Clone, Debug)]
pub enum Answer {
    /// The request was carried out.
    Done,
    /// Answer to [`Request::Read`].
    Registers(Box<Registers>),
    /// Answer to [`Request::Translate`]; `None` if nothing is mapped.
    Address(Option<u64>),
}

/// Registers of a vCPU.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Registers {
    /// General registers, RIP and RFLAGS.
    pub general: kvm_regs,
    /// Segments and control registers.
    pub special: kvm_sregs,
    /// x87 and SSE registers.
    pub float: kvm_fpu,
}

/// Access that triggers a hardware breakpoint; the value is the one in DR7.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The instruction at the address is about to be executed.
    Execute = 0,
    /// The memory was written.
    Write = 1,
    /// The memory was written or read.
    Any = 3,
}

/// A hardware breakpoint or watchpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hardware {
    /// Linear address, a multiple of `len`.
    pub addr: u64,
    /// 1, 2, 4 or 8 bytes; 1 for instructions.
    pub len: u8,
    /// Access that triggers the breakpoint.
    pub access: Access,
}

/// Conditions under which a vCPU stops for the debugger.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Control {
    /// Stop after one instruction, without interrupts during the step as far as KVM can block them.
    pub step: bool,
    /// Addresses of the debugger's breakpoint instructions; any others are the guest's own.
    pub breakpoints: Arc<[u64]>,
    /// Contents of the debug registers.
    pub hardware: [Option<Hardware>; HARDWARE_SLOTS],
}

/// Reason why a vCPU stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The vCPU has executed a single step.
    Step,
    /// The vCPU is at one of the debugger's breakpoint instructions.
    Breakpoint,
    /// A hardware breakpoint was triggered.
    Hardware(Hardware),
}

/// A vCPU that stopped for the debugger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trap {
    /// The vCPU's number.
    pub vcpu: u32,
    /// Reason of the stop.
    pub cause: Cause,
}

/// Vectors of #DB and #BP.
const DB_VECTOR: u32 = 1;
const BP_VECTOR: u32 = 3;
/// DR7: exact breakpoints, and the bit that is always set.
const DR7_BASE: u64 = 1 << 9 | 1 << 10;

impl Control {
    /// Returns the cause of a trap that belongs to the debugger; `Err` is the KVM_GUESTDBG_INJECT_* flag that passes
    /// the trap to the guest.
    pub fn judge(&self, exception: u32, pc: u64, dr6: u64) -> Result<Cause, u32> {
        if exception == BP_VECTOR {
            return if self.breakpoints.contains(&pc) {
                Ok(Cause::Breakpoint)
            } else {
                Err(kb::KVM_GUESTDBG_INJECT_BP)
            };
        }
        let hit = self.hardware.iter().enumerate().find(|(slot, hardware)| hardware.is_some() && dr6 >> slot & 1 == 1);
        match hit {
            Some((_, Some(hardware))) => Ok(Cause::Hardware(*hardware)),
            _ if self.step && exception == DB_VECTOR => Ok(Cause::Step),
            _ => Err(kb::KVM_GUESTDBG_INJECT_DB),
        }
    }

    /// Applies the conditions in KVM. `inject` is a flag returned by [`Control::judge`], or 0.
    pub fn apply(&self, vcpu: &VcpuFd, inject: u32) -> io::Result<()> {
        let mut debug = self.guest_debug();
        debug.control |= inject;
        let result = match vcpu.set_guest_debug(&debug) {
            // Kernels before 5.16 cannot block interrupts.
            Err(e) if e.errno() == libc::EINVAL && debug.control & kb::KVM_GUESTDBG_BLOCKIRQ != 0 => {
                debug.control &= !kb::KVM_GUESTDBG_BLOCKIRQ;
                vcpu.set_guest_debug(&debug)
            }
            result => result,
        };
        result.map_err(os)
    }

    fn guest_debug(&self) -> kvm_guest_debug {
        let mut debug = kvm_guest_debug::default();
        if self.step {
            debug.control |= kb::KVM_GUESTDBG_SINGLESTEP | kb::KVM_GUESTDBG_BLOCKIRQ;
        }
        if !self.breakpoints.is_empty() {
            debug.control |= kb::KVM_GUESTDBG_USE_SW_BP;
        }
        let registers = &mut debug.arch.debugreg;
        for (slot, hardware) in self.hardware.iter().enumerate() {
            let Some(Hardware { addr, len, access }) = hardware else { continue };
            let len = match len {
                1 => 0,
                2 => 1,
                4 => 3u64,
                _ => 2,
            };
            registers[slot] = *addr;
            registers[7] |= DR7_BASE | 2 << (slot * 2) | (*access as u64 | len << 2) << (16 + slot * 4);
            debug.control |= kb::KVM_GUESTDBG_USE_HW_BP;
        }
        if debug.control != 0 {
            debug.control |= kb::KVM_GUESTDBG_ENABLE;
        }
        debug
    }
}

/// Reads all registers. `xsave_len` is [`super::Vm::xsave_len`].
pub fn read(vcpu: &VcpuFd, xsave_len: usize) -> io::Result<Registers> {
    let general = vcpu.get_regs().map_err(os)?;
    // KVM_GET_FPU does not return MXCSR.
    let float = float(&extended_state(vcpu, xsave_len)?.as_fam_struct_ref().xsave);
    Ok(Registers { general, special: vcpu.get_sregs().map_err(os)?, float })
}

/// Reads the state that XSAVE saves. For a guest with AMX, it is larger than the 4096 bytes of KVM_GET_XSAVE, which
/// then fails.
#[allow(unsafe_code)]
fn extended_state(vcpu: &VcpuFd, len: usize) -> io::Result<Xsave> {
    let more = len.saturating_sub(size_of::<kvm_xsave>());
    let mut xsave = Xsave::new(more.div_ceil(size_of::<u32>())).map_err(|_| io::ErrorKind::OutOfMemory)?;
    if more > 0 {
        // SAFETY: KVM writes no more than the `len` bytes that it announced, and the buffer is at least as large.
        unsafe { vcpu.get_xsave2(&mut xsave) }.map_err(os)?;
    } else {
        // SAFETY: only the part of fixed length is replaced, which does not affect the length of the rest.
        unsafe { xsave.as_mut_fam_struct() }.xsave = vcpu.get_xsave().map_err(os)?;
    }
    Ok(xsave)
}

/// Returns the x87 and SSE registers from the legacy region of XSAVE (Intel SDM, volume 1, 13.4.1).
fn float(xsave: &kvm_xsave) -> kvm_fpu {
    let words = &xsave.region;
    let wide = |at: usize| u64::from(words[at]) | u64::from(words[at + 1]) << 32;
    let row = |at: usize| (u128::from(wide(at)) | u128::from(wide(at + 2)) << 64).to_le_bytes();
    let mut float = kvm_fpu {
        fcw: words[0] as u16,
        fsw: (words[0] >> 16) as u16,
        ftwx: words[1] as u8,
        last_opcode: (words[1] >> 16) as u16,
        last_ip: wide(2),
        last_dp: wide(4),
        mxcsr: words[6],
        ..kvm_fpu::default()
    };
    (8..).step_by(4).zip(&mut float.fpr).for_each(|(at, to)| *to = row(at));
    (40..).step_by(4).zip(&mut float.xmm).for_each(|(at, to)| *to = row(at));
    float
}

/// Stores the values in the legacy region, and marks them as present (13.4.2).
fn set_float(xsave: &mut kvm_xsave, float: &kvm_fpu) {
    let words = &mut xsave.region;
    let mut put = |at: usize, bytes: &[u8]| {
        for (word, bytes) in words.iter_mut().skip(at).zip(bytes.chunks_exact(4)) {
            *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
    };
    put(0, &(u32::from(float.fcw) | u32::from(float.fsw) << 16).to_le_bytes());
    put(1, &(u32::from(float.ftwx) | u32::from(float.last_opcode) << 16).to_le_bytes());
    put(2, &float.last_ip.to_le_bytes());
    put(4, &float.last_dp.to_le_bytes());
    put(6, &float.mxcsr.to_le_bytes());
    put(8, float.fpr.as_flattened());
    put(40, float.xmm.as_flattened());
    words[128] |= 0b11;
}

/// Sets the registers that differ. The others stay untouched because setting has side effects, such as dropping a
/// pending exception.
pub fn write(vcpu: &VcpuFd, wanted: &Registers, xsave_len: usize) -> io::Result<()> {
    let Registers { general, special, float } = read(vcpu, xsave_len)?;
    if wanted.special != special {
        vcpu.set_sregs(&wanted.special).map_err(os)?;
    }
    if wanted.general != general {
        vcpu.set_regs(&wanted.general).map_err(os)?;
    }
    if wanted.float != float {
        set_extended_state(vcpu, &wanted.float, xsave_len)?;
    }
    Ok(())
}

#[allow(unsafe_code)]
fn set_extended_state(vcpu: &VcpuFd, float: &kvm_fpu, len: usize) -> io::Result<()> {
    let mut xsave = extended_state(vcpu, len)?;
    // SAFETY: only the part of fixed length is changed, which does not affect the length of the rest.
    set_float(&mut unsafe { xsave.as_mut_fam_struct() }.xsave, float);
    // SAFETY: KVM reads as many bytes as it wrote into this buffer.
    unsafe { vcpu.set_xsave2(&xsave) }.map_err(os)
}

/// Returns the guest-physical address of a linear address, or `None` if nothing is mapped.
pub fn translate(vcpu: &VcpuFd, addr: u64) -> io::Result<Option<u64>> {
    let found = vcpu.translate_gva(addr).map_err(os)?;
    Ok((found.valid != 0).then_some(found.physical_address))
}

fn os(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hardware(slots: &[(usize, Hardware)]) -> [Option<Hardware>; HARDWARE_SLOTS] {
        let mut all = [None; HARDWARE_SLOTS];
        slots.iter().for_each(|(slot, hardware)| all[*slot] = Some(*hardware));
        all
    }

    #[test]
    fn debug_registers_are_as_the_manual_has_them() {
        let at = |addr, len, access| Hardware { addr, len, access };
        let all = hardware(&[
            (0, at(0x1000, 1, Access::Execute)),
            (1, at(0x2002, 2, Access::Write)),
            (2, at(0x3004, 4, Access::Any)),
            (3, at(0x4008, 8, Access::Write)),
        ]);
        let debug = Control { hardware: all, ..Control::default() }.guest_debug();
        assert_eq!(debug.control, kb::KVM_GUESTDBG_ENABLE | kb::KVM_GUESTDBG_USE_HW_BP);
        assert_eq!(debug.arch.debugreg[..4], [0x1000, 0x2002, 0x3004, 0x4008]);
        // From the top: LEN and R/W of slots 3 to 0 (8 bytes are 10, a write is 01; 4 bytes are 11, any access is 11),
        // then G3 to G0.
        assert_eq!(debug.arch.debugreg[7], 0b1001_1111_0101_0000 << 16 | 0b110_1010_1010);
        assert_eq!(Control::default().guest_debug().control, 0);
        let step = Control { step: true, breakpoints: [1].into(), ..Control::default() };
        let flags = kb::KVM_GUESTDBG_SINGLESTEP | kb::KVM_GUESTDBG_USE_SW_BP | kb::KVM_GUESTDBG_BLOCKIRQ;
        assert_eq!(step.guest_debug().control, kb::KVM_GUESTDBG_ENABLE | flags);
    }

    #[test]
    fn x87_and_sse_make_the_round_trip() {
        let mut xsave = kvm_xsave::default();
        xsave.region.iter_mut().zip(1..).for_each(|(word, n)| *word = 0x0102_0305u32.wrapping_mul(n));
        xsave.region[1] &= 0xFFFF_00FF; // reserved
        let mut copy = kvm_xsave { region: xsave.region, ..Default::default() };
        copy.region[..7].fill(0);
        copy.region[8..104].fill(0);
        set_float(&mut copy, &float(&xsave));
        xsave.region[128] |= 3;
        assert_eq!(copy.region, xsave.region);
        assert_eq!(
            (float(&xsave).mxcsr, float(&xsave).xmm[15][15]),
            (7 * 0x0102_0305, ((104 * 0x0102_0305u32) >> 24) as u8)
        );
    }

    #[test]
    fn traps_of_the_guests_own_are_given_to_it() {
        let watch = Hardware { addr: 8, len: 8, access: Access::Write };
        let mut control = Control { breakpoints: [0x1000].into(), ..Control::default() };
        assert_eq!(control.judge(BP_VECTOR, 0x1000, 0), Ok(Cause::Breakpoint));
        assert_eq!(control.judge(BP_VECTOR, 0x1001, 0), Err(kb::KVM_GUESTDBG_INJECT_BP));
        assert_eq!(control.judge(DB_VECTOR, 0x1000, 1 << 14), Err(kb::KVM_GUESTDBG_INJECT_DB));
        control.hardware = hardware(&[(2, watch)]);
        assert_eq!(control.judge(DB_VECTOR, 0, 0b0100), Ok(Cause::Hardware(watch)));
        assert_eq!(control.judge(DB_VECTOR, 0, 0b1011), Err(kb::KVM_GUESTDBG_INJECT_DB));
        control.step = true;
        assert_eq!(control.judge(DB_VECTOR, 0, 1 << 14), Ok(Cause::Step));
        assert_eq!(control.judge(DB_VECTOR, 0, 1 << 14 | 0b0100), Ok(Cause::Hardware(watch)));
    }
}
