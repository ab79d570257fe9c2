//! Compressed kernels: detecting the compression by its magic number, and unpacking within bounds.
//!
//! No declared length is trusted: the output grows as data really arrives and stops at a limit, so a decompression bomb
//! ends as an error.

mod lz4;

use std::io::{self, BufRead, BufReader, Read};

use super::error::Problem;
use crate::memory::Pages;
use crate::options::Size;

/// Largest size that a kernel may unpack to. Distributions' kernels have 30-60 MiB.
pub const UNPACKED_MAX: u64 = 512 << 20;
/// Largest memory for an xz dictionary. `xz -9` uses 64 MiB, Linux's build 128 MiB.
const XZ_MEMORY: u64 = 192 << 20;
/// Logarithm of the largest window of zstd data: `zstd --ultra -22`, which compresses Linux in its build, uses 128 MiB.
const ZSTD_WINDOW_LOG: u32 = 27;

/// Compression format of a kernel or its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// RFC 1952.
    Gzip,
    /// RFC 8878.
    Zstd,
    /// The .xz format, with its BCJ filters.
    Xz,
    /// An LZ4 frame, including the legacy frame (`lz4 -l`), which kernels use.
    Lz4,
    /// bzip2.
    Bzip2,
}

impl Compression {
    /// Detects the compression from `head`, the first bytes of the data.
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

    /// Returns the name of the command that compresses in this format.
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

/// Unpacks all of `input` to exactly `size` bytes, in pages that can become the guest's.
pub fn unpack_to_pages(format: Compression, input: impl Read, size: u64) -> Result<Pages, Problem> {
    let name = format.name();
    let failed = |source| Problem::Unpack { format: name, source };
    if size > UNPACKED_MAX {
        return Err(Problem::TooLarge { format: name, limit: Size(UNPACKED_MAX) });
    }
    // A declared size is believed only as far as memory is available; pages are touched as data arrives.
    let mut pages = Pages::new(size).map_err(failed)?;
    let mut input = BufReader::with_capacity(64 << 10, input);
    let lz4_blocks = format == Compression::Lz4 && input.fill_buf().map_err(failed)?.starts_with(&lz4::LEGACY);
    let has = match lz4_blocks {
        true => lz4::unpack_blocks(input, &mut pages),
        false => with_decoder(format, input, |decoder| fill(decoder, &mut pages)),
    };
    match has.map_err(failed)? {
        Filled::Overflow => Err(Problem::TooLarge { format: name, limit: Size(size) }),
        Filled::Bytes(has) if has < size => Err(Problem::Truncated { what: "the unpacked kernel", needs: size, has }),
        Filled::Bytes(_) => Ok(pages),
    }
}

/// Unpacks all of `input`, at most [`UNPACKED_MAX`] bytes.
pub fn unpack(format: Compression, input: impl Read) -> Result<Vec<u8>, Problem> {
    unpack_within(format, input, UNPACKED_MAX)
}

/// Unpacks all of `input`, at most `limit` bytes.
pub fn unpack_within(format: Compression, input: impl Read, limit: u64) -> Result<Vec<u8>, Problem> {
    let name = format.name();
    let mut output = Vec::new();
    let input = BufReader::with_capacity(64 << 10, input);
    // One byte more than the limit shows whether there is more.
    with_decoder(format, input, |decoder| decoder.take(limit + 1).read_to_end(&mut output))
        .map_err(|source| Problem::Unpack { format: name, source })?;
    if output.len() as u64 > limit {
        return Err(Problem::TooLarge { format: name, limit: Size(limit) });
    }
    Ok(output)
}

/// Result of filling a buffer.
#[derive(Debug, PartialEq, Eq)]
enum Filled {
    /// The input ended after this many bytes.
    Bytes(u64),
    /// The input has more bytes than fit.
    Overflow,
}

/// Reads all output of `decoder` into `buffer`, to its very end: decoders check their checksums only after the last
/// byte.
fn fill(decoder: &mut dyn Read, buffer: &mut [u8]) -> io::Result<Filled> {
    let mut at = 0;
    loop {
        let mut more = [0];
        let space = if at < buffer.len() { &mut buffer[at..] } else { &mut more[..] };
        match decoder.read(space) {
            Ok(0) => return Ok(Filled::Bytes(at as u64)),
            Ok(_) if at == buffer.len() => return Ok(Filled::Overflow),
            Ok(n) => at += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// Calls `take` with a reader of the unpacked `input`.
fn with_decoder<T>(
    format: Compression,
    input: impl BufRead,
    take: impl FnOnce(&mut dyn Read) -> io::Result<T>,
) -> io::Result<T> {
    match format {
        Compression::Gzip => take(&mut flate2::bufread::GzDecoder::new(input)),
        Compression::Zstd => {
            let mut decoder = zstd::Decoder::with_buffer(input)?.single_frame();
            decoder.window_log_max(ZSTD_WINDOW_LOG)?;
            take(&mut decoder)
        }
        Compression::Xz => {
            let stream = liblzma::stream::Stream::new_stream_decoder(XZ_MEMORY, 0)?;
            take(&mut liblzma::bufread::XzDecoder::new_stream(input, stream))
        }
        Compression::Lz4 => take(&mut lz4_flex::frame::FrameDecoder::new(input)),
        Compression::Bzip2 => take(&mut bzip2::bufread::BzDecoder::new(input)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    // Output of these commands for CONTENT: `xz --check=crc32 --x86 --lzma2=dict=1MiB`, `zstd -19 --no-check`,
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
            assert_eq!(unpack(format, &packed[..]).unwrap(), CONTENT.repeat(30), "{format:?}");
            assert_eq!(unpack_to_pages(format, &packed[..], 300).unwrap()[..], CONTENT.repeat(30), "{format:?}");
        }
    }

    #[test]
    fn sizes_are_kept_to_exactly() {
        for (format, packed) in fixtures() {
            let pages = |size| unpack_to_pages(format, &packed[..], size).unwrap_err().to_string();
            let name = format.name();
            assert_eq!(pages(301), "truncated: the unpacked kernel needs 301 bytes, has 300");
            for size in [299, 100, 0] {
                assert_eq!(pages(size), format!("its {name} data unpacks to more than {size}"));
            }
            assert_eq!(pages(u32::MAX.into()), format!("its {name} data unpacks to more than 512M"));
            let error = unpack_within(format, &packed[..], 299).unwrap_err().to_string();
            assert_eq!(error, format!("its {name} data unpacks to more than 299"));
        }
    }

    #[test]
    fn a_bomb_stops_at_the_limit() {
        let bomb = super::super::testing::compress(Compression::Gzip, &vec![0; 8 << 20]);
        assert!(bomb.len() < 16 << 10);
        let error = unpack_within(Compression::Gzip, &bomb[..], 1 << 20).unwrap_err();
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
            let _ = unpack_within(format, &packed[..], 64 << 10);
            let _ = unpack_to_pages(format, &packed[..], 300);
        }
    }
}
