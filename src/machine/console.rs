//! Consoles and ports of a machine: opening their host's side, and input on its way to the guest. That
//! waits for readiness, filters the terminal's escapes, and keeps what the
//! UART has no room for. Input that is not typed is read only as far as the guest takes it, so nothing is dropped.

use std::io::{self, Write};
use std::sync::Arc;

use super::{Error, host};
use crate::backend::console::{self, ConsoleEnd, Got, Input, Receiver};
use crate::backend::fifo;
use crate::backend::output::Output;
use crate::backend::transcript::Transcript;
use crate::config::MachineConfig;
use crate::event::{GuestEvents, Interest, Poller};
use crate::terminal::{self, Command, Escapes};
use crate::virtio::console::{Console, NewPort};

/// What somebody typed ahead of the guest beyond this is dropped, because Ctrl-A X must be heard whatever the guest
/// does: 64 KiB.
const TYPE_AHEAD: usize = 64 << 10;

/// A console or port: both halves of its host's side, and what in the machine takes its input.
pub struct Line {
    /// Where input comes from.
    pub input: Input,
    /// Where it goes.
    pub receiver: Arc<dyn Receiver>,
    /// Where output goes.
    pub output: Output,
}

/// Opens one; `what` is for messages. A `transcript` reads along.
pub(super) fn open(end: &ConsoleEnd, what: &str, transcript: Option<&Transcript>) -> Result<(Input, Output), Error> {
    let opened = match end {
        ConsoleEnd::Stdio => console::stdio(),
        ConsoleEnd::Stdin => console::stdin(),
        ConsoleEnd::Stdout => console::output_stream("stdout", libc::STDOUT_FILENO),
        ConsoleEnd::Stderr => console::output_stream("stderr", libc::STDERR_FILENO),
        ConsoleEnd::Fd(fd) => console::descriptor(*fd)?,
        ConsoleEnd::Null => console::Console { output: None, input: Input::None },
        ConsoleEnd::File(path) => console::file(path)?,
        ConsoleEnd::Pipe(path) => fifo::pair(path)?,
        ConsoleEnd::Socket(path) => console::socket(path)?,
        ConsoleEnd::Pty => {
            let (console, path) = console::pty()?;
            // Unlike `eprintln!` this takes it if stderr is gone; and in one piece.
            let _ = io::stderr().write_all(format!("vireo: {what} is on {}\n", path.display()).as_bytes());
            console
        }
    };
    let destination = match transcript {
        Some(transcript) => Some(transcript.destination(opened.output)),
        None => opened.output,
    };
    let output = destination.map_or_else(Output::discard, Output::new).map_err(host("the console's thread"))?;
    Ok((opened.input, output))
}

/// The virtio console device with what its ports lead to, if there are any.
pub(super) fn open_virtio(
    config: &MachineConfig,
    events: &GuestEvents,
    transcript: Option<&Transcript>,
) -> Result<Option<(Console, Vec<Line>)>, Error> {
    let (mut ports, mut ends) = (Vec::new(), Vec::new());
    let named = config.console_ports.iter().map(|port| (Some(port.name.clone()), &port.to, port.from.as_deref()));
    for (name, end, from) in config.console.iter().map(|end| (None, end, None)).chain(named) {
        let what = name.as_ref().map_or("the console".to_string(), |name| format!("port {name}"));
        let (mut input, output) = open(end, &what, transcript.filter(|_| name.is_none()))?;
        if let Some(from) = from {
            input = console::input_file(from)?;
        }
        ports.push(NewPort { name, output: output.clone() });
        ends.push((input, output));
    }
    if ports.is_empty() {
        return Ok(None);
    }
    let device = Console::new("console", ports, events).map_err(host("an eventfd"))?;
    let lines = device.host_ports().into_iter().zip(ends).map(|(port, (input, output))| Line {
        input,
        receiver: Arc::new(port),
        output,
    });
    let lines = lines.collect();
    Ok(Some((device, lines)))
}

/// A line while the guest runs.
pub(super) struct RunningLine {
    pub(super) input: ConsoleInput,
    receiver: Arc<dyn Receiver>,
    pub(super) output: Output,
    /// Its terminal, if it has one.
    terminal: Option<i32>,
}

impl RunningLine {
    /// The readiness of its input will be `token`; with `escapes` Ctrl-A commands are looked for.
    pub(super) fn new(line: Line, token: u64, escapes: bool) -> Self {
        let Line { input, receiver, output } = line;
        let terminal = input.fd().filter(|_| input.is_terminal());
        let line = RunningLine { input: ConsoleInput::new(input, token, escapes), receiver, output, terminal };
        line.resize();
        line
    }

    /// See [`ConsoleInput::pump`].
    pub(super) fn pump(&mut self, readable: bool, poller: &Poller) -> io::Result<Option<Command>> {
        self.input.pump(readable, poller, &*self.receiver)
    }

    /// Tells the guest how large the terminal is.
    pub(super) fn resize(&self) {
        if let Some((columns, rows)) = self.terminal.and_then(terminal::window_size) {
            self.receiver.resize(columns, rows);
        }
    }
}

/// The input half of a console while the guest runs.
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
    pub fn pump(&mut self, readable: bool, poller: &Poller, receiver: &dyn Receiver) -> io::Result<Option<Command>> {
        self.feed(receiver);
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
            self.feed(receiver);
        }
        // Who went away is gone when the last that came from him is.
        let connected = self.input.connected() && !(self.ended && self.input.ends());
        if connected || self.pending.is_empty() {
            receiver.connected(connected);
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

    fn feed(&mut self, receiver: &dyn Receiver) {
        if !self.pending.is_empty() {
            let taken = receiver.receive(&self.pending);
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
