//! The entropy device.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vireo::virtio::rng::{Rng, RngConfig};
use vireo_fuzz::{Request, drive};

const REQUESTS: [Request; 2] =
    [Request { queue: 0, readable: &[], writable: &[64] }, Request { queue: 0, readable: &[1], writable: &[1, 7000] }];

fuzz_target!(|data: &[u8]| drive(&mut Rng::new("rng", &RngConfig::default()), &REQUESTS, data, &mut |_| {}));
