//! ELF headers as far as booting needs them: loadable segments, entry, Xen notes, and the end of the ELF part of the
//! file.
//!
//! Every number in the file is untrusted. The result of [`Elf::parse`] is checked: segments are sorted by physical
//! address, do not overlap, do not wrap, and their bytes exist.

use super::error::Problem;
use super::source::Data;

const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;
const SHT_NOBITS: u32 = 8;
const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;
/// Limit on the program headers that are read, more than any kernel has.
const PROGRAM_HEADERS_MAX: u16 = 256;
/// Longest path of a loader.
const PATH_MAX: u64 = 4096;
/// Limit on a section's size, more than the names or descriptions of any module need.
const SECTION_MAX: u64 = 4 << 20;
/// Limit on the size of notes, more than any kernel has.
const NOTES_MAX: u64 = 64 << 10;
/// Xen's `XEN_ELFNOTE_GUEST_OS`: the name of the kernel (xen/include/public/elfnote.h).
const XEN_ELFNOTE_GUEST_OS: u32 = 6;
/// Xen's `XEN_ELFNOTE_PHYS32_ENTRY`: the PVH entry (xen/include/public/elfnote.h).
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// Contents of an ELF file's headers.
#[derive(Debug, Default)]
pub struct Elf {
    /// 64-bit class; otherwise 32-bit.
    pub class64: bool,
    /// `e_entry`.
    pub entry: u64,
    /// The loadable segments.
    pub segments: Vec<Segment>,
    /// Physical address of the PVH entry.
    pub pvh: Option<u64>,
    /// True if a note identifies the file as Linux.
    pub linux_note: bool,
    /// End of the ELF file; bytes after it do not belong to it.
    pub end: u64,
}

/// A loadable segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address.
    pub paddr: u64,
    /// Virtual address.
    pub vaddr: u64,
    /// Offset of the segment's bytes in the file.
    pub offset: u64,
    /// Number of bytes in the file.
    pub file_len: u64,
    /// Number of bytes in memory; those after the file's bytes are zero.
    pub mem_len: u64,
}

/// Little-endian fields of a header that has been read completely.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn get<const N: usize>(&self, offset: usize) -> [u8; N] {
        let bytes = self.0.get(offset..).and_then(|b| b.first_chunk());
        bytes.copied().unwrap_or([0; N])
    }
    fn u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes(self.get(offset))
    }
    fn u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.get(offset))
    }
    fn u64(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.get(offset))
    }
    /// Returns a field that is as wide as the class of the file, from its place in either class.
    fn word(&self, class64: bool, offset64: usize, offset32: usize) -> u64 {
        if class64 { self.u64(offset64) } else { self.u32(offset32).into() }
    }
}

/// Returns whether `head` begins an ELF file.
pub fn is_elf(head: &[u8]) -> bool {
    head.starts_with(b"\x7fELF")
}

/// Returns whether the file is a 64-bit file, and its header.
fn file_header(data: &Data) -> Result<(bool, Vec<u8>), Problem> {
    let ident = data.bytes(0, 20)?;
    let machine = Fields(&ident).u16(18);
    let class64 = match (ident[4], ident[5], machine) {
        (2, 1, EM_X86_64) => true,
        (1, 1, EM_386 | EM_X86_64) => false,
        (_, 2, _) => return Err(Problem::NotAKernel("a big-endian ELF file".into())),
        _ => return Err(Problem::NotAKernel(format!("an ELF file for {}", machine_name(machine)))),
    };
    Ok((class64, data.bytes(0, if class64 { 64 } else { 52 })?))
}

/// Returns the path of the loader that a program needs; a static program has none.
pub fn interpreter(data: &Data) -> Result<Option<Vec<u8>>, Problem> {
    let (c, header) = file_header(data)?;
    let f = Fields(&header);
    if !matches!(f.u16(16), 2 | 3) {
        return Err(Problem::NotAKernel("an ELF object file, not an executable".into()));
    }
    let (size, count) = (f.u16(if c { 54 } else { 42 }), f.u16(if c { 56 } else { 44 }));
    let table = data.bytes(f.word(c, 32, 28), u64::from(size) * u64::from(count.min(PROGRAM_HEADERS_MAX)))?;
    let mut headers = table.chunks_exact(usize::from(size).max(1)).map(Fields);
    let Some(f) = headers.find(|f| f.u32(0) == PT_INTERP) else { return Ok(None) };
    let path = data.bytes(f.word(c, 8, 4), f.word(c, 32, 16).min(PATH_MAX))?;
    Ok(path.split(|b| *b == 0).next().map(<[u8]>::to_vec))
}

