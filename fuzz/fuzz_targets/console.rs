//! The console device: a console with a window and a port.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vireo::backend::console::Receiver;
use vireo::backend::output::Output;
use vireo::guest_event::GuestEvents;
use vireo::virtio::console::{Console, NewPort};
use vireo_fuzz::{Request, drive};

/// Input and output of both ports; control messages (5.3.6.2): device ready, port ready, port open.
const REQUESTS: [Request; 9] = [
    Request { queue: 0, readable: &[], writable: &[64] },
    Request { queue: 1, readable: b"Kernel panic - not syncing: ", writable: &[] },
    Request { queue: 2, readable: &[], writable: &[64] },
    Request { queue: 3, readable: &[0, 0, 0, 0, 0, 0, 1, 0], writable: &[] },
    Request { queue: 3, readable: &[0, 0, 0, 0, 3, 0, 1, 0], writable: &[] },
    Request { queue: 3, readable: &[1, 0, 0, 0, 3, 0, 1, 0], writable: &[] },
    Request { queue: 3, readable: &[1, 0, 0, 0, 6, 0, 1, 0], writable: &[] },
    Request { queue: 4, readable: &[], writable: &[100, 5000] },
    Request { queue: 5, readable: b"some text", writable: &[] },
];

fuzz_target!(|data: &[u8]| {
    let port = |name| NewPort { name, output: Output::discard().unwrap() };
    let ports = vec![port(None), port(Some("port".to_string()))];
    let mut console = Console::new("console", ports, &GuestEvents::new().unwrap()).unwrap();
    let host = console.host_ports();
    drive(&mut console, &REQUESTS, data, &mut |bytes| {
        let Some((what, bytes)) = bytes.split_first() else { return };
        let port = &host[usize::from(what & 1)];
        match what >> 1 & 3 {
            0 => port.connected(what & 8 != 0),
            1 => port.resize((*what).into(), bytes.len() as u16),
            _ => assert!(port.receive(bytes) <= bytes.len()),
        }
    });
});
