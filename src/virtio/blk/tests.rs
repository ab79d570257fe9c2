//! Tests of the block device through the fake driver.

use super::queue_handler::QueueHandler;
use super::*;
use crate::memory::{GuestRam, RamSlice};
use crate::virtio::queue::Queue;
use crate::virtio::testing::{Buf, FakeQueue, Loopback, inn, out};
use crate::virtio::{Context, Event, Fault, Handler, Progress};
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use virtio_bindings::virtio_blk::*;

const HDR: u64 = 0x4_0000;
const DATA: u64 = 0x8_0000;
const STATUS: u64 = 0xF_0000;
const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;
const UNTOUCHED: u8 = 0xAA;

/// Disk of 8 sectors that records its calls and can fail.
#[derive(Default)]
struct Diary {
    calls: Mutex<Vec<String>>,
    fail: AtomicBool,
    /// Makes a flush of this device overtake a write, as one from another queue might.
    flush_within: AtomicBool,
    shared: Mutex<Option<Arc<Shared>>>,
    /// Memory whose status byte is checked while a request is executed.
    ram: Option<GuestRam>,
}

impl Diary {
    fn note(&self, what: String) -> io::Result<()> {
        if let Some(ram) = &self.ram {
            assert_eq!(ram.read_obj::<u8>(STATUS).unwrap(), UNTOUCHED, "the status is written last");
        }
        self.calls.lock().unwrap().push(what);
        if self.fail.load(Ordering::Relaxed) { Err(io::Error::from_raw_os_error(libc::ENOSPC)) } else { Ok(()) }
    }
}

impl Disk for Arc<Diary> {
    fn size(&self) -> u64 {
        4096
    }
    fn read(&self, buffers: &[RamSlice<'_>], offset: u64) -> io::Result<()> {
        self.note(format!("read {}@{offset}", buffers.iter().map(|b| b.len()).sum::<usize>()))
    }
    fn write(&self, buffers: &[RamSlice<'_>], offset: u64) -> io::Result<()> {
        if self.flush_within.swap(false, Ordering::Relaxed) {
            let shared = self.shared.lock().unwrap().clone().unwrap();
            shared.flush()?;
        }
        self.note(format!("write {}@{offset}", buffers.iter().map(|b| b.len()).sum::<usize>()))
    }
    fn flush(&self) -> io::Result<()> {
        self.note("flush".into())
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.note(format!("discard {len}@{offset}"))
    }
    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        self.note(format!("zero {len}@{offset} {may_unmap}"))
    }
    fn resize(&self, size: u64) -> io::Result<()> {
        self.note(format!("resize {size}"))
    }
}

/// Waits until something that the handler watches is ready.
fn settle(loopback: &mut Loopback, handler: &mut QueueHandler, queues: &mut [Queue]) -> Result<(), Fault> {
    let ready = loopback.deliver_ready(handler, queues, std::time::Duration::from_secs(60))?;
    assert!(ready > 0, "nothing became ready within a minute");
    Ok(())
}

struct Setup {
    ram: GuestRam,
    driver: FakeQueue,
    queues: [Queue; 1],
    loopback: Loopback,
    handler: QueueHandler,
    shared: Arc<Shared>,
    diary: Arc<Diary>,
}

impl Setup {
    fn new(readonly: bool) -> Self {
        let ram = GuestRam::anonymous(1 << 20);
        let diary = Arc::new(Diary { ram: Some(ram.clone()), ..Diary::default() });
        let config = BlkConfig { path: "a.img".into(), readonly, id: Some("serial7".into()), ..BlkConfig::default() };
        let blk = Blk::with_disk("blk0", &config, Box::new(diary.clone()));
        Self::with(ram, blk, diary)
    }

    fn with(ram: GuestRam, blk: Blk, diary: Arc<Diary>) -> Self {
        let driver = FakeQueue::new(&ram, 0x1000, 16);
        let queues = [driver.device(RING_FEATURES)];
        let shared = blk.shared.clone();
        let ring = (blk.shared.engine != Engine::Sync).then(|| Ring::new(&*blk.shared.disk, &ram).ok()).flatten();
        assert!(ring.is_some() || blk.shared.engine != Engine::IoUring);
        let mut handler = QueueHandler::new(shared.clone(), ring).unwrap();
        let mut queues = queues;
        let loopback = Loopback::new(&ram);
        loopback.deliver(&mut handler, &mut queues, Event::Start).unwrap();
        Setup { ram, driver, queues, loopback, handler, shared, diary }
    }

