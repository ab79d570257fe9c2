//! Files that a command finds in the guest: its root, the kernel's modules, a home directory.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::{Command, Error, RootFrom};
use crate::backend::held;
use crate::boot::modules;
use crate::config::MachineConfig;
use crate::guest::protocol::{Bytes, Mount, ROOT, Root};
use crate::virtio::blk::BlkConfig;
use crate::virtio::fs::{Cache, FsConfig};

impl Command {
    /// Adds the device that holds the root.
    pub(super) fn add_root(&self, config: &mut MachineConfig) -> Result<Root, Error> {
        let RootFrom::Path(path) = &self.root else { return Ok(Root::Initramfs) };
        let writable = self.writable;
        let metadata = fs::metadata(held::path(path)).map_err(|e| Error::Root(path.clone(), e))?;
        if metadata.is_dir() {
            let (path, tag) = (path.clone(), Some(ROOT.into()));
            // A read-only root becomes the lower layer of an overlay in the guest.
            let flat = !writable;
            let cache = if flat { Cache::Names } else { Cache::Auto };
            config.shares.insert(0, FsConfig { path, tag, readonly: !writable, flat, cache, ..FsConfig::default() });
            return Ok(Root::Share { writable });
        }
        let (path, id) = (path.clone(), Some(ROOT.into()));
        config.disks.insert(0, BlkConfig { path, id, readonly: !writable, ..BlkConfig::default() });
        Ok(Root::Disk { writable })
    }

    /// Returns where the guest finds the kernel's modules: those that the user named, or those that vireo finds. The
    /// latter are shown only where this needs no kernel feature beyond those that such a guest needs anyway.
    pub(super) fn show_modules(&self, config: &mut MachineConfig, mounts: &mut Vec<Mount>) -> Vec<Bytes> {
        let found = || match &self.root {
            RootFrom::Path(root) if !self.writable && held::path(root).is_dir() => {
                modules::above(&held::path(&config.boot.kernel))
            }
            _ => Vec::new(),
        };
        let given =
            self.modules.iter().filter(|dir| dir.is_dir()).filter_map(|dir| held::path(dir).canonicalize().ok());
        let dirs = if self.modules.is_some() { given.collect() } else { found() };
        let bytes = |dir: &PathBuf| dir.as_os_str().into();
        match &self.root {
            RootFrom::Initramfs => Vec::new(),
            RootFrom::Path(root) if root == "/" => dirs.iter().map(bytes).collect(),
            RootFrom::Path(_) => {
                let Some(path) = dirs.into_iter().next() else { return Vec::new() };
                let (tag, place) = ("modules".to_string(), OsStr::new("/run/vireo/modules"));
                let tag_of_share = Some(tag.clone());
                let share = FsConfig { path, tag: tag_of_share, readonly: true, flat: true, ..FsConfig::default() };
                config.shares.push(share);
                mounts.push(Mount { tag, path: place.into(), writable: false });
                vec![place.into()]
            }
        }
    }

    /// Returns the home directory: the caller's own if the guest sees the same files.
    pub(super) fn home(&self) -> OsString {
        let ours = env::var_os("HOME").filter(|home| Path::new(home).is_absolute());
        ours.filter(|_| self.root == RootFrom::Path("/".into())).unwrap_or_else(|| "/root".into())
    }

    /// Returns whether the user set the home directory.
    pub(super) fn names_home(&self) -> bool {
        let names = |item: &OsString| item == "*" || item == "HOME" || item.as_bytes().starts_with(b"HOME=");
        self.env.iter().any(names)
    }
}
