//! The wire format: FUSE protocol 7, as in Linux's `include/uapi/linux/fuse.h`. All numbers are little-endian here, as
//! guest and host both are.

use std::ffi::CStr;
use std::io;
use std::time::Duration;

use rustix::io::Errno;

use crate::backend::passthrough::{Name, Stat, Time};

/// Supported protocol: the major version, and the newest and oldest minor version. 7.27 came with Linux 4.18; no
/// virtio-fs driver is older than 7.31 (Linux 5.4).
pub(super) const MAJOR: u32 = 7;
pub(super) const MINOR: u32 = 39;
pub(super) const OLDEST_MINOR: u32 = 27;

/// Sizes of `fuse_in_header` and `fuse_out_header`.
pub(super) const IN_HEADER: usize = 40;
pub(super) const OUT_HEADER: usize = 16;
/// Size of `fuse_write_in`.
pub(super) const WRITE_IN: usize = 40;
/// Sizes of `fuse_entry_out`, and of `fuse_dirent` without its name.
pub(super) const ENTRY_OUT: usize = 128;
pub(super) const DIRENT: usize = 24;

/// Node number of the shared folder itself.
pub(super) const ROOT: u64 = 1;

/// `FUSE_*` of `fuse_opcode`; all others are answered with ENOSYS.
pub(super) mod op {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const IOCTL: u32 = 39;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const SYNCFS: u32 = 50;
    pub const TMPFILE: u32 = 51;
    pub const STATX: u32 = 52;
}

/// `FUSE_*` flags of INIT.
pub(super) mod init {
    pub const ASYNC_READ: u32 = 1 << 0;
    pub const ATOMIC_O_TRUNC: u32 = 1 << 3;
    pub const BIG_WRITES: u32 = 1 << 5;
    pub const DONT_MASK: u32 = 1 << 6;
    pub const AUTO_INVAL_DATA: u32 = 1 << 12;
    pub const DO_READDIRPLUS: u32 = 1 << 13;
    pub const READDIRPLUS_AUTO: u32 = 1 << 14;
    pub const ASYNC_DIO: u32 = 1 << 15;
    pub const PARALLEL_DIROPS: u32 = 1 << 18;
    pub const POSIX_ACL: u32 = 1 << 20;
    pub const MAX_PAGES: u32 = 1 << 22;
    pub const CACHE_SYMLINKS: u32 = 1 << 23;
    pub const SUBMOUNTS: u32 = 1 << 27;
    pub const HANDLE_KILLPRIV_V2: u32 = 1 << 28;
    pub const SETXATTR_EXT: u32 = 1 << 29;
}

/// Flags of `fuse_setattr_in.valid`.
pub(super) mod fattr {
    pub const MODE: u32 = 1 << 0;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const FH: u32 = 1 << 6;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
    pub const KILL_SUIDGID: u32 = 1 << 11;
}

/// `FOPEN_*`.
pub(super) mod fopen {
    pub const KEEP_CACHE: u32 = 1 << 1;
    pub const CACHE_DIR: u32 = 1 << 3;
}

pub(super) const GETATTR_FH: u32 = 1 << 0;
pub(super) const FSYNC_FDATASYNC: u32 = 1 << 0;
pub(super) const OPEN_KILL_SUIDGID: u32 = 1 << 0;
pub(super) const SETXATTR_ACL_KILL_SGID: u32 = 1 << 0;
pub(super) const WRITE_CACHE: u32 = 1 << 0;
pub(super) const WRITE_KILL_SUIDGID: u32 = 1 << 2;
pub(super) const ATTR_SUBMOUNT: u32 = 1 << 0;

/// Arguments of a request, taken from front to back. A missing argument fails with EINVAL.
#[derive(Clone, Copy)]
pub(super) struct Args<'a>(pub &'a [u8]);

impl<'a> Args<'a> {
    pub fn bytes(&mut self, len: usize) -> io::Result<&'a [u8]> {
        let (front, rest) = self.0.split_at_checked(len).ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(front)
    }

    fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let (front, rest) = self.0.split_first_chunk().ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(*front)
    }

    pub fn u32(&mut self) -> io::Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> io::Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// Takes a string that ends with NUL.
    pub fn text(&mut self) -> io::Result<&'a CStr> {
        let text = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        self.bytes(text.to_bytes_with_nul().len())?;
        Ok(text)
    }

    /// Takes the name of a directory entry.
    pub fn name(&mut self) -> io::Result<Name<'a>> {
        Name::new(self.text()?)
    }
}

