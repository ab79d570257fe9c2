//! The one device loop: a thread that waits for kicks, for what its handler watches and for being told to stop, hands
//! events to the handler, and tells the driver of used buffers.
//!
//! A guest that breaks a rule ends the device, not the thread: the driver is told by `DEVICE_NEEDS_RESET`, the log by
//! one warning, and the worker then only waits to be stopped.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use log::warn;
use vmm_sys_util::eventfd::EventFd;

use super::queue::QueueState;
use super::{Context, Event, Fault, Interrupt, Progress, Share, WORKER_TOKENS};
use crate::event::{Interest, Poller, eventfd};
use crate::memory::GuestRam;

/// How long requests in flight have to finish before a device counts as stuck.
pub const DRAIN_DEADLINE: Duration = Duration::from_secs(10);

const CONTROL: u64 = u64::MAX;
/// How often a handler whose watches are gone is asked whether it has drained.
const DRAIN_TICK: Duration = Duration::from_millis(1);

/// A device did not give its queues back.
#[derive(Debug, thiserror::Error)]
#[error("{name} did not finish its requests within {} ms", waited.as_millis())]
pub struct Stuck {
    /// The worker's name.
    pub name: String,
    /// How long it had.
    pub waited: Duration,
}

/// Positions of queues, by their index within the device.
pub type Positions = Vec<(u16, QueueState)>;

/// A running thread that serves a share of a device's queues.
#[derive(Debug)]
pub struct Worker {
    name: String,
    control: Arc<EventFd>,
    done: Receiver<Positions>,
}

impl Worker {
    /// Starts serving. `kicks` are those of all the device's queues. The thread is named after the device, cut to the
    /// 15 bytes that Linux has room for.
    pub fn spawn(
        name: String,
        share: Share,
        ram: GuestRam,
        interrupt: Interrupt,
        kicks: Arc<[EventFd]>,
    ) -> io::Result<Self> {
        let control = Arc::new(eventfd()?);
        let (sender, done) = sync_channel(1);
        let poller = Poller::new()?;
        poller.add(control.as_raw_fd(), CONTROL, Interest::Read)?;
        for (i, queue) in share.queues.iter().enumerate().filter(|(_, q)| q.is_enabled()) {
            let kick = kicks.get(usize::from(queue.index())).ok_or(io::ErrorKind::InvalidInput)?;
            poller.add(kick.as_raw_fd(), WORKER_TOKENS + i as u64, Interest::Read)?;
        }
        let (pending, tokens) = (Vec::new(), Vec::new());
        let (stopping, dead) = (false, false);
        let name_of_loop = name.clone();
        let control_of_loop = control.clone();
        let body = Loop {
            name: name_of_loop,
            share,
            ram,
            interrupt,
            kicks,
            control: control_of_loop,
            poller,
            pending,
            tokens,
            stopping,
            dead,
        };
        std::thread::Builder::new().name(thread_name(&name)).spawn(move || body.run(sender))?;
        Ok(Worker { name, control, done })
    }

    /// Tells it to drain and stop; returns at once.
    pub fn request_stop(&self) {
        let _ = self.control.write(1);
    }

    /// Waits for the queues after [`Worker::request_stop`]. May be tried again.
    pub fn wait_stopped(&self, deadline: Instant) -> Result<Positions, Stuck> {
        let waited = deadline.saturating_duration_since(Instant::now());
        self.done.recv_timeout(waited).map_err(|e| {
            debug_assert_eq!(e, RecvTimeoutError::Timeout, "the loop ends only by sending");
            Stuck { name: self.name.clone(), waited }
        })
    }
}

impl Drop for Worker {
    /// Nobody waits for it any more, but it must not run for ever.
    fn drop(&mut self) {
        self.request_stop();
    }
}

fn thread_name(name: &str) -> String {
    name.chars().filter(|c| c.is_ascii_graphic()).take(15).collect()
}

struct Loop {
    name: String,
    share: Share,
    ram: GuestRam,
    interrupt: Interrupt,
    kicks: Arc<[EventFd]>,
    control: Arc<EventFd>,
    poller: Poller,
    /// Events to deliver in the next round.
    pending: Vec<Event>,
    tokens: Vec<u64>,
    stopping: bool,
    dead: bool,
}

