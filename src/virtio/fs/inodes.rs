//! The files that the guest knows, by node number.
//!
//! Each file is held by a descriptor while descriptors suffice. When there are too many, those that were not used for a
//! while are closed. If the guest uses such a file again, it is reopened by the name under which it was last seen; if
//! the host has put something else there, the guest gets ESTALE and looks the path up again. An open file keeps its
//! descriptor.
//!
//! The number of remembered files is bounded by a part of the guest's memory ([`Limits`]). Beyond that, the file that
//! was closed first is forgotten, although the guest still knows it: using it fails with ESTALE, and the guest's kernel
//! then looks the path up again by itself. Open files are never forgotten.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::{CStr, CString};
use std::io;
use std::sync::Arc;

use rustix::fs::FileType;
use rustix::io::Errno;

use super::budget::{Pool, Slot};
use super::state::FileState;
use super::wire::ROOT;
use crate::backend::passthrough::{Name, Node, Stat, Time};

/// Bytes of guest memory per remembered file. A record takes some 400 bytes here with a name of usual length, so all
/// records together take about a twentieth of the guest's memory size.
const RAM_PER_FILE: u64 = 8192;
/// Number of files that may be known however little memory the guest has.
const MIN_FILES: usize = 1 << 16;
/// Maximum number of components of a path; no valid path is longer.
const MAX_DEPTH: usize = 4096;

/// Limits on files and descriptors.
#[derive(Clone, Debug)]
pub(super) struct Limits {
    /// Maximum number of known files.
    pub files: usize,
    /// Descriptors that known files may hold.
    pub descriptors: Arc<Pool>,
}

impl Limits {
    /// Computes the limits for a guest with `guest_ram` bytes of memory.
    pub fn new(descriptors: Arc<Pool>, guest_ram: u64) -> Self {
        let files = usize::try_from(guest_ram / RAM_PER_FILE).unwrap_or(usize::MAX).max(MIN_FILES);
        Limits { files, descriptors }
    }
}

/// Identity of a file. A file that is seen through two mounts counts twice, because a directory can only be in one
/// place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    dev: u64,
    mount: u64,
    ino: u64,
}

impl From<&Stat> for Key {
    fn from(&Stat { dev, mount, ino, .. }: &Stat) -> Self {
        Key { dev, mount, ino }
    }
}

/// Attributes that show whether a file has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    mtime: Time,
    ctime: Time,
    size: u64,
}

impl Stamp {
    /// Returns `None` if the file changed within the second before `now`: it could change again and look the same.
    pub fn new(stat: &Stat, now: Time) -> Option<Self> {
        let Stat { mtime, ctime, size, .. } = *stat;
        let before = Time { sec: now.sec.saturating_sub(1), ..now };
        (mtime.max(ctime) < before).then_some(Stamp { mtime, ctime, size })
    }
}

#[derive(Debug)]
struct Inode {
    key: Key,
    kind: FileType,
    /// Creation time. While no descriptor is held, a file may be removed and its inode number given to another file,
    /// which has another creation time.
    born: Time,
    /// Number of times the guest looked the file up, less the number it has forgotten.
    lookups: u64,
    /// Directory in which the file was last seen.
    parent: u64,
    name: CString,
    node: Option<(Arc<Node>, Slot)>,
    /// Set if the file was used since it was last considered for closing.
    used: bool,
    /// State of the file when it was last opened.
    stamp: Option<Stamp>,
    /// Another file system begins here. Linux before 6.8 forgets such a directory and continues to use it.
    submount: bool,
}

/// All files that the guest knows.
#[derive(Debug)]
pub(super) struct Inodes {
    limits: Limits,
    by_id: HashMap<u64, Inode>,
    by_key: HashMap<Key, u64>,
    next: u64,
    /// Files in the order in which they are considered for closing: all that have a descriptor, and some that no longer
    /// have one.
    held: VecDeque<u64>,
    /// Number of files that have a descriptor.
    descriptors: usize,
    /// Files whose descriptor was closed, oldest first; some may have one again or may be forgotten.
    idle: VecDeque<u64>,
}

