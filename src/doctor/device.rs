//! The host's side: the KVM device node, KVM's capabilities, and remedies if they cannot be used.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use kvm_bindings::*;
use kvm_ioctls::VmFd;
use serde::Serialize;

use super::Problem;
use crate::kvm::{Error, Kvm};

/// Description of this host's processor and kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct HostFacts {
    /// Name of the processor, as it reports it.
    pub cpu: String,
    /// Virtualization extension of the processor, `vmx` or `svm`, if it shows one.
    pub virtualization: Option<&'static str>,
    /// Set if this host is itself a virtual machine.
    pub is_guest: bool,
    /// Kernel release.
    pub kernel: String,
    /// Name of the loaded module that provides KVM, such as `kvm_intel`.
    pub kvm_module: Option<String>,
}

impl HostFacts {
    /// Reads the facts from /proc and /sys; missing ones stay empty.
    pub fn read() -> Self {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let modules = std::fs::read_dir("/sys/module").into_iter().flatten().flatten();
        let kvm_module =
            modules.filter_map(|entry| entry.file_name().into_string().ok()).find(|name| name.starts_with("kvm_"));
        HostFacts { kernel: kernel.trim().into(), kvm_module, ..Self::parse(&cpuinfo) }
    }

    fn parse(cpuinfo: &str) -> Self {
        let value = |key: &str| {
            let line = cpuinfo.lines().find(|line| line.split(':').next().is_some_and(|k| k.trim() == key));
            line.and_then(|line| line.split_once(':')).map_or("", |(_, value)| value.trim())
        };
        let flag = |name: &str| value("flags").split_whitespace().any(|flag| flag == name);
        HostFacts {
            cpu: value("model name").into(),
            virtualization: ["vmx", "svm"].into_iter().find(|name| flag(name)),
            is_guest: flag("hypervisor"),
            ..HostFacts::default()
        }
    }
}

/// Opens the KVM device at `path` and checks its version.
pub fn open(path: &Path, host: &HostFacts) -> Result<Kvm, Problem> {
    Kvm::open(path).map_err(|error| explain(&error, host))
}

/// Creates a VM. This fails if another hypervisor holds the processor's virtualization.
pub fn create_vm(kvm: &Kvm, host: &HostFacts) -> Result<VmFd, Problem> {
    kvm.create_vm_fd().map_err(|error| explain(&error, host))
}

fn explain(error: &Error, host: &HostFacts) -> Problem {
    let found = match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    };
    Problem { found, remedy: remedy(error, host) }
}

/// Returns the remedy for the error; a command where there is one.
pub fn remedy(error: &Error, host: &HostFacts) -> String {
    match error {
        Error::Missing(_) => missing(host).into(),
        Error::Permission(path) => permission(path),
        Error::NotKvm(path, _) => {
            let device = path.display();
            format!("sudo mv {device} {device}.wrong && sudo mknod -m 660 {device} c 10 232 && sudo chgrp kvm {device}")
        }
        Error::Version(..) => "run a Linux kernel from after 2007, whose KVM is not a development version".into(),
        Error::Busy => {
            "stop its virtual machines; for VirtualBox: sudo modprobe -r vboxnetflt vboxnetadp vboxdrv; for \
                        VMware: sudo systemctl stop vmware"
                .into()
        }
        Error::Msr { .. } => {
            "run a newer Linux kernel on this host, or report this processor and kernel to vireo".into()
        }
        Error::Lacks(_) => "run a newer Linux kernel on this host (4.20 or later)".into(),
        Error::Open(_, cause) | Error::Ioctl(_, cause) => match cause.raw_os_error() {
            Some(libc::EMFILE | libc::ENFILE) => "raise the limit: ulimit -n 4096".into(),
            Some(libc::EAGAIN) => "raise the limit of processes, which includes threads: ulimit -u".into(),
            Some(libc::ENOMEM) => "check free -m, ulimit -v and the cgroup's memory limit".into(),
            _ => "look for kvm in the output of: sudo dmesg".into(),
        },
    }
}

