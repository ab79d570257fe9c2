//! Extended attributes. Those of users, those that only root may set and that file systems on top of this one or programs
//! in it live by, and access control lists for a guest that knows them. Not those that mean something to the host alone:
//! its labels.

use std::ffi::CStr;
use std::io;

use rustix::fs::{self, XattrFlags};
use rustix::io::Errno;

use super::Node;

/// The kernel's own limit of a list of names (XATTR_LIST_MAX).
const MAX_BYTES: usize = 64 << 10;
/// What most lists have room in.
const FEW_BYTES: usize = 1 << 10;

/// An access control list, and that of new files in a directory.
const LISTS: [&[u8]; 2] = [b"system.posix_acl_access", b"system.posix_acl_default"];

fn is_passed(name: &[u8], lists: bool) -> bool {
    let plain = name.starts_with(b"user.") || name.starts_with(b"trusted.") || name == b"security.capability";
    plain || lists && LISTS.contains(&name)
}

fn checked(name: &CStr, lists: bool) -> io::Result<&CStr> {
    if is_passed(name.to_bytes(), lists) { Ok(name) } else { Err(Errno::OPNOTSUPP.into()) }
}

/// In all of these, `lists` has access control lists count too.
impl Node {
    /// Fills `value` with an attribute's value and returns its length; without room for anything only that.
    pub fn xattr(&self, name: &CStr, value: &mut [u8], lists: bool) -> io::Result<usize> {
        let name = checked(name, lists)?;
        if self.is_closed() {
            return Err(Errno::NODATA.into());
        }
        if value.is_empty() {
            return Ok(fs::getxattr_query(self.path()?, name)?);
        }
        Ok(fs::getxattr(self.path()?, name, value)?)
    }

    /// Sets one, by the flags of setxattr(2).
    pub fn set_xattr(&self, name: &CStr, value: &[u8], flags: u32, lists: bool) -> io::Result<()> {
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        Ok(fs::setxattr(self.path()?, checked(name, lists)?, value, flags)?)
    }

    /// Takes one away.
    pub fn remove_xattr(&self, name: &CStr, lists: bool) -> io::Result<()> {
        Ok(fs::removexattr(self.path()?, checked(name, lists)?)?)
    }

    /// The names there are, each with a NUL behind it.
    pub fn xattr_names(&self, lists: bool) -> io::Result<Vec<u8>> {
        if self.is_closed() {
            return Ok(Vec::new());
        }
        let mut names = vec![0; FEW_BYTES];
        let len = match fs::listxattr(self.path()?, names.as_mut_slice()) {
            Err(Errno::RANGE) => {
                names.resize(MAX_BYTES, 0);
                fs::listxattr(self.path()?, names.as_mut_slice())?
            }
            len => len?,
        };
        let all = names.get(..len).unwrap_or(&[]).split_inclusive(|byte| *byte == 0);
        Ok(all.filter(|name| is_passed(name.strip_suffix(b"\0").unwrap_or(name), lists)).flatten().copied().collect())
    }

    /// Whether new files in this directory get an access control list rather than what the umask leaves.
    pub fn has_default_acl(&self) -> bool {
        self.path().is_ok_and(|path| fs::getxattr_query(path, c"system.posix_acl_default").is_ok_and(|len| len > 0))
    }
}
