//! Network card (5.1): on a tap of the host, or on passt without any privilege.
//!
//! Each pair of a receive and a transmit queue has a worker and a port of its own (`pair`); the control queue
//! (`control`) is served beside the first pair.

mod control;
mod pair;
#[cfg(test)]
mod tests;

use std::io;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use log::warn;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net::*;
use vmm_sys_util::eventfd::EventFd;

use super::{
    Activated, Activation, DeviceId, DeviceInfo, RING_FEATURES, Share, StateError, VirtioDevice, queue::Queue,
};
use crate::backend::packet::{Offloads, Port};
use crate::backend::passt::{self, Forward, Passt};
use crate::backend::tap::{self, Tap};
use crate::event::eventfd;
use crate::options;

const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 64;
/// Most queue pairs of one card: each is a thread.
pub const MAX_PAIRS: u16 = 16;
/// 5.1.4.1: the smallest MTU a device may announce.
const MIN_MTU: u16 = 68;
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

/// `--net`: a network card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// A tap of the host by its name; it is made if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// No privilege: the guest's connections become the user's own, by the passt program.
    #[serde(default, skip_serializing_if = "is_off")]
    pub user: bool,
    /// Ports of the host that lead to the guest, for `user`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hostfwd: Vec<Forward>,
    /// The card's address; random without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<Mac>,
    /// The MTU that the guest is told, 68 to 65535; its own choice without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Queue pairs, 1 to 16, for `tap`.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub queues: u16,
    /// Leave checksums and segmentation to the receiver, for `tap`.
    #[serde(default = "on", skip_serializing_if = "is_on")]
    pub offload: bool,
}

fn one() -> u16 {
    1
}

fn is_one(n: &u16) -> bool {
    *n == 1
}

fn on() -> bool {
    true
}

fn is_on(on: &bool) -> bool {
    *on
}

fn is_off(on: &bool) -> bool {
    !*on
}

impl FromStr for NetConfig {
    type Err = options::Error;

    fn from_str(text: &str) -> Result<Self, options::Error> {
        options::from_str(text, None)
    }
}

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// A locally administered one of a single card.
    fn random() -> io::Result<Self> {
        let mut bytes = [0; 6];
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        bytes[0] = bytes[0] & 0xFC | 0x02;
        Ok(Mac(bytes))
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("'{text}' is no address of a network card like 02:00:00:00:00:01");
        let parts: Vec<&str> = text.split(':').collect();
        let mut bytes = [0; 6];
        if parts.len() != bytes.len() {
            return Err(bad());
        }
        for (byte, part) in bytes.iter_mut().zip(parts) {
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(bad());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if bytes[0] & 1 != 0 || bytes == [0; 6] { Err(bad()) } else { Ok(Mac(bytes)) }
    }
}

