//! What the runs of a matrix print: read from a pipe, so that one which floods it costs no more than what is shown, and
//! written where the user wants it.

use std::fs::{self, File};
use std::io::{self, PipeReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::MemfdFlags;

use super::Error;
use crate::cli::Failure;
use crate::cli::report::FileError;

/// How many bytes of a failed run's output are shown, and given to CI systems.
const SHOWN: usize = 8 << 10;
/// Read from a run at once.
const PIECE: usize = 64 << 10;
/// More than this, 1 MiB, no pipe holds that an unprivileged process made.
const PIPE_MAX: usize = 1 << 20;

/// Where what the runs print, and their reports, are kept: in files that the user wants; or only the end of it, in memory.
pub(super) struct Output {
    dir: Option<PathBuf>,
}

impl Output {
    pub(super) fn new(wanted: Option<&Path>) -> Result<Self, FileError> {
        wanted.map_or(Ok(()), |dir| fs::create_dir_all(dir).map_err(|e| FileError::Write(dir.into(), e)))?;
        Ok(Output { dir: wanted.map(Path::to_path_buf) })
    }

    /// The user's file for this of the run, in a folder of its kernel's.
    pub(super) fn file(&self, run: &str, suffix: &str) -> Result<Option<PathBuf>, FileError> {
        let Some(dir) = &self.dir else { return Ok(None) };
        let path = dir.join(format!("{run}.{suffix}"));
        let parent = path.parent().unwrap_or(dir);
        fs::create_dir_all(parent).map_err(|e| FileError::Write(parent.into(), e))?;
        Ok(Some(path))
    }
}

/// Where a run's report goes.
pub(super) struct Place {
    /// Its name.
    pub(super) path: PathBuf,
    /// Keeps it, if it is nowhere else: it goes when we do, however that is.
    _memory: Option<OwnedFd>,
}

impl Place {
    pub(super) fn new(file: Option<PathBuf>) -> Result<Self, Failure> {
        if let Some(path) = file {
            // Of an earlier time.
            let _ = fs::remove_file(&path);
            return Ok(Place { path, _memory: None });
        }
        let memory = rustix::fs::memfd_create("vireo-report", MemfdFlags::CLOEXEC).map_err(io::Error::from);
        let memory = memory.map_err(Error::Start)?;
        // Under this path the run finds it.
        let path = format!("/proc/{}/fd/{}", std::process::id(), memory.as_raw_fd()).into();
        Ok(Place { path, _memory: Some(memory) })
    }
}

/// What a run prints. A pipe, so that one which floods it costs no more than what is shown.
pub(super) struct Log {
    /// What it is read from.
    pub(super) from: PipeReader,
    /// Where all of it goes.
    file: Option<(PathBuf, File)>,
    /// Its end.
    tail: Vec<u8>,
    /// More came than the tail has.
    cut: bool,
}

impl Log {
    pub(super) fn new(from: PipeReader, file: Option<PathBuf>) -> Result<Self, Failure> {
        rustix::io::ioctl_fionbio(&from, true).map_err(|e| Error::Start(e.into()))?;
        let create = |path: PathBuf| match File::create(&path) {
            Ok(file) => Ok((path, file)),
            Err(e) => Err(FileError::Write(path, e)),
        };
        Ok(Log { from, file: file.map(create).transpose()?, tail: Vec::new(), cut: false })
    }

    /// Takes some of what is there; how much that was, and nothing if there will be no more. Waits for nothing.
    pub(super) fn take(&mut self) -> Result<Option<usize>, Failure> {
        let mut piece = vec![0; PIECE];
        let len = match self.from.read(&mut piece) {
            Ok(0) => return Ok(None),
            Ok(len) => len,
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => return Ok(Some(0)),
            Err(_) => return Ok(None),
        };
        piece.truncate(len);
        if let Some((path, file)) = &mut self.file {
            file.write_all(&piece).map_err(|e| FileError::Write(path.clone(), e))?;
        }
        self.tail.append(&mut piece);
        let over = self.tail.len().saturating_sub(SHOWN);
        self.cut |= over > 0;
        self.tail.drain(..over);
        Ok(Some(len))
    }

    /// What is left in the pipe of a run that has ended.
    pub(super) fn take_rest(&mut self) -> Result<(), Failure> {
        let mut taken = 0;
        while taken < PIPE_MAX {
            match self.take()? {
                None | Some(0) => break,
                Some(len) => taken += len,
            }
        }
        Ok(())
    }

    /// The end of what the run printed, in whole lines.
    pub(super) fn tail(&self) -> String {
        let begin = memchr::memchr(b'\n', &self.tail).filter(|_| self.cut).map_or(0, |at| at + 1);
        String::from_utf8_lossy(&self.tail[begin..]).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// However much a run prints, its last lines are kept, and all of it only where that is wanted.
    #[test]
    fn a_flood_of_output() {
        let dir = vmm_sys_util::tempdir::TempDir::new().unwrap();
        let path = dir.as_path().join("log");
        for file in [None, Some(path.clone())] {
            let (reader, mut writer) = io::pipe().unwrap();
            let mut log = Log::new(reader, file).unwrap();
            assert_eq!(log.take().unwrap(), Some(0), "nothing yet");
            let lines: Vec<String> = (1000..9000).map(|n| format!("line {n}\n")).collect();
            for piece in lines.chunks(1000) {
                writer.write_all(piece.concat().as_bytes()).unwrap();
                assert_ne!(log.take().unwrap(), Some(0));
            }
            writer.write_all(b"the end").unwrap();
            log.take_rest().unwrap();
            let tail = log.tail();
            assert!(tail.starts_with("line ") && tail.ends_with("line 8999\nthe end") && tail.len() <= SHOWN, "{tail}");
            drop(writer);
            assert_eq!(log.take().unwrap(), None);
            if path.exists() {
                assert_eq!(fs::read_to_string(&path).unwrap(), lines.concat() + "the end");
            }
        }
    }
}
