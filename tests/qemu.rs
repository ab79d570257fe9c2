//! Features that test suites expect of QEMU: multiboot kernels, the debug exit, the test device and fw_cfg; and the
//! script that replaces QEMU where a suite calls it. All run guests of a few instructions on the machine's own
//! /dev/kvm, whatever it is.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::guests::vireo::{Ended, Kernel, Running, folder, run, vireo};
use crate::guests::{
    Op, elf, multiboot_elf, multiboot_flat, multiboot_header, multiboot_report, multiboot_timer, script,
};
use ::vireo::layout;

const TESTING: [&str; 2] = ["--testdev", "--debug-exit"];

/// The guest's value becomes the exit status and part of a sentence.
#[test]
fn the_guest_names_the_exit_status() {
    for (width, value, status) in [(4, 0, 1), (1, 0x10, 33), (2, 0x1FF, 255), (4, 0x80, 1)] {
        let ended = run(&script(&[Op::Out(width, layout::DEBUG_EXIT_PORT, value)]), &["--debug-exit"]).expect(status);
        assert_eq!(ended.stderr, format!("vireo: the guest ended by debug exit with status {status}\n"));
    }
    let ended = run(&script(&[Op::Out(4, layout::DEBUG_EXIT_PORT, 1)]), &[]).expect(0);
    assert_eq!(ended.stderr, "vireo: the guest powered off\n", "without --debug-exit there is no such device");
    let (_folder, path) = folder();
    let report = path.join("report");
    let args = ["--debug-exit", "--report", report.to_str().unwrap()];
    run(&script(&[Op::Out(4, layout::DEBUG_EXIT_PORT, 1)]), &args).expect(3);
    let report: serde_json::Value = serde_json::from_slice(&fs::read(&report).unwrap()).unwrap();
    assert_eq!((&report["outcome"], &report["exit_code"]), (&"debug-exit".into(), &3.into()));
}

/// Information that [`multiboot_report`] sends.
struct Information {
    words: Vec<u32>,
    map: Vec<[u64; 3]>,
    strings: Vec<String>,
}

fn information(ended: Ended) -> Information {
    let bytes = ended.expect(33).stdout;
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let words: Vec<u32> = (0..22).map(|n| word(4 * n)).collect();
    let (map, text) = bytes[88..].split_at(words[11] as usize);
    let long = |entry: &[u8], at: usize| u64::from_le_bytes(entry[at..at + 8].try_into().unwrap());
    let map = map.chunks(24).map(|entry| {
        assert_eq!(entry[..4], [20, 0, 0, 0]);
        [long(entry, 4), long(entry, 12), entry[20].into()]
    });
    let strings = text.split(|byte| *byte == 0).map(|text| String::from_utf8_lossy(text).into_owned());
    Information { map: map.collect(), strings: strings.collect(), words }
}

#[test]
fn multiboot_kernels_learn_memory_command_line_and_module() {
    let (_folder, path) = folder();
    let module = path.join("env");
    fs::write(&module, "NR_CPUS=1\n").unwrap();
    let module = module.to_str().unwrap();
    for image in [multiboot_elf(multiboot_report()), multiboot_flat(multiboot_report())] {
        let kernel = Kernel::new(&image);
        let name = kernel.path().to_str().unwrap();
        let started = |args: &[&str]| information(Running::start(kernel.command(&[&TESTING, args].concat())).end());
        let told = started(&["--cmdline", "cpuid 'a b'", "--initrd", module]);
        assert_eq!((told.words[0], told.words[1], told.words[2], told.words[5]), (0x24D, 639, 15 << 10, 1));
        let ram: Vec<_> = told.map.iter().filter(|[.., kind]| *kind == 1).collect();
        assert_eq!(ram, [&[0, 0x9_FC00, 1], &[0x10_0000, 15 << 20, 1]]);
        let command_line = format!("{name} cpuid 'a b'");
        assert_eq!(told.strings, [command_line, format!("NR_CPUS=1\n{module}"), String::new()]);
        let told = started(&[]);
        assert_eq!(told.words[5], 0);
        assert_eq!(told.strings, [name, ""], "an argument that was not given");
    }
    let large = multiboot_elf(multiboot_report());
    let told = information(run(&large, &["--debug-exit", "--memory", "4G", "--boot", "multiboot"]));
    assert_eq!(told.map.last(), Some(&[1 << 32, 1 << 30, 1]));
    assert_eq!(told.words[2], (3 << 20) - 1024);
}

