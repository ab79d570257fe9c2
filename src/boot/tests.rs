//! Tests of every format from file to memory, and of the messages for files that cannot be booted.

use std::fs::OpenOptions;
use std::os::fd::AsRawFd;

use proptest::prelude::*;

use super::testing::{self, Files, INVERSE, LINUX_NOTE, POINTER, START, Seg};
use super::unpack::Compression;
use super::*;
use crate::memory::GuestRam;

const RAM: u64 = 64 << 20;
const FORMATS: [Compression; 4] = [Compression::Gzip, Compression::Zstd, Compression::Lz4, Compression::Bzip2];

fn platform() -> Platform {
    Platform { cpus: 1, acpi: true, uuid: [0; 16], virtio_slots: Vec::new(), serial: true, clocks: false }
}

/// Boots `bytes` up to the first instruction.
fn boot(bytes: &[u8], change: impl FnOnce(&mut BootConfig)) -> Result<(Description, GuestRam, Entry), Error> {
    let files = Files::new();
    let mut config = BootConfig { kernel: files.write("kernel", bytes), ..Default::default() };
    change(&mut config);
    let boot = BootFiles::open_with(&config, RAM, None)?;
    let (description, ram) = (boot.describe(), GuestRam::anonymous(RAM));
    let entry = boot.load(&ram, &platform())?;
    Ok((description, ram, entry))
}

/// Returns the error for `bytes` as a user sees it, without the file's name.
fn refusal(bytes: &[u8], change: impl FnOnce(&mut BootConfig)) -> String {
    let error = boot(bytes, change).expect_err("should be refused");
    let mut error: &dyn std::error::Error = &error;
    let mut text = Vec::new();
    if !matches!(error.downcast_ref(), Some(Error::Kernel { .. } | Error::Initrd { .. })) {
        text.push(error.to_string());
    }
    while let Some(source) = error.source() {
        text.push(source.to_string());
        error = source;
    }
    text.join(": ")
}

/// Files that are sparse and huge, or a stream of compressed nothing, take no longer than others.
#[test]
fn only_what_can_be_a_kernel_is_looked_through() {
    const HUGE: u64 = 1 << 41;
    let files = Files::new();
    let opened = |bytes: &[u8]| {
        let kernel = files.write("kernel", bytes);
        OpenOptions::new().write(true).open(&kernel).unwrap().set_len(HUGE).unwrap();
        BootFiles::open_with(&BootConfig { kernel, ..Default::default() }, RAM, None)
    };
    let says = |version: &[u8]| [b"Linux version ", version, b" (me)\0"].concat();
    let mut text = says(b"6.1.0");
    text.resize(0x1000, 0x90);
    let map = super::kaslr::START_KERNEL_MAP;
    let segment = |text: Vec<u8>| [Seg(START, map + START, text, 0x2000)];
    let linux = testing::elf64(START, &segment(text), &[LINUX_NOTE]);
    assert_eq!(opened(&linux).unwrap().describe().version.as_deref(), Some("6.1.0"));
    // Behind what is loaded.
    let nameless = testing::elf64(START, &segment(vec![0x90; 0x1000]), &[LINUX_NOTE]);
    assert_eq!(opened(&[nameless, says(b"6.2.0")].concat()).unwrap().describe().version, None);
    // Blocks without anything in them.
    for compressed in [&b"\x28\xb5\x2f\xfd\x00\x68"[..], b"\x1f\x8b\x08\0\0\0\0\0\0\x03"] {
        let error = opened(compressed).map(|_| ()).unwrap_err();
        assert!(testing::chain(&error).ends_with("of compressed data, and no kernel has more than 512M"), "{error}");
    }
}

