//! Memory device (5.15): memory that the guest gets and gives back while it runs.
//!
//! The device has a region of guest-physical addresses, divided into blocks, none of them plugged at first.
//! Configuration space holds the amount that the guest should have; its driver chooses blocks and requests plugging and
//! unplugging until it has that much. Nothing is mapped or unmapped: the whole region is reserved, and an unplugged
//! block is memory that the host has taken back.
//!
//! A guest that writes to unplugged blocks takes memory that it was not given, at most the region: as with RAM, that is
//! the most it can ever have. Anything written there is gone when the block is plugged.

use std::io;
use std::ops::Range;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::chain::Chain;
use super::control::{Control, ControlError, Reply};
use super::{
    Activated, Activation, Context, DeviceId, DeviceInfo, Event, Fault, Handler, Progress, RING_FEATURES, Share,
    StateError, VirtioDevice, queue::Queue,
};
use crate::log_limit::LogLimit;
use crate::memory::GuestRam;
use crate::options::{self, Size};

/// Feature bit (5.15.3): the driver stays away from unplugged blocks. Even reading one may take memory of the host;
/// drivers that do not know the feature do so only for a memory dump.
const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// Types of requests (5.15.6).
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// Sizes of a request and of a response in bytes (5.15.6).
const REQUEST: usize = 24;
const RESPONSE: usize = 10;

const QUEUE_SIZE: u16 = 64;
/// Bytes beyond the requested amount that the driver may choose from: room to work around blocks that it cannot free.
/// Two of Linux's own units.
const USABLE_EXTENT: u64 = 256 << 20;
/// Smallest block: 2 MiB, the size of the largest pages on most hosts.
const MIN_BLOCK: u64 = 2 << 20;
/// Largest block: 1 GiB.
const MAX_BLOCK: u64 = 1 << 30;

/// Responses (5.15.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
enum Response {
    Ack = 0,
    /// Plugging would exceed the requested amount.
    Nack = 1,
    /// The host cannot do it now.
    Busy = 2,
    /// The request makes no sense.
    Error = 3,
}

/// State of a range of blocks (5.15.6.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
enum State {
    Plugged = 0,
    Unplugged = 1,
    Mixed = 2,
}

/// `--virtio-mem`: memory that can be added and removed while the guest runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemConfig {
    /// Maximum that can be added: whole blocks. Linux uses it in units of 128 MiB (2 GiB in large guests).
    pub size: Size,
    /// Amount that the guest should have at first: whole blocks, at most `size`.
    #[serde(default)]
    pub requested: Size,
    /// Size of a block: a power of two, 2 MiB to 1 GiB.
    #[serde(default = "default_block")]
    pub block: Size,
}

fn default_block() -> Size {
    Size(MIN_BLOCK)
}

impl FromStr for MemConfig {
    type Err = options::Error;

    fn from_str(text: &str) -> Result<Self, options::Error> {
        options::from_str(text, Some("size"))
    }
}

impl MemConfig {
    /// Checks the sizes; the error is a sentence.
    pub fn validate(&self) -> Result<(), String> {
        let MemConfig { size, requested, block } = *self;
        if !block.0.is_power_of_two() || !(MIN_BLOCK..=MAX_BLOCK).contains(&block.0) {
            return Err(format!("block={block}: must be a power of two from 2M to 1G"));
        }
        if size.0 == 0 || !size.0.is_multiple_of(block.0) {
            let hint = size.unit_hint();
            return Err(format!("{size}: not a positive multiple of {block}, the size of a block{hint}"));
        }
        check_requested(requested.0, size.0, block.0).map_err(|e| format!("requested={requested}: {e}"))
    }
}

/// Checks that an amount can be requested; the error is the end of a sentence.
fn check_requested(requested: u64, region: u64, block: u64) -> Result<(), String> {
    if requested > region {
        return Err(format!("there is only {} to add", Size(region)));
    }
    if !requested.is_multiple_of(block) {
        return Err(format!("not a multiple of {}, the size of a block", Size(block)));
    }
    Ok(())
}

/// Progress of a memory device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MemStatus {
    /// Bytes that the guest should have.
    pub requested: u64,
    /// Bytes that the guest has.
    pub plugged: u64,
    /// Bytes that the guest could have at most.
    pub size: u64,
}

