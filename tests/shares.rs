//! Folders of the host in the guest. A share must behave as ext4 does: the same calls run on both
//! (tests/host/fs-check.c) and must have the same results.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use crate::common::{FOLDER, Run, example, image, on_host, tool, vireo};
use serde_json::Value;

/// Kernel command line with the guest's modules.
const CMDLINE: &str = "console=ttyS0 quiet vireo.modules=virtio_mmio,virtio_blk,virtiofs";

/// Script that runs vireo as an ordinary user, who owns the folder.
const AS_USER: &str = r#"
chown 65534 one
export XDG_CACHE_HOME=$dir/cache
mkdir -m 777 cache
setpriv --reuid 65534 --regid 65534 --clear-groups -- "$@"
"#;

fn run(script: &str, host: &str) -> Run {
    run_kernel("bzImage-cloud", script, host)
}

fn run_kernel(kernel: &str, script: &str, host: &str) -> Run {
    let modules = kernel.trim_start_matches("bzImage-");
    Run::new(kernel, script)
        .with_modules(modules)
        .with_program("fs-check")
        .cmdline(CMDLINE)
        .through(&format!("{FOLDER}mkdir one\n{host}"))
}

/// Returns the lines that were printed between two lines.
fn part<'a>(text: &'a str, from: &str, to: &str) -> Vec<&'a str> {
    text.lines().skip_while(|line| *line != from).skip(1).take_while(|line| *line != to).collect()
}

/// Makes the calls on a disk with ext4 and on a share, and compares the results.
fn compare(kernel: &str, arguments: &str, host: &str) {
    let script = format!(
        "
mount -t ext4 /dev/vda /tmp || exit
mount -t virtiofs share0 /mnt || exit
for dir in /tmp /mnt; do
    mkdir $dir/check
    echo begin $dir
    fs-check $dir/check {arguments}
    echo end $dir
done
umount /mnt"
    );
    let run = run_kernel(kernel, &script, host);
    let disk = run.path("disk");
    fs::File::create(&disk).unwrap().set_len(64 << 20).unwrap();
    tool(&["mke2fs", "-q", "-t", "ext4", "-b", "4096", &disk]);
    tool(&["chmod", "-R", "a+rwX", &run.dir.path().display().to_string()]);
    let ended = run.args(&["--disk", &disk, "--share", "one"]).run_to_end().success();
    let (ext4, share) = (part(&ended.stdout, "begin /tmp", "end /tmp"), part(&ended.stdout, "begin /mnt", "end /mnt"));
    assert_eq!(ext4.last(), Some(&"== end"), "{ended}");
    let differences: Vec<_> = ext4.iter().zip(&share).filter(|(a, b)| a != b).collect();
    assert!(differences.is_empty() && ext4.len() == share.len(), "ext4, share: {differences:#?}");
}

