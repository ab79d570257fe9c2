//! pc-testdev (QEMU's `hw/misc/pc-testdev.c`): a device on which kvm-unit-tests try KVM's emulation.
//!
//! | address | effect |
//! |---|---|
//! | port 0xE0 to 0xE3 | stores what is written, by every width |
//! | port 0xE4 | a 32-bit guest-physical address: its page leaves the second-level page tables, content kept |
//! | port 0xE8 to 0xEB | the same four bytes as at 0xE0 |
//! | port 0x2000 to 0x2017 | a byte other than 0 holds that pin of the interrupt controllers active, 0 releases it |
//! | memory at 0xFF000000 | 64 KiB of storage; each access is an exit |

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::bus::BusDevice;
use crate::layout;
use crate::memory::GuestRam;

const FLUSH: u64 = 4;
const ECHO: Range<u64> = 0..4;
const ECHO_AGAIN: Range<u64> = 8..12;

/// Ports from [`layout::TESTDEV_PORT`] on.
pub struct TestPorts {
    echo: Mutex<[u8; 4]>,
    ram: GuestRam,
}

/// Interrupt lines, [`layout::IOAPIC_PINS`] ports.
pub struct TestLines {
    set: Box<dyn Fn(u32, bool) + Send + Sync>,
}

/// Memory of [`layout::TESTDEV_MEMORY_LEN`] bytes.
pub struct TestMemory {
    bytes: Mutex<Vec<u8>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl TestPorts {
    /// Creates ports that flush pages of `ram`.
    pub fn new(ram: GuestRam) -> Self {
        TestPorts { echo: Mutex::default(), ram }
    }
}

/// Returns the index of the stored byte that a port shows.
fn echo_byte(register: u64) -> Option<usize> {
    (ECHO.contains(&register) || ECHO_AGAIN.contains(&register)).then_some((register & 3) as usize)
}

impl BusDevice for TestPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let echo = lock(&self.echo);
        for (register, byte) in (offset..=u64::MAX).zip(data) {
            *byte = echo_byte(register).map_or(0, |at| echo[at]);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (FLUSH, [a, b, c, d]) = (offset, data) {
            self.ram.unmap_from_guest(u32::from_le_bytes([*a, *b, *c, *d]).into());
            return;
        }
        let mut echo = lock(&self.echo);
        for (register, byte) in (offset..=u64::MAX).zip(data) {
            if let Some(at) = echo_byte(register) {
                echo[at] = *byte;
            }
        }
    }
}

impl TestLines {
    /// Creates lines. `set` passes a GSI, and whether it is active, to the interrupt controllers.
    pub fn new(set: impl Fn(u32, bool) + Send + Sync + 'static) -> Self {
        TestLines { set: Box::new(set) }
    }
}

impl BusDevice for TestLines {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (u32::try_from(offset), data) {
            (Ok(gsi), [level]) if gsi < layout::IOAPIC_PINS => (self.set)(gsi, *level != 0),
            _ => {}
        }
    }
}

impl TestMemory {
    /// Creates memory that is all zeros.
    pub fn new() -> Self {
        TestMemory { bytes: Mutex::new(vec![0; layout::TESTDEV_MEMORY_LEN as usize]) }
    }
}

impl Default for TestMemory {
    fn default() -> Self {
        TestMemory::new()
    }
}

/// Returns the range of bytes of an access, unless it overflows.
fn place(offset: u64, len: usize) -> Option<Range<usize>> {
    let start = usize::try_from(offset).ok()?;
    Some(start..start.checked_add(len)?)
}

impl BusDevice for TestMemory {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let bytes = lock(&self.bytes);
        if let Some(source) = place(offset, data.len()).and_then(|place| bytes.get(place)) {
            data.copy_from_slice(source);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut bytes = lock(&self.bytes);
        if let Some(target) = place(offset, data.len()).and_then(|place| bytes.get_mut(place)) {
            target.copy_from_slice(data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn read(device: &dyn BusDevice, offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0xFF; len];
        device.read(offset, &mut data);
        data
    }

    #[test]
    fn ports_echo_by_every_width_at_both_places() {
        let ram = GuestRam::anonymous(1 << 20);
        let ports = TestPorts::new(ram.clone());
        ports.write(0, &[1, 2, 3, 4]);
        assert_eq!(
            (read(&ports, 8, 4), read(&ports, 1, 2), read(&ports, 11, 1)),
            (vec![1, 2, 3, 4], vec![2, 3], vec![4])
        );
        ports.write(9, &[9]);
        assert_eq!(read(&ports, 0, 4), [1, 9, 3, 4]);
        ram.write(0x5000, b"kept").unwrap();
        for addr in [0x5000u32, 0x5FFF, 0, u32::MAX] {
            ports.write(FLUSH, &addr.to_le_bytes());
        }
        ram.write(0x5004, b"!").unwrap();
        let mut text = [0; 5];
        ram.read(0x5000, &mut text).unwrap();
        assert_eq!((&text, read(&ports, 0, 12)), (b"kept!", vec![1, 9, 3, 4, 0, 0, 0, 0, 1, 9, 3, 4]));
    }

    #[test]
    fn lines_are_set_one_by_one() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sink = seen.clone();
        let lines = TestLines::new(move |gsi, active| sink.lock().unwrap().push((gsi, active)));
        lines.write(14, &[1]);
        lines.write(14, &[0]);
        lines.write(23, &[0x80]);
        for (offset, data) in [(24, &[1][..]), (u64::MAX, &[1]), (3, &[1, 0]), (3, &[])] {
            lines.write(offset, data);
        }
        assert_eq!(*seen.lock().unwrap(), [(14, true), (14, false), (23, true)]);
        assert_eq!(read(&lines, 14, 1), [0]);
    }

    #[test]
    fn memory_remembers_and_has_an_end() {
        let memory = TestMemory::new();
        memory.write(0xFFF8, &[1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!((read(&memory, 0xFFFC, 4), read(&memory, 0, 8)), (vec![5, 6, 7, 8], vec![0; 8]));
        for offset in [0xFFFD, 0x1_0000, u64::MAX] {
            memory.write(offset, &[0xAA; 4]);
            assert_eq!(read(&memory, offset, 4), [0xFF; 4]);
        }
        assert_eq!(read(&memory, 0xFFFC, 4), [5, 6, 7, 8]);
    }
}
