//! Consoles and ports of a machine: opening their host end, and moving input to the guest. Moving input means waiting
//! for readiness, filtering the terminal's escapes, and keeping what the UART has no room for. Input that is not typed
//! is read only as far as the guest takes it, so nothing is dropped.

use std::io::{self, Write};
use std::sync::Arc;

use super::{Error, host};
use crate::backend::console::{self, ConsoleEnd, Got, Input, Receiver};
use crate::backend::fifo;
use crate::backend::output::Output;
use crate::backend::transcript::Transcript;
use crate::config::MachineConfig;
use crate::event::{Interest, Poller};
use crate::guest_event::GuestEvents;
use crate::terminal::{self, Command, Escapes};
use crate::virtio::console::{Console, NewPort};

/// Largest amount of typed input that the guest has not taken yet: 64 KiB. More is dropped, because Ctrl-A X must be
/// noticed whatever the guest does.
const TYPE_AHEAD: usize = 64 << 10;

/// A console or port: both halves of its host end, and the receiver of its input in the machine.
pub struct Line {
    /// Source of the input.
    pub input: Input,
    /// Receiver of the input.
    pub receiver: Arc<dyn Receiver>,
    /// Destination of the output.
    pub output: Output,
}

/// Opens the host end of a console or port; `what` names it in messages. A `transcript` records the output.
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
            // Unlike `eprintln!`, this ignores a closed stderr and writes the line in one piece.
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

/// Creates the virtio console device and opens the host ends of its ports, if there are any.
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

/// A line of a running guest.
pub(super) struct RunningLine {
    pub(super) input: ConsoleInput,
    receiver: Arc<dyn Receiver>,
    pub(super) output: Output,
    /// Descriptor of the line's terminal, if it has one.
    terminal: Option<i32>,
}

impl RunningLine {
    /// Creates a running line whose input is polled as `token`; with `escapes`, Ctrl-A commands are recognized.
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

    /// Informs the guest of the terminal's size.
    pub(super) fn resize(&self) {
        if let Some((columns, rows)) = self.terminal.and_then(terminal::window_size) {
            self.receiver.resize(columns, rows);
        }
    }
}

/// Input half of a console of a running guest.
pub struct ConsoleInput {
    input: Input,
    token: u64,
    /// Descriptor that epoll watches, if any.
    registered: Option<i32>,
    /// Set for regular files: they are always readable, and epoll refuses them.
    always_ready: bool,
    escapes: Option<Escapes>,
    pending: Vec<u8>,
    /// Set while nobody has the pseudo-terminal open; epoll would report that state endlessly.
    absent: bool,
    ended: bool,
}

impl ConsoleInput {
    /// Takes over `input`, which is polled as `token`; with `escapes`, Ctrl-A commands are recognized.
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

    /// Moves input to the guest: first the pending bytes, then, if `readable`, new ones. Must be called when `token` is
    /// ready (`readable`), when the guest has room, and periodically.
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
        // A disconnect is reported only after the last byte of input was delivered.
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

    /// Makes epoll watch the input exactly while there is room for it.
    fn register(&mut self, poller: &Poller) -> io::Result<()> {
        if self.always_ready {
            return Ok(());
        }
        let wanted = if self.wants_more() { self.input.fd() } else { None };
        if wanted == self.registered {
            return Ok(());
        }
        if let Some(old) = self.registered.take() {
            // The descriptor may already be closed, which has removed it.
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
