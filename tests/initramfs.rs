//! Guests whose initramfs vireo packs: programs, scripts, folders, files and kernel modules arrive as they should.

use std::fs::{self, File};
use std::io::Cursor;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use crate::common::{Ended, on_host, repo, scratch, tool, vireo};

fn text(path: impl AsRef<Path>) -> String {
    path.as_ref().display().to_string()
}

/// Path of the kernel in the folder that its package was unpacked to, with its modules beside it.
fn kernel() -> String {
    let boot = repo("target/host/kernel-cloud/boot");
    let mut files = fs::read_dir(boot).unwrap().map(|entry| entry.unwrap().path());
    text(files.find(|path| text(path).contains("/vmlinuz-")).expect("no kernel: run 'make setup'"))
}

/// Runs a guest until it powers off.
fn run(args: &[&str]) -> Ended {
    let (vireo, kernel) = (text(vireo()), kernel());
    let command = ["env", "XDG_CACHE_HOME=/tmp/vireo-test-cache", &vireo, "run", "--kernel", &kernel];
    let cmdline = ["--cmdline", "console=ttyS0 quiet reboot=t panic=-1", "--timeout", "100s"];
    let ended = on_host(&[&command[..], &cmdline, args].concat()).end();
    assert_eq!(ended.code(), 0, "{ended}");
    ended
}

/// Beginning of a guest's script.
const BEGIN: &str = "#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
";

/// Script that loads the packed modules; the random numbers come from a device that modules drive.
const LOAD: &str = "while read -r module; do insmod $module || echo \"insmod $module: $?\"; done </vireo/modules
echo \"modules: $(sed 's/.*[/]//' /vireo/modules | tr '\\n' ' ')\"
echo \"rng: $(cat /sys/class/misc/hw_random/rng_current)\"
echo \"bytes: $(head -c 8 /dev/hwrng | wc -c)\"
poweroff -f
";

/// C program that prints the files named by its arguments, then powers off.
const PROGRAM: &str = r#"
#include <fcntl.h>
#include <stdio.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <unistd.h>

int main(void)
{
    static const char *names[] = {"/one", "/two", "/etc/three", "/usr/sbin/tool", "/folder/link", "/folder/again"};
    for (unsigned i = 0; i < sizeof names / sizeof *names; i++) {
        char content[100] = "";
        int fd = open(names[i], O_RDONLY);
        struct stat s = {0};
        fstat(fd, &s);
        if (fd >= 0 && read(fd, content, sizeof content - 1) < 0)
            perror(names[i]);
        printf("%s: %s, mode %o, %d links, %ld bytes, of %d\n", names[i], content, s.st_mode, (int)s.st_nlink,
               (long)s.st_size, (int)s.st_uid);
        close(fd);
    }
    fflush(stdout);
    reboot(RB_POWER_OFF);
}
"#;

/// A static program, two initrds of odd lengths, a folder and files, all in one guest.
#[test]
fn programs_folders_and_files_arrive_behind_initrds() {
    let dir = scratch();
    let at = |name: &str| dir.path().join(name);
    fs::write(at("init.c"), PROGRAM).unwrap();
    tool(&["gcc", "-Os", "-static", "-s", "-o", &text(at("prog")), &text(at("init.c"))]);

    let entry =
        |name: &str, mode: u32, content: &'static str| (cpio::NewcBuilder::new(name).mode(mode), Cursor::new(content));
    let one = [
        entry("one", 0o100_644, "first"),
        entry("usr", 0o040_755, ""),
        entry("usr/sbin", 0o040_755, ""),
        entry("sbin", 0o120_777, "usr/sbin"),
    ];
    cpio::write_cpio(one.into_iter(), File::create(at("one.cpio")).unwrap()).unwrap();
    tool(&["gzip", "-9", &text(at("one.cpio"))]);
    let two = [entry("two", 0o100_600, "second")];
    cpio::write_cpio(two.into_iter(), File::create(at("two.cpio")).unwrap()).unwrap();

    fs::create_dir_all(at("root/folder")).unwrap();
    fs::write(at("root/folder/large"), vec![b'x'; 100_000]).unwrap();
    fs::hard_link(at("root/folder/large"), at("root/folder/again")).unwrap();
    symlink("large", at("root/folder/link")).unwrap();
    fs::write(at("three"), "third").unwrap();
    fs::set_permissions(at("three"), fs::Permissions::from_mode(0o640)).unwrap();
    let (three, tool) = (format!("{}:/etc/three", text(at("three"))), format!("{}:/sbin/tool", text(at("three"))));

    let initrds = [text(at("one.cpio.gz")), text(at("two.cpio"))];
    let (prog, root) = (text(at("prog")), text(at("root")));
    let args = ["--initrd", &initrds[0], "--initrd", &initrds[1], "--init", &prog, "--initramfs-dir", &root];
    let ended = run(&[&args[..], &["--file", &three, "--file", &tool]].concat());
    let x = "x".repeat(99);
    for (name, wanted) in [
        ("/one", "first, mode 100644, 1 links, 5 bytes, of 0"),
        ("/two", "second, mode 100600, 1 links, 6 bytes, of 0"),
        ("/etc/three", "third, mode 100640, 1 links, 5 bytes, of 0"),
        ("/usr/sbin/tool", "third, mode 100640, 1 links, 5 bytes, of 0"),
        ("/folder/link", &format!("{x}, mode 100644, 2 links, 100000 bytes, of 0")),
        ("/folder/again", &format!("{x}, mode 100644, 2 links, 100000 bytes, of 0")),
    ] {
        assert_eq!(ended.fact(name), wanted, "{ended}");
    }
}

