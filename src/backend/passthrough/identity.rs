//! Ownership of new files. Each thread has its own user and group for file access (setfsuid(2)), so a thread can create
//! a file that belongs to another user from the first moment.

use std::cell::Cell;
use std::io;
use std::mem::MaybeUninit;

use rustix::fs::Mode;
use rustix::process::{getegid, geteuid, umask};
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags, capabilities, set_capabilities, unshare_unsafe};

/// A user and a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// Ability of this process to set owners.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identity {
    /// The process is root: it creates files for any owner.
    Root,
    /// The process belongs to an ordinary user, who owns all files that it creates.
    User,
}

impl Identity {
    /// Determines the identity of this process.
    pub fn of_process() -> Self {
        let needed = CapabilitySet::SETUID | CapabilitySet::SETGID | CapabilitySet::DAC_OVERRIDE;
        let able = capabilities(None).is_ok_and(|sets| sets.effective.contains(needed));
        if able && geteuid().is_root() { Identity::Root } else { Identity::User }
    }

    /// Calls `make`, which creates a file or the like, so that the file belongs to `owner` if possible. This does not
    /// check whether `owner` has permission to do that: the caller must have checked it.
    pub fn make_as<T>(self, owner: Owner, make: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let own = Owner { uid: geteuid().as_raw(), gid: getegid().as_raw() };
        if self == Identity::User || owner == own {
            return make();
        }
        set_ids(owner)
            .and_then(|()| {
                // The change of user id dropped this capability. CAP_FSETID stays dropped, so that the kernel treats a
                // set-group-id bit as it would for the owner.
                let sets = capabilities(None)?;
                set_capabilities(None, sets.with(CapabilitySet::DAC_OVERRIDE))?;
                make()
            })
            .also(|| set_ids(own))
    }

    /// Calls `write`, which writes a file or the like, so that it clears the set-user-id bit as for an ordinary user.
    pub fn without_fsetid<T>(self, write: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        if self == Identity::User {
            return write();
        }
        let sets = capabilities(None)?;
        let fewer = CapabilitySets { effective: sets.effective - CapabilitySet::FSETID, ..sets };
        set_capabilities(None, fewer)?;
        write().also(|| Ok(set_capabilities(None, sets)?))
    }
}

/// Extension of the effective set, as far as permitted.
trait With {
    fn with(self, more: CapabilitySet) -> Self;
}

impl With for CapabilitySets {
    fn with(self, more: CapabilitySet) -> Self {
        CapabilitySets { effective: self.effective | (more & self.permitted), ..self }
    }
}

/// Action that must follow, whatever the result is.
trait Also {
    fn also(self, then: impl FnOnce() -> io::Result<()>) -> Self;
}

impl<T> Also for io::Result<T> {
    fn also(self, then: impl FnOnce() -> io::Result<()>) -> Self {
        then().and(self)
    }
}

/// Sets this thread's ids for file access.
#[allow(unsafe_code)]
fn set_ids(Owner { uid, gid }: Owner) -> io::Result<()> {
    // An id of all ones would only query the current one; no file can belong to such an id, either.
    if uid == u32::MAX || gid == u32::MAX {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: these system calls take numbers and affect only this thread's ids. They report no errors, so the
    // resulting ids are queried.
    let set = unsafe {
        libc::setfsgid(gid);
        libc::setfsuid(uid);
        (libc::setfsuid(u32::MAX) as u32, libc::setfsgid(u32::MAX) as u32)
    };
    // The ids differ if this user namespace does not have them.
    if set == (uid, gid) { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EINVAL)) }
}

thread_local! {
    static OWN_UMASK: Cell<bool> = const { Cell::new(false) };
}

/// Gives this thread its own umask, 0, so that files are created with the mode that a guest asks for. Not every
/// container permits that; in that case the process's umask applies.
#[allow(unsafe_code)]
pub fn take_own_umask() {
    // SAFETY: no descriptors are unshared, only the umask, the root and the working directory.
    if unsafe { unshare_unsafe(UnshareFlags::FS) }.is_ok() {
        umask(Mode::empty());
        OWN_UMASK.set(true);
    }
}

/// Returns true if this thread has its own umask.
pub fn has_own_umask() -> bool {
    OWN_UMASK.get()
}

/// Calls `make` under this umask, if the thread has its own. A directory's default access control list overrides it.
pub fn with_umask<T>(mask: u32, make: impl FnOnce() -> T) -> T {
    if mask == 0 || !has_own_umask() {
        return make();
    }
    umask(Mode::from_bits_truncate(mask & 0o777));
    let made = make();
    umask(Mode::empty());
    made
}

/// Makes writes beyond `ulimit -f` fail in this thread, instead of ending the process by SIGXFSZ.
#[allow(unsafe_code)]
pub fn ignore_file_size_limit() -> io::Result<()> {
    let mut set = MaybeUninit::uninit();
    // SAFETY: the set is initialised by sigemptyset before it is used; the last argument may be null.
    let errno = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGXFSZ);
        libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut())
    };
    if errno == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(errno)) }
}
