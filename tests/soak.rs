//! Tests that take too long for `make test`; `make soak` runs them.

mod common;

use common::{FOLDER, Live, Run, example, image, on_host, resident, tool, until, vireo};

/// Script that prints a line for each boot, to show its progress.
const BOOTS: &str = r#"
left() { ls /tmp; ls -R "$XDG_CACHE_HOME"; ls /proc/self/fd | wc -l; }
export XDG_CACHE_HOME=$(mktemp -d /tmp/soak.XXXXXX) TMPDIR=/tmp
trap 'rm -rf "$XDG_CACHE_HOME"' EXIT
boot() {
    timeout 120 "$1" run --kernel "$2" --initrd "$3" --cpus $4 --cmdline "console=ttyS0 quiet reboot=t panic=-1" \
        </dev/null >"$XDG_CACHE_HOME/console" 2>&1 && grep -q 'init running' "$XDG_CACHE_HOME/console" ||
        { cat "$XDG_CACHE_HOME/console"; exit 1; }
}
boot "$1" "$2" "$3" 1
before=$(left)
for n in $(seq "$4"); do
    boot "$1" "$2" "$3" $((1 << n % 3))
    echo "boot $n"
done
[ "$before" = "$(left)" ] || { echo "something was left behind: $before; $(left)"; exit 1; }
[ -z "$(jobs)" ]
rm -r "$XDG_CACHE_HOME"
echo clean
"#;

/// Boots with one, two and four CPUs in turn leave nothing behind: no temporary file, no process.
#[test]
fn fifty_boots_leave_nothing_behind() {
    let path = |path: std::path::PathBuf| path.display().to_string();
    let (vireo, kernel, initrd) = (path(vireo()), path(image("bzImage-cloud")), path(image("initrd-min.cpio")));
    let host = on_host(&["bash", "-c", BOOTS, "bash", &vireo, &kernel, &initrd, "50"]);
    for n in (5..=50).step_by(5) {
        host.wait_for(&format!("boot {n}\n"));
    }
    let ended = host.end();
    assert!(ended.code() == 0 && ended.stdout.ends_with("clean\n"), "{ended}");
}

#[test]
fn four_cpus_reboot_and_halt_ten_times() {
    for script in ["reboot -f", "halt -f", "poweroff -f"].repeat(10) {
        let run = Run::new("bzImage-cloud", script).cmdline("console=ttyS0 quiet vireo.modules=none");
        let ended = run.args(&["--cpus", "4"]).run_to_end();
        assert_eq!(ended.code(), 0, "{script}: {ended}");
    }
}

/// SOAK_MIB mebibytes (1) of input, all of which comes back: minutes in the emulated host, seconds outside.
#[test]
fn mebibytes_in_and_out() {
    let mib: usize = std::env::var("SOAK_MIB").map_or(1, |mib| mib.parse().expect("SOAK_MIB must be a number"));
    // A line without flow control loses what exceeds the buffers of the guest's driver, 64 KiB, when the reader comes
    // late. Therefore the input is sent in pieces.
    let pieces = mib * 32;
    let script = format!(
        "stty raw -echo\nfor n in $(seq {pieces}); do echo ready $n; head -c 32768 >/in; cat /in; echo end $n; done"
    );
    let guest = Run::new("bzImage-cloud", &script).cmdline("console=ttyS0 quiet vireo.modules=none");
    let mut guest = guest.args(&["--hang-timeout", "60s"]).start();
    let mut expected = Vec::new();
    for n in 1..=pieces {
        let piece: Vec<u8> = (0..1u32 << 15).map(|i| (i % 251) as u8 ^ (i >> 8) as u8 ^ n as u8).collect();
        guest.wait_for(&format!("ready {n}\n"));
        guest.send(&piece);
        expected.extend([format!("ready {n}\n").as_bytes(), &piece, format!("end {n}\n").as_bytes()].concat());
    }
    let ended = guest.end().success();
    let start = ended.bytes.windows(8).position(|w| w == b"ready 1\n").unwrap();
    assert!(ended.bytes[start..].starts_with(&expected), "the data that came back is different");
}

