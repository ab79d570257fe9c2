//! What a user may ask of a device while its machine exists: sizes, links, what it knows.
//!
//! ```text
//! Controller ──▶ mailbox ──▶ machine loop ──▶ transport, under its lock ──▶ VirtioDevice::control
//!                                             └─ configuration space changed: interrupts the driver
//! ```
//!
//! The device is called like a register write: it changes what its configuration space says, and what its handlers
//! share with it, and never waits.

use super::balloon::{BalloonStats, FreeHints};
use super::mem::MemStatus;

/// Something that can be asked of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Control {
    /// Of a balloon: have the guest give up this many bytes of memory in all, in whole pages of 4 KiB.
    SetBalloon(u64),
    /// Of a balloon: what it knows of the guest's memory.
    BalloonStats,
    /// Of a balloon: have the guest tell which of its pages are free, anew.
    StartHints,
    /// Of a balloon: which it told since [`Control::StartHints`].
    FreeHints,
    /// Of a balloon: forget them, and let the guest have them back.
    EndHints,
    /// Of a disk: be this large from now on, in bytes; never smaller than it is.
    ResizeDisk(u64),
    /// Of a memory device: have the guest plug this many bytes in all, whole blocks.
    RequestMemory(u64),
    /// Of a memory device: how far it is.
    MemoryStatus,
    /// Of a network card: plug its cable in (true), or pull it; packets are dropped then.
    SetLink(bool),
}

/// What a device answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// It is done, and the driver need not know.
    Done,
    /// Configuration space has changed; the transport tells the driver.
    ConfigChanged,
    /// For [`Control::BalloonStats`].
    BalloonStats(BalloonStats),
    /// For [`Control::FreeHints`].
    FreeHints(FreeHints),
    /// For [`Control::MemoryStatus`].
    MemoryStatus(MemStatus),
}

/// Why nothing came of it. Displays as one sentence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// The machine has no such device.
    #[error("the machine has no device {0}")]
    NoDevice(String),
    /// The device cannot do that.
    #[error("device {0} cannot do that")]
    Unsupported(String),
    /// The device can do it, but not so.
    #[error("{0}")]
    Refused(String),
    /// Nobody is there to ask.
    #[error("the machine has ended")]
    Ended,
}
