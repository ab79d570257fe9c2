//! The memory balloon under a stock driver, and its effect on the host's memory.

use std::fs;

use crate::common::{Live, Run, resident, until};
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// Memory in the balloon is missing in the guest and returned to the host; memory that the guest frees is returned,
/// too.
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

/// A balloon changes its size and reports statistics while the guest runs; a disk grows.
#[test]
fn a_balloon_is_resized_while_the_guest_runs() {
    let script = "
modprobe virtio_balloon
(until [ \"$(cat /sys/block/vda/size)\" = 16384 ]; do sleep 0.2; done; echo the disk has grown) &
while [ ! -e /tmp/stop ]; do sleep 0.2; done";
    let dir = crate::common::scratch();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (console, disk) = (path("console"), path("disk"));
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let run = Run::new("bzImage-cloud", script)
        .args(&[
            "--memory",
            "256M",
            "--balloon",
            "stats=500ms,free_page_hinting",
            "--serial",
            &format!("file:{console}"),
        ])
        .args(&["--disk", &disk]);
    let mut live = Live::start(run);
    let stats = |live: &mut Live| -> Value {
        let answer = live.ask("stats");
        serde_json::from_str(answer.strip_prefix("stats: ").unwrap_or_else(|| panic!("{answer}"))).unwrap()
    };
    let free = |stats: &Value| stats["guest"]["free_memory"].as_u64().unwrap_or(0);
    let before = until("statistics", || stats(&mut live), |s| free(s) > 100 * MIB);
    assert_eq!((before["target"].as_u64(), before["actual"].as_u64()), (Some(0), Some(0)));
    assert_eq!(live.ask("grow disk0 8M"), "grown: disk0 to 8M");
    let grown = |console: &Vec<u8>| String::from_utf8_lossy(console).contains("the disk has grown");
    until("the disk's new size", || fs::read(&console).unwrap_or_default(), grown);
    assert!(live.ask("grow disk0 1M").contains("cannot be resized"));
    // The guest sets aside the pages that it reports as free, and takes them back.
    assert_eq!(live.ask("hints start"), "hints: started");
    let hints = until("hints", || live.ask("hints"), |hints| hints.ends_with("complete: true"));
    let bytes: u64 = hints.split(' ').nth(1).unwrap().parse().unwrap();
    assert!((free(&before) / 2..=free(&before) + 8 * MIB).contains(&bytes), "{hints} {before}");
    until("less memory", || stats(&mut live), |s| free(s) + bytes / 2 < free(&before));
    assert_eq!(live.ask("hints end"), "hints: ended");
    until("memory again", || stats(&mut live), |s| free(s).abs_diff(free(&before)) < 8 * MIB);
    for size in [100, 40, 120] {
        assert_eq!(live.ask(&format!("balloon {size}M")), format!("balloon: {size}M"));
        let reached = |s: &Value| s["actual"] == s["target"] && s["age_ms"].as_u64() < Some(600);
        let at_size = until(
            "the size",
            || stats(&mut live),
            |s| reached(s) && free(s).abs_diff(free(&before) - size * MIB) < 8 * MIB,
        );
        assert_eq!(at_size["actual"], size * MIB);
        assert_eq!(live.ask("pause"), "paused: true");
        assert_eq!(live.ask("resume"), "resumed: true");
    }
    assert_eq!(live.ask("balloon 300M"), "refused: a balloon of 300M: the guest has only 256M of memory");
}
