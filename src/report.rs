//! Report of a run for programs and people: the outcome, the moments of the boot, exits by reason, peak memory.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::outcome::Outcome;

/// Moments of a boot, measured from the start of the process.
#[derive(Clone, Debug)]
pub struct BootTiming {
    start: Instant,
    marks: [Option<Duration>; Mark::ALL.len()],
}

/// Moments that [`BootTiming`] records, in the order in which they occur.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// /dev/kvm is open; the VM and its vCPUs exist.
    KvmReady,
    /// Kernel, initrd and tables are in guest memory.
    KernelLoaded,
    /// The first vCPU enters the guest.
    FirstInstruction,
    /// The guest sends its first byte on the serial port.
    FirstSerialByte,
    /// The kernel reports that it runs init, or init itself does.
    InitStarted,
}

impl Mark {
    const ALL: [(Mark, &'static str, &'static str); 5] = [
        (Mark::KvmReady, "kvm_ready", "KVM ready"),
        (Mark::KernelLoaded, "kernel_loaded", "kernel loaded"),
        (Mark::FirstInstruction, "first_instruction", "first guest instruction"),
        (Mark::FirstSerialByte, "first_serial_byte", "first serial byte"),
        (Mark::InitStarted, "init_started", "init started"),
    ];
}

impl BootTiming {
    /// Creates a record that counts from `start`.
    pub fn new(start: Instant) -> Self {
        BootTiming { start, marks: Default::default() }
    }

    /// Records that `mark` occurs now, unless it has been recorded before.
    pub fn mark(&mut self, mark: Mark) {
        let elapsed = self.start.elapsed();
        self.marks[mark as usize].get_or_insert(elapsed);
    }

    /// Returns the time since the process started.
    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// Returns a table for people with one line for each moment.
    pub fn table(&self) -> String {
        let mut text = format!("{:<26}{:>10}\n", "process start", "0.0 ms");
        for (mark, _, name) in Mark::ALL {
            let when = match self.marks[mark as usize] {
                Some(d) => format!("{:.1} ms", d.as_secs_f64() * 1e3),
                None => "not seen".into(),
            };
            text += &format!("{name:<26}{when:>10}\n");
        }
        text
    }

    fn seconds(&self) -> BTreeMap<&'static str, Option<f64>> {
        Mark::ALL.iter().map(|(m, key, _)| (*key, self.marks[*m as usize].map(|d| d.as_secs_f64()))).collect()
    }
}

/// Contents of the file of `--report FILE`.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The outcome in one word ([`Outcome::word`]).
    pub outcome: &'static str,
    /// The outcome in one sentence.
    pub detail: String,
    /// vireo's exit status.
    pub exit_code: u8,
    /// Number of times that the guest was started, with `--retry-on-hang`; the other fields describe the last attempt.
    pub attempts: u32,
    /// Description of the booted kernel.
    pub kernel: String,
    /// Seconds from process start to each moment; null for moments that never occurred.
    pub boot_timing: BTreeMap<&'static str, Option<f64>>,
    /// Seconds from process start to the guest's end.
    pub duration: f64,
    /// Exits to user space by reason, over all vCPUs.
    pub exits: Exits,
    /// Largest resident size of this process in bytes, guest memory included.
    pub peak_memory: u64,
    /// Registers of each vCPU, as text of several lines, if something went wrong in the guest.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub registers: Vec<String>,
    /// Last lines of the kernel's log, or of the console.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub kernel_log: Vec<String>,
    /// Core file that was written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vmcore: Option<PathBuf>,
}

impl Report {
    /// Builds a report at the end of a run.
    pub fn new(outcome: &Outcome, kernel: String, timing: &BootTiming, exits: Exits) -> Self {
        Report {
            outcome: outcome.word(),
            detail: outcome.sentence(),
            exit_code: outcome.exit_code(),
            attempts: 1,
            kernel,
            boot_timing: timing.seconds(),
            duration: timing.elapsed().as_secs_f64(),
            exits,
            peak_memory: peak_memory(),
            registers: Vec::new(),
            kernel_log: Vec::new(),
            vmcore: None,
        }
    }
}

/// Number of exits to user space by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Exits {
    /// All exits.
    pub total: u64,
    /// Port reads.
    pub pio_in: u64,
    /// Port writes that KVM did not coalesce.
    pub pio_out: u64,
    /// MMIO reads.
    pub mmio_read: u64,
    /// MMIO writes.
    pub mmio_write: u64,
    /// Interruptions by vireo itself: to pause, to inspect the state, to stop.
    pub interrupted: u64,
    /// All other exits.
    pub other: u64,
    /// Writes that KVM coalesced without an exit.
    pub coalesced: u64,
}

impl Exits {
    /// Adds another vCPU's counts.
    pub fn add(&mut self, other: &Exits) {
        self.total += other.total;
        self.pio_in += other.pio_in;
        self.pio_out += other.pio_out;
        self.mmio_read += other.mmio_read;
        self.mmio_write += other.mmio_write;
        self.interrupted += other.interrupted;
        self.other += other.other;
        self.coalesced += other.coalesced;
    }
}

/// Returns the largest resident size that this process has had, in bytes.
#[allow(unsafe_code)]
fn peak_memory() -> u64 {
    // SAFETY: rusage is plain numbers, for which zeros are valid, and the pointer is valid for the call.
    unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        u64::try_from(usage.ru_maxrss).unwrap_or(0) * 1024
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_a_mark_counts() {
        let mut timing = BootTiming::new(Instant::now());
        timing.mark(Mark::KvmReady);
        let first = timing.seconds()["kvm_ready"];
        timing.mark(Mark::KvmReady);
        assert_eq!(timing.seconds()["kvm_ready"], first);
        assert!(timing.table().contains("init started                not seen"), "{}", timing.table());
    }
}
