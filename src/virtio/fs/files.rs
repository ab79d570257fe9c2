//! Requests about open files.

use std::fs::File;
use std::io;
use std::time::SystemTime;

use rustix::fs::{FallocateFlags, OFlags, SeekFrom};
use rustix::io::Errno;

use super::Cache;
use super::handles::Handle;
use super::inodes::Stamp;
use super::names::access;
use super::server::{Caller, MAX_TRANSFER, Server};
use super::wire::{Args, FSYNC_FDATASYNC, OPEN_KILL_SUIDGID, Out, WRITE_CACHE, WRITE_KILL_SUIDGID, fopen};
use crate::backend::passthrough::{self, Node, Time};
use crate::virtio::chain::{Reader, Writer};

impl Server {
    pub(super) fn open(&self, caller: Caller, mut args: Args<'_>) -> io::Result<Out> {
        let (flags, open_flags) = (args.u32()?, args.u32()?);
        let access = access(flags);
        if access != OFlags::RDONLY {
            self.check_writable()?;
        }
        let node = self.node(caller.nodeid)?;
        let file = self.open_node(&node, access, open_flags & OPEN_KILL_SUIDGID != 0)?;
        let keep = match self.cache {
            Cache::Never => false,
            Cache::Always => true,
            Cache::Auto | Cache::Names => {
                let stamp = node.stat().ok().and_then(|stat| Stamp::new(&stat, now()));
                self.inodes().is_unchanged(caller.nodeid, stamp)
            }
        };
        let handle = self.remember(caller.nodeid, Handle::File(file, node))?;
        Ok(Out::default().u64(handle).u32(if keep { fopen::KEEP_CACHE } else { 0 }).u32(0).done())
    }

    /// Opens regular files only. With `kill`, truncation clears the set-user-id bit.
    pub(super) fn open_node(&self, node: &Node, access: OFlags, kill: bool) -> io::Result<File> {
        let open = || self.with_descriptors(|| node.open(access));
        if kill && access.contains(OFlags::TRUNC) { self.identity.without_fsetid(open) } else { open() }
    }

    pub(super) fn opendir(&self, caller: Caller) -> io::Result<Out> {
        let node = self.node(caller.nodeid)?;
        let dir = self.with_descriptors(|| Handle::open_dir(node.clone()))?;
        let flags = if self.cache == Cache::Always { fopen::KEEP_CACHE | fopen::CACHE_DIR } else { 0 };
        let handle = self.remember(caller.nodeid, dir)?;
        Ok(Out::default().u64(handle).u32(flags).u32(0).done())
    }

    pub(super) fn release(&self, mut args: Args<'_>) -> io::Result<Out> {
        self.close(args.u64()?)?;
        Ok(Out::default())
    }

    /// Reads into the guest's memory; returns the number of bytes.
    pub(super) fn read(&self, mut args: Args<'_>, mut room: Writer<'_>) -> io::Result<usize> {
        let (handle, offset, size) = (args.u64()?, args.u64()?, args.u32()?);
        let handle = self.handle(handle)?;
        let file = handle.file()?;
        if size > MAX_TRANSFER {
            return Err(Errno::INVAL.into());
        }
        let room = room.take(size.into()).map_err(|_| Errno::INVAL)?;
        let buffers = room.buffers().map_err(|_| Errno::FAULT)?;
        passthrough::read(file, &buffers, offset)
    }

    /// Writes from the guest's memory.
    pub(super) fn write(&self, mut args: Args<'_>, mut data: Reader<'_>) -> io::Result<Out> {
        let (handle, offset, size, write_flags) = (args.u64()?, args.u64()?, args.u32()?, args.u32()?);
        let (_lock_owner, flags) = (args.u64()?, args.u32()?);
        self.check_writable()?;
        let handle = self.handle(handle)?;
        let file = handle.file()?;
        if size > MAX_TRANSFER {
            return Err(Errno::INVAL.into());
        }
        let data = data.take(size.into()).map_err(|_| Errno::INVAL)?;
        let buffers = data.buffers().map_err(|_| Errno::FAULT)?;
        let from_cache = write_flags & WRITE_CACHE != 0;
        let append = flags & libc::O_APPEND as u32 != 0 && !from_cache;
        let sync = flags & libc::O_DSYNC as u32 != 0 && !from_cache;
        let write = || passthrough::write(file, &buffers, offset, append, sync);
        let kill = write_flags & WRITE_KILL_SUIDGID != 0;
        let written = if kill { self.identity.without_fsetid(write) } else { write() }?;
        Ok(Out::default().u32(written as u32).u32(0).done())
    }

    pub(super) fn fsync(&self, mut args: Args<'_>) -> io::Result<Out> {
        let (handle, flags) = (args.u64()?, args.u32()?);
        let data_only = flags & FSYNC_FDATASYNC != 0;
        match &*self.handle(handle)? {
            // The guest has changed nothing, and should not keep the disk busy with other processes' changes.
            _ if self.readonly => {}
            Handle::Closed(_) => {}
            Handle::File(file, _) if data_only => file.sync_data()?,
            Handle::File(file, _) => file.sync_all()?,
            Handle::Dir(dir, _) if data_only => rustix::fs::fdatasync(dir)?,
            Handle::Dir(dir, _) => rustix::fs::fsync(dir)?,
        }
        Ok(Out::default())
    }

    pub(super) fn fallocate(&self, mut args: Args<'_>) -> io::Result<Out> {
        let (handle, offset, len, mode) = (args.u64()?, args.u64()?, args.u64()?, args.u32()?);
        self.check_writable()?;
        let known = FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE;
        let flags = FallocateFlags::from_bits(mode).filter(|flags| known.contains(*flags)).ok_or(Errno::OPNOTSUPP)?;
        rustix::fs::fallocate(self.handle(handle)?.file()?, flags, offset, len)?;
        Ok(Out::default())
    }

    /// Finds data or holes; the guest computes all other positions itself.
    pub(super) fn lseek(&self, mut args: Args<'_>) -> io::Result<Out> {
        let (handle, offset, whence) = (args.u64()?, args.u64()?, args.u32()?);
        let to = match whence as i32 {
            libc::SEEK_DATA => SeekFrom::Data(offset),
            libc::SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL.into()),
        };
        // Nothing else uses this descriptor's position.
        let found = rustix::fs::seek(self.handle(handle)?.file()?, to)?;
        Ok(Out::default().u64(found).done())
    }

    pub(super) fn copy_file_range(&self, mut args: Args<'_>) -> io::Result<Out> {
        let (from, from_at, _node, to, to_at) = (args.u64()?, args.u64()?, args.u64()?, args.u64()?, args.u64()?);
        let (len, flags) = (args.u64()?, args.u64()?);
        self.check_writable()?;
        if flags != 0 {
            return Err(Errno::INVAL.into());
        }
        let (from, to) = (self.handle(from)?, self.handle(to)?);
        let copied = passthrough::copy(from.file()?, from_at, to.file()?, to_at, len)?;
        Ok(Out::default().u32(copied as u32).u32(0).done())
    }
}

fn now() -> Time {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Time { sec: now.as_secs() as i64, nsec: now.subsec_nanos() }
}
