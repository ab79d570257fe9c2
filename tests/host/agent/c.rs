//! The few functions, types and numbers of glibc on x86-64 that the agent needs, declared by hand, so that a plain
//! rustc builds it and no package is compiled a second time for it. The names are libc's.

#![allow(non_camel_case_types)]

use std::ffi::{c_char, c_int, c_ulong, c_void};

pub(crate) type sighandler_t = usize;

/// `struct winsize` of ioctl_tty(2).
#[repr(C)]
#[derive(Default)]
pub(crate) struct winsize {
    pub(crate) ws_row: u16,
    pub(crate) ws_col: u16,
    pub(crate) ws_xpixel: u16,
    pub(crate) ws_ypixel: u16,
}

/// `struct termios` of glibc, termios(3).
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct termios {
    pub(crate) c_iflag: u32,
    pub(crate) c_oflag: u32,
    pub(crate) c_cflag: u32,
    pub(crate) c_lflag: u32,
    pub(crate) c_line: u8,
    pub(crate) c_cc: [u8; 32],
    pub(crate) c_ispeed: u32,
    pub(crate) c_ospeed: u32,
}

/// `sigset_t` of glibc: 1024 bits.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct sigset_t([u64; 16]);

pub(crate) const F_SETFD: c_int = 2;
pub(crate) const F_DUPFD_CLOEXEC: c_int = 1030;
pub(crate) const FD_CLOEXEC: c_int = 1;
pub(crate) const ICANON: u32 = 2;
pub(crate) const MNT_DETACH: c_int = 2;
pub(crate) const MS_BIND: c_ulong = 4096;
pub(crate) const O_WRONLY: c_int = 1;
pub(crate) const O_CLOEXEC: c_int = 0o2_000_000;
pub(crate) const RB_POWER_OFF: c_int = 0x4321_fedc;
pub(crate) const RTC_RD_TIME: c_ulong = 0x8024_7009;
pub(crate) const SIG_BLOCK: c_int = 0;
pub(crate) const SIG_IGN: sighandler_t = 1;
pub(crate) const SIGHUP: c_int = 1;
pub(crate) const SIGINT: c_int = 2;
pub(crate) const SIGQUIT: c_int = 3;
pub(crate) const SIGUSR1: c_int = 10;
pub(crate) const SIGUSR2: c_int = 12;
pub(crate) const SIGTERM: c_int = 15;
pub(crate) const SIGTTOU: c_int = 22;
pub(crate) const SIGWINCH: c_int = 28;
pub(crate) const TCSADRAIN: c_int = 1;
pub(crate) const TIOCSCTTY: c_ulong = 0x540e;
pub(crate) const TIOCGWINSZ: c_ulong = 0x5413;
pub(crate) const TIOCSWINSZ: c_ulong = 0x5414;

unsafe extern "C" {
    pub(crate) fn cfmakeraw(mode: *mut termios);
    pub(crate) fn fcntl(fd: c_int, command: c_int, ...) -> c_int;
    pub(crate) fn fork() -> c_int;
    pub(crate) fn ioctl(fd: c_int, request: c_ulong, ...) -> c_int;
    pub(crate) fn kill(pid: c_int, signal: c_int) -> c_int;
    pub(crate) fn mount(
        source: *const c_char,
        target: *const c_char,
        kind: *const c_char,
        flags: c_ulong,
        data: *const c_void,
    ) -> c_int;
    pub(crate) fn open(path: *const c_char, flags: c_int, ...) -> c_int;
    pub(crate) fn openpty(
        master: *mut c_int,
        terminal: *mut c_int,
        name: *mut c_char,
        mode: *const termios,
        size: *const winsize,
    ) -> c_int;
    pub(crate) fn pthread_sigmask(how: c_int, set: *const sigset_t, old: *mut sigset_t) -> c_int;
    pub(crate) fn reboot(command: c_int) -> c_int;
    pub(crate) fn setsid() -> c_int;
    pub(crate) fn sigaddset(set: *mut sigset_t, signal: c_int) -> c_int;
    pub(crate) fn signal(signal: c_int, handler: sighandler_t) -> sighandler_t;
    pub(crate) fn sigwait(set: *const sigset_t, signal: *mut c_int) -> c_int;
    pub(crate) fn sync();
    pub(crate) fn tcgetattr(fd: c_int, mode: *mut termios) -> c_int;
    pub(crate) fn tcsetattr(fd: c_int, when: c_int, mode: *const termios) -> c_int;
    pub(crate) fn umount2(target: *const c_char, flags: c_int) -> c_int;
    pub(crate) fn waitpid(pid: c_int, status: *mut c_int, options: c_int) -> c_int;
    pub(crate) fn write(fd: c_int, bytes: *const c_void, count: usize) -> isize;
}
