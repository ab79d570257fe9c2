//! Initramfs archives: cpio in its "newc" form (Documentation/driver-api/early-userspace/buffer-format.rst), built as a
//! list of pieces.
//!
//! An [`Archive`] does not copy large files: headers and small contents are bytes in memory, other contents stay open
//! files until [`Piece::load`] reads them directly into guest RAM. If a path is added twice, the guest keeps the later
//! one. If a folder contains a symbolic link to a directory (`/bin`, `/lib` of merged systems), later entries are
//! placed through the link. Directory names end with a slash, so that unpacking also keeps such links of earlier
//! archives.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Stat, fstat, readlinkat, statat};

use super::error::Problem;
use super::source;
use crate::memory::GuestRam;

const MAGIC: &[u8] = b"070701";
const HEADER_LEN: usize = 110;
/// Name of the entry that ends an archive.
const TRAILER: &[u8] = b"TRAILER!!!";
/// Longest name without its NUL and a directory's slash: the kernel skips names that exceed PATH_MAX.
const NAME_MAX: usize = libc::PATH_MAX as usize - 2;
/// Largest file that is read immediately, because an open descriptor costs more.
const SMALL: u64 = 16 << 10;
/// Largest number of entries of an archive, so that packing a folder like `/` ends as an error.
const ENTRIES_MAX: u32 = 1 << 20;
/// Largest number of symbolic links that are followed in one path; the kernel follows no more than these.
const LINKS_MAX: usize = 40;

const DIRECTORY: u32 = libc::S_IFDIR;
const REGULAR: u32 = libc::S_IFREG;
const SYMLINK: u32 = libc::S_IFLNK;

/// A part of the data that is loaded as the initrd.
#[derive(Debug)]
pub enum Piece {
    /// Bytes in memory.
    Bytes(Vec<u8>),
    /// A whole file.
    File(HostFile),
}

/// An open regular file of the host, with its length when it was opened.
#[derive(Debug)]
pub struct HostFile {
    /// The open file.
    pub file: File,
    /// Its length when it was opened.
    pub len: u64,
    /// Path by which the user knows the file.
    pub path: PathBuf,
}

/// Reasons why an archive cannot be packed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the host cannot be read.
    #[error("cannot pack {}", path.display())]
    Host {
        /// Path of the file.
        path: PathBuf,
        /// The problem with the file.
        source: Problem,
    },
    /// Nothing can be packed at a path in the guest.
    #[error("cannot pack anything at {}: {what}", path.display())]
    Guest {
        /// The path.
        path: PathBuf,
        /// The problem with the path.
        what: &'static str,
    },
    /// The archive would exceed the limits of the format.
    #[error("an initramfs must be smaller than 4G, with at most {ENTRIES_MAX} files; this one would exceed that")]
    TooLarge,
}

impl HostFile {
    /// Opens a regular file.
    pub fn open(path: &Path) -> Result<HostFile, Problem> {
        let (file, len) = source::open(path)?;
        Ok(HostFile { file, len, path: path.into() })
    }
}

impl Piece {
    /// Returns the length in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Piece::Bytes(bytes) => bytes.len() as u64,
            Piece::File(file) => file.len,
        }
    }

    /// Returns whether the piece has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies the piece into guest RAM.
    pub fn load(&self, ram: &GuestRam, start: u64) -> Result<(), super::Error> {
        match self {
            _ if self.is_empty() => {}
            Piece::Bytes(bytes) => ram.write(start, bytes)?,
            Piece::File(HostFile { file, len, path }) => {
                let read = source::read_to_ram(file, 0, &ram.slice(start, *len)?);
                read.map_err(|e| shrunk(e, *len).of_initrd(path.clone()))?;
            }
        }
        Ok(())
    }
}

fn shrunk(error: io::Error, len: u64) -> Problem {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => Problem::Shrunk(len),
        _ => Problem::Read(error),
    }
}

/// Kind of a path in the archive.
#[derive(Debug)]
enum Seen {
    Directory,
    Symlink(Vec<u8>),
    Other,
}

/// The fields of an entry's header that vary. Owner and group are always root.
#[derive(Default)]
struct Header<'a> {
    name: &'a [u8],
    inode: u32,
    mode: u32,
    links: u32,
    mtime: u32,
    size: u64,
    device: (u32, u32),
}

