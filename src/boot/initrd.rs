//! The files given by `--initrd`, as Linux reads them (init/initramfs.c): cpio archives, compressed or not, in sequence
//! with zeros between them.
//!
//! Only the first bytes of each file are examined: if Linux would ignore a file, or would stop reading there, a message
//! before the guest boots is better than a line in its log.

use std::path::Path;

use super::error::{Error, Problem};
use super::image::Image;
use super::initramfs::{HostFile, Piece, padding};
use super::source::Data;
use super::{BootConfig, kernel, pack};

/// Number of a file's first bytes that are examined.
const HEAD: u64 = 36 << 10;
/// Minimum number of zeros between two parts: lz4 archives have no end mark, so the kernel ends them at a block whose
/// length, four bytes, is zero (lib/decompress_unlz4.c).
const GAP: usize = 4;

/// Linux's treatment of a file.
#[derive(Debug, PartialEq, Eq)]
enum Kind {
    /// An archive; Linux reads the files that follow it, too.
    Archive,
    /// The image of a file system, for kernels with a RAM disk; no file can follow.
    FileSystem(String),
    /// Not an archive; no file can follow.
    Unknown(String),
    /// An archive in a format that Linux cannot read, with advice.
    Unreadable(&'static str),
}

fn kind(head: &[u8]) -> Kind {
    match head {
        [b'0', b'7', b'0', b'7', b'0', b'1' | b'2', ..] => Kind::Archive,
        [b'0', b'7', b'0', b'7', b'0', b'7', ..] => Kind::Unreadable(
            "this is a cpio archive in the old portable format, which Linux does not read; create it with 'cpio -H newc'",
        ),
        [0xC7, 0x71, ..] | [0x71, 0xC7, ..] => Kind::Unreadable(
            "this is a cpio archive in the old binary format, which Linux does not read; create it with 'cpio -H newc'",
        ),
        [0x04, 0x22, 0x4D, 0x18, ..] => Kind::Unreadable(
            "this is an lz4 frame, and Linux reads lz4's legacy format only; compress it with 'lz4 -l'",
        ),
        // gzip (two magic numbers), bzip2, lzma, xz, lzo, lz4, zstd: the kernel's own list (lib/decompress.c).
        [0x1F, 0x8B | 0x9E, ..]
        | [b'B', b'Z', ..]
        | [0x5D, 0, ..]
        | [0xFD, b'7', ..]
        | [0x89, b'L', ..]
        | [0x02, 0x21, ..]
        | [0x28, 0xB5, ..] => Kind::Archive,
        _ => match kernel::guess(head) {
            found if found.ends_with("file system") || found == "a squashfs image" => Kind::FileSystem(found),
            // An archive may begin with zeros.
            found => match head.iter().position(|byte| *byte != 0) {
                Some(0) => Kind::Unknown(found),
                Some(start) => kind(head.get(start..).unwrap_or_default()),
                None => Kind::Archive,
            },
        },
    }
}

/// Opens the initrds, followed by the packed initramfs.
pub(super) fn open(config: &BootConfig, image: &Image) -> Result<Vec<Piece>, Error> {
    let mut pieces = Vec::new();
    let mut gap = 0;
    for (path, n) in config.initrd.iter().zip(1..) {
        pieces.push(Piece::Bytes(vec![0; gap]));
        let is_last = n == config.initrd.len() && config.initramfs.is_none();
        let file = open_one(path, image.info.linux, is_last).map_err(|problem| problem.of_initrd(path))?;
        gap = GAP + padding(file.len);
        pieces.push(Piece::File(file));
    }
    if let Some(packed) = &config.initramfs {
        pieces.push(Piece::Bytes(vec![0; gap]));
        pieces.extend(pack::pack(config, packed, image)?);
    }
    Ok(pieces)
}

/// Opens and checks one initrd. Kernels other than Linux accept any file as a module.
fn open_one(path: &Path, linux: bool, is_last: bool) -> Result<HostFile, Problem> {
    let file = HostFile::open(path)?;
    if file.len == 0 {
        return Err(Problem::Unsuitable("this is an empty file".into()));
    }
    if !linux {
        return Ok(file);
    }
    let data = Data::File(file.file.try_clone().map_err(Problem::Open)?, file.len);
    match kind(&data.head(HEAD)?) {
        Kind::Archive => {}
        Kind::Unreadable(what) => return Err(Problem::Unsuitable(what.into())),
        Kind::FileSystem(found) | Kind::Unknown(found) if !is_last => {
            return Err(Problem::Unsuitable(format!(
                "this is {found}, not a cpio archive, and Linux would not read the files that follow it"
            )));
        }
        Kind::FileSystem(found) => log::warn!(
            "the initrd {} is {found}, not a cpio archive: only a kernel with CONFIG_BLK_DEV_RAM built in can use it \
             (root=/dev/ram0)",
            path.display()
        ),
        Kind::Unknown(found) => log::warn!(
            "the initrd {} is {found}, not a cpio archive, and Linux will ignore it; create one with 'cpio -o -H newc'",
            path.display()
        ),
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::super::testing;
    use super::super::testing::Files;
    use super::super::unpack::Compression;
    use super::*;

    #[test]
    fn what_linux_reads_is_an_archive() {
        for head in [&b"070701"[..], b"070702", b"\0\0\0\x00070701", b"\0\0", b"\x5D\0\0", b"\x89LZO", b"\x1F\x9E"] {
            assert_eq!(kind(head), Kind::Archive, "{head:?}");
        }
        for format in [Compression::Gzip, Compression::Zstd, Compression::Lz4, Compression::Bzip2] {
            assert_eq!(kind(&testing::compress(format, &[7; 100])), Kind::Archive);
        }
        assert!(matches!(kind(b"070707"), Kind::Unreadable(what) if what.ends_with("create it with 'cpio -H newc'")));
        assert!(matches!(kind(b"\x04\x22\x4D\x18"), Kind::Unreadable(what) if what.ends_with("'lz4 -l'")));
        let mut ext4 = vec![0; 2048];
        ext4[0x438..0x43A].copy_from_slice(&[0x53, 0xEF]);
        assert_eq!(kind(&ext4), Kind::FileSystem("an ext2, ext3 or ext4 file system".into()));
        assert_eq!(kind(b"hsqs"), Kind::FileSystem("a squashfs image".into()));
        assert_eq!(kind(b"plain text"), Kind::Unknown("a text file".into()));
    }

    #[test]
    fn only_the_last_file_may_be_something_else() {
        let files = Files::new();
        let text = files.write("text", b"plain text");
        assert!(open_one(&text, true, true).is_ok());
        assert!(open_one(&text, false, false).is_ok());
        let refused = open_one(&text, true, false).unwrap_err().to_string();
        assert!(refused.starts_with("this is a text file, not a cpio archive, and Linux would not read"), "{refused}");
        let frame = files.write("frame", b"\x04\x22\x4D\x18");
        assert!(open_one(&frame, true, true).unwrap_err().to_string().starts_with("this is an lz4 frame"));
        let empty = files.write("empty", b"");
        assert_eq!(open_one(&empty, false, true).unwrap_err().to_string(), "this is an empty file");
    }
}
