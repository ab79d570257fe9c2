//! All connections of a device: assigns packets to them, and gives them turns.
//!
//! The muxer outlives the device's handlers, so that connections survive a pause. Readiness is edge-triggered and
//! recorded in the connection, so a side that is full does not wake the worker.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

use super::connection::{Connection, Greeting, Key, Phase, Turn, Verdict};
use super::packet::{HEADER, HOST_CID, Header, Op, STREAM};
use super::reset::TransportReset;
use super::{MAX_CONNECTIONS, TX};
use crate::backend::place::Place;
use crate::backend::unix::{self, Listener};
use crate::event::Interest;
use crate::log_limit::LogLimit;
use crate::virtio::chain::Chain;
use crate::virtio::queue::{BATCH, Queue};
use crate::virtio::{Context, Event, Fault, Progress};

/// Maximum number of resets that wait for a receive buffer. While there are as many, nothing is taken from the guest
/// until it adds buffers (5.10.6.1).
const MAX_RESETS: usize = 256;
/// Interval at which deadlines are checked while there are any.
const TICK: Duration = Duration::from_millis(100);
/// Host ports of connections that the host began, away from ports on which programs would listen.
const FIRST_PORT: u32 = 1 << 30;
const LAST_PORT: u32 = (1 << 31) - 1;

const LISTENER: u64 = 0;
const TIMER: u64 = 1;
const FIRST_SLOT: u64 = 2;

/// The connections of a device and the sockets that they come from.
pub struct Muxer {
    cid: u64,
    /// Location of the socket to which clients on the host connect; listeners for the guest's connections are beside
    /// it.
    place: Place,
    listener: Listener,
    timer: TimerFd,
    timer_armed: bool,
    slots: Vec<Option<Connection>>,
    free: Vec<usize>,
    /// Slots of the connections that the guest knows or is about to be sent.
    keys: HashMap<Key, usize>,
    /// Slots of the connections that have something to send to the guest, in the order of their turns.
    turns: VecDeque<usize>,
    /// Resets to send: for packets that belong to no connection, and for connections that have ended.
    resets: VecDeque<Header>,
    next_port: u32,
    /// Set if there may be packets from the guest.
    tx_due: bool,
    /// Set if there may be clients that could not be accepted.
    accept_due: bool,
    warnings: LogLimit,
    reset: TransportReset,
}

impl Muxer {
    /// Creates a muxer without connections.
    pub fn new(cid: u64, listener: Listener, timer: TimerFd) -> Self {
        Muxer {
            cid,
            place: listener.place().clone(),
            listener,
            timer,
            timer_armed: false,
            slots: Vec::new(),
            free: Vec::new(),
            keys: HashMap::new(),
            turns: VecDeque::new(),
            resets: VecDeque::new(),
            next_port: FIRST_PORT,
            tx_due: false,
            accept_due: false,
            warnings: LogLimit::default(),
            reset: TransportReset::default(),
        }
    }

    /// Closes all connections, because the driver starts again.
    pub fn clear(&mut self) {
        self.slots.clear();
        self.free.clear();
        self.keys.clear();
        self.turns.clear();
        self.resets.clear();
        self.tx_due = false;
        self.reset = TransportReset::default();
    }

    /// Makes the guest end its connections, which it was saved with but which do not exist.
    pub fn restored(&mut self) {
        self.clear();
        self.reset = TransportReset::after_restore();
    }