    fn header(&self, kind: u32, sector: u64) {
        self.ram.write_obj(HDR, kind.to_le()).unwrap();
        self.ram.write_obj(HDR + 4, 0u32).unwrap();
        self.ram.write_obj(HDR + 8, sector.to_le()).unwrap();
        self.ram.write_obj(STATUS, UNTOUCHED).unwrap();
    }

    fn submit(&mut self, bufs: &[Buf]) -> Result<u8, Fault> {
        self.driver.add(bufs).unwrap();
        self.loopback.deliver(&mut self.handler, &mut self.queues, Event::Kick(0))?;
        let (_, written) = loop {
            match self.driver.take_used() {
                Some(used) => break used,
                None => settle(&mut self.loopback, &mut self.handler, &mut self.queues)?,
            }
        };
        assert_eq!(written, bufs.iter().filter(|b| b.write).map(|b| b.len).sum::<u32>());
        Ok(self.ram.read_obj(STATUS).unwrap())
    }

    /// Submits a request in the usual form.
    fn request(&mut self, kind: u32, sector: u64, data: &[Buf]) -> u8 {
        self.header(kind, sector);
        let bufs = [&[out(HDR, 16)], data, &[inn(STATUS, 1)]].concat();
        self.submit(&bufs).unwrap()
    }

    fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.diary.calls.lock().unwrap())
    }
}

#[test]
fn writes_reads_and_flushes_a_file() {
    for engine in [Engine::Sync, Engine::IoUring, Engine::Auto] {
        file_is_written_read_and_flushed(engine);
    }
}

