//! Console input on its way to the guest: waits for readiness, filters the terminal's escapes, and keeps what the
//! UART has no room for. Input that is not typed is read only as far as the guest takes it, so nothing is dropped.

use std::io;

use crate::backend::console::{Got, Input};
use crate::devices::serial::SerialPort;
use crate::event::{Interest, Poller};
use crate::terminal::{Command, Escapes};

/// What somebody typed ahead of the guest beyond this is dropped, because Ctrl-A X must be heard whatever the guest
/// does: 64 KiB.
const TYPE_AHEAD: usize = 64 << 10;

/// The input half of the console while the guest runs.
pub struct ConsoleInput {
    input: Input,
    token: u64,
    /// What epoll waits for, if anything.
    registered: Option<i32>,
    /// Regular files are always readable, and epoll refuses them.
    always_ready: bool,
    escapes: Option<Escapes>,
    pending: Vec<u8>,
    /// Nobody has the pseudo-terminal open, which epoll would report without end.
    absent: bool,
    ended: bool,
}

impl ConsoleInput {
    /// Takes over `input`; with `escapes` Ctrl-A commands are looked for. Its readiness will be `token`.
    pub fn new(input: Input, token: u64, escapes: bool) -> Self {
        let escapes = escapes.then(Escapes::default);
        ConsoleInput {
            input,
            token,
            registered: None,
            always_ready: false,
            escapes,
            pending: Vec::new(),
            absent: false,
            ended: false,
        }
    }

    /// Moves input towards the guest: first what is pending, then, if `readable`, what is new. Call it when `token`
    /// is ready (`readable`), when the guest has room, and now and then.
    pub fn pump(&mut self, readable: bool, poller: &Poller, serial: &SerialPort) -> io::Result<Option<Command>> {
        self.feed(serial);
        let mut command = None;
        let mut readable = readable || std::mem::take(&mut self.absent);
        while (readable || self.always_ready) && command.is_none() && self.wants_more() {
            let mut buffer = [0; 4096];
            match self.input.read(&mut buffer) {
                Got::Bytes(n) => command = self.take(&buffer[..n]),
                Got::Nothing => {}
                Got::Absent => self.absent = true,
                Got::End => self.ended = true,
            }
            readable = false;
            self.feed(serial);
        }
        self.register(poller)?;
        Ok(command)
    }

    fn wants_more(&self) -> bool {
        !self.ended && !self.absent && (self.escapes.is_some() || self.pending.is_empty())
    }

    fn take(&mut self, bytes: &[u8]) -> Option<Command> {
        let Some(escapes) = &mut self.escapes else {
            self.pending.extend_from_slice(bytes);
            return None;
        };
        let command = escapes.filter(bytes, &mut self.pending);
        self.pending.truncate(TYPE_AHEAD);
        command
    }

    fn feed(&mut self, serial: &SerialPort) {
        if !self.pending.is_empty() {
            let taken = serial.receive(&self.pending);
            self.pending.drain(..taken);
        }
    }

    /// Has epoll wait for the input exactly when there is room for it.
    fn register(&mut self, poller: &Poller) -> io::Result<()> {
        if self.always_ready {
            return Ok(());
        }
        let wanted = if self.wants_more() { self.input.fd() } else { None };
        if wanted == self.registered {
            return Ok(());
        }
        if let Some(old) = self.registered.take() {
            // Its descriptor may be closed already, which removed it.
            let _ = poller.remove(old);
        }
        match wanted.map(|fd| poller.add(fd, self.token, Interest::Read)) {
            Some(Err(e)) if e.raw_os_error() == Some(libc::EPERM) => self.always_ready = true,
            Some(Err(e)) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => self.registered = wanted,
        }
        Ok(())
    }
}
