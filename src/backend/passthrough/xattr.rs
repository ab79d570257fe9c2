//! Extended attributes. The guest sees those of users, those that only root may set and on which stacked file systems
//! or programs depend, and access control lists if the guest supports them. It does not see those that only concern the
//! host, such as security labels.

use std::ffi::CStr;
use std::io;

use rustix::fs::{self, XattrFlags};
use rustix::io::Errno;

use super::Node;

/// Maximum size of a list of names, the kernel's own limit (XATTR_LIST_MAX).
const MAX_BYTES: usize = 64 << 10;
/// Size in which most lists fit.
const FEW_BYTES: usize = 1 << 10;

/// Names of the access control list of a file, and of that for new files in a directory.
const LISTS: [&[u8]; 2] = [b"system.posix_acl_access", b"system.posix_acl_default"];

fn is_passed(name: &[u8], lists: bool) -> bool {
    let plain = name.starts_with(b"user.") || name.starts_with(b"trusted.") || name == b"security.capability";
    plain || lists && LISTS.contains(&name)
}

fn checked(name: &CStr, lists: bool) -> io::Result<&CStr> {
    if is_passed(name.to_bytes(), lists) { Ok(name) } else { Err(Errno::OPNOTSUPP.into()) }
}

/// Operations on extended attributes. In all of them, `lists` also admits access control lists.
impl Node {
    /// Fills `value` with an attribute's value and returns its length; if `value` is empty, only returns the length.
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

    /// Sets an attribute, with the flags of setxattr(2).
    pub fn set_xattr(&self, name: &CStr, value: &[u8], flags: u32, lists: bool) -> io::Result<()> {
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        Ok(fs::setxattr(self.path()?, checked(name, lists)?, value, flags)?)
    }

    /// Removes an attribute.
    pub fn remove_xattr(&self, name: &CStr, lists: bool) -> io::Result<()> {
        Ok(fs::removexattr(self.path()?, checked(name, lists)?)?)
    }

    /// Returns the names of all attributes, each followed by a NUL.
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

    /// Returns true if new files in this directory get an access control list instead of obeying the umask.
    pub fn has_default_acl(&self) -> bool {
        self.path().is_ok_and(|path| fs::getxattr_query(path, c"system.posix_acl_default").is_ok_and(|len| len > 0))
    }
}
