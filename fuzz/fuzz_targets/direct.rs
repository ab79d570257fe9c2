//! Disks with `direct=on`, raw and in an overlay, beside a disk that is an array.

#![no_main]

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use vireo::backend::image::{self, ImageOptions, Overlay};
use vireo::memory::GuestRam;

/// Bytes of the disk: whole blocks of 4096, but not a whole cluster at the end.
const SIZE: usize = 200 << 10;

/// Folder that is not in memory, where O_DIRECT takes effect.
const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/target");

fn run(data: &[u8]) -> Result<()> {
    let mut bytes = Unstructured::new(data);
    let folder = tempfile::tempdir_in(FOLDER).unwrap();
    let path = folder.path().join("disk");
    let mut model: Vec<u8> = (0..SIZE).map(|i| (i / 512) as u8 | 1).collect();
    std::fs::write(&path, &model).unwrap();
    let mut options = ImageOptions { path, direct: true, ..ImageOptions::default() };
    if bytes.arbitrary()? {
        let top = folder.path().join("top.qcow2");
        options.overlay = Some(Overlay::File(top));
    }
    let disk = image::open(&options).expect("this file system has no O_DIRECT");
    let ram = GuestRam::anonymous(1 << 20);
    for step in 0..bytes.int_in_range(1..=16u8)? {
        let sector = bytes.int_in_range(0..=SIZE / 512 - 1)?;
        let count = bytes.int_in_range(0..=(SIZE / 512 - sector).min(160))?;
        let (at, len) = (sector * 512, count * 512);
        // Buffers anywhere in memory, of any length.
        let mut place = 0x1_0000 + u64::from(bytes.arbitrary::<u16>()?);
        let (mut left, mut buffers) = (len as u64, Vec::new());
        while left > 0 {
            // Numbers are the smallest possible when no bytes are left.
            let piece = if buffers.len() > 40 || bytes.arbitrary()? { left } else { bytes.int_in_range(1..=left)? };
            buffers.push((place, piece));
            left -= piece;
            place += piece + bytes.int_in_range(0..=600)?;
        }
        let slices: Vec<_> = buffers.iter().map(|(at, len)| ram.slice(*at, *len).unwrap()).collect();
        match bytes.int_in_range(0..=5u8)? {
            0 | 1 => {
                let mut from = at;
                for (place, len) in &buffers {
                    let content: Vec<u8> = (0..*len).map(|i| (i as u8).wrapping_mul(3) ^ step).collect();
                    ram.write(*place, &content).unwrap();
                    model[from..from + content.len()].copy_from_slice(&content);
                    from += content.len();
                }
                disk.write(&slices, at as u64).unwrap();
            }
            2 => {
                disk.write_zeroes(at as u64, len as u64, false).unwrap();
                model[at..at + len].fill(0);
            }
            3 => {
                disk.write_zeroes(at as u64, len as u64, true).unwrap();
                model[at..at + len].fill(0);
            }
            4 => disk.flush().unwrap(),
            _ => {
                disk.read(&slices, at as u64).unwrap();
                let mut from = at;
                for (place, len) in &buffers {
                    let mut content = vec![0; *len as usize];
                    ram.read(*place, &mut content).unwrap();
                    assert_eq!(content, model[from..from + content.len()]);
                    from += content.len();
                }
            }
        }
    }
    disk.read(&[ram.slice(0, SIZE as u64).unwrap()], 0).unwrap();
    let mut content = vec![0; SIZE];
    ram.read(0, &mut content).unwrap();
    assert!(content == model);
    Ok(())
}

fuzz_target!(|data: &[u8]| {
    let _ = run(data);
});
