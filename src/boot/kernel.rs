//! Detection of a kernel file's kind, by its content alone.
//!
//! ```text
//! compressed file ─┐
//! bzImage payload ─┴─ unpack ─> ELF ─> Image: pieces, entries, relocations
//! bzImage with --boot bzimage ──────> Image: one piece, the guest unpacks it
//! multiboot header ─────────────────> Image: pieces by the header's addresses or ELF's
//! ```

use super::bzimage::{self, BzImage};
use super::elf::{self, Elf};
use super::error::Problem;
use super::image::{Image, ImageInfo, Piece};
use super::kaslr::{Relocations, START_KERNEL_MAP};
use super::regs::Protocol;
use super::source::{Data, Reader};
use super::unpack::{self, Compression};
use super::{BootMode, multiboot};
use crate::layout;
use crate::options::Size;

/// Number of a file's first bytes that are examined to detect its kind. ISO images have their mark at 32 KiB.
const HEAD: u64 = 36 << 10;
/// Largest number of trailing zeros of a segment that are trimmed. A bss has some MiB; files can be sparse and huge.
const TRIM_MAX: u64 = 64 << 20;

/// Detects the kind of `data` and prepares it for the way of booting that `mode` asks for.
pub fn examine(data: Data, mode: BootMode) -> Result<Image, Problem> {
    let head = data.head(HEAD)?;
    let Some(compression) = Compression::detect(&head) else {
        return examine_plain(data, &head, mode);
    };
    let unpacked = Data::Memory(unpack::unpack(compression, compressed(&data, 0, data.len())?)?);
    // Nobody compresses a kernel twice; unpacking deeper would only help decompression bombs.
    let head = unpacked.head(HEAD)?;
    match examine_plain(unpacked, &head, mode) {
        Ok(mut image) => {
            image.info.format = format!("{} in {}", image.info.format, compression.name());
            Ok(image)
        }
        Err(Problem::NotAKernel(found)) => {
            Err(Problem::NotAKernel(format!("{} data that unpacks to {found}", compression.name())))
        }
        Err(e) => Err(e),
    }
}

/// Returns a reader of the compressed bytes from `offset`. Some formats have empty blocks, with which a huge sparse file
/// would keep a decompressor busy for hours, so more bytes than a kernel may unpack to are refused.
fn compressed(data: &Data, offset: u64, len: u64) -> Result<Reader<'_>, Problem> {
    if len > unpack::UNPACKED_MAX {
        let max = Size(unpack::UNPACKED_MAX);
        return Err(Problem::Unsuitable(format!(
            "it has {len} bytes of compressed data, and no kernel has more than {max}"
        )));
    }
    data.reader(offset, len)
}

fn examine_plain(data: Data, head: &[u8], mode: BootMode) -> Result<Image, Problem> {
    if bzimage::is_bzimage(head) {
        examine_bzimage(data, mode)
    } else if elf::is_elf(head) {
        if mode == BootMode::BzImage {
            return Err(Problem::NoEntry { found: "an ELF file".into(), mode: "bzimage", needs: "a bzImage" });
        }
        match multiboot::Header::find(head) {
            Some(header) if mode == BootMode::Multiboot => multiboot::image(data, &header),
            Some(header) if mode == BootMode::Auto && !Elf::parse(&data)?.tells_its_entry() => {
                multiboot::image(data, &header)
            }
            _ => vmlinux(data),
        }
    } else if let Some(header) = multiboot::Header::find(head).filter(multiboot::Header::has_addresses) {
        multiboot::image(data, &header)
    } else {
        Err(Problem::NotAKernel(guess(head)))
    }
}

fn vmlinux(data: Data) -> Result<Image, Problem> {
    let mut image = elf_image(data, "vmlinux")?;
    image.info.version = find_version(&image);
    Ok(image)
}

