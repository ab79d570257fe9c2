//! Descriptors to wait on: epoll, eventfds, and signals as descriptors. This is the only module that uses epoll; eventfds
//! elsewhere come from vmm-sys-util.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// A set of file descriptors to wait on, each with a token.
pub struct Poller {
    epoll: Epoll,
    ready: Vec<EpollEvent>,
}

/// Readiness to wait for. It is reported for as long as it lasts, except with edge triggering: then once when waiting
/// begins or is changed, and once whenever more arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// Readable, or the other side has closed.
    Read,
    /// Writable.
    Write,
    /// Readable or writable.
    Both,
    /// Registered, but only errors are reported.
    None,
    /// Readable or the other side has closed; edge-triggered.
    ReadEdge,
    /// Readable, writable or the other side has closed; edge-triggered.
    ReadWriteEdge,
}

impl Interest {
    fn events(self) -> EventSet {
        match self {
            Interest::Read => EventSet::IN,
            Interest::Write => EventSet::OUT,
            Interest::Both => EventSet::IN | EventSet::OUT,
            Interest::None => EventSet::empty(),
            Interest::ReadEdge => EventSet::IN | EventSet::EDGE_TRIGGERED,
            Interest::ReadWriteEdge => EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED,
        }
    }
}

impl Poller {
    /// Creates an empty set.
    pub fn new() -> io::Result<Self> {
        Ok(Poller { epoll: Epoll::new()?, ready: vec![EpollEvent::default(); 32] })
    }

    /// Starts waiting for `fd`. Regular files cannot be waited for (`EPERM`).
    pub fn add(&self, fd: RawFd, token: u64, interest: Interest) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(interest.events(), token))
    }

    /// Changes the readiness that `fd` is watched for.
    pub fn modify(&self, fd: RawFd, token: u64, interest: Interest) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Modify, fd, EpollEvent::new(interest.events(), token))
    }

    /// Stops waiting for `fd`.
    pub fn remove(&self, fd: RawFd) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default())
    }

    /// Waits until something is ready or `timeout` has passed (`None`: forever) and returns the ready tokens. An
    /// interruption by a signal returns early with no tokens.
    pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<impl Iterator<Item = u64> + '_> {
        // Round up: a timer that fires a little early would make the caller spin.
        let ms = timeout.map_or(-1, |t| i32::try_from(t.as_micros().div_ceil(1000)).unwrap_or(i32::MAX));
        let count = match self.epoll.wait(ms, &mut self.ready) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
            result => result?,
        };
        Ok(self.ready[..count].iter().map(|e| e.data()))
    }
}

/// Creates a non-blocking, close-on-exec eventfd.
pub fn eventfd() -> io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}

/// A descriptor on which signals arrive. Create it before any thread: threads inherit the signal mask, and a thread
/// that does not block a signal would receive it the ordinary way.
pub struct Signals(OwnedFd);

impl Signals {
    /// Blocks `signals` for this thread and those it starts, and collects them here. Signals that are ignored are left
    /// alone: nohup and shells ignore signals for background jobs. (The kernel would queue a blocked signal even if it
    /// is ignored.)
    #[allow(unsafe_code)]
    pub fn new(signals: &[i32]) -> io::Result<Self> {
        // SAFETY: sigemptyset initialises the set; the action is plain numbers, for which zeros are valid, and
        // sigaction only fills it in; the descriptor is checked before it is owned.
        unsafe {
            let mut set = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            for signal in signals {
                let mut action: libc::sigaction = std::mem::zeroed();
                libc::sigaction(*signal, std::ptr::null(), &mut action);
                if *signal == libc::SIGCHLD {
                    // SIGCHLD is needed even if our parent ignored it: children of a process that ignores it vanish
                    // silently.
                    libc::signal(libc::SIGCHLD, libc::SIG_DFL);
                } else if action.sa_sigaction == libc::SIG_IGN {
                    continue;
                }
                libc::sigaddset(&mut set, *signal);
            }
            let errno = libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
            if errno != 0 {
                return Err(io::Error::from_raw_os_error(errno));
            }
            let fd = libc::signalfd(-1, &set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC);
            if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(Signals(OwnedFd::from_raw_fd(fd))) }
        }
    }

    /// Returns the next signal that has arrived.
    #[allow(unsafe_code)]
    pub fn take(&self) -> Option<i32> {
        // SAFETY: the structure is plain numbers, for which zeros are valid, and the length is the structure's.
        unsafe {
            let mut info: libc::signalfd_siginfo = std::mem::zeroed();
            let len = size_of_val(&info);
            let n = libc::read(self.0.as_raw_fd(), std::ptr::from_mut(&mut info).cast(), len);
            if n == len as isize { i32::try_from(info.ssi_signo).ok() } else { None }
        }
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(unsafe_code)]
    fn what_is_ignored_stays_so() {
        let [ignored, heard] = [3, 4].map(|n| libc::SIGRTMIN() + n);
        // SAFETY: nothing else here uses these two signals, and raise has no memory effects.
        unsafe { libc::signal(ignored, libc::SIG_IGN) };
        let signals = Signals::new(&[ignored, heard]).unwrap();
        // SAFETY: see above.
        unsafe { (libc::raise(ignored), libc::raise(heard)) };
        assert_eq!((signals.take(), signals.take()), (Some(heard), None));
    }
}
