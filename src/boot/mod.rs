//! Boot: everything from a kernel file to a machine that is about to execute its first instruction.
//!
//! [`BootFiles::open`] checks all files that the user named, before a machine exists. [`BootFiles::load`] then fills
//! the machine's memory, step by step. `open` unpacks a compressed kernel once, into pages that `load` moves to the
//! guest and relocates there. The kernel is added to the [`cache`] for later boots only after the guest has started
//! ([`keep`]).

pub mod acpi;
mod bzimage;
pub mod cache;
mod elf;
pub mod error;
pub mod image;
pub mod initramfs;
mod initrd;
mod interrupt_stub;
pub mod kaslr;
pub mod keep;
pub mod kernel;
mod kernel_file;
pub mod modules;
pub mod mptable;
pub mod pack;
mod multiboot;
mod place;
mod pvh;
pub mod regs;
pub mod reset_stub;
pub mod smbios;
mod source;
pub mod table;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod unpack;
mod zero_page;

use std::fmt;
use std::path::PathBuf;

use serde::de::value::SeqAccessDeserializer;
use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

pub use self::error::{Error, Problem};
pub use self::regs::{Entry, Protocol};

use self::cache::Cache;
use self::image::Image;
use self::initramfs::Piece;
use self::keep::Unkept;
use self::pack::InitramfsConfig;
use self::place::Plan;
use self::zero_page::ZeroPage;
use crate::layout;
use crate::memory::{self, GuestRam};

/// Longest command line, without its NUL, of a kernel that does not report its limit (`COMMAND_LINE_SIZE` of x86 Linux
/// is 2048).
const CMDLINE_DEFAULT: u64 = 2047;

/// Boot files and parameters that the user asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootConfig {
    /// The kernel image; its format is detected from its content.
    pub kernel: PathBuf,
    /// Initial RAM disks, concatenated in order; a configuration file may give a single path instead of a list.
    #[serde(default, deserialize_with = "one_or_several", skip_serializing_if = "Vec::is_empty")]
    pub initrd: Vec<PathBuf>,
    /// Initramfs that is packed and appended to the initrds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<InitramfsConfig>,
    /// Kernel command line, passed as it is.
    #[serde(default)]
    pub cmdline: String,
    /// Parameter that is put in front of the command line if the kernel is Linux.
    #[serde(skip)]
    pub linux_parameter: Option<String>,
    /// Entry point to use.
    #[serde(default)]
    pub boot: BootMode,
}

/// Deserializes a path or a list of paths.
fn one_or_several<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<PathBuf>, D::Error> {
    struct Paths;

    impl<'de> Visitor<'de> for Paths {
        type Value = Vec<PathBuf>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a path or a list of paths")
        }

        fn visit_str<E>(self, path: &str) -> Result<Self::Value, E> {
            Ok(vec![path.into()])
        }

        fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Self::Value, A::Error> {
            Vec::deserialize(SeqAccessDeserializer::new(list))
        }
    }

    deserializer.deserialize_any(Paths)
}

/// `--boot`: the way a kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BootMode {
    /// Unpacks what can be unpacked; then uses the 64-bit entry for Linux, and PVH or multiboot for other kernels.
    #[default]
    Auto,
    /// The bzImage as it is: the guest runs its own decompressor.
    BzImage,
    /// The 64-bit entry of the (unpacked) ELF file.
    Direct,
    /// The PVH entry of the (unpacked) ELF file.
    Pvh,
    /// The entry that the file's multiboot header describes.
    Multiboot,
}

impl BootMode {
    /// Returns whether a kernel entered this way may come from the cache, which holds kernels unpacked, as ELF files.
    fn is_cached(self) -> bool {
        !matches!(self, BootMode::BzImage | BootMode::Multiboot)
    }
}

/// The machine as the firmware tables describe it to the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    /// Number of vCPUs; vCPU `n` has APIC id `n`.
    pub cpus: u32,
    /// True for ACPI tables, false for an MP table.
    pub acpi: bool,
    /// SMBIOS system UUID.
    pub uuid: [u8; 16],
    /// Virtio slots that hold a device ([`crate::layout::VIRTIO_MMIO`]).
    pub virtio_slots: Vec<u32>,
    /// True if the machine has a serial port.
    pub serial: bool,
    /// True if the tables announce the PM timer and the real-time clock, for a guest that does not use kvmclock.
    pub clocks: bool,
}

