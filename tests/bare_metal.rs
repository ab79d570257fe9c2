//! Guests of a few instructions on the machine's own /dev/kvm, whatever it is, as root or as any user who may open it:
//! how each kind of end is reported, what guests cannot do to the monitor, and that it stays in control of them.

#![allow(unsafe_code)] // Inspecting pipes and sending signals.

use std::collections::BTreeSet;
use std::fs;
use std::io::{PipeReader, Read};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::guests::vireo::{Collected, DEADLINE, Ended, Kernel, Running, folder, run, vireo};
use crate::guests::{CRASH, NOWHERE, Op, POWER_OFF, bzimage, elf, pvh, script, text, with_words, writes};
use ::vireo::config::MachineConfig;
use ::vireo::control::Controller;
use ::vireo::devices::serial::SerialConfig;
use ::vireo::layout;
use ::vireo::machine::Machine;
use ::vireo::machine::mailbox::Mailbox;
use ::vireo::machine::run::{self as machine_run, RunOptions};
use ::vireo::options::Size;
use ::vireo::outcome::Outcome;
use ::vireo::virtio::balloon::BalloonConfig;
use ::vireo::virtio::control::{Control, ControlError};

/// Fails the test unless vireo itself behaved: no panic, and only its own lines and the vCPUs' registers on stderr.
#[track_caller]
fn in_order(ended: Ended) -> Ended {
    assert!(!ended.stderr.contains("panicked at"), "{}", ended.stderr);
    for line in sentences(&ended.stderr) {
        assert!(line.starts_with("vireo: "), "{line}");
    }
    ended
}

/// Lines of stderr that are not registers.
fn sentences(stderr: &str) -> Vec<&str> {
    let mut registers = false;
    let of_registers = |line: &&str| {
        let starts = line.starts_with("vCPU ");
        let part = registers || starts;
        registers = part && !line.starts_with("instruction bytes: ") && !line.ends_with("not started");
        !part
    };
    stderr.lines().filter(of_registers).collect()
}

fn doctor() -> serde_json::Value {
    let output = vireo().args(["doctor", "--json"]).output().unwrap();
    serde_json::from_slice(&output.stdout).unwrap()
}

// How guests end.

#[test]
fn each_way_to_end_has_its_code_and_sentence() {
    let by = |port, byte| writes(&[(port, byte)]);
    for (image, code, sentence) in [
        (elf(crate::guests::power_off()), 0, "the guest powered off"),
        (by(layout::RESET_PORT, layout::RESET_VALUE), 0, "the guest rebooted (ACPI reset register)"),
        (by(layout::I8042_COMMAND, 0xFE), 0, "the guest rebooted (keyboard controller)"),
        (pvh(crate::guests::jump_to_reset_vector()), 0, "the guest rebooted (ACPI reset register)"),
        (
            writes(&[(layout::PVPANIC_PORT, 1), POWER_OFF]),
            70,
            "the guest kernel panicked (reported by its pvpanic driver)",
        ),
        (
            writes(&[&text("Kernel panic - not syncing: VFS\n")[..], &[POWER_OFF]].concat()),
            70,
            "the guest kernel panicked (judging by the panic message on its console)",
        ),
        (
            writes(&text("Kernel panic - not syncing: VFS\n---[ end Kernel panic - not syncing: VFS ]---\n")),
            70,
            "the guest kernel panicked (judging",
        ),
        (
            writes(&[&text("reboot: Restarting system\n")[..], &[CRASH]].concat()),
            0,
            "the guest rebooted (triple fault)",
        ),
    ] {
        let ended = in_order(run(&image, &[])).expect(code).says(&format!("vireo: {sentence}"));
        assert_eq!(sentences(&ended.stderr).len(), 1, "{}", ended.stderr);
    }
}

#[test]
fn bzimages_without_a_kernel_in_them_are_entered_as_they_are() {
    let output = in_order(run(&bzimage(crate::guests::power_off()), &[])).expect(0);
    assert_eq!(sentences(&output.stderr), ["vireo: the guest powered off"]);
}

