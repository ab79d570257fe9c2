//! `vireo doctor` on whatever KVM this machine has.

use assert_cmd::Command;

#[test]
fn doctor_runs_its_guest_and_its_exit_code_is_its_verdict() {
    let output = Command::cargo_bin("vireo").unwrap().args(["doctor", "--json"]).output().unwrap();
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let linux_guests = report["linux_guests"].as_bool().unwrap();
    assert_eq!(output.status.code(), Some(if linux_guests { 0 } else { 125 }), "{report:#}");
    for check in report["checks"].as_array().unwrap() {
        // The speed of this KVM depends on the machine, but it must work.
        assert!(
            check["ok"] == true || check["name"] == "ring 0 speed",
            "this test needs a working /dev/kvm, of any speed: {check:#}"
        );
    }
    assert!(report["exit_latency_ns"].as_u64().unwrap() > 0);
    assert!(report["ring0_instructions_per_second"].as_u64().unwrap() > 0);
}
