//! The files that a command line names, each with its flag. One file under two names is detected before anything is
//! written, and inputs that a guest could replace are held open before it runs.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::FileType;

use crate::backend::console::ConsoleEnd;
use crate::backend::held;
use crate::backend::image::{Format, Overlay};
use crate::backend::output_file::own_descriptor;
use crate::backend::place::{FileId, Place, WritableFolders};
use crate::backend::qcow2;
use crate::boot::pack::InitramfsConfig;
use crate::config::MachineConfig;

/// Purpose of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// Read when the guest is created, and again if it is restarted.
    Read,
    /// A disk that is only read; several may share it.
    ReadDisk,
    /// A disk that is written to: nothing else may use it.
    Disk,
    /// Written in one piece after the guest has ended.
    Result,
    /// Written while the guest runs.
    Live,
    /// A socket or FIFO whose name exists while the guest runs.
    Meeting,
    /// A folder.
    Folder,
}

impl Use {
    fn is_output(self) -> bool {
        matches!(self, Use::Result | Use::Live | Use::Meeting)
    }

    fn is_input(self) -> bool {
        matches!(self, Use::Read | Use::ReadDisk | Use::Disk | Use::Folder)
    }

    /// Returns whether one file cannot serve both purposes.
    fn excludes(self, other: Use) -> bool {
        let alone = |one, other| one == Use::Disk && matches!(other, Use::Disk | Use::ReadDisk);
        let spoils = |one: Use, other| one.is_output() && other != Use::Folder;
        [(self, other), (other, self)].into_iter().any(|(one, other)| alone(one, other) || spoils(one, other))
    }
}

/// A file and the flag that names it.
#[derive(Clone, Debug)]
pub(super) struct Named {
    flag: &'static str,
    path: PathBuf,
    purpose: Use,
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.flag, self.path.display())
    }
}

/// Reasons why files cannot be used as they are named.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// Two flags name one file, and one of them would destroy what the other needs.
    #[error("{0} and {1} are the same file, which vireo would overwrite")]
    Overwritten(Named, Named),
    /// Two flags name one file for output.
    #[error("{0} and {1} are the same file: one would overwrite the other")]
    Outputs(Named, Named),
    /// Two flags name one disk, and at least one of them writes to it.
    #[error("{0} and {1} are the same disk: a disk can be used twice only if both uses are readonly")]
    Twice(Named, Named),
    /// The path is a link that a guest may have created.
    #[error("cannot use {0}")]
    Planted(Named, #[source] io::Error),
}

/// All files that a command line names.
#[derive(Clone, Debug, Default)]
pub(super) struct NamedFiles {
    files: Vec<Named>,
    writable: Vec<PathBuf>,
    /// Disks that may be over base images, and what the user says that they are.
    images: Vec<(Named, Option<Format>)>,
}

impl NamedFiles {
    /// Adds a file.
    pub(super) fn add(&mut self, flag: &'static str, path: &Path, purpose: Use) {
        self.files.push(Named { flag, path: path.into(), purpose });
    }

    /// Adds a file, if there is one.
    pub(super) fn add_some(&mut self, flag: &'static str, path: Option<&Path>, purpose: Use) {
        path.into_iter().for_each(|path| self.add(flag, path, purpose));
    }

    /// Adds a shared folder.
    pub(super) fn add_folder(&mut self, flag: &'static str, path: &Path, writable: bool) {
        self.add(flag, path, Use::Folder);
        self.writable.extend(writable.then(|| path.to_path_buf()));
    }

    /// Adds the folders that guests of another command line can write to.
    pub(super) fn add_writable(&mut self, other: &NamedFiles) {
        self.writable.extend_from_slice(&other.writable);
    }

