//! qcow2 images and copy-on-write overlays: base images, compressed clusters, zero clusters.
//!
//! An overlay is a qcow2 image over the disk that the user named: writes go to the overlay, data that was never written
//! is read from the base, and the base is opened only for reading.
//!
//! The imago crate reads and writes the format. It expects sound images, so `header` and `tables` check everything in
//! an image before imago gets it through `storage`; `zstd` unpacks what imago cannot. Guest memory may change at any
//! time, which a slice of bytes must not, so imago only sees copies of it.
//!
//! If another process changes an image in use, in spite of its lock, the guest may get wrong data and errors, and in
//! the worst case vireo ends; other files are never affected.

mod bases;
mod header;
mod storage;
mod tables;
#[cfg(test)]
mod tests;
mod zstd;

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use imago::format::PreallocateMode;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, Mapping};
use log::warn;
use rustix::fs::{CWD, OFlags, RenameFlags};
use rustix::io::Errno;

use super::image::{Error, Format, ImageOptions, Overlay, found_format, open_file};
use super::vectored::Direction;
use super::{AlignedBuffer, Disk, SECTOR, held};
use crate::memory::RamSlice;
pub use bases::bases;
use header::Header;
pub(super) use header::MAGIC;
use storage::{Checked, ImageFile};
use zstd::Zstd;

/// Maximum number of images below another.
const MAX_DEPTH: usize = 16;
/// Number of bytes of guest memory copied at a time. It is a multiple of the cluster size, or divides it.
const MAX_PIECE: usize = 256 << 10;

/// A disk in a format that imago reads and writes.
pub struct Qcow2Disk {
    /// Locked for writing while clusters are discarded: another thread must not use a cluster that it looked up before.
    image: RwLock<FormatAccess<ImageFile>>,
    /// True if writing needs the write lock as well, because it also moves clusters.
    exclusive: bool,
    size: AtomicU64,
    /// Unused buffers for copies of guest memory.
    spare: Mutex<Vec<AlignedBuffer>>,
}

impl Qcow2Disk {
    /// Opens the image in a locked file. Base images are opened only if `trusted`.
    pub(super) fn open(file: File, options: &ImageOptions, trusted: bool) -> Result<Self, Error> {
        let ImageOptions { path, readonly, direct, .. } = options;
        let failed = |source| Error::Image { path: path.clone(), what: "cannot be used", source };
        let below = Below { trusted, direct: *direct, depth: 0 };
        let image = Image::check(file, path, !readonly, *direct).map_err(failed)?;
        let exclusive = image.header.zstd;
        Self::new(below.over_base(image).map_err(failed)?, path, exclusive)
    }

    fn new(image: FormatAccess<ImageFile>, path: &Path, exclusive: bool) -> Result<Self, Error> {
        let size = image.size() - image.size() % SECTOR;
        if size == 0 {
            return Err(Error::TooSmall { path: path.into(), size: image.size() });
        }
        let spare = Mutex::default();
        Ok(Qcow2Disk { image: RwLock::new(image), exclusive, size: size.into(), spare })
    }

    fn shared(&self) -> RwLockReadGuard<'_, FormatAccess<ImageFile>> {
        self.image.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn alone(&self) -> RwLockWriteGuard<'_, FormatAccess<ImageFile>> {
        self.image.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `change` with the image; concurrently with other threads if the image allows it.
    fn change<T>(&self, change: impl FnOnce(&FormatAccess<ImageFile>) -> T) -> T {
        if self.exclusive { change(&self.alone()) } else { change(&self.shared()) }
    }

    /// Writes zeros like any other data.
    fn write_zeros(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        let mut zeros = AlignedBuffer::new(MAX_PIECE);
        while len > 0 {
            let now = len.min(MAX_PIECE as u64 - offset % MAX_PIECE as u64);
            let piece = zeros.as_mut_slice().get(..now as usize).unwrap_or_default();
            self.change(|image| image.writev(IoVector::from(piece), offset))?;
            (offset, len) = (offset + now, len - now);
        }
        Ok(())
    }

