//! Disk images: opening them, locking them against other VMs, and choosing the format by which their bytes are read.
//!
//! The guest writes a raw image, so the image's content is not trusted the next time. Without `format=`:
//! - An image that begins like qcow2 is written to as qcow2 only if its name says so too (`.qcow2`); otherwise the
//!   guest may have written that beginning, and the user is asked for the format. For reading only, it is used as qcow2
//!   whatever its name.
//! - A file that a qcow2 image refers to (its base image) is not opened: a guest could name any file of the host.
//! - An image that is named qcow2 but does not begin like it is refused: as a raw disk, its guest could make it qcow2.
//! - Other formats are refused, and the error names them. A guest that writes such a beginning to its raw disk gets the
//!   same treatment: it continues undisturbed, and at the next start the user is asked. The first sector needs no
//!   protection.
//!
//! With `format=raw` all bytes are the guest's.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use log::{info, warn};
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use super::detect::{self, Content, Foreign};
use super::held;
use super::qcow2::{self, Qcow2Disk};
use super::raw::{DIRECT_BLOCK, RawDisk, RawKind};
use super::{Disk, SECTOR};

/// Maximum wait for a lock that another process may hold only for a moment.
const LOCK_WAIT: Duration = Duration::from_millis(250);

/// Format of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The disk, byte for byte.
    Raw,
    /// qcow2, which may refer to a base image.
    Qcow2,
}

/// Destination of writes other than the image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "PathBuf", into = "PathBuf")]
pub enum Overlay {
    /// A file that is removed when the VM ends (`tmp`).
    Tmp,
    /// The given qcow2 file, which is created if it is missing.
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

/// Options for opening an image.
#[derive(Clone, Debug, Default)]
pub struct ImageOptions {
    /// Path of the file or device.
    pub path: PathBuf,
    /// Size in bytes of a character device, which cannot report it.
    pub size: Option<u64>,
    /// Refuses writes, and shares the image with other readers.
    pub readonly: bool,
    /// Bypasses the host's page cache (O_DIRECT).
    pub direct: bool,
    /// Format of the image; detected by content and name if not given.
    pub format: Option<Format>,
    /// Destination of writes, if not the image.
    pub overlay: Option<Overlay>,
}

/// Reasons why a disk cannot be used. Displays as one sentence with the path.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be opened or examined.
    #[error("cannot open disk {}{hint}", path.display())]
    Open {
        /// Path of the file.
        path: PathBuf,
        /// Advice for the user; may be empty.
        hint: &'static str,
        /// The OS error.
        source: io::Error,
    },
    /// The path is neither a regular file nor a block device.
    #[error("disk {} is a {kind}; a regular file or a block device is needed{hint}", path.display())]
    Kind {
        /// Path of the file.
        path: PathBuf,
        /// Kind of file that it is.
        kind: &'static str,
        /// Another possibility; may be empty.
        hint: &'static str,
    },
    /// The disk is smaller than one sector.
    #[error("disk {} has {size} bytes, which is less than one sector of 512", path.display())]
    TooSmall {
        /// Path of the file.
        path: PathBuf,
        /// Size of the file.
        size: u64,
    },
    /// The size is not a multiple of the blocks of direct I/O.
    #[error("disk {} has {size} bytes; direct=on needs a multiple of {DIRECT_BLOCK}", path.display())]
    DirectSize {
        /// Path of the file.
        path: PathBuf,
        /// Size of the file.
        size: u64,
    },
    /// Another process holds a lock that excludes ours.
    #[error("disk {} is in use by another VM{hint}", path.display())]
    InUse {
        /// Path of the file.
        path: PathBuf,
        /// More about the other user; may be empty.
        hint: &'static str,
    },
    /// The disk is an image that cannot be used, or refers to one.
    #[error("disk {} {what}", path.display())]
    Image {
        /// Path of the file.
        path: PathBuf,
        /// Predicate of the sentence.
        what: &'static str,
        /// Error from the format's driver.
        source: io::Error,
    },
    /// An image in a format that vireo does not read.
    #[error(
        "disk {0} is a {1} image, which vireo does not read; 'qemu-img convert -f {2} -O qcow2 {0} {0}.qcow2' converts it, \
         and format=raw gives the guest its bytes as they are",
        path.display(), foreign.name, foreign.driver
    )]
    Foreign {
        /// Path of the file.
        path: PathBuf,
        /// Format of the image.
        foreign: &'static Foreign,
    },
    /// Content and name disagree, and a guest may have written the content.
    #[error("disk {} {why}", path.display())]
    Ambiguous {
        /// Path of the file.
        path: PathBuf,
        /// Sentence about the contradiction, and the option that resolves it.
        why: &'static str,
    },
    /// The file for overlay=tmp cannot be created.
    #[error(
        "cannot create the file for overlay=tmp in {} (set TMPDIR to use another folder){why}",
        folder.display()
    )]
    Temporary {
        /// Folder for temporary files.
        folder: PathBuf,
        /// Further reason; may be empty.
        why: &'static str,
        /// The OS error.
        source: io::Error,
    },
    /// The overlay belongs to another base.
    #[error(
        "overlay {} was created for the disk {found}, not for {}; remove it to start over",
        path.display(), base.display()
    )]
    OtherBase {
        /// Path of the overlay.
        path: PathBuf,
        /// Base that the overlay names.
        found: String,
        /// Base that the overlay must have.
        base: PathBuf,
    },
    /// Two options exclude each other.
    #[error("disk {}: {why}", path.display())]
    Keys {
        /// Path of the file.
        path: PathBuf,
        /// Names of the options, and the reason.
        why: &'static str,
    },
}

