//! Outcome of a guest: one enum with its exit code and sentence, and the report with the counters of the run.

use std::time::Duration;

use crate::guest_event::PanicSource;
use crate::options::Span;

/// Exit code when vireo or the host failed, not the guest.
pub const EXIT_VIREO_FAILED: u8 = 125;
/// Exit code when the console showed a forbidden line, or did not show an expected one.
pub const EXIT_UNEXPECTED: u8 = 73;
/// Exit code of wrong usage.
pub const EXIT_USAGE: u8 = 2;

/// End of a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest powered off through ACPI.
    PoweredOff,
    /// The guest reset itself, in the way that the text names.
    Rebooted(&'static str),
    /// All vCPUs halted with interrupts off: nothing will ever wake them.
    Halted,
    /// The guest chose the exit status itself, through the port of `--debug-exit`.
    DebugExit(u8),
    /// The user typed Ctrl-A X on the terminal.
    Quit,
    /// The kernel panicked, as reported by this source.
    Panicked(PanicSource),
    /// The guest crashed: a triple fault that was not a reboot, an unhandled exit or a KVM internal error; the text is
    /// one sentence.
    Crashed(String),
    /// The time limit was reached.
    TimedOut(Duration),
    /// A signal to vireo stopped the guest.
    Killed(i32),
    /// The guest produced neither output nor work for this long.
    Hung(Duration),
    /// The console showed this expected line.
    Expected(String),
    /// The console showed this forbidden line.
    Refused(String),
    /// The guest ended normally, but the console had not shown an expected line.
    Missed(&'static str),
    /// `exec`: the command exited with this code.
    Exited(u8),
    /// `exec`: this signal killed the command in the guest.
    Signalled(i32),
    /// `exec`: the command could not be started. The code is 126 or 127; the text gives the reason.
    NotStarted(u8, String),
    /// `exec`: the guest could not be prepared for the command.
    NotReady(String),
    /// `exec`: the guest ended before the command did.
    Lost(&'static str),
    /// `exec`: some of the command's output did not reach its destination on the host, for the reason in the text.
    OutputLost(String),
    /// The guest ended well, but data that it wrote to a disk did not reach the host's disk, as the text says.
    DataLost(String),
    /// gdb's `kill` ended the guest.
    KilledByDebugger,
}

impl Outcome {
    /// Returns the process exit status for this outcome.
    pub fn exit_code(&self) -> u8 {
        match self {
            Outcome::PoweredOff | Outcome::Rebooted(_) | Outcome::Halted | Outcome::Quit => 0,
            Outcome::Expected(_) => 0,
            Outcome::Panicked(_) => 70,
            Outcome::Crashed(_) | Outcome::Lost(_) => 71,
            Outcome::Hung(_) => 72,
            Outcome::Refused(_) | Outcome::Missed(_) => EXIT_UNEXPECTED,
            Outcome::TimedOut(_) => 124,
            Outcome::NotReady(_) | Outcome::OutputLost(_) | Outcome::DataLost(_) => EXIT_VIREO_FAILED,
            Outcome::DebugExit(code) | Outcome::Exited(code) | Outcome::NotStarted(code, _) => *code,
            Outcome::KilledByDebugger => 128 + libc::SIGKILL as u8,
            Outcome::Killed(signal) | Outcome::Signalled(signal) => {
                128u8.saturating_add(u8::try_from(*signal).unwrap_or(0))
            }
        }
    }

    /// Returns one word for scripts.
    pub fn word(&self) -> &'static str {
        match self {
            Outcome::PoweredOff => "powered-off",
            Outcome::Rebooted(_) => "rebooted",
            Outcome::Halted => "halted",
            Outcome::DebugExit(_) => "debug-exit",
            Outcome::Quit => "quit",
            Outcome::Panicked(_) => "panicked",
            Outcome::Crashed(_) => "crashed",
            Outcome::TimedOut(_) => "timed-out",
            Outcome::Killed(_) | Outcome::KilledByDebugger => "killed",
            Outcome::Hung(_) => "hung",
            Outcome::Expected(_) => "expected",
            Outcome::Refused(_) => "refused",
            Outcome::Missed(_) => "missed",
            Outcome::Exited(_) => "exited",
            Outcome::Signalled(_) => "signalled",
            Outcome::NotStarted(..) => "not-started",
            Outcome::NotReady(_) => "not-ready",
            Outcome::Lost(_) => "lost",
            Outcome::OutputLost(_) => "output-lost",
            Outcome::DataLost(_) => "data-lost",
        }
    }

    /// Returns whether the guest ended with no visible failure in it.
    pub fn is_orderly(&self) -> bool {
        matches!(self, Outcome::PoweredOff | Outcome::Rebooted(_) | Outcome::Halted)
    }

    /// Returns whether something went wrong in the guest, so that a post-mortem is worthwhile.
    pub fn is_failure(&self) -> bool {
        use Outcome::{Crashed, Hung, Lost, NotReady, Panicked, Refused, TimedOut};
        matches!(self, Panicked(_) | Crashed(_) | Hung(_) | TimedOut(_) | Refused(_) | Lost(_) | NotReady(_))
    }

    /// Returns one sentence for people.
    pub fn sentence(&self) -> String {
        match self {
            Outcome::PoweredOff => "the guest powered off".into(),
            Outcome::Rebooted(how) => format!("the guest rebooted ({how})"),
            Outcome::Halted => "the guest halted: every vCPU sleeps with interrupts off".into(),
            Outcome::DebugExit(code) => format!("the guest ended by debug exit with status {code}"),
            Outcome::Quit => "ended from the terminal by Ctrl-A X".into(),
            Outcome::Panicked(PanicSource::Pvpanic) => {
                "the guest kernel panicked (reported by its pvpanic driver)".into()
            }
            Outcome::Panicked(PanicSource::Console) => {
                "the guest kernel panicked (judging by the panic message on its console)".into()
            }
            Outcome::Panicked(PanicSource::Log) => {
                "the guest kernel panicked (judging by the panic message in its log)".into()
            }
            Outcome::Crashed(what) => format!("the guest crashed: {what}"),
            Outcome::TimedOut(limit) => format!("the guest was still running after the time limit of {}", Span(*limit)),
            Outcome::KilledByDebugger => "killed by the debugger".into(),
            Outcome::Killed(signal) => format!("stopped by signal {signal} ({})", signal_name(*signal)),
            Outcome::Hung(limit) => format!("the guest hung: no output and no CPU use for {}", Span(*limit)),
            Outcome::Expected(line) => format!("the console showed an expected line: {line}"),
            Outcome::Refused(line) => format!("the console showed a forbidden line: {line}"),
            Outcome::Missed(word) => format!("the guest ended ({word}) before the console showed an expected line"),
            Outcome::Exited(code) => format!("the command exited with {code}"),
            Outcome::Signalled(signal) => {
                format!("the command was killed by signal {signal} ({})", signal_name(*signal))
            }
            Outcome::NotStarted(_, why) | Outcome::NotReady(why) => why.clone(),
            Outcome::OutputLost(why) | Outcome::DataLost(why) => why.clone(),
            Outcome::Lost(word) => format!("the guest ended ({word}) before the command did"),
        }
    }
}

fn signal_name(signal: i32) -> &'static str {
    match signal {
        libc::SIGINT => "SIGINT",
        libc::SIGTERM => "SIGTERM",
        libc::SIGHUP => "SIGHUP",
        libc::SIGQUIT => "SIGQUIT",
        libc::SIGKILL => "SIGKILL",
        libc::SIGSEGV => "SIGSEGV",
        libc::SIGBUS => "SIGBUS",
        libc::SIGILL => "SIGILL",
        libc::SIGFPE => "SIGFPE",
        libc::SIGABRT => "SIGABRT",
        libc::SIGPIPE => "SIGPIPE",
        libc::SIGALRM => "SIGALRM",
        libc::SIGTRAP => "SIGTRAP",
        libc::SIGUSR1 => "SIGUSR1",
        libc::SIGUSR2 => "SIGUSR2",
        _ => "unknown signal",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_those_documented() {
        let codes = [
            (Outcome::PoweredOff, 0),
            (Outcome::Rebooted("triple fault"), 0),
            (Outcome::Halted, 0),
            (Outcome::DebugExit(33), 33),
            (Outcome::Panicked(PanicSource::Console), 70),
            (Outcome::Panicked(PanicSource::Log), 70),
            (Outcome::Crashed("x".into()), 71),
            (Outcome::TimedOut(Duration::from_secs(1)), 124),
            (Outcome::Killed(libc::SIGTERM), 143),
            (Outcome::Killed(libc::SIGINT), 130),
            (Outcome::Hung(Duration::from_secs(1)), 72),
            (Outcome::Expected("x".into()), 0),
            (Outcome::Refused("x".into()), 73),
            (Outcome::Missed("powered-off"), 73),
            (Outcome::Exited(42), 42),
            (Outcome::Signalled(libc::SIGKILL), 137),
            (Outcome::NotStarted(127, "x".into()), 127),
            (Outcome::NotReady("x".into()), 125),
            (Outcome::Lost("rebooted"), 71),
            (Outcome::OutputLost("x".into()), 125),
            (Outcome::KilledByDebugger, 137),
        ];
        for (outcome, code) in codes {
            assert_eq!(outcome.exit_code(), code, "{outcome:?}");
        }
    }
}
