//! Programs that are rebuilt while the emulated host runs.

use crate::c;
use std::collections::HashMap;
use std::ffi::{CString, OsString};
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// Copies of rebuilt programs, which keep them from running as a mixture of old and new. While some process runs a
/// program from 9p, Linux keeps its name and its pages and checks neither again. So programs run from copies in memory,
/// mounted over their own paths: a file read (not mapped) through 9p is always current.
pub(crate) struct Programs {
    /// Folders where files change, each with the path where it is mounted a second time without the copies.
    folders: Vec<(PathBuf, PathBuf)>,
    stamps: HashMap<PathBuf, String>,
}

impl Programs {
    const COPIES: &str = "/run/programs";

    pub(crate) fn new() -> io::Result<Programs> {
        let mut folders = Vec::new();
        for (n, folder) in fs::read_to_string("/run/fresh")?.lines().enumerate() {
            let beneath = PathBuf::from(format!("/run/beneath/{n}"));
            fs::create_dir_all(&beneath)?;
            bind(folder.as_ref(), &beneath)?;
            folders.push((folder.into(), beneath));
        }
        fs::create_dir_all(Self::COPIES)?;
        Ok(Programs { folders, stamps: HashMap::new() })
    }

    pub(crate) fn refresh(&mut self, programs: &[(Vec<u8>, String)]) {
        for (path, stamp) in programs {
            let path = PathBuf::from(OsString::from_vec(path.clone()));
            if self.stamps.get(&path) == Some(stamp) {
                continue;
            }
            match self.copy(&path) {
                Ok(true) => drop(self.stamps.insert(path, stamp.clone())),
                Ok(false) => {}
                Err(error) => println!("host-agent: {} may be old: {error}", path.display()),
            }
        }
    }

    fn copy(&self, path: &Path) -> io::Result<bool> {
        let beneath = |(folder, beneath): &(PathBuf, PathBuf)| Some(beneath.join(path.strip_prefix(folder).ok()?));
        let Some(present) = self.folders.iter().find_map(beneath) else {
            return Ok(false); // the system's own programs stay as they are
        };
        let copy = Path::new(Self::COPIES).join("new");
        let _ = fs::remove_file(&copy);
        io::copy(&mut File::open(&present)?, &mut File::create(&copy)?)?;
        fs::set_permissions(&copy, fs::metadata(&present)?.permissions())?;
        if self.stamps.contains_key(path) {
            let target = CString::new(path.as_os_str().as_bytes())?;
            // SAFETY: reads one string. Processes that run the former copy keep it.
            unsafe { c::umount2(target.as_ptr(), c::MNT_DETACH) };
        }
        bind(&copy, path)?;
        fs::remove_file(&copy)?; // the mount keeps it
        Ok(true)
    }
}

fn bind(from: &Path, to: &Path) -> io::Result<()> {
    let (from, to) = (CString::new(from.as_os_str().as_bytes())?, CString::new(to.as_os_str().as_bytes())?);
    let null = std::ptr::null();
    // SAFETY: reads two strings; a bind mount takes neither a type nor data.
    match unsafe { c::mount(from.as_ptr(), to.as_ptr(), null, c::MS_BIND, null.cast()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
