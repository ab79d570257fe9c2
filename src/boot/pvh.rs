//! `hvm_start_info`: what a kernel is told at its PVH entry (xen/include/public/arch-x86/hvm/start_info.h).

use super::{Initrd, MemoryRange};
use crate::layout;
use crate::memory::{GuestRam, OutOfRam};

const MAGIC: u32 = 0x336E_C578;
/// The version with a memory map.
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
    let mut info = Vec::new();
    for word in [MAGIC, VERSION, 0, u32::from(initrd.is_some())] {
        info.extend(word.to_le_bytes()); // magic, version, flags, nr_modules
    }
    let modules = if initrd.is_some() { MODULES } else { 0 };
    for address in [modules, layout::CMDLINE, rsdp.unwrap_or(0), MEMORY_MAP] {
        info.extend(address.to_le_bytes());
    }
    info.extend((memory.len() as u32).to_le_bytes());
    info.extend([0; 4]);
    ram.write(layout::PVH_START_INFO, &info)?;
    if let Some(initrd) = initrd {
        // paddr, size, cmdline_paddr, reserved
        ram.write_obj(MODULES, [initrd.start, initrd.len, 0, 0])?;
    }
    for (n, range) in memory.iter().enumerate() {
        // Type and a reserved word make up the third.
        let entry = [range.start, range.end - range.start, range.kind.into()];
        ram.write_obj(MEMORY_MAP + n as u64 * 24, entry)?;
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