/// An entry of an open folder of the host.
struct Entry<'a> {
    dir: BorrowedFd<'a>,
    name: &'a OsStr,
    /// Path for messages.
    path: &'a Path,
}

impl Entry<'_> {
    fn stat(&self) -> Result<Stat, Problem> {
        statat(self.dir, self.name, AtFlags::SYMLINK_NOFOLLOW).map_err(|e| Problem::Open(e.into()))
    }
}

/// An archive under construction.
#[derive(Debug, Default)]
pub struct Archive {
    pieces: Vec<Piece>,
    /// Bytes that follow the pieces.
    bytes: Vec<u8>,
    len: u64,
    inodes: u32,
    seen: HashMap<Vec<u8>, Seen>,
}

impl Archive {
    /// Creates an empty archive.
    pub fn new() -> Archive {
        Archive::default()
    }

    /// Adds a directory; does nothing if it already exists.
    pub fn directory(&mut self, guest: &Path, mode: u32) -> Result<(), Error> {
        let name = clean(guest)?;
        if self.lookup(&name) { Ok(()) } else { self.add_directory(&name, mode, 0) }
    }

    /// Adds a file with the given content.
    pub fn bytes(&mut self, guest: &Path, mode: u32, content: &[u8]) -> Result<(), Error> {
        let header = Header { mode: REGULAR | mode & 0o7777, size: content.len() as u64, ..Header::default() };
        self.add(&clean(guest)?, header, Seen::Other)?;
        self.content(content)
    }

    /// Adds a file with the content of a file of the host.
    pub fn file(&mut self, guest: &Path, mode: u32, file: HostFile) -> Result<(), Error> {
        let header = Header { mode: REGULAR | mode & 0o7777, ..Header::default() };
        self.add_file(&clean(guest)?, header, file)
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, guest: &Path, target: &Path) -> Result<(), Error> {
        self.add_symlink(&clean(guest)?, target.as_os_str().as_bytes(), 0)
    }

    /// Adds a device node; `S_IFCHR` or `S_IFBLK` is part of `mode`.
    pub fn device(&mut self, guest: &Path, mode: u32, device: (u32, u32)) -> Result<(), Error> {
        self.add(&clean(guest)?, Header { mode, device, ..Header::default() }, Seen::Other)
    }

    /// Adds a folder of the host with its content: links, modes, times and devices are kept, owners become root,
    /// sockets are left out. Symbolic links in the folder are not followed: each step is one name in an open folder,
    /// because a guest may be able to exchange the content meanwhile.
    pub fn tree(&mut self, host: &Path, guest: &Path) -> Result<(), Error> {
        let failed = |path: &Path, source| Error::Host { path: path.into(), source };
        let cannot_open = |path: &Path, e: io::Error| failed(path, Problem::Open(e));
        let mut links = HashMap::new();
        let top = source::open_folder(host).map_err(|problem| failed(host, problem))?;
        let mut folders = vec![(PathBuf::new(), clean(guest)?)];
        while let Some((below, name)) = folders.pop() {
            // Without a slash at the end.
            let folder = if name.is_empty() { host.to_path_buf() } else { host.join(&below) };
            let dir = source::descend(&top, &below).map_err(|e| cannot_open(&folder, e))?;
            let entries = source::names(&dir).map_err(|problem| failed(&folder, problem))?;
            let stat = fstat(&dir).map_err(|e| cannot_open(&folder, e.into()))?;
            self.add_directory(&name, stat.st_mode, mtime(&stat))?;
            for entry in entries {
                let host = Entry { dir: dir.as_fd(), name: &entry, path: &folder.join(&entry) };
                let stat = host.stat().map_err(|problem| failed(host.path, problem))?;
                let mut name = name.clone();
                if !name.is_empty() {
                    name.push(b'/');
                }
                name.extend_from_slice(entry.as_bytes());
                match kind(&stat) {
                    FileType::Directory => folders.push((below.join(&entry), name)),
                    _ => self.tree_entry(&host, &name, &stat, &mut links)?,
                }
            }
        }
        Ok(())
    }

