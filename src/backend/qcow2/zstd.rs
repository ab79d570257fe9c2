//! qcow2 images whose compressed clusters are zstd frames, which the format's driver (imago) does not read.
//!
//! [`Zstd`] wraps that driver and handles compressed clusters itself: it finds and unpacks them, and unpacks one into a
//! plain cluster before a part of it is written. While such an image is written to, nothing may be read from it: the
//! cluster being unpacked could be reassigned.

#![allow(unsafe_code)]

use std::fmt;
use std::fs::File;
use std::io::{self, Read};

use imago::format::drivers::{FormatDriverInstance, PreparedDataMapping};
use imago::format::{Format, PreallocateMode};
use imago::io_buffers::IoVectorMut;
use imago::qcow2::Qcow2;
use imago::{ShallowMapping, StorageExt};
use ruzstd::decoding::StreamingDecoder;

use super::read_at;
use super::storage::ImageFile;
use super::tables::compressed_range;

/// Maximum number of unpacked bytes that a frame may refer back to. A cluster has at most 2 MiB.
const MAX_WINDOW: u64 = 8 << 20;

/// Driver of images with zstd clusters.
pub(super) struct Zstd {
    inner: Qcow2<ImageFile>,
    file: File,
    cluster_bits: u32,
}

impl Zstd {
    /// Creates a driver for the image in `file` on top of the driver that cannot unpack.
    pub(super) fn new(inner: Qcow2<ImageFile>, file: File, cluster_bits: u32) -> Self {
        Zstd { inner, file, cluster_bits }
    }

    fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    fn number(&self, offset: u64) -> io::Result<u64> {
        let bytes = read_at(&self.file, offset, 8)?;
        Ok(bytes.first_chunk().copied().map_or(0, u64::from_be_bytes))
    }

    /// Unpacks the compressed cluster that contains the byte `offset` of the disk. The tables are read from the file:
    /// first-level entries are written as soon as they change, and the entry of a compressed cluster has not been
    /// changed.
    fn unpack(&self, offset: u64) -> io::Result<Vec<u8>> {
        let broken = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_string());
        let entries_bits = self.cluster_bits - 3;
        let cluster = offset >> self.cluster_bits;
        let l1 = self.number(40)?;
        let l2 = self.number(l1.saturating_add((cluster >> entries_bits) * 8))? & 0x00FF_FFFF_FFFF_FE00;
        let entry = self.number(l2 + (cluster & ((1 << entries_bits) - 1)) * 8)?;
        if l2 == 0 || entry & 1 << 62 == 0 {
            return Err(broken("a cluster is no longer compressed"));
        }
        let (at, len) = compressed_range(entry, self.cluster_bits);
        let packed = read_at(&self.file, at, len as usize)?;
        unpack(&packed, self.cluster() as usize)
    }

    /// Unpacks the compressed clusters of a range that will not be overwritten as a whole.
    fn make_writable(&self, offset: u64, length: u64, overwrite: bool) -> io::Result<()> {
        let end = offset + length;
        let mut start = offset - offset % self.cluster();
        while start < end {
            let next = start + self.cluster();
            let replaced = overwrite && offset <= start && next <= end;
            if !replaced && matches!(self.inner.get_mapping(start, 1)?, (ShallowMapping::Special { .. }, _)) {
                self.make_plain(start)?;
            }
            start = next;
        }
        Ok(())
    }

    fn make_plain(&self, start: u64) -> io::Result<()> {
        let bytes = self.unpack(start)?;
        let len = self.cluster().min(self.size() - start);
        if len < self.cluster() {
            // Otherwise the driver would unpack the part past the end of the disk.
            self.inner.ensure_zero_mapping(start, len)?;
        }
        let mapping = self.inner.prepare_data_mapping(start, len, true)?;
        let bytes = bytes.get(..len as usize).ok_or(io::ErrorKind::InvalidData)?;
        mapping.storage().write(bytes, mapping.offset())?;
        self.inner.commit_data_mapping(mapping)
    }
}

