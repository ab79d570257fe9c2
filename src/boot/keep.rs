//! Keeping a kernel in the cache while its first guest runs already.
//!
//! ```text
//! vireo       unpacks the kernel ── starts the guest ─────── waits for its end ───────▶ ends
//!                                       │ stdin: the kernel's file, stdout: a pipe ╎
//!                                       │ stderr: the cache's directory            ╎
//! vireo-keep                            └─▶ hashes, unpacks again, writes ──▶ ends ╎ or ends with vireo
//! ```
//!
//! A process of its own does this, with the lowest priority, so that the guest does not become slower even where there
//! is only one processor. A thread could not have that priority: a process has only ended when its last thread has had
//! the processor once more, for which it waits for seconds on a busy machine. And neither the memory that unpacking takes
//! nor a fault of a decompressor concerns the guest.
//!
//! The directory is handed over as a descriptor: the guest runs by now, and may be able to exchange what has its name.
//!
//! Nothing is ever written to the pipe: when vireo has ended, it has lost its reader, and the keeper ends.

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

/// Name of the process.
const NAME: &str = "vireo-keep";
/// The longest wait until a file that was just made can be kept. A file from the future is not waited for.
const WAIT_MAX: Duration = Duration::from_secs(10);

/// A kernel that the cache should get.
#[derive(Debug)]
pub struct Unkept {
    cache: PathBuf,
    directory: File,
    kernel: File,
}

impl Unkept {
    /// What is still to be kept: the file `kernel`, in `cache`.
    pub fn new(cache: &Cache, kernel: File) -> io::Result<Unkept> {
        let (name, directory) = cache.dir();
        Ok(Unkept { cache: name.into(), directory: directory.try_clone()?, kernel })
    }

    /// Starts the process that keeps it. A failure costs time in the next boot and is only logged.
    pub fn start(self) {
        // The thread waits for the end of the process, so that nothing is left of that while the guest runs.
        let keeper = thread::Builder::new().name("keeper".into()).spawn(|| match self.run() {
            Ok(()) => log::debug!("the kernel is in the cache"),
            Err(e) => log::debug!("the kernel is not in the cache: {e}"),
        });
        if let Err(e) = keeper {
            log::debug!("cannot start a thread that has the kernel kept: {e}");
        }
    }

    fn run(self) -> io::Result<()> {
        let mut command = Command::new("/proc/self/exe");
        command.arg0(NAME).arg(self.cache).stdin(self.kernel).stdout(Stdio::piped()).stderr(self.directory);
        // No calls between fork and exec: with them, guest memory would be copied on write for the new process.
        let status = command.spawn()?.wait()?;
        if status.success() { Ok(()) } else { Err(io::Error::other(status.to_string())) }
    }
}

/// Returns whether this process is one that [`Unkept::start`] has started.
pub fn is_keeper() -> bool {
    env::args_os().next().is_some_and(|name| Path::new(&name).file_name() == Some(NAME.as_ref()))
}

/// The life of the keeper.
pub fn main() -> ! {
    // Whoever waits for the end of a pipe that vireo has inherited should not have to wait for this process.
    child::close_inherited();
    child::have_lowest_priority();
    // Where memory is limited, the guest's is worth more.
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

/// The cache that vireo has opened; started by hand, with stderr elsewhere, the one that has this name.
fn cache(dir: PathBuf) -> io::Result<Cache> {
    let stderr = File::from(io::stderr().as_fd().try_clone_to_owned()?);
    if stderr.metadata()?.is_dir() { Cache::in_held(dir, stderr) } else { Cache::at(dir) }
}

/// Returns only when there is an error on stdout: nobody can read from it any more, or it cannot be watched.
fn wait_for_end_of_vireo() -> io::Result<Infallible> {
    let stdout = io::stdout();
    loop {
        // Errors are reported without being asked for.
        match poll(&mut [PollFd::new(&stdout, PollFlags::empty())], None) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return Err(io::ErrorKind::BrokenPipe.into()),
            Err(e) => return Err(e.into()),
        }
    }
}
