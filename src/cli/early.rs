//! Signals and the time limit before the guest's first instruction.
//!
//! Opening images, unpacking a kernel and packing an initramfs take as long as their files and file systems let them: a
//! network file system that does not answer, an image of a stranger. The main loop, which handles signals and `--timeout`,
//! runs only once the guest does. Until then a thread waits for both, and ends the process as the main loop would end the
//! guest: with a sentence, the reports and the exit status.

use std::os::fd::AsRawFd;
use std::process;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::watch::Files;
use super::{Failure, say};
use crate::event::{self, Interest, Poller, Signals};
use crate::machine::run::RunOptions;
use crate::options::Span;
use crate::outcome::Outcome;
use crate::report::{BootTiming, Exits, Report};

/// Signals that end vireo before its guest has started.
const ENDING: [i32; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];

const DONE: u64 = 0;
const SIGNAL: u64 = 1;

/// Reports of a run that ends before its guest has begun.
#[derive(Clone)]
pub(super) struct Early {
    /// Files of the reports.
    pub files: Arc<Files>,
    /// Name of the run in them.
    pub name: String,
    /// Start of the process, from which the time limit counts.
    pub start: Instant,
    /// True if nothing is printed on stderr.
    pub quiet: bool,
}

/// The thread that waits. Dropping it ends the wait.
pub(super) struct Guard {
    done: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Early {
    /// Waits for the signals and the time limit of `options` until the guard is dropped.
    ///
    /// # Errors
    ///
    /// Fails if the host has no thread or no descriptor for it.
    pub(super) fn watch(&self, options: &RunOptions) -> Result<Guard, Failure> {
        let done = event::eventfd()?;
        let waiting = Waiting {
            early: self.clone(),
            done: done.try_clone()?,
            // Of its own, so that signals which do not end vireo stay for the main loop.
            signals: options.signals.is_some().then(|| Signals::new(&ENDING)).transpose()?,
            // Without any time, everything is prepared, and the main loop ends it.
            timeout: options.timeout.filter(|limit| !limit.is_zero()),
        };
        let thread = thread::Builder::new().name("early".into()).spawn(move || {
            if let Some(outcome) = waiting.end() {
                waiting.early.finish(&outcome);
            }
        })?;
        Ok(Guard { done, thread: Some(thread) })
    }

    fn finish(&self, outcome: &Outcome) -> ! {
        let sentence = match outcome {
            Outcome::TimedOut(limit) => format!("the guest had not started after the time limit of {}", Span(*limit)),
            outcome => format!("{}, before the guest had started", outcome.sentence()),
        };
        if !self.quiet {
            say(&sentence);
        }
        let mut report = Report::new(outcome, String::new(), &BootTiming::new(self.start), Exits::default());
        report.detail = sentence;
        let written = self.files.write(&self.name, &report);
        if let Err(failure) = &written {
            say(&super::chain(&**failure));
        }
        process::exit(outcome.exit_code().into())
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.done.write(1);
        self.thread.take().map(JoinHandle::join);
    }
}

struct Waiting {
    early: Early,
    done: EventFd,
    signals: Option<Signals>,
    timeout: Option<Duration>,
}

impl Waiting {
    /// Waits for what comes first; `None` if that is the guest's start.
    fn end(&self) -> Option<Outcome> {
        let mut poller = Poller::new().ok()?;
        poller.add(self.done.as_raw_fd(), DONE, Interest::Read).ok()?;
        if let Some(signals) = &self.signals {
            poller.add(signals.as_raw_fd(), SIGNAL, Interest::Read).ok()?;
        }
        loop {
            let left = self.timeout.map(|limit| limit.saturating_sub(self.early.start.elapsed()));
            let ready: Vec<u64> = poller.wait(left).ok()?.collect();
            if ready.contains(&DONE) {
                return None;
            }
            if let (Some(limit), Some(Duration::ZERO)) = (self.timeout, left) {
                return Some(Outcome::TimedOut(limit));
            }
            if let Some(signal) = self.signals.as_ref().and_then(Signals::take) {
                return Some(Outcome::Killed(signal));
            }
        }
    }
}
