//! Requests (5.2.6): decoding of a chain, and its answer.

use std::io;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::{ID_BYTES, MAX_RANGE_SECTORS, MAX_RANGES, SECTOR, Shared};
use crate::backend::raw::is_unsupported;
use crate::memory::{GuestRam, OutOfRam, RamSlice};
use crate::virtio::Fault;
use crate::virtio::chain::{self, Chain, Reader, Writer};

/// Bytes of the request header.
const HEADER: usize = 16;
/// Bytes of a range of a discard or write-zeroes request.
const RANGE: usize = 16;

/// Request that a chain contains. Every number in it has been checked against the disk.
pub(super) enum Request<'a> {
    /// Fill these buffers from this byte offset on.
    Read(Vec<RamSlice<'a>>, u64),
    /// Write these buffers from this byte offset on.
    Write(Vec<RamSlice<'a>>, u64),
    /// Flush written data to the disk.
    Flush,
    /// Discard ranges.
    Discard(Vec<Range>),
    /// Set ranges to zero.
    WriteZeroes(Vec<Range>),
    /// Return the id.
    GetId(Writer<'a>),
}

/// Range of the disk, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Range {
    offset: u64,
    len: u64,
    unmap: bool,
}

/// Reason for an error status.
pub(super) enum Failed {
    /// `VIRTIO_BLK_S_IOERR`; a mistake of the guest.
    Request,
    /// `VIRTIO_BLK_S_UNSUPP`.
    Unsupported,
    /// `VIRTIO_BLK_S_IOERR`; an error of the image.
    Disk(io::Error),
}

impl From<chain::Error> for Failed {
    fn from(_: chain::Error) -> Self {
        Failed::Request
    }
}

impl From<OutOfRam> for Failed {
    fn from(_: OutOfRam) -> Self {
        Failed::Request
    }
}

impl From<io::Error> for Failed {
    fn from(e: io::Error) -> Self {
        Failed::Disk(e)
    }
}

/// Splits the writable part of a chain into the data and, after it, the status byte.
fn parts<'a>(chain: &'a Chain, ram: &'a GuestRam) -> Result<(Writer<'a>, Writer<'a>), Fault> {
    let mut writer = chain.writer(ram);
    let no_status = Fault::Device("a block request has no room for its status byte");
    let data = writer.take(writer.len().checked_sub(1).ok_or(no_status)?)?;
    Ok((data, writer))
}

/// Returns the bytes that a request moves, for its rate limit; those that it sets to zero are charged separately.
pub(super) fn cost(chain: &Chain, ram: &GuestRam) -> u64 {
    (chain.reader(ram).len() + chain.writer(ram).len()).saturating_sub(HEADER as u64 + 1)
}

/// Decodes a chain. The outer result is `Err` if not even a status can be written.
pub(super) fn decode<'a>(
    shared: &Shared,
    chain: &'a Chain,
    ram: &'a GuestRam,
) -> Result<Result<Request<'a>, Failed>, Fault> {
    let (data, _) = parts(chain, ram)?;
    Ok(decode_parts(shared, chain.reader(ram), data))
}

/// Maps what a file system cannot do to "unsupported", which is not a disk error: the driver stops asking for it.
fn lacking(failed: Failed) -> Failed {
    match failed {
        Failed::Disk(e) if is_unsupported(&e) => Failed::Unsupported,
        failed => failed,
    }
}

fn decode_parts<'a>(shared: &Shared, mut reader: Reader<'a>, data: Writer<'a>) -> Result<Request<'a>, Failed> {
    let mut header = [0; HEADER];
    reader.read(&mut header)?;
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(sector);
    let kind = u32::from_le_bytes([t0, t1, t2, t3]);
    let writes = matches!(kind, VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES);
    if writes && shared.readonly {
        return Err(Failed::Request);
    }
    Ok(match kind {
        VIRTIO_BLK_T_IN => {
            let offset = shared.offset(sector, data.len())?;
            Request::Read(data.buffers()?, offset)
        }
        VIRTIO_BLK_T_OUT => {
            let offset = shared.offset(sector, reader.len())?;
            Request::Write(reader.buffers()?, offset)
        }
        VIRTIO_BLK_T_FLUSH => Request::Flush,
        VIRTIO_BLK_T_DISCARD => Request::Discard(shared.ranges(reader, 0)?),
        VIRTIO_BLK_T_WRITE_ZEROES => Request::WriteZeroes(shared.ranges(reader, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP)?),
        VIRTIO_BLK_T_GET_ID => Request::GetId(data),
        _ => return Err(Failed::Unsupported),
    })
}

