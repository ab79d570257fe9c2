//! The guest's network: the loopback interface, and what DHCP (RFC 2131) gives the first card.

#![allow(unsafe_code)]

use std::fs;
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Duration;

use super::{Error, Result, cannot};

/// How often an answer is asked for, and how long each is waited for.
const TRIES: u32 = 8;
const WAIT: Duration = Duration::from_millis(700);

const BROADCAST_FLAG: u16 = 0x8000;
const COOKIE: [u8; 4] = [99, 130, 83, 99];
/// Options (RFC 2132).
const NETMASK: u8 = 1;
const ROUTER: u8 = 3;
const NAME_SERVER: u8 = 6;
const ADDRESS: u8 = 50;
const MESSAGE: u8 = 53;
const SERVER: u8 = 54;
const PARAMETERS: u8 = 55;
const END: u8 = 255;
const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const ACK: u8 = 5;

/// Programs expect `localhost`; a kernel without a network has none.
pub(super) fn loopback() -> Result<()> {
    let Ok(socket) = UdpSocket::bind("0.0.0.0:0") else { return Ok(()) };
    up(&socket, "lo").map_err(cannot("set up the interface lo"))
}

/// Sets up the first card; returns the name servers.
pub(super) fn configure() -> Result<Vec<Ipv4Addr>> {
    let card = card()?;
    let text = fs::read_to_string(format!("/sys/class/net/{card}/address")).unwrap_or_default();
    let mac: Vec<u8> = text.trim().split(':').map_while(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    let mac: [u8; 6] = mac.try_into().map_err(|_| Error::Other(format!("{card} has no address")))?;
    let what = || format!("set up the network card {card}");
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 68)).map_err(cannot(what()))?;
    up(&socket, &card).map_err(cannot(what()))?;
    socket.set_broadcast(true).map_err(cannot(what()))?;
    bind_to(&socket, &card).map_err(cannot(what()))?;
    let lease = ask(&socket, mac).map_err(cannot(format!("get an address for {card} by DHCP")))?;
    lease.apply(&socket, &card).map_err(cannot(what()))?;
    Ok(lease.name_servers)
}

/// The first Ethernet card.
fn card() -> Result<String> {
    let entries = fs::read_dir("/sys/class/net").map_err(cannot("read /sys/class/net"))?;
    let mut names: Vec<String> = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into()).collect();
    names.sort();
    let ethernet =
        |name: &String| fs::read_to_string(format!("/sys/class/net/{name}/type")).is_ok_and(|kind| kind.trim() == "1");
    names.into_iter().find(ethernet).ok_or_else(|| Error::Other("the guest has no network card (virtio_net)".into()))
}

/// What a server gives.
#[derive(Debug, PartialEq, Eq)]
struct Lease {
    address: Ipv4Addr,
    netmask: Ipv4Addr,
    router: Option<Ipv4Addr>,
    server: Ipv4Addr,
    name_servers: Vec<Ipv4Addr>,
}

fn ask(socket: &UdpSocket, mac: [u8; 6]) -> io::Result<Lease> {
    socket.set_read_timeout(Some(WAIT))?;
    let xid = u32::from_be_bytes([mac[2], mac[3], mac[4], mac[5]]) ^ std::process::id();
    let mut offer: Option<Lease> = None;
    for _ in 0..TRIES {
        let message = message(mac, xid, offer.as_ref());
        socket.send_to(&message, (Ipv4Addr::BROADCAST, 67))?;
        let mut buffer = [0; 1500];
        // What is not for us is passed over; a flood of it is bounded by the number of tries.
        let Ok(len) = socket.recv(&mut buffer) else { continue };
        match parse(buffer.get(..len).unwrap_or(&[]), xid) {
            Some((OFFER, lease)) if offer.is_none() => offer = Some(lease),
            Some((ACK, lease)) if offer.is_some() => return Ok(lease),
            _ => {}
        }
    }
    Err(io::Error::new(io::ErrorKind::TimedOut, "no server answers"))
}

