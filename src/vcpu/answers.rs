//! Answers of a vCPU thread to commands between two entries of the guest, paused or not; and its reaction to a
//! debugger's trap.

use std::io;

use kvm_bindings::KVM_MP_STATE_HALTED;
use kvm_ioctls::VcpuFd;

use super::{Command, Reply, Running};
use crate::guest_event::GuestEvent;
use crate::kvm::debug::{self, Answer, Request, Trap};
use crate::kvm::dump;

impl Running {
    /// Stops for the debugger if the trap is the debugger's, or passes the trap to the guest.
    pub(super) fn on_trap(&mut self, exception: u32, pc: u64, dr6: u64) -> io::Result<()> {
        match self.control.judge(exception, pc, dr6) {
            Ok(cause) => {
                self.trapped = true;
                self.board.events.post(GuestEvent::Trapped(Trap { vcpu: self.vcpu.id, cause }));
                Ok(())
            }
            Err(inject) => self.control.apply(&self.vcpu.fd, inject),
        }
    }

    /// Answers a command whose treatment does not depend on whether the vCPU is paused.
    pub(super) fn answer(&mut self, command: Command) {
        let reply = match command {
            Command::Pause => Reply::Paused,
            Command::LookAsleep => Reply::Asleep(self.asleep()),
            Command::Debug(request) => Reply::Debug(self.debug(*request)),
            Command::Resume | Command::Stop => return,
        };
        let _ = self.replies.send(reply);
    }

    fn debug(&mut self, request: Request) -> io::Result<Answer> {
        let (fd, xsave_len) = (&self.vcpu.fd, self.vcpu.xsave_len);
        match request {
            Request::Read => debug::read(fd, xsave_len).map(|registers| Answer::Registers(registers.into())),
            Request::Write(registers) => debug::write(fd, &registers, xsave_len).map(|()| Answer::Done),
            Request::Translate(addr) => debug::translate(fd, addr).map(Answer::Address),
            Request::Control(control) => {
                control.apply(fd, 0)?;
                self.control = control;
                Ok(Answer::Done)
            }
        }
    }

    fn asleep(&self) -> bool {
        const INTERRUPT_FLAG: u64 = 1 << 9;
        let fd = &self.vcpu.fd;
        let halted = || fd.get_mp_state().is_ok_and(|s| s.mp_state == KVM_MP_STATE_HALTED);
        is_unstarted(fd) || halted() && fd.get_regs().is_ok_and(|r| r.rflags & INTERRUPT_FLAG == 0)
    }
}

/// Returns whether a vCPU waits for INIT and SIPI.
pub(super) fn is_unstarted(vcpu: &VcpuFd) -> bool {
    vcpu.get_mp_state().is_ok_and(|state| dump::is_unstarted(state.mp_state))
}