#[test]
fn pvh_kernels_are_given_their_start_info() {
    let ended = run(&pvh(crate::guests::jump_to_reset_vector()), &[]).expect(0);
    assert_eq!(ended.stdout, b"pvh");
}

#[test]
fn halted_guests_are_noticed_whatever_their_number_of_vcpus() {
    for cpus in ["1", "2", "7"] {
        in_order(run(&writes(&[]), &["--cpus", cpus])).expect(0).says("the guest halted: every vCPU sleeps");
    }
}

#[test]
fn guests_that_wait_for_interrupts_are_not_halted() {
    for cpus in ["1", "2"] {
        let ended = run(&elf(crate::guests::sleep()), &["--cpus", cpus, "--timeout", "1s"]);
        in_order(ended).expect(124).says("still running after the time limit of 1s");
    }
}

#[test]
fn triple_faults_are_crashes_with_registers_and_instruction() {
    let ended = run(&elf(crate::guests::triple_fault()), &[])
        .expect(71)
        .says("vireo: the guest crashed: triple fault on vCPU 0");
    let dump = &ended.stderr;
    for word in ["rip ", "cr3 ", "efer ", "idt ", "instruction bytes: "] {
        assert!(dump.contains(word), "{word} is not in {dump}");
    }
    // AMD processors lose their state in a triple fault, and KVM replaces it with the state after a reset.
    if dump.contains("rax 1122334455667788") {
        assert!(dump.contains("instruction bytes: 0f 0b") && dump.contains("cr3 9000"), "{dump}");
    } else {
        assert!(dump.contains("rip 000000000000fff0"), "{dump}");
    }
}

#[test]
fn an_emptied_interrupt_table_makes_a_triple_fault_a_reboot() {
    let ended = run(&elf(crate::guests::empty_idt()), &[]);
    match ended.code() {
        0 => _ = in_order(ended).says("the guest rebooted (triple fault)"),
        // On AMD processors, as above, the interrupt table is not the one that the guest loaded.
        _ => assert!(ended.expect(71).stderr.contains("rip 000000000000fff0")),
    }
}

#[test]
fn what_kvm_cannot_execute_is_a_crash_that_is_explained() {
    let ended = run(&elf(crate::guests::run_from_mmio()), &[]).expect(71).says("vireo: the guest crashed: KVM");
    assert!(ended.stderr.contains("could not emulate the guest's instruction"), "{}", ended.stderr);
    assert!(ended.stderr.contains("rip 00000000e0000000"), "{}", ended.stderr);
    assert!(ended.stderr.contains("instruction bytes: not in RAM (physical address 0xe0000000)"), "{}", ended.stderr);
}

#[test]
fn the_report_tells_end_timing_and_exits() {
    let (_folder, path) = folder();
    let report = path.join("report.json");
    let init = (layout::BOOT_TIMER_PORT, layout::BOOT_TIMER_INIT_STARTED);
    let image = writes(&[&text("hello\n")[..], &[init, POWER_OFF]].concat());
    let ended = run(&image, &["--report", report.to_str().unwrap(), "--boot-timing"]).expect(0);
    assert_eq!(ended.stdout, b"hello\n");
    for moment in ["process start", "KVM ready", "kernel loaded", "first guest instruction", "init started"] {
        let line = ended.stderr.lines().find(|line| line.starts_with(moment));
        assert!(line.is_some_and(|line| line.ends_with(" ms")), "{moment}: {}", ended.stderr);
    }
    let report: serde_json::Value = serde_json::from_slice(&fs::read(report).unwrap()).unwrap();
    assert_eq!((&report["outcome"], &report["exit_code"]), (&"powered-off".into(), &0.into()), "{report:#}");
    assert_eq!(report["detail"], "the guest powered off");
    assert!(report["kernel"].as_str().unwrap().contains("64-bit entry at 0x200000"), "{report:#}");
    let mut last = 0.0;
    for moment in ["kvm_ready", "kernel_loaded", "first_instruction", "first_serial_byte", "init_started"] {
        let time = report["boot_timing"][moment].as_f64().unwrap_or_else(|| panic!("{moment}: {report:#}"));
        assert!(time >= last, "{moment}: {report:#}");
        last = time;
    }
    assert!(report["duration"].as_f64().unwrap() >= last, "{report:#}");
    assert!(report["peak_memory"].as_u64().unwrap() > 1 << 20, "{report:#}");
    let exits = |reason: &str| report["exits"][reason].as_u64().unwrap();
    let coalesces = doctor()["capabilities"]
        .as_array()
        .unwrap()
        .iter()
        .any(|c| c["name"] == "coalesced_pio" && c["value"].as_u64() > Some(0));
    assert_eq!(exits("coalesced"), if coalesces { 6 } else { 0 }, "{report:#}");
    assert_eq!(exits("pio_out"), if coalesces { 2 } else { 8 }, "{report:#}");
    assert!(exits("total") >= exits("pio_out"), "{report:#}");
}

