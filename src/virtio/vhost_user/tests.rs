use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_STATUS};

use super::*;
use crate::backend::vhost_user::testing::{Answer, FakeDaemon, good};
use crate::irq::IrqLine;
use crate::memory::{GuestRam, MemoryConfig};
use crate::options::Size;
use crate::virtio::mmio::MmioTransport;
use crate::virtio::testing::{FakeDriver, VERSION_1};

const NEEDS_RESET: u32 = 64;
const BLK: u64 = VERSION_1 | RING_FEATURES | BLK_FEATURES;

fn config(daemon: &FakeDaemon, rest: &str) -> VhostUserConfig {
    format!("socket={},{rest}", daemon.path.display()).parse().unwrap()
}

fn why(daemon: &FakeDaemon, rest: &str) -> String {
    open("vu0", &config(daemon, rest)).err().unwrap().to_string()
}

fn ram() -> GuestRam {
    GuestRam::new(&MemoryConfig { size: Size(1 << 20), shared: true, ..MemoryConfig::default() }).unwrap()
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn configuration() {
    let check = |text: &str| text.parse::<VhostUserConfig>().unwrap().validate().map_err(|e| e.to_string());
    for good in
        ["socket=s,type=blk,queues=16", "socket=s,type=fs,tag=x", "socket=s,type=net,mac=02:00:00:00:00:01,mtu=68"]
    {
        assert_eq!(check(good), Ok(()), "{good}");
    }
    for (bad, why) in [
        ("socket=s,type=blk,queues=0", "queues=0: a vhost-user device can have 1 to 16"),
        ("socket=s,type=net,queues=17", "queues=17: "),
        ("socket=s,type=blk,tag=x", "'tag' is for type=fs only"),
        ("socket=s,type=fs,mac=02:00:00:00:00:01", "'mac' is for type=net only"),
        ("socket=s,type=blk,mtu=1400", "'mtu' is for type=net only"),
        ("socket=s,type=net,mtu=67", "mtu=67: must be 68 to 65535"),
        ("socket=s,type=fs,tag=0123456789012345678901234567890123456", "is not 1 to 36 bytes"),
    ] {
        assert!(check(bad).unwrap_err().contains(why), "{bad}");
    }
    assert!(check(&format!("socket={},type=fs", "x".repeat(108))).unwrap_err().contains("too long for a socket"));
    for (bad, why) in [
        ("socket=s", "'type=' is missing"),
        ("type=fs", "'socket=' is missing"),
        ("socket=s,type=gpu", "unknown value 'gpu'; valid values are fs, blk, net"),
        ("socket=s,type=fs,x=1", "valid keys are socket, type, queues, tag, mac, mtu"),
    ] {
        let error = bad.parse::<VhostUserConfig>().unwrap_err().to_string();
        assert!(error.contains(why), "{bad}: {error}");
    }
}

#[test]
fn daemons_of_another_kind() {
    let fs = FakeDaemon::good(VERSION_1 | RING_FEATURES);
    let blk = FakeDaemon::good(BLK);
    let net = FakeDaemon::good(VERSION_1 | RING_FEATURES | 1 << VIRTIO_NET_F_MRG_RXBUF | 1 << 1);
    for (daemon, rest) in [(&blk, "type=fs,tag=x"), (&net, "type=fs,tag=x"), (&net, "type=blk"), (&blk, "type=net")] {
        let why = why(daemon, rest);
        assert!(why.contains(" does not serve type=") && why.contains("that no such device has"), "{rest}: {why}");
    }
    assert!(why(&blk, "type=blk,queues=6").contains("it serves 5 queues, but 6 are needed"));
    assert!(why(&fs, "type=fs,tag=x,queues=5").contains("it serves 5 queues, but 6 are needed"));
    assert!(why(&fs, "type=blk,queues=2").contains("it supports only one queue"));
    let old = FakeDaemon::good(RING_FEATURES);
    assert!(why(&old, "type=blk").contains("cannot use the vhost-user daemon"));
    let no_config = FakeDaemon::start(|request, payload| match request {
        24 => Answer::Good(vec![0; 12]),
        _ => Answer::Good(good(VERSION_1, request, payload)),
    });
    assert!(why(&no_config, "type=blk").contains("it does not report the disk's size"));
    let no_config = FakeDaemon::start(|request, payload| match request {
        24 => Answer::Good(vec![0; 12]),
        _ => Answer::Good(good(VERSION_1, request, payload)),
    });
    assert!(why(&no_config, "type=fs").contains("it has no tag of its own (set one with tag=NAME)"));
}

#[test]
fn configuration_space() {
    let daemon = FakeDaemon::good(BLK | 1 << 28 | 1 << 33 | 1 << 34 | 1 << 26);
    let mut blk = open("vu0", &config(&daemon, "type=blk,queues=3")).unwrap();
    assert_eq!(blk.info().features, RING_FEATURES | BLK_FEATURES, "unknown features are not offered");
    assert_eq!(blk.info().queue_sizes, [256; 3]);
    let mut space = [0xEE; 64];
    blk.read_config(0, &mut space);
    let mut wanted: Vec<u8> = (0..60).chain([0xEE; 4]).collect();
    wanted[34..36].copy_from_slice(&[3, 0]);
    assert_eq!(space.to_vec(), wanted);
    blk.read_config(u64::MAX, &mut space);
    let _ = daemon.seen();
    // Only the cache mode can be written.
    for (offset, data) in [(0, &[0u8; 8][..]), (32, &[2]), (32, &[0, 0]), (33, &[1]), (u64::MAX, &[1])] {
        blk.write_config(offset, data);
    }
    assert!(daemon.seen().is_empty());
    blk.write_config(32, &[1]);
    assert_eq!(daemon.seen(), [25]);
    let mut mode = [0];
    blk.read_config(32, &mut mode);
    assert_eq!(mode, [1]);

    let daemon = FakeDaemon::good(VERSION_1 | RING_FEATURES);
    let fs = open("vu1", &config(&daemon, "type=fs,tag=work,queues=2")).unwrap();
    let mut space = [0xEE; 41];
    fs.read_config(0, &mut space);
    assert_eq!(space.to_vec(), [&b"work"[..], &[0; 32], &[2, 0, 0, 0, 0xEE]].concat());
    assert_eq!(fs.info().queue_sizes, [256; 3]);
    drop(fs);
    let fs = open("vu2", &config(&daemon, "type=fs")).unwrap();
    fs.read_config(0, &mut space);
    assert_eq!((space[35], space[36]), (35, 1), "its own tag");

    let features = VERSION_1 | RING_FEATURES | 1 << VIRTIO_NET_F_MRG_RXBUF | 1;
    let daemon = FakeDaemon::good(features);
    let net = open("vu3", &config(&daemon, "type=net,queues=2,mac=02:00:00:00:00:07,mtu=1400")).unwrap();
    assert_eq!(net.info().queue_sizes, [256, 256, 256, 256, 64]);
    assert_eq!(net.info().features & 0xFFFF, 1 | 1 << 3 | 1 << 5 | 1 << 15, "CSUM, MTU, MAC, MRG_RXBUF");
}

/// A transport with a daemon's disk. The daemon ends on demand and may then offer other features.
struct Setup {
    ram: GuestRam,
    daemon: FakeDaemon,
    ends: Arc<AtomicBool>,
    features: Arc<AtomicU64>,
    transport: MmioTransport,
}

fn setup() -> Setup {
    let (ends, features) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(BLK)));
    let (told, offered) = (ends.clone(), features.clone());
    let daemon = FakeDaemon::start(move |request, payload| match told.swap(false, Ordering::SeqCst) {
        true => Answer::End,
        false => Answer::Good(good(offered.load(Ordering::SeqCst), request, payload)),
    });
    let ram = ram();
    let blk = open("vu0", &config(&daemon, "type=blk")).unwrap();
    let transport = MmioTransport::new(blk, ram.clone(), IrqLine::new(5).unwrap()).unwrap();
    Setup { ram, daemon, ends, features, transport }
}

