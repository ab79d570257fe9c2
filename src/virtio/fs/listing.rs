//! Requests for the entries of a directory. The guest takes some twenty entries at a time, while the host returns
//! hundreds: the remaining ones are kept for the directory that was read last.

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use rustix::fs::FileType;

use super::server::{Caller, MAX_TRANSFER, Server, lock};
use super::wire::{Args, DIRENT, ENTRY_OUT, Entry, Out};
use crate::backend::passthrough::{DirEntry, Name, Node, Stat, read_entries, seek_entries};

/// Entries that were read from a directory but not yet taken by the guest.
#[derive(Debug, Default)]
pub(super) struct Listing {
    /// Handle of the directory.
    handle: u64,
    /// Position of the first entry.
    position: u64,
    entries: VecDeque<DirEntry>,
}

impl Server {
    /// Returns as many entries as fit, and with `plus` also each entry's attributes.
    pub(super) fn read_dir(&self, mut args: Args<'_>, caller: Caller, room: u64, plus: bool) -> io::Result<Out> {
        let (id, position, size) = (args.u64()?, args.u64()?, args.u32()?);
        let room = u64::from(size.min(MAX_TRANSFER)).min(room) as usize;
        let handle = self.handle(id)?;
        let Some(dir) = handle.dir()? else { return Ok(Out::default()) };
        let node = if plus { Some(self.node(caller.nodeid)?) } else { None };
        let mut listing = lock(&self.listing);
        if position == 0 || (listing.handle, listing.position) != (id, position) {
            *listing = Listing { handle: id, position, entries: VecDeque::new() };
            seek_entries(dir, position).inspect_err(|_| *listing = Listing::default())?;
        }
        let mut out = Out::default();
        loop {
            if listing.entries.is_empty() {
                listing.entries = read_entries(dir).inspect_err(|_| *listing = Listing::default())?.into();
            }
            let Some(entry) = listing.entries.front() else { break };
            let len = (DIRENT + entry.name.count_bytes()).next_multiple_of(8) + if plus { ENTRY_OUT } else { 0 };
            if out.0.len() + len > room {
                break;
            }
            if let Some(node) = &node {
                out.entry(&self.look_at(caller.nodeid, node, entry));
            }
            put(&mut out, entry);
            listing.position = entry.next;
            listing.entries.pop_front();
        }
        Ok(out)
    }

    /// Looks an entry up as LOOKUP does; returns an empty entry if that fails.
    fn look_at(&self, parent: u64, dir: &Node, entry: &DirEntry) -> Entry {
        let found = Name::new(&entry.name).and_then(|name| self.enter(parent, dir, name));
        found.unwrap_or(Entry {
            id: 0,
            stat: Stat::default(),
            flags: 0,
            names: Duration::ZERO,
            attributes: Duration::ZERO,
        })
    }
}

/// Appends a `fuse_dirent`.
fn put(out: &mut Out, entry: &DirEntry) {
    let name = entry.name.to_bytes();
    // File type in the encoding of `d_type`.
    let kind = if entry.kind == FileType::Unknown { 0 } else { entry.kind.as_raw_mode() >> 12 };
    out.u64(entry.ino).u64(entry.next).u32(name.len() as u32).u32(kind).bytes(name);
    out.zeros(out.0.len().next_multiple_of(8) - out.0.len());
}
