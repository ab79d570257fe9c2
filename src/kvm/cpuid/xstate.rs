//! CPUID leaf 0xD: the state components that XSAVE saves, and the resulting sizes (Intel SDM, volume 1, 13.2).

use kvm_bindings::kvm_cpuid_entry2;

/// Components that a guest enables in XCR0, each with a feature that needs the component.
const USER: [(u32, &str); 10] = [
    (2, "avx"),
    (3, "mpx"),
    (4, "mpx"),
    (5, "avx512f"),
    (6, "avx512f"),
    (7, "avx512f"),
    (9, "pku"),
    (17, "amx_tile"),
    (18, "amx_tile"),
    (19, "apx"),
];
/// Components that a guest enables in IA32_XSS, each with the features of which one suffices to keep it.
const SUPERVISOR: [(u32, &[&str]); 5] =
    [(8, &["intel_pt"]), (10, &["enqcmd"]), (11, &["shstk", "ibt"]), (12, &["shstk", "ibt"]), (15, &["arch_lbr"])];

/// Size in bytes of the legacy region and the header, which are always present.
const BASE: u32 = 512 + 64;

fn entry(entries: &mut [kvm_cpuid_entry2], index: u32) -> Option<&mut kvm_cpuid_entry2> {
    entries.iter_mut().find(|e| e.function == 0xD && e.index == index)
}

/// Returns features whose state no guest could enable: AMX if permission for it was refused. (Host kernels before 6.4
/// still offer AMX's instructions, its leaves and half of its state, and a guest dies when it enables that half.)
pub(super) fn unusable(entries: &[kvm_cpuid_entry2]) -> impl Iterator<Item = &'static str> {
    let offered = entries.iter().find(|e| e.function == 0xD && e.index == 0).map_or(0, |e| e.eax);
    USER.into_iter().filter(move |(component, _)| offered >> component & 1 == 0).map(|(_, feature)| feature)
}

/// Removes the state of features that the guest does not have.
pub(super) fn trim(entries: &mut Vec<kvm_cpuid_entry2>, has: impl Fn(&str) -> bool) {
    let gone =
        USER.into_iter().filter(|(_, feature)| !has(feature)).fold(0, |mask, (component, _)| mask | 1u32 << component);
    let gone_supervisor = SUPERVISOR
        .into_iter()
        .filter(|(_, features)| !features.iter().any(|feature| has(feature)))
        .fold(0, |mask, (component, _)| mask | 1u32 << component);
    let Some(e) = entry(entries, 0) else { return };
    e.eax &= !gone;
    let xcr0 = e.eax;
    let mut xss = 0;
    if let Some(e) = entry(entries, 1) {
        // Without XSAVES there is no IA32_XSS.
        e.ecx = if e.eax & 1 << 3 == 0 { 0 } else { e.ecx & !gone_supervisor };
        xss = e.ecx;
    }
    // Sub-leaves of components beyond bit 31, or without a name in these tables, stay as KVM reports them.
    entries.retain(|e| e.function != 0xD || !(2..32).contains(&e.index) || (xcr0 | xss) >> e.index & 1 == 1);
    set_sizes(entries, xcr0, xss);
}

/// Sets the sizes to those of the remaining components. KVM replaces the sizes of enabled components while the guest
/// runs.
fn set_sizes(entries: &mut [kvm_cpuid_entry2], xcr0: u32, xss: u32) {
    let (mut standard, mut compacted) = (BASE, BASE);
    let mut components: Vec<_> = entries.iter().filter(|e| e.function == 0xD && (2..32).contains(&e.index)).collect();
    components.sort_unstable_by_key(|e| e.index);
    for e in components {
        if xcr0 >> e.index & 1 == 1 {
            standard = standard.max(e.ebx.saturating_add(e.eax));
        }
        if (xcr0 | xss) >> e.index & 1 == 1 {
            // Bit 1 of ECX: the component begins at a multiple of 64.
            let start = if e.ecx & 2 != 0 { compacted.next_multiple_of(64) } else { compacted };
            compacted = start.saturating_add(e.eax);
        }
    }
    if let Some(e) = entry(entries, 0) {
        (e.ebx, e.ecx) = (standard, standard);
    }
    if let Some(e) = entry(entries, 1).filter(|e| e.eax & (1 << 1 | 1 << 3) != 0) {
        e.ebx = compacted;
    }
}
