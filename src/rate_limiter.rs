//! Token buckets that limit how much a device may do per second.
//!
//! A bucket holds at most its burst and fills at its rate. A request larger than the burst waits for a full bucket and
//! then takes it into debt, so that large requests are slow but never stuck.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use crate::options::Size;

/// Limits of a device: a rate per second, and a burst size (one second's worth if not given).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Limit on bytes: rate and burst.
    pub bytes: Option<(u64, Option<u64>)>,
    /// Limit on requests: rate and burst.
    pub ops: Option<(u64, Option<u64>)>,
}

impl Limits {
    /// Builds the limits from option values. A burst without its rate has no effect.
    pub fn new(
        bandwidth: Option<Size>,
        bandwidth_burst: Option<Size>,
        ops: Option<u64>,
        ops_burst: Option<u64>,
    ) -> Self {
        let bytes = bandwidth.map(|rate| (rate.0, bandwidth_burst.map(|burst| burst.0)));
        Limits { bytes, ops: ops.map(|rate| (rate, ops_burst)) }
    }

    /// Returns true if there is any limit.
    pub fn any(&self) -> bool {
        self.bytes.is_some() || self.ops.is_some()
    }

    /// Returns true if a limit would never let anything through.
    pub fn is_zero(&self) -> bool {
        [self.bytes, self.ops].iter().flatten().any(|(rate, burst)| *rate == 0 || *burst == Some(0))
    }
}

/// Admits requests as fast as its limits allow. Shared by the workers of a device.
#[derive(Debug)]
pub struct RateLimiter(Mutex<Buckets>);

#[derive(Debug)]
struct Buckets {
    bytes: Option<Bucket>,
    ops: Option<Bucket>,
}

#[derive(Debug)]
struct Bucket {
    /// Tokens per second.
    rate: u64,
    burst: u64,
    /// Tokens in the bucket; negative after a request that was larger than the burst.
    level: f64,
    filled: Instant,
}

impl Bucket {
    fn new((rate, burst): (u64, Option<u64>), now: Instant) -> Self {
        let burst = burst.unwrap_or(rate);
        Bucket { rate, burst, level: burst as f64, filled: now }
    }

    fn fill(&mut self, now: Instant) {
        let time = now.saturating_duration_since(self.filled).as_secs_f64();
        self.level = (self.level + time * self.rate as f64).min(self.burst as f64);
        self.filled = now;
    }

    /// Time until `amount` tokens may be taken.
    fn wait(&self, amount: u64) -> Duration {
        let missing = amount.min(self.burst) as f64 - self.level;
        if missing <= 0.0 {
            return Duration::ZERO;
        }
        // Bounded: a debt may take long to pay, but a rounding error must not stall a device forever.
        Duration::from_secs_f64((missing / self.rate.max(1) as f64).min(3600.0)).max(Duration::from_micros(1))
    }
}

impl RateLimiter {
    /// Creates a limiter with full buckets.
    pub fn new(limits: Limits) -> Self {
        let now = Instant::now();
        let bucket = |limit: Option<_>| limit.map(|limit| Bucket::new(limit, now));
        RateLimiter(Mutex::new(Buckets { bytes: bucket(limits.bytes), ops: bucket(limits.ops) }))
    }

    /// Takes the tokens for one request of `bytes` bytes, or returns how long to wait before asking again.
    pub fn take(&self, bytes: u64) -> Result<(), Duration> {
        self.take_at(bytes, Instant::now())
    }

    /// Takes the tokens for a request that is already done, going into debt if there are too few. If no token is left
    /// for the next request, returns how long to wait for one.
    pub fn charge(&self, bytes: u64) -> Result<(), Duration> {
        self.charge_at(bytes, Instant::now())
    }

    /// Takes the tokens for bytes that a request transfers beyond those it was admitted for.
    pub fn charge_more(&self, bytes: u64) {
        let mut buckets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bucket) = &mut buckets.bytes {
            bucket.level -= bytes as f64;
        }
    }

    fn charge_at(&self, bytes: u64, now: Instant) -> Result<(), Duration> {
        let mut buckets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Buckets { bytes: for_bytes, ops } = &mut *buckets;
        let mut wait = Duration::ZERO;
        for (bucket, amount) in [(for_bytes, bytes), (ops, 1)] {
            if let Some(bucket) = bucket {
                bucket.fill(now);
                bucket.level -= amount as f64;
                wait = wait.max(bucket.wait(1));
            }
        }
        if wait > Duration::ZERO { Err(wait) } else { Ok(()) }
    }

    fn take_at(&self, bytes: u64, now: Instant) -> Result<(), Duration> {
        let mut buckets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Buckets { bytes: for_bytes, ops } = &mut *buckets;
        let mut wait = Duration::ZERO;
        for (bucket, amount) in [(&mut *for_bytes, bytes), (&mut *ops, 1)] {
            if let Some(bucket) = bucket {
                bucket.fill(now);
                wait = wait.max(bucket.wait(amount));
            }
        }
        if wait > Duration::ZERO {
            return Err(wait);
        }
        for (bucket, amount) in [(for_bytes, bytes), (ops, 1)] {
            if let Some(bucket) = bucket {
                bucket.level -= amount as f64;
            }
        }
        Ok(())
    }
}

/// A timer that a handler polls until the next request is admitted.
pub struct Alarm {
    timer: OwnedFd,
    set: bool,
}

