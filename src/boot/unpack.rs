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

/// The same with another limit.
pub fn unpack_within(format: Compression, input: impl Read, size: Option<u64>, max: u64) -> Result<Vec<u8>, Problem> {
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    // What the commands make of CONTENT: `xz --check=crc32 --x86 --lzma2=dict=1MiB`, `zstd -19 --no-check`,
    // `lz4 -l -9`, `lz4 -9`.
    const CONTENT: &[u8] = b"\xe8\x10\x00\x00\x00vireo";
    const XZ: &[u8] =
        b"\xfd\x37\x7a\x58\x5a\x00\x00\x01\x69\x22\xde\x36\x02\x01\x04\x00\x21\x01\x10\x00\x8b\x21\x6f\x49\xe0\x01\
        \x2b\x00\x45\x5d\x00\x74\x05\x3c\x19\x37\x28\x2f\x86\xb7\xb0\x60\x54\xee\xae\x62\x8e\x13\x67\xcc\xaf\x8e\
        \x3f\x96\x60\x3b\x6c\x2a\xa5\xa6\xed\x28\xf9\x61\x46\x9e\x84\x8c\x35\x9b\x88\x66\xd4\x5b\x44\x0a\x89\xa7\
        \x9f\xd2\x89\x8e\x24\x9a\x15\x01\x91\x37\x5b\x0e\x66\x27\x9f\x6e\x85\x7f\x7d\x60\x62\x98\x00\x00\x00\x00\
        \xc0\x55\xd9\x30\x00\x01\x5d\xac\x02\x00\x00\x00\xe8\x75\x9b\x6c\x3e\x30\x0d\x8b\x02\x00\x00\x00\x00\x01\
        \x59\x5a";
    const ZSTD: &[u8] =
        b"\x28\xb5\x2f\xfd\x00\x68\x8d\x00\x00\x50\xe8\x10\x00\x00\x00\x76\x69\x72\x65\x6f\x01\x00\x1f\x55\x0b\x12";
    const LZ4_LEGACY: &[u8] =
        b"\x02\x21\x4c\x18\x15\x00\x00\x00\xaf\xe8\x10\x00\x00\x00\x76\x69\x72\x65\x6f\x0a\x00\xff\x0b\x50\x76\x69\
        \x72\x65\x6f";
    const LZ4_FRAME: &[u8] =
        b"\x04\x22\x4d\x18\x64\x40\xa7\x15\x00\x00\x00\xaf\xe8\x10\x00\x00\x00\x76\x69\x72\x65\x6f\x0a\x00\xff\x0b\
        \x50\x76\x69\x72\x65\x6f\x00\x00\x00\x00\x88\x1f\x76\xee";

    fn fixtures() -> Vec<(Compression, Vec<u8>)> {
        let content = CONTENT.repeat(30);
        vec![
            (Compression::Xz, XZ.to_vec()),
            (Compression::Zstd, ZSTD.to_vec()),
            (Compression::Lz4, LZ4_LEGACY.to_vec()),
            (Compression::Lz4, LZ4_FRAME.to_vec()),
            (Compression::Gzip, super::super::testing::compress(Compression::Gzip, &content)),
            (Compression::Bzip2, super::super::testing::compress(Compression::Bzip2, &content)),
        ]
    }

    #[test]
    fn every_compression_is_told_and_undone() {
        for (format, packed) in fixtures() {
            assert_eq!(Compression::detect(&packed), Some(format));
            for size in [None, Some(300)] {
                assert_eq!(unpack(format, &packed[..], size).unwrap(), CONTENT.repeat(30), "{format:?}");
            }
        }
    }

    #[test]
    fn sizes_are_kept_to_exactly() {
        for (format, packed) in fixtures() {
            let error = |size, max| unpack_within(format, &packed[..], size, max).unwrap_err().to_string();
            let name = format.name();
            assert_eq!(error(Some(301), 1000), "truncated: the unpacked kernel needs 301 bytes, has 300");
            assert_eq!(error(Some(299), 1000), format!("its {name} data unpacks to more than 299"));
            assert_eq!(error(None, 299), format!("its {name} data unpacks to more than 299"));
            assert_eq!(error(Some(u32::MAX.into()), 1 << 20), format!("its {name} data unpacks to more than 1M"));
        }
    }

    #[test]
    fn a_bomb_stops_at_the_limit() {
        let bomb = super::super::testing::compress(Compression::Gzip, &vec![0; 8 << 20]);
        assert!(bomb.len() < 16 << 10);
        let error = unpack_within(Compression::Gzip, &bomb[..], None, 1 << 20).unwrap_err();
        assert_eq!(error.to_string(), "its gzip data unpacks to more than 1M");
    }

    proptest! {
        #[test]
        fn damaged_data_never_panics(which in 0usize..6, flips in proptest::collection::vec((0usize..400, 0u8..8), 0..4),
                                     keep in 0usize..400) {
            let (format, mut packed) = fixtures().swap_remove(which);
            for (at, bit) in flips {
                let at = at % packed.len();
                packed[at] ^= 1 << bit;
            }
            packed.truncate(keep.max(8));
            let _ = unpack_within(format, &packed[..], None, 64 << 10);
            let _ = unpack_within(format, &packed[..], Some(300), 64 << 10);
        }
    }
}
