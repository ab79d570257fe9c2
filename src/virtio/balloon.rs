//! Memory balloon (5.5): takes memory from the guest and gives it back to the host.
//!
//! Configuration space holds the target size. The driver allocates pages until it has that many and sends their numbers
//! on the inflate queue; when it takes pages back, it sends their numbers on the deflate queue. Free page reporting is
//! independent of the size: the driver reports pages that happen to be free, and may use them again at any time. Free
//! page hinting is independent of it too, and serves whoever copies the guest's memory: see [`FreeHints`].

mod hints;
mod stats;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::str::FromStr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vmm_sys_util::timerfd::TimerFd;

use super::chain::Chain;
use super::control::{Control, ControlError, Reply};
use super::{
    Activated, Activation, Context, DeviceId, DeviceInfo, Event, Fault, Handler, Progress, RING_FEATURES, Share,
    StateError, VirtioDevice, queue::Queue,
};
use crate::event::Interest;
use crate::log_limit::LogLimit;
use crate::memory::GuestRam;
use crate::options::{self, Size, Span};
pub use hints::FreeHints;
use hints::Hints;
pub use stats::BalloonStats;
use stats::STAT;

/// Feature bits (5.5.3).
const F_MUST_TELL_HOST: u64 = 1 << 0;
const F_STATS_VQ: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_FREE_PAGE_HINT: u64 = 1 << 3;
const F_PAGE_POISON: u64 = 1 << 4;
const F_PAGE_REPORTING: u64 = 1 << 5;

/// Unit of page numbers and sizes, whatever pages guest and host have (5.5.2).
const PAGE: u64 = 4096;
const PAGE_SHIFT: u32 = 12;
/// Size of each queue: Linux reports up to 32 free blocks at a time and wants room for them.
const QUEUE_SIZE: u16 = 128;
/// Maximum number of pages in a request. Linux names up to 256, Windows 1024.
const MAX_PAGES: u64 = 4096;
/// Number of pages after which others get their turn.
const PAGES_PER_EVENT: usize = 8192;
/// Maximum number of statistics that are read from a buffer.
const MAX_STATS: u64 = 64;
/// Size of configuration space in bytes (5.5.4).
const CONFIG_BYTES: usize = 16;
const TIMER: u64 = 0;

/// `--balloon`: memory that the guest gives up.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BalloonConfig {
    /// Memory that the guest is asked to give up at first, in bytes: at most its RAM, a multiple of 4 KiB.
    pub size: Size,
    /// Let the guest take pages back when it would run out of memory.
    pub deflate_on_oom: bool,
    /// Interval between requests for statistics, 100 ms to one day; by default, only the statistics that the guest
    /// sends when it starts are known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stats: Option<Span>,
    /// Make the guest report free pages, and give them back to the host until they are used again.
    pub free_page_reporting: bool,
    /// Allow asking the guest which pages are free, so that they need not be copied with the others.
    pub free_page_hinting: bool,
}

impl FromStr for BalloonConfig {
    type Err = options::Error;

    fn from_str(text: &str) -> Result<Self, options::Error> {
        // A size begins with a digit, so a switch can come first, too.
        options::from_str(text, text.starts_with(|c: char| c.is_ascii_digit()).then_some("size"))
    }
}

impl BalloonConfig {
    /// Checks the options against the guest's RAM; the error is a sentence.
    pub fn validate(&self, ram: Size) -> Result<(), String> {
        let Size(size) = self.size;
        if size > ram.0 {
            return Err(format!("{}: the guest has only {ram} of memory", self.size));
        }
        if !size.is_multiple_of(PAGE) {
            return Err(format!("{}: not a multiple of 4K{}", self.size, self.size.unit_hint()));
        }
        match self.stats {
            Some(Span(every)) if !(Duration::from_millis(100)..=Duration::from_secs(86400)).contains(&every) => {
                Err(format!("stats={}: must be between 100ms and 24h", Span(every)))
            }
            _ => Ok(()),
        }
    }
}

/// Saved state of a balloon. The guest knows which pages are in it, but not which larger pages they are parts of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonState {
    /// Pages that the guest is asked to give up.
    pub target: u32,
    /// Pages that the guest says it has given up.
    pub actual: u32,
    /// Value that the guest fills free pages with.
    pub poison: u32,
    /// Current command of free page hinting: a request for hints, or its end (`free_page_hint_cmd_id`).
    pub hint_command: u32,
    /// Last command that was a request for hints.
    pub last_hint: u32,
    /// Pages of each huge page that are in the balloon, on hosts that take back only huge pages.
    pub parts: BTreeMap<u64, [u64; 8]>,
}

/// Balloon device.
pub struct Balloon {
    info: DeviceInfo,
    ram: Size,
    stats_every: Option<Duration>,
    /// Pages wanted and pages given up (5.5.4).
    target: u32,
    actual: u32,
    shared: Arc<Shared>,
}

