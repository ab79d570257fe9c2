//! Handling after the outcome is decided: the remaining output, the verdict of the console's patterns, and the
//! post-mortem of a guest that failed.

use std::time::{Duration, Instant};

use super::{Errand, Error, GUEST, INPUT, MAIL, Running, SIGNAL, SIGNALS, TICKED, WRITTEN, host};
use crate::backend::console_watch::LastWords;
use crate::backend::transcript::{Transcript, Verdict};
use crate::guest_event::PanicSource;
use crate::outcome::Outcome;
use crate::post_mortem::{self, PostMortem, Remains};
use crate::report::{BootTiming, Exits, Report};

/// Result of a run.
pub struct Ended {
    /// Outcome of the guest.
    pub outcome: Outcome,
    /// Reason for the outcome, in the words of the guest's log.
    pub reason: Option<String>,
    /// Findings after a failure of the guest.
    pub post_mortem: Option<PostMortem>,
    /// Exits to user space of all vCPUs.
    pub exits: Exits,
    /// Times of the boot's steps.
    pub timing: BootTiming,
}

/// Prefix of the reason in a kernel's panic message.
const PANIC: &str = "Kernel panic - not syncing: ";

impl Ended {
    /// Returns the outcome in one sentence, with the reason.
    pub fn sentence(&self) -> String {
        let sentence = self.outcome.sentence();
        self.reason.as_ref().map_or(sentence.clone(), |reason| format!("{sentence}: {reason}"))
    }

    /// Returns the report for `--report`; `kernel` describes the booted kernel.
    pub fn report(&self, kernel: String) -> Report {
        let mut report = Report::new(&self.outcome, kernel, &self.timing, self.exits);
        report.detail = self.sentence();
        if let Some(found) = &self.post_mortem {
            report.registers.clone_from(&found.registers);
            report.kernel_log.clone_from(&found.kernel_log);
            report.vmcore = found.vmcore.as_ref().and_then(|written| written.as_ref().ok().cloned());
        }
        report
    }
}

/// Returns the reason that the guest's log gives for the outcome.
pub(super) fn reason(outcome: &Outcome, log: &[String], errand: Option<Errand>) -> Option<String> {
    let after = |name: &'static str| log.iter().filter_map(move |line| Some(line.split_once(name)?.1.to_string()));
    match outcome {
        // The first such line has the reason; the last one marks the end of the panic.
        Outcome::Panicked(_) => after(PANIC).next(),
        Outcome::Lost(_) => after(errand?.log_name).next_back(),
        _ => None,
    }
}

/// Returns the final outcome, given what the console showed (`verdict`) and whether it had to show something
/// (`expecting`). A guest with an `errand` must not end on its own.
fn judged(outcome: Outcome, verdict: Option<Outcome>, errand: bool, expecting: bool) -> Outcome {
    let regular = outcome.is_orderly() || matches!(outcome, Outcome::Exited(_) | Outcome::Signalled(_));
    match (&outcome, verdict) {
        (Outcome::Quit | Outcome::Killed(_), _) => outcome,
        (_, Some(good @ Outcome::Expected(_))) => good,
        (_, Some(bad)) if regular => bad,
        (end, None) if errand && end.is_orderly() => Outcome::Lost(end.word()),
        (end, None) if expecting && (end.is_orderly() || *end == Outcome::Exited(0)) => Outcome::Missed(end.word()),
        _ => outcome,
    }
}

/// Returns the outcome of a run of which the host may have lost data: a success becomes [`Outcome::DataLost`], because
/// anyone who relies on the data must learn of the loss. A failure stays what it is.
fn kept(outcome: Outcome, unsaved: &[String]) -> Outcome {
    let Some((last, others)) = unsaved.split_last() else { return outcome };
    let told = if outcome.exit_code() == 0 { others } else { unsaved };
    told.iter().for_each(|what| log::warn!("{what}"));
    if outcome.exit_code() == 0 { Outcome::DataLost(last.clone()) } else { outcome }
}

