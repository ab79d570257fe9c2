//! The console: no byte is lost or invented, whatever is at its other end, and the terminal is restored afterwards.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::common::{Ended, Run, example, on_host, on_terminal, scratch};

fn cloud(script: &str) -> Run {
    Run::new("bzImage-cloud", script).cmdline("console=ttyS0 quiet vireo.modules=none")
}

/// Script that makes the guest print `$LINES` lines of known text, unchanged by its terminal driver.
const PRINT: &str = "stty -opost\necho BEGIN; seq 1000000 $((1000000 + $LINES - 1)); echo END";

/// Returns this many lines of eight bytes.
fn printed(lines: usize) -> Vec<u8> {
    let numbers = (1_000_000..).take(lines);
    numbers
        .fold(String::new(), |mut text, number| {
            let _ = writeln!(text, "{number}");
            text
        })
        .into_bytes()
}

fn check_printed(bytes: &[u8], lines: usize) {
    let text = String::from_utf8_lossy(bytes);
    let (_, text) = text.split_once("BEGIN\n").expect("no BEGIN");
    let (text, _) = text.split_once("END\n").expect("no END");
    let expected = printed(lines);
    let same = text.bytes().zip(&expected).take_while(|(a, b)| a == *b).count();
    assert!(
        text.as_bytes() == expected,
        "expected {} bytes, got {}, of which the first {same} are right",
        expected.len(),
        text.len()
    );
}

/// A reader that does not read makes the guest wait, and nothing is lost.
#[test]
fn a_stalled_reader_holds_the_guest_up_and_loses_nothing() {
    let lines = (96 << 10) / 8;
    // The guest writes its progress to a disk.
    let script = format!(
        "modprobe -a virtio_mmio virtio_blk; {}\n",
        "stty -opost\necho BEGIN
for n in $(seq 0 23); do
    echo $n | dd of=/dev/vda conv=fsync 2>/dev/null
    seq $((1000000 + n * 512)) $((1000000 + n * 512 + 511))
done
echo 24 | dd of=/dev/vda conv=fsync 2>/dev/null
echo END"
    );
    let go = scratch();
    let go = go.path().join("go");
    let reader = format!("set -o pipefail; \"$@\" </dev/null | \"$0\" --when '{}'", go.display());
    let run = cloud(&script).through_with(&reader, &example("talk"));
    let disk = run.path("disk");
    fs::write(&disk, [b'\n'; 4096]).unwrap();
    let guest = run.args(&["--disk", &disk]).start();

    let progress = || {
        let bytes = fs::read(&disk).unwrap();
        String::from_utf8_lossy(&bytes).lines().next().unwrap_or_default().parse::<u32>().ok()
    };
    let deadline = Instant::now() + Duration::from_secs(120);
    let (mut last, mut since) = (None, Instant::now());
    // Three seconds without progress mean that the guest waits. If it were merely slow, the test would prove less, but
    // not fail.
    while last.is_none() || since.elapsed() < Duration::from_secs(3) {
        assert!(Instant::now() < deadline, "the guest neither waits nor ends: it is at {last:?}");
        std::thread::sleep(Duration::from_millis(100));
        let now = progress();
        if now != last {
            (last, since) = (now, Instant::now());
        }
    }
    assert!(last < Some(24), "96 KiB were taken without a reader: some buffer is unbounded; {}", guest.tails());
    fs::write(&go, "").unwrap();
    guest.wait_for("END");
    assert_eq!(progress(), Some(24));
    check_printed(&guest.end().success().bytes, lines);
}

/// Script that makes the guest report the number and checksum of its input's bytes, without any terminal processing.
fn takes(bytes: usize) -> String {
    format!(
        "stty raw -echo\necho ready\nhead -c {bytes} >/in\nstty sane\necho \"sum: $(wc -c </in) $(md5sum </in | cut -d ' ' -f 1)\""
    )
}

fn check_taken(ended: &Ended, input: &[u8]) {
    let dir = scratch();
    let file = dir.path().join("in");
    fs::write(&file, input).unwrap();
    let sum = Command::new("md5sum").stdin(File::open(file).unwrap()).output().unwrap().stdout;
    let sum = String::from_utf8(sum).unwrap();
    let expected = format!("{} {}", input.len(), sum.split_whitespace().next().unwrap());
    assert_eq!(ended.fact("sum"), expected, "{ended}");
}

#[test]
fn a_flood_of_input_arrives_whole() {
    // Every byte value, in an order that reveals a loss. Linux buffers at most 64 KiB that the reader has not taken
    // yet, and a line without flow control cannot make the sender wait.
    let input: Vec<u8> = (0..32u32 << 10).map(|i| (i % 251) as u8 ^ (i >> 8) as u8).collect();
    let mut guest = cloud(&takes(input.len())).start();
    guest.wait_for("ready");
    guest.send(&input);
    guest.close_input();
    check_taken(&guest.end().success(), &input);
}

