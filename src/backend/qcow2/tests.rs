//! qcow2 images created by vireo, by qemu-img and by strangers.

use super::*;
use crate::backend::image;
use crate::memory::GuestRam;
use proptest::prelude::*;
use std::io::Write;

const SIZE: u64 = 1 << 20;

fn options(path: &Path) -> ImageOptions {
    ImageOptions { path: path.into(), ..ImageOptions::default() }
}

fn qcow2(path: &Path, size: u64, base: Option<(&Path, Format)>) {
    let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
    create(&file, path, size, base).unwrap();
}

fn write(disk: &dyn Disk, offset: u64, data: &[u8]) {
    let ram = GuestRam::anonymous(SIZE);
    ram.write(0, data).unwrap();
    let cut = data.len() as u64 / 3;
    let buffers = [ram.slice(0, cut).unwrap(), ram.slice(cut, data.len() as u64 - cut).unwrap()];
    disk.write(&buffers, offset).unwrap();
}

fn read(disk: &dyn Disk, offset: u64, len: usize) -> Vec<u8> {
    let ram = GuestRam::anonymous(SIZE);
    disk.read(&[ram.slice(0, len as u64).unwrap()], offset).unwrap();
    let mut data = vec![0; len];
    ram.read(0, &mut data).unwrap();
    data
}

fn error(options: &ImageOptions) -> String {
    let error = image::open(options).err().expect("it must not be opened");
    std::iter::successors(Some(&error as &dyn std::error::Error), |e| e.source())
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}

#[test]
fn what_is_written_is_there_the_next_time() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    qcow2(&path, SIZE, None);
    let disk = image::open(&options(&path)).unwrap();
    assert_eq!((disk.size(), disk.fd().is_none()), (SIZE, true));
    write(&*disk, 70_000 - 70_000 % 512, &[5; 4096]);
    write(&*disk, SIZE - 512, &[6; 512]);
    disk.flush().unwrap();
    assert!(error(&options(&path)).contains("in use by another VM"));
    drop(disk);
    let disk = crate::backend::when_free(|| image::open(&ImageOptions { readonly: true, ..options(&path) }));
    assert_eq!(read(&*disk, 70_000 - 70_000 % 512, 4096), [5; 4096]);
    assert_eq!(read(&*disk, SIZE - 512, 512), [6; 512]);
    assert_eq!(read(&*disk, 0, 512), [0; 512]);
}

#[test]
fn ranges_become_zeros() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    qcow2(&path, SIZE, None);
    let disk = image::open(&options(&path)).unwrap();
    write(&*disk, 0, &[9; 512 << 10]);
    disk.discard(64 << 10, 128 << 10).unwrap();
    disk.write_zeroes(1024, 3072, true).unwrap();
    disk.write_zeroes(256 << 10, 512, false).unwrap();
    let data = read(&*disk, 0, 512 << 10);
    let zeros = |from: usize, to: usize| data[from..to].iter().all(|&b| b == 0);
    assert!(zeros(64 << 10, 192 << 10) && zeros(1024, 4096) && zeros(256 << 10, (256 << 10) + 512));
    assert!(data[..1024].iter().chain(&data[4096..64 << 10]).all(|&b| b == 9));
}

#[test]
fn an_overlay_leaves_its_base_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (base, top) = (dir.path().join("base.img"), dir.path().join("top.qcow2"));
    let content: Vec<u8> = (0..SIZE as u32).map(|i| (i % 249) as u8).collect();
    std::fs::write(&base, &content).unwrap();
    for overlay in [Overlay::Tmp, Overlay::File(top.clone())] {
        let over = ImageOptions { overlay: Some(overlay), ..options(&base) };
        let disk = image::open(&over).unwrap();
        assert_eq!(read(&*disk, 512, 4096), content[512..512 + 4096]);
        write(&*disk, 1024, &[1; 512]);
        disk.discard(128 << 10, 64 << 10).unwrap();
        disk.flush().unwrap();
        let now = read(&*disk, 512, 2048);
        assert!(now[..512] == content[512..1024] && now[512..1024] == [1; 512] && now[1024..] == content[1536..2560]);
        assert_eq!(read(&*disk, 128 << 10, 512), [0; 512], "not what the base has there");
        assert_eq!(std::fs::read(&base).unwrap(), content);
        // Others may read the base in the meantime, and put their own overlay over it; no one may write to it.
        assert!(error(&options(&base)).contains("in use by another VM"));
        image::open(&ImageOptions { overlay: Some(Overlay::Tmp), ..options(&base) }).unwrap();
    }
    // The overlay file is kept, with its data.
    let again = ImageOptions { overlay: Some(Overlay::File(top.clone())), ..options(&base) };
    assert_eq!(read(&*image::open(&again).unwrap(), 1024, 512), [1; 512]);
    let left: Vec<_> = dir.path().read_dir().unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
    // But the overlay is refused over another disk.
    let other = dir.path().join("other.img");
    std::fs::write(&other, &content).unwrap();
    let message = error(&ImageOptions { path: other, ..again });
    assert!(message.contains("was created for the disk") && message.contains("base.img"), "{message}");
    std::fs::write(&top, "precious").unwrap();
    assert!(
        error(&ImageOptions { overlay: Some(Overlay::File(top.clone())), ..options(&base) })
            .contains("cannot be used as an overlay")
    );
    assert_eq!(std::fs::read(&top).unwrap(), b"precious");
}

