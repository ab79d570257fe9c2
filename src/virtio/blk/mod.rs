//! Block device (5.2).
//!
//! [`Blk`] is the device with its configuration. `queue_handler` serves one queue: it takes requests as fast as the
//! rate limit allows. `request` decodes a chain, executes it by system calls, and answers it. `ring` makes the kernel
//! execute requests while the guest continues (io_uring), if the disk is one raw file or device and the host allows it.
//! By default it does so for reads and flushes only: without `direct`, writes are system calls into the host's page
//! cache ([`Engine::Auto`]).

mod queue_handler;
mod request;
mod ring;
#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
};

use super::control::{Control, ControlError, Reply};
use super::{Activated, Activation, DeviceId, DeviceInfo, RING_FEATURES, Share, StateError, VirtioDevice};
use crate::backend::image::{self, Format, ImageOptions, Overlay};
use crate::backend::{Disk, SECTOR};
use crate::log_limit::LogLimit;
use crate::options::{self, Size};
use crate::rate_limiter::{Limits, RateLimiter};
use queue_handler::QueueHandler;
use ring::Ring;

const QUEUE_SIZE: u16 = 256;
/// Maximum number of queues of a disk; drivers use one per vCPU.
const MAX_QUEUES: u16 = 16;
const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;
/// Bytes of configuration space up to and including `write_zeroes_may_unmap` and its padding (5.2.4).
const CONFIG_BYTES: usize = 60;
/// Offset of `writeback` in configuration space.
const WRITEBACK: usize = 32;
/// Maximum number of ranges in a discard request.
const MAX_RANGES: u32 = 64;
/// Maximum sectors in one such range, and in all ranges of a write-zeroes request: 1 GiB, which bounds the time it
/// takes.
const MAX_RANGE_SECTORS: u32 = 1 << 21;
/// Maximum sectors that the one range of a write-zeroes request should have. The disk may really have to write them,
/// and they count for the bandwidth as if it did: a request that follows 16 MiB does not wait long.
const ZERO_SECTORS: u32 = 1 << 15;

/// Method of carrying out requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Engine {
    /// io_uring where disk and host support it, except for writes into the host's page cache; otherwise one system call
    /// after another.
    #[default]
    Auto,
    /// io_uring, or an error if it is unavailable.
    IoUring,
    /// One system call after another.
    Sync,
}

/// `--disk`: a block device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlkConfig {
    /// The image: a regular file, a block device or, with `size`, a character device.
    pub path: PathBuf,
    /// Size in bytes of a character device, which cannot report it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<Size>,
    /// Refuse writes, and share the image with other readers.
    #[serde(default)]
    pub readonly: bool,
    /// Text that the guest sees in `/sys/block/vdX/serial`: at most 20 bytes of printable ASCII.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Format of the image: `raw` or `qcow2`. Detected by content and name if not given, but then a qcow2 image may not
    /// refer to other files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// Destination of writes instead of the image: `tmp`, or a qcow2 file, which is created if it does not exist.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay: Option<Overlay>,
    /// Bypass the host's page cache.
    #[serde(default)]
    pub direct: bool,
    /// Number of request queues, 1 (the default) to 16, each with a thread.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// `auto`, `io_uring` or `sync`.
    #[serde(default)]
    pub engine: Engine,
    /// Maximum bytes per second, reads and writes together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Size>,
    /// Burst in bytes after a quiet time; one second's worth by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_burst: Option<Size>,
    /// Maximum requests per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<u64>,
    /// Burst in requests after a quiet time; one second's worth by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops_burst: Option<u64>,
}

impl FromStr for BlkConfig {
    type Err = options::Error;

    fn from_str(text: &str) -> Result<Self, options::Error> {
        options::from_str(text, Some("path"))
    }
}

