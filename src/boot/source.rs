//! Files that a user names, and the bytes of an image, which are in a file or unpacked in memory.

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{Dir, Mode, OFlags, openat};

use super::error::Problem;
use crate::backend::held;
use crate::memory::{Pages, RamSlice};

/// Limit on the names of one folder, which a guest may have made.
const NAMES_MAX: usize = 1 << 20;

/// Opens a regular file for reading. Refuses a FIFO or a device immediately, without waiting for its other end.
pub fn open(path: &Path) -> Result<(File, u64), Problem> {
    let mut options = OpenOptions::new();
    let file = options.read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(held::path(path));
    regular(file.map_err(Problem::Open)?)
}

/// Opens the regular file `name` in an open folder, like [`open`]. Refuses a symbolic link, which a guest may have made.
pub fn open_in(dir: impl AsFd, name: &OsStr) -> Result<(File, u64), Problem> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match openat(dir, name, flags, Mode::empty()) {
        Ok(file) => regular(file.into()),
        Err(rustix::io::Errno::LOOP) => Err(Problem::NotAFile("a symbolic link")),
        Err(e) => Err(Problem::Open(e.into())),
    }
}

fn regular(file: File) -> Result<(File, u64), Problem> {
    let metadata = file.metadata().map_err(Problem::Open)?;
    let kind = metadata.file_type();
    let found = match kind {
        _ if kind.is_file() => return Ok((file, metadata.size())),
        _ if kind.is_dir() => "a directory",
        _ if kind.is_fifo() => "a FIFO",
        _ if kind.is_char_device() => "a character device",
        _ if kind.is_block_device() => "a block device",
        _ => "something else",
    };
    Err(Problem::NotAFile(found))
}

/// Flags of a descriptor that only names a folder; a symbolic link is an error.
const FOLDER: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Opens the folder at `path`, so that its files come from this folder even if the path leads elsewhere later.
pub fn open_folder(path: &Path) -> Result<OwnedFd, Problem> {
    let flags = FOLDER.difference(OFlags::NOFOLLOW);
    rustix::fs::open(held::path(path), flags, Mode::empty()).map_err(|e| Problem::Open(e.into()))
}

/// Opens the folder `below` an open one. A symbolic link on the way is an error.
pub fn descend(top: impl AsFd, below: &Path) -> io::Result<OwnedFd> {
    let mut dir = openat(top, c".", FOLDER, Mode::empty())?;
    for step in below {
        dir = openat(&dir, step, FOLDER, Mode::empty())?;
    }
    Ok(dir)
}

/// Returns the names of an open folder's entries, sorted.
pub fn names(dir: impl AsFd) -> Result<Vec<OsString>, Problem> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = openat(dir, c".", flags, Mode::empty()).map_err(|e| Problem::Open(e.into()))?;
    let mut names = Vec::new();
    for entry in Dir::new(dir).map_err(|e| Problem::Open(e.into()))? {
        let entry = entry.map_err(|e| Problem::Read(e.into()))?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(OsStr::from_bytes(name).to_os_string());
        }
        if names.len() > NAMES_MAX {
            return Err(Problem::Unsuitable(format!("there are more than {NAMES_MAX} names in it")));
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// The bytes of an image.
#[derive(Debug)]
pub enum Data {
    /// Unpacked, in memory.
    Memory(Vec<u8>),
    /// Unpacked, in pages that can become the guest's.
    Pages(Pages),
    /// In a file of the given length. The file is read piece by piece and never mapped, because somebody may truncate
    /// it.
    File(File, u64),
}

/// Storage of the bytes of [`Data`].
enum Place<'a> {
    Memory(&'a [u8]),
    File(&'a File),
}

impl Data {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Data::Memory(bytes) => bytes.len() as u64,
            Data::Pages(pages) => pages.len() as u64,
            Data::File(_, len) => *len,
        }
    }

    /// Returns the file, or the bytes that are in memory.
    fn place(&self) -> Place<'_> {
        match self {
            Data::Memory(bytes) => Place::Memory(bytes),
            Data::Pages(pages) => Place::Memory(pages),
            Data::File(file, _) => Place::File(file),
        }
    }

    /// Returns the name of this data for error messages.
    pub fn what(&self) -> &'static str {
        match self {
            Data::Memory(_) | Data::Pages(_) => "the unpacked kernel",
            Data::File(..) => "the file",
        }
    }

    /// Fails unless `len` bytes exist at `offset`.
    pub fn check(&self, offset: u64, len: u64) -> Result<(), Problem> {
        let needs = offset.saturating_add(len);
        if needs > self.len() {
            return Err(Problem::Truncated { what: self.what(), needs, has: self.len() });
        }
        Ok(())
    }

    /// Fills `buffer` from `offset`.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Problem> {
        self.check(offset, buffer.len() as u64)?;
        match self.place() {
            Place::Memory(bytes) => buffer.copy_from_slice(&bytes[offset as usize..][..buffer.len()]),
            Place::File(file) => file.read_exact_at(buffer, offset).map_err(Problem::Read)?,
        }
        Ok(())
    }

    /// Returns `len` bytes from `offset`. The caller has bounded `len`.
    pub fn bytes(&self, offset: u64, len: u64) -> Result<Vec<u8>, Problem> {
        self.check(offset, len)?;
        let mut buffer = vec![0; len as usize];
        self.read(offset, &mut buffer)?;
        Ok(buffer)
    }

    /// Returns the first `max` bytes, or all if there are fewer.
    pub fn head(&self, max: u64) -> Result<Vec<u8>, Problem> {
        self.bytes(0, max.min(self.len()))
    }

    /// Copies from `offset` into guest RAM without an intermediate buffer.
    pub fn copy_to(&self, offset: u64, ram: &RamSlice<'_>) -> Result<(), Problem> {
        self.check(offset, ram.len() as u64)?;
        match self.place() {
            Place::Memory(bytes) => ram.copy_from(&bytes[offset as usize..][..ram.len()]),
            Place::File(file) => read_to_ram(file, offset, ram).map_err(Problem::Read)?,
        }
        Ok(())
    }

    /// Returns whether there is a `needle` in this range whose following bytes `wanted` accepts. `rare` is the index of the
    /// needle's rarest byte.
    pub fn find(
        &self,
        range: Range<u64>,
        needle: &[u8],
        rare: usize,
        mut wanted: impl FnMut(&[u8]) -> bool,
    ) -> Result<bool, Problem> {
        // Blocks overlap by more than a needle and the bytes after it that `wanted` looks at.
        const BLOCK: u64 = 256 << 10;
        const OVERLAP: u64 = 512;
        let (mut offset, end) = (range.start, range.end.min(self.len()));
        while offset < end {
            let len = (BLOCK + OVERLAP).min(end - offset);
            let block = match self.place() {
                Place::Memory(bytes) => Cow::Borrowed(&bytes[offset as usize..][..len as usize]),
                Place::File(_) => Cow::Owned(self.bytes(offset, len)?),
            };
            let mut from = 0;
            while let Some(at) = memchr::memchr(needle.get(rare).copied().unwrap_or_default(), &block[from..]) {
                let start = (from + at).checked_sub(rare);
                let rest = start.and_then(|start| block.get(start..)?.strip_prefix(needle));
                if rest.is_some_and(&mut wanted) {
                    return Ok(true);
                }
                from += at + 1;
            }
            offset += BLOCK;
        }
        Ok(false)
    }

    /// Returns a reader of `len` bytes from `offset`.
    pub fn reader(&self, offset: u64, len: u64) -> Result<Reader<'_>, Problem> {
        self.check(offset, len)?;
        Ok(Reader { data: self, offset, end: offset + len })
    }
}