/// Files can be packed after an initrd in lz4, whose format does not mark its end, and the drivers of the machine's
/// devices are packed without being named.
#[test]
fn an_lz4_initrd_may_be_followed_and_a_disk_brings_its_drivers() {
    let dir = scratch();
    let at = |name: &str| dir.path().join(name);
    let one = [(cpio::NewcBuilder::new("one").mode(0o100_644), Cursor::new("first"))];
    cpio::write_cpio(one.into_iter(), File::create(at("one.cpio")).unwrap()).unwrap();
    fs::write(at("one.cpio.lz4"), legacy_lz4(&fs::read(at("one.cpio")).unwrap())).unwrap();
    File::create(at("data.img")).unwrap().set_len(1 << 20).unwrap();
    let rest = r#"while read -r module; do insmod $module || echo "insmod $module: $?"; done </vireo/modules
echo "one: $(cat /one)"
echo "disk: $(cat /sys/block/vda/size)"
poweroff -f
"#;
    fs::write(at("script"), format!("{BEGIN}{rest}")).unwrap();
    let [initrd, script, disk] = ["one.cpio.lz4", "script", "data.img"].map(|name| text(at(name)));
    let ended =
        run(&["--initrd", &initrd, "--init", &script, "--busybox", "--modules", "virtio_blk,ext4", "--disk", &disk]);
    assert_eq!((ended.fact("one"), ended.fact("disk")), ("first", "2048"), "{ended}");
    assert!(!ended.stdout.contains("insmod "), "{ended}");
}

/// Packs `content` in the format of `lz4 -l`, as one block of literals only.
fn legacy_lz4(content: &[u8]) -> Vec<u8> {
    let mut block = vec![0xF0];
    let mut rest = content.len() - 15;
    while rest >= 255 {
        block.push(255);
        rest -= 255;
    }
    block.push(rest as u8);
    block.extend(content);
    [&[2, 0x21, 0x4C, 0x18][..], &(block.len() as u32).to_le_bytes(), &block].concat()
}

/// A script that busybox runs loads modules that were found beside the kernel, with depmod's text files.
#[test]
fn scripts_run_with_busybox_and_load_modules_from_beside_the_kernel() {
    let dir = scratch();
    let script = dir.path().join("script");
    fs::write(&script, format!("{BEGIN}echo \"applets: $(ls /bin | grep -c .)\"\n{LOAD}")).unwrap();
    let ended = run(&[
        "--init",
        &text(&script),
        "--busybox",
        "--modules",
        "virtio-mmio,virtio_rng,ext4,vmw_vsock_virtio_transport",
        "--rng",
    ]);
    assert_eq!(ended.fact("rng"), "virtio_rng.0", "{ended}");
    assert_eq!(ended.fact("bytes"), "8", "{ended}");
    assert!(ended.fact("applets").parse::<u32>().unwrap() > 50, "{ended}");
    let modules: Vec<_> = ended.fact("modules").split_whitespace().collect();
    let at = |name: &str| modules.iter().position(|module| *module == name).unwrap_or_else(|| panic!("{ended}"));
    assert!(at("virtio.ko") < at("virtio_mmio.ko") && at("virtio_ring.ko") < at("virtio_mmio.ko"), "{ended}");
    let transport = ["vsock.ko", "vmw_vsock_virtio_transport_common.ko", "vmw_vsock_virtio_transport.ko"].map(at);
    assert!(transport.is_sorted() && !ended.stdout.contains("insmod "), "{ended}");
    assert!(!modules.contains(&"ext4.ko"), "this kernel has it built in; {ended}");
}

/// Modules of a package as it is unpacked, without depmod's text files and in part compressed, are found by their own
/// information.
#[test]
fn modules_of_an_unpacked_package_are_found_by_what_they_say() {
    let dir = scratch();
    let from = repo("target/host/kernel-cloud/lib/modules");
    let from: PathBuf = fs::read_dir(from).unwrap().next().unwrap().unwrap().path();
    let to = dir.path().join("package/lib/modules").join(from.file_name().unwrap());
    for path in [
        "kernel/drivers/virtio/virtio.ko",
        "kernel/drivers/virtio/virtio_ring.ko",
        "kernel/drivers/virtio/virtio_mmio.ko",
        "kernel/drivers/char/hw_random/rng-core.ko",
        "kernel/drivers/char/hw_random/virtio-rng.ko",
        "modules.builtin",
    ] {
        fs::create_dir_all(to.join(path).parent().unwrap()).unwrap();
        // A kernel may have one of them built in.
        if from.join(path).exists() {
            fs::copy(from.join(path), to.join(path)).unwrap();
        }
    }
    tool(&["xz", "--check=crc32", "--lzma2=dict=1MiB", &text(to.join("kernel/drivers/virtio/virtio_ring.ko"))]);
    tool(&["zstd", "-q", "--rm", &text(to.join("kernel/drivers/virtio/virtio_mmio.ko"))]);
    let script = dir.path().join("script");
    fs::write(&script, format!("{BEGIN}{LOAD}")).unwrap();
    let package = text(dir.path().join("package"));
    let args =
        ["--init", &text(&script), "--busybox", "--modules-dir", &package, "--modules", "virtio_mmio,virtio_rng"];
    let ended = run(&[&args[..], &["--rng"]].concat());
    assert_eq!((ended.fact("rng"), ended.fact("bytes")), ("virtio_rng.0", "8"), "{ended}");
    assert!(!ended.stdout.contains("insmod "), "{ended}");
}
