//! Tests of nodes on the file system of the temporary folder, and of ways out of a folder, which must not exist.

use std::ffi::{CStr, CString};
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};

use rustix::fs::{FileType, OFlags};

use super::*;
use crate::memory::GuestRam;

struct Folder {
    dir: tempfile::TempDir,
    root: Node,
}

impl Folder {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("share")).unwrap();
        let (root, stat) = open_root(&dir.path().join("share")).unwrap();
        assert_eq!(stat.kind(), FileType::Directory);
        Folder { dir, root }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("share").join(name)
    }
}

fn name(text: &'static CStr) -> Name<'static> {
    Name::new(text).unwrap()
}

fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

#[test]
fn names_are_single_components() {
    let long = CString::new(vec![b'x'; 256]).unwrap();
    for (bad, code) in [
        (c"", libc::EINVAL),
        (c".", libc::EINVAL),
        (c"..", libc::EINVAL),
        (c"a/b", libc::EINVAL),
        (c"/", libc::EINVAL),
        (c"../x", libc::EINVAL),
        (long.as_c_str(), libc::ENAMETOOLONG),
    ] {
        assert_eq!(errno(Name::new(bad)), code, "{bad:?}");
    }
    for good in [c"a", c"...", c"..a", c" ", c"\xFF\n"] {
        assert_eq!(Name::new(good).unwrap().as_c_str(), good);
    }
}

#[test]
fn no_way_leads_out() {
    let folder = Folder::new();
    fs::write(folder.dir.path().join("outside"), "secret").unwrap();
    symlink(folder.dir.path().join("outside"), folder.path("absolute")).unwrap();
    symlink("../outside", folder.path("relative")).unwrap();
    symlink("/proc/self/root", folder.path("magic")).unwrap();
    symlink("..", folder.path("dir")).unwrap();
    for link in [c"absolute", c"relative", c"magic", c"dir"] {
        let (node, stat) = folder.root.child(name(link)).unwrap();
        assert_eq!(stat.kind(), FileType::Symlink, "the link itself");
        assert_eq!(errno(node.open(OFlags::RDONLY)), libc::ENXIO);
        assert_eq!(errno(node.open_dir()), libc::ENOTDIR);
        assert_eq!(errno(node.child(name(c"etc"))), libc::ENOTDIR);
        assert_eq!(errno(node.truncate(0)), libc::ENXIO);
        // Creating a file does not follow the link either.
        assert_eq!(errno(folder.root.create(name(link), OFlags::WRONLY, 0o600)), libc::EEXIST);
        assert!(folder.root.link(name(c"hard"), &node).is_ok());
        assert_eq!(folder.root.child(name(c"hard")).unwrap().1.kind(), FileType::Symlink);
        folder.root.unlink(name(c"hard")).unwrap();
        // Permissions, owners and times are those of the link.
        let _ = node.chmod(0o777);
        node.set_times(TimeChange::Set(Time { sec: 1000, nsec: 5 }), TimeChange::Keep).unwrap();
        let outside = fs::metadata(folder.dir.path().join("outside")).unwrap();
        assert_ne!(outside.atime(), 1000);
        assert_eq!(outside.permissions().mode() & 0o111, 0);
        assert_eq!(node.stat().unwrap().atime, Time { sec: 1000, nsec: 5 });
    }
    assert_eq!(fs::read(folder.dir.path().join("outside")).unwrap(), b"secret");
}

#[test]
fn a_node_stays_what_it_was() {
    let folder = Folder::new();
    fs::write(folder.path("file"), "one").unwrap();
    fs::create_dir(folder.path("dir")).unwrap();
    fs::write(folder.path("dir/in"), "inside").unwrap();
    let (file, before) = folder.root.child(name(c"file")).unwrap();
    let (dir, _) = folder.root.child(name(c"dir")).unwrap();
    // The host replaces both by links that lead out.
    fs::rename(folder.path("file"), folder.path("renamed")).unwrap();
    symlink("/etc/passwd", folder.path("file")).unwrap();
    fs::rename(folder.path("dir"), folder.path("moved")).unwrap();
    symlink("/etc", folder.path("dir")).unwrap();
    assert_eq!(file.stat().unwrap().ino, before.ino);
    assert_eq!(io::read_to_string(file.open(OFlags::RDONLY).unwrap()).unwrap(), "one");
    let (inside, _) = dir.child(name(c"in")).unwrap();
    assert_eq!(io::read_to_string(inside.open(OFlags::RDONLY).unwrap()).unwrap(), "inside");
    assert_eq!(errno(dir.child(name(c"passwd"))), libc::ENOENT);
    fs::remove_file(folder.path("renamed")).unwrap();
    assert_eq!(file.stat().unwrap().nlink, 0);
    assert_eq!(io::read_to_string(file.open(OFlags::RDONLY).unwrap()).unwrap(), "one");
}

#[test]
fn nothing_special_is_opened() {
    let folder = Folder::new();
    let kinds = [(c"fifo", libc::S_IFIFO), (c"socket", libc::S_IFSOCK), (c"whiteout", libc::S_IFCHR)];
    for (text, kind) in kinds {
        if folder.root.make_node(name(text), kind | 0o600, 0).is_err() && kind == libc::S_IFCHR {
            continue; // old kernels do not permit this to everybody
        }
        let (node, stat) = folder.root.child(name(text)).unwrap();
        assert_eq!(stat.kind().as_raw_mode(), kind);
        for flags in [OFlags::RDONLY, OFlags::WRONLY, OFlags::RDWR | OFlags::TRUNC] {
            assert_eq!(errno(node.open(flags)), libc::ENXIO, "{text:?}");
        }
        assert_eq!(errno(node.sync_fs()), libc::ENXIO);
    }
    assert_eq!(errno(folder.root.open(OFlags::RDONLY)), libc::EISDIR);
    for (kind, rdev) in [(libc::S_IFCHR, 0x103), (libc::S_IFBLK, 0), (libc::S_IFBLK, 0x800), (libc::S_IFDIR, 0), (0, 0)]
    {
        assert_eq!(errno(folder.root.make_node(name(c"device"), kind | 0o666, rdev)), libc::EPERM);
    }
    assert!(fs::symlink_metadata(folder.path("device")).is_err());
    assert!(fs::metadata(folder.path("fifo")).unwrap().file_type().is_fifo());
}

#[test]
fn the_kernels_interfaces_are_closed() {
    for (path, name) in [("/proc", "proc"), ("/sys", "sysfs"), ("/proc/self", "proc"), ("/sys/kernel", "sysfs")] {
        let refused = open_root(path.as_ref()).unwrap_err().to_string();
        assert_eq!(
            refused,
            format!("cannot share {path}: it is the host kernel's {name}, not a file system with data")
        );
    }
    let (root, _) = open_root("/".as_ref()).unwrap();
    let (proc, stat) = root.child(name(c"proc")).unwrap();
    assert!(proc.is_closed() && !root.is_closed());
    assert_eq!((stat.mode, stat.uid, stat.gid), (libc::S_IFDIR | 0o555, 0, 0));
    assert_eq!(proc.stat().unwrap(), stat);
    assert_eq!(errno(proc.child(name(c"self"))), libc::ENOENT);
    assert_eq!(errno(proc.open(OFlags::RDONLY)), libc::EISDIR);
    assert_eq!(errno(proc.open_dir()), libc::EROFS);
    assert_eq!(errno(proc.create(name(c"x"), OFlags::WRONLY, 0o600)), libc::EROFS);
    assert_eq!(errno(proc.unlink(name(c"self"))), libc::EROFS);
    assert_eq!(errno(root.link(name(c"x"), &proc)), libc::EROFS);
    assert_eq!(errno(root.rename(name(c"nothing"), &proc, name(c"x"), 0)), libc::EROFS);
}

/// A mount is judged when it is opened, by the open file; this includes single files and mounts that appear later.
#[test]
fn a_mount_that_comes_later_is_closed() {
    let folder = Folder::new();
    fs::create_dir(folder.path("dir")).unwrap();
    fs::write(folder.path("file"), "data").unwrap();
    let (before, _) = folder.root.child(name(c"dir")).unwrap();
    let in_own_namespace = || {
        use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_bind, mount_change};
        // SAFETY: the thread ends with this function, and no descriptors are unshared.
        #[allow(unsafe_code)]
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }.ok()?;
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        let (root, _) = open_root(&folder.dir.path().join("share")).unwrap();
        assert!(!root.child(name(c"dir")).unwrap().0.is_closed());
        mount("proc", folder.path("dir"), "proc", MountFlags::empty(), None).unwrap();
        mount_bind("/proc/kcore", folder.path("file")).ok();
        mount_bind("/proc/version", folder.path("file")).unwrap();
        assert!(root.child(name(c"dir")).unwrap().0.is_closed());
        assert_eq!(errno(root.child(name(c"file"))), libc::EACCES);
        assert_eq!(errno(before.child(name(c"self"))), libc::ENOENT, "the directory below the mount");
        // File systems with data are entered.
        mount("tmpfs", folder.path("dir"), "tmpfs", MountFlags::empty(), None).unwrap();
        fs::write(folder.path("dir/in"), "").unwrap();
        assert!(root.child(name(c"dir")).unwrap().0.child(name(c"in")).is_ok());
        Some(())
    };
    let run = std::thread::scope(|scope| scope.spawn(in_own_namespace).join().unwrap());
    assert!(run.is_some() || !rustix::process::geteuid().is_root(), "root may mount");
}

