//! The real binary, run beside the test: every wait has a deadline, and its message says what was awaited.

use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::hears_signals;

/// Time limit that no wait in these tests reaches on a usable machine. The slowest KVM needs a second for most of them.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// Command `vireo`, with a cache of kernels that is not the user's.
pub fn vireo() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vireo"));
    command.env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR")).env_remove("RUST_LOG");
    hears_signals(&mut command);
    command
}

/// A kernel file that lasts as long as the test.
pub struct Kernel(tempfile::NamedTempFile);

impl Kernel {
    /// Puts an image into a file that every user may read.
    pub fn new(image: &[u8]) -> Kernel {
        use std::os::unix::fs::PermissionsExt;
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(image).unwrap();
        file.as_file().set_permissions(PermissionsExt::from_mode(0o644)).unwrap();
        Kernel(file)
    }

    /// Path of the file.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Command `vireo run` of this kernel, with a small machine unless `args` say otherwise.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = vireo();
        command.args(["run", "--kernel"]).arg(self.path()).args(args);
        for (flag, value) in [("--memory", "16M"), ("--timeout", "50s")] {
            if !args.contains(&flag) {
                command.args([flag, value]);
            }
        }
        command
    }
}

/// Runs a kernel image to its end.
pub fn run(image: &[u8], args: &[&str]) -> Ended {
    let kernel = Kernel::new(image);
    Running::start(kernel.command(args)).end()
}

/// Exit status and output of `vireo`.
pub struct Ended {
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Ended {
    /// Returns the exit code; fails the test if a signal ended vireo.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| panic!("signal {:?}: {}", self.status.signal(), self.stderr))
    }

    /// Fails the test unless vireo ended with `code`.
    #[track_caller]
    pub fn expect(self, code: i32) -> Ended {
        assert_eq!(self.code(), code, "{}", self.stderr);
        self
    }

    /// Fails the test unless vireo printed `text`.
    #[track_caller]
    pub fn says(self, text: &str) -> Ended {
        assert!(self.stderr.contains(text), "'{text}' is not in: {}", self.stderr);
        self
    }
}

/// Bytes that a thread collects.
#[derive(Clone, Default)]
pub struct Collected(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    ended: bool,
}

impl State {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }
}

impl Collected {
    /// Collects everything that comes from `source`.
    pub fn from(mut source: impl Read + Send + 'static) -> Collected {
        let collected = Collected::default();
        let into = collected.clone();
        thread::spawn(move || {
            let mut buffer = [0; 1 << 16];
            loop {
                // A terminal whose other side is gone fails rather than ends.
                let n = source.read(&mut buffer).unwrap_or(0);
                let mut state = into.0.state.lock().unwrap();
                state.bytes.extend_from_slice(&buffer[..n]);
                state.ended = n == 0;
                into.0.changed.notify_all();
                if n == 0 {
                    return;
                }
            }
        });
        collected
    }

    /// Waits until `wanted` accepts the bytes, and returns them. Fails the test if they end before.
    #[track_caller]
    pub fn wait(&self, what: &str, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        let state = self.0.state.lock().unwrap();
        let missing = |state: &mut State| !state.ended && !wanted(&state.bytes);
        let (state, late) = self.0.changed.wait_timeout_while(state, DEADLINE, missing).unwrap();
        assert!(!late.timed_out(), "no {what} in: {}", state.text());
        assert!(wanted(&state.bytes), "ended without {what}: {}", state.text());
        state.bytes.clone()
    }

    /// Waits for `text`.
    #[track_caller]
    pub fn wait_for(&self, text: &str) {
        self.wait(text, |bytes| bytes.windows(text.len()).any(|window| window == text.as_bytes()));
    }

    /// Waits for the end and returns everything.
    #[track_caller]
    pub fn all(&self) -> Vec<u8> {
        let state = self.0.state.lock().unwrap();
        let (state, late) = self.0.changed.wait_timeout_while(state, DEADLINE, |state| !state.ended).unwrap();
        assert!(!late.timed_out(), "no end of: {}", state.text());
        state.bytes.clone()
    }
}

/// A `vireo` that is running. It is killed if the test fails.
pub struct Running {
    pub child: Child,
    pub stdout: Collected,
    pub stderr: Collected,
}

impl Running {
    /// Starts vireo without input, and collects both outputs.
    pub fn start(mut command: Command) -> Running {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Running::spawn(command)
    }

    /// Starts vireo with the streams that `command` has; outputs that are pipes are collected.
    pub fn spawn(mut command: Command) -> Running {
        let mut child = command.spawn().unwrap();
        let collect =
            |source: Option<Box<dyn Read + Send>>| Collected::from(source.unwrap_or_else(|| Box::new(&[][..])));
        let stdout = collect(child.stdout.take().map(|s| Box::new(s) as _));
        let stderr = collect(child.stderr.take().map(|s| Box::new(s) as _));
        Running { child, stdout, stderr }
    }

    /// Sends vireo a signal.
    pub fn signal(&self, signal: i32) {
        // SAFETY: the child has not been waited for, so the number is still its own.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, signal) }, 0);
    }

    /// Waits for the end of vireo.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        let limit = Instant::now() + DEADLINE;
        loop {
            match self.child.try_wait().unwrap() {
                Some(status) => return status,
                None => assert!(Instant::now() < limit, "vireo did not end"),
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits for the end of vireo and returns its output.
    #[track_caller]
    pub fn end(mut self) -> Ended {
        let status = self.wait();
        let stderr = String::from_utf8_lossy(&self.stderr.all()).into_owned();
        Ended { status, stdout: self.stdout.all(), stderr }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A directory for a test's files.
pub fn folder() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_path_buf();
    (folder, path)
}
