//! The address map: the device that answers a port or an MMIO address.
//!
//! Two buses exist, one for PIO and one for MMIO. They are built once, before the vCPUs start, and only read
//! afterwards, so a look-up is a binary search without a lock; each device locks itself.

use std::sync::Arc;

/// A device that answers accesses. `offset` counts from the start of the range at which the device was inserted; `data`
/// is as wide as the guest's access (1 to 8 bytes) and never extends past the range. A device must accept every width
/// and every offset: it ignores unknown accesses or answers them with zeros, as its specification says.
pub trait BusDevice: Send + Sync {
    /// Answers a read; `data` is initially filled with ones, the value of a bus that nobody drives.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Handles a write.
    fn write(&self, offset: u64, data: &[u8]);
}

/// An address range that is empty or overlaps another device's.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("address range {start:#x}..+{len:#x} is empty or overlaps another device")]
pub struct Overlap {
    /// First address of the refused range.
    pub start: u64,
    /// Length of the refused range.
    pub len: u64,
}

/// A set of non-overlapping ranges with their devices.
#[derive(Default, Clone)]
pub struct Bus {
    ranges: Vec<Range>,
}

#[derive(Clone)]
struct Range {
    start: u64,
    len: u64,
    device: Arc<dyn BusDevice>,
}

impl Bus {
    /// Creates an empty bus.
    pub fn new() -> Self {
        Self::default()
    }

    /// Inserts a device at `start..start + len`.
    pub fn insert(&mut self, start: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), Overlap> {
        let overlap = Overlap { start, len };
        let end = start.checked_add(len).filter(|_| len > 0).ok_or(Overlap { start, len })?;
        let at = self.ranges.partition_point(|r| r.start < start);
        if self.ranges.get(at).is_some_and(|next| next.start < end) {
            return Err(overlap);
        }
        if at > 0 && self.ranges[at - 1].start + self.ranges[at - 1].len > start {
            return Err(overlap);
        }
        self.ranges.insert(at, Range { start, len, device });
        Ok(())
    }

    /// Answers a guest's read. If there is no device, or the access extends past its range, the result is all ones.
    /// Returns whether a device answered.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> bool {
        data.fill(0xFF);
        self.find(addr, data.len()).map(|(range, offset)| range.device.read(offset, data)).is_some()
    }

    /// Passes a guest's write to its device; a write without a device has no effect. Returns whether a device accepted
    /// it.
    pub fn write(&self, addr: u64, data: &[u8]) -> bool {
        self.find(addr, data.len()).map(|(range, offset)| range.device.write(offset, data)).is_some()
    }

    fn find(&self, addr: u64, len: usize) -> Option<(&Range, u64)> {
        let at = self.ranges.partition_point(|r| r.start <= addr).checked_sub(1)?;
        let range = &self.ranges[at];
        let offset = addr - range.start;
        let room = range.len.checked_sub(offset)?;
        (len as u64 <= room && room > 0).then_some((range, offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Echo(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Echo {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn finds_by_range_and_answers_ones_elsewhere() {
        let echo = Arc::new(Echo::default());
        let mut bus = Bus::new();
        bus.insert(0x10, 8, echo.clone()).unwrap();
        bus.insert(0x20, 4, echo.clone()).unwrap();
        let mut data = [0; 4];
        assert!(bus.read(0x12, &mut data));
        assert_eq!(data, [2; 4]);
        for addr in [0, 0xF, 0x15, 0x18, 0x1F, 0x21, 0x24, u64::MAX] {
            let mut data = [0; 4];
            assert!(!bus.read(addr, &mut data), "{addr:#x}");
            assert_eq!(data, [0xFF; 4], "{addr:#x}");
            assert!(!bus.write(addr, &data));
        }
        assert!(bus.write(0x20, &[1, 2]));
        assert_eq!(*echo.0.lock().unwrap(), [(0, vec![1, 2])]);
    }

    #[test]
    fn overlaps_are_refused() {
        let echo: Arc<Echo> = Arc::default();
        let mut bus = Bus::new();
        bus.insert(0x10, 8, echo.clone()).unwrap();
        for (start, len) in [(0x10, 8), (0x17, 1), (0, 0x11), (0, 0x100), (0x30, 0), (u64::MAX, 2)] {
            assert_eq!(bus.insert(start, len, echo.clone()), Err(Overlap { start, len }));
        }
        bus.insert(0x18, 1, echo.clone()).unwrap();
        bus.insert(0xF, 1, echo).unwrap();
    }
}
