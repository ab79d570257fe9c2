//! Devices that an external daemon serves over vhost-user: file systems, disks and network cards.
//!
//! The daemon gets guest memory and the rings. The device's registers stay here: features, configuration space, and a
//! network card's control queue (`net`). The daemon is not trusted: its features are restricted to those of the kind of
//! device, and if it ends or violates the protocol, the device needs a reset. A reset connects to the daemon that
//! listens on the socket then.

mod connection;
#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::*;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF};

use super::net::{self, Mac, Net};
use super::vhost::{Served, Server};
use super::{Activated, Activation, DeviceId, DeviceInfo, RING_FEATURES, StateError, VirtioDevice};
use crate::backend::{unix, vhost_user};
use crate::log_limit::LogLimit;
use crate::options;

pub(super) use connection::Connection;

/// Maximum number of request queues of one device, or of queue pairs of a network card.
const MAX_QUEUES: u16 = 16;
/// Size of each queue; daemons commonly accept at most 1024.
const QUEUE_SIZE: u16 = 256;
/// Maximum length of a file system's tag (5.11.4).
const MAX_TAG: usize = 36;
/// Size of `struct virtio_fs_config`: the tag and the number of request queues.
const FS_CONFIG: usize = MAX_TAG + 4;
/// Size of `struct virtio_blk_config` (5.2.4) up to and including the write-zeroes fields.
const BLK_CONFIG: usize = 60;
/// Offset of `writeback` in `struct virtio_blk_config`, the only field that a driver writes.
const BLK_WRITEBACK: u8 = 32;
/// Offset of `num_queues` in `struct virtio_blk_config`.
const BLK_QUEUES: usize = 34;

/// Features that a disk may have (5.2.3).
const BLK_FEATURES: u64 = 1 << VIRTIO_BLK_F_SIZE_MAX
    | 1 << VIRTIO_BLK_F_SEG_MAX
    | 1 << VIRTIO_BLK_F_GEOMETRY
    | 1 << VIRTIO_BLK_F_RO
    | 1 << VIRTIO_BLK_F_BLK_SIZE
    | 1 << VIRTIO_BLK_F_FLUSH
    | 1 << VIRTIO_BLK_F_TOPOLOGY
    | 1 << VIRTIO_BLK_F_CONFIG_WCE
    | 1 << VIRTIO_BLK_F_MQ
    | 1 << VIRTIO_BLK_F_DISCARD
    | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
/// Feature bits that depend on the kind of device (2.2).
const DEVICE_FEATURES: u64 = (1 << 24) - 1;
/// Features that network cards have and disks never do.
const NO_BLK_FEATURES: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF | 1 << VIRTIO_NET_F_MQ;
/// Features that disks have and network cards never do.
const NO_NET_FEATURES: u64 = 1 << VIRTIO_BLK_F_GEOMETRY | 1 << VIRTIO_BLK_F_BLK_SIZE;

/// `--vhost-user`: a device that a daemon serves. The daemon shares the guest's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VhostUserConfig {
    /// Unix socket on which the daemon listens.
    pub socket: PathBuf,
    /// Kind of device that the daemon serves.
    #[serde(rename = "type")]
    pub kind: Kind,
    /// Number of request queues, or of queue pairs of a network card: 1 to 16.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub queues: u16,
    /// For `fs`: name by which the guest mounts the folder, 1 to 36 bytes; some daemons have their own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// For `net`: MAC address of the card; random by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<Mac>,
    /// For `net`: MTU announced to the guest, 68 to 65535; by default the guest chooses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
}

fn one() -> u16 {
    1
}

fn is_one(n: &u16) -> bool {
    *n == 1
}

/// Kinds of devices that daemons serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A shared folder (virtiofsd).
    Fs,
    /// A disk (qemu-storage-daemon, SPDK).
    Blk,
    /// A network card (passt, DPDK).
    Net,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Kind::Fs => "fs",
            Kind::Blk => "blk",
            Kind::Net => "net",
        })
    }
}

impl FromStr for VhostUserConfig {
    type Err = options::Error;

    fn from_str(text: &str) -> Result<Self, options::Error> {
        options::from_str(text, None)
    }
}

