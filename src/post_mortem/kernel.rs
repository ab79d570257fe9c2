//! The Linux kernel in guest memory, as far as it describes itself: it has an ELF note, VMCOREINFO, with the addresses
//! and layouts that readers of core files need (Documentation/admin-guide/kdump/vmcoreinfo.rst).
//!
//! A guest wrote whatever is found there. The note counts as a kernel's only if the kernel's page tables agree with it
//! about their own address, and everything that it leads to is read through the checked access to guest memory.

use crate::layout::PAGE_SIZE;
use crate::memory::GuestRam;
use crate::memory::page_table::{self, PageTable};

/// Start of the kernel image's mapping, wherever the image was moved to (Documentation/arch/x86/x86_64/mm.rst).
pub const IMAGE_MAP: u64 = 0xFFFF_FFFF_8000_0000;
/// Largest length of that mapping.
pub const IMAGE_MAP_LEN: u64 = 1 << 30;
/// Header of the note and start of its content: name size 11, content size, type 0, the padded name.
const NAME: &[u8; 12] = b"VMCOREINFO\0\0";
const CONTENT: &[u8] = b"OSRELEASE=";
/// Number of bytes before the content.
const HEADER_LEN: u64 = 24;
/// Largest accepted length of the content; the kernel has one page for it.
const CONTENT_MAX: u32 = 8 << 10;
/// Largest number of note-like pages that are examined: a program in the guest may fill its memory with them.
const NOTES_MAX: usize = 4096;
/// Largest number of pages that are searched: those of a guest with 64 GiB.
const PAGES_MAX: u64 = 16 << 20;

/// Kernel found in guest memory.
pub struct Kernel<'a> {
    ram: &'a GuestRam,
    /// Content of the note: lines of `KEY=VALUE`.
    note: String,
    /// Physical address of [`IMAGE_MAP`].
    phys_base: u64,
    tables: PageTable<'a>,
}

