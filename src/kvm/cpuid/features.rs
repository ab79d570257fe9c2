//! CPU features by name: the places of their bits, the features that they need, and the list that `--cpu` takes.

/// A register of a CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reg {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
use Reg::{Eax, Ebx, Ecx, Edx};

/// Place of a feature's bit: leaf, sub-leaf, register, bit.
pub(super) type Bit = (u32, u32, Reg, u8);

/// Feature names, as in Linux's /proc/cpuinfo if it shows them.
#[rustfmt::skip]
pub(super) const FEATURES: &[(&str, Bit)] = &[
    ("sse3", (1, 0, Ecx, 0)), ("pclmulqdq", (1, 0, Ecx, 1)), ("monitor", (1, 0, Ecx, 3)), ("vmx", (1, 0, Ecx, 5)),
    ("ssse3", (1, 0, Ecx, 9)), ("fma", (1, 0, Ecx, 12)), ("cx16", (1, 0, Ecx, 13)), ("pdcm", (1, 0, Ecx, 15)),
    ("pcid", (1, 0, Ecx, 17)), ("sse4_1", (1, 0, Ecx, 19)), ("sse4_2", (1, 0, Ecx, 20)), ("x2apic", (1, 0, Ecx, 21)),
    ("movbe", (1, 0, Ecx, 22)), ("popcnt", (1, 0, Ecx, 23)), ("tsc_deadline_timer", (1, 0, Ecx, 24)),
    ("aes", (1, 0, Ecx, 25)), ("xsave", (1, 0, Ecx, 26)), ("avx", (1, 0, Ecx, 28)), ("f16c", (1, 0, Ecx, 29)),
    ("rdrand", (1, 0, Ecx, 30)), ("hypervisor", (1, 0, Ecx, 31)),
    ("pse", (1, 0, Edx, 3)), ("tsc", (1, 0, Edx, 4)), ("mce", (1, 0, Edx, 7)), ("sep", (1, 0, Edx, 11)),
    ("mtrr", (1, 0, Edx, 12)), ("pge", (1, 0, Edx, 13)), ("mca", (1, 0, Edx, 14)), ("pat", (1, 0, Edx, 16)),
    ("clflush", (1, 0, Edx, 19)), ("ht", (1, 0, Edx, 28)),
    ("arat", (6, 0, Eax, 2)),
    ("fsgsbase", (7, 0, Ebx, 0)), ("tsc_adjust", (7, 0, Ebx, 1)), ("sgx", (7, 0, Ebx, 2)), ("bmi1", (7, 0, Ebx, 3)),
    ("hle", (7, 0, Ebx, 4)), ("avx2", (7, 0, Ebx, 5)), ("smep", (7, 0, Ebx, 7)), ("bmi2", (7, 0, Ebx, 8)),
    ("erms", (7, 0, Ebx, 9)), ("invpcid", (7, 0, Ebx, 10)), ("rtm", (7, 0, Ebx, 11)), ("mpx", (7, 0, Ebx, 14)),
    ("avx512f", (7, 0, Ebx, 16)), ("avx512dq", (7, 0, Ebx, 17)), ("rdseed", (7, 0, Ebx, 18)),
    ("adx", (7, 0, Ebx, 19)), ("smap", (7, 0, Ebx, 20)), ("avx512ifma", (7, 0, Ebx, 21)),
    ("clflushopt", (7, 0, Ebx, 23)), ("clwb", (7, 0, Ebx, 24)), ("intel_pt", (7, 0, Ebx, 25)),
    ("avx512pf", (7, 0, Ebx, 26)), ("avx512er", (7, 0, Ebx, 27)), ("avx512cd", (7, 0, Ebx, 28)),
    ("sha_ni", (7, 0, Ebx, 29)), ("avx512bw", (7, 0, Ebx, 30)), ("avx512vl", (7, 0, Ebx, 31)),
    ("avx512vbmi", (7, 0, Ecx, 1)), ("umip", (7, 0, Ecx, 2)), ("pku", (7, 0, Ecx, 3)), ("waitpkg", (7, 0, Ecx, 5)),
    ("avx512_vbmi2", (7, 0, Ecx, 6)), ("shstk", (7, 0, Ecx, 7)), ("gfni", (7, 0, Ecx, 8)), ("vaes", (7, 0, Ecx, 9)),
    ("vpclmulqdq", (7, 0, Ecx, 10)), ("avx512_vnni", (7, 0, Ecx, 11)), ("avx512_bitalg", (7, 0, Ecx, 12)),
    ("avx512_vpopcntdq", (7, 0, Ecx, 14)), ("la57", (7, 0, Ecx, 16)), ("rdpid", (7, 0, Ecx, 22)),
    ("bus_lock_detect", (7, 0, Ecx, 24)), ("cldemote", (7, 0, Ecx, 25)), ("movdiri", (7, 0, Ecx, 27)),
    ("movdir64b", (7, 0, Ecx, 28)), ("enqcmd", (7, 0, Ecx, 29)), ("sgx_lc", (7, 0, Ecx, 30)),
    ("avx512_4vnniw", (7, 0, Edx, 2)), ("avx512_4fmaps", (7, 0, Edx, 3)), ("fsrm", (7, 0, Edx, 4)),
    ("avx512_vp2intersect", (7, 0, Edx, 8)), ("md_clear", (7, 0, Edx, 10)), ("serialize", (7, 0, Edx, 14)),
    ("tsxldtrk", (7, 0, Edx, 16)), ("arch_lbr", (7, 0, Edx, 19)), ("ibt", (7, 0, Edx, 20)),
    ("amx_bf16", (7, 0, Edx, 22)), ("avx512_fp16", (7, 0, Edx, 23)), ("amx_tile", (7, 0, Edx, 24)),
    ("amx_int8", (7, 0, Edx, 25)), ("spec_ctrl", (7, 0, Edx, 26)), ("intel_stibp", (7, 0, Edx, 27)),
    ("flush_l1d", (7, 0, Edx, 28)), ("arch_capabilities", (7, 0, Edx, 29)), ("core_capabilities", (7, 0, Edx, 30)),
    ("ssbd", (7, 0, Edx, 31)),
    ("sha512", (7, 1, Eax, 0)), ("sm3", (7, 1, Eax, 1)), ("sm4", (7, 1, Eax, 2)), ("avx_vnni", (7, 1, Eax, 4)),
    ("avx512_bf16", (7, 1, Eax, 5)), ("cmpccxadd", (7, 1, Eax, 7)), ("fzrm", (7, 1, Eax, 10)),
    ("fsrs", (7, 1, Eax, 11)), ("fsrc", (7, 1, Eax, 12)), ("fred", (7, 1, Eax, 17)), ("lkgs", (7, 1, Eax, 18)),
    ("wrmsrns", (7, 1, Eax, 19)), ("amx_fp16", (7, 1, Eax, 21)), ("avx_ifma", (7, 1, Eax, 23)),
    ("lam", (7, 1, Eax, 26)),
    ("avx_vnni_int8", (7, 1, Edx, 4)), ("avx_ne_convert", (7, 1, Edx, 5)), ("amx_complex", (7, 1, Edx, 8)),
    ("avx_vnni_int16", (7, 1, Edx, 10)), ("prefetchiti", (7, 1, Edx, 14)), ("avx10", (7, 1, Edx, 19)),
    ("apx", (7, 1, Edx, 21)),
    ("xsaveopt", (0xD, 1, Eax, 0)), ("xsavec", (0xD, 1, Eax, 1)), ("xgetbv1", (0xD, 1, Eax, 2)),
    ("xsaves", (0xD, 1, Eax, 3)), ("xfd", (0xD, 1, Eax, 4)),
    ("kvmclock_v1", (0x4000_0001, 0, Eax, 0)), ("kvmclock", (0x4000_0001, 0, Eax, 3)),
    ("kvm_async_pf", (0x4000_0001, 0, Eax, 4)), ("kvm_steal_time", (0x4000_0001, 0, Eax, 5)),
    ("kvm_pv_eoi", (0x4000_0001, 0, Eax, 6)), ("kvm_pv_unhalt", (0x4000_0001, 0, Eax, 7)),
    ("kvm_pv_tlb_flush", (0x4000_0001, 0, Eax, 9)), ("kvm_async_pf_vmexit", (0x4000_0001, 0, Eax, 10)),
    ("kvm_pv_ipi", (0x4000_0001, 0, Eax, 11)), ("kvm_poll_control", (0x4000_0001, 0, Eax, 12)),
    ("kvm_pv_sched_yield", (0x4000_0001, 0, Eax, 13)), ("kvm_async_pf_int", (0x4000_0001, 0, Eax, 14)),
    ("kvmclock_stable", (0x4000_0001, 0, Eax, 24)),
    ("lahf_lm", (0x8000_0001, 0, Ecx, 0)), ("cmp_legacy", (0x8000_0001, 0, Ecx, 1)),
    ("svm", (0x8000_0001, 0, Ecx, 2)), ("abm", (0x8000_0001, 0, Ecx, 5)), ("sse4a", (0x8000_0001, 0, Ecx, 6)),
    ("misalignsse", (0x8000_0001, 0, Ecx, 7)), ("3dnowprefetch", (0x8000_0001, 0, Ecx, 8)),
    ("xop", (0x8000_0001, 0, Ecx, 11)), ("skinit", (0x8000_0001, 0, Ecx, 12)), ("fma4", (0x8000_0001, 0, Ecx, 16)),
    ("tbm", (0x8000_0001, 0, Ecx, 21)),
    ("topoext", (0x8000_0001, 0, Ecx, 22)), ("perfctr_core", (0x8000_0001, 0, Ecx, 23)),
    ("syscall", (0x8000_0001, 0, Edx, 11)), ("nx", (0x8000_0001, 0, Edx, 20)), ("mmxext", (0x8000_0001, 0, Edx, 22)),
    ("fxsr_opt", (0x8000_0001, 0, Edx, 25)), ("pdpe1gb", (0x8000_0001, 0, Edx, 26)),
    ("rdtscp", (0x8000_0001, 0, Edx, 27)), ("lm", (0x8000_0001, 0, Edx, 29)),
    ("constant_tsc", (0x8000_0007, 0, Edx, 8)),
    ("clzero", (0x8000_0008, 0, Ebx, 0)), ("xsaveerptr", (0x8000_0008, 0, Ebx, 2)),
    ("wbnoinvd", (0x8000_0008, 0, Ebx, 9)), ("ibpb", (0x8000_0008, 0, Ebx, 12)), ("ibrs", (0x8000_0008, 0, Ebx, 14)),
    ("stibp", (0x8000_0008, 0, Ebx, 15)), ("stibp_always_on", (0x8000_0008, 0, Ebx, 17)),
    ("amd_ssbd", (0x8000_0008, 0, Ebx, 24)), ("virt_ssbd", (0x8000_0008, 0, Ebx, 25)),
    ("amd_psfd", (0x8000_0008, 0, Ebx, 28)),
    ("npt", (0x8000_000A, 0, Edx, 0)),
];

