//! Rings that somebody else serves: what they are told of one ([`Ring`]), and the kernel's vhost-net, which moves packets
//! between rings and a tap without this process.
//!
//! The kernel works with the addresses at which guest memory is mapped here, on behalf of the process that has called
//! `VHOST_SET_OWNER`. Kicks and interrupts are eventfds, so that neither passes through this process either.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref, ioctl_with_ref};

use crate::memory::RamRegion;

/// The device of vhost-net.
pub const DEV_VHOST_NET: &str = "/dev/vhost-net";

/// One ring, as whoever shall serve it is told of it. It was checked to lie in guest memory.
#[derive(Clone, Copy, Debug)]
pub struct Ring<'a> {
    /// Its number, as the other side counts.
    pub index: u16,
    /// Entries, a power of two.
    pub size: u16,
    /// The next available entry to take.
    pub next_avail: u16,
    /// Descriptor table, guest-physical.
    pub desc: u64,
    /// Available ring, guest-physical.
    pub avail: u64,
    /// Used ring, guest-physical.
    pub used: u64,
    /// Signalled by the driver for new buffers.
    pub kick: &'a EventFd,
    /// To be signalled for used buffers.
    pub call: &'a EventFd,
}

/// vhost-net cannot be used. Displays as one sentence.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such device, or not for us.
    #[error("cannot open {DEV_VHOST_NET}{hint}")]
    Open {
        /// What would help; may be empty.
        hint: &'static str,
        /// The OS error.
        source: io::Error,
    },
    /// It refused to be set up.
    #[error("cannot set up {DEV_VHOST_NET}")]
    SetUp(#[source] io::Error),
}

use requests::*;

/// `linux/vhost.h`.
#[allow(missing_docs)] // the macros make functions of their names
mod requests {
    use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iow_nr, ioctl_iowr_nr};

    use super::{VringAddr, VringFile, VringState};

    const VHOST: u32 = 0xAF;
    ioctl_ior_nr!(VHOST_GET_FEATURES, VHOST, 0x00, u64);
    ioctl_iow_nr!(VHOST_SET_FEATURES, VHOST, 0x00, u64);
    ioctl_io_nr!(VHOST_SET_OWNER, VHOST, 0x01);
    ioctl_iow_nr!(VHOST_SET_MEM_TABLE, VHOST, 0x03, u64);
    ioctl_iow_nr!(VHOST_SET_VRING_NUM, VHOST, 0x10, VringState);
    ioctl_iow_nr!(VHOST_SET_VRING_ADDR, VHOST, 0x11, VringAddr);
    ioctl_iow_nr!(VHOST_SET_VRING_BASE, VHOST, 0x12, VringState);
    ioctl_iowr_nr!(VHOST_GET_VRING_BASE, VHOST, 0x12, VringState);
    ioctl_iow_nr!(VHOST_SET_VRING_KICK, VHOST, 0x20, VringFile);
    ioctl_iow_nr!(VHOST_SET_VRING_CALL, VHOST, 0x21, VringFile);
    ioctl_iow_nr!(VHOST_NET_SET_BACKEND, VHOST, 0x30, VringFile);
}

/// `struct vhost_vring_state`.
#[repr(C)]
#[derive(Clone, Copy)]
struct VringState {
    index: u32,
    num: u32,
}

/// `struct vhost_vring_file`.
#[repr(C)]
#[derive(Clone, Copy)]
struct VringFile {
    index: u32,
    fd: RawFd,
}

/// `struct vhost_vring_addr`.
#[repr(C)]
#[derive(Clone, Copy)]
struct VringAddr {
    index: u32,
    flags: u32,
    desc: u64,
    used: u64,
    avail: u64,
    log: u64,
}

/// `struct vhost_memory` with room for what [`crate::memory::GuestRam`] may have.
#[repr(C)]
struct MemoryTable {
    regions: u32,
    padding: u32,
    table: [MemoryRegion; MAX_REGIONS],
}

