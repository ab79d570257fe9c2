//! Core file of a guest, as crash, drgn and gdb open it: an ELF file with the registers of each vCPU (NT_PRSTATUS), the
//! kernel's own VMCOREINFO note if there is one, and the guest's RAM.
//!
//! ```text
//! ELF header, program headers │ notes │ first region of RAM │ next region ...
//! ```
//!
//! Each region is as long in the file as in the guest; pages that were never used or are zero are holes. If the kernel
//! describes its mappings, a region's virtual address is the one in the direct mapping of all memory, and one more
//! header shows the same bytes at the addresses of the kernel's image. Only the user may read the file, because it
//! holds everything that the guest knew.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use kvm_bindings::kvm_segment;

use super::kernel::{IMAGE_MAP, IMAGE_MAP_LEN, Kernel};
use crate::backend::output_file::OutputFile;
use crate::backend::passthrough::ignore_file_size_limit;
use crate::kvm::dump::CpuState;
use crate::layout::PAGE_SIZE;
use crate::memory::{GuestRam, RamRegion};

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const NT_PRSTATUS: u32 = 1;
const EHDR_LEN: u64 = 64;
const PHDR_LEN: u64 = 56;
/// Length of `struct elf_prstatus` (linux/elfcore.h) on x86-64, and the offsets of its pr_pid and pr_reg.
const PRSTATUS_LEN: usize = 336;
const PR_PID: usize = 32;
const PR_REG: usize = 112;
/// Number of bytes that are copied in one step.
const CHUNK: u64 = 256 << 10;

/// Error: a core file could not be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file system refused the write.
    #[error("cannot write {0}")]
    Write(PathBuf, #[source] io::Error),
    /// The user stopped the write.
    #[error("{0} was not written: stopped by a signal")]
    Stopped(PathBuf),
}

/// Writes a core file; `stopped` returns whether the user wants to stop that.
pub fn write(
    core: &OutputFile,
    ram: &GuestRam,
    cpus: &[CpuState],
    kernel: Option<&Kernel<'_>>,
    stopped: impl FnMut() -> bool,
) -> Result<(), Error> {
    let _ = ignore_file_size_limit();
    let failed = |e| Error::Write(core.path().into(), e);
    let draft = core.draft().map_err(failed)?;
    // The file is not synced: for many gigabytes that takes minutes, and nobody needs the file if the host crashes too.
    match write_to(&draft.file, ram, cpus, kernel, stopped) {
        Ok(true) => draft.publish().map_err(failed),
        Ok(false) => Err(Error::Stopped(core.path().into())),
        Err(e) => Err(failed(e)),
    }
}

/// Writes the file. Returns false if `stopped` ended that early.
fn write_to(
    file: &File,
    ram: &GuestRam,
    cpus: &[CpuState],
    kernel: Option<&Kernel<'_>>,
    mut stopped: impl FnMut() -> bool,
) -> io::Result<bool> {
    let notes = notes(cpus, kernel);
    let regions: Vec<RamRegion> = ram.all_ram().collect();
    let image = kernel.and_then(|kernel| image(kernel, &regions));
    let headers = 1 + regions.len() + usize::from(image.is_some());
    let notes_at = EHDR_LEN + PHDR_LEN * headers as u64;
    let mut offset = (notes_at + notes.len() as u64).next_multiple_of(PAGE_SIZE);

    let mut head = elf_header(headers as u16);
    let note = Load { offset: notes_at, vaddr: 0, paddr: 0, len: notes.len() as u64 };
    head.extend(note.header(PT_NOTE));
    let direct_map = kernel.and_then(Kernel::direct_map);
    let mut loads = Vec::with_capacity(regions.len());
    for region in &regions {
        let vaddr = direct_map.map_or(0, |base| base.wrapping_add(region.start));
        loads.push(Load { offset, vaddr, paddr: region.start, len: region.len });
        offset += region.len;
    }
    // The image comes before the others, so that a lookup of one of its addresses finds it first.
    let image = image.and_then(|(vaddr, paddr, len)| {
        let load = loads.iter().find(|load| load.paddr <= paddr && paddr - load.paddr < load.len)?;
        Some(Load { offset: load.offset + (paddr - load.paddr), vaddr, paddr, len })
    });
    image.iter().chain(&loads).for_each(|load| head.extend(load.header(PT_LOAD)));
    head.extend(notes);
    file.write_all_at(&head, 0)?;
    for (region, load) in regions.into_iter().zip(&loads) {
        for (addr, len) in ram.populated(region) {
            if stopped() {
                return Ok(false);
            }
            copy(file, ram, addr..addr + len, load.offset + (addr - region.start))?;
        }
    }
    file.set_len(offset)?;
    Ok(true)
}

