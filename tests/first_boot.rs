//! The first boot of a kernel: its guest does not wait for the cache, and the cache gets the whole kernel or nothing.

use std::fs::{self, File};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::common::until;
use crate::guests::vireo::{Kernel, Running, folder};
use crate::guests::{elf, power_off, say_and_spin};

/// A kernel that is large enough to be worth caching.
fn kernel(code: &[u8]) -> Kernel {
    Kernel::new(&elf(&[code, &[0x90; 256 << 10]].concat()))
}

/// Command `vireo run` with a cache below `folder`.
fn run(kernel: &Kernel, folder: &Path) -> Command {
    let mut command = kernel.command(&["--log-level", "info"]);
    command.env("XDG_CACHE_HOME", folder);
    command
}

/// Command of the process that stores the kernel in `cache`.
fn keeper(kernel: &Kernel, cache: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vireo"));
    command.arg0("vireo-keep").arg(cache).stdin(File::open(kernel.path()).unwrap());
    command
}

fn names(cache: &Path) -> Vec<String> {
    let entries = fs::read_dir(cache).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Returns the processes that store something in `cache`.
fn keepers(cache: &Path) -> Vec<PathBuf> {
    let wanted = [b"vireo-keep\0", cache.as_os_str().as_encoded_bytes(), b"\0"].concat();
    let processes = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    processes.filter(|path| fs::read(path.join("cmdline")).is_ok_and(|found| found == wanted)).collect()
}

/// Creates a cache in which nothing can be stored while the returned file is open.
fn locked(cache: &Path) -> File {
    fs::DirBuilder::new().mode(0o700).create(cache).unwrap();
    let directory = File::open(cache).unwrap();
    rustix::fs::flock(&directory, rustix::fs::FlockOperation::LockExclusive).unwrap();
    directory
}

#[test]
fn a_kernel_is_kept_while_its_guest_runs() {
    let (_folder, path) = folder();
    let (kernel, cache) = (kernel(say_and_spin()), path.join("vireo"));
    let mut running: Vec<_> = (0..3).map(|_| Running::start(run(&kernel, &path))).collect();
    let kept =
        until("the kernel in the cache", || names(&cache), |names| names.len() == 2 && names[0].starts_with("k-"));
    assert!(kept[1].starts_with("s-"), "{kept:?}");
    for name in &kept {
        assert_eq!(fs::metadata(cache.join(name)).unwrap().permissions().mode() & 0o777, 0o600);
    }
    until("the end of what keeps it", || keepers(&cache), Vec::is_empty);
    for one in &mut running {
        assert!(one.child.try_wait().unwrap().is_none(), "the guest should still be running");
    }
    assert_eq!(names(&cache), kept);
    drop(running);
    let again = Running::start(run(&kernel, &path));
    again.stderr.wait_for("from the cache");
    assert!(keepers(&cache).is_empty());
}

#[test]
fn nothing_is_left_of_a_run_that_ends_before() {
    let (_folder, path) = folder();
    let (kernel, cache) = (kernel(power_off()), path.join("vireo"));
    let _lock = locked(&cache);
    Running::start(run(&kernel, &path)).end().expect(0).says("the guest powered off");
    until("the end of what would keep it", || keepers(&cache), Vec::is_empty);
    assert!(names(&cache).is_empty());
}

#[test]
fn a_keeper_ends_with_its_vireo() {
    let (_folder, path) = folder();
    let (kernel, cache) = (kernel(power_off()), path.join("vireo"));
    let _lock = locked(&cache);
    let mut keeping = keeper(&kernel, &cache).stdout(Stdio::piped()).spawn().unwrap();
    drop(keeping.stdout.take());
    until("its end", || keeping.try_wait().unwrap(), Option::is_some);
    assert_eq!(keeping.wait().unwrap().code(), Some(1));
    assert!(names(&cache).is_empty());
}

#[test]
fn what_is_no_kernel_is_not_kept() {
    let (_folder, path) = folder();
    let cache = path.join("vireo");
    let not = Kernel::new(&vec![b'x'; 256 << 10]);
    assert_eq!(keeper(&not, &cache).status().unwrap().code(), Some(1));
    assert!(names(&cache).is_empty());
    fs::set_permissions(&cache, PermissionsExt::from_mode(0o777)).unwrap();
    let code = keeper(&kernel(power_off()), &cache).status().unwrap().code();
    assert_eq!((code, names(&cache)), (Some(1), Vec::new()), "a directory that everybody can write to");
}
