//! The files that the guest knows, by the numbers it knows them by.
//!
//! Each is held by a descriptor for as long as that can be afforded. When there are too many, those that were not used
//! for a while are closed, and opened again by the name they were last seen under when the guest comes back to them;
//! unless the host has put something else there meanwhile (ESTALE: the guest looks its path up again). What is open
//! keeps its descriptor.
//!
//! How many files are remembered is bounded by a part of the guest's memory ([`Limits`]). When there are more, the one
//! that was closed first is forgotten, though the guest has not: it gets ESTALE when it comes back, and looks the path up
//! again, as its kernel does by itself. What is open is never forgotten.

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

/// A file is remembered for this many bytes of the guest's memory. A record takes some 400 bytes here with a name of
/// usual length, so all of them take about a twentieth of it.
const RAM_PER_FILE: u64 = 8192;
/// As many may be known in any case.
const MIN_FILES: usize = 1 << 16;
/// No path is so long that it has more components.
const MAX_DEPTH: usize = 4096;

/// How much may be held.
#[derive(Clone, Debug)]
pub(super) struct Limits {
    /// Files that are known.
    pub files: usize,
    /// Of these, held by a descriptor.
    pub descriptors: Arc<Pool>,
}

impl Limits {
    /// For a guest with so much memory.
    pub fn new(descriptors: Arc<Pool>, guest_ram: u64) -> Self {
        let files = usize::try_from(guest_ram / RAM_PER_FILE).unwrap_or(usize::MAX).max(MIN_FILES);
        Limits { files, descriptors }
    }
}

/// What tells files apart. A file that is seen through two mounts counts twice, for a directory can only be in one place.
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

/// By what one sees that a file was not changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    mtime: Time,
    ctime: Time,
    size: u64,
}

impl Stamp {
    /// Unless the file changed within the second before `now`: it could change once more and look the same.
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
    /// While there is no descriptor, a file may go and its number be given to another, made at another time.
    born: Time,
    /// How often the guest was told of it, less how often it forgot.
    lookups: u64,
    /// Where it was seen last.
    parent: u64,
    name: CString,
    node: Option<(Arc<Node>, Slot)>,
    /// Since it was looked at for closing.
    used: bool,
    /// When it was opened last.
    stamp: Option<Stamp>,
    /// Another file system begins here. Linux before 6.8 forgets such a directory and goes on to use it.
    submount: bool,
}

/// All of them.
#[derive(Debug)]
pub(super) struct Inodes {
    limits: Limits,
    by_id: HashMap<u64, Inode>,
    by_key: HashMap<Key, u64>,
    next: u64,
    /// Those with a descriptor, and some that had one, in the order in which they are considered for closing.
    held: VecDeque<u64>,
    /// How many have a descriptor.
    descriptors: usize,
    /// Those whose descriptor was closed, the oldest first; and some that have one again, or are forgotten.
    idle: VecDeque<u64>,
}

impl Inodes {
    /// Only the root.
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

    /// The guest has this much memory.
    pub fn set_guest_ram(&mut self, bytes: u64) {
        self.limits = Limits::new(self.limits.descriptors.clone(), bytes);
    }

    #[cfg(test)]
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// Forgets all but the root. Numbers are not used again, so that what the guest still has of them leads nowhere.
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

