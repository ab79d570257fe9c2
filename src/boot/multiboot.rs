//! Multiboot, version 1 (the Multiboot Specification 0.6.96): kernels with a header that says how to load them (hobby
//! kernels, Xen, kvm-unit-tests), and the information that such a kernel receives.
//!
//! As under QEMU, the command line begins with the kernel file's own name, `--initrd` becomes the only module, and
//! 64-bit ELF files are accepted, too: the entry is 32-bit code in any case.
//!
//! ```text
//! layout::CMDLINE           "kernel words of --cmdline"
//! layout::MULTIBOOT_INFO    information | module | memory map | "vireo"
//! layout::MULTIBOOT_STRING  the module's string
//! ```
//!
//! For a kernel that is itself loaded there, as GRUB is, all three are moved together to the nearest free place.

use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::elf::{self, Elf};
use super::error::Problem;
use super::image::{Image, ImageInfo, Piece};
use super::kernel::trim_zeros;
use super::source::Data;
use super::{BootConfig, Initrd, MemoryRange};
use crate::layout::{self, PAGE_SIZE};
use crate::memory::{GuestRam, OutOfRam};

/// Magic number at the start of the header.
const MAGIC: u32 = 0x1BAD_B002;
/// Magic number that the kernel finds in EAX.
pub const BOOTED: u64 = 0x2BAD_B002;
/// Number of bytes at the file's beginning in which the header must lie, at a multiple of 4.
const SEARCH: usize = 8192;
/// Header flags that a loader must understand. Of these, vireo understands 0 (modules aligned to pages, which they
/// always are), 1 (memory sizes, which are always passed) and 2 (a video mode, which a machine without a screen may
/// ignore, as QEMU does).
const REQUIRED: Range<u32> = 0..16;
const UNDERSTOOD: u32 = 0b111;
/// Header flag: the header itself says where the file is loaded, even if the file is ELF.
const HAS_ADDRESSES: u32 = 1 << 16;

/// Valid fields of the information: memory sizes, command line, modules, memory map, loader name.
const INFO_FLAGS: u32 = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9;
/// Offsets of the module's description, the memory map and the loader's name from the information.
const MODULE: u64 = 0x80;
const MEMORY_MAP: u64 = 0x100;
const LOADER_NAME: u64 = 0xF00;
/// Offsets of the information and the module's string from the command line.
const INFO: u64 = layout::MULTIBOOT_INFO - layout::CMDLINE;
const STRING: u64 = layout::MULTIBOOT_STRING - layout::CMDLINE;
/// Length of the command line's space, the information and the string.
const HANDED_LEN: u64 = layout::MULTIBOOT_END - layout::CMDLINE;

/// Memory that a kernel may be loaded to: RAM without anything of vireo's at a fixed address.
const LOADABLE: [Range<u64>; 2] = [layout::GDT_END..layout::EBDA, layout::HIGH_RAM..layout::MMIO_HOLE];

/// Entry and boot information of a multiboot kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// Guest-physical address of the entry.
    pub entry: u32,
    /// Guest-physical address of the command line, which the information and the module's string follow.
    pub handed: u64,
}

impl Start {
    /// Returns the guest-physical address of the information, which the kernel finds in EBX.
    pub fn info(self) -> u64 {
        self.handed + INFO
    }
}

/// A multiboot header with a valid checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Offset of the header in the file.
    offset: u64,
    flags: u32,
    /// `header_addr`, `load_addr`, `load_end_addr`, `bss_end_addr` and `entry_addr`, if the flags declare them valid.
    addresses: [u32; 5],
}

/// A part of the file that is loaded, and the length of the memory that it occupies.
struct Load {
    piece: Piece,
    mem_len: u64,
}

impl Header {
    /// Searches for the header at the beginning of a file. A magic number with a wrong checksum does not count.
    pub fn find(head: &[u8]) -> Option<Header> {
        let (words, _) = head.get(..head.len().min(SEARCH))?.as_chunks::<4>();
        let word = |at: usize| words.get(at).map_or(0, |word| u32::from_le_bytes(*word));
        let fits = |at: usize| at + 2 < words.len();
        let sum = |at: usize| word(at).wrapping_add(word(at + 1)).wrapping_add(word(at + 2));
        let at = (0..words.len()).find(|&at| word(at) == MAGIC && fits(at) && sum(at) == 0)?;
        let addresses = [3, 4, 5, 6, 7].map(|field| word(at + field));
        Some(Header { offset: at as u64 * 4, flags: word(at + 1), addresses })
    }

