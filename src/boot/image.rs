//! A kernel ready to be loaded: pieces of data with physical addresses, entries, relocations.

use serde::{Deserialize, Serialize};

use super::bzimage::SetupHeader;
use super::error::Problem;
use super::kaslr::Relocations;
use super::multiboot;
use super::source::Data;
use crate::layout::PAGE_SIZE;
use crate::memory::GuestRam;

/// What is known of a kernel beside its bytes. The cache keeps it as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageInfo {
    /// The file's format in words, like `bzImage, xz`.
    pub format: String,
    /// The kernel's own version, if it tells.
    pub version: Option<String>,
    /// First physical address, as linked.
    pub start: u64,
    /// First physical address behind it, memory that it wants zeroed or for itself included.
    pub end: u64,
    /// Physical address of the 64-bit entry (Documentation/arch/x86/boot.rst, "64-bit boot protocol").
    pub entry64: Option<u64>,
    /// Physical address of the PVH entry.
    pub pvh: Option<u32>,
    /// Entry by multiboot. The cache keeps no such kernels.
    #[serde(skip)]
    pub multiboot: Option<multiboot::Start>,
    /// Whether this is Linux.
    pub linux: bool,
    /// The setup header of the bzImage that it comes from.
    pub setup: Option<SetupHeader>,
    /// Where which bytes go, sorted by address.
    pub pieces: Vec<Piece>,
}

/// Bytes and where they go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// Guest-physical address, as linked.
    pub paddr: u64,
    /// Offset in the image's data.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
}

/// A kernel with its bytes.
#[derive(Debug)]
pub struct Image {
    /// What it is.
    pub info: ImageInfo,
    /// Its bytes.
    pub data: Data,
    /// Whether `data` is a file of ours that never shrinks, with whole pages for pieces.
    pub mappable: bool,
    /// What to change when it runs at other virtual addresses; without it the kernel does not move.
    pub relocations: Option<Relocations>,
    /// A bzImage that the guest unpacks itself.
    pub packed: bool,
}

impl Image {
    /// Bytes of memory from start to end.
    pub fn span(&self) -> u64 {
        self.info.end - self.info.start
    }

    /// Puts the image at `start`. RAM is fresh, so what lies between the pieces is zero. Unpacked bytes may be moved there,
    /// so that nothing is left of them here.
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
            // A file system that can't map files can still be read from.
            if !mapped {
                self.data.copy_to(piece.offset, &ram.slice(addr, piece.len)?)?;
            }
        }
        Ok(())
    }
}
