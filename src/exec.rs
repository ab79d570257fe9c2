//! `vireo exec`: a machine for one command, and the protocol with the guest's init.
//!
//! ```text
//! vireo exec -- make test
//!   initramfs: vireo as /init, the modules that this kernel needs, the request
//!   shares: the root (read-only; the guest's writes stay in its memory), folders
//!   ports: stdin, stdout, stderr unchanged; orders and reports ([`guest::protocol`](crate::guest::protocol))
//! ```
//!
//! The serial console belongs to the kernel alone and goes to the transcript. The machine ends with the command's
//! report: everything that the command wrote is in the rings by then, and the rings are emptied before the machine is
//! released.

mod environment;
mod root;

use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use log::warn;
use rustix::fs::MemfdFlags;

use crate::backend::console::ConsoleEnd;
use crate::backend::passt;
use crate::boot::modules::ModulesConfig;
use crate::boot::pack::{FileConfig, InitramfsConfig};
use crate::config::MachineConfig;
use crate::control::Controller;
use crate::guest::protocol::{
    Bytes, CONTROL, LINE_MAX, LOG_NAME, Mount, Order, REQUEST, Report, Request, STDERR, STDIN, STDOUT,
};
use crate::machine::run::Errand;
use crate::outcome::Outcome;
use crate::printable::printable;
use crate::terminal;
use crate::virtio::console::PortConfig;
use crate::virtio::fs::FsConfig;

/// Kernel modules that every guest of `exec` needs.
const MODULES: [&str; 2] = ["virtio_mmio", "virtio_console"];
/// Modules for file systems that a disk may have.
const DISK_MODULES: [&str; 6] = ["ext4", "xfs", "btrfs", "squashfs", "erofs", "crc32c_generic"];
/// Start of the kernel's command line; the user's part follows.
const CMDLINE: &str = "console=ttyS0 reboot=t";
/// Task of the guest: its command. Its init gives the reason if the guest cannot run it.
pub const ERRAND: Errand = Errand { log_name: LOG_NAME };
/// Largest number of characters shown of a guest's reason.
const WHY_MAX: usize = 1000;
/// Directory in which distributions keep their kernels.
const BOOT: &str = "/boot";

/// Value of `--root`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RootFrom {
    /// A folder of the host or an image of a file system; the kind of file decides which.
    Path(PathBuf),
    /// The initramfs, with a busybox in it.
    Initramfs,
}

impl FromStr for RootFrom {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "" => Err("expected a folder, an image or initramfs"),
            "initramfs" => Ok(RootFrom::Initramfs),
            path => Ok(RootFrom::Path(path.into())),
        }
    }
}

/// Value of `--share DIR[:GUEST][:ro|rw]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Folder {
    /// Path on the host.
    pub host: PathBuf,
    /// Path in the guest.
    pub guest: PathBuf,
    /// Let writes reach the host.
    pub writable: bool,
}

impl FromStr for Folder {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (rest, writable) = match text.rsplit_once(':') {
            Some((rest, "rw")) => (rest, true),
            Some((rest, "ro")) => (rest, false),
            _ => (text, false),
        };
        let (host, guest) = rest.split_once(':').unwrap_or((rest, ""));
        let is_of_run = [",readonly", ",ro", ",rw"].iter().any(|end| rest.ends_with(end));
        if host.is_empty() || is_of_run && !PathBuf::from(host).exists() {
            return Err("expected DIR[:GUEST][:ro|rw], as in /srv/data:rw".into());
        }
        let host = std::path::absolute(host).map_err(|e| e.to_string())?;
        let guest = if guest.is_empty() { host.clone() } else { guest.into() };
        if !guest.is_absolute() {
            return Err(format!("the guest path '{}' is not absolute", guest.display()));
        }
        Ok(Folder { host, guest, writable })
    }
}

