//! The vhost-user frontend: makes a daemon behind a unix socket serve virtqueues in guest memory, which the daemon
//! maps.
//!
//! ```text
//!   connect ─ features ─ protocol features, queues, owner ─┬─ start: features, memory, rings ─ stop: positions ─┐
//!                                                          └──────────────────────◀─────────────────────────────┘
//! ```
//!
//! A message is a header of three `u32` (request, flags, size of the payload) and a payload, in the byte order of this
//! machine; file descriptors accompany it. Addresses in the protocol are those of the frontend: ours are simply
//! guest-physical, so that a daemon learns nothing about this process's address space.
//!
//! The daemon is another program and is not trusted. Its answers must have the right form, and all requests of one call
//! here share one deadline, because a vCPU may wait for them. A daemon that violates either loses the connection. The
//! daemon shares all of guest memory; the file behind RAM is sealed, so that it cannot be truncated while the guest
//! uses it. A file that `--pmem` lets the guest write is guest memory too: any request may refer to it, and a user's
//! file cannot be sealed, so the daemon can change all of it. If the daemon truncates the file, vireo ends with a
//! message (`backend::mapped`).

#[cfg(test)]
#[allow(missing_docs)]
pub mod testing;
#[cfg(test)]
mod tests;
mod wire;

use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::FileType;
use vmm_sys_util::eventfd::EventFd;

use super::place::Place;
use super::unix;
use super::vhost::Ring;
use crate::memory::SharedRegion;
use wire::*;

/// Time that a daemon has for all answers to one call.
const PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 5 });

/// `VHOST_USER_F_PROTOCOL_FEATURES`, among the device's features.
const PROTOCOL_FEATURES: u64 = 1 << 30;
const PROTOCOL_MQ: u64 = 1 << 0;
const PROTOCOL_REPLY_ACK: u64 = 1 << 3;
const PROTOCOL_BACKEND_REQ: u64 = 1 << 5;
const PROTOCOL_CONFIG: u64 = 1 << 9;
/// Protocol features that we use.
const OURS: u64 = PROTOCOL_MQ | PROTOCOL_REPLY_ACK | PROTOCOL_BACKEND_REQ | PROTOCOL_CONFIG;