/// Copies a piece of RAM to `offset`, except for pages of zeros.
fn copy(file: &File, ram: &GuestRam, piece: std::ops::Range<u64>, offset: u64) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK as usize];
    for start in piece.clone().step_by(CHUNK as usize) {
        let len = CHUNK.min(piece.end - start);
        let chunk = &mut buffer[..len as usize];
        ram.read(start, chunk).map_err(io::Error::other)?;
        let at = offset + (start - piece.start);
        let mut run = 0..0;
        for (page, bytes) in (0..).step_by(PAGE_SIZE as usize).zip(chunk.chunks(PAGE_SIZE as usize)) {
            if bytes.iter().all(|byte| *byte == 0) {
                continue;
            }
            if run.end != page {
                file.write_all_at(&chunk[run.clone()], at + run.start as u64)?;
                run.start = page;
            }
            run.end = page + bytes.len();
        }
        file.write_all_at(&chunk[run.clone()], at + run.start as u64)?;
    }
    Ok(())
}

/// Returns the part of the kernel's image that one region holds: virtual and physical address, length.
fn image(kernel: &Kernel<'_>, regions: &[RamRegion]) -> Option<(u64, u64, u64)> {
    let (vaddr, paddr) = kernel.image()?;
    let region = regions.iter().find(|region| region.start <= paddr && paddr < region.end())?;
    let room = IMAGE_MAP_LEN.checked_sub(vaddr.checked_sub(IMAGE_MAP)?)?;
    Some((vaddr, paddr, room.min(region.end() - paddr)))
}

/// Fields of a program header.
struct Load {
    offset: u64,
    vaddr: u64,
    paddr: u64,
    len: u64,
}

impl Load {
    fn header(&self, kind: u32) -> Vec<u8> {
        let flags = if kind == PT_LOAD { 7u64 } else { 0 };
        // The first two fields form one 64-bit number here; the last field is the alignment.
        [u64::from(kind) | flags << 32, self.offset, self.vaddr, self.paddr, self.len, self.len, 0]
            .into_iter()
            .flat_map(u64::to_le_bytes)
            .collect()
    }
}

fn elf_header(headers: u16) -> Vec<u8> {
    let mut header = vec![0x7F, b'E', b'L', b'F', 2, 1, 1];
    header.resize(16, 0);
    // ET_CORE, EM_X86_64, version 1.
    header.extend([4, 0, 62, 0, 1, 0, 0, 0]);
    // Entry, program headers, section headers.
    header.extend([0, EHDR_LEN, 0].map(u64::to_le_bytes).concat());
    header.extend([0; 4]);
    header.extend([EHDR_LEN as u16, PHDR_LEN as u16, headers, 0, 0, 0].map(u16::to_le_bytes).concat());
    header
}

fn notes(cpus: &[CpuState], kernel: Option<&Kernel<'_>>) -> Vec<u8> {
    let mut notes = Vec::new();
    for cpu in cpus {
        push_note(&mut notes, b"CORE\0", NT_PRSTATUS, &prstatus(cpu));
    }
    if let Some(kernel) = kernel {
        push_note(&mut notes, b"VMCOREINFO\0", 0, kernel.note().as_bytes());
    }
    notes
}

fn push_note(notes: &mut Vec<u8>, name: &[u8], kind: u32, content: &[u8]) {
    notes.extend([name.len() as u32, content.len() as u32, kind].map(u32::to_le_bytes).concat());
    for part in [name, content] {
        notes.extend(part);
        notes.resize(notes.len().next_multiple_of(4), 0);
    }
}

