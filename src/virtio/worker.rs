//! The device loop: a thread that waits for kicks, for the descriptors that its handler watches and for a request to
//! stop. It passes events to the handler and notifies the driver of used buffers.
//!
//! A guest that breaks a rule stops the device, not the thread: `DEVICE_NEEDS_RESET` is set for the driver, the log
//! gets one warning, and the worker then only waits to be stopped.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::queue::QueueState;
use super::{Context, Event, Fault, Interrupt, Progress, Share, WORKER_TOKENS};
use crate::event::{Interest, Poller, eventfd};
use crate::memory::GuestRam;

/// Time for requests in flight to finish before a device counts as stuck.
pub const DRAIN_DEADLINE: Duration = Duration::from_secs(if cfg!(test) { 2 } else { 10 });

const CONTROL: u64 = u64::MAX;
/// Interval at which a handler without watches is asked whether it has drained.
const DRAIN_TICK: Duration = Duration::from_millis(1);

/// Device that did not return its queues in time.
#[derive(Debug, thiserror::Error)]
#[error("{name} did not finish its requests within {} ms", waited.as_millis())]
pub struct Stuck {
    /// Name of the worker.
    pub name: String,
    /// Time that the worker had.
    pub waited: Duration,
}

/// Positions of queues, by index within the device.
pub type Positions = Vec<(u16, QueueState)>;

/// A running thread that serves a share of a device's queues.
#[derive(Debug)]
pub struct Worker {
    name: String,
    control: Arc<EventFd>,
    done: Receiver<Positions>,
}

impl Worker {
    /// Starts serving. `kicks` are the eventfds of all queues of the device. The thread is named after the device, cut
    /// to the 15 bytes that Linux has room for.
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
            // Edge-triggered: each kick is an edge, so the eventfd is never read, which saves a system call per kick.
            poller.add(kick.as_raw_fd(), WORKER_TOKENS + i as u64, Interest::ReadEdge)?;
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
            _kicks: kicks,
            control: control_of_loop,
            poller,
            pending,
            tokens,
            stopping,
            dead,
        };
        spawn(thread_name(&name), Box::new(move || body.run(sender)))?;
        Ok(Worker { name, control, done })
    }

    /// Asks the worker to drain and stop; returns immediately.
    pub fn request_stop(&self) {
        let _ = self.control.write(1);
    }

    /// Waits for the queues after [`Worker::request_stop`]. May be called again after a failure.
    pub fn wait_stopped(&self, deadline: Instant) -> Result<Positions, Stuck> {
        let waited = deadline.saturating_duration_since(Instant::now());
        self.done.recv_timeout(waited).map_err(|e| {
            debug_assert_eq!(e, RecvTimeoutError::Timeout, "the loop ends only by sending");
            Stuck { name: self.name.clone(), waited }
        })
    }
}

impl Drop for Worker {
    /// Stops the thread: nobody waits for it any more, but it must not run forever.
    fn drop(&mut self) {
        self.request_stop();
    }
}

type Job = Box<dyn FnOnce() + Send>;

/// Stack size of a worker in bytes. The default 2 MiB, if aligned by chance, are one huge page that the first touch
/// fills.
const STACK: usize = 512 << 10;

/// Channel to the thread that starts workers.
static SPAWNER: Mutex<Option<Sender<Job>>> = Mutex::new(None);

/// Starts the thread that starts workers, if there is none yet. A thread inherits the CPU affinity, the signal mask and
/// the system call filter of the thread that starts it. DRIVER_OK arrives on a vCPU's thread, and a worker must not
/// share the one CPU that its vCPU is pinned to. This is therefore called early, by a thread that is not a vCPU's.
pub fn prepare() -> io::Result<()> {
    let mut started = SPAWNER.lock().unwrap_or_else(PoisonError::into_inner);
    if started.is_none() {
        let (sender, jobs) = channel::<Job>();
        let spawner = std::thread::Builder::new().name("spawner".into()).stack_size(STACK);
        spawner.spawn(move || jobs.into_iter().for_each(|job| job()))?;
        *started = Some(sender);
    }
    Ok(())
}

fn spawn(name: String, body: Job) -> io::Result<()> {
    prepare()?;
    let (sender, spawned) = sync_channel(1);
    let job = Box::new(move || {
        let _ = sender.send(std::thread::Builder::new().name(name).stack_size(STACK).spawn(body).map(|_| ()));
    });
    let spawner = SPAWNER.lock().unwrap_or_else(PoisonError::into_inner);
    let sent = spawner.as_ref().is_some_and(|spawner| spawner.send(job).is_ok());
    drop(spawner);
    let gone = || io::Error::other("the thread that starts workers has ended");
    if sent { spawned.recv().map_err(|_| gone())? } else { Err(gone()) }
}

