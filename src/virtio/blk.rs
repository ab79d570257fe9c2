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
