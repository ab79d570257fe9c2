//! Returns pages of guest RAM to the host while the guest runs.
//!
//! The method depends on what backs the pages. Private anonymous pages are dropped by `MADV_DONTNEED`. Pages of a
//! memory file are freed by punching a hole into the file. A mapping of a kernel image is replaced by anonymous memory,
//! because `MADV_DONTNEED` would restore the file's content. In every case the pages read as zeros afterwards.

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::PoisonError;

use vm_memory::{FileOffset, GuestMemoryBackend, GuestMemoryRegion};

use super::{Area, GuestRam, HugePages, Mapping};
use crate::layout;

impl GuestRam {
    /// Smallest piece that the host takes back, in bytes: a page, or a huge page with `hugepages=2M`.
    pub fn release_unit(&self) -> u64 {
        match self.0.config.hugepages {
            HugePages::TwoMib => 2 << 20,
            HugePages::Thp | HugePages::Off => layout::PAGE_SIZE,
        }
    }

    /// Releases the units that lie wholly in `len` bytes at `addr`, and in RAM; returns how many bytes that is. The
    /// memory reads as zeros from then on and is allocated again when written. (With `hugepages=2M` it comes from the
    /// host's pool; if the pool is empty by then, the guest cannot continue.)
    pub fn release(&self, addr: u64, len: u64) -> io::Result<u64> {
        let unit = self.release_unit();
        let end = addr.saturating_add(len);
        let mut released = 0;
        for ((region, mapping), index) in self.0.memory.iter().zip(&self.0.mappings).zip(0..) {
            if self.area(index).is_some_and(Area::is_file) {
                continue;
            }
            let start = region.start_addr().0;
            // Regions begin at a multiple of any unit, so within these bounds the rounding cannot overflow.
            let from = addr.clamp(start, start + region.len()).next_multiple_of(unit);
            let to = end.clamp(start, start + region.len()) / unit * unit;
            if from >= to {
                continue;
            }
            let piece = from - start..to - start;
            match region.file_offset() {
                Some(file) => mapping.punch(file, piece)?,
                None => self.release_anonymous(mapping, start, piece)?,
            }
            // Code that copies RAM elsewhere must learn that these pages changed.
            if let Ok(slice) = self.slice(from, to - from) {
                vm_memory::bitmap::Bitmap::mark_dirty(slice.bitmap(), 0, slice.len());
            }
            released += to - from;
        }
        Ok(released)
    }

    /// Removes the page around `addr` from the guest's second-level page tables, if it is RAM; its content stays, and
    /// the guest's next access maps it again. To do so, the page is made executable in this process and then
    /// non-executable again: on every change of protection the kernel notifies KVM, and this change disturbs no other
    /// user of the page.
    pub fn unmap_from_guest(&self, addr: u64) {
        for (region, mapping) in self.boot_regions().zip(&self.0.mappings) {
            let page = addr / layout::PAGE_SIZE * layout::PAGE_SIZE;
            if let Some(start) = page.checked_sub(region.start).filter(|_| page < region.end()) {
                mapping.change_protection(start..start + layout::PAGE_SIZE);
            }
        }
    }

    /// Drops private pages of the region at `start`; `piece` is relative to `start`.
    fn release_anonymous(&self, mapping: &Mapping, start: u64, piece: Range<u64>) -> io::Result<()> {
        let mut images = self.0.images.lock().unwrap_or_else(PoisonError::into_inner);
        let overlap = |image: &Range<u64>| {
            let within = image.start.max(start + piece.start)..image.end.min(start + piece.end);
            (!within.is_empty()).then_some(within)
        };
        if !images.iter().any(|image| overlap(image).is_some()) {
            return mapping.advise(piece, libc::MADV_DONTNEED);
        }
        // Put anonymous memory over the whole piece: parts that were anonymous before lose only their pages.
        mapping.replace(piece.clone(), None, libc::MAP_PRIVATE)?;
        let gone = start + piece.start..start + piece.end;
        let left = images
            .iter()
            .flat_map(|image| [image.start..image.end.min(gone.start), image.start.max(gone.end)..image.end]);
        *images = left.filter(|image| !image.is_empty()).collect();
        drop(images);
        let _ = mapping.advise_pages(piece, self.0.config.hugepages);
        Ok(())
    }
}

