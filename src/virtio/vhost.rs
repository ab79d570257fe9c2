//! Queues that are served elsewhere, by the kernel (vhost) or another process (vhost-user).
//!
//! Whoever serves a queue gets its place in guest memory, an eventfd that the driver kicks and the device's interrupt
//! line, and works until it is stopped; nothing passes through this process meanwhile. A stop asks for the positions: the
//! other side knows which entry it would have taken next (`VRING_BASE`), and what it has used stands in the ring.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmm_sys_util::eventfd::EventFd;

use super::queue::{Queue, QueueState};
use super::{Interrupt, Remote, Share};
use crate::backend::vhost::Ring;
use crate::memory::GuestRam;

/// Who serves queues elsewhere.
pub(super) trait Server: Send + Sync {
    /// Begins to serve these rings, of which `index` is that within the device.
    fn start(&self, features: u64, ram: &GuestRam, rings: &[Ring<'_>]) -> io::Result<()>;

    /// Ends it when all requests that were begun are finished; says for each ring where it was (`VRING_BASE`).
    fn stop(&self, rings: &[u16]) -> io::Result<Vec<u16>>;

    /// A share without queues that sees this server end, if that may happen.
    fn watch(self: Arc<Self>) -> Option<Share> {
        None
    }
}

/// Queues while somebody else serves them.
pub(super) struct Served {
    server: Arc<dyn Server>,
    ram: GuestRam,
    queues: Vec<(u16, QueueState)>,
}

impl Served {
    /// Hands over those of `queues` that the driver uses.
    pub(super) fn start(
        server: Arc<dyn Server>,
        features: u64,
        ram: &GuestRam,
        queues: &[Queue],
        kicks: &[EventFd],
        interrupt: &Interrupt,
    ) -> io::Result<Self> {
        let enabled = || queues.iter().filter(|queue| queue.is_enabled());
        let rings = enabled().map(|queue| {
            let QueueState { ready: _, size, desc, avail, used, next_avail, next_used: _ } = queue.state();
            let kick = kicks.get(usize::from(queue.index())).ok_or(io::ErrorKind::InvalidInput)?;
            let call = interrupt.line().fd();
            Ok(Ring { index: queue.index(), size, next_avail, desc, avail, used, kick, call })
        });
        let rings: Vec<Ring<'_>> = rings.collect::<io::Result<_>>()?;
        server.start(features, ram, &rings)?;
        // What the driver made available before is in the rings already.
        rings.iter().for_each(|ring| _ = ring.kick.write(1));
        Ok(Served { server, ram: ram.clone(), queues: enabled().map(|queue| (queue.index(), queue.state())).collect() })
    }
}

impl Remote for Served {
    fn stop(&mut self) -> io::Result<Vec<(u16, QueueState)>> {
        let indices: Vec<u16> = self.queues.iter().map(|(index, _)| *index).collect();
        let positions = self.server.stop(&indices)?;
        let stopped = self.queues.iter().zip(positions).map(|((index, state), next_avail)| {
            let next_used = self.ram.load_u16(state.used + 2, Ordering::Acquire).map_err(io::Error::other)?;
            Ok((*index, QueueState { next_avail, next_used, ..*state }))
        });
        stopped.collect()
    }
}
