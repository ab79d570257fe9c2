//! qcow2 images and copy-on-write overlays, by way of the imago crate: base images, compressed clusters, zero clusters.
//!
//! An overlay is a qcow2 image over the disk that the user named: what is written goes there, what was never written
//! is read from below, and the base is opened for reading only.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};

use imago::file::File as Storage;
use imago::format::PreallocateMode;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, StorageOpenOptions};

use rustix::fs::{CWD, OFlags, RenameFlags};
use rustix::io::Errno;

use super::image::{Error, Format, ImageOptions, Overlay, found_format, open_file};
use super::{AlignedBuffer, Disk, SECTOR};
use crate::memory::RamSlice;

/// How many images may lie below another.
const MAX_DEPTH: usize = 16;

/// A disk in a format that imago reads and writes.
pub struct Qcow2Disk {
    /// Discarding moves clusters, so nobody else may have looked up where they are.
    image: RwLock<FormatAccess<Storage>>,
    size: AtomicU64,
}

impl Qcow2Disk {
    /// Opens the image in a locked file. Base images are opened only if `trusted`.
    pub(super) fn open(file: File, options: &ImageOptions, trusted: bool) -> Result<Self, Error> {
        let ImageOptions { path, readonly, direct, .. } = options;
        let what = "it is no qcow2 image that can be used";
        let failed = |source| Error::Image { path: path.clone(), what, source };
        check(&file).map_err(failed)?;
        let storage = storage(file, path, !readonly, *direct).map_err(failed)?;
        let below = Below { trusted, direct: *direct, depth: 0 };
        Self::new(below.open(storage, path, Format::Qcow2, !readonly).map_err(failed)?, path)
    }

    fn new(image: FormatAccess<Storage>, path: &Path) -> Result<Self, Error> {
        let size = image.size() - image.size() % SECTOR;
        if size == 0 {
            return Err(Error::TooSmall { path: path.into(), size: image.size() });
        }
        Ok(Qcow2Disk { image: RwLock::new(image), size: size.into() })
    }
}

/// Opens the image of `options` with an overlay for what is written.
pub(super) fn over(options: &ImageOptions, overlay: &Overlay) -> Result<Qcow2Disk, Error> {
    let ImageOptions { path, direct, format, .. } = options;
    let failed = |what| move |source| Error::Image { path: path.clone(), what, source };
    let (mut file, _) = open_file(path, true, *direct)?;
    let found = found_format(&mut file, path, *format)?;
    check(&file).map_err(failed("it cannot be used as a base"))?;
    let base = storage(file, path, false, *direct).map_err(failed("its size cannot be found"))?;
    let below = Below { trusted: format.is_some(), direct: *direct, depth: 0 };
    let base = below.open(base, path, found, false).map_err(failed("it cannot be used as a base"))?;
    let (top, top_path) = match overlay {
        Overlay::Tmp => {
            let folder = std::env::temp_dir();
            (throw_away(&folder, base.size(), *direct)?, folder)
        }
        Overlay::File(top) => (overlay_file(options, top, found, base.size())?, top.clone()),
    };
    let failed = |source| Error::Image { path: top_path.clone(), what: "it is no overlay that can be used", source };
    let storage = storage(top, &top_path, true, *direct).map_err(failed)?;
    // The base is given, so nothing else is opened.
    let image = Qcow2::<Storage>::builder(storage).write(true).backing(Some(base));
    let image = image.open(DenyImplicitOpenGate::default()).map_err(failed)?;
    Qcow2Disk::new(FormatAccess::new(image), &top_path)
}

