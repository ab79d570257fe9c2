//! The directory of a kernel's modules on the host.
//!
//! ```text
//! folder that is held             links may lead to
//! --modules-dir                   its content
//! the kernel's or the one above   its content: an unpacked package, a root
//! /                               anything: the host's modules for its own kernels
//! ```
//!
//! A package may come from anywhere, and a guest can write to a shared folder: links in them must not lead to other files
//! of the host.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, openat, statat};

use super::super::error::Problem;
use super::super::source;
use super::{Error, MARKS, ModulesConfig, below, stem};
use crate::backend::held;
use crate::backend::place::{Place, descriptor_path, name_input};

/// Directories in which only root installs modules. Distributions link modules of one version or package from another
/// (weak-updates, the store of NixOS).
const OF_HOST: [&str; 4] = ["/lib/modules", "/usr/lib/modules", "/nix/store", "/gnu/store"];

/// Largest number of files in a directory without modules.dep, which may be a kernel's source.
const FILES_MAX: u32 = 1 << 20;
/// Limit on the sum of their paths' lengths.
const PATHS_MAX: usize = 64 << 20;

/// A directory beneath a folder that is held. It need not exist.
#[derive(Clone, Debug)]
pub(super) struct Directory {
    top: Arc<OwnedFd>,
    /// Path of the folder, for messages.
    name: PathBuf,
    /// Path from the folder to the directory.
    below: PathBuf,
}

impl Directory {
    /// Opens the folder that the user named.
    pub(super) fn open(path: &Path) -> Result<Directory, Problem> {
        Ok(Directory::new(source::open_folder(path)?, path))
    }

    /// Opens a folder that was found.
    fn found(path: &Path) -> Option<Directory> {
        name_input(path, &held::folders()).ok().map(|top| Directory::new(top, path))
    }

    fn new(top: OwnedFd, path: &Path) -> Directory {
        let real = fs::read_link(descriptor_path(&top)).or_else(|_| path.canonicalize()).unwrap_or_default();
        if OF_HOST.iter().any(|dir| real.starts_with(dir))
            && let Ok(root) = source::open_folder(Path::new("/"))
        {
            let below = real.strip_prefix("/").unwrap_or(&real).to_path_buf();
            return Directory { top: root.into(), name: "/".into(), below };
        }
        Directory { top: top.into(), name: path.into(), below: PathBuf::new() }
    }

    /// Returns the directory `below` this one.
    pub(super) fn join(&self, below: impl AsRef<Path>) -> Directory {
        Directory { below: join(&self.below, below.as_ref()), ..self.clone() }
    }

    /// Returns its path, for messages.
    pub(super) fn path(&self) -> PathBuf {
        join(&self.name, &self.below)
    }

    fn place(&self, name: &str) -> io::Result<Place> {
        Place::beneath((self.top.as_fd(), &self.name), &join(&self.below, name.as_ref()), &held::folders())
    }

