//! A file or block device as a disk, byte for byte.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use log::warn;
use vm_memory::bitmap::Bitmap;

use super::Disk;
use crate::memory::RamSlice;

const SECTOR: u64 = 512;
/// How many buffers one system call takes (`UIO_MAXIOV`).
const MAX_BUFFERS: usize = 1024;

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
    #[error("disk {} is a {kind}; a regular file or a block device is needed", path.display())]
    Kind {
        /// The file.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// Not even one sector.
    #[error("disk {} has {size} bytes, which is less than one sector of 512", path.display())]
    TooSmall {
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
}

/// An open and locked disk.
#[derive(Debug)]
pub struct RawDisk {
    file: File,
    size: u64,
}

impl RawDisk {
    /// Opens and locks `path`. A writable disk excludes every other user, readers share. The lock goes with the file:
    /// it needs no cleaning up, however this process ends.
    pub fn open(path: &Path, readonly: bool) -> Result<Self, Error> {
        let hint = if readonly { "" } else { " for writing (readonly shares it)" };
        let failed = |source: io::Error| {
            let denied = matches!(source.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem);
            Error::Open { path: path.into(), hint: if denied { hint } else { "" }, source }
        };
        // Before it is opened: opening a FIFO would wait for its other end, and some devices act on being opened.
        check_kind(path, &path.metadata().map_err(failed)?)?;
        let mut options = OpenOptions::new();
        options.read(true).write(!readonly).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
        let mut file = options.open(path).map_err(failed)?;
        // And again, on what was really opened.
        check_kind(path, &file.metadata().map_err(failed)?)?;
        match lock(&file, readonly) {
            Ok(()) => {}
            Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                let hint = if readonly { ", which writes to it" } else { "" };
                return Err(Error::InUse { path: path.into(), hint });
            }
            Err(e) => warn!("disk {} cannot be locked and is used unlocked: {e}", path.display()),
        }
        let bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
        let size = bytes - bytes % SECTOR;
        if size == 0 {
            return Err(Error::TooSmall { path: path.into(), size: bytes });
        }
        if size != bytes {
            let path = path.display();
            warn!(
                "disk {path} has {bytes} bytes; the guest does not see the last {}, which are no sector",
                bytes - size
            );
        }
        Ok(RawDisk { file, size })
    }
}

fn check_kind(path: &Path, metadata: &Metadata) -> Result<(), Error> {
    let kind = metadata.file_type();
    let kind = match () {
        () if kind.is_file() || kind.is_block_device() => return Ok(()),
        () if kind.is_dir() => "directory",
        () if kind.is_fifo() => "FIFO",
        () if kind.is_char_device() => "character device",
        () if kind.is_socket() => "socket",
        () => "special file",
    };
    Err(Error::Kind { path: path.into(), kind })
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

impl Disk for RawDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, buffers: &[RamSlice<'_>], offset: u64) -> io::Result<()> {
        let result = transfer(&self.file, buffers, offset, Direction::Read);
        // Also after an error: some of it may have arrived.
        for buffer in buffers {
            buffer.bitmap().mark_dirty(0, buffer.len());
        }
        result
    }

    fn write(&self, buffers: &[RamSlice<'_>], offset: u64) -> io::Result<()> {
        transfer(&self.file, buffers, offset, Direction::Write)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

#[derive(Clone, Copy)]
enum Direction {
    Read,
    Write,
}

/// Moves all bytes between guest memory and the file, however many system calls it takes.
fn transfer(file: &File, buffers: &[RamSlice<'_>], mut offset: u64, direction: Direction) -> io::Result<()> {
    let mut iov: Vec<libc::iovec> =
        buffers.iter().map(|b| libc::iovec { iov_base: b.ptr_guard_mut().as_ptr().cast(), iov_len: b.len() }).collect();
    let mut first = 0;
    loop {
        // Drop what is empty, so that 0 from the kernel can only mean the end of the file.
        first += iov.iter().skip(first).take_while(|b| b.iov_len == 0).count();
        let rest = iov.get_mut(first..).unwrap_or_default();
        if rest.is_empty() {
            return Ok(());
        }
        let mut moved = match vectored(file, rest, offset, direction) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file has become shorter")),
            result => result?,
        };
        offset += moved as u64;
        for buffer in rest {
            let here = moved.min(buffer.iov_len);
            buffer.iov_base = buffer.iov_base.wrapping_byte_add(here);
            buffer.iov_len -= here;
            moved -= here;
            if moved == 0 {
                break;
            }
        }
    }
}

/// One system call. `iov` points into guest memory: only [`transfer`] may call this.
#[allow(unsafe_code)]
fn vectored(file: &File, iov: &[libc::iovec], offset: u64, direction: Direction) -> io::Result<usize> {
    let (fd, count) = (file.as_raw_fd(), iov.len().min(MAX_BUFFERS) as libc::c_int);
    let offset = libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    // SAFETY: every iovec is (the rest of) a RamSlice that `transfer` borrows, hence mapped guest memory that outlives
    // the call and that nothing holds a reference into; `count` does not exceed their number.
    let n = unsafe {
        match direction {
            Direction::Read => libc::preadv(fd, iov.as_ptr(), count, offset),
            Direction::Write => libc::pwritev(fd, iov.as_ptr(), count, offset),
        }
    };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}
