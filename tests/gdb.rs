//! The stub with a real gdb (Debian's): what a person does with a kernel under test.
//!
//! On the machine's own /dev/kvm, with a guest of a few instructions: registers, memory, steps, hardware breakpoints,
//! Ctrl-C, detaching, vanishing, killing, the guest's end. Where Linux guests run, which may be an emulated host: a
//! kernel with two vCPUs, interrupted, inspected, stepped, continued to its end. Software breakpoints and watchpoints
//! do not stop guests of an emulated host, and not every software KVM supports them; the unit tests cover them.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::{fs, path::PathBuf};

use crate::common::{Run, on_host};
use crate::guests::vireo::{Kernel, Running, folder};
use crate::guests::{DEBUGGED_COUNT, DEBUGGED_LOOP, START, elf};
use tempfile::TempDir;

/// Returns gdb's output for these commands, without any user's settings. gdb may interrupt itself ([`CTRL_C`]), which
/// ends a `continue` that would last for ever.
#[track_caller]
fn gdb(commands: &[&str]) -> String {
    let mut gdb = Command::new("gdb");
    gdb.args(["-nx", "-q", "-batch", "-ex", "set confirm off", "-ex", "set pagination off"]);
    commands.iter().for_each(|command| _ = gdb.args(["-ex", command]));
    gdb.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let ended = Running::spawn(gdb).end();
    format!("{}{}", String::from_utf8_lossy(&ended.stdout), ended.stderr)
}

/// Command before `continue` that makes gdb receive a Ctrl-C a moment later.
const CTRL_C: &str = "python import os, threading; threading.Timer(1, lambda: os.kill(os.getpid(), 2)).start()";

/// Fails the test unless `text` contains these words in this order.
#[track_caller]
fn says(text: &str, wanted: &[&str]) {
    let mut rest = text;
    for word in wanted {
        match rest.split_once(word) {
            Some((_, behind)) => rest = behind,
            None => panic!("'{word}' is missing or out of order in:\n{text}"),
        }
    }
}

/// A running vireo with `crate::guests::debugged` and a stub.
struct Debugged {
    vireo: Running,
    socket: PathBuf,
    target: String,
    _files: (TempDir, Kernel),
}

impl Debugged {
    fn start(args: &[&str]) -> Self {
        let (folder, path) = folder();
        let socket = path.join("gdb");
        let kernel = Kernel::new(&elf(crate::guests::debugged()));
        let address = format!("unix:{}", socket.display());
        let vireo = Running::start(kernel.command(&[&["--gdb", &address], args].concat()));
        vireo.stderr.wait_for("vireo: gdb: target remote ");
        let target = format!("target remote {}", socket.display());
        Debugged { vireo, socket, target, _files: (folder, kernel) }
    }

    /// Continues from wherever the guest is, and makes it power off.
    #[track_caller]
    fn release(self) {
        says(&gdb(&[&self.target, "set $rsi = 1", "continue"]), &["exited normally"]);
        let ended = self.vireo.end().expect(0).says("vireo: the guest powered off");
        // An earlier client may have been disconnected with a message, or refused because the one before it still
        // counted.
        let lines = ended.stderr.lines().filter(|line| !line.contains("the debugger was disconnected")).count();
        assert_eq!(lines, 2, "{}", ended.stderr);
        assert!(!self.socket.exists());
    }
}

