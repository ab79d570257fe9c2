//! vireo's own messages: `log` to stderr or a file.

use std::io::Write;
use std::path::Path;

use env_logger::{Builder, Env, Target};

use super::Failure;
use crate::backend::output_file::{Begin, live};
use crate::printable;

/// Error: a log file could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot open the log file {0}")]
struct LogFile(std::path::PathBuf, #[source] std::io::Error);

/// Sets up the logger: `--log-level` wins over RUST_LOG, which wins over `warn`.
pub fn init(level: Option<&str>, file: Option<&Path>) -> Result<(), Failure> {
    let mut builder = Builder::from_env(Env::default().default_filter_or("warn"));
    if let Some(level) = level {
        builder.parse_filters(level);
    }
    if let Some(path) = file {
        let file = live(path, Begin::Append);
        builder.target(Target::Pipe(Box::new(file.map_err(|e| LogFile(path.into(), e))?)));
    }
    // One write per line, so that lines of several threads do not mix. On stderr they look like vireo's other lines.
    builder.format(|out, record| {
        let text = printable::message(&record.args().to_string());
        match record.level() {
            log::Level::Warn | log::Level::Error => writeln!(out, "vireo: {text}"),
            level => writeln!(out, "vireo: {level}: {text}"),
        }
    });
    builder.try_init()?;
    Ok(())
}
