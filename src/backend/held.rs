//! Files that the user named, held for the life of the process.
//!
//! A guest with a writable folder can replace the files in it, and a guest that hung is started again: by then the same
//! path may lead to another file. Therefore, before the first guest runs, each path is opened without access to the
//! file's content (O_PATH), and every later opening of that path opens that file. This state is global because a path
//! that the user typed means one file throughout the process.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use rustix::fs::{Mode, OFlags};

use super::place::{Input, WritableFolders, descriptor_path, find_input};

static HELD: RwLock<Held> = RwLock::new(Held::new());

struct Held {
    /// True if paths are opened again or lie where a guest can change them.
    is_needed: bool,
    folders: WritableFolders,
    files: Vec<(PathBuf, Input)>,
}

/// Remembers which folders the guest will be able to write to; from then on files are kept. `again` is true if the
/// guest may be started again. Without restarts and writable folders, files need not be kept.
pub fn begin(folders: WritableFolders, again: bool) {
    change(|held| held.begin(folders, again));
}

/// Returns the folders that the guest can write to.
pub fn folders() -> WritableFolders {
    HELD.read().unwrap_or_else(PoisonError::into_inner).folders.clone()
}

/// Keeps the file that `path` leads to now. A path that cannot be opened is skipped: the code that needs the file
/// reports the error. Fails only for a link that a guest may have created.
pub fn keep(path: &Path) -> io::Result<()> {
    change(|held| held.keep(path))
}

/// Keeps the base image at `path`, which the image at `image` names. A guest that can write to an image can write any
/// name into it, as it can create a link; so a base outside the guest's folders is then an error, too.
pub fn keep_base(image: &Path, path: &Path) -> io::Result<()> {
    change(|held| held.keep_base(image, path))
}

/// Gives up the file that was kept for `path`, so that another process can keep it.
pub fn forget(path: &Path) {
    change(|held| held.files.retain(|(name, _)| name != path));
}

/// Keeps the file that was just created at `path` and opened, like [`keep`].
pub fn keep_new(path: &Path, file: &File) {
    change(|held| held.keep_new(path, file));
}

/// Returns a path that opens the file to which `path` led when it was kept; `path` itself if it was not kept.
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
        match find_input(path, &self.folders) {
            Ok(input) if input.magic => {}
            Ok(input) => self.files.push((path.into(), input)),
            Err(e) if e.raw_os_error().is_none() => return Err(e),
            Err(_) => {}
        }
        Ok(())
    }

    fn keep_base(&mut self, image: &Path, path: &Path) -> io::Result<()> {
        let folder = self.files.iter().find(|(name, _)| name == image).and_then(|(_, input)| input.folder.clone());
        if let Some(folder) = folder
            && find_input(path, &self.folders)?.folder.is_none()
        {
            return Err(io::Error::other(format!(
                "it is not in {}, where the guest can write its name into {}; keep that image in another folder",
                folder.display(),
                image.display()
            )));
        }
        self.keep(path)
    }

    fn keep_new(&mut self, path: &Path, file: &File) {
        if self.keeps(path)
            && let Ok(file) = rustix::fs::open(descriptor_path(file), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        {
            self.files.push((path.into(), Input { file, folder: None, magic: false }));
        }
    }

    /// Returns true if a path must be kept and is not yet.
    fn keeps(&self, path: &Path) -> bool {
        let new = !self.files.iter().any(|(name, _)| name == path);
        self.is_needed && new && Path::new("/proc/self/fd").exists()
    }

    fn path(&self, path: &Path) -> PathBuf {
        let kept = self.files.iter().find(|(name, _)| name == path);
        kept.map_or_else(|| path.into(), |(_, input)| descriptor_path(&input.file))
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

    #[test]
    fn an_image_that_a_guest_writes_to_names_no_base_elsewhere() {
        let dir = tempfile::tempdir().unwrap();
        let [inside, outside] = ["inside", "outside"].map(|name| dir.path().join(name));
        for folder in [&inside, &outside] {
            fs::create_dir(folder).unwrap();
            ["image", "base"].iter().for_each(|name| fs::write(folder.join(name), "").unwrap());
        }
        let mut held = Held::new();
        held.keep_base(&inside.join("image"), &outside.join("base")).unwrap();
        held.begin(WritableFolders::new([inside.as_path()]), false);
        let images = [inside.join("image"), outside.join("image")];
        images.iter().for_each(|image| held.keep(image).unwrap());
        let refused = |held: &mut Held, base: &Path| held.keep_base(&images[0], base).unwrap_err().to_string();
        for base in [outside.join("base"), inside.join("../outside/base"), "/proc/self/fd/0".into(), "/".into()] {
            assert!(refused(&mut held, &base).contains("it is not in "), "{}", base.display());
            assert_eq!(held.path(&base), base);
        }
        let missing = held.keep_base(&images[0], &inside.join("missing")).unwrap_err();
        assert_eq!(missing.raw_os_error(), Some(libc::ENOENT));
        for (image, base) in [(&images[0], inside.join("base")), (&images[1], outside.join("base"))] {
            held.keep_base(image, &base).unwrap();
            assert_ne!(held.path(&base), base);
        }
        held.keep_base(&images[1], &inside.join("base")).unwrap();
    }
}