/// Reads a file into guest RAM: the `read` system call writes directly to the guest's pages.
pub fn read_to_ram(mut file: &File, offset: u64, ram: &RamSlice<'_>) -> io::Result<()> {
    use std::io::Seek;
    use vm_memory::ReadVolatile;
    file.seek(io::SeekFrom::Start(offset))?;
    file.read_exact_volatile(&mut ram.clone()).map_err(|e| match e {
        vm_memory::VolatileMemoryError::IOError(e) => e,
        e => io::Error::other(e),
    })
}

/// Sequential reading of a range of [`Data`].
pub struct Reader<'a> {
    data: &'a Data,
    offset: u64,
    end: u64,
}

impl Read for Reader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = (self.end - self.offset).min(buffer.len() as u64) as usize;
        let got = match self.data.place() {
            Place::Memory(bytes) => (&bytes[self.offset as usize..]).read(&mut buffer[..want])?,
            Place::File(file) => file.read_at(&mut buffer[..want], self.offset)?,
        };
        self.offset += got as u64;
        Ok(got)
    }
}

fn is_our_own(metadata: &Metadata) -> bool {
    metadata.uid() == rustix::process::geteuid().as_raw()
}

/// Fails unless only this process's user (and root) can change the file.
pub fn ours(metadata: &Metadata) -> io::Result<()> {
    if !is_our_own(metadata) || metadata.mode() & 0o022 != 0 {
        let text = "it belongs to another user, or others may write to it";
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
    }
    Ok(())
}

/// Fails unless the things that vireo creates in `dir` are safe from other users: the directory is ours, or others
/// cannot rename our entries in it. So root does not leave its files in a user's home directory.
pub fn safe_parent(dir: &Path) -> io::Result<()> {
    let metadata = dir.metadata()?;
    if is_our_own(&metadata) || metadata.mode() & libc::S_ISVTX != 0 {
        return Ok(());
    }
    let text = format!("{} belongs to another user", dir.display());
    Err(io::Error::new(io::ErrorKind::PermissionDenied, text))
}

#[cfg(test)]
mod tests {
    use super::super::testing::Files;
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn what_is_in_an_open_folder_is_opened_there() {
        let files = Files::new();
        fs::create_dir_all(files.path("root/a/b")).unwrap();
        fs::create_dir_all(files.path("elsewhere/b")).unwrap();
        files.write("root/a/b/file", b"mine");
        files.write("elsewhere/b/file", b"another's");
        let top = open_folder(&files.path("root")).unwrap();
        fs::rename(files.path("root"), files.path("moved")).unwrap();
        symlink(files.path("elsewhere"), files.path("root")).unwrap();
        assert_eq!(names(&top).unwrap(), ["a"]);
        let dir = descend(&top, Path::new("a/b")).unwrap();
        let (file, len) = open_in(&dir, "file".as_ref()).unwrap();
        assert_eq!((io::read_to_string(file).unwrap(), len), ("mine".into(), 4));
        // A guest puts links there meanwhile.
        fs::remove_file(files.path("moved/a/b/file")).unwrap();
        symlink(files.path("elsewhere/b/file"), files.path("moved/a/b/file")).unwrap();
        assert_eq!(open_in(&dir, "file".as_ref()).unwrap_err().to_string(), "this is a symbolic link, not a file");
        fs::rename(files.path("moved/a"), files.path("moved/old")).unwrap();
        symlink(files.path("elsewhere"), files.path("moved/a")).unwrap();
        assert!(descend(&top, Path::new("a/b")).is_err());
        assert_eq!(open_in(&top, "old".as_ref()).unwrap_err().to_string(), "this is a directory, not a file");
        assert!(matches!(open_folder(&files.path("elsewhere/b/file")), Err(Problem::Open(_))));
    }
}
