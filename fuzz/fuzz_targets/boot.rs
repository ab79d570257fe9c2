//! Kernels, initrds and modules that are almost right: everything that is read from them, and what is put into memory.

#![no_main]

use std::fs;
use std::path::{Path, PathBuf};

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use vireo::boot::modules::ModulesConfig;
use vireo::boot::pack::InitramfsConfig;
use vireo::boot::{BootConfig, BootFiles, BootMode, Platform};
use vireo::memory::GuestRam;

const RAM: u64 = 64 << 20;
const START: u64 = 0x100_0000;
const MAP: u64 = 0xFFFF_FFFF_8000_0000;
const MODES: [BootMode; 5] = [BootMode::Auto, BootMode::BzImage, BootMode::Direct, BootMode::Pvh, BootMode::Multiboot];

/// Little-endian fields: length in bytes, value.
fn fields(fields: &[(usize, u64)]) -> Vec<u8> {
    fields.iter().flat_map(|(len, value)| value.to_le_bytes().into_iter().take(*len)).collect()
}

/// A Linux kernel with a Xen note for PVH, text, and a data segment with a bss; with `tables`, its relocation tables
/// follow.
fn elf(tables: bool) -> Vec<u8> {
    let note = [&fields(&[(4, 4), (4, 4), (4, 18)])[..], b"Xen\0", &fields(&[(4, START + 0x50)])].concat();
    let linux = [&fields(&[(4, 6), (4, 4), (4, 0x100)])[..], b"Linux\0\0\0", &[0; 4]].concat();
    let notes = [note, linux].concat();
    let text: Vec<u8> = b"Linux version 6.1.0-test (builder) #1\n\0".iter().copied().cycle().take(0x1000).collect();
    let at = 64 + 3 * 56;
    let mut file =
        [&b"\x7fELF\x02\x01\x01"[..], &[0; 9], &fields(&[(2, 2), (2, 62), (4, 1), (8, START), (8, 64), (8, 0)])]
            .concat();
    file.extend(fields(&[(4, 0), (2, 64), (2, 56), (2, 3), (2, 0), (2, 0), (2, 0)]));
    let mut segment = |kind: u64, offset: usize, paddr: u64, len: usize, mem: u64| {
        let virt = if kind == 1 { MAP + paddr } else { 0 };
        file.extend(fields(&[
            (4, kind),
            (4, 5),
            (8, offset as u64),
            (8, virt),
            (8, paddr),
            (8, len as u64),
            (8, mem),
            (8, 4),
        ]));
    };
    segment(4, at, 0, notes.len(), notes.len() as u64);
    segment(1, at + notes.len(), START, text.len(), 0x1000);
    segment(1, at + notes.len() + text.len(), START + 0x1000, 4, 0x3000);
    file.extend([&notes[..], &text, b"data"].concat());
    if tables {
        file.extend(fields(&[(4, 0), (4, 0x8100_0100), (4, 0), (4, 0x8100_0300), (4, 0), (4, 0x8100_0200)]));
    }
    file
}

/// A bzImage around an uncompressed payload, which is not a valid kind of payload, or an lz4 payload of literals.
fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut block = vec![0xF0];
    let rest = payload.len() - 15;
    block.extend(std::iter::repeat_n(255, rest / 255));
    block.push((rest % 255) as u8);
    block.extend(payload);
    let mut packed = [&[2, 0x21, 0x4C, 0x18][..], &(block.len() as u32).to_le_bytes(), &block].concat();
    packed.extend((payload.len() as u32).to_le_bytes());
    let mut kernel = vec![0x90; 0x240];
    kernel.extend(&packed);
    kernel.resize(kernel.len().next_multiple_of(16), 0);
    let mut file = vec![0; 1024];
    for (at, bytes) in [
        (0x1F1, &[1][..]),
        (0x1F4, &(kernel.len() as u32 / 16).to_le_bytes()),
        (0x1FE, &[0x55, 0xAA, 0xEB, 0x6A]),
        (0x202, b"HdrS\x0f\x02"),
        (0x20E, &0x100u16.to_le_bytes()),
        (0x211, &[1]),
        (0x22C, &0x7FFF_FFFFu32.to_le_bytes()),
        (0x230, &0x20_0000u32.to_le_bytes()),
        (0x234, &[1, 21, 0x7F, 0]),
        (0x238, &2047u32.to_le_bytes()),
        (0x248, &0x240u32.to_le_bytes()),
        (0x24C, &(packed.len() as u32).to_le_bytes()),
        (0x258, &START.to_le_bytes()),
        (0x260, &0x10_0000u32.to_le_bytes()),
        (0x300, b"6.1.0-test (builder) #1\0"),
    ] {
        file[at..at + bytes.len()].copy_from_slice(bytes);
    }
    file.extend(kernel);
    file
}

/// A file with a multiboot header that places it or leaves that to its ELF headers.
fn multiboot(flags: u32) -> Vec<u8> {
    let checksum = 0u32.wrapping_sub(0x1BAD_B002).wrapping_sub(flags);
    let start = START as u32;
    let mut file =
        [0x1BAD_B002, flags, checksum, start, start, 0, start + 0x1000, start + 0x20].map(u32::to_le_bytes).concat();
    file.resize(512, 0x90);
    file
}