/// A thousand simultaneous connections from the guest, and then a thousand to it.
#[test]
fn a_thousand_sockets() {
    let path = format!("/tmp/vireo-soak-{}.vsock", std::process::id());
    let script = "vsock echo 1 & read go; vsock many 2 82 1000; read end";
    let run = Run::new("bzImage-cloud", script).with_program("vsock");
    let run = run.cmdline("console=ttyS0 quiet vireo.modules=virtio_mmio,vmw_vsock_virtio_transport");
    let mut guest = run.args(&["--vsock", &format!("cid=3,path={path}")]).start();
    guest.wait_for("listening 1");
    let peer = on_host(&[&example("vsock-peer"), &path, "many", "1000"]);
    peer.wait_for("serving");
    guest.send(b"go\n");
    let peer = peer.end();
    assert_eq!(peer.code(), 0, "{peer}");
    assert_eq!((peer.fact("served"), peer.fact("clients")), ("1000", "1000"), "{peer}");
    guest.send(b"end\n");
    assert_eq!(guest.end().success().fact("answers"), "1000");
}

/// 64 MiB pass to the guest and back through a port on each kind of end; nothing is lost or changed.
#[test]
fn sixty_four_mebibytes_through_each_kind_of_port() {
    const LEN: usize = 64 << 20;
    let script = format!(
        r#"modprobe virtio_console
names() {{ cat /sys/class/virtio-ports/*/name; }}
for n in $(seq 100); do [ "$(names 2>/dev/null | wc -l)" = 4 ] && break; sleep 0.1; done
port() {{ echo /dev/$(grep -lx $1 /sys/class/virtio-ports/*/name | cut -d / -f 5); }}
head -c {LEN} $(port file) >/data
cat /data >$(port file)
echo "file: $(md5sum </data)"
for kind in pipe socket pty; do
    echo "next: $kind"
    read go
    exec 3<$(port $kind)
    left={LEN}
    # the port reads as empty while nothing is connected at the other end
    while [ $left -gt 0 ]; do head -c $left <&3 >>/$kind; left=$(({LEN} - $(wc -c </$kind))); done
    exec 3<&-
    echo "$kind: $(md5sum </$kind)"
    cat /data >$(port $kind)
    rm /$kind
    read go
done"#
    );
    let kept = common::scratch();
    let path = |name: &str| kept.path().join(name).display().to_string();
    let (data, copy) = (path("data"), path("copy"));
    tool(&["sh", "-c", &format!("head -c {LEN} /dev/urandom >\"$0\""), &data]);
    let sum = tool(&["sh", "-c", "md5sum <\"$0\"", &data]);
    let beside = |name: &str| format!("/tmp/vireo-soak-{}.{name}", std::process::id());
    let (pipe, socket) = (beside("pipe"), beside("socket"));
    let ports = [
        format!("file,to=file:{copy},from={data}"),
        format!("pipe,to=pipe:{pipe}"),
        format!("socket,to=socket:{socket}"),
        "pty,to=pty".into(),
    ];
    let mut run = Run::new("bzImage-cloud", &script).args(&["--memory", "512M"]);
    for port in &ports {
        run = run.args(&["--console-port", port]);
    }
    let mut guest = run.start();
    guest.wait_for_stderr("port pty is on ");
    let told = guest.wait_for_stderr("\n");
    let pty = told.split("port pty is on ").nth(1).unwrap().lines().next().unwrap().to_string();
    // The other end sends everything, and prints the checksum of what comes back.
    let both = format!("echo ready; (cat \"$1\" >&3 & head -c {LEN} <&3 | md5sum; wait)");
    let ends = [
        (
            "pipe",
            format!("exec 3>\"$0.in\" 4<>\"$0.out\"; echo ready; cat \"$1\" >&3; head -c {LEN} <&4 | md5sum"),
            &pipe,
        ),
        // Skips what talk itself prints. (`tail -c +9` may hold back the last 4 KiB until its input ends.)
        (
            "socket",
            format!("echo ready; \"$2\" \"$0\" <\"$1\" | (head -c 8 >/dev/null; head -c {LEN}) | md5sum"),
            &socket,
        ),
        ("pty", format!("exec 3<>\"$0\"; {both}"), &pty),
    ];
    for (kind, script, place) in ends {
        guest.wait_for(&format!("next: {kind}"));
        let end = on_host(&["bash", "-c", &script, place, &data, &example("talk")]);
        end.wait_for("ready");
        guest.send(b"go\n");
        // Each direction has its own time limit.
        guest.wait_for(&format!("{kind}: "));
        end.wait_for(sum.trim());
        guest.send(b"go\n");
    }
    let ended = guest.end().success();
    for kind in ["file", "pipe", "socket", "pty"] {
        assert_eq!(ended.fact(kind), sum.trim(), "{kind} {ended}");
    }
    assert_eq!(on_host(&["sh", "-c", "md5sum <\"$0\"", &copy]).end().stdout, sum);
}

