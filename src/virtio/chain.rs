//! One request: a descriptor chain (2.7.5), walked once, bounded and checked, into two lists of segments. The device
//! reads the first through a [`Reader`] and writes the second through a [`Writer`]. The driver's division of the
//! buffers into segments makes no difference (2.7.4).

use std::ops::Range;

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::VolatileMemory;

use crate::memory::{GuestRam, OutOfRam, RamSlice};

const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
/// Size of a descriptor in bytes.
const DESC: u32 = 16;

/// Rule that a chain broke.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Chain longer than the queue (2.7.5.3.1); this check also ends loops.
    #[error("a descriptor chain is longer than the queue's {max} entries, or loops")]
    TooLong {
        /// Queue size.
        max: u32,
    },
    /// Chain of more than 2^32 bytes (2.7.5.2).
    #[error("a descriptor chain has more than 2^32 bytes")]
    TooManyBytes,
    /// `next` that is not an index into the same table (2.7.5).
    #[error("descriptor {next} does not exist in a table of {len}")]
    Next {
        /// Index that the driver wrote.
        next: u16,
        /// Number of descriptors in the table.
        len: u32,
    },
    /// Device-readable descriptor after a device-writable one (2.7.4.2).
    #[error("a device-readable descriptor follows a device-writable one")]
    ReadableAfterWritable,
    /// Buffer that is not in memory (2.7.5).
    #[error("a descriptor's buffer is outside of memory: {0}")]
    Buffer(OutOfRam),
    /// Indirect descriptor that was not negotiated (2.7.5.3.1).
    #[error("an indirect descriptor, although indirect descriptors were not negotiated")]
    IndirectNotNegotiated,
    /// Indirect descriptor within an indirect table (2.7.5.3.1).
    #[error("an indirect descriptor within an indirect table")]
    IndirectNested,
    /// Indirect descriptor with the next flag (2.7.5.3.1).
    #[error("an indirect descriptor that has a next one")]
    IndirectWithNext,
    /// Indirect table that is empty or not a whole number of descriptors (2.7.5.3).
    #[error("an indirect table of {len} bytes, which is not a positive multiple of 16")]
    IndirectLength {
        /// Length that the driver wrote.
        len: u32,
    },
    /// Indirect table that is not in memory.
    #[error("an indirect table is outside of memory: {0}")]
    IndirectTable(OutOfRam),
    /// Request with fewer bytes than the device needs.
    #[error("a request has {have} bytes where {need} are needed")]
    Short {
        /// Bytes available.
        have: u64,
        /// Bytes needed.
        need: u64,
    },
}

/// A piece of guest memory that was in RAM when the chain was walked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address.
    pub addr: u64,
    /// Length in bytes, never 0.
    pub len: u32,
}

/// Descriptor table in which a chain starts.
#[derive(Clone, Copy, Debug)]
pub struct Table {
    /// Guest-physical address of the descriptor table.
    pub addr: u64,
    /// Number of descriptors; also the maximum length of a chain.
    pub len: u32,
    /// Set if indirect descriptors were negotiated.
    pub indirect: bool,
}

/// Request of the driver. It is returned through [`super::queue::Queue::push_used`].
#[derive(Debug)]
pub struct Chain {
    head: u16,
    readable: usize,
    segments: Vec<Segment>,
}

impl Chain {
    /// Follows the chain from descriptor `head`. `segments` provides memory to reuse.
    pub fn walk(ram: &GuestRam, table: Table, head: u16, mut segments: Vec<Segment>) -> Result<Self, Error> {
        segments.clear();
        let mut walk = Walk { ram, segments, readable: 0, bytes: 0, left: table.len, max: table.len, known: 0..0 };
        if let Some(indirect) = walk.direct(table, head)? {
            walk.indirect(indirect)?;
        }
        let Walk { segments, readable, .. } = walk;
        Ok(Chain { head, readable, segments })
    }

