//! A tap interface of the host, which connects a network card to the host.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use libc::{TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

use super::packet::{self, HEADER, MAX_FRAME, Offloads, Port, Received};
use crate::memory::RamSlice;

const DEV_TUN: &str = "/dev/net/tun";
/// Reasons why a tap cannot be used. Displays as one sentence.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host has no tap device, or we may not open it.
    #[error("cannot open {DEV_TUN}{hint}")]
    Device {
        /// Advice for the user; may be empty.
        hint: &'static str,
        /// The OS error.
        source: io::Error,
    },
    /// There is no such tap, and this process may not create one.
    #[error(
        "there is no tap {name}, and creating one needs CAP_NET_ADMIN; to create it as root: \
         ip tuntap add {name} mode tap user $USER vnet_hdr{multi_queue} && ip link set {name} up"
    )]
    Missing {
        /// Name of the interface.
        name: String,
        /// Word to add to the command; may be empty.
        multi_queue: &'static str,
    },
    /// The interface is not a tap.
    #[error("{0} is a network interface, but not a tap")]
    Kind(String),
    /// The tap was created without `multi_queue`.
    #[error(
        "tap {0} has a single queue; to create one with several: \
         ip tuntap add {0} mode tap user $USER vnet_hdr multi_queue"
    )]
    SingleQueue(String),
    /// The kernel refused to open the tap.
    #[error("cannot open tap {name}{hint}")]
    Open {
        /// Name of the interface.
        name: String,
        /// Advice for the user; may be empty.
        hint: &'static str,
        /// The OS error.
        source: io::Error,
    },
    /// The tap cannot be configured as needed.
    #[error("cannot {what} tap {name}")]
    Configure {
        /// Step that failed, as a verb.
        what: &'static str,
        /// Name of the interface.
        name: String,
        /// The OS error.
        source: io::Error,
    },
}

/// One queue of a tap.
#[derive(Debug)]
pub struct Tap {
    file: File,
    active: bool,
    /// Buffer for the part of a packet that does not fit the guest's buffers; allocated when it is first needed.
    overflow: Vec<u8>,
    /// Packet that did not fit the guest's buffers.
    kept: Vec<u8>,
}

impl Tap {
    /// Opens all `queues` queues of the tap called `name`. If it does not exist, creates it and brings it up; such a
    /// tap vanishes with the last of its queues.
    pub fn open(name: &str, queues: u16) -> Result<Vec<Tap>, Error> {
        let existing = existing_flags(name)?;
        let multi_queue = queues > 1 || existing.is_some_and(|flags| flags & libc::IFF_MULTI_QUEUE != 0);
        if multi_queue && existing.is_some_and(|flags| flags & libc::IFF_MULTI_QUEUE == 0) {
            return Err(Error::SingleQueue(name.into()));
        }
        let mut taps = Vec::new();
        for _ in 0..queues {
            taps.push(Self::open_queue(name, multi_queue, existing.is_some())?);
        }
        if existing.is_none() {
            bring_up(name).map_err(|source| Error::Configure { what: "bring up", name: name.into(), source })?;
        }
        Ok(taps)
    }

    fn open_queue(name: &str, multi_queue: bool, exists: bool) -> Result<Tap, Error> {
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(DEV_TUN).map_err(
            |source| {
                let hint = match source.kind() {
                    io::ErrorKind::NotFound => " (is the kernel's tun module loaded?)",
                    io::ErrorKind::PermissionDenied => " (usually everybody may open it)",
                    _ => "",
                };
                Error::Device { hint, source }
            },
        )?;
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        let request = Request::new(name, flags | if multi_queue { libc::IFF_MULTI_QUEUE } else { 0 });
        set_interface(&file, request).map_err(|source| match source.raw_os_error() {
            Some(libc::EPERM) if !exists => {
                Error::Missing { name: name.into(), multi_queue: if multi_queue { " multi_queue" } else { "" } }
            }
            errno => {
                let hint = match errno {
                    Some(libc::EPERM) => " (it belongs to another user; create it with 'user $USER' to own it)",
                    Some(libc::EBUSY) => " (another VM uses it)",
                    _ => "",
                };
                Error::Open { name: name.into(), hint, source }
            }
        })?;
        set_header_size(&file).map_err(|source| Error::Configure {
            what: "set the header size of",
            name: name.into(),
            source,
        })?;
        Ok(Tap { file, active: true, overflow: Vec::new(), kept: Vec::new() })
    }
}

