//! Flags for watching a guest, for every command that runs one: when it counts as hung, what its console must and must
//! not show, what is kept of it, and how much is printed about its end.

use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;

use super::named::{NamedFiles, Use};
use super::report::{FileError, Reports};
use super::{Failure, chain, say};
use crate::backend::output_file::{Begin, OutputFile, live};
use crate::backend::transcript::{Pattern, Patterns, Transcript};
use crate::machine::run::{Ended, RunOptions};
use crate::options::Span;
use crate::outcome::Outcome;
use crate::report::Report;

/// Shortest time after which a guest may count as hung.
const HANG_TIMEOUT_MIN: Duration = Duration::from_secs(2);

/// Flags that `run` and `exec` share.
#[derive(Args)]
pub struct WatchArgs {
    /// End the guest after this time, like 60s or 500ms
    #[arg(long, value_name = "TIME", allow_negative_numbers = true)]
    timeout: Option<Span>,
    /// End the guest after this long without output or CPU use, with exit status 72
    #[arg(long, value_name = "TIME", allow_negative_numbers = true, value_parser = parse_hang_timeout)]
    hang_timeout: Option<Span>,
    /// Restart a hung guest up to N times; stdin already consumed is lost
    #[arg(long, value_name = "N", requires = "hang_timeout", default_value_t = 0, hide_default_value = true)]
    retry_on_hang: u32,
    /// End the run with exit status 0 when a line of the console matches, or 73 if the guest ends before that; may be
    /// repeated
    #[arg(long, value_name = "REGEX", allow_hyphen_values = true)]
    expect: Vec<Pattern>,
    /// End the run with exit status 73 when a line of the console matches; may be repeated
    #[arg(long, value_name = "REGEX", allow_hyphen_values = true)]
    fail_on: Vec<Pattern>,
    /// Write each line of the console to a file, with the seconds since the start
    #[arg(long, value_name = "FILE")]
    console_log: Option<PathBuf>,
    /// Write the guest's memory and registers to a file for crash, drgn and gdb if it panicked, crashed or hung,
    /// reached the time limit, or matched --fail-on
    #[arg(long, value_name = "FILE")]
    vmcore: Option<PathBuf>,
    /// Write how the guest ended to a file as JSON
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Write how the guest ended to a file as a test result in JUnit XML
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Do not report how the guest ended; print only the guest's own output and failures of vireo itself
    #[arg(long, short)]
    quiet: bool,
}

fn parse_hang_timeout(text: &str) -> Result<Span, String> {
    match text.parse::<Span>() {
        Ok(span) if span.0 < HANG_TIMEOUT_MIN => Err(format!("must be at least {}", Span(HANG_TIMEOUT_MIN))),
        Ok(span) => Ok(span),
        Err(e) => Err(e.to_string()),
    }
}

impl WatchArgs {
    /// Opens the files that the flags name, or checks that they can be written. The reports tell of a file that cannot.
    /// `name` is what runs.
    pub fn open(&self, name: &str) -> Result<Files, Failure> {
        let reports = Reports::new(self.report.as_deref(), self.junit.as_deref())?;
        match self.open_beside() {
            Ok((log, vmcore)) => Ok(Files { reports, log, vmcore }),
            Err(e) => {
                let failure = e.into();
                reports.tell_failure(name, &failure);
                Err(failure)
            }
        }
    }

    /// Opens the files other than the reports.
    fn open_beside(&self) -> Result<(Option<File>, Option<Arc<OutputFile>>), FileError> {
        let core = |path: &PathBuf| match OutputFile::private(path) {
            Ok(core) => Ok(Arc::new(core)),
            Err(e) => Err(FileError::Write(path.clone(), e)),
        };
        let log = |path: &PathBuf| live(path, Begin::Empty).map_err(|e| FileError::Write(path.clone(), e));
        let vmcore = self.vmcore.as_ref().map(core).transpose()?;
        Ok((self.console_log.as_ref().map(log).transpose()?, vmcore))
    }

