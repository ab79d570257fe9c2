//! Memory that is filled before the guest exists and then becomes part of its RAM without being copied.

use std::io;
use std::ops::{Deref, DerefMut, Range};
use std::sync::PoisonError;

use super::{GuestRam, HugePages, Mapping, OutOfRam};
use crate::layout::PAGE_SIZE;

/// Size below which pieces are copied: moving pages costs two system calls and splits the mapping of RAM.
const MOVE_MIN: u64 = 1 << 20;

/// Zeroed bytes of a fixed length, which take up memory only where they are written.
#[derive(Debug)]
pub struct Pages {
    mapping: Mapping,
    len: usize,
}

impl Pages {
    /// Reserves `len` bytes; 0 is allowed.
    pub fn new(len: u64) -> io::Result<Pages> {
        // A mapping has at least one page.
        let mapping = Mapping::new(len.max(1), None, libc::MAP_PRIVATE | libc::MAP_NORESERVE)?;
        // Faulting in memory page by page takes longer than unpacking a kernel. Hosts without huge pages refuse the
        // advice.
        let pages = if len < MOVE_MIN { HugePages::Off } else { HugePages::Thp };
        let _ = mapping.advise_pages(0..mapping.len(), pages);
        Ok(Pages { mapping, len: usize::try_from(len).map_err(io::Error::other)? })
    }
}

impl Deref for Pages {
    type Target = [u8];

    #[allow(unsafe_code)]
    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping is readable, has `len` bytes and lives as long as this value; code that changes it
        // borrows the value mutably.
        unsafe { std::slice::from_raw_parts(self.mapping.addr() as *const u8, self.len) }
    }
}

impl DerefMut for Pages {
    #[allow(unsafe_code)]
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`, and the mapping is writable.
        unsafe { std::slice::from_raw_parts_mut(self.mapping.addr() as *mut u8, self.len) }
    }
}

impl GuestRam {
    /// Puts a piece of `pages` at `addr`. Moves the pages themselves where possible (their old place then reads as
    /// zeros), and copies the rest.
    pub fn take_pages(&self, addr: u64, pages: &mut Pages, piece: Range<u64>) -> Result<(), OutOfRam> {
        let len = piece.end.saturating_sub(piece.start);
        let target = self.slice(addr, len)?;
        let out_of_ram = OutOfRam { addr, len };
        let moved = self.move_pages(addr, pages, &piece).unwrap_or_else(|e| {
            log::debug!("cannot move the kernel's pages into the guest, so they are copied: {e}");
            piece.start..piece.start
        });
        // The rest lies on pages that belong to the piece only in part.
        for part in [piece.start..moved.start, moved.end..piece.end] {
            let bytes = pages.get(part.start as usize..part.end as usize).ok_or(out_of_ram)?;
            let offset = (part.start - piece.start) as usize;
            target.subslice(offset, bytes.len()).map_err(|_| out_of_ram)?.copy_from(bytes);
        }
        Ok(())
    }

    /// Moves the whole pages of the piece, if this RAM's backing allows it, and returns the range of bytes moved.
    fn move_pages(&self, addr: u64, pages: &mut Pages, piece: &Range<u64>) -> io::Result<Range<u64>> {
        let whole = piece.start.next_multiple_of(PAGE_SIZE)..piece.end / PAGE_SIZE * PAGE_SIZE;
        let aligned = addr % PAGE_SIZE == piece.start % PAGE_SIZE;
        let thp = self.0.config.hugepages == HugePages::Thp;
        if !aligned || !thp || !self.can_map_files() || whole.start.saturating_add(MOVE_MIN) > whole.end {
            return Ok(piece.start..piece.start);
        }
        let addr = addr + (whole.start - piece.start);
        let found = self.boot_regions().zip(&self.0.mappings).find(|(r, _)| (r.start..r.end()).contains(&addr));
        let (region, mapping) = found.ok_or(io::ErrorKind::InvalidInput)?;
        // Moved pages would replace a file mapped here earlier, which `images` would still list.
        let images = self.0.images.lock().unwrap_or_else(PoisonError::into_inner);
        let end = addr + (whole.end - whole.start);
        if images.iter().any(|image| image.start < end && addr < image.end) {
            return Ok(piece.start..piece.start);
        }
        mapping.take(addr - region.start, &mut pages.mapping, whole.clone())?;
        Ok(whole)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn filled(len: u64) -> Pages {
        let mut pages = Pages::new(len).unwrap();
        for (n, page) in pages.chunks_mut(PAGE_SIZE as usize).enumerate() {
            page.fill(n as u8 | 1);
        }
        pages
    }

    /// Takes the piece and checks that RAM contains it, and nothing around it.
    fn take(ram: &GuestRam, addr: u64, piece: Range<u64>) -> Pages {
        let mut pages = filled(8 * MIB);
        let wanted = pages[piece.start as usize..piece.end as usize].to_vec();
        ram.take_pages(addr, &mut pages, piece).unwrap();
        let mut found = vec![7; wanted.len() + 2];
        ram.read(addr - 1, &mut found).unwrap();
        assert!(found[1..=wanted.len()] == wanted[..]);
        assert_eq!((found[0], found[wanted.len() + 1]), (0, 0));
        pages
    }

    #[test]
    fn pages_are_moved_and_their_edges_copied() {
        let ram = GuestRam::anonymous(32 * MIB);
        let pages = take(&ram, 4 * MIB + 5, 5..6 * MIB + 77);
        let (moved, edge) = (pages[2 * MIB as usize], pages[6 * MIB as usize]);
        assert_eq!((pages[0], moved, edge), (1, 0, 1), "what was moved is zeros now");
        ram.write(5 * MIB, b"and is the guest's to change").unwrap();
        ram.release(4 * MIB, 4 * MIB).unwrap();
        assert_eq!(ram.read_obj::<u64>(5 * MIB).unwrap(), 0);
    }

    #[test]
    fn what_cannot_be_moved_is_copied() {
        for config in ["32M,shared", "32M,hugepages=off"] {
            let ram = GuestRam::new(&config.parse().unwrap()).unwrap();
            let pages = take(&ram, 4 * MIB, 0..8 * MIB);
            assert_eq!(pages[0], 1, "{config}");
        }
        let ram = GuestRam::anonymous(64 * MIB);
        assert_eq!(take(&ram, 4 * MIB + 1, 0..6 * MIB)[0], 1, "not aligned");
        assert_eq!(take(&ram, 16 * MIB, 0..MIB / 2)[0], 1, "small");
    }

    #[test]
    fn no_address_and_no_piece_leads_outside() {
        let ram = GuestRam::anonymous(16 * MIB);
        let mut pages = filled(8 * MIB);
        let outside = OutOfRam { addr: 12 * MIB, len: 8 * MIB };
        assert_eq!(ram.take_pages(12 * MIB, &mut pages, 0..8 * MIB), Err(outside));
        assert!(ram.take_pages(u64::MAX, &mut pages, 0..1).is_err());
        assert!(ram.take_pages(0, &mut pages, 4 * MIB..12 * MIB).is_err());
        assert_eq!(pages[0], 1);
        assert!(Pages::new(0).unwrap().is_empty());
    }
}
