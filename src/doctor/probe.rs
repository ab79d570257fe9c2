//! Runs the probe guest: one vCPU on a separate thread, watched from here, so that a hanging guest or KVM is reported
//! instead of waited for.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vmm_sys_util::signal::{self, Killable};

use super::guest::{self, Step};
use crate::irq::IrqLine;
use crate::layout;
use crate::memory::{GuestRam, MemoryConfig};
use crate::options::Size;

/// Time limit from one step of the guest to the next. A slow KVM needs some milliseconds.
const DEADLINE: Duration = Duration::from_secs(5);
/// Time that the guest sleeps in its HLT before the interrupt arrives.
const HALT: Duration = Duration::from_millis(2);
/// Value that the guest reads and whose complement it must write back.
const PATTERN: u32 = 0x5AC3_1E87;

/// Steps that the probe guest must do, in order, with their names for the user.
const STEPS: [(Step, &str); 7] = [
    (Step::RealMode, "real mode"),
    (Step::ProtectedMode, "protected mode"),
    (Step::LongMode, "long mode"),
    (Step::PortIo, "port I/O"),
    (Step::Mmio, "MMIO"),
    (Step::Interrupt, "interrupt and HLT"),
    (Step::Exits, "exits"),
];

/// Result of the probe guest.
#[derive(Clone, Debug, PartialEq)]
pub struct Probe {
    /// Names of the steps that worked.
    pub passed: Vec<&'static str>,
    /// Step that failed, and the reason as the end of a sentence.
    pub failed: Option<(&'static str, String)>,
    /// Median time from one exit to user space to the next.
    pub exit_latency: Option<Duration>,
    /// Instructions per second at privilege level 0.
    pub ring0_speed: Option<f64>,
}

/// Message from the vCPU thread.
enum Message {
    Step(Step),
    Ended(Result<Times, String>),
}

/// Measurements of the vCPU thread.
struct Times {
    exit_latency: Option<Duration>,
    ring0_speed: Option<f64>,
}

/// Returns the signal that gets the vCPU thread out of KVM_RUN; it differs from the signal that a machine uses.
fn kick_signal() -> libc::c_int {
    signal::SIGRTMIN() + 7
}

/// Runs the guest in a VM on `kvm`.
pub fn run(kvm: &Kvm, vm: VmFd) -> Probe {
    run_code(kvm, vm, guest::code(), DEADLINE)
}

fn run_code(kvm: &Kvm, vm: VmFd, code: &[u8], deadline: Duration) -> Probe {
    let mut probe = Probe { passed: Vec::new(), failed: None, exit_latency: None, ring0_speed: None };
    let result = Machine::new(kvm, vm, code).and_then(Machine::start).map_err(|e| format!("cannot set up: {e}"));
    let ended = result.and_then(|running| {
        let ended = watch(&running, deadline, &mut probe.passed);
        running.stop();
        ended
    });
    match ended {
        Ok(times) => {
            probe.exit_latency = times.exit_latency;
            probe.ring0_speed = times.ring0_speed;
        }
        Err(why) => {
            let step = STEPS.get(probe.passed.len()).map_or("ring 0 speed", |(_, name)| name);
            probe.failed = Some((step, why));
        }
    }
    probe
}

/// Follows the guest from step to step.
fn watch(running: &Running, deadline: Duration, passed: &mut Vec<&'static str>) -> Result<Times, String> {
    loop {
        match running.messages.recv_timeout(deadline) {
            Ok(Message::Step(Step::Halting)) => {
                thread::sleep(HALT);
                running.irq.trigger();
            }
            Ok(Message::Step(Step::NoHalt)) => {
                return Err("HLT did not wait for the interrupt".into());
            }
            Ok(Message::Step(step)) => match STEPS.get(passed.len()) {
                Some((expected, name)) if *expected == step => passed.push(name),
                _ => return Err(format!("the guest reported {step:?} out of order")),
            },
            Ok(Message::Ended(result)) => return result,
            Err(RecvTimeoutError::Timeout) => {
                return Err(format!("the guest hangs: nothing happened for {deadline:?}"));
            }
            Err(RecvTimeoutError::Disconnected) => return Err("the vCPU thread died".into()),
        }
    }
}

/// VM that is ready to run.
struct Machine {
    vcpu: VcpuFd,
    irq: IrqLine,
    /// Kept alive as long as the vCPU runs.
    keep: (VmFd, GuestRam),
}

impl Machine {
    fn new(kvm: &Kvm, vm: VmFd, code: &[u8]) -> Result<Self, String> {
        let fail = |what: &'static str| move |e: kvm_ioctls::Error| format!("{what}: {}", io::Error::from(e));
        // Only Intel hosts that cannot run real mode need these two; others accept and ignore them.
        vm.set_identity_map_address(layout::KVM_IDENTITY_MAP).map_err(fail("KVM_SET_IDENTITY_MAP_ADDR"))?;
        vm.set_tss_address(layout::KVM_TSS as usize).map_err(fail("KVM_SET_TSS_ADDR"))?;
        vm.create_irq_chip().map_err(fail("KVM_CREATE_IRQCHIP"))?;
        let irq = IrqLine::new(guest::GSI).map_err(|e| format!("eventfd: {e}"))?;
        vm.register_irqfd(irq.fd(), irq.gsi()).map_err(fail("KVM_IRQFD"))?;
        let ram = memory(code).map_err(|e| e.to_string())?;
        map(&vm, &ram).map_err(fail("KVM_SET_USER_MEMORY_REGION"))?;

        let vcpu = vm.create_vcpu(0).map_err(fail("KVM_CREATE_VCPU"))?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(fail("KVM_GET_SUPPORTED_CPUID"))?;
        vcpu.set_cpuid2(&cpuid).map_err(fail("KVM_SET_CPUID2"))?;
        let mut sregs = vcpu.get_sregs().map_err(fail("KVM_GET_SREGS"))?;
        sregs.cs.base = 0;
        sregs.cs.selector = 0;
        vcpu.set_sregs(&sregs).map_err(fail("KVM_SET_SREGS"))?;
        let mut regs = vcpu.get_regs().map_err(fail("KVM_GET_REGS"))?;
        regs.rip = guest::CODE;
        regs.rflags = 2; // Bit 1 is always set.
        vcpu.set_regs(&regs).map_err(fail("KVM_SET_REGS"))?;
        Ok(Machine { vcpu, irq, keep: (vm, ram) })
    }

