//! Guests that do nothing any more: those that sleep for good, and those that hang; and people who insist on an end.

use std::time::{Duration, Instant};

#[derive(Default)]
pub(super) struct SleepWatch {
    pub(super) cpu_time: Duration,
    pub(super) ticks: u32,
    pub(super) interval: u32,
}

/// Whether the guest still does something.
pub(super) struct HangWatch {
    pub(super) looked: Instant,
    pub(super) busy: Instant,
    output: u64,
    pub(super) cpu_time: Duration,
}

/// How often it is looked at.
pub(super) const HANG_LOOK: Duration = Duration::from_secs(1);

impl HangWatch {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        HangWatch { looked: now, busy: now, output: 0, cpu_time: Duration::ZERO }
    }

    /// A guest that uses less than a twentieth of a processor only waits, whatever its timers do.
    pub(super) fn look(&mut self, now: Instant, output: u64, cpu_time: Duration) {
        let used = cpu_time.saturating_sub(self.cpu_time);
        if output != self.output || used * 20 > now - self.looked {
            self.busy = now;
        }
        *self = HangWatch { looked: now, output, cpu_time, ..*self };
    }
}

/// So many signals in this time end a guest, though its command gets them.
const INSISTENT: u32 = 3;
const INSISTENCE: Duration = Duration::from_secs(10);

/// Whether somebody wants an end, whatever those who get the signals do with them.
#[derive(Default)]
pub(super) struct Insistence {
    heard: u32,
    /// When the first of them came.
    since: Option<Instant>,
}

impl Insistence {
    /// Notes a signal; whether it is one too many.
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
    fn output_and_work_are_life() {
        let mut watch = HangWatch::new();
        let start = watch.busy;
        let at = |seconds| start + Duration::from_secs(seconds);
        watch.look(at(1), 0, Duration::from_millis(20));
        assert_eq!(watch.busy, start, "timers tick");
        watch.look(at(2), 1, Duration::from_millis(40));
        assert_eq!(watch.busy, at(2), "a byte");
        watch.look(at(3), 1, Duration::from_millis(140));
        assert_eq!(watch.busy, at(3), "a tenth of a processor");
        watch.look(at(9), 1, Duration::from_millis(240));
        assert_eq!(watch.busy, at(3));
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
