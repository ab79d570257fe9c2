//! Address space randomisation of an unpacked Linux, as its own decompressor does it (arch/x86/boot/compressed/misc.c,
//! `handle_relocations`, and kaslr.c).
//!
//! In a bzImage's payload, tables of 32-bit entries follow the ELF file. Each table begins with a zero:
//!
//! ```text
//! 0, places of 64-bit addresses, 0, places of 32-bit offsets to subtract from, 0, places of 32-bit addresses
//! ```
//!
//! Newer kernels do not have the middle table. An entry is the place's virtual address, sign-extended.

use std::io;

use vm_memory::VolatileMemory;

use super::error::{Error, Problem};
use super::source::Data;
use crate::memory::{OutOfRam, RamSlice};

/// Virtual address to which physical address 0 is linked, `__START_KERNEL_map`.
pub const START_KERNEL_MAP: u64 = 0xFFFF_FFFF_8000_0000;
/// `KERNEL_IMAGE_SIZE` with randomisation: the kernel's virtual window.
const KERNEL_IMAGE_SIZE: u64 = 1 << 30;
/// Limit on the tables that are read and kept, more than any kernel has.
pub const TABLES_MAX: u64 = 64 << 20;

/// Places of a kernel that hold its own addresses, as offsets from its start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Relocations {
    /// Little-endian `u32` offsets, one table after another.
    bytes: Vec<u8>,
    /// Number of places with 64-bit addresses, inverse 32-bit offsets and 32-bit addresses.
    counts: [u32; 3],
}

impl Relocations {
    /// Reads the tables that follow the ELF part of `data`, which ends at `end`. Returns None if nothing or something
    /// else follows. `virt` is the image's virtual start, `len` its length in memory.
    pub fn parse(data: &Data, end: u64, virt: u64, len: u64) -> Result<Option<Relocations>, Problem> {
        let tail_len = data.len() - end.min(data.len());
        if tail_len < 12 || !tail_len.is_multiple_of(4) || tail_len > TABLES_MAX {
            return Ok(None);
        }
        let mut bytes = data.bytes(end, tail_len)?;
        let is_zero = |entry: &[u8]| *entry == [0; 4];
        if !is_zero(&bytes[..4]) {
            return Ok(None);
        }
        let mut tables: Vec<u32> = Vec::new();
        let mut kept = 0;
        for at in (0..bytes.len()).step_by(4) {
            let entry = [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]];
            if is_zero(&entry) {
                tables.push(0);
                if tables.len() > 3 {
                    return Ok(None);
                }
                continue;
            }
            let place = i64::from(i32::from_le_bytes(entry)) as u64;
            let width = if tables.len() == 1 { 8 } else { 4 };
            let offset = place.wrapping_sub(virt);
            if offset > len.saturating_sub(width) || offset > u64::from(u32::MAX) {
                return Err(Problem::Damaged(format!("a relocation at {place:#x}, outside of the kernel")));
            }
            bytes[kept..kept + 4].copy_from_slice(&(offset as u32).to_le_bytes());
            kept += 4;
            if let Some(count) = tables.last_mut() {
                *count += 1;
            }
        }
        bytes.truncate(kept);
        let counts = match tables[..] {
            [to64, inverse, to32] => [to64, inverse, to32],
            [to64, to32] => [to64, 0, to32],
            _ => return Ok(None),
        };
        Ok(Some(Relocations { bytes, counts }))
    }

    /// Restores relocations from the result of [`Relocations::raw`]; None if the counts do not fit.
    pub fn from_raw(bytes: Vec<u8>, counts: [u32; 3]) -> Option<Relocations> {
        let sum: u64 = counts.iter().map(|c| u64::from(*c) * 4).sum();
        (sum == bytes.len() as u64).then_some(Relocations { bytes, counts })
    }

    /// Returns the offsets as bytes, and the number of each kind.
    pub fn raw(&self) -> (&[u8], [u32; 3]) {
        (&self.bytes, self.counts)
    }

    /// Returns the total number of places.
    pub fn count(&self) -> usize {
        self.bytes.len() / 4
    }

    /// Moves the kernel in `image`, which is the whole kernel, up by `delta` virtual bytes.
    pub fn apply(&self, image: &RamSlice<'_>, delta: u64) -> Result<(), OutOfRam> {
        let [to64, inverse, _] = self.counts.map(|count| count as usize * 4);
        let (to64, rest) = self.bytes.split_at(to64);
        let (inverse, to32) = rest.split_at(inverse);
        // 32-bit places hold the low half of a sign-extended address, so wrapping arithmetic is right.
        let delta32 = delta as u32;
        for offset in offsets(to64) {
            let place = image.get_ref::<u64>(offset).map_err(|_| outside(image, offset))?;
            place.store(place.load().wrapping_add(delta));
        }
        for offset in offsets(inverse) {
            let place = image.get_ref::<u32>(offset).map_err(|_| outside(image, offset))?;
            place.store(place.load().wrapping_sub(delta32));
        }
        for offset in offsets(to32) {
            let place = image.get_ref::<u32>(offset).map_err(|_| outside(image, offset))?;
            place.store(place.load().wrapping_add(delta32));
        }
        Ok(())
    }
}

fn offsets(table: &[u8]) -> impl Iterator<Item = usize> + '_ {
    table.chunks_exact(4).map(|entry| u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]) as usize)
}

fn outside(image: &RamSlice<'_>, offset: usize) -> OutOfRam {
    OutOfRam { addr: offset as u64, len: image.len() as u64 }
}

/// Returns whether the user wants the kernel where it was linked. The kernel's decompressor searches for the same word,
/// at any position.
pub fn disabled(cmdline: &str) -> bool {
    words(cmdline).any(|word| word == "nokaslr")
}

/// Adds `nokaslr` for a debugger, whose symbols are at the linked addresses, unless the user chose `kaslr` or
/// `nokaslr`.
pub fn settled(cmdline: &str) -> String {
    if words(cmdline).any(|word| word == "kaslr" || word == "nokaslr") {
        return cmdline.into();
    }
    // It goes in front, because everything after "--" is for init.
    format!("nokaslr {cmdline}").trim_end().into()
}

/// Returns whether the user limits the memory that the kernel may use, so that a random physical address could be
/// outside.
pub fn memory_limited(cmdline: &str) -> bool {
    words(cmdline).any(|word| word.starts_with("mem=") || word.starts_with("memmap="))
}

fn words(cmdline: &str) -> impl Iterator<Item = &str> {
    cmdline.split(|c: char| c <= ' ')
}

/// Returns a random address for `len` bytes in `start..end`: `start` or a multiple of `align` above it. Returns None if
/// there is no room at all.
pub fn choose(start: u64, end: u64, len: u64, align: u64) -> Result<Option<u64>, Error> {
    let Some(room) = end.checked_sub(start).and_then(|space| space.checked_sub(len)) else {
        return Ok(None);
    };
    let slots = room / align + 1;
    // Taking 64 random bits modulo a few thousand slots has a negligible bias.
    let slot = u64::from_le_bytes(random()?) % slots;
    Ok(Some(start + slot * align))
}

/// Returns a random offset for the virtual addresses of an image of `len` bytes that is linked at `start`.
pub fn choose_virtual(start: u64, len: u64, align: u64) -> Result<u64, Error> {
    Ok(choose(start, KERNEL_IMAGE_SIZE, len, align)?.map_or(0, |addr| addr - start))
}

/// Returns random bytes from the host.
pub fn random<const N: usize>() -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        match rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty()) {
            Ok(n) => filled += n,
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(Error::Random(io::Error::from(e))),
        }
    }
    Ok(bytes)
}
