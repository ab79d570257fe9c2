//! The exit status, the last line on stderr and the report agree on how a guest ended.

use crate::common::{Ended, Run};

/// Runs a guest to its end, and checks its exit status, outcome and part of its sentence.
fn ends(run: Run, code: i32, outcome: &str, detail: &str) -> Ended {
    let ended = run.run_to_end().expect(code, outcome);
    check_report(&ended, detail);
    ended
}

fn check_report(ended: &Ended, detail: &str) {
    let report = &ended.report;
    let sentence = report["detail"].as_str().unwrap();
    assert!(sentence.contains(detail), "{ended}");
    assert!(ended.stderr.contains(&format!("vireo: {sentence}\n")), "{ended}");
    assert!(report["kernel"].as_str().unwrap().len() > 5, "{ended}");
    assert!(report["duration"].as_f64().unwrap() > 0.0, "{ended}");
    assert!(report["peak_memory"].as_u64().unwrap() > 1 << 20, "{ended}");
    let (exits, mut sum) = (&report["exits"], 0);
    for reason in ["pio_in", "pio_out", "mmio_read", "mmio_write", "interrupted", "other"] {
        sum += exits[reason].as_u64().unwrap_or_else(|| panic!("no {reason}: {ended}"));
    }
    assert_eq!(exits["total"].as_u64(), Some(sum), "{ended}");
    assert!(exits["coalesced"].is_u64(), "{ended}");
    let mut last = 0.0;
    for mark in ["kvm_ready", "kernel_loaded", "first_instruction", "init_started"] {
        let when = report["boot_timing"][mark].as_f64().unwrap_or_else(|| panic!("no {mark}: {ended}"));
        assert!(when >= last, "{mark} is earlier than the mark before it: {ended}");
        last = when;
    }
}

fn cloud(script: &str) -> Run {
    Run::new("bzImage-cloud", script)
}

#[test]
fn poweroff_with_boot_timing() {
    let ended = ends(cloud("poweroff -f").args(&["--boot-timing"]), 0, "powered-off", "powered off");
    let moments =
        ["process start", "KVM ready", "kernel loaded", "first guest instruction", "first serial byte", "init started"];
    for moment in moments {
        let line =
            ended.stderr.lines().find(|l| l.starts_with(moment)).unwrap_or_else(|| panic!("no {moment}: {ended}"));
        // A quiet guest may have printed nothing at all.
        assert!(line.ends_with(" ms") || moment == "first serial byte", "{ended}");
    }
}

#[test]
fn a_guest_that_halts_for_good_is_noticed() {
    ends(cloud("halt -f"), 0, "halted", "every vCPU sleeps");
    ends(cloud("halt -f").args(&["--cpus", "2"]), 0, "halted", "every vCPU sleeps");
}

#[test]
fn a_guest_that_only_waits_is_not_taken_for_halted() {
    // Long enough for several checks for sleeping vCPUs.
    cloud("sleep 3").args(&["--cpus", "2"]).run_to_end().success();
}

#[test]
fn reboot_plain() {
    ends(cloud("reboot -f"), 0, "rebooted", "");
}

#[test]
fn reboot_by_each_way() {
    for (way, detail) in [("a", "ACPI reset register"), ("k", "keyboard controller"), ("t", "triple fault")] {
        let run = cloud("reboot -f").cmdline(&format!("console=ttyS0 quiet reboot={way} vireo.modules=none"));
        ends(run.args(&["--cpus", "2"]), 0, "rebooted", detail);
    }
}

const PANIC: &str = "echo c >/proc/sysrq-trigger";

#[test]
fn panic_with_and_without_the_pvpanic_driver() {
    ends(cloud(PANIC), 70, "panicked", "pvpanic");
    let run = cloud(PANIC).cmdline("console=ttyS0 quiet vireo.modules=none");
    ends(run, 70, "panicked", "console");
}

#[test]
fn panic_that_reboots_is_a_panic_all_the_same() {
    let run = cloud(PANIC).cmdline("console=ttyS0 quiet panic=1").args(&["--cpus", "2"]);
    ends(run, 70, "panicked", "pvpanic");
}

/// On AMD processors only the log distinguishes a reboot and a panic from a crash; on others, a panic looks like a
/// reboot.
#[test]
fn without_a_console_the_kernels_log_tells_a_reboot_and_a_panic_from_a_crash() {
    let run = cloud("reboot -f").cmdline("quiet reboot=t vireo.modules=none");
    ends(run.args(&["--cpus", "2"]), 0, "rebooted", "triple fault");
    let run = cloud(PANIC).cmdline("quiet reboot=t panic=-1 vireo.modules=none");
    ends(run, 70, "panicked", "its log");
}

#[test]
fn an_init_that_exits_is_a_panic() {
    let ended = cloud("").cmdline("console=ttyS0 quiet rdinit=/bin/false").run_to_end().expect(70, "panicked");
    assert!(ended.stdout.contains("Attempted to kill init!"), "{ended}");
}

#[test]
fn a_time_limit() {
    let ended = cloud("sleep 1000").args(&["--timeout", "2s"]).run_to_end().expect(124, "timed-out");
    assert!(ended.report["duration"].as_f64().unwrap() >= 2.0, "{ended}");
    assert!(ended.stderr.contains("time limit of 2s"), "{ended}");
}

/// A guest that says `ready` and ignores its power button.
fn deaf() -> Run {
    cloud("echo ready; sleep 1000").cmdline("console=ttyS0 quiet vireo.modules=none")
}

#[test]
fn a_deaf_guest_is_stopped_after_the_grace() {
    for (signal, code, name) in [(libc::SIGTERM, 143, "SIGTERM"), (libc::SIGINT, 130, "SIGINT")] {
        let guest = deaf().args(&["--grace", "1s"]).start();
        guest.wait_for("ready");
        guest.signal(signal);
        check_report(&guest.end().expect(code, "killed"), name);
    }
}

#[test]
fn a_second_sigterm_waits_for_nothing() {
    let guest = deaf().args(&["--grace", "1h", "--log-level", "info"]).start();
    guest.wait_for("ready");
    guest.signal(libc::SIGTERM);
    guest.wait_for_stderr("power button");
    guest.signal(libc::SIGTERM);
    check_report(&guest.end().expect(143, "killed"), "SIGTERM");
}

#[test]
fn a_guest_that_hears_its_power_button_powers_off() {
    // evdev delivers only whole events, 24 bytes each.
    let script = "exec 3</dev/input/event0; echo ready; dd bs=24 count=1 <&3 >/dev/null 2>&1; poweroff -f";
    for (signal, cpus) in [(libc::SIGTERM, "1"), (libc::SIGINT, "2")] {
        let guest = cloud(script).args(&["--grace", "1h", "--cpus", cpus]).start();
        guest.wait_for("ready");
        guest.signal(signal);
        check_report(&guest.end().expect(0, "powered-off"), "powered off");
    }
}
