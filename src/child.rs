//! Programs that vireo starts.

use std::io;
use std::os::fd::RawFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// This process takes its signals by descriptor and blocks them otherwise; a program that it starts would inherit that
/// and never hear of SIGTERM.
#[allow(unsafe_code)]
pub fn deliver_signals(command: &mut Command) {
    before_exec(command, || {
        // SAFETY: a zeroed sigset_t is made an empty set by sigemptyset, which only writes to it; sigprocmask reads it.
        unsafe {
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());
        }
    });
}

/// Has the program killed when the thread that starts it is no more, however that ends.
#[allow(unsafe_code)]
pub fn die_with_us(command: &mut Command) {
    before_exec(command, || {
        // SAFETY: this prctl takes a number and touches no memory.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    });
}

/// Has the program inherit no descriptors but stdin, stdout and stderr, also of those that this process has inherited.
/// (Linux before 5.11 refuses; the program then gets the latter.)
#[allow(unsafe_code)]
pub fn inherit_nothing(command: &mut Command) {
    before_exec(command, || {
        // SAFETY: the call takes numbers. It only marks descriptors for exec; all of them stay open in this process.
        unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    });
}

/// Has the program inherit a descriptor of this process, which keeps its number.
#[allow(unsafe_code)]
pub fn inherit(command: &mut Command, fd: RawFd) {
    let keep = move || -> io::Result<()> {
        // SAFETY: this fcntl takes two numbers and touches no memory.
        match unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    };
    // SAFETY: between fork and exec only a call is made that is async-signal-safe and allocates nothing.
    unsafe { command.pre_exec(keep) };
}

/// `calls` makes nothing but system calls, and allocates nothing.
#[allow(unsafe_code)]
fn before_exec(command: &mut Command, calls: fn()) {
    let calls = move || -> io::Result<()> {
        calls();
        Ok(())
    };
    // SAFETY: between fork and exec only calls are made that are async-signal-safe and allocate nothing.
    unsafe { command.pre_exec(calls) };
}

/// Lets every other process have the processor before this one, and the disk, too (SCHED_IDLE implies that).
#[allow(unsafe_code)]
pub fn have_lowest_priority() {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: it reads one structure of ours, and changes this thread's priority only; threads started later inherit it.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const parameters) };
}

/// Closes all descriptors but stdin, stdout and stderr. Only for the beginning of a process, when nothing of its own is
/// open yet. (Linux before 5.9 refuses.)
#[allow(unsafe_code)]
pub fn close_inherited() {
    // SAFETY: the call takes numbers; no value in this process owns one of these descriptors.
    unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) };
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn programs_inherit_what_they_should() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let other = rustix::io::dup(&file).unwrap(); // without CLOEXEC, as what this process inherits
        let has = |fd: RawFd, change: fn(&mut Command)| {
            let mut command = Command::new("test");
            command.args(["-e", &format!("/proc/self/fd/{fd}")]);
            change(&mut command);
            command.status().unwrap().success()
        };
        assert!(has(other.as_raw_fd(), |_| ()));
        assert!(!has(other.as_raw_fd(), inherit_nothing));
        assert!(has(1, inherit_nothing));
    }
}
