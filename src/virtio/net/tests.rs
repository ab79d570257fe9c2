use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};

use proptest::prelude::*;

use super::*;
use crate::backend::packet::{self, HEADER, Received};
use crate::event::Poller;
use crate::memory::{GuestRam, RamSlice};
use crate::virtio::testing::{Buf, EVENT_IDX, FakeQueue, Loopback, inn, out};
use crate::virtio::{Context, Event, Fault, Progress};

const RAM: u64 = 1 << 20;
const B: u64 = 0x4_0000;
const TX: u64 = 0x2_0000;
const MRG: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const CTRL: u64 = 1 << VIRTIO_NET_F_CTRL_VQ;

/// Both ends' view of the wire: packets to receive, packets sent, and the port's state.
#[derive(Default)]
struct Wire {
    incoming: VecDeque<Vec<u8>>,
    sent: Vec<Vec<u8>>,
    /// Number of packets that the port still takes; unlimited if `None`.
    room: Option<usize>,
    gone: bool,
    skipped: usize,
    active: bool,
    offloads: Offloads,
    reads: usize,
}

struct FakePort(Arc<Mutex<Wire>>, EventFd);

impl Port for FakePort {
    fn fd(&self) -> RawFd {
        self.1.as_raw_fd()
    }
    fn receive(&mut self, room: &[RamSlice<'_>]) -> io::Result<Received> {
        let mut wire = self.0.lock().unwrap();
        wire.reads += 1;
        if wire.gone {
            return Err(io::Error::from_raw_os_error(libc::EBADFD));
        }
        let Some(packet) = wire.incoming.pop_front() else { return Err(io::ErrorKind::WouldBlock.into()) };
        if packet.len() > packet::len(room) {
            let len = packet.len();
            wire.incoming.push_front(packet);
            return Ok(Received::NoRoom(len));
        }
        packet::copy_to_guest(&packet, room);
        Ok(Received::Packet(packet.len()))
    }
    fn skip(&mut self) {
        let mut wire = self.0.lock().unwrap();
        wire.skipped += 1;
        wire.incoming.pop_front();
    }
    fn send(&mut self, header: &[u8; HEADER], frame: &[RamSlice<'_>]) -> io::Result<()> {
        let mut wire = self.0.lock().unwrap();
        match &mut wire.room {
            Some(0) => return Err(io::ErrorKind::WouldBlock.into()),
            Some(room) => *room -= 1,
            None => {}
        }
        let mut body = vec![0; packet::len(frame)];
        packet::copy_from_guest(frame, &mut body);
        wire.sent.push([&header[..], &body].concat());
        Ok(())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        self.0.lock().unwrap().offloads = offloads;
        Ok(())
    }
    fn set_active(&mut self, active: bool) -> io::Result<()> {
        self.0.lock().unwrap().active = active;
        Ok(())
    }
}

struct Setup {
    ram: GuestRam,
    net: Net,
    wires: Vec<Arc<Mutex<Wire>>>,
    rx: FakeQueue,
    tx: FakeQueue,
    control: FakeQueue,
    shares: Vec<Share>,
    wire: Loopback,
}

fn net(pairs: usize) -> (Net, Vec<Arc<Mutex<Wire>>>) {
    net_with(pairs, None, Extras::default())
}

fn net_with(pairs: usize, elsewhere: Option<Arc<dyn Elsewhere>>, extras: Extras) -> (Net, Vec<Arc<Mutex<Wire>>>) {
    let wires: Vec<Arc<Mutex<Wire>>> = (0..pairs).map(|_| Arc::default()).collect();
    let port = |wire: &Arc<Mutex<Wire>>| Box::new(FakePort(wire.clone(), eventfd().unwrap())) as Box<dyn Port>;
    let ports = wires.iter().map(port).collect();
    let extras = Extras { mtu: Some(1400), offloads: OFFLOADS, ..extras };
    (Net::build("net0".into(), ports, elsewhere, Mac([2, 0, 0, 0, 0, 1]), extras).unwrap(), wires)
}

impl Setup {
    fn new(features: u64) -> Self {
        Self::with(features, 1, 16)
    }

    /// Creates a card with the first pair's queues and the control queue; all other queues are disabled.
    fn with(features: u64, pairs: usize, size: u16) -> Self {
        Self::of(net(pairs), features, pairs, size)
    }

    fn of((mut net, wires): (Net, Vec<Arc<Mutex<Wire>>>), features: u64, pairs: usize, size: u16) -> Self {
        let ram = GuestRam::anonymous(RAM);
        let [rx, tx, control] = [0x1000, 0x4000, 0x7000].map(|base| FakeQueue::new(&ram, base, size));
        let wire = Loopback::new(&ram);
        let mut queues = vec![rx.device(features), tx.device(features)];
        let control_at = if features & 1 << VIRTIO_NET_F_MQ != 0 { 2 * pairs } else { 2 };
        for i in 2..=2 * pairs {
            let state = control.state();
            queues.push(match i == control_at {
                true => Queue::new(i as u16, state, size, features, &ram).unwrap(),
                false => Queue::disabled(i as u16, state),
            });
        }
        let activation =
            Activation { ram: ram.clone(), features, queues, kicks: vec![].into(), interrupt: wire.interrupt.clone() };
        let Ok(Activated::Here(shares)) = net.activate(activation) else { panic!() };
        Setup { ram, net, wires, rx, tx, control, shares, wire }
    }

    fn event(&mut self, event: Event) -> Result<(), Fault> {
        let share = &mut self.shares[0];
        let result = self.wire.deliver(&mut *share.handler, &mut share.queues, event);
        assert!(result.is_err() || share.queues.iter().all(|q| q.in_flight() == 0), "something is held");
        result
    }

    fn incoming(&self, len: usize) -> Vec<u8> {
        let mut packet: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
        packet[..HEADER].fill(0);
        self.wires[0].lock().unwrap().incoming.push_back(packet.clone());
        packet
    }

    /// Makes a packet with this header available, cut into buffers of these lengths and the rest.
    fn send(&mut self, header: [u8; HEADER], frame: &[u8], cut: &[u32]) -> Result<(), Fault> {
        self.ram.write(TX, &header).unwrap();
        self.ram.write(TX + HEADER as u64, frame).unwrap();
        let mut at = TX;
        let all = (HEADER + frame.len()) as u32;
        let rest = all - cut.iter().sum::<u32>();
        let mut bufs = vec![];
        for &len in cut.iter().chain([&rest]) {
            bufs.push(out(at, len));
            at += u64::from(len);
        }
        self.tx.add(&bufs).unwrap();
        self.event(Event::Kick(1))
    }

    fn sent(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.wires[0].lock().unwrap().sent)
    }

    /// Sends a command and returns the answer.
    fn command(&mut self, bytes: &[u8]) -> u8 {
        self.ram.write(TX, bytes).unwrap();
        self.ram.write_obj(TX + 0x1000, 0xEEu8).unwrap();
        self.control.add(&[out(TX, bytes.len() as u32), inn(TX + 0x1000, 1)]).unwrap();
        self.event(Event::Kick(2)).unwrap();
        assert_eq!(self.control.take_used().unwrap().1, 1);
        self.ram.read_obj(TX + 0x1000).unwrap()
    }

    fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read(addr, &mut bytes).unwrap();
        bytes
    }
}

