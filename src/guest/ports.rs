//! Ports of the virtio console through which the guest's init communicates with the host.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::protocol::{CONTROL, LINE_MAX, Order, Report};
use super::{Error, Result, cannot};

/// Time that the driver may take to find its ports.
const PATIENCE: Duration = Duration::from_secs(10);
/// Directory that exists once the driver is loaded.
const CLASS: &str = "/sys/class/virtio-ports";
/// Time that the host may take to end a guest that has sent its last report.
const END: Duration = Duration::from_secs(5);

/// Opens a port by its name, waiting until the driver has found it. With `wait` false, reads and writes do not block.
pub(super) fn open(name: &str, wait: bool) -> Result<File> {
    let deadline = Instant::now() + PATIENCE;
    let mut pause = Duration::from_micros(200);
    let device = loop {
        if let Some(device) = find(name) {
            break device;
        }
        let driver = Path::new(CLASS).exists();
        if !driver || Instant::now() > deadline {
            let is_empty = |dir| fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_none());
            let why = match driver {
                false => "it has no driver for virtio consoles (virtio_console)",
                true if is_empty("/sys/bus/virtio/devices") => "it has no driver for virtio devices (virtio_mmio)",
                true => "its virtio console has no such port",
            };
            return Err(Error::Other(format!("the guest does not see the port {name}: {why}")));
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    };
    let flags = libc::O_CLOEXEC | if wait { 0 } else { libc::O_NONBLOCK };
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(flags);
    options.open(&device).map_err(cannot(format!("open the port {name}")))
}

fn find(name: &str) -> Option<String> {
    let ports = fs::read_dir(CLASS).ok()?;
    let mut ports = ports.flatten();
    let port = ports.find(|port| fs::read_to_string(port.path().join("name")).is_ok_and(|text| text.trim() == name))?;
    Some(format!("/dev/{}", port.file_name().to_string_lossy()))
}

/// Port for orders and reports.
pub(super) struct Control(File);

impl Control {
    pub(super) fn open() -> Result<Self> {
        Ok(Control(open(CONTROL, true)?))
    }

    pub(super) fn send(&mut self, report: &Report) -> Result<()> {
        let line = serde_json::to_string(report).map_err(|e| Error::Other(e.to_string()))? + "\n";
        self.0.write_all(line.as_bytes()).map_err(cannot("report to the host"))
    }

    /// Handles orders, in a separate thread.
    pub(super) fn listen(&self, obey: impl Fn(Order) + Send + 'static) -> Result<()> {
        let mut orders = BufReader::new(self.0.try_clone().map_err(cannot("copy a descriptor"))?);
        let listen = move || {
            let mut line = String::new();
            while orders.by_ref().take(LINE_MAX as u64).read_line(&mut line).is_ok_and(|len| len > 0) {
                if let Ok(order) = serde_json::from_str(&line) {
                    obey(order);
                }
                line.clear();
            }
        };
        thread::Builder::new().spawn(listen).map(drop).map_err(cannot("start a thread"))
    }

    /// Waits for the host to end the guest after the last report; if the host does not, the guest ends itself.
    pub(super) fn wait_for_end(&self) {
        thread::sleep(END);
    }
}