    /// Returns whether the header itself says where the file is loaded.
    pub fn has_addresses(&self) -> bool {
        self.flags & HAS_ADDRESSES != 0
    }

    /// Returns the single piece that the header's addresses describe.
    fn load(&self, data: &Data) -> Result<Load, Problem> {
        let [header, start, load_end, bss_end, _] = self.addresses.map(u64::from);
        let bad = |what: String| Problem::Damaged(format!("its multiboot header {what}"));
        // The distance from the start of the loaded part to the header is the same in the file and in memory.
        let before = header.checked_sub(start).filter(|before| *before <= self.offset);
        let before = before.ok_or_else(|| {
            bad(format!(
                "at file offset {:#x} claims address {header:#x} in an image loaded at {start:#x}",
                self.offset
            ))
        })?;
        let offset = self.offset - before;
        let len = match load_end {
            0 => data.len() - offset,
            end => end
                .checked_sub(start)
                .ok_or_else(|| bad(format!("has load_end_addr {end:#x} below load_addr {start:#x}")))?,
        };
        data.check(offset, len)?;
        let mem_len = match bss_end {
            0 => len,
            end => end.checked_sub(start).filter(|mem_len| *mem_len >= len).ok_or_else(|| {
                bad(format!("has a bss that ends at {end:#x}, within {start:#x}..{:#x}", start + len))
            })?,
        };
        Ok(Load { piece: Piece { paddr: start, offset, len }, mem_len })
    }
}

/// Returns the image that `header` describes, or the ELF headers of its file.
pub fn image(data: Data, header: &Header) -> Result<Image, Problem> {
    let unknown: Vec<String> =
        REQUIRED.filter(|bit| header.flags & !UNDERSTOOD & 1 << bit != 0).map(|bit| bit.to_string()).collect();
    if !unknown.is_empty() {
        let bits = unknown.join(", ");
        return Err(Problem::Unsuitable(format!(
            "its multiboot header requires features that the specification does not define (flags: bit {bits})"
        )));
    }
    let (loads, entry, format) = if header.has_addresses() {
        (vec![header.load(&data)?], header.addresses[4].into(), "multiboot")
    } else {
        let (loads, entry) = elf_loads(&data)?;
        (loads, entry, "multiboot ELF")
    };
    let handed = place_handed(&loads)?;
    let inside = |load: &Load| entry >= load.piece.paddr && entry - load.piece.paddr < load.piece.len;
    let entry = u32::try_from(entry)
        .ok()
        .filter(|_| loads.iter().any(inside))
        .ok_or_else(|| Problem::Damaged(format!("the entry at {entry:#x} is not in any loaded part of the file")))?;
    let start = loads.iter().map(|load| load.piece.paddr).min().unwrap_or(0);
    let end = loads.iter().map(|load| load.piece.paddr + load.mem_len).max().unwrap_or(0);
    // Nothing else may be placed over the information above the kernel, so the range that the kernel needs includes it.
    let end = if handed >= layout::HIGH_RAM { handed + HANDED_LEN } else { end };
    let mut pieces: Vec<_> = loads.into_iter().map(|load| load.piece).collect();
    pieces.iter_mut().try_for_each(|piece| trim_zeros(&data, piece))?;
    pieces.retain(|piece| piece.len > 0);
    let info = ImageInfo {
        format: format.into(),
        version: None,
        start,
        end: end.next_multiple_of(PAGE_SIZE),
        entry64: None,
        pvh: None,
        multiboot: Some(Start { entry, handed }),
        linux: false,
        setup: None,
        pieces,
    };
    Ok(Image { info, data, mappable: false, relocations: None, packed: false })
}

