//! Network card (5.1), connected to a tap of the host, or to passt, which needs no privileges.
//!
//! Each pair of a receive and a transmit queue has its own worker and port (`pair`); the worker of the first pair also
//! serves the control queue (`control`). Alternatively, vhost-net (`kernel`) or a vhost-user daemon (`daemon`, created
//! by [`vhost_user`](super::vhost_user)) serves the pairs; then only the control queue is served here.

mod config;
mod control;
mod daemon;
mod kernel;
mod pair;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net::*;
use vmm_sys_util::eventfd::EventFd;

use super::control::{Control, ControlError, Reply};
use super::queue::Queue;
use super::vhost::{Served, Server};
use super::vhost_user::Connection;
use super::{Activated, Activation, DeviceId, DeviceInfo, Interrupt, RING_FEATURES, Share, StateError, VirtioDevice};
use crate::backend::packet::{Offloads, Port, Received};
use crate::backend::passt::{self, Passt};
use crate::backend::tap::Tap;
use crate::event::eventfd;
use crate::log_limit::LogLimit;
use crate::rate_limiter::{Limits, RateLimiter};

pub(super) use config::MIN_MTU;
pub use config::{Error, MAX_PAIRS, Mac, NetConfig};
use daemon::Daemon;
use kernel::Kernel;

const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 64;
/// Maximum number of stale packets discarded when the link comes up again; more than a tap queues.
const MAX_STALE: usize = 4096;
/// Size of configuration space up to and including `mtu` (5.1.4).
const CONFIG_BYTES: usize = 12;

/// Checksum and segmentation offloads between driver and tap, in both directions.
const OFFLOADS: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN;

/// Features of every network card.
const FEATURES: u64 = RING_FEATURES
    | 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_STATUS
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_CTRL_VQ
    | 1 << VIRTIO_NET_F_CTRL_RX
    | 1 << VIRTIO_NET_F_CTRL_MAC_ADDR;

/// Saved state of a network card, without its queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetState {
    /// MAC address, which the driver may have changed.
    pub mac: Mac,
    /// Number of queue pairs in use.
    pub pairs: u16,
    /// Set if the cable is plugged in.
    pub plugged: bool,
    /// Link state last reported to the driver.
    pub link: bool,
}

/// Serves a card's queue pairs outside this process.
trait Elsewhere: Server {
    /// Returns the supported features, of those of rings and cards.
    fn features(&self) -> u64;

    /// Returns the number of pairs that it serves.
    fn pairs(&self) -> u16;

    /// Plugs the cable in or pulls it; while it is pulled, no packet passes.
    fn set_link(&self, up: bool) -> io::Result<()>;

    /// Sets the number of pairs that the driver uses from now on.
    fn set_pairs(&self, _pairs: u16) -> io::Result<()> {
        Ok(())
    }
}

/// The network card.
pub struct Net {
    info: DeviceInfo,
    /// MAC address as configured.
    mac: Mac,
    mtu: Option<u16>,
    /// Link state last reported to the driver before the snapshot; set between restore and activation.
    told: Option<bool>,
    shared: Arc<Shared>,
}

/// State that all workers of the card share.
struct Shared {
    name: String,
    /// One port for each pair; none if the pairs are served elsewhere.
    ports: Vec<Mutex<Box<dyn Port>>>,
    elsewhere: Option<Arc<dyn Elsewhere>>,
    max_pairs: u16,
    /// Rate limit to the guest.
    rx_limiter: Option<RateLimiter>,
    /// Rate limit from the guest.
    tx_limiter: Option<RateLimiter>,
    /// Current MAC address.
    mac: Mutex<Mac>,
    /// Number of pairs that the driver uses (5.1.6.5.5).
    pairs: AtomicU16,
    /// Events that notify each pair's worker of a change of `pairs` or of the link.
    changed: Vec<EventFd>,
    /// Set while the network side works.
    alive: AtomicBool,
    /// Set while the cable is plugged in.
    plugged: AtomicBool,
    /// Warnings about packets that the host did not accept.
    dropped: LogLimit,
    /// All other warnings that the driver can cause.
    warnings: LogLimit,
}

