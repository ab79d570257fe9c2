//! Walks the page tables of an x86-64 guest (Intel SDM, volume 3, 5.5) from outside: 4 and 5 levels, pages of 4 KiB, 2
//! MiB and 1 GiB.
//!
//! The guest owns the tables; they may contain anything, including loops, and change while they are read. A walk reads
//! one entry per level, whatever the tables contain.

use super::GuestRam;
use crate::layout::PAGE_SIZE;

/// Bit of an entry in use.
const PRESENT: u64 = 1;
/// Bit of an entry above the last level that maps a page rather than a table.
const LARGE: u64 = 1 << 7;
/// Address bits of an entry.
const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;
/// Number of entries in a table.
const ENTRIES: u64 = 512;

/// The tables below one root.
#[derive(Clone, Copy)]
pub struct PageTable<'a> {
    ram: &'a GuestRam,
    root: u64,
    levels: u32,
}

/// Lowest address bit that selects an entry of a table at `level`; an entry of level 1 maps 4 KiB.
fn shift(level: u32) -> u32 {
    12 + 9 * (level - 1)
}

impl<'a> PageTable<'a> {
    /// Creates a view of the tables whose root (CR3) is `root`, with four or five levels.
    pub fn new(ram: &'a GuestRam, root: u64, five_levels: bool) -> Self {
        PageTable { ram, root: root & ADDRESS, levels: if five_levels { 5 } else { 4 } }
    }

    /// Returns the physical address for a virtual one, if it is mapped.
    pub fn translate(&self, addr: u64) -> Option<u64> {
        if self.canonical(addr) != addr {
            return None;
        }
        let mut table = self.root;
        for level in (1..=self.levels).rev() {
            let entry = self.entry(table, addr >> shift(level) & (ENTRIES - 1))?;
            if level == 1 || level <= 3 && entry & LARGE != 0 {
                let inside = (1 << shift(level)) - 1;
                return Some(entry & ADDRESS & !inside | addr & inside);
            }
            table = entry & ADDRESS;
        }
        None
    }

    /// Returns the lowest address from `from` on whose third-level entry (1 GiB) is in use, for a page or a table.
    pub fn first_mapped_gib(&self, from: u64) -> Option<u64> {
        let mut steps = 0;
        let addr = self.first_below(self.root, self.levels, from, 0, &mut steps)?;
        Some(self.canonical(addr))
    }

    /// Searches `table` and the tables below it. `base` holds the address bits that the tables above determine.
    fn first_below(&self, table: u64, level: u32, from: u64, base: u64, steps: &mut u32) -> Option<u64> {
        // A search of meaningful tables needs at most two tables of each level.
        const STEPS_MAX: u32 = 3 * 2 * ENTRIES as u32;
        let first = from >> shift(level) & (ENTRIES - 1);
        (first..ENTRIES).find_map(|index| {
            *steps += 1;
            let entry = if *steps > STEPS_MAX { None } else { self.entry(table, index) }?;
            let addr = base | index << shift(level);
            if level == 3 {
                return Some(addr);
            }
            let from = if index == first { from } else { 0 };
            self.first_below(entry & ADDRESS, level - 1, from, addr, steps)
        })
    }

    fn entry(&self, table: u64, index: u64) -> Option<u64> {
        self.ram.read_obj::<u64>(table + index * 8).ok().map(u64::from_le).filter(|entry| entry & PRESENT != 0)
    }

    /// Sign-extends an address from the highest bit that the tables translate.
    fn canonical(&self, addr: u64) -> u64 {
        let unused = 64 - shift(self.levels + 1);
        ((addr << unused) as i64 >> unused) as u64
    }
}

