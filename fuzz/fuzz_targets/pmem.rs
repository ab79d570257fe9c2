//! Persistent memory: a file that is flushed.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vireo::virtio::pmem::{Pmem, PmemConfig};
use vireo_fuzz::{Request, drive};

const REQUESTS: [Request; 2] = [
    Request { queue: 0, readable: &[0; 4], writable: &[4] },
    Request { queue: 0, readable: &[1, 0, 0, 0, 0], writable: &[1, 3] },
];

fuzz_target!(|data: &[u8]| {
    let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    file.as_file().set_len(2 << 20).unwrap();
    let config: PmemConfig = file.path().display().to_string().parse().unwrap();
    drive(&mut Pmem::new("pmem", config.open().unwrap(), 4 << 30), &REQUESTS, data, &mut |_| {});
    assert_eq!(file.as_file().metadata().unwrap().len(), 2 << 20);
});