/// Returns the registers in the order of `user_regs_struct` (sys/user.h). A vCPU is the thread whose ID is its number
/// plus one.
fn prstatus(cpu: &CpuState) -> Vec<u8> {
    let (r, s) = (&cpu.regs, &cpu.sregs);
    let selector = |segment: &kvm_segment| u64::from(segment.selector);
    let registers = [
        r.r15,
        r.r14,
        r.r13,
        r.r12,
        r.rbp,
        r.rbx,
        r.r11,
        r.r10,
        r.r9,
        r.r8,
        r.rax,
        r.rcx,
        r.rdx,
        r.rsi,
        r.rdi,
        u64::MAX, // orig_rax: not in a system call
        r.rip,
        selector(&s.cs),
        r.rflags,
        r.rsp,
        selector(&s.ss),
        s.fs.base,
        s.gs.base,
        selector(&s.ds),
        selector(&s.es),
        selector(&s.fs),
        selector(&s.gs),
    ];
    let mut status = vec![0; PR_PID];
    status.extend((cpu.id + 1).to_le_bytes());
    status.resize(PR_REG, 0);
    status.extend(registers.into_iter().flat_map(u64::to_le_bytes));
    status.resize(PRSTATUS_LEN, 0);
    status
}

#[cfg(test)]
mod tests {
    use super::super::kernel::testing::guest;
    use super::*;
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
        bytes[at..at + len].iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte))
    }

    #[test]
    fn headers_notes_and_memory_are_where_they_are_said_to_be() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("core");
        let ram = guest("");
        ram.write(0x20_0FFF, b"vireo").unwrap();
        let mut cpus = [CpuState::default(), CpuState::default()];
        cpus[1].id = 1;
        cpus[1].regs.rip = 0x1234_5678_9ABC;
        cpus[1].sregs.gs.selector = 0x2B;
        let kernel = Kernel::find(&ram).unwrap();
        write(&OutputFile::private(&path).unwrap(), &ram, &cpus, Some(&kernel), || false).unwrap();
        let core = fs::read(&path).unwrap();
        assert_eq!(&core[..20], b"\x7FELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x04\0\x3E\0");
        assert_eq!((number(&core, 52, 2), number(&core, 54, 2), number(&core, 56, 2)), (64, 56, 3));
        let header = |n: usize| (0..7).map(|i| number(&core, 64 + 56 * n + 8 * i, 8)).collect::<Vec<_>>();
        let [note, image, load] = [header(0), header(1), header(2)];
        let notes = 64 + 3 * 56;
        assert_eq!((note[0], note[1]), (4, notes as u64));
        assert_eq!((load[0], load[3], load[4], load[5]), (1 | 7 << 32, 0, 16 << 20, 16 << 20));
        assert_eq!(&image[1..5], [load[1] + (1 << 20), IMAGE_MAP, 1 << 20, 15 << 20]);
        assert_eq!(load[1] % PAGE_SIZE, 0);
        assert_eq!(&core[load[1] as usize + 0x20_0FFF..][..5], b"vireo");
        assert_eq!(core.len() as u64, load[1] + load[4]);
        assert!(fs::metadata(&path).unwrap().blocks() * 512 < 256 << 10, "holes");
        let second = notes + 12 + 8 + PRSTATUS_LEN;
        assert_eq!((number(&core, second, 4), number(&core, second + 4, 4)), (5, PRSTATUS_LEN as u64));
        let status = second + 20;
        assert_eq!((number(&core, status + 32, 4), number(&core, status + 112 + 16 * 8, 8)), (2, 0x1234_5678_9ABC));
        assert_eq!(number(&core, status + 112 + 26 * 8, 8), 0x2B);
        let info = second + 20 + PRSTATUS_LEN;
        assert_eq!(&core[info + 12..][..22], b"VMCOREINFO\0\0OSRELEASE=");
        assert_eq!(note[4], (info + 24 + kernel.note().len().next_multiple_of(4) - notes) as u64);
    }

    #[test]
    fn what_fails_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("core");
        let ram = guest("");
        let core = OutputFile::private(&path).unwrap();
        let stopped = write(&core, &ram, &[], None, || true).unwrap_err().to_string();
        assert!(stopped.ends_with("core was not written: stopped by a signal"), "{stopped}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
