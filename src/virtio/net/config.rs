//! Options of a network card.

use std::io;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::backend::passt::{self, Forward};
use crate::backend::tap;
use crate::backend::vhost;
use crate::options::{self, Size};
use crate::rate_limiter::Limits;

/// Maximum number of queue pairs of one card; each has a thread.
pub const MAX_PAIRS: u16 = 16;
/// Smallest MTU that a device may announce (5.1.4.1).
pub(in crate::virtio) const MIN_MTU: u16 = 68;

/// `--net`: a network card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// Name of a tap of the host, which is created if it does not exist.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// Network without privileges: the passt program turns the guest's connections into the user's own.
    #[serde(default, skip_serializing_if = "is_off")]
    pub user: bool,
    /// Ports of the host that are forwarded to the guest, for `user`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hostfwd: Vec<Forward>,
    /// Maps the gateway's address to the host's loopback, for `user`: the guest then reaches services that listen on
    /// 127.0.0.1 only.
    #[serde(default, skip_serializing_if = "is_off")]
    pub map_gateway: bool,
    /// MAC address; random by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<Mac>,
    /// MTU announced to the guest, 68 to 65535; by default 65520 with `user`, otherwise the guest chooses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Number of queue pairs, 1 to 16, for `tap`.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub queues: u16,
    /// Leaves checksums and segmentation to the receiver, for `tap`.
    #[serde(default = "on", skip_serializing_if = "is_on")]
    pub offload: bool,
    /// Offers that a packet may be spread over several buffers; when off, each of the driver's buffers has room for the
    /// largest packet.
    #[serde(default = "on", skip_serializing_if = "is_on")]
    pub mrg_rxbuf: bool,
    /// Lets the kernel's vhost-net move the packets, for `tap`.
    #[serde(default, skip_serializing_if = "is_off")]
    pub vhost: bool,
    /// Maximum number of bytes to the guest per second; unlimited by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_bandwidth: Option<Size>,
    /// Burst size in bytes to the guest, for `rx_bandwidth`; one second's worth by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_bandwidth_burst: Option<Size>,
    /// Maximum number of packets to the guest per second; unlimited by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_ops: Option<u64>,
    /// Burst size in packets to the guest, for `rx_ops`; one second's worth by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_ops_burst: Option<u64>,
    /// Maximum number of bytes from the guest per second; unlimited by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_bandwidth: Option<Size>,
    /// Burst size in bytes from the guest, for `tx_bandwidth`; one second's worth by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_bandwidth_burst: Option<Size>,
    /// Maximum number of packets from the guest per second; unlimited by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_ops: Option<u64>,
    /// Burst size in packets from the guest, for `tx_ops`; one second's worth by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_ops_burst: Option<u64>,
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
        let first = text.split(',').next().unwrap_or_default();
        let hint = format!("write tap={first} for a tap device of the host, or user for a network without privilege");
        options::from_str(text, None).map_err(|e| e.hint_for_key(first, &hint))
    }
}

/// An Ethernet address (MAC address).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// Returns a random, locally administered unicast address.
    pub(super) fn random() -> io::Result<Self> {
        let mut bytes = [0; 6];
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        bytes[0] = bytes[0] & 0xFC | 0x02;
        Ok(Mac(bytes))
    }

    /// Returns whether a single card can have this address: it is neither a multicast address nor zero.
    pub(super) fn is_of_a_card(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("'{text}' is not a unicast MAC address like 02:00:00:00:00:01");
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
        if Mac(bytes).is_of_a_card() { Ok(Mac(bytes)) } else { Err(bad()) }
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

/// Reasons why a network card cannot be created.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither or both of `tap` and `user` are given.
    #[error("a network card needs either tap=NAME or user")]
    Kind,
    /// A key that has no meaning for this kind of network.
    #[error("'{0}' is for {1} only")]
    Key(&'static str, &'static str),
    /// An invalid interface name.
    #[error("invalid tap name '{0}': use 1 to 15 characters, no '/', '%', ':' or spaces")]
    Name(String),
    /// An MTU out of range.
    #[error("mtu={0}: must be {MIN_MTU} to 65535")]
    Mtu(u16),
    /// A number of queue pairs out of range.
    #[error("queues={0}: a network card can have 1 to {MAX_PAIRS}")]
    Queues(u16),
    /// A rate limit that has no effect or lets nothing through.
    #[error("{0}")]
    Limit(&'static str),
    /// The tap failed.
    #[error(transparent)]
    Tap(#[from] tap::Error),
    /// vhost-net failed.
    #[error(transparent)]
    Vhost(#[from] vhost::Error),
    /// passt failed.
    #[error(transparent)]
    Passt(#[from] passt::Error),
    /// A host resource is exhausted.
    #[error("cannot set up a network card")]
    Host(#[from] io::Error),
}

impl NetConfig {
    /// Checks everything that can be checked without opening anything.
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
            NetConfig { tap: Some(_), map_gateway: true, .. } => Err(Error::Key("map_gateway", "user")),
            NetConfig { user: true, queues, .. } if *queues != 1 => Err(Error::Key("queues", "tap")),
            NetConfig { user: true, offload: false, .. } => Err(Error::Key("offload", "tap")),
            NetConfig { user: true, vhost: true, .. } => Err(Error::Key("vhost", "tap")),
            NetConfig { queues, .. } if !(1..=MAX_PAIRS).contains(queues) => Err(Error::Queues(*queues)),
            NetConfig { mtu: Some(mtu), .. } if *mtu < MIN_MTU => Err(Error::Mtu(*mtu)),
            _ => self.validate_limits().map_err(Error::Limit),
        }
    }

    fn validate_limits(&self) -> Result<(), &'static str> {
        let (rx, tx) = (self.rx_limits(), self.tx_limits());
        let needs = [
            (self.rx_bandwidth_burst.is_some() && rx.bytes.is_none(), "rx_bandwidth_burst needs rx_bandwidth"),
            (self.rx_ops_burst.is_some() && rx.ops.is_none(), "rx_ops_burst needs rx_ops"),
            (self.tx_bandwidth_burst.is_some() && tx.bytes.is_none(), "tx_bandwidth_burst needs tx_bandwidth"),
            (self.tx_ops_burst.is_some() && tx.ops.is_none(), "tx_ops_burst needs tx_ops"),
            (rx.is_zero() || tx.is_zero(), "a limit or burst of 0 would let nothing through"),
            (
                self.vhost && (rx.any() || tx.any()),
                "vhost=on has no rate limits: the kernel moves the packets (tc can limit the tap)",
            ),
        ];
        needs.iter().find(|(wrong, _)| *wrong).map_or(Ok(()), |(_, why)| Err(why))
    }

    /// Returns the rate limit to the guest.
    pub(super) fn rx_limits(&self) -> Limits {
        Limits::new(self.rx_bandwidth, self.rx_bandwidth_burst, self.rx_ops, self.rx_ops_burst)
    }

    /// Returns the rate limit from the guest.
    pub(super) fn tx_limits(&self) -> Limits {
        Limits::new(self.tx_bandwidth, self.tx_bandwidth_burst, self.tx_ops, self.tx_ops_burst)
    }
}