/// Returns the bytes of the section `name` of a 64-bit file, if there is one.
pub fn section(data: &Data, name: &[u8]) -> Result<Option<Vec<u8>>, Problem> {
    let header = data.head(64)?;
    let f = Fields(&header);
    if !is_elf(&header) || header.get(4) != Some(&2) || f.u16(58) != 64 {
        return Err(Problem::Damaged("it is not a 64-bit ELF file".into()));
    }
    let table = data.bytes(f.u64(40), 64 * u64::from(f.u16(60)))?;
    let sections = || table.chunks_exact(64).map(Fields);
    let content = |f: Fields<'_>| data.bytes(f.u64(24), f.u64(32).min(SECTION_MAX));
    let Some(names) = sections().nth(f.u16(62).into()) else { return Ok(None) };
    let names = content(names)?;
    let wanted = |f: &Fields<'_>| {
        let rest = names.get(f.u32(0) as usize..).and_then(|rest| rest.strip_prefix(name));
        rest.is_some_and(|rest| rest.first() == Some(&0))
    };
    sections().find(wanted).map(content).transpose()
}

impl Elf {
    /// Reads and checks the headers in `data`, which begins with the ELF magic number.
    pub fn parse(data: &Data) -> Result<Elf, Problem> {
        let (class64, header) = file_header(data)?;
        let header_len = header.len() as u64;
        let f = Fields(&header);
        if !matches!(f.u16(16), 2 | 3) {
            return Err(Problem::NotAKernel("an ELF object file, not an executable".into()));
        }
        let mut elf = Elf { class64, entry: f.word(class64, 24, 24), end: header_len, ..Elf::default() };
        let entry_size: u16 = if class64 { 56 } else { 32 };
        let (size, count) = (f.u16(if class64 { 54 } else { 42 }), f.u16(if class64 { 56 } else { 44 }));
        if count == 0 {
            return Err(Problem::Damaged("this ELF file has no segments to load".into()));
        }
        if size != entry_size || count > PROGRAM_HEADERS_MAX {
            return Err(Problem::Damaged(format!("{count} program headers of {size} bytes")));
        }
        let offset = f.word(class64, 32, 28);
        let table_len = u64::from(size) * u64::from(count);
        let table = data.bytes(offset, table_len)?;
        elf.end = elf.end.max(offset + table_len);
        for header in table.chunks_exact(size.into()) {
            elf.program_header(data, &Fields(header))?;
        }
        let (size, count) = (f.u16(if class64 { 58 } else { 46 }), f.u16(if class64 { 60 } else { 48 }));
        elf.sections(data, f.word(class64, 40, 32), size, count)?;
        elf.check_segments()?;
        Ok(elf)
    }

    /// Returns whether a note identifies the kernel and its entry, so that no other header has to be trusted.
    pub fn tells_its_entry(&self) -> bool {
        self.pvh.is_some() || self.linux_note
    }

