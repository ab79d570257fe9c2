//! Disk tests that take too long for `make test`; `make soak` runs them.

mod common;

use std::fs::{self, File};

use common::programs::{SHARE, with_hosts_programs};
use common::{FOLDER, Run, tool};

/// File names of the kinds of disks, and the options that open them. Each disk has 96 MiB: 64 for a file system, 24
/// that fio writes at random, and 8 in which every other block of 4 KiB exists from the beginning and the others are
/// written.
const DISKS: [(&str, &str); 10] = [
    ("sync", ",engine=sync"),
    ("uring", ",engine=io_uring"),
    ("auto", ""),
    ("queues", ",engine=io_uring,queues=2"),
    ("direct", ",direct=on"),
    ("direct-sync", ",direct=on,engine=sync"),
    ("plain.qcow2", ""),
    ("over.qcow2", ",format=qcow2"),
    ("below", ",overlay=layer.qcow2"),
    ("gone", ",overlay=tmp"),
];

/// Jobs on the disk's own bytes; `$DISK` names it, `$DIRECT` decides whether to bypass the cache.
const BLOCKS: &str = "
[global]
filename=${DISK}
direct=${DIRECT}
ioengine=libaio
iodepth=32
verify=crc32c
verify_fatal=1
verify_state_save=0
[mixed]
rw=randwrite
bsrange=4k-64k
offset=64m
size=24m
[even]
rw=write:4k
bs=4k
offset=88m
size=8m
io_size=4m
";

/// Job of the blocks that exist from the beginning: beside each block of the job `even`, so that they share clusters.
const OLD_BLOCKS: &str = "
[odd]
filename=${DISK}
direct=${DIRECT}
ioengine=libaio
iodepth=32
verify=crc32c
verify_fatal=1
verify_state_save=0
rw=write:4k
bs=4k
offset=90116k
size=8188k
io_size=4m
";

/// Jobs on files of the file system at /mnt.
const FILES: &str = "
[global]
directory=/mnt
rw=randwrite
bsrange=4k-64k
verify=crc32c
verify_fatal=1
verify_state_save=0
[uncached]
ioengine=io_uring
iodepth=32
direct=1
size=16m
[cached]
ioengine=psync
fsync=32
size=8m
";

/// Prefix for jobs that only check what they have written before.
const AGAIN: &str = "[global]\nverify_only\n";

/// Script in the guest.
const FIO: &str = r#"
# Runs the jobs on standard input; prints their names, errors (0), and how many KiB they read and so verified.
run() {
    cat >jobs
    fio --output-format=terse --terse-version=3 jobs >told 2>&1 || { cat told >&2; return 1; }
    sed -n 's/^3;/&/p' told | cut -d ';' -f 3,5,6 | tr '\n' ' '
}
export DIRECT=1
for name in a b c d e f g h i j; do
    export DISK=/dev/vd$name
    before=$(cat again old | run)
    written=$(cat blocks | run)
    mkfs.ext4 -q -F -b 4096 $DISK 16384
    mount -t ext4 $DISK /mnt
    files=$(cat files | run)
    umount /mnt
    e2fsck -fn $DISK >told 2>&1 || { cat told; exit 1; }
    mount -t ext4 $DISK /mnt
    files_again=$(cat again files | run)
    umount /mnt
    after=$(cat again blocks old | run)
    echo "$name before: $before"
    echo "$name written: $written"
    echo "$name files: $files"
    echo "$name files again: $files_again"
    echo "$name after: $after"
    echo "$name queues: $(ls /sys/block/vd$name/mq | wc -l)"
    echo "end of $name."
done
"#;

/// Script on the host, around vireo: creates disks from the contents of the folder `$0`, on a file system that supports
/// direct I/O (where guests run in an emulated host, only its scratch disk does); copies their contents back into the
/// folder afterwards.
const AROUND: &str = r#"
set -e
raw="sync uring auto queues direct direct-sync"
cp --sparse=always "$0/template" "$0/packed.qcow2" .
for name in $raw below gone; do cp template $name; done
cp "$0/template.qcow2" plain.qcow2
qemu-img create -q -f qcow2 -b packed.qcow2 -F qcow2 over.qcow2
"$@"
for name in below gone; do cmp $name template; done
cmp packed.qcow2 "$0/packed.qcow2"
for name in plain over layer; do
    qemu-img check -q $name.qcow2
    qemu-img convert -O raw $name.qcow2 $name
done
for name in $raw plain over layer; do cp --sparse=always $name "$0"; done
"#;

/// Runs fio jobs on a file of this machine.
fn fio(jobs: &str, disk: &str) {
    let path = format!("{disk}.fio");
    fs::write(&path, jobs).unwrap();
    tool(&["env", &format!("DISK={disk}"), "DIRECT=0", "fio", "--output=/dev/null", &path]);
}

