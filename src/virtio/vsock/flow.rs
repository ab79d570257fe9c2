//! The two directions of a connection, each with its credit (5.10.6.3). All counters are of bytes since the connection
//! began, and wrap.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;

use vm_memory::{ReadVolatile, VolatileMemoryError, WriteVolatile};

use super::packet::Header;
use crate::memory::RamSlice;
use crate::virtio::Fault;
use crate::virtio::chain::{Reader, Writer};

/// Bytes of the guest's that a connection has room for.
pub const BUF_ALLOC: u32 = 128 << 10;
/// The guest hears of room at the latest when this much is new.
const UPDATE: u32 = BUF_ALLOC / 4;
/// Bytes of data in one packet to the guest, at most: then the next connection has its turn.
const MAX_DATA: u32 = 64 << 10;

/// Nobody will take the guest's data any more.
#[derive(Debug)]
pub struct Deaf;

/// From guest to host. What the host does not take at once is kept, so that it never holds up the queue that all
/// connections share; the guest was promised the room.
#[derive(Default)]
pub struct ToHost {
    /// Taken from the guest and not yet by the host.
    buffer: VecDeque<u8>,
    received: u32,
    /// What the host has taken: our `fwd_cnt`.
    forwarded: u32,
    /// `forwarded` as the guest knows it.
    told: u32,
    update_wanted: bool,
}

impl ToHost {
    /// Whether the host has taken everything.
    pub fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// Bytes that the guest may send.
    pub fn room(&self) -> u32 {
        BUF_ALLOC.saturating_sub(self.received.wrapping_sub(self.forwarded))
    }

    /// Takes data from the guest, no more than there is [`ToHost::room`] for: to the host as far as that takes it, else
    /// into the buffer.
    pub fn receive(&mut self, stream: &mut UnixStream, data: Reader<'_>) -> Result<Result<(), Deaf>, Fault> {
        // Below the room, so below 2^32.
        self.received = self.received.wrapping_add(data.len() as u32);
        for slice in data.slices() {
            let slice = slice?;
            let done = if self.buffer.is_empty() { self.write(stream, &slice) } else { Ok(0) };
            match done {
                Ok(done) => self.keep(&slice.offset(done).map_err(io::Error::other)?)?,
                Err(deaf) => return Ok(Err(deaf)),
            }
        }
        Ok(Ok(()))
    }

    /// Writes what the host takes right now; returns how much that was.
    fn write(&mut self, stream: &mut UnixStream, slice: &RamSlice<'_>) -> Result<usize, Deaf> {
        loop {
            match stream.write_volatile(slice) {
                Ok(n) => {
                    self.forwarded = self.forwarded.wrapping_add(n as u32);
                    return Ok(n);
                }
                Err(VolatileMemoryError::IOError(e)) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(VolatileMemoryError::IOError(e)) if e.kind() == io::ErrorKind::WouldBlock => return Ok(0),
                Err(_) => return Err(Deaf),
            }
        }
    }

    fn keep(&mut self, slice: &RamSlice<'_>) -> Result<(), Fault> {
        let mut done = 0;
        while done < slice.len() {
            let mut piece = [0; 4096];
            let n = slice.offset(done).map_err(io::Error::other)?.copy_to(&mut piece);
            self.buffer.extend(piece.iter().take(n));
            done += n;
        }
        Ok(())
    }

    /// Writes from the buffer what the host takes right now.
    pub fn flush(&mut self, stream: &mut UnixStream) -> Result<(), Deaf> {
        while !self.buffer.is_empty() {
            match stream.write(self.buffer.as_slices().0) {
                Ok(n) if n > 0 => {
                    self.buffer.drain(..n);
                    self.forwarded = self.forwarded.wrapping_add(n as u32);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                _ => return Err(Deaf),
            }
        }
        // Its memory is not kept: there may be many that are idle.
        self.buffer = VecDeque::new();
        Ok(())
    }

    /// What came is gone, and so is what comes.
    pub fn discard(&mut self, more: u64) {
        self.buffer = VecDeque::new();
        self.received = self.received.wrapping_add(more as u32);
        self.forwarded = self.received;
    }

    /// The guest asks how much room there is.
    pub fn want_update(&mut self) {
        self.update_wanted = true;
    }

    /// Whether the guest asked, or must hear of room lest it waits for it; `flows`: whether it may still send.
    pub fn owes_update(&self, flows: bool) -> bool {
        self.update_wanted || flows && self.forwarded.wrapping_sub(self.told) >= UPDATE
    }

    /// Every packet of a connection tells of its room.
    pub fn stamp(&mut self, header: Header) -> Header {
        self.told = self.forwarded;
        self.update_wanted = false;
        Header { buf_alloc: BUF_ALLOC, fwd_cnt: self.forwarded, ..header }
    }
}

/// What came out of a socket.
#[derive(Debug, PartialEq, Eq)]
pub enum Got {
    /// This many bytes.
    Data(u32),
    /// None now.
    Nothing,
    /// None ever again.
    End,
    /// The connection failed.
    Failed,
}

/// From host to guest. The socket is the buffer: it is read straight into the guest's memory, when that has room.
#[derive(Default)]
pub struct ToGuest {
    /// There may be something to read.
    pub readable: bool,
    /// The guest was asked for room since it had none.
    pub asked: bool,
    sent: u32,
    alloc: u32,
    forwarded: u32,
}

impl ToGuest {
    /// Every packet of a connection tells of its room.
    pub fn learn(&mut self, header: &Header) {
        (self.alloc, self.forwarded) = (header.buf_alloc, header.fwd_cnt);
        self.asked &= self.credit() == 0;
    }

    /// Bytes that the guest has room for; none if its numbers make no sense.
    pub fn credit(&self) -> u32 {
        self.alloc.saturating_sub(self.sent.wrapping_sub(self.forwarded))
    }

    /// Reads as much as there is, has room and may be sent.
    pub fn read(&mut self, stream: &mut UnixStream, mut room: Writer<'_>) -> Result<Got, Fault> {
        let len = room.len().min(self.credit().min(MAX_DATA).into());
        if len == 0 {
            return Err(Fault::Device("a vsock receive buffer has no room for data"));
        }
        let (mut read, mut end) = (0, Got::Nothing);
        for slice in room.take(len)?.slices() {
            let mut slice = slice?;
            let n = match stream.read_volatile(&mut slice) {
                Ok(0) => {
                    end = Got::End;
                    break;
                }
                Ok(n) => n,
                Err(VolatileMemoryError::IOError(e)) if e.kind() == io::ErrorKind::Interrupted => break,
                Err(VolatileMemoryError::IOError(e)) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.readable = false;
                    break;
                }
                Err(_) => {
                    end = Got::Failed;
                    break;
                }
            };
            read += n as u32;
            if n < slice.len() {
                break;
            }
        }
        self.sent = self.sent.wrapping_add(read);
        // What came before an end goes first; the end is still there the next time.
        Ok(if read > 0 { Got::Data(read) } else { end })
    }
}
