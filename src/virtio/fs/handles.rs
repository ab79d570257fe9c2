//! The files and directories that the guest has open.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;

use super::budget::{Pool, Slot};
use crate::backend::passthrough::Node;

/// An open file or directory. The handle keeps the node too: an open file stays the same file even if its name changes
/// or goes.
#[derive(Debug)]
pub(super) enum Handle {
    File(File, #[allow(dead_code)] Arc<Node>),
    Dir(OwnedFd, #[allow(dead_code)] Arc<Node>),
    /// A directory that stands in for one of the host kernel's interfaces: always empty.
    Closed(Arc<Node>),
}

impl Handle {
    pub fn file(&self) -> io::Result<&File> {
        match self {
            Handle::File(file, _) => Ok(file),
            Handle::Dir(..) | Handle::Closed(_) => Err(Errno::ISDIR.into()),
        }
    }

    /// Opens a directory for its entries.
    pub fn open_dir(node: Arc<Node>) -> io::Result<Self> {
        if node.is_closed() {
            return Ok(Handle::Closed(node));
        }
        Ok(Handle::Dir(node.open_dir()?, node))
    }

    /// Returns the directory; `None` for one that has no entries.
    pub fn dir(&self) -> io::Result<Option<&OwnedFd>> {
        match self {
            Handle::Dir(dir, _) => Ok(Some(dir)),
            Handle::Closed(_) => Ok(None),
            Handle::File(..) => Err(Errno::NOTDIR.into()),
        }
    }
}

/// All open files and directories, by the handle numbers that the guest knows.
#[derive(Debug)]
pub(super) struct Handles {
    descriptors: Arc<Pool>,
    /// Each handle's file number, the handle itself and its descriptor's slot.
    open: HashMap<u64, (u64, Arc<Handle>, Slot)>,
    next: u64,
}

impl Handles {
    /// Creates an empty table.
    pub fn new(descriptors: Arc<Pool>) -> Self {
        Handles { descriptors, open: HashMap::new(), next: 1 }
    }

    pub fn insert(&mut self, file: u64, handle: Handle) -> io::Result<u64> {
        let id = self.next;
        self.restore(id, file, handle)?;
        self.next += 1;
        Ok(id)
    }

    pub fn get(&self, id: u64) -> io::Result<Arc<Handle>> {
        Ok(self.open.get(&id).map(|(_, handle, _)| handle.clone()).ok_or(Errno::BADF)?)
    }

    /// Removes a handle and returns it. The caller drops it outside the lock, because closing may take long.
    pub fn remove(&mut self, id: u64) -> io::Result<Arc<Handle>> {
        Ok(self.open.remove(&id).map(|(_, handle, _)| handle).ok_or(Errno::BADF)?)
    }

    /// Removes and returns all handles; see [`Handles::remove`]. Their numbers are not used again.
    pub fn clear(&mut self) -> Vec<Arc<Handle>> {
        self.open.drain().map(|(_, (_, handle, _))| handle).collect()
    }

    /// Returns the next handle number, and for each open handle its number, its file's number and the handle itself.
    pub fn all(&self) -> (u64, Vec<(u64, u64, Arc<Handle>)>) {
        (self.next, self.open.iter().map(|(id, (file, handle, _))| (*id, *file, handle.clone())).collect())
    }

    /// Adds a handle with a given number.
    pub fn restore(&mut self, id: u64, file: u64, handle: Handle) -> io::Result<()> {
        if self.descriptors.is_exhausted(self.open.len()) {
            return Err(Errno::NFILE.into());
        }
        self.open.insert(id, (file, Arc::new(handle), self.descriptors.take()));
        Ok(())
    }

    /// Sets the next handle number, after all handles were restored.
    pub fn go_on_at(&mut self, next: u64) -> Result<(), String> {
        match self.open.keys().find(|id| **id >= next) {
            Some(id) => Err(format!("has handle {id} open, but the next handle is {next}")),
            None => {
                self.next = next;
                Ok(())
            }
        }
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.open.len()
    }
}
