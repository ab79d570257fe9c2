//! The end of vireo by a fault: a panic, an abort, a stack that overflowed, an access to memory that is not there. All of
//! them are vireo's own, but for SIGBUS: a file that is mapped into memory (`--pmem`, a kernel) has become shorter.
//!
//! Such an end must look like every other one to the calling script: the terminal is restored, one sentence says what
//! happened, the reports are written, and the exit status is that of a failure. Any thread may be the one, with any lock in
//! its hands, so nothing here waits for a lock, and a clock ends the process if the rest takes too long.
//!
//! ```text
//!   panic ──────────────────────────────────────────────────────────────┐
//!   signal ─▶ handler, on the thread's signal stack ─▶ RESERVE, a stack ─┴▶ restore, say, report, _exit(125)
//! ```
//!
//! A handler may do next to nothing, and the signal stack is small. So it only notes what happened and has the thread
//! continue in [`last_words`] on a stack that is kept for this; what the thread did before is never continued.

#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::fmt::Write as _;
use std::panic::PanicHookInfo;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicI64, AtomicU64, Ordering};
use std::{mem, ptr, thread};

use crate::outcome::EXIT_VIREO_FAILED;
use crate::terminal;

/// Signals that a faulty process sends itself, or gets for what it did.
const SIGNALS: [(i32, &str); 5] = [
    (libc::SIGSEGV, "it accessed memory that is not there (SIGSEGV)"),
    (libc::SIGILL, "it came to an instruction that does not exist (SIGILL)"),
    (libc::SIGFPE, "it calculated what cannot be calculated (SIGFPE)"),
    (libc::SIGABRT, "it gave up (SIGABRT)"),
    (libc::SIGSYS, "it made a system call that is not allowed (SIGSYS)"),
];
/// Why the process gets SIGBUS.
const FILE_GONE: &str =
    "a file that is mapped into memory, the guest's for example, was made shorter, or there is no space left for it";
/// How long the last words may take.
const SECONDS: libc::c_uint = 10;
/// How near to the stack pointer an access is one of the stack: functions have frames of some pages at most.
const NEAR: u64 = 1 << 20;
const RESERVE_BYTES: usize = 256 << 10;

/// Bytes of a stack. They are only touched when it is used.
#[repr(align(16))]
struct Stack(UnsafeCell<[u8; RESERVE_BYTES]>);

// SAFETY: only the one thread that set BEGUN uses it, by way of its stack pointer.
unsafe impl Sync for Stack {}

static RESERVE: Stack = Stack(UnsafeCell::new([0; RESERVE_BYTES]));
/// A thread is ending the process already.
static BEGUN: AtomicBool = AtomicBool::new(false);
/// The thread that ends the process.
static THREAD: AtomicI32 = AtomicI32::new(0);
/// What happened to it: signal, address, instruction and stack pointer.
static SIGNAL: AtomicI64 = AtomicI64::new(0);
static ADDRESS: AtomicU64 = AtomicU64::new(0);
static INSTRUCTION: AtomicU64 = AtomicU64::new(0);
static STACK: AtomicU64 = AtomicU64::new(0);

type Report = Box<dyn FnOnce(&str) + Send>;
/// Writer of the reports, if any were asked for.
static REPORT: Mutex<Option<Report>> = Mutex::new(None);

/// Installs the panic hook and the signal handlers, for the rest of the process's life.
pub(super) fn install() {
    std::panic::set_hook(Box::new(|info| end(&internal(&panic_text(info)))));
    for signal in SIGNALS.map(|(signal, _)| signal).into_iter().chain([libc::SIGBUS]) {
        // SAFETY: an empty sigaction is valid. The handler keeps to what is allowed in one; it runs on the signal stack that
        // the standard library gives every thread, for the thread's own may have no room left.
        unsafe {
            let mut action: libc::sigaction = mem::zeroed();
            action.sa_sigaction = on_signal as *const () as libc::sighandler_t;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigfillset(&mut action.sa_mask);
            libc::sigaction(signal, &action, ptr::null_mut());
        }
    }
}

/// Sets `write` as the writer of the reports after a fault. Its argument is the sentence for the user.
pub(super) fn reports(write: impl FnOnce(&str) + Send + 'static) {
    if let Ok(mut report) = REPORT.lock() {
        *report = Some(Box::new(write));
    }
}

fn panic_text(info: &PanicHookInfo<'_>) -> String {
    let payload = info.payload();
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("it panicked");
    let mut sentence = text.replace('\n', " ");
    if let Some(place) = info.location() {
        let _ = write!(sentence, " at {place}");
    }
    sentence
}

/// The sentence for a fault of vireo's own.
fn internal(what: &str) -> String {
    let name = thread::current().name().map_or_else(String::new, |name| format!(" in thread '{name}'"));
    format!("internal error{name}: {what}; please report this")
}

/// Ends the process, if no other thread is about to.
fn end(sentence: &str) -> ! {
    if BEGUN.swap(true, Ordering::AcqRel) {
        wait_for_end();
    }
    THREAD.store(this_thread(), Ordering::Release);
    finish(sentence)
}