/// State that outlives the handler.
#[derive(Default)]
struct Shared {
    /// `poison_val` (5.5.4).
    poison: AtomicU32,
    stats: Mutex<Option<(Instant, BTreeMap<&'static str, u64>)>>,
    /// Pages of each huge page that are in the balloon, on hosts that take back only huge pages.
    parts: Mutex<BTreeMap<u64, [u64; 8]>>,
    hints: Mutex<Hints>,
    warnings: LogLimit,
}

impl Balloon {
    /// Creates a balloon for a guest with `ram` bytes of memory.
    pub fn new(name: impl Into<String>, config: &BalloonConfig, ram: Size) -> Self {
        let mut features = RING_FEATURES | F_MUST_TELL_HOST | F_STATS_VQ;
        let mut queue_sizes = vec![QUEUE_SIZE; 3];
        if config.deflate_on_oom {
            features |= F_DEFLATE_ON_OOM;
        }
        if config.free_page_hinting {
            features |= F_FREE_PAGE_HINT;
            queue_sizes.push(QUEUE_SIZE);
        }
        if config.free_page_reporting {
            // A guest that relies on the contents of free pages reports none unless it can announce these contents.
            features |= F_PAGE_REPORTING | F_PAGE_POISON;
            queue_sizes.push(QUEUE_SIZE);
        }
        let info =
            DeviceInfo { id: DeviceId::Balloon, name: name.into(), features, queue_sizes, shared_memory: vec![] };
        let target = pages(config.size.0);
        let stats_every = config.stats.map(|Span(every)| every);
        Balloon { info, ram, stats_every, target, actual: 0, shared: Arc::default() }
    }

    fn stats(&self) -> BalloonStats {
        let told = lock(&self.shared.stats).clone();
        let age_ms = told.as_ref().map(|(when, _)| u64::try_from(when.elapsed().as_millis()).unwrap_or(u64::MAX));
        let guest = told.map(|(_, stats)| stats).unwrap_or_default();
        let bytes = |pages| u64::from(pages) << PAGE_SHIFT;
        BalloonStats { target: bytes(self.target), actual: bytes(self.actual), guest, age_ms }
    }
}

/// Returns the number of whole pages in `bytes`, at most what the device can count.
fn pages(bytes: u64) -> u32 {
    u32::try_from(bytes >> PAGE_SHIFT).unwrap_or(u32::MAX)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl VirtioDevice for Balloon {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// `struct virtio_balloon_config` (5.5.4): `num_pages`, `actual`, `free_page_hint_cmd_id`, `poison_val`.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let command = lock(&self.shared.hints).command();
        let fields = [self.target, self.actual, command, self.shared.poison.load(Ordering::Acquire)];
        let mut config = [0; CONFIG_BYTES];
        config.iter_mut().zip(fields.iter().flat_map(|f| f.to_le_bytes())).for_each(|(to, from)| *to = from);
        super::read_config_bytes(&config, offset, data);
    }

    /// Writes `actual` and `poison_val`, the fields that belong to the driver.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let Ok(value) = <[u8; 4]>::try_from(data).map(u32::from_le_bytes) else { return };
        match offset {
            4 => self.actual = value,
            12 => self.shared.poison.store(value, Ordering::Release),
            _ => {}
        }
    }

    fn activate(&mut self, activation: Activation) -> io::Result<Activated> {
        // 5.5.2 numbers the queues as if all were present; every driver and device skips those of missing features.
        let optional =
            [(F_STATS_VQ, Role::Stats), (F_FREE_PAGE_HINT, Role::Hints), (F_PAGE_REPORTING, Role::Reporting)];
        let mut roles = vec![Role::Inflate, Role::Deflate];
        roles.extend(optional.iter().filter(|(feature, _)| activation.features & feature != 0).map(|(_, role)| *role));
        let timer = match self.stats_every {
            Some(every) if roles.contains(&Role::Stats) => {
                let mut timer = TimerFd::new()?;
                timer.reset(every, Some(every))?;
                Some(timer)
            }
            _ => None,
        };
        let handler = Pages { shared: self.shared.clone(), roles, timer, held: None, numbers: Vec::new() };
        Ok(Activated::Here(vec![Share { queues: activation.queues, handler: Box::new(handler) }]))
    }

    fn control(&mut self, control: &Control) -> Result<Reply, ControlError> {
        match *control {
            Control::SetBalloon(bytes) if bytes > self.ram.0 => Err(ControlError::Refused(format!(
                "a balloon of {}: the guest has only {} of memory",
                Size(bytes),
                self.ram
            ))),
            Control::SetBalloon(bytes) => {
                let old = std::mem::replace(&mut self.target, pages(bytes));
                Ok(if old == self.target { Reply::Done } else { Reply::ConfigChanged })
            }
            Control::BalloonStats => Ok(Reply::BalloonStats(self.stats())),
            Control::StartHints if self.info.features & F_FREE_PAGE_HINT == 0 => {
                Err(ControlError::Refused("the balloon was configured without free_page_hinting".into()))
            }
            Control::StartHints => {
                lock(&self.shared.hints).start();
                Ok(Reply::ConfigChanged)
            }
            Control::EndHints => Ok(if lock(&self.shared.hints).end() { Reply::ConfigChanged } else { Reply::Done }),
            Control::FreeHints => Ok(Reply::FreeHints(lock(&self.shared.hints).found())),
            _ => Err(ControlError::Unsupported(self.info.name.clone())),
        }
    }

