//! Virtio devices under stock drivers; what the guest did to a disk is checked from outside.

use std::fs::{self, File};
use std::process::Command;

use crate::common::{Run, on_host, tool};

fn sparse(path: &str, size: u64) -> String {
    File::create(path).unwrap().set_len(size).unwrap();
    path.to_string()
}

/// A file system that is created and filled in the guest is sound outside; flushed data is there while the guest still
/// runs; and a second machine cannot use the disk in the meantime.
#[test]
fn a_disk_keeps_what_the_guest_wrote() {
    let script = "set -e
mke2fs -q /dev/vda
mount -t ext4 /dev/vda /mnt
mkdir /mnt/many
for n in $(seq 200); do echo $n >/mnt/many/$n; done
dd if=/dev/urandom of=/mnt/random bs=64k count=64 2>/dev/null
md5sum </mnt/random >/mnt/sum
umount /mnt
echo flushed-to-the-disk | dd of=/dev/vdb conv=fsync 2>/dev/null
echo written
read answer
echo \"answer: $answer\"";
    let run = Run::new("bzImage-cloud", script);
    let (disk, second) = (sparse(&run.path("disk"), 64 << 20), sparse(&run.path("second"), 1 << 20));
    let kernel = crate::common::image("bzImage-cloud");
    let mut guest = run.args(&["--disk", &disk, "--disk", &second, "--cpus", "2"]).start();
    guest.wait_for("written");
    assert!(fs::read(&second).unwrap().starts_with(b"flushed-to-the-disk\n"));

    let vireo = crate::common::vireo();
    let other = [&vireo.display().to_string(), "run", "--kernel", &kernel.display().to_string(), "--disk", &disk];
    let refused = on_host(&other).end();
    assert_eq!(refused.code(), 125, "{refused}");
    assert_eq!(refused.stderr, format!("vireo: disk {disk} is in use by another VM\n"));

    guest.send(b"go\n");
    // The run's own folder would be removed with the run.
    let kept = crate::common::scratch();
    let copy = kept.path().join("disk").display().to_string();
    fs::hard_link(&disk, &copy).unwrap();
    let ended = guest.end().success();
    assert_eq!(ended.fact("answer"), "go");
    tool(&["e2fsck", "-fn", &copy]);
    assert_eq!(tool(&["debugfs", "-R", "cat /many/200", &copy]), "200\n");
    let random = kept.path().join("random").display().to_string();
    tool(&["debugfs", "-R", &format!("dump /random {random}"), &copy]);
    let sum = Command::new("md5sum").stdin(File::open(random).unwrap()).output().unwrap();
    assert_eq!(tool(&["debugfs", "-R", "cat /sum", &copy]), String::from_utf8(sum.stdout).unwrap());
}

/// All slots are taken by 17 disks, one of them read-only, and a random number generator; one more device is refused.
#[test]
fn a_device_in_every_slot() {
    let script = r#"
echo "disks: $(ls -d /sys/block/vd* | wc -l)"
for disk in /dev/vd?; do echo "$disk: $(head -n 1 $disk) $(cat /sys/block/${disk#/dev/}/serial)"; done
echo "readonly: $(cat /sys/block/vda/ro) $(cat /sys/block/vdb/ro)"
echo "refused: $(dd if=/dev/zero of=/dev/vda bs=512 count=1 conv=fsync 2>&1 | head -n 1)"
echo "rng: $(cat /sys/class/misc/hw_random/rng_current)"
echo "random: $(head -c 4096 /dev/hwrng | wc -c)"
"#;
    let run = Run::new("bzImage-cloud", script).args(&["--rng"]);
    let disks: Vec<String> = (0..18).map(|n| run.path(&format!("disk{n}"))).collect();
    for (n, disk) in disks.iter().enumerate() {
        sparse(disk, 1 << 20);
        fs::write(disk, format!("content {n}\n{:1023}", "")).unwrap();
    }
    let first = format!("{},readonly", disks[0]);
    let mut run = run.args(&["--disk", &first]);
    for disk in &disks[1..17] {
        run = run.args(&["--disk", disk]);
    }
    let readonly = fs::read(&disks[0]).unwrap();
    let (vireo, kernel) =
        (crate::common::vireo().display().to_string(), crate::common::image("bzImage-cloud").display().to_string());
    let too_many = disks.iter().flat_map(|disk| ["--disk", disk]);
    let args: Vec<&str> = [&vireo, "run", "--kernel", &kernel, "--rng"].into_iter().chain(too_many).collect();
    let refused = on_host(&args).end();
    assert_eq!(refused.code(), 125, "{refused}");
    assert!(refused.stderr.contains("19 virtio devices are more than the 18"), "{refused}");

    let guest = run.start();
    let kept = crate::common::scratch();
    fs::hard_link(&disks[0], kept.path().join("disk")).unwrap();
    let ended = guest.end().success();
    assert_eq!(ended.fact("disks"), "17", "{ended}");
    for n in 0..17u8 {
        let fact = ended.fact(&format!("/dev/vd{}", char::from(b'a' + n))).to_string();
        assert_eq!(fact, format!("content {n} disk{n}"), "{ended}");
    }
    assert_eq!(ended.fact("readonly"), "1 0", "{ended}");
    assert!(ended.fact("refused").contains("not permitted") || ended.fact("refused").contains("error"), "{ended}");
    assert_eq!(fs::read(kept.path().join("disk")).unwrap(), readonly);
    assert!(ended.fact("rng").starts_with("virtio_rng"), "{ended}");
    assert_eq!(ended.fact("random"), "4096", "{ended}");
}