    fn program_header(&mut self, data: &Data, f: &Fields<'_>) -> Result<(), Problem> {
        let c = self.class64;
        let kind = f.u32(0);
        let offset = f.word(c, 8, 4);
        let file_len = f.word(c, 32, 16);
        if kind == PT_INTERP {
            return Err(Problem::NotAKernel("a program for an operating system, not a kernel".into()));
        }
        if !matches!(kind, PT_LOAD | PT_NOTE) {
            return Ok(());
        }
        // The offset of a segment without bytes in the file, a bss, has no meaning.
        if file_len > 0 {
            data.check(offset, file_len)?;
            self.end = self.end.max(offset + file_len);
        }
        if kind == PT_NOTE && file_len > 0 {
            let align = if f.word(c, 48, 28) == 8 { 8 } else { 4 };
            self.notes(&data.bytes(offset, file_len.min(NOTES_MAX))?, align);
        }
        if kind != PT_LOAD {
            return Ok(());
        }
        let segment =
            Segment { paddr: f.word(c, 24, 12), vaddr: f.word(c, 16, 8), offset, file_len, mem_len: f.word(c, 40, 20) };
        if file_len > segment.mem_len || segment.paddr.checked_add(segment.mem_len).is_none() {
            let (start, len) = (segment.paddr, segment.mem_len);
            return Err(Problem::Damaged(format!("a segment of {file_len} bytes at {start:#x}..+{len:#x}")));
        }
        if segment.mem_len > 0 {
            self.segments.push(segment);
        }
        Ok(())
    }

    fn notes(&mut self, mut bytes: &[u8], align: usize) {
        while bytes.len() >= 12 {
            let f = Fields(bytes);
            let (name_len, len, kind) = (f.u32(0) as usize, f.u32(4) as usize, f.u32(8));
            // Both lengths are less than 4 GiB, so the sums do not overflow.
            let start = 12 + name_len.next_multiple_of(4);
            let start = start.next_multiple_of(align);
            let Some(name) = bytes.get(12..12 + name_len) else { return };
            let Some(content) = bytes.get(start..start + len) else { return };
            match (name, kind) {
                (b"Linux\0", _) => self.linux_note = true,
                (b"Xen\0", XEN_ELFNOTE_GUEST_OS) => self.linux_note |= content.starts_with(b"linux"),
                // The value is as wide as the kernel's own words.
                (b"Xen\0", XEN_ELFNOTE_PHYS32_ENTRY) if len == 8 => self.pvh = Some(Fields(content).u64(0)),
                (b"Xen\0", XEN_ELFNOTE_PHYS32_ENTRY) if len == 4 => self.pvh = Some(Fields(content).u32(0).into()),
                _ => {}
            }
            bytes = bytes.get((start + len).next_multiple_of(align)..).unwrap_or_default();
        }
    }

    /// Reads the section headers, which serve only to find the end of the ELF file.
    fn sections(&mut self, data: &Data, offset: u64, size: u16, count: u16) -> Result<(), Problem> {
        let expected: u16 = if self.class64 { 64 } else { 40 };
        if offset == 0 || count == 0 || size != expected {
            return Ok(());
        }
        let len = u64::from(size) * u64::from(count);
        let table = data.bytes(offset, len)?;
        self.end = self.end.max(offset + len);
        for header in table.chunks_exact(size.into()) {
            let f = Fields(header);
            if f.u32(4) != SHT_NOBITS && f.u32(4) != 0 {
                let (offset, len) = (f.word(self.class64, 24, 16), f.word(self.class64, 32, 20));
                if len > 0 {
                    data.check(offset, len)?;
                    self.end = self.end.max(offset + len);
                }
            }
        }
        Ok(())
    }

    fn check_segments(&mut self) -> Result<(), Problem> {
        self.segments.sort_by_key(|s| s.paddr);
        if self.segments.is_empty() {
            return Err(Problem::Damaged("this ELF file has no segments to load".into()));
        }
        for pair in self.segments.windows(2) {
            if pair[0].paddr + pair[0].mem_len > pair[1].paddr {
                let (a, b) = (pair[0].paddr, pair[1].paddr);
                return Err(Problem::Damaged(format!("the segments at {a:#x} and {b:#x} overlap")));
            }
        }
        Ok(())
    }
}

fn machine_name(machine: u16) -> String {
    match machine {
        EM_386 => "32-bit x86".into(),
        8 => "MIPS".into(),
        20 => "32-bit PowerPC".into(),
        21 => "64-bit PowerPC".into(),
        22 => "s390".into(),
        40 => "32-bit Arm".into(),
        EM_X86_64 => "x86-64 in a class that does not exist".into(),
        183 => "arm64".into(),
        243 => "RISC-V".into(),
        258 => "LoongArch".into(),
        247 => "BPF".into(),
        other => format!("machine number {other}"),
    }
}
