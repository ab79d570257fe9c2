//! `vireo exec`: run a command under a kernel and exit with its code.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Instant;

use clap::Args;

use super::run::{ReportFile, conclude, set};
use super::watch::WatchArgs;
use super::{Failure, Usage, print};
use crate::backend::console::ConsoleEnd;
use crate::config::{CpuConfig, MachineConfig};
use crate::control::Controller;
use crate::event::Signals;
use crate::exec::{self, Command, Folder, RootFrom};
use crate::machine::Machine;
use crate::machine::mailbox::Mailbox;
use crate::machine::run::{Ended, RunOptions, SIGNALS};
use crate::memory::MemoryConfig;
use crate::options::{Size, Span};
use crate::outcome::Outcome;
use crate::virtio::blk::BlkConfig;
use crate::virtio::net::NetConfig;
use crate::virtio::vsock::VsockConfig;

/// Enough for a distribution's programs and what they write.
const DEFAULT_MEMORY: Size = Size::mib(512);

/// Signals that a command may be sent, beside those that every run hears.
const COMMAND_SIGNALS: [i32; 2] = [libc::SIGUSR1, libc::SIGUSR2];

/// Flags of `vireo exec`.
#[derive(Args)]
#[command(
    override_usage = "vireo exec [OPTIONS] [--] [COMMAND [ARGUMENT]...]",
    after_help = "Example:\n  vireo exec --kernel bzImage -- uname -r\n  \
                  vireo exec --kernel bzImage --share .:rw --timeout 10m -- make test\n  vireo exec\n\n\
                  Exit status: the command's own, 128+N if signal N killed it; 126 it cannot be run, 127 it is not \
                  there; 70 the kernel panicked, 71 the guest crashed or ended before the command, 72 it hung, 73 the \
                  console showed what it must not, 124 time limit, 125 vireo or the host failed, 2 wrong usage."
)]
pub struct ExecArgs {
    /// Kernel [default: the newest /boot/vmlinuz-* that may be read]
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Where the kernel's modules are: its /lib/modules/VERSION, or a folder above it
    #[arg(long, value_name = "DIR")]
    modules: Option<PathBuf>,
    /// More for the kernel's command line
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, default_value = "")]
    append: String,
    /// Root file system: a folder of the host, an image, or initramfs for a busybox alone
    #[arg(long, value_name = "DIR|IMAGE|initramfs", default_value = "/")]
    root: RootFrom,
    /// What is written to the root reaches the host; otherwise it is forgotten with the guest
    #[arg(long)]
    rw: bool,
    /// Folder of the host: DIR[:GUEST][:ro|rw], at the same place and read-only by default; may be given several times
    #[arg(long, value_name = "DIR")]
    share: Vec<Folder>,
    /// Environment variable: NAME=VALUE, NAME with the value that it has here, or '*' for all; may be given several times
    #[arg(long, value_name = "NAME[=VALUE]")]
    env: Vec<OsString>,
    /// Where the command starts [default: this folder, if it is in the guest]
    #[arg(long, value_name = "DIR")]
    cwd: Option<PathBuf>,
    /// RAM, as for run [default: 512M]
    #[arg(long, value_name = "SIZE", allow_negative_numbers = true)]
    memory: Option<MemoryConfig>,
    /// vCPUs, as for run [default: 1]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    cpus: Option<CpuConfig>,
    /// CPU features to add or hide, as for run
    #[arg(long, value_name = "LIST", allow_hyphen_values = true)]
    cpu: Option<String>,
    /// Disk, as for run; may be given several times
    #[arg(long, value_name = "PATH")]
    disk: Vec<BlkConfig>,
    /// Network card, as for run; the first is set up by DHCP; may be given several times
    #[arg(long, value_name = "HOW")]
    net: Vec<NetConfig>,
    /// Sockets between host and guest, as for run
    #[arg(long, value_name = "cid=N,path=SOCKET")]
    vsock: Option<VsockConfig>,
    /// Show the kernel's console on stderr
    #[arg(long, short)]
    verbose: bool,
    /// Print the machine as JSON and exit
    #[arg(long, hide = true)]
    print_config: bool,
    /// End the guest after this time, like 60s or 500ms
    #[arg(long, value_name = "TIME", allow_negative_numbers = true)]
    timeout: Option<Span>,
    /// Write how the guest ended to a file, as JSON
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    #[command(flatten)]
    watch: WatchArgs,
    /// The command and its arguments; a shell without them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

impl ExecArgs {
    fn machine(&self) -> Result<MachineConfig, Failure> {
        let mut config = MachineConfig::default();
        config.boot.kernel = self.kernel.clone().map_or_else(exec::host_kernel, Ok)?;
        config.boot.cmdline.clone_from(&self.append);
        config.memory.size = DEFAULT_MEMORY;
        set(&mut config.memory, &self.memory);
        set(&mut config.cpu, &self.cpus);
        set(&mut config.cpu.features, &self.cpu);
        config.disks.clone_from(&self.disk);
        config.nets.clone_from(&self.net);
        config.vsock.clone_from(&self.vsock);
        config.serial = if self.verbose { ConsoleEnd::Stderr } else { ConsoleEnd::Null };
        Ok(config)
    }

    fn command(&self) -> Command {
        Command {
            words: self.command.clone(),
            env: self.env.clone(),
            cwd: self.cwd.clone(),
            root: self.root.clone(),
            writable: self.rw,
            folders: self.share.clone(),
            modules: self.modules.clone(),
        }
    }
}

/// Boots, runs the command, tells; returns the exit status.
pub fn run(args: ExecArgs, start: Instant) -> Result<u8, Failure> {
    let mut config = args.machine()?;
    let session = args.command().prepare(&mut config)?;
    config.validate().map_err(Usage)?;
    if args.print_config {
        return print(format!("{}\n", serde_json::to_string_pretty(&config)?).as_bytes());
    }
    let report_file = args.report.as_deref().map(ReportFile::new).transpose()?;
    let signals = Signals::new(&[&SIGNALS[..], &COMMAND_SIGNALS].concat())?;
    let options = RunOptions {
        timeout: args.timeout.map(|t| t.0),
        signals: Some(signals),
        cooked: !session.terminal(),
        errand: true,
        ..args.watch.options(start)?
    };
    let result = boot(config, options, session, &args.command, start);
    let own = |outcome: &Outcome| matches!(outcome, Outcome::Exited(_) | Outcome::Signalled(_));
    conclude(result, report_file.as_ref(), |ended| {
        if !own(&ended.outcome) {
            args.watch.tell(ended);
        }
    })
}

fn boot(
    config: MachineConfig,
    mut options: RunOptions,
    session: exec::Session,
    words: &[OsString],
    start: Instant,
) -> Result<(String, Ended), Failure> {
    let mut machine = Machine::new(config, options.transcript.clone(), start)?;
    let mailbox = Mailbox::new()?;
    let orders = session.listen(Controller::new(mailbox.clone()), words)?;
    options.forward = Some(Box::new(move |signal| orders.signal(signal)));
    machine.load()?;
    let kernel = machine.kernel().to_string();
    Ok((kernel, machine.run(options, mailbox)?))
}
