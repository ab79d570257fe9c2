//! What a vCPU was doing when its guest crashed, for people.

use kvm_ioctls::VcpuFd;

use crate::memory::GuestRam;

/// Registers and the bytes of the current instruction.
pub fn text(id: u32, vcpu: &VcpuFd, ram: &GuestRam) -> String {
    let (Ok(r), Ok(s)) = (vcpu.get_regs(), vcpu.get_sregs()) else {
        return format!("vCPU {}: its registers cannot be read", id);
    };
    let linear = s.cs.base.wrapping_add(r.rip);
    let code = match vcpu.translate_gva(linear) {
        Ok(t) if t.valid != 0 => {
            let mut bytes = [0; 15];
            match ram.read(t.physical_address, &mut bytes) {
                Ok(()) => bytes.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" "),
                Err(_) => format!("not in RAM (physical address {:#x})", t.physical_address),
            }
        }
        _ => "not mapped".into(),
    };
    // After a shutdown AMD leaves the processor's state undefined, so KVM resets it (svm.c, shutdown_interception).
    let reset = (r.rip, s.cs.base, s.cr0 & 1) == (0xFFF0, 0xFFFF_0000, 0);
    let note = if reset {
        "\nthese are reset values: this processor keeps none of the guest's when it shuts down"
    } else {
        ""
    };
    format!(
        "vCPU {id}:\n\
         rip {:016x} rflags {:016x} cs {:04x} base {:x}\n\
         rax {:016x} rbx {:016x} rcx {:016x} rdx {:016x}\n\
         rsi {:016x} rdi {:016x} rbp {:016x} rsp {:016x}\n\
         r8  {:016x} r9  {:016x} r10 {:016x} r11 {:016x}\n\
         r12 {:016x} r13 {:016x} r14 {:016x} r15 {:016x}\n\
         cr0 {:x} cr2 {:x} cr3 {:x} cr4 {:x} efer {:x}\n\
         gdt {:x}+{:x} idt {:x}+{:x} tr {:04x} ss {:04x} ds {:04x}\n\
         instruction bytes: {code}{note}",
        r.rip,
        r.rflags,
        s.cs.selector,
        s.cs.base,
        r.rax,
        r.rbx,
        r.rcx,
        r.rdx,
        r.rsi,
        r.rdi,
        r.rbp,
        r.rsp,
        r.r8,
        r.r9,
        r.r10,
        r.r11,
        r.r12,
        r.r13,
        r.r14,
        r.r15,
        s.cr0,
        s.cr2,
        s.cr3,
        s.cr4,
        s.efer,
        s.gdt.base,
        s.gdt.limit,
        s.idt.base,
        s.idt.limit,
        s.tr.selector,
        s.ss.selector,
        s.ds.selector,
    )
}
