//! The end of vireo by a fault: a panic, an abort, a stack overflow or an invalid memory access. All of them are bugs
//! in vireo, except SIGBUS: a file that is mapped into memory (`--pmem`, a kernel) was truncated.
//!
//! To the calling script, such an end must look like every other: the terminal is restored, one sentence says what
//! happened, the reports are written, and the exit status is that of a failure. Any thread may fault while it holds any
//! lock, so nothing here waits for a lock, and an alarm ends the process if the rest takes too long.
//!
//! ```text
//!   panic ──────────────────────────────────────────────────────────────┐
//!   signal ─▶ handler, on the thread's signal stack ─▶ RESERVE, a stack ─┴▶ restore, say, report, _exit(125)
//! ```
//!
//! A signal handler may do next to nothing, and the signal stack is small. The handler therefore only notes what
//! happened and makes the thread continue in [`last_words`], on a stack reserved for this. The interrupted code never
//! resumes.

#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::fmt::Write as _;
use std::panic::PanicHookInfo;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicI64, AtomicU64, Ordering};
use std::{mem, ptr, thread};

use crate::outcome::EXIT_VIREO_FAILED;
use crate::terminal;

/// Signals that a faulty process sends itself or gets for its own fault.
const SIGNALS: [(i32, &str); 5] = [
    (libc::SIGSEGV, "invalid memory access (SIGSEGV)"),
    (libc::SIGILL, "invalid instruction (SIGILL)"),
    (libc::SIGFPE, "arithmetic error (SIGFPE)"),
    (libc::SIGABRT, "aborted (SIGABRT)"),
    (libc::SIGSYS, "forbidden system call (SIGSYS)"),
];
/// Message for SIGBUS.
const FILE_GONE: &str =
    "a file mapped into memory, such as the guest's, was truncated, or its file system has no space left";
/// Time limit for the last words, in seconds.
const SECONDS: libc::c_uint = 10;
/// Distance from the stack pointer within which an access counts as one to the stack: stack frames have a few pages at
/// most.
const NEAR: u64 = 1 << 20;
const RESERVE_BYTES: usize = 256 << 10;

/// Memory of a reserve stack. Its pages are touched only when it is used.
#[repr(align(16))]
struct Stack(UnsafeCell<[u8; RESERVE_BYTES]>);

// SAFETY: only the one thread that set BEGUN uses it, through its stack pointer.
unsafe impl Sync for Stack {}

static RESERVE: Stack = Stack(UnsafeCell::new([0; RESERVE_BYTES]));
/// Set once a thread has begun to end the process.
static BEGUN: AtomicBool = AtomicBool::new(false);
/// ID of the thread that ends the process.
static THREAD: AtomicI32 = AtomicI32::new(0);
/// Details of that thread's signal: number, address, instruction and stack pointer.
static SIGNAL: AtomicI64 = AtomicI64::new(0);
static ADDRESS: AtomicU64 = AtomicU64::new(0);
static INSTRUCTION: AtomicU64 = AtomicU64::new(0);
static STACK: AtomicU64 = AtomicU64::new(0);

type Report = Box<dyn FnOnce(&str) + Send>;
/// Writer of the reports, if any were requested.
static REPORT: Mutex<Option<Report>> = Mutex::new(None);

/// Installs the panic hook and the signal handlers for the rest of the process's life.
pub(super) fn install() {
    std::panic::set_hook(Box::new(|info| end(&internal(&panic_text(info)))));
    for signal in SIGNALS.map(|(signal, _)| signal).into_iter().chain([libc::SIGBUS]) {
        // SAFETY: an empty sigaction is valid. The handler does only what a signal handler may do. It runs on the
        // signal stack that the standard library gives every thread, because the thread's own stack may be full.
        unsafe {
            let mut action: libc::sigaction = mem::zeroed();
            action.sa_sigaction = on_signal as *const () as libc::sighandler_t;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigfillset(&mut action.sa_mask);
            libc::sigaction(signal, &action, ptr::null_mut());
        }
    }
}