/// A module: an ELF file with only sections, one of which is `.modinfo`.
fn module(info: &[u8]) -> Vec<u8> {
    let names = b"\0.modinfo\0.shstrtab\0";
    let (at_names, at_info) = (64, 64 + names.len());
    let at_headers = at_info + info.len();
    let mut file = [&b"\x7fELF\x02\x01\x01"[..], &[0; 9], &fields(&[(2, 1), (2, 62), (4, 1), (8, 0), (8, 0)])].concat();
    file.extend(fields(&[(8, at_headers as u64), (4, 0), (2, 64), (2, 0), (2, 0), (2, 64), (2, 3), (2, 2)]));
    file.extend([&names[..], info, &[0; 64]].concat());
    for (name, kind, at, len) in [(1, 1, at_info, info.len()), (10, 3, at_names, names.len())] {
        file.extend(fields(&[
            (4, name),
            (4, kind),
            (8, 0),
            (8, 0),
            (8, at as u64),
            (8, len as u64),
            (8, 0),
            (8, 1),
            (8, 0),
        ]));
    }
    file
}

/// Writes `content`, with some bytes changed, cut or added.
fn write(path: &Path, mut content: Vec<u8>, bytes: &mut Unstructured<'_>) -> Result<PathBuf> {
    for _ in 0..bytes.int_in_range(0..=8u8)? {
        if let Some(last) = content.len().checked_sub(1) {
            // The beginning is the part that is read.
            let near = last.min(if bytes.arbitrary()? { 0x300 } else { 0x3000 });
            let at = bytes.int_in_range(0..=near)?;
            match bytes.int_in_range(0..=3u8)? {
                0 => content[at] = bytes.arbitrary()?,
                1 => content[at] ^= 1 << bytes.int_in_range(0..=7)?,
                _ => content.iter_mut().skip(at).zip(bytes.arbitrary::<[u8; 8]>()?).for_each(|(to, from)| *to = from),
            }
        }
    }
    match bytes.int_in_range(0..=15u8)? {
        0 => content.truncate(bytes.int_in_range(0..=content.len())?),
        1 => content.extend(bytes.bytes(usize::min(64, bytes.len()))?),
        _ => {}
    }
    fs::write(path, content).unwrap();
    Ok(path.into())
}

fn modules(dir: &Path, bytes: &mut Unstructured<'_>) -> Result<ModulesConfig> {
    let version = dir.join("6.1.0-test");
    fs::create_dir(&version).unwrap();
    let text = b"kernel/a.ko: kernel/b.ko\nkernel/b.ko:\nkernel/c.ko: kernel/a.ko kernel/c.ko\n";
    write(&version.join("modules.dep"), text.to_vec(), bytes)?;
    write(&version.join("modules.softdep"), b"softdep a pre: c post: b\n".to_vec(), bytes)?;
    write(&version.join("modules.alias"), b"alias pci:v* a\nalias x-y c\n".to_vec(), bytes)?;
    write(&version.join("modules.builtin"), b"kernel/d.ko\n".to_vec(), bytes)?;
    fs::create_dir(version.join("kernel")).unwrap();
    for name in ["a", "b", "c"] {
        let info = format!("name={name}\0vermagic=6.1.0-test SMP\0depends=b\0softdep=pre: c\0");
        write(&version.join(format!("kernel/{name}.ko")), module(info.as_bytes()), bytes)?;
    }
    let names = vec!["a".into(), "d".into()];
    Ok(ModulesConfig { dir: Some(version), names, optional: vec!["x_y".into(), "nosuch".into()] })
}

fn run(data: &[u8]) -> Result<()> {
    let mut bytes = Unstructured::new(data);
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let kernel = match bytes.int_in_range(0..=5u8)? {
        0 => elf(false),
        1 => elf(true),
        2 => bzimage(&elf(true)),
        3 => multiboot(1 << 16),
        4 => [elf(false), multiboot(3)].concat(),
        _ => bytes.bytes(usize::min(200, bytes.len()))?.to_vec(),
    };
    let mut config = BootConfig {
        kernel: write(&dir.path().join("kernel"), kernel, &mut bytes)?,
        boot: *bytes.choose(&MODES)?,
        cmdline: if bytes.arbitrary()? { "nokaslr quiet".into() } else { String::new() },
        ..BootConfig::default()
    };
    if bytes.arbitrary()? {
        let cpio = [&b"070701"[..], &[b'0'; 104], &[0; 2]].concat();
        config.initrd.push(write(&dir.path().join("initrd"), cpio, &mut bytes)?);
    }
    if bytes.ratio(1, 3)? {
        let modules = Some(modules(dir.path(), &mut bytes)?);
        config.initramfs = Some(InitramfsConfig { modules, ..InitramfsConfig::default() });
    }
    let Ok(files) = BootFiles::open_with(&config, RAM, None) else { return Ok(()) };
    let _ = files.describe();
    let platform = Platform {
        cpus: 2,
        acpi: bytes.arbitrary()?,
        uuid: [7; 16],
        virtio_slots: vec![0, 1],
        serial: true,
        clocks: false,
    };
    let ram = GuestRam::anonymous(RAM);
    if let Ok(entry) = files.load(&ram, &platform) {
        assert!(entry.address < RAM, "the entry is outside of memory: {:#x}", entry.address);
    }
    Ok(())
}

fuzz_target!(|data: &[u8]| {
    let _ = run(data);
});