fn with_buffers(mut packet: Vec<u8>, buffers: u16) -> Vec<u8> {
    packet[10..12].copy_from_slice(&buffers.to_le_bytes());
    packet
}

#[test]
fn a_packet_is_spread_over_merged_buffers() {
    for features in [MRG, MRG | RING_FEATURES] {
        let mut s = Setup::new(features);
        for i in 0..6 {
            s.rx.add(&[inn(B + i * 1000, 5), inn(B + i * 1000 + 5, 495)]).unwrap();
        }
        let (first, second) = (s.incoming(1234), s.incoming(500));
        s.event(Event::Kick(0)).unwrap();
        let used: Vec<u32> = std::iter::from_fn(|| s.rx.take_used()).map(|(_, len)| len).collect();
        assert_eq!(used, [500, 500, 234, 500], "all but the last of a packet are full");
        let got = [s.read(B, 500), s.read(B + 1000, 500), s.read(B + 2000, 234)].concat();
        assert_eq!(got, with_buffers(first, 3));
        assert_eq!(s.read(B + 3000, 500), with_buffers(second, 1));
    }
}

#[test]
fn without_merging_a_packet_has_one_buffer_or_is_dropped() {
    let mut s = Setup::new(0);
    for i in 0..3 {
        s.rx.add(&[inn(B + i * 2000, 1526)]).unwrap();
    }
    let small = s.incoming(100);
    s.incoming(1527);
    let full = s.incoming(1526);
    s.event(Event::Kick(0)).unwrap();
    let used: Vec<u32> = std::iter::from_fn(|| s.rx.take_used()).map(|(_, len)| len).collect();
    assert_eq!(used, [100, 1526]);
    assert_eq!(s.read(B, 100), with_buffers(small, 1));
    assert_eq!(s.read(B + 2000, 1526), with_buffers(full, 1));
    assert_eq!(s.wires[0].lock().unwrap().skipped, 1);
}

#[test]
fn a_packet_waits_for_enough_buffers_without_spinning() {
    for features in [MRG, MRG | EVENT_IDX] {
        let mut s = Setup::new(features);
        let packet = s.incoming(1000);
        s.event(Event::Kick(0)).unwrap();
        assert_eq!(s.wires[0].lock().unwrap().reads, 0, "without a buffer nothing is read");
        for i in 0..3 {
            let before = s.rx.avail_idx;
            s.rx.add(&[inn(B + i * 400, 400)]).unwrap();
            assert!(s.rx.must_kick(before, features), "a device without buffers asks for a kick");
            s.event(Event::Kick(0)).unwrap();
            // The port is not watched in the meantime.
            assert_eq!(s.rx.take_used().is_some(), i == 2);
        }
        assert_eq!(s.read(B, 1000), with_buffers(packet, 3));
    }
}

