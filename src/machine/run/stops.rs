//! Stopping the machine and letting it go on, for whoever asks; what a debugger asks of its vCPUs, and hears of them.

use super::Running;
use crate::kvm::debug::{Request, Trap};
use crate::vcpu::{Command, Reply};

impl Running {
    /// Stops vCPUs and devices with nothing half done.
    pub(super) fn pause(&mut self) {
        if self.paused {
            return;
        }
        self.vcpus.iter().for_each(|v| v.send(Command::Pause));
        for vcpu in &self.vcpus {
            // A thread that has ended doesn't answer, and doesn't run either.
            let _ = vcpu.reply();
        }
        self.exits.coalesced += self.board.drain();
        self.devices.iter().filter_map(|d| d.pause().err()).for_each(|stuck| log::warn!("{stuck}"));
        self.paused = true;
    }

    /// Lets the devices go on, and these vCPUs, or all.
    pub(super) fn resume(&mut self, only: Option<&[u32]>) {
        if self.paused {
            self.devices.iter().for_each(|d| d.resume());
            let goes_on = |id: u32| only.is_none_or(|only| only.contains(&id));
            let vcpus = (0..).zip(&self.vcpus).filter(|(id, _)| goes_on(*id));
            vcpus.for_each(|(_, vcpu)| vcpu.send(Command::Resume));
            self.paused = false;
        }
    }

    /// Has a paused vCPU do something for a debugger.
    pub(super) fn debug(&self, vcpu: u32, request: Box<Request>) -> Option<Reply> {
        let vcpu = self.vcpus.get(vcpu as usize).filter(|_| self.paused)?;
        vcpu.send(Command::Debug(request));
        vcpu.reply()
    }

    /// Tells the debugger; one that is gone leaves a vCPU that goes on.
    pub(super) fn trapped(&self, trap: Trap) {
        match self.debugger.upgrade() {
            Some(traps) => traps.push(trap),
            None if self.paused => {}
            None => self.vcpus.iter().skip(trap.vcpu as usize).take(1).for_each(|v| v.send(Command::Resume)),
        }
    }
}