/// `fuse_in_header`.
#[derive(Clone, Copy, Debug)]
pub(super) struct InHeader {
    pub len: u32,
    pub opcode: u32,
    pub unique: u64,
    pub nodeid: u64,
    pub uid: u32,
    pub gid: u32,
}

impl InHeader {
    pub fn parse(bytes: &[u8; IN_HEADER]) -> io::Result<Self> {
        let mut args = Args(bytes);
        let (len, opcode, unique, nodeid) = (args.u32()?, args.u32()?, args.u64()?, args.u64()?);
        Ok(InHeader { len, opcode, unique, nodeid, uid: args.u32()?, gid: args.u32()? })
    }
}

/// Answer to a request, without its header.
#[derive(Default)]
pub(super) struct Out(pub Vec<u8>);

impl Out {
    pub fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub fn zeros(&mut self, len: usize) -> &mut Self {
        self.0.resize(self.0.len() + len, 0);
        self
    }

    pub fn done(&mut self) -> Out {
        Out(std::mem::take(&mut self.0))
    }

    /// Appends a `fuse_attr`.
    pub fn attr(&mut self, stat: &Stat, flags: u32) -> &mut Self {
        self.u64(stat.ino).u64(stat.size).u64(stat.blocks);
        let times = [stat.atime, stat.mtime, stat.ctime];
        times.iter().for_each(|Time { sec, .. }| _ = self.u64(*sec as u64));
        times.iter().for_each(|Time { nsec, .. }| _ = self.u32(*nsec));
        self.u32(stat.mode).u32(stat.nlink).u32(stat.uid).u32(stat.gid);
        self.u32(encode_dev(stat.rdev)).u32(stat.blksize).u32(flags)
    }

    /// Appends a `fuse_entry_out`.
    pub fn entry(&mut self, entry: &Entry) -> &mut Self {
        let Entry { id, stat, flags, names, attributes } = entry;
        self.u64(*id).u64(0).u64(names.as_secs()).u64(attributes.as_secs());
        self.u32(names.subsec_nanos()).u32(attributes.subsec_nanos()).attr(stat, *flags)
    }

    /// Appends a `fuse_statx_out`.
    pub fn statx_out(&mut self, stat: &Stat, valid: Duration) -> &mut Self {
        const BASIC_STATS: u32 = 0x7FF;
        const BTIME: u32 = 0x800;
        let mask = BASIC_STATS | if stat.born == Time::default() { 0 } else { BTIME };
        self.u64(valid.as_secs()).u32(valid.subsec_nanos()).u32(0).zeros(16);
        self.u32(mask).u32(stat.blksize).u64(0).u32(stat.nlink).u32(stat.uid).u32(stat.gid);
        self.u16(stat.mode as u16).u16(0).u64(stat.ino).u64(stat.size).u64(stat.blocks).u64(0);
        for Time { sec, nsec } in [stat.atime, stat.born, stat.ctime, stat.mtime] {
            self.u64(sec as u64).u32(nsec).u32(0);
        }
        self.u32(stat.rdev.0).u32(stat.rdev.1).zeros(8 + 14 * 8)
    }

    /// Appends a `fuse_attr_out`.
    pub fn attr_out(&mut self, stat: &Stat, valid: Duration) -> &mut Self {
        self.u64(valid.as_secs()).u32(valid.subsec_nanos()).u32(0).attr(stat, 0)
    }
}

/// Result of a lookup, and how long the guest may cache it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub id: u64,
    pub stat: Stat,
    /// `FUSE_ATTR_*`.
    pub flags: u32,
    pub names: Duration,
    pub attributes: Duration,
}

/// Encodes a device number as the kernel's `new_encode_dev` does.
fn encode_dev((major, minor): (u32, u32)) -> u32 {
    (minor & 0xFF) | (major & 0xFFF) << 8 | (minor & 0xFFF00) << 12
}
