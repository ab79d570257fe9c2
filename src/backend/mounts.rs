//! Location of directories in their file systems, whichever mounts show them.
//!
//! A directory beneath a shared folder may have a second name by a bind mount, and by that name it is not beneath the folder:
//! its parents lead elsewhere. In its file system it has one path only (proc_pid_mountinfo(5)).

use std::ffi::OsString;
use std::fs;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use super::place::descriptor_path;

/// A directory in a file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    /// Numbers of the file system's device, as mountinfo prints them.
    device: String,
    path: PathBuf,
}

/// A line of mountinfo.
struct Mount {
    id: u64,
    device: String,
    root: PathBuf,
    point: PathBuf,
}

impl Location {
    /// Location of an open directory; `None` if the kernel does not say, without /proc for example.
    pub fn of(dir: BorrowedFd<'_>) -> Option<Self> {
        let fd = dir.as_raw_fd();
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).ok()?;
        let id: u64 = info.lines().find_map(|line| line.strip_prefix("mnt_id:"))?.trim().parse().ok()?;
        let path = fs::read_link(descriptor_path(&dir)).ok()?;
        let mount = mounts().into_iter().find(|mount| mount.id == id)?;
        let rest = path.strip_prefix(&mount.point).ok()?;
        Some(Location { device: mount.device, path: mount.root.join(rest) })
    }

    /// Locations of all that is mounted beneath an open directory.
    pub fn mounted_beneath(dir: BorrowedFd<'_>) -> Vec<Self> {
        let Ok(path) = fs::read_link(descriptor_path(&dir)) else { return Vec::new() };
        let beneath = mounts().into_iter().filter(|mount| mount.point.starts_with(&path) && mount.point != path);
        beneath.map(|mount| Location { device: mount.device, path: mount.root }).collect()
    }

    /// Returns whether `other` is this directory or lies beneath it.
    pub fn contains(&self, other: &Location) -> bool {
        self.device == other.device && other.path.starts_with(&self.path)
    }
}

fn mounts() -> Vec<Mount> {
    let text = fs::read("/proc/self/mountinfo").unwrap_or_default();
    text.split(|byte| *byte == b'\n').filter_map(parse).collect()
}

fn parse(line: &[u8]) -> Option<Mount> {
    let mut words = line.split(|byte| *byte == b' ');
    let text = |word: &[u8]| String::from_utf8(word.to_vec()).ok();
    let id = text(words.next()?)?.parse().ok()?;
    let device = text(words.nth(1)?)?;
    let (root, point) = (unescape(words.next()?), unescape(words.next()?));
    Some(Mount { id, device, root, point })
}

/// Path with the octal escapes of mountinfo (space, tab, newline, backslash) resolved.
fn unescape(word: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((&byte, after)) = rest.split_first() {
        let digits = after.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()).filter(|_| byte == b'\\') {
            Some(escaped) => {
                bytes.push(escaped);
                rest = after.get(3..).unwrap_or_default();
            }
            None => {
                bytes.push(byte);
                rest = after;
            }
        }
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::ffi::OsStrExt;
    use std::path::Path;

    use super::*;

    #[test]
    fn lines_are_read_with_their_escapes() {
        let mount = parse(br"36 35 98:0 /mnt1\040a /mnt2\134b rw,noatime master:1 - ext3 /dev/root rw").unwrap();
        assert_eq!((mount.id, mount.device.as_str()), (36, "98:0"));
        assert_eq!((mount.root.as_path(), mount.point.as_path()), (Path::new("/mnt1 a"), Path::new("/mnt2\\b")));
        assert!(parse(b"").is_none() && parse(b"x 1 2 3 4").is_none());
        assert_eq!(unescape(br"\9\04").as_os_str().as_bytes(), br"\9\04");
    }

    #[test]
    fn directories_are_found_in_their_file_system() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("sub")).unwrap();
        let open = |path: &Path| fs::File::open(path).unwrap();
        let (outer, inner) = (open(dir.path()), open(&dir.path().join("sub")));
        let [outer, inner] = [&outer, &inner].map(|dir| Location::of(dir.as_fd()).unwrap());
        assert!(outer.contains(&inner) && outer.contains(&outer) && !inner.contains(&outer));
        let root = open(Path::new("/"));
        assert!(!Location::mounted_beneath(root.as_fd()).is_empty());
        assert_eq!(Location::mounted_beneath(open(dir.path()).as_fd()), []);
    }
}
