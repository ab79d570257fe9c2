//! A console on a pair of FIFOs: `PATH.in` leads to the guest and `PATH.out` from it. Missing FIFOs are created, and
//! those that were created are removed when the VM ends.
//!
//! vireo does not wait for the other ends: a reader that opens `PATH.out` gets the output from then on, and output that
//! arrives while no reader has it open is discarded.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags};

use super::console::{Console, Error, Got, Input};
use super::held;
use super::output::Destination;
use super::place::{FileId, Place};

/// A FIFO's file; dropping this removes the file if this created it and it is still there.
#[derive(Debug)]
struct FifoFile {
    place: Place,
    /// The file, if it was created here. It is held open, or else another file could get its inode number after
    /// removal.
    made: Option<OwnedFd>,
}

impl FifoFile {
    fn new(path: &Path) -> Result<Self, Error> {
        let failed = |e| Error::Open(path.into(), e);
        let place = Place::find(path, &held::folders()).map_err(failed)?;
        let (dir, name) = place.parts();
        let made = match rustix::fs::mknodat(dir, name, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0) {
            Ok(()) => {
                let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                Some(rustix::fs::openat(dir, name, flags, Mode::empty()).map_err(|e| failed(e.into()))?)
            }
            Err(rustix::io::Errno::EXIST) => None,
            Err(e) => return Err(failed(e.into())),
        };
        match place.stat().map_err(failed)? {
            Some(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Fifo => Ok(FifoFile { place, made }),
            _ => Err(failed(io::Error::other("the path exists and is not a FIFO"))),
        }
    }
}

/// Opens the FIFO that is at `place` now, without waiting for its other end. Any other kind of file is refused, as
/// opening it might block or change it.
fn open(place: &Place, flags: OFlags) -> io::Result<File> {
    place.open_kind(FileType::Fifo, flags | OFlags::NONBLOCK)
}

impl Drop for FifoFile {
    fn drop(&mut self) {
        if let Some(stat) = self.made.as_ref().and_then(|made| rustix::fs::fstat(made).ok()) {
            let _ = self.place.remove_if(FileId::of(&stat));
        }
    }
}

/// FIFO that input comes from.
pub struct FifoInput {
    /// The FIFO, non-blocking.
    pub(super) file: File,
    /// Files of both directions. They are here because input ends in order, while the output thread is not waited for.
    _files: [FifoFile; 2],
}

impl FifoInput {
    /// Interprets the result of a read. Without a writer the FIFO reads as ended, but another writer may come.
    pub(super) fn got(result: io::Result<usize>) -> Got {
        match result {
            Ok(n) if n > 0 => Got::Bytes(n),
            Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => Got::Nothing,
            _ => Got::Absent,
        }
    }
}

/// FIFO that output goes to, open while it has a reader.
struct FifoWriter {
    place: Place,
    file: Option<File>,
}

impl Write for FifoWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.file.is_none() {
            self.file = open(&self.place, OFlags::WRONLY).ok();
            // Only the opening must not block: output has its own thread, which may.
            let waits = self.file.as_ref().is_none_or(|file| rustix::fs::fcntl_setfl(file, OFlags::empty()).is_ok());
            self.file.take_if(|_| !waits);
        }
        let Some(file) = &mut self.file else { return Ok(bytes.len()) };
        match file.write(bytes) {
            // The reader has closed the FIFO.
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {
                self.file = None;
                Ok(bytes.len())
            }
            result => result,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Creates a console on the pair of FIFOs at `path`.
pub fn pair(path: &Path) -> Result<Console, Error> {
    let beside = |end: &str| {
        let mut name = path.as_os_str().to_os_string();
        name.push(end);
        FifoFile::new(name.as_ref())
    };
    let (from, to) = (beside(".in")?, beside(".out")?);
    let file = open(&from.place, OFlags::RDONLY).map_err(|e| Error::Open(from.place.path().into(), e))?;
    let name = to.place.path().display().to_string();
    let writer = Box::new(FifoWriter { place: to.place.clone(), file: None });
    let output = Destination { name, writer, eager: true, told: false };
    Ok(Console { output: Some(output), input: Input::Fifo(FifoInput { file, _files: [from, to] }) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;
    use std::io::Read;
    use std::os::unix::fs::{OpenOptionsExt, symlink};

    #[test]
    fn both_ways_and_one_after_another() {
        let dir = tempfile::tempdir().unwrap();
        let [path, into, out] = ["c", "c.in", "c.out"].map(|name| dir.path().join(name));
        let mut console = pair(&path).unwrap();
        let writer = &mut console.output.as_mut().unwrap().writer;
        for _ in 0..2 {
            // More than a pipe holds.
            assert_eq!(writer.write(&vec![0; 1 << 20]).unwrap(), 1 << 20, "while nobody reads");
            assert_eq!(console.input.read(&mut [0; 8]), Got::Absent);
            let mut reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&out).unwrap();
            writer.write_all(b"hello").unwrap();
            let mut got = [0; 8];
            assert_eq!(reader.read(&mut got).unwrap(), 5);
            assert_eq!(&got[..5], b"hello");
            let mut user = OpenOptions::new().write(true).open(&into).unwrap();
            assert_eq!(console.input.read(&mut got), Got::Nothing);
            user.write_all(b"ls").unwrap();
            assert_eq!(console.input.read(&mut got), Got::Bytes(2));
        }
        drop(console);
        assert!(!into.exists() && !out.exists(), "what was made is removed");
    }

    #[test]
    fn what_is_there_is_taken_and_left() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c");
        let made = FifoFile::new(&dir.path().join("c.out")).unwrap();
        drop(pair(&path).unwrap());
        assert!(made.place.path().exists());
        std::fs::write(dir.path().join("c.in"), "precious").unwrap();
        let error = pair(&path).err().unwrap();
        assert!(std::error::Error::source(&error).unwrap().to_string().contains("not a FIFO"), "{error}");
        assert_eq!(std::fs::read(dir.path().join("c.in")).unwrap(), b"precious");
        assert!(pair(Path::new("/nonexistent/c")).is_err());
    }

    #[test]
    fn a_link_that_is_put_in_the_place_of_the_output_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let [path, out, victim] = ["c", "c.out", "victim"].map(|name| dir.path().join(name));
        let mut console = pair(&path).unwrap();
        let writer = &mut console.output.as_mut().unwrap().writer;
        for precious in [true, false] {
            std::fs::remove_file(&out).unwrap();
            if precious {
                std::fs::write(&victim, "precious").unwrap();
            } else {
                std::fs::remove_file(&victim).unwrap();
                std::mem::forget(FifoFile::new(&victim).unwrap());
            }
            symlink(&victim, &out).unwrap();
            let mut reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&victim).unwrap();
            writer.write_all(b"guest").unwrap();
            let mut got = [0; 16];
            let len = reader.read(&mut got).unwrap();
            assert_eq!(&got[..len], if precious { &b"precious"[..] } else { b"" });
        }
        drop(console);
        assert!(out.is_symlink(), "it was not made here");
    }
}