#[test]
fn a_packet_larger_than_the_whole_ring_is_dropped() {
    let mut s = Setup::with(MRG, 1, 4);
    for i in 0..4 {
        s.rx.add(&[inn(B + i * 100, 100)]).unwrap();
    }
    s.incoming(401);
    let next = s.incoming(20);
    s.event(Event::Kick(0)).unwrap();
    assert_eq!(s.wires[0].lock().unwrap().skipped, 1);
    assert_eq!(s.rx.take_used().unwrap().1, 20);
    assert_eq!(s.read(B, 20), with_buffers(next, 1));
}

#[test]
fn receive_buffers_have_room_for_the_header() {
    for (features, bufs) in [(MRG, vec![inn(B, 11)]), (0, vec![out(B, 100)]), (MRG, vec![inn(B, 0)])] {
        let mut s = Setup::new(features);
        s.rx.add(&bufs).unwrap();
        s.incoming(100);
        let fault = s.event(Event::Kick(0)).unwrap_err().to_string();
        assert_eq!(fault, "a network receive buffer is smaller than the header");
    }
}

#[test]
fn packets_are_sent_however_they_are_cut() {
    let mut s = Setup::new(0);
    let frame: Vec<u8> = (0..1514u32).map(|i| (i % 249) as u8).collect();
    for cut in [&[][..], &[12], &[1, 5, 7, 100], &[13], &[12, 14, 1000]] {
        s.send([0; HEADER], &frame, cut).unwrap();
        assert_eq!(s.tx.take_used().unwrap().1, 0);
        assert_eq!(s.sent(), [[&[0; HEADER][..], &frame].concat()]);
    }
}

#[test]
fn what_is_no_packet_is_not_sent() {
    let mut s = Setup::new(0);
    for len in [0, 1, 13, 65_554, 100_000] {
        s.send([0; HEADER], &vec![1; len], &[]).unwrap();
        assert!(s.tx.take_used().is_some());
        assert_eq!(s.sent().len(), 0, "{len}");
    }
    for len in [14, 65_553] {
        s.send([0; HEADER], &vec![1; len], &[]).unwrap();
        assert_eq!(s.sent().len(), 1, "{len}");
    }
    s.tx.add(&[out(TX, 11)]).unwrap();
    assert_eq!(s.event(Event::Kick(1)).unwrap_err().to_string(), "a network packet is shorter than its header");
    let mut s = Setup::new(0);
    s.tx.add(&[inn(TX, 100)]).unwrap();
    assert!(s.event(Event::Kick(1)).is_err());
}

#[test]
fn headers_ask_only_for_what_was_negotiated() {
    let csum = 1 << VIRTIO_NET_F_CSUM;
    let (tso4, tso6) = (csum | 1 << VIRTIO_NET_F_HOST_TSO4, csum | 1 << VIRTIO_NET_F_HOST_TSO6);
    let ecn = 1 << VIRTIO_NET_F_HOST_ECN;
    let header = |flags, gso, size: u16, start: u16, offset: u16| {
        let ([s0, s1], [c0, c1], [o0, o1]) = (size.to_le_bytes(), start.to_le_bytes(), offset.to_le_bytes());
        [flags, gso, 0, 0, s0, s1, c0, c1, o0, o1, 0xFF, 0xFF]
    };
    for (features, header, good) in [
        (0, header(0, 0, 0, 0, 0), true),
        (0, header(0xFE, 0, 0, 0, 0), true),
        (0, header(1, 0, 0, 34, 16), false),
        (csum, header(1, 0, 0, 34, 16), true),
        (csum, header(1, 0, 0, 98, 0), true),
        (csum, header(1, 0, 0, 98, 1), false),
        (csum, header(1, 0, 0, u16::MAX, u16::MAX), false),
        (csum, header(1, 1, 1448, 34, 16), false),
        (tso4, header(1, 1, 1448, 34, 16), true),
        (tso4, header(0, 1, 1448, 34, 16), false),
        (tso4, header(1, 1, 0, 34, 16), false),
        (tso4, header(1, 0x81, 1448, 34, 16), false),
        (tso4 | ecn, header(1, 0x81, 1448, 34, 16), true),
        (tso4 | ecn, header(1, 0x80, 1448, 34, 16), false),
        (tso4, header(1, 4, 1448, 34, 16), false),
        (tso6, header(1, 4, 1448, 34, 16), true),
        (!RING_FEATURES, header(1, 3, 1448, 34, 16), false),
        (!RING_FEATURES, header(1, 5, 1448, 34, 16), false),
        (!RING_FEATURES, header(0xFF, 0xFF, 0xFFFF, 0xFFFF, 0xFFFF), false),
    ] {
        let mut s = Setup::new(features & !(1 << VIRTIO_NET_F_MQ));
        s.send(header, &[1; 100], &[]).unwrap();
        let sent = s.sent();
        assert_eq!(sent.len(), usize::from(good), "{header:?}");
        for packet in sent {
            assert_eq!((packet[0] & !1, &packet[10..12]), (0, &[0, 0][..]), "unknown flags are cleared");
        }
    }
}