/// Pairs of a feature and another that it needs. Without the second, software must not use the first, and a kernel that
/// finds the first anyway may fail (Intel SDM, volume 1, chapters 13 to 18; Linux has a similar list).
#[rustfmt::skip]
const NEEDS: &[(&str, &str)] = &[
    // Instructions and state that only XSAVE can save.
    ("xsaveopt", "xsave"), ("xsavec", "xsave"), ("xgetbv1", "xsave"), ("xsaves", "xsave"), ("xsaveerptr", "xsave"),
    ("avx", "xsave"), ("mpx", "xsave"), ("pku", "xsave"), ("apx", "xsave"), ("xfd", "xsaves"), ("xfd", "xgetbv1"),
    ("shstk", "xsaves"), ("ibt", "xsaves"), ("enqcmd", "xsaves"), ("arch_lbr", "xsaves"),
    // Instructions with a VEX prefix.
    ("f16c", "avx"), ("fma", "avx"), ("avx2", "avx"), ("vaes", "avx"), ("vpclmulqdq", "avx"), ("fma4", "avx"),
    ("xop", "avx"), ("avx_vnni", "avx2"), ("avx_ifma", "avx2"), ("avx_vnni_int8", "avx2"), ("avx_vnni_int16", "avx2"),
    ("avx_ne_convert", "avx2"), ("sha512", "avx2"), ("sm3", "avx"), ("sm4", "avx2"),
    ("vaes", "aes"), ("vpclmulqdq", "pclmulqdq"),
    // Instructions with an EVEX prefix.
    ("avx512f", "avx2"), ("avx512f", "fma"), ("avx512f", "f16c"),
    ("avx512dq", "avx512f"), ("avx512ifma", "avx512f"), ("avx512pf", "avx512f"), ("avx512er", "avx512f"),
    ("avx512cd", "avx512f"), ("avx512bw", "avx512f"), ("avx512vl", "avx512f"), ("avx512_4vnniw", "avx512f"),
    ("avx512_4fmaps", "avx512f"), ("avx512_vp2intersect", "avx512f"), ("avx512_vpopcntdq", "avx512f"),
    ("avx512_vnni", "avx512f"), ("avx512vbmi", "avx512bw"), ("avx512_vbmi2", "avx512bw"), ("avx512_bitalg", "avx512bw"),
    ("avx512_bf16", "avx512bw"), ("avx512_fp16", "avx512bw"), ("avx10", "avx512vl"),
    // Tiles, whose state a kernel enables for a program at its first use.
    ("amx_tile", "xfd"), ("amx_bf16", "amx_tile"), ("amx_int8", "amx_tile"), ("amx_fp16", "amx_tile"),
    ("amx_complex", "amx_tile"),
    ("npt", "svm"), ("skinit", "svm"), ("tsxldtrk", "rtm"), ("fred", "lkgs"), ("pcid", "pge"), ("sgx_lc", "sgx"),
    // KVM's own features; a guest may check any of the clock's bits.
    ("kvmclock_v1", "kvmclock"), ("kvmclock_stable", "kvmclock"),
    ("kvm_async_pf_vmexit", "kvm_async_pf"), ("kvm_async_pf_int", "kvm_async_pf"),
    ("kvm_pv_tlb_flush", "kvm_steal_time"), ("kvm_pv_sched_yield", "kvm_steal_time"),
];

