//! Saved states of devices that were never saved: almost those of a device that was, or anything.

#![no_main]

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};
use vireo::backend::output::Output;
use vireo::backend::packet::Port;
use vireo::backend::passt::Passt;
use vireo::guest_event::GuestEvents;
use vireo::irq::IrqLine;
use vireo::memory::{Area, Backing, GuestRam, MemoryConfig};
use vireo::options::Size;
use vireo::virtio::VirtioDevice;
use vireo::virtio::balloon::{Balloon, BalloonConfig};
use vireo::virtio::blk::{Blk, BlkConfig};
use vireo::virtio::console::{Console, NewPort};
use vireo::virtio::fs::{Budget, Fs, FsConfig};
use vireo::virtio::mem::{Mem, MemConfig};
use vireo::virtio::mmio::{MmioState, MmioTransport};
use vireo::virtio::net::{Mac, Net};
use vireo::virtio::rng::{Rng, RngConfig};
use vireo::virtio::testing::FakeDriver;
use vireo::virtio::vsock::{Vsock, VsockConfig};
use vireo_fuzz::mutate;

const RAM: u64 = 1 << 20;
/// Address of the memory device's memory.
const REGION: u64 = 4 << 30;
const PLUGGABLE: u64 = 16 << 20;
const KINDS: u8 = 8;

/// Creates a new device of this kind.
fn device(kind: u8, dir: &Path) -> Box<dyn VirtioDevice> {
    match kind {
        0 => Box::new(Rng::new("rng", &RngConfig::default())),
        1 => {
            let config =
                BalloonConfig { free_page_hinting: true, free_page_reporting: true, ..BalloonConfig::default() };
            Box::new(Balloon::new("balloon", &config, Size(RAM)))
        }
        2 => {
            let port = |name| NewPort { name, output: Output::discard().unwrap() };
            let ports = vec![port(None), port(Some("port".to_string()))];
            Box::new(Console::new("console", ports, &GuestEvents::new().unwrap()).unwrap())
        }
        3 => {
            let config = MemConfig { size: Size(PLUGGABLE), requested: Size(PLUGGABLE / 2), block: Size::mib(2) };
            Box::new(Mem::new("mem", &config, REGION))
        }
        4 => {
            let (ours, _its) = std::os::unix::net::UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            let ports: Vec<Box<dyn Port>> = vec![Box::new(Passt::over(ours))];
            Box::new(Net::with_ports("net", ports, Mac([2, 0, 0, 0, 0, 1]), Some(1500), 0).unwrap())
        }
        5 => Box::new(Vsock::new("vsock", &VsockConfig { cid: 3, path: dir.join("v") }).unwrap()),
        6 => {
            let path = dir.join("disk");
            std::fs::write(&path, [0; 4096]).unwrap();
            let config: BlkConfig = format!("{},engine=sync", path.display()).parse().unwrap();
            Box::new(Blk::new("blk", &config).unwrap())
        }
        _ => {
            let shared = dir.join("shared");
            let _ = std::fs::create_dir(&shared);
            let _ = std::fs::write(shared.join("file"), b"text");
            let config: FsConfig = format!("{},tag=share", shared.display()).parse().unwrap();
            Box::new(Fs::new(0, &config, &Budget::new(1000, 1)).unwrap())
        }
    }
}

/// Returns the state that a device with two queues in use would have saved.
fn good(transport: &MmioTransport) -> Value {
    let mut state = serde_json::to_value(transport.save().unwrap()).unwrap();
    let features = 1u64 << 32 | 1 << 40;
    state["status"] = json!(15);
    state["driver_features"] = json!(features);
    let queues = state["queues"].as_array_mut().unwrap();
    for (queue, base) in queues.iter_mut().zip((0..).map(|n| 0x1000 + n * 0x1000)) {
        for (key, value) in [("size", 8), ("desc", base), ("avail", base + 0x400), ("used", base + 0x800)] {
            queue[key] = json!(value);
        }
        queue["ready"] = json!(true);
    }
    state
}

/// Returns the state of a shared folder in which the guest knows a file and has it open.
fn mounted(file: &Path) -> Value {
    let meta = std::fs::metadata(file).unwrap();
    let file = json!({"id": 2, "parent": 1, "name": b"file", "lookups": 1, "kind": 0o100000, "dev": meta.dev(), "mount": 0,
        "ino": meta.ino(), "born": [0, 0], "submount": false});
    json!({"mounted": {"submounts": true, "mount": 0, "next_file": 3, "files": [file], "next_handle": 2,
        "handles": [{"id": 1, "file": 2, "access": "read"}]}})
}

fn run(data: &[u8]) -> Result<()> {
    let mut bytes = Unstructured::new(data);
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let kind = bytes.int_in_range(0..=KINDS - 1)?;
    let config = MemoryConfig { size: Size(RAM), ..MemoryConfig::default() };
    let area = Area { start: REGION, len: PLUGGABLE, backing: Backing::Pluggable };
    let ram = GuestRam::with_areas(&config, vec![area]).unwrap();
    let line = || IrqLine::new(5).unwrap();
    let mut state = {
        let fresh = MmioTransport::new(device(kind, dir.path()), ram.clone(), line()).unwrap();
        good(&fresh)
    };
    // The state of a new device, or of one that was in use.
    if kind == 7 && bytes.arbitrary()? {
        state["device"] = mounted(&dir.path().join("shared/file"));
    }
    for _ in 0..bytes.int_in_range(0..=6u8)? {
        mutate(&mut state, &mut bytes)?;
    }
    let Ok(state) = serde_json::from_value::<MmioState>(state) else { return Ok(()) };
    let device = device(kind, dir.path());
    let Ok(transport) = MmioTransport::from_state(device, ram.clone(), line(), &state) else { return Ok(()) };
    // The restored device is paused as its state says, and works.
    let _ = transport.save().expect("a paused device can be saved");
    transport.resume();
    let driver = FakeDriver::new(&transport, &ram);
    driver.kick(0);
    for register in (0..0x100).step_by(4) {
        driver.get(register);
    }
    transport.stop().expect("the device stops");
    let again = transport.save().expect("a stopped device can be saved");
    drop(transport);
    let device = self::device(kind, dir.path());
    MmioTransport::from_state(device, ram, line(), &again).expect("a saved state can be restored");
    Ok(())
}

fuzz_target!(|data: &[u8]| {
    let _ = run(data);
});
