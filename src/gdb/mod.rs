//! The gdb stub: lets gdb stop the machine, inspect it, change it, and continue it.
//!
//! ```text
//! Server ─▶ Session: one client at a time ─▶ gdbstub (the protocol) ─▶ Debuggee ─▶ Guest: Controller and RAM
//! ```
//!
//! All of this happens on one separate thread, with messages to the machine ([`crate::control`]). While a client is
//! attached, all vCPUs stop and continue together, except that one may step alone. When the client detaches or
//! vanishes, its breakpoints are removed from the guest, and the guest continues. Clients are not trusted: packets and
//! answers are bounded, and a violation of the protocol ends the session.

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

/// Reasons why the debugger cannot be served.
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

/// `--gdb`: address at which a client connects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A port of 127.0.0.1; 0 means any free port.
    Port(u16),
    /// A unix socket, accessible only to its owner.
    Unix(PathBuf),
}

impl std::str::FromStr for Address {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_prefix("unix:") {
            Some("") => Err("unix: needs a path"),
            Some(path) => Ok(Address::Unix(path.into())),
            None => text.parse().map(Address::Port).map_err(|_| "expected a port or unix:PATH"),
        }
    }
}

/// The machine, as the stub sees it. Tests and fuzzers implement it, too.
#[doc(hidden)]
pub trait Guest: Send + Sync {
    /// Returns the number of vCPUs.
    fn vcpus(&self) -> u32;
    /// Returns the guest's memory.
    fn ram(&self) -> &GuestRam;
    /// Makes the machine report traps to `traps`.
    fn attach(&self, traps: &Arc<Traps>);
    /// Stops the machine; returns false if there is nothing left to stop.
    fn pause(&self) -> bool;
    /// Continues all vCPUs, or only the given ones.
    fn resume(&self, only: Option<Vec<u32>>) -> bool;
    /// Sends a request to a vCPU, while all vCPUs are stopped.
    fn debug(&self, vcpu: u32, request: Request) -> io::Result<Answer>;
    /// Ends the machine.
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

/// Time limit for a client to read an answer. Meanwhile, the guest stands still, and the end of vireo may have to wait.
const PATIENCE: Duration = Duration::from_secs(2);

impl Listener {
    /// Returns the next client, if there is one. Its reads and writes block, writes for at most [`PATIENCE`].
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

/// A listening stub; clients wait until it is started.
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

    /// Returns the argument for gdb's `target remote`.
    pub fn target(&self) -> &str {
        &self.target
    }

    /// Serves clients that debug the machine of `controller`, which has the given memory and number of vCPUs.
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
                log::warn!("gdb: no longer accepting debuggers: {error}");
            }
        };
        let thread = thread::Builder::new().name("gdb".into()).stack_size(256 << 10).spawn(serve);
        Ok(Serving { end, thread: thread.map_err(|e| Error::Host("a thread", e))? })
    }
}

/// Notifies the stub's thread of the machine's end.
struct End {
    fd: EventFd,
    code: AtomicU8,
}

/// A stub that is serving.
pub struct Serving {
    end: Arc<End>,
    thread: JoinHandle<()>,
}

impl Serving {
    /// Reports the exit code of vireo, `code`, to a client that waits for the guest, and ends the stub.
    pub fn finish(self, code: u8) {
        self.end.code.store(code, Ordering::Release);
        let _ = self.end.fd.write(1);
        // A client that reads only one byte now and then could delay this for long.
        let deadline = Instant::now() + 2 * PATIENCE;
        while !self.thread.is_finished() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Result of serving, which never succeeds: it ends with the machine, or with an error.
type Served = Result<Infallible, Option<io::Error>>;
