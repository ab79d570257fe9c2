//! What the guest has open.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;

use super::budget::{Pool, Slot};
use crate::backend::passthrough::Node;

/// An open file or directory. The node is kept with it: what is open stays what it is, names or not.
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

    /// The directory; `None` for one that has no entries.
    pub fn dir(&self) -> io::Result<Option<&OwnedFd>> {
        match self {
            Handle::Dir(dir, _) => Ok(Some(dir)),
            Handle::Closed(_) => Ok(None),
            Handle::File(..) => Err(Errno::NOTDIR.into()),
        }
    }
}

/// All of it, by the numbers that the guest has for it.
#[derive(Debug)]
pub(super) struct Handles {
    descriptors: Arc<Pool>,
    /// With the numbers of the files.
    open: HashMap<u64, (u64, Arc<Handle>, Slot)>,
    next: u64,
}

impl Handles {
    /// None.
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

    /// The handle, to be closed by who drops it: outside of the lock, for that may take its time.
    pub fn remove(&mut self, id: u64) -> io::Result<Arc<Handle>> {
        Ok(self.open.remove(&id).map(|(_, handle, _)| handle).ok_or(Errno::BADF)?)
    }

    /// All of them, as [`Handles::remove`]. Numbers are not used again.
    pub fn clear(&mut self) -> Vec<Arc<Handle>> {
        self.open.drain().map(|(_, (_, handle, _))| handle).collect()
    }

    /// The next number; and of each that is open its number, the file's, and itself.
    pub fn all(&self) -> (u64, Vec<(u64, u64, Arc<Handle>)>) {
        (self.next, self.open.iter().map(|(id, (file, handle, _))| (*id, *file, handle.clone())).collect())
    }

    /// Something is open again, by the number it had.
    pub fn restore(&mut self, id: u64, file: u64, handle: Handle) -> io::Result<()> {
        if self.descriptors.is_exhausted(self.open.len()) {
            return Err(Errno::NFILE.into());
        }
        self.open.insert(id, (file, Arc::new(handle), self.descriptors.take()));
        Ok(())
    }

    /// Sets the next number, when all are restored.
    pub fn go_on_at(&mut self, next: u64) -> Result<(), String> {
        match self.open.keys().find(|id| **id >= next) {
            Some(id) => Err(format!("has {id} open where {next} comes next")),
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
