//! The two directions of a connection, each with its credit (5.10.6.3). All counters count bytes since the connection
//! began, and wrap.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;

use vm_memory::{ReadVolatile, VolatileMemoryError, WriteVolatile};

use super::packet::Header;
use crate::memory::RamSlice;
use crate::virtio::Fault;
use crate::virtio::chain::{Reader, Writer};

/// Size of a connection's buffer for data from the guest, in bytes.
pub const BUF_ALLOC: u32 = 128 << 10;
/// Amount of newly free buffer space after which the guest is notified at the latest.
const UPDATE: u32 = BUF_ALLOC / 4;
/// Maximum number of data bytes in one packet to the guest; after that the next connection has its turn.
const MAX_DATA: u32 = 64 << 10;

/// The host side accepts no more data from the guest.
#[derive(Debug)]
pub struct Deaf;

/// Data from guest to host. Data that the host does not take immediately is buffered, so that it never blocks the queue
/// that all connections share; the guest was promised this buffer space.
#[derive(Default)]
pub struct ToHost {
    /// Data received from the guest but not yet taken by the host.
    buffer: VecDeque<u8>,
    received: u32,
    /// Number of bytes that the host has taken: the device's `fwd_cnt`.
    forwarded: u32,
    /// Value of `forwarded` that the guest was last sent.
    told: u32,
    update_wanted: bool,
}

impl ToHost {
    /// Returns whether the host has taken everything.
    pub fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// Returns the number of bytes that the guest may send.
    pub fn room(&self) -> u32 {
        BUF_ALLOC.saturating_sub(self.received.wrapping_sub(self.forwarded))
    }

    /// Receives data from the guest, which must not exceed [`ToHost::room`]: writes as much as the host takes, and
    /// buffers the rest.
    pub fn receive(&mut self, stream: &mut UnixStream, data: Reader<'_>) -> Result<Result<(), Deaf>, Fault> {
        // At most the room, so below 2^32.
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

    /// Writes as much as the host takes now; returns the number of bytes.
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

    /// Writes as much from the buffer as the host takes now.
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
        // The memory is freed, because many connections may be idle.
        self.buffer = VecDeque::new();
        Ok(())
    }

    /// Discards the buffered data and `more` further bytes from the guest.
    pub fn discard(&mut self, more: u64) {
        self.buffer = VecDeque::new();
        self.received = self.received.wrapping_add(more as u32);
        self.forwarded = self.received;
    }

    /// Records the guest's request for a credit update.
    pub fn want_update(&mut self) {
        self.update_wanted = true;
    }

    /// Returns whether a credit update is due: because the guest asked for one, or because it may still send (`flows`)
    /// and might wait for credit.
    pub fn owes_update(&self, flows: bool) -> bool {
        self.update_wanted || flows && self.forwarded.wrapping_sub(self.told) >= UPDATE
    }

    /// Adds the credit information that every packet of a connection carries.
    pub fn stamp(&mut self, header: Header) -> Header {
        self.told = self.forwarded;
        self.update_wanted = false;
        Header { buf_alloc: BUF_ALLOC, fwd_cnt: self.forwarded, ..header }
    }
}

/// Result of reading from a socket.
#[derive(Debug, PartialEq, Eq)]
pub enum Got {
    /// Data of this many bytes.
    Data(u32),
    /// No data at present.
    Nothing,
    /// End of the data.
    End,
    /// The connection failed.
    Failed,
}

/// Data from host to guest. The socket is the buffer: data is read straight into the guest's memory when the guest has
/// room.
#[derive(Default)]
pub struct ToGuest {
    /// Set if there may be something to read.
    pub readable: bool,
    /// Set if the guest was asked for credit since it ran out.
    pub asked: bool,
    sent: u32,
    alloc: u32,
    forwarded: u32,
}

impl ToGuest {
    /// Takes over the guest's credit information, which every packet of a connection carries.
    pub fn learn(&mut self, header: &Header) {
        (self.alloc, self.forwarded) = (header.buf_alloc, header.fwd_cnt);
        self.asked &= self.credit() == 0;
    }

    /// Returns the number of bytes that the guest has room for; 0 if its counters are inconsistent.
    pub fn credit(&self) -> u32 {
        self.alloc.saturating_sub(self.sent.wrapping_sub(self.forwarded))
    }

    /// Reads as much as is available, fits and may be sent.
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
        // Data before the end goes first; the next read sees the end again.
        Ok(if read > 0 { Got::Data(read) } else { end })
    }
}