#[test]
fn bzimages_are_unpacked_and_relocated() {
    for format in FORMATS {
        let bytes = testing::bzimage(format, &testing::linux(0));
        let (description, ram, entry) = boot(&bytes, |_| ()).unwrap();
        assert_eq!(description.format, format!("bzImage, {}", format.name()));
        assert_eq!(description.version.as_deref(), Some("6.1.0-test"));
        assert!(description.kaslr);
        assert_eq!((entry.protocol, entry.address % (2 << 20)), (Protocol::Linux64, 0));
        let delta = ram.read_obj::<u64>(entry.address + 0x100).unwrap().wrapping_sub(POINTER);
        assert_eq!(delta % (2 << 20), 0);
        assert!(START + delta + 0x10_0000 <= 1 << 30);
        assert_eq!(ram.read_obj::<u32>(entry.address + 0x200).unwrap(), (POINTER + delta) as u32);
        assert_eq!(ram.read_obj::<u32>(entry.address + 0x300).unwrap(), INVERSE.wrapping_sub(delta as u32));
        assert_eq!(ram.read_obj::<[u8; 5]>(entry.address + 0x1000).unwrap(), *b"data\0");
        assert_eq!(ram.read_obj::<u8>(layout::ZERO_PAGE + 0x211).unwrap() & 2, 2, "KASLR_FLAG");
    }
}

#[test]
fn addresses_differ_from_boot_to_boot() {
    let bytes = testing::linux(0);
    let boots: Vec<_> = (0..24).map(|_| boot(&bytes, |_| ()).unwrap()).collect();
    let virt = |b: &(Description, GuestRam, Entry)| b.1.read_obj::<u64>(b.2.address + 0x100).unwrap();
    assert!(boots.iter().any(|b| virt(b) != virt(&boots[0])));
    assert!(boots.iter().any(|b| b.2.address != boots[0].2.address));
}

#[test]
fn a_linux_gets_its_parameter_in_front() {
    for (cmdline, found) in [("", "first=1\0"), ("quiet -- x", "first=1 quiet -- x\0")] {
        let with = |c: &mut BootConfig| (c.cmdline, c.linux_parameter) = (cmdline.into(), Some("first=1".into()));
        let (_, ram, _) = boot(&testing::linux(0), with).unwrap();
        let mut text = vec![0; found.len()];
        ram.read(layout::CMDLINE, &mut text).unwrap();
        assert_eq!(text, found.as_bytes());
    }
}

#[test]
fn nokaslr_keeps_the_kernel_where_it_was_linked() {
    for cmdline in ["nokaslr", "quiet nokaslr", "nokaslr -- x"] {
        let (description, ram, entry) = boot(&testing::linux(0), |c| c.cmdline = cmdline.into()).unwrap();
        assert!(!description.kaslr);
        assert_eq!(entry.address, START);
        assert_eq!(ram.read_obj::<u64>(START + 0x100).unwrap(), POINTER);
        assert_eq!(ram.read_obj::<u8>(layout::ZERO_PAGE + 0x211).unwrap(), 1);
    }
    assert!(boot(&testing::linux(0), |c| c.cmdline = "xnokaslr nokaslr=1".into()).unwrap().0.kaslr);
    let limited = boot(&testing::linux(0), |c| c.cmdline = "mem=32M".into()).unwrap();
    assert_eq!((limited.0.kaslr, limited.2.address), (true, START), "random virtually, but not physically");
}

#[test]
fn elf_files_compressed_or_not() {
    let plain = testing::plain_linux(0);
    let (description, ..) = boot(&plain, |_| ()).unwrap();
    assert_eq!((description.format.as_str(), description.kaslr), ("vmlinux", false));
    let two_tables = [plain.clone(), testing::tables(false)].concat();
    assert!(boot(&two_tables, |_| ()).unwrap().0.kaslr);
    let something_else = [plain, b"a signature!".to_vec()].concat();
    assert!(!boot(&something_else, |_| ()).unwrap().0.kaslr);
    for format in FORMATS {
        let packed = testing::compress(format, &testing::linux(0));
        assert_eq!(boot(&packed, |_| ()).unwrap().0.format, format!("vmlinux in {}", format.name()));
    }
    let twice = testing::compress(Compression::Gzip, &testing::bzimage(Compression::Bzip2, &testing::linux(0)));
    assert_eq!(boot(&twice, |_| ()).unwrap().0.format, "bzImage, bzip2 in gzip");
}

