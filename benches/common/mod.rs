//! Shared code of the benchmarks: scripts that run in an emulated host and print facts, and tables of them.

#![allow(dead_code)] // each benchmark uses its part

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

pub const REPO: &str = env!("CARGO_MANIFEST_DIR");

/// Shell: fills the folder `$dir`, in memory, with QEMU, vireo (`$1`; also as the process that stores a kernel in the
/// cache) and the programs that measure them. Defines `inside`, which runs a program in there, in `$dir/work`. In a
/// host that counts instructions, the clock leaps while it waits for a file of the machine outside, and QEMU opens a
/// hundred libraries; so everything, including the shell, is copied to memory first.
pub const STAGE: &str = r#"
dir=$(mktemp -d /tmp/bench.XXXXXX) || exit
trap 'cd /; umount -l "$dir"/dev "$dir"/proc "$dir"/sys "$dir"/disks; rm -rf "$dir"' EXIT
mkdir -p "$dir"/bin "$dir"/dev "$dir"/proc "$dir"/sys "$dir"/tmp "$dir"/usr/share "$dir"/work "$dir"/disks
cp "$(command -v busybox)" "$dir/bin/busybox"
for applet in sh grep tail awk cat dd mkfifo rm seq kill ls sleep; do ln -s busybox "$dir/bin/$applet"; done
cp -L "$(command -v date)" "$dir/bin" # busybox's, which its shell prefers to one without a path, has no nanoseconds
stage() { mkdir -p "$dir${1%/*}" && cp -L "$1" "$dir$1"; } # QEMU looks for its firmware relative to its own path
stage_with_libraries() {
    program=$(command -v $1)
    stage "$program"
    ldd "$program" | grep -o '/[^ ]*' | while read -r library; do stage "$library"; done
}
qemu=$(command -v qemu-system-x86_64)
tree=${qemu%/*/*}/qemu
if [ -d "$tree" ]; then # what setup unpacked, with its own libraries, beside the program that starts it
    for part in qemu-system-x86_64 usr/bin/qemu-system-x86_64 usr/lib usr/share/qemu usr/share/seabios; do
        mkdir -p "$dir/opt/qemu/$part" && rmdir "$dir/opt/qemu/$part" && cp -a "$tree/$part" "$dir/opt/qemu/$part"
    done
    mkdir "$dir/opt/bin" && cp "$qemu" "$dir/opt/bin" && ln -s ../opt/bin/qemu-system-x86_64 "$dir/bin"
else
    stage_with_libraries qemu-system-x86_64
    cp -rL /usr/share/qemu /usr/share/seabios "$dir/usr/share"
fi
stage_with_libraries qemu-img
[ -z "$1" ] || { cp "$1" "$dir/bin/vireo"; ln -s vireo "$dir/bin/vireo-keep"; }
for mount in dev proc; do mount --bind /$mount "$dir/$mount"; done
mount --rbind /sys "$dir/sys"
mount -t debugfs debugfs "$dir/sys/kernel/debug" 2>/dev/null
mount --bind /run/scratch "$dir/disks"
inside() { chroot "$dir" sh -c 'cd work && PATH=/bin:/usr/bin:/usr/local/bin exec "$@"' sh "$@"; }
"#;

/// Facts that a script printed: every number, by fact, monitor and case.
pub type Facts = BTreeMap<(String, String, String), Vec<f64>>;

/// Path of the release binary, or `VIREO_BIN`.
pub fn vireo() -> PathBuf {
    std::env::var_os("VIREO_BIN")
        .map_or_else(|| Path::new(REPO).join("target/x86_64-unknown-linux-gnu/release/vireo"), PathBuf::from)
}

/// Returns `main`'s exit code; reports an error.
pub fn exit(name: &str, result: Result<(), String>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{name}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Runs a script in an emulated host and collects its facts, with a `wall` beside `instructions`.
pub fn in_host(options: &[&str], script: &str, args: &[&str], facts: &mut Facts) -> Result<(), String> {
    let mut child = run(options)
        .args(["sh", "-c", script, "sh"])
        .args(args)
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("tests/host/run: {error}"))?;
    let mut begin = Instant::now();
    let output = child.stdout.take().ok_or("tests/host/run has no output")?;
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || BufReader::new(output).lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
    loop {
        let line = match lines.recv_timeout(STUCK) {
            Ok(line) => line,
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                let _ = run(options).args(["sh", "-c", KILL]).status();
                continue;
            }
        };
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["begin"] => begin = Instant::now(),
            [fact, monitor, case, number] if number.parse::<f64>().is_ok() => {
                let mut note = |fact: &str, value| {
                    let key = (fact.to_owned(), monitor.to_owned(), case.to_owned());
                    facts.entry(key).or_default().push(value);
                };
                note(fact, number.parse().unwrap_or(f64::NAN));
                if fact == "instructions" {
                    note("wall", begin.elapsed().as_secs_f64());
                }
                eprintln!("{line}");
            }
            _ => eprintln!("{line}"),
        }
    }
    match child.wait() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("the benchmark in the emulated host ended early: {status}")),
        Err(error) => Err(format!("tests/host/run: {error}")),
    }
}

/// Longest wait for a line; nothing that is measured takes so long. Once in some 50,000 interrupts, the emulated SVM of a
/// host that counts instructions interrupts a guest that has interrupts disabled, whatever the monitor. The guest then
/// waits for itself for ever, in a loop that hardly advances that host's clock. So stuck guests are detected from outside.
const STUCK: Duration = Duration::from_secs(120);
/// Kills the guest; the script then sees that no more output comes.
const KILL: &str = "pids=$(pidof vireo qemu-system-x86_64) && kill -9 $pids";

fn run(options: &[&str]) -> Command {
    let mut command = Command::new(Path::new(REPO).join("tests/host/run"));
    command.args(options).arg("--").stdin(Stdio::null());
    command
}

pub fn best(facts: &Facts, fact: &str, monitor: &str, case: &str) -> Option<f64> {
    let values = facts.get(&(fact.to_owned(), monitor.to_owned(), case.to_owned()))?;
    let counted = if values.len() > 1 { &values[1..] } else { values };
    counted.iter().copied().reduce(f64::min)
}

pub fn text(value: Option<f64>, digits: usize) -> String {
    value.map_or("-".to_owned(), |value| format!("{value:.digits$}"))
}

pub fn target(what: &str, value: Option<f64>, limit: f64, digits: usize) {
    let verdict = if value.is_some_and(|value| value <= limit) { "met" } else { "missed" };
    println!("{what:<58}{:>9}{:>9}  {verdict}", text(value, digits), text(Some(limit), digits.min(2)));
}