#[test]
fn an_overlay_is_made_once_however_many_want_it() {
    let dir = tempfile::tempdir().unwrap();
    let (base, top) = (dir.path().join("base.img"), dir.path().join("top.qcow2"));
    std::fs::write(&base, [0; 4096]).unwrap();
    let over = ImageOptions { overlay: Some(Overlay::File(top.clone())), ..options(&base) };
    let start = std::sync::Barrier::new(4);
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads = [(); 4].map(|()| {
            scope.spawn(|| {
                start.wait();
                let disk = image::open(&over)?;
                write(&*disk, 512, &[7; 512]);
                Ok(disk)
            })
        });
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for e in results.iter().filter_map(|result: &Result<_, Error>| result.as_ref().err()) {
        assert!(matches!(e, Error::InUse { .. }), "{e}");
    }
    assert_eq!(results.iter().flatten().count(), 1);
    drop(results);
    let disk = crate::backend::when_free(|| image::open(&over));
    assert_eq!(read(&*disk, 512, 512), [7; 512], "what the one wrote");
    assert_eq!(dir.path().read_dir().unwrap().count(), 2, "nothing else is left");
    // The first file stays.
    assert_eq!(give_name(&base, &top).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    assert!(std::fs::read(&top).unwrap().starts_with(b"QFI"));
}

#[test]
fn direct_is_for_all_of_an_images_files() {
    // Use the checkout's file system, which supports O_DIRECT; that of temporary folders may not.
    let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let (below, base, top) = (dir.path().join("below"), dir.path().join("base"), dir.path().join("top"));
    std::fs::write(&below, vec![3; SIZE as usize]).unwrap();
    qcow2(&base, SIZE, Some((&below, Format::Raw)));
    let options = ImageOptions { direct: true, format: Some(Format::Qcow2), ..options(&base) };
    let over = ImageOptions { overlay: Some(Overlay::File(top.clone())), ..options.clone() };
    let is_direct = |fd: &str| {
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim();
        i32::from_str_radix(flags, 8).unwrap() & libc::O_DIRECT != 0
    };
    for again in [false, true] {
        let disk = crate::backend::when_free(|| image::open(&over));
        let mut open = Vec::new();
        for entry in Path::new("/proc/self/fd").read_dir().unwrap().flatten() {
            if let Ok(file) = entry.path().read_link()
                && file.starts_with(dir.path())
            {
                assert!(is_direct(entry.file_name().to_str().unwrap()), "{}", file.display());
                open.push(file);
            }
        }
        assert!([&below, &base, &top].iter().all(|file| open.contains(file)), "{open:?}");
        if !again {
            // Neither the disk's ranges nor the memory are aligned to blocks.
            write(&*disk, 512 * 7, &[5; 3 * 512]);
            write(&*disk, 512 * 200, &[6; 80 * 512]);
            disk.write_zeroes(512 * 8, 512, false).unwrap();
            disk.flush().unwrap();
        }
        let expected = [[3; 512], [5; 512], [0; 512], [5; 512], [3; 512]].concat();
        assert_eq!(read(&*disk, 512 * 6, 5 * 512), expected);
        assert_eq!(read(&*disk, 512 * 200, 81 * 512), [vec![6; 80 * 512], vec![3; 512]].concat());
    }
    let file = throw_away(dir.path(), SIZE, true).unwrap();
    assert!(is_direct(&std::os::fd::AsRawFd::as_raw_fd(&file).to_string()));
    let image = Image::check(file, dir.path(), true, true).unwrap().open(None).unwrap();
    let disk = Qcow2Disk::new(image, dir.path(), false).unwrap();
    write(&disk, 512, &[8; 3 * 512]);
    assert_eq!(read(&disk, 0, 512 * 2), [[0; 512], [8; 512]].concat());
}

#[test]
fn a_guest_cannot_have_files_opened_by_what_it_writes() {
    let dir = tempfile::tempdir().unwrap();
    let (secret, disk, own) = (dir.path().join("secret"), dir.path().join("disk.qcow2"), dir.path().join("own"));
    std::fs::write(&secret, vec![42; 64 << 10]).unwrap();
    qcow2(&disk, SIZE, Some((&secret, Format::Raw)));
    let message = error(&options(&disk));
    assert!(message.contains("refers to the base image") && message.contains("add format=qcow2"), "{message}");
    // The base is opened if the user says so.
    let trusted = ImageOptions { format: Some(Format::Qcow2), ..options(&disk) };
    assert_eq!(read(&*image::open(&trusted).unwrap(), 0, 512), [42; 512]);
    // But its format must be stated: another guest could have written to the base as raw bytes.
    let mut header = vec![0; 4096];
    let image = File::options().read(true).write(true).open(&disk).unwrap();
    image.read_exact_at(&mut header, 0).unwrap();
    let at = header.windows(4).position(|word| word == [0xE2, 0x79, 0x2A, 0xCA]).unwrap();
    image.write_all_at(&[1; 4], at as u64).unwrap();
    drop(image);
    let message = error(&trusted);
    assert!(message.contains("whether its base image") && message.contains("-F raw"), "{message}");
    // The image is harmless as raw bytes in any case.
    let raw = ImageOptions { format: Some(Format::Raw), ..options(&disk) };
    assert_eq!(&read(&*image::open(&raw).unwrap(), 0, 4), b"QFI\xfb");
    // An image that is its own base must not cause an endless recursion.
    qcow2(&own, SIZE, Some((&own, Format::Qcow2)));
    let own = ImageOptions { format: Some(Format::Qcow2), readonly: true, ..options(&own) };
    assert!(error(&own).contains("its own base"), "{}", error(&own));
}

/// Returns the error of an image once no other process has it open.
fn when_unlocked(error: impl Fn() -> String) -> String {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    loop {
        let message = error();
        if !message.contains("in use by another VM") || std::time::Instant::now() > deadline {
            return message;
        }
        std::thread::yield_now();
    }
}

/// Changes bytes of a file.
fn patch(path: &Path, at: u64, bytes: &[u8]) {
    File::options().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
}

fn qemu_img(args: &[&str]) -> String {
    let output =
        std::process::Command::new("qemu-img").args(args).output().expect("qemu-img is installed (qemu-utils)");
    assert!(output.status.success(), "qemu-img {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn what_a_header_cannot_say_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let cases: &[(u64, &[u8], &str)] = &[
        (4, &[0, 0, 0, 1], "the old qcow format; 'qemu-img convert -f qcow -O qcow2"),
        (4, &[0, 0, 0, 4], "version 4 of the format"),
        (8, &[0, 0, 0, 0, 0, 0, 0, 104, 0, 0, 4, 0], "the name of its base image is misplaced"),
        (8, &[0, 0, 0, 0, 0, 0, 0xFF, 0xF0, 0, 0, 0, 16], "the name of its base image is misplaced"),
        (8, &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8], "clusters of 2^8 bytes"),
        (20, &[0, 0, 0, 22], "clusters of 2^22 bytes"),
        (20, &[0xFF; 4], "clusters of 2^4294967295 bytes"),
        (24, &[0, 1], "does not cover the 281474977759232 bytes of the disk"),
        (24, &[0xFF; 8], "does not cover"),
        (32, &[0, 0, 0, 1], "it is encrypted (AES), which is not supported; 'qemu-img convert --object secret"),
        (32, &[0, 0, 0, 2], "it is encrypted (LUKS)"),
        (32, &[0, 0, 0, 3], "an unknown method (3)"),
        (36, &[0, 0x80, 0, 0], "its first-level table is larger than 32 MiB"),
        (36, &[0, 0, 0, 0], "does not cover"),
        (40, &[0, 0, 0, 0, 0, 0, 1], "its first-level table at 0x100 is misplaced"),
        (40, &[0x40], "is misplaced"),
        (40, &[0; 8], "its first-level table at 0x0 is misplaced"),
        (48, &[0x40], "its table of reference counts at"),
        (56, &[0; 4], "its reference counts are broken: their table has no clusters"),
        (56, &[0xFF; 4], "its table of reference counts is larger than 8 MiB"),
        (60, &[0, 1, 0, 1], "65537 snapshots"),
        (60, &[0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 8], "its table of snapshots at 0x8"),
        (72, &[0, 0, 0, 0, 0, 0, 0, 1], "(dirty); 'qemu-img check -r all"),
        (72, &[0, 0, 0, 0, 0, 0, 0, 2], "marked as corrupt; 'qemu-img check -r all"),
        (72, &[0, 0, 0, 0, 0, 0, 0, 4], "its data is in another file (data_file)"),
        (72, &[0, 0, 0, 0, 0, 0, 0, 8], "its compression type 0"),
        (72, &[0, 0, 0, 0, 0, 0, 0, 16], "(extended_l2), which are not supported; 'qemu-img convert"),
        (72, &[0x80], "incompatible feature 63"),
        (96, &[0, 0, 0, 7], "2^7 bits"),
        (100, &[0, 0, 0, 96], "96 bytes long"),
        (100, &[0, 0, 0, 105], "105 bytes long"),
        (100, &[0xFF; 4], "bytes long"),
        (108, &[0xFF; 4], "is too long"),
    ];
    for (n, (at, bytes, why)) in cases.iter().enumerate() {
        let path = dir.path().join(format!("{n}.qcow2"));
        qcow2(&path, SIZE, None);
        patch(&path, *at, bytes);
        let message = error(&options(&path));
        assert!(
            message.contains(why) && message.starts_with("disk ") && message.contains("cannot be used: "),
            "{n}: {message}"
        );
    }
}

