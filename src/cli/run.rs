//! `vireo run`: boot a kernel and wait for its end.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;

use super::{Failure, chain, say};
use crate::boot::BootMode;
use crate::config::{Acpi, CpuConfig, MachineConfig};
use crate::devices::serial::SerialConfig;
use crate::event::Signals;
use crate::machine::Machine;
use crate::machine::run::{Ended, Mailbox, RunOptions, SIGNALS};
use crate::memory::MemoryConfig;
use crate::options::Span;
use crate::outcome::{EXIT_VIREO_FAILED, Report};
use crate::virtio::blk::BlkConfig;
use crate::virtio::rng::RngConfig;

/// What the guest is told when nothing is said.
const DEFAULT_CMDLINE: &str = "console=ttyS0";

/// Flags of `vireo run`.
#[derive(Args)]
#[command(
    after_help = "Example:\n  vireo run --kernel /boot/vmlinuz --initrd initrd.img --cmdline 'console=ttyS0 quiet' \
                  --memory 512M --cpus 2"
)]
pub struct RunArgs {
    /// Kernel: bzImage, vmlinux (also gz, zst, xz, lz4, bz2) or PVH ELF, found by content
    #[arg(long, value_name = "FILE", required_unless_present = "config")]
    kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Kernel command line, passed as it is [default: console=ttyS0]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    cmdline: Option<String>,
    /// How the kernel is entered: bzimage runs its own decompressor, direct is the 64-bit entry
    #[arg(long, value_name = "MODE", value_parser = parse_boot)]
    boot: Option<BootMode>,
    /// RAM: SIZE[,hugepages=2M|thp|off][,shared=on|off][,prefault=on|off] [default: 256M]
    #[arg(long, value_name = "SIZE")]
    memory: Option<MemoryConfig>,
    /// vCPUs: N[,affinity=0-3 or 0:2:4] [default: 1]
    #[arg(long, value_name = "N")]
    cpus: Option<CpuConfig>,
    /// CPU features to add or hide: +name,-name, names as in /proc/cpuinfo
    #[arg(long, value_name = "LIST", allow_hyphen_values = true)]
    cpu: Option<String>,
    /// Disk: PATH[,readonly][,id=NAME]; may be given several times
    #[arg(long, value_name = "PATH")]
    disk: Vec<BlkConfig>,
    /// Give the guest a virtio random number generator
    #[arg(long)]
    rng: bool,
    /// First serial port: stdio, file:PATH, pty, socket:PATH or null [default: stdio]
    #[arg(long, value_name = "WHERE")]
    serial: Option<SerialConfig>,
    /// ACPI tables, or else an MP table and virtio_mmio.device= parameters [default: on]
    #[arg(long, value_name = "on|off")]
    acpi: Option<Acpi>,
    /// SMBIOS system UUID [default: random]
    #[arg(long, value_name = "UUID")]
    uuid: Option<uuid::Uuid>,
    /// Read the machine from a JSON file; flags override it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print the machine as JSON, as --config takes it, and exit
    #[arg(long)]
    print_config: bool,
    /// End the guest after this time, like 60s or 500ms
    #[arg(long, value_name = "TIME")]
    timeout: Option<Span>,
    /// After SIGTERM pressed the power button, how long the guest may take
    #[arg(long, value_name = "TIME", default_value = "10s")]
    grace: Span,
    /// Write how the guest ended to a file, as JSON
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Print when each step of the boot was reached
    #[arg(long)]
    boot_timing: bool,
}

fn parse_boot(text: &str) -> Result<BootMode, String> {
    serde_json::from_value(text.into()).map_err(|_| "one of auto, bzimage, direct, pvh is wanted".into())
}

