//! The split virtqueue (2.7), device side.
//!
//! The driver's settings in the queue registers form a [`QueueState`]. Checked as a whole, it becomes a [`Queue`]; a
//! stopped queue becomes a state again. A queue holds addresses and counters, never host pointers: every access goes
//! through [`GuestRam`], so pages that it writes are marked dirty. The guest controls the rings' contents, so every
//! number in them is checked where it is read.

use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY,
};

use super::Progress;
use super::chain::{self, Chain, Segment};
use crate::memory::{GuestRam, OutOfRam};

/// Number of chains that [`Queue::serve`] takes before others get their turn.
pub const BATCH: usize = 64;

/// Registers and positions of a queue, as the driver sets them up and as they are saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueState {
    /// `QueueReady`.
    pub ready: bool,
    /// Number of entries.
    pub size: u16,
    /// Descriptor area, guest-physical.
    pub desc: u64,
    /// Driver area (available ring).
    pub avail: u64,
    /// Device area (used ring).
    pub used: u64,
    /// Next available entry to take, free-running.
    pub next_avail: u16,
    /// Next used entry to fill, free-running.
    pub next_used: u16,
}

/// Reason why a queue cannot be used as the driver set it up.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SetupError {
    /// Size that is not a power of two (2.7) or exceeds `QueueNumMax` (4.2.2.2).
    #[error("its size {size} is not a power of two up to {max}")]
    Size {
        /// Size that the driver wrote.
        size: u16,
        /// `QueueNumMax`.
        max: u16,
    },
    /// Address that is not a multiple of 16, 2 or 4 (2.7).
    #[error("its {part} at {addr:#x} is not aligned to {align} bytes")]
    Alignment {
        /// Name of the part.
        part: &'static str,
        /// Address that the driver wrote.
        addr: u64,
        /// Required alignment in bytes.
        align: u64,
    },
    /// Part that is not wholly in RAM.
    #[error("its {part} is outside of memory: {source}")]
    OutOfRam {
        /// Name of the part.
        part: &'static str,
        /// Range that is not in RAM.
        source: OutOfRam,
    },
    /// Saved positions that no queue can have.
    #[error("{in_flight} requests are in flight in a queue of {size}")]
    Positions {
        /// Number of entries taken but not used.
        in_flight: u16,
        /// Queue size.
        size: u16,
    },
}

