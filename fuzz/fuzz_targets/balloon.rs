//! The memory balloon, with all its features.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vireo::options::Size;
use vireo::virtio::VirtioDevice;
use vireo::virtio::balloon::Balloon;
use vireo::virtio::control::Control;
use vireo_fuzz::{Request, drive};

/// Page numbers; statistics; free pages to report.
const REQUESTS: [Request; 5] = [
    Request { queue: 0, readable: &[0x80, 0, 0, 0, 0x81, 0, 0, 0, 0x90, 0, 0, 0], writable: &[] },
    Request { queue: 1, readable: &[0x80, 0, 0, 0, 0x81, 0, 0, 0, 0x90, 0, 0, 0], writable: &[] },
    Request { queue: 2, readable: &[0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0], writable: &[] },
    Request { queue: 3, readable: &[], writable: &[4096, 8192] },
    Request { queue: 4, readable: &[], writable: &[4096, 100] },
];

fuzz_target!(|data: &[u8]| {
    let config = "256K,deflate_on_oom,stats=1s,free_page_reporting".parse().unwrap();
    let mut balloon = Balloon::new("balloon", &config, Size(1 << 20));
    let size = data.first().map_or(0, |byte| u64::from(*byte) << 12);
    let _ = balloon.control(&Control::SetBalloon(size));
    drive(&mut balloon, &REQUESTS, data, &mut |_| {});
});