    /// Returns whether it has an entry of this name.
    pub(super) fn has(&self, name: &str) -> io::Result<bool> {
        match self.place(name).and_then(|place| place.stat()) {
            Ok(stat) => Ok(stat.is_some()),
            Err(e) if e.raw_os_error().is_some() => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Returns whether it is a directory of modules. An error is a symbolic link that leads out of the folder.
    pub(super) fn has_modules(&self) -> io::Result<bool> {
        for name in MARKS {
            if self.has(name)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Opens a file in it.
    pub(super) fn file(&self, name: &str) -> Result<(File, u64), Problem> {
        let place = self.place(name).map_err(Problem::Open)?;
        let (dir, name) = place.parts();
        source::open_in(dir, name)
    }

    /// Opens the directory as a mere name.
    pub(super) fn held(&self) -> io::Result<OwnedFd> {
        let place = self.place("")?;
        let (dir, name) = place.parts();
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(openat(dir, name, flags, Mode::empty())?)
    }
}

/// Joins two paths without adding a slash at the end.
fn join(path: &Path, below: &Path) -> PathBuf {
    match (path.as_os_str().is_empty(), below.as_os_str().is_empty()) {
        (true, _) => below.into(),
        (_, true) => path.into(),
        _ => path.join(below),
    }
}

/// Returns directories that may contain the modules, best first.
pub(super) fn places(config: &ModulesConfig, kernel: &Path, version: &str) -> Result<Vec<Directory>, Error> {
    if let Some(dir) = &config.dir {
        let top = Directory::open(dir).map_err(|source| Error::File { path: dir.clone(), source })?;
        // If the version is unknown, only the directory itself can be meant.
        let names = if version.is_empty() { vec![PathBuf::new()] } else { below(Path::new(""), version.as_ref()) };
        return Ok(names.iter().map(|name| top.join(name)).collect());
    }
    if version.is_empty() {
        return Ok(Vec::new());
    }
    let mut places: Vec<Directory> = Vec::new();
    let kernel = real_path(kernel);
    if let Some(beside) = kernel.parent() {
        // /usr/lib/modules/VERSION/vmlinuz, and boot/vmlinuz of an unpacked package.
        places.extend(Some(beside).filter(|dir| dir.ends_with(version)).and_then(Directory::found));
        let tops = [beside, beside.parent().unwrap_or(beside)].into_iter().filter_map(Directory::found);
        places.extend(tops.flat_map(|top| in_root(&top)).map(|modules| modules.join(version)));
    }
    for place in Directory::found(Path::new("/")).iter().flat_map(in_root).map(|modules| modules.join(version)) {
        if !places.iter().any(|other| other.path() == place.path()) {
            places.push(place);
        }
    }
    Ok(places)
}

fn in_root(root: &Directory) -> [Directory; 2] {
    ["lib/modules", "usr/lib/modules"].map(|dir| root.join(dir))
}

fn real_path(kernel: &Path) -> PathBuf {
    held::path(kernel).canonicalize().unwrap_or_else(|_| kernel.into())
}

/// Returns the first directory that has modules. A symbolic link that leads out is an error in a folder that the user
/// named; other directories are then skipped.
pub(super) fn first<'a>(places: &'a [Directory], config: &ModulesConfig) -> Result<Option<&'a Directory>, Error> {
    for place in places {
        match place.has_modules() {
            Ok(true) => return Ok(Some(place)),
            Ok(false) => {}
            Err(e) if config.dir.is_some() => {
                return Err(Error::File { path: place.path(), source: Problem::Open(e) });
            }
            Err(e) => log::warn!("modules in {} are not used: {e}", place.path().display()),
        }
    }
    Ok(None)
}

/// Describes the searched places, and another version that the directory given by the user contains instead.
pub(super) fn describe(places: &[Directory], config: &ModulesConfig) -> String {
    let mut text = places.iter().map(|place| place.path().display().to_string()).collect::<Vec<_>>().join(", ");
    if places.is_empty() {
        text.push_str("no directory, since the kernel's version is unknown");
    }
    let top = config.dir.as_ref().and_then(|dir| Directory::open(dir).ok());
    for dir in top.iter().flat_map(|top| [&[top.clone()][..], &in_root(top)].concat()) {
        let names = dir.held().ok().and_then(|dir| source::names(dir).ok()).unwrap_or_default();
        if let Some(version) = names.iter().find(|name| dir.join(name).has_modules().is_ok_and(|has| has)) {
            text.push_str(&format!(" (modules of kernel {} are there)", version.display()));
            break;
        }
    }
    text
}

/// Opens the existing directories named `modules` near this kernel's file, and the host's own, that may contain its
/// version; best first.
pub fn above(kernel: &Path) -> Vec<(PathBuf, OwnedFd)> {
    let kernel = real_path(kernel);
    let beside = kernel.parent().unwrap_or(Path::new("/"));
    // The kernel is /usr/lib/modules/VERSION/vmlinuz.
    let around = beside.parent().filter(|dir| dir.ends_with("lib/modules")).and_then(Directory::found);
    let tops = [beside, beside.parent().unwrap_or(beside), Path::new("/")].into_iter().filter_map(Directory::found);
    let mut places: Vec<(PathBuf, OwnedFd)> = Vec::new();
    for place in around.into_iter().chain(tops.flat_map(|top| in_root(&top))) {
        let Ok(dir) = place.held() else { continue };
        let path = fs::read_link(descriptor_path(&dir)).unwrap_or_else(|_| place.path());
        if !places.iter().any(|(other, _)| *other == path) {
            places.push((path, dir));
        }
    }
    places
}

/// Returns the paths of all modules below `dir`, one per line.
pub(super) fn walk(dir: &Directory) -> Result<String, Error> {
    let failed = |path: PathBuf, source| Error::File { path, source };
    let cannot_open = |path: PathBuf, e: io::Error| failed(path, Problem::Open(e));
    let top = dir.held().map_err(|e| cannot_open(dir.path(), e))?;
    let mut text = String::new();
    let mut folders = vec![PathBuf::new()];
    let (mut count, mut len) = (0u32, 0);
    while let Some(folder) = folders.pop() {
        let path = dir.join(&folder).path();
        let open = source::descend(&top, &folder).map_err(|e| cannot_open(path.clone(), e))?;
        for entry in source::names(&open).map_err(|problem| failed(path.clone(), problem))? {
            let name = folder.join(&entry);
            let Some(relative) = name.to_str().filter(|path| !path.contains(['\n', ':'])) else { continue };
            let stat = statat(&open, &entry, AtFlags::SYMLINK_NOFOLLOW);
            match stat.map(|stat| FileType::from_raw_mode(stat.st_mode)) {
                Ok(FileType::Directory) if relative.len() < libc::PATH_MAX as usize => folders.push(name.clone()),
                Ok(FileType::RegularFile) if stem(relative).is_some() => text.extend([relative, ":\n"]),
                _ => {}
            }
            (count, len) = (count + 1, len + relative.len());
            if count > FILES_MAX || len > PATHS_MAX {
                return Err(failed(
                    dir.path(),
                    Problem::Damaged("it contains more files than any kernel's modules".into()),
                ));
            }
        }
    }
    Ok(text)
}
