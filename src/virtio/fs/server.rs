//! Parses requests, finds the files that they concern and performs them. The operations are in `names` (directory
//! changes and lookups), `files` (open files), `listing` and `attributes`.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::io::Errno;

use super::budget::Budget;
use super::handles::{Handle, Handles};
use super::inodes::{Inodes, Limits};
use super::listing::Listing;
use super::wire::{self, Args, IN_HEADER, InHeader, OUT_HEADER, Out, init, op};
use super::{Cache, FsConfig};
use crate::backend::passthrough::{self, Identity, Name, Node, Owner, Stat};
use crate::memory::GuestRam;
use crate::virtio::Fault;
use crate::virtio::chain::{Chain, Reader, Writer};

/// Maximum number of bytes of one read or write, as `max_pages` reports it.
pub(super) const MAX_TRANSFER: u32 = 1 << 20;
const MAX_PAGES: u16 = (MAX_TRANSFER >> 12) as u16;
/// Maximum size of a request's arguments, without the data of a write. An extended attribute with its name is the
/// longest.
const MAX_ARGS: u64 = (64 << 10) + 4096;
/// Cache lifetimes, chosen by [`Cache`].
const SHORT: Duration = Duration::from_secs(1);
const LONG: Duration = Duration::from_secs(86400);
/// Maximum number of background requests (read-ahead) of the guest, and the number from which it counts as congested.
const BACKGROUND: (u16, u16) = (64, 48);

/// The shared folder, with everything that the guest knows of it.
pub(super) struct Server {
    pub readonly: bool,
    pub squash: Option<u32>,
    pub cache: Cache,
    pub identity: Identity,
    /// Umask of this process; the guest has already applied its own.
    pub umask: u32,
    inodes: Mutex<Inodes>,
    handles: Mutex<Handles>,
    pub listing: Mutex<Listing>,
    /// Set between the guest's INIT and DESTROY.
    begun: AtomicBool,
    /// Presents mounts within the folder as part of the same file system.
    flat: bool,
    /// Reports mounts within the folder to the guest as submounts.
    pub submounts: AtomicBool,
    /// The guest supports access control lists and leaves its umask to the device.
    pub access_lists: AtomicBool,
    /// The guest's SETXATTR requests carry additional flags.
    pub setxattr_flags: AtomicBool,
}

/// Node and owner of a request.
#[derive(Clone, Copy)]
pub(super) struct Caller {
    pub nodeid: u64,
    pub owner: Owner,
}

/// Mode of a new file, and umask of the process that creates it.
#[derive(Clone, Copy)]
pub(super) struct Permissions {
    pub mode: u32,
    pub umask: u32,
}

/// Answer to a request, after the header.
pub(super) enum Answer {
    /// Bytes to be written into the guest's memory.
    Bytes(Out),
    /// Number of bytes that are already in the guest's memory.
    Placed(usize),
    /// No bytes.
    Nothing,
}