#[test]
fn tables_that_would_harm_are_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    // imago writes the header, the reference count table, its block, and the first-level table; data follows.
    let fresh = |name: String| {
        let path = dir.path().join(format!("{name}.qcow2"));
        qcow2(&path, SIZE, None);
        let disk = image::open(&options(&path)).unwrap();
        write(&*disk, 0, &[3; 4096]);
        drop(disk);
        let file = File::open(&path).unwrap();
        let at = |at| u64::from_be_bytes(read_at(&file, at, 8).unwrap().try_into().unwrap());
        let (l1, refcounts) = (at(40), at(48));
        let (l2, block) = (at(l1) & !(1 << 63), at(refcounts));
        (path, [l1, refcounts, l2, block, at(l2) & !(1 << 63)])
    };
    let (_, [l1, refcounts, l2, block, data]) = fresh("layout".into());
    let entry = |value: u64| value.to_be_bytes().to_vec();
    let copied = 1 << 63;
    let cases = [
        (refcounts, entry(0), "the first block is missing"),
        (refcounts, entry(block | 1), "makes no sense"),
        (refcounts, entry(1 << 40), "past the end of the file"),
        (refcounts + 8, entry(block), "used for two things"),
        (refcounts + 8, entry(l2), "used for two things"),
        (block + 2 * (data >> 16), vec![0, 2], "is shared, but marked as not shared"),
        (block + 2 * (l2 >> 16), vec![0, 2], "is shared, but marked as not shared"),
        (l1, entry(l2 | 1 << 62 | copied), "makes no sense"),
        (l1, entry(copied | 1 << 40), "past the end of the file"),
        (l1, entry(copied | block), "used for two things"),
        (l1, entry(copied | refcounts), "used for two things"),
        (l2 + 8, entry(copied | data), "used for two things"),
        (l2 + 8, entry(copied | l2), "used for two things"),
        (l2 + 8, entry(copied | refcounts), "used for two things"),
        (l2 + 8, entry(copied | 1 << 40), "past the end of the file"),
        (l2 + 8, entry(copied | (data + 512)), "makes no sense"),
        (l2 + 8, entry(1 << 62 | data), "used for two things"),
        (l2 + 8, entry(1 << 62 | (data + 65536 - 512)), "used for two things"),
        (l2 + 8, entry(1 << 62 | 1 << 40), "a cluster is past the end of the file"),
        (l2 + 8, entry(0x3 << 62 | data), "makes no sense"),
        (l2, [entry(1 << 62 | data), entry(1 << 62 | (data + 512))].concat(), "has 2 users"),
    ];
    for (n, (at, bytes, why)) in cases.into_iter().enumerate() {
        let (path, _) = fresh(n.to_string());
        patch(&path, at, &bytes);
        let before = std::fs::read(&path).unwrap();
        let message = when_unlocked(|| error(&options(&path)));
        assert!(message.contains(why) && message.contains("'qemu-img check -r all"), "{n}: {message}");
        assert!(std::fs::read(&path).unwrap() == before, "{n}");
    }
}

