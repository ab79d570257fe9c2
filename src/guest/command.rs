//! Runs the command: starts it as on the host and moves its streams to and from the ports until it ends.
//!
//! Output goes from the command's pipe to the port by `splice`, without a copy here. Output left in the pipes when the
//! command ends is moved too. Processes that the command left behind delay nothing.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{Access, Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::{SpliceFlags, fcntl_getpipe_size, splice};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, kill_process_group, wait};
use rustix::pty::{OpenptFlags, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use super::names::Names;
use super::ports::{self, Control};
use super::protocol::{Bytes, Order, Report, Request, STDERR, STDIN, STDOUT};
use super::{Error, Result, cannot};

/// Number of bytes moved in one step.
const PIECE: usize = 64 << 10;
/// Upper bound of what a terminal buffers.
const TERMINAL_HOLDS: usize = 128 << 10;
/// Shells to try, in order, when no command was given.
const SHELLS: [&str; 2] = ["/bin/bash", "/bin/sh"];

/// Runs the command until it ends.
pub(super) fn run(request: &Request, names: &Names, control: &mut Control) -> Result<Report> {
    let mut cwd = OsString::from(request.cwd.clone());
    match enter(&cwd) {
        Ok(()) => {}
        Err(e) if request.cwd_given => return Ok(Report::NoCwd(e.raw_os_error())),
        // The host's working directory need not exist in the guest. Failing for that would look like a failure of the
        // command.
        Err(e) => {
            control.send(&Report::StartsInRoot(e.raw_os_error()))?;
            cwd = "/".into();
        }
    }
    if program(request, &cwd).is_some_and(|program| is_foreign(&program)) {
        return Ok(Report::NotStarted(libc::ENOEXEC));
    }
    let mut command = command(request);
    command.current_dir(cwd);
    let mut streams = match request.terminal {
        Some(size) => Streams::terminal(&mut command, size, request.merged, names.clone())?,
        None => Streams::pipes(&mut command, request.merged)?,
    };
    let child = match command.spawn() {
        Ok(child) => child,
        Err(e) => return Ok(Report::NotStarted(e.raw_os_error().unwrap_or(libc::EIO))),
    };
    // Keeps the OOM killer from this process. The command would inherit that, so it is started before.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    // These copies of the command's ends would keep its pipes open.
    drop(command);
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| Error::Other("the command has no process ID".into()))?;
    names.keep_forgetting()?;
    control.send(&Report::Started)?;
    let terminal = streams.terminal.take();
    control.listen(move |order| match order {
        // The kernel ignores a number that is not a signal.
        Order::Signal(number) => Signal::from_named_raw(number).into_iter().for_each(|signal| pass_on(pid, signal)),
        Order::Resize(columns, rows) => {
            let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
            terminal.iter().for_each(|terminal| _ = tcsetwinsize(terminal, size));
        }
    })?;
    let report = wait_for(pid)?;
    streams.finish();
    Ok(report)
}

/// Sends a signal to the command's process, or to its whole group if a terminal would send it to all of the foreground.
fn pass_on(command: Pid, signal: Signal) {
    let _ = match signal {
        Signal::INT | Signal::QUIT => kill_process_group(command, signal),
        signal => kill_process(command, signal),
    };
}

/// Returns whether a process can start in this directory. The directory need not be readable.
fn enter(dir: &OsStr) -> std::result::Result<(), Errno> {
    rustix::fs::open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map(drop)
}

/// Returns another home for a command whose own home is unusable: a monitor that is not root cannot look into the
/// host's /root, so the guest's root cannot either.
fn other_home(request: &Request) -> Option<&'static str> {
    const PLACE: &str = "/run/vireo/home";
    let (_, home) = request.env.iter().find(|(name, _)| OsString::from(name.clone()) == "HOME")?;
    if request.home_given || std::fs::read_dir(OsString::from(home.clone())).is_ok() {
        return None;
    }
    std::fs::create_dir_all(PLACE).is_ok().then_some(PLACE)
}

/// Returns the file that the first word names.
fn program(request: &Request, cwd: &OsStr) -> Option<PathBuf> {
    let bytes = |bytes: &Bytes| OsString::from(bytes.clone());
    let name = request.command.first().map(bytes)?;
    let cwd = Path::new(cwd);
    if name.as_encoded_bytes().contains(&b'/') {
        return Some(cwd.join(name));
    }
    let path = request.env.iter().find(|(name, _)| bytes(name) == "PATH").map(|(_, value)| bytes(value))?;
    let places = std::env::split_paths(&path).map(|dir| cwd.join(dir).join(&name));
    places.into_iter().find(|place| place.is_file() && rustix::fs::access(place, Access::EXEC_OK).is_ok())
}

