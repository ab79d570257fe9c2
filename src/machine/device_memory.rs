//! Placement of device memory in the guest: above all RAM, each area aligned to [`layout::DEVICE_MEMORY_ALIGN`].

use super::Error;
use crate::config::SLOT_MAX;
use crate::layout;
use crate::memory::{Area, Backing, split};
use crate::options::Size;

/// Allocator of guest-physical addresses for device memory.
pub(super) struct DeviceMemory {
    /// Next free address.
    next: u64,
    /// First address that the guest cannot use.
    limit: u64,
    areas: Vec<Area>,
}

impl DeviceMemory {
    /// Places devices above `ram`, within `phys_bits` of address space.
    pub(super) fn new(ram: Size, phys_bits: u32) -> Self {
        let ram_end = split(ram.0).into_iter().map(|(start, len)| start.saturating_add(len)).max().unwrap_or(0);
        let limit = 1u64.checked_shl(phys_bits).unwrap_or(u64::MAX);
        DeviceMemory { next: ram_end.max(layout::MMIO_HOLE_END), limit, areas: Vec::new() }
    }

    /// Reserves `len` bytes; `what` names the user in the error message.
    pub(super) fn place(&mut self, what: &str, len: u64, backing: Backing) -> Result<u64, Error> {
        let fits = |start: &u64| len <= SLOT_MAX && start.checked_add(len).is_some_and(|end| end <= self.limit);
        let start = self.next.checked_next_multiple_of(layout::DEVICE_MEMORY_ALIGN).filter(fits);
        let start = start.ok_or_else(|| Error::NoAddresses { what: what.into(), size: Size(len) })?;
        let area = Area { start, len, backing };
        self.next = area.end();
        self.areas.push(area);
        Ok(start)
    }

    /// Returns the placed areas in address order.
    pub(super) fn into_areas(self) -> Vec<Area> {
        self.areas
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn above_all_ram_and_apart() {
        for (ram, first) in [(1, 4), (3, 4), (4, 6), (5, 6), (6, 8)] {
            let mut memory = DeviceMemory::new(Size(ram * GIB), 39);
            let mut place = |len| memory.place("x", len, Backing::Pluggable).unwrap() / GIB;
            assert_eq!([place(2 << 20), place(2 * GIB), place(1)], [first, first + 2, first + 4], "{ram}");
            let areas = memory.into_areas();
            assert!(areas.is_sorted_by(|a, b| a.end() <= b.start));
        }
    }

    #[test]
    fn only_as_far_as_the_guest_can_address() {
        let mut memory = DeviceMemory::new(Size(GIB), 36);
        assert_eq!(memory.place("a", 60 * GIB, Backing::Pluggable).unwrap(), 4 * GIB);
        let error = memory.place("pmem b", 2 << 20, Backing::Pluggable).unwrap_err();
        assert_eq!(error.to_string(), "pmem b: no guest address space left for 2M on this host");
        let mut memory = DeviceMemory::new(Size(GIB), 64);
        for len in [SLOT_MAX + 1, u64::MAX] {
            assert!(memory.place("c", len, Backing::Pluggable).is_err());
        }
        assert!(DeviceMemory::new(Size(u64::MAX), 48).place("d", 1, Backing::Pluggable).is_err());
    }
}
