//! One thread per vCPU: enter the guest, decode the exit, dispatch it to a bus, enter again.
//!
//! Between two entries, the thread checks its commands, so it is a small state machine driven by messages:
//!
//! ```text
//!             Resume                      the guest ended, Stop, a crash
//!   paused ─────────────▶ running ─────────────────────────────────────▶ ended
//!      ▲                   │  ▲ enter ─▶ exit ─▶ drain coalesced writes ─▶ dispatch
//!      └───────────────────┘  └──────────────────── wait for output room ◀─┘
//!        Pause, a trap
//! ```
//!
//! A debugger's trap pauses the vCPU that hit it, and is reported as a [`crate::guest_event::GuestEvent`]; stopping the other
//! vCPUs is the listener's task.
//!
//! [`VcpuThread::send`] queues a command, sets `immediate_exit` and sends a signal. The thread clears `immediate_exit`
//! before it checks its queue, so it never enters the guest with a command unseen.

mod answers;
mod firmware;

use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_bindings::{kvm_regs, kvm_sregs};
use kvm_ioctls::VcpuFd;

use crate::backend::output::Output;
use crate::bus::Bus;
use crate::guest_event::GuestEvents;
use crate::kvm::cpuid::Template;
use crate::kvm::debug::{Answer, Control, Request};
use crate::kvm::dump::CpuState;
use crate::kvm::exit::{self, Exit};
use crate::kvm::ring::{CoalescedRing, ImmediateExit};
use crate::kvm::{Error, Vm, failed};
use crate::memory::GuestRam;
use crate::report::Exits;
use crate::thread_time::ThreadTime;

/// Parts that all vCPUs of a machine share.
pub struct Board {
    /// Devices on I/O ports.
    pub pio: Bus,
    /// Devices at MMIO addresses.
    pub mmio: Bus,
    /// Ring of writes that KVM collected, if KVM supports it.
    pub ring: Option<CoalescedRing>,
    /// Knows when the guest has ended.
    pub events: GuestEvents,
    /// Output; vCPUs wait while it is full.
    pub output: Output,
    /// Guest memory, read for the instruction bytes in crash reports.
    pub ram: GuestRam,
}

impl Board {
    /// Passes the collected writes to their devices; returns their number.
    pub fn drain(&self) -> u64 {
        let Some(ring) = &self.ring else { return 0 };
        ring.drain(|write| {
            let bus = if write.pio { &self.pio } else { &self.mmio };
            bus.write(write.addr, &write.data[..write.len]);
        })
    }

    /// Dispatches one exit. `Err` is the reason why the vCPU cannot continue.
    pub fn dispatch(&self, exit: Exit<'_>, exits: &mut Exits) -> Result<(), End> {
        exits.total += 1;
        match exit {
            // A string access is a single exit; the device gets its elements one by one.
            Exit::PioIn { port, size, data } => {
                exits.pio_in += 1;
                data.chunks_mut(size).for_each(|item| _ = self.pio.read(u64::from(port), item));
            }
            Exit::PioOut { port, size, data } => {
                exits.pio_out += 1;
                data.chunks(size).for_each(|item| _ = self.pio.write(u64::from(port), item));
            }
            Exit::MmioRead { addr, data } => {
                exits.mmio_read += 1;
                self.mmio.read(addr, data);
            }
            Exit::MmioWrite { addr, data } => {
                exits.mmio_write += 1;
                self.mmio.write(addr, data);
            }
            Exit::Interrupted => exits.interrupted += 1,
            other => {
                exits.other += 1;
                return Err(End::from_exit(other));
            }
        }
        Ok(())
    }
}

/// Reason why a vCPU thread ended.
#[derive(Debug)]
pub enum End {
    /// A device reported that the guest has ended.
    GuestEnded,
    /// The thread received [`Command::Stop`].
    Stopped,
    /// Triple fault; the machine decides whether it was a reboot.
    TripleFault {
        /// True if the interrupt table had been emptied, as in a reboot by triple fault.
        idt_emptied: bool,
    },
    /// The guest cannot continue; the text gives the reason in one sentence.
    Crash(String),
    /// KVM_RUN failed.
    Kvm(io::Error),
}

