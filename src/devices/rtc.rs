//! The real-time clock of a PC, an MC146818, limited to reading the time: in UTC, by the host's clock.
//!
//! | port | |
//! |---|---|
//! | 0x70 | number of a register or byte (bit 7, which masks NMIs on a PC, does nothing) |
//! | 0x71 | its value |
//!
//! | register | |
//! |---|---|
//! | 0, 2, 4 | seconds, minutes, hours |
//! | 6 to 9, 0x32 | day of the week (Sunday is 1), day, month, year, century |
//! | 0xA | bit 7: the time changes within 244 us (UIP); the other bits are stored |
//! | 0xB | bit 1: 24 hours, otherwise 12 and PM in bit 7; bit 2: binary, otherwise BCD; the other bits are stored |
//! | 0xC | pending interrupts: always 0, because there are no interrupts |
//! | 0xD | bit 7: the clock is valid |
//! | others | store what is written; the time cannot be set |

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::bus::BusDevice;

const INDEX: u64 = 0;
const SECONDS: u8 = 0;
const MINUTES: u8 = 2;
const HOURS: u8 = 4;
const WEEKDAY: u8 = 6;
const DAY: u8 = 7;
const MONTH: u8 = 8;
const YEAR: u8 = 9;
const REGISTER_A: u8 = 0xA;
const REGISTER_B: u8 = 0xB;
const REGISTER_C: u8 = 0xC;
const REGISTER_D: u8 = 0xD;
const CENTURY: u8 = 0x32;

/// Register A: an update is in progress, or begins within [`UPDATE`].
const UIP: u8 = 1 << 7;
/// Register A as a BIOS leaves it: the 32,768 Hz crystal, 1024 Hz.
const RATES: u8 = 0x26;
const HOURS_24: u8 = 1 << 1;
const BINARY: u8 = 1 << 2;
/// Register D: the battery is good.
const VALID: u8 = 1 << 7;
const PM: u8 = 1 << 7;

/// Time that a guest has to read unchanging values after it finds UIP clear.
const UPDATE: Duration = Duration::from_micros(244);

/// Clock, for [`crate::layout::RTC_LEN`] ports.
pub struct Rtc {
    state: Mutex<State>,
}

struct State {
    index: u8,
    bytes: [u8; 128],
}

