//! Guest memory in the form that system calls take, and transfers between files and guest memory without a copy.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use crate::memory::RamSlice;

/// Maximum number of buffers of one system call (`UIO_MAXIOV`).
pub const MAX_BUFFERS: usize = 1024;

/// Converts a piece of guest memory to the kernel's form.
pub fn iovec(slice: &RamSlice<'_>) -> libc::iovec {
    libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() }
}

/// Part of a transfer's buffers that is still to be moved. It holds only addresses: the code that passes them to the
/// kernel must keep the memory valid.
#[derive(Debug, Default)]
pub struct Vector {
    pieces: Vec<libc::iovec>,
    first: usize,
}

impl Vector {
    /// Replaces the buffers by these. Empty ones are left out, so that 0 from the kernel can only mean the end of a
    /// file.
    pub fn fill(&mut self, buffers: &[RamSlice<'_>]) {
        self.first = 0;
        self.pieces.clear();
        self.pieces.extend(buffers.iter().filter(|b| !b.is_empty()).map(iovec));
    }

    /// Returns the buffers still to be moved.
    pub fn rest(&self) -> &[libc::iovec] {
        self.pieces.get(self.first..).unwrap_or_default()
    }

    /// Removes the first `moved` bytes, which have been transferred.
    pub fn advance(&mut self, mut moved: usize) {
        for piece in self.pieces.get_mut(self.first..).unwrap_or_default() {
            let here = moved.min(piece.iov_len);
            piece.iov_base = piece.iov_base.wrapping_byte_add(here);
            piece.iov_len -= here;
            moved -= here;
            if piece.iov_len > 0 {
                return;
            }
            self.first += 1;
        }
    }
}

/// Direction of a transfer.
#[derive(Clone, Copy, Debug)]
pub enum Direction {
    /// From the file into guest memory.
    Read,
    /// To the file, with `RWF_` flags of pwritev2(2).
    Write(libc::c_int),
}

/// Moves bytes between guest memory and the file from `offset` on, in as many system calls as it takes, until all are
/// moved, the file ends or an error occurs. Returns the number moved, and the error if there was one; fewer bytes than
/// requested without an error mean the end of the file.
pub fn transfer(file: &File, buffers: &[RamSlice<'_>], offset: u64, way: Direction) -> (usize, io::Result<()>) {
    let mut vector = Vector::default();
    vector.fill(buffers);
    let mut done = 0;
    while !vector.rest().is_empty() {
        match once(file, vector.rest(), offset.saturating_add(done as u64), way) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return (done, Err(e)),
            Ok(0) => break,
            Ok(moved) => {
                done += moved;
                vector.advance(moved);
            }
        }
    }
    (done, Ok(()))
}

/// Makes one system call. `iov` points into guest memory: only [`transfer`] may call this.
#[allow(unsafe_code)]
fn once(file: &File, iov: &[libc::iovec], offset: u64, way: Direction) -> io::Result<usize> {
    let (fd, count) = (file.as_raw_fd(), iov.len().min(MAX_BUFFERS) as libc::c_int);
    let offset = libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    // SAFETY: every iovec is (the rest of) a RamSlice that `transfer` borrows, hence mapped guest memory that outlives
    // the call and that nothing holds a reference into; `count` does not exceed their number.
    let n = unsafe {
        match way {
            Direction::Read => libc::preadv(fd, iov.as_ptr(), count, offset),
            // The older call, which every kernel and file system supports.
            Direction::Write(0) => libc::pwritev(fd, iov.as_ptr(), count, offset),
            Direction::Write(flags) => libc::pwritev2(fd, iov.as_ptr(), count, offset, flags),
        }
    };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestRam;

    #[test]
    fn what_is_left_of_buffers() {
        let ram = GuestRam::anonymous(1 << 20);
        let slices = [(0, 10), (20, 0), (30, 5)].map(|(at, len)| ram.slice(at, len).unwrap());
        let mut vector = Vector::default();
        let rest = |vector: &Vector| {
            let start = slices[0].ptr_guard().as_ptr().addr();
            vector.rest().iter().map(|p| (p.iov_base.addr() - start, p.iov_len)).collect::<Vec<_>>()
        };
        for _ in 0..2 {
            vector.fill(&slices);
            assert_eq!(rest(&vector), [(0, 10), (30, 5)]);
            vector.advance(3);
            assert_eq!(rest(&vector), [(3, 7), (30, 5)]);
            vector.advance(8);
            assert_eq!(rest(&vector), [(31, 4)]);
            vector.advance(100);
            assert!(rest(&vector).is_empty());
        }
    }
}
