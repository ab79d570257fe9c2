//! Cache of unpacked kernels, kept from one boot to the next.
//!
//! The directory belongs to the user and holds two kinds of file, each of which appears complete or not at all:
//!
//! - `k-<size>-<hash>`: an unpacked kernel (`kernel_file.rs`), named by size and BLAKE3 hash of the user's file.
//! - `s-<device>-<inode>`: the state of a user's file when it was last examined: size, times, key of its content. As in
//!   git's index, a file that changed within the last seconds is not recorded, because it could change again
//!   undetected.
//!
//! So a warm boot neither reads nor hashes the user's file. A first boot does not wait for a hash either: a file is
//! hashed before its guest starts only if a kernel of exactly the same size is in the cache, because the file may be a
//! copy of it. A kernel is added to the cache while its guest runs ([`super::keep`]), by one process at a time.
//!
//! The directory is held open from the start, and everything in it is accessed through its descriptor: a guest that can
//! write to the directory's parent cannot replace the directory by a link that vireo would follow.
//!
//! Nothing is synced to disk: a file that a power failure damaged is detected by its checksum, which is verified once
//! per boot of the host (`s-` files record that, too). A kernel that a guest has mapped is never changed: eviction and
//! replacement unlink the file. A failure in the cache costs time, but never makes a boot fail.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::BootMode;
use super::image::{Image, ImageInfo};
use super::kaslr::{self, Relocations};
use super::kernel;
use super::kernel_file::{
    HEADER, Header, checksum, chunks, damaged, for_each_block, read_header, write_data, write_header,
};
use super::source::{Data, ours, safe_parent};
use crate::layout::PAGE_SIZE;

/// Total size of all kernels in the cache, by default.
const LIMIT: u64 = 1 << 30;
/// Number of `s-` files that are kept.
const SOURCES_MAX: usize = 256;
/// Sizes of files that are cached: smaller files are not worth it, larger ones are not kernels.
const SOURCE_SIZES: std::ops::Range<u64> = (64 << 10)..(1 << 30);
/// Age below which a file's times do not reliably identify its content. FAT has a resolution of 2 seconds.
const SETTLE: Duration = Duration::from_secs(3);
/// Age from which an unfinished file counts as abandoned.
const ABANDONED: Duration = Duration::from_secs(3600);
/// Interval in which the time of last use is updated.
const TOUCH: Duration = Duration::from_secs(600);

/// The cache's directory and limits.
#[derive(Debug)]
pub struct Cache {
    /// Path by which the directory was opened.
    dir: PathBuf,
    held: File,
    limit: u64,
    settle: Duration,
    /// Part of the names of incomplete files. Process ids would not do: they repeat in other pid namespaces that share
    /// the directory; random numbers do not.
    token: u64,
}

/// Identity of one state of a file, available without reading its content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SourceId {
    dev: u64,
    ino: u64,
    size: u64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

/// The content of an `s-` file.
#[derive(Serialize, Deserialize)]
struct Source {
    id: SourceId,
    key: String,
    /// Id of the host boot in which the kernel file was written or its checksum verified.
    verified: String,
}

impl SourceId {
    fn of(file: &File) -> io::Result<SourceId> {
        let m = file.metadata()?;
        let (mtime, ctime) = ((m.mtime(), m.mtime_nsec()), (m.ctime(), m.ctime_nsec()));
        Ok(SourceId { dev: m.dev(), ino: m.ino(), size: m.size(), mtime, ctime })
    }

    /// Returns the time until the file's times reliably reveal any later change.
    fn settles_in(&self, settle: Duration) -> Duration {
        let (secs, nanos) = self.mtime.max(self.ctime);
        let changed = Duration::new(secs.max(0) as u64, nanos.clamp(0, 999_999_999) as u32);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        changed.saturating_add(settle).saturating_sub(now)
    }

    fn settled(&self, settle: Duration) -> bool {
        self.settles_in(settle).is_zero()
    }
}

impl Cache {
    /// Returns the user's own cache: `$XDG_CACHE_HOME/vireo` or `~/.cache/vireo`. Returns None if there is no place for
    /// it that other users cannot write to.
    pub fn of_user() -> Option<Cache> {
        let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let base = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
        match Cache::at(base.join("vireo")) {
            Ok(cache) => Some(cache),
            Err(e) => {
                log::info!("kernels are not cached: {}: {e}", base.join("vireo").display());
                None
            }
        }
    }