/// Reason why a block device cannot be created.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Image that cannot be used.
    #[error(transparent)]
    Disk(#[from] image::Error),
    /// Invalid id.
    #[error("disk id '{0}' is not 1 to 20 printable ASCII characters")]
    Id(String),
    /// Invalid number of queues.
    #[error("queues={0}: a disk can have 1 to {MAX_QUEUES}")]
    Queues(u16),
    /// Limit of zero, or a burst without its limit.
    #[error("disk {}: {why}", path.display())]
    Limit {
        /// Path of the image.
        path: PathBuf,
        /// Description of the mistake.
        why: &'static str,
    },
    /// `engine=io_uring` that is not possible.
    #[error("disk {} cannot be used by io_uring", path.display())]
    IoUring {
        /// Path of the image.
        path: PathBuf,
        /// OS error.
        source: io::Error,
    },
}

impl BlkConfig {
    /// Checks everything that needs no open file.
    pub fn validate(&self) -> Result<(), Error> {
        match &self.id {
            Some(id) if id.is_empty() || id.len() > ID_BYTES || !id.bytes().all(|b| b.is_ascii_graphic()) => {
                return Err(Error::Id(id.clone()));
            }
            _ => {}
        }
        if let Some(queues) = self.queues.filter(|n| !(1..=MAX_QUEUES).contains(n)) {
            return Err(Error::Queues(queues));
        }
        let limit = |why| Err(Error::Limit { path: self.path.clone(), why });
        match self.limits() {
            limits if limits.is_zero() => limit("a limit or burst of 0 would let nothing through"),
            Limits { bytes: None, .. } if self.bandwidth_burst.is_some() => limit("bandwidth_burst needs bandwidth"),
            Limits { ops: None, .. } if self.ops_burst.is_some() => limit("ops_burst needs ops"),
            _ => Ok(()),
        }
    }

    fn limits(&self) -> Limits {
        Limits::new(self.bandwidth, self.bandwidth_burst, self.ops, self.ops_burst)
    }

    fn image(&self) -> ImageOptions {
        let BlkConfig { path, size, readonly, format, overlay, direct, .. } = self.clone();
        ImageOptions { path, size: size.map(|size| size.0), readonly, direct, format, overlay }
    }
}

/// Saved state of a block device; its contents are in the image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlkState {
    /// Capacity in sectors of 512 bytes that the guest knows.
    pub sectors: u64,
    /// Set if writes may stay in the host's cache until a flush (5.2.6.2).
    pub writeback: bool,
}

/// Block device.
pub struct Blk {
    info: DeviceInfo,
    config: [u8; CONFIG_BYTES],
    shared: Arc<Shared>,
}

/// State that all workers of the device share.
struct Shared {
    disk: Box<dyn Disk>,
    /// Path of the image, for warnings.
    path: PathBuf,
    sectors: AtomicU64,
    readonly: bool,
    engine: Engine,
    /// Set if writes are system calls even where the rest uses io_uring. A write without `direct` goes into the page
    /// cache. Few file systems let io_uring do that without handing it to a thread, which costs more than the copy.
    writes_at_once: bool,
    id: [u8; ID_BYTES],
    /// Rate limit, if any.
    limiter: Option<RateLimiter>,
    /// Set if each write must be on the disk before it completes.
    write_through: AtomicBool,
    /// Set if something was written since the last flush.
    dirty: AtomicBool,
    /// Failure of a final flush, which the guest did not ask for and therefore does not learn of.
    unsaved: Mutex<Option<String>>,
    /// Limits warnings about the image.
    warnings: LogLimit,
}

impl Blk {
    /// Opens the image. `name` is used in thread names and warnings.
    pub fn new(name: impl Into<String>, config: &BlkConfig) -> Result<Self, Error> {
        config.validate()?;
        let disk = image::open(&config.image())?;
        if config.engine == Engine::IoUring {
            ring::probe(&*disk).map_err(|source| Error::IoUring { path: config.path.clone(), source })?;
        }
        Ok(Self::with_disk(name, config, disk))
    }

