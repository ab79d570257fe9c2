//! Statistics that the guest reports of its memory (5.5.6.3).

use std::collections::BTreeMap;

use serde::Serialize;

/// Size of a statistic in bytes (5.5.6.3): a tag and a value, packed.
pub(super) const STAT: usize = 10;

/// Names of statistics by tag: 0 to 9 are those of 5.5.6.4, Linux has added the others since.
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

/// Sizes of the balloon, and the guest's memory statistics.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct BalloonStats {
    /// Bytes that the guest is asked to give up.
    pub target: u64,
    /// Bytes that the guest says it has given up.
    pub actual: u64,
    /// Latest statistics of the guest by name: bytes, or counts since it started.
    pub guest: BTreeMap<&'static str, u64>,
    /// Age of the statistics in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub age_ms: Option<u64>,
}

/// Parses statistics. Tags without a name are ignored (5.5.6.3.1), as is an incomplete statistic at the end.
pub(super) fn parse(bytes: &[u8]) -> BTreeMap<&'static str, u64> {
    let (stats, _) = bytes.as_chunks::<STAT>();
    let known = stats.iter().filter_map(|[t0, t1, value @ ..]| {
        let name = STAT_NAMES.get(usize::from(u16::from_le_bytes([*t0, *t1])))?;
        Some((*name, u64::from_le_bytes(*value)))
    });
    known.collect()
}
