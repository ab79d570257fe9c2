//! Bad input to `vireo exec`: whatever is wrong with the kernel, the command, the folders or the streams, the run ends
//! with the right code and one sentence, and leaves nothing behind.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use crate::common::{Ended, Run, image, repo, run_into_time_limit, scratch, tool};

/// Returns vireo's own message, the last line on stderr.
fn sentence(ended: &Ended) -> &str {
    let last = ended.stderr.lines().last().unwrap_or_else(|| panic!("{ended}"));
    last.strip_prefix("vireo: ").unwrap_or_else(|| panic!("{ended}"))
}

/// Mistakes that the host can detect before there is a guest.
#[test]
fn what_is_not_there() {
    let dir = scratch();
    let text = dir.path().join("text");
    fs::write(&text, "no kernel, no folder\n").unwrap();
    let gone = dir.path().join("gone");
    let told = |run: Run, told: &str| {
        let ended = run.run_to_end();
        assert!(ended.code() == 125 && sentence(&ended).contains(told), "{told}: {ended}");
        assert_eq!(ended.stderr.lines().count(), 1, "{ended}");
    };
    let exec = || Run::exec(&["true"]);
    told(exec().args(&["--share", &gone.display().to_string()]), "cannot share ");
    told(exec().args(&["--share", &text.display().to_string()]), "Not a directory");
    told(exec().args(&["--root", &gone.display().to_string()]), "as the root: No such file");
    let (kernel, modules) = (image("bzImage-cloud"), repo("target/host/kernel-cloud"));
    told(Run::exec_with(&gone, &modules, &["true"]), "cannot open it: No such file");
    told(Run::exec_with(&text, &modules, &["true"]), "this is a text file; vireo boots ");
    told(Run::exec_with(&kernel, dir.path(), &["true"]), "its modules were not found; looked in ");
    let private = "mkdir -m 700 /tmp/private.$$; cd /tmp/private.$$; chmod 666 /dev/kvm; status=0
setpriv --reuid 4242 --regid 4242 --clear-groups \"$@\" --share . || status=$?; rmdir /tmp/private.$$; exit $status";
    told(exec().through(private), "Permission denied");
}

/// Kernels that do not get as far as the command.
#[test]
fn kernels_that_panic_or_have_no_drivers() {
    let ended = Run::exec(&["true"]).args(&["--append", "rdinit=/nosuch init=/nosuch"]).run_to_end();
    let ended = ended.expect(70, "panicked");
    assert!(sentence(&ended).starts_with("the guest kernel panicked (") && sentence(&ended).contains("): "), "{ended}");
    assert_eq!(ended.report["detail"], sentence(&ended));

    // A directory with the right name, and the modules of another kernel.
    let version = fs::read_to_string(repo("target/host/kernel-cloud/version")).unwrap();
    let other = fs::read_to_string(repo("target/host/kernel-full/version")).unwrap();
    let modules = scratch();
    let path = repo("target/host/kernel-full/lib/modules").join(other.trim());
    tool(&["cp", "-rl", &path.display().to_string(), &modules.path().join(version.trim()).display().to_string()]);
    let ended = Run::exec_with(&image("bzImage-cloud"), modules.path(), &["true"]).run_to_end();
    let ended = ended.expect(71, "lost");
    for part in ["no driver for virtio consoles", "cannot load the module /lib/modules/", "made for another kernel"] {
        assert!(sentence(&ended).contains(part), "{ended}");
    }
}

/// A kernel that waits for a root for ever and never reaches its init; a program for another machine; a working
/// directory that does not exist.
#[test]
fn what_never_starts() {
    let append = "rdinit=/nosuch root=/dev/nosuch rootwait";
    let waits = |limit: &str| Run::exec(&["true"]).args(&["--append", append, "--timeout", limit]);
    let (ended, limit) =
        run_into_time_limit(waits, |ended| ended.stderr.contains("] Waiting for root device /dev/nosuch..."));
    assert_eq!(sentence(&ended), format!("the guest was still running after the time limit of {limit}"));

    // The start of a program for ARM: as much of it as a kernel inspects.
    let run = Run::exec(&[]);
    let (program, mut elf) = (run.path("arm"), [0; 120]);
    elf[..20].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\xb7\0");
    fs::write(&program, elf).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let ended = run.args(&["--", &program]).run_to_end().expect(126, "not-started");
    let told = format!("cannot run {program} in the guest: Exec format error (os error 8) (another architecture, or ");
    assert!(sentence(&ended).starts_with(&told), "{ended}");

    let ended = Run::exec(&["true"]).args(&["--cwd", "/nosuch"]).run_to_end().expect(126, "not-started");
    assert_eq!(ended.stderr, "vireo: cannot start in /nosuch in the guest: No such file or directory (os error 2)\n");
}

