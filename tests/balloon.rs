//! The memory balloon as a stock driver uses it, and what the host has of it.

mod common;

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use common::{Guest, Run, example, on_host};
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// Memory of a process in the test's host, in bytes.
fn resident(pid: &str) -> u64 {
    let rollup = on_host(&["grep", "^Rss:", &format!("/proc/{pid}/smaps_rollup")]).end();
    let kib = rollup.stdout.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok());
    kib.unwrap_or_else(|| panic!("{rollup}")) << 10
}

/// Waits until `look` finds what is `wanted`; returns it.
fn until<T: std::fmt::Debug>(what: &str, mut look: impl FnMut() -> T, wanted: impl Fn(&T) -> bool) -> T {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let found = look();
        if wanted(&found) {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: {found:?}");
        thread::sleep(Duration::from_millis(300));
    }
}

/// What the guest gives up it lacks, and the host has; and what it frees the host gets back, too.
#[test]
fn memory_that_the_guest_does_not_need_is_the_hosts() {
    let script = r#"
total() { sed -n 's/^MemTotal: *\([0-9]*\) kB/\1/p' /proc/meminfo; }
before=$(total)
echo "before: $before"
modprobe virtio_balloon
for n in $(seq 300); do [ $(total) -gt $((before - 204800)) ] || break; sleep 0.1; done
echo "after: $(total)"
mount -t tmpfs -o size=200m none /mnt
echo ballooned
read go
dd if=/dev/zero of=/mnt/file bs=1M count=150 2>/dev/null
echo filled
read go
rm /mnt/file
read go
dd if=/dev/zero of=/mnt/file bs=1M count=100 2>/dev/null
echo "sum: $(md5sum </mnt/file)"
"#;
    let balloon = "200M,free_page_reporting,stats=1s";
    let run = Run::new("bzImage-cloud", script).args(&["--memory", "512M", "--balloon", balloon]);
    let mut guest = run.through("echo pid=$$. >&2; exec \"$@\"").start();
    let said = guest.wait_for_stderr(".\n");
    let pid = said.split("pid=").nth(1).unwrap().split('.').next().unwrap().to_string();
    guest.wait_for("ballooned");
    let idle = until("free memory is reported", || resident(&pid), |rss| *rss < 180 * MIB);
    guest.send(b"\n");
    guest.wait_for("filled");
    let full = resident(&pid);
    assert!(full > idle + 120 * MIB, "{idle} {full}");
    guest.send(b"\n");
    let freed = until("what was freed is reported", || resident(&pid), |rss| *rss < full - 120 * MIB);
    eprintln!("resident: {} MiB, {} MiB with the file, {} MiB without", idle / MIB, full / MIB, freed / MIB);
    guest.send(b"\n");
    let ended = guest.end().success();
    let fact = |name| ended.fact(name).parse::<u64>().unwrap();
    assert_eq!(fact("before") - fact("after"), 200 << 10, "{ended}");
    // md5 of 100 MiB of zeros.
    assert_eq!(ended.fact("sum"), "2f282b84e7e608d5852449ed940bfc51  -", "{ended}");
}

/// A balloon changes its size while the guest runs, and tells what it knows; a disk grows.
#[test]
fn a_balloon_is_resized_while_the_guest_runs() {
    let script = "
modprobe virtio_balloon
(until [ \"$(cat /sys/block/vda/size)\" = 16384 ]; do sleep 0.2; done; echo the disk has grown) &
while [ ! -e /tmp/stop ]; do sleep 0.2; done";
    let dir = common::scratch();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (config, console) = (path("config.json"), path("console"));
    let disk = path("disk");
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let printed = Run::new("bzImage-cloud", script)
        .args(&["--memory", "256M", "--balloon", "stats=500ms", "--serial", &format!("file:{console}")])
        .args(&["--disk", &disk, "--print-config"])
        .start();
    // Its initrd is in its folder, which must stay.
    fs::copy(printed.dir.path().join("initrd"), path("initrd")).unwrap();
    let printed = printed.end();
    let mut machine: Value = serde_json::from_str(&printed.stdout).unwrap_or_else(|_| panic!("{printed}"));
    machine["boot"]["initrd"] = path("initrd").into();
    fs::write(&config, machine.to_string()).unwrap();

    let mut live = on_host(&[&example("live"), &config]);
    let mut asked = 0;
    let mut ask = |live: &mut Guest, request: &str| -> String {
        live.send(format!("{request}\n").as_bytes());
        asked += 1;
        let lines = |text: &str| text.lines().count();
        let said = live.wait_until(|said| lines(said) >= asked && said.ends_with('\n'));
        said.lines().nth(asked - 1).unwrap().to_string()
    };
    let stats = |live: &mut Guest, ask: &mut dyn FnMut(&mut Guest, &str) -> String| -> Value {
        let answer = ask(live, "stats");
        serde_json::from_str(answer.strip_prefix("stats: ").unwrap_or_else(|| panic!("{answer}"))).unwrap()
    };
    let free = |stats: &Value| stats["guest"]["free_memory"].as_u64().unwrap_or(0);
    let before = until("statistics", || stats(&mut live, &mut ask), |s| free(s) > 100 * MIB);
    assert_eq!((before["target"].as_u64(), before["actual"].as_u64()), (Some(0), Some(0)));
    assert_eq!(ask(&mut live, "grow disk0 8M"), "grown: disk0 to 8M");
    let grown = |console: &Vec<u8>| String::from_utf8_lossy(console).contains("the disk has grown");
    until("the disk's new size", || fs::read(&console).unwrap_or_default(), grown);
    assert!(ask(&mut live, "grow disk0 1M").contains("cannot be resized"));
    for size in [100, 40, 120] {
        assert_eq!(ask(&mut live, &format!("balloon {size}M")), format!("balloon: {size}M"));
        let reached = |s: &Value| s["actual"] == s["target"] && s["age_ms"].as_u64() < Some(600);
        let at_size = until(
            "the size",
            || stats(&mut live, &mut ask),
            |s| reached(s) && free(s).abs_diff(free(&before) - size * MIB) < 8 * MIB,
        );
        assert_eq!(at_size["actual"], size * MIB);
        assert_eq!(ask(&mut live, "pause"), "paused: true");
        assert_eq!(ask(&mut live, "resume"), "resumed: true");
    }
    assert_eq!(ask(&mut live, "balloon 300M"), "refused: a balloon of 300M: the guest has only 256M of memory");
}
