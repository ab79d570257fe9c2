//! Guests for the tests: runs the real release binary where Linux guests run (`tests/host/run`), with a script of the
//! test's as what the guest does, and waits for what it says and how it ends. A test that cannot run fails and says
//! why. Every wait has a deadline; what was seen until then is in the message.

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
/// For a boot with everything a test does in it. A quiet boot takes a few seconds in the emulated host, more when the
/// machine is busy; this is for the case that nothing happens any more.
const DEADLINE: Duration = Duration::from_secs(180);

/// A path below the checkout.
pub fn repo(path: &str) -> PathBuf {
    Path::new(REPO).join(path)
}

/// A kernel or initramfs that `tests/host/setup` made.
pub fn image(name: &str) -> PathBuf {
    let path = repo("target/host/images").join(name);
    assert!(path.exists(), "{} is missing: run 'tests/host/setup test' (for make soak: 'soak')", path.display());
    path
}

/// A folder of the test's own that guests' monitors can write to, wherever they run.
pub fn scratch() -> TempDir {
    let share = repo("target/host/share");
    fs::create_dir_all(&share).unwrap();
    tempfile::Builder::new().prefix("test.").tempdir_in(share).unwrap()
}

/// The binary under test.
pub fn vireo() -> PathBuf {
    let default = || repo("target/x86_64-unknown-linux-gnu/release/vireo");
    let path = std::env::var_os("VIREO_BIN").map_or_else(default, PathBuf::from);
    assert!(path.exists(), "there is no vireo at {}: run 'make build', or set VIREO_BIN", path.display());
    path
}

/// The emulated hosts (`$hosts` in tests/host/lib.sh) that no test uses now.
static FREE_HOSTS: (LazyLock<Mutex<Vec<&str>>>, Condvar) =
    (LazyLock::new(|| Mutex::new(vec!["b", "a"])), Condvar::new());

/// The emulated host of the test in this thread, from its first guest until it ends: all its guests meet there, and no
/// other test's, however many run at a time. (It ends, so others wait for it without a deadline of their own.)
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

/// `tests/host/run` on this test's host, about to get its options.
fn run_on_host() -> Command {
    let mut command = Command::new(repo("tests/host/run"));
    HOST.with(|host| command.args(["--on", host.0]));
    hears_signals(&mut command);
    command
}

/// Has `command` start as from a terminal, even if the tests run behind `nohup` or in the background of a script, where
/// signals that they send are ignored.
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

/// Runs another program than vireo where vireo runs, with pipes for its streams.
pub fn on_host(args: &[&str]) -> Guest {
    let mut command = run_on_host();
    command.arg("--").args(args);
    Guest::spawn(command, scratch(), Streams::Pipes)
}