#[test]
fn a_full_port_stops_sending_until_it_has_room() {
    let mut s = Setup::new(EVENT_IDX);
    s.wires[0].lock().unwrap().room = Some(1);
    s.event(Event::Start).unwrap();
    for _ in 0..2 {
        s.send([0; HEADER], &[7; 60], &[]).unwrap();
    }
    s.event(Event::Kick(1)).unwrap();
    assert_eq!((s.sent().len(), s.tx.take_used().is_some(), s.tx.take_used()), (1, true, None));
    s.wires[0].lock().unwrap().room = None;
    s.event(Event::Kick(1)).unwrap();
    assert_eq!(s.sent().len(), 0, "a kick does not make room");
    s.event(Event::Ready(0)).unwrap();
    assert_eq!((s.sent().len(), s.tx.take_used().is_some()), (1, true));
}

#[test]
fn a_full_ring_is_sent_once_there_is_room() {
    let mut s = Setup::with(EVENT_IDX, 1, 256);
    s.wires[0].lock().unwrap().room = Some(0);
    s.ram.write(TX, &[0; 64]).unwrap();
    for _ in 0..256 {
        s.tx.add(&[out(TX, 64)]).unwrap();
    }
    s.event(Event::Kick(1)).unwrap();
    s.wires[0].lock().unwrap().room = None;
    s.event(Event::Ready(0)).unwrap();
    assert_eq!(s.sent().len(), 256);
    let before = s.tx.avail_idx;
    s.tx.take_used().unwrap();
    s.tx.add(&[out(TX, 64)]).unwrap();
    assert!(s.tx.must_kick(before, EVENT_IDX));
}

#[test]
fn an_event_is_bounded_work() {
    let mut s = Setup::with(MRG, 1, 256);
    for i in 0..256 {
        s.rx.add(&[inn(B + i * 64, 64)]).unwrap();
        s.tx.add(&[out(TX, 64)]).unwrap();
        s.incoming(60);
    }
    let (poller, interrupt) = (Poller::new().unwrap(), s.wire.interrupt.clone());
    let cx = Context::new(&s.ram, &interrupt, &poller);
    let share = &mut s.shares[0];
    for queue in 0..2 {
        let progress = share.handler.event(Event::Kick(queue), &mut share.queues, &cx).unwrap();
        assert_eq!(progress, Progress::More);
    }
    assert_eq!(s.wires[0].lock().unwrap().sent.len(), 64);
    assert_eq!(s.wires[0].lock().unwrap().incoming.len(), 256 - 64);
}

#[test]
fn a_port_that_is_gone_is_a_cable_unplugged() {
    let mut s = Setup::new(MRG);
    s.rx.add(&[inn(B, 100)]).unwrap();
    s.wires[0].lock().unwrap().gone = true;
    s.event(Event::Start).unwrap();
    let status = |s: &Setup| {
        let mut status = [0; 2];
        s.net.read_config(6, &mut status);
        u16::from_le_bytes(status)
    };
    assert_eq!(status(&s), 1);
    s.event(Event::Kick(0)).unwrap();
    assert_eq!(status(&s), 0);
    assert_eq!(s.wire.interrupt.line().take_count(), 1, "the guest is notified");
    // The port is not read again, and packets sent are lost.
    let reads = s.wires[0].lock().unwrap().reads;
    s.event(Event::Ready(0)).unwrap();
    s.send([0; HEADER], &[7; 60], &[]).unwrap();
    assert!(s.tx.take_used().is_some());
    assert_eq!((s.sent().len(), s.wires[0].lock().unwrap().reads), (0, reads));
}

#[test]
fn control_commands() {
    let (ok, err) = (VIRTIO_NET_OK as u8, VIRTIO_NET_ERR as u8);
    let mut s = Setup::new(CTRL | 1 << VIRTIO_NET_F_CTRL_MAC_ADDR);
    let table = |unicast: u32, multicast: u32, macs: usize| {
        [
            &[1, 0][..],
            &unicast.to_le_bytes(),
            &vec![0; 6 * unicast.min(9) as usize],
            &multicast.to_le_bytes(),
            &vec![0; 6 * macs],
        ]
        .concat()
    };
    for (command, answer) in [
        (vec![0, 0, 1], ok),
        (vec![0, 1, 0], ok),
        (vec![0, 0, 2], err),
        (vec![0, 0], err),
        (vec![0, 2, 1], err),
        (vec![0], err),
        (table(0, 0, 0), ok),
        (table(2, 3, 3), ok),
        (table(2, 3, 2), err),
        (table(u32::MAX, 0, 0), err),
        (table(0, u32::MAX, 1), err),
        (vec![1, 0, 0], err),
        (vec![1, 1, 2, 0, 0, 0, 0], err),
        (vec![1, 1, 2, 0, 0, 0, 0, 9], ok),
        (vec![1, 1, 3, 0, 0, 0, 0, 8], err),
        (vec![1, 1, 0, 0, 0, 0, 0, 0], err),
        (vec![2, 0, 1, 0], err),
        (vec![4, 0, 1, 0], err),
        (vec![0xFF; 64], err),
    ] {
        assert_eq!(s.command(&command), answer, "{command:?}");
    }
    let mut mac = [0; 6];
    s.net.read_config(0, &mut mac);
    assert_eq!(mac, [2, 0, 0, 0, 0, 9]);
    s.net.reset();
    s.net.read_config(0, &mut mac);
    assert_eq!(mac, [2, 0, 0, 0, 0, 1]);
    s.control.add(&[out(TX, 3)]).unwrap();
    let fault = s.event(Event::Kick(2)).unwrap_err().to_string();
    assert_eq!(fault, "a network control command has no room for its answer");
}

