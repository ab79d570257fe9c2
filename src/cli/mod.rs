//! The command line: clap types, one file per subcommand. No other module knows a flag.

mod container;
mod debug;
pub mod devices;
pub mod doctor;
mod early;
pub mod exec;
mod fault;
mod junit;
mod launch;
mod logging;
mod matrix;
mod named;
mod report;
pub mod run;
pub mod watch;

use std::error::Error;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Args, CommandFactory, Parser, Subcommand};

use self::named::{NamedFiles, Use};
use crate::boot::keep;
use crate::doctor::device::{self, HostFacts};
use crate::outcome::{EXIT_USAGE, EXIT_VIREO_FAILED};
use crate::{guest, machine, printable};

/// Failure of vireo itself. [`main`] prints its chain of causes once.
pub type Failure = Box<dyn Error + Send + Sync>;

/// A KVM virtual machine monitor that boots stock Linux kernels and reports exactly how they ended.
#[derive(Parser)]
#[command(name = "vireo", version = VERSION, propagate_version = true, after_help = AFTER_HELP)]
struct Cli {
    #[command(flatten)]
    log: LogArgs,
    #[command(subcommand)]
    command: Command,
}

const VERSION: &str = concat!(
    env!("CARGO_PKG_VERSION"),
    " (commit ",
    env!("VIREO_COMMIT"),
    ", ",
    env!("VIREO_PROFILE"),
    " build for ",
    env!("VIREO_TARGET"),
    ")"
);

const AFTER_HELP: &str = "\
Example:
  vireo exec -- uname -r
  vireo run --kernel /boot/vmlinuz --initrd initrd.img

Exit status: 0 the guest powered off, rebooted or halted; 2 wrong usage; 70 the guest kernel panicked; 71 the guest \
crashed; 72 the guest hung; 73 its console matched --fail-on, or never matched --expect; 124 time limit reached; \
125 vireo or the host failed; 128+N stopped by signal N.";

/// Flags about vireo's own messages.
#[derive(Args)]
pub struct LogArgs {
    /// Log level of vireo's own messages [default: warn, or RUST_LOG]
    #[arg(long, global = true, display_order = 900, value_name = "LEVEL", value_parser = ["off", "error", "warn", "info", "debug", "trace"])]
    log_level: Option<String>,
    /// Append vireo's own messages to a file instead of printing them on stderr
    #[arg(long, global = true, display_order = 901, value_name = "FILE")]
    log_file: Option<PathBuf>,
}

impl LogArgs {
    fn init(&self) -> Result<(), Failure> {
        logging::init(self.log_level.as_deref(), self.log_file.as_deref())
    }

    /// Adds the file that the flags name.
    fn add_to(&self, named: &mut NamedFiles) {
        named.add_some("--log-file", self.log_file.as_deref(), Use::Log);
    }

    /// Checks and keeps the files of a run and then starts the log. The log comes last because its file is one of those
    /// that are checked. `again`: the guest may be restarted.
    fn init_with(&self, mut named: NamedFiles, again: bool) -> Result<(), Failure> {
        self.add_to(&mut named);
        named.settle(again).map_err(usage)?;
        self.init()?;
        named.warn(again);
        Ok(())
    }
}

#[derive(Subcommand)]
enum Command {
    /// Boot a kernel and wait until the guest ends
    Run(Box<run::RunArgs>),
    /// Run a command under a kernel, with this host's files, and exit with its exit code
    Exec(Box<exec::ExecArgs>),
    /// Check whether this host can run guests
    Doctor(doctor::DoctorArgs),
    /// Print completions for a shell
    #[command(after_help = "Example:\n  vireo completions bash > /etc/bash_completion.d/vireo")]
    Completions {
        /// Shell to print completions for
        shell: clap_complete::Shell,
    },
    /// Print the manual page
    #[command(after_help = "Example:\n  vireo man | man -l -")]
    Man,
}

/// Request that no host can satisfy: wrong usage.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
struct Usage(Failure);

/// Wraps an error as wrong usage.
fn usage(error: impl Error + Send + Sync + 'static) -> Failure {
    Usage(error.into()).into()
}

