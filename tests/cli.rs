//! The command line as users and scripts meet it: its output, one sentence and an exit code for every mistake and every
//! shortage, and a terminal that is left as it was.

#![allow(unsafe_code)] // Limits, terminals and signals.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::hears_signals;
use crate::guests::vireo::{Collected, DEADLINE, Ended, Kernel, Running, folder, vireo};
use crate::guests::{POWER_OFF, elf, text, writes};

/// Runs `vireo` with these arguments.
fn words(args: &[&str]) -> Ended {
    let mut command = vireo();
    command.args(args);
    Running::start(command).end()
}

/// Fails the test unless vireo failed as it should: with this code and one line on stderr, which is returned.
#[track_caller]
fn one_sentence(ended: Ended, code: i32) -> String {
    let ended = ended.expect(code);
    let line = ended.stderr.strip_suffix('\n').unwrap_or_default();
    assert!(line.starts_with("vireo: ") && !line.contains('\n'), "expected one line from vireo: {}", ended.stderr);
    for ugly in ["panicked", "Error(", "Error {", "Os {", "Some(", "None"] {
        assert!(!line.contains(ugly), "{line}");
    }
    assert!(ended.stdout.is_empty(), "{:?}", ended.stdout);
    line.into()
}

/// Returns the sentence with which `vireo run` with these arguments ends.
#[track_caller]
fn refused(args: &[&str]) -> String {
    one_sentence(words(&[&["run", "--memory", "16M"], args].concat()), 125)
}

#[track_caller]
fn contains(text: &str, part: &str) {
    assert!(text.contains(part), "'{part}' is not in: {text}");
}

fn path_text(path: &Path) -> &str {
    path.to_str().unwrap()
}

// Output.

#[test]
fn version_names_version_commit_and_build() {
    let ended = words(&["--version"]).expect(0);
    let text = String::from_utf8(ended.stdout).unwrap();
    let rest = text.strip_prefix(concat!("vireo ", env!("CARGO_PKG_VERSION"), " (commit ")).unwrap();
    let (commit, build) = rest.split_once(", ").unwrap();
    assert!(commit == "unknown" || commit.bytes().all(|b| b.is_ascii_hexdigit()), "{text}");
    contains(build, " build for x86_64-");
}

#[test]
fn help_shows_an_example_of_every_command() {
    let help = String::from_utf8(words(&["--help"]).expect(0).stdout).unwrap();
    contains(&help, "Example:\n  vireo exec -- uname -r\n  vireo run --kernel ");
    contains(&help, "Exit status:");
    for command in ["run", "exec", "doctor", "completions", "man"] {
        contains(&help, &format!("\n  {command} "));
        let help = String::from_utf8(words(&[command, "--help"]).expect(0).stdout).unwrap();
        contains(&help, &format!("Example:\n  vireo {command}"));
    }
}

#[test]
fn completions_are_scripts_of_their_shells() {
    for shell in ["bash", "zsh", "fish"] {
        let script = words(&["completions", shell]).expect(0).stdout;
        assert!(script.len() > 1000, "{shell}");
        contains(&String::from_utf8_lossy(&script), "boot-timing");
        if shell == "bash" {
            let mut bash = Command::new("bash").arg("-n").stdin(Stdio::piped()).spawn().expect("cannot start bash");
            bash.stdin.take().unwrap().write_all(&script).unwrap();
            assert!(bash.wait().unwrap().success());
        }
    }
}

#[test]
fn the_manual_covers_every_command() {
    let page = String::from_utf8(words(&["man"]).expect(0).stdout).unwrap();
    let titles: Vec<_> = page.lines().filter_map(|line| line.strip_prefix(".TH ")?.split(' ').next()).collect();
    assert_eq!(titles, ["vireo", "vireo-run", "vireo-exec", "vireo-doctor", "vireo-completions", "vireo-man"]);
    contains(&page, "\\-\\-boot\\-timing");
}