/// A DISCOVER, or a REQUEST of what was offered.
fn message(mac: [u8; 6], xid: u32, offer: Option<&Lease>) -> Vec<u8> {
    let mut bytes = vec![0; 236];
    bytes[..4].copy_from_slice(&[1, 1, 6, 0]);
    bytes[4..8].copy_from_slice(&xid.to_be_bytes());
    bytes[10..12].copy_from_slice(&BROADCAST_FLAG.to_be_bytes());
    bytes[28..34].copy_from_slice(&mac);
    bytes.extend(COOKIE);
    bytes.extend([MESSAGE, 1, if offer.is_some() { REQUEST } else { DISCOVER }]);
    if let Some(offer) = offer {
        for (option, address) in [(ADDRESS, offer.address), (SERVER, offer.server)] {
            bytes.extend([option, 4]);
            bytes.extend(address.octets());
        }
    }
    bytes.extend([PARAMETERS, 3, NETMASK, ROUTER, NAME_SERVER, END]);
    bytes
}

/// What an answer to `xid` says: its kind and what it gives.
fn parse(bytes: &[u8], xid: u32) -> Option<(u8, Lease)> {
    let address = |bytes: &[u8]| <[u8; 4]>::try_from(bytes.get(..4)?).ok().map(Ipv4Addr::from);
    let ours = bytes.first() == Some(&2) && bytes.get(4..8)? == xid.to_be_bytes() && bytes.get(236..240)? == COOKIE;
    if !ours {
        return None;
    }
    let mut lease = Lease {
        address: address(bytes.get(16..)?)?,
        netmask: Ipv4Addr::BROADCAST,
        router: None,
        server: Ipv4Addr::UNSPECIFIED,
        name_servers: Vec::new(),
    };
    let (mut kind, mut options) = (0, bytes.get(240..)?);
    while let [option, rest @ ..] = options {
        match *option {
            0 => options = rest,
            END => break,
            option => {
                let (len, rest) = rest.split_first()?;
                let (value, rest) = rest.split_at_checked(usize::from(*len))?;
                match option {
                    MESSAGE => kind = *value.first()?,
                    NETMASK => lease.netmask = address(value)?,
                    ROUTER => lease.router = address(value),
                    SERVER => lease.server = address(value)?,
                    NAME_SERVER => lease.name_servers = value.chunks_exact(4).filter_map(address).collect(),
                    _ => {}
                }
                options = rest;
            }
        }
    }
    Some((kind, lease))
}

impl Lease {
    fn apply(&self, socket: &UdpSocket, card: &str) -> io::Result<()> {
        for (request, address) in [(libc::SIOCSIFADDR, self.address), (libc::SIOCSIFNETMASK, self.netmask)] {
            let mut interface = interface(card);
            interface.ifr_ifru.ifru_addr = socket_address(address);
            control(socket, request, &mut interface)?;
        }
        let Some(router) = self.router else { return Ok(()) };
        // A router outside the card's own network is reached through the card all the same.
        let host = (router, Ipv4Addr::BROADCAST, None);
        let all = (Ipv4Addr::UNSPECIFIED, Ipv4Addr::UNSPECIFIED, Some(router));
        let inside = u32::from(router) & u32::from(self.netmask) == u32::from(self.address) & u32::from(self.netmask);
        for (destination, netmask, gateway) in [host, all].into_iter().skip(usize::from(inside)) {
            add_route(socket, card, destination, netmask, gateway)?;
        }
        Ok(())
    }
}

fn add_route(
    socket: &UdpSocket,
    card: &str,
    destination: Ipv4Addr,
    netmask: Ipv4Addr,
    gateway: Option<Ipv4Addr>,
) -> io::Result<()> {
    let mut name: Vec<libc::c_char> = card.bytes().chain([0]).map(|byte| byte as libc::c_char).collect();
    // SAFETY: the structure is plain numbers and pointers, for which zeros are valid.
    let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
    route.rt_dst = socket_address(destination);
    route.rt_genmask = socket_address(netmask);
    route.rt_gateway = socket_address(gateway.unwrap_or(Ipv4Addr::UNSPECIFIED));
    route.rt_flags = libc::RTF_UP;
    route.rt_flags |= if gateway.is_some() { libc::RTF_GATEWAY } else { 0 };
    route.rt_flags |= if netmask == Ipv4Addr::BROADCAST { libc::RTF_HOST } else { 0 };
    route.rt_dev = name.as_mut_ptr();
    control(socket, libc::SIOCADDRT, &mut route)
}

