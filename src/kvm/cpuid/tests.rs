//! Tests with invented processors: what KVM supports on each of them, and the CPUID that a guest gets.

use super::*;
use kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX as INDEXED;

fn e(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    let flags = if matches!(function, 4 | 7 | 0xB | 0xD | 0x1D | 0x1E | 0x1F | 0x8000_001D) { INDEXED } else { 0 };
    kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, ..Default::default() }
}

fn vendor(name: &[u8; 12], highest: u32) -> kvm_cpuid_entry2 {
    let word = |at: usize| u32::from_le_bytes(name[at..at + 4].try_into().unwrap());
    e(0, 0, [highest, word(0), word(8), word(4)])
}

fn empty(_: u32) -> CpuidResult {
    CpuidResult { eax: 0, ebx: 0, ecx: 0, edx: 0 }
}

/// Returns the leaves of an Intel processor, numbered as in the SDM; every feature bit of the basic leaves is set.
fn supported() -> Vec<kvm_cpuid_entry2> {
    vec![
        vendor(b"GenuineIntel", 0x10),
        e(1, 0, [0, 0xFF00_0800, !(1 << 31), u32::MAX]),
        e(4, 0, [0xFC00_0121, 0, 0, 0]),
        e(4, 3, [0xFC00_0163, 0, 0, 0]),
        e(7, 0, [0, 1 << 5, 0, 0]),
        e(0xA, 0, [7, 0, 0, 0]),
        e(0xB, 0, [0, 0, 0, 9]),
        e(0xD, 0, [7, 832, 832, 0]),
        e(0xD, 1, [1, 0, 0, 0]),
        e(0xD, 2, [256, 576, 0, 0]),
        e(0x4000_0000, 0, [0x4000_0001, 0x4B4D_564B, 0x564B_4D56, 0x4D]),
        e(0x4000_0001, 0, [0x0100_7EFB, 0, 0, 0]),
        e(0x8000_0000, 0, [0x8000_0008, 0, 0, 0]),
        e(0x8000_0001, 0, [0, 0, u32::MAX, 0]),
        e(0x8000_0002, 0, [0; 4]),
        e(0x8000_0003, 0, [0; 4]),
        e(0x8000_0004, 0, [0; 4]),
        e(0x8000_0005, 0, [0; 4]),
        e(0x8000_0006, 0, [1, 2, 3, 4]),
        e(0x8000_0007, 0, [0, 0, 0, 1 << 8]),
        e(0x8000_0008, 0, [48, 0, 0, 0]),
    ]
}

fn amd() -> Vec<kvm_cpuid_entry2> {
    let mut entries = supported();
    entries[0] = vendor(b"AuthenticAMD", 0x10);
    entries.push(e(0x8000_000A, 0, [1, 8, 0, 0]));
    entries.push(e(0x8000_001D, 3, [0x163, 0, 0, 0]));
    entries.push(e(0x8000_001E, 0, [0; 4]));
    entries
}

/// Returns the leaves of a Xeon with AMX (Sapphire Rapids), with the state components and sizes of its own leaf 0xD.
/// `xcr0` has the bits that KVM lets guests enable.
fn sapphire_rapids(xcr0: u32) -> Vec<kvm_cpuid_entry2> {
    let mut entries = supported();
    entries[0].eax = 0x20;
    entries.retain(|e| e.function != 0xD);
    let names = "avx2,avx512f,avx512dq,avx512ifma,avx512cd,avx512bw,avx512vl,avx512vbmi,pku,avx512_vbmi2,shstk,ibt,\
                 gfni,vaes,vpclmulqdq,avx512_vnni,avx512_bitalg,avx512_vpopcntdq,amx_bf16,avx512_fp16,amx_tile,amx_int8,avx_vnni,\
                 avx512_bf16,amx_fp16,amx_complex";
    entries.extend([
        e(7, 1, [0; 4]),
        e(0xD, 0, [xcr0, 0x2B00, 0x2B00, 0]),
        e(0xD, 1, [0x1F, 0x2B00, 0x1800, 0]),
        e(0xD, 2, [0x100, 0x240, 0, 0]),
        e(0xD, 5, [0x40, 0x440, 0, 0]),
        e(0xD, 6, [0x200, 0x480, 0, 0]),
        e(0xD, 7, [0x400, 0x680, 0, 0]),
        e(0xD, 9, [8, 0xA80, 0, 0]),
        e(0xD, 11, [0x10, 0, 1, 0]),
        e(0xD, 12, [0x18, 0, 1, 0]),
        e(0xD, 17, [0x40, 0xAC0, 2, 0]),
        e(0xD, 18, [0x2000, 0xB00, 6, 0]),
        e(0x1D, 0, [1, 0, 0, 0]),
        e(0x1D, 1, [0x0400_2000, 0x0008_0040, 0x10, 0]),
        e(0x1E, 0, [1, 0x4010, 0, 0]),
        e(0x1E, 1, [0x1F, 0, 0, 0]),
    ]);
    let mut all = Template { entries, frequencies: empty(0) };
    names.split(',').for_each(|name| all.set(name.trim(), true));
    all.entries
}

