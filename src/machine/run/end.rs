//! When the outcome stands: the rest of the output, what the console's patterns say, what is left of a guest that ended
//! badly.

use std::time::{Duration, Instant};

use super::{Error, GUEST, INPUT, MAIL, Running, SIGNAL, TICKED, WRITTEN, host};
use crate::backend::transcript::{Transcript, Verdict};
use crate::guest::protocol::LOG_NAME;
use crate::outcome::{BootTiming, Exits, Outcome, Report};
use crate::post_mortem::{PostMortem, Remains};

/// What a run came to.
pub struct Ended {
    /// How the guest ended.
    pub outcome: Outcome,
    /// What was found when something had gone wrong in it.
    pub post_mortem: Option<PostMortem>,
    /// Exits to user space of all vCPUs.
    pub exits: Exits,
    /// When what happened.
    pub timing: BootTiming,
}

/// What a kernel says of a panic, before the reason.
const PANIC: &str = "Kernel panic - not syncing: ";

impl Ended {
    /// The outcome in one sentence, with the reason that the guest's log has for it.
    pub fn sentence(&self) -> String {
        let sentence = self.outcome.sentence();
        let name = match &self.outcome {
            Outcome::Panicked(_) => PANIC,
            Outcome::Lost(_) => LOG_NAME,
            _ => return sentence,
        };
        let log = self.post_mortem.iter().flat_map(|found| &found.kernel_log);
        let mut reasons = log.filter_map(|line| line.split_once(name)).map(|(_, reason)| reason);
        // A panic's first line is the reason, its last one the end; of an init the last thing is what ended it.
        let reason = if name == PANIC { reasons.next() } else { reasons.next_back() };
        reason.map_or(sentence.clone(), |reason| format!("{sentence}: {reason}"))
    }

    /// For `--report`; `kernel` is the one that was booted.
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

impl Running {
    /// What the console's lines say, if they do.
    pub(super) fn verdict(&self) -> Option<Outcome> {
        let Verdict { good, line, .. } = self.options.transcript.as_ref()?.verdict()?;
        Some(if good { Outcome::Expected(line) } else { Outcome::Refused(line) })
    }

    /// The outcome when all output is written. What a pattern said of the last lines comes before the end that the guest
    /// itself made right after them, which may be heard of first.
    pub(super) fn judged(&self, outcome: Outcome) -> Outcome {
        let expecting = self.options.transcript.as_ref().is_some_and(Transcript::expects);
        match (&outcome, self.verdict()) {
            (Outcome::Quit | Outcome::Killed(_), _) => outcome,
            (_, Some(good @ Outcome::Expected(_))) => good,
            (end, None) if self.options.errand && end.is_orderly() => Outcome::Lost(end.word()),
            (end, Some(bad)) if end.is_orderly() => bad,
            (end, None) if expecting && end.is_orderly() => Outcome::Missed(end.word()),
            _ => outcome,
        }
    }

    /// Looks at what is left, when nothing runs any more.
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

    /// Waits until the last byte of every console is written, or somebody loses patience.
    pub(super) fn wait_for_output(&mut self, outcome: &Outcome) -> Result<(), Error> {
        // Somebody who stopped the guest wants to be gone: readers that still read get a second.
        let impatient = matches!(outcome, Outcome::Quit | Outcome::Killed(_) | Outcome::TimedOut(_) | Outcome::Hung(_));
        let limit = if impatient { Some(Instant::now() + Duration::from_secs(1)) } else { self.deadline };
        let mut quit = false;
        let mut unwritten = self.lines.len();
        loop {
            let timeout = limit.map(|d| d.saturating_duration_since(Instant::now()));
            let ready: Vec<u64> = self.poller.wait(timeout).map_err(host("waiting for events"))?.collect();
            for token in &ready {
                match token {
                    WRITTEN.. => {
                        // Each tells it once.
                        let line = self.lines.get((token - WRITTEN) as usize);
                        unwritten -= usize::from(line.is_some_and(|line| line.output.done().read().is_ok()));
                    }
                    INPUT.. if self.on_input(*token, true)? == Some(Outcome::Quit) => quit = true,
                    _ => {}
                }
            }
            let given_up = limit.is_some_and(|d| d <= Instant::now())
                || ready.contains(&SIGNAL) && self.ending_signal().is_some()
                || quit;
            if unwritten == 0 {
                return Ok(());
            }
            if given_up {
                log::warn!("nobody reads the console's output; the rest of it is lost");
                return Ok(());
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
    use crate::event::PanicSource;

    #[test]
    fn sentences_have_the_reason_of_the_log() {
        let sentence = |outcome, log: &[&str]| {
            let kernel_log = log.iter().map(ToString::to_string).collect();
            let post_mortem = Some(PostMortem { kernel_log, ..PostMortem::default() });
            let timing = BootTiming::new(Instant::now());
            Ended { outcome, post_mortem, exits: Exits::default(), timing }.sentence()
        };
        let log = [
            "[    1.0] vireo-init: first",
            "[    2.0] Kernel panic - not syncing: VFS",
            "[    3.0] vireo-init: last: it",
            "[    4.0] ---[ end Kernel panic - not syncing: VFS ]---",
        ];
        let lost = sentence(Outcome::Lost("powered-off"), &log);
        assert_eq!(lost, "the guest ended (powered-off) before the command did: last: it");
        assert!(sentence(Outcome::Panicked(PanicSource::Pvpanic), &log).ends_with("driver): VFS"));
        assert!(sentence(Outcome::Panicked(PanicSource::Pvpanic), &[]).ends_with("driver)"));
        assert_eq!(sentence(Outcome::Hung(Duration::from_secs(5)), &log).find("VFS"), None);
    }
}
