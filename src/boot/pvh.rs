//! `hvm_start_info`: the information that a kernel receives at its PVH entry
//! (xen/include/public/arch-x86/hvm/start_info.h).

use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};

use super::{Initrd, MemoryRange};
use crate::layout;
use crate::memory::{GuestRam, OutOfRam};

const MAGIC: u32 = 0x336E_C578;
/// Version of the structure with a memory map.
const VERSION: u32 = 1;
const MODULES: u64 = layout::PVH_START_INFO + 0x40;
const MEMORY_MAP: u64 = layout::PVH_START_INFO + 0x80;

/// Writes the start info, one module for the initrd, and the memory map.
pub fn write(
    ram: &GuestRam,
    initrd: Option<Initrd>,
    rsdp: Option<u64>,
    memory: &[MemoryRange],
) -> Result<(), OutOfRam> {
    let info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        nr_modules: initrd.is_some().into(),
        modlist_paddr: if initrd.is_some() { MODULES } else { 0 },
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: rsdp.unwrap_or(0),
        memmap_paddr: MEMORY_MAP,
        memmap_entries: memory.len() as u32,
        ..Default::default()
    };
    ram.write_obj(layout::PVH_START_INFO, info)?;
    if let Some(initrd) = initrd {
        let module = hvm_modlist_entry { paddr: initrd.start, size: initrd.len, ..Default::default() };
        ram.write_obj(MODULES, module)?;
    }
    for (range, addr) in memory.iter().zip((MEMORY_MAP..).step_by(size_of::<hvm_memmap_table_entry>())) {
        let (size, type_) = (range.end - range.start, range.kind);
        ram.write_obj(addr, hvm_memmap_table_entry { addr: range.start, size, type_, reserved: 0 })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_info_points_at_everything() {
        let ram = GuestRam::anonymous(32 << 20);
        let initrd = Some(Initrd { start: 0x1F0_0000, len: 0x1234 });
        write(&ram, initrd, Some(0xE0000), &super::super::memory_map(&ram)).unwrap();
        let info: [u32; 4] = ram.read_obj(layout::PVH_START_INFO).unwrap();
        assert_eq!(info, [MAGIC, 1, 0, 1]);
        let pointers: [u64; 5] = ram.read_obj(layout::PVH_START_INFO + 16).unwrap();
        assert_eq!(pointers, [0x6040, 0x20000, 0xE0000, 0x6080, 4]);
        assert_eq!(ram.read_obj::<[u64; 2]>(0x6040).unwrap(), [0x1F0_0000, 0x1234]);
        assert_eq!(ram.read_obj::<[u64; 3]>(0x6080 + 3 * 24).unwrap(), [0x10_0000, 31 << 20, 1]);
    }
}