/// Everyday work in a shared folder: a repository is created, cloned and checked, and a C program built, with the
/// host's own programs, which are shared too, read-only; by a monitor that is root, and by one that is not.
#[test]
fn git_and_a_c_build_in_a_shared_folder() {
    let script = r#"
set -e
mount -t virtiofs root /mnt
mount -t virtiofs work /mnt/srv
mount -t proc proc /mnt/proc
mount -t tmpfs tmpfs /mnt/tmp
mount -t devtmpfs dev /mnt/dev
cat >/mnt/srv/work.sh <<'END'
WORK
END
chroot /mnt /bin/sh /srv/work.sh 2>&1
umount /mnt/srv
"#;
    let work = r#"
set -e
export HOME=/srv PATH=/usr/local/bin:/usr/bin:/bin GIT_CONFIG_GLOBAL=/dev/null
cd /srv
git init -q one
cd one
git config user.name n
git config user.email e@x
for n in $(seq 50); do echo $n >file$n; done
ln -s file1 link
git add .
git commit -qm first
git mv file2 moved
rm file3
echo more >>file4
git commit -qam second
git gc -q
cd ..
git clone -q one two
git clone -q file:///srv/one three
cd two
echo "commits: $(git log --oneline | wc -l)"
git fsck --full --strict
echo "changes: $(git status --porcelain | wc -l)"
git checkout -q HEAD^
echo "files: $(ls | wc -l)"
git checkout -q -
echo "the same: $(cd ..; diff -r -x .git one two && diff -r -x .git one three && echo yes)"
mkdir ../c
cd ../c
printf 'int f(void);\nint main(void) { return f(); }\n' >main.c
printf 'int f(void) { return 42; }\n' >f.c
printf 'p: main.o f.o\n\tgcc -o p main.o f.o\n%%.o: %%.c\n\tgcc -O1 -c $<\n' >Makefile
touch -d '1 hour ago' *.c Makefile
echo "first: $(make | grep -c ^gcc)"
echo "answer: $(./p || echo $?)"
echo "second: $(make | grep -c ^gcc)"
"#;
    let user = "chown 65534 work; export XDG_CACHE_HOME=$dir/cache; mkdir -m 777 cache
setpriv --reuid 65534 --regid 65534 --clear-groups -- \"$@\"";
    // git does not touch what belongs to another user.
    for (host, squash) in [("\"$@\"", ""), (user, ",squash-uid=0")] {
        let run = Run::new("bzImage-cloud", &script.replace("WORK", work));
        let run = run.cmdline("console=ttyS0 quiet vireo.modules=virtio_mmio,virtiofs");
        tool(&["chmod", "-R", "a+rwX", &run.dir.path().display().to_string()]);
        let shares =
            ["--share", "/,tag=root,readonly", "--share", &format!("work,tag=work{squash}"), "--memory", "512M"];
        let ended = run.through(&format!("{FOLDER}mkdir work\n{host}")).args(&shares).run_to_end().success();
        let facts =
            ["commits", "changes", "files", "the same", "first", "answer", "second"].map(|name| ended.fact(name));
        assert_eq!(facts, ["2", "0", "51", "yes", "3", "42", "0"], "{ended}");
    }
}