/// What a program of this machine prints; it must succeed.
pub fn tool(args: &[&str]) -> String {
    // Tools of e2fsprogs may live where users have no path to.
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let output = Command::new(args[0]).args(&args[1..]).env("PATH", path).output();
    let output = output.unwrap_or_else(|e| panic!("{}: {e}: run 'make setup'", args[0]));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{args:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// Shell: a folder of the host's for one test, which goes with the script, in `$dir`: on its scratch disk, as 9p and tmpfs
/// lack much (direct input and output, xattrs, holes); elsewhere a temporary one will do.
pub const FOLDER: &str = r#"
base=/run/scratch
[ -w $base ] || base=/var/tmp
dir=$(mktemp -d $base/test.XXXXXX)
trap 'rm -rf $dir' EXIT
chmod 755 $dir
cd $dir
"#;

/// An example that cargo builds for the tests.
pub fn example(name: &str) -> String {
    let deps = std::env::current_exe().unwrap();
    let path = deps.ancestors().nth(2).unwrap().join("examples").join(name);
    assert!(path.exists(), "{} is missing: 'cargo test' without '--test' builds it", path.display());
    path.display().to_string()
}

/// The test guest's initramfs, and behind it a second cpio with the test's files.
fn initrd(path: &Path, files: &[(&str, &[u8])]) {
    let mut file = File::create(path).unwrap();
    io::copy(&mut File::open(image("initrd-busybox.cpio")).unwrap(), &mut file).unwrap();
    let entries =
        files.iter().map(|(name, content)| (cpio::NewcBuilder::new(name).mode(0o100_755), Cursor::new(content)));
    cpio::write_cpio(entries, file).unwrap();
}

/// `vireo run`, about to be started.
pub struct Run {
    /// Everything of this run's; the report will be in `report.json`.
    pub dir: TempDir,
    args: Vec<String>,
    wrapper: Vec<String>,
    env: Vec<String>,
    /// Of `vireo run`.
    cmdline: String,
    /// Of `vireo exec`: the command.
    words: Option<Vec<String>>,
}

impl Run {
    /// `vireo exec`, about to be started: the stock kernel with its modules, and the host's root.
    pub fn exec(words: &[&str]) -> Self {
        Self::exec_with(&image("bzImage-cloud"), &repo("target/host/kernel-cloud"), words)
    }

    /// The same with another kernel or other modules. Without words the test's script adds what it likes.
    pub fn exec_with(kernel: &Path, modules: &Path, words: &[&str]) -> Self {
        Self::exec_alone(kernel, words).args(&["--modules", &modules.display().to_string()])
    }

    /// The same with a kernel whose modules vireo finds by itself.
    pub fn exec_alone(kernel: &Path, words: &[&str]) -> Self {
        let words = Some(words.iter().map(ToString::to_string).collect());
        let run = Run { dir: scratch(), args: vec![], wrapper: vec![], env: vec![], cmdline: String::new(), words };
        let report = run.path("report.json");
        run.args(&["--kernel", &kernel.display().to_string(), "--report", &report])
    }

    /// A run of `kernel` (an image's name, or a path) with a guest that runs `script` and powers off.
    pub fn new(kernel: &str, script: &str) -> Self {
        let dir = scratch();
        initrd(&dir.path().join("initrd"), &[("test.sh", script.as_bytes())]);
        let kernel = if kernel.starts_with('/') { PathBuf::from(kernel) } else { image(kernel) };
        let run =
            Run { dir, args: vec![], wrapper: vec![], env: vec![], cmdline: "console=ttyS0 quiet".into(), words: None };
        let (initrd, report) = (run.path("initrd"), run.path("report.json"));
        run.args(&["--kernel", &kernel.display().to_string(), "--initrd", &initrd, "--report", &report])
    }

    /// Adds the modules of a kernel other than those of `make demo`, which the initramfs has.
    pub fn with_modules(self, kernel: &str) -> Self {
        let mut file = File::options().append(true).open(self.dir.path().join("initrd")).unwrap();
        if !["cloud", "full"].contains(&kernel) {
            io::copy(&mut File::open(image(&format!("modules-{kernel}.cpio"))).unwrap(), &mut file).unwrap();
        }
        self
    }

    /// Adds a program that `tests/host/setup` made to the guest's `/bin`.
    pub fn with_program(self, name: &str) -> Self {
        let file = File::options().append(true).open(self.dir.path().join("initrd")).unwrap();
        let program = File::open(image(name)).unwrap();
        cpio::write_cpio([(cpio::NewcBuilder::new(&format!("bin/{name}")).mode(0o100_755), program)].into_iter(), file)
            .unwrap();
        self
    }

    /// A path in the run's own folder.
    pub fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    pub fn args(mut self, args: &[&str]) -> Self {
        self.args.extend(args.iter().map(ToString::to_string));
        self
    }

    /// Instead of `console=ttyS0 quiet`.
    pub fn cmdline(mut self, cmdline: &str) -> Self {
        self.cmdline = cmdline.into();
        self
    }

    /// Runs vireo by `bash -c SCRIPT`, which finds it with its arguments in `"$@"`.
    pub fn through(self, script: &str) -> Self {
        self.through_with(script, "bash")
    }

    /// The same, with another program in `$0`. (The emulated host makes sure of running a program as it is now only if
    /// that is a word of the command line.)
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

    /// Starts it with pipes for all its streams.
    pub fn start(self) -> Guest {
        let command = self.command(&[]);
        Guest::spawn(command, self.dir, Streams::Pipes)
    }

    /// Starts it on a terminal: the command as `prepare` changed it, and what the terminal's other side is.
    pub fn start_on_terminal(self, prepare: impl FnOnce(&mut Command) -> File) -> Guest {
        let mut command = self.command(&["--tty"]);
        let master = prepare(&mut command);
        Guest::spawn(command, self.dir, Streams::Terminal(master))
    }

    /// Starts it and waits for its end.
    pub fn run_to_end(self) -> Ended {
        self.start().end()
    }
}

/// Both sides of a new terminal, which no program gets that another test starts meanwhile.
pub fn terminal() -> (OwnedFd, OwnedFd) {
    use rustix::pty::{OpenptFlags, openpt, ptsname, unlockpt};
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap();
    let terminal = File::options().read(true).write(true).custom_flags(libc::O_NOCTTY).open(name.to_str().unwrap());
    (master, terminal.unwrap().into())
}

/// A terminal as whose foreground job `command` will run; returns the side on which one types.
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

/// What came out of a stream so far.
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

    /// Waits until `found` says true of what was seen, or the stream ended; then gives it.
    fn wait(&self, deadline: Instant, found: impl Fn(&[u8]) -> bool) -> (Vec<u8>, bool) {
        let mut state = self.0.0.lock().unwrap();
        while !found(&state.bytes) && !state.ended && Instant::now() < deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            state = self.0.1.wait_timeout(state, left).unwrap().0;
        }
        (state.bytes.clone(), found(&state.bytes))
    }
}

/// A running vireo; killed when dropped.
pub struct Guest {
    child: Child,
    input: Option<Box<dyn Write + Send>>,
    stdout: Seen,
    stderr: Seen,
    /// The run's folder.
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

