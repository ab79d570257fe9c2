//! `vireo doctor`: whether this host can run guests, how fast, and what fixes it if not. Needs nothing but this binary.
//!
//! [`examine`] goes from the device node ([`device`]) through KVM's capabilities to a probe guest ([`probe`],
//! [`guest`]) that exercises KVM as a kernel would. Each finding is a [`Check`] with a sentence; the first failed check
//! decides the verdict.

pub mod device;
pub mod guest;
pub mod probe;

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;

use device::{Capability, HostFacts, Limits};
use probe::Probe;

/// Ring 0 speed in instructions per second below which a stock kernel is too slow to be useful: it executes more than a
/// thousand million instructions until it has booted. Hardware is a hundred times faster than this, KVM on an emulated
/// processor ten times.
const USEFUL_SPEED: f64 = 50e6;

/// Something that prevents guests from running, with its remedy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{found}")]
pub struct Problem {
    /// Finding, as a sentence without its full stop.
    pub found: String,
    /// Remedy; a command where there is one.
    pub remedy: String,
}

impl Problem {
    fn new(found: String, remedy: impl Into<String>) -> Self {
        Problem { found, remedy: remedy.into() }
    }
}

/// One examined aspect of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Name of the check.
    pub name: &'static str,
    /// Set if this aspect does not prevent guests from running.
    pub ok: bool,
    /// Finding in words.
    pub found: String,
    /// Remedy, if the check failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

/// Complete report of the doctor, as printed by `--json`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Set if Linux guests run here at a useful speed.
    pub linux_guests: bool,
    /// Conclusion in words, with the reason.
    pub verdict: String,
    /// Examined device.
    pub device: PathBuf,
    /// Host of the device.
    pub host: HostFacts,
    /// Checks in the order in which they were made, up to the point where no more can be learned.
    pub checks: Vec<Check>,
    /// Capabilities of KVM.
    pub capabilities: Vec<Capability>,
    /// Limits of a guest's size; absent if KVM could not be queried.
    pub limits: Option<Limits>,
    /// Median time of an exit to user space and back, in nanoseconds.
    pub exit_latency_ns: Option<u64>,
    /// Instructions per second at ring 0.
    pub ring0_instructions_per_second: Option<u64>,
}

/// Examines the KVM device at `path`, which is /dev/kvm except in tests.
pub fn examine(path: &Path) -> Report {
    let mut report = Report {
        linux_guests: false,
        verdict: String::new(),
        device: path.into(),
        host: HostFacts::read(),
        checks: Vec::new(),
        capabilities: Vec::new(),
        limits: None,
        exit_latency_ns: None,
        ring0_instructions_per_second: None,
    };
    if let Err(broken) = report.run_checks(path) {
        let check = Check { name: broken.0, ok: false, found: broken.1.found, remedy: Some(broken.1.remedy) };
        report.checks.push(check);
    }
    report.conclude();
    report
}

impl Report {
    /// Runs the checks as far as this host allows. Every passed check is recorded; the first failed one is the error.
    fn run_checks(&mut self, path: &Path) -> Result<(), (&'static str, Problem)> {
        let kvm = device::open(path, &self.host).map_err(|problem| ("device", problem))?;
        self.passed("device", format!("{} opens, API version {}", path.display(), kvm.inner().get_api_version()));
        self.capabilities = device::capabilities(&kvm);
        self.limits = Some(device::limits(&kvm));
        self.check_capabilities()?;
        let start = Instant::now();
        let vm = device::create_vm(&kvm, &self.host).map_err(|problem| ("virtual machine", problem))?;
        self.passed("virtual machine", format!("created in {:.1} ms", start.elapsed().as_secs_f64() * 1e3));
        self.note_probe(probe::run(kvm.inner(), vm))
    }

    fn passed(&mut self, name: &'static str, found: String) {
        self.checks.push(Check { name, ok: true, found, remedy: None });
    }

    fn check_capabilities(&mut self) -> Result<(), (&'static str, Problem)> {
        let missing: Vec<_> = self.capabilities.iter().filter(|c| !c.suffices()).map(|c| c.name).collect();
        if !missing.is_empty() {
            let found = format!("this KVM lacks {}", missing.join(", "));
            return Err(("capabilities", Problem::new(found, "run a newer Linux kernel on this host (4.20 or later)")));
        }
        let required = self.capabilities.iter().filter(|c| c.required).count();
        let optional = self.capabilities.len() - required;
        let present = self.capabilities.iter().filter(|c| !c.required && c.value > 0).count();
        self.passed("capabilities", format!("all {required} required ones, {present} of {optional} optional ones"));
        Ok(())
    }

