//! The event that ends a guest's connections after a restore (`VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`, virtio 1.2,
//! 5.10.6.7).
//!
//! A guest that was saved with connections still has them when it is restored, but their other ends are gone. A driver
//! ends all its connections when it handles the event, including those created since the restore. Until it has handled
//! the event, or [`HOLD`] has passed, the device neither sends nor receives packets.

use std::time::{Duration, Instant};

use crate::virtio::queue::Queue;
use crate::virtio::{Context, Fault};

/// Maximum time to wait for a guest to handle the event.
const HOLD: Duration = Duration::from_secs(2);
/// Number of the event (`VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`).
const TRANSPORT_RESET: u32 = 0;

/// State of the event on a device that may have been restored.
#[derive(Default)]
pub struct TransportReset {
    /// Set until the driver was given the event.
    due: bool,
    /// Set until the driver has handled the event.
    held: Option<Held>,
}

#[derive(Default)]
struct Held {
    /// Time at which to stop waiting for a guest that does not handle its events.
    deadline: Option<Instant>,
    /// Driver's index in the event queue when it was given the event. The driver puts the buffer back when it has
    /// handled the event.
    given_at: Option<u16>,
}

impl TransportReset {
    /// Returns the state of a device that was just restored.
    pub fn after_restore() -> Self {
        TransportReset { due: true, held: Some(Held::default()) }
    }

    /// Returns whether packets have to wait.
    pub fn is_held(&self) -> bool {
        self.held.is_some()
    }

    /// Gives the driver the event if there is a buffer for it, and ends the wait if the driver has handled it.
    ///
    /// # Errors
    ///
    /// Fails if the queue is malformed or its buffer is shorter than an event.
    pub fn advance(&mut self, events: &mut Queue, cx: &Context<'_>) -> Result<(), Fault> {
        let index = if self.is_held() { events.driver_index(cx.ram)? } else { 0 };
        if self.due {
            self.give(events, cx)?;
        }
        let Some(held) = &mut self.held else { return Ok(()) };
        let deadline = *held.deadline.get_or_insert_with(|| Instant::now() + HOLD);
        let handled = !self.due && *held.given_at.get_or_insert(index) != index;
        if handled || deadline <= Instant::now() {
            self.held = None;
        }
        Ok(())
    }

    fn give(&mut self, events: &mut Queue, cx: &Context<'_>) -> Result<(), Fault> {
        let Some(chain) = events.next(cx.ram)? else { return Ok(()) };
        let written = chain.writer(cx.ram).write(&TRANSPORT_RESET.to_le_bytes());
        events.push_used(cx.ram, chain, if written.is_ok() { 4 } else { 0 })?;
        written.map_err(|_| Fault::Device("a vsock event buffer is shorter than an event"))?;
        self.due = false;
        Ok(())
    }
}
