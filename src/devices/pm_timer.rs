//! ACPI's PM timer (ACPI 6.5, 4.8.3.3): 32 bits that count 3,579,545 times a second, for guests that do not use
//! kvmclock. It counts by the host's clock, so it costs nothing until it is read.

use std::time::{Duration, Instant};

use crate::bus::BusDevice;

/// Ticks per second.
const FREQUENCY: u128 = 3_579_545;

/// Timer, for [`crate::layout::PM_TIMER_LEN`] ports.
pub struct PmTimer {
    start: Instant,
}

impl PmTimer {
    /// Creates a timer that is at 0 now.
    pub fn new() -> Self {
        PmTimer { start: Instant::now() }
    }
}

impl Default for PmTimer {
    fn default() -> Self {
        PmTimer::new()
    }
}

/// Returns the counter after a time. It wraps.
fn count(elapsed: Duration) -> u32 {
    (elapsed.as_nanos() * FREQUENCY / 1_000_000_000) as u32
}

impl BusDevice for PmTimer {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let now = count(self.start.elapsed()).to_le_bytes();
        for (register, byte) in (offset..=u64::MAX).zip(data) {
            *byte = usize::try_from(register).ok().and_then(|at| now.get(at)).copied().unwrap_or(0);
        }
    }

    /// Ignores the write: the counter cannot be written.
    fn write(&self, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_counts_and_wraps() {
        assert_eq!(count(Duration::ZERO), 0);
        assert_eq!(count(Duration::from_secs(1)), 3_579_545);
        assert_eq!(count(Duration::from_millis(50)), 178_977);
        // 2^32 ticks are 1199.86 seconds.
        assert_eq!(count(Duration::from_secs(1200)), (1200 * 3_579_545u64 - (1 << 32)) as u32);
        assert_eq!(count(Duration::MAX), count(Duration::MAX), "no overflow");
    }

    #[test]
    fn every_width_is_harmless() {
        let timer = PmTimer::new();
        let read = || {
            let mut data = [0xFF; 4];
            timer.read(0, &mut data);
            u32::from_le_bytes(data)
        };
        let first = read();
        timer.write(0, &[0; 4]);
        assert!(read().wrapping_sub(first) < u32::MAX / 2, "it goes forward");
        for offset in [0, 1, 3, 4, u64::MAX] {
            for width in 0..=8 {
                let mut data = [0xFF; 8];
                timer.read(offset, &mut data[..width]);
                timer.write(offset, &data[..width]);
            }
        }
    }
}
