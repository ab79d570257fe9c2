//! Block device (5.2).

use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use log::{debug, warn};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_ID_BYTES,
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
};

use super::chain::{Chain, Reader, Writer};
use super::{
    Activated, Activation, Context, DeviceId, DeviceInfo, Event, Fault, Handler, Progress, RING_FEATURES, Share,
    StateError, VirtioDevice, queue::Queue,
};
use crate::backend::Disk;
use crate::backend::raw::{self, RawDisk};
use crate::memory::{GuestRam, OutOfRam, RamSlice};
use crate::options;

/// The unit of sectors and capacity, whatever the block size (5.2.4).
const SECTOR: u64 = 512;
const QUEUE_SIZE: u16 = 256;
/// Bytes of the request header (5.2.6).
const HEADER: usize = 16;
const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;
/// Bytes of configuration space up to and including `num_queues` (5.2.4).
const CONFIG_BYTES: usize = 36;

/// `--disk`: a block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlkConfig {
    /// The image: a regular file or a block device.
    pub path: PathBuf,
    /// Refuse writes, and share the image with other readers.
    #[serde(default)]
    pub readonly: bool,
    /// What the guest sees in `/sys/block/vdX/serial`: at most 20 bytes of printable ASCII.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
}

impl FromStr for BlkConfig {
    type Err = options::Error;

    fn from_str(text: &str) -> Result<Self, options::Error> {
        options::from_str(text, Some("path"))
    }
}

/// Why a block device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The image.
    #[error(transparent)]
    Disk(#[from] raw::Error),
    /// The id.
    #[error("disk id '{0}' is not 1 to 20 printable ASCII characters")]
    Id(String),
}

impl BlkConfig {
    /// Checks what needs no file to be opened.
    pub fn validate(&self) -> Result<(), Error> {
        match &self.id {
            Some(id) if id.is_empty() || id.len() > ID_BYTES || !id.bytes().all(|b| b.is_ascii_graphic()) => {
                Err(Error::Id(id.clone()))
            }
            _ => Ok(()),
        }
    }
}

/// What is saved of a block device: its contents are the image's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlkState {
    /// Capacity in sectors of 512 bytes that the guest was told.
    pub sectors: u64,
}

/// The device.
pub struct Blk {
    info: DeviceInfo,
    config: [u8; CONFIG_BYTES],
    shared: Arc<Shared>,
}

/// What all workers of the device use.
struct Shared {
    disk: Box<dyn Disk>,
    /// For warnings.
    path: PathBuf,
    sectors: u64,
    readonly: bool,
    id: [u8; ID_BYTES],
    /// Something was written since the last flush.
    dirty: AtomicBool,
    /// An error of the image was told already.
    warned: AtomicBool,
}

impl Blk {
    /// Opens the image. `name` is for threads and warnings.
    pub fn new(name: impl Into<String>, config: &BlkConfig) -> Result<Self, Error> {
        config.validate()?;
        let disk = RawDisk::open(&config.path, config.readonly)?;
        Ok(Self::with_disk(name, config, Box::new(disk)))
    }

    /// A device on any disk; of `config` the path is only named in warnings.
    pub fn with_disk(name: impl Into<String>, config: &BlkConfig, disk: Box<dyn Disk>) -> Self {
        let BlkConfig { path, readonly, id } = config.clone();
        let name = name.into();
        let sectors = disk.size() / SECTOR;
        let mut features = RING_FEATURES | 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_SEG_MAX;
        features |= 1 << VIRTIO_BLK_F_BLK_SIZE | u64::from(readonly) << VIRTIO_BLK_F_RO;
        let mut id_bytes = [0; ID_BYTES];
        let id = id.unwrap_or_else(|| name.clone());
        id_bytes.iter_mut().zip(id.bytes()).for_each(|(to, from)| *to = from);
        let (dirty, warned) = (AtomicBool::new(false), AtomicBool::new(false));
        Blk {
            config: config_space(sectors),
            shared: Arc::new(Shared { disk, path, sectors, readonly, id: id_bytes, dirty, warned }),
            info: DeviceInfo {
                id: DeviceId::Block,
                name,
                features,
                queue_sizes: vec![QUEUE_SIZE],
                shared_memory: vec![],
            },
        }
    }
}

