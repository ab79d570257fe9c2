//! The only code that writes files named by the user: reports, core files, logs.
//!
//! ```text
//! OutputFile   written in one piece at the end, beside its name, and renamed: never half a report
//! live()       written as things happen: a console, a log
//! ```
//!
//! In both cases the path is resolved when the command line has been read, before a guest runs ([`Place`]): changes
//! that the guest makes to links and folders afterwards have no effect. Temporary files beside the target are new files
//! with unguessable names.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, fchmod, fsync, openat, renameat, unlinkat};
use rustix::io::Errno;

use super::console;
use super::held;
use super::place::Place;

/// Number of attempts to find a free name; even a guest that guessed one would not block the next.
const ATTEMPTS: usize = 8;

/// Mode of a file that anyone may read.
const READABLE: Mode = Mode::RUSR.union(Mode::WUSR).union(Mode::RGRP).union(Mode::ROTH);

/// A file that is written in one piece.
#[derive(Debug)]
pub struct OutputFile {
    path: PathBuf,
    mode: Mode,
    /// That of the file which is replaced. Found before the guest starts, which may put another one there.
    kept: Option<Mode>,
    target: Target,
}

#[derive(Debug)]
enum Target {
    /// A regular file, which is replaced.
    Named(Place),
    /// A FIFO, device or inherited descriptor. It is open from the start and written to at its current position.
    Open(File),
}

impl OutputFile {
    /// Prepares to write the file that `path` names. Fails if the file cannot be written: better now than after the
    /// guest has run for an hour. A file that is replaced keeps its mode; a new one is readable by everyone whom the umask
    /// allows.
    pub fn new(path: &Path) -> io::Result<Self> {
        if let Some(fd) = own_descriptor(path) {
            let target = Target::Open(console::duplicate(fd)?);
            return Ok(OutputFile { path: path.into(), mode: READABLE, kept: None, target });
        }
        let place = Place::find(path, &held::folders())?;
        match place.stat()? {
            Some(stat) if is(&stat, FileType::Directory) => Err(io::ErrorKind::IsADirectory.into()),
            // A file without a name has no directory for a file beside it, either.
            Some(stat) if !is(&stat, FileType::RegularFile) || stat.st_nlink == 0 => {
                let target = Target::Open(open_without_waiting(&place, OFlags::empty())?);
                Ok(OutputFile { path: path.into(), mode: READABLE, kept: None, target })
            }
            _ => OutputFile::at(&place).tried(),
        }
    }

    /// Prepares to write a regular file that only the user may read.
    pub fn private(path: &Path) -> io::Result<Self> {
        let place = Place::find(path, &held::folders())?;
        match place.stat()? {
            Some(stat) if is(&stat, FileType::Directory) => Err(io::ErrorKind::IsADirectory.into()),
            Some(stat) if !is(&stat, FileType::RegularFile) => Err(io::Error::other("a regular file is needed")),
            _ => OutputFile { mode: Mode::RUSR | Mode::WUSR, kept: None, ..OutputFile::at(&place) }.tried(),
        }
    }

    /// Fails if no file can be created beside the target.
    fn tried(self) -> io::Result<Self> {
        self.draft().map(|_| self)
    }

    /// Prepares to write the file at `place`, which is not a link.
    pub fn at(place: &Place) -> Self {
        let (path, kept) = (place.path().into(), mode_of(place));
        OutputFile { path, mode: READABLE, kept, target: Target::Named(place.clone()) }
    }

    /// The path as the user typed it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes `bytes` as the file's whole content.
    pub fn write(&self, bytes: &[u8]) -> io::Result<()> {
        match &self.target {
            Target::Open(file) => (&mut &*file).write_all(bytes),
            Target::Named(_) => {
                let draft = self.draft()?;
                (&mut &draft.file).write_all(bytes)?;
                // Without this, a host that crashes soon might leave an empty file under the name.
                fsync(&draft.file)?;
                draft.publish()
            }
        }
    }

    /// Creates an empty file in the same folder. It replaces the target when it is published, and is removed otherwise.
    pub fn draft(&self) -> io::Result<Draft> {
        match &self.target {
            Target::Named(place) => {
                let draft = Draft::new(place, self.kept.unwrap_or(self.mode))?;
                self.kept.into_iter().for_each(|mode| set_mode(&draft.file, mode));
                Ok(draft)
            }
            Target::Open(file) => Ok(Draft { file: file.try_clone()?, beside: None }),
        }
    }
}