fn file_is_written_read_and_flushed(engine: Engine) {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(64 << 10).unwrap();
    let mut config: BlkConfig = format!("{},id=root", file.path().display()).parse().unwrap();
    config.engine = engine;
    let ram = GuestRam::anonymous(1 << 20);
    let mut setup = Setup::with(ram.clone(), Blk::new("blk0", &config).unwrap(), Arc::default());
    let data: Vec<u8> = (0..1536u32).map(|i| (i % 253) as u8).collect();
    ram.write(DATA, &data).unwrap();
    // Any division into buffers works.
    assert_eq!(setup.request(VIRTIO_BLK_T_OUT, 3, &[out(DATA, 511), out(DATA + 511, 2), out(DATA + 513, 1023)]), OK);
    assert_eq!(setup.request(VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
    let mut back = vec![0; 1536];
    file.as_file().read_exact_at(&mut back, 3 * 512).unwrap();
    assert_eq!(back, data);
    assert_eq!(setup.request(VIRTIO_BLK_T_IN, 3, &[inn(DATA + 0x8000, 1000), inn(DATA + 0x8000 + 1000, 536)]), OK);
    ram.read(DATA + 0x8000, &mut back).unwrap();
    assert_eq!(back, data);
    // The image becomes shorter under the guest: an error for the guest, not for vireo.
    file.as_file().set_len(512).unwrap();
    assert_eq!(setup.request(VIRTIO_BLK_T_IN, 3, &[inn(DATA, 512)]), IOERR);
}

#[test]
fn header_data_and_status_may_be_cut_anywhere() {
    let mut setup = Setup::new(false);
    setup.header(VIRTIO_BLK_T_OUT, 1);
    ramwrite_header_next_to_data(&setup);
    let cut = [out(DATA - 16, 5), out(DATA - 11, 1), out(DATA - 10, 510 + 10), out(DATA + 510, 2), inn(STATUS, 1)];
    assert_eq!(setup.submit(&cut).unwrap(), OK);
    assert_eq!(setup.calls(), ["write 512@512"]);
    // Data and status in one buffer.
    setup.header(VIRTIO_BLK_T_IN, 7);
    assert_eq!(setup.submit(&[out(HDR, 16), inn(STATUS - 512, 513)]).unwrap(), OK);
    assert_eq!(setup.calls(), ["read 512@3584"]);
}

fn ramwrite_header_next_to_data(setup: &Setup) {
    let header: [u8; 16] = setup.ram.read_obj(HDR).unwrap();
    setup.ram.write(DATA - 16, &header).unwrap();
}

#[test]
fn sectors_stay_on_the_disk() {
    let mut setup = Setup::new(false);
    for kind in [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT] {
        let buf = |len| if kind == VIRTIO_BLK_T_IN { inn(DATA, len) } else { out(DATA, len) };
        for (sector, len) in [
            (8, 512),
            (7, 1024),
            (0, 8 * 512 + 512),
            (u64::MAX, 512),
            (u64::MAX / 512, 512),
            (u64::MAX / 512 + 1, 512),
            (9, 0),
            (0, 1),
            (0, 511),
            (0, 513),
        ] {
            assert_eq!(setup.request(kind, sector, &[buf(len)]), IOERR, "{sector} {len}");
        }
        assert_eq!(setup.calls(), [""; 0]);
        assert_eq!(setup.request(kind, 0, &[buf(4096)]), OK);
        assert_eq!(setup.request(kind, 7, &[buf(512)]), OK);
        assert_eq!(setup.request(kind, 8, &[]), OK, "nothing, at the very end");
        setup.calls();
    }
}

#[test]
fn short_headers_and_missing_status() {
    let mut setup = Setup::new(false);
    setup.header(VIRTIO_BLK_T_IN, 0);
    assert_eq!(setup.submit(&[out(HDR, 15), inn(STATUS, 1)]).unwrap(), IOERR);
    setup.header(VIRTIO_BLK_T_IN, 0);
    assert_eq!(setup.submit(&[inn(STATUS, 1)]).unwrap(), IOERR);
    for bufs in [&[out(HDR, 16)][..], &[out(HDR, 16), inn(STATUS, 0)]] {
        let mut setup = Setup::new(false);
        setup.header(VIRTIO_BLK_T_IN, 0);
        let fault = setup.submit(bufs).unwrap_err().to_string();
        assert_eq!(fault, "a block request has no room for its status byte");
    }
}

#[test]
fn unknown_requests_are_unsupported() {
    let mut setup = Setup::new(false);
    for kind in [2, 3, 5, 9, 10, 14, 0x8000_0000, u32::MAX] {
        assert_eq!(setup.request(kind, 0, &[inn(DATA, 512)]), UNSUPP, "{kind}");
    }
    assert_eq!(setup.calls(), [""; 0]);
}

#[test]
fn a_read_only_disk_is_never_written() {
    let mut setup = Setup::new(true);
    assert_eq!(setup.request(VIRTIO_BLK_T_OUT, 0, &[out(DATA, 512)]), IOERR);
    assert_eq!(setup.calls(), [""; 0]);
    assert_eq!(setup.request(VIRTIO_BLK_T_IN, 0, &[inn(DATA, 512)]), OK);
}

#[test]
fn the_id_is_told() {
    let mut setup = Setup::new(false);
    assert_eq!(setup.request(VIRTIO_BLK_T_GET_ID, 0, &[inn(DATA, 20)]), OK);
    assert_eq!(setup.ram.read_obj::<[u8; 20]>(DATA).unwrap(), *b"serial7\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(setup.request(VIRTIO_BLK_T_GET_ID, 0, &[inn(DATA + 32, 3), inn(DATA + 40, 100)]), OK);
    assert_eq!(setup.ram.read_obj::<[u8; 3]>(DATA + 32).unwrap(), *b"ser");
}

#[test]
fn flushes_reach_the_disk() {
    let mut setup = Setup::new(false);
    assert_eq!(setup.request(VIRTIO_BLK_T_OUT, 0, &[out(DATA, 512)]), OK);
    assert_eq!(setup.request(VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
    assert_eq!(setup.calls(), ["write 512@0", "flush"]);
    // Already clean: nothing to flush at the end.
    let ram = setup.ram.clone();
    let drain = |setup: &mut Setup| {
        let (line, poller) = (crate::irq::IrqLine::new(5).unwrap(), crate::event::Poller::new().unwrap());
        let interrupt = crate::virtio::Interrupt::new(line);
        let cx = Context::new(&ram, &interrupt, &poller);
        assert_eq!(setup.handler.drain(&mut setup.queues, &cx).unwrap(), Progress::Done);
    };
    setup.ram.write_obj(STATUS, UNTOUCHED).unwrap();
    drain(&mut setup);
    assert_eq!(setup.calls(), [""; 0]);
    assert_eq!(setup.request(VIRTIO_BLK_T_OUT, 1, &[out(DATA, 512)]), OK);
    setup.ram.write_obj(STATUS, UNTOUCHED).unwrap();
    drain(&mut setup);
    assert_eq!(setup.calls(), ["write 512@512", "flush"]);
    assert!(setup.shared.unsaved.lock().unwrap().is_none());
    // The guest does not learn of this failure; the next flush may succeed although data is lost.
    for fails in [true, false] {
        setup.diary.fail.store(false, Ordering::Relaxed);
        assert_eq!(setup.request(VIRTIO_BLK_T_OUT, 1, &[out(DATA, 512)]), OK);
        setup.ram.write_obj(STATUS, UNTOUCHED).unwrap();
        setup.diary.fail.store(fails, Ordering::Relaxed);
        drain(&mut setup);
        let unsaved = setup.shared.unsaved.lock().unwrap().clone().unwrap();
        assert!(unsaved.starts_with("what the guest wrote to "), "{unsaved}");
    }
    setup.calls();
    // A driver without FLUSH expects every write to be on the disk.
    setup.shared.write_through.store(true, Ordering::Release);
    assert_eq!(setup.request(VIRTIO_BLK_T_OUT, 2, &[out(DATA, 512)]), OK);
    assert_eq!(setup.calls(), ["write 512@1024", "flush"]);
}

#[test]
fn disk_errors_are_the_guests() {
    let mut setup = Setup::new(false);
    setup.diary.fail.store(true, Ordering::Relaxed);
    assert_eq!(setup.request(VIRTIO_BLK_T_OUT, 0, &[out(DATA, 512)]), IOERR);
    assert_eq!(setup.request(VIRTIO_BLK_T_IN, 0, &[inn(DATA, 512)]), IOERR);
    assert_eq!(setup.request(VIRTIO_BLK_T_FLUSH, 0, &[]), IOERR);
    setup.diary.fail.store(false, Ordering::Relaxed);
    assert_eq!(setup.request(VIRTIO_BLK_T_IN, 0, &[inn(DATA, 512)]), OK);
}

#[test]
fn configuration() {
    let config: BlkConfig = "path=root.img,readonly,id=x".parse().unwrap();
    assert_eq!(
        config,
        BlkConfig { path: "root.img".into(), readonly: true, id: Some("x".into()), ..BlkConfig::default() }
    );
    let error = "root.img,colour=3".parse::<BlkConfig>().unwrap_err().to_string();
    assert_eq!(
        error,
        "unknown key 'colour'; valid keys are path, size, readonly, id, format, overlay, direct, queues, engine, bandwidth, \
         bandwidth_burst, ops, ops_burst"
    );
    for id in ["", "a b", "123456789012345678901", "ä"] {
        let config = BlkConfig { path: "x".into(), id: Some(id.into()), ..BlkConfig::default() };
        assert!(config.validate().is_err(), "{id}");
    }
    let blk = Blk::with_disk("blk0", &config, Box::new(Arc::<Diary>::default()));
    let features = blk.info().features;
    assert_ne!(features & 1 << VIRTIO_BLK_F_RO, 0);
    let mut bytes = [0xEE; 64];
    blk.read_config(0, &mut bytes);
    assert_eq!(bytes[..24], [8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 254, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0]);
    assert_eq!(bytes[60..], [0xEE; 4]);
    for offset in [59, 60, 100, u64::MAX] {
        blk.read_config(offset, &mut [0; 8]);
    }
}

#[test]
fn a_saved_disk_keeps_its_size() {
    let config: BlkConfig = "a.img".parse().unwrap();
    let mut blk = Blk::with_disk("blk0", &config, Box::new(Arc::<Diary>::default()));
    let state = blk.save().unwrap();
    blk.restore(&state).unwrap();
    let error = blk.restore(&serde_json::json!({"sectors": 9, "writeback": true})).unwrap_err().to_string();
    assert_eq!(error, "disk a.img has 8 sectors now and had 9 when it was saved");
    for broken in
        [serde_json::Value::Null, serde_json::json!({"sectors": -1, "writeback": true}), serde_json::json!({"x": 1})]
    {
        assert!(blk.restore(&broken).unwrap_err().to_string().starts_with("the saved state of blk0 is broken"));
    }
}

fn range(sector: u64, count: u32, flags: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12].copy_from_slice(&count.to_le_bytes());
    bytes[12..].copy_from_slice(&flags.to_le_bytes());
    bytes
}

#[test]
fn ranges_are_given_up_and_zeroed() {
    let mut setup = Setup::new(false);
    setup.ram.write(DATA, &[range(1, 2, 0), range(4, 4, 0)].concat()).unwrap();
    assert_eq!(setup.request(VIRTIO_BLK_T_DISCARD, 99, &[out(DATA, 20), out(DATA + 20, 12)]), OK);
    assert_eq!(setup.calls(), ["discard 1024@512", "discard 2048@2048"]);
    setup.ram.write(DATA, &[range(0, 8, 1), range(8, 0, 0)].concat()).unwrap();
    assert_eq!(setup.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &[out(DATA, 32)]), OK);
    assert_eq!(setup.calls(), ["zero 4096@0 true", "zero 0@4096 false"]);
    // Undefined flags in one of two ranges: nothing is done.
    for (kind, flags, status) in [
        (VIRTIO_BLK_T_DISCARD, 1, UNSUPP),
        (VIRTIO_BLK_T_DISCARD, 2, UNSUPP),
        (VIRTIO_BLK_T_WRITE_ZEROES, 3, UNSUPP),
        (VIRTIO_BLK_T_WRITE_ZEROES, u32::MAX, UNSUPP),
    ] {
        setup.ram.write(DATA, &[range(0, 1, 0), range(0, 1, flags)].concat()).unwrap();
        assert_eq!(setup.request(kind, 0, &[out(DATA, 32)]), status, "{kind} {flags}");
    }
    for bad in
        [range(8, 1, 0), range(u64::MAX, 1, 0), range(0, 9, 0), range(0, u32::MAX, 0), range(u64::MAX / 512, 8, 0)]
    {
        setup.ram.write(DATA, &bad).unwrap();
        for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
            assert_eq!(setup.request(kind, 0, &[out(DATA, 16)]), IOERR);
        }
    }
    for len in [1, 15, 17, 16 * (MAX_RANGES + 1)] {
        assert_eq!(setup.request(VIRTIO_BLK_T_DISCARD, 0, &[out(DATA, len)]), IOERR, "{len} bytes of ranges");
    }
    assert_eq!(setup.calls(), [""; 0]);
    let mut readonly = Setup::new(true);
    readonly.ram.write(DATA, &range(0, 1, 0)).unwrap();
    assert_eq!(readonly.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &[out(DATA, 16)]), IOERR);
}

/// Checks that the driver can write only one byte of configuration space.
#[test]
fn the_cache_can_be_turned_off() {
    let config: BlkConfig = "a.img".parse().unwrap();
    let mut blk = Blk::with_disk("blk0", &config, Box::new(Arc::<Diary>::default()));
    for (offset, data) in [(0, &[9][..]), (31, &[0]), (32, &[0, 0]), (33, &[0]), (u64::MAX, &[0])] {
        blk.write_config(offset, data);
        assert!(blk.writeback() && blk.config[0] == 8);
    }
    blk.write_config(32, &[0]);
    let mut byte = [9];
    blk.read_config(32, &mut byte);
    assert!(byte == [0] && blk.shared.write_through.load(Ordering::Acquire));
    let state = blk.save().unwrap();
    blk.reset();
    assert!(blk.writeback());
    blk.restore(&state).unwrap();
    assert!(!blk.writeback());
}

#[test]
fn limits_are_kept_and_nothing_is_lost() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(64 << 10).unwrap();
    let config: BlkConfig = format!("{},ops=100,ops_burst=1", file.path().display()).parse().unwrap();
    let ram = GuestRam::anonymous(1 << 20);
    let mut setup = Setup::with(ram, Blk::new("blk0", &config).unwrap(), Arc::default());
    let start = std::time::Instant::now();
    for sector in 0..6 {
        assert_eq!(setup.request(VIRTIO_BLK_T_OUT, sector, &[out(DATA, 512)]), OK);
    }
    assert!(start.elapsed() >= std::time::Duration::from_millis(50), "five of six had to wait for 10 ms");
}

