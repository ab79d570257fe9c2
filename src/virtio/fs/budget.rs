//! Limit on the file descriptors that all shares of a machine hold together.
//!
//! A process may have a limited number of descriptors (`ulimit -n`). One eighth of them is for the files that guests
//! know, another eighth for the files that guests have open. One share may use all of an eighth while the others need
//! little. When an eighth is exhausted, every share can still get its even part: the other shares give their excess
//! back as they work. Until then an eighth may be exceeded by as much again. So shares take at most half of the
//! process's descriptors, and disks, sockets and consoles always find free ones.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Descriptor limits of all shares.
#[derive(Debug)]
pub struct Budget {
    /// Descriptors for files that guests know.
    pub(super) known: Arc<Pool>,
    /// Descriptors for files that guests have open.
    pub(super) open: Arc<Pool>,
}

impl Budget {
    /// Creates the budget of a process that may have `descriptors` descriptors and serves `shares` shares.
    pub fn new(descriptors: u64, shares: usize) -> Self {
        let most = (descriptors / 8).clamp(16, 1 << 16) as usize;
        let pool = || Arc::new(Pool { most, part: (most / shares.max(1)).max(1), taken: AtomicUsize::new(0) });
        Budget { known: pool(), open: pool() }
    }
}

/// Descriptors of one kind: for known files or for open files.
#[derive(Debug)]
pub(super) struct Pool {
    most: usize,
    /// Even part of one share.
    part: usize,
    taken: AtomicUsize,
}

impl Pool {
    /// Takes a descriptor even if that exceeds the limit; the caller must then give some back.
    pub fn take(self: &Arc<Self>) -> Slot {
        self.taken.fetch_add(1, Ordering::Relaxed);
        Slot(self.clone())
    }

    /// Returns whether a share that holds `own` descriptors must give one back before it takes another.
    pub fn is_exhausted(&self, own: usize) -> bool {
        own >= self.most || own >= self.part && self.taken.load(Ordering::Relaxed) >= self.most
    }
}

/// A descriptor taken from a pool; dropping this returns it.
#[derive(Debug)]
pub(super) struct Slot(Arc<Pool>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_share_may_use_all_and_each_gets_its_part() {
        let pool = Budget::new(800, 4).known;
        let mut first: Vec<Slot> = (0..100).map(|_| pool.take()).collect();
        assert!(!pool.is_exhausted(0) && !pool.is_exhausted(24), "another share's part");
        assert!(pool.is_exhausted(25) && pool.is_exhausted(100));
        let second: Vec<Slot> = (0..25).map(|_| pool.take()).collect();
        assert!(pool.is_exhausted(second.len()));
        first.truncate(60);
        assert!(!pool.is_exhausted(second.len()) && !pool.is_exhausted(first.len()));
        assert!(pool.is_exhausted(100));
        drop((first, second));
        assert_eq!(pool.taken.load(Ordering::Relaxed), 0);
        // Few descriptors, many shares.
        let pool = Budget::new(24, 100).open;
        assert!(!pool.is_exhausted(0) && !pool.is_exhausted(15) && pool.is_exhausted(16));
    }
}
