//! Runs commands in the emulated host as if they ran here.
//!
//! `host-agent serve` is what the emulated host boots into; `host-agent run` is its client, used by `tests/host/run`.
//! Each command has one TCP connection (QEMU's port forwarding accepts few at a time). It begins with the token and a
//! [`Hello`]; then both sides send frames: an operation, a stream (0, 1, 2), a length, and so many bytes.
//!
//! ```text
//! Data    the next bytes of a stream; none at all: its end
//! Ack     a Data frame was written to where it belongs. A sender has at most WINDOW frames that are not acknowledged,
//!         so a stream nobody reads stops its own sender, and neither fills memory nor holds up the other streams
//! Broken  nobody reads the stream any more: the sender's pipe breaks
//! Note    JSON: Control from the client (signals), Reply from the agent (the exit status, after all data)
//! ```
//!
//! The command and all its descendants live in a cgroup of their own, so that none of them outlives the command or the
//! connection.

#![allow(unsafe_code)] // cgroups, terminals, signals and process groups are system calls

use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::ffi::{CString, OsString};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// The agent's port inside the emulated host; outside it is a free one.
const PORT: u16 = 7777;
/// For everything that should take milliseconds: a connection's first message, a stream's connection.
const DEADLINE: Duration = Duration::from_secs(20);
/// The host powers itself off after so long without a command.
const IDLE_SECONDS: i64 = 20 * 60;
/// Exit status when the emulated host, not the command, failed.
const LOST: i32 = 255;

const USAGE: &str = "usage: host-agent serve TOKEN-FILE
       host-agent ping --port N --token FILE
       host-agent run --port N --token FILE [--tty] [--env KEY=VALUE] [--program PATH] -- COMMAND [ARGUMENT...]";

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let verb = args.next().unwrap_or_default();
    let result = match verb.to_str() {
        Some("serve") => serve(&args.next().unwrap_or_default().into()),
        Some("ping") => Options::parse(args).and_then(|options| ping(&options)),
        Some("run") => Options::parse(args).and_then(|options| run(&options)),
        _ => Err(io::Error::other(USAGE)),
    };
    match result {
        Ok(code) => ExitCode::from(code as u8),
        Err(error) => {
            eprintln!("host-agent: {error}");
            ExitCode::from(LOST as u8)
        }
    }
}

// ---- the wire -------------------------------------------------------------------------------------------------------

#[derive(Serialize, Deserialize)]
enum Hello {
    Ping,
    Run(Request),
}

/// What to run. Bytes, not strings: arguments and paths need not be UTF-8.
#[derive(Serialize, Deserialize)]
struct Request {
    argv: Vec<Vec<u8>>,
    env: Vec<(Vec<u8>, Vec<u8>)>,
    cwd: Vec<u8>,
    /// Rows and columns of the client's terminal, when the command is to have one of its own.
    tty: Option<(u16, u16)>,
    /// Programs that may have been rebuilt, each with a stamp that tells its versions apart.
    programs: Vec<(Vec<u8>, String)>,
}

/// Client to agent, while the command runs.
#[derive(Serialize, Deserialize)]
enum Control {
    Signal(i32),
    WindowSize(u16, u16),
}

/// Agent to client: one when it has seen the request, one last of all.
#[derive(Serialize, Deserialize)]
enum Reply {
    Here,
    /// The command could not be started; the exit status a shell would give, and why.
    NotStarted(i32, String),
    Exited(i32),
}

const DATA: u8 = 0;
const ACK: u8 = 1;
const BROKEN: u8 = 2;
const NOTE: u8 = 3;

const WINDOW: usize = 8;
const CHUNK: usize = 64 << 10;

/// One end of a connection.
struct Link {
    reader: TcpStream,
    writer: Mutex<TcpStream>,
}

impl Link {
    fn new(socket: TcpStream) -> io::Result<Link> {
        socket.set_nodelay(true)?;
        Ok(Link { reader: socket.try_clone()?, writer: Mutex::new(socket) })
    }

    fn send(&self, operation: u8, stream: usize, bytes: &[u8]) -> io::Result<()> {
        let mut frame = vec![operation, stream as u8];
        frame.extend((bytes.len() as u32).to_le_bytes());
        frame.extend(bytes);
        self.writer.lock().unwrap().write_all(&frame)
    }

