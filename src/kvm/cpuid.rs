//! CPUID: what KVM supports on this host, minus what a guest must not see, plus the guest's own topology.
//!
//! The rules, in the order in which they apply:
//! 1. Start from KVM_GET_SUPPORTED_CPUID.
//! 2. Hide what would mislead: nested virtualisation (state that cannot be saved yet), performance counters (the VM
//!    has none), MONITOR/MWAIT, SGX and processor trace.
//! 3. Add what the in-kernel local APIC gives: x2APIC, the TSC deadline timer, the hypervisor bit.
//! 4. Apply the user's `+feature` and `-feature`; what KVM does not support is refused.
//! 5. Describe one socket whose cores have one thread each; vCPU `n` has APIC id `n`.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Cap;

use super::{Error, Kvm, failed};

/// A register of a CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reg {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
use Reg::{Eax, Ebx, Ecx, Edx};

/// Where a feature's bit is: leaf, sub-leaf, register, bit.
type Bit = (u32, u32, Reg, u8);

/// Feature names, as in Linux's /proc/cpuinfo.
const FEATURES: &[(&str, Bit)] = &[
    ("sse3", (1, 0, Ecx, 0)),
    ("pclmulqdq", (1, 0, Ecx, 1)),
    ("monitor", (1, 0, Ecx, 3)),
    ("vmx", (1, 0, Ecx, 5)),
    ("ssse3", (1, 0, Ecx, 9)),
    ("fma", (1, 0, Ecx, 12)),
    ("cx16", (1, 0, Ecx, 13)),
    ("pdcm", (1, 0, Ecx, 15)),
    ("pcid", (1, 0, Ecx, 17)),
    ("sse4_1", (1, 0, Ecx, 19)),
    ("sse4_2", (1, 0, Ecx, 20)),
    ("x2apic", (1, 0, Ecx, 21)),
    ("movbe", (1, 0, Ecx, 22)),
    ("popcnt", (1, 0, Ecx, 23)),
    ("tsc_deadline_timer", (1, 0, Ecx, 24)),
    ("aes", (1, 0, Ecx, 25)),
    ("xsave", (1, 0, Ecx, 26)),
    ("avx", (1, 0, Ecx, 28)),
    ("f16c", (1, 0, Ecx, 29)),
    ("rdrand", (1, 0, Ecx, 30)),
    ("hypervisor", (1, 0, Ecx, 31)),
    ("pse", (1, 0, Edx, 3)),
    ("tsc", (1, 0, Edx, 4)),
    ("mce", (1, 0, Edx, 7)),
    ("sep", (1, 0, Edx, 11)),
    ("mtrr", (1, 0, Edx, 12)),
    ("pge", (1, 0, Edx, 13)),
    ("mca", (1, 0, Edx, 14)),
    ("pat", (1, 0, Edx, 16)),
    ("clflush", (1, 0, Edx, 19)),
    ("ht", (1, 0, Edx, 28)),
    ("arat", (6, 0, Eax, 2)),
    ("fsgsbase", (7, 0, Ebx, 0)),
    ("tsc_adjust", (7, 0, Ebx, 1)),
    ("sgx", (7, 0, Ebx, 2)),
    ("bmi1", (7, 0, Ebx, 3)),
    ("avx2", (7, 0, Ebx, 5)),
    ("smep", (7, 0, Ebx, 7)),
    ("bmi2", (7, 0, Ebx, 8)),
    ("erms", (7, 0, Ebx, 9)),
    ("invpcid", (7, 0, Ebx, 10)),
    ("avx512f", (7, 0, Ebx, 16)),
    ("avx512dq", (7, 0, Ebx, 17)),
    ("rdseed", (7, 0, Ebx, 18)),
    ("adx", (7, 0, Ebx, 19)),
    ("smap", (7, 0, Ebx, 20)),
    ("avx512ifma", (7, 0, Ebx, 21)),
    ("clflushopt", (7, 0, Ebx, 23)),
    ("clwb", (7, 0, Ebx, 24)),
    ("intel_pt", (7, 0, Ebx, 25)),
    ("avx512cd", (7, 0, Ebx, 28)),
    ("sha_ni", (7, 0, Ebx, 29)),
    ("avx512bw", (7, 0, Ebx, 30)),
    ("avx512vl", (7, 0, Ebx, 31)),
    ("avx512vbmi", (7, 0, Ecx, 1)),
    ("umip", (7, 0, Ecx, 2)),
    ("pku", (7, 0, Ecx, 3)),
    ("waitpkg", (7, 0, Ecx, 5)),
    ("avx512_vbmi2", (7, 0, Ecx, 6)),
    ("shstk", (7, 0, Ecx, 7)),
    ("gfni", (7, 0, Ecx, 8)),
    ("vaes", (7, 0, Ecx, 9)),
    ("vpclmulqdq", (7, 0, Ecx, 10)),
    ("avx512_vnni", (7, 0, Ecx, 11)),
    ("avx512_bitalg", (7, 0, Ecx, 12)),
    ("avx512_vpopcntdq", (7, 0, Ecx, 14)),
    ("la57", (7, 0, Ecx, 16)),
    ("rdpid", (7, 0, Ecx, 22)),
    ("fsrm", (7, 0, Edx, 4)),
    ("md_clear", (7, 0, Edx, 10)),
    ("serialize", (7, 0, Edx, 14)),
    ("ibt", (7, 0, Edx, 20)),
    ("amx_bf16", (7, 0, Edx, 22)),
    ("avx512_fp16", (7, 0, Edx, 23)),
    ("amx_tile", (7, 0, Edx, 24)),
    ("amx_int8", (7, 0, Edx, 25)),
    ("spec_ctrl", (7, 0, Edx, 26)),
    ("arch_capabilities", (7, 0, Edx, 29)),
    ("ssbd", (7, 0, Edx, 31)),
    ("avx_vnni", (7, 1, Eax, 4)),
    ("avx512_bf16", (7, 1, Eax, 5)),
    ("xsaveopt", (0xD, 1, Eax, 0)),
    ("xsavec", (0xD, 1, Eax, 1)),
    ("xgetbv1", (0xD, 1, Eax, 2)),
    ("xsaves", (0xD, 1, Eax, 3)),
    ("kvmclock", (0x4000_0001, 0, Eax, 3)),
    ("kvm_async_pf", (0x4000_0001, 0, Eax, 4)),
    ("kvm_steal_time", (0x4000_0001, 0, Eax, 5)),
    ("kvm_pv_eoi", (0x4000_0001, 0, Eax, 6)),
    ("kvm_pv_unhalt", (0x4000_0001, 0, Eax, 7)),
    ("kvm_pv_tlb_flush", (0x4000_0001, 0, Eax, 9)),
    ("kvm_pv_ipi", (0x4000_0001, 0, Eax, 11)),
    ("kvm_poll_control", (0x4000_0001, 0, Eax, 12)),
    ("kvm_pv_sched_yield", (0x4000_0001, 0, Eax, 13)),
    ("syscall", (0x8000_0001, 0, Edx, 11)),
    ("nx", (0x8000_0001, 0, Edx, 20)),
    ("pdpe1gb", (0x8000_0001, 0, Edx, 26)),
    ("rdtscp", (0x8000_0001, 0, Edx, 27)),
    ("lm", (0x8000_0001, 0, Edx, 29)),
    ("lahf_lm", (0x8000_0001, 0, Ecx, 0)),
    ("svm", (0x8000_0001, 0, Ecx, 2)),
    ("abm", (0x8000_0001, 0, Ecx, 5)),
    ("sse4a", (0x8000_0001, 0, Ecx, 6)),
    ("misalignsse", (0x8000_0001, 0, Ecx, 7)),
    ("3dnowprefetch", (0x8000_0001, 0, Ecx, 8)),
    ("topoext", (0x8000_0001, 0, Ecx, 22)),
    ("perfctr_core", (0x8000_0001, 0, Ecx, 23)),
    ("constant_tsc", (0x8000_0007, 0, Edx, 8)),
    ("clzero", (0x8000_0008, 0, Ebx, 0)),
    ("xsaveerptr", (0x8000_0008, 0, Ebx, 2)),
    ("ibpb", (0x8000_0008, 0, Ebx, 12)),
    ("ibrs", (0x8000_0008, 0, Ebx, 14)),
    ("stibp", (0x8000_0008, 0, Ebx, 15)),
    ("virt_ssbd", (0x8000_0008, 0, Ebx, 25)),
];