#[test]
fn the_driver_chooses_how_many_pairs_it_uses() {
    let mut s = Setup::with(CTRL | 1 << VIRTIO_NET_F_MQ, 3, 16);
    let active = |s: &Setup| s.wires.iter().map(|w| w.lock().unwrap().active).collect::<Vec<_>>();
    let changed = |s: &mut Setup| {
        for share in &mut s.shares {
            s.wire.deliver(&mut *share.handler, &mut share.queues, Event::Ready(1)).unwrap();
        }
    };
    assert_eq!(s.shares.iter().map(|share| share.queues.len()).collect::<Vec<_>>(), [3, 2, 2]);
    changed(&mut s);
    assert_eq!(active(&s), [true, false, false]);
    for (pairs, answer) in [(0u16, 1), (4, 1), (0x8000, 1), (2, 0)] {
        assert_eq!(s.command(&[&[4, 0][..], &pairs.to_le_bytes()].concat()), answer, "{pairs}");
    }
    changed(&mut s);
    assert_eq!(active(&s), [true, true, false]);
    // The pairs in use survive a pause, but not a reset.
    let state = s.net.save().unwrap();
    s.net.reset();
    assert_eq!(s.net.shared.pairs.load(Ordering::SeqCst), 1);
    s.net.restore(&state).unwrap();
    assert_eq!(s.net.shared.pairs.load(Ordering::SeqCst), 2);
    let mut pairs = state.clone();
    pairs["pairs"] = 4.into();
    for broken in [pairs, serde_json::json!({"pairs": 1})] {
        assert!(s.net.restore(&broken).unwrap_err().to_string().starts_with("the saved state of net0 is broken"));
    }
    // Without MQ the control queue follows the first pair.
    let mut s = Setup::with(CTRL, 3, 16);
    assert_eq!(s.shares.len(), 1);
    assert_eq!(s.command(&[0, 0, 1]), 0);
}

#[test]
fn offloads_follow_what_was_negotiated() {
    let csum = 1 << VIRTIO_NET_F_GUEST_CSUM;
    let (tso4, ecn) = (1 << VIRTIO_NET_F_GUEST_TSO4, 1 << VIRTIO_NET_F_GUEST_ECN);
    let offloads = |features| Setup::new(features).wires[0].lock().unwrap().offloads;
    assert_eq!(offloads(0), Offloads::default());
    assert_eq!(offloads(tso4 | ecn), Offloads::default(), "segments need checksums");
    assert_eq!(offloads(csum | tso4 | ecn), Offloads { csum: true, tso4: true, tso6: false, ecn: true });
}