impl Inodes {
    /// Creates the table with only the root in it.
    pub fn new(root: Arc<Node>, stat: &Stat, limits: Limits) -> Self {
        let key = Key::from(stat);
        let root = Inode {
            key,
            kind: FileType::Directory,
            born: stat.born,
            lookups: 1,
            parent: ROOT,
            name: CString::default(),
            node: Some((root, limits.descriptors.take())),
            used: true,
            stamp: None,
            submount: false,
        };
        Inodes {
            limits,
            by_id: HashMap::from([(ROOT, root)]),
            by_key: HashMap::from([(key, ROOT)]),
            next: ROOT + 1,
            held: VecDeque::new(),
            descriptors: 0,
            idle: VecDeque::new(),
        }
    }

    /// Sets the limits for a guest with `bytes` bytes of memory.
    pub fn set_guest_ram(&mut self, bytes: u64) {
        self.limits = Limits::new(self.limits.descriptors.clone(), bytes);
    }

    #[cfg(test)]
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// Forgets all files but the root. Numbers are not used again, so any that the guest still has are invalid.
    pub fn clear(&mut self) {
        self.by_id.retain(|id, _| *id == ROOT);
        self.by_key.retain(|_, id| *id == ROOT);
        self.held = VecDeque::new();
        self.idle = VecDeque::new();
        self.descriptors = 0;
        self.by_id.shrink_to_fit();
        self.by_key.shrink_to_fit();
    }

    #[cfg(test)]
    pub fn counts(&self) -> (usize, usize) {
        (self.by_id.len(), self.descriptors)
    }

    /// Records that the guest learns of a file that was found. Returns its number, and whether another file system
    /// begins there.
    pub fn enter(&mut self, parent: u64, name: Name<'_>, node: Node, stat: &Stat) -> io::Result<(u64, bool)> {
        let (key, kind) = (Key::from(stat), stat.kind());
        let parent_key = self.by_id.get(&parent).map(|inode| inode.key);
        let submount = kind == FileType::Directory
            && parent_key.is_some_and(|parent| (parent.dev, parent.mount) != (key.dev, key.mount));
        let known = self.by_key.get(&key).copied();
        if let Some((id, inode)) = known.and_then(|id| Some((id, self.by_id.get_mut(&id)?)))
            // Otherwise the file is gone, and another file has its inode number.
            && inode.kind == kind
            && (inode.node.is_some() || inode.born == stat.born)
        {
            inode.lookups = inode.lookups.saturating_add(1);
            if id != ROOT {
                (inode.parent, inode.name) = (parent, name.as_c_str().to_owned());
                inode.used = true;
                if inode.node.is_none() {
                    self.hold(id, Arc::new(node));
                }
            }
            return Ok((id, submount));
        }
        self.make_room()?;
        let id = self.next;
        self.next += 1;
        let (name, born) = (name.as_c_str().to_owned(), stat.born);
        let inode = Inode { key, kind, born, lookups: 1, parent, name, node: None, used: true, stamp: None, submount };
        self.by_id.insert(id, inode);
        self.by_key.insert(key, id);
        self.hold(id, Arc::new(node));
        Ok((id, submount))
    }

    /// Forgets files until there is room for one more.
    fn make_room(&mut self) -> io::Result<()> {
        let mut rounds = 0;
        while self.by_id.len() >= self.limits.files {
            match self.idle.pop_front() {
                Some(id) if self.by_id.get(&id).is_some_and(|inode| inode.node.is_none() && !inode.submount) => {
                    self.remove(id);
                }
                Some(_) => {}
                // If most files were used since they were last considered, one round only clears their marks.
                None if rounds < 4 => {
                    rounds += 1;
                    self.close_some(64);
                }
                None => return Err(Errno::NFILE.into()),
            }
        }
        Ok(())
    }

