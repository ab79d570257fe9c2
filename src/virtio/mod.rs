//! virtio 1.2 devices: what a device is, and how one comes to life and to rest.
//!
//! Read on in this order: [`queue`] (the ring), [`chain`] (a request in it), [`worker`] (the loop that serves
//! queues), [`mmio`] (the registers that the guest's driver sees), then any device; [`rng`] is the shortest.
//! [`testing`] is the other side: a driver for tests, benches and fuzzers.
//!
//! Section numbers are those of "Virtual I/O Device (VIRTIO) Version 1.2".

pub mod balloon;
pub mod blk;
pub mod chain;
pub mod console;
pub mod control;
pub mod mem;
pub mod fs;
mod interrupt;
pub mod mmio;
pub mod net;
pub mod pmem;
pub mod queue;
pub mod rng;
mod running;
#[doc(hidden)]
pub mod testing;
mod vhost;
pub mod vhost_user;
pub mod vsock;
pub mod worker;

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use virtio_bindings::{virtio_ids, virtio_ring};
use vmm_sys_util::eventfd::EventFd;

use crate::event::{Interest, Poller};
use crate::memory::{GuestRam, OutOfRam};
use control::{Control, ControlError, Reply};
use queue::{Queue, QueueState};

pub use interrupt::Interrupt;

/// Device types (5, "Device Types").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum DeviceId {
    /// Network card (5.1).
    Net = virtio_ids::VIRTIO_ID_NET,
    /// Block device (5.2).
    Block = virtio_ids::VIRTIO_ID_BLOCK,
    /// Console (5.3).
    Console = virtio_ids::VIRTIO_ID_CONSOLE,
    /// Entropy source (5.4).
    Rng = virtio_ids::VIRTIO_ID_RNG,
    /// Memory balloon (5.5).
    Balloon = virtio_ids::VIRTIO_ID_BALLOON,
    /// Socket device (5.10).
    Vsock = virtio_ids::VIRTIO_ID_VSOCK,
    /// Memory device (5.15).
    Mem = virtio_ids::VIRTIO_ID_MEM,
    /// File system device (5.11).
    Fs = virtio_ids::VIRTIO_ID_FS,
    /// Persistent memory (5.19).
    Pmem = virtio_ids::VIRTIO_ID_PMEM,
}

/// Features of the ring that queues served in this process have (6): indirect descriptors, event indices.
pub const RING_FEATURES: u64 =
    1 << virtio_ring::VIRTIO_RING_F_INDIRECT_DESC | 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX;

/// What never changes about a device.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// The device type.
    pub id: DeviceId,
    /// Short and unique within the machine, like `blk0`; threads and warnings carry it.
    pub name: String,
    /// Feature bits that are offered, [`RING_FEATURES`] included where the queues know them; the transport adds its
    /// own.
    pub features: u64,
    /// Largest size of each queue: powers of two, at most 32768.
    pub queue_sizes: Vec<u16>,
    /// Shared memory regions (2.10) with their ids.
    pub shared_memory: Vec<SharedMemory>,
}

/// A piece of host memory that the device shows the guest (2.10).
#[derive(Clone, Copy, Debug)]
pub struct SharedMemory {
    /// Its id (`SHMSel`).
    pub id: u8,
    /// Guest-physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u64,
}

/// A virtio device, without its transport.
///
/// ```text
///   new ──► [stopped] ── activate(queues) ──► [running: handlers in workers, or queues elsewhere]
///              ▲  │                               │ DRIVER_OK, resume, a queue added or reset
///              │  └── save / restore, reset       │
///              └───── every handler drained ◄─────┘ reset by the driver, pause, end, a queue reset
/// ```
///
/// Stopping means giving the queues back: in-flight requests drain, the positions in the rings return to the
/// transport, the handlers are dropped. So pause and resume are a stop and another `activate`, as are save and
/// restore, and what must outlive a stop the device shares with its handlers. `reset` comes only between a stop and
/// the next `activate`. Feature bits, sizes and ids never change.
///
/// A device owns no thread and no loop: it is split into [`Handler`]s, each of which owns some queues and is called
/// by a [`worker`] for kicks and for the descriptors and timers that it watches.
pub trait VirtioDevice: Send {
    /// What the device is.
    fn info(&self) -> &DeviceInfo;

    /// Reads configuration space (2.5). `data` comes filled with zeros, `offset` counts from its beginning; both come
    /// from the guest and may lie behind the end.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes configuration space. What is read-only or does not exist is ignored.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Does what a user asks for while the machine exists, running or not; never waits.
    fn control(&mut self, _control: &Control) -> Result<Reply, ControlError> {
        Err(ControlError::Unsupported(self.info().name.clone()))
    }

    /// Starts on the given queues with the negotiated features.
    fn activate(&mut self, activation: Activation) -> io::Result<Activated>;

    /// Forgets what the driver set up. Called while stopped.
    fn reset(&mut self) {}

    /// A sentence about what the guest wrote and the host did not keep, which the guest has not heard of.
    fn unsaved(&self) -> Option<String> {
        None
    }

    /// What must be saved besides the queues. Called while stopped.
    fn save(&self) -> Result<serde_json::Value, StateError> {
        Ok(serde_json::Value::Null)
    }

