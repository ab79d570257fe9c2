//! Memory of devices that are memory themselves: its place in the guest, and its backing.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::mapping::{Mapped, Mapping};
use super::{GuestRam, HugePages, MemoryConfig, ram_file, ram_flags};
use crate::layout;

/// Guest memory that belongs to a device.
#[derive(Clone, Debug)]
pub struct Area {
    /// Guest-physical address; a multiple of [`layout::DEVICE_MEMORY_ALIGN`], above all RAM.
    pub start: u64,
    /// Length in bytes; a multiple of 2 MiB.
    pub len: u64,
    /// Backing of the area's memory.
    pub backing: Backing,
}

/// Backing of an [`Area`].
#[derive(Clone, Debug)]
pub enum Backing {
    /// A file from its beginning on. Past the end of the file are zeros; writes there are kept until the VM ends.
    File {
        /// The file, open for reading; also for writing if the guest's writes go to it.
        file: Arc<File>,
        /// Path of the file, for messages.
        path: PathBuf,
        /// Number of bytes of the file that are mapped; at most the area's length.
        len: u64,
        /// Effect of the guest's writes.
        access: Access,
    },
    /// Memory like RAM, which the device plugs and unplugs in pieces; no piece is in use at first.
    Pluggable,
}

/// Effect of writes to a file in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Writes change the file.
    Shared,
    /// Writes are kept until the VM ends; the file does not change.
    Private,
    /// The guest's vCPUs cannot write. If the guest makes a device write there, the device changes a copy of the page,
    /// as with [`Access::Private`]: no request of a guest may cause a fault in this process.
    ReadOnly,
}

impl Area {
    /// First address past the end of the area.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.len)
    }

    /// Returns true if the guest's vCPUs must not write the area.
    #[inline]
    pub(super) fn is_readonly(&self) -> bool {
        matches!(self.backing, Backing::File { access: Access::ReadOnly, .. })
    }

    pub(super) fn is_file(&self) -> bool {
        matches!(self.backing, Backing::File { .. })
    }

    pub(super) fn truncated_file(&self) -> Option<&Path> {
        let Backing::File { file, path, len, .. } = &self.backing else { return None };
        // Seeking also finds the size of a block device.
        let now = (&**file).seek(SeekFrom::End(0)).unwrap_or(u64::MAX);
        (now < *len).then_some(path)
    }

    /// Maps the area; `config` determines how pluggable memory is backed.
    pub(super) fn map(&self, config: &MemoryConfig) -> io::Result<Mapped> {
        let (file, len, access) = match &self.backing {
            Backing::Pluggable => return self.map_pluggable(config),
            Backing::File { file, len, access, .. } => (&**file, *len, *access),
        };
        let flags = if access == Access::Shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE | libc::MAP_NORESERVE };
        let whole = len == self.len;
        let mapping = if whole {
            Mapping::new(len, Some((file, 0)), flags)?
        } else {
            let mapping = Mapping::new(self.len, None, libc::MAP_PRIVATE | libc::MAP_NORESERVE)?;
            mapping.replace(0..len.next_multiple_of(layout::PAGE_SIZE).min(self.len), Some((file, 0)), flags)?;
            mapping
        };
        // Other processes that must see this memory can only map the file.
        let seen = (whole && access == Access::Shared).then_some((file, 0));
        Ok((mapping.region(self.start, seen, false)?, mapping))
    }

    /// Maps the area lazily even if RAM is not: unplugged memory takes nothing, not even from the hugetlb pool.
    fn map_pluggable(&self, config: &MemoryConfig) -> io::Result<Mapped> {
        let file = ram_file(self.len, config)?;
        let file = file.as_ref().map(|file| (file, 0));
        let mapping = Mapping::new(self.len, file, ram_flags(config) | libc::MAP_NORESERVE)?;
        let _ = mapping.advise_pages(0..self.len, config.hugepages);
        Ok((mapping.region(self.start, file, config.hugepages == HugePages::TwoMib)?, mapping))
    }
}

