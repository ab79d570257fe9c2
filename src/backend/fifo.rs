//! A console on a pair of FIFOs: `PATH.in` leads to the guest and `PATH.out` from it. Both are made if they are not there,
//! and those that were made are removed when the VM ends.
//!
//! Nobody is waited for: who opens `PATH.out` gets what comes from then on, and what comes while nobody has it open is
//! thrown away.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags};

use super::console::{Console, Error, Got, Input};
use super::output::Destination;

/// A FIFO's file that is removed with this, if it was made by it.
#[derive(Debug)]
struct Place {
    path: PathBuf,
    made: bool,
}

impl Place {
    fn new(path: PathBuf) -> Result<Self, Error> {
        let made = match rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0) {
            Ok(()) => true,
            Err(rustix::io::Errno::EXIST) => false,
            Err(e) => return Err(Error::Open(path, e.into())),
        };
        // Opening something else might wait, or change it.
        match path.metadata() {
            Ok(m) if m.file_type().is_fifo() => Ok(Place { path, made }),
            Ok(_) => Err(Error::Open(path, io::Error::other("it is there and is no FIFO"))),
            Err(e) => Err(Error::Open(path, e)),
        }
    }
}

/// Opens one without waiting for its other end.
fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    options.custom_flags((OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32).open(path)
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.made {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// The FIFO that input comes from.
pub struct FifoInput {
    /// Not blocking.
    pub(super) file: File,
    /// Both, here because input ends in order; output has a thread of its own, which nobody waits for.
    _places: [Place; 2],
}

impl FifoInput {
    /// Without a writer it reads as ended, but the next one may come.
    pub(super) fn got(result: io::Result<usize>) -> Got {
        match result {
            Ok(n) if n > 0 => Got::Bytes(n),
            Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => Got::Nothing,
            _ => Got::Absent,
        }
    }
}

/// The FIFO that output goes to, open while somebody reads it.
struct FifoWriter {
    path: PathBuf,
    file: Option<File>,
}

impl Write for FifoWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.file.is_none() {
            self.file = open(&self.path, OpenOptions::new().write(true)).ok();
            // Only the opening must not wait: output has a thread of its own.
            let waits = self.file.as_ref().is_none_or(|file| rustix::fs::fcntl_setfl(file, OFlags::empty()).is_ok());
            self.file.take_if(|_| !waits);
        }
        let Some(file) = &mut self.file else { return Ok(bytes.len()) };
        match file.write(bytes) {
            // The reader is gone.
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

/// The pair at `path`.
pub fn pair(path: &Path) -> Result<Console, Error> {
    let beside = |end: &str| {
        let mut name = path.as_os_str().to_os_string();
        name.push(end);
        Place::new(name.into())
    };
    let (from, to) = (beside(".in")?, beside(".out")?);
    let file = open(&from.path, OpenOptions::new().read(true)).map_err(|e| Error::Open(from.path.clone(), e))?;
    let writer = FifoWriter { path: to.path.clone(), file: None };
    let output =
        Destination { name: to.path.display().to_string(), writer: Box::new(writer), eager: true, told: false };
    Ok(Console { output: Some(output), input: Input::Fifo(FifoInput { file, _places: [from, to] }) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

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
        let made = Place::new(dir.path().join("c.out")).unwrap();
        drop(pair(&path).unwrap());
        assert!(made.path.exists());
        std::fs::write(dir.path().join("c.in"), "precious").unwrap();
        let error = pair(&path).err().unwrap();
        assert!(std::error::Error::source(&error).unwrap().to_string().contains("no FIFO"), "{error}");
        assert_eq!(std::fs::read(dir.path().join("c.in")).unwrap(), b"precious");
        assert!(pair(Path::new("/nonexistent/c")).is_err());
    }
}