/// Returns the segments of an ELF file and the physical address of its entry, which the file gives as a virtual
/// address.
fn elf_loads(data: &Data) -> Result<(Vec<Load>, u64), Problem> {
    let elf = Elf::parse(data)?;
    let virtual_entry = |s: &&elf::Segment| elf.entry >= s.vaddr && elf.entry - s.vaddr < s.file_len;
    let segment = elf.segments.iter().find(virtual_entry);
    let entry = segment.map_or(elf.entry, |segment| elf.entry - segment.vaddr + segment.paddr);
    let load = |s: elf::Segment| Load {
        piece: Piece { paddr: s.paddr, offset: s.offset, len: s.file_len },
        mem_len: s.mem_len,
    };
    Ok((elf.segments.into_iter().map(load).collect(), entry))
}

/// Finds a place for the boot information, clear of everything that is loaded. Fails if a piece is to be loaded where
/// it cannot be.
fn place_handed(loads: &[Load]) -> Result<u64, Problem> {
    for Load { piece: Piece { paddr: start, .. }, mem_len } in loads {
        let free = |place: &Range<u64>| *start >= place.start && *mem_len <= place.end.saturating_sub(*start);
        if !LOADABLE.iter().any(free) {
            let places = LOADABLE.map(|place| format!("{:#x}..{:#x}", place.start, place.end)).join(" and ");
            return Err(Problem::Unsuitable(format!(
                "it wants {mem_len:#x} bytes at {start:#x}; the RAM that kernels may be loaded to is {places}"
            )));
        }
    }
    // All ends are known to be below the MMIO hole here.
    let is_free = |start: &u64| {
        loads.iter().all(|Load { piece, mem_len }| start + HANDED_LEN <= piece.paddr || piece.paddr + mem_len <= *start)
    };
    let low = (PAGE_SIZE..=layout::EBDA - HANDED_LEN).step_by(PAGE_SIZE as usize);
    let end = loads.iter().map(|load| load.piece.paddr + load.mem_len).max().unwrap_or(0);
    let above = end.next_multiple_of(PAGE_SIZE).max(layout::HIGH_RAM);
    Ok([layout::CMDLINE].into_iter().chain(low).find(is_free).unwrap_or(above))
}

/// Returns the command line that the kernel receives.
pub fn command_line(config: &BootConfig) -> String {
    format!("{} {}", config.kernel.display(), config.cmdline).trim_end().to_string()
}