#[test]
fn what_a_killed_monitor_did_not_count_is_counted() {
    let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    for direct in [false, true] {
        let path = dir.path().join(format!("{direct}.qcow2"));
        qcow2(&path, SIZE, None);
        write(&*image::open(&options(&path)).unwrap(), 0, &[3; 4096]);
        let number = |at| u64::from_be_bytes(read_at(&File::open(&path).unwrap(), at, 8).unwrap().try_into().unwrap());
        // Pretend that none of the file's clusters was ever counted.
        patch(&path, number(number(48)), &[0; 64]);
        let disk = crate::backend::when_free(|| image::open(&ImageOptions { direct, ..options(&path) }));
        write(&*disk, 128 << 10, &[5; 100 << 10]);
        assert_eq!(read(&*disk, 0, 4096), [3; 4096]);
        drop(disk);
        qemu_img(&["check", "-q", path.to_str().unwrap()]);
        // Missing counts are not added if there is a snapshot, which may refer to the clusters too.
        qemu_img(&["snapshot", "-c", "now", path.to_str().unwrap()]);
        patch(&path, number(number(48)), &[0; 64]);
        let message = when_unlocked(|| error(&options(&path)));
        assert!(message.contains("is in use and not counted; 'qemu-img check -r all"), "{message}");
    }
}