    /// Resets the balloon: the next driver begins with all of its memory.
    fn reset(&mut self) {
        self.actual = 0;
        self.shared.poison.store(0, Ordering::Release);
        *lock(&self.shared.stats) = None;
        lock(&self.shared.parts).clear();
        *lock(&self.shared.hints) = Hints::default();
    }

    fn save(&self) -> Result<serde_json::Value, StateError> {
        let poison = self.shared.poison.load(Ordering::Acquire);
        let (hint_command, last_hint) = lock(&self.shared.hints).save();
        let parts = lock(&self.shared.parts).clone();
        let state = BalloonState { target: self.target, actual: self.actual, poison, hint_command, last_hint, parts };
        serde_json::to_value(state).map_err(|e| StateError(e.to_string()))
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<(), StateError> {
        let name = &self.info.name;
        let BalloonState { target, actual, poison, hint_command, last_hint, parts } = BalloonState::deserialize(state)
            .map_err(|e| StateError(format!("the saved state of {name} is broken: {e}")))?;
        if u64::from(target) > self.ram.0 >> PAGE_SHIFT {
            let ram = self.ram;
            return Err(StateError(format!("{name} was saved with {target} pages, more than the {ram} of memory")));
        }
        (self.target, self.actual) = (target, actual);
        *lock(&self.shared.hints) = Hints::restored(hint_command, last_hint);
        *lock(&self.shared.parts) = parts;
        self.shared.poison.store(poison, Ordering::Release);
        Ok(())
    }
}

/// Purpose of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Stats,
    Hints,
    Reporting,
}

/// Handler of all queues.
struct Pages {
    shared: Arc<Shared>,
    /// Role of each queue, in order.
    roles: Vec<Role>,
    /// Timer of requests for statistics.
    timer: Option<TimerFd>,
    /// Buffer of the statistics; returning it to the driver requests new ones (5.5.6.3).
    held: Option<Chain>,
    /// Page numbers of a request; memory to reuse.
    numbers: Vec<u32>,
}

impl Handler for Pages {
    fn event(&mut self, event: Event, queues: &mut [Queue], cx: &Context<'_>) -> Result<Progress, Fault> {
        match event {
            Event::Start => {
                if let Some(timer) = &self.timer {
                    cx.watch(timer.as_raw_fd(), TIMER, Interest::Read)?;
                }
            }
            Event::Kick(index) => {
                let (Some(&role), Some(queue)) = (self.roles.get(index), queues.get_mut(index)) else {
                    return Ok(Progress::Done);
                };
                return match role {
                    Role::Inflate | Role::Deflate => self.pages(role, queue, cx.ram),
                    Role::Stats => self.stats(queue, cx.ram),
                    Role::Hints => queue.serve(cx.ram, |chain| {
                        lock(&self.shared.hints).take(chain, cx.ram)?;
                        Ok(0)
                    }),
                    Role::Reporting => queue.serve(cx.ram, |chain| {
                        self.reported(chain, cx.ram);
                        Ok(0)
                    }),
                };
            }
            Event::Ready(_) => {
                self.timer.as_mut().map(TimerFd::wait).transpose().map_err(io::Error::from)?;
                let stats = self.roles.iter().position(|role| *role == Role::Stats);
                if let (Some(queue), Some(chain)) = (stats.and_then(|i| queues.get_mut(i)), self.held.take()) {
                    queue.push_used(cx.ram, chain, 0)?;
                }
            }
        }
        Ok(Progress::Done)
    }

    /// Puts the statistics buffer back, so that it is available to the handler that serves the queue next.
    fn drain(&mut self, queues: &mut [Queue], _cx: &Context<'_>) -> Result<Progress, Fault> {
        let stats = self.roles.iter().position(|role| *role == Role::Stats);
        if let (Some(queue), Some(chain)) = (stats.and_then(|i| queues.get_mut(i)), self.held.take()) {
            queue.unpop(chain);
        }
        Ok(Progress::Done)
    }
}

impl Pages {
    /// Serves inflating and deflating: arrays of page numbers (5.5.6).
    fn pages(&mut self, role: Role, queue: &mut Queue, ram: &GuestRam) -> Result<Progress, Fault> {
        let mut left = PAGES_PER_EVENT;
        queue.disable_notifications(ram)?;
        while left > 0 {
            let Some(chain) = queue.next(ram)? else { return Ok(Progress::Done) };
            self.read_numbers(&chain, ram)?;
            // A request that names no pages is work, too.
            left = left.saturating_sub(self.numbers.len().max(64));
            match role {
                Role::Inflate => self.inflate(ram),
                _ => self.deflate(ram),
            }
            queue.push_used(ram, chain, 0)?;
        }
        Ok(Progress::More)
    }