/// Returns the permissions of the regular file at `place`, if there is one; never set-user-id or its like.
pub fn mode_of(place: &Place) -> Option<Mode> {
    let stat = place.stat().ok().flatten().filter(|stat| is(stat, FileType::RegularFile))?;
    Some(Mode::from_raw_mode(stat.st_mode) & (Mode::RWXU | Mode::RWXG | Mode::RWXO))
}

/// Gives a new file its mode in spite of the umask. Errors are ignored: some file systems have no modes.
pub fn set_mode(file: &File, mode: Mode) {
    let _ = fchmod(file, mode);
}

/// A file that gets its content before it gets its name.
#[derive(Debug)]
pub struct Draft {
    /// The draft, open for writing.
    pub file: File,
    /// Place of the published file, and the draft's name until then.
    beside: Option<(Place, OsString)>,
}

impl Draft {
    /// Creates a draft for `place`.
    pub fn new(place: &Place, mode: Mode) -> io::Result<Self> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        for _ in 0..ATTEMPTS {
            let mut random = [0; 8];
            rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
            let name = OsString::from(format!(".vireo-{:016x}.tmp", u64::from_ne_bytes(random)));
            match openat(place.parts().0, &name, flags, mode) {
                Err(Errno::EXIST) => {}
                file => return Ok(Draft { file: file?.into(), beside: Some((place.clone(), name)) }),
            }
        }
        Err(Errno::EXIST.into())
    }

    /// Renames the draft to its final name, replacing any file of that name.
    pub fn publish(mut self) -> io::Result<()> {
        let Some((place, beside)) = &self.beside else { return Ok(()) };
        let (dir, name) = place.parts();
        renameat(dir, beside, dir, name)?;
        self.beside = None;
        Ok(())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if let Some((place, name)) = &self.beside {
            let _ = unlinkat(place.parts().0, name, AtFlags::empty());
        }
    }
}

/// Initial state of a [`live`] file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// The file is emptied.
    Empty,
    /// Writes go after the existing content.
    Append,
}

/// Opens a file that is written as things happen, and creates it if it is missing. A FIFO must have its reader already:
/// waiting for one could not be interrupted.
pub fn live(path: &Path, begin: Begin) -> io::Result<File> {
    if let Some(fd) = own_descriptor(path) {
        return console::duplicate(fd);
    }
    let how = if begin == Begin::Append { OFlags::APPEND } else { OFlags::TRUNC };
    open_without_waiting(&Place::find(path, &held::folders())?, how | OFlags::CREATE)
}

/// Opens a file for writing without blocking; later writes may block.
fn open_without_waiting(place: &Place, flags: OFlags) -> io::Result<File> {
    let file = place.open(OFlags::WRONLY | OFlags::NONBLOCK | flags, Mode::from_bits_retain(0o666));
    let file = file.map_err(|e| match e.raw_os_error() {
        Some(libc::ENXIO) if place.stat().ok().flatten().is_some_and(|stat| is(&stat, FileType::Fifo)) => {
            io::Error::other("this FIFO has no reader; start one first")
        }
        _ => e,
    })?;
    rustix::io::ioctl_fionbio(&file, false)?;
    Ok(file)
}

fn is(stat: &Stat, kind: FileType) -> bool {
    FileType::from_raw_mode(stat.st_mode) == kind
}