/// Runs the command line. `start` is the time at which the process started.
pub fn main(start: Instant) -> ExitCode {
    if guest::is_init() {
        guest::main();
    }
    if keep::is_keeper() {
        keep::main();
    }
    fault::install();
    let cli = Cli::try_parse().unwrap_or_else(|error| with_commands(error).exit());
    // A matrix runs no guest itself, and the vireos that it starts would lose the file capabilities of the executable.
    if !matches!(&cli.command, Command::Exec(args) if args.is_matrix()) {
        crate::privileges::give_up();
    }
    let log = cli.log;
    let result = match cli.command {
        // These two open the log themselves, after checking that its file is not one of the guest's.
        Command::Run(args) => run::run(*args, &log, start),
        Command::Exec(args) => exec::run(*args, &log, start),
        command => log.init().and_then(|()| match command {
            Command::Doctor(args) => doctor::run(&args),
            Command::Completions { shell } => completions(shell),
            _ => manual(),
        }),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            say(&format!("{}{}", chain(&*failure), remedy(&*failure)));
            ExitCode::from(exit_code(&failure))
        }
    }
}

/// Returns the exit status of a vireo that failed.
fn exit_code(failure: &Failure) -> u8 {
    if failure.is::<Usage>() { EXIT_USAGE } else { EXIT_VIREO_FAILED }
}

/// Returns clap's definition of `vireo exec`, including the global flags.
fn exec_command() -> clap::Command {
    let mut cli = Cli::command();
    cli.build();
    let exec = cli.find_subcommand("exec").cloned();
    exec.unwrap_or_default()
}

/// Returns clap's matches for the subcommand of vireo's own command line.
fn matches_of_command() -> clap::ArgMatches {
    Cli::command().get_matches().remove_subcommand().map_or_else(Default::default, |(_, matches)| matches)
}

/// Lists the commands when the user mistyped one so badly that clap has no suggestion.
fn with_commands(mut error: clap::Error) -> clap::Error {
    if error.kind() == ErrorKind::InvalidSubcommand && error.get(ContextKind::SuggestedSubcommand).is_none() {
        let names: Vec<_> = Cli::command().get_subcommands().map(|sub| sub.get_name().to_string()).collect();
        let tip = format!("the commands are {}", names.join(", ")).into();
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![tip]));
    }
    error
}

/// Returns commands that fix the failure, for a host whose KVM is unusable or for a limit that was reached.
fn remedy(failure: &(dyn Error + 'static)) -> String {
    // Some error types do not expose their cause as a source, but their text contains the error number.
    let text = chain(failure);
    if [libc::EMFILE, libc::ENFILE].iter().any(|errno| text.contains(&format!("(os error {errno})"))) {
        return "; raise the limit of open files: ulimit -n 4096".into();
    }
    if let Some(machine::Error::Kvm(error)) = failure.downcast_ref() {
        return format!("; to fix this: {}", device::remedy(error, &HostFacts::read()));
    }
    container::hint(&text).into()
}

/// Returns `outer: inner: OS error`.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let _ = write!(text, ": {cause}");
        source = cause.source();
    }
    text
}

/// Overrides `target` with the flag's value, if the flag was given.
fn set<T: Clone>(target: &mut T, flag: &Option<T>) {
    if let Some(value) = flag {
        *target = value.clone();
    }
}

/// Prints one of vireo's own lines on stderr. A closed stderr is not a failure.
fn say(text: &str) {
    let _ = writeln!(io::stderr(), "vireo: {}", printable::message(text));
}

/// Prints the requested text on stdout.
fn print(bytes: &[u8]) -> Result<u8, Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        // A reader like `head` may close early; that is not an error.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(0),
        Err(e) => Err(StdoutError(e).into()),
        Ok(()) => Ok(0),
    }
}

#[derive(Debug, thiserror::Error)]
#[error("cannot write to stdout")]
struct StdoutError(#[source] io::Error);

fn completions(shell: clap_complete::Shell) -> Result<u8, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "vireo", &mut script);
    print(&script)
}

fn manual() -> Result<u8, Failure> {
    let mut page = Vec::new();
    let mut command = Cli::command();
    command.build();
    clap_mangen::Man::new(command.clone()).render(&mut page)?;
    for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
        clap_mangen::Man::new(sub.clone()).render(&mut page)?;
    }
    print(&page)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_an_example() {
        for sub in Cli::command().get_subcommands() {
            let help = sub.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("Example"), "{}", sub.get_name());
        }
    }

    #[test]
    fn a_limit_of_open_files_is_named() {
        let cause = io::Error::from_raw_os_error(libc::EMFILE);
        assert_eq!(
            remedy(&machine::Error::Host("an eventfd", cause)),
            "; raise the limit of open files: ulimit -n 4096"
        );
        let other = io::Error::from_raw_os_error(libc::EACCES);
        assert_eq!(remedy(&machine::Error::Host("an eventfd", other)), "");
    }

    #[test]
    fn causes_are_chained_once() {
        let cause = io::Error::from_raw_os_error(libc::ENOENT);
        let error = crate::memory::Error::MapFile(cause);
        assert_eq!(chain(&error), "cannot map a file into guest memory: No such file or directory (os error 2)");
    }
}
