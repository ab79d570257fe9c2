//! `vireo run`: boot a kernel and wait for its end.

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Instant;

use clap::Args;

use super::debug::DebugArgs;
use super::devices::DeviceArgs;
use super::early::Early;
use super::launch::{boot, supervise};
use super::named::{NamedFiles, Use};
use super::report::FileError;
use super::watch::WatchArgs;
use super::{Failure, LogArgs, print, set, usage};
use crate::backend::console::ConsoleEnd;
use crate::boot::BootMode;
use crate::boot::modules::ModulesConfig;
use crate::boot::pack::{FileConfig, InitramfsConfig};
use crate::config::{Acpi, MachineConfig};
use crate::devices::serial::SerialConfig;
use crate::event::Signals;
use crate::machine::run::{RunOptions, SIGNALS};
use crate::options::Span;
use crate::virtio::console::PortConfig;
use crate::virtio::fs::FsConfig;

/// What the guest is told when nothing is said.
const DEFAULT_CMDLINE: &str = "console=ttyS0";
/// The same with `--console`.
const VIRTIO_CMDLINE: &str = "console=hvc0";

/// The same with `--testdev`: words on the command line are a test's arguments.
const TEST_CMDLINE: &str = "";

/// Flags of `vireo run`.
#[derive(Args)]
#[command(
    override_usage = "vireo run --kernel FILE [OPTIONS]\n       vireo run --config FILE [OPTIONS]",
    after_help = "Example:\n  vireo run --kernel /boot/vmlinuz --initrd initrd.img --memory 512M --cpus 2 \\\n      \
                  --cmdline 'console=ttyS0 quiet' --timeout 60s"
)]
pub struct RunArgs {
    /// Kernel: bzImage, vmlinux (also gz, zst, xz, lz4, bz2), PVH ELF or multiboot, found by content
    #[arg(long, value_name = "FILE", required_unless_present = "config")]
    kernel: Option<PathBuf>,
    /// Initial RAM disk; given several times, one behind the other
    #[arg(long, value_name = "FILE")]
    initrd: Vec<PathBuf>,
    /// Make this static program or script /init
    #[arg(long, value_name = "PROG")]
    init: Option<PathBuf>,
    /// Pack this static busybox with its applets as /bin [default: the one in PATH]
    #[arg(long, value_name = "PATH", num_args = 0..=1, default_missing_value = "busybox")]
    busybox: Option<PathBuf>,
    /// Pack what is in a folder as the root directory; may be given several times
    #[arg(long, value_name = "DIR")]
    initramfs_dir: Vec<PathBuf>,
    /// Pack a file; may be given several times
    #[arg(long, value_name = "HOST:GUEST")]
    file: Vec<FileConfig>,
    /// Pack kernel modules and what they need; /vireo/modules in the guest has their paths in load order
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    modules: Vec<String>,
    /// Where they are: /lib/modules/VERSION, or a folder above it [default: beside the kernel, then this host's]
    #[arg(long, value_name = "DIR")]
    modules_dir: Option<PathBuf>,
    /// Kernel command line, passed as it is [default: console=ttyS0, console=hvc0 with --console,
    /// none with --testdev]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    cmdline: Option<String>,
    /// How the kernel is entered: bzimage runs its own decompressor, direct is the 64-bit entry, pvh and multiboot are
    /// 32-bit ones
    #[arg(long, value_name = "MODE", value_parser = parse_boot)]
    boot: Option<BootMode>,
    #[command(flatten)]
    devices: DeviceArgs,
    /// Folder of the host (mount -t virtiofs share0 /mnt): PATH[,tag=NAME][,readonly][,squash_uid=N]
    /// [,cache=never|auto|names|always][,flat][,queues=N]; the tag is share0, share1, ... otherwise; may be given several times
    #[arg(long, value_name = "PATH")]
    share: Vec<FsConfig>,
    /// First serial port: stdio, stdout, stderr, file:PATH, pipe:PATH, pty, socket:PATH, fd:N or null [default: stdio]
    #[arg(long, value_name = "WHERE")]
    serial: Option<SerialConfig>,
    /// Virtio console (console=hvc0), leads where --serial can; stdio is taken from the serial port
    #[arg(long, value_name = "WHERE")]
    console: Option<ConsoleEnd>,
    /// Virtio port for data: NAME,to=WHERE as for --serial, or stdin[,from=FILE]; may be given several times
    #[arg(long, value_name = "NAME")]
    console_port: Vec<PortConfig>,
    /// ACPI tables, or else an MP table and virtio_mmio.device= parameters [default: on]
    #[arg(long, value_name = "on|off", hide_possible_values = true)]
    acpi: Option<Acpi>,
    /// QEMU's isa-debug-exit: what a guest writes to port 0xf4, times two and one, is vireo's exit status
    #[arg(long)]
    debug_exit: bool,
    /// QEMU's pc-testdev, and fw_cfg with vCPU count and RAM size, as kvm-unit-tests expect them
    #[arg(long)]
    testdev: bool,
    /// SMBIOS system UUID [default: random]
    #[arg(long, value_name = "UUID", value_parser = parse_uuid)]
    uuid: Option<uuid::Uuid>,
    /// Read the machine from a JSON file; flags override it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print the machine as JSON, as --config takes it, and exit
    #[arg(long)]
    print_config: bool,
    /// After SIGTERM pressed the power button, how long the guest may take
    #[arg(long, value_name = "TIME", default_value = "10s", allow_negative_numbers = true)]
    grace: Span,
    #[command(flatten)]
    watch: WatchArgs,
    #[command(flatten)]
    debug: DebugArgs,
    /// Print when each step of the boot was reached
    #[arg(long)]
    boot_timing: bool,
}