/// Reasons why a vhost-user device cannot be created.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A number of queues out of range.
    #[error("queues={0}: a vhost-user device can have 1 to {MAX_QUEUES}")]
    Queues(u16),
    /// A path that is too long for a unix socket.
    #[error("the path {0} is too long for a socket: it may have {max} bytes", max = unix::MAX_PATH)]
    Path(PathBuf),
    /// A key that has no meaning for this kind of device.
    #[error("'{0}' is for type={1} only")]
    Key(&'static str, Kind),
    /// An invalid tag.
    #[error("tag '{0}' is not 1 to {MAX_TAG} bytes")]
    Tag(String),
    /// An MTU out of range.
    #[error("mtu={0}: must be 68 to 65535")]
    Mtu(u16),
    /// The connection to the daemon failed.
    #[error(transparent)]
    Daemon(#[from] vhost_user::Error),
    /// The daemon serves another kind of device.
    #[error("the vhost-user daemon at {path} does not serve type={kind}: {why}")]
    Kind {
        /// Path of the socket.
        path: PathBuf,
        /// Expected kind of device.
        kind: Kind,
        /// Reason why the daemon does not fit.
        why: String,
    },
    /// The network card could not be created.
    #[error(transparent)]
    Net(#[from] net::Error),
}

impl VhostUserConfig {
    /// Checks everything that can be checked without opening anything.
    pub fn validate(&self) -> Result<(), Error> {
        if self.socket.as_os_str().len() > unix::MAX_PATH {
            return Err(Error::Path(self.socket.clone()));
        }
        match self {
            VhostUserConfig { queues, .. } if !(1..=MAX_QUEUES).contains(queues) => Err(Error::Queues(*queues)),
            VhostUserConfig { kind: Kind::Blk | Kind::Net, tag: Some(_), .. } => Err(Error::Key("tag", Kind::Fs)),
            VhostUserConfig { kind: Kind::Blk | Kind::Fs, mac: Some(_), .. } => Err(Error::Key("mac", Kind::Net)),
            VhostUserConfig { kind: Kind::Blk | Kind::Fs, mtu: Some(_), .. } => Err(Error::Key("mtu", Kind::Net)),
            VhostUserConfig { mtu: Some(mtu), .. } if *mtu < net::MIN_MTU => Err(Error::Mtu(*mtu)),
            VhostUserConfig { tag: Some(tag), .. } if tag.is_empty() || tag.len() > MAX_TAG => {
                Err(Error::Tag(tag.clone()))
            }
            _ => Ok(()),
        }
    }

    fn no_such(&self, why: impl Into<String>) -> Error {
        Error::Kind { path: self.socket.clone(), kind: self.kind, why: why.into() }
    }
}

/// Connects to the daemon and creates the device that it serves. `name` is for threads and warnings.
pub fn open(name: impl Into<String>, config: &VhostUserConfig) -> Result<Box<dyn VirtioDevice>, Error> {
    config.validate()?;
    let connection = Connection::open(&config.socket)?;
    let features = connection.features();
    let rings = match config.kind {
        Kind::Blk => config.queues,
        Kind::Fs => config.queues + 1,
        Kind::Net => 2 * config.queues,
    };
    if let Some(max) = connection.max_queues().filter(|max| rings > *max) {
        return Err(config.no_such(format!("it serves {max} queues, but {rings} are needed")));
    }
    let foreign = match config.kind {
        Kind::Fs => DEVICE_FEATURES & !1,
        Kind::Blk => NO_BLK_FEATURES,
        Kind::Net => NO_NET_FEATURES,
    };
    if features & foreign != 0 {
        return Err(config.no_such(format!("it offers features ({:#x}) that no such device has", features & foreign)));
    }
    Ok(match config.kind {
        Kind::Fs => Box::new(VhostUser::fs(name.into(), config, connection)?),
        Kind::Blk => Box::new(VhostUser::blk(name.into(), config, connection)?),
        Kind::Net => Box::new(Net::by_daemon(name.into(), connection, config.queues, config.mac, config.mtu)?),
    })
}

/// A file system or a disk that a daemon serves.
struct VhostUser {
    info: DeviceInfo,
    connection: Arc<Connection>,
    /// Bytes of configuration space that override the daemon's, and their offset.
    own: (usize, Vec<u8>),
    warnings: LogLimit,
}

/// Saved state of a file system or a disk, without its queues. The daemon's own state of the guest is not saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VhostUserState {
    /// Set by the driver to whether writes may be cached; `None` if it has not set that.
    pub writeback: Option<bool>,
}

impl VhostUser {
    fn fs(name: String, config: &VhostUserConfig, connection: Connection) -> Result<Self, Error> {
        let queues = u32::from(config.queues).to_le_bytes().to_vec();
        let own = match &config.tag {
            Some(tag) => {
                let mut own = tag.clone().into_bytes();
                own.resize(MAX_TAG, 0);
                (0, [own, queues].concat())
            }
            None => {
                let no_tag =
                    |e: io::Error| config.no_such(format!("it has no tag of its own (set one with tag=NAME): {e}"));
                connection.read_config(FS_CONFIG).map_err(no_tag)?;
                (MAX_TAG, queues)
            }
        };
        let queue_sizes = vec![QUEUE_SIZE; usize::from(config.queues) + 1];
        Ok(Self::new(DeviceId::Fs, name, 0, queue_sizes, connection, own))
    }

    fn blk(name: String, config: &VhostUserConfig, connection: Connection) -> Result<Self, Error> {
        connection
            .read_config(BLK_CONFIG)
            .map_err(|e| config.no_such(format!("it does not report the disk's size: {e}")))?;
        let mut features = connection.features() & BLK_FEATURES;
        if config.queues == 1 {
            features &= !(1 << VIRTIO_BLK_F_MQ);
        } else if features & 1 << VIRTIO_BLK_F_MQ == 0 {
            return Err(config.no_such("it supports only one queue"));
        }
        let own = (BLK_QUEUES, config.queues.to_le_bytes().to_vec());
        let queue_sizes = vec![QUEUE_SIZE; usize::from(config.queues)];
        Ok(Self::new(DeviceId::Block, name, features, queue_sizes, connection, own))
    }

    fn new(
        id: DeviceId,
        name: String,
        features: u64,
        queue_sizes: Vec<u16>,
        connection: Connection,
        own: (usize, Vec<u8>),
    ) -> Self {
        let features = features | connection.features() & RING_FEATURES;
        let info = DeviceInfo { id, name, features, queue_sizes, shared_memory: vec![] };
        VhostUser { info, connection: Arc::new(connection), own, warnings: LogLimit::default() }
    }

    fn warn(&self, done: io::Result<()>) {
        if let Err(e) = done {
            self.warnings.warn(format_args!("{}: cannot change the cache mode: {e}", self.info.name));
        }
    }

    /// Returns whether this is a disk whose driver decides if writes may be cached.
    fn has_writeback(&self) -> bool {
        self.info.id == DeviceId::Block && self.info.features & 1 << VIRTIO_BLK_F_CONFIG_WCE != 0
    }
}

impl VirtioDevice for VhostUser {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let (at, own) = &self.own;
        let mut config = self.connection.config();
        config.resize(config.len().max(at + own.len()), 0);
        config.iter_mut().skip(*at).zip(own).for_each(|(to, from)| *to = *from);
        super::read_config_bytes(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (&[byte @ (0 | 1)], true) = (data, offset == u64::from(BLK_WRITEBACK) && self.has_writeback()) {
            self.warn(self.connection.set(BLK_WRITEBACK, byte));
        }
    }

    fn activate(&mut self, activation: Activation) -> io::Result<Activated> {
        let Activation { ram, features, queues, kicks, interrupt } = activation;
        let known = self.connection.config();
        let remote = Served::start(self.connection.clone(), features, &ram, &queues, &kicks, &interrupt)?;
        // The disk of a new daemon may differ in size from the one that the driver has read.
        if self.connection.config() != known {
            interrupt.config_changed();
        }
        Ok(Activated::Elsewhere(Box::new(remote), self.connection.clone().watch().into_iter().collect()))
    }

    fn reset(&mut self) {
        self.warn(self.connection.unset());
    }

    fn save(&self) -> Result<serde_json::Value, StateError> {
        let state = VhostUserState { writeback: self.connection.was_set().map(|byte| byte != 0) };
        serde_json::to_value(state).map_err(|e| StateError(e.to_string()))
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<(), StateError> {
        let broken = |e: String| StateError(format!("the saved state of {} is broken: {e}", self.info.name));
        match VhostUserState::deserialize(state).map_err(|e| broken(e.to_string()))?.writeback {
            None => Ok(()),
            Some(on) if self.has_writeback() => {
                let refused = |e| StateError(format!("cannot restore the cache mode of {}: {e}", self.info.name));
                self.connection.set(BLK_WRITEBACK, on.into()).map_err(refused)
            }
            Some(_) => Err(broken("the daemon does not support changing the cache mode".into())),
        }
    }
}