    /// Returns the number of connections in any phase.
    #[cfg(test)]
    pub fn connections(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    /// See [`crate::virtio::Handler::event`].
    pub fn event(&mut self, event: Event, queues: &mut [Queue], cx: &Context<'_>) -> Result<Progress, Fault> {
        let [rx, tx, events] = queues else { return Err(Fault::Device("a vsock device has three queues")) };
        let mut more = false;
        if self.reset.is_held() {
            self.note(event, cx)?;
            self.reset.advance(events, cx)?;
            self.arm();
            // The event that ended the wait is also handled normally.
            if self.reset.is_held() {
                return Ok(Progress::Done);
            }
        }
        match event {
            Event::Start => self.start(cx)?,
            Event::Ready(LISTENER) => more = self.accept(cx),
            Event::Ready(TIMER) => self.tick(cx),
            Event::Ready(token) => self.ready((token - FIRST_SLOT) as usize, cx),
            Event::Kick(queue) => self.tx_due |= queue == TX,
        }
        if self.tx_due {
            more |= self.take(tx, cx)?;
        }
        more |= self.give(rx, cx)?;
        self.reset.advance(events, cx)?;
        // Packets that were held back for lack of room for resets can be taken now.
        more |= self.tx_due && self.resets.len() < MAX_RESETS;
        Ok(if more { Progress::More } else { Progress::Done })
    }

    /// Records an event that cannot be handled yet.
    fn note(&mut self, event: Event, cx: &Context<'_>) -> io::Result<()> {
        match event {
            Event::Start => self.start(cx)?,
            Event::Ready(LISTENER) => self.accept_due = true,
            Event::Ready(TIMER) => self.timer_armed = false,
            Event::Ready(_) => {}
            Event::Kick(queue) => self.tx_due |= queue == TX,
        }
        Ok(())
    }

    /// Starts with a new worker, which watches nothing yet, and restarts all deadlines, because nothing could be
    /// served while no worker ran.
    fn start(&mut self, cx: &Context<'_>) -> io::Result<()> {
        cx.watch(self.listener.as_raw_fd(), LISTENER, Interest::ReadEdge)?;
        cx.watch(self.timer.as_raw_fd(), TIMER, Interest::ReadEdge)?;
        for (connection, token) in self.slots.iter_mut().zip(FIRST_SLOT..) {
            let Some(connection) = connection else { continue };
            connection.renew_deadline();
            connection.watching_room = connection.wants_room();
            if let Some(stream) = connection.stream() {
                cx.watch(stream.as_raw_fd(), token, interest(connection))?;
            }
        }
        self.arm();
        Ok(())
    }

    fn arm(&mut self) {
        let waiting = self.accept_due || self.reset.is_held();
        if !self.timer_armed && (waiting || self.slots.iter().flatten().any(|c| c.deadline.is_some())) {
            // The timer is not read when it fires: the edge is enough, and this resets it.
            self.timer_armed = self.timer.reset(TICK, None).is_ok();
        }
    }

    fn connection(&mut self, slot: usize) -> Option<&mut Connection> {
        self.slots.get_mut(slot)?.as_mut()
    }

    /// Adds a connection, unless there are too many.
    fn insert(&mut self, connection: Connection, cx: &Context<'_>) -> Option<usize> {
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None if self.slots.len() < MAX_CONNECTIONS => {
                self.slots.push(None);
                self.slots.len() - 1
            }
            None => return None,
        };
        if let Some(stream) = connection.stream()
            && let Err(e) = cx.watch(stream.as_raw_fd(), FIRST_SLOT + slot as u64, Interest::ReadEdge)
        {
            self.warnings.debug(format_args!("{}: cannot watch a connection: {e}", self.place.path().display()));
            self.free.push(slot);
            return None;
        }
        if connection.phase != Phase::Greeting {
            self.keys.insert(connection.key, slot);
        }
        *self.slots.get_mut(slot)? = Some(connection);
        self.settle(slot, Verdict::Keep, cx);
        Some(slot)
    }

    /// Applies the consequences of any event on a connection.
    fn settle(&mut self, slot: usize, verdict: Verdict, cx: &Context<'_>) {
        let Some(connection) = self.slots.get_mut(slot).and_then(Option::as_mut) else { return };
        let mut verdict = verdict;
        if verdict == Verdict::Keep && connection.watching_room != connection.wants_room() {
            connection.watching_room = connection.wants_room();
            let watched =
                connection.stream().map(|s| cx.rewatch(s.as_raw_fd(), FIRST_SLOT + slot as u64, interest(connection)));
            if watched.is_some_and(|watched| watched.is_err()) {
                verdict = Verdict::Reset;
            }
        }
        if verdict == Verdict::Reset {
            self.resets.push_back(connection.key.header(self.cid, Op::Reset));
        }
        let draining = connection.phase == Phase::Draining && verdict != Verdict::Gone;
        if verdict == Verdict::Keep && !draining {
            if connection.wants_turn() && !connection.queued {
                connection.queued = true;
                self.turns.push_back(slot);
            }
            if connection.deadline.is_some() {
                self.arm();
            }
            return;
        }
        if self.keys.get(&connection.key) == Some(&slot) {
            self.keys.remove(&connection.key);
        }
        if std::mem::take(&mut connection.queued) {
            self.turns.retain(|queued| *queued != slot);
        }
        if draining {
            self.watch_room(slot, cx);
        } else if let Some(gone) = self.slots.get_mut(slot) {
            *gone = None;
            self.free.push(slot);
        }
    }

