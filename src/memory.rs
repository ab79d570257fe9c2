//! Guest RAM: how the host backs it, and the only interface through which vireo reads and writes it.
//!
//! RAM is reserved lazily (`MAP_NORESERVE`) and split around the 32-bit MMIO hole. Every access is checked against the
//! regions and is volatile: no Rust reference into guest memory exists anywhere, because the guest may change it at any
//! time. An address from the guest is a plain `u64`; for any value, the result is `Ok` or [`OutOfRam`].
//!
//! Above all RAM lie the [`Area`]s of devices that are memory themselves: files (pmem) and memory that is plugged and
//! unplugged (virtio-mem). The guest and the devices access areas like RAM, but no firmware table lists them.
//!
//! Dirty pages: KVM's log records the guest's writes; the bitmap here (when a region has one) records vireo's.

mod area;
mod mapping;
pub mod page_table;
mod pages;
pub mod populated;
mod prefault;
mod release;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::SealFlags;
use serde::{Deserialize, Serialize};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::layout;
use crate::options::{self, Size};
pub use area::{Access, Area, Backing};
use mapping::Mapping;
pub use pages::Pages;
pub use populated::Populated;

/// Bitmap of the pages that vireo itself wrote; absent unless it is requested.
pub type Dirty = Option<AtomicBitmap>;

/// A bounds-checked, volatile view of a piece of guest RAM.
pub type RamSlice<'a> = vm_memory::VolatileSlice<'a, <Dirty as vm_memory::bitmap::WithBitmapSlice<'a>>::S>;

/// `--memory`: the amount of the guest's RAM and how the host backs it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MemoryConfig {
    /// Bytes of RAM; a multiple of 4 KiB, at least 16 MiB.
    pub size: Size,
    /// Kind of host pages that back the RAM.
    pub hugepages: HugePages,
    /// Maps RAM shared, so that another process (a device backend) can map it too. A vhost-user device implies this.
    pub shared: bool,
    /// Touches every page before the guest starts.
    pub prefault: bool,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        MemoryConfig { size: Size::mib(256), hugepages: HugePages::Thp, shared: false, prefault: false }
    }
}

impl std::str::FromStr for MemoryConfig {
    type Err = options::Error;

    fn from_str(text: &str) -> Result<Self, options::Error> {
        options::from_str(text, Some("size"))
    }
}

/// Kind of host pages behind guest RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HugePages {
    /// Ordinary pages that the kernel may merge into transparent huge pages.
    #[default]
    #[serde(rename = "thp")]
    Thp,
    /// Ordinary 4 KiB pages only.
    #[serde(rename = "off")]
    Off,
    /// 2 MiB pages from the host's hugetlb pool.
    #[serde(rename = "2M")]
    TwoMib,
}

/// Failures while RAM is set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `mmap` or `memfd_create` refused.
    #[error("cannot reserve {size} of guest memory{hint}")]
    Reserve {
        /// Amount of memory requested.
        size: Size,
        /// Advice for the user, beginning with a space; may be empty.
        hint: &'static str,
        /// The OS error.
        source: io::Error,
    },
    /// A file could not be mapped into RAM.
    #[error("cannot map a file into guest memory")]
    MapFile(#[source] io::Error),
    /// A device's memory could not be mapped.
    #[error("cannot map {} into the guest's memory", .0.display())]
    MapArea(PathBuf, #[source] io::Error),
}

/// An access outside of RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("guest memory {addr:#x}..+{len:#x} is not all RAM")]
pub struct OutOfRam {
    /// First byte of the access.
    pub addr: u64,
    /// Length of the access in bytes.
    pub len: u64,
}

/// One contiguous piece of RAM, as it is registered with KVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRegion {
    /// Guest-physical start address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// Address of the mapping in this process.
    pub host_addr: u64,
    /// True if the guest's vCPUs must not write the region.
    pub readonly: bool,
}

impl RamRegion {
    /// First address past the end of the region.
    pub fn end(&self) -> u64 {
        self.start + self.len
    }
}

/// A region with the file behind it, which other processes can map to share the region.
#[derive(Clone, Copy, Debug)]
pub struct SharedRegion<'a> {
    /// The region.
    pub region: RamRegion,
    /// File that holds the region's pages.
    pub file: BorrowedFd<'a>,
    /// Offset in the file at which the region begins.
    pub offset: u64,
}

/// The guest's RAM. Cloning shares it.
#[derive(Clone, Debug)]
pub struct GuestRam(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    memory: GuestMemoryMmap<Dirty>,
    // Declared after `memory`, which points into the mappings: fields are dropped in order.
    /// One mapping per region: those of RAM, then those of `areas`.
    mappings: Vec<Mapping>,
    areas: Vec<Area>,
    config: MemoryConfig,
    /// Guest address ranges that [`GuestRam::map_file`] replaced by a file.
    images: Mutex<Vec<Range<u64>>>,
}

