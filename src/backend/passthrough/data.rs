//! The contents of files, moved between them and guest memory without a copy on the way.

use std::fs::File;
use std::io;

use vm_memory::bitmap::Bitmap;

use crate::backend::vectored::{Direction, transfer};
use crate::memory::RamSlice;

/// How much is copied between files at once: it bounds the time a request takes.
const MAX_COPY: u64 = 64 << 20;

/// Fills the buffers from `offset` on; returns how many bytes there were before the file's end.
pub fn read(file: &File, buffers: &[RamSlice<'_>], offset: u64) -> io::Result<usize> {
    let result = some(transfer(file, buffers, offset, Direction::Read));
    let mut left = *result.as_ref().unwrap_or(&0);
    for buffer in buffers {
        let here = left.min(buffer.len());
        buffer.bitmap().mark_dirty(0, here);
        left -= here;
    }
    result
}

/// Writes the buffers from `offset` on, or at the file's end; with `sync` their bytes are on the disk afterwards.
/// Returns how many bytes were written, which is fewer where there was no room for more.
pub fn write(file: &File, buffers: &[RamSlice<'_>], offset: u64, append: bool, sync: bool) -> io::Result<usize> {
    let flags = if append { libc::RWF_APPEND } else { 0 } | if sync { libc::RWF_DSYNC } else { 0 };
    some(transfer(file, buffers, offset, Direction::Write(flags)))
}

/// An error counts only if nothing was done before it.
fn some((moved, result): (usize, io::Result<()>)) -> io::Result<usize> {
    if moved == 0 { result.map(|()| 0) } else { Ok(moved) }
}

/// Copies within or between files, which the file system may do without moving a byte. Returns how much; it may be less.
pub fn copy(from: &File, mut from_at: u64, to: &File, mut to_at: u64, len: u64) -> io::Result<usize> {
    let len = usize::try_from(len.min(MAX_COPY)).unwrap_or(0);
    Ok(rustix::fs::copy_file_range(from, Some(&mut from_at), to, Some(&mut to_at), len)?)
}
