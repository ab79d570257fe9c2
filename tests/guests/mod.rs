//! Guests of a few instructions, and the ELF files that make `vireo run --kernel` load them like any kernel.
//!
//! The assembler turns each guest into bytes at build time; nothing here executes them on the host. They are entered at
//! [`START`] with what Linux's 64-bit boot protocol promises (long mode, the first 4 GiB mapped to themselves), or, as
//! [`pvh`], in 32-bit protected mode. A guest finds the data that its test appends after its own end.

#![allow(dead_code, unsafe_code)] // Each test file uses some of them; the assembly and its symbols are foreign.

pub mod vireo;

use std::arch::global_asm;
use std::slice;

use ::vireo::layout;

/// Address at which guests are linked, loaded and entered.
pub const START: u64 = 0x20_0000;
/// Bytes of memory that a guest has to itself, from [`START`] on.
const RESERVED: u64 = 0x20_0000;

/// An ELF file with a 64-bit entry.
pub fn elf(code: &[u8]) -> Vec<u8> {
    image(code, &[])
}

/// An ELF file with a PVH note: entered in 32-bit protected mode.
pub fn pvh(code: &[u8]) -> Vec<u8> {
    // XEN_ELFNOTE_PHYS32_ENTRY is 18; the name is padded to a multiple of 4.
    let words = [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), START as u32];
    image(code, &words.map(u32::to_le_bytes).concat())
}

fn image(code: &[u8], note: &[u8]) -> Vec<u8> {
    const HEADER: u64 = 64;
    const PROGRAM_HEADER: u64 = 56;
    let note_offset = HEADER + 2 * PROGRAM_HEADER;
    let code_offset = note_offset + note.len() as u64;
    let mut file = b"\x7FELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend([2u16, 62].map(u16::to_le_bytes).concat()); // ET_EXEC, EM_X86_64
    file.extend(1u32.to_le_bytes());
    file.extend([START, HEADER, 0].map(u64::to_le_bytes).concat());
    file.extend(0u32.to_le_bytes());
    file.extend([64u16, 56, 2, 64, 0, 0].map(u16::to_le_bytes).concat());
    // Type and flags, offset, virtual and physical address, length in file and in memory, alignment.
    let load = (1 | 7 << 32, code_offset, START, code.len() as u64, RESERVED.max(code.len() as u64));
    let notes = (4 | 4 << 32, note_offset, 0, note.len() as u64, note.len() as u64);
    for (kind, offset, addr, len, mem) in [load, notes] {
        file.extend([kind, offset, addr, addr, len, mem, 4].map(u64::to_le_bytes).concat());
    }
    file.extend(note);
    file.extend(code);
    file
}

/// A bzImage that is not Linux, as memtest86+ is: no payload, entered as it is, and a file that ends within the last
/// unit of 16 bytes that its header counts.
pub fn bzimage(code: &[u8]) -> Vec<u8> {
    const SETUP: usize = 1024;
    const ENTRY: usize = 0x200;
    let mut kernel = vec![0; ENTRY];
    kernel.extend(code);
    if kernel.len().is_multiple_of(16) {
        kernel.push(0);
    }
    let mut file = vec![0; SETUP];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1F1, &[1]); // setup_sects: one beside the first
    put(0x1F4, &(kernel.len().div_ceil(16) as u32).to_le_bytes());
    put(0x1FE, &[0x55, 0xAA, 0xEB, 0x66]);
    put(0x202, b"HdrS\x0c\x02");
    put(0x211, &[1]); // loaded high
    put(0x22C, &u32::MAX.to_le_bytes());
    put(0x230, &0x1000u32.to_le_bytes());
    put(0x236, &[1, 0]); // there is a 64-bit entry
    put(0x238, &255u32.to_le_bytes());
    put(0x258, &(START - ENTRY as u64).to_le_bytes());
    put(0x260, &(RESERVED as u32).to_le_bytes());
    file.extend(kernel);
    file
}

