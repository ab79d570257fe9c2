//! Queue pairs that another process serves, over vhost-user.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

use super::Elsewhere;
use crate::backend::vhost::Ring;
use crate::memory::GuestRam;
use crate::virtio::vhost::Server;
use crate::virtio::vhost_user::Connection;
use crate::virtio::{RING_FEATURES, Share};

/// vhost-user daemon that serves a network card's queue pairs.
pub(super) struct Daemon {
    connection: Arc<Connection>,
    pairs: u16,
    state: Mutex<State>,
}

struct State {
    /// Rings that were handed over.
    rings: Vec<u16>,
    link: bool,
    /// Number of pairs that the driver uses.
    pairs: u16,
}

impl State {
    /// Returns for each ring whether it may pass packets: its pair is in use (5.1.6.5.5) and the cable is plugged in.
    fn enabled(&self) -> impl Iterator<Item = (u16, bool)> + '_ {
        self.rings.iter().map(|ring| (*ring, self.link && ring / 2 < self.pairs))
    }
}

impl Daemon {
    pub(super) fn new(connection: Arc<Connection>, pairs: u16) -> Self {
        Daemon { connection, pairs, state: Mutex::new(State { rings: vec![], link: true, pairs: 1 }) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Server for Daemon {
    fn start(&self, features: u64, ram: &GuestRam, rings: &[Ring<'_>]) -> io::Result<()> {
        let mut state = self.state();
        self.connection.hand_over(features, ram, rings)?;
        state.rings = rings.iter().map(|ring| ring.index).collect();
        self.connection.enable(state.enabled())
    }

    fn stop(&self, rings: &[u16]) -> io::Result<Vec<u16>> {
        self.state().rings.clear();
        self.connection.take_back(rings)
    }

    fn watch(self: Arc<Self>) -> Option<Share> {
        Some(self.connection.clone().watcher())
    }
}

impl Elsewhere for Daemon {
    fn features(&self) -> u64 {
        self.connection.features() & (RING_FEATURES | 1 << VIRTIO_NET_F_MRG_RXBUF)
    }

    fn pairs(&self) -> u16 {
        self.pairs
    }

    fn set_link(&self, up: bool) -> io::Result<()> {
        let mut state = self.state();
        state.link = up;
        self.connection.enable(state.enabled())
    }

    fn set_pairs(&self, pairs: u16) -> io::Result<()> {
        let mut state = self.state();
        state.pairs = pairs;
        self.connection.enable(state.enabled())
    }
}
