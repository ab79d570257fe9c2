//! File of an image as the format's driver (imago) sees it.
//!
//! While the image is opened, the driver reads the checked pieces of the file from memory, as they were when they were
//! checked: a change of the file since then has no effect.

#![allow(unsafe_code)]

use std::fmt;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use imago::file::File;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use imago::{Storage, StorageOpenOptions};

use crate::backend::vectored::{self, Direction};
use crate::backend::{AlignedBuffer, packet};
use crate::memory::RamSlice;

/// Piece of a file: its offset and its bytes.
pub(super) type Piece = (u64, Vec<u8>);

/// Pieces that are read from memory until they are released.
#[derive(Clone, Debug, Default)]
pub(super) struct Checked(Arc<Mutex<Vec<Piece>>>);

impl Checked {
    pub(super) fn new(pieces: Vec<Piece>) -> Self {
        Checked(Arc::new(Mutex::new(pieces)))
    }

    /// Releases the pieces: from now on everything is read from the file.
    pub(super) fn give_up(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn touches(&self, offset: u64, len: u64) -> bool {
        let pieces = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pieces.iter().any(|(at, bytes)| *at < offset.saturating_add(len) && offset < at + bytes.len() as u64)
    }

    /// Replaces data in `buffer`, which was read from `offset` on, by the pieces where they overlap.
    fn overlay(&self, buffer: &mut [u8], offset: u64) {
        for (at, bytes) in &*self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            let start = (*at).max(offset);
            let end = (at + bytes.len() as u64).min(offset.saturating_add(buffer.len() as u64));
            if start < end {
                let from = (start - at) as usize..(end - at) as usize;
                let to = (start - offset) as usize..(end - offset) as usize;
                if let (Some(to), Some(from)) = (buffer.get_mut(to), bytes.get(from)) {
                    to.copy_from_slice(from);
                }
            }
        }
    }
}

/// File that the driver uses.
#[derive(Debug)]
pub(super) struct ImageFile {
    file: File,
    /// The same file, for transfers that need no driver.
    data: fs::File,
    /// True if the file needs aligned buffers.
    direct: bool,
    checked: Checked,
}

impl ImageFile {
    pub(super) fn new(file: fs::File, path: &Path, write: bool, direct: bool, checked: Checked) -> io::Result<Self> {
        let options = StorageOpenOptions::new().filename(path).write(write).direct(direct);
        let data = file.try_clone()?;
        Ok(ImageFile { file: File::from_open_file(file, options)?, data, direct, checked })
    }

    /// Moves the contents of `buffers` between guest memory and the file without a copy. Returns false if the driver must do
    /// it: the file needs aligned buffers, or does not reach as far. The driver keeps the file's size, so only the driver may
    /// make the file longer.
    pub(super) fn transfer(&self, buffers: &[RamSlice<'_>], offset: u64, way: Direction) -> io::Result<bool> {
        let len = packet::len(buffers) as u64;
        let size = self.file.size()?;
        if self.direct || offset.checked_add(len).is_none_or(|end| end > size) {
            return Ok(false);
        }
        let (moved, result) = vectored::transfer(&self.data, buffers, offset, way);
        result.map(|()| moved as u64 == len)
    }
}

impl fmt::Display for ImageFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.file.fmt(f)
    }
}

impl Storage for ImageFile {
    fn mem_align(&self) -> usize {
        self.file.mem_align()
    }

    fn req_align(&self) -> usize {
        self.file.req_align()
    }

    fn zero_align(&self) -> usize {
        self.file.zero_align()
    }

    fn discard_align(&self) -> usize {
        self.file.discard_align()
    }

    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    unsafe fn pure_readv(&self, mut bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        if !self.checked.touches(offset, bufv.len()) {
            // SAFETY: the caller's promises are those that the inner call needs.
            return unsafe { self.file.pure_readv(bufv, offset) };
        }
        let len = usize::try_from(bufv.len()).map_err(io::Error::other)?;
        let mut buffer = AlignedBuffer::new(len);
        let bytes = buffer.as_mut_slice();
        // SAFETY: as above, and the buffer is aligned for every device.
        unsafe { self.file.pure_readv(IoVectorMut::from(&mut *bytes), offset)? };
        self.checked.overlay(bytes, offset);
        bufv.copy_from_slice(bytes);
        Ok(())
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        // SAFETY: the caller's promises are those that the inner call needs, here and below.
        unsafe { self.file.pure_writev(bufv, offset) }
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: as above.
        unsafe { self.file.pure_write_zeroes(offset, length) }
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: as above.
        unsafe { self.file.pure_write_allocated_zeroes(offset, length) }
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: as above.
        unsafe { self.file.pure_discard(offset, length) }
    }

    fn flush(&self) -> io::Result<()> {
        self.file.flush()
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    fn settle_writes(&self) -> io::Result<()> {
        self.file.settle_writes()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        // SAFETY: as above.
        unsafe { self.file.invalidate_cache() }
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        self.file.get_storage_helper()
    }

    fn resize(&self, new_size: u64, prealloc_mode: PreallocateMode) -> io::Result<()> {
        self.file.resize(new_size, prealloc_mode)
    }
}