    /// Adds an entry of a folder that is not itself a folder. `links` has the inode numbers of files with several
    /// names.
    fn tree_entry(
        &mut self,
        host: &Entry<'_>,
        name: &[u8],
        stat: &Stat,
        links: &mut HashMap<(u64, u64), u32>,
    ) -> Result<(), Error> {
        let of_host = |source| Error::Host { path: host.path.into(), source };
        let mut header = Header { mode: stat.st_mode, mtime: mtime(stat), ..Header::default() };
        match kind(stat) {
            FileType::RegularFile => {}
            FileType::Symlink => {
                let target = readlinkat(host.dir, host.name, Vec::new());
                let target = target.map_err(|e| of_host(Problem::Read(e.into())))?;
                return self.add_symlink(name, target.as_bytes(), header.mtime);
            }
            FileType::Socket => return Ok(()),
            FileType::CharacterDevice | FileType::BlockDevice => {
                header.device = (libc::major(stat.st_rdev), libc::minor(stat.st_rdev));
                return self.add(name, header, Seen::Other);
            }
            _ => return self.add(name, header, Seen::Other),
        }
        let (file, len) = source::open_in(host.dir, host.name).map_err(of_host)?;
        // What it is by now.
        let metadata = file.metadata().map_err(|e| of_host(Problem::Open(e)))?;
        (header.mode, header.mtime) = (metadata.mode(), metadata.mtime().clamp(0, u32::MAX.into()) as u32);
        if metadata.nlink() > 1 {
            // The first name has the content. The exact number of names is not important, if it is more than one.
            header.links = u32::try_from(metadata.nlink()).unwrap_or(u32::MAX);
            let identity = (metadata.dev(), metadata.ino());
            if let Some(inode) = links.get(&identity) {
                header.inode = *inode;
                return self.add(name, header, Seen::Other);
            }
            header.inode = self.next_inode()?;
            links.insert(identity, header.inode);
        }
        self.add_file(name, header, HostFile { file, len, path: host.path.into() })
    }

    /// Ends the archive and returns its pieces.
    pub fn finish(mut self) -> Result<Vec<Piece>, Error> {
        self.header(&Header { name: TRAILER, links: 1, ..Header::default() })?;
        self.pieces.push(Piece::Bytes(self.bytes));
        Ok(self.pieces)
    }

    /// Returns whether the archive has an entry at `guest`, following its symbolic links.
    pub fn contains(&self, guest: &Path) -> bool {
        clean(guest).is_ok_and(|name| self.lookup(&name))
    }

    fn lookup(&self, name: &[u8]) -> bool {
        name.is_empty() || self.seen.contains_key(&self.resolve(name, true))
    }

    /// Returns the path with symbolic links resolved; `last` says whether a link at its end is followed, too.
    fn resolve(&self, name: &[u8], last: bool) -> Vec<u8> {
        let mut rest: Vec<&[u8]> = components(name).rev().collect();
        let mut at: Vec<u8> = Vec::new();
        let mut links = 0;
        while let Some(component) = rest.pop() {
            let parent = at.len();
            if component == b".." {
                at.truncate(at.iter().rposition(|b| *b == b'/').unwrap_or(0));
                continue;
            }
            if parent > 0 {
                at.push(b'/');
            }
            at.extend_from_slice(component);
            if let Some(Seen::Symlink(target)) = self.seen.get(&at)
                && (last || !rest.is_empty())
                && links < LINKS_MAX
            {
                links += 1;
                at.truncate(if target.starts_with(b"/") { 0 } else { parent });
                rest.extend(components(target).rev());
            }
        }
        at
    }

    fn next_inode(&mut self) -> Result<u32, Error> {
        self.inodes += 1;
        if self.inodes > ENTRIES_MAX { Err(Error::TooLarge) } else { Ok(self.inodes) }
    }

    fn add_directory(&mut self, name: &[u8], mode: u32, mtime: u32) -> Result<(), Error> {
        if name.is_empty() {
            return Ok(()); // the root
        }
        self.add(
            name,
            Header { mode: DIRECTORY | mode & 0o7777, mtime, links: 2, ..Header::default() },
            Seen::Directory,
        )
    }