/// `struct virtio_blk_config` (5.2.4); what belongs to features that are not offered stays zero.
fn config_space(sectors: u64) -> [u8; CONFIG_BYTES] {
    let mut config = [0; CONFIG_BYTES];
    let mut put = |at: usize, bytes: &[u8]| super::read_config_bytes(bytes, 0, &mut config[at..]);
    put(0, &sectors.to_le_bytes());
    // seg_max: header and status are segments too.
    put(12, &u32::from(QUEUE_SIZE - 2).to_le_bytes());
    put(20, &(SECTOR as u32).to_le_bytes());
    config
}

impl VirtioDevice for Blk {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_config_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<Activated> {
        // Without FLUSH the driver takes us for a write-through cache (5.2.6.2).
        let write_through = activation.features & 1 << VIRTIO_BLK_F_FLUSH == 0;
        let handler = Requests { shared: self.shared.clone(), write_through };
        Ok(Activated::Here(vec![Share { queues: activation.queues, handler: Box::new(handler) }]))
    }

    fn save(&self) -> Result<serde_json::Value, StateError> {
        serde_json::to_value(BlkState { sectors: self.shared.sectors }).map_err(|e| StateError(e.to_string()))
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<(), StateError> {
        let name = &self.info.name;
        let BlkState { sectors } = BlkState::deserialize(state)
            .map_err(|e| StateError(format!("the saved state of {name} is broken: {e}")))?;
        let Shared { sectors: now, path, .. } = &*self.shared;
        if sectors != *now {
            let path = path.display();
            return Err(StateError(format!("disk {path} has {now} sectors now and had {sectors} when it was saved")));
        }
        Ok(())
    }
}

/// Why a request gets an error status.
enum Failed {
    /// `VIRTIO_BLK_S_IOERR`; the guest's mistake.
    Request,
    /// `VIRTIO_BLK_S_UNSUPP`.
    Unsupported,
    /// `VIRTIO_BLK_S_IOERR`; the image's.
    Disk(io::Error),
}

impl From<super::chain::Error> for Failed {
    fn from(_: super::chain::Error) -> Self {
        Failed::Request
    }
}

impl From<OutOfRam> for Failed {
    fn from(_: OutOfRam) -> Self {
        Failed::Request
    }
}

impl From<io::Error> for Failed {
    fn from(e: io::Error) -> Self {
        Failed::Disk(e)
    }
}

/// Serves the request queue, one request at a time.
struct Requests {
    shared: Arc<Shared>,
    write_through: bool,
}

impl Handler for Requests {
    fn event(&mut self, event: Event, queues: &mut [Queue], cx: &Context<'_>) -> Result<Progress, Fault> {
        let (Event::Kick(_), [queue]) = (event, queues) else { return Ok(Progress::Done) };
        queue.serve(cx.ram, |chain| self.request(chain, cx.ram))
    }

    /// What was written must not get lost with the host when the VM is paused, saved or ends.
    fn drain(&mut self, _queues: &mut [Queue], _cx: &Context<'_>) -> Result<Progress, Fault> {
        if self.shared.dirty.load(Ordering::Acquire)
            && let Err(e) = self.flush()
        {
            self.warn(&e);
        }
        Ok(Progress::Done)
    }
}

impl Requests {
    /// Does what a chain asks for and writes its status (5.2.6): last, when everything else has happened. Returns how
    /// much of the writable part is valid: all of it, for the status is at its end.
    fn request(&self, chain: &Chain, ram: &GuestRam) -> Result<u32, Fault> {
        let mut writer = chain.writer(ram);
        let all = writer.len();
        let no_status = Fault::Device("a block request has no room for its status byte");
        let data = writer.take(all.checked_sub(1).ok_or(no_status)?)?;
        let status = match self.execute(chain.reader(ram), data) {
            Ok(()) => VIRTIO_BLK_S_OK,
            Err(Failed::Request) => VIRTIO_BLK_S_IOERR,
            Err(Failed::Unsupported) => VIRTIO_BLK_S_UNSUPP,
            Err(Failed::Disk(e)) => {
                self.warn(&e);
                VIRTIO_BLK_S_IOERR
            }
        };
        writer.write(&[status as u8])?;
        Ok(u32::try_from(all).unwrap_or(u32::MAX))
    }

