//! Host paths that are resolved once: a path that the user typed is followed once, and from then on the file is a name
//! in a directory that is held open. Whatever happens to the directories and links on the path, the name stays in that
//! directory, and a link that appears under the name itself is never followed.
//!
//! A guest that can write to a shared folder ([`WritableFolders`]) can plant links there, for this run or for the next
//! one. Therefore links in such a folder are not followed, not even by [`Place::find`]; the user must name their target
//! instead.

use std::ffi::{CStr, OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, PROC_SUPER_MAGIC, Stat, fstat, fstatfs, openat, readlinkat, statat};
use rustix::fs::{CWD, mkdirat, unlinkat};
use rustix::io::Errno;

use super::mounts::Location;

/// Maximum number of links followed on the way to one file; Linux's own limit.
const MAX_LINKS: usize = 40;
/// Flags of a descriptor that only names a directory.
const DIRECTORY: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// Identity of a file: equal for all its names. All nodes of a block device have the same identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileId {
    dev: u64,
    ino: u64,
    block_device: Option<u64>,
}

impl FileId {
    /// Identity of the file that `stat` describes.
    pub fn of(stat: &Stat) -> Self {
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::BlockDevice => FileId { dev: 0, ino: 0, block_device: Some(stat.st_rdev) },
            _ => FileId { dev: stat.st_dev, ino: stat.st_ino, block_device: None },
        }
    }
}

/// Shared folders that a guest can write to.
#[derive(Clone, Debug, Default)]
pub struct WritableFolders(Vec<Folder>);

#[derive(Clone, Debug)]
struct Folder {
    /// As the user named it.
    path: PathBuf,
    id: FileId,
    /// The folder and what is mounted beneath it.
    locations: Vec<Location>,
}

impl Folder {
    fn open(path: &Path) -> io::Result<Self> {
        let dir = openat(CWD, path, DIRECTORY, Mode::empty())?;
        let beneath = Location::mounted_beneath(dir.as_fd());
        let locations = Location::of(dir.as_fd()).into_iter().chain(beneath).collect();
        Ok(Folder { path: path.into(), id: FileId::of(&fstat(&dir)?), locations })
    }
}

impl WritableFolders {
    /// Creates an empty set.
    pub const fn none() -> Self {
        WritableFolders(Vec::new())
    }

    /// Collects the `paths` that exist. For the others, opening them as shares fails later and reports the error.
    pub fn new<'a>(paths: impl IntoIterator<Item = &'a Path>) -> Self {
        WritableFolders(paths.into_iter().filter_map(|path| Folder::open(path).ok()).collect())
    }

    /// Returns true if there are no folders.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the folder that `dir` is, or lies in, as the user named it; also if a bind mount gives a part of the
    /// folder another name.
    pub fn containing(&self, dir: BorrowedFd<'_>) -> Option<&Path> {
        if self.is_empty() {
            return None;
        }
        self.among_parents(dir).or_else(|| {
            let here = Location::of(dir)?;
            let lies_in = |folder: &&Folder| folder.locations.iter().any(|location| location.contains(&here));
            self.0.iter().find(lies_in).map(|folder| folder.path.as_path())
        })
    }

    fn among_parents(&self, dir: BorrowedFd<'_>) -> Option<&Path> {
        let mut here = openat(dir, c".", DIRECTORY, Mode::empty()).ok();
        let mut below = None;
        while let Some(dir) = here {
            let id = FileId::of(&fstat(&dir).ok()?);
            if let Some(folder) = self.0.iter().find(|folder| folder.id == id) {
                return Some(&folder.path);
            }
            // The root is its own parent.
            if below.replace(id) == Some(id) {
                return None;
            }
            here = openat(&dir, c"..", DIRECTORY, Mode::empty()).ok();
        }
        None
    }
}

/// A name in a directory that is held open.
#[derive(Clone, Debug)]
pub struct Place {
    dir: Arc<OwnedFd>,
    name: OsString,
    /// Path as the user typed it.
    path: PathBuf,
    /// True if the name is one of procfs's links, which lead to files rather than to names.
    magic: bool,
}

/// Treatment of a link that is the last component of a path.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Last {
    Followed,
    Kept,
}

impl Place {
    /// Finds the place that `path` leads to, following the links that exist now. The file itself need not exist.
    pub fn find(path: &Path, folders: &WritableFolders) -> io::Result<Self> {
        Walk::new(path, folders)?.end(Last::Followed)?.place(path)
    }