impl Loop {
    fn run(mut self, done: SyncSender<Positions>) {
        // Whatever happened before this worker existed (kicks included), the rings tell.
        self.pending.push(Event::Start);
        self.pending.extend((0..self.share.queues.len()).map(Event::Kick));
        loop {
            self.round();
            if self.stopping && self.drained() {
                break;
            }
            if let Err(e) = self.wait() {
                self.fail(&e.into());
            }
        }
        let positions = self.share.queues.iter().filter(|q| q.is_enabled()).map(|q| (q.index(), q.state())).collect();
        let _ = done.send(positions);
    }

    /// Delivers each pending event once; what has more to do goes to the end of the queue behind what is ready then.
    fn round(&mut self) {
        let events = std::mem::take(&mut self.pending);
        for &event in &events {
            // Nothing new is begun while stopping: the next worker finds it in the ring.
            if self.dead || (self.stopping && matches!(event, Event::Kick(_))) {
                continue;
            }
            match self.deliver(event) {
                Ok(Progress::Done) => {}
                Ok(Progress::More) => self.pending.push(event),
                Err(fault) => self.fail(&fault),
            }
        }
        if self.pending.is_empty() {
            // Keep its memory.
            self.pending = events;
            self.pending.clear();
        }
    }

    fn deliver(&mut self, event: Event) -> Result<Progress, Fault> {
        let cx = Context::new(&self.ram, &self.interrupt, &self.poller);
        let progress = self.share.handler.event(event, &mut self.share.queues, &cx);
        // Also after a fault: what was used before it was used.
        self.announce()?;
        progress
    }

    /// Tells the driver of used buffers, if it wants to know: one interrupt for all queues.
    fn announce(&mut self) -> Result<(), Fault> {
        let mut wanted = false;
        for queue in &mut self.share.queues {
            wanted |= queue.needs_notification(&self.ram)?;
        }
        if wanted {
            self.interrupt.used_buffers();
        }
        Ok(())
    }

    fn drained(&mut self) -> bool {
        let cx = Context::new(&self.ram, &self.interrupt, &self.poller);
        let drained = self.share.handler.drain(&mut self.share.queues, &cx);
        match drained.and_then(|progress| self.announce().map(|()| progress)) {
            Ok(progress) => progress == Progress::Done,
            Err(fault) => {
                let again = !self.dead;
                self.fail(&fault);
                // A handler that fails to drain after it has failed will not do better the next time.
                !again
            }
        }
    }

    /// The guest broke a rule. Nothing is watched from here on: a descriptor that nobody reads would keep us awake.
    fn fail(&mut self, fault: &Fault) {
        if self.dead {
            return;
        }
        self.dead = true;
        self.pending.clear();
        if self.interrupt.needs_reset() {
            warn!("{}: the guest's driver must reset the device: {fault}", self.name);
        }
        let fresh = Poller::new().and_then(|p| p.add(self.control.as_raw_fd(), CONTROL, Interest::Read).map(|()| p));
        match fresh {
            Ok(poller) => self.poller = poller,
            // Out of descriptors: do not wait on the old set for ever either.
            Err(_) => self.stopping = true,
        }
    }

    /// Waits for events, unless some are left to deliver: then it only looks what else is ready.
    fn wait(&mut self) -> io::Result<()> {
        let timeout = match (self.pending.is_empty(), self.dead && self.stopping) {
            (true, false) => None,
            (true, true) => Some(DRAIN_TICK),
            (false, _) => Some(Duration::ZERO),
        };
        self.tokens.clear();
        self.tokens.extend(self.poller.wait(timeout)?);
        for &token in &self.tokens {
            let event = match token {
                CONTROL => {
                    let _ = self.control.read();
                    self.stopping = true;
                    continue;
                }
                kick if kick >= WORKER_TOKENS => {
                    let i = (kick - WORKER_TOKENS) as usize;
                    let fd = self.share.queues.get(i).and_then(|q| self.kicks.get(usize::from(q.index())));
                    let _ = fd.map(EventFd::read);
                    Event::Kick(i)
                }
                token => Event::Ready(token),
            };
            if !self.pending.contains(&event) {
                self.pending.push(event);
            }
        }
        Ok(())
    }
}
