//! Guests for the tests: runs the real release binary where Linux guests run (`tests/host/run`), with the test's script
//! in the guest, and waits for its output and its end. A test that cannot run fails and says why. Every wait has a
//! deadline, and its message shows the output until then.

#![allow(dead_code)] // each test file uses its part

pub mod kernels;
pub mod net;
pub mod programs;

use std::cell::Cell;
use std::fs::{self, File};
use std::io::{self, Cursor, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, LazyLock, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

const REPO: &str = env!("CARGO_MANIFEST_DIR");
/// Time limit for a boot with everything that a test does in it. A quiet boot takes a few seconds in the emulated host,
/// more when the machine is busy; this limit is for a guest that makes no progress any more.
const DEADLINE: Duration = Duration::from_secs(if LONG { 900 } else { 180 });
/// True in the long tests (`make soak`), in which a single step may be minutes of work.
const LONG: bool = matches!(env!("CARGO_CRATE_NAME").as_bytes(), [b's', b'o', b'a', b'k', ..]);

/// Returns a path below the checkout.
pub fn repo(path: &str) -> PathBuf {
    Path::new(REPO).join(path)
}

/// Path of a kernel or initramfs that `tests/host/setup` created.
pub fn image(name: &str) -> PathBuf {
    let path = repo("target/host/images").join(name);
    assert!(path.exists(), "{} is missing: run 'tests/host/setup test' (for make soak: 'soak')", path.display());
    path
}

/// Creates a folder for one test that guests' monitors can write to, wherever they run.
pub fn scratch() -> TempDir {
    let share = repo("target/host/share");
    fs::create_dir_all(&share).unwrap();
    tempfile::Builder::new().prefix("test.").tempdir_in(share).unwrap()
}

/// Path of the binary under test.
pub fn vireo() -> PathBuf {
    let default = || repo("target/x86_64-unknown-linux-gnu/release/vireo");
    let path = std::env::var_os("VIREO_BIN").map_or_else(default, PathBuf::from);
    assert!(path.exists(), "there is no vireo at {}: run 'make build', or set VIREO_BIN", path.display());
    path
}

/// Emulated hosts (`$hosts` in tests/host/lib.sh) that no test uses now.
static FREE_HOSTS: (LazyLock<Mutex<Vec<&str>>>, Condvar) =
    (LazyLock::new(|| Mutex::new(vec!["b", "a"])), Condvar::new());

/// Emulated host of the test in this thread, from its first guest until the test ends: all guests of the test run
/// there, and no other test's, however many tests run at a time. (Every test ends, so others wait for its host without
/// a deadline of their own.)
struct HostOfTest(&'static str);

thread_local! {
    static HOST: HostOfTest = HostOfTest::take();
}

impl HostOfTest {
    fn take() -> Self {
        let mut free = FREE_HOSTS.1.wait_while(FREE_HOSTS.0.lock().unwrap(), |free| free.is_empty()).unwrap();
        HostOfTest(free.pop().unwrap())
    }
}

impl Drop for HostOfTest {
    fn drop(&mut self) {
        FREE_HOSTS.0.lock().unwrap().push(self.0);
        FREE_HOSTS.1.notify_one();
    }
}

/// Command `tests/host/run` on this test's host, without its options.
fn run_on_host() -> Command {
    let mut command = Command::new(repo("tests/host/run"));
    HOST.with(|host| command.args(["--on", host.0]));
    hears_signals(&mut command);
    command
}

/// Makes `command` start as from a terminal, even if the tests run under `nohup` or in the background of a script,
/// where the signals that they send are ignored.
#[allow(unsafe_code)]
pub fn hears_signals(command: &mut Command) {
    // SAFETY: system calls that touch no memory.
    unsafe {
        command.pre_exec(|| {
            for signal in [libc::SIGINT, libc::SIGQUIT, libc::SIGHUP] {
                libc::signal(signal, libc::SIG_DFL);
            }
            Ok(())
        });
    }
}

/// Runs a program other than vireo where vireo runs, with pipes for its streams.
pub fn on_host(args: &[&str]) -> Guest {
    let mut command = run_on_host();
    command.arg("--").args(args);
    Guest::spawn(command, scratch(), Streams::Pipes)
}

/// Returns the output of a program of this machine, which must succeed.
pub fn tool(args: &[&str]) -> String {
    // Tools of e2fsprogs may be in directories that are not in a user's PATH.
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let output = Command::new(args[0]).args(&args[1..]).env("PATH", path).output();
    let output = output.unwrap_or_else(|e| panic!("{}: {e}: run 'make setup'", args[0]));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{args:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// Shell: creates a folder of the host for one test in `$dir`, which is removed with the script. It is on the host's
/// scratch disk, as 9p and tmpfs lack much (direct I/O, xattrs, holes); elsewhere it is a temporary one.
pub const FOLDER: &str = r#"
base=/run/scratch
[ -w $base ] || base=/var/tmp
dir=$(mktemp -d $base/test.XXXXXX)
trap 'rm -rf $dir' EXIT
chmod 755 $dir
cd $dir
"#;

/// Path of an example that cargo builds for the tests.
pub fn example(name: &str) -> String {
    let deps = std::env::current_exe().unwrap();
    let path = deps.ancestors().nth(2).unwrap().join("examples").join(name);
    assert!(path.exists(), "{} is missing: 'cargo test' without '--test' builds it", path.display());
    path.display().to_string()
}

/// Writes the test guest's initramfs, followed by a second cpio with the test's files.
fn initrd(path: &Path, files: &[(&str, &[u8])]) {
    let mut file = File::create(path).unwrap();
    io::copy(&mut File::open(image("initrd-busybox.cpio")).unwrap(), &mut file).unwrap();
    let entries =
        files.iter().map(|(name, content)| (cpio::NewcBuilder::new(name).mode(0o100_755), Cursor::new(content)));
    cpio::write_cpio(entries, file).unwrap();
}

/// A `vireo run` or `vireo exec` that is about to be started.
pub struct Run {
    /// Folder of this run; the report will be in its `report.json`.
    pub dir: TempDir,
    args: Vec<String>,
    wrapper: Vec<String>,
    env: Vec<String>,
    /// Kernel command line of `vireo run`.
    cmdline: String,
    /// Command of `vireo exec`.
    words: Option<Vec<String>>,
}

impl Run {
    /// Prepares `vireo exec` with the stock kernel and its modules, and the host's root.
    pub fn exec(words: &[&str]) -> Self {
        Self::exec_with(&image("bzImage-cloud"), &repo("target/host/kernel-cloud"), words)
    }

    /// Prepares `vireo exec` with another kernel or other modules. Without words, the test's script adds its own.
    pub fn exec_with(kernel: &Path, modules: &Path, words: &[&str]) -> Self {
        Self::exec_alone(kernel, words).args(&["--modules", &modules.display().to_string()])
    }

    /// Prepares `vireo exec` with a kernel whose modules vireo finds by itself.
    pub fn exec_alone(kernel: &Path, words: &[&str]) -> Self {
        let words = Some(words.iter().map(ToString::to_string).collect());
        let run = Run { dir: scratch(), args: vec![], wrapper: vec![], env: vec![], cmdline: String::new(), words };
        let report = run.path("report.json");
        run.args(&["--kernel", &kernel.display().to_string(), "--report", &report])
    }

    /// Prepares a run of `kernel` (an image's name, or a path) with a guest that runs `script` and powers off.
    pub fn new(kernel: &str, script: &str) -> Self {
        let dir = scratch();
        initrd(&dir.path().join("initrd"), &[("test.sh", script.as_bytes())]);
        let kernel = if kernel.starts_with('/') { PathBuf::from(kernel) } else { image(kernel) };
        let run =
            Run { dir, args: vec![], wrapper: vec![], env: vec![], cmdline: "console=ttyS0 quiet".into(), words: None };
        let (initrd, report) = (run.path("initrd"), run.path("report.json"));
        run.args(&["--kernel", &kernel.display().to_string(), "--initrd", &initrd, "--report", &report])
    }

    /// Adds the modules of a kernel. (The initramfs has those of the kernels of `make demo`.)
    pub fn with_modules(self, kernel: &str) -> Self {
        let mut file = File::options().append(true).open(self.dir.path().join("initrd")).unwrap();
        if !["cloud", "full"].contains(&kernel) {
            io::copy(&mut File::open(image(&format!("modules-{kernel}.cpio"))).unwrap(), &mut file).unwrap();
        }
        self
    }

    /// Adds a program that `tests/host/setup` built to the guest's `/bin`.
    pub fn with_program(self, name: &str) -> Self {
        let file = File::options().append(true).open(self.dir.path().join("initrd")).unwrap();
        let program = File::open(image(name)).unwrap();
        cpio::write_cpio([(cpio::NewcBuilder::new(&format!("bin/{name}")).mode(0o100_755), program)].into_iter(), file)
            .unwrap();
        self
    }

    /// Returns a path in the run's own folder.
    pub fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    pub fn args(mut self, args: &[&str]) -> Self {
        self.args.extend(args.iter().map(ToString::to_string));
        self
    }

    /// Replaces the command line `console=ttyS0 quiet`.
    pub fn cmdline(mut self, cmdline: &str) -> Self {
        self.cmdline = cmdline.into();
        self
    }

    /// Runs vireo by `bash -c SCRIPT`, which finds vireo with its arguments in `"$@"`.
    pub fn through(self, script: &str) -> Self {
        self.through_with(script, "bash")
    }

    /// Runs vireo as [`Run::through`] does, with another program in `$0`. (The emulated host is sure to run the current
    /// version of a program only if that is a word of the command line.)
    pub fn through_with(mut self, script: &str, program: &str) -> Self {
        self.wrapper = ["bash", "-c", script, program].map(String::from).into();
        self
    }

    pub fn env(mut self, pair: &str) -> Self {
        self.env.extend(["--env".to_string(), pair.to_string()]);
        self
    }

    fn command(&self, options: &[&str]) -> Command {
        let mut command = run_on_host();
        command.args(options).args(["--env", "XDG_CACHE_HOME=/tmp/vireo-test-cache"]).args(&self.env).arg("--");
        command.args(&self.wrapper).arg(vireo());
        match &self.words {
            None => command.arg("run").args(&self.args).args(["--cmdline", &self.cmdline]),
            Some(words) if words.is_empty() => command.arg("exec").args(&self.args),
            Some(words) => command.arg("exec").args(&self.args).arg("--").args(words),
        };
        command
    }

    /// Starts vireo with pipes for all its streams.
    pub fn start(self) -> Guest {
        let command = self.command(&[]);
        Guest::spawn(command, self.dir, Streams::Pipes)
    }

    /// Starts vireo on a terminal: `prepare` changes the command, and returns the terminal's other side.
    pub fn start_on_terminal(self, prepare: impl FnOnce(&mut Command) -> File) -> Guest {
        let mut command = self.command(&["--tty"]);
        let master = prepare(&mut command);
        Guest::spawn(command, self.dir, Streams::Terminal(master))
    }

    /// Starts vireo and waits for its end.
    pub fn run_to_end(self) -> Ended {
        self.start().end()
    }
}

/// Opens both sides of a new terminal, which no program inherits that another test starts in the meantime.
pub fn terminal() -> (OwnedFd, OwnedFd) {
    use rustix::pty::{OpenptFlags, openpt, ptsname, unlockpt};
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap();
    let terminal = File::options().read(true).write(true).custom_flags(libc::O_NOCTTY).open(name.to_str().unwrap());
    (master, terminal.unwrap().into())
}

/// Makes `command` run as the foreground job of a new terminal; returns the side on which a user types.
#[allow(unsafe_code)]
pub fn on_terminal(command: &mut Command) -> File {
    let (master, terminal) = terminal();
    command.stdin(terminal.try_clone().unwrap()).stdout(Stdio::from(terminal));
    // SAFETY: two system calls that touch no memory.
    unsafe {
        command.pre_exec(|| {
            libc::setsid();
            libc::ioctl(0, libc::TIOCSCTTY, 0);
            Ok(())
        });
    }
    master.into()
}

enum Streams {
    Pipes,
    Terminal(File),
}

/// Output of a stream so far.
#[derive(Clone, Default)]
struct Seen(Arc<(Mutex<Stream>, Condvar)>);

#[derive(Default)]
struct Stream {
    bytes: Vec<u8>,
    ended: bool,
}

impl Seen {
    fn collect(mut stream: impl Read + Send + 'static) -> Seen {
        let seen = Seen::default();
        let collected = seen.clone();
        thread::spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            loop {
                let n = stream.read(&mut buffer).unwrap_or(0); // a terminal ends with EIO
                let mut state = collected.0.0.lock().unwrap();
                state.bytes.extend_from_slice(&buffer[..n]);
                state.ended = n == 0;
                collected.0.1.notify_all();
                if n == 0 {
                    return;
                }
            }
        });
        seen
    }

    /// Waits until `found` accepts the output, the stream ends or the deadline passes. Returns the output, and whether
    /// `found` accepts it.
    fn wait(&self, deadline: Instant, found: impl Fn(&[u8]) -> bool) -> (Vec<u8>, bool) {
        let mut state = self.0.0.lock().unwrap();
        while !found(&state.bytes) && !state.ended && Instant::now() < deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            state = self.0.1.wait_timeout(state, left).unwrap().0;
        }
        (state.bytes.clone(), found(&state.bytes))
    }
}

/// A running vireo, which is killed when dropped.
pub struct Guest {
    child: Child,
    input: Option<Box<dyn Write + Send>>,
    stdout: Seen,
    stderr: Seen,
    /// Folder of the run.
    pub dir: TempDir,
}

impl Guest {
    fn spawn(mut command: Command, dir: TempDir, streams: Streams) -> Guest {
        if let Streams::Pipes = streams {
            command.stdin(Stdio::piped()).stdout(Stdio::piped());
        }
        let mut child = command.stderr(Stdio::piped()).spawn().expect("tests/host/run does not start");
        drop(command); // its copies of a terminal would keep that open
        let stderr = Seen::collect(child.stderr.take().unwrap());
        let (input, stdout): (Box<dyn Write + Send>, _) = match streams {
            Streams::Pipes => (Box::new(child.stdin.take().unwrap()), Seen::collect(child.stdout.take().unwrap())),
            Streams::Terminal(master) => (Box::new(master.try_clone().unwrap()), Seen::collect(master)),
        };
        Guest { child, input: Some(input), stdout, stderr, dir }
    }

    /// Waits until stdout (by default the guest's console) has shown `text`.
    pub fn wait_for(&self, text: &str) -> String {
        self.wait("stdout", &self.stdout, text)
    }

    /// Waits until `wanted` accepts stdout.
    pub fn wait_until(&self, wanted: impl Fn(&str) -> bool) -> String {
        let (bytes, found) =
            self.stdout.wait(Instant::now() + DEADLINE, |bytes| wanted(&String::from_utf8_lossy(bytes)));
        assert!(found, "stdout did not show what the test waits for; {}", self.tails());
        lines(&bytes)
    }

    /// Waits until vireo's stderr has shown `text`.
    pub fn wait_for_stderr(&self, text: &str) -> String {
        self.wait("stderr", &self.stderr, text)
    }

    /// Waits until stdout or stderr has shown `text`: on a terminal of the emulated host both are one stream.
    pub fn wait_for_either(&self, text: &str) {
        let deadline = Instant::now() + DEADLINE;
        let shown = |stream: &Seen| String::from_utf8_lossy(&stream.0.0.lock().unwrap().bytes).contains(text);
        while !shown(&self.stdout) && !shown(&self.stderr) {
            assert!(Instant::now() < deadline, "'{text}' did not appear; {}", self.tails());
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn wait(&self, name: &str, stream: &Seen, text: &str) -> String {
        let searched = Cell::new(0usize);
        let found = |bytes: &[u8]| {
            let from = searched.get().saturating_sub(text.len());
            let found = bytes[from..].windows(text.len()).any(|w| w == text.as_bytes());
            searched.set(if found { 0 } else { bytes.len() });
            found
        };
        let (bytes, found) = stream.wait(Instant::now() + DEADLINE, found);
        assert!(found, "'{text}' did not appear on {name}; {}", self.tails());
        lines(&bytes)
    }

    /// Returns the end of the output, for messages.
    pub fn tails(&self) -> String {
        let tail = |stream: &Seen| {
            let bytes = stream.0.0.lock().unwrap().bytes.clone();
            lines(&bytes[bytes.len().saturating_sub(1500)..])
        };
        format!("the end of stdout:\n{}\nthe end of stderr:\n{}", tail(&self.stdout), tail(&self.stderr))
    }

    /// Sends input to vireo.
    pub fn send(&mut self, bytes: &[u8]) {
        let input = self.input.as_mut().expect("input was closed");
        input.write_all(bytes).and_then(|()| input.flush()).expect("vireo does not take input");
    }

    /// Closes vireo's input.
    pub fn close_input(&mut self) {
        self.input = None;
    }

    /// Sends a signal to vireo, by way of the program that runs it.
    pub fn signal(&self, signal: i32) {
        let pid = self.child.id().to_string();
        let status = Command::new("kill").args([format!("-{signal}"), pid]).status().unwrap();
        assert!(status.success(), "kill failed");
    }

    /// Waits for the end of vireo. Its input stays open until then, unless it was closed.
    pub fn end(mut self) -> Ended {
        let deadline = Instant::now() + DEADLINE;
        let (stdout, _) = self.stdout.wait(deadline, |_| false);
        let (stderr, _) = self.stderr.wait(deadline, |_| false);
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None => assert!(Instant::now() < deadline, "vireo did not end; {}", self.tails()),
            }
            thread::sleep(Duration::from_millis(10)); // its streams have ended, so it is about to end
        };
        let report = fs::read(self.dir.path().join("report.json")).ok();
        let report = report.map_or(Value::Null, |json| serde_json::from_slice(&json).expect("the report is not JSON"));
        Ended { status, bytes: stdout.clone(), stdout: lines(&stdout), stderr: lines(&stderr), report }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Result of a run.
#[derive(Debug)]
pub struct Ended {
    status: ExitStatus,
    /// stdout, unchanged.
    pub bytes: Vec<u8>,
    /// stdout as text, with the terminal's CR LF as plain newlines.
    pub stdout: String,
    pub stderr: String,
    pub report: Value,
}

impl Ended {
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }

    /// Checks the exit status and the report.
    pub fn expect(self, code: i32, outcome: &str) -> Ended {
        let reported = (self.report["exit_code"].as_i64(), self.report["outcome"].as_str());
        assert_eq!((self.code(), reported), (code, (Some(code.into()), Some(outcome))), "{self}");
        self
    }

    /// Checks that the guest ran its script to the end, successfully, and powered off.
    pub fn success(self) -> Ended {
        let ended = self.expect(0, "powered-off");
        assert!(ended.stdout.contains("/test.sh ended with status 0"), "{ended}");
        ended
    }

    /// Returns the rest of the console's line that begins with `name` and a colon.
    pub fn fact(&self, name: &str) -> &str {
        let found = self.stdout.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        found.unwrap_or_else(|| panic!("the guest did not say '{name}: '; {self}"))
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let start = self.stdout.len().saturating_sub(4000);
        let stdout = self.stdout.get(start..).unwrap_or(&self.stdout);
        write!(f, "{}; report {}\nstdout:\n{stdout}\nstderr:\n{}", self.status, self.report, self.stderr)
    }
}

fn lines(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).replace('\r', "")
}

/// Returns the resident memory of a process in the test's host, in bytes.
pub fn resident(pid: &str) -> u64 {
    let rollup = on_host(&["grep", "^Rss:", &format!("/proc/{pid}/smaps_rollup")]).end();
    let kib = rollup.stdout.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok());
    kib.unwrap_or_else(|| panic!("{rollup}")) << 10
}