    /// Returns the index of the first descriptor, by which the driver identifies the chain.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Returns the segments that the device may read.
    pub fn readable(&self) -> &[Segment] {
        self.segments.get(..self.readable).unwrap_or(&[])
    }

    /// Returns the segments that the device may write.
    pub fn writable(&self) -> &[Segment] {
        self.segments.get(self.readable..).unwrap_or(&[])
    }

    /// Returns a reader of the readable part, from its beginning.
    pub fn reader<'a>(&'a self, ram: &'a GuestRam) -> Reader<'a> {
        Reader(Span::new(ram, self.readable()))
    }

    /// Returns a writer of the writable part, from its beginning.
    pub fn writer<'a>(&'a self, ram: &'a GuestRam) -> Writer<'a> {
        Writer(Span::new(ram, self.writable()))
    }

    /// Returns the segment list, for [`Chain::walk`] to reuse.
    pub fn into_segments(self) -> Vec<Segment> {
        self.segments
    }
}

/// A descriptor (2.7.5).
#[derive(Clone, Copy)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    /// Reads the descriptor once: the guest may change it at any time.
    fn read(table: &RamSlice<'_>, index: u16) -> Option<Self> {
        let raw = table.get_ref::<u128>(usize::from(index) * DESC as usize).ok()?.load();
        let raw = u128::from_le(raw);
        Some(Descriptor {
            addr: raw as u64,
            len: (raw >> 64) as u32,
            flags: (raw >> 96) as u16,
            next: (raw >> 112) as u16,
        })
    }
}

struct Walk<'a> {
    ram: &'a GuestRam,
    segments: Vec<Segment>,
    readable: usize,
    bytes: u64,
    /// Number of further descriptors that the chain may have.
    left: u32,
    max: u32,
    /// Region of RAM of the last buffer, and most likely of the next.
    known: Range<u64>,
}

impl Walk<'_> {
    // Inlined, as is `take`: saves a fifth of the instructions of popping a request.
    #[inline(always)]
    fn check_ram(&mut self, addr: u64, len: u32) -> Result<(), OutOfRam> {
        let out_of_ram = OutOfRam { addr, len: len.into() };
        let end = addr.checked_add(len.into()).ok_or(out_of_ram)?;
        if !self.known.contains(&addr) {
            self.known = self.ram.regions().map(|r| r.start..r.end()).find(|r| r.contains(&addr)).ok_or(out_of_ram)?;
        }
        if end <= self.known.end { Ok(()) } else { Err(out_of_ram) }
    }

    /// Follows descriptors of the queue's own table; returns the indirect descriptor that ends the chain, if any.
    fn direct(&mut self, table: Table, head: u16) -> Result<Option<Descriptor>, Error> {
        let view = self.ram.slice(table.addr, u64::from(table.len) * u64::from(DESC)).map_err(Error::Buffer)?;
        let mut next = head;
        loop {
            let desc = Descriptor::read(&view, next).ok_or(Error::Next { next, len: table.len })?;
            if desc.flags & INDIRECT != 0 {
                if !table.indirect {
                    return Err(Error::IndirectNotNegotiated);
                }
                return Ok(Some(desc));
            }
            self.take(desc)?;
            if desc.flags & NEXT == 0 {
                return Ok(None);
            }
            next = desc.next;
        }
    }

    /// Follows an indirect table. The write flag of the descriptor that refers to it is ignored (2.7.5.3.2).
    fn indirect(&mut self, table: Descriptor) -> Result<(), Error> {
        if table.flags & NEXT != 0 {
            return Err(Error::IndirectWithNext);
        }
        if table.len == 0 || !table.len.is_multiple_of(DESC) {
            return Err(Error::IndirectLength { len: table.len });
        }
        let view = self.ram.slice(table.addr, table.len.into()).map_err(Error::IndirectTable)?;
        let mut next = 0;
        loop {
            let desc = Descriptor::read(&view, next).ok_or(Error::Next { next, len: table.len / DESC })?;
            if desc.flags & INDIRECT != 0 {
                return Err(Error::IndirectNested);
            }
            self.take(desc)?;
            if desc.flags & NEXT == 0 {
                return Ok(());
            }
            next = desc.next;
        }
    }

    #[inline(always)]
    fn take(&mut self, desc: Descriptor) -> Result<(), Error> {
        self.left = self.left.checked_sub(1).ok_or(Error::TooLong { max: self.max })?;
        let writable = desc.flags & WRITE != 0;
        if !writable && self.segments.len() > self.readable {
            return Err(Error::ReadableAfterWritable);
        }
        // The address of an empty buffer does not matter.
        if desc.len == 0 {
            return Ok(());
        }
        self.check_ram(desc.addr, desc.len).map_err(Error::Buffer)?;
        // At most 32768 descriptors of less than 2^32 bytes each: no overflow.
        self.bytes += u64::from(desc.len);
        if self.bytes > 1 << 32 {
            return Err(Error::TooManyBytes);
        }
        self.segments.push(Segment { addr: desc.addr, len: desc.len });
        if !writable {
            self.readable = self.segments.len();
        }
        Ok(())
    }
}

