//! What the guest tells of its memory (5.5.6.3).

use std::collections::BTreeMap;

use serde::Serialize;

/// Bytes of a statistic (5.5.6.3): a tag and a value, packed.
pub(super) const STAT: usize = 10;

/// Names of statistics by tag: 0 to 9 are those of 5.5.6.4, the others Linux has added since.
const STAT_NAMES: [&str; 16] = [
    "swap_in",
    "swap_out",
    "major_faults",
    "minor_faults",
    "free_memory",
    "total_memory",
    "available_memory",
    "disk_caches",
    "hugetlb_allocations",
    "hugetlb_failures",
    "oom_kills",
    "allocation_stalls",
    "asynchronous_scans",
    "direct_scans",
    "asynchronous_reclaims",
    "direct_reclaims",
];

/// What is known of the guest's memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct BalloonStats {
    /// What the guest is asked to give up, in bytes.
    pub target: u64,
    /// What it says that it has given up, in bytes.
    pub actual: u64,
    /// Its statistics by name, as it told them last: bytes, or counts since it started.
    pub guest: BTreeMap<&'static str, u64>,
    /// How old they are, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub age_ms: Option<u64>,
}

/// Statistics by name; tags without one are ignored (5.5.6.3.1), as is the rest of a broken one.
pub(super) fn parse(bytes: &[u8]) -> BTreeMap<&'static str, u64> {
    let (stats, _) = bytes.as_chunks::<STAT>();
    let known = stats.iter().filter_map(|[t0, t1, value @ ..]| {
        let name = STAT_NAMES.get(usize::from(u16::from_le_bytes([*t0, *t1])))?;
        Some((*name, u64::from_le_bytes(*value)))
    });
    known.collect()
}