/// `(start, length)` of each RAM region of a machine with `size` bytes: at most one below the MMIO hole and one above.
pub fn split(size: u64) -> Vec<(u64, u64)> {
    let low = size.min(layout::MMIO_HOLE);
    let mut regions = vec![(0, low)];
    if size > low {
        regions.push((layout::MMIO_HOLE_END, size - low));
    }
    regions
}

/// `mmap` flags for RAM and for device memory that is backed like RAM.
fn ram_flags(config: &MemoryConfig) -> i32 {
    let shared = if config.shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
    // The hugetlb pool is a hard limit: reserve its pages now rather than die of SIGBUS later.
    shared | if config.hugepages == HugePages::TwoMib { 0 } else { libc::MAP_NORESERVE }
}

/// Creates the file behind RAM of `size` bytes, if the configuration needs one.
fn ram_file(size: u64, config: &MemoryConfig) -> io::Result<Option<File>> {
    Ok(match (config.hugepages, config.shared) {
        (HugePages::TwoMib, _) => Some(memfd(size, libc::MFD_HUGETLB | libc::MFD_HUGE_2MB)?),
        (_, true) => Some(memfd(size, 0)?),
        _ => None,
    })
}

/// Maps RAM and returns each region with its mapping.
fn reserve(config: &MemoryConfig) -> io::Result<Vec<mapping::Mapped>> {
    let file = ram_file(config.size.0, config)?;
    let mut offset = 0;
    let map = |(start, len)| {
        let file = file.as_ref().map(|f| (f, offset));
        offset += len;
        let mapping = Mapping::new(len, file, ram_flags(config))?;
        advise(&mapping, config)?;
        Ok((mapping.region(start, file, config.hugepages == HugePages::TwoMib)?, mapping))
    };
    split(config.size.0).into_iter().map(map).collect()
}

impl GuestRam {
    /// Reserves RAM as configured. [`crate::config`] has validated the sizes; only the host can refuse here.
    pub fn new(config: &MemoryConfig) -> Result<Self, Error> {
        Self::with_areas(config, Vec::new())
    }

    /// Like [`GuestRam::new`], with the memory areas of devices, which must be in address order and above all RAM.
    pub fn with_areas(config: &MemoryConfig, areas: Vec<Area>) -> Result<Self, Error> {
        let refused = |size| {
            move |source| Error::Reserve {
                size,
                hint: match config.hugepages {
                    HugePages::TwoMib => " in 2 MiB pages (does /proc/sys/vm/nr_hugepages provide enough of them?)",
                    _ => " (an address space limit, see ulimit -v, or vm.overcommit_memory=2?)",
                },
                source,
            }
        };
        let mut mapped = reserve(config).map_err(refused(config.size))?;
        for area in &areas {
            mapped.push(match &area.backing {
                Backing::File { path, .. } => area.map(config).map_err(|e| Error::MapArea(path.clone(), e)),
                Backing::Pluggable => area.map(config).map_err(refused(Size(area.len))),
            }?);
        }
        let (regions, mappings) = mapped.into_iter().unzip::<_, _, Vec<_>, _>();
        let memory = GuestMemoryMmap::from_regions(regions).map_err(io::Error::other).map_err(refused(config.size))?;
        let config = config.clone();
        Ok(GuestRam(Arc::new(Inner { memory, mappings, areas, config, images: Mutex::default() })))
    }

    /// Creates `size` bytes of ordinary RAM from address 0, for tests and benches.
    pub fn anonymous(size: u64) -> Self {
        let config = MemoryConfig { size: Size(size), ..MemoryConfig::default() };
        Self::new(&config).expect("anonymous memory")
    }

    /// Total bytes of RAM, without the areas of devices.
    pub fn size(&self) -> u64 {
        self.boot_regions().map(|r| r.len).sum()
    }

