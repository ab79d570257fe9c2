//! [`Debuggee`] in terms of gdbstub: pure translation, and the `monitor` commands.

use std::io;

use gdbstub::common::{Signal, Tid};
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint, HwWatchpointOps, SwBreakpoint,
    SwBreakpointOps, WatchKind,
};
use gdbstub::target::ext::monitor_cmd::{ConsoleOutput, MonitorCmd, MonitorCmdOps, outputln};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target, TargetError, TargetResult};

use super::debuggee::{Action, Debuggee};
use super::memory::translate;
use super::registers::{Block, X86};
use crate::kvm::debug::Access;

/// Converts an error into an answer for the client, instead of ending the session. gdb only accepts a number, so it
/// gets the errno.
fn refused(error: io::Error) -> TargetError<io::Error> {
    let errno = error.raw_os_error().and_then(|errno| u8::try_from(errno).ok());
    TargetError::Errno(errno.unwrap_or(libc::EIO as u8))
}

impl Target for Debuggee<'_> {
    type Arch = X86;
    type Error = io::Error;

    fn base_ops(&mut self) -> BaseOps<'_, X86, io::Error> {
        BaseOps::MultiThread(self)
    }

    fn use_fork_stop_reason(&self) -> bool {
        false
    }

    fn use_vfork_stop_reason(&self) -> bool {
        false
    }

    fn use_vforkdone_stop_reason(&self) -> bool {
        false
    }

    fn use_lldb_register_info(&self) -> bool {
        false
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }

    fn support_monitor_cmd(&mut self) -> Option<MonitorCmdOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for Debuggee<'_> {
    fn read_registers(&mut self, regs: &mut Block, tid: Tid) -> TargetResult<(), Self> {
        self.current = self.vcpu(tid).map_err(refused)?;
        *regs = Block::new(&*self.registers(self.current).map_err(refused)?);
        Ok(())
    }

    fn write_registers(&mut self, regs: &Block, tid: Tid) -> TargetResult<(), Self> {
        let vcpu = self.vcpu(tid).map_err(refused)?;
        self.write_block(vcpu, regs).map_err(refused)
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        self.current = self.vcpu(tid).map_err(refused)?;
        self.breakpoints.read(self.guest, self.current, start, data).map_err(refused)
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let vcpu = self.vcpu(tid).map_err(refused)?;
        self.breakpoints.write(self.guest, vcpu, start, data).map_err(refused)
    }

    fn list_active_threads(&mut self, thread: &mut dyn FnMut(Tid)) -> Result<(), io::Error> {
        (0..self.guest.vcpus()).for_each(|vcpu| thread(super::debuggee::tid(vcpu)));
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadResume for Debuggee<'_> {
    fn resume(&mut self) -> Result<(), io::Error> {
        self.go_on()
    }

    fn clear_resume_actions(&mut self) -> Result<(), io::Error> {
        self.forget_actions();
        Ok(())
    }

    // A machine does not have gdb's signals.
    fn set_resume_action_continue(&mut self, tid: Tid, _signal: Option<Signal>) -> Result<(), io::Error> {
        self.set_action(tid, Action::Continue)
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSingleStep for Debuggee<'_> {
    fn set_resume_action_step(&mut self, tid: Tid, _signal: Option<Signal>) -> Result<(), io::Error> {
        self.set_action(tid, Action::Step)
    }
}

impl MultiThreadSchedulerLocking for Debuggee<'_> {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), io::Error> {
        self.locked = true;
        Ok(())
    }
}

impl ThreadExtraInfo for Debuggee<'_> {
    fn thread_extra_info(&self, tid: Tid, buf: &mut [u8]) -> Result<usize, io::Error> {
        let vcpu = self.vcpu(tid)?;
        let ring = self.registers(vcpu).map_or(0, |registers| registers.special.cs.selector & 3);
        let text = format!("vCPU {vcpu}, ring {ring}");
        Ok(buf.iter_mut().zip(text.bytes()).map(|(to, from)| *to = from).count())
    }
}

impl Breakpoints for Debuggee<'_> {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for Debuggee<'_> {
    fn add_sw_breakpoint(&mut self, addr: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.breakpoints.insert(self.guest, self.current, addr).map_err(refused)?;
        Ok(true)
    }

    fn remove_sw_breakpoint(&mut self, addr: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.breakpoints.remove(self.guest.ram(), addr))
    }
}

impl HwBreakpoint for Debuggee<'_> {
    fn add_hw_breakpoint(&mut self, addr: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.insert_hardware(addr, 1, Access::Execute))
    }

    fn remove_hw_breakpoint(&mut self, addr: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.remove_hardware(addr, 1, Access::Execute))
    }
}

/// Returns the access that a debug register can watch: writes, or reads and writes; x86 cannot watch reads alone.
fn access(kind: WatchKind) -> Option<Access> {
    match kind {
        WatchKind::Write => Some(Access::Write),
        WatchKind::ReadWrite => Some(Access::Any),
        WatchKind::Read => None,
    }
}

impl HwWatchpoint for Debuggee<'_> {
    fn add_hw_watchpoint(&mut self, addr: u64, len: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        Ok(access(kind).is_some_and(|access| self.insert_hardware(addr, len, access)))
    }

    fn remove_hw_watchpoint(&mut self, addr: u64, len: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        Ok(access(kind).is_some_and(|access| self.remove_hardware(addr, len, access)))
    }
}

const MONITOR_HELP: &str = "\
monitor translate ADDR   guest-physical address of a virtual address
monitor phys ADDR [LEN]  guest-physical memory, 16 bytes or up to 1024";

impl MonitorCmd for Debuggee<'_> {
    fn handle_monitor_cmd(&mut self, command: &[u8], mut out: ConsoleOutput<'_>) -> Result<(), io::Error> {
        outputln!(out, "{}", self.monitor(&String::from_utf8_lossy(command)));
        Ok(())
    }
}

impl Debuggee<'_> {
    pub(super) fn write_block(&self, vcpu: u32, block: &Block) -> io::Result<()> {
        let mut registers = self.registers(vcpu)?;
        block.store(&mut registers).ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        self.guest.debug(vcpu, crate::kvm::debug::Request::Write(registers)).map(drop)
    }

    /// Returns the output of `monitor COMMAND`.
    pub(super) fn monitor(&self, command: &str) -> String {
        let mut words = command.split_whitespace();
        let (command, addr, len) = (words.next(), words.next().and_then(number), words.next().and_then(number));
        match (command, addr) {
            (Some("translate"), Some(addr)) => match translate(self.guest, self.current, addr) {
                Ok(phys) => format!("{phys:#x}"),
                Err(_) => "not mapped".into(),
            },
            (Some("phys"), Some(addr)) => {
                let mut data = vec![0; len.unwrap_or(16).clamp(1, 1024) as usize];
                match self.breakpoints.read_phys(self.guest.ram(), addr, &mut data) {
                    Ok(()) => dump(addr, &data),
                    Err(_) => "not all RAM".into(),
                }
            }
            _ => MONITOR_HELP.into(),
        }
    }
}

/// Parses a number as gdb writes it: decimal, or hexadecimal after 0x.
fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

fn dump(addr: u64, data: &[u8]) -> String {
    let line = |(at, bytes): (u64, &[u8])| {
        let hex: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{at:#x}: {}", hex.join(" "))
    };
    (addr..).step_by(16).zip(data.chunks(16)).map(line).collect::<Vec<_>>().join("\n")
}
