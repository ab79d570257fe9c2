//! The saved state: the files that the guest knows and has open, by name. A file is lost if its name, at restore, is
//! gone or belongs to another file; the guest then gets ESTALE or EBADF when it uses it.

use std::io;
use std::sync::atomic::Ordering;

use rustix::fs::{OFlags, fcntl_getfl};
use serde::{Deserialize, Serialize};

use super::handles::Handle;
use super::server::Server;
use crate::log_limit::LogLimit;

/// Saved state of a shared folder.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsState {
    /// State of the mount, if the guest has the folder mounted.
    pub mounted: Option<MountState>,
}

/// Saved state of a mounted folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountState {
    /// The guest supports submounts.
    pub submounts: bool,
    /// The guest supports access control lists and leaves its umask to the device.
    #[serde(default)]
    pub access_lists: bool,
    /// The guest's SETXATTR requests carry additional flags.
    #[serde(default)]
    pub setxattr_flags: bool,
    /// Number of the mount that the folder was in.
    pub mount: u64,
    /// Node number of the next file that the guest learns of.
    pub next_file: u64,
    /// Files that the guest knows, except the folder itself.
    pub files: Vec<FileState>,
    /// Handle number of the next file that the guest opens.
    pub next_handle: u64,
    /// Files and directories that the guest has open.
    pub handles: Vec<HandleState>,
}

/// A file that the guest knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileState {
    /// Node number.
    pub id: u64,
    /// Node number of the directory in which the file was last seen.
    pub parent: u64,
    /// Name in that directory: bytes, without NUL.
    pub name: Vec<u8>,
    /// Number of times the guest has looked the file up and not forgotten it.
    pub lookups: u64,
    /// File type, as in the mode.
    pub kind: u32,
    /// Device number of the file system.
    pub dev: u64,
    /// Number of the mount in which the file was seen.
    pub mount: u64,
    /// Inode number.
    pub ino: u64,
    /// Creation time in seconds and nanoseconds; 0 if unknown.
    pub born: (i64, u32),
    /// Another file system begins here.
    pub submount: bool,
}

/// An open file or directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HandleState {
    /// Handle number.
    pub id: u64,
    /// Node number of the file.
    pub file: u64,
    /// Access mode.
    pub access: Access,
}

/// Access mode of an open file or directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Access {
    /// A directory.
    Directory,
    /// A file open for reading.
    Read,
    /// A file open for writing.
    Write,
    /// A file open for reading and writing.
    Both,
}

impl Access {
    fn of(handle: &Handle) -> io::Result<Self> {
        let Handle::File(file, _) = handle else { return Ok(Access::Directory) };
        Ok(match fcntl_getfl(file)? & OFlags::ACCMODE {
            OFlags::WRONLY => Access::Write,
            OFlags::RDWR => Access::Both,
            _ => Access::Read,
        })
    }
}

impl Server {
    /// Returns the state to be saved.
    pub(super) fn save(&self) -> io::Result<FsState> {
        if !self.is_mounted() {
            return Ok(FsState::default());
        }
        let (next_handle, open) = self.handles().all();
        let mut handles = Vec::with_capacity(open.len());
        for (id, file, handle) in open {
            handles.push(HandleState { id, file, access: Access::of(&handle)? });
        }
        let (mount, next_file, files) = self.inodes().save();
        let submounts = self.submounts.load(Ordering::Relaxed);
        let access_lists = self.access_lists.load(Ordering::Relaxed);
        let setxattr_flags = self.setxattr_flags.load(Ordering::Relaxed);
        let mounted =
            MountState { submounts, access_lists, setxattr_flags, mount, next_file, files, next_handle, handles };
        Ok(FsState { mounted: Some(mounted) })
    }

    /// Takes over a saved state, which is not trusted. The error says what is invalid in it.
    pub(super) fn restore(&self, FsState { mounted }: FsState) -> Result<(), String> {
        self.clear();
        let Some(mounted) = mounted else { return Ok(()) };
        let MountState { submounts, access_lists, setxattr_flags, mount, next_file, files, next_handle, handles } =
            mounted;
        self.inodes().restore(mount, next_file, files)?;
        let lost = LogLimit::default();
        for HandleState { id, file, access } in handles {
            let handle = self.reopen(file, access);
            let restored = handle.and_then(|handle| self.handles().restore(id, file, handle));
            if let Err(e) = restored {
                lost.debug(format_args!("cannot reopen the guest's file handle {id}: {e}"));
            }
        }
        self.handles().go_on_at(next_handle)?;
        self.submounts.store(submounts, Ordering::Relaxed);
        self.access_lists.store(access_lists && self.squash.is_none(), Ordering::Relaxed);
        self.setxattr_flags.store(setxattr_flags, Ordering::Relaxed);
        self.begin();
        Ok(())
    }

    fn reopen(&self, file: u64, access: Access) -> io::Result<Handle> {
        let node = self.node(file)?;
        let flags = match access {
            Access::Directory => return self.with_descriptors(|| Handle::open_dir(node.clone())),
            Access::Read => OFlags::RDONLY,
            Access::Write => OFlags::WRONLY,
            Access::Both => OFlags::RDWR,
        };
        if flags != OFlags::RDONLY {
            self.check_writable()?;
        }
        Ok(Handle::File(self.with_descriptors(|| node.open(flags))?, node))
    }
}
