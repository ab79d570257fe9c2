//! Privileges that this process gives up before it reads anything that a guest, an image or another user has made.

use std::io;

use crate::memory::populated;

/// Has no program that this process starts gain privileges by its file's mode (no_new_privs), and keeps other processes
/// of the same user from reading and writing this one's memory, which has the guest's in it (not dumpable). A crash of
/// vireo itself then leaves no core file, and only root can attach a debugger to it.
pub fn give_up() {
    // Its owner is root once this process cannot be dumped.
    populated::open_page_map();
    let no_new_privileges = rustix::thread::set_no_new_privs(true);
    let dumpable = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
    for (what, result) in [("no_new_privs", no_new_privileges), ("the dumpable flag", dumpable)] {
        if let Err(e) = result {
            log::debug!("cannot set {what}: {}", io::Error::from(e));
        }
    }
}
