//! Post-mortem of a failed guest: registers of each vCPU, the last lines of the kernel's log, a core file.

mod kernel;
mod printk;
mod vmcore;

use std::path::PathBuf;

use crate::backend::console_watch::LastWords;
use crate::backend::output_file::OutputFile;
use crate::backend::transcript::{LINES, Transcript};
use crate::kvm::dump::CpuState;
use crate::memory::GuestRam;
use crate::printable::printable;
pub use vmcore::Error;

use kernel::Kernel;

/// Number of vCPUs whose registers are shown to people.
const SHOWN: usize = 8;

/// Findings of a post-mortem.
#[derive(Debug, Default)]
pub struct PostMortem {
    /// Registers of each vCPU, as text of several lines.
    pub registers: Vec<String>,
    /// Last lines of the kernel's log, oldest first; if there is no log, of the console.
    pub kernel_log: Vec<String>,
    /// Set if the user has already seen these lines on the console.
    pub log_was_shown: bool,
    /// Core file, if one was wanted.
    pub vmcore: Option<Result<PathBuf, Error>>,
}

/// Number of log lines searched for a kernel's last words: a panic's registers and stack follow its message.
const LAST_WORDS: usize = 100;

/// Returns the kernel's last words from its log in guest memory, because its console may have been quiet or absent.
pub fn last_words(ram: &GuestRam) -> Option<LastWords> {
    let lines = printk::last_lines(&Kernel::find(ram)?, LAST_WORDS)?;
    LastWords::of(lines.iter().map(String::as_str))
}

/// State of a guest that has ended; nothing of it runs any more.
pub struct Remains<'a> {
    /// Memory of the guest.
    pub ram: &'a GuestRam,
    /// States of the guest's vCPUs.
    pub cpus: &'a [CpuState],
    /// Output of the guest's consoles.
    pub transcript: Option<&'a Transcript>,
    /// Set if a console was on stdout or stderr.
    pub console_shown: bool,
    /// Set if the guest panicked: a vCPU that looks like one after a reset then really is one.
    pub panicked: bool,
}

impl Remains<'_> {
    /// Examines the guest, and writes a core file to `vmcore`; `stopped` returns whether the user wants to stop that.
    pub fn look(&self, vmcore: Option<&OutputFile>, stopped: impl FnMut() -> bool) -> PostMortem {
        let kernel = Kernel::find(self.ram);
        let console = self.transcript.map(Transcript::last_lines).unwrap_or_default();
        let log = kernel.as_ref().and_then(|kernel| printk::last_lines(kernel, LINES));
        let vmcore = vmcore.map(|core| {
            vmcore::write(core, self.ram, self.cpus, kernel.as_ref(), stopped).map(|()| core.path().into())
        });
        let log_was_shown = self.console_shown && log.as_ref().is_none_or(|log| mostly_in(log, &console));
        PostMortem {
            registers: self.cpus.iter().map(|cpu| self.registers(cpu)).collect(),
            kernel_log: log.unwrap_or(console).iter().map(|line| printable(line)).collect(),
            log_was_shown,
            vmcore,
        }
    }

    fn registers(&self, cpu: &CpuState) -> String {
        if self.panicked && cpu.is_reset() {
            return format!("vCPU {}: registers lost because the guest reset itself", cpu.id);
        }
        cpu.to_string()
    }
}

impl PostMortem {
    /// Returns text for people: the log unless they have seen it, and the registers if `registers` is set.
    pub fn text(&self, registers: bool) -> String {
        let mut text = String::new();
        let mut add = |line: &str| text.extend([line, "\n"]);
        if !self.log_was_shown && !self.kernel_log.is_empty() {
            add("the last lines of the guest's log:");
            self.kernel_log.iter().for_each(|line| add(line));
        }
        if !registers {
            return text;
        }
        self.registers.iter().take(SHOWN).for_each(|cpu| add(cpu));
        if let Some(more) = self.registers.len().checked_sub(SHOWN).filter(|more| *more > 0) {
            add(&format!("and {more} more vCPUs (see --report for their registers)"));
        }
        text
    }
}

/// Returns whether at least half of the lines are among the others.
fn mostly_in(lines: &[String], others: &[String]) -> bool {
    lines.iter().filter(|line| others.contains(line)).count() * 2 >= lines.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_shows_eight_and_commands_nothing() {
        let registers = (0..254).map(|n| format!("vCPU {n}: not started")).collect();
        let kernel_log = vec![printable("\x1b[2Jgone\ttab")];
        let mut found = PostMortem { registers, kernel_log, ..PostMortem::default() };
        let text = found.text(true);
        assert_eq!(text.lines().count(), 2 + 8 + 1, "{text}");
        assert!(text.contains("\u{FFFD}[2Jgone\ttab\nvCPU 0: not started\n"), "{text}");
        assert!(
            text.ends_with("vCPU 7: not started\nand 246 more vCPUs (see --report for their registers)\n"),
            "{text}"
        );
        found.log_was_shown = true;
        assert_eq!((found.text(true).lines().count(), found.text(false).as_str()), (8 + 1, ""));
    }

    #[test]
    fn registers_that_a_panicked_guest_reset_are_gone() {
        let mut cpu = CpuState::default();
        cpu.regs.rip = 0xFFF0;
        cpu.sregs.cs.base = 0xFFFF_0000;
        let (ram, cpus) = (GuestRam::anonymous(16 << 20), [cpu]);
        let remains = Remains { ram: &ram, cpus: &cpus, transcript: None, console_shown: false, panicked: true };
        let found = remains.look(None, || false);
        assert_eq!(found.registers, ["vCPU 0: registers lost because the guest reset itself"]);
        let found = Remains { panicked: false, ..remains }.look(None, || false);
        assert!(found.registers[0].contains("these are reset values"), "{}", found.registers[0]);
        assert!(found.kernel_log.is_empty() && found.vmcore.is_none());
    }
}