    /// Opens the cache in `dir`, which is created if it does not exist. The directory must belong to us alone, and its
    /// parent must be safe: another user could replace a kernel, or replace the directory by a link.
    pub fn at(dir: PathBuf) -> io::Result<Cache> {
        if !fs::symlink_metadata(&dir).is_ok_and(|m| m.is_dir()) {
            let missing = dir.ancestors().skip(1).find(|parent| parent.exists());
            safe_parent(missing.unwrap_or(Path::new("/")))?;
            DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
        }
        safe_parent(dir.parent().unwrap_or(Path::new("/")))?;
        let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
        let held = OpenOptions::new().read(true).custom_flags(flags).open(&dir)?;
        Cache::in_held(dir, held)
    }

    /// Opens a cache in the open directory `held`, which must belong to us alone. `dir` is its name, for messages.
    pub fn in_held(dir: PathBuf, held: File) -> io::Result<Cache> {
        let metadata = held.metadata()?;
        ours(&metadata)?;
        if !metadata.is_dir() {
            return Err(io::Error::from(io::ErrorKind::NotADirectory));
        }
        let token = u64::from_le_bytes(kaslr::random().map_err(io::Error::other)?);
        Ok(Cache { dir, held, limit: LIMIT, settle: SETTLE, token })
    }

    /// Returns the path by which the directory was opened, and its descriptor.
    pub fn dir(&self) -> (&Path, &File) {
        (&self.dir, &self.held)
    }

