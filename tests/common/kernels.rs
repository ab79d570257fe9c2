//! Debian's kernels: each boots with its modules, and a command runs in it.

use std::fs;
use std::path::PathBuf;

use super::{Run, repo};

const SCRIPT: &str = r#"
echo "release: $(uname -r)"
echo "cpus: $(nproc)"
echo "disk: $(head -c 5 /dev/vda)"
echo "rng: $(head -c 8 /dev/hwrng | wc -c)"
echo "avx: $(grep -c '^flags.* avx ' /proc/cpuinfo)"
echo "bad: $(dmesg | grep -cE 'BUG:|Oops:|WARNING:|Call Trace')"
"#;

/// Returns the release of a kernel that `tests/host/setup test` fetched, and its path in its package.
fn kernel(name: &str) -> (String, PathBuf) {
    let folder = repo(&format!("target/host/kernel-{name}"));
    let version = fs::read_to_string(folder.join("version"));
    let version = version.unwrap_or_else(|e| panic!("{}: {e}: run 'tests/host/setup test'", folder.display()));
    let version = version.trim().to_string();
    // From 7.x on, the kernel is beside the modules.
    let places = [format!("boot/vmlinuz-{version}"), format!("usr/lib/modules/{version}/vmlinuz")];
    let path = places.iter().map(|place| folder.join(place)).find(|path| path.exists());
    (version, path.unwrap_or_else(|| panic!("no vmlinuz in {}", folder.display())))
}

/// Boots the kernel with two processors and its drivers in use.
pub fn boots(name: &str) {
    let (version, _) = kernel(name);
    let run = Run::new(&format!("bzImage-{name}"), SCRIPT).with_modules(name);
    fs::write(run.path("disk"), b"hello".repeat(1024)).unwrap();
    let disk = run.path("disk");
    let ended = run.args(&["--cpus", "2", "--rng", "--disk", &disk]).run_to_end().success();
    let facts = ["release", "cpus", "disk", "rng", "avx", "bad"].map(|fact| ended.fact(fact));
    assert_eq!(facts, [&version, "2", "hello", "8", "2", "0"], "{ended}");
}

/// Runs a command in the kernel, with one processor. The kernel is where its package has it, so vireo finds the modules
/// beside it.
pub fn executes(name: &str) {
    let (version, path) = kernel(name);
    let script = "uname -r; nproc; wc -l </etc/passwd >&2; cat; exit 42";
    let mut guest = Run::exec_alone(&path, &["sh", "-c", script]).start();
    guest.send(b"what comes in\n");
    guest.close_input();
    let ended = guest.end().expect(42, "exited");
    assert_eq!(ended.stdout, format!("{version}\n1\nwhat comes in\n"), "{ended}");
    let lines = fs::read_to_string("/etc/passwd").unwrap().lines().count();
    assert_eq!(ended.stderr, format!("{lines}\n"), "{ended}");
}

/// Two tests for each kernel, in a module of its name.
#[allow(unused_macros)] // only the files of the kernels' tests use it
macro_rules! kernels {
    ($($module:ident $name:literal)*) => { $(
        mod $module {
            #[test]
            fn boots() {
                crate::common::kernels::boots($name);
            }

            #[test]
            fn executes() {
                crate::common::kernels::executes($name);
            }
        }
    )* };
}
#[allow(unused_imports)]
pub(crate) use kernels;