#[test]
fn a_daemon_serves_through_stops_and_resets() {
    let s = setup();
    let _ = s.daemon.seen();
    let mut driver = FakeDriver::new(&s.transport, &s.ram);
    driver.start(RING_FEATURES, 0x1000, 8);
    assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 15);
    assert_eq!(driver.get(VIRTIO_MMIO_INTERRUPT_STATUS), 1);
    assert_eq!(s.daemon.seen(), [2, 5, 8, 10, 9, 13, 12, 18]);
    s.transport.pause().unwrap();
    assert_eq!(s.daemon.seen(), [11]);
    let queue = s.transport.save().unwrap().queues[0];
    assert_eq!((queue.next_avail, queue.next_used), (7, 0));
    s.transport.resume();
    let told: Vec<_> = s.daemon.requests.try_iter().collect();
    assert!(told.contains(&(10, [0, 0, 0, 0, 7, 0, 0, 0].to_vec())), "the daemon continues at the saved position");
    driver.set(VIRTIO_MMIO_STATUS, 0);
    assert_eq!((driver.get(VIRTIO_MMIO_STATUS), s.daemon.seen()), (0, vec![11]));
    driver.start(RING_FEATURES, 0x1000, 8);
    assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 15);
}

#[test]
fn a_daemon_that_is_gone_needs_a_reset_and_the_next_one_serves() {
    let s = setup();
    let mut driver = FakeDriver::new(&s.transport, &s.ram);
    driver.start(RING_FEATURES, 0x1000, 8);
    s.ends.store(true, Ordering::SeqCst);
    // The daemon ends at the next request.
    s.transport.pause().unwrap();
    assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 15 | NEEDS_RESET);
    s.transport.resume();
    assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 15 | NEEDS_RESET);
    let _ = s.daemon.seen();
    driver.set(VIRTIO_MMIO_STATUS, 0);
    driver.start(RING_FEATURES, 0x1000, 8);
    assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 15);
    assert_eq!(s.daemon.seen(), [1, 15, 16, 17, 3, 24, 2, 5, 8, 10, 9, 13, 12, 18]);
    // A new daemon that lacks features is not accepted.
    s.ends.store(true, Ordering::SeqCst);
    s.transport.pause().unwrap();
    s.transport.resume();
    driver.set(VIRTIO_MMIO_STATUS, 0);
    s.features.store(VERSION_1, Ordering::SeqCst);
    driver.start(RING_FEATURES, 0x1000, 8);
    assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 15 | NEEDS_RESET);
}

