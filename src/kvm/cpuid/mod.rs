//! CPUID: the features that KVM supports on this host, without those that a guest must not see, plus the guest's own
//! topology.
//!
//! The rules, in the order in which they apply:
//! 1. Ask the kernel for permission to use AMX, then start from KVM_GET_SUPPORTED_CPUID. KVM leaves the processor's
//!    name and the sizes of its caches empty; software displays or queries them, so they come from the host's
//!    processor.
//! 2. Hide features that would mislead: nested virtualisation (its state cannot be saved yet), performance counters
//!    (the VM has none), MONITOR/MWAIT, SGX and processor trace; and features whose state no guest could enable.
//! 3. Add the features of the in-kernel local APIC: x2APIC, the TSC deadline timer, the hypervisor bit.
//! 4. Apply the user's `+feature` and `-feature`; a feature that KVM does not support is refused. With a removed
//!    feature, the features that need it, its leaves and its state disappear, too.
//! 5. Describe one socket whose cores have one thread each; vCPU `n` has APIC id `n`.
//! 6. Report the frequency of the TSC, if the host's TSC has a constant frequency.

mod features;
mod host;
mod timing;
mod xstate;

#[cfg(test)]
mod tests;

use std::arch::x86_64::CpuidResult;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Cap;

use super::{Error, Kvm, failed};
use features::{Bit, FEATURES, HIDDEN, LEAVES, Reg};
pub use features::{FeatureError, Features};

/// Leaves for performance counters only, which vireo disables in KVM.
const COUNTER_LEAVES: [u32; 2] = [0xA, 0x8000_0022];

/// The CPUID entries that all vCPUs of a machine share, before their own ids are filled in.
pub struct Template {
    entries: Vec<kvm_cpuid_entry2>,
    /// The host's leaf 0x16.
    frequencies: CpuidResult,
}

