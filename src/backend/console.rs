//! Host ends of a console: standard streams, a file, a pair of FIFOs, a pseudo-terminal, a socket or a descriptor.

#![allow(unsafe_code)]

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::fifo::FifoInput;
use super::held;
use super::output::Destination;
use super::output_file::{Begin, live};
use super::unix::{self, Listener};
use crate::terminal;

/// Failures to open a console.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or descriptor could not be opened.
    #[error("cannot open {0} for the console")]
    Open(PathBuf, #[source] io::Error),
    /// A listening socket could not be created.
    #[error(transparent)]
    Socket(#[from] unix::Error),
    /// A pseudo-terminal could not be created.
    #[error("cannot create a pseudo-terminal for the console")]
    Pty(#[source] io::Error),
}

/// Host end of a console or a port, given as `stdio`, `stdin`, `stdout`, `stderr`, `null`, `pty`, `file:PATH`,
/// `pipe:PATH`, `socket:PATH` or `fd:N`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ConsoleEnd {
    /// Standard input and output.
    #[default]
    Stdio,
    /// Standard input alone; the guest sees its end. Output is discarded.
    Stdin,
    /// Standard output alone.
    Stdout,
    /// Standard error.
    Stderr,
    /// Output is discarded, and there is no input.
    Null,
    /// A new pseudo-terminal, whose name is printed on stderr.
    Pty,
    /// Output goes to a file, which is created or truncated; there is no input.
    File(PathBuf),
    /// The FIFOs `PATH.in`, to the guest, and `PATH.out`, from it; output is discarded while it has no reader.
    Pipe(PathBuf),
    /// A listening unix socket with one client at a time; output without a client is discarded.
    Socket(PathBuf),
    /// An inherited descriptor, such as a connected socket. The guest sees the end of its input.
    Fd(RawFd),
}

/// The valid forms of a [`ConsoleEnd`], for the error about an invalid one.
pub const ENDS: &str = "stdio, stdin, stdout, stderr, null, pty, file:PATH, pipe:PATH, socket:PATH and fd:NUMBER";

impl FromStr for ConsoleEnd {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, path) = text.split_once(':').map_or((text, None), |(kind, path)| (kind, Some(path)));
        match (kind, path) {
            ("stdio", None) => Ok(ConsoleEnd::Stdio),
            ("stdin", None) => Ok(ConsoleEnd::Stdin),
            ("stdout", None) => Ok(ConsoleEnd::Stdout),
            ("stderr", None) => Ok(ConsoleEnd::Stderr),
            ("fd", Some(number)) if number.parse().is_ok_and(|fd: RawFd| fd >= 0) => {
                Ok(ConsoleEnd::Fd(number.parse().unwrap_or(-1)))
            }
            ("null", None) => Ok(ConsoleEnd::Null),
            ("pty", None) => Ok(ConsoleEnd::Pty),
            ("file", Some(path)) if !path.is_empty() => Ok(ConsoleEnd::File(path.into())),
            ("pipe", Some(path)) if !path.is_empty() => Ok(ConsoleEnd::Pipe(path.into())),
            ("socket", Some(path)) if !path.is_empty() => Ok(ConsoleEnd::Socket(path.into())),
            _ => Err(format!("'{text}' is none of {ENDS}")),
        }
    }
}

impl TryFrom<String> for ConsoleEnd {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<ConsoleEnd> for String {
    fn from(config: ConsoleEnd) -> String {
        config.to_string()
    }
}

impl fmt::Display for ConsoleEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ConsoleEnd::Stdio => f.write_str("stdio"),
            ConsoleEnd::Stdin => f.write_str("stdin"),
            ConsoleEnd::Stdout => f.write_str("stdout"),
            ConsoleEnd::Stderr => f.write_str("stderr"),
            ConsoleEnd::Fd(fd) => write!(f, "fd:{fd}"),
            ConsoleEnd::Null => f.write_str("null"),
            ConsoleEnd::Pty => f.write_str("pty"),
            ConsoleEnd::File(path) => write!(f, "file:{}", path.display()),
            ConsoleEnd::Pipe(path) => write!(f, "pipe:{}", path.display()),
            ConsoleEnd::Socket(path) => write!(f, "socket:{}", path.display()),
        }
    }
}

