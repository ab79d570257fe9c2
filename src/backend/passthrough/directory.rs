//! The entries of a directory, as the kernel gives them: many at a time, each with a position to go on from.

use std::ffi::CString;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;

use rustix::fs::{FileType, RawDir, SeekFrom, seek};

/// Bytes of entries that are read at once.
const BYTES: usize = 32 << 10;

/// A name in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// The file's number, or that of a directory that something is mounted on.
    pub ino: u64,
    /// Where the next entry is.
    pub next: u64,
    /// What it is, where the file system says so here.
    pub kind: FileType,
    /// `.` and `..` too.
    pub name: CString,
}

/// Goes to a position that an entry had in `next`, or 0, the beginning.
pub fn seek_entries(dir: impl AsFd, position: u64) -> io::Result<()> {
    seek(dir, SeekFrom::Start(position))?;
    Ok(())
}

/// The next entries; none at the end.
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
