//! Network of the guest: the loopback interface, and the first card as configured by DHCP (RFC 2131).

#![allow(unsafe_code)]

use std::fs;
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

use super::{Error, Result, cannot};

/// Number of requests for an answer, and the time to wait after each.
const TRIES: u32 = 8;
const WAIT: Duration = Duration::from_millis(700);

const BROADCAST_FLAG: u16 = 0x8000;
const COOKIE: [u8; 4] = [99, 130, 83, 99];
/// Option numbers (RFC 2132), then message types.
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

/// Switches on the loopback interface, because programs expect `localhost`. A kernel without networking has none.
pub(super) fn loopback() -> Result<()> {
    let Ok(socket) = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)) else { return Ok(()) };
    up(&socket, "lo").map_err(cannot("set up the interface lo"))
}

/// Sets up the first card; returns the name servers.
pub(super) fn configure() -> Result<Vec<Ipv4Addr>> {
    let card = card()?;
    let text = fs::read_to_string(format!("/sys/class/net/{card}/address")).unwrap_or_default();
    let mac: Vec<u8> = text.trim().split(':').map_while(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    let mac: [u8; 6] = mac.try_into().map_err(|_| Error::Other(format!("{card} has no address")))?;
    let what = || format!("set up the network card {card}");
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).map_err(cannot(what()))?;
    up(&socket, &card).map_err(cannot(what()))?;
    let lease = Wire::open(&card).and_then(|wire| ask(&wire, mac));
    let lease = lease.map_err(cannot(format!("get an address for {card} by DHCP")))?;
    lease.apply(&socket, &card).map_err(cannot(what()))?;
    Ok(lease.name_servers)
}

/// Size in bytes of an IP header without options, and of a UDP header.
const IP: usize = 20;
const UDP: usize = 8;

/// Raw IP access to a card that has no address yet. Servers may answer to the address that the card will get; a packet
/// socket receives those answers too.
struct Wire {
    socket: OwnedFd,
    everybody: libc::sockaddr_ll,
}

