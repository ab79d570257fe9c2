//! Files that the guest sees as memory: opened, locked, and of a size that memory can have.
//!
//! Guests take such memory in units of 2 MiB ([`UNIT`]). Where a file ends within one, zeros follow, and what is written
//! to them is gone with the VM. So a file that shall keep all writes must be whole units; one that keeps none may have
//! any size.
//!
//! The file must not become shorter while the guest lives, nor its file system run out of space for its holes. The lock
//! keeps other VMs away, not somebody with `truncate`: then the guest's next access to what is gone, or vireo's for it
//! (SIGBUS), ends the VM with a sentence that says so.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{held, image};
use crate::memory::{Access, Backing};
use crate::options::Size;

/// What the size of a file in memory is rounded up to: 2 MiB.
pub const UNIT: u64 = 2 << 20;

/// Why a file cannot be memory. Displays as one sentence with the path.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be opened or examined.
    #[error("cannot open {}{hint}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What would help; may be empty.
        hint: &'static str,
        /// The OS error.
        source: io::Error,
    },
    /// It cannot be made larger.
    #[error("cannot make {} as large as size={size}", path.display())]
    Grow {
        /// The file.
        path: PathBuf,
        /// What was asked for.
        size: Size,
        /// The OS error.
        source: io::Error,
    },
    /// It is no file and no block device.
    #[error("{} is a {kind}; a regular file or a block device is needed", path.display())]
    Kind {
        /// The file.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// Nothing to show.
    #[error("{} is empty; size= makes it larger", .0.display())]
    Empty(PathBuf),
    /// Writes to the last bytes would be lost.
    #[error(
        "{} has {size} bytes, and what the guest writes up to the next 2M would be lost: size={rounded} makes it larger, \
         readonly and overlay=tmp take it as it is",
        path.display()
    )]
    PartialUnit {
        /// The file.
        path: PathBuf,
        /// Its size.
        size: u64,
        /// The size it should have.
        rounded: Size,
    },
    /// Another process holds a lock that excludes ours.
    #[error("{} is in use by another VM{hint}", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
        /// What would be possible; may be empty.
        hint: &'static str,
    },
}

/// An open and locked file, about to be mapped.
#[derive(Clone, Debug)]
pub struct MappedFile {
    file: Arc<File>,
    path: PathBuf,
    access: Access,
    /// Bytes of the file that are shown.
    shown: u64,
    /// Bytes of memory.
    len: u64,
}

impl MappedFile {
    /// Opens and locks `path`. With `size`, a multiple of [`UNIT`], that much of it is shown; a file that is shorter is
    /// made larger if writes go to it. Files that are only read are shared with other VMs that only read them.
    pub fn open(path: &Path, access: Access, size: Option<u64>) -> Result<Self, Error> {
        let shared = access == Access::Shared;
        let failed = |source: io::Error| {
            let denied = matches!(source.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem);
            let hint = if denied && shared { " for writing (readonly and overlay=tmp only read it)" } else { "" };
            Error::Open { path: path.into(), hint, source }
        };
        let unfit = |metadata| image::unfit_kind(&metadata).map(|kind| Error::Kind { path: path.into(), kind });
        // Before it is opened: opening a FIFO would wait for its other end, and some devices act on being opened.
        let named = held::path(path);
        unfit(named.metadata().map_err(failed)?).map_or(Ok(()), Err)?;
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let mut file = OpenOptions::new().read(true).write(shared).custom_flags(flags).open(named).map_err(failed)?;
        // And again, on what was really opened.
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

    /// Bytes of memory it takes: a multiple of [`UNIT`], not 0.
    pub fn memory_len(&self) -> u64 {
        self.len
    }

    /// What is mapped.
    pub fn backing(&self) -> Backing {
        let MappedFile { file, path, access, shown, len: _ } = self;
        Backing::File { file: file.clone(), path: path.clone(), len: *shown, access: *access }
    }

    /// Returns when what was written to the memory before would survive a power failure. There is nothing to do if the
    /// file keeps no writes.
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
            "F has 2097153 bytes, and what the guest writes up to the next 2M would be lost: size=4M makes it larger, \
             readonly and overlay=tmp take it as it is"
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
        assert!(refused(&path, Access::Shared, Some(1 << 63)).starts_with("cannot make F as large as size="));
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