impl From<Out> for Answer {
    fn from(out: Out) -> Self {
        Answer::Bytes(out)
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Server {
    /// Opens the folder.
    pub fn new(config: &FsConfig, budget: &Budget) -> Result<Self, passthrough::Error> {
        let (root, stat) = passthrough::open_root(&config.path)?;
        Ok(Server {
            readonly: config.readonly,
            squash: config.squash_uid,
            flat: config.flat,
            cache: config.cache,
            identity: Identity::of_process(),
            umask: passthrough::umask(),
            inodes: Mutex::new(Inodes::new(Arc::new(root), &stat, Limits::new(budget.known.clone(), 0))),
            handles: Mutex::new(Handles::new(budget.open.clone())),
            listing: Mutex::default(),
            begun: AtomicBool::new(false),
            submounts: AtomicBool::new(false),
            access_lists: AtomicBool::new(false),
            setxattr_flags: AtomicBool::new(false),
        })
    }

    /// Sets the size of the guest's memory.
    pub fn set_guest_ram(&self, bytes: u64) {
        lock(&self.inodes).set_guest_ram(bytes);
    }

    #[cfg(test)]
    pub fn set_limits(&self, limits: Limits) {
        lock(&self.inodes).set_limits(limits);
    }

    #[cfg(test)]
    pub fn counts(&self) -> (usize, usize, usize) {
        let (files, descriptors) = lock(&self.inodes).counts();
        (files, descriptors, lock(&self.handles).len())
    }

    /// Returns whether the guest has the folder mounted.
    pub fn is_mounted(&self) -> bool {
        self.begun.load(Ordering::Acquire)
    }

    /// Marks the folder as mounted; from now on requests are answered.
    pub fn begin(&self) {
        self.begun.store(true, Ordering::Release);
    }

    /// Forgets everything that the guest knew.
    pub fn clear(&self) {
        self.begun.store(false, Ordering::Release);
        let closed = lock(&self.handles).clear();
        lock(&self.inodes).clear();
        *lock(&self.listing) = Listing::default();
        drop(closed);
    }

    /// Serves a request; returns the number of bytes written into the chain.
    pub fn serve(&self, chain: &Chain, ram: &GuestRam) -> Result<u32, Fault> {
        let mut reader = chain.reader(ram);
        let mut header = [0; IN_HEADER];
        reader.read(&mut header).map_err(|_| Fault::Device("a file system request is shorter than its header"))?;
        let header = InHeader::parse(&header)?;
        let mut answer = chain.writer(ram);
        let answered = !matches!(header.opcode, op::FORGET | op::BATCH_FORGET | op::INTERRUPT);
        if answered && answer.len() < OUT_HEADER as u64 {
            return Err(Fault::Device("a file system request has no room for its answer"));
        }
        if !answered {
            let _ = self.request(&header, reader, answer);
            return Ok(0);
        }
        let mut head = answer.take(OUT_HEADER as u64)?;
        let result = self.request(&header, reader, answer).and_then(|given| {
            let len = match given {
                Answer::Placed(len) => len,
                Answer::Bytes(out) => {
                    answer.write(&out.0).map_err(|_| Errno::INVAL)?;
                    out.0.len()
                }
                Answer::Nothing => 0,
            };
            Ok(len)
        });
        let (len, error) = match result {
            Ok(len) => (OUT_HEADER + len, 0),
            Err(e) => (OUT_HEADER, e.raw_os_error().unwrap_or(libc::EIO)),
        };
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        head.write(&Out::default().u32(len).u32(error.wrapping_neg() as u32).u64(header.unique).done().0)?;
        Ok(len)
    }

    fn request(&self, header: &InHeader, mut reader: Reader<'_>, room: Writer<'_>) -> io::Result<Answer> {
        if u64::from(header.len) != IN_HEADER as u64 + reader.len() {
            return Err(Errno::INVAL.into());
        }
        if !self.is_mounted() && header.opcode != op::INIT {
            return Err(Errno::NOTCONN.into());
        }
        let InHeader { nodeid, uid, gid, .. } = *header;
        let caller = Caller { nodeid, owner: Owner { uid, gid } };
        let len = if header.opcode == op::WRITE { wire::WRITE_IN as u64 } else { reader.len() };
        if len > MAX_ARGS {
            return Err(Errno::TOOBIG.into());
        }
        let mut bytes = vec![0; len as usize];
        reader.read(&mut bytes).map_err(|_| Errno::INVAL)?;
        let args = Args(&bytes);
        if let Some(answer) = self.directory_request(header.opcode, caller, args)? {
            return Ok(answer.into());
        }
        Ok(match header.opcode {
            op::READ => Answer::Placed(self.read(args, room)?),
            op::WRITE => self.write(args, reader)?.into(),
            op::READDIR => self.read_dir(args, caller, room.len(), false)?.into(),
            op::READDIRPLUS => self.read_dir(args, caller, room.len(), true)?.into(),
            op::INIT => self.init(args)?.into(),
            op::DESTROY => {
                self.clear();
                Out::default().into()
            }
            op::FORGET | op::BATCH_FORGET => self.forget(header.opcode, nodeid, args)?,
            op::INTERRUPT => Answer::Nothing,
            _ => self.file_request(header.opcode, caller, args)?.into(),
        })
    }

    /// Handles requests about names; returns `None` for other requests.
    fn directory_request(&self, opcode: u32, caller: Caller, args: Args<'_>) -> io::Result<Option<Out>> {
        Ok(Some(match opcode {
            op::LOOKUP => self.lookup(caller, args)?,
            op::SYMLINK => self.symlink(caller, args)?,
            op::MKNOD => self.mknod(caller, args)?,
            op::MKDIR => self.mkdir(caller, args)?,
            op::CREATE => self.create(caller, args)?,
            op::TMPFILE => self.create_unnamed(caller, args)?,
            op::LINK => self.link(caller, args)?,
            op::UNLINK | op::RMDIR => self.remove(caller, args, opcode == op::RMDIR)?,
            op::RENAME | op::RENAME2 => self.rename(caller, args, opcode == op::RENAME2)?,
            _ => return Ok(None),
        }))
    }

    /// Handles requests about a single file.
    fn file_request(&self, opcode: u32, caller: Caller, args: Args<'_>) -> io::Result<Out> {
        match opcode {
            op::GETATTR => self.getattr(caller, args),
            op::STATX => self.statx(caller, args),
            op::SETATTR => self.setattr(caller, args),
            op::READLINK => self.readlink(caller),
            op::STATFS => self.statfs(caller),
            op::SETXATTR => self.setxattr(caller, args),
            op::GETXATTR => self.getxattr(caller, args),
            op::LISTXATTR => self.listxattr(caller, args),
            op::REMOVEXATTR => self.removexattr(caller, args),
            op::OPEN => self.open(caller, args),
            op::OPENDIR => self.opendir(caller),
            op::RELEASE | op::RELEASEDIR => self.release(args),
            op::FSYNC | op::FSYNCDIR => self.fsync(args),
            op::FALLOCATE => self.fallocate(args),
            op::LSEEK => self.lseek(args),
            op::COPY_FILE_RANGE => self.copy_file_range(args),
            op::SYNCFS => self.sync_fs(caller),
            op::IOCTL => Err(Errno::NOTTY.into()),
            // Deliberately not supported: ACCESS (the guest checks permissions itself), FLUSH (closing needs no action
            // here), and locks (the guest keeps them).
            _ => Err(Errno::NOSYS.into()),
        }
    }

    /// Answers INIT, which agrees on version, flags and limits.
    fn init(&self, mut args: Args<'_>) -> io::Result<Out> {
        let (major, minor) = (args.u32()?, args.u32()?);
        let mut out = Out::default();
        if major > wire::MAJOR {
            // The guest sends INIT again, with this version.
            return Ok(out.u32(wire::MAJOR).u32(wire::MINOR).zeros(56).done());
        }
        if major < wire::MAJOR || minor < wire::OLDEST_MINOR {
            return Err(Errno::PROTO.into());
        }
        let (readahead, offered) = (args.u32()?, args.u32()?);
        let mut wanted = init::ASYNC_READ
            | init::ATOMIC_O_TRUNC
            | init::BIG_WRITES
            | init::DO_READDIRPLUS
            | init::READDIRPLUS_AUTO
            | init::ASYNC_DIO
            | init::PARALLEL_DIROPS
            | init::MAX_PAGES
            | init::CACHE_SYMLINKS
            | init::HANDLE_KILLPRIV_V2
            | init::SETXATTR_EXT;
        if self.cache != Cache::Always {
            wanted |= init::AUTO_INVAL_DATA;
        }
        if !self.flat {
            wanted |= init::SUBMOUNTS;
        }
        // An overlay on top has access control lists for its own files. With squashed owners, lists would reveal the
        // real ones.
        let lists = init::POSIX_ACL | init::DONT_MASK;
        if !self.flat && self.squash.is_none() && passthrough::has_own_umask() && offered & lists == lists {
            wanted |= lists;
        }
        let flags = wanted & offered;
        self.clear();
        self.submounts.store(flags & init::SUBMOUNTS != 0, Ordering::Relaxed);
        self.access_lists.store(flags & init::POSIX_ACL != 0, Ordering::Relaxed);
        self.setxattr_flags.store(flags & init::SETXATTR_EXT != 0, Ordering::Relaxed);
        self.begin();
        out.u32(wire::MAJOR).u32(minor.min(wire::MINOR)).u32(readahead).u32(flags);
        // Timestamps in nanoseconds; no mapping, no further flags.
        out.u16(BACKGROUND.0).u16(BACKGROUND.1).u32(MAX_TRANSFER).u32(1).u16(MAX_PAGES).u16(0).u32(0);
        Ok(out.zeros(28).done())
    }

    fn forget(&self, opcode: u32, nodeid: u64, mut args: Args<'_>) -> io::Result<Answer> {
        let mut inodes = lock(&self.inodes);
        if opcode == op::FORGET {
            inodes.forget(nodeid, args.u64()?);
            return Ok(Answer::Nothing);
        }
        // The stated count is ignored: all entries in the request count, and its size is bounded.
        let (_count, _) = (args.u32()?, args.u32()?);
        while let (Ok(id), Ok(lookups)) = (args.u64(), args.u64()) {
            inodes.forget(id, lookups);
        }
        Ok(Answer::Nothing)
    }

    /// Returns how long the guest may cache attributes.
    pub fn validity(&self) -> Duration {
        match self.cache {
            Cache::Never => Duration::ZERO,
            Cache::Auto | Cache::Names => SHORT,
            Cache::Always => LONG,
        }
    }

    /// Returns how long the guest may cache names.
    pub fn names_validity(&self) -> Duration {
        if self.cache == Cache::Names { LONG } else { self.validity() }
    }

    /// Returns the attributes as the guest sees them, with squashed owners if configured.
    pub fn seen(&self, stat: Stat) -> Stat {
        match self.squash {
            Some(id) => Stat { uid: id, gid: id, ..stat },
            None => stat,
        }
    }

    pub fn node(&self, id: u64) -> io::Result<Arc<Node>> {
        self.with_descriptors(|| lock(&self.inodes).node(id))
    }

    pub fn inodes(&self) -> MutexGuard<'_, Inodes> {
        lock(&self.inodes)
    }

    pub fn handles(&self) -> MutexGuard<'_, Handles> {
        lock(&self.handles)
    }