#[test]
fn configuration() {
    let config = |text: &str| text.parse::<NetConfig>().map_err(|e| e.to_string());
    let check = |text: &str| config(text).unwrap().validate().map_err(|e| e.to_string());
    let user = config("user,hostfwd=tcp:8080:80,mtu=1400,hostfwd=udp:127.0.0.1:53:5353").unwrap();
    let forwards: Vec<String> = user.hostfwd.iter().map(ToString::to_string).collect();
    assert_eq!(forwards, ["tcp:8080:80", "udp:127.0.0.1:53:5353"]);
    let json = serde_json::to_string(&user).unwrap();
    assert_eq!(json, r#"{"user":true,"hostfwd":["tcp:8080:80","udp:127.0.0.1:53:5353"],"mtu":1400}"#);
    assert_eq!(serde_json::from_str::<NetConfig>(&json).unwrap(), user);
    let limited = "tap=vm0,rx_bandwidth=1M,rx_ops=9,rx_ops_burst=1,tx_bandwidth=2M,tx_bandwidth_burst=4M,mrg_rxbuf=off";
    for good in [
        limited,
        "tap=vm0,vhost=on,queues=2",
        "tap=vm0",
        "tap=vm0,queues=16,mac=02:00:00:00:00:01,mtu=68",
        "user",
        "tap=vm0,offload=off",
    ] {
        assert_eq!(check(good), Ok(()), "{good}");
    }
    for (bad, why) in [
        ("mtu=1400", "either tap=NAME or user"),
        ("tap=vm0,user", "either tap=NAME or user"),
        ("tap=0123456789abcdef", "tap name"),
        ("tap=vm%d", "tap name"),
        ("tap=../x", "tap name"),
        ("tap=vm0,queues=0", "queues=0: "),
        ("tap=vm0,queues=17", "queues=17: "),
        ("tap=vm0,mtu=67", "mtu=67: "),
        ("tap=vm0,hostfwd=tcp:1:1", "'hostfwd' is for user only"),
        ("user,queues=2", "'queues' is for tap only"),
        ("user,offload=off", "'offload' is for tap only"),
        ("user,vhost", "'vhost' is for tap only"),
        ("user,rx_bandwidth_burst=1M", "rx_bandwidth_burst needs rx_bandwidth"),
        ("user,tx_ops=5,rx_ops_burst=1", "rx_ops_burst needs rx_ops"),
        ("tap=vm0,tx_bandwidth_burst=1", "tx_bandwidth_burst needs tx_bandwidth"),
        ("tap=vm0,tx_ops_burst=1", "tx_ops_burst needs tx_ops"),
        ("tap=vm0,tx_ops=0", "would let nothing through"),
        ("tap=vm0,rx_bandwidth=1M,rx_bandwidth_burst=0", "would let nothing through"),
        ("tap=vm0,vhost,rx_ops=1", "vhost=on has no rate limits"),
        ("tap=vm0,map_gateway=on", "'map_gateway' is for user only"),
    ] {
        assert!(check(bad).unwrap_err().contains(why), "{bad}");
    }
    for (bad, why) in [
        ("tap=vm0,tap=vm1", "'tap' is given twice"),
        ("user,mtu=70000", "mtu: '70000' is not a number in range"),
        ("user,mac=01:00:00:00:00:00", "is not a unicast MAC address"),
        ("user,mac=02:00:00:00:00", "is not a unicast MAC address"),
        ("user,mac=02:00:00:00:00:+1", "is not a unicast MAC address"),
        ("user,hostfwd=sctp:1:1", "hostfwd: 'sctp:1:1' is not of the form"),
        ("user,hostfwd=tcp:0:1", "not of the form"),
        ("user,hostfwd=tcp:1", "not of the form"),
        ("user,hostfwd=tcp:somewhere:1:2", "not of the form"),
        (
            "tun=x",
            "valid keys are tap, user, hostfwd, map_gateway, mac, mtu, queues, offload, mrg_rxbuf, vhost, rx_bandwidth",
        ),
    ] {
        let error = config(bad).unwrap_err();
        assert!(error.contains(why), "{bad}: {error}");
    }
    let (net, _) = net(2);
    let mut bytes = [0xEE; 16];
    net.read_config(0, &mut bytes);
    assert_eq!(bytes, [2, 0, 0, 0, 0, 1, 1, 0, 2, 0, 0x78, 5, 0xEE, 0xEE, 0xEE, 0xEE]);
    for offset in [11, 12, 13, 100, u64::MAX] {
        net.read_config(offset, &mut [0; 8]);
    }
    assert_eq!(net.info().queue_sizes, [256, 256, 256, 256, 64]);
}

#[test]
fn a_pulled_cable_drops_packets() {
    let mut s = Setup::new(MRG | 1 << VIRTIO_NET_F_STATUS);
    for i in 0..4 {
        s.rx.add(&[inn(B + i * 1000, 1000)]).unwrap();
    }
    s.event(Event::Start).unwrap();
    s.incoming(300);
    assert_eq!(s.net.control(&Control::SetLink(true)).unwrap(), Reply::Done);
    s.event(Event::Ready(0)).unwrap();
    assert_eq!(s.rx.take_used().unwrap().1, 300, "the cable was never pulled");
    assert_eq!(s.net.control(&Control::SetLink(false)).unwrap(), Reply::ConfigChanged);
    assert_eq!(s.net.config_space()[6], 0);
    s.event(Event::Ready(1)).unwrap();
    s.incoming(100);
    s.event(Event::Ready(0)).unwrap();
    s.send([0; HEADER], &[7; 60], &[]).unwrap();
    assert!(s.tx.take_used().is_some() && s.rx.take_used().is_none());
    assert_eq!(s.sent().len(), 0);
    assert_eq!(s.net.control(&Control::SetLink(true)).unwrap(), Reply::ConfigChanged);
    assert_eq!(s.net.config_space()[6], 1);
    // Packets that arrived while the cable was pulled are lost too.
    let packet = s.incoming(200);
    s.event(Event::Ready(1)).unwrap();
    s.event(Event::Ready(0)).unwrap();
    s.send([0; HEADER], &[7; 60], &[]).unwrap();
    assert_eq!((s.rx.take_used().unwrap().1, s.rx.take_used(), s.sent().len()), (200, None, 1));
    assert_eq!(s.read(B + 1000, 200), with_buffers(packet, 1));
    assert!(s.net.control(&Control::BalloonStats).is_err());
}

#[test]
fn a_restored_guest_hears_what_became_of_its_link() {
    // The cable's state, the network's state, and the network's state after the restore.
    for (plugged, alive, next) in [(true, true, true), (false, true, true), (true, false, true), (true, true, false)] {
        let mut s = Setup::new(MRG);
        s.net.control(&Control::SetLink(plugged)).unwrap();
        s.net.shared.alive.store(alive, Ordering::SeqCst);
        let state = s.net.save().unwrap();
        let (mut net, wires) = net(1);
        net.restore(&state).unwrap();
        assert_eq!(net.save().unwrap(), state);
        net.shared.alive.store(next, Ordering::SeqCst);
        let s = Setup::of((net, wires), MRG, 1, 16);
        let (link, was) = (plugged && next, plugged && alive);
        assert_eq!((s.net.config_space()[6], s.net.save().unwrap()["link"].as_bool()), (link.into(), Some(link)));
        assert_eq!(s.wire.interrupt.line().take_count(), u64::from(link != was), "{plugged} {alive} {next}");
    }
}

#[test]
fn both_directions_have_limits() {
    let limits = Limits { bytes: None, ops: Some((20, Some(2))) };
    let start = std::time::Instant::now();
    let mut s = Setup::of(net_with(1, None, Extras { rx: limits, tx: limits, ..Extras::default() }), MRG, 1, 16);
    s.event(Event::Start).unwrap();
    for i in 0..8 {
        s.rx.add(&[inn(B + i * 1000, 1000)]).unwrap();
        s.incoming(100);
        s.send([0; HEADER], &[7; 60], &[]).unwrap();
    }
    s.event(Event::Kick(0)).unwrap();
    assert_eq!(s.sent().len(), 2);
    assert_eq!(s.wires[0].lock().unwrap().incoming.len(), 6);
    let (mut sent, mut events) = (2, 0);
    while sent < 8 || !s.wires[0].lock().unwrap().incoming.is_empty() {
        let share = &mut s.shares[0];
        let timeout = std::time::Duration::from_secs(5);
        let ready = s.wire.deliver_ready(&mut *share.handler, &mut share.queues, timeout).unwrap();
        assert!(ready > 0, "nothing rings");
        events += ready;
        sent += s.sent().len();
    }
    // Six more of each, 50 ms apart, without busy waiting.
    assert!(start.elapsed().as_millis() >= 295, "{:?}", start.elapsed());
    assert!(events <= 16, "{events}");
}

/// Records requests to serve queues without serving them.
#[derive(Default)]
struct Recorder {
    running: Mutex<Vec<(u16, u16)>>,
    pairs: AtomicU16,
    link: AtomicBool,
    refuse: AtomicBool,
}

impl Server for Recorder {
    fn start(&self, _: u64, _: &GuestRam, rings: &[crate::backend::vhost::Ring<'_>]) -> io::Result<()> {
        if self.refuse.load(Ordering::SeqCst) {
            return Err(io::Error::other("refused"));
        }
        *self.running.lock().unwrap() = rings.iter().map(|ring| (ring.index, ring.next_avail)).collect();
        Ok(())
    }
    fn stop(&self, rings: &[u16]) -> io::Result<Vec<u16>> {
        self.running.lock().unwrap().clear();
        Ok(rings.iter().map(|ring| ring + 7).collect())
    }
}

impl Elsewhere for Recorder {
    fn features(&self) -> u64 {
        EVENT_IDX
    }
    fn pairs(&self) -> u16 {
        2
    }
    fn set_link(&self, up: bool) -> io::Result<()> {
        self.link.store(up, Ordering::SeqCst);
        Ok(())
    }
    fn set_pairs(&self, pairs: u16) -> io::Result<()> {
        self.pairs.store(pairs, Ordering::SeqCst);
        Ok(())
    }
}

#[test]
fn pairs_that_are_served_elsewhere() {
    let recorder = Arc::new(Recorder::default());
    let (mut net, wires) = net_with(2, Some(recorder.clone()), Extras::default());
    assert_eq!(net.info().features & (RING_FEATURES | MRG), EVENT_IDX, "features that the server does not support");
    let ram = GuestRam::anonymous(RAM);
    let features = EVENT_IDX | CTRL | 1 << VIRTIO_NET_F_MQ;
    let drivers: Vec<FakeQueue> = (0..5).map(|i| FakeQueue::new(&ram, 0x1000 + i * 0x1000, 16)).collect();
    let wire = Loopback::new(&ram);
    let kicks: Arc<[EventFd]> = (0..5).map(|_| eventfd().unwrap()).collect::<Vec<_>>().into();
    let activate = |net: &mut Net| {
        let queues = (0..).zip(&drivers).map(|(i, driver)| match i {
            3 => Queue::disabled(3, driver.state()),
            i => Queue::new(i, driver.state(), 16, features, &ram).unwrap(),
        });
        let interrupt = wire.interrupt.clone();
        net.activate(Activation {
            ram: ram.clone(),
            features,
            queues: queues.collect(),
            kicks: kicks.clone(),
            interrupt,
        })
    };
    recorder.refuse.store(true, Ordering::SeqCst);
    // If the queues cannot be handed over, the card has no link.
    let Ok(Activated::Here(shares)) = activate(&mut net) else { panic!() };
    assert_eq!((shares.len(), shares[0].queues.len(), shares[0].queues[0].index()), (1, 5, 4));
    assert_eq!((net.config_space()[6], wire.interrupt.line().take_count()), (0, 1));
    recorder.refuse.store(false, Ordering::SeqCst);
    let Ok(Activated::Elsewhere(mut remote, mut shares)) = activate(&mut net) else { panic!() };
    assert_eq!((net.config_space()[6], wire.interrupt.line().take_count()), (1, 1));
    assert_eq!(*recorder.running.lock().unwrap(), [(0, 0), (1, 0), (2, 0)]);
    assert!(kicks[..3].iter().all(|kick| kick.read().is_ok()) && kicks[3].read().is_err());
    // The control queue is served in this process.
    let mut control = FakeQueue::new(&ram, 0x5000, 16);
    ram.write(TX, &[4, 0, 2, 0]).unwrap();
    control.add(&[out(TX, 4), inn(TX + 0x1000, 1)]).unwrap();
    let [Share { queues, handler }] = &mut shares[..] else { panic!() };
    wire.deliver(&mut **handler, queues, Event::Start).unwrap();
    wire.deliver(&mut **handler, queues, Event::Kick(0)).unwrap();
    assert_eq!((control.take_used(), recorder.pairs.load(Ordering::SeqCst)), (Some((0, 1)), 2));
    assert!(wires.iter().all(|wire| wire.lock().unwrap().active));
    assert_eq!(net.control(&Control::SetLink(false)).unwrap(), Reply::ConfigChanged);
    net.control(&Control::SetLink(true)).unwrap();
    assert!(recorder.link.load(Ordering::SeqCst));
    ram.store_u16(drivers[1].used + 2, 5, Ordering::SeqCst).unwrap();
    let stopped = remote.stop().unwrap();
    let positions: Vec<_> = stopped.iter().map(|(i, state)| (*i, state.next_avail, state.next_used)).collect();
    assert_eq!(positions, [(0, 7, 0), (1, 8, 5), (2, 9, 0)]);
}

/// Generates the lengths of the buffers of chains.
fn chains() -> impl Strategy<Value = Vec<Vec<u32>>> {
    let len = prop_oneof![4 => Just(1526u32), 2 => 1..200u32, 1 => Just(0), 2 => Just(12)];
    prop::collection::vec(prop::collection::vec(len, 1..4), 0..5)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_chain_is_survived(
        rx in chains(),
        tx in chains(),
        packets in prop::collection::vec(prop_oneof![4 => 26..1600usize, 1 => 1600..65_565usize], 0..6),
        flips in prop_oneof![3 => Just(vec![]), 2 => prop::collection::vec((0x1000..0xA000u64, 0..8u8), 1..4)],
        commands in prop::collection::vec(prop::collection::vec(0..6u8, 0..20), 0..4),
        features in prop::sample::select(vec![
            CTRL | MRG | RING_FEATURES, CTRL, CTRL | EVENT_IDX, CTRL | MRG | OFFLOADS, CTRL | RING_FEATURES,
        ]),
    ) {
        let mut s = Setup::new(features);
        let (mut at, mut ranges) = (B, vec![]);
        for (chains, write) in [(&rx, true), (&tx, false)] {
            for lens in chains {
                let bufs: Vec<Buf> = lens.iter().map(|&len| {
                    let buf = Buf { addr: at, len, write };
                    at += u64::from(len);
                    buf
                }).collect();
                if write { ranges.extend(bufs.iter().map(|b| b.addr..b.addr + u64::from(b.len))) }
                let _ = if write { s.rx.add(&bufs) } else { s.tx.add(&bufs) };
            }
        }
        for command in &commands {
            s.ram.write(TX, command).unwrap();
            let _ = s.control.add(&[out(TX, command.len() as u32), inn(TX + 0x1000, 1)]);
        }
        for &len in &packets {
            s.incoming(len);
        }
        for &(at, bit) in &flips {
            let byte: u8 = s.ram.read_obj(at).unwrap();
            s.ram.write_obj(at, byte ^ 1 << bit).unwrap();
        }
        let before = s.read(0, RAM as usize);
        let broke = [Event::Start, Event::Kick(0), Event::Kick(1), Event::Kick(2), Event::Ready(0)]
            .into_iter().any(|event| s.event(event).is_err());
        let short = |lens: &Vec<u32>| lens.iter().sum::<u32>() < HEADER as u32;
        if flips.is_empty() {
            prop_assert!(!broke || rx.iter().chain(&tx).any(short));
            // Received packets were written only to memory that permits it.
            let after = s.read(0, RAM as usize);
            for (at, _) in (0u64..).zip(before.iter().zip(&after)).filter(|(_, (b, a))| b != a) {
                let allowed = (0x1000..0xA000).contains(&at) || at == TX + 0x1000;
                prop_assert!(allowed || ranges.iter().any(|r| r.contains(&at)), "{at:#x} was written");
            }
        }
        // The lengths of used buffers add up to the packets received.
        if flips.is_empty() && !broke {
            let used: usize = std::iter::from_fn(|| s.rx.take_used()).map(|(_, len)| len as usize).sum();
            let wire = s.wires[0].lock().unwrap();
            let left: usize = wire.incoming.iter().map(Vec::len).sum();
            let all: usize = packets.iter().sum();
            prop_assert!(wire.skipped > 0 || used + left == all);
        }
    }
}
