//! Requests of a user to a device while its machine exists: sizes, links, statistics.
//!
//! ```text
//! Controller ──▶ mailbox ──▶ machine loop ──▶ transport, under its lock ──▶ VirtioDevice::control
//!                                             └─ configuration space changed: interrupts the driver
//! ```
//!
//! The device is called as for a register write: it changes its configuration space and the state that it shares with
//! its handlers, and never waits.

use super::balloon::{BalloonStats, FreeHints};
use super::mem::MemStatus;

/// Request to a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Control {
    /// Balloon: make the guest give up this many bytes of memory in total, in whole pages of 4 KiB.
    SetBalloon(u64),
    /// Balloon: return statistics of the guest's memory.
    BalloonStats,
    /// Balloon: make the guest report again which of its pages are free.
    StartHints,
    /// Balloon: return the free pages reported since [`Control::StartHints`].
    FreeHints,
    /// Balloon: forget the reported pages, and let the guest have them back.
    EndHints,
    /// Disk: grow to this size in bytes; never smaller than it is.
    ResizeDisk(u64),
    /// Memory device: make the guest plug this many bytes in total, in whole blocks.
    RequestMemory(u64),
    /// Memory device: return its progress.
    MemoryStatus,
    /// Network card: plug its cable in (true) or pull it (false); packets are dropped while it is pulled.
    SetLink(bool),
}

/// Answer of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// The request is done, and the driver need not know.
    Done,
    /// Configuration space has changed; the transport notifies the driver.
    ConfigChanged,
    /// Answer to [`Control::BalloonStats`].
    BalloonStats(BalloonStats),
    /// Answer to [`Control::FreeHints`].
    FreeHints(FreeHints),
    /// Answer to [`Control::MemoryStatus`].
    MemoryStatus(MemStatus),
}

/// Reason why a request failed. Displays as one sentence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// The machine has no such device.
    #[error("the machine has no device {0}")]
    NoDevice(String),
    /// The device does not support the request.
    #[error("device {0} cannot do that")]
    Unsupported(String),
    /// The device refused the request, for this reason.
    #[error("{0}")]
    Refused(String),
    /// The machine has ended.
    #[error("the machine has ended")]
    Ended,
}