/// Creates a sparse disk of 4 GiB.
fn sparse(options: &str) -> (tempfile::NamedTempFile, Setup) {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(4 << 30).unwrap();
    let config: BlkConfig = format!("{}{options}", file.path().display()).parse().unwrap();
    let setup = Setup::with(GuestRam::anonymous(1 << 20), Blk::new("blk0", &config).unwrap(), Arc::default());
    (file, setup)
}

#[test]
fn zeros_have_a_bound_and_take_turns() {
    let (_file, mut setup) = sparse("");
    // Ranges that fit into 1 GiB, and some that do not. Discarding writes nothing, and bounds only each range.
    for (counts, status) in [([1 << 20, 1 << 20], OK), ([1 << 20, (1 << 20) + 1], IOERR), ([1 << 21, 1], IOERR)] {
        setup.ram.write(DATA, &counts.map(|count| range(1 << 22, count, 1)).concat()).unwrap();
        assert_eq!(setup.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &[out(DATA, 32)]), status, "{counts:?}");
        setup.ram.write(DATA, &counts.map(|count| range(1 << 22, count, 0)).concat()).unwrap();
        assert_ne!(setup.request(VIRTIO_BLK_T_DISCARD, 0, &[out(DATA, 32)]), IOERR, "{counts:?}");
    }
    // Each request may take long: a pause takes effect between two.
    setup.header(VIRTIO_BLK_T_WRITE_ZEROES, 0);
    setup.ram.write(DATA, &range(0, 8, 1)).unwrap();
    for _ in 0..2 {
        setup.driver.add(&[out(HDR, 16), out(DATA, 16), inn(STATUS, 1)]).unwrap();
    }
    let poller = crate::event::Poller::new().unwrap();
    let cx = Context::new(&setup.ram, &setup.loopback.interrupt, &poller);
    for _ in 0..2 {
        assert_eq!(setup.handler.event(Event::Kick(0), &mut setup.queues, &cx).unwrap(), Progress::More);
        assert!(setup.driver.take_used().is_some() && setup.driver.take_used().is_none());
    }
    assert_eq!(setup.handler.event(Event::Kick(0), &mut setup.queues, &cx).unwrap(), Progress::Done);
}