/// Command to run, and its environment.
#[derive(Clone, Debug)]
pub struct Command {
    /// Command and arguments; empty for a shell.
    pub words: Vec<OsString>,
    /// `NAME=VALUE`, or `NAME` for vireo's own value, or `*` for all of vireo's own variables.
    pub env: Vec<OsString>,
    /// Working directory; by default vireo's own, if the guest's root is the host's.
    pub cwd: Option<PathBuf>,
    /// Give the command an empty standard input and leave vireo's own alone.
    pub no_input: bool,
    /// Root file system.
    pub root: RootFrom,
    /// Let writes to the root reach the host.
    pub writable: bool,
    /// Shared folders.
    pub folders: Vec<Folder>,
    /// Directory of the kernel's modules.
    pub modules: Option<PathBuf>,
    /// Set if the kernel's console is read or watched for a line. Otherwise the kernel prints less and boots sooner.
    pub watched: bool,
}

/// Error: a command cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No kernel was named, and the host has none.
    #[error("there is no kernel in {BOOT} ({BOOT}/vmlinuz-*); give --kernel FILE")]
    NoKernel,
    /// The host has kernels, but vireo may not read them.
    #[error(
        "only root may read {}, as on Ubuntu; run 'sudo chmod +r {}' or give --kernel FILE",
        .0.display(), .0.display()
    )]
    SecretKernel(PathBuf),
    /// The root file system cannot be used.
    #[error("cannot use {} as the root", .0.display())]
    Root(PathBuf, #[source] io::Error),
    /// An environment variable is invalid.
    #[error(transparent)]
    Environment(#[from] environment::NoName),
    /// The host refused a resource.
    #[error("cannot set up {0}")]
    Host(&'static str, #[source] io::Error),
}

/// Returns the newest kernel of this host that vireo may read.
pub fn host_kernel() -> Result<PathBuf, Error> {
    let entries = fs::read_dir(BOOT).map_err(|_| Error::NoKernel)?.flatten();
    let mut kernels: Vec<(Vec<u64>, PathBuf)> = entries
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            Some((numbers(name.strip_prefix("vmlinuz-")?), entry.path()))
        })
        .collect();
    kernels.sort();
    let newest = kernels.last().map(|(_, path)| path.clone()).ok_or(Error::NoKernel)?;
    let readable = kernels.into_iter().rev().map(|(_, path)| path).find(|path| File::open(path).is_ok());
    readable.ok_or(Error::SecretKernel(newest))
}

/// Returns the numbers in a version, so that 6.10 is newer than 6.9.
fn numbers(version: &str) -> Vec<u64> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
}

/// Session of a command that is about to run: the host end of its control port, and descriptors that the machine needs.
pub struct Session {
    control: UnixStream,
    /// The port's other end and the request, held until the machine has its own copies.
    _held: Vec<OwnedFd>,
    terminal: bool,
    /// Place for the message if the command does not start.
    place: Place,
}

/// Directory in which a command starts.
struct Place {
    cwd: PathBuf,
    /// Set if the guest sees the same files as this process.
    ours: bool,
}

