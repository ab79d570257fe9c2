//! Passes the commit to the library for `vireo --version`, and to the linker the options that keep the binary small.

use std::process::Command;

fn git(args: &[&str]) -> Option<String> {
    let output = Command::new("git").args(args).output().ok().filter(|o| o.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_string())
}

/// Returns whether static programs relocate themselves with the packed table, which glibc does since 2.36. The build
/// script itself is linked to the same glibc.
#[allow(unsafe_code)]
fn glibc_unpacks_relocations() -> bool {
    unsafe extern "C" {
        safe fn gnu_get_libc_version() -> *const std::ffi::c_char;
    }
    // SAFETY: glibc returns a constant NUL-terminated string.
    let version = unsafe { std::ffi::CStr::from_ptr(gnu_get_libc_version()) }.to_string_lossy();
    let mut parts = version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    (parts.next(), parts.next()) >= (Some(2), Some(36))
}

fn main() {
    if glibc_unpacks_relocations() {
        // Saves a fortieth of the binary. A linker that does not know the option ignores it.
        println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    }
    let commit = git(&["rev-parse", "--short=12", "HEAD"]).unwrap_or_else(|| "unknown".into());
    println!("cargo::rustc-env=VIREO_COMMIT={commit}");
    for name in ["TARGET", "PROFILE"] {
        println!("cargo::rustc-env=VIREO_{name}={}", std::env::var(name).unwrap_or_default());
    }
    // Panics abort in a release build, so nothing unwinds it and the index of its unwind tables (40 KiB) is not needed.
    if std::env::var("PROFILE").is_ok_and(|profile| profile == "release") {
        println!("cargo::rustc-link-arg-bins=-Wl,--no-eh-frame-hdr");
    }
    println!("cargo::rerun-if-changed=src/build.rs");
    // A branch moves without a change to HEAD; its log changes whenever either does.
    if let Some(log) = git(&["rev-parse", "--git-path", "logs/HEAD"]) {
        println!("cargo::rerun-if-changed={log}");
    }
}