impl Template {
    /// Applies rules 1 to 4.
    pub fn new(kvm: &Kvm, features: &Features) -> Result<Self, TemplateError> {
        host::permit_amx();
        let kvm = kvm.inner();
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("KVM_GET_SUPPORTED_CPUID"))?
            .as_slice()
            .to_vec();
        let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        Self::from_supported(supported, host::leaf, deadline, features).map_err(TemplateError::Features)
    }

    /// Applies rules 1 to 4 to `supported`. `host` reads a leaf of the host's processor.
    fn from_supported(
        supported: Vec<kvm_cpuid_entry2>,
        host: impl Fn(u32) -> CpuidResult,
        tsc_deadline: bool,
        features: &Features,
    ) -> Result<Self, FeatureError> {
        let mut template = Template { entries: supported, frequencies: host(0x16) };
        template.fill_from_host(&host);
        template.entries.retain(|e| !COUNTER_LEAVES.contains(&e.function));
        for (name, on) in [("x2apic", true), ("hypervisor", true), ("tsc_deadline_timer", tsc_deadline)] {
            template.set(name, on);
        }
        template.apply(features)?;
        Ok(template)
    }

    /// Applies rule 1: the processor's name, and the caches for software that does not read leaf 4 or 0x8000001D.
    fn fill_from_host(&mut self, host: impl Fn(u32) -> CpuidResult) {
        for e in &mut self.entries {
            if matches!(e.function, 0x8000_0002..=0x8000_0006) && [e.eax, e.ebx, e.ecx, e.edx] == [0; 4] {
                CpuidResult { eax: e.eax, ebx: e.ebx, ecx: e.ecx, edx: e.edx } = host(e.function);
            }
        }
    }

    /// Applies rules 2 and 4.
    fn apply(&mut self, Features(list): &Features) -> Result<(), FeatureError> {
        let listed = |name: &str| list.iter().find(|(_, known)| *known == name).map(|(on, _)| *on);
        let hidden = HIDDEN.iter().copied().filter(|name| listed(name).is_none());
        let mut gone: Vec<&str> = xstate::unusable(&self.entries).chain(hidden).collect();
        for (on, name) in list {
            if !on {
                gone.push(name);
                continue;
            }
            if !self.has(name) {
                return Err(FeatureError::Unsupported((*name).into()));
            }
            let missing =
                LEAVES.iter().find(|(of, leaf)| of == name && !self.entries.iter().any(|e| e.function == *leaf));
            if let Some((_, leaf)) = missing {
                return Err(FeatureError::Leaf((*name).into(), *leaf));
            }
        }
        // A feature that needs a removed one is removed, too, and so on. Each name is appended at most once, so this
        // ends.
        let mut at = 0;
        while let Some(needed) = gone.get(at).copied() {
            let dependents = features::pairs().filter(|(_, needs)| *needs == needed).map(|(dependent, _)| dependent);
            let new: Vec<_> = dependents.filter(|name| !gone.contains(name)).collect();
            gone.extend(new);
            at += 1;
        }
        if let Some((_, name)) = list.iter().find(|(on, name)| *on && gone.contains(name)) {
            let needed = features::needs(name).find(|needed| gone.contains(needed));
            return Err(needed.map_or_else(
                || FeatureError::Unsupported((*name).into()),
                |needed| FeatureError::Needs((*name).into(), needed),
            ));
        }
        gone.iter().for_each(|name| self.set(name, false));
        self.drop_what_features_leave();
        Ok(())
    }

    /// Removes leaves and state of features that the guest does not have.
    fn drop_what_features_leave(&mut self) {
        let has: Vec<&str> = FEATURES.iter().map(|(name, _)| *name).filter(|name| self.has(name)).collect();
        self.entries.retain(|e| !LEAVES.iter().any(|(name, leaf)| *leaf == e.function && !has.contains(name)));
        xstate::trim(&mut self.entries, |name| has.contains(&name));
    }

    fn set(&mut self, name: &str, on: bool) {
        let Some((leaf, sub, reg, bit)) = features::bit(name) else { return };
        let Some(entry) = self.entries.iter_mut().find(|e| e.function == leaf && e.index == sub) else { return };
        let reg = match reg {
            Reg::Eax => &mut entry.eax,
            Reg::Ebx => &mut entry.ebx,
            Reg::Ecx => &mut entry.ecx,
            Reg::Edx => &mut entry.edx,
        };
        *reg = *reg & !(1 << bit) | u32::from(on) << bit;
    }

    fn has(&self, name: &str) -> bool {
        features::bit(name).is_some_and(|bit| self.get(bit))
    }

    fn get(&self, (leaf, sub, reg, bit): Bit) -> bool {
        self.entries.iter().find(|e| e.function == leaf && e.index == sub).is_some_and(|entry| {
            let value = match reg {
                Reg::Eax => entry.eax,
                Reg::Ebx => entry.ebx,
                Reg::Ecx => entry.ecx,
                Reg::Edx => entry.edx,
            };
            value >> bit & 1 == 1
        })
    }

    /// Returns the number of bits of a guest-physical address, as the guest sees it.
    pub fn phys_bits(&self) -> u32 {
        self.entries.iter().find(|e| e.function == 0x8000_0008).map_or(36, |e| e.eax & 0xFF)
    }

    /// Returns whether the guest is offered KVM's own clock.
    pub fn has_kvmclock(&self) -> bool {
        self.has("kvmclock")
    }

    /// Returns the vendor, as leaf 0 spells it.
    fn vendor(&self) -> [u8; 12] {
        let mut name = [0; 12];
        if let Some(e) = self.entries.iter().find(|e| e.function == 0) {
            let words = [e.ebx, e.edx, e.ecx].map(u32::to_le_bytes);
            name.copy_from_slice(words.as_flattened());
        }
        name
    }

    /// Applies rules 5 and 6: returns the entries of vCPU `id` of `count`, with a TSC of `tsc_khz` (0 if KVM does not
    /// know).
    pub fn for_vcpu(&self, id: u32, count: u32, tsc_khz: u32) -> Result<CpuId, Error> {
        let mut entries = self.entries.clone();
        let amd = matches!(&self.vendor(), b"AuthenticAMD" | b"HygonGenuine");
        // Number of APIC id bits that distinguish the cores of the only socket.
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
                // AMD's CMP_LEGACY, number of cores, and ids. Other vendors reserve these bits.
                (0x8000_0001, _) if amd => e.ecx = e.ecx & !(1 << 1) | u32::from(count > 1) << 1,
                (0x8000_0008, _) if amd => e.ecx = core_bits << 12 | (count - 1).min(255),
                (0x8000_0008, _) => e.ecx = 0,
                // AMD's cache leaf.
                (0x8000_001D, _) if amd && e.eax & 0x1F != 0 => {
                    let shared = if e.eax >> 5 & 7 >= 3 { (count - 1).min(0xFFF) } else { 0 };
                    e.eax = e.eax & 0x3FFF | shared << 14;
                }
                (0x8000_001E, _) if amd => (e.eax, e.ebx, e.ecx) = (id, id & 0xFF, 0),
                _ => {}
            }
        }
        add_topology_levels(&mut entries, id, count, core_bits);
        if self.has("constant_tsc") {
            let intel = &self.vendor() == b"GenuineIntel";
            timing::add(&mut entries, intel, tsc_khz, self.frequencies);
        }
        CpuId::from_entries(&entries).map_err(|_| Error::Lacks("room for all CPUID leaves"))
    }
}

/// Fills in an extended topology leaf: level 0 is the thread, level 1 the core (Intel SDM, CPUID leaf 0BH).
fn topology(e: &mut kvm_cpuid_entry2, id: u32, count: u32, core_bits: u32) {
    (e.eax, e.ebx, e.ecx) = match e.index {
        0 => (0, 1, 1 << 8),
        1 => (core_bits, count, 2 << 8 | 1),
        n => (0, 0, n & 0xFF),
    };
    e.edx = id;
}

/// Adds missing sub-leaves: KVM reports only as many as the host has, and a guest needs the first three.
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

/// Reasons why the CPUID template could not be created.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// KVM failed.
    #[error(transparent)]
    Kvm(#[from] Error),
    /// The user's list does not fit this host.
    #[error("--cpu: {0}")]
    Features(FeatureError),
}