impl Command {
    /// Adds what the command needs to the machine that the user described.
    pub fn prepare(&self, config: &mut MachineConfig) -> Result<Session, Error> {
        let streams = Streams::look(self.no_input);
        let root = self.add_root(config)?;
        let mut mounts = Vec::new();
        for (folder, n) in self.folders.iter().zip(0..) {
            let tag = format!("folder{n}");
            mounts.push(Mount { tag: tag.clone(), path: folder.guest.as_os_str().into(), writable: folder.writable });
            let readonly = !folder.writable;
            config.shares.push(FsConfig { path: folder.host.clone(), tag: Some(tag), readonly, ..FsConfig::default() });
        }
        let modules = self.show_modules(config, &mut mounts);
        let place = Place { cwd: self.start(), ours: self.root == RootFrom::Path("/".into()) };
        let request = Request {
            command: self.words.iter().map(|word| word.as_os_str().into()).collect(),
            env: self.environment(streams.terminal.is_some())?,
            cwd: place.cwd.as_os_str().into(),
            cwd_given: self.cwd.is_some(),
            home_given: self.names_home(),
            terminal: streams.terminal,
            merged: streams.merged,
            root,
            mounts,
            modules,
            network: !config.nets.is_empty(),
            name_server: config.nets.first().filter(|net| net.user && !net.map_gateway).map(|_| passt::NAME_SERVER),
        };
        let request = in_memory(&request).map_err(|e| Error::Host("the request to the guest", e))?;
        let (control, theirs) = UnixStream::pair().map_err(|e| Error::Host("a pair of sockets", e))?;
        let nothing = self.no_input.then(|| File::open("/dev/null")).transpose();
        let nothing = nothing.map_err(|e| Error::Host("an empty input", e))?;
        let ends = [
            (CONTROL, ConsoleEnd::Fd(theirs.as_raw_fd())),
            (STDIN, nothing.as_ref().map_or(ConsoleEnd::Stdin, |nothing| ConsoleEnd::Fd(nothing.as_raw_fd()))),
            (STDOUT, ConsoleEnd::Stdout),
            (STDERR, ConsoleEnd::Stderr),
        ];
        let wanted = ends.len() - usize::from(streams.merged);
        let port = |(name, to): (&str, _)| PortConfig { name: name.into(), to, from: None };
        config.console_ports.extend(ends.into_iter().take(wanted).map(port));
        if config.serial == ConsoleEnd::Stdio {
            config.serial = ConsoleEnd::Null;
        }
        let quiet = if self.watched { "" } else { " quiet" };
        config.boot.cmdline = format!("{CMDLINE}{quiet} {}", config.boot.cmdline).trim_end().to_string();
        self.pack(config, &request);
        let (mut held, terminal) = (vec![theirs.into(), request.into()], streams.terminal.is_some());
        held.extend(nothing.map(OwnedFd::from));
        Ok(Session { control, _held: held, terminal, place })
    }

    /// Returns the directory in which the command starts: vireo's own, if the guest sees the same files.
    fn start(&self) -> PathBuf {
        let here = || env::current_dir().ok().filter(|_| self.root == RootFrom::Path("/".into()));
        let given = self.cwd.as_ref().map(|dir| std::path::absolute(dir).unwrap_or_else(|_| dir.clone()));
        given.or_else(here).unwrap_or_else(|| "/".into())
    }

    /// Returns the command line as text for people.
    pub fn title(&self) -> String {
        let words: Vec<_> = self.words.iter().map(|word| word.to_string_lossy()).collect();
        if words.is_empty() { "a shell".into() } else { words.join(" ") }
    }

    /// Configures the initramfs: this program, the request, modules.
    fn pack(&self, config: &mut MachineConfig, request: &File) {
        let initramfs = config.boot.initramfs.get_or_insert_with(InitramfsConfig::default);
        initramfs.init = Some("/proc/self/exe".into());
        let host = format!("/proc/self/fd/{}", request.as_raw_fd()).into();
        initramfs.files.push(FileConfig { host, guest: REQUEST.into() });
        if self.root == RootFrom::Initramfs {
            initramfs.busybox.get_or_insert_with(|| "busybox".into());
        }
        let modules = initramfs.modules.get_or_insert_with(ModulesConfig::default);
        modules.dir = self.modules.clone().or(modules.dir.take());
        let with = |wanted: bool, names: &[&str]| -> Vec<String> {
            names.iter().filter(|_| wanted).map(ToString::to_string).collect()
        };
        let overlay = self.root != RootFrom::Initramfs && (!self.writable || self.modules.is_some());
        modules.names.extend(with(true, &MODULES));
        modules.names.extend(with(!config.shares.is_empty(), &["virtiofs"]));
        modules.names.extend(with(overlay, &["overlay"]));
        modules.names.extend(with(!config.disks.is_empty(), &["virtio_blk"]));
        modules.optional.extend(with(!config.disks.is_empty(), &DISK_MODULES));
        modules.names.extend(with(!config.nets.is_empty(), &["virtio_net"]));
        modules.optional.extend(with(!config.nets.is_empty(), &["af_packet"]));
        modules.names.extend(with(config.vsock.is_some(), &["vmw_vsock_virtio_transport"]));
        modules.optional.extend(with(config.rng.is_some(), &["virtio_rng"]));
        modules.optional.extend(with(config.balloon.is_some(), &["virtio_balloon"]));
        modules.optional.extend(with(config.virtio_mem.is_some(), &["virtio_mem"]));
        modules.optional.extend(with(!config.pmems.is_empty(), &["nd_pmem", "virtio_pmem"]));
    }