#[test]
fn zeros_count_for_the_bandwidth() {
    let (_file, mut setup) = sparse(",bandwidth=1M");
    setup.ram.write(DATA, &range(0, 1 << 21, 1)).unwrap();
    assert_eq!(setup.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &[out(DATA, 16)]), OK);
    let wait = setup.shared.limiter.as_ref().unwrap().take(1).unwrap_err();
    assert!(wait > std::time::Duration::from_secs(500), "{wait:?} for 1 GiB");
}

#[test]
fn keys_that_make_no_sense_are_refused() {
    let refused = |text: &str| text.parse::<BlkConfig>().unwrap().validate().unwrap_err().to_string();
    assert_eq!(refused("a,queues=0"), "queues=0: a disk can have 1 to 16");
    assert_eq!(refused("a,queues=17"), "queues=17: a disk can have 1 to 16");
    assert_eq!(refused("a,ops=0"), "disk a: a limit or burst of 0 would let nothing through");
    assert_eq!(refused("a,ops_burst=5"), "disk a: ops_burst needs ops");
    assert_eq!(refused("a,bandwidth_burst=5M"), "disk a: bandwidth_burst needs bandwidth");
    assert!("a,format=vmdk".parse::<BlkConfig>().unwrap_err().to_string().contains("valid values are raw, qcow2"));
    let both: BlkConfig = "/nowhere,readonly,overlay=tmp".parse().unwrap();
    let error = Blk::new("blk0", &both).err().unwrap().to_string();
    assert!(error.contains("readonly and overlay exclude each other"), "{error}");
    let json =
        serde_json::to_value("a,overlay=tmp,engine=io_uring,queues=4,bandwidth=10M".parse::<BlkConfig>().unwrap());
    let config: BlkConfig = serde_json::from_value(json.unwrap()).unwrap();
    assert_eq!((config.overlay, config.engine, config.queues), (Some(Overlay::Tmp), Engine::IoUring, Some(4)));
}

