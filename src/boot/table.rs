//! Common parts of the firmware tables: their error, the checksum, and writing to guest memory.

use crate::layout;
use crate::memory::{GuestRam, OutOfRam};

use super::Platform;

/// Reasons why the firmware tables cannot describe a machine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The tables are larger than their space in [`crate::layout`].
    #[error("the {table} tables take {len} bytes, but there is room for only {room}")]
    TooLarge {
        /// Name of the tables.
        table: &'static str,
        /// Size of the tables in bytes.
        len: usize,
        /// Size of their space in bytes.
        room: u64,
    },
    /// A virtio slot without an address.
    #[error("virtio slot {slot} does not exist; a machine has slots 0 to {}", layout::VIRTIO_SLOTS - 1)]
    Slot {
        /// Number of the slot.
        slot: u32,
    },
    /// A processor count that the tables cannot express.
    #[error("{cpus} vCPUs cannot be described; a machine has 1 to {MAX_CPUS}")]
    Cpus {
        /// Number of vCPUs.
        cpus: u32,
    },
    /// The machine has less than 1 MiB of RAM.
    #[error("the firmware tables do not fit into guest memory")]
    OutOfRam(#[from] OutOfRam),
}

/// Number of vCPUs that a table can list: local APIC ids 0 to 253, because 255 means all of them and 254 is kept free.
pub const MAX_CPUS: u32 = 254;

/// Returns the local APIC ids of the machine's vCPUs.
pub(super) fn apic_ids(platform: &Platform) -> Result<std::ops::Range<u8>, Error> {
    match u8::try_from(platform.cpus) {
        Ok(cpus @ 1..) if platform.cpus <= MAX_CPUS => Ok(0..cpus),
        _ => Err(Error::Cpus { cpus: platform.cpus }),
    }
}

/// Returns the slots that hold a device, each with its register window and its GSI.
pub(super) fn virtio_windows(platform: &Platform) -> Result<Vec<Window>, Error> {
    let window = |&slot: &u32| {
        if slot >= layout::VIRTIO_SLOTS {
            return Err(Error::Slot { slot });
        }
        let base = layout::VIRTIO_MMIO + u64::from(slot) * layout::VIRTIO_MMIO_SIZE;
        Ok(Window { slot, base, gsi: layout::VIRTIO_GSI + slot })
    };
    platform.virtio_slots.iter().map(window).collect()
}

/// Register window and interrupt of one virtio-mmio device.
pub(super) struct Window {
    pub slot: u32,
    pub base: u64,
    pub gsi: u32,
}

/// Returns the byte that makes the sum of `bytes` and itself zero, as ACPI, SMBIOS and the MP specification require.
pub(super) fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte))
}

/// Writes `bytes` at `start`; fails if they extend past `end`.
pub(super) fn place(ram: &GuestRam, table: &'static str, bytes: &[u8], start: u64, end: u64) -> Result<(), Error> {
    let room = end - start;
    if bytes.len() as u64 > room {
        return Err(Error::TooLarge { table, len: bytes.len(), room });
    }
    Ok(ram.write(start, bytes)?)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Returns a machine with a serial port, ACPI and the given numbers of vCPUs and virtio slots.
    pub fn platform(cpus: u32, slots: u32) -> Platform {
        let uuid = *b"\x00\x11\x22\x33\x44\x55\x66\x77\x88\x99\xaa\xbb\xcc\xdd\xee\xff";
        Platform { cpus, acpi: true, uuid, virtio_slots: (0..slots).collect(), serial: true, clocks: false }
    }

    /// Returns `len` bytes of guest memory.
    pub fn bytes(ram: &GuestRam, addr: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        ram.read(addr, &mut data).unwrap();
        data
    }

    /// Returns the sum of all bytes, which is zero with a correct checksum.
    pub fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn impossible_machines_are_refused() {
        for cpus in [0, 255, 256, 100_000, u32::MAX] {
            assert!(matches!(apic_ids(&platform(cpus, 0)), Err(Error::Cpus { .. })), "{cpus}");
        }
        assert_eq!(apic_ids(&platform(254, 0)).unwrap(), 0..254);
        assert!(matches!(virtio_windows(&platform(1, layout::VIRTIO_SLOTS + 1)), Err(Error::Slot { .. })));
        let ram = GuestRam::anonymous(0x1000);
        assert!(matches!(place(&ram, "x", &[0; 9], 0, 8), Err(Error::TooLarge { .. })));
        assert!(matches!(place(&ram, "x", &[0; 9], 0xFFF, 0x2000), Err(Error::OutOfRam(_))));
    }
}
