//! A qcow2 image from a stranger, read.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vireo::backend::image::{self, Format, ImageOptions};
use vireo::memory::GuestRam;

fuzz_target!(|data: &[u8]| {
    let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    std::fs::write(file.path(), data).unwrap();
    let options = ImageOptions {
        path: file.path().to_path_buf(),
        readonly: true,
        format: Some(Format::Qcow2),
        ..ImageOptions::default()
    };
    let Ok(disk) = image::open(&options) else { return };
    let ram = GuestRam::anonymous(1 << 20);
    for at in [0, disk.size() / 2, disk.size().saturating_sub(8192)] {
        let len = disk.size().saturating_sub(at).min(8192);
        let _ = disk.read(&[ram.slice(0, len).unwrap()], at / 512 * 512);
    }
});
