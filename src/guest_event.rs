//! Events of the guest that concern the whole machine, and the queue in which devices and vCPUs report them to the
//! machine's loop.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use crate::event::eventfd;
use crate::kvm::debug::Trap;

/// Source from which a guest panic became known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PanicSource {
    /// The guest's pvpanic driver reported it.
    Pvpanic,
    /// The console showed the kernel's panic message.
    Console,
    /// The panic message was the last line of the kernel's log in guest memory.
    Log,
}

/// Something that the guest did and that concerns the whole machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestEvent {
    /// Power-off through ACPI S5.
    PowerOff,
    /// A reset; the text names the way the guest requested it.
    Reset(&'static str),
    /// The kernel panicked.
    Panicked(PanicSource),
    /// The guest's init reported that it runs.
    InitStarted,
    /// The guest read all console input it was given; there is room for more.
    ConsoleInputRoom,
    /// The guest wrote to the console for the first time.
    ConsoleFirstByte,
    /// The console showed that the kernel is about to restart the machine.
    Restarting,
    /// The console showed the end of a panic message: this kernel will do nothing more.
    PanicEnded,
    /// The console showed text that a watch waits for.
    Judged,
    /// A vCPU stopped for the debugger.
    Trapped(Trap),
    /// The guest requested this exit status (`--debug-exit`).
    DebugExit(u8),
}

impl GuestEvent {
    /// Returns true if no vCPU may continue to run after this event.
    pub fn ends_guest(self) -> bool {
        matches!(self, GuestEvent::PowerOff | GuestEvent::Reset(_) | GuestEvent::DebugExit(_))
    }
}

/// Queue into which devices put each [`GuestEvent`]; the machine's loop waits on [`GuestEvents::fd`]. Clones share it.
#[derive(Clone)]
pub struct GuestEvents(Arc<Shared>);

struct Shared {
    queue: Mutex<VecDeque<GuestEvent>>,
    fd: EventFd,
    ended: AtomicBool,
}

impl GuestEvents {
    /// Creates an empty queue.
    pub fn new() -> io::Result<Self> {
        let shared = Shared { queue: Mutex::default(), fd: eventfd()?, ended: AtomicBool::new(false) };
        Ok(GuestEvents(Arc::new(shared)))
    }

    /// Reports an event to the machine. Repeats of a queued event are dropped, which bounds the queue: a guest can
    /// repeat an event as often as it likes.
    pub fn post(&self, event: GuestEvent) {
        if event.ends_guest() {
            self.0.ended.store(true, Ordering::Release);
        }
        let mut queue = self.0.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if !queue.contains(&event) {
            queue.push_back(event);
            let _ = self.0.fd.write(1);
        }
    }

    /// Returns true if a vCPU must stop rather than enter the guest again.
    pub fn ended(&self) -> bool {
        self.0.ended.load(Ordering::Acquire)
    }

    /// Descriptor that is readable while events are queued.
    pub fn fd(&self) -> &EventFd {
        &self.0.fd
    }

    /// Removes and returns the oldest event.
    pub fn take(&self) -> Option<GuestEvent> {
        let mut queue = self.0.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.len() <= 1 {
            let _ = self.0.fd.read();
        }
        queue.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::time::Duration;

    use super::*;
    use crate::event::{Interest, Poller};

    #[test]
    fn events_arrive_in_order_and_repeats_are_dropped() {
        let events = GuestEvents::new().unwrap();
        let mut poller = Poller::new().unwrap();
        poller.add(events.fd().as_raw_fd(), 7, Interest::Read).unwrap();
        assert_eq!(poller.wait(Some(Duration::ZERO)).unwrap().count(), 0);
        events.post(GuestEvent::InitStarted);
        for _ in 0..1000 {
            events.post(GuestEvent::Reset("test"));
        }
        assert!(events.ended());
        assert_eq!(poller.wait(Some(Duration::ZERO)).unwrap().collect::<Vec<_>>(), [7]);
        assert_eq!(events.take(), Some(GuestEvent::InitStarted));
        assert_eq!(events.take(), Some(GuestEvent::Reset("test")));
        assert_eq!(events.take(), None);
        assert_eq!(poller.wait(Some(Duration::ZERO)).unwrap().count(), 0);
    }
}
