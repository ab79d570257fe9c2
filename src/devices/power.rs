//! The power block: ACPI sleep and reset registers (ACPI 6.5, 4.8.3.6 and 4.8.3.7) and the boot timer, at
//! [`layout::POWER_BLOCK`].
//!
//! | port | register | |
//! |---|---|---|
//! | +0 | sleep control | writing SLP_EN with sleep type 5 powers off |
//! | +1 | sleep status | bit 7, WAK_STS, is set by any other sleep type: the guest wakes immediately |
//! | +2 | reset | writing [`layout::RESET_VALUE`] resets |
//! | +7 | boot timer | init writes [`layout::BOOT_TIMER_INIT_STARTED`] |

use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::guest_event::{GuestEvent, GuestEvents};
use crate::layout::{self, S5_SLEEP_TYPE};

const SLEEP_CONTROL: u64 = offset(layout::SLEEP_CONTROL_PORT);
const SLEEP_STATUS: u64 = offset(layout::SLEEP_STATUS_PORT);
const RESET: u64 = offset(layout::RESET_PORT);
const BOOT_TIMER: u64 = offset(layout::BOOT_TIMER_PORT);

/// Sleep control: the sleep type, bits 2 to 4.
const SLP_TYP: u8 = 0b111 << 2;
/// Sleep control: go to sleep now. Reads as 0.
const SLP_EN: u8 = 1 << 5;
/// Sleep status: the machine woke up. Cleared by writing 1.
const WAK_STS: u8 = 1 << 7;

const fn offset(port: u16) -> u64 {
    (port - layout::POWER_BLOCK) as u64
}

/// State of the registers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PowerState {
    /// Sleep type last written.
    pub sleep_type: u8,
    /// WAK_STS.
    pub woken: bool,
}

/// The power block.
pub struct Power {
    events: GuestEvents,
    state: Mutex<PowerState>,
}

impl Power {
    /// Creates a power block that reports the guest's requests to `events`.
    pub fn new(events: GuestEvents) -> Self {
        Power { events, state: Mutex::default() }
    }

    /// Returns the state to save.
    pub fn save(&self) -> PowerState {
        self.lock().clone()
    }

    /// Continues from a saved state.
    pub fn restore(&self, state: &PowerState) {
        let PowerState { sleep_type, woken } = *state;
        *self.lock() = PowerState { sleep_type: sleep_type & SLP_TYP >> 2, woken };
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, PowerState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_register(&self, register: u64) -> u8 {
        let state = self.lock();
        match register {
            SLEEP_CONTROL => state.sleep_type << 2,
            SLEEP_STATUS if state.woken => WAK_STS,
            _ => 0,
        }
    }

    fn write_register(&self, register: u64, value: u8) {
        match register {
            SLEEP_CONTROL => self.sleep(value),
            SLEEP_STATUS if value & WAK_STS != 0 => self.lock().woken = false,
            RESET if value == layout::RESET_VALUE => self.events.post(GuestEvent::Reset("ACPI reset register")),
            BOOT_TIMER if value == layout::BOOT_TIMER_INIT_STARTED => self.events.post(GuestEvent::InitStarted),
            _ => {}
        }
    }

    fn sleep(&self, control: u8) {
        let sleep_type = (control & SLP_TYP) >> 2;
        let mut state = self.lock();
        state.sleep_type = sleep_type;
        if control & SLP_EN == 0 {
            return;
        }
        if sleep_type == S5_SLEEP_TYPE {
            self.events.post(GuestEvent::PowerOff);
        } else {
            // No such state was offered. The guest now polls for WAK_STS, so let it wake rather than spin forever.
            state.woken = true;
        }
    }
}

impl BusDevice for Power {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (register, byte) in (offset..=u64::MAX).zip(data) {
            *byte = self.read_register(register);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (register, byte) in (offset..=u64::MAX).zip(data) {
            self.write_register(register, *byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn power() -> (Power, GuestEvents) {
        let events = GuestEvents::new().unwrap();
        (Power::new(events.clone()), events)
    }

    fn read(power: &Power, register: u64) -> u8 {
        let mut data = [0xFF];
        power.read(register, &mut data);
        data[0]
    }

    #[test]
    fn s5_powers_off_as_linux_does_it() {
        let (power, events) = power();
        power.write(SLEEP_STATUS, &[WAK_STS]);
        power.write(SLEEP_CONTROL, &[5 << 2]);
        assert_eq!(events.take(), None, "not without SLP_EN");
        power.write(SLEEP_CONTROL, &[5 << 2 | SLP_EN]);
        assert_eq!(events.take(), Some(GuestEvent::PowerOff));
        assert_eq!((read(&power, SLEEP_CONTROL), read(&power, SLEEP_STATUS)), (5 << 2, 0));
    }

    #[test]
    fn other_sleep_types_wake_at_once() {
        let (power, events) = power();
        power.write(SLEEP_CONTROL, &[3 << 2 | SLP_EN]);
        assert_eq!((events.take(), read(&power, SLEEP_STATUS)), (None, WAK_STS));
        let saved = power.save();
        power.write(SLEEP_STATUS, &[WAK_STS]);
        assert_eq!(read(&power, SLEEP_STATUS), 0);
        power.restore(&saved);
        assert_eq!(power.save(), PowerState { sleep_type: 3, woken: true });
        power.restore(&PowerState { sleep_type: 0xFF, woken: false });
        assert_eq!(read(&power, SLEEP_CONTROL), SLP_TYP);
    }

    #[test]
    fn reset_and_boot_timer_take_their_value_only() {
        let (power, events) = power();
        for value in 0..=255 {
            power.write(RESET, &[value]);
            let expected = (value == layout::RESET_VALUE).then_some(GuestEvent::Reset("ACPI reset register"));
            assert_eq!(events.take(), expected, "{value}");
            power.write(BOOT_TIMER, &[value]);
            let expected = (value == layout::BOOT_TIMER_INIT_STARTED).then_some(GuestEvent::InitStarted);
            assert_eq!(events.take(), expected, "{value}");
        }
    }

    #[test]
    fn every_width_and_offset_is_harmless() {
        let (power, events) = power();
        for offset in (0..u64::from(layout::POWER_BLOCK_LEN)).chain([1 << 40, u64::MAX]) {
            for width in [0, 1, 2, 3, 4, 8] {
                let mut data = [0xFF; 8];
                power.write(offset, &data[..width]);
                power.read(offset, &mut data[..width]);
            }
        }
        assert_eq!(events.take(), None);
        power.write(RESET, &layout::RESET_VALUE.to_le_bytes().repeat(2));
        assert!(events.ended());
    }
}