    fn execute(&self, mut reader: Reader<'_>, mut data: Writer<'_>) -> Result<(), Failed> {
        let mut header = [0; HEADER];
        reader.read(&mut header)?;
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            VIRTIO_BLK_T_IN => {
                let offset = self.offset(sector, data.len())?;
                self.shared.disk.read(&data.slices().collect::<Result<Vec<_>, _>>()?, offset)?;
            }
            VIRTIO_BLK_T_OUT => {
                if self.shared.readonly {
                    return Err(Failed::Request);
                }
                let offset = self.offset(sector, reader.len())?;
                self.write(&reader.slices().collect::<Result<Vec<_>, _>>()?, offset)?;
            }
            VIRTIO_BLK_T_FLUSH => self.flush()?,
            VIRTIO_BLK_T_GET_ID => {
                let len = data.len().min(ID_BYTES as u64) as usize;
                data.write(self.shared.id.get(..len).unwrap_or(&[]))?;
            }
            _ => return Err(Failed::Unsupported),
        }
        Ok(())
    }

    /// Where in the image `len` bytes at `sector` are: whole sectors within the capacity.
    fn offset(&self, sector: u64, len: u64) -> Result<u64, Failed> {
        let free = self.shared.sectors.checked_sub(sector).ok_or(Failed::Request)?;
        if !len.is_multiple_of(SECTOR) || len / SECTOR > free {
            return Err(Failed::Request);
        }
        // Not beyond the image's end, so no overflow.
        Ok(sector * SECTOR)
    }

