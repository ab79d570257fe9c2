//! Memory that vireo shares with KVM besides guest RAM: the ring of coalesced writes, and the flag that makes a vCPU
//! leave the guest.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use kvm_bindings::{KVM_COALESCED_MMIO_PAGE_OFFSET, kvm_coalesced_mmio, kvm_coalesced_mmio_ring, kvm_run};
use kvm_ioctls::VcpuFd;

const PAGE: usize = 4096;

/// A second mapping of one page of a vCPU descriptor, with a lifetime of its own.
struct Page(NonNull<u8>);

// SAFETY: the page is shared with the kernel and only ever accessed through atomics or volatile reads.
unsafe impl Send for Page {}
// SAFETY: as above.
unsafe impl Sync for Page {}

impl Page {
    fn map(vcpu: &VcpuFd, page: usize) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice; the result is checked.
        let addr = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                (page * PAGE) as libc::off_t,
            )
        };
        if addr == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(addr.cast()).map(Page).ok_or_else(|| io::Error::other("mapped at address 0"))
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: this is exactly the mapping created in `map`, and nothing outlives it.
        unsafe { libc::munmap(self.0.as_ptr().cast(), PAGE) };
    }
}

/// The `immediate_exit` flag of a vCPU's run page, for other threads.
pub struct ImmediateExit(Page);

impl ImmediateExit {
    /// Maps the flag of `vcpu`.
    pub fn new(vcpu: &VcpuFd) -> io::Result<Self> {
        Page::map(vcpu, 0).map(ImmediateExit)
    }

    /// With `true`, KVM_RUN finishes a pending port or MMIO access and then immediately returns `EINTR`.
    pub fn set(&self, on: bool) {
        // SAFETY: the flag is one byte inside the mapped page, aligned for a byte, and lives as long as `self`.
        let flag = unsafe { AtomicU8::from_ptr(self.0.0.as_ptr().add(std::mem::offset_of!(kvm_run, immediate_exit))) };
        flag.store(u8::from(on), Ordering::SeqCst);
    }
}

/// One write that KVM collected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CoalescedWrite {
    /// Port or MMIO address.
    pub addr: u64,
    /// True if `addr` is a port.
    pub pio: bool,
    /// Bytes of the write; only the first `len` are valid.
    pub data: [u8; 8],
    /// Length of the write, 1 to 8.
    pub len: usize,
}

/// The ring of writes that KVM collected without leaving the guest (Documentation/virt/kvm/api.rst, 4.116). One ring
/// serves all vCPUs of a VM, so draining it takes its lock, which keeps the writes in order.
pub struct CoalescedRing {
    page: Page,
    drain: Mutex<()>,
}

const ENTRIES: u32 = ((PAGE - size_of::<kvm_coalesced_mmio_ring>()) / size_of::<kvm_coalesced_mmio>()) as u32;

impl CoalescedRing {
    /// Maps the ring through any vCPU of the VM.
    pub fn new(vcpu: &VcpuFd) -> io::Result<Self> {
        let page = Page::map(vcpu, KVM_COALESCED_MMIO_PAGE_OFFSET as usize)?;
        Ok(CoalescedRing { page, drain: Mutex::new(()) })
    }

    fn index(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: both indices are aligned u32 at the start of the page, which lives as long as `self`.
        unsafe { AtomicU32::from_ptr(self.page.0.as_ptr().add(offset).cast()) }
    }

    /// Passes every collected write to `take`, oldest first, and returns their number.
    pub fn drain(&self, mut take: impl FnMut(CoalescedWrite)) -> u64 {
        let first = self.index(std::mem::offset_of!(kvm_coalesced_mmio_ring, first));
        let last = self.index(std::mem::offset_of!(kvm_coalesced_mmio_ring, last));
        if first.load(Ordering::Relaxed) == last.load(Ordering::Acquire) {
            return 0;
        }
        let _lock = self.drain.lock().unwrap_or_else(PoisonError::into_inner);
        let mut count = 0;
        loop {
            let at = first.load(Ordering::Relaxed);
            if at == last.load(Ordering::Acquire) || at >= ENTRIES {
                return count;
            }
            let offset = size_of::<kvm_coalesced_mmio_ring>() + at as usize * size_of::<kvm_coalesced_mmio>();
            // SAFETY: `at` was checked against the number of entries in the page; an entry between first and last is
            // not written by the kernel until `first` moves on.
            let entry = unsafe { self.page.0.as_ptr().add(offset).cast::<kvm_coalesced_mmio>().read_volatile() };
            // SAFETY: both members of the union are plain u32.
            let pio = unsafe { entry.__bindgen_anon_1.pio } == 1;
            take(CoalescedWrite { addr: entry.phys_addr, pio, data: entry.data, len: (entry.len as usize).min(8) });
            first.store((at + 1) % ENTRIES, Ordering::Release);
            count += 1;
        }
    }
}
