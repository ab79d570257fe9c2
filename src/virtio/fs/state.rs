//! What is saved: the files that the guest knows and has open, by their names. A file that has no name any more when it is
//! restored, or whose name is another's, is lost: the guest is told so (ESTALE, EBADF) when it uses it.

use std::io;
use std::sync::atomic::Ordering;

use rustix::fs::{OFlags, fcntl_getfl};
use serde::{Deserialize, Serialize};

use super::handles::Handle;
use super::server::Server;
use crate::log_limit::LogLimit;

/// A shared folder as it is saved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsState {
    /// What the guest knows, if it has the folder mounted.
    pub mounted: Option<MountState>,
}

/// A mounted folder as it is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountState {
    /// The guest knows of mounts.
    pub submounts: bool,
    /// It knows access control lists, and leaves its umask to the device.
    #[serde(default)]
    pub access_lists: bool,
    /// Its requests to set extended attributes have more flags.
    #[serde(default)]
    pub setxattr_flags: bool,
    /// The number of the mount that the folder was in.
    pub mount: u64,
    /// The number of the next file that it gets to know.
    pub next_file: u64,
    /// The files that it knows, but for the folder itself.
    pub files: Vec<FileState>,
    /// The number of the next file that it opens.
    pub next_handle: u64,
    /// What it has open.
    pub handles: Vec<HandleState>,
}

/// A file that the guest knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileState {
    /// Its number.
    pub id: u64,
    /// The directory it was seen in last.
    pub parent: u64,
    /// Its name there: bytes, without NUL.
    pub name: Vec<u8>,
    /// How often the guest was told of it.
    pub lookups: u64,
    /// Type, as in its mode.
    pub kind: u32,
    /// Its file system.
    pub dev: u64,
    /// The number of the mount that it was seen in.
    pub mount: u64,
    /// Its number there.
    pub ino: u64,
    /// When it was made, in seconds and nanoseconds; 0 if that is not known.
    pub born: (i64, u32),
    /// Another file system begins here.
    pub submount: bool,
}

/// An open file or directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HandleState {
    /// Its number.
    pub id: u64,
    /// The file.
    pub file: u64,
    /// How it is open.
    pub access: Access,
}

/// How something is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Access {
    /// A directory.
    Directory,
    /// A file, for reading.
    Read,
    /// For writing.
    Write,
    /// For both.
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
    /// What must be saved.
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

    /// Takes over what was saved; untrusted. Says what cannot be.
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
                lost.debug(format_args!("what the guest had open as {id} is lost: {e}"));
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
