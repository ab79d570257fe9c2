//! The pages of this process that a region of guest memory consists of.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap};

use super::Dirty;
use crate::layout;

/// Alignment of regions in this process: a huge page. KVM maps a huge page into the guest only where guest and host
/// address agree in their lower bits, and without huge pages a boot takes ten times as many page faults.
const HUGE_PAGE: usize = 2 << 20;

/// A region, and the mapping that it points into.
pub(super) type Mapped = (GuestRegionMmap<Dirty>, Mapping);

/// Readable and writable pages of this process, unmapped when dropped.
#[derive(Debug)]
pub(super) struct Mapping {
    addr: usize,
    len: usize,
    flags: i32,
}

impl Mapping {
    /// Maps `len` bytes of `file` from an offset on, or anonymous memory, at a multiple of [`HUGE_PAGE`]. `flags` are
    /// `mmap`'s: `MAP_SHARED` or `MAP_PRIVATE`, and `MAP_NORESERVE`.
    #[allow(unsafe_code)]
    pub(super) fn new(len: u64, file: Option<(&File, u64)>, flags: i32) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(io::Error::other)?;
        let room = len.checked_add(HUGE_PAGE).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        let reserve = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: the mapping is new, at an address of the kernel's choice; the result is checked.
        let reserved = unsafe { libc::mmap(std::ptr::null_mut(), room, libc::PROT_NONE, reserve, -1, 0) };
        if reserved == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = reserved as usize;
        let addr = start.next_multiple_of(HUGE_PAGE);
        let end = addr + len.next_multiple_of(layout::PAGE_SIZE as usize);
        for (from, to) in [(start, addr), (end, start + room)] {
            if from < to {
                // SAFETY: the unmapped range is a part of the mapping just created, and nothing uses it.
                unsafe { libc::munmap(from as *mut libc::c_void, to - from) };
            }
        }
        let mapping = Mapping { addr, len, flags };
        mapping.replace(0..len as u64, file, flags)?;
        Ok(mapping)
    }

    /// Length of the mapping in bytes.
    pub(super) fn len(&self) -> u64 {
        self.len as u64
    }

    /// Address of the mapping in this process.
    pub(super) fn addr(&self) -> usize {
        self.addr
    }

    /// Moves whole pages of `from` to `offset` in this mapping; their old place then reads as zeros. Both mappings must
    /// be anonymous and private. Needs Linux 5.7 (`MREMAP_DONTUNMAP`).
    #[allow(unsafe_code)]
    pub(super) fn take(&self, offset: u64, from: &mut Mapping, piece: Range<u64>) -> io::Result<()> {
        let (old, len) = from.checked(piece)?;
        let (new, _) = self.checked(offset..offset.saturating_add(len as u64))?;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
        // SAFETY: both ranges were just checked to lie inside mappings of ours, which are different and stay mapped;
        // nothing holds a reference to the replaced pages, and the place of the moved ones reads as zeros.
        let moved = unsafe { libc::mremap(old as *mut libc::c_void, len, len, flags, new as *mut libc::c_void) };
        if moved == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Returns true if writes stay private to this process.
    pub(super) fn is_private(&self) -> bool {
        self.flags & libc::MAP_PRIVATE != 0
    }

    /// Replaces a piece of the mapping by pages of `file` from an offset on, or by fresh anonymous memory. The piece is
    /// given in bytes from the mapping's beginning.
    #[allow(unsafe_code)]
    pub(super) fn replace(&self, piece: Range<u64>, file: Option<(&File, u64)>, flags: i32) -> io::Result<()> {
        let (addr, len) = self.checked(piece)?;
        let (fd, offset, kind) = match file {
            Some((file, offset)) => (file.as_raw_fd(), libc::off_t::try_from(offset).map_err(io::Error::other)?, 0),
            // A piece of RAM is always reserved lazily; a caller that maps a whole region passes MAP_NORESERVE itself.
            None => (-1, 0, libc::MAP_ANONYMOUS | libc::MAP_NORESERVE),
        };
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = flags | kind | libc::MAP_FIXED;
        // SAFETY: the range was just checked to lie inside this mapping of ours; MAP_FIXED replaces only pages of it,
        // by pages of the same protection that nothing holds a reference into.
        let mapped = unsafe { libc::mmap(addr as *mut libc::c_void, len, protection, flags, fd, offset) };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // Advice given for the old pages does not apply to the new ones, and guest memory must not be part of a core
        // dump. Only old kernels refuse this advice.
        // SAFETY: the range is the one that was just mapped; the advice touches none of it.
        unsafe { libc::madvise(addr as *mut libc::c_void, len, libc::MADV_DONTDUMP) };
        Ok(())
    }

    /// Creates the region at the guest-physical address `start` that these pages back. The region records `file` as the
    /// file behind it.
    #[allow(unsafe_code)]
    pub(super) fn region(
        &self,
        start: u64,
        file: Option<(&File, u64)>,
        hugetlbfs: bool,
    ) -> io::Result<GuestRegionMmap<Dirty>> {
        let mut builder = MmapRegionBuilder::new_with_bitmap(self.len, None)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(self.flags)
            .with_hugetlbfs(hugetlbfs);
        if let Some((file, offset)) = file {
            builder = builder.with_file_offset(FileOffset::new(file.try_clone()?, offset));
        }
        // SAFETY: the pointer and the size are those of this mapping, which `Inner` keeps longer than the region.
        let region =
            unsafe { builder.with_raw_mmap_pointer(self.addr as *mut u8) }.build().map_err(io::Error::other)?;
        GuestRegionMmap::new(region, GuestAddress(start))
            .ok_or_else(|| io::Error::other("region overflows the address space"))
    }

    /// Returns the address and length of a piece, which must lie within the mapping.
    pub(super) fn checked(&self, piece: Range<u64>) -> io::Result<(usize, usize)> {
        let number = |n| usize::try_from(n).map_err(io::Error::other);
        let (from, to) = (number(piece.start)?, number(piece.end)?);
        if from > to || to > self.len {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok((self.addr + from, to - from))
    }
}

impl Drop for Mapping {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: the range is ours alone, and everything that pointed into it was dropped before.
        unsafe { libc::munmap(self.addr as *mut libc::c_void, self.len) };
    }
}
