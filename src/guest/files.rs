//! File systems of the guest: those of the kernel, the root, and folders of the host.

use std::ffi::{CStr, OsStr, OsString};
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, mount, mount_bind, mount_move};

use super::names::Names;
use super::protocol::{Mount, ROOT, Root};
use super::{Error, Result, cannot};
use crate::boot::modules;

/// Directory in the initramfs where the new root is assembled.
const NEW_ROOT: &str = "/vireo/root";
const LOWER: &str = "/vireo/lower";
const UPPER: &str = "/vireo/upper";

/// Mounts a file system that has no device. An existing mount is fine.
fn mount_new(kind: &str, source: &str, target: &str, flags: MountFlags, options: Option<&CStr>) -> Result<()> {
    fs::create_dir_all(target).map_err(cannot(format!("create {target}")))?;
    match mount(source, target, kind, flags, options) {
        Ok(()) | Err(rustix::io::Errno::BUSY) => Ok(()),
        Err(e) => Err(cannot(format!("mount {kind} on {target}"))(e)),
    }
}

/// Mounts the kernel's own file systems.
pub(super) fn kernel_mounts() -> Result<()> {
    let safe = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
    mount_new("proc", "proc", "/proc", safe, None)?;
    mount_new("sysfs", "sysfs", "/sys", safe, None)?;
    mount_new("devtmpfs", "dev", "/dev", MountFlags::NOSUID, None)
}

/// Kernel interfaces that the kernel's own tests, and tools like bpftool and perf, expect to be mounted.
const INTERFACES: [(&str, &str); 7] = [
    ("cgroup2", "/sys/fs/cgroup"),
    ("debugfs", "/sys/kernel/debug"),
    ("tracefs", "/sys/kernel/tracing"),
    ("securityfs", "/sys/kernel/security"),
    ("configfs", "/sys/kernel/config"),
    ("bpf", "/sys/fs/bpf"),
    ("mqueue", "/dev/mqueue"),
];
/// Largest number of symbolic links from the root's /run that are kept.
const LINKS_MAX: usize = 64;

/// Mounts the other file systems that programs expect.
pub(super) fn guest_mounts() -> Result<()> {
    let safe = MountFlags::NOSUID | MountFlags::NODEV;
    let links = links_out_of("/run");
    mount_new(
        "devpts",
        "devpts",
        "/dev/pts",
        MountFlags::NOSUID | MountFlags::NOEXEC,
        Some(c"mode=620,gid=5,ptmxmode=666"),
    )?;
    // With the half of the memory that the root may use, this leaves some for programs even if all of them are full. (/dev
    // has no limit: the kernel lets none be set for devtmpfs.)
    mount_new("tmpfs", "shm", "/dev/shm", safe, Some(c"mode=1777,size=25%"))?;
    mount_new("tmpfs", "run", "/run", safe, Some(c"mode=755,size=10%"))?;
    for (link, target) in [("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")] {
        let _ = symlink(format!("/proc/self/fd{target}"), Path::new("/dev").join(link));
    }
    for (name, target) in links {
        let _ = symlink(target, Path::new("/run").join(name));
    }
    // Only kinds that the kernel knows are mounted: for any other it would run modprobe.
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let known: Vec<&str> = known.lines().filter_map(|line| line.split_whitespace().last()).collect();
    for (kind, place) in INTERFACES.iter().filter(|(kind, _)| known.contains(kind)) {
        let _ = fs::create_dir(place);
        let _ = mount(*kind, *place, *kind, safe | MountFlags::NOEXEC, None);
    }
    Ok(())
}

/// Returns the symbolic links in this directory that lead out of it. The rest of the host's /run belongs to its
/// services and is hidden, but NixOS and Guix reach all their programs through /run/current-system.
fn links_out_of(dir: &str) -> Vec<(OsString, PathBuf)> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let links = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_symlink()));
    let links = links.filter_map(|entry| Some((entry.file_name(), fs::read_link(entry.path()).ok()?)));
    links.filter(|(_, target)| target.is_absolute() && !target.starts_with(dir)).take(LINKS_MAX).collect()
}

/// Makes the requested file system the root directory of everything that follows. Returns the names in it that the host
/// may change below an overlay.
pub(super) fn enter_root(root: &Root) -> Result<Names> {
    let (writable, source, kinds) = match root {
        Root::Share { writable } => (*writable, ROOT.to_string(), vec!["virtiofs".to_string()]),
        Root::Disk { writable } => (*writable, disk()?, disk_file_systems()?),
        Root::Initramfs => return Ok(Names::default()),
    };
    if writable {
        mount_one_of(&kinds, &source, NEW_ROOT, MountFlags::empty())?;
    } else {
        mount_one_of(&kinds, &source, LOWER, MountFlags::RDONLY)?;
        mount_new("tmpfs", "upper", UPPER, MountFlags::empty(), Some(c"mode=755"))?;
        for dir in ["data", "work"] {
            let dir = Path::new(UPPER).join(dir);
            fs::create_dir(&dir).map_err(cannot(format!("create {}", dir.display())))?;
        }
        // With xino, a directory keeps its inode number when its name is forgotten.
        let options = c"xino=on,lowerdir=/vireo/lower,upperdir=/vireo/upper/data,workdir=/vireo/upper/work";
        mount_new("overlay", "overlay", NEW_ROOT, MountFlags::empty(), Some(options))?;
    }
    let names = match root {
        Root::Share { writable: false } => Names::of(&[Path::new(NEW_ROOT), Path::new(LOWER)])?,
        _ => Names::default(),
    };
    for name in ["dev", "proc", "sys"] {
        let target = Path::new(NEW_ROOT).join(name);
        // A folder that is not yet the root of an operating system becomes one; the host's root has these directories.
        fs::create_dir_all(&target).map_err(cannot(format!("create /{name}")))?;
        mount_move(Path::new("/").join(name), &target).map_err(cannot(format!("move /{name}")))?;
    }
    std::env::set_current_dir(NEW_ROOT).map_err(cannot("enter the root"))?;
    mount_move(".", "/").map_err(cannot("move the root"))?;
    rustix::process::chroot(".").map_err(cannot("change the root"))?;
    std::env::set_current_dir("/").map_err(cannot("enter the root"))?;
    Ok(names)
}