/// A file of the user's could not be used.
#[derive(Debug, thiserror::Error)]
enum FileError {
    #[error("cannot read {0}")]
    Read(PathBuf, #[source] io::Error),
    #[error("{0} is no machine description")]
    Parse(PathBuf, #[source] serde_json::Error),
    #[error("cannot write {0}")]
    Write(PathBuf, #[source] io::Error),
}

impl RunArgs {
    /// The machine that file and flags describe together.
    fn machine(&self) -> Result<MachineConfig, Failure> {
        let mut config = match &self.config {
            None => {
                let mut config = MachineConfig::default();
                config.boot.cmdline = DEFAULT_CMDLINE.into();
                config
            }
            Some(path) => {
                let text = fs::read_to_string(path).map_err(|e| FileError::Read(path.clone(), e))?;
                serde_json::from_str(&text).map_err(|e| FileError::Parse(path.clone(), e))?
            }
        };
        set(&mut config.boot.kernel, &self.kernel);
        set(&mut config.boot.cmdline, &self.cmdline);
        set(&mut config.boot.boot, &self.boot);
        set(&mut config.memory, &self.memory);
        set(&mut config.cpu, &self.cpus);
        set(&mut config.cpu.features, &self.cpu);
        set(&mut config.serial, &self.serial);
        set(&mut config.acpi, &self.acpi);
        config.boot.initrd = self.initrd.clone().or(config.boot.initrd);
        config.uuid = self.uuid.or(config.uuid);
        config.disks.extend_from_slice(&self.disk);
        if self.rng {
            config.rng.get_or_insert_with(RngConfig::default);
        }
        Ok(config)
    }
}

fn set<T: Clone>(target: &mut T, flag: &Option<T>) {
    if let Some(value) = flag {
        *target = value.clone();
    }
}

/// Boots, waits, tells; returns the exit status.
pub fn run(args: RunArgs, start: Instant) -> Result<u8, Failure> {
    let config = args.machine()?;
    if args.print_config {
        config.validate()?;
        writeln!(io::stdout(), "{}", serde_json::to_string_pretty(&config)?)?;
        return Ok(0);
    }
    if let Some(path) = &args.report {
        // Now rather than when the guest has run for an hour.
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::read_dir(folder).map_err(|e| FileError::Write(path.clone(), e))?;
    }
    let signals = Signals::new(&SIGNALS)?;
    let options =
        RunOptions { timeout: args.timeout.map(|t| t.0), grace: args.grace.0, signals: Some(signals), paused: false };
    let result = boot(config, options, start);
    match result {
        Ok((kernel, ended)) => {
            if args.boot_timing {
                let _ = io::stderr().write_all(ended.timing.table().as_bytes());
            }
            if let Some(dump) = &ended.dump {
                let _ = writeln!(io::stderr(), "{dump}");
            }
            say(&ended.outcome.sentence());
            if let Some(path) = &args.report {
                let report = Report::new(&ended.outcome, kernel, &ended.timing, ended.exits);
                write_report(path, &serde_json::to_string_pretty(&report)?)?;
            }
            Ok(ended.outcome.exit_code())
        }
        Err(failure) => {
            if let Some(path) = &args.report {
                let report = serde_json::json!({
                    "outcome": "failed", "detail": chain(&*failure), "exit_code": EXIT_VIREO_FAILED,
                });
                write_report(path, &format!("{report:#}"))?;
            }
            Err(failure)
        }
    }
}

fn boot(config: MachineConfig, options: RunOptions, start: Instant) -> Result<(String, Ended), Failure> {
    let mut machine = Machine::new(config, start)?;
    machine.load()?;
    let kernel = machine.kernel().to_string();
    Ok((kernel, machine.run(options, Mailbox::new()?)?))
}

/// Written beside and renamed, so that nobody reads half a report; straight into what is no regular file.
fn write_report(path: &Path, text: &str) -> Result<(), FileError> {
    let fail = |e| FileError::Write(path.into(), e);
    let text = format!("{text}\n");
    if fs::metadata(path).is_ok_and(|m| !m.is_file()) {
        return fs::write(path, text).map_err(fail);
    }
    let mut name = path.as_os_str().to_os_string();
    name.push(format!(".{}.tmp", std::process::id()));
    let beside = PathBuf::from(name);
    let written = fs::write(&beside, text).and_then(|()| fs::rename(&beside, path));
    if written.is_err() {
        let _ = fs::remove_file(&beside);
    }
    written.map_err(fail)
}
