//! The zero page, `boot_params`: the information that a Linux kernel receives at its 64-bit entry
//! (Documentation/arch/x86/boot.rst and zero-page.rst).

use linux_loader::loader::bootparam::{boot_params, setup_header};
use vm_memory::ByteValued;

use super::bzimage::SetupHeader;
use super::{Initrd, MemoryRange};
use crate::layout;
use crate::memory::{GuestRam, OutOfRam};

/// `type_of_loader`: not one of the registered loaders.
const LOADER_UNDEFINED: u8 = 0xFF;
/// `loadflags` bit 0: the kernel was loaded high.
const LOADED_HIGH: u8 = 1;
/// `loadflags` bit 1: the kernel's addresses are randomised, and the kernel randomises its memory layout, too.
const KASLR_FLAG: u8 = 2;
/// `setup_data` type of a seed for the kernel's random number generator.
const SETUP_RNG_SEED: u32 = 9;
/// Protocol version in the header that is created for a kernel without one.
const PROTOCOL: u16 = 0x20C;

/// Contents of the zero page.
#[derive(Debug)]
pub struct ZeroPage<'a> {
    /// The kernel file's header, if it is a bzImage.
    pub setup: Option<&'a SetupHeader>,
    /// Address at which the kernel was loaded.
    pub kernel: u64,
    /// True if the kernel's addresses were randomised.
    pub kaslr: bool,
    /// Location of the initrd.
    pub initrd: Option<Initrd>,
    /// The ACPI root pointer.
    pub rsdp: Option<u64>,
    /// Seed for the kernel's random number generator.
    pub seed: [u8; 32],
}

impl ZeroPage<'_> {
    /// Writes the zero page and the `setup_data` that it points to.
    pub fn write(&self, ram: &GuestRam, memory: &[MemoryRange]) -> Result<(), OutOfRam> {
        ram.write(layout::SETUP_DATA, &self.setup_data())?;
        ram.write_obj(layout::ZERO_PAGE, self.boot_params(memory))
    }

    fn setup_data(&self) -> Vec<u8> {
        let mut bytes = 0u64.to_le_bytes().to_vec();
        bytes.extend(SETUP_RNG_SEED.to_le_bytes());
        bytes.extend((self.seed.len() as u32).to_le_bytes());
        bytes.extend(self.seed);
        bytes
    }

    fn boot_params(&self, memory: &[MemoryRange]) -> boot_params {
        let initrd = self.initrd.unwrap_or_default();
        let mut params = boot_params {
            hdr: self.setup_header(),
            acpi_rsdp_addr: self.rsdp.unwrap_or(0),
            ext_ramdisk_image: (initrd.start >> 32) as u32,
            ext_ramdisk_size: (initrd.len >> 32) as u32,
            ext_cmd_line_ptr: (layout::CMDLINE >> 32) as u32,
            ..Default::default()
        };
        // The map has only a few entries; the table has room for 128.
        for (entry, range) in params.e820_table.iter_mut().zip(memory) {
            (entry.addr, entry.size, entry.r#type) = (range.start, range.end - range.start, range.kind);
            params.e820_entries += 1;
        }
        params
    }

    /// Returns the file's header, or one for a kernel without a header, with the fields filled in that are the loader's
    /// task.
    fn setup_header(&self) -> setup_header {
        let mut header = setup_header::default();
        let initrd = self.initrd.unwrap_or_default();
        match self.setup {
            Some(setup) => header.as_mut_slice().iter_mut().zip(setup.bytes()).for_each(|(to, from)| *to = *from),
            None => {
                header = setup_header {
                    boot_flag: 0xAA55,
                    header: u32::from_le_bytes(*b"HdrS"),
                    version: PROTOCOL,
                    initrd_addr_max: u32::MAX,
                    kernel_alignment: 2 << 20,
                    cmdline_size: super::CMDLINE_DEFAULT as u32,
                    ..Default::default()
                };
            }
        }
        setup_header {
            type_of_loader: LOADER_UNDEFINED,
            loadflags: LOADED_HIGH | if self.kaslr { KASLR_FLAG } else { 0 },
            code32_start: self.kernel as u32,
            ramdisk_image: initrd.start as u32,
            ramdisk_size: initrd.len as u32,
            cmd_line_ptr: layout::CMDLINE as u32,
            setup_data: layout::SETUP_DATA,
            ..header
        }
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