    /// Adds every file that a machine's description names.
    pub(super) fn add_machine(&mut self, config: &MachineConfig) {
        self.add("--kernel", &config.boot.kernel, Use::Read);
        config.boot.initrd.iter().for_each(|path| self.add("--initrd", path, Use::Read));
        config.boot.initramfs.iter().for_each(|packed| self.add_packed(packed));
        for disk in &config.disks {
            let written = !disk.readonly && disk.overlay.is_none();
            self.add_disk("--disk", &disk.path, written, disk.format);
            if let Some(Overlay::File(path)) = &disk.overlay {
                self.add("overlay", path, Use::Disk);
            }
        }
        for pmem in &config.pmems {
            let written = !pmem.readonly && pmem.overlay.is_none();
            self.add("--pmem", &pmem.path, if written { Use::Disk } else { Use::ReadDisk });
        }
        config.shares.iter().for_each(|share| self.add_folder("--share", &share.path, !share.readonly));
        self.add_some("--vsock", config.vsock.as_ref().map(|vsock| vsock.path.as_path()), Use::Meeting);
        self.add_end("--serial", &config.serial);
        config.console.iter().for_each(|end| self.add_end("--console", end));
        for port in &config.console_ports {
            self.add_end("--console-port", &port.to);
            self.add_some("--console-port from", port.from.as_deref(), Use::Read);
        }
    }

    /// Adds a disk, and with it the images that are below it.
    pub(super) fn add_disk(&mut self, flag: &'static str, path: &Path, written: bool, format: Option<Format>) {
        self.add(flag, path, if written { Use::Disk } else { Use::ReadDisk });
        self.images.extend(self.files.last().cloned().map(|disk| (disk, format)));
    }

    fn add_packed(&mut self, packed: &InitramfsConfig) {
        self.add_some("--init", packed.init.as_deref(), Use::Read);
        // A name without a slash is searched in PATH.
        let busybox = packed.busybox.as_deref().filter(|path| path.components().count() > 1);
        self.add_some("--busybox", busybox, Use::Read);
        packed.dirs.iter().for_each(|path| self.add("--initramfs-dir", path, Use::Folder));
        packed.files.iter().for_each(|file| self.add("--file", &file.host, Use::Read));
    }

    fn add_end(&mut self, flag: &'static str, end: &ConsoleEnd) {
        match end {
            ConsoleEnd::File(path) => self.add(flag, path, Use::Live),
            ConsoleEnd::Socket(path) => self.add(flag, path, Use::Meeting),
            ConsoleEnd::Pipe(path) => {
                for end in [".in", ".out"] {
                    let mut name = path.as_os_str().to_os_string();
                    name.push(end);
                    self.add(flag, name.as_ref(), Use::Meeting);
                }
            }
            _ => {}
        }
    }

    /// Fails if two files exclude each other, or if a link that a guest may have created leads an input out of the
    /// guest's folders. Holds inputs open that a guest could replace, and for a restart if `again` is set. Opens
    /// nothing for writing.
    pub(super) fn settle(&mut self, again: bool) -> Result<(), Error> {
        let folders = WritableFolders::new(self.writable.iter().map(PathBuf::as_path));
        held::begin(folders.clone(), again);
        self.add_bases()?;
        self.check(&folders)?;
        self.files.iter().filter(|file| file.purpose.is_input()).try_for_each(Named::keep)
    }

    /// Adds the images below the disks.
    fn add_bases(&mut self) -> Result<(), Error> {
        for (disk, format) in std::mem::take(&mut self.images) {
            disk.keep()?;
            let base = |path| Named { flag: "base image", path, purpose: Use::ReadDisk };
            let found = qcow2::bases(&disk.path, format).map_err(|(path, e)| Error::Planted(base(path), e))?;
            self.files.extend(found.into_iter().map(base));
        }
        Ok(())
    }

    /// Warns about files that the guest can change although vireo still uses them, or uses them again for a restart.
    pub(super) fn warn(&self, again: bool) {
        let folders = held::folders();
        for file in &self.files {
            let how = match file.purpose {
                Use::Live => "can change what is written there",
                Use::Meeting => "can put something else in its place",
                Use::Read | Use::ReadDisk if again => "can change it before a restart",
                _ => continue,
            };
            let place = Place::find(&file.path, &WritableFolders::none());
            if let Some(folder) = place.ok().and_then(|place| place.folder(&folders)) {
                log::warn!("{file} lies in {}, which is writable in the guest: the guest {how}", folder.display());
            }
        }
    }