#[test]
fn names_of_features_are_the_images_own_business() {
    let dir = tempfile::tempdir().unwrap();
    for len in 0..=97u32 {
        let path = dir.path().join(format!("{len}.qcow2"));
        qcow2(&path, SIZE, None);
        let mut extension = [&FEATURE_NAMES.to_be_bytes()[..], &len.to_be_bytes()].concat();
        let mut names = [&[0, 63][..], b"telepathy\n\x1b[31m", &[0; 60]].concat();
        names.resize(104, 0);
        names.truncate(len as usize);
        extension.extend(names);
        extension.resize(extension.len().next_multiple_of(8) + 8, 0);
        patch(&path, 104, &extension);
        write(&*image::open(&options(&path)).unwrap(), 0, &[1; 512]);
        patch(&path, 72, &[0x80]);
        let message = when_unlocked(|| error(&options(&path)));
        let name = if len >= 48 { "incompatible feature 63 (telepathy[31m)" } else { "incompatible feature 63" };
        assert!(message.ends_with(name), "{len}: {message}");
    }
    const FEATURE_NAMES: u32 = 0x6803_F857;
}

#[test]
fn what_does_not_survive_a_writer_is_cleared() {
    let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    for direct in [false, true] {
        let path = dir.path().join(format!("{direct}.qcow2"));
        qcow2(&path, SIZE, None);
        patch(&path, 88, &[0, 0, 0, 0, 0, 0, 0, 1]);
        let autoclear = || read_at(&File::open(&path).unwrap(), 88, 8).unwrap();
        drop(image::open(&ImageOptions { readonly: true, ..options(&path) }).unwrap());
        assert_eq!(autoclear()[7], 1);
        write(&*crate::backend::when_free(|| image::open(&ImageOptions { direct, ..options(&path) })), 0, &[1; 512]);
        assert_eq!(autoclear(), [0; 8]);
        qemu_img(&["check", "-q", path.to_str().unwrap()]);
    }
}

