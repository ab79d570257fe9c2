//! A pair of a receive and a transmit queue, between guest memory and a port.
//!
//! The handler keeps no descriptor chain between events: it puts back receive buffers that it popped but did not need,
//! and leaves a packet in the ring if the port does not take it now. It then waits for the guest's kick if it needs
//! buffers, and for the port's descriptor if it needs packets or room in the port.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use virtio_bindings::virtio_net::*;

use super::{Shared, control};
use crate::backend::packet::{HEADER, MAX_FRAME, MAX_SLICES, MIN_FRAME, Port, Received};
use crate::event::Interest;
use crate::memory::{GuestRam, RamSlice};
use crate::rate_limiter::{Alarm, RateLimiter};
use crate::virtio::chain::Chain;
use crate::virtio::queue::{BATCH, Queue};
use crate::virtio::{Context, Event, Fault, Handler, Progress};

const PORT: u64 = 0;
const CHANGED: u64 = 1;
const RX_ALARM: u64 = 2;
const TX_ALARM: u64 = 3;
/// Initial size of prepared room, enough for a frame of the usual MTU.
const USUAL: usize = 2048;

/// Serves one pair of queues, and the control queue if it is in the same share.
pub(super) struct Pair {
    shared: Arc<Shared>,
    number: usize,
    features: u64,
    /// Set if the driver uses this pair, as last set for the handler and the port.
    active: bool,
    /// Events for which the port is watched now.
    watched: Option<Interest>,
    /// Set while the guest has no receive buffers; its next kick announces some.
    starved: bool,
    /// Set while the port takes no packets; its descriptor becomes ready when it does.
    blocked: bool,
    /// Set if the last event that sent packets left some in the ring.
    sending: bool,
    /// Buffers that were popped but not yet used, with their writable bytes.
    held: Vec<(Chain, usize)>,
    /// Size of the room to prepare: that of the largest recent packet.
    usual: usize,
    /// Size of the packet that waits in the port for more room.
    waiting: usize,
    /// Alarms that ring when the rate limits let more packets through, to the guest and from it.
    rx_alarm: Option<Alarm>,
    tx_alarm: Option<Alarm>,
}

impl Pair {
    pub(super) fn new(shared: Arc<Shared>, number: usize, features: u64) -> io::Result<Self> {
        let alarm = |limiter: &Option<RateLimiter>| limiter.is_some().then(Alarm::new).transpose();
        Ok(Pair {
            rx_alarm: alarm(&shared.rx_limiter)?,
            tx_alarm: alarm(&shared.tx_limiter)?,
            shared,
            number,
            features,
            active: false,
            watched: None,
            starved: false,
            blocked: false,
            sending: false,
            held: Vec::new(),
            usual: USUAL,
            waiting: 0,
        })
    }

    fn has(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }

    /// Returns whether packets pass in both directions.
    fn is_up(&self) -> bool {
        self.active && self.shared.link_up()
    }
}

impl Handler for Pair {
    fn event(&mut self, event: Event, queues: &mut [Queue], cx: &Context<'_>) -> Result<Progress, Fault> {
        let shared = self.shared.clone();
        let (Some(mut port), [rx, tx, rest @ ..]) = (shared.port(self.number), queues) else {
            return Ok(Progress::Done);
        };
        let port = &mut **port;
        self.follow(port, cx);
        let progress = match event {
            Event::Start => {
                if let Some(changed) = self.shared.changed.get(self.number) {
                    cx.watch(changed.as_raw_fd(), CHANGED, Interest::Read)?;
                }
                for (alarm, token) in [(&self.rx_alarm, RX_ALARM), (&self.tx_alarm, TX_ALARM)] {
                    alarm.as_ref().map_or(Ok(()), |alarm| cx.watch(alarm.as_raw_fd(), token, Interest::Read))?;
                }
                Progress::Done
            }
            Event::Kick(0) => {
                self.starved = false;
                self.receive(port, rx, cx)?
            }
            Event::Kick(1) if self.blocked || is_set(&self.tx_alarm) => Progress::Done,
            Event::Kick(1) => self.transmit(port, tx, cx)?,
            Event::Kick(_) => match rest {
                [control, ..] if event == Event::Kick(2) && self.has(VIRTIO_NET_F_CTRL_VQ) => {
                    control.serve(cx.ram, |chain| control::request(&self.shared, chain, self.features, cx.ram))?
                }
                _ => Progress::Done,
            },
            Event::Ready(PORT) => {
                let sent = match (self.blocked, self.sending, is_set(&self.tx_alarm)) {
                    (false, false, _) | (false, true, true) => Progress::Done,
                    (_, _, false) => self.transmit(port, tx, cx)?,
                    // The rate limit delays new packets only, not the rest of a half-sent one.
                    (true, _, true) => {
                        self.blocked = would_block(port.flush());
                        Progress::Done
                    }
                };
                let received = if self.starved { Progress::Done } else { self.receive(port, rx, cx)? };
                if sent == Progress::More { sent } else { received }
            }
            Event::Ready(RX_ALARM) => {
                self.rx_alarm.iter_mut().for_each(Alarm::clear);
                self.receive(port, rx, cx)?
            }
            Event::Ready(TX_ALARM) => {
                self.tx_alarm.iter_mut().for_each(Alarm::clear);
                if self.blocked { Progress::Done } else { self.transmit(port, tx, cx)? }
            }
            Event::Ready(_) => {
                let _ = self.shared.changed.get(self.number).map(|changed| changed.read());
                self.transmit(port, tx, cx)?
            }
        };
        self.watch(port, cx)?;
        Ok(progress)
    }
}