    /// Returns all environment variables of the command.
    fn environment(&self, terminal: bool) -> Result<Vec<(Bytes, Bytes)>, Error> {
        let same_root = self.root == RootFrom::Path("/".into());
        let pairs = environment::of_command(&environment::ours(), &self.env, same_root, terminal, &self.home())?;
        Ok(pairs.iter().map(|(name, value)| (name.as_os_str().into(), value.as_os_str().into())).collect())
    }
}

/// Properties of vireo's own standard streams.
struct Streams {
    /// Size of the terminal, if input and output are both on one.
    terminal: Option<(u16, u16)>,
    /// Set if both outputs lead to the same place.
    merged: bool,
}

impl Streams {
    fn look(no_input: bool) -> Self {
        let reads = !no_input && terminal::is_terminal(libc::STDIN_FILENO);
        let both = reads && terminal::is_terminal(libc::STDOUT_FILENO);
        let terminal = both.then(|| terminal::window_size(libc::STDOUT_FILENO).unwrap_or((80, 24)));
        let place = |fd: io::Result<rustix::fs::Stat>| fd.ok().map(|stat| (stat.st_dev, stat.st_ino));
        let (out, err) = (rustix::fs::fstat(io::stdout()), rustix::fs::fstat(io::stderr()));
        let (out, err) = (place(out.map_err(Into::into)), place(err.map_err(Into::into)));
        // Comparing inodes is not enough: a terminal can have several names.
        let on_terminal = terminal.is_some() && terminal::is_terminal(libc::STDERR_FILENO);
        Streams { terminal, merged: on_terminal || out.is_some() && out == err }
    }
}

/// An unnamed in-memory file with the request.
fn in_memory(request: &Request) -> io::Result<File> {
    let mut file = File::from(rustix::fs::memfd_create("vireo-request", MemfdFlags::CLOEXEC)?);
    file.write_all(&serde_json::to_vec(request)?)?;
    Ok(file)
}

/// Sender of orders to the guest. Cloning shares the port.
#[derive(Clone)]
pub struct Orders(Arc<Mutex<Talk>>);

struct Talk {
    control: UnixStream,
    /// Signals that arrived before the command started, each once; `None` from the start on.
    waiting: Option<Vec<i32>>,
}

impl Orders {
    fn new(control: UnixStream) -> Self {
        Orders(Arc::new(Mutex::new(Talk { control, waiting: Some(Vec::new()) })))
    }

    /// Passes a signal on to the command once it runs. Returns whether the signal is or will be passed on.
    pub fn signal(&self, signal: i32) -> bool {
        let mut talk = self.lock();
        if signal == libc::SIGWINCH {
            return terminal::window_size(libc::STDOUT_FILENO)
                .is_some_and(|(columns, rows)| talk.send(&Order::Resize(columns, rows)));
        }
        match &mut talk.waiting {
            Some(waiting) if waiting.contains(&signal) => true,
            Some(waiting) => {
                waiting.push(signal);
                true
            }
            None => talk.send(&Order::Signal(signal)),
        }
    }

    /// Passes on the signals that have waited for the command's start. Returns false if the command was already
    /// running.
    fn started(&self) -> bool {
        let mut talk = self.lock();
        let Some(waiting) = talk.waiting.take() else { return false };
        waiting.into_iter().for_each(|signal| _ = talk.send(&Order::Signal(signal)));
        true
    }