/// Leaves that describe one feature and have no meaning without it.
pub(super) const LEAVES: &[(&str, u32)] = &[
    ("xsave", 0xD),
    ("sgx", 0x12),
    ("intel_pt", 0x14),
    ("arch_lbr", 0x1C),
    ("amx_tile", 0x1D),
    ("amx_tile", 0x1E),
    ("avx10", 0x24),
    ("svm", 0x8000_000A),
];

/// Features that are hidden unless the user asks for them with `+name`.
pub(super) const HIDDEN: &[&str] = &["vmx", "svm", "monitor", "pdcm", "perfctr_core", "sgx", "intel_pt"];

/// Features that KVM may offer, but that need a part which vireo's machines do not have.
const LACKING: &[(&str, &str)] =
    &[("pdcm", "performance counters"), ("perfctr_core", "performance counters"), ("sgx", "enclave memory")];

/// Reasons why a `--cpu` list cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FeatureError {
    /// The item does not begin with `+` or `-`.
    #[error("'{0}' must begin with + or -, like +x2apic,-avx2")]
    Sign(String),
    /// The name is unknown.
    #[error("'{0}' is not a CPU feature vireo knows (names are those of /proc/cpuinfo){1}")]
    Unknown(String, String),
    /// KVM cannot offer the feature on this host.
    #[error("this host's KVM does not offer '{0}'")]
    Unsupported(String),
    /// KVM offers the feature's bit without its leaf, which is of no use.
    #[error("this host's KVM offers '{0}' but not CPUID leaf {1:#x}, which describes it")]
    Leaf(String, u32),
    /// The machine does not have the part that the feature needs.
    #[error("'{0}' needs {1}, which vireo's machines do not have")]
    Lacking(String, &'static str),
    /// The list adds a feature, but the list removes or the host lacks another that it needs.
    #[error("'+{0}' needs '{1}', which the guest does not have")]
    Needs(String, &'static str),
}

/// `--cpu`: features switched on and off relative to the default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Features(pub(super) Vec<(bool, &'static str)>);

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
            let Some((name, _)) = FEATURES.iter().find(|(known, _)| *known == name) else {
                let near =
                    FEATURES.iter().find(|(known, _)| known.replace('_', "") == name.replace(['_', '-', '.'], ""));
                let hint = near.map(|(known, _)| format!("; did you mean {known}?")).unwrap_or_default();
                return Err(FeatureError::Unknown(name.into(), hint));
            };
            if let Some((_, part)) = LACKING.iter().find(|(lacking, _)| on && lacking == name) {
                return Err(FeatureError::Lacking((*name).into(), part));
            }
            // The last mention of a feature counts.
            features.retain(|(_, known)| known != name);
            features.push((on, *name));
        }
        Ok(Features(features))
    }
}

