//! From a kernel file to a machine that is about to execute its first instruction.
//!
//! [`BootFiles::open`] checks everything that the user named, before a machine exists; [`BootFiles::load`] fills its
//! memory, step by step. A compressed kernel is unpacked once, by `open`, into pages that `load` moves to the guest and
//! relocates there. Only when the guest runs, its kernel is kept for later boots ([`keep`]), which take it from the
//! [`cache`].

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

/// Longest command line without its NUL of a kernel that does not tell (`COMMAND_LINE_SIZE` of x86 Linux is 2048).
const CMDLINE_DEFAULT: u64 = 2047;

/// What the user wants booted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootConfig {
    /// The kernel image; its format is found by content.
    pub kernel: PathBuf,
    /// Initial RAM disks, one behind the other; a file may name a single one without a list.
    #[serde(default, deserialize_with = "one_or_several", skip_serializing_if = "Vec::is_empty")]
    pub initrd: Vec<PathBuf>,
    /// What is packed behind them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<InitramfsConfig>,
    /// Kernel command line, passed as it is.
    #[serde(default)]
    pub cmdline: String,
    /// A parameter that a kernel gets in front of its command line if it is a Linux.
    #[serde(skip)]
    pub linux_parameter: Option<String>,
    /// Which entry is used.
    #[serde(default)]
    pub boot: BootMode,
}

/// A path, or a list of them.
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

/// `--boot`: how a kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BootMode {
    /// Unpack what can be unpacked, then the 64-bit entry for Linux and PVH or multiboot for the rest.
    #[default]
    Auto,
    /// A bzImage as it is: the guest runs its own decompressor.
    BzImage,
    /// The 64-bit entry of the (unpacked) ELF.
    Direct,
    /// The PVH entry of the (unpacked) ELF.
    Pvh,
    /// By the file's multiboot header.
    Multiboot,
}

impl BootMode {
    /// Whether kernels that are entered so may come from the cache: it has them unpacked, as ELF files.
    fn is_cached(self) -> bool {
        !matches!(self, BootMode::BzImage | BootMode::Multiboot)
    }
}

/// What the firmware tables tell the guest about its machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    /// Number of vCPUs; vCPU `n` has APIC id `n`.
    pub cpus: u32,
    /// ACPI tables, or else an MP table.
    pub acpi: bool,
    /// SMBIOS system UUID.
    pub uuid: [u8; 16],
    /// Virtio slots that hold a device ([`crate::layout::VIRTIO_MMIO`]).
    pub virtio_slots: Vec<u32>,
    /// Whether the serial port exists.
    pub serial: bool,
    /// Whether the tables name the PM timer and the real-time clock, for a guest that does not use kvmclock.
    pub clocks: bool,
}

/// Everything that the user named, open and checked.
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

/// A range of guest-physical memory and what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRange {
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// 1 for RAM, 2 for reserved, as in e820 and in PVH's memory map.
    pub kind: u32,
}

/// Where the initrd lies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Initrd {
    /// Guest-physical address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

/// What is about to boot, for logs and the report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Description {
    /// The file's format in words.
    pub format: String,
    /// The kernel's own version.
    pub version: Option<String>,
    /// How it is entered.
    pub protocol: Protocol,
    /// Guest-physical entry address.
    pub entry: u64,
    /// Whether its addresses were randomised here.
    pub kaslr: bool,
    /// Whether it comes from the cache of unpacked kernels.
    pub cached: bool,
}

impl BootFiles {
    /// Opens and checks the kernel, the initrd and the command line for a machine with `ram_size` bytes of RAM.
    pub fn open(config: &BootConfig, ram_size: u64) -> Result<BootFiles, Error> {
        let cache = if config.boot.is_cached() { Cache::of_user() } else { None };
        BootFiles::open_with(config, ram_size, cache.as_ref())
    }

    /// The same with a cache that the caller has chosen.
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

    /// Fills `ram`, which is fresh, with all that the kernel needs to start, and says where it starts.
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
            at += piece.len(); // they were added up when they were placed
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

        // What unpacking took is no longer needed and must not stay with us while the guest runs.
        drop(image);
        memory::trim_heap();
        Ok(entry)
    }

    /// What the cache should get when the guest runs.
    pub fn take_unkept(&mut self) -> Option<Unkept> {
        self.unkept.take()
    }

    /// What was found.
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

/// The kernel, unpacked.
struct Kernel {
    image: Image,
    /// Whether it comes from the cache.
    cached: bool,
    /// What the cache should get, if it does not.
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

/// The memory map that the guest is given, in address order: what [`crate::layout`] reserves, and RAM.
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