#[test]
fn failures_are_reported_too() {
    let (_folder, path) = folder();
    let report = path.join("report.json");
    let ended = run(b"no kernel at all", &["--report", report.to_str().unwrap()]).expect(125);
    let report: serde_json::Value = serde_json::from_slice(&fs::read(report).unwrap()).unwrap();
    assert_eq!((&report["outcome"], &report["exit_code"]), (&"failed".into(), &125.into()));
    assert_eq!(ended.stderr.trim_end(), format!("vireo: {}", report["detail"].as_str().unwrap()));
}

// What guests can touch.

/// Port ranges that are answered by this process or by the kernel (8259, ELCR, PIT and speaker).
const CLAIMED: [(u16, u16); 11] = [
    (0x20, 2),
    (0x40, 4),
    (layout::RTC_PORT, layout::RTC_LEN),
    (layout::I8042_DATA, layout::I8042_LEN),
    (0xA0, 2),
    (layout::SERIAL_PORT, layout::SERIAL_PORT_LEN),
    (0x4D0, 2),
    (layout::PVPANIC_PORT, 1),
    (layout::POWER_BLOCK, layout::POWER_BLOCK_LEN),
    (layout::PM_TIMER_PORT, layout::PM_TIMER_LEN),
    (layout::PCI_CONFIG_ADDRESS, 4),
];

fn claimed(port: u32, width: u32) -> bool {
    CLAIMED.iter().any(|(start, len)| port < u32::from(start + len) && port + width > u32::from(*start))
}

#[test]
fn every_port_can_be_read_by_every_width_and_unclaimed_ones_are_all_ones() {
    thread::scope(|scope| {
        for width in [1, 2, 4] {
            scope.spawn(move || {
                let ended = in_order(run(&with_words(crate::guests::all_ports(), &[width, 0]), &[])).expect(0);
                let (pairs, rest) = ended.stdout.as_chunks::<8>();
                assert!(rest.is_empty());
                let mut answered = BTreeSet::new();
                for [a, b, c, d, value @ ..] in pairs {
                    let port = u32::from_le_bytes([*a, *b, *c, *d]);
                    assert!(claimed(port, width), "port {port:#x} by {width} reads {value:x?}");
                    answered.insert(port);
                }
                let serial = u32::from(layout::SERIAL_PORT);
                assert!(answered.contains(&serial) && answered.contains(&u32::from(layout::I8042_DATA)));
            });
        }
    });
}

#[test]
fn every_port_can_be_written_by_every_width() {
    thread::scope(|scope| {
        for width in [1, 2, 4] {
            scope.spawn(move || {
                let ended = in_order(run(&with_words(crate::guests::all_ports(), &[width, 1]), &[])).expect(0);
                // The byte of the write that hit the transmit register.
                assert_eq!(ended.stdout, [0], "width {width}");
            });
        }
    });
}

