//! Limits for log lines that a guest, a daemon or a client can cause as often as it likes, so that they flood neither a
//! terminal nor the file of `--log-file`.

use std::fmt::Display;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use log::Level;

/// Number of lines that one limit lets through.
pub const MAX_LINES: u32 = 10;

/// Counts the lines of one kind from one source, and drops those after the first [`MAX_LINES`]. Clones share the count.
///
/// A device keeps its limit for as long as it exists: a limit that started again at each activation would not bound a
/// guest that resets the device in a loop.
#[derive(Clone, Debug, Default)]
pub struct LogLimit(Arc<AtomicU32>);

impl LogLimit {
    /// Logs a warning, within the bound.
    pub fn warn(&self, line: impl Display) {
        self.log(Level::Warn, line);
    }

    /// Logs a debug line, within the bound.
    pub fn debug(&self, line: impl Display) {
        self.log(Level::Debug, line);
    }

    /// Logs a line, within the bound. The last such line says that it is the last.
    pub fn log(&self, level: Level, line: impl Display) {
        // Lines below the log level must not use up the bound.
        if !log::log_enabled!(level) {
            return;
        }
        match self.next() {
            Some(n) if n + 1 < MAX_LINES => log::log!(level, "{line}"),
            Some(_) => log::log!(level, "{line} (further messages of this kind are not logged)"),
            None => {}
        }
    }

    /// Returns the index of the next line, if it is within the bound.
    fn next(&self) -> Option<u32> {
        let next = |n| (n < MAX_LINES).then_some(n + 1);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_lines_pass() {
        let limit = LogLimit::default();
        let clone = limit.clone();
        let passed: Vec<u32> =
            (0..100_000).filter_map(|n| if n % 2 == 0 { limit.next() } else { clone.next() }).collect();
        assert_eq!(passed, (0..MAX_LINES).collect::<Vec<_>>());
        assert_eq!(LogLimit::default().next(), Some(0));
    }
}
