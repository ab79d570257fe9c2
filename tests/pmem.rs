//! Persistent memory under stock drivers: below a file system, as the root file system, as the target of other devices'
//! I/O; what is kept and what is not is inspected from outside.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use crate::common::{Run, on_host, scratch, tool};

const LOAD: &str = "modprobe -a virtio_mmio virtio_blk virtio_pmem nd_pmem
pmem() { for n in $(seq 300); do [ -b /dev/$1 ] && return; sleep 0.1; done; echo no $1; }
";

/// Creates an ext4 that can be used by DAX, with the files of a folder if one is given.
fn ext4(path: &str, size: &str, folder: Option<&Path>) {
    let folder = folder.map(|folder| folder.display().to_string());
    let from = folder.as_ref().map_or(vec![], |folder| vec!["-d", folder]);
    let args = [&["mke2fs", "-q", "-t", "ext4", "-b", "4096"], &from[..], &[path, size]].concat();
    tool(&args);
}

fn md5(file: &str) -> String {
    let sum = Command::new("md5sum").stdin(File::open(file).unwrap()).output().unwrap().stdout;
    String::from_utf8(sum).unwrap()
}

fn contains(file: &str, text: &str) -> bool {
    fs::read(file).unwrap().windows(text.len()).any(|window| window == text.as_bytes())
}

/// Data written through DAX and through the page cache reaches the file, immediately if it was flushed; a disk reads
/// and writes the pages directly; and a second machine cannot use the file in the meantime.
#[test]
fn a_file_system_in_memory_is_kept() {
    let script = format!(
        "{LOAD}pmem pmem0
set -e
echo \"size: $(cat /sys/block/pmem0/size)\"
mount -t ext4 -o dax /dev/pmem0 /mnt
echo \"dax: $(grep -c '^/dev/pmem0 .*dax' /proc/mounts)\"
echo the guest says hello >/mnt/name
dd if=/dev/urandom of=/mnt/random bs=64k count=64 conv=fsync 2>/dev/null
dd if=/mnt/random of=/mnt/half bs=64k count=32 2>/dev/null
(cat /mnt/half; head -c 2097152 /dev/zero) >/mnt/both
dax-io /mnt/both /dev/vda
sync
echo flushed
read go
umount /mnt
mount -t ext4 /dev/pmem0 /mnt
md5sum </mnt/random >/mnt/sum
[ \"$(head -c 2097152 /dev/vda | md5sum)\" = \"$(head -c 2097152 /mnt/both | md5sum)\" ]
umount /mnt
echo \"size: $(cat /sys/block/pmem0/size)\""
    );
    let kept = scratch();
    let path = |name: &str| kept.path().join(name).display().to_string();
    let (image, disk) = (path("image"), path("disk"));
    ext4(&image, "64M", None);
    File::create(&disk).unwrap().set_len(4 << 20).unwrap();
    let run = Run::new("bzImage-cloud", &script).with_program("dax-io").args(&["--cpus", "2"]);
    let mut guest = run.args(&["--pmem", &image, "--disk", &format!("{disk},direct=off")]).start();
    guest.wait_for("flushed");
    // Data that the emulated host has written is visible outside.
    assert!(contains(&image, "the guest says hello"), "{}", guest.tails());

    let (vireo, kernel) =
        (crate::common::vireo().display().to_string(), crate::common::image("bzImage-cloud").display().to_string());
    let refused = on_host(&[&vireo, "run", "--kernel", &kernel, "--pmem", &image]).end();
    assert_eq!((refused.code(), &*refused.stderr), (125, &*format!("vireo: pmem: {image} is in use by another VM\n")));
    let refused = on_host(&[&vireo, "run", "--kernel", &kernel, "--pmem", &format!("{image},readonly")]).end();
    assert!(refused.stderr.ends_with("is in use by another VM, which writes to it\n"), "{refused}");

    guest.send(b"go\n");
    let ended = guest.end().success();
    assert_eq!((ended.fact("size"), ended.fact("dax")), ("131072", "1"), "{ended}");
    assert_eq!(ended.fact("dax-io"), "the same", "{ended}");
    tool(&["e2fsck", "-fn", &image]);
    assert_eq!(tool(&["debugfs", "-R", "cat /name", &image]), "the guest says hello\n");
    tool(&["debugfs", "-R", &format!("dump /random {}", path("random")), &image]);
    assert_eq!(tool(&["debugfs", "-R", "cat /sum", &image]), md5(&path("random")));
}

/// A whole system runs from a file: the next run continues where it was, and a throw-away run keeps nothing.
#[test]
fn as_the_root_file_system() {
    let script = format!(
        "#!/bin/sh
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev 2>/dev/null
{LOAD}pmem pmem0
mount -t ext4 -o dax /dev/pmem0 /mnt && exec switch_root /mnt /init
echo \"no root\"; poweroff -f"
    );
    let init = "#!/bin/sh
export PATH=/bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
echo \"root: $(grep ' / ' /proc/mounts | tail -n 1)\"
echo boot >>/boots
echo \"boots: $(wc -l </boots)\"
sync
mount -o remount,ro /
poweroff -f\n";
    let kept = scratch();
    let root = kept.path().join("root");
    for folder in ["bin", "proc", "dev"] {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
    tool(&["sh", "-c", "cp \"$(command -v busybox)\" \"$0/bin\"", &root.display().to_string()]);
    for applet in ["sh", "mount", "grep", "tail", "wc", "sync", "poweroff"] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    fs::write(root.join("init"), init).unwrap();
    fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755)).unwrap();
    let image = kept.path().join("image").display().to_string();
    ext4(&image, "32M", Some(&root));
    for (options, boots) in [("", "1"), (",overlay=tmp", "2")] {
        let run = Run::new("bzImage-cloud", &script).cmdline("console=ttyS0 quiet rdinit=/test.sh");
        let ended = run.args(&["--pmem", &format!("{image}{options}")]).run_to_end().expect(0, "powered-off");
        assert!(ended.fact("root").starts_with("/dev/pmem0 / ext4") && ended.fact("root").contains("dax"), "{ended}");
        assert_eq!(ended.fact("boots"), boots, "{options} {ended}");
        tool(&["e2fsck", "-fn", &image]);
    }
    assert_eq!(tool(&["debugfs", "-R", "cat /boots", &image]), "boot\n");
}

