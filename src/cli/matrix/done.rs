//! Results of the runs of a matrix.

use std::fmt::Write;

use serde::Serialize;
use serde_json::Value as Json;

use super::Run;
use crate::cli::junit::Case;
use crate::cli::{Failure, chain, exit_code};
use crate::outcome::EXIT_VIREO_FAILED;

/// Result of a run.
#[derive(Serialize)]
pub(super) struct Done {
    pub(super) name: String,
    /// vireo's exit status.
    pub(super) exit_code: u8,
    pub(super) outcome: String,
    pub(super) detail: String,
    /// Seconds from the run's start to its end.
    pub(super) duration: f64,
    /// Report that the run itself wrote.
    pub(super) report: Json,
    #[serde(skip)]
    pub(super) output: String,
}

impl Done {
    /// Returns the result of a run that vireo failed, with its sentence.
    pub(super) fn new(run: &Run, detail: String) -> Self {
        Done {
            name: run.name.clone(),
            exit_code: EXIT_VIREO_FAILED,
            outcome: "failed".into(),
            detail,
            duration: 0.0,
            report: Json::Null,
            output: String::new(),
        }
    }

    /// Returns the result of a run with this failure.
    pub(super) fn failed(run: &Run, failure: &Failure) -> Self {
        Done { exit_code: exit_code(failure), ..Done::new(run, chain(&**failure)) }
    }

    /// Returns the run as a test's result.
    pub(super) fn case(&self) -> Case {
        Case {
            name: self.name.clone(),
            time: self.duration,
            code: self.exit_code,
            outcome: self.outcome.clone(),
            detail: self.detail.clone(),
            log: lines(&self.report["kernel_log"]),
            output: self.output.clone(),
        }
    }
}

fn lines(list: &Json) -> String {
    list.as_array().map_or(String::new(), |lines| lines.iter().filter_map(Json::as_str).collect::<Vec<_>>().join("\n"))
}

/// Returns a table of how all runs ended.
pub(super) fn table(done: &[Done]) -> String {
    let width =
        |of: fn(&Done) -> &str, title: &str| done.iter().map(|d| of(d).len()).max().unwrap_or(0).max(title.len());
    let (name, outcome) = (width(|d| &d.name, "RUN"), width(|d| &d.outcome, "RESULT"));
    let mut text = format!("{:<name$}  {:<outcome$}  CODE  {:>8}\n", "RUN", "RESULT", "TIME");
    for d in done {
        let why = if d.exit_code == 0 { "" } else { &d.detail };
        let line =
            format!("{:<name$}  {:<outcome$}  {:>4}  {:>6.1} s  {why}", d.name, d.outcome, d.exit_code, d.duration);
        let _ = writeln!(text, "{}", line.trim_end());
    }
    let failed = done.iter().filter(|d| d.exit_code != 0).count();
    let _ = writeln!(text, "{} runs, {failed} failed", done.len());
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table() {
        let done = |name: &str, exit_code, outcome: &str| Done {
            name: name.into(),
            exit_code,
            outcome: outcome.into(),
            detail: "the sentence".into(),
            duration: 12.34,
            report: Json::Null,
            output: String::new(),
        };
        assert_eq!(
            table(&[done("stable/smp", 0, "exited"), done("x", 70, "panicked")]),
            "RUN         RESULT    CODE      TIME\n\
             stable/smp  exited       0    12.3 s\n\
             x           panicked    70    12.3 s  the sentence\n\
             2 runs, 1 failed\n"
        );
    }
}
