//! Network packets, independent of the kind of connection: the `Port` trait, and the two system calls that move a
//! packet between guest memory and a descriptor.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use vm_memory::bitmap::Bitmap;

use super::vectored::{MAX_BUFFERS, iovec};
use crate::memory::RamSlice;

/// Bytes of header before each frame: `struct virtio_net_hdr_v1` of Linux's taps, little-endian.
pub const HEADER: usize = 12;
/// Minimum length of a frame: the addresses and a type.
pub const MIN_FRAME: usize = 14;
/// Maximum length of a frame: the largest IP packet with an Ethernet header and a VLAN tag.
pub const MAX_FRAME: usize = 65_535 + 14 + 4;
/// Maximum number of guest memory buffers per packet: one buffer of the system call is for our own.
pub const MAX_SLICES: usize = MAX_BUFFERS - 1;

/// Work that the sender of a packet may leave to its receiver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Computing checksums.
    pub csum: bool,
    /// Segmenting TCP over IPv4.
    pub tso4: bool,
    /// Segmenting TCP over IPv6.
    pub tso6: bool,
    /// Segmenting TCP that uses ECN.
    pub ecn: bool,
}

/// Result of receiving.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// A packet of this many bytes, header included.
    Packet(usize),
    /// The next packet has this many bytes, more than the buffers can hold. It stays in the port until it is received
    /// or skipped. The buffers' contents are undefined.
    NoRoom(usize),
}

/// Network connection of a network card: one pair of directions, never blocking. An error other than
/// [`io::ErrorKind::WouldBlock`] from `receive` means that the other side is gone.
pub trait Port: Send {
    /// Descriptor to wait on: readable when there are packets, writable when there is room to send.
    fn fd(&self) -> RawFd;

    /// Receives the next packet into `room`, beginning with a header of [`HEADER`] bytes whose last two are undefined.
    fn receive(&mut self, room: &[RamSlice<'_>]) -> io::Result<Received>;

    /// Drops the packet that did not fit ([`Received::NoRoom`]).
    fn skip(&mut self);

    /// Accepts a packet for sending, or refuses it entirely. [`Port::flush`] must follow.
    fn send(&mut self, header: &[u8; HEADER], frame: &[RamSlice<'_>]) -> io::Result<()>;

    /// Sends what is left of earlier packets; [`io::ErrorKind::WouldBlock`] if some of it remains.
    fn flush(&mut self) -> io::Result<()>;

    /// Sets which work senders may leave to the receiver.
    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()>;

    /// Attaches this port to the network, or detaches it, where several ports lead to one network.
    fn set_active(&mut self, active: bool) -> io::Result<()>;
}

/// Returns the total number of bytes.
pub fn len(slices: &[RamSlice<'_>]) -> usize {
    slices.iter().map(|s| s.len()).sum()
}

/// Makes one read into guest memory; bytes that do not fit go into `overflow`. Uses at most [`MAX_SLICES`] slices.
#[allow(unsafe_code)]
pub fn read(fd: BorrowedFd<'_>, room: &[RamSlice<'_>], overflow: &mut [u8]) -> io::Result<usize> {
    let room = room.get(..MAX_SLICES).unwrap_or(room);
    let mut iov = Vec::with_capacity(room.len() + 1);
    iov.extend(room.iter().map(iovec));
    iov.push(libc::iovec { iov_base: overflow.as_mut_ptr().cast(), iov_len: overflow.len() });
    // SAFETY: every iovec is a RamSlice, hence mapped guest memory that outlives the call and that nothing holds a
    // reference into, or `overflow`, which is borrowed exclusively.
    let n = unsafe { libc::readv(fd.as_raw_fd(), iov.as_ptr(), iov.len() as libc::c_int) };
    let n = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
    let mut left = n;
    for slice in room {
        let here = slice.len().min(left);
        slice.bitmap().mark_dirty(0, here);
        left -= here;
    }
    Ok(n)
}

/// Makes one write: `head`, then guest memory without its first `skip` bytes. Takes at most [`MAX_SLICES`] slices.
#[allow(unsafe_code)]
pub fn write(fd: BorrowedFd<'_>, head: &[u8], slices: &[RamSlice<'_>], skip: usize) -> io::Result<usize> {
    if slices.len() > MAX_SLICES {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut iov = Vec::with_capacity(slices.len() + 1);
    iov.push(libc::iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: head.len() });
    let mut skip = skip;
    for slice in slices {
        let here = skip.min(slice.len());
        skip -= here;
        iov.push(iovec(&slice.offset(here).map_err(io::Error::other)?));
    }
    // SAFETY: every iovec is `head`, which is only read, or part of a RamSlice, hence mapped guest memory that outlives the
    // call.
    let n = unsafe { libc::writev(fd.as_raw_fd(), iov.as_ptr(), iov.len() as libc::c_int) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Copies bytes of guest memory into `to`, from the first on, until `to` is full; returns the number copied.
pub fn copy_from_guest(slices: &[RamSlice<'_>], mut to: &mut [u8]) -> usize {
    let room = to.len();
    for slice in slices {
        let n = slice.copy_to(to);
        to = to.get_mut(n..).unwrap_or_default();
    }
    room - to.len()
}

/// Copies bytes to guest memory, as many as fit.
pub fn copy_to_guest(mut from: &[u8], slices: &[RamSlice<'_>]) {
    for slice in slices {
        let (now, later) = from.split_at(from.len().min(slice.len()));
        slice.copy_from(now);
        from = later;
    }
}
