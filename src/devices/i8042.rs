//! The keyboard controller, reduced to its reset command. There is no keyboard, and the FADT says so. `reboot` by "kbd"
//! tries the command anyway and first waits for a free input buffer, so both ports read 0.

use crate::bus::BusDevice;
use crate::guest_event::{GuestEvent, GuestEvents};
use crate::layout;

const DATA: u64 = 0;
const COMMAND: u64 = (layout::I8042_COMMAND - layout::I8042_DATA) as u64;
/// Command that pulses output line 0, which is wired to the processor's reset.
const RESET: u8 = 0xFE;

/// i8042, for [`layout::I8042_LEN`] ports from [`layout::I8042_DATA`] on.
pub struct I8042 {
    events: GuestEvents,
}

impl I8042 {
    /// Creates a controller that reports a reset to `events`.
    pub fn new(events: GuestEvents) -> Self {
        I8042 { events }
    }
}

impl BusDevice for I8042 {
    /// Reads both ports as 0. The ports in between are not ours and read as on an empty bus.
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (register, byte) in (offset..=u64::MAX).zip(data) {
            if matches!(register, DATA | COMMAND) {
                *byte = 0;
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (register, byte) in (offset..=u64::MAX).zip(data) {
            if register == COMMAND && *byte == RESET {
                self.events.post(GuestEvent::Reset("keyboard controller"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_command_does_something() {
        let events = GuestEvents::new().unwrap();
        let i8042 = I8042::new(events.clone());
        for value in (0..=255).filter(|v| *v != RESET) {
            i8042.write(COMMAND, &[value]);
            i8042.write(DATA, &[value]);
        }
        i8042.write(DATA, &[RESET]);
        assert_eq!(events.take(), None);
        i8042.write(COMMAND, &[RESET]);
        assert_eq!(events.take(), Some(GuestEvent::Reset("keyboard controller")));
    }

    #[test]
    fn status_reads_zero_and_every_access_is_harmless() {
        let events = GuestEvents::new().unwrap();
        let i8042 = I8042::new(events.clone());
        let mut data = [0xFF; 5];
        i8042.read(DATA, &mut data);
        assert_eq!(data, [0, 0xFF, 0xFF, 0xFF, 0]);
        for offset in (0..8).chain([u64::MAX]) {
            for width in 0..=8 {
                i8042.read(offset, &mut [0xFF; 8][..width]);
                i8042.write(offset, &[0xFF; 8][..width]);
            }
        }
        assert_eq!(events.take(), None);
    }
}