    pub fn handle(&self, id: u64) -> io::Result<Arc<Handle>> {
        lock(&self.handles).get(id)
    }

    pub fn remember(&self, file: u64, handle: Handle) -> io::Result<u64> {
        lock(&self.handles).insert(file, handle)
    }

    pub fn close(&self, id: u64) -> io::Result<()> {
        // The file is closed here, after the lock was released.
        let closed = lock(&self.handles).remove(id);
        closed.map(drop)
    }

    /// Looks a name up and adds the file to those that the guest knows.
    pub fn enter(&self, parent: u64, dir: &Node, name: Name<'_>) -> io::Result<wire::Entry> {
        let (node, stat) = self.with_descriptors(|| dir.child(name))?;
        self.enter_node(parent, name, node, &stat)
    }

    pub fn enter_node(&self, parent: u64, name: Name<'_>, node: Node, stat: &Stat) -> io::Result<wire::Entry> {
        let (id, submount) = lock(&self.inodes).enter(parent, name, node, stat)?;
        let told = submount && self.submounts.load(Ordering::Relaxed);
        let flags = if told { wire::ATTR_SUBMOUNT } else { 0 };
        let (names, attributes) = (self.names_validity(), self.validity());
        Ok(wire::Entry { id, stat: self.seen(*stat), flags, names, attributes })
    }