/// Files that are only read stay unchanged, whatever the guest writes and whatever their size; and when one is
/// truncated below a running guest, the user learns why the guest ended.
#[test]
fn what_is_only_read_stays_as_it_is() {
    let script = format!(
        "{LOAD}pmem pmem0; pmem pmem1
echo \"sizes: $(cat /sys/block/pmem0/size) $(cat /sys/block/pmem1/size)\"
for n in 0 1; do
    echo \"before$n: $(head -n 1 /dev/pmem$n)\"
    echo written by the guest | dd of=/dev/pmem$n bs=4096 conv=notrunc,fsync 2>/dev/null
    echo 3 >/proc/sys/vm/drop_caches
    echo \"after$n: $(head -n 1 /dev/pmem$n)\"
done
echo \"tail: $(dd if=/dev/pmem1 bs=1M skip=3 2>/dev/null | tr -d '\\000' | wc -c)\"
echo waiting
read go
echo 3 >/proc/sys/vm/drop_caches
cat /dev/pmem0 >/dev/null
echo it went on"
    );
    let kept = scratch();
    let path = |name: &str| kept.path().join(name).display().to_string();
    let (first, second) = (path("first"), path("second"));
    for (file, len) in [(&first, 4 << 20), (&second, 3 << 20)] {
        fs::write(file, [b"from outside\n", &vec![b'x'; len - 13][..]].concat()).unwrap();
    }
    let before = [&first, &second].map(|file| md5(file));
    let run = Run::new("bzImage-cloud", &script);
    let pmems = [format!("{first},readonly"), format!("{second},overlay=tmp")];
    let mut guest = run.args(&["--pmem", &pmems[0], "--pmem", &pmems[1]]).start();
    guest.wait_for("waiting");
    assert_eq!([&first, &second].map(|file| md5(file)), before);
    let cut = on_host(&["truncate", "-s", "4096", &first]).end();
    assert_eq!(cut.code(), 0, "{cut}");
    guest.send(b"go\n");
    let ended = guest.end();
    assert_eq!(ended.fact("sizes"), "8192 8192", "{ended}");
    assert_eq!((ended.fact("before0"), ended.fact("after0")), ("from outside", "from outside"), "{ended}");
    assert_eq!((ended.fact("before1"), ended.fact("after1")), ("from outside", "written by the guest"), "{ended}");
    assert_eq!(ended.fact("tail"), "0", "{ended}");
    assert_eq!(ended.code(), 125, "{ended}");
    let told =
        format!("the host could not provide memory that the guest used ({first} was truncated while it was mapped)");
    assert!(ended.stderr.contains(&told), "{ended}");
}
