//! Finds the pages of guest memory that have ever been used. Reading the others would yield only zeros, and would
//! allocate memory for them.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{OnceLock, PoisonError};

use rustix::fs::SeekFrom;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{Area, GuestRam, HugePages, RamRegion};
use crate::layout::PAGE_SIZE;

/// Number of bytes examined at a time.
const WINDOW: u64 = 64 << 20;
/// Bits of an entry of /proc/self/pagemap: the page is present, or swapped out.
const PRESENT_OR_SWAPPED: u64 = 3 << 62;

/// Iterator over pages in use, from the lowest address on: pieces of consecutive pages, `(address, length)`.
pub struct Populated<'a> {
    ram: &'a GuestRam,
    pagemap: Option<&'a File>,
    /// Addresses that are not examined yet.
    left: Range<u64>,
    /// Pieces found in the last window, the lowest at the end.
    found: Vec<(u64, u64)>,
}

/// `/proc/self/pagemap`, which shows the pages that this process uses; `None` if it cannot be opened.
static PAGE_MAP: OnceLock<Option<File>> = OnceLock::new();

/// Opens the map of this process's pages. A later attempt to open it may be refused.
pub fn open_page_map() {
    PAGE_MAP.get_or_init(|| File::open("/proc/self/pagemap").ok());
}

impl GuestRam {
    /// RAM and the memory plugged later: everything that the guest may use as general memory.
    pub fn all_ram(&self) -> impl Iterator<Item = RamRegion> + '_ {
        self.regions().zip(0..).filter(|(_, index)| !self.area(*index).is_some_and(Area::is_file)).map(|(r, _)| r)
    }

    /// Returns the pages that have been used in a region of [`GuestRam::all_ram`], or all of them if that cannot be
    /// known.
    pub fn populated(&self, region: RamRegion) -> Populated<'_> {
        open_page_map();
        let pagemap = PAGE_MAP.get().and_then(Option::as_ref);
        Populated { ram: self, pagemap, left: region.start..region.end(), found: Vec::new() }
    }
}

impl Iterator for Populated<'_> {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        while self.found.is_empty() && !self.left.is_empty() {
            let window = self.left.start..self.left.end.min(self.left.start.saturating_add(WINDOW));
            self.left.start = window.end;
            self.found = self.look(window.clone()).unwrap_or_else(|| vec![(window.start, window.end - window.start)]);
            self.found.reverse();
        }
        self.found.pop()
    }
}

impl Populated<'_> {
    fn look(&self, window: Range<u64>) -> Option<Vec<(u64, u64)>> {
        let region = self.ram.0.memory.find_region(GuestAddress(window.start))?;
        let offset = window.start - region.start_addr().0;
        let config = &self.ram.0.config;
        match region.file_offset() {
            // Other processes may have written pages that this one never touched. (A file of huge pages does not report
            // holes.)
            Some(file) if config.shared && config.hugepages != HugePages::TwoMib => {
                let start = file.start() + offset;
                data_of(file.file(), start..start + (window.end - window.start), window.start)
            }
            _ => self.used_by_us(region.as_ptr() as u64 + offset, window),
        }
    }

    fn used_by_us(&self, host_addr: u64, window: Range<u64>) -> Option<Vec<(u64, u64)>> {
        let pages = (window.end - window.start) / PAGE_SIZE;
        let mut entries = vec![0u8; usize::try_from(pages).ok()? * 8];
        self.pagemap.as_ref()?.read_exact_at(&mut entries, host_addr / PAGE_SIZE * 8).ok()?;
        let (entries, _) = entries.as_chunks_mut();
        // Untouched pages of a mapped file do not read as zeros, so they count as used.
        for image in self.ram.0.images.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let page = |addr: u64| ((addr.clamp(window.start, window.end) - window.start) / PAGE_SIZE) as usize;
            entries[page(image.start)..page(image.end)].fill(u64::MAX.to_ne_bytes());
        }
        let mut found = Vec::new();
        for (entry, addr) in entries.iter().zip((window.start..).step_by(PAGE_SIZE as usize)) {
            if u64::from_ne_bytes(*entry) & PRESENT_OR_SWAPPED != 0 {
                extend(&mut found, addr, PAGE_SIZE);
            }
        }
        Some(found)
    }
}

/// Appends a piece, merging it with the last one if the two are adjacent.
fn extend(pieces: &mut Vec<(u64, u64)>, addr: u64, len: u64) {
    match pieces.last_mut() {
        Some((last, last_len)) if *last + *last_len == addr => *last_len += len,
        _ => pieces.push((addr, len)),
    }
}

/// Returns the pieces of a file within `within` that are not holes, at addresses that count from `addr`.
fn data_of(file: &File, within: Range<u64>, addr: u64) -> Option<Vec<(u64, u64)>> {
    let mut found = Vec::new();
    let mut at = within.start;
    while at < within.end {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Err(rustix::io::Errno::NXIO) => break,
            result => result.ok()?.max(at),
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(start)).ok()?.min(within.end);
        if start < end {
            found.push((addr + (start - within.start), end - start));
        }
        at = end.max(start);
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn found(ram: &GuestRam) -> Vec<(u64, u64)> {
        ram.all_ram().flat_map(|region| ram.populated(region)).collect()
    }

    #[test]
    fn only_used_pages_are_found() {
        for backing in ["80M,hugepages=off", "80M,hugepages=off,shared"] {
            let ram = GuestRam::new(&backing.parse().unwrap()).unwrap();
            assert!(found(&ram).is_empty(), "{backing}");
            ram.write(0x5FFF, &[1, 1]).unwrap();
            ram.write((64 << 20) - 1, &[1, 1]).unwrap();
            let wanted = [(0x5000, 0x2000), ((64 << 20) - 4096, 4096), (64 << 20, 4096)];
            assert_eq!(found(&ram), wanted, "{backing}");
            ram.release(0x5000, 0x1000).unwrap();
            assert_eq!(found(&ram)[0], (0x6000, 0x1000), "{backing}");
        }
    }

    #[test]
    fn a_mapped_image_is_in_use() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 8192]).unwrap();
        let ram = GuestRam::new(&"16M,hugepages=off".parse().unwrap()).unwrap();
        ram.map_file(0x10000, 8192, &file, 0).unwrap();
        assert_eq!(found(&ram), [(0x10000, 8192)]);
    }
}