fn examine_bzimage(data: Data, mode: BootMode) -> Result<Image, Problem> {
    let bz = BzImage::parse(&data)?;
    if mode == BootMode::BzImage {
        return packed_image(data, bz);
    }
    let payload = bz.payload()?;
    let head = payload.map(|(offset, len)| data.bytes(offset, len.min(16))).transpose()?;
    let Some((compression, (offset, len))) = head.and_then(|head| Compression::detect(&head)).zip(payload) else {
        // The payload is missing, or packed by lzma, lzo or something new: the guest can unpack itself if necessary.
        if mode == BootMode::Auto && (bz.has_entry64() || payload.is_none()) {
            return packed_image(data, bz);
        }
        let found = match payload {
            Some(_) => "a bzImage with an unknown compression".to_string(),
            None => "a bzImage without a compressed kernel in it".to_string(),
        };
        let (mode, needs) = (mode_name(mode), "gzip, zstd, xz, lz4 or bzip2; try --boot bzimage");
        return Err(Problem::NoEntry { found, mode, needs });
    };
    // The unpacked size is the last part of a gzip stream; after all other formats the kernel's build appends it.
    let size = data.bytes(offset + len - 4, 4)?;
    let size = u32::from_le_bytes([size[0], size[1], size[2], size[3]]);
    let stream = if compression == Compression::Gzip { len } else { len - 4 };
    let unpacked = unpack::unpack_to_pages(compression, compressed(&data, offset, stream)?, size.into())?;
    drop(data);
    if !elf::is_elf(&unpacked) {
        return Err(Problem::Damaged(format!("its {} payload is not an ELF file", compression.name())));
    }
    let mut image = elf_image(Data::Pages(unpacked), "bzImage").map_err(|e| match e {
        Problem::NotAKernel(found) => Problem::NotAKernel(format!("a bzImage of {found}")),
        e => e,
    })?;
    image.info.format = format!("bzImage, {}", compression.name());
    image.info.version = bz.version;
    image.info.linux = true;
    image.info.setup = Some(bz.setup);
    Ok(image)
}

/// Returns the image of a bzImage that stays packed.
fn packed_image(data: Data, bz: BzImage) -> Result<Image, Problem> {
    if !bz.has_entry64() {
        return Err(Problem::NotAKernel("a bzImage without a 64-bit entry (a 32-bit kernel?)".into()));
    }
    let (start, end, entry) = bz.packed_range()?;
    let (offset, len) = bz.kernel;
    let info = ImageInfo {
        format: "bzImage, unpacked by the guest".into(),
        version: bz.version,
        start,
        end,
        entry64: Some(entry),
        pvh: None,
        multiboot: None,
        linux: true,
        setup: Some(bz.setup),
        pieces: vec![Piece { paddr: start, offset, len }],
    };
    Ok(Image { info, data, mappable: false, relocations: None, packed: true })
}

/// Returns the image of an ELF file with the relocations that may follow it.
fn elf_image(data: Data, format: &str) -> Result<Image, Problem> {
    let elf = Elf::parse(&data)?;
    let (Some(first), Some(last)) = (elf.segments.first(), elf.segments.last()) else {
        return Err(Problem::Damaged("no segments".into()));
    };
    let (start, end) = (first.paddr, last.paddr + last.mem_len);
    if start < layout::HIGH_RAM || end > layout::MMIO_HOLE {
        let (low, high) = (layout::HIGH_RAM, layout::MMIO_HOLE);
        return Err(Problem::Unsuitable(format!(
            "its segments at {start:#x}..{end:#x} are not within {low:#x}..{high:#x}, where vireo loads kernels"
        )));
    }
    let end = end.next_multiple_of(layout::PAGE_SIZE);
    let inside = |entry: u64| elf.segments.iter().any(|s| entry >= s.paddr && entry - s.paddr < s.file_len);
    let kernel_map = first.vaddr == START_KERNEL_MAP.wrapping_add(start);
    let pvh = elf.pvh.filter(|entry| inside(*entry)).and_then(|entry| u32::try_from(entry).ok());
    let entry64 = Some(elf.entry).filter(|entry| elf.class64 && inside(*entry));
    // A kernel for PVH only (not Linux) has an ELF entry that does not follow Linux's boot protocol.
    let linux = elf.linux_note || (kernel_map && entry64.is_some());
    if pvh.is_none() && entry64.is_none() {
        return Err(match (elf.pvh, elf.class64) {
            (None, false) => {
                Problem::NotAKernel("a 32-bit ELF file with neither a PVH note nor a multiboot header".into())
            }
            (entry, _) => {
                let entry = entry.unwrap_or(elf.entry);
                Problem::Damaged(format!("the entry at {entry:#x} is not in any segment"))
            }
        });
    }
    let relocations =
        if kernel_map && linux { Relocations::parse(&data, elf.end, first.vaddr, end - start)? } else { None };
    let pieces = elf.segments.iter().filter(|s| s.file_len > 0);
    let mut pieces: Vec<_> = pieces.map(|s| Piece { paddr: s.paddr, offset: s.offset, len: s.file_len }).collect();
    pieces.iter_mut().try_for_each(|piece| trim_zeros(&data, piece))?;
    pieces.retain(|piece| piece.len > 0);
    let format = if linux || pvh.is_none() { format } else { "PVH ELF" }.to_string();
    let info =
        ImageInfo { format, version: None, start, end, entry64, pvh, multiboot: None, linux, setup: None, pieces };
    Ok(Image { info, data, mappable: false, relocations, packed: false })
}

