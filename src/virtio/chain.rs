//! One request: a chain of descriptors (2.7.5), walked once, bounded and checked, into two lists of segments. The
//! device reads the first through a [`Reader`] and writes the second through a [`Writer`]; how the driver cut the
//! buffers into segments makes no difference (2.7.4).

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::Bytes;

use crate::memory::{GuestRam, OutOfRam, RamSlice};

const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
/// Size of a descriptor in bytes.
const DESC: u32 = 16;

/// The rule that a chain broke.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// 2.7.5.3.1: not longer than the queue; this is also how loops end.
    #[error("a descriptor chain is longer than the queue's {max} entries, or loops")]
    TooLong {
        /// The queue's size.
        max: u32,
    },
    /// 2.7.5.2: not more than 2^32 bytes.
    #[error("a descriptor chain has more than 2^32 bytes")]
    TooManyBytes,
    /// 2.7.5: `next` is an index into the same table.
    #[error("descriptor {next} does not exist in a table of {len}")]
    Next {
        /// What the driver wrote.
        next: u16,
        /// Descriptors there are.
        len: u32,
    },
    /// 2.7.4.2: device-writable ones come last.
    #[error("a device-readable descriptor follows a device-writable one")]
    ReadableAfterWritable,
    /// 2.7.5: buffers are in memory.
    #[error("a descriptor's buffer is outside of memory: {0}")]
    Buffer(OutOfRam),
    /// 2.7.5.3.1: only when negotiated.
    #[error("an indirect descriptor, which was not negotiated")]
    IndirectNotNegotiated,
    /// 2.7.5.3.1: one level only.
    #[error("an indirect descriptor within an indirect table")]
    IndirectNested,
    /// 2.7.5.3.1: not both flags.
    #[error("an indirect descriptor that has a next one")]
    IndirectWithNext,
    /// 2.7.5.3: whole descriptors, at least one.
    #[error("an indirect table of {len} bytes, which is no positive multiple of 16")]
    IndirectLength {
        /// What the driver wrote.
        len: u32,
    },
    /// The table itself is in memory.
    #[error("an indirect table is outside of memory: {0}")]
    IndirectTable(OutOfRam),
    /// The device needs more than the driver gave.
    #[error("a request has {have} bytes where {need} are needed")]
    Short {
        /// Bytes there are.
        have: u64,
        /// Bytes wanted.
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

/// Where a chain starts.
#[derive(Clone, Copy, Debug)]
pub struct Table {
    /// Guest-physical address of the descriptor table.
    pub addr: u64,
    /// How many descriptors it has; also the bound on the length of a chain.
    pub len: u32,
    /// Whether indirect descriptors were negotiated.
    pub indirect: bool,
}

/// A request of the driver. It goes back through [`super::queue::Queue::push_used`].
#[derive(Debug)]
pub struct Chain {
    head: u16,
    readable: usize,
    segments: Vec<Segment>,
}

impl Chain {
    /// Follows the chain from descriptor `head`. `segments` is memory to reuse.
    pub fn walk(ram: &GuestRam, table: Table, head: u16, mut segments: Vec<Segment>) -> Result<Self, Error> {
        segments.clear();
        let mut walk = Walk { ram, segments, readable: 0, bytes: 0, left: table.len, max: table.len };
        if let Some(indirect) = walk.direct(table, head)? {
            walk.indirect(indirect)?;
        }
        let Walk { segments, readable, .. } = walk;
        Ok(Chain { head, readable, segments })
    }

    /// Index of the first descriptor, by which the driver knows it.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What the device may read.
    pub fn readable(&self) -> &[Segment] {
        self.segments.get(..self.readable).unwrap_or(&[])
    }

    /// What the device may write.
    pub fn writable(&self) -> &[Segment] {
        self.segments.get(self.readable..).unwrap_or(&[])
    }

    /// Reads from the readable part's beginning.
    pub fn reader<'a>(&'a self, ram: &'a GuestRam) -> Reader<'a> {
        Reader(Span::new(ram, self.readable()))
    }

    /// Writes from the writable part's beginning.
    pub fn writer<'a>(&'a self, ram: &'a GuestRam) -> Writer<'a> {
        Writer(Span::new(ram, self.writable()))
    }

    pub(super) fn into_segments(self) -> Vec<Segment> {
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
    fn read(table: &RamSlice<'_>, index: u16) -> Option<Self> {
        let [addr, rest]: [u64; 2] = table.read_obj(usize::from(index) * DESC as usize).ok()?;
        let rest = u64::from_le(rest);
        Some(Descriptor {
            addr: u64::from_le(addr),
            len: rest as u32,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        })
    }
}

struct Walk<'a> {
    ram: &'a GuestRam,
    segments: Vec<Segment>,
    readable: usize,
    bytes: u64,
    /// How many more descriptors the chain may have.
    left: u32,
    max: u32,
}

impl Walk<'_> {
    /// Follows descriptors of the queue's own table; returns the indirect one that ends it, if any.
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

    /// Follows an indirect table. The write flag of the descriptor that refers to it means nothing (2.7.5.3.2).
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

    fn take(&mut self, desc: Descriptor) -> Result<(), Error> {
        self.left = self.left.checked_sub(1).ok_or(Error::TooLong { max: self.max })?;
        let writable = desc.flags & WRITE != 0;
        if !writable && self.segments.len() > self.readable {
            return Err(Error::ReadableAfterWritable);
        }
        // A buffer of no bytes has no address worth checking.
        if desc.len == 0 {
            return Ok(());
        }
        self.ram.slice(desc.addr, desc.len.into()).map_err(Error::Buffer)?;
        // At most 32768 descriptors of less than 2^32 bytes: no overflow.
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

/// Some consecutive bytes of a list of segments.
#[derive(Clone, Copy)]
struct Span<'a> {
    ram: &'a GuestRam,
    segments: &'a [Segment],
    /// Bytes of the first segment that lie before the span.
    skip: u32,
    /// Bytes of the span.
    len: u64,
}

impl<'a> Span<'a> {
    fn new(ram: &'a GuestRam, segments: &'a [Segment]) -> Self {
        Span { ram, segments, skip: 0, len: segments.iter().map(|s| u64::from(s.len)).sum() }
    }

    /// Takes the first `len` bytes off.
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

    /// The pieces of memory it consists of.
    fn slices(self) -> impl Iterator<Item = Result<RamSlice<'a>, OutOfRam>> {
        let Span { ram, segments, mut skip, len: mut left } = self;
        segments.iter().map_while(move |s| {
            let len = u64::from(s.len - skip).min(left);
            let addr = s.addr + u64::from(skip);
            (skip, left) = (0, left - len);
            (len > 0).then(|| ram.slice(addr, len))
        })
    }
}