/// Calls `look` until `wanted` accepts its result; returns that.
pub fn until<T: std::fmt::Debug>(what: &str, mut look: impl FnMut() -> T, wanted: impl Fn(&T) -> bool) -> T {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let found = look();
        if wanted(&found) {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: {found:?}");
        thread::sleep(Duration::from_millis(300));
    }
}

/// Runs what `run` returns for a time limit, which must end the guest. While the guest does not get as far as
/// `far_enough` wants before that, the limit is too short for this machine and its load, and is doubled. Returns the
/// last run and its limit.
pub fn run_into_time_limit(run: impl Fn(&str) -> Run, far_enough: impl Fn(&Ended) -> bool) -> (Ended, String) {
    let mut seconds = 12;
    loop {
        let limit = format!("{seconds}s");
        let ended = run(&limit).run_to_end().expect(124, "timed-out");
        if far_enough(&ended) {
            return (ended, limit);
        }
        seconds *= 2;
        assert!(seconds < DEADLINE.as_secs(), "the guest did not get far enough within {limit}; {ended}");
    }
}

/// A machine that takes requests while it runs (`live.rs`).
pub struct Live {
    guest: Guest,
    asked: usize,
    /// Process ID in the test's host.
    pub pid: String,
    /// Folder of its configuration and of the files that this names.
    _dir: TempDir,
}