/// A multiboot kernel: a 32-bit ELF file that is linked at another virtual address than the one it is loaded to.
pub fn multiboot_elf(code: &[u8]) -> Vec<u8> {
    const CODE_OFFSET: u32 = 0x80;
    const VIRTUAL: u32 = 0xC000_0000;
    let (start, len) = (START as u32, code.len() as u32);
    let mut file = b"\x7FELF\x01\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend([2u16, 3].map(u16::to_le_bytes).concat()); // ET_EXEC, EM_386
    file.extend([1, start + VIRTUAL, 52, 0, 0].map(u32::to_le_bytes).concat());
    file.extend([52u16, 32, 1, 40, 0, 0].map(u16::to_le_bytes).concat());
    // Type, offset, virtual and physical address, length in file and in memory, flags, alignment.
    let load = [1, CODE_OFFSET, start + VIRTUAL, start, len, len + RESERVED as u32, 7, 4];
    file.extend(load.map(u32::to_le_bytes).concat());
    file.resize(CODE_OFFSET as usize - 32, 0);
    file.extend(multiboot_header(3, &[]));
    file.resize(CODE_OFFSET as usize, 0);
    file.extend(code);
    file
}

/// A multiboot kernel that is not an ELF file: its header says where it is loaded.
pub fn multiboot_flat(code: &[u8]) -> Vec<u8> {
    const CODE_OFFSET: u32 = 0x40;
    let start = START as u32 - CODE_OFFSET;
    let bss_end = START as u32 + code.len() as u32 + RESERVED as u32;
    let mut file = multiboot_header(1 << 16, &[start, start, 0, bss_end, START as u32]);
    file.resize(CODE_OFFSET as usize, 0);
    file.extend(code);
    file
}

