//! The frequency of the guest's TSC, for guests without kvmclock: otherwise they would measure it against a timer,
//! which takes 50 ms and goes wrong on a busy host.
//!
//! | leaf | readers |
//! |---|---|
//! | 0x15, 0x16 | any system on an Intel processor; AMD's lack these leaves, and Linux does not read them there |
//! | 0x40000010 | FreeBSD and others under a hypervisor: kHz of the TSC, kHz of the local APIC's timer |
//!
//! Linux takes leaf 0x15's crystal frequency as the frequency of the local APIC's timer, and then does not measure that
//! either. In KVM this timer counts nanoseconds, so the crystal frequency is 1 GHz, whatever the host's is. (With a
//! crystal frequency of 0, Linux would compute it from leaf 0x16 and the ratio, and use the result in the same way.)

use std::arch::x86_64::CpuidResult;

use kvm_bindings::kvm_cpuid_entry2;

/// Frequency of the local APIC's timer in KVM, in kHz.
const APIC_KHZ: u32 = 1_000_000;
/// Largest numerator of leaf 0x15: Linux multiplies it by the crystal's kHz in 32 bits.
const NUMERATOR_MAX: u32 = u32::MAX / APIC_KHZ;
/// Hypervisor leaf with timing information.
const HYPERVISOR_TIMING: u32 = 0x4000_0010;

/// Adds the leaves for a TSC of `khz` kHz. `host` is the host's leaf 0x16.
pub(super) fn add(entries: &mut Vec<kvm_cpuid_entry2>, intel: bool, khz: u32, host: CpuidResult) {
    if khz == 0 {
        return;
    }
    if raise_highest(entries, 0x4000_0000, HYPERVISOR_TIMING) {
        let timing = CpuidResult { eax: khz, ebx: APIC_KHZ, ecx: 0, edx: 0 };
        put(entries, HYPERVISOR_TIMING, timing);
    }
    if intel && raise_highest(entries, 0, 0x16) {
        let (numerator, denominator) = ratio(khz);
        put(entries, 0x15, CpuidResult { eax: denominator, ebx: numerator, ecx: APIC_KHZ * 1000, edx: 0 });
        put(entries, 0x16, megahertz(khz, host));
    }
}

/// Returns leaf 0x16 in MHz: base, maximum, bus. These are the host's values, unless the host's base differs from the
/// frequency of the guest's TSC.
fn megahertz(khz: u32, host: CpuidResult) -> CpuidResult {
    let base = khz.saturating_add(500) / 1000;
    let near = (host.eax & 0xFFFF).abs_diff(base) <= base / 100;
    let [maximum, bus] = if near { [host.ebx & 0xFFFF, host.ecx & 0xFFFF] } else { [0, 0] };
    CpuidResult { eax: base & 0xFFFF, ebx: maximum.max(base & 0xFFFF), ecx: bus, edx: 0 }
}

/// Returns the TSC's kHz as a fraction of [`APIC_KHZ`]: the best one of its continued fraction with a numerator that
/// fits. The error is at most 120 ppm, and less than 1 ppm for most frequencies.
fn ratio(khz: u32) -> (u32, u32) {
    let (mut n, mut d) = (khz, APIC_KHZ);
    let (mut before, mut last) = ((0u32, 1u32), (1u32, 0u32));
    while d != 0 {
        let digit = n / d;
        let next = |last: u32, before: u32| last.checked_mul(digit)?.checked_add(before);
        let (Some(numerator), Some(denominator)) = (next(last.0, before.0), next(last.1, before.1)) else { break };
        if numerator > NUMERATOR_MAX {
            break;
        }
        (before, last) = (last, (numerator, denominator));
        (n, d) = (d, n % d);
    }
    if last.1 == 0 { (NUMERATOR_MAX, 1) } else { last }
}

/// Raises the highest leaf of a range to `wanted`, if it is lower. Returns false if the range does not exist.
fn raise_highest(entries: &mut [kvm_cpuid_entry2], base: u32, wanted: u32) -> bool {
    let Some(first) = entries.iter_mut().find(|e| e.function == base) else { return false };
    first.eax = first.eax.max(wanted);
    true
}

fn put(entries: &mut Vec<kvm_cpuid_entry2>, function: u32, CpuidResult { eax, ebx, ecx, edx }: CpuidResult) {
    entries.retain(|e| e.function != function);
    entries.push(kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Default::default() });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Computes the frequency from leaf 0x15 as Linux does (`native_calibrate_tsc`), in 32 bits.
    fn linux_khz((numerator, denominator): (u32, u32)) -> u32 {
        APIC_KHZ.checked_mul(numerator).expect("Linux overflows") / denominator
    }

    #[test]
    fn linux_computes_the_frequency_from_the_ratio() {
        for (khz, ppm) in [
            (2_100_000, 0),
            (2_400_000, 0),
            (2_893_202, 1),
            (2_599_998, 1),
            (1_999_999, 1),
            (3_695_996, 2),
            (4_200_003, 1),
            (1_000_000, 0),
            (700_001, 2),
            (2_000_199, 120),
        ] {
            let found = linux_khz(ratio(khz));
            assert!(u64::from(found.abs_diff(khz)) * 1_000_000 <= ppm * u64::from(khz) + 1_000_000, "{khz}: {found}");
        }
        for khz in (1..5_000_000).step_by(997).chain([u32::MAX, 1, 4_294_999]) {
            let (numerator, denominator) = ratio(khz);
            assert!((1..=NUMERATOR_MAX).contains(&numerator) || khz < 300, "{khz}");
            assert_ne!(denominator, 0);
        }
    }

    #[test]
    fn leaf_16_is_the_hosts_where_it_fits() {
        let host = |eax, ebx, ecx| CpuidResult { eax, ebx, ecx, edx: 0 };
        let found = |khz, host| {
            let CpuidResult { eax, ebx, ecx, .. } = megahertz(khz, host);
            [eax, ebx, ecx]
        };
        assert_eq!(found(2_599_998, host(2600, 4000, 100)), [2600, 4000, 100]);
        assert_eq!(found(2_600_000, host(0, 0, 0)), [2600, 2600, 0]);
        assert_eq!(found(1_000_000, host(2600, 4000, 100)), [1000, 1000, 0]);
    }
}