impl Live {
    /// Starts the machine that `run` describes. Its console must not be on the standard streams, which carry the
    /// requests.
    pub fn start(run: Run) -> Self {
        let dir = scratch();
        let path = |name: &str| dir.path().join(name).display().to_string();
        let printed = run.args(&["--print-config"]).start();
        // The initrd is in the run's folder, which must stay.
        fs::copy(printed.dir.path().join("initrd"), path("initrd")).unwrap();
        let printed = printed.end();
        let mut machine: Value = serde_json::from_str(&printed.stdout).unwrap_or_else(|_| panic!("{printed}"));
        machine["boot"]["initrd"] = path("initrd").into();
        fs::write(path("config.json"), machine.to_string()).unwrap();
        let script = "echo pid=$$. >&2; exec \"$0\" \"$1\"";
        let guest = on_host(&["bash", "-c", script, &example("live"), &path("config.json")]);
        let said = guest.wait_for_stderr(".\n");
        let pid = said.split("pid=").nth(1).unwrap().split('.').next().unwrap().to_string();
        Live { guest, asked: 0, pid, _dir: dir }
    }

    /// Makes a request and returns the line that answers it.
    pub fn ask(&mut self, request: &str) -> String {
        self.guest.send(format!("{request}\n").as_bytes());
        self.asked += 1;
        let answered = |said: &str| said.lines().count() >= self.asked && said.ends_with('\n');
        let said = self.guest.wait_until(answered);
        said.lines().nth(self.asked - 1).unwrap().to_string()
    }

    /// Waits for the machine's end.
    pub fn end(self) -> Ended {
        self.guest.end()
    }
}
