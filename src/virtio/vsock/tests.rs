//! A guest's driver that exchanges single packets with programs on the host.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::flow::BUF_ALLOC;
use super::packet::{HEADER, HOST_CID, Header, NO_RECEIVE, NO_SEND, NOTHING, Op, STREAM};
use super::*;
use crate::memory::GuestRam;
use crate::virtio::testing::{FakeQueue, Loopback, inn, out};

const RX: usize = 0;
const EVENTS: usize = 2;
const CID: u64 = 7;
const SIZE: u16 = 256;
const RX_DATA: u32 = 4096;
const RX_BUFFERS: u64 = 0x10_0000;
const TX_BUFFER: u64 = 0x4_0000;
const EVENT_BUFFER: u64 = 0x3_0000;
/// Size of the test guest's receive buffer per connection.
const ROOM: u32 = 64 << 10;

struct Guest {
    device: Vsock,
    path: PathBuf,
    ram: GuestRam,
    wire: Loopback,
    handler: Box<dyn Handler>,
    queues: Vec<Queue>,
    rx: FakeQueue,
    tx: FakeQueue,
    events: FakeQueue,
    /// Addresses of the receive buffers, by their heads.
    buffers: HashMap<u16, u64>,
    _dir: tempfile::TempDir,
}

/// A packet as the guest receives it.
#[derive(Debug)]
struct Got {
    header: Header,
    data: Vec<u8>,
}

fn activation(ram: &GuestRam, wire: &Loopback, queues: Vec<Queue>) -> Activation {
    let (features, kicks) = (RING_FEATURES, vec![].into());
    Activation { ram: ram.clone(), features, queues, kicks, interrupt: wire.interrupt.clone() }
}

fn handler(device: &mut Vsock, activation: Activation) -> (Box<dyn Handler>, Vec<Queue>) {
    let Ok(Activated::Here(mut shares)) = device.activate(activation) else { panic!("the device does not start") };
    let Share { handler, queues } = shares.remove(0);
    (handler, queues)
}

impl Guest {
    /// Creates a guest whose driver has just started, with `buffers` receive buffers.
    fn new(buffers: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock");
        let mut device = Vsock::new("vsock", &VsockConfig { cid: CID, path: path.clone() }).unwrap();
        let ram = GuestRam::anonymous(4 << 20);
        let [rx, tx, events] = [0x1000, 0x4000, 0x7000].map(|base| FakeQueue::new(&ram, base, SIZE));
        let queues = [&rx, &tx, &events].map(|queue| queue.device(RING_FEATURES)).into();
        let wire = Loopback::new(&ram);
        let (handler, queues) = handler(&mut device, activation(&ram, &wire, queues));
        let buffers_by_head = HashMap::new();
        let mut guest =
            Guest { device, path, ram, wire, handler, queues, rx, tx, events, buffers: buffers_by_head, _dir: dir };
        for n in 0..buffers {
            guest.offer(RX_BUFFERS + n as u64 * 0x2000);
        }
        guest.deliver(Event::Start);
        guest
    }

    fn offer(&mut self, at: u64) {
        let head = self.rx.add(&[inn(at, HEADER as u32), inn(at + HEADER as u64, RX_DATA)]).unwrap();
        self.buffers.insert(head, at);
    }

    fn try_deliver(&mut self, event: Event) -> Result<(), Fault> {
        self.wire.deliver(&mut *self.handler, &mut self.queues, event)
    }

    fn deliver(&mut self, event: Event) {
        self.try_deliver(event).unwrap();
    }

    /// Pauses and resumes the device, which keeps its connections.
    fn pause(&mut self) {
        let queues = std::mem::take(&mut self.queues);
        self.wire = Loopback::new(&self.ram);
        let (handler, queues) = handler(&mut self.device, activation(&self.ram, &self.wire, queues));
        (self.handler, self.queues) = (handler, queues);
        self.deliver(Event::Start);
        (0..3).for_each(|queue| self.deliver(Event::Kick(queue)));
    }

    /// Returns all packets that are available now.
    fn packets(&mut self) -> Vec<Got> {
        let mut all = vec![];
        while self.wire.deliver_ready(&mut *self.handler, &mut self.queues, Duration::ZERO).unwrap() > 0 {}
        loop {
            let some = self.received();
            if some.is_empty() {
                return all;
            }
            all.extend(some);
            self.deliver(Event::Kick(RX));
        }
    }

    /// Takes the used receive buffers and offers them again.
    fn received(&mut self) -> Vec<Got> {
        let mut got = vec![];
        while let Some((head, len)) = self.rx.take_used() {
            let at = self.buffers.remove(&head).unwrap();
            let mut header = [0; HEADER];
            self.ram.read(at, &mut header).unwrap();
            let header = Header::parse(&header);
            assert_eq!(len, HEADER as u32 + header.len);
            let mut data = vec![0; header.len as usize];
            self.ram.read(at + HEADER as u64, &mut data).unwrap();
            self.offer(at);
            got.push(Got { header, data });
        }
        got
    }