#[test]
fn many_requests_in_flight_come_back_each_with_its_own_data() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let content: Vec<u8> = (0..64u32 << 10).map(|i| (i / 512 * 7 + i % 251) as u8).collect();
    std::fs::write(file.path(), &content).unwrap();
    let config: BlkConfig = format!("{},engine=io_uring", file.path().display()).parse().unwrap();
    let ram = GuestRam::anonymous(4 << 20);
    let mut setup = Setup::with(ram, Blk::new("blk0", &config).unwrap(), Arc::default());
    for round in 0..50u64 {
        for i in 0..4u64 {
            let sector = (round * 5 + i) * 13 % 120;
            setup.ram.write_obj(HDR + 32 * i, VIRTIO_BLK_T_IN.to_le()).unwrap();
            setup.ram.write_obj(HDR + 32 * i + 8, sector.to_le()).unwrap();
            setup.ram.write_obj(STATUS + i, UNTOUCHED).unwrap();
            let data = 0x10_0000 + 0x1_0000 * i;
            let bufs = [out(HDR + 32 * i, 16), inn(data, 100), inn(data + 100, 4096 - 100), inn(STATUS + i, 1)];
            setup.driver.add(&bufs).unwrap();
        }
        setup.loopback.deliver(&mut setup.handler, &mut setup.queues, Event::Kick(0)).unwrap();
        let mut used = 0;
        while used < 4 {
            match setup.driver.take_used() {
                Some(_) => used += 1,
                None => settle(&mut setup.loopback, &mut setup.handler, &mut setup.queues).unwrap(),
            }
        }
        for i in 0..4u64 {
            let sector = ((round * 5 + i) * 13 % 120) as usize;
            let mut got = vec![0; 4096];
            setup.ram.read(0x10_0000 + 0x1_0000 * i, &mut got).unwrap();
            assert_eq!(setup.ram.read_obj::<u8>(STATUS + i).unwrap(), OK);
            assert!(got == content[sector * 512..sector * 512 + 4096], "round {round}, request {i}");
        }
    }
}

