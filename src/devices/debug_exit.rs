//! isa-debug-exit (QEMU's `hw/misc/debugexit.c`): a guest that writes to it ends, and the value decides the exit
//! status. Test suites without a better way to report their result use it. For most of them status 1 is success,
//! because status 0 is impossible.

use crate::bus::BusDevice;
use crate::guest_event::{GuestEvent, GuestEvents};

/// Debug exit, for [`crate::layout::DEBUG_EXIT_LEN`] ports.
pub struct DebugExit {
    events: GuestEvents,
}

impl DebugExit {
    /// Creates a device that reports the end to `events`.
    pub fn new(events: GuestEvents) -> Self {
        DebugExit { events }
    }
}

impl BusDevice for DebugExit {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    /// Ends the guest; the status is twice the value plus one. Of wider values the lowest byte counts, as in the host's
    /// `exit`.
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