    /// Tells the guest of a file that was found: returns its number, and whether another file system begins there.
    pub fn enter(&mut self, parent: u64, name: Name<'_>, node: Node, stat: &Stat) -> io::Result<(u64, bool)> {
        let (key, kind) = (Key::from(stat), stat.kind());
        let parent_key = self.by_id.get(&parent).map(|inode| inode.key);
        let submount = kind == FileType::Directory
            && parent_key.is_some_and(|parent| (parent.dev, parent.mount) != (key.dev, key.mount));
        let known = self.by_key.get(&key).copied();
        if let Some((id, inode)) = known.and_then(|id| Some((id, self.by_id.get_mut(&id)?)))
            // Else the file is gone, and its number is another's now.
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

    /// Forgets files until one more may be known.
    fn make_room(&mut self) -> io::Result<()> {
        let mut rounds = 0;
        while self.by_id.len() >= self.limits.files {
            match self.idle.pop_front() {
                Some(id) if self.by_id.get(&id).is_some_and(|inode| inode.node.is_none() && !inode.submount) => {
                    self.remove(id);
                }
                Some(_) => {}
                // Most were used since they were looked at last, then one round only notes that.
                None if rounds < 4 => {
                    rounds += 1;
                    self.close_some(64);
                }
                None => return Err(Errno::NFILE.into()),
            }
        }
        Ok(())
    }

    /// Gives a file a descriptor. Closes others if these are too many.
    fn hold(&mut self, id: u64, node: Arc<Node>) {
        if self.limits.descriptors.is_exhausted(self.descriptors) {
            // One for this, and one for another share that may be waiting for its part.
            self.close_some(2);
        }
        if let Some(inode) = self.by_id.get_mut(&id) {
            inode.node = Some((node, self.limits.descriptors.take()));
            self.held.push_back(id);
            self.descriptors += 1;
        }
    }

    /// Closes up to `wanted` descriptors that are in nobody's use, those that were not used for long first. Looks at a
    /// bounded number, so there may be less to find.
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
        // A file is in it once for each time that it was closed.
        if self.idle.len() > 2 * self.by_id.len() + 64 {
            let Inodes { by_id, idle, .. } = self;
            let mut seen = HashSet::new();
            idle.retain(|id| by_id.get(id).is_some_and(|inode| inode.node.is_none()) && seen.insert(*id));
        }
    }

    /// How many descriptors are held.
    pub fn descriptors(&self) -> usize {
        self.descriptors
    }

    /// A file that the guest was told of.
    pub fn node(&mut self, id: u64) -> io::Result<Arc<Node>> {
        let inode = self.by_id.get_mut(&id).ok_or(Errno::STALE)?;
        inode.used = true;
        match &inode.node {
            Some((node, _)) => Ok(node.clone()),
            None => self.reopen(id),
        }
    }

    /// Finds a file again where it was seen last: up to a directory that is held, and down again.
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
            // What never had a name is not found again.
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
        // The number of a mount may be another one, after a restore.
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

    /// A file was renamed: what is at this name now was seen there.
    pub fn seen(&mut self, parent: u64, name: Name<'_>, stat: &Stat) {
        let id = self.by_key.get(&Key::from(stat)).copied().filter(|id| *id != ROOT);
        if let Some(inode) = id.and_then(|id| self.by_id.get_mut(&id)) {
            (inode.parent, inode.name) = (parent, name.as_c_str().to_owned());
        }
    }

    /// Notes how a file is when it is opened; returns whether that is how it was the last time.
    pub fn is_unchanged(&mut self, id: u64, stamp: Option<Stamp>) -> bool {
        let Some(inode) = self.by_id.get_mut(&id) else { return false };
        let before = std::mem::replace(&mut inode.stamp, stamp);
        stamp.is_some() && before == stamp
    }

    /// The guest forgets a file, as it was told of it so many times.
    pub fn forget(&mut self, id: u64, lookups: u64) {
        let Some(inode) = self.by_id.get_mut(&id) else { return };
        inode.lookups = inode.lookups.saturating_sub(lookups);
        if inode.lookups > 0 || id == ROOT || inode.submount {
            return;
        }
        self.remove(id);
        // What is left of it in the queue must not grow without end.
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
    /// The root's mount, the next number, and all files but the root.
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

    /// Takes over what was saved, without looking at any of it: that is done when the guest asks for it.
    /// What was in the mount of the root is in that which the root is in now.
    pub fn restore(&mut self, root_mount: u64, next: u64, files: Vec<FileState>) -> Result<(), String> {
        let root_mount_now = self.by_id.get(&ROOT).map_or(0, |root| root.key.mount);
        for file in files {
            let FileState { id, parent, name, lookups, kind, dev, mount, ino, born: (sec, nsec), submount } = file;
            let bad = || format!("knows a file {id} that cannot be");
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

/// A file that is not where it was.
fn stale(e: io::Error) -> io::Error {
    match e.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP) => Errno::STALE.into(),
        _ => e,
    }
}
