//! Flags for debugging a guest, for every command that runs one.

use clap::Args;

use super::named::{NamedFiles, Use};
use super::{Failure, say};
use crate::boot::kaslr;
use crate::config::MachineConfig;
use crate::control::Controller;
use crate::gdb::{Address, Server, Serving};
use crate::memory::GuestRam;

/// Flags that `run` and `exec` share.
#[derive(Args)]
pub struct DebugArgs {
    /// Accept a gdb connection on a port of 127.0.0.1 (0: any free one) or on unix:PATH, a socket for this user only;
    /// adds nokaslr to the kernel command line unless it has nokaslr or kaslr
    #[arg(long, value_name = "PORT|unix:PATH")]
    gdb: Option<Address>,
    /// With --gdb: hold the guest before its first instruction until gdb continues
    #[arg(long, visible_alias = "wait", requires = "gdb")]
    gdb_wait: bool,
}

impl DebugArgs {
    /// Disables KASLR for a debugged kernel, so that it runs at the addresses of its symbols.
    pub fn settle(&self, config: &mut MachineConfig) {
        if self.gdb.is_some() {
            config.boot.cmdline = kaslr::settled(&config.boot.cmdline);
        }
    }

    /// Adds the socket that the flags name.
    pub(super) fn add_to(&self, named: &mut NamedFiles) {
        if let Some(Address::Unix(path)) = &self.gdb {
            named.add("--gdb", path, Use::Meeting);
        }
    }

    /// Returns whether the guest waits for the debugger before it starts.
    pub fn paused(&self) -> bool {
        self.gdb_wait
    }

    /// Opens the address before anything is created that would have to be undone.
    pub fn open(&self) -> Result<Option<Server>, Failure> {
        Ok(self.gdb.as_ref().map(Server::open).transpose()?)
    }
}

/// Serves a gdb for the controller's machine and prints the address.
pub fn serve(server: Server, controller: Controller, ram: GuestRam, vcpus: u32) -> Result<Serving, Failure> {
    say(&format!("gdb: target remote {}", server.target()));
    Ok(server.start(controller, ram, vcpus)?)
}