    /// Gives a file a descriptor. Closes others if there are too many.
    fn hold(&mut self, id: u64, node: Arc<Node>) {
        if self.limits.descriptors.is_exhausted(self.descriptors) {
            // One for this file, and one for another share that may be waiting for its part.
            self.close_some(2);
        }
        if let Some(inode) = self.by_id.get_mut(&id) {
            inode.node = Some((node, self.limits.descriptors.take()));
            self.held.push_back(id);
            self.descriptors += 1;
        }
    }

    /// Closes up to `wanted` descriptors that are not in use, least recently used first. Considers a bounded number of
    /// files, so it may close fewer.
    pub fn close_some(&mut self, wanted: usize) {
        let mut closed = 0;
        for _ in 0..(4 * wanted + 64).min(2 * self.held.len()) {
            if closed == wanted {
                break;
            }
            let Some(id) = self.held.pop_front() else { break };
            let Some(inode) = self.by_id.get_mut(&id) else { continue };
            match &inode.node {
                None => continue,
                Some((node, _)) if !inode.used && Arc::strong_count(node) == 1 => {
                    inode.node = None;
                    self.idle.push_back(id);
                    self.descriptors -= 1;
                    closed += 1;
                }
                Some(_) => {
                    inode.used = false;
                    self.held.push_back(id);
                }
            }
        }
        // A file is queued once for each time it was closed.
        if self.idle.len() > 2 * self.by_id.len() + 64 {
            let Inodes { by_id, idle, .. } = self;
            let mut seen = HashSet::new();
            idle.retain(|id| by_id.get(id).is_some_and(|inode| inode.node.is_none()) && seen.insert(*id));
        }
    }

    /// Returns the number of descriptors held.
    pub fn descriptors(&self) -> usize {
        self.descriptors
    }

    /// Returns the node of a file that the guest knows.
    pub fn node(&mut self, id: u64) -> io::Result<Arc<Node>> {
        let inode = self.by_id.get_mut(&id).ok_or(Errno::STALE)?;
        inode.used = true;
        match &inode.node {
            Some((node, _)) => Ok(node.clone()),
            None => self.reopen(id),
        }
    }

    /// Finds a file again where it was last seen: walks up to the nearest directory that has a descriptor, and down
    /// again.
    fn reopen(&mut self, id: u64) -> io::Result<Arc<Node>> {
        let (mut names, mut at): (Vec<&CStr>, u64) = (Vec::new(), id);
        let mut node = loop {
            let inode = self.by_id.get(&at).ok_or(Errno::STALE)?;
            if let Some((node, _)) = &inode.node {
                break node.clone();
            }
            if names.len() > MAX_DEPTH {
                return Err(Errno::STALE.into());
            }
            names.push(&inode.name);
            at = inode.parent;
        };
        let mut found = None;
        while let Some(name) = names.pop() {
            // A file that never had a name cannot be found again.
            let name = Name::new(name).map_err(|_| Errno::STALE)?;
            let (child, stat) = node.child(name).map_err(stale)?;
            node = Arc::new(child);
            found = Some(stat);
        }
        let inode = self.by_id.get_mut(&id).ok_or(Errno::STALE)?;
        let same = |stat: &Stat| {
            (stat.dev, stat.ino, stat.kind(), stat.born) == (inode.key.dev, inode.key.ino, inode.kind, inode.born)
        };
        let stat = found.filter(same).ok_or(Errno::STALE)?;
        // The mount's number may have changed after a restore.
        let before = std::mem::replace(&mut inode.key, Key::from(&stat));
        if inode.key != before {
            self.by_key.insert(inode.key, id);
            if self.by_key.get(&before) == Some(&id) {
                self.by_key.remove(&before);
            }
        }
        self.hold(id, node.clone());
        Ok(node)
    }

    /// Records that a rename moved a file to this name.
    pub fn seen(&mut self, parent: u64, name: Name<'_>, stat: &Stat) {
        let id = self.by_key.get(&Key::from(stat)).copied().filter(|id| *id != ROOT);
        if let Some(inode) = id.and_then(|id| self.by_id.get_mut(&id)) {
            (inode.parent, inode.name) = (parent, name.as_c_str().to_owned());
        }
    }