impl<'a> Kernel<'a> {
    /// Finds the note at the beginning of a used page, where Linux has it since 4.13.
    pub fn find(ram: &'a GuestRam) -> Option<Kernel<'a>> {
        let pieces = ram.boot_regions().flat_map(|region| ram.populated(region));
        let pages = pieces.flat_map(|(start, len)| (start..start + len).step_by(PAGE_SIZE as usize));
        let headers = pages.take(PAGES_MAX as usize).filter_map(|page| Some((page, Self::header_at(ram, page)?)));
        headers.take(NOTES_MAX).find_map(|(page, len)| Self::at(ram, page, len))
    }

    /// Returns the length of the content if there is a note's header at `addr`.
    fn header_at(ram: &GuestRam, addr: u64) -> Option<u32> {
        let [name_len, len, _, name @ ..] = ram.read_obj::<[u32; 6]>(addr).ok()?.map(u32::from_le);
        let name_matches = name.iter().flat_map(|word| word.to_le_bytes()).eq(NAME.iter().copied());
        (name_len == 11 && name_matches && len <= CONTENT_MAX).then_some(len)
    }

    fn at(ram: &'a GuestRam, addr: u64, len: u32) -> Option<Kernel<'a>> {
        let mut content = vec![0; len as usize];
        ram.read(addr + HEADER_LEN, &mut content).ok()?;
        let note = content.starts_with(CONTENT).then(|| String::from_utf8(content).ok())??;
        Self::new(ram, note)
    }

    /// Checks that the note agrees with the contents of memory.
    fn new(ram: &'a GuestRam, note: String) -> Option<Kernel<'a>> {
        let mut kernel = Kernel { ram, note, phys_base: 0, tables: PageTable::new(ram, 0, false) };
        kernel.phys_base = kernel.value("NUMBER(phys_base)")?.parse::<i64>().ok()? as u64;
        let root = ["init_top_pgt", "swapper_pg_dir", "init_level4_pgt"].iter().find_map(|name| kernel.symbol(name))?;
        let phys = kernel.translate(root)?;
        kernel.tables = PageTable::new(ram, phys, kernel.value("NUMBER(pgtable_l5_enabled)") == Some("1"));
        (kernel.tables.translate(root) == Some(phys)).then_some(kernel)
    }

    /// Returns the note's content.
    pub fn note(&self) -> &str {
        &self.note
    }

    fn value(&self, key: &str) -> Option<&str> {
        self.note.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
    }

    /// Returns the virtual address of a symbol.
    pub fn symbol(&self, name: &str) -> Option<u64> {
        u64::from_str_radix(self.value(&format!("SYMBOL({name})"))?, 16).ok()
    }

    /// Returns the offset of a member, given as `struct.member`.
    pub fn offset(&self, member: &str) -> Option<u64> {
        self.value(&format!("OFFSET({member})"))?.parse::<u32>().ok().map(u64::from)
    }

    /// Returns the size of a type.
    pub fn size(&self, name: &str) -> Option<u64> {
        self.value(&format!("SIZE({name})"))?.parse::<u32>().ok().map(u64::from)
    }

    /// Returns the physical address of one of the kernel's virtual addresses.
    pub fn translate(&self, addr: u64) -> Option<u64> {
        match addr.checked_sub(IMAGE_MAP) {
            Some(distance) if distance < IMAGE_MAP_LEN => Some(distance.wrapping_add(self.phys_base)),
            _ => self.tables.translate(addr),
        }
    }

    /// Fills `data` from one of the kernel's virtual addresses.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> Option<()> {
        page_table::read(self.ram, addr, data, |addr| self.translate(addr))
    }

    /// Reads a number of 2, 4 or 8 bytes.
    pub fn number<const N: usize>(&self, addr: u64) -> Option<u64> {
        let mut bytes = [0; N];
        self.read(addr, &mut bytes)?;
        let mut number = [0; 8];
        number.get_mut(..N)?.copy_from_slice(&bytes);
        Some(u64::from_le_bytes(number))
    }

    /// Returns the virtual address of physical address 0 in the kernel's direct mapping of all memory.
    pub fn direct_map(&self) -> Option<u64> {
        // Entry 272 of the root table is for user space's tables; everything that randomisation moves comes after it.
        const LOWEST: [u64; 2] = [0xFFFF_8880_0000_0000, 0xFF11_0000_0000_0000];
        let from = LOWEST[usize::from(self.value("NUMBER(pgtable_l5_enabled)") == Some("1"))];
        let base = self.tables.first_mapped_gib(from)?;
        (self.tables.translate(base + (1 << 20)) == Some(1 << 20)).then_some(base)
    }

    /// Returns the virtual and physical start of the kernel's image, rounded down to 2 MiB.
    pub fn image(&self) -> Option<(u64, u64)> {
        let start = self.symbol("_stext")? & !0x1F_FFFF;
        Some((start, self.translate(start)?))
    }
}

#[cfg(test)]
pub(super) mod testing {
    use super::*;

    /// Creates guest memory with a kernel's image at 1 MiB, mapped at [`IMAGE_MAP`] and with its page tables, and a
    /// note with these lines and those that every kernel has.
    pub fn guest(lines: &str) -> GuestRam {
        let ram = GuestRam::anonymous(16 << 20);
        let root = 1 << 20;
        let text = format!(
            "OSRELEASE=6.1.0\nNUMBER(phys_base)=1048576\nSYMBOL(swapper_pg_dir)={IMAGE_MAP:x}\n\
             SYMBOL(_stext)={IMAGE_MAP:x}\n{lines}"
        );
        put_note(&ram, 3 << 20, &text);
        // One page of 2 MiB could not map an image that begins at 1 MiB, so small pages are used.
        let (third, second, first) = (root + 0x1000, root + 0x2000, root + 0x3000);
        ram.write_obj(root + 511 * 8, third | 3).unwrap();
        ram.write_obj(third + 510 * 8, second | 3).unwrap();
        ram.write_obj(second, first | 3).unwrap();
        (0..512u64).for_each(|page| ram.write_obj(first + page * 8, (root + page * 4096) | 3).unwrap());
        ram
    }

    pub fn put_note(ram: &GuestRam, addr: u64, text: &str) {
        ram.write(addr, &[11u32, text.len() as u32, 0].map(u32::to_le_bytes).concat()).unwrap();
        ram.write(addr + 12, NAME).unwrap();
        ram.write(addr + HEADER_LEN, text.as_bytes()).unwrap();
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{guest, put_note};
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_kernel_is_found_by_its_note() {
        let ram = guest("SIZE(list_head)=16\nOFFSET(page.lru)=8\nSIZE(bad)=-1\n");
        // The first note is a false one.
        put_note(&ram, 2 << 20, "OSRELEASE=5\nNUMBER(phys_base)=0\nSYMBOL(swapper_pg_dir)=ffffffff80000000\n");
        put_note(&ram, 0x5000, "OSRELEASE=5\n");
        let kernel = Kernel::find(&ram).unwrap();
        assert!(kernel.note().starts_with("OSRELEASE=6.1.0\n"));
        assert_eq!((kernel.size("list_head"), kernel.offset("page.lru")), (Some(16), Some(8)));
        assert_eq!((kernel.size("bad"), kernel.size("list"), kernel.symbol("jiffies")), (None, None, None));
        assert_eq!(kernel.translate(IMAGE_MAP + 0x1234), Some((1 << 20) + 0x1234));
        assert_eq!(kernel.image(), Some((IMAGE_MAP, 1 << 20)));
        assert_eq!(kernel.direct_map(), None);
        ram.write_obj((1 << 20) + 0x5678, 0x1122_3344u32).unwrap();
        assert_eq!(kernel.number::<4>(IMAGE_MAP + 0x5678), Some(0x1122_3344));
        assert_eq!(kernel.number::<2>(IMAGE_MAP + 0x5678), Some(0x3344));
        assert_eq!(kernel.number::<8>(u64::MAX - 3), None);
        assert!(Kernel::find(&GuestRam::anonymous(16 << 20)).is_none());
        // The search ends before the end of a guest full of notes.
        let ram = GuestRam::anonymous((NOTES_MAX as u64 + 1) * PAGE_SIZE);
        (0..NOTES_MAX as u64).for_each(|page| put_note(&ram, page * PAGE_SIZE, "OSRELEASE=5\n"));
        assert!(Kernel::find(&ram).is_none());
    }

    proptest! {
        #[test]
        fn notes_of_nonsense_are_none(len in any::<u32>(), phys_base in any::<i64>(), symbol in any::<u64>()) {
            let ram = GuestRam::anonymous(1 << 20);
            let text = format!("OSRELEASE=6\nNUMBER(phys_base)={phys_base}\nSYMBOL(init_top_pgt)={symbol:x}\n");
            put_note(&ram, 0x1000, &text);
            prop_assert!(Kernel::find(&ram).is_none());
            ram.write_obj(0x1004, len).unwrap();
            prop_assert!(Kernel::find(&ram).is_none());
        }
    }
}