/// Saved state: sizes in bytes, and the plugged blocks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemState {
    /// Guest-physical address of the region.
    pub addr: u64,
    /// Size of the region.
    pub size: u64,
    /// Size of a block.
    pub block: u64,
    /// Amount that the guest should have.
    pub requested: u64,
    /// Length of the part of the region that the guest may have blocks in.
    pub usable: u64,
    /// Runs of plugged blocks in order, each with its first block and the number of blocks.
    pub plugged: Vec<(u64, u64)>,
}

/// Fixed properties of the region.
#[derive(Clone, Copy, Debug)]
struct Region {
    addr: u64,
    len: u64,
    block: u64,
}

impl Region {
    /// Returns the length of the part that the driver may use at first for a requested amount.
    fn usable(&self, requested: u64) -> u64 {
        if requested == 0 { 0 } else { (requested + USABLE_EXTENT).next_multiple_of(self.block).min(self.len) }
    }
}

/// Changing state, shared by the device and its handler.
#[derive(Debug)]
struct Blocks {
    requested: u64,
    usable: u64,
    /// Number of plugged blocks.
    count: u64,
    /// One bit for each block of the region, set if it is plugged.
    plugged: Vec<u64>,
}

impl Blocks {
    fn is_plugged(&self, block: u64) -> bool {
        let word = usize::try_from(block / 64).ok().and_then(|word| self.plugged.get(word));
        word.is_some_and(|word| word >> (block % 64) & 1 == 1)
    }

    /// Returns the number of plugged blocks in a range.
    fn count(&self, blocks: &Range<u64>) -> u64 {
        blocks.clone().filter(|block| self.is_plugged(*block)).count() as u64
    }

    fn state(&self, blocks: &Range<u64>) -> State {
        match self.count(blocks) {
            0 => State::Unplugged,
            n if n == blocks.end - blocks.start => State::Plugged,
            _ => State::Mixed,
        }
    }

    fn set(&mut self, blocks: Range<u64>, plugged: bool) {
        for block in blocks {
            if self.is_plugged(block) == plugged {
                continue;
            }
            if let Some(word) = usize::try_from(block / 64).ok().and_then(|word| self.plugged.get_mut(word)) {
                *word ^= 1 << (block % 64);
                self.count = if plugged { self.count + 1 } else { self.count - 1 };
            }
        }
    }

    fn runs(&self) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for block in (0..self.plugged.len() as u64 * 64).filter(|block| self.is_plugged(*block)) {
            match runs.last_mut() {
                Some((first, count)) if *first + *count == block => *count += 1,
                _ => runs.push((block, 1)),
            }
        }
        runs
    }
}

/// Memory device.
pub struct Mem {
    info: DeviceInfo,
    region: Region,
    blocks: Arc<Mutex<Blocks>>,
    warnings: LogLimit,
}

impl Mem {
    /// Creates a device whose region is at the guest-physical address `addr`, a multiple of the block size.
    pub fn new(name: impl Into<String>, config: &MemConfig, addr: u64) -> Self {
        let info = DeviceInfo {
            id: DeviceId::Mem,
            name: name.into(),
            features: RING_FEATURES | F_UNPLUGGED_INACCESSIBLE,
            queue_sizes: vec![QUEUE_SIZE],
            shared_memory: vec![],
        };
        let region = Region { addr, len: config.size.0, block: config.block.0 };
        let requested = config.requested.0;
        let plugged = vec![0; (region.len / region.block).div_ceil(64) as usize];
        let blocks = Blocks { requested, usable: region.usable(requested), count: 0, plugged };
        Mem { info, region, blocks: Arc::new(Mutex::new(blocks)), warnings: LogLimit::default() }
    }

    fn status(&self) -> MemStatus {
        let blocks = lock(&self.blocks);
        MemStatus { requested: blocks.requested, plugged: blocks.count * self.region.block, size: self.region.len }
    }

    /// Changes the requested amount, which is possible at any time; the usable part only grows with it (5.15.4).
    fn request(&self, bytes: u64) -> Result<Reply, String> {
        check_requested(bytes, self.region.len, self.region.block)?;
        let mut blocks = lock(&self.blocks);
        let old = std::mem::replace(&mut blocks.requested, bytes);
        blocks.usable = blocks.usable.max(self.region.usable(bytes));
        Ok(if old == bytes { Reply::Done } else { Reply::ConfigChanged })
    }