fn thread_name(name: &str) -> String {
    name.chars().filter(|c| c.is_ascii_graphic()).take(15).collect()
}

struct Loop {
    name: String,
    share: Share,
    ram: GuestRam,
    interrupt: Interrupt,
    /// Kept open for as long as they are watched.
    _kicks: Arc<[EventFd]>,
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
        // The rings show what happened before this worker existed, kicks included.
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
        // Dropped before anybody learns of it: whoever stops a device and then drops it may open its locked file again.
        drop(self);
        let _ = done.send(positions);
    }

    /// Delivers each pending event once. An event with more to do goes to the end of the list, after what is ready by
    /// then.
    fn round(&mut self) {
        let events = std::mem::take(&mut self.pending);
        for &event in &events {
            // Nothing new is begun while stopping: the next worker finds it in the ring.
            if self.dead || (self.stopping && matches!(event, Event::Kick(_))) {
                continue;
            }
            match self.deliver(event) {
                // `Start` comes once; the kicks after it do what it did not get to.
                Ok(Progress::More) if event != Event::Start => self.pending.push(event),
                Ok(_) => {}
                Err(fault) => self.fail(&fault),
            }
        }
        if self.pending.is_empty() {
            // Keep the allocation.
            self.pending = events;
            self.pending.clear();
        }
    }

    fn deliver(&mut self, event: Event) -> Result<Progress, Fault> {
        let cx = Context::new(&self.ram, &self.interrupt, &self.poller);
        let progress = self.share.handler.event(event, &mut self.share.queues, &cx);
        // Also after a fault: buffers used before it stay used.
        self.announce()?;
        progress
    }

    /// Notifies the driver of used buffers, if it wants to know: one interrupt for all queues.
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
                // A handler that fails to drain after an earlier failure will not do better the next time.
                !again
            }
        }
    }

    /// Stops the device after a fault. Nothing is watched from here on: an unread descriptor would keep the thread
    /// awake.
    fn fail(&mut self, fault: &Fault) {
        if self.dead {
            return;
        }
        self.dead = true;
        self.pending.clear();
        self.interrupt.needs_reset(&self.name, fault);
        let fresh = Poller::new().and_then(|p| p.add(self.control.as_raw_fd(), CONTROL, Interest::Read).map(|()| p));
        match fresh {
            Ok(poller) => self.poller = poller,
            // Out of descriptors: do not wait on the old set forever either.
            Err(_) => self.stopping = true,
        }
    }

    /// Waits for events. If some are left to deliver, only polls for what else is ready.
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
                kick if kick >= WORKER_TOKENS => Event::Kick((kick - WORKER_TOKENS) as usize),
                token => Event::Ready(token),
            };
            if !self.pending.contains(&event) {
                self.pending.push(event);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irq::IrqLine;
    use crate::virtio::testing::{EVENT_IDX, FakeQueue, out};
    use crate::virtio::{Handler, queue::Queue};
    use std::sync::atomic::{AtomicUsize, Ordering};

    const B: u64 = 0x8_0000;

    /// Completes each request only when its eventfd is signalled, as io_uring would.
    struct Slow {
        completions: Arc<EventFd>,
        waiting: Vec<crate::virtio::chain::Chain>,
        events: Arc<AtomicUsize>,
    }

    impl Handler for Slow {
        fn event(&mut self, event: Event, queues: &mut [Queue], cx: &Context<'_>) -> Result<Progress, Fault> {
            self.events.fetch_add(1, Ordering::SeqCst);
            let [queue] = queues else { return Ok(Progress::Done) };
            match event {
                Event::Start => cx.watch(self.completions.as_raw_fd(), 7, Interest::Read)?,
                Event::Kick(_) => {
                    while let Some(chain) = queue.pop(cx.ram)? {
                        self.waiting.push(chain);
                    }
                    queue.enable_notifications(cx.ram)?;
                }
                Event::Ready(token) => {
                    assert_eq!(token, 7);
                    let _ = self.completions.read();
                    for chain in self.waiting.drain(..) {
                        queue.push_used(cx.ram, chain, 0)?;
                    }
                }
            }
            Ok(Progress::Done)
        }

        fn drain(&mut self, queues: &mut [Queue], _cx: &Context<'_>) -> Result<Progress, Fault> {
            Ok(if queues.iter().all(|q| q.in_flight() == 0) { Progress::Done } else { Progress::More })
        }
    }

    /// Takes a request and reports a fault.
    struct Picky;

    impl Handler for Picky {
        fn event(&mut self, _: Event, queues: &mut [Queue], cx: &Context<'_>) -> Result<Progress, Fault> {
            let [queue] = queues else { return Ok(Progress::Done) };
            queue.serve(cx.ram, |_| Err(Fault::Device("never right")))
        }
    }

    struct Setup {
        driver: FakeQueue,
        interrupt: Interrupt,
        completions: Arc<EventFd>,
        events: Arc<AtomicUsize>,
        kicks: Arc<[EventFd]>,
        worker: Worker,
    }

    fn setup() -> Setup {
        let (completions, events) = (Arc::new(eventfd().unwrap()), Arc::new(AtomicUsize::new(0)));
        let handler = Slow { completions: completions.clone(), waiting: vec![], events: events.clone() };
        serving(Box::new(handler), completions, events)
    }

    fn serving(handler: Box<dyn Handler>, completions: Arc<EventFd>, events: Arc<AtomicUsize>) -> Setup {
        let ram = GuestRam::anonymous(1 << 20);
        let driver = FakeQueue::new(&ram, 0x1000, 8);
        let share = Share { queues: vec![driver.device(0)], handler };
        let interrupt = Interrupt::new(IrqLine::new(5).unwrap());
        let kicks: Arc<[EventFd]> = vec![eventfd().unwrap()].into();
        let worker = Worker::spawn("slow device nr 1".into(), share, ram, interrupt.clone(), kicks.clone()).unwrap();
        Setup { driver, interrupt, completions, events, kicks, worker }
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[test]
    fn requests_in_flight_are_finished_before_it_stops() {
        let mut s = setup();
        s.driver.add(&[out(B, 1)]).unwrap();
        s.kicks[0].write(1).unwrap();
        while s.events.load(Ordering::SeqCst) < 3 {
            std::thread::yield_now();
        }
        s.worker.request_stop();
        let stuck = s.worker.wait_stopped(Instant::now() + Duration::from_millis(30)).unwrap_err().to_string();
        assert!(stuck.starts_with("slow device nr 1 did not finish its requests within "), "{stuck}");
        s.completions.write(1).unwrap();
        let positions = s.worker.wait_stopped(soon()).unwrap();
        assert_eq!(positions.len(), 1);
        assert_eq!((positions[0].1.next_avail, positions[0].1.next_used), (1, 1));
        assert_eq!(s.driver.take_used(), Some((0, 0)));
        assert_eq!(s.interrupt.line().take_count(), 1);
    }

    #[test]
    fn what_comes_while_stopping_stays_in_the_ring() {
        let mut s = setup();
        while s.events.load(Ordering::SeqCst) < 2 {
            std::thread::yield_now();
        }
        s.worker.request_stop();
        s.worker.wait_stopped(soon()).unwrap();
        s.driver.add(&[out(B, 1)]).unwrap();
        s.kicks[0].write(1).unwrap();
        assert_eq!(s.driver.take_used(), None);
    }

    #[test]
    fn an_idle_worker_does_not_wake() {
        let s = setup();
        while s.events.load(Ordering::SeqCst) < 2 {
            std::thread::yield_now();
        }
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(s.events.load(Ordering::SeqCst), 2, "start and the first look");
    }

    /// Asks for more again and again, and watches something from the start.
    struct Greedy(Arc<EventFd>, Arc<AtomicUsize>);

    impl Handler for Greedy {
        fn event(&mut self, event: Event, _: &mut [Queue], cx: &Context<'_>) -> Result<Progress, Fault> {
            self.1.fetch_add(1, Ordering::SeqCst);
            if event == Event::Start {
                cx.watch(self.0.as_raw_fd(), 7, Interest::Read)?;
            }
            Ok(if self.1.load(Ordering::SeqCst) < 10 { Progress::More } else { Progress::Done })
        }
    }

    #[test]
    fn a_beginning_comes_once() {
        let (fd, events) = (Arc::new(eventfd().unwrap()), Arc::new(AtomicUsize::new(0)));
        let s = serving(Box::new(Greedy(fd.clone(), events.clone())), fd, events);
        let deadline = soon();
        while s.events.load(Ordering::SeqCst) < 10 {
            assert!(Instant::now() < deadline, "it was not asked again");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_bad_guest_ends_the_device_but_not_the_worker() {
        let mut s = setup();
        while s.events.load(Ordering::SeqCst) < 2 {
            std::thread::yield_now();
        }
        s.driver.set_avail_idx(1000);
        s.kicks[0].write(1).unwrap();
        let deadline = soon();
        while s.interrupt.line().take_count() == 0 {
            assert!(Instant::now() < deadline);
        }
        s.interrupt.needs_reset("slow", "already reported");
        assert_eq!(s.interrupt.line().take_count(), 0);
        let events = s.events.load(Ordering::SeqCst);
        // Nothing is served any more, and the worker does not spin on descriptors that it no longer reads.
        s.completions.write(1).unwrap();
        s.kicks[0].write(1).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(s.events.load(Ordering::SeqCst), events);
        s.worker.request_stop();
        s.worker.wait_stopped(soon()).unwrap();
    }

    #[test]
    fn a_request_that_a_fault_cost_is_not_waited_for() {
        let mut s = serving(Box::new(Picky), Arc::new(eventfd().unwrap()), Arc::new(AtomicUsize::new(0)));
        s.driver.add(&[out(B, 1)]).unwrap();
        s.kicks[0].write(1).unwrap();
        let deadline = soon();
        while s.interrupt.line().take_count() == 0 {
            assert!(Instant::now() < deadline);
        }
        s.worker.request_stop();
        let positions = s.worker.wait_stopped(soon()).unwrap();
        assert_eq!((positions[0].1.next_avail, positions[0].1.next_used), (1, 0));
    }

    /// Uses each chain as soon as it sees it.
    struct Quick;

    impl Handler for Quick {
        fn event(&mut self, event: Event, queues: &mut [Queue], cx: &Context<'_>) -> Result<Progress, Fault> {
            match (event, queues) {
                (Event::Kick(_), [queue]) => queue.serve(cx.ram, |_| Ok(0)),
                _ => Ok(Progress::Done),
            }
        }
    }

    /// A driver kicks, and a device interrupts, only when the other side asked for it; both ask just before they look
    /// for the last time and sleep. Neither ever sleeps through what the other did in between.
    #[test]
    fn no_wake_up_is_lost() {
        for features in [0, EVENT_IDX] {
            let ram = GuestRam::anonymous(1 << 20);
            let mut driver = FakeQueue::new(&ram, 0x1000, 8);
            let share = Share { queues: vec![driver.device(features)], handler: Box::new(Quick) };
            let interrupt = Interrupt::new(IrqLine::new(5).unwrap());
            let kicks: Arc<[EventFd]> = vec![eventfd().unwrap()].into();
            let worker = Worker::spawn("quick".into(), share, ram, interrupt.clone(), kicks.clone()).unwrap();
            let mut poller = Poller::new().unwrap();
            poller.add(interrupt.line().fd().as_raw_fd(), 1, Interest::Read).unwrap();
            let (mut kicked, mut interrupted) = (0u32, 0u32);
            for round in 0..5000u32 {
                let mut waiting = 1 + round % 5;
                driver.ask_for_interrupt(features, false);
                for _ in 0..waiting {
                    let before = driver.avail_idx();
                    driver.add(&[out(B, 1)]).unwrap();
                    if driver.must_kick(before, features) {
                        kicks[0].write(1).unwrap();
                        kicked += 1;
                    }
                }
                loop {
                    while driver.take_used().is_some() {
                        waiting -= 1;
                    }
                    if waiting == 0 {
                        break;
                    }
                    driver.ask_for_interrupt(features, true);
                    if driver.take_used().is_some() {
                        waiting -= 1;
                        continue;
                    }
                    let woken = poller.wait(Some(Duration::from_secs(60))).unwrap().count();
                    assert_eq!(
                        woken, 1,
                        "round {round}, features {features:#x}: {waiting} chains, and nobody is awake"
                    );
                    interrupted += interrupt.line().take_count() as u32;
                }
            }
            assert!(kicked > 0 && interrupted > 0, "{kicked} kicks, {interrupted} interrupts");
            worker.request_stop();
            worker.wait_stopped(soon()).unwrap();
        }
    }

    #[test]
    fn names_fit() {
        assert_eq!(thread_name("blk0"), "blk0");
        assert_eq!(thread_name("a very long näme\0of a device"), "averylongnmeofa");
    }
}
