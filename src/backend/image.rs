//! Disk images: what may be opened and how, locked against other VMs, and by which format its bytes are read.
//!
//! A raw image is the guest's to write, so nothing in it is believed when it is opened the next time: an image that
//! says it is qcow2 is read as such, but a file that it refers to (a base image) is only opened if the user has said
//! `format=qcow2`. Otherwise a guest could write a header that names any file of the host.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use log::warn;
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use super::qcow2::{self, Qcow2Disk};
use super::raw::{DIRECT_BLOCK, RawDisk, RawKind};
use super::{AlignedBuffer, Disk, SECTOR};

/// What is in an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The disk, byte for byte.
    Raw,
    /// qcow2, which may refer to a base image.
    Qcow2,
}

/// Where writes go instead of to the image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "PathBuf", into = "PathBuf")]
pub enum Overlay {
    /// Into a file that is gone when the VM ends (`tmp`).
    Tmp,
    /// Into this qcow2 file, made if it is not there.
    File(PathBuf),
}

impl From<PathBuf> for Overlay {
    fn from(path: PathBuf) -> Self {
        if path.as_os_str() == "tmp" { Overlay::Tmp } else { Overlay::File(path) }
    }
}

impl From<Overlay> for PathBuf {
    fn from(overlay: Overlay) -> Self {
        match overlay {
            Overlay::Tmp => "tmp".into(),
            Overlay::File(path) => path,
        }
    }
}

impl FromStr for Overlay {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(PathBuf::from(text).into())
    }
}

/// How to open an image.
#[derive(Clone, Debug, Default)]
pub struct ImageOptions {
    /// The file or device.
    pub path: PathBuf,
    /// Bytes of a character device, which cannot tell.
    pub size: Option<u64>,
    /// Refuse writes, and share the image with other readers.
    pub readonly: bool,
    /// Go around the host's page cache (O_DIRECT).
    pub direct: bool,
    /// What is in it; found by content when not given.
    pub format: Option<Format>,
    /// Write elsewhere.
    pub overlay: Option<Overlay>,
}

/// Why a disk cannot be used. Displays as one sentence with the path.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be opened or examined.
    #[error("cannot open disk {}{hint}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What would help; may be empty.
        hint: &'static str,
        /// The OS error.
        source: io::Error,
    },
    /// It is no file and no block device.
    #[error("disk {} is a {kind}; a regular file or a block device is needed{hint}", path.display())]
    Kind {
        /// The file.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
        /// What would be possible; may be empty.
        hint: &'static str,
    },
    /// Not even one sector.
    #[error("disk {} has {size} bytes, which is less than one sector of 512", path.display())]
    TooSmall {
        /// The file.
        path: PathBuf,
        /// Its size.
        size: u64,
    },
    /// Direct input and output is in whole blocks.
    #[error("disk {} has {size} bytes, which are no whole blocks of {DIRECT_BLOCK} as direct=on needs", path.display())]
    DirectSize {
        /// The file.
        path: PathBuf,
        /// Its size.
        size: u64,
    },
    /// Another process holds a lock that excludes ours.
    #[error("disk {} is in use by another VM{hint}", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
        /// What would be possible; may be empty.
        hint: &'static str,
    },
    /// It is (or refers to) an image that cannot be used.
    #[error("disk {}: {what}", path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What the format's driver says.
        source: io::Error,
    },
    /// An overlay of another base.
    #[error(
        "overlay {} was made for the disk {found}, not for {}; remove it to start anew",
        path.display(), base.display()
    )]
    OtherBase {
        /// The overlay.
        path: PathBuf,
        /// What it says it lies over.
        found: String,
        /// What it shall lie over.
        base: PathBuf,
    },
    /// Two keys that exclude each other.
    #[error("disk {}: {why}", path.display())]
    Keys {
        /// The file.
        path: PathBuf,
        /// Which, and why.
        why: &'static str,
    },
}

/// Opens and locks an image and what it refers to.
pub fn open(options: &ImageOptions) -> Result<Box<dyn Disk>, Error> {
    let ImageOptions { path, size, readonly, direct, format, overlay } = options;
    let keys = |why| Error::Keys { path: path.into(), why };
    if let Some(size) = *size {
        if overlay.is_some() || format.is_some_and(|format| format != Format::Raw) {
            return Err(keys("size is that of a character device, which is a raw disk without overlay"));
        }
        let (file, metadata) = open_kinds(path, *readonly, *direct, true)?;
        if !metadata.file_type().is_char_device() {
            return Err(keys("size is for character devices; files and block devices have their own"));
        }
        return Ok(Box::new(raw_disk(file, path, RawKind::Characters, size, *direct)?));
    }
    if let Some(overlay) = overlay {
        if *readonly {
            return Err(keys("readonly and overlay exclude each other: there is nothing to write over it"));
        }
        return Ok(Box::new(qcow2::over(options, overlay)?));
    }
    let (mut file, metadata) = open_file(path, *readonly, *direct)?;
    Ok(match found_format(&mut file, path, *format)? {
        Format::Qcow2 => Box::new(Qcow2Disk::open(file, options, format.is_some())?),
        Format::Raw => Box::new(sized_disk(file, path, &metadata, *direct)?),
    })
}

/// The format that was asked for, or that the first bytes are of.
pub(super) fn found_format(file: &mut File, path: &Path, format: Option<Format>) -> Result<Format, Error> {
    if let Some(format) = format {
        return Ok(format);
    }
    // A page of it, and aligned: the file may be open for direct input and output only.
    let mut page = AlignedBuffer::new(4096);
    let start = &mut *page.as_mut_slice();
    let n = file.read(start).map_err(|source| Error::Open { path: path.into(), hint: "", source })?;
    Ok(if start.get(..4.min(n)) == Some(b"QFI\xfb") { Format::Qcow2 } else { Format::Raw })
}

