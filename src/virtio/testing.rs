//! The driver's side, for unit tests, benches and fuzzers. Not part of the interface.
//!
//! [`FakeQueue`] is the driver's half of one queue, with knobs for everything a hostile driver can do. [`FakeDriver`]
//! initializes a device through its registers as Linux does. Nothing here is hardened: mistakes in a test panic.

use std::collections::HashMap;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};

use super::queue::{Queue, QueueState};
use super::{Context, Event, Fault, Handler, Interrupt, Progress};
use crate::bus::BusDevice;
use crate::event::Poller;
use crate::irq::IrqLine;
use crate::memory::GuestRam;

/// `VIRTQ_DESC_F_NEXT`.
pub const NEXT: u16 = VRING_DESC_F_NEXT as u16;
/// `VIRTQ_DESC_F_WRITE`.
pub const WRITE: u16 = VRING_DESC_F_WRITE as u16;
/// `VIRTQ_DESC_F_INDIRECT`.
pub const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
/// `VIRTIO_RING_F_EVENT_IDX` as a mask.
pub const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
/// `VIRTIO_F_VERSION_1` as a mask.
pub const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;

/// Buffer of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buf {
    /// Guest-physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// Device-writable.
    pub write: bool,
}

/// Creates a buffer that the device reads.
pub fn out(addr: u64, len: u32) -> Buf {
    Buf { addr, len, write: false }
}

/// Creates a buffer that the device writes.
pub fn inn(addr: u64, len: u32) -> Buf {
    Buf { addr, len, write: true }
}

/// The driver's half of a queue.
pub struct FakeQueue {
    /// Guest memory.
    pub ram: GuestRam,
    /// Number of entries.
    pub size: u16,
    /// Descriptor table.
    pub desc: u64,
    /// Available ring.
    pub avail: u64,
    /// Used ring.
    pub used: u64,
    /// Next available index to publish.
    pub avail_idx: u16,
    /// Next used entry to take.
    pub used_idx: u16,
    free: Vec<u16>,
    chains: HashMap<u16, Vec<u16>>,
}

impl FakeQueue {
    /// Creates a queue at `base`, a multiple of 16, and zeroes [`FakeQueue::footprint`] bytes there.
    pub fn new(ram: &GuestRam, base: u64, size: u16) -> Self {
        let n = u64::from(size);
        let (avail, used) = (base + 16 * n, (base + 16 * n + 6 + 2 * n).next_multiple_of(4));
        ram.write(base, &vec![0; Self::footprint(size) as usize]).unwrap();
        let (free, chains) = ((0..size).rev().collect(), HashMap::new());
        FakeQueue { ram: ram.clone(), size, desc: base, avail, used, avail_idx: 0, used_idx: 0, free, chains }
    }

    /// Returns the number of bytes that a queue takes.
    pub fn footprint(size: u16) -> u64 {
        26 * u64::from(size) + 16
    }

    /// Returns the state that the device would find in its registers.
    pub fn state(&self) -> QueueState {
        let FakeQueue { size, desc, avail, used, .. } = *self;
        QueueState { ready: true, size, desc, avail, used, next_avail: 0, next_used: 0 }
    }

    /// Returns the device's half, as queue 0.
    pub fn device(&self, features: u64) -> Queue {
        self.numbered(0, features)
    }

    /// Returns the device's half, as queue `index`.
    pub fn numbered(&self, index: u16, features: u64) -> Queue {
        Queue::new(index, self.state(), self.size, features, &self.ram).unwrap()
    }

    /// Writes a descriptor into a table.
    pub fn write_desc(&self, table: u64, index: u16, buf: Buf, flags: u16, next: u16) {
        let at = table + 16 * u64::from(index);
        self.ram.write_obj(at, buf.addr.to_le()).unwrap();
        let flags = flags | if buf.write { WRITE } else { 0 };
        let rest = u64::from(buf.len) | u64::from(flags) << 32 | u64::from(next) << 48;
        self.ram.write_obj(at + 8, rest.to_le()).unwrap();
    }

    /// Makes a chain of descriptors available; returns its head, or `None` if the ring is full.
    pub fn add(&mut self, bufs: &[Buf]) -> Option<u16> {
        let head = self.link(bufs, 0)?;
        self.publish(head);
        Some(head)
    }