impl Shared {
    /// Returns the port of a pair, once its previous user has released it.
    fn port(&self, pair: usize) -> Option<MutexGuard<'_, Box<dyn Port>>> {
        self.ports.get(pair).map(|port| port.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn mac(&self) -> MutexGuard<'_, Mac> {
        self.mac.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Prepares all ports for a driver.
    fn prepare(&self, offloads: Offloads) -> io::Result<()> {
        if let Some(mut port) = self.port(0) {
            port.set_offloads(offloads)?;
        }
        self.follow_pairs()
    }

    /// Informs all ports whether the driver uses them.
    fn follow_pairs(&self) -> io::Result<()> {
        (0..self.ports.len()).try_for_each(|pair| {
            let port = self.port(pair);
            port.map_or(Ok(()), |mut port| port.set_active(self.is_active(pair)))
        })?;
        self.elsewhere.as_ref().map_or(Ok(()), |elsewhere| elsewhere.set_pairs(self.pairs.load(Ordering::SeqCst)))
    }

    /// Sets the number of pairs that the driver uses.
    fn set_pairs(&self, pairs: u16) {
        self.pairs.store(pairs, Ordering::SeqCst);
        self.tell_workers();
        if self.elsewhere.is_some()
            && let Err(e) = self.follow_pairs()
        {
            self.warnings.warn(format_args!("{}: cannot use {pairs} queue pairs: {e}", self.name));
        }
    }

    fn tell_workers(&self) {
        self.changed.iter().for_each(|changed| _ = changed.write(1));
    }

    fn is_active(&self, pair: usize) -> bool {
        pair < usize::from(self.pairs.load(Ordering::SeqCst))
    }

    fn is_alive(&self) -> bool {
        self.alive.load(Ordering::SeqCst)
    }

    fn link_up(&self) -> bool {
        self.is_alive() && self.plugged.load(Ordering::SeqCst)
    }

    /// Records the loss of the network; the guest then sees the link as down (5.1.4). Returns whether the loss is new.
    fn lost(&self, e: &io::Error) -> bool {
        let new = self.alive.swap(false, Ordering::SeqCst);
        if new {
            self.warnings.warn(format_args!("{}: lost the network; link down in the guest: {e}", self.name));
        }
        new
    }

    /// Plugs the cable in or pulls it.
    fn set_link(&self, up: bool) -> io::Result<()> {
        if up && !self.plugged.load(Ordering::SeqCst) {
            (0..self.ports.len()).filter_map(|pair| self.port(pair)).for_each(|mut port| discard(&mut **port));
        }
        if let Some(elsewhere) = &self.elsewhere {
            elsewhere.set_link(up)?;
        }
        self.plugged.store(up, Ordering::SeqCst);
        self.tell_workers();
        Ok(())
    }
}

/// Discards the packets that arrived while the link was down.
fn discard(port: &mut dyn Port) {
    for _ in 0..MAX_STALE {
        match port.receive(&[]) {
            Ok(Received::NoRoom(_)) => port.skip(),
            _ => break,
        }
    }
}

/// Options of a card beyond those that every card has.
#[derive(Clone, Copy, Debug, Default)]
struct Extras {
    mtu: Option<u16>,
    /// Supported offloads, of `OFFLOADS`.
    offloads: u64,
    /// Features of `FEATURES` that this card lacks.
    without: u64,
    rx: Limits,
    tx: Limits,
}

impl Net {
    /// Creates a card: opens the tap or starts passt. `name` is for threads and warnings.
    pub fn new(name: impl Into<String>, config: &NetConfig) -> Result<Self, Error> {
        config.validate()?;
        let mac = config.mac.map_or_else(Mac::random, Ok)?;
        let mut extras =
            Extras { mtu: config.mtu, rx: config.rx_limits(), tx: config.tx_limits(), ..Extras::default() };
        if !config.mrg_rxbuf {
            extras.without |= 1 << VIRTIO_NET_F_MRG_RXBUF;
        }
        let Some(tap) = &config.tap else {
            let mtu = config.mtu.unwrap_or(passt::MTU);
            extras.mtu = Some(mtu);
            let (forwards, map_gateway) = (config.hostfwd.clone(), config.map_gateway);
            let options = passt::Options { forwards, mac: mac.0, mtu, map_gateway };
            let ports: Vec<Box<dyn Port>> = vec![Box::new(Passt::start(&options)?)];
            return Ok(Self::build(name.into(), ports, None, mac, extras)?);
        };
        let taps = Tap::open(tap, config.queues)?;
        extras.offloads = if config.offload { OFFLOADS } else { 0 };
        let kernel = match config.vhost {
            true => Some(Kernel::open(taps.iter().map(owned_fd).collect::<io::Result<_>>()?)?),
            false => None,
        };
        let ports = taps.into_iter().map(|tap| Box::new(tap) as Box<dyn Port>).collect();
        Ok(Self::build(name.into(), ports, kernel.map(|kernel| Arc::new(kernel) as _), mac, extras)?)
    }