    fn receive(&self) -> io::Result<(u8, usize, Vec<u8>)> {
        let mut header = [0; 6];
        (&self.reader).read_exact(&mut header)?;
        let [operation, stream, length @ ..] = header;
        let length = u32::from_le_bytes(length) as usize;
        if length > 8 << 20 || stream > 2 {
            return Err(io::Error::other("a frame that makes no sense"));
        }
        let mut bytes = vec![0; length];
        (&self.reader).read_exact(&mut bytes)?;
        Ok((operation, stream.into(), bytes))
    }

    fn note<T: Serialize>(&self, note: &T) -> io::Result<()> {
        self.send(NOTE, 0, &serde_json::to_vec(note)?)
    }

    /// Passes frames to the streams they belong to, until a note comes or the connection ends.
    fn next_note<T: for<'a> Deserialize<'a>>(&self, ends: &mut Ends) -> io::Result<T> {
        loop {
            let (operation, stream, bytes) = self.receive()?;
            match operation {
                DATA => drop(ends.incoming[stream].as_ref().map(|chunks| chunks.send(bytes))),
                ACK => drop(ends.window[stream].as_ref().map(|window| window.send(()))),
                BROKEN => ends.window[stream] = None,
                _ => return Ok(serde_json::from_slice(&bytes)?),
            }
        }
    }
}

/// What the threads that serve the streams are told through. Dropping it ends them.
#[derive(Default)]
struct Ends {
    incoming: [Option<Sender<Vec<u8>>>; 3],
    window: [Option<Sender<()>>; 3],
}

impl Ends {
    /// Starts sending what comes `from` somewhere. A stream that breaks drops it, and with that closes it.
    fn forward(&mut self, link: &Arc<Link>, stream: usize, mut from: impl Read + Send + 'static) -> JoinHandle<()> {
        let (sender, window) = channel();
        (0..WINDOW).for_each(|_| sender.send(()).unwrap());
        self.window[stream] = Some(sender);
        let link = link.clone();
        thread::spawn(move || {
            let mut buffer = vec![0; CHUNK];
            while window.recv().is_ok() {
                let bytes = loop {
                    match from.read(&mut buffer) {
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                        result => break result.unwrap_or(0), // a pseudo-terminal ends with EIO
                    }
                };
                if link.send(DATA, stream, &buffer[..bytes]).is_err() || bytes == 0 {
                    return;
                }
            }
        })
    }

    /// Starts writing what arrives `to` somewhere; then calls `at_end` with it.
    fn deliver<W: Write + Send + 'static>(
        &mut self,
        link: &Arc<Link>,
        stream: usize,
        mut to: W,
        at_end: impl FnOnce(W) + Send + 'static,
    ) -> JoinHandle<()> {
        let (sender, chunks) = channel::<Vec<u8>>();
        self.incoming[stream] = Some(sender);
        let link = link.clone();
        thread::spawn(move || {
            while let Ok(chunk) = chunks.recv()
                && !chunk.is_empty()
            {
                if to.write_all(&chunk).is_err() {
                    let _ = link.send(BROKEN, stream, &[]);
                    return;
                }
                let _ = link.send(ACK, stream, &[]);
            }
            at_end(to);
        })
    }
}

/// Any user of the machine can connect to a port of localhost: only who can read the token file gets a command run.
fn read_token(path: &PathBuf) -> io::Result<Vec<u8>> {
    let token = fs::read(path).map_err(|error| io::Error::other(format!("{}: {error}", path.display())))?;
    if token.len() < 32 {
        return Err(io::Error::other(format!("{} holds no token", path.display())));
    }
    Ok(token)
}

// ---- the agent ------------------------------------------------------------------------------------------------------

struct Agent {
    token: Vec<u8>,
    next_command: AtomicUsize,
    programs: Mutex<Programs>,
    running: AtomicUsize,
    last_use: AtomicI64,
}

fn serve(token: &PathBuf) -> io::Result<i32> {
    if std::process::id() == 1 {
        reap_orphans();
    }
    let agent = Arc::new(Agent {
        token: read_token(token)?,
        next_command: AtomicUsize::new(1),
        programs: Mutex::new(Programs::new()?),
        running: AtomicUsize::new(0),
        last_use: AtomicI64::new(wall_seconds()),
    });
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))?;
    let idle = agent.clone();
    thread::spawn(move || idle.power_off_when_idle());
    println!("host-agent: ready");
    for socket in listener.incoming() {
        let (agent, socket) = (agent.clone(), socket?);
        thread::spawn(move || {
            if let Err(error) = agent.connection(socket) {
                println!("host-agent: {error}");
            }
        });
    }
    Ok(0)
}

