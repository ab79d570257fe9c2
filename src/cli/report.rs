//! Reports about how a guest ended, written to files: JSON for programs, JUnit for CI systems that show test results.

use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::junit::{self, Case};
use super::{Failure, chain, exit_code, say};
use crate::backend::output_file::OutputFile;
use crate::report::Report;

/// Error: a file that the user named could not be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum FileError {
    #[error("cannot read {0}")]
    Read(PathBuf, #[source] io::Error),
    #[error("{0} is not a valid machine description")]
    Parse(PathBuf, #[source] serde_json::Error),
    #[error("cannot write {0}")]
    Write(PathBuf, #[source] io::Error),
}

/// Destinations of a run's reports.
pub(super) struct Reports {
    json: Option<OutputFile>,
    junit: Option<OutputFile>,
}

impl Reports {
    /// Opens the destinations. Fails if one of them cannot be written.
    pub(super) fn new(json: Option<&Path>, junit: Option<&Path>) -> Result<Self, FileError> {
        let new = |path: &Path| OutputFile::new(path).map_err(|e| FileError::Write(path.into(), e));
        let open = |path: Option<&Path>| path.map(new).transpose();
        Ok(Reports { json: open(json)?, junit: open(junit)? })
    }

    /// Writes both reports; `name` is the name of what ran.
    pub(super) fn write(&self, name: &str, report: &Report) -> Result<(), Failure> {
        let json = self.write_json(report);
        let junit = self.write_junit(&[Case {
            name: name.into(),
            time: report.duration,
            code: report.exit_code,
            outcome: report.outcome.into(),
            detail: report.detail.clone(),
            log: report.kernel_log.join("\n"),
            output: String::new(),
        }]);
        json.and(junit)
    }

    /// Writes both reports for a failure of vireo itself.
    pub(super) fn write_failure(&self, name: &str, failure: &Failure) -> Result<(), Failure> {
        let (outcome, code, why) = ("failed", exit_code(failure), chain(&**failure));
        let json = self.write_json(&serde_json::json!({ "outcome": outcome, "detail": why, "exit_code": code }));
        let junit = self.write_junit(&[Case {
            name: name.into(),
            time: 0.0,
            code,
            outcome: outcome.into(),
            detail: why,
            log: String::new(),
            output: String::new(),
        }]);
        json.and(junit)
    }

    /// Writes both reports for a failure that is told anyway. If that fails, the error is told, too.
    pub(super) fn tell_failure(&self, name: &str, failure: &Failure) {
        if let Err(e) = self.write_failure(name, failure) {
            say(&chain(&*e));
        }
    }

    /// Writes the report for programs.
    pub(super) fn write_json(&self, report: &impl Serialize) -> Result<(), Failure> {
        let Some(file) = &self.json else { return Ok(()) };
        write(file, &format!("{}\n", serde_json::to_string_pretty(report)?))
    }

    /// Writes the report for CI systems.
    pub(super) fn write_junit(&self, cases: &[Case]) -> Result<(), Failure> {
        self.junit.as_ref().map_or(Ok(()), |file| write(file, &junit::suite(cases)))
    }
}

fn write(file: &OutputFile, text: &str) -> Result<(), Failure> {
    Ok(file.write(text.as_bytes()).map_err(|e| FileError::Write(file.path().into(), e))?)
}