    /// Watches for room to write the data that the guest has left behind.
    fn watch_room(&mut self, slot: usize, cx: &Context<'_>) {
        let Some(connection) = self.connection(slot) else { return };
        if std::mem::replace(&mut connection.watching_room, true) {
            return;
        }
        let watched =
            connection.stream().map(|s| cx.rewatch(s.as_raw_fd(), FIRST_SLOT + slot as u64, interest(connection)));
        if watched.is_none_or(|watched| watched.is_err()) {
            self.settle(slot, Verdict::Gone, cx);
        }
    }

    fn ready(&mut self, slot: usize, cx: &Context<'_>) {
        let Some(connection) = self.connection(slot) else { return };
        if connection.phase == Phase::Greeting {
            return self.greet(slot, cx);
        }
        let verdict = connection.ready();
        self.settle(slot, verdict, cx);
    }

    /// Handles the first line of a client on the host.
    fn greet(&mut self, slot: usize, cx: &Context<'_>) {
        let Some(connection) = self.connection(slot) else { return };
        let verdict = match connection.greeting() {
            Greeting::Wait => Verdict::Keep,
            Greeting::Bad => Verdict::Gone,
            Greeting::Port(guest) => {
                let key = self.free_key(guest);
                self.keys.insert(key, slot);
                if let Some(connection) = self.connection(slot) {
                    connection.request(key);
                }
                Verdict::Keep
            }
        };
        self.settle(slot, verdict, cx);
    }

    /// Returns an unused pair of ports. There are far more ports than connections.
    fn free_key(&mut self, guest: u32) -> Key {
        loop {
            let key = Key { host: self.next_port, guest };
            self.next_port = if self.next_port == LAST_PORT { FIRST_PORT } else { self.next_port + 1 };
            if !self.keys.contains_key(&key) {
                return key;
            }
        }
    }

    /// Accepts clients on the host; closes those for which there is no room.
    fn accept(&mut self, cx: &Context<'_>) -> bool {
        for _ in 0..BATCH {
            match self.listener.accept() {
                Ok(Some(stream)) => {
                    if self.insert(Connection::from_host(stream), cx).is_none() {
                        self.warnings.debug(format_args!("{}: too many connections", self.place.path().display()));
                    }
                }
                Ok(None) => {
                    self.accept_due = false;
                    return false;
                }
                Err(e) => {
                    self.warnings.warn(format_args!(
                        "{}: cannot accept connections; retrying: {e}",
                        self.place.path().display()
                    ));
                    self.accept_due = true;
                    self.arm();
                    return false;
                }
            }
        }
        true
    }

    /// Checks deadlines, and retries whatever has no event to wait for.
    fn tick(&mut self, cx: &Context<'_>) {
        self.timer_armed = false;
        // One batch of clients per tick is enough while the process is out of descriptors.
        if self.accept_due {
            self.accept(cx);
        }
        let (now, place) = (Instant::now(), self.place.clone());
        for slot in 0..self.slots.len() {
            let Some(connection) = self.connection(slot) else { continue };
            let verdict = match connection.deadline {
                Some(deadline) if deadline <= now => connection.expire(),
                Some(_) if connection.phase == Phase::Dialing => {
                    match unix::dial_at(&port_place(&place, connection.key.host)) {
                        Ok(stream) => self.dialed(slot, stream, cx),
                        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Verdict::Keep,
                        Err(_) => Verdict::Reset,
                    }
                }
                _ => continue,
            };
            self.settle(slot, verdict, cx);
        }
        self.arm();
    }

    fn dialed(&mut self, slot: usize, stream: std::os::unix::net::UnixStream, cx: &Context<'_>) -> Verdict {
        let watched = cx.watch(stream.as_raw_fd(), FIRST_SLOT + slot as u64, Interest::ReadEdge);
        match (watched, self.connection(slot)) {
            (Ok(()), Some(connection)) => {
                connection.dialed(stream);
                Verdict::Keep
            }
            _ => Verdict::Reset,
        }
    }

    /// Takes packets from the guest. Returns whether there may be more that can be taken now.
    fn take(&mut self, tx: &mut Queue, cx: &Context<'_>) -> Result<bool, Fault> {
        tx.disable_notifications(cx.ram)?;
        for _ in 0..BATCH {
            if self.resets.len() >= MAX_RESETS {
                return Ok(false);
            }
            let Some(chain) = tx.next(cx.ram)? else {
                self.tx_due = false;
                return Ok(false);
            };
            let result = self.packet(&chain, cx);
            tx.push_used(cx.ram, chain, 0)?;
            result?;
        }
        Ok(true)
    }