impl Mapping {
    /// Calls `madvise` for a piece of the mapping, given in bytes from its beginning.
    #[allow(unsafe_code)]
    pub(super) fn advise(&self, piece: Range<u64>, advice: libc::c_int) -> io::Result<()> {
        let (addr, len) = self.checked(piece)?;
        // SAFETY: the range was just checked to lie inside this mapping of ours; guest memory is only accessed by
        // volatile copies, for which it does not matter what the advice does to its contents.
        if unsafe { libc::madvise(addr as *mut libc::c_void, len, advice) } == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Makes a piece executable, then non-executable again. If the host refuses the former, nothing happens.
    #[allow(unsafe_code)]
    fn change_protection(&self, piece: Range<u64>) {
        let Ok((addr, len)) = self.checked(piece) else { return };
        let plain = libc::PROT_READ | libc::PROT_WRITE;
        for protection in [plain | libc::PROT_EXEC, plain] {
            // SAFETY: the range was just checked to lie inside this mapping of ours, which stays readable and writable
            // throughout; nothing in this process ever jumps there.
            unsafe { libc::mprotect(addr as *mut libc::c_void, len, protection) };
        }
    }

    /// Requests a kind of pages. A kernel without transparent huge pages refuses, and callers can only ignore that.
    pub(super) fn advise_pages(&self, piece: Range<u64>, pages: HugePages) -> io::Result<()> {
        match pages {
            HugePages::Thp => self.advise(piece, libc::MADV_HUGEPAGE),
            HugePages::Off => self.advise(piece, libc::MADV_NOHUGEPAGE),
            HugePages::TwoMib => Ok(()),
        }
    }

    /// Frees a piece of the file behind the mapping, and the copies of its pages that a private mapping holds.
    #[allow(unsafe_code)]
    fn punch(&self, file: &FileOffset, piece: Range<u64>) -> io::Result<()> {
        if self.is_private() {
            self.advise(piece.clone(), libc::MADV_DONTNEED)?;
        }
        let (_, len) = self.checked(piece.clone())?;
        let number = |n| libc::off_t::try_from(n).map_err(io::Error::other);
        let (offset, len) = (number(file.start() + piece.start)?, number(len as u64)?);
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: the call touches no memory of this process except the file's own pages, of which the mapping
        // consists.
        if unsafe { libc::fallocate(file.file().as_raw_fd(), mode, offset, len) } == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryConfig;
    use crate::options::Size;
    use std::io::Write;

    /// Bytes of RAM for which the host has allocated pages.
    #[allow(unsafe_code)]
    fn resident(ram: &GuestRam) -> u64 {
        let mut pages = 0;
        for region in ram.regions() {
            let mut seen = vec![0u8; (region.len / layout::PAGE_SIZE) as usize];
            // SAFETY: the range is a mapping of ours, and the vector has a byte for each of its pages.
            let result = unsafe { libc::mincore(region.host_addr as *mut _, region.len as usize, seen.as_mut_ptr()) };
            assert_eq!(result, 0);
            pages += seen.iter().filter(|page| **page & 1 == 1).count() as u64;
        }
        pages * layout::PAGE_SIZE
    }

    fn ram(text: &str) -> GuestRam {
        let ram = GuestRam::new(&text.parse::<MemoryConfig>().unwrap()).unwrap();
        ram.write(0, &vec![0xAA; 1 << 20]).unwrap();
        ram
    }

    #[test]
    fn released_pages_read_as_zeros_and_take_no_memory() {
        for backing in ["16M,hugepages=off", "16M,shared", "16M"] {
            let ram = ram(backing);
            let before = resident(&ram);
            assert_eq!(ram.release(0x1_0000, 0x8_0000).unwrap(), 0x8_0000, "{backing}");
            if !backing.ends_with("16M") {
                assert_eq!(before - resident(&ram), 0x8_0000, "{backing}");
            }
            assert_eq!(ram.read_obj::<u8>(0xFFFF).unwrap(), 0xAA);
            assert_eq!(ram.read_obj::<[u8; 2]>(0x1_0000).unwrap(), [0, 0]);
            assert_eq!(ram.read_obj::<u8>(0x8_FFFF).unwrap(), 0);
            assert_eq!(ram.read_obj::<u8>(0x9_0000).unwrap(), 0xAA);
            ram.write_obj(0x1_0000, 1u8).unwrap();
            assert_eq!(ram.read_obj::<u8>(0x1_0000).unwrap(), 1);
        }
    }

    #[test]
    fn only_whole_pages_of_ram_are_released() {
        let ram = ram("16M");
        assert_eq!(ram.release(0x1001, 0x1FFE).unwrap(), 0);
        assert_eq!(ram.release(0xFFF, 0x1002).unwrap(), 0x1000);
        assert_eq!(ram.read_obj::<u8>(0xFFF).unwrap(), 0xAA);
        assert_eq!(ram.read_obj::<u8>(0x2000).unwrap(), 0xAA);
        assert_eq!(ram.release(16 << 20, 4096).unwrap(), 0);
        assert_eq!(ram.release((16 << 20) - 4096, u64::MAX).unwrap(), 4096);
        assert_eq!(ram.release(u64::MAX, u64::MAX).unwrap(), 0);
        assert_eq!(ram.release(0, 0).unwrap(), 0);
    }

    #[test]
    fn memory_on_both_sides_of_the_hole() {
        let ram = GuestRam::new(&MemoryConfig { size: Size::mib(3200), ..Default::default() }).unwrap();
        let (low, high) = (layout::MMIO_HOLE - 8192, layout::MMIO_HOLE_END);
        ram.write(low, &[1; 8192]).unwrap();
        ram.write(high, &[1; 8192]).unwrap();
        assert_eq!(ram.release(low + 4096, high + 4096 - (low + 4096)).unwrap(), 8192);
        assert_eq!(ram.read_obj::<[u8; 2]>(low + 4095).unwrap(), [1, 0]);
        assert_eq!(ram.read_obj::<[u8; 2]>(high + 4095).unwrap(), [0, 1]);
    }

    #[test]
    fn a_mapped_image_does_not_come_back() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[0x55; 0x8000]).unwrap();
        let ram = ram("16M,hugepages=off");
        ram.map_file(0x1_0000, 0x8000, &file, 0).unwrap();
        ram.write_obj(0x1_3000, 1u8).unwrap();
        // Pages before the image with its first ones; then one in its middle; the rest stays.
        assert_eq!(ram.release(0xF000, 0x2000).unwrap(), 0x2000);
        assert_eq!(ram.release(0x1_3000, 0x1000).unwrap(), 0x1000);
        let found: Vec<u8> = (0xE000..0x1_9000).step_by(0x1000).map(|at| ram.read_obj(at).unwrap()).collect();
        assert_eq!(found, [0xAA, 0, 0, 0x55, 0x55, 0, 0x55, 0x55, 0x55, 0x55, 0xAA]);
        assert_eq!(*ram.0.images.lock().unwrap(), [0x1_1000..0x1_3000, 0x1_4000..0x1_8000]);
        ram.release(0, 1 << 20).unwrap();
        assert!(ram.0.images.lock().unwrap().is_empty());
        assert_eq!(ram.read_obj::<u8>(0x1_4000).unwrap(), 0);
    }