/// Returns whether the file is a program for another architecture. The kernel refuses such a file, and a shell would
/// then try to read it as a script.
fn is_foreign(program: &Path) -> bool {
    const OURS: [u16; 2] = [3, 62]; // EM_386, EM_X86_64
    let mut head = [0; 20];
    // A FIFO is not opened, because that could block forever.
    if !program.is_file() || File::open(program).and_then(|mut file| file.read_exact(&mut head)).is_err() {
        return false;
    }
    let machine = u16::from_le_bytes([head[18], head[19]]);
    head.starts_with(b"\x7fELF") && !OURS.contains(&machine)
}

fn command(request: &Request) -> Command {
    let words: Vec<OsString> = request.command.iter().cloned().map(Into::into).collect();
    let mut command = match words.split_first() {
        Some((program, arguments)) => {
            let mut command = Command::new(program);
            command.args(arguments);
            command
        }
        None => Command::new(SHELLS.into_iter().find(|shell| Path::new(shell).exists()).unwrap_or("/bin/sh")),
    };
    command.env_clear();
    command.envs(request.env.iter().cloned().map(|(name, value)| (OsString::from(name), OsString::from(value))));
    command.envs(other_home(request).map(|home| ("HOME", home)));
    command
}

/// Waits for the command, and reaps every process that lost its parent.
fn wait_for(pid: Pid) -> Result<Report> {
    loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((ended, status))) if ended == pid => {
                if let Some(code) = status.exit_status() {
                    return Ok(Report::Exited(code as u8));
                }
                if let Some(signal) = status.terminating_signal() {
                    return Ok(Report::Signalled(signal));
                }
            }
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(cannot("wait for the command")(e)),
        }
    }
}

/// Threads that move the command's input and output.
struct Streams {
    /// Flag and event, set when the command has ended: the pipes then hold the last output.
    ended: Arc<(AtomicBool, OwnedFd)>,
    outputs: Vec<JoinHandle<()>>,
    terminal: Option<OwnedFd>,
}

impl Streams {
    fn new() -> Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC).map_err(cannot("create an eventfd"))?;
        Ok(Streams { ended: Arc::new((AtomicBool::new(false), event)), outputs: Vec::new(), terminal: None })
    }

    /// Starts the command in its own process group, with pipes.
    fn pipes(command: &mut Command, merged: bool) -> Result<Self> {
        let mut streams = Self::new()?;
        let (input, to_command) = pipe()?;
        let (from_command, output) = pipe()?;
        command.process_group(0).stdin(input);
        let port = ports::open(STDOUT, false)?;
        if merged {
            command.stderr(output.try_clone().map_err(cannot("copy a descriptor"))?);
        } else {
            streams.errors(command)?;
        }
        command.stdout(output);
        streams.move_output(from_command.into(), port)?;
        move_input(ports::open(STDIN, true)?, File::from(OwnedFd::from(to_command)), Names::default())?;
        Ok(streams)
    }

    /// Gives the command a separate pipe for its other output.
    fn errors(&mut self, command: &mut Command) -> Result<()> {
        let (errors, output) = pipe()?;
        command.stderr(output);
        self.move_output(errors.into(), ports::open(STDERR, false)?)
    }

    /// Starts the command in its own session, on a terminal.
    #[allow(unsafe_code)]
    fn terminal(command: &mut Command, (columns, rows): (u16, u16), merged: bool, names: Names) -> Result<Self> {
        let mut streams = Self::new()?;
        let (master, slave) = open_terminal().map_err(cannot("create a terminal"))?;
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&master, size).map_err(cannot("set the terminal's size"))?;
        let copy = |fd: &OwnedFd| fd.try_clone().map_err(cannot("copy a descriptor"));
        command.stdin(Stdio::from(copy(&slave)?)).stdout(Stdio::from(copy(&slave)?));
        if merged {
            command.stderr(Stdio::from(slave));
        } else {
            streams.errors(command)?;
        }
        let take_terminal = || {
            rustix::process::setsid()?;
            // SAFETY: standard input of the new process is the terminal, open until exec.
            rustix::process::ioctl_tiocsctty(unsafe { BorrowedFd::borrow_raw(libc::STDIN_FILENO) })?;
            Ok(())
        };
        // SAFETY: between fork and exec the closure makes two system calls and nothing else.
        unsafe { command.pre_exec(take_terminal) };
        streams.move_output(copy(&master)?, ports::open(STDOUT, false)?)?;
        move_input(ports::open(STDIN, true)?, File::from(copy(&master)?), names)?;
        streams.terminal = Some(master);
        Ok(streams)
    }

    fn move_output(&mut self, from: OwnedFd, port: File) -> Result<()> {
        let ended = self.ended.clone();
        let work = move || {
            let mut pump = Pump { from, port, buffer: None, rest: None };
            while !pump.step(&ended) {}
        };
        self.outputs.push(thread::Builder::new().spawn(work).map_err(cannot("start a thread"))?);
        Ok(())
    }

    /// Waits until everything that the command has written is moved.
    fn finish(self) {
        self.ended.0.store(true, Ordering::Release);
        let _ = rustix::io::write(&self.ended.1, &1u64.to_ne_bytes());
        self.outputs.into_iter().for_each(|thread| _ = thread.join());
    }
}

