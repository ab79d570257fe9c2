//! The in-kernel part of a VM: /dev/kvm, VM and vCPU descriptors, memory slots, interrupts and eventfds.
//!
//! Errors contain the name of the ioctl that failed and its OS error. This is a thin layer: policy is in [`cpuid`],
//! state is in the vCPU, decisions are in [`crate::machine`].

pub mod cpuid;
pub mod debug;
pub mod dump;
pub mod exit;
mod legacy;
pub mod ring;

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use kvm_bindings::{KVM_PMU_CAP_DISABLE, kvm_enable_cap, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, IoEventAddress, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::irq::IrqLine;
use crate::layout;
use crate::memory::GuestRam;

/// Path of the KVM device.
pub const DEV_KVM: &str = "/dev/kvm";

/// API version of every KVM since Linux 2.6.22 (Documentation/virt/kvm/api.rst, 4.1).
const API_VERSION: i32 = 12;

/// Problems with the host's KVM. [`crate::doctor::device::remedy`] suggests fixes.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The device node does not exist.
    #[error("{} does not exist", .0.display())]
    Missing(PathBuf),
    /// The user may not open it.
    #[error("no permission to open {}", .0.display())]
    Permission(PathBuf),
    /// The device cannot be opened for another reason.
    #[error("cannot open {}", .0.display())]
    Open(PathBuf, #[source] io::Error),
    /// The file is not KVM; the text says what it is.
    #[error("{path} is {1}, not the KVM device", path = .0.display())]
    NotKvm(PathBuf, &'static str),
    /// KVM has an unknown API version.
    #[error("{path} speaks KVM API version {1}, not {API_VERSION}", path = .0.display())]
    Version(PathBuf, i32),
    /// Another hypervisor is using the processor's virtualization.
    #[error("KVM cannot create a VM: another hypervisor (VirtualBox, VMware) is using the processor's virtualization")]
    Busy,
    /// The kernel lacks something that vireo needs.
    #[error("this host's KVM lacks {0}")]
    Lacks(&'static str),
    /// KVM_SET_MSRS accepted fewer MSRs than it was given.
    #[error("this host's KVM refuses to set a guest's MSR {index:#x} to {value:#x}")]
    Msr {
        /// The first MSR that was refused.
        index: u32,
        /// The value that was refused.
        value: u64,
    },
    /// An ioctl failed.
    #[error("{0} failed")]
    Ioctl(&'static str, #[source] io::Error),
}

/// Returns a function for `map_err` that adds the ioctl's name.
pub fn failed(name: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
    move |e| Error::Ioctl(name, io::Error::from_raw_os_error(e.errno()))
}

/// An open /dev/kvm with API version 12.
pub struct Kvm(kvm_ioctls::Kvm);

impl Kvm {
    /// Opens `path`, normally [`DEV_KVM`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let not_kvm = || Error::NotKvm(path.into(), kind(path));
        let c_path = std::ffi::CString::new(path.as_os_str().as_bytes()).map_err(|_| not_kvm())?;
        let kvm = kvm_ioctls::Kvm::new_with_path(c_path).map_err(|e| match e.errno() {
            libc::ENOENT | libc::ENODEV | libc::ENXIO => Error::Missing(path.into()),
            libc::EACCES | libc::EPERM => Error::Permission(path.into()),
            libc::EISDIR => not_kvm(),
            errno => Error::Open(path.into(), io::Error::from_raw_os_error(errno)),
        })?;
        match kvm.get_api_version() {
            API_VERSION => Ok(Kvm(kvm)),
            version if version < 0 => Err(not_kvm()),
            version => Err(Error::Version(path.into(), version)),
        }
    }

    /// Returns the handle of the kvm-ioctls crate.
    pub fn inner(&self) -> &kvm_ioctls::Kvm {
        &self.0
    }

    /// Returns the maximum number of vCPUs of a VM.
    pub fn max_vcpus(&self) -> usize {
        self.0.get_max_vcpus().min(self.0.get_max_vcpu_id())
    }

    /// Returns the frequency of a guest's TSC in kHz, if KVM knows it. Only a vCPU has one, so this creates a temporary
    /// vCPU.
    pub fn tsc_khz(&self) -> Option<u32> {
        let vm = self.create_vm_fd().ok()?;
        vm.create_vcpu(0).ok()?.get_tsc_khz().ok().filter(|khz| *khz > 0)
    }

    /// Creates an empty VM with the in-kernel interrupt controllers and timer (PIT).
    pub fn create_vm(&self) -> Result<Vm, Error> {
        for (cap, name) in [
            (Cap::Irqchip, "the in-kernel irqchip"),
            (Cap::Irqfd, "irqfd"),
            (Cap::Ioeventfd, "ioeventfd"),
            (Cap::UserMemory, "user memory slots"),
            (Cap::ImmediateExit, "immediate_exit"),
            (Cap::ExtCpuid, "KVM_SET_CPUID2"),
        ] {
            if !self.0.check_extension(cap) {
                return Err(Error::Lacks(name));
            }
        }
        let fd = self.create_vm_fd()?;
        // The performance counters would cost MSR exits at boot and would put host state into a snapshot.
        let mut no_pmu = kvm_enable_cap { cap: kvm_bindings::KVM_CAP_PMU_CAPABILITY, ..Default::default() };
        no_pmu.args[0] = u64::from(KVM_PMU_CAP_DISABLE);
        let _ = fd.enable_cap(&no_pmu);
        fd.set_identity_map_address(layout::KVM_IDENTITY_MAP).map_err(failed("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.set_tss_address(layout::KVM_TSS as usize).map_err(failed("KVM_SET_TSS_ADDR"))?;
        fd.create_irq_chip().map_err(failed("KVM_CREATE_IRQCHIP"))?;
        legacy::create_timer(&fd)?;
        Ok(Vm { fd })
    }

    /// Creates an empty VM.
    pub fn create_vm_fd(&self) -> Result<VmFd, Error> {
        loop {
            match self.0.create_vm() {
                // A signal interrupts the kernel while it sets up its notifiers; try again.
                Err(e) if e.errno() == libc::EINTR => {}
                Err(e) if e.errno() == libc::EBUSY => return Err(Error::Busy),
                result => return result.map_err(failed("KVM_CREATE_VM")),
            }
        }
    }
}

/// Returns the kind of the file at `path`, which is not a KVM device.
fn kind(path: &Path) -> &'static str {
    match std::fs::metadata(path) {
        Ok(m) if m.is_dir() => "a directory",
        Ok(m) if m.is_file() => "a plain file",
        _ => "something else",
    }
}

/// A VM.
pub struct Vm {
    fd: VmFd,
}

impl Vm {
    /// Returns the handle of the kvm-ioctls crate.
    pub fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// Maps the guest's memory, one slot per region.
    #[allow(unsafe_code)]
    pub fn map_ram(&self, ram: &GuestRam) -> Result<(), Error> {
        if ram.regions().any(|region| region.readonly) && !self.fd.check_extension(Cap::ReadonlyMem) {
            return Err(Error::Lacks("read-only memory slots"));
        }
        for (slot, region) in ram.regions().enumerate() {
            let slot = kvm_userspace_memory_region {
                slot: slot as u32,
                guest_phys_addr: region.start,
                memory_size: region.len,
                userspace_addr: region.host_addr,
                // Writes cause MMIO exits that no device answers, so they have no effect.
                flags: if region.readonly { kvm_bindings::KVM_MEM_READONLY } else { 0 },
            };
            // SAFETY: the range is a mapping that `ram` owns. The machine keeps a clone of `ram` for longer than the
            // VM, and no part of the mapping is ever unmapped.
            unsafe { self.fd.set_user_memory_region(slot) }.map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
        }
        Ok(())
    }

    /// Connects the line to its GSI: a write to the line's eventfd raises the GSI.
    pub fn connect_irq(&self, line: &IrqLine) -> Result<(), Error> {
        self.fd.register_irqfd(line.fd(), line.gsi()).map_err(failed("KVM_IRQFD"))
    }

    /// Sets the level of a GSI.
    pub fn set_irq(&self, gsi: u32, active: bool) -> Result<(), Error> {
        self.fd.set_irq_line(gsi, active).map_err(failed("KVM_IRQ_LINE"))
    }

    /// Makes a guest's 4-byte write of `value` to the MMIO address `addr` signal `fd` without an exit.
    pub fn connect_kick(&self, fd: &EventFd, addr: u64, value: u32) -> Result<(), Error> {
        self.fd.register_ioevent(fd, &IoEventAddress::Mmio(addr), value).map_err(failed("KVM_IOEVENTFD"))
    }

    /// Makes KVM collect writes to the `len` ports from `port` on in the ring instead of exiting. Returns whether KVM
    /// supports it.
    pub fn coalesce_port(&self, port: u16, len: u32) -> bool {
        self.fd.check_extension_raw(u64::from(kvm_bindings::KVM_CAP_COALESCED_PIO)) > 0
            && self.fd.register_coalesced_mmio(IoEventAddress::Pio(u64::from(port)), len).is_ok()
    }

    /// Makes KVM collect 4-byte writes to the MMIO address `addr` in the ring. Returns whether KVM supports it.
    pub fn coalesce_mmio(&self, addr: u64) -> bool {
        self.fd.check_extension_raw(u64::from(kvm_bindings::KVM_CAP_COALESCED_MMIO)) > 0
            && self.fd.register_coalesced_mmio(IoEventAddress::Mmio(addr), 4).is_ok()
    }

    /// Returns the size in bytes of a vCPU's extended state, as KVM_GET_XSAVE2 writes it.
    pub fn xsave_len(&self) -> usize {
        let len = self.fd.check_extension_raw(u64::from(kvm_bindings::KVM_CAP_XSAVE2));
        // Before Linux 5.17 the size was fixed, and this capability did not exist.
        usize::try_from(len).unwrap_or(0).max(size_of::<kvm_bindings::kvm_xsave>())
    }

    /// Creates vCPU `id`, which is also its APIC id.
    pub fn create_vcpu(&self, id: u32) -> Result<VcpuFd, Error> {
        self.fd.create_vcpu(u64::from(id)).map_err(failed("KVM_CREATE_VCPU"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opening_what_is_not_kvm_says_so() {
        let text = |path: &str| Kvm::open(path).err().unwrap().to_string();
        assert_eq!(text("/nonexistent/kvm"), "/nonexistent/kvm does not exist");
        assert_eq!(text("/dev/null"), "/dev/null is something else, not the KVM device");
        assert_eq!(text("/"), "/ is a directory, not the KVM device");
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(text(file.path().to_str().unwrap()).ends_with(" is a plain file, not the KVM device"));
    }
}