/// Consecutive bytes of a list of segments.
#[derive(Clone, Copy)]
struct Span<'a> {
    ram: &'a GuestRam,
    segments: &'a [Segment],
    /// Bytes of the first segment that lie before the span.
    skip: u32,
    /// Length of the span in bytes.
    len: u64,
}

impl<'a> Span<'a> {
    fn new(ram: &'a GuestRam, segments: &'a [Segment]) -> Self {
        Span { ram, segments, skip: 0, len: segments.iter().map(|s| u64::from(s.len)).sum() }
    }

    /// Splits off the first `len` bytes.
    fn take(&mut self, len: u64) -> Result<Span<'a>, Error> {
        let rest = self.len.checked_sub(len).ok_or(Error::Short { have: self.len, need: len })?;
        let front = Span { len, ..*self };
        let mut left = len;
        while let [first, others @ ..] = self.segments {
            let here = u64::from(first.len - self.skip);
            if left < here {
                self.skip += left as u32;
                break;
            }
            left -= here;
            self.segments = others;
            self.skip = 0;
        }
        self.len = rest;
        Ok(front)
    }

    /// Returns the pieces of memory that the span consists of.
    fn slices(self) -> impl Iterator<Item = Result<RamSlice<'a>, OutOfRam>> {
        let Span { ram, segments, mut skip, len: mut left } = self;
        segments.iter().map_while(move |s| {
            let len = u64::from(s.len - skip).min(left);
            let addr = s.addr + u64::from(skip);
            (skip, left) = (0, left - len);
            (len > 0).then(|| ram.slice(addr, len))
        })
    }

    /// Collects all pieces, with a single allocation.
    fn buffers(self) -> Result<Vec<RamSlice<'a>>, OutOfRam> {
        let mut buffers = Vec::with_capacity(self.segments.len());
        for slice in self.slices() {
            buffers.push(slice?);
        }
        Ok(buffers)
    }
}

/// Reads the device-readable bytes of a chain from front to back.
#[derive(Clone, Copy)]
pub struct Reader<'a>(Span<'a>);

impl<'a> Reader<'a> {
    /// Returns the number of bytes left.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u64 {
        self.0.len
    }

    /// Fills `data`, or reads nothing if too few bytes are left.
    pub fn read(&mut self, data: &mut [u8]) -> Result<(), Error> {
        let mut at = 0;
        for slice in self.0.take(data.len() as u64)?.slices() {
            let slice = slice.map_err(Error::Buffer)?;
            if let Some(to) = data.get_mut(at..) {
                at += slice.copy_to(to);
            }
        }
        Ok(())
    }

    /// Splits off the next `len` bytes as a separate reader.
    pub fn take(&mut self, len: u64) -> Result<Reader<'a>, Error> {
        self.0.take(len).map(Reader)
    }

    /// Returns the memory itself, piece by piece, for system calls.
    pub fn slices(self) -> impl Iterator<Item = Result<RamSlice<'a>, OutOfRam>> {
        self.0.slices()
    }

    /// Collects all pieces of the memory, for system calls.
    pub fn buffers(self) -> Result<Vec<RamSlice<'a>>, OutOfRam> {
        self.0.buffers()
    }
}