impl GuestRam {
    /// Makes sure that the host has the memory that the guest is about to get, unless pages are allocated on first
    /// touch: this concerns huge pages from the pool, and `prefault`. `len` bytes at `addr` must lie in one
    /// [`Backing::Pluggable`] area; otherwise nothing is done.
    pub fn provide(&self, addr: u64, len: u64) -> io::Result<()> {
        let config = &self.0.config;
        if config.hugepages != HugePages::TwoMib && !config.prefault {
            return Ok(());
        }
        for ((region, mapping), index) in self.regions().zip(&self.0.mappings).zip(0..) {
            if self.area(index).is_some_and(|area| !area.is_file()) && region.start <= addr && addr < region.end() {
                let from = addr - region.start;
                return mapping.populate(from..from.saturating_add(len));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::Size;
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    const START: u64 = layout::MMIO_HOLE_END;
    const LEN: u64 = 2 << 20;

    fn file(len: usize) -> Arc<File> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; len]).unwrap();
        Arc::new(file)
    }

    fn with(backing: Backing, config: &str) -> GuestRam {
        GuestRam::with_areas(&config.parse().unwrap(), vec![Area { start: START, len: LEN, backing }]).unwrap()
    }

    fn mapped(file: &Arc<File>, access: Access) -> GuestRam {
        let len = file.metadata().unwrap().len();
        with(Backing::File { file: file.clone(), path: "f".into(), len, access }, "16M")
    }

    #[test]
    fn areas_are_memory_but_no_ram() {
        let ram = mapped(&file(LEN as usize), Access::ReadOnly);
        assert_eq!(ram.size(), 16 << 20);
        assert_eq!(ram.boot_regions().count(), 1);
        let regions: Vec<_> = ram.regions().collect();
        assert_eq!((regions.len(), regions[1].start, regions[1].len), (2, START, LEN));
        assert!(!regions[0].readonly && regions[1].readonly);
        assert!(ram.contains(START, LEN) && !ram.contains(START, LEN + 1) && !ram.contains(START - 1, 2));
        assert!(ram.can_map_files());
        assert!(ram.map_file(START, 4096, &file(4096), 0).is_err(), "kernel images go into RAM");
    }

    #[test]
    fn writes_reach_the_file_or_stay() {
        for (access, kept) in [(Access::Shared, 9), (Access::Private, 7), (Access::ReadOnly, 7)] {
            let file = file(LEN as usize);
            let ram = mapped(&file, access);
            ram.write(START + 5000, &[9]).unwrap();
            assert_eq!(ram.read_obj::<[u8; 3]>(START + 4999).unwrap(), [7, 9, 7]);
            let mut back = [0];
            file.read_exact_at(&mut back, 5000).unwrap();
            assert_eq!(back, [kept], "{access:?}");
        }
    }

    #[test]
    fn behind_the_end_of_a_file_are_zeros() {
        let ram = mapped(&file(5000), Access::Private);
        assert_eq!(ram.read_obj::<[u8; 4]>(START + 4998).unwrap(), [7, 7, 0, 0]);
        ram.write(START + LEN - 1, &[1]).unwrap();
        assert_eq!(ram.read_obj::<u8>(START + LEN - 1).unwrap(), 1);
        assert_eq!(ram.truncated_file(), None);
    }

    #[test]
    fn nobody_takes_pages_of_a_file_away() {
        let file = file(LEN as usize);
        for access in [Access::Shared, Access::Private] {
            let ram = mapped(&file, access);
            ram.write(START, &[9]).unwrap();
            assert_eq!(ram.release(START, LEN).unwrap(), 0);
            assert_eq!(ram.read_obj::<[u8; 2]>(START).unwrap(), [9, 7]);
        }
    }

    #[test]
    fn a_file_that_was_cut_off_is_found() {
        let file = file(LEN as usize);
        let ram = mapped(&file, Access::Shared);
        assert_eq!(ram.truncated_file(), None);
        file.set_len(4096).unwrap();
        assert_eq!(ram.truncated_file(), Some(Path::new("f")));
    }

    #[test]
    fn pluggable_memory_is_given_back() {
        for config in ["16M", "16M,shared", "16M,prefault"] {
            let ram = with(Backing::Pluggable, config);
            ram.provide(START, LEN).unwrap();
            ram.write(START, &vec![1; LEN as usize]).unwrap();
            assert_eq!(ram.release(START, LEN).unwrap(), LEN);
            assert_eq!(ram.read_obj::<u8>(START).unwrap(), 0);
            assert!(config != "16M,prefault" || ram.provide(START, LEN + 1).is_err());
            assert!(ram.provide(0, 1 << 20).is_ok(), "RAM is there already");
        }
        let lazily = MemoryConfig { size: Size::mib(16), ..MemoryConfig::default() };
        let area = Area { start: START, len: 1 << 42, backing: Backing::Pluggable };
        assert!(GuestRam::with_areas(&lazily, vec![area]).is_ok(), "it is only reserved");
    }
}