    /// Like [`Place::find`], but does not follow a link under the last name: the place then holds that link.
    pub fn find_new(path: &Path, folders: &WritableFolders) -> io::Result<Self> {
        Walk::new(path, folders)?.end(Last::Kept)?.place(path)
    }

    /// Finds the place of the path `below` an open directory, whose name is for messages. Links are followed only if they
    /// lead to files beneath the directory, and those in a guest's folders as [`name_input`] does.
    pub fn beneath(top: (BorrowedFd<'_>, &Path), below: &Path, folders: &WritableFolders) -> io::Result<Self> {
        let (top, path) = top;
        if below.components().any(|step| !matches!(step, Component::Normal(_) | Component::CurDir)) {
            return Err(io::Error::other(format!("{} leads out of {}", below.display(), path.display())));
        }
        let dir = openat(top, c".", DIRECTORY, Mode::empty())?;
        let mut walk = Walk { dir, rest: Vec::new(), links: 0, folders, within: true, through: None };
        walk.add(below)?;
        let end = walk.end(Last::Followed)?.checked(folders)?;
        let only = Folder { path: path.into(), id: FileId::of(&fstat(top)?), locations: Vec::new() };
        if WritableFolders(vec![only]).among_parents(end.dir.as_fd()).is_none() {
            return Err(io::Error::other(format!("a symbolic link leads out of {}", path.display())));
        }
        let name = end.name.map_or_else(|| ".".into(), |(name, _)| name);
        Ok(Place::within(end.dir, name, path.join(below)))
    }

    /// Creates the place `name` in a directory; `path` is its path in messages.
    pub fn within(dir: OwnedFd, name: OsString, path: PathBuf) -> Self {
        Place { dir: dir.into(), name, path, magic: false }
    }

    /// Returns the place with `suffix` appended to its name.
    pub fn with_suffix(&self, suffix: &str) -> Self {
        let longer = |text: &OsStr| {
            let mut text = text.to_os_string();
            text.push(suffix);
            text
        };
        let path = PathBuf::from(longer(self.path.as_os_str()));
        Place { dir: self.dir.clone(), name: longer(&self.name), path, magic: false }
    }

    /// Path as the user typed it, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Directory, and the name in it.
    pub fn parts(&self) -> (BorrowedFd<'_>, &OsStr) {
        (self.dir.as_fd(), &self.name)
    }

    /// Identity of the directory, and the name in it. Two places have equal keys exactly if they are the same.
    pub fn key(&self) -> io::Result<(FileId, OsString)> {
        Ok((FileId::of(&fstat(&self.dir)?), self.name.clone()))
    }

    /// Returns the status of the file that is there now; `None` if there is none.
    pub fn stat(&self) -> io::Result<Option<Stat>> {
        let flags = if self.magic { AtFlags::empty() } else { AtFlags::SYMLINK_NOFOLLOW };
        match statat(&self.dir, &self.name, flags) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Identity of the file that is there now.
    pub fn id(&self) -> Option<FileId> {
        self.stat().ok().flatten().map(|stat| FileId::of(&stat))
    }

    /// Opens the file, or creates it with `mode` if `flags` say so. A link is an error.
    pub fn open(&self, flags: OFlags, mode: Mode) -> io::Result<File> {
        let follow = if self.magic { OFlags::empty() } else { OFlags::NOFOLLOW };
        Ok(openat(&self.dir, &self.name, flags | follow | OFlags::CLOEXEC | OFlags::NOCTTY, mode)?.into())
    }

    /// Opens the file only if it is of this `kind`: opening another kind might block or trigger an action of a device.
    /// Without /proc there are no shared folders, so nothing can replace the file between the check and the opening.
    pub fn open_kind(&self, kind: FileType, flags: OFlags) -> io::Result<File> {
        let named = self.name_kind(kind)?;
        match rustix::fs::open(descriptor_path(&named), flags | OFlags::CLOEXEC | OFlags::NOCTTY, Mode::empty()) {
            Err(Errno::NOENT | Errno::NOTDIR) => self.open(flags, Mode::empty()),
            result => Ok(result?.into()),
        }
    }

    /// Opens a descriptor that only names the file, which must be of this `kind`.
    pub fn name_kind(&self, kind: FileType) -> io::Result<OwnedFd> {
        let named = self.open(OFlags::PATH, Mode::empty())?;
        match FileType::from_raw_mode(fstat(&named)?.st_mode) {
            found if found == kind => Ok(named.into()),
            FileType::Symlink => Err(io::Error::other("it is now a symbolic link, which is not followed")),
            _ => Err(io::Error::other("it is now another kind of file")),
        }
    }

    /// Removes the file if it still is the file `id`.
    pub fn remove_if(&self, id: FileId) -> io::Result<()> {
        if self.id() == Some(id) { self.remove() } else { Ok(()) }
    }

    /// Removes the file; a directory stays.
    pub fn remove(&self) -> io::Result<()> {
        Ok(unlinkat(&self.dir, &self.name, AtFlags::empty())?)
    }

    /// Returns the writable folder that the place lies in.
    pub fn folder<'a>(&self, folders: &'a WritableFolders) -> Option<&'a Path> {
        folders.containing(self.dir.as_fd())
    }
}