/// Receiving (5.1.6.4).
impl Pair {
    fn receive(&mut self, port: &mut dyn Port, rx: &mut Queue, cx: &Context<'_>) -> Result<Progress, Fault> {
        let result = self.receive_batch(port, rx, cx);
        while let Some((chain, _)) = self.held.pop() {
            rx.unpop(chain);
        }
        result
    }

    fn receive_batch(&mut self, port: &mut dyn Port, rx: &mut Queue, cx: &Context<'_>) -> Result<Progress, Fault> {
        rx.disable_notifications(cx.ram)?;
        let mut largest = USUAL;
        for _ in 0..BATCH {
            if !self.is_up() || is_set(&self.rx_alarm) {
                return Ok(Progress::Done);
            }
            let (room, full) = self.hold(rx, self.usual.max(self.waiting), cx.ram)?;
            if room < self.waiting.max(1) {
                if full || self.held.len() >= usize::from(rx.size().max(1)) {
                    // There will never be enough room for this packet.
                    port.skip();
                    self.waiting = 0;
                } else if !rx.enable_notifications(cx.ram)? {
                    self.starved = true;
                    return Ok(Progress::Done);
                }
                continue;
            }
            match port.receive(&slices(&self.held, cx.ram)?) {
                Ok(Received::Packet(len)) => {
                    (self.waiting, largest) = (0, largest.max(len));
                    self.deliver(rx, len, cx.ram)?;
                    self.charge_received(len)?;
                }
                Ok(Received::NoRoom(len)) => (self.waiting, largest) = (len, largest.max(len)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.usual = largest;
                    return Ok(Progress::Done);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    self.lost(&e, cx);
                    return Ok(Progress::Done);
                }
            }
        }
        self.usual = largest;
        Ok(Progress::More)
    }

    /// Charges the rate limit for a received packet. A packet's size is known only after it has arrived, so the limit
    /// delays the next packet instead.
    fn charge_received(&mut self, len: usize) -> io::Result<()> {
        let (Some(limiter), Some(alarm)) = (&self.shared.rx_limiter, &mut self.rx_alarm) else { return Ok(()) };
        match limiter.charge(len.saturating_sub(HEADER) as u64) {
            Ok(()) => Ok(()),
            Err(wait) => alarm.set(wait),
        }
    }

    /// Pops buffers until they have room for `need` bytes: a single one without MRG_RXBUF (5.1.6.3.1), otherwise as
    /// many as needed, up to the limit of one packet. Returns the room, and whether there can be no more.
    fn hold(&mut self, rx: &mut Queue, need: usize, ram: &GuestRam) -> Result<(usize, bool), Fault> {
        let mergeable = self.has(VIRTIO_NET_F_MRG_RXBUF);
        let mut room: usize = self.held.iter().map(|(_, len)| *len).sum();
        let mut segments: usize = self.held.iter().map(|(chain, _)| chain.writable().len()).sum();
        while room < need {
            if !mergeable && !self.held.is_empty() {
                return Ok((room, true));
            }
            let Some(chain) = rx.pop(ram)? else { return Ok((room, false)) };
            segments += chain.writable().len();
            if segments > MAX_SLICES && !self.held.is_empty() {
                rx.unpop(chain);
                return Ok((room, true));
            }
            let len = chain.writable().iter().map(|s| s.len as usize).sum();
            if len < HEADER {
                return Err(Fault::Device("a network receive buffer is smaller than the header"));
            }
            room += len;
            self.held.push((chain, len));
        }
        Ok((room, false))
    }