/// A GiB is added, used and removed five times, and each time the host gets its memory back.
#[test]
fn a_gibibyte_comes_and_goes() {
    let script = "
total() { sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo; }
base=$(total)
has() { for n in $(seq 900); do [ $(total) = $((base + $1 * 1024)) ] && return; sleep 0.1; done; echo stuck at $(total); }
modprobe virtio_mem
for round in 1 2 3 4 5; do
    has 1024
    mount -t tmpfs -o size=1g none /mnt
    dd if=/dev/zero of=/mnt/file bs=1M count=800 2>/dev/null
    echo \"full $round.\"
    umount /mnt
    echo 3 >/proc/sys/vm/drop_caches
    has 0
    echo \"empty $round.\"
done
has 128";
    let kept = common::scratch();
    let console = kept.path().join("console").display().to_string();
    let run = Run::new("bzImage-cloud", script)
        .cmdline("console=ttyS0 quiet memhp_default_state=online_movable")
        .args(&["--memory", "256M", "--virtio-mem", "2G", "--serial", &format!("file:{console}")]);
    let mut live = Live::start(run);
    let said = || String::from_utf8_lossy(&std::fs::read(&console).unwrap_or_default()).into_owned();
    let mut left = Vec::new();
    for round in 1..=5 {
        assert_eq!(live.ask("memory 1G"), "memory: 1G");
        until("full", said, |said| said.contains(&format!("full {round}.")));
        let full = resident(&live.pid);
        assert!(full > 800 << 20, "{full}");
        assert_eq!(live.ask("memory 0"), "memory: 0");
        until("empty", said, |said| said.contains(&format!("empty {round}.")));
        left.push(resident(&live.pid) >> 20);
    }
    assert!(left.iter().all(|mib| *mib < left[0] + 32), "MiB left behind after each round: {left:?}");
    assert_eq!(live.ask("memory 128M"), "memory: 128M");
    until("the end", said, |said| said.contains("status 0"));
    assert!(!said().contains("stuck"), "{}", said());
    eprintln!("MiB left: {left:?}");
}

/// Twelve thousand files of the host are listed, and removed while they are listed.
#[test]
fn a_large_directory_in_a_shared_folder() {
    let script = "mount -t virtiofs share0 /mnt && MANY=12000 fs-check /mnt many && ls /mnt";
    let host = r#"
mkdir $dir/many
seq -f $dir/many/entry-with-a-name-%g 0 11999 | xargs touch
"$@" --share $dir
"#;
    let run = Run::new("bzImage-cloud", script).with_program("fs-check");
    let ended = run
        .cmdline("console=ttyS0 quiet vireo.modules=virtio_mmio,virtiofs")
        .through(&format!("{FOLDER}{host}"))
        .run_to_end()
        .success();
    assert!(ended.stdout.contains("entries 12000, doubles 0, others 2, removed 6000\n"), "{ended}");
    let facts = ["left", "behind the middle", "of the right type", "remove the rest"].map(|name| ended.fact(name));
    assert_eq!(facts, ["6000", "some", "6002", "ok"], "{ended}");
}

/// SOAK_EXECS commands (200), each under a kernel of its own, leave nothing behind: no process, file, folder or socket.
#[test]
fn commands_leave_nothing_behind() {
    let count: usize =
        std::env::var("SOAK_EXECS").map_or(200, |count| count.parse().expect("SOAK_EXECS must be a number"));
    let script = r#"
dir=$(mktemp -d /tmp/execs.XXXXXX) && cd "$dir" || exit
trap 'cd /; rm -rf "$dir"' EXIT
mkdir cache run tmp
export XDG_CACHE_HOME=$dir/cache XDG_RUNTIME_DIR=$dir/run TMPDIR=$dir/tmp
left() {
    ls -A /tmp /var/tmp /dev/shm /run; ls -AR cache run tmp
    pgrep -l 'vireo|exe|passt'; ls /proc/self/fd
}
sockets() { cat /proc/net/unix /proc/net/tcp /proc/net/udp | wc -l; }
touch before after
"$@" --share . -- true || exit
left >before
sockets=$(sockets) # other programs' sockets come and go
for n in $(seq "$SOAK_EXECS"); do
    options=$([ $((n % 10)) = 0 ] && echo --net user)
    "$@" --share . $options -- sh -c 'exit 5' </dev/null
    status=$?
    [ $status = 5 ] || { echo "run $n: status $status"; exit 1; }
    echo "run $n"
done
left >after
diff before after || { echo "something was left behind"; exit 1; }
[ $(sockets) -lt $((sockets + SOAK_EXECS / 4)) ] || { echo "of $sockets sockets $(sockets) were made"; exit 1; }
echo clean"#;
    let host = Run::exec(&[]).env(&format!("SOAK_EXECS={count}")).through(script).start();
    for n in (1..=count).step_by(10) {
        host.wait_for(&format!("run {n}\n"));
    }
    let ended = host.end();
    assert!(ended.code() == 0 && ended.stdout.ends_with("clean\n"), "{ended}");
}