    /// Reads the page numbers of a request, each once and in order. Bytes that form no whole number are ignored.
    fn read_numbers(&mut self, chain: &Chain, ram: &GuestRam) -> Result<(), Fault> {
        let mut reader = chain.reader(ram);
        let count = reader.len() / 4;
        if count > MAX_PAGES {
            return Err(Fault::Device("a balloon request names more than 4096 pages"));
        }
        let mut bytes = vec![0; count as usize * 4];
        reader.read(&mut bytes)?;
        self.numbers.clear();
        let (numbers, _) = bytes.as_chunks::<4>();
        self.numbers.extend(numbers.iter().map(|n| u32::from_le_bytes(*n)));
        self.numbers.sort_unstable();
        self.numbers.dedup();
        Ok(())
    }

    /// Gives pages back to the host, with one system call for each run of adjacent pages.
    fn inflate(&self, ram: &GuestRam) {
        if ram.release_unit() > PAGE {
            return self.inflate_parts(ram);
        }
        for run in self.numbers.chunk_by(|a, b| a.checked_add(1) == Some(*b)) {
            if let Some(first) = run.first() {
                self.release(ram, u64::from(*first) << PAGE_SHIFT, (run.len() as u64) << PAGE_SHIFT);
            }
        }
    }

    /// Gives memory to a host that takes back only larger pages: each once all of its parts are in the balloon.
    fn inflate_parts(&self, ram: &GuestRam) {
        let unit = ram.release_unit();
        let mut parts = lock(&self.shared.parts);
        for number in &self.numbers {
            let addr = u64::from(*number) << PAGE_SHIFT;
            // Only RAM is remembered, which bounds the memory for it.
            if !ram.contains(addr, PAGE) {
                continue;
            }
            let part = parts.entry(addr / unit).or_default();
            let was_full = full(part, unit);
            set(part, addr % unit / PAGE, true);
            if !was_full && full(part, unit) {
                self.release(ram, addr / unit * unit, unit);
            }
        }
    }

    /// Records pages that leave the balloon. They come into existence when they are touched, so only the counts change.
    fn deflate(&self, ram: &GuestRam) {
        let unit = ram.release_unit();
        if unit > PAGE {
            let mut parts = lock(&self.shared.parts);
            for number in &self.numbers {
                let addr = u64::from(*number) << PAGE_SHIFT;
                if let Some(part) = parts.get_mut(&(addr / unit)) {
                    set(part, addr % unit / PAGE, false);
                }
            }
        }
    }

    /// Releases reported free pages (5.5.6.7). If they must come back with contents other than zeros, they stay
    /// (5.5.6.6).
    fn reported(&self, chain: &Chain, ram: &GuestRam) {
        if self.shared.poison.load(Ordering::Acquire) == 0 {
            chain.writable().iter().for_each(|s| self.release(ram, s.addr, s.len.into()));
        }
    }

    /// Gives memory back to the host. A host that refuses loses memory, but nothing else fails.
    fn release(&self, ram: &GuestRam, addr: u64, len: u64) {
        if let Err(e) = ram.release(addr, len) {
            self.shared.warnings.warn(format_args!("the host does not take back memory that the guest gave up: {e}"));
        }
    }

    /// Reads statistics; their buffer is kept until new ones are wanted. A driver has only one buffer (5.5.6.3).
    fn stats(&mut self, queue: &mut Queue, ram: &GuestRam) -> Result<Progress, Fault> {
        for _ in 0..super::queue::BATCH {
            let Some(chain) = queue.next(ram)? else { return Ok(Progress::Done) };
            let mut reader = chain.reader(ram);
            let mut bytes = vec![0; reader.len().min(MAX_STATS * STAT as u64) as usize];
            reader.read(&mut bytes)?;
            *lock(&self.shared.stats) = Some((Instant::now(), stats::parse(&bytes)));
            // The buffer popped last is held, because only that one can be put back.
            if let Some(older) = self.held.replace(chain) {
                queue.push_used(ram, older, 0)?;
            }
        }
        Ok(Progress::More)
    }
}

/// Marks a part of a huge page as inside or outside of the balloon.
fn set(part: &mut [u64; 8], page: u64, inside: bool) {
    if let Some(word) = part.get_mut((page / 64) as usize) {
        let bit = 1 << (page % 64);
        *word = if inside { *word | bit } else { *word & !bit };
    }
}

/// Returns whether all parts of a huge page are in the balloon.
fn full(part: &[u64; 8], unit: u64) -> bool {
    part.iter().map(|word| u64::from(word.count_ones())).sum::<u64>() == unit / PAGE
}
#[cfg(test)]
mod tests {
    use super::*;
    use crate::irq::IrqLine;
    use crate::virtio::Interrupt;
    use crate::virtio::mmio::MmioTransport;
    use crate::virtio::testing::{Buf, FakeDriver, FakeQueue, Loopback, inn, out};
    use proptest::prelude::*;