/// An open, locked overlay, which is made if it is not there.
fn overlay_file(options: &ImageOptions, path: &Path, format: Format, size: u64) -> Result<File, Error> {
    let ImageOptions { path: base, direct, .. } = options;
    let base = base.canonicalize().unwrap_or_else(|_| base.into());
    if !path.exists() {
        // A name that no other VM takes, nor one that was killed while it made this one.
        let mut new = path.as_os_str().to_owned();
        let cannot = |source| Error::Open { path: path.into(), hint: ": the overlay cannot be made", source };
        new.push(format!(".new.{:x}", rand().map_err(cannot)?));
        let new = Path::new(&new);
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).mode(0o600).open(new).map_err(cannot)?;
        // Beside and renamed, or a full disk would leave half an overlay under the name.
        let made = create(&file, new, size, Some((&base, format)))
            .and_then(|()| file.sync_all())
            .and_then(|()| give_name(new, path));
        let _ = std::fs::remove_file(new);
        match made {
            // Another VM was faster: it has the overlay, and this one will find it locked; or it has ended.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            made => made.map_err(cannot)?,
        }
    }
    let (file, _) = open_file(path, false, *direct)?;
    let failed = |source| Error::Image { path: path.into(), what: "it is no overlay that can be used", source };
    check(&file).map_err(failed)?;
    let look = storage(file.try_clone().map_err(failed)?, path, false, *direct).map_err(failed)?;
    let top = Qcow2::<Storage>::builder(look).backing(None).open(DenyImplicitOpenGate::default()).map_err(failed)?;
    match top.implicit_backing_file() {
        Some(found) if Path::new(found) == base => Ok(file),
        found => {
            let found = found.map_or("that is none", String::as_str).to_string();
            Err(Error::OtherBase { path: path.into(), found, base })
        }
    }
}

/// An overlay without a name.
fn throw_away(folder: &Path, size: u64, direct: bool) -> Result<File, Error> {
    let cannot = |hint| move |source| Error::Open { path: folder.into(), hint, source };
    let file = temporary_file(folder).map_err(cannot(": no room for its overlay"))?;
    create(&file, folder, size, None).map_err(cannot(": its overlay cannot be made"))?;
    if direct {
        // Not sooner: it is made in pieces that are no whole blocks.
        let flags = rustix::fs::fcntl_getfl(&file).map(|flags| flags | OFlags::DIRECT);
        let set = flags.and_then(|flags| rustix::fs::fcntl_setfl(&file, flags));
        set.map_err(|e| cannot(": its file system has no direct=on for the overlay; TMPDIR names another")(e.into()))?;
    }
    Ok(file)
}

/// Gives a file that is at `from` the name `to`, if nothing has that. It may be left at `from` too.
fn give_name(from: &Path, to: &Path) -> io::Result<()> {
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // Not every file system knows that.
        Err(Errno::INVAL | Errno::NOSYS) => std::fs::hard_link(from, to),
        result => Ok(result?),
    }
}

/// Makes an empty qcow2 image of `size` bytes in an empty file.
fn create(file: &File, path: &Path, size: u64, base: Option<(&Path, Format)>) -> io::Result<()> {
    let mut builder = Qcow2::<Storage>::create_builder(storage(file.try_clone()?, path, true, false)?).size(size);
    if let Some((path, format)) = base {
        let path = path.to_str().ok_or_else(|| io::Error::other("the path of its base is no UTF-8"))?;
        let format = if format == Format::Raw { "raw" } else { "qcow2" };
        builder = builder.backing(path.into(), format.into());
    }
    builder.create()
}

/// A file without a name.
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

fn storage(file: File, path: &Path, write: bool, direct: bool) -> io::Result<Storage> {
    Storage::from_open_file(file, StorageOpenOptions::new().filename(path).write(write).direct(direct))
}

/// Opens images with what they refer to.
struct Below {
    /// The user vouches for the image.
    trusted: bool,
    direct: bool,
    depth: usize,
}

impl Below {
    fn open(&self, file: Storage, path: &Path, format: Format, write: bool) -> io::Result<FormatAccess<Storage>> {
        // Nothing is opened for its name alone: what lies below is opened here. (Other files are refused by `check`.)
        let deny = DenyImplicitOpenGate::default();
        if format == Format::Raw {
            return Raw::builder(file).write(write).open(deny).map(FormatAccess::new);
        }
        let mut image = Qcow2::<Storage>::builder(file).write(write).backing(None).open(deny)?;
        if let Some(name) = image.implicit_backing_file() {
            let base = self.base(path, name, image.implicit_backing_format().map(String::as_str))?;
            image.set_backing(Some(base));
        }
        Ok(FormatAccess::new(image))
    }

