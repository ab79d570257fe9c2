//! A device's connection to a daemon. It outlives stops of the device, and is opened again if the daemon is restarted.

use std::io;
use std::os::fd::RawFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use log::Level;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use crate::backend::held;
use crate::backend::place::Place;
use crate::backend::vhost::Ring;
use crate::backend::vhost_user::{Error, Frontend};
use crate::event::Interest;
use crate::log_limit::LogLimit;
use crate::memory::GuestRam;
use crate::virtio::queue::Queue;
use crate::virtio::vhost::Server;
use crate::virtio::{Context, Event, Fault, Handler, Interrupt, Progress, Share};

const SOCKET: u64 = 0;
const CHANNEL: u64 = 1;

/// Connection to a daemon, which may end and be restarted.
pub(in crate::virtio) struct Connection {
    /// Location of the socket, resolved once: a new daemon must listen in the same directory.
    place: Place,
    /// Features that the first daemon offered, which the driver has seen.
    features: u64,
    max_queues: Option<u16>,
    frontend: Mutex<Frontend>,
    config: Mutex<Config>,
    log: LogLimit,
}

/// Known part of a daemon's configuration space.
#[derive(Default)]
struct Config {
    bytes: Vec<u8>,
    /// Byte that the driver has set: its offset, original value and current value. A new daemon must be sent it.
    set: Option<(usize, u8, u8)>,
}

impl Config {
    fn put(&mut self, at: usize, byte: u8) {
        self.bytes.iter_mut().skip(at).take(1).for_each(|to| *to = byte);
    }
}

impl Connection {
    /// Connects to the daemon at `path`.
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        let hidden = |source| Error::Connect { path: path.into(), hint: "", source };
        let place = Place::find(path, &held::folders()).map_err(hidden)?;
        let frontend = Frontend::connect(&place)?;
        if frontend.features() & 1 << VIRTIO_F_VERSION_1 == 0 {
            let source = io::Error::new(io::ErrorKind::Unsupported, "it does not support virtio 1.0");
            return Err(Error::Handshake { path: path.into(), source });
        }
        let (features, max_queues) = (frontend.features(), frontend.max_queues());
        let (frontend, config) = (Mutex::new(frontend), Mutex::default());
        Ok(Connection { place, features, max_queues, frontend, config, log: LogLimit::default() })
    }

    /// Returns the ring and device features that the daemon offers.
    pub(in crate::virtio) fn features(&self) -> u64 {
        self.features
    }

    /// Returns the number of rings that the daemon serves, if it reports one.
    pub(super) fn max_queues(&self) -> Option<u16> {
        self.max_queues
    }

    fn frontend(&self) -> MutexGuard<'_, Frontend> {
        self.frontend.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known_config(&self) -> MutexGuard<'_, Config> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the first `len` bytes of configuration space, and keeps them.
    pub(super) fn read_config(&self, len: usize) -> io::Result<()> {
        let mut frontend = self.frontend();
        if !frontend.has_config() {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "it has no configuration space"));
        }
        let config = frontend.config(len)?;
        self.known_config().bytes = config;
        Ok(())
    }

    /// Returns the known part of configuration space.
    pub(super) fn config(&self) -> Vec<u8> {
        self.known_config().bytes.clone()
    }

    /// Sets the only byte of configuration space that a driver writes.
    pub(super) fn set(&self, at: u8, byte: u8) -> io::Result<()> {
        self.frontend().set_config(at.into(), &[byte])?;
        let (mut config, at) = (self.known_config(), usize::from(at));
        let before = config.set.map(|(_, before, _)| before).or(config.bytes.get(at).copied());
        config.set = before.map(|before| (at, before, byte));
        config.put(at, byte);
        Ok(())
    }

    /// Returns the byte that the driver has set.
    pub(super) fn was_set(&self) -> Option<u8> {
        self.known_config().set.map(|(_, _, byte)| byte)
    }

    /// Restores the value that the byte had before the driver set it, even if only the next daemon gets it.
    pub(super) fn unset(&self) -> io::Result<()> {
        let Some((at, before, _)) = self.known_config().set.take() else { return Ok(()) };
        self.known_config().put(at, before);
        self.frontend().set_config(at as u32, &[before])
    }

    /// Reads the known part again; calls `changed` before a driver can see the new bytes.
    fn refresh(&self, frontend: &mut Frontend, changed: impl FnOnce()) -> io::Result<()> {
        let len = self.known_config().bytes.len();
        let config = if len > 0 { frontend.config(len)? } else { Vec::new() };
        let mut known = self.known_config();
        known.bytes = config;
        changed();
        Ok(())
    }

    /// Reads the known part again and notifies the driver.
    pub(super) fn refreshed(&self, interrupt: &Interrupt) -> io::Result<()> {
        self.refresh(&mut self.frontend(), || interrupt.config_changed())
    }

    /// Hands over rings, which then wait for [`Connection::enable`]. Connects again if the connection has ended.
    pub(in crate::virtio) fn hand_over(&self, features: u64, ram: &GuestRam, rings: &[Ring<'_>]) -> io::Result<()> {
        let memory = ram.shared_regions().ok_or_else(|| io::Error::other("guest memory is not shared"))?;
        let mut frontend = self.frontend();
        if frontend.look().is_err() {
            *frontend = self.connect_again(features)?;
            self.refresh(&mut frontend, || {})?;
            let mut config = self.known_config();
            if let Some((at, _, byte)) = config.set {
                frontend.set_config(at as u32, &[byte])?;
                config.put(at, byte);
            }
        }
        frontend.start(features, &memory, rings)
    }

    fn connect_again(&self, features: u64) -> io::Result<Frontend> {
        let frontend = Frontend::connect(&self.place).map_err(|e| {
            let cause = std::error::Error::source(&e).map_or(String::new(), |cause| format!(": {cause}"));
            io::Error::other(format!("{e}{cause}"))
        })?;
        if features & self.features & !frontend.features() != 0 {
            return Err(io::Error::other(format!(
                "the new daemon at {} lacks features that the driver uses",
                self.place.path().display()
            )));
        }
        self.log.log(
            Level::Info,
            format_args!("connected to the new vhost-user daemon at {}", self.place.path().display()),
        );
        Ok(frontend)
    }

    /// Lets rings that were handed over pass requests, or stops them from doing so.
    pub(in crate::virtio) fn enable(&self, rings: impl IntoIterator<Item = (u16, bool)>) -> io::Result<()> {
        self.frontend().enable(rings)
    }

    /// Takes rings back; returns their positions.
    pub(in crate::virtio) fn take_back(&self, rings: &[u16]) -> io::Result<Vec<u16>> {
        self.frontend().stop(rings)
    }

    /// Returns a share without queues that notices when the daemon ends.
    pub(in crate::virtio) fn watcher(self: Arc<Self>) -> Share {
        Share { queues: vec![], handler: Box::new(Watcher(self)) }
    }
}