#[test]
fn pvh_for_other_kernels_or_on_request() {
    let pvh = |bytes: &[u8]| boot(bytes, |_| ()).unwrap();
    let entry = 0x20_0010u32.to_le_bytes();
    let wide = 0x20_0010u64.to_le_bytes();
    let segment = || [Seg(0x20_0000, 0x20_0000, vec![0x90; 64], 0x1000)];
    let kernels = [
        testing::elf32(0x20_0000, &segment(), &[(b"Xen\0", 18, &entry)]),
        testing::elf64(0x20_0000, &segment(), &[(b"GNU\0", 3, b"abc"), (b"Xen\0", 18, &entry)]),
        testing::elf64(0x20_0000, &segment(), &[(b"Xen\0", 18, &wide)]),
    ];
    for kernel in kernels {
        let (description, ram, entry) = pvh(&kernel);
        assert_eq!((entry.protocol, entry.address), (Protocol::Pvh, 0x20_0010));
        assert_eq!(description.format, "PVH ELF");
        assert_eq!(ram.read_obj::<u32>(layout::PVH_START_INFO).unwrap(), 0x336E_C578);
    }
    let (_, ram, entry) = boot(&testing::linux(0), |c| c.boot = BootMode::Pvh).unwrap();
    assert_eq!((entry.protocol, entry.address), (Protocol::Pvh, START + 0x50));
    assert_eq!(ram.read_obj::<u64>(START + 0x100).unwrap(), POINTER);
    let flat = testing::elf64(0x20_0000, &segment(), &[]);
    assert_eq!(pvh(&flat).2, Entry { address: 0x20_0000, protocol: Protocol::Linux64, info: layout::ZERO_PAGE });
}

#[test]
fn multiboot_for_files_that_say_nothing_better() {
    let segment = || [Seg(0x20_0000, 0x20_0000, testing::multiboot(0), 0x1000)];
    for kernel in [testing::elf32(0x20_0020, &segment(), &[]), testing::elf64(0x20_0020, &segment(), &[])] {
        let packed = testing::compress(Compression::Gzip, &kernel);
        for (bytes, format) in [(kernel, "multiboot ELF"), (packed, "multiboot ELF in gzip")] {
            let (description, ram, entry) = boot(&bytes, |c| c.cmdline = "a b".into()).unwrap();
            assert_eq!((entry.protocol, entry.address), (Protocol::Multiboot, 0x20_0020));
            assert_eq!(description.format, format);
            let mut text = [0; 64];
            ram.read(layout::CMDLINE, &mut text).unwrap();
            let text = text.split(|byte| *byte == 0).next().unwrap();
            assert!(text.ends_with(b"/kernel a b"), "{}", String::from_utf8_lossy(text));
        }
    }
    let note = 0x20_0010u32.to_le_bytes();
    let both = testing::elf32(0x20_0020, &segment(), &[(b"Xen\0", 18, &note)]);
    assert_eq!(boot(&both, |_| ()).unwrap().2.protocol, Protocol::Pvh);
    assert_eq!(boot(&both, |c| c.boot = BootMode::Multiboot).unwrap().2.protocol, Protocol::Multiboot);
    let direct = boot(&testing::elf64(0x20_0020, &segment(), &[]), |c| c.boot = BootMode::Direct).unwrap();
    assert_eq!(direct.2.protocol, Protocol::Linux64);
    let error = refusal(&testing::linux(0), |c| c.boot = BootMode::Multiboot);
    assert_eq!(error, "this is vmlinux; --boot multiboot needs a multiboot header");
    let files = Files::new();
    // A kernel in the first MiB, with an initrd that fills the rest of RAM.
    let low = testing::multiboot(0x8000);
    let (_, ram, entry) = boot(&low, |c| c.initrd = vec![files.write("initrd", &vec![7; 63 << 20])]).unwrap();
    assert_eq!(entry.address, 0x8020);
    let module: u32 = ram.read_obj(ram.read_obj::<u32>(layout::MULTIBOOT_INFO + 24).unwrap().into()).unwrap();
    assert_eq!(module, 1 << 20);
    let error = refusal(&low, |c| c.initrd = vec![files.write("large", &vec![7; (63 << 20) + 1])]);
    assert_eq!(error, "it needs at least 65M of memory; the machine has 64M");
    // A kernel at the usual place of vireo's own data.
    let (_, ram, entry) = boot(&testing::multiboot(layout::CMDLINE as u32), |c| c.cmdline = "a b".into()).unwrap();
    let text: u32 = ram.read_obj(entry.info + 16).unwrap();
    let mut line = [0; 256];
    ram.read(text.into(), &mut line).unwrap();
    assert!(line.split(|byte| *byte == 0).next().unwrap().ends_with(b"/kernel a b"));
    assert_eq!(ram.read_obj::<u8>(layout::CMDLINE + 0x20).unwrap(), 0x90, "the kernel is there");
    let error = refusal(&low, |c| c.cmdline = "x".repeat(0xFFFF));
    assert!(error.ends_with("this kernel takes at most 65535"), "{error}");
}

