//! The gdb stub: lets a gdb stop the machine, look at it, change it and let it go on.
//!
//! ```text
//! Server ─▶ Session: one client at a time ─▶ gdbstub (the protocol) ─▶ Debuggee ─▶ Guest: Controller and RAM
//! ```
//!
//! One thread of its own does all that, with messages to the machine ([`crate::control`]). While a client is attached
//! all vCPUs stop and go on together, except that one may step alone. When it detaches, or vanishes, nothing of it stays
//! in the guest, which goes on. Clients are not trusted: packets and answers are bounded, and whatever breaks the
//! protocol ends the session.

mod debuggee;
mod memory;
mod registers;
mod session;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod traits;

use std::convert::Infallible;
use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use crate::backend::unix;
use crate::control::Controller;
use crate::event;
use crate::kvm::debug::{Answer, Request};
use crate::machine::mailbox::Traps;
use crate::memory::GuestRam;
use crate::outcome::Outcome;

/// The debugger cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The port is taken.
    #[error("gdb: cannot listen on port {0} of 127.0.0.1")]
    Tcp(u16, #[source] io::Error),
    /// The path cannot be used.
    #[error("gdb")]
    Unix(#[from] unix::Error),
    /// A host resource is exhausted.
    #[error("gdb: cannot set up {0}")]
    Host(&'static str, #[source] io::Error),
}

/// `--gdb`: where a client connects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A port of 127.0.0.1; 0 is any that is free.
    Port(u16),
    /// A unix socket, for its owner only.
    Unix(PathBuf),
}

impl std::str::FromStr for Address {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_prefix("unix:") {
            Some("") => Err("unix: needs a path"),
            Some(path) => Ok(Address::Unix(path.into())),
            None => text.parse().map(Address::Port).map_err(|_| "a port or unix:PATH is wanted"),
        }
    }
}

/// The machine, as the stub sees it. Tests and fuzzers have another one.
#[doc(hidden)]
pub trait Guest: Send + Sync {
    /// How many vCPUs it has.
    fn vcpus(&self) -> u32;
    /// Its memory.
    fn ram(&self) -> &GuestRam;
    /// Has traps told.
    fn attach(&self, traps: &Arc<Traps>);
    /// Stops it; false if there is nothing left to stop.
    fn pause(&self) -> bool;
    /// Lets all vCPUs go on, or these.
    fn resume(&self, only: Option<Vec<u32>>) -> bool;
    /// Asks a vCPU, while all are stopped.
    fn debug(&self, vcpu: u32, request: Request) -> io::Result<Answer>;
    /// Ends it.
    fn kill(&self);
}

struct Live {
    controller: Controller,
    ram: GuestRam,
    vcpus: u32,
}

impl Guest for Live {
    fn vcpus(&self) -> u32 {
        self.vcpus
    }

    fn ram(&self) -> &GuestRam {
        &self.ram
    }

    fn attach(&self, traps: &Arc<Traps>) {
        self.controller.attach(traps);
    }

    fn pause(&self) -> bool {
        self.controller.pause()
    }

    fn resume(&self, only: Option<Vec<u32>>) -> bool {
        self.controller.resume_only(only)
    }

    fn debug(&self, vcpu: u32, request: Request) -> io::Result<Answer> {
        self.controller.debug(vcpu, request)
    }

    fn kill(&self) {
        self.controller.stop(Outcome::KilledByDebugger);
    }
}

enum Listener {
    Tcp(TcpListener),
    Unix(unix::Listener),
}

/// How long a client may take to read an answer, in which the guest stands still and vireo may wait to end.
const PATIENCE: Duration = Duration::from_secs(2);

impl Listener {
    /// The next client, if there is one. Reads and writes wait, writes no longer than [`PATIENCE`].
    fn accept(&self) -> io::Result<Option<File>> {
        let stream: OwnedFd = match self {
            Listener::Tcp(listener) => match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    stream.set_nodelay(true)?;
                    stream.set_write_timeout(Some(PATIENCE))?;
                    stream.into()
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) => return Err(e),
            },
            Listener::Unix(listener) => {
                let Some(stream) = listener.accept()? else { return Ok(None) };
                stream.set_nonblocking(false)?;
                stream.set_write_timeout(Some(PATIENCE))?;
                stream.into()
            }
        };
        Ok(Some(stream.into()))
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Listener::Tcp(listener) => listener.as_raw_fd(),
            Listener::Unix(listener) => listener.as_raw_fd(),
        }
    }
}

/// A stub that listens; clients wait until it is started.
pub struct Server {
    listener: Listener,
    target: String,
}

impl Server {
    /// Listens at `address`.
    pub fn open(address: &Address) -> Result<Self, Error> {
        Ok(match address {
            Address::Port(port) => {
                let failed = |e| Error::Tcp(*port, e);
                let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                let target = format!(":{}", listener.local_addr().map_err(failed)?.port());
                Server { listener: Listener::Tcp(listener), target }
            }
            Address::Unix(path) => Server {
                listener: Listener::Unix(unix::Listener::bind_private(path)?),
                target: path.display().to_string(),
            },
        })
    }

    /// What gdb's `target remote` wants to have.
    pub fn target(&self) -> &str {
        &self.target
    }

    /// Serves clients that debug the machine behind `controller`, which has this memory and so many vCPUs.
    pub fn start(self, controller: Controller, ram: GuestRam, vcpus: u32) -> Result<Serving, Error> {
        self.serve(Box::new(Live { controller, ram, vcpus }))
    }

    /// Serves clients that debug `guest`.
    #[doc(hidden)]
    pub fn serve(self, guest: Box<dyn Guest>) -> Result<Serving, Error> {
        let end = End { fd: event::eventfd().map_err(|e| Error::Host("an eventfd", e))?, code: AtomicU8::new(0) };
        let end = Arc::new(end);
        let theirs = end.clone();
        let serve = move || {
            let Err(error) = session::serve(&self.listener, &*guest, &theirs);
            if let Some(error) = error {
                log::warn!("gdb: no debugger is served any more: {error}");
            }
        };
        let thread = thread::Builder::new().name("gdb".into()).stack_size(256 << 10).spawn(serve);
        Ok(Serving { end, thread: thread.map_err(|e| Error::Host("a thread", e))? })
    }
}

/// The machine's end, told to the stub's thread.
struct End {
    fd: EventFd,
    code: AtomicU8,
}

/// A stub that serves.
pub struct Serving {
    end: Arc<End>,
    thread: JoinHandle<()>,
}

impl Serving {
    /// Tells a client that waits for the guest that vireo will end with `code`, and ends the stub.
    pub fn finish(self, code: u8) {
        self.end.code.store(code, Ordering::Release);
        let _ = self.end.fd.write(1);
        // A client that reads a byte now and then could hold it up for long.
        let deadline = Instant::now() + 2 * PATIENCE;
        while !self.thread.is_finished() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Never: serving only ends by the machine's end, or by an error.
type Served = Result<Infallible, Option<io::Error>>;
