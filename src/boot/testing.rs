//! Small kernel images of every format, for tests.

use std::fs;
use std::io::Write;
use std::path::PathBuf;

use super::unpack::Compression;

/// Address at which [`linux`] is linked.
pub const START: u64 = 0x100_0000;
/// Contents of the places that [`linux`] has relocations for: 64-bit at 0x100, 32-bit at 0x200, inverse at 0x300.
pub const POINTER: u64 = 0xFFFF_FFFF_8100_0800;
pub const INVERSE: u32 = 0x1234_5678;

/// A segment to be built: address, virtual address, bytes, length in memory.
pub struct Seg(pub u64, pub u64, pub Vec<u8>, pub u64);

/// A note: owner, type, content.
pub type Note<'a> = (&'a [u8], u32, &'a [u8]);

pub const LINUX_NOTE: Note = (b"Linux\0", 0x100, b"\0\0\0\0");

fn notes(notes: &[Note]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, kind, content) in notes {
        for word in [name.len() as u32, content.len() as u32, *kind] {
            bytes.extend(word.to_le_bytes());
        }
        for part in [name, content] {
            bytes.extend(*part);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
    }
    bytes
}

/// Returns an ELF file for x86-64: headers, notes, segments.
pub fn elf64(entry: u64, segments: &[Seg], note: &[Note]) -> Vec<u8> {
    elf(true, entry, segments, note)
}

/// Returns an ELF file for 32-bit x86: headers, notes, segments.
pub fn elf32(entry: u64, segments: &[Seg], note: &[Note]) -> Vec<u8> {
    elf(false, entry, segments, note)
}

fn elf(class64: bool, entry: u64, segments: &[Seg], note: &[Note]) -> Vec<u8> {
    let (header_len, size) = if class64 { (64, 56) } else { (52, 32) };
    let note = notes(note);
    let count = segments.len() + 1;
    let mut out = vec![0; header_len];
    let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF");
    put(4, &[if class64 { 2 } else { 1 }, 1, 1]);
    put(16, &[2, 0, if class64 { 62 } else { 3 }, 0, 1]);
    let counts = [0, header_len as u16, size, count as u16, 0, 0, 0].map(u16::to_le_bytes).concat();
    if class64 {
        put(24, &entry.to_le_bytes());
        put(32, &(header_len as u64).to_le_bytes());
        put(50, &counts);
    } else {
        put(24, &(entry as u32).to_le_bytes());
        put(28, &(header_len as u32).to_le_bytes());
        put(38, &counts);
    }
    let headers = header_len + count * usize::from(size) + note.len();
    // Large segments begin on a page, as Linux's do, so that their pages can be moved.
    let padding = match segments.first() {
        Some(first) if first.2.len() > 1 << 20 => headers.next_multiple_of(4096) - headers,
        _ => 0,
    };
    let mut offset = (headers - note.len()) as u64;
    let mut header = |kind: u32, paddr: u64, vaddr: u64, len: u64, mem_len: u64| {
        let fields = match class64 {
            true => [vaddr, paddr, len, mem_len, 4].map(u64::to_le_bytes).concat(),
            false => [vaddr, paddr, len, mem_len, 5, 4].map(|v| (v as u32).to_le_bytes()).concat(),
        };
        out.extend(kind.to_le_bytes());
        if class64 {
            out.extend(5u32.to_le_bytes());
            out.extend(offset.to_le_bytes());
        } else {
            out.extend((offset as u32).to_le_bytes());
        }
        out.extend(fields);
        offset += len;
    };
    header(4, 0, 0, (note.len() + padding) as u64, note.len() as u64);
    for Seg(paddr, vaddr, data, mem_len) in segments {
        header(1, *paddr, *vaddr, data.len() as u64, *mem_len);
    }
    out.extend(note);
    out.resize(out.len() + padding, 0);
    segments.iter().for_each(|segment| out.extend(&segment.2));
    out
}

/// Returns 256 bytes that begin with a multiboot header, which places them at `address` or, for 0, leaves that to ELF.
pub fn multiboot(address: u32) -> Vec<u8> {
    let flags = if address == 0 { 3 } else { 1 << 16 };
    let checksum = 0u32.wrapping_sub(0x1BAD_B002).wrapping_sub(flags);
    let words = [0x1BAD_B002, flags, checksum, address, address, 0, address + 0x1000, address + 0x20];
    let mut bytes = words.map(u32::to_le_bytes).concat();
    bytes.resize(256, 0x90);
    bytes
}

