//! The host's terminal: raw mode, which is undone however vireo ends, and the Ctrl-A escapes.
//!
//! Raw mode is undone when [`RawMode`] is dropped, and by the handlers of panics and fatal signals, which call
//! [`restore`].

#![allow(unsafe_code)]

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::{io, mem, ptr};

/// The terminal's settings before raw mode, static so that signal handlers can reach them.
static mut SAVED: mem::MaybeUninit<libc::termios> = mem::MaybeUninit::uninit();
static TERMINAL: AtomicI32 = AtomicI32::new(-1);
static IS_RAW: AtomicBool = AtomicBool::new(false);

/// Returns true if `fd` is a terminal.
pub fn is_terminal(fd: RawFd) -> bool {
    // SAFETY: isatty only looks at the descriptor.
    unsafe { libc::isatty(fd) == 1 }
}

/// Columns and rows of the terminal `fd`, if it is a terminal and knows its size.
pub fn window_size(fd: RawFd) -> Option<(u16, u16)> {
    // SAFETY: the structure is plain numbers, for which zeros are valid, and the kernel writes no further than its end.
    unsafe {
        let mut size: libc::winsize = mem::zeroed();
        let known = libc::ioctl(fd, libc::TIOCGWINSZ, &mut size) == 0 && size.ws_col > 0 && size.ws_row > 0;
        known.then_some((size.ws_col, size.ws_row))
    }
}

/// Returns true if `fd` is this process's controlling terminal and another job is in the foreground, so that reading
/// from the terminal or changing it would stop us.
pub fn in_background(fd: RawFd) -> bool {
    // SAFETY: both calls only look at the descriptor and the process, and may be made in a signal handler.
    let (owner, us) = unsafe { (libc::tcgetpgrp(fd), libc::getpgrp()) };
    owner >= 0 && owner != us
}

/// A terminal in raw mode while this process is in its foreground. Dropping it restores the terminal. At most one
/// exists per process.
pub struct RawMode(());

impl RawMode {
    /// Takes over the terminal `fd`. Returns `None` if `fd` is not a terminal, or if one is taken over already.
    pub fn enter(fd: RawFd) -> io::Result<Option<Self>> {
        if !is_terminal(fd) || TERMINAL.load(Ordering::Acquire) >= 0 {
            return Ok(None);
        }
        TERMINAL.store(fd, Ordering::Release);
        let raw_mode = RawMode(());
        set_raw()?;
        Ok(Some(raw_mode))
    }

    /// Restores the user's settings for a while (before the process stops itself).
    pub fn suspend(&self) {
        restore();
    }

    /// Call this after the process was stopped and continued, as the terminal's settings may have been changed
    /// meanwhile.
    pub fn continued(&self) {
        if in_background(TERMINAL.load(Ordering::Acquire)) {
            IS_RAW.store(false, Ordering::Release);
        }
        self.refresh();
    }

    /// Sets raw mode if it is off and we are in the foreground. No event reports a move to the foreground, so call this
    /// now and then.
    pub fn refresh(&self) {
        if !IS_RAW.load(Ordering::Acquire) {
            let _ = set_raw();
        }
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
        TERMINAL.store(-1, Ordering::Release);
    }
}

/// Saves the user's settings and makes the terminal raw, unless another job owns the foreground.
fn set_raw() -> io::Result<()> {
    let fd = TERMINAL.load(Ordering::Acquire);
    if in_background(fd) {
        return Ok(());
    }
    // SAFETY: `settings` is written by tcgetattr before use. SAVED is written only by the thread that owns the RawMode,
    // and only while IS_RAW is false, when nothing reads it.
    let changed = unsafe {
        let mut settings = mem::zeroed::<libc::termios>();
        if libc::tcgetattr(fd, &mut settings) != 0 {
            return Err(io::Error::last_os_error());
        }
        (*ptr::addr_of_mut!(SAVED)).write(settings);
        libc::cfmakeraw(&mut settings);
        // Keep output post-processing: vireo's own messages end in plain newlines.
        settings.c_oflag |= libc::OPOST | libc::ONLCR;
        // Set before the change, in case a signal arrives in between: restoring unchanged settings is harmless.
        IS_RAW.store(true, Ordering::Release);
        libc::tcsetattr(fd, libc::TCSANOW, &settings) == 0
    };
    if !changed {
        IS_RAW.store(false, Ordering::Release);
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Undoes raw mode, if it is on. Calls only functions that are allowed in a signal handler.
pub fn restore() {
    let fd = TERMINAL.load(Ordering::Acquire);
    if fd >= 0 && IS_RAW.swap(false, Ordering::AcqRel) && !in_background(fd) {
        // SAFETY: SAVED was written before IS_RAW was set, and tcsetattr is async-signal-safe.
        unsafe { libc::tcsetattr(fd, libc::TCSANOW, ptr::addr_of!(SAVED).cast()) };
    }
}

/// Request that the user typed as an escape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Ctrl-A X: end the VM.
    Quit,
    /// Ctrl-A H, or Ctrl-A and an unknown key: list the escapes.
    Help,
}

/// Text that [`Command::Help`] prints.
pub const HELP: &str = "\nCtrl-A X  end the VM\nCtrl-A H  this help\nCtrl-A Ctrl-A  send Ctrl-A to the guest\n";

const CTRL_A: u8 = 1;

/// Finds escapes in typed input.
#[derive(Default)]
pub struct Escapes {
    pending: bool,
}

impl Escapes {
    /// Appends the bytes meant for the guest to `guest` and returns the first command, dropping all input after it.
    pub fn filter(&mut self, input: &[u8], guest: &mut Vec<u8>) -> Option<Command> {
        for byte in input {
            match (mem::take(&mut self.pending), byte) {
                (false, &CTRL_A) => self.pending = true,
                (false, byte) => guest.push(*byte),
                (true, &CTRL_A) => guest.push(CTRL_A),
                (true, b'x' | b'X') => return Some(Command::Quit),
                (true, _) => return Some(Command::Help),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes() {
        let mut escapes = Escapes::default();
        let mut guest = Vec::new();
        assert_eq!(escapes.filter(b"ls\x01", &mut guest), None);
        assert_eq!(escapes.filter(b"\x01x\x01h", &mut guest), Some(Command::Help));
        assert_eq!(guest, b"ls\x01x");
        assert_eq!(escapes.filter(b"\x01", &mut guest), None);
        assert_eq!(escapes.filter(b"xyz", &mut guest), Some(Command::Quit));
        assert_eq!(guest, b"ls\x01x");
    }

    #[test]
    fn no_terminal_is_no_error() {
        let (reader, _writer) = io::pipe().unwrap();
        assert!(RawMode::enter(std::os::fd::AsRawFd::as_raw_fd(&reader)).unwrap().is_none());
    }
}