/// Removes zeros at the end of a piece, because fresh RAM is zero anyway. The data segment of a bzImage's payload
/// contains the kernel's whole bss.
pub(super) fn trim_zeros(data: &Data, piece: &mut Piece) -> Result<(), Problem> {
    let floor = piece.len.saturating_sub(TRIM_MAX);
    while piece.len > floor {
        let block = data.bytes(piece.offset + piece.len.saturating_sub(64 << 10), piece.len.min(64 << 10))?;
        let used = block.iter().rposition(|b| *b != 0).map_or(0, |last| last as u64 + 1);
        piece.len -= block.len() as u64 - used;
        if used > 0 {
            break;
        }
    }
    Ok(())
}

/// Returns the entry that `mode` asks for, as a physical address of the image as linked, and its protocol.
pub fn entry(info: &ImageInfo, mode: BootMode) -> Result<(u64, Protocol), Problem> {
    let pvh = info.pvh.map(|entry| (u64::from(entry), Protocol::Pvh));
    let entry64 = info.entry64.map(|entry| (entry, Protocol::Linux64));
    let multiboot = info.multiboot.map(|start| (u64::from(start.entry), Protocol::Multiboot));
    let (entry, needs) = match mode {
        BootMode::Auto if info.linux => (entry64.or(pvh), "an entry"),
        BootMode::Auto => (pvh.or(entry64).or(multiboot), "an entry"),
        BootMode::Multiboot => (multiboot, "a multiboot header"),
        BootMode::Pvh => (pvh, "a PVH entry (CONFIG_PVH)"),
        BootMode::Direct | BootMode::BzImage => (entry64, "a 64-bit entry"),
    };
    entry.ok_or_else(|| Problem::NoEntry { found: info.format.clone(), mode: mode_name(mode), needs })
}

fn mode_name(mode: BootMode) -> &'static str {
    match mode {
        BootMode::Auto => "auto",
        BootMode::BzImage => "bzimage",
        BootMode::Direct => "direct",
        BootMode::Pvh => "pvh",
        BootMode::Multiboot => "multiboot",
    }
}

/// Returns the version in Linux's banner.
pub fn find_version(image: &Image) -> Option<String> {
    const BANNER: &[u8] = b"Linux version ";
    let mut version = None;
    // Some kernels also contain the format string "Linux version %s".
    let number = |text: &[u8]| {
        let found = text.first().is_some_and(u8::is_ascii_digit);
        version = found.then(|| bzimage::printable(&text[..text.len().min(256)])).flatten();
        found
    };
    image.find(BANNER, 0, number).ok()?;
    version
}

/// Returns a description of a file that is not a kernel, by its first bytes.
pub(super) fn guess(head: &[u8]) -> String {
    let at = |offset: usize, magic: &[u8]| head.get(offset..).is_some_and(|b| b.starts_with(magic));
    let name = match head {
        [] => "an empty file",
        _ if at(0x38, b"ARM\x64") => "an arm64 Image",
        _ if at(0x38, b"RSC\x05") => "a RISC-V Image",
        _ if at(4, b"zimg") => "a compressed EFI kernel for another machine",
        [b'M', b'Z', ..] => "an EFI or Windows program without a Linux boot header",
        [0x27, 0x05, 0x19, 0x56, ..] => "a U-Boot image",
        [0xD0, 0x0D, 0xFE, 0xED, ..] => "a device tree or FIT image",
        _ if head.starts_with(b"07070") => "a cpio archive (an initramfs?)",
        _ if head.starts_with(b"QFI\xfb") => "a qcow2 disk image",
        _ if head.starts_with(b"!<arch>\n") => "an ar archive or Debian package",
        _ if head.starts_with(b"\x5d\0\0") => "lzma data or unknown",
        _ if head.starts_with(b"hsqs") => "a squashfs image",
        _ if at(257, b"ustar") => "a tar archive",
        _ if at(0x8001, b"CD001") => "an ISO 9660 image",
        _ if at(0x438, &[0x53, 0xEF]) => "an ext2, ext3 or ext4 file system",
        _ if at(0x1FE, &[0x55, 0xAA]) => "a boot sector or disk image",
        _ if head.iter().all(|b| *b == 0) => "nothing but zeros",
        _ if head.iter().take(512).all(|b| b.is_ascii_graphic() || b.is_ascii_whitespace()) => "a text file",
        _ => "an unknown kind of file",
    };
    name.to_string()
}
