//! Terminals of both sides.

use crate::c;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

pub(crate) fn open_pty() -> io::Result<(OwnedFd, OwnedFd)> {
    let (mut master, mut terminal) = (0, 0);
    // SAFETY: openpty writes two descriptors, which have no other owner; the other arguments may be null.
    unsafe {
        if c::openpty(&mut master, &mut terminal, std::ptr::null_mut(), std::ptr::null(), std::ptr::null()) < 0 {
            return Err(io::Error::last_os_error());
        }
        c::fcntl(master, c::F_SETFD, c::FD_CLOEXEC);
        c::fcntl(terminal, c::F_SETFD, c::FD_CLOEXEC);
        Ok((OwnedFd::from_raw_fd(master), OwnedFd::from_raw_fd(terminal)))
    }
}

pub(crate) fn set_window_size(fd: RawFd, rows: u16, columns: u16) {
    let size = c::winsize { ws_row: rows, ws_col: columns, ..Default::default() };
    // SAFETY: TIOCSWINSZ reads one winsize.
    unsafe { c::ioctl(fd, c::TIOCSWINSZ, &size) };
}

pub(crate) fn window_size() -> Option<(u16, u16)> {
    [0, 1, 2].into_iter().find_map(|fd| {
        let mut size = c::winsize::default();
        // SAFETY: TIOCGWINSZ writes one winsize.
        (unsafe { c::ioctl(fd, c::TIOCGWINSZ, &mut size) } == 0).then_some((size.ws_row, size.ws_col))
    })
}

pub(crate) fn terminal_mode(fd: RawFd) -> Option<c::termios> {
    let mut mode = c::termios::default();
    // SAFETY: tcgetattr writes one termios.
    (unsafe { c::tcgetattr(fd, &mut mode) } == 0).then_some(mode)
}

/// Raw mode of the client's terminal, for as long as this value lives: every key goes to the command. Dropping it
/// restores the terminal.
pub(crate) struct Raw(c::termios);

impl Raw {
    pub(crate) fn enter() -> Option<Raw> {
        let mode = terminal_mode(0)?;
        let mut raw = mode;
        // SAFETY: both only read and write the termios given. In the background the second would stop us with SIGTTOU.
        unsafe {
            c::signal(c::SIGTTOU, c::SIG_IGN);
            c::cfmakeraw(&mut raw);
            c::tcsetattr(0, c::TCSADRAIN, &raw);
        }
        Some(Raw(mode))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // SAFETY: only reads the termios given.
        unsafe { c::tcsetattr(0, c::TCSADRAIN, &self.0) };
    }
}