    /// Processes the buffers in pieces: `step` gets a buffer for the piece, the piece's offset on the disk, and its
    /// part of the guest's buffers.
    fn piecewise(
        &self,
        buffers: &[RamSlice<'_>],
        mut offset: u64,
        mut step: impl FnMut(&mut [u8], u64, Pieces<'_, '_>) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut left: usize = buffers.iter().map(RamSlice::len).sum();
        let spare = || self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        let mut buffer = spare().pop().unwrap_or_else(|| AlignedBuffer::new(MAX_PIECE));
        let mut from = 0;
        let mut result = Ok(());
        while left > 0 && result.is_ok() {
            // End pieces at multiples of MAX_PIECE, so that no cluster is written in two pieces.
            let len = left.min(MAX_PIECE - (offset % MAX_PIECE as u64) as usize);
            let piece = buffer.as_mut_slice().get_mut(..len).unwrap_or_default();
            result = step(piece, offset, Pieces { buffers, skip: from });
            (from, left, offset) = (from + len, left - len, offset + len as u64);
        }
        spare().push(buffer);
        result
    }
}

/// Guest buffers without their first `skip` bytes.
#[derive(Clone, Copy)]
struct Pieces<'a, 'b> {
    buffers: &'a [RamSlice<'b>],
    skip: usize,
}

impl<'a, 'b> Pieces<'a, 'b> {
    /// Returns the same buffers without their next `len` bytes.
    fn after(self, len: usize) -> Pieces<'a, 'b> {
        Pieces { skip: self.skip + len, ..self }
    }

    /// Returns the next `len` bytes, which must exist.
    fn parts(self, mut len: usize) -> io::Result<Vec<RamSlice<'b>>> {
        let (mut skip, mut parts) = (self.skip, Vec::new());
        for buffer in self.buffers {
            let here = skip.min(buffer.len());
            skip -= here;
            let now = (buffer.len() - here).min(len);
            len -= now;
            if now > 0 {
                parts.push(buffer.subslice(here, now).map_err(io::Error::other)?);
            }
        }
        Ok(parts)
    }

    /// Moves as many of the next `len` bytes as lie unchanged in files, directly between these and guest memory. Returns
    /// their number; the driver must move the rest: clusters of zeros, compressed ones, and ones to allocate.
    fn lend(self, image: &FormatAccess<ImageFile>, len: usize, offset: u64, way: Direction) -> io::Result<usize> {
        let mut done = 0;
        while done < len {
            let (mapping, mapped) = image.get_mapping(offset + done as u64, (len - done) as u64)?;
            let Mapping::Raw { storage, offset, writable, .. } = mapping else { break };
            let now = (len - done).min(usize::try_from(mapped).unwrap_or(usize::MAX));
            let may = writable || matches!(way, Direction::Read);
            if now == 0 || !may || !storage.transfer(&self.after(done).parts(now)?, offset, way)? {
                break;
            }
            done += now;
        }
        Ok(done)
    }

    /// Calls `copy` for each guest buffer with the bytes that are copied to or from it.
    fn beside(&self, bytes: &mut [u8], copy: impl Fn(&RamSlice<'b>, &mut [u8])) -> io::Result<()> {
        let (mut skip, mut rest) = (self.skip, bytes);
        for buffer in self.buffers {
            let here = skip.min(buffer.len());
            skip -= here;
            let len = (buffer.len() - here).min(rest.len());
            let (now, then) = rest.split_at_mut(len);
            copy(&buffer.subslice(here, len).map_err(io::Error::other)?, now);
            rest = then;
        }
        Ok(())
    }
}

/// An image whose header and tables were checked.
struct Image<'a> {
    header: Header,
    file: File,
    checked: Checked,
    path: &'a Path,
    write: bool,
    direct: bool,
}

impl<'a> Image<'a> {
    fn check(file: File, path: &'a Path, write: bool, direct: bool) -> io::Result<Self> {
        let end = (&file).seek(SeekFrom::End(0))?;
        let header = Header::read(&file, path, end, write)?;
        let mut pieces = tables::check(&file, &header, end, write).map_err(|e| match e.kind() {
            io::ErrorKind::InvalidData => {
                io::Error::other(format!("{e}; 'qemu-img check -r all {}' may repair it", path.display()))
            }
            _ => e,
        })?;
        pieces.push((0, header.served()));
        Ok(Image { header, file, checked: Checked::new(pieces), path, write, direct })
    }