/// Fewer than the kernel takes by default, 64.
const MAX_REGIONS: usize = 32;

/// `struct vhost_memory_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct MemoryRegion {
    guest: u64,
    size: u64,
    host: u64,
    padding: u64,
}

/// A pair of rings, number 0 to receive and 1 to transmit, that the kernel serves.
#[derive(Debug)]
pub struct VhostNet {
    file: File,
}

impl VhostNet {
    /// Opens the device and makes this process its owner.
    pub fn open() -> Result<Self, Error> {
        let file = OpenOptions::new().read(true).write(true).open(DEV_VHOST_NET).map_err(|source| {
            let hint = match source.kind() {
                io::ErrorKind::NotFound => " (is the kernel's vhost_net module loaded? 'modprobe vhost_net' does it)",
                io::ErrorKind::PermissionDenied => {
                    " (its owner is root; the group kvm may have it, or 'setfacl -m u:$USER:rw /dev/vhost-net' gives it)"
                }
                _ => "",
            };
            Error::Open { hint, source }
        })?;
        set_owner(&file).map_err(Error::SetUp)?;
        Ok(VhostNet { file })
    }

    /// Features of rings and of network cards that the kernel knows.
    pub fn features(&self) -> Result<u64, Error> {
        features(&self.file).map_err(Error::SetUp)
    }

