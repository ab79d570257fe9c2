//! Description of a machine: the aggregate of the per-device configurations.
//!
//! One struct serves the command line, `--config FILE`, and every other source of a machine's description.
//! [`MachineConfig::validate`] is pure: it looks only at values, so every source is checked alike and before anything
//! is opened.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::backend::console::ConsoleEnd;
use crate::boot::BootConfig;
use crate::devices::serial::SerialConfig;
use crate::kvm::cpuid::Features;
use crate::layout;
use crate::memory::{HugePages, MemoryConfig};
use crate::options::{self, Size};
use crate::virtio::balloon::BalloonConfig;
use crate::virtio::blk::BlkConfig;
use crate::virtio::console::PortConfig;
use crate::virtio::fs::FsConfig;
use crate::virtio::mem::MemConfig;
use crate::virtio::net::NetConfig;
use crate::virtio::pmem::PmemConfig;
use crate::virtio::rng::RngConfig;
use crate::virtio::vhost_user::{Kind, VhostUserConfig};
use crate::virtio::vsock::VsockConfig;

/// Description of a whole machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Kernel, initrd and command line.
    pub boot: BootConfig,
    /// RAM.
    #[serde(default)]
    pub memory: MemoryConfig,
    /// vCPUs.
    #[serde(default)]
    pub cpu: CpuConfig,
    /// First serial port.
    #[serde(default)]
    pub serial: SerialConfig,
    /// Virtio console.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<ConsoleEnd>,
    /// Ports of the virtio console for data.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub console_ports: Vec<PortConfig>,
    /// Block devices, in slot order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<BlkConfig>,
    /// Network cards, in slot order after the disks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nets: Vec<NetConfig>,
    /// Files as persistent memory, in slot order after the network cards.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pmems: Vec<PmemConfig>,
    /// Shared folders of the host, in slot order after the persistent memory.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shares: Vec<FsConfig>,
    /// Devices served by daemons. With any of them the guest's memory is shared, whatever `memory.shared` says.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub vhost_user: Vec<VhostUserConfig>,
    /// Random number generator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rng: Option<RngConfig>,
    /// Sockets between host and guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// Memory balloon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonConfig>,
    /// Memory that can be added and removed while the guest runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub virtio_mem: Option<MemConfig>,
    /// ACPI tables; if off, an MP table and `virtio_mmio.device=` parameters.
    #[serde(default)]
    pub acpi: Acpi,
    /// QEMU's isa-debug-exit at port 0xF4, through which the guest chooses vireo's exit status.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub debug_exit: bool,
    /// QEMU's pc-testdev, and fw_cfg with the number of vCPUs and the RAM size, as kvm-unit-tests expect them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub testdev: bool,
    /// SMBIOS system UUID; random if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<Uuid>,
}

/// Value of `--acpi`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Acpi {
    /// Describe the machine by ACPI tables.
    #[default]
    On,
    /// Describe the machine by an MP table and the command line, and provide the 8254 and 8259 that such guests expect.
    Off,
}

/// Values of `--cpus` and `--cpu`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CpuConfig {
    /// Number of vCPUs, 1 to 254.
    pub count: u32,
    /// Host processors to pin the vCPUs to, one for each: `0-3`, `0:2:4:6`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub affinity: Option<String>,
    /// CPU features to add or hide: `+name,-name`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub features: String,
}

impl Default for CpuConfig {
    fn default() -> Self {
        CpuConfig { count: 1, affinity: None, features: String::new() }
    }
}

impl std::str::FromStr for CpuConfig {
    type Err = options::Error;

    fn from_str(text: &str) -> Result<Self, options::Error> {
        options::from_str(text, Some("count"))
    }
}

impl CpuConfig {
    /// Returns the host processor of each vCPU; empty without `affinity`.
    pub fn pins(&self) -> Result<Vec<usize>, Error> {
        let Some(text) = &self.affinity else { return Ok(Vec::new()) };
        let bad = || Error::Affinity(text.clone());
        let mut pins = Vec::new();
        for item in text.split(':') {
            let (first, last) = item.split_once('-').unwrap_or((item, item));
            let (first, last): (usize, usize) = (first.parse().map_err(|_| bad())?, last.parse().map_err(|_| bad())?);
            // The bound keeps an absurd range from being expanded.
            if first > last || last >= 8192 {
                return Err(bad());
            }
            pins.extend(first..=last);
        }
        if pins.len() == self.count as usize { Ok(pins) } else { Err(Error::AffinityCount(pins.len(), self.count)) }
    }
}