    /// Waits for the next packet, which must be the only one.
    fn packet(&mut self) -> Got {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let mut packets = self.packets();
            assert!(packets.len() <= 1, "{packets:?}");
            if let Some(packet) = packets.pop() {
                return packet;
            }
            assert!(Instant::now() < deadline, "no packet came");
            let wait = Duration::from_millis(20);
            self.wire.deliver_ready(&mut *self.handler, &mut self.queues, wait).unwrap();
        }
    }

    fn op(&mut self) -> Op {
        self.packet().header.op
    }

    fn nothing(&mut self) {
        let packets = self.packets();
        assert!(packets.is_empty(), "{packets:?}");
    }

    /// Puts a packet into the transmit queue, without a kick.
    fn put(&mut self, header: &Header, data: &[u8]) {
        while self.tx.take_used().is_some() {}
        self.ram.write(TX_BUFFER, &header.bytes()).unwrap();
        self.ram.write(TX_BUFFER + HEADER as u64, data).unwrap();
        // The boundary between the buffers need not be that of the header.
        let cut = [out(TX_BUFFER, 40), out(TX_BUFFER + 40, 4 + data.len() as u32)];
        self.tx.add(&cut).unwrap();
    }

    fn send(&mut self, header: &Header, data: &[u8]) {
        self.put(header, data);
        self.deliver(Event::Kick(TX));
    }

    /// Sends a packet on a connection, in reply to a packet from it.
    fn reply(&mut self, to: &Header, op: Op, flags: u32, data: &[u8]) {
        let header = header(to.src_port, to.dst_port);
        self.send(&Header { op, flags, len: data.len() as u32, ..header }, data);
    }

    /// Connects a client on the host to a port; returns it and the request as the guest receives it.
    fn request(&mut self, port: u32) -> (UnixStream, Header) {
        let mut client = UnixStream::connect(&self.path).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        writeln!(client, "CONNECT {port}").unwrap();
        let Got { header, data } = self.packet();
        assert_eq!((header.op, header.dst_port, header.src_cid, header.dst_cid), (Op::Request, port, HOST_CID, CID));
        assert_eq!((header.buf_alloc, header.fwd_cnt, header.kind, data.len()), (BUF_ALLOC, 0, STREAM, 0));
        (client, header)
    }

    /// Connects a client on the host to a port of the guest, which accepts.
    fn connection(&mut self, port: u32) -> (UnixStream, Header) {
        let (mut client, header) = self.request(port);
        self.reply(&header, Op::Response, 0, &[]);
        let line = format!("OK {}\n", header.src_port);
        let mut answer = vec![0; line.len()];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(String::from_utf8(answer).unwrap(), line);
        (client, header)
    }

    fn connections(&self) -> usize {
        lock(&self.device.muxer).connections()
    }
}

/// Returns the header of a request from a guest's port to a host's.
fn header(host: u32, guest: u32) -> Header {
    let (src_cid, dst_cid) = (CID, HOST_CID);
    let (len, flags, fwd_cnt) = (0, 0, 0);
    let (kind, op, buf_alloc) = (STREAM, Op::Request, ROOM);
    Header { src_cid, dst_cid, src_port: guest, dst_port: host, len, kind, op, flags, buf_alloc, fwd_cnt }
}

fn end(mut stream: UnixStream) -> Vec<u8> {
    let mut rest = vec![];
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream.read_to_end(&mut rest).unwrap();
    rest
}

#[test]
fn a_program_of_the_host_talks_to_a_port_of_the_guest() {
    let mut guest = Guest::new(16);
    let (mut client, to) = guest.connection(52);
    client.write_all(b"hello").unwrap();
    let Got { header, data } = guest.packet();
    assert_eq!((header.op, &data[..]), (Op::Data, &b"hello"[..]));
    guest.reply(&to, Op::Data, 0, b"world");
    let mut answer = [0; 5];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"world");
    guest.nothing();
    drop(client);
    let Got { header, .. } = guest.packet();
    assert_eq!((header.op, header.flags, header.fwd_cnt), (Op::Shutdown, NOTHING, 5));
    guest.reply(&to, Op::Reset, 0, &[]);
    guest.nothing();
    assert_eq!(guest.connections(), 0);
}

#[test]
fn what_follows_the_first_line_is_the_guests() {
    let mut guest = Guest::new(16);
    let mut client = UnixStream::connect(&guest.path).unwrap();
    client.write_all(b"conn").unwrap();
    guest.nothing();
    client.write_all(b"ect 9\r\nearly").unwrap();
    let Got { header, .. } = guest.packet();
    assert_eq!((header.op, header.dst_port), (Op::Request, 9));
    guest.reply(&header, Op::Response, 0, &[]);
    assert_eq!(guest.packet().data, b"early");
}