/// Returns the path by which this process reaches an open descriptor's file.
pub fn descriptor_path(fd: &impl AsRawFd) -> PathBuf {
    format!("/proc/self/fd/{}", fd.as_raw_fd()).into()
}

/// Opens the file that an input's path leads to, without access to its content (O_PATH), so that it stays this file
/// whatever happens to the path. Links in a writable folder may lead to files that the guest can reach anyway, but not
/// out of the folders.
pub fn name_input(path: &Path, folders: &WritableFolders) -> io::Result<OwnedFd> {
    input_end(path, folders)?.name_file()
}

/// File that an input's path leads to.
#[derive(Debug)]
pub struct Input {
    /// A mere name for it, as of [`name_input`].
    pub file: OwnedFd,
    /// The writable folder that it lies in.
    pub folder: Option<PathBuf>,
    /// The path is one of procfs's links, which lead to what this process has open already.
    pub magic: bool,
}

/// Does the same as [`name_input`] for a path that may be used again.
pub fn find_input(path: &Path, folders: &WritableFolders) -> io::Result<Input> {
    let end = input_end(path, folders)?;
    let folder = folders.containing(end.dir.as_fd()).map(Path::to_path_buf);
    Ok(Input { file: end.name_file()?, folder, magic: matches!(end.name, Some((_, true))) })
}

fn input_end(path: &Path, folders: &WritableFolders) -> io::Result<End> {
    let mut walk = Walk::new(path, folders)?;
    walk.within = true;
    walk.end(Last::Followed)?.checked(folders)
}

/// Opens the directory that `path` leads to by the rules of [`name_input`], without access to its content. Creates it and its
/// parents where they are missing, and only where these rules allow the path to lead.
pub fn make_directory(path: &Path, folders: &WritableFolders) -> io::Result<OwnedFd> {
    let path: PathBuf = path.components().collect();
    let (mut here, mut missing) = (path.as_path(), Vec::new());
    let mut dir = loop {
        match name_input(here, folders) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => missing.push(here.file_name().ok_or(e)?),
            found => break found?,
        }
        here = here.parent().filter(|above| !above.as_os_str().is_empty()).unwrap_or(Path::new("."));
    };
    for name in missing.into_iter().rev() {
        match mkdirat(&dir, name, Mode::from_bits_retain(0o777)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(e.into()),
        }
        dir = openat(&dir, name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty())?;
    }
    Ok(openat(&dir, c".", DIRECTORY, Mode::empty())?)
}

/// Walk along a path.
struct Walk<'a> {
    dir: OwnedFd,
    /// Components still to be walked, the next one at the end.
    rest: Vec<OsString>,
    links: usize,
    folders: &'a WritableFolders,
    /// Follows links in writable folders and records them in `through`, rather than refusing them.
    within: bool,
    through: Option<PathBuf>,
}

/// Result of a walk along a path.
struct End {
    dir: OwnedFd,
    /// Name in the directory, and whether it is one of procfs's links; `None` if the path leads to the directory
    /// itself.
    name: Option<(OsString, bool)>,
    /// Writable folder that contained a link on the path.
    through: Option<PathBuf>,
}

impl End {
    /// Opens what the path led to, as a mere name.
    fn name_file(&self) -> io::Result<OwnedFd> {
        let (name, follow) = match &self.name {
            Some((name, true)) => (name.as_os_str(), OFlags::empty()),
            Some((name, false)) => (name.as_os_str(), OFlags::NOFOLLOW),
            None => (OsStr::new("."), OFlags::empty()),
        };
        Ok(openat(&self.dir, name, OFlags::PATH | OFlags::CLOEXEC | follow, Mode::empty())?)
    }