fn missing(host: &HostFacts) -> &'static str {
    match (&host.kvm_module, host.virtualization) {
        (Some(_), _) => {
            "the KVM module is loaded: start a container with --device /dev/kvm; elsewhere: sudo mknod -m 660 /dev/kvm \
             c 10 232 && sudo chgrp kvm /dev/kvm"
        }
        (None, Some("vmx")) => "sudo modprobe kvm_intel (if refused: enable VT-x in the firmware setup)",
        (None, Some(_)) => "sudo modprobe kvm_amd (if refused: enable SVM in the firmware setup)",
        (None, None) if host.is_guest => {
            "this host is a virtual machine without nested virtualization: enable that where it is hosted (KVM: sudo \
             modprobe kvm_intel nested=1, or kvm_amd, and CPU model host-passthrough), or use a bare-metal machine"
        }
        (None, None) => {
            "enable Intel VT-x or AMD SVM in the firmware setup, then: sudo modprobe kvm_intel || sudo modprobe kvm_amd"
        }
    }
}

/// Returns the command that lets this user open an existing device.
fn permission(path: &Path) -> String {
    let device = path.display();
    let once = format!("sudo setfacl -m u:$USER:rw {device}");
    let group_may = |m: &std::fs::Metadata| m.mode() & 0o060 == 0o060 && m.gid() != 0;
    match std::fs::metadata(path).ok().filter(group_may).and_then(|m| group_name(m.gid())) {
        Some(group) => format!("sudo usermod -aG {group} $USER, then log in again; until the next boot: {once}"),
        None => format!(
            "sudo chgrp kvm {device} && sudo chmod 660 {device} && sudo usermod -aG kvm $USER, then log in \
                         again; until the next boot: {once}; in a container: start it with --device /dev/kvm"
        ),
    }
}

fn group_name(gid: u32) -> Option<String> {
    let groups = std::fs::read_to_string("/etc/group").ok()?;
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(gid)).then(|| name.to_string())
    })
}

/// Answer of KVM_CHECK_EXTENSION for one capability.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Capability {
    /// Name in the report.
    pub name: &'static str,
    /// Value that KVM returned: 0 means no; the meaning of others depends on the capability.
    pub value: i32,
    /// Set if vireo cannot run guests without it.
    pub required: bool,
    /// Purpose of the capability.
    pub purpose: &'static str,
}

impl Capability {
    /// Returns whether guests can run with this value.
    pub fn suffices(&self) -> bool {
        self.value > 0 || !self.required
    }
}

/// `(name, number, required, purpose)`, with the numbers of `linux/kvm.h`.
const CAPABILITIES: &[(&str, u32, bool, &str)] = &[
    ("user_memory", KVM_CAP_USER_MEMORY, true, "guest RAM"),
    ("irqchip", KVM_CAP_IRQCHIP, true, "interrupt controllers in the kernel"),
    ("irqfd", KVM_CAP_IRQFD, true, "interrupts from device threads"),
    ("ioeventfd", KVM_CAP_IOEVENTFD, true, "queue kicks without an exit to user space"),
    ("ext_cpuid", KVM_CAP_EXT_CPUID, true, "showing the guest its processor's features"),
    ("immediate_exit", KVM_CAP_IMMEDIATE_EXIT, true, "pausing a vCPU"),
    ("coalesced_mmio", KVM_CAP_COALESCED_MMIO, false, "batched MMIO writes"),
    ("coalesced_pio", KVM_CAP_COALESCED_PIO, false, "batched port writes: a faster console"),
    ("readonly_mem", KVM_CAP_READONLY_MEM, false, "read-only guest memory"),
    ("tsc_deadline_timer", KVM_CAP_TSC_DEADLINE_TIMER, false, "the cheapest guest timer"),
    ("x2apic_api", KVM_CAP_X2APIC_API, false, "APIC IDs above 254"),
    ("kvmclock_ctrl", KVM_CAP_KVMCLOCK_CTRL, false, "a paused guest that does not report lock-ups"),
    ("adjust_clock", KVM_CAP_ADJUST_CLOCK, false, "restoring the guest's clock"),
    ("vcpu_events", KVM_CAP_VCPU_EVENTS, false, "snapshots and migration"),
    ("xsave2", KVM_CAP_XSAVE2, false, "snapshots of guests with AMX"),
    ("manual_dirty_log", KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, false, "migration with short pauses"),
    ("dirty_log_ring", KVM_CAP_DIRTY_LOG_RING, false, "migration of busy guests"),
    ("guest_debug", KVM_CAP_SET_GUEST_DEBUG, false, "the gdb stub"),
    ("halt_poll", KVM_CAP_HALT_POLL, false, "tuning wake-up latency per VM"),
];

