//! The probe guest: a hundred instructions of bare metal that go from real mode to long mode and use, one after the
//! other, everything that a Linux guest needs of KVM. It reports each step to the host through [`STEP_PORT`].
//!
//! The assembler turns it into bytes at build time. The host copies them to [`CODE`] and never executes them itself.
#![allow(unsafe_code)] // For the assembly and the two symbols around it.

use core::arch::global_asm;

use crate::layout;

/// Load address and entry point of the code, in real mode with CS 0.
pub const CODE: u64 = 0x1000;
/// Top of the stack.
const STACK: u64 = 0x8000;
/// Page tables, created by the host: one PML4, one PDPT, and one page directory each for the first and the fourth GiB.
pub const PML4: u64 = 0x9000;

/// Port to which an 8-bit write reports the [`Step`] that was just done.
pub const STEP_PORT: u16 = 0x700;
/// Port where a 32-bit read returns a number; a 32-bit write must return its complement.
pub const ECHO_PORT: u16 = 0x704;
/// Port whose writes have no meaning: they are there to be timed.
pub const EXIT_PORT: u16 = 0x708;
/// Port where a 32-bit read returns the number of turns of the next timed loop, never 0. The host does not return from
/// the last read.
pub const LOOP_PORT: u16 = 0x70C;
/// MMIO register that behaves like [`ECHO_PORT`]: read at +0, write at +8.
pub const MMIO: u64 = layout::VIRTIO_MMIO;
/// Address to which the complement is written.
pub const MMIO_ECHO: u64 = MMIO + 8;
/// Interrupt line. It is above 15, so that it reaches only the IO-APIC and not the 8259 too.
pub const GSI: u32 = 20;
/// Number of writes to [`EXIT_PORT`] that are timed.
pub const EXITS: u32 = 256;
/// Number of instructions in one turn of the timed loop.
pub const LOOP_INSTRUCTIONS: u32 = 2;

/// Step that the guest has just done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// The guest runs at all.
    RealMode = 1,
    /// The guest is in 32-bit protected mode.
    ProtectedMode,
    /// The guest is in 64-bit long mode, with paging.
    LongMode,
    /// The guest has read and written a port.
    PortIo,
    /// The guest has read and written an MMIO register.
    Mmio,
    /// The IO-APIC is set up and the next instructions are `sti; hlt`.
    Halting,
    /// The guest continued after the `hlt`, and the interrupt's handler had run.
    Interrupt,
    /// The guest continued after the `hlt` although there was no interrupt.
    NoHalt,
    /// All timed exits are done.
    Exits,
}

impl Step {
    /// Returns the step that a written byte stands for.
    pub fn from_byte(byte: u8) -> Option<Self> {
        use Step::*;
        [RealMode, ProtectedMode, LongMode, PortIo, Mmio, Halting, Interrupt, NoHalt, Exits]
            .into_iter()
            .find(|step| *step as u8 == byte)
    }
}

