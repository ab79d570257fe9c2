//! `vireo exec`: a command under a stock kernel behaves as on the host, apart from the kernel; and however it ends, its
//! caller learns about it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::common::{Run, on_host, on_terminal, run_into_time_limit, tool};

/// The command's streams arrive byte for byte and separately, and so do its exit code and its surroundings; what it
/// writes to the root is discarded with the guest.
#[test]
fn as_on_the_host_but_for_the_kernel() {
    let script = r#"
head -c 300000 | md5sum >&2
echo "$(uname -r) $(id -u) $(pwd) $FOO $PATH" >&2
seq 1000000 1040000
mkdir /etc/written-by-a-test && echo x >/etc/written-by-a-test/file && cat /etc/written-by-a-test/file >&2
exit 42"#;
    let run = Run::exec(&["sh", "-c", script]);
    let path = run.path("");
    let mut guest = run.args(&["--env", "FOO=a b", "--env", "NOSUCH", "--cwd", &path]).start();
    let input: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8 ^ (i >> 8) as u8).collect();
    guest.send(&input);
    guest.close_input();
    let ended = guest.end().expect(42, "exited");
    let numbers: String = (1_000_000..=1_040_000).map(|n| format!("{n}\n")).collect();
    assert!(ended.stdout == numbers, "got {} bytes instead of {}", ended.stdout.len(), numbers.len());
    let lines: Vec<&str> = ended.stderr.lines().collect();
    let [sum, about, file] = lines[..] else { panic!("{ended}") };
    let scratch = crate::common::scratch();
    let copy = scratch.path().join("input");
    fs::write(&copy, &input).unwrap();
    let expected = tool(&["md5sum", &copy.display().to_string()]);
    assert_eq!(sum.split(' ').next(), expected.split(' ').next(), "{ended}");
    assert!(
        about.contains("-cloud-amd64 0 ") && about.contains(&format!(" {} a b /", path.trim_end_matches('/'))),
        "{about}"
    );
    assert_eq!(file, "x");
    assert_eq!(on_host(&["test", "-e", "/etc/written-by-a-test"]).end().code(), 1, "it reached the host");
}