impl Running {
    /// Returns the outcome that the console's lines decide, if any.
    pub(super) fn verdict(&self) -> Option<Outcome> {
        let Verdict { good, line, .. } = self.options.transcript.as_ref()?.verdict()?;
        Some(if good { Outcome::Expected(line) } else { Outcome::Refused(line) })
    }

    /// Returns the outcome of a triple fault of vCPU `id`. Linux may reboot by one, after it has emptied the interrupt
    /// table; but AMD processors do not keep the emptied table, and a kernel that panicked may reboot in this way too.
    /// If no console line tells which it was, the kernel's log does.
    pub(super) fn after_triple_fault(&self, id: u32, idt_emptied: bool) -> Outcome {
        let said = if self.restarting { Some(LastWords::Restart) } else { post_mortem::last_words(&self.board.ram) };
        match said {
            Some(LastWords::Panic) => Outcome::Panicked(PanicSource::Log),
            Some(LastWords::Restart) => Outcome::Rebooted("triple fault"),
            None if idt_emptied => Outcome::Rebooted("triple fault"),
            None => Outcome::Crashed(format!("triple fault on vCPU {id}")),
        }
    }

    /// Returns the outcome after all output is written. A pattern that matched in the last lines takes precedence over
    /// the end that the guest itself caused right after them, although that end may be noticed first. `given_up` is the
    /// reason why output is missing.
    pub(super) fn judged(&self, outcome: Outcome, given_up: Option<Outcome>) -> Outcome {
        let expecting = self.options.transcript.as_ref().is_some_and(Transcript::expects);
        let judged = judged(outcome, self.verdict(), self.options.errand.is_some(), expecting);
        let unsaved: Vec<String> = self.devices.iter().filter_map(|device| device.unsaved()).collect();
        let judged = kept(judged, &unsaved);
        if !matches!(judged, Outcome::Exited(_) | Outcome::Signalled(_)) {
            return judged;
        }
        // The exit code of a command whose output was not read means little: the command may have been killed for that
        // reason.
        let lost = self.lines.iter().find_map(|line| line.output.lost());
        // After Ctrl-A X, unwritten output is expected.
        let given_up = given_up.filter(|why| *why != Outcome::Quit);
        lost.map(Outcome::OutputLost).or(given_up).unwrap_or(judged)
    }

    /// Examines the stopped guest.
    pub(super) fn post_mortem(&self, outcome: &Outcome) -> PostMortem {
        let remains = Remains {
            ram: &self.board.ram,
            cpus: &self.cpus,
            transcript: self.options.transcript.as_ref(),
            console_shown: self.console_shown,
            panicked: matches!(outcome, Outcome::Panicked(_)),
        };
        remains.look(self.options.vmcore.as_deref(), || self.ending_signal().is_some())
    }

