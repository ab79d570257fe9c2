//! A second thread of the guest, which changes memory while devices serve requests in it: checked values may be
//! different when they are used. A finding need not recur with the same input, but the invariants hold always.

#![no_main]

use std::sync::atomic::{AtomicBool, Ordering};

use libfuzzer_sys::fuzz_target;
use vireo::backend::output::Output;
use vireo::guest_event::GuestEvents;
use vireo::memory::GuestRam;
use vireo::options::Size;
use vireo::virtio::VirtioDevice;
use vireo::virtio::balloon::{Balloon, BalloonConfig};
use vireo::virtio::blk::{Blk, BlkConfig, Engine};
use vireo::virtio::console::{Console, NewPort};
use vireo::virtio::fs::{Budget, Fs, FsConfig};
use vireo::virtio::rng::{Rng, RngConfig};
use vireo::virtio::vsock::{Vsock, VsockConfig};
use vireo_fuzz::{RAM, Request, TABLES, drive_in};

const fn block(kind: u8) -> [u8; 16] {
    [kind, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
}

/// FUSE_INIT, FUSE_GETATTR of the root, and the beginning of a FUSE_READDIR and a FUSE_LOOKUP.
const fn fuse(opcode: u8, len: u8) -> [u8; 64] {
    let mut request = [0; 64];
    (request[0], request[4], request[8], request[16]) = (len, opcode, 1, 1);
    if opcode == 26 {
        (request[40], request[44]) = (7, 38);
    }
    request
}

const BLK: [Request; 3] = [
    Request { queue: 0, readable: &block(0), writable: &[512, 1] },
    Request { queue: 0, readable: &block(1), writable: &[1] },
    Request { queue: 0, readable: &block(13), writable: &[1] },
];
const FS: [Request; 4] = [
    Request { queue: 1, readable: &fuse(26, 56), writable: &[80] },
    Request { queue: 1, readable: &fuse(3, 56), writable: &[120] },
    Request { queue: 1, readable: &fuse(1, 45), writable: &[160] },
    Request { queue: 1, readable: &fuse(27, 48), writable: &[32] },
];
const CONSOLE: [Request; 4] = [
    Request { queue: 0, readable: &[], writable: &[64] },
    Request { queue: 1, readable: b"some text", writable: &[] },
    Request { queue: 2, readable: &[], writable: &[64] },
    Request { queue: 3, readable: &[0, 0, 0, 0, 3, 0, 1, 0], writable: &[] },
];
const BALLOON: [Request; 2] = [
    Request { queue: 0, readable: &[1, 0, 0, 0, 200, 0, 0, 0], writable: &[] },
    Request { queue: 2, readable: &[0, 0, 1, 0, 0, 0, 0, 0, 0, 0], writable: &[] },
];
const RNG: [Request; 1] = [Request { queue: 0, readable: &[], writable: &[100] }];
const VSOCK: [Request; 2] = [
    Request { queue: 0, readable: &[], writable: &[44, 4096] },
    Request { queue: 1, readable: &[3; 44], writable: &[] },
];

/// Changes bytes of rings, tables and buffers until `over`, in an order that `seed` decides.
fn disturb(ram: &GuestRam, seed: u64, over: &AtomicBool) {
    let mut random = seed | 1;
    while !over.load(Ordering::Relaxed) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let at = match random & 3 {
            0 => 0x1000 + (random >> 8) % 0x3000,
            1 => TABLES + (random >> 8) % 0x4000,
            _ => 0x2_0000 + (random >> 8) % (RAM - 0x2_0000),
        };
        let byte: u8 = ram.read_obj(at).unwrap();
        ram.write_obj(at, byte ^ 1 << ((random >> 60) & 7)).unwrap();
    }
}

fuzz_target!(|data: &[u8]| {
    let Some(([kind, seed @ ..], data)) = data.split_first_chunk::<9>() else { return };
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let ram = GuestRam::anonymous(RAM);
    let (mut device, requests): (Box<dyn VirtioDevice>, &[Request]) = match kind % 6 {
        0 => {
            let path = dir.path().join("disk");
            std::fs::write(&path, [0; 4096]).unwrap();
            let mut config: BlkConfig = path.display().to_string().parse().unwrap();
            config.engine = if kind & 64 != 0 { Engine::Sync } else { Engine::Auto };
            (Box::new(Blk::new("disk", &config).unwrap()), &BLK)
        }
        1 => {
            let path = dir.path().join("shared");
            std::fs::create_dir(&path).unwrap();
            std::fs::write(path.join("file"), b"text").unwrap();
            let config: FsConfig = format!("{},tag=share", path.display()).parse().unwrap();
            (Box::new(Fs::new(0, &config, &Budget::new(1000, 1)).unwrap()), &FS)
        }
        2 => {
            let port = |name| NewPort { name, output: Output::discard().unwrap() };
            let ports = vec![port(None), port(Some("port".to_string()))];
            (Box::new(Console::new("console", ports, &GuestEvents::new().unwrap()).unwrap()), &CONSOLE)
        }
        3 => (Box::new(Balloon::new("balloon", &BalloonConfig::default(), Size(RAM))), &BALLOON),
        4 => (Box::new(Rng::new("rng", &RngConfig::default())), &RNG),
        _ => (Box::new(Vsock::new("vsock", &VsockConfig { cid: 3, path: dir.path().join("v") }).unwrap()), &VSOCK),
    };
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| disturb(&ram, u64::from_ne_bytes(*seed), &over));
        drive_in(&ram, &mut *device, requests, data, &mut |_| {});
        over.store(true, Ordering::Relaxed);
    });
});
