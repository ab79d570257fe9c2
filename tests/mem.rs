//! Memory that is added and removed while a stock guest runs, and its effect on the host's memory.

use std::fs;
use std::process::Command;

use crate::common::{Live, Run, resident, scratch, until};
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// The guest gets the requested memory, uses it (a disk reads into it) and gives it back; after that its driver starts
/// again with nothing.
#[test]
fn memory_is_added_and_removed() {
    let script = r#"
total() { sed -n 's/^MemTotal: *\([0-9]*\) kB/\1/p' /proc/meminfo; }
base=$(total)
has() { for n in $(seq 900); do [ $(total) = $((base + $1 * 1024)) ] && echo "has: $1" && return; sleep 0.1; done; total; }
modprobe -a virtio_mem virtio_balloon
has 128
has 512
mount -t tmpfs -o size=600m none /mnt
dd if=/dev/zero of=/mnt/zeros bs=1M count=350 2>/dev/null
cat /dev/vda >/mnt/disk
echo "sum: $(md5sum </mnt/disk)"
rm /mnt/disk /mnt/zeros
echo 3 >/proc/sys/vm/drop_caches
has 0
rmmod virtio_mem
modprobe virtio_mem
has 256
# a balloon takes some of it
has 156
has 256
"#;
    let dir = scratch();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (console, disk) = (path("console"), path("disk"));
    let content: Vec<u8> = (0..32 * MIB as u32 / 4).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    fs::write(&disk, content).unwrap();
    let sum = Command::new("md5sum").stdin(fs::File::open(&disk).unwrap()).output().unwrap().stdout;
    let sum = String::from_utf8(sum).unwrap();
    let run = Run::new("bzImage-cloud", script)
        .cmdline("console=ttyS0 quiet memhp_default_state=online_movable")
        .args(&["--memory", "256M", "--virtio-mem", "1G,requested=128M", "--serial", &format!("file:{console}")])
        .args(&["--disk", &disk, "--balloon", "0,free_page_reporting"]);
    let mut live = Live::start(run);
    let said = || String::from_utf8_lossy(&fs::read(&console).unwrap_or_default()).into_owned();
    let wait_for = |text: &str| until(text, said, |said| said.contains(text));
    let status = |live: &mut Live, key: &str| -> u64 {
        let answer = live.ask("memory");
        let status: Value =
            serde_json::from_str(answer.strip_prefix("memory: ").unwrap_or_else(|| panic!("{answer}"))).unwrap();
        status[key].as_u64().unwrap() / MIB
    };
    wait_for("has: 128");
    assert_eq!(["requested", "plugged", "size"].map(|key| status(&mut live, key)), [128, 128, 1024]);
    assert_eq!(live.ask("memory 1025M"), "refused: 1025M of memory: there is only 1G to add");
    let idle = resident(&live.pid);
    assert_eq!(live.ask("memory 512M"), "memory: 512M");
    wait_for("has: 512");
    assert_eq!((live.ask("pause"), live.ask("resume")), ("paused: true".into(), "resumed: true".into()));
    let told = wait_for("  -");
    assert!(told.contains(&format!("sum: {}", sum.trim())), "{told}");
    let full = resident(&live.pid);
    assert!(full > idle + 300 * MIB, "{idle} {full}");
    assert_eq!(live.ask("memory 0"), "memory: 0");
    wait_for("has: 0");
    until("all blocks are unplugged", || status(&mut live, "plugged"), |plugged| *plugged == 0);
    let after = resident(&live.pid);
    eprintln!("resident: {} MiB idle, {} MiB full, {} MiB after", idle / MIB, full / MIB, after / MIB);
    assert!(after < full - 250 * MIB, "{full} {after}");
    assert_eq!(live.ask("memory 256M"), "memory: 256M");
    wait_for("has: 256");
    assert_eq!(live.ask("balloon 100M"), "balloon: 100M");
    wait_for("has: 156");
    assert_eq!(live.ask("balloon 0"), "balloon: 0");
    wait_for("status 0");
}
