//! Pausing and resuming the machine on request, and a debugger's requests to vCPUs.

use super::Running;
use crate::kvm::debug::{Request, Trap};
use crate::vcpu::{Command, Reply};

impl Running {
    /// Pauses vCPUs and devices with no operation half done.
    pub(super) fn pause(&mut self) {
        if self.paused {
            return;
        }
        self.vcpus.iter().for_each(|v| v.send(Command::Pause));
        for vcpu in &self.vcpus {
            // A thread that has ended does not answer, and does not run either.
            let _ = vcpu.reply();
        }
        self.exits.coalesced += self.board.drain();
        self.devices.iter().filter_map(|d| d.pause().err()).for_each(|stuck| log::warn!("{stuck}"));
        self.paused = true;
    }

    /// Resumes the devices, and the vCPUs in `only` or all.
    pub(super) fn resume(&mut self, only: Option<&[u32]>) {
        if self.paused {
            self.devices.iter().for_each(|d| d.resume());
            let goes_on = |id: u32| only.is_none_or(|only| only.contains(&id));
            let vcpus = (0..).zip(&self.vcpus).filter(|(id, _)| goes_on(*id));
            vcpus.for_each(|(_, vcpu)| vcpu.send(Command::Resume));
            self.paused = false;
        }
    }

    /// Makes a paused vCPU handle a debugger's request.
    pub(super) fn debug(&self, vcpu: u32, request: Box<Request>) -> Option<Reply> {
        let vcpu = self.vcpus.get(vcpu as usize).filter(|_| self.paused)?;
        vcpu.send(Command::Debug(request));
        vcpu.reply()
    }

    /// Reports a trap to the debugger. If the debugger is gone, the vCPU resumes.
    pub(super) fn trapped(&self, trap: Trap) {
        match self.debugger.upgrade() {
            Some(traps) => traps.push(trap),
            None if self.paused => {}
            None => self.vcpus.iter().skip(trap.vcpu as usize).take(1).for_each(|v| v.send(Command::Resume)),
        }
    }
}
