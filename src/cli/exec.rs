//! `vireo exec`: runs a command under a kernel and exits with its exit code.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Instant;

use clap::Args;

use super::debug::DebugArgs;
use super::devices::DeviceArgs;
use super::early::Early;
use super::launch::{boot, supervise};
use super::matrix::{self, Given};
use super::named::{NamedFiles, Use};
use super::watch::WatchArgs;
use super::{Failure, LogArgs, print, usage};
use crate::backend::console::ConsoleEnd;
use crate::boot::pack;
use crate::config::MachineConfig;
use crate::event::Signals;
use crate::exec::{self, Command, Folder, RootFrom};
use crate::machine::run::{RunOptions, SIGNALS};
use crate::options::Size;
use crate::outcome::Outcome;

/// Default RAM: enough for a distribution's programs and the files that they write.
const DEFAULT_MEMORY: Size = Size::mib(512);

/// Signals that a command may be sent in addition to those that every run handles.
const COMMAND_SIGNALS: [i32; 2] = [libc::SIGUSR1, libc::SIGUSR2];

/// Flags of `vireo exec`.
#[derive(Args)]
#[command(
    override_usage = "vireo exec [OPTIONS] [--] [COMMAND [ARGUMENT]...]",
    after_help = "Example:\n  vireo exec --kernel bzImage -- uname -r\n  \
                  vireo exec --kernel bzImage --share .:rw --timeout 10m -- make test\n  vireo exec\n\n\
                  Once the command has started, vireo passes signals on to it: SIGINT and SIGQUIT reach its process \
                  group, as from a terminal, others only its process. The third SIGINT, SIGTERM or SIGQUIT within ten \
                  seconds ends the guest.\n\nExit status: the command's own, 128+N if signal N killed it; 126 it \
                  cannot be run, 127 it was not found; 70 the kernel panicked, 71 the guest crashed or ended before \
                  the command, 72 it hung, 73 the console matched --fail-on, 124 time limit reached, 125 vireo or the \
                  host failed, 2 wrong usage."
)]
pub struct ExecArgs {
    /// Kernel [default: the newest readable /boot/vmlinuz-*]
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Directory of the kernel's modules: its /lib/modules/VERSION, or a parent
    #[arg(long, value_name = "DIR")]
    modules: Option<PathBuf>,
    /// Append to the kernel command line
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, default_value = "")]
    append: String,
    /// Root file system: a folder of the host, an image, or initramfs for a busybox alone
    #[arg(long, value_name = "DIR|IMAGE|initramfs", default_value = "/")]
    root: RootFrom,
    /// Let writes to the root reach the host (default: discarded when the guest ends)
    #[arg(long)]
    rw: bool,
    /// Share a folder of the host: DIR[:GUEST][:ro|rw]; by default at the same path and read-only; may be repeated
    #[arg(long, value_name = "DIR")]
    share: Vec<Folder>,
    /// Environment variable: NAME=VALUE, NAME to pass on its value from here, or '*' for all; may be repeated. Without
    /// --env the command gets the variables set here, except those of sessions and secrets; with another root, only
    /// LANG, LC_* and TZ
    #[arg(long, value_name = "NAME[=VALUE]")]
    env: Vec<OsString>,
    /// Working directory of the command [default: this one, or / with another root]
    #[arg(long, value_name = "DIR")]
    cwd: Option<PathBuf>,
    /// The command's standard input: inherit, or null (same as -n) for loops like 'while read'
    #[arg(long, short = 'n', value_name = "WHERE", num_args = 0..=1, require_equals = true,
          default_missing_value = "null", default_value = "inherit", hide_default_value = true)]
    stdin: InputFrom,
    #[command(flatten)]
    devices: DeviceArgs,
    /// Show the kernel's console on stderr
    #[arg(long, short)]
    verbose: bool,
    /// Print the machine as JSON and exit
    #[arg(long, hide = true)]
    print_config: bool,
    #[command(flatten)]
    debug: DebugArgs,
    #[command(flatten)]
    watch: WatchArgs,
    /// Run the command once for each kernel and configuration in a TOML file. Its keys are flags of exec: for all runs,
    /// under [kernels.NAME], or under [configs.NAME]; command-line flags override the file
    #[arg(long, value_name = "FILE")]
    matrix: Option<PathBuf>,
    /// With --matrix: number of simultaneous runs [default: number of processors]
    #[arg(long, value_name = "N", requires = "matrix")]
    jobs: Option<usize>,
    /// With --matrix: keep each run's output and report in this folder
    #[arg(long, value_name = "DIR", requires = "matrix")]
    output_dir: Option<PathBuf>,
    /// Folders that guests of other runs of a matrix can write to
    #[arg(long, hide = true, value_name = "DIR")]
    writable_folder: Vec<PathBuf>,
    /// Command and its arguments; without them a shell is started
    #[arg(trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// Value of `--stdin`.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum InputFrom {
    /// vireo's own standard input.
    Inherit,
    /// No input.
    Null,
}