    fn lock(&self) -> MutexGuard<'_, Talk> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Talk {
    /// Sends an order; fails if the guest does not read its orders.
    fn send(&mut self, order: &Order) -> bool {
        let Ok(line) = serde_json::to_string(order) else { return false };
        self.control.write_all(format!("{line}\n").as_bytes()).is_ok()
    }
}

impl Session {
    /// Returns whether the command gets a terminal; the user's terminal is then in raw mode.
    pub fn terminal(&self) -> bool {
        self.terminal
    }

    /// Handles the guest's reports, and stops the machine at the last one. Must be called once the machine is created;
    /// `words` are for messages.
    pub fn listen(self, machine: Controller, words: &[OsString]) -> Result<Orders, Error> {
        let failed = |e| Error::Host("communication with the guest", e);
        let reports = BufReader::new(self.control.try_clone().map_err(failed)?);
        self.control.set_nonblocking(false).map_err(failed)?;
        // The write must never wait for a guest that does not read.
        self.control.set_write_timeout(Some(std::time::Duration::from_millis(100))).map_err(failed)?;
        let orders = Orders::new(self.control);
        let started = orders.clone();
        let name = words.first().map_or("a shell".into(), |word| word.to_string_lossy().into_owned());
        let place = self.place;
        let hear = move || hear(reports, &started, &machine, &name, &place);
        thread::Builder::new().name("reports".into()).stack_size(128 << 10).spawn(hear).map_err(failed)?;
        Ok(orders)
    }
}

fn hear(mut reports: BufReader<UnixStream>, orders: &Orders, machine: &Controller, name: &str, place: &Place) {
    let (mut line, mut moved) = (String::new(), false);
    // An overlong line, a line that is not a report, or a second start ends the protocol; then only the way in which
    // the guest ends counts.
    while reports.by_ref().take(LINE_MAX as u64).read_line(&mut line).is_ok_and(|len| len > 0) {
        let Ok(report) = serde_json::from_str(&line) else { return };
        line.clear();
        let outcome = match report {
            Report::Started if orders.started() => {
                machine.init_started();
                continue;
            }
            Report::StartsInRoot(errno) if !moved => {
                moved = true;
                let error = io::Error::from_raw_os_error(errno);
                warn!("cannot start in {} in the guest: {error}; the command starts in /", place.cwd.display());
                continue;
            }
            Report::Started | Report::StartsInRoot(_) => return,
            Report::Exited(code) => Outcome::Exited(code),
            Report::Signalled(signal) => Outcome::Signalled(signal),
            Report::NotReady(why) => Outcome::NotReady(format!(
                "cannot prepare the guest: {}",
                printable(&why.chars().take(WHY_MAX).collect::<String>())
            )),
            Report::NotStarted(errno) => not_started(errno, name, place),
            Report::NoCwd(errno) => {
                let error = io::Error::from_raw_os_error(errno);
                Outcome::NotStarted(126, format!("cannot start in {} in the guest: {error}", place.cwd.display()))
            }
        };
        return machine.stop(outcome);
    }
}