#[test]
fn calls_come_out_as_on_ext4() {
    compare("bzImage-cloud", "", r#""$@""#);
}

/// Later additions to FUSE: files without a name, and the birth times of files.
#[test]
fn newer_calls_come_out_as_on_ext4() {
    compare("bzImage-cloud-6.12", "nameless", r#""$@""#);
    compare("bzImage-cloud-6.12", "birth", r#""$@""#);
}

/// Calls of an ordinary user, without those that only root can make.
#[test]
fn calls_of_an_ordinary_user_come_out_as_on_ext4() {
    compare("bzImage-cloud", "user", AS_USER);
}

/// Several shares, one of them read-only; a large directory; changes on the host; a driver that is unloaded and loaded
/// again.
#[test]
fn what_the_host_has() {
    let host = r#"
mkdir two two/many three
seq -f two/many/name-%g 10000 | xargs touch
echo content >two/file
echo before >one/changing
mkdir one/dir
echo inside >one/dir/file
(
    until [ -e one/ask ]; do sleep 0.1; done
    echo after, and longer >one/changing
    mv one/dir one/elsewhere
    ln -s /etc one/dir
    echo new >one/new
    touch one/answered
) &
# A larger file causes SIGXFSZ, which ends a process that does not handle it.
ulimit -f 2097152
"$@"
echo "host: $(cat one/by-guest) $(stat -c '%u:%g %a' one/by-guest) $(ls three)"
"#;
    let script = r#"
mount -t virtiofs share0 /mnt
mkdir /two /three
mount -t virtiofs data /two
mount -t virtiofs share2 /three
echo "content: $(cat /two/file)"
echo "files: $(find /two/many -type f | wc -l)"
echo "refused: $(echo x 2>&1 >/two/new; rm /two/file 2>&1; echo x 2>&1 >>/two/file)"
echo "still: $(cat /two/file)"
echo "before: $(cat /mnt/changing) $(cat /mnt/dir/file) $(ls /mnt/new 2>&1)"
touch /mnt/ask
until [ -e /mnt/answered ]; do sleep 0.2; done
sleep 1.1
echo "after: $(cat /mnt/changing) $(cat /mnt/elsewhere/file) $(cat /mnt/new) $(readlink /mnt/dir)"
echo "owner: $(stat -c %u:%g /three)"
echo x >/three/squashed
echo "owner of a new file: $(stat -c %u:%g /three/squashed)"
echo "chown: $(chown 5 /three/squashed 2>&1)"
echo "too large: $(truncate -s 3G /mnt/huge 2>&1)"
umount /mnt /two /three
rmmod virtiofs
modprobe virtiofs
mount -t virtiofs share0 /mnt
cd /mnt
echo written >by-guest
chown 12:34 by-guest
chmod 604 by-guest
echo "again: $(cat elsewhere/file)"
"#;
    let run = run(script, host).args(&["--share", "one", "--share", "two,tag=data,readonly"]);
    let ended = run.args(&["--share", "three,squash-uid=1234", "--cpus", "2"]).run_to_end().success();
    assert_eq!((ended.fact("content"), ended.fact("still")), ("content", "content"), "{ended}");
    assert_eq!(ended.fact("files"), "10000", "{ended}");
    assert_eq!(ended.stdout.matches("Read-only file system").count(), 3, "{ended}");
    assert_eq!(ended.fact("before"), "before inside ls: /mnt/new: No such file or directory", "{ended}");
    assert_eq!(ended.fact("after"), "after, and longer inside new /etc", "{ended}");
    assert_eq!(ended.fact("owner"), "1234:1234", "{ended}");
    assert_eq!(ended.fact("owner of a new file"), "1234:1234", "{ended}");
    assert!(ended.fact("chown").contains("Operation not permitted"), "{ended}");
    assert!(ended.fact("too large").contains("File too large"), "{ended}");
    assert_eq!(ended.fact("again"), "inside", "{ended}");
    assert_eq!(ended.fact("host"), "written 12:34 604 squashed", "{ended}");
}

/// Open files, with a name and without, stay open over pauses, and no write is lost or repeated.
#[test]
fn pauses_are_not_noticed() {
    let script = "
mount -t virtiofs share0 /mnt || exit
exec 3>>/mnt/log 4>/mnt/gone 5</mnt/gone
rm /mnt/gone
n=0
until [ -e /mnt/stop ]; do n=$((n + 1)); echo $n >&3; echo $n >/mnt/count; done
seq $n | cmp - /mnt/log && echo equal
echo still >&4
echo \"gone: $(cat <&5)\"";
    let dir = crate::common::scratch();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (config, console, share) = (path("config.json"), path("console"), path("share"));
    fs::create_dir(&share).unwrap();
    let printed = Run::new("bzImage-cloud", script).cmdline(CMDLINE);
    let printed = printed.args(&["--serial", &format!("file:{console}"), "--share", &share, "--print-config"]).start();
    // The initrd is in the run's folder, which must stay.
    fs::copy(printed.dir.path().join("initrd"), path("initrd")).unwrap();
    let printed = printed.end();
    let mut machine: Value = serde_json::from_str(&printed.stdout).unwrap_or_else(|_| panic!("{printed}"));
    machine["boot"]["initrd"] = path("initrd").into();
    fs::write(&config, machine.to_string()).unwrap();

    let mut live = on_host(&[&example("live"), &config]);
    let lines = || fs::read_to_string(format!("{share}/log")).unwrap_or_default().lines().count();
    for round in 1..=5usize {
        let (before, deadline) = (lines(), Instant::now() + Duration::from_secs(60));
        while lines() < before + 20 {
            assert!(Instant::now() < deadline, "the guest makes no progress; {}", live.tails());
            thread::sleep(Duration::from_millis(50));
        }
        live.send(b"pause\n");
        live.wait_until(|said| said.matches("paused: true").count() == round);
        live.send(b"resume\n");
        live.wait_until(|said| said.matches("resumed: true").count() == round);
    }
    fs::write(format!("{share}/stop"), "").unwrap();
    let ended = live.end();
    let console = fs::read_to_string(console).unwrap();
    assert!(console.contains("equal") && console.contains("gone: still"), "{console}\n{ended}");
}

/// Checks that a share of / does not serve the host's own /proc and /sys, nor what is mounted later while the guest
/// runs.
fn no_interfaces(host: &str) {
    let script = r#"
mount -t virtiofs root /mnt || exit
mkdir /two
mount -t virtiofs share1 /two
echo "interfaces: $(ls -A /mnt/proc /mnt/sys /mnt/dev/pts 2>&1 | grep -v ':$' | tr -d '\n')"
echo "inside: $(cat /mnt/proc/version /mnt/proc/kcore /mnt/sys/kernel/uevent_helper 2>&1 | grep -c 'No such file')"
echo "data: $(ls /mnt/usr/bin | head -n 1)"
touch /mnt/proc/x 2>/dev/null || echo "written: no"
touch /two/dir/ask
until [ -e /two/answered ]; do sleep 0.1; done
n=0
while [ -e /two/dir/ask ] && [ $n -lt 100 ]; do sleep 0.1; n=$((n + 1)); done
echo "later: $(ls -A /two/dir)$(cat /two/dir/version /two/dir/self/environ 2>/dev/null | wc -c)"
echo "file: $(cat /two/file 2>&1)""#;
    let run = run(script, host).args(&["--share", "/,tag=root,readonly", "--share", "one"]);
    tool(&["chmod", "-R", "a+rwX", &run.dir.path().display().to_string()]);
    let ended = run.run_to_end().success();
    assert_eq!((ended.fact("interfaces"), ended.fact("inside")), ("", "3"), "{ended}");
    assert!(!ended.fact("data").is_empty(), "{ended}");
    assert_eq!((ended.fact("written"), ended.fact("later")), ("no", "0"), "{ended}");
    assert_eq!(ended.fact("file"), "cat: can't open '/two/file': Permission denied", "{ended}");
}

/// Script with a folder over which /proc is mounted when the guest asks for it, and a single file of /proc.
const MOUNTED_LATER: &str = r#"
mkdir one/dir; touch one/file; chmod 777 one one/dir
(
    n=0; until [ -e one/dir/ask ]; do sleep 0.1; n=$((n + 1)); [ $n -lt 1800 ] || exit; done
    mount -t proc proc one/dir
    mount --bind /proc/version one/file
    touch one/answered
) &
"#;

#[test]
fn the_kernels_interfaces_are_not_served() {
    no_interfaces(&format!("{MOUNTED_LATER}\"$@\"; status=$?; umount one/dir one/file; exit $status"));
}

#[test]
fn the_kernels_interfaces_are_not_served_to_a_user() {
    let user = AS_USER.replace("$@\"", "$@\"; status=$?; umount one/dir one/file; exit $status");
    no_interfaces(&format!("{MOUNTED_LATER}{user}"));
}

#[test]
fn what_cannot_be_shared() {
    let (vireo, kernel) = (vireo().display().to_string(), image("bzImage-cloud").display().to_string());
    let script = format!(
        r#"{FOLDER}
mkdir one; touch file; chmod 700 one
share() {{ "$1" run --kernel "$2" --share "$3"; echo "status $?"; }} 2>&1
share "$1" "$2" $dir/missing
share "$1" "$2" $dir/file
share "$1" "$2" /proc/self
setpriv --reuid 65534 --clear-groups --bounding-set=-all --inh-caps=-all -- "$1" run --kernel "$2" --share $dir/one 2>&1
echo "status $?"
share "$1" "$2" one,tag=0123456789012345678901234567890123456
echo "folder: $dir"
"#
    );
    let ended = on_host(&["bash", "-c", &script, "bash", &vireo, &kernel]).end();
    let dir = ended.fact("folder").to_string();
    let lines: Vec<&str> = ended.stdout.lines().collect();
    let expected = [
        format!("vireo: cannot share {dir}/missing: No such file or directory (os error 2)"),
        "status 125".into(),
        format!("vireo: cannot share {dir}/file: Not a directory (os error 20)"),
        "status 125".into(),
        "vireo: cannot share /proc/self: it is the host kernel's proc, not a file system with data".into(),
        "status 125".into(),
        format!("vireo: cannot share {dir}/one: Permission denied (os error 13)"),
        "status 125".into(),
        "vireo: --share: the tag '0123456789012345678901234567890123456' is not 1 to 36 bytes long".into(),
        "status 2".into(),
    ];
    assert_eq!(lines[..10], expected.iter().map(String::as_str).collect::<Vec<_>>(), "{ended}");
}
