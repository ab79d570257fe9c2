//! A file or device as a disk, byte for byte.
//!
//! `direct=on` bypasses the host's page cache, and then the kernel requires whole blocks. Smaller requests of the guest
//! go through a buffer: the blocks around them are read, changed and written, one such write at a time.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::FallocateFlags;
use vm_memory::bitmap::Bitmap;

use super::vectored::{Direction, transfer};
use super::{AlignedBuffer, Disk, packet};
use crate::memory::RamSlice;

/// Alignment of offsets and lengths of direct requests; no disk has larger blocks.
pub(super) const DIRECT_BLOCK: u64 = 4096;
/// Alignment of addresses in direct requests; no disk needs more.
const DIRECT_ADDRESS: usize = 512;

/// Maximum number of bytes per step through a buffer.
const MAX_PIECE: usize = 1 << 20;

/// Kind of file behind a raw disk: each has its own way to discard and to write zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RawKind {
    /// A regular file.
    File,
    /// A block device.
    Blocks,
    /// A character device, such as flash memory.
    Characters,
}

/// An open and locked disk.
#[derive(Debug)]
pub struct RawDisk {
    file: File,
    kind: RawKind,
    size: AtomicU64,
    /// Present for direct disks. Held while blocks are read, changed and written, and while parts of blocks are zeroed.
    direct: Option<Mutex<()>>,
}

impl RawDisk {
    /// Creates a disk on an open, locked file or device. The guest sees `size` bytes, which must be whole blocks if the
    /// file is open for `direct` I/O.
    pub(super) fn new(file: File, kind: RawKind, direct: bool, size: u64) -> Self {
        RawDisk { file, kind, size: AtomicU64::new(size), direct: direct.then(Mutex::default) }
    }

    /// Prevents other threads from changing parts of blocks, on a direct disk.
    fn alone(&self) -> Option<MutexGuard<'_, ()>> {
        self.direct.as_ref().map(|lock| lock.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Does the same as `alone` for a range that the kernel changes; whole blocks conflict with no one and need no
    /// lock.
    fn alone_in(&self, offset: u64, len: u64) -> Option<MutexGuard<'_, ()>> {
        if (offset | len).is_multiple_of(DIRECT_BLOCK) { None } else { self.alone() }
    }