/// Looking up a name in a directory of automount points asks no daemon to mount it; existing mounts there are data.
#[test]
fn nothing_is_mounted_for_a_guest() {
    use std::os::unix::process::CommandExt;
    use std::process::Command;
    let folder = Folder::new();
    fs::create_dir(folder.path("auto")).unwrap();
    let in_own_namespace = || {
        use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
        // SAFETY: the thread ends with this function, and no descriptors are unshared.
        #[allow(unsafe_code)]
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }.ok()?;
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        // The daemon's process group may look up names without waiting for a mount.
        let mut daemon = Command::new("sleep").arg("1000").process_group(0).spawn().unwrap();
        let (requests, to_daemon) = std::io::pipe().unwrap();
        let group = daemon.id();
        let number = std::os::fd::AsRawFd::as_raw_fd(&to_daemon);
        let options = CString::new(format!("fd={number},pgrp={group},minproto=5,maxproto=5,indirect")).unwrap();
        let mounted = mount("x", folder.path("auto"), "autofs", MountFlags::empty(), Some(options.as_c_str()));
        if mounted.is_ok() {
            let (root, _) = open_root(&folder.path("")).unwrap();
            let (auto, _) = root.child(name(c"auto")).unwrap();
            assert!(!auto.is_closed());
            assert_eq!(errno(auto.child(name(c"server"))), libc::ENOENT);
            assert_eq!(errno(auto.make_dir(name(c"dir"), 0o700)), libc::EROFS);
            assert_eq!(errno(auto.unlink(name(c"server"))), libc::EROFS);
            assert!(auto.open_dir().is_ok());
            let mut fds = [rustix::event::PollFd::new(&requests, rustix::event::PollFlags::IN)];
            let now = rustix::event::Timespec::default();
            assert_eq!(rustix::event::poll(&mut fds, Some(&now)).unwrap(), 0, "the daemon was asked");
            let mut made = Command::new("sh");
            made.args(["-c", "mkdir \"$0/there\" && mount -t tmpfs x \"$0/there\" && echo x >\"$0/there/file\""]);
            made.arg(folder.path("auto")).process_group(group as i32);
            assert!(made.status().unwrap().success());
            let (there, _) = auto.child(name(c"there")).unwrap();
            assert!(there.child(name(c"file")).is_ok());
        }
        daemon.kill().unwrap();
        daemon.wait().unwrap();
        Some(())
    };
    let run = std::thread::scope(|scope| scope.spawn(in_own_namespace).join().unwrap());
    assert!(run.is_some() || !rustix::process::geteuid().is_root(), "root may mount");
}