#[test]
fn a_client_that_makes_no_sense_or_no_haste_is_closed() {
    let mut guest = Guest::new(16);
    for line in ["\n", "CONNECT\n", "CONNECT 4294967296\n", "CONNECT -1\n", "CONNECT 1 2\n", "GET 1\n", "\u{fe}\n"] {
        let mut client = UnixStream::connect(&guest.path).unwrap();
        client.write_all(line.as_bytes()).unwrap();
        guest.nothing();
        assert_eq!(end(client), b"", "{line}");
    }
    let mut long = UnixStream::connect(&guest.path).unwrap();
    long.write_all(&[b'C'; 32]).unwrap();
    guest.nothing();
    assert!(long.read(&mut [0]).map_or(true, |n| n == 0), "an unread line may make it a reset");
    let silent = UnixStream::connect(&guest.path).unwrap();
    guest.nothing();
    assert_eq!(guest.connections(), 1);
    let start = Instant::now();
    while guest.connections() > 0 {
        guest.wire.deliver_ready(&mut *guest.handler, &mut guest.queues, Duration::from_secs(1)).unwrap();
        assert!(start.elapsed() < Duration::from_secs(60));
    }
    assert_eq!(end(silent), b"");
}

#[test]
fn a_port_where_nobody_listens_closes_the_clients_connection() {
    let mut guest = Guest::new(16);
    let (client, to) = guest.request(1);
    guest.reply(&to, Op::Reset, 0, &[]);
    assert_eq!(end(client), b"");
    // An unanswered request times out, while an idle connection stays.
    let (_other, _) = guest.connection(3);
    let (client, _) = guest.request(2);
    assert_eq!(guest.op(), Op::Reset);
    assert_eq!(end(client), b"");
    assert_eq!(guest.connections(), 1);
}

#[test]
fn the_guest_connects_to_a_program_of_the_host() {
    let mut guest = Guest::new(16);
    guest.send(&header(80, 1234), &[]);
    let Got { header: refused, .. } = guest.packet();
    assert_eq!((refused.op, refused.src_port, refused.dst_port), (Op::Reset, 80, 1234));
    let listener = UnixListener::bind(format!("{}_80", guest.path.display())).unwrap();
    guest.send(&header(80, 1234), &[]);
    let Got { header: to, .. } = guest.packet();
    assert_eq!((to.op, to.buf_alloc), (Op::Response, BUF_ALLOC));
    let (mut server, _) = listener.accept().unwrap();
    server.write_all(b"220 ready").unwrap();
    assert_eq!(guest.packet().data, b"220 ready");
    guest.reply(&to, Op::Data, 0, b"QUIT");
    guest.reply(&to, Op::Shutdown, NOTHING, &[]);
    assert_eq!(guest.op(), Op::Reset);
    assert_eq!(end(server), b"QUIT");
    assert_eq!(guest.connections(), 0);
}

#[test]
fn a_busy_listener_is_tried_again() {
    let mut guest = Guest::new(16);
    let path = PathBuf::from(format!("{}_80", guest.path.display()));
    let socket = rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::STREAM, None).unwrap();
    rustix::net::bind(&socket, &rustix::net::SocketAddrUnix::new(&path).unwrap()).unwrap();
    rustix::net::listen(&socket, 0).unwrap();
    let listener = UnixListener::from(socket);
    let _first = unix::dial(&path).unwrap();
    guest.send(&header(80, 1234), &[]);
    guest.nothing();
    listener.accept().unwrap();
    assert_eq!(guest.op(), Op::Response);
    // The second attempt times out.
    guest.send(&header(80, 1235), &[]);
    assert_eq!(guest.op(), Op::Reset);
    assert_eq!(guest.connections(), 1);
}

#[test]
fn each_half_closes_by_itself() {
    let mut guest = Guest::new(16);
    let (mut client, to) = guest.connection(1);
    client.write_all(b"last words").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let packets = guest.packets();
    let [Got { data, .. }, Got { header, .. }] = &packets[..] else { panic!("{packets:?}") };
    assert_eq!((&data[..], header.op, header.flags), (&b"last words"[..], Op::Shutdown, NO_SEND));
    guest.reply(&to, Op::Data, 0, b"answer");
    guest.reply(&to, Op::Shutdown, NO_SEND, &[]);
    assert_eq!(end(client), b"answer");
    // Both halves are closed, and the client is gone now.
    assert_eq!(guest.packet().header.flags, NOTHING);
    guest.reply(&to, Op::Shutdown, NOTHING, &[]);
    assert_eq!(guest.op(), Op::Reset);
    assert_eq!(guest.connections(), 0);

    // The halves close in the opposite order; then a guest refuses further data.
    let (mut client, to) = guest.connection(1);
    guest.reply(&to, Op::Data, 0, b"all");
    guest.reply(&to, Op::Shutdown, NO_SEND, &[]);
    let mut all = vec![];
    client.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"all");
    client.write_all(b"still").unwrap();
    assert_eq!(guest.packet().data, b"still");
    let (mut client, to) = guest.connection(1);
    guest.reply(&to, Op::Shutdown, NO_RECEIVE, &[]);
    assert!(client.write_all(b"x").is_err());
    guest.reply(&to, Op::Data, 0, b"one way");
    let mut way = [0; 7];
    client.read_exact(&mut way).unwrap();
    drop(client);
    assert_eq!(guest.packet().header.flags, NOTHING);
}