/// Limits of the host.
#[derive(Clone, Copy, Debug)]
pub struct HostLimits {
    /// KVM's limit of vCPUs in one VM.
    pub max_vcpus: usize,
    /// Width of a guest-physical address in bits.
    pub phys_bits: u32,
}

/// Error: the machine's description is impossible.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// Less RAM than the minimum.
    #[error("--memory {0}: a guest needs at least 16M{hint}", hint = .0.unit_hint())]
    TooLittleMemory(Size),
    /// RAM size that is not a multiple of the page size.
    #[error("--memory {0}: not a multiple of {1}")]
    MemoryAlignment(Size, Size),
    /// More RAM than the guest can address.
    #[error("--memory {size}: the guest can address at most {limit} on this host")]
    TooMuchMemory {
        /// Requested size.
        size: Size,
        /// Largest possible size.
        limit: Size,
    },
    /// Zero vCPUs.
    #[error("--cpus 0: a guest needs at least one vCPU")]
    NoCpu,
    /// More vCPUs than APIC IDs.
    #[error("--cpus {0}: vireo gives a guest at most {MAX_VCPUS} vCPUs (8-bit APIC ids)")]
    TooManyCpus(u32),
    /// More vCPUs than KVM supports.
    #[error("--cpus {0}: KVM on this host gives a guest at most {1} vCPUs")]
    TooManyCpusForKvm(u32, usize),
    /// Invalid list of processors.
    #[error("affinity '{0}' is not a list of host processors like 0-3 or 0:2:4:6")]
    Affinity(String),
    /// Number of processors that differs from the number of vCPUs.
    #[error("affinity names {0} host processors for {1} vCPUs; name one for each")]
    AffinityCount(usize, u32),
    /// Invalid list of CPU features.
    #[error("--cpu: {0}")]
    Features(String),
    /// Impossible disk.
    #[error("--disk: {0}")]
    Disk(String),
    /// Impossible vsock device.
    #[error("--vsock: {0}")]
    Vsock(String),
    /// Impossible balloon.
    #[error("--balloon {0}")]
    Balloon(String),
    /// Impossible network card.
    #[error("--net: {0}")]
    Net(String),
    /// Impossible persistent memory.
    #[error("--pmem {0}")]
    Pmem(String),
    /// Impossible virtio-mem device.
    #[error("--virtio-mem {0}")]
    Mem(String),
    /// Impossible shared folder.
    #[error("--share: {0}")]
    Share(String),
    /// Impossible random number generator.
    #[error("--rng: {0}")]
    Rng(&'static str),
    /// Impossible device served by a daemon.
    #[error("--vhost-user: {0}")]
    VhostUser(String),
    /// Impossible console port.
    #[error("--console-port: {0}")]
    ConsolePort(String),
    /// Several consoles on one standard stream.
    #[error("only one of the serial port, the console and its ports can use a standard stream")]
    TwoOnStdio,
    /// Missing kernel.
    #[error("no kernel: give --kernel FILE (or boot.kernel in the config file)")]
    NoKernel,
}

/// Largest number of vCPUs: APIC IDs 0 to 253; 254 is the IO-APIC's.
pub const MAX_VCPUS: u32 = 254;

/// KVM's size limit for one memory slot, just under 8 TiB (KVM_MEM_MAX_NR_PAGES). The RAM above the MMIO hole is one
/// slot.
pub const SLOT_MAX: u64 = ((1 << 31) - 1) * layout::PAGE_SIZE;

