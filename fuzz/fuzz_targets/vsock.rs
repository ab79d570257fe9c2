//! The socket device, with programs on the host at both ends.

#![no_main]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use libfuzzer_sys::fuzz_target;
use vireo::virtio::vsock::{Vsock, VsockConfig};
use vireo_fuzz::{Request, drive};

/// A packet from the guest (5.10.6): from port 1024 of CID 3 to a port of CID 2.
const fn packet(port: u8, operation: u8, len: u8) -> [u8; 44] {
    let mut packet = [0; 44];
    (packet[0], packet[8], packet[17], packet[20]) = (3, 2, 4, port);
    (packet[24], packet[28], packet[30], packet[38]) = (len, 1, operation, 1);
    packet
}

const fn with_data(port: u8) -> [u8; 44 + 16] {
    let (header, mut packet, mut i) = (packet(port, 5, 16), [7; 60], 0);
    while i < header.len() {
        packet[i] = header[i];
        i += 1;
    }
    packet
}

const REQUESTS: [Request; 11] = [
    Request { queue: 0, readable: &[], writable: &[44, 4096] },
    Request { queue: 0, readable: &[], writable: &[5000] },
    Request { queue: 1, readable: &packet(80, 1, 0), writable: &[] },
    Request { queue: 1, readable: &packet(81, 1, 0), writable: &[] },
    Request { queue: 1, readable: &packet(80, 2, 0), writable: &[] },
    Request { queue: 1, readable: &packet(80, 3, 0), writable: &[] },
    Request { queue: 1, readable: &packet(80, 4, 0), writable: &[] },
    Request { queue: 1, readable: &with_data(80), writable: &[] },
    Request { queue: 1, readable: &packet(80, 6, 0), writable: &[] },
    Request { queue: 1, readable: &packet(80, 7, 0), writable: &[] },
    Request { queue: 2, readable: &[], writable: &[4] },
];

fuzz_target!(|data: &[u8]| {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("v");
    let mut vsock = Vsock::new("vsock", &VsockConfig { cid: 3, path: path.clone() }).unwrap();
    let listener = UnixListener::bind(dir.path().join("v_80")).unwrap();
    listener.set_nonblocking(true).unwrap();
    let mut streams: Vec<UnixStream> = Vec::new();
    drive(&mut vsock, &REQUESTS, data, &mut |bytes| {
        let Some((what, bytes)) = bytes.split_first() else { return };
        let pick = usize::from(what >> 3).checked_rem(streams.len());
        match (what & 7, pick) {
            (0, _) => streams.extend(listener.accept().ok().map(|(stream, _)| stream)),
            (1 | 2, _) => {
                let Ok(mut stream) = UnixStream::connect(&path) else { return };
                let line = if what & 7 == 1 { &b"CONNECT 1024\n"[..] } else { bytes };
                let _ = stream.write_all(line);
                streams.push(stream);
            }
            (3 | 4, Some(n)) => _ = streams[n].set_nonblocking(true).and_then(|()| streams[n].write(bytes)),
            (5, Some(n)) => _ = streams[n].set_nonblocking(true).and_then(|()| streams[n].read(&mut [0; 5000])),
            (6, Some(n)) => drop(streams.remove(n)),
            (7, Some(n)) => _ = streams[n].shutdown(std::net::Shutdown::Write),
            _ => {}
        }
    });
});