    /// Takes over what `save` gave; untrusted. Called while stopped.
    fn restore(&mut self, state: &serde_json::Value) -> Result<(), StateError> {
        match state {
            serde_json::Value::Null => Ok(()),
            _ => Err(StateError(format!("{} keeps no state but the saved machine has some", self.info().name))),
        }
    }
}

/// Saved state that does not fit. Displays as one sentence.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct StateError(pub String);

/// What a device gets to start with.
pub struct Activation {
    /// Guest memory.
    pub ram: GuestRam,
    /// The negotiated features.
    pub features: u64,
    /// All queues in order; those that the driver does not use are disabled ([`Queue::is_enabled`]).
    pub queues: Vec<Queue>,
    /// The eventfd that the driver kicks, by queue index: for queues that run elsewhere. Workers watch theirs.
    pub kicks: Arc<[EventFd]>,
    /// How to interrupt the driver: for queues that run elsewhere and for configuration changes.
    pub interrupt: Interrupt,
}

/// Who serves the queues.
pub enum Activated {
    /// Workers of this process, one per share. Every queue belongs to exactly one share.
    Here(Vec<Share>),
    /// The kernel or another process (vhost, vhost-user), and workers of this process for the queues that it leaves to
    /// them.
    Elsewhere(Box<dyn Remote>, Vec<Share>),
}

/// Some queues of a device and who handles them.
pub struct Share {
    /// The queues, which `event` gets in this order.
    pub queues: Vec<Queue>,
    /// Who serves them.
    pub handler: Box<dyn Handler>,
}

/// Queues that run outside of this process.
pub trait Remote: Send {
    /// Stops all queues and says where in the rings they are (`GET_VRING_BASE`), by their index within the device. Waits
    /// for requests in flight, but not for ever.
    fn stop(&mut self) -> io::Result<Vec<(u16, QueueState)>>;
}

/// What a worker wakes a handler for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The worker begins: the time to watch descriptors. A [`Event::Kick`] of every queue follows by itself.
    Start,
    /// There may be new buffers in this queue of the share. May be spurious.
    Kick(usize),
    /// A watched descriptor is ready; its token.
    Ready(u64),
}

/// Whether there is more to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// All done.
    Done,
    /// The bound on work per event was reached: deliver the same event again, after others had their turn.
    More,
}

/// The part of a device that serves a share of its queues.
pub trait Handler: Send {
    /// Handles an event, with bounded work. Used buffers are announced by the worker afterwards. An error is the
    /// guest's fault and ends the device until it is reset.
    fn event(&mut self, event: Event, queues: &mut [Queue], cx: &Context<'_>) -> Result<Progress, Fault>;

    /// The worker is to stop: starts nothing new, finishes what is in flight. Called after every event until it says
    /// [`Progress::Done`]. By default there is nothing to wait for: every event has finished what it began, or ended in a
    /// fault that cost a request.
    fn drain(&mut self, _queues: &mut [Queue], _cx: &Context<'_>) -> Result<Progress, Fault> {
        Ok(Progress::Done)
    }
}

/// A rule that the guest broke and that no status byte can tell it of.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The ring or a chain in it.
    #[error(transparent)]
    Queue(#[from] queue::Error),
    /// A chain.
    #[error(transparent)]
    Chain(#[from] chain::Error),
    /// Memory that was there a moment ago.
    #[error(transparent)]
    OutOfRam(#[from] OutOfRam),
    /// A rule of the device's own.
    #[error("{0}")]
    Device(&'static str),
    /// The host failed in a way that the device cannot live with.
    #[error("the host failed: {0}")]
    Host(#[from] io::Error),
}

/// What a handler may use while it handles an event.
pub struct Context<'a> {
    /// Guest memory.
    pub ram: &'a GuestRam,
    /// For configuration changes; used buffers are announced by the worker.
    pub interrupt: &'a Interrupt,
    poller: &'a Poller,
}

/// Tokens from here on are the worker's own.
const WORKER_TOKENS: u64 = 1 << 62;

impl<'a> Context<'a> {
    /// A context for a loop around `poller`.
    pub fn new(ram: &'a GuestRam, interrupt: &'a Interrupt, poller: &'a Poller) -> Self {
        Context { ram, interrupt, poller }
    }

    /// Starts waiting for `fd`: [`Event::Ready`] comes with `token` (below 2^62) for as long as it is ready.
    pub fn watch(&self, fd: RawFd, token: u64, interest: Interest) -> io::Result<()> {
        self.poller.add(fd, Self::checked(token)?, interest)
    }

    /// Waits for something else on `fd`.
    pub fn rewatch(&self, fd: RawFd, token: u64, interest: Interest) -> io::Result<()> {
        self.poller.modify(fd, Self::checked(token)?, interest)
    }

    /// Stops waiting for `fd`.
    pub fn unwatch(&self, fd: RawFd) -> io::Result<()> {
        self.poller.remove(fd)
    }

    fn checked(token: u64) -> io::Result<u64> {
        if token < WORKER_TOKENS { Ok(token) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }
}

/// Answers a read of configuration space from its bytes; what lies behind the end stays as it is.
pub fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    let rest = usize::try_from(offset).ok().and_then(|o| config.get(o..)).unwrap_or(&[]);
    for (to, from) in data.iter_mut().zip(rest) {
        *to = *from;
    }
}
