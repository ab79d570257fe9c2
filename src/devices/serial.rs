//! The first serial port: a 16550 on IRQ 4 ([`vm_superio::Serial`]), its bytes buffered on the way to the host.
//!
//! Transmitted bytes go to an [`Output`] that never refuses; what is over its limit holds up the vCPU between two
//! entries into the guest, not here. Received bytes are taken as far as the FIFO has room; when the guest has read
//! them, [`GuestEvent::ConsoleInputRoom`] asks for more, so nothing is dropped under a flood.

use std::fmt;
use std::io::{self, Write};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};

use crate::backend::output::Output;
use crate::bus::BusDevice;
use crate::event::{GuestEvent, GuestEvents, PanicSource};
use crate::irq::IrqLine;

/// `--serial`: where the first serial port leads.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum SerialConfig {
    /// Standard input and output.
    #[default]
    Stdio,
    /// Output thrown away, no input.
    Null,
    /// A new pseudo-terminal, whose name is told on stderr.
    Pty,
    /// Output written to a file, which is created or truncated; no input.
    File(PathBuf),
    /// A listening unix socket; one client at a time, output without one is thrown away.
    Socket(PathBuf),
}

impl FromStr for SerialConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, path) = text.split_once(':').map_or((text, None), |(kind, path)| (kind, Some(path)));
        match (kind, path) {
            ("stdio", None) => Ok(SerialConfig::Stdio),
            ("null", None) => Ok(SerialConfig::Null),
            ("pty", None) => Ok(SerialConfig::Pty),
            ("file", Some(path)) if !path.is_empty() => Ok(SerialConfig::File(path.into())),
            ("socket", Some(path)) if !path.is_empty() => Ok(SerialConfig::Socket(path.into())),
            _ => Err(format!("'{text}' is none of stdio, null, pty, file:PATH and socket:PATH")),
        }
    }
}

impl TryFrom<String> for SerialConfig {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<SerialConfig> for String {
    fn from(config: SerialConfig) -> String {
        config.to_string()
    }
}

impl fmt::Display for SerialConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SerialConfig::Stdio => f.write_str("stdio"),
            SerialConfig::Null => f.write_str("null"),
            SerialConfig::Pty => f.write_str("pty"),
            SerialConfig::File(path) => write!(f, "file:{}", path.display()),
            SerialConfig::Socket(path) => write!(f, "socket:{}", path.display()),
        }
    }
}

/// The serial port as a device.
pub struct SerialPort {
    uart: Mutex<Serial<Irq, InputRoom, Transmitter>>,
    room_wanted: Arc<AtomicBool>,
}

impl SerialPort {
    /// A port that raises `irq`, sends to `output` and tells `events` what its text gives away.
    pub fn new(irq: IrqLine, output: Output, events: GuestEvents) -> Self {
        let room_wanted = Arc::new(AtomicBool::new(false));
        let room = InputRoom { wanted: room_wanted.clone(), events: events.clone() };
        let transmitter = Transmitter { output, watch: ConsoleWatch::new(events) };
        SerialPort { uart: Mutex::new(Serial::with_events(Irq(irq), room, transmitter)), room_wanted }
    }

    fn lock(&self) -> MutexGuard<'_, Serial<Irq, InputRoom, Transmitter>> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the guest input and returns how many bytes it had room for. When it was not all,
    /// [`GuestEvent::ConsoleInputRoom`] tells when to try again.
    pub fn receive(&self, bytes: &[u8]) -> usize {
        let mut uart = self.lock();
        let taken = uart.enqueue_raw_bytes(bytes).unwrap_or(0);
        self.room_wanted.store(taken < bytes.len(), Ordering::Release);
        taken
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // The registers are a byte wide; a wider access reads the first and ones behind it.
        if let (Some(first), Ok(offset)) = (data.first_mut(), u8::try_from(offset)) {
            *first = self.lock().read(offset);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (Some(first), Ok(offset)) = (data.first(), u8::try_from(offset)) {
            // The output takes everything, and an eventfd that is full has an interrupt pending anyway.
            let _ = self.lock().write(offset, *first);
        }
    }
}

struct Irq(IrqLine);

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.trigger();
        Ok(())
    }
}

