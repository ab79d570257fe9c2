//! Socket device (5.10): stream sockets between the guest and unix sockets of the host.
//!
//! A program on the host connects to the socket at `path`, writes `CONNECT <port>\n`, and reads `OK <host port>\n` once
//! a program in the guest has accepted; from then on it is connected to that port. When the guest connects to port P of
//! context 2, it reaches the program that listens at `path_P`. That must be a socket in the same directory, not a link
//! to one, because a guest could have created a link in a shared folder. Both protocols are Firecracker's. Clients that
//! connect before the guest has loaded its driver wait for it; a connection that is refused or never answered is
//! closed.
//!
//! [`packet`] is the wire format, `connection` one connection, `flow` its data and credit, `muxer` all connections.

mod connection;
mod flow;
mod muxer;
pub mod packet;
mod reset;

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vmm_sys_util::timerfd::TimerFd;

use super::{
    Activated, Activation, Context, DeviceId, DeviceInfo, Event, Fault, Handler, Progress, RING_FEATURES, Share,
    StateError, VirtioDevice, queue::Queue,
};
use crate::backend::unix::{self, Listener};
use crate::options;
use muxer::Muxer;

/// Maximum number of simultaneous connections, of both directions together; more are refused.
pub const MAX_CONNECTIONS: usize = 1024;

/// `VIRTIO_VSOCK_F_STREAM` (5.10.3).
const STREAM_FEATURE: u64 = 1 << 0;
const QUEUE_SIZE: u16 = 256;
/// Index of the queue with packets from the guest (5.10.2). Queue 0 carries packets to the guest, queue 2 events.
const TX: usize = 1;

/// `--vsock`: a socket device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context id, 3 to 4294967294.
    pub cid: u64,
    /// Unix socket for connections to the guest; with `_PORT` appended, those for connections from the guest.
    pub path: PathBuf,
}

impl FromStr for VsockConfig {
    type Err = options::Error;

    fn from_str(text: &str) -> Result<Self, options::Error> {
        options::from_str(text, None)
    }
}

/// Reasons why a socket device cannot be created.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A reserved context id (5.10.4).
    #[error("context id {0} is not valid for a guest: use 3 to 4294967294")]
    Cid(u64),
    /// A path that is too long for a unix socket.
    #[error("the path {0} is too long for sockets: with '_' and a port appended it may have {max} bytes", max = unix::MAX_PATH)]
    Path(PathBuf),
    /// The socket cannot be created.
    #[error(transparent)]
    Listen(#[from] unix::Error),
    /// The process is out of descriptors.
    #[error("cannot create a timer for the socket device")]
    Timer(#[source] io::Error),
}

impl VsockConfig {
    /// Checks everything that can be checked without opening a file.
    pub fn validate(&self) -> Result<(), Error> {
        if !(3..u64::from(u32::MAX)).contains(&self.cid) {
            return Err(Error::Cid(self.cid));
        }
        let longest_port = "_4294967295".len();
        if self.path.as_os_str().as_bytes().len() + longest_port > unix::MAX_PATH {
            return Err(Error::Path(self.path.clone()));
        }
        Ok(())
    }
}

/// Saved state of a socket device. Connections are not saved: they end with the process that has their sockets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockState {
    /// The guest's context id.
    pub cid: u64,
}

/// The socket device.
pub struct Vsock {
    info: DeviceInfo,
    cid: u64,
    muxer: Arc<Mutex<Muxer>>,
}

impl Vsock {
    /// Creates the device, which listens at the configured path. `name` is for threads and warnings.
    pub fn new(name: impl Into<String>, config: &VsockConfig) -> Result<Self, Error> {
        config.validate()?;
        let VsockConfig { cid, path } = config;
        let listener = Listener::bind(path)?;
        let timer = TimerFd::new().map_err(|e| Error::Timer(e.into()))?;
        unix::make_room_for_descriptors(MAX_CONNECTIONS as u64);
        let info = DeviceInfo {
            id: DeviceId::Vsock,
            name: name.into(),
            features: RING_FEATURES | STREAM_FEATURE,
            queue_sizes: vec![QUEUE_SIZE; 3],
            shared_memory: vec![],
        };
        Ok(Vsock { info, cid: *cid, muxer: Arc::new(Mutex::new(Muxer::new(*cid, listener, timer))) })
    }
}

fn lock(muxer: &Mutex<Muxer>) -> MutexGuard<'_, Muxer> {
    muxer.lock().unwrap_or_else(PoisonError::into_inner)
}

impl VirtioDevice for Vsock {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// Reads the context id (5.10.4).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_config_bytes(&self.cid.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<Activated> {
        let handler = Box::new(Sockets(self.muxer.clone()));
        Ok(Activated::Here(vec![Share { queues: activation.queues, handler }]))
    }

    fn reset(&mut self) {
        lock(&self.muxer).clear();
    }

    fn save(&self) -> Result<serde_json::Value, StateError> {
        serde_json::to_value(VsockState { cid: self.cid }).map_err(|e| StateError(e.to_string()))
    }

    /// Restores the device. The context id may differ from the saved one: the guest reads it again when it is notified
    /// that its connections are gone.
    fn restore(&mut self, state: &serde_json::Value) -> Result<(), StateError> {
        let broken = |e: String| StateError(format!("the saved state of {} is broken: {e}", self.info.name));
        let VsockState { cid } = VsockState::deserialize(state).map_err(|e| broken(e.to_string()))?;
        VsockConfig { cid, path: PathBuf::new() }.validate().map_err(|e| broken(e.to_string()))?;
        lock(&self.muxer).restored();
        Ok(())
    }
}

/// Serves all three queues. The device owns the connections, so that they survive a pause.
struct Sockets(Arc<Mutex<Muxer>>);

impl Handler for Sockets {
    fn event(&mut self, event: Event, queues: &mut [Queue], cx: &Context<'_>) -> Result<Progress, Fault> {
        lock(&self.0).event(event, queues, cx)
    }
}

#[cfg(test)]
mod tests;