#[test]
fn data_moves_between_guest_memory_and_files() {
    let folder = Folder::new();
    let file = folder.root.create(name(c"file"), OFlags::RDWR, 0o640).unwrap();
    let ram = GuestRam::anonymous(1 << 20);
    ram.write(0x1000, b"0123456789").unwrap();
    let out = [ram.slice(0x1000, 3).unwrap(), ram.slice(0x1000, 0).unwrap(), ram.slice(0x1003, 7).unwrap()];
    assert_eq!(write(&file, &out, 5, false, false).unwrap(), 10);
    assert_eq!(write(&file, &out[..1], 0, true, true).unwrap(), 3);
    assert_eq!(fs::read(folder.path("file")).unwrap(), b"\x00\x00\x00\x00\x000123456789012");
    let room = [ram.slice(0x2000, 4).unwrap(), ram.slice(0x3000, 100).unwrap()];
    assert_eq!(read(&file, &room, 4).unwrap(), 14);
    assert_eq!(ram.read_obj::<[u8; 5]>(0x2000).unwrap(), *b"\x00012\x00");
    assert_eq!(ram.read_obj::<[u8; 11]>(0x3000).unwrap(), *b"3456789012\x00");
    assert_eq!(read(&file, &room, 1000).unwrap(), 0);
    for offset in [u64::MAX, u64::MAX - 2, 1 << 63, i64::MAX as u64] {
        assert!(read(&file, &room, offset).is_err(), "{offset:#x}");
        assert!(write(&file, &out, offset, false, false).is_err(), "{offset:#x}");
    }
    assert_eq!(copy(&file, 5, &file, 1 << 20, u64::MAX).unwrap_or(13), 13);
    assert!(copy(&file, u64::MAX, &file, u64::MAX, u64::MAX).is_err());
}

