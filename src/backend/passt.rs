//! Networking without privileges: the passt program translates the guest's packets to sockets of the user.
//!
//! passt takes Ethernet frames from a unix stream socket, each after its length as a big-endian `u32`, as QEMU's
//! `-netdev stream` sends them. It is started with its end of a socket pair as standard input. When our end is closed,
//! it ends by itself, however this process ends.
//!
//! passt sends as much of a connection's data as the guest's window allows, without waiting for room in the socket, and
//! data that does not fit is lost. Some versions (that of March 2023 in Debian 12) do not notice. They learn of the
//! loss from the guest, and for each repeated acknowledgement, even that of a packet that came twice, they send the
//! whole window again, until most of what the guest receives is data that it already has. Therefore the socket gets as
//! much buffer space as possible, and the guest gets the largest MTU: that means a fortieth of the packets,
//! acknowledgements and repetitions.
//!
//! passt turns a frame into a connection of this host to the frame's destination, and a guest may write any
//! destination. Debian 12's version then connects to 127.0.0.1 in spite of its options, and Debian 13's ends when it
//! meets an IPv4 address in an IPv6 header. Therefore frames to the loopback never reach passt.

mod forward;
mod process;

use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use log::debug;

use super::packet::{self, HEADER, MAX_FRAME, MIN_FRAME, Offloads, Port, Received};
use crate::memory::RamSlice;

pub use forward::{Forward, Protocol};
use process::Process;
pub use process::{NAME_SERVER, Options};

/// Size of the length before each frame.
const LENGTH: usize = 4;
/// Length of a frame up to the end of an IPv6 destination address.
const ADDRESSES: usize = 54;
/// Number of bytes read from passt in one call; at least one frame.
const BUFFER: usize = 128 << 10;
/// Bytes that passt may send ahead of our reading, if the user may have such a large buffer. A guest's window is no
/// larger by default (Linux's `tcp_rmem`). The kernel counts memory, not bytes, and doubles the value.
const ROOM: usize = 6 << 20;
/// Default MTU of the guest, which is passt's default too: no cable limits it, and connections end in passt.
pub const MTU: u16 = 65_520;
/// Time that passt has to answer a first request, or to report why it cannot.
const START: Duration = Duration::from_secs(2);

/// Reasons why there is no network. Displays as one sentence.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// passt is not installed.
    #[error("passt, which user networking needs, is not installed (package passt)")]
    NotInstalled,
    /// passt cannot be started.
    #[error("cannot start passt")]
    Start(#[source] io::Error),
    /// passt ended immediately.
    #[error("passt ended immediately{0}")]
    Ended(String),
    /// A port of the host is taken.
    #[error("cannot forward {forward}: port {port} of the host cannot be bound")]
    Port {
        /// Requested forwarding.
        forward: Forward,
        /// Port of the host.
        port: u16,
        /// The OS error.
        source: io::Error,
    },
}

/// A running passt and the guest's connection to it.
#[derive(Debug)]
pub struct Passt {
    socket: UnixStream,
    /// Absent if vireo did not start this passt.
    process: Option<Process>,
    /// Received bytes that were not delivered yet: lengths and frames, from `start` to `end`.
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// Rest of a frame that was sent in part.
    unsent: Vec<u8>,
}

impl Passt {
    /// Starts passt and waits until it is ready.
    pub fn start(options: &Options) -> Result<Self, Error> {
        options.forwards.iter().try_for_each(Forward::check)?;
        let (socket, its) = UnixStream::pair().map_err(Error::Start)?;
        socket.set_nonblocking(true).map_err(Error::Start)?;
        make_room(&its);
        let process = Process::start(its.into(), options)?;
        let mut passt = Passt { process: Some(process), ..Self::over(socket) };
        passt.wait_until_there(options.mac)?;
        Ok(passt)
    }

    /// Uses a connection to a passt that vireo did not start; the socket must be non-blocking.
    pub fn over(socket: UnixStream) -> Self {
        Passt { socket, process: None, buffer: vec![0; BUFFER], start: 0, end: 0, unsent: Vec::new() }
    }

    fn last_words(&mut self) -> String {
        self.process.as_mut().map_or(String::new(), Process::last_words)
    }