/// Unloading a driver resets the device; loading it again starts the device again.
#[test]
fn drivers_come_and_go() {
    let script = "set -e
for round in 1 2 3; do
    echo round $round | dd of=/dev/vda conv=fsync 2>/dev/null
    head -c 512 /dev/hwrng >/dev/null
    rmmod virtio_blk
    rmmod virtio_rng
    [ ! -e /sys/block/vda ]
    modprobe -a virtio_blk virtio_rng
    [ \"$(head -n 1 /dev/vda)\" = \"round $round\" ]
done
echo \"rounds: $round\"";
    let run = Run::new("bzImage-cloud", script).args(&["--rng", "--cpus", "2"]);
    let disk = run.path("disk");
    fs::write(&disk, [b'\n'; 4096]).unwrap();
    let ended = run.args(&["--disk", &disk]).run_to_end().success();
    assert_eq!(ended.fact("rounds"), "3");
}

/// A kernel started by another one with kexec finds every device as the first one left it, busy, and takes it over.
#[test]
fn another_kernel_by_kexec() {
    let script = r#"set -e
modprobe -a virtio_net virtio_console virtio_balloon virtiofs nd_pmem virtio_pmem virtio_mem \
    vmw_vsock_virtio_transport
case " $(cat /proc/cmdline) " in *' second '*) kernel=second ;; *) kernel=first ;; esac
mkdir -p /images /run/dir
mount -t virtiofs images /images
mount -t virtiofs dir /run/dir
echo $kernel >/run/dir/$kernel
echo $kernel | dd of=/dev/vda seek=$([ $kernel = first ] && echo 0 || echo 8) conv=fsync 2>/dev/null
echo $kernel | dd of=/dev/pmem0 seek=$([ $kernel = first ] && echo 0 || echo 8) conv=fsync 2>/dev/null
head -c 512 /dev/hwrng >/dev/null
echo $kernel >$(ls -d /dev/vport*p1)
vsock echo 5 &
ip link set eth0 up
udhcpc -i eth0 -n -q -f -s /bin/true 2>&1 | grep -o 'lease of [0-9.]*' | sed "s/^/$kernel: /"
if [ $kernel = first ]; then
    read go
    (while :; do dd if=/dev/vda of=/dev/null bs=64k iflag=direct; done) 2>/dev/null &
    cat /dev/hwrng >/dev/null &
    kexec /images/bzImage-cloud /run/dir/initrd "$(cat /proc/cmdline) second"
fi
read go
"#;
    let run = Run::new("bzImage-cloud", script).with_program("kexec").with_program("vsock");
    let (disk, pmem) = (sparse(&run.path("disk"), 4 << 20), sparse(&run.path("pmem"), 16 << 20));
    let images = format!("{},tag=images,readonly", crate::common::image("").display());
    let (dir, port) = (format!("{},tag=dir", run.dir.path().display()), format!("port,to=file:{}", run.path("port")));
    let socket = format!("/tmp/vireo-test-{}-kexec.vsock", std::process::id());
    let mut guest = run
        .args(&["--cpus", "2", "--memory", "512M", "--disk", &disk, "--pmem", &pmem, "--rng", "--net", "user"])
        .args(&["--vsock", &format!("cid=3,path={socket}"), "--console", "null", "--console-port", &port])
        .args(&["--balloon", "16M", "--share", &images, "--share", &dir, "--virtio-mem", "128M,requested=0"])
        .start();
    for kernel in ["first", "second"] {
        guest.wait_for(&format!("{kernel}: lease"));
        assert_eq!(on_host(&[&crate::common::example("vsock-peer"), &socket, "ping", "5"]).end().code(), 0, "{kernel}");
        if kernel == "first" {
            guest.send(b"go\n");
        }
    }
    let kept = crate::common::scratch();
    for name in ["disk", "pmem", "port", "first", "second"] {
        fs::hard_link(guest.dir.path().join(name), kept.path().join(name)).unwrap();
    }
    guest.send(b"go\n");
    let ended = guest.end().success();
    let file = |name: &str| fs::read(kept.path().join(name)).unwrap();
    for name in ["disk", "pmem"] {
        assert!(file(name).starts_with(b"first\n"), "{name}: {ended}");
        assert!(file(name)[4096..].starts_with(b"second\n"), "{name}: {ended}");
    }
    assert_eq!(file("port"), b"first\nsecond\n", "{ended}");
    assert_eq!((file("first"), file("second")), (b"first\n".to_vec(), b"second\n".to_vec()));
    assert_eq!(ended.fact("first"), ended.fact("second"), "{ended}");
}