    /// Runs an operation that needs a descriptor. If none is left, closes some and tries once more.
    pub fn with_descriptors<T>(&self, mut open: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        match open() {
            Err(e) if matches!(e.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => {
                let mut inodes = lock(&self.inodes);
                let some = inodes.descriptors() / 4 + 1;
                inodes.close_some(some);
                drop(inodes);
                open()
            }
            result => result,
        }
    }

    /// Creates a file that belongs to the caller, unless owners are squashed.
    pub fn make_as<T>(&self, caller: Caller, make: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        if self.squash.is_some() { make() } else { self.identity.make_as(caller.owner, make) }
    }

    /// Returns whether access control lists are supported.
    pub fn has_access_lists(&self) -> bool {
        self.access_lists.load(Ordering::Relaxed)
    }

    /// Creates a file with the mode that the guest asks for, less the umask if the guest leaves that to the device.
    pub fn make_with_mode<T>(
        &self,
        caller: Caller,
        Permissions { mode, umask }: Permissions,
        make: impl FnOnce(u32) -> io::Result<T>,
    ) -> io::Result<T> {
        let umask = if self.has_access_lists() { umask } else { 0 };
        if passthrough::has_own_umask() {
            return passthrough::with_umask(umask, || self.make_as(caller, || make(mode)));
        }
        self.make_as(caller, || make(mode & !(umask & 0o777)))
    }

    /// Fails with EROFS on a read-only share.
    pub fn check_writable(&self) -> io::Result<()> {
        if self.readonly { Err(Errno::ROFS.into()) } else { Ok(()) }
    }

    /// Returns the attributes of a file, through its handle if there is one.
    pub fn stat(&self, nodeid: u64, handle: Option<u64>) -> io::Result<Stat> {
        let stat = match handle {
            None => self.node(nodeid)?.stat()?,
            Some(id) => match &*self.handle(id)? {
                Handle::File(file, _) => Stat::of(file.as_fd())?,
                Handle::Dir(dir, _) => Stat::of(dir)?,
                Handle::Closed(node) => node.stat()?,
            },
        };
        Ok(self.seen(stat))
    }
}
