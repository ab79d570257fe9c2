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
use crate::boot::modules;
use crate::boot::pack::{self, InitramfsConfig};
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
    /// Appended to while the guest runs; several may share it.
    Log,
    /// A new file that replaces an existing one of any kind. Links are not followed.
    Renewed,
    /// A socket or FIFO whose name exists while the guest runs.
    Meeting,
    /// A folder.
    Folder,
    /// A folder with a kernel's modules.
    Modules,
}

impl Use {
    fn is_output(self) -> bool {
        matches!(self, Use::Result | Use::Live | Use::Log | Use::Renewed | Use::Meeting)
    }

    fn is_folder(self) -> bool {
        matches!(self, Use::Folder | Use::Modules)
    }

    fn is_input(self) -> bool {
        !self.is_output()
    }

    /// Returns whether one file cannot serve both purposes. `together`: one guest would use both. Several guests may use
    /// one disk, because one may run after the other, and disks are locked.
    fn excludes(self, other: Use, together: bool) -> bool {
        let alone = |one, other| together && one == Use::Disk && matches!(other, Use::Disk | Use::ReadDisk);
        let spoils =
            |one: Use, other: Use| one.is_output() && !other.is_folder() && (one, other) != (Use::Log, Use::Log);
        [(self, other), (other, self)].into_iter().any(|(one, other)| alone(one, other) || spoils(one, other))
    }
}

/// A file and the flag that names it.
#[derive(Clone, Debug)]
pub(super) struct Named {
    flag: &'static str,
    path: PathBuf,
    purpose: Use,
    /// The run of a matrix that it is for.
    run: Option<String>,
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.flag, self.path.display())?;
        self.run.as_ref().map_or(Ok(()), |run| write!(f, " of the run {run}"))
    }
}