impl Alarm {
    /// Creates a timer that is not set.
    pub fn new() -> io::Result<Self> {
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        Ok(Alarm { timer, set: false })
    }

    /// Makes the timer readable after `wait`.
    pub fn set(&mut self, wait: Duration) -> io::Result<()> {
        let never = Timespec { tv_sec: 0, tv_nsec: 0 };
        // A time of zero would disarm the timer.
        let wait = Timespec::try_from(wait.max(Duration::from_nanos(1))).map_err(io::Error::other)?;
        let once = Itimerspec { it_interval: never, it_value: wait };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once)?;
        self.set = true;
        Ok(())
    }

    /// Returns true if the timer was set and has not been cleared since.
    pub fn is_set(&self) -> bool {
        self.set
    }

    /// Clears the timer if it has expired. A timer still running stays set, so that handling an event twice does no
    /// harm.
    pub fn clear(&mut self) {
        if rustix::io::read(&self.timer, &mut [0; 8]).is_ok() {
            self.set = false;
        }
    }
}

impl AsRawFd for Alarm {
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn an_alarm_that_has_not_rung_keeps_nobody_waiting() {
        let mut alarm = Alarm::new().unwrap();
        alarm.clear();
        alarm.set(Duration::from_secs(1000)).unwrap();
        alarm.clear();
        assert!(alarm.is_set());
        alarm.set(Duration::ZERO).unwrap();
        let mut poller = crate::event::Poller::new().unwrap();
        poller.add(alarm.as_raw_fd(), 0, crate::event::Interest::Read).unwrap();
        assert_eq!(poller.wait(Some(Duration::from_secs(60))).unwrap().count(), 1);
        alarm.clear();
        assert!(!alarm.is_set());
        alarm.clear();
    }

    #[test]
    fn a_burst_and_then_the_rate() {
        let limits = Limits { bytes: Some((1000, Some(500))), ops: None };
        let (limiter, start) = (RateLimiter::new(limits), Instant::now());
        limiter.take_at(500, start).unwrap();
        let wait = limiter.take_at(100, start).unwrap_err();
        assert!(wait > 90 * MS && wait < 101 * MS, "{wait:?}");
        limiter.take_at(100, start + 101 * MS).unwrap();
        // The bucket saves up no more than the burst.
        limiter.take_at(500, start + 10_000 * MS).unwrap();
        assert!(limiter.take_at(10, start + 10_000 * MS).is_err());
    }

    #[test]
    fn larger_than_the_burst_is_slow_but_not_stuck() {
        let limiter = RateLimiter::new(Limits { bytes: Some((1000, Some(100))), ops: Some((1_000_000, None)) });
        let start = Instant::now() + MS;
        limiter.take_at(1100, start).unwrap();
        let wait = limiter.take_at(1100, start).unwrap_err();
        assert!(wait > 1090 * MS && wait < 1110 * MS, "{wait:?}");
        limiter.take_at(1100, start + wait).unwrap();
    }

    #[test]
    fn both_limits_hold() {
        let limiter = RateLimiter::new(Limits { bytes: Some((1_000_000, None)), ops: Some((10, Some(2))) });
        let start = Instant::now();
        limiter.take_at(1, start).unwrap();
        limiter.take_at(1, start).unwrap();
        let wait = limiter.take_at(1, start).unwrap_err();
        assert!(wait > 90 * MS && wait <= 100 * MS, "{wait:?}");
        assert!(Limits { ops: Some((0, None)), ..Limits::default() }.is_zero());
        assert!(Limits { ops: Some((5, Some(0))), ..Limits::default() }.is_zero());
    }

    #[test]
    fn what_was_done_already_delays_the_next() {
        let limiter = RateLimiter::new(Limits { bytes: Some((1000, Some(100))), ops: Some((1000, None)) });
        let start = Instant::now() + MS;
        limiter.charge_at(50, start).unwrap();
        let wait = limiter.charge_at(1050, start).unwrap_err();
        assert!(wait >= 1000 * MS && wait < 1010 * MS, "{wait:?}");
        assert!(limiter.take_at(1, start + wait - MS).is_err());
        limiter.take_at(1, start + wait + MS).unwrap();
        limiter.charge_more(2000);
        let wait = limiter.take_at(1, start + wait + MS).unwrap_err();
        assert!(wait > 1900 * MS && wait < 2010 * MS, "{wait:?}");
    }

    proptest! {
        /// Over any period, no more passes than the burst, plus the rate, plus one request.
        #[test]
        fn never_more_than_the_limit(
            rate in 1u64..10_000, burst in 1u64..10_000,
            steps in proptest::collection::vec((0u64..3000, 0u64..500), 1..100),
        ) {
            let limiter = RateLimiter::new(Limits { bytes: Some((rate, Some(burst))), ops: None });
            let start = Instant::now();
            let (mut now, mut total, mut largest) = (start, 0, 0);
            for (bytes, ms) in steps {
                now += Duration::from_millis(ms);
                if limiter.take_at(bytes, now).is_ok() {
                    total += bytes;
                    largest = largest.max(bytes);
                }
            }
            let allowed = burst as f64 + (now - start).as_secs_f64() * rate as f64 + largest as f64 + 1.0;
            prop_assert!(total as f64 <= allowed, "{total} of {allowed}");
        }
    }
}