/// A disk on a file or block device, which knows its size.
fn sized_disk(mut file: File, path: &Path, metadata: &Metadata, direct: bool) -> Result<RawDisk, Error> {
    let failed = |source| Error::Open { path: path.into(), hint: "", source };
    let bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
    let kind = if metadata.file_type().is_block_device() { RawKind::Blocks } else { RawKind::File };
    raw_disk(file, path, kind, bytes, direct)
}

/// A disk on the file's bytes as they are; those behind the last whole sector are not shown.
fn raw_disk(file: File, path: &Path, kind: RawKind, bytes: u64, direct: bool) -> Result<RawDisk, Error> {
    let size = bytes - bytes % SECTOR;
    if size == 0 {
        return Err(Error::TooSmall { path: path.into(), size: bytes });
    }
    if direct && !bytes.is_multiple_of(DIRECT_BLOCK) {
        return Err(Error::DirectSize { path: path.into(), size: bytes });
    }
    if size != bytes {
        let path = path.display();
        warn!("disk {path} has {bytes} bytes; the guest does not see the last {}, which are no sector", bytes - size);
    }
    Ok(RawDisk::new(file, kind, direct, size))
}

/// Opens and locks a raw disk.
#[cfg(test)]
pub(super) fn open_raw(path: &Path, readonly: bool, direct: bool) -> Result<RawDisk, Error> {
    let (file, metadata) = open_file(path, readonly, direct)?;
    sized_disk(file, path, &metadata, direct)
}

/// Opens and locks `path`. A writable disk excludes every other user, readers share. The lock goes with the file: it
/// needs no cleaning up, however this process ends.
pub(super) fn open_file(path: &Path, readonly: bool, direct: bool) -> Result<(File, Metadata), Error> {
    open_kinds(path, readonly, direct, false)
}

/// The same; a character device too, if it `may` be one.
fn open_kinds(path: &Path, readonly: bool, direct: bool, may: bool) -> Result<(File, Metadata), Error> {
    let hint = if readonly { "" } else { " for writing (readonly shares it)" };
    let failed = |source: io::Error| {
        let denied = matches!(source.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem);
        let hint = match () {
            () if denied => hint,
            () if direct && source.raw_os_error() == Some(libc::EINVAL) => ": its file system has no direct=on",
            () => "",
        };
        Error::Open { path: path.into(), hint, source }
    };
    // Before it is opened: opening a FIFO would wait for its other end, and some devices act on being opened.
    check_kind(path, &path.metadata().map_err(failed)?, may)?;
    let mut options = OpenOptions::new();
    let direct = if direct { libc::O_DIRECT } else { 0 };
    options.read(true).write(!readonly).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY | direct);
    let file = options.open(path).map_err(failed)?;
    // And again, on what was really opened.
    let metadata = file.metadata().map_err(failed)?;
    check_kind(path, &metadata, may)?;
    // io_uring would take it for an order to fail rather than to wait.
    let flags = rustix::fs::fcntl_getfl(&file).map_err(|e| failed(e.into()))?;
    rustix::fs::fcntl_setfl(&file, flags - OFlags::NONBLOCK).map_err(|e| failed(e.into()))?;
    lock_or_warn(&file, path, readonly)?;
    Ok((file, metadata))
}

/// Locks an open image; a file system without locks is told of and used.
fn lock_or_warn(file: &File, path: &Path, readonly: bool) -> Result<(), Error> {
    if is_taken(file, path, readonly) {
        let hint = if readonly { ", which writes to it" } else { "" };
        return Err(Error::InUse { path: path.into(), hint });
    }
    Ok(())
}

/// Locks an open file, if that can be; whether somebody else has a lock that excludes this one.
pub(super) fn is_taken(file: &File, path: &Path, readonly: bool) -> bool {
    match lock(file, readonly) {
        Ok(()) => false,
        Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => true,
        Err(e) => {
            warn!("{} cannot be locked and is used unlocked: {e}", path.display());
            false
        }
    }
}

fn check_kind(path: &Path, metadata: &Metadata, characters: bool) -> Result<(), Error> {
    let character_device = metadata.file_type().is_char_device();
    match unfit_kind(metadata) {
        None => Ok(()),
        Some(_) if characters && character_device => Ok(()),
        Some(kind) => {
            let hint = if character_device { ", or the size= that this one has" } else { "" };
            Err(Error::Kind { path: path.into(), kind, hint })
        }
    }
}

/// What it is, if it is neither a regular file nor a block device.
pub(super) fn unfit_kind(metadata: &Metadata) -> Option<&'static str> {
    let kind = metadata.file_type();
    match () {
        () if kind.is_file() || kind.is_block_device() => None,
        () if kind.is_dir() => Some("directory"),
        () if kind.is_fifo() => Some("FIFO"),
        () if kind.is_char_device() => Some("character device"),
        () if kind.is_socket() => Some("socket"),
        () => Some("special file"),
    }
}

/// Locks all bytes, however many there will be. The lock belongs to the open file, not to the process (F_OFD_SETLK),
/// so that closing another descriptor of the same file does not lose it; QEMU's locks collide with it as they should.
#[allow(unsafe_code)]
fn lock(file: &File, readonly: bool) -> io::Result<()> {
    let l_type = if readonly { libc::F_RDLCK } else { libc::F_WRLCK } as libc::c_short;
    let lock = libc::flock { l_type, l_whence: libc::SEEK_SET as libc::c_short, l_start: 0, l_len: 0, l_pid: 0 };
    // SAFETY: the descriptor is open and `lock` is a valid flock for the duration of the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