    /// Like [`FakeQueue::add`] with all buffers in an indirect table at `table`.
    pub fn add_indirect(&mut self, table: u64, bufs: &[Buf]) -> Option<u16> {
        for (i, buf) in (0u16..).zip(bufs) {
            let more = if usize::from(i) + 1 < bufs.len() { NEXT } else { 0 };
            self.write_desc(table, i, *buf, more, i + 1);
        }
        let head = self.link(&[out(table, 16 * bufs.len() as u32)], INDIRECT)?;
        self.publish(head);
        Some(head)
    }

    /// Puts `head` into the available ring, even if it is not a descriptor.
    pub fn publish(&mut self, head: u16) {
        let slot = u64::from(self.avail_idx % self.size);
        self.ram.store_u16(self.avail + 4 + 2 * slot, head, Ordering::Relaxed).unwrap();
        self.set_avail_idx(self.avail_idx.wrapping_add(1));
    }

    /// Returns the available index.
    pub fn avail_idx(&self) -> u16 {
        self.avail_idx
    }

    /// Sets the available index to any value.
    pub fn set_avail_idx(&mut self, index: u16) {
        self.avail_idx = index;
        self.ram.store_u16(self.avail + 2, index, Ordering::Release).unwrap();
    }

    /// Sets, without event_idx, whether used buffers cause no interrupt.
    pub fn set_no_interrupt(&self, no: bool) {
        self.ram.store_u16(self.avail, no.into(), Ordering::SeqCst).unwrap();
    }

    /// Sets, with event_idx, the used index that the driver wants an interrupt for.
    pub fn set_used_event(&self, index: u16) {
        self.ram.store_u16(self.avail + 4 + 2 * u64::from(self.size), index, Ordering::SeqCst).unwrap();
    }

    /// Asks for an interrupt when the next chain is used, or for none until the next call. A caller that asks for one
    /// must look for used chains once more.
    pub fn ask_for_interrupt(&self, features: u64, wanted: bool) {
        if features & EVENT_IDX == 0 {
            self.set_no_interrupt(!wanted);
        } else if wanted {
            self.set_used_event(self.used_idx);
        }
        fence(Ordering::SeqCst);
    }

    /// Returns whether the device wants a kick for what was added since `old`.
    pub fn must_kick(&self, old: u16, features: u64) -> bool {
        fence(Ordering::SeqCst);
        if features & EVENT_IDX == 0 {
            return self.ram.load_u16(self.used, Ordering::SeqCst).unwrap() & 1 == 0;
        }
        let event = self.ram.load_u16(self.used + 4 + 8 * u64::from(self.size), Ordering::SeqCst).unwrap();
        self.avail_idx.wrapping_sub(event).wrapping_sub(1) < self.avail_idx.wrapping_sub(old)
    }

    /// Takes the next used chain; returns its head and the number of bytes written.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        if self.ram.load_u16(self.used + 2, Ordering::Acquire).unwrap() == self.used_idx {
            return None;
        }
        let slot = u64::from(self.used_idx % self.size);
        let element = u64::from_le(self.ram.read_obj::<u64>(self.used + 4 + 8 * slot).unwrap());
        self.used_idx = self.used_idx.wrapping_add(1);
        let head = u16::try_from(element & 0xFFFF_FFFF).unwrap();
        self.free.extend(self.chains.remove(&head).unwrap_or_default());
        Some((head, (element >> 32) as u32))
    }

    /// Takes all descriptors back, whether the device has used them or not.
    pub fn recycle(&mut self) {
        self.chains.clear();
        self.free = (0..self.size).rev().collect();
    }

    /// Waits for the next used chain.
    pub fn wait_used(&mut self) -> (u16, u32) {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(used) = self.take_used() {
                return used;
            }
            assert!(Instant::now() < deadline, "the device used no buffer in 60 s");
            std::thread::yield_now();
        }
    }

    fn link(&mut self, bufs: &[Buf], flags: u16) -> Option<u16> {
        if bufs.is_empty() || bufs.len() > self.free.len() {
            return None;
        }
        let mut chain = self.free.split_off(self.free.len() - bufs.len());
        chain.reverse();
        for (i, buf) in bufs.iter().enumerate() {
            let (more, next) = chain.get(i + 1).map_or((0, 0), |&next| (NEXT, next));
            self.write_desc(self.desc, chain[i], *buf, flags | more, next);
        }
        let head = chain[0];
        self.chains.insert(head, chain);
        Some(head)
    }
}