impl Wire {
    fn open(card: &str) -> io::Result<Self> {
        let index = fs::read_to_string(format!("/sys/class/net/{card}/ifindex"))?;
        let protocol = (libc::ETH_P_IP as u16).to_be();
        // SAFETY: the call creates a descriptor, which is checked before it is owned.
        let socket = unsafe {
            match libc::socket(libc::AF_PACKET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, i32::from(protocol)) {
                -1 => return Err(io::Error::last_os_error()),
                fd => OwnedFd::from_raw_fd(fd),
            }
        };
        let everybody = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: protocol,
            sll_ifindex: index.trim().parse().map_err(io::Error::other)?,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 6,
            sll_addr: [255, 255, 255, 255, 255, 255, 0, 0],
        };
        let wire = Wire { socket, everybody };
        let (address, len) = (std::ptr::from_ref(&wire.everybody).cast(), size_of::<libc::sockaddr_ll>() as u32);
        // SAFETY: the address is as long as `len` says.
        match unsafe { libc::bind(wire.socket.as_raw_fd(), address, len) } {
            0 => Ok(wire),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Broadcasts a message from the unspecified address.
    fn send(&self, message: &[u8]) -> io::Result<()> {
        let packet = wrap(message);
        let (address, len) = (std::ptr::from_ref(&self.everybody).cast(), size_of::<libc::sockaddr_ll>() as u32);
        // SAFETY: packet and address are as long as the given lengths.
        let sent =
            unsafe { libc::sendto(self.socket.as_raw_fd(), packet.as_ptr().cast(), packet.len(), 0, address, len) };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Returns the next message for a client, if one arrives before `deadline`.
    fn receive(&self, deadline: Instant) -> Option<Vec<u8>> {
        loop {
            let left = deadline.checked_duration_since(Instant::now())?;
            let timeout = rustix::event::Timespec::try_from(left).ok()?;
            let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
            if poll(&mut fds, Some(&timeout)).ok()? == 0 {
                return None;
            }
            let mut buffer = [0; 2048];
            let len = rustix::io::read(&self.socket, &mut buffer).ok()?;
            if let Some(message) = unwrap(buffer.get(..len)?) {
                return Some(message.to_vec());
            }
        }
    }
}

/// Builds an IP packet (RFC 791) with a UDP datagram (RFC 768) from port 68 to port 67.
fn wrap(message: &[u8]) -> Vec<u8> {
    let udp = (UDP + message.len()) as u16;
    let mut packet = vec![0x45, 0];
    packet.extend((IP as u16 + udp).to_be_bytes());
    packet.extend([0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255]);
    let sum: u32 = packet.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let sum = !((sum & 0xFFFF) + (sum >> 16)) as u16;
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend([0, 68, 0, 67]);
    packet.extend(udp.to_be_bytes());
    packet.extend([0, 0]); // no checksum
    packet.extend(message);
    packet
}

/// Returns the payload of a packet that is a datagram to port 68.
fn unwrap(packet: &[u8]) -> Option<&[u8]> {
    let header = usize::from(*packet.first()? & 0xF) * 4;
    let datagram = packet.get(header.max(IP)..)?;
    (packet.get(9) == Some(&17) && datagram.get(2..4)? == [0, 68]).then(|| datagram.get(UDP..)).flatten()
}

/// Returns the name of the first Ethernet card.
fn card() -> Result<String> {
    let entries = fs::read_dir("/sys/class/net").map_err(cannot("read /sys/class/net"))?;
    let mut names: Vec<String> = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into()).collect();
    names.sort();
    let ethernet =
        |name: &String| fs::read_to_string(format!("/sys/class/net/{name}/type")).is_ok_and(|kind| kind.trim() == "1");
    names.into_iter().find(ethernet).ok_or_else(|| Error::Other("the guest has no network card (virtio_net)".into()))
}

/// Configuration that a DHCP server offers.
#[derive(Debug, PartialEq, Eq)]
struct Lease {
    address: Ipv4Addr,
    netmask: Ipv4Addr,
    router: Option<Ipv4Addr>,
    server: Ipv4Addr,
    name_servers: Vec<Ipv4Addr>,
}

fn ask(wire: &Wire, mac: [u8; 6]) -> io::Result<Lease> {
    let xid = u32::from_be_bytes([mac[2], mac[3], mac[4], mac[5]]) ^ 0x7669_7265;
    let mut offer: Option<Lease> = None;
    for _ in 0..TRIES {
        wire.send(&message(mac, xid, offer.as_ref()))?;
        let deadline = Instant::now() + WAIT;
        while let Some(answer) = wire.receive(deadline) {
            match parse(&answer, xid) {
                Some((ACK, lease)) if offer.is_some() => return Ok(lease),
                Some((OFFER, lease)) if offer.is_none() => {
                    offer = Some(lease);
                    break;
                }
                _ => {}
            }
        }
    }
    Err(io::Error::new(io::ErrorKind::TimedOut, "no server answers"))
}

/// Builds a DISCOVER, or a REQUEST for the offer.
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

/// Parses an answer to `xid`: returns its type and its lease.
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
        // A router outside the card's own network is nevertheless reached through the card.
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

fn interface(name: &str) -> libc::ifreq {
    // SAFETY: the structure is plain numbers, for which zeros are valid.
    let mut interface: libc::ifreq = unsafe { std::mem::zeroed() };
    let room = interface.ifr_name.len() - 1;
    interface.ifr_name.iter_mut().zip(name.bytes()).take(room).for_each(|(to, from)| *to = from as libc::c_char);
    interface
}

fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let [a, b, c, d] = address.octets().map(|byte| byte as libc::c_char);
    // Layout of `struct sockaddr_in`: the port, then the address.
    let sa_data = [0, 0, a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0];
    libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data }
}

/// Performs an ioctl whose argument is `T`: `ifreq`, or `rtentry` for routes.
fn control<T>(socket: &UdpSocket, request: libc::Ioctl, argument: &mut T) -> io::Result<()> {
    // SAFETY: every caller passes the structure of its request; the kernel accesses no memory beyond it.
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

    #[test]
    fn packets_are_packets() {
        let packet = wrap(b"hello!");
        assert_eq!(packet.len(), 34);
        let sum: u32 = packet[..20].chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
        assert_eq!((sum & 0xFFFF) + (sum >> 16), 0xFFFF);
        assert_eq!(unwrap(&packet), None, "it is for a server");
        let mut answer = packet;
        answer[23] = 68;
        assert_eq!(unwrap(&answer), Some(&b"hello!"[..]));
        for len in 0..answer.len() {
            let _ = unwrap(&answer[..len]);
        }
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
