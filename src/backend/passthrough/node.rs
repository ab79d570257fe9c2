//! Files of any kind by their descriptors, and what can be done with them and with the names in a directory.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{
    self, AtFlags, FileType, Gid, Mode, OFlags, RenameFlags, ResolveFlags, StatFs, Statx, StatxFlags, StatxTimestamp,
    Timespec, Timestamps, Uid,
};
use rustix::io::Errno;

use super::interface::{self, Kind};

/// One component of a path: not empty, without `/`, neither `.` nor `..`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name<'a>(&'a CStr);

/// In the place of a name for a file that has none (O_TMPFILE). No call finds anything by it.
pub const NOWHERE: Name<'static> = Name(c"");

impl<'a> Name<'a> {
    /// Checks.
    pub fn new(name: &'a CStr) -> io::Result<Self> {
        match name.to_bytes() {
            b"" | b"." | b".." => Err(Errno::INVAL.into()),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL.into()),
            bytes if bytes.len() > 255 => Err(Errno::NAMETOOLONG.into()),
            _ => Ok(Name(name)),
        }
    }

    /// The name.
    pub fn as_c_str(self) -> &'a CStr {
        self.0
    }
}

/// Seconds and nanoseconds since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time {
    /// Seconds.
    pub sec: i64,
    /// Nanoseconds, less than 10^9.
    pub nsec: u32,
}

impl From<StatxTimestamp> for Time {
    fn from(time: StatxTimestamp) -> Self {
        Time { sec: time.tv_sec, nsec: time.tv_nsec }
    }
}

/// What becomes of a time of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimeChange {
    /// It stays.
    Keep,
    /// The host's clock.
    Now,
    /// This.
    Set(Time),
}

impl From<TimeChange> for Timespec {
    fn from(change: TimeChange) -> Self {
        let (tv_sec, tv_nsec) = match change {
            TimeChange::Keep => (0, fs::UTIME_OMIT),
            TimeChange::Now => (0, fs::UTIME_NOW),
            TimeChange::Set(time) => (time.sec, time.nsec.into()),
        };
        Timespec { tv_sec, tv_nsec }
    }
}

/// What is known of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stat {
    /// The file system it is on.
    pub dev: u64,
    /// Where that is mounted; 0 where the kernel does not say (before 5.8).
    pub mount: u64,
    /// Its number there.
    pub ino: u64,
    /// Type and permissions.
    pub mode: u32,
    /// Names.
    pub nlink: u32,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Of a device, major and minor.
    pub rdev: (u32, u32),
    /// Bytes.
    pub size: u64,
    /// Units of 512 bytes that it takes.
    pub blocks: u64,
    /// Preferred bytes per read.
    pub blksize: u32,
    /// Last read.
    pub atime: Time,
    /// Last change of contents.
    pub mtime: Time,
    /// Last change.
    pub ctime: Time,
    /// When it was made; 0 where the file system does not say.
    pub born: Time,
}

impl Stat {
    /// Of an open file.
    pub fn of(fd: impl AsFd) -> io::Result<Self> {
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME | StatxFlags::MNT_ID;
        Ok(fs::statx(fd, c"", AtFlags::EMPTY_PATH, wanted)?.into())
    }

    /// The empty directory that stands in for a mount of the host: nothing of the original but its identity.
    fn closed(&self) -> Self {
        let Stat { dev, mount, ino, blksize, .. } = *self;
        let mode = FileType::Directory.as_raw_mode() | 0o555;
        Stat { dev, mount, ino, blksize, mode, nlink: 2, ..Stat::default() }
    }

    /// The type bits of the mode.
    pub fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.mode)
    }
}

impl From<Statx> for Stat {
    fn from(s: Statx) -> Self {
        Stat {
            dev: u64::from(s.stx_dev_major) << 32 | u64::from(s.stx_dev_minor),
            mount: if s.stx_mask & StatxFlags::MNT_ID.bits() != 0 { s.stx_mnt_id } else { 0 },
            ino: s.stx_ino,
            mode: s.stx_mode.into(),
            nlink: s.stx_nlink,
            uid: s.stx_uid,
            gid: s.stx_gid,
            rdev: (s.stx_rdev_major, s.stx_rdev_minor),
            size: s.stx_size,
            blocks: s.stx_blocks,
            blksize: s.stx_blksize,
            atime: s.stx_atime.into(),
            mtime: s.stx_mtime.into(),
            ctime: s.stx_ctime.into(),
            born: if s.stx_mask & StatxFlags::BTIME.bits() != 0 { s.stx_btime.into() } else { Time::default() },
        }
    }
}

/// A file of any kind, held by a descriptor that names it and opens nothing.
#[derive(Debug)]
pub struct Node {
    held: Held,
    kind: FileType,
}

/// What stands for the file.
#[derive(Debug)]
enum Held {
    File {
        fd: OwnedFd,
        /// The file system, and where it is mounted.
        dev: u64,
        mount: u64,
        /// Looking for a name may make the host mount something.
        automount: bool,
    },
    /// Nothing: the host has one of the kernel's interfaces here (see `interface`), and the guest sees an empty
    /// directory that nobody can write to.
    Closed(Stat),
}