impl Server for Connection {
    fn start(&self, features: u64, ram: &GuestRam, rings: &[Ring<'_>]) -> io::Result<()> {
        self.hand_over(features, ram, rings)?;
        self.enable(rings.iter().map(|ring| (ring.index, true)))
    }

    fn stop(&self, rings: &[u16]) -> io::Result<Vec<u16>> {
        self.take_back(rings)
    }

    fn watch(self: Arc<Self>) -> Option<Share> {
        Some(self.watcher())
    }
}

/// Watches for the end of the daemon and for its reports of changes.
struct Watcher(Arc<Connection>);

impl Handler for Watcher {
    fn event(&mut self, event: Event, _queues: &mut [Queue], cx: &Context<'_>) -> Result<Progress, Fault> {
        let mut frontend = self.0.frontend();
        match event {
            Event::Start => {
                let fds: [(u64, Option<RawFd>); 2] = [(SOCKET, Some(frontend.fd())), (CHANNEL, frontend.channel_fd())];
                for (token, fd) in fds {
                    fd.map_or(Ok(()), |fd| cx.watch(fd, token, Interest::Read))?;
                }
            }
            Event::Ready(SOCKET) => frontend.look()?,
            Event::Ready(CHANNEL) => match frontend.config_changed() {
                Ok(false) => {}
                Ok(true) => {
                    drop(frontend);
                    if let Err(e) = self.0.refreshed(cx.interrupt) {
                        self.0.log.warn(e);
                    }
                }
                Err(e) => {
                    let path = self.0.place.path().display();
                    self.0.log.debug(format_args!("the daemon at {path} no longer reports configuration changes: {e}"));
                }
            },
            _ => {}
        }
        Ok(Progress::Done)
    }
}