/// Writes the information, the module, the memory map, and the strings that they point to. The command line is already
/// at `handed`.
pub fn write(
    ram: &GuestRam,
    handed: u64,
    module: Option<(Initrd, &Path)>,
    memory: &[MemoryRange],
) -> Result<(), OutOfRam> {
    let (at, string) = (handed + INFO, handed + STRING);
    let kib = |range: &MemoryRange| ((range.end - range.start) >> 10) as u32;
    let ram_from = |start: u64| memory.iter().find(|range| range.kind == 1 && range.start == start).map_or(0, kib);
    // Each entry consists of the size of its rest, address, length and kind.
    const ENTRY: usize = 24;
    let mut map = Vec::with_capacity(memory.len() * ENTRY);
    for range in memory {
        map.extend((ENTRY as u32 - 4).to_le_bytes());
        map.extend([range.start, range.end - range.start].map(u64::to_le_bytes).concat());
        map.extend(range.kind.to_le_bytes());
    }
    let mut info = [0u32; 22];
    info[0] = INFO_FLAGS;
    info[1] = ram_from(0);
    info[2] = ram_from(layout::HIGH_RAM);
    // The boot information lies below the MMIO hole.
    info[4] = handed as u32;
    info[5] = module.is_some().into();
    info[6] = (at + MODULE) as u32;
    info[11] = map.len() as u32;
    info[12] = (at + MEMORY_MAP) as u32;
    info[16] = (at + LOADER_NAME) as u32;
    ram.write(at, &info.map(u32::to_le_bytes).concat())?;
    ram.write(at + MEMORY_MAP, &map)?;
    ram.write(at + LOADER_NAME, b"vireo\0")?;
    // Such kernels are otherwise started by a BIOS, and Xen finds room for its real-mode code by the values that the
    // BIOS left.
    ram.write(layout::BDA_EBDA_SEGMENT, &((layout::EBDA >> 4) as u16).to_le_bytes())?;
    ram.write(layout::BDA_MEMORY_SIZE, &((layout::EBDA >> 10) as u16).to_le_bytes())?;
    if let Some((Initrd { start, len }, path)) = module {
        // Initrds lie below 4 GiB, and a path that could be opened fits on a page.
        ram.write_obj(at + MODULE, [start as u32, (start + len) as u32, string as u32, 0])?;
        let path = path.as_os_str().as_bytes();
        let room = (HANDED_LEN - STRING) as usize - 1;
        ram.write(string, &[&path[..path.len().min(room)], b"\0"].concat())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a header with the given flags and addresses.
    fn header(flags: u32, addresses: [u32; 5]) -> Vec<u8> {
        let checksum = 0u32.wrapping_sub(MAGIC).wrapping_sub(flags);
        [&[MAGIC, flags, checksum][..], &addresses].concat().iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// Returns the image of a one-page file with a header at 0x40.
    fn flat(flags: u32, addresses: [u32; 5]) -> Result<Image, String> {
        let mut file = vec![0x90; 0x1000];
        let bytes = header(flags, addresses);
        file[0x40..0x40 + bytes.len()].copy_from_slice(&bytes);
        let header = Header::find(&file).unwrap();
        image(Data::Memory(file), &header).map_err(|e| e.to_string())
    }

    const A: u32 = HAS_ADDRESSES;

    #[test]
    fn headers_are_found_in_the_first_8_kib_if_their_checksum_is_right() {
        let good = header(3, [0; 5]);
        let at = |offset: usize| Header::find(&[&vec![0; offset][..], &good].concat()).map(|h| h.offset);
        for offset in [0, 4, 4096, 8192 - 12] {
            assert_eq!(at(offset), Some(offset as u64));
        }
        for offset in [1, 2, 8192 - 8, 8192] {
            assert_eq!(at(offset), None, "{offset}");
        }
        let mut bad = good.clone();
        bad[8] ^= 1;
        assert_eq!(Header::find(&bad), None);
        assert_eq!(Header::find(&[bad, good].concat()).map(|h| h.offset), Some(32), "a later one counts");
        for len in 0..12 {
            assert_eq!(Header::find(&header(3, [0; 5])[..len]), None);
        }
    }

    #[test]
    fn addresses_place_the_file() {
        let image = flat(A, [0x20_0040, 0x20_0000, 0, 0, 0x20_0080]).unwrap();
        assert_eq!(
            (image.info.start, image.info.end, image.info.multiboot),
            (0x20_0000, 0x20_1000, Some(Start { entry: 0x20_0080, handed: layout::CMDLINE }))
        );
        assert_eq!(image.info.pieces, [Piece { paddr: 0x20_0000, offset: 0, len: 0x1000 }]);
        let image = flat(A, [0x8020, 0x8000, 0x8100, 0x1_0000, 0x8010]).unwrap();
        assert_eq!((image.info.start, image.info.end), (0x8000, 0x1_0000));
        assert_eq!(image.info.pieces, [Piece { paddr: 0x8000, offset: 0x20, len: 0x100 }]);
    }

    #[test]
    fn headers_that_contradict_themselves_or_us_are_refused() {
        let m = 0x10_0000;
        for (flags, addresses, says) in [
            (A | 8, [m + 0x40, m, 0, 0, m], "requires features that the specification does not define (flags: bit 3)"),
            (A | 0x8010, [m + 0x40, m, 0, 0, m], "(flags: bit 4, 15)"),
            (A, [m - 4, m, 0, 0, m], "claims address 0xffffc in an image loaded at 0x100000"),
            (A, [m + 0x44, m, 0, 0, m], "at file offset 0x40 claims"),
            (A, [m + 0x40, m, m - 1, 0, m], "has load_end_addr 0xfffff below load_addr 0x100000"),
            (A, [m + 0x40, m, m + 0x1001, 0, m], " needs 4097 bytes, has 4096"),
            (A, [m + 0x40, m, m + 0x100, m + 0xFF, m], "a bss that ends at 0x1000ff, within 0x100000..0x100100"),
            (A, [m + 0x40, m, 0, 0, m + 0x1000], "the entry at 0x101000 is not in any loaded part"),
            (A, [m + 0x40, m, 0, 0, 0], "the entry at 0x0 is not in any loaded part"),
            (
                A,
                [0x540, 0x500, 0, 0, 0x500],
                "it wants 0x1000 bytes at 0x500; the RAM that kernels may be loaded to is 0x600..0x9fc00 and 0x100000..",
            ),
            (A, [0xF_0040, 0xF_0000, 0, 0, 0xF_0000], "bytes at 0xf0000"),
            (A, [0x8040, 0x8000, 0, 0x20_0000, 0x8000], "0x1f8000 bytes at 0x8000"),
            (A, [u32::MAX - 0xFBF, u32::MAX - 0xFFF, 0, 0, u32::MAX - 0xFFF], "bytes at 0xfffff000"),
        ] {
            let error = flat(flags, addresses).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn what_the_kernel_is_handed_makes_way_for_the_kernel() {
        let handed = |loads: &[(u64, u64)]| {
            let load = |&(paddr, mem_len)| Load { piece: Piece { paddr, offset: 0, len: 0 }, mem_len };
            place_handed(&loads.iter().map(load).collect::<Vec<_>>()).unwrap()
        };
        assert_eq!(handed(&[(0x600, layout::CMDLINE - 0x600), (0x3_2000, 0x1000)]), layout::CMDLINE);
        // GRUB, as `grub-mkimage -O i386-coreboot` builds it.
        assert_eq!(handed(&[(0x9000, 0x1_8758), (0x10_0000, 0x3_6C24)]), 0x2_2000);
        assert_eq!(handed(&[(0x1000, 0x7_F000)]), 0x8_0000);
        assert_eq!(handed(&[(0x1_8000, 0x7_8000)]), 0x1000);
        assert_eq!(handed(&[(0x600, layout::EBDA - 0x600)]), layout::HIGH_RAM);
        assert_eq!(handed(&[(0x600, layout::EBDA - 0x600), (0x10_0000, 0x1001)]), 0x10_2000);
        // For a kernel that leaves no room below, the memory above it counts as its own.
        let image = flat(A, [0x640, 0x600, 0, layout::EBDA as u32, 0x600]).unwrap();
        assert_eq!((image.info.start, image.info.end), (0x600, layout::HIGH_RAM + HANDED_LEN));
    }

    #[test]
    fn the_information_points_at_everything() {
        let ram = GuestRam::anonymous(32 << 20);
        let module = (Initrd { start: 0x1F0_0000, len: 0x1234 }, Path::new("/tests/env"));
        let memory = super::super::memory_map(&ram);
        write(&ram, layout::CMDLINE, Some(module), &memory).unwrap();
        let info: [u32; 17] = ram.read_obj(layout::MULTIBOOT_INFO).unwrap();
        assert_eq!((info[0], info[1], info[2]), (0x24D, 639, 31 << 10));
        assert_eq!((info[4], info[5], info[11]), (layout::CMDLINE as u32, 1, 4 * 24));
        let module: [u32; 4] = ram.read_obj(info[6].into()).unwrap();
        assert_eq!(module, [0x1F0_0000, 0x1F0_1234, layout::MULTIBOOT_STRING as u32, 0]);
        assert_eq!(ram.read_obj::<[u8; 11]>(module[2].into()).unwrap(), *b"/tests/env\0");
        assert_eq!(ram.read_obj::<[u8; 6]>(info[16].into()).unwrap(), *b"vireo\0");
        let last: [u32; 6] = ram.read_obj(u64::from(info[12]) + 3 * 24).unwrap();
        assert_eq!(last, [20, 0x10_0000, 0, 31 << 20, 0, 1]);
        assert_eq!((ram.read_obj::<u16>(0x40E).unwrap(), ram.read_obj::<[u8; 2]>(0x413).unwrap()), (0x9FC0, [0x7F, 2]));
        let long = "x".repeat(5000);
        write(&ram, layout::CMDLINE, Some((Initrd::default(), Path::new(&long))), &memory).unwrap();
        assert_eq!(ram.read_obj::<[u8; 2]>(layout::MULTIBOOT_END - 2).unwrap(), *b"x\0");
    }
}