/// Fills `data` from virtual address `addr` on, page by page as `translate` maps the pages.
pub fn read(ram: &GuestRam, addr: u64, data: &mut [u8], translate: impl Fn(u64) -> Option<u64>) -> Option<()> {
    let mut at = addr;
    let mut rest = data;
    while !rest.is_empty() {
        let len = (PAGE_SIZE - at % PAGE_SIZE).min(rest.len() as u64);
        let (piece, behind) = rest.split_at_mut(len as usize);
        ram.read(translate(at)?, piece).ok()?;
        (at, rest) = (at.checked_add(len)?, behind);
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    const RAM: u64 = 4 << 20;

    /// Builds tables; the root is the first page.
    struct Builder {
        ram: GuestRam,
        next: u64,
        levels: u32,
    }

    impl Builder {
        fn new(levels: u32) -> Self {
            Builder { ram: GuestRam::anonymous(RAM), next: PAGE_SIZE, levels }
        }

        /// Maps a page of `level`; returns false if something is mapped there already.
        fn map(&mut self, addr: u64, phys: u64, level: u32) -> bool {
            let mut table = 0;
            for above in (level + 1..=self.levels).rev() {
                let at = table + (addr >> shift(above) & 511) * 8;
                let entry: u64 = self.ram.read_obj(at).unwrap();
                table = if entry == 0 {
                    self.next += PAGE_SIZE;
                    self.ram.write_obj(at, (self.next - PAGE_SIZE) | 0x63).unwrap();
                    self.next - PAGE_SIZE
                } else if entry & LARGE != 0 {
                    return false;
                } else {
                    entry & ADDRESS
                };
            }
            let at = table + (addr >> shift(level) & 511) * 8;
            if self.ram.read_obj::<u64>(at).unwrap() != 0 {
                return false;
            }
            let large = if level > 1 { LARGE } else { 0 };
            self.ram.write_obj(at, phys | large | 1 << 63 | 0x61).unwrap();
            true
        }

        fn table(&self) -> PageTable<'_> {
            PageTable::new(&self.ram, 0x18, self.levels == 5)
        }
    }

    proptest! {
        #[test]
        fn what_was_mapped_is_found(
            five in any::<bool>(),
            pages in proptest::collection::vec((any::<u64>(), 0u64..1 << 51, 1u32..=3), 1..40),
            others in proptest::collection::vec(any::<u64>(), 20),
        ) {
            let mut builder = Builder::new(if five { 5 } else { 4 });
            let mut mapped = HashMap::new();
            for (addr, phys, level) in pages {
                let inside = (1u64 << shift(level)) - 1;
                let (addr, phys) = (builder.table().canonical(addr) & !inside, phys & !inside);
                if builder.map(addr, phys, level) {
                    mapped.insert(addr, (phys, inside));
                }
            }
            for (addr, (phys, inside)) in &mapped {
                for offset in [0, 1, inside / 2, *inside] {
                    prop_assert_eq!(builder.table().translate(addr + offset), Some(phys + offset));
                }
            }
            for addr in others {
                let known = mapped.iter().find(|(page, (_, inside))| addr & !inside == **page);
                let wanted = known.map(|(_, (phys, inside))| phys | addr & inside);
                prop_assert_eq!(builder.table().translate(addr), wanted);
            }
        }

        #[test]
        fn tables_of_noise_lead_nowhere_and_end(bytes in proptest::collection::vec(any::<u64>(), 512), addr in any::<u64>()) {
            let ram = GuestRam::anonymous(PAGE_SIZE);
            // Includes tables that are their own children.
            for (i, entry) in (0u64..).zip(bytes) {
                ram.write_obj(i * 8, if entry % 3 == 0 { entry } else { entry & 0xF7F }).unwrap();
            }
            for five in [false, true] {
                let table = PageTable::new(&ram, 0, five);
                let _ = table.translate(table.canonical(addr));
                let _ = table.first_mapped_gib(addr);
            }
        }
    }

    #[test]
    fn addresses_with_holes_between_their_bits_are_none() {
        let mut builder = Builder::new(4);
        builder.map(0x7FFF_FFFF_F000, 0x1000, 1);
        assert_eq!(builder.table().translate(0x7FFF_FFFF_F123), Some(0x1123));
        assert_eq!(builder.table().translate(0x0001_7FFF_FFFF_F123), None);
    }

    #[test]
    fn the_first_gib_in_use() {
        let mut builder = Builder::new(4);
        builder.map(0xFFFF_8880_0000_0000, 0, 1);
        builder.map(0xFFFF_9A40_4000_0000, 0x4000_0000, 2);
        let first = |from| builder.table().first_mapped_gib(from);
        assert_eq!(first(0xFFFF_8880_0000_0000), Some(0xFFFF_8880_0000_0000));
        assert_eq!(first(0xFFFF_8880_4000_0000), Some(0xFFFF_9A40_4000_0000));
        assert_eq!(first(0xFFFF_9A40_8000_0000), None);
    }

    #[test]
    fn reads_cross_pages() {
        let mut builder = Builder::new(4);
        builder.map(0x1000, 0x20_0000, 1);
        builder.map(0x2000, 0x30_0000, 1);
        builder.ram.write(0x20_0FFE, &[1, 2]).unwrap();
        builder.ram.write(0x30_0000, &[3, 4]).unwrap();
        let mut data = [0; 4];
        assert!(read(&builder.ram, 0x1FFE, &mut data, |addr| builder.table().translate(addr)).is_some());
        assert_eq!(data, [1, 2, 3, 4]);
        assert!(read(&builder.ram, 0x2FFE, &mut data, |addr| builder.table().translate(addr)).is_none());
    }
}