#[test]
fn a_bzimage_may_stay_packed() {
    let bytes = testing::bzimage(Compression::Gzip, &testing::linux(0));
    let (description, ram, entry) = boot(&bytes, |c| c.boot = BootMode::BzImage).unwrap();
    assert_eq!(description.format, "bzImage, unpacked by the guest");
    assert_eq!(entry.address, START + 0x200);
    assert_eq!(ram.read_obj::<[u8; 2]>(START + 0x240).unwrap(), [0x1F, 0x8B]);
    // An image with a compression that only the guest knows also stays packed.
    let unknown = testing::bzimage_of(&[0x5D; 64]);
    assert_eq!(boot(&unknown, |_| ()).unwrap().2.address, START + 0x200);
    let refused = refusal(&unknown, |c| c.boot = BootMode::Direct);
    assert!(refused.starts_with("this is a bzImage with an unknown compression; --boot direct needs"), "{refused}");
}

/// memtest86+ has a kernel's setup header but contains no compressed kernel, and it ends within its last paragraph.
#[test]
fn a_bzimage_need_not_be_linux() {
    let mut memtest = testing::bzimage_of(&[0x90; 64]);
    let mut put = |at: usize, bytes: &[u8]| memtest[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x230, &0x1000u32.to_le_bytes());
    put(0x234, &[0, 12, 9, 0]);
    put(0x248, &[0; 8]);
    put(0x258, &0x10_0000u64.to_le_bytes());
    memtest.truncate(memtest.len() - 8);
    let (description, ram, entry) = boot(&memtest, |_| ()).unwrap();
    assert_eq!((description.format.as_str(), entry.address), ("bzImage, unpacked by the guest", 0x10_0200));
    assert_eq!(ram.read_obj::<[u8; 2]>(0x10_0240).unwrap(), [0x90; 2]);
    let refused = refusal(&memtest, |c| c.boot = BootMode::Pvh);
    assert!(refused.starts_with("this is a bzImage without a compressed kernel in it; --boot pvh needs"), "{refused}");
    // A field is 0 if the header's protocol did not have it yet.
    memtest[0x22C..0x230].fill(0);
    memtest[0x238..0x23C].fill(0);
    assert!(boot(&memtest, |c| c.cmdline = "x".repeat(255)).is_ok());
    let refused = refusal(&memtest, |c| c.cmdline = "x".repeat(256));
    assert_eq!(refused, "the kernel command line has 256 bytes; this kernel takes at most 255");
    // More than the last paragraph is missing.
    memtest.truncate(memtest.len() - 8);
    assert!(refusal(&memtest, |_| ()).starts_with("truncated: the file needs "));
    memtest[0x236] = 4;
    memtest.resize(memtest.len() + 16, 0);
    assert!(refusal(&memtest, |_| ()).contains("a bzImage without a 64-bit entry"));
}

#[test]
fn initrd_and_cmdline_arrive() {
    let files = Files::new();
    let initrd = files.write("initrd", &[&b"070701"[..], &[0xAB; 4994]].concat());
    let cmdline = "console=ttyS0 quiet";
    let (_, ram, entry) = boot(&testing::linux(0), |c| {
        c.initrd = vec![initrd];
        c.cmdline = cmdline.into();
    })
    .unwrap();
    let start = u64::from(ram.read_obj::<u32>(layout::ZERO_PAGE + 0x218).unwrap());
    assert_eq!(ram.read_obj::<u32>(layout::ZERO_PAGE + 0x21C).unwrap(), 5000);
    assert_eq!(start, RAM - 8192);
    assert!(entry.address + 0x4000 <= start);
    assert_eq!(ram.read_obj::<[u8; 2]>(start + 4999).unwrap(), [0xAB, 0]);
    let mut text = vec![1; cmdline.len() + 1];
    ram.read(layout::CMDLINE, &mut text).unwrap();
    assert_eq!(text, format!("{cmdline}\0").as_bytes());
}

