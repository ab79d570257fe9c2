//! Waiting and telling: epoll, signals as descriptors, and the queue on which devices tell the machine what the guest did.
//! The only module that uses epoll; eventfds elsewhere come from vmm-sys-util.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::kvm::debug::Trap;

/// A set of file descriptors to wait on, each with a token.
pub struct Poller {
    epoll: Epoll,
    ready: Vec<EpollEvent>,
}

/// Which readiness of a descriptor is waited for. It is told for as long as it lasts, except where an edge is named: then
/// once when waiting begins or is changed, and once whenever more comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// Readable, or the other side is gone.
    Read,
    /// Writable.
    Write,
    /// Either.
    Both,
    /// Registered, but only errors are reported.
    None,
    /// Readable or the other side is gone; the edge.
    ReadEdge,
    /// Readable, writable or the other side is gone; the edge.
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
    /// An empty set.
    pub fn new() -> io::Result<Self> {
        Ok(Poller { epoll: Epoll::new()?, ready: vec![EpollEvent::default(); 32] })
    }

    /// Starts waiting for `fd`. Regular files cannot be waited for (`EPERM`).
    pub fn add(&self, fd: RawFd, token: u64, interest: Interest) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(interest.events(), token))
    }

    /// Changes what is waited for.
    pub fn modify(&self, fd: RawFd, token: u64, interest: Interest) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Modify, fd, EpollEvent::new(interest.events(), token))
    }

    /// Stops waiting for `fd`.
    pub fn remove(&self, fd: RawFd) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default())
    }

    /// Waits until something is ready or `timeout` has passed (`None`: for ever) and returns the ready tokens.
    /// An interruption by a signal returns early with none.
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

/// A non-blocking, close-on-exec eventfd.
pub fn eventfd() -> io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}

/// Signals as something to wait on. Create it before any thread: a thread inherits what is blocked, and a signal must
/// not find a thread that takes it the old way.
pub struct Signals(OwnedFd);

impl Signals {
    /// Blocks `signals` for this thread and those it starts, and collects them here; but those that are ignored, as
    /// nohup and shells have it for what runs behind them, stay so. (The kernel would queue what is blocked all the same.)
    #[allow(unsafe_code)]
    pub fn new(signals: &[i32]) -> io::Result<Self> {
        // SAFETY: the set is initialised by sigemptyset; an action is plain numbers, for which zeros are valid, and is only
        // asked for; the descriptor is checked before it is owned.
        unsafe {
            let mut set = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            for signal in signals {
                let mut action: libc::sigaction = std::mem::zeroed();
                libc::sigaction(*signal, std::ptr::null(), &mut action);
                if *signal == libc::SIGCHLD {
                    // Children must be heard of, whatever the parent thought of its own: ignored, they only vanish.
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

    /// The next signal that has arrived.
    #[allow(unsafe_code)]
    pub fn take(&self) -> Option<i32> {
        // SAFETY: the structure is plain numbers, for which zeros are valid, and the length is its own.
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

/// How a guest panic came to be known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PanicSource {
    /// The guest's pvpanic driver said so.
    Pvpanic,
    /// The console showed the kernel's panic message.
    Console,
    /// The message was the last thing in the kernel's log, in its memory.
    Log,
}

/// What the guest did that concerns the whole machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestEvent {
    /// ACPI S5.
    PowerOff,
    /// A reset by any of its ways; the text says which.
    Reset(&'static str),
    /// The kernel panicked.
    Panicked(PanicSource),
    /// Init told that it runs.
    InitStarted,
    /// The guest read what the console had for it; there is room for more input.
    ConsoleInputRoom,
    /// The guest wrote to the console for the first time.
    ConsoleFirstByte,
    /// The console said that the kernel is about to restart the machine.
    Restarting,
    /// The console showed the end of a panic message: this kernel will do nothing more.
    PanicEnded,
    /// The console showed what somebody waits for.
    Judged,
    /// A vCPU stopped for the debugger.
    Trapped(Trap),
    /// The guest wants this exit status (`--debug-exit`).
    DebugExit(u8),
}

impl GuestEvent {
    /// Whether no vCPU may run on after this.
    pub fn ends_guest(self) -> bool {
        matches!(self, GuestEvent::PowerOff | GuestEvent::Reset(_) | GuestEvent::DebugExit(_))
    }
}

/// Where devices put a [`GuestEvent`]; the machine's loop waits on [`GuestEvents::fd`]. Cloning shares it.
#[derive(Clone)]
pub struct GuestEvents(Arc<Shared>);

struct Shared {
    queue: Mutex<VecDeque<GuestEvent>>,
    fd: EventFd,
    ended: AtomicBool,
}

impl GuestEvents {
    /// An empty queue.
    pub fn new() -> io::Result<Self> {
        let shared = Shared { queue: Mutex::default(), fd: eventfd()?, ended: AtomicBool::new(false) };
        Ok(GuestEvents(Arc::new(shared)))
    }

    /// Tells the machine. The queue is bounded by dropping repeats: a guest can say the same thing as often as it
    /// likes.
    pub fn post(&self, event: GuestEvent) {
        if event.ends_guest() {
            self.0.ended.store(true, Ordering::Release);
        }
        let mut queue = self.0.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if !queue.contains(&event) {
            queue.push_back(event);
            let _ = self.0.fd.write(1);
        }
    }

    /// Whether a vCPU must stop rather than enter the guest again.
    pub fn ended(&self) -> bool {
        self.0.ended.load(Ordering::Acquire)
    }

    /// Readable while something is queued.
    pub fn fd(&self) -> &EventFd {
        &self.0.fd
    }

    /// The oldest event.
    pub fn take(&self) -> Option<GuestEvent> {
        let mut queue = self.0.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.len() <= 1 {
            let _ = self.0.fd.read();
        }
        queue.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_arrive_in_order_and_repeats_are_dropped() {
        let events = GuestEvents::new().unwrap();
        let mut poller = Poller::new().unwrap();
        poller.add(events.fd().as_raw_fd(), 7, Interest::Read).unwrap();
        assert_eq!(poller.wait(Some(Duration::ZERO)).unwrap().count(), 0);
        events.post(GuestEvent::InitStarted);
        for _ in 0..1000 {
            events.post(GuestEvent::Reset("test"));
        }
        assert!(events.ended());
        assert_eq!(poller.wait(Some(Duration::ZERO)).unwrap().collect::<Vec<_>>(), [7]);
        assert_eq!(events.take(), Some(GuestEvent::InitStarted));
        assert_eq!(events.take(), Some(GuestEvent::Reset("test")));
        assert_eq!(events.take(), None);
        assert_eq!(poller.wait(Some(Duration::ZERO)).unwrap().count(), 0);
    }

    #[test]
    #[allow(unsafe_code)]
    fn what_is_ignored_stays_so() {
        let [ignored, heard] = [3, 4].map(|n| libc::SIGRTMIN() + n);
        // SAFETY: nobody else here uses these two signals, and raise has no memory effects.
        unsafe { libc::signal(ignored, libc::SIG_IGN) };
        let signals = Signals::new(&[ignored, heard]).unwrap();
        // SAFETY: see above.
        unsafe { (libc::raise(ignored), libc::raise(heard)) };
        assert_eq!((signals.take(), signals.take()), (Some(heard), None));
    }
}
