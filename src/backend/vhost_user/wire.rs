//! Messages on the wire: a header of three `u32`, a payload, and descriptors that accompany the first byte.

use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::cmsg_space;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

pub(super) const HEADER: usize = 12;
pub(super) const VERSION: u32 = 1;
pub(super) const REPLY: u32 = 1 << 2;
pub(super) const NEED_REPLY: u32 = 1 << 3;
/// Maximum number of regions in one message.
pub(super) const MAX_REGIONS: usize = 8;
/// Length of the fields before the contents of a configuration message: offset, size and flags.
pub(super) const CONFIG_HEADER: usize = 12;

pub(super) fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Sends a message, with the descriptors attached to its first byte.
pub(super) fn send_all(
    stream: &UnixStream,
    mut message: &[u8],
    fds: &[BorrowedFd<'_>],
    deadline: Instant,
) -> io::Result<()> {
    let mut fds = fds;
    while !message.is_empty() {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_REGIONS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        match sendmsg(stream, &[io::IoSlice::new(message)], &mut control, flags) {
            Ok(n) => (message, fds) = (message.get(n..).unwrap_or_default(), &[]),
            Err(Errno::AGAIN) => wait(stream, PollFlags::OUT, deadline)?,
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// Receives an answer of at most `answer.len()` bytes; returns its length.
pub(super) fn receive(
    stream: &mut UnixStream,
    request: u32,
    answer: &mut [u8],
    deadline: Instant,
) -> io::Result<usize> {
    let mut head = [0; HEADER];
    receive_all(stream, &mut head, deadline)?;
    let (its_request, flags, size) = parse(&head);
    if its_request != request || flags & 3 != VERSION || flags & REPLY == 0 {
        return Err(invalid("its answer does not match the request"));
    }
    let payload = answer.get_mut(..size).ok_or_else(|| invalid("its answer is too long"))?;
    receive_all(stream, payload, deadline)?;
    Ok(size)
}

pub(super) fn receive_all(stream: &mut UnixStream, mut bytes: &mut [u8], deadline: Instant) -> io::Result<()> {
    while !bytes.is_empty() {
        match stream.read(bytes) {
            Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it has closed the connection")),
            Ok(n) => bytes = bytes.get_mut(n..).unwrap_or_default(),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => wait(stream, PollFlags::IN, deadline)?,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

pub(super) fn wait(stream: &UnixStream, what: PollFlags, deadline: Instant) -> io::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::Error::new(io::ErrorKind::TimedOut, "it does not answer"));
    }
    let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
    match poll(&mut [PollFd::new(stream, what)], Some(&timeout)) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

pub(super) fn header(request: u32, flags: u32, size: usize) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    for (to, from) in bytes.chunks_mut(4).zip([request, flags, size as u32]) {
        to.copy_from_slice(&from.to_ne_bytes());
    }
    bytes
}

/// Returns the request, the flags and the size of the payload.
pub(super) fn parse(head: &[u8; HEADER]) -> (u32, u32, usize) {
    let [r0, r1, r2, r3, f0, f1, f2, f3, s0, s1, s2, s3] = *head;
    let size = u32::from_ne_bytes([s0, s1, s2, s3]) as usize;
    (u32::from_ne_bytes([r0, r1, r2, r3]), u32::from_ne_bytes([f0, f1, f2, f3]), size)
}

pub(super) fn pair(first: u32, second: u32) -> [u8; 8] {
    let ([a, b, c, d], [e, f, g, h]) = (first.to_ne_bytes(), second.to_ne_bytes());
    [a, b, c, d, e, f, g, h]
}

pub(super) fn config_header(offset: u32, len: usize) -> [u8; CONFIG_HEADER] {
    header(offset, len as u32, 0)
}
