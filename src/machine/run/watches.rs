//! Detection of guests that no longer do anything, because they sleep forever or hang; and of users who insist on an
//! end.

use std::time::{Duration, Instant};

#[derive(Default)]
pub(super) struct SleepWatch {
    pub(super) cpu_time: Duration,
    pub(super) ticks: u32,
    pub(super) interval: u32,
}

/// Detects a guest that has stopped making progress: no output, and hardly any work by its vCPUs.
pub(super) struct HangWatch {
    polled: Instant,
    /// Time without progress so far.
    idle: Duration,
    output: u64,
    work: Duration,
}

/// Interval between two polls.
const HANG_POLL: Duration = Duration::from_secs(1);

impl HangWatch {
    pub(super) fn new() -> Self {
        HangWatch { polled: Instant::now(), idle: Duration::ZERO, output: 0, work: Duration::ZERO }
    }

    /// Returns whether the next poll is due.
    pub(super) fn due(&self, now: Instant) -> bool {
        now.duration_since(self.polled) >= HANG_POLL
    }

    /// Takes the totals since the guest's start: bytes of console output, and the time that its vCPUs ran or wanted to
    /// run.
    ///
    /// A guest that uses less than a twentieth of a processor only waits, whatever its timers do. A late poll shows
    /// that vireo itself did not run (a stopped process, a suspended or overloaded host), so the guest did not have
    /// that time either: one poll adds at most twice its interval.
    pub(super) fn poll(&mut self, now: Instant, output: u64, work: Duration) {
        let elapsed = now.duration_since(self.polled);
        if output != self.output || work.saturating_sub(self.work) * 20 > elapsed {
            self.idle = Duration::ZERO;
        } else {
            self.idle += elapsed.min(HANG_POLL * 2);
        }
        *self = HangWatch { polled: now, output, work, ..*self };
    }

    /// Starts over after the guest was paused.
    pub(super) fn restart(&mut self, now: Instant) {
        (self.polled, self.idle) = (now, Duration::ZERO);
    }

    /// Returns the time without progress.
    pub(super) fn idle(&self) -> Duration {
        self.idle
    }
}

/// Number of signals within [`INSISTENCE`] that end a guest even though its command receives them.
const INSISTENT: u32 = 3;
const INSISTENCE: Duration = Duration::from_secs(10);

/// Detects that the user insists on an end, whatever the receivers of the signals do with them.
#[derive(Default)]
pub(super) struct Insistence {
    heard: u32,
    /// Time of the first counted signal.
    since: Option<Instant>,
}

impl Insistence {
    /// Counts a signal; returns whether it was one too many.
    pub(super) fn heard(&mut self, signal: i32, now: Instant) -> bool {
        if ![libc::SIGINT, libc::SIGTERM, libc::SIGQUIT].contains(&signal) {
            return false;
        }
        if self.since.is_none_or(|since| now.duration_since(since) >= INSISTENCE) {
            *self = Insistence { heard: 0, since: Some(now) };
        }
        self.heard = self.heard.saturating_add(1);
        self.heard >= INSISTENT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_and_work_are_progress() {
        let mut watch = HangWatch::new();
        let start = watch.polled;
        let mut idle_after = |seconds, output, work| {
            watch.poll(start + Duration::from_secs(seconds), output, Duration::from_millis(work));
            watch.idle()
        };
        assert_eq!(idle_after(1, 0, 20), Duration::from_secs(1), "timers tick");
        assert_eq!(idle_after(2, 1, 40), Duration::ZERO, "a byte");
        assert_eq!(idle_after(3, 1, 140), Duration::ZERO, "a tenth of a processor");
        assert_eq!(idle_after(5, 1, 200), Duration::from_secs(2));
        assert_eq!(idle_after(6, 1, 210), Duration::from_secs(3));
    }

    #[test]
    fn time_that_vireo_did_not_run_is_not_the_guest_s() {
        let mut watch = HangWatch::new();
        let start = watch.polled;
        assert!(!watch.due(start + Duration::from_millis(900)));
        watch.poll(start + Duration::from_secs(3600), 0, Duration::ZERO);
        assert_eq!(watch.idle(), Duration::from_secs(2));
        watch.restart(start + Duration::from_secs(3700));
        assert_eq!(watch.idle(), Duration::ZERO);
    }

    #[test]
    fn the_third_signal_in_ten_seconds_insists() {
        let (mut insistence, begin) = (Insistence::default(), Instant::now());
        let mut heard = |signal, after| insistence.heard(signal, begin + Duration::from_secs(after));
        assert_eq!([heard(libc::SIGTERM, 0), heard(libc::SIGUSR1, 1), heard(libc::SIGINT, 9)], [false; 3]);
        assert_eq!([heard(libc::SIGINT, 11), heard(libc::SIGINT, 12)], [false; 2], "it began anew");
        assert!(heard(libc::SIGINT, 13));
    }
}