/// Calls a handler as a worker would, but on the test's own thread.
pub struct Loopback {
    /// Guest memory.
    pub ram: GuestRam,
    /// The device's interrupt.
    pub interrupt: Interrupt,
    poller: Poller,
}

impl Loopback {
    /// Creates a loop that watches no descriptors.
    pub fn new(ram: &GuestRam) -> Self {
        let interrupt = Interrupt::new(IrqLine::new(5).unwrap());
        Loopback { ram: ram.clone(), interrupt, poller: Poller::new().unwrap() }
    }

    /// Delivers events for the watched descriptors that become ready within `timeout`; returns their number.
    pub fn deliver_ready(
        &mut self,
        handler: &mut dyn Handler,
        queues: &mut [Queue],
        timeout: Duration,
    ) -> Result<usize, Fault> {
        let deadline = Instant::now() + timeout;
        let tokens = loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let tokens: Vec<u64> = self.poller.wait(Some(left))?.collect();
            // Signals, io_uring's own among them, end a wait early.
            if !tokens.is_empty() || left.is_zero() {
                break tokens;
            }
        };
        tokens.iter().try_for_each(|&token| self.deliver(handler, queues, Event::Ready(token)))?;
        Ok(tokens.len())
    }

    /// Delivers an event until it is done; [`Event::Start`] once, as a worker does.
    pub fn deliver(&self, handler: &mut dyn Handler, queues: &mut [Queue], event: Event) -> Result<(), Fault> {
        let cx = Context::new(&self.ram, &self.interrupt, &self.poller);
        while handler.event(event, queues, &cx)? == Progress::More && event != Event::Start {}
        Ok(())
    }

    /// Makes the handler finish what is in flight, as before a stop. Panics after 60 seconds.
    pub fn drain(&self, handler: &mut dyn Handler, queues: &mut [Queue]) -> Result<(), Fault> {
        let deadline = Instant::now() + Duration::from_secs(60);
        let cx = Context::new(&self.ram, &self.interrupt, &self.poller);
        while handler.drain(queues, &cx)? == Progress::More {
            assert!(Instant::now() < deadline, "requests are still in flight after 60 s");
            std::thread::yield_now();
        }
        Ok(())
    }
}

/// Driver that knows only registers.
pub struct FakeDriver<'a> {
    /// Register window of the device.
    pub device: &'a dyn BusDevice,
    /// Guest memory.
    pub ram: GuestRam,
    /// Negotiated features.
    pub features: u64,
    /// Queues that the driver set up.
    pub queues: Vec<FakeQueue>,
}

impl<'a> FakeDriver<'a> {
    /// Creates a driver that has done nothing yet.
    pub fn new(device: &'a dyn BusDevice, ram: &GuestRam) -> Self {
        FakeDriver { device, ram: ram.clone(), features: 0, queues: vec![] }
    }

    /// Reads a register.
    pub fn get(&self, register: u32) -> u32 {
        let mut data = [0xFF; 4];
        self.device.read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes a register.
    pub fn set(&self, register: u32, value: u32) {
        self.device.write(register.into(), &value.to_le_bytes());
    }

    /// Returns all features that the device offers.
    pub fn offered(&self) -> u64 {
        self.set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 0);
        let low = u64::from(self.get(VIRTIO_MMIO_DEVICE_FEATURES));
        self.set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
        low | u64::from(self.get(VIRTIO_MMIO_DEVICE_FEATURES)) << 32
    }