#[test]
fn initrds_are_put_together_at_multiples_of_four() {
    let files = Files::new();
    let initrd = vec![
        files.write("one", b"\x02\x21\x4C\x18\x01"),
        files.write("two", b"070701\x02"),
        files.write("three", b"\x1F\x8B"),
    ];
    let config = |c: &mut BootConfig| c.initrd = initrd;
    let (_, ram, _) = boot(&testing::linux(0), config).unwrap();
    assert_eq!(ram.read_obj::<u32>(layout::ZERO_PAGE + 0x21C).unwrap(), 26);
    let start = u64::from(ram.read_obj::<u32>(layout::ZERO_PAGE + 0x218).unwrap());
    // At least four zeros follow, as the kernel needs after lz4.
    let bytes = ram.read_obj::<[u8; 26]>(start).unwrap();
    assert_eq!(bytes, *b"\x02\x21\x4C\x18\x01\0\0\0\0\0\0\x00070701\x02\0\0\0\0\0\x1F\x8B");

    let (host, guest) = (files.write("file", b"content"), "/a/file".into());
    let packed = pack::InitramfsConfig { files: vec![pack::FileConfig { host, guest }], ..Default::default() };
    let initrd = vec![files.write("odd", b"070701678")];
    let (_, ram, _) = boot(&testing::linux(0), |c| (c.initrd, c.initramfs) = (initrd, Some(packed))).unwrap();
    let len = ram.read_obj::<u32>(layout::ZERO_PAGE + 0x21C).unwrap();
    let start = u64::from(ram.read_obj::<u32>(layout::ZERO_PAGE + 0x218).unwrap());
    assert_eq!(ram.read_obj::<[u8; 13]>(start + 9).unwrap(), *b"\0\0\0\0\0\0\x00070701");
    assert_eq!((len % 4, ram.read_obj::<[u8; 10]>(start + u64::from(len) - 12).unwrap()), (0, *b"AILER!!!\0\0"));
}

#[test]
fn what_does_not_fit_is_told_with_what_would() {
    let files = Files::new();
    let sparse = |name: &str, len| {
        let path = files.path(name);
        OpenOptions::new().write(true).create(true).truncate(true).open(&path).unwrap().set_len(len).unwrap();
        vec![path]
    };
    let linux = testing::linux(0);
    let error = refusal(&linux, |c| c.initrd = sparse("big", 100 << 20));
    assert_eq!(error, "it needs at least 117M of memory; the machine has 64M");
    let error = refusal(&linux, |c| c.initrd = sparse("huge", 5 << 30));
    assert!(error.ends_with("fit below the kernel's limit, whatever the memory size"), "{error}");
    let error = refusal(&linux, |c| c.initrd = sparse("empty", 0));
    assert_eq!(error, "this is an empty file");
    let error = refusal(&linux, |c| c.initrd = vec!["/nonexistent/initrd".into()]);
    assert_eq!(error, "cannot open it: No such file or directory (os error 2)");
    let error = refusal(&linux, |c| c.cmdline = "x".repeat(2048));
    assert_eq!(error, "the kernel command line has 2048 bytes; this kernel takes at most 2047");
    assert!(boot(&linux, |c| c.cmdline = "x".repeat(2047)).is_ok());
    let error = refusal(&linux, |c| c.cmdline = "a\0b".into());
    assert_eq!(error, "the kernel command line contains a NUL byte at offset 1; remove it");
    let big = testing::elf64(START, &[Seg(START, START, vec![1], 100 << 20)], &[LINUX_NOTE]);
    assert_eq!(refusal(&big, |_| ()), "it needs at least 116M of memory; the machine has 64M");
}