    fn discard_alone(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.kind {
            RawKind::File => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(&self.file, flags, offset, len)
            }
            RawKind::Blocks => block_range(&self.file, BLKDISCARD, offset, len),
            RawKind::Characters => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Executes a request that is not in whole blocks, using a buffer of whole blocks: `copy` copies between the
    /// guest's buffers and the request's part of the buffer.
    fn through_blocks(
        &self,
        len: u64,
        offset: u64,
        write: bool,
        copy: impl FnOnce(&mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let _alone = write.then(|| self.alone());
        let start = offset - offset % DIRECT_BLOCK;
        let end = (offset + len).next_multiple_of(DIRECT_BLOCK);
        let mut buffer = AlignedBuffer::new((end - start) as usize);
        let blocks = buffer.as_mut_slice();
        self.file.read_exact_at(blocks, start)?;
        let piece = blocks.get_mut((offset - start) as usize..(offset - start + len) as usize);
        copy(piece.ok_or(io::ErrorKind::InvalidInput)?)?;
        if write { self.file.write_all_at(blocks, start) } else { Ok(()) }
    }

    /// Executes such a request in pieces, so that the request's size does not determine our use of memory.
    fn piecewise(&self, buffers: &[RamSlice<'_>], mut offset: u64, write: bool) -> io::Result<()> {
        for buffer in buffers {
            let mut at = 0;
            while at < buffer.len() {
                let len = (buffer.len() - at).min(MAX_PIECE);
                let piece = buffer.subslice(at, len).map_err(io::Error::other)?;
                self.through_blocks(len as u64, offset, write, |bytes| {
                    if write {
                        piece.copy_to(bytes);
                    } else {
                        piece.copy_from(bytes);
                    }
                    Ok(())
                })?;
                at += len;
                offset += len as u64;
            }
        }
        Ok(())
    }

    #[cfg(test)]
    pub(crate) fn open(path: &std::path::Path, readonly: bool) -> Result<Self, super::image::Error> {
        super::image::open_raw(path, readonly, false)
    }
}

impl Disk for RawDisk {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }

    fn read(&self, buffers: &[RamSlice<'_>], offset: u64) -> io::Result<()> {
        if !self.takes(buffers, offset) {
            return self.piecewise(buffers, offset, false);
        }
        let result = whole(&self.file, buffers, offset, Direction::Read);
        // Even after an error, as some of the data may have arrived.
        for buffer in buffers {
            buffer.bitmap().mark_dirty(0, buffer.len());
        }
        result
    }

    fn write(&self, buffers: &[RamSlice<'_>], offset: u64) -> io::Result<()> {
        if !self.takes(buffers, offset) {
            return self.piecewise(buffers, offset, true);
        }
        whole(&self.file, buffers, offset, Direction::Write(0))
    }

    fn resize(&self, size: u64) -> io::Result<()> {
        if self.kind == RawKind::Characters {
            return Err(io::Error::other("the size of a character device cannot change"));
        }
        let now = (&self.file).seek(SeekFrom::End(0))?;
        if size > now && self.kind == RawKind::Blocks {
            return Err(io::Error::other(format!("the block device has only {now} bytes")));
        }
        if self.direct.is_some() && !size.is_multiple_of(DIRECT_BLOCK) {
            return Err(io::Error::other(format!("direct=on needs a multiple of {DIRECT_BLOCK}")));
        }
        if size > now {
            self.file.set_len(size)?;
        }
        self.size.store(size, Ordering::Relaxed);
        Ok(())
    }

    fn takes(&self, buffers: &[RamSlice<'_>], offset: u64) -> bool {
        let len: u64 = buffers.iter().map(|b| b.len() as u64).sum();
        let fits = |b: &RamSlice<'_>| (b.ptr_guard().as_ptr().addr() | b.len()).is_multiple_of(DIRECT_ADDRESS);
        self.direct.is_none() || (offset | len).is_multiple_of(DIRECT_BLOCK) && buffers.iter().all(fits)
    }

    fn flush(&self) -> io::Result<()> {
        match self.file.sync_data() {
            // Such a device holds nothing back.
            Err(e) if self.kind == RawKind::Characters && is_unsupported(&e) => Ok(()),
            result => result,
        }
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let _alone = self.alone_in(offset, len);
        self.discard_alone(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        let _alone = self.alone_in(offset, len);
        let quick = match self.kind {
            RawKind::File if may_unmap => self.discard_alone(offset, len),
            RawKind::File => fallocate(&self.file, FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, offset, len),
            RawKind::Blocks => block_range(&self.file, BLKZEROOUT, offset, len),
            RawKind::Characters => return write_zeros(&self.file, offset, len),
        };
        match quick {
            Err(e) if is_unsupported(&e) => write_zeros(&self.file, offset, len),
            result => result,
        }
    }
}

/// Transfers all of the buffers, or returns an error.
fn whole(file: &File, buffers: &[RamSlice<'_>], offset: u64, way: Direction) -> io::Result<()> {
    let (moved, result) = transfer(file, buffers, offset, way);
    result?;
    if moved < packet::len(buffers) {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file has become shorter"));
    }
    Ok(())
}

/// `_IO(0x12, 119)` and `_IO(0x12, 127)` of linux/fs.h; they take an offset and a length in bytes.
const BLKDISCARD: libc::Ioctl = 0x1277;
const BLKZEROOUT: libc::Ioctl = 0x127F;

#[allow(unsafe_code)]
fn block_range(file: &File, request: libc::Ioctl, offset: u64, len: u64) -> io::Result<()> {
    let range = [offset, len];
    // SAFETY: the descriptor is open; both requests read two u64 from `range` and nothing else.
    match unsafe { libc::ioctl(file.as_raw_fd(), request, range.as_ptr()) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn fallocate(file: &File, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    loop {
        match rustix::fs::fallocate(file, flags, offset, len) {
            Err(rustix::io::Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
}

/// Returns true if the file system or the device does not support the operation at all.
pub(crate) fn is_unsupported(e: &io::Error) -> bool {
    e.kind() == io::ErrorKind::Unsupported || matches!(e.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL))
}

/// Writes the zeros as data, for files and devices that offer no faster way.
fn write_zeros(file: &File, mut offset: u64, mut len: u64) -> io::Result<()> {
    let mut zeros = AlignedBuffer::new((64 << 10).min(len) as usize);
    let zeros = zeros.as_mut_slice();
    while len > 0 {
        let piece = &zeros[..len.min(zeros.len() as u64) as usize];
        file.write_all_at(piece, offset)?;
        offset += piece.len() as u64;
        len -= piece.len() as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::image::{self, ImageOptions, Overlay};
    use crate::memory::GuestRam;
    use std::path::{Path, PathBuf};

    fn image(dir: &tempfile::TempDir, name: &str, size: u64) -> PathBuf {
        let path = dir.path().join(name);
        File::create(&path).unwrap().set_len(size).unwrap();
        path
    }

    #[test]
    fn bytes_land_where_they_belong() {
        let dir = tempfile::tempdir().unwrap();
        let path = image(&dir, "a", 64 << 10);
        let disk = RawDisk::open(&path, false).unwrap();
        let ram = GuestRam::anonymous(1 << 20);
        let data: Vec<u8> = (0..2048u32).map(|i| (i % 251) as u8).collect();
        ram.write(0x1000, &data).unwrap();
        let cut = |base: u64| {
            [(0, 1), (1, 0), (1, 1000), (1001, 1047)].map(|(at, len)| ram.slice(base + at, len).unwrap()).to_vec()
        };
        disk.write(&cut(0x1000), 512).unwrap();
        disk.flush().unwrap();
        let mut back = vec![0; 2048];
        File::open(&path).unwrap().read_exact_at(&mut back, 512).unwrap();
        assert_eq!(back, data);
        disk.read(&cut(0x8000), 512).unwrap();
        ram.read(0x8000, &mut back).unwrap();
        assert_eq!(back, data);
        disk.read(&[], 0).unwrap();
    }

    #[test]
    fn more_buffers_than_one_call_takes() {
        let dir = tempfile::tempdir().unwrap();
        let disk = RawDisk::open(&image(&dir, "a", 1 << 20), false).unwrap();
        let ram = GuestRam::anonymous(1 << 20);
        let data: Vec<u8> = (0..3000u32).map(|i| (i % 251) as u8).collect();
        ram.write(0, &data).unwrap();
        let bytes = |base: u64| (0..3000).map(|i| ram.slice(base + i, 1).unwrap()).collect::<Vec<_>>();
        disk.write(&bytes(0), 7).unwrap();
        disk.read(&bytes(0x1_0000), 7).unwrap();
        let mut back = vec![0; 3000];
        ram.read(0x1_0000, &mut back).unwrap();
        assert_eq!(back, data);
    }

    #[test]
    fn a_file_that_shrank_is_an_error_not_a_loop() {
        let dir = tempfile::tempdir().unwrap();
        let path = image(&dir, "a", 4096);
        let disk = RawDisk::open(&path, false).unwrap();
        File::options().write(true).open(&path).unwrap().set_len(100).unwrap();
        let ram = GuestRam::anonymous(1 << 20);
        let error = disk.read(&[ram.slice(0, 512).unwrap()], 0).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_character_device_has_the_size_that_is_said() {
        let zero = |options: ImageOptions| image::open(&ImageOptions { path: "/dev/zero".into(), ..options });
        let disk = zero(ImageOptions { size: Some(1 << 20), ..ImageOptions::default() }).unwrap();
        assert_eq!(disk.size(), 1 << 20);
        let ram = GuestRam::anonymous(1 << 20);
        ram.write(0x1000, &[7; 4096]).unwrap();
        let buffer = [ram.slice(0x1000, 4096).unwrap()];
        disk.write(&buffer, (1 << 20) - 4096).unwrap();
        disk.flush().unwrap();
        disk.write_zeroes(0, 1 << 20, true).unwrap();
        assert!(is_unsupported(&disk.discard(0, 4096).unwrap_err()));
        assert!(disk.resize(2 << 20).is_err());
        disk.read(&buffer, 0).unwrap();
        let mut back = [7; 4096];
        ram.read(0x1000, &mut back).unwrap();
        assert_eq!(back, [0; 4096]);

        let file = tempfile::NamedTempFile::new().unwrap();
        let options = ImageOptions { path: file.path().into(), size: Some(4096), ..ImageOptions::default() };
        assert!(image::open(&options).map(drop).unwrap_err().to_string().ends_with("have their own"));
        let over = ImageOptions { size: Some(4096), overlay: Some(Overlay::Tmp), ..ImageOptions::default() };
        assert!(zero(over).map(drop).unwrap_err().to_string().contains("without overlay"));
        assert!(zero(ImageOptions { size: Some(100), ..ImageOptions::default() }).is_err());
    }

    #[test]
    fn what_is_no_disk_is_refused_without_waiting() {
        let dir = tempfile::tempdir().unwrap();
        // A pipe without a writer opens like a FIFO, and needs no mkfifo program: while a program is being started,
        // every descriptor of this process is open twice, and another test's file stays locked.
        let (pipe, _) = io::pipe().unwrap();
        let fifo = std::path::PathBuf::from(format!("/proc/self/fd/{}", pipe.as_raw_fd()));
        let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("socket")).unwrap();
        for (path, kind) in [
            (fifo.as_path(), "FIFO"),
            (dir.path(), "directory"),
            (Path::new("/dev/null"), "character device"),
            (&dir.path().join("socket"), "socket"),
        ] {
            for readonly in [false, true] {
                let error = RawDisk::open(path, readonly).unwrap_err().to_string();
                let hint = if kind == "character device" { ", or size= with the size of this device" } else { "" };
                let path = path.display();
                assert_eq!(error, format!("disk {path} is a {kind}; a regular file or a block device is needed{hint}"));
            }
        }
        let missing = RawDisk::open(&dir.path().join("none"), false).unwrap_err();
        assert_eq!(missing.to_string(), format!("cannot open disk {}", dir.path().join("none").display()));
        assert!(std::error::Error::source(&missing).unwrap().to_string().contains("No such file"));
    }

    #[test]
    fn sizes_are_whole_sectors() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(RawDisk::open(&image(&dir, "a", 1535), false).unwrap().size(), 1024);
        assert_eq!(RawDisk::open(&image(&dir, "b", 5 << 40), false).unwrap().size(), 5 << 40);
        for size in [0, 511] {
            let error = RawDisk::open(&image(&dir, "c", size), false).unwrap_err().to_string();
            assert!(error.ends_with(&format!("has {size} bytes, which is less than one sector of 512")), "{error}");
        }
    }

    #[test]
    fn a_writer_excludes_everybody_and_readers_share() {
        let dir = tempfile::tempdir().unwrap();
        let path = image(&dir, "a", 4096);
        let in_use = |readonly| RawDisk::open(&path, readonly).unwrap_err().to_string();
        let writer = RawDisk::open(&path, false).unwrap();
        assert_eq!(in_use(false), format!("disk {} is in use by another VM", path.display()));
        assert_eq!(in_use(true), format!("disk {} is in use by another VM, which writes to it", path.display()));
        drop(writer);
        let readers = [(); 2].map(|()| crate::backend::when_free(|| RawDisk::open(&path, true)));
        assert!(in_use(false).contains("in use"));
        drop(readers);
        crate::backend::when_free(|| RawDisk::open(&path, false));
    }

    #[test]
    fn direct_disks_take_every_piece() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = image(&dir, "a", 1 << 20);
        let disk = match super::super::image::open_raw(&path, false, true) {
            Ok(disk) => disk,
            Err(e) => panic!("{e}: the checkout must be on a file system with O_DIRECT"),
        };
        let ram = GuestRam::anonymous(1 << 20);
        let data: Vec<u8> = (0..40_960u32).map(|i| (i % 247) as u8).collect();
        ram.write(0, &data).unwrap();
        let slices =
            |pieces: &[(u64, u64)]| pieces.iter().map(|(at, len)| ram.slice(*at, *len).unwrap()).collect::<Vec<_>>();
        for (pieces, offset) in [
            (vec![(0, 4096), (4096, 8192)], 8192),
            (vec![(512, 512)], 100 * 512),
            (vec![(1, 511), (512, 1), (513, 2048)], 15 * 512),
            (vec![(3, 40_000), (7, 960)], 512),
        ] {
            let before = std::fs::read(&path).unwrap();
            let buffers = slices(&pieces);
            disk.write(&buffers, offset).unwrap();
            let mut expected = before;
            let bytes: Vec<u8> =
                pieces.iter().flat_map(|(at, len)| data[*at as usize..(at + len) as usize].to_vec()).collect();
            expected[offset as usize..offset as usize + bytes.len()].copy_from_slice(&bytes);
            assert!(std::fs::read(&path).unwrap() == expected, "{pieces:?} at {offset}");
            disk.read(&slices(&[(0x8_0001, bytes.len() as u64)]), offset).unwrap();
            let mut back = vec![0; bytes.len()];
            ram.read(0x8_0001, &mut back).unwrap();
            assert!(back == bytes, "{pieces:?} at {offset}");
        }
        disk.write_zeroes(512, 512, false).unwrap();
        assert_eq!(std::fs::read(&path).unwrap()[512..1024], [0; 512]);
        image(&dir, "odd", 4096 + 512);
        let odd = super::super::image::open_raw(&dir.path().join("odd"), false, true).unwrap_err().to_string();
        assert!(odd.contains("4608 bytes") && odd.contains("direct"), "{odd}");
    }

    #[test]
    fn zeros_beside_a_direct_write_stay_zeros() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let disk = super::super::image::open_raw(&image(&dir, "a", 8192), false, true).unwrap();
        let ram = GuestRam::anonymous(1 << 20);
        ram.write(0, &[7; 4096]).unwrap();
        let slice = |at, len| [ram.slice(at, len).unwrap()];
        let ended = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            // Another queue writes to the same block.
            scope.spawn(|| {
                while !ended.load(Ordering::Relaxed) {
                    disk.write(&slice(512, 512), 5 * 512).unwrap();
                }
            });
            let mut kept = true;
            for round in 0..200 {
                disk.write(&slice(0, 2048), 0).unwrap();
                match round % 2 {
                    0 => disk.write_zeroes(0, 2048, round % 4 == 0).unwrap(),
                    _ if disk.discard(0, 2048).is_ok() => {}
                    _ => continue,
                }
                disk.read(&slice(0x8000, 2048), 0).unwrap();
                let mut back = [0; 2048];
                ram.read(0x8000, &mut back).unwrap();
                kept &= back == [0; 2048];
            }
            ended.store(true, Ordering::Relaxed);
            assert!(kept, "old data came back");
        });
    }

    #[test]
    fn ranges_become_holes_and_zeros() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let path = image(&dir, "a", 1 << 20);
        std::fs::write(&path, vec![7; 1 << 20]).unwrap();
        let disk = RawDisk::open(&path, false).unwrap();
        let read = || std::fs::read(&path).unwrap();
        disk.write_zeroes(512, 1024, false).unwrap();
        let bytes = read();
        assert!(bytes[..512].iter().all(|&b| b == 7) && bytes[512..1536].iter().all(|&b| b == 0) && bytes[1536] == 7);
        let before = path.metadata().unwrap().blocks();
        disk.write_zeroes(64 << 10, 256 << 10, true).unwrap();
        assert!(read()[64 << 10..320 << 10].iter().all(|&b| b == 0));
        match disk.discard(512 << 10, 512 << 10) {
            Ok(()) => assert!(path.metadata().unwrap().blocks() <= before - 1000, "its space was given up"),
            Err(e) => assert!(is_unsupported(&e), "{e}"),
        }
        assert_eq!(read().len(), 1 << 20);
        // The slow way, for file systems that lack these operations.
        write_zeros(&disk.file, 100, 200_000).unwrap();
        assert!(read()[100..200_100].iter().all(|&b| b == 0));
        disk.discard(0, 0).unwrap();
    }
}