/// Switches an interface on.
fn up(socket: &UdpSocket, name: &str) -> io::Result<()> {
    let mut interface = interface(name);
    control(socket, libc::SIOCGIFFLAGS, &mut interface)?;
    // SAFETY: the kernel has just written the flags.
    unsafe { interface.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short };
    control(socket, libc::SIOCSIFFLAGS, &mut interface)
}

fn bind_to(socket: &UdpSocket, name: &str) -> io::Result<()> {
    let (level, option) = (libc::SOL_SOCKET, libc::SO_BINDTODEVICE);
    // SAFETY: the kernel reads as many bytes of the name as it has.
    match unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, name.as_ptr().cast(), name.len() as u32) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn interface(name: &str) -> libc::ifreq {
    // SAFETY: the structure is plain numbers, for which zeros are valid.
    let mut interface: libc::ifreq = unsafe { std::mem::zeroed() };
    let room = interface.ifr_name.len() - 1;
    interface.ifr_name.iter_mut().zip(name.bytes()).take(room).for_each(|(to, from)| *to = from as libc::c_char);
    interface
}

fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let [a, b, c, d] = address.octets().map(|byte| byte as libc::c_char);
    // `struct sockaddr_in`: the port, then the address.
    let sa_data = [0, 0, a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0];
    libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data }
}

/// `T` is what this request takes: `ifreq`, or `rtentry` for routes.
fn control<T>(socket: &UdpSocket, request: libc::Ioctl, argument: &mut T) -> io::Result<()> {
    // SAFETY: every caller passes the structure of its request, which the kernel reads and writes no further than it goes.
    match unsafe { libc::ioctl(socket.as_raw_fd(), request, std::ptr::from_mut(argument)) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn answer(xid: u32, kind: u8, options: &[u8]) -> Vec<u8> {
        let mut bytes = message([2, 0, 0, 0, 0, 1], xid, None);
        bytes.truncate(240);
        bytes[0] = 2;
        bytes[16..20].copy_from_slice(&[10, 0, 2, 15]);
        bytes.extend([MESSAGE, 1, kind]);
        bytes.extend(options);
        bytes
    }

    #[test]
    fn a_lease_is_read() {
        let options =
            [1, 4, 255, 255, 255, 0, 0, 3, 4, 10, 0, 2, 2, 6, 8, 1, 1, 1, 1, 8, 8, 8, 8, 54, 4, 10, 0, 2, 2, 255];
        let (kind, lease) = parse(&answer(7, OFFER, &options), 7).unwrap();
        assert_eq!((kind, lease.address, lease.netmask), (OFFER, [10, 0, 2, 15].into(), [255, 255, 255, 0].into()));
        assert_eq!((lease.router, lease.server), (Some([10, 0, 2, 2].into()), [10, 0, 2, 2].into()));
        assert_eq!(lease.name_servers, [Ipv4Addr::from([1, 1, 1, 1]), [8, 8, 8, 8].into()]);
        assert_eq!(parse(&answer(7, OFFER, &options), 8), None, "somebody else's");
        let request = message([2, 0, 0, 0, 0, 1], 7, Some(&lease));
        assert_eq!(request[240..243], [MESSAGE, 1, REQUEST]);
        assert_eq!(request[243..249], [ADDRESS, 4, 10, 0, 2, 15]);
    }

    proptest! {
        #[test]
        fn any_answer_is_survived(options: Vec<u8>, cut in 0usize..300) {
            let mut bytes = answer(7, ACK, &options);
            bytes.truncate(cut.max(1));
            let _ = parse(&bytes, 7);
        }
    }
}