/// On each kind of disk, fio writes to the disk itself and to files, and finds everything again: immediately, later,
/// and here when the guest has ended. What was there before stays.
#[test]
fn fio_verifies_every_format_and_engine() {
    let kept = common::scratch();
    let path = |name: &str| kept.path().join(name).display().to_string();
    let template = path("template");
    File::create(&template).unwrap().set_len(96 << 20).unwrap();
    fio(OLD_BLOCKS, &template);
    tool(&["qemu-img", "convert", "-O", "qcow2", &template, &path("template.qcow2")]);
    tool(&["qemu-img", "convert", "-c", "-O", "qcow2", &template, &path("packed.qcow2")]);

    let files = [("again", AGAIN), ("blocks", BLOCKS), ("old", OLD_BLOCKS), ("files", FILES)];
    let files = files.map(|(name, jobs)| format!("cat >{name} <<'END'\n{jobs}END\n")).concat();
    let script = with_hosts_programs(&format!("{files}{FIO}"));
    let mut run = Run::new("bzImage-cloud", &script)
        .cmdline("console=ttyS0 quiet vireo.modules=virtio_mmio,virtio_blk,virtiofs")
        .through_with(&format!("{FOLDER}{AROUND}"), &kept.path().display().to_string())
        .args(&["--cpus", "2", "--memory", "512M"])
        .args(&SHARE);
    for (file, options) in DISKS {
        run = run.args(&["--disk", &format!("{file}{options}")]);
    }
    let guest = run.start();
    for (_, letter) in DISKS.iter().zip('a'..) {
        guest.wait_for(&format!("end of {letter}."));
    }
    let ended = guest.end().success();
    for ((file, options), letter) in DISKS.iter().zip('a'..) {
        let told = |what: &str| ended.fact(&format!("{letter} {what}")).trim().to_string();
        let disk = format!("{file}{options}: {ended}");
        assert_eq!(told("before"), "odd;0;4096", "{disk}");
        assert_eq!(told("written"), "mixed;0;24576 even;0;4096", "{disk}");
        assert_eq!(told("files"), "uncached;0;16384 cached;0;8192", "{disk}");
        assert_eq!(told("files again"), "uncached;0;16384 cached;0;8192", "{disk}");
        assert_eq!(told("after"), "mixed;0;24576 even;0;4096 odd;0;4096", "{disk}");
        assert_eq!(told("queues"), if *file == "queues" { "2" } else { "1" }, "{disk}");
    }
    for name in ["sync", "uring", "auto", "queues", "direct", "direct-sync", "plain", "over", "layer"] {
        let disk = path(name);
        tool(&["e2fsck", "-fn", &disk]);
        fio(&[AGAIN, BLOCKS, OLD_BLOCKS].concat(), &disk);
    }
}

/// vireo is killed in the middle of writing, again and again: the file system is sound, and holds at least what was
/// reported to the guest as flushed.
#[test]
fn killed_while_writing_loses_nothing_that_was_flushed() {
    let script = "set -e
mount -t ext4 /dev/vda /mnt
n=$(cat /mnt/count 2>/dev/null || echo 0)
echo begins behind $n, now
while :; do
    n=$((n + 1))
    head -c 20000 /dev/urandom >/mnt/file$((n % 50))
    echo $n | dd of=/mnt/count.new conv=fsync 2>/dev/null
    mv /mnt/count.new /mnt/count
    sync
    echo flushed $n.
done";
    let kept = common::scratch();
    let path = |name: &str| kept.path().join(name).display().to_string();
    let (raw, qcow2) = (path("raw"), path("disk.qcow2"));
    std::fs::File::create(&raw).unwrap().set_len(64 << 20).unwrap();
    tool(&["mke2fs", "-q", "-t", "ext4", &raw]);
    tool(&["qemu-img", "convert", "-O", "qcow2", &raw, &qcow2]);
    for round in 1..=5u32 {
        for disk in [format!("{raw},engine=io_uring"), format!("{raw},engine=sync"), qcow2.clone()] {
            let guest = Run::new("bzImage-cloud", script).args(&["--disk", &disk]).start();
            // The guest continues to count where the last one stopped.
            let number = |line: &str| line.strip_prefix("begins behind ")?.strip_suffix(", now")?.parse::<u32>().ok();
            let mut last = guest.wait_for(", now").lines().find_map(number).unwrap();
            for _ in 0..4 * round {
                guest.wait_for(&format!("flushed {}.", last + 1));
                last += 1;
            }
            guest.signal(9);
            drop(guest);
            let checked = if disk == qcow2 {
                // Clusters may leak, but never be used twice.
                let copy = path("copy");
                tool(&["qemu-img", "convert", "-O", "raw", &qcow2, &copy]);
                copy
            } else {
                raw.clone()
            };
            tool(&["sh", "-c", "e2fsck -fy \"$0\" >/dev/null; [ $? -le 1 ]", &checked]);
            tool(&["e2fsck", "-fn", &checked]);
            let count: u32 = tool(&["debugfs", "-R", "cat /count", &checked]).trim().parse().unwrap();
            assert!(count >= last, "{disk}: {count} is there, {last} was flushed");
        }
    }
}
