//! Registers, descriptors and page tables of the boot processor at its first instruction.
//!
//! The 64-bit boot protocol requires long mode with low memory identity-mapped, flat segments with selectors 0x10 and
//! 0x18, and RSI pointing to the zero page. PVH requires 32-bit protected mode without paging, and EBX pointing to the
//! start info. Multiboot requires the same mode, with EBX pointing to its own information and a magic number in EAX.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use super::multiboot;
use crate::layout;
use crate::memory::{GuestRam, OutOfRam};

const CODE64: u64 = 0x00AF_9B00_0000_FFFF;
const DATA: u64 = 0x00CF_9300_0000_FFFF;
const CODE32: u64 = 0x00CF_9B00_0000_FFFF;
const CS: u16 = 0x10;
const DS: u16 = 0x18;
const TSS: u16 = 0x20;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set; interrupts are off.
const RFLAGS: u64 = 2;

const PRESENT_WRITABLE: u64 = 3;
const LARGE_PAGE: u64 = 1 << 7;

/// Protocol by which the kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// Linux's 64-bit boot protocol.
    Linux64,
    /// Xen's PVH boot ABI.
    Pvh,
    /// Multiboot, version 1.
    Multiboot,
}

impl Protocol {
    /// Returns the usual guest-physical address of the zero page, the start info or the multiboot information.
    pub fn usual_info(self) -> u64 {
        match self {
            Protocol::Linux64 => layout::ZERO_PAGE,
            Protocol::Pvh => layout::PVH_START_INFO,
            Protocol::Multiboot => layout::MULTIBOOT_INFO,
        }
    }
}

/// Address and state in which the boot processor starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Guest-physical address of the first instruction.
    pub address: u64,
    /// Protocol of the entry.
    pub protocol: Protocol,
    /// Guest-physical address of the zero page, the start info or the multiboot information.
    pub info: u64,
}

impl Entry {
    /// Writes the GDT and the page tables that [`Entry::registers`] refer to.
    pub fn write_tables(&self, ram: &GuestRam) -> Result<(), OutOfRam> {
        let code = if self.protocol == Protocol::Linux64 { CODE64 } else { CODE32 };
        ram.write_obj(layout::GDT, [0, 0, code, DATA])?;
        if self.protocol != Protocol::Linux64 {
            return Ok(());
        }
        let (pml4, pdpt) = (layout::PAGE_TABLES, layout::PAGE_TABLES + layout::PAGE_SIZE);
        let directories = pdpt + layout::PAGE_SIZE;
        ram.write_obj(pml4, pdpt | PRESENT_WRITABLE)?;
        for gib in 0..4 {
            let directory = directories + gib * layout::PAGE_SIZE;
            ram.write_obj(pdpt + gib * 8, directory | PRESENT_WRITABLE)?;
            let page = |n: usize| (gib << 30 | (n as u64) << 21 | LARGE_PAGE | PRESENT_WRITABLE).to_le_bytes();
            let mut table = [0; layout::PAGE_SIZE as usize];
            table.chunks_exact_mut(8).enumerate().for_each(|(n, entry)| entry.copy_from_slice(&page(n)));
            ram.write(directory, &table)?;
        }
        Ok(())
    }

    /// Returns the initial registers, based on those of a vCPU after reset.
    pub fn registers(&self, base: &kvm_sregs) -> (kvm_regs, kvm_sregs) {
        let long = self.protocol == Protocol::Linux64;
        let mut regs = kvm_regs { rip: self.address, rflags: RFLAGS, ..Default::default() };
        match self.protocol {
            Protocol::Linux64 => regs.rsi = self.info,
            Protocol::Pvh => regs.rbx = self.info,
            Protocol::Multiboot => (regs.rax, regs.rbx) = (multiboot::BOOTED, self.info),
        }
        let mut sregs = *base;
        sregs.gdt.base = layout::GDT;
        sregs.gdt.limit = 4 * 8 - 1;
        // The interrupt table stays as it is after reset. None of its entries is present, so a fault before the kernel
        // has set up its own table still ends the guest, but the table does not look like the emptied one of a reboot
        // by triple fault.
        // Type 11: code, execute and read, accessed. Type 3: data, read and write, accessed.
        sregs.cs = kvm_segment { selector: CS, type_: 11, db: u8::from(!long), l: u8::from(long), ..flat() };
        let data = kvm_segment { selector: DS, type_: 3, db: 1, ..flat() };
        (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
        (sregs.fs, sregs.gs) = (data, data);
        // Entering the guest requires a busy TSS of the mode's own kind; nothing ever loads from it.
        sregs.tr = kvm_segment { selector: TSS, type_: 11, limit: 0x67, s: 0, g: 0, ..flat() };
        sregs.ldt = kvm_segment { unusable: 1, ..Default::default() };
        sregs.cr0 = CR0_PE | CR0_ET;
        (sregs.cr3, sregs.cr4, sregs.efer) = (0, 0, 0);
        if long {
            sregs.cr0 |= CR0_PG;
            sregs.cr3 = layout::PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
        }
        (regs, sregs)
    }
}

/// Returns a present ring 0 segment that covers the first 4 GiB.
fn flat() -> kvm_segment {
    kvm_segment { limit: u32::MAX, present: 1, s: 1, g: 1, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_4_gib_map_to_themselves() {
        let ram = GuestRam::anonymous(1 << 20);
        let entry = Entry { address: 0x100_0200, protocol: Protocol::Linux64, info: layout::ZERO_PAGE };
        entry.write_tables(&ram).unwrap();
        let (regs, sregs) = entry.registers(&kvm_sregs::default());
        for address in [0u64, 0x100_0200, 0x7FFF_FFFF, 0xFFFF_FFFF] {
            let mut table = sregs.cr3;
            for shift in [39, 30, 21] {
                let word: u64 = ram.read_obj(table + (address >> shift & 511) * 8).unwrap();
                assert_eq!(word & 1, 1, "{address:#x} level {shift}");
                table = word & !0xFFF;
            }
            assert_eq!(table, address & !0x1F_FFFF);
        }
        assert_eq!((regs.rip, regs.rsi, regs.rflags), (0x100_0200, layout::ZERO_PAGE, 2));
        assert_eq!((sregs.cs.selector, sregs.cs.l, sregs.cs.db, sregs.ds.selector), (0x10, 1, 0, 0x18));
        let code: u64 = ram.read_obj(layout::GDT + u64::from(sregs.cs.selector)).unwrap();
        assert_eq!(code >> 53 & 1, 1, "the L bit");
    }

    #[test]
    fn pvh_starts_flat_and_unpaged() {
        let entry = Entry { address: 0x10_0000, protocol: Protocol::Pvh, info: layout::PVH_START_INFO };
        let base = kvm_sregs { cr4: 0x20, efer: 0x500, cr0: 0x6000_0010, apic_base: 0xFEE0_0900, ..Default::default() };
        let (regs, sregs) = entry.registers(&base);
        assert_eq!((regs.rip, regs.rbx), (0x10_0000, layout::PVH_START_INFO));
        assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (0x11, 0, 0));
        assert_eq!((sregs.cs.l, sregs.cs.db, sregs.cs.limit), (0, 1, u32::MAX));
        assert_eq!(sregs.apic_base, base.apic_base);
        let (regs, same) =
            Entry { protocol: Protocol::Multiboot, info: layout::MULTIBOOT_INFO, ..entry }.registers(&base);
        assert_eq!((regs.rax, regs.rbx, same), (0x2BAD_B002, layout::MULTIBOOT_INFO, sregs));
    }
}
