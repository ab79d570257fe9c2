//! fw_cfg (QEMU's `docs/specs/fw_cfg`), limited to what test suites read: a 16-bit write to the first port selects an
//! item, and each byte read from the second port is the item's next one. There is no DMA, no item can be written, there
//! are no files.

use std::sync::{Mutex, PoisonError};

use crate::bus::BusDevice;

const SIGNATURE: u16 = 0x00;
const ID: u16 = 0x01;
const RAM_SIZE: u16 = 0x03;
const NB_CPUS: u16 = 0x05;
const MAX_CPUS: u16 = 0x0F;
const FILE_DIR: u16 = 0x19;

const SELECTOR: u64 = 0;
const DATA: u64 = 1;

/// fw_cfg device, for [`crate::layout::FW_CFG_LEN`] ports.
pub struct FwCfg {
    cpus: u16,
    ram_size: u64,
    selected: Mutex<Selected>,
}

#[derive(Default)]
struct Selected {
    item: u16,
    /// Number of bytes of the item that were read.
    read: usize,
}

impl FwCfg {
    /// Creates a device that describes a machine with `cpus` vCPUs and `ram_size` bytes of RAM.
    pub fn new(cpus: u16, ram_size: u64) -> Self {
        FwCfg { cpus, ram_size, selected: Mutex::default() }
    }

    /// Returns a byte of an item, or 0 past its end and for items that do not exist. Numbers are little-endian, except
    /// for the number of files.
    fn byte(&self, item: u16, at: usize) -> u8 {
        let bytes: &[u8] = match item {
            SIGNATURE => b"QEMU",
            // Bit 0: this interface; bit 1 would be DMA.
            ID => &1u32.to_le_bytes(),
            RAM_SIZE => &self.ram_size.to_le_bytes(),
            NB_CPUS | MAX_CPUS => &self.cpus.to_le_bytes(),
            FILE_DIR => &0u32.to_be_bytes(),
            _ => &[],
        };
        bytes.get(at).copied().unwrap_or(0)
    }
}

impl BusDevice for FwCfg {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (DATA, [byte]) = (offset, data) {
            let mut selected = self.selected.lock().unwrap_or_else(PoisonError::into_inner);
            *byte = self.byte(selected.item, selected.read);
            selected.read = selected.read.saturating_add(1);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (SELECTOR, [low, high]) = (offset, data) {
            let item = u16::from_le_bytes([*low, *high]);
            *self.selected.lock().unwrap_or_else(PoisonError::into_inner) = Selected { item, read: 0 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(device: &FwCfg, item: u16) -> [u8; 10] {
        device.write(SELECTOR, &item.to_le_bytes());
        [0; 10].map(|_| {
            let mut byte = [0xFF];
            device.read(DATA, &mut byte);
            byte[0]
        })
    }

    #[test]
    fn items_are_read_byte_by_byte_and_end_in_zeros() {
        let device = FwCfg::new(0x102, 0x1_8000_0000);
        assert_eq!(item(&device, SIGNATURE), *b"QEMU\0\0\0\0\0\0");
        assert_eq!(item(&device, ID)[..5], [1, 0, 0, 0, 0]);
        assert_eq!(item(&device, RAM_SIZE), [0, 0, 0, 0x80, 1, 0, 0, 0, 0, 0]);
        assert_eq!((item(&device, NB_CPUS)[..3].to_vec(), item(&device, MAX_CPUS)[1]), (vec![2, 1, 0], 1));
        for unknown in [FILE_DIR, 0x02, 0x20, 0x4000, 0xFFFF] {
            assert_eq!(item(&device, unknown), [0; 10]);
        }
    }

    #[test]
    fn every_other_access_is_harmless_and_changes_nothing() {
        let device = FwCfg::new(1, 1 << 20);
        device.write(SELECTOR, &[0, 0]);
        for offset in [0, 1, 2, u64::MAX] {
            for width in 0..=8 {
                if (offset, width) != (DATA, 1) {
                    let mut data = [0xFF; 8];
                    device.read(offset, &mut data[..width]);
                    assert_eq!(data[..width], [0; 8][..width]);
                }
                if (offset, width) != (SELECTOR, 2) {
                    device.write(offset, &[0xFF; 8][..width]);
                }
            }
        }
        let mut byte = [0];
        device.read(DATA, &mut byte);
        assert_eq!(byte, *b"Q");
    }
}