/// Opens and locks an image and the images that it refers to.
pub fn open(options: &ImageOptions) -> Result<Box<dyn Disk>, Error> {
    let ImageOptions { path, size, readonly, direct, format, overlay } = options;
    let keys = |why| Error::Keys { path: path.into(), why };
    if let Some(size) = *size {
        if overlay.is_some() || format.is_some_and(|format| format != Format::Raw) {
            return Err(keys("size is only for a character device, which must be a raw disk without overlay"));
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
    let (file, metadata) = open_file(path, *readonly, *direct)?;
    Ok(match found_format(&file, path, *format, !readonly)? {
        Format::Qcow2 => Box::new(Qcow2Disk::open(file, options, format.is_some())?),
        Format::Raw => Box::new(sized_disk(file, path, &metadata, *direct)?),
    })
}

/// Returns the requested format, or the one on which content and name agree. For an image that is only read, the
/// content decides.
pub(super) fn found_format(file: &File, path: &Path, format: Option<Format>, write: bool) -> Result<Format, Error> {
    if let Some(format) = format {
        return Ok(format);
    }
    let content = detect::content(file).map_err(|source| Error::Open { path: path.into(), hint: "", source })?;
    let ambiguous = |why| Err(Error::Ambiguous { path: path.into(), why });
    match (content, detect::is_named_qcow2(path)) {
        (Content::Foreign(foreign), _) => Err(Error::Foreign { path: path.into(), foreign }),
        (Content::Qcow2, false) if write => ambiguous(
            "begins like a qcow2 image, but is not named like one, and a guest may have written that: add format=qcow2 \
             if it is one, or format=raw if all of its bytes are the guest's",
        ),
        (Content::Qcow2, _) => {
            info!("disk {} begins like a qcow2 image and is used as one", path.display());
            Ok(Format::Qcow2)
        }
        (Content::Unmarked, true) => ambiguous(
            "is named like a qcow2 image but does not begin like one: add format=raw if all of its bytes are the guest's",
        ),
        (Content::Unmarked, false) => Ok(Format::Raw),
    }
}

/// Creates a disk on a file or block device, which knows its size.
fn sized_disk(mut file: File, path: &Path, metadata: &Metadata, direct: bool) -> Result<RawDisk, Error> {
    let failed = |source| Error::Open { path: path.into(), hint: "", source };
    let bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
    let kind = if metadata.file_type().is_block_device() { RawKind::Blocks } else { RawKind::File };
    raw_disk(file, path, kind, bytes, direct)
}

/// Creates a disk on the file's bytes as they are; bytes past the last whole sector are hidden.
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
        warn!(
            "disk {path} has {bytes} bytes; the last {} do not fill a sector and are hidden from the guest",
            bytes - size
        );
    }
    Ok(RawDisk::new(file, kind, direct, size))
}

/// Opens and locks a raw disk.
#[cfg(test)]
pub(super) fn open_raw(path: &Path, readonly: bool, direct: bool) -> Result<RawDisk, Error> {
    let (file, metadata) = open_file(path, readonly, direct)?;
    sized_disk(file, path, &metadata, direct)
}

