//! Requests about names in directories.

use std::fs::File;
use std::io;
use std::time::Duration;

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use super::Cache;
use super::handles::Handle;
use super::server::{Caller, Permissions, Server};
use super::wire::{Args, Entry, OPEN_KILL_SUIDGID, Out};
use crate::backend::passthrough::{self, NOWHERE, Name, Node, Stat};

impl Server {
    pub(super) fn lookup(&self, caller: Caller, mut args: Args<'_>) -> io::Result<Out> {
        let name = args.name()?;
        let dir = self.node(caller.nodeid)?;
        match self.enter(caller.nodeid, &dir, name) {
            Ok(entry) => Ok(Out::default().entry(&entry).done()),
            // The guest may cache a missing name too: node number 0 says that nothing is there.
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) && self.cache != Cache::Never => {
                Ok(Out::default().u64(0).u64(0).u64(self.names_validity().as_secs()).zeros(104).done())
            }
            Err(e) => Err(e),
        }
    }

    /// Creates a file and enters it among those that the guest knows.
    fn make(
        &self,
        caller: Caller,
        name: Name<'_>,
        permissions: Permissions,
        make: impl FnOnce(&Node, u32) -> io::Result<()>,
    ) -> io::Result<Entry> {
        self.check_writable()?;
        let dir = self.node(caller.nodeid)?;
        self.make_with_mode(caller, permissions, |mode| make(&dir, mode))?;
        let (node, mut stat) = self.with_descriptors(|| dir.child(name))?;
        self.mend_mode(&dir, &node, &mut stat, permissions.mode)?;
        self.enter_node(caller.nodeid, name, node, &stat)
    }

    /// Restores the mode bits that this process's umask removed, if this thread has no umask of its own; the guest has
    /// already applied its own umask. Does nothing if the directory has an access control list for new files, because
    /// then the umask had no effect.
    fn mend_mode(&self, dir: &Node, node: &Node, stat: &mut Stat, mode: u32) -> io::Result<()> {
        if passthrough::has_own_umask() || stat.kind() == FileType::Symlink {
            return Ok(());
        }
        let (asked, missing) = (mode & 0o777, mode & self.umask & 0o777);
        // If the mode differs, this is not the new file: a host process may have put another one in its place.
        let as_made = stat.mode & 0o777 == asked & !self.umask;
        if missing != 0 && as_made && !dir.has_default_acl() {
            node.chmod(stat.mode | missing)?;
            *stat = node.stat()?;
        }
        Ok(())
    }

    pub(super) fn mknod(&self, caller: Caller, mut args: Args<'_>) -> io::Result<Out> {
        let (mode, rdev, umask, _) = (args.u32()?, args.u32()?, args.u32()?, args.u32()?);
        let name = args.name()?;
        let make = |dir: &Node, mode| dir.make_node(name, mode, rdev);
        let entry = self.make(caller, name, Permissions { mode, umask }, make)?;
        Ok(Out::default().entry(&entry).done())
    }

    pub(super) fn mkdir(&self, caller: Caller, mut args: Args<'_>) -> io::Result<Out> {
        let (mode, umask) = (args.u32()?, args.u32()?);
        let name = args.name()?;
        let entry = self.make(caller, name, Permissions { mode, umask }, |dir, mode| dir.make_dir(name, mode))?;
        Ok(Out::default().entry(&entry).done())
    }

    pub(super) fn symlink(&self, caller: Caller, mut args: Args<'_>) -> io::Result<Out> {
        let (name, target) = (args.name()?, args.text()?);
        let all = Permissions { mode: 0o777, umask: 0 };
        let entry = self.make(caller, name, all, |dir, _| dir.make_symlink(name, target))?;
        Ok(Out::default().entry(&entry).done())
    }

    pub(super) fn link(&self, caller: Caller, mut args: Args<'_>) -> io::Result<Out> {
        let old = args.u64()?;
        let name = args.name()?;
        self.check_writable()?;
        let (old, dir) = (self.node(old)?, self.node(caller.nodeid)?);
        dir.link(name, &old)?;
        let entry = self.enter(caller.nodeid, &dir, name)?;
        Ok(Out::default().entry(&entry).done())
    }

    /// Creates a file and opens it. Opens an existing file, unless the guest asks for a new one (O_EXCL).
    pub(super) fn create(&self, caller: Caller, mut args: Args<'_>) -> io::Result<Out> {
        let (flags, mode, umask, open_flags) = (args.u32()?, args.u32()?, args.u32()?, args.u32()?);
        let name = args.name()?;
        self.check_writable()?;
        let dir = self.node(caller.nodeid)?;
        let access = access(flags);
        let make = |mode| dir.create(name, access - OFlags::TRUNC, mode);
        let made = self.with_descriptors(|| self.make_with_mode(caller, Permissions { mode, umask }, make));
        let (file, entry) = match made {
            Ok(file) => {
                let (node, mut stat) = self.with_descriptors(|| dir.child(name))?;
                let made = Stat::of(&file)?;
                if (made.dev, made.ino) != (stat.dev, stat.ino) {
                    // A host process has put another file there. The guest looks the name up again.
                    return Err(Errno::STALE.into());
                }
                self.mend_mode(&dir, &node, &mut stat, mode)?;
                (Some(file), self.enter_node(caller.nodeid, name, node, &stat)?)
            }
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) && flags & libc::O_EXCL as u32 == 0 => {
                (None, self.enter(caller.nodeid, &dir, name)?)
            }
            Err(e) => return Err(e),
        };
        let handle = self.open_entry(&entry, file, access, open_flags & OPEN_KILL_SUIDGID != 0);
        // After an error the guest does not learn of the file and so cannot forget it.
        let handle = handle.inspect_err(|_| self.inodes().forget(entry.id, 1))?;
        // O_TRUNC may have changed the size, so the attributes must not be cached.
        let attributes = if access.contains(OFlags::TRUNC) { Duration::ZERO } else { entry.attributes };
        Ok(Out::default().entry(&Entry { attributes, ..entry }).u64(handle).u32(0).u32(0).done())
    }

    /// Creates a file without a name and opens it.
    pub(super) fn create_unnamed(&self, caller: Caller, mut args: Args<'_>) -> io::Result<Out> {
        let (flags, mode, umask, _open_flags) = (args.u32()?, args.u32()?, args.u32()?, args.u32()?);
        self.check_writable()?;
        let dir = self.node(caller.nodeid)?;
        let (access, exclusive) = (access(flags) - OFlags::TRUNC, flags & libc::O_EXCL as u32 != 0);
        let make = |mode| dir.create_unnamed(access, mode, exclusive);
        let made = self.with_descriptors(|| self.make_with_mode(caller, Permissions { mode, umask }, make));
        let (file, node, mut stat) = made?;
        self.mend_mode(&dir, &node, &mut stat, mode)?;
        let entry = self.enter_node(caller.nodeid, NOWHERE, node, &stat)?;
        let handle = self.open_entry(&entry, Some(file), access, false);
        let handle = handle.inspect_err(|_| self.inodes().forget(entry.id, 1))?;
        Ok(Out::default().entry(&entry).u64(handle).u32(0).u32(0).done())
    }

    /// Returns a handle for `file`, or opens the entry if it is `None`.
    fn open_entry(&self, entry: &Entry, file: Option<File>, access: OFlags, kill: bool) -> io::Result<u64> {
        if entry.stat.kind() == FileType::Symlink {
            return Err(Errno::LOOP.into());
        }
        let node = self.node(entry.id)?;
        let file = file.map_or_else(|| self.open_node(&node, access, kill), Ok)?;
        self.remember(entry.id, Handle::File(file, node))
    }

    pub(super) fn remove(&self, caller: Caller, mut args: Args<'_>, dir: bool) -> io::Result<Out> {
        let name = args.name()?;
        self.check_writable()?;
        let parent = self.node(caller.nodeid)?;
        if dir {
            parent.remove_dir(name)?
        } else {
            parent.unlink(name)?
        }
        Ok(Out::default())
    }

    pub(super) fn rename(&self, caller: Caller, mut args: Args<'_>, with_flags: bool) -> io::Result<Out> {
        let new_dir = args.u64()?;
        let flags = if with_flags { (args.u32()?, args.u32()?).0 } else { 0 };
        let (name, new_name) = (args.name()?, args.name()?);
        self.check_writable()?;
        let (from, to) = (self.node(caller.nodeid)?, self.node(new_dir)?);
        let rename = || from.rename(name, &to, new_name, flags);
        // The whiteout that is left in its place is a new file, and needs an owner.
        if flags & libc::RENAME_WHITEOUT != 0 {
            self.make_as(caller, rename)?
        } else {
            rename()?
        }
        self.saw(new_dir, &to, new_name);
        if flags & libc::RENAME_EXCHANGE != 0 {
            self.saw(caller.nodeid, &from, name);
        }
        Ok(Out::default())
    }

    /// Records where a file is now, so that it is found again after its descriptor is closed.
    fn saw(&self, parent: u64, dir: &Node, name: Name<'_>) {
        if let Ok((_, stat)) = dir.child(name) {
            self.inodes().seen(parent, name, &stat);
        }
    }
}

/// Returns the guest's open flags that also apply to the host's file. O_APPEND is applied to each write instead,
/// because the same descriptor may also write elsewhere in the file (mmap). O_DIRECT concerns only the guest's own
/// cache.
pub(super) fn access(flags: u32) -> OFlags {
    OFlags::from_bits_truncate(flags) & (OFlags::ACCMODE | OFlags::TRUNC)
}
