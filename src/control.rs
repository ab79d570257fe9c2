//! Handle to a running machine for other threads: signals, an API, a debugger, tests.

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

/// Sends messages to the machine's event loop. Cloning is cheap. The machine may end at any time; later messages are
/// dropped.
#[derive(Clone)]
pub struct Controller(Arc<Mailbox>);

impl Controller {
    /// Creates a handle to the machine that runs with `mailbox`.
    pub fn new(mailbox: Arc<Mailbox>) -> Self {
        Controller(mailbox)
    }

    /// Notes that the guest's init has reported its start.
    pub fn init_started(&self) {
        self.0.send(Request::InitStarted);
    }

    /// Pauses vCPUs and devices with no operation half done. Returns whether the machine did so (false: it has ended).
    pub fn pause(&self) -> bool {
        let (done, wait) = answer();
        self.0.send(Request::Pause(done));
        wait.recv().is_ok()
    }

    /// Resumes devices and vCPUs. Returns whether the machine did so (false: it has ended).
    pub fn resume(&self) -> bool {
        self.resume_only(None)
    }

    /// Resumes the devices and only the given vCPUs, or all with `None`. Returns whether the machine did so.
    pub fn resume_only(&self, vcpus: Option<Vec<u32>>) -> bool {
        let (done, wait) = answer();
        self.0.send(Request::Resume(vcpus, done));
        wait.recv().is_ok()
    }

    /// Reports vCPUs that stop for the debugger to `traps`, until it is dropped. Without traps they continue.
    pub fn attach(&self, traps: &Arc<Traps>) {
        self.0.send(Request::Attach(Arc::downgrade(traps)));
    }

    /// Makes a vCPU handle a debugger's request. The machine must be paused.
    pub fn debug(&self, vcpu: u32, request: debug::Request) -> io::Result<debug::Answer> {
        let (done, wait) = answer();
        self.0.send(Request::Debug(vcpu, request.into(), done));
        match wait.recv() {
            Ok(VcpuReply::Debug(answer)) => answer,
            _ => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    /// Sends a control to the device with this name and waits for the reply.
    pub fn device(&self, name: &str, control: Control) -> Result<Reply, ControlError> {
        let (done, wait) = answer();
        self.0.send(Request::Device(name.into(), control, done));
        wait.recv().unwrap_or(Err(ControlError::Ended))
    }

    /// Asks the guest to give up `bytes` of its memory in total, in pages of 4 KiB. The guest does so at its own pace
    /// and only as far as it can: [`Controller::balloon_stats`] returns the progress.
    pub fn set_balloon(&self, bytes: u64) -> Result<(), ControlError> {
        self.device(BALLOON, Control::SetBalloon(bytes)).map(drop)
    }

    /// Returns the balloon's size and the guest's memory statistics.
    pub fn balloon_stats(&self) -> Result<BalloonStats, ControlError> {
        match self.device(BALLOON, Control::BalloonStats)? {
            Reply::BalloonStats(stats) => Ok(stats),
            _ => Err(ControlError::Unsupported(BALLOON.into())),
        }
    }

    /// Asks the guest to report which of its memory is free, for a caller that is about to copy the rest. The guest
    /// does not use that memory until [`Controller::end_hints`].
    pub fn start_hints(&self) -> Result<(), ControlError> {
        self.device(BALLOON, Control::StartHints).map(drop)
    }

    /// Returns the free memory that the guest has reported since [`Controller::start_hints`].
    pub fn free_hints(&self) -> Result<FreeHints, ControlError> {
        match self.device(BALLOON, Control::FreeHints)? {
            Reply::FreeHints(hints) => Ok(hints),
            _ => Err(ControlError::Unsupported(BALLOON.into())),
        }
    }

    /// Discards the guest's reports and lets it use that memory.
    pub fn end_hints(&self) -> Result<(), ControlError> {
        self.device(BALLOON, Control::EndHints).map(drop)
    }

    /// Asks the guest to have `bytes` of memory in addition to its RAM: whole blocks, at most the size of its memory
    /// device. The guest plugs and unplugs blocks at its own pace and only as far as it can:
    /// [`Controller::memory_status`] returns the progress.
    pub fn request_memory(&self, bytes: u64) -> Result<(), ControlError> {
        self.device(MEMORY, Control::RequestMemory(bytes)).map(drop)
    }

    /// Returns how much memory the guest has in addition to its RAM, and how much it should have.
    pub fn memory_status(&self) -> Result<MemStatus, ControlError> {
        match self.device(MEMORY, Control::MemoryStatus)? {
            Reply::MemoryStatus(status) => Ok(status),
            _ => Err(ControlError::Unsupported(MEMORY.into())),
        }
    }

    /// Enlarges a disk (`disk0` is the first) and its file or overlay to `bytes`, a multiple of 512.
    pub fn resize_disk(&self, name: &str, bytes: u64) -> Result<(), ControlError> {
        self.device(name, Control::ResizeDisk(bytes)).map(drop)
    }

    /// Connects or disconnects the cable of a network card (`net0` is the first). Without a cable, the guest sees that
    /// the link is down, and packets are dropped in both directions.
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