#[test]
fn images_of_qemu_are_read_written_and_sound_afterwards() {
    let dir = tempfile::tempdir().unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_string();
    let raw = dir.path().join("raw");
    let mut content: Vec<u8> = (0..3u32 << 20).map(|i| (i / 7 % 251) as u8 ^ (i >> 13) as u8).collect();
    content[1 << 20..(1 << 20) + 300_000].fill(0);
    // The last cluster is incomplete.
    content.truncate((3 << 20) - 512 * 77);
    std::fs::write(&raw, &content).unwrap();
    for (n, how) in [
        &["-c", "-o", "compression_type=zstd"][..],
        &["-c", "-o", "compression_type=zstd,cluster_size=4k,refcount_bits=1"],
        &["-c"],
        &["-c", "-o", "cluster_size=512,refcount_bits=64"],
        &["-o", "compat=0.10"],
        &["-o", "cluster_size=2M,lazy_refcounts=on"],
        &["-o", "preallocation=metadata"],
    ]
    .into_iter()
    .enumerate()
    {
        let path = dir.path().join(format!("{n}.qcow2"));
        let (from, to) = (text(&raw), text(&path));
        qemu_img(&[&["convert", "-f", "raw", "-O", "qcow2"], how, &[&from, &to]].concat());
        // Test it below a temporary overlay, then by itself.
        let mut overlay = Some(Overlay::Tmp);
        let expected = loop {
            let last = overlay.is_none();
            let all = ImageOptions { overlay: overlay.take(), ..options(&path) };
            let disk = crate::backend::when_free(|| image::open(&all));
            assert_eq!(disk.size(), content.len() as u64);
            let mut model = content.clone();
            for (offset, len) in
                [(0, 512), (512 * 3, 70_656), (200_192, 131_072), (content.len() - 1024, 1024), (1 << 20, 512)]
            {
                write(&*disk, offset as u64, &vec![n as u8 + 1; len]);
                model[offset..offset + len].fill(n as u8 + 1);
            }
            disk.write_zeroes(400_384, 5120, false).unwrap();
            model[400_384..405_504].fill(0);
            for at in (0..content.len()).step_by(1 << 19) {
                let len = (content.len() - at).min(1 << 19);
                assert!(read(&*disk, at as u64, len) == model[at..at + len], "{how:?} at {at}");
            }
            disk.flush().unwrap();
            drop(disk);
            if last {
                break model;
            }
        };
        qemu_img(&["check", "-q", &to]);
        let back = dir.path().join("back");
        qemu_img(&["convert", "-f", "qcow2", "-O", "raw", &to, &text(&back)]);
        assert!(std::fs::read(&back).unwrap() == expected, "{how:?}");
    }
}

#[test]
fn an_internal_snapshot_keeps_what_it_has() {
    let dir = tempfile::tempdir().unwrap();
    let (raw, path) = (dir.path().join("raw"), dir.path().join("a.qcow2"));
    let text = |path: &Path| path.to_str().unwrap().to_string();
    std::fs::write(&raw, vec![7; SIZE as usize]).unwrap();
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", &text(&raw), &text(&path)]);
    qemu_img(&["snapshot", "-c", "before", &text(&path)]);
    for round in 1..=2 {
        let disk = crate::backend::when_free(|| image::open(&options(&path)));
        write(&*disk, 65536 * round, &[8; 80_384]);
        disk.discard(65536 * 8, 65536 * 2).unwrap();
        disk.flush().unwrap();
    }
    qemu_img(&["check", "-q", &text(&path)]);
    let at = |snapshot: &[&str]| {
        let back = dir.path().join("back");
        qemu_img(&[&["convert", "-f", "qcow2", "-O", "raw"], snapshot, &[&text(&path), &text(&back)]].concat());
        std::fs::read(back).unwrap()
    };
    assert!(at(&["-l", "before"]) == vec![7; SIZE as usize]);
    let now = at(&[]);
    assert!(now[65536..65536 * 2 + 80_384] == [8; 65536 + 80_384] && now[..65536] == [7; 65536]);
    assert!(now[65536 * 8..65536 * 10].iter().all(|byte| *byte == 0));
}

#[test]
fn a_missing_base_and_its_image_are_both_named() {
    let dir = tempfile::tempdir().unwrap();
    let [top, middle, base] = ["top.qcow2", "middle.qcow2", "base.img"].map(|name| dir.path().join(name));
    qcow2(&top, SIZE, Some((&middle, Format::Qcow2)));
    qcow2(&middle, SIZE, Some((&base, Format::Raw)));
    let trusted = ImageOptions { format: Some(Format::Qcow2), ..options(&top) };
    let (top, middle, base) = (top.display(), middle.display(), base.display());
    assert_eq!(
        error(&trusted),
        format!(
            "disk {top} cannot be used: its base image {middle}: its base image {base} cannot be opened: \
             No such file or directory (os error 2)"
        )
    );
    std::fs::remove_file(middle.to_string()).unwrap();
    assert_eq!(
        error(&trusted),
        format!(
            "disk {top} cannot be used: its base image {middle} cannot be opened: No such file or directory (os error 2)"
        )
    );
}