    /// Creates a card whose pairs a vhost-user daemon serves.
    pub(super) fn by_daemon(
        name: String,
        connection: Connection,
        pairs: u16,
        mac: Option<Mac>,
        mtu: Option<u16>,
    ) -> Result<Self, Error> {
        let extras = Extras { mtu, offloads: connection.features() & OFFLOADS, ..Extras::default() };
        let daemon = Daemon::new(Arc::new(connection), pairs);
        Ok(Self::build(name, vec![], Some(Arc::new(daemon)), mac.map_or_else(Mac::random, Ok)?, extras)?)
    }

    /// Creates a card on arbitrary ports, one for each queue pair, which support the given offloads (of `OFFLOADS`).
    pub fn with_ports(
        name: impl Into<String>,
        ports: Vec<Box<dyn Port>>,
        mac: Mac,
        mtu: Option<u16>,
        offloads: u64,
    ) -> io::Result<Self> {
        Self::build(name.into(), ports, None, mac, Extras { mtu, offloads, ..Extras::default() })
    }

    fn build(
        name: String,
        ports: Vec<Box<dyn Port>>,
        elsewhere: Option<Arc<dyn Elsewhere>>,
        mac: Mac,
        extras: Extras,
    ) -> io::Result<Self> {
        let max_pairs = elsewhere.as_ref().map_or(ports.len() as u16, |elsewhere| elsewhere.pairs());
        let mut features = FEATURES & !extras.without | extras.offloads & OFFLOADS;
        features |= u64::from(extras.mtu.is_some()) << VIRTIO_NET_F_MTU | u64::from(max_pairs > 1) << VIRTIO_NET_F_MQ;
        if let Some(elsewhere) = &elsewhere {
            features &= !(RING_FEATURES | 1 << VIRTIO_NET_F_MRG_RXBUF) | elsewhere.features();
        }
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * usize::from(max_pairs)];
        queue_sizes.push(CONTROL_QUEUE_SIZE);
        let limiter = |limits: Limits| limits.any().then(|| RateLimiter::new(limits));
        let shared = Shared {
            name: name.clone(),
            changed: ports.iter().map(|_| eventfd()).collect::<Result<_, _>>()?,
            ports: ports.into_iter().map(Mutex::new).collect(),
            elsewhere,
            max_pairs,
            rx_limiter: limiter(extras.rx),
            tx_limiter: limiter(extras.tx),
            mac: Mutex::new(mac),
            pairs: AtomicU16::new(1),
            alive: AtomicBool::new(true),
            plugged: AtomicBool::new(true),
            dropped: LogLimit::default(),
            warnings: LogLimit::default(),
        };
        let info = DeviceInfo { id: DeviceId::Net, name, features, queue_sizes, shared_memory: vec![] };
        Ok(Net { info, mac, mtu: extras.mtu, told: None, shared: Arc::new(shared) })
    }

    /// Returns `struct virtio_net_config` (5.1.4).
    fn config_space(&self) -> [u8; CONFIG_BYTES] {
        let link = if self.shared.link_up() { VIRTIO_NET_S_LINK_UP as u16 } else { 0 };
        let [m0, m1, m2, m3, m4, m5] = self.shared.mac().0;
        let ([s0, s1], [p0, p1]) = (link.to_le_bytes(), self.shared.max_pairs.to_le_bytes());
        let [t0, t1] = self.mtu.unwrap_or(0).to_le_bytes();
        [m0, m1, m2, m3, m4, m5, s0, s1, p0, p1, t0, t1]
    }

    /// Serves the control queue here, after the pairs' queues were handed over to an outside server, or after that
    /// failed. `rest` begins with the control queue.
    fn elsewhere(
        &self,
        started: io::Result<Served>,
        features: u64,
        queues: Vec<Queue>,
        rest: Vec<Queue>,
        interrupt: &Interrupt,
    ) -> Activated {
        let handler = Box::new(control::ControlQueue::new(self.shared.clone(), features));
        let (activated, changed) = match started {
            Ok(remote) => {
                let watch = self.shared.elsewhere.clone().and_then(|elsewhere| elsewhere.watch());
                let shares = [Share { queues: rest, handler }].into_iter().chain(watch).collect();
                let changed = !self.shared.alive.swap(true, Ordering::SeqCst);
                (Activated::Elsewhere(Box::new(remote), shares), changed)
            }
            // On failure the card has no link, but its driver still waits for answers on the control queue.
            Err(e) => {
                let queues = rest.into_iter().chain(queues).collect();
                (Activated::Here(vec![Share { queues, handler }]), self.shared.lost(&e))
            }
        };
        if changed {
            interrupt.config_changed();
        }
        activated
    }
}

