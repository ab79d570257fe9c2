//! The front end of vhost-user: has a daemon at a unix socket serve rings in guest memory, which it maps.
//!
//! ```text
//!   connect ─ features ─ protocol features, queues, owner ─┬─ start: features, memory, rings ─ stop: positions ─┐
//!                                                          └──────────────────────◀─────────────────────────────┘
//! ```
//!
//! Messages are a header of three `u32` (request, flags, size of what follows) and a payload, in the byte order of this
//! machine; file descriptors travel beside them. Addresses in the protocol are "the front end's": ours are simply
//! guest-physical, so that a daemon learns nothing of where things are in this process.
//!
//! The daemon is another program, and may be anything: every answer has a deadline and a shape, and one that breaks
//! either ends the connection. Guest memory it shares as a whole; the file behind that is sealed, so that it cannot be
//! cut off under the guest.

use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::cmsg_space;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vmm_sys_util::eventfd::EventFd;

use super::unix;
use super::vhost::Ring;
use crate::memory::SharedRegion;

/// How long a daemon may take to answer.
const ANSWER: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 5 });
/// How long it may take to finish what it has begun, when it is stopped.
const STOP: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });

const HEADER: usize = 12;
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// `VHOST_USER_F_PROTOCOL_FEATURES`, among the device's features.
const PROTOCOL_FEATURES: u64 = 1 << 30;
const PROTOCOL_MQ: u64 = 1 << 0;
const PROTOCOL_REPLY_ACK: u64 = 1 << 3;
const PROTOCOL_BACKEND_REQ: u64 = 1 << 5;
const PROTOCOL_CONFIG: u64 = 1 << 9;
/// What we make use of.
const OURS: u64 = PROTOCOL_MQ | PROTOCOL_REPLY_ACK | PROTOCOL_BACKEND_REQ | PROTOCOL_CONFIG;