impl ConsoleEnd {
    /// Standard streams in use: input, output, error.
    pub fn streams(&self) -> [bool; 3] {
        match self {
            ConsoleEnd::Stdio => [true, true, false],
            ConsoleEnd::Stdin => [true, false, false],
            ConsoleEnd::Stdout => [false, true, false],
            ConsoleEnd::Stderr => [false, false, true],
            _ => [false; 3],
        }
    }
}

/// Receiver of a console's input: a serial port or a port of a virtio console.
pub trait Receiver: Send + Sync {
    /// Gives input to the guest and returns how many bytes it had room for. If it was not all,
    /// [`crate::guest_event::GuestEvent::ConsoleInputRoom`] reports when to try again.
    fn receive(&self, bytes: &[u8]) -> usize;

    /// Reports whether someone is at the host's end now.
    fn connected(&self, _connected: bool) {}

    /// Reports the size of the window that shows the console.
    fn resize(&self, _columns: u16, _rows: u16) {}
}

/// Opens a file to read input from. It may be a FIFO or a device, so opening and reading must not block.
pub fn input_file(path: &Path) -> Result<Input, Error> {
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(held::path(path));
    let file = file.map_err(|e| Error::Open(path.into(), e))?;
    match file.metadata() {
        Ok(m) if m.is_dir() => Err(Error::Open(path.into(), io::ErrorKind::IsADirectory.into())),
        _ => Ok(Input::Stdin(file)),
    }
}

/// The two directions of a console.
pub struct Console {
    /// Destination of the guest's output; `None` discards it.
    pub output: Option<Destination>,
    /// Source of the guest's input.
    pub input: Input,
}

/// The input side of a console.
pub enum Input {
    /// No input.
    None,
    /// Standard input, whether a terminal or not; or a file.
    Stdin(File),
    /// Standard input, a file or a descriptor whose end the guest sees.
    Stream(File),
    /// The master of a pseudo-terminal.
    Pty(File),
    /// A FIFO.
    Fifo(FifoInput),
    /// A listening socket and its client, if there is one.
    Socket(SocketInput),
}

/// Result of [`Input::read`].
#[derive(Debug, PartialEq, Eq)]
pub enum Got {
    /// This many bytes; at least one.
    Bytes(usize),
    /// No bytes now; wait for readiness.
    Nothing,
    /// No one is at the other end now. Someone may come later, but readiness will not show it: try again after a while.
    Absent,
    /// The input has ended.
    End,
}

/// Creates a console on standard input and output.
pub fn stdio() -> Console {
    let input = duplicate(libc::STDIN_FILENO).map_or(Input::None, Input::Stdin);
    Console { output: Some(stream("stdout", libc::STDOUT_FILENO, false)), input }
}

/// Creates a console on standard input alone.
pub fn stdin() -> Console {
    // A closed standard input reads as one that has ended.
    let input = duplicate(libc::STDIN_FILENO).or_else(|_| File::open("/dev/null"));
    Console { output: None, input: input.map_or(Input::None, Input::Stream) }
}

/// Creates a console on standard output or standard error alone.
pub fn output_stream(name: &str, fd: RawFd) -> Console {
    Console { output: Some(stream(name, fd, true)), input: Input::None }
}

/// Creates a console on a descriptor, which serves both directions.
pub fn descriptor(fd: RawFd) -> Result<Console, Error> {
    let name = PathBuf::from(format!("/proc/self/fd/{fd}"));
    let open = || duplicate(fd).map_err(|e| Error::Open(name.clone(), e));
    let output = Destination { name: format!("fd:{fd}"), writer: Box::new(open()?), eager: true, told: false };
    Ok(Console { output: Some(output), input: Input::Stream(open()?) })
}

fn stream(name: &str, fd: RawFd, told: bool) -> Destination {
    Destination { name: name.into(), writer: Box::new(Unbuffered(fd)), eager: terminal::is_terminal(fd), told }
}