struct Pump {
    from: OwnedFd,
    port: File,
    /// Buffer for a source that cannot be spliced: a terminal.
    buffer: Option<Vec<u8>>,
    /// Upper bound of what an ended command has left; `None` before its end. Processes that continue to write are not
    /// waited for.
    rest: Option<usize>,
}

impl Pump {
    /// Waits for output and moves some of it. Returns whether that was the last.
    fn step(&mut self, (ended, told): &(AtomicBool, OwnedFd)) -> bool {
        let last = ended.load(Ordering::Acquire);
        if last && self.rest.is_none() {
            self.rest = Some(fcntl_getpipe_size(&self.from).unwrap_or(TERMINAL_HOLDS));
        }
        if self.rest == Some(0) {
            return true;
        }
        let readable = if last {
            ready(&self.from, PollFlags::IN, Wait::No)
        } else {
            ready(&self.from, PollFlags::IN, Wait::Or(told))
        };
        if !readable {
            return last;
        }
        match self.copy() {
            Ok(0) => true,
            Ok(len) => {
                self.rest = self.rest.map(|rest| rest.saturating_sub(len));
                false
            }
            Err(Errno::INTR) => false,
            Err(Errno::AGAIN) => !has_room(&self.port),
            // EIO: the terminal is no longer open anywhere.
            Err(_) => true,
        }
    }

    fn copy(&mut self) -> std::result::Result<usize, Errno> {
        if self.buffer.is_none() {
            let most = self.rest.unwrap_or(PIECE).min(PIECE);
            match splice(&self.from, None, &self.port, None, most, SpliceFlags::NONBLOCK | SpliceFlags::MOVE) {
                Err(Errno::INVAL) => self.buffer = Some(vec![0; PIECE / 2]),
                result => return result,
            }
        }
        let Some(buffer) = &mut self.buffer else { return Ok(0) };
        let len = rustix::io::read(&self.from, buffer.as_mut_slice())?;
        let mut rest = buffer.get(..len).unwrap_or(&[]);
        while !rest.is_empty() {
            match rustix::io::write(&self.port, rest) {
                Ok(n) => rest = rest.get(n..).unwrap_or(&[]),
                Err(Errno::AGAIN) if has_room(&self.port) => {}
                Err(Errno::INTR) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(len)
    }
}

/// Waits until the port takes more. Returns false if the host has closed it because its reader is gone. Closing our end
/// of the command's pipe then notifies the command as on the host (SIGPIPE).
fn has_room(port: &File) -> bool {
    let mut fds = [PollFd::new(port, PollFlags::OUT)];
    match poll(&mut fds, None) {
        Ok(_) => !fds[0].revents().contains(PollFlags::HUP),
        Err(e) => e == Errno::INTR,
    }
}

fn pipe() -> Result<(io::PipeReader, io::PipeWriter)> {
    io::pipe().map_err(cannot("create a pipe"))
}

enum Wait<'a> {
    No,
    /// Wait also for this descriptor.
    Or(&'a OwnedFd),
}

/// Returns whether `fd` is ready, after waiting as requested.
fn ready(fd: impl AsFd, flags: PollFlags, wait: Wait<'_>) -> bool {
    let at_once = Timespec::default();
    let (other, timeout) = match wait {
        Wait::No => (None, Some(&at_once)),
        Wait::Or(other) => (Some(other), None),
    };
    let mut fds = vec![PollFd::new(&fd, flags)];
    fds.extend(other.map(|other| PollFd::new(other, PollFlags::IN)));
    poll(&mut fds, timeout).is_ok() && fds.first().is_some_and(|fd| !fd.revents().is_empty())
}

/// Moves the port's input to the command, in a detached thread. Before each line, `names` are forgotten: a user who
/// changes a file on the host and then types a command gets the new file.
fn move_input(mut port: File, mut to: File, names: Names) -> Result<()> {
    let work = move || {
        let mut buffer = vec![0; PIECE / 2];
        loop {
            match port.read(&mut buffer) {
                Ok(0) => return, // This drops `to`, so the command sees the end of its input.
                Ok(len) => {
                    let input = buffer.get(..len).unwrap_or(&[]);
                    if input.contains(&b'\r') || input.contains(&b'\n') {
                        names.forget();
                    }
                    if to.write_all(input).is_err() {
                        return; // The command no longer reads; the rest stays on the host.
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    };
    thread::Builder::new().spawn(work).map(drop).map_err(cannot("start a thread"))
}

/// Opens both sides of a new terminal.
fn open_terminal() -> io::Result<(OwnedFd, OwnedFd)> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    unlockpt(&master)?;
    let path = ptsname(&master, Vec::new())?;
    let slave = rustix::fs::open(path, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?;
    Ok((master, slave))
}
