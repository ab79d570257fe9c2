//! All connections of a device: which packet is for which of them, and whose turn it is.
//!
//! It outlives the handlers of the device, so that connections survive a pause. Readiness is waited for as an edge and
//! noted in the connection, so that a side that is full keeps nobody awake.

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

/// Resets that wait for a receive buffer: with more, nothing is taken from the guest until it has made room (5.10.6.1).
const MAX_RESETS: usize = 256;
/// How often deadlines are looked at while there are some.
const TICK: Duration = Duration::from_millis(100);
/// Ports of the host's ends of connections that the host began, out of the way of those that anybody would listen on.
const FIRST_PORT: u32 = 1 << 30;
const LAST_PORT: u32 = (1 << 31) - 1;

const LISTENER: u64 = 0;
const TIMER: u64 = 1;
const FIRST_SLOT: u64 = 2;

/// The connections of a device and the sockets they come from.
pub struct Muxer {
    cid: u64,
    /// Where clients of the host connect; those that serve the guest's connections listen beside it.
    place: Place,
    listener: Listener,
    timer: TimerFd,
    timer_armed: bool,
    slots: Vec<Option<Connection>>,
    free: Vec<usize>,
    /// Those that the guest knows, or is about to hear of.
    keys: HashMap<Key, usize>,
    /// Those that have something for the guest, in the order of their turns.
    turns: VecDeque<usize>,
    /// Answers to what belongs to no connection, and the ends of some that are gone.
    resets: VecDeque<Header>,
    next_port: u32,
    /// There may be packets of the guest's.
    tx_due: bool,
    /// There may be clients that could not be accepted.
    accept_due: bool,
    warnings: LogLimit,
    reset: TransportReset,
}

impl Muxer {
    /// No connection yet.
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

    /// Closes all connections: the driver starts anew.
    pub fn clear(&mut self) {
        self.slots.clear();
        self.free.clear();
        self.keys.clear();
        self.turns.clear();
        self.resets.clear();
        self.tx_due = false;
        self.reset = TransportReset::default();
    }

    /// The guest believes in connections that do not exist: it was saved with them.
    pub fn restored(&mut self) {
        self.clear();
        self.reset = TransportReset::after_restore();
    }

    /// Connections there are, whatever their phase.
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
            // The event that ended the wait is also the first one of the time after it.
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
        // Held back for want of room for answers, and now there is some.
        more |= self.tx_due && self.resets.len() < MAX_RESETS;
        Ok(if more { Progress::More } else { Progress::Done })
    }

    /// Notes an event that cannot be dealt with yet.
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

    /// A new worker watches nothing yet, and time has passed in which nobody could keep a deadline.
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
            // Not read when it fires: the edge is enough, and this sets it back.
            self.timer_armed = self.timer.reset(TICK, None).is_ok();
        }
    }

    fn connection(&mut self, slot: usize) -> Option<&mut Connection> {
        self.slots.get_mut(slot)?.as_mut()
    }

    /// Takes a connection up, unless there are too many.
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
            self.warnings.debug(format_args!("{}: cannot wait for a connection: {e}", self.place.path().display()));
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

    /// After everything that a connection did: does what follows from it.
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

    /// What the guest has left behind goes out when the host takes it.
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

    /// A client of the host says which port it wants.
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

    /// There are far more ports than connections.
    fn free_key(&mut self, guest: u32) -> Key {
        loop {
            let key = Key { host: self.next_port, guest };
            self.next_port = if self.next_port == LAST_PORT { FIRST_PORT } else { self.next_port + 1 };
            if !self.keys.contains_key(&key) {
                return key;
            }
        }
    }

    /// Takes the host's clients; those for whom there is no room see their connection close.
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

    /// Looks at deadlines, and tries again what there is nothing to wait on for.
    fn tick(&mut self, cx: &Context<'_>) {
        self.timer_armed = false;
        // A batch of clients a tick is enough for one who is out of descriptors.
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
            if let Some(chain) = tx.pop(cx.ram)? {
                let result = self.packet(&chain, cx);
                tx.push_used(cx.ram, chain, 0)?;
                result?;
            } else if !tx.enable_notifications(cx.ram)? {
                self.tx_due = false;
                return Ok(false);
            }
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
            // What it says and what it has differ: 5.10.6.4 has nothing better for it either.
            let verdict = data.map_or(Ok(Verdict::Reset), |data| connection.handle(&header, data))?;
            self.settle(slot, verdict, cx);
        } else if ours && header.op == Op::Request && data.is_some() {
            self.connect(key, &header, cx);
        } else {
            self.refuse(&header);
        }
        Ok(())
    }

    /// 5.10.6.4.1; a reset is never answered, or two would talk for ever.
    fn refuse(&mut self, header: &Header) {
        if header.op != Op::Reset {
            self.resets.push_back(header.reset());
        }
    }

    /// The guest wants to connect to a port of the host's.
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

    /// Gives packets to the guest, one connection after the other. Returns whether there may be more.
    fn give(&mut self, rx: &mut Queue, cx: &Context<'_>) -> Result<bool, Fault> {
        for _ in 0..BATCH {
            if self.resets.is_empty() && self.turns.is_empty() {
                return Ok(false);
            }
            let Some(chain) = rx.pop(cx.ram)? else {
                if rx.enable_notifications(cx.ram)? {
                    continue;
                }
                return Ok(false);
            };
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

    /// Writes one packet; returns how long it is, 0 if there is none.
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

/// Where the host's programs listen for the guest's connections to `port`.
fn port_place(place: &Place, port: u32) -> Place {
    place.with_suffix(&format!("_{port}"))
}
