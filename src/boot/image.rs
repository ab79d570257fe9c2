//! A kernel ready to be loaded: pieces of data with physical addresses, entries, relocations.

use serde::{Deserialize, Serialize};

use super::bzimage::SetupHeader;
use super::error::Problem;
use super::kaslr::Relocations;
use super::multiboot;
use super::source::Data;
use crate::layout::PAGE_SIZE;
use crate::memory::GuestRam;

/// Limit on the bytes of a kernel that are searched, which is the limit on unpacked kernels: a file can be sparse and huge.
const SEARCHED_MAX: u64 = super::unpack::UNPACKED_MAX;

/// Everything known about a kernel except its bytes. The cache stores it unchanged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageInfo {
    /// The file's format in words, like `bzImage, xz`.
    pub format: String,
    /// The kernel's own version, if the kernel reports it.
    pub version: Option<String>,
    /// First physical address, as linked.
    pub start: u64,
    /// First physical address past the end, including memory that the kernel wants zeroed or reserved for itself.
    pub end: u64,
    /// Physical address of the 64-bit entry (Documentation/arch/x86/boot.rst, "64-bit boot protocol").
    pub entry64: Option<u64>,
    /// Physical address of the PVH entry.
    pub pvh: Option<u32>,
    /// Multiboot entry. The cache does not keep kernels that have one.
    #[serde(skip)]
    pub multiboot: Option<multiboot::Start>,
    /// True if the kernel is Linux.
    pub linux: bool,
    /// Setup header of the bzImage that contained the kernel.
    pub setup: Option<SetupHeader>,
    /// Pieces of data and their addresses, sorted by address.
    pub pieces: Vec<Piece>,
}

/// A range of the image's data and its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// Guest-physical address, as linked.
    pub paddr: u64,
    /// Offset in the image's data.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

/// A kernel with its bytes.
#[derive(Debug)]
pub struct Image {
    /// Description of the kernel.
    pub info: ImageInfo,
    /// Bytes that the pieces refer to.
    pub data: Data,
    /// True if `data` is one of vireo's own files, which never shrink, and the pieces are whole pages.
    pub mappable: bool,
    /// Places to change when the kernel runs at other virtual addresses; without them the kernel is not moved.
    pub relocations: Option<Relocations>,
    /// True if this is a bzImage that the guest unpacks itself.
    pub packed: bool,
}

impl Image {
    /// Returns the number of bytes of memory from start to end.
    pub fn span(&self) -> u64 {
        self.info.end - self.info.start
    }

    /// Returns whether the loaded pieces contain a `needle`, as `Data::find` does. The rest of the file is not searched:
    /// neither symbols nor appended bytes are part of the kernel.
    pub fn find(&self, needle: &[u8], rare: usize, mut wanted: impl FnMut(&[u8]) -> bool) -> Result<bool, Problem> {
        let mut left = SEARCHED_MAX;
        for piece in &self.info.pieces {
            let len = piece.len.min(left);
            if self.data.find(piece.offset..piece.offset.saturating_add(len), needle, rare, &mut wanted)? {
                return Ok(true);
            }
            left -= len;
        }
        Ok(false)
    }

    /// Loads the image at `start`. RAM is fresh, so the gaps between the pieces are already zero. Unpacked bytes may be
    /// moved to the guest, so that vireo keeps no copy.
    pub fn load(&mut self, ram: &GuestRam, start: u64) -> Result<(), Problem> {
        for piece in &self.info.pieces {
            let addr = start + (piece.paddr - self.info.start);
            let mapped = match &mut self.data {
                Data::Pages(pages) => {
                    ram.take_pages(addr, pages, piece.offset..piece.offset + piece.len)?;
                    true
                }
                Data::File(file, _) if self.mappable && ram.can_map_files() && addr.is_multiple_of(PAGE_SIZE) => {
                    ram.map_file(addr, piece.len, file, piece.offset).is_ok()
                }
                _ => false,
            };
            // A file on a file system that cannot map files can still be read.
            if !mapped {
                self.data.copy_to(piece.offset, &ram.slice(addr, piece.len)?)?;
            }
        }
        Ok(())
    }
}
