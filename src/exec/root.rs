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
        let RootFrom::Path(root) = &self.root else { return Vec::new() };
        let found = || match !self.writable && held::path(root).is_dir() {
            true => modules::above(&config.boot.kernel),
            false => Vec::new(),
        };
        let given = self.modules.as_ref().filter(|dir| held::path(dir).is_dir());
        let bytes = |dir: &PathBuf| dir.as_os_str().into();
        match (root == "/", &self.modules) {
            // The guest finds them in its root.
            (true, Some(_)) => given.and_then(|dir| held::path(dir).canonicalize().ok()).iter().map(bytes).collect(),
            (true, None) => found().iter().map(|(path, _)| bytes(path)).collect(),
            (false, modules) => {
                // Holds the opened folder: by the time of sharing its path may lead elsewhere.
                let found = || {
                    let (path, dir) = found().into_iter().next()?;
                    held::keep_new(&path, &dir.into());
                    Some(path)
                };
                let path = if modules.is_some() { given.cloned() } else { found() };
                let Some(path) = path else { return Vec::new() };
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