/// Duplicates a descriptor for reading: the standard library's handle has a buffer that would hide input from epoll.
pub fn duplicate(fd: RawFd) -> io::Result<File> {
    // SAFETY: fcntl returns a new descriptor, which is checked and then owned by the File alone.
    match unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: see above.
        fd => Ok(unsafe { File::from_raw_fd(fd) }),
    }
}

/// A standard stream without the standard library's line buffer.
struct Unbuffered(RawFd);

impl Write for Unbuffered {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // SAFETY: the pointer and length are those of a slice.
        let n = unsafe { libc::write(self.0, bytes.as_ptr().cast(), bytes.len()) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Creates a console that writes to a file, which is created or truncated. A FIFO must have its reader already: waiting
/// for one could not be interrupted.
pub fn file(path: &Path) -> Result<Console, Error> {
    let file = live(path, Begin::Empty).map_err(|e| Error::Open(path.into(), e))?;
    let output = Destination { name: path.display().to_string(), writer: Box::new(file), eager: false, told: false };
    Ok(Console { output: Some(output), input: Input::None })
}

/// Creates a console on a new pseudo-terminal in raw mode. Also returns the path of its terminal side.
pub fn pty() -> Result<(Console, PathBuf), Error> {
    let (master, path) = open_pty().map_err(Error::Pty)?;
    let writer = PtyWriter(master.try_clone().map_err(Error::Pty)?);
    let output = Destination { name: path.display().to_string(), writer: Box::new(writer), eager: true, told: false };
    Ok((Console { output: Some(output), input: Input::Pty(master) }, path))
}

fn open_pty() -> io::Result<(File, PathBuf)> {
    let (mut master, mut slave) = (-1, -1);
    let mut name = [0u8; 128];
    // SAFETY: the buffer is larger than any name under /dev/pts; null asks for default settings and size.
    unsafe {
        if libc::openpty(&mut master, &mut slave, name.as_mut_ptr().cast(), std::ptr::null(), std::ptr::null()) != 0 {
            return Err(io::Error::last_os_error());
        }
        // Close the terminal side: from then on the master reads as hung up while no one has the terminal open.
        let slave = OwnedFd::from_raw_fd(slave);
        let master = File::from_raw_fd(master);
        let mut settings = std::mem::zeroed();
        libc::tcgetattr(slave.as_raw_fd(), &mut settings);
        libc::cfmakeraw(&mut settings);
        libc::tcsetattr(slave.as_raw_fd(), libc::TCSANOW, &settings);
        libc::fcntl(master.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC);
        let name = std::ffi::CStr::from_bytes_until_nul(&name).map_err(io::Error::other)?;
        Ok((master, PathBuf::from(name.to_string_lossy().into_owned())))
    }
}

/// Returns true if no one has the other side of `master` open.
fn hung_up(master: RawFd) -> bool {
    poll_now(master, 0) & libc::POLLHUP != 0
}

/// Returns which of `events`, and of hang-up and error, are pending now.
fn poll_now(fd: RawFd, events: i16) -> i16 {
    let mut poll = libc::pollfd { fd, events, revents: 0 };
    // SAFETY: one valid pollfd.
    if unsafe { libc::poll(&mut poll, 1, 0) } > 0 { poll.revents } else { 0 }
}

struct PtyWriter(File);

impl Write for PtyWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if hung_up(self.0.as_raw_fd()) { Ok(bytes.len()) } else { self.0.write(bytes) }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

type Client = Arc<Mutex<Option<UnixStream>>>;

/// Listening socket of a console, and its client.
pub struct SocketInput {
    listener: Listener,
    client: Client,
    /// True if the client has closed its sending side. It may still read, until it disconnects or another one comes.
    silent: bool,
}

struct SocketWriter(Client);

impl Write for SocketWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let client = self.0.lock().unwrap_or_else(PoisonError::into_inner).as_ref().and_then(|c| c.try_clone().ok());
        let Some(mut client) = client else { return Ok(bytes.len()) };
        match client.write(bytes) {
            // A client that disconnects is not a failure of the console: the next client gets the output from then on.
            Err(e) if !matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => Ok(bytes.len()),
            result => result,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Creates a console on a unix socket that listens at `path`. A socket left there by a dead process is replaced.
pub fn socket(path: &Path) -> Result<Console, Error> {
    let listener = Listener::bind(path)?;
    let client = Client::default();
    let output = Destination {
        name: path.display().to_string(),
        writer: Box::new(SocketWriter(client.clone())),
        eager: true,
        told: false,
    };
    let input = Input::Socket(SocketInput { listener, client, silent: false });
    Ok(Console { output: Some(output), input })
}

impl Input {
    /// Descriptor to wait on now. It changes after [`Got::End`] or with a new client.
    pub fn fd(&self) -> Option<RawFd> {
        match self {
            Input::None => None,
            Input::Stdin(file) | Input::Stream(file) | Input::Pty(file) => Some(file.as_raw_fd()),
            Input::Fifo(fifo) => Some(fifo.file.as_raw_fd()),
            Input::Socket(socket) => {
                let client = socket.client.lock().unwrap_or_else(PoisonError::into_inner);
                let speaks = client.as_ref().filter(|_| !socket.silent);
                Some(speaks.map_or(socket.listener.as_raw_fd(), AsRawFd::as_raw_fd))
            }
        }
    }

    /// Returns true if the input is a terminal, so that somebody may type.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Input::Stdin(file) | Input::Stream(file) if terminal::is_terminal(file.as_raw_fd()))
    }

    /// Returns true if someone is at the other end, as far as that can be known: a file or a standard stream always
    /// counts.
    pub fn connected(&self) -> bool {
        match self {
            Input::None | Input::Stdin(_) | Input::Stream(_) | Input::Fifo(_) => true,
            Input::Pty(master) => !hung_up(master.as_raw_fd()),
            Input::Socket(socket) => {
                let client = socket.client.lock().unwrap_or_else(PoisonError::into_inner);
                client.as_ref().is_some_and(|client| !socket.silent || !hung_up(client.as_raw_fd()))
            }
        }
    }

    /// Returns true if the other end counts as disconnected after [`Got::End`].
    pub fn ends(&self) -> bool {
        matches!(self, Input::Stream(_))
    }

    /// Reads the available input, without waiting for more.
    pub fn read(&mut self, buffer: &mut [u8]) -> Got {
        let result = match self {
            Input::None => return Got::End,
            // This input is typed for another job; reading it would stop this one.
            Input::Stdin(file) | Input::Stream(file) if terminal::in_background(file.as_raw_fd()) => {
                return Got::Absent;
            }
            Input::Pty(file) if hung_up(file.as_raw_fd()) => return Got::Absent,
            // Standard input is shared, so it stays blocking, and another process may read the bytes that woke us. A
            // pseudo-terminal that was opened again may have no input yet.
            Input::Stdin(file) | Input::Stream(file) | Input::Pty(file)
                if poll_now(file.as_raw_fd(), libc::POLLIN) == 0 =>
            {
                return Got::Nothing;
            }
            Input::Stdin(file) | Input::Stream(file) | Input::Pty(file) => file.read(buffer),
            Input::Fifo(fifo) => return FifoInput::got(fifo.file.read(buffer)),
            Input::Socket(socket) => return socket.read(buffer),
        };
        match result {
            Ok(0) => Got::End,
            Ok(n) => Got::Bytes(n),
            Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => Got::Nothing,
            Err(_) if matches!(self, Input::Pty(_)) => Got::Absent,
            // EIO: the other side of the terminal is gone.
            Err(_) => Got::End,
        }
    }
}

impl SocketInput {
    fn read(&mut self, buffer: &mut [u8]) -> Got {
        let mut client = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(current) = client.as_mut().filter(|_| !self.silent) else {
            // Writing to the client may block: output has its own thread.
            if let Ok(Some(new)) = self.listener.accept()
                && new.set_nonblocking(false).is_ok()
            {
                *client = Some(new);
                self.silent = false;
            }
            return Got::Nothing;
        };
        match current.read(buffer) {
            Ok(n) if n > 0 => Got::Bytes(n),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Got::Nothing,
            Ok(_) if !hung_up(current.as_raw_fd()) => {
                self.silent = true;
                Got::Nothing
            }
            _ => {
                *client = None;
                Got::Nothing
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_serves_one_client_after_another_and_cleans_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        let mut console = socket(&path).unwrap();
        let writer = &mut console.output.as_mut().unwrap().writer;
        assert_eq!(writer.write(b"nobody").unwrap(), 6);
        for _ in 0..2 {
            let mut client = UnixStream::connect(&path).unwrap();
            assert_eq!(console.input.read(&mut [0; 8]), Got::Nothing);
            writer.write_all(b"hello").unwrap();
            let mut got = [0; 5];
            client.read_exact(&mut got).unwrap();
            assert_eq!(&got, b"hello");
            client.write_all(b"ls").unwrap();
            assert_eq!(console.input.read(&mut [0; 8]), Got::Bytes(2));
            drop(client);
            assert_eq!(writer.write(b"gone").unwrap(), 4);
            assert_eq!(console.input.read(&mut [0; 8]), Got::Nothing);
        }
        // A client that only reads from now on, until another one comes.
        let mut listener = UnixStream::connect(&path).unwrap();
        assert_eq!(console.input.read(&mut [0; 8]), Got::Nothing);
        listener.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(console.input.read(&mut [0; 8]), Got::Nothing);
        let writer = &mut console.output.as_mut().unwrap().writer;
        writer.write_all(b"still").unwrap();
        let mut got = [0; 5];
        listener.read_exact(&mut got).unwrap();
        assert_eq!((&got, console.input.connected()), (b"still", true));
        let mut next = UnixStream::connect(&path).unwrap();
        assert_eq!(console.input.read(&mut [0; 8]), Got::Nothing);
        next.write_all(b"ls").unwrap();
        assert_eq!(console.input.read(&mut [0; 8]), Got::Bytes(2));
        assert_eq!(listener.read(&mut got).unwrap(), 0, "it has gone");
        next.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(console.input.read(&mut [0; 8]), Got::Nothing);
        drop(next);
        assert!(!console.input.connected());

        assert!(socket(&path).err().unwrap().to_string().ends_with("another process listens there"));
        drop(console);
        assert!(!path.exists());
        std::fs::write(&path, "precious").unwrap();
        assert!(socket(&path).err().unwrap().to_string().contains("not a socket"));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_silent_standard_input_holds_nobody_up() {
        let (reader, mut writer) = io::pipe().unwrap();
        let mut input = Input::Stdin(File::from(OwnedFd::from(reader)));
        assert_eq!(input.read(&mut [0; 8]), Got::Nothing);
        writer.write_all(b"ls").unwrap();
        assert_eq!(input.read(&mut [0; 8]), Got::Bytes(2));
        drop(writer);
        assert_eq!(input.read(&mut [0; 8]), Got::End);
    }

    #[test]
    fn pty_throws_output_away_until_somebody_opens_it() {
        let (mut console, path) = pty().unwrap();
        let writer = &mut console.output.as_mut().unwrap().writer;
        for _ in 0..1000 {
            assert_eq!(writer.write(&[b'x'; 1024]).unwrap(), 1024);
        }
        assert_eq!(console.input.read(&mut [0; 8]), Got::Absent);
        let mut user = OpenOptions::new().read(true).write(true).open(path).unwrap();
        assert_eq!(console.input.read(&mut [0; 8]), Got::Nothing, "without waiting for somebody to type");
        writer.write_all(b"hi\n").unwrap();
        let mut got = [0; 3];
        user.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"hi\n");
        user.write_all(b"a").unwrap();
        assert_eq!(console.input.read(&mut [0; 8]), Got::Bytes(1));
    }

    #[test]
    fn destinations() {
        for text in ["stdio", "stdin", "stdout", "stderr", "fd:3", "null", "pty", "file:/tmp/a:b", "pipe:y", "socket:x"]
        {
            assert_eq!(text.parse::<ConsoleEnd>().unwrap().to_string(), text);
        }
        for text in ["", "file", "file:", "stdio:x", "tcp:1", "fd:", "fd:-1", "fd:x"] {
            assert!(text.parse::<ConsoleEnd>().is_err(), "{text}");
        }
    }
}
