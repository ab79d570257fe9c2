//! As whom files are made. A thread has a user and group for files of its own (setfsuid(2)), so that one can make a file
//! that belongs to somebody else from its first moment.

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

/// What this process may do about owners.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identity {
    /// It is root: files are made for whoever they shall belong to.
    Root,
    /// It is an ordinary user, to whom all belongs that it makes.
    User,
}

impl Identity {
    /// Finds out.
    pub fn of_process() -> Self {
        let needed = CapabilitySet::SETUID | CapabilitySet::SETGID | CapabilitySet::DAC_OVERRIDE;
        let able = capabilities(None).is_ok_and(|sets| sets.effective.contains(needed));
        if able && geteuid().is_root() { Identity::Root } else { Identity::User }
    }

    /// Does something, like making a file, that gives it to `owner` if we can. Whether the owner might do it is not
    /// asked: who calls this has done that.
    pub fn make_as<T>(self, owner: Owner, make: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let own = Owner { uid: geteuid().as_raw(), gid: getegid().as_raw() };
        if self == Identity::User || owner == own {
            return make();
        }
        set_ids(owner)
            .and_then(|()| {
                // Gone with the user id 0. Not so CAP_FSETID, that a set-group-id bit is judged as for the owner.
                let sets = capabilities(None)?;
                set_capabilities(None, sets.with(CapabilitySet::DAC_OVERRIDE))?;
                make()
            })
            .also(|| set_ids(own))
    }

    /// Does something, like writing, after which the set-user-id bit is gone as it would be for an ordinary user.
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

/// More of the effective set, as far as permitted.
trait With {
    fn with(self, more: CapabilitySet) -> Self;
}

impl With for CapabilitySets {
    fn with(self, more: CapabilitySet) -> Self {
        CapabilitySets { effective: self.effective | (more & self.permitted), ..self }
    }
}

/// Something that must be done afterwards, whatever came out.
trait Also {
    fn also(self, then: impl FnOnce() -> io::Result<()>) -> Self;
}

impl<T> Also for io::Result<T> {
    fn also(self, then: impl FnOnce() -> io::Result<()>) -> Self {
        then().and(self)
    }
}

/// This thread's ids for files.
#[allow(unsafe_code)]
fn set_ids(Owner { uid, gid }: Owner) -> io::Result<()> {
    // All ones asks and sets nothing; no file can belong to them either.
    if uid == u32::MAX || gid == u32::MAX {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: these system calls take numbers and concern nothing but this thread's ids. They tell no error; what is
    // set is asked for.
    let set = unsafe {
        libc::setfsgid(gid);
        libc::setfsuid(uid);
        (libc::setfsuid(u32::MAX) as u32, libc::setfsgid(u32::MAX) as u32)
    };
    // Ids that this user namespace does not have.
    if set == (uid, gid) { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EINVAL)) }
}

thread_local! {
    static OWN_UMASK: Cell<bool> = const { Cell::new(false) };
}

/// Gives this thread a umask of its own, of 0, so that files are made with the mode that a guest asks for. Not every
/// container permits that; then the process's umask applies.
#[allow(unsafe_code)]
pub fn take_own_umask() {
    // SAFETY: no descriptors are unshared, only umask, root and working directory.
    if unsafe { unshare_unsafe(UnshareFlags::FS) }.is_ok() {
        umask(Mode::empty());
        OWN_UMASK.set(true);
    }
}

/// Returns whether this thread has a umask of its own.
pub fn has_own_umask() -> bool {
    OWN_UMASK.get()
}

/// Makes a file under this umask, which a directory's default access control list overrides; in a thread that has its own.
pub fn with_umask<T>(mask: u32, make: impl FnOnce() -> T) -> T {
    if mask == 0 || !has_own_umask() {
        return make();
    }
    umask(Mode::from_bits_truncate(mask & 0o777));
    let made = make();
    umask(Mode::empty());
    made
}

/// Has a write beyond `ulimit -f` fail, for this thread, instead of ending the process by SIGXFSZ.
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
