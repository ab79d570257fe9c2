//! Disks of every format and engine under a stock driver; the formats' own tools check from outside what the guest
//! left.

use std::fs::{self, File};
use std::path::Path;

use crate::common::{Run, tool};

const SIZE: u64 = 64 << 20;

fn sparse(path: &str) -> String {
    File::create(path).unwrap().set_len(SIZE).unwrap();
    path.to_string()
}

/// Checks a file system, and that it holds the file of round `n`.
fn check_ext4(raw: &str, n: usize) {
    tool(&["e2fsck", "-fn", raw]);
    assert_eq!(tool(&["debugfs", "-R", "cat /name", raw]), format!("disk {n}\n"));
    let random = format!("{raw}.random");
    tool(&["debugfs", "-R", &format!("dump /random {random}"), raw]);
    let sum = tool(&["md5sum", &random]);
    assert_eq!(tool(&["debugfs", "-R", "cat /sum", raw]).split(' ').next(), sum.split(' ').next());
}

/// Checks a qcow2 image; returns the path of a raw copy.
fn to_raw(image: &str) -> String {
    tool(&["qemu-img", "check", "-q", image]);
    let raw = format!("{image}.raw");
    tool(&["qemu-img", "convert", "-O", "raw", image, &raw]);
    raw
}

/// On each disk, a file system is created, filled, trimmed and checked. The last disk comes with a file system, which
/// stays unchanged below what is written.
#[test]
fn every_format_and_engine_keeps_a_file_system() {
    let script = r#"set -e
n=0
for disk in a b c d e f; do
    [ $disk = c ] || mke2fs -q -b 4096 /dev/vd$disk >/dev/null
    mount -t ext4 -o discard /dev/vd$disk /mnt
    echo "disk $n" >/mnt/name
    dd if=/dev/urandom of=/mnt/random bs=64k count=16 2>/dev/null
    dd if=/dev/zero of=/mnt/gone bs=64k count=32 2>/dev/null
    md5sum </mnt/random >/mnt/sum
    sync
    rm /mnt/gone
    if fstrim /mnt 2>/dev/null; then echo "trim$n: yes"; else echo "trim$n: no"; fi
    umount /mnt
    mount -t ext4 -o ro /dev/vd$disk /mnt
    [ "$(md5sum </mnt/random)" = "$(cat /mnt/sum)" ]
    umount /mnt
    echo "discard$n: $(cat /sys/block/vd$disk/queue/discard_max_bytes)"
    echo "queues$n: $(ls /sys/block/vd$disk/mq | wc -l)"
    n=$((n + 1))
done
mount -t ext4 /dev/vdg /mnt
echo "below: $(cat /mnt/name)"
echo changed >/mnt/name
sync
echo "above: $(cat /mnt/name)"
echo "cache: $(cat /sys/block/vda/queue/write_cache)"
echo 'write through' >/sys/block/vda/cache_type
echo "cache now: $(cat /sys/block/vda/queue/write_cache)"
echo straight | dd of=/dev/vda bs=512 count=1 oflag=direct 2>/dev/null
"#;
    // Direct I/O needs the scratch disk where guests run in an emulated host.
    let direct = "/run/scratch/direct.$$";
    let wrapper = format!(
        "mkdir -p /run/scratch 2>/dev/null; truncate -s {SIZE} {direct}; \"$@\" --disk {direct},direct=on,engine=io_uring \
         --disk \"$0.base\",overlay=tmp; code=$?; cp {direct} \"$0\"; rm {direct}; exit $code"
    );
    let run = Run::new("bzImage-cloud", script);
    let kept = crate::common::scratch();
    let path = |name: &str| kept.path().join(name).display().to_string();
    let (sync, uring) = (sparse(&path("sync")), sparse(&path("uring")));
    // A compressed base below a qcow2 image.
    let (plain, base, over) = (sparse(&path("plain")), path("base.qcow2"), path("over.qcow2"));
    tool(&["mke2fs", "-q", "-t", "ext4", &plain]);
    tool(&["qemu-img", "convert", "-c", "-O", "qcow2", &plain, &base]);
    tool(&["qemu-img", "create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &over]);
    let (below, layer) = (sparse(&path("below")), path("layer"));
    let copied = path("direct");
    let last = sparse(&format!("{copied}.base"));
    tool(&["mke2fs", "-q", "-t", "ext4", &last]);
    tool(&["debugfs", "-w", "-R", &format!("write {} name", write_file(&path("name"))), &last]);
    let (last_before, base_before) = (fs::read(&last).unwrap(), fs::read(&base).unwrap());

    let disks = [
        format!("{sync},engine=sync"),
        format!("{uring},engine=io_uring,queues=2"),
        format!("{over},format=qcow2"),
        format!("{below},overlay={layer}"),
        format!("{},overlay=tmp,ops=2000,bandwidth=200M", sparse(&path("throwaway"))),
    ];
    let mut run = run.args(&["--cpus", "2"]).through_with(&wrapper, &copied);
    for disk in &disks {
        run = run.args(&["--disk", disk]);
    }
    let ended = run.run_to_end().success();
    assert_eq!((ended.fact("below"), ended.fact("above")), ("from outside", "changed"), "{ended}");
    assert_eq!((ended.fact("cache"), ended.fact("cache now")), ("write back", "write through"), "{ended}");
    for n in 0..6 {
        assert_ne!(ended.fact(&format!("discard{n}")), "0", "{ended}");
        assert_eq!(ended.fact(&format!("queues{n}")), if n == 1 { "2" } else { "1" }, "{ended}");
    }
    // Disk 5 is on a file system that can free space (unlike 9p, through which an emulated host shares files).
    assert_eq!(ended.fact("trim5"), "yes", "{ended}");
    assert!(fs::read(&sync).unwrap().starts_with(b"straight\n"));
    check_ext4(&uring, 1);
    check_ext4(&to_raw(&over), 2);
    check_ext4(&to_raw(&layer), 3);
    check_ext4(&copied, 5);
    // The images below the overlays are unchanged.
    assert!(fs::read(&last).unwrap() == last_before && fs::read(&base).unwrap() == base_before);
    assert!(fs::read(&below).unwrap().iter().all(|&b| b == 0));
}

fn write_file(path: &str) -> &str {
    fs::write(Path::new(path), "from outside\n").unwrap();
    path
}