    fn checked(&self, state: &MemState) -> Result<Blocks, String> {
        let MemState { addr, size, block, requested, usable, plugged: runs } = state;
        let Region { addr: here, len, block: here_block } = self.region;
        if (*addr, *size, *block) != (here, len, here_block) {
            let text = |addr, size, block| format!("{} at {addr:#x} in blocks of {}", Size(size), Size(block));
            return Err(format!(
                "was saved as {}, but here it is {}",
                text(*addr, *size, *block),
                text(here, len, here_block)
            ));
        }
        check_requested(*requested, len, *block)?;
        if *usable > len || usable < requested || !usable.is_multiple_of(*block) {
            return Err(format!("was saved with {usable:#x} usable bytes of {len:#x}"));
        }
        let plugged = vec![0; (len / block).div_ceil(64) as usize];
        let mut blocks = Blocks { requested: *requested, usable: *usable, count: 0, plugged };
        let mut behind = 0;
        for (first, count) in runs {
            let end = first.checked_add(*count).filter(|end| *first >= behind && *count > 0 && *end <= usable / block);
            let end =
                end.ok_or_else(|| format!("was saved with plugged blocks {first}..+{count}, which is impossible"))?;
            blocks.set(*first..end, true);
            behind = end;
        }
        Ok(blocks)
    }
}

fn lock(blocks: &Mutex<Blocks>) -> MutexGuard<'_, Blocks> {
    blocks.lock().unwrap_or_else(PoisonError::into_inner)
}

impl VirtioDevice for Mem {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// `struct virtio_mem_config` (5.15.4); there is no `node_id`.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let Region { addr, len, block } = self.region;
        let Blocks { requested, usable, count, .. } = *lock(&self.blocks);
        let config = [block, 0, addr, len, usable, count * block, requested].map(u64::to_le_bytes);
        super::read_config_bytes(config.as_flattened(), offset, data);
    }

    fn control(&mut self, control: &Control) -> Result<Reply, ControlError> {
        match *control {
            Control::RequestMemory(bytes) => {
                self.request(bytes).map_err(|e| ControlError::Refused(format!("{} of memory: {e}", Size(bytes))))
            }
            Control::MemoryStatus => Ok(Reply::MemoryStatus(self.status())),
            _ => Err(ControlError::Unsupported(self.info.name.clone())),
        }
    }

    /// Starts the device. It has no `reset`, because a reset changes no block (5.15.5).
    fn activate(&mut self, activation: Activation) -> io::Result<Activated> {
        let handler = Plugger { region: self.region, blocks: self.blocks.clone(), warnings: self.warnings.clone() };
        Ok(Activated::Here(vec![Share { queues: activation.queues, handler: Box::new(handler) }]))
    }

    fn save(&self) -> Result<serde_json::Value, StateError> {
        let Region { addr, len: size, block } = self.region;
        let blocks = lock(&self.blocks);
        let Blocks { requested, usable, count: _, plugged: _ } = *blocks;
        let state = MemState { addr, size, block, requested, usable, plugged: blocks.runs() };
        serde_json::to_value(state).map_err(|e| StateError(e.to_string()))
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<(), StateError> {
        let name = &self.info.name;
        let state = MemState::deserialize(state)
            .map_err(|e| StateError(format!("the saved state of {name} is broken: {e}")))?;
        *lock(&self.blocks) = self.checked(&state).map_err(|e| StateError(format!("{name} {e}")))?;
        Ok(())
    }
}

/// Handler of the queue.
struct Plugger {
    region: Region,
    blocks: Arc<Mutex<Blocks>>,
    /// Limits warnings about refusals of the host.
    warnings: LogLimit,
}

impl Handler for Plugger {
    fn event(&mut self, event: Event, queues: &mut [Queue], cx: &Context<'_>) -> Result<Progress, Fault> {
        let (Event::Kick(_), [queue]) = (event, queues) else { return Ok(Progress::Done) };
        queue.serve(cx.ram, |chain| self.request(chain, cx.ram))
    }
}