    /// Waits until the last byte of every console is written. Returns the outcome to use if the wait ends early: a
    /// signal, Ctrl-A X or the time limit.
    pub(super) fn wait_for_output(&mut self, outcome: &Outcome) -> Result<Option<Outcome>, Error> {
        // The user who stopped the guest wants vireo to end: readers that still read get one second.
        let impatient = matches!(outcome, Outcome::Quit | Outcome::Killed(_) | Outcome::TimedOut(_) | Outcome::Hung(_));
        let limit = if impatient { Some(Instant::now() + Duration::from_secs(1)) } else { self.deadline };
        let mut unwritten = self.lines.len();
        loop {
            let timeout = limit.map(|d| d.saturating_duration_since(Instant::now()));
            let ready: Vec<u64> = self.poller.wait(timeout).map_err(host("waiting for events"))?.collect();
            let mut given_up = None;
            for token in ready.iter().copied() {
                match token {
                    WRITTEN.. => {
                        // Each line signals its completion once.
                        let line = self.lines.get((token - WRITTEN) as usize);
                        unwritten -= usize::from(line.is_some_and(|line| line.output.done().read().is_ok()));
                    }
                    INPUT.. => given_up = self.on_input(token, true)?.or(given_up),
                    SIGNAL => {
                        let signal = self.ending_signal().filter(|signal| SIGNALS.contains(signal));
                        given_up = signal.map(Outcome::Killed).or(given_up);
                    }
                    _ => {}
                }
            }
            if unwritten == 0 {
                return Ok(None);
            }
            if given_up.is_some() || limit.is_some_and(|d| d <= Instant::now()) {
                log::warn!("the console's reader has stopped; the remaining output is lost");
                return Ok(given_up.or(self.options.timeout.map(Outcome::TimedOut)));
            }
            if ready.contains(&TICKED) {
                let _ = self.ticker.wait();
            }
            if ready.contains(&GUEST) {
                while self.board.events.take().is_some() {}
            }
            if ready.contains(&MAIL) {
                let _ = self.mailbox.fd.read();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_console_s_word_counts_with_every_regular_end() {
        use Outcome::{Crashed, Exited, Expected, Killed, Lost, Missed, PoweredOff, Refused, Signalled};
        let (good, bad) = (|| Some(Expected("ok".into())), || Some(Refused("BUG".into())));
        let crashed = || Crashed("x".into());
        let ends = [
            (PoweredOff, None, false, PoweredOff),
            (PoweredOff, None, true, Missed("powered-off")),
            (PoweredOff, bad(), false, Refused("BUG".into())),
            (Exited(0), None, false, Exited(0)),
            (Exited(0), None, true, Missed("exited")),
            (Exited(0), bad(), false, Refused("BUG".into())),
            (Exited(0), good(), true, Expected("ok".into())),
            // The exit code itself says that something was wrong.
            (Exited(3), None, true, Exited(3)),
            (Signalled(9), None, true, Signalled(9)),
            (Signalled(9), bad(), false, Refused("BUG".into())),
            (crashed(), bad(), true, crashed()),
            (crashed(), good(), true, Expected("ok".into())),
            (Killed(15), good(), true, Killed(15)),
        ];
        for (end, verdict, expecting, outcome) in ends {
            assert_eq!(judged(end.clone(), verdict.clone(), false, expecting), outcome, "{end:?} {verdict:?}");
        }
        assert_eq!(judged(PoweredOff, None, true, true), Lost("powered-off"));
        assert_eq!(judged(PoweredOff, bad(), true, true), Refused("BUG".into()));
    }

    #[test]
    fn lost_data_is_no_success() {
        use Outcome::{Crashed, DataLost, Exited, Expected, PoweredOff};
        let unsaved = ["a".to_string(), "what the guest wrote to b may be lost: EIO".to_string()];
        let lost = DataLost(unsaved[1].clone());
        for (end, outcome) in [
            (PoweredOff, lost.clone()),
            (Exited(0), lost.clone()),
            (Expected("ok".into()), lost.clone()),
            (Exited(3), Exited(3)),
            (Crashed("x".into()), Crashed("x".into())),
        ] {
            assert_eq!(kept(end.clone(), &[]), end);
            assert_eq!(kept(end, &unsaved), outcome);
        }
        assert_eq!((lost.exit_code(), lost.word(), lost.sentence()), (125, "data-lost", unsaved[1].clone()));
    }

    #[test]
    fn the_log_has_reasons() {
        let log = [
            "[    1.0] init: first",
            "[    2.0] Kernel panic - not syncing: VFS",
            "[    3.0] init: last: it",
            "[    4.0] ---[ end Kernel panic - not syncing: VFS ]---",
        ];
        let log = log.map(String::from);
        let errand = Some(Errand { log_name: "init: " });
        let panicked = Outcome::Panicked(PanicSource::Pvpanic);
        assert_eq!(reason(&Outcome::Lost("powered-off"), &log, errand).as_deref(), Some("last: it"));
        assert_eq!(reason(&panicked, &log, None).as_deref(), Some("VFS"));
        assert_eq!(reason(&panicked, &[], None), None);
        assert_eq!(reason(&Outcome::Hung(Duration::from_secs(5)), &log, errand), None);
    }
}