    const RAM: u64 = 16 << 20;
    /// Address of requests, and address from which pages are given up.
    const NUMBERS: u64 = 0x1_0000;
    const PAGES: u64 = 1 << 20;
    const FILL: u8 = 0xAA;

    struct Setup {
        ram: GuestRam,
        device: Balloon,
        drivers: Vec<FakeQueue>,
        wire: Loopback,
        share: Share,
    }

    fn setup(config: &str, without: u64) -> Setup {
        let ram = GuestRam::anonymous(RAM);
        ram.write(PAGES, &vec![FILL; (RAM - PAGES) as usize]).unwrap();
        let mut device = Balloon::new("balloon", &config.parse().unwrap(), Size(RAM));
        let drivers: Vec<_> = (0..5).map(|n| FakeQueue::new(&ram, 0x1000 * (n + 1), 16)).collect();
        let wire = Loopback::new(&ram);
        let activation = activation(&ram, &drivers, device.info().features & !without, &wire.interrupt);
        let Ok(Activated::Here(mut shares)) = device.activate(activation) else { panic!() };
        let mut share = shares.remove(0);
        wire.deliver(&mut *share.handler, &mut share.queues, Event::Start).unwrap();
        Setup { ram, device, drivers, wire, share }
    }

    fn activation(ram: &GuestRam, drivers: &[FakeQueue], features: u64, interrupt: &Interrupt) -> Activation {
        let queues = drivers.iter().map(|d| d.device(features)).collect();
        Activation { ram: ram.clone(), features, queues, kicks: vec![].into(), interrupt: interrupt.clone() }
    }

    impl Setup {
        fn deliver(&mut self, event: Event) -> Result<(), Fault> {
            self.wire.deliver(&mut *self.share.handler, &mut self.share.queues, event)
        }

        fn request(&mut self, queue: usize, bufs: &[Buf]) -> Result<(), Fault> {
            self.drivers[queue].add(bufs).unwrap();
            self.deliver(Event::Kick(queue))?;
            assert_eq!(self.drivers[queue].take_used().unwrap().1, 0);
            Ok(())
        }

        /// Names pages on the inflate or the deflate queue.
        fn numbers(&mut self, queue: usize, numbers: &[u32]) -> Result<(), Fault> {
            let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
            self.ram.write(NUMBERS, &bytes).unwrap();
            self.request(queue, &[out(NUMBERS, bytes.len() as u32)])
        }

        /// Returns the byte that fills page `n`.
        fn page(&self, n: u64) -> u8 {
            let mut page = [0; PAGE as usize];
            self.ram.read(n * PAGE, &mut page).unwrap();
            assert!(page.iter().all(|byte| *byte == page[0]));
            page[0]
        }
    }

    #[test]
    fn the_host_gets_what_the_guest_gives_up() {
        let mut s = setup("1M", 0);
        // Some adjacent pages in descending order, as Linux sends them, one of them twice, and some single pages.
        s.numbers(0, &[0x205, 0x204, 0x203, 0x204, 0x300, 0xFFF]).unwrap();
        for (page, content) in
            [(0x202, FILL), (0x203, 0), (0x204, 0), (0x205, 0), (0x206, FILL), (0x300, 0), (0xFFE, FILL), (0xFFF, 0)]
        {
            assert_eq!(s.page(page), content, "{page:#x}");
        }
        s.ram.write_obj(0x20_4000, 1u8).unwrap();
        s.numbers(1, &[0x204, 0x205]).unwrap();
        assert_eq!(s.ram.read_obj::<u8>(0x20_4000).unwrap(), 1);
    }

    #[test]
    fn odd_requests_cost_nobody_anything() {
        let mut s = setup("0", 0);
        s.numbers(0, &[u32::MAX, u32::MAX - 1, 0x1000, 0xC_0000]).unwrap();
        s.numbers(1, &[u32::MAX, 0x200, 0x200]).unwrap();
        s.numbers(0, &[]).unwrap();
        s.request(0, &[inn(NUMBERS, 8)]).unwrap();
        // One page number and a half, across two buffers.
        s.ram.write(NUMBERS, &[0, 2, 0, 0, 1, 2]).unwrap();
        s.request(0, &[out(NUMBERS, 3), out(NUMBERS + 3, 3)]).unwrap();
        assert_eq!((s.page(0x200), s.page(0x201)), (0, FILL));
        let fault = s.numbers(0, &vec![0x200; 4097]).unwrap_err();
        assert_eq!(fault.to_string(), "a balloon request names more than 4096 pages");
    }