/// Writes the device-writable bytes of a chain from front to back.
#[derive(Clone, Copy)]
pub struct Writer<'a>(Span<'a>);

impl<'a> Writer<'a> {
    /// Returns the number of bytes left.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u64 {
        self.0.len
    }

    /// Writes all of `data`, or nothing if there is not enough room.
    pub fn write(&mut self, data: &[u8]) -> Result<(), Error> {
        let mut data = data;
        for slice in self.0.take(data.len() as u64)?.slices() {
            let slice = slice.map_err(Error::Buffer)?;
            let (now, later) = data.split_at(slice.len().min(data.len()));
            slice.copy_from(now);
            data = later;
        }
        Ok(())
    }

    /// Splits off the next `len` bytes as a separate writer.
    pub fn take(&mut self, len: u64) -> Result<Writer<'a>, Error> {
        self.0.take(len).map(Writer)
    }

    /// Returns the memory itself, piece by piece, for system calls.
    pub fn slices(self) -> impl Iterator<Item = Result<RamSlice<'a>, OutOfRam>> {
        self.0.slices()
    }

    /// Collects all pieces of the memory, for system calls.
    pub fn buffers(self) -> Result<Vec<RamSlice<'a>>, OutOfRam> {
        self.0.buffers()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::queue::{self, Queue};
    use crate::virtio::testing::{self, Buf, FakeQueue, INDIRECT as I, NEXT as N, inn, out};

    const RAM: u64 = 1 << 20;
    const B: u64 = 0x8_0000;
    const TABLE: u64 = 0x4_0000;
    const RING_INDIRECT: u64 = crate::virtio::RING_FEATURES;

    struct Setup {
        ram: GuestRam,
        driver: FakeQueue,
        queue: Queue,
    }

    impl Setup {
        fn new(features: u64) -> Self {
            let ram = GuestRam::anonymous(RAM);
            let driver = FakeQueue::new(&ram, 0x1000, 8);
            let queue = driver.device(features);
            Setup { ram, driver, queue }
        }

        /// Writes the given descriptors; the chain starts at descriptor 0.
        fn raw(&mut self, table: u64, descs: &[(Buf, u16, u16)]) -> &mut Self {
            for (i, &(buf, flags, next)) in (0u16..).zip(descs) {
                self.driver.write_desc(table, i, buf, flags, next);
            }
            self
        }

        fn pop(&mut self) -> Result<Chain, Error> {
            self.driver.publish(0);
            match self.queue.pop(&self.ram) {
                Ok(chain) => Ok(chain.unwrap()),
                Err(queue::Error::Chain(e)) => Err(e),
                Err(e) => panic!("{e}"),
            }
        }
    }

    fn direct(descs: &[(Buf, u16, u16)]) -> Result<Chain, Error> {
        let mut setup = Setup::new(RING_INDIRECT);
        let base = setup.driver.desc;
        setup.raw(base, descs).pop()
    }

    fn indirect(len: u32, flags: u16, descs: &[(Buf, u16, u16)]) -> Result<Chain, Error> {
        let mut setup = Setup::new(RING_INDIRECT);
        let base = setup.driver.desc;
        setup.raw(TABLE, descs).raw(base, &[(out(TABLE, len), flags | I, 1)]).pop()
    }

    #[test]
    fn direct_and_indirect_give_the_same() {
        let bufs = [out(B, 16), out(B + 100, 3), inn(B + 200, 512), inn(B + 1000, 1)];
        let mut setup = Setup::new(RING_INDIRECT);
        setup.driver.add(&bufs).unwrap();
        setup.driver.add_indirect(TABLE, &bufs).unwrap();
        for _ in 0..2 {
            let chain = setup.queue.pop(&setup.ram).unwrap().unwrap();
            let segments = |s: &[Segment]| s.iter().map(|s| (s.addr, s.len)).collect::<Vec<_>>();
            assert_eq!(segments(chain.readable()), [(B, 16), (B + 100, 3)]);
            assert_eq!(segments(chain.writable()), [(B + 200, 512), (B + 1000, 1)]);
        }
    }

    #[test]
    fn indirect_may_follow_direct_and_its_write_flag_means_nothing() {
        let mut setup = Setup::new(RING_INDIRECT);
        let base = setup.driver.desc;
        setup.raw(TABLE, &[(out(B, 2), N, 2), (inn(0, 0), 0, 0), (inn(B, 3), 0, 0)]);
        setup.raw(base, &[(out(B, 1), N, 5)]);
        setup.driver.write_desc(base, 5, inn(TABLE, 48), I, 0);
        let chain = setup.pop().unwrap();
        assert_eq!((chain.readable().len(), chain.writable().len()), (2, 1));
    }

    #[test]
    fn loops_end() {
        assert_eq!(direct(&[(out(B, 1), N, 0)]).unwrap_err(), Error::TooLong { max: 8 });
        assert_eq!(direct(&[(inn(B, 1), N, 1), (inn(B, 0), N, 0)]).unwrap_err(), Error::TooLong { max: 8 });
        assert_eq!(indirect(16, 0, &[(out(B, 0), N, 0)]).unwrap_err(), Error::TooLong { max: 8 });
    }

    #[test]
    fn chains_are_no_longer_than_the_queue() {
        let descs: Vec<_> = (1..=9).map(|i| (out(B, 1), if i < 9 { N } else { 0 }, i)).collect();
        assert_eq!(indirect(16 * 9, 0, &descs).unwrap_err(), Error::TooLong { max: 8 });
        let descs: Vec<_> = (1..=8).map(|i| (out(B, 1), if i < 8 { N } else { 0 }, i)).collect();
        assert_eq!(indirect(16 * 8, 0, &descs).unwrap().readable().len(), 8);
    }

    #[test]
    fn next_is_in_the_table() {
        for next in [8, 9, u16::MAX] {
            assert_eq!(direct(&[(out(B, 1), N, next)]).unwrap_err(), Error::Next { next, len: 8 });
        }
        assert_eq!(indirect(16, 0, &[(out(B, 1), N, 1)]).unwrap_err(), Error::Next { next: 1, len: 1 });
    }

    #[test]
    fn readable_comes_before_writable() {
        let descs = [(inn(B, 1), N, 1), (out(B, 1), 0, 0)];
        assert_eq!(direct(&descs).unwrap_err(), Error::ReadableAfterWritable);
        assert_eq!(indirect(32, 0, &descs).unwrap_err(), Error::ReadableAfterWritable);
    }

    #[test]
    fn buffers_are_in_ram() {
        for (addr, len) in [(RAM, 1), (RAM - 1, 2), (u64::MAX, 1), (u64::MAX, u32::MAX), (0, u32::MAX), (B, 1 << 31)] {
            for buf in [out(addr, len), inn(addr, len)] {
                let error = direct(&[(buf, 0, 0)]).unwrap_err();
                assert_eq!(error, Error::Buffer(OutOfRam { addr, len: len.into() }));
                assert_eq!(indirect(16, 0, &[(buf, 0, 0)]).unwrap_err(), error);
            }
        }
    }

    #[test]
    fn empty_buffers_do_not_matter() {
        let chain = direct(&[(out(u64::MAX, 0), N, 1), (out(B, 1), N, 2), (inn(0, 0), 0, 0)]).unwrap();
        assert_eq!((chain.readable(), chain.writable().len()), (&[Segment { addr: B, len: 1 }][..], 0));
        let nothing = direct(&[(inn(B, 0), 0, 0)]).unwrap();
        let ram = GuestRam::anonymous(RAM);
        assert_eq!((nothing.reader(&ram).len(), nothing.writer(&ram).len()), (0, 0));
        assert!(nothing.writer(&ram).write(&[1]).is_err());
        assert!(nothing.writer(&ram).write(&[]).is_ok());
    }

    #[test]
    fn indirect_rules() {
        let one = [(out(B, 1), 0, 0)];
        assert_eq!(indirect(16, N, &one).unwrap_err(), Error::IndirectWithNext);
        assert_eq!(indirect(16, 0, &[(out(TABLE, 16), I, 0)]).unwrap_err(), Error::IndirectNested);
        for len in [0, 1, 15, 17, 31, u32::MAX] {
            assert_eq!(indirect(len, 0, &one).unwrap_err(), Error::IndirectLength { len });
        }
        for (addr, len) in [(RAM - 16, 32), (RAM, 16), (u64::MAX - 15, 16), (0, 0xFFFF_FFF0)] {
            let error = direct(&[(out(addr, len), I, 0)]).unwrap_err();
            assert_eq!(error, Error::IndirectTable(OutOfRam { addr, len: len.into() }));
        }
        let mut setup = Setup::new(testing::EVENT_IDX);
        let base = setup.driver.desc;
        let error = setup.raw(base, &[(out(TABLE, 16), I, 0)]).pop().unwrap_err();
        assert_eq!(error, Error::IndirectNotNegotiated);
    }

    #[test]
    fn bytes_are_bounded() {
        // The same 3 GiB twice: possible only because chains may name memory more than once.
        let ram = GuestRam::anonymous(3 << 30);
        let driver = FakeQueue::new(&ram, 0x1000, 4);
        driver.write_desc(driver.desc, 0, out(0, 3 << 30), N, 1);
        driver.write_desc(driver.desc, 1, out(0, 3 << 30), 0, 0);
        let table = Table { addr: driver.desc, len: 4, indirect: false };
        assert_eq!(Chain::walk(&ram, table, 0, vec![]).unwrap_err(), Error::TooManyBytes);
    }

    #[test]
    fn all_ones_is_an_error() {
        let mut setup = Setup::new(RING_INDIRECT);
        setup.ram.write(setup.driver.desc, &[0xFF; 16 * 8]).unwrap();
        assert_eq!(setup.pop().unwrap_err(), Error::IndirectWithNext);
    }

    #[test]
    fn reading_and_writing_cross_segments() {
        let ram = GuestRam::anonymous(RAM);
        ram.write(B, b"abcdefghij").unwrap();
        let cut = [out(B, 1), out(B + 1, 4), out(B + 5, 5), inn(B + 100, 2), inn(B + 200, 1), inn(B + 300, 4)];
        let mut driver = FakeQueue::new(&ram, 0x1000, 8);
        driver.add(&cut).unwrap();
        let chain = driver.device(0).pop(&ram).unwrap().unwrap();
        let mut reader = chain.reader(&ram);
        let mut three = [0; 3];
        reader.read(&mut three).unwrap();
        assert_eq!((&three, reader.len()), (b"abc", 7));
        let mut front = reader.take(3).unwrap();
        let mut rest = [0; 4];
        reader.read(&mut rest).unwrap();
        assert_eq!(&rest, b"ghij");
        front.read(&mut three).unwrap();
        assert_eq!(&three, b"def");
        assert_eq!(front.read(&mut three), Err(Error::Short { have: 0, need: 3 }));
        assert_eq!(reader.take(1).err(), Some(Error::Short { have: 0, need: 1 }));

        let mut writer = chain.writer(&ram);
        let front = writer.take(6).unwrap();
        assert_eq!(front.slices().map(|s| s.unwrap().len()).collect::<Vec<_>>(), [2, 1, 3]);
        assert!(writer.write(b"xy").is_err());
        writer.write(b"z").unwrap();
        let mut front = front;
        front.write(b"123456").unwrap();
        let read = |at| ram.read_obj::<[u8; 4]>(at).unwrap();
        assert_eq!((read(B + 100), read(B + 200), read(B + 300)), (*b"12\0\0", *b"3\0\0\0", *b"456z"));
    }
}