fn parse_boot(text: &str) -> Result<BootMode, String> {
    serde_json::from_value(text.into()).map_err(|_| "one of auto, bzimage, direct, pvh, multiboot is wanted".into())
}

fn parse_uuid(text: &str) -> Result<uuid::Uuid, String> {
    text.parse().map_err(|_| "a UUID is wanted, like 123e4567-e89b-12d3-a456-426614174000".into())
}

impl RunArgs {
    /// The machine that file and flags describe together.
    fn machine(&self) -> Result<MachineConfig, Failure> {
        let mut config = match &self.config {
            None => {
                let mut config = MachineConfig::default();
                config.boot.cmdline = match self.console {
                    _ if self.testdev => TEST_CMDLINE,
                    Some(_) => VIRTIO_CMDLINE,
                    None => DEFAULT_CMDLINE,
                }
                .into();
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
        set(&mut config.serial, &self.serial);
        config.console = self.console.clone().or(config.console);
        config.console_ports.extend_from_slice(&self.console_port);
        let mut ends = config.console.iter().chain(config.console_ports.iter().map(|port| &port.to));
        if self.serial.is_none() && ends.any(|end| end.streams()[..2].contains(&true)) {
            config.serial = ConsoleEnd::Null;
        }
        set(&mut config.acpi, &self.acpi);
        if !self.initrd.is_empty() {
            config.boot.initrd.clone_from(&self.initrd);
        }
        self.initramfs(&mut config.boot.initramfs);
        self.debug.settle(&mut config);
        config.debug_exit |= self.debug_exit;
        config.testdev |= self.testdev;
        config.uuid = self.uuid.or(config.uuid);
        self.devices.apply(&mut config);
        config.shares.extend_from_slice(&self.share);
        Ok(config)
    }

    /// What the flags add to the initramfs that is packed.
    fn initramfs(&self, config: &mut Option<InitramfsConfig>) {
        let mut packed = config.take().unwrap_or_default();
        packed.init = self.init.clone().or(packed.init);
        packed.busybox = self.busybox.clone().or(packed.busybox);
        packed.dirs.extend_from_slice(&self.initramfs_dir);
        packed.files.extend_from_slice(&self.file);
        let mut modules = packed.modules.take().unwrap_or_default();
        modules.names.extend_from_slice(&self.modules);
        modules.dir = self.modules_dir.clone().or(modules.dir);
        packed.modules = Some(modules).filter(|modules| *modules != ModulesConfig::default());
        *config = Some(packed).filter(|packed| *packed != InitramfsConfig::default());
    }
}

/// Boots, waits, tells; returns the exit status.
pub fn run(args: RunArgs, log: &LogArgs, start: Instant) -> Result<u8, Failure> {
    let config = args.machine()?;
    config.validate().map_err(usage)?;
    if args.print_config {
        return print(format!("{}\n", serde_json::to_string_pretty(&config)?).as_bytes());
    }
    let mut named = NamedFiles::default();
    named.add_some("--config", args.config.as_deref(), Use::Read);
    named.add_machine(&config);
    args.watch.add_to(&mut named);
    args.debug.add_to(&mut named);
    log.init_with(named, args.watch.attempts() > 1)?;
    let attempt = |options: RunOptions, early: &Early| {
        let options = RunOptions { grace: args.grace.0, signals: Some(Signals::new(&SIGNALS)?), ..options };
        boot(config.clone(), options, early, &args.debug, None)
    };
    let name = config.boot.kernel.file_name().unwrap_or_default().to_string_lossy().into_owned();
    supervise(&args.watch, &name, start, attempt, |ended| {
        if args.boot_timing && !args.watch.quiet() {
            let _ = io::stderr().write_all(ended.timing.table().as_bytes());
        }
        args.watch.tell(ended);
    })
}
