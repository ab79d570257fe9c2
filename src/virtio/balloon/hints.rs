//! Free page hinting (5.5.6.5): the guest reports its free pages when its memory is about to be copied.
//!
//! ```text
//! start ──▶ command in configuration space ──▶ driver: the command, free pages..., stop ──▶ complete
//! end ────▶ DONE there: the driver gives the reported pages back to its guest
//! ```

use std::collections::BTreeMap;
use std::ops::Range;

use crate::memory::GuestRam;
use crate::virtio::Fault;
use crate::virtio::chain::{Chain, Segment};

/// Values of the command with a fixed meaning (5.5.6.5): nothing to report, and reports no longer needed.
const STOP: u32 = 0;
const DONE: u32 = 1;

/// Maximum number of ranges; further ones are dropped. Linux reports 4 MiB at a time, and adjacent ranges become one.
const MAX_RANGES: usize = 1 << 16;

/// Memory that the guest did not use when it reported it.
///
/// The guest may have written to it since: a driver that runs short of memory takes back what it reported, and does not
/// wait until the report was read. Nothing here is therefore given back to the host. A range is meaningful only to a
/// caller that has watched the guest's writes (KVM's dirty log) from before the request on: what was not written since
/// then need not be copied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FreeHints {
    /// Set once the driver has reported everything.
    pub complete: bool,
    /// Guest-physical ranges, in order and not adjacent.
    pub ranges: Vec<Range<u64>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Idle,
    /// The driver has not answered yet.
    Asked,
    Told,
    Complete,
}

#[derive(Debug, Default)]
pub(super) struct Hints {
    /// `free_page_hint_cmd_id`.
    command: u32,
    /// Last command that was a request.
    last: u32,
    phase: Phase,
    /// End of each range, by its start.
    ranges: BTreeMap<u64, u64>,
}

impl Hints {
    pub(super) fn command(&self) -> u32 {
        self.command
    }

    /// Returns the command in configuration space, and the last one that was a request.
    pub(super) fn save(&self) -> (u32, u32) {
        (self.command, self.last)
    }

    /// Restores a saved request, which can only be ended: the reports no longer count, because whoever copied memory,
    /// and watched the guest's writes to it, is gone.
    pub(super) fn restored(command: u32, last: u32) -> Self {
        let phase = if command > DONE { Phase::Complete } else { Phase::Idle };
        Hints { command, last, phase, ranges: BTreeMap::new() }
    }

    pub(super) fn start(&mut self) {
        self.last = self.last.wrapping_add(1).max(DONE + 1);
        self.command = self.last;
        self.phase = Phase::Asked;
        self.ranges.clear();
    }

    /// Ends the request. Returns whether there was one.
    pub(super) fn end(&mut self) -> bool {
        self.ranges = BTreeMap::new();
        let phase = std::mem::take(&mut self.phase);
        if phase != Phase::Idle {
            self.command = DONE;
        }
        phase != Phase::Idle
    }

    pub(super) fn found(&self) -> FreeHints {
        let ranges = self.ranges.iter().map(|(start, end)| *start..*end).collect();
        FreeHints { complete: self.phase == Phase::Complete, ranges }
    }

    /// Handles a buffer of the driver: four bytes to read are a command, the writable part is free memory. Anything
    /// that belongs to no request of ours is ignored.
    pub(super) fn take(&mut self, chain: &Chain, ram: &GuestRam) -> Result<(), Fault> {
        let mut reader = chain.reader(ram);
        let mut command = [0; 4];
        if reader.len() >= command.len() as u64 {
            reader.read(&mut command)?;
            self.phase = match (self.phase, u32::from_le_bytes(command)) {
                (Phase::Asked, command) if command == self.command => Phase::Told,
                (Phase::Told, STOP) => Phase::Complete,
                (phase, _) => phase,
            };
        }
        if self.phase == Phase::Told {
            chain.writable().iter().for_each(|segment| self.add(segment));
        }
        Ok(())
    }

    /// Adds a range that was checked to be memory, merged with those that it touches.
    fn add(&mut self, Segment { addr, len }: &Segment) {
        let (mut start, mut end) = (*addr, addr + u64::from(*len));
        while let Some((&near, &near_end)) = self.ranges.range(..=end).next_back().filter(|(_, e)| **e >= start) {
            self.ranges.remove(&near);
            (start, end) = (start.min(near), end.max(near_end));
        }
        if self.ranges.len() < MAX_RANGES {
            self.ranges.insert(start, end);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn segment(addr: u64, len: u32) -> Segment {
        Segment { addr, len }
    }

    #[test]
    fn commands_are_new_ones() {
        let mut hints = Hints { last: u32::MAX - 1, ..Hints::default() };
        assert_eq!(hints.command(), STOP);
        assert!(!hints.end());
        let commands = [(); 3].map(|()| {
            hints.start();
            hints.command()
        });
        assert_eq!(commands, [u32::MAX, 2, 3]);
        assert!(hints.end() && !hints.end());
        assert_eq!(hints.command(), DONE);
    }

    #[test]
    fn memory_for_them_is_bounded() {
        let mut hints = Hints::default();
        (0..MAX_RANGES as u64 + 10).for_each(|n| hints.add(&segment(n * 0x2000, 0x1000)));
        assert_eq!(hints.ranges.len(), MAX_RANGES);
        // A range that joins two others makes room.
        hints.add(&segment(0x1000, 0x1000));
        assert_eq!((hints.ranges.len(), hints.ranges.get(&0)), (MAX_RANGES - 1, Some(&0x3000)));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, cases: 64, ..ProptestConfig::default() })]

        #[test]
        fn ranges_are_what_was_told(told in prop::collection::vec((0..100u64, 1..10u32), 0..40)) {
            let mut hints = Hints::default();
            let mut model = std::collections::BTreeSet::new();
            for (addr, len) in told {
                hints.add(&segment(addr, len));
                model.extend(addr..addr + u64::from(len));
            }
            let found = hints.found().ranges;
            prop_assert!(found.is_sorted_by(|a, b| a.end < b.start));
            prop_assert_eq!(found.into_iter().flatten().collect::<Vec<_>>(), model.into_iter().collect::<Vec<_>>());
        }
    }
}