/// Returns the outcome of a command that did not start, with the codes of shells: 127 if it was not found, 126 if it
/// cannot be run.
fn not_started(errno: i32, name: &str, place: &Place) -> Outcome {
    let code = if errno == libc::ENOENT { 127 } else { 126 };
    let is_there = || place.ours && !name.is_empty() && place.cwd.join(name).exists();
    let hint = match errno {
        libc::ENOEXEC => " (another architecture, or a script without #!)".into(),
        libc::ENOENT if !is_there() => String::new(),
        libc::ENOENT if name.contains('/') => " (the interpreter or loader that it names is not in the guest)".into(),
        libc::ENOENT => format!(" (it is not in PATH; there is a ./{name})"),
        _ => String::new(),
    };
    let error = io::Error::from_raw_os_error(errno);
    let name = if name.is_empty() { "''" } else { name };
    Outcome::NotStarted(code, format!("cannot run {name} in the guest: {error}{hint}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newer_kernels_are_newer() {
        assert!(numbers("6.10.0-1-amd64") > numbers("6.9.12-3-amd64"));
        assert!(numbers("6.1.0-9") < numbers("6.1.0-56"));
    }

    #[test]
    fn folders() {
        let folder = |text: &str| text.parse::<Folder>();
        let plain = folder("/srv/a").unwrap();
        assert_eq!(
            (plain.host.as_path(), plain.guest.as_path(), plain.writable),
            ("/srv/a".as_ref(), "/srv/a".as_ref(), false)
        );
        let full = folder("/srv/a:/mnt:rw").unwrap();
        assert_eq!((full.guest.as_path(), full.writable), ("/mnt".as_ref(), true));
        assert!(folder("/srv/a:rw").unwrap().writable);
        assert!(folder("").is_err() && folder("/a:b").is_err());
        assert_eq!(folder("/no/such,readonly").unwrap_err(), "expected DIR[:GUEST][:ro|rw], as in /srv/data:rw");
        assert!("".parse::<RootFrom>().is_err());
    }

    #[test]
    fn what_could_not_be_started_has_the_codes_of_shells() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("script"), "").unwrap();
        let mut place = Place { cwd: dir.path().into(), ours: true };
        let missing = |name: &str, place: &Place| match not_started(libc::ENOENT, name, place) {
            Outcome::NotStarted(127, text) => text,
            outcome => panic!("{outcome:?}"),
        };
        let plain = "No such file or directory (os error 2)";
        assert_eq!(missing("nosuch", &place), format!("cannot run nosuch in the guest: {plain}"));
        let there = missing("script", &place);
        assert_eq!(there, format!("cannot run script in the guest: {plain} (it is not in PATH; there is a ./script)"));
        assert!(missing("./script", &place).ends_with("names is not in the guest)"));
        place.ours = false;
        assert_eq!(missing("./script", &place), format!("cannot run ./script in the guest: {plain}"));
        assert!(matches!(not_started(libc::EACCES, "x", &place), Outcome::NotStarted(126, _)));
    }

    #[test]
    fn reports_stop_the_machine() {
        let mailbox = crate::machine::mailbox::Mailbox::new().unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let session =
            Session { control: ours, _held: Vec::new(), terminal: false, place: Place { cwd: "/".into(), ours: true } };
        let orders = session.listen(Controller::new(mailbox.clone()), &["true".into()]).unwrap();
        // Signals wait for the command, each once.
        assert!([libc::SIGINT, libc::SIGTERM, libc::SIGINT].iter().all(|signal| orders.signal(*signal)));
        theirs.write_all(b"\"started\"\n{\"exited\":3}\n").unwrap();
        let next = || loop {
            match mailbox.take_request() {
                Some(request) => break request,
                None => thread::yield_now(),
            }
        };
        assert!(matches!(next(), crate::machine::mailbox::Request::InitStarted));
        assert!(matches!(next(), crate::machine::mailbox::Request::Stop(Outcome::Exited(3))));
        assert!(orders.signal(libc::SIGTERM));
        let mut theirs = BufReader::new(theirs);
        for signal in [2, 15, 15] {
            let mut line = String::new();
            theirs.read_line(&mut line).unwrap();
            assert_eq!(line, format!("{{\"signal\":{signal}}}\n"));
        }
    }

    #[test]
    fn a_second_start_ends_the_talk() {
        let mailbox = crate::machine::mailbox::Mailbox::new().unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"\"started\"\n\"started\"\n\"started\"\n{\"exited\":3}\n").unwrap();
        let orders = Orders::new(ours.try_clone().unwrap());
        let place = Place { cwd: "/".into(), ours: true };
        hear(BufReader::new(ours), &orders, &Controller::new(mailbox.clone()), "true", &place);
        let requests: Vec<_> = std::iter::from_fn(|| mailbox.take_request()).collect();
        assert!(matches!(requests[..], [crate::machine::mailbox::Request::InitStarted]));
    }
}