/// Returns a Linux without relocations: text of `len` bytes at 16 MiB, and data with a bss.
pub fn plain_linux(len: usize) -> Vec<u8> {
    let len = len.max(0x1000).next_multiple_of(0x1000);
    // Without long runs, so that the compressed forms are not tiny.
    let mut text: Vec<u8> = (0..len as u32).map(|n| (n.wrapping_mul(2654435761) >> 24) as u8 | 1).collect();
    text[0x100..0x108].copy_from_slice(&POINTER.to_le_bytes());
    text[0x200..0x204].copy_from_slice(&(POINTER as u32).to_le_bytes());
    text[0x300..0x304].copy_from_slice(&INVERSE.to_le_bytes());
    let data = START + len as u64;
    let map = super::kaslr::START_KERNEL_MAP;
    let pvh = ((START + 0x50) as u32).to_le_bytes();
    elf64(
        START,
        &[Seg(START, map + START, text, len as u64), Seg(data, map + data, b"data".to_vec(), 0x3000)],
        &[LINUX_NOTE, (b"Xen\0", 18, &pvh)],
    )
}

/// Returns relocation tables for [`plain_linux`], with the inverse table or without.
pub fn tables(inverse: bool) -> Vec<u8> {
    let entries: &[u32] = match inverse {
        true => &[0, 0x8100_0100, 0, 0x8100_0300, 0, 0x8100_0200],
        false => &[0, 0x8100_0100, 0, 0x8100_0200],
    };
    entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

/// Returns a Linux with relocations.
pub fn linux(len: usize) -> Vec<u8> {
    [plain_linux(len), tables(true)].concat()
}

pub fn compress(format: Compression, data: &[u8]) -> Vec<u8> {
    match format {
        Compression::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
            encoder.write_all(data).unwrap();
            encoder.finish().unwrap()
        }
        Compression::Bzip2 => {
            let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::default());
            encoder.write_all(data).unwrap();
            encoder.finish().unwrap()
        }
        Compression::Zstd => zstd::encode_all(data, 1).unwrap(),
        Compression::Lz4 => {
            // The legacy frame with one block of nothing but literals.
            let mut block = vec![0xF0];
            let mut rest = data.len() - 15;
            while rest >= 255 {
                block.push(255);
                rest -= 255;
            }
            block.push(rest as u8);
            block.extend(data);
            [&[2, 0x21, 0x4C, 0x18][..], &(block.len() as u32).to_le_bytes(), &block].concat()
        }
        Compression::Xz => {
            let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 0);
            encoder.write_all(data).unwrap();
            encoder.finish().unwrap()
        }
    }
}

/// Returns a bzImage with `payload` compressed.
pub fn bzimage(format: Compression, payload: &[u8]) -> Vec<u8> {
    let mut packed = compress(format, payload);
    if format != Compression::Gzip {
        packed.extend((payload.len() as u32).to_le_bytes());
    }
    bzimage_of(&packed)
}

/// Returns a bzImage with the given bytes as its payload.
pub fn bzimage_of(payload: &[u8]) -> Vec<u8> {
    let mut kernel = vec![0x90; 0x240];
    kernel.extend(payload);
    kernel.resize(kernel.len().next_multiple_of(16), 0);
    let mut out = vec![0; 1024];
    let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1F1, &[1]);
    put(0x1F4, &(kernel.len() as u32 / 16).to_le_bytes());
    put(0x1FE, &[0x55, 0xAA, 0xEB, 0x6A]);
    put(0x202, b"HdrS\x0f\x02");
    put(0x20E, &0x100u16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22C, &0x7FFF_FFFFu32.to_le_bytes());
    put(0x230, &0x20_0000u32.to_le_bytes());
    put(0x234, &[1, 21, 0x7F, 0]);
    put(0x238, &2047u32.to_le_bytes());
    put(0x248, &0x240u32.to_le_bytes());
    put(0x24C, &(payload.len() as u32).to_le_bytes());
    put(0x258, &START.to_le_bytes());
    put(0x260, &0x10_0000u32.to_le_bytes());
    put(0x300, b"6.1.0-test (builder) #1\0");
    out.extend(kernel);
    out
}

/// A directory with files for a test.
pub struct Files(pub tempfile::TempDir);

impl Files {
    pub fn new() -> Files {
        Files(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        fs::write(self.path(name), bytes).unwrap();
        self.path(name)
    }
}

/// An error and what caused it, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text
}