impl End {
    fn from_exit(exit: Exit<'_>) -> End {
        let what = match exit {
            Exit::Shutdown => return End::TripleFault { idt_emptied: false },
            Exit::InternalError { suberror, data } => internal_error(suberror, &data),
            Exit::FailEntry { reason } => format!(
                "the processor refused to enter the guest (hardware reason {reason:#x}): the guest's processor state is \
                 invalid"
            ),
            Exit::Halt => "the vCPU halted, but this KVM did not handle the halt itself".into(),
            Exit::Other(reason) => format!("KVM left the guest for reason {reason}, which vireo does not handle"),
            _ => "internal error: a device access reached the crash path".into(),
        };
        End::Crash(what)
    }
}

/// Describes a KVM_INTERNAL_ERROR_* (Documentation/virt/kvm/api.rst, KVM_EXIT_INTERNAL_ERROR).
fn internal_error(suberror: u32, data: &[u64]) -> String {
    let meaning = match suberror {
        1 => "KVM could not emulate the guest's instruction",
        2 => "an event arrived that KVM cannot deliver at the same time as another",
        3 => "an exit occurred while KVM was delivering an event",
        4 => "the processor left the guest for an unknown reason",
        _ => "unknown",
    };
    format!("KVM internal error, suberror {suberror}: {meaning} (data {data:x?})")
}

/// A command to a vCPU thread.
#[derive(Clone, Debug)]
pub enum Command {
    /// Leaves the guest with nothing pending and waits; answered by [`Reply::Paused`].
    Pause,
    /// Enters the guest again.
    Resume,
    /// Asks whether this vCPU sleeps forever; answered by [`Reply::Asleep`].
    LookAsleep,
    /// Carries out a debugger's request; answered by [`Reply::Debug`].
    Debug(Box<Request>),
    /// Ends the thread.
    Stop,
}

/// A vCPU thread's answer.
#[derive(Debug)]
pub enum Reply {
    /// The vCPU left the guest, and no access is unfinished.
    Paused,
    /// True if the vCPU is halted with interrupts off, or was never started.
    Asleep(bool),
    /// Result of a debugger's request.
    Debug(io::Result<Answer>),
}

/// A vCPU that is not running.
pub struct Vcpu {
    id: u32,
    fd: VcpuFd,
    immediate_exit: Arc<ImmediateExit>,
    /// Size in bytes of the extended state, which a debugger reads.
    xsave_len: usize,
    exits: Exits,
}

impl Vcpu {
    /// Creates vCPU `id` of `count` with its CPUID and the MSRs that firmware would have set.
    pub fn new(vm: &Vm, id: u32, count: u32, cpuid: &Template) -> Result<Self, Error> {
        let fd = vm.create_vcpu(id)?;
        // If KVM does not know the frequency, the guest does not get it either.
        let tsc_khz = fd.get_tsc_khz().unwrap_or(0);
        fd.set_cpuid2(&cpuid.for_vcpu(id, count, tsc_khz)?).map_err(failed("KVM_SET_CPUID2"))?;
        firmware::set_msrs(&fd)?;
        let immediate_exit =
            ImmediateExit::new(&fd).map_err(|e| Error::Ioctl("mapping the vCPU's run page", e)).map(Arc::new)?;
        Ok(Vcpu { id, fd, immediate_exit, xsave_len: vm.xsave_len(), exits: Exits::default() })
    }

    /// Returns the handle of the kvm-ioctls crate.
    pub fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// Sets the boot processor's registers to the values that the boot protocol requires, computed from its reset
    /// state.
    pub fn set_registers(&self, from_reset: impl FnOnce(&kvm_sregs) -> (kvm_regs, kvm_sregs)) -> Result<(), Error> {
        let reset = self.fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
        let (regs, sregs) = from_reset(&reset);
        self.fd.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
        self.fd.set_regs(&regs).map_err(failed("KVM_SET_REGS"))
    }

