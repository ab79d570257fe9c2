//! `vireo run`: boots a kernel and waits until the guest ends.

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

/// Kernel command line when none is given.
const DEFAULT_CMDLINE: &str = "console=ttyS0";
/// Kernel command line when none is given, with `--console`.
const VIRTIO_CMDLINE: &str = "console=hvc0";

/// Kernel command line when none is given, with `--testdev`: a test takes the words as its arguments.
const TEST_CMDLINE: &str = "";

/// Flags of `vireo run`.
#[derive(Args)]
#[command(
    override_usage = "vireo run --kernel FILE [OPTIONS]\n       vireo run --config FILE [OPTIONS]",
    after_help = "Example:\n  vireo run --kernel /boot/vmlinuz --initrd initrd.img --memory 512M --cpus 2 \\\n      \
                  --cmdline 'console=ttyS0 quiet' --timeout 60s"
)]
pub struct RunArgs {
    /// Kernel: bzImage, vmlinux (also gz, zst, xz, lz4, bz2), PVH ELF or multiboot, detected by content
    #[arg(long, value_name = "FILE", required_unless_present = "config")]
    kernel: Option<PathBuf>,
    /// Initial RAM disk; may be repeated, files are concatenated in order
    #[arg(long, value_name = "FILE")]
    initrd: Vec<PathBuf>,
    /// Use this static program or script as /init
    #[arg(long, value_name = "PROG")]
    init: Option<PathBuf>,
    /// Pack this static busybox with its applets as /bin [default: the one in PATH]
    #[arg(long, value_name = "PATH", num_args = 0..=1, default_missing_value = "busybox")]
    busybox: Option<PathBuf>,
    /// Pack the contents of a folder as the root directory; may be repeated
    #[arg(long, value_name = "DIR")]
    initramfs_dir: Vec<PathBuf>,
    /// Pack a file; may be repeated
    #[arg(long, value_name = "HOST:GUEST")]
    file: Vec<FileConfig>,
    /// Pack kernel modules and their dependencies; /vireo/modules in the guest lists their paths in load order
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    modules: Vec<String>,
    /// Directory of the kernel's modules (/lib/modules/VERSION or a parent) [default: beside the kernel, then this
    /// host's]
    #[arg(long, value_name = "DIR")]
    modules_dir: Option<PathBuf>,
    /// Kernel command line, passed unchanged [default: console=ttyS0; console=hvc0 with --console; empty with
    /// --testdev]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    cmdline: Option<String>,
    /// Entry into the kernel: bzimage runs its own decompressor, direct is the 64-bit entry, pvh and multiboot are the
    /// 32-bit entries
    #[arg(long, value_name = "MODE", value_parser = parse_boot)]
    boot: Option<BootMode>,
    #[command(flatten)]
    devices: DeviceArgs,
    /// Share a folder of the host (in the guest: mount -t virtiofs share0 /mnt):
    /// PATH[,tag=NAME][,readonly][,squash_uid=N][,cache=never|auto|names|always][,flat][,queues=N];
    /// default tags are share0, share1, ...; may be repeated
    #[arg(long, value_name = "PATH")]
    share: Vec<FsConfig>,
    /// First serial port: stdio, stdout, stderr, file:PATH, pipe:PATH, pty, socket:PATH, fd:N or null [default: stdio]
    #[arg(long, value_name = "WHERE")]
    serial: Option<SerialConfig>,
    /// Virtio console (console=hvc0); takes the same values as --serial; with stdio, --serial becomes null
    #[arg(long, value_name = "WHERE")]
    console: Option<ConsoleEnd>,
    /// Virtio port for data: NAME,to=WHERE[,from=FILE]; WHERE as for --serial, or stdin; FILE is the input of file:PATH
    /// and null; may be repeated
    #[arg(long, value_name = "NAME")]
    console_port: Vec<PortConfig>,
    /// Provide ACPI tables; if off, an MP table and virtio_mmio.device= parameters [default: on]
    #[arg(long, value_name = "on|off", hide_possible_values = true)]
    acpi: Option<Acpi>,
    /// QEMU's isa-debug-exit: a guest's write of N to port 0xf4 ends it with exit status 2N+1
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
    /// Print the machine as JSON for --config, and exit
    #[arg(long)]
    print_config: bool,
    /// Time limit for the guest to power off after SIGTERM
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
    serde_json::from_value(text.into()).map_err(|_| "expected one of auto, bzimage, direct, pvh, multiboot".into())
}

fn parse_uuid(text: &str) -> Result<uuid::Uuid, String> {
    text.parse().map_err(|_| "expected a UUID, like 123e4567-e89b-12d3-a456-426614174000".into())
}

impl RunArgs {
    /// Returns the machine that the file and the flags describe together.
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

    /// Adds the flags' parts to the initramfs that vireo packs.
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

/// Boots the kernel, waits for the guest's end and reports it; returns the exit status.
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