/// Sets `write` as the writer of the reports after a fault; its argument is the sentence for the user.
pub(super) fn reports(write: impl FnOnce(&str) + Send + 'static) {
    if let Ok(mut report) = REPORT.lock() {
        *report = Some(Box::new(write));
    }
}

fn panic_text(info: &PanicHookInfo<'_>) -> String {
    let payload = info.payload();
    let text = payload.downcast_ref::<&str>().copied();
    let text =
        text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("panic without a message");
    let mut sentence = text.replace('\n', " ");
    if let Some(place) = info.location() {
        let _ = write!(sentence, " at {place}");
    }
    sentence
}

/// Returns the sentence for a fault of vireo itself.
fn internal(what: &str) -> String {
    let name = thread::current().name().map_or_else(String::new, |name| format!(" in thread '{name}'"));
    format!("internal error{name}: {what}; please report this")
}

/// Ends the process, unless another thread has already begun to.
fn end(sentence: &str) -> ! {
    if BEGUN.swap(true, Ordering::AcqRel) {
        wait_for_end();
    }
    THREAD.store(this_thread(), Ordering::Release);
    finish(sentence)
}

/// Waits while another thread ends the process. If that thread is this one, its last words themselves faulted, so it
/// exits immediately.
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
    // std is avoided: another thread may hold the lock of its stderr.
    // SAFETY: the pointer and the length are those of `line`.
    unsafe { libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), line.len()) };
    let report = REPORT.try_lock().ok().and_then(|mut report| report.take());
    if let Some(write) = report {
        write(sentence);
    }
    exit()
}

/// Sets an alarm that ends the process in any case: the thread may hold a lock that the last words need, such as the
/// allocator's.
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
    // SAFETY: it only ends the process, and may be called in a signal handler.
    unsafe { libc::_exit(EXIT_VIREO_FAILED.into()) }
}

/// Number of this thread. Not by libc's `gettid`: the standard library refers to that one weakly, and a linker may leave
/// such a symbol of a static C library out, so that a call of it is one of address 0.
fn this_thread() -> i32 {
    // SAFETY: the call has no arguments and only returns a number.
    unsafe { libc::syscall(libc::SYS_gettid) as i32 }
}

extern "C" fn on_signal(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo and the thread's ucontext; only those fields of siginfo are read that
    // its code says are present.
    unsafe {
        // A signal sent by another process with kill(2) or tgkill(2) kills the process as usual.
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
        // The state is as if `last_words` had just been called: the stack pointer is 8 below a multiple of 16.
        let top = RESERVE.0.get().cast::<u8>().add(RESERVE_BYTES - 8);
        registers[libc::REG_RSP as usize] = top as i64;
        registers[libc::REG_RIP as usize] = last_words as *const () as i64;
    }
}

/// Continuation of a thread after such a signal.
extern "C" fn last_words() -> ! {
    let (signal, address) = (SIGNAL.load(Ordering::Relaxed), ADDRESS.load(Ordering::Relaxed));
    let (instruction, stack) = (INSTRUCTION.load(Ordering::Relaxed), STACK.load(Ordering::Relaxed));
    let overflow =
        matches!(signal as i32, libc::SIGSEGV | libc::SIGBUS) && address != 0 && address.abs_diff(stack) < NEAR;
    if overflow {
        finish(&internal(&format!("stack overflow at {instruction:#x}")));
    }
    if signal == i64::from(libc::SIGBUS) {
        finish(FILE_GONE);
    }
    let what =
        SIGNALS.iter().find(|(number, _)| i64::from(*number) == signal).map_or("unknown signal", |(_, what)| what);
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

    /// Returns guest memory backed by a file whose second page was cut off.
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

    /// Produces the fault of a case, in a separate process.
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
            // SAFETY: the invalid access is the purpose of this test.
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
            ("overflow", "in thread 'worker': stack overflow at 0x"),
            ("main overflow", ": stack overflow at 0x"),
            ("abort", "in thread 'worker': aborted (SIGABRT) at 0x"),
            ("access", "in thread 'worker': invalid memory access (SIGSEGV) at 0x"),
            ("file", "vireo: a file mapped into memory"),
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