/// Opens and locks `path`. A writable disk excludes every other user; readers share. The lock is released with the
/// file, so it needs no cleaning up, however this process ends.
pub(super) fn open_file(path: &Path, readonly: bool, direct: bool) -> Result<(File, Metadata), Error> {
    open_kinds(path, readonly, direct, false)
}

/// Opens and locks `path` like [`open_file`]; with `may`, a character device is allowed too.
fn open_kinds(path: &Path, readonly: bool, direct: bool, may: bool) -> Result<(File, Metadata), Error> {
    let (file, metadata) = open_unlocked(path, readonly, direct, may)?;
    lock_or_warn(&file, path, readonly)?;
    Ok((file, metadata))
}

/// The same without a lock, for a look that keeps nobody away.
pub(super) fn open_unlocked(path: &Path, readonly: bool, direct: bool, may: bool) -> Result<(File, Metadata), Error> {
    let hint = if readonly { "" } else { " for writing (readonly shares it)" };
    let failed = |source: io::Error| {
        let denied = matches!(source.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem);
        let hint = match () {
            () if denied => hint,
            () if direct && source.raw_os_error() == Some(libc::EINVAL) => {
                ": its file system does not support direct=on"
            }
            () => "",
        };
        Error::Open { path: path.into(), hint, source }
    };
    let file = held::path(path);
    // Check before opening: opening a FIFO would wait for its other end, and some devices act on being opened.
    check_kind(path, &file.metadata().map_err(failed)?, may)?;
    let mut options = OpenOptions::new();
    let direct = if direct { libc::O_DIRECT } else { 0 };
    options.read(true).write(!readonly).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY | direct);
    let file = options.open(file).map_err(failed)?;
    // Check again what was really opened.
    let metadata = file.metadata().map_err(failed)?;
    check_kind(path, &metadata, may)?;
    // With O_NONBLOCK, io_uring would fail requests that must wait.
    let flags = rustix::fs::fcntl_getfl(&file).map_err(|e| failed(e.into()))?;
    rustix::fs::fcntl_setfl(&file, flags - OFlags::NONBLOCK).map_err(|e| failed(e.into()))?;
    Ok((file, metadata))
}

/// Locks an open image. If its file system has no locks, logs a warning and uses it unlocked.
fn lock_or_warn(file: &File, path: &Path, readonly: bool) -> Result<(), Error> {
    if is_taken(file, path, readonly) {
        let hint = if readonly { ", which writes to it" } else { "" };
        return Err(Error::InUse { path: path.into(), hint });
    }
    Ok(())
}

/// Locks an open file, if its file system has locks. Returns true if another process has a lock that excludes this one.
///
/// Waits for up to [`LOCK_WAIT`]: a child process that was just forked has its parent's descriptors, and with them the
/// locks, until it executes its own program. Without the wait, a VM that starts just after another one has ended could
/// be refused.
pub(super) fn is_taken(file: &File, path: &Path, readonly: bool) -> bool {
    let deadline = Instant::now() + LOCK_WAIT;
    loop {
        match lock(file, readonly) {
            Ok(()) => return false,
            Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                if Instant::now() > deadline {
                    return true;
                }
                thread::sleep(Duration::from_millis(1));
            }
            Err(e) => {
                warn!("cannot lock {}, using it unlocked: {e}", path.display());
                return false;
            }
        }
    }
}

fn check_kind(path: &Path, metadata: &Metadata, characters: bool) -> Result<(), Error> {
    let character_device = metadata.file_type().is_char_device();
    match unfit_kind(metadata) {
        None => Ok(()),
        Some(_) if characters && character_device => Ok(()),
        Some(kind) => {
            let hint = if character_device { ", or size= with the size of this device" } else { "" };
            Err(Error::Kind { path: path.into(), kind, hint })
        }
    }
}

/// Returns the kind of file if it is neither a regular file nor a block device.
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