/// Process 1 inherits every orphan of the host and waits for it; the agent itself goes on as its child, so that the two
/// kinds of waiting do not meet. Without an agent the host is of no use: it powers off.
fn reap_orphans() {
    // SAFETY: no thread exists yet, so the child of fork may do everything the parent may.
    let agent = unsafe { libc::fork() };
    if agent == 0 {
        return;
    }
    loop {
        let mut status = 0;
        // SAFETY: waits for any child and writes one integer.
        let pid = unsafe { libc::waitpid(-1, &mut status, 0) };
        if pid == agent || pid < 0 {
            println!("host-agent: the agent ended with status {status:#x}");
            power_off();
        }
    }
}

fn power_off() -> ! {
    // SAFETY: no memory is involved; the call does not return when it succeeds.
    unsafe {
        libc::sync();
        libc::reboot(libc::RB_POWER_OFF);
    }
    std::process::exit(1)
}

/// Seconds by the real-time clock chip, which follows the machine outside. The kernel's own clocks leap ahead while a
/// host that counts instructions is idle.
fn wall_seconds() -> i64 {
    #[repr(C)]
    #[derive(Default)]
    struct RtcTime([i32; 9]);
    const RTC_RD_TIME: libc::c_ulong = 0x8024_7009;
    let mut rtc = RtcTime::default();
    let Ok(file) = File::open("/dev/rtc0") else {
        return 0;
    };
    // SAFETY: RTC_RD_TIME fills a struct rtc_time, nine ints, the first six laid out as in struct tm.
    if unsafe { libc::ioctl(file.as_raw_fd(), RTC_RD_TIME, &mut rtc) } < 0 {
        return 0;
    }
    let [second, minute, hour, day, month, year, ..] = rtc.0.map(i64::from);
    // Differences of minutes are all that matters: a month may as well have 31 days, at worst one idle host lives on.
    ((((year * 12 + month) * 31 + day) * 24 + hour) * 60 + minute) * 60 + second
}

impl Agent {
    fn power_off_when_idle(&self) {
        loop {
            thread::sleep(Duration::from_secs(20));
            let now = wall_seconds();
            if self.running.load(Ordering::SeqCst) > 0 {
                self.last_use.store(now, Ordering::SeqCst);
            } else if now - self.last_use.load(Ordering::SeqCst) > IDLE_SECONDS {
                println!("host-agent: idle for {IDLE_SECONDS} seconds, powering off");
                power_off();
            }
        }
    }

    fn connection(&self, mut socket: TcpStream) -> io::Result<()> {
        socket.set_read_timeout(Some(DEADLINE))?;
        let mut token = vec![0; self.token.len()];
        socket.read_exact(&mut token)?;
        if token != self.token {
            return Err(io::Error::other("a connection with a wrong token"));
        }
        let link = Arc::new(Link::new(socket)?);
        let hello = link.next_note(&mut Ends::default())?;
        link.reader.set_read_timeout(None)?;
        self.last_use.store(wall_seconds(), Ordering::SeqCst);
        link.note(&Reply::Here)?;
        match hello {
            Hello::Ping => Ok(()),
            Hello::Run(request) => {
                self.running.fetch_add(1, Ordering::SeqCst);
                let result = self.command(&link, &request);
                self.running.fetch_sub(1, Ordering::SeqCst);
                let _ = link.reader.shutdown(Shutdown::Both);
                result
            }
        }
    }