    fn write(&self, buffers: &[RamSlice<'_>], offset: u64) -> io::Result<()> {
        self.shared.dirty.store(true, Ordering::Release);
        self.shared.disk.write(buffers, offset)?;
        if self.write_through { self.flush() } else { Ok(()) }
    }

    /// Clears the mark before the flush, so that a write that comes in between sets it again.
    fn flush(&self) -> io::Result<()> {
        self.shared.dirty.store(false, Ordering::Release);
        self.shared.disk.flush().inspect_err(|_| self.shared.dirty.store(true, Ordering::Release))
    }

    /// The guest gets to know of every error, the log of the first.
    fn warn(&self, e: &io::Error) {
        let path = self.shared.path.display();
        if !self.shared.warned.swap(true, Ordering::Relaxed) {
            warn!("disk {path}: {e}; the guest sees I/O errors");
        } else {
            debug!("disk {path}: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{Buf, FakeQueue, Loopback, inn, out};
    use std::os::unix::fs::FileExt;
    use std::sync::Mutex;

    const HDR: u64 = 0x4_0000;
    const DATA: u64 = 0x8_0000;
    const STATUS: u64 = 0xF_0000;
    const OK: u8 = VIRTIO_BLK_S_OK as u8;
    const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
    const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;
    const UNTOUCHED: u8 = 0xAA;

    /// A disk of 8 sectors that keeps a diary and can fail.
    #[derive(Default)]
    struct Diary {
        calls: Mutex<Vec<String>>,
        fail: AtomicBool,
        /// Looks at the status byte while a request is under way.
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
            self.note(format!("write {}@{offset}", buffers.iter().map(|b| b.len()).sum::<usize>()))
        }
        fn flush(&self) -> io::Result<()> {
            self.note("flush".into())
        }
    }

    struct Setup {
        ram: GuestRam,
        driver: FakeQueue,
        queues: [Queue; 1],
        handler: Requests,
        diary: Arc<Diary>,
    }

    impl Setup {
        fn new(readonly: bool) -> Self {
            let ram = GuestRam::anonymous(1 << 20);
            let diary = Arc::new(Diary { ram: Some(ram.clone()), ..Diary::default() });
            let config = BlkConfig { path: "a.img".into(), readonly, id: Some("serial7".into()) };
            let blk = Blk::with_disk("blk0", &config, Box::new(diary.clone()));
            Self::with(ram, blk, diary)
        }

        fn with(ram: GuestRam, blk: Blk, diary: Arc<Diary>) -> Self {
            let driver = FakeQueue::new(&ram, 0x1000, 16);
            let queues = [driver.device(RING_FEATURES)];
            let handler = Requests { shared: blk.shared.clone(), write_through: false };
            Setup { ram, driver, queues, handler, diary }
        }

        fn header(&self, kind: u32, sector: u64) {
            self.ram.write_obj(HDR, kind.to_le()).unwrap();
            self.ram.write_obj(HDR + 4, 0u32).unwrap();
            self.ram.write_obj(HDR + 8, sector.to_le()).unwrap();
            self.ram.write_obj(STATUS, UNTOUCHED).unwrap();
        }

        fn submit(&mut self, bufs: &[Buf]) -> Result<u8, Fault> {
            self.driver.add(bufs).unwrap();
            Loopback::new(&self.ram).deliver(&mut self.handler, &mut self.queues, Event::Kick(0))?;
            let (_, written) = self.driver.take_used().unwrap();
            assert_eq!(written, bufs.iter().filter(|b| b.write).map(|b| b.len).sum::<u32>());
            Ok(self.ram.read_obj(STATUS).unwrap())
        }

        /// A request in the usual shape.
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
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(64 << 10).unwrap();
        let config: BlkConfig = format!("{},id=root", file.path().display()).parse().unwrap();
        let ram = GuestRam::anonymous(1 << 20);
        let mut setup = Setup::with(ram.clone(), Blk::new("blk0", &config).unwrap(), Arc::default());
        let data: Vec<u8> = (0..1536u32).map(|i| (i % 253) as u8).collect();
        ram.write(DATA, &data).unwrap();
        // However it is cut.
        assert_eq!(
            setup.request(VIRTIO_BLK_T_OUT, 3, &[out(DATA, 511), out(DATA + 511, 2), out(DATA + 513, 1023)]),
            OK
        );
        assert_eq!(setup.request(VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
        let mut back = vec![0; 1536];
        file.as_file().read_exact_at(&mut back, 3 * 512).unwrap();
        assert_eq!(back, data);
        assert_eq!(setup.request(VIRTIO_BLK_T_IN, 3, &[inn(DATA + 0x8000, 1000), inn(DATA + 0x8000 + 1000, 536)]), OK);
        ram.read(DATA + 0x8000, &mut back).unwrap();
        assert_eq!(back, data);
        // The image gets shorter under the guest: an error for it, none for us.
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
        for kind in [2, 3, 5, 9, 10, 11, 13, 14, 0x8000_0000, u32::MAX] {
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
        // Clean already: nothing to do at the end.
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
        // A driver without FLUSH expects every write to be on the disk.
        setup.handler.write_through = true;
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
        assert_eq!(config, BlkConfig { path: "root.img".into(), readonly: true, id: Some("x".into()) });
        let error = "root.img,size=3".parse::<BlkConfig>().unwrap_err().to_string();
        assert_eq!(error, "unknown key 'size'; valid keys are path, readonly, id");
        for id in ["", "a b", "123456789012345678901", "ä"] {
            let config = BlkConfig { path: "x".into(), readonly: false, id: Some(id.into()) };
            assert!(config.validate().is_err(), "{id}");
        }
        let blk = Blk::with_disk("blk0", &config, Box::new(Arc::<Diary>::default()));
        let features = blk.info().features;
        assert_ne!(features & 1 << VIRTIO_BLK_F_RO, 0);
        let mut bytes = [0xEE; 64];
        blk.read_config(0, &mut bytes);
        assert_eq!(bytes[..24], [8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 254, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0]);
        assert_eq!(bytes[36..], [0xEE; 28]);
        for offset in [35, 36, 100, u64::MAX] {
            blk.read_config(offset, &mut [0; 8]);
        }
    }

    #[test]
    fn a_saved_disk_keeps_its_size() {
        let config: BlkConfig = "a.img".parse().unwrap();
        let mut blk = Blk::with_disk("blk0", &config, Box::new(Arc::<Diary>::default()));
        let state = blk.save().unwrap();
        blk.restore(&state).unwrap();
        let error = blk.restore(&serde_json::json!({"sectors": 9})).unwrap_err().to_string();
        assert_eq!(error, "disk a.img has 8 sectors now and had 9 when it was saved");
        for broken in [serde_json::Value::Null, serde_json::json!({"sectors": -1}), serde_json::json!({"x": 1})] {
            assert!(blk.restore(&broken).unwrap_err().to_string().starts_with("the saved state of blk0 is broken"));
        }
    }
}