/// Queries each capability that matters.
pub fn capabilities(kvm: &Kvm) -> Vec<Capability> {
    let ask = |&(name, number, required, purpose): &(&'static str, u32, bool, &'static str)| Capability {
        name,
        value: kvm.inner().check_extension_raw(number.into()),
        required,
        purpose,
    };
    CAPABILITIES.iter().map(ask).collect()
}

/// Limits of a guest's size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Limits {
    /// Number of vCPUs in a VM.
    pub vcpus: i32,
    /// Number of memory slots.
    pub memory_slots: i32,
    /// Width of a guest-physical address in bits (CPUID 8000_0008h).
    pub physical_address_bits: Option<u32>,
}

/// Queries the limits.
pub fn limits(kvm: &Kvm) -> Limits {
    let cpuid = kvm.inner().get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).ok();
    let leaf = cpuid.as_ref().and_then(|cpuid| cpuid.as_slice().iter().find(|entry| entry.function == 0x8000_0008));
    Limits {
        vcpus: kvm.inner().check_extension_raw(KVM_CAP_MAX_VCPUS.into()),
        memory_slots: kvm.inner().check_extension_raw(KVM_CAP_NR_MEMSLOTS.into()),
        physical_address_bits: leaf.map(|entry| entry.eax & 0xFF),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    fn host() -> HostFacts {
        HostFacts::default()
    }

    #[test]
    fn cpuinfo_is_understood() {
        let intel =
            HostFacts::parse("model name\t: Xeon\nflags\t\t: fpu vmx hypervisor\nvmx flags\t: svm x\n\nflags: svm\n");
        assert_eq!((intel.virtualization, intel.is_guest, intel.cpu.as_str()), (Some("vmx"), true, "Xeon"));
        let arm = HostFacts::parse("processor : 0\nFeatures : fp\n");
        assert_eq!(arm, HostFacts::default());
        assert_eq!(HostFacts::parse("flags : vmxx asvm"), HostFacts::default());
    }

    #[test]
    fn missing_device_is_mended_according_to_the_host() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kvm");
        let remedy = |host: HostFacts| open(&path, &host).err().unwrap().remedy;
        assert!(remedy(HostFacts { virtualization: Some("vmx"), ..host() }).contains("modprobe kvm_intel"));
        assert!(remedy(HostFacts { virtualization: Some("svm"), ..host() }).contains("modprobe kvm_amd"));
        assert!(remedy(HostFacts { is_guest: true, ..host() }).contains("nested"));
        assert!(remedy(host()).contains("firmware setup"));
        assert!(remedy(HostFacts { kvm_module: Some("kvm_amd".into()), ..host() }).contains("--device /dev/kvm"));
    }

    #[test]
    fn each_error_has_its_command() {
        let of = |error: Error| explain(&error, &host());
        let cause = io::Error::from_raw_os_error;
        let denied = of(Error::Permission("/dev/kvm".into()));
        assert!(denied.found.starts_with("no permission") && denied.remedy.contains("usermod -aG kvm $USER"));
        assert!(of(Error::NotKvm("/k".into(), "a directory")).remedy.starts_with("sudo mv /k /k.wrong && "));
        assert!(of(Error::Busy).remedy.contains("VirtualBox"));
        assert!(of(Error::Open("/k".into(), cause(libc::EMFILE))).remedy.contains("ulimit -n"));
        assert_eq!(
            of(Error::Open("/k".into(), cause(libc::EIO))).found,
            "cannot open /k: Input/output error (os error 5)"
        );
        assert!(of(Error::Ioctl("KVM_CREATE_VM", cause(libc::ENOMEM))).remedy.contains("free -m"));
    }
}
