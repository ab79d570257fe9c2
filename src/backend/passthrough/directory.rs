//! Entries of a directory as the kernel returns them: many at a time, each with the position of the next.

use std::ffi::CString;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;

use rustix::fs::{FileType, RawDir, SeekFrom, seek};

/// Number of bytes of entries read in one call.
const BYTES: usize = 32 << 10;

/// Entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// Inode number of the file; for a mount point, that of the directory below the mount.
    pub ino: u64,
    /// Position of the next entry.
    pub next: u64,
    /// Type of the file, if the file system reports it here.
    pub kind: FileType,
    /// Name of the entry, which may be `.` or `..`.
    pub name: CString,
}

/// Moves to a position: the `next` of an entry, or 0 for the beginning.
pub fn seek_entries(dir: impl AsFd, position: u64) -> io::Result<()> {
    seek(dir, SeekFrom::Start(position))?;
    Ok(())
}

/// Returns the next entries; none at the end.
pub fn read_entries(dir: impl AsFd) -> io::Result<Vec<DirEntry>> {
    let mut buffer = vec![MaybeUninit::uninit(); BYTES];
    let mut raw = RawDir::new(dir, &mut buffer);
    let mut entries = Vec::new();
    while let Some(entry) = raw.next() {
        let entry = entry?;
        let (ino, next) = (entry.ino(), entry.next_entry_cookie());
        entries.push(DirEntry { ino, next, kind: entry.file_type(), name: entry.file_name().to_owned() });
        if raw.is_buffer_empty() {
            break;
        }
    }
    Ok(entries)
}