#[test]
fn input_from_a_file_and_none_at_all() {
    for redirect in ["</dev/null", "<&-"] {
        let ended = cloud("echo alive").through(&format!("exec \"$@\" {redirect}")).run_to_end().success();
        assert!(ended.stdout.contains("alive"), "{ended}");
    }
    // As on a real line, input that arrives before the guest listens is lost: the driver's probe clears the FIFO.
    let script = "stty -echo\nwhile read line && [ \"$line\" != start ]; do :; done\n\
                  head -n 512 >/in\necho; echo \"sum: $(wc -c </in) $(md5sum </in | cut -d ' ' -f 1)\"";
    let run = cloud(script);
    let input = printed(512);
    fs::write(run.path("input"), ["\n".repeat(200).as_bytes(), b"start\n", &input].concat()).unwrap();
    let redirect = format!("exec \"$@\" <'{}'", run.path("input"));
    check_taken(&run.through(&redirect).run_to_end().success(), &input);
}

#[test]
fn a_reader_that_leaves_is_told_of_once_and_the_guest_goes_on() {
    let script = format!("{}\nsync", PRINT.replace("$LINES", "2000"));
    let ended = cloud(&script).through("set -o pipefail; \"$@\" | head -n 1").run_to_end().expect(0, "powered-off");
    assert_eq!(ended.stderr.matches("cannot write console output").count(), 1, "{ended}");
}

#[test]
fn to_a_file() {
    let run = cloud(&PRINT.replace("$LINES", "2048"));
    let file = run.path("console");
    let guest = run.args(&["--serial", &format!("file:{file}")]).start();
    let dir = guest.dir.path().join("console");
    // The guest's folder is removed with the guest.
    let kept = scratch();
    let copy = kept.path().join("console");
    fs::hard_link(wait_for_file(&dir), &copy).unwrap();
    let ended = guest.end().expect(0, "powered-off");
    assert!(ended.bytes.is_empty(), "{ended}");
    check_printed(&fs::read(copy).unwrap(), 2048);
}

fn wait_for_file(path: &Path) -> &Path {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !path.exists() {
        assert!(Instant::now() < deadline, "{} did not appear", path.display());
        std::thread::sleep(Duration::from_millis(20));
    }
    path
}

/// Talks to the guest's console as a user would who connects to it.
fn converse(path: &str) {
    let mut talk = on_host(&[&example("talk"), path]);
    talk.wait_for("talking");
    talk.send(b"\n");
    talk.wait_for("# ");
    talk.send(b"echo hello $((6 * 7))\n");
    talk.wait_for("hello 42");
    talk.send(b"exit\n");
    talk.close_input();
    assert!(talk.end().stdout.contains("ended with status 0"), "the conversation broke off");
}

#[test]
fn on_a_socket() {
    let path = format!("/tmp/vireo-test-{}.socket", std::process::id());
    let guest = cloud("sh -i").args(&["--serial", &format!("socket:{path}"), "--log-level", "info"]).start();
    guest.wait_for_stderr("booting");
    converse(&path);
    guest.end().expect(0, "powered-off");
    let gone = on_host(&["test", "-e", &path]).end();
    assert_eq!(gone.code(), 1, "the socket's file is still there");
}

#[test]
fn on_a_pseudo_terminal() {
    let guest = cloud("sh -i").args(&["--serial", "pty"]).start();
    let said = guest.wait_for_stderr("\n");
    let path = said.lines().find_map(|line| line.split("console is on ").nth(1)).expect("no terminal name").to_string();
    converse(&path);
    guest.end().expect(0, "powered-off");
}

/// Script that prints the terminal's settings before and after vireo, and survives a signal that is sent to both.
const SETTINGS: &str =
    "trap : TERM; echo \"before: $(stty -g)\"; \"$@\"; echo \"code: $?\"; echo \"after: $(stty -g)\"";

fn check_settings(ended: &Ended, code: &str) {
    // Only in an emulated host do vireo's last messages on stderr go to the terminal.
    assert_eq!(ended.fact("code"), code, "{ended}");
    assert_eq!(ended.fact("before"), ended.fact("after"), "{ended}");
}

#[test]
fn on_a_terminal_with_escapes() {
    let run = cloud("sh -i").through(SETTINGS);
    let mut guest = run.start_on_terminal(on_terminal);
    guest.wait_for("# ");
    guest.send(b"echo hello $((6 * 7))\r");
    guest.wait_for("hello 42");
    guest.send(b"\x01h");
    guest.wait_for_either("end the VM");
    guest.send(b"\x01x");
    check_settings(&guest.end(), "0");
}

#[test]
fn on_a_terminal_until_sigterm() {
    let run = cloud("echo ready; sleep 1000").through(SETTINGS).args(&["--grace", "0s"]);
    let guest = run.start_on_terminal(on_terminal);
    guest.wait_for("ready");
    guest.signal(libc::SIGTERM);
    check_settings(&guest.end(), "143");
}
