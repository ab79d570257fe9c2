//! virtio 1.2 devices: the device trait, and the life cycle of a device.
//!
//! Reading order: [`queue`] (the ring), [`chain`] (a request in it), [`worker`] (the loop that serves queues), [`mmio`]
//! (the registers that the guest's driver sees), then any device; [`rng`] is the shortest. [`testing`] is the driver's
//! side, for tests, benches and fuzzers.
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

/// Ring features of queues that this process serves (6): indirect descriptors, event indices.
pub const RING_FEATURES: u64 =
    1 << virtio_ring::VIRTIO_RING_F_INDIRECT_DESC | 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX;

/// Fixed properties of a device.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// The device type.
    pub id: DeviceId,
    /// Short name, unique within the machine, like `blk0`; used in thread names and warnings.
    pub name: String,
    /// Offered feature bits, including [`RING_FEATURES`] where the queues support them; the transport adds its own.
    pub features: u64,
    /// Maximum size of each queue: a power of two, at most 32768.
    pub queue_sizes: Vec<u16>,
    /// Shared memory regions (2.10).
    pub shared_memory: Vec<SharedMemory>,
}

/// Region of host memory that the device exposes to the guest (2.10).
#[derive(Clone, Copy, Debug)]
pub struct SharedMemory {
    /// Region id (`SHMSel`).
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
/// Stopping gives the queues back: requests in flight drain, the positions in the rings return to the transport, and
/// the handlers are dropped. Pause and resume are therefore a stop and another `activate`, and so are save and restore.
/// State that must outlive a stop is shared between the device and its handlers. `reset` is called only between a stop
/// and the next `activate`. Feature bits, sizes and ids never change.
///
/// A device owns no thread and no loop: it is split into [`Handler`]s. Each handler owns some queues, and a [`worker`]
/// calls it for kicks and for the descriptors and timers that it watches.
pub trait VirtioDevice: Send {
    /// Returns the fixed properties of the device.
    fn info(&self) -> &DeviceInfo;

    /// Reads configuration space (2.5). `data` is filled with zeros, `offset` is relative to the start of the space.
    /// Offset and length come from the guest and may lie past the end.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes configuration space. Writes to fields that are read-only or do not exist are ignored.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Carries out a user's request while the machine exists, running or not; never waits.
    fn control(&mut self, _control: &Control) -> Result<Reply, ControlError> {
        Err(ControlError::Unsupported(self.info().name.clone()))
    }

    /// Starts the device on the given queues with the negotiated features.
    fn activate(&mut self, activation: Activation) -> io::Result<Activated>;

    /// Discards what the driver set up. Called while stopped.
    fn reset(&mut self) {}

    /// Describes, in one sentence, guest writes that the host did not keep and that the guest does not know of.
    fn unsaved(&self) -> Option<String> {
        None
    }

    /// Returns the state to save besides the queues. Called while stopped.
    fn save(&self) -> Result<serde_json::Value, StateError> {
        Ok(serde_json::Value::Null)
    }

    /// Restores what `save` returned; the state is untrusted. Called while stopped.
    fn restore(&mut self, state: &serde_json::Value) -> Result<(), StateError> {
        match state {
            serde_json::Value::Null => Ok(()),
            _ => Err(StateError(format!("{} keeps no state but the saved machine has some", self.info().name))),
        }
    }
}

/// Error of saving or restoring a device. Displays as one sentence.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct StateError(pub String);

/// Arguments of [`VirtioDevice::activate`].
pub struct Activation {
    /// Guest memory.
    pub ram: GuestRam,
    /// The negotiated features.
    pub features: u64,
    /// All queues in order; those that the driver does not use are disabled ([`Queue::is_enabled`]).
    pub queues: Vec<Queue>,
    /// Eventfds that the driver kicks, by queue index, for queues that run elsewhere. Workers watch theirs themselves.
    pub kicks: Arc<[EventFd]>,
    /// Interrupt to the driver, for queues that run elsewhere and for configuration changes.
    pub interrupt: Interrupt,
}

/// Queues of an activated device, by the place where they are served.
pub enum Activated {
    /// Workers of this process, one per share. Every queue belongs to exactly one share.
    Here(Vec<Share>),
    /// The kernel or another process (vhost, vhost-user); workers of this process serve the queues that it leaves to
    /// them.
    Elsewhere(Box<dyn Remote>, Vec<Share>),
}

/// Some queues of a device and their handler.
pub struct Share {
    /// Queues, in the order in which [`Handler::event`] gets them.
    pub queues: Vec<Queue>,
    /// Handler of these queues.
    pub handler: Box<dyn Handler>,
}

/// Queues that are served outside of this process.
pub trait Remote: Send {
    /// Stops all queues and returns their positions in the rings (`GET_VRING_BASE`), by index within the device. Waits
    /// for requests in flight, but not forever.
    fn stop(&mut self) -> io::Result<Vec<(u16, QueueState)>>;
}

/// Reason for which a worker calls a handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The worker starts: the time to watch descriptors. An [`Event::Kick`] for every queue follows automatically.
    Start,
    /// This queue of the share may have new buffers. Can be spurious.
    Kick(usize),
    /// A watched descriptor is ready; carries its token.
    Ready(u64),
}

