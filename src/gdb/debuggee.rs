//! The machine while a client is attached: the action of each vCPU when the machine continues, the conditions that stop
//! it, and the reason why it stopped.

use std::collections::VecDeque;
use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;

use gdbstub::common::{Signal, Tid};
use gdbstub::stub::MultiThreadStopReason;
use gdbstub::target::ext::breakpoints::WatchKind;

use super::Guest;
use super::memory::Breakpoints;
use crate::kvm::debug::{Access, Answer, Cause, Control, HARDWARE_SLOTS, Hardware, Registers, Request, Trap};
use crate::machine::mailbox::Traps;

/// Reason for gdb why the machine stopped.
pub type Stop = MultiThreadStopReason<u64>;

/// Action of a vCPU when the machine continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The vCPU runs.
    Continue,
    /// The vCPU executes one instruction.
    Step,
}

/// The stopped machine, under the control of a client.
pub struct Debuggee<'a> {
    pub(super) guest: &'a dyn Guest,
    pub(super) traps: Arc<Traps>,
    pub(super) breakpoints: Breakpoints,
    pub(super) hardware: [Option<Hardware>; HARDWARE_SLOTS],
    /// Last settings sent to each vCPU.
    told: Vec<Control>,
    /// Action that the client wants of each vCPU; vCPUs that the client does not name continue, unless they are locked.
    actions: Vec<Option<Action>>,
    pub(super) locked: bool,
    /// Traps not yet reported to the client; they came while another one was being reported.
    pending: VecDeque<Trap>,
    /// The vCPU that the client is inspecting.
    pub(super) current: u32,
}

/// Returns gdb's thread id of a vCPU: gdb's threads are vCPUs, counted from 1.
pub fn tid(vcpu: u32) -> Tid {
    NonZeroUsize::MIN.saturating_add(vcpu as usize)
}

impl<'a> Debuggee<'a> {
    /// Stops the machine. Returns `None` if it has ended.
    pub fn attach(guest: &'a dyn Guest) -> io::Result<Option<Self>> {
        let traps = Arc::new(Traps::new()?);
        guest.attach(&traps);
        Ok(guest.pause().then(|| Debuggee {
            guest,
            traps,
            breakpoints: Breakpoints::default(),
            hardware: [None; HARDWARE_SLOTS],
            told: vec![Control::default(); guest.vcpus() as usize],
            actions: vec![None; guest.vcpus() as usize],
            locked: false,
            pending: VecDeque::new(),
            current: 0,
        }))
    }

