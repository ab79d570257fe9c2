//! The contents of files, moved between them and guest memory without a copy on the way.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::bitmap::Bitmap;

use crate::memory::RamSlice;

/// How many buffers one system call takes (`UIO_MAXIOV`).
const MAX_BUFFERS: usize = 1024;
/// How much is copied between files at once: it bounds the time a request takes.
const MAX_COPY: u64 = 64 << 20;

/// Fills the buffers from `offset` on; returns how many bytes there were before the file's end.
pub fn read(file: &File, buffers: &[RamSlice<'_>], offset: u64) -> io::Result<usize> {
    let result = transfer(buffers, |iov, done| {
        let offset = position(offset, done)?;
        vectored(file, iov, |fd, iov, count| preadv(fd, iov, count, offset))
    });
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
    transfer(buffers, |iov, done| {
        let offset = position(offset, done)?;
        vectored(file, iov, |fd, iov, count| pwritev(fd, iov, count, offset, flags))
    })
}

/// Copies within or between files, which the file system may do without moving a byte. Returns how much; it may be less.
pub fn copy(from: &File, mut from_at: u64, to: &File, mut to_at: u64, len: u64) -> io::Result<usize> {
    let len = usize::try_from(len.min(MAX_COPY)).unwrap_or(0);
    Ok(rustix::fs::copy_file_range(from, Some(&mut from_at), to, Some(&mut to_at), len)?)
}

fn position(offset: u64, done: usize) -> io::Result<libc::off_t> {
    let position = offset.checked_add(done as u64).and_then(|at| libc::off_t::try_from(at).ok());
    position.ok_or_else(|| io::Error::from_raw_os_error(libc::EFBIG))
}

/// Calls `some` with what is left of the buffers until all is done, or nothing more is. An error counts only if nothing
/// was done before it.
fn transfer(
    buffers: &[RamSlice<'_>],
    mut some: impl FnMut(&[libc::iovec], usize) -> io::Result<usize>,
) -> io::Result<usize> {
    let mut iov: Vec<libc::iovec> =
        buffers.iter().map(|b| libc::iovec { iov_base: b.ptr_guard_mut().as_ptr().cast(), iov_len: b.len() }).collect();
    let (mut first, mut done) = (0, 0);
    loop {
        first += iov.iter().skip(first).take_while(|b| b.iov_len == 0).count();
        let rest = iov.get_mut(first..).unwrap_or_default();
        if rest.is_empty() {
            return Ok(done);
        }
        let mut moved = match some(rest, done) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) if done == 0 => return Err(e),
            Ok(0) | Err(_) => return Ok(done),
            Ok(moved) => moved,
        };
        done += moved;
        for buffer in rest {
            let here = moved.min(buffer.iov_len);
            buffer.iov_base = buffer.iov_base.wrapping_byte_add(here);
            buffer.iov_len -= here;
            moved -= here;
            if moved == 0 {
                break;
            }
        }
    }
}

/// One system call.
fn vectored(
    file: &File,
    iov: &[libc::iovec],
    call: impl FnOnce(libc::c_int, &[libc::iovec], libc::c_int) -> isize,
) -> io::Result<usize> {
    let n = call(file.as_raw_fd(), iov, iov.len().min(MAX_BUFFERS) as libc::c_int);
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// `iov` points into guest memory: only [`transfer`] may lead here.
#[allow(unsafe_code)]
fn preadv(fd: libc::c_int, iov: &[libc::iovec], count: libc::c_int, offset: libc::off_t) -> isize {
    // SAFETY: every iovec is (the rest of) a RamSlice that `transfer` borrows, hence mapped guest memory that outlives
    // the call and that nothing holds a reference into; `count` does not exceed their number.
    unsafe { libc::preadv(fd, iov.as_ptr(), count, offset) }
}

/// `iov` points into guest memory: only [`transfer`] may lead here.
#[allow(unsafe_code)]
fn pwritev(fd: libc::c_int, iov: &[libc::iovec], count: libc::c_int, offset: libc::off_t, flags: libc::c_int) -> isize {
    // SAFETY: as above; this call only reads the memory.
    unsafe {
        if flags == 0 {
            libc::pwritev(fd, iov.as_ptr(), count, offset)
        } else {
            libc::pwritev2(fd, iov.as_ptr(), count, offset, flags)
        }
    }
}
