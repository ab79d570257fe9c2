//! The running guest: one event loop on the caller's thread that receives every event and decides when the run ends.
//!
//! ```text
//! signals, requests ──▶ pause, resume, power button, stop
//! devices, vCPU ends ──▶ outcome
//! console input ──▶ serial port           20 ms tick ──▶ drain coalesced writes, check for a guest that sleeps forever
//! ```
//!
//! Once the outcome is decided, the vCPUs and devices are stopped, and the loop continues until the console's last byte
//! is written. It still handles a second signal, Ctrl-A X and the time limit, so a reader that never reads cannot hold
//! it.

mod end;
mod stops;
mod watches;

use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

use super::console::RunningLine;
use super::mailbox::{Mailbox, Request, Traps};
use super::{Error, Machine, host};
use crate::backend::output_file::OutputFile;
use crate::backend::transcript::Transcript;
use crate::devices::power_button::PowerButton;
use crate::event::{Interest, Poller, Signals};
use crate::guest_event::{GuestEvent, PanicSource};
use crate::kvm;
use crate::kvm::dump::CpuState;
use crate::outcome::Outcome;
use crate::report::{BootTiming, Exits, Mark};
use crate::terminal::{self, Command as Escape, RawMode};
use crate::vcpu::{Board, Command, End, Final, Reply, VcpuThread};
use crate::virtio::control::ControlError;
use crate::virtio::mmio::MmioTransport;
pub use end::Ended;
use watches::{HangWatch, Insistence, SleepWatch};

/// Limits and observers of a run.
#[derive(Default)]
pub struct RunOptions {
    /// Time after which the guest is stopped, counted from the start of the process.
    pub timeout: Option<Duration>,
    /// Time that a guest may take to power off after a signal pressed its power button.
    pub grace: Duration,
    /// Signals to react to, if any.
    pub signals: Option<Signals>,
    /// Start with the vCPUs paused.
    pub paused: bool,
    /// Time without output and without work after which the guest is stopped: at least two seconds.
    pub hang_timeout: Option<Duration>,
    /// Recorder of what the consoles print. A line that matches one of its patterns ends the run; an orderly end
    /// without an expected line is [`Outcome::Missed`].
    pub transcript: Option<Transcript>,
    /// Leave an input terminal in its mode; otherwise it is put into raw mode.
    pub cooked: bool,
    /// Task of a guest that is stopped when the task is done: if such a guest ends on its own, that is
    /// [`Outcome::Lost`].
    pub errand: Option<Errand>,
    /// Destination of a core file if something goes wrong in the guest.
    pub vmcore: Option<Arc<OutputFile>>,
    /// First receiver of signals, including changes of the terminal's size (SIGWINCH); returns whether it handled the
    /// signal.
    pub forward: Option<Box<dyn Fn(i32) -> bool + Send>>,
}

/// Task of a guest that does not end on its own.
#[derive(Clone, Copy, Debug)]
pub struct Errand {
    /// Prefix, after the time, of the lines in the kernel's log in which the guest's init states why it ended.
    pub log_name: &'static str,
}

/// Signals that [`RunOptions::signals`] should collect.
pub const SIGNALS: [i32; 7] =
    [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT, libc::SIGTSTP, libc::SIGCONT, libc::SIGWINCH];

/// Longest time that coalesced output waits.
const TICK: Duration = Duration::from_millis(20);
/// Number of ticks between two checks for a guest that sleeps forever, while it shows no activity.
const LOOK_TICKS: u32 = 5;
/// Upper limit of the growing interval between these checks.
const LOOK_TICKS_MAX: u32 = 160;
/// Time that a panicked guest keeps before it is stopped: for its messages, a dump, a reboot by `panic=N`.
const PANIC_GRACE: Duration = Duration::from_secs(5);

const SIGNAL: u64 = 0;
const MAIL: u64 = 1;
const GUEST: u64 = 2;
const TICKED: u64 = 3;
/// First of the tokens for input, one per line.
const INPUT: u64 = 1 << 16;
/// First of the tokens for written output, one per line.
const WRITTEN: u64 = 1 << 17;