/// A command that fills all file systems and the memory gets errors and signals. The guest's init survives that, and
/// the signals that the command sends to it.
#[test]
fn commands_that_use_up_everything() {
    let script = r#"
for signal in KILL STOP TERM SEGV HUP; do kill -$signal 1; done
for dir in / /dev/shm; do dd if=/dev/zero of=$dir/fill bs=1M 2>&1 | grep -o 'No space left on device'; done
sh -c 'tail /dev/zero'
echo "status: $?"
rm /fill /dev/shm/fill
echo "alive: $(cat /proc/self/oom_score_adj)"
for dir in / /dev/shm /run; do cat /dev/zero >$dir/fill; done 2>/dev/null
kill -9 $$"#;
    // Not /dev: the kernel gives devtmpfs no limit and lets none be set, so whoever fills it deadlocks any Linux.
    let ended = Run::exec(&["sh", "-c", script]).args(&["--memory", "192M"]).run_to_end().expect(137, "signalled");
    let full = "No space left on device\n";
    assert_eq!(ended.stdout, format!("{full}{full}status: 137\nalive: 0\n"), "{ended}");
}

/// A signal to vireo ends a fork bomb; a command that ignores signals is ended by the third.
#[test]
fn commands_that_will_not_end() {
    let bomb = Run::exec(&["bash", "-c", "echo ready; :(){ :|:; }; :"]).start();
    bomb.wait_for("ready");
    bomb.signal(15);
    assert_eq!(bomb.end().code(), 143);

    // The command also writes more to the kernel's console than is read.
    let script = "trap 'n=$((n + 1)); echo heard $n' TERM; yes >/dev/console & echo ready; while :; do sleep 0.1; done";
    let guest = Run::exec(&["sh", "-c", script]).start();
    guest.wait_for("ready");
    for heard in ["heard 1\n", "heard 2\n"] {
        guest.signal(15);
        guest.wait_for(heard);
    }
    guest.signal(15);
    let ended = guest.end().expect(143, "killed");
    assert_eq!(sentence(&ended), "stopped by signal 15 (SIGTERM)");
}

/// A command that is stopped, and one that reboots.
#[test]
fn commands_that_are_not_heard_of_any_more() {
    let ended = Run::exec(&["sh", "-c", "kill -STOP $$"]).args(&["--hang-timeout", "5s"]).run_to_end();
    assert_eq!(sentence(&ended.expect(72, "hung")), "the guest hung: no output and no CPU use for 5s");
    let ended = Run::exec(&["sh", "-c", "echo b >/proc/sysrq-trigger; sleep 1000"]).run_to_end().expect(71, "lost");
    assert_eq!(sentence(&ended), "the guest ended (rebooted) before the command did");
}

/// Streams that are closed, and a reader that leaves.
#[test]
fn streams_that_are_closed() {
    let closed = Run::exec(&["sh", "-c", "cat; echo out; echo err >&2; exit 3"]).through("\"$@\" <&- >&-");
    let closed = closed.run_to_end().expect(3, "exited");
    assert_eq!((closed.stdout.as_str(), closed.stderr.as_str()), ("", "err\n"), "{closed}");

    let gone = Run::exec(&["yes"]).through("\"$@\" </dev/null | head -n 1; exit ${PIPESTATUS[0]}").run_to_end();
    let gone = gone.expect(141, "signalled");
    assert_eq!((gone.stdout.as_str(), gone.stderr.as_str()), ("y\n", ""), "{gone}");

    // A process that a command leaves behind does not delay the end of vireo, however much it prints.
    let left = Run::exec(&["sh", "-c", "echo first; yes & exit 3"]).run_to_end().expect(3, "exited");
    assert!(left.stdout.starts_with("first\n"), "{left}");

    // When a full disk loses output, vireo reports that and not how the command ended.
    let full = Run::exec(&["sh", "-c", "echo err >&2; seq 1000000"]).through("\"$@\" >/dev/full");
    let full = full.run_to_end().expect(125, "output-lost");
    let why = "vireo: cannot write the command's output to stdout: No space left on device (os error 28)";
    assert_eq!(full.stderr, format!("err\n{why}\n"));
}

/// A vireo that is killed leaves nothing behind: no file, no socket, no process.
#[test]
fn killed_with_a_guest_running() {
    let script = r#"
dir=$(mktemp -d /tmp/killed.XXXXXX) && cd "$dir" || exit
trap 'cd /; rm -rf "$dir"' EXIT
mkdir run
export XDG_RUNTIME_DIR=$dir/run TMPDIR=$dir/run
count() { ls -A /tmp /dev/shm /run run "$XDG_CACHE_HOME/vireo"; grep -c '[^:]$' /proc/net/unix; pgrep -c 'vireo|exe|passt'; }
touch before after
"$@" --share . --cwd / -- true || exit
touch ready
count >before
rm ready
"$@" --share .:rw -- sh -c 'touch ready; sleep 1000' & pid=$!
for n in $(seq 1200); do [ -e ready ] && break; sleep 0.1; done
kill -9 $pid
wait $pid
echo "status: $?"
for n in $(seq 100); do count >after; cmp -s before after && break; sleep 0.1; done
diff before after && echo "nothing remains""#;
    let ends = |run: Run| {
        let ended = run.args(&["--net", "user"]).through(script).run_to_end();
        assert!(ended.code() == 0 && ended.stdout.ends_with("status: 137\nnothing remains\n"), "{ended}");
    };
    ends(Run::exec(&[]));
    let matrix = Run::exec(&[]);
    let file = matrix.path("matrix.toml");
    fs::write(&file, "jobs = 1\n").unwrap();
    ends(matrix.args(&["--matrix", &file]));
}
