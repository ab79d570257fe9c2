//! Forwarding of host ports to guest ports.

use std::net::{IpAddr, Ipv4Addr, TcpListener, UdpSocket};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Error;

/// Transport protocol: `tcp` or `udp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// Address of forwarded ports unless the user names one: a guest's service is exposed to the network only on request.
const DEFAULT_ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// A host port that leads to a guest port: `tcp:8080:80`, `udp:0.0.0.0:53:5353`, `tcp:[::1]:8080:80`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// Protocol of both ports.
    pub protocol: Protocol,
    /// Address of the host to listen at; 127.0.0.1 if none is given.
    pub address: Option<IpAddr>,
    /// Port of the host.
    pub host: u16,
    /// Port of the guest.
    pub guest: u16,
}

impl FromStr for Forward {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (protocol, rest) = text.split_once(':')?;
            let protocol = match protocol {
                "tcp" => Protocol::Tcp,
                "udp" => Protocol::Udp,
                _ => return None,
            };
            let (rest, guest) = rest.rsplit_once(':')?;
            let (address, host) = rest.rsplit_once(':').map_or((None, rest), |(address, host)| (Some(address), host));
            let address = match address {
                Some(text) => Some(text.trim_start_matches('[').trim_end_matches(']').parse().ok()?),
                None => None,
            };
            let port = |text: &str| text.parse::<u16>().ok().filter(|&port| port != 0);
            Some(Forward { protocol, address, host: port(host)?, guest: port(guest)? })
        };
        parse().ok_or_else(|| format!("'{text}' is not of the form tcp|udp:[ADDRESS:]HOSTPORT:GUESTPORT"))
    }
}

impl std::fmt::Display for Forward {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.protocol == Protocol::Tcp { "tcp:" } else { "udp:" })?;
        match self.address {
            Some(IpAddr::V4(address)) => write!(f, "{address}:")?,
            Some(IpAddr::V6(address)) => write!(f, "[{address}]:")?,
            None => {}
        }
        write!(f, "{}:{}", self.host, self.guest)
    }
}

impl Serialize for Forward {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Forward {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

impl Forward {
    /// Checks that the host's port can be bound; passt itself would start without it.
    pub(super) fn check(&self) -> Result<(), Error> {
        let to = (self.address(), self.host);
        let bound = match self.protocol {
            Protocol::Tcp => TcpListener::bind(to).map(|_| ()),
            Protocol::Udp => UdpSocket::bind(to).map(|_| ()),
        };
        bound.map_err(|source| Error::Port { forward: *self, port: self.host, source })
    }

    fn address(&self) -> IpAddr {
        self.address.unwrap_or(DEFAULT_ADDRESS)
    }

    /// Returns the forwarding in passt's own syntax.
    pub(super) fn option(&self) -> [String; 2] {
        let option = if self.protocol == Protocol::Tcp { "-t" } else { "-u" };
        [option.into(), format!("{}/{}:{}", self.address(), self.host, self.guest)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_written_as_passt_has_them() {
        for (text, option) in [
            ("tcp:8080:80", "-t 127.0.0.1/8080:80"),
            ("tcp:0.0.0.0:8080:80", "-t 0.0.0.0/8080:80"),
            ("udp:127.0.0.1:53:5353", "-u 127.0.0.1/53:5353"),
            ("tcp:[::1]:22:22", "-t ::1/22:22"),
        ] {
            let forward: Forward = text.parse().unwrap();
            assert_eq!((forward.to_string().as_str(), forward.option().join(" ").as_str()), (text, option));
        }
        let taken = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        for text in [format!("tcp:{port}:80"), format!("tcp:127.0.0.1:{port}:80")] {
            let forward: Forward = text.parse().unwrap();
            let error = forward.check().unwrap_err().to_string();
            assert_eq!(error, format!("cannot forward {forward}: port {port} of the host cannot be bound"));
        }
    }
}