/// Another thread ends the process; in the same one it is the last words themselves that failed.
fn wait_for_end() -> ! {
    if THREAD.load(Ordering::Acquire) == this_thread() {
        exit();
    }
    loop {
        // SAFETY: it only waits, and may be called in a signal handler.
        unsafe { libc::pause() };
    }
}

fn finish(sentence: &str) -> ! {
    terminal::restore();
    limit_time();
    let line = format!("vireo: {sentence}\n");
    // Not by way of std: another thread may hold the lock of its stderr.
    // SAFETY: the pointer and the length are those of `line`.
    unsafe { libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), line.len()) };
    let report = REPORT.try_lock().ok().and_then(|mut report| report.take());
    if let Some(write) = report {
        write(sentence);
    }
    exit()
}

/// Ends the process in a while, whatever it does: the thread may hold a lock that it needs, the allocator's for example.
fn limit_time() {
    extern "C" fn on_alarm(_: i32) {
        exit();
    }
    // SAFETY: the handler only ends the process; the set is empty before SIGALRM is added.
    unsafe {
        libc::signal(libc::SIGALRM, on_alarm as *const () as libc::sighandler_t);
        let mut set = mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGALRM);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, ptr::null_mut());
        libc::alarm(SECONDS);
    }
}

fn exit() -> ! {
    // SAFETY: it ends the process, also from a signal handler.
    unsafe { libc::_exit(EXIT_VIREO_FAILED.into()) }
}

/// Number of this thread. Not by libc's `gettid`: the standard library refers to that one weakly, and a linker may leave
/// such a symbol of a static C library out, so that a call of it is one of address 0.
fn this_thread() -> i32 {
    // SAFETY: the call has no arguments and only returns a number.
    unsafe { libc::syscall(libc::SYS_gettid) as i32 }
}

extern "C" fn on_signal(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid siginfo and the thread's ucontext; the fields of siginfo that are read are those
    // that its code says are there.
    unsafe {
        // Sent by another process with kill(2) or tgkill(2): the process dies of it as usual.
        if (*info).si_code <= 0 && (*info).si_pid() != libc::getpid() {
            terminal::restore();
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
            return;
        }
        if BEGUN.swap(true, Ordering::AcqRel) {
            wait_for_end();
        }
        THREAD.store(this_thread(), Ordering::Release);
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        SIGNAL.store(signal.into(), Ordering::Relaxed);
        ADDRESS.store(if (*info).si_code > 0 { (*info).si_addr() as u64 } else { 0 }, Ordering::Relaxed);
        INSTRUCTION.store(registers[libc::REG_RIP as usize] as u64, Ordering::Relaxed);
        STACK.store(registers[libc::REG_RSP as usize] as u64, Ordering::Relaxed);
        // As if `last_words` had just been called: the stack pointer is 8 below a multiple of 16.
        let top = RESERVE.0.get().cast::<u8>().add(RESERVE_BYTES - 8);
        registers[libc::REG_RSP as usize] = top as i64;
        registers[libc::REG_RIP as usize] = last_words as *const () as i64;
    }
}

