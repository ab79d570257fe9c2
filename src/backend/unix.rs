//! Unix stream sockets whose calls never block.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, fchmod};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, recv, socket_with,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::held;
use super::place::{FileId, Place, descriptor_path};

/// Maximum length of a socket's path in bytes: `sun_path` has 108 bytes, one of them for the final zero.
pub const MAX_PATH: usize = 107;

/// Failures to open a socket for listening.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The OS refused.
    #[error("cannot listen on {0}")]
    Open(PathBuf, #[source] io::Error),
    /// Something else is at the path.
    #[error("cannot listen on {0}: {1}")]
    Taken(PathBuf, &'static str),
}

/// A listening socket. Dropping it removes its file, if the file of that name is still the same.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    place: Place,
    file: Option<FileId>,
}

impl Listener {
    /// Listens at `path`. A socket that a dead process left there is replaced; anything else stays and is an error.
    pub fn bind(path: &Path) -> Result<Self, Error> {
        Listener::listen(path, Mode::from_bits_retain(0o777))
    }

    /// Like [`Listener::bind`], but only the user may connect.
    pub fn bind_private(path: &Path) -> Result<Self, Error> {
        Listener::listen(path, Mode::RUSR | Mode::WUSR)
    }

    fn listen(path: &Path, mode: Mode) -> Result<Self, Error> {
        let open = |e| Error::Open(path.into(), e);
        let folders = held::folders();
        let place = Place::find_new(path, &folders).map_err(open)?;
        if let Some(stat) = place.stat().map_err(open)? {
            if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
                return Err(Error::Taken(path.into(), "a file that is not a socket is already there"));
            }
            match dial_at(&place) {
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                    place.remove_if(FileId::of(&stat)).map_err(open)?;
                }
                // Other results include a full backlog and a socket of another type, which are not ours to remove.
                _ => return Err(Error::Taken(path.into(), "another process listens there")),
            }
        }
        // Bind through the held directory if a guest could replace it; otherwise by the name, which tools then show.
        let (dir, name) = place.parts();
        let held = place.folder(&folders).map(|_| descriptor_path(&dir).join(name));
        let socket = bound(held.as_deref().unwrap_or(path), mode).map_err(|e| open(e.into()))?;
        let file = place.id();
        Ok(Listener { socket: socket.into(), place, file })
    }

    /// Place of the socket's file.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Accepts the next client, non-blocking; `None` if there is none now.
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
        if let Some(file) = self.file {
            let _ = self.place.remove_if(file);
        }
    }
}

/// Creates a listening socket whose file has `mode`, minus the umask, from the start: Linux creates the file with the
/// descriptor's mode.
fn bound(path: &Path, mode: Mode) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    fchmod(&socket, mode)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen(&socket, 128)?;
    Ok(socket)
}

/// Connects to the socket at `path`; the stream is non-blocking. `WouldBlock` means that the listener's backlog is
/// full. There is nothing to wait on in that case, so try again after a while.
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

/// Connects to a socket in a held directory. A link, or anything else that is not a socket, is an error.
pub fn dial_at(place: &Place) -> io::Result<UnixStream> {
    let socket = place.name_kind(FileType::Socket)?;
    match dial(&descriptor_path(&socket)) {
        // Without /proc there are no shared folders, so nothing has replaced the file.
        Err(e) if e.kind() == io::ErrorKind::NotFound => dial(place.path()),
        result => result,
    }
}

/// Reads from `stream` without consuming the bytes; returns how many bytes of `buffer` are filled, 0 at the end.
pub fn peek(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<usize> {
    Ok(recv(stream, buffer, RecvFlags::PEEK | RecvFlags::DONTWAIT)?.0)
}

/// Returns true if both directions of `stream` have ended: the other side closed it, not just its sending half.
pub fn hung_up(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
}

/// Raises the soft limit of file descriptors so that there is room for `more`, as far as the hard limit goes.
pub fn make_room_for_descriptors(more: u64) {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    // A monitor's other descriptors are far fewer than these.
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
    use crate::backend::place::WritableFolders;
    use std::fs;
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
        assert!(
            Listener::bind(&path).unwrap_err().to_string().ends_with("a file that is not a socket is already there")
        );
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        let nowhere = Listener::bind(&dir.path().join("no/where")).unwrap_err();
        assert!(nowhere.to_string().starts_with("cannot listen on "), "{nowhere}");
    }

    #[test]
    fn a_listener_removes_its_own_file_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = Listener::bind(&path).unwrap();
        fs::rename(&path, dir.path().join("moved")).unwrap();
        fs::write(&path, "precious").unwrap();
        drop(listener);
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        fs::remove_file(&path).unwrap();
        // It does not remove a file at the same path in another folder, either.
        let folder = dir.path().join("folder");
        fs::create_dir(&folder).unwrap();
        let listener = Listener::bind(&folder.join("socket")).unwrap();
        fs::rename(&folder, dir.path().join("aside")).unwrap();
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("socket"), "precious").unwrap();
        drop(listener);
        assert!(folder.join("socket").exists() && !dir.path().join("aside/socket").exists());
    }

    #[test]
    fn a_held_place_leads_to_sockets_and_not_through_links() {
        let dir = tempfile::tempdir().unwrap();
        let (inside, secret) = (dir.path().join("inside"), dir.path().join("secret"));
        fs::create_dir(&inside).unwrap();
        let place = Place::find_new(&inside.join("vsock"), &WritableFolders::default()).unwrap().with_suffix("_52");
        assert_eq!(dial_at(&place).unwrap_err().kind(), io::ErrorKind::NotFound);
        let _secret = Listener::bind(&secret).unwrap();
        std::os::unix::fs::symlink(&secret, inside.join("vsock_52")).unwrap();
        assert!(dial_at(&place).unwrap_err().to_string().contains("a symbolic link"));
        fs::remove_file(inside.join("vsock_52")).unwrap();
        fs::write(inside.join("vsock_52"), "").unwrap();
        assert!(dial_at(&place).unwrap_err().to_string().contains("another kind of file"));
        fs::remove_file(inside.join("vsock_52")).unwrap();
        let service = Listener::bind(&inside.join("vsock_52")).unwrap();
        fs::rename(&inside, dir.path().join("moved")).unwrap();
        let _client = dial_at(&place).unwrap();
        assert!(service.accept().unwrap().is_some());
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