#[test]
fn closed_halves_keep_nobody_awake_while_the_guest_has_no_buffer() {
    let mut guest = Guest::new(2);
    let (client, to) = guest.connection(1);
    while guest.queues[RX].pop(&guest.ram).unwrap().is_some() {}
    client.shutdown(Shutdown::Write).unwrap();
    guest.reply(&to, Op::Shutdown, NO_SEND, &[]);
    let wakes = |guest: &mut Guest| {
        let mut wake = || guest.wire.deliver_ready(&mut *guest.handler, &mut guest.queues, Duration::ZERO).unwrap();
        (0..100).map(|_| wake()).sum::<usize>()
    };
    assert!(wakes(&mut guest) < 10);
    drop(client);
    assert!(wakes(&mut guest) < 10);
    guest.offer(RX_BUFFERS + 0x10_0000);
    guest.deliver(Event::Kick(RX));
    assert_eq!(guest.packet().header.flags, NOTHING);
}

#[test]
fn a_guest_that_does_not_confirm_the_end_is_reset() {
    let mut guest = Guest::new(16);
    let (client, to) = guest.connection(1);
    drop(client);
    assert_eq!(guest.op(), Op::Shutdown);
    guest.reply(&to, Op::Data, 0, b"too late");
    assert_eq!(guest.op(), Op::Reset);
    assert_eq!(guest.connections(), 0);
}

#[test]
fn no_more_is_sent_than_the_guest_has_room_for() {
    let mut guest = Guest::new(16);
    let (mut client, to) = guest.request(1);
    guest.send(&Header { op: Op::Response, buf_alloc: 10, ..header(to.src_port, 1) }, &[]);
    assert!(client.read(&mut [0; 32]).unwrap() > 3);
    client.write_all(b"0123456789abcde").unwrap();
    let packets = guest.packets();
    let [Got { data, .. }, Got { header: asks, .. }] = &packets[..] else { panic!("{packets:?}") };
    assert_eq!((&data[..], asks.op), (&b"0123456789"[..], Op::CreditRequest));
    for _ in 0..3 {
        guest.nothing();
    }
    // Inconsistent counters give no credit.
    guest.send(&Header { op: Op::CreditUpdate, buf_alloc: 20, fwd_cnt: 11, ..header(to.src_port, 1) }, &[]);
    guest.nothing();
    guest.send(&Header { op: Op::CreditUpdate, buf_alloc: 10, fwd_cnt: 3, ..header(to.src_port, 1) }, &[]);
    let packets = guest.packets();
    assert_eq!((&packets[0].data[..], packets[1].header.op), (&b"abc"[..], Op::CreditRequest));
    drop(client);
    guest.nothing();
    guest.send(&Header { op: Op::CreditUpdate, buf_alloc: 20, fwd_cnt: 13, ..header(to.src_port, 1) }, &[]);
    let packets = guest.packets();
    assert_eq!((&packets[0].data[..], packets[1].header.op), (&b"de"[..], Op::Shutdown));
}

#[test]
fn a_reader_that_does_not_read_holds_up_nobody_else() {
    let mut guest = Guest::new(16);
    let (slow, to_slow) = guest.connection(1);
    let (mut fast, to_fast) = guest.connection(2);
    let piece: Vec<u8> = (0..32u32 << 10).map(|i| (i % 251) as u8).collect();
    let (mut sent, mut known) = (0u32, 0u32);
    // Sends as much as credit allows: the socket's own buffer, then the promised space.
    loop {
        known = guest.packets().iter().map(|p| p.header.fwd_cnt).max().unwrap_or(known);
        if sent - known + piece.len() as u32 > BUF_ALLOC {
            break;
        }
        guest.reply(&to_slow, Op::Data, 0, &piece);
        sent += piece.len() as u32;
    }
    assert!((BUF_ALLOC..4 << 20).contains(&sent), "{sent}");
    guest.reply(&to_slow, Op::CreditRequest, 0, &[]);
    let update = guest.packet().header;
    assert_eq!(update.op, Op::CreditUpdate);
    let free = BUF_ALLOC - (sent - update.fwd_cnt);
    for _ in 0..100 {
        guest.reply(&to_fast, Op::Data, 0, b"ping");
        let mut ping = [0; 4];
        fast.read_exact(&mut ping).unwrap();
        fast.write_all(b"pong").unwrap();
        assert_eq!(guest.packet().data, b"pong");
    }
    // Sends the rest of the credit and then the end; then the reader starts to read.
    guest.reply(&to_slow, Op::Data, 0, &vec![7; free as usize]);
    guest.reply(&to_slow, Op::Shutdown, NOTHING, &[]);
    assert_eq!(guest.op(), Op::Reset);
    assert_eq!(guest.connections(), 2, "what the guest has sent is not lost with it");
    let reader = std::thread::spawn(move || end(slow));
    while guest.connections() > 1 {
        guest.wire.deliver_ready(&mut *guest.handler, &mut guest.queues, Duration::from_secs(1)).unwrap();
    }
    let all = reader.join().unwrap();
    assert_eq!(all.len() as u32, sent + free);
    assert!(all.chunks(piece.len()).take(sent as usize / piece.len()).all(|chunk| chunk == piece));
    guest.nothing();
}