impl Machine {
    /// Starts the vCPUs and waits until the guest has ended and its output is written.
    pub fn run(self, options: RunOptions, mailbox: Arc<Mailbox>) -> Result<Ended, Error> {
        // Closing the mailbox keeps other threads from waiting for an answer that never comes.
        let mut running = Running::start(self, options, mailbox.clone()).inspect_err(|_| mailbox.close())?;
        let result = running.wait_for_end();
        // On an error too: nothing may keep running after this function returns.
        running.stop();
        running.mailbox.close();
        let outcome = result?;
        let given_up = running.wait_for_output(&outcome)?;
        let outcome = running.judged(outcome, given_up);
        let post_mortem = outcome.is_failure().then(|| running.post_mortem(&outcome));
        let exits = running.exits;
        let reason =
            post_mortem.as_ref().and_then(|found| end::reason(&outcome, &found.kernel_log, running.options.errand));
        Ok(Ended { outcome, reason, post_mortem, exits, timing: running.timing })
    }
}

struct Running {
    // The order of drops hardly matters, but the terminal should be restored first.
    raw_mode: Option<RawMode>,
    poller: Poller,
    ticker: TimerFd,
    options: RunOptions,
    mailbox: Arc<Mailbox>,
    board: Arc<Board>,
    /// The serial port, followed by the ports of the virtio console.
    lines: Vec<RunningLine>,
    devices: Vec<Arc<MmioTransport>>,
    power_button: PowerButton,
    vcpus: Vec<VcpuThread>,
    timing: BootTiming,
    exits: Exits,
    /// Time at which [`RunOptions::timeout`] passes.
    deadline: Option<Instant>,
    /// Time at which the guest is stopped if it has not reacted to its power button, and the signal that pressed it.
    grace: Option<(Instant, i32)>,
    insistence: Insistence,
    panicked: Option<PanicSource>,
    panic_deadline: Option<Instant>,
    restarting: bool,
    paused: bool,
    sleep_watch: SleepWatch,
    hang_watch: HangWatch,
    /// Receiver of the debugger's traps.
    debugger: Weak<Traps>,
    /// States of the vCPUs that have ended.
    cpus: Vec<CpuState>,
    /// Set if a console is on stdout or stderr.
    console_shown: bool,
    // Keeps the VM alive as long as any field above.
    _machine: (Arc<crate::kvm::Vm>, crate::memory::GuestRam),
}

impl Running {
    fn start(machine: Machine, options: RunOptions, mailbox: Arc<Mailbox>) -> Result<Self, Error> {
        let Machine { config, unkept, ram, vcpus, board, lines, devices, power_button, mut timing, vm, .. } = machine;
        let typed = lines.iter().find(|line| !options.cooked && line.input.is_terminal());
        let on_terminal = typed.and_then(|line| line.input.fd());
        let raw_mode = on_terminal.map_or(Ok(None), RawMode::enter).map_err(host("the terminal"))?;
        let poller = Poller::new().map_err(host("an epoll descriptor"))?;
        let mut ticker = TimerFd::new().map_err(|e| Error::Host("a timer", e.into()))?;
        ticker.reset(TICK, Some(TICK)).map_err(|e| Error::Host("a timer", e.into()))?;
        let mut fds =
            vec![(MAIL, mailbox.fd.as_raw_fd()), (GUEST, board.events.fd().as_raw_fd()), (TICKED, ticker.as_raw_fd())];
        fds.extend((WRITTEN..).zip(&lines).map(|(token, line)| (token, line.output.done().as_raw_fd())));
        fds.extend(options.signals.as_ref().map(|s| (SIGNAL, s.as_raw_fd())));
        for (token, fd) in fds {
            poller.add(fd, token, Interest::Read).map_err(host("an epoll descriptor"))?;
        }
        let console_shown = [Some(&config.serial), config.console.as_ref()];
        let console_shown = console_shown.into_iter().flatten().any(|end| end.streams()[1..].contains(&true));
        let pins = config.cpu.pins()?;
        let mut threads = Vec::with_capacity(vcpus.len());
        timing.mark(Mark::FirstInstruction);
        for (vcpu, n) in vcpus.into_iter().zip(0usize..) {
            let mail = mailbox.clone();
            let ended = move |id, end| mail.vcpu_ended(id, end);
            let thread = vcpu.spawn(board.clone(), pins.get(n).copied(), options.paused, ended);
            match thread {
                Ok(thread) => threads.push(thread),
                Err(e) => {
                    threads.into_iter().for_each(|t: VcpuThread| _ = t.join());
                    return Err(Error::Host("a vCPU thread", e));
                }
            }
        }
        if let Some(unkept) = unkept {
            unkept.start();
        }
        if options.paused {
            threads.iter().for_each(|thread| _ = thread.reply());
        }
        let deadline = options.timeout.map(|limit| Instant::now() + limit.saturating_sub(timing.elapsed()));
        let escapes = raw_mode.is_some();
        let lines = lines.into_iter().zip(INPUT..).map(|(line, token)| {
            let escapes = escapes && line.input.is_terminal();
            RunningLine::new(line, token, escapes)
        });
        let lines = lines.collect();
        Ok(Running {
            raw_mode,
            poller,
            ticker,
            paused: options.paused,
            options,
            mailbox,
            board,
            lines,
            devices,
            power_button,
            vcpus: threads,
            timing,
            exits: Exits::default(),
            deadline,
            grace: None,
            insistence: Insistence::default(),
            panicked: None,
            panic_deadline: None,
            restarting: false,
            sleep_watch: SleepWatch { interval: LOOK_TICKS, ..SleepWatch::default() },
            hang_watch: HangWatch::new(),
            debugger: Weak::new(),
            cpus: Vec::new(),
            console_shown,
            _machine: (vm, ram),
        })
    }

