//! Persistent memory (5.19): a file of the host in the guest's memory. The driver uses it like a disk without a queue,
//! or maps it into programs (DAX); the queue only carries flushes.
//!
//! Guest writes are immediately in the host's page cache, and on the disk once a flush has returned.

use std::io;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::chain::Chain;
use super::queue::BATCH;
use super::{
    Activated, Activation, Context, DeviceId, DeviceInfo, Event, Fault, Handler, Progress, RING_FEATURES, Share,
    StateError, VirtioDevice, queue::Queue,
};
use crate::backend::mapped::{self, MappedFile, UNIT};
use crate::log_limit::LogLimit;
use crate::memory::{Access, GuestRam};
use crate::options::{self, Size};

const QUEUE_SIZE: u16 = 64;
/// Only type of request (5.19.6).
const FLUSH: u32 = 0;
/// Results (5.19.7).
const OK: u32 = 0;
const EIO: u32 = 1;

/// `--pmem`: a file as persistent memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemConfig {
    /// File or block device.
    pub path: PathBuf,
    /// The guest cannot write; attempted writes are discarded.
    #[serde(default)]
    pub readonly: bool,
    /// Size of the memory: a multiple of 2 MiB, by default the size of the file. A shorter file is enlarged; one that
    /// is only read (`readonly`, `overlay=tmp`) is followed by zeros.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<Size>,
    /// Writes are kept elsewhere, and the file stays unchanged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay: Option<Overlay>,
}

/// Destination of writes instead of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Overlay {
    /// Memory, until the VM ends.
    Tmp,
}

impl FromStr for PmemConfig {
    type Err = options::Error;

    fn from_str(text: &str) -> Result<Self, options::Error> {
        options::from_str(text, Some("path"))
    }
}

impl PmemConfig {
    /// Checks everything that needs no open file; the error is a sentence.
    pub fn validate(&self) -> Result<(), String> {
        let path = self.path.display();
        if self.readonly && self.overlay.is_some() {
            return Err(format!("{path}: readonly and overlay exclude each other: there is nothing to write over it"));
        }
        match self.size {
            Some(Size(size)) if size == 0 || !size.is_multiple_of(UNIT) => {
                Err(format!("{path}: size={} is not a multiple of 2M{}", Size(size), Size(size).unit_hint()))
            }
            _ => Ok(()),
        }
    }

    /// Opens and locks the file.
    pub fn open(&self) -> Result<MappedFile, mapped::Error> {
        let access = match self {
            PmemConfig { readonly: true, .. } => Access::ReadOnly,
            PmemConfig { overlay: Some(Overlay::Tmp), .. } => Access::Private,
            _ => Access::Shared,
        };
        MappedFile::open(&self.path, access, self.size.map(|Size(size)| size))
    }
}

/// Position of the memory, which must be the same after a restore.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemState {
    /// Guest-physical address.
    pub start: u64,
    /// Length in bytes.
    pub size: u64,
}

/// Persistent memory device.
pub struct Pmem {
    info: DeviceInfo,
    file: MappedFile,
    start: u64,
    warnings: LogLimit,
}

impl Pmem {
    /// Creates a device for a file that is mapped at the guest-physical address `start`.
    pub fn new(name: impl Into<String>, file: MappedFile, start: u64) -> Self {
        let info = DeviceInfo {
            id: DeviceId::Pmem,
            name: name.into(),
            features: RING_FEATURES,
            queue_sizes: vec![QUEUE_SIZE],
            shared_memory: vec![],
        };
        Pmem { info, file, start, warnings: LogLimit::default() }
    }
}