    /// Creates a device on any disk; the path in `config` is used only in warnings.
    pub fn with_disk(name: impl Into<String>, config: &BlkConfig, disk: Box<dyn Disk>) -> Self {
        let name = name.into();
        let sectors = disk.size() / SECTOR;
        let queues = config.queues.unwrap_or(1);
        let mut id = [0; ID_BYTES];
        let text = config.id.as_ref().unwrap_or(&name);
        id.iter_mut().zip(text.bytes()).for_each(|(to, from)| *to = from);
        let limits = config.limits();
        Blk {
            config: config_space(sectors, queues),
            info: DeviceInfo {
                id: DeviceId::Block,
                name,
                features: features(config.readonly, queues),
                queue_sizes: vec![QUEUE_SIZE; queues.into()],
                shared_memory: vec![],
            },
            shared: Arc::new(Shared {
                disk,
                path: config.path.clone(),
                sectors: sectors.into(),
                readonly: config.readonly,
                engine: config.engine,
                writes_at_once: config.engine == Engine::Auto && !config.direct,
                id,
                limiter: limits.any().then(|| RateLimiter::new(limits)),
                write_through: AtomicBool::new(false),
                dirty: AtomicBool::new(false),
                unsaved: Mutex::default(),
                warnings: LogLimit::default(),
            }),
        }
    }
}

fn features(readonly: bool, queues: u16) -> u64 {
    let mut bits = vec![VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_TOPOLOGY];
    bits.push(VIRTIO_BLK_F_CONFIG_WCE);
    if readonly {
        bits.push(VIRTIO_BLK_F_RO);
    } else {
        bits.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
    }
    if queues > 1 {
        bits.push(VIRTIO_BLK_F_MQ);
    }
    bits.into_iter().fold(RING_FEATURES, |all, bit| all | 1 << bit)
}

/// Returns `struct virtio_blk_config` (5.2.4); fields of features that are not offered stay zero.
fn config_space(sectors: u64, queues: u16) -> [u8; CONFIG_BYTES] {
    let mut config = [0; CONFIG_BYTES];
    let mut put = |at: usize, bytes: &[u8]| super::read_config_bytes(bytes, 0, &mut config[at..]);
    put(0, &sectors.to_le_bytes());
    // seg_max: header and status take segments too.
    put(12, &u32::from(QUEUE_SIZE - 2).to_le_bytes());
    put(20, &(SECTOR as u32).to_le_bytes());
    // Topology: physical blocks of 2^3 sectors, as page caches and disks have them; the optimal size is 64 KiB.
    put(24, &[3, 0]);
    put(26, &8u16.to_le_bytes());
    put(28, &128u32.to_le_bytes());
    put(WRITEBACK, &[1]);
    put(34, &queues.to_le_bytes());
    // max_discard_sectors, max_discard_seg, discard_sector_alignment; the same for write_zeroes, and may_unmap.
    for (at, value) in [(36, MAX_RANGE_SECTORS), (40, MAX_RANGES), (44, 8), (48, ZERO_SECTORS), (52, 1)] {
        put(at, &value.to_le_bytes());
    }
    put(56, &[1]);
    config
}

impl Blk {
    fn writeback(&self) -> bool {
        self.config.get(WRITEBACK) != Some(&0)
    }

    fn set_writeback(&mut self, on: bool) {
        if let Some(byte) = self.config.get_mut(WRITEBACK) {
            *byte = on.into();
        }
        self.shared.write_through.store(!on, Ordering::Release);
    }
}

