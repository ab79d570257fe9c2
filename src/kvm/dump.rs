//! State of a vCPU when its guest ended, for people and for core files.

use std::fmt;

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_STOPPED, KVM_MP_STATE_UNINITIALIZED, kvm_regs,
    kvm_sregs,
};
use kvm_ioctls::VcpuFd;

use crate::memory::GuestRam;

/// Registers of a vCPU. `Display` prints all of them, and the bytes of the current instruction.
#[derive(Clone, Debug, Default)]
pub struct CpuState {
    /// The vCPU's number.
    pub id: u32,
    /// General registers.
    pub regs: kvm_regs,
    /// Segments, tables, control registers.
    pub sregs: kvm_sregs,
    /// KVM_MP_STATE_*.
    mp_state: u32,
    /// Bytes of the current instruction, or the reason why they are unavailable.
    code: String,
}

impl CpuState {
    /// Reads the state of a vCPU that is not in the guest; `None` if KVM refuses.
    pub fn read(id: u32, vcpu: &VcpuFd, ram: &GuestRam) -> Option<CpuState> {
        let (regs, sregs) = (vcpu.get_regs().ok()?, vcpu.get_sregs().ok()?);
        let mp_state = vcpu.get_mp_state().map_or(0, |state| state.mp_state);
        let code = match vcpu.translate_gva(sregs.cs.base.wrapping_add(regs.rip)) {
            Ok(t) if t.valid != 0 => {
                let mut bytes = [0; 15];
                match ram.read(t.physical_address, &mut bytes) {
                    Ok(()) => bytes.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" "),
                    Err(_) => format!("not in RAM (physical address {:#x})", t.physical_address),
                }
            }
            _ => "not mapped".into(),
        };
        Some(CpuState { id, regs, sregs, mp_state, code })
    }

    /// Returns whether the registers have their reset values. On AMD processors, a shutdown leaves the processor's
    /// state undefined, so KVM resets it (svm.c, shutdown_interception).
    pub fn is_reset(&self) -> bool {
        (self.regs.rip, self.sregs.cs.base, self.sregs.cr0 & 1) == (0xFFF0, 0xFFFF_0000, 0)
    }
}

/// Returns whether a vCPU in this KVM_MP_STATE_* waits for INIT and SIPI.
pub fn is_unstarted(mp_state: u32) -> bool {
    matches!(mp_state, KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED | KVM_MP_STATE_STOPPED)
}

impl fmt::Display for CpuState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const INTERRUPT_FLAG: u64 = 1 << 9;
        let (id, r, s) = (self.id, &self.regs, &self.sregs);
        if is_unstarted(self.mp_state) {
            return write!(f, "vCPU {id}: not started");
        }
        let interrupts = if r.rflags & INTERRUPT_FLAG != 0 { "on" } else { "off" };
        let halted = if self.mp_state == KVM_MP_STATE_HALTED { ", halted" } else { "" };
        writeln!(f, "vCPU {id}: CPL {}, interrupts {interrupts}{halted}", s.ss.dpl)?;
        let rows: [&[(&str, u64)]; 6] = [
            &[("rip", r.rip), ("rflags", r.rflags)],
            &[("rax", r.rax), ("rbx", r.rbx), ("rcx", r.rcx), ("rdx", r.rdx)],
            &[("rsi", r.rsi), ("rdi", r.rdi), ("rbp", r.rbp), ("rsp", r.rsp)],
            &[("r8 ", r.r8), ("r9 ", r.r9), ("r10", r.r10), ("r11", r.r11)],
            &[("r12", r.r12), ("r13", r.r13), ("r14", r.r14), ("r15", r.r15)],
            &[("fs base", s.fs.base), ("gs base", s.gs.base)],
        ];
        for row in rows {
            let row = row.iter().map(|(name, value)| format!("{name} {value:016x}")).collect::<Vec<_>>();
            writeln!(f, "{}", row.join(" "))?;
        }
        writeln!(f, "cr0 {:x} cr2 {:x} cr3 {:x} cr4 {:x} efer {:x}", s.cr0, s.cr2, s.cr3, s.cr4, s.efer)?;
        let (gdt, idt) = (&s.gdt, &s.idt);
        writeln!(f, "gdt {:x}+{:x} idt {:x}+{:x}", gdt.base, gdt.limit, idt.base, idt.limit)?;
        let (cs, ss, ds, tr) = (s.cs.selector, s.ss.selector, s.ds.selector, s.tr.selector);
        writeln!(f, "cs {cs:04x} base {:x} ss {ss:04x} ds {ds:04x} tr {tr:04x}", s.cs.base)?;
        write!(f, "instruction bytes: {}", self.code)?;
        if self.is_reset() {
            f.write_str("\nthese are reset values: this processor loses the guest's state on a shutdown")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_processor_did() {
        let mut state = CpuState { id: 3, code: "f4".into(), ..CpuState::default() };
        state.regs.rflags = 0x202;
        state.sregs.ss.dpl = 3;
        assert!(state.to_string().starts_with("vCPU 3: CPL 3, interrupts on\nrip 0000000000000000 rflags"), "{state}");
        assert!(state.to_string().ends_with("\ninstruction bytes: f4"), "{state}");
        state.mp_state = KVM_MP_STATE_HALTED;
        state.regs.rflags = 2;
        assert!(state.to_string().contains("interrupts off, halted"), "{state}");
        state.regs.rip = 0xFFF0;
        state.sregs.cs.base = 0xFFFF_0000;
        assert!(state.to_string().contains("reset values"), "{state}");
        state.mp_state = KVM_MP_STATE_UNINITIALIZED;
        assert_eq!(state.to_string(), "vCPU 3: not started");
    }
}
