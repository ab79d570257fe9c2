//! A guest made of bytes: code that the fuzz targets of all devices share.
//!
//! The bytes decide what a driver does: mostly what drivers do, with requests that are almost right, and now and then
//! anything at all. The device runs on the fuzzer's own thread, with the fake driver of the unit tests. Whatever
//! happens, it must neither panic nor hang nor grow, and a device that was stopped must have given everything back.

use arbitrary::{Result, Unstructured};
use vireo::memory::GuestRam;
use vireo::virtio::testing::{Buf, FakeQueue, INDIRECT, Loopback, NEXT, VERSION_1, inn, out};
use vireo::virtio::{Activated, Activation, Event, Share, VirtioDevice};

/// Bytes of memory that a guest uses.
pub const RAM: u64 = 1 << 20;
const RINGS: u64 = 0x1000;
/// Address of the indirect tables.
pub const TABLES: u64 = 0x1_0000;
const TABLES_END: u64 = 0x1_4000;
const BUFFERS: u64 = 0x2_0000;
const SIZE: u16 = 32;
/// Maximum number of times that a device is started.
const LIVES: usize = 4;
/// Maximum number of steps of a driver in one life.
const STEPS: usize = 200;

/// A request that makes sense to a device, as a starting point.
pub struct Request<'a> {
    /// Index of the queue that takes it.
    pub queue: usize,
    /// Bytes that the device reads.
    pub readable: &'a [u8],
    /// Lengths of the buffers that the device writes.
    pub writable: &'a [u32],
}

