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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestRam;
    use std::os::unix::fs::FileExt;

    fn image(dir: &tempfile::TempDir, name: &str, size: u64) -> PathBuf {
        let path = dir.path().join(name);
        File::create(&path).unwrap().set_len(size).unwrap();
        path
    }

    #[test]
    fn bytes_land_where_they_belong() {
        let dir = tempfile::tempdir().unwrap();
        let path = image(&dir, "a", 64 << 10);
        let disk = RawDisk::open(&path, false).unwrap();
        let ram = GuestRam::anonymous(1 << 20);
        let data: Vec<u8> = (0..2048u32).map(|i| (i % 251) as u8).collect();
        ram.write(0x1000, &data).unwrap();
        let cut = |base: u64| {
            [(0, 1), (1, 0), (1, 1000), (1001, 1047)].map(|(at, len)| ram.slice(base + at, len).unwrap()).to_vec()
        };
        disk.write(&cut(0x1000), 512).unwrap();
        disk.flush().unwrap();
        let mut back = vec![0; 2048];
        File::open(&path).unwrap().read_exact_at(&mut back, 512).unwrap();
        assert_eq!(back, data);
        disk.read(&cut(0x8000), 512).unwrap();
        ram.read(0x8000, &mut back).unwrap();
        assert_eq!(back, data);
        disk.read(&[], 0).unwrap();
    }

    #[test]
    fn more_buffers_than_one_call_takes() {
        let dir = tempfile::tempdir().unwrap();
        let disk = RawDisk::open(&image(&dir, "a", 1 << 20), false).unwrap();
        let ram = GuestRam::anonymous(1 << 20);
        let data: Vec<u8> = (0..3000u32).map(|i| (i % 251) as u8).collect();
        ram.write(0, &data).unwrap();
        let bytes = |base: u64| (0..3000).map(|i| ram.slice(base + i, 1).unwrap()).collect::<Vec<_>>();
        disk.write(&bytes(0), 7).unwrap();
        disk.read(&bytes(0x1_0000), 7).unwrap();
        let mut back = vec![0; 3000];
        ram.read(0x1_0000, &mut back).unwrap();
        assert_eq!(back, data);
    }

    #[test]
    fn a_file_that_shrank_is_an_error_not_a_loop() {
        let dir = tempfile::tempdir().unwrap();
        let path = image(&dir, "a", 4096);
        let disk = RawDisk::open(&path, false).unwrap();
        File::options().write(true).open(&path).unwrap().set_len(100).unwrap();
        let ram = GuestRam::anonymous(1 << 20);
        let error = disk.read(&[ram.slice(0, 512).unwrap()], 0).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn what_is_no_disk_is_refused_without_waiting() {
        let dir = tempfile::tempdir().unwrap();
        // A pipe that nobody writes to opens like a FIFO, and takes no mkfifo program: while one is started, every
        // descriptor of this process is open twice, and another test's file stays locked.
        let (pipe, _) = io::pipe().unwrap();
        let fifo = std::path::PathBuf::from(format!("/proc/self/fd/{}", pipe.as_raw_fd()));
        let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("socket")).unwrap();
        for (path, kind) in [
            (fifo.as_path(), "FIFO"),
            (dir.path(), "directory"),
            (Path::new("/dev/null"), "character device"),
            (&dir.path().join("socket"), "socket"),
        ] {
            for readonly in [false, true] {
                let error = RawDisk::open(path, readonly).unwrap_err().to_string();
                let path = path.display();
                assert_eq!(error, format!("disk {path} is a {kind}; a regular file or a block device is needed"));
            }
        }
        let missing = RawDisk::open(&dir.path().join("none"), false).unwrap_err();
        assert_eq!(missing.to_string(), format!("cannot open disk {}", dir.path().join("none").display()));
        assert!(std::error::Error::source(&missing).unwrap().to_string().contains("No such file"));
    }

    #[test]
    fn sizes_are_whole_sectors() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(RawDisk::open(&image(&dir, "a", 1535), false).unwrap().size(), 1024);
        assert_eq!(RawDisk::open(&image(&dir, "b", 5 << 40), false).unwrap().size(), 5 << 40);
        for size in [0, 511] {
            let error = RawDisk::open(&image(&dir, "c", size), false).unwrap_err().to_string();
            assert!(error.ends_with(&format!("has {size} bytes, which is less than one sector of 512")), "{error}");
        }
    }

    #[test]
    fn a_writer_excludes_everybody_and_readers_share() {
        let dir = tempfile::tempdir().unwrap();
        let path = image(&dir, "a", 4096);
        let in_use = |readonly| RawDisk::open(&path, readonly).unwrap_err().to_string();
        let writer = RawDisk::open(&path, false).unwrap();
        assert_eq!(in_use(false), format!("disk {} is in use by another VM", path.display()));
        assert_eq!(in_use(true), format!("disk {} is in use by another VM, which writes to it", path.display()));
        drop(writer);
        let readers = [RawDisk::open(&path, true).unwrap(), RawDisk::open(&path, true).unwrap()];
        assert!(in_use(false).contains("in use"));
        drop(readers);
        RawDisk::open(&path, false).unwrap();
    }
}
