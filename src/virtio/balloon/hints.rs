//! Free page hinting (5.5.6.5): which pages are free, asked when the guest's memory is about to be copied.
//!
//! ```text
//! start ──▶ command in configuration space ──▶ driver: the command, free pages..., stop ──▶ complete
//! end ────▶ DONE there: the driver gives what it told of back to its guest
//! ```

use std::collections::BTreeMap;
use std::ops::Range;

use crate::memory::GuestRam;
use crate::virtio::Fault;
use crate::virtio::chain::{Chain, Segment};

/// Values of the command that are none (5.5.6.5): nothing to tell, and what was told is done with.
const STOP: u32 = 0;
const DONE: u32 = 1;

/// Ranges that are remembered; of more a guest tells in vain. Linux tells 4 MiB at a time, and neighbours are one.
const MAX_RANGES: usize = 1 << 16;

/// Memory that the guest had no use for when it told so.
///
/// It may have written to it since: a driver that runs short of memory takes back what it told of, and does not wait
/// until that was heard. So nothing here is given back to the host. A range counts only for who has watched what the
/// guest writes (KVM's dirty log) from before the question on: what was not written since then need not be copied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FreeHints {
    /// The driver has told all that it had to.
    pub complete: bool,
    /// Guest-physical addresses, in order, apart from each other.
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
    /// The last that was used.
    last: u32,
    phase: Phase,
    /// Ends by starts.
    ranges: BTreeMap<u64, u64>,
}

impl Hints {
    pub(super) fn command(&self) -> u32 {
        self.command
    }

    /// The command that stands in configuration space, and the last that was used.
    pub(super) fn save(&self) -> (u32, u32) {
        (self.command, self.last)
    }

    /// A question that was saved can only be ended: what was told does not count any more, since whoever copied memory,
    /// and watched what the guest wrote to it, is gone.
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

    /// Returns whether there was something to end.
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

    /// A buffer of the driver's: four bytes to read are a command, what could be written is free memory. What belongs to
    /// no question of ours is ignored.
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

    /// Adds a range that was checked to be memory, together with those that it touches.
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
        // What joins two makes room.
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