/// Returns the descriptor of this process that a path denotes. It is written to at its current position, not replaced.
pub fn own_descriptor(path: &Path) -> Option<RawFd> {
    match path.to_str()? {
        "/dev/stdout" => Some(libc::STDOUT_FILENO),
        "/dev/stderr" => Some(libc::STDERR_FILENO),
        path => path.strip_prefix("/dev/fd/").or_else(|| path.strip_prefix("/proc/self/fd/"))?.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    #[test]
    fn what_a_guest_plants_meanwhile_is_replaced_and_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (folder, victim) = (dir.path().join("share"), dir.path().join("victim"));
        fs::create_dir(&folder).unwrap();
        fs::write(&victim, "precious").unwrap();
        let report = OutputFile::new(&folder.join("end.json")).unwrap();
        let core = OutputFile::private(&folder.join("core")).unwrap();
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 0, "trying leaves nothing");
        for name in ["end.json", "core", "end.json.1.tmp"] {
            symlink(&victim, folder.join(name)).unwrap();
        }
        fs::rename(&folder, dir.path().join("moved")).unwrap();
        symlink("/etc", &folder).unwrap();
        report.write(b"{}\n").unwrap();
        let draft = core.draft().unwrap();
        (&mut &draft.file).write_all(b"core").unwrap();
        draft.publish().unwrap();
        let moved = dir.path().join("moved");
        assert_eq!(fs::read_to_string(moved.join("end.json")).unwrap(), "{}\n");
        assert_eq!(fs::symlink_metadata(moved.join("core")).unwrap().mode() & 0o7777, 0o600);
        assert_eq!(fs::symlink_metadata(moved.join("end.json")).unwrap().mode() & 0o7133, 0);
        assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
        drop(core.draft().unwrap());
        assert_eq!(fs::read_dir(&moved).unwrap().count(), 3);
    }

    #[test]
    fn a_link_of_the_user_s_stays_one() {
        let dir = tempfile::tempdir().unwrap();
        let (target, link) = (dir.path().join("target"), dir.path().join("link"));
        symlink(&target, &link).unwrap();
        for _ in 0..2 {
            OutputFile::new(&link).unwrap().write(b"new").unwrap();
            assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
            assert_eq!(fs::read_to_string(&target).unwrap(), "new");
        }
        live(&link, Begin::Append).unwrap().write_all(b"er").unwrap();
        assert_eq!(fs::read_to_string(&target).unwrap(), "newer");
        live(&link, Begin::Empty).unwrap();
        assert_eq!(fs::read_to_string(&target).unwrap(), "");
        fs::remove_file(&link).unwrap();
        symlink(dir.path().join("no/where"), &link).unwrap();
        assert!(OutputFile::new(&link).is_err() && live(&link, Begin::Empty).is_err(), "it leads nowhere");
    }

    #[test]
    fn what_is_replaced_keeps_its_permissions() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("end.json");
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
        for (before, after) in [(0o600, 0o600), (0o666, 0o666), (0o4750, 0o750), (0o400, 0o400)] {
            fs::write(&path, "before").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(before)).unwrap();
            let report = OutputFile::new(&path).unwrap();
            for _ in 0..2 {
                report.write(b"after").unwrap();
                assert_eq!((fs::read_to_string(&path).unwrap().as_str(), mode(&path)), ("after", after), "{before:o}");
            }
            fs::remove_file(&path).unwrap();
        }
        // What is put there meanwhile says nothing of what the user wants.
        let report = OutputFile::new(&path).unwrap();
        fs::write(&path, "planted").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
        report.write(b"after").unwrap();
        assert_eq!(mode(&path) & 0o133, 0);
        let core = dir.path().join("core");
        fs::write(&core, "before").unwrap();
        fs::set_permissions(&core, fs::Permissions::from_mode(0o644)).unwrap();
        OutputFile::private(&core).unwrap().write(b"core").unwrap();
        assert_eq!(mode(&core), 0o600);
    }

    #[test]
    fn open_files_are_written_to_where_they_stand() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stdout");
        let mut stdout = File::create(&path).unwrap();
        stdout.write_all(b"before\n").unwrap();
        let name = super::super::place::descriptor_path(&stdout);
        OutputFile::new(&name).unwrap().write(b"report\n").unwrap();
        live(&name, Begin::Empty).unwrap().write_all(b"log\n").unwrap();
        stdout.write_all(b"after\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "before\nreport\nlog\nafter\n");
        assert_eq!(own_descriptor("/dev/stdout".as_ref()), Some(1));
        assert_eq!(own_descriptor("/dev/shm/report".as_ref()), None);
        assert!(OutputFile::private("/dev/null".as_ref()).is_err() && OutputFile::new("/dev/null".as_ref()).is_ok());
        assert!(OutputFile::new(dir.path()).is_err() && OutputFile::private(dir.path()).is_err());
    }
}