/// Most regions in one message.
const MAX_REGIONS: usize = 8;
/// Largest configuration space (`VHOST_USER_MAX_CONFIG_SIZE`).
const MAX_CONFIG: usize = 256;
/// Offset, size and flags before its contents.
const CONFIG_HEADER: usize = 12;
/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`, from the daemon.
const CONFIG_CHANGE: u32 = 2;
/// Largest payload that we take of a request of the daemon's.
const MAX_REQUEST: usize = 512;

/// What the daemon is asked for.
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

/// No daemon, or none that we can work with. Displays as one sentence.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody is there.
    #[error("cannot connect to the vhost-user socket {path}{hint}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What would help; may be empty.
        hint: &'static str,
        /// The OS error.
        source: io::Error,
    },
    /// Something else is at the path.
    #[error("{0} is no socket")]
    NoSocket(PathBuf),
    /// It does not speak the protocol.
    #[error("the vhost-user daemon at {path} does not answer as one")]
    Handshake {
        /// The socket.
        path: PathBuf,
        /// What was wrong.
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
    /// Where the daemon tells that its configuration has changed.
    channel: Option<Channel>,
    /// We understood each other at first.
    greeted: bool,
    /// Why nothing more will come of it.
    broken: Option<String>,
}

impl Frontend {
    /// Connects to the daemon that listens at `path`, and learns what it can.
    pub fn connect(path: &Path) -> Result<Self, Error> {
        let stream = unix::dial(path).map_err(|source| {
            let is_socket = std::fs::metadata(path).map(|meta| meta.file_type().is_socket());
            if let Ok(false) = is_socket {
                return Error::NoSocket(path.into());
            }
            let hint = match source.kind() {
                io::ErrorKind::NotFound => " (is the daemon running?)",
                io::ErrorKind::ConnectionRefused => " (nobody listens there: has the daemon ended?)",
                io::ErrorKind::WouldBlock => " (whoever listens there does not take connections)",
                _ => "",
            };
            Error::Connect { path: path.into(), hint, source }
        })?;
        let mut frontend = Frontend {
            stream,
            path: path.into(),
            features: 0,
            protocol: 0,
            max_queues: None,
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

    /// Features of rings and device that the daemon offers, but for those of the protocol.
    pub fn features(&self) -> u64 {
        self.features & !PROTOCOL_FEATURES
    }

    /// How many queues it serves, if it says so.
    pub fn max_queues(&self) -> Option<u16> {
        self.max_queues
    }

    /// Whether it has a configuration space.
    pub fn has_config(&self) -> bool {
        self.protocol & PROTOCOL_CONFIG != 0
    }

    /// Why nothing more will come of this connection, if it has ended.
    pub fn broken(&self) -> Option<&str> {
        self.broken.as_deref()
    }

    /// To wait on: readable when [`Frontend::look`] has something to say.
    pub fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// The same for [`Frontend::config_changed`].
    pub fn channel_fd(&self) -> Option<RawFd> {
        self.channel.as_ref().map(|channel| channel.stream.as_raw_fd())
    }

    /// Whether the connection is sound while nobody has asked for anything.
    pub fn look(&mut self) -> io::Result<()> {
        self.check()?;
        match unix::peek(&self.stream, &mut [0]) {
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(()),
            Err(e) => Err(self.fail(e)),
            Ok(0) => Err(self.fail(io::Error::new(io::ErrorKind::UnexpectedEof, "it has closed the connection"))),
            Ok(_) => Err(self.fail(invalid("it answers what nobody asked"))),
        }
    }

    /// Takes the daemon's requests, at most a few; whether its configuration has changed.
    pub fn config_changed(&mut self) -> io::Result<bool> {
        let Some(channel) = &mut self.channel else { return Ok(false) };
        match channel.take() {
            Ok(changed) => Ok(changed),
            Err(e) => {
                // Without it, it is still a device.
                self.channel = None;
                Err(e)
            }
        }
    }

    /// The first `len` bytes of configuration space, at most 256.
    pub fn config(&mut self, len: usize) -> io::Result<Vec<u8>> {
        let len = len.min(MAX_CONFIG);
        let question = [&config_header(0, len)[..], &vec![0; len]].concat();
        let mut answer = vec![0; CONFIG_HEADER + MAX_CONFIG];
        let n = self.ask(Request::GetConfig, &question, &mut answer, ANSWER)?;
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
        self.tell(Request::SetConfig, &[&config_header(offset, data.len())[..], data].concat(), &[])
    }

    /// Hands it these rings, with what the driver negotiated of [`Frontend::features`]; they wait for
    /// [`Frontend::enable`].
    pub fn start(&mut self, features: u64, memory: &[SharedRegion<'_>], rings: &[Ring<'_>]) -> io::Result<()> {
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

    /// Lets a ring pass requests, or not.
    pub fn enable(&mut self, ring: u16, on: bool) -> io::Result<()> {
        if self.features & PROTOCOL_FEATURES == 0 {
            return Ok(());
        }
        self.tell(Request::SetVringEnable, &pair(ring.into(), on.into()), &[])
    }

    /// Has it finish what it has begun with a ring and leave it alone; the next available entry.
    pub fn stop(&mut self, ring: u16) -> io::Result<u16> {
        let mut answer = [0; 8];
        let n = self.ask(Request::GetVringBase, &pair(ring.into(), 0), &mut answer, STOP)?;
        let [i0, i1, i2, i3, n0, n1, n2, n3] = answer;
        let (index, next) = (u32::from_ne_bytes([i0, i1, i2, i3]), u32::from_ne_bytes([n0, n1, n2, n3]));
        match u16::try_from(next) {
            Ok(next) if n == answer.len() && index == u32::from(ring) => Ok(next),
            _ => Err(self.fail(invalid("it does not know where it is in a ring"))),
        }
    }

    /// A message that has no answer of its own. Where the daemon can say whether it obeys, it must.
    fn tell(&mut self, request: Request, payload: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let acknowledged = self.protocol & PROTOCOL_REPLY_ACK != 0;
        self.send(request, if acknowledged { NEED_REPLY } else { 0 }, payload, fds)?;
        if !acknowledged {
            return Ok(());
        }
        let mut answer = [0; 8];
        let n = self.receive(request, &mut answer, ANSWER)?;
        match (n, u64::from_ne_bytes(answer)) {
            (8, 0) => Ok(()),
            (8, _) => Err(io::Error::other(format!("the daemon at {} refuses {request:?}", self.path.display()))),
            _ => Err(self.fail(invalid("its answer has the wrong size"))),
        }
    }

    fn ask_number(&mut self, request: Request) -> io::Result<u64> {
        let mut answer = [0; 8];
        match self.ask(request, &[], &mut answer, ANSWER)? {
            8 => Ok(u64::from_ne_bytes(answer)),
            _ => Err(self.fail(invalid("its answer has the wrong size"))),
        }
    }

    /// A message and its answer; returns how long that is.
    fn ask(&mut self, request: Request, payload: &[u8], answer: &mut [u8], limit: Duration) -> io::Result<usize> {
        self.send(request, 0, payload, &[])?;
        self.receive(request, answer, limit)
    }

    fn send(&mut self, request: Request, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.check()?;
        let message = [&header(request as u32, VERSION | flags, payload.len()), payload].concat();
        send_all(&self.stream, &message, fds, Instant::now() + ANSWER).map_err(|e| self.fail(e))
    }

    /// Takes the answer to `request`; returns how long it is.
    fn receive(&mut self, request: Request, answer: &mut [u8], limit: Duration) -> io::Result<usize> {
        let deadline = Instant::now() + limit;
        let received = receive(&mut self.stream, request as u32, answer, deadline);
        received.map_err(|e| self.fail(e))
    }

    fn check(&self) -> io::Result<()> {
        match &self.broken {
            Some(why) => Err(io::Error::new(io::ErrorKind::BrokenPipe, why.clone())),
            None => Ok(()),
        }
    }

    /// Ends the connection: who is not understood once cannot be believed later.
    fn fail(&mut self, e: io::Error) -> io::Error {
        // Else the caller names it.
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

/// Requests of the daemon's.
#[derive(Debug)]
struct Channel {
    stream: UnixStream,
    buffer: Vec<u8>,
}

impl Channel {
    /// Takes what is there; whether one of it says that configuration space has changed.
    fn take(&mut self) -> io::Result<bool> {
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
                return Err(invalid("a request of the daemon's is too large"));
            }
            if rest.len() < size {
                break;
            }
            self.buffer.drain(..HEADER + size);
            changed |= request == CONFIG_CHANGE;
            if flags & NEED_REPLY != 0 {
                let failed = u64::from(request != CONFIG_CHANGE);
                let reply = [&header(request, VERSION | REPLY, 8)[..], &failed.to_ne_bytes()].concat();
                send_all(&self.stream, &reply, &[], Instant::now() + ANSWER)?;
            }
        }
        Ok(changed)
    }
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn header(request: u32, flags: u32, size: usize) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    for (to, from) in bytes.chunks_mut(4).zip([request, flags, size as u32]) {
        to.copy_from_slice(&from.to_ne_bytes());
    }
    bytes
}

/// Request, flags and size.
fn parse(head: &[u8; HEADER]) -> (u32, u32, usize) {
    let [r0, r1, r2, r3, f0, f1, f2, f3, s0, s1, s2, s3] = *head;
    let size = u32::from_ne_bytes([s0, s1, s2, s3]) as usize;
    (u32::from_ne_bytes([r0, r1, r2, r3]), u32::from_ne_bytes([f0, f1, f2, f3]), size)
}

fn pair(first: u32, second: u32) -> [u8; 8] {
    let ([a, b, c, d], [e, f, g, h]) = (first.to_ne_bytes(), second.to_ne_bytes());
    [a, b, c, d, e, f, g, h]
}

fn config_header(offset: u32, len: usize) -> [u8; CONFIG_HEADER] {
    header(offset, len as u32, 0)
}

#[allow(unsafe_code)]
fn borrowed(fd: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the eventfd owns its descriptor, and the result borrows the eventfd.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}

/// Sends a message, descriptors with its first byte.
fn send_all(stream: &UnixStream, mut message: &[u8], fds: &[BorrowedFd<'_>], deadline: Instant) -> io::Result<()> {
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

/// Takes an answer of at most `answer.len()` bytes; returns how many it has.
fn receive(stream: &mut UnixStream, request: u32, answer: &mut [u8], deadline: Instant) -> io::Result<usize> {
    let mut head = [0; HEADER];
    receive_all(stream, &mut head, deadline)?;
    let (its_request, flags, size) = parse(&head);
    if its_request != request || flags & 3 != VERSION || flags & REPLY == 0 {
        return Err(invalid("it answers something else than it was asked"));
    }
    let payload = answer.get_mut(..size).ok_or_else(|| invalid("its answer is too long"))?;
    receive_all(stream, payload, deadline)?;
    Ok(size)
}

fn receive_all(stream: &mut UnixStream, mut bytes: &mut [u8], deadline: Instant) -> io::Result<()> {
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

fn wait(stream: &UnixStream, what: PollFlags, deadline: Instant) -> io::Result<()> {
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

#[cfg(test)]
#[allow(missing_docs)]
pub mod testing {
    //! A daemon for tests, that answers as it is told.

    use super::*;
    use std::os::unix::net::UnixListener;
    use std::sync::mpsc::{Receiver, channel};

    /// What a daemon does with a request.
    pub enum Answer {
        /// What a good one does: acknowledge, or answer with this payload.
        Good(Vec<u8>),
        /// These bytes, whatever they are.
        Raw(Vec<u8>),
        /// Nothing.
        Silence,
        /// It ends.
        End,
    }

    /// A daemon in a thread, for as many connections one after the other as there come.
    pub struct FakeDaemon {
        pub path: PathBuf,
        /// Requests and their payloads, in order.
        pub requests: Receiver<(u32, Vec<u8>)>,
        _dir: tempfile::TempDir,
    }

    /// How a good daemon with these features answers a request.
    pub fn good(features: u64, request: u32, payload: &[u8]) -> Vec<u8> {
        match request {
            1 => (features | PROTOCOL_FEATURES).to_ne_bytes().to_vec(),
            15 => (OURS & !PROTOCOL_BACKEND_REQ | 1 << 1).to_ne_bytes().to_vec(),
            17 => 5u64.to_ne_bytes().to_vec(),
            11 => [&payload[..4], &7u32.to_ne_bytes()].concat(),
            24 => [&payload[..CONFIG_HEADER], &(0..payload.len() - CONFIG_HEADER).map(|i| i as u8).collect::<Vec<_>>()]
                .concat(),
            _ => 0u64.to_ne_bytes().to_vec(),
        }
    }

    impl FakeDaemon {
        pub fn start(mut answer: impl FnMut(u32, &[u8]) -> Answer + Send + 'static) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("socket");
            let listener = UnixListener::bind(&path).unwrap();
            let (sender, requests) = channel();
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    let mut stream = stream.unwrap();
                    let mut head = [0; HEADER];
                    while stream.read_exact(&mut head).is_ok() {
                        let (request, flags, size) = parse(&head);
                        let mut payload = vec![0; size];
                        if stream.read_exact(&mut payload).is_err() {
                            break;
                        }
                        let asks = flags & NEED_REPLY != 0 || matches!(request, 1 | 11 | 15 | 17 | 24);
                        let reply = match answer(request, &payload) {
                            Answer::Good(_) if !asks => vec![],
                            Answer::Good(reply) => [&header(request, 5, reply.len())[..], &reply].concat(),
                            Answer::Raw(bytes) => bytes,
                            Answer::Silence => vec![],
                            Answer::End => break,
                        };
                        if sender.send((request, payload)).is_err() {
                            return;
                        }
                        let _ = io::Write::write_all(&mut stream, &reply);
                    }
                }
            });
            FakeDaemon { path, requests, _dir: dir }
        }

        /// A good one with these features.
        pub fn good(features: u64) -> Self {
            Self::start(move |request, payload| Answer::Good(good(features, request, payload)))
        }

        /// The requests until now.
        pub fn seen(&self) -> Vec<u32> {
            self.requests.try_iter().map(|(request, _)| request).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{Answer, FakeDaemon, good};
    use super::*;
    use crate::event::eventfd;
    use crate::memory::{GuestRam, MemoryConfig};
    use crate::options::Size;
    use proptest::prelude::*;

    const FEATURES: u64 = 1 << 32 | 1 << 29;

    fn ram() -> GuestRam {
        GuestRam::new(&MemoryConfig { size: Size(1 << 20), shared: true, ..MemoryConfig::default() }).unwrap()
    }

    fn start(frontend: &mut Frontend, ram: &GuestRam) -> io::Result<()> {
        let (kick, call) = (eventfd().unwrap(), eventfd().unwrap());
        let (index, size, next_avail) = (1, 8, 3);
        let (desc, avail, used) = (0x1000, 0x2000, 0x3000);
        let ring = Ring { index, size, next_avail, desc, avail, used, kick: &kick, call: &call };
        frontend.start(u64::MAX, &ram.shared_regions().unwrap(), &[ring])?;
        frontend.enable(1, true)
    }

    #[test]
    fn a_good_daemon_is_told_everything() {
        let daemon = FakeDaemon::good(FEATURES);
        let mut frontend = Frontend::connect(&daemon.path).unwrap();
        assert_eq!((frontend.features(), frontend.max_queues()), (FEATURES, Some(5)));
        assert_eq!(frontend.config(4).unwrap(), [0, 1, 2, 3]);
        frontend.set_config(32, &[1]).unwrap();
        let _ = daemon.seen();
        start(&mut frontend, &ram()).unwrap();
        let told: Vec<(u32, Vec<u8>)> = daemon.requests.try_iter().collect();
        assert_eq!(told.iter().map(|(request, _)| *request).collect::<Vec<_>>(), [2, 5, 8, 10, 9, 13, 12, 18]);
        assert_eq!(told[0].1, (FEATURES | PROTOCOL_FEATURES).to_ne_bytes(), "nothing that it did not offer");
        let numbers =
            |bytes: &[u8]| bytes.chunks(8).map(|c| u64::from_ne_bytes(c.try_into().unwrap())).collect::<Vec<_>>();
        assert_eq!(numbers(&told[1].1), [1, 0, 1 << 20, 0, 0], "one region, at its guest address");
        assert_eq!(numbers(&told[4].1), [1, 0x1000, 0x3000, 0x2000, 0]);
        assert_eq!(frontend.stop(1).unwrap(), 7);
        frontend.look().unwrap();
    }

    #[test]
    fn who_is_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let refused = |path: &Path| Frontend::connect(path).unwrap_err().to_string();
        let shown = path.display();
        assert_eq!(refused(&path), format!("cannot connect to the vhost-user socket {shown} (is the daemon running?)"));
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(refused(&path).ends_with("(nobody listens there: has the daemon ended?)"));
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "").unwrap();
        assert_eq!(refused(&path), format!("{shown} is no socket"));
    }

    /// A daemon that misbehaves at one request; what comes of it.
    fn misbehaves(at: u32, answer: fn() -> Answer) -> String {
        let daemon = FakeDaemon::start(move |request, payload| match request == at {
            true => answer(),
            false => Answer::Good(good(FEATURES, request, payload)),
        });
        let sentence =
            |e: &dyn std::error::Error| format!("{e}: {}", e.source().map_or(String::new(), |e| e.to_string()));
        let mut frontend = match Frontend::connect(&daemon.path) {
            Ok(frontend) => frontend,
            Err(e) => return sentence(&e),
        };
        let result = frontend.config(8).and_then(|_| start(&mut frontend, &ram())).and_then(|()| frontend.stop(1));
        let why = result.unwrap_err().to_string();
        if why.contains("is gone") {
            // Nobody waits for it again.
            let begin = Instant::now();
            assert!(frontend.look().is_err() && start(&mut frontend, &ram()).is_err());
            assert!(begin.elapsed() < ANSWER / 2);
        }
        why
    }

    #[test]
    fn no_daemon_is_waited_for_for_ever() {
        let begin = Instant::now();
        for at in [1, 15, 5, 24, 11] {
            assert!(misbehaves(at, || Answer::Silence).contains("it does not answer"), "{at}");
            assert!(misbehaves(at, || Answer::End).contains("it has closed the connection"), "{at}");
            // Half an answer.
            assert!(misbehaves(at, || Answer::Raw(vec![5, 0, 0])).contains("it does not answer"), "{at}");
        }
        assert!(begin.elapsed() < 11 * ANSWER);
    }

    #[test]
    fn answers_have_a_shape() {
        for at in [1, 15, 17, 5, 9, 18, 24, 11] {
            let wrong = misbehaves(at, || Answer::Raw(header(77, 5, 0).to_vec()));
            assert!(wrong.contains("it answers something else than it was asked"), "{at}: {wrong}");
            let long = misbehaves(at, || Answer::Good(vec![0; 4000]));
            assert!(long.contains("its answer is too long"), "{at}: {long}");
            let empty = misbehaves(at, || Answer::Good(vec![]));
            assert!(!empty.is_empty(), "{at}");
        }
        for at in [5, 8, 12] {
            let refused = misbehaves(at, || Answer::Good(1u64.to_ne_bytes().to_vec()));
            assert!(refused.contains(" refuses Set"), "{refused}");
        }
        let lost = misbehaves(11, || Answer::Good([1u32.to_ne_bytes(), 65_536u32.to_ne_bytes()].concat()));
        assert!(lost.contains("it does not know where it is in a ring"), "{lost}");
    }

    #[test]
    fn who_speaks_unasked_is_not_believed() {
        let daemon = FakeDaemon::start(|request, payload| match request {
            18 => Answer::Raw([&header(18, 5, 8)[..], &[0; 8], b"more"].concat()),
            _ => Answer::Good(good(FEATURES, request, payload)),
        });
        let mut frontend = Frontend::connect(&daemon.path).unwrap();
        frontend.look().unwrap();
        start(&mut frontend, &ram()).unwrap();
        assert!(frontend.look().unwrap_err().to_string().contains("it answers what nobody asked"));
    }

    #[test]
    fn requests_of_the_daemon() {
        let (ours, mut its) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut channel = Channel { stream: ours, buffer: vec![] };
        assert!(!channel.take().unwrap());
        let mut say = |bytes: &[u8]| io::Write::write_all(&mut its, bytes).unwrap();
        say(&header(CONFIG_CHANGE, 9, 0)[..5]);
        assert!(!channel.take().unwrap());
        say(&header(CONFIG_CHANGE, 9, 0)[5..]);
        assert!(channel.take().unwrap());
        say(&[&header(3, 9, 4)[..], &[1; 4]].concat());
        assert!(!channel.take().unwrap());
        say(&header(CONFIG_CHANGE, 1, MAX_REQUEST + 1));
        assert!(channel.take().is_err());
        let mut answers = [0; 40];
        its.read_exact(&mut answers).unwrap();
        assert_eq!((&answers[..12], answers[12], answers[32]), (&header(CONFIG_CHANGE, 5, 8)[..], 0, 1));
        drop(its);
        assert!(channel.take().is_err());
    }

    #[test]
    fn shared_memory_cannot_be_cut_off() {
        let ram = ram();
        let region = ram.shared_regions().unwrap()[0];
        let file = std::fs::File::from(region.file.try_clone_to_owned().unwrap());
        assert!(file.set_len(0).is_err() && file.set_len(2 << 20).is_err());
        assert!(GuestRam::anonymous(1 << 20).shared_regions().is_none());
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, cases: 64, ..ProptestConfig::default() })]

        /// Answers with some bits flipped or anything appended are survived, in time.
        #[test]
        fn any_answer_is_survived(
            flips in prop::collection::vec((0..24usize, 0..8u8, any::<bool>()), 1..30),
            tail in prop::collection::vec(any::<u8>(), 0..4),
        ) {
            let mut step = 0;
            let daemon = FakeDaemon::start(move |request, payload| {
                let answer = good(FEATURES, request, payload);
                let mut bytes = [&header(request, 5, answer.len())[..], &answer].concat();
                step += 1;
                if let Some((at, bit, true)) = flips.get(step) {
                    if let Some(byte) = bytes.get_mut(*at) {
                        *byte ^= 1 << bit;
                    }
                    bytes.extend(&tail);
                }
                // What is not waited for must not be sent.
                if matches!(request, 2 | 3 | 16) && step < 4 { Answer::Silence } else { Answer::Raw(bytes) }
            });
            if let Ok(mut frontend) = Frontend::connect(&daemon.path) {
                let _ = frontend.config(60);
                let _ = start(&mut frontend, &ram());
                let _ = frontend.stop(1);
                let _ = frontend.look();
            }
        }
    }
}