impl Request<'_> {
    /// Returns whether the request covers more of the disk than its chain shows, and may take long.
    pub(super) fn is_large(&self) -> bool {
        matches!(self, Request::Discard(_) | Request::WriteZeroes(_))
    }
}

impl Shared {
    /// Returns the byte offset in the image for `len` bytes at `sector`: whole sectors within the capacity.
    fn offset(&self, sector: u64, len: u64) -> Result<u64, Failed> {
        let free = self.sectors().checked_sub(sector).ok_or(Failed::Request)?;
        if !len.is_multiple_of(SECTOR) || len / SECTOR > free {
            return Err(Failed::Request);
        }
        // Not past the image's end, so no overflow.
        Ok(sector * SECTOR)
    }

    /// Reads consecutive `struct virtio_blk_discard_write_zeroes`; flags other than `allowed` are unsupported
    /// (5.2.6.2).
    fn ranges(&self, mut reader: Reader<'_>, allowed: u32) -> Result<Vec<Range>, Failed> {
        let len = reader.len();
        if !len.is_multiple_of(RANGE as u64) || len / RANGE as u64 > MAX_RANGES.into() {
            return Err(Failed::Request);
        }
        // More than the configuration lets a driver ask for, and as much as earlier versions let it.
        let mut left = if allowed == 0 { u64::MAX } else { u64::from(MAX_RANGE_SECTORS) * SECTOR };
        let mut ranges = Vec::new();
        for _ in 0..len / RANGE as u64 {
            let mut range = [0; RANGE];
            reader.read(&mut range)?;
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = range;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let count = u32::from_le_bytes([n0, n1, n2, n3]);
            let flags = u32::from_le_bytes([f0, f1, f2, f3]);
            if flags & !allowed != 0 {
                return Err(Failed::Unsupported);
            }
            if count > MAX_RANGE_SECTORS {
                return Err(Failed::Request);
            }
            let len = u64::from(count) * SECTOR;
            left = left.checked_sub(len).ok_or(Failed::Request)?;
            ranges.push(Range { offset: self.offset(sector, len)?, len, unmap: flags != 0 });
        }
        Ok(ranges)
    }

    /// Executes a request synchronously.
    pub(super) fn execute(&self, request: Request<'_>) -> Result<(), Failed> {
        match request {
            Request::Read(buffers, offset) => self.disk.read(&buffers, offset)?,
            Request::Write(buffers, offset) => self.change(|| self.disk.write(&buffers, offset))?,
            Request::Flush => self.flush()?,
            Request::Discard(ranges) => {
                self.change(|| ranges.iter().try_for_each(|r| self.disk.discard(r.offset, r.len))).map_err(lacking)?;
            }
            Request::WriteZeroes(ranges) => {
                // Charged regardless of how the disk does it: one that cannot do better writes them.
                if let Some(limiter) = &self.limiter {
                    limiter.charge_more(ranges.iter().map(|r| r.len).sum());
                }
                let zero = |r: &Range| self.disk.write_zeroes(r.offset, r.len, r.unmap);
                self.change(|| ranges.iter().try_for_each(zero)).map_err(lacking)?;
            }
            Request::GetId(mut data) => {
                let len = data.len().min(ID_BYTES as u64) as usize;
                data.write(self.id.get(..len).unwrap_or(&[]))?;
            }
        }
        Ok(())
    }

    fn change(&self, change: impl FnOnce() -> io::Result<()>) -> Result<(), Failed> {
        let changed = change();
        // Not before: a flush in the meantime may have missed it. Also after an error: some of it may have been
        // written.
        self.dirty.store(true, Ordering::Release);
        changed?;
        if self.write_through.load(Ordering::Acquire) {
            self.flush()?;
        }
        Ok(())
    }

    /// Writes the status byte of a request, after everything else. Returns the length of the valid writable part: all
    /// of it, because the status is at its end.
    pub(super) fn answer(&self, chain: &Chain, ram: &GuestRam, result: Result<(), Failed>) -> Result<u32, Fault> {
        let (data, mut status) = parts(chain, ram)?;
        let code = match result {
            Ok(()) => VIRTIO_BLK_S_OK,
            Err(Failed::Request) => VIRTIO_BLK_S_IOERR,
            Err(Failed::Unsupported) => VIRTIO_BLK_S_UNSUPP,
            Err(Failed::Disk(e)) => {
                self.warn(&e);
                VIRTIO_BLK_S_IOERR
            }
        };
        status.write(&[code as u8])?;
        Ok(u32::try_from(data.len() + 1).unwrap_or(u32::MAX))
    }
}
