//! A shared folder of the host. Every file in it is a [`Node`]: a descriptor that refers to the file whatever happens
//! to its name (O_PATH). Every step to another node is one [`Name`], a single component that is neither `.` nor `..`.
//! Therefore no path can lead out: no symbolic link is ever followed, and only files opened beneath the folder are
//! reached. (If somebody on the host moves a directory out of the folder in the meantime, it remains reachable through
//! its node, as it does for a process whose working directory it is.)
//!
//! File systems mounted inside the folder belong to it, except the kernel's interfaces (/proc, /sys and the like): an
//! empty directory replaces each of these.
//!
//! Only regular files and directories can be opened for their contents: opening a FIFO may block forever, and opening a
//! device may have any effect.
//!
//! Calls that need a path get `/proc/self/fd/N`, which denotes the file itself without a lookup; so /proc must be
//! mounted.

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

/// Reasons why a folder cannot be shared. Displays as one sentence with the path.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The path does not exist, is not a folder, or may not be read.
    #[error("cannot share {}", path.display())]
    Open {
        /// Path of the folder.
        path: PathBuf,
        /// The OS error.
        source: io::Error,
    },
    /// The folder belongs to one of the kernel's interfaces.
    #[error("cannot share {}: it is the host kernel's {name}, not a file system with data", path.display())]
    Interface {
        /// Path of the folder.
        path: PathBuf,
        /// Name of the file system.
        name: &'static str,
    },
    /// /proc is missing, which most system calls here need.
    #[error("cannot share {}: this needs /proc/self/fd", path.display())]
    NoProc {
        /// Path of the folder.
        path: PathBuf,
        /// The OS error.
        source: io::Error,
    },
}

/// Opens the folder to be shared, which must be readable; returns its node, which is above all others.
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

/// Raises the soft limit of open files to the hard limit, and returns the new limit.
pub fn raise_descriptor_limit() -> u64 {
    super::unix::make_room_for_descriptors(u64::MAX);
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Returns the bits that this process's umask removes from every new file's mode.
pub fn umask() -> u32 {
    // No system call only reads the umask. Without this line in the file (Linux before 4.7), it counts as 0.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let umask = status.lines().find_map(|line| line.strip_prefix("Umask:"));
    umask.and_then(|octal| u32::from_str_radix(octal.trim(), 8).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests;
