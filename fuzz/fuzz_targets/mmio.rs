//! The register file of virtio-mmio, with a device whose worker runs.

#![no_main]

use arbitrary::Unstructured;
use libfuzzer_sys::fuzz_target;
use vireo::bus::BusDevice;
use vireo::irq::IrqLine;
use vireo::memory::GuestRam;
use vireo::virtio::mmio::MmioTransport;
use vireo::virtio::rng::{Rng, RngConfig};
use vireo::virtio::testing::{FakeDriver, inn};

fuzz_target!(|data: &[u8]| {
    let mut bytes = Unstructured::new(data);
    let ram = GuestRam::anonymous(1 << 20);
    let rng = Rng::new("rng", &RngConfig::default());
    let transport = MmioTransport::new(Box::new(rng), ram.clone(), IrqLine::new(5).unwrap()).unwrap();
    let mut driver = FakeDriver::new(&transport, &ram);
    for _ in 0..100 {
        let Ok(what) = bytes.arbitrary::<u8>() else { break };
        match what & 7 {
            // Now and then the device is started correctly, so that there is something to break.
            0 => driver.start(0, 0x1000, 16),
            1 => {
                if let Some(queue) = driver.queues.first_mut() {
                    queue.add(&[inn(0x8000, what.into())]);
                    driver.kick(0);
                }
            }
            2 | 3 => {
                let (offset, len) = (bytes.int_in_range(0..=0x110u64).unwrap_or(0), usize::from(what >> 3) & 15);
                transport.read(offset, &mut vec![0; len]);
            }
            4..=6 => {
                let offset = bytes.int_in_range(0..=0x44u64).unwrap_or(0) * 4;
                let value = if what & 8 != 0 { bytes.arbitrary::<u32>() } else { bytes.int_in_range(0..=16) };
                transport.write(offset, &value.unwrap_or(0).to_le_bytes());
            }
            _ => {
                transport.pause().unwrap();
                let state = transport.save().unwrap();
                transport.resume();
                assert_eq!(state.queues.len(), 1);
            }
        }
    }
    transport.pause().unwrap();
});