#[test]
fn a_disk_grows_while_it_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.img");
    for config in [format!("{}", path.display()), format!("{},overlay=tmp", path.display())] {
        std::fs::write(&path, [1; 4096]).unwrap();
        let mut blk = Blk::new("disk0", &config.parse().unwrap()).unwrap();
        let features = blk.info().features;
        let resize = |blk: &mut Blk, bytes| blk.control(&Control::ResizeDisk(bytes));
        for bytes in [0, 2048, 4097, 8191] {
            let refused = resize(&mut blk, bytes).unwrap_err().to_string();
            assert!(refused.contains("is not a multiple of 512, or is below the current 4096"), "{refused}");
        }
        assert_eq!(resize(&mut blk, 8192), Ok(Reply::ConfigChanged));
        let mut capacity = [0; 8];
        blk.read_config(0, &mut capacity);
        assert_eq!((u64::from_le_bytes(capacity), blk.info().features), (16, features));
        let ram = GuestRam::anonymous(1 << 20);
        let mut setup = Setup::with(ram, blk, Arc::default());
        assert_eq!(setup.request(VIRTIO_BLK_T_OUT, 15, &[out(DATA, 512)]), OK);
        assert_eq!(setup.request(VIRTIO_BLK_T_IN, 16, &[inn(DATA, 512)]), IOERR);
        assert_eq!(path.metadata().unwrap().len(), if config.contains("overlay") { 4096 } else { 8192 });
    }
    let mut readonly = Blk::new("disk0", &format!("{},readonly", path.display()).parse().unwrap()).unwrap();
    assert!(readonly.control(&Control::ResizeDisk(1 << 20)).unwrap_err().to_string().contains("read-only"));
    assert!(readonly.control(&Control::BalloonStats).is_err());
}

