//! Virtqueues that another process or the kernel serves: their description ([`Ring`]), and the kernel's vhost-net,
//! which moves packets between virtqueues and a tap without this process.
//!
//! The kernel uses the addresses at which guest memory is mapped in this process, which has called `VHOST_SET_OWNER`.
//! Kicks and interrupts are eventfds, so they bypass this process too.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref, ioctl_with_ref};

use crate::memory::RamRegion;

/// Path of the vhost-net device.
pub const DEV_VHOST_NET: &str = "/dev/vhost-net";

/// Description of one virtqueue for whatever serves it. It has been checked to lie in guest memory.
#[derive(Clone, Copy, Debug)]
pub struct Ring<'a> {
    /// Number of the virtqueue, as the serving side counts.
    pub index: u16,
    /// Number of entries, a power of two.
    pub size: u16,
    /// Next available entry to take.
    pub next_avail: u16,
    /// Guest-physical address of the descriptor table.
    pub desc: u64,
    /// Guest-physical address of the available ring.
    pub avail: u64,
    /// Guest-physical address of the used ring.
    pub used: u64,
    /// Eventfd that the driver signals when there are new buffers.
    pub kick: &'a EventFd,
    /// Eventfd to signal when there are used buffers.
    pub call: &'a EventFd,
}

/// Reasons why vhost-net cannot be used. Displays as one sentence.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The device is missing or cannot be opened.
    #[error("cannot open {DEV_VHOST_NET}{hint}")]
    Open {
        /// Advice for the user; may be empty.
        hint: &'static str,
        /// The OS error.
        source: io::Error,
    },
    /// The kernel refused the setup.
    #[error("cannot set up {DEV_VHOST_NET}")]
    SetUp(#[source] io::Error),
}

use requests::*;

/// Requests of `linux/vhost.h`.
#[allow(missing_docs)] // the macros create functions of these names
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

/// `struct vhost_memory` with room for all regions that [`crate::memory::GuestRam`] may have.
#[repr(C)]
struct MemoryTable {
    regions: u32,
    padding: u32,
    table: [MemoryRegion; MAX_REGIONS],
}

/// Maximum number of regions; fewer than the kernel's default limit of 64.
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

/// A pair of virtqueues that the kernel serves: number 0 receives and number 1 transmits.
#[derive(Debug)]
pub struct VhostNet {
    file: File,
}

impl VhostNet {
    /// Opens the device and makes this process its owner.
    pub fn open() -> Result<Self, Error> {
        let file = OpenOptions::new().read(true).write(true).open(DEV_VHOST_NET).map_err(|source| {
            let hint = match source.kind() {
                io::ErrorKind::NotFound => " (is the kernel's vhost_net module loaded? try 'modprobe vhost_net')",
                io::ErrorKind::PermissionDenied => {
                    " (root owns it; try the group kvm, or 'setfacl -m u:$USER:rw /dev/vhost-net' as root)"
                }
                _ => "",
            };
            Error::Open { hint, source }
        })?;
        set_owner(&file).map_err(Error::SetUp)?;
        Ok(VhostNet { file })
    }

    /// Returns the virtqueue and network features that the kernel supports.
    pub fn features(&self) -> Result<u64, Error> {
        features(&self.file).map_err(Error::SetUp)
    }

    /// Describes guest memory and the virtqueues to the kernel; they are not served before [`VhostNet::plug`].
    /// `features` is the subset of [`VhostNet::features`] that the driver negotiated.
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

    /// Connects virtqueue `index` to a tap and starts serving it; or, with `None`, disconnects it. In the latter case
    /// nothing is in flight when this returns.
    pub fn plug(&self, index: u16, tap: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let backend = VringFile { index: index.into(), fd: tap.map_or(-1, |tap| tap.as_raw_fd()) };
        set_file(&self.file, VHOST_NET_SET_BACKEND(), backend).map_err(named("VHOST_NET_SET_BACKEND"))
    }

    /// Returns the next available entry of an unplugged virtqueue.
    pub fn position(&self, index: u16) -> io::Result<u16> {
        let num = get_base(&self.file, index.into()).map_err(named("VHOST_GET_VRING_BASE"))?;
        u16::try_from(num).map_err(io::Error::other)
    }
}

/// Names the failed call in an error; for `map_err`.
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

/// Gives guest memory to the kernel, which from now on reads and writes at these addresses as the guest directs. They
/// must be guest memory, which is never unmapped while a machine exists.
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
    // SAFETY: the kernel reads the header and the number of regions that it states, which `table` has. They refer to
    // memory of a GuestRam, which contains only the guest's data and into which no reference points.
    checked(unsafe { ioctl_with_ref(file, VHOST_SET_MEM_TABLE(), &table) })
}

#[allow(unsafe_code)]
fn set_ring(file: &File, request: libc::c_ulong, state: &VringState) -> io::Result<()> {
    // SAFETY: all requests passed to this function read a VringState.
    checked(unsafe { ioctl_with_ref(file, request, state) })
}

#[allow(unsafe_code)]
fn set_addr(file: &File, addr: &VringAddr) -> io::Result<()> {
    // SAFETY: the kernel reads a VringAddr. The ring that it describes lies in guest memory; see `set_memory`.
    checked(unsafe { ioctl_with_ref(file, VHOST_SET_VRING_ADDR(), addr) })
}

#[allow(unsafe_code)]
fn set_file(file: &File, request: libc::c_ulong, argument: VringFile) -> io::Result<()> {
    // SAFETY: all requests passed to this function read a VringFile; the kernel takes its own reference to the file.
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

    /// Compares the request numbers with those of `linux/vhost.h`.
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
