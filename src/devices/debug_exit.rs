//! isa-debug-exit (QEMU's `hw/misc/debugexit.c`): a guest that writes to it ends, and the value decides the exit status.
//! Test suites without a better way to tell how they went use it; success is 1 to most of them, as it can't be 0.

use crate::bus::BusDevice;
use crate::event::{GuestEvent, GuestEvents};

/// The debug exit, for [`crate::layout::DEBUG_EXIT_LEN`] ports.
pub struct DebugExit {
    events: GuestEvents,
}

impl DebugExit {
    /// A device that tells `events` of the end.
    pub fn new(events: GuestEvents) -> Self {
        DebugExit { events }
    }
}

impl BusDevice for DebugExit {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    /// The status is twice the value and one. Of wider values the lowest byte remains, as the host's `exit` has it.
    fn write(&self, _offset: u64, data: &[u8]) {
        if let Some(value) = data.first() {
            self.events.post(GuestEvent::DebugExit(value << 1 | 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_value_times_two_and_one_is_the_status() {
        for (data, status) in [(&[0][..], 1), (&[1], 3), (&[0x10, 0, 0, 0], 33), (&[0xFF, 1], 0xFF), (&[0x80, 1], 1)] {
            let events = GuestEvents::new().unwrap();
            let device = DebugExit::new(events.clone());
            let mut read = [0xFF; 4];
            device.read(0, &mut read);
            device.write(0, &[]);
            assert_eq!((read, events.ended()), ([0; 4], false));
            device.write(0, data);
            assert!(events.ended());
            assert_eq!(events.take(), Some(GuestEvent::DebugExit(status)), "{data:?}");
        }
    }
}
