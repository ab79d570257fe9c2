//! Placement of kernel and initrd in the memory of a machine of a given size.

use super::error::{Error, Problem};
use super::image::{Image, ImageInfo};
use super::{CMDLINE_DEFAULT, Initrd, Protocol, kaslr};
use crate::layout::{self, PAGE_SIZE};
use crate::options::Size;

/// Highest initrd address of a Linux that does not report its limit: the value in all x86-64 headers of Linux.
const INITRD_ADDR_MAX: u64 = 0x7FFF_FFFF;
/// Load alignment of a Linux that does not report its own.
const ALIGNMENT: u64 = 2 << 20;

/// Addresses at which the boot files are placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Physical address of the kernel's start.
    pub kernel: u64,
    /// Offset by which the kernel's virtual addresses move, if they are randomised.
    pub kaslr: Option<u64>,
    /// Location of the initrd.
    pub initrd: Option<Initrd>,
}

/// RAM below the MMIO hole that boot files may take.
#[derive(Debug)]
pub struct Space {
    ram_size: u64,
    /// First address past the end of the kernel as linked.
    kernel_end: u64,
    /// First address that the initrd may not occupy, whatever the RAM size.
    initrd_limit: u64,
    /// First address that the kernel may not occupy.
    end: u64,
}

/// Fails unless the kernel accepts all of `cmdline`.
pub fn check_cmdline(info: &ImageInfo, cmdline: &str) -> Result<(), Error> {
    if let Some(offset) = cmdline.bytes().position(|b| b == 0) {
        return Err(Error::CmdlineNul { offset });
    }
    let limit = match &info.setup {
        Some(setup) => setup.cmdline_size(),
        None if info.linux => CMDLINE_DEFAULT,
        None => u64::MAX,
    };
    let limit = limit.min(layout::CMDLINE_MAX - 1);
    if cmdline.len() as u64 > limit {
        return Err(Error::CmdlineTooLong { length: cmdline.len(), limit });
    }
    Ok(())
}

impl Space {
    /// Returns the space that `ram_size` bytes of RAM leave when `image` is loaded. Fails if the image cannot be
    /// loaded.
    pub fn new(ram_size: u64, image: &Image) -> Result<Space, Problem> {
        let end = ram_size.min(layout::MMIO_HOLE) / PAGE_SIZE * PAGE_SIZE;
        let info = &image.info;
        if info.end > layout::MMIO_HOLE {
            let (start, end, hole) = (info.start, info.end, layout::MMIO_HOLE);
            return Err(Problem::Unsuitable(format!("it wants memory at {start:#x}..{end:#x}, above {hole:#x}")));
        }
        // The first MiB is reserved for vireo's data, although a multiboot kernel may lie there, too.
        let kernel_end = info.end.next_multiple_of(PAGE_SIZE).max(layout::HIGH_RAM);
        if kernel_end > end {
            return Err(too_small(kernel_end, ram_size));
        }
        let initrd_limit = match &info.setup {
            Some(setup) => setup.initrd_addr_max() + 1,
            None if info.linux => INITRD_ADDR_MAX + 1,
            None => u64::MAX,
        };
        Ok(Space { ram_size, kernel_end, initrd_limit: initrd_limit.min(layout::MMIO_HOLE), end })
    }

    /// Places the initrd at the highest address that the kernel allows.
    pub fn place_initrd(&mut self, len: u64) -> Result<Initrd, Problem> {
        let limit = self.initrd_limit / PAGE_SIZE * PAGE_SIZE;
        let possible = limit.saturating_sub(self.kernel_end);
        if len > possible {
            return Err(Problem::NoPlace { size: len, limit: possible });
        }
        let pages = len.next_multiple_of(PAGE_SIZE);
        let start = self.end.min(limit).checked_sub(pages).filter(|start| *start >= self.kernel_end);
        let start = start.ok_or_else(|| too_small(self.kernel_end + pages, self.ram_size))?;
        self.end = start;
        Ok(Initrd { start, len })
    }

    /// Chooses the kernel's addresses: random ones for a Linux that can be relocated, otherwise those it was linked
    /// for. A kernel entered at its PVH entry expects to be where it was linked.
    pub fn place_kernel(
        &self,
        image: &Image,
        initrd: Option<Initrd>,
        protocol: Protocol,
        cmdline: &str,
    ) -> Result<Plan, Error> {
        let info = &image.info;
        let as_linked = Plan { kernel: info.start, kaslr: None, initrd };
        if image.relocations.is_none() || protocol != Protocol::Linux64 || kaslr::disabled(cmdline) {
            return Ok(as_linked);
        }
        let setup = info.setup.as_ref();
        let align = setup.map_or(ALIGNMENT, |setup| setup.kernel_alignment());
        // The virtual window must also have room for the memory that the kernel allocates directly after itself.
        let virtual_len = setup.map_or(0, |setup| setup.init_size()).max(image.span());
        let delta = kaslr::choose_virtual(info.start, virtual_len, align)?;
        let physical = match kaslr::memory_limited(cmdline) {
            true => None,
            false => kaslr::choose(info.start, self.end, self.kernel_end - info.start, align)?,
        };
        Ok(Plan { kernel: physical.unwrap_or(info.start), kaslr: Some(delta), initrd })
    }
}

fn too_small(needs: u64, has: u64) -> Problem {
    Problem::Memory { needs: Size(needs.next_multiple_of(1 << 20)), has: Size(has) }
}
