//! The host's side of devices: files, block devices, terminals, sockets. Nothing here knows of virtio or of the guest.

pub mod console;
pub mod console_watch;
pub mod output;
pub mod raw;

use std::io;

use crate::memory::RamSlice;

/// What a block device stands on. Shared by the workers of a device, so every function takes `&self`.
pub trait Disk: Send + Sync {
    /// Size in bytes.
    fn size(&self) -> u64;

    /// Fills the buffers, one after the other, from `offset` on.
    fn read(&self, buffers: &[RamSlice<'_>], offset: u64) -> io::Result<()>;

    /// Writes the buffers, one after the other, from `offset` on.
    fn write(&self, buffers: &[RamSlice<'_>], offset: u64) -> io::Result<()>;

    /// Returns when all that was written before would survive a power failure.
    fn flush(&self) -> io::Result<()>;
}