impl Rtc {
    /// Creates a clock with 24 hours in BCD.
    pub fn new() -> Self {
        let mut bytes = [0; 128];
        (bytes[usize::from(REGISTER_A)], bytes[usize::from(REGISTER_B)]) = (RATES, HOURS_24);
        Rtc { state: Mutex::new(State { index: 0, bytes }) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Rtc {
    fn default() -> Self {
        Rtc::new()
    }
}

impl State {
    /// Returns the value of the selected register, at a time since 1970.
    fn value(&self, now: Duration) -> u8 {
        let mode = self.bytes[usize::from(REGISTER_B)];
        let date = Date::of(now.as_secs());
        let number = |n: u64| if mode & BINARY != 0 { n as u8 } else { (n / 10 * 16 + n % 10) as u8 };
        match self.index {
            SECONDS => number(date.seconds % 60),
            MINUTES => number(date.seconds / 60 % 60),
            HOURS if mode & HOURS_24 != 0 => number(date.seconds / 3600),
            HOURS => {
                let hours = date.seconds / 3600;
                number((hours + 11) % 12 + 1) | if hours >= 12 { PM } else { 0 }
            }
            WEEKDAY => number(date.weekday),
            DAY => number(date.day),
            MONTH => number(date.month),
            YEAR => number(date.year % 100),
            CENTURY => number(date.year / 100 % 100),
            REGISTER_A => {
                let soon = now.subsec_nanos() + UPDATE.subsec_nanos() >= 1_000_000_000;
                self.bytes[usize::from(REGISTER_A)] & !UIP | if soon { UIP } else { 0 }
            }
            REGISTER_C => 0,
            REGISTER_D => VALID,
            index => self.bytes[usize::from(index)],
        }
    }
}

/// Day of the Gregorian calendar, and the second in it.
struct Date {
    year: u64,
    month: u64,
    day: u64,
    /// Day of the week; 1 is Sunday.
    weekday: u64,
    seconds: u64,
}

impl Date {
    /// Returns the date this many seconds after the beginning of 1970.
    fn of(seconds: u64) -> Date {
        const DAYS_OF_400_YEARS: u64 = 146_097;
        let days = seconds / 86_400;
        // Years that begin in March end with the leap day. March 1 of year 0 was 719,468 days before 1970.
        let since = days + 719_468;
        let (era, day) = (since / DAYS_OF_400_YEARS, since % DAYS_OF_400_YEARS);
        let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
        let day_of_year = day - (365 * year + year / 4 - year / 100);
        // Five months from March on have 153 days, and so do the five after them.
        let month = (5 * day_of_year + 2) / 153;
        let (months, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
        Date {
            year: era * 400 + year + next,
            month: months,
            day: day_of_year - (153 * month + 2) / 5 + 1,
            weekday: (days + 4) % 7 + 1, // 1970 began on a Thursday.
            seconds: seconds % 86_400,
        }
    }
}

impl BusDevice for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let state = self.lock();
        for (register, byte) in (offset..=u64::MAX).zip(data) {
            // The index port cannot be read.
            if register == INDEX + 1 {
                *byte = state.value(now);
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.lock();
        for (register, byte) in (offset..=u64::MAX).zip(data) {
            if register == INDEX {
                state.index = byte & 0x7F;
            } else if register == INDEX + 1 {
                let index = usize::from(state.index);
                state.bytes[index] = *byte;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64, mode: u8, index: u8) -> u8 {
        let mut state = State { index, bytes: [0; 128] };
        state.bytes[usize::from(REGISTER_B)] = mode;
        state.value(Duration::from_secs(seconds))
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        let date = |seconds| {
            let Date { year, month, day, weekday, seconds } = Date::of(seconds);
            (year, month, day, weekday, seconds)
        };
        // Results of `date -u -d @N '+%Y %m %d %w'`, with one added to the day of the week.
        assert_eq!(date(0), (1970, 1, 1, 5, 0));
        assert_eq!(date(951_782_399), (2000, 2, 28, 2, 86_399));
        assert_eq!(date(951_782_400), (2000, 2, 29, 3, 0));
        assert_eq!(date(951_868_800), (2000, 3, 1, 4, 0));
        assert_eq!(date(1_795_847_383), (2026, 11, 28, 7, 23_383));
        assert_eq!(date(4_107_542_400), (2100, 3, 1, 2, 0));
        assert_eq!(date(13_569_465_600), (2400, 1, 1, 7, 0));
    }

    #[test]
    fn every_format_is_understood() {
        const TIME: u64 = 1_795_847_383; // 2026-11-28 06:29:43
        const NOON: u64 = TIME - TIME % 86_400 + 43_200;
        let all = |mode| [SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY].map(|n| at(TIME, mode, n));
        assert_eq!(all(HOURS_24), [0x43, 0x29, 0x06, 0x07, 0x28, 0x11, 0x26, 0x20]);
        assert_eq!(all(HOURS_24 | BINARY), [43, 29, 6, 7, 28, 11, 26, 20]);
        for (time, hour) in [(NOON - 43_200, 12), (NOON - 1, 11), (NOON, 12 | PM), (NOON + 43_199, 11 | PM)] {
            assert_eq!(at(time, BINARY, HOURS), hour, "{time}");
        }
        assert_eq!(at(NOON + 43_199, 0, HOURS), 0x11 | PM);
    }

    #[test]
    fn the_update_is_announced() {
        let state = State { index: REGISTER_A, bytes: [0; 128] };
        let uip = |nanos| state.value(Duration::new(7, nanos)) & UIP != 0;
        assert!(!uip(0) && !uip(999_755_999) && uip(999_756_000) && uip(999_999_999));
    }

    #[test]
    fn registers_remember_and_every_access_is_harmless() {
        let rtc = Rtc::new();
        let read = |index: u8| {
            rtc.write(INDEX, &[index]);
            let mut data = [0xFF];
            rtc.read(INDEX + 1, &mut data);
            data[0]
        };
        assert_eq!((read(REGISTER_B), read(REGISTER_C), read(REGISTER_D)), (HOURS_24, 0, VALID));
        assert_eq!(read(REGISTER_A) & !UIP, RATES);
        rtc.write(INDEX, &[0x80 | 0x7F]);
        rtc.write(INDEX + 1, &[77]);
        assert_eq!((read(0x7F), read(0x7E)), (77, 0));
        // A write does not change the time.
        let year = read(YEAR);
        rtc.write(INDEX, &[YEAR, 0x99]);
        assert!(read(YEAR) == year || read(YEAR) == year + 1);
        for offset in [0, 1, 2, u64::MAX] {
            for width in 0..=8 {
                rtc.write(offset, &[0xFF; 8][..width]);
                rtc.read(offset, &mut [0xFF; 8][..width]);
            }
        }
    }
}
