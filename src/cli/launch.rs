//! The part that `run` and `exec` share: from a machine's description to the report of its end.

use std::ffi::OsString;
use std::sync::Arc;
use std::time::Instant;

use super::debug::{self, DebugArgs};
use super::early::Early;
use super::watch::{Files, WatchArgs};
use super::{Failure, fault, say};
use crate::config::MachineConfig;
use crate::control::Controller;
use crate::exec::Session;
use crate::machine::Machine;
use crate::machine::mailbox::Mailbox;
use crate::machine::run::{Ended, RunOptions};
use crate::outcome::{EXIT_VIREO_FAILED, Outcome};

/// Creates the machine and runs it to its end, with a session for the command `words`. Returns the detected kind of
/// kernel.
pub(super) fn boot(
    config: MachineConfig,
    mut options: RunOptions,
    early: &Early,
    debug: &DebugArgs,
    session: Option<(Session, &[OsString])>,
) -> Result<(String, Ended), Failure> {
    let guard = early.watch(&options)?;
    let server = debug.open()?;
    options.paused = debug.paused();
    let vcpus = config.cpu.count;
    let mut machine = Machine::new(config, options.transcript.clone(), early.start)?;
    let mailbox = Mailbox::new()?;
    let controller = Controller::new(mailbox.clone());
    if let Some((session, words)) = session {
        let orders = session.listen(controller.clone(), words)?;
        options.forward = Some(Box::new(move |signal| orders.signal(signal)));
    }
    machine.load()?;
    let kernel = machine.kernel().to_string();
    let serve = |server| debug::serve(server, controller, machine.ram().clone(), vcpus);
    let serving = server.map(serve).transpose()?;
    drop(guard);
    let result = machine.run(options, mailbox);
    if let Some(serving) = serving {
        serving.finish(result.as_ref().map_or(EXIT_VIREO_FAILED, |ended| ended.outcome.exit_code()));
    }
    Ok((kernel, result?))
}

/// Runs a guest, and restarts it if it hangs and `--retry-on-hang` allows it; reports how it ended, writes the reports
/// and returns the exit status. `attempt` gets the options and the watch over its preparation; `tell` reports the last
/// attempt.
pub(super) fn supervise(
    watch: &WatchArgs,
    name: &str,
    start: Instant,
    mut attempt: impl FnMut(RunOptions, &Early) -> Result<(String, Ended), Failure>,
    tell: impl FnOnce(&Ended),
) -> Result<u8, Failure> {
    let files = Arc::new(watch.open(name)?);
    report_faults(files.clone(), name.into());
    let most = watch.attempts();
    let mut early = Early { files: files.clone(), name: name.into(), start, quiet: watch.quiet() };
    let mut attempts = 1;
    loop {
        match attempt(watch.options(&files, start)?, &early) {
            Ok((_, ended)) if attempts < most && matches!(ended.outcome, Outcome::Hung(_)) => {
                watch.tell(&ended);
                attempts += 1;
                early.start = Instant::now();
                if !watch.quiet() {
                    say(&format!("restarting the guest (attempt {attempts} of {most})"));
                }
            }
            Ok((kernel, ended)) => {
                tell(&ended);
                let mut report = ended.report(kernel);
                report.attempts = attempts;
                files.write(name, &report)?;
                return Ok(report.exit_code);
            }
            Err(failure) => {
                files.tell_failure(name, &failure);
                return Err(failure);
            }
        }
    }
}

/// Registers the reports to be written if vireo itself faults, as for every other failure.
fn report_faults(files: Arc<Files>, name: String) {
    fault::reports(move |sentence| {
        let _ = files.write_failure(&name, &sentence.into());
    });
}