    /// Returns true if all of this process's mapped pages in a range are left out of core dumps ("dd" in VmFlags).
    fn undumped(from: u64, len: u64) -> bool {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let (mut within, mut flags) = (false, Vec::new());
        for line in smaps.lines() {
            let range = line.split(' ').next().and_then(|range| range.split_once('-'));
            let number = |text: &str| u64::from_str_radix(text, 16).ok();
            if let Some((start, end)) = range.and_then(|(start, end)| Some((number(start)?, number(end)?))) {
                within = start < from + len && end > from;
            }
            flags.extend(line.strip_prefix("VmFlags:").filter(|_| within).map(|flags| flags.contains(" dd")));
        }
        !flags.is_empty() && flags.iter().all(|dd| *dd)
    }

    #[test]
    fn no_guest_memory_is_in_core_dumps() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[0x55; 0x8000]).unwrap();
        for backing in ["16M,hugepages=off", "16M", "16M,shared"] {
            let ram = ram(backing);
            let check = |when: &str| {
                ram.regions().for_each(|r| assert!(undumped(r.host_addr, r.len), "{backing}: {when}"));
            };
            check("at first");
            if ram.can_map_files() {
                ram.map_file(0x1_0000, 0x8000, &file, 0).unwrap();
                check("with the kernel's pages");
                ram.release(0xF000, 0x2000).unwrap();
                check("with some of them released");
            }
        }
    }

    #[test]
    fn huge_pages_only_as_a_whole() {
        // Not every machine has a hugetlb pool; this test only checks that whole huge pages are released.
        let mut ram = GuestRam::anonymous(16 << 20);
        std::sync::Arc::get_mut(&mut ram.0).unwrap().config.hugepages = HugePages::TwoMib;
        ram.write(0, &vec![0xAA; 4 << 20]).unwrap();
        assert_eq!(ram.release(0x1000, (2 << 20) - 0x1000).unwrap(), 0);
        assert_eq!(ram.release(0, (4 << 20) - 1).unwrap(), 2 << 20);
        assert_eq!(ram.read_obj::<u8>(0).unwrap(), 0);
        assert_eq!(ram.read_obj::<u8>(2 << 20).unwrap(), 0xAA);
    }
}
