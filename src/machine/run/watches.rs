//! Guests that do nothing any more: those that sleep for good, and those that hang.

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
}