/// Result of an event or a drain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// All work is done.
    Done,
    /// The bound on work per event was reached: the same event is delivered again after others had their turn.
    More,
}

/// The part of a device that serves a share of its queues.
pub trait Handler: Send {
    /// Handles an event, with bounded work. The worker announces used buffers afterwards. An error, usually the guest's
    /// fault, stops the device until it is reset.
    fn event(&mut self, event: Event, queues: &mut [Queue], cx: &Context<'_>) -> Result<Progress, Fault>;

    /// Finishes requests in flight and starts nothing new, because the worker is to stop. Called after every event
    /// until it returns [`Progress::Done`]. The default has nothing to wait for: every event has finished what it
    /// began, or ended in a fault that lost a request.
    fn drain(&mut self, _queues: &mut [Queue], _cx: &Context<'_>) -> Result<Progress, Fault> {
        Ok(Progress::Done)
    }
}

/// Error that no status byte can report: a rule that the guest broke, or a failure of the host.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// Broken rule of the ring, or of a chain in it.
    #[error(transparent)]
    Queue(#[from] queue::Error),
    /// Broken rule of a chain.
    #[error(transparent)]
    Chain(#[from] chain::Error),
    /// Access to memory that is no longer RAM.
    #[error(transparent)]
    OutOfRam(#[from] OutOfRam),
    /// Broken rule of the device type.
    #[error("{0}")]
    Device(&'static str),
    /// Failure of the host that the device cannot survive.
    #[error("the host failed: {0}")]
    Host(#[from] io::Error),
}

/// Facilities that a handler may use while it handles an event.
pub struct Context<'a> {
    /// Guest memory.
    pub ram: &'a GuestRam,
    /// Interrupt, for configuration changes only: the worker announces used buffers.
    pub interrupt: &'a Interrupt,
    poller: &'a Poller,
}

/// First of the tokens that are the worker's own.
const WORKER_TOKENS: u64 = 1 << 62;

impl<'a> Context<'a> {
    /// Creates a context for a loop around `poller`.
    pub fn new(ram: &'a GuestRam, interrupt: &'a Interrupt, poller: &'a Poller) -> Self {
        Context { ram, interrupt, poller }
    }

    /// Starts watching `fd`: [`Event::Ready`] is delivered with `token` (below 2^62) for as long as `fd` is ready.
    pub fn watch(&self, fd: RawFd, token: u64, interest: Interest) -> io::Result<()> {
        self.poller.add(fd, Self::checked(token)?, interest)
    }

    /// Changes what `fd` is watched for.
    pub fn rewatch(&self, fd: RawFd, token: u64, interest: Interest) -> io::Result<()> {
        self.poller.modify(fd, Self::checked(token)?, interest)
    }

    /// Stops watching `fd`.
    pub fn unwatch(&self, fd: RawFd) -> io::Result<()> {
        self.poller.remove(fd)
    }

    fn checked(token: u64) -> io::Result<u64> {
        if token < WORKER_TOKENS { Ok(token) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }
}

/// Answers a read of configuration space from `config`; bytes of `data` past its end stay unchanged.
pub fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    let rest = usize::try_from(offset).ok().and_then(|o| config.get(o..)).unwrap_or(&[]);
    for (to, from) in data.iter_mut().zip(rest) {
        *to = *from;
    }
}
