//! What runs inside the guest: vireo itself, as the init that `vireo exec` boots into.
//!
//! ```text
//! mounts ─▶ modules ─▶ ports of the console ─▶ root file system ─▶ command ─▶ its streams, signals ─▶ its end ─▶ off
//! ```
//!
//! It is the same binary, packed into the initramfs as `/init`, so it needs nothing of the guest's. Whatever goes wrong is
//! reported as a sentence on the control port; before there is one, on the kernel's console.

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

/// The guest could not be made ready.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("cannot {0} in the guest: {1}")]
    System(String, #[source] io::Error),
    #[error("{0}")]
    Other(String),
}

type Result<T> = std::result::Result<T, Error>;

/// For `map_err`: names what could not be done.
fn cannot<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Error {
    move |e| Error::System(what.into(), e.into())
}

/// Whether this process is the first of a guest that `vireo exec` made.
pub fn is_init() -> bool {
    std::process::id() == 1 && Path::new(REQUEST).exists()
}

/// The life of a guest. Does not return: when the first process ends, the kernel panics.
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

/// The console's log is where such a sentence is looked for, when there is no other way to tell it.
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
    // From here on there is somebody to tell.
    let prepared = prepare(&request);
    let report = prepared.and_then(|names| command::run(&request, &names, &mut control));
    let report = report.unwrap_or_else(|error| Report::NotReady(error.to_string()));
    // What was written to disks is on them when the host hears of the end.
    rustix::fs::sync();
    control.send(&report)?;
    control.wait_for_end();
    Ok(())
}

/// Loads what the host found that this kernel needs. Gives the first that would not load: one that another only likes to
/// have; what is really missing is missed soon enough.
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

/// Makes everything ready for the command; returns the file systems whose names the host may change.
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