/// Checks that a flush during a write does not count for that write.
#[test]
fn what_was_written_during_a_flush_is_flushed_at_the_end() {
    let mut setup = Setup::new(false);
    assert_eq!(setup.request(VIRTIO_BLK_T_OUT, 0, &[out(DATA, 512)]), OK);
    let shared = setup.shared.clone();
    setup.ram.write_obj(STATUS, UNTOUCHED).unwrap();
    shared.flush().unwrap();
    assert!(!shared.dirty.load(Ordering::Acquire));
    setup.diary.flush_within.store(true, Ordering::Relaxed);
    setup.diary.shared.lock().unwrap().replace(shared.clone());
    assert_eq!(setup.request(VIRTIO_BLK_T_OUT, 1, &[out(DATA, 512)]), OK);
    setup.diary.shared.lock().unwrap().take();
    assert!(shared.dirty.load(Ordering::Acquire));
}

/// Disk on the reading end of a pipe, where a read waits for bytes.
struct Pipe {
    file: std::io::PipeReader,
    /// File descriptor of the ring.
    ring: Arc<std::sync::atomic::AtomicI32>,
}

impl Disk for Pipe {
    fn size(&self) -> u64 {
        4096
    }
    fn read(&self, _: &[RamSlice<'_>], _: u64) -> io::Result<()> {
        unreachable!("the ring reads")
    }
    fn write(&self, _: &[RamSlice<'_>], _: u64) -> io::Result<()> {
        unreachable!()
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        unreachable!()
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        unreachable!()
    }
    fn resize(&self, _: u64) -> io::Result<()> {
        unreachable!()
    }
    fn fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        Some(std::os::fd::AsFd::as_fd(&self.file))
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        let ring = self.ring.load(Ordering::Relaxed);
        let open = std::fs::read_link(format!("/proc/self/fd/{ring}"));
        assert!(open.is_err(), "the disk goes before its ring: {open:?}");
        println!("the ring is gone");
    }
}

/// Runs in a separate process, where no other test opens files: a ring that is dropped with requests in flight needs
/// the file.
#[test]
fn a_disk_outlives_its_ring() {
    const CHILD: &str = "VIREO_TEST_RING";
    if std::env::var_os(CHILD).is_none() {
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        let this = "virtio::blk::tests::a_disk_outlives_its_ring";
        let output = command.args(["--exact", this, "--nocapture"]).env(CHILD, "1").output().unwrap();
        let stdout = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && stdout.contains("the ring is gone"), "{output:?}");
        return;
    }
    let (file, mut writer) = io::pipe().unwrap();
    let ring_number = Arc::new(std::sync::atomic::AtomicI32::new(-1));
    let disk = Pipe { file, ring: ring_number.clone() };
    let config = BlkConfig { path: "pipe".into(), ..BlkConfig::default() };
    let blk = Blk::with_disk("blk0", &config, Box::new(disk));
    let ram = GuestRam::anonymous(1 << 20);
    let Ok(ring) = Ring::new(&*blk.shared.disk, &ram) else {
        println!("the ring is gone: this host has no io_uring");
        return;
    };
    ring_number.store(std::os::fd::AsRawFd::as_raw_fd(&ring), Ordering::Relaxed);
    let mut driver = FakeQueue::new(&ram, 0x1000, 16);
    let mut queues = [driver.device(RING_FEATURES)];
    let mut handler = QueueHandler::new(blk.shared.clone(), Some(ring)).unwrap();
    let loopback = Loopback::new(&ram);
    ram.write_obj(HDR, VIRTIO_BLK_T_IN.to_le()).unwrap();
    driver.add(&[out(HDR, 16), inn(DATA, 512), inn(STATUS, 1)]).unwrap();
    loopback.deliver(&mut handler, &mut queues, Event::Kick(0)).unwrap();
    assert_eq!(driver.take_used(), None, "the read waits");
    drop(blk);
    io::Write::write_all(&mut writer, &[1; 512]).unwrap();
    drop(handler);
}