    /// Starts the thread, in the guest or paused. `pin` is the host processor that the thread stays on. The thread
    /// calls `ended` when it ends, except by [`Command::Stop`].
    pub fn spawn(
        self,
        board: Arc<Board>,
        pin: Option<usize>,
        paused: bool,
        ended: impl FnOnce(u32, End) + Send + 'static,
    ) -> io::Result<VcpuThread> {
        let (command_tx, command_rx) = channel();
        let (reply_tx, reply_rx) = channel();
        let kicked = Arc::new(AtomicBool::new(false));
        let (id, immediate_exit) = (self.id, self.immediate_exit.clone());
        let output = board.output.clone();
        let state = Running {
            vcpu: self,
            board,
            commands: command_rx,
            replies: reply_tx,
            kicked: kicked.clone(),
            refusals: 0,
            control: Control::default(),
            trapped: false,
        };
        let time = Arc::new(OnceLock::new());
        let own_time = time.clone();
        let thread = thread::Builder::new().name(format!("vcpu{id}")).stack_size(256 << 10).spawn(move || {
            let _ = own_time.set(ThreadTime::of_this_thread().ok());
            if let Some(cpu) = pin
                && let Err(e) = pin_to(cpu)
            {
                log::warn!("vCPU {id} cannot be pinned to processor {cpu}: {e}");
            }
            state.run(paused, ended)
        })?;
        Ok(VcpuThread { thread, time, commands: command_tx, replies: reply_rx, immediate_exit, kicked, output })
    }
}

/// State inside a vCPU thread.
struct Running {
    vcpu: Vcpu,
    board: Arc<Board>,
    commands: Receiver<Command>,
    replies: Sender<Reply>,
    kicked: Arc<AtomicBool>,
    /// Number of consecutive times that KVM asked to be entered again.
    refusals: u32,
    /// Conditions under which the vCPU stops for the debugger.
    control: Control,
    /// True if the vCPU has stopped for the debugger.
    trapped: bool,
}

impl Running {
    fn run(mut self, paused: bool, ended: impl FnOnce(u32, End)) -> Final {
        let end = if paused && self.pause(true).is_err() { End::Stopped } else { self.run_guest() };
        let end = self.look_at_idt(end);
        self.vcpu.exits.coalesced += self.board.drain();
        let exits = self.vcpu.exits;
        if matches!(end, End::Stopped | End::GuestEnded) {
            // Makes the registers final. The guest's exits were already counted above.
            let _ = self.finish_access();
        }
        let state = CpuState::read(self.vcpu.id, &self.vcpu.fd, &self.board.ram);
        if !matches!(end, End::Stopped) {
            ended(self.vcpu.id, end);
        }
        Final { exits, state }
    }

    fn run_guest(&mut self) -> End {
        loop {
            // This order is essential; otherwise, a command that arrives in between would be missed.
            self.vcpu.immediate_exit.set(false);
            self.kicked.store(false, Ordering::SeqCst);
            while let Ok(command) = self.commands.try_recv() {
                match command {
                    Command::Pause => {
                        if let Err(end) = self.finish_access().and_then(|()| self.pause(true)) {
                            return end;
                        }
                    }
                    Command::Stop => return End::Stopped,
                    other => self.answer(other),
                }
            }
            if self.trapped {
                if let Err(end) = self.pause(false) {
                    return end;
                }
                continue;
            }
            if self.board.events.ended() {
                return End::GuestEnded;
            }
            if self.board.output.is_full() {
                let (kicked, events) = (&self.kicked, &self.board.events);
                self.board.output.wait_room(|| kicked.load(Ordering::SeqCst) || events.ended());
                if self.kicked.load(Ordering::SeqCst) {
                    continue;
                }
            }
            if let Err(end) = self.enter() {
                return end;
            }
        }
    }