/// All files that the user named, open and checked.
#[derive(Debug)]
pub struct BootFiles {
    config: BootConfig,
    image: Image,
    cached: bool,
    unkept: Option<Unkept>,
    entry: Entry,
    initrd: Vec<Piece>,
    plan: Plan,
}

/// A range of guest-physical memory and its kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRange {
    /// First address.
    pub start: u64,
    /// First address past the end.
    pub end: u64,
    /// 1 for RAM, 2 for reserved, as in e820 and in PVH's memory map.
    pub kind: u32,
}

/// Location of the initrd in guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Initrd {
    /// Guest-physical address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Description of the kernel that is about to boot, for logs and the report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Description {
    /// The file's format in words.
    pub format: String,
    /// The kernel's version as the kernel reports it.
    pub version: Option<String>,
    /// Protocol by which the kernel is entered.
    pub protocol: Protocol,
    /// Guest-physical entry address.
    pub entry: u64,
    /// True if vireo randomised the kernel's addresses.
    pub kaslr: bool,
    /// True if the kernel comes from the cache of unpacked kernels.
    pub cached: bool,
}

impl BootFiles {
    /// Opens and checks the kernel, the initrd and the command line for a machine with `ram_size` bytes of RAM.
    pub fn open(config: &BootConfig, ram_size: u64) -> Result<BootFiles, Error> {
        let cache = if config.boot.is_cached() { Cache::of_user() } else { None };
        BootFiles::open_with(config, ram_size, cache.as_ref())
    }

    /// Opens and checks the boot files as [`BootFiles::open`] does, with a cache of the caller's choice.
    pub fn open_with(config: &BootConfig, ram_size: u64, cache: Option<&Cache>) -> Result<BootFiles, Error> {
        let of_kernel = |problem: Problem| problem.of_kernel(&config.kernel);
        let of_initrd = |problem: Problem| match &config.initrd[..] {
            [path] if config.initramfs.is_none() => problem.of_initrd(path),
            _ => Error::Initramfs(problem),
        };

        let Kernel { image, cached, unkept } = open_kernel(config, cache).map_err(of_kernel)?;
        let (entry, protocol) = kernel::entry(&image.info, config.boot).map_err(of_kernel)?;
        let mut config = config.clone();
        match (protocol, config.linux_parameter.take()) {
            (Protocol::Multiboot, _) => config.cmdline = multiboot::command_line(&config),
            (Protocol::Linux64, Some(first)) => {
                config.cmdline = format!("{first} {}", config.cmdline).trim_end().into()
            }
            _ => {}
        }
        place::check_cmdline(&image.info, &config.cmdline)?;
        let initrd = initrd::open(&config, &image)?;

        let mut space = place::Space::new(ram_size, &image).map_err(of_kernel)?;
        let initrd_place = match initrd.iter().map(Piece::len).fold(0, u64::saturating_add) {
            0 => None,
            len => Some(space.place_initrd(len).map_err(of_initrd)?),
        };
        let plan = space.place_kernel(&image, initrd_place, protocol, &config.cmdline)?;
        let info = match image.info.multiboot.filter(|_| protocol == Protocol::Multiboot) {
            Some(start) => start.info(),
            None => protocol.usual_info(),
        };
        let entry = Entry { address: entry - image.info.start + plan.kernel, protocol, info };
        Ok(BootFiles { config, image, cached, unkept, entry, initrd, plan })
    }

