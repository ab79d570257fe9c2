//! A network without privilege: the passt program turns the guest's packets into sockets of the user's.
//!
//! passt takes Ethernet frames from a unix stream socket, each behind its length as a big-endian `u32`, as QEMU's
//! `-netdev stream` sends them. It is started with its end of a socket pair as standard input, and ends by itself when
//! the other end, ours, is closed, however this process ends.
//!
//! It sends as much of a connection's data as the guest's window allows, without waiting for room in the socket, and what
//! does not fit is lost. Some versions (that of March 2023 in Debian 12) do not notice: they learn of it from the guest,
//! and for each repeated acknowledgement, even that of a packet that came twice, send the whole window again, until most
//! of what the guest gets is what it has already. So the socket is given as much room as may be, and the guest the
//! largest MTU: a fortieth of the packets, acknowledgements and repetitions.

use std::io::{self, PipeReader, Read};
use std::net::{IpAddr, Ipv4Addr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::str::FromStr;
use std::time::Duration;

use log::debug;
use serde::{Deserialize, Serialize};

use super::packet::{self, HEADER, MAX_FRAME, MIN_FRAME, Offloads, Port, Received};
use crate::child;
use crate::memory::RamSlice;

/// Bytes of the length before each frame.
const LENGTH: usize = 4;
/// How much is read from passt at once, at least one frame.
const BUFFER: usize = 128 << 10;
/// How much passt may have sent before we read it, if the user may have so much: a window of a guest is no larger by
/// default (Linux's `tcp_rmem`). The kernel counts memory, not bytes, and is generous by twice.
const ROOM: usize = 6 << 20;
/// The guest's MTU unless told otherwise, passt's own choice: nothing here sees a cable, and connections end in passt.
pub const MTU: u16 = 65_520;
/// How long passt may take to answer a first question, or to say why it cannot.
const START: Duration = Duration::from_secs(2);

/// Why there is no network. Displays as one sentence.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not installed.
    #[error("passt, which user networking needs, is not installed (package passt)")]
    NotInstalled,
    /// It cannot be started.
    #[error("cannot start passt")]
    Start(#[source] io::Error),
    /// It ended at once.
    #[error("passt ended at once{0}")]
    Ended(String),
    /// A host port is taken.
    #[error("cannot forward {forward}: port {port} of the host cannot be bound")]
    Port {
        /// The forwarding.
        forward: Forward,
        /// The host's port.
        port: u16,
        /// The OS error.
        source: io::Error,
    },
}

/// `tcp` or `udp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A port of the host that leads to one of the guest: `tcp:8080:80`, `udp:127.0.0.1:53:5353`, `tcp:[::1]:8080:80`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// Of both.
    pub protocol: Protocol,
    /// Which of the host's addresses; all without.
    pub address: Option<IpAddr>,
    /// The host's port.
    pub host: u16,
    /// The guest's port.
    pub guest: u16,
}

impl FromStr for Forward {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (protocol, rest) = text.split_once(':')?;
            let protocol = match protocol {
                "tcp" => Protocol::Tcp,
                "udp" => Protocol::Udp,
                _ => return None,
            };
            let (rest, guest) = rest.rsplit_once(':')?;
            let (address, host) = rest.rsplit_once(':').map_or((None, rest), |(address, host)| (Some(address), host));
            let address = match address {
                Some(text) => Some(text.trim_start_matches('[').trim_end_matches(']').parse().ok()?),
                None => None,
            };
            let port = |text: &str| text.parse::<u16>().ok().filter(|&port| port != 0);
            Some(Forward { protocol, address, host: port(host)?, guest: port(guest)? })
        };
        parse().ok_or_else(|| format!("'{text}' is not of the form tcp|udp:[ADDRESS:]HOSTPORT:GUESTPORT"))
    }
}

impl std::fmt::Display for Forward {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.protocol == Protocol::Tcp { "tcp:" } else { "udp:" })?;
        match self.address {
            Some(IpAddr::V4(address)) => write!(f, "{address}:")?,
            Some(IpAddr::V6(address)) => write!(f, "[{address}]:")?,
            None => {}
        }
        write!(f, "{}:{}", self.host, self.guest)
    }
}

impl Serialize for Forward {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Forward {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

impl Forward {
    /// passt would go on without a port that it cannot have: see whether it can.
    fn check(&self) -> Result<(), Error> {
        let to = (self.address.unwrap_or(Ipv4Addr::UNSPECIFIED.into()), self.host);
        let bound = match self.protocol {
            Protocol::Tcp => TcpListener::bind(to).map(|_| ()),
            Protocol::Udp => UdpSocket::bind(to).map(|_| ()),
        };
        bound.map_err(|source| Error::Port { forward: *self, port: self.host, source })
    }

    /// As passt's options take it.
    fn option(&self) -> [String; 2] {
        let option = if self.protocol == Protocol::Tcp { "-t" } else { "-u" };
        let address = self.address.map_or(String::new(), |address| format!("{address}/"));
        [option.into(), format!("{address}{}:{}", self.host, self.guest)]
    }
}

/// What to ask of passt.
#[derive(Clone, Debug)]
pub struct Options {
    /// Forwarded ports.
    pub forwards: Vec<Forward>,
    /// The guest's MAC address.
    pub mac: [u8; 6],
    /// What it tells the guest as MTU.
    pub mtu: u16,
}

/// A running passt and the guest's connection to it.
#[derive(Debug)]
pub struct Passt {
    socket: UnixStream,
    /// Absent in tests, where the other end is held by something else.
    process: Option<Process>,
    /// What came and was not delivered: lengths and frames, from `start` to `end`.
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// The rest of a frame of which a part was sent.
    unsent: Vec<u8>,
}

impl Passt {
    /// Starts passt and waits until it is there.
    pub fn start(options: &Options) -> Result<Self, Error> {
        options.forwards.iter().try_for_each(Forward::check)?;
        let (socket, its) = UnixStream::pair().map_err(Error::Start)?;
        socket.set_nonblocking(true).map_err(Error::Start)?;
        make_room(&its);
        let process = Process::start(its.into(), options)?;
        let mut passt = Self::new(socket, Some(process));
        passt.wait_until_there(options.mac)?;
        Ok(passt)
    }