impl Plugger {
    fn request(&mut self, chain: &Chain, ram: &GuestRam) -> Result<u32, Fault> {
        let mut writer = chain.writer(ram);
        if writer.len() < RESPONSE as u64 {
            return Err(Fault::Device("a memory request has no room for its response of 10 bytes"));
        }
        let mut request = [0; REQUEST];
        let (response, state) = match chain.reader(ram).read(&mut request) {
            Ok(()) => self.answer(&request, ram),
            Err(super::chain::Error::Short { .. }) => (Response::Error, None),
            Err(e) => return Err(e.into()),
        };
        let mut bytes = [0; RESPONSE];
        let fields = [response as u16, 0, 0, 0, state.map_or(0, |state| state as u16)];
        bytes.iter_mut().zip(fields.iter().flat_map(|f| f.to_le_bytes())).for_each(|(to, from)| *to = from);
        writer.write(&bytes)?;
        Ok(RESPONSE as u32)
    }

    /// Answers a `struct virtio_mem_req` (5.15.6): a type, an address, a number of blocks, each in eight bytes.
    fn answer(&mut self, request: &[u8; REQUEST], ram: &GuestRam) -> (Response, Option<State>) {
        let [t0, t1, _, _, _, _, _, _, a0, a1, a2, a3, a4, a5, a6, a7, n0, n1, ..] = *request;
        let addr = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
        let kind = u16::from_le_bytes([t0, t1]);
        if kind == UNPLUG_ALL {
            return (self.unplug_all(ram), None);
        }
        let Some(blocks) = self.range(addr, u16::from_le_bytes([n0, n1])) else { return (Response::Error, None) };
        match kind {
            PLUG => (self.plug(blocks, ram), None),
            UNPLUG => (self.unplug(blocks, ram), None),
            STATE => (Response::Ack, Some(lock(&self.blocks).state(&blocks))),
            _ => (Response::Error, None),
        }
    }

    /// Returns the blocks of a request: at least one, and all in the usable part of the region.
    fn range(&self, addr: u64, count: u16) -> Option<Range<u64>> {
        let Region { addr: base, block, .. } = self.region;
        let offset = addr.checked_sub(base).filter(|offset| offset.is_multiple_of(block))?;
        let first = offset / block;
        let end = first + u64::from(count);
        (count > 0 && end <= lock(&self.blocks).usable / block).then_some(first..end)
    }

    fn plug(&mut self, range: Range<u64>, ram: &GuestRam) -> Response {
        let Region { block, .. } = self.region;
        {
            let blocks = lock(&self.blocks);
            if blocks.state(&range) != State::Unplugged {
                return Response::Error;
            }
            if (blocks.count + (range.end - range.start)) * block > blocks.requested {
                return Response::Nack;
            }
        }
        // Anything written while the blocks were unplugged is not the guest's.
        self.release(&range, ram);
        let (addr, len) = self.bytes(&range);
        if let Err(e) = ram.provide(addr, len) {
            self.refused(&e, "has no memory to add");
            self.release(&range, ram);
            return Response::Busy;
        }
        lock(&self.blocks).set(range, true);
        Response::Ack
    }

    fn unplug(&mut self, range: Range<u64>, ram: &GuestRam) -> Response {
        if lock(&self.blocks).state(&range) != State::Plugged {
            return Response::Error;
        }
        if !self.release(&range, ram) {
            return Response::Busy;
        }
        lock(&self.blocks).set(range, false);
        Response::Ack
    }

    /// Unplugs all blocks; the only request after which the usable part may be smaller (5.15.6.3).
    fn unplug_all(&mut self, ram: &GuestRam) -> Response {
        let all = 0..self.region.len / self.region.block;
        if !self.release(&all, ram) {
            return Response::Busy;
        }
        let mut blocks = lock(&self.blocks);
        blocks.set(all, false);
        blocks.usable = self.region.usable(blocks.requested);
        Response::Ack
    }

    fn bytes(&self, range: &Range<u64>) -> (u64, u64) {
        let Region { addr, block, .. } = self.region;
        (addr + range.start * block, (range.end - range.start) * block)
    }

