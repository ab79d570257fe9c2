//! A qcow2 image from a stranger, written to by a guest.
//!
//! The image is sound except for some bytes, most of them in its header and tables, where a change has far-reaching
//! effects.

#![no_main]

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::LazyLock;

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use vireo::backend::image::{self, Format, ImageOptions, Overlay};
use vireo::memory::GuestRam;
use vireo::virtio::blk::{Blk, BlkConfig};
use vireo_fuzz::{Request, drive};

const CLUSTER: usize = 65536;
/// Requests for sectors in the first, the second and the last cluster of the disk.
const REQUESTS: [Request; 7] = [
    request(&header(1, 0), &[1]),
    request(&header(1, 129), &[1]),
    request(&header(1, 2040), &[1]),
    request(&header(0, 0), &[4096, 1]),
    request(&header(4, 0), &[1]),
    request(&header(11, 0), &[1]),
    request(&header(13, 128), &[1]),
];

const fn request(kind: &'static [u8], readable: &'static [u32]) -> Request<'static> {
    Request { queue: 0, readable: kind, writable: readable }
}

/// A header, and a sector of data or the beginning of one.
const fn header(kind: u8, sector: u16) -> [u8; 16 + 512] {
    let mut bytes = [0; 16 + 512];
    bytes[0] = kind;
    (bytes[8], bytes[9]) = (sector as u8, (sector >> 8) as u8);
    bytes
}

/// A sound image of 1 MiB with two clusters of data, the second one announced as compressed by zstd if `zstd`.
fn image(zstd: bool) -> Vec<u8> {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let (base, top) = (dir.path().join("base"), dir.path().join("top.qcow2"));
    std::fs::write(&base, vec![0; 1 << 20]).unwrap();
    let overlay = Some(Overlay::File(top.clone()));
    let disk = image::open(&ImageOptions { path: base, overlay, ..ImageOptions::default() }).unwrap();
    let ram = GuestRam::anonymous(1 << 20);
    disk.write(&[ram.slice(0, 2 * CLUSTER as u64).unwrap()], 0).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let mut bytes = std::fs::read(&top).unwrap();
    // Without its base, and without header extensions.
    bytes[8..20].fill(0);
    bytes[104..CLUSTER].fill(0);
    if zstd {
        (bytes[79], bytes[103], bytes[104]) = (8, 112, 1);
        let l2 = table(&bytes, table(&bytes, 40));
        let data = table(&bytes, l2 + 8);
        // A frame of one block that repeats a byte for all of the cluster.
        let frame = [0x28, 0xB5, 0x2F, 0xFD, 0x60, 0x00, 0xFF, 0x03, 0x00, 0x08, 0x00, 7];
        bytes[data..data + frame.len()].copy_from_slice(&frame);
        bytes[l2 + 8..l2 + 16].copy_from_slice(&(1 << 62 | data as u64).to_be_bytes());
    }
    bytes
}

fn table(bytes: &[u8], at: usize) -> usize {
    (u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) & (1 << 56) - 1) as usize
}

static IMAGES: LazyLock<[Vec<u8>; 2]> = LazyLock::new(|| [image(false), image(true)]);

/// Changes some numbers.
fn flip(image: &mut Vec<u8>, bytes: &mut Unstructured) -> Result<()> {
    let tables = [40, 48].map(|at| table(image, at));
    let (l2, counts) = (table(image, tables[0]), table(image, tables[1]));
    let places = [0, tables[0], tables[1], l2, counts, table(image, l2 + 8)];
    for _ in 0..bytes.int_in_range(0..=6u8)? {
        let place = *bytes.choose(&places)?;
        let at = place + if place == 0 { bytes.int_in_range(0..=200)? } else { bytes.int_in_range(0..=100usize)? };
        let value: u64 = match bytes.int_in_range(0..=3u8)? {
            0 => bytes.arbitrary()?,
            1 => bytes.int_in_range(0..=8u64)? * CLUSTER as u64,
            2 => bytes.int_in_range(0..=8u64)? * CLUSTER as u64 | 1 << 63,
            _ => 1 << bytes.int_in_range(0..=63)?,
        };
        let width = *bytes.choose(&[1usize, 2, 4, 8])?;
        let at = if bytes.ratio(7, 8)? { at - at % width } else { at };
        let value = value.to_be_bytes();
        if let Some(target) = image.get_mut(at..at + width) {
            target.copy_from_slice(&value[8 - width..]);
        }
    }
    // The end of the file may be missing.
    if bytes.ratio(1, 16)? {
        image.truncate(bytes.int_in_range(0..=image.len())?);
    }
    Ok(())
}

fn run(data: &[u8], path: &Path) -> Result<()> {
    let mut bytes = Unstructured::new(data);
    let mut image = IMAGES[usize::from(bytes.arbitrary::<bool>()?)].clone();
    flip(&mut image, &mut bytes)?;
    std::fs::write(path, &image).unwrap();
    let options = ImageOptions { path: path.into(), format: Some(Format::Qcow2), ..ImageOptions::default() };
    let Ok(disk) = image::open(&options) else { return Ok(()) };
    let mut device = Blk::with_disk("disk", &BlkConfig { path: path.into(), ..BlkConfig::default() }, disk);
    drive(&mut device, &REQUESTS, bytes.take_rest(), &mut |_| {});
    drop(device);
    // A guest must not damage a sound image.
    let file = std::fs::File::open(path).unwrap();
    let mut magic = [0; 4];
    file.read_exact_at(&mut magic, 0).unwrap();
    assert_eq!(&magic, b"QFI\xfb");
    image::open(&options).map(drop).expect("the image is as sound as before");
    Ok(())
}

fuzz_target!(|data: &[u8]| {
    let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    let _ = run(data, file.path());
});
