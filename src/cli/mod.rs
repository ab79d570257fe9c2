//! The command line: clap types, one file per sub-command. The only place that knows a flag.

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

/// A failure of vireo itself: its chain of causes is printed once, by [`main`].
pub type Failure = Box<dyn Error + Send + Sync>;

/// A KVM virtual machine monitor that boots stock Linux kernels and tells exactly how they ended.
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

Exit status: 0 the guest powered off, rebooted or halted; 2 wrong usage; 70 its kernel panicked; 71 it crashed; \
72 it hung; 73 its console showed what it must not, or not what was expected; 124 time limit; 125 vireo or the host failed; 128+N stopped by signal N.";

/// Where vireo's own messages go.
#[derive(Args)]
pub struct LogArgs {
    /// How much vireo tells of itself [default: warn, or RUST_LOG]
    #[arg(long, global = true, display_order = 900, value_name = "LEVEL", value_parser = ["off", "error", "warn", "info", "debug", "trace"])]
    log_level: Option<String>,
    /// Append vireo's own messages to a file rather than print them on stderr
    #[arg(long, global = true, display_order = 901, value_name = "FILE")]
    log_file: Option<PathBuf>,
}

impl LogArgs {
    fn init(&self) -> Result<(), Failure> {
        logging::init(self.log_level.as_deref(), self.log_file.as_deref())
    }

    /// Checks and keeps the files of a run, and only then begins the log, which is one of them; `again` says whether the
    /// guest may be started again.
    fn init_with(&self, mut named: NamedFiles, again: bool) -> Result<(), Failure> {
        named.add_some("--log-file", self.log_file.as_deref(), Use::Live);
        named.settle(again).map_err(usage)?;
        self.init()?;
        named.warn(again);
        Ok(())
    }
}

#[derive(Subcommand)]
enum Command {
    /// Boot a kernel and wait for its end
    Run(Box<run::RunArgs>),
    /// Run a command under a kernel, with this host's files, and exit with its code
    Exec(Box<exec::ExecArgs>),
    /// Check what this host's KVM is good for
    Doctor(doctor::DoctorArgs),
    /// Print completions for a shell
    #[command(after_help = "Example:\n  vireo completions bash > /etc/bash_completion.d/vireo")]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page
    #[command(after_help = "Example:\n  vireo man | man -l -")]
    Man,
}

/// What the user asks for cannot be, whatever the host.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
struct Usage(Failure);

/// What the user asked for cannot be.
fn usage(error: impl Error + Send + Sync + 'static) -> Failure {
    Usage(error.into()).into()
}

/// Runs the command line. `start` is when the process started.
pub fn main(start: Instant) -> ExitCode {
    if guest::is_init() {
        guest::main();
    }
    if keep::is_keeper() {
        keep::main();
    }
    fault::install();
    let cli = Cli::try_parse().unwrap_or_else(|error| with_commands(error).exit());
    // A matrix runs no guest itself, and what it starts would lose the capabilities of vireo's own file.
    if !matches!(&cli.command, Command::Exec(args) if args.is_matrix()) {
        crate::privileges::give_up();
    }
    let log = cli.log;
    let result = match cli.command {
        // They know first which files a log must not be.
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

/// What the process's exit status is when it failed.
fn exit_code(failure: &Failure) -> u8 {
    if failure.is::<Usage>() { EXIT_USAGE } else { EXIT_VIREO_FAILED }
}

/// `vireo exec` as clap knows it, with the flags that every command has.
fn exec_command() -> clap::Command {
    let mut cli = Cli::command();
    cli.build();
    let exec = cli.find_subcommand("exec").cloned();
    exec.unwrap_or_default()
}

/// What clap found in our own command line behind the command.
fn matches_of_command() -> clap::ArgMatches {
    Cli::command().get_matches().remove_subcommand().map_or_else(Default::default, |(_, matches)| matches)
}

/// Who mistypes a command so much that clap cannot guess it is told what there is.
fn with_commands(mut error: clap::Error) -> clap::Error {
    if error.kind() == ErrorKind::InvalidSubcommand && error.get(ContextKind::SuggestedSubcommand).is_none() {
        let names: Vec<_> = Cli::command().get_subcommands().map(|sub| sub.get_name().to_string()).collect();
        let tip = format!("the commands are {}", names.join(", ")).into();
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![tip]));
    }
    error
}

/// Commands that help: for a host whose KVM cannot be used, for a limit that was reached.
fn remedy(failure: &(dyn Error + 'static)) -> String {
    // Not every type on the way shows its cause as such, but its text has the number.
    let text = chain(failure);
    if [libc::EMFILE, libc::ENFILE].iter().any(|errno| text.contains(&format!("(os error {errno})"))) {
        return "; raise the limit of open files: ulimit -n 4096".into();
    }
    if let Some(machine::Error::Kvm(error)) = failure.downcast_ref() {
        return format!("; to mend it: {}", device::remedy(error, &HostFacts::read()));
    }
    container::hint(&text).into()
}

/// `outer: inner: OS error`.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let _ = write!(text, ": {cause}");
        source = cause.source();
    }
    text
}

/// What a flag says goes before what was there.
fn set<T: Clone>(target: &mut T, flag: &Option<T>) {
    if let Some(value) = flag {
        *target = value.clone();
    }
}

/// Prints one line of vireo's on stderr; a stderr that is gone is no reason to fail.
fn say(text: &str) {
    let _ = writeln!(io::stderr(), "vireo: {}", printable::message(text));
}

/// Prints what the user asked for on stdout.
fn print(bytes: &[u8]) -> Result<u8, Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        // Who reads only the beginning, like `head`, has what it wanted.
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