    #[test]
    fn a_flood_is_served_in_turns() {
        let mut s = setup("0", 0);
        s.ram.write(NUMBERS, &[0; 0x4000]).unwrap();
        for _ in 0..8 {
            s.drivers[0].add(&[out(NUMBERS, 0x4000), out(NUMBERS, 0)]).unwrap();
        }
        // Repeated numbers count once, so only the number of requests matters.
        s.deliver(Event::Kick(0)).unwrap();
        assert_eq!(std::iter::from_fn(|| s.drivers[0].take_used()).count(), 8);
    }

    #[test]
    fn reported_pages_are_released_unless_the_guest_needs_their_contents() {
        let report = [inn(0x20_0000, 0x2000), inn(0x40_0800, 0x1000), inn(0x50_0000, 0x1001)];
        let mut s = setup("free_page_reporting", 0);
        s.device.write_config(12, &0xAAAA_AAAAu32.to_le_bytes());
        s.request(3, &report).unwrap();
        assert_eq!(s.page(0x200), FILL);
        s.device.write_config(12, &[0; 4]);
        s.request(3, &report).unwrap();
        assert_eq!([0x1FF, 0x200, 0x201, 0x202].map(|n| s.page(n)), [FILL, 0, 0, FILL]);
        assert_eq!([0x400, 0x401, 0x500, 0x501].map(|n| s.page(n)), [FILL, FILL, 0, FILL]);
        // Without the statistics queue, the reporting queue is the third.
        let mut s = setup("free_page_reporting=on", F_STATS_VQ);
        s.request(2, &report).unwrap();
        assert_eq!(s.page(0x200), 0);
        s.drivers[3].add(&report).unwrap();
        s.deliver(Event::Kick(3)).unwrap();
        assert_eq!(s.drivers[3].take_used(), None);
    }

    #[test]
    fn free_pages_are_remembered_for_who_asked() {
        let mut s = setup("free_page_hinting,free_page_reporting", 0);
        let told = |s: &mut Setup, command: u32| {
            s.ram.write_obj(NUMBERS, command.to_le()).unwrap();
            s.request(3, &[out(NUMBERS, 4)]).unwrap();
        };
        let free = |s: &mut Setup, addr: u64| s.request(3, &[inn(addr, 0x1000)]).unwrap();
        let found = |s: &mut Setup| match s.device.control(&Control::FreeHints) {
            Ok(Reply::FreeHints(FreeHints { complete, ranges })) => (complete, ranges),
            other => panic!("{other:?}"),
        };
        let command = |s: &Setup| {
            let mut data = [0; 4];
            s.device.read_config(8, &mut data);
            u32::from_le_bytes(data)
        };
        // No hints were requested yet.
        free(&mut s, 0x20_0000);
        told(&mut s, 0);
        assert_eq!((command(&s), found(&mut s)), (0, (false, vec![])));
        assert_eq!(s.device.control(&Control::StartHints), Ok(Reply::ConfigChanged));
        assert_eq!(command(&s), 2);
        // An answer to another request, then one to this request.
        told(&mut s, 7);
        free(&mut s, 0x20_0000);
        told(&mut s, 2);
        free(&mut s, 0x30_1000);
        free(&mut s, 0x30_0000);
        s.request(3, &[out(NUMBERS, 3), inn(0x40_0000, 1)]).unwrap();
        assert_eq!(found(&mut s), (false, vec![0x30_0000..0x30_2000, 0x40_0000..0x40_0001]));
        told(&mut s, 0);
        free(&mut s, 0x50_0000);
        assert_eq!(found(&mut s), (true, vec![0x30_0000..0x30_2000, 0x40_0000..0x40_0001]));
        assert_eq!(s.page(0x300), FILL, "it may be in use again");
        assert_eq!(s.device.control(&Control::EndHints), Ok(Reply::ConfigChanged));
        assert_eq!(s.device.control(&Control::EndHints), Ok(Reply::Done));
        assert_eq!((command(&s), found(&mut s)), (1, (false, vec![])));
        // Free page reports come on the queue after the one for hints.
        s.request(4, &[inn(0x30_0000, 0x1000)]).unwrap();
        assert_eq!(s.page(0x300), 0);
        s.device.control(&Control::StartHints).unwrap();
        s.device.reset();
        assert_eq!((command(&s), found(&mut s)), (0, (false, vec![])));
        let without = setup("0", 0).device.control(&Control::StartHints).unwrap_err().to_string();
        assert_eq!(without, "the balloon was configured without free_page_hinting");
    }