/// Reasons why files cannot be used as they are named.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// Two flags name one file, and one of them would destroy what the other needs.
    #[error("{0} and {1} are the same file, which vireo would overwrite")]
    Overwritten(Box<Named>, Box<Named>),
    /// Two flags name one file for output.
    #[error("{0} and {1} are the same file: one would overwrite the other")]
    Outputs(Box<Named>, Box<Named>),
    /// An output is one of the files in a directory of modules.
    #[error("{0} is one of the files in {1}, which vireo would overwrite")]
    Modules(Box<Named>, Box<Named>),
    /// Two flags name one disk, and at least one of them writes to it.
    #[error("{0} and {1} are the same disk: a disk can be used twice only if both uses are readonly")]
    Twice(Box<Named>, Box<Named>),
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
        // A file that is named as a folder is refused later, and must not be overwritten before that.
        let purpose = if purpose.is_folder() && path.exists() && !path.is_dir() { Use::Read } else { purpose };
        self.files.push(Named { flag, path: path.into(), purpose, run: None });
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

    /// Adds a folder that other guests can write to.
    pub(super) fn add_writable(&mut self, path: &Path) {
        self.writable.push(path.into());
    }

    /// The folders that guests can write to.
    pub(super) fn writable(&self) -> &[PathBuf] {
        &self.writable
    }

    /// Adds what the command line of a run of a matrix names.
    pub(super) fn add_run(&mut self, run: &str, other: NamedFiles) {
        let of_run = |named: Named| Named { run: Some(run.into()), ..named };
        self.files.extend(other.files.into_iter().map(of_run));
        self.images.extend(other.images.into_iter().map(|(named, format)| (of_run(named), format)));
        for folder in other.writable {
            if !self.writable.contains(&folder) {
                self.writable.push(folder);
            }
        }
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
        self.add_some("--busybox", packed.busybox.as_deref().and_then(pack::find_busybox).as_deref(), Use::Read);
        let modules = packed.modules.as_ref().and_then(|modules| modules.dir.as_deref());
        self.add_some("--modules-dir", modules, Use::Modules);
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
    /// guest's folders. Holds inputs open that a guest could replace, and for a restart if `again` is set; the runs of a
    /// matrix do so in their own processes. Opens nothing for writing.
    pub(super) fn settle(&mut self, again: bool) -> Result<(), Error> {
        let folders = WritableFolders::new(self.writable.iter().map(PathBuf::as_path));
        held::begin(folders.clone(), again);
        self.add_bases()?;
        self.check(&folders)?;
        for file in self.files.iter().filter(|file| file.purpose.is_input()) {
            file.keep()?;
            file.leave();
        }
        Ok(())
    }

    /// Adds the images below the disks.
    fn add_bases(&mut self) -> Result<(), Error> {
        for (disk, format) in std::mem::take(&mut self.images) {
            disk.keep()?;
            let base = |path| Named { flag: "base image", path, purpose: Use::ReadDisk, run: disk.run.clone() };
            let found = qcow2::bases(&disk.path, format).map_err(|(path, e)| Error::Planted(base(path), e))?;
            let known = self.files.len();
            self.files.extend(found.into_iter().map(base));
            disk.leave();
            self.files.iter().skip(known).for_each(Named::leave);
        }
        Ok(())
    }

    /// Warns about files that the guest can change although vireo still uses them, or uses them again for a restart.
    pub(super) fn warn(&self, again: bool) {
        let folders = held::folders();
        for file in self.files.iter().filter(|file| file.run.is_none()) {
            let how = match file.purpose {
                Use::Live | Use::Log => "can change what is written there",
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
        let found: Vec<_> = self.files.iter().map(|file| (file, Which::of(file, folders))).collect();
        for (n, (one, which)) in found.iter().enumerate() {
            let excludes = |other: &Named| one.purpose.excludes(other.purpose, one.run == other.run);
            let same = |(other, id): &&(&Named, Which)| which.is(id) && excludes(other);
            let Some((other, _)) = found[..n].iter().find(same) else { continue };
            let (first, second) = (Box::new((*other).clone()), Box::new((*one).clone()));
            return Err(match (one.purpose.is_output(), other.purpose.is_output()) {
                (true, true) => Error::Outputs(first, second),
                (false, false) => Error::Twice(first, second),
                _ => Error::Overwritten(first, second),
            });
        }
        self.check_modules()
    }

    /// Fails if an output is a list or a module in a named directory of modules, whose files no flag names.
    fn check_modules(&self) -> Result<(), Error> {
        for output in self.files.iter().filter(|file| file.purpose.is_output()) {
            let place = Place::find(&output.path, &WritableFolders::none());
            let Some(place) = place.ok().filter(|place| modules::is_file(place.parts().1)) else { continue };
            for folder in self.files.iter().filter(|file| file.purpose == Use::Modules) {
                if place.folder(&WritableFolders::new([folder.path.as_path()])).is_some() {
                    return Err(Error::Modules(output.clone().into(), folder.clone().into()));
                }
            }
        }
        Ok(())
    }
}

impl Named {
    /// Holds an input open, if that is needed.
    fn keep(&self) -> Result<(), Error> {
        held::keep(&self.path).map_err(|e| Error::Planted(self.clone(), e))
    }

    /// Leaves it to the process of its run, so that many runs do not need as many descriptors here.
    fn leave(&self) {
        if self.run.is_some() {
            held::forget(&self.path);
        }
    }
}

/// The file that a path refers to.
enum Which {
    /// An existing file.
    Is(FileId),
    /// A file that is about to be created: an existing folder, and the path from there.
    New(FileId, PathBuf),
    /// Something that several may use: a terminal, /dev/null, a FIFO, an inherited descriptor; or a path that cannot be
    /// resolved.
    Any,
}

impl Which {
    fn of(file: &Named, folders: &WritableFolders) -> Self {
        let path = &file.path;
        if own_descriptor(path).is_some() {
            return Which::Any;
        }
        let find: fn(&Path, &WritableFolders) -> io::Result<Place> =
            if file.purpose == Use::Renewed { Place::find_new } else { Place::find };
        let place = match find(path, folders).or_else(|_| find(path, &WritableFolders::none())) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Which::below(file, folders),
            Err(_) => return Which::Any,
            Ok(place) => place,
        };
        let Ok(stat) = place.stat() else { return Which::Any };
        let Some(stat) = stat else {
            return place.key().map_or(Which::Any, |(dir, name)| Which::New(dir, name.into()));
        };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::CharacterDevice | FileType::Fifo => Which::Any,
            _ => Which::Is(FileId::of(&stat)),
        }
    }

    /// One in a folder that may be made before.
    fn below(file: &Named, folders: &WritableFolders) -> Self {
        let (Some(folder), Some(name)) = (file.path.parent(), file.path.file_name()) else { return Which::Any };
        match Which::of(&Named { path: folder.into(), purpose: Use::Folder, ..file.clone() }, folders) {
            Which::New(dir, path) => Which::New(dir, path.join(name)),
            _ => Which::Any,
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
        symlink("disk", at("link.log")).unwrap();
        use Use::{Disk, Folder, Live, Log, Meeting, Read, ReadDisk, Renewed, Result};
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
            (("no/folder/new", Result), ("here/no/folder/new", Live), "one would overwrite the other"),
            (("no/folder/new", Result), ("no/new", Live), ""),
            (("kernel", Read), ("kernel", Log), "are the same file, which vireo would overwrite"),
            (("new", Log), ("new", Live), "one would overwrite the other"),
            (("new", Log), ("new", Log), ""),
            (("kernel", Read), ("kernel", Renewed), "are the same file, which vireo would overwrite"),
            (("new", Result), ("new", Renewed), "one would overwrite the other"),
            (("disk", Disk), ("link.log", Renewed), ""),
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
        // What is named as a folder and is none.
        assert!(check(&[("disk", Folder), ("disk", Result)]).ends_with("which vireo would overwrite"));
        let mut named = NamedFiles::default();
        for path in ["/dev/null", "/dev/stdout", "/proc/self/fd/1"] {
            named.add("--report", path.as_ref(), Result);
            named.add("--junit", path.as_ref(), Result);
        }
        named.check(&WritableFolders::none()).unwrap();
    }

    #[test]
    fn runs_of_a_matrix_share_disks_and_overwrite_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "x").unwrap();
        let check = |one: Use, other: Option<Use>| {
            let mut named = NamedFiles::default();
            for (run, purpose) in [("a", Some(one)), ("b", other)] {
                let mut of_run = NamedFiles::default();
                purpose.into_iter().for_each(|purpose| of_run.add("--flag", &path, purpose));
                named.add_run(run, of_run);
            }
            if other.is_none() {
                named.add("--report", &path, Use::Result);
            }
            named.check(&WritableFolders::none()).err().map(|e| e.to_string()).unwrap_or_default()
        };
        for (one, other) in [(Use::Disk, Use::Disk), (Use::Disk, Use::ReadDisk), (Use::Log, Use::Log)] {
            assert_eq!(check(one, Some(other)), "");
        }
        let name = path.display();
        assert_eq!(
            check(Use::Disk, Some(Use::Live)),
            format!(
                "--flag {name} of the run a and --flag {name} of the run b are the same file, which vireo would overwrite"
            )
        );
        assert!(check(Use::Live, Some(Use::Live)).ends_with("one would overwrite the other"));
        assert_eq!(
            check(Use::Disk, None),
            format!("--flag {name} of the run a and --report {name} are the same file, which vireo would overwrite")
        );
    }

    #[test]
    fn modules_are_not_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let version = dir.path().join("lib/modules/6.1");
        fs::create_dir_all(&version).unwrap();
        fs::write(version.join("modules.dep"), "a.ko:\n").unwrap();
        symlink("lib/modules/6.1/modules.dep", dir.path().join("log")).unwrap();
        let check = |output: &str| {
            let mut named = NamedFiles::default();
            named.add("--modules-dir", dir.path(), Use::Modules);
            named.add("--report", &dir.path().join(output), Use::Result);
            named.check(&WritableFolders::none()).map_err(|e| e.to_string())
        };
        for bad in ["lib/modules/6.1/modules.dep", "lib/modules/6.1/a.ko", "lib/modules/6.1/b.ko.xz", "log"] {
            let error = check(bad).unwrap_err();
            assert!(
                error.contains(" is one of the files in --modules-dir ") && error.ends_with("overwrite"),
                "{error}"
            );
        }
        for good in ["report.json", "lib/modules/6.1/report"] {
            check(good).unwrap();
        }
    }
}
