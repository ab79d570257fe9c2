//! Adding a kernel to the cache while its first guest is already running.
//!
//! ```text
//! vireo       unpacks the kernel ── starts the guest ─────── waits for its end ───────▶ ends
//!                                       │ stdin: the kernel's file, stdout: a pipe ╎
//!                                       │ stderr: the cache's directory            ╎
//! vireo-keep                            └─▶ hashes, unpacks again, writes ──▶ ends ╎ or ends with vireo
//! ```
//!
//! A separate process does this, with the lowest priority, so that the guest does not become slower even on a host with
//! only one processor. A thread could not have this priority: vireo only ends once its last thread has run on a
//! processor again, and on a busy machine a thread of low priority waits seconds for that. In a separate process,
//! neither the memory that unpacking takes nor a crash of a decompressor affects the guest.
//!
//! The directory is passed as a descriptor: the guest is running by now, and may be able to replace the directory at
//! that path.
//!
//! Nothing is ever written to the pipe: once vireo has ended, the pipe has no reader, and the keeper ends.

use std::convert::Infallible;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use std::{env, process, thread};

use rustix::event::{PollFd, PollFlags, poll};

use super::cache::Cache;
use crate::child;

/// Name of the keeper process.
const NAME: &str = "vireo-keep";
/// Longest wait until a file that has just changed can be kept. The keeper does not wait for a file with a time in the
/// future.
const WAIT_MAX: Duration = Duration::from_secs(10);

/// A kernel that should be added to the cache.
#[derive(Debug)]
pub struct Unkept {
    cache: PathBuf,
    directory: File,
    kernel: File,
}

impl Unkept {
    /// Creates the job that keeps the file `kernel` in `cache`.
    pub fn new(cache: &Cache, kernel: File) -> io::Result<Unkept> {
        let (name, directory) = cache.dir();
        Ok(Unkept { cache: name.into(), directory: directory.try_clone()?, kernel })
    }

    /// Starts the keeper process. A failure is only logged; it makes the next boot slower.
    pub fn start(self) {
        // The thread waits for the process to end, so that no zombie remains while the guest runs.
        let keeper = thread::Builder::new().name("keeper".into()).spawn(|| match self.run() {
            Ok(()) => log::debug!("the kernel is in the cache"),
            Err(e) => log::debug!("the kernel is not in the cache: {e}"),
        });
        if let Err(e) = keeper {
            log::debug!("cannot start the thread that caches the kernel: {e}");
        }
    }

    fn run(self) -> io::Result<()> {
        let mut command = Command::new("/proc/self/exe");
        command.arg0(NAME).arg(self.cache).stdin(self.kernel).stdout(Stdio::piped()).stderr(self.directory);
        // No code runs between fork and exec (no `pre_exec`); with it, guest memory would be copied on write for the
        // new process.
        let status = command.spawn()?.wait()?;
        if status.success() { Ok(()) } else { Err(io::Error::other(status.to_string())) }
    }
}

/// Returns whether this process is one that [`Unkept::start`] has started.
pub fn is_keeper() -> bool {
    env::args_os().next().is_some_and(|name| Path::new(&name).file_name() == Some(NAME.as_ref()))
}

/// Runs the keeper process.
pub fn main() -> ! {
    // A program that waits for the end of a pipe that vireo inherited should not have to wait for this process.
    child::close_inherited();
    child::have_lowest_priority();
    // If memory runs out, the kernel should end this process before the guest.
    let _ = fs::write("/proc/self/oom_score_adj", "1000");
    process::exit(if keep().is_ok() { 0 } else { 1 })
}

fn keep() -> io::Result<()> {
    let dir = env::args_os().nth(1).ok_or(io::ErrorKind::InvalidInput)?;
    let cache = Arc::new(cache(dir.into())?);
    let kernel = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let watched = cache.clone();
    thread::Builder::new().name("watch".into()).spawn(move || {
        let _ = wait_for_end_of_vireo();
        watched.abandon();
        process::exit(1)
    })?;
    let wait = cache.settles_in(&kernel)?;
    if wait < WAIT_MAX {
        thread::sleep(wait);
    }
    cache.keep(&kernel)
}

/// Returns the cache that vireo has opened; if the keeper was started by hand, with stderr elsewhere, the cache named
/// `dir`.
fn cache(dir: PathBuf) -> io::Result<Cache> {
    let stderr = File::from(io::stderr().as_fd().try_clone_to_owned()?);
    if stderr.metadata()?.is_dir() { Cache::in_held(dir, stderr) } else { Cache::at(dir) }
}

/// Waits until stdout has an error: its reader has gone, or it cannot be watched.
fn wait_for_end_of_vireo() -> io::Result<Infallible> {
    let stdout = io::stdout();
    loop {
        // Errors are reported without being requested.
        match poll(&mut [PollFd::new(&stdout, PollFlags::empty())], None) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return Err(io::ErrorKind::BrokenPipe.into()),
            Err(e) => return Err(e.into()),
        }
    }
}