/// Unpacks the first frame of `packed`, which must yield at least `len` bytes.
fn unpack(packed: &[u8], len: usize) -> io::Result<Vec<u8>> {
    let mut decoder = StreamingDecoder::new_with_max_window_size(packed, MAX_WINDOW).map_err(io::Error::other)?;
    let mut bytes = vec![0; len];
    decoder.read_exact(&mut bytes)?;
    Ok(bytes)
}

impl fmt::Debug for Zstd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

impl fmt::Display for Zstd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.inner, f)
    }
}

impl FormatDriverInstance for Zstd {
    type Storage = ImageFile;

    fn format(&self) -> Format {
        self.inner.format()
    }

    unsafe fn probe(storage: &ImageFile) -> io::Result<bool> {
        // SAFETY: the caller's promises are those that the inner call needs.
        unsafe { Qcow2::<ImageFile>::probe(storage) }
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn zero_granularity(&self) -> Option<u64> {
        self.inner.zero_granularity()
    }

    fn collect_storage_dependencies(&self) -> Vec<&ImageFile> {
        self.inner.collect_storage_dependencies()
    }

    fn writable(&self) -> bool {
        self.inner.writable()
    }

    fn get_mapping(&self, offset: u64, max_length: u64) -> io::Result<(ShallowMapping<'_, ImageFile>, u64)> {
        self.inner.get_mapping(offset, max_length)
    }

    fn prepare_data_mapping(
        &self,
        offset: u64,
        length: u64,
        overwrite: bool,
    ) -> io::Result<PreparedDataMapping<'_, ImageFile>> {
        self.make_writable(offset, length, overwrite)?;
        self.inner.prepare_data_mapping(offset, length, overwrite)
    }

    fn commit_data_mapping(&self, mapping: PreparedDataMapping<'_, ImageFile>) -> io::Result<()> {
        self.inner.commit_data_mapping(mapping)
    }

    fn ensure_zero_mapping(&self, offset: u64, length: u64) -> io::Result<(u64, u64)> {
        self.inner.ensure_zero_mapping(offset, length)
    }

    unsafe fn discard_to_zero_unsafe(&self, offset: u64, length: u64) -> io::Result<(u64, u64)> {
        // SAFETY: the caller's promises are those that the inner call needs.
        unsafe { self.inner.discard_to_zero_unsafe(offset, length) }
    }

    unsafe fn discard_to_any_unsafe(&self, offset: u64, length: u64) -> io::Result<(u64, u64)> {
        // SAFETY: as above.
        unsafe { self.inner.discard_to_any_unsafe(offset, length) }
    }

    unsafe fn discard_to_backing_unsafe(&self, offset: u64, length: u64) -> io::Result<(u64, u64)> {
        // SAFETY: as above.
        unsafe { self.inner.discard_to_backing_unsafe(offset, length) }
    }

    fn readv_special(&self, mut bufv: IoVectorMut<'_>, mut offset: u64) -> io::Result<()> {
        while !bufv.is_empty() {
            let cluster = self.unpack(offset)?;
            let at = (offset % self.cluster()) as usize;
            let (mut here, rest) = bufv.split_at(self.cluster() - at as u64);
            let piece = cluster.get(at..at + here.len() as usize).ok_or(io::ErrorKind::InvalidData)?;
            here.copy_from_slice(piece);
            offset += piece.len() as u64;
            bufv = rest;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.inner.flush()
    }

    fn sync(&self) -> io::Result<()> {
        self.inner.sync()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        // SAFETY: as above.
        unsafe { self.inner.invalidate_cache() }
    }

    fn resize_grow(&self, new_size: u64, prealloc_mode: PreallocateMode) -> io::Result<()> {
        self.inner.resize_grow(new_size, prealloc_mode)
    }

    fn resize_shrink(&mut self, new_size: u64) -> io::Result<()> {
        self.inner.resize_shrink(new_size)
    }
}
