//! The network card, on a wire that delivers and takes packets.

#![no_main]

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex};

use libfuzzer_sys::fuzz_target;
use vireo::backend::packet::{self, HEADER, Offloads, Port, Received};
use vireo::event::eventfd;
use vireo::memory::RamSlice;
use vireo::virtio::net::{Mac, Net};
use vireo_fuzz::{Request, drive};
use vmm_sys_util::eventfd::EventFd;

/// A wire with packets that wait for the guest; it takes only every other packet that the guest sends.
struct Wire(Arc<Mutex<Vec<Vec<u8>>>>, EventFd, bool);

impl Port for Wire {
    fn fd(&self) -> RawFd {
        self.1.as_raw_fd()
    }
    fn receive(&mut self, room: &[RamSlice<'_>]) -> io::Result<Received> {
        let mut packets = self.0.lock().unwrap();
        let Some(packet) = packets.last() else { return Err(io::ErrorKind::WouldBlock.into()) };
        if packet.len() > packet::len(room) {
            return Ok(Received::NoRoom(packet.len()));
        }
        packet::copy_to_guest(packet, room);
        let len = packet.len();
        packets.pop();
        Ok(Received::Packet(len))
    }
    fn skip(&mut self) {
        self.0.lock().unwrap().pop();
    }
    fn send(&mut self, header: &[u8; HEADER], frame: &[RamSlice<'_>]) -> io::Result<()> {
        assert!(frame.len() <= packet::MAX_SLICES && packet::len(frame) <= packet::MAX_FRAME && header[10..] == [0, 0]);
        self.2 = !self.2;
        if self.2 { Ok(()) } else { Err(io::ErrorKind::WouldBlock.into()) }
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn set_offloads(&mut self, _: Offloads) -> io::Result<()> {
        Ok(())
    }
    fn set_active(&mut self, _: bool) -> io::Result<()> {
        Ok(())
    }
}

const FRAME: [u8; 12 + 60] = {
    let mut frame = [0; 72];
    (frame[0], frame[1], frame[4], frame[6], frame[8]) = (1, 1, 20, 34, 16);
    frame
};

/// Requests to two pairs and to the control queue: the number of pairs, the address.
const REQUESTS: [Request; 6] = [
    Request { queue: 0, readable: &[], writable: &[1526] },
    Request { queue: 1, readable: &FRAME, writable: &[] },
    Request { queue: 2, readable: &[], writable: &[12, 3000] },
    Request { queue: 3, readable: &FRAME, writable: &[] },
    Request { queue: 4, readable: &[4, 0, 2, 0], writable: &[1] },
    Request { queue: 4, readable: &[1, 1, 2, 0, 0, 0, 0, 1], writable: &[1] },
];

fuzz_target!(|data: &[u8]| {
    let wires = [(); 2].map(|()| Arc::new(Mutex::new(Vec::new())));
    let ports = wires.iter().map(|wire| {
        let ready = eventfd().unwrap();
        ready.write(1).unwrap(); // always readable
        Box::new(Wire(wire.clone(), ready, false)) as Box<dyn Port>
    });
    let mac = Mac([2, 0, 0, 0, 0, 1]);
    let mut net = Net::with_ports("net", ports.collect(), mac, Some(1500), u64::MAX).unwrap();
    drive(&mut net, &REQUESTS, data, &mut |bytes| {
        let Some((len, bytes)) = bytes.split_first() else { return };
        let mut packet = vec![0; HEADER];
        packet.extend_from_slice(bytes);
        packet.resize(usize::from(*len) * 300 + HEADER + 14, 7);
        wires[usize::from(len & 1)].lock().unwrap().push(packet);
    });
});