    fn new(socket: UnixStream, process: Option<Process>) -> Self {
        Passt { socket, process, buffer: vec![0; BUFFER], start: 0, end: 0, unsent: Vec::new() }
    }

    fn last_words(&mut self) -> String {
        self.process.as_mut().map_or(String::new(), Process::last_words)
    }

    /// Asks for an address that nobody has: passt answers for all, so an answer shows that it is there. Without IPv4 it
    /// says nothing; then it has at least not ended in the time it had.
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

    /// Where in the buffer the next whole frame is; reads if there is none.
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

    /// A frame that is in the buffer as a whole. A length that is none means that we do not understand each other.
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
        let length = (len as u32).to_be_bytes();
        let sent = packet::write(self.socket.as_fd(), &length, frame)?;
        if sent < LENGTH + len {
            // The stream is full: the rest has to come before anything else.
            let mut whole = vec![0; LENGTH + len];
            let (head, body) = whole.split_at_mut(LENGTH);
            head.copy_from_slice(&length);
            packet::copy_from_guest(frame, body);
            whole.drain(..sent);
            self.unsent = whole;
        }
        Ok(())
    }

    /// passt waits for the rest of a frame and does nothing else meanwhile.
    fn flush(&mut self) -> io::Result<()> {
        while !self.unsent.is_empty() {
            let n = packet::write(self.socket.as_fd(), &self.unsent, &[])?;
            self.unsent.drain(..n.min(self.unsent.len()));
        }
        Ok(())
    }

    /// There are none: passt wants whole packets.
    fn set_offloads(&mut self, _offloads: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn set_active(&mut self, _active: bool) -> io::Result<()> {
        Ok(())
    }
}

/// The passt process: ended and reaped at the latest when dropped.
#[derive(Debug)]
struct Process {
    child: Child,
    stderr: PipeReader,
}

impl Process {
    fn start(socket: OwnedFd, options: &Options) -> Result<Self, Error> {
        // A full pipe must not stop passt: what nobody reads is lost, and what we read may be nothing.
        let (stderr, its_stderr) = io::pipe().map_err(Error::Start)?;
        for end in [stderr.as_fd(), its_stderr.as_fd()] {
            rustix::io::ioctl_fionbio(end, true).map_err(|e| Error::Start(e.into()))?;
        }
        let mut command = Command::new("passt");
        command.args(["--foreground", "--quiet", "--stderr", "--fd", "0"]);
        command.args(options.forwards.iter().flat_map(Forward::option));
        command.args(["--mtu".into(), options.mtu.to_string()]);
        command.stdin(socket).stdout(Stdio::null()).stderr(its_stderr);
        // Ctrl-C on the terminal asks the guest to end, which may want its network for that.
        command.process_group(0);
        child::deliver_signals(&mut command);
        let child = command.spawn().map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => Error::NotInstalled,
            _ => Error::Start(e),
        })?;
        debug!("passt runs as process {}", child.id());
        Ok(Process { child, stderr })
    }

    /// Ends it, and tells what it said that may be the reason.
    fn last_words(&mut self) -> String {
        self.end();
        let mut text = vec![0; 64 << 10];
        let n = self.stderr.read(&mut text).unwrap_or(0);
        let text = String::from_utf8_lossy(text.get(..n).unwrap_or_default());
        let noise = |line: &&str| !line.is_empty() && !line.contains("syslog") && !line.contains("Don't run as root");
        let words: Vec<&str> = text.lines().map(str::trim).filter(noise).take(5).collect();
        if words.is_empty() { String::new() } else { format!(": {}", words.join("; ")) }
    }

    /// It keeps nothing that a kill could damage.
    fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

/// Room for what is sent on `socket`: with privilege as much as wanted, else up to the host's `net.core.wmem_max`. It works
/// with less, only slower.
fn make_room(socket: &UnixStream) {
    if rustix::net::sockopt::set_socket_send_buffer_size_force(socket, ROOM).is_err() {
        let _ = rustix::net::sockopt::set_socket_send_buffer_size(socket, ROOM);
    }
    if let Ok(room) = rustix::net::sockopt::socket_send_buffer_size(socket) {
        debug!("passt may be {} KiB ahead", room >> 10);
    }
}

/// Who has 169.254.1.1? (RFC 826, from an address of zeros as RFC 5227 has it.)
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
        (GuestRam::anonymous(1 << 20), Passt::new(ours, None), its)
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
    fn ports_are_written_as_passt_has_them() {
        for (text, option) in [
            ("tcp:8080:80", "-t 8080:80"),
            ("udp:127.0.0.1:53:5353", "-u 127.0.0.1/53:5353"),
            ("tcp:[::1]:22:22", "-t ::1/22:22"),
        ] {
            let forward: Forward = text.parse().unwrap();
            assert_eq!((forward.to_string().as_str(), forward.option().join(" ").as_str()), (text, option));
        }
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let forward: Forward = format!("tcp:127.0.0.1:{port}:80").parse().unwrap();
        let error = forward.check().unwrap_err().to_string();
        assert_eq!(error, format!("cannot forward {forward}: port {port} of the host cannot be bound"));
    }
}