/// Locks all bytes, also those that are added later. The lock belongs to the open file, not to the process
/// (F_OFD_SETLK), so closing another descriptor of the same file does not release it. It conflicts with QEMU's locks,
/// as it should.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn open_as(path: &Path, change: impl Fn(&mut ImageOptions)) -> Result<u64, String> {
        let mut options = ImageOptions { path: path.into(), ..ImageOptions::default() };
        change(&mut options);
        open(&options).map(|disk| disk.size()).map_err(|e| e.to_string())
    }

    /// Creates an empty qcow2 image of one megabyte in the simplest form: header, first-level table, reference counts.
    fn qcow2() -> Vec<u8> {
        let mut image = vec![0; 4 * 65536];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"QFI\xfb\0\0\0\x03");
        put(20, &16u32.to_be_bytes());
        put(24, &(1u64 << 20).to_be_bytes());
        put(36, &1u32.to_be_bytes());
        put(40, &(3u64 * 65536).to_be_bytes());
        put(48, &65536u64.to_be_bytes());
        put(56, &1u32.to_be_bytes());
        put(96, &4u32.to_be_bytes());
        put(100, &104u32.to_be_bytes());
        put(65536, &(2u64 * 65536).to_be_bytes());
        put(2 * 65536, &[0, 1, 0, 1, 0, 1, 0, 1]);
        image
    }

    #[test]
    fn a_guest_cannot_make_its_raw_disk_another_format() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        let len = qcow2().len() as u64;
        std::fs::write(&path, vec![0; qcow2().len()]).unwrap();
        assert_eq!(open_as(&path, |_| ()), Ok(len));
        // The guest writes a header.
        std::fs::write(&path, qcow2()).unwrap();
        let refused = open_as(&path, |_| ()).unwrap_err();
        assert!(
            refused.contains("disk.img begins like a qcow2 image") && refused.contains("or format=raw"),
            "{refused}"
        );
        assert_eq!(open_as(&path, |options| options.format = Some(Format::Raw)), Ok(len));
        assert_eq!(open_as(&path, |options| options.format = Some(Format::Qcow2)), Ok(1 << 20));
        // For reading only, it may be what it looks like: it refers to nothing.
        assert_eq!(open_as(&path, |options| options.readonly = true), Ok(1 << 20));
        assert_eq!(open_as(&path, |options| options.overlay = Some(Overlay::Tmp)), Ok(1 << 20));
    }

    #[test]
    fn a_name_is_a_promise() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["disk.qcow2", "DISK.QCOW2", "old.qcow"] {
            let path = dir.path().join(name);
            std::fs::write(&path, vec![0; 65536]).unwrap();
            for readonly in [false, true] {
                let refused = open_as(&path, |options| options.readonly = readonly).unwrap_err();
                assert!(refused.contains("is named like a qcow2 image but does not begin like one"), "{refused}");
            }
            assert_eq!(open_as(&path, |options| options.format = Some(Format::Raw)), Ok(65536));
            // A header written by the guest counts only without `format=raw`, and no other file is opened then.
            std::fs::write(&path, qcow2()).unwrap();
            assert_eq!(open_as(&path, |_| ()), Ok(1 << 20));
        }
    }

    #[test]
    fn formats_of_others_are_named_and_pass_as_raw() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        for (at, mark, name, driver) in [
            (0, &b"KDMV"[..], "VMDK", "vmdk"),
            (0, b"# Disk DescriptorFile\nversion=1", "VMDK", "vmdk"),
            (64, b"\x7f\x10\xda\xbe", "VDI", "vdi"),
            (0, b"conectix", "VHD", "vpc"),
            (65536 - 512, b"conectix", "VHD", "vpc"),
            (65536 - 512, b"conectix with something", "VHD", "vpc"),
            (0, b"vhdxfile", "VHDX", "vhdx"),
            (0, b"QED\0", "QED", "qed"),
            (0, b"WithouFreSpacExt", "Parallels", "parallels"),
            (0, b"LUKS\xba\xbe", "LUKS", "luks"),
        ] {
            let mut bytes = vec![0; 65536];
            bytes[at..at + mark.len()].copy_from_slice(mark);
            std::fs::write(&path, bytes).unwrap();
            for overlay in [None, Some(Overlay::Tmp)] {
                let text = path.display();
                let wanted = format!(
                    "disk {text} is a {name} image, which vireo does not read; 'qemu-img convert -f {driver} -O qcow2 {text} \
                     {text}.qcow2' converts it, and format=raw gives the guest its bytes as they are"
                );
                assert_eq!(open_as(&path, |options| options.overlay = overlay.clone()), Err(wanted));
            }
            assert_eq!(open_as(&path, |options| options.format = Some(Format::Raw)), Ok(65536));
        }
        // The marks count only at their proper offsets.
        let mut bytes = vec![0; 65536];
        bytes[512..516].copy_from_slice(b"KDMV");
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(open_as(&path, |_| ()), Ok(65536));
    }
}
