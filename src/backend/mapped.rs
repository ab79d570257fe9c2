//! Files that the guest sees as memory: opening, locking, and the sizes that they can have.
//!
//! Guests use such memory in units of 2 MiB ([`UNIT`]). If a file ends within a unit, zeros follow; writes to them are
//! lost when the VM ends. Therefore a file that must keep all writes has to consist of whole units, while a file that
//! keeps none may have any size.
//!
//! While the guest runs, the file must not be truncated, and its file system must not run out of space for the file's
//! holes. The lock excludes other VMs, but not a user of `truncate`: in that case the next access to the missing part,
//! by the guest or by vireo for it (SIGBUS), ends the VM with a message that says so.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{held, image};
use crate::memory::{Access, Backing};
use crate::options::Size;

/// Unit to which the size of a mapped file is rounded up: 2 MiB.
pub const UNIT: u64 = 2 << 20;

/// Reasons why a file cannot be memory. Displays as one sentence with the path.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be opened or examined.
    #[error("cannot open {}{hint}", path.display())]
    Open {
        /// Path of the file.
        path: PathBuf,
        /// Advice for the user; may be empty.
        hint: &'static str,
        /// The OS error.
        source: io::Error,
    },
    /// The file cannot be extended.
    #[error("cannot extend {} to size={size}", path.display())]
    Grow {
        /// Path of the file.
        path: PathBuf,
        /// Requested size.
        size: Size,
        /// The OS error.
        source: io::Error,
    },
    /// The path is neither a regular file nor a block device.
    #[error("{} is a {kind}; a regular file or a block device is needed", path.display())]
    Kind {
        /// Path of the file.
        path: PathBuf,
        /// Kind of file that it is.
        kind: &'static str,
    },
    /// The file is empty.
    #[error("{} is empty; size= makes it larger", .0.display())]
    Empty(PathBuf),
    /// Writes to the last bytes would be lost.
    #[error(
        "{} has {size} bytes, and guest writes past its end, up to the next 2M, would be lost: size={rounded} extends \
         it, readonly and overlay=tmp take it as it is",
        path.display()
    )]
    PartialUnit {
        /// Path of the file.
        path: PathBuf,
        /// Size of the file.
        size: u64,
        /// Size that the file should have.
        rounded: Size,
    },
    /// Another process holds a lock that excludes ours.
    #[error("{} is in use by another VM{hint}", path.display())]
    InUse {
        /// Path of the file.
        path: PathBuf,
        /// More about the other user; may be empty.
        hint: &'static str,
    },
}

/// An open and locked file, about to be mapped.
#[derive(Clone, Debug)]
pub struct MappedFile {
    file: Arc<File>,
    path: PathBuf,
    access: Access,
    /// Number of bytes of the file that the guest sees.
    shown: u64,
    /// Number of bytes of memory.
    len: u64,
}

impl MappedFile {
    /// Opens and locks `path`. With `size`, a multiple of [`UNIT`], the memory has that size; a shorter file is
    /// extended if writes go to it. A file that is only read is shared with other VMs that only read it.
    pub fn open(path: &Path, access: Access, size: Option<u64>) -> Result<Self, Error> {
        let shared = access == Access::Shared;
        let failed = |source: io::Error| {
            let denied = matches!(source.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem);
            let hint = if denied && shared { " for writing (readonly and overlay=tmp only read it)" } else { "" };
            Error::Open { path: path.into(), hint, source }
        };
        let unfit = |metadata| image::unfit_kind(&metadata).map(|kind| Error::Kind { path: path.into(), kind });
        // Check before opening: opening a FIFO would wait for its other end, and some devices act on being opened.
        let named = held::path(path);
        unfit(named.metadata().map_err(failed)?).map_or(Ok(()), Err)?;
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let mut file = OpenOptions::new().read(true).write(shared).custom_flags(flags).open(named).map_err(failed)?;
        // Check again what was really opened.
        unfit(file.metadata().map_err(failed)?).map_or(Ok(()), Err)?;
        if image::is_taken(&file, path, !shared) {
            let hint = if shared { "" } else { ", which writes to it" };
            return Err(Error::InUse { path: path.into(), hint });
        }
        let mut bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
        if let Some(size) = size.filter(|size| shared && *size > bytes) {
            let grown = if file.metadata().is_ok_and(|m| m.is_file()) {
                file.set_len(size)
            } else {
                Err(io::Error::other(format!("the block device has only {bytes} bytes")))
            };
            grown.map_err(|source| Error::Grow { path: path.into(), size: Size(size), source })?;
            bytes = size;
        }
        if bytes == 0 {
            return Err(Error::Empty(path.into()));
        }
        let too_large = || failed(io::Error::from_raw_os_error(libc::EFBIG));
        let len = size.map_or_else(|| bytes.checked_next_multiple_of(UNIT), Some).ok_or_else(too_large)?;
        if shared && len > bytes {
            return Err(Error::PartialUnit { path: path.into(), size: bytes, rounded: Size(len) });
        }
        Ok(MappedFile { file: Arc::new(file), path: path.into(), access, shown: bytes.min(len), len })
    }

