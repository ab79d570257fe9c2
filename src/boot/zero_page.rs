//! The zero page, `boot_params`: what a Linux kernel is told at its 64-bit entry (Documentation/arch/x86/boot.rst and
//! zero-page.rst).

use super::bzimage::{SETUP_HEADER, SetupHeader};
use super::{Initrd, MemoryRange};
use crate::layout;
use crate::memory::{GuestRam, OutOfRam};

/// Offset of the e820 table and how many entries it has room for.
const E820_TABLE: usize = 0x2D0;
const E820_MAX: usize = 128;
/// `type_of_loader`: none of the registered ones.
const LOADER_UNDEFINED: u8 = 0xFF;
/// `loadflags` bit 0: the kernel was loaded high.
const LOADED_HIGH: u8 = 1;
/// `loadflags` bit 1: the kernel's addresses are randomised, and it randomises its memory layout, too.
const KASLR_FLAG: u8 = 2;
/// `setup_data` type of a seed for the kernel's random number generator.
const SETUP_RNG_SEED: u32 = 9;
/// Protocol version that a kernel without a header of its own is given.
const PROTOCOL: u16 = 0x20C;

/// What goes into the zero page.
#[derive(Debug)]
pub struct ZeroPage<'a> {
    /// The kernel file's header, if it is a bzImage.
    pub setup: Option<&'a SetupHeader>,
    /// Where the kernel was loaded.
    pub kernel: u64,
    /// Whether its addresses were randomised.
    pub kaslr: bool,
    /// Where the initrd was loaded.
    pub initrd: Option<Initrd>,
    /// The ACPI root pointer.
    pub rsdp: Option<u64>,
    /// Seed for the kernel's random number generator.
    pub seed: [u8; 32],
}

impl ZeroPage<'_> {
    /// Writes it and the `setup_data` that it points at.
    pub fn write(&self, ram: &GuestRam, memory: &[MemoryRange]) -> Result<(), OutOfRam> {
        ram.write(layout::SETUP_DATA, &self.setup_data())?;
        ram.write(layout::ZERO_PAGE, &self.bytes(memory))
    }

    fn setup_data(&self) -> Vec<u8> {
        let mut bytes = 0u64.to_le_bytes().to_vec();
        bytes.extend(SETUP_RNG_SEED.to_le_bytes());
        bytes.extend((self.seed.len() as u32).to_le_bytes());
        bytes.extend(self.seed);
        bytes
    }

    fn bytes(&self, memory: &[MemoryRange]) -> [u8; layout::PAGE_SIZE as usize] {
        let mut page = [0; layout::PAGE_SIZE as usize];
        let mut put = |offset: usize, bytes: &[u8]| page[offset..offset + bytes.len()].copy_from_slice(bytes);
        match self.setup {
            Some(setup) => put(SETUP_HEADER, setup.bytes()),
            None => {
                put(0x1FE, &0xAA55u16.to_le_bytes());
                put(0x202, b"HdrS");
                put(0x206, &PROTOCOL.to_le_bytes());
                put(0x22C, &u32::MAX.to_le_bytes()); // initrd_addr_max
                put(0x230, &(2u32 << 20).to_le_bytes()); // kernel_alignment
                put(0x238, &(super::CMDLINE_DEFAULT as u32).to_le_bytes()); // cmdline_size
            }
        }
        put(0x070, &self.rsdp.unwrap_or(0).to_le_bytes()); // acpi_rsdp_addr
        put(0x210, &[LOADER_UNDEFINED]); // type_of_loader
        put(0x211, &[LOADED_HIGH | if self.kaslr { KASLR_FLAG } else { 0 }]); // loadflags
        put(0x214, &(self.kernel as u32).to_le_bytes()); // code32_start
        let initrd = self.initrd.unwrap_or_default();
        put(0x218, &(initrd.start as u32).to_le_bytes()); // ramdisk_image
        put(0x0C0, &((initrd.start >> 32) as u32).to_le_bytes()); // ext_ramdisk_image
        put(0x21C, &(initrd.len as u32).to_le_bytes()); // ramdisk_size
        put(0x0C4, &((initrd.len >> 32) as u32).to_le_bytes()); // ext_ramdisk_size
        put(0x228, &(layout::CMDLINE as u32).to_le_bytes()); // cmd_line_ptr
        put(0x0C8, &((layout::CMDLINE >> 32) as u32).to_le_bytes()); // ext_cmd_line_ptr
        put(0x250, &layout::SETUP_DATA.to_le_bytes()); // setup_data
        let entries = memory.iter().take(E820_MAX);
        for (n, range) in entries.clone().enumerate() {
            let entry = E820_TABLE + n * 20;
            put(entry, &range.start.to_le_bytes());
            put(entry + 8, &(range.end - range.start).to_le_bytes());
            put(entry + 16, &range.kind.to_le_bytes());
        }
        put(0x1E8, &[entries.len() as u8]); // e820_entries
        page
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_a_header_gets_one() {
        let ram = GuestRam::anonymous(64 << 20);
        let initrd = Some(Initrd { start: 0x1_2345_6000, len: 0x1_0000_0007 });
        let zero_page =
            ZeroPage { setup: None, kernel: 0x100_0000, kaslr: true, initrd, rsdp: Some(0xE0000), seed: [7; 32] };
        zero_page.write(&ram, &super::super::memory_map(&ram)).unwrap();
        let at = |offset: u64| ram.read_obj::<u32>(layout::ZERO_PAGE + offset).unwrap();
        assert_eq!(at(0x202).to_le_bytes(), *b"HdrS");
        assert_eq!(at(0x210) & 0xFFFF, 0x03FF);
        assert_eq!((at(0xC0), at(0x218)), (1, 0x2345_6000));
        assert_eq!((at(0xC4), at(0x21C)), (1, 7));
        assert_eq!(at(0x228), 0x2_0000);
        assert_eq!(at(0x70), 0xE0000);
        assert_eq!(at(0x1E8) & 0xFF, 4);
        assert_eq!(at(0x2D0 + 3 * 20), 0x10_0000, "start of the fourth e820 entry");
        assert_eq!(at(0x2D0 + 3 * 20 + 8), 63 << 20);
        assert_eq!(ram.read_obj::<[u32; 3]>(layout::SETUP_DATA + 8).unwrap(), [9, 32, 0x0707_0707]);
    }
}
