//! Network card (5.1): on a tap of the host, or on passt without any privilege.
//!
//! Each pair of a receive and a transmit queue has a worker and a port of its own (`pair`); the control queue
//! (`control`) is served beside the first pair. Pairs may be served elsewhere, by vhost-net (`kernel`); then only the
//! control queue is ours. The same with a daemon (`daemon`; made by [`vhost_user`](super::vhost_user)).

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
/// How many packets are thrown away at most when a link comes up again: more than a tap keeps.
const MAX_STALE: usize = 4096;
/// Bytes of configuration space up to and including `mtu` (5.1.4).
const CONFIG_BYTES: usize = 12;

/// Work on packets that a tap leaves to us and we to it, in both directions.
const OFFLOADS: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN;

/// What any card has.
const FEATURES: u64 = RING_FEATURES
    | 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_STATUS
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_CTRL_VQ
    | 1 << VIRTIO_NET_F_CTRL_RX
    | 1 << VIRTIO_NET_F_CTRL_MAC_ADDR;

/// What is saved of a network card besides its queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetState {
    /// The address, which the driver may have changed.
    pub mac: Mac,
    /// Queue pairs in use.
    pub pairs: u16,
    /// Whether the cable is plugged in.
    pub plugged: bool,
    /// Whether the driver was told of a link.
    pub link: bool,
}

/// Who serves the queue pairs of a card, if not this process.
trait Elsewhere: Server {
    /// Which of the features of rings and cards it knows.
    fn features(&self) -> u64;

    /// How many pairs it serves.
    fn pairs(&self) -> u16;

    /// Plugs the cable in, or pulls it: then no packet passes.
    fn set_link(&self, up: bool) -> io::Result<()>;

    /// The driver uses so many pairs from now on.
    fn set_pairs(&self, _pairs: u16) -> io::Result<()> {
        Ok(())
    }
}

/// The device.
pub struct Net {
    info: DeviceInfo,
    /// As configured.
    mac: Mac,
    mtu: Option<u16>,
    /// What the driver was told of the link before it was restored.
    told: Option<bool>,
    shared: Arc<Shared>,
}

/// What all workers of the device use.
struct Shared {
    name: String,
    /// One of each pair; none if they are elsewhere.
    ports: Vec<Mutex<Box<dyn Port>>>,
    elsewhere: Option<Arc<dyn Elsewhere>>,
    max_pairs: u16,
    /// To the guest.
    rx_limiter: Option<RateLimiter>,
    /// From the guest.
    tx_limiter: Option<RateLimiter>,
    /// The address now.
    mac: Mutex<Mac>,
    /// How many pairs the driver uses (5.1.6.5.5).
    pairs: AtomicU16,
    /// Tell each pair's worker that `pairs` or the link has changed.
    changed: Vec<EventFd>,
    /// The other side of the cable is there.
    alive: AtomicBool,
    /// The cable is plugged in.
    plugged: AtomicBool,
    /// Packets that the host did not take.
    dropped: LogLimit,
    /// Whatever else its driver can cause.
    warnings: LogLimit,
}

impl Shared {
    /// The port of a pair; whoever had it before is done with it.
    fn port(&self, pair: usize) -> Option<MutexGuard<'_, Box<dyn Port>>> {
        self.ports.get(pair).map(|port| port.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn mac(&self) -> MutexGuard<'_, Mac> {
        self.mac.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Readies all ports for a driver.
    fn prepare(&self, offloads: Offloads) -> io::Result<()> {
        if let Some(mut port) = self.port(0) {
            port.set_offloads(offloads)?;
        }
        self.follow_pairs()
    }

    /// Has all ports know whether the driver uses them.
    fn follow_pairs(&self) -> io::Result<()> {
        (0..self.ports.len()).try_for_each(|pair| {
            let port = self.port(pair);
            port.map_or(Ok(()), |mut port| port.set_active(self.is_active(pair)))
        })?;
        self.elsewhere.as_ref().map_or(Ok(()), |elsewhere| elsewhere.set_pairs(self.pairs.load(Ordering::SeqCst)))
    }

    /// The driver wants to use so many pairs.
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

    /// The other side is gone: the guest sees no link (5.1.4). Returns whether that is new.
    fn lost(&self, e: &io::Error) -> bool {
        let new = self.alive.swap(false, Ordering::SeqCst);
        if new {
            self.warnings.warn(format_args!("{}: the network is gone, the guest has no link: {e}", self.name));
        }
        new
    }

    /// Plugs the cable in, or pulls it.
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

/// Throws away what came while there was no link.
fn discard(port: &mut dyn Port) {
    for _ in 0..MAX_STALE {
        match port.receive(&[]) {
            Ok(Received::NoRoom(_)) => port.skip(),
            _ => break,
        }
    }
}

/// What a card has besides what any has.
#[derive(Clone, Copy, Debug, Default)]
struct Extras {
    mtu: Option<u16>,
    /// Of `OFFLOADS`.
    offloads: u64,
    /// Features of any card that this one has not.
    without: u64,
    rx: Limits,
    tx: Limits,
}

impl Net {
    /// Opens the tap, or starts passt. `name` is for threads and warnings.
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

    /// A card that a daemon serves.
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

    /// A device on any ports, one for each queue pair, that know the given offloads (of `OFFLOADS`).
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

    /// `struct virtio_net_config` (5.1.4).
    fn config_space(&self) -> [u8; CONFIG_BYTES] {
        let link = if self.shared.link_up() { VIRTIO_NET_S_LINK_UP as u16 } else { 0 };
        let [m0, m1, m2, m3, m4, m5] = self.shared.mac().0;
        let ([s0, s1], [p0, p1]) = (link.to_le_bytes(), self.shared.max_pairs.to_le_bytes());
        let [t0, t1] = self.mtu.unwrap_or(0).to_le_bytes();
        [m0, m1, m2, m3, m4, m5, s0, s1, p0, p1, t0, t1]
    }

    /// What is left to do here when the pairs' queues are served elsewhere, or should be. `rest` begins with the control
    /// queue.
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
            // A card without a link. Its driver still waits for answers on the control queue.
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
            .map_err(|e| ControlError::Refused(format!("the link of {} cannot be changed: {e}", self.info.name)))?;
        Ok(if was == self.shared.link_up() { Reply::Done } else { Reply::ConfigChanged })
    }

    fn activate(&mut self, activation: Activation) -> io::Result<Activated> {
        let Activation { ram, features, mut queues, kicks, interrupt } = activation;
        let has = |bit: u32| features & 1 << bit != 0;
        // 5.1.3.1: segmentation needs checksums; the kernel insists too.
        let csum = has(VIRTIO_NET_F_GUEST_CSUM);
        // They are the same for all ports.
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
            return Err(broken(format!("{pairs} queue pairs of {}", self.shared.max_pairs)));
        }
        self.shared.set_link(plugged).map_err(|e| broken(e.to_string()))?;
        self.told = Some(link);
        self.shared.pairs.store(pairs, Ordering::SeqCst);
        *self.shared.mac() = mac;
        Ok(())
    }
}

/// Another descriptor of the same port.
#[allow(unsafe_code)]
fn owned_fd(port: &impl Port) -> io::Result<OwnedFd> {
    // SAFETY: the descriptor is the port's, which outlives the call.
    unsafe { BorrowedFd::borrow_raw(port.fd()) }.try_clone_to_owned()
}
