//! `vireo exec --matrix FILE`: one command under several kernels and configurations, several at a time.
//!
//! ```text
//! jobs = 2                      # simultaneous runs
//! command = ["make", "check"]   # unless the command line has one
//! timeout = "5m"                # any flag of exec, for all runs
//! [kernels.stable]              # each kernel ...
//! kernel = "/boot/vmlinuz-6.1"
//! [configs.smp]                 # ... with each configuration
//! cpus = 4
//! ```
//!
//! Keys are exec's own flags, so there is nothing else to learn and neither can do something that the other cannot.
//! Each run is a separate vireo process with a command line built from the file and cannot harm the others. Paths in
//! the file are relative to the file's folder.

mod done;
mod files;
mod output;
mod paths;

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::ArgAction;
use clap::parser::ValueSource;
use serde::Deserialize;
use serde_json::Value as Json;
use toml::Value;

use self::done::{Done, table};
use self::output::{Log, Output, RunReport};
use super::report::{FileError, Reports};
use super::{Failure, LogArgs, fault, print, say, usage};
use crate::child;
use crate::event::{Interest, Poller, Signals};
use crate::outcome::EXIT_VIREO_FAILED;
use crate::terminal;

/// Flags that apply to all runs together.
const OURS: [&str; 6] = ["matrix", "jobs", "output_dir", "report", "junit", "command"];
/// Flags that two runs cannot have with the same value: one run would take the named file or address from the other.
const OF_ONE: [&str; 3] = ["console-log", "vmcore", "gdb"];
/// Update interval of the progress line on a terminal.
const TICK: Duration = Duration::from_secs(1);

/// Poll key of the first run's output; run N has `OUTPUT + N`.
const OUTPUT: u64 = 1;
const SIGNAL: u64 = 0;

/// Contents of the file; all remaining keys are flags.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Matrix {
    jobs: Option<usize>,
    command: Vec<String>,
    kernels: BTreeMap<String, Flags>,
    configs: BTreeMap<String, Flags>,
    #[serde(flatten)]
    flags: Flags,
}

type Flags = BTreeMap<String, Value>;

/// Values given on the command line beside the matrix.
pub(super) struct Given {
    /// Path of the matrix file.
    pub matrix: PathBuf,
    /// Number of simultaneous runs.
    pub jobs: Option<usize>,
    /// Folder for the output of the runs.
    pub output_dir: Option<PathBuf>,
    /// Path of the report for programs.
    pub report: Option<PathBuf>,
    /// Path of the report for CI systems.
    pub junit: Option<PathBuf>,
    /// Command and its arguments.
    pub command: Vec<OsString>,
    /// Flags for all runs, which override those of the file.
    pub flags: Words,
}