    /// A base image. Of what format it is must be said: a raw one is some guest's to write, who could make it look like
    /// another that refers to any file of the host.
    fn base(&self, image: &Path, name: &str, format: Option<&str>) -> io::Result<FormatAccess<Storage>> {
        let path = &image.parent().unwrap_or(Path::new("")).join(name);
        let refused = |why| Err(io::Error::other(why));
        if !self.trusted {
            let path = path.display();
            return refused(format!("it refers to the base image {path}; say format=qcow2 if it may open that"));
        }
        let format = match format {
            Some("raw" | "file") => Format::Raw,
            Some("qcow2") => Format::Qcow2,
            Some(other) => return refused(format!("its base image {name} is {other}, neither raw nor qcow2")),
            None => {
                return refused(format!(
                    "{} does not say whether its base image is raw or qcow2, and a guest can make the one look like \
                     the other; 'qemu-img rebase -u -b {name} -F raw' (or qcow2) has it say so",
                    image.display()
                ));
            }
        };
        if self.depth >= MAX_DEPTH {
            return refused(format!("more than {MAX_DEPTH} images lie below each other, or it is its own base"));
        }
        let (file, _) = open_file(path, true, self.direct).map_err(io::Error::other)?;
        check(&file)?;
        Below { depth: self.depth + 1, ..*self }.open(storage(file, path, false, self.direct)?, path, format, false)
    }
}

/// Refuses images that need another file for their data, and those whose reference counts imago would look for without
/// end (docs/interop/qcow2.txt, "Header" and "Reference count table"). A file that is no qcow2 image is fine.
fn check(file: &File) -> io::Result<()> {
    const EXTERNAL_DATA: u64 = 1 << 2;
    let read = |offset| -> io::Result<[u8; 4096]> {
        let mut page = AlignedBuffer::new(4096);
        let _ = file.read_at(page.as_mut_slice(), offset)?;
        page.as_mut_slice().first_chunk().copied().ok_or_else(|| io::ErrorKind::InvalidData.into())
    };
    let header = read(0)?;
    let number = |at: usize| header.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes);
    if !header.starts_with(b"QFI\xFB") {
        return Ok(());
    }
    if number(0) as u32 >= 3 && number(72) & EXTERNAL_DATA != 0 {
        return Err(io::Error::other("its data is in another file, which is not supported"));
    }
    let table = number(48);
    let block = read(table - table % 4096)?;
    let at = (table % 4096) as usize;
    let first = block.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes);
    let end = file.metadata()?.len();
    if first & !0x1FF == 0 || file.metadata()?.is_file() && first >= end {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "its reference counts are broken"));
    }
    Ok(())
}

impl Disk for Qcow2Disk {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    fn resize(&self, size: u64) -> io::Result<()> {
        let image = self.image.read().unwrap_or_else(PoisonError::into_inner);
        if size > image.size() {
            image.resize_grow(size, PreallocateMode::None)?;
            image.flush()?;
        }
        self.size.store(size, Ordering::Relaxed);
        Ok(())
    }