/// Hidden unless the user asks for them by `+name`.
const HIDDEN: &[&str] = &["vmx", "svm", "monitor", "pdcm", "perfctr_core", "sgx", "intel_pt"];

/// A `--cpu` list could not be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FeatureError {
    /// Neither `+` nor `-` in front.
    #[error("'{0}' must begin with + or -, like +x2apic,-avx2")]
    Sign(String),
    /// Not in the list of names.
    #[error("'{0}' is not a CPU feature vireo knows (names are those of /proc/cpuinfo){1}")]
    Unknown(String, String),
    /// KVM cannot give it to a guest here.
    #[error("this host's KVM does not offer '{0}'")]
    Unsupported(String),
}

/// `--cpu`: features switched on and off against the default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Features(Vec<(bool, &'static str, Bit)>);

impl std::str::FromStr for Features {
    type Err = FeatureError;

    fn from_str(text: &str) -> Result<Self, FeatureError> {
        let mut features = Vec::new();
        for item in text.split(',').filter(|item| !item.is_empty()) {
            let (on, name) = match (item.strip_prefix('+'), item.strip_prefix('-')) {
                (Some(name), _) => (true, name),
                (_, Some(name)) => (false, name),
                _ => return Err(FeatureError::Sign(item.into())),
            };
            let Some((name, bit)) = FEATURES.iter().find(|(known, _)| *known == name) else {
                let near =
                    FEATURES.iter().find(|(known, _)| known.replace('_', "") == name.replace(['_', '-', '.'], ""));
                let hint = near.map(|(known, _)| format!("; did you mean {known}?")).unwrap_or_default();
                return Err(FeatureError::Unknown(name.into(), hint));
            };
            features.push((on, *name, *bit));
        }
        Ok(Features(features))
    }
}

