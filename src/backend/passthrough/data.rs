//! Contents of files, moved between files and guest memory without an intermediate copy.

use std::fs::File;
use std::io;

use vm_memory::bitmap::Bitmap;

use crate::backend::vectored::{Direction, transfer};
use crate::memory::RamSlice;

/// Maximum number of bytes copied between files per request, which bounds the time that the request takes.
const MAX_COPY: u64 = 64 << 20;

/// Fills the buffers from `offset` on; returns the number of bytes read before the end of the file.
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

/// Writes the buffers from `offset` on, or at the end of the file; with `sync` the bytes are on disk afterwards.
/// Returns the number of bytes written, which is smaller if there is no room for more.
pub fn write(file: &File, buffers: &[RamSlice<'_>], offset: u64, append: bool, sync: bool) -> io::Result<usize> {
    let flags = if append { libc::RWF_APPEND } else { 0 } | if sync { libc::RWF_DSYNC } else { 0 };
    some(transfer(file, buffers, offset, Direction::Write(flags)))
}

/// Reports an error only if nothing was moved before it.
fn some((moved, result): (usize, io::Result<()>)) -> io::Result<usize> {
    if moved == 0 { result.map(|()| 0) } else { Ok(moved) }
}

/// Copies within a file or between files; the file system may do that without moving data. Returns the number of bytes
/// copied, which may be less than `len`.
pub fn copy(from: &File, mut from_at: u64, to: &File, mut to_at: u64, len: u64) -> io::Result<usize> {
    let len = usize::try_from(len.min(MAX_COPY)).unwrap_or(0);
    Ok(rustix::fs::copy_file_range(from, Some(&mut from_at), to, Some(&mut to_at), len)?)
}