/// Runs accesses; returns each read with its value.
fn access(ops: &[Op], args: &[&str]) -> Vec<(Op, u64)> {
    let ended = in_order(run(&script(ops), args)).expect(0);
    let (values, rest) = ended.stdout.as_chunks::<8>();
    assert!(rest.is_empty());
    let reads: Vec<Op> = ops.iter().copied().filter(|op| op.ones().is_some()).collect();
    assert_eq!(values.len(), reads.len());
    reads.into_iter().zip(values.iter().map(|value| u64::from_le_bytes(*value))).collect()
}

#[test]
fn unclaimed_memory_reads_as_ones_by_every_width() {
    let ram_end = 16 << 20;
    let slots_end = layout::VIRTIO_MMIO + u64::from(layout::VIRTIO_SLOTS) * layout::VIRTIO_MMIO_SIZE;
    let edges = [
        ram_end,
        layout::MMIO_HOLE,
        layout::VIRTIO_MMIO, // No device is in this slot.
        slots_end,
        NOWHERE,
        layout::IOAPIC - 0x1000,
        layout::IOAPIC + 0x100,
        layout::IOAPIC + 0x1000,
        layout::LAPIC - 0x1000,
        layout::LAPIC + 0x1000,
        layout::MMIO_HOLE_END - 0x1000,
    ];
    let mut ops = Vec::new();
    for width in [1, 2, 4, 8u32] {
        for edge in edges {
            for addr in [edge, edge + 1, edge + 0xFC, edge + 0xFF, edge + 0x100 - u64::from(width)] {
                ops.push(Op::Store(width, addr, 0x5A5A_5A5A_5A5A_5A5A));
                ops.push(Op::Load(width, addr));
            }
        }
        // Across a page boundary without any device, and up to the last byte below each of these.
        ops.push(Op::Load(width, NOWHERE + 0x1000 - u64::from(width / 2)));
        ops.push(Op::Load(width, layout::IOAPIC - u64::from(width)));
        ops.push(Op::Load(width, layout::LAPIC - u64::from(width)));
        ops.push(Op::Load(width, layout::MMIO_HOLE_END - u64::from(width)));
    }
    for (op, value) in access(&ops, &[]) {
        assert_eq!(Some(value), op.ones(), "{op:x?}");
    }
}

#[test]
fn accesses_across_the_end_of_memory_are_split() {
    let ram_end = 16 << 20;
    let ops = [Op::Store(8, ram_end - 4, 0x8877_6655_4433_2211), Op::Load(8, ram_end - 4), Op::Load(4, ram_end - 4)];
    let values: Vec<u64> = access(&ops, &[]).into_iter().map(|(_, value)| value).collect();
    assert_eq!(values, [0xFFFF_FFFF_4433_2211, 0x4433_2211]);
}

#[test]
fn strings_go_to_and_come_from_every_kind_of_port() {
    let ports = [0x80, 0x92, 0xCF8, 0xCFC, 0x1F7, 0x2F8, 0xFFFF, layout::I8042_DATA, layout::SERIAL_PORT + 7];
    let mut ops = Vec::new();
    for port in ports.into_iter().chain([layout::POWER_BLOCK, layout::PVPANIC_PORT, 0x20]) {
        for width in [1, 2, 4] {
            // Long enough for several exits.
            ops.extend([Op::Outs(width, port, 3), Op::Ins(width, port, 9), Op::Ins(width, port, 1100)]);
            ops.push(Op::Outs(width, port, 1100));
        }
    }
    for (op, value) in access(&ops, &[]) {
        let Op::Ins(width, port, _) = op else { continue };
        assert!(claimed(port.into(), width) || Some(value) == op.ones(), "{op:x?}: {value:x}");
    }
}

