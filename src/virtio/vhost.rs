//! Queues that are served elsewhere: by the kernel (vhost) or by another process (vhost-user).
//!
//! The server of a queue gets the queue's location in guest memory, an eventfd that the driver kicks and the device's
//! interrupt line. It works until it is stopped; in the meantime no request passes through this process. A stop asks
//! for the positions: the server knows which entry it would have taken next (`VRING_BASE`), and the used ring shows
//! what it has used.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmm_sys_util::eventfd::EventFd;

use super::queue::{Queue, QueueState};
use super::{Interrupt, Remote, Share};
use crate::backend::vhost::Ring;
use crate::memory::GuestRam;

/// Serves queues outside this process's workers.
pub(super) trait Server: Send + Sync {
    /// Begins to serve these rings, whose `index` counts within the device.
    fn start(&self, features: u64, ram: &GuestRam, rings: &[Ring<'_>]) -> io::Result<()>;

    /// Stops serving after all requests in progress are finished; returns each ring's position (`VRING_BASE`).
    fn stop(&self, rings: &[u16]) -> io::Result<Vec<u16>>;

    /// Returns a share without queues that notices the end of this server; `None` if it cannot end.
    fn watch(self: Arc<Self>) -> Option<Share> {
        None
    }
}

/// Queues that a server outside this process's workers serves.
pub(super) struct Served {
    server: Arc<dyn Server>,
    ram: GuestRam,
    queues: Vec<(u16, QueueState)>,
}

impl Served {
    /// Hands over those of `queues` that the driver has enabled.
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
        // Kick for requests that the driver has already made available.
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