    /// Gives blocks back to the host; returns whether it took them.
    fn release(&mut self, range: &Range<u64>, ram: &GuestRam) -> bool {
        let (addr, len) = self.bytes(range);
        ram.release(addr, len).inspect_err(|e| self.refused(e, "does not take back memory that was removed")).is_ok()
    }

    fn refused(&mut self, error: &io::Error, what: &str) {
        self.warnings.warn(format_args!("the host {what}: {error}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irq::IrqLine;
    use crate::memory::{Area, Backing};
    use crate::virtio::mmio::MmioTransport;
    use crate::virtio::testing::{Buf, FakeDriver, FakeQueue, Loopback, inn, out};
    use proptest::prelude::*;

    const B: u64 = 0x8_0000;
    const START: u64 = 6 << 30;
    const BLOCK: u64 = 2 << 20;
    /// Number of blocks in the region.
    const SIZE: u64 = 200;

    struct Setup {
        ram: GuestRam,
        device: Mem,
    }

    fn setup(config: &str) -> Setup {
        let config: MemConfig = config.parse().unwrap();
        config.validate().unwrap();
        let area = Area { start: START, len: config.size.0, backing: Backing::Pluggable };
        let ram = GuestRam::with_areas(&"16M".parse().unwrap(), vec![area]).unwrap();
        Setup { ram, device: Mem::new("mem", &config, START) }
    }

    fn request(kind: u16, addr: u64, count: u16) -> [u8; REQUEST] {
        // Padding is ignored (5.15.6).
        let mut request = [0xEE; REQUEST];
        request[..2].copy_from_slice(&kind.to_le_bytes());
        request[8..16].copy_from_slice(&addr.to_le_bytes());
        request[16..18].copy_from_slice(&count.to_le_bytes());
        request
    }

    impl Setup {
        fn serve(&mut self, bufs: &[Buf]) -> Result<u32, Fault> {
            let mut driver = FakeQueue::new(&self.ram, 0x1000, 8);
            let blocks = self.device.blocks.clone();
            let mut handler = Plugger { region: self.device.region, blocks, warnings: LogLimit::default() };
            let mut queues = [driver.device(RING_FEATURES)];
            driver.add(bufs).unwrap();
            Loopback::new(&self.ram).deliver(&mut handler, &mut queues, Event::Kick(0))?;
            Ok(driver.take_used().unwrap().1)
        }

        /// Sends a request; returns the response's type and state.
        fn ask(&mut self, kind: u16, addr: u64, count: u16) -> (u16, u16) {
            self.ram.write(B, &request(kind, addr, count)).unwrap();
            self.ram.write(B + 64, &[0xFF; 16]).unwrap();
            assert_eq!(self.serve(&[out(B, REQUEST as u32), inn(B + 64, RESPONSE as u32)]).unwrap(), 10);
            let response: [u8; 11] = self.ram.read_obj(B + 64).unwrap();
            assert_eq!((&response[2..8], response[10]), (&[0; 6][..], 0xFF));
            let word = |at: usize| u16::from_le_bytes([response[at], response[at + 1]]);
            (word(0), word(8))
        }

        fn plug(&mut self, block: u64, count: u16) -> u16 {
            self.ask(PLUG, START + block * BLOCK, count).0
        }

        fn unplug(&mut self, block: u64, count: u16) -> u16 {
            self.ask(UNPLUG, START + block * BLOCK, count).0
        }

        fn state(&mut self, block: u64, count: u16) -> u16 {
            let (response, state) = self.ask(STATE, START + block * BLOCK, count);
            assert_eq!(response, ACK);
            state
        }

        /// Returns `usable_region_size`, `plugged_size` and `requested_size`, in blocks.
        fn config(&self) -> [u64; 3] {
            [4, 5, 6].map(|field| {
                let mut data = [0; 8];
                self.device.read_config(8 * field, &mut data);
                u64::from_le_bytes(data) / BLOCK
            })
        }

        fn set(&mut self, blocks: u64) -> Result<Reply, ControlError> {
            self.device.control(&Control::RequestMemory(blocks * BLOCK))
        }
    }

    const ACK: u16 = Response::Ack as u16;
    const NACK: u16 = Response::Nack as u16;
    const ERROR: u16 = Response::Error as u16;

    #[test]
    fn blocks_come_and_go() {
        let mut s = setup("400M,requested=20M");
        assert_eq!(s.config(), [138, 0, 10]);
        assert_eq!(s.plug(0, 3), ACK);
        assert_eq!(s.plug(130, 1), ACK);
        assert_eq!(s.config(), [138, 4, 10]);
        assert_eq!([s.state(0, 3), s.state(3, 127), s.state(0, 4), s.state(129, 2)], [0, 1, 2, 2]);
        s.ram.write(START, b"here").unwrap();
        assert_eq!(s.plug(4, 1), ACK);
        assert_eq!(s.ram.read_obj::<[u8; 4]>(START).unwrap(), *b"here", "others are left alone");
        assert_eq!(s.unplug(0, 2), ACK);
        assert_eq!(s.ram.read_obj::<[u8; 4]>(START).unwrap(), [0; 4]);
        assert_eq!(s.config(), [138, 3, 10]);
        let status = MemStatus { requested: 10 * BLOCK, plugged: 3 * BLOCK, size: SIZE * BLOCK };
        assert_eq!(s.device.control(&Control::MemoryStatus), Ok(Reply::MemoryStatus(status)));
        assert_eq!(s.ask(UNPLUG_ALL, u64::MAX, u16::MAX), (ACK, 0));
        assert_eq!((s.config(), s.state(0, 138)), ([138, 0, 10], 1));
    }

    #[test]
    fn requests_beyond_the_rules() {
        let mut s = setup("400M,requested=20M");
        assert_eq!(s.plug(5, 2), ACK);
        // Blocks that are already plugged, not plugged, or only partly plugged.
        assert_eq!([s.plug(5, 1), s.plug(4, 2), s.plug(6, 3)], [ERROR; 3]);
        assert_eq!([s.unplug(4, 1), s.unplug(4, 2), s.unplug(6, 2)], [ERROR; 3]);
        for kind in [PLUG, UNPLUG, STATE] {
            for (addr, count) in [
                (START, 0),
                (START + 1, 1),
                (START + BLOCK / 2, 1),
                (START - BLOCK, 1),
                (START - BLOCK, u16::MAX),
                (START + 138 * BLOCK, 1),
                (START + 137 * BLOCK, 2),
                (START, u16::MAX),
                (START + SIZE * BLOCK, 1),
                (0, 1),
                (u64::MAX, 1),
                (u64::MAX - BLOCK + 1, u16::MAX),
            ] {
                assert_eq!(s.ask(kind, addr, count), (ERROR, 0), "{kind} {addr:#x} {count}");
            }
        }
        for kind in [4, 0x100, u16::MAX] {
            assert_eq!(s.ask(kind, START, 1), (ERROR, 0));
        }
        // More than the requested amount.
        assert_eq!([s.plug(10, 9), s.plug(10, 8), s.plug(20, 1)], [NACK, ACK, NACK]);
        assert_eq!(s.config(), [138, 10, 10]);
    }

    #[test]
    fn requests_of_any_shape() {
        let mut s = setup("400M,requested=20M");
        s.ram.write(B, &request(PLUG, START, 1)).unwrap();
        let cut = [out(B, 1), out(B + 1, 9), out(B + 10, 14), out(B + 24, 50), inn(B + 64, 9), inn(B + 73, 90)];
        assert_eq!(s.serve(&cut).unwrap(), 10);
        assert_eq!(s.config()[1], 1);
        assert_eq!(s.serve(&[out(B, 23), inn(B + 64, 10)]).unwrap(), 10);
        assert_eq!(s.ram.read_obj::<u8>(B + 64).unwrap(), Response::Error as u8);
        assert!(s.serve(&[out(B, 24), inn(B + 64, 9)]).is_err());
        assert!(s.serve(&[out(B, 24)]).is_err());
        // A response into the region itself, as if it were RAM.
        assert_eq!(s.serve(&[out(B, 24), inn(START + BLOCK, 10)]).unwrap(), 10);
    }

    #[test]
    fn what_was_written_to_blocks_that_are_not_plugged_is_gone() {
        let mut s = setup("400M,requested=20M");
        s.ram.write(START + 3 * BLOCK, b"sneaky").unwrap();
        assert_eq!(s.plug(3, 1), ACK);
        assert_eq!(s.ram.read_obj::<[u8; 6]>(START + 3 * BLOCK).unwrap(), [0; 6]);
        s.ram.write(START + 9 * BLOCK, b"sneaky").unwrap();
        assert_eq!(s.ask(UNPLUG_ALL, 0, 0).0, ACK);
        assert_eq!(s.ram.read_obj::<[u8; 6]>(START + 9 * BLOCK).unwrap(), [0; 6]);
    }

    #[test]
    fn resized_while_it_runs() {
        let mut s = setup("400M");
        assert_eq!((s.config(), s.plug(0, 1)), ([0, 0, 0], ERROR));
        assert_eq!(s.set(10), Ok(Reply::ConfigChanged));
        assert_eq!(s.set(10), Ok(Reply::Done));
        assert_eq!((s.plug(0, 10), s.plug(10, 1)), (ACK, NACK));
        assert_eq!(s.set(2), Ok(Reply::ConfigChanged));
        assert_eq!(s.config(), [138, 10, 2]);
        assert_eq!((s.plug(10, 1), s.unplug(2, 8)), (NACK, ACK));
        assert_eq!(s.set(SIZE), Ok(Reply::ConfigChanged));
        assert_eq!(s.config(), [SIZE, 2, SIZE]);
        assert_eq!(s.set(0), Ok(Reply::ConfigChanged));
        assert_eq!((s.config(), s.ask(UNPLUG_ALL, 0, 0).0, s.config()), ([SIZE, 2, 0], ACK, [0, 0, 0]));
        let refused = |reply: Result<Reply, ControlError>| reply.unwrap_err().to_string();
        assert_eq!(refused(s.set(SIZE + 1)), "402M of memory: there is only 400M to add");
        let odd = s.device.control(&Control::RequestMemory(BLOCK + 1));
        assert_eq!(refused(odd), "2097153 of memory: not a multiple of 2M, the size of a block");
        assert_eq!(refused(s.device.control(&Control::SetBalloon(0))), "device mem cannot do that");
    }

    #[test]
    fn a_reset_changes_no_block() {
        let s = setup("400M,requested=20M");
        let blocks = s.device.blocks.clone();
        let transport = MmioTransport::new(Box::new(s.device), s.ram.clone(), IrqLine::new(5).unwrap()).unwrap();
        let mut driver = FakeDriver::new(&transport, &s.ram);
        let word = |n: u32| u64::from(driver.get(0x100 + 4 * n));
        assert_eq!((word(0), word(2), word(4) | word(5) << 32), (BLOCK, 0, START));
        assert_eq!(driver.offered() & F_UNPLUGGED_INACCESSIBLE, F_UNPLUGGED_INACCESSIBLE);
        for (without, expected) in [(0, ACK), (F_UNPLUGGED_INACCESSIBLE, ERROR)] {
            driver.start(without, 0x1000, 8);
            let mut queue = driver.queues.remove(0);
            s.ram.write(B, &request(PLUG, START, 4)).unwrap();
            queue.add(&[out(B, 24), inn(B + 64, 10)]).unwrap();
            driver.set(virtio_bindings::virtio_mmio::VIRTIO_MMIO_QUEUE_NOTIFY, 0);
            assert_eq!(queue.wait_used().1, 10);
            assert_eq!(s.ram.load_u16(B + 64, std::sync::atomic::Ordering::SeqCst).unwrap(), expected);
            driver.set(virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS, 0);
            assert_eq!(lock(&blocks).count, 4);
        }
        // The driver is notified of a change once it is ready for that.
        driver.start(0, 0x1000, 8);
        assert_eq!(transport.control(&Control::RequestMemory(0)), Ok(Reply::Done));
        assert_eq!(driver.get(virtio_bindings::virtio_mmio::VIRTIO_MMIO_INTERRUPT_STATUS) & 2, 2);
    }

    #[test]
    fn saved_and_restored() {
        let mut s = setup("400M,requested=40M");
        assert_eq!([s.plug(0, 2), s.plug(63, 3), s.plug(100, 1)], [ACK; 3]);
        s.set(3).unwrap();
        let state = s.device.save().unwrap();
        assert_eq!(state["plugged"], serde_json::json!([[0, 2], [63, 3], [100, 1]]));
        let mut other = setup("400M");
        other.device.restore(&state).unwrap();
        assert_eq!((other.config(), other.device.save().unwrap()), (s.config(), state.clone()));
        assert_eq!([other.state(63, 3), other.state(62, 2)], [0, 2]);
        for (key, value) in [
            ("plugged", serde_json::json!([[0, 2], [1, 1]])),
            ("plugged", serde_json::json!([[5, 0]])),
            ("plugged", serde_json::json!([[147, 2]])),
            ("plugged", serde_json::json!([[1, u64::MAX]])),
            ("usable", (SIZE * BLOCK + BLOCK).into()),
            ("usable", (BLOCK + 1).into()),
            ("usable", BLOCK.into()),
            ("requested", (BLOCK + 1).into()),
            ("requested", u64::MAX.into()),
            ("size", (100 * BLOCK).into()),
            ("addr", 0.into()),
            ("block", 0.into()),
            ("more", 0.into()),
        ] {
            let mut bad = state.clone();
            bad[key] = value;
            assert!(other.device.restore(&bad).is_err(), "{bad}");
        }
        assert_eq!(other.device.save().unwrap(), state);
    }

    #[test]
    fn options() {
        let config: MemConfig = "2G,requested=512M,block=4M".parse().unwrap();
        assert_eq!((config.size, config.requested, config.block), (Size::mib(2048), Size::mib(512), Size::mib(4)));
        let error = |text: &str| text.parse::<MemConfig>().unwrap().validate().unwrap_err();
        assert_eq!(error("1G,block=1M"), "block=1M: must be a power of two from 2M to 1G");
        assert_eq!(error("1G,block=6M"), "block=6M: must be a power of two from 2M to 1G");
        assert_eq!(error("3M"), "3M: not a positive multiple of 2M, the size of a block");
        assert_eq!(error("0"), "0: not a positive multiple of 2M, the size of a block");
        assert_eq!(error("1G,requested=2G"), "requested=2G: there is only 1G to add");
        assert_eq!(error("1G,requested=1M"), "requested=1M: not a multiple of 2M, the size of a block");
        assert!("requested=1G".parse::<MemConfig>().unwrap_err().to_string().contains("'size=' is missing"));
    }

    fn block() -> impl Strategy<Value = (u64, u16)> {
        let addr = prop_oneof![30 => (0..SIZE).prop_map(|n| START + n * BLOCK), 1 => any::<u64>()];
        (addr, prop_oneof![30 => 1..20u16, 1 => any::<u16>()])
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]

        /// Checks that the device and a plain model of it agree, whatever is requested.
        #[test]
        fn as_a_set_of_blocks(asked in prop::collection::vec((0..5u16, block(), 0..SIZE), 1..60)) {
            let mut s = setup("400M,requested=100M");
            let mut model = std::collections::BTreeSet::new();
            let (mut requested, mut usable) = (50, 178);
            for (kind, (addr, count), size) in asked {
                if kind == 4 {
                    s.set(size).unwrap();
                    requested = size;
                    usable = if size == 0 { usable } else { usable.max((size + 128).min(SIZE)) };
                    continue;
                }
                let first = addr.wrapping_sub(START) / BLOCK;
                let range = first..first.saturating_add(count.into());
                let valid = addr >= START && addr % BLOCK == 0 && count > 0 && range.end <= usable;
                let inside = if valid { range.clone().filter(|n| model.contains(n)).count() as u64 } else { 0 };
                let expected = match kind {
                    UNPLUG_ALL => {
                        model.clear();
                        usable = if requested == 0 { 0 } else { (requested + 128).min(SIZE) };
                        ACK
                    }
                    _ if !valid => ERROR,
                    PLUG if inside > 0 => ERROR,
                    PLUG if model.len() as u64 + u64::from(count) > requested => NACK,
                    PLUG => { model.extend(range); ACK }
                    UNPLUG if inside < count.into() => ERROR,
                    UNPLUG => { model.retain(|n| !range.contains(n)); ACK }
                    _ => ACK,
                };
                prop_assert_eq!(s.ask(kind, addr, count).0, expected);
                prop_assert_eq!(s.config(), [usable, model.len() as u64, requested]);
            }
        }
    }
}