impl VirtioDevice for Blk {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_config_bytes(&self.config, offset, data);
    }

    /// Only `writeback` can be written (5.2.5, 5.2.6.2).
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let ([value], true) = (data, offset == WRITEBACK as u64) {
            self.set_writeback(*value != 0);
        }
    }

    fn activate(&mut self, activation: Activation) -> io::Result<Activated> {
        // Without FLUSH the driver assumes a write-through cache, and cannot ask for another (5.2.6.2).
        let flush = activation.features & 1 << VIRTIO_BLK_F_FLUSH != 0;
        let toggle = activation.features & 1 << VIRTIO_BLK_F_CONFIG_WCE != 0;
        let writeback = if toggle { self.writeback() } else { flush };
        self.shared.write_through.store(!writeback, Ordering::Release);
        let mut shares = Vec::with_capacity(activation.queues.len());
        for queue in activation.queues {
            let ring = match self.shared.engine {
                Engine::Sync => None,
                _ if !queue.is_enabled() => None,
                Engine::IoUring => Some(Ring::new(&*self.shared.disk, &activation.ram)?),
                Engine::Auto => Ring::new(&*self.shared.disk, &activation.ram)
                    .inspect_err(|e| self.shared.warnings.debug(format_args!("{}: no io_uring: {e}", self.info.name)))
                    .ok(),
            };
            let handler = Box::new(QueueHandler::new(self.shared.clone(), ring)?);
            shares.push(Share { queues: vec![queue], handler });
        }
        Ok(Activated::Here(shares))
    }

    fn reset(&mut self) {
        self.set_writeback(true);
    }

    fn control(&mut self, control: &Control) -> Result<Reply, ControlError> {
        let Control::ResizeDisk(bytes) = *control else {
            return Err(ControlError::Unsupported(self.info.name.clone()));
        };
        let path = self.shared.path.display();
        let refused = |why: String| ControlError::Refused(format!("disk {path} cannot be resized: {why}"));
        let now = self.shared.disk.size();
        if !bytes.is_multiple_of(SECTOR) || bytes < now {
            return Err(refused(format!("{bytes} is not a multiple of 512, or is below the current {now}")));
        }
        if self.shared.readonly {
            return Err(refused("it is read-only".into()));
        }
        self.shared.disk.resize(bytes).map_err(|e| refused(e.to_string()))?;
        // Requests past the old end may come as soon as the guest reads the new one.
        self.shared.sectors.store(bytes / SECTOR, Ordering::Release);
        super::read_config_bytes(&(bytes / SECTOR).to_le_bytes(), 0, &mut self.config[..8]);
        Ok(Reply::ConfigChanged)
    }

    fn unsaved(&self) -> Option<String> {
        self.shared.unsaved.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn save(&self) -> Result<serde_json::Value, StateError> {
        let state = BlkState { sectors: self.shared.sectors(), writeback: self.writeback() };
        serde_json::to_value(state).map_err(|e| StateError(e.to_string()))
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<(), StateError> {
        let name = &self.info.name;
        let BlkState { sectors, writeback } = BlkState::deserialize(state)
            .map_err(|e| StateError(format!("the saved state of {name} is broken: {e}")))?;
        let now = self.shared.sectors();
        if sectors != now {
            let path = self.shared.path.display();
            return Err(StateError(format!("disk {path} has {now} sectors now and had {sectors} when it was saved")));
        }
        self.set_writeback(writeback);
        Ok(())
    }
}

impl Shared {
    /// Returns the capacity, which may grow at any time.
    fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::Acquire)
    }

    /// Flushes the disk. The mark is cleared first, so that a write during the flush sets it again.
    fn flush(&self) -> io::Result<()> {
        self.dirty.store(false, Ordering::Release);
        self.disk.flush().inspect_err(|_| self.dirty.store(true, Ordering::Release))
    }

    /// Flushes written data when the device stops. A failure is remembered even if the next flush succeeds: the OS
    /// reports each failure only once, and the data concerned is lost.
    fn flush_last(&self) {
        if self.dirty.load(Ordering::Acquire)
            && let Err(e) = self.flush()
        {
            self.warnings.debug(format_args!("disk {}: the last flush failed: {e}", self.path.display()));
            let mut unsaved = self.unsaved.lock().unwrap_or_else(PoisonError::into_inner);
            unsaved.get_or_insert_with(|| format!("what the guest wrote to {} may be lost: {e}", self.path.display()));
        }
    }

    /// Logs an error, within the log's limit; the guest sees every one.
    fn warn(&self, e: &io::Error) {
        self.warnings.warn(format_args!("disk {}: {e}; the guest sees I/O errors", self.path.display()));
    }
}