    /// Opens the image over `base`, if there is one.
    fn open(self, base: Option<FormatAccess<ImageFile>>) -> io::Result<FormatAccess<ImageFile>> {
        let Image { header, file, checked, path, write, direct } = self;
        if write && header.autoclear != 0 {
            clear_autoclear(&file, path)?;
        }
        let storage = ImageFile::new(file.try_clone()?, path, write, direct, checked.clone())?;
        // The base is passed in, so imago opens no other file.
        let image = Qcow2::<ImageFile>::builder(storage).write(write).backing(base);
        let image = image.open(DenyImplicitOpenGate::default())?;
        checked.give_up();
        Ok(match header.zstd {
            true => FormatAccess::new(Zstd::new(image, file, header.cluster_bits)),
            false => FormatAccess::new(image),
        })
    }
}

/// Clears the bits of features whose data becomes invalid when a program without these features writes, as we will.
fn clear_autoclear(file: &File, path: &Path) -> io::Result<()> {
    const AUTOCLEAR: u64 = 88;
    warn!(
        "{}: writing to it invalidates its dirty bitmaps and other data that vireo does not maintain",
        path.display()
    );
    write_at(file, AUTOCLEAR, &[0; 8])?;
    file.sync_data()
}

/// Writes bytes within a file that may be open for direct I/O. No other thread may write to the file. If the file ends
/// within a block, it is extended to the end of that block.
fn write_at(file: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
    if !rustix::fs::fcntl_getfl(file)?.contains(OFlags::DIRECT) {
        return file.write_all_at(bytes, offset);
    }
    const BLOCK: u64 = 4096;
    let before = (offset % BLOCK) as usize;
    let len = (before + bytes.len()).next_multiple_of(BLOCK as usize);
    let around = read_at(file, offset - before as u64, len)?;
    let mut buffer = AlignedBuffer::new(len);
    buffer.as_mut_slice().copy_from_slice(&around);
    if let Some(target) = buffer.as_mut_slice().get_mut(before..before + bytes.len()) {
        target.copy_from_slice(bytes);
    }
    file.write_all_at(buffer.as_mut_slice(), offset - before as u64)
}

/// Reads bytes of a file that may be open for direct I/O; bytes past its end are zeros.
fn read_at(file: &File, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    const BLOCK: u64 = 4096;
    let before = (offset % BLOCK) as usize;
    let mut buffer = AlignedBuffer::new((before + len).next_multiple_of(BLOCK as usize));
    let bytes = buffer.as_mut_slice();
    let mut done = 0;
    while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset - before as u64 + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            // EINVAL: the file ends within the block just read, so this offset is not aligned.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) && done % 512 != 0 => break,
            Err(e) => return Err(e),
        }
    }
    Ok(bytes.get(before..before + len).unwrap_or_default().to_vec())
}

const NO_OVERLAY: &str = "cannot be used as an overlay";

/// Opens the image of `options` with an overlay that receives all writes.
pub(super) fn over(options: &ImageOptions, overlay: &Overlay) -> Result<Qcow2Disk, Error> {
    let ImageOptions { path, direct, format, .. } = options;
    let failed = |what, source| Error::Image { path: path.clone(), what, source };
    let (file, _) = open_file(path, true, *direct)?;
    let found = found_format(&file, path, *format, false)?;
    let below = Below { trusted: format.is_some(), direct: *direct, depth: 0 };
    let base = below.open(file, path, found).map_err(|source| failed("cannot be used as a base", source))?;
    let (top, top_path) = match overlay {
        Overlay::Tmp => {
            let folder = std::env::temp_dir();
            (throw_away(&folder, base.size(), *direct)?, folder)
        }
        Overlay::File(top) => (overlay_file(options, top, found, base.size())?, top.clone()),
    };
    let failed = |source| Error::Image { path: top_path.clone(), what: NO_OVERLAY, source };
    let image = Image::check(top, &top_path, true, *direct).map_err(failed)?;
    let exclusive = image.header.zstd;
    Qcow2Disk::new(image.open(Some(base)).map_err(failed)?, &top_path, exclusive)
}

