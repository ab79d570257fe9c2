//! Programs that vireo starts.

use std::io;
use std::os::fd::RawFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Makes the program receive signals normally. vireo blocks signals and reads them from a descriptor; a program it
/// starts would inherit the signal mask and never receive SIGTERM.
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

/// Makes the kernel kill the program when the thread that started it ends, for whatever reason.
#[allow(unsafe_code)]
pub fn die_with_us(command: &mut Command) {
    before_exec(command, || {
        // SAFETY: this prctl takes a number and touches no memory.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    });
}

/// Makes the program inherit no descriptors except stdin, stdout and stderr; not even those that vireo itself
/// inherited. (Before Linux 5.11 the call fails, and the program gets vireo's inherited descriptors.)
#[allow(unsafe_code)]
pub fn inherit_nothing(command: &mut Command) {
    before_exec(command, || {
        // SAFETY: the call takes numbers. It only marks descriptors for exec; they all stay open in this process.
        unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    });
}

/// Makes the program inherit the descriptor `fd` of this process under the same number.
#[allow(unsafe_code)]
pub fn inherit(command: &mut Command, fd: RawFd) {
    let keep = move || -> io::Result<()> {
        // SAFETY: this fcntl takes two numbers and touches no memory.
        match unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    };
    // SAFETY: the only call between fork and exec is async-signal-safe and allocates nothing.
    unsafe { command.pre_exec(keep) };
}

/// Runs `calls` in the child between fork and exec. They must be system calls only, and must not allocate.
#[allow(unsafe_code)]
fn before_exec(command: &mut Command, calls: fn()) {
    let calls = move || -> io::Result<()> {
        calls();
        Ok(())
    };
    // SAFETY: all calls between fork and exec are async-signal-safe and allocate nothing.
    unsafe { command.pre_exec(calls) };
}

/// Gives every other process precedence for the processor, and for the disk too (SCHED_IDLE implies that).
#[allow(unsafe_code)]
pub fn have_lowest_priority() {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the call reads one structure of ours and changes only this thread's priority; later threads inherit it.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const parameters) };
}

/// Closes all descriptors except stdin, stdout and stderr. Call it only at the start of a process, before the process
/// has opened anything itself. (Fails before Linux 5.9.)
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
        let other = rustix::io::dup(&file).unwrap(); // without CLOEXEC, like the descriptors that this process inherits
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