#[test]
fn room_is_told_of_before_the_guest_runs_out_of_it() {
    let mut guest = Guest::new(16);
    let (mut client, to) = guest.connection(1);
    let reader = std::thread::spawn(move || {
        let mut all = vec![0; 4 << 20];
        client.read_exact(&mut all).unwrap();
        all
    });
    let piece: Vec<u8> = (0..16u32 << 10).map(|i| (i % 253) as u8).collect();
    let (mut sent, mut known) = (0u32, 0u32);
    let deadline = Instant::now() + Duration::from_secs(60);
    while sent < 4 << 20 {
        assert!(Instant::now() < deadline, "{sent} bytes sent, {known} taken");
        if sent - known + piece.len() as u32 <= BUF_ALLOC {
            guest.reply(&to, Op::Data, 0, &piece);
            sent += piece.len() as u32;
        } else {
            guest.wire.deliver_ready(&mut *guest.handler, &mut guest.queues, Duration::from_millis(10)).unwrap();
        }
        known = guest.packets().iter().map(|p| p.header.fwd_cnt).max().unwrap_or(known);
    }
    while !reader.is_finished() {
        guest.wire.deliver_ready(&mut *guest.handler, &mut guest.queues, Duration::from_millis(10)).unwrap();
    }
    assert!(reader.join().unwrap().chunks(piece.len()).all(|chunk| chunk == piece));
}

#[test]
fn turns_are_taken_one_after_the_other() {
    let mut guest = Guest::new(4);
    let clients: Vec<_> = (0..3).map(|port| guest.connection(port)).collect();
    for (client, _) in &clients {
        let mut client = client;
        client.write_all(&[b'x'; 3 * RX_DATA as usize]).unwrap();
    }
    // All connections are ready before the guest offers buffers.
    while guest.queues[RX].pop(&guest.ram).unwrap().is_some() {}
    guest.nothing();
    (8..12).for_each(|n| guest.offer(RX_BUFFERS + n * 0x2000));
    guest.deliver(Event::Kick(RX));
    let ports: Vec<u32> = guest.packets().iter().map(|p| p.header.dst_port).collect();
    assert_eq!(ports.len(), 9);
    for round in ports.chunks(3) {
        let mut round = round.to_vec();
        round.sort_unstable();
        assert_eq!(round, [0, 1, 2], "{ports:?}");
    }
}

#[test]
fn what_belongs_to_no_connection_is_reset() {
    let mut guest = Guest::new(16);
    let data = header(80, 1234);
    let known = [Op::Response, Op::Shutdown, Op::Data, Op::CreditUpdate, Op::CreditRequest];
    for op in known.into_iter().chain([0, 8, u16::MAX].map(Op::Unknown)) {
        guest.send(&Header { op, ..data }, &[]);
        let Got { header, .. } = guest.packet();
        assert_eq!(header, Header { op, ..data }.reset());
    }
    for wrong in [
        Header { src_cid: CID + 1, ..data },
        Header { src_cid: CID | 1 << 32, ..data },
        Header { dst_cid: 1, ..data },
        Header { dst_cid: CID, ..data },
        Header { dst_cid: u64::MAX, ..data },
        Header { kind: 2, ..data },
        Header { kind: 0, ..data },
        Header { len: 1, ..data },
        Header { len: u32::MAX, ..data },
    ] {
        guest.send(&wrong, &[]);
        assert_eq!(guest.packet().header, wrong.reset());
        guest.send(&Header { op: Op::Reset, ..wrong }, &[]);
        guest.nothing();
    }
    assert_eq!(guest.connections(), 0);
}

#[test]
fn a_connection_whose_guest_breaks_a_rule_is_reset() {
    let big = vec![0; BUF_ALLOC as usize + 1];
    type Break<'a> = &'a dyn Fn(&mut Guest, &Header);
    let breaks: [Break<'_>; 8] = [
        &|guest, to| guest.reply(to, Op::Data, 0, &big),
        &|guest, to| guest.reply(to, Op::Response, 0, &[]),
        &|guest, to| guest.reply(to, Op::Request, 0, &[]),
        &|guest, to| guest.reply(to, Op::Unknown(99), 0, &[]),
        &|guest, to| guest.send(&Header { op: Op::Data, len: 5, ..header(to.src_port, to.dst_port) }, b"four"),
        &|guest, to| guest.send(&Header { op: Op::Data, len: u32::MAX, ..header(to.src_port, to.dst_port) }, &[]),
        &|guest, to| guest.send(&Header { op: Op::Shutdown, len: 1, ..header(to.src_port, to.dst_port) }, &[]),
        &|guest, to| {
            guest.reply(to, Op::Shutdown, NO_SEND, &[]);
            guest.reply(to, Op::Data, 0, b"after all");
        },
    ];
    let mut guest = Guest::new(16);
    for (n, rule) in breaks.iter().enumerate() {
        let (client, to) = guest.connection(1);
        rule(&mut guest, &to);
        assert_eq!(guest.op(), Op::Reset, "{n}");
        assert_eq!((guest.connections(), end(client)), (0, vec![]), "{n}");
    }
    // Before it has accepted, the guest may only answer yes or no.
    for op in [Op::Data, Op::Shutdown, Op::CreditUpdate] {
        let (client, to) = guest.request(1);
        guest.reply(&to, op, NOTHING, &[]);
        assert_eq!(guest.op(), Op::Reset);
        assert_eq!(end(client), b"");
    }
}