/// The CPUID entries that all vCPUs of a machine share, before their own ids are filled in.
pub struct Template(Vec<kvm_cpuid_entry2>);

impl Template {
    /// Applies rules 1 to 4.
    pub fn new(kvm: &Kvm, features: &Features) -> Result<Self, TemplateError> {
        let kvm = kvm.inner();
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("KVM_GET_SUPPORTED_CPUID"))?
            .as_slice()
            .to_vec();
        let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        Self::from_supported(supported, deadline, features).map_err(TemplateError::Features)
    }

    fn from_supported(
        supported: Vec<kvm_cpuid_entry2>,
        tsc_deadline: bool,
        features: &Features,
    ) -> Result<Self, FeatureError> {
        let mut template = Template(supported.clone());
        for (name, bit) in FEATURES {
            if HIDDEN.contains(name) {
                template.set(*bit, false);
            }
        }
        // Architectural performance monitoring, SGX, processor trace and the AMD nested leaf say what was hidden.
        template.0.retain(|e| !matches!(e.function, 0xA | 0x12 | 0x14 | 0x8000_000A | 0x8000_0022));
        template.set((1, 0, Ecx, 21), true);
        template.set((1, 0, Ecx, 31), true);
        template.set((1, 0, Ecx, 24), tsc_deadline);
        let offered = Template(supported);
        for (on, name, bit) in &features.0 {
            if *on && !offered.get(*bit) && !template.get(*bit) {
                return Err(FeatureError::Unsupported((*name).into()));
            }
            template.set(*bit, *on);
        }
        Ok(template)
    }

    fn reg(&mut self, (leaf, sub, reg, _): Bit) -> Option<&mut u32> {
        let entry = self.0.iter_mut().find(|e| e.function == leaf && e.index == sub)?;
        Some(match reg {
            Eax => &mut entry.eax,
            Ebx => &mut entry.ebx,
            Ecx => &mut entry.ecx,
            Edx => &mut entry.edx,
        })
    }

    fn set(&mut self, bit: Bit, on: bool) {
        if let Some(reg) = self.reg(bit) {
            *reg = *reg & !(1 << bit.3) | u32::from(on) << bit.3;
        }
    }

    fn get(&self, (leaf, sub, reg, bit): Bit) -> bool {
        self.0.iter().find(|e| e.function == leaf && e.index == sub).is_some_and(|entry| {
            let value = match reg {
                Eax => entry.eax,
                Ebx => entry.ebx,
                Ecx => entry.ecx,
                Edx => entry.edx,
            };
            value >> bit & 1 == 1
        })
    }

    /// Bits of a guest-physical address, as the guest is told.
    pub fn phys_bits(&self) -> u32 {
        self.0.iter().find(|e| e.function == 0x8000_0008).map_or(36, |e| e.eax & 0xFF)
    }

    /// Rule 5: the entries of vCPU `id` among `count`.
    pub fn for_vcpu(&self, id: u32, count: u32) -> Result<CpuId, Error> {
        let mut entries = self.0.clone();
        // How many bits of an APIC id tell the cores of the one socket apart.
        let core_bits = count.next_power_of_two().trailing_zeros();
        for e in &mut entries {
            match (e.function, e.index) {
                (1, _) => {
                    e.ebx = e.ebx & 0xFFFF | count.min(255) << 16 | id << 24;
                    e.edx = e.edx & !(1 << 28) | u32::from(count > 1) << 28;
                }
                // Intel's cache leaf: L1 and L2 belong to one core, the rest to the socket.
                (4, _) if e.eax & 0x1F != 0 => {
                    let shared = if e.eax >> 5 & 7 >= 3 { (1 << core_bits) - 1 } else { 0 };
                    e.eax = e.eax & 0x3FFF | shared << 14 | ((1u32 << core_bits).min(64) - 1) << 26;
                }
                (0xB | 0x1F, _) => topology(e, id, count, core_bits),
                (0x8000_0001, _) => e.ecx = e.ecx & !(1 << 1) | u32::from(count > 1) << 1,
                (0x8000_0008, _) => e.ecx = core_bits << 12 | (count - 1).min(255),
                // AMD's cache leaf.
                (0x8000_001D, _) if e.eax & 0x1F != 0 => {
                    let shared = if e.eax >> 5 & 7 >= 3 { (count - 1).min(0xFFF) } else { 0 };
                    e.eax = e.eax & 0x3FFF | shared << 14;
                }
                (0x8000_001E, _) => (e.eax, e.ebx, e.ecx) = (id, id & 0xFF, 0),
                _ => {}
            }
        }
        add_topology_levels(&mut entries, id, count, core_bits);
        CpuId::from_entries(&entries).map_err(|_| Error::Lacks("room for all CPUID leaves"))
    }
}