    /// Fills `ram`, which is fresh, with everything that the kernel needs to start, and returns the entry.
    pub fn load(self, ram: &GuestRam, platform: &Platform) -> Result<Entry, Error> {
        let BootFiles { config, mut image, entry, initrd, plan, .. } = self;
        let of_kernel = |problem: Problem| problem.of_kernel(&config.kernel);

        image.load(ram, plan.kernel).map_err(of_kernel)?;
        if let (Some(delta), Some(relocations)) = (plan.kaslr, &image.relocations) {
            relocations.apply(&ram.slice(plan.kernel, image.span())?, delta)?;
        }

        let mut at = plan.initrd.map_or(0, |initrd| initrd.start);
        for piece in initrd {
            piece.load(ram, at)?;
            at += piece.len(); // no overflow: the sum was checked when they were placed
        }
        let multiboot = image.info.multiboot.filter(|_| entry.protocol == Protocol::Multiboot);
        let cmdline = multiboot.map_or(layout::CMDLINE, |start| start.handed);
        ram.write(cmdline, config.cmdline.as_bytes())?;
        ram.write(cmdline + config.cmdline.len() as u64, &[0])?;

        let rsdp = if platform.acpi {
            Some(acpi::write(ram, platform)?)
        } else {
            mptable::write(ram, platform)?;
            None
        };
        smbios::write(ram, platform)?;
        reset_stub::write(ram)?;

        let memory = memory_map(ram);
        match entry.protocol {
            Protocol::Pvh => pvh::write(ram, plan.initrd, rsdp, &memory)?,
            Protocol::Multiboot => {
                interrupt_stub::write(ram)?;
                let module = plan.initrd.zip(config.initrd.first().map(PathBuf::as_path));
                multiboot::write(ram, cmdline, module, &memory)?;
            }
            Protocol::Linux64 => {
                let (setup, seed) = (image.info.setup.as_ref(), kaslr::random()?);
                let (kernel, kaslr) = (plan.kernel, plan.kaslr.is_some());
                ZeroPage { setup, kernel, kaslr, initrd: plan.initrd, rsdp, seed }.write(ram, &memory)?;
            }
        }
        entry.write_tables(ram)?;

        // Memory that unpacking took is no longer needed; vireo must not keep it while the guest runs.
        drop(image);
        memory::trim_heap();
        Ok(entry)
    }

    /// Takes the kernel that should be added to the cache when the guest runs, if there is one.
    pub fn take_unkept(&mut self) -> Option<Unkept> {
        self.unkept.take()
    }

    /// Describes the kernel that was found.
    pub fn describe(&self) -> Description {
        Description {
            format: self.image.info.format.clone(),
            version: self.image.info.version.clone(),
            protocol: self.entry.protocol,
            entry: self.entry.address,
            kaslr: self.plan.kaslr.is_some(),
            cached: self.cached,
        }
    }
}

/// An unpacked kernel.
struct Kernel {
    image: Image,
    /// True if it comes from the cache.
    cached: bool,
    /// Job that adds the kernel to the cache, if it did not come from there.
    unkept: Option<Unkept>,
}

fn open_kernel(config: &BootConfig, cache: Option<&Cache>) -> Result<Kernel, Problem> {
    let (file, len) = source::open(&config.kernel)?;
    let cache = cache.filter(|_| config.boot.is_cached() && Cache::may_keep(len));
    if let Some(image) = cache.and_then(|cache| cache.find(&file)) {
        return Ok(Kernel { image, cached: true, unkept: None });
    }
    let unkept = match cache {
        Some(cache) => Some(file.try_clone().and_then(|file| Unkept::new(cache, file)).map_err(Problem::Open)?),
        None => None,
    };
    let image = kernel::examine(source::Data::File(file, len), config.boot)?;
    let unkept = unkept.filter(|_| image.info.multiboot.is_none() && !image.packed);
    Ok(Kernel { image, cached: false, unkept })
}

/// Memory map for the guest, in address order: the ranges that [`crate::layout`] reserves, and RAM.
pub fn memory_map(ram: &GuestRam) -> Vec<MemoryRange> {
    let range = |start, end, kind| MemoryRange { start, end, kind };
    let mut map = vec![
        range(0, layout::EBDA, 1),
        range(layout::EBDA, layout::EBDA_END, 2),
        range(layout::ACPI, layout::RESET_STUB_END, 2),
    ];
    map.extend(
        ram.boot_regions().map(|r| range(r.start.max(layout::HIGH_RAM), r.end(), 1)).filter(|r| r.start < r.end),
    );
    map
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let entry = match self.protocol {
            Protocol::Linux64 => "64-bit",
            Protocol::Pvh => "PVH",
            Protocol::Multiboot => "multiboot",
        };
        write!(f, "kernel {}", self.version.as_deref().unwrap_or("of unknown version"))?;
        write!(f, " ({}), {entry} entry at {:#x}", self.format, self.entry)?;
        write!(f, ", {}", if self.kaslr { "addresses randomised" } else { "not relocated" })?;
        write!(f, "{}", if self.cached { ", from the cache" } else { "" })
    }
}