    fn add_symlink(&mut self, name: &[u8], target: &[u8], mtime: u32) -> Result<(), Error> {
        if target.is_empty() || target.len() > NAME_MAX || target.contains(&0) {
            return Err(of_guest(name, "a symbolic link cannot have this target"));
        }
        let header = Header { mode: SYMLINK | 0o777, mtime, size: target.len() as u64, ..Header::default() };
        self.add(name, header, Seen::Symlink(target.to_vec()))?;
        self.content(target)
    }

    fn add_file(&mut self, name: &[u8], mut header: Header<'_>, file: HostFile) -> Result<(), Error> {
        header.size = file.len;
        self.add(name, header, Seen::Other)?;
        if file.len <= SMALL {
            let mut content = vec![0; file.len as usize];
            let read = file.file.read_exact_at(&mut content, 0);
            read.map_err(|e| Error::Host { path: file.path, source: shrunk(e, content.len() as u64) })?;
            return self.content(&content);
        }
        self.len += file.len;
        self.pieces.push(Piece::Bytes(std::mem::take(&mut self.bytes)));
        self.pieces.push(Piece::File(file));
        self.pad()
    }

    /// Adds the header of an entry, and before it the directories that contain it, unless they exist.
    fn add(&mut self, name: &[u8], header: Header<'_>, what: Seen) -> Result<(), Error> {
        let name = &self.resolve(name, false)[..];
        if name.is_empty() {
            return Err(of_guest(b"", "this is the root directory"));
        }
        if name.len() > NAME_MAX {
            return Err(of_guest(name, "the path is too long"));
        }
        if name == TRAILER {
            return Err(of_guest(name, "this name marks the end of an archive"));
        }
        for (at, _) in name.iter().enumerate().filter(|(_, b)| **b == b'/') {
            match self.seen.get(&name[..at]) {
                Some(Seen::Directory | Seen::Symlink(_)) => {}
                Some(Seen::Other) => return Err(of_guest(name, "its parent is not a directory")),
                None => self.add_directory(&name[..at], 0o755, 0)?,
            }
        }
        let directory = matches!(what, Seen::Directory);
        match self.seen.get(name) {
            Some(Seen::Directory) if !directory => return Err(of_guest(name, "a directory already exists there")),
            Some(Seen::Other) if directory => return Err(of_guest(name, "a file already exists there")),
            // A link to a directory is kept.
            Some(Seen::Symlink(_)) if directory => {}
            _ => _ = self.seen.insert(name.to_vec(), what),
        }
        let inode = if header.inode == 0 { self.next_inode()? } else { header.inode };
        let slash = [name, b"/"].concat();
        let name = if directory { &slash } else { name };
        self.header(&Header { name, inode, links: header.links.max(1), ..header })
    }

    fn header(&mut self, header: &Header<'_>) -> Result<(), Error> {
        let Header { name, inode, mode, links, mtime, size, device } = *header;
        let size = u32::try_from(size).map_err(|_| Error::TooLarge)?;
        let name_len = name.len() as u32 + 1;
        let fields = [inode, mode, 0, 0, links, mtime, size, 0, 0, device.0, device.1, name_len, 0];
        let mut text = Vec::with_capacity(HEADER_LEN + name.len() + 4);
        text.extend_from_slice(MAGIC);
        for field in fields {
            let digit = |shift: u32| b"0123456789ABCDEF"[(field >> shift & 15) as usize];
            text.extend((0..8).rev().map(|n| digit(n * 4)));
        }
        text.extend_from_slice(name);
        text.push(0);
        self.content(&text)
    }

    /// Adds bytes and their padding.
    fn content(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.bytes.extend_from_slice(bytes);
        self.len += bytes.len() as u64;
        self.pad()
    }

    fn pad(&mut self) -> Result<(), Error> {
        let padding = padding(self.len);
        self.bytes.resize(self.bytes.len() + padding, 0);
        self.len += padding as u64;
        if self.len > u32::MAX.into() { Err(Error::TooLarge) } else { Ok(()) }
    }
}

/// Returns the number of bytes missing to a multiple of four.
pub fn padding(len: u64) -> usize {
    (len.wrapping_neg() % 4) as usize
}