    /// Records how far the guest came and what it measured.
    fn note_probe(&mut self, probe: Probe) -> Result<(), (&'static str, Problem)> {
        if !probe.passed.is_empty() {
            self.passed("probe guest", probe.passed.join(", "));
        }
        if let Some((step, why)) = probe.failed {
            let remedy = "update the host's kernel; under another hypervisor, update that one too";
            return Err(("probe guest", Problem::new(format!("{step}: {why}"), remedy)));
        }
        if let Some(latency) = probe.exit_latency {
            self.exit_latency_ns = u64::try_from(latency.as_nanos()).ok();
            self.passed("exit latency", format!("{:.1} us to user space and back", latency.as_secs_f64() * 1e6));
        }
        let speed = probe.ring0_speed.unwrap_or(0.0);
        self.ring0_instructions_per_second = Some(speed as u64);
        if speed < USEFUL_SPEED {
            let found = format!("{} instructions/s", millions(speed));
            return Err(("ring 0 speed", Problem::new(found, self.speed_remedy())));
        }
        self.passed("ring 0 speed", format!("{} instructions/s", millions(speed)));
        Ok(())
    }

    fn speed_remedy(&self) -> &'static str {
        match self.host.virtualization {
            Some(_) => "use the processor's own virtualization: load kvm_intel or kvm_amd and no other KVM module",
            None => "use a host whose processor shows vmx or svm in /proc/cpuinfo",
        }
    }

    /// Sets the verdict from the checks.
    fn conclude(&mut self) {
        let speed = self.ring0_instructions_per_second.unwrap_or(0) as f64;
        let broken = self.checks.iter().find(|check| !check.ok);
        self.linux_guests = broken.is_none();
        self.verdict = match broken {
            None => format!("Linux guests run here, at up to {} kernel instructions/s.", millions(speed)),
            Some(check) if check.name == "ring 0 speed" => format!(
                "This KVM emulates ring 0 at {} instructions/s: Linux guests will not boot in useful time here. Small \
                 bare-metal guests work.",
                millions(speed)
            ),
            Some(check) => format!("No Linux guest can run here: {}.", check.found),
        };
    }
}

/// Formats a count in millions, with one decimal for small counts.
fn millions(count: f64) -> String {
    let millions = count / 1e6;
    if millions < 10.0 { format!("{millions:.1} M") } else { format!("{millions:.0} M") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn report(probe: Probe) -> Report {
        let mut report = examine(Path::new("/nonexistent/kvm"));
        report.checks.clear();
        if let Err((name, problem)) = report.note_probe(probe) {
            report.checks.push(Check { name, ok: false, found: problem.found, remedy: Some(problem.remedy) });
        }
        report.conclude();
        report
    }

    fn probe(speed: f64) -> Probe {
        let latency = Some(Duration::from_nanos(1234));
        Probe { passed: vec!["real mode"], failed: None, exit_latency: latency, ring0_speed: Some(speed) }
    }

    #[test]
    fn speed_decides_what_the_host_is_good_for() {
        let fast = report(probe(3.2e9));
        assert!(fast.linux_guests);
        assert_eq!(fast.verdict, "Linux guests run here, at up to 3200 M kernel instructions/s.");
        let slow = report(probe(0.6e6));
        assert!(!slow.linux_guests);
        assert!(
            slow.verdict.starts_with("This KVM emulates ring 0 at 0.6 M instructions/s: Linux guests will not boot")
        );
        assert!(!slow.checks.last().unwrap().remedy.as_ref().unwrap().is_empty());
    }

    #[test]
    fn guest_that_hangs_is_reported_as_such() {
        let failed = Some(("long mode", "the guest hangs: nothing happened for 5 s".to_string()));
        let report = report(Probe { failed, ..probe(1e9) });
        assert!(!report.linux_guests && report.exit_latency_ns.is_none());
        assert_eq!(
            report.verdict,
            "No Linux guest can run here: long mode: the guest hangs: nothing happened for 5 s."
        );
    }

    #[test]
    fn absent_device_ends_the_examination() {
        let report = examine(Path::new("/nonexistent/kvm"));
        assert!(!report.linux_guests && report.checks.len() == 1 && !report.checks[0].ok);
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["linux_guests"], false);
        assert!(json["exit_latency_ns"].is_null());
    }

    #[test]
    fn required_capabilities_are_required() {
        let mut report = examine(Path::new("/nonexistent/kvm"));
        let capability = |name, value, required| Capability { name, value, required, purpose: "" };
        report.capabilities = vec![capability("a", 1, true), capability("b", 0, false)];
        assert!(report.check_capabilities().is_ok());
        report.capabilities.push(capability("c", 0, true));
        assert_eq!(report.check_capabilities().unwrap_err().1.found, "this KVM lacks c");
    }
}