    /// Enters the guest once and dispatches the exit.
    fn enter(&mut self) -> Result<(), End> {
        let exit = match exit::enter(&mut self.vcpu.fd) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return self.enter_again(e),
            result => result.map_err(End::Kvm)?,
        };
        self.refusals = 0;
        // The guest's collected writes came before the access that caused the exit.
        self.vcpu.exits.coalesced += self.board.drain();
        match exit {
            Exit::Debug { exception, pc, dr6 } => {
                self.vcpu.exits.total += 1;
                self.vcpu.exits.other += 1;
                self.on_trap(exception, pc, dr6).map_err(End::Kvm)
            }
            exit => self.board.dispatch(exit, &mut self.vcpu.exits),
        }
    }

    /// Handles KVM's request to be entered again, which happens once when the vCPU is started, and forever if the host
    /// refuses KVM a thread.
    fn enter_again(&mut self, refusal: io::Error) -> Result<(), End> {
        const LIMIT: u32 = 3;
        self.refusals = if answers::is_unstarted(&self.vcpu.fd) { 0 } else { self.refusals + 1 };
        if self.refusals > LIMIT {
            return Err(End::Kvm(refusal));
        }
        self.board.dispatch(Exit::Interrupted, &mut self.vcpu.exits)
    }

    /// Completes a port or MMIO access that KVM has passed out: only then are the registers final.
    fn finish_access(&mut self) -> Result<(), End> {
        loop {
            self.vcpu.immediate_exit.set(true);
            let before = self.vcpu.exits.interrupted;
            self.enter()?;
            if self.vcpu.exits.interrupted != before {
                return Ok(());
            }
        }
    }

    /// Waits for the end of a pause. `asked` means that somebody asked for it and waits for the answer.
    fn pause(&mut self, asked: bool) -> Result<(), End> {
        if asked {
            self.answer(Command::Pause);
        }
        loop {
            match self.commands.recv() {
                Ok(Command::Resume) => {
                    self.trapped = false;
                    // Informs a guest with kvmclock that it was stopped, so that its watchdogs do not trigger. Fails if
                    // the guest does not use kvmclock.
                    let _ = self.vcpu.fd.kvmclock_ctrl();
                    return Ok(());
                }
                Ok(Command::Stop) | Err(_) => return Err(End::Stopped),
                Ok(other) => self.answer(other),
            }
        }
    }

    /// Distinguishes a triple fault that is a reboot from others.
    fn look_at_idt(&self, end: End) -> End {
        match end {
            End::TripleFault { .. } => {
                End::TripleFault { idt_emptied: self.vcpu.fd.get_sregs().is_ok_and(|s| s.idt.limit == 0) }
            }
            end => end,
        }
    }
}

/// Results of a vCPU whose thread has ended.
#[derive(Default)]
pub struct Final {
    /// The exits that it counted.
    pub exits: Exits,
    /// The vCPU's registers, with no access unfinished, if they could be read.
    pub state: Option<CpuState>,
}

/// A running vCPU, as the machine sees it.
pub struct VcpuThread {
    thread: JoinHandle<Final>,
    /// Set by the thread when it starts; `None` on a host that does not keep these totals.
    time: Arc<OnceLock<Option<ThreadTime>>>,
    commands: Sender<Command>,
    replies: Receiver<Reply>,
    immediate_exit: Arc<ImmediateExit>,
    kicked: Arc<AtomicBool>,
    output: Output,
}

/// Time limit for a vCPU's answer: KVM_RUN returns within microseconds, so this only matters on a broken host.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

impl VcpuThread {
    /// Sends a command to the thread and makes it leave the guest to receive it.
    pub fn send(&self, command: Command) {
        if self.commands.send(command).is_ok() {
            self.kicked.store(true, Ordering::SeqCst);
            self.immediate_exit.set(true);
            kick(&self.thread);
            self.output.wake();
        }
    }

    /// Returns the next answer; `None` if the thread has ended, or does not answer in reasonable time.
    pub fn reply(&self) -> Option<Reply> {
        self.replies.recv_timeout(ANSWER_LIMIT).ok()
    }