fn mtime(stat: &Stat) -> u32 {
    stat.st_mtime.clamp(0, u32::MAX.into()) as u32
}

fn kind(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

fn components(path: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    path.split(|b| *b == b'/').filter(|part| !part.is_empty() && *part != b".")
}

/// Returns a guest path as archives name it: without `.` and unnecessary slashes.
fn clean(guest: &Path) -> Result<Vec<u8>, Error> {
    let bytes = guest.as_os_str().as_bytes();
    let parts: Vec<&[u8]> = components(bytes).collect();
    if parts.contains(&&b".."[..]) {
        return Err(of_guest(bytes, "'..' may lead out of the archive"));
    }
    if bytes.contains(&0) {
        return Err(of_guest(bytes, "the path contains a NUL byte"));
    }
    Ok(parts.join(&b'/'))
}

fn of_guest(name: &[u8], what: &'static str) -> Error {
    let path = Path::new("/").join(std::ffi::OsStr::from_bytes(name));
    Error::Guest { path, what }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;
    use std::io::Read;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use proptest::prelude::*;

    use super::*;

    /// Returns the archive's bytes as the guest gets them.
    pub fn flat(pieces: &[Piece]) -> Vec<u8> {
        let mut out = Vec::new();
        for piece in pieces {
            match piece {
                Piece::Bytes(bytes) => out.extend_from_slice(bytes),
                Piece::File(HostFile { file, len, .. }) => {
                    let start = out.len();
                    out.resize(start + *len as usize, 0);
                    file.read_exact_at(&mut out[start..], 0).unwrap();
                }
            }
        }
        out
    }

    type Read1 = (u32, u32, u32, (u32, u32), Vec<u8>);

    /// Returns mode, links, inode, device and content of each name.
    fn read_back(pieces: &[Piece]) -> BTreeMap<String, Read1> {
        let bytes = flat(pieces);
        assert_eq!(bytes.len() % 4, 0);
        let mut rest = &bytes[..];
        let mut entries = BTreeMap::new();
        loop {
            let mut reader = cpio::newc::Reader::new(rest).unwrap();
            let mut content = Vec::new();
            reader.read_to_end(&mut content).unwrap();
            let entry = reader.entry();
            assert_eq!((entry.uid(), entry.gid()), (0, 0));
            let device = (entry.rdev_major(), entry.rdev_minor());
            let (name, trailer) = (entry.name().to_string(), entry.is_trailer());
            let all = (entry.mode(), entry.nlink(), entry.ino(), device, content);
            rest = reader.finish().unwrap();
            if trailer {
                return entries;
            }
            entries.insert(name, all);
        }
    }

    #[test]
    fn a_folder_comes_back_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at("usr/bin")).unwrap();
        fs::write(at("usr/bin/small"), "x").unwrap();
        fs::set_permissions(at("usr/bin/small"), fs::Permissions::from_mode(0o4755)).unwrap();
        fs::write(at("usr/large"), vec![7; 50_001]).unwrap();
        fs::hard_link(at("usr/large"), at("usr/other-name")).unwrap();
        symlink("usr/bin", at("bin")).unwrap();
        std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        let mut archive = Archive::new();
        archive.tree(dir.path(), Path::new("/")).unwrap();
        assert!(archive.contains(Path::new("/bin/small")) && !archive.contains(Path::new("/bin/other")));
        archive.directory(Path::new("/bin"), 0o755).unwrap();
        archive.bytes(Path::new("//bin/./sh"), 0o755, b"shell").unwrap();
        archive.device(Path::new("dev/console"), libc::S_IFCHR | 0o600, (5, 1)).unwrap();
        let entries = read_back(&archive.finish().unwrap());
        assert_eq!(
            entries.keys().collect::<Vec<_>>(),
            [
                "bin",
                "dev/",
                "dev/console",
                "usr/",
                "usr/bin/",
                "usr/bin/sh",
                "usr/bin/small",
                "usr/large",
                "usr/other-name"
            ]
        );
        assert_eq!((entries["bin"].0, &entries["bin"].4[..]), (SYMLINK | 0o777, &b"usr/bin"[..]));
        assert_eq!((entries["usr/bin/small"].0, &entries["usr/bin/small"].4[..]), (REGULAR | 0o4755, &b"x"[..]));
        assert_eq!((entries["dev/"].0, entries["dev/console"].3), (DIRECTORY | 0o755, (5, 1)));
        let (large, other) = (&entries["usr/large"], &entries["usr/other-name"]);
        assert_eq!((large.1, large.2), (2, other.2), "one inode with two links");
        assert_eq!([large.4.len(), other.4.len()].iter().sum::<usize>(), 50_001, "its content comes once");
    }

    #[test]
    fn paths_that_cannot_be_are_refused() {
        let mut archive = Archive::new();
        archive.bytes(Path::new("/file"), 0o644, b"").unwrap();
        archive.directory(Path::new("/dir"), 0o755).unwrap();
        let mut said = |path: &str| archive.bytes(Path::new(path), 0o644, b"").unwrap_err().to_string();
        assert_eq!(said("/a/../b"), "cannot pack anything at /a/../b: '..' may lead out of the archive");
        assert_eq!(said("/file/x"), "cannot pack anything at /file/x: its parent is not a directory");
        assert_eq!(said("/dir"), "cannot pack anything at /dir: a directory already exists there");
        assert_eq!(said("./"), "cannot pack anything at /: this is the root directory");
        assert!(said("TRAILER!!!").ends_with("this name marks the end of an archive"));
        assert!(said("a\0b").ends_with("the path contains a NUL byte"));
        assert!(said(&"x/".repeat(3000)).ends_with("the path is too long"));
        symlink_loops_end(archive);
    }

    fn symlink_loops_end(mut archive: Archive) {
        archive.symlink(Path::new("/one"), Path::new("two")).unwrap();
        archive.symlink(Path::new("/two"), Path::new("/one")).unwrap();
        assert!(!archive.contains(Path::new("/one/x")));
    }

    #[test]
    fn files_that_shrink_and_archives_that_grow_too_large_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let large = |len| {
            File::create(&path).unwrap().set_len(len).unwrap();
            HostFile::open(&path).unwrap()
        };
        let mut archive = Archive::new();
        let file = large(5 << 30);
        assert!(matches!(archive.file(Path::new("/a"), 0o644, file), Err(Error::TooLarge)));
        archive.file(Path::new("/a"), 0o644, large(3 << 30)).unwrap();
        assert!(matches!(archive.file(Path::new("/b"), 0o644, large(3 << 30)), Err(Error::TooLarge)));

        let small = large(100);
        File::create(&path).unwrap();
        let error = Archive::new().file(Path::new("/a"), 0o644, small).unwrap_err();
        assert!(error.to_string().starts_with("cannot pack ") && matches!(error, Error::Host { .. }), "{error}");
        let ram = GuestRam::anonymous(16 << 20);
        let piece = Piece::File(large(1 << 20));
        File::create(&path).unwrap().set_len(1 << 19).unwrap();
        let error = piece.load(&ram, 1 << 20).unwrap_err();
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert_eq!(cause, "it has shrunk; it had 1048576 bytes when it was opened");
    }

    proptest! {
        #[test]
        fn names_and_sizes_of_every_kind_come_back(files in proptest::collection::btree_map(
            "[a-zA-Z0-9 ._+é-]{1,9}(/[a-z]{1,3}x){0,3}", 0usize..40_000, 1..8)) {
            let dir = tempfile::tempdir().unwrap();
            let mut archive = Archive::new();
            let mut wanted = BTreeMap::new();
            for (n, (name, len)) in files.into_iter().enumerate() {
                let name = format!("{n}{name}");
                let path = dir.path().join(n.to_string());
                let content = vec![n as u8 + 1; len];
                fs::write(&path, &content).unwrap();
                archive.file(Path::new(&name), 0o640, HostFile::open(&path).unwrap()).unwrap();
                wanted.insert(name, content);
            }
            let entries = read_back(&archive.finish().unwrap());
            let got: BTreeMap<_, _> = entries.into_iter().filter(|(name, _)| !name.ends_with('/'))
                .map(|(name, entry)| (name, entry.4)).collect();
            prop_assert_eq!(got, wanted);
        }
    }
}