    fn check(&self, folders: &WritableFolders) -> Result<(), Error> {
        let found: Vec<_> = self.files.iter().map(|file| (file, Which::of(&file.path, folders))).collect();
        for (n, (one, which)) in found.iter().enumerate() {
            let same = |(other, id): &&(&Named, Which)| which.is(id) && one.purpose.excludes(other.purpose);
            let Some((other, _)) = found[..n].iter().find(same) else { continue };
            let (first, second) = ((*other).clone(), (*one).clone());
            return Err(match (one.purpose.is_output(), other.purpose.is_output()) {
                (true, true) => Error::Outputs(first, second),
                (false, false) => Error::Twice(first, second),
                _ => Error::Overwritten(first, second),
            });
        }
        Ok(())
    }
}

impl Named {
    /// Holds an input open, if that is needed.
    fn keep(&self) -> Result<(), Error> {
        held::keep(&self.path).map_err(|e| Error::Planted(self.clone(), e))
    }
}

/// The file that a path refers to.
enum Which {
    /// An existing file.
    Is(FileId),
    /// A file that is about to be created: its folder and its name.
    New(FileId, std::ffi::OsString),
    /// Something that several may use: a terminal, /dev/null, a FIFO, an inherited descriptor; or a path that cannot be
    /// resolved.
    Any,
}

impl Which {
    fn of(path: &Path, folders: &WritableFolders) -> Self {
        if own_descriptor(path).is_some() {
            return Which::Any;
        }
        let Ok(place) = Place::find(path, folders).or_else(|_| Place::find(path, &WritableFolders::none())) else {
            return Which::Any;
        };
        let Ok(stat) = place.stat() else { return Which::Any };
        let Some(stat) = stat else {
            return place.key().map_or(Which::Any, |(dir, name)| Which::New(dir, name));
        };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::CharacterDevice | FileType::Fifo => Which::Any,
            _ => Which::Is(FileId::of(&stat)),
        }
    }

    fn is(&self, other: &Which) -> bool {
        match (self, other) {
            (Which::Is(one), Which::Is(other)) => one == other,
            (Which::New(dir, name), Which::New(other, as_well)) => (dir, name) == (other, as_well),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn one_file_for_two_purposes() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        ["disk", "kernel"].iter().for_each(|name| fs::write(at(name), "x").unwrap());
        fs::hard_link(at("disk"), at("hard")).unwrap();
        symlink("disk", at("soft")).unwrap();
        symlink(".", at("here")).unwrap();
        use Use::{Disk, Folder, Live, Meeting, Read, ReadDisk, Result};
        let check = |files: &[(&str, Use)]| {
            let mut named = NamedFiles::default();
            files.iter().for_each(|(path, purpose)| named.add("--flag", &at(path), *purpose));
            named.check(&WritableFolders::none()).err().map(|e| e.to_string()).unwrap_or_default()
        };
        for (one, other, says) in [
            (("disk", Disk), ("disk", Result), "are the same file, which vireo would overwrite"),
            (("disk", Disk), ("hard", Live), "are the same file, which vireo would overwrite"),
            (("kernel", Read), ("here/kernel", Result), "are the same file, which vireo would overwrite"),
            (("soft", ReadDisk), ("hard", Disk), "are the same disk"),
            (("disk", Disk), ("disk", Disk), "are the same disk"),
            (("new", Result), ("here/new", Result), "one would overwrite the other"),
            (("new", Result), ("new", Meeting), "one would overwrite the other"),
            (("disk", ReadDisk), ("disk", ReadDisk), ""),
            (("kernel", Read), ("kernel", Read), ""),
            (("kernel", Read), ("kernel", Disk), ""),
            (("new", Result), ("other", Result), ""),
            (("", Folder), ("new", Result), ""),
        ] {
            for files in [[one, other], [other, one]] {
                let found = check(&files);
                assert!(
                    if says.is_empty() { found.is_empty() } else { found.ends_with(says) || found.contains(says) },
                    "{files:?}: {found}"
                );
            }
        }
        let mut named = NamedFiles::default();
        for path in ["/dev/null", "/dev/stdout", "/proc/self/fd/1"] {
            named.add("--report", path.as_ref(), Result);
            named.add("--junit", path.as_ref(), Result);
        }
        named.check(&WritableFolders::none()).unwrap();
    }
}