impl MachineConfig {
    /// Checks everything that can be checked without opening anything.
    pub fn validate(&self) -> Result<(), Error> {
        if self.boot.kernel.as_os_str().is_empty() {
            return Err(Error::NoKernel);
        }
        let size = self.memory.size;
        if size < Size::mib(16) {
            return Err(Error::TooLittleMemory(size));
        }
        let unit = if self.memory.hugepages == HugePages::TwoMib { Size::mib(2) } else { Size(layout::PAGE_SIZE) };
        if !size.0.is_multiple_of(unit.0) {
            return Err(Error::MemoryAlignment(size, unit));
        }
        match self.cpu.count {
            0 => return Err(Error::NoCpu),
            1..=MAX_VCPUS => {}
            n => return Err(Error::TooManyCpus(n)),
        }
        self.cpu.pins()?;
        self.disks.iter().try_for_each(BlkConfig::validate).map_err(|e| Error::Disk(e.to_string()))?;
        self.vsock.iter().try_for_each(VsockConfig::validate).map_err(|e| Error::Vsock(e.to_string()))?;
        self.virtio_mem.iter().try_for_each(MemConfig::validate).map_err(Error::Mem)?;
        let most = self.most_memory();
        self.balloon.iter().try_for_each(|balloon| balloon.validate(most)).map_err(Error::Balloon)?;
        self.nets.iter().try_for_each(NetConfig::validate).map_err(|e| Error::Net(e.to_string()))?;
        self.pmems.iter().try_for_each(PmemConfig::validate).map_err(Error::Pmem)?;
        FsConfig::validate(&self.shares).map_err(Error::Share)?;
        self.vhost_user.iter().try_for_each(VhostUserConfig::validate).map_err(|e| Error::VhostUser(e.to_string()))?;
        self.rng.iter().try_for_each(RngConfig::validate).map_err(Error::Rng)?;
        PortConfig::validate(&self.console_ports).map_err(Error::ConsolePort)?;
        let ends = self.console.iter().chain(self.console_ports.iter().map(|port| &port.to)).chain([&self.serial]);
        let mut taken = [0; 3];
        ends.for_each(|end| taken.iter_mut().zip(end.streams()).for_each(|(taken, uses)| *taken += u32::from(uses)));
        // Standard error may be shared: it carries messages from several sources.
        if taken[..2].iter().any(|taken| *taken > 1) {
            return Err(Error::TwoOnStdio);
        }
        self.cpu.features.parse::<Features>().map_err(|e| Error::Features(e.to_string()))?;
        Ok(())
    }