#[test]
fn other_files_are_named_for_what_they_are() {
    let with = |at: usize, magic: &[u8]| {
        let mut bytes = vec![7; 40 << 10];
        bytes[at..at + magic.len()].copy_from_slice(magic);
        bytes
    };
    let cases: &[(Vec<u8>, &str)] = &[
        (Vec::new(), "an empty file"),
        (b"#!/bin/sh\necho\n".to_vec(), "a text file"),
        (vec![0; 5000], "nothing but zeros"),
        (with(0x38, b"ARM\x64"), "an arm64 Image"),
        (with(0, b"MZ"), "an EFI or Windows program without a Linux boot header"),
        (with(0x8001, b"CD001"), "an ISO 9660 image"),
        (with(0, b"QFI\xfb"), "a qcow2 disk image"),
        (with(0, b"070701"), "a cpio archive (an initramfs?)"),
        (testing::compress(Compression::Gzip, b"hello hello hello hello"), "gzip data that unpacks to a text file"),
        (
            testing::compress(Compression::Gzip, &testing::compress(Compression::Gzip, &testing::linux(0))),
            "gzip data that unpacks to an unknown kind of file",
        ),
    ];
    for (bytes, name) in cases {
        let expected = format!("this is {name}; vireo boots x86-64 bzImage, vmlinux (also gzip,");
        let error = refusal(bytes, |_| ());
        assert!(error.starts_with(&expected), "{error}");
    }
    let mut elf = testing::plain_linux(0);
    elf[18] = 183;
    assert!(refusal(&elf, |_| ()).starts_with("this is an ELF file for arm64; vireo boots"));
    let elf = testing::elf32(0x20_0000, &[Seg(0x20_0000, 0, vec![1], 1)], &[]);
    assert!(
        refusal(&elf, |_| ())
            .starts_with("this is a 32-bit ELF file with neither a PVH note nor a multiboot header; vireo boots")
    );
    let error = refusal(&testing::plain_linux(0), |c| c.boot = BootMode::BzImage);
    assert_eq!(error, "this is an ELF file; --boot bzimage needs a bzImage");
    let mut old = testing::bzimage(Compression::Gzip, &testing::linux(0));
    old[0x206] = 6;
    assert_eq!(refusal(&old, |_| ()), "boot protocol 2.06 is too old; vireo needs 2.10 (Linux 2.6.31) or newer");
}

#[test]
fn elf_files_that_contradict_themselves() {
    let seg = |paddr, len: usize, mem_len| Seg(paddr, paddr, vec![1; len], mem_len);
    let case = |entry, segments: &[Seg]| refusal(&testing::elf64(entry, segments, &[]), |_| ());
    let overlap = case(START, &[seg(START, 16, 0x2000), seg(START + 0x1000, 16, 16)]);
    assert_eq!(overlap, "damaged: the segments at 0x1000000 and 0x1001000 overlap");
    let outside = case(START, &[seg(START, 16, u64::MAX - START)]);
    assert!(outside.contains("are not within 0x100000..0xc0000000"), "{outside}");
    assert!(case(START, &[seg(u64::MAX - 8, 4, 0x1000)]).starts_with("damaged: a segment of 4 bytes"));
    assert!(case(START, &[seg(0x1000, 16, 16)]).contains("are not within"));
    // The offset of a bss may lie outside the file.
    let mut with_bss = testing::elf64(START, &[seg(START, 16, 16), seg(START + 0x1000, 0, 0x1000)], &[]);
    let bss = 64 + 2 * 56;
    with_bss[bss + 8..bss + 16].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(boot(&with_bss, |_| ()).is_ok());
    assert_eq!(case(START, &[]), "damaged: this ELF file has no segments to load");
    assert_eq!(case(START + 64, &[seg(START, 16, 16)]), "damaged: the entry at 0x1000040 is not in any segment");
    let mut relocated_outside = testing::linux(0);
    let len = relocated_outside.len();
    relocated_outside[len - 1] = 0x90;
    let error = refusal(&relocated_outside, |_| ());
    assert_eq!(error, "damaged: a relocation at 0xffffffff90000200, outside of the kernel");
}