    /// Waits until stdout (the guest's console, unless told otherwise) has shown `text`.
    pub fn wait_for(&self, text: &str) -> String {
        self.wait("stdout", &self.stdout, text)
    }

    /// Waits until stdout is as `wanted` has it.
    pub fn wait_until(&self, wanted: impl Fn(&str) -> bool) -> String {
        let (bytes, found) =
            self.stdout.wait(Instant::now() + DEADLINE, |bytes| wanted(&String::from_utf8_lossy(bytes)));
        assert!(found, "waited in vain; {}", self.tails());
        lines(&bytes)
    }

    /// Waits until vireo's stderr has shown `text`.
    pub fn wait_for_stderr(&self, text: &str) -> String {
        self.wait("stderr", &self.stderr, text)
    }

    /// Waits until either has shown `text`: on a terminal of the emulated host both are one stream.
    pub fn wait_for_either(&self, text: &str) {
        let deadline = Instant::now() + DEADLINE;
        let shown = |stream: &Seen| String::from_utf8_lossy(&stream.0.0.lock().unwrap().bytes).contains(text);
        while !shown(&self.stdout) && !shown(&self.stderr) {
            assert!(Instant::now() < deadline, "waited for '{text}' in vain; {}", self.tails());
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
        assert!(found, "waited for '{text}' on {name} in vain; {}", self.tails());
        lines(&bytes)
    }

    /// The end of what it said, for messages.
    pub fn tails(&self) -> String {
        let tail = |stream: &Seen| {
            let bytes = stream.0.0.lock().unwrap().bytes.clone();
            lines(&bytes[bytes.len().saturating_sub(1500)..])
        };
        format!("the end of stdout:\n{}\nthe end of stderr:\n{}", tail(&self.stdout), tail(&self.stderr))
    }

    /// Sends input.
    pub fn send(&mut self, bytes: &[u8]) {
        let input = self.input.as_mut().expect("input was closed");
        input.write_all(bytes).and_then(|()| input.flush()).expect("vireo takes no input");
    }

    /// Ends the input.
    pub fn close_input(&mut self) {
        self.input = None;
    }

    /// Sends a signal to vireo, by way of whatever runs it.
    pub fn signal(&self, signal: i32) {
        let pid = self.child.id().to_string();
        let status = Command::new("kill").args([format!("-{signal}"), pid]).status().unwrap();
        assert!(status.success(), "kill failed");
    }

    /// Waits for the end of vireo. Input stays open until then, unless it was closed.
    pub fn end(mut self) -> Ended {
        let deadline = Instant::now() + DEADLINE;
        let (stdout, _) = self.stdout.wait(deadline, |_| false);
        let (stderr, _) = self.stderr.wait(deadline, |_| false);
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None => assert!(Instant::now() < deadline, "vireo did not end; {}", self.tails()),
            }
            thread::sleep(Duration::from_millis(10)); // its streams have ended: it is about to
        };
        let report = fs::read(self.dir.path().join("report.json")).ok();
        let report = report.map_or(Value::Null, |json| serde_json::from_slice(&json).expect("a report is JSON"));
        Ended { status, bytes: stdout.clone(), stdout: lines(&stdout), stderr: lines(&stderr), report }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What is left of a run.
#[derive(Debug)]
pub struct Ended {
    status: ExitStatus,
    /// stdout as it came.
    pub bytes: Vec<u8>,
    /// stdout with the terminal's CR LF as plain newlines.
    pub stdout: String,
    pub stderr: String,
    pub report: Value,
}

impl Ended {
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }

    /// Checks exit status and report.
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

    /// The rest of the console's line that begins with `name` and a colon.
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

/// Memory of a process in the test's host, in bytes.
pub fn resident(pid: &str) -> u64 {
    let rollup = on_host(&["grep", "^Rss:", &format!("/proc/{pid}/smaps_rollup")]).end();
    let kib = rollup.stdout.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok());
    kib.unwrap_or_else(|| panic!("{rollup}")) << 10
}

/// Waits until `look` finds what is `wanted`; returns it.
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

/// Runs what `run` makes of a time limit, which must end it, until the guest got as far as `far_enough` before that: a limit
/// too short for this machine as busy as it is now is doubled. Returns the last run and its limit.
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

/// A machine that is asked for things while it runs (`live.rs`).
pub struct Live {
    guest: Guest,
    asked: usize,
    /// Process id in the test's host.
    pub pid: String,
    /// Its configuration and what it names.
    _dir: TempDir,
}

impl Live {
    /// Starts what `run` would start. Its console must not be on the standard streams, where the requests are.
    pub fn start(run: Run) -> Self {
        let dir = scratch();
        let path = |name: &str| dir.path().join(name).display().to_string();
        let printed = run.args(&["--print-config"]).start();
        // Its initrd is in its folder, which must stay.
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

    /// Makes a request and waits for the line that answers it.
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
