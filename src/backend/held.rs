//! Files that the user named, kept for the life of the process.
//!
//! A guest with a writable folder can exchange what lies in it, and a guest that hung is started again: the same path
//! may by then lead to another file. So before the first guest runs, what each path leads to is opened as a mere name
//! (O_PATH), and every later opening of that path is one of that file. This belongs to the process, as what a user types
//! means one file for all of it.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use rustix::fs::{Mode, OFlags};

use super::place::{WritableFolders, descriptor_path, name_input_again};

static HELD: RwLock<Held> = RwLock::new(Held::new());

struct Held {
    /// Paths are opened again, or lie where a guest changes them.
    is_needed: bool,
    folders: WritableFolders,
    files: Vec<(PathBuf, OwnedFd)>,
}

/// Remembers which folders the guest will be able to write to; from then on files are kept. `again` says whether the guest
/// may be started again: without that and without folders there is nothing to keep them from.
pub fn begin(folders: WritableFolders, again: bool) {
    change(|held| held.begin(folders, again));
}

/// The folders that the guest can write to.
pub fn folders() -> WritableFolders {
    HELD.read().unwrap_or_else(PoisonError::into_inner).folders.clone()
}

/// Keeps what `path` leads to now. What cannot be opened is left to whoever needs it and has a sentence for that; an
/// error is a link that a guest may have made.
pub fn keep(path: &Path) -> io::Result<()> {
    change(|held| held.keep(path))
}

/// Keeps what was just made at `path` and opened, like [`keep`].
pub fn keep_new(path: &Path, file: &File) {
    change(|held| held.keep_new(path, file));
}

/// The path by which to open what `path` led to when it was kept; `path` itself if it was not.
pub fn path(path: &Path) -> PathBuf {
    HELD.read().unwrap_or_else(PoisonError::into_inner).path(path)
}

fn change<T>(change: impl FnOnce(&mut Held) -> T) -> T {
    change(&mut HELD.write().unwrap_or_else(PoisonError::into_inner))
}

impl Held {
    const fn new() -> Self {
        Held { folders: WritableFolders::none(), is_needed: false, files: Vec::new() }
    }

    fn begin(&mut self, folders: WritableFolders, again: bool) {
        self.is_needed = again || !folders.is_empty();
        self.folders = folders;
    }

    fn keep(&mut self, path: &Path) -> io::Result<()> {
        if !self.keeps(path) {
            return Ok(());
        }
        match name_input_again(path, &self.folders) {
            Ok(Some(file)) => self.files.push((path.into(), file)),
            Ok(None) => {}
            Err(e) if e.raw_os_error().is_none() => return Err(e),
            Err(_) => {}
        }
        Ok(())
    }

    fn keep_new(&mut self, path: &Path, file: &File) {
        if self.keeps(path)
            && let Ok(file) = rustix::fs::open(descriptor_path(file), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        {
            self.files.push((path.into(), file));
        }
    }

    /// Returns whether a path should be kept and is not yet.
    fn keeps(&self, path: &Path) -> bool {
        let new = !self.files.iter().any(|(name, _)| name == path);
        self.is_needed && new && Path::new("/proc/self/fd").exists()
    }

    fn path(&self, path: &Path) -> PathBuf {
        let kept = self.files.iter().find(|(name, _)| name == path);
        kept.map_or_else(|| path.into(), |(_, file)| descriptor_path(file))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_kept_file_is_the_same_under_another_name_and_after_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let name = dir.path().join("disk");
        fs::write(&name, "first").unwrap();
        let mut held = Held::new();
        held.keep(&name).unwrap();
        assert_eq!(held.path(&name), name, "nothing changes it");
        held.begin(WritableFolders::none(), true);
        held.keep(&name).unwrap();
        fs::rename(&name, dir.path().join("aside")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &name).unwrap();
        assert_eq!(fs::read_to_string(held.path(&name)).unwrap(), "first");
        fs::remove_file(dir.path().join("aside")).unwrap();
        held.keep(&name).unwrap();
        assert_eq!(fs::read_to_string(held.path(&name)).unwrap(), "first");
        let new = dir.path().join("missing");
        held.keep(&new).unwrap();
        assert_eq!(held.path(&new), new);
        held.keep_new(&new, &File::create(&new).unwrap());
        assert_ne!(held.path(&new), new);
        held.keep(Path::new("/proc/self/exe")).unwrap();
        assert_eq!(held.path(Path::new("/proc/self/exe")), Path::new("/proc/self/exe"));
    }

    #[test]
    fn a_link_out_of_a_guest_s_folder_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        std::os::unix::fs::symlink("/etc/passwd", &disk).unwrap();
        let mut held = Held::new();
        held.begin(WritableFolders::new([dir.path()]), false);
        let other_name = Path::new("/proc/self/root").join(disk.strip_prefix("/").unwrap());
        for path in [&disk, &other_name] {
            assert!(held.keep(path).unwrap_err().to_string().contains("leads out of it"), "{path:?}");
        }
        assert_eq!(held.path(&disk), disk);
    }
}
