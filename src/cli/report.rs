//! What is written to files about how a guest ended: JSON for programs, JUnit for the CI systems that show test results.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::RawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::junit::{self, Case};
use super::{Failure, chain, exit_code};
use crate::backend::console;
use crate::outcome::Report;

/// A file of the user's could not be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum FileError {
    #[error("cannot read {0}")]
    Read(PathBuf, #[source] io::Error),
    #[error("{0} is no machine description")]
    Parse(PathBuf, #[source] serde_json::Error),
    #[error("cannot write {0}")]
    Write(PathBuf, #[source] io::Error),
}

/// Where the reports of a run go.
pub(super) struct Reports {
    json: Option<ReportFile>,
    junit: Option<ReportFile>,
}

impl Reports {
    /// Fails if one of them cannot be written.
    pub(super) fn new(json: Option<&Path>, junit: Option<&Path>) -> Result<Self, FileError> {
        let open = |path: Option<&Path>| path.map(ReportFile::new).transpose();
        Ok(Reports { json: open(json)?, junit: open(junit)? })
    }

    /// Writes them; `name` is what ran.
    pub(super) fn write(&self, name: &str, report: &Report) -> Result<(), Failure> {
        self.write_json(report)?;
        self.write_junit(&[Case {
            name: name.into(),
            time: report.duration,
            code: report.exit_code,
            outcome: report.outcome.into(),
            detail: report.detail.clone(),
            log: report.kernel_log.join("\n"),
            output: String::new(),
        }])
    }

    /// The same when vireo failed.
    pub(super) fn write_failure(&self, name: &str, failure: &Failure) -> Result<(), Failure> {
        let (outcome, code, why) = ("failed", exit_code(failure), chain(&**failure));
        self.write_json(&serde_json::json!({ "outcome": outcome, "detail": why, "exit_code": code }))?;
        self.write_junit(&[Case {
            name: name.into(),
            time: 0.0,
            code,
            outcome: outcome.into(),
            detail: why,
            log: String::new(),
            output: String::new(),
        }])
    }

    /// The report for programs.
    pub(super) fn write_json(&self, report: &impl Serialize) -> Result<(), Failure> {
        let Some(file) = &self.json else { return Ok(()) };
        Ok(file.write(&format!("{}\n", serde_json::to_string_pretty(report)?))?)
    }

    /// The report for CI systems.
    pub(super) fn write_junit(&self, cases: &[Case]) -> Result<(), Failure> {
        Ok(self.junit.as_ref().map_or(Ok(()), |file| file.write(&junit::suite(cases)))?)
    }
}

/// Where a report goes.
struct ReportFile {
    path: PathBuf,
    /// A FIFO, device or file in memory, open from the start.
    special: Option<File>,
}

impl ReportFile {
    /// Fails if the report cannot be written: now rather than when the guest has run for an hour.
    fn new(path: &Path) -> Result<Self, FileError> {
        let fail = |e| FileError::Write(path.into(), e);
        if let Some(fd) = own_descriptor(path) {
            return Ok(ReportFile { path: path.into(), special: Some(console::duplicate(fd).map_err(fail)?) });
        }
        // What a link leads to is replaced, not the link.
        let link = fs::symlink_metadata(path).is_ok_and(|m| m.is_symlink() && !path.starts_with("/proc"));
        let target = if link { fs::canonicalize(path).map_err(fail)? } else { path.into() };
        let mut report = ReportFile { path: target, special: None };
        match fs::metadata(path) {
            Ok(m) if m.is_dir() => return Err(fail(io::ErrorKind::IsADirectory.into())),
            // What has no name has no place beside it, either.
            Ok(m) if !m.is_file() || m.nlink() == 0 => report.special = Some(open_special(path).map_err(fail)?),
            _ => {
                let beside = report.beside();
                fs::write(&beside, "").and_then(|()| fs::remove_file(beside)).map_err(fail)?;
            }
        }
        Ok(report)
    }

    /// Written beside and renamed, so that nobody reads half a report; straight into what is no regular file.
    fn write(&self, text: &str) -> Result<(), FileError> {
        let written = match self.special.as_ref() {
            Some(mut file) => file.write_all(text.as_bytes()),
            None => {
                let beside = self.beside();
                let written = fs::write(&beside, text).and_then(|()| fs::rename(&beside, &self.path));
                written.inspect_err(|_| _ = fs::remove_file(beside))
            }
        };
        written.map_err(|e| FileError::Write(self.path.clone(), e))
    }

    fn beside(&self) -> PathBuf {
        let mut name = self.path.as_os_str().to_os_string();
        name.push(format!(".{}.tmp", std::process::id()));
        name.into()
    }
}

/// Which of this process's open files a path means: written to where they stand, and not replaced.
fn own_descriptor(path: &Path) -> Option<RawFd> {
    match path.to_str()? {
        "/dev/stdout" => Some(libc::STDOUT_FILENO),
        "/dev/stderr" => Some(libc::STDERR_FILENO),
        path => path.strip_prefix("/dev/fd/").or_else(|| path.strip_prefix("/proc/self/fd/"))?.parse().ok(),
    }
}

/// Opens a FIFO or device without waiting for anybody, whom no signal would end.
fn open_special(path: &Path) -> io::Result<File> {
    let file = File::options().write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
    let file = file.map_err(|e| match e {
        e if e.raw_os_error() == Some(libc::ENXIO) => io::Error::other("nobody reads this FIFO"),
        e => e,
    })?;
    // Only the opening must not wait.
    rustix::io::ioctl_fionbio(&file, false)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_link_stays_one() {
        let dir = tempfile::tempdir().unwrap();
        let (target, link) = (dir.path().join("target"), dir.path().join("link"));
        fs::write(&target, "old").unwrap();
        symlink(&target, &link).unwrap();
        ReportFile::new(&link).unwrap().write("new").unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read_to_string(&target).unwrap(), "new");
        fs::remove_file(&target).unwrap();
        assert!(ReportFile::new(&link).is_err(), "it leads nowhere");
    }

    #[test]
    fn open_files_are_written_to_where_they_stand() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stdout");
        let mut stdout = File::create(&path).unwrap();
        stdout.write_all(b"before\n").unwrap();
        let name = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&stdout));
        ReportFile::new(name.as_ref()).unwrap().write("report\n").unwrap();
        stdout.write_all(b"after\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "before\nreport\nafter\n");
        assert_eq!(own_descriptor("/dev/stdout".as_ref()), Some(1));
        assert_eq!(own_descriptor("/dev/shm/report".as_ref()), None);
    }
}