    /// Tells it of memory and of its rings, which then wait for [`VhostNet::plug`]. `features` are what the driver
    /// negotiated of [`VhostNet::features`].
    pub fn set_up(&self, features: u64, memory: &[RamRegion], rings: &[Ring<'_>]) -> io::Result<()> {
        set_features(&self.file, features).map_err(named("VHOST_SET_FEATURES"))?;
        set_memory(&self.file, memory).map_err(named("VHOST_SET_MEM_TABLE"))?;
        for ring in rings {
            let index = u32::from(ring.index);
            let host = |addr: u64| {
                let region = memory.iter().find(|r| (r.start..r.end()).contains(&addr));
                region.map(|r| r.host_addr + (addr - r.start)).ok_or(io::ErrorKind::InvalidInput)
            };
            let state = |num| VringState { index, num };
            set_ring(&self.file, VHOST_SET_VRING_NUM(), &state(ring.size.into()))
                .map_err(named("VHOST_SET_VRING_NUM"))?;
            set_ring(&self.file, VHOST_SET_VRING_BASE(), &state(ring.next_avail.into()))
                .map_err(named("VHOST_SET_VRING_BASE"))?;
            let (desc, used, avail) = (host(ring.desc)?, host(ring.used)?, host(ring.avail)?);
            let addr = VringAddr { index, flags: 0, desc, used, avail, log: 0 };
            set_addr(&self.file, &addr).map_err(named("VHOST_SET_VRING_ADDR"))?;
            for (request, name, fd) in [
                (VHOST_SET_VRING_CALL(), "VHOST_SET_VRING_CALL", ring.call),
                (VHOST_SET_VRING_KICK(), "VHOST_SET_VRING_KICK", ring.kick),
            ] {
                set_file(&self.file, request, VringFile { index, fd: fd.as_raw_fd() }).map_err(named(name))?;
            }
        }
        Ok(())
    }

    /// Connects ring `index` with a tap: it is served from now on. Or with nothing: when this returns, nothing is in
    /// flight.
    pub fn plug(&self, index: u16, tap: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let backend = VringFile { index: index.into(), fd: tap.map_or(-1, |tap| tap.as_raw_fd()) };
        set_file(&self.file, VHOST_NET_SET_BACKEND(), backend).map_err(named("VHOST_NET_SET_BACKEND"))
    }

    /// The next available entry of an unplugged ring.
    pub fn position(&self, index: u16) -> io::Result<u16> {
        let num = get_base(&self.file, index.into()).map_err(named("VHOST_GET_VRING_BASE"))?;
        u16::try_from(num).map_err(io::Error::other)
    }
}

/// For `map_err`: says which call it was.
fn named(what: &'static str) -> impl Fn(io::Error) -> io::Error {
    move |e| io::Error::new(e.kind(), format!("{what} of {DEV_VHOST_NET}: {e}"))
}

fn checked(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[allow(unsafe_code)]
fn set_owner(file: &File) -> io::Result<()> {
    // SAFETY: there is no argument.
    checked(unsafe { ioctl(file, VHOST_SET_OWNER()) })
}

#[allow(unsafe_code)]
fn features(file: &File) -> io::Result<u64> {
    let mut features = 0u64;
    // SAFETY: the kernel writes a u64, which is ours.
    checked(unsafe { ioctl_with_mut_ref(file, VHOST_GET_FEATURES(), &mut features) })?;
    Ok(features)
}

#[allow(unsafe_code)]
fn set_features(file: &File, features: u64) -> io::Result<()> {
    // SAFETY: the kernel reads a u64.
    checked(unsafe { ioctl_with_ref(file, VHOST_SET_FEATURES(), &features) })
}

/// The kernel reads and writes at these addresses from now on, as the guest tells it: they must be guest memory, which is
/// never unmapped while a machine exists.
#[allow(unsafe_code)]
fn set_memory(file: &File, memory: &[RamRegion]) -> io::Result<()> {
    if memory.len() > MAX_REGIONS {
        return Err(io::Error::other("guest memory has too many regions"));
    }
    let mut table =
        MemoryTable { regions: memory.len() as u32, padding: 0, table: [MemoryRegion::default(); MAX_REGIONS] };
    for (to, from) in table.table.iter_mut().zip(memory) {
        *to = MemoryRegion { guest: from.start, size: from.len, host: from.host_addr, padding: 0 };
    }
    // SAFETY: the kernel reads the header and as many regions as it says, which `table` has. What they name is memory
    // of a GuestRam, which only the guest's data is in and which no reference points into.
    checked(unsafe { ioctl_with_ref(file, VHOST_SET_MEM_TABLE(), &table) })
}

#[allow(unsafe_code)]
fn set_ring(file: &File, request: libc::c_ulong, state: &VringState) -> io::Result<()> {
    // SAFETY: the requests that this is called with read a VringState.
    checked(unsafe { ioctl_with_ref(file, request, state) })
}

#[allow(unsafe_code)]
fn set_addr(file: &File, addr: &VringAddr) -> io::Result<()> {
    // SAFETY: the kernel reads a VringAddr. The ring that it describes lies in guest memory; see `set_memory`.
    checked(unsafe { ioctl_with_ref(file, VHOST_SET_VRING_ADDR(), addr) })
}

#[allow(unsafe_code)]
fn set_file(file: &File, request: libc::c_ulong, argument: VringFile) -> io::Result<()> {
    // SAFETY: the requests that this is called with read a VringFile; the kernel takes its own reference to the file.
    checked(unsafe { ioctl_with_ref(file, request, &argument) })
}

#[allow(unsafe_code)]
fn get_base(file: &File, index: u32) -> io::Result<u32> {
    let mut state = VringState { index, num: 0 };
    // SAFETY: the kernel reads and writes a VringState, which is ours.
    checked(unsafe { ioctl_with_mut_ref(file, VHOST_GET_VRING_BASE(), &mut state) })?;
    Ok(state.num)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `linux/vhost.h` has them.
    #[test]
    fn request_numbers() {
        assert_eq!(VHOST_GET_FEATURES(), 0x8008_AF00);
        assert_eq!(VHOST_SET_OWNER(), 0xAF01);
        assert_eq!(VHOST_SET_MEM_TABLE(), 0x4008_AF03);
        assert_eq!(VHOST_SET_VRING_ADDR(), 0x4028_AF11);
        assert_eq!(VHOST_GET_VRING_BASE(), 0xC008_AF12);
        assert_eq!(VHOST_NET_SET_BACKEND(), 0x4008_AF30);
    }
}
