//! Requests that read or change a file's attributes.

use std::ffi::CStr;
use std::io;
use std::sync::atomic::Ordering;

use rustix::io::Errno;

use super::server::{Caller, Server};
use super::wire::{Args, GETATTR_FH, Out, SETXATTR_ACL_KILL_SGID, fattr};
use crate::backend::passthrough::{Node, Time, TimeChange};

impl Server {
    pub(super) fn getattr(&self, caller: Caller, mut args: Args<'_>) -> io::Result<Out> {
        let (flags, _, handle) = (args.u32()?, args.u32()?, args.u64()?);
        let stat = self.stat(caller.nodeid, (flags & GETATTR_FH != 0).then_some(handle))?;
        Ok(Out::default().attr_out(&stat, self.validity()).done())
    }

    /// Answers as [`Server::getattr`] does, and adds the file's creation time.
    pub(super) fn statx(&self, caller: Caller, mut args: Args<'_>) -> io::Result<Out> {
        let (flags, _, handle, _sync, _wanted) = (args.u32()?, args.u32()?, args.u64()?, args.u32()?, args.u32()?);
        let stat = self.stat(caller.nodeid, (flags & GETATTR_FH != 0).then_some(handle))?;
        Ok(Out::default().statx_out(&stat, self.validity()).done())
    }

    pub(super) fn setattr(&self, caller: Caller, mut args: Args<'_>) -> io::Result<Out> {
        let (valid, _, handle, size) = (args.u32()?, args.u32()?, args.u64()?, args.u64()?);
        let (_lock_owner, atime, mtime, _ctime) = (args.u64()?, args.u64()?, args.u64()?, args.u64()?);
        let (atime_nsec, mtime_nsec, _ctime_nsec) = (args.u32()?, args.u32()?, args.u32()?);
        let (mode, _, uid, gid) = (args.u32()?, args.u32()?, args.u32()?, args.u32()?);
        let has = |flag| valid & flag != 0;
        self.check_writable()?;
        let node = self.node(caller.nodeid)?;
        let handle = has(fattr::FH).then_some(handle);
        if has(fattr::MODE) {
            node.chmod(mode)?;
        }
        if has(fattr::UID) || has(fattr::GID) {
            self.chown(&node, has(fattr::UID).then_some(uid), has(fattr::GID).then_some(gid))?;
        }
        if has(fattr::SIZE) {
            let truncate = || match handle {
                Some(handle) => Ok(rustix::fs::ftruncate(self.handle(handle)?.file()?, size)?),
                None => self.with_descriptors(|| node.truncate(size)),
            };
            if has(fattr::KILL_SUIDGID) { self.identity.without_fsetid(truncate)? } else { truncate()? }
        }
        let change = |set, now, sec: u64, nsec| match (has(set), has(now)) {
            (false, _) => TimeChange::Keep,
            (_, true) => TimeChange::Now,
            _ => TimeChange::Set(Time { sec: sec as i64, nsec }),
        };
        let atime = change(fattr::ATIME, fattr::ATIME_NOW, atime, atime_nsec);
        let mtime = change(fattr::MTIME, fattr::MTIME_NOW, mtime, mtime_nsec);
        if (atime, mtime) != (TimeChange::Keep, TimeChange::Keep) {
            node.set_times(atime, mtime)?;
        }
        let stat = self.stat(caller.nodeid, handle)?;
        Ok(Out::default().attr_out(&stat, self.validity()).done())
    }

    /// Changes the owner. With squashed owners, only the owner that the guest already sees is accepted.
    fn chown(&self, node: &Node, uid: Option<u32>, gid: Option<u32>) -> io::Result<()> {
        let Some(squash) = self.squash else { return node.chown(uid, gid) };
        if uid.is_some_and(|id| id != squash) || gid.is_some_and(|id| id != squash) {
            return Err(Errno::PERM.into());
        }
        node.chown(None, None)
    }

    pub(super) fn readlink(&self, caller: Caller) -> io::Result<Out> {
        Ok(Out(self.node(caller.nodeid)?.read_link()?.into_bytes()))
    }

    pub(super) fn statfs(&self, caller: Caller) -> io::Result<Out> {
        let node = self.node(caller.nodeid)?;
        let mut out = Out::default();
        if node.is_closed() {
            // No blocks and no files; block sizes and name length as usual.
            return Ok(out.zeros(40).u32(4096).u32(255).u32(4096).zeros(28).done());
        }
        let stat = node.stat_fs()?;
        out.u64(stat.f_blocks).u64(stat.f_bfree).u64(stat.f_bavail).u64(stat.f_files).u64(stat.f_ffree);
        out.u32(stat.f_bsize as u32).u32(stat.f_namelen as u32).u32(stat.f_frsize as u32);
        Ok(out.zeros(28).done())
    }

    /// Writes everything to the disk; does nothing on a read-only share, as [`Server::fsync`].
    pub(super) fn sync_fs(&self, caller: Caller) -> io::Result<Out> {
        let node = self.node(caller.nodeid)?;
        if !self.readonly {
            self.with_descriptors(|| node.sync_fs())?;
        }
        Ok(Out::default())
    }

    pub(super) fn setxattr(&self, caller: Caller, mut args: Args<'_>) -> io::Result<Out> {
        let (size, flags) = (args.u32()?, args.u32()?);
        let more = if self.setxattr_flags.load(Ordering::Relaxed) { (args.u32()?, args.u32()?).0 } else { 0 };
        let name = args.text()?;
        let value = args.bytes(size as usize)?;
        self.check_writable()?;
        let node = self.node(caller.nodeid)?;
        let set = || node.set_xattr(name, value, flags, self.has_access_lists());
        if more & SETXATTR_ACL_KILL_SGID != 0 {
            self.identity.without_fsetid(set)?
        } else {
            set()?
        }
        Ok(Out::default())
    }

    pub(super) fn getxattr(&self, caller: Caller, mut args: Args<'_>) -> io::Result<Out> {
        let (size, _) = (args.u32()?, args.u32()?);
        let name: &CStr = args.text()?;
        let mut value = vec![0; size.min(64 << 10) as usize];
        let len = self.node(caller.nodeid)?.xattr(name, &mut value, self.has_access_lists())?;
        if size == 0 {
            return Ok(Out::default().u32(len as u32).u32(0).done());
        }
        value.truncate(len);
        Ok(Out(value))
    }

    pub(super) fn listxattr(&self, caller: Caller, mut args: Args<'_>) -> io::Result<Out> {
        let size = args.u32()?;
        let names = self.node(caller.nodeid)?.xattr_names(self.has_access_lists())?;
        match size as usize {
            0 => Ok(Out::default().u32(names.len() as u32).u32(0).done()),
            size if size < names.len() => Err(Errno::RANGE.into()),
            _ => Ok(Out(names)),
        }
    }

    pub(super) fn removexattr(&self, caller: Caller, mut args: Args<'_>) -> io::Result<Out> {
        let name = args.text()?;
        self.check_writable()?;
        self.node(caller.nodeid)?.remove_xattr(name, self.has_access_lists())?;
        Ok(Out::default())
    }
}
