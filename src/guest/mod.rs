//! Code that runs inside the guest: vireo itself, as the init that `vireo exec` boots into.
//!
//! ```text
//! mounts ─▶ modules ─▶ console ports ─▶ root file system ─▶ command ─▶ its streams, signals ─▶ its end ─▶ power off
//! ```
//!
//! It is the same binary, packed into the initramfs as `/init`, so it needs nothing from the guest. Every failure is
//! reported as a sentence on the control port; before that port exists, on the kernel's console.

pub mod protocol;

mod command;
mod files;
mod names;
mod net;
mod ports;

use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::path::Path;

use protocol::{LOG_NAME, MODULES, REQUEST, Report, Request, Root};

/// Error: the guest could not be prepared.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("cannot {0} in the guest: {1}")]
    System(String, #[source] io::Error),
    #[error("{0}")]
    Other(String),
}

type Result<T> = std::result::Result<T, Error>;

/// Returns a function for `map_err` that names what failed.
fn cannot<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Error {
    move |e| Error::System(what.into(), e.into())
}

/// Returns whether this process is the first one of a guest that `vireo exec` created.
pub fn is_init() -> bool {
    std::process::id() == 1 && Path::new(REQUEST).exists()
}

/// Runs the guest. Does not return: when the first process ends, the kernel panics.
pub fn main() -> ! {
    if let Err(error) = run() {
        tell_kernel(&error.to_string());
    }
    rustix::fs::sync();
    loop {
        let _ = rustix::system::reboot(rustix::system::RebootCommand::PowerOff);
        std::thread::sleep(std::time::Duration::from_secs(1));
    }
}

/// Writes a message to the kernel's log. vireo looks there for the reason when no report arrived.
fn tell_kernel(text: &str) {
    let text = format!("<3>{LOG_NAME}{text}\n");
    let _ = fs::write("/dev/kmsg", &text).or_else(|_| io::stderr().write_all(text.as_bytes()));
}

fn run() -> Result<()> {
    files::kernel_mounts()?;
    let request = fs::read(REQUEST).map_err(cannot(format!("read {REQUEST}")))?;
    let request: Request = serde_json::from_slice(&request).map_err(|e| Error::Other(format!("{REQUEST}: {e}")))?;
    let unloaded = load_modules()?;
    let mut control = ports::Control::open().map_err(|error| match unloaded {
        Some(why) => Error::Other(format!("{error}; {why}")),
        None => error,
    })?;
    // From here on, errors can be reported to the host.
    let prepared = prepare(&request);
    let report = prepared.and_then(|names| command::run(&request, &names, &mut control));
    let report = report.unwrap_or_else(|error| Report::NotReady(error.to_string()));
    // Data written to disks must be on them before the host learns of the end.
    rustix::fs::sync();
    control.send(&report)?;
    control.wait_for_end();
    Ok(())
}

/// Loads the modules that this kernel needs, as found by the host. Returns the error of the first module that does not
/// load instead of failing: the module may be optional, and the lack of a required one shows soon enough.
fn load_modules() -> Result<Option<String>> {
    let Ok(list) = fs::read_to_string(MODULES) else { return Ok(None) };
    let mut unloaded = None;
    for path in list.lines() {
        let file = fs::File::open(path).map_err(cannot(format!("open the module {path}")))?;
        match rustix::system::finit_module(&file, c"", 0) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(e) => {
                let hint = if e == rustix::io::Errno::NOEXEC { " (made for another kernel)" } else { "" };
                let why = format!("cannot load the module {path}: {}{hint}", io::Error::from(e));
                tell_kernel(&why);
                unloaded.get_or_insert(why);
            }
        }
    }
    Ok(unloaded)
}

/// Prepares the guest for the command; returns the file systems on which the host may change names.
fn prepare(request: &Request) -> Result<names::Names> {
    let _ = rustix::system::sethostname(b"vireo");
    net::loopback()?;
    let mut name_servers = if request.network { net::configure()? } else { Vec::new() };
    if name_servers.is_empty() {
        name_servers.extend(request.name_server);
    }
    let names = match request.root {
        Root::Initramfs => names::Names::default(),
        Root::Share { .. } | Root::Disk { .. } => files::enter_root(&request.root)?,
    };
    files::guest_mounts()?;
    if !name_servers.is_empty() {
        files::name_servers(&name_servers)?;
    }
    request.mounts.iter().try_for_each(files::mount_share)?;
    let places: Vec<OsString> = request.modules.iter().cloned().map(Into::into).collect();
    files::show_modules(&places)?;
    Ok(names)
}
