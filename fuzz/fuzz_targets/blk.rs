//! The block device over a raw file, including io_uring.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vireo::virtio::blk::{Blk, BlkConfig};
use vireo_fuzz::{Request, drive};

const fn request(kind: &'static [u8; 16], readable: &'static [u32]) -> Request<'static> {
    Request { queue: 0, readable: kind, writable: readable }
}

const fn header(kind: u8) -> [u8; 16] {
    [kind, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
}

const REQUESTS: [Request; 7] = [
    request(&header(0), &[512, 1]),
    request(&header(0), &[100, 4096, 412, 1]),
    request(&header(1), &[1]),
    request(&header(4), &[1]),
    request(&header(8), &[20, 1]),
    request(&header(11), &[1]),
    request(&header(13), &[1]),
];

fuzz_target!(|data: &[u8]| {
    let Some((how, data)) = data.split_first() else { return };
    let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    file.as_file().set_len(64 << 10).unwrap();
    let mut config: BlkConfig = file.path().display().to_string().parse().unwrap();
    (config.readonly, config.queues) = (how & 1 != 0, (how & 2 != 0).then_some(2));
    config.engine = if how & 4 != 0 { vireo::virtio::blk::Engine::Sync } else { Default::default() };
    drive(&mut Blk::new("disk", &config).unwrap(), &REQUESTS, data, &mut |_| {});
    assert_eq!(file.as_file().metadata().unwrap().len(), 64 << 10);
});