#[test]
fn virtio_registers_take_every_access() {
    let (_folder, path) = folder();
    let disk = path.join("disk.img");
    fs::write(&disk, [0; 4096]).unwrap();
    let second = layout::VIRTIO_MMIO + layout::VIRTIO_MMIO_SIZE;
    let mut ops = vec![Op::Load(4, layout::VIRTIO_MMIO), Op::Load(4, second + 8)];
    for window in [layout::VIRTIO_MMIO, second] {
        for width in [1, 2, 4, 8] {
            for offset in (0..0x120).chain([0x1FF, 0xFFC, 0xFFF]) {
                ops.push(Op::Load(width, window + offset));
            }
            for offset in (0..0x120).step_by(if width == 4 { 1 } else { 3 }) {
                ops.push(Op::Store(width, window + offset, u64::MAX));
                ops.push(Op::Store(width, window + offset, 0));
            }
        }
    }
    let kernel = Kernel::new(&script(&ops));
    let ended = Running::start(kernel.command(&["--rng", "--disk", disk.to_str().unwrap()])).end();
    let ended = in_order(ended).expect(0);
    let (values, _) = ended.stdout.as_chunks::<8>();
    assert_eq!(values.len(), ops.iter().filter(|op| op.ones().is_some()).count());
    // The magic value "virt", and the device ID of the entropy device.
    assert_eq!([values[0], values[1]].map(u64::from_le_bytes), [0x7472_6976, 4]);
}

// Processors and memory.

#[test]
fn every_vcpu_starts_and_knows_its_number() {
    for cpus in [1u32, 2, 4, 9] {
        let image = with_words(crate::guests::smp(), &[cpus]);
        let ended = in_order(run(&image, &["--cpus", &cpus.to_string()])).expect(0);
        let (lines, rest) = ended.stdout.as_chunks::<16>();
        assert!(rest.is_empty() && lines.len() == cpus as usize);
        for (id, line) in (0u32..).zip(lines) {
            let words: Vec<u32> = line.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect();
            assert_eq!(words, [id, id, id, 0], "leaf 0Bh, leaf 1 and the x2APIC's MSR of vCPU {id} of {cpus}");
        }
    }
}

#[test]
fn vcpus_stay_where_they_are_pinned() {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let allowed = |status: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        line.unwrap().trim().to_string()
    };
    let first = allowed(&status).split([',', '-']).next().unwrap().to_string();
    let kernel = Kernel::new(&elf(crate::guests::say_and_spin()));
    let running = Running::start(kernel.command(&["--cpus", &format!("2,affinity={first}:{first}")]));
    running.stdout.wait_for("up");
    let tasks = fs::read_dir(format!("/proc/{}/task", running.child.id())).unwrap();
    let mut pinned = 0;
    for task in tasks.map(|task| task.unwrap().path()) {
        if fs::read_to_string(task.join("comm")).unwrap().starts_with("vcpu") {
            assert_eq!(allowed(&fs::read_to_string(task.join("status")).unwrap()), first);
            pinned += 1;
        }
    }
    assert_eq!(pinned, 2);
}

#[test]
fn memory_above_4_gib_is_there() {
    let highest = (5u64 << 30) + (1 << 30) - 8;
    let image = with_words(crate::guests::touch_high(), &[highest as u32, (highest >> 32) as u32]);
    assert_eq!(in_order(run(&image, &["--memory", "5G"])).expect(0).stdout, b"ok");
}

#[test]
fn memory_is_reserved_lazily_up_to_what_the_guest_can_address() {
    let report = doctor();
    let bits = report["limits"]["physical_address_bits"].as_u64().unwrap();
    // Far more memory than any machine that runs this test has, but within every processor's address space.
    in_order(run(&elf(crate::guests::power_off()), &["--memory", "60G"])).expect(0);
    let ended = run(&elf(crate::guests::power_off()), &["--memory", &format!("{}G", 1u64 << (bits - 30))]);
    let ended = in_order(ended).expect(125).says("the guest can address at most");
    assert_eq!(ended.stderr.lines().count(), 1);
}

// Control of running guests.

#[test]
fn output_appears_though_the_guest_never_exits_again() {
    let kernel = Kernel::new(&elf(crate::guests::say_and_spin()));
    let running = Running::start(kernel.command(&["--grace", "0s"]));
    running.stdout.wait_for("up");
    running.signal(libc::SIGTERM);
    running.end().expect(143).says("stopped by signal 15 (SIGTERM)");
}