    /// Returns the first buffers to the driver with a packet of `len` bytes in them, all in one step (5.1.6.4.1).
    fn deliver(&mut self, rx: &mut Queue, len: usize, ram: &GuestRam) -> Result<(), Fault> {
        let mut left = len;
        let mut used: u16 = 0;
        for (_, room) in &mut self.held {
            if left == 0 {
                break;
            }
            *room = left.min(*room);
            left -= *room;
            used += 1;
        }
        if let Some((first, _)) = self.held.first() {
            let mut header = first.writer(ram);
            header.take(HEADER as u64 - 2)?;
            header.write(&used.to_le_bytes())?;
        }
        let used = self.held.drain(..usize::from(used).min(self.held.len()));
        rx.push_used_together(ram, used.map(|(chain, len)| (chain, len as u32)))?;
        Ok(())
    }
}

/// Transmitting (5.1.6.2).
impl Pair {
    fn transmit(&mut self, port: &mut dyn Port, tx: &mut Queue, cx: &Context<'_>) -> Result<Progress, Fault> {
        self.blocked = false;
        let result = self.transmit_batch(port, tx, cx);
        self.sending = matches!(result, Ok(Progress::More));
        self.blocked |= would_block(port.flush());
        result
    }

    fn transmit_batch(&mut self, port: &mut dyn Port, tx: &mut Queue, cx: &Context<'_>) -> Result<Progress, Fault> {
        tx.disable_notifications(cx.ram)?;
        for _ in 0..BATCH {
            let Some(chain) = tx.next(cx.ram)? else { return Ok(Progress::Done) };
            if !self.may_send(&chain)? {
                tx.unpop(chain);
                return Ok(Progress::Done);
            }
            match self.send(port, &chain, cx.ram)? {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    tx.unpop(chain);
                    self.blocked = true;
                    return Ok(Progress::Done);
                }
                Err(e) => self.dropped(&e),
                Ok(()) => {}
            }
            tx.push_used(cx.ram, chain, 0)?;
        }
        Ok(Progress::More)
    }

    /// Returns whether the rate limit lets a packet through now; if not, sets the alarm.
    fn may_send(&mut self, chain: &Chain) -> io::Result<bool> {
        let (Some(limiter), Some(alarm)) = (&self.shared.tx_limiter, &mut self.tx_alarm) else { return Ok(true) };
        let len: u64 = chain.readable().iter().map(|segment| u64::from(segment.len)).sum();
        match limiter.take(len.saturating_sub(HEADER as u64).min(MAX_FRAME as u64)) {
            Ok(()) => Ok(true),
            Err(wait) => alarm.set(wait).map(|()| false),
        }
    }

    /// Sends a packet. The inner result concerns the packet, the outer one the device.
    fn send(&self, port: &mut dyn Port, chain: &Chain, ram: &GuestRam) -> Result<io::Result<()>, Fault> {
        let mut reader = chain.reader(ram);
        let mut header = [0; HEADER];
        if reader.read(&mut header).is_err() {
            return Err(Fault::Device("a network packet is shorter than its header"));
        }
        let len = reader.len();
        let fits = (MIN_FRAME as u64..=MAX_FRAME as u64).contains(&len) && chain.readable().len() <= MAX_SLICES;
        let invalid = |what| Ok(Err(io::Error::new(io::ErrorKind::InvalidData, what)));
        if !self.is_up() {
            return Ok(Ok(()));
        }
        if !fits {
            return invalid("invalid packet size");
        }
        let Some(header) = checked(header, self.features, len) else {
            return invalid("its header is invalid or uses features that were not negotiated");
        };
        let frame = reader.buffers()?;
        Ok(match port.send(&header, &frame) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => port.send(&header, &frame),
            result => result,
        })
    }

    /// Warns of a dropped packet. Losses are normal on a network, but the first may explain why there is no connection.
    fn dropped(&self, e: &io::Error) {
        self.shared.dropped.warn(format_args!("{}: dropped a packet from the guest: {e}", self.shared.name));
    }
}