impl std::fmt::Display for Mac {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl Serialize for Mac {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Mac {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Why a network card cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither or both.
    #[error("a network card needs either tap=NAME or user")]
    Kind,
    /// A key that has no meaning here.
    #[error("'{0}' is for {1} only")]
    Key(&'static str, &'static str),
    /// No interface can be called so.
    #[error("tap name '{0}' is not 1 to 15 characters without '/', '%', ':' and spaces")]
    Name(String),
    /// Out of range.
    #[error("mtu {0} is not {MIN_MTU} to 65535")]
    Mtu(u16),
    /// Out of range.
    #[error("queues {0} is not 1 to {MAX_PAIRS}")]
    Queues(u16),
    /// The tap.
    #[error(transparent)]
    Tap(#[from] tap::Error),
    /// passt.
    #[error(transparent)]
    Passt(#[from] passt::Error),
    /// A host resource is exhausted.
    #[error("cannot set up a network card")]
    Host(#[from] io::Error),
}

impl NetConfig {
    /// Checks what needs nothing to be opened.
    pub fn validate(&self) -> Result<(), Error> {
        if self.tap.is_some() == self.user {
            return Err(Error::Kind);
        }
        if let Some(name) = &self.tap {
            let bad = |c: char| matches!(c, '/' | '%' | ':') || c.is_whitespace() || c.is_control();
            if name.is_empty() || name.len() > 15 || name.contains(bad) || name == "." || name == ".." {
                return Err(Error::Name(name.clone()));
            }
        }
        match self {
            NetConfig { tap: Some(_), hostfwd, .. } if !hostfwd.is_empty() => Err(Error::Key("hostfwd", "user")),
            NetConfig { user: true, queues, .. } if *queues != 1 => Err(Error::Key("queues", "tap")),
            NetConfig { user: true, offload: false, .. } => Err(Error::Key("offload", "tap")),
            NetConfig { queues, .. } if !(1..=MAX_PAIRS).contains(queues) => Err(Error::Queues(*queues)),
            NetConfig { mtu: Some(mtu), .. } if *mtu < MIN_MTU => Err(Error::Mtu(*mtu)),
            _ => Ok(()),
        }
    }
}

/// What is saved of a network card besides its queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetState {
    /// The address, which the driver may have changed.
    pub mac: Mac,
    /// Queue pairs in use.
    pub pairs: u16,
}

/// The device.
pub struct Net {
    info: DeviceInfo,
    /// As configured.
    mac: Mac,
    mtu: Option<u16>,
    shared: Arc<Shared>,
}

/// What all workers of the device use.
struct Shared {
    name: String,
    /// One of each pair.
    ports: Vec<Mutex<Box<dyn Port>>>,
    /// The address now.
    mac: Mutex<Mac>,
    /// How many pairs the driver uses (5.1.6.5.5).
    pairs: AtomicU16,
    /// Tell each pair's worker that `pairs` has changed.
    pairs_changed: Vec<EventFd>,
    link_up: AtomicBool,
    /// A packet that the host did not take was told of already.
    warned: AtomicBool,
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
        (0..self.ports.len()).try_for_each(|pair| {
            let port = self.port(pair);
            port.map_or(Ok(()), |mut port| port.set_active(self.is_active(pair)))
        })
    }

    fn is_active(&self, pair: usize) -> bool {
        pair < usize::from(self.pairs.load(Ordering::SeqCst))
    }
}

impl Net {
    /// Opens the tap, or starts passt. `name` is for threads and warnings.
    pub fn new(name: impl Into<String>, config: &NetConfig) -> Result<Self, Error> {
        config.validate()?;
        let mac = config.mac.map_or_else(Mac::random, Ok)?;
        let (ports, offloads): (Vec<Box<dyn Port>>, u64) = match &config.tap {
            Some(tap) => {
                let taps = Tap::open(tap, config.queues)?;
                let offloads = if config.offload { OFFLOADS } else { 0 };
                (taps.into_iter().map(|tap| Box::new(tap) as Box<dyn Port>).collect(), offloads)
            }
            None => {
                let options = passt::Options { forwards: config.hostfwd.clone(), mac: mac.0, mtu: config.mtu };
                (vec![Box::new(Passt::start(&options)?)], 0)
            }
        };
        Ok(Self::with_ports(name, ports, mac, config.mtu, offloads)?)
    }

    /// A device on any ports, one for each queue pair, that know the given offloads (of `OFFLOADS`).
    pub fn with_ports(
        name: impl Into<String>,
        ports: Vec<Box<dyn Port>>,
        mac: Mac,
        mtu: Option<u16>,
        offloads: u64,
    ) -> io::Result<Self> {
        let name = name.into();
        let pairs = ports.len();
        let mut features = FEATURES | offloads & OFFLOADS | u64::from(mtu.is_some()) << VIRTIO_NET_F_MTU;
        features |= u64::from(pairs > 1) << VIRTIO_NET_F_MQ;
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * pairs];
        queue_sizes.push(CONTROL_QUEUE_SIZE);
        let shared = Shared {
            name: name.clone(),
            pairs_changed: ports.iter().map(|_| eventfd()).collect::<Result<_, _>>()?,
            ports: ports.into_iter().map(Mutex::new).collect(),
            mac: Mutex::new(mac),
            pairs: AtomicU16::new(1),
            link_up: AtomicBool::new(true),
            warned: AtomicBool::new(false),
        };
        let info = DeviceInfo { id: DeviceId::Net, name, features, queue_sizes, shared_memory: vec![] };
        Ok(Net { info, mac, mtu, shared: Arc::new(shared) })
    }