    fn start(self) -> Result<Running, String> {
        extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        signal::register_signal_handler(kick_signal(), ignore)
            .map_err(|e| format!("sigaction: {}", io::Error::from(e)))?;

        let Machine { mut vcpu, irq, keep } = self;
        let (sender, messages) = mpsc::channel();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let body = move || {
            let _keep = keep;
            let mut host = Host { sender: sender.clone(), echoed: false, exits: Vec::new(), pacer: Pacer::default() };
            let result = host.run(&mut vcpu, &stopped);
            let _ = sender.send(Message::Ended(result));
        };
        let thread = thread::Builder::new().name("probe".into()).spawn(body).map_err(|e| format!("thread: {e}"))?;
        Ok(Running { thread, stop, messages, irq })
    }
}

/// Creates a megabyte of RAM with the guest and its page tables in it.
fn memory(code: &[u8]) -> Result<GuestRam, Box<dyn std::error::Error>> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE_UNCACHED: u64 = 1 << 7 | 1 << 4;
    const GIB: u64 = 1 << 30;
    let ram = GuestRam::new(&MemoryConfig { size: Size::mib(1), ..MemoryConfig::default() })?;
    ram.write(guest::CODE, code)?;
    let [pdpt, low, high] = [1, 2, 3].map(|n| guest::PML4 + n * layout::PAGE_SIZE);
    ram.write_obj(guest::PML4, pdpt | PRESENT_WRITABLE)?;
    for addr in [0, guest::MMIO, layout::IOAPIC, layout::LAPIC] {
        let (gib, directory) = if addr < GIB { (0, low) } else { (3, high) };
        ram.write_obj(pdpt + gib * 8, directory | PRESENT_WRITABLE)?;
        let page = addr & !((1 << 21) - 1);
        ram.write_obj(directory + ((addr % GIB) >> 21) * 8, page | LARGE_UNCACHED | PRESENT_WRITABLE)?;
    }
    Ok(ram)
}

#[allow(unsafe_code)]
fn map(vm: &VmFd, ram: &GuestRam) -> Result<(), kvm_ioctls::Error> {
    for (slot, region) in (0..).zip(ram.regions()) {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start,
            memory_size: region.len,
            userspace_addr: region.host_addr,
        };
        // SAFETY: the region is a mapping of `ram`, which `Machine` keeps beside the VM until the vCPU has stopped.
        unsafe { vm.set_user_memory_region(region)? };
    }
    Ok(())
}