/// A folder of a hundred thousand files, which another process removes while they are listed.
#[test]
fn a_folder_with_very_many_files_that_go() {
    let script = r#"
dir=$(mktemp -d /tmp/many.XXXXXX) && cd "$dir" || exit
trap 'cd /; rm -rf "$dir"' EXIT
mkdir files control
(cd files && seq 100000 | xargs touch)
(until [ -e control/listed ]; do sleep 0.1; done; rm -rf files; touch control/removed) &
"$@" --share files:/files --share control:/control:rw -- sh -c '
    ls /files | wc -l
    touch /control/listed
    until [ -e /control/removed ]; do ls -l /files >/dev/null 2>&1; done
    cat /files/1 2>&1
    exit 3'"#;
    let ended = Run::exec(&[]).args(&["--cwd", "/"]).through(script).run_to_end().expect(3, "exited");
    assert_eq!(ended.stdout, "100000\ncat: /files/1: No such file or directory\n", "{ended}");
}

/// Two simultaneous runs in one folder, which the host changes, too.
#[test]
fn a_folder_that_changes() {
    let script = r#"
dir=$(mktemp -d /tmp/changes.XXXXXX) && cd "$dir" || exit
trap 'cd /; rm -rf "$dir"' EXIT
mkdir files moved && seq -f files/%g 100 | xargs touch
guest() {
    me=$1; shift
    "$@" --share .:rw -- sh -c 'echo '$me' >ready.'$me'
        until [ -e go ]; do sleep 1; done
        for n in 1 2 3; do ls -lR . >/dev/null 2>&1; echo $n >one.'$me'; mv one.'$me' two.'$me'; done
        until [ -e end ]; do sleep 1; done
        for n in $(seq 20); do echo $n >kept.'$me'.$n; done; ls kept.'$me'.* | wc -l; ls files; cat two.'$me
}
guest a "$@" >a 2>&1 & a=$!
guest b "$@" >b 2>&1 & b=$!
for n in $(seq 1200); do [ -e ready.a ] && [ -e ready.b ] && break; sleep 0.1; done
touch go
for n in $(seq 50); do
    mv files/$n moved/new; rm files/$((n + 50)); mkdir files/d; mv moved files/d/; mv files/d/moved .; rmdir files/d
done
echo x >files/last; touch end
wait $a; echo "a: $?"; wait $b; echo "b: $?"
cat a b; ls | grep -c kept"#;
    let ended = Run::exec(&[]).through(script).run_to_end();
    assert_eq!((ended.code(), ended.stdout.as_str()), (0, "a: 0\nb: 0\n20\nlast\n3\n20\nlast\n3\n40\n"), "{ended}");
}

/// A GiB of a command's output arrives complete and unchanged.
#[test]
fn a_gibibyte_of_output() {
    let script = "yes \"$(seq -s , 1777)\" | head -c $((1 << 30))";
    let around = format!(
        r#"
count() {{ for n in 1 2 3 4 5 6 7 8; do head -c $((1 << 27)) | md5sum; done; [ -z "$(head -c 1)" ] || echo "too much"; }}
"$@" </dev/null | count
echo expected
{script} | count"#
    );
    let host = Run::exec(&["sh", "-c", script]).through(&around).start();
    // Each eighth has its own time limit.
    for n in 1..=16 {
        host.wait_until(|said| said.lines().filter(|line| line.ends_with(" -")).count() >= n);
    }
    let ended = host.end();
    let sums: Vec<&str> = ended.stdout.split("expected\n").collect();
    assert!(ended.code() == 0 && sums.len() == 2 && sums[0] == sums[1] && sums[0].lines().count() == 8, "{ended}");
}