/// All XCR0 bits of such a processor: x87, SSE, AVX, AVX-512, PKRU, and AMX.
const WITH_AMX: u32 = 0x602E7;

fn made(supported: Vec<kvm_cpuid_entry2>, features: &str) -> Result<Template, FeatureError> {
    Template::from_supported(supported, empty, true, &features.parse()?)
}

fn template(features: &str) -> Result<Template, FeatureError> {
    made(supported(), features)
}

impl Template {
    fn leaf(&self, function: u32, index: u32) -> Option<[u32; 4]> {
        let found = self.entries.iter().find(|e| (e.function, e.index) == (function, index));
        found.map(|e| [e.eax, e.ebx, e.ecx, e.edx])
    }

    fn names(&self) -> Vec<&'static str> {
        FEATURES.iter().map(|(name, _)| *name).filter(|name| self.has(name)).collect()
    }
}

#[test]
fn default_hides_and_adds() {
    let t = template("").unwrap();
    HIDDEN.iter().for_each(|name| assert!(!t.has(name), "{name}"));
    ["x2apic", "tsc_deadline_timer", "hypervisor"].iter().for_each(|name| assert!(t.has(name), "{name}"));
    assert!(t.leaf(0xA, 0).is_none());
    assert_eq!(t.phys_bits(), 48);
}

#[test]
fn the_user_decides_within_what_kvm_offers() {
    let t = template("+vmx,-avx2").unwrap();
    assert!(t.has("vmx") && !t.has("avx2"));
    let error = |list| template(list).err().unwrap().to_string();
    assert_eq!(error("+avx512f"), "this host's KVM does not offer 'avx512f'");
    assert_eq!(error("avx2"), "'avx2' must begin with + or -, like +x2apic,-avx2");
    assert!(error("+sse4.1").ends_with("did you mean sse4_1?"));
    assert!(error("-nosuch").contains("'nosuch' is not a CPU feature"));
    assert_eq!(error("-avx,+avx2"), "'+avx2' needs 'avx', which the guest does not have");
    // Through two other features, which were not named.
    let no_xsave = made(sapphire_rapids(WITH_AMX), "-xsave,+avx512_bf16").err().unwrap().to_string();
    assert_eq!(no_xsave, "'+avx512_bf16' needs 'avx512bw', which the guest does not have");
    assert!(error("+perfctr_core").ends_with("needs performance counters, which vireo's machines do not have"));
}

#[test]
fn an_addition_brings_its_leaf_or_is_refused() {
    assert!(made(amd(), "").unwrap().leaf(0x8000_000A, 0).is_none());
    assert_eq!(made(amd(), "+svm").unwrap().leaf(0x8000_000A, 0), Some([1, 8, 0, 0]));
    // Only the feature bit is offered, without its leaf.
    let error = template("+svm").err().unwrap().to_string();
    assert_eq!(error, "this host's KVM offers 'svm' but not CPUID leaf 0x8000000a, which describes it");
}