    /// Returns a path to the held directory that stays valid if the directory is renamed or replaced.
    fn place(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.held.as_raw_fd()).into()
    }

    /// Returns whether a file of `size` bytes can be a kernel that is worth keeping.
    pub fn may_keep(size: u64) -> bool {
        SOURCE_SIZES.contains(&size)
    }

    /// Finds the unpacked form of `source`.
    pub fn find(&self, source: &File) -> Option<Image> {
        let id = SourceId::of(source).ok().filter(|id| Cache::may_keep(id.size))?;
        let boot = host_boot();
        let known = self.read_source(&id);
        let verified = known.as_ref().is_some_and(|known| !boot.is_empty() && known.verified == boot);
        let key = match known {
            Some(known) => known.key,
            None if self.has_size(id.size) => key_of(source, id.size).ok()?,
            None => return None,
        };
        match self.open(&key, !verified) {
            Ok(image) => {
                if !verified {
                    self.record(source, &id, &key, boot);
                }
                Some(image)
            }
            Err(e) => {
                if e.kind() != io::ErrorKind::NotFound {
                    log::debug!("cached kernel {key}: {e}");
                    let _ = fs::remove_file(self.kernel_path(&key));
                }
                None
            }
        }
    }

    /// Returns the time until [`Cache::keep`] can keep `source`.
    pub fn settles_in(&self, source: &File) -> io::Result<Duration> {
        Ok(SourceId::of(source)?.settles_in(self.settle))
    }

    /// Unpacks `source` and keeps it, unless it is already in the cache. Waits for other processes that are adding a
    /// kernel.
    pub fn keep(&self, source: &File) -> io::Result<()> {
        let id = SourceId::of(source)?;
        if !Cache::may_keep(id.size) || !id.settled(self.settle) {
            return Err(io::Error::other("it has just changed, or its size is not that of a kernel"));
        }
        // Several simultaneous first boots of a kernel unpack it only once. On a file system without locks, they only
        // lose time. The lock needs its own descriptor: the held one may be shared with another process, which would
        // then share the lock.
        let directory = File::open(self.place())?;
        let _ = rustix::fs::flock(&directory, rustix::fs::FlockOperation::LockExclusive);
        if self.find(source).is_some() {
            return Ok(());
        }
        let key = key_of(source, id.size)?;
        let data = Data::File(source.try_clone()?, id.size);
        let image = kernel::examine(data, BootMode::Auto).map_err(io::Error::other)?;
        self.write_kernel(&key, &image, source, &id)?;
        self.record(source, &id, &key, host_boot());
        self.evict(&key);
        Ok(())
    }

    /// Removes the files that this `Cache` has not completed, when the process ends in the middle of [`Cache::keep`].
    pub fn abandon(&self) {
        let prefix = self.temporary("");
        for entry in fs::read_dir(self.place()).into_iter().flatten().flatten() {
            if entry.path().as_os_str().as_bytes().starts_with(prefix.as_os_str().as_bytes()) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    fn temporary(&self, number: &str) -> PathBuf {
        self.place().join(format!("t-{:x}-{number}", self.token))
    }

    /// Returns whether the cache has a kernel that was made from a file of this size.
    fn has_size(&self, size: u64) -> bool {
        let prefix = format!("k-{size:x}-");
        let mut names = fs::read_dir(self.place()).into_iter().flatten().flatten().map(|entry| entry.file_name());
        names.any(|name| name.as_bytes().starts_with(prefix.as_bytes()))
    }

    fn kernel_path(&self, key: &str) -> PathBuf {
        self.place().join(format!("k-{key}"))
    }

    fn source_path(&self, id: &SourceId) -> PathBuf {
        self.place().join(format!("s-{:x}-{:x}", id.dev, id.ino))
    }

    fn read_source(&self, id: &SourceId) -> Option<Source> {
        let (file, len) = self.open_own(&self.source_path(id)).ok()?;
        let mut text = vec![0; len.min(4096) as usize];
        file.read_exact_at(&mut text, 0).ok()?;
        let source: Source = serde_json::from_slice(&text).ok()?;
        // The key is used as part of a file name.
        let good_key = source.key.len() < 100 && source.key.bytes().all(|b| b == b'-' || b.is_ascii_hexdigit());
        (source.id == *id && good_key).then_some(source)
    }

    /// Records that `source` has the content `key`, if its times reliably reveal a later change.
    fn record(&self, source: &File, id: &SourceId, key: &str, verified: String) {
        if !id.settled(self.settle) || SourceId::of(source).ok().as_ref() != Some(id) {
            return;
        }
        let record = Source { id: id.clone(), key: key.to_string(), verified };
        let text = serde_json::to_vec(&record).unwrap_or_default();
        if let Err(e) = self.write(&self.source_path(id), |file| file.write_all_at(&text, 0)) {
            log::debug!("cannot record a kernel's identity: {e}");
        }
    }

    /// Opens one of the cache's own files: a regular file that no other user can write to.
    fn open_own(&self, path: &Path) -> io::Result<(File, u64)> {
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
        let metadata = file.metadata()?;
        ours(&metadata)?;
        if !metadata.is_file() {
            return Err(damaged("not a file"));
        }
        Ok((file, metadata.size()))
    }

    fn open(&self, key: &str, verify: bool) -> io::Result<Image> {
        let (file, len) = self.open_own(&self.kernel_path(key))?;
        let header = read_header(&file)?;
        if header.key != key || header.len != len || !header.is_sound() {
            return Err(damaged("bad header or length"));
        }
        if verify && checksum(&file, HEADER, len)? != header.crc {
            return Err(damaged("bad checksum"));
        }
        let relocations = match header.relocations {
            Some(counts) => {
                let mut bytes = vec![0; (len - header.relocations_at) as usize];
                file.read_exact_at(&mut bytes, header.relocations_at)?;
                Some(Relocations::from_raw(bytes, counts).ok_or_else(|| damaged("bad relocation count"))?)
            }
            None => None,
        };
        touch(&file);
        Ok(Image { info: header.info, data: Data::File(file, len), mappable: true, relocations, packed: false })
    }

    /// Writes the kernel file of `image`, which was unpacked from `source` while `source` was in the state `id`.
    fn write_kernel(&self, key: &str, image: &Image, source: &File, id: &SourceId) -> io::Result<()> {
        let pieces = chunks(&image.info.pieces);
        let relocations_at = pieces.last().map_or(HEADER, |last| last.offset + last.len);
        let (relocations, counts) = match &image.relocations {
            Some(relocations) => (relocations.raw().0, Some(relocations.raw().1)),
            None => (&[][..], None),
        };
        let len = relocations_at + relocations.len() as u64;
        let info = &image.info;
        if image.packed || info.multiboot.is_some() || !info.start.is_multiple_of(PAGE_SIZE) || len > self.limit {
            return Err(io::Error::other("not cacheable or too large"));
        }
        let info = ImageInfo { pieces, ..info.clone() };
        self.write(&self.kernel_path(key), |file| {
            let crc = write_data(file, &info.pieces, image, relocations)?;
            let header = Header { key: key.into(), info, relocations: counts, relocations_at, len, crc };
            write_header(file, &header)?;
            // The key is the hash of the file that was read before; the image must come from the same bytes.
            if SourceId::of(source)? == *id { Ok(()) } else { Err(io::Error::other("it changed in the meantime")) }
        })
    }

    /// Writes a new file and gives it the name `path`. The file has no name until it is complete, so that it disappears
    /// with this process, however the process ends.
    fn write(&self, path: &Path, fill: impl FnOnce(&File) -> io::Result<()>) -> io::Result<()> {
        let mut options = OpenOptions::new();
        let nameless = options.read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE).open(self.place()).ok();
        self.write_to(nameless, path, fill)
    }

    /// Writes a new file as [`Cache::write`] does, or under a temporary name if the file system has no nameless files.
    fn write_to(
        &self,
        nameless: Option<File>,
        path: &Path,
        fill: impl FnOnce(&File) -> io::Result<()>,
    ) -> io::Result<()> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let temporary = self.temporary(&NEXT.fetch_add(1, Ordering::Relaxed).to_string());
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let done = match nameless {
            // A nameless file can be given a name, but only one that does not exist yet.
            Some(file) => fill(&file).and_then(|()| link(&file, &temporary)),
            None => options.open(&temporary).and_then(|file| fill(&file)),
        };
        let done = done.and_then(|()| fs::rename(&temporary, path));
        if done.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        done
    }

    /// Removes the least recently used kernels until the rest is within the limit; never removes `keep`.
    fn evict(&self, keep: &str) {
        let Ok(entries) = fs::read_dir(self.place()) else { return };
        let (mut kernels, mut sources) = (Vec::new(), Vec::new());
        for entry in entries.flatten() {
            let (Ok(metadata), name) = (entry.metadata(), entry.file_name()) else { continue };
            let Ok(used) = metadata.modified() else { continue };
            match name.to_string_lossy() {
                name if name.starts_with("t-") && used.elapsed().is_ok_and(|age| age > ABANDONED) => {
                    let _ = fs::remove_file(entry.path());
                }
                name if name.starts_with("k-") && name[2..] != *keep => {
                    kernels.push((used, metadata.len(), entry.path()));
                }
                name if name.starts_with("s-") => sources.push((used, entry.path())),
                _ => {}
            }
        }
        let kept = fs::metadata(self.kernel_path(keep)).map_or(0, |m| m.len());
        let mut total = kept + kernels.iter().map(|(_, len, _)| len).sum::<u64>();
        kernels.sort();
        for (_, len, path) in kernels {
            if total <= self.limit {
                break;
            }
            let _ = fs::remove_file(path);
            total -= len;
        }
        sources.sort();
        for (_, path) in sources.iter().rev().skip(SOURCES_MAX) {
            let _ = fs::remove_file(path);
        }
    }
}