impl VirtioDevice for Pmem {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// `struct virtio_pmem_config` (5.19.4): start and size.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = [self.start, self.file.memory_len()].map(u64::to_le_bytes);
        super::read_config_bytes(config.as_flattened(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<Activated> {
        let handler =
            Flusher { name: self.info.name.clone(), file: self.file.clone(), warnings: self.warnings.clone() };
        Ok(Activated::Here(vec![Share { queues: activation.queues, handler: Box::new(handler) }]))
    }

    fn save(&self) -> Result<serde_json::Value, StateError> {
        let state = PmemState { start: self.start, size: self.file.memory_len() };
        serde_json::to_value(state).map_err(|e| StateError(e.to_string()))
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<(), StateError> {
        let name = &self.info.name;
        let saved = PmemState::deserialize(state)
            .map_err(|e| StateError(format!("the saved state of {name} is broken: {e}")))?;
        let here = PmemState { start: self.start, size: self.file.memory_len() };
        if saved != here {
            let text = |PmemState { start, size }| format!("{} at {start:#x}", Size(size));
            return Err(StateError(format!("{name} was saved as {}, but here it is {}", text(saved), text(here))));
        }
        Ok(())
    }
}

/// Handler of the queue.
struct Flusher {
    name: String,
    file: MappedFile,
    /// Limits warnings about failed flushes.
    warnings: LogLimit,
}

impl Handler for Flusher {
    fn event(&mut self, event: Event, queues: &mut [Queue], cx: &Context<'_>) -> Result<Progress, Fault> {
        let (Event::Kick(_), [queue]) = (event, queues) else { return Ok(Progress::Done) };
        queue.disable_notifications(cx.ram)?;
        let mut requests = Vec::new();
        while requests.len() < BATCH
            && let Some(chain) = queue.pop(cx.ram)?
        {
            requests.push((is_flush(&chain, cx.ram)?, chain));
        }
        // One flush for all requests made before it begins.
        let flushed = if requests.iter().any(|(flush, _)| *flush) { self.flush() } else { EIO };
        let full = requests.len() == BATCH;
        let mut answered = Vec::with_capacity(requests.len());
        for (flush, chain) in requests {
            let result = if flush { flushed } else { EIO };
            chain.writer(cx.ram).write(&result.to_le_bytes())?;
            answered.push((chain, 4));
        }
        queue.push_used_together(cx.ram, answered)?;
        Ok(if full || queue.enable_notifications(cx.ram)? { Progress::More } else { Progress::Done })
    }
}

/// Returns whether a request is a flush. `struct virtio_pmem_req` (5.19.6) is only a type, which a short request lacks.
fn is_flush(chain: &Chain, ram: &GuestRam) -> Result<bool, Fault> {
    let mut kind = [0; 4];
    let mut reader = chain.reader(ram);
    if reader.len() < kind.len() as u64 {
        return Ok(false);
    }
    reader.read(&mut kind)?;
    Ok(u32::from_le_bytes(kind) == FLUSH)
}

impl Flusher {
    fn flush(&mut self) -> u32 {
        let Err(e) = self.file.sync() else { return OK };
        self.warnings.warn(format_args!("{} cannot flush (reported to the driver): {e}", self.name));
        EIO
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irq::IrqLine;
    use crate::memory::Area;
    use crate::virtio::Interrupt;
    use crate::virtio::mmio::MmioTransport;
    use crate::virtio::testing::{Buf, FakeDriver, FakeQueue, Loopback, inn, out};
    use proptest::prelude::*;
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    const B: u64 = 0x8_0000;
    const START: u64 = crate::layout::MMIO_HOLE_END;

    struct Setup {
        ram: GuestRam,
        device: Pmem,
        path: PathBuf,
        _dir: tempfile::TempDir,
    }

    fn setup(options: &str) -> Setup {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pmem");
        File::create(&path).unwrap().set_len(UNIT).unwrap();
        let config: PmemConfig = format!("{}{options}", path.display()).parse().unwrap();
        let file = config.open().unwrap();
        let area = Area { start: START, len: file.memory_len(), backing: file.backing() };
        let ram = GuestRam::with_areas(&"16M".parse().unwrap(), vec![area]).unwrap();
        Setup { ram, device: Pmem::new("pmem0", file, START), path, _dir: dir }
    }

    /// Submits all requests together; returns the number of bytes written for each.
    fn requests(setup: &mut Setup, all: &[&[Buf]]) -> Result<Vec<u32>, Fault> {
        let mut driver = FakeQueue::new(&setup.ram, 0x1000, 64);
        let mut handler =
            Flusher { name: "pmem0".into(), file: setup.device.file.clone(), warnings: LogLimit::default() };
        let mut queues = [driver.device(RING_FEATURES)];
        all.iter().for_each(|bufs| _ = driver.add(bufs).unwrap());
        Loopback::new(&setup.ram).deliver(&mut handler, &mut queues, Event::Kick(0))?;
        Ok(std::iter::from_fn(|| driver.take_used()).map(|(_, written)| written).collect())
    }

    fn result(setup: &Setup, at: u64) -> u32 {
        u32::from_le(setup.ram.read_obj(at).unwrap())
    }

    #[test]
    fn what_was_written_is_in_the_file() {
        let mut s = setup("");
        s.ram.write(START + 4096, b"persistent").unwrap();
        s.ram.write_obj(B, FLUSH.to_le()).unwrap();
        s.ram.write_obj(B + 8, !0u32).unwrap();
        assert_eq!(requests(&mut s, &[&[out(B, 4), inn(B + 8, 4)]]).unwrap(), [4]);
        assert_eq!(result(&s, B + 8), OK);
        let mut back = [0; 10];
        File::open(&s.path).unwrap().read_exact_at(&mut back, 4096).unwrap();
        assert_eq!(&back, b"persistent");
    }

    #[test]
    fn files_that_keep_nothing_flush_too() {
        for options in [",readonly", ",overlay=tmp"] {
            let mut s = setup(options);
            s.ram.write(START, b"gone").unwrap();
            s.ram.write_obj(B + 8, !0u32).unwrap();
            assert_eq!(requests(&mut s, &[&[out(B, 4), inn(B + 8, 4)]]).unwrap(), [4]);
            assert_eq!(result(&s, B + 8), OK);
            assert!(std::fs::read(&s.path).unwrap().iter().all(|byte| *byte == 0));
        }
    }

    #[test]
    fn requests_that_are_none_are_errors() {
        let mut s = setup("");
        s.ram.write_obj(B, 1u32.to_le()).unwrap();
        // Another type; a type cut short; no type at all; more buffers than necessary, in odd pieces.
        let [other, short, none] =
            [[out(B, 4), inn(B + 8, 4)], [out(B, 3), inn(B + 12, 4)], [out(B, 0), inn(B + 16, 4)]];
        let large = [out(B + 64, 1), out(B + 65, 700), inn(B + 20, 1), inn(B + 21, 300)];
        assert_eq!(requests(&mut s, &[&other, &short, &none, &large]).unwrap(), [4; 4]);
        assert_eq!([8, 12, 16, 20].map(|at| result(&s, B + at)), [EIO, EIO, EIO, OK]);
    }

    #[test]
    fn a_request_without_room_for_an_answer_ends_the_device() {
        for bufs in [&[out(B, 4)][..], &[out(B, 4), inn(B + 8, 3)], &[out(B, 4), inn(0x1000_0000, 4)]] {
            assert!(requests(&mut setup(""), &[bufs]).is_err());
        }
    }

    #[test]
    fn its_own_memory_can_hold_the_rings() {
        let mut s = setup("");
        let mut driver = FakeQueue::new(&s.ram, START, 8);
        let Activated::Here(mut shares) = s
            .device
            .activate(Activation {
                ram: s.ram.clone(),
                features: RING_FEATURES,
                queues: vec![driver.device(RING_FEATURES)],
                kicks: vec![].into(),
                interrupt: Interrupt::new(IrqLine::new(5).unwrap()),
            })
            .unwrap()
        else {
            panic!()
        };
        driver.add(&[out(START + 0x8000, 4), inn(START + 0x8008, 4)]).unwrap();
        let share = &mut shares[0];
        Loopback::new(&s.ram).deliver(&mut *share.handler, &mut share.queues, Event::Kick(0)).unwrap();
        assert_eq!(driver.take_used(), Some((0, 4)));
    }

    #[test]
    fn through_the_registers() {
        let s = setup(",size=4M");
        let transport = MmioTransport::new(Box::new(s.device), s.ram.clone(), IrqLine::new(5).unwrap()).unwrap();
        let mut driver = FakeDriver::new(&transport, &s.ram);
        let word = |n: u32| u64::from(driver.get(0x100 + 4 * n));
        assert_eq!((word(0) | word(1) << 32, word(2) | word(3) << 32, word(4)), (START, 2 * UNIT, 0));
        driver.start(0, 0x1000, 16);
        for _ in 0..100 {
            let mut queue = driver.queues.remove(0);
            queue.add(&[out(B, 4), inn(B + 8, 4)]).unwrap();
            driver.set(virtio_bindings::virtio_mmio::VIRTIO_MMIO_QUEUE_NOTIFY, 0);
            assert_eq!(queue.wait_used().1, 4);
            driver.queues.push(queue);
        }
        driver.set(virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS, 0);
    }

    #[test]
    fn saved_where_it_was() {
        let mut s = setup("");
        let state = s.device.save().unwrap();
        s.device.restore(&state).unwrap();
        let moved = serde_json::json!({"start": START, "size": 2 * UNIT});
        let error = s.device.restore(&moved).unwrap_err().to_string();
        assert_eq!(error, "pmem0 was saved as 4M at 0x100000000, but here it is 2M at 0x100000000");
        assert!(s.device.restore(&serde_json::Value::Null).is_err());
    }

    #[test]
    fn options() {
        let config: PmemConfig = "a.img,overlay=tmp,size=64M".parse().unwrap();
        assert_eq!((config.overlay, config.size), (Some(Overlay::Tmp), Some(Size::mib(64))));
        let error = |text: &str| text.parse::<PmemConfig>().unwrap().validate().unwrap_err();
        assert_eq!(error("a,size=3M"), "a: size=3M is not a multiple of 2M");
        assert_eq!(error("a,size=0"), "a: size=0 is not a multiple of 2M");
        assert!(error("a,readonly,overlay=tmp").contains("exclude each other"));
        for (text, part) in [("a,overlay=b", "valid values are tmp"), ("a,direct=on", "unknown key 'direct'")] {
            let error = text.parse::<PmemConfig>().unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    fn buf() -> impl Strategy<Value = Buf> {
        let addr = prop_oneof![20 => B..B + 0x1000, 4 => START..START + UNIT, 1 => any::<u64>()];
        let len = prop_oneof![10 => Just(4u32), 10 => 0..64u32, 1 => any::<u32>()];
        (addr, len, any::<bool>()).prop_map(|(addr, len, write)| Buf { addr, len, write })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// Checks that every request gets an answer, or the device a fault.
        #[test]
        fn every_request_is_answered(all in prop::collection::vec(prop::collection::vec(buf(), 1..4), 1..16)) {
            let mut s = setup("");
            let all: Vec<&[Buf]> = all.iter().map(Vec::as_slice).collect();
            if let Ok(used) = requests(&mut s, &all) {
                prop_assert_eq!(used, vec![4; all.len()]);
            }
        }
    }
}