    /// All memory of the guest in address order: RAM, followed by the areas of devices.
    #[inline]
    pub fn regions(&self) -> impl Iterator<Item = RamRegion> + '_ {
        self.0.memory.iter().zip(0..).map(|(r, index)| RamRegion {
            start: r.start_addr().0,
            len: r.len(),
            host_addr: r.as_ptr() as u64,
            readonly: self.area(index).is_some_and(Area::is_readonly),
        })
    }

    /// RAM without the areas of devices: the memory that the firmware tables describe to the guest at boot.
    pub fn boot_regions(&self) -> impl Iterator<Item = RamRegion> + '_ {
        self.regions().take(self.0.mappings.len() - self.0.areas.len())
    }

    /// Returns the device area that is region `index`, if that region is not RAM.
    #[inline]
    fn area(&self, index: usize) -> Option<&Area> {
        let boot = self.0.mappings.len() - self.0.areas.len();
        self.0.areas.get(index.checked_sub(boot)?)
    }

    /// Returns the file of an area if the file has become shorter than its mapping. Anything that touches the missing
    /// part gets SIGBUS, and KVM_RUN fails with EFAULT.
    pub fn truncated_file(&self) -> Option<&Path> {
        self.0.areas.iter().find_map(Area::truncated_file)
    }

    /// Regions that other processes can map; `None` unless RAM is [`MemoryConfig::shared`]. Device areas that another
    /// process cannot see as the guest does (a file that is mapped read-only, say) are left out.
    pub fn shared_regions(&self) -> Option<Vec<SharedRegion<'_>>> {
        let regions = self.regions().zip(self.0.memory.iter()).filter_map(|(region, mapped)| {
            mapped.file_offset().map(|file| SharedRegion { region, file: file.file().as_fd(), offset: file.start() })
        });
        self.0.config.shared.then(|| regions.collect())
    }

    /// Returns true if all `len` bytes at `addr` are RAM, in one region.
    pub fn contains(&self, addr: u64, len: u64) -> bool {
        self.slice(addr, len).is_ok()
    }

    /// A view of `len` bytes at `addr`, which must lie in one region.
    pub fn slice(&self, addr: u64, len: u64) -> Result<RamSlice<'_>, OutOfRam> {
        let size = usize::try_from(len).map_err(|_| OutOfRam { addr, len })?;
        let region = self.0.memory.find_region(GuestAddress(addr)).ok_or(OutOfRam { addr, len })?;
        let offset = vm_memory::MemoryRegionAddress(addr - region.start_addr().0);
        region.get_slice(offset, size).map_err(|_| OutOfRam { addr, len })
    }

    /// Fills `data` from the memory at `addr`.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> Result<(), OutOfRam> {
        let slice = self.slice(addr, data.len() as u64)?;
        slice.copy_to(data);
        Ok(())
    }

    /// Writes `data` at `addr`.
    pub fn write(&self, addr: u64, data: &[u8]) -> Result<(), OutOfRam> {
        let slice = self.slice(addr, data.len() as u64)?;
        slice.copy_from(data);
        Ok(())
    }

    /// Reads a plain value at `addr`.
    pub fn read_obj<T: ByteValued>(&self, addr: u64) -> Result<T, OutOfRam> {
        let out_of_ram = OutOfRam { addr, len: size_of::<T>() as u64 };
        self.slice(addr, out_of_ram.len)?.read_obj(0).map_err(|_| out_of_ram)
    }

    /// Writes a plain value at `addr`.
    pub fn write_obj<T: ByteValued>(&self, addr: u64, value: T) -> Result<(), OutOfRam> {
        let out_of_ram = OutOfRam { addr, len: size_of::<T>() as u64 };
        self.slice(addr, out_of_ram.len)?.write_obj(value, 0).map_err(|_| out_of_ram)
    }

    /// Loads an aligned little-endian `u16`, the format of virtqueue indices.
    pub fn load_u16(&self, addr: u64, order: Ordering) -> Result<u16, OutOfRam> {
        let out_of_ram = OutOfRam { addr, len: 2 };
        let value: u16 = self.slice(addr, 2)?.load(0, order).map_err(|_| out_of_ram)?;
        Ok(u16::from_le(value))
    }

    /// Stores an aligned little-endian `u16`, the format of virtqueue indices.
    pub fn store_u16(&self, addr: u64, value: u16, order: Ordering) -> Result<(), OutOfRam> {
        let slice = self.slice(addr, 2)?;
        slice.store(value.to_le(), 0, order).map_err(|_| OutOfRam { addr, len: 2 })
    }

    /// Returns true if [`GuestRam::map_file`] works with this RAM's backing. It does not when RAM is shared with other
    /// processes or consists of huge pages.
    pub fn can_map_files(&self) -> bool {
        !self.0.config.shared && self.0.config.hugepages != HugePages::TwoMib
    }

    /// Replaces `len` bytes of RAM at `addr` by a private copy-on-write mapping of `file` from `offset` on. All three
    /// numbers must be multiples of the page size. The file must never shrink while the guest runs, as that would cause
    /// SIGBUS: map only files that are written once and later unlinked, never truncated.
    pub fn map_file(&self, addr: u64, len: u64, file: &File, offset: u64) -> Result<(), Error> {
        let fail = |text: &str| Error::MapFile(io::Error::new(io::ErrorKind::InvalidInput, text.to_string()));
        if !(addr | len | offset).is_multiple_of(layout::PAGE_SIZE) {
            return Err(fail("not a multiple of the page size"));
        }
        let end = addr.checked_add(len);
        let inside = |region: &RamRegion| region.start <= addr && end.is_some_and(|end| end <= region.end());
        let found = self.boot_regions().zip(&self.0.mappings).find(|(region, _)| inside(region));
        let (region, mapping) = found.ok_or_else(|| fail(&OutOfRam { addr, len }.to_string()))?;
        let mut images = self.0.images.lock().unwrap_or_else(PoisonError::into_inner);
        let piece = addr - region.start..addr - region.start + len;
        mapping.replace(piece, Some((file, offset)), libc::MAP_PRIVATE).map_err(Error::MapFile)?;
        images.push(addr..addr + len);
        Ok(())
    }

    /// The vm-memory object, for crates that take one.
    pub fn inner(&self) -> &GuestMemoryMmap<Dirty> {
        &self.0.memory
    }
}