#[test]
fn a_folder_for_temporary_files_that_is_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("none");
    assert_eq!(
        throw_away(&folder, SIZE, false).unwrap_err().to_string(),
        format!("cannot create the file for overlay=tmp in {} (set TMPDIR to use another folder)", folder.display())
    );
}

#[test]
fn what_is_checked_is_what_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    qcow2(&path, SIZE, None);
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let image = Image::check(file, &path, true, false).unwrap();
    // Change the header and the tables between the check and the use.
    let file = File::options().read(true).write(true).open(&path).unwrap();
    file.write_all_at(&[0xFF; 4], 20).unwrap();
    file.write_all_at(&[0xFF; 40], 104).unwrap();
    file.write_all_at(&[0xFF; 64], image.header.l1.offset).unwrap();
    file.write_all_at(&[0; 64], image.header.refcounts.offset).unwrap();
    let disk = Qcow2Disk::new(image.open(None).unwrap(), &path, false).unwrap();
    write(&disk, 4096, &[9; 4096]);
    assert_eq!(read(&disk, 4096, 4096), [9; 4096]);
}

/// Byte changes of a stranger's image, in places that matter.
fn flips() -> impl Strategy<Value = Vec<(u64, u8)>> {
    // Mostly in the header and in the tables, which are in the first five clusters.
    let at =
        prop_oneof![3 => 0..120u64, 2 => (1..6u64, 0..64u64).prop_map(|(n, at)| n * 65536 + at), 1 => 0..6 * 65536u64];
    proptest::collection::vec((at, any::<u8>()), 1..6)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    /// An image with changed bytes is refused, or reading and writing it causes errors at most.
    #[test]
    fn broken_images_are_no_crash(flips in flips(), readonly: bool) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcow2");
        qcow2(&path, SIZE, None);
        write(&*image::open(&options(&path)).unwrap(), 65536, &[3; 70_000 - 70_000 % 512]);
        let mut file = File::options().write(true).open(&path).unwrap();
        for (at, byte) in flips {
            file.write_all_at(&[byte], at).unwrap();
        }
        file.flush().unwrap();
        drop(file);
        let all = ImageOptions { format: Some(Format::Qcow2), readonly, ..options(&path) };
        if let Ok(disk) = image::open(&all) {
            let ram = GuestRam::anonymous(SIZE);
            let end = disk.size().min(SIZE);
            let _ = disk.read(&[ram.slice(0, end).unwrap()], 0);
            if !readonly {
                let _ = disk.write(&[ram.slice(0, end / 2).unwrap()], 0);
                let _ = disk.discard(65536, 65536);
                let _ = disk.write(&[ram.slice(0, end).unwrap()], 0);
                let _ = disk.flush();
            }
        }
    }
}

#[test]
fn all_images_below_one_are_known_before_any_is_opened() {
    let dir = tempfile::tempdir().unwrap();
    let [top, middle, base, own] = ["top", "middle", "base", "own"].map(|name| dir.path().join(name));
    qcow2(&top, SIZE, Some((&middle, Format::Qcow2)));
    qcow2(&middle, SIZE, Some((Path::new("base"), Format::Raw)));
    qcow2(&own, SIZE, Some((&own, Format::Qcow2)));
    let found = |path: &Path, format| bases(path, format).unwrap();
    assert_eq!(found(&top, Some(Format::Qcow2)), [middle.clone(), base.clone()]);
    // A raw image is not believed, whatever it looks like.
    qcow2(&base, SIZE, Some((&own, Format::Qcow2)));
    assert_eq!(found(&top, Some(Format::Qcow2)), [middle.clone(), base]);
    // What is not opened leads no further.
    assert_eq!(found(&top, None), std::slice::from_ref(&middle));
    assert!(found(&top, Some(Format::Raw)).is_empty());
    assert_eq!(found(&own, Some(Format::Qcow2)).len(), MAX_DEPTH);
    std::fs::remove_file(&middle).unwrap();
    assert_eq!(found(&top, Some(Format::Qcow2)), [middle]);
    assert!(found(dir.path(), None).is_empty() && found(&dir.path().join("missing"), None).is_empty());
}