/// Reads the device-readable bytes of a chain from front to back.
#[derive(Clone, Copy)]
pub struct Reader<'a>(Span<'a>);

impl<'a> Reader<'a> {
    /// Bytes left.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u64 {
        self.0.len
    }

    /// Fills `data`, or reads nothing if there are not enough bytes.
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

    /// Takes the next `len` bytes off as a reader of their own.
    pub fn take(&mut self, len: u64) -> Result<Reader<'a>, Error> {
        self.0.take(len).map(Reader)
    }

    /// The memory itself, for system calls.
    pub fn slices(self) -> impl Iterator<Item = Result<RamSlice<'a>, OutOfRam>> {
        self.0.slices()
    }
}

/// Writes the device-writable bytes of a chain from front to back.
#[derive(Clone, Copy)]
pub struct Writer<'a>(Span<'a>);

impl<'a> Writer<'a> {
    /// Bytes left.
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

    /// Takes the next `len` bytes off as a writer of their own.
    pub fn take(&mut self, len: u64) -> Result<Writer<'a>, Error> {
        self.0.take(len).map(Writer)
    }

    /// The memory itself, for system calls.
    pub fn slices(self) -> impl Iterator<Item = Result<RamSlice<'a>, OutOfRam>> {
        self.0.slices()
    }
}
