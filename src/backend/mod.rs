//! The host's side of devices: files, block devices, terminals, sockets. Nothing here knows about virtio or the guest.

pub mod console;
pub mod console_watch;
pub mod detect;
pub mod fifo;
pub mod held;
pub mod image;
pub mod mapped;
pub mod mounts;
pub mod output;
pub mod output_file;
pub mod packet;
pub mod passt;
pub mod passthrough;
pub mod place;
pub mod qcow2;
pub mod raw;
pub mod tap;
pub mod transcript;
pub mod unix;
pub mod vectored;
pub mod vhost;
pub mod vhost_user;

use std::io;
use std::os::fd::BorrowedFd;

use crate::memory::RamSlice;

/// Unit of a disk's size.
pub const SECTOR: u64 = 512;

/// Storage behind a block device. The workers of a device share it, so every function takes `&self`.
pub trait Disk: Send + Sync {
    /// Size in bytes.
    fn size(&self) -> u64;

    /// Fills the buffers, one after the other, from `offset` on.
    fn read(&self, buffers: &[RamSlice<'_>], offset: u64) -> io::Result<()>;

    /// Writes the buffers, one after the other, from `offset` on.
    fn write(&self, buffers: &[RamSlice<'_>], offset: u64) -> io::Result<()>;

    /// Returns when all that was written before would survive a power failure.
    fn flush(&self) -> io::Result<()>;

    /// Discards the contents of a range: it may read as anything afterwards, preferably as zeros that take no space.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes a range read as zeros; with `may_unmap`, its space may be freed.
    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()>;

    /// Grows the disk to `size` bytes, and its file if necessary. `size` must not be less than [`Disk::size`].
    fn resize(&self, size: u64) -> io::Result<()>;

    /// Returns the file that has every byte of the disk at the same offset, if there is one: the kernel may then do
    /// reads, writes and flushes (io_uring).
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Returns true if the file behind [`Disk::fd`] accepts these buffers at this offset. Otherwise they must go
    /// through [`Disk::read`] and [`Disk::write`], which accept all buffers.
    fn takes(&self, _buffers: &[RamSlice<'_>], _offset: u64) -> bool {
        true
    }
}

/// Zeroed memory at an address that direct I/O accepts on any device.
struct AlignedBuffer {
    bytes: Vec<u8>,
    len: usize,
}

impl AlignedBuffer {
    const ALIGN: usize = 4096;

    fn new(len: usize) -> Self {
        AlignedBuffer { bytes: vec![0; len + Self::ALIGN], len }
    }

    fn as_mut_slice(&mut self) -> &mut [u8] {
        let start = self.bytes.as_ptr().align_offset(Self::ALIGN).min(Self::ALIGN);
        self.bytes.get_mut(start..start + self.len).unwrap_or_default()
    }
}

/// Opens a file that was locked until just now. A lock lasts as long as its descriptor is open in any process, and a
/// child forked by another test keeps all our descriptors open until it executes its program.
#[cfg(test)]
fn when_free<T, E: std::fmt::Display>(open: impl Fn() -> Result<T, E>) -> T {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    loop {
        match open() {
            Ok(opened) => return opened,
            Err(e) if std::time::Instant::now() > deadline => panic!("it stays locked: {e}"),
            Err(_) => std::thread::yield_now(),
        }
    }
}