#[test]
fn buffers_too_small_end_the_device() {
    let faults = |bufs: &[crate::virtio::testing::Buf], queue: usize| {
        let mut guest = Guest::new(0);
        let (_client, event) = match queue {
            RX => {
                guest.rx.add(bufs).unwrap();
                guest.put(&Header { op: Op::Data, ..header(1, 1) }, &[]);
                (None, Event::Kick(TX))
            }
            _ => {
                guest.tx.add(bufs).unwrap();
                (Some(UnixStream::connect(&guest.path).unwrap()), Event::Kick(TX))
            }
        };
        let fault = guest.try_deliver(event).unwrap_err().to_string();
        assert!(guest.queues.iter().all(|queue| queue.in_flight() == 0), "a chain is still in flight");
        fault
    };
    assert_eq!(faults(&[inn(RX_BUFFERS, 43)], RX), "a vsock receive buffer is shorter than a header");
    assert_eq!(faults(&[out(RX_BUFFERS, 43)], RX), "a vsock receive buffer is shorter than a header");
    assert_eq!(faults(&[out(RX_BUFFERS, 43)], TX), "a vsock packet is shorter than its header");
    assert_eq!(faults(&[inn(RX_BUFFERS, 4096)], TX), "a vsock packet is shorter than its header");
    assert!(faults(&[out(4 << 20, 100)], TX).contains("outside of memory"));

    let mut guest = Guest::new(2);
    let (mut client, _) = guest.connection(1);
    while guest.queues[RX].pop(&guest.ram).unwrap().is_some() {}
    guest.rx.add(&[inn(RX_BUFFERS, HEADER as u32)]).unwrap();
    client.write_all(b"x").unwrap();
    let result = guest.wire.deliver_ready(&mut *guest.handler, &mut guest.queues, Duration::from_secs(1));
    assert_eq!(result.unwrap_err().to_string(), "a vsock receive buffer has no room for data");
}

#[test]
fn a_guest_that_takes_no_answers_is_not_listened_to() {
    let mut guest = Guest::new(0);
    let mut served = 0;
    for n in 0..600 {
        guest.ram.write(TX_BUFFER, &Header { op: Op::Data, ..header(1, n) }.bytes()).unwrap();
        while guest.tx.take_used().is_some() {
            served += 1;
        }
        if guest.tx.add(&[out(TX_BUFFER, HEADER as u32)]).is_none() {
            break;
        }
        guest.deliver(Event::Kick(TX));
    }
    assert_eq!(served, 256, "as many answers are kept");
    (0..32).for_each(|n| guest.offer(RX_BUFFERS + n * 0x2000));
    guest.deliver(Event::Kick(RX));
    assert!(guest.packets().len() > 256);
    while guest.tx.take_used().is_some() {}
    assert_eq!(guest.queues[TX].state().next_avail, guest.tx.avail_idx, "the device continues when it has room");
}

#[test]
fn connections_are_bounded() {
    unix::make_room_for_descriptors(3 * MAX_CONNECTIONS as u64);
    let mut guest = Guest::new(64);
    let listener = UnixListener::bind(format!("{}_80", guest.path.display())).unwrap();
    let mut open = vec![];
    for port in 0..MAX_CONNECTIONS as u32 {
        guest.send(&header(80, port), &[]);
        assert_eq!(guest.op(), Op::Response, "{port}");
        open.push(listener.accept().unwrap().0);
    }
    guest.send(&header(80, u32::MAX), &[]);
    assert_eq!(guest.op(), Op::Reset);
    let mut one_more = UnixStream::connect(&guest.path).unwrap();
    let _ = one_more.write_all(b"CONNECT 1\n");
    guest.nothing();
    assert!(one_more.read(&mut [0]).map_or(true, |n| n == 0));
    // All connections work.
    for (port, stream) in open.iter_mut().enumerate() {
        writeln!(stream, "{port}").unwrap();
    }
    let mut heard: Vec<u32> =
        guest.packets().iter().filter(|p| p.header.op == Op::Data).map(|p| p.header.dst_port).collect();
    heard.sort_unstable();
    assert_eq!(heard, (0..MAX_CONNECTIONS as u32).collect::<Vec<_>>());
    drop(open);
    assert!(guest.packets().iter().all(|p| p.header.flags == NOTHING));
    (0..MAX_CONNECTIONS as u32).for_each(|port| guest.send(&Header { op: Op::Reset, ..header(80, port) }, &[]));
    assert_eq!(guest.connections(), 0);
    drop(guest.connection(1));
}

#[test]
fn connections_survive_a_pause_and_not_a_reset() {
    let mut guest = Guest::new(16);
    let (mut client, to) = guest.connection(1);
    guest.pause();
    client.write_all(b"one").unwrap();
    assert_eq!(guest.packet().data, b"one");
    // Data sent during a pause is not lost either, in both directions.
    client.write_all(b"two").unwrap();
    guest.put(&Header { op: Op::Data, len: 3, ..header(to.src_port, 1) }, b"ack");
    guest.pause();
    assert_eq!(guest.packet().data, b"two");
    let mut ack = [0; 3];
    client.read_exact(&mut ack).unwrap();
    let (_, _late) = guest.request(2);
    guest.device.reset();
    assert_eq!((end(client), guest.connections()), (vec![], 0));
    guest.pause();
    guest.nothing();
    drop(guest.connection(1));
}

