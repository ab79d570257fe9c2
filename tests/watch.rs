//! Flags that watch a guest: what its console must and must not show, when it counts as hung, and what is kept of it.

use std::fs;

use crate::guests::vireo::{Ended, folder, run};
use crate::guests::{POWER_OFF, elf, text, writes};

/// A guest that prints this and powers off.
fn says(said: &str, args: &[&str]) -> Ended {
    run(&writes(&[&text(said)[..], &[POWER_OFF]].concat()), args)
}

#[test]
fn a_line_that_is_expected_is_success_and_its_absence_is_not() {
    let endless = |said: &str, args: &[&str]| run(&[writes(&text(said))].concat(), args);
    endless("booting\ntests: 12 ok\nmore\n", &["--expect", "^tests: \\d+ ok$"])
        .expect(0)
        .says("vireo: the console showed an expected line: tests: 12 ok\n");
    says("no newline: ok", &["--expect", "never", "--expect", "ok$"]).expect(0).says("expected line: no newline: ok");
    says("tests: none ok\n", &["--expect", "^tests: \\d+ ok$"])
        .expect(73)
        .says("vireo: the guest ended (powered-off) before the console showed an expected line\n");
}

#[test]
fn a_line_that_must_not_be_is_told() {
    let ended = says("fine\nBUG: oops\nok\n", &["--fail-on", "BUG|Oops", "--expect", "ok"]);
    assert_eq!(ended.stderr, "vireo: the console showed a forbidden line: BUG: oops\n");
    ended.expect(73);
    says("fine\n", &["--fail-on", "BUG"]).expect(0);
}

#[test]
fn a_panic_is_a_panic_unless_it_was_expected() {
    let panic = "Kernel panic - not syncing: VFS\n";
    says(panic, &["--fail-on", "panic"]).expect(70);
    says(panic, &["--expect", "panic"]).expect(0);
    says(panic, &["--expect", "success"]).expect(70).says("CPL 0, interrupts off");
}

#[test]
fn a_guest_that_only_waits_hangs() {
    let (_folder, path) = folder();
    let report = path.join("report");
    let args = ["--hang-timeout", "2s", "--cpus", "2", "--report", report.to_str().unwrap()];
    let ended = run(&elf(crate::guests::sleep()), &args).expect(72);
    let ended =
        ended.says("vireo: the guest hung: no output and no CPU use for 2s\n").says("vCPU 0: CPL 0, interrupts on");
    assert!(ended.stderr.contains("vCPU 1: not started\n"), "{}", ended.stderr);
    let report: serde_json::Value = serde_json::from_slice(&fs::read(report).unwrap()).unwrap();
    assert_eq!(report["outcome"], "hung");
    assert_eq!(report["registers"].as_array().unwrap().len(), 2);
}

#[test]
fn lines_of_the_console_are_logged_with_their_times() {
    let (_folder, path) = folder();
    let log = path.join("log");
    says("one\ntwo", &["--console-log", log.to_str().unwrap(), "--serial", "null"]).expect(0);
    let lines = fs::read_to_string(log).unwrap();
    let lines: Vec<(f64, &str)> = lines
        .lines()
        .map(|line| line.trim_start().split_once(' ').unwrap())
        .map(|(time, line)| (time.parse().unwrap(), line))
        .collect();
    assert_eq!(lines.iter().map(|(_, line)| *line).collect::<Vec<_>>(), ["one", "two"]);
    assert!(lines[0].0 > 0.0 && lines[0].0 <= lines[1].0, "{lines:?}");
}

#[test]
fn a_guest_without_a_kernel_s_log_leaves_its_console_s() {
    let said = "one\ntwo\nKernel panic - not syncing: VFS\n";
    let last = "the last lines of the guest's log:\none\ntwo\nKernel panic - not syncing: VFS\n";
    says(said, &["--serial", "null"]).expect(70).says(last);
    let shown = says(said, &[]).expect(70);
    assert!(!shown.stderr.contains("last lines"), "{}", shown.stderr);
}

#[test]
fn quiet_is_quiet_but_for_failures() {
    let panic = "Kernel panic - not syncing: VFS\n";
    for (said, args, code) in [("hi\n", &["--quiet", "--boot-timing"], 0), (panic, &["-q", "--boot-timing"], 70)] {
        let ended = says(said, args).expect(code);
        assert_eq!((&ended.stdout[..], &ended.stderr[..]), (said.as_bytes(), ""));
    }
    says("", &["--quiet", "--vmcore", "/nowhere/core"]).expect(125).says("cannot write /nowhere/core: No such file");
}

#[test]
fn a_core_file_comes_of_bad_ends_only_and_whole_or_not_at_all() {
    let (_folder, path) = folder();
    let core = path.join("core");
    let args = ["--vmcore", core.to_str().unwrap()];
    says("fine\n", &args).expect(0);
    assert!(!core.exists());
    let panic = "Kernel panic - not syncing: VFS\n";
    says(panic, &args).expect(70).says(&format!("vireo: the guest's memory is in {}\n", core.display()));
    assert_eq!(&fs::read(&core).unwrap()[..4], b"\x7FELF");
    fs::remove_file(&core).unwrap();
    // A core file that the file system refuses is reported, and the outcome is still the guest's.
    let kernel = crate::guests::vireo::Kernel::new(&writes(&text(panic)));
    let vireo = kernel.command(&args);
    let mut limited = std::process::Command::new("bash");
    limited.args(["-c", "ulimit -f 1; exec \"$@\"", "bash"]).arg(vireo.get_program()).args(vireo.get_args());
    limited.env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"));
    let ended = crate::guests::vireo::Running::start(limited).end().expect(70);
    ended.says(&format!("vireo: cannot write {}: File too large", core.display()));
    assert_eq!(fs::read_dir(path).unwrap().count(), 0);
}
