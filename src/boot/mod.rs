//! From a kernel file to a machine that is about to execute its first instruction.

pub mod acpi;
pub mod mptable;
pub mod reset_stub;
pub mod smbios;
pub mod table;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What the user wants booted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootConfig {
    /// The kernel image; its format is found by content.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line, passed as it is.
    #[serde(default)]
    pub cmdline: String,
    /// Which entry is used.
    #[serde(default)]
    pub boot: BootMode,
}

/// `--boot`: how a kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BootMode {
    /// Unpack what can be unpacked, then the 64-bit entry for Linux and PVH for the rest.
    #[default]
    Auto,
    /// A bzImage as it is: the guest runs its own decompressor.
    BzImage,
    /// The 64-bit entry of the (unpacked) ELF.
    Direct,
    /// The PVH entry of the (unpacked) ELF.
    Pvh,
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
}