    fn read(&self, buffers: &[RamSlice<'_>], offset: u64) -> io::Result<()> {
        let image = self.image.read().unwrap_or_else(PoisonError::into_inner);
        let (vector, _mapped) = IoVectorMut::from_volatile_slice(buffers);
        image.readv(vector, offset)
    }

    fn write(&self, buffers: &[RamSlice<'_>], offset: u64) -> io::Result<()> {
        let image = self.image.read().unwrap_or_else(PoisonError::into_inner);
        let (vector, _mapped) = IoVector::from_volatile_slice(buffers);
        image.writev(vector, offset)
    }

    fn flush(&self) -> io::Result<()> {
        let image = self.image.read().unwrap_or_else(PoisonError::into_inner);
        // First the tables from the cache into the file, then the file to the disk.
        image.flush()?;
        image.sync()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        // To zeros rather than to anything: over a base "anything" would be the base's old contents.
        self.image.write().unwrap_or_else(PoisonError::into_inner).discard_to_zero(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        if may_unmap {
            return self.discard(offset, len);
        }
        self.image.read().unwrap_or_else(PoisonError::into_inner).write_zeroes(offset, len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::image;
    use crate::memory::GuestRam;
    use proptest::prelude::*;
    use std::io::{Seek, SeekFrom, Write};

    const SIZE: u64 = 1 << 20;

    fn options(path: &Path) -> ImageOptions {
        ImageOptions { path: path.into(), ..ImageOptions::default() }
    }

    fn qcow2(path: &Path, size: u64, base: Option<(&Path, Format)>) {
        let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
        create(&file, path, size, base).unwrap();
    }

    fn write(disk: &dyn Disk, offset: u64, data: &[u8]) {
        let ram = GuestRam::anonymous(SIZE);
        ram.write(0, data).unwrap();
        let cut = data.len() as u64 / 3;
        let buffers = [ram.slice(0, cut).unwrap(), ram.slice(cut, data.len() as u64 - cut).unwrap()];
        disk.write(&buffers, offset).unwrap();
    }

    fn read(disk: &dyn Disk, offset: u64, len: usize) -> Vec<u8> {
        let ram = GuestRam::anonymous(SIZE);
        disk.read(&[ram.slice(0, len as u64).unwrap()], offset).unwrap();
        let mut data = vec![0; len];
        ram.read(0, &mut data).unwrap();
        data
    }

    fn error(options: &ImageOptions) -> String {
        let error = image::open(options).err().expect("it must not be opened");
        std::iter::successors(Some(&error as &dyn std::error::Error), |e| e.source())
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(": ")
    }

    #[test]
    fn what_is_written_is_there_the_next_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.img");
        qcow2(&path, SIZE, None);
        let disk = image::open(&options(&path)).unwrap();
        assert_eq!((disk.size(), disk.fd().is_none()), (SIZE, true));
        write(&*disk, 70_000 - 70_000 % 512, &[5; 4096]);
        write(&*disk, SIZE - 512, &[6; 512]);
        disk.flush().unwrap();
        assert!(error(&options(&path)).contains("in use by another VM"));
        drop(disk);
        let disk = crate::backend::when_free(|| image::open(&ImageOptions { readonly: true, ..options(&path) }));
        assert_eq!(read(&*disk, 70_000 - 70_000 % 512, 4096), [5; 4096]);
        assert_eq!(read(&*disk, SIZE - 512, 512), [6; 512]);
        assert_eq!(read(&*disk, 0, 512), [0; 512]);
    }

    #[test]
    fn ranges_become_zeros() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.img");
        qcow2(&path, SIZE, None);
        let disk = image::open(&options(&path)).unwrap();
        write(&*disk, 0, &[9; 512 << 10]);
        disk.discard(64 << 10, 128 << 10).unwrap();
        disk.write_zeroes(1024, 3072, true).unwrap();
        disk.write_zeroes(256 << 10, 512, false).unwrap();
        let data = read(&*disk, 0, 512 << 10);
        let zeros = |from: usize, to: usize| data[from..to].iter().all(|&b| b == 0);
        assert!(zeros(64 << 10, 192 << 10) && zeros(1024, 4096) && zeros(256 << 10, (256 << 10) + 512));
        assert!(data[..1024].iter().chain(&data[4096..64 << 10]).all(|&b| b == 9));
    }

    #[test]
    fn an_overlay_leaves_its_base_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (base, top) = (dir.path().join("base.img"), dir.path().join("top.qcow2"));
        let content: Vec<u8> = (0..SIZE as u32).map(|i| (i % 249) as u8).collect();
        std::fs::write(&base, &content).unwrap();
        for overlay in [Overlay::Tmp, Overlay::File(top.clone())] {
            let over = ImageOptions { overlay: Some(overlay), ..options(&base) };
            let disk = image::open(&over).unwrap();
            assert_eq!(read(&*disk, 512, 4096), content[512..512 + 4096]);
            write(&*disk, 1024, &[1; 512]);
            disk.discard(128 << 10, 64 << 10).unwrap();
            disk.flush().unwrap();
            let now = read(&*disk, 512, 2048);
            assert!(
                now[..512] == content[512..1024] && now[512..1024] == [1; 512] && now[1024..] == content[1536..2560]
            );
            assert_eq!(read(&*disk, 128 << 10, 512), [0; 512], "not what the base has there");
            assert_eq!(std::fs::read(&base).unwrap(), content);
            // Others may read the base meanwhile, and lay their own overlay over it; nobody may write to it.
            assert!(error(&options(&base)).contains("in use by another VM"));
            image::open(&ImageOptions { overlay: Some(Overlay::Tmp), ..options(&base) }).unwrap();
        }
        // The file is still there, and remembers.
        let again = ImageOptions { overlay: Some(Overlay::File(top.clone())), ..options(&base) };
        assert_eq!(read(&*image::open(&again).unwrap(), 1024, 512), [1; 512]);
        let left: Vec<_> = dir.path().read_dir().unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left.len(), 2, "{left:?}");
        // But not over something else.
        let other = dir.path().join("other.img");
        std::fs::write(&other, &content).unwrap();
        let message = error(&ImageOptions { path: other, ..again });
        assert!(message.contains("was made for the disk") && message.contains("base.img"), "{message}");
        std::fs::write(&top, "precious").unwrap();
        assert!(
            error(&ImageOptions { overlay: Some(Overlay::File(top.clone())), ..options(&base) }).contains("no overlay")
        );
        assert_eq!(std::fs::read(&top).unwrap(), b"precious");
    }

    #[test]
    fn an_overlay_is_made_once_however_many_want_it() {
        let dir = tempfile::tempdir().unwrap();
        let (base, top) = (dir.path().join("base.img"), dir.path().join("top.qcow2"));
        std::fs::write(&base, [0; 4096]).unwrap();
        let over = ImageOptions { overlay: Some(Overlay::File(top.clone())), ..options(&base) };
        let start = std::sync::Barrier::new(4);
        let results: Vec<_> = std::thread::scope(|scope| {
            let threads = [(); 4].map(|()| {
                scope.spawn(|| {
                    start.wait();
                    let disk = image::open(&over)?;
                    write(&*disk, 512, &[7; 512]);
                    Ok(disk)
                })
            });
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for e in results.iter().filter_map(|result: &Result<_, Error>| result.as_ref().err()) {
            assert!(matches!(e, Error::InUse { .. }), "{e}");
        }
        assert_eq!(results.iter().flatten().count(), 1);
        drop(results);
        let disk = crate::backend::when_free(|| image::open(&over));
        assert_eq!(read(&*disk, 512, 512), [7; 512], "what the one wrote");
        assert_eq!(dir.path().read_dir().unwrap().count(), 2, "nothing else is left");
        // What came first stays.
        assert_eq!(give_name(&base, &top).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert!(std::fs::read(&top).unwrap().starts_with(b"QFI"));
    }

    #[test]
    fn direct_is_for_all_of_an_images_files() {
        // On the file system of the checkout, which has O_DIRECT where a temporary folder may not.
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let (below, base, top) = (dir.path().join("below"), dir.path().join("base"), dir.path().join("top"));
        std::fs::write(&below, vec![3; SIZE as usize]).unwrap();
        qcow2(&base, SIZE, Some((&below, Format::Raw)));
        let options = ImageOptions { direct: true, format: Some(Format::Qcow2), ..options(&base) };
        let over = ImageOptions { overlay: Some(Overlay::File(top.clone())), ..options.clone() };
        let is_direct = |fd: &str| {
            let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap();
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim();
            i32::from_str_radix(flags, 8).unwrap() & libc::O_DIRECT != 0
        };
        for again in [false, true] {
            let disk = crate::backend::when_free(|| image::open(&over));
            let mut open = Vec::new();
            for entry in Path::new("/proc/self/fd").read_dir().unwrap().flatten() {
                if let Ok(file) = entry.path().read_link()
                    && file.starts_with(dir.path())
                {
                    assert!(is_direct(entry.file_name().to_str().unwrap()), "{}", file.display());
                    open.push(file);
                }
            }
            assert!([&below, &base, &top].iter().all(|file| open.contains(file)), "{open:?}");
            if !again {
                // Neither whole blocks nor on their bounds, nor in memory that is.
                write(&*disk, 512 * 7, &[5; 3 * 512]);
                write(&*disk, 512 * 200, &[6; 80 * 512]);
                disk.write_zeroes(512 * 8, 512, false).unwrap();
                disk.flush().unwrap();
            }
            let expected = [[3; 512], [5; 512], [0; 512], [5; 512], [3; 512]].concat();
            assert_eq!(read(&*disk, 512 * 6, 5 * 512), expected);
            assert_eq!(read(&*disk, 512 * 200, 81 * 512), [vec![6; 80 * 512], vec![3; 512]].concat());
        }
        let file = throw_away(dir.path(), SIZE, true).unwrap();
        assert!(is_direct(&std::os::fd::AsRawFd::as_raw_fd(&file).to_string()));
        check(&file).unwrap();
        let image = storage(file, dir.path(), true, true).unwrap();
        let image = Qcow2::<Storage>::builder(image).write(true).open(DenyImplicitOpenGate::default()).unwrap();
        let disk = Qcow2Disk::new(FormatAccess::new(image), dir.path()).unwrap();
        write(&disk, 512, &[8; 3 * 512]);
        assert_eq!(read(&disk, 0, 512 * 2), [[0; 512], [8; 512]].concat());
    }

    #[test]
    fn a_guest_cannot_have_files_opened_by_what_it_writes() {
        let dir = tempfile::tempdir().unwrap();
        let (secret, disk, own) = (dir.path().join("secret"), dir.path().join("disk"), dir.path().join("own"));
        std::fs::write(&secret, vec![42; 64 << 10]).unwrap();
        qcow2(&disk, SIZE, Some((&secret, Format::Raw)));
        let message = error(&options(&disk));
        assert!(message.contains("refers to the base image") && message.contains("say format=qcow2"), "{message}");
        // If the user says so, it is.
        let trusted = ImageOptions { format: Some(Format::Qcow2), ..options(&disk) };
        assert_eq!(read(&*image::open(&trusted).unwrap(), 0, 512), [42; 512]);
        // But only as what it is said to be, and that must be said: another guest could have written to it as raw bytes.
        let mut header = vec![0; 4096];
        let image = File::options().read(true).write(true).open(&disk).unwrap();
        image.read_exact_at(&mut header, 0).unwrap();
        let at = header.windows(4).position(|word| word == [0xE2, 0x79, 0x2A, 0xCA]).unwrap();
        image.write_all_at(&[1; 4], at as u64).unwrap();
        drop(image);
        let message = error(&trusted);
        assert!(message.contains("whether its base image") && message.contains("-F raw"), "{message}");
        // As raw bytes it is harmless anyway.
        let raw = ImageOptions { format: Some(Format::Raw), ..options(&disk) };
        assert_eq!(&read(&*image::open(&raw).unwrap(), 0, 4), b"QFI\xfb");
        // Its own base: bounded, not endless.
        qcow2(&own, SIZE, Some((&own, Format::Qcow2)));
        let own = ImageOptions { format: Some(Format::Qcow2), readonly: true, ..options(&own) };
        assert!(error(&own).contains("its own base"), "{}", error(&own));
    }

    #[test]
    fn broken_reference_counts_and_external_data_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        for (n, (at, bytes, why)) in [
            (65536, [0; 8], "reference counts are broken"),
            (65536, [0x40; 8], "reference counts are broken"),
            (48, [0x40; 8], ""),
            (72, [0, 0, 0, 0, 0, 0, 0, 4], "its data is in another file"),
        ]
        .into_iter()
        .enumerate()
        {
            let path = dir.path().join(n.to_string());
            qcow2(&path, SIZE, None);
            File::options().write(true).open(&path).unwrap().write_all_at(&bytes, at).unwrap();
            let message = error(&options(&path));
            assert!(message.contains(why) && message.contains("no qcow2 image that can be used"), "{message}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// An image with flipped bytes is refused or read, never the end of this process. (Written to, it may be that:
        /// where reference counts are broken further in, imago 0.2.6 looks for a free cluster without end.)
        #[test]
        fn broken_images_are_no_crash(flips in proptest::collection::vec((0u64..4 * 65536, any::<u8>()), 1..20)) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("a.img");
            qcow2(&path, SIZE, None);
            write(&*image::open(&options(&path)).unwrap(), 65536, &[3; 70_000 - 70_000 % 512]);
            let mut file = File::options().write(true).open(&path).unwrap();
            for (at, byte) in flips {
                // Mostly in the header, where the interesting numbers are.
                file.seek(SeekFrom::Start(if byte % 2 == 0 { at % 112 } else { at })).unwrap();
                file.write_all(&[byte]).unwrap();
            }
            drop(file);
            if let Ok(disk) = image::open(&ImageOptions { format: Some(Format::Qcow2), readonly: true, ..options(&path) }) {
                let ram = GuestRam::anonymous(SIZE);
                let end = disk.size().min(SIZE);
                let _ = disk.read(&[ram.slice(0, end).unwrap()], 0);
            }
        }
    }
}
