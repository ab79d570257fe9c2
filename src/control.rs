//! The handle to a running machine, for other threads: signals, an API, a debugger, tests.

use std::sync::Arc;

use crate::machine::mailbox::{Mailbox, Request, answer};
use crate::outcome::Outcome;

/// Sends messages to the machine's event loop. Cloning is cheap; the machine may end at any time, and then messages go
/// nowhere.
#[derive(Clone)]
pub struct Controller(Arc<Mailbox>);

impl Controller {
    /// A handle to the machine that runs with `mailbox`.
    pub fn new(mailbox: Arc<Mailbox>) -> Self {
        Controller(mailbox)
    }

    /// Stops vCPUs and devices with nothing half done. Returns whether the machine did so (false: it has ended).
    pub fn pause(&self) -> bool {
        let (done, wait) = answer();
        self.0.send(Request::Pause(done));
        wait.recv().is_ok()
    }

    /// Lets them go on.
    pub fn resume(&self) -> bool {
        let (done, wait) = answer();
        self.0.send(Request::Resume(done));
        wait.recv().is_ok()
    }

    /// Presses the ACPI power button.
    pub fn press_power_button(&self) {
        self.0.send(Request::PressPowerButton);
    }

    /// Ends the guest now.
    pub fn stop(&self, outcome: Outcome) {
        self.0.send(Request::Stop(outcome));
    }
}