/// Running vCPU thread, as seen by its watcher.
struct Running {
    thread: JoinHandle<()>,
    stop: Arc<AtomicBool>,
    messages: mpsc::Receiver<Message>,
    irq: IrqLine,
}

impl Running {
    /// Gets the vCPU out of the guest and waits for its thread. The signal is repeated, because the first one may
    /// arrive just before the thread enters the guest. A thread that KVM never returns from is abandoned.
    fn stop(self) {
        self.stop.store(true, Ordering::Release);
        for _ in 0..1000 {
            if self.thread.is_finished() {
                let _ = self.thread.join();
                return;
            }
            let _ = self.thread.kill(kick_signal());
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Counterpart of the guest on the vCPU thread.
struct Host {
    sender: mpsc::Sender<Message>,
    /// Set if the complement of the pattern has arrived since the last step.
    echoed: bool,
    exits: Vec<Instant>,
    pacer: Pacer,
}

impl Host {
    fn run(&mut self, vcpu: &mut VcpuFd, stop: &AtomicBool) -> Result<Times, String> {
        while !stop.load(Ordering::Acquire) {
            match vcpu.run() {
                Ok(VcpuExit::IoOut(guest::EXIT_PORT, _)) => self.exits.push(Instant::now()),
                Ok(VcpuExit::IoOut(guest::STEP_PORT, &[byte])) => self.step(byte)?,
                Ok(VcpuExit::IoIn(guest::LOOP_PORT, data)) => match self.pacer.next(Instant::now()) {
                    Some(turns) => data.copy_from_slice(&turns.to_ne_bytes()[..data.len().min(4)]),
                    None => return Ok(self.times()),
                },
                Ok(VcpuExit::IoIn(guest::ECHO_PORT, data)) | Ok(VcpuExit::MmioRead(guest::MMIO, data)) => {
                    data.copy_from_slice(&PATTERN.to_ne_bytes()[..data.len().min(4)]);
                }
                Ok(VcpuExit::IoOut(guest::ECHO_PORT, data)) | Ok(VcpuExit::MmioWrite(guest::MMIO_ECHO, data)) => {
                    self.echoed = data == (!PATTERN).to_ne_bytes();
                }
                Ok(VcpuExit::Shutdown) => return Err("the guest crashed (triple fault)".into()),
                Ok(VcpuExit::InternalError) => {
                    return Err("KVM could not emulate an instruction (KVM_EXIT_INTERNAL_ERROR)".into());
                }
                Ok(VcpuExit::FailEntry(reason, _)) => {
                    return Err(format!("the processor refused to enter the guest (reason {reason:#x})"));
                }
                Ok(exit) => return Err(format!("unexpected exit {exit:?}")),
                Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => {}
                Err(e) => return Err(format!("KVM_RUN: {}", io::Error::from(e))),
            }
        }
        Err("stopped".into())
    }

    fn step(&mut self, byte: u8) -> Result<(), String> {
        let step = Step::from_byte(byte).ok_or_else(|| format!("the guest reported an unknown step {byte}"))?;
        let echoed = std::mem::take(&mut self.echoed);
        if matches!(step, Step::PortIo | Step::Mmio) && !echoed {
            return Err("data that the guest read or wrote did not arrive unchanged".into());
        }
        let _ = self.sender.send(Message::Step(step));
        Ok(())
    }

    fn times(&self) -> Times {
        let mut gaps: Vec<_> = self.exits.windows(2).map(|pair| pair[1] - pair[0]).collect();
        gaps.sort();
        Times { exit_latency: gaps.get(gaps.len() / 2).copied(), ring0_speed: self.pacer.speed }
    }
}

/// Finds a loop length that is long enough to be timed and short enough not to delay the user.
#[derive(Default)]
struct Pacer {
    turns: u32,
    started: Option<Instant>,
    timed: u32,
    /// Speed of the fastest run in instructions per second: whatever slows a run down, it is not the guest.
    speed: Option<f64>,
}

impl Pacer {
    const FIRST: u32 = 250;
    const GROWTH: u32 = 8;
    /// Largest number of turns in a run, however fast it is.
    const LONGEST: u32 = 1 << 28;
    /// Shortest run that counts: a shorter one measures mainly the exits around the loop.
    const LONG_ENOUGH: Duration = Duration::from_millis(4);
    const RUNS: u32 = 3;

    /// Returns the number of turns of the next run, given that the last run ended at `now`; `None` if all is measured.
    fn next(&mut self, now: Instant) -> Option<u32> {
        match self.started {
            None => self.turns = Self::FIRST,
            Some(started) => {
                let took = now.duration_since(started);
                if took >= Self::LONG_ENOUGH || self.turns >= Self::LONGEST {
                    let speed = f64::from(self.turns) * f64::from(guest::LOOP_INSTRUCTIONS) / took.as_secs_f64();
                    self.speed = Some(self.speed.map_or(speed, |best| best.max(speed)));
                    self.timed += 1;
                } else {
                    self.turns = (self.turns * Self::GROWTH).min(Self::LONGEST);
                }
            }
        }
        self.started = Some(now);
        (self.timed < Self::RUNS).then_some(self.turns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the pacer against a guest of known speed; returns the time that this took and the measured speed.
    fn pace(instructions_per_second: f64) -> (Duration, f64) {
        let start = Instant::now();
        let mut now = start;
        let mut pacer = Pacer::default();
        while let Some(turns) = pacer.next(now) {
            now += Duration::from_secs_f64(f64::from(turns) * 2.0 / instructions_per_second);
        }
        (now - start, pacer.speed.unwrap())
    }

    #[test]
    fn slow_and_fast_guests_are_measured_in_a_moment() {
        for speed in [1e5, 6e5, 5e7, 6.4e8, 1e10] {
            let (took, found) = pace(speed);
            assert!((found / speed - 1.0).abs() < 0.01, "{speed}: {found}");
            assert!(took < Duration::from_millis(200), "{speed}: {took:?}");
        }
    }

    /// Runs other code than the guest's on this machine's KVM; returns the step that failed and the reason.
    fn failure(code: &[u8], deadline: Duration) -> (&'static str, String) {
        let kvm = Kvm::new().expect("these tests need /dev/kvm, of any speed");
        let vm = kvm.create_vm().unwrap();
        run_code(&kvm, vm, code, deadline).failed.unwrap()
    }

    #[test]
    fn guests_that_hang_or_crash_are_reported_as_such() {
        let hangs = ("real mode", "the guest hangs: nothing happened for 200ms".to_string());
        let soon = Duration::from_millis(200);
        assert_eq!(failure(&[0xEB, 0xFE], soon), hangs, "jmp to itself");
        assert_eq!(failure(&[0xFA, 0xF4], soon), hangs, "cli; hlt");
        // These guests end by themselves, but on a busy machine only after a while.
        let late = Duration::from_secs(30);
        // The first `not eax` of long mode becomes `ud2`, and there is no handler for it.
        let mut crash = guest::code().to_vec();
        let at = crash.windows(2).position(|bytes| bytes == [0xF7, 0xD0]).unwrap();
        crash[at..at + 2].copy_from_slice(&[0x0F, 0x0B]);
        assert_eq!(failure(&crash, late), ("port I/O", "the guest crashed (triple fault)".to_string()));
        // mov dx, STEP_PORT; mov al, PortIo; out dx, al
        let lie = [0xBA, 0x00, 0x07, 0xB0, Step::PortIo as u8, 0xEE];
        assert_eq!(failure(&lie, late).1, "data that the guest read or wrote did not arrive unchanged");
    }

    #[test]
    fn guest_does_all_its_steps() {
        let kvm = Kvm::new().expect("these tests need /dev/kvm, of any speed");
        let vm = kvm.create_vm().unwrap();
        let probe = run(&kvm, vm);
        assert_eq!(probe.failed, None);
        assert!(probe.passed.iter().copied().eq(STEPS.map(|(_, name)| name)));
        assert!(probe.exit_latency.is_some() && probe.ring0_speed.is_some());
    }

    #[test]
    fn guest_fits_below_its_stack() {
        let code = guest::code();
        assert_eq!(code.first(), Some(&0xFA), "cli");
        assert!(code.len() > 512 && guest::CODE + (code.len() as u64) < 0x7000, "{}", code.len());
    }

    #[test]
    fn answers_that_did_not_arrive_are_noticed() {
        let (sender, messages) = mpsc::channel();
        let mut host = Host { sender, echoed: false, exits: Vec::new(), pacer: Pacer::default() };
        assert!(host.step(Step::PortIo as u8).is_err());
        assert!(host.step(0).is_err() && host.step(255).is_err());
        host.echoed = true;
        host.step(Step::PortIo as u8).unwrap();
        assert!(matches!(messages.try_recv(), Ok(Message::Step(Step::PortIo))));
        assert!(host.step(Step::Mmio as u8).is_err(), "an answer counts once");
    }
}