    fn wait_for_end(&mut self) -> Result<Outcome, Error> {
        let mut ready: Vec<u64> = (INPUT..).take(self.lines.len()).collect();
        loop {
            for token in ready.drain(..) {
                let outcome = match token {
                    SIGNAL => self.on_signal(),
                    MAIL => self.on_mail()?,
                    GUEST => self.on_guest_events(),
                    TICKED => self.on_tick()?,
                    INPUT..WRITTEN => self.on_input(token, true)?,
                    _ => None,
                };
                if let Some(outcome) = outcome {
                    return Ok(self.final_outcome(outcome));
                }
            }
            if let Some(outcome) = self.passed_deadline() {
                return Ok(self.final_outcome(outcome));
            }
            let timeout = self.next_deadline().map(|d| d.saturating_duration_since(Instant::now()));
            ready.extend(self.poller.wait(timeout).map_err(host("waiting for events"))?);
        }
    }

    /// Turns the outcome into a panic if one was seen, however the guest ended after it.
    fn final_outcome(&mut self, outcome: Outcome) -> Outcome {
        // The text that explains the end may not have arrived yet.
        self.exits.coalesced += self.board.drain();
        self.on_guest_events();
        match self.panicked {
            Some(source) if !matches!(outcome, Outcome::Expected(_)) => Outcome::Panicked(source),
            _ => outcome,
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        [self.deadline, self.grace.map(|g| g.0), self.panic_deadline].into_iter().flatten().min()
    }

    fn passed_deadline(&self) -> Option<Outcome> {
        let now = Instant::now();
        if self.panic_deadline.is_some_and(|d| d <= now) {
            return self.panicked.map(Outcome::Panicked);
        }
        match self.grace {
            Some((end, signal)) if end <= now => return Some(Outcome::Killed(signal)),
            _ => {}
        }
        let limit = self.options.timeout.filter(|_| self.deadline.is_some_and(|d| d <= now))?;
        Some(Outcome::TimedOut(limit))
    }

    fn on_signal(&mut self) -> Option<Outcome> {
        while let Some(signal) = self.ending_signal() {
            match signal {
                signal if self.options.forward.is_some() && self.insistence.heard(signal, Instant::now()) => {
                    return Some(Outcome::Killed(signal));
                }
                signal if self.options.forward.as_ref().is_some_and(|forward| forward(signal)) => {}
                // A second request, or a signal that says that the user is gone: no more patience.
                signal if self.grace.is_some() || signal == libc::SIGHUP || signal == libc::SIGQUIT => {
                    return Some(Outcome::Killed(signal));
                }
                signal => {
                    log::info!("signal {signal}: pressing the guest's power button");
                    self.power_button.press();
                    self.grace = Some((Instant::now() + self.options.grace, signal));
                }
            }
        }
        None
    }

    /// Returns the next signal that asks for an end; signals that stop or continue the process are handled here.
    fn ending_signal(&self) -> Option<i32> {
        loop {
            match self.options.signals.as_ref()?.take()? {
                libc::SIGTSTP => {
                    self.raw_mode.iter().for_each(RawMode::suspend);
                    stop_this_process();
                }
                libc::SIGCONT => self.raw_mode.iter().for_each(RawMode::continued),
                libc::SIGWINCH => {
                    self.lines.iter().for_each(RunningLine::resize);
                    self.options.forward.iter().for_each(|forward| _ = forward(libc::SIGWINCH));
                }
                signal => return Some(signal),
            }
        }
    }

    fn on_mail(&mut self) -> Result<Option<Outcome>, Error> {
        let _ = self.mailbox.fd.read();
        while let Some(request) = self.mailbox.take_request() {
            match request {
                Request::Pause(done) => {
                    self.pause();
                    let _ = done.send(());
                }
                Request::Resume(only, done) => {
                    self.resume(only.as_deref());
                    let _ = done.send(());
                }
                Request::Device(name, control, done) => {
                    let device = self.devices.iter().find(|device| device.info().name == name);
                    let _ = done.send(device.map_or(Err(ControlError::NoDevice(name)), |d| d.control(&control)));
                }
                Request::Attach(traps) => self.debugger = traps,
                Request::Debug(vcpu, request, done) => {
                    self.debug(vcpu, request).into_iter().for_each(|reply| _ = done.send(reply));
                }
                Request::InitStarted => self.timing.mark(Mark::InitStarted),
                Request::PressPowerButton => self.power_button.press(),
                Request::Stop(outcome) => return Ok(Some(outcome)),
            }
        }
        let Some((id, end)) = self.mailbox.take_end() else { return Ok(None) };
        // Events that devices or the console reported earlier come first.
        if let Some(outcome) = self.on_guest_events() {
            return Ok(Some(outcome));
        }
        Ok(match end {
            End::GuestEnded | End::Stopped => None,
            End::TripleFault { idt_emptied } => Some(self.after_triple_fault(id, idt_emptied)),
            End::Crash(what) => Some(Outcome::Crashed(what)),
            End::Kvm(e) => return Err(self.kvm_failed(e)),
        })
    }

    /// Returns the error for a failed KVM_RUN, with the cause as far as it can be known.
    fn kvm_failed(&self, error: io::Error) -> Error {
        let gone = || match self.board.ram.truncated_file() {
            Some(path) => format!("{} was truncated while it was mapped", path.display()),
            None => "huge pages, memory or the file system of a pmem file may be used up".into(),
        };
        match error.raw_os_error() {
            Some(libc::EFAULT) => Error::MemoryGone(gone(), kvm::Error::Ioctl("KVM_RUN", error)),
            _ => kvm::Error::Ioctl("KVM_RUN", error).into(),
        }
    }

    fn on_guest_events(&mut self) -> Option<Outcome> {
        while let Some(event) = self.board.events.take() {
            match event {
                GuestEvent::PowerOff => return Some(Outcome::PoweredOff),
                GuestEvent::Reset(how) => return Some(Outcome::Rebooted(how)),
                GuestEvent::DebugExit(code) => return Some(Outcome::DebugExit(code)),
                GuestEvent::Panicked(source) => {
                    // The driver's report is better evidence than the console's, whichever came first.
                    if self.panicked.is_none() || source == PanicSource::Pvpanic {
                        self.panicked = Some(source);
                    }
                    self.panic_deadline.get_or_insert(Instant::now() + PANIC_GRACE);
                }
                GuestEvent::PanicEnded => {
                    if self.panicked.is_some() {
                        self.panic_deadline = Some(Instant::now());
                    }
                }
                GuestEvent::Judged => {
                    if let Some(outcome) = self.verdict() {
                        return Some(outcome);
                    }
                }
                GuestEvent::Trapped(trap) => self.trapped(trap),
                GuestEvent::InitStarted => self.timing.mark(Mark::InitStarted),
                GuestEvent::ConsoleFirstByte => self.timing.mark(Mark::FirstSerialByte),
                GuestEvent::Restarting => self.restarting = true,
                GuestEvent::ConsoleInputRoom => {
                    for line in &mut self.lines {
                        if let Err(e) = line.pump(false, &self.poller) {
                            log::warn!("cannot pass on console input: {e}");
                        }
                    }
                }
            }
        }
        None
    }

    fn on_tick(&mut self) -> Result<Option<Outcome>, Error> {
        let _ = self.ticker.wait();
        self.raw_mode.iter().for_each(RawMode::refresh);
        self.options.transcript.iter().for_each(|transcript| transcript.look(Instant::now()));
        // With a full output buffer, the ring is left to fill up too, and then vCPUs exit and wait.
        if !self.paused && !self.board.output.is_full() {
            self.exits.coalesced += self.board.drain();
        }
        for token in (INPUT..).take(self.lines.len()) {
            if let Some(outcome) = self.on_input(token, false)? {
                return Ok(Some(outcome));
            }
        }
        if self.all_asleep() {
            return Ok(Some(Outcome::Halted));
        }
        Ok(self.options.hang_timeout.filter(|limit| self.hangs_for(*limit)).map(Outcome::Hung))
    }

    fn on_input(&mut self, token: u64, readable: bool) -> Result<Option<Outcome>, Error> {
        let line = usize::try_from(token - INPUT).ok().and_then(|line| self.lines.get_mut(line));
        let Some(line) = line else { return Ok(None) };
        line.output.flush();
        let command = line.pump(readable, &self.poller).map_err(host("console input"))?;
        match command {
            Some(Escape::Quit) => return Ok(Some(Outcome::Quit)),
            Some(Escape::Help) => _ = io::stderr().write_all(terminal::HELP.as_bytes()),
            None => {}
        }
        Ok(None)
    }

    /// Returns whether the guest has made no progress for `limit`.
    fn hangs_for(&mut self, limit: Duration) -> bool {
        let now = Instant::now();
        if self.paused {
            self.hang_watch.restart(now);
        } else if self.hang_watch.due(now) {
            let output = self.lines.iter().map(|line| line.output.pushed()).sum();
            // A vCPU that waits for a processor of a busy host has work to do, so its waiting time counts.
            let work = self.vcpus.iter().map(|vcpu| vcpu.cpu_time() + vcpu.waited_time()).sum();
            self.hang_watch.poll(now, output, work);
        }
        self.hang_watch.idle() >= limit
    }

    /// Returns whether every vCPU is halted with interrupts off. The question costs each vCPU an exit, so it is asked
    /// only while none of them uses processor time, and less and less often while the answer is no.
    fn all_asleep(&mut self) -> bool {
        self.sleep_watch.ticks += 1;
        if self.sleep_watch.ticks < self.sleep_watch.interval || self.paused {
            return false;
        }
        self.sleep_watch.ticks = 0;
        let cpu_time: Duration = self.vcpus.iter().map(VcpuThread::cpu_time).sum();
        let used = cpu_time.saturating_sub(self.sleep_watch.cpu_time);
        self.sleep_watch.cpu_time = cpu_time;
        // A check itself costs some processor time.
        if used > Duration::from_millis(1) {
            self.sleep_watch.interval = LOOK_TICKS;
            return false;
        }
        self.vcpus.iter().for_each(|v| v.send(Command::LookAsleep));
        // Every answer must be taken, or the next check would read this check's answer.
        let awake = self.vcpus.iter().filter(|v| !matches!(v.reply(), Some(Reply::Asleep(true)))).count();
        self.sleep_watch.interval = (self.sleep_watch.interval * 2).min(LOOK_TICKS_MAX);
        awake == 0
    }

    /// Ends the vCPUs, then the devices, and marks the console's output as complete.
    fn stop(&mut self) {
        self.vcpus.iter().for_each(|v| v.send(Command::Stop));
        for vcpu in self.vcpus.drain(..) {
            let Final { exits, state } = vcpu.join();
            self.exits.add(&exits);
            self.cpus.extend(state);
        }
        self.exits.coalesced += self.board.drain();
        self.devices.iter().filter_map(|d| d.stop().err()).for_each(|stuck| log::warn!("{stuck}"));
        self.lines.iter().for_each(|line| line.output.close());
    }
}

#[allow(unsafe_code)]
fn stop_this_process() {
    // SAFETY: raise has no memory effects; SIGSTOP cannot be blocked.
    unsafe { libc::raise(libc::SIGSTOP) };
}