/// Rule of the ring that the driver broke.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// More available entries than the queue has (2.7.13.3).
    #[error("the available index jumped from {from} to {to}, and only {room} entries are free")]
    AvailJumped {
        /// Next available entry to take.
        from: u16,
        /// Index that the driver wrote.
        to: u16,
        /// Number of entries by which the index may advance.
        room: u16,
    },
    /// Available entry that is not the index of a descriptor (2.7.6).
    #[error("available entry {head} is not a descriptor of a queue of {size}")]
    Head {
        /// Entry that the driver wrote.
        head: u16,
        /// Queue size.
        size: u16,
    },
    /// Malformed chain.
    #[error(transparent)]
    Chain(#[from] chain::Error),
    /// Ring that is no longer in RAM.
    #[error("the ring is no longer in memory: {0}")]
    OutOfRam(#[from] OutOfRam),
}

/// Queue that was checked and can be served.
#[derive(Debug)]
pub struct Queue {
    index: u16,
    state: QueueState,
    event_idx: bool,
    indirect: bool,
    /// Driver's index when last read; saves a read per entry within a batch.
    avail_idx: u16,
    /// `next_used` when the driver was last notified or found not to care. A queue is stopped only after that.
    signalled: u16,
    /// Segment lists of finished chains, for reuse.
    spare: Vec<Vec<Segment>>,
}

impl Queue {
    /// Checks queue `index` as a whole (2.7): size, alignment and the full extent of each part.
    pub fn new(index: u16, state: QueueState, max: u16, features: u64, ram: &GuestRam) -> Result<Self, SetupError> {
        let QueueState { ready: _, size, desc, avail, used, next_avail, next_used } = state;
        if !size.is_power_of_two() || size > max {
            return Err(SetupError::Size { size, max });
        }
        let n = u64::from(size);
        // The last two bytes of the available and the used ring exist only with event_idx; Linux always has them.
        let event_idx = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let tail = if event_idx { 2 } else { 0 };
        let parts = [
            ("descriptor table", desc, 16, 16 * n),
            ("available ring", avail, 2, 4 + 2 * n + tail),
            ("used ring", used, 4, 4 + 8 * n + tail),
        ];
        for (part, addr, align, len) in parts {
            if addr % align != 0 {
                return Err(SetupError::Alignment { part, addr, align });
            }
            ram.slice(addr, len).map_err(|source| SetupError::OutOfRam { part, source })?;
        }
        let in_flight = next_avail.wrapping_sub(next_used);
        if in_flight > size {
            return Err(SetupError::Positions { in_flight, size });
        }
        let indirect = features & 1 << VIRTIO_RING_F_INDIRECT_DESC != 0;
        let (avail_idx, signalled) = (next_avail, next_used);
        Ok(Queue { index, state, event_idx, indirect, avail_idx, signalled, spare: Vec::new() })
    }

    /// Creates a queue that the driver does not use: always empty.
    pub fn disabled(index: u16, state: QueueState) -> Self {
        let state = QueueState { ready: false, size: 0, ..state };
        let (avail_idx, signalled) = (state.next_avail, state.next_used);
        Queue { index, state, event_idx: false, indirect: false, avail_idx, signalled, spare: Vec::new() }
    }

    /// Returns the queue's index within the device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Returns whether the driver uses the queue.
    pub fn is_enabled(&self) -> bool {
        self.state.size != 0
    }

    /// Returns the number of entries; 0 when disabled.
    pub fn size(&self) -> u16 {
        self.state.size
    }

    /// Returns the number of chains that were popped and neither pushed nor put back.
    pub fn in_flight(&self) -> u16 {
        self.state.next_avail.wrapping_sub(self.state.next_used)
    }

    /// Returns the registers and positions.
    pub fn state(&self) -> QueueState {
        self.state
    }

    /// Takes the next chain, if the driver has made one available.
    pub fn pop(&mut self, ram: &GuestRam) -> Result<Option<Chain>, Error> {
        if self.state.next_avail == self.avail_idx && !self.look(ram)? {
            return Ok(None);
        }
        let size = self.state.size;
        let slot = u64::from(self.state.next_avail % size);
        let head = ram.load_u16(self.state.avail + 4 + 2 * slot, Ordering::Relaxed)?;
        if head >= size {
            return Err(Error::Head { head, size });
        }
        let table = chain::Table { addr: self.state.desc, len: size.into(), indirect: self.indirect };
        let chain = Chain::walk(ram, table, head, self.spare.pop().unwrap_or_default())?;
        self.state.next_avail = self.state.next_avail.wrapping_add(1);
        Ok(Some(chain))
    }

    /// Takes the next chain; if there is none, asks the driver to kick for new buffers and looks again. `None` therefore
    /// means that a kick will announce the next chain.
    pub fn next(&mut self, ram: &GuestRam) -> Result<Option<Chain>, Error> {
        match self.pop(ram)? {
            // A chain that arrived before the driver could see the request has no kick.
            None if self.enable_notifications(ram)? => self.pop(ram),
            chain => Ok(chain),
        }
    }

    /// Puts back the chain that was popped last, as if it had never been popped.
    pub fn unpop(&mut self, chain: Chain) {
        self.state.next_avail = self.state.next_avail.wrapping_sub(1);
        self.spare.push(chain.into_segments());
    }

    /// Returns a chain to the driver with the number of bytes written to it (2.7.8). Any order is allowed.
    pub fn push_used(&mut self, ram: &GuestRam, chain: Chain, written: u32) -> Result<(), Error> {
        self.push_used_together(ram, [(chain, written)])
    }

    /// Returns several chains to the driver in one step; it never sees only some of them.
    pub fn push_used_together(
        &mut self,
        ram: &GuestRam,
        chains: impl IntoIterator<Item = (Chain, u32)>,
    ) -> Result<(), Error> {
        if !self.is_enabled() {
            return Ok(());
        }
        for (chain, written) in chains {
            let slot = u64::from(self.state.next_used % self.state.size);
            let element = u64::from(chain.head()) | u64::from(written) << 32;
            ram.write_obj(self.state.used + 4 + 8 * slot, element.to_le())?;
            self.state.next_used = self.state.next_used.wrapping_add(1);
            self.spare.push(chain.into_segments());
        }
        // Release: the elements, and the data before them, are visible before the index.
        ram.store_u16(self.state.used + 2, self.state.next_used, Ordering::Release)?;
        Ok(())
    }

    /// Returns whether the driver wants a notification of what was pushed since the last call (2.7.7). Not idempotent.
    pub fn needs_notification(&mut self, ram: &GuestRam) -> Result<bool, Error> {
        let new = self.state.next_used;
        if !self.is_enabled() || self.signalled == new {
            return Ok(false);
        }
        let old = std::mem::replace(&mut self.signalled, new);
        // The index must be visible before we read what the driver asks for; the driver does the same in reverse.
        fence(Ordering::SeqCst);
        if !self.event_idx {
            let flags = ram.load_u16(self.state.avail, Ordering::Relaxed)?;
            return Ok(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0);
        }
        let event = ram.load_u16(self.state.avail + 4 + 2 * u64::from(self.state.size), Ordering::Relaxed)?;
        Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
    }

    /// Asks the driver to kick for new buffers (2.7.10). Returns whether some arrived before the driver could know: the
    /// caller must then continue, because no kick will come for these.
    pub fn enable_notifications(&mut self, ram: &GuestRam) -> Result<bool, Error> {
        if !self.is_enabled() {
            return Ok(false);
        }
        let QueueState { used, size, next_avail, .. } = self.state;
        if self.event_idx {
            ram.store_u16(used + 4 + 8 * u64::from(size), next_avail, Ordering::Relaxed)?;
        } else {
            ram.store_u16(used, 0, Ordering::Relaxed)?;
        }
        fence(Ordering::SeqCst);
        self.look(ram)
    }

    /// Hints to the driver that kicks are not needed for now. Does nothing with event_idx: the entry that the driver
    /// was asked to kick for is already past.
    pub fn disable_notifications(&mut self, ram: &GuestRam) -> Result<(), Error> {
        if self.is_enabled() && !self.event_idx {
            ram.store_u16(self.state.used, VRING_USED_F_NO_NOTIFY as u16, Ordering::Relaxed)?;
        }
        Ok(())
    }

    /// Serves available chains, at most [`BATCH`], with a function that finishes each immediately and returns the
    /// number of bytes it wrote.
    pub fn serve<E: From<Error>>(
        &mut self,
        ram: &GuestRam,
        mut request: impl FnMut(&Chain) -> Result<u32, E>,
    ) -> Result<Progress, E> {
        self.disable_notifications(ram)?;
        for _ in 0..BATCH {
            let Some(chain) = self.next(ram)? else { return Ok(Progress::Done) };
            let written = request(&chain)?;
            self.push_used(ram, chain, written)?;
        }
        Ok(Progress::More)
    }

    /// Returns the driver's index, which grows with every buffer that the driver makes available.
    pub fn driver_index(&mut self, ram: &GuestRam) -> Result<u16, Error> {
        self.look(ram)?;
        Ok(self.avail_idx)
    }

    /// Reads the driver's index; returns whether there is a chain to take.
    fn look(&mut self, ram: &GuestRam) -> Result<bool, Error> {
        if !self.is_enabled() {
            return Ok(false);
        }
        // Acquire: the entries and descriptors that the index covers are visible once the index is.
        let to = ram.load_u16(self.state.avail + 2, Ordering::Acquire)?;
        let from = self.state.next_avail;
        let room = self.state.size.saturating_sub(self.in_flight());
        if to.wrapping_sub(from) > room {
            return Err(Error::AvailJumped { from, to, room });
        }
        self.avail_idx = to;
        Ok(to != from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{EVENT_IDX, FakeQueue, inn, out};

    const RAM: u64 = 1 << 20;
    const BUFFERS: u64 = 0x8_0000;

    fn setup(size: u16, features: u64) -> (GuestRam, FakeQueue, Queue) {
        let ram = GuestRam::anonymous(RAM);
        let driver = FakeQueue::new(&ram, 0x1000, size);
        let queue = driver.device(features);
        (ram, driver, queue)
    }

    #[test]
    fn requests_come_in_order_and_go_back_in_any() {
        let (ram, mut driver, mut queue) = setup(8, 0);
        let heads: Vec<u16> = (0..3).map(|i| driver.add(&[out(BUFFERS + i, 1), inn(BUFFERS, 1)]).unwrap()).collect();
        let chains: Vec<Chain> = std::iter::from_fn(|| queue.pop(&ram).unwrap()).collect();
        assert_eq!(chains.iter().map(Chain::head).collect::<Vec<_>>(), heads);
        assert_eq!(queue.in_flight(), 3);
        for chain in chains.into_iter().rev() {
            let head = chain.head();
            queue.push_used(&ram, chain, 7).unwrap();
            assert_eq!(driver.take_used(), Some((head, 7)));
        }
        assert_eq!((queue.in_flight(), driver.take_used()), (0, None));
    }

    #[test]
    fn indices_wrap() {
        let (ram, mut driver, mut queue) = setup(4, EVENT_IDX);
        for i in 0..70_000u32 {
            let head = driver.add(&[out(BUFFERS, 4)]).unwrap();
            let chain = queue.pop(&ram).unwrap().unwrap();
            queue.push_used(&ram, chain, i).unwrap();
            driver.set_used_event(driver.used_idx);
            assert!(queue.needs_notification(&ram).unwrap(), "{i}");
            assert_eq!(driver.take_used(), Some((head, i)));
            assert!(!queue.enable_notifications(&ram).unwrap());
        }
    }

    #[test]
    fn an_unpopped_chain_comes_again() {
        let (ram, mut driver, mut queue) = setup(4, 0);
        let head = driver.add(&[out(BUFFERS, 4)]).unwrap();
        for _ in 0..3 {
            let chain = queue.pop(&ram).unwrap().unwrap();
            assert_eq!(chain.head(), head);
            queue.unpop(chain);
            assert_eq!(queue.in_flight(), 0);
        }
    }

    #[test]
    fn setup_rules() {
        let ram = GuestRam::anonymous(RAM);
        let good = FakeQueue::new(&ram, 0x1000, 8).state();
        let check = |state| Queue::new(0, state, 256, EVENT_IDX, &ram).map(|_| ()).unwrap_err();
        for size in [0, 3, 255, 512, u16::MAX] {
            assert_eq!(check(QueueState { size, ..good }), SetupError::Size { size, max: 256 });
        }
        for off in [1, 2, 4, 8, 15] {
            assert!(matches!(
                check(QueueState { desc: good.desc + off, ..good }),
                SetupError::Alignment { part: "descriptor table", align: 16, .. }
            ));
        }
        let misaligned = check(QueueState { avail: good.avail + 1, ..good });
        assert!(matches!(misaligned, SetupError::Alignment { part: "available ring", align: 2, .. }));
        let misaligned = check(QueueState { used: good.used + 2, ..good });
        assert!(matches!(misaligned, SetupError::Alignment { part: "used ring", align: 4, .. }));
        // In the first case, the first byte is in RAM and the last is not.
        for addr in [RAM - 16, RAM, 0xC000_0000, u64::MAX - 15] {
            for (part, state) in [
                ("descriptor table", QueueState { desc: addr, ..good }),
                ("available ring", QueueState { avail: addr, ..good }),
                ("used ring", QueueState { used: addr, ..good }),
            ] {
                assert!(matches!(check(state), SetupError::OutOfRam { part: p, .. } if p == part), "{part} {addr:#x}");
            }
        }
        let in_flight = check(QueueState { next_avail: 9, ..good });
        assert_eq!(in_flight, SetupError::Positions { in_flight: 9, size: 8 });
        assert_eq!(check(QueueState { next_used: 1, ..good }), SetupError::Positions { in_flight: 65535, size: 8 });
        let exact = QueueState { used: RAM - (4 + 8 * 8 + 2 + 2), ..good };
        assert!(Queue::new(0, exact, 256, EVENT_IDX, &ram).is_ok());
    }

    #[test]
    fn the_available_index_cannot_jump() {
        for to in [9, 1000, 32768, u16::MAX] {
            let (ram, mut driver, mut queue) = setup(8, 0);
            driver.set_avail_idx(to);
            assert_eq!(queue.pop(&ram).unwrap_err(), Error::AvailJumped { from: 0, to, room: 8 });
        }
    }

    #[test]
    fn more_than_the_queue_cannot_be_in_flight() {
        let (ram, mut driver, mut queue) = setup(4, 0);
        let head = driver.add(&[out(BUFFERS, 1)]).unwrap();
        for _ in 0..3 {
            driver.publish(head);
        }
        let _held: Vec<Chain> = (0..4).map(|_| queue.pop(&ram).unwrap().unwrap()).collect();
        driver.publish(head);
        assert_eq!(queue.pop(&ram).unwrap_err(), Error::AvailJumped { from: 4, to: 5, room: 0 });
        // The driver cannot take buffers back either.
        driver.set_avail_idx(3);
        assert_eq!(queue.pop(&ram).unwrap_err(), Error::AvailJumped { from: 4, to: 3, room: 0 });
    }

    #[test]
    fn a_head_is_a_descriptor() {
        for head in [8, 9, u16::MAX] {
            let (ram, mut driver, mut queue) = setup(8, 0);
            driver.publish(head);
            assert_eq!(queue.pop(&ram).unwrap_err(), Error::Head { head, size: 8 });
        }
    }

    #[test]
    fn interrupts_are_suppressed_by_flag() {
        let (ram, mut driver, mut queue) = setup(8, 0);
        let mut finish = |driver: &mut FakeQueue| {
            driver.add(&[out(BUFFERS, 1)]).unwrap();
            let chain = queue.pop(&ram).unwrap().unwrap();
            queue.push_used(&ram, chain, 0).unwrap();
            queue.needs_notification(&ram).unwrap()
        };
        assert!(finish(&mut driver));
        driver.set_no_interrupt(true);
        assert!(!finish(&mut driver));
        driver.set_no_interrupt(false);
        assert!(finish(&mut driver));
        assert!(!queue.needs_notification(&ram).unwrap(), "nothing new");
    }

    #[test]
    fn interrupts_are_suppressed_by_event_index() {
        let (ram, mut driver, mut queue) = setup(8, EVENT_IDX);
        let mut finish = |driver: &mut FakeQueue, n: u16| {
            for _ in 0..n {
                driver.add(&[out(BUFFERS, 1)]).unwrap();
                let chain = queue.pop(&ram).unwrap().unwrap();
                queue.push_used(&ram, chain, 0).unwrap();
                driver.take_used();
            }
            queue.needs_notification(&ram).unwrap()
        };
        driver.set_used_event(2);
        assert!(!finish(&mut driver, 2));
        assert!(finish(&mut driver, 1), "index 3 passes event 2");
        assert!(!finish(&mut driver, 1));
        driver.set_used_event(6);
        assert!(finish(&mut driver, 4), "several at once pass it");
        // NO_INTERRUPT means nothing with event_idx (2.7.7.2).
        driver.set_no_interrupt(true);
        driver.set_used_event(8);
        assert!(finish(&mut driver, 1));
    }

    #[test]
    fn a_buffer_added_before_kicks_are_wanted_is_seen() {
        for features in [0, EVENT_IDX] {
            let (ram, mut driver, mut queue) = setup(8, features);
            queue.disable_notifications(&ram).unwrap();
            assert!(queue.pop(&ram).unwrap().is_none());
            // The race: the driver adds a buffer without a kick, and kicks are enabled only then.
            driver.add(&[out(BUFFERS, 1)]).unwrap();
            assert!(queue.enable_notifications(&ram).unwrap());
            assert!(queue.pop(&ram).unwrap().is_some());
            assert!(!queue.enable_notifications(&ram).unwrap());
            let old = driver.avail_idx;
            driver.add(&[out(BUFFERS, 1)]).unwrap();
            assert!(driver.must_kick(old, features));
        }
    }

    #[test]
    fn serving_is_bounded() {
        let (ram, mut driver, mut queue) = setup(256, EVENT_IDX);
        for _ in 0..BATCH + 1 {
            driver.add(&[inn(BUFFERS, 1)]).unwrap();
        }
        let mut served = 0;
        let mut serve = || {
            queue.serve(&ram, |_| -> Result<u32, Error> {
                served += 1;
                Ok(1)
            })
        };
        assert_eq!(serve().unwrap(), Progress::More);
        assert_eq!(serve().unwrap(), Progress::Done);
        assert_eq!(served, BATCH + 1);
        assert!((0..=BATCH).all(|_| driver.take_used().is_some()));
    }

    #[test]
    fn a_disabled_queue_is_empty() {
        let ram = GuestRam::anonymous(RAM);
        let mut queue = Queue::disabled(3, QueueState { desc: u64::MAX, size: 4, ..Default::default() });
        assert!(queue.pop(&ram).unwrap().is_none());
        assert!(!queue.enable_notifications(&ram).unwrap());
        assert!(!queue.needs_notification(&ram).unwrap());
        queue.disable_notifications(&ram).unwrap();
        assert_eq!((queue.index(), queue.size(), queue.is_enabled()), (3, 0, false));
    }

    #[test]
    fn a_stopped_queue_goes_on_where_it_was() {
        let (ram, mut driver, mut queue) = setup(8, EVENT_IDX);
        for _ in 0..3 {
            driver.add(&[out(BUFFERS, 1)]).unwrap();
        }
        let chain = queue.pop(&ram).unwrap().unwrap();
        queue.push_used(&ram, chain, 1).unwrap();
        let json = serde_json::to_string(&queue.state()).unwrap();
        let state: QueueState = serde_json::from_str(&json).unwrap();
        let mut queue = Queue::new(0, state, 8, EVENT_IDX, &ram).unwrap();
        assert_eq!(std::iter::from_fn(|| queue.pop(&ram).unwrap()).count(), 2);
    }
}