/// A multiboot header with those flags, and with `rest` after the checksum.
pub fn multiboot_header(flags: u32, rest: &[u32]) -> Vec<u8> {
    const MAGIC: u32 = 0x1BAD_B002;
    let checksum = 0u32.wrapping_sub(MAGIC).wrapping_sub(flags);
    [&[MAGIC, flags, checksum], rest].concat().iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Bytes of a guest, whose symbol is followed by its length and its code.
fn code(symbol: &'static u64) -> &'static [u8] {
    // SAFETY: `guest!` emits a length and then that many bytes.
    unsafe { slice::from_raw_parts(std::ptr::from_ref(symbol).add(1).cast(), *symbol as usize) }
}

/// Defines a function that returns the code of a guest. Label 99 is its end, where its data begins. `$symbol` is a
/// name for the linker.
macro_rules! guest {
    ($(#[$doc:meta])* $name:ident = $symbol:ident, $($line:expr),+ $(,)? ; $($operand:tt)*) => {
        global_asm!(
            ".pushsection .rodata.vireo_guests, \"a\", @progbits",
            ".balign 16",
            concat!(".globl ", stringify!($symbol)),
            concat!(stringify!($symbol), ":"),
            ".quad 99f - 98f",
            "98:",
            ".code64",
            $($line,)+
            ".balign 16",
            "99:",
            ".code64",
            ".popsection",
            $($operand)*
        );
        $(#[$doc])*
        pub fn $name() -> &'static [u8] {
            unsafe extern "C" {
                safe static $symbol: u64;
            }
            code(&$symbol)
        }
    };
}

guest! {
    /// Powers off immediately.
    power_off = vireo_guest_power_off,
    "mov dx, {port}", "mov al, {off}", "out dx, al", "2: hlt", "jmp 2b";
    port = const layout::SLEEP_CONTROL_PORT, off = const OFF,
}

/// Value that the sleep control register takes as "off".
const OFF: u8 = layout::S5_SLEEP_TYPE << 2 | 1 << 5;

guest! {
    /// Writes each of the (port, byte) pairs after its code, a 16-bit word and a byte in 4 bytes, until the port is 0.
    /// Then it halts with interrupts off or, if that last byte is not 0, crashes.
    write_ports = vireo_guest_write_ports,
    "lea rbx, [rip + 99f]",
    "2: movzx edx, word ptr [rbx]",
    "test edx, edx",
    "mov al, [rbx + 2]",
    "jz 3f",
    "out dx, al",
    "add rbx, 4",
    "jmp 2b",
    "3: test al, al",
    "jz 4f",
    "ud2",
    "4: cli",
    "hlt",
    "jmp 4b";
}

/// [`write_ports`] with its data, in an ELF file.
pub fn writes(pairs: &[(u16, u8)]) -> Vec<u8> {
    let mut guest = write_ports().to_vec();
    for (port, byte) in pairs {
        guest.extend(port.to_le_bytes());
        guest.extend([*byte, 0]);
    }
    guest.extend([0; 4]);
    elf(&guest)
}

/// The last pair for [`writes`] if the guest is to crash.
pub const CRASH: (u16, u8) = (0, 1);

/// The pairs for [`writes`] that send a text.
pub fn text(text: &str) -> Vec<(u16, u8)> {
    text.bytes().map(|byte| (layout::SERIAL_PORT, byte)).collect()
}

/// The pair for [`writes`] that powers off.
pub const POWER_OFF: (u16, u8) = (layout::SLEEP_CONTROL_PORT, OFF);

guest! {
    /// Prints "up" without a newline and then loops, without ever exiting to the host.
    say_and_spin = vireo_guest_say_and_spin,
    "mov dx, {port}", "mov al, 'u'", "out dx, al", "mov al, 'p'", "out dx, al", "2: jmp 2b";
    port = const layout::SERIAL_PORT,
}

guest! {
    /// Prints "up" without a newline and then halts for ever with interrupts on.
    say_and_sleep = vireo_guest_say_and_sleep,
    "mov dx, {port}", "mov al, 'u'", "out dx, al", "mov al, 'p'", "out dx, al", "2: sti", "hlt", "jmp 2b";
    port = const layout::SERIAL_PORT,
}

guest! {
    /// Halts for ever with interrupts on.
    sleep = vireo_guest_sleep,
    "2: sti", "hlt", "jmp 2b";
}

guest! {
    /// Sends the bytes 0 to 255 again and again, one by one.
    flood = vireo_guest_flood,
    "mov dx, {port}", "xor eax, eax", "2: out dx, al", "inc al", "jmp 2b";
    port = const layout::SERIAL_PORT,
}

guest! {
    /// Sends the bytes 0 to 255 again and again by `rep outsb` of 64 KiB, as often as the 64-bit number after its code
    /// says, then powers off.
    flood_blocks = vireo_guest_flood_blocks,
    "cld",
    "mov edi, {buffer}",
    "mov ecx, 0x10000",
    "xor eax, eax",
    "2: stosb",
    "inc al",
    "dec ecx",
    "jnz 2b",
    "mov rbx, [rip + 99f]",
    "3: mov esi, {buffer}",
    "mov ecx, 0x10000",
    "mov dx, {port}",
    "rep outsb",
    "dec rbx",
    "jnz 3b",
    "mov dx, {power}",
    "mov al, {off}",
    "out dx, al",
    "4: hlt",
    "jmp 4b";
    buffer = const BUFFER, port = const layout::SERIAL_PORT, power = const layout::SLEEP_CONTROL_PORT,
    off = const OFF,
}

/// Address at which guests keep what is too large for a register.
const BUFFER: u64 = START + 0x10_0000;

guest! {
    /// Prints "ready", then sends back each byte that it receives plus one; powers off on a `q`.
    echo = vireo_guest_echo,
    "lea rsi, [rip + 5f]",
    "mov ecx, 6",
    "cld",
    "mov dx, {data}",
    "rep outsb",
    "2: mov dx, {status}",
    "in al, dx",
    "test al, 1",
    "jz 2b",
    "mov dx, {data}",
    "in al, dx",
    "cmp al, 'q'",
    "je 3f",
    "inc al",
    "out dx, al",
    "jmp 2b",
    "3: mov dx, {power}",
    "mov al, {off}",
    "out dx, al",
    "4: hlt",
    "jmp 4b",
    "5: .ascii \"ready\\n\"";
    data = const layout::SERIAL_PORT, status = const layout::SERIAL_PORT + 5,
    power = const layout::SLEEP_CONTROL_PORT, off = const OFF,
}

guest! {
    /// Crashes: there is no handler for its undefined instruction, nor for what follows from that.
    triple_fault = vireo_guest_triple_fault,
    "mov rax, 0x1122334455667788", "ud2";
}

guest! {
    /// Reboots as Linux does by `reboot=t`: an empty interrupt table and an exception.
    empty_idt = vireo_guest_empty_idt,
    "lidt [rip + 2f]", "ud2", "2: .fill 10, 1, 0";
}

guest! {
    /// Continues at an address without memory.
    run_from_mmio = vireo_guest_run_from_mmio,
    "mov eax, {nowhere}", "jmp rax";
    nowhere = const NOWHERE,
}

/// Address in the MMIO hole, past all devices' slots.
pub const NOWHERE: u64 = 0xE000_0000;

guest! {
    /// Entered as a PVH kernel: prints "pvh" if it was given a start info, then returns to real mode and jumps to
    /// FFFF:0000, as Linux does when it knows no other way to reboot.
    jump_to_reset_vector = vireo_guest_jump_to_reset_vector,
    ".code32",
    "cmp dword ptr [ebx], 0x336EC578",
    "jne 9f",
    "mov edx, {port}",
    "mov al, 'p'",
    "out dx, al",
    "mov al, 'v'",
    "out dx, al",
    "mov al, 'h'",
    "out dx, al",
    // The real-mode part has to lie in the first MiB.
    "cld",
    "mov esi, {start} + 0x80",
    "mov edi, {low}",
    "mov ecx, 0x40",
    "rep movsb",
    "mov eax, {start} + 0xE0",
    "lgdt [eax]",
    ".byte 0xEA",                             // jmp 8:low
    ".long {low}",
    ".word 8",
    "9: hlt",
    "jmp 9b",
    ".org 98b + 0x80",
    ".code16",
    "mov ax, 16",
    "mov ds, ax",
    "mov es, ax",
    "mov ss, ax",
    "mov eax, cr0",
    "and al, 0xFE",
    "mov cr0, eax",
    ".byte 0xEA",                             // jmp FFFF:0
    ".word 0, 0xFFFF",
    // 16-bit code and data, 64 KiB from 0 on.
    ".org 98b + 0xC0",
    ".quad 0, 0x00009B000000FFFF, 0x000093000000FFFF",
    ".org 98b + 0xE0",
    ".word 23",
    ".long {start} + 0xC0";
    port = const layout::SERIAL_PORT, start = const START, low = const LOW,
}

/// Address of code that starts in real mode; it is free according to the layout.
const LOW: u64 = 0x1000;

guest! {
    /// Starts all other vCPUs; the 32-bit word after its code is the number of vCPUs, including the first. Each writes
    /// three words to its line of a table: its APIC ID by CPUID leaf 0Bh, by CPUID leaf 1 and by the x2APIC's MSR.
    /// Sends the table and powers off.
    smp = vireo_guest_smp,
    "cld",
    "mov esi, {start} + 0x100",
    "mov edi, {low}",
    "mov ecx, 0x80",
    "rep movsb",
    "mov ebp, 0xFEE00300",
    "mov dword ptr [rbp], 0xC4500",           // INIT to all but self
    "mov dword ptr [rbp], 0xC4600 + ({low} >> 12)",   // start-up, page 1
    "mov eax, [rip + 99f]",
    "dec eax",
    "2: pause",
    "cmp [{count}], eax",
    "jne 2b",
    // The boot processor fills in its own line by the same code, in its 64-bit form.
    "mov eax, 0xB",
    "xor ecx, ecx",
    "cpuid",
    "mov [{table}], edx",
    "mov eax, 1",
    "cpuid",
    "shr ebx, 24",
    "mov [{table} + 4], ebx",
    "mov ecx, 0x1B",
    "rdmsr",
    "or eax, 0xC00",
    "wrmsr",
    "mov ecx, 0x802",
    "rdmsr",
    "mov [{table} + 8], eax",
    "mov ecx, [rip + 99f]",
    "shl ecx, 4",
    "mov esi, {table}",
    "mov dx, {port}",
    "rep outsb",
    "mov dx, {power}",
    "mov al, {off}",
    "out dx, al",
    "3: hlt",
    "jmp 3b",
    ".org 98b + 0x100",
    ".code16",
    "cli",
    "xor ax, ax",
    "mov ds, ax",
    "mov eax, 0xB",
    "xor ecx, ecx",
    "cpuid",
    "mov edi, edx",
    "shl di, 4",
    "mov [{table} + di], edx",
    "mov eax, 1",
    "cpuid",
    "shr ebx, 24",
    "mov [{table} + 4 + di], ebx",
    "mov ecx, 0x1B",
    "rdmsr",
    "or eax, 0xC00",
    "wrmsr",
    "mov ecx, 0x802",
    "rdmsr",
    "mov [{table} + 8 + di], eax",
    "lock inc dword ptr [{count}]",
    "7: hlt",
    "jmp 7b",
    ".org 98b + 0x180";
    start = const START, low = const LOW, count = const LOW + 0x1000, table = const LOW + 0x2000, port = const layout::SERIAL_PORT,
    power = const layout::SLEEP_CONTROL_PORT, off = const OFF,
}

guest! {
    /// Writes to the physical address after its code, above 4 GiB, and reads back: prints "ok" or "no".
    touch_high = vireo_guest_touch_high,
    "mov rbx, [rip + 99f]",
    "mov rax, rbx",
    "shr rax, 30",
    "mov qword ptr [{pdpt} + rax * 8], {directory} + 3",
    "mov rax, rbx",
    "and rax, -0x200000",
    "or rax, 0x83",
    "mov rcx, rbx",
    "shr rcx, 21",
    "and ecx, 511",
    "mov [{directory} + rcx * 8], rax",
    "mov rax, cr3",
    "mov cr3, rax",
    "mov rcx, 0x0123456789ABCDEF",
    "mov [rbx], rcx",
    "mov rcx, [rbx]",
    "mov rax, 0x0123456789ABCDEF",
    "cmp rcx, rax",
    "mov ax, 0x6B6F",                         // "ok"
    "je 2f",
    "mov ax, 0x6F6E",                         // "no"
    "2: mov dx, {port}",
    "out dx, al",
    "mov al, ah",
    "out dx, al",
    "mov dx, {power}",
    "mov al, {off}",
    "out dx, al",
    "3: hlt",
    "jmp 3b";
    pdpt = const layout::PAGE_TABLES + layout::PAGE_SIZE, directory = const LOW + 0x3000,
    port = const layout::SERIAL_PORT, power = const layout::SLEEP_CONTROL_PORT, off = const OFF,
}

guest! {
    /// Reads all 65536 ports by the width in the 32-bit word after its code, 1, 2 or 4, and sends port and value
    /// (32-bit words, too) of those that are not all ones; with a second word of 1 it writes zeros to all of them
    /// instead.
    all_ports = vireo_guest_all_ports,
    "mov ecx, [rip + 99f]",
    "mov esi, [rip + 99f + 4]",
    "mov edi, {buffer}",
    "mov ebp, -1",
    "xor ebx, ebx",
    "2: mov edx, ebx",
    "xor eax, eax",
    "test esi, esi",
    "jnz 5f",
    "mov eax, ebp",
    "cmp ecx, 2",
    "je 3f",
    "ja 4f",
    "in al, dx",
    "jmp 8f",
    "3: in ax, dx",
    "jmp 8f",
    "4: in eax, dx",
    "jmp 8f",
    "5: cmp ecx, 2",
    "je 6f",
    "ja 7f",
    "out dx, al",
    "jmp 9f",
    "6: out dx, ax",
    "jmp 9f",
    "7: out dx, eax",
    "jmp 9f",
    "8: cmp eax, ebp",
    "je 9f",
    "mov [rdi], ebx",
    "mov [rdi + 4], eax",
    "add rdi, 8",
    "9: inc ebx",
    "cmp ebx, 0x10000",
    "jne 2b",
    "mov esi, {buffer}",
    "mov ecx, edi",
    "sub ecx, esi",
    "cld",
    "mov dx, {port}",
    "rep outsb",
    "mov dx, {power}",
    "mov al, {off}",
    "out dx, al",
    "3: hlt",
    "jmp 3b";
    buffer = const BUFFER, port = const layout::SERIAL_PORT, power = const layout::SLEEP_CONTROL_PORT,
    off = const OFF,
}

guest! {
    /// Guest for a debugger: counts RBX down from 5 to 0 at [`DEBUGGED_LOOP`], where it writes it to
    /// [`DEBUGGED_COUNT`], then spins until RSI is not 0, and powers off.
    debugged = vireo_guest_debugged,
    "mov rax, 0x1122334455667788",
    "mov ebx, 5",
    "2: mov qword ptr [{count}], rbx",
    "nop",
    "dec ebx",
    "jnz 2b",
    "xor esi, esi",
    "3: test esi, esi",
    "jz 3b",
    "mov dx, {power}",
    "mov al, {off}",
    "out dx, al",
    "4: hlt",
    "jmp 4b";
    count = const DEBUGGED_COUNT, power = const layout::SLEEP_CONTROL_PORT, off = const OFF,
}

/// Address that [`debugged`] writes to.
pub const DEBUGGED_COUNT: u64 = START + 0x1000;
/// Address of the instruction that writes; the one after it is `nop`.
pub const DEBUGGED_LOOP: u64 = START + 15;

guest! {
    /// Performs the [`Op`]s after its code, sends 8 bytes for each that reads, and powers off.
    run_script = vireo_guest_run_script,
    "cld",
    "mov esp, {buffer}",
    "lea rbx, [rip + 99f]",
    "20: mov eax, [rbx]",
    "mov ecx, [rbx + 4]",
    "mov rdx, [rbx + 8]",
    "mov rdi, [rbx + 16]",
    "add rbx, 24",
    "test eax, eax",
    "jz 80f",
    "cmp eax, 2",
    "jb 30f",
    "je 40f",
    "cmp eax, 4",
    "jb 50f",
    "je 60f",
    "cmp eax, 6",
    "jb 70f",
    "jmp 75f",
    "30: xor eax, eax",
    "cmp ecx, 2",
    "je 31f",
    "ja 32f",
    "in al, dx",
    "jmp 90f",
    "31: in ax, dx",
    "jmp 90f",
    "32: in eax, dx",
    "jmp 90f",
    "40: mov eax, edi",
    "cmp ecx, 2",
    "je 41f",
    "ja 42f",
    "out dx, al",
    "jmp 20b",
    "41: out dx, ax",
    "jmp 20b",
    "42: out dx, eax",
    "jmp 20b",
    "50: xor eax, eax",
    "cmp ecx, 2",
    "jb 51f",
    "je 52f",
    "cmp ecx, 4",
    "je 53f",
    "mov rax, [rdx]",
    "jmp 90f",
    "51: mov al, [rdx]",
    "jmp 90f",
    "52: mov ax, [rdx]",
    "jmp 90f",
    "53: mov eax, [rdx]",
    "jmp 90f",
    "60: cmp ecx, 2",
    "jb 61f",
    "je 62f",
    "cmp ecx, 4",
    "je 63f",
    "mov [rdx], rdi",
    "jmp 20b",
    "61: mov [rdx], dil",
    "jmp 20b",
    "62: mov [rdx], di",
    "jmp 20b",
    "63: mov [rdx], edi",
    "jmp 20b",
    "70: mov eax, ecx",
    "mov rcx, rdi",
    "mov edi, {buffer}",
    "cmp eax, 2",
    "je 71f",
    "ja 72f",
    "rep insb",
    "jmp 73f",
    "71: rep insw",
    "jmp 73f",
    "72: rep insd",
    "73: mov rax, [{buffer}]",
    "and rax, [rdi - 8]",
    "jmp 90f",
    "75: mov eax, ecx",
    "mov rcx, rdi",
    "mov esi, {zeros}",
    "cmp eax, 2",
    "je 76f",
    "ja 77f",
    "rep outsb",
    "jmp 20b",
    "76: rep outsw",
    "jmp 20b",
    "77: rep outsd",
    "jmp 20b",
    "80: mov dx, {power}",
    "mov al, {off}",
    "out dx, al",
    "81: hlt",
    "jmp 81b",
    "90: push rax",
    "mov rsi, rsp",
    "mov ecx, 8",
    "mov dx, {port}",
    "rep outsb",
    "pop rax",
    "jmp 20b";
    buffer = const BUFFER, zeros = const BUFFER + 0x4_0000, port = const layout::SERIAL_PORT, power = const layout::SLEEP_CONTROL_PORT,
    off = const OFF,
}

/// One access of [`run_script`]. Widths are in bytes.
#[derive(Clone, Copy, Debug)]
pub enum Op {
    /// `in` from a port.
    In(u32, u16),
    /// `out` of a value to a port.
    Out(u32, u16, u32),
    /// A load from an address.
    Load(u32, u64),
    /// A store of a value to an address.
    Store(u32, u64, u64),
    /// `rep ins` of this many elements, at least 8 bytes in all; sends the first 8 bytes and the last 8, ANDed.
    Ins(u32, u16, u64),
    /// `rep outs` of this many elements of zeros.
    Outs(u32, u16, u64),
}

impl Op {
    /// Returns what the operation reads if nothing answers; `None` if it does not read.
    pub fn ones(self) -> Option<u64> {
        match self {
            Op::In(width, _) | Op::Load(width, _) => Some(u64::MAX >> (64 - 8 * width)),
            Op::Ins(..) => Some(u64::MAX),
            Op::Out(..) | Op::Store(..) | Op::Outs(..) => None,
        }
    }
}

/// [`run_script`] with its script, in an ELF file.
pub fn script(ops: &[Op]) -> Vec<u8> {
    let mut guest = run_script().to_vec();
    for op in ops {
        let (kind, width, addr, value) = match *op {
            Op::In(width, port) => (1, width, port.into(), 0),
            Op::Out(width, port, value) => (2u32, width, u64::from(port), u64::from(value)),
            Op::Load(width, addr) => (3, width, addr, 0),
            Op::Store(width, addr, value) => (4, width, addr, value),
            Op::Ins(width, port, count) => (5, width, port.into(), count),
            Op::Outs(width, port, count) => (6, width, port.into(), count),
        };
        guest.extend([kind, width].map(u32::to_le_bytes).concat());
        guest.extend([addr, value].map(u64::to_le_bytes).concat());
    }
    guest.extend([0; 24]);
    elf(&guest)
}

/// A guest followed by numbers, in an ELF file.
pub fn with_words(guest: &[u8], words: &[u32]) -> Vec<u8> {
    let mut guest = guest.to_vec();
    words.iter().for_each(|word| guest.extend(word.to_le_bytes()));
    elf(&guest)
}

guest! {
    /// Entered by multiboot: sends the 88 bytes of its information, the memory map, the command line with its NUL, and
    /// the bytes and the string, with its NUL, of a module. Ends with 0x10 for the debug exit.
    multiboot_report = vireo_guest_multiboot_report,
    ".code32",
    "cmp eax, 0x2BADB002",
    "jne 9f",
    "cld",
    "mov edx, {port}",
    "mov esi, ebx",
    "mov ecx, 88",
    "rep outsb",
    "mov esi, [ebx + 48]",
    "mov ecx, [ebx + 44]",
    "rep outsb",
    "mov esi, [ebx + 16]",
    "2: lodsb",
    "out dx, al",
    "test al, al",
    "jnz 2b",
    "cmp dword ptr [ebx + 20], 1",
    "jne 4f",
    "mov edi, [ebx + 24]",
    "mov esi, [edi]",
    "mov ecx, [edi + 4]",
    "sub ecx, esi",
    "rep outsb",
    "mov esi, [edi + 8]",
    "3: lodsb",
    "out dx, al",
    "test al, al",
    "jnz 3b",
    "4: mov edx, {exit}",
    "mov eax, 0x10",
    "out dx, eax",
    "9: cli",
    "hlt",
    "jmp 9b";
    port = const layout::SERIAL_PORT, exit = const layout::DEBUG_EXIT_PORT,
}

guest! {
    /// Makes the test device hold pin 10 of the IO-APIC, which the guest has made level-triggered, until it has
    /// interrupted three times. Sends an "i" for each, then a "." and ends with 0 for the debug exit.
    level_interrupt = vireo_guest_level_interrupt,
    "mov esp, {idt} + 0x8000",
    // The gate of vector 0x30 and the table's descriptor.
    "lea rax, [rip + 30f]",
    "mov edi, {idt}",
    "mov [rdi + 0x300], ax",
    "mov dword ptr [rdi + 0x302], 0x8E000000 + 0x10",
    "shr eax, 16",
    "mov [rdi + 0x306], ax",
    "mov qword ptr [rdi + 0x308], 0",
    "mov word ptr [rdi + 0x1000], 0xFFF",
    "mov [rdi + 0x1002], rdi",
    "lidt [rdi + 0x1000]",
    // The line also reaches the 8259s: mask their interrupts.
    "mov al, 0xFF",
    "out 0x21, al",
    "out 0xA1, al",
    // The local APIC on; pin 10 to vector 0x30, level-triggered.
    "mov ebx, {lapic}",
    "mov dword ptr [rbx + 0xF0], 0x1FF",
    "mov edi, {ioapic}",
    "mov dword ptr [rdi], 0x10 + 2 * 10 + 1",
    "mov dword ptr [rdi + 0x10], 0",
    "mov dword ptr [rdi], 0x10 + 2 * 10",
    "mov dword ptr [rdi + 0x10], 0x8030",
    "mov esi, 3",
    "mov edx, {line}",
    "mov al, 1",
    "out dx, al",
    "20: cli",
    "test esi, esi",
    "jz 40f",
    "sti",
    "hlt",
    "jmp 20b",
    "30: mov edx, {port}",
    "mov al, 'i'",
    "out dx, al",
    "dec esi",
    "jnz 31f",
    "mov edx, {line}",
    "mov al, 0",
    "out dx, al",
    "31: mov dword ptr [rbx + 0xB0], 0",
    "iretq",
    // A fourth interrupt would arrive now.
    "40: sti",
    "nop",
    "nop",
    "cli",
    "mov edx, {port}",
    "mov al, '.'",
    "out dx, al",
    "mov edx, {exit}",
    "mov eax, 0",
    "out dx, eax",
    "50: hlt",
    "jmp 50b";
    idt = const START + 0x1000, lapic = const layout::LAPIC, ioapic = const layout::IOAPIC,
    line = const layout::TESTDEV_IRQ_PORT + 10, port = const layout::SERIAL_PORT,
    exit = const layout::DEBUG_EXIT_PORT,
}

guest! {
    /// Entered by multiboot: sends the masks of both 8259s and the mode of the 8254's channel 0. Then, in real mode with
    /// the vectors that it found, a "t" after each of three interrupts of the timer. Ends with 0x10 for the debug exit.
    multiboot_timer = vireo_guest_multiboot_timer,
    ".code32",
    "mov edx, {port}",
    "in al, 0x21",
    "out dx, al",
    "in al, 0xA1",
    "out dx, al",
    "mov al, 0xE2",                           // read back: the status of channel 0
    "out 0x43, al",
    "in al, 0x40",
    "and al, 0x3F",                           // without output and null count
    "out dx, al",
    // The real-mode part has to lie in the first MiB.
    "cld",
    "mov esi, {start} + 0x80",
    "mov edi, {low}",
    "mov ecx, 0x80",
    "rep movsb",
    "mov eax, {start} + 0x120",
    "lgdt [eax]",
    ".byte 0xEA",                             // jmp 8:low
    ".long {low}",
    ".word 8",
    ".org 98b + 0x80",
    ".code16",
    "mov ax, 16",
    "mov ds, ax",
    "mov es, ax",
    "mov ss, ax",
    "mov eax, cr0",
    "and al, 0xFE",
    "mov cr0, eax",
    ".byte 0xEA",                             // jmp 0:next
    ".word {low} + 2f - 98b - 0x80",
    ".word 0",
    "2: xor ax, ax",
    "mov ds, ax",
    "mov es, ax",
    "mov ss, ax",
    "mov sp, {low}",
    "lidt [{low} + 0x60]",
    "mov dx, {port}",
    "mov cx, 3",
    "3: sti",
    "hlt",
    "cli",
    "mov al, 't'",
    "out dx, al",
    "loop 3b",
    "mov dx, {exit}",
    "mov eax, 0x10",
    "out dx, eax",
    "4: hlt",
    "jmp 4b",
    ".org 98b + 0xE0",
    ".word 0x3FF",                            // the interrupt table of real mode
    ".long 0",
    // Code and data of 16 bits, flat.
    ".org 98b + 0x100",
    ".quad 0",
    ".quad 0x00009B000000FFFF",
    ".quad 0x000093000000FFFF",
    ".org 98b + 0x120",
    ".word 23",
    ".long {start} + 0x100";
    start = const START, low = const LOW, port = const layout::SERIAL_PORT, exit = const layout::DEBUG_EXIT_PORT,
}
