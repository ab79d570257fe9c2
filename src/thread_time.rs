//! Processor time of a thread: how much it got, and how long it waited for a processor.
//!
//! A guest that gets no processor because the host is busy looks like an idle guest. The time for which its vCPU
//! threads were ready to run but did not run, which the kernel reports in `schedstat`, distinguishes the two.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// The running totals of one thread.
pub struct ThreadTime {
    /// The thread's `schedstat`, see Documentation/scheduler/sched-stats.rst of Linux.
    file: File,
}

impl ThreadTime {
    /// Opens the totals of the calling thread. Fails on a host whose kernel does not keep them.
    pub fn of_this_thread() -> io::Result<Self> {
        File::open("/proc/thread-self/schedstat").map(|file| ThreadTime { file })
    }

    /// Time for which the thread was ready to run but waited for a processor. Zero once the thread has ended.
    pub fn waited(&self) -> Duration {
        let mut text = [0; 96];
        let len = self.file.read_at(&mut text, 0).unwrap_or(0);
        parse_waited(&text[..len]).unwrap_or_default()
    }
}

/// Parses the second of the three numbers, which is in nanoseconds.
fn parse_waited(text: &[u8]) -> Option<Duration> {
    let text = std::str::from_utf8(text).ok()?;
    text.split_ascii_whitespace().nth(1)?.parse().ok().map(Duration::from_nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_number_is_time_waited() {
        assert_eq!(parse_waited(b"22013000 1500000000 12\n"), Some(Duration::from_millis(1500)));
        assert_eq!(parse_waited(b"22013000"), None);
        assert_eq!(parse_waited(b"1 -2 3"), None);
    }

    #[test]
    fn a_thread_that_has_ended_waits_for_nothing() {
        let time = std::thread::spawn(|| ThreadTime::of_this_thread().unwrap()).join().unwrap();
        assert_eq!(time.waited(), Duration::ZERO);
    }
}