/// Makes writes to closed sockets return errors, as in any Rust program but a fuzzer.
pub fn ignore_broken_pipes() {
    // SAFETY: the call takes no pointers.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}

/// Lets a device live through what `data` says. `host` is called with bytes that decide what happens on the other side.
pub fn drive(device: &mut dyn VirtioDevice, requests: &[Request<'_>], data: &[u8], host: &mut dyn FnMut(&[u8])) {
    drive_in(&GuestRam::anonymous(RAM), device, requests, data, host);
}

/// Does what [`drive`] does in memory that may have more than [`RAM`], within which the guest itself stays.
pub fn drive_in(
    ram: &GuestRam,
    device: &mut dyn VirtioDevice,
    requests: &[Request<'_>],
    data: &[u8],
    host: &mut dyn FnMut(&[u8]),
) {
    let mut bytes = Unstructured::new(data);
    for _ in 0..LIVES {
        if bytes.is_empty() || Guest::start(ram, device, requests, &mut bytes).is_none_or(|mut guest| guest.live(host))
        {
            return;
        }
        device.reset();
    }
}

struct Guest<'a, 'b> {
    device: &'a mut dyn VirtioDevice,
    requests: &'a [Request<'a>],
    bytes: &'a mut Unstructured<'b>,
    ram: GuestRam,
    /// Wires, one for each share, as each has a worker of its own.
    wires: Vec<Loopback>,
    queues: Vec<FakeQueue>,
    shares: Vec<Share>,
    broken: bool,
}

impl<'a, 'b> Guest<'a, 'b> {
    fn start(
        ram: &GuestRam,
        device: &'a mut dyn VirtioDevice,
        requests: &'a [Request<'a>],
        bytes: &'a mut Unstructured<'b>,
    ) -> Option<Self> {
        let ram = ram.clone();
        let info = device.info().clone();
        // All features, or all but some.
        let without = if bytes.ratio(1, 4).ok()? { bytes.arbitrary::<u64>().ok()? } else { 0 };
        let features = (info.features & !without) | VERSION_1;
        let mut base = RINGS;
        let mut queues = Vec::new();
        let mut served = Vec::new();
        for (index, max) in (0u16..).zip(&info.queue_sizes) {
            let queue = FakeQueue::new(&ram, base, SIZE.min(*max));
            base = (base + FakeQueue::footprint(queue.size)).next_multiple_of(16);
            served.push(queue.numbered(index, features));
            queues.push(queue);
        }
        assert!(base <= TABLES, "the rings need more room");
        let activation = Activation {
            ram: ram.clone(),
            features,
            queues: served,
            kicks: vec![].into(),
            interrupt: Loopback::new(&ram).interrupt,
        };
        let Ok(Activated::Here(shares)) = device.activate(activation) else { return None };
        let wires = shares.iter().map(|_| Loopback::new(&ram)).collect();
        Some(Guest { device, requests, bytes, ram, wires, queues, shares, broken: false })
    }

    /// Returns whether this was the last life.
    fn live(&mut self, host: &mut dyn FnMut(&[u8])) -> bool {
        for share in 0..self.shares.len() {
            self.event(share, Event::Start);
        }
        let mut last = true;
        for _ in 0..STEPS {
            match self.step(host) {
                Ok(true) => {}
                Ok(false) => {
                    last = false;
                    break;
                }
                Err(_) => break, // no bytes are left
            }
        }
        self.stop();
        last
    }

    /// Performs one step of a driver; `false` if it resets the device.
    fn step(&mut self, host: &mut dyn FnMut(&[u8])) -> Result<bool> {
        match self.bytes.int_in_range(0..=15u8)? {
            0..=5 => {
                let queue = self.request()?;
                self.kick(queue);
            }
            6 => _ = self.request()?, // and no kick
            7 => {
                let queue = self.bytes.choose_index(self.queues.len())?;
                self.kick(queue);
            }
            8 => self.ready(),
            9 => {
                let len = self.bytes.int_in_range(0..=64)?;
                host(self.bytes.bytes(usize::min(len, self.bytes.len()))?);
                self.ready();
            }
            10 => self.queues.iter_mut().for_each(FakeQueue::recycle),
            11 => {
                let (offset, len) = (self.offset()?, self.bytes.int_in_range(0..=8)?);
                self.device.read_config(offset, &mut vec![0; len]);
            }
            12 => {
                let (offset, len) = (self.offset()?, self.bytes.int_in_range(0..=8)?);
                let data = self.bytes.bytes(usize::min(len, self.bytes.len()))?;
                self.device.write_config(offset, data);
            }
            13 => self.flip()?,
            14 => self.nonsense()?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn offset(&mut self) -> Result<u64> {
        if self.bytes.ratio(1, 16)? { self.bytes.arbitrary() } else { self.bytes.int_in_range(0..=128) }
    }

    /// Adds a request that is almost right; returns its queue.
    fn request(&mut self) -> Result<usize> {
        let request = self.bytes.choose(self.requests)?;
        let mut readable = request.readable.to_vec();
        for _ in 0..self.bytes.int_in_range(0..=4u8)? {
            if let Some(at) = readable.len().checked_sub(1) {
                let at = self.bytes.int_in_range(0..=at)?;
                readable[at] = self.bytes.arbitrary()?;
            }
        }
        let more = self.bytes.int_in_range(0..=48)?;
        readable.extend_from_slice(self.bytes.bytes(usize::min(more, self.bytes.len()))?);
        let mut writable = request.writable.to_vec();
        if self.bytes.ratio(1, 8)? {
            writable.push(self.bytes.int_in_range(0..=9000)?);
        }
        // The request is anywhere in the buffers, and is cut anywhere.
        let base = BUFFERS + 0x100 * self.bytes.int_in_range(0..=0x400u64)?;
        let _ = self.ram.write(base, &readable);
        let cut = self.bytes.int_in_range(0..=readable.len())?;
        let mut bufs: Vec<Buf> = [(0, cut), (cut, readable.len() - cut)]
            .into_iter()
            .filter(|(_, len)| *len > 0)
            .map(|(at, len)| out(base + at as u64, len as u32))
            .collect();
        let mut at = base + 0x4000;
        for len in writable {
            bufs.push(inn(at, len));
            at += u64::from(len);
        }
        let queue = request.queue.min(self.queues.len() - 1);
        let table = self.bytes.int_in_range(0..=31u64)?;
        match self.bytes.ratio(1, 4)? {
            true => self.queues[queue].add_indirect(TABLES + 0x200 * table, &bufs),
            false => self.queues[queue].add(&bufs),
        };
        Ok(queue)
    }

    /// Changes a bit of a ring, a table or a buffer.
    fn flip(&mut self) -> Result<()> {
        let at = match self.bytes.int_in_range(0..=2u8)? {
            0 => self.bytes.int_in_range(RINGS..=RINGS + 0x2000)?,
            1 => self.bytes.int_in_range(TABLES..=TABLES_END)?,
            _ => self.bytes.int_in_range(BUFFERS..=RAM - 1)?,
        };
        let bit = self.bytes.int_in_range(0..=7)?;
        let byte: u8 = self.ram.read_obj(at).unwrap();
        self.ram.write_obj(at, byte ^ 1 << bit).unwrap();
        Ok(())
    }

    /// Writes anything to a descriptor, a head or an index.
    fn nonsense(&mut self) -> Result<()> {
        let queue = self.bytes.choose_index(self.queues.len())?;
        let queue = &mut self.queues[queue];
        match self.bytes.int_in_range(0..=2u8)? {
            0 => queue.publish(self.bytes.arbitrary()?),
            1 => queue.set_avail_idx(self.bytes.arbitrary()?),
            _ => {
                let buf = Buf {
                    addr: self.bytes.int_in_range(0..=RAM + 0x1000)?,
                    len: self.bytes.arbitrary()?,
                    write: self.bytes.arbitrary()?,
                };
                let index = self.bytes.int_in_range(0..=queue.size - 1)?;
                let flags = self.bytes.arbitrary::<u16>()? & (NEXT | INDIRECT);
                queue.write_desc(queue.desc, index, buf, flags, self.bytes.arbitrary()?);
                queue.publish(index);
            }
        }
        Ok(())
    }

    fn kick(&mut self, queue: usize) {
        let find = |share: &Share| share.queues.iter().position(|q| usize::from(q.index()) == queue);
        let found = self.shares.iter().enumerate().find_map(|(i, share)| Some((i, find(share)?)));
        if let Some((share, queue)) = found {
            self.event(share, Event::Kick(queue));
        }
    }

    /// Handles the events of watched descriptors, without waiting.
    fn ready(&mut self) {
        for (Share { handler, queues }, wire) in self.shares.iter_mut().zip(&mut self.wires) {
            if !self.broken {
                self.broken = wire.deliver_ready(&mut **handler, queues, Default::default()).is_err();
            }
        }
    }

    fn event(&mut self, share: usize, event: Event) {
        let Share { handler, queues } = &mut self.shares[share];
        if !self.broken {
            self.broken = self.wires[share].deliver(&mut **handler, queues, event).is_err();
        }
    }

    /// Makes the device give its queues back, with nothing in flight unless a rule was broken.
    fn stop(&mut self) {
        for (Share { handler, queues }, wire) in self.shares.iter_mut().zip(&self.wires) {
            let drained = wire.drain(&mut **handler, queues);
            assert!(self.broken || drained.is_err() || queues.iter().all(|q| q.in_flight() == 0));
        }
        self.shares.clear();
        let state = self.device.save().expect("a stopped device can be saved");
        self.device.restore(&state).expect("the device can be restored");
    }
}

/// Changes something in a document: mostly a leaf, now and then a list or an object.
pub fn mutate(value: &mut serde_json::Value, bytes: &mut Unstructured<'_>) -> Result<()> {
    use serde_json::Value;
    if !bytes.ratio(1, 16)? {
        match value {
            Value::Object(map) if !map.is_empty() => {
                let n = bytes.choose_index(map.len())?;
                return map.values_mut().nth(n).map_or(Ok(()), |value| mutate(value, bytes));
            }
            Value::Array(list) if !list.is_empty() => {
                let n = bytes.choose_index(list.len())?;
                return mutate(&mut list[n], bytes);
            }
            _ => {}
        }
    }
    let more: bool = bytes.arbitrary()?;
    match value {
        Value::Array(list) if bytes.arbitrary()? => match (list.last().cloned(), more) {
            (Some(last), true) => list.push(last),
            _ => _ = list.pop(),
        },
        _ => *value = leaf(value, bytes)?,
    }
    Ok(())
}

/// Returns another value for the place of this one, mostly of its type.
fn leaf(value: &serde_json::Value, bytes: &mut Unstructured<'_>) -> Result<serde_json::Value> {
    use serde_json::{Value, json};
    let number = value.as_u64().unwrap_or(0);
    Ok(match bytes.int_in_range(0..=9u8)? {
        0 => json!(number.wrapping_add(1)),
        1 => json!(number.wrapping_sub(1)),
        2 => json!(number ^ 1 << bytes.int_in_range(0..=63)?),
        3 => json!(bytes.arbitrary::<u64>()?),
        4 => json!(bytes.arbitrary::<u16>()?),
        5 => json!(u64::MAX),
        6 => json!(bytes.arbitrary::<bool>()?),
        7 => json!(bytes.arbitrary::<&str>()?),
        8 => json!([bytes.arbitrary::<u8>()?, bytes.arbitrary::<u32>()?]),
        _ => Value::Null,
    })
}