    fn packet(&mut self, chain: &Chain, cx: &Context<'_>) -> Result<(), Fault> {
        let mut reader = chain.reader(cx.ram);
        let mut header = [0; HEADER];
        reader.read(&mut header).map_err(|_| Fault::Device("a vsock packet is shorter than its header"))?;
        let header = Header::parse(&header);
        let key = Key { host: header.dst_port, guest: header.src_port };
        let ours = header.kind == STREAM && header.src_cid == self.cid && header.dst_cid == HOST_CID;
        let slot = self.keys.get(&key).copied().filter(|_| ours);
        let data = reader.take(header.len.into()).ok();
        if let Some(slot) = slot
            && let Some(connection) = self.connection(slot)
        {
            // If the stated length exceeds the data, the connection is reset; 5.10.6.4 specifies nothing better.
            let verdict = data.map_or(Ok(Verdict::Reset), |data| connection.handle(&header, data))?;
            self.settle(slot, verdict, cx);
        } else if ours && header.op == Op::Request && data.is_some() {
            self.connect(key, &header, cx);
        } else {
            self.refuse(&header);
        }
        Ok(())
    }

    /// Answers with a reset (5.10.6.4.1). A reset is never answered, because two sides could then answer each other
    /// forever.
    fn refuse(&mut self, header: &Header) {
        if header.op != Op::Reset {
            self.resets.push_back(header.reset());
        }
    }

    /// Connects the guest to a port of the host.
    fn connect(&mut self, key: Key, request: &Header, cx: &Context<'_>) {
        let place = port_place(&self.place, key.host);
        let stream = match unix::dial_at(&place) {
            Ok(stream) => Some(stream),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => None,
            Err(e) => {
                self.warnings.debug(format_args!("the guest cannot connect to {}: {e}", place.path().display()));
                return self.refuse(request);
            }
        };
        if self.insert(Connection::from_guest(key, request, stream), cx).is_none() {
            self.warnings.debug(format_args!("{}: too many connections", self.place.path().display()));
            self.refuse(request);
        }
    }

    /// Sends packets to the guest, one connection after the other. Returns whether there may be more.
    fn give(&mut self, rx: &mut Queue, cx: &Context<'_>) -> Result<bool, Fault> {
        for _ in 0..BATCH {
            if self.resets.is_empty() && self.turns.is_empty() {
                return Ok(false);
            }
            let Some(chain) = rx.next(cx.ram)? else { return Ok(false) };
            match self.fill(&chain, cx) {
                Ok(0) => rx.unpop(chain),
                Ok(written) => rx.push_used(cx.ram, chain, written)?,
                Err(fault) => {
                    rx.unpop(chain);
                    return Err(fault);
                }
            }
        }
        Ok(true)
    }

    /// Writes one packet; returns its length, or 0 if there is none.
    fn fill(&mut self, chain: &Chain, cx: &Context<'_>) -> Result<u32, Fault> {
        let mut room = chain.writer(cx.ram);
        let head = room.take(HEADER as u64);
        let mut head = head.map_err(|_| Fault::Device("a vsock receive buffer is shorter than a header"))?;
        if let Some(reset) = self.resets.pop_front() {
            head.write(&reset.bytes())?;
            return Ok(HEADER as u32);
        }
        let cid = self.cid;
        let Some(slot) = self.turns.pop_front() else { return Ok(0) };
        let Some(connection) = self.connection(slot) else { return Ok(0) };
        connection.queued = false;
        let (verdict, written) = match connection.turn(cid, room)? {
            Turn::Packet(header) => {
                head.write(&header.bytes())?;
                (Verdict::Keep, HEADER as u32 + header.len)
            }
            Turn::Nothing => (Verdict::Keep, 0),
            Turn::Reset => (Verdict::Reset, 0),
        };
        self.settle(slot, verdict, cx);
        Ok(written)
    }
}

fn interest(connection: &Connection) -> Interest {
    if connection.watching_room { Interest::ReadWriteEdge } else { Interest::ReadEdge }
}

/// Returns the location at which programs on the host listen for the guest's connections to `port`.
fn port_place(place: &Place, port: u32) -> Place {
    place.with_suffix(&format!("_{port}"))
}