#[test]
fn a_feature_takes_with_it_what_needs_it() {
    let full = made(sapphire_rapids(WITH_AMX), "").unwrap();
    for (gone, others) in [
        ("amx_int8", ""),
        ("amx_tile", "amx_bf16 amx_int8 amx_fp16 amx_complex"),
        ("avx512bw", "avx512vbmi avx512_vbmi2 avx512_bitalg avx512_bf16 avx512_fp16"),
        ("pku", ""),
        ("kvmclock", "kvmclock_v1 kvmclock_stable"),
    ] {
        let t = made(sapphire_rapids(WITH_AMX), &format!("-{gone}")).unwrap();
        let lost: Vec<_> = full.names().into_iter().filter(|name| !t.has(name)).collect();
        let mut wanted: Vec<_> = others.split_whitespace().chain([gone]).collect();
        let mut sorted = lost.clone();
        wanted.sort_unstable();
        sorted.sort_unstable();
        assert_eq!(sorted, wanted, "-{gone}");
    }
    let t = made(sapphire_rapids(WITH_AMX), "-avx").unwrap();
    for name in t.names() {
        assert!(!name.starts_with("avx") && !["fma", "f16c", "vaes", "vpclmulqdq"].contains(&name), "{name}");
    }
    assert!(t.has("aes") && t.has("xsave") && t.has("pku") && t.has("amx_tile"));
    // x87, SSE, PKRU and AMX remain, at their old offsets.
    assert_eq!(t.leaf(0xD, 0), Some([0x60203, 0x2B00, 0x2B00, 0]));
    assert_eq!((t.leaf(0xD, 2), t.leaf(0xD, 5), t.leaf(0xD, 9)), (None, None, Some([8, 0xA80, 0, 0])));
    // 576, PKRU 8, CET 16 and 24; then 64 and 8192, each starting at a multiple of 64.
    assert_eq!(t.leaf(0xD, 1), Some([0x1F, 640 + 64 + 8192, 0x1800, 0]));
}

#[test]
fn without_xsave_nothing_is_left_of_extended_state() {
    let t = made(sapphire_rapids(WITH_AMX), "-xsave").unwrap();
    for leaf in [0xD, 0x1D, 0x1E] {
        assert!(!t.entries.iter().any(|e| e.function == leaf), "{leaf:#x}");
    }
    for name in t.names() {
        let of_state = name.starts_with("avx") || name.starts_with("amx") || name.starts_with("xs");
        assert!(!of_state && !["pku", "fma", "f16c", "shstk", "ibt", "xgetbv1", "xfd"].contains(&name), "{name}");
    }
}

#[test]
fn amx_is_whole_or_gone() {
    let t = made(sapphire_rapids(WITH_AMX), "").unwrap();
    assert_eq!(t.leaf(0xD, 0), Some([WITH_AMX, 0x2B00, 0x2B00, 0]));
    assert_eq!(t.leaf(0x1D, 1), Some([0x0400_2000, 0x0008_0040, 0x10, 0]));
    assert!(t.has("amx_tile") && t.has("amx_fp16"));
    // XCR0 without permission for AMX: on host kernels from 5.17 to 6.3, on newer ones, and with the other half of AMX.
    for xcr0 in [0x202E7, 0x2E7, 0x402E7] {
        let t = made(sapphire_rapids(xcr0), "").unwrap();
        assert!(t.names().iter().all(|name| !name.starts_with("amx")), "{:?}", t.names());
        assert_eq!(t.leaf(0xD, 0), Some([0x2E7, 0xA88, 0xA88, 0]), "{xcr0:#x}");
        let leaves = [(0xD, 17), (0xD, 18), (0x1D, 0), (0x1D, 1), (0x1E, 0), (0x1E, 1)];
        assert!(leaves.iter().all(|(leaf, index)| t.leaf(*leaf, *index).is_none()));
        // By the Intel SDM: 576, AVX 256, AVX-512 64 + 512 + 1024, PKRU 8, CET 16 + 24.
        assert_eq!(t.leaf(0xD, 1).unwrap()[1], 576 + 256 + 64 + 512 + 1024 + 8 + 16 + 24);
        assert!(t.has("avx512_fp16") && t.has("xfd"));
        let error = made(sapphire_rapids(xcr0), "+amx_int8").err().unwrap().to_string();
        assert!(error.contains("amx"), "{error}");
    }
}