    /// `struct virtio_net_config` (5.1.4).
    fn config_space(&self) -> [u8; CONFIG_BYTES] {
        let link = if self.shared.link_up.load(Ordering::SeqCst) { VIRTIO_NET_S_LINK_UP as u16 } else { 0 };
        let [m0, m1, m2, m3, m4, m5] = self.shared.mac().0;
        let ([s0, s1], [p0, p1]) = (link.to_le_bytes(), (self.shared.ports.len() as u16).to_le_bytes());
        let [t0, t1] = self.mtu.unwrap_or(0).to_le_bytes();
        [m0, m1, m2, m3, m4, m5, s0, s1, p0, p1, t0, t1]
    }
}

impl VirtioDevice for Net {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_config_bytes(&self.config_space(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<Activated> {
        let Activation { features, mut queues, .. } = activation;
        let has = |bit: u32| features & 1 << bit != 0;
        // 5.1.3.1: segmentation needs checksums; the kernel insists too.
        let csum = has(VIRTIO_NET_F_GUEST_CSUM);
        // They are the same for all ports.
        let (tso4, tso6) = (csum && has(VIRTIO_NET_F_GUEST_TSO4), csum && has(VIRTIO_NET_F_GUEST_TSO6));
        let ecn = (tso4 || tso6) && has(VIRTIO_NET_F_GUEST_ECN);
        if let Err(e) = self.shared.prepare(Offloads { csum, tso4, tso6, ecn })
            && self.shared.link_up.swap(false, Ordering::SeqCst)
        {
            warn!("{}: the network is gone, the guest has no link: {e}", self.info.name);
        }
        // 5.1.2: without MQ there is one pair, and the control queue follows it.
        let pairs = if has(VIRTIO_NET_F_MQ) { self.shared.ports.len() } else { 1 };
        let rest = queues.split_off((2 * pairs).min(queues.len()));
        let mut shares = Vec::with_capacity(pairs);
        let mut queues = queues.into_iter();
        let mut rest = Some(rest);
        for pair in 0..pairs {
            let mut own: Vec<Queue> = queues.by_ref().take(2).collect();
            own.extend(rest.take().into_iter().flatten());
            let handler = pair::Pair::new(self.shared.clone(), pair, features);
            shares.push(Share { queues: own, handler: Box::new(handler) });
        }
        Ok(Activated::Here(shares))
    }

    fn reset(&mut self) {
        self.shared.pairs.store(1, Ordering::SeqCst);
        *self.shared.mac() = self.mac;
    }

    fn save(&self) -> Result<serde_json::Value, StateError> {
        let state = NetState { mac: *self.shared.mac(), pairs: self.shared.pairs.load(Ordering::SeqCst) };
        serde_json::to_value(state).map_err(|e| StateError(e.to_string()))
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<(), StateError> {
        let broken = |e: String| StateError(format!("the saved state of {} is broken: {e}", self.info.name));
        let NetState { mac, pairs } = NetState::deserialize(state).map_err(|e| broken(e.to_string()))?;
        if pairs == 0 || usize::from(pairs) > self.shared.ports.len() {
            return Err(broken(format!("{pairs} queue pairs of {}", self.shared.ports.len())));
        }
        self.shared.pairs.store(pairs, Ordering::SeqCst);
        *self.shared.mac() = mac;
        Ok(())
    }
}
