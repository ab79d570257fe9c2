//! The memory device: plugs and unplugs blocks of real memory.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vireo::memory::{Area, Backing, GuestRam, MemoryConfig};
use vireo::options::Size;
use vireo::virtio::VirtioDevice;
use vireo::virtio::control::Control;
use vireo::virtio::mem::{Mem, MemConfig};
use vireo_fuzz::{RAM, Request, drive_in};

const REGION: u64 = 4 << 30;
const LEN: u64 = 16 << 20;

/// A request for two blocks (5.15.6).
const fn request(kind: u8) -> [u8; 24] {
    let mut request = [0; 24];
    (request[0], request[12], request[16]) = (kind, 1, 2);
    request
}

const REQUESTS: [Request; 4] = [
    Request { queue: 0, readable: &request(0), writable: &[10] },
    Request { queue: 0, readable: &request(1), writable: &[10] },
    Request { queue: 0, readable: &request(2), writable: &[10] },
    Request { queue: 0, readable: &request(3), writable: &[10] },
];

fuzz_target!(|data: &[u8]| {
    let config = MemoryConfig { size: Size(RAM), ..MemoryConfig::default() };
    let area = Area { start: REGION, len: LEN, backing: Backing::Pluggable };
    let ram = GuestRam::with_areas(&config, vec![area]).unwrap();
    let config = MemConfig { size: Size(LEN), requested: Size(LEN / 2), block: Size::mib(2) };
    let mut mem = Mem::new("mem", &config, REGION);
    let blocks = data.first().map_or(0, |byte| u64::from(*byte % 9));
    let _ = mem.control(&Control::RequestMemory(blocks << 21));
    drive_in(&ram, &mut mem, &REQUESTS, data, &mut |_| {});
    let Ok(vireo::virtio::control::Reply::MemoryStatus(status)) = mem.control(&Control::MemoryStatus) else { panic!() };
    assert!(status.plugged <= LEN);
});