#[test]
fn registers_memory_steps_and_hardware_breakpoints() {
    let guest = Debugged::start(&["--gdb-wait"]);
    assert_eq!(fs::metadata(&guest.socket).unwrap().permissions().mode() & 0o777, 0o600);
    let (behind, count) = (DEBUGGED_LOOP + 8, format!("print *(long*){DEBUGGED_COUNT:#x}"));
    let text = gdb(&[
        &guest.target,
        "info threads",
        "stepi",
        "print/x $rax",
        "print/x $rip",
        &format!("hbreak *{behind:#x}"),
        "continue",
        &count,
        "continue",
        &count,
        "print/x $rbx",
        "delete",
        "print/x $xmm3.v4_int32[0] = 0x55667788",
        "print/x $r13 = 0xabcdef",
        "flushregs",
        "print/x $xmm3.v4_int32[0]",
        "print/x $r13",
        "print/x $mxcsr",
        "print/x $cr3",
        "print $gs_base",
        "info line",
        &format!("set var *(int*){:#x} = 0x12345678", DEBUGGED_COUNT + 0x100),
        &format!("x/2xb {:#x}", DEBUGGED_COUNT + 0x100),
        "x/1xb 0xfffffffffffff000",
        "monitor phys 0x200000 2",
        "monitor translate 0x200000",
        "print/x $gs = 0x1234",
        "detach",
    ]);
    let at = |addr: u64| format!("= {addr:#x}\n");
    says(
        &text,
        &[
            "(vCPU 0, ring 0)",
            "= 0x1122334455667788\n",
            &at(START + 10),
            "Breakpoint 1, ",
            "= 5\n",
            "Breakpoint 1, ",
            "= 4\n",
            "= 0x4\n",
            "= 0x55667788\n",
            "= 0xabcdef\n",
            "= 0x55667788\n",
            "= 0xabcdef\n",
            "= 0x1f80\n",
            "= 0x9000\n",
            "= 0\n",
            "0x78\t0x56\n",
            "Cannot access memory at address 0xfffffffffffff000",
            "0x200000: 48 b8\n",
            "0x200000\n",
        ],
    );
    says(&text, &["Could not write registers"]);
    says(&text, &["detached]"]);
    guest.release();
}

#[test]
fn ctrl_c_stops_and_who_detaches_or_vanishes_leaves_a_running_guest() {
    let guest = Debugged::start(&[]);
    let spins = |text: &str| says(text, &["Program received signal SIGINT", "= 0\n"]);
    spins(&gdb(&[&guest.target, CTRL_C, "continue", "print $rsi", "detach"]));
    // A client that sends nothing, one that sends nonsense, and one that disconnects in the middle of a packet.
    for words in ["", "$nonsense#00", "$vCont;c#a8$m0"] {
        let mut stream = UnixStream::connect(&guest.socket).unwrap();
        stream.write_all(words.as_bytes()).unwrap();
    }
    spins(&gdb(&[&guest.target, CTRL_C, "continue", "print $rsi", "detach"]));
    guest.release();
}

#[test]
fn a_second_debugger_is_sent_away() {
    let guest = Debugged::start(&[]);
    let mut first = UnixStream::connect(&guest.socket).unwrap();
    first.write_all(b"$?#3f").unwrap();
    first.read_exact(&mut [0; 8]).unwrap();
    let mut second = UnixStream::connect(&guest.socket).unwrap();
    assert_eq!(second.read(&mut [0; 8]).unwrap(), 0);
    drop(first);
    guest.release();
}

#[test]
fn kill_ends_the_guest_and_an_end_by_others_is_told() {
    let guest = Debugged::start(&[]);
    says(&gdb(&[&guest.target, "kill"]), &["killed]"]);
    guest.vireo.end().expect(137).says("vireo: killed by the debugger");

    let guest = Debugged::start(&["--timeout", "2s"]);
    says(&gdb(&[&guest.target, "continue"]), &["exited with code 0174"]);
    guest.vireo.end().expect(124).says("still running after the time limit");

    // No client connects: the guest has not begun when its time is over.
    let guest = Debugged::start(&["--wait", "--timeout", "1s"]);
    guest.vireo.end().expect(124);
}

/// A fault of the program as it is shipped, which is linked differently from that of the unit tests.
#[test]
fn memory_whose_file_is_gone_ends_vireo_with_a_report() {
    let (_folder, path) = folder();
    let (pmem, report) = (path.join("pmem"), path.join("report.json"));
    fs::File::create(&pmem).unwrap().set_len(2 << 20).unwrap();
    let guest = Debugged::start(&["--pmem", pmem.to_str().unwrap(), "--report", report.to_str().unwrap()]);
    fs::File::options().write(true).open(&pmem).unwrap().set_len(0).unwrap();
    gdb(&[&guest.target, "monitor phys 0x100000000 16"]);
    let sentence = "a file mapped into memory, such as the guest's, was truncated";
    guest.vireo.end().expect(125).says(sentence);
    let report = fs::read_to_string(&report).unwrap();
    assert!(report.contains(sentence) && report.contains("\"exit_code\": 125"), "{report}");
}

