//! pvpanic: one port on which a guest kernel reports that it panicked (QEMU's `docs/specs/pvpanic`).

use crate::bus::BusDevice;
use crate::guest_event::{GuestEvent, GuestEvents, PanicSource};

/// The kernel panicked and will not continue.
const PANICKED: u8 = 1 << 0;
/// The kernel panicked and a crash kernel takes over.
const CRASH_LOADED: u8 = 1 << 1;
/// Events that a driver may send; also what reads return.
const SUPPORTED: u8 = PANICKED | CRASH_LOADED;

/// pvpanic device, one port at [`crate::layout::PVPANIC_PORT`].
pub struct Pvpanic {
    events: GuestEvents,
}

impl Pvpanic {
    /// Creates a device that reports a panic to `events`.
    pub fn new(events: GuestEvents) -> Self {
        Pvpanic { events }
    }
}

impl BusDevice for Pvpanic {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let [first, ..] = data {
            *first = SUPPORTED;
        }
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data.first().is_some_and(|event| event & SUPPORTED != 0) {
            self.events.post(GuestEvent::Panicked(PanicSource::Pvpanic));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panic_events_are_told_and_others_are_not() {
        let events = GuestEvents::new().unwrap();
        let pvpanic = Pvpanic::new(events.clone());
        for event in 0..=255u8 {
            pvpanic.write(0, &[event]);
            let expected = (event & 3 != 0).then_some(GuestEvent::Panicked(PanicSource::Pvpanic));
            assert_eq!(events.take(), expected, "{event:#x}");
        }
        assert!(!events.ended(), "a panicked guest may still print, dump or reset");
    }

    #[test]
    fn every_width_is_harmless() {
        let pvpanic = Pvpanic::new(GuestEvents::new().unwrap());
        for width in 0..=8 {
            let mut data = [0xFF; 8];
            pvpanic.read(0, &mut data[..width]);
            assert!(data[..width].iter().enumerate().all(|(i, b)| *b == if i == 0 { 3 } else { 0 }));
            pvpanic.write(0, &[0; 8][..width]);
        }
    }
}