    fn stats_bytes(stats: &[(u16, u64)]) -> Vec<u8> {
        stats.iter().flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()).collect()
    }

    #[test]
    fn statistics_are_kept_and_asked_for_again() {
        let mut s = setup("stats=100ms", 0);
        assert_eq!(s.device.stats(), BalloonStats::default());
        let bytes = stats_bytes(&[(4, 123), (5, 456), (15, 7), (16, 8), (0xFFFF, 9), (4, 1 << 40)]);
        s.ram.write(NUMBERS, &bytes).unwrap();
        s.drivers[2].add(&[out(NUMBERS, bytes.len() as u32 - 3)]).unwrap();
        s.deliver(Event::Kick(2)).unwrap();
        let stats = s.device.stats();
        assert_eq!(stats.guest, BTreeMap::from([("free_memory", 123), ("total_memory", 456), ("direct_reclaims", 7)]));
        assert!(stats.age_ms.is_some());
        assert_eq!(s.drivers[2].take_used(), None, "until the time has come");
        s.deliver(Event::Ready(TIMER)).unwrap();
        assert_eq!(s.drivers[2].take_used(), Some((0, 0)));
        s.deliver(Event::Ready(TIMER)).unwrap();
        // More than one buffer: all but the last return immediately, and that one returns to the ring at the end.
        for _ in 0..3 {
            s.drivers[2].add(&[out(NUMBERS, 10)]).unwrap();
        }
        s.deliver(Event::Kick(2)).unwrap();
        assert_eq!(s.device.stats().guest, BTreeMap::from([("free_memory", 123)]));
        assert_eq!(std::iter::from_fn(|| s.drivers[2].take_used()).count(), 2);
        assert_eq!(s.share.queues[2].in_flight(), 1);
        let Share { handler, queues } = &mut s.share;
        s.wire.drain(&mut **handler, queues).unwrap();
        assert_eq!(queues[2].in_flight(), 0);
        assert_eq!(queues[2].state().next_avail, 3);
    }

    #[test]
    fn configuration_space_and_the_size_that_a_user_wants() {
        let ram = GuestRam::anonymous(RAM);
        let balloon = Balloon::new("balloon", &"4M,deflate_on_oom".parse().unwrap(), Size(RAM));
        let line = IrqLine::new(5).unwrap();
        let transport = MmioTransport::new(Box::new(balloon), ram.clone(), line.clone()).unwrap();
        let mut driver = FakeDriver::new(&transport, &ram);
        assert_ne!(driver.offered() & F_DEFLATE_ON_OOM, 0);
        assert_eq!(driver.offered() & (F_PAGE_REPORTING | F_PAGE_POISON), 0);
        assert_eq!((driver.get(0x100), driver.get(0x104), driver.get(0x110)), (1024, 0, 0));
        // No notification before there is a driver.
        assert_eq!(transport.control(&Control::SetBalloon(8 << 20)), Ok(Reply::Done));
        assert_eq!(line.take_count(), 0);
        driver.start(0, 0x1000, 16);
        assert_eq!(driver.get(0x100), 2048);
        driver.set(0x100, 7);
        driver.set(0x104, 1000);
        assert_eq!((driver.get(0x100), driver.get(0x104)), (2048, 1000));
        let generation = driver.get(0xFC);
        transport.control(&Control::SetBalloon((1 << 20) + 4095)).unwrap();
        assert_eq!((driver.get(0x100), line.take_count()), (256, 1));
        assert_ne!(driver.get(0xFC), generation);
        transport.control(&Control::SetBalloon(1 << 20)).unwrap();
        assert_eq!(line.take_count(), 0, "nothing new");
        let Ok(Reply::BalloonStats(stats)) = transport.control(&Control::BalloonStats) else { panic!() };
        assert_eq!((stats.target, stats.actual), (1 << 20, 1000 * 4096));
        let refused = transport.control(&Control::SetBalloon(RAM + 1)).unwrap_err();
        assert_eq!(refused.to_string(), "a balloon of 16777217: the guest has only 16M of memory");
        driver.set(0x70, 0);
        assert_eq!((driver.get(0x100), driver.get(0x104)), (256, 0));
    }

    #[test]
    fn state_is_saved_and_checked() {
        let mut balloon = Balloon::new("balloon", &"1M".parse().unwrap(), Size(RAM));
        balloon.write_config(4, &7u32.to_le_bytes());
        lock(&balloon.shared.parts).insert(3, [1; 8]);
        let state = balloon.save().unwrap();
        let mut other = Balloon::new("balloon", &BalloonConfig::default(), Size(RAM));
        other.restore(&state).unwrap();
        assert_eq!((other.stats().target, other.stats().actual), (1 << 20, 7 << 12));
        assert_eq!(*lock(&other.shared.parts), BTreeMap::from([(3, [1; 8])]), "halves of huge pages");
        for (key, value) in [("target", (RAM >> 12) + 1), ("poison", 1 << 32), ("more", 0)] {
            let mut bad = state.clone();
            bad[key] = value.into();
            assert!(other.restore(&bad).is_err(), "{key}");
        }
    }

    #[test]
    fn a_restored_guest_gets_the_pages_back_that_it_told_of() {
        let new = || Balloon::new("balloon", &"0,free_page_hinting".parse().unwrap(), Size(RAM));
        let command = |balloon: &Balloon| {
            let mut data = [0; 4];
            balloon.read_config(8, &mut data);
            u32::from_le_bytes(data)
        };
        let restored = |state: &serde_json::Value| {
            let mut balloon = new();
            balloon.restore(state).unwrap();
            assert_eq!(balloon.save().unwrap(), *state);
            balloon
        };
        let mut balloon = restored(&new().save().unwrap());
        assert_eq!((command(&balloon), balloon.control(&Control::EndHints)), (0, Ok(Reply::Done)));
        balloon.control(&Control::StartHints).unwrap();
        let mut balloon = restored(&balloon.save().unwrap());
        assert_eq!(command(&balloon), 2);
        assert_eq!((balloon.control(&Control::EndHints), command(&balloon)), (Ok(Reply::ConfigChanged), 1));
        let mut balloon = restored(&balloon.save().unwrap());
        assert_eq!((balloon.control(&Control::EndHints), command(&balloon)), (Ok(Reply::Done), 1));
        balloon.control(&Control::StartHints).unwrap();
        assert_eq!(command(&balloon), 3, "no question twice");
    }

    #[test]
    fn huge_pages_are_released_when_all_of_them_is_given_up() {
        let mut part = [0; 8];
        (0..512).for_each(|page| set(&mut part, page, true));
        assert!(full(&part, 2 << 20));
        set(&mut part, 77, false);
        assert!(!full(&part, 2 << 20));
        // Not every machine has a pool of huge pages.
        let Ok(ram) = GuestRam::new(&"16M,hugepages=2M".parse().unwrap()) else { return };
        ram.write(2 << 20, &[FILL; 4096]).unwrap();
        let mut pages =
            Pages { shared: Arc::default(), roles: vec![], timer: None, held: None, numbers: (512..1023).collect() };
        pages.inflate(&ram);
        assert_eq!(ram.read_obj::<u8>(2 << 20).unwrap(), FILL);
        pages.numbers = vec![700, 1023, u32::MAX];
        pages.deflate(&ram);
        pages.inflate(&ram);
        assert_eq!(ram.read_obj::<u8>(2 << 20).unwrap(), 0);
    }

    #[test]
    fn options() {
        let config: BalloonConfig = "size=256M,deflate_on_oom=on,stats=2,free_page_reporting".parse().unwrap();
        assert!(config.deflate_on_oom && config.free_page_reporting && config.size == Size::mib(256));
        assert_eq!(config.stats, Some(Span(Duration::from_secs(2))));
        assert!("free_page_reporting".parse::<BalloonConfig>().unwrap().free_page_reporting);
        assert_eq!("64M".parse::<BalloonConfig>().unwrap().size, Size::mib(64));
        assert!("grow".parse::<BalloonConfig>().unwrap_err().to_string().contains("unknown key 'grow'"));
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<BalloonConfig>(&json).unwrap(), config);
    }

    /// Request: its queue, page numbers from [`PAGES`] on or arbitrary, and a number of excess bytes.
    fn request() -> impl Strategy<Value = (usize, Vec<u32>, u32)> {
        let number = prop_oneof![20 => 0x100..0x1000u32, 1 => any::<u32>()];
        (0..4usize, prop::collection::vec(number, 0..20), prop_oneof![4 => Just(0), 1 => 1..4u32])
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, cases: 64, ..ProptestConfig::default() })]

        /// Checks that only pages that were named lose their contents, whatever is requested.
        #[test]
        fn what_was_not_given_up_stays(
            requests in prop::collection::vec(request(), 1..12),
            flips in prop_oneof![2 => Just(vec![]), 1 => prop::collection::vec((0x1000..0x4200u64, 0..8u8), 1..4)],
        ) {
            let mut s = setup("free_page_reporting", 0);
            let mut gone = std::collections::HashSet::new();
            for (i, (queue, numbers, more)) in (0u64..).zip(&requests) {
                let at = NUMBERS + 0x100 * i;
                let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
                s.ram.write(at, &bytes).unwrap();
                let page = |n: u32| inn(u64::from(n) << 12, 4096);
                let bufs = match queue {
                    3 => numbers.iter().take(4).filter(|n| **n < 0x1000).map(|n| page(*n)).collect(),
                    _ => vec![out(at, bytes.len() as u32 + more)],
                };
                let added = s.drivers[*queue].add(&bufs).is_some();
                match queue {
                    0 if added => gone.extend(numbers.iter().copied()),
                    3 if added => gone.extend(bufs.iter().map(|buf| (buf.addr >> 12) as u32)),
                    _ => {}
                }
            }
            for &(at, bit) in &flips {
                let byte: u8 = s.ram.read_obj(at).unwrap();
                s.ram.write_obj(at, byte ^ 1 << bit).unwrap();
            }
            let results: Vec<_> = (0..4).map(|queue| s.deliver(Event::Kick(queue))).collect();
            if flips.is_empty() {
                results.into_iter().for_each(Result::unwrap);
                for n in 0x100..0x1000u32 {
                    let expected = if gone.contains(&n) { 0 } else { FILL };
                    prop_assert_eq!(s.ram.read_obj::<u8>(u64::from(n) << 12).unwrap(), expected, "{:#x}", n);
                }
            }
        }
    }
}