/// Returns the key of a file's content.
fn key_of(file: &File, size: u64) -> io::Result<String> {
    let mut hasher = blake3::Hasher::new();
    for_each_block(file, 0, size, |block| _ = hasher.update(block))?;
    Ok(format!("{size:x}-{}", hasher.finalize().to_hex()))
}

/// Gives a nameless file a name.
fn link(file: &File, path: &Path) -> io::Result<()> {
    let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(rustix::fs::linkat(rustix::fs::CWD, unnamed, rustix::fs::CWD, path, rustix::fs::AtFlags::SYMLINK_FOLLOW)?)
}

/// Returns the id of this boot of the host; empty if the host does not provide it.
fn host_boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|id| id.trim().to_string()).unwrap_or_default()
}

/// Records that a kernel was used, for eviction.
fn touch(file: &File) {
    let now = SystemTime::now();
    let old = file.metadata().and_then(|m| m.modified());
    if old.is_ok_and(|old| now.duration_since(old).is_ok_and(|age| age > TOUCH)) {
        let _ = file.set_modified(now);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::super::testing::{self, Files};
    use super::super::unpack::Compression;
    use super::*;
    use crate::memory::GuestRam;

    const LEN: usize = 96 << 10;

    /// Returns a cache in a new directory, and a kernel beside it.
    fn set_up() -> (Files, Cache, PathBuf) {
        let files = Files::new();
        let cache = cache_in(&files);
        let kernel = files.write("kernel", &testing::bzimage(Compression::Lz4, &testing::linux(LEN)));
        (files, cache, kernel)
    }

    fn cache_in(files: &Files) -> Cache {
        Cache { settle: Duration::ZERO, ..Cache::at(files.path("vireo")).unwrap() }
    }

    fn unpack(kernel: &Path) -> Image {
        let file = File::open(kernel).unwrap();
        let len = file.metadata().unwrap().len();
        super::super::kernel::examine(Data::File(file, len), BootMode::Auto).unwrap()
    }

    /// Boots through the cache; returns whether the cache had the kernel.
    fn boot(cache: &Cache, kernel: &Path) -> bool {
        let source = File::open(kernel).unwrap();
        let (image, found) = match cache.find(&source) {
            Some(image) => (image, true),
            None => {
                let _ = cache.keep(&source);
                (unpack(kernel), false)
            }
        };
        assert!(in_memory(image) == in_memory(unpack(kernel)));
        found
    }

    fn in_memory(mut image: Image) -> Vec<u8> {
        let ram = GuestRam::anonymous(32 << 20);
        image.load(&ram, image.info.start).unwrap();
        let whole = ram.slice(image.info.start, image.span()).unwrap();
        image.relocations.as_ref().unwrap().apply(&whole, 0x20_0000).unwrap();
        let mut bytes = vec![0; image.span() as usize];
        whole.copy_to(&mut bytes);
        bytes
    }

    fn entries(cache: &Cache, prefix: &str) -> Vec<PathBuf> {
        let entries = fs::read_dir(&cache.dir).unwrap().map(|entry| entry.unwrap().path());
        let mut paths: Vec<_> =
            entries.filter(|path| path.file_name().unwrap().to_string_lossy().starts_with(prefix)).collect();
        paths.sort();
        paths
    }

    #[test]
    fn the_second_boot_finds_what_the_first_kept() {
        let (_files, cache, kernel) = set_up();
        assert!(!boot(&cache, &kernel));
        assert!(boot(&cache, &kernel));
        // A copy has the same content.
        let copy = kernel.with_extension("copy");
        fs::copy(&kernel, &copy).unwrap();
        assert!(boot(&cache, &copy));
        assert_eq!((entries(&cache, "k-").len(), entries(&cache, "s-").len()), (1, 2));
        let mode = fs::metadata(&cache.dir).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
    }

    #[test]
    fn a_warm_boot_does_not_read_the_source() {
        let (_files, cache, kernel) = set_up();
        boot(&cache, &kernel);
        // A write-only handle of the same file cannot be read.
        let unreadable = OpenOptions::new().write(true).open(&kernel).unwrap();
        assert!(cache.find(&unreadable).is_some());
    }

    #[test]
    fn a_changed_file_is_not_taken_for_the_old_one() {
        let (_files, cache, kernel) = set_up();
        boot(&cache, &kernel);
        fs::write(&kernel, testing::bzimage(Compression::Lz4, &testing::linux(LEN + 0x1000))).unwrap();
        assert!(!boot(&cache, &kernel));
        assert_eq!(entries(&cache, "k-").len(), 2);
    }

    #[test]
    fn another_kernel_of_the_same_size_is_not_taken_for_it() {
        let (files, cache, kernel) = set_up();
        boot(&cache, &kernel);
        let mut other = fs::read(&kernel).unwrap();
        let last = other.len() - 0x1000;
        other[last] ^= 1;
        let other = files.write("other", &other);
        assert!(!boot(&cache, &other));
        assert!(boot(&cache, &other) && boot(&cache, &kernel));
        assert_eq!(entries(&cache, "k-").len(), 2);
    }

    #[test]
    fn every_format_is_kept_as_it_was_unpacked() {
        // Large enough for pages to be moved into the guest, and not compressible below the minimum size of a kernel.
        let mut linux = testing::linux(3 << 20);
        let mut noise = 1u32;
        for byte in &mut linux[0x1_0000..0x4_0000] {
            noise = noise.wrapping_mul(1664525).wrapping_add(1013904223);
            *byte = (noise >> 24) as u8;
        }
        for format in [Compression::Gzip, Compression::Zstd, Compression::Xz, Compression::Lz4, Compression::Bzip2] {
            let files = Files::new();
            let cache = cache_in(&files);
            let packed = testing::compress(format, &linux);
            for (name, bytes) in [("bzImage", testing::bzimage(format, &linux)), ("vmlinux", packed)] {
                let kernel = files.write(name, &bytes);
                assert!(!boot(&cache, &kernel) && boot(&cache, &kernel), "{name}, {format:?}");
            }
        }
        let (files, cache, _) = set_up();
        let kernel = files.write("vmlinux", &linux);
        assert!(!boot(&cache, &kernel) && boot(&cache, &kernel));
    }

    #[test]
    fn what_cannot_be_unpacked_or_mapped_is_not_kept() {
        let (files, cache, kernel) = set_up();
        let mut cut = fs::read(&kernel).unwrap();
        cut.truncate(cut.len() - 4096);
        let multiboot = [testing::multiboot(0x10_0000), vec![0x90; LEN]].concat();
        let packed = testing::bzimage_of(&vec![0x5D; LEN]);
        for bytes in [cut, multiboot, packed, vec![7; LEN], vec![7; 100]] {
            let file = File::open(files.write("bad", &bytes)).unwrap();
            assert!(cache.keep(&file).is_err());
            assert!(cache.find(&file).is_none());
        }
        assert!(entries(&cache, "").is_empty());
    }

    #[test]
    fn a_file_that_changes_while_it_is_kept_is_not_kept() {
        let (files, cache, _) = set_up();
        let kernel = files.write("vmlinux", &testing::linux(LEN));
        let file = OpenOptions::new().read(true).write(true).open(&kernel).unwrap();
        let (id, image) = (SourceId::of(&file).unwrap(), unpack(&kernel));
        file.write_all_at(b"new", 0x2000).unwrap();
        file.set_modified(UNIX_EPOCH).unwrap();
        assert!(cache.write_kernel("1-2", &image, &file, &id).is_err());
        assert!(entries(&cache, "").is_empty());
    }

    #[test]
    fn what_is_not_complete_has_no_name_or_loses_it() {
        let (_files, cache, _) = set_up();
        let path = cache.dir.join("k-1");
        let text = |file: &File| file.write_all_at(b"text", 0);
        for _ in 0..2 {
            cache.write(&path, |file| text(file)).unwrap();
            cache.write_to(None, &path, |file| text(file)).unwrap();
            assert_eq!((entries(&cache, "").len(), fs::read(&path).unwrap()), (1, b"text".to_vec()));
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        }
        let failing = |_: &File| Err(io::Error::other("no"));
        assert!(cache.write(&path, failing).is_err() && cache.write_to(None, &path, failing).is_err());
        // A process that ends in the middle removes only its own files.
        let other = Cache::at(cache.dir.clone()).unwrap();
        let ended = |file: &File| {
            text(file)?;
            other.abandon();
            assert_eq!(entries(&cache, "t-").len(), 1);
            cache.abandon();
            Ok(())
        };
        assert!(cache.write_to(None, &path, ended).is_err());
        assert_eq!(entries(&cache, "").len(), 1);
    }

    #[test]
    fn a_file_that_changed_just_now_is_not_recorded() {
        let (_files, cache, kernel) = set_up();
        let cache = Cache { settle: SETTLE, ..cache };
        assert!(!boot(&cache, &kernel));
        assert!(!boot(&cache, &kernel));
        assert!(entries(&cache, "").is_empty());
        let wait = cache.settles_in(&File::open(&kernel).unwrap()).unwrap();
        assert!(wait <= SETTLE);
        File::options().write(true).open(&kernel).unwrap().set_modified(SystemTime::now() + SETTLE).unwrap();
        assert!(cache.settles_in(&File::open(&kernel).unwrap()).unwrap() > SETTLE, "the host's clock was changed");
    }

    #[test]
    fn damage_is_found_and_mended() {
        type Damage = fn(&Path);
        let damages: [Damage; 6] = [
            |path| fs::write(path, b"").unwrap(),
            |path| fs::write(path, [0; 40 << 10]).unwrap(),
            |path| OpenOptions::new().write(true).open(path).unwrap().set_len(HEADER + 5).unwrap(),
            |path| OpenOptions::new().write(true).open(path).unwrap().write_all_at(b"x", 3).unwrap(),
            |path| OpenOptions::new().write(true).open(path).unwrap().write_all_at(b"}", 40).unwrap(),
            |path| {
                fs::remove_file(path).unwrap();
                std::os::unix::fs::symlink("/dev/zero", path).unwrap();
            },
        ];
        for damage in damages {
            let (_files, cache, kernel) = set_up();
            boot(&cache, &kernel);
            damage(&entries(&cache, "k-")[0]);
            assert!(!boot(&cache, &kernel));
            assert!(boot(&cache, &kernel));
            fs::write(&entries(&cache, "s-")[0], b"{").unwrap();
            assert!(boot(&cache, &kernel), "found by its content");
        }
    }

    #[test]
    fn content_is_verified_once_per_boot_of_the_host() {
        let (_files, cache, kernel) = set_up();
        boot(&cache, &kernel);
        let (image, source) = (entries(&cache, "k-").remove(0), entries(&cache, "s-").remove(0));
        let mut record: Source = serde_json::from_slice(&fs::read(&source).unwrap()).unwrap();
        record.verified = "an earlier boot".into();
        fs::write(&source, serde_json::to_vec(&record).unwrap()).unwrap();
        assert!(boot(&cache, &kernel));
        let mended: Source = serde_json::from_slice(&fs::read(&source).unwrap()).unwrap();
        assert_eq!(mended.verified, host_boot());
        // The same, with a page that never reached the disk.
        fs::write(&source, serde_json::to_vec(&record).unwrap()).unwrap();
        let file = OpenOptions::new().write(true).open(&image).unwrap();
        file.write_all_at(&[0; 4096], HEADER + 4096).unwrap();
        assert!(!boot(&cache, &kernel));
        assert!(boot(&cache, &kernel));
    }

    #[test]
    fn eviction_unlinks_the_oldest_and_a_mapped_kernel_lives_on() {
        let (files, mut cache, first) = set_up();
        boot(&cache, &first);
        let path = entries(&cache, "k-").remove(0);
        let (file, len) = (File::open(&path).unwrap(), fs::metadata(&path).unwrap().len());
        file.set_modified(UNIX_EPOCH + Duration::from_secs(1000)).unwrap();
        let mapped = cache.find(&File::open(&first).unwrap()).unwrap();
        let age = fs::metadata(&path).unwrap().modified().unwrap().elapsed().unwrap();
        assert!(age < Duration::from_secs(600), "being used counts");
        file.set_modified(UNIX_EPOCH + Duration::from_secs(1000)).unwrap();
        cache.limit = len * 5 / 2;
        for n in 1..4 {
            let bytes =
                testing::bzimage(Compression::Lz4, &[testing::plain_linux(LEN), testing::tables(n % 2 == 0)].concat());
            boot(&cache, &files.write(&format!("kernel{n}"), &[bytes, vec![0; n]].concat()));
        }
        assert!(!path.exists());
        assert_eq!(entries(&cache, "k-").len(), 2);
        assert!(in_memory(mapped) == in_memory(unpack(&first)));
        cache.limit = 1000;
        assert!(!boot(&cache, &files.write("large", &testing::bzimage(Compression::Lz4, &testing::linux(2 * LEN)))));
        assert_eq!(entries(&cache, "k-").len(), 2, "what is larger than the limit is not kept");
    }

    #[test]
    fn a_directory_that_others_can_change_is_not_used() {
        let files = Files::new();
        let dir = files.path("open");
        fs::create_dir(&dir).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(Cache::at(dir.clone()).is_err());
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).unwrap();
        assert!(Cache::at(dir.clone()).is_ok());
        std::os::unix::fs::symlink(&dir, files.path("link")).unwrap();
        assert!(Cache::at(files.path("link")).is_err());
        assert!(Cache::at(files.write("file", b"")).is_err());
        assert!(Cache::at("/proc/vireo".into()).is_err());
    }

    #[test]
    fn a_link_in_the_place_of_the_open_cache_is_not_followed() {
        let (files, cache, kernel) = set_up();
        let elsewhere = files.path("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        fs::rename(&cache.dir, files.path("moved")).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &cache.dir).unwrap();
        assert!(!boot(&cache, &kernel));
        assert!(boot(&cache, &kernel), "it is kept in the directory that was opened");
        assert_eq!(fs::read_dir(elsewhere).unwrap().count(), 0);
        assert_ne!(fs::read_dir(files.path("moved")).unwrap().count(), 0);
    }

    #[test]
    fn a_cache_that_cannot_be_written_costs_only_time() {
        let (_files, cache, kernel) = set_up();
        fs::remove_dir(&cache.dir).unwrap();
        assert!(!boot(&cache, &kernel));
        assert!(!boot(&cache, &kernel));
    }

    #[test]
    fn many_at_once() {
        let (_files, cache, kernel) = set_up();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..4 {
                        boot(&cache, &kernel);
                    }
                });
            }
        });
        assert!(boot(&cache, &kernel));
        assert_eq!((entries(&cache, "k-").len(), entries(&cache, "t-").len()), (1, 0));
    }
}