/// A new connection that came before the driver has reset the old ones would be reset with them.
#[test]
fn a_restored_guest_gets_nothing_before_it_has_reset_its_connections() {
    for handles in [true, false] {
        let mut guest = Guest::new(16);
        let state = guest.device.save().unwrap();
        guest.device.restore(&state).unwrap();
        guest.pause();
        let mut client = UnixStream::connect(&guest.path).unwrap();
        client.write_all(b"CONNECT 5\n").unwrap();
        assert!(guest.packets().is_empty(), "there is no event buffer yet");
        let head = guest.events.add(&[inn(EVENT_BUFFER, 8)]).unwrap();
        guest.deliver(Event::Kick(EVENTS));
        assert_eq!(guest.events.take_used(), Some((head, 4)));
        assert!(guest.packets().is_empty(), "the event has not been handled");
        // A driver that does not give its buffers back is not waited for forever.
        if handles {
            guest.events.add(&[inn(EVENT_BUFFER, 8)]).unwrap();
            guest.deliver(Event::Kick(EVENTS));
        }
        assert_eq!(guest.packet().header.op, Op::Request);
    }
}

#[test]
fn a_restored_guest_hears_that_its_connections_are_gone() {
    let mut guest = Guest::new(16);
    let state = guest.device.save().unwrap();
    assert_eq!(state, serde_json::json!({"cid": 7}));
    guest.pause();
    assert_eq!(guest.events.take_used(), None);
    guest.device.restore(&state).unwrap();
    guest.pause();
    guest.ram.write(EVENT_BUFFER, &[0xFF; 8]).unwrap();
    let head = guest.events.add(&[inn(EVENT_BUFFER, 8)]).unwrap();
    guest.deliver(Event::Kick(EVENTS));
    assert_eq!(guest.events.take_used(), Some((head, 4)));
    assert_eq!(guest.ram.read_obj::<[u8; 8]>(EVENT_BUFFER).unwrap(), [0, 0, 0, 0, 255, 255, 255, 255]);
    guest.events.add(&[inn(EVENT_BUFFER, 8)]).unwrap();
    guest.deliver(Event::Kick(EVENTS));
    assert_eq!(guest.events.take_used(), None, "once");
    for bad in [serde_json::json!(null), serde_json::json!({"cid": 2}), serde_json::json!({"cid": 3, "x": 1})] {
        let error = guest.device.restore(&bad).unwrap_err().to_string();
        assert!(error.starts_with("the saved state of vsock is broken: "), "{error}");
    }
    guest.device.restore(&state).unwrap();
    guest.events.add(&[inn(EVENT_BUFFER, 3)]).unwrap();
    // The buffer from before is still available.
    guest.deliver(Event::Kick(EVENTS));
    guest.device.restore(&state).unwrap();
    assert!(guest.try_deliver(Event::Kick(EVENTS)).unwrap_err().to_string().contains("shorter than an event"));
}

#[test]
fn options_and_paths() {
    let config: VsockConfig = "cid=3,path=/run/vm.vsock".parse().unwrap();
    assert_eq!(config, VsockConfig { cid: 3, path: "/run/vm.vsock".into() });
    let refused = |text: &str| match text.parse::<VsockConfig>() {
        Ok(config) => config.validate().unwrap_err().to_string(),
        Err(e) => e.to_string(),
    };
    assert_eq!(refused("cid=3"), "'path=' is missing");
    assert_eq!(refused("cid=3,path=a,port=1"), "unknown key 'port'; valid keys are cid, path");
    for cid in [0, 1, 2, u64::from(u32::MAX), 1 << 32] {
        let expected = format!("context id {cid} is not valid for a guest: use 3 to 4294967294");
        assert_eq!(refused(&format!("cid={cid},path=a")), expected);
    }
    assert!(refused(&format!("cid=3,path={}", "x".repeat(97))).contains("is too long for sockets"));
    format!("cid=3,path={}", "x".repeat(96)).parse::<VsockConfig>().unwrap().validate().unwrap();

    let guest = Guest::new(0);
    let mut cid = [0xFF; 12];
    guest.device.read_config(0, &mut cid[..8]);
    assert_eq!(cid, [7, 0, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255]);
    let mut behind = [0; 4];
    guest.device.read_config(6, &mut behind);
    guest.device.read_config(u64::MAX, &mut behind);
    assert_eq!(behind, [0; 4]);
    let config = VsockConfig { cid: 3, path: guest.path.clone() };
    assert!(Vsock::new("vsock", &config).err().unwrap().to_string().ends_with("another process listens there"));
    let path = guest.path.clone();
    drop(guest);
    assert!(!path.exists());
}