    /// Returns the vCPU of a thread.
    pub fn vcpu(&self, tid: Tid) -> io::Result<u32> {
        let vcpu = u32::try_from(tid.get() - 1).ok().filter(|vcpu| *vcpu < self.guest.vcpus());
        vcpu.ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))
    }

    /// Returns all registers of a vCPU.
    pub fn registers(&self, vcpu: u32) -> io::Result<Box<Registers>> {
        match self.guest.debug(vcpu, Request::Read)? {
            Answer::Registers(registers) => Ok(registers),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// Puts a hardware breakpoint into a free debug register; returns false if there is none, or the processor does not
    /// support it.
    pub fn insert_hardware(&mut self, addr: u64, len: u64, access: Access) -> bool {
        let Some(hardware) = hardware(addr, len, access) else { return false };
        if self.hardware.contains(&Some(hardware)) {
            return true;
        }
        match self.hardware.iter_mut().find(|slot| slot.is_none()) {
            Some(slot) => *slot = Some(hardware),
            None => return false,
        }
        true
    }

    /// Removes a hardware breakpoint; returns false if it does not exist.
    pub fn remove_hardware(&mut self, addr: u64, len: u64, access: Access) -> bool {
        let Some(hardware) = hardware(addr, len, access) else { return false };
        let slot = self.hardware.iter_mut().find(|slot| **slot == Some(hardware));
        slot.map(|slot| *slot = None).is_some()
    }

    /// Clears the actions of the client's previous request.
    pub fn forget_actions(&mut self) {
        self.actions.fill(None);
        self.locked = false;
    }

    /// Records the action that the client wants of a thread. The first action for a thread counts.
    pub fn set_action(&mut self, tid: Tid, action: Action) -> io::Result<()> {
        let vcpu = self.vcpu(tid)?;
        if let Some(place) = self.actions.get_mut(vcpu as usize) {
            place.get_or_insert(action);
        }
        Ok(())
    }

    /// Continues the machine according to the actions, unless there are still traps to report from the last stop.
    pub fn go_on(&mut self) -> io::Result<()> {
        self.collect();
        let hardware = self.hardware;
        // A vCPU that is at a stopping instruction will stop there again, and a step no longer matters, so these are
        // dropped.
        self.pending.retain(
            |trap| matches!(trap.cause, Cause::Hardware(h) if h.access != Access::Execute && hardware.contains(&Some(h))),
        );
        if !self.pending.is_empty() {
            return Ok(());
        }
        let breakpoints = self.breakpoints.addresses();
        for (vcpu, action) in (0..).zip(self.actions.clone()) {
            let step = action == Some(Action::Step);
            self.tell(vcpu, Control { step, breakpoints: breakpoints.clone(), hardware })?;
        }
        let named = (0..).zip(&self.actions).filter(|(_, action)| action.is_some());
        let only = self.locked.then(|| named.map(|(vcpu, _)| vcpu).collect());
        if self.guest.resume(only) { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
    }

    fn tell(&mut self, vcpu: u32, control: Control) -> io::Result<()> {
        match self.told.get_mut(vcpu as usize) {
            Some(told) if *told != control => {
                self.guest.debug(vcpu, Request::Control(control.clone()))?;
                *told = control;
            }
            _ => {}
        }
        Ok(())
    }

    /// Collects the traps that vCPUs reported.
    pub fn collect(&mut self) {
        while let Some(trap) = self.traps.take() {
            self.pending.push_back(trap);
        }
    }

    /// Returns the reason of the stop if a vCPU has stopped, and stops all others.
    pub fn trapped(&mut self) -> Option<Stop> {
        self.collect();
        let trap = self.pending.pop_front()?;
        self.guest.pause();
        self.collect();
        self.current = trap.vcpu;
        Some(reason(trap))
    }

    /// Stops all vCPUs at the client's request.
    pub fn interrupt(&mut self) -> Stop {
        self.guest.pause();
        self.collect();
        Stop::SignalWithThread { tid: tid(self.current), signal: Signal::SIGINT }
    }

    /// Removes everything from the guest that was inserted for the client, and continues the guest.
    pub fn detach(mut self) {
        if !self.guest.pause() {
            return;
        }
        self.breakpoints.clear(self.guest.ram());
        for vcpu in 0..self.guest.vcpus() {
            if let Err(e) = self.tell(vcpu, Control::default()) {
                log::warn!("gdb: cannot remove the breakpoints of vCPU {vcpu}: {e}");
            }
        }
        drop(self.traps);
        self.guest.resume(None);
    }
}

/// Returns the contents of a debug register for these parameters, if it can hold them.
fn hardware(addr: u64, len: u64, access: Access) -> Option<Hardware> {
    let len = if access == Access::Execute { 1 } else { len };
    (matches!(len, 1 | 2 | 4 | 8) && addr.is_multiple_of(len)).then_some(Hardware { addr, len: len as u8, access })
}

fn reason(trap: Trap) -> Stop {
    let tid = tid(trap.vcpu);
    match trap.cause {
        Cause::Step => Stop::SignalWithThread { tid, signal: Signal::SIGTRAP },
        Cause::Breakpoint => Stop::SwBreak(tid),
        Cause::Hardware(Hardware { access: Access::Execute, .. }) => Stop::HwBreak(tid),
        Cause::Hardware(Hardware { addr, access, .. }) => {
            let kind = if access == Access::Write { WatchKind::Write } else { WatchKind::ReadWrite };
            Stop::Watch { tid, kind, addr }
        }
    }
}