    fn command(&self, link: &Arc<Link>, request: &Request) -> io::Result<()> {
        self.programs.lock().unwrap().refresh(&request.programs);
        let group = Arc::new(Cgroup::new(self.next_command.fetch_add(1, Ordering::SeqCst))?);
        let mut running = match Running::start(request, &group) {
            Ok(running) => running,
            Err(error) => {
                let code = if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 };
                let name = String::from_utf8_lossy(&request.argv[0]);
                return link.note(&Reply::NotStarted(code, format!("{name}: {error}")));
            }
        };
        let (mut ends, output) = running.attach(link)?;
        let ended = Arc::new(AtomicBool::new(false));
        {
            let (link, group, ended) = (link.clone(), group.clone(), ended.clone());
            let (pid, pty) = (running.child.id() as i32, running.pty.clone());
            // Does what the client asks for while the command runs; when the client is gone, so is the command.
            thread::spawn(move || {
                while let Ok(control) = link.next_note(&mut ends) {
                    match (control, &pty) {
                        _ if ended.load(Ordering::SeqCst) => {} // the pid may belong to somebody else
                        // SAFETY: no memory is involved.
                        (Control::Signal(signal), _) => drop(unsafe { libc::kill(-pid, signal) }),
                        (Control::WindowSize(rows, columns), Some(pty)) => {
                            set_window_size(pty.as_raw_fd(), rows, columns);
                        }
                        (Control::WindowSize(..), None) => {}
                    }
                }
                group.kill();
            });
        }
        let status = running.child.wait()?;
        ended.store(true, Ordering::SeqCst);
        group.kill(); // what the command left behind would hold the streams open
        for stream in output {
            let _ = stream.join();
        }
        group.remove();
        link.note(&Reply::Exited(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))))
    }
}

/// Keeps rebuilt programs from running as a mixture of old and new. While some process runs a program from 9p, Linux
/// keeps its name and its pages and looks at neither again. So programs run from copies in memory, mounted over their
/// own paths: a file read (not mapped) through 9p is always the present one.
struct Programs {
    /// Folders where files change, and where they are mounted once more without the copies.
    folders: Vec<(PathBuf, PathBuf)>,
    stamps: HashMap<PathBuf, String>,
}

impl Programs {
    const COPIES: &str = "/run/programs";

    fn new() -> io::Result<Programs> {
        let mut folders = Vec::new();
        for (n, folder) in fs::read_to_string("/run/fresh")?.lines().enumerate() {
            let beneath = PathBuf::from(format!("/run/beneath/{n}"));
            fs::create_dir_all(&beneath)?;
            bind(folder.as_ref(), &beneath)?;
            folders.push((folder.into(), beneath));
        }
        fs::create_dir_all(Self::COPIES)?;
        Ok(Programs { folders, stamps: HashMap::new() })
    }

    fn refresh(&mut self, programs: &[(Vec<u8>, String)]) {
        for (path, stamp) in programs {
            let path = PathBuf::from(OsString::from_vec(path.clone()));
            if self.stamps.get(&path) == Some(stamp) {
                continue;
            }
            match self.copy(&path) {
                Ok(true) => drop(self.stamps.insert(path, stamp.clone())),
                Ok(false) => {}
                Err(error) => println!("host-agent: {} may be old: {error}", path.display()),
            }
        }
    }

    fn copy(&self, path: &Path) -> io::Result<bool> {
        let beneath = |(folder, beneath): &(PathBuf, PathBuf)| Some(beneath.join(path.strip_prefix(folder).ok()?));
        let Some(present) = self.folders.iter().find_map(beneath) else {
            return Ok(false); // the system's own programs stay as they are
        };
        let copy = Path::new(Self::COPIES).join("new");
        let _ = fs::remove_file(&copy);
        io::copy(&mut File::open(&present)?, &mut File::create(&copy)?)?;
        fs::set_permissions(&copy, fs::metadata(&present)?.permissions())?;
        if self.stamps.contains_key(path) {
            let target = CString::new(path.as_os_str().as_bytes())?;
            // SAFETY: reads one string. Who runs the former copy keeps it.
            unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
        }
        bind(&copy, path)?;
        fs::remove_file(&copy)?; // the mount keeps it
        Ok(true)
    }
}