/// Opens and locks an overlay; creates it if it is missing.
fn overlay_file(options: &ImageOptions, path: &Path, format: Format, size: u64) -> Result<File, Error> {
    let ImageOptions { path: base, direct, .. } = options;
    let base = base.canonicalize().unwrap_or_else(|_| base.into());
    if !path.exists() {
        // A name that no other VM uses, and that no VM left behind when it was killed during this step.
        let mut new = path.as_os_str().to_owned();
        let cannot = |source| Error::Open { path: path.into(), hint: ": cannot create the overlay", source };
        new.push(format!(".new.{:x}", rand().map_err(cannot)?));
        let new = Path::new(&new);
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).mode(0o600).open(new).map_err(cannot)?;
        // Create the file beside `path` and rename it; otherwise a full disk would leave half an overlay at `path`.
        let made = create(&file, new, size, Some((&base, format)))
            .and_then(|()| file.sync_all())
            .and_then(|()| give_name(new, path));
        let _ = std::fs::remove_file(new);
        match made {
            // Another VM was faster. Either it holds the overlay, which is then found locked below, or it has ended.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            made => made.map_err(cannot)?,
        }
    }
    let (file, _) = open_file(path, false, *direct)?;
    held::keep_new(path, &file);
    let failed = |source| Error::Image { path: path.into(), what: NO_OVERLAY, source };
    let end = (&file).seek(SeekFrom::End(0)).map_err(failed)?;
    let top = Header::read(&file, path, end, true).map_err(failed)?;
    match top.base {
        Some(found) if Path::new(&found.name) == base => Ok(file),
        found => {
            let found = found.map_or("(none)".into(), |found| found.name);
            Err(Error::OtherBase { path: path.into(), found, base })
        }
    }
}

/// Creates an overlay without a name, which vanishes when it is closed.
fn throw_away(folder: &Path, size: u64, direct: bool) -> Result<File, Error> {
    let cannot = |why| move |source| Error::Temporary { folder: folder.into(), why, source };
    let file = temporary_file(folder).map_err(cannot(""))?;
    create(&file, folder, size, None).map_err(cannot(""))?;
    if direct {
        // Set only now: creation writes pieces that are not whole blocks.
        let flags = rustix::fs::fcntl_getfl(&file).map(|flags| flags | OFlags::DIRECT);
        let set = flags.and_then(|flags| rustix::fs::fcntl_setfl(&file, flags));
        set.map_err(|e| cannot(": its file system does not support direct=on")(e.into()))?;
    }
    Ok(file)
}

/// Renames the file `from` to `to`, unless `to` exists. The file may remain at `from` too.
fn give_name(from: &Path, to: &Path) -> io::Result<()> {
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // Not every file system supports RENAME_NOREPLACE.
        Err(Errno::INVAL | Errno::NOSYS) => std::fs::hard_link(from, to),
        result => Ok(result?),
    }
}

/// Creates an empty qcow2 image of `size` bytes in an empty file.
fn create(file: &File, path: &Path, size: u64, base: Option<(&Path, Format)>) -> io::Result<()> {
    let mut builder = Qcow2::<ImageFile>::create_builder(file_of(file.try_clone()?, path, true, false)?).size(size);
    if let Some((path, format)) = base {
        let path = path.to_str().ok_or_else(|| io::Error::other("the path of its base is not UTF-8"))?;
        let format = if format == Format::Raw { "raw" } else { "qcow2" };
        builder = builder.backing(path.into(), format.into());
    }
    builder.create()
}

/// Creates a file without a name.
fn temporary_file(folder: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    match options.clone().custom_flags(libc::O_TMPFILE).open(folder) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::ENOENT)) => {
            let name = folder.join(format!("vireo-overlay-{}-{:x}", std::process::id(), rand()?));
            let file = options.create_new(true).open(&name)?;
            std::fs::remove_file(&name)?;
            Ok(file)
        }
        result => result,
    }
}

fn rand() -> io::Result<u64> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(u64::from_le_bytes(bytes))
}

/// Wraps a file without checked pieces: a raw or empty file has nothing to be checked.
fn file_of(file: File, path: &Path, write: bool, direct: bool) -> io::Result<ImageFile> {
    ImageFile::new(file, path, write, direct, Checked::default())
}

/// Opens images that are only read, and the images that they refer to.
struct Below {
    /// True if the user vouches for the image.
    trusted: bool,
    direct: bool,
    depth: usize,
}

impl Below {
    fn open(&self, file: File, path: &Path, format: Format) -> io::Result<FormatAccess<ImageFile>> {
        if format == Format::Raw {
            let file = file_of(file, path, false, self.direct)?;
            return Raw::builder(file).open(DenyImplicitOpenGate::default()).map(FormatAccess::new);
        }
        self.over_base(Image::check(file, path, false, self.direct)?)
    }

    /// Opens an image, writable or not, over its base. Only this code opens a file because an image names it.
    fn over_base(&self, image: Image<'_>) -> io::Result<FormatAccess<ImageFile>> {
        let base = match &image.header.base {
            Some(base) => Some(self.base(image.path, base)?),
            None => None,
        };
        image.open(base)
    }

