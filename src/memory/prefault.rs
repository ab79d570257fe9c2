//! Allocation of guest memory on the host before the guest touches it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use super::mapping::Mapping;
use crate::layout::PAGE_SIZE;

/// Number of pages that one system call touches: the kernel's maximum (UIO_MAXIOV).
const PAGES: usize = 1024;

impl Mapping {
    /// Makes the host provide every page of a piece. The piece must hold zeros: memory that the guest has not used yet.
    pub(super) fn populate(&self, piece: Range<u64>) -> io::Result<()> {
        match self.advise(piece.clone(), libc::MADV_POPULATE_WRITE) {
            // Linux before 5.14 does not know this advice.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => self.touch(piece),
            result => result,
        }
    }

    /// Provides every page by writing a zero to it, for kernels without `MADV_POPULATE_WRITE`. The kernel does the
    /// writing, so a page that the host cannot provide is an error; a write by vireo itself would be a SIGBUS.
    #[allow(unsafe_code)]
    fn touch(&self, piece: Range<u64>) -> io::Result<()> {
        let (addr, len) = self.checked(piece)?;
        let zeros = File::open("/dev/zero")?;
        let starts = (addr..addr + len).step_by(PAGE_SIZE as usize);
        let bytes: Vec<_> = starts.map(|at| libc::iovec { iov_base: at as *mut libc::c_void, iov_len: 1 }).collect();
        for mut rest in bytes.chunks(PAGES) {
            while !rest.is_empty() {
                // SAFETY: each buffer is a byte of this mapping of ours, whose range was just checked; guest memory is
                // only accessed by volatile copies.
                let touched = unsafe { libc::readv(zeros.as_raw_fd(), rest.as_ptr(), rest.len() as libc::c_int) };
                match usize::try_from(touched) {
                    Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                    // Interrupted by a signal, or stopped at a page that the host cannot provide; then the next call
                    // fails.
                    Ok(touched) => rest = &rest[touched.min(rest.len())..],
                    Err(_) => return Err(io::Error::last_os_error()),
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the number of pages of a mapping that are in memory, according to the kernel.
    #[allow(unsafe_code)]
    fn present(mapping: &Mapping, pages: usize) -> usize {
        let (addr, len) = mapping.checked(0..mapping.len()).unwrap();
        let mut found = vec![0u8; pages];
        // SAFETY: the range is the mapping's, and there is a byte for each of its pages.
        assert_eq!(unsafe { libc::mincore(addr as *mut libc::c_void, len, found.as_mut_ptr()) }, 0);
        found.iter().filter(|page| **page & 1 == 1).count()
    }

    #[test]
    fn every_page_is_touched_without_the_advice() {
        // More pages than one call takes, and a piece of them.
        const LEN: u64 = 1500 * PAGE_SIZE;
        for flags in [libc::MAP_PRIVATE, libc::MAP_SHARED] {
            let file = tempfile::tempfile().unwrap();
            file.set_len(LEN).unwrap();
            for file in [None, Some((&file, 0))] {
                let mapping = Mapping::new(LEN, file, flags | libc::MAP_NORESERVE).unwrap();
                let _ = mapping.advise(0..LEN, libc::MADV_NOHUGEPAGE);
                mapping.touch(PAGE_SIZE * 10..PAGE_SIZE * 20).unwrap();
                if file.is_none() {
                    assert_eq!(present(&mapping, 1500), 10);
                }
                mapping.touch(0..LEN).unwrap();
                assert_eq!(present(&mapping, 1500), 1500);
                assert!(mapping.touch(0..LEN + 1).is_err());
            }
        }
    }

    #[test]
    fn what_the_host_does_not_have_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(PAGE_SIZE).unwrap();
        let mapping = Mapping::new(2 * PAGE_SIZE, Some((&file, 0)), libc::MAP_SHARED).unwrap();
        // The second page is past the end of the file.
        assert_eq!(mapping.touch(0..2 * PAGE_SIZE).unwrap_err().raw_os_error(), Some(libc::EFAULT));
    }
}