/// Code that a thread continues with after such a signal.
extern "C" fn last_words() -> ! {
    let (signal, address) = (SIGNAL.load(Ordering::Relaxed), ADDRESS.load(Ordering::Relaxed));
    let (instruction, stack) = (INSTRUCTION.load(Ordering::Relaxed), STACK.load(Ordering::Relaxed));
    let overflow =
        matches!(signal as i32, libc::SIGSEGV | libc::SIGBUS) && address != 0 && address.abs_diff(stack) < NEAR;
    if overflow {
        finish(&internal(&format!("its stack overflowed at {instruction:#x}")));
    }
    if signal == i64::from(libc::SIGBUS) {
        finish(FILE_GONE);
    }
    let what =
        SIGNALS.iter().find(|(number, _)| i64::from(*number) == signal).map_or("it got a signal", |(_, what)| what);
    finish(&internal(&format!("{what} at {instruction:#x}, address {address:#x}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::mapped::{MappedFile, UNIT};
    use crate::layout::MMIO_HOLE_END;
    use crate::memory::{Access, Area, GuestRam};
    use crate::terminal::RawMode;
    use std::os::fd::AsFd;
    use std::process::{Command, Stdio};

    const CASE: &str = "VIREO_TEST_FAULT";
    const REPORT_FILE: &str = "VIREO_TEST_FAULT_REPORT";

    /// Recurses until the stack overflows.
    #[allow(unconditional_recursion)]
    fn deeper(n: u64) -> u64 {
        let here = std::hint::black_box([n; 64]);
        deeper(n + 1) + here[n as usize % 64]
    }

    /// Guest memory of a file whose second page is gone.
    fn mapped_ram_of_a_file_that_is_cut_off() -> GuestRam {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(UNIT).unwrap();
        let mapped = MappedFile::open(file.path(), Access::Shared, None).unwrap();
        let area = Area { start: MMIO_HOLE_END, len: UNIT, backing: mapped.backing() };
        let ram = GuestRam::with_areas(&"16M".parse().unwrap(), vec![area]).unwrap();
        ram.write(MMIO_HOLE_END + 4096, b"here").unwrap();
        file.as_file().set_len(4096).unwrap();
        ram
    }

    /// The fault of a case, in a process of its own.
    fn fault(case: &str) {
        install();
        let path = std::env::var_os(REPORT_FILE).unwrap();
        reports(move |sentence| std::fs::write(path, sentence).unwrap());
        let raw = RawMode::enter(libc::STDIN_FILENO).unwrap();
        assert!(raw.is_some());
        let in_thread = |f: fn()| _ = thread::Builder::new().name("worker".into()).spawn(f).unwrap().join();
        match case {
            "panic" => in_thread(|| panic!("what\nnow")),
            "overflow" => in_thread(|| _ = deeper(0)),
            "main overflow" => _ = deeper(0),
            "abort" => in_thread(|| std::process::abort()),
            // SAFETY: an access to what is not there, which is what this is about.
            "access" => in_thread(|| _ = unsafe { ptr::read_volatile(0x10 as *const u8) }),
            "file" => in_thread(|| {
                let ram = mapped_ram_of_a_file_that_is_cut_off();
                let _ = ram.read_obj::<u8>(MMIO_HOLE_END + 4096);
            }),
            "report" => {
                reports(|_| panic!("again"));
                in_thread(|| panic!("first"));
            }
            "lock" => {
                let _locked = REPORT.lock().unwrap();
                in_thread(|| panic!("first"));
            }
            _ => panic!("{case}"),
        }
        unreachable!("it must have ended");
    }

    #[test]
    fn every_fault_ends_decently() {
        if let Ok(case) = std::env::var(CASE) {
            return fault(&case);
        }
        let this = "cli::fault::tests::every_fault_ends_decently";
        let dir = tempfile::tempdir().unwrap();
        for (case, sentence) in [
            ("panic", "in thread 'worker': what now at src/cli/fault.rs:"),
            ("overflow", "in thread 'worker': its stack overflowed at 0x"),
            ("main overflow", ": its stack overflowed at 0x"),
            ("abort", "in thread 'worker': it gave up (SIGABRT) at 0x"),
            ("access", "in thread 'worker': it accessed memory that is not there (SIGSEGV) at 0x"),
            ("file", "vireo: a file that is mapped into memory"),
            ("report", "in thread 'worker': first at src/cli/fault.rs:"),
            ("lock", "in thread 'worker': first at src/cli/fault.rs:"),
        ] {
            let (controller, user) = {
                let controller = rustix::pty::openpt(rustix::pty::OpenptFlags::RDWR).unwrap();
                rustix::pty::grantpt(&controller).unwrap();
                rustix::pty::unlockpt(&controller).unwrap();
                let name = rustix::pty::ptsname(&controller, Vec::new()).unwrap();
                let options = &mut std::fs::File::options();
                let user = options.read(true).write(true).open(name.to_str().unwrap()).unwrap();
                (controller, user)
            };
            let before = rustix::termios::tcgetattr(user.as_fd()).unwrap();
            let report = dir.path().join(case);
            let mut command = Command::new(std::env::current_exe().unwrap());
            command
                .args(["--exact", this, "--nocapture", "--test-threads=1"])
                .env(CASE, case)
                .env(REPORT_FILE, &report);
            let output = command.stdin(Stdio::from(user.try_clone().unwrap())).output().unwrap();
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(125), "{case}: {stderr}");
            assert_eq!(stderr.contains("vireo: internal error"), case != "file", "{case}: {stderr}");
            assert!(stderr.contains(sentence), "{case}: {stderr}");
            let after = rustix::termios::tcgetattr(user.as_fd()).unwrap();
            assert_eq!(after.local_modes, before.local_modes, "{case}");
            let written = std::fs::read_to_string(&report).unwrap_or_default();
            let reported = !matches!(case, "report" | "lock");
            assert_eq!(written.contains(sentence.trim_start_matches("vireo: ")), reported, "{case}: {written}");
            drop(controller);
        }
    }

    #[test]
    fn a_signal_from_outside_still_kills() {
        if std::env::var_os(CASE).is_some() {
            install();
            let mut killer =
                Command::new("sh").args(["-c", &format!("kill -ABRT {}", std::process::id())]).spawn().unwrap();
            killer.wait().unwrap();
            loop {
                thread::park();
            }
        }
        let this = "cli::fault::tests::a_signal_from_outside_still_kills";
        let mut command = Command::new(std::env::current_exe().unwrap());
        let output = command.args(["--exact", this, "--nocapture"]).env(CASE, "1").output().unwrap();
        let signal = std::os::unix::process::ExitStatusExt::signal(&output.status);
        assert_eq!(signal, Some(libc::SIGABRT), "{output:?}");
    }
}