    /// Sends an ARP request for an unused address. passt answers for all addresses, so an answer shows that it is
    /// ready. Without IPv4 it does not answer; then at least it has not ended within the time limit.
    fn wait_until_there(&mut self, mac: [u8; 6]) -> Result<(), Error> {
        let question = arp_request(mac);
        let length = (question.len() as u32).to_be_bytes();
        io::Write::write_all(&mut self.socket, &[&length[..], &question].concat()).map_err(Error::Start)?;
        let mut waiting = crate::event::Poller::new().map_err(Error::Start)?;
        waiting.add(self.socket.as_raw_fd(), 0, crate::event::Interest::Read).map_err(Error::Start)?;
        let _ = waiting.wait(Some(START)).map_err(Error::Start)?;
        loop {
            match self.next() {
                Ok(frame) => self.start = frame.end,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(_) => return Err(Error::Ended(self.last_words())),
            }
        }
    }

    /// Returns the range of the next whole frame in the buffer; reads if there is none.
    fn next(&mut self) -> io::Result<std::ops::Range<usize>> {
        loop {
            if let Some(frame) = self.buffered()? {
                return Ok(frame);
            }
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
            let room = self.buffer.get_mut(self.end..).unwrap_or_default();
            match self.socket.read(room)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => self.end += n,
            }
        }
    }

    /// Returns the range of a frame that is in the buffer completely. An invalid length means that the protocol is
    /// broken.
    fn buffered(&self) -> io::Result<Option<std::ops::Range<usize>>> {
        let have = self.buffer.get(self.start..self.end).unwrap_or_default();
        let Some((length, rest)) = have.split_first_chunk::<LENGTH>() else { return Ok(None) };
        let length = u32::from_be_bytes(*length) as usize;
        if !(MIN_FRAME..=MAX_FRAME).contains(&length) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("passt sent a frame of {length} bytes")));
        }
        let start = self.start + LENGTH;
        Ok((rest.len() >= length).then_some(start..start + length))
    }

    fn receive_now(&mut self, room: &[RamSlice<'_>]) -> io::Result<Received> {
        let range = self.next()?;
        let frame = self.buffer.get(range.clone()).unwrap_or_default();
        let len = HEADER + frame.len();
        if len > packet::len(room) {
            return Ok(Received::NoRoom(len));
        }
        packet::copy_to_guest(&[&[0; HEADER], frame].concat(), room);
        self.start = range.end;
        Ok(Received::Packet(len))
    }
}

impl Port for Passt {
    fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    fn receive(&mut self, room: &[RamSlice<'_>]) -> io::Result<Received> {
        self.receive_now(room).map_err(|e| match e.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => e,
            kind => io::Error::new(kind, format!("passt is gone: {e}{}", self.last_words())),
        })
    }

    fn skip(&mut self) {
        if let Ok(Some(frame)) = self.buffered() {
            self.start = frame.end;
        }
    }

    fn send(&mut self, _header: &[u8; HEADER], frame: &[RamSlice<'_>]) -> io::Result<()> {
        self.flush()?;
        let len = packet::len(frame);
        // Copy these bytes: the guest may change the frame after the check.
        let mut head = [0; LENGTH + ADDRESSES];
        let (length, addresses) = head.split_at_mut(LENGTH);
        length.copy_from_slice(&(len as u32).to_be_bytes());
        let copied = packet::copy_from_guest(frame, addresses);
        if is_to_loopback(addresses) {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "it was for the host's loopback"));
        }
        let head = head.get(..LENGTH + copied).unwrap_or(&head);
        let sent = packet::write(self.socket.as_fd(), head, frame, copied)?;
        if sent < LENGTH + len {
            // The stream is full: the rest must be sent before anything else.
            let mut whole = vec![0; LENGTH + len];
            packet::copy_from_guest(frame, whole.get_mut(LENGTH..).unwrap_or_default());
            whole.iter_mut().zip(head).for_each(|(to, from)| *to = *from);
            whole.drain(..sent);
            self.unsent = whole;
        }
        Ok(())
    }

    /// Sends the rest of a frame. passt waits for it and does nothing else in the meantime.
    fn flush(&mut self) -> io::Result<()> {
        while !self.unsent.is_empty() {
            let n = packet::write(self.socket.as_fd(), &self.unsent, &[], 0)?;
            self.unsent.drain(..n.min(self.unsent.len()));
        }
        Ok(())
    }

    /// Does nothing: passt has no offloads and needs whole packets.
    fn set_offloads(&mut self, _offloads: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn set_active(&mut self, _active: bool) -> io::Result<()> {
        Ok(())
    }
}