/// Returns the bit of a feature in the table.
pub(super) fn bit(name: &str) -> Option<Bit> {
    FEATURES.iter().find(|(known, _)| *known == name).map(|(_, bit)| *bit)
}

/// Returns the features that a feature needs directly.
pub(super) fn needs(name: &str) -> impl Iterator<Item = &'static str> {
    NEEDS.iter().filter(move |(dependent, _)| *dependent == name).map(|(_, needed)| *needed)
}

/// Returns all pairs of a feature and another that it needs.
pub(super) fn pairs() -> impl Iterator<Item = (&'static str, &'static str)> {
    NEEDS.iter().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_agree() {
        let mut names: Vec<_> = FEATURES.iter().map(|f| f.0).collect();
        names.sort_unstable();
        assert!(names.windows(2).all(|w| w[0] != w[1]));
        let mut bits: Vec<_> = FEATURES.iter().map(|(_, (leaf, sub, reg, bit))| (leaf, sub, *reg as u8, bit)).collect();
        bits.sort_unstable();
        assert!(bits.windows(2).all(|w| w[0] != w[1]), "a bit has two names");
        let known = |name: &str| assert!(bit(name).is_some(), "{name}");
        NEEDS.iter().for_each(|(dependent, needed)| [dependent, needed].into_iter().for_each(|name| known(name)));
        LEAVES.iter().for_each(|(name, _)| known(name));
        HIDDEN.iter().for_each(|name| known(name));
        LACKING.iter().for_each(|(name, _)| assert!(HIDDEN.contains(name), "{name}"));
    }

    #[test]
    fn the_last_word_counts_and_parts_that_are_not_there_are_named() {
        let parse = |text: &str| text.parse::<Features>();
        assert_eq!(parse("+avx2,-avx,-avx2").unwrap().0, [(false, "avx"), (false, "avx2")]);
        assert_eq!(
            parse("+sgx").unwrap_err().to_string(),
            "'sgx' needs enclave memory, which vireo's machines do not have"
        );
        assert!(parse("-sgx,-pdcm").is_ok());
    }
}