    /// Records the file's state at open; returns whether it is the same as at the last open.
    pub fn is_unchanged(&mut self, id: u64, stamp: Option<Stamp>) -> bool {
        let Some(inode) = self.by_id.get_mut(&id) else { return false };
        let before = std::mem::replace(&mut inode.stamp, stamp);
        stamp.is_some() && before == stamp
    }

    /// Removes `lookups` from the guest's lookup count of a file, and forgets the file when none are left.
    pub fn forget(&mut self, id: u64, lookups: u64) {
        let Some(inode) = self.by_id.get_mut(&id) else { return };
        inode.lookups = inode.lookups.saturating_sub(lookups);
        if inode.lookups > 0 || id == ROOT || inode.submount {
            return;
        }
        self.remove(id);
        // Entries of forgotten files must not let the queue grow without bound.
        if self.held.len() > 2 * self.descriptors + 64 {
            let Inodes { by_id, held, .. } = self;
            held.retain(|id| by_id.get(id).is_some_and(|inode| inode.node.is_some()));
        }
    }

    fn remove(&mut self, id: u64) {
        if let Some(inode) = self.by_id.remove(&id) {
            self.descriptors -= usize::from(inode.node.is_some());
            if self.by_key.get(&inode.key) == Some(&id) {
                self.by_key.remove(&inode.key);
            }
        }
    }
}

impl Inodes {
    /// Returns the root's mount, the next number, and all named files but the root.
    pub fn save(&self) -> (u64, u64, Vec<FileState>) {
        let file = |(id, inode): (&u64, &Inode)| {
            let Inode { key, kind, born, lookups, parent, name, node: _, used: _, stamp: _, submount } = inode;
            let Key { dev, mount, ino } = *key;
            FileState {
                id: *id,
                parent: *parent,
                name: name.as_bytes().to_vec(),
                lookups: *lookups,
                kind: kind.as_raw_mode(),
                dev,
                mount,
                ino,
                born: (born.sec, born.nsec),
                submount: *submount,
            }
        };
        let mount = self.by_id.get(&ROOT).map_or(0, |root| root.key.mount);
        let named = self.by_id.iter().filter(|(id, inode)| **id != ROOT && !inode.name.is_empty());
        (mount, self.next, named.map(file).collect())
    }

    /// Takes over saved files without opening them: that happens when the guest uses them. Files that were in the
    /// root's mount are placed in the mount that the root is in now.
    pub fn restore(&mut self, root_mount: u64, next: u64, files: Vec<FileState>) -> Result<(), String> {
        let root_mount_now = self.by_id.get(&ROOT).map_or(0, |root| root.key.mount);
        for file in files {
            let FileState { id, parent, name, lookups, kind, dev, mount, ino, born: (sec, nsec), submount } = file;
            let bad = || format!("has an invalid file {id}");
            let name = CString::new(name).map_err(|_| bad())?;
            Name::new(&name).map_err(|_| bad())?;
            if id <= ROOT || id >= next || self.by_id.contains_key(&id) {
                return Err(bad());
            }
            let mount = if mount == root_mount { root_mount_now } else { mount };
            let key = Key { dev, mount, ino };
            let (kind, born) = (FileType::from_raw_mode(kind), Time { sec, nsec });
            let inode =
                Inode { key, kind, born, lookups, parent, name, node: None, used: false, stamp: None, submount };
            self.by_id.insert(id, inode);
            self.by_key.insert(key, id);
            self.idle.push_back(id);
        }
        self.next = next.max(ROOT + 1);
        Ok(())
    }
}

/// Turns the errors of a file that is no longer where it was into ESTALE.
fn stale(e: io::Error) -> io::Error {
    match e.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP) => Errno::STALE.into(),
        _ => e,
    }
}