/// A step of a random test.
#[derive(Clone, Debug)]
enum Step {
    Connect(u32),
    Write(usize, usize),
    Read(usize),
    Hang(usize),
    Close(usize),
    /// A packet from the guest on a connection: operation, connection, flags, data length, and a bit to flip in the
    /// header.
    Packet(u16, usize, u32, usize, Option<(usize, u8)>),
    /// The guest takes its packets and offers the buffers again.
    Look,
    Pause,
}

fn step() -> impl Strategy<Value = Step> {
    let which = || 0..6usize;
    let op =
        prop_oneof![1 => Just(1u16), 4 => Just(2u16), 1 => Just(3u16), 2 => Just(4u16), 8 => Just(5u16), 2 => 6..8u16];
    let flip = prop::option::weighted(0.1, (0..HEADER, 0..8u8));
    prop_oneof![
        3 => (0..4u32).prop_map(Step::Connect),
        4 => (which(), 1..30_000usize).prop_map(|(n, len)| Step::Write(n, len)),
        3 => which().prop_map(Step::Read),
        1 => which().prop_map(Step::Hang),
        1 => which().prop_map(Step::Close),
        12 => (op, which(), 0..4u32, 0..20_000usize, flip).prop_map(|(op, n, flags, len, flip)| Step::Packet(op, n, flags, len, flip)),
        6 => Just(Step::Look),
        1 => Just(Step::Pause),
    ]
}

/// Runs steps of host and guest. Nothing may panic, stay in flight or spin; each side gets only data that the other
/// sent, and the guest no more than it has room for.
fn check(steps: &[Step]) {
    let mut guest = Guest::new(4);
    let _listener = UnixListener::bind(format!("{}_80", guest.path.display())).unwrap();
    let mut clients: Vec<UnixStream> = vec![];
    let mut known: Vec<Header> = vec![];
    let mut sent: HashMap<(u32, u32), u32> = HashMap::new();
    let flipped = steps.iter().any(|step| matches!(step, Step::Packet(.., Some(_))));
    guest.ram.write(TX_BUFFER + HEADER as u64, &[b'g'; 20_000]).unwrap();
    for step in steps {
        match step {
            Step::Connect(port) => {
                let mut client = UnixStream::connect(&guest.path).unwrap();
                client.set_nonblocking(true).unwrap();
                let _ = writeln!(client, "CONNECT {port}");
                clients.push(client);
            }
            Step::Write(n, len) => _ = clients.get(*n).map(|mut c| c.write(&vec![b'h'; *len])),
            Step::Read(n) => {
                let mut bytes = vec![0; 50_000];
                let n = clients.get(*n).and_then(|mut c| c.read(&mut bytes).ok()).unwrap_or(0);
                let (line, data) = bytes[..n].split_at(n.min(if bytes.starts_with(b"OK ") { 14 } else { 0 }));
                assert!(line.is_empty() || line.ends_with(b"\n"));
                assert!(data.iter().all(|&byte| byte == b'g'));
            }
            Step::Hang(n) => _ = clients.get(*n).map(|c| c.shutdown(Shutdown::Write)),
            Step::Close(n) if *n < clients.len() => drop(clients.swap_remove(*n)),
            Step::Close(_) => {}
            Step::Packet(op, n, flags, len, flip) => {
                let to = known.get(*n).copied().unwrap_or(header(1, 80).reset());
                let len = if *op == 5 { *len } else { 0 };
                let plain = Header { len: len as u32, flags: *flags, ..header(to.src_port, to.dst_port) };
                let mut bytes = plain.bytes();
                bytes[30] = *op as u8;
                if let Some((at, bit)) = flip {
                    bytes[*at] ^= 1 << bit;
                }
                while guest.tx.take_used().is_some() {}
                if guest.tx.add(&[out(TX_BUFFER, (HEADER + len) as u32)]).is_some() {
                    guest.ram.write(TX_BUFFER, &bytes).unwrap();
                    guest.deliver(Event::Kick(TX));
                }
            }
            Step::Look => {
                for Got { header, data } in guest.packets() {
                    assert!(data.iter().all(|&byte| byte == b'h'));
                    let ports = (header.src_port, header.dst_port);
                    *sent.entry(ports).or_default() += data.len() as u32;
                    assert!(flipped || sent[&ports] <= ROOM, "more than there is room for");
                    if header.op == Op::Reset {
                        known.retain(|known| (known.src_port, known.dst_port) != ports);
                    } else if matches!(header.op, Op::Request | Op::Response) {
                        sent.remove(&ports);
                        known.insert(0, header);
                    }
                }
                known.truncate(6);
            }
            Step::Pause => guest.pause(),
        }
        let mut rounds = 0;
        while guest.wire.deliver_ready(&mut *guest.handler, &mut guest.queues, Duration::ZERO).unwrap() > 0 {
            rounds += 1;
            assert!(rounds < 1000, "the device spins");
        }
        assert!(guest.queues.iter().all(|queue| queue.in_flight() == 0));
        assert!(guest.connections() <= clients.len() + steps.len());
    }
    guest.device.reset();
    assert_eq!(guest.connections(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn anything_is_survived(steps in prop::collection::vec(step(), 1..60)) {
        check(&steps);
    }
}