/// Values of each flag; the list is empty for a flag without a value.
type Words = BTreeMap<String, Vec<OsString>>;

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("{} is not a valid matrix file", .0.display())]
    Parse(PathBuf, #[source] Box<toml::de::Error>),
    #[error("{}: {run}: {why}", path.display())]
    Flags { path: PathBuf, run: String, why: String },
    #[error("{}: '{}' is not a valid name for a kernel or configuration: it is empty, begins with a dot, or has a \
             slash or a control character", .0.display(), .1.escape_default())]
    Name(PathBuf, String),
    #[error("{}: no command: give one after --, or command = [\"...\"]", .0.display())]
    NoCommand(PathBuf),
    #[error("{}: --{flag} of {} and of {} is the same; give each its own under [kernels.NAME] or [configs.NAME]",
            path.display(), runs[0], runs[1])]
    Shared { path: PathBuf, flag: &'static str, runs: [String; 2] },
    #[error("cannot start vireo for a run")]
    Start(#[source] io::Error),
    #[error("cannot wait for the run's vireo")]
    Wait(#[source] io::Error),
}

/// One run of the matrix.
struct Run {
    name: String,
    words: Vec<OsString>,
}

struct Running {
    run: usize,
    child: Child,
    begin: Instant,
    log: Log,
    report: RunReport,
}

impl Running {
    /// Returns the result of a run whose vireo has ended. Output or a report that could not be written makes it a failure.
    fn ended(mut self, run: &Run, status: ExitStatus) -> Done {
        let kept = self.log.take_rest();
        let (bytes, kept_report) = self.report.take();
        let report: Json = serde_json::from_slice(&bytes).unwrap_or_default();
        let text = |key: &str| report[key].as_str().map(str::to_string);
        let killed = status.signal().map(|signal| format!("vireo was killed by signal {signal}"));
        let end = match kept.and(kept_report) {
            Err(e) => Done::failed(run, &Failure::from(e)),
            Ok(()) => Done {
                exit_code: status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(EXIT_VIREO_FAILED),
                outcome: text("outcome").unwrap_or_else(|| "failed".into()),
                ..Done::new(run, killed.or(text("detail")).unwrap_or_else(|| "vireo failed".into()))
            },
        };
        Done { duration: self.begin.elapsed().as_secs_f64(), output: self.log.tail(), report, ..end }
    }
}

/// Returns the runs that a file describes, in the order of their names.
fn runs(given: &Given, matrix: &Matrix, exec: &clap::Command) -> Result<Vec<Run>, Error> {
    let command: Vec<OsString> = match given.command.is_empty() {
        true => matrix.command.iter().map(OsString::from).collect(),
        false => given.command.clone(),
    };
    let nothing = BTreeMap::from([(String::new(), Flags::new())]);
    let [kernels, configs] =
        [&matrix.kernels, &matrix.configs].map(|axis| if axis.is_empty() { &nothing } else { axis });
    if command.is_empty() {
        return Err(Error::NoCommand(given.matrix.clone()));
    }
    // The names become file names.
    let wrong = |name: &&String| {
        name.is_empty() || name.starts_with('.') || name.contains(|c: char| c == '/' || c.is_control())
    };
    if let Some(name) = matrix.kernels.keys().chain(matrix.configs.keys()).find(wrong) {
        return Err(Error::Name(given.matrix.clone(), name.clone()));
    }
    let mut runs = Vec::new();
    for (kernel, kernel_flags) in kernels {
        for (config, config_flags) in configs {
            let name = [kernel.as_str(), config].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>();
            let name = if name.is_empty() { "run".into() } else { name.join("/") };
            let words = words(given, &[&matrix.flags, kernel_flags, config_flags], exec);
            let mut words = words.map_err(|why| Error::Flags { path: given.matrix.clone(), run: name.clone(), why })?;
            words.push("--".into());
            words.extend_from_slice(&command);
            runs.push(Run { name, words });
        }
    }
    for flag in OF_ONE {
        let is_flag = |word: &&OsString| word.as_encoded_bytes().starts_with(format!("--{flag}=").as_bytes());
        let mut seen = BTreeMap::new();
        for run in &runs {
            let flags = run.words.iter().take_while(|word| *word != "--");
            if let Some(other) = flags.filter(is_flag).find_map(|word| seen.insert(word, &run.name)) {
                let runs = [other.clone(), run.name.clone()];
                return Err(Error::Shared { path: given.matrix.clone(), flag, runs });
            }
        }
    }
    Ok(runs)
}

/// Returns the flags of a run as exec understands them; the error is a sentence.
fn words(given: &Given, flags: &[&Flags], exec: &clap::Command) -> Result<Vec<OsString>, String> {
    let mut words = Words::new();
    let folder = given.matrix.parent().unwrap_or_else(|| Path::new(""));
    for (key, value) in flags.iter().copied().flatten() {
        if OURS.contains(&key.replace('-', "_").as_str()) {
            return Err(format!("'{key}' applies to all runs together: give it on the command line"));
        }
        let wrong = || format!("{key} must be text, a number, true or false, or a list of these");
        let values = values(value).ok_or_else(wrong)?;
        let located = |word: OsString| paths::located(key, &word.to_string_lossy(), folder).into();
        merge(&mut words, exec, key, values.map(|words| words.into_iter().map(located).collect()));
    }
    for (key, values) in &given.flags {
        merge(&mut words, exec, key, Some(values.clone()));
    }
    let words = command_line(words);
    match exec.clone().no_binary_name(true).try_get_matches_from(&words) {
        Ok(_) => Ok(words),
        Err(e) => Err(e.to_string().lines().next().unwrap_or_default().trim_start_matches("error: ").into()),
    }
}

/// Converts a value of the file to words; `Some(None)` means that the flag is not given.
#[allow(clippy::option_option)]
fn values(value: &Value) -> Option<Option<Vec<OsString>>> {
    let word = |value: &Value| match value {
        Value::String(text) => Some(OsString::from(text)),
        Value::Integer(n) => Some(n.to_string().into()),
        Value::Float(n) => Some(n.to_string().into()),
        _ => None,
    };
    match value {
        Value::Boolean(true) => Some(Some(Vec::new())),
        Value::Boolean(false) => Some(None),
        Value::Array(list) => list.iter().map(word).collect::<Option<Vec<_>>>().map(Some),
        value => word(value).map(|word| Some(vec![word])),
    }
}

/// Merges values into the flags: repeatable flags accumulate, others are replaced.
fn merge(words: &mut Words, exec: &clap::Command, key: &str, values: Option<Vec<OsString>>) {
    let list = exec.get_arguments().find(|arg| arg.get_long() == Some(key));
    let gathers = list.is_some_and(|arg| matches!(arg.get_action(), ArgAction::Append));
    match values {
        None => _ = words.remove(key),
        Some(values) if gathers => words.entry(key.into()).or_default().extend(values),
        Some(values) => _ = words.insert(key.into(), values),
    }
}

fn command_line(words: Words) -> Vec<OsString> {
    let mut line = Vec::new();
    for (key, values) in words {
        if values.is_empty() {
            line.push(format!("--{key}").into());
        }
        for value in values {
            let mut word = OsString::from(format!("--{key}="));
            word.push(value);
            line.push(word);
        }
    }
    line
}

/// Returns the flags that the user gave, except those that apply to all runs together.
pub(super) fn given_flags(exec: &clap::Command, matches: &clap::ArgMatches) -> Words {
    let mut words = Words::new();
    for arg in exec.get_arguments() {
        let id = arg.get_id().as_str();
        let given = matches.try_contains_id(id).is_ok() && matches.value_source(id) == Some(ValueSource::CommandLine);
        let Some(long) = arg.get_long().filter(|_| given && !OURS.contains(&id)) else { continue };
        let values = match arg.get_action() {
            ArgAction::SetTrue => Vec::new(),
            _ => matches.get_raw(id).map(|values| values.map(Into::into).collect()).unwrap_or_default(),
        };
        words.insert(long.into(), values);
    }
    words
}

/// Runs all of them and reports how they ended. The exit status is that of the first one that failed, in the table's
/// order.
pub(super) fn run(given: &Given, exec: &clap::Command, log: &LogArgs) -> Result<u8, Failure> {
    let path = &given.matrix;
    let text = fs::read_to_string(path).map_err(|e| FileError::Read(path.clone(), e))?;
    let matrix: Matrix = toml::from_str(&text).map_err(|e| usage(Error::Parse(path.clone(), e.into())))?;
    let runs = runs(given, &matrix, exec).map_err(usage)?;
    let named = files::named(given, &runs, exec);
    let folders = named.writable().to_vec();
    log.init_with(named, false)?;
    let reports = Arc::new(Reports::new(given.report.as_deref(), given.junit.as_deref())?);
    let of_fault = reports.clone();
    fault::reports(move |sentence| _ = of_fault.write_failure("matrix", &sentence.into()));
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let jobs = given.jobs.or(matrix.jobs).unwrap_or(cpus).max(1);
    let ran = || -> Result<_, Failure> {
        let output = Output::new(given.output_dir.as_deref())?;
        Ok(Progress::new(&runs, jobs, &output, &folders)?.run_all())
    };
    let (done, signal) = ran().inspect_err(|failure| reports.tell_failure("matrix", failure))?;
    let failed = done.iter().find(|done| done.exit_code != 0);
    let code = signal.map_or(failed.map_or(0, |done| done.exit_code), |signal| 128 + signal as u8);
    let json = reports.write_json(&serde_json::json!({ "exit_code": code, "runs": done }));
    let junit = reports.write_junit(&done.iter().map(Done::case).collect::<Vec<_>>());
    // A report that cannot be written does not prevent the others.
    let printed = print(table(&done).as_bytes());
    json.and(junit).and(printed)?;
    Ok(code)
}

/// State of the runs while they are in progress.
struct Progress<'a> {
    runs: &'a [Run],
    jobs: usize,
    output: &'a Output,
    /// Folders that the guest of any run writes to. Links there are planted for the other runs, too.
    folders: &'a [PathBuf],
    poller: Poller,
    signals: Signals,
    next: usize,
    running: Vec<Running>,
    done: Vec<Option<Done>>,
    /// Signal that ends this process, if one arrived.
    stopped: Option<i32>,
    shows: bool,
}

impl<'a> Progress<'a> {
    fn new(runs: &'a [Run], jobs: usize, output: &'a Output, folders: &'a [PathBuf]) -> Result<Self, Failure> {
        let signals = Signals::new(&[libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGCHLD])?;
        let done = runs.iter().map(|_| None).collect();
        let shows = terminal::is_terminal(io::stderr().as_raw_fd());
        let poller = Poller::new()?;
        poller.add(signals.as_raw_fd(), SIGNAL, Interest::Read)?;
        let (next, running, stopped) = (0, Vec::new(), None);
        Ok(Progress { runs, jobs, output, folders, poller, signals, next, running, done, stopped, shows })
    }

    /// Executes all runs. A failure of one run ends only that run; a failure of the matrix itself fails those that have
    /// not ended.
    fn run_all(mut self) -> (Vec<Done>, Option<i32>) {
        let failure = self.run_each().err();
        if failure.is_some() {
            self.stop();
        }
        let unseen = |run: &Run| match &failure {
            Some(failure) => Done::failed(run, failure),
            None => Done { outcome: "not-run".into(), ..Done::new(run, "vireo was stopped before this run".into()) },
        };
        let done = self.runs.iter().zip(self.done).map(|(run, done)| done.unwrap_or_else(|| unseen(run)));
        (done.collect(), self.stopped)
    }

    fn run_each(&mut self) -> Result<(), Failure> {
        loop {
            while self.stopped.is_none() && self.running.len() < self.jobs && self.next < self.runs.len() {
                self.start();
            }
            self.show();
            if self.running.is_empty() {
                return Ok(());
            }
            let ready: Vec<u64> = self.poller.wait(self.shows.then_some(TICK))?.collect();
            for running in self.running.iter_mut().filter(|running| ready.contains(&(OUTPUT + running.run as u64))) {
                if running.log.take().is_none() {
                    self.poller.remove(running.log.from.as_raw_fd())?;
                }
            }
            while let Some(signal) = self.signals.take() {
                if signal != libc::SIGCHLD {
                    self.stopped.get_or_insert(signal);
                    self.stop();
                }
            }
            self.collect();
        }
    }

    fn start(&mut self) {
        let n = self.next;
        self.next += 1;
        match self.spawn(n) {
            Ok(running) => self.running.push(running),
            Err(failure) => self.finish(n, Done::failed(&self.runs[n], &failure)),
        }
    }

    fn spawn(&self, n: usize) -> Result<Running, Failure> {
        let run = &self.runs[n];
        let pipe = || -> io::Result<_> {
            let (reader, writer) = io::pipe()?;
            Ok((reader, writer.try_clone()?, writer))
        };
        let (reader, stdout, stderr) = pipe().map_err(Error::Start)?;
        let log = Log::new(reader, self.output.file(&run.name, "log")?)?;
        let report = RunReport::new(self.output.file(&run.name, "json")?)?;
        self.poller.add(log.from.as_raw_fd(), OUTPUT + n as u64, Interest::Read)?;
        let mut command = Command::new("/proc/self/exe");
        command.arg("exec");
        report.give_to(&mut command);
        let folder =
            |path: &PathBuf| [OsStr::new("--writable-folder="), path.as_os_str()].into_iter().collect::<OsString>();
        command.args(self.folders.iter().map(folder));
        command.args(&run.words);
        command.stdin(Stdio::null()).stdout(stdout).stderr(stderr);
        child::deliver_signals(&mut command);
        child::die_with_us(&mut command);
        let child = command.spawn().map_err(Error::Start)?;
        Ok(Running { run: n, child, begin: Instant::now(), log, report })
    }

    /// Sends SIGTERM to each run. Runs on the terminal have received Ctrl-C themselves.
    fn stop(&self) {
        for running in &self.running {
            let pid = rustix::process::Pid::from_child(&running.child);
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
    }

    fn collect(&mut self) {
        for mut running in std::mem::take(&mut self.running) {
            let n = running.run;
            match running.child.try_wait() {
                Ok(None) => self.running.push(running),
                Ok(Some(status)) => self.finish(n, running.ended(&self.runs[n], status)),
                Err(e) => self.finish(n, Done::failed(&self.runs[n], &Error::Wait(e).into())),
            }
        }
    }

    fn finish(&mut self, run: usize, done: Done) {
        self.clear();
        if done.exit_code != 0 {
            let _ = write!(io::stderr(), "--- {}\n{}", done.name, done.output);
        }
        let (n, all) = (self.done.iter().flatten().count() + 1, self.runs.len());
        say(&format!("[{n}/{all}] {}: {} ({:.1} s)", done.name, done.detail, done.duration));
        self.done[run] = Some(done);
    }

    /// Shows the progress in one line on a terminal, overwriting the previous one.
    fn show(&self) {
        if !self.shows {
            return;
        }
        let (columns, _) = terminal::window_size(io::stderr().as_raw_fd()).unwrap_or((80, 24));
        let name = |r: &Running| format!("{} ({} s)", self.runs[r.run].name, r.begin.elapsed().as_secs());
        let names: Vec<_> = self.running.iter().map(name).collect();
        let line = format!("[{}/{}] {}", self.done.iter().flatten().count(), self.runs.len(), names.join(", "));
        let line: String = line.chars().take(usize::from(columns).saturating_sub(1)).collect();
        self.clear();
        if !self.running.is_empty() {
            let _ = write!(io::stderr(), "{line}");
        }
    }

    fn clear(&self) {
        if self.shows {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::exec_command;

    fn given(flags: &[(&str, &[&str])], command: &[&str]) -> Given {
        let words = |list: &[&str]| list.iter().map(OsString::from).collect::<Vec<_>>();
        Given {
            matrix: "m.toml".into(),
            jobs: None,
            output_dir: None,
            report: None,
            junit: None,
            command: words(command),
            flags: flags.iter().map(|(key, values)| (key.to_string(), words(values))).collect(),
        }
    }

    fn lines_of(given: &Given, text: &str) -> Result<Vec<String>, String> {
        let runs = runs(given, &toml::from_str(text).unwrap(), &exec_command()).map_err(|e| e.to_string())?;
        let line = |run: &Run| {
            let words: Vec<_> = run.words.iter().map(|word| word.to_string_lossy()).collect();
            format!("{}: {}", run.name, words.join(" "))
        };
        Ok(runs.iter().map(line).collect())
    }

    #[test]
    fn every_kernel_with_every_configuration() {
        let text = r#"
jobs = 3
command = ["make", "check"]
timeout = "5m"
share = ["/a"]
rw = true
[kernels.new]
kernel = "bzImage"
timeout = "1m"
[kernels.old]
kernel = "vmlinuz"
[configs.one]
[configs.two]
cpus = 2
share = ["/b", "/c:rw"]
rw = false
"#;
        assert_eq!(
            lines_of(&given(&[], &[]), text).unwrap(),
            [
                "new/one: --kernel=bzImage --rw --share=/a --timeout=1m -- make check",
                "new/two: --cpus=2 --kernel=bzImage --share=/a --share=/b --share=/c:rw --timeout=1m -- make check",
                "old/one: --kernel=vmlinuz --rw --share=/a --timeout=5m -- make check",
                "old/two: --cpus=2 --kernel=vmlinuz --share=/a --share=/b --share=/c:rw --timeout=5m -- make check",
            ]
        );
        let flags: &[(&str, &[&str])] = &[("timeout", &["9s"]), ("share", &["/d"]), ("verbose", &[])];
        assert_eq!(
            lines_of(&given(flags, &["true"]), "[configs.x]\ntimeout='1s'").unwrap(),
            ["x: --share=/d --timeout=9s --verbose -- true"]
        );
        assert_eq!(lines_of(&given(&[], &["true"]), "").unwrap(), ["run: -- true"]);
    }

    #[test]
    fn paths_in_the_file_are_relative_to_it_and_those_given_beside_it_to_us() {
        let given = Given { matrix: "tests/m.toml".into(), ..given(&[("modules", &["mine"])], &["true"]) };
        let text = "disk = ['a.img,overlay=tmp']\nmodules = 'theirs'\n[kernels.k]\nkernel = 'bzImage'";
        assert_eq!(
            lines_of(&given, text).unwrap(),
            ["k: --disk=tests/a.img,overlay=tmp --kernel=tests/bzImage --modules=mine -- true"]
        );
    }

    #[test]
    fn mistakes_are_named() {
        let error = |text: &str| lines_of(&given(&[], &["true"]), text).unwrap_err();
        assert_eq!(error("[kernels.a]\nmemroy = '1G'"), "m.toml: a: unexpected argument '--memroy' found");
        assert!(
            error("cpus = 'many'").starts_with("m.toml: run: invalid value 'many' for '--cpus <N>': "),
            "{}",
            error("cpus = 'many'")
        );
        assert!(
            error("[configs.a]\nmemory = {x = 1}")
                .ends_with("a: memory must be text, a number, true or false, or a list of these")
        );
        assert_eq!(
            error("[configs.a]\n[configs.b]\n[kernels.x]\nvmcore = 'core'"),
            "m.toml: --vmcore of x/a and of x/b is the same; give each its own under [kernels.NAME] or [configs.NAME]"
        );
        assert_eq!(
            lines_of(&given(&[], &[]), "").unwrap_err(),
            "m.toml: no command: give one after --, or command = [\"...\"]"
        );
        assert!(
            error("[configs.'../x']")
                .starts_with("m.toml: '../x' is not a valid name for a kernel or configuration: it is empty")
        );
        assert_eq!(
            error("[configs.a]\nreport = 'x'"),
            "m.toml: a: 'report' applies to all runs together: give it on the command line"
        );
    }

    #[test]
    fn what_is_given_beside_the_matrix_is_for_all() {
        let exec = exec_command();
        let words = [
            "exec",
            "--matrix",
            "m.toml",
            "--jobs=2",
            "-v",
            "--share",
            "a",
            "--share=b",
            "--log-level",
            "off",
            "--rng",
            "--",
            "true",
        ];
        let matches = exec.clone().try_get_matches_from(words).unwrap();
        let flags = given_flags(&exec, &matches);
        assert_eq!(command_line(flags), ["--log-level=off", "--rng=", "--share=a", "--share=b", "--verbose"]);
    }
}