#[test]
fn files_that_are_none() {
    let files = Files::new();
    // A pipe without a writer opens like a FIFO and needs no mkfifo program: while a program is started, every
    // descriptor of this process is open twice, and another test's file would stay locked.
    let (pipe, _) = std::io::pipe().unwrap();
    let fifo: PathBuf = format!("/proc/self/fd/{}", pipe.as_raw_fd()).into();
    for (path, expected) in [
        (fifo, "this is a FIFO, not a file"),
        (files.0.path().to_path_buf(), "this is a directory, not a file"),
        ("/dev/null".into(), "this is a character device, not a file"),
        ("/nonexistent".into(), "cannot open it: No such file or directory (os error 2)"),
    ] {
        assert_eq!(refusal(&[], |c| c.kernel = path.clone()), expected);
    }
}

#[test]
fn sparse_files_are_not_read_whole() {
    let files = Files::new();
    for start in [vec![], testing::linux(0), testing::bzimage(Compression::Gzip, &testing::linux(0))] {
        let path = files.write("sparse", &start);
        OpenOptions::new().write(true).open(&path).unwrap().set_len(5 << 30).unwrap();
        let result = boot(&[], |c| c.kernel = path);
        assert_eq!(result.is_ok(), !start.is_empty());
    }
}

#[test]
fn truncated_anywhere_is_an_error() {
    let linux = testing::plain_linux(0);
    let mut images = vec![linux.clone(), testing::elf32(0, &[Seg(1 << 20, 0, vec![1; 99], 99)], &[LINUX_NOTE])];
    for format in FORMATS {
        images.push(testing::bzimage(format, &testing::linux(0)));
        images.push(testing::compress(format, &linux));
    }
    for image in images {
        // Every length within the headers and near the end is tried, and some of the others.
        let step = |len: usize| match len {
            0..0xC0 | 0x1F0..0x298 => 1,
            _ if len + 24 > image.len() => 1,
            _ => 61,
        };
        // Only padding follows a bzImage's payload.
        let padding = match super::bzimage::is_bzimage(&image) {
            true => image.len() - 1024 - 0x240 - u32::from_le_bytes(*image[0x24C..].first_chunk().unwrap()) as usize,
            false => 0,
        };
        let mut len = 0;
        while len < image.len() - padding {
            let error = refusal(&image[..len], |_| ());
            assert!(!error.is_empty(), "{len} of {}", image.len());
            len += step(len);
        }
    }
    let error = refusal(&testing::bzimage(Compression::Gzip, &linux)[..1500], |_| ());
    assert!(error.starts_with("truncated: the file needs ") && error.ends_with(" bytes, has 1500"), "{error}");
}

proptest! {
    /// An accepted image can always be loaded into RAM, whatever its headers say.
    #[test]
    fn flipped_bits_never_do_harm(which in 0usize..12, flips in proptest::collection::vec((any::<u16>(), 0u8..8), 1..6),
                                  near_headers in any::<bool>(), mode in 0usize..5) {
        let linux = testing::linux(0);
        let mut image = match which {
            0 | 1 => linux.clone(),
            2 => testing::elf32(0, &[Seg(1 << 20, 0, vec![1; 99], 99)], &[(b"Xen\0", 18, &[0, 0, 16, 0])]),
            11 => testing::multiboot(0x8000),
            n if n < 7 => testing::bzimage(FORMATS[n - 3], &linux),
            n => testing::compress(FORMATS[n - 7], &linux),
        };
        for (at, bit) in flips {
            let range = if near_headers { image.len().min(if which < 3 || which == 11 { 400 } else { 0x280 }) } else { image.len() };
            // The interesting part of a bzImage's header is its end.
            let at = if near_headers && (3..7).contains(&which) { 0x1F0 + at as usize % 0x90 } else { at as usize % range };
            image[at] ^= 1 << bit;
        }
        let boot_mode = [BootMode::Auto, BootMode::BzImage, BootMode::Direct, BootMode::Pvh, BootMode::Multiboot][mode];
        let files = Files::new();
        let config = BootConfig { kernel: files.write("kernel", &image), boot: boot_mode, ..Default::default() };
        if let Ok(boot) = BootFiles::open_with(&config, RAM, None) {
            let ram = GuestRam::anonymous(RAM);
            let entry = boot.load(&ram, &platform()).unwrap();
            prop_assert!(ram.contains(entry.address, 1));
        }
    }
}