    /// Returns the options for one run; options without a flag keep their defaults. The transcript is always present.
    /// `start` is the time at which the process started.
    pub fn options(&self, files: &Files, start: Instant) -> Result<RunOptions, Failure> {
        let log = files.log.as_ref().map(File::try_clone).transpose()?;
        let patterns = Patterns { expect: self.expect.clone(), fail_on: self.fail_on.clone() };
        Ok(RunOptions {
            timeout: self.timeout.map(|limit| limit.0),
            hang_timeout: self.hang_timeout.map(|limit| limit.0),
            vmcore: files.vmcore.clone(),
            transcript: Some(Transcript::new(start, log, patterns)),
            ..RunOptions::default()
        })
    }

    /// Returns the paths of the reports: JSON, JUnit.
    pub fn reports(&self) -> (Option<PathBuf>, Option<PathBuf>) {
        (self.report.clone(), self.junit.clone())
    }

    /// Adds the files that the flags name.
    pub(super) fn add_to(&self, named: &mut NamedFiles) {
        named.add_some("--console-log", self.console_log.as_deref(), Use::Live);
        named.add_some("--vmcore", self.vmcore.as_deref(), Use::Result);
        named.add_some("--report", self.report.as_deref(), Use::Result);
        named.add_some("--junit", self.junit.as_deref(), Use::Result);
    }

    /// Returns the maximum number of times that a guest is started.
    pub fn attempts(&self) -> u32 {
        self.retry_on_hang.saturating_add(1)
    }

    /// Returns whether a flag needs the kernel's console output.
    pub fn reads_console(&self) -> bool {
        self.console_log.is_some() || !self.expect.is_empty() || !self.fail_on.is_empty()
    }

    /// Returns whether vireo prints nothing about how the guest ended.
    pub fn quiet(&self) -> bool {
        self.quiet
    }

    /// Prints how the guest ended and what was found, unless `--quiet` is given; a core file that could not be written
    /// is reported in any case.
    pub fn tell(&self, ended: &Ended) {
        let found = ended.post_mortem.as_ref();
        // Anyone who gave a pattern knows what a matching line means.
        if let Some(found) = found.filter(|_| !self.quiet && !matches!(ended.outcome, Outcome::Refused(_))) {
            let _ = io::stderr()
                .write_all(found.text(!matches!(ended.outcome, Outcome::Lost(_) | Outcome::NotReady(_))).as_bytes());
        }
        match found.and_then(|found| found.vmcore.as_ref()) {
            Some(Err(e)) => say(&chain(e)),
            Some(Ok(path)) if !self.quiet => say(&format!("the guest's memory is in {}", path.display())),
            _ => {}
        }
        if !self.quiet {
            say(&ended.sentence());
        }
    }
}

/// Open files that the flags name.
pub struct Files {
    reports: Reports,
    log: Option<File>,
    vmcore: Option<Arc<OutputFile>>,
}

impl Files {
    /// Writes the reports; `name` is the name of what ran.
    pub fn write(&self, name: &str, report: &Report) -> Result<(), Failure> {
        self.reports.write(name, report)
    }

    /// Writes the reports for a failure that is told anyway.
    pub fn tell_failure(&self, name: &str, failure: &Failure) {
        self.reports.tell_failure(name, failure);
    }

    /// Writes the reports for a failure of vireo itself.
    pub fn write_failure(&self, name: &str, failure: &Failure) -> Result<(), Failure> {
        self.reports.write_failure(name, failure)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_may_think_for_two_seconds() {
        assert!(parse_hang_timeout("2s").is_ok());
        assert_eq!(parse_hang_timeout("1s").unwrap_err(), "must be at least 2s");
        assert!(parse_hang_timeout("soon").unwrap_err().contains("not a time"));
    }
}