#[test]
fn the_end_of_a_daemon_is_seen_at_once() {
    let s = setup();
    let mut driver = FakeDriver::new(&s.transport, &s.ram);
    driver.start(RING_FEATURES, 0x1000, 8);
    s.ends.store(true, Ordering::SeqCst);
    crate::bus::BusDevice::write(&s.transport, 0x100 + 32, &[1]);
    until("the driver is notified", || driver.get(VIRTIO_MMIO_STATUS) & NEEDS_RESET != 0);
}

#[test]
fn the_cache_mode_outlives_daemons_and_pauses_and_no_reset() {
    let s = setup();
    let mut driver = FakeDriver::new(&s.transport, &s.ram);
    driver.start(RING_FEATURES, 0x1000, 8);
    let mode = || {
        let mut mode = [0];
        crate::bus::BusDevice::read(&s.transport, 0x100 + 32, &mut mode);
        mode[0]
    };
    // Initial value in the fake daemon's configuration space.
    assert_eq!(mode(), 32);
    let told = || s.daemon.requests.try_iter().filter(|(request, _)| *request == 25).collect::<Vec<_>>();
    let set = |byte: u8| vec![(25, [&[32, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0][..], &[byte]].concat())];
    crate::bus::BusDevice::write(&s.transport, 0x100 + 32, &[0]);
    crate::bus::BusDevice::write(&s.transport, 0x100 + 32, &[1]);
    crate::bus::BusDevice::write(&s.transport, 0x100 + 32, &[0]);
    assert_eq!((mode(), told()), (0, [set(0), set(1), set(0)].concat()));
    s.transport.pause().unwrap();
    let state = s.transport.save().unwrap();
    // A new daemon takes over during the pause.
    s.ends.store(true, Ordering::SeqCst);
    crate::bus::BusDevice::write(&s.transport, 0x100 + 32, &[1]);
    s.transport.resume();
    assert_eq!((driver.get(VIRTIO_MMIO_STATUS), mode(), told()), (15, 0, set(0)));
    driver.set(VIRTIO_MMIO_STATUS, 0);
    assert_eq!((mode(), told()), (32, set(32)));
    driver.set(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(told(), []);

    let daemon = FakeDaemon::good(BLK);
    let blk = open("vu0", &config(&daemon, "type=blk")).unwrap();
    let restored = MmioTransport::from_state(blk, s.ram.clone(), IrqLine::new(5).unwrap(), &state).unwrap();
    assert_eq!(restored.save().unwrap().device, serde_json::json!({"writeback": false}));
    assert_eq!(daemon.requests.try_iter().filter(|(request, _)| *request == 25).collect::<Vec<_>>(), set(0));
    let plain = FakeDaemon::good(VERSION_1 | RING_FEATURES);
    let mut fs = open("vu1", &config(&plain, "type=fs,tag=x")).unwrap();
    assert!(fs.restore(&state.device).unwrap_err().to_string().contains("does not support changing the cache mode"));
    let state = fs.save().unwrap();
    fs.restore(&state).unwrap();
    assert!(fs.restore(&serde_json::json!({"writeback": 1})).is_err());
}

/// 2.5.1, with a daemon that changes its configuration all the time: bytes read within one generation are consistent.
#[test]
fn configuration_is_never_torn() {
    let version = AtomicU64::new(0);
    let daemon = FakeDaemon::start(move |request, payload| {
        let mut answer = good(BLK, request, payload);
        if request == 24 {
            let byte = version.fetch_add(1, Ordering::SeqCst) as u8;
            answer.iter_mut().skip(12).for_each(|to| *to = byte);
        }
        Answer::Good(answer)
    });
    let connection = Connection::open(&daemon.path).unwrap();
    connection.read_config(BLK_CONFIG).unwrap();
    let interrupt = crate::virtio::Interrupt::new(IrqLine::new(5).unwrap());
    std::thread::scope(|scope| {
        let changes = scope.spawn(|| (0..2000).for_each(|_| connection.refreshed(&interrupt).unwrap()));
        while !changes.is_finished() {
            let before = interrupt.generation();
            let (first, second) = (connection.config()[0], connection.config()[1]);
            if interrupt.generation() == before {
                assert_eq!(first, second);
            }
        }
    });
    assert_eq!(interrupt.read_reasons(), 2);
}

/// A new daemon has another disk: the driver, which read the size of the first, is notified.
#[test]
fn another_configuration_of_the_next_daemon_is_reported() {
    let (ends, size) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(1)));
    let (its_ends, its_size) = (ends.clone(), size.clone());
    let daemon = FakeDaemon::start(move |request, payload| {
        let mut answer = good(BLK, request, payload);
        if request == 24 {
            answer[12] = its_size.load(Ordering::SeqCst) as u8;
        }
        if its_ends.swap(false, Ordering::SeqCst) { Answer::End } else { Answer::Good(answer) }
    });
    let ram = ram();
    let blk = open("vu0", &config(&daemon, "type=blk")).unwrap();
    let transport = MmioTransport::new(blk, ram.clone(), IrqLine::new(5).unwrap()).unwrap();
    let mut driver = FakeDriver::new(&transport, &ram);
    driver.start(RING_FEATURES, 0x1000, 8);
    assert_eq!(driver.get(VIRTIO_MMIO_INTERRUPT_STATUS), 1);
    for (next, reasons) in [(2, 3), (2, 1)] {
        ends.store(true, Ordering::SeqCst);
        size.store(next, Ordering::SeqCst);
        transport.pause().unwrap();
        transport.resume();
        driver.set(VIRTIO_MMIO_STATUS, 0);
        driver.start(RING_FEATURES, 0x1000, 8);
        assert_eq!((driver.get(VIRTIO_MMIO_STATUS), driver.get(VIRTIO_MMIO_INTERRUPT_STATUS)), (15, reasons));
    }
}

#[test]
fn memory_must_be_shared() {
    let daemon = FakeDaemon::good(BLK);
    let blk = open("vu0", &config(&daemon, "type=blk")).unwrap();
    let ram = GuestRam::anonymous(1 << 20);
    let transport = MmioTransport::new(blk, ram.clone(), IrqLine::new(5).unwrap()).unwrap();
    let mut driver = FakeDriver::new(&transport, &ram);
    driver.start(RING_FEATURES, 0x1000, 8);
    assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 15 | NEEDS_RESET);
}
