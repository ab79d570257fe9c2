//! Unix stream sockets, none of whose calls waits for anybody.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, fchmod};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, recv, socket_with,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Longest path of a socket in bytes: `sun_path` has 108 of them, one for the zero at the end.
pub const MAX_PATH: usize = 107;

/// A socket could not be opened for listening.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The OS refused.
    #[error("cannot listen on {0}")]
    Open(PathBuf, #[source] io::Error),
    /// Something else is at the path.
    #[error("cannot listen on {0}: {1}")]
    Taken(PathBuf, &'static str),
}

/// A listening socket. Removes its file when dropped.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Listens at `path`. A socket that a dead process left there is replaced; anything else stays and is an error.
    pub fn bind(path: &Path) -> Result<Self, Error> {
        Listener::listen(path, Mode::from_bits_retain(0o777))
    }

    /// The same for nobody but the user.
    pub fn bind_private(path: &Path) -> Result<Self, Error> {
        Listener::listen(path, Mode::RUSR | Mode::WUSR)
    }

    fn listen(path: &Path, mode: Mode) -> Result<Self, Error> {
        let open = |e| Error::Open(path.into(), e);
        if let Ok(meta) = fs::symlink_metadata(path) {
            if !meta.file_type().is_socket() {
                return Err(Error::Taken(path.into(), "a file that is no socket is already there"));
            }
            match dial(path) {
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(open)?,
                // Also with a full backlog, or of another type: it is not ours to judge.
                _ => return Err(Error::Taken(path.into(), "another process listens there")),
            }
        }
        let socket = bound(path, mode).map_err(|e| open(e.into()))?;
        Ok(Listener { socket: socket.into(), path: path.into() })
    }

    /// The next client, non-blocking; `None` when there is none now.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        loop {
            match self.socket.accept() {
                Ok((client, _)) => return client.set_nonblocking(true).map(|()| Some(client)),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) => return Err(e),
            }
        }
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// A listening socket whose file has `mode`, less what the umask takes, from the start: Linux makes it with the mode of
/// the descriptor.
fn bound(path: &Path, mode: Mode) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    fchmod(&socket, mode)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen(&socket, 128)?;
    Ok(socket)
}

/// Connects to the socket at `path`; the stream is non-blocking. `WouldBlock`: somebody listens there who has too many
/// clients waiting; there is nothing to wait on, so try again after a while.
pub fn dial(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    loop {
        match connect(&socket, &SocketAddrUnix::new(path)?) {
            Err(Errno::INTR) => {}
            result => return Ok(result.map(|()| UnixStream::from(socket))?),
        }
    }
}

/// Looks at what `stream` has to read without taking it; returns how many bytes of `buffer` are filled, 0 at the end.
pub fn peek(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<usize> {
    Ok(recv(stream, buffer, RecvFlags::PEEK | RecvFlags::DONTWAIT)?.0)
}

/// Whether both directions of `stream` have ended: the other side closed it rather than shut down its sending half.
pub fn hung_up(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
}

/// Raises the soft limit of file descriptors so that there is room for `more`, as far as the hard limit goes.
pub fn make_room_for_descriptors(more: u64) {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    // What else a monitor has open is far less than this.
    let wanted = more.saturating_add(512).min(maximum.unwrap_or(u64::MAX));
    if current.is_some_and(|current| current < wanted)
        && let Err(e) = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum })
    {
        log::debug!("cannot raise the limit of file descriptors: {e}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_socket_of_a_dead_process_is_replaced_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "the standard library leaves its file behind");
        let listener = Listener::bind(&path).unwrap();
        assert!(listener.accept().unwrap().is_none());
        let _client = dial(&path).unwrap();
        assert!(listener.accept().unwrap().is_some());
        let refused = Listener::bind(&path).unwrap_err().to_string();
        assert_eq!(refused, format!("cannot listen on {}: another process listens there", path.display()));
        drop(listener);
        assert!(!path.exists());
        fs::write(&path, "precious").unwrap();
        assert!(Listener::bind(&path).unwrap_err().to_string().ends_with("a file that is no socket is already there"));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        let nowhere = Listener::bind(&dir.path().join("no/where")).unwrap_err();
        assert!(nowhere.to_string().starts_with("cannot listen on "), "{nowhere}");
    }

    #[test]
    fn nothing_waits() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        assert_eq!(dial(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        rustix::net::bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        assert_eq!(dial(&path).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        rustix::net::listen(&socket, 1).unwrap();
        let clients: Vec<_> = (0..2).map(|_| dial(&path).unwrap()).collect();
        assert_eq!(dial(&path).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert!(Listener::bind(&path).unwrap_err().to_string().ends_with("another process listens there"));
        assert_eq!(peek(&clients[0], &mut [0; 4]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn peeking_leaves_it_there_and_hanging_up_is_more_than_an_end() {
        let (near, mut far) = UnixStream::pair().unwrap();
        far.write_all(b"hello").unwrap();
        let mut buffer = [0; 8];
        for _ in 0..2 {
            assert_eq!(peek(&near, &mut buffer).unwrap(), 5);
        }
        far.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(!hung_up(&near));
        drop(far);
        assert!(hung_up(&near));
    }
}