fn bind(from: &Path, to: &Path) -> io::Result<()> {
    let (from, to) = (CString::new(from.as_os_str().as_bytes())?, CString::new(to.as_os_str().as_bytes())?);
    let null = std::ptr::null();
    // SAFETY: reads two strings; a bind mount takes neither a type nor data.
    match unsafe { libc::mount(from.as_ptr(), to.as_ptr(), null, libc::MS_BIND, null.cast()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

struct Running {
    child: Child,
    pty: Option<Arc<OwnedFd>>,
}

impl Running {
    fn start(request: &Request, group: &Cgroup) -> io::Result<Running> {
        let argument = |bytes: &Vec<u8>| OsString::from_vec(bytes.clone());
        let mut command = Command::new(argument(&request.argv[0]));
        command.args(request.argv[1..].iter().map(argument));
        command.env_clear().envs(request.env.iter().map(|(key, value)| (argument(key), argument(value))));
        command.env("VIREO_HOST", "direct"); // in here, `tests/host/run` has nowhere else to go
        let cwd = PathBuf::from(argument(&request.cwd));
        command.current_dir(if cwd.is_dir() { cwd } else { "/".into() });
        let mut pty = None;
        if let Some((rows, columns)) = request.tty {
            let (master, terminal) = open_pty()?;
            set_window_size(master.as_raw_fd(), rows, columns);
            command.stdin(terminal.try_clone()?).stdout(terminal.try_clone()?).stderr(terminal);
            pty = Some(Arc::new(master));
        } else {
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        }
        let procs = CString::new(group.path.join("cgroup.procs").as_os_str().as_bytes())?;
        let has_pty = pty.is_some();
        let prepare = move || {
            // SAFETY: plain system calls only, as a child between fork and exec needs. Writing "0" moves the writer.
            unsafe {
                let file = libc::open(procs.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
                if file < 0 || libc::write(file, c"0".as_ptr().cast(), 1) != 1 || libc::setsid() < 0 {
                    return Err(io::Error::last_os_error());
                }
                if has_pty && libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        };
        // SAFETY: `prepare` allocates nothing and takes no lock.
        unsafe { command.pre_exec(prepare) };
        Ok(Running { child: command.spawn()?, pty })
    }

    /// Connects the streams. Returns, beside what feeds them, the threads that have to end before the command is over.
    fn attach(&mut self, link: &Arc<Link>) -> io::Result<(Ends, Vec<JoinHandle<()>>)> {
        let mut ends = Ends::default();
        if let Some(pty) = &self.pty {
            // End of input at a terminal is a key. In raw mode it would be a character like any other.
            ends.deliver(link, 0, File::from(pty.try_clone()?), |mut terminal| {
                if terminal_mode(terminal.as_raw_fd()).is_some_and(|mode| mode.c_lflag & libc::ICANON != 0) {
                    let _ = terminal.write_all(&[4]);
                }
            });
            let output = ends.forward(link, 1, File::from(pty.try_clone()?));
            return Ok((ends, vec![output]));
        }
        let no_pipe = || io::Error::other("a command without a pipe");
        ends.deliver(link, 0, self.child.stdin.take().ok_or_else(no_pipe)?, drop);
        let stdout = ends.forward(link, 1, self.child.stdout.take().ok_or_else(no_pipe)?);
        let stderr = ends.forward(link, 2, self.child.stderr.take().ok_or_else(no_pipe)?);
        Ok((ends, vec![stdout, stderr]))
    }
}

struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    fn new(number: usize) -> io::Result<Cgroup> {
        let path = PathBuf::from(format!("/sys/fs/cgroup/command-{number}"));
        fs::create_dir(&path)?;
        Ok(Cgroup { path })
    }

    fn kill(&self) {
        let _ = fs::write(self.path.join("cgroup.kill"), "1");
    }

    /// The kernel removes a group only once its last process has gone, which killing does not wait for.
    fn remove(&self) {
        for _ in 0..1000 {
            if fs::remove_dir(&self.path).is_ok() {
                return;
            }
            for child in fs::read_dir(&self.path).into_iter().flatten().flatten() {
                let _ = fs::remove_dir(child.path()); // groups the command made
            }
            thread::sleep(Duration::from_millis(2));
        }
        println!("host-agent: {} is still in use", self.path.display());
    }
}

// ---- terminals ------------------------------------------------------------------------------------------------------

fn open_pty() -> io::Result<(OwnedFd, OwnedFd)> {
    let (mut master, mut terminal) = (0, 0);
    // SAFETY: openpty writes two descriptors, which nobody else owns; the other arguments may be null.
    unsafe {
        if libc::openpty(&mut master, &mut terminal, std::ptr::null_mut(), std::ptr::null(), std::ptr::null()) < 0 {
            return Err(io::Error::last_os_error());
        }
        libc::fcntl(master, libc::F_SETFD, libc::FD_CLOEXEC);
        libc::fcntl(terminal, libc::F_SETFD, libc::FD_CLOEXEC);
        Ok((OwnedFd::from_raw_fd(master), OwnedFd::from_raw_fd(terminal)))
    }
}

fn set_window_size(fd: RawFd, rows: u16, columns: u16) {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one winsize.
    unsafe { libc::ioctl(fd, libc::TIOCSWINSZ, &size) };
}

fn window_size() -> Option<(u16, u16)> {
    [0, 1, 2].into_iter().find_map(|fd| {
        let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: TIOCGWINSZ writes one winsize.
        (unsafe { libc::ioctl(fd, libc::TIOCGWINSZ, &mut size) } == 0).then_some((size.ws_row, size.ws_col))
    })
}

fn terminal_mode(fd: RawFd) -> Option<libc::termios> {
    // SAFETY: all zeros is a valid termios, and tcgetattr writes one.
    unsafe {
        let mut mode = std::mem::zeroed();
        (libc::tcgetattr(fd, &mut mode) == 0).then_some(mode)
    }
}

/// As long as this lives the client's terminal is raw: every key goes to the command. Dropping it restores the terminal.
struct Raw(libc::termios);

impl Raw {
    fn enter() -> Option<Raw> {
        let mode = terminal_mode(0)?;
        let mut raw = mode;
        // SAFETY: both only read and write the termios given. In the background the second would stop us with SIGTTOU.
        unsafe {
            libc::signal(libc::SIGTTOU, libc::SIG_IGN);
            libc::cfmakeraw(&mut raw);
            libc::tcsetattr(0, libc::TCSADRAIN, &raw);
        }
        Some(Raw(mode))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // SAFETY: only reads the termios given.
        unsafe { libc::tcsetattr(0, libc::TCSADRAIN, &self.0) };
    }
}

// ---- the client -----------------------------------------------------------------------------------------------------

struct Options {
    port: u16,
    token: Vec<u8>,
    tty: bool,
    env: Vec<(Vec<u8>, Vec<u8>)>,
    argv: Vec<Vec<u8>>,
    programs: Vec<PathBuf>,
}

impl Options {
    fn parse(mut args: impl Iterator<Item = OsString>) -> io::Result<Options> {
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

    /// Everything on the command line, and named with --program, that is an executable file.
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

    /// The forwarded port drops connections that come too close together, and the kernel would try again only after a
    /// second. So we try again ourselves.
    fn connect(&self, hello: &Hello) -> io::Result<Arc<Link>> {
        let lost = |error: io::Error| {
            let again = "`tests/host/up` starts it anew";
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

fn ping(options: &Options) -> io::Result<i32> {
    options.connect(&Hello::Ping).map(|_| 0)
}

fn run(options: &Options) -> io::Result<i32> {
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
        match libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) {
            -1 => Err(io::Error::last_os_error()),
            copy => Ok(File::from_raw_fd(copy)),
        }
    }
}

/// Signals that would end this process go to the command's process group instead. One that was ignored when we
/// started (nohup, a background job of a script) stays ignored.
fn forward_signals() -> Arc<OnceLock<Arc<Link>>> {
    let signals =
        [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGUSR1, libc::SIGUSR2, libc::SIGWINCH];
    // SAFETY: all zeros is a valid sigset and sigaction; the calls read and write those only.
    let set = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        for signal in signals {
            let mut action: libc::sigaction = std::mem::zeroed();
            libc::sigaction(signal, std::ptr::null(), &mut action);
            if action.sa_sigaction != libc::SIG_IGN {
                libc::sigaddset(&mut set, signal);
            }
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        set
    };
    let to: Arc<OnceLock<Arc<Link>>> = Arc::default();
    let control = to.clone();
    thread::spawn(move || {
        loop {
            let mut signal = 0;
            // SAFETY: reads the set, writes one integer.
            unsafe { libc::sigwait(&set, &mut signal) };
            let message = match (signal, window_size()) {
                (libc::SIGWINCH, Some((rows, columns))) => Control::WindowSize(rows, columns),
                (libc::SIGWINCH, None) => continue,
                _ => Control::Signal(signal),
            };
            let sent = control.get().is_some_and(|link| link.note(&message).is_ok());
            if !sent && signal != libc::SIGWINCH {
                std::process::exit(128 + signal); // before the terminal is raw: no command to forward it to yet
            }
        }
    });
    to
}
