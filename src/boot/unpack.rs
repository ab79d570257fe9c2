//! Compressed kernels: which compression it is, told by its magic, and how it is undone within bounds.
//!
//! Nothing here trusts a length: output grows as data really arrives and stops at a limit, so a decompression bomb
//! ends as an error.

use std::io::{self, BufReader, Read};

use super::error::Problem;
use crate::options::Size;

/// The most that a kernel may unpack to. Distributions' kernels have 30-60 MiB.
pub const UNPACKED_MAX: u64 = 512 << 20;
/// Memory that an xz dictionary may take, in KiB. `xz -9` has 64 MiB.
const XZ_MEMORY_KIB: u32 = 192 << 10;

/// How a kernel or its payload is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// RFC 1952.
    Gzip,
    /// RFC 8878.
    Zstd,
    /// The .xz format, with its BCJ filters.
    Xz,
    /// An LZ4 frame, the legacy one (`lz4 -l`, what kernels use) included.
    Lz4,
    /// bzip2.
    Bzip2,
}

impl Compression {
    /// Which compression `head`, the first bytes, begins.
    pub fn detect(head: &[u8]) -> Option<Self> {
        Some(match head {
            [0x1F, 0x8B, 8, ..] => Compression::Gzip,
            [0x28, 0xB5, 0x2F, 0xFD, ..] => Compression::Zstd,
            [0xFD, b'7', b'z', b'X', b'Z', 0, ..] => Compression::Xz,
            [0x04, 0x22, 0x4D, 0x18, ..] | [0x02, 0x21, 0x4C, 0x18, ..] => Compression::Lz4,
            [b'B', b'Z', b'h', b'1'..=b'9', 0x31, 0x41, 0x59, 0x26, 0x53, 0x59, ..] => Compression::Bzip2,
            _ => return None,
        })
    }

    /// The name of the command that makes it.
    pub fn name(self) -> &'static str {
        match self {
            Compression::Gzip => "gzip",
            Compression::Zstd => "zstd",
            Compression::Xz => "xz",
            Compression::Lz4 => "lz4",
            Compression::Bzip2 => "bzip2",
        }
    }
}

/// Unpacks all of `input`. With `size` the result must have exactly that many bytes, else at most [`UNPACKED_MAX`].
pub fn unpack(format: Compression, input: impl Read, size: Option<u64>) -> Result<Vec<u8>, Problem> {
    unpack_within(format, input, size, UNPACKED_MAX)
}

fn unpack_within(format: Compression, input: impl Read, size: Option<u64>, max: u64) -> Result<Vec<u8>, Problem> {
    let name = format.name();
    let failed = |source| Problem::Unpack { format: name, source };
    let limit = size.unwrap_or(max);
    if limit > max {
        return Err(Problem::TooLarge { format: name, limit: Size(max) });
    }
    let input = BufReader::with_capacity(64 << 10, input);
    let mut output = Vec::new();
    // A declared size is only believed as far as memory is available; pages are touched as data arrives.
    output.try_reserve_exact(size.unwrap_or(0) as usize + 1).map_err(|e| failed(io::Error::other(e)))?;
    // One byte more than wanted, to see whether there is more.
    let mut output_of = |decoder: &mut dyn Read| decoder.take(limit + 1).read_to_end(&mut output);
    match format {
        Compression::Gzip => output_of(&mut flate2::bufread::GzDecoder::new(input)),
        Compression::Zstd => match ruzstd::decoding::StreamingDecoder::new(input) {
            Ok(mut decoder) => output_of(&mut decoder),
            Err(e) => Err(io::Error::other(e)),
        },
        Compression::Xz => output_of(&mut lzma_rust2::XzReader::new_mem_limit(input, false, XZ_MEMORY_KIB)),
        Compression::Lz4 => output_of(&mut lz4_flex::frame::FrameDecoder::new(input)),
        Compression::Bzip2 => output_of(&mut bzip2::bufread::BzDecoder::new(input)),
    }
    .map_err(failed)?;
    match (output.len() as u64, size) {
        (len, _) if len > limit => Err(Problem::TooLarge { format: name, limit: Size(limit) }),
        (has, Some(needs)) if has < needs => Err(Problem::Truncated { what: "the unpacked kernel", needs, has }),
        _ => Ok(output),
    }
}
