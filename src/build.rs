//! Tells the library which commit it is built from, for `vireo --version`.

use std::process::Command;

fn git(args: &[&str]) -> Option<String> {
    let output = Command::new("git").args(args).output().ok().filter(|o| o.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_string())
}

fn main() {
    let commit = git(&["rev-parse", "--short=12", "HEAD"]).unwrap_or_else(|| "unknown".into());
    println!("cargo::rustc-env=VIREO_COMMIT={commit}");
    for name in ["TARGET", "PROFILE"] {
        println!("cargo::rustc-env=VIREO_{name}={}", std::env::var(name).unwrap_or_default());
    }
    // Nothing unwinds a release, whose panics abort: it does without the index of its unwind tables (40 KiB).
    if std::env::var("PROFILE").is_ok_and(|profile| profile == "release") {
        println!("cargo::rustc-link-arg-bins=-Wl,--no-eh-frame-hdr");
    }
    println!("cargo::rerun-if-changed=src/build.rs");
    // A branch moves without HEAD changing; its log changes whenever either does.
    if let Some(log) = git(&["rev-parse", "--git-path", "logs/HEAD"]) {
        println!("cargo::rerun-if-changed={log}");
    }
}
