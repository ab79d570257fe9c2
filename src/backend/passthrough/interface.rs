//! File systems whose files are interfaces of the host's kernel rather than data: reading such a file reveals something
//! about the host or waits for it, and writing it reconfigures the host. A share neither starts in such a file system
//! nor crosses into one.
//!
//! The kernel identifies a file system by its magic number (statfs(2)). It is queried on the open descriptor, never on
//! a path: a mount over a name a moment later does not affect a file that is already held.
//!
//! Automount points (autofs) are in between: file systems that the host has mounted there are data, but looking up any
//! other name makes the host's daemon mount it, from whatever server the name refers to.

use std::io;
use std::os::fd::AsFd;

use rustix::fs::fstatfs;

/// Magic numbers and names, from the kernel's `linux/magic.h` or the source of the file system.
const INTERFACES: [(u32, &str); 37] = [
    // Processes, devices, and the kernel's own state and settings.
    (0x0000_9FA0, "proc"),
    (0x6265_6572, "sysfs"),
    (0x6462_6720, "debugfs"),
    (0x7472_6163, "tracefs"),
    (0x7363_6673, "securityfs"),
    (0x6265_6570, "configfs"),
    (0x0027_E0EB, "cgroup"),
    (0x6367_7270, "cgroup2"),
    (0x0765_5821, "resctrl"),
    (0xCAFE_4A11, "bpf"),
    (0x4249_4E4D, "binfmt_misc"),
    (0xDE5E_81E4, "efivarfs"),
    (0x6165_676C, "pstore"),
    (0xF97C_FF8C, "selinuxfs"),
    (0x4341_5D53, "smackfs"),
    (0x5A3C_69F0, "apparmorfs"),
    (0xABBA_1974, "xenfs"),
    (0x0000_9FA1, "openpromfs"),
    // Devices and hardware.
    (0x0000_1CD1, "devpts"),
    (0x0000_9FA2, "usbfs"),
    (0x6C6F_6F70, "binderfs"),
    (0xAEE7_1EE7, "gadgetfs"),
    (0x0A64_7361, "functionfs"),
    (0x6672_6F67, "ibmasmfs"),
    (0x0072_6A77, "ipathfs"),
    (0x6264_6576, "bdev"),
    (0x6461_7864, "dax"),
    // Other parts of the kernel, and communication between processes.
    (0x6573_5543, "fusectl"),
    (0x6E66_7364, "nfsd"),
    (0x6759_6969, "rpc_pipefs"),
    (0x76A9_F425, "ocfs2_dlmfs"),
    (0x1980_0202, "mqueue"),
    (0x5049_5045, "pipefs"),
    (0x534F_434B, "sockfs"),
    (0x0904_1934, "anon_inodefs"),
    (0x6E73_6673, "nsfs"),
    (0x5049_4446, "pidfs"),
];
/// File system of huge pages, which an administrator set aside for certain programs.
const HUGETLBFS: (u32, &str) = (0x9584_58F6, "hugetlbfs");

const AUTOFS: u32 = 0x0187;

/// Kind of file system, as far as shares are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// File system whose files have data.
    Data,
    /// Directory where the host mounts a file system when a name is looked up.
    Automount,
    /// Kernel interface of this name.
    Interface(&'static str),
}

/// Returns the kind of the file system that an open file is on.
pub(super) fn kind(fd: impl AsFd) -> io::Result<Kind> {
    // All magic numbers have 32 bits; the field has 64.
    let magic = fstatfs(fd)?.f_type as u32;
    if magic == AUTOFS {
        return Ok(Kind::Automount);
    }
    let mut all = INTERFACES.iter().chain([&HUGETLBFS]);
    Ok(all.find(|(number, _)| *number == magic).map_or(Kind::Data, |(_, name)| Kind::Interface(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks that all interfaces mounted on this machine are known.
    #[test]
    fn mounted_interfaces_are_found() {
        let data =
            ["ext4", "xfs", "btrfs", "tmpfs", "ramfs", "devtmpfs", "overlay", "squashfs", "9p", "virtiofs", "fuse"];
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let mut found = 0;
        for line in mounts.lines() {
            let mut fields = line.split(' ');
            let (Some(place), Some(kind)) = (fields.nth(1), fields.next()) else { panic!("{line}") };
            let Ok(fd) = rustix::fs::open(place, rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()) else { continue };
            // Another file system may be mounted on top of this one.
            let last = mounts.lines().rev().find(|other| other.split(' ').nth(1) == Some(place));
            if last != Some(line) {
                continue;
            }
            match super::kind(&fd).unwrap() {
                Kind::Interface(name) => {
                    assert!(name == kind || kind == "cpuset", "{line}: taken for {name}");
                    found += 1;
                }
                Kind::Automount => assert_eq!(kind, "autofs"),
                Kind::Data => assert!(!INTERFACES.iter().any(|(_, name)| *name == kind), "{line}"),
            }
            assert!(!data.contains(&kind) || super::kind(&fd).unwrap() == Kind::Data, "{line}");
        }
        assert!(found >= 2, "/proc and /sys at least: {mounts}");
    }
}