#[test]
fn readers_that_leave_early_are_no_failure_but_a_full_disk_is() {
    for args in [&["man"][..], &["completions", "bash"], &["run", "--kernel", "x", "--print-config"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = vireo();
        command.args(args).stdout(writer).stderr(Stdio::piped());
        assert_eq!(Running::spawn(command).end().expect(0).stderr, "");
        let mut command = vireo();
        command.args(args).stdout(File::create("/dev/full").unwrap()).stderr(Stdio::piped());
        contains(&one_sentence(Running::spawn(command).end(), 125), "cannot write to stdout: No space left");
    }
}

// Wrong usage.

#[test]
fn wrong_usage_is_explained_and_exits_with_2() {
    for (args, says) in [
        (&[][..], "Usage: vireo"),
        (&["rnu"], "the commands are run, exec, doctor"),
        (&["docto"], "'doctor'"),
        (&["run"], "--kernel <FILE>"),
        (&["run", "--kernl", "x"], "'--kernel'"),
        (&["run", "--kernel"], "a value is required for '--kernel <FILE>'"),
        (
            &["run", "--kernel", "x", "--memory", "12x"],
            "'12x' is not a size; write bytes or a number with K, M, G or T",
        ),
        (&["run", "--kernel", "x", "--memory", "-1"], "'-1' is not a size"),
        (&["run", "--kernel", "x", "--memory", "1.1G"], "'1.1G' is not a whole number of bytes"),
        (&["run", "--kernel", "x", "--memory", "1G,"], "there is nothing after the last comma"),
        (&["run", "--kernel", "x", "--disk", ""], "'path' is empty"),
        (
            &["run", "--kernel", "x", "--net", "eth0"],
            "unknown key 'eth0'; write tap=eth0 for a tap device of the host, or user",
        ),
        (&["run", "--kernel", "x", "--timeout", "30m1h"], "'30m1h' is not a time"),
        (
            &["run", "--kernel", "x", "--memory", "1G,huge=1"],
            "unknown key 'huge'; valid keys are size, hugepages, shared, prefault",
        ),
        (&["run", "--kernel", "x", "--cpus", "two"], "'two' is not a number"),
        (&["run", "--kernel", "x", "--cpus", "-1"], "'-1' is not a number"),
        (&["run", "--kernel", "x", "--cpus", "1,pin=1"], "unknown key 'pin'; valid keys are count, affinity"),
        (&["run", "--kernel", "x", "--disk", "d,ro=1"], "unknown key 'ro'; valid keys are path, size, readonly"),
        (&["run", "--kernel", "x", "--disk", "d,readonly=maybe"], "'maybe' is neither on nor off"),
        (
            &["run", "--kernel", "x", "--serial", "tcp:1"],
            "none of stdio, stdin, stdout, stderr, null, pty, file:PATH, pipe:PATH, socket:PATH and fd:NUMBER",
        ),
        (&["run", "--kernel", "x", "--timeout", "5d"], "'5d' is not a time; write a number with ms, s, m or h"),
        (&["run", "--kernel", "x", "--hang-timeout", "1s"], "must be at least 2s"),
        (&["run", "--kernel", "x", "--expect", "("], "invalid regular expression: "),
        (&["run", "--kernel", "x", "--fail-on", "[z-a]"], "invalid regular expression: "),
        (&["run", "--kernel", "x", "--boot", "efi"], "expected one of auto, bzimage, direct, pvh, multiboot"),
        (&["run", "--kernel", "x", "--acpi", "maybe"], "possible values: on, off"),
        (&["run", "--kernel", "x", "--uuid", "1"], "expected a UUID, like "),
        (&["run", "--kernel", "x", "--file", "a"], "expected HOST:GUEST, with an absolute path for the guest"),
        (&["run", "--kernel", "x", "--log-level", "loud"], "possible values: off, error"),
        (&["doctor", "--jsno"], "'--json'"),
        (&["completions", "tcsh"], "possible values: bash"),
    ] {
        let ended = words(args).expect(2).says(says);
        assert!(ended.stdout.is_empty() && !ended.stderr.contains("panicked at"), "{}", ended.stderr);
    }
}

#[test]
fn impossible_machines_are_wrong_usage() {
    for (args, says) in [
        (["--cpus", "0"], "--cpus 0: a guest needs at least one vCPU"),
        (["--cpus", "100000"], "at most 254 vCPUs"),
        (["--cpus", "2,affinity=0"], "affinity names 1 host processors for 2 vCPUs"),
        (["--cpus", "2,affinity=x"], "is not a list of host processors like 0-3"),
        (["--memory", "1M"], "--memory 1M: a guest needs at least 16M"),
        (["--memory", "512"], "a size without a unit is in bytes: for MiB write 512M"),
        (["--balloon", "100"], "a size without a unit is in bytes: for MiB write 100M"),
        (["--memory", "17000001"], "not a multiple of 4K"),
        (["--cpu", "avx"], "must begin with + or -"),
        (["--pmem", "f,size=3M"], "--pmem f: size=3M is not a multiple of 2M"),
        (["--virtio-mem", "1G,requested=2G"], "--virtio-mem requested=2G: there is only 1G to add"),
        (["--console-port", "a,to=pty,from=b"], "from= goes with to=file:PATH and to=null"),
        (["--cpu", "+warp"], "not a CPU feature vireo knows"),
    ] {
        contains(&one_sentence(words(&["run", "--kernel", "x", args[0], args[1]]), 2), says);
    }
    contains(&one_sentence(words(&["run", "--kernel", "x", "--memory", "100T"]), 125), "can address at most");
}

// Files that are unsuitable.

#[test]
fn files_that_cannot_be_written_are_told_before_the_guest_runs() {
    let (_folder, path) = folder();
    let inside = |name: &str| path.join(name).display().to_string();
    make_fifo(&path.join("fifo"));
    for (flag, file, says) in [
        ("--vmcore", inside("no/core"), "No such file or directory"),
        ("--vmcore", inside(""), "a directory"),
        ("--vmcore", inside("fifo"), "a regular file is needed"),
        ("--vmcore", "/dev/null".into(), "a regular file is needed"),
        ("--console-log", inside("no/log"), "No such file or directory"),
    ] {
        let sentence = refused(&["--kernel", "x", flag, &file]);
        contains(&sentence, &format!("cannot write {file}: "));
        contains(&sentence, says);
    }
}

#[test]
fn what_is_no_kernel_is_named() {
    let (_folder, path) = folder();
    let file = |name: &str, bytes: &[u8]| {
        fs::write(path.join(name), bytes).unwrap();
        path.join(name)
    };
    let fifo = path.join("fifo");
    make_fifo(&fifo);
    let mut arm64 = vec![0; 4096];
    arm64[0x38..0x3C].copy_from_slice(b"ARM\x64");
    let good = elf(crate::guests::power_off());
    let mut foreign = good.clone();
    foreign[18] = 183;
    let sparse = path.join("sparse");
    File::create(&sparse).unwrap().set_len(5 << 30).unwrap();
    for (kernel, says) in [
        (path.join("nowhere"), "cannot open it: No such file or directory"),
        (path.clone(), "this is a directory, not a file"),
        (fifo, "this is a FIFO, not a file"),
        ("/dev/zero".into(), "this is a character device, not a file"),
        (file("empty", b""), "this is an empty file; vireo boots x86-64 bzImage"),
        (file("text", b"#include <stdio.h>\n"), "this is a text file; vireo boots"),
        (file("arm64", &arm64), "arm64"),
        (file("foreign", &foreign), "an ELF file for arm64"),
        (file("cut", &good[..good.len() - 5]), "truncated: the file needs"),
        (file("head", &good[..40]), "truncated: the file needs"),
        (sparse, "this is nothing but zeros"),
    ] {
        let mut command = vireo();
        command.args(["run", "--memory", "16M", "--kernel"]).arg(&kernel);
        // A file of any size must not be read into memory as a whole.
        limit(&mut command, libc::RLIMIT_AS, 256 << 20);
        let line = one_sentence(Running::start(command).end(), 125);
        contains(&line, &format!("cannot boot {}: ", kernel.display()));
        contains(&line, says);
    }
}

#[test]
fn what_goes_with_the_kernel_is_checked_too() {
    let (_folder, path) = folder();
    let kernel = Kernel::new(&elf(crate::guests::power_off()));
    let kernel = path_text(kernel.path());
    let large = path.join("large");
    File::create(&large).unwrap().set_len(1 << 30).unwrap();
    let empty = path.join("empty");
    File::create(&empty).unwrap();
    let refused = |args: &[&str]| refused(&[&["--kernel", kernel], args].concat());
    contains(&refused(&["--initrd", "/nowhere"]), "cannot use the initrd /nowhere: cannot open it: No such file");
    contains(&refused(&["--initrd", path_text(&path)]), "this is a directory");
    contains(&refused(&["--initrd", path_text(&empty)]), "this is an empty file");
    contains(&refused(&["--initrd", path_text(&large)]), "it needs at least 1028M of memory; the machine has 16M");
    contains(&refused(&["--cmdline", &"x".repeat(70_000)]), "has 70000 bytes; this kernel takes at most");
    contains(&refused(&["--disk", "/nowhere"]), "cannot open disk /nowhere: No such file");
    contains(&refused(&["--disk", path_text(&path)]), "is a directory; a regular file or a block device is needed");
    contains(&refused(&["--disk", path_text(&empty)]), "has 0 bytes");
    contains(&refused(&["--pmem", "/nowhere"]), "pmem: cannot open /nowhere: No such file");
    contains(&refused(&["--pmem", path_text(&path)]), "is a directory; a regular file or a block device is needed");
    contains(&refused(&["--pmem", path_text(&empty)]), "is empty; size= makes it larger");
    contains(&refused(&["--virtio-mem", "1000T"]), "--virtio-mem: no guest address space left for 1000T on this host");
}

#[test]
fn what_is_packed_for_the_guest_is_checked_before_it_runs() {
    let (_folder, path) = folder();
    let kernel = Kernel::new(&elf(crate::guests::power_off()));
    let kernel = path_text(kernel.path());
    let script = path.join("script");
    fs::write(&script, "#!/bin/sh\n").unwrap();
    let plain = path.join("plain");
    fs::write(&plain, "echo").unwrap();
    let mut foreign = elf(crate::guests::power_off());
    foreign[18] = 183;
    let arm64 = path.join("arm64");
    fs::write(&arm64, foreign).unwrap();
    let (nowhere, script, plain) = (path.join("nowhere"), path_text(&script), path_text(&plain));
    for (args, says) in [
        (&["--init", path_text(&nowhere)][..], "/nowhere: cannot open it: No such file or directory"),
        (&["--init", path_text(&path)], "this is a directory, not a file"),
        (
            &["--init", script],
            "cannot be the guest's init: it is a script for /bin/sh, which is not in the initramfs; --busybox",
        ),
        (
            &["--init", "/bin/bash"],
            "it is linked dynamically and needs /lib64/ld-linux-x86-64.so.2, which is not in the",
        ),
        (&["--init", path_text(&arm64)], "it is an ELF file for arm64; guests run x86-64 programs"),
        (&["--init", plain], "it is neither an ELF program nor a script that begins with #!"),
        (&["--busybox", "/bin/bash"], "--busybox: /bin/bash is linked dynamically; a static one is needed"),
        (&["--busybox", "no-such-box"], "there is no no-such-box in PATH; install busybox-static, or name a file"),
        (&["--initramfs-dir", path_text(&nowhere)], "cannot pack "),
        (&["--initramfs-dir", plain], "Not a directory"),
        (&["--file", &format!("{plain}:/a/../b")], "cannot pack anything at /a/../b: '..' may lead out of the archive"),
        (&["--file", "/dev/zero:/zero"], "cannot pack /dev/zero: this is a character device, not a file"),
        (
            &["--modules", "virtio_mmio"],
            "has no virtio_mmio built in, and its modules were not found; looked in no directory",
        ),
        (
            &["--modules", "a", "--modules-dir", path_text(&path)],
            "has no a built in, and its modules were not found; looked in /",
        ),
    ] {
        contains(&refused(&[&["--kernel", kernel], args].concat()), says);
    }
    let large = path.join("large");
    File::create(&large).unwrap().set_len(1 << 30).unwrap();
    let large = format!("{}:/large", path_text(&large));
    contains(
        &refused(&["--kernel", kernel, "--file", &large]),
        "cannot load the initramfs: it needs at least 1029M of memory",
    );
    // An initrd may contain the shell of the script, so vireo does not refuse this.
    words(&["run", "--memory", "16M", "--kernel", kernel, "--initrd", plain, "--initrd", plain, "--init", script])
        .expect(0);
}

#[test]
fn consoles_that_cannot_be_are_named() {
    let (_folder, path) = folder();
    let kernel = Kernel::new(&elf(crate::guests::power_off()));
    let refused = |serial: String| refused(&["--kernel", path_text(kernel.path()), "--serial", &serial]);
    let at = |name: &str| path_text(&path.join(name)).to_string();
    contains(&refused(format!("file:{}", at("no/where"))), "for the console: No such file or directory");
    contains(&refused(format!("file:{}", at(""))), "Is a directory");
    contains(&refused(format!("socket:{}", at("no/where"))), "No such file or directory");
    make_fifo(&path.join("fifo"));
    contains(&refused(format!("file:{}", at("fifo"))), "this FIFO has no reader; start one first");
    fs::write(path.join("plain"), "precious").unwrap();
    contains(&refused(format!("socket:{}", at("plain"))), "a file that is not a socket is already there");
    assert_eq!(fs::read(path.join("plain")).unwrap(), b"precious");
    let socket = path.join("socket");
    let serial = format!("socket:{}", at("socket"));
    let sleeper = Kernel::new(&elf(crate::guests::sleep()));
    let first = Running::start(sleeper.command(&["--serial", &serial]));
    let limit = Instant::now() + DEADLINE;
    while UnixStream::connect(&socket).is_err() {
        assert!(Instant::now() < limit, "nothing listens on {}", socket.display());
        thread::sleep(Duration::from_millis(2));
    }
    contains(&refused(serial.clone()), "another process listens there");
    // The socket that a killed process left behind is replaced.
    drop(first);
    assert!(socket.exists());
    Running::start(kernel.command(&["--serial", &serial])).end().expect(0);
    assert!(!socket.exists());
    let file = format!("file:{}", at("output"));
    let kernel = Kernel::new(&writes(&[&text("to a file\n")[..], &[POWER_OFF]].concat()));
    assert!(Running::start(kernel.command(&["--serial", &file])).end().expect(0).stdout.is_empty());
    assert_eq!(fs::read(path.join("output")).unwrap(), b"to a file\n");
}

#[test]
fn reports_that_cannot_be_written_are_refused_before_the_guest_runs() {
    let (_folder, path) = folder();
    let kernel = Kernel::new(&writes(&text("started")));
    let kernel = path_text(kernel.path());
    let fifo = path.join("fifo");
    make_fifo(&fifo);
    for (report, says) in [
        (path.join("no/where"), "No such file or directory"),
        (path.clone(), "is a directory"),
        (fifo.clone(), "this FIFO has no reader"),
        ("/proc/version/report".into(), "Not a directory"),
    ] {
        let line = refused(&["--kernel", kernel, "--report", path_text(&report)]);
        contains(&line, &format!("cannot write {}: ", report.display()));
        contains(&line, says);
    }
    assert_eq!(fs::read_dir(&path).unwrap().count(), 1, "nothing is left behind");
    // With a reader, a FIFO works like a file.
    let opened = fifo.clone();
    let reader = thread::spawn(move || fs::read(opened).unwrap());
    let limit = Instant::now() + DEADLINE;
    let kernel = Kernel::new(&elf(crate::guests::power_off()));
    // The reader opens the FIFO some time after its thread was started.
    while Running::start(kernel.command(&["--report", path_text(&fifo)])).end().code() != 0 {
        assert!(Instant::now() < limit, "the report was not written to the FIFO");
    }
    contains(&String::from_utf8(reader.join().unwrap()).unwrap(), "powered-off");
    let ended = Running::start(kernel.command(&["--report", "/dev/full"])).end().expect(125);
    contains(&ended.stderr, "vireo: cannot write /dev/full: No space left");
}

#[test]
fn log_files_that_cannot_be_written_are_refused() {
    contains(
        &refused(&["--kernel", "x", "--log-file", "/nowhere/log"]),
        "cannot open the log file /nowhere/log: No such",
    );
    let (_folder, path) = folder();
    let log = path.join("log");
    let kernel = Kernel::new(&elf(crate::guests::power_off()));
    let args = ["--log-file", path_text(&log), "--log-level", "info"];
    let ended = Running::start(kernel.command(&args)).end().expect(0);
    assert_eq!(ended.stderr, "vireo: the guest powered off\n");
    contains(&fs::read_to_string(log).unwrap(), "booting kernel");
}

// The configuration file.

#[test]
fn a_printed_configuration_is_a_configuration_file() {
    let (_folder, path) = folder();
    let flags = "run --kernel /k --initrd /i --initrd /j --init /p --busybox --file a:/b --modules c,d --initramfs-dir /r --cmdline a=b,c --memory 1G,shared=on,hugepages=off --cpus 2,affinity=0-1 \
                 --cpu -avx2 --disk /d,readonly,id=x --disk /e --rng --vsock cid=3,path=/v --serial file:/s --acpi off --boot pvh --debug-exit --testdev \
                 --uuid 123e4567-e89b-12d3-a456-426614174000 --print-config";
    let printed = words(&flags.split_whitespace().collect::<Vec<_>>()).expect(0).stdout;
    let config = path.join("machine.json");
    fs::write(&config, &printed).unwrap();
    let again = words(&["run", "--config", path_text(&config), "--print-config"]).expect(0).stdout;
    assert_eq!(again, printed);
    let mut changed: serde_json::Value = serde_json::from_slice(&printed).unwrap();
    let args = ["run", "--config", path_text(&config), "--memory", "2G", "--kernel", "/other", "--print-config"];
    changed["memory"] = serde_json::json!({"size": "2G", "hugepages": "thp", "shared": false, "prefault": false});
    changed["boot"]["kernel"] = "/other".into();
    let got: serde_json::Value = serde_json::from_slice(&words(&args).expect(0).stdout).unwrap();
    assert_eq!(got, changed, "flags override the file");
}

#[test]
fn a_machine_runs_from_a_configuration_file() {
    let (_folder, path) = folder();
    let kernel = Kernel::new(&writes(&[&text("hello")[..], &[POWER_OFF]].concat()));
    let config = path.join("machine.json");
    let json = serde_json::json!({"boot": {"kernel": kernel.path()}, "memory": {"size": "16M"}, "cpu": {"count": 2}});
    fs::write(&config, json.to_string()).unwrap();
    assert_eq!(words(&["run", "--config", path_text(&config)]).expect(0).stdout, b"hello");
}

#[test]
fn configuration_files_with_mistakes_are_refused_by_name() {
    let (_folder, path) = folder();
    let config = path.join("machine.json");
    for (json, says) in [
        ("", "EOF while parsing"),
        ("[]", "not a valid machine description"),
        (r#"{"boot": {"kernel": "k"}, "memroy": {}}"#, "unknown field `memroy`, expected one of `boot`, `memory`"),
        (r#"{"boot": {"kernel": "k"}, "memory": {"size": "much"}}"#, "'much' is not a size"),
        (r#"{"boot": {"kernel": "k"}, "disks": [{"path": "x", "mode": 1}]}"#, "unknown field `mode`"),
        (r#"{"memory": {}}"#, "missing field `boot`"),
    ] {
        fs::write(&config, json).unwrap();
        let line = one_sentence(words(&["run", "--config", path_text(&config)]), 125);
        contains(&line, &format!("vireo: {} is not a valid machine description: ", config.display()));
        contains(&line, says);
    }
    fs::write(&config, r#"{"boot": {"kernel": ""}}"#).unwrap();
    contains(&one_sentence(words(&["run", "--config", path_text(&config)]), 2), "no kernel: give --kernel FILE");
    contains(&one_sentence(words(&["run", "--config", "/nowhere"]), 125), "cannot read /nowhere: No such file");
    contains(&one_sentence(words(&["run", "--config", "/"]), 125), "cannot read /: Is a directory");
}

// Hosts that lack something.

/// Makes `command` run with a resource limit.
fn limit(command: &mut Command, resource: libc::__rlimit_resource_t, value: u64) {
    let limit = libc::rlimit { rlim_cur: value, rlim_max: value };
    // SAFETY: setrlimit may be called between fork and exec.
    unsafe {
        command.pre_exec(move || match libc::setrlimit(resource, &limit) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
}

fn make_fifo(path: &Path) {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    // SAFETY: a NUL-terminated path.
    assert_eq!(unsafe { libc::mkfifo(path.as_ptr(), 0o666) }, 0);
}

fn is_root() -> bool {
    // SAFETY: always succeeds.
    unsafe { libc::geteuid() == 0 }
}

/// Runs `vireo run` of a guest that powers off, in a mount namespace that `script` changes first. `$1` is a directory.
fn elsewhere(script: &str, user: &[&str], args: &[&str]) -> Running {
    let (_folder, path) = folder();
    fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    let kernel = Kernel::new(&elf(crate::guests::power_off()));
    // The build's directory may be closed to other users.
    let prepare = "set -e; mount -t tmpfs -o mode=755 none $1; cp $2 $1/kernel; chmod 644 $1/kernel; touch $1/vireo; \
                   mount --bind $3 $1/vireo";
    let mut command = Command::new("unshare");
    command.arg("--mount");
    if !is_root() {
        command.arg("--map-root-user");
    }
    command.args(["sh", "-c", &format!("{prepare}; {script}; shift 3; exec \"$@\""), "sh"]);
    command
        .args([path.as_path(), kernel.path(), env!("CARGO_BIN_EXE_vireo").as_ref()])
        .args(user)
        .arg(path.join("vireo"));
    command.args(["run", "--memory", "16M", "--kernel"]).arg(path.join("kernel")).args(args);
    command.env("XDG_CACHE_HOME", path.join("cache"));
    let running = Running::start(command);
    running.stderr.all();
    running
}

#[test]
fn a_host_without_kvm_is_told_what_mends_it() {
    let line = one_sentence(elsewhere("mount -t tmpfs none /dev", &[], &[]).end(), 125);
    contains(&line, "vireo: /dev/kvm does not exist; to fix this: ");
    let line = one_sentence(elsewhere("echo > $1/file; mount --bind $1/file /dev/kvm", &[], &[]).end(), 125);
    contains(&line, "vireo: /dev/kvm is a plain file, not the KVM device; to fix this: sudo mv /dev/kvm");
    let line = one_sentence(elsewhere("mount --bind /dev/null /dev/kvm", &[], &[]).end(), 125);
    contains(&line, "vireo: /dev/kvm is something else, not the KVM device");
}

/// Script that opens /dev/kvm in a namespace to everybody; [`CLOSED_KVM`] closes it to everybody but root.
const OPEN_KVM: &str = "cp -a /dev/kvm $1/kvm; chmod 666 $1/kvm; mount --bind $1/kvm /dev/kvm";
const CLOSED_KVM: &str = "cp -a /dev/kvm $1/kvm; chmod 600 $1/kvm; mount --bind $1/kvm /dev/kvm";
const NOBODY: [&str; 4] = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];

#[test]
fn users_need_no_more_than_permission_to_open_the_device() {
    assert!(is_root(), "this test changes the mode of /dev/kvm in its own namespace: run it as root");
    elsewhere(OPEN_KVM, &NOBODY, &[]).end().expect(0).says("the guest powered off");
    let line = one_sentence(elsewhere(CLOSED_KVM, &NOBODY, &[]).end(), 125);
    contains(&line, "vireo: no permission to open /dev/kvm; to fix this: sudo ");
    let unreadable = format!("{OPEN_KVM}; chmod 600 $1/kernel");
    let line = one_sentence(elsewhere(&unreadable, &NOBODY, &[]).end(), 125);
    contains(&line, "cannot open it: Permission denied");
}

#[test]
fn a_user_who_may_start_no_more_threads_is_told_so() {
    assert!(is_root(), "this test becomes another user, as root has no process limit: run it as root");
    // A user without other processes, which would count towards the limit.
    let user = ["prlimit", "--nproc=9", "setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", "prlimit"];
    for threads in 1.. {
        let limit = format!("--nproc={threads}");
        let ended = elsewhere(OPEN_KVM, &[&user[..], &[&limit]].concat(), &["--cpus", "2"]).end();
        if ended.code() == 0 {
            assert!((3..9).contains(&threads), "{threads} threads are enough");
            return;
        }
        // vireo's threads, and one that KVM itself starts with the guest.
        contains(&one_sentence(ended, 125), "Resource temporarily unavailable (os error 11)");
    }
}

#[test]
fn running_out_of_file_descriptors_is_one_sentence() {
    let kernel = Kernel::new(&elf(crate::guests::power_off()));
    let mut refusals = 0;
    for fds in 3..60 {
        let mut command = kernel.command(&["--rng"]);
        limit(&mut command, libc::RLIMIT_NOFILE, fds);
        let ended = Running::start(command).end();
        if ended.code() == 0 {
            break;
        }
        let line = one_sentence(ended, 125);
        contains(&line, "Too many open files (os error 24); ");
        contains(&line, ": ulimit -n 4096");
        refusals += 1;
    }
    assert!((5..50).contains(&refusals), "refused {refusals} times");
}

#[test]
fn running_out_of_memory_is_one_sentence() {
    let kernel = Kernel::new(&elf(crate::guests::power_off()));
    let mut command = kernel.command(&["--memory", "1G"]);
    limit(&mut command, libc::RLIMIT_AS, 512 << 20);
    let line = one_sentence(Running::start(command).end(), 125);
    contains(&line, "cannot reserve 1G of guest memory (an address space limit, see ulimit -v");
    contains(&line, "Cannot allocate memory");
}

#[test]
fn closed_and_full_standard_streams_change_no_outcome() {
    let kernel = Kernel::new(&writes(&[&text("some text\n")[..], &[POWER_OFF]].concat()));
    for fd in 0..3 {
        let mut command = kernel.command(&[]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        // SAFETY: close may be called between fork and exec.
        unsafe {
            command.pre_exec(move || {
                libc::close(fd);
                Ok(())
            });
        }
        let ended = Running::spawn(command).end().expect(0);
        assert_eq!(ended.stdout, if fd == 1 { &b""[..] } else { b"some text\n" }, "without {fd}");
    }
    let full = || File::options().write(true).open("/dev/full").unwrap();
    let mut command = kernel.command(&["--boot-timing"]);
    command.stdout(full()).stderr(Stdio::piped());
    Running::spawn(command).end().expect(0).says("stdout: cannot write console output (No space left");
    let mut command = kernel.command(&["--boot-timing", "--log-level", "debug"]);
    command.stdout(Stdio::piped()).stderr(full());
    assert_eq!(Running::spawn(command).end().expect(0).stdout, b"some text\n");
    let mut command = kernel.command(&["--serial", "pty"]);
    command.stderr(full());
    Running::spawn(command).end().expect(0);
}

#[test]
fn no_time_at_all_is_a_time_limit() {
    let kernel = Kernel::new(&elf(crate::guests::say_and_spin()));
    Running::start(kernel.command(&["--timeout", "0s"])).end().expect(124).says("time limit of 0s");
}

/// While vireo waits for a device's daemon that does not answer, no guest has started that could be stopped.
#[test]
fn signals_and_the_time_limit_end_vireo_before_the_guest_starts() {
    let (_folder, path) = folder();
    let (socket, report) = (path.join("silent"), path.join("report.json"));
    let listener = UnixListener::bind(&socket).unwrap();
    let kernel = Kernel::new(&elf(crate::guests::say_and_spin()));
    let device = format!("socket={},type=blk", socket.display());
    let start = |more: &[&str]| {
        let flags = ["--vhost-user", &device, "--report", report.to_str().unwrap()];
        Running::start(kernel.command(&[&flags, more].concat()))
    };
    let outcome =
        || serde_json::from_slice::<serde_json::Value>(&fs::read(&report).unwrap()).unwrap()["outcome"].clone();
    start(&["--timeout", "500ms"]).end().expect(124).says("the guest had not started after the time limit of 500ms");
    assert_eq!(outcome(), "timed-out");
    drop(listener.accept().unwrap());
    for (signal, code, name) in [(libc::SIGTERM, 143, "SIGTERM"), (libc::SIGINT, 130, "SIGINT")] {
        let running = start(&[]);
        let _connected = listener.accept().unwrap();
        running.signal(signal);
        running.end().expect(code).says(&format!("({name}), before the guest had started"));
        assert_eq!(outcome(), "killed");
    }
}

#[test]
fn a_cache_that_cannot_be_used_costs_no_boot() {
    let (_folder, path) = folder();
    let kernel = Kernel::new(&writes(&[&text("booted\n")[..], &[POWER_OFF]].concat()));
    let start = |cache: &Path| {
        let mut command = kernel.command(&[]);
        command.env("XDG_CACHE_HOME", cache);
        Running::start(command)
    };
    fs::write(path.join("file"), "").unwrap();
    fs::create_dir(path.join("closed")).unwrap();
    fs::set_permissions(path.join("closed"), PermissionsExt::from_mode(0o500)).unwrap();
    for cache in
        ["/dev/null".as_ref(), path.join("file").as_path(), &path.join("closed"), "/proc".as_ref(), "".as_ref()]
    {
        assert_eq!(start(cache).end().expect(0).stdout, b"booted\n", "{cache:?}");
    }
    // Several start simultaneously with a cold cache.
    let running: Vec<Running> = (0..4).map(|_| start(&path.join("cold"))).collect();
    for one in running {
        assert_eq!(one.end().expect(0).stdout, b"booted\n");
    }
}

// The terminal.

/// A terminal: vireo uses one side, the test the other.
struct Terminal {
    master: OwnedFd,
    slave: OwnedFd,
    screen: Collected,
}

impl Terminal {
    fn new() -> Terminal {
        let (master, slave) = crate::common::terminal();
        let screen = Collected::from(File::from(master.try_clone().unwrap()));
        Terminal { master, slave, screen }
    }

    /// Starts `command` with this as its controlling terminal.
    fn run(&self, mut command: Command) -> Running {
        let stream = || Stdio::from(self.slave.try_clone().unwrap());
        command.stdin(stream()).stdout(stream()).stderr(stream());
        // SAFETY: both may be called between fork and exec, where the child's standard input is the terminal.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                libc::ioctl(0, libc::TIOCSCTTY, 0);
                Ok(())
            });
        }
        Running::spawn(command)
    }

    fn type_in(&self, text: &str) {
        let master = File::from(self.master.try_clone().unwrap());
        (&master).write_all(text.as_bytes()).unwrap();
    }

    /// Returns the input, output, control and local modes.
    fn modes(&self) -> [u32; 4] {
        // SAFETY: termios is plain numbers and is written by tcgetattr.
        let modes = unsafe {
            let mut modes: libc::termios = std::mem::zeroed();
            assert_eq!(libc::tcgetattr(self.slave.as_raw_fd(), &mut modes), 0);
            modes
        };
        [modes.c_iflag, modes.c_oflag, modes.c_cflag, modes.c_lflag]
    }

    fn is_raw(&self) -> bool {
        self.modes()[3] & (libc::ICANON | libc::ECHO | libc::ISIG) == 0
    }

    /// Waits until the terminal is raw or, if `raw` is false, no longer is.
    #[track_caller]
    fn wait_raw(&self, raw: bool) {
        let limit = Instant::now() + DEADLINE;
        while self.is_raw() != raw {
            assert!(Instant::now() < limit, "the terminal {} raw", if raw { "does not become" } else { "stays" });
            thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Name of a way to end an interactive guest, the action, and the exit code or the signal that follows.
type Way = (&'static str, fn(&Terminal, &Running), Result<i32, i32>);

#[test]
fn the_terminal_is_raw_while_the_guest_runs_and_itself_again_on_every_way_out() {
    let ways: [Way; 6] = [
        ("the guest's own end", |terminal, _| terminal.type_in("q"), Ok(0)),
        ("Ctrl-A X", |terminal, _| terminal.type_in("\x01x"), Ok(0)),
        ("SIGTERM", |_, running| running.signal(libc::SIGTERM), Ok(143)),
        ("SIGHUP", |_, running| running.signal(libc::SIGHUP), Ok(129)),
        ("SIGSEGV", |_, running| running.signal(libc::SIGSEGV), Err(libc::SIGSEGV)),
        ("SIGABRT", |_, running| running.signal(libc::SIGABRT), Err(libc::SIGABRT)),
    ];
    for (name, way, end) in ways {
        let terminal = Terminal::new();
        let before = terminal.modes();
        assert!(!terminal.is_raw());
        let kernel = Kernel::new(&elf(crate::guests::echo()));
        let mut running = terminal.run(kernel.command(&["--grace", "0s"]));
        terminal.screen.wait_for("ready\r\n");
        assert!(terminal.is_raw(), "{name}");
        way(&terminal, &running);
        let status = running.wait();
        assert_eq!(status.code().ok_or(status.signal().unwrap_or(0)), end, "{name}");
        assert_eq!(terminal.modes(), before, "{name}");
    }
}

#[test]
fn control_a_is_for_vireo_and_twice_for_the_guest() {
    let terminal = Terminal::new();
    let kernel = Kernel::new(&elf(crate::guests::echo()));
    let mut running = terminal.run(kernel.command(&[]));
    terminal.screen.wait_for("ready\r\n");
    // Ctrl-C goes to the guest, which sends it back plus one, as Ctrl-D.
    terminal.type_in("\x03");
    terminal.screen.wait_for("\x04");
    terminal.type_in("\x01h");
    terminal.screen.wait_for("Ctrl-A X  end the VM\r\n");
    terminal.type_in("\x01\x01");
    terminal.screen.wait_for("\x02");
    terminal.type_in("\x01X");
    assert_eq!(running.wait().code(), Some(0));
    terminal.screen.wait_for("ended from the terminal by Ctrl-A X");
}

/// Command for a script that finds `vireo run` of `kernel` in `"$@"`, in a shell that gives each job its own process
/// group.
fn in_shell(script: &str, kernel: &Kernel) -> Command {
    let command = kernel.command(&["--grace", "0s"]);
    let mut shell = Command::new("bash");
    hears_signals(&mut shell);
    shell.args(["--norc", "-c", &format!("set -m; {script}"), "bash"]);
    shell.arg(command.get_program()).args(command.get_args());
    shell
}

/// Makes the echoing guest, back in the foreground, answer and end.
fn talk_and_quit(terminal: &Terminal, shell: &mut Running) {
    terminal.wait_raw(true);
    terminal.type_in("\x05q");
    terminal.screen.wait_for("\x06");
    terminal.screen.wait_for("code 0");
    shell.wait();
}

#[test]
fn a_stopped_vireo_lends_the_terminal_to_the_shell() {
    let terminal = Terminal::new();
    let before = terminal.modes();
    let kernel = Kernel::new(&elf(crate::guests::echo()));
    let mut running =
        terminal.run(in_shell("\"$@\"; echo stopped $?; read word; echo got $word; fg; echo code $?", &kernel));
    terminal.screen.wait_for("ready\r\n");
    assert!(terminal.is_raw());
    let children = format!("/proc/{0}/task/{0}/children", running.child.id());
    let vireo: i32 = fs::read_to_string(children).unwrap().trim().parse().unwrap();
    // SAFETY: the process is a child of our child, which waits for it.
    assert_eq!(unsafe { libc::kill(vireo, libc::SIGTSTP) }, 0);
    terminal.screen.wait_for("stopped 147");
    assert_eq!(terminal.modes(), before);
    terminal.type_in("hello\n");
    terminal.screen.wait_for("got hello");
    talk_and_quit(&terminal, &mut running);
    assert_eq!(terminal.modes(), before);
}

#[test]
fn a_background_job_is_not_stopped_and_leaves_the_shell_its_input() {
    let terminal = Terminal::new();
    let before = terminal.modes();
    let kernel = Kernel::new(&elf(crate::guests::echo()));
    let mut running = terminal.run(in_shell("\"$@\" & read word; echo got $word; jobs -r; fg; echo code $?", &kernel));
    terminal.screen.wait_for("ready\r\n");
    assert_eq!(terminal.modes(), before, "another job has the terminal");
    terminal.type_in("hello\n");
    terminal.screen.wait_for("got hello");
    terminal.screen.wait_for("Running");
    talk_and_quit(&terminal, &mut running);
    assert_eq!(terminal.modes(), before);
}

#[test]
fn a_pseudo_terminal_console_can_be_opened_and_does_not_hold_up_vireo() {
    let kernel = Kernel::new(&elf(crate::guests::echo()));
    let running = Running::start(kernel.command(&["--serial", "pty", "--grace", "0s"]));
    running.stderr.wait_for("\n");
    let line = String::from_utf8(running.stderr.wait("a line", |_| true)).unwrap();
    let path = line.trim_end().strip_prefix("vireo: the serial console is on ").unwrap();
    // Not as a controlling terminal, because its end would then also end the test.
    let open = || File::options().read(true).write(true).custom_flags(libc::O_NOCTTY).open(path).unwrap();
    let mut console = open();
    // The terminal is open, but nothing was typed yet: vireo still handles signals, and later input arrives.
    thread::sleep(Duration::from_millis(100));
    console.write_all(b"1").unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"2") {
        let mut byte = [0];
        console.read_exact(&mut byte).unwrap();
        answer.extend(byte);
    }
    drop(console);
    let _console = open();
    thread::sleep(Duration::from_millis(100));
    running.signal(libc::SIGTERM);
    running.end().expect(143);
}