    fn place(self, path: &Path) -> io::Result<Place> {
        let (name, magic) = self.name.ok_or(io::ErrorKind::IsADirectory)?;
        Ok(Place { dir: self.dir.into(), name, path: path.into(), magic })
    }

    /// Fails if a link that a guest may have created leads out of the guest's folders.
    fn checked(self, folders: &WritableFolders) -> io::Result<Self> {
        let out = |_: &&PathBuf| folders.containing(self.dir.as_fd()).is_none();
        match self.through.as_ref().filter(out) {
            Some(folder) => Err(io::Error::other(format!(
                "a symbolic link in {}, where the guest can create links, leads out of it; name its target instead",
                folder.display()
            ))),
            None => Ok(self),
        }
    }
}

impl<'a> Walk<'a> {
    fn new(path: &Path, folders: &'a WritableFolders) -> io::Result<Self> {
        match path.as_os_str().as_bytes() {
            [] => Err(Errno::NOENT.into()),
            [.., b'/'] if path.file_name().is_some() && !path.is_dir() => Err(Errno::NOTDIR.into()),
            _ => {
                let (dir, rest) = (directory(c".")?, Vec::new());
                let mut walk = Walk { dir, rest, links: 0, folders, within: false, through: None };
                walk.add(path)?;
                Ok(walk)
            }
        }
    }

    /// Puts a path, or a link's target, before the remaining components.
    fn add(&mut self, path: &Path) -> io::Result<()> {
        if path.is_absolute() {
            self.dir = directory(c"/")?;
        }
        let steps = path.components().filter(|step| matches!(step, Component::Normal(_) | Component::ParentDir));
        let steps: Vec<_> = steps.map(|step| step.as_os_str().to_os_string()).collect();
        self.rest.extend(steps.into_iter().rev());
        Ok(())
    }

    fn end(mut self, last: Last) -> io::Result<End> {
        while let Some(name) = self.rest.pop() {
            let is_last = self.rest.is_empty();
            if name == ".." {
                self.dir = openat(&self.dir, name, DIRECTORY, Mode::empty())?;
                continue;
            }
            if is_last && last == Last::Kept {
                return Ok(End { dir: self.dir, name: Some((name, false)), through: self.through });
            }
            let target = match readlinkat(&self.dir, &name, Vec::new()) {
                Ok(target) => Some(target),
                Err(Errno::INVAL) => None,
                Err(Errno::NOENT) if is_last => None,
                Err(e) => return Err(e.into()),
            };
            // Only the kernel creates links in procfs, and their texts are not always paths.
            let magic = target.is_some() && fstatfs(&self.dir)?.f_type == PROC_SUPER_MAGIC;
            match target.filter(|_| !magic) {
                Some(target) => self.follow(&name, Path::new(OsStr::from_bytes(target.as_bytes())))?,
                None if is_last => {
                    return Ok(End { dir: self.dir, name: Some((name, magic)), through: self.through });
                }
                None => {
                    let follow = if magic { OFlags::empty() } else { OFlags::NOFOLLOW };
                    self.dir = openat(&self.dir, name, DIRECTORY | follow, Mode::empty())?;
                }
            }
        }
        Ok(End { dir: self.dir, name: None, through: self.through })
    }

    fn follow(&mut self, name: &OsStr, target: &Path) -> io::Result<()> {
        self.links += 1;
        if self.links > MAX_LINKS {
            return Err(Errno::LOOP.into());
        }
        match self.folders.containing(self.dir.as_fd()) {
            Some(folder) if !self.within => {
                return Err(io::Error::other(format!(
                    "'{}' is a symbolic link in {}, where the guest can create links; name its target instead",
                    name.display(),
                    folder.display()
                )));
            }
            Some(folder) => self.through = Some(folder.into()),
            None => {}
        }
        self.add(target)
    }
}