#[test]
fn a_second_signal_does_not_wait_for_the_grace_period() {
    let kernel = Kernel::new(&elf(crate::guests::say_and_spin()));
    let running = Running::start(kernel.command(&["--grace", "1h", "--log-level", "info"]));
    running.stdout.wait_for("up");
    running.signal(libc::SIGTERM);
    running.stderr.wait_for("pressing the guest's power button");
    running.signal(libc::SIGINT);
    running.end().expect(130);
}

/// Returns the number of bytes that wait in a pipe.
fn pending(pipe: &PipeReader) -> i32 {
    let mut count = 0;
    // SAFETY: FIONREAD writes one int.
    assert_eq!(unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &mut count) }, 0);
    count
}

/// Waits until a pipe that is not read is full.
fn wait_full(pipe: &PipeReader) {
    // SAFETY: the call only queries the pipe's size.
    let size = unsafe { libc::fcntl(pipe.as_raw_fd(), libc::F_GETPIPE_SZ) };
    let limit = Instant::now() + DEADLINE;
    // The pages of a full pipe need not be full to the last byte.
    while pending(pipe) < size / 2 {
        assert!(Instant::now() < limit, "{} of {size} bytes arrived in the pipe", pending(pipe));
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_console_that_nobody_reads_holds_up_neither_time_limit_nor_signals() {
    for (args, signal, code) in [(["--timeout", "1s"], None, 124), (["--grace", "0s"], Some(libc::SIGTERM), 143)] {
        let (reader, writer) = std::io::pipe().unwrap();
        let kernel = Kernel::new(&elf(crate::guests::flood()));
        let mut command = kernel.command(&args);
        command.stdout(writer).stderr(std::process::Stdio::piped()).stdin(std::process::Stdio::null());
        let running = Running::spawn(command);
        if let Some(signal) = signal {
            wait_full(&reader);
            running.signal(signal);
        }
        in_order(running.end()).expect(code);
    }
}

#[test]
fn a_console_that_nobody_reads_holds_up_the_guest_and_costs_no_memory() {
    let (reader, writer) = std::io::pipe().unwrap();
    // The guest powers off after half a megabyte: it must not get that far.
    let kernel = Kernel::new(&with_words(crate::guests::flood_blocks(), &[8, 0]));
    let mut command = kernel.command(&["--grace", "0s"]);
    command.stdout(writer).stderr(std::process::Stdio::piped()).stdin(std::process::Stdio::null());
    let running = Running::spawn(command);
    wait_full(&reader);
    // Waits as long as another guest needs to send the same amount.
    run(&with_words(crate::guests::flood_blocks(), &[8, 0]), &[]).expect(0);
    running.signal(libc::SIGTERM);
    in_order(running.end()).expect(143).says("the console's reader has stopped");
}

/// Fails the test unless `bytes` count up from 0 again and again.
#[track_caller]
fn assert_sequence(bytes: &[u8]) {
    let wrong = bytes.iter().zip((0..=255u8).cycle()).position(|(got, expected)| *got != expected);
    assert_eq!(wrong, None, "offset of the first wrong byte of {}", bytes.len());
}

#[test]
fn a_reader_gets_every_byte_in_order() {
    let ended = in_order(run(&with_words(crate::guests::flood_blocks(), &[16, 0]), &[])).expect(0);
    assert_eq!(ended.stdout.len(), 16 << 16);
    assert_sequence(&ended.stdout);
}

#[test]
fn input_reaches_the_guest_and_the_end_of_input_is_no_end() {
    let kernel = Kernel::new(&elf(crate::guests::echo()));
    let mut command = kernel.command(&[]);
    let piped = std::process::Stdio::piped;
    command.stdin(piped()).stdout(piped()).stderr(piped());
    let mut running = Running::spawn(command);
    running.stdout.wait_for("ready\n");
    let mut stdin = running.child.stdin.take().unwrap();
    std::io::Write::write_all(&mut stdin, b"HAL").unwrap();
    running.stdout.wait_for("IBM");
    // Far more than the UART's FIFO can hold.
    std::io::Write::write_all(&mut stdin, &[b'x'; 3000]).unwrap();
    running.stdout.wait("3000 y", |bytes| bytes.iter().filter(|byte| **byte == b'y').count() == 3001);
    std::io::Write::write_all(&mut stdin, b"q").unwrap();
    drop(stdin);
    in_order(running.end()).expect(0);
}

/// A machine in this process. Only one runs at a time, because its threads are found by their names.
struct Local {
    controller: Controller,
    thread: JoinHandle<Result<machine_run::Ended, ::vireo::machine::Error>>,
    _one: MutexGuard<'static, ()>,
    _kernel: Kernel,
}

impl Local {
    /// Starts `image` with its serial port on a pipe.
    fn start(image: &[u8], paused: bool) -> (Local, PipeReader) {
        static ONE: Mutex<()> = Mutex::new(());
        let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let (reader, writer) = std::io::pipe().unwrap();
        let kernel = Kernel::new(image);
        let mut config = MachineConfig::default();
        config.boot.kernel = kernel.path().into();
        config.memory.size = Size::mib(16);
        config.balloon = Some(BalloonConfig::default());
        config.serial = SerialConfig::File(format!("/proc/self/fd/{}", writer.as_raw_fd()).into());
        let mut machine = Machine::new(config, None, Instant::now()).unwrap();
        drop(writer);
        machine.load().unwrap();
        let mailbox = Mailbox::new().unwrap();
        let controller = Controller::new(mailbox.clone());
        let options = RunOptions { timeout: Some(DEADLINE), paused, ..RunOptions::default() };
        let thread = thread::spawn(move || machine.run(options, mailbox));
        (Local { controller, thread, _one: one, _kernel: kernel }, reader)
    }

    /// Returns the processor time of the vCPU, in nanoseconds.
    fn vcpu_time(&self) -> u64 {
        let tasks = fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
        let vcpu =
            tasks.into_iter().find(|task| fs::read_to_string(task.join("comm")).is_ok_and(|name| name == "vcpu0\n"));
        let stat = fs::read_to_string(vcpu.expect("a vCPU thread").join("schedstat")).unwrap();
        stat.split(' ').next().unwrap().parse().unwrap()
    }

    /// Fails the test if the vCPU keeps running. It may take a moment to fall asleep after its answer, but then it uses
    /// no processor time while another whole guest runs from start to end.
    #[track_caller]
    fn assert_paused(&self) {
        let idle = (0..10).any(|_| {
            let before = self.vcpu_time();
            run(&elf(crate::guests::power_off()), &[]).expect(0);
            self.vcpu_time() == before
        });
        assert!(idle, "a paused vCPU uses processor time");
    }

    fn end(self) -> Outcome {
        self.thread.join().unwrap().unwrap().outcome
    }
}

#[test]
fn a_paused_guest_does_nothing_and_a_resumed_one_goes_on() {
    let (local, reader) = Local::start(&elf(crate::guests::flood()), false);
    let output = Collected::from(reader);
    output.wait("first bytes", |bytes| bytes.len() > 1000);
    assert!(local.controller.pause());
    assert!(local.controller.pause(), "twice is harmless");
    local.assert_paused();
    let so_far = output.wait("bytes", |_| true).len();
    assert!(local.controller.resume() && local.controller.resume());
    output.wait("more bytes", |bytes| bytes.len() > so_far + 10_000);
    local.controller.stop(Outcome::Quit);
    let controller = local.controller.clone();
    assert_eq!(local.end(), Outcome::Quit);
    assert_sequence(&output.all());
    assert!(!controller.pause() && !controller.resume(), "there is nothing to pause any more");
}

#[test]
fn devices_are_reached_while_the_guest_runs_and_only_those_that_exist() {
    let (local, _reader) = Local::start(&elf(crate::guests::say_and_spin()), false);
    let controller = local.controller.clone();
    assert_eq!(controller.set_balloon(8 << 20), Ok(()));
    let stats = controller.balloon_stats().unwrap();
    assert_eq!((stats.target, stats.actual, stats.age_ms), (8 << 20, 0, None));
    assert!(matches!(controller.set_balloon(17 << 20), Err(ControlError::Refused(_))));
    assert_eq!(controller.balloon_stats().unwrap().target, 8 << 20);
    assert!(controller.pause());
    assert_eq!(controller.set_balloon(0), Ok(()));
    let missing = controller.device("disk7", Control::SetBalloon(0)).unwrap_err();
    assert_eq!(missing.to_string(), "the machine has no device disk7");
    controller.stop(Outcome::Quit);
    assert_eq!(local.end(), Outcome::Quit);
    assert_eq!(controller.set_balloon(0), Err(ControlError::Ended));
}

#[test]
fn a_guest_can_start_paused_and_be_stopped_paused() {
    let (local, reader) = Local::start(&elf(crate::guests::say_and_spin()), true);
    let output = Collected::from(reader);
    assert!(local.controller.pause(), "already paused");
    local.assert_paused();
    assert_eq!(output.wait("nothing", |_| true), b"");
    local.controller.resume();
    output.wait_for("up");
    local.controller.pause();
    local.controller.stop(Outcome::Quit);
    assert_eq!(local.end(), Outcome::Quit);

    let (local, _reader) = Local::start(&elf(crate::guests::say_and_spin()), true);
    local.controller.stop(Outcome::Quit);
    assert_eq!(local.end(), Outcome::Quit);
}

#[test]
fn pausing_in_the_middle_of_strings_loses_nothing() {
    let (local, reader) = Local::start(&with_words(crate::guests::flood_blocks(), &[24, 0]), false);
    let output = Collected::from(reader);
    for _ in 0..100 {
        if !local.controller.pause() {
            break;
        }
        local.controller.resume();
    }
    assert_eq!(local.end(), Outcome::PoweredOff);
    let output = output.all();
    assert_eq!(output.len(), 24 << 16);
    assert_sequence(&output);
}

#[test]
fn a_guest_that_waits_for_a_reader_can_be_paused() {
    for image in [elf(crate::guests::flood()), with_words(crate::guests::flood_blocks(), &[u32::MAX, 0])] {
        let (local, reader) = Local::start(&image, false);
        wait_full(&reader);
        assert!(local.controller.pause());
        local.assert_paused();
        assert!(local.controller.resume() && local.controller.pause() && local.controller.resume());
        let output = Collected::from(reader);
        output.wait("what was held up, and more", |bytes| bytes.len() > 300_000);
        local.controller.stop(Outcome::Quit);
        assert_eq!(local.end(), Outcome::Quit);
        assert_sequence(&output.all());
    }
}

#[test]
fn a_socket_console_serves_whoever_connects() {
    let (_folder, path) = folder();
    let socket = path.join("console");
    let kernel = Kernel::new(&elf(crate::guests::echo()));
    let running = Running::start(kernel.command(&["--serial", &format!("socket:{}", socket.display())]));
    let limit = Instant::now() + DEADLINE;
    let mut client = loop {
        match UnixStream::connect(&socket) {
            Ok(client) => break client,
            Err(e) => assert!(Instant::now() < limit, "nothing listens on the socket: {e}"),
        }
        thread::sleep(Duration::from_millis(2));
    };
    client.set_read_timeout(Some(DEADLINE)).unwrap();
    std::io::Write::write_all(&mut client, b"1").unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"2") {
        let mut byte = [0];
        client.read_exact(&mut byte).unwrap();
        answer.extend(byte);
    }
    std::io::Write::write_all(&mut client, b"q").unwrap();
    in_order(running.end()).expect(0);
    assert!(!socket.exists());
}