/// Enlarges the send buffer of `socket`: with privileges to the full size, otherwise up to the host's
/// `net.core.wmem_max`. A smaller buffer works too, only slower.
fn make_room(socket: &UnixStream) {
    if rustix::net::sockopt::set_socket_send_buffer_size_force(socket, ROOM).is_err() {
        let _ = rustix::net::sockopt::set_socket_send_buffer_size(socket, ROOM);
    }
    if let Ok(room) = rustix::net::sockopt::socket_send_buffer_size(socket) {
        debug!("passt may be {} KiB ahead", room >> 10);
    }
}

/// Returns true if a frame with these first bytes is addressed to the host's loopback: 127.0.0.0/8 and ::1, the
/// addresses of zeros, which Linux connects to itself, and IPv4 addresses written as IPv6 addresses.
fn is_to_loopback(frame: &[u8]) -> bool {
    match frame.get(12..14) {
        Some([0x08, 0x00]) => matches!(frame.get(30), Some(0 | 127)),
        Some([0x86, 0xDD]) => {
            matches!(
                frame.get(38..50),
                Some([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0] | [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF])
            )
        }
        _ => false,
    }
}

/// Builds an ARP request for 169.254.1.1 (RFC 826, with a sender address of zeros as in RFC 5227).
fn arp_request(mac: [u8; 6]) -> Vec<u8> {
    let ethernet_ipv4_request = [0, 1, 8, 0, 6, 4, 0, 1];
    [&[0xFF; 6][..], &mac, &[8, 6], &ethernet_ipv4_request, &mac, &[0; 4], &[0; 6], &[169, 254, 1, 1]].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestRam;
    use std::io::Write;

    fn setup() -> (GuestRam, Passt, UnixStream) {
        let (ours, its) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (GuestRam::anonymous(1 << 20), Passt::over(ours), its)
    }

    fn frame(len: usize) -> Vec<u8> {
        [&(len as u32).to_be_bytes()[..], &(0..len).map(|i| (i % 251) as u8).collect::<Vec<_>>()].concat()
    }

    fn would_block(result: io::Result<Received>) {
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn frames_come_whole_however_the_stream_is_cut() {
        let (ram, mut passt, mut its) = setup();
        let room = [ram.slice(0, 10).unwrap(), ram.slice(10, 1000).unwrap(), ram.slice(1010, 0x1_0000).unwrap()];
        let (first, second) = (frame(60), frame(MAX_FRAME));
        for byte in &first {
            would_block(passt.receive(&room));
            its.write_all(&[*byte]).unwrap();
        }
        assert_eq!(passt.receive(&room).unwrap(), Received::Packet(72));
        let mut bytes = vec![0; 72];
        ram.read(0, &mut bytes).unwrap();
        assert_eq!(bytes, [&[0; HEADER][..], &first[4..]].concat());
        its.write_all(&[first, second.clone(), frame(14)].concat()).unwrap();
        assert_eq!(passt.receive(&room[..1]).unwrap(), Received::NoRoom(72));
        passt.skip();
        assert_eq!(passt.receive(&room[..2]).unwrap(), Received::NoRoom(HEADER + MAX_FRAME));
        assert_eq!(passt.receive(&room).unwrap(), Received::Packet(HEADER + MAX_FRAME));
        let mut bytes = vec![0; MAX_FRAME];
        ram.read(HEADER as u64, &mut bytes).unwrap();
        assert!(bytes == second[4..]);
        assert_eq!(passt.receive(&room).unwrap(), Received::Packet(26));
        would_block(passt.receive(&room));
        drop(its);
        assert_eq!(passt.receive(&room).unwrap_err().to_string(), "passt is gone: unexpected end of file");
    }

    #[test]
    fn lengths_of_no_frame_are_an_error() {
        for length in [0, 13, MAX_FRAME as u32 + 1, u32::MAX] {
            let (ram, mut passt, mut its) = setup();
            its.write_all(&[&length.to_be_bytes()[..], &[0; 100]].concat()).unwrap();
            let error = passt.receive(&[ram.slice(0, 0x1_0000).unwrap()]).unwrap_err().to_string();
            assert_eq!(error, format!("passt is gone: passt sent a frame of {length} bytes"));
            passt.skip();
        }
    }

    #[test]
    fn a_full_stream_keeps_frames_whole() {
        let (ram, mut passt, its) = setup();
        let data: Vec<u8> = (0..60_000u32).map(|i| (i % 253) as u8).collect();
        ram.write(0, &data).unwrap();
        let slices = [ram.slice(0, 7).unwrap(), ram.slice(7, 59_993).unwrap()];
        its.set_nonblocking(true).unwrap();
        let (mut sent, mut received, mut its) = (0, Vec::new(), its);
        for _ in 0..100 {
            match passt.send(&[0; HEADER], &slices) {
                Ok(()) => sent += 1,
                Err(e) => {
                    assert_eq!(e.kind(), io::ErrorKind::WouldBlock);
                    let mut some = [0; 50_001];
                    let n = its.read(&mut some).unwrap();
                    received.extend_from_slice(&some[..n]);
                }
            }
            assert!(passt.unsent.len() < 60_004);
        }
        loop {
            let flushed = passt.flush().is_ok();
            let _ = its.read_to_end(&mut received);
            if flushed {
                break;
            }
        }
        let whole = [&60_000u32.to_be_bytes()[..], &data].concat();
        assert!(sent > 3 && received.len() == sent * whole.len());
        assert!(received.chunks(whole.len()).all(|frame| frame == whole));
    }

    #[test]
    fn no_frame_reaches_the_hosts_loopback() {
        let (ram, mut passt, mut its) = setup();
        its.set_nonblocking(true).unwrap();
        let ipv4 = |to: [u8; 4]| [&[2; 12][..], &[8, 0], &[0x45; 16], &to, &[9; 40]].concat();
        let ipv6 = |to: [u16; 8]| {
            [&[2; 12][..], &[0x86, 0xDD], &[0x60; 24], &to.map(u16::to_be_bytes).concat(), &[9; 20]].concat()
        };
        let mut sent = |frame: &[u8]| {
            ram.write(0, frame).unwrap();
            // Split the frame in the middle of the addresses.
            let slices = [ram.slice(0, 32).unwrap(), ram.slice(32, frame.len() as u64 - 32).unwrap()];
            let error = passt.send(&[0; HEADER], &slices).err().map(|e| e.to_string());
            let mut got = vec![0; 4096];
            let n = its.read(&mut got).unwrap_or(0);
            match error {
                None => assert_eq!(got[..n], [&(frame.len() as u32).to_be_bytes()[..], frame].concat()),
                Some(ref e) => assert_eq!((e.as_str(), n), ("it was for the host's loopback", 0)),
            }
            error.is_none()
        };
        for to in [[127, 0, 0, 1], [127, 255, 255, 254], [0, 0, 0, 0], [0, 1, 2, 3]] {
            assert!(!sent(&ipv4(to)), "{to:?}");
        }
        for to in [[0, 0, 0, 0, 0, 0, 0, 1], [0; 8], [0, 0, 0, 0, 0, 0, 0x7F00, 1], [0, 0, 0, 0, 0, 0xFFFF, 0x7F00, 1]]
        {
            assert!(!sent(&ipv6(to)), "{to:x?}");
        }
        assert!([[10, 0, 2, 2], [255; 4], [1, 0, 0, 127]].map(ipv4).iter().all(|frame| sent(frame)));
        assert!(
            [[0xFE80, 0, 0, 0, 0, 0, 0, 1], [0xFF02, 0, 0, 0, 0, 0, 0, 1]].map(ipv6).iter().all(|frame| sent(frame))
        );
        // The shortest possible frame.
        ram.write(0, &[8; MIN_FRAME]).unwrap();
        passt.send(&[0; HEADER], &[ram.slice(0, MIN_FRAME as u64).unwrap()]).unwrap();
        let mut got = [0; 4096];
        assert_eq!(its.read(&mut got).unwrap(), LENGTH + MIN_FRAME);
        assert_eq!(got[..LENGTH + MIN_FRAME], [&[0, 0, 0, 14][..], &[8; MIN_FRAME]].concat());
    }
}