/// Only the timer's interrupt and the connection of the two controllers are unmasked; mode 2, low byte then high byte.
#[test]
fn multiboot_kernels_find_controllers_timer_and_vectors_as_a_bios_leaves_them() {
    let ended = run(&multiboot_elf(multiboot_timer()), &["--debug-exit"]).expect(33);
    assert_eq!(ended.stdout, b"\xFA\xFF\x34ttt");
}

#[test]
fn multiboot_headers_that_cannot_be_followed_are_refused() {
    let code = multiboot_report();
    let flat = |flags, rest: &[u32]| [multiboot_header(flags, rest), vec![0x90; 4096]].concat();
    let mut unsummed = multiboot_elf(code);
    unsummed[0x60 + 8] ^= 1;
    for (image, args, says) in [
        (unsummed, &[][..], "this is a 32-bit ELF file with neither a PVH note nor a multiboot header; vireo boots"),
        (
            flat(1 << 16 | 8, &[1 << 20, 1 << 20, 0, 0, 1 << 20]),
            &[],
            "requires features that the specification does not define (flags: bit 3)",
        ),
        (flat(1 << 16, &[1 << 20, 2 << 20, 0, 0, 1 << 20]), &[], "at file offset 0x0 claims address 0x100000"),
        (
            flat(1 << 16, &[0x9_F000, 0x9_F000, 0, 0, 0x9_F000]),
            &[],
            "bytes at 0x9f000; the RAM that kernels may be loaded to is",
        ),
        (flat(1 << 16, &[1 << 20, 1 << 20, 0, 1 << 30, 1 << 20]), &[], "it needs at least 1G of memory"),
        (flat(0, &[]), &[], "this is an unknown kind of file"),
        (elf(code), &["--boot", "multiboot"], "--boot multiboot needs a multiboot header"),
        (multiboot_elf(code), &["--boot", "pvh"], "neither a PVH note"),
    ] {
        let ended = run(&image, args).expect(125).says(says);
        assert!(!ended.stderr.contains("panicked at"), "{}", ended.stderr);
    }
}

/// Runs accesses; returns the values that were read.
fn access(ops: &[Op], args: &[&str]) -> Vec<u64> {
    let ended = run(&script(ops), args).expect(0);
    let (values, rest) = ended.stdout.as_chunks::<8>();
    assert!(rest.is_empty());
    values.iter().map(|value| u64::from_le_bytes(*value)).collect()
}

#[test]
fn fw_cfg_tells_cpus_and_memory() {
    let mut ops = Vec::new();
    for (item, len) in [(0, 4), (1, 4), (3, 8), (5, 2), (0xF, 2), (0x19, 4)] {
        ops.push(Op::Out(2, layout::FW_CFG_PORT, item));
        ops.extend([Op::In(1, layout::FW_CFG_PORT + 1)].repeat(len));
    }
    let bytes: Vec<u8> =
        access(&ops, &["--testdev", "--cpus", "2", "--memory", "18M"]).iter().map(|v| *v as u8).collect();
    let ram = (18u64 << 20).to_le_bytes();
    assert_eq!(bytes, [&b"QEMU\x01\0\0\0"[..], &ram, &[2, 0, 2, 0], &[0; 4]].concat());
    assert!(access(&ops, &["--debug-exit"]).iter().all(|byte| *byte == 0xFF), "an ordinary machine has no fw_cfg");
}