/// Returns freed heap memory to the host. By default the allocator keeps the memory of large temporary buffers.
#[allow(unsafe_code)]
pub fn trim_heap() {
    // SAFETY: malloc_trim has no preconditions; it releases only memory that is free.
    unsafe { libc::malloc_trim(0) };
}

#[allow(unsafe_code)]
fn memfd(size: u64, flags: libc::c_uint) -> io::Result<File> {
    // SAFETY: the name is a NUL-terminated constant; the result is checked before it is owned.
    let file = unsafe {
        let fd = libc::memfd_create(c"vireo-ram".as_ptr(), flags | libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        File::from_raw_fd(fd)
    };
    file.set_len(size)?;
    // A process that shares this file must not truncate it: that would be SIGBUS for all of us.
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&file, seals)?;
    Ok(file)
}

/// Requests the configured kind of pages from the kernel and, with `prefault`, touches them all.
fn advise(mapping: &Mapping, config: &MemoryConfig) -> io::Result<()> {
    let all = 0..mapping.len();
    let _ = mapping.advise_pages(all.clone(), config.hugepages);
    if config.prefault { mapping.populate(all) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn splits_around_the_hole() {
        assert_eq!(split(16 << 20), [(0, 16 << 20)]);
        assert_eq!(split(3 << 30), [(0, 3 << 30)]);
        assert_eq!(split(5 << 30), [(0, 3 << 30), (4 << 30, 2 << 30)]);
    }

    #[test]
    fn every_access_outside_is_refused() {
        let ram = GuestRam::anonymous(1 << 20);
        let end = 1 << 20;
        assert!(ram.contains(0, end));
        for (addr, len) in [(end, 1), (end - 1, 2), (u64::MAX, 1), (u64::MAX, u64::MAX), (0, end + 1), (0, u64::MAX)] {
            assert_eq!(ram.slice(addr, len).err(), Some(OutOfRam { addr, len }));
        }
        assert!(ram.read_obj::<u64>(end - 7).is_err());
        assert!(ram.write_obj(u64::MAX - 3, 0u64).is_err());
        assert!(ram.load_u16(3, Ordering::Acquire).is_err(), "unaligned");
    }

    #[test]
    fn shared_and_plain_ram_hold_what_is_written() {
        for shared in [false, true] {
            let config = MemoryConfig { size: Size(1 << 20), shared, prefault: true, ..Default::default() };
            let ram = GuestRam::new(&config).unwrap();
            ram.write(4096, b"vireo").unwrap();
            ram.store_u16(8, 0x1234, Ordering::Release).unwrap();
            assert_eq!(ram.read_obj::<[u8; 5]>(4096).unwrap(), *b"vireo");
            assert_eq!(ram.read_obj::<[u8; 2]>(8).unwrap(), [0x34, 0x12]);
        }
    }

    #[test]
    fn a_mapped_file_is_copied_on_write() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 8192]).unwrap();
        let ram = GuestRam::anonymous(1 << 20);
        ram.map_file(0x10000, 4096, &file, 4096).unwrap();
        ram.write(0x10001, &[8]).unwrap();
        assert_eq!(ram.read_obj::<[u8; 3]>(0x10000).unwrap(), [7, 8, 7]);
        assert_eq!(ram.read_obj::<u8>(0x11000).unwrap(), 0);
        assert!(ram.map_file((1 << 20) - 4096, 8192, &file, 0).is_err());
        assert!(ram.map_file(1, 4096, &file, 0).is_err());
        let mut back = [0; 8192];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut back, 0).unwrap();
        assert_eq!(back, [7; 8192]);
    }

    #[test]
    fn memory_options() {
        let config: MemoryConfig = "1G,hugepages=2M,shared=on,prefault".parse().unwrap();
        assert_eq!(
            config,
            MemoryConfig { size: Size::mib(1024), hugepages: HugePages::TwoMib, shared: true, prefault: true }
        );
        assert_eq!("512M".parse::<MemoryConfig>().unwrap().size, Size::mib(512));
        let error = "1G,hugepages=4M".parse::<MemoryConfig>().unwrap_err().to_string();
        assert_eq!(error, "hugepages: unknown value '4M'; valid values are thp, off, 2M");
    }
}