impl VirtioDevice for Net {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_config_bytes(&self.config_space(), offset, data);
    }

    fn control(&mut self, control: &Control) -> Result<Reply, ControlError> {
        let Control::SetLink(up) = control else { return Err(ControlError::Unsupported(self.info.name.clone())) };
        let was = self.shared.link_up();
        self.shared
            .set_link(*up)
            .map_err(|e| ControlError::Refused(format!("cannot change the link of {}: {e}", self.info.name)))?;
        Ok(if was == self.shared.link_up() { Reply::Done } else { Reply::ConfigChanged })
    }

    fn activate(&mut self, activation: Activation) -> io::Result<Activated> {
        let Activation { ram, features, mut queues, kicks, interrupt } = activation;
        let has = |bit: u32| features & 1 << bit != 0;
        // 5.1.3.1: segmentation offload needs checksum offload; the host's kernel requires that too.
        let csum = has(VIRTIO_NET_F_GUEST_CSUM);
        // All ports have the same offloads.
        let (tso4, tso6) = (csum && has(VIRTIO_NET_F_GUEST_TSO4), csum && has(VIRTIO_NET_F_GUEST_TSO6));
        let ecn = (tso4 || tso6) && has(VIRTIO_NET_F_GUEST_ECN);
        let told = self.told.take().unwrap_or(self.shared.link_up());
        if let Err(e) = self.shared.prepare(Offloads { csum, tso4, tso6, ecn }) {
            self.shared.lost(&e);
        }
        if told != self.shared.link_up() {
            interrupt.config_changed();
        }
        // 5.1.2: without MQ there is one pair, and the control queue follows it.
        let pairs = if has(VIRTIO_NET_F_MQ) { usize::from(self.shared.max_pairs) } else { 1 };
        let rest = queues.split_off((2 * pairs).min(queues.len()));
        if let Some(elsewhere) = &self.shared.elsewhere {
            let started = Served::start(elsewhere.clone(), features, &ram, &queues, &kicks, &interrupt);
            return Ok(self.elsewhere(started, features, queues, rest, &interrupt));
        }
        let mut shares = Vec::with_capacity(pairs);
        let mut queues = queues.into_iter();
        let mut rest = Some(rest);
        for pair in 0..pairs {
            let mut own: Vec<Queue> = queues.by_ref().take(2).collect();
            own.extend(rest.take().into_iter().flatten());
            let handler = pair::Pair::new(self.shared.clone(), pair, features)?;
            shares.push(Share { queues: own, handler: Box::new(handler) });
        }
        Ok(Activated::Here(shares))
    }

    fn reset(&mut self) {
        self.told = None;
        self.shared.pairs.store(1, Ordering::SeqCst);
        *self.shared.mac() = self.mac;
    }

    fn save(&self) -> Result<serde_json::Value, StateError> {
        let state = NetState {
            mac: *self.shared.mac(),
            pairs: self.shared.pairs.load(Ordering::SeqCst),
            plugged: self.shared.plugged.load(Ordering::SeqCst),
            link: self.told.unwrap_or(self.shared.link_up()),
        };
        serde_json::to_value(state).map_err(|e| StateError(e.to_string()))
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<(), StateError> {
        let broken = |e: String| StateError(format!("the saved state of {} is broken: {e}", self.info.name));
        let NetState { mac, pairs, plugged, link } = NetState::deserialize(state).map_err(|e| broken(e.to_string()))?;
        if pairs == 0 || pairs > self.shared.max_pairs {
            return Err(broken(format!("the number of queue pairs is {pairs}, not 1 to {}", self.shared.max_pairs)));
        }
        self.shared.set_link(plugged).map_err(|e| broken(e.to_string()))?;
        self.told = Some(link);
        self.shared.pairs.store(pairs, Ordering::SeqCst);
        *self.shared.mac() = mac;
        Ok(())
    }
}

/// Duplicates the port's descriptor.
#[allow(unsafe_code)]
fn owned_fd(port: &impl Port) -> io::Result<OwnedFd> {
    // SAFETY: the descriptor is the port's, which outlives the call.
    unsafe { BorrowedFd::borrow_raw(port.fd()) }.try_clone_to_owned()
}