    /// Opens a base image. The referring image must state the base's format: a guest may have written to a raw base,
    /// and could make it look like another format that refers to any file of the host.
    fn base(&self, image: &Path, base: &header::Base) -> io::Result<FormatAccess<ImageFile>> {
        let name = &base.name;
        let path = &bases::path_of(image, name);
        let refused = |why| Err(io::Error::other(why));
        if !self.trusted {
            let path = path.display();
            return refused(format!("it refers to the base image {path}; add format=qcow2 to allow that"));
        }
        let format = match base.format.as_deref() {
            Some("raw" | "file") => Format::Raw,
            Some("qcow2") => Format::Qcow2,
            Some(other) => {
                return refused(format!(
                    "its base image {name} has the format {other:?}, but only raw and qcow2 are supported"
                ));
            }
            None => {
                return refused(format!(
                    "{} does not say whether its base image is raw or qcow2, and a guest can make one look like the \
                     other; 'qemu-img rebase -u -b {name} -F raw' (or qcow2) records the format",
                    image.display()
                ));
            }
        };
        if self.depth >= MAX_DEPTH {
            return refused(format!("it has more than {MAX_DEPTH} base images below each other, or is its own base"));
        }
        let failed =
            |e: io::Error| io::Error::new(e.kind(), format!("its base image {} cannot be opened: {e}", path.display()));
        // Already kept, unless the name has changed since the guest was first started.
        held::keep_base(image, path).map_err(failed)?;
        let (file, _) = open_file(path, true, self.direct).map_err(|error| match error {
            Error::Open { source, .. } => failed(source),
            error => io::Error::other(format!("its base image: {error}")),
        })?;
        let below = Below { depth: self.depth + 1, ..*self };
        let opened = below.open(file, path, format);
        opened.map_err(|e| match self.depth {
            0 => io::Error::new(e.kind(), format!("its base image {}: {e}", path.display())),
            _ => e,
        })
    }
}

impl Disk for Qcow2Disk {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    fn resize(&self, size: u64) -> io::Result<()> {
        self.change(|image| {
            if size > image.size() {
                image.resize_grow(size, PreallocateMode::None)?;
                image.flush()?;
            }
            self.size.store(size, Ordering::Relaxed);
            Ok(())
        })
    }

    fn read(&self, buffers: &[RamSlice<'_>], offset: u64) -> io::Result<()> {
        self.piecewise(buffers, offset, |bytes, offset, pieces| {
            let image = self.shared();
            let done = pieces.lend(&image, bytes.len(), offset, Direction::Read)?;
            let (bytes, pieces) = (bytes.get_mut(done..).unwrap_or_default(), pieces.after(done));
            if bytes.is_empty() {
                return Ok(());
            }
            image.readv(IoVectorMut::from(&mut *bytes), offset + done as u64)?;
            pieces.beside(bytes, |buffer, bytes| buffer.copy_from(bytes))
        })
    }

    fn write(&self, buffers: &[RamSlice<'_>], offset: u64) -> io::Result<()> {
        self.piecewise(buffers, offset, |bytes, offset, pieces| {
            // Where writing moves clusters, one that was looked up may be another's by now.
            let lend = || pieces.lend(&self.shared(), bytes.len(), offset, Direction::Write(0));
            let done = if self.exclusive { 0 } else { lend()? };
            let (bytes, pieces) = (bytes.get_mut(done..).unwrap_or_default(), pieces.after(done));
            let offset = offset + done as u64;
            if bytes.is_empty() {
                return Ok(());
            }
            pieces.beside(bytes, |buffer, bytes| _ = buffer.copy_to(bytes))?;
            self.change(|image| image.writev(IoVector::from(&*bytes), offset))
        })
    }

    fn flush(&self) -> io::Result<()> {
        let image = self.shared();
        // First write the cached tables to the file, then the file to the disk.
        image.flush()?;
        image.sync()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        // Discard to zeros, not to arbitrary data: over a base, the base's old contents could reappear.
        self.alone().discard_to_zero(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        if may_unmap {
            return self.discard(offset, len);
        }
        // Alone: a cluster may become one of zeros, and another thread must not write to where its data was.
        let result = self.alone().write_zeroes(offset, len);
        match result {
            // Version 2 has no zero clusters.
            Err(e) if e.kind() == io::ErrorKind::Unsupported => self.write_zeros(offset, len),
            result => result,
        }
    }
}