const NO_MODE: Mode = Mode::empty();

impl Node {
    /// The folder that is shared; or what it is instead of a file system with data.
    pub(super) fn root(fd: OwnedFd) -> io::Result<Result<(Self, Stat), &'static str>> {
        let kind = interface::kind(&fd)?;
        if let Kind::Interface(name) = kind {
            return Ok(Err(name));
        }
        let stat = Stat::of(&fd)?;
        Ok(Ok((Node::new(fd, &stat, kind == Kind::Automount), stat)))
    }

    fn new(fd: OwnedFd, stat: &Stat, automount: bool) -> Self {
        Node { held: Held::File { fd, dev: stat.dev, mount: stat.mount, automount }, kind: stat.kind() }
    }

    /// The descriptor, for calls that a closed directory refuses.
    pub(super) fn fd(&self) -> io::Result<&OwnedFd> {
        match &self.held {
            Held::File { fd, .. } => Ok(fd),
            Held::Closed(_) => Err(Errno::ROFS.into()),
        }
    }

    /// The descriptor of a directory in which names are made and removed: not where the host mounts things.
    fn directory(&self) -> io::Result<&OwnedFd> {
        match &self.held {
            Held::File { fd, automount: false, .. } => Ok(fd),
            _ => Err(Errno::ROFS.into()),
        }
    }

    /// Its path for calls that follow it, one step, to the file itself.
    pub(super) fn path(&self) -> io::Result<String> {
        Ok(format!("/proc/self/fd/{}", self.fd()?.as_raw_fd()))
    }

    /// Returns whether this is the empty directory that stands in for a kernel interface of the host.
    pub fn is_closed(&self) -> bool {
        matches!(self.held, Held::Closed(_))
    }

    /// What is known of it.
    pub fn stat(&self) -> io::Result<Stat> {
        match &self.held {
            Held::File { fd, .. } => Stat::of(fd),
            Held::Closed(stat) => Ok(*stat),
        }
    }

    pub(super) fn permissions(&self) -> io::Result<u32> {
        Ok(fs::stat(self.path()?)?.st_mode)
    }

    /// What has this name in this directory, whatever it is; where one of the kernel's interfaces begins, an empty
    /// directory.
    pub fn child(&self, name: Name<'_>) -> io::Result<(Node, Stat)> {
        let Held::File { dev, mount, automount, .. } = self.held else { return Err(Errno::NOENT.into()) };
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = if automount { self.known_child(name, flags)? } else { self.open_beneath(name, flags, NO_MODE)? };
        let stat = Stat::of(&fd)?;
        if (stat.dev, stat.mount) == (dev, mount) {
            return Ok((Node::new(fd, &stat, automount), stat));
        }
        let kind = interface::kind(&fd)?;
        if !matches!(kind, Kind::Interface(_)) {
            return Ok((Node::new(fd, &stat, kind == Kind::Automount), stat));
        }
        if stat.kind() != FileType::Directory {
            return Err(Errno::ACCESS.into());
        }
        let stat = stat.closed();
        Ok((Node { held: Held::Closed(stat), kind: FileType::Directory }, stat))
    }

    /// A child that the kernel finds without asking anybody (Linux 5.12): what is mounted in a directory of automount
    /// points already. Other names count as not there.
    fn known_child(&self, name: Name<'_>, flags: OFlags) -> io::Result<OwnedFd> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::CACHED;
        match fs::openat2(self.fd()?, name.0, flags, NO_MODE, resolve) {
            Err(Errno::AGAIN | Errno::INVAL | Errno::NOSYS | Errno::PERM) => Err(Errno::NOENT.into()),
            result => Ok(result?),
        }
    }

    fn open_beneath(&self, name: Name<'_>, flags: OFlags, mode: Mode) -> io::Result<OwnedFd> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        match fs::openat2(self.fd()?, name.0, flags, mode, resolve) {
            // Linux before 5.6, and containers that do not know the call: a single name leads nowhere else anyway.
            Err(Errno::NOSYS | Errno::PERM) => Ok(fs::openat(self.fd()?, name.0, flags, mode)?),
            result => Ok(result?),
        }
    }

    /// Opens a regular file for its contents.
    pub fn open(&self, flags: OFlags) -> io::Result<File> {
        match self.kind {
            FileType::RegularFile => {}
            FileType::Directory => return Err(Errno::ISDIR.into()),
            _ => return Err(Errno::NXIO.into()),
        }
        // Some files of /proc and /sys have readers wait; and one who holds a lease.
        let flags = flags | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        Ok(File::from(fs::open(self.path()?, flags, NO_MODE)?))
    }

    /// Opens a directory for its entries.
    pub fn open_dir(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(fs::openat(self.fd()?, c".", flags, NO_MODE)?)
    }

    /// Makes a regular file and opens it; there must be none of this name.
    pub fn create(&self, name: Name<'_>, flags: OFlags, mode: u32) -> io::Result<File> {
        let flags = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        self.directory()?;
        Ok(File::from(self.open_beneath(name, flags, permissions(mode))?))
    }

    /// Makes a regular file in this directory that has no name, and opens it; it can be given a name later unless it is
    /// `exclusive`. Returns its node too.
    pub fn create_unnamed(&self, flags: OFlags, mode: u32, exclusive: bool) -> io::Result<(File, Node, Stat)> {
        let fd = self.directory()?;
        let exclusive = if exclusive { OFlags::EXCL } else { OFlags::empty() };
        let flags = flags | exclusive | OFlags::TMPFILE | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(fs::openat(fd, c".", flags, permissions(mode))?);
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let fd = fs::open(path, OFlags::PATH | OFlags::CLOEXEC, NO_MODE)?;
        let stat = Stat::of(&fd)?;
        Ok((file, Node::new(fd, &stat, false), stat))
    }

    /// Makes a directory.
    pub fn make_dir(&self, name: Name<'_>, mode: u32) -> io::Result<()> {
        Ok(fs::mkdirat(self.directory()?, name.0, permissions(mode))?)
    }

    /// Makes a regular file, a FIFO, a socket, or the character device 0:0 that overlay file systems know as "not there".
    /// No other device: those would be the host's, and open to whom the guest pleases.
    pub fn make_node(&self, name: Name<'_>, mode: u32, rdev: u32) -> io::Result<()> {
        let kind = FileType::from_raw_mode(mode);
        match kind {
            FileType::RegularFile | FileType::Fifo | FileType::Socket => {}
            FileType::CharacterDevice if rdev == 0 => {}
            _ => return Err(Errno::PERM.into()),
        }
        Ok(fs::mknodat(self.directory()?, name.0, kind, permissions(mode), 0)?)
    }

    /// Makes a symbolic link.
    pub fn make_symlink(&self, name: Name<'_>, target: &CStr) -> io::Result<()> {
        Ok(fs::symlinkat(target, self.directory()?, name.0)?)
    }

    /// Gives a file another name, in this directory.
    pub fn link(&self, name: Name<'_>, file: &Node) -> io::Result<()> {
        Ok(fs::linkat(fs::CWD, file.path()?, self.directory()?, name.0, AtFlags::SYMLINK_FOLLOW)?)
    }

    /// Takes a name away from what is no directory.
    pub fn unlink(&self, name: Name<'_>) -> io::Result<()> {
        Ok(fs::unlinkat(self.directory()?, name.0, AtFlags::empty())?)
    }

    /// Removes an empty directory.
    pub fn remove_dir(&self, name: Name<'_>) -> io::Result<()> {
        Ok(fs::unlinkat(self.directory()?, name.0, AtFlags::REMOVEDIR)?)
    }

    /// renameat2(2) with its flags.
    pub fn rename(&self, name: Name<'_>, to: &Node, new_name: Name<'_>, flags: u32) -> io::Result<()> {
        let flags = RenameFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        if flags.is_empty() {
            // Not every file system knows the other call.
            return Ok(fs::renameat(self.directory()?, name.0, to.directory()?, new_name.0)?);
        }
        Ok(fs::renameat_with(self.directory()?, name.0, to.directory()?, new_name.0, flags)?)
    }

    /// Where a symbolic link leads.
    pub fn read_link(&self) -> io::Result<CString> {
        Ok(fs::readlinkat(self.fd()?, c"", Vec::new())?)
    }

    /// Sets the permissions.
    pub fn chmod(&self, mode: u32) -> io::Result<()> {
        Ok(fs::chmod(self.path()?, permissions(mode))?)
    }

    /// Changes user, group, or at least the time of the last change, as chown(2).
    pub fn chown(&self, uid: Option<u32>, gid: Option<u32>) -> io::Result<()> {
        let (uid, gid) = (uid.filter(|id| *id != u32::MAX), gid.filter(|id| *id != u32::MAX));
        Ok(fs::chownat(self.fd()?, c"", uid.map(Uid::from_raw), gid.map(Gid::from_raw), AtFlags::EMPTY_PATH)?)
    }

    /// Sets the size of a regular file.
    pub fn truncate(&self, size: u64) -> io::Result<()> {
        Ok(fs::ftruncate(self.open(OFlags::WRONLY)?, size)?)
    }

    /// Sets times.
    pub fn set_times(&self, atime: TimeChange, mtime: TimeChange) -> io::Result<()> {
        let times = Timestamps { last_access: atime.into(), last_modification: mtime.into() };
        Ok(fs::utimensat(fs::CWD, self.path()?, &times, AtFlags::empty())?)
    }

    /// About the file system it is on.
    pub fn stat_fs(&self) -> io::Result<StatFs> {
        Ok(fs::fstatfs(self.fd()?)?)
    }

    /// Has the whole file system it is on written to disk.
    pub fn sync_fs(&self) -> io::Result<()> {
        match self.kind {
            _ if self.is_closed() => Ok(()),
            FileType::Directory => Ok(fs::syncfs(self.open_dir()?)?),
            _ => Ok(fs::syncfs(self.open(OFlags::RDONLY)?)?),
        }
    }
}

fn permissions(mode: u32) -> Mode {
    Mode::from_bits_truncate(mode & 0o7777)
}
