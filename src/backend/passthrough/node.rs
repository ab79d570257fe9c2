//! Files of any kind, held by descriptor, and the operations on them and on names in a directory.

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

/// A single component of a path: not empty, without `/`, neither `.` nor `..`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name<'a>(&'a CStr);

/// Placeholder name for a file without a name (O_TMPFILE). No call finds anything by it.
pub const NOWHERE: Name<'static> = Name(c"");

impl<'a> Name<'a> {
    /// Checks that `name` is a valid component.
    pub fn new(name: &'a CStr) -> io::Result<Self> {
        match name.to_bytes() {
            b"" | b"." | b".." => Err(Errno::INVAL.into()),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL.into()),
            bytes if bytes.len() > 255 => Err(Errno::NAMETOOLONG.into()),
            _ => Ok(Name(name)),
        }
    }

    /// Returns the name as a C string.
    pub fn as_c_str(self) -> &'a CStr {
        self.0
    }
}

/// Time since 1970.
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

/// Change of one of a file's times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimeChange {
    /// Keep the time.
    Keep,
    /// Set the time to the host's current time.
    Now,
    /// Set the time to this value.
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

/// Status of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stat {
    /// Device number of the file system.
    pub dev: u64,
    /// Id of the mount; 0 if the kernel does not report it (before 5.8).
    pub mount: u64,
    /// Inode number.
    pub ino: u64,
    /// File type and permissions.
    pub mode: u32,
    /// Number of names.
    pub nlink: u32,
    /// User id of the owner.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Major and minor number, if the file is a device.
    pub rdev: (u32, u32),
    /// Size in bytes.
    pub size: u64,
    /// Space that the file takes, in units of 512 bytes.
    pub blocks: u64,
    /// Preferred number of bytes per read.
    pub blksize: u32,
    /// Time of the last read.
    pub atime: Time,
    /// Time of the last change of the contents.
    pub mtime: Time,
    /// Time of the last change of the contents or status.
    pub ctime: Time,
    /// Time of creation; 0 if the file system does not report it.
    pub born: Time,
}

impl Stat {
    /// Queries an open file.
    pub fn of(fd: impl AsFd) -> io::Result<Self> {
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME | StatxFlags::MNT_ID;
        Ok(fs::statx(fd, c"", AtFlags::EMPTY_PATH, wanted)?.into())
    }

    /// Returns the status of the empty directory that replaces a mount of the host; only its identity is the
    /// original's.
    fn closed(&self) -> Self {
        let Stat { dev, mount, ino, blksize, .. } = *self;
        let mode = FileType::Directory.as_raw_mode() | 0o555;
        Stat { dev, mount, ino, blksize, mode, nlink: 2, ..Stat::default() }
    }

    /// Returns the file type from the mode.
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

/// A file of any kind, held by a descriptor that refers to the file without opening it.
#[derive(Debug)]
pub struct Node {
    held: Held,
    kind: FileType,
}

/// Representation of the file.
#[derive(Debug)]
enum Held {
    File {
        fd: OwnedFd,
        /// Device number of the file system, and id of the mount (in `mount`).
        dev: u64,
        mount: u64,
        /// True if looking up a name here may make the host mount a file system.
        automount: bool,
    },
    /// One of the kernel's interfaces (see `interface`), of which no descriptor is held: the guest sees an empty
    /// directory that cannot be written to.
    Closed(Stat),
}

const NO_MODE: Mode = Mode::empty();

impl Node {
    /// Creates the node of the shared folder, or returns the name of the kernel interface that it is.
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

    /// Returns the descriptor, for calls that a closed directory refuses.
    pub(super) fn fd(&self) -> io::Result<&OwnedFd> {
        match &self.held {
            Held::File { fd, .. } => Ok(fd),
            Held::Closed(_) => Err(Errno::ROFS.into()),
        }
    }

    /// Returns the descriptor for creating and removing names in this directory; refused where the host automounts.
    fn directory(&self) -> io::Result<&OwnedFd> {
        match &self.held {
            Held::File { fd, automount: false, .. } => Ok(fd),
            _ => Err(Errno::ROFS.into()),
        }
    }

    /// Returns a path that leads in one step to the file itself, for calls that follow links.
    pub(super) fn path(&self) -> io::Result<String> {
        Ok(format!("/proc/self/fd/{}", self.fd()?.as_raw_fd()))
    }

    /// Returns true if this is the empty directory that replaces a kernel interface of the host.
    pub fn is_closed(&self) -> bool {
        matches!(self.held, Held::Closed(_))
    }

    /// Returns the status of the file.
    pub fn stat(&self) -> io::Result<Stat> {
        match &self.held {
            Held::File { fd, .. } => Stat::of(fd),
            Held::Closed(stat) => Ok(*stat),
        }
    }

    pub(super) fn permissions(&self) -> io::Result<u32> {
        Ok(fs::stat(self.path()?)?.st_mode)
    }

    /// Looks up a name in this directory; the file may be of any kind. Where one of the kernel's interfaces begins, the
    /// result is an empty directory.
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