#[test]
fn the_host_names_the_processor_and_its_caches_where_kvm_does_not() {
    let host = |leaf: u32| CpuidResult { eax: leaf, ebx: 2, ecx: 3, edx: 4 };
    let t = Template::from_supported(supported(), host, true, &Features::default()).unwrap();
    for leaf in 0x8000_0002..=0x8000_0005 {
        assert_eq!(t.leaf(leaf, 0), Some([leaf, 2, 3, 4]));
    }
    assert_eq!(t.leaf(0x8000_0006, 0), Some([1, 2, 3, 4]), "KVM's word counts");
}

#[test]
fn topology_is_one_socket_of_single_thread_cores() {
    for (kind, amd) in [(supported(), false), (amd(), true)] {
        let t = made(kind, "").unwrap();
        for (id, count, bits) in [(0, 1, 0), (2, 3, 2), (253, 254, 8)] {
            let cpuid = t.for_vcpu(id, count, 0).unwrap();
            let get = |f, i| *cpuid.as_slice().iter().find(|e| e.function == f && e.index == i).unwrap();
            assert_eq!(get(1, 0).ebx >> 24, id);
            assert_eq!(get(1, 0).edx >> 28 & 1, u32::from(count > 1));
            assert_eq!((get(0xB, 0).eax, get(0xB, 0).ebx, get(0xB, 0).edx), (0, 1, id));
            assert_eq!((get(0xB, 1).eax, get(0xB, 1).ebx, get(0xB, 1).ecx), (bits, count, 0x201));
            assert_eq!(get(0xB, 2).ebx, 0);
            assert_eq!(get(4, 0).eax >> 14 & 0xFFF, 0, "L1 is private");
            assert_eq!(get(4, 3).eax >> 14 & 0xFFF, (1 << bits) - 1, "L3 is shared");
            let legacy = get(0x8000_0001, 0).ecx >> 1 & 1;
            if amd {
                assert_eq!((get(0x8000_0008, 0).ecx, legacy), (bits << 12 | (count - 1), u32::from(count > 1)));
                assert_eq!(get(0x8000_001E, 0).eax, id);
                assert_eq!(get(0x8000_001D, 3).eax >> 14 & 0xFFF, count - 1);
            } else {
                assert_eq!(get(0x8000_0008, 0).ecx, 0, "reserved");
                assert_eq!(legacy, 1, "as KVM has it");
            }
        }
    }
}

#[test]
fn the_frequency_of_the_tsc_is_where_each_vendor_has_it() {
    let frequencies = |kind, khz| {
        let t = made(kind, "").unwrap();
        let cpuid = t.for_vcpu(0, 1, khz).unwrap();
        let get = |leaf: u32| {
            let found = cpuid.as_slice().iter().find(|e| e.function == leaf);
            found.map(|e| [e.eax, e.ebx, e.ecx, e.edx])
        };
        assert!(get(0).unwrap()[0] >= if get(0x15).is_some() { 0x16 } else { 0 });
        assert!(get(0x4000_0000).unwrap()[0] >= if get(0x4000_0010).is_some() { 0x4000_0010 } else { 0 });
        (get(0x15), get(0x16), get(0x4000_0010))
    };
    let hypervisor = Some([2_500_000, 1_000_000, 0, 0]);
    let intel = (Some([2, 5, 1_000_000_000, 0]), Some([2500, 2500, 0, 0]), hypervisor);
    assert_eq!(frequencies(supported(), 2_500_000), intel);
    assert_eq!(frequencies(amd(), 2_500_000), (None, None, hypervisor));
    assert_eq!(frequencies(supported(), 0), (None, None, None), "KVM does not know it");
    let mut varying = supported();
    varying.retain(|e| e.function != 0x8000_0007);
    assert_eq!(frequencies(varying, 2_500_000), (None, None, None));
}