/// The extended topology leaves: level 0 is the thread, level 1 the core (Intel SDM, CPUID leaf 0BH).
fn topology(e: &mut kvm_cpuid_entry2, id: u32, count: u32, core_bits: u32) {
    (e.eax, e.ebx, e.ecx) = match e.index {
        0 => (0, 1, 1 << 8),
        1 => (core_bits, count, 2 << 8 | 1),
        n => (0, 0, n & 0xFF),
    };
    e.edx = id;
}

/// KVM reports only as many sub-leaves as the host has; a guest needs the first three.
fn add_topology_levels(entries: &mut Vec<kvm_cpuid_entry2>, id: u32, count: u32, core_bits: u32) {
    for leaf in [0xB, 0x1F] {
        let Some(first) = entries.iter().find(|e| e.function == leaf).copied() else { continue };
        for index in 0..3 {
            if !entries.iter().any(|e| e.function == leaf && e.index == index) {
                let mut e = kvm_cpuid_entry2 { index, ..first };
                topology(&mut e, id, count, core_bits);
                entries.push(e);
            }
        }
    }
}

/// The CPUID template could not be made.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// KVM failed.
    #[error(transparent)]
    Kvm(#[from] Error),
    /// The user's list does not fit this host.
    #[error("--cpu: {0}")]
    Features(FeatureError),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> Vec<kvm_cpuid_entry2> {
        let e = |function, index, eax, ebx, ecx, edx| kvm_cpuid_entry2 {
            function,
            index,
            flags: u32::from(matches!(function, 4 | 7 | 0xB | 0xD)),
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        };
        vec![
            e(0, 0, 0x10, 0, 0, 0),
            e(1, 0, 0, 0xFF00_0800, !(1 << 31), u32::MAX),
            e(4, 0, 0xFC00_0121, 0, 0, 0),
            e(4, 3, 0xFC00_0163, 0, 0, 0),
            e(7, 0, 0, 1 << 5, 0, 0),
            e(0xA, 0, 7, 0, 0, 0),
            e(0xB, 0, 0, 0, 0, 9),
            e(0x8000_0001, 0, 0, 0, u32::MAX, 0),
            e(0x8000_0008, 0, 48, 0, 0, 0),
            e(0x8000_001E, 0, 0, 0, 0, 0),
        ]
    }

    fn template(features: &str) -> Result<Template, FeatureError> {
        Template::from_supported(supported(), true, &features.parse()?)
    }

    #[test]
    fn default_hides_and_adds() {
        let t = template("").unwrap();
        for name in HIDDEN {
            let bit = FEATURES.iter().find(|f| f.0 == *name).unwrap().1;
            assert!(!t.get(bit), "{name}");
        }
        for bit in [(1, 0, Ecx, 21), (1, 0, Ecx, 24), (1, 0, Ecx, 31)] {
            assert!(t.get(bit));
        }
        assert!(!t.0.iter().any(|e| e.function == 0xA));
        assert_eq!(t.phys_bits(), 48);
    }

    #[test]
    fn the_user_decides_within_what_kvm_offers() {
        let t = template("+vmx,-avx2").unwrap();
        assert!(t.get((1, 0, Ecx, 5)));
        assert!(!t.get((7, 0, Ebx, 5)));
        let error = |list| template(list).err().unwrap().to_string();
        assert_eq!(error("+avx512f"), "this host's KVM does not offer 'avx512f'");
        assert_eq!(error("avx2"), "'avx2' must begin with + or -, like +x2apic,-avx2");
        assert!(error("+sse4.1").ends_with("did you mean sse4_1?"));
        assert!(error("-nosuch").contains("'nosuch' is not a CPU feature"));
    }

    #[test]
    fn topology_is_one_socket_of_single_thread_cores() {
        let t = template("").unwrap();
        for (id, count, bits) in [(0, 1, 0), (2, 3, 2), (253, 254, 8)] {
            let cpuid = t.for_vcpu(id, count).unwrap();
            let get = |f, i| *cpuid.as_slice().iter().find(|e| e.function == f && e.index == i).unwrap();
            assert_eq!(get(1, 0).ebx >> 24, id);
            assert_eq!(get(1, 0).edx >> 28 & 1, u32::from(count > 1));
            assert_eq!((get(0xB, 0).eax, get(0xB, 0).ebx, get(0xB, 0).edx), (0, 1, id));
            assert_eq!((get(0xB, 1).eax, get(0xB, 1).ebx, get(0xB, 1).ecx), (bits, count, 0x201));
            assert_eq!(get(0xB, 2).ebx, 0);
            assert_eq!(get(0x8000_0008, 0).ecx & 0xFF, count - 1);
            assert_eq!(get(0x8000_001E, 0).eax, id);
            assert_eq!(get(4, 0).eax >> 14 & 0xFFF, 0, "L1 is private");
            assert_eq!(get(4, 3).eax >> 14 & 0xFFF, (1 << bits) - 1, "L3 is shared");
        }
    }

    #[test]
    fn names_are_unique() {
        let mut names: Vec<_> = FEATURES.iter().map(|f| f.0).collect();
        names.sort_unstable();
        assert!(names.windows(2).all(|w| w[0] != w[1]));
    }
}
