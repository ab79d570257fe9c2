//! The files that a matrix and all of its runs name, found to be one file under two names before the first run starts.
//!
//! Each run checks its own, too, but knows nothing of the others: of a disk of one that is the console log of another, or
//! of the file that the report about all of them replaces.

use clap::FromArgMatches;

use super::{Given, Run};
use crate::cli::LogArgs;
use crate::cli::exec::ExecArgs;
use crate::cli::named::{NamedFiles, Use};

/// The files that are about all runs and those of each run, with the folders that guests of any run write to.
pub(super) fn named(given: &Given, runs: &[Run], exec: &clap::Command) -> NamedFiles {
    let mut named = NamedFiles::default();
    named.add("--matrix", &given.matrix, Use::Read);
    named.add_some("--report", given.report.as_deref(), Use::Result);
    named.add_some("--junit", given.junit.as_deref(), Use::Result);
    for run in runs {
        if let Ok(matches) = exec.clone().no_binary_name(true).try_get_matches_from(&run.words) {
            named.add_run(&run.name, of_run(&matches));
        }
        for suffix in ["log", "json"] {
            let file = given.output_dir.as_ref().map(|dir| dir.join(format!("{}.{suffix}", run.name)));
            named.add_some("--output-dir", file.as_deref(), Use::Renewed);
        }
    }
    named
}

/// The files that a run's own command line names.
fn of_run(matches: &clap::ArgMatches) -> NamedFiles {
    let args = ExecArgs::from_arg_matches(matches);
    let mut named = args.map_or_else(|_| NamedFiles::default(), |args| args.named(args.kernel().unwrap_or_default()));
    LogArgs::from_arg_matches(matches).iter().for_each(|log| log.add_to(&mut named));
    named
}