    /// Looks up a child that the kernel finds without asking a daemon (Linux 5.12): a file system that is already
    /// mounted in a directory of automount points. Other names count as missing.
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
            // Linux before 5.6 and some containers lack this call; a single name cannot lead out anyway.
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
        // Reading some files of /proc and /sys blocks, and so does opening a file on which a process holds a lease.
        let flags = flags | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        Ok(File::from(fs::open(self.path()?, flags, NO_MODE)?))
    }

    /// Opens a directory for its entries.
    pub fn open_dir(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(fs::openat(self.fd()?, c".", flags, NO_MODE)?)
    }

    /// Creates a regular file and opens it; the name must not exist.
    pub fn create(&self, name: Name<'_>, flags: OFlags, mode: u32) -> io::Result<File> {
        let flags = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        self.directory()?;
        Ok(File::from(self.open_beneath(name, flags, permissions(mode))?))
    }

    /// Creates a regular file without a name in this directory, and opens it. It can get a name later unless it is
    /// `exclusive`. Also returns its node.
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

    /// Creates a directory.
    pub fn make_dir(&self, name: Name<'_>, mode: u32) -> io::Result<()> {
        Ok(fs::mkdirat(self.directory()?, name.0, permissions(mode))?)
    }

    /// Creates a regular file, a FIFO, a socket, or the character device 0:0, which overlay file systems use as a
    /// whiteout. Other devices are refused: they would be the host's, accessible to anyone the guest chooses.
    pub fn make_node(&self, name: Name<'_>, mode: u32, rdev: u32) -> io::Result<()> {
        let kind = FileType::from_raw_mode(mode);
        match kind {
            FileType::RegularFile | FileType::Fifo | FileType::Socket => {}
            FileType::CharacterDevice if rdev == 0 => {}
            _ => return Err(Errno::PERM.into()),
        }
        Ok(fs::mknodat(self.directory()?, name.0, kind, permissions(mode), 0)?)
    }

    /// Creates a symbolic link.
    pub fn make_symlink(&self, name: Name<'_>, target: &CStr) -> io::Result<()> {
        Ok(fs::symlinkat(target, self.directory()?, name.0)?)
    }

    /// Gives a file another name, in this directory.
    pub fn link(&self, name: Name<'_>, file: &Node) -> io::Result<()> {
        Ok(fs::linkat(fs::CWD, file.path()?, self.directory()?, name.0, AtFlags::SYMLINK_FOLLOW)?)
    }

    /// Removes the name of a file that is not a directory.
    pub fn unlink(&self, name: Name<'_>) -> io::Result<()> {
        Ok(fs::unlinkat(self.directory()?, name.0, AtFlags::empty())?)
    }

    /// Removes an empty directory.
    pub fn remove_dir(&self, name: Name<'_>) -> io::Result<()> {
        Ok(fs::unlinkat(self.directory()?, name.0, AtFlags::REMOVEDIR)?)
    }

    /// Renames a file as renameat2(2), with its flags.
    pub fn rename(&self, name: Name<'_>, to: &Node, new_name: Name<'_>, flags: u32) -> io::Result<()> {
        let flags = RenameFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        if flags.is_empty() {
            // Not every file system supports renameat2.
            return Ok(fs::renameat(self.directory()?, name.0, to.directory()?, new_name.0)?);
        }
        Ok(fs::renameat_with(self.directory()?, name.0, to.directory()?, new_name.0, flags)?)
    }

    /// Returns the target of a symbolic link.
    pub fn read_link(&self) -> io::Result<CString> {
        Ok(fs::readlinkat(self.fd()?, c"", Vec::new())?)
    }

    /// Sets the permissions.
    pub fn chmod(&self, mode: u32) -> io::Result<()> {
        Ok(fs::chmod(self.path()?, permissions(mode))?)
    }

    /// Changes user and group as chown(2); even with neither, the time of the last change is updated.
    pub fn chown(&self, uid: Option<u32>, gid: Option<u32>) -> io::Result<()> {
        let (uid, gid) = (uid.filter(|id| *id != u32::MAX), gid.filter(|id| *id != u32::MAX));
        Ok(fs::chownat(self.fd()?, c"", uid.map(Uid::from_raw), gid.map(Gid::from_raw), AtFlags::EMPTY_PATH)?)
    }

    /// Sets the size of a regular file.
    pub fn truncate(&self, size: u64) -> io::Result<()> {
        Ok(fs::ftruncate(self.open(OFlags::WRONLY)?, size)?)
    }

    /// Sets the times of the last read and of the last change of the contents.
    pub fn set_times(&self, atime: TimeChange, mtime: TimeChange) -> io::Result<()> {
        let times = Timestamps { last_access: atime.into(), last_modification: mtime.into() };
        Ok(fs::utimensat(fs::CWD, self.path()?, &times, AtFlags::empty())?)
    }

    /// Returns the status of the file system that the file is on.
    pub fn stat_fs(&self) -> io::Result<StatFs> {
        Ok(fs::fstatfs(self.fd()?)?)
    }

    /// Writes the whole file system that the file is on to disk.
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
