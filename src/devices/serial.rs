//! The first serial port: a 16550 on IRQ 4 ([`vm_superio::Serial`]). Bytes are buffered on the way to the host.
//!
//! Transmitted bytes go to an [`Output`] that never refuses. Output over its limit does not wait here; it holds up the
//! vCPU between two entries into the guest. Received bytes are taken as far as the FIFO has room. When the guest has
//! read them, [`GuestEvent::ConsoleInputRoom`] asks for more, so nothing is dropped under a flood.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};

use crate::backend::console::Receiver;
use crate::backend::console_watch::ConsoleWatch;
use crate::backend::output::Output;
use crate::bus::BusDevice;
use crate::guest_event::{GuestEvent, GuestEvents};
use crate::irq::IrqLine;

/// `--serial`: destination of the first serial port.
pub use crate::backend::console::ConsoleEnd as SerialConfig;

/// Registers of a 16550 and their bits: interrupt enable; interrupt identification; line control, whose top bit puts
/// the divisor in the place of interrupt enable; line status.
const IER: u8 = 1;
const IER_RECEIVED: u8 = 1;
const IIR: u8 = 2;
const IIR_RECEIVED: u8 = 0xC0 | 4;
const LCR: u8 = 3;
const LCR_DLAB: u8 = 0x80;
const LSR: u8 = 5;
const LSR_DATA_READY: u8 = 1;

/// Serial port as a bus device.
pub struct SerialPort {
    uart: Mutex<Serial<Irq, InputRoom, Transmitter>>,
    room_wanted: Arc<AtomicBool>,
}

impl SerialPort {
    /// Creates a port that raises `irq`, sends to `output` and reports to `events` what its text reveals.
    pub fn new(irq: IrqLine, output: Output, events: GuestEvents) -> Self {
        let room_wanted = Arc::new(AtomicBool::new(false));
        let room = InputRoom { wanted: room_wanted.clone(), events: events.clone() };
        let transmitter = Transmitter { output, watch: ConsoleWatch::new(events) };
        let uart = Mutex::new(Serial::with_events(Irq(irq), room, transmitter));
        SerialPort { uart, room_wanted }
    }

    fn lock(&self) -> MutexGuard<'_, Serial<Irq, InputRoom, Transmitter>> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Receiver for SerialPort {
    fn receive(&self, bytes: &[u8]) -> usize {
        let mut uart = self.lock();
        let taken = uart.enqueue_raw_bytes(bytes).unwrap_or(0);
        self.room_wanted.store(taken < bytes.len(), Ordering::Release);
        taken
    }
}

/// Reads a register. Received data is identified as the reason of an interrupt for as long as there is any: a driver
/// that takes a bounded number of bytes at a time (Linux: 256) and then looks for a reason again would otherwise leave
/// the rest.
fn read(uart: &mut Serial<Irq, InputRoom, Transmitter>, offset: u8) -> u8 {
    let received = offset == IIR
        && uart.read(LSR) & LSR_DATA_READY != 0
        && uart.read(LCR) & LCR_DLAB == 0
        && uart.read(IER) & IER_RECEIVED != 0;
    // Received data goes before an empty transmitter, which is identified once the data is gone.
    if received { IIR_RECEIVED } else { uart.read(offset) }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // The registers are a byte wide: of a wider access, only the first byte is served.
        if let (Some(first), Ok(offset)) = (data.first_mut(), u8::try_from(offset)) {
            *first = read(&mut self.lock(), offset);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (Some(first), Ok(offset)) = (data.first(), u8::try_from(offset)) {
            // The output takes everything, and a full eventfd has an interrupt pending anyway.
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
    fn the_reason_stays_while_there_is_something_to_read() {
        let (port, irq, _) = port();
        port.write(1, &[3]);
        assert_eq!(read(&port, 2), 0xC2, "the transmitter is empty");
        assert_eq!(port.receive(&[7; 40]), 40);
        assert!(irq.take_count() > 0);
        port.write(0, b"x");
        for _ in 0..40 {
            assert_eq!(read(&port, 2), 0xC4);
            assert_eq!(read(&port, 0), 7);
        }
        assert_eq!([read(&port, 2), read(&port, 2)], [0xC2, 0xC1], "the transmitter again, and then nothing");
        port.write(1, &[0]);
        port.receive(b"y");
        assert_eq!(read(&port, 2), 0xC1, "not enabled");
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
}
