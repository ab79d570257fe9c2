//! One connection: its phases, and what it may send and receive in each (5.10.6.3 to 5.10.6.6).
//!
//! ```text
//!  client of the host ─► Greeting ─ CONNECT ─► Requested ─ RESPONSE ─┐
//!  REQUEST ─► (Dialing: the listener is busy) ───────────────────────┴─► Established ─► Closing: the host has ended
//!                                                                            └────────► Draining: the guest has ended
//! ```
//!
//! The data flow itself is in [`super::flow`].

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::flow::{Deaf, Got, ToGuest, ToHost};
use super::packet::{HOST_CID, Header, NO_RECEIVE, NO_SEND, NOTHING, Op, STREAM};
use crate::backend::unix;
use crate::virtio::Fault;
use crate::virtio::chain::{Reader, Writer};

/// Maximum length of a client's first line, including its newline.
const MAX_LINE: usize = 32;
/// Time limit for a client on the host to name the port that it wants.
pub const GREETING_TIME: Duration = seconds(5);
/// Time limit for the guest to answer a connection request, and for a listener on the host to accept the guest.
pub const CONNECT_TIME: Duration = seconds(10);
/// Time limit for the guest to release a connection that the host has closed; Linux gives the host as long.
pub const CLOSE_TIME: Duration = seconds(8);

/// Returns `n` seconds, or a tenth of that in tests.
const fn seconds(n: u64) -> Duration {
    if cfg!(test) { Duration::from_millis(100 * n) } else { Duration::from_secs(n) }
}

/// Pair of ports that identifies a connection of a device; the context ids of host and guest are always the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// Port on the host.
    pub host: u32,
    /// Port in the guest.
    pub guest: u32,
}

impl Key {
    /// Returns the header of a packet to the guest without data, flags or credit.
    pub fn header(self, guest_cid: u64, op: Op) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.host,
            dst_port: self.guest,
            len: 0,
            kind: STREAM,
            op,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }
}

/// Phase of a connection's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The host's client has not yet named the port that it wants.
    Greeting,
    /// The guest wants to connect, but the host's listener has too many clients waiting.
    Dialing,
    /// The guest was asked to accept the connection.
    Requested,
    /// Data flows.
    Established,
    /// The host's side is closed; the guest was notified and must confirm that.
    Closing,
    /// The guest's side is closed and its port is released; the host must still take the data that the guest sent
    /// before.
    Draining,
}

/// Outcome of an event for a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The connection continues.
    Keep,
    /// The guest is sent a reset. The connection has ended, unless it is now [`Phase::Draining`].
    Reset,
    /// The connection has ended.
    Gone,
}

/// Result of a connection's turn.
#[derive(Debug)]
pub enum Turn {
    /// A packet to the guest, whose data has been written already.
    Packet(Header),
    /// Nothing to send.
    Nothing,
    /// The connection failed.
    Reset,
}

/// State of a client's first line.
#[derive(Debug, PartialEq, Eq)]
pub enum Greeting {
    /// An incomplete line.
    Wait,
    /// A request to connect to this port of the guest.
    Port(u32),
    /// An invalid line.
    Bad,
}

/// A connection between a unix socket and a port of the guest.
pub struct Connection {
    /// Ports of the connection; meaningless while [`Phase::Greeting`].
    pub key: Key,
    /// Current phase.
    pub phase: Phase,
    /// Time by which the phase must end.
    pub deadline: Option<Instant>,
    /// Set while the connection waits for its turn.
    pub queued: bool,
    /// Set while its socket is watched for room to write.
    pub watching_room: bool,
    stream: Option<UnixStream>,
    /// Set while a request or its answer must be sent.
    greet: bool,
    to_host: ToHost,
    to_guest: ToGuest,
    /// Directions that the host's side has ended, as in [`Header::flags`].
    ended: u32,
    /// Value of `ended` that the guest was last sent.
    told_ended: u32,
    /// Directions that the guest has ended, as in [`Header::flags`].
    guest_ended: u32,
    /// Set once the end of the guest's data was passed on. Passing it on again would wake this device again.
    end_passed: bool,
}

impl Connection {
    fn new(key: Key, phase: Phase, stream: Option<UnixStream>) -> Self {
        Connection {
            key,
            phase,
            deadline: None,
            queued: false,
            watching_room: false,
            stream,
            greet: true,
            to_host: ToHost::default(),
            to_guest: ToGuest::default(),
            ended: 0,
            told_ended: 0,
            guest_ended: 0,
            end_passed: false,
        }
        .renewed()
    }

    /// Creates a connection for a client on the host that has sent nothing yet.
    pub fn from_host(stream: UnixStream) -> Self {
        Self::new(Key { host: 0, guest: 0 }, Phase::Greeting, Some(stream))
    }

    /// Creates a connection that the guest requested; without a stream the listener must still accept it.
    pub fn from_guest(key: Key, request: &Header, stream: Option<UnixStream>) -> Self {
        let phase = if stream.is_some() { Phase::Established } else { Phase::Dialing };
        let mut connection = Self::new(key, phase, stream);
        connection.to_guest.learn(request);
        connection
    }