fn directory(path: &CStr) -> io::Result<OwnedFd> {
    Ok(openat(CWD, path, DIRECTORY, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    /// Creates a folder with `inside`, which a guest can write to, and `outside`, which it cannot.
    fn folders() -> (tempfile::TempDir, [PathBuf; 2], WritableFolders) {
        let dir = tempfile::tempdir().unwrap();
        let paths = ["inside", "outside"].map(|name| dir.path().join(name));
        paths.iter().for_each(|path| fs::create_dir(path).unwrap());
        let folders = WritableFolders::new([paths[0].as_path()]);
        (dir, paths, folders)
    }

    #[test]
    fn a_place_stays_in_its_directory() {
        let (_dir, [inside, outside], folders) = folders();
        let sub = inside.join("sub");
        fs::create_dir(&sub).unwrap();
        let place = Place::find(&sub.join("file"), &folders).unwrap();
        assert_eq!(place.folder(&folders), Some(inside.as_path()));
        // Changes that a guest makes in the meantime.
        fs::rename(&sub, inside.join("moved")).unwrap();
        symlink(&outside, &sub).unwrap();
        symlink(outside.join("victim"), inside.join("moved/file")).unwrap();
        let error = place.open(OFlags::WRONLY | OFlags::CREATE, Mode::RUSR).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ELOOP));
        assert!(place.name_kind(FileType::RegularFile).unwrap_err().to_string().contains("a symbolic link"));
        place.remove().unwrap();
        drop(place.open(OFlags::WRONLY | OFlags::CREATE, Mode::RUSR).unwrap());
        assert!(inside.join("moved/file").is_file());
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    }

    #[test]
    fn links_are_followed_unless_a_guest_may_have_made_them() {
        let (dir, [inside, outside], folders) = folders();
        let found = |path: &Path| Place::find(path, &folders).map(|place| place.key().unwrap());
        let plain = found(&outside.join("new")).unwrap();
        symlink("outside", dir.path().join("link")).unwrap();
        assert_eq!(found(&dir.path().join("link/new")).unwrap(), plain);
        symlink("link/../outside/new", dir.path().join("last")).unwrap();
        assert_eq!(found(&dir.path().join("last")).unwrap(), plain);
        let kept = Place::find_new(&dir.path().join("last"), &folders).unwrap();
        assert_ne!(kept.key().unwrap(), plain);
        symlink(dir.path().join("last"), inside.join("planted")).unwrap();
        symlink(&outside, inside.join("sub")).unwrap();
        symlink(inside.join("sub"), outside.join("way-in")).unwrap();
        for path in [inside.join("planted"), inside.join("sub/new"), outside.join("way-in/new")] {
            let refused = found(&path).unwrap_err().to_string();
            assert!(refused.contains("is a symbolic link in ") && refused.contains("inside"), "{refused}");
        }
        symlink("round", dir.path().join("round")).unwrap();
        assert_eq!(found(&dir.path().join("round")).unwrap_err().raw_os_error(), Some(libc::ELOOP));
        for (path, error) in [("", libc::ENOENT), ("/", libc::EISDIR), ("/nonexistent/", libc::ENOTDIR)] {
            let found = found(Path::new(path)).unwrap_err();
            assert_eq!(found.kind(), io::Error::from_raw_os_error(error).kind(), "{path}");
        }
    }

    #[test]
    fn inputs_may_be_links_within_a_folder() {
        let (_dir, [inside, outside], folders) = folders();
        let id = |fd: OwnedFd| FileId::of(&fstat(&fd).unwrap());
        let name = |path: &Path| name_input(path, &folders).map(id);
        fs::write(inside.join("kernel"), "1").unwrap();
        fs::write(outside.join("secret"), "2").unwrap();
        symlink("kernel", inside.join("good")).unwrap();
        symlink("../outside/secret", inside.join("bad")).unwrap();
        symlink("..", inside.join("dir")).unwrap();
        symlink(inside.join("kernel"), outside.join("to-kernel")).unwrap();
        let kernel = name(&inside.join("kernel")).unwrap();
        assert_eq!(name(&inside.join("good")).unwrap(), kernel);
        assert_eq!(name(&outside.join("to-kernel")).unwrap(), kernel);
        assert_eq!(name(&inside.join("dir/inside/kernel")).unwrap(), kernel);
        for path in ["bad", "dir/outside/secret", "dir"] {
            let refused = name(&inside.join(path)).unwrap_err().to_string();
            assert!(refused.contains("leads out of it"), "{path}: {refused}");
        }
        assert_eq!(name(&inside.join("missing")).unwrap_err().raw_os_error(), Some(libc::ENOENT));
        assert!(name(Path::new("/")).is_ok() && name(Path::new(".")).is_ok());
    }

    #[test]
    fn directories_are_made_only_where_no_planted_link_leads() {
        let (dir, [inside, outside], folders) = folders();
        symlink("../outside", inside.join("planted")).unwrap();
        symlink("../outside/dangling", inside.join("gone")).unwrap();
        symlink("outside", dir.path().join("link")).unwrap();
        for path in ["planted", "planted/new", "planted/new/deep", "gone", "gone/new"] {
            let refused = make_directory(&inside.join(path), &folders).unwrap_err().to_string();
            assert!(refused.contains("leads out of it"), "{path}: {refused}");
        }
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
        symlink("a", inside.join("good")).unwrap();
        for (path, made) in [
            (inside.join("a"), inside.join("a")),
            (inside.join("good/b/c/"), inside.join("a/b/c")),
            (dir.path().join("link/x/y"), outside.join("x/y")),
            (dir.path().join("./new/"), dir.path().join("new")),
        ] {
            for _ in 0..2 {
                let found = fstat(make_directory(&path, &folders).unwrap()).unwrap();
                assert_eq!(FileId::of(&found), FileId::of(&rustix::fs::stat(&made).unwrap()), "{}", path.display());
            }
        }
        fs::write(inside.join("file"), "").unwrap();
        for path in ["file", "file/new"] {
            let error = make_directory(&inside.join(path), &folders).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ENOTDIR), "{path}");
        }
        assert_eq!(make_directory(Path::new(""), &folders).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn what_is_beneath_a_folder_stays_there() {
        let (dir, [inside, outside], folders) = folders();
        fs::create_dir_all(inside.join("usr/lib")).unwrap();
        fs::write(inside.join("usr/lib/file"), "1").unwrap();
        fs::write(outside.join("file"), "2").unwrap();
        symlink("usr/lib", inside.join("lib")).unwrap();
        symlink(inside.join("lib/file"), inside.join("absolute")).unwrap();
        symlink("../inside/usr", inside.join("and-back")).unwrap();
        symlink("../outside/file", inside.join("out")).unwrap();
        symlink(&outside, inside.join("dir")).unwrap();
        symlink("..", inside.join("up")).unwrap();
        let open = |path: &Path| File::open(path).unwrap();
        let beneath = |top: &File, below: &str, folders: &WritableFolders| {
            Place::beneath((top.as_fd(), "top".as_ref()), below.as_ref(), folders)
        };
        let (top, none) = (open(&inside), WritableFolders::none());
        let id = Place::find(&inside.join("usr/lib/file"), &none).unwrap().id();
        for good in ["usr/lib/file", "lib/file", "absolute", "and-back/lib/file", "./lib/file"] {
            let place = beneath(&top, good, &none).unwrap();
            assert_eq!((place.id(), place.path()), (id, Path::new("top").join(good).as_path()), "{good}");
        }
        for directory in ["", "lib", "usr"] {
            beneath(&top, directory, &none).unwrap().name_kind(FileType::Directory).unwrap();
        }
        for bad in ["out", "dir", "dir/file", "up", "up/outside/file", "../outside/file", "/etc/passwd"] {
            let refused = beneath(&top, bad, &none).unwrap_err().to_string();
            assert!(refused.contains("out of top"), "{bad}: {refused}");
        }
        assert!(beneath(&top, "lib/missing", &none).unwrap().stat().unwrap().is_none());
        // A folder above a guest's does not open it.
        let above = open(dir.path());
        assert!(beneath(&above, "inside/out", &none).is_ok() && beneath(&above, "inside/lib", &folders).is_ok());
        assert!(beneath(&above, "inside/out", &folders).unwrap_err().to_string().contains("leads out of it"));
    }

    #[test]
    fn only_what_is_still_the_same_is_removed() {
        let (_dir, [inside, _], folders) = folders();
        let place = Place::find_new(&inside.join("socket"), &folders).unwrap();
        fs::write(inside.join("socket"), "").unwrap();
        let id = place.id().unwrap();
        fs::rename(inside.join("socket"), inside.join("kept")).unwrap();
        fs::write(inside.join("socket"), "another").unwrap();
        place.remove_if(id).unwrap();
        assert!(inside.join("socket").exists());
        fs::rename(inside.join("kept"), inside.join("socket")).unwrap();
        place.remove_if(id).unwrap();
        assert!(!inside.join("socket").exists());
    }
}