/// Code that receiving and transmitting share.
impl Pair {
    /// Follows the driver's choice to use this pair or not. Called only between events, so that handler and port always
    /// agree.
    fn follow(&mut self, port: &mut dyn Port, cx: &Context<'_>) {
        let active = self.shared.is_active(self.number);
        if active == self.active || !self.shared.is_alive() {
            return;
        }
        (self.active, self.waiting, self.blocked) = (active, 0, false);
        if let Err(e) = port.set_active(active) {
            self.lost(&e, cx);
        }
    }

    /// Records the loss of the network; the guest sees the cable as unplugged (5.1.4).
    fn lost(&mut self, e: &io::Error, cx: &Context<'_>) {
        if self.shared.lost(e) {
            cx.interrupt.config_changed();
        }
    }

    /// Watches the port for packets and room as needed. A lost port is not watched, because it would always be ready.
    fn watch(&mut self, port: &dyn Port, cx: &Context<'_>) -> io::Result<()> {
        let receiving = !self.starved && !is_set(&self.rx_alarm);
        let wanted = match (self.is_up(), receiving, self.blocked) {
            (false, _, _) | (true, false, false) => None,
            (true, true, false) => Some(Interest::Read),
            (true, false, true) => Some(Interest::Write),
            (true, true, true) => Some(Interest::Both),
        };
        match (self.watched, wanted) {
            (was, now) if was == now => {}
            (None, Some(now)) => cx.watch(port.fd(), PORT, now)?,
            (Some(_), Some(now)) => cx.rewatch(port.fd(), PORT, now)?,
            (_, None) => cx.unwatch(port.fd())?,
        }
        self.watched = wanted;
        Ok(())
    }
}

fn would_block(result: io::Result<()>) -> bool {
    matches!(result, Err(e) if e.kind() == io::ErrorKind::WouldBlock)
}

fn is_set(alarm: &Option<Alarm>) -> bool {
    alarm.as_ref().is_some_and(Alarm::is_set)
}

/// Returns the memory of buffers, in order.
fn slices<'a>(held: &'a [(Chain, usize)], ram: &'a GuestRam) -> Result<Vec<RamSlice<'a>>, Fault> {
    let mut slices = Vec::with_capacity(held.len());
    for (chain, _) in held {
        for slice in chain.writer(ram).slices() {
            slices.push(slice?);
        }
    }
    Ok(slices)
}

/// Checks a packet's header and returns it as it may be sent (5.1.6.2.2): clears unknown flags, and refuses anything
/// that was not negotiated or points outside the packet.
fn checked(header: [u8; HEADER], features: u64, len: u64) -> Option<[u8; HEADER]> {
    let [flags, gso, h0, h1, s0, s1, c0, c1, o0, o1, _, _] = header;
    let has = |bit: u32| features & 1 << bit != 0;
    let flags = flags & VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
    let [start, offset] = [[c0, c1], [o0, o1]].map(|bytes| u64::from(u16::from_le_bytes(bytes)));
    let csum = if flags != 0 { has(VIRTIO_NET_F_CSUM) && start + offset + 2 <= len } else { true };
    let segmented = match u32::from(gso) & !VIRTIO_NET_HDR_GSO_ECN {
        VIRTIO_NET_HDR_GSO_NONE => gso == 0,
        VIRTIO_NET_HDR_GSO_TCPV4 => has(VIRTIO_NET_F_HOST_TSO4) && flags != 0,
        VIRTIO_NET_HDR_GSO_TCPV6 => has(VIRTIO_NET_F_HOST_TSO6) && flags != 0,
        _ => false,
    };
    let ecn = u32::from(gso) & VIRTIO_NET_HDR_GSO_ECN == 0 || has(VIRTIO_NET_F_HOST_ECN);
    let size = gso == 0 || [s0, s1] != [0, 0];
    (csum && segmented && ecn && size).then_some([flags, gso, h0, h1, s0, s1, c0, c1, o0, o1, 0, 0])
}