    fn renewed(mut self) -> Self {
        self.renew_deadline();
        self
    }

    /// Restarts the time limit of the phase, when it begins or after a time in which neither side could act.
    pub fn renew_deadline(&mut self) {
        let time = match self.phase {
            Phase::Greeting => Some(GREETING_TIME),
            Phase::Dialing | Phase::Requested => Some(CONNECT_TIME),
            Phase::Closing => Some(CLOSE_TIME),
            Phase::Established | Phase::Draining => None,
        };
        self.deadline = time.map(|time| Instant::now() + time);
    }

    fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        self.renew_deadline();
    }

    /// Returns the verdict on a connection whose deadline has passed.
    pub fn expire(&self) -> Verdict {
        // The guest does not know of connections in these phases.
        let unknown = self.phase == Phase::Greeting || self.phase == Phase::Requested && self.greet;
        if unknown { Verdict::Gone } else { Verdict::Reset }
    }

    /// Returns the connection's socket.
    pub fn stream(&self) -> Option<&UnixStream> {
        self.stream.as_ref()
    }

    /// Takes the client's first line if it is complete, but nothing after it.
    pub fn greeting(&mut self) -> Greeting {
        let Some(stream) = &mut self.stream else { return Greeting::Bad };
        let mut buffer = [0; MAX_LINE];
        let there = match unix::peek(stream, &mut buffer) {
            Ok(n) => buffer.get(..n).unwrap_or(&[]),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Greeting::Wait,
            Err(_) => return Greeting::Bad,
        };
        let Some(end) = there.iter().position(|&byte| byte == b'\n') else {
            let hopeless = there.is_empty() || there.len() == MAX_LINE || unix::hung_up(stream);
            return if hopeless { Greeting::Bad } else { Greeting::Wait };
        };
        let mut line = [0; MAX_LINE];
        let line = line.get_mut(..=end).unwrap_or_default();
        if stream.read_exact(line).is_err() {
            return Greeting::Bad;
        }
        port(line).map_or(Greeting::Bad, Greeting::Port)
    }

    /// Requests a connection to the guest's port that the client named.
    pub fn request(&mut self, key: Key) {
        self.key = key;
        // The readiness event of data after the first line has already been used up.
        self.to_guest.readable = true;
        self.enter(Phase::Requested);
    }

    /// Establishes the guest's connection after the listener has accepted it.
    pub fn dialed(&mut self, stream: UnixStream) {
        self.stream = Some(stream);
        self.enter(Phase::Established);
    }

    /// Handles an event on the socket.
    pub fn ready(&mut self) -> Verdict {
        self.to_guest.readable = true;
        let verdict = self.flush();
        let deaf = self.ended & NO_SEND != 0 || self.guest_ended & NO_RECEIVE != 0;
        if self.phase == Phase::Established && deaf && self.stream.as_ref().is_some_and(unix::hung_up) {
            self.ended = NOTHING;
        }
        verdict
    }

    /// Returns whether the socket must be watched for room to write.
    pub fn wants_room(&self) -> bool {
        !self.to_host.is_empty()
    }

    /// Handles a packet from the guest with its data.
    pub fn handle(&mut self, header: &Header, data: Reader<'_>) -> Result<Verdict, Fault> {
        self.to_guest.learn(header);
        let flows = matches!(self.phase, Phase::Established | Phase::Closing);
        match header.op {
            Op::Reset => Ok(self.guest_is_gone()),
            Op::Response if self.phase == Phase::Requested && !self.greet => Ok(self.accepted()),
            Op::Data if flows => self.receive(data),
            Op::Shutdown if flows => Ok(self.guest_ends(header.flags & NOTHING)),
            Op::CreditUpdate if flows => Ok(Verdict::Keep),
            Op::CreditRequest if flows => {
                self.to_host.want_update();
                Ok(Verdict::Keep)
            }
            _ => Ok(Verdict::Reset),
        }
    }

    /// Reports the guest's acceptance to the client. The socket is empty, so it has room for the line.
    fn accepted(&mut self) -> Verdict {
        let line = format!("OK {}\n", self.key.host);
        self.enter(Phase::Established);
        match self.stream.as_mut().map(|stream| stream.write(line.as_bytes())) {
            Some(Ok(n)) if n == line.len() => Verdict::Keep,
            _ => Verdict::Reset,
        }
    }

    /// Ends the connection after a reset. Data that the guest had sent before it ended its direction still goes to the
    /// host.
    fn guest_is_gone(&mut self) -> Verdict {
        if self.guest_ended & NO_SEND != 0 && !self.to_host.is_empty() {
            self.enter(Phase::Draining);
            return Verdict::Keep;
        }
        Verdict::Gone
    }

    fn guest_ends(&mut self, flags: u32) -> Verdict {
        self.guest_ended |= flags;
        if self.guest_ended == NOTHING {
            if !self.to_host.is_empty() {
                self.enter(Phase::Draining);
            }
            // 5.10.6.6: the reset confirms the shutdown.
            return Verdict::Reset;
        }
        if flags & NO_RECEIVE != 0
            && let Some(stream) = &self.stream
        {
            let _ = stream.shutdown(Shutdown::Read);
        }
        self.flush()
    }

    fn receive(&mut self, data: Reader<'_>) -> Result<Verdict, Fault> {
        if data.len() > self.to_host.room().into() || self.guest_ended & NO_SEND != 0 {
            return Ok(Verdict::Reset);
        }
        match &mut self.stream {
            Some(stream) if self.ended & NO_RECEIVE == 0 => {
                if let Err(Deaf) = self.to_host.receive(stream, data)? {
                    self.host_is_deaf();
                }
            }
            _ => self.to_host.discard(data.len()),
        }
        Ok(Verdict::Keep)
    }

    /// Discards the guest's data and any that follows, because the host side accepts no more.
    fn host_is_deaf(&mut self) {
        self.ended |= NO_RECEIVE;
        self.to_host.discard(0);
    }

    /// Writes as much as the host takes now. After the last byte, passes on the guest's end of data.
    fn flush(&mut self) -> Verdict {
        let Some(stream) = &mut self.stream else { return Verdict::Keep };
        if let Err(Deaf) = self.to_host.flush(stream) {
            self.host_is_deaf();
        }
        if !self.to_host.is_empty() {
            return Verdict::Keep;
        }
        if self.phase == Phase::Draining {
            return Verdict::Gone;
        }
        if self.guest_ended & NO_SEND != 0
            && !self.end_passed
            && let Some(stream) = &self.stream
        {
            self.end_passed = true;
            let _ = stream.shutdown(Shutdown::Write);
        }
        Verdict::Keep
    }

    /// Returns whether there may be data that the host may still send and the guest still takes.
    fn has_data(&self) -> bool {
        self.to_guest.readable && self.ended & NO_SEND == 0 && self.guest_ended & NO_RECEIVE == 0
    }

    fn owes_update(&self) -> bool {
        self.to_host.owes_update(self.guest_ended & NO_SEND == 0 && self.ended & NO_RECEIVE == 0)
    }

    fn needs_credit(&self) -> bool {
        self.has_data() && self.to_guest.credit() == 0 && !self.to_guest.asked
    }

    /// Returns whether [`Connection::turn`] has something to send.
    pub fn wants_turn(&self) -> bool {
        match self.phase {
            Phase::Greeting | Phase::Dialing | Phase::Draining | Phase::Closing => false,
            Phase::Requested => self.greet,
            Phase::Established => {
                let data = self.has_data() && self.to_guest.credit() > 0;
                self.greet || self.ended != self.told_ended || data || self.owes_update() || self.needs_credit()
            }
        }
    }

    /// Returns the next packet to the guest `cid`; its data goes to `room`. There may be more packets, for which the
    /// connection must wait until its next turn.
    pub fn turn(&mut self, cid: u64, room: Writer<'_>) -> Result<Turn, Fault> {
        let header = self.key.header(cid, Op::Unknown(0));
        let packet = |op, flags, len| Header { op, flags, len, ..header };
        if !self.wants_turn() {
            return Ok(Turn::Nothing);
        }
        if self.greet {
            self.greet = false;
            let op = if self.phase == Phase::Requested { Op::Request } else { Op::Response };
            return Ok(self.stamp(packet(op, 0, 0)));
        }
        if self.ended == self.told_ended && self.has_data() && self.to_guest.credit() > 0 {
            match self.read(room)? {
                Got::Data(len) => return Ok(self.stamp(packet(Op::Data, 0, len))),
                Got::Failed => return Ok(Turn::Reset),
                Got::Nothing | Got::End => {}
            }
        }
        if self.ended != self.told_ended {
            self.told_ended = self.ended;
            let shutdown = self.stamp(packet(Op::Shutdown, self.ended, 0));
            if self.ended == NOTHING {
                self.host_is_deaf();
                self.stream = None;
                self.enter(Phase::Closing);
            }
            return Ok(shutdown);
        }
        if self.owes_update() {
            return Ok(self.stamp(packet(Op::CreditUpdate, 0, 0)));
        }
        if self.needs_credit() {
            self.to_guest.asked = true;
            return Ok(self.stamp(packet(Op::CreditRequest, 0, 0)));
        }
        Ok(Turn::Nothing)
    }

    fn read(&mut self, room: Writer<'_>) -> Result<Got, Fault> {
        let Some(stream) = &mut self.stream else { return Ok(Got::Failed) };
        let got = self.to_guest.read(stream, room)?;
        if got == Got::End {
            self.ended |= if unix::hung_up(stream) { NOTHING } else { NO_SEND };
        }
        Ok(got)
    }

    fn stamp(&mut self, header: Header) -> Turn {
        Turn::Packet(self.to_host.stamp(header))
    }
}

/// Parses the port in `CONNECT <port>`.
fn port(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    match (words.next(), words.next(), words.next()) {
        (Some(connect), Some(port), None) if connect.eq_ignore_ascii_case("connect") => port.parse().ok(),
        _ => None,
    }
}
