//! The client's side: `tests/host/run` and `tests/host/up`.

use crate::note::{Control, Hello, Reply, Request};
use crate::terminal::{Raw, window_size};
use crate::wire::{Ends, Link};
use crate::{DEADLINE, USAGE, c, read_token};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::fd::{FromRawFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

pub(crate) struct Options {
    port: u16,
    token: Vec<u8>,
    tty: bool,
    env: Vec<(Vec<u8>, Vec<u8>)>,
    argv: Vec<Vec<u8>>,
    programs: Vec<PathBuf>,
}

impl Options {
    pub(crate) fn parse(mut args: impl Iterator<Item = OsString>) -> io::Result<Options> {
        let mut options =
            Options { port: 0, token: Vec::new(), tty: false, env: Vec::new(), argv: Vec::new(), programs: Vec::new() };
        let bad = || io::Error::other(USAGE);
        while let Some(arg) = args.next() {
            match arg.to_str() {
                Some("--tty") => options.tty = true,
                Some("--port") => {
                    options.port = args.next().and_then(|port| port.to_str()?.parse().ok()).ok_or_else(bad)?;
                }
                Some("--token") => options.token = read_token(&args.next().ok_or_else(bad)?.into())?,
                Some("--env") => {
                    let pair = args.next().ok_or_else(bad)?.into_vec();
                    let equals = pair.iter().position(|&byte| byte == b'=').ok_or_else(bad)?;
                    options.env.push((pair[..equals].to_vec(), pair[equals + 1..].to_vec()));
                }
                Some("--program") => options.programs.push(args.next().ok_or_else(bad)?.into()),
                Some("--") => break,
                _ => return Err(bad()),
            }
        }
        options.argv = args.map(OsString::into_vec).collect();
        Ok(options)
    }

    /// Returns the executable files among the words of the command line and the arguments of --program.
    fn programs(&self) -> Vec<(Vec<u8>, String)> {
        let words = self.argv.iter().map(|word| PathBuf::from(OsString::from_vec(word.clone())));
        words
            .chain(self.programs.iter().cloned())
            .filter_map(|path| {
                let file = fs::metadata(&path).ok().filter(|file| file.is_file() && file.mode() & 0o111 != 0)?;
                let stamp = format!("{} {} {} {}", file.ino(), file.size(), file.ctime(), file.ctime_nsec());
                Some((fs::canonicalize(path).ok()?.into_os_string().into_vec(), stamp))
            })
            .collect()
    }

    /// Connects to the agent. The forwarded port drops connections that come too close together, and the kernel would
    /// try again only after a second, so this tries again by itself.
    fn connect(&self, hello: &Hello) -> io::Result<Arc<Link>> {
        let lost = |error: io::Error| {
            let again = "`tests/host/up` starts it again";
            io::Error::other(match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                    format!("the emulated host has not answered for {DEADLINE:?}; {again}")
                }
                _ => format!("the emulated host does not answer: {error}; {again}"),
            })
        };
        let address = (Ipv4Addr::LOCALHOST, self.port).into();
        let start = Instant::now();
        let mut socket = loop {
            match TcpStream::connect_timeout(&address, Duration::from_millis(50)) {
                Err(error) if error.kind() == io::ErrorKind::TimedOut && start.elapsed() < DEADLINE => {}
                result => break result.map_err(lost)?,
            }
        };
        socket.write_all(&self.token)?;
        let link = Arc::new(Link::new(socket)?);
        link.note(hello)?;
        link.reader.set_read_timeout(Some(DEADLINE))?;
        match link.next_note(&mut Ends::default()) {
            Ok(Reply::Here) => {}
            Ok(_) => {
                return Err(io::Error::other("the emulated host speaks another language"));
            }
            Err(error) => return Err(lost(error)),
        }
        link.reader.set_read_timeout(None)?;
        Ok(link)
    }
}

pub(crate) fn ping(options: &Options) -> io::Result<i32> {
    options.connect(&Hello::Ping).map(|_| 0)
}

pub(crate) fn run(options: &Options) -> io::Result<i32> {
    if options.argv.is_empty() {
        return Err(io::Error::other(USAGE));
    }
    let forward_to = forward_signals();
    let mut env: Vec<_> = std::env::vars_os().map(|(key, value)| (key.into_vec(), value.into_vec())).collect();
    env.extend(options.env.iter().cloned());
    let link = options.connect(&Hello::Run(Request {
        argv: options.argv.clone(),
        env,
        cwd: std::env::current_dir().map(|path| path.into_os_string().into_vec()).unwrap_or_default(),
        tty: options.tty.then(|| window_size().unwrap_or((24, 80))),
        programs: options.programs(),
    }))?;

    let mut ends = Ends::default();
    let output = [1, 2].map(|stream| duplicate(stream).map(|to| ends.deliver(&link, stream as usize, to, drop)));
    let input = duplicate(0)?;
    let raw = options.tty.then(Raw::enter);
    ends.forward(&link, 0, input);
    let _ = forward_to.set(link.clone());
    let reply = link.next_note(&mut ends);
    drop(ends);
    for stream in output {
        let _ = stream?.join();
    }
    drop(raw);
    match reply {
        Ok(Reply::Exited(code)) => Ok(code),
        Ok(Reply::NotStarted(code, why)) => {
            eprintln!("host-agent: {why}");
            Ok(code)
        }
        _ => Err(io::Error::other("the emulated host went away while the command ran")),
    }
}

/// A private copy of a standard stream: std's own would buffer, and hold locks.
fn duplicate(fd: RawFd) -> io::Result<File> {
    // SAFETY: the new descriptor has no other owner.
    unsafe {
        match c::fcntl(fd, c::F_DUPFD_CLOEXEC, 3) {
            -1 => Err(io::Error::last_os_error()),
            copy => Ok(File::from_raw_fd(copy)),
        }
    }
}

/// Forwards signals that would end this process to the command's process group. One that was ignored at the start
/// (nohup, a background job of a script) stays ignored.
fn forward_signals() -> Arc<OnceLock<Arc<Link>>> {
    let signals = [c::SIGINT, c::SIGTERM, c::SIGHUP, c::SIGQUIT, c::SIGUSR1, c::SIGUSR2, c::SIGWINCH];
    let ignored = ignored_signals();
    // SAFETY: the calls read and write the set only.
    let set = unsafe {
        let mut set = c::sigset_t::default();
        for signal in signals.into_iter().filter(|signal| ignored & 1 << (signal - 1) == 0) {
            c::sigaddset(&mut set, signal);
        }
        c::pthread_sigmask(c::SIG_BLOCK, &set, std::ptr::null_mut());
        set
    };
    let to: Arc<OnceLock<Arc<Link>>> = Arc::default();
    let control = to.clone();
    thread::spawn(move || {
        loop {
            let mut signal = 0;
            // SAFETY: reads the set, writes one integer.
            unsafe { c::sigwait(&set, &mut signal) };
            let message = match (signal, window_size()) {
                (c::SIGWINCH, Some((rows, columns))) => Control::WindowSize(rows, columns),
                (c::SIGWINCH, None) => continue,
                _ => Control::Signal(signal),
            };
            let sent = control.get().is_some_and(|link| link.note(&message).is_ok());
            if !sent && signal != c::SIGWINCH {
                std::process::exit(128 + signal); // before the terminal is raw: no command to forward it to yet
            }
        }
    });
    to
}

/// The signals that this process ignores, signal 1 as bit 0.
fn ignored_signals() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}