#[test]
fn the_test_device_remembers_and_flushes() {
    let (port, memory) = (layout::TESTDEV_PORT, layout::TESTDEV_MEMORY);
    let values = access(
        &[
            Op::Out(4, port, 0x4433_2211),
            Op::In(2, port + 1),
            Op::Out(1, port + 8, 0xAA),
            Op::In(4, port + 8),
            Op::Store(8, memory + 0xFFF8, 0x1122_3344_5566_7788),
            Op::Load(4, memory + 0xFFFC),
            Op::Load(1, memory),
            Op::Store(8, 0x80_0000, 77),
            Op::Out(4, port + 4, 0x80_0000),
            Op::Load(8, 0x80_0000),
        ],
        &["--testdev"],
    );
    assert_eq!(values, [0x3322, 0x4433_22AA, 0x1122_3344, 0, 77]);
}

#[test]
fn a_line_of_the_test_device_interrupts_for_as_long_as_it_is_held() {
    assert_eq!(run(&elf(crate::guests::level_interrupt()), &TESTING).expect(1).stdout, b"iii.");
}

/// Runs the script with arguments as kvm-unit-tests' x86/run gives them.
fn as_qemu(args: &[&str]) -> Ended {
    start_as_qemu(args).end()
}

fn start_as_qemu(args: &[&str]) -> Running {
    let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/vireo-as-qemu"));
    command.env("VIREO", vireo().get_program()).args(args);
    Running::start(command)
}

#[test]
fn a_script_takes_the_arguments_of_kvm_unit_tests() {
    assert!(as_qemu(&["--help"]).expect(0).stdout.starts_with(b"QEMU "));
    let devices = as_qemu(&["-device", "?"]).expect(0).stdout;
    assert!(devices.starts_with(b"name \"pc-testdev\""));
    let kernel = Kernel::new(&multiboot_elf(multiboot_report()));
    let name = kernel.path().to_str().unwrap();
    let usual = [
        "--no-reboot",
        "-nodefaults",
        "-global",
        "kvm-pit.lost_tick_policy=discard",
        "-device",
        "pc-testdev",
        "-device",
        "isa-debug-exit,iobase=0xf4,iosize=0x4",
        "-vnc",
        "none",
        "-serial",
        "stdio",
        "-machine",
        "accel=kvm",
        "-kernel",
        name,
        "-smp",
        "2",
        "-append",
        "a  b",
        "-m",
        "20",
        "-cpu",
        "max,+x2apic,+tsc-deadline",
    ];
    let ended = as_qemu(&usual);
    assert_eq!(ended.stderr, "", "a suite takes any output on stderr for a failure");
    let told = information(ended);
    assert_eq!(told.strings[0], format!("{name} a  b"));
    assert_eq!(told.words[2], 19 << 10);
    let with = |more: &[&str]| as_qemu(&[&usual, more].concat());
    with(&["-device", "intel-iommu"]).expect(77).says("no device intel-iommu");
    with(&["-machine", "kernel_irqchip=split"]).expect(77).says("kernel_irqchip=split");
    with(&["-cpu", "kvm64,hv_synic"]).expect(77).says("no -cpu with hv_synic");
    with(&["-cpu", "max,+vmx-mbec"]).expect(77).says("'vmx-mbec' is not a CPU feature");
    with(&["-global", "kvm-pit.lost_tick_policy=delay"]).expect(77).says("no -global kvm-pit");
    with(&["-S"]).expect(77).says("-S");
    as_qemu(&["-kernel", "_NO_FILE_4Uhere_"]).expect(1).says("could not open kernel file '_NO_FILE_4Uhere_'");
    let crashing = Kernel::new(&multiboot_elf(&[0x0F, 0x0B]));
    as_qemu(&["-kernel", crashing.path().to_str().unwrap()]).expect(71).says("triple fault");
}

#[test]
fn a_signal_to_the_script_ends_the_guest() {
    let endless = Kernel::new(&elf(crate::guests::flood()));
    let running = start_as_qemu(&["-kernel", endless.path().to_str().unwrap()]);
    running.stdout.wait("byte", |bytes| !bytes.is_empty());
    running.signal(libc::SIGTERM);
    // No process holds the streams any longer.
    running.end().expect(143).says("stopped by signal 15");
}
