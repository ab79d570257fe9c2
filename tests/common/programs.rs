//! The host's own programs in the guest, whose initramfs has few: the host's root is shared with it, read-only.

/// Arguments that make `vireo run` share the host's root.
pub const SHARE: [&str; 2] = ["--share", "/,tag=root,readonly"];

/// Returns a script for the guest that makes the host's shell run `script`, with the host's root as its own: with the
/// guest's devices and processes, an empty `/tmp`, and /mnt and /srv to mount something on. Any error ends it.
pub fn with_hosts_programs(script: &str) -> String {
    let prepare = r#"
set -e
mount -t virtiofs root /mnt
mount -t proc proc /mnt/proc
mount -t sysfs sys /mnt/sys
mount -t devtmpfs dev /mnt/dev
mount -t tmpfs tmpfs /mnt/tmp
cat >/mnt/tmp/script <<'END OF THE SCRIPT'
set -e
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
cd /tmp
"#;
    format!("{prepare}{script}\nEND OF THE SCRIPT\nchroot /mnt /bin/sh /tmp/script 2>&1\n")
}
