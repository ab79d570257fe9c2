//! Output of a matrix's runs. It is read from a pipe, so that a run that floods it costs no more memory than is shown,
//! and written where the user wants it.

use std::fs::File;
use std::io::{self, PipeReader, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{MemfdFlags, Mode, OFlags};
use rustix::io::Errno;

use super::Error;
use crate::backend::held;
use crate::backend::output_file::{OutputFile, mode_of, set_mode};
use crate::backend::place::{Place, descriptor_path, make_directory};
use crate::child;
use crate::cli::Failure;
use crate::cli::report::FileError;

/// Number of bytes of a failed run's output that are shown and given to CI systems.
const SHOWN: usize = 8 << 10;
/// Number of bytes read from a run in one step.
const PIECE: usize = 64 << 10;
/// Largest capacity of a pipe that an unprivileged process created: 1 MiB.
const PIPE_MAX: usize = 1 << 20;

/// Destination of the runs' output and reports: files in the user's folder, or only the end of the output in memory.
pub(super) struct Output {
    /// Descriptor and path of the folder; it is opened before the first guest runs.
    dir: Option<(OwnedFd, PathBuf)>,
}

impl Output {
    pub(super) fn new(wanted: Option<&Path>) -> Result<Self, FileError> {
        // Follows the links that exist now, except those that a guest may have created.
        let open = |path: &Path| Ok((make_directory(path, &held::folders())?, path.to_path_buf()));
        let dir = wanted.map(|path| open(path).map_err(|e| FileError::Write(path.into(), e)));
        Ok(Output { dir: dir.transpose()? })
    }

    /// Returns the user's file with this suffix for a run, in a folder named after its kernel. Links are not followed:
    /// guests of earlier runs may have created them.
    pub(super) fn file(&self, run: &str, suffix: &str) -> Result<Option<Place>, FileError> {
        let Some((dir, path)) = &self.dir else { return Ok(None) };
        let shown = path.join(format!("{run}.{suffix}"));
        let (folder, name) = run.split_once('/').map_or((None, run), |(folder, name)| (Some(folder), name));
        let open = || -> io::Result<OwnedFd> {
            let Some(folder) = folder else { return dir.try_clone() };
            match rustix::fs::mkdirat(dir, folder, Mode::from_bits_retain(0o777)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(e) => return Err(e.into()),
            }
            match rustix::fs::openat(dir, folder, DIRECTORY | OFlags::NOFOLLOW, Mode::empty()) {
                Err(Errno::NOTDIR | Errno::LOOP) => {
                    Err(io::Error::other(format!("'{folder}' is no directory, and no link is followed there")))
                }
                dir => Ok(dir?),
            }
        };
        let dir = open().map_err(|e| FileError::Write(shown.clone(), e))?;
        Ok(Some(Place::within(dir, format!("{name}.{suffix}").into(), shown)))
    }
}

/// Flags of a descriptor that only names a directory.
const DIRECTORY: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// Report of a run. The run writes it to memory that it inherits; then this process writes it to the user's file.
pub(super) struct RunReport {
    memory: File,
    file: Option<OutputFile>,
}

impl RunReport {
    pub(super) fn new(place: Option<Place>) -> Result<Self, Failure> {
        // Removes the report of an earlier matrix, whose mode is kept.
        let file = place.as_ref().map(OutputFile::at);
        place.iter().for_each(|place| _ = place.remove());
        let memory = rustix::fs::memfd_create("vireo-report", MemfdFlags::CLOEXEC).map_err(io::Error::from);
        Ok(RunReport { memory: memory.map_err(Error::Start)?.into(), file })
    }

    /// Makes the program write its report here: passes `--report` and the memory's path.
    pub(super) fn give_to(&self, command: &mut std::process::Command) {
        command.arg("--report").arg(descriptor_path(&self.memory));
        child::inherit(command, self.memory.as_raw_fd());
    }

    /// Returns what the run wrote, and whether it could be written to the user's file if there is one.
    pub(super) fn take(&mut self) -> (Vec<u8>, Result<(), FileError>) {
        let mut text = Vec::new();
        let read = self.memory.seek(SeekFrom::Start(0)).and_then(|_| self.memory.read_to_end(&mut text));
        let Some(file) = self.file.as_ref().filter(|_| !text.is_empty()) else { return (text, Ok(())) };
        let kept = read.and_then(|_| file.write(&text));
        (text, kept.map_err(|e| FileError::Write(file.path().into(), e)))
    }
}

/// Output of a run. It is a pipe, so that a run that floods it costs no more memory than is shown.
pub(super) struct Log {
    /// Read end of the pipe.
    pub(super) from: PipeReader,
    /// File for the complete output.
    file: Option<(Place, File)>,
    /// End of the output.
    tail: Vec<u8>,
    /// Set if the output is longer than the tail.
    cut: bool,
    /// Error that kept output from the file.
    failure: Option<FileError>,
}

impl Log {
    pub(super) fn new(from: PipeReader, file: Option<Place>) -> Result<Self, Failure> {
        rustix::io::ioctl_fionbio(&from, true).map_err(|e| Error::Start(e.into()))?;
        let create = |place: Place| match create(&place) {
            Ok(file) => Ok((place, file)),
            Err(e) => Err(FileError::Write(place.path().into(), e)),
        };
        Ok(Log { from, file: file.map(create).transpose()?, tail: Vec::new(), cut: false, failure: None })
    }

    /// Reads some of the output without waiting. Returns the number of bytes, or `None` at the end of the output. The run
    /// goes on if the file cannot be written; [`Log::take_rest`] has the error.
    pub(super) fn take(&mut self) -> Option<usize> {
        let mut piece = vec![0; PIECE];
        let len = match self.from.read(&mut piece) {
            Ok(0) => return None,
            Ok(len) => len,
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => return Some(0),
            Err(_) => return None,
        };
        piece.truncate(len);
        if let Some((place, file)) = &mut self.file
            && let Err(e) = file.write_all(&piece)
        {
            self.failure = Some(FileError::Write(place.path().into(), e));
            self.file = None;
        }
        self.tail.append(&mut piece);
        let over = self.tail.len().saturating_sub(SHOWN);
        self.cut |= over > 0;
        self.tail.drain(..over);
        Some(len)
    }

    /// Reads what is left in the pipe of a run that has ended. Fails if the file does not have the complete output.
    pub(super) fn take_rest(&mut self) -> Result<(), FileError> {
        let mut taken = 0;
        while taken < PIPE_MAX {
            match self.take() {
                None | Some(0) => break,
                Some(len) => taken += len,
            }
        }
        self.failure.take().map_or(Ok(()), Err)
    }

    /// Returns the end of the output, in whole lines.
    pub(super) fn tail(&self) -> String {
        let begin = memchr::memchr(b'\n', &self.tail).filter(|_| self.cut).map_or(0, |at| at + 1);
        String::from_utf8_lossy(&self.tail[begin..]).into_owned()
    }
}

/// Creates a file in the place of an earlier one, whatever that was. The mode of an earlier file is kept.
fn create(place: &Place) -> io::Result<File> {
    let kept = mode_of(place);
    match place.remove() {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mode = kept.unwrap_or(Mode::from_bits_retain(0o666));
    let file = place.open(OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL, mode)?;
    kept.into_iter().for_each(|mode| set_mode(&file, mode));
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn links_that_guests_made_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (kept, victims) = (dir.path().join("kept"), dir.path().join("victims"));
        fs::create_dir(&victims).unwrap();
        let output = Output::new(Some(&kept)).unwrap();
        symlink(&victims, kept.join("stable")).unwrap();
        assert!(output.file("stable/smp", "log").is_err());
        fs::remove_file(kept.join("stable")).unwrap();
        fs::rename(&kept, dir.path().join("moved")).unwrap();
        symlink(&victims, &kept).unwrap();
        for (name, suffix) in [("stable/smp", "log"), ("run", "json")] {
            let place = output.file(name, suffix).unwrap().unwrap();
            fs::write(victims.join("precious"), "precious").unwrap();
            let made = dir.path().join("moved").join(format!("{name}.{suffix}"));
            symlink(victims.join("precious"), &made).unwrap();
            if suffix == "log" {
                let (reader, mut writer) = io::pipe().unwrap();
                let mut log = Log::new(reader, Some(place)).unwrap();
                writer.write_all(b"text").unwrap();
                log.take_rest().unwrap();
            } else {
                let mut report = RunReport::new(Some(place)).unwrap();
                symlink(victims.join("precious"), &made).unwrap();
                report.memory.write_all(b"text").unwrap();
                let (text, kept) = report.take();
                assert!(text == b"text" && kept.is_ok(), "{kept:?}");
            }
            assert!(!made.is_symlink());
            assert_eq!(fs::read_to_string(made).unwrap(), "text");
        }
        assert_eq!(fs::read_to_string(victims.join("precious")).unwrap(), "precious");
        assert_eq!(fs::read_dir(&victims).unwrap().count(), 1);
    }

    #[test]
    fn a_full_disk_costs_no_more_than_the_files() {
        let (reader, mut writer) = io::pipe().unwrap();
        let place = Place::find(Path::new("/dev/full"), &held::folders()).unwrap();
        let file = File::options().write(true).open("/dev/full").unwrap();
        let file = Some((place.clone(), file));
        let mut log = Log { from: reader, file, tail: Vec::new(), cut: false, failure: None };
        for text in ["one\n", "two\n"] {
            writer.write_all(text.as_bytes()).unwrap();
            assert_eq!(log.take(), Some(4));
        }
        drop(writer);
        let FileError::Write(path, error) = log.take_rest().unwrap_err() else { panic!("another error") };
        assert_eq!((path.as_path(), error.raw_os_error()), (Path::new("/dev/full"), Some(libc::ENOSPC)));
        assert_eq!(log.tail(), "one\ntwo\n");
        let dir = tempfile::tempdir().unwrap();
        let mut report = RunReport::new(Output::new(Some(dir.path())).unwrap().file("a", "json").unwrap()).unwrap();
        report.memory.write_all(b"text").unwrap();
        fs::create_dir(dir.path().join("a.json")).unwrap();
        let (text, kept) = report.take();
        assert!(text == b"text" && matches!(kept, Err(FileError::Write(..))), "{kept:?}");
    }

    #[test]
    fn the_files_of_an_earlier_time_keep_their_permissions() {
        let dir = tempfile::tempdir().unwrap();
        let output = Output::new(Some(dir.path())).unwrap();
        let paths = ["log", "json"].map(|suffix| dir.path().join(format!("a.{suffix}")));
        for path in &paths {
            fs::write(path, "before").unwrap();
            fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
        }
        let _log = Log::new(io::pipe().unwrap().0, output.file("a", "log").unwrap()).unwrap();
        let mut report = RunReport::new(output.file("a", "json").unwrap()).unwrap();
        report.memory.write_all(b"text").unwrap();
        report.take().1.unwrap();
        for (path, text) in paths.iter().zip(["", "text"]) {
            assert_eq!(fs::read_to_string(path).unwrap(), text);
            assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o7777, 0o600);
        }
    }

    /// However much a run prints, its last lines are kept; all of it is kept only if wanted.
    #[test]
    fn a_flood_of_output() {
        let dir = vmm_sys_util::tempdir::TempDir::new().unwrap();
        let path = dir.as_path().join("log.txt");
        for file in [false, true] {
            let (reader, mut writer) = io::pipe().unwrap();
            let file = file.then(|| Output::new(Some(dir.as_path())).unwrap().file("log", "txt").unwrap().unwrap());
            let mut log = Log::new(reader, file).unwrap();
            assert_eq!(log.take(), Some(0), "nothing yet");
            let lines: Vec<String> = (1000..9000).map(|n| format!("line {n}\n")).collect();
            for piece in lines.chunks(1000) {
                writer.write_all(piece.concat().as_bytes()).unwrap();
                assert_ne!(log.take(), Some(0));
            }
            writer.write_all(b"the end").unwrap();
            log.take_rest().unwrap();
            let tail = log.tail();
            assert!(tail.starts_with("line ") && tail.ends_with("line 8999\nthe end") && tail.len() <= SHOWN, "{tail}");
            drop(writer);
            assert_eq!(log.take(), None);
            if path.exists() {
                assert_eq!(fs::read_to_string(&path).unwrap(), lines.concat() + "the end");
            }
        }
    }
}