    /// Returns the processor time that the thread has used.
    #[allow(unsafe_code)]
    pub fn cpu_time(&self) -> Duration {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the handle has not been joined, so its pthread_t is valid; both pointers are valid for their calls.
        unsafe {
            let mut clock = 0;
            if libc::pthread_getcpuclockid(self.thread.as_pthread_t(), &mut clock) == 0 {
                libc::clock_gettime(clock, &mut time);
            }
        }
        Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
    }

    /// Returns the time that the thread had to wait for a processor, as far as the host knows.
    pub fn waited_time(&self) -> Duration {
        self.time.get().and_then(Option::as_ref).map_or(Duration::ZERO, ThreadTime::waited)
    }

    /// Ends the thread and returns its results.
    pub fn join(self) -> Final {
        self.send(Command::Stop);
        self.thread.join().unwrap_or_default()
    }
}

/// Returns the signal that makes a vCPU leave KVM_RUN.
fn kick_signal() -> i32 {
    libc::SIGRTMIN()
}

extern "C" fn ignore_kick(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Installs the handler of the signal that makes a vCPU leave the guest. To be called once per process, before the
/// first vCPU.
pub fn install_kick_handler() -> io::Result<()> {
    vmm_sys_util::signal::register_signal_handler(kick_signal(), ignore_kick)
        .map_err(|e| io::Error::from_raw_os_error(e.errno()))
}

#[allow(unsafe_code)]
fn kick(thread: &JoinHandle<Final>) {
    // SAFETY: the handle has not been joined, so its pthread_t is valid even if the thread has ended.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), kick_signal()) };
}

#[allow(unsafe_code)]
fn pin_to(cpu: usize) -> io::Result<()> {
    // SAFETY: cpu_set_t is a plain bit set for which zeros are valid; CPU_SET ignores numbers beyond it.
    unsafe {
        let mut set = std::mem::zeroed();
        if cpu < libc::CPU_SETSIZE as usize {
            libc::CPU_SET(cpu, &mut set);
        }
        if libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sentence(exit: Exit<'_>) -> String {
        match End::from_exit(exit) {
            End::Crash(what) => what,
            end => panic!("{end:?}"),
        }
    }

    #[test]
    fn exits_that_end_the_guest_are_explained() {
        let refused = sentence(Exit::FailEntry { reason: 0x8000_0021 });
        assert!(refused.contains("refused to enter the guest (hardware reason 0x80000021)"), "{refused}");
        assert!(sentence(Exit::Halt).contains("halted"));
        assert!(sentence(Exit::Other(38)).contains("reason 38"));
        for (suberror, meaning) in [(1, "could not emulate"), (3, "delivering an event"), (9, "unknown")] {
            let text = sentence(Exit::InternalError { suberror, data: vec![0x1F] });
            assert!(text.contains(meaning) && text.contains("[1f]"), "{text}");
        }
        assert!(matches!(End::from_exit(Exit::Shutdown), End::TripleFault { .. }));
    }

    #[test]
    fn accesses_nobody_answers_read_as_ones_element_by_element() {
        let events = GuestEvents::new().unwrap();
        let output = Output::discard().unwrap();
        let ram = GuestRam::anonymous(1 << 20);
        let board = Board { pio: Bus::new(), mmio: Bus::new(), ring: None, events, output, ram };
        let mut exits = Exits::default();
        let (mut ports, mut memory) = ([0; 12], [0; 8]);
        board.dispatch(Exit::PioIn { port: 0xFFFF, size: 4, data: &mut ports }, &mut exits).unwrap();
        board.dispatch(Exit::MmioRead { addr: u64::MAX, data: &mut memory }, &mut exits).unwrap();
        board.dispatch(Exit::PioOut { port: 0xFFFF, size: 2, data: &[0; 6] }, &mut exits).unwrap();
        board.dispatch(Exit::MmioWrite { addr: u64::MAX, data: &[0; 8] }, &mut exits).unwrap();
        assert_eq!((ports, memory), ([0xFF; 12], [0xFF; 8]));
        assert_eq!((exits.total, exits.pio_in, exits.pio_out, exits.mmio_read, exits.mmio_write), (4, 1, 1, 1, 1));
    }
}