impl Port for Tap {
    fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Receives a packet. The kernel writes it directly into guest memory, and the part that does not fit into our
    /// memory, because it cannot report the size in advance.
    fn receive(&mut self, room: &[RamSlice<'_>]) -> io::Result<Received> {
        let space = packet::len(room.get(..packet::MAX_SLICES).unwrap_or(room));
        if !self.kept.is_empty() {
            let len = self.kept.len();
            if len > space {
                return Ok(Received::NoRoom(len));
            }
            packet::copy_to_guest(&self.kept, room);
            self.skip();
            return Ok(Received::Packet(len));
        }
        self.overflow.resize(HEADER + MAX_FRAME, 0);
        let n = packet::read(self.file.as_fd(), room, &mut self.overflow)?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let Some(more) = n.checked_sub(space).filter(|more| *more > 0) else { return Ok(Received::Packet(n)) };
        self.kept.resize(space, 0);
        packet::copy_from_guest(room, &mut self.kept);
        self.kept.extend_from_slice(self.overflow.get(..more).unwrap_or(&self.overflow));
        Ok(Received::NoRoom(self.kept.len()))
    }

    fn skip(&mut self) {
        self.kept.clear();
    }

    fn send(&mut self, header: &[u8; HEADER], frame: &[RamSlice<'_>]) -> io::Result<()> {
        packet::write(self.file.as_fd(), header, frame, 0).map(|_| ())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        let Offloads { csum, tso4, tso6, ecn } = offloads;
        let bits = [(csum, TUN_F_CSUM), (tso4, TUN_F_TSO4), (tso6, TUN_F_TSO6), (ecn, TUN_F_TSO_ECN)];
        let bits = bits.into_iter().map(|(on, bit)| if on { bit } else { 0 }).sum();
        set_offload_bits(&self.file, bits)
    }

    fn set_active(&mut self, active: bool) -> io::Result<()> {
        if active != self.active {
            self.kept.clear();
            set_queue(&self.file, active)?;
            self.active = active;
        }
        Ok(())
    }
}

/// Returns the kernel's flags of the interface of this name, if there is one. Without sysfs there appears to be none.
fn existing_flags(name: &str) -> Result<Option<libc::c_int>, Error> {
    let dir = format!("/sys/class/net/{name}");
    match fs::read_to_string(format!("{dir}/tun_flags")) {
        Ok(text) => {
            let flags = libc::c_int::from_str_radix(text.trim().trim_start_matches("0x"), 16).unwrap_or(libc::IFF_TAP);
            if flags & libc::IFF_TAP == 0 { Err(Error::Kind(name.into())) } else { Ok(Some(flags)) }
        }
        Err(_) if fs::exists(dir).unwrap_or(false) => Err(Error::Kind(name.into())),
        Err(_) => Ok(None),
    }
}

/// `struct ifreq` with flags.
struct Request(libc::ifreq);

impl Request {
    fn new(name: &str, flags: libc::c_int) -> Self {
        let mut ifr_name = [0; libc::IFNAMSIZ];
        let room = libc::IFNAMSIZ - 1;
        ifr_name.iter_mut().zip(name.bytes()).take(room).for_each(|(to, from)| *to = from as libc::c_char);
        let ifr_ifru = libc::__c_anonymous_ifr_ifru { ifru_flags: flags as libc::c_short };
        Request(libc::ifreq { ifr_name, ifr_ifru })
    }
}

fn checked(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[allow(unsafe_code)]
fn set_interface(file: &File, mut request: Request) -> io::Result<()> {
    // SAFETY: the kernel reads and writes one ifreq, whose memory is valid for the call.
    checked(unsafe { ioctl_with_mut_ref(file, libc::TUNSETIFF, &mut request.0) })
}

#[allow(unsafe_code)]
fn set_header_size(file: &File) -> io::Result<()> {
    // SAFETY: the kernel reads one int.
    checked(unsafe { ioctl_with_ref(file, libc::TUNSETVNETHDRSZ, &(HEADER as libc::c_int)) })
}

#[allow(unsafe_code)]
fn set_offload_bits(file: &File, bits: u32) -> io::Result<()> {
    // SAFETY: the argument is a number.
    checked(unsafe { ioctl_with_val(file, libc::TUNSETOFFLOAD, bits.into()) })
}

#[allow(unsafe_code)]
fn set_queue(file: &File, attached: bool) -> io::Result<()> {
    let request = Request::new("", if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE });
    // SAFETY: the kernel reads one ifreq, whose memory is valid for the call.
    checked(unsafe { ioctl_with_ref(file, libc::TUNSETQUEUE, &request.0) })
}

/// Brings the interface up. The request goes through any socket.
#[allow(unsafe_code)]
fn bring_up(name: &str) -> io::Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).or_else(|_| UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)))?;
    let request = Request::new(name, libc::IFF_UP | libc::IFF_RUNNING);
    // SAFETY: the kernel reads one ifreq, whose memory is valid for the call.
    checked(unsafe { ioctl_with_ref(&socket, libc::SIOCSIFFLAGS, &request.0) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestRam;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixDatagram;

    /// Uses a datagram socket in place of a tap, which would need privileges.
    fn setup() -> (GuestRam, Tap, UnixDatagram) {
        let (ours, its) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let file = File::from(OwnedFd::from(ours));
        (GuestRam::anonymous(1 << 20), Tap { file, active: true, overflow: vec![], kept: vec![] }, its)
    }

    #[test]
    fn a_packet_without_room_waits_in_the_port() {
        let (ram, mut tap, its) = setup();
        let packet: Vec<u8> = (0..1000u32).map(|i| (i % 251) as u8).collect();
        let room = [ram.slice(0x1000, 3).unwrap(), ram.slice(0x2000, 496).unwrap(), ram.slice(0x3000, 501).unwrap()];
        for size in [1000, 499, 500] {
            its.send(&packet[..size]).unwrap();
        }
        assert_eq!(tap.receive(&room[..2]).unwrap(), Received::NoRoom(1000));
        assert_eq!(tap.receive(&[]).unwrap(), Received::NoRoom(1000));
        assert_eq!(tap.receive(&room).unwrap(), Received::Packet(1000));
        let mut got = vec![0; 1000];
        packet::copy_from_guest(&room, &mut got);
        assert!(got == packet);
        assert_eq!(tap.receive(&room[..2]).unwrap(), Received::Packet(499), "exactly");
        assert_eq!(tap.receive(&room[..2]).unwrap(), Received::NoRoom(500));
        tap.skip();
        assert_eq!(tap.receive(&room).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn a_packet_is_sent_as_one() {
        let (ram, mut tap, its) = setup();
        ram.write(0, b"abcdefghijklmnopqrstuvwxyz").unwrap();
        tap.send(&[7; HEADER], &[ram.slice(0, 1).unwrap(), ram.slice(2, 3).unwrap()]).unwrap();
        let mut got = [0; 100];
        let n = its.recv(&mut got).unwrap();
        assert_eq!(got[..n], [&[7; HEADER][..], b"acde"].concat());
    }

    #[test]
    fn interfaces_that_are_no_taps() {
        assert_eq!(existing_flags("lo").unwrap_err().to_string(), "lo is a network interface, but not a tap");
        assert_eq!(existing_flags("no-such-one").unwrap(), None);
    }
}
