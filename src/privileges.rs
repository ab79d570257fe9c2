//! Privileges that this process gives up before it reads any data from a guest, an image or another user.

use std::io;

use crate::memory::populated;

/// Prevents programs that this process starts from gaining privileges by their file's mode (no_new_privs), and prevents
/// other processes of the same user from reading and writing this process's memory, which contains the guest's (not
/// dumpable). As a consequence, a crash of vireo leaves no core file, and only root can attach a debugger to it.
pub fn give_up() {
    // Opened now: root will own the page map once this process is not dumpable.
    populated::open_page_map();
    let no_new_privileges = rustix::thread::set_no_new_privs(true);
    let dumpable = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
    for (what, result) in [("no_new_privs", no_new_privileges), ("the dumpable flag", dumpable)] {
        if let Err(e) = result {
            log::debug!("cannot set {what}: {}", io::Error::from(e));
        }
    }
}