impl ExecArgs {
    fn machine(&self) -> Result<MachineConfig, Failure> {
        Ok(self.machine_with(self.kernel()?))
    }

    /// Returns the kernel that was named, or this host's.
    pub(super) fn kernel(&self) -> Result<PathBuf, exec::Error> {
        self.kernel.clone().map_or_else(exec::host_kernel, Ok)
    }

    fn machine_with(&self, kernel: PathBuf) -> MachineConfig {
        let mut config = MachineConfig::default();
        config.boot.kernel = kernel;
        config.boot.cmdline.clone_from(&self.append);
        config.memory.size = DEFAULT_MEMORY;
        self.devices.apply(&mut config);
        config.serial = if self.verbose { ConsoleEnd::Stderr } else { ConsoleEnd::Null };
        config
    }

    /// Returns whether the guests run in other processes.
    pub(super) fn is_matrix(&self) -> bool {
        self.matrix.is_some()
    }

    /// Returns the files that the flags name. `kernel` is the kernel's path, or an empty path if there is no kernel.
    pub(super) fn named(&self, kernel: PathBuf) -> NamedFiles {
        let mut named = NamedFiles::default();
        self.writable_folder.iter().for_each(|folder| named.add_writable(folder));
        self.share.iter().for_each(|folder| named.add_folder("--share", &folder.host, folder.writable));
        match &self.root {
            RootFrom::Path(root) if root.is_dir() => named.add_folder("--root", root, self.rw),
            RootFrom::Path(root) => named.add_disk("--root", root, self.rw, None),
            RootFrom::Initramfs => {
                named.add_some("--root initramfs", pack::find_busybox("busybox".as_ref()).as_deref(), Use::Read);
            }
        }
        named.add_some("--modules", self.modules.as_deref(), Use::Modules);
        self.watch.add_to(&mut named);
        self.debug.add_to(&mut named);
        named.add_machine(&self.machine_with(kernel));
        named
    }

    fn command(&self) -> Command {
        Command {
            words: self.command.clone(),
            env: self.env.clone(),
            cwd: self.cwd.clone(),
            no_input: self.stdin == InputFrom::Null,
            root: self.root.clone(),
            writable: self.rw,
            folders: self.share.clone(),
            modules: self.modules.clone(),
            watched: self.verbose || self.watch.reads_console(),
        }
    }
}

/// Boots, runs the command and reports the end; returns the exit status.
pub fn run(args: ExecArgs, log: &LogArgs, start: Instant) -> Result<u8, Failure> {
    if let Some(file) = &args.matrix {
        let exec = super::exec_command();
        let (report, junit) = args.watch.reports();
        let given = Given {
            matrix: file.clone(),
            jobs: args.jobs,
            output_dir: args.output_dir.clone(),
            report,
            junit,
            command: args.command.clone(),
            flags: matrix::given_flags(&exec, &super::matches_of_command()),
        };
        return matrix::run(&given, &exec, log);
    }
    let command = args.command();
    let machine = args.machine();
    let prepare = || -> Result<_, Failure> {
        // A failed description is retried here, where the error reaches the reports.
        let mut config = machine.as_ref().map_or_else(|_| args.machine(), |machine| Ok(machine.clone()))?;
        let session = command.prepare(&mut config)?;
        args.debug.settle(&mut config);
        config.validate().map_err(usage)?;
        Ok((config, session))
    };
    if args.print_config {
        return print(format!("{}\n", serde_json::to_string_pretty(&prepare()?.0)?).as_bytes());
    }
    let kernel = machine.as_ref().map(|machine| machine.boot.kernel.clone()).unwrap_or_default();
    let named = args.named(kernel);
    log.init_with(named, args.watch.attempts() > 1)?;
    let attempt = |options, early: &Early| {
        let (config, session) = prepare()?;
        let signals = Signals::new(&[&SIGNALS[..], &COMMAND_SIGNALS].concat())?;
        let options =
            RunOptions { signals: Some(signals), cooked: !session.terminal(), errand: Some(exec::ERRAND), ..options };
        boot(config, options, early, &args.debug, Some((session, &args.command)))
    };
    supervise(&args.watch, &command.title(), start, attempt, |ended| {
        if !is_known(&ended.outcome) {
            args.watch.tell(ended);
        }
    })
}

/// Returns whether the caller knows this outcome without a message: the command's own end or, as with shells, an
/// interrupt by the user (SIGINT) or a closed reader of its output (SIGPIPE).
fn is_known(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Exited(_) | Outcome::Signalled(libc::SIGINT | libc::SIGPIPE))
}