/// Mounts the source as the first of these kinds that fits.
fn mount_one_of(kinds: &[String], source: &str, target: &str, flags: MountFlags) -> Result<()> {
    fs::create_dir_all(target).map_err(cannot(format!("create {target}")))?;
    let mut last = io::Error::from_raw_os_error(libc::ENODEV);
    for kind in kinds {
        match mount(source, target, kind.as_str(), flags, None) {
            Ok(()) => return Ok(()),
            // The disk has a file system of another kind.
            Err(e) if matches!(e, rustix::io::Errno::INVAL | rustix::io::Errno::NODEV) => last = e.into(),
            Err(e) => return Err(cannot(format!("mount {source} as {kind}"))(e)),
        }
    }
    Err(cannot(format!("mount {source} as any of {}", kinds.join(", ")))(last))
}

/// Returns the disk whose serial number marks it as the root.
fn disk() -> Result<String> {
    for entry in fs::read_dir("/sys/block").map_err(cannot("read /sys/block"))?.flatten() {
        if fs::read_to_string(entry.path().join("serial")).is_ok_and(|serial| serial.trim() == ROOT) {
            return Ok(format!("/dev/{}", entry.file_name().to_string_lossy()));
        }
    }
    Err(Error::Other("the guest does not see the disk of its root file system".into()))
}

/// Returns the kinds of file systems that this kernel mounts from disks.
fn disk_file_systems() -> Result<Vec<String>> {
    let text = fs::read_to_string("/proc/filesystems").map_err(cannot("read /proc/filesystems"))?;
    Ok(text.lines().filter(|line| !line.starts_with("nodev")).map(|line| line.trim().to_string()).collect())
}

/// Mounts a folder of the host at the requested place.
pub(super) fn mount_share(share: &Mount) -> Result<()> {
    let path: OsString = share.path.clone().into();
    let path = Path::new(&path);
    let flags = if share.writable { MountFlags::empty() } else { MountFlags::RDONLY };
    fs::create_dir_all(path).map_err(cannot(format!("create {}", path.display())))?;
    mount(share.tag.as_str(), path, "virtiofs", flags, None).map_err(cannot(format!("mount {}", path.display())))
}

/// Shows this kernel's modules, which are below one of the given places, in the directory where programs look for them:
/// modprobe reads its lists there, and depmod may write them.
pub(super) fn show_modules(places: &[OsString]) -> Result<()> {
    let uname = rustix::system::uname();
    let version = OsStr::from_bytes(uname.release().to_bytes());
    let mut below = places.iter().flat_map(|place| modules::below(place.as_ref(), version));
    let Some(from) = below.find(|dir| modules::is_directory(dir)) else { return Ok(()) };
    let target = Path::new("/lib/modules").join(version);
    // If the root is the host's own, it is not changed for this.
    let _ = fs::create_dir_all(&target);
    if !target.is_dir() || modules::is_directory(&target) {
        return Ok(());
    }
    let (upper, work) = ("/run/vireo/modules-upper", "/run/vireo/modules-work");
    [upper, work].into_iter().try_for_each(|dir| fs::create_dir_all(dir).map_err(cannot(format!("create {dir}"))))?;
    // The lower directory is named by descriptor: a path may contain the characters that separate options.
    let lower = fs::File::open(&from).map_err(cannot(format!("open {}", from.display())))?;
    let options = format!("lowerdir=/proc/self/fd/{},upperdir={upper},workdir={work}\0", lower.as_raw_fd());
    let options = CStr::from_bytes_with_nul(options.as_bytes()).ok();
    mount("overlay", &target, "overlay", MountFlags::empty(), options)
        .map_err(cannot(format!("show {}", from.display())))
}

/// Makes these servers resolve names, whatever the host's resolv.conf says. The host's file stays unchanged.
pub(super) fn name_servers(servers: &[Ipv4Addr]) -> Result<()> {
    let text: String = servers.iter().map(|server| format!("nameserver {server}\n")).collect();
    let (file, target) = ("/run/vireo-resolv.conf", "/etc/resolv.conf");
    fs::write(file, text).map_err(cannot(format!("write {file}")))?;
    // A link created by systemd-resolved leads into /run, which is empty here.
    if let Ok(link) = fs::read_link(target) {
        let place = Path::new("/etc").join(link);
        let made = place.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| fs::copy(file, &place));
        return made.map(drop).map_err(cannot(format!("write {}", place.display())));
    }
    if !Path::new(target).exists() {
        let made = fs::create_dir_all("/etc").and_then(|()| fs::copy(file, target));
        return made.map(drop).map_err(cannot(format!("write {target}")));
    }
    mount_bind(file, target).map_err(cannot(format!("replace {target}")))
}