#[test]
fn the_first_instruction_waits_for_continue_and_ports_are_local() {
    let (_folder, path) = folder();
    let report = path.join("report.json");
    let kernel = Kernel::new(&elf(crate::guests::power_off()));
    let args = ["--gdb", "0", "--gdb-wait", "--report", report.to_str().unwrap()];
    let vireo = Running::start(kernel.command(&args));
    let line = "vireo: gdb: target remote :";
    let said = vireo.stderr.wait("a port", |bytes| bytes.starts_with(line.as_bytes()) && bytes.ends_with(b"\n"));
    let port = String::from_utf8(said).unwrap()[line.len()..].trim_end().to_string();
    let target = format!("target remote :{port}");
    says(&gdb(&[&target, "print/x $rip", "continue"]), &[&format!("= {START:#x}\n"), "exited normally"]);
    vireo.end().expect(0);

    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let ended = Running::start(kernel.command(&["--gdb", &port])).end().expect(125);
    assert!(ended.stderr.starts_with(&format!("vireo: gdb: cannot listen on port {port} of 127.0.0.1: ")));
    Running::start(kernel.command(&["--gdb", "host:1"])).end().expect(2);
    Running::start(kernel.command(&["--gdb-wait"])).end().expect(2);
}

#[test]
fn the_kernel_is_where_it_was_linked_unless_the_user_has_a_word_on_it() {
    let kernel = Kernel::new(&elf(crate::guests::power_off()));
    let cmdline = |args: &[&str]| {
        let ended = Running::start(kernel.command(&[&["--print-config", "--gdb", "0"], args].concat())).end().expect(0);
        let config: serde_json::Value = serde_json::from_slice(&ended.stdout).unwrap();
        config["boot"]["cmdline"].as_str().unwrap().to_string()
    };
    assert_eq!(cmdline(&[]), "nokaslr console=ttyS0");
    for own in ["kaslr quiet", "quiet nokaslr"] {
        assert_eq!(cmdline(&["--cmdline", own]), own);
    }
}

/// A kernel under test: gdb runs beside vireo, on the same host.
#[test]
fn a_linux_guest_with_two_vcpus() {
    let script = "cat /proc/version; grep -w -e linux_banner -e jiffies /proc/kallsyms; echo waiting; read line; echo \"read: $line\"";
    let run = Run::new("bzImage-cloud", script).cmdline("console=ttyS0 quiet vireo.modules=none");
    let socket = format!("{}.gdb", run.path("x"));
    // Sockets are created in the host's own /tmp, because the share does not support them.
    let socket = format!("/tmp/{}", socket.replace('/', "-"));
    let mut guest = run.args(&["--cpus", "2", "--gdb", &format!("unix:{socket}")]).start();
    guest.wait_for_stderr("gdb: target remote ");
    let console = guest.wait_for("waiting");
    let symbol = console.lines().find(|line| line.ends_with(" linux_banner")).unwrap_or_else(|| panic!("{console}"));
    let banner = format!("(char *)0x{}", symbol.split(' ').next().unwrap());
    let text = {
        let mut args =
            vec!["gdb", "-nx", "-q", "-batch", "-ex", "set confirm off", "-ex", "set architecture i386:x86-64"];
        let (target, string) = (format!("target remote {socket}"), format!("x/s {banner}"));
        let commands = [
            target.as_str(),
            "info threads",
            string.as_str(),
            "thread 2",
            "print/x $cs & 3",
            "thread 1",
            "set scheduler-locking on",
            "print $before = $rip",
            "stepi",
            "stepi",
            "print $rip != $before",
            "set scheduler-locking off",
            CTRL_C,
            "continue",
            "info threads",
            "detach",
        ];
        commands.iter().for_each(|command| args.extend(["-ex", *command]));
        on_host(&args).end().to_string()
    };
    says(
        &text,
        &[
            "(vCPU 0, ring ",
            "(vCPU 1, ring ",
            "Linux version 6.1",
            "Switching to thread ",
            "SIGINT",
            "(vCPU 0, ring ",
            "(vCPU 1, ring ",
            "detached]",
        ],
    );
    says(&text, &["Linux version 6.1", "= 1\n", "SIGINT"]);
    // The guest continues, and the next client learns how it ended.
    let target = format!("target remote {socket}");
    let last = on_host(&["gdb", "-nx", "-q", "-batch", "-ex", &target, "-ex", "info threads", "-ex", "continue"]);
    last.wait_for("(vCPU 1, ring ");
    guest.send(b"on\n");
    guest.wait_for("read: on");
    let last = last.end().to_string();
    says(&last, &["exited normally"]);
    guest.end().success();
}
