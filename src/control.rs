//! The handle to a running machine, for other threads: signals, an API, a debugger, tests.

use std::io;
use std::sync::Arc;

use crate::kvm::debug;
use crate::machine::mailbox::{Mailbox, Request, Traps, answer};
use crate::machine::{BALLOON, MEMORY};
use crate::outcome::Outcome;
use crate::vcpu::Reply as VcpuReply;
use crate::virtio::balloon::{BalloonStats, FreeHints};
use crate::virtio::control::{Control, ControlError, Reply};
use crate::virtio::mem::MemStatus;

/// Sends messages to the machine's event loop. Cloning is cheap; the machine may end at any time, and then messages go
/// nowhere.
#[derive(Clone)]
pub struct Controller(Arc<Mailbox>);

impl Controller {
    /// A handle to the machine that runs with `mailbox`.
    pub fn new(mailbox: Arc<Mailbox>) -> Self {
        Controller(mailbox)
    }

    /// Notes that the guest's init said that it runs.
    pub fn init_started(&self) {
        self.0.send(Request::InitStarted);
    }

    /// Stops vCPUs and devices with nothing half done. Returns whether the machine did so (false: it has ended).
    pub fn pause(&self) -> bool {
        let (done, wait) = answer();
        self.0.send(Request::Pause(done));
        wait.recv().is_ok()
    }

    /// Lets them go on.
    pub fn resume(&self) -> bool {
        self.resume_only(None)
    }

    /// Lets these vCPUs go on while the others stay where they are; all with `None`.
    pub fn resume_only(&self, vcpus: Option<Vec<u32>>) -> bool {
        let (done, wait) = answer();
        self.0.send(Request::Resume(vcpus, done));
        wait.recv().is_ok()
    }

    /// Has `traps` told of vCPUs that stop for the debugger, until it is dropped. Without it they go on.
    pub fn attach(&self, traps: &Arc<Traps>) {
        self.0.send(Request::Attach(Arc::downgrade(traps)));
    }

    /// Has a vCPU do something for a debugger. The machine must be paused.
    pub fn debug(&self, vcpu: u32, request: debug::Request) -> io::Result<debug::Answer> {
        let (done, wait) = answer();
        self.0.send(Request::Debug(vcpu, request.into(), done));
        match wait.recv() {
            Ok(VcpuReply::Debug(answer)) => answer,
            _ => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    /// Asks a device, by its name, for something; waits for the answer.
    pub fn device(&self, name: &str, control: Control) -> Result<Reply, ControlError> {
        let (done, wait) = answer();
        self.0.send(Request::Device(name.into(), control, done));
        wait.recv().unwrap_or(Err(ControlError::Ended))
    }

    /// Asks the guest to give up `bytes` of its memory in all, in pages of 4 KiB. It does so in its own time, and not
    /// further than it can: [`Controller::balloon_stats`] tells how far it is.
    pub fn set_balloon(&self, bytes: u64) -> Result<(), ControlError> {
        self.device(BALLOON, Control::SetBalloon(bytes)).map(drop)
    }

    /// How large the balloon is, and what the guest tells of its memory.
    pub fn balloon_stats(&self) -> Result<BalloonStats, ControlError> {
        match self.device(BALLOON, Control::BalloonStats)? {
            Reply::BalloonStats(stats) => Ok(stats),
            _ => Err(ControlError::Unsupported(BALLOON.into())),
        }
    }

    /// Has the guest tell which of its memory is free, for who is about to copy the rest. It holds on to that memory until
    /// [`Controller::end_hints`].
    pub fn start_hints(&self) -> Result<(), ControlError> {
        self.device(BALLOON, Control::StartHints).map(drop)
    }

    /// What the guest has told since [`Controller::start_hints`].
    pub fn free_hints(&self) -> Result<FreeHints, ControlError> {
        match self.device(BALLOON, Control::FreeHints)? {
            Reply::FreeHints(hints) => Ok(hints),
            _ => Err(ControlError::Unsupported(BALLOON.into())),
        }
    }

    /// Forgets what the guest has told, and lets it use that memory.
    pub fn end_hints(&self) -> Result<(), ControlError> {
        self.device(BALLOON, Control::EndHints).map(drop)
    }

    /// Asks the guest to have `bytes` of memory beside its RAM: whole blocks, at most the size of its memory device. It
    /// plugs and unplugs them in its own time, and as far as it can: [`Controller::memory_status`] tells how far it is.
    pub fn request_memory(&self, bytes: u64) -> Result<(), ControlError> {
        self.device(MEMORY, Control::RequestMemory(bytes)).map(drop)
    }

    /// How much memory the guest has beside its RAM, and shall have.
    pub fn memory_status(&self) -> Result<MemStatus, ControlError> {
        match self.device(MEMORY, Control::MemoryStatus)? {
            Reply::MemoryStatus(status) => Ok(status),
            _ => Err(ControlError::Unsupported(MEMORY.into())),
        }
    }

    /// Makes a disk (`disk0` is the first) larger, and its file or overlay with it: to `bytes`, whole sectors of 512.
    pub fn resize_disk(&self, name: &str, bytes: u64) -> Result<(), ControlError> {
        self.device(name, Control::ResizeDisk(bytes)).map(drop)
    }

    /// Plugs the cable of a network card (`net0` is the first) in, or pulls it: the guest sees that the link is gone, and
    /// packets are dropped in both directions.
    pub fn set_link(&self, name: &str, up: bool) -> Result<(), ControlError> {
        self.device(name, Control::SetLink(up)).map(drop)
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
