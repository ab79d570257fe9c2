//! A folder of the host for a file server: every file below it is a [`Node`], a descriptor that names it whatever becomes
//! of its name (O_PATH), and every way to another node is one [`Name`], a single component that is neither `.` nor `..`.
//! So there is no path that could lead out: no symbolic link is ever followed, and nothing but what was opened beneath
//! the folder is reached. (A directory that somebody on the host moves out of the folder meanwhile goes on to be
//! reachable by who holds its node, as it does for a process that works in it.)
//!
//! What is mounted inside the folder belongs to it, but for the kernel's interfaces (/proc, /sys and the like): an empty
//! directory stands in for each.
//!
//! Regular files and directories can be opened for their contents, anything else cannot: opening a FIFO may wait for
//! ever, and opening a device may do anything.
//!
//! Calls that want a path get `/proc/self/fd/N`, which is the file itself and no lookup; so /proc must be there.

mod data;
mod directory;
mod identity;
mod interface;
mod node;
mod xattr;

pub use data::{copy, read, write};
pub use directory::{DirEntry, read_entries, seek_entries};
pub use identity::{Identity, Owner, has_own_umask, ignore_file_size_limit, take_own_umask, with_umask};
pub use node::{NOWHERE, Name, Node, Stat, Time, TimeChange};

use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::process::{Resource, getrlimit};

use super::held;

/// Why a folder cannot be shared. Displays as one sentence with the path.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is not there, is no folder, or may not be read.
    #[error("cannot share {}", path.display())]
    Open {
        /// The folder.
        path: PathBuf,
        /// The OS error.
        source: io::Error,
    },
    /// It is one of the kernel's interfaces.
    #[error("cannot share {}: it is the host kernel's {name}, not a file system with data", path.display())]
    Interface {
        /// The folder.
        path: PathBuf,
        /// The file system's name.
        name: &'static str,
    },
    /// Without /proc there is no way to most system calls.
    #[error("cannot share {}: /proc/self/fd is needed for that", path.display())]
    NoProc {
        /// The folder.
        path: PathBuf,
        /// The OS error.
        source: io::Error,
    },
}

/// Opens the folder that is shared, which must be readable; returns the node that everything else is beneath.
pub fn open_root(path: &Path) -> Result<(Node, Stat), Error> {
    let fail = |source: io::Error| Error::Open { path: path.into(), source };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = rustix::fs::open(held::path(path), flags, Mode::empty()).map_err(|e| fail(e.into()))?;
    let root = Node::root(fd).map_err(fail)?;
    let (node, stat) = root.map_err(|name| Error::Interface { path: path.into(), name })?;
    node.open_dir().map_err(fail)?;
    node.permissions().map_err(|source| Error::NoProc { path: path.into(), source })?;
    Ok((node, stat))
}

/// Raises the soft limit of open files to the hard one, and returns how many this process may have then.
pub fn raise_descriptor_limit() -> u64 {
    super::unix::make_room_for_descriptors(u64::MAX);
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// The bits that this process takes off every new file's mode.
pub fn umask() -> u32 {
    // There is no call that only asks. Without the line (Linux before 4.7) nothing is mended.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let umask = status.lines().find_map(|line| line.strip_prefix("Umask:"));
    umask.and_then(|octal| u32::from_str_radix(octal.trim(), 8).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests;