/// Largest configuration space (`VHOST_USER_MAX_CONFIG_SIZE`).
const MAX_CONFIG: usize = 256;
/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`, from the daemon.
const CONFIG_CHANGE: u32 = 2;
/// Largest payload accepted in a request of the daemon.
const MAX_REQUEST: usize = 512;

/// Request to the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum Request {
    GetFeatures = 1,
    SetFeatures = 2,
    SetOwner = 3,
    SetMemTable = 5,
    SetVringNum = 8,
    SetVringAddr = 9,
    SetVringBase = 10,
    GetVringBase = 11,
    SetVringKick = 12,
    SetVringCall = 13,
    GetProtocolFeatures = 15,
    SetProtocolFeatures = 16,
    GetQueueNum = 17,
    SetVringEnable = 18,
    SetBackendReqFd = 21,
    GetConfig = 24,
    SetConfig = 25,
}

/// Reasons why there is no usable daemon. Displays as one sentence.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket cannot be connected to.
    #[error("cannot connect to the vhost-user socket {path}{hint}")]
    Connect {
        /// Path of the socket.
        path: PathBuf,
        /// Advice for the user; may be empty.
        hint: &'static str,
        /// The OS error.
        source: io::Error,
    },
    /// The path is not a socket.
    #[error("{0} is not a socket")]
    NoSocket(PathBuf),
    /// The daemon does not follow the protocol.
    #[error("cannot use the vhost-user daemon at {path}")]
    Handshake {
        /// Path of the socket.
        path: PathBuf,
        /// Violation of the protocol.
        source: io::Error,
    },
}

/// A connection to a daemon.
#[derive(Debug)]
pub struct Frontend {
    stream: UnixStream,
    path: PathBuf,
    features: u64,
    protocol: u64,
    max_queues: Option<u16>,
    /// Time that the daemon has for everything that one call asks for.
    patience: Duration,
    /// Deadline of the answers to the current call.
    deadline: Instant,
    /// Channel on which the daemon reports changes of its configuration.
    channel: Option<Channel>,
    /// True once the handshake has succeeded.
    greeted: bool,
    /// Reason why the connection has ended.
    broken: Option<String>,
}

impl Frontend {
    /// Connects to the daemon that listens at `place` and queries its features.
    pub fn connect(place: &Place) -> Result<Self, Error> {
        let path = place.path();
        let stream = unix::dial_at(place).map_err(|source| {
            let kind = place.stat().ok().flatten().map(|stat| FileType::from_raw_mode(stat.st_mode));
            if kind.is_some_and(|kind| kind != FileType::Socket) {
                return Error::NoSocket(path.into());
            }
            let hint = match source.kind() {
                io::ErrorKind::NotFound => " (is the daemon running?)",
                io::ErrorKind::ConnectionRefused => " (nothing listens there; has the daemon ended?)",
                io::ErrorKind::WouldBlock => " (the listening process does not accept connections)",
                _ => "",
            };
            Error::Connect { path: path.into(), hint, source }
        })?;
        Self::over(stream, path, PATIENCE)
    }

    /// Uses an existing connection, which must be non-blocking. The daemon has `patience` to answer a call. `path` is
    /// used in messages.
    pub fn over(stream: UnixStream, path: &Path, patience: Duration) -> Result<Self, Error> {
        let mut frontend = Frontend {
            stream,
            path: path.into(),
            features: 0,
            protocol: 0,
            max_queues: None,
            patience,
            deadline: Instant::now() + patience,
            channel: None,
            greeted: false,
            broken: None,
        };
        frontend.shake_hands().map_err(|source| Error::Handshake { path: path.into(), source })?;
        frontend.greeted = true;
        Ok(frontend)
    }

    fn shake_hands(&mut self) -> io::Result<()> {
        self.features = self.ask_number(Request::GetFeatures)?;
        if self.features & PROTOCOL_FEATURES != 0 {
            let protocol = self.ask_number(Request::GetProtocolFeatures)? & OURS;
            self.tell(Request::SetProtocolFeatures, &protocol.to_ne_bytes(), &[])?;
            self.protocol = protocol;
        }
        if self.protocol & PROTOCOL_MQ != 0 {
            let queues = self.ask_number(Request::GetQueueNum)?;
            self.max_queues = Some(u16::try_from(queues).unwrap_or(u16::MAX));
        }
        self.tell(Request::SetOwner, &[], &[])?;
        if self.protocol & PROTOCOL_BACKEND_REQ != 0 {
            let (ours, its) = UnixStream::pair()?;
            ours.set_nonblocking(true)?;
            self.tell(Request::SetBackendReqFd, &[], &[its.as_fd()])?;
            self.channel = Some(Channel { stream: ours, buffer: Vec::new() });
        }
        Ok(())
    }

    /// Returns the virtqueue and device features that the daemon offers, without those of the protocol.
    pub fn features(&self) -> u64 {
        self.features & !PROTOCOL_FEATURES
    }

    /// Number of queues that the daemon serves, if it reports that.
    pub fn max_queues(&self) -> Option<u16> {
        self.max_queues
    }

    /// Returns true if the daemon has a configuration space.
    pub fn has_config(&self) -> bool {
        self.protocol & PROTOCOL_CONFIG != 0
    }

    /// Returns the reason why the connection has ended, if it has.
    pub fn broken(&self) -> Option<&str> {
        self.broken.as_deref()
    }

    /// Descriptor to wait on: readable when [`Frontend::look`] should be called.
    pub fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// Descriptor to wait on: readable when [`Frontend::config_changed`] should be called.
    pub fn channel_fd(&self) -> Option<RawFd> {
        self.channel.as_ref().map(|channel| channel.stream.as_raw_fd())
    }

    /// Checks the connection while no answer is due: fails if the daemon closed it or sent anything.
    pub fn look(&mut self) -> io::Result<()> {
        self.check()?;
        match unix::peek(&self.stream, &mut [0]) {
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(()),
            Err(e) => Err(self.fail(e)),
            Ok(0) => Err(self.fail(io::Error::new(io::ErrorKind::UnexpectedEof, "it has closed the connection"))),
            Ok(_) => Err(self.fail(invalid("it sent an answer without a request"))),
        }
    }

    /// Handles a limited number of the daemon's requests; returns true if its configuration has changed.
    pub fn config_changed(&mut self) -> io::Result<bool> {
        let Some(channel) = &mut self.channel else { return Ok(false) };
        match channel.take(Instant::now() + self.patience) {
            Ok(changed) => Ok(changed),
            Err(e) => {
                // The device works without the channel.
                self.channel = None;
                Err(e)
            }
        }
    }

    /// Returns the first `len` bytes of configuration space, at most 256.
    pub fn config(&mut self, len: usize) -> io::Result<Vec<u8>> {
        self.begin(self.patience);
        let len = len.min(MAX_CONFIG);
        let question = [&config_header(0, len)[..], &vec![0; len]].concat();
        let mut answer = vec![0; CONFIG_HEADER + MAX_CONFIG];
        let n = self.ask(Request::GetConfig, &question, &mut answer)?;
        match answer.get(CONFIG_HEADER..n) {
            Some(config) if config.len() == len => Ok(config.to_vec()),
            _ => Err(io::Error::other(format!("its configuration space does not have {len} bytes"))),
        }
    }

    /// Writes configuration space on behalf of the driver.
    pub fn set_config(&mut self, offset: u32, data: &[u8]) -> io::Result<()> {
        if data.len() > MAX_CONFIG {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.begin(self.patience);
        self.tell(Request::SetConfig, &[&config_header(offset, data.len())[..], data].concat(), &[])
    }

    /// Gives the daemon these virtqueues, and the part of [`Frontend::features`] that the driver negotiated. The
    /// virtqueues pass no requests before [`Frontend::enable`].
    pub fn start(&mut self, features: u64, memory: &[SharedRegion<'_>], rings: &[Ring<'_>]) -> io::Result<()> {
        self.begin(self.patience);
        let features = features & self.features | self.features & PROTOCOL_FEATURES;
        self.tell(Request::SetFeatures, &features.to_ne_bytes(), &[])?;
        self.set_memory(memory)?;
        for ring in rings {
            let index = u32::from(ring.index);
            self.tell(Request::SetVringNum, &pair(index, ring.size.into()), &[])?;
            self.tell(Request::SetVringBase, &pair(index, ring.next_avail.into()), &[])?;
            let (no_flags, no_log) = (pair(index, 0), 0u64.to_ne_bytes());
            let [desc, used, avail] = [ring.desc, ring.used, ring.avail].map(u64::to_ne_bytes);
            self.tell(Request::SetVringAddr, &[no_flags, desc, used, avail, no_log].concat(), &[])?;
            self.tell(Request::SetVringCall, &u64::from(index).to_ne_bytes(), &[borrowed(ring.call)])?;
            self.tell(Request::SetVringKick, &u64::from(index).to_ne_bytes(), &[borrowed(ring.kick)])?;
        }
        Ok(())
    }

    fn set_memory(&mut self, memory: &[SharedRegion<'_>]) -> io::Result<()> {
        if memory.len() > MAX_REGIONS {
            return Err(io::Error::other("guest memory has more regions than vhost-user knows"));
        }
        let mut payload = pair(memory.len() as u32, 0).to_vec();
        for SharedRegion { region, offset, .. } in memory {
            let fields = [region.start, region.len, region.start, *offset];
            payload.extend(fields.iter().flat_map(|field| field.to_ne_bytes()));
        }
        let fds: Vec<BorrowedFd<'_>> = memory.iter().map(|region| region.file).collect();
        self.tell(Request::SetMemTable, &payload, &fds)
    }

    /// Makes virtqueues pass requests, or stops them.
    pub fn enable(&mut self, rings: impl IntoIterator<Item = (u16, bool)>) -> io::Result<()> {
        if self.features & PROTOCOL_FEATURES == 0 {
            return Ok(());
        }
        self.begin(self.patience);
        let mut rings = rings.into_iter();
        rings.try_for_each(|(ring, on)| self.tell(Request::SetVringEnable, &pair(ring.into(), on.into()), &[]))
    }

    /// Makes the daemon finish the requests it has begun and leave the virtqueues; returns each one's next available
    /// entry.
    pub fn stop(&mut self, rings: &[u16]) -> io::Result<Vec<u16>> {
        // Requests that the daemon has begun may take longer than an answer.
        self.begin(self.patience * 2);
        rings.iter().map(|ring| self.stop_ring(*ring)).collect()
    }

    fn stop_ring(&mut self, ring: u16) -> io::Result<u16> {
        let mut answer = [0; 8];
        let n = self.ask(Request::GetVringBase, &pair(ring.into(), 0), &mut answer)?;
        let [i0, i1, i2, i3, n0, n1, n2, n3] = answer;
        let (index, next) = (u32::from_ne_bytes([i0, i1, i2, i3]), u32::from_ne_bytes([n0, n1, n2, n3]));
        match u16::try_from(next) {
            Ok(next) if n == answer.len() && index == u32::from(ring) => Ok(next),
            _ => Err(self.fail(invalid("it reported an invalid position in a ring"))),
        }
    }

    /// Begins a call, all parts of which must finish within `limit`.
    fn begin(&mut self, limit: Duration) {
        self.deadline = Instant::now() + limit;
    }

    /// Sends a message that has no answer of its own. A daemon that can acknowledge it must do so.
    fn tell(&mut self, request: Request, payload: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let acknowledged = self.protocol & PROTOCOL_REPLY_ACK != 0;
        self.send(request, if acknowledged { NEED_REPLY } else { 0 }, payload, fds)?;
        if !acknowledged {
            return Ok(());
        }
        let mut answer = [0; 8];
        let n = self.receive(request, &mut answer)?;
        match (n, u64::from_ne_bytes(answer)) {
            (8, 0) => Ok(()),
            (8, _) => Err(io::Error::other(format!("the daemon at {} refuses {request:?}", self.path.display()))),
            _ => Err(self.fail(invalid("its answer has the wrong size"))),
        }
    }

    fn ask_number(&mut self, request: Request) -> io::Result<u64> {
        let mut answer = [0; 8];
        match self.ask(request, &[], &mut answer)? {
            8 => Ok(u64::from_ne_bytes(answer)),
            _ => Err(self.fail(invalid("its answer has the wrong size"))),
        }
    }

    /// Sends a message and receives its answer; returns the answer's length.
    fn ask(&mut self, request: Request, payload: &[u8], answer: &mut [u8]) -> io::Result<usize> {
        self.send(request, 0, payload, &[])?;
        self.receive(request, answer)
    }

    fn send(&mut self, request: Request, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.check()?;
        let message = [&header(request as u32, VERSION | flags, payload.len()), payload].concat();
        send_all(&self.stream, &message, fds, self.deadline).map_err(|e| self.fail(e))
    }

    /// Receives the answer to `request`; returns its length.
    fn receive(&mut self, request: Request, answer: &mut [u8]) -> io::Result<usize> {
        let received = receive(&mut self.stream, request as u32, answer, self.deadline);
        received.map_err(|e| self.fail(e))
    }

    fn check(&self) -> io::Result<()> {
        match &self.broken {
            Some(why) => Err(io::Error::new(io::ErrorKind::BrokenPipe, why.clone())),
            None => Ok(()),
        }
    }

    /// Ends the connection: a daemon that violated the protocol once cannot be trusted afterwards.
    fn fail(&mut self, e: io::Error) -> io::Error {
        // During the handshake, the caller names the daemon.
        let why = match self.greeted {
            true => format!("the vhost-user daemon at {} is gone: {e}", self.path.display()),
            false => e.to_string(),
        };
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        self.channel = None;
        self.broken = Some(why.clone());
        io::Error::new(e.kind(), why)
    }
}

/// Channel for requests from the daemon.
#[derive(Debug)]
struct Channel {
    stream: UnixStream,
    buffer: Vec<u8>,
}

impl Channel {
    /// Handles the available requests; returns true if one reports that configuration space has changed.
    fn take(&mut self, deadline: Instant) -> io::Result<bool> {
        let mut changed = false;
        let mut bytes = [0; MAX_REQUEST];
        match self.stream.read(&mut bytes) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => self.buffer.extend_from_slice(bytes.get(..n).unwrap_or_default()),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(e) => return Err(e),
        }
        while let Some((head, rest)) = self.buffer.split_first_chunk::<HEADER>() {
            let (request, flags, size) = parse(head);
            if size > MAX_REQUEST {
                return Err(invalid("a request from the daemon is too large"));
            }
            if rest.len() < size {
                break;
            }
            self.buffer.drain(..HEADER + size);
            changed |= request == CONFIG_CHANGE;
            if flags & NEED_REPLY != 0 {
                let failed = u64::from(request != CONFIG_CHANGE);
                let reply = [&header(request, VERSION | REPLY, 8)[..], &failed.to_ne_bytes()].concat();
                send_all(&self.stream, &reply, &[], deadline)?;
            }
        }
        Ok(changed)
    }
}

#[allow(unsafe_code)]
fn borrowed(fd: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the eventfd owns its descriptor, and the result borrows the eventfd.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}
