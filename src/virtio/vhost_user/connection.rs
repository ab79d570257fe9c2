//! The connection to a daemon, as a device has it: outlives stops, and is made anew when the daemon was.

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

/// A daemon, which may come and go.
pub(in crate::virtio) struct Connection {
    /// Followed once: a new daemon listens in the same directory.
    place: Place,
    /// What the first one offered; drivers were told of it.
    features: u64,
    max_queues: Option<u16>,
    frontend: Mutex<Frontend>,
    config: Mutex<Config>,
    log: LogLimit,
}

/// What is known of a daemon's configuration space.
#[derive(Default)]
struct Config {
    bytes: Vec<u8>,
    /// The byte that the driver has set: where, what was there before, what it is now. The next daemon must hear of it.
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
            let source = io::Error::new(io::ErrorKind::Unsupported, "it does not know virtio 1.0");
            return Err(Error::Handshake { path: path.into(), source });
        }
        let (features, max_queues) = (frontend.features(), frontend.max_queues());
        let (frontend, config) = (Mutex::new(frontend), Mutex::default());
        Ok(Connection { place, features, max_queues, frontend, config, log: LogLimit::default() })
    }

    /// Features of rings and device that it offers.
    pub(in crate::virtio) fn features(&self) -> u64 {
        self.features
    }

    /// How many rings it serves, if it says so.
    pub(super) fn max_queues(&self) -> Option<u16> {
        self.max_queues
    }

    fn frontend(&self) -> MutexGuard<'_, Frontend> {
        self.frontend.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known_config(&self) -> MutexGuard<'_, Config> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for the first `len` bytes of configuration space, which are known from then on.
    pub(super) fn read_config(&self, len: usize) -> io::Result<()> {
        let mut frontend = self.frontend();
        if !frontend.has_config() {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "it has no configuration space"));
        }
        let config = frontend.config(len)?;
        self.known_config().bytes = config;
        Ok(())
    }

    /// What is known of configuration space.
    pub(super) fn config(&self) -> Vec<u8> {
        self.known_config().bytes.clone()
    }

    /// Sets the one byte of configuration space that a driver writes.
    pub(super) fn set(&self, at: u8, byte: u8) -> io::Result<()> {
        self.frontend().set_config(at.into(), &[byte])?;
        let (mut config, at) = (self.known_config(), usize::from(at));
        let before = config.set.map(|(_, before, _)| before).or(config.bytes.get(at).copied());
        config.set = before.map(|before| (at, before, byte));
        config.put(at, byte);
        Ok(())
    }

    /// What the driver has set it to.
    pub(super) fn was_set(&self) -> Option<u8> {
        self.known_config().set.map(|(_, _, byte)| byte)
    }

    /// Has it as it was before the driver set it; also if that is for the next daemon only.
    pub(super) fn unset(&self) -> io::Result<()> {
        let Some((at, before, _)) = self.known_config().set.take() else { return Ok(()) };
        self.known_config().put(at, before);
        self.frontend().set_config(at as u32, &[before])
    }

    /// Reads again what is known; `changed` is called before a driver can see it.
    fn refresh(&self, frontend: &mut Frontend, changed: impl FnOnce()) -> io::Result<()> {
        let len = self.known_config().bytes.len();
        let config = if len > 0 { frontend.config(len)? } else { Vec::new() };
        let mut known = self.known_config();
        known.bytes = config;
        changed();
        Ok(())
    }

    /// [`Connection::refresh`] for a driver that is interrupted for it.
    pub(super) fn refreshed(&self, interrupt: &Interrupt) -> io::Result<()> {
        self.refresh(&mut self.frontend(), || interrupt.config_changed())
    }

    /// Hands over rings, which then wait for [`Connection::enable`]. A connection that has ended is made anew.
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
            return Err(io::Error::other(format!("the new daemon at {} can do less", self.place.path().display())));
        }
        self.log.log(
            Level::Info,
            format_args!("connected to the new vhost-user daemon at {}", self.place.path().display()),
        );
        Ok(frontend)
    }

    /// Lets rings that were handed over pass requests, or not.
    pub(in crate::virtio) fn enable(&self, rings: impl IntoIterator<Item = (u16, bool)>) -> io::Result<()> {
        self.frontend().enable(rings)
    }

    /// Takes rings back.
    pub(in crate::virtio) fn take_back(&self, rings: &[u16]) -> io::Result<Vec<u16>> {
        self.frontend().stop(rings)
    }

    /// A share without queues that sees the daemon go.
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

/// Waits for the daemon to go, or to say that something has changed.
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
                    self.0.log.debug(format_args!("the daemon at {path} will not report changes any more: {e}"));
                }
            },
            _ => {}
        }
        Ok(Progress::Done)
    }
}