/// Only /dev/kvm needs any privilege. A folder that may be written to belongs to the caller.
#[test]
fn an_ordinary_user() {
    let as_user = r#"set -e
chmod 666 /dev/kvm
dir=$(mktemp -d /tmp/exec.XXXXXX)
trap 'rm -r "$dir"' EXIT
chown 4242:4242 "$dir"
cd "$dir"
export XDG_CACHE_HOME=$dir/cache
status=0
setpriv --reuid=4242 --regid=4242 --clear-groups "$@" || status=$?
stat -c '%u %n' shared/out >&2
exit $status"#;
    let script = r#"set -e
cat /etc/hostname >/dev/null
! cat /etc/shadow 2>/dev/null
echo changed >/usr/bin/true-test
echo "from the guest" >/mnt/folder/out
! touch /read-only/x 2>/dev/null
ls /read-only/vireo >/dev/null
cat shared/out"#;
    // The first command in the wrapper creates the folder, where the user may do so.
    let wrapper = as_user.replace("export", "mkdir shared && chown 4242 shared\nexport");
    let run = Run::exec(&["sh", "-c", script]).through(&wrapper);
    fs::set_permissions(run.dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let read_only = format!("{}:/read-only:ro", crate::common::vireo().parent().unwrap().display());
    let ended = run.args(&["--share", "shared:/mnt/folder:rw", "--share", &read_only]).run_to_end();
    assert_eq!((ended.code(), ended.stdout.as_str()), (0, "from the guest\n"), "{ended}");
    assert_eq!(ended.stderr, "4242 shared/out\n", "{ended}");
}

#[test]
fn what_cannot_be_started_and_what_is_killed() {
    let ended = Run::exec(&["no-such-command"]).run_to_end().expect(127, "not-started");
    assert_eq!(
        ended.stderr,
        "vireo: cannot run no-such-command in the guest: No such file or directory (os error 2)\n"
    );

    // A signal to vireo is sent to the command, which may handle it as it likes, and to none of its children.
    let script = r#"trap 'echo heard; kill -USR1 $child; wait $child; exit 7' TERM
sh -c 'trap "echo child" TERM; trap "echo end; exit" USR1; echo ready; while :; do sleep 0.1; done' &
child=$!
echo here
while :; do sleep 0.1; done"#;
    let guest = Run::exec(&["sh", "-c", script]).start();
    guest.wait_until(|shown| shown.contains("ready") && shown.contains("here"));
    guest.signal(15);
    let ended = guest.end().expect(7, "exited");
    assert!(ended.stdout.ends_with("heard\nend\n") && !ended.stdout.contains("child"), "{ended}");
    assert_eq!(ended.stderr, "", "{ended}");
}

/// A signal that arrives while the kernel boots waits for the command.
#[test]
fn a_signal_before_the_command_runs() {
    let script = "trap 'echo heard; exit 7' INT; while :; do sleep 0.1; done";
    // A command that is killed at its first instruction prints nothing; one that had time to set its trap prints
    // everything. A kernel that the signal had stopped would be reported as such.
    let guest = Run::exec(&["sh", "-c", script]).args(&["--verbose"]).start();
    guest.wait_for_stderr("Linux version");
    guest.signal(2);
    let ended = guest.end();
    assert!(matches!(ended.code(), 130 | 7), "{ended}");
    assert!(matches!(ended.report["outcome"].as_str(), Some("signalled" | "exited")), "{ended}");
}

/// A script's loop keeps its own input, and variables of test runners reach the command.
#[test]
fn in_scripts_and_under_test_runners() {
    let run = Run::exec(&["sh", "-c", "cat; echo \"$line $CARGO_MANIFEST_DIR ${MY_TOKEN-none} $(pwd)\""]);
    let wrapper = r#"set -e
chmod 666 /dev/kvm
dir=$(mktemp -d /tmp/runner.XXXXXX)
trap 'rm -r "$dir"' EXIT
chmod 755 "$dir"
mkdir "$dir/cache"
chown 4242:4242 "$dir/cache"
cd "$dir"
export XDG_CACHE_HOME=$dir/cache CARGO_MANIFEST_DIR=/src MY_TOKEN=secret
printf 'one\ntwo\n' | while read -r line; do
    export line
    setpriv --reuid=4242 --regid=4242 --clear-groups "$@"
done"#;
    fs::set_permissions(run.dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let ended = run.args(&["-n"]).through(wrapper).run_to_end().expect(0, "exited");
    let lines: Vec<Vec<&str>> = ended.stdout.lines().map(|line| line.split(' ').collect()).collect();
    let [one, two] = &lines[..] else { panic!("{ended}") };
    assert_eq!((&one[..3], &two[..3]), (&["one", "/src", "none"][..], &["two", "/src", "none"][..]), "{ended}");
    assert!(one[3].starts_with("/tmp/runner."), "{ended}");
}

/// A kernel that panics under the command, a command that never ends, and one that takes the machine down.
#[test]
fn however_it_ends() {
    let panicked = Run::exec(&["sh", "-c", "echo before; sleep 1; echo c >/proc/sysrq-trigger"])
        .run_to_end()
        .expect(70, "panicked");
    assert_eq!(panicked.stdout, "before\n");
    assert!(panicked.stderr.contains("sysrq triggered crash"), "the last lines of the kernel: {panicked}");

    let late = |limit: &str| Run::exec(&["sh", "-c", "echo begun; sleep 1000"]).args(&["--timeout", limit, "--quiet"]);
    let (late, _) = run_into_time_limit(late, |ended| !ended.stdout.is_empty());
    assert_eq!((late.stdout.as_str(), late.stderr.as_str()), ("begun\n", ""));

    let gone = Run::exec(&["sh", "-c", "echo o >/proc/sysrq-trigger; sleep 1000"]).run_to_end();
    assert!(gone.expect(71, "lost").stderr.ends_with("before the command did\n"));
}

/// The kernel's console is watched in addition to the command's exit code.
#[test]
fn the_console_is_watched() {
    let run = |flags: &[&str], script: &str| Run::exec(&["sh", "-c", script]).args(flags).run_to_end();
    let refused = run(&["--fail-on", "^.*made (up|in)"], "echo '<6>made up' >/dev/kmsg").expect(73, "refused");
    assert!(refused.stderr.ends_with("made up\n"), "{refused}");
    let missed = run(&["--expect", "never"], "true").expect(73, "missed");
    assert!(missed.stderr.contains("the guest ended (exited) before the console showed"), "{missed}");
    let killed = run(&["--expect", "made up"], "echo '<6>made up' >/dev/kmsg; sleep 1000").expect(0, "expected");
    assert_eq!(killed.stdout, "");
}

/// On a terminal: a shell with job control, the window's size, and Ctrl-C for the foreground job.
#[test]
fn a_shell_on_a_terminal() {
    let run = Run::exec(&["sh", "-i"]).env("TERM=dumb").env("PS1=$ ");
    let mut guest = run.start_on_terminal(on_terminal);
    guest.wait_for("$ "); // the prompt of the environment
    guest.send(b"echo tty: $(tty) $(stty size)\n");
    guest.wait_for("tty: /dev/pts/");
    guest.send(b"sh -c 'echo foreground-$((40 + 2)); exec sleep 1000'\n");
    guest.wait_for("foreground-42"); // until then, Ctrl-C would go to the shell
    guest.send(b"\x03");
    guest.send(b"echo alive-$((40 + 2))\n");
    guest.wait_for("alive-42");
    guest.send(b"exit 5\n");
    assert_eq!(guest.end().code(), 5);

    // Errors that are redirected are not mixed with the terminal's output.
    let run = Run::exec(&["sh", "-c", "tty; echo err >&2; exit 6"]);
    let errors = run.path("errors");
    let guest =
        run.through(&format!("\"$@\" 2>{errors}; echo \"$? and $(cat {errors})\"")).start_on_terminal(on_terminal);
    guest.wait_for("6 and err");
    assert!(guest.end().stdout.starts_with("/dev/pts/"));
}

/// Other roots: a lone busybox, with a network; and an image of a file system, which keeps what is written only if that
/// is allowed.
#[test]
fn other_roots() {
    let script =
        "busybox | head -n 1 >&2; cat /etc/resolv.conf; ifconfig eth0 | grep -o 'inet addr:[0-9.]*'; ls /vireo";
    let bare = Run::exec(&["sh", "-c", script]).args(&["--root", "initramfs", "--net", "user"]).run_to_end();
    let bare = bare.expect(0, "exited");
    assert!(bare.stdout.contains("nameserver ") && bare.stdout.contains("inet addr:"), "{bare}");
    assert!(bare.stderr.starts_with("BusyBox v"), "{bare}");

    let dir = crate::common::scratch();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let make = r#"mkdir -p "$0/bin" && cp "$(command -v busybox)" "$0/bin/busybox" && ln -s busybox "$0/bin/sh" &&
truncate -s 16M "$1" && PATH=$PATH:/sbin:/usr/sbin mke2fs -q -t ext4 -d "$0" "$1""#;
    tool(&["sh", "-c", make, &path("tree"), &path("image")]);
    let write = "busybox echo kept >/file; busybox mount | busybox grep ' / '";
    for (options, kind) in [(&[][..], "overlay"), (&["--rw"][..], "ext4")] {
        let run = Run::exec(&["/bin/sh", "-c", write]).args(&["--root", &path("image")]).args(options);
        assert!(run.run_to_end().expect(0, "exited").stdout.contains(&format!("type {kind}")));
    }
    assert_eq!(tool(&["debugfs", "-R", "cat /file", &path("image")]), "kept\n");
}

/// A command under two configurations side by side, which finds the modules that the kernel's package contains.
#[test]
fn a_matrix() {
    let run = Run::exec(&["sh", "-c", "modprobe dummy && nproc && exit $(($(nproc) - 1))"]);
    let kept = crate::common::scratch();
    let (file, junit) = (run.path("matrix.toml"), kept.path().join("junit.xml").display().to_string());
    fs::write(&file, "jobs = 2\n[configs.one]\n[configs.two]\ncpus = 2\n").unwrap();
    let output = kept.path().join("output").display().to_string();
    let ended = run.args(&["--matrix", &file, "--junit", &junit, "--output-dir", &output]).run_to_end();
    assert_eq!(ended.code(), 1, "{ended}");
    let lines: Vec<Vec<&str>> = ended.stdout.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["RUN", "RESULT", "CODE", "TIME"], "{ended}");
    assert_eq!((&lines[1][..3], &lines[2][..3]), (&["one", "exited", "0"][..], &["two", "exited", "1"][..]), "{ended}");
    assert_eq!(lines[3], ["2", "runs,", "1", "failed"], "{ended}");
    assert_eq!(ended.report["exit_code"], 1);
    assert_eq!(ended.report["runs"][0]["report"]["outcome"], "exited", "{ended}");
    let junit = fs::read_to_string(&junit).unwrap();
    for file in ["one.log", "one.json", "two.log", "two.json"] {
        assert!(kept.path().join("output").join(file).exists(), "{file}: {ended}");
    }
    for part in ["tests=\"2\" failures=\"1\"", "<system-out>1\n</system-out>", "message=\"the command exited with 1\""]
    {
        assert!(junit.contains(part), "{junit}");
    }
}

/// A guest that hangs gets another attempt; a debugger may inspect it in the meantime.
#[test]
fn a_second_attempt() {
    let script =
        "grep -o nokaslr /proc/cmdline; [ -e /folder/been-here ] || { touch /folder/been-here; kill -STOP $$; }";
    let run = Run::exec(&["sh", "-c", script]);
    let (folder, socket) = (format!("{}:/folder:rw", run.path("")), format!("unix:/tmp/gdb.{}", std::process::id()));
    let watch = ["--hang-timeout", "3s", "--retry-on-hang", "2", "--gdb", &socket, "--share", &folder];
    let ended = run.args(&watch).run_to_end().expect(0, "exited");
    assert_eq!((ended.stdout.as_str(), &ended.report["attempts"]), ("nokaslr\nnokaslr\n", &2.into()), "{ended}");
    assert!(ended.stderr.contains("vireo: restarting the guest (attempt 2 of 3)\n"), "{ended}");
}

/// Links that guests plant in a folder that they write to divert no output: neither that of their own run, nor of the
/// next one in the same matrix, nor of the whole matrix, nor of a later vireo.
#[test]
fn planted_links() {
    let (kept, shared) = (crate::common::scratch(), crate::common::scratch());
    let victim = kept.path().join("victim");
    fs::write(&victim, "precious").unwrap();
    let at = |name: &str| shared.path().join(name).display().to_string();
    let script = format!(
        "cd /folder && for name in all.xml out/two.log out/two.json planted; do
         ln -sfn {} $name; done && echo planted",
        victim.display()
    );
    let folder = format!("{}:/folder:rw", at(""));
    let run = Run::exec(&["sh", "-c", &script]);
    let file = run.path("matrix.toml");
    fs::write(&file, "jobs = 1\n[configs.one]\n[configs.two]\n").unwrap();
    let run = run.args(&["--matrix", &file, "--output-dir", &at("out"), "--junit", &at("all.xml"), "--share", &folder]);
    let ended = run.run_to_end();
    assert_eq!(ended.code(), 0, "{ended}");
    for (name, part) in [("all.xml", "<testsuites"), ("out/one.json", "exited"), ("out/two.json", "exited")] {
        let file = Path::new(&at(name)).to_path_buf();
        assert!(!file.is_symlink() && fs::read_to_string(file).unwrap().contains(part), "{name}: {ended}");
    }
    // The second run's guest replaced its own log, which was open by then, with a link.
    assert!(Path::new(&at("out/two.log")).is_symlink(), "{ended}");
    let later = Run::exec(&["true"]).args(&["--console-log", &at("planted"), "--share", &folder]).run_to_end();
    assert_eq!(later.code(), 125, "{later}");
    assert!(later.stderr.contains("is a symbolic link in"), "{later}");
    assert_eq!(fs::read_to_string(victim).unwrap(), "precious");
}

/// Checks that the root under the overlay shows files and folders that the host replaces, removes and creates: after a
/// second, or as soon as a command is typed. No access fails as stale, and directories keep their inode numbers.
fn sees_what_the_host_replaces(kernel: &str) {
    let host = |talk: &str| {
        format!(
            r#"
dir=/tmp/vireo-replaced-{kernel}; rm -rf $dir; mkdir $dir; trap 'rm -rf $dir' EXIT
(
    cd $dir
    mkdir tree turns; echo 'echo old' >script; echo old >tree/file; echo x >gone; ln -s script link; echo old >rewritten
    touch {talk}/ready
    n=0; until [ -e {talk}/seen ]; do sleep 0.1; n=$((n + 1)); [ $n -lt 1800 ] || exit; done
    echo 'echo new' >script.new; mv script.new script
    rm -r tree; mkdir tree; echo new >tree/file
    rm gone; echo new >missing; echo new >rewritten
    ln -s rewritten link.new; mv -T link.new link
    rmdir turns; echo new >turns
    touch {talk}/changed
) &
"$@""#
        )
    };
    let script = r#"
d=/tmp/vireo-replaced-KERNEL
until [ -e /talk/ready ]; do sleep 0.1; done
all() { sh $d/script; cat $d/tree/file $d/gone $d/missing $d/link $d/rewritten; cat $d/turns; }
echo "before: $(all 2>/dev/null | tr '\n' ' ')"
number=$(stat -c %i /usr /usr/bin $d)
touch /talk/seen
until [ -e /talk/changed ]; do all >/dev/null 2>>/errors; sleep 0.05; done
n=0
while [ "$(all 2>>/errors | tr -d '\n')" != newnewnewnewnewnew ] && [ $n -lt 300 ]; do sleep 0.1; n=$((n + 1)); done
echo "after: $(all 2>&1 | tr '\n' ' ')"
echo "stale: $(grep -c Stale /errors)"
sleep 2.5
[ "$number" = "$(stat -c %i /usr /usr/bin $d)" ] && echo "numbers: same""#;
    let script = &script.replace("KERNEL", kernel);
    let image = crate::common::image(&format!("bzImage-{kernel}"));
    let run =
        Run::exec_with(&image, &crate::common::repo(&format!("target/host/kernel-{kernel}")), &["sh", "-c", script]);
    let talk = run.path("talk");
    fs::create_dir(&talk).unwrap();
    let ended = run.args(&["--share", &format!("{talk}:/talk:rw")]).through(&host(&talk)).run_to_end();
    let ended = ended.expect(0, "exited");
    assert_eq!(ended.fact("before").trim_end(), "old old x echo old old", "{ended}");
    let after = ended.fact("after").trim_end();
    assert_eq!(
        after,
        format!("new new cat: /tmp/vireo-replaced-{kernel}/gone: No such file or directory new new new new"),
        "{ended}"
    );
    assert_eq!((ended.fact("stale"), ended.fact("numbers")), ("0", "same"), "{ended}");
}

#[test]
fn what_the_host_replaces_is_seen() {
    sees_what_the_host_replaces("cloud");
}

#[test]
fn what_the_host_replaces_is_seen_by_5_10() {
    sees_what_the_host_replaces("cloud-5.10");
}

#[test]
fn what_the_host_replaces_is_seen_by_6_12() {
    sees_what_the_host_replaces("cloud-6.12");
}

#[test]
fn what_the_host_replaces_is_seen_by_the_newest() {
    sees_what_the_host_replaces("cloud-sid");
}

/// A command that is typed after a change on the host sees the change without a wait.
#[test]
fn a_script_is_edited_between_two_runs() {
    let run = Run::exec(&["sh", "-i"]).env("TERM=dumb").env("PS1=$ ");
    let talk = run.path("talk");
    fs::create_dir(&talk).unwrap();
    let host = format!(
        r#"
dir=/tmp/vireo-edited; rm -rf $dir; mkdir $dir; trap 'rm -rf $dir' EXIT
(
    for n in 1 2 3; do
        echo "echo round-\$(({n} + $n))" >$dir/script.new; mv $dir/script.new $dir/script
        echo $n >{talk}/made; i=0
        until [ -e {talk}/next-$n ]; do sleep 0.1; i=$((i + 1)); [ $i -lt 1800 ] || exit; done
    done
) &
"$@""#,
        n = 40
    );
    let run = run.args(&["--share", &format!("{talk}:/talk:rw")]).through(&host);
    let mut guest = run.start_on_terminal(on_terminal);
    guest.wait_for("# ");
    for n in 1..=3 {
        let wait = format!("until [ \"$(cat /talk/made)\" = {n} ]; do sleep 0.1; done; echo made-$((50 + {n}))\n");
        guest.send(wait.as_bytes());
        guest.wait_for(&format!("made-{}", 50 + n));
        guest.send(b"sh /tmp/vireo-edited/script\n");
        guest.wait_for(&format!("round-{}", 40 + n));
        guest.send(format!("touch /talk/next-{n}\n").as_bytes());
    }
    guest.send(b"exit 0\n");
    assert_eq!(guest.end().code(), 0);
}

/// Surroundings that programs expect: the kernel's interfaces, modules beside a kernel, the links of NixOS in /run. A
/// caller other than root gets a home, and a working directory that can be entered but not read.
#[test]
fn surroundings() {
    let host = r#"
ln -sfn /usr /run/current-system
ln -sfn /run/elsewhere /run/inside
chmod 666 /dev/kvm
dir=$(mktemp -d /tmp/exec.XXXXXX)
trap 'rm -r "$dir" /run/current-system /run/inside' EXIT
mkdir -p $dir/cache $dir/shut/open $dir/home
chown 4242 $dir/cache $dir/home
chmod 755 $dir; chmod 711 $dir/shut
cd $dir/shut
export XDG_CACHE_HOME=$dir/cache
for home in $dir/home /root /nonexistent; do
    HOME=$home setpriv --reuid=4242 --regid=4242 --clear-groups "$@" || exit
done"#;
    let script = r#"
for kind in cgroup2 debugfs tracefs securityfs bpf; do
    ! grep -qw $kind /proc/filesystems || grep -q " $kind " /proc/mounts || echo "missing $kind"
done
ls /run/current-system/bin >/dev/null || echo "no current-system"
! ls -d /run/inside 2>/dev/null
modprobe dummy || echo "no module"
cd; echo content >file && ls >/dev/null || echo "no home"
echo "$OLDPWD $(pwd)""#;
    let run = Run::exec(&["sh", "-c", script]).through(host);
    fs::set_permissions(run.dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let ended = run.run_to_end();
    assert_eq!(ended.code(), 0, "{ended}");
    let lines: Vec<Vec<&str>> = ended.stdout.lines().map(|line| line.split(' ').collect()).collect();
    assert_eq!(lines.len(), 3, "{ended}");
    assert!(lines.iter().all(|line| line.len() == 2 && line[0].ends_with("/shut")), "{ended}");
    assert!(lines[0][1].ends_with("/home"), "{ended}");
    assert_eq!((lines[1][1], lines[2][1]), ("/run/vireo/home", "/run/vireo/home"), "{ended}");
    assert_eq!(ended.stderr, "", "{ended}");
}

/// A working directory that the guest does not have is reported as missing.
#[test]
fn a_working_directory_that_is_hidden() {
    let ended = Run::exec(&["pwd"]).through("mkdir -p /run/hidden && cd /run/hidden && \"$@\"").run_to_end();
    let ended = ended.expect(0, "exited");
    assert_eq!(ended.stdout, "/\n", "{ended}");
    assert!(ended.stderr.contains("cannot start in /run/hidden in the guest: No such file"), "{ended}");
}

/// Modules that are found beside a kernel, and not in the host's own directory, can be loaded by name.
#[test]
fn modules_beside_a_kernel() {
    let script = r#"
kernel=$(ls "$1"/boot/vmlinuz-* | head -n 1)
version=${kernel##*/vmlinuz-}
! ls -d "/lib/modules/$version" 2>/dev/null || echo "the host has them"
"$0" exec --kernel "$kernel" -- sh -c 'modprobe dummy && grep -c ^dummy /proc/modules && ls -d /lib/modules/$(uname -r)'"#;
    let (vireo, package) = (crate::common::vireo(), crate::common::repo("target/host/kernel-cloud"));
    let (vireo, package) = (vireo.display().to_string(), package.display().to_string());
    let ended = on_host(&["bash", "-c", script, &vireo, &package]).end();
    let lines: Vec<&str> = ended.stdout.lines().collect();
    assert_eq!((ended.code(), lines.len(), lines[0]), (0, 2, "1"), "{ended}");
    assert!(lines[1].starts_with("/lib/modules/"), "{ended}");
}