    /// Number of bytes of memory that the file takes: a multiple of [`UNIT`], not 0.
    pub fn memory_len(&self) -> u64 {
        self.len
    }

    /// Returns the backing for the guest's memory.
    pub fn backing(&self) -> Backing {
        let MappedFile { file, path, access, shown, len: _ } = self;
        Backing::File { file: file.clone(), path: path.clone(), len: *shown, access: *access }
    }

    /// Returns when earlier writes to the memory would survive a power failure. Does nothing if the file keeps no
    /// writes.
    pub fn sync(&self) -> io::Result<()> {
        if self.access == Access::Shared { self.file.sync_data() } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(size: u64) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        File::create(&path).unwrap().set_len(size).unwrap();
        (dir, path)
    }

    fn refused(path: &Path, access: Access, size: Option<u64>) -> String {
        let error = MappedFile::open(path, access, size).unwrap_err();
        error.to_string().replace(&path.display().to_string(), "F")
    }

    #[test]
    fn sizes_are_whole_units() {
        let (_dir, path) = file(UNIT + 1);
        assert_eq!(
            refused(&path, Access::Shared, None),
            "F has 2097153 bytes, and guest writes past its end, up to the next 2M, would be lost: size=4M extends \
             it, readonly and overlay=tmp take it as it is"
        );
        for access in [Access::Private, Access::ReadOnly] {
            let mapped = MappedFile::open(&path, access, None).unwrap();
            assert_eq!((mapped.memory_len(), mapped.shown), (2 * UNIT, UNIT + 1));
            let mapped = MappedFile::open(&path, access, Some(4 * UNIT)).unwrap();
            assert_eq!((mapped.memory_len(), mapped.shown), (4 * UNIT, UNIT + 1));
            mapped.sync().unwrap();
        }
        let mapped = MappedFile::open(&path, Access::Shared, Some(UNIT)).unwrap();
        assert_eq!((mapped.memory_len(), mapped.shown), (UNIT, UNIT));
        drop(mapped);
        let mapped = MappedFile::open(&path, Access::Shared, Some(2 * UNIT)).unwrap();
        assert_eq!((mapped.memory_len(), path.metadata().unwrap().len()), (2 * UNIT, 2 * UNIT));
        mapped.sync().unwrap();
    }

    #[test]
    fn what_cannot_be_memory_is_refused() {
        let (dir, path) = file(0);
        assert_eq!(refused(&path, Access::ReadOnly, None), "F is empty; size= makes it larger");
        assert!(refused(&path, Access::Shared, Some(1 << 63)).starts_with("cannot extend F to size="));
        assert_eq!(
            refused(dir.path(), Access::Shared, None),
            "F is a directory; a regular file or a block device is needed"
        );
        assert!(refused(Path::new("/dev/null"), Access::Shared, None).contains("is a character device"));
        assert_eq!(refused(&dir.path().join("none"), Access::Shared, None), "cannot open F");
    }

    #[test]
    fn a_writer_excludes_everybody_and_readers_share() {
        let (_dir, path) = file(UNIT);
        let readers = [Access::Private, Access::ReadOnly].map(|access| MappedFile::open(&path, access, None).unwrap());
        assert_eq!(refused(&path, Access::Shared, None), "F is in use by another VM");
        drop(readers);
        let _writer = crate::backend::when_free(|| MappedFile::open(&path, Access::Shared, None));
        assert_eq!(refused(&path, Access::Shared, None), "F is in use by another VM");
        assert_eq!(refused(&path, Access::ReadOnly, None), "F is in use by another VM, which writes to it");
    }
}