    /// Resets, acknowledges and negotiates `features`, up to FEATURES_OK (3.1.1). Returns whether the device agreed.
    pub fn negotiate(&mut self, features: u64) -> bool {
        assert_eq!(self.get(VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
        assert_eq!(self.get(VIRTIO_MMIO_VERSION), 2);
        self.set(VIRTIO_MMIO_STATUS, 0);
        assert_eq!(self.get(VIRTIO_MMIO_STATUS), 0);
        self.set(VIRTIO_MMIO_STATUS, 1);
        self.set(VIRTIO_MMIO_STATUS, 3);
        self.features = features;
        for (sel, word) in [(1, features >> 32), (0, features)] {
            self.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, sel);
            self.set(VIRTIO_MMIO_DRIVER_FEATURES, word as u32);
        }
        self.set(VIRTIO_MMIO_STATUS, 11);
        self.get(VIRTIO_MMIO_STATUS) == 11
    }

    /// Writes a queue's registers and makes it ready.
    pub fn enable(&self, index: u32, queue: &FakeQueue) {
        self.set(VIRTIO_MMIO_QUEUE_SEL, index);
        self.set(VIRTIO_MMIO_QUEUE_NUM, queue.size.into());
        for (low, addr) in [
            (VIRTIO_MMIO_QUEUE_DESC_LOW, queue.desc),
            (VIRTIO_MMIO_QUEUE_AVAIL_LOW, queue.avail),
            (VIRTIO_MMIO_QUEUE_USED_LOW, queue.used),
        ] {
            self.set(low, addr as u32);
            self.set(low + 4, (addr >> 32) as u32);
        }
        self.set(VIRTIO_MMIO_QUEUE_READY, 1);
        assert_eq!(self.get(VIRTIO_MMIO_QUEUE_READY), 1);
    }

    /// Initializes the device with all offered features except `without`; queues of `size` start at `base`.
    pub fn start(&mut self, without: u64, base: u64, size: u16) {
        assert!(self.negotiate(self.offered() & !without));
        self.queues.clear();
        let mut base = base;
        for index in 0.. {
            self.set(VIRTIO_MMIO_QUEUE_SEL, index);
            let max = self.get(VIRTIO_MMIO_QUEUE_NUM_MAX);
            if max == 0 {
                break;
            }
            let queue = FakeQueue::new(&self.ram, base, size.min(max as u16));
            base = (base + FakeQueue::footprint(queue.size)).next_multiple_of(16);
            self.enable(index, &queue);
            self.queues.push(queue);
        }
        self.set(VIRTIO_MMIO_STATUS, 15);
    }

    /// Kicks a queue through the register.
    pub fn kick(&self, index: u32) {
        self.set(VIRTIO_MMIO_QUEUE_NOTIFY, index);
    }

    /// Waits until `Status` has `bit`.
    pub fn wait_status(&self, bit: u32) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.get(VIRTIO_MMIO_STATUS) & bit == 0 {
            assert!(Instant::now() < deadline, "status {:#x} lacks {bit:#x}", self.get(VIRTIO_MMIO_STATUS));
            std::thread::yield_now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::blk::Blk;
    use crate::virtio::rng::{Rng, RngConfig};
    use crate::virtio::{Activated, Activation, RING_FEATURES, VirtioDevice};
    use proptest::prelude::*;
    use std::ops::Range;

    const RAM: u64 = 1 << 18;
    const RING: u64 = 0x1000;
    const TABLES: u64 = 0x2000;
    const HEADERS: u64 = 0x8000;
    const BUFFERS: u64 = 0x1_0000;
    const SIZE: u16 = 16;
    /// Size of an indirect table in bytes: a few more descriptors than a chain may have.
    const TABLE: u64 = 20 * 16;

    /// Block request: type and sector, lengths of data to read and to write, in an indirect table or not.
    #[derive(Clone, Debug)]
    struct Request {
        kind: u32,
        sector: u64,
        reads: Vec<u32>,
        writes: Vec<u32>,
        indirect: bool,
    }

    fn request() -> impl Strategy<Value = Request> {
        let kind = prop_oneof![10 => prop::sample::select(vec![0u32, 1, 4, 8, 11, 13]), 1 => any::<u32>()];
        let sector = prop_oneof![10 => 0..8u64, 1 => any::<u64>()];
        let len = || prop_oneof![6 => Just(512u32), 2 => Just(0), 2 => 1..1500u32];
        let lens = || prop::collection::vec(len(), 0..4);
        (kind, sector, lens(), lens(), any::<bool>()).prop_map(|(kind, sector, reads, writes, indirect)| Request {
            kind,
            sector,
            // A valid request has data in one direction; sometimes keep both.
            reads: if kind == 0 { vec![] } else { reads },
            writes: if kind == 1 { vec![] } else { writes },
            indirect,
        })
    }

    /// Bits of rings, tables and headers to flip: mostly none.
    fn flips() -> impl Strategy<Value = Vec<(u64, u8)>> {
        let area = prop_oneof![RING..RING + 26 * u64::from(SIZE), TABLES..TABLES + 8 * TABLE, HEADERS..HEADERS + 128];
        prop_oneof![3 => Just(vec![]), 2 => prop::collection::vec((area, 0..8u8), 1..4)]
    }

    /// Returns the ranges that descriptors let the device write, flips included.
    fn writable(driver: &FakeQueue, before: &[u8]) -> Vec<Range<u64>> {
        let word = |at: u64| {
            let at = at as usize;
            u64::from_le_bytes(before[at..at + 8].try_into().unwrap())
        };
        let direct = (0..u64::from(SIZE)).map(|i| driver.desc + 16 * i);
        let tables = (0..8 * TABLE / 16).map(|i| TABLES + 16 * i);
        let mut ranges: Vec<_> = direct
            .chain(tables)
            .filter(|at| word(at + 8) >> 32 & u64::from(WRITE) != 0)
            .filter_map(|at| Some(word(at)..word(at).checked_add(word(at + 8) & 0xFFFF_FFFF)?))
            .collect();
        ranges.push(driver.used..driver.used + 4 + 8 * u64::from(SIZE) + 2);
        ranges
    }

    fn check(device: &mut dyn VirtioDevice, features: u64, requests: &[Request], flips: &[(u64, u8)]) {
        let ram = GuestRam::anonymous(RAM);
        let mut driver = FakeQueue::new(&ram, RING, SIZE);
        let wire = Loopback::new(&ram);
        let activation = Activation {
            ram: ram.clone(),
            features,
            queues: vec![driver.device(features)],
            kicks: vec![].into(),
            interrupt: wire.interrupt.clone(),
        };
        let Ok(Activated::Here(mut shares)) = device.activate(activation) else { panic!("{}", device.info().name) };
        let share = &mut shares[0];
        let (mut heads, mut at) = (vec![], BUFFERS);
        for (i, request) in (0u64..).zip(requests) {
            let header = HEADERS + 16 * i;
            ram.write_obj(header, u64::from(request.kind)).unwrap();
            ram.write_obj(header + 8, request.sector).unwrap();
            let mut bufs = vec![out(header, 16)];
            let lens = request.reads.iter().map(|&l| (l, false)).chain(request.writes.iter().map(|&l| (l, true)));
            for (len, write) in lens.chain([(1, true)]) {
                bufs.push(Buf { addr: at, len, write });
                at += u64::from(len);
            }
            heads.extend(match request.indirect && features & RING_FEATURES == RING_FEATURES {
                true => driver.add_indirect(TABLES + TABLE * i, &bufs),
                false => driver.add(&bufs),
            });
        }
        for &(at, bit) in flips {
            let byte: u8 = ram.read_obj(at).unwrap();
            ram.write_obj(at, byte ^ 1 << bit).unwrap();
        }
        let mut before = vec![0; RAM as usize];
        ram.read(0, &mut before).unwrap();
        let result = wire.deliver(&mut *share.handler, &mut share.queues, Event::Kick(0));
        wire.drain(&mut *share.handler, &mut share.queues).unwrap();

        // Every chain is used unless a rule was broken.
        let end = share.queues[0].state();
        assert_eq!(
            end.next_avail,
            end.next_used.wrapping_add(u16::from(result.is_err() && end.next_avail != end.next_used))
        );
        if flips.is_empty() {
            result.unwrap();
            let mut used: Vec<u16> = std::iter::from_fn(|| driver.take_used()).map(|(head, _)| head).collect();
            used.sort_unstable();
            heads.sort_unstable();
            assert_eq!(used, heads);
        }
        // Only allowed ranges were written. A descriptor that points at the rings may change the rules on the way.
        let ranges = writable(&driver, &before);
        if ranges.iter().rev().skip(1).any(|r| r.start < HEADERS && r.end > RING) {
            return;
        }
        let mut after = vec![0; RAM as usize];
        ram.read(0, &mut after).unwrap();
        for (at, _) in (0u64..).zip(before.iter().zip(&after)).filter(|(_, (b, a))| b != a) {
            assert!(ranges.iter().any(|r| r.contains(&at)), "{at:#x} was written");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_chain_is_survived(
            requests in prop::collection::vec(request(), 1..8),
            flips in flips(),
            features in prop::sample::select(vec![RING_FEATURES, 0, EVENT_IDX]),
        ) {
            let file = tempfile::NamedTempFile::new().unwrap();
            file.as_file().set_len(8 * 512).unwrap();
            let config = file.path().display().to_string().parse().unwrap();
            check(&mut Blk::new("blk0", &config).unwrap(), features, &requests, &flips);
            prop_assert_eq!(file.as_file().metadata().unwrap().len(), 8 * 512);
            check(&mut Rng::new("rng0", &RngConfig::default()), features, &requests, &flips);
        }
    }
}
