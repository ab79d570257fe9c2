//! Detection of guest events from the text of its console.

use crate::guest_event::{GuestEvent, GuestEvents, PanicSource};

/// Reads the console's output for the few lines of a Linux kernel that report what no other source does. A program in
/// the guest can print these lines too, so events found here are attributed to the console.
pub struct ConsoleWatch {
    line: Vec<u8>,
    seen_byte: bool,
    events: GuestEvents,
}

/// Longest line that is examined; all texts of interest are at the beginning of a line.
const LINE_MAX: usize = 128;

impl ConsoleWatch {
    /// Creates a watch that posts its findings to `events`.
    pub fn new(events: GuestEvents) -> Self {
        ConsoleWatch { line: Vec::with_capacity(LINE_MAX), seen_byte: false, events }
    }

    /// Examines the next bytes of the console.
    pub fn scan(&mut self, bytes: &[u8]) {
        if !self.seen_byte && !bytes.is_empty() {
            self.seen_byte = true;
            self.events.post(GuestEvent::ConsoleFirstByte);
        }
        for byte in bytes {
            match byte {
                b'\r' => {}
                b'\n' => {
                    self.judge();
                    self.line.clear();
                }
                byte if self.line.len() < LINE_MAX => self.line.push(*byte),
                _ => {}
            }
        }
    }

    fn judge(&self) {
        let text = without_timestamp(&self.line);
        if is_panic(text) {
            self.events.post(GuestEvent::Panicked(PanicSource::Console));
        } else if text.starts_with(b"---[ end Kernel panic - not syncing") {
            self.events.post(GuestEvent::PanicEnded);
        } else if is_restart(text) {
            self.events.post(GuestEvent::Restarting);
        } else if text.starts_with(b"Run /") && text.ends_with(b" as init process") {
            self.events.post(GuestEvent::InitStarted);
        }
    }
}

/// Returns true if a kernel reports with this line that it panicked.
fn is_panic(text: &[u8]) -> bool {
    text.starts_with(b"Kernel panic - not syncing")
}

/// Returns true if a kernel reports with this line that it is about to restart the machine.
fn is_restart(text: &[u8]) -> bool {
    text.starts_with(b"reboot: Restarting system") || text.starts_with(b"sysrq: Resetting")
}

/// Last message of a kernel that then reset the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LastWords {
    /// The kernel panicked.
    Panic,
    /// The kernel was asked to restart.
    Restart,
}

impl LastWords {
    /// Interprets the last lines of a kernel's log. A panic counts even if the kernel restarts after it.
    pub fn of<'a>(lines: impl IntoIterator<Item = &'a str>) -> Option<LastWords> {
        let word = |line: &'a str| match without_timestamp(line.as_bytes()) {
            text if is_panic(text) => Some(LastWords::Panic),
            text if is_restart(text) => Some(LastWords::Restart),
            _ => None,
        };
        lines.into_iter().filter_map(word).reduce(|a, b| if a == LastWords::Panic { a } else { b })
    }
}

/// Strips printk's `[    1.234567] `, and a caller id like `[T1]` or `[    T1]` after it.
fn without_timestamp(mut line: &[u8]) -> &[u8] {
    while let Some(rest) = line.strip_prefix(b"[") {
        let Some(end) = rest.iter().position(|b| *b == b']') else { break };
        let inside_is_stamp = rest[..end].iter().all(|b| matches!(b, b'0'..=b'9' | b'.' | b' ' | b'T' | b'C'));
        if end == 0 || !inside_is_stamp {
            break;
        }
        line = rest[end + 1..].trim_ascii_start();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_words_of_a_log() {
        let of = |lines: &[&str]| LastWords::of(lines.iter().copied());
        let restart = "[    4.000000] reboot: Restarting system";
        assert_eq!(
            of(&["[    1.0] init: first", restart, "[    4.1] reboot: machine restart"]),
            Some(LastWords::Restart)
        );
        assert_eq!(of(&["[    4.0][    T1] sysrq: Resetting"]), Some(LastWords::Restart));
        let panic = "[    3.000000] Kernel panic - not syncing: VFS";
        assert_eq!(of(&[panic, "[    3.1] Rebooting in 1 seconds.."]), Some(LastWords::Panic));
        assert_eq!(of(&[panic, restart]), Some(LastWords::Panic));
        assert_eq!(of(&["[    1.0] said: reboot: Restarting system", ""]), None);
    }

    fn events_of(text: &str) -> Vec<GuestEvent> {
        let events = GuestEvents::new().unwrap();
        let mut watch = ConsoleWatch::new(events.clone());
        // Byte by byte, as a UART sends.
        text.as_bytes().iter().for_each(|b| watch.scan(&[*b]));
        std::iter::from_fn(|| events.take()).skip(1).collect()
    }

    #[test]
    fn tell_tale_lines_are_found() {
        let panicked = GuestEvent::Panicked(PanicSource::Console);
        assert_eq!(events_of("[    0.512345] Kernel panic - not syncing: VFS\r\n"), [panicked]);
        assert_eq!(events_of("[    0.5][    T1] Kernel panic - not syncing: VFS\n"), [panicked]);
        assert_eq!(events_of("Kernel panic - not syncing: VFS\n"), [panicked]);
        assert_eq!(events_of("[   29.1] sysrq: Resetting\n"), [GuestEvent::Restarting]);
        assert_eq!(events_of("[ 1.0] ---[ end Kernel panic - not syncing: VFS ]---\n"), [GuestEvent::PanicEnded]);
        assert_eq!(events_of("[ 1.0] reboot: Restarting system\n"), [GuestEvent::Restarting]);
        assert_eq!(events_of("[ 1.0] Run /init as init process\n"), [GuestEvent::InitStarted]);
        assert_eq!(events_of("he said: Kernel panic - not syncing\n[x] Kernel panic - not syncing\n"), []);
        assert_eq!(events_of(&format!("{}\n[[[[]]]\n[", "x".repeat(100_000))), []);
    }
}