    /// Returns the kernel modules that drive the virtio devices, the transport first. A kernel may have any of them
    /// built in.
    pub fn device_modules(&self) -> Vec<&'static str> {
        let served = |kind: Kind| self.vhost_user.iter().any(|device| device.kind == kind);
        let drivers = [
            (!self.disks.is_empty() || served(Kind::Blk), "virtio_blk"),
            (!self.nets.is_empty() || served(Kind::Net), "virtio_net"),
            (!self.shares.is_empty() || served(Kind::Fs), "virtiofs"),
            (self.console.is_some() || !self.console_ports.is_empty(), "virtio_console"),
            (!self.pmems.is_empty(), "nd_pmem"),
            (!self.pmems.is_empty(), "virtio_pmem"),
            (self.rng.is_some(), "virtio_rng"),
            (self.vsock.is_some(), "vmw_vsock_virtio_transport"),
            (self.balloon.is_some(), "virtio_balloon"),
            (self.virtio_mem.is_some(), "virtio_mem"),
        ];
        let drivers: Vec<_> = drivers.into_iter().filter(|(wanted, _)| *wanted).map(|(_, name)| name).collect();
        if drivers.is_empty() { drivers } else { [&["virtio_mmio"][..], &drivers].concat() }
    }

    /// Returns the most memory that the guest can ever have: its RAM and the memory that can be added.
    pub fn most_memory(&self) -> Size {
        let added = self.virtio_mem.as_ref().map_or(0, |mem| mem.size.0);
        Size(self.memory.size.0.saturating_add(added))
    }

    /// Returns the RAM configuration with the changes that the devices require.
    pub fn effective_memory(&self) -> MemoryConfig {
        MemoryConfig { shared: self.memory.shared || !self.vhost_user.is_empty(), ..self.memory.clone() }
    }

    /// Checks the description against the host's limits.
    pub fn validate_host(&self, limits: HostLimits) -> Result<(), Error> {
        if self.cpu.count as usize > limits.max_vcpus {
            return Err(Error::TooManyCpusForKvm(self.cpu.count, limits.max_vcpus));
        }
        let hole = layout::MMIO_HOLE_END - layout::MMIO_HOLE;
        let addressable = 1u64.checked_shl(limits.phys_bits).unwrap_or(u64::MAX).saturating_sub(hole);
        let limit = addressable.min(layout::MMIO_HOLE + SLOT_MAX);
        if self.memory.size.0 > limit {
            return Err(Error::TooMuchMemory { size: self.memory.size, limit: Size(limit >> 30 << 30) });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> MachineConfig {
        MachineConfig { boot: BootConfig { kernel: "k".into(), ..Default::default() }, ..Default::default() }
    }

    #[test]
    fn impossible_machines_are_refused_with_the_reason() {
        let limits = HostLimits { max_vcpus: 8, phys_bits: 39 };
        let check = |change: fn(&mut MachineConfig)| {
            let mut c = config();
            change(&mut c);
            c.validate().and_then(|()| c.validate_host(limits)).err().map(|e| e.to_string()).unwrap_or_default()
        };
        assert_eq!(check(|_| {}), "");
        assert_eq!(check(|c| c.memory.size = Size::mib(1)), "--memory 1M: a guest needs at least 16M");
        assert_eq!(
            check(|c| c.memory.size = Size(512)),
            "--memory 512: a guest needs at least 16M; a size without a unit is in bytes: for MiB write 512M"
        );
        assert_eq!(check(|c| c.memory.size = Size((16 << 20) + 1)), "--memory 16777217: not a multiple of 4K");
        assert_eq!(
            check(|c| c.memory.size = Size(100 << 40)),
            "--memory 100T: the guest can address at most 511G on this host"
        );
        assert_eq!(check(|c| c.cpu.count = 0), "--cpus 0: a guest needs at least one vCPU");
        let balloon = |text: &str| text.parse::<BalloonConfig>().unwrap().validate(Size::mib(256)).unwrap_err();
        assert_eq!(balloon("257M"), "257M: the guest has only 256M of memory");
        assert!(balloon("5000").starts_with("5000: not a multiple of 4K; a size without a unit is in bytes"));
        assert!(balloon("stats=1ms").starts_with("stats=1ms: must be between 100ms and 24h"));
        assert!(check(|c| c.balloon = "1G".parse().ok()).starts_with("--balloon 1G: "));
        assert!(check(|c| c.console = Some(ConsoleEnd::Stdio)).starts_with("only one of the serial port, the console"));
        let port = |c: &mut MachineConfig, text: &str| c.console_ports.push(text.parse().unwrap());
        let twice = |c: &mut MachineConfig| ["a,to=null", "a,to=pty"].iter().for_each(|text| port(c, text));
        let mut ports = config();
        twice(&mut ports);
        assert_eq!(ports.validate().unwrap_err().to_string(), "--console-port: the name 'a' is given twice");
        ports.console_ports.truncate(1);
        assert_eq!(ports.validate(), Ok(()));
        port(&mut ports, "a/b,to=null");
        assert!(ports.validate().unwrap_err().to_string().contains("invalid port name 'a/b'"));
        assert!(check(|c| c.cpu.count = 100_000).contains("at most 254 vCPUs"));
        assert!(check(|c| c.cpu.count = 9).contains("KVM on this host gives a guest at most 8"));
        assert!(check(|c| c.cpu.features = "avx".into()).contains("must begin with + or -"));
        assert!(check(|c| c.boot.kernel = "".into()).contains("--kernel FILE"));
        assert_eq!(
            check(|c| c.vsock = Some(VsockConfig { cid: 2, path: "v".into() })),
            "--vsock: context id 2 is not valid for a guest: use 3 to 4294967294"
        );
    }

    #[test]
    fn devices_name_their_drivers() {
        let mut config = config();
        assert!(config.device_modules().is_empty());
        config.disks.push("disk".parse().unwrap());
        assert_eq!(config.device_modules(), ["virtio_mmio", "virtio_blk"]);
        config.vhost_user.push("socket=s,type=fs".parse().unwrap());
        config.rng = "".parse().ok();
        assert_eq!(config.device_modules(), ["virtio_mmio", "virtio_blk", "virtiofs", "virtio_rng"]);
    }

    #[test]
    fn affinity_lists() {
        let pins = |text: &str| text.parse::<CpuConfig>().unwrap().pins();
        assert_eq!(pins("4,affinity=0-2:7").unwrap(), [0, 1, 2, 7]);
        assert!(pins("2").unwrap().is_empty());
        assert_eq!(pins("2,affinity=1"), Err(Error::AffinityCount(1, 2)));
        for bad in ["2,affinity=a", "2,affinity=3-1", "2,affinity=0-99999999", "2,affinity=:"] {
            assert!(matches!(pins(bad), Err(Error::Affinity(_))), "{bad}");
        }
    }

    #[test]
    fn json_knows_the_same_keys() {
        let text =
            r#"{"boot":{"kernel":"k","cmdline":"quiet"},"memory":{"size":"1G","shared":true},"cpu":{"count":2}}"#;
        let config: MachineConfig = serde_json::from_str(text).unwrap();
        assert_eq!((config.memory.size, config.cpu.count), (Size::mib(1024), 2));
        let again: MachineConfig = serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
        assert_eq!(again, config);
        for (initrd, count) in [("", 0), (r#","initrd":"i""#, 1), (r#","initrd":["i","j"]"#, 2)] {
            let text = format!(r#"{{"boot":{{"kernel":"k"{initrd}}}}}"#);
            assert_eq!(serde_json::from_str::<MachineConfig>(&text).unwrap().boot.initrd.len(), count);
        }
        let error = serde_json::from_str::<MachineConfig>(r#"{"boot":{"kernel":"k","init":"x"}}"#).unwrap_err();
        assert!(error.to_string().contains("unknown field `init`"), "{error}");
    }
}