#[test]
fn attributes_of_the_host_stay_there() {
    let folder = Folder::new();
    fs::write(folder.path("file"), "").unwrap();
    let (node, _) = folder.root.child(name(c"file")).unwrap();
    for refused in [c"security.selinux", c"system.posix_acl_access", c"other", c"", c"userx"] {
        assert_eq!(errno(node.set_xattr(refused, b"x", 0, false)), libc::EOPNOTSUPP, "{refused:?}");
        assert_eq!(errno(node.xattr(refused, &mut [0; 10], false)), libc::EOPNOTSUPP);
        assert_eq!(errno(node.remove_xattr(refused, false)), libc::EOPNOTSUPP);
    }
    assert_eq!(errno(node.set_xattr(c"user.x", b"x", 0x80, false)), libc::EINVAL);
    match node.set_xattr(c"user.x", b"value", 0, true) {
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => return, // this file system has no user attributes
        result => result.unwrap(),
    }
    let mut value = [0; 10];
    assert_eq!(node.xattr(c"user.x", &mut value, false).unwrap(), 5);
    assert_eq!(&value[..5], b"value");
    assert_eq!(node.xattr(c"user.x", &mut [], true).unwrap(), 5);
    assert_eq!(node.xattr_names(true).unwrap(), b"user.x\0");
}

#[test]
fn root_makes_files_for_others() {
    let folder = Folder::new();
    let owner = Owner { uid: 1234, gid: 4321 };
    let identity = Identity::of_process();
    let made = identity.make_as(owner, || folder.root.make_dir(name(c"dir"), 0o700));
    let ids = || rustix::thread::capabilities(None).unwrap();
    let before = ids();
    match identity {
        // The file belongs to a user who could not write here.
        Identity::Root => {
            made.unwrap();
            let stat = folder.root.child(name(c"dir")).unwrap().1;
            assert_eq!((stat.uid, stat.gid), (1234, 4321));
            let failed = identity.make_as(owner, || folder.root.make_dir(name(c"dir"), 0o700));
            assert_eq!(errno(failed), libc::EEXIST);
            assert_eq!(errno(identity.make_as(Owner { uid: u32::MAX, gid: 0 }, || Ok(()))), libc::EINVAL);
            assert_eq!(errno(identity.make_as(Owner { uid: 0, gid: u32::MAX }, || Ok(()))), libc::EINVAL);
        }
        Identity::User => made.unwrap(),
    }
    identity.without_fsetid(|| Ok(())).unwrap();
    assert_eq!(ids(), before, "all is as it was");
    folder.root.make_dir(name(c"mine"), 0o700).unwrap();
    assert_eq!(folder.root.child(name(c"mine")).unwrap().1.uid, rustix::process::geteuid().as_raw());
}

#[test]
fn entries_have_positions() {
    let folder = Folder::new();
    let all: Vec<String> = (0..2000).map(|n| format!("a-name-that-takes-some-room-{n}")).collect();
    all.iter().for_each(|name| fs::write(folder.path(name), "").unwrap());
    let dir = folder.root.open_dir().unwrap();
    let mut seen = Vec::new();
    loop {
        let some = read_entries(&dir).unwrap();
        if some.is_empty() {
            break;
        }
        seen.extend(some);
    }
    assert_eq!(seen.len(), 2002);
    seek_entries(&dir, seen[1000].next).unwrap();
    assert_eq!(read_entries(&dir).unwrap()[0], seen[1001]);
    seek_entries(&dir, 0).unwrap();
    assert_eq!(read_entries(&dir).unwrap()[0], seen[0]);
    // Any position is harmless, and yields no entries that do not exist.
    for position in [1, 12345, u64::MAX, 1 << 63, i64::MAX as u64] {
        if seek_entries(&dir, position).is_ok() {
            let _ = read_entries(&dir);
        }
    }
}

#[test]
fn what_cannot_be_shared_is_told_with_its_path() {
    let folder = Folder::new();
    fs::write(folder.path("file"), "").unwrap();
    let told = |path: PathBuf| {
        let error = open_root(&path).unwrap_err();
        format!("{error}: {}", std::error::Error::source(&error).unwrap())
    };
    let path = folder.path("file");
    assert_eq!(told(path.clone()), format!("cannot share {}: Not a directory (os error 20)", path.display()));
    let path = folder.path("missing");
    assert_eq!(told(path.clone()), format!("cannot share {}: No such file or directory (os error 2)", path.display()));
}
