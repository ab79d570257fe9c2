//! `vireo doctor`: prints what [`crate::doctor`] found.

use std::io::{self, Write};
use std::path::Path;

use super::Failure;
use crate::doctor::device::Limits;
use crate::doctor::{self, Report};
use crate::kvm::DEV_KVM;
use crate::outcome::EXIT_VIREO_FAILED;

/// Check whether this host can run guests and how fast, and show how to fix what is missing
///
/// Exits with 0 if Linux guests can run here, with 125 if not.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Example:\n  vireo doctor --json | jq .linux_guests")]
pub struct DoctorArgs {
    /// Print the whole report as JSON
    #[arg(long)]
    pub json: bool,
}

/// Examines this host, prints the report and returns the exit code.
pub fn run(args: &DoctorArgs) -> Result<u8, Failure> {
    let report = doctor::examine(Path::new(DEV_KVM));
    let mut text = Vec::new();
    if args.json {
        serde_json::to_writer_pretty(&mut text, &report)?;
        text.push(b'\n');
    } else {
        print(&mut text, &report)?;
    }
    super::print(&text)?;
    Ok(if report.linux_guests { 0 } else { EXIT_VIREO_FAILED })
}

fn print(out: &mut dyn Write, report: &Report) -> io::Result<()> {
    let host = &report.host;
    let module = host.kvm_module.as_deref().unwrap_or("no KVM module");
    let kind = match (host.virtualization, host.is_guest) {
        (Some(extension), true) => format!("{extension}, itself a virtual machine"),
        (Some(extension), false) => extension.to_string(),
        (None, true) => "neither vmx nor svm, itself a virtual machine".to_string(),
        (None, false) => "neither vmx nor svm".to_string(),
    };
    writeln!(out, "      {:<18}{} ({kind}), Linux {}, {module}", "host", host.cpu, host.kernel)?;
    for check in &report.checks {
        let mark = if check.ok { "ok" } else { "FAIL" };
        writeln!(out, "{mark:<6}{:<18}{}", check.name, check.found)?;
        if let Some(remedy) = &check.remedy {
            writeln!(out, "{:<24}to fix this: {remedy}", "")?;
        }
    }
    if let Some(limits) = &report.limits {
        let bits = limits.physical_address_bits.unwrap_or(36); // The default of processors that do not report a width.
        let Limits { vcpus, memory_slots, .. } = limits;
        writeln!(out, "      {:<18}{vcpus} vCPUs, {memory_slots} memory slots, {bits} address bits", "limits")?;
        writeln!(out, "\nKVM capabilities")?;
    }
    for capability in &report.capabilities {
        let (mark, value) = match (capability.value > 0, capability.suffices()) {
            (true, _) => ("ok", "yes"),
            (false, true) => ("-", "no"),
            (false, false) => ("FAIL", "no"),
        };
        writeln!(out, "{mark:<6}{:<20}{value:<5}{}", capability.name, capability.purpose)?;
    }
    writeln!(out, "\n{}", report.verdict)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finding_is_printed_with_its_remedy() {
        let report = doctor::examine(Path::new("/nonexistent/kvm"));
        let mut out = Vec::new();
        print(&mut out, &report).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(text.contains("FAIL  device"), "{text}");
        assert!(text.contains(report.checks[0].remedy.as_ref().unwrap()), "{text}");
        assert!(text.ends_with(&format!("\n{}\n", report.verdict)), "{text}");
    }
}