struct InputRoom {
    wanted: Arc<AtomicBool>,
    events: GuestEvents,
}

impl SerialEvents for InputRoom {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        if self.wanted.swap(false, Ordering::AcqRel) {
            self.events.post(GuestEvent::ConsoleInputRoom);
        }
    }
}

struct Transmitter {
    output: Output,
    watch: ConsoleWatch,
}

impl Write for Transmitter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.watch.scan(bytes);
        self.output.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads along with the console for the few lines of a Linux kernel that tell what nothing else does. A program in
/// the guest can print them too, so what comes from here is called what it is: judged by the console.
struct ConsoleWatch {
    line: Vec<u8>,
    seen_byte: bool,
    events: GuestEvents,
}

/// Longest line that is looked at; all texts of interest stand at the beginning of theirs.
const LINE_MAX: usize = 128;

impl ConsoleWatch {
    fn new(events: GuestEvents) -> Self {
        ConsoleWatch { line: Vec::with_capacity(LINE_MAX), seen_byte: false, events }
    }

    fn scan(&mut self, bytes: &[u8]) {
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
        if text.starts_with(b"Kernel panic - not syncing") {
            self.events.post(GuestEvent::Panicked(PanicSource::Console));
        } else if text.starts_with(b"---[ end Kernel panic - not syncing") {
            self.events.post(GuestEvent::PanicEnded);
        } else if text.starts_with(b"reboot: Restarting system") {
            self.events.post(GuestEvent::Restarting);
        } else if text.starts_with(b"Run /") && text.ends_with(b" as init process") {
            self.events.post(GuestEvent::InitStarted);
        }
    }
}

/// Strips printk's `[    1.234567] `, and a caller id like `[T1]` or `[    T1]` behind it.
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

    fn port() -> (SerialPort, IrqLine, GuestEvents) {
        let (irq, events) = (IrqLine::new(4).unwrap(), GuestEvents::new().unwrap());
        (SerialPort::new(irq.clone(), Output::discard().unwrap(), events.clone()), irq, events)
    }

    fn read(port: &SerialPort, offset: u64) -> u8 {
        let mut data = [0xFF];
        port.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn a_flood_of_input_arrives_whole() {
        let (port, irq, events) = port();
        port.write(1, &[1]);
        let input: Vec<u8> = (0..10_000u32).map(|i| i as u8).collect();
        let (mut sent, mut got) = (0, Vec::new());
        while got.len() < input.len() {
            sent += port.receive(&input[sent..]);
            assert!(irq.take_count() > 0);
            while read(&port, 5) & 1 == 1 {
                got.push(read(&port, 0));
            }
            let told = std::iter::from_fn(|| events.take()).any(|e| e == GuestEvent::ConsoleInputRoom);
            assert_eq!(told, sent < input.len());
        }
        assert_eq!(got, input);
    }

    #[test]
    fn odd_widths_are_harmless() {
        let (port, _, _) = port();
        for offset in 0..8 {
            for width in [0, 1, 2, 4, 8] {
                let mut data = vec![0xFF; width];
                port.read(offset, &mut data);
                port.write(offset, &data);
            }
        }
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
        assert_eq!(events_of("[ 1.0] ---[ end Kernel panic - not syncing: VFS ]---\n"), [GuestEvent::PanicEnded]);
        assert_eq!(events_of("[ 1.0] reboot: Restarting system\n"), [GuestEvent::Restarting]);
        assert_eq!(events_of("[ 1.0] Run /init as init process\n"), [GuestEvent::InitStarted]);
        assert_eq!(events_of("he said: Kernel panic - not syncing\n[x] Kernel panic - not syncing\n"), []);
        assert_eq!(events_of(&format!("{}\n[[[[]]]\n[", "x".repeat(100_000))), []);
    }

    #[test]
    fn destinations() {
        for text in ["stdio", "null", "pty", "file:/tmp/a:b", "socket:x"] {
            assert_eq!(text.parse::<SerialConfig>().unwrap().to_string(), text);
        }
        for text in ["", "file", "file:", "stdio:x", "tcp:1"] {
            assert!(text.parse::<SerialConfig>().is_err(), "{text}");
        }
    }
}