global_asm!(
    r#"
    .pushsection .rodata.vireo_probe, "a", @progbits
    .balign 16
    .globl vireo_probe_start
    .globl vireo_probe_end

    .code16
vireo_probe_start:
    cli
    movw    ${step_port}, %dx
    movb    ${real_mode}, %al
    outb    %al, %dx

    # Real mode to 32-bit protected mode.
    xorw    %ax, %ax
    movw    %ax, %ds
    lgdtl   (.Lgdt_pointer - vireo_probe_start + {code})
    movl    %cr0, %eax
    orb     $1, %al                             # PE
    movl    %eax, %cr0
    ljmpl   $0x08, $(.Lprotected - vireo_probe_start + {code})

    .code32
.Lprotected:
    movw    $0x10, %ax
    movw    %ax, %ds
    movw    %ax, %es
    movw    %ax, %ss
    movl    ${stack}, %esp
    movb    ${protected_mode}, %al
    outb    %al, %dx

    # Protected mode to long mode.
    movl    %cr4, %eax
    orl     $0x20, %eax                         # PAE
    movl    %eax, %cr4
    movl    ${pml4}, %eax
    movl    %eax, %cr3
    movl    $0xC0000080, %ecx                   # EFER
    rdmsr
    orl     $0x100, %eax                        # LME
    wrmsr
    movl    %cr0, %eax
    orl     $0x80000000, %eax                   # PG
    movl    %eax, %cr0
    ljmpl   $0x18, $(.Llong - vireo_probe_start + {code})

    .code64
.Llong:
    movl    ${step_port}, %edx                  # WRMSR changed it.
    movb    ${long_mode}, %al
    outb    %al, %dx

    # Port I/O.
    movl    ${echo_port}, %edx
    inl     %dx, %eax
    notl    %eax
    outl    %eax, %dx
    movl    ${step_port}, %edx
    movb    ${port_io}, %al
    outb    %al, %dx

    # MMIO.
    movl    ${mmio}, %esi
    movl    (%rsi), %eax
    notl    %eax
    movl    %eax, 8(%rsi)
    movb    ${mmio_done}, %al
    outb    %al, %dx

    # An interrupt: local APIC on, IO-APIC pin to vector 32 of processor 0, edge-triggered, unmasked.
    movl    $(.Lidt_pointer - vireo_probe_start + {code}), %esi
    lidt    (%rsi)
    movl    ${lapic}, %edi
    movl    $0x1FF, 0xF0(%rdi)                  # Spurious vector register: enable.
    movl    ${ioapic}, %esi
    movl    ${pin_high}, (%rsi)
    movl    $0, 0x10(%rsi)
    movl    ${pin_low}, (%rsi)
    movl    $32, 0x10(%rsi)
    movb    ${no_halt}, %bl
    movb    ${halting}, %al
    outb    %al, %dx
    sti                                         # Takes effect after the next instruction.
    hlt
    cli
    movb    %bl, %al                            # The handler has changed it.
    outb    %al, %dx

    # Exits to be timed.
    movl    ${exit_port}, %edx
    .rept   {exits}
    outb    %al, %dx
    .endr
    movl    ${step_port}, %edx
    movb    ${exits_done}, %al
    outb    %al, %dx

    # Loops to be timed.
    movl    ${loop_port}, %edx
.Ltimed_loop:
    inl     %dx, %eax
.Lturn:
    decl    %eax
    jnz     .Lturn
    jmp     .Ltimed_loop

    # Handler of vector 32.
.Lhandler:
    movb    ${interrupt}, %bl
    movl    $0, 0xB0(%rdi)                      # End of interrupt.
    iretq

    .balign 8
.Lgdt:
    .quad   0                                   # GDT: null, 32-bit code, data, 64-bit code.
    .quad   0x00CF9B000000FFFF
    .quad   0x00CF93000000FFFF
    .quad   0x00AF9B000000FFFF
.Lgdt_pointer:
    .word   4 * 8 - 1
    .long   .Lgdt - vireo_probe_start + {code}
    .word   0
.Lidt_pointer:
    .word   33 * 16 - 1
    .quad   .Lidt - vireo_probe_start + {code}
    .balign 16
.Lidt:
    .skip   32 * 16                             # IDT: nothing for exceptions, so that they end the guest.
    .word   .Lhandler - vireo_probe_start + {code}, 0x18
    .word   0x8E00, 0, 0, 0, 0, 0               # Interrupt gate, present.
vireo_probe_end:
    .popsection
    "#,
    code = const CODE,
    stack = const STACK,
    pml4 = const PML4,
    step_port = const STEP_PORT,
    echo_port = const ECHO_PORT,
    exit_port = const EXIT_PORT,
    loop_port = const LOOP_PORT,
    mmio = const MMIO,
    lapic = const layout::LAPIC,
    ioapic = const layout::IOAPIC,
    pin_low = const 0x10 + 2 * GSI,
    pin_high = const 0x11 + 2 * GSI,
    exits = const EXITS,
    real_mode = const Step::RealMode as u8,
    protected_mode = const Step::ProtectedMode as u8,
    long_mode = const Step::LongMode as u8,
    port_io = const Step::PortIo as u8,
    mmio_done = const Step::Mmio as u8,
    halting = const Step::Halting as u8,
    interrupt = const Step::Interrupt as u8,
    no_halt = const Step::NoHalt as u8,
    exits_done = const Step::Exits as u8,
    options(att_syntax)
);

unsafe extern "C" {
    static vireo_probe_start: u8;
    static vireo_probe_end: u8;
}

/// Returns the guest's bytes, to be placed at [`CODE`].
pub fn code() -> &'static [u8] {
    let start = &raw const vireo_probe_start;
    let end = &raw const vireo_probe_end;
    // SAFETY: both symbols lie in the one read-only section above, which is initialised from start to end and lives as
    // long as the program.
    unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
}
