//! Queue pairs that the kernel serves: vhost-net moves packets between the rings and a tap.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

use super::Elsewhere;
use crate::backend::vhost::{self, Ring, VhostNet};
use crate::memory::{GuestRam, RamRegion};
use crate::virtio::RING_FEATURES;
use crate::virtio::vhost::Server;

/// Features that concern the kernel; all others are between the driver and the tap.
const KNOWN: u64 = RING_FEATURES | 1 << VIRTIO_NET_F_MRG_RXBUF | 1 << VIRTIO_F_VERSION_1;

/// vhost-net devices, one for each queue of a tap.
pub(super) struct Kernel {
    pairs: Vec<(VhostNet, OwnedFd)>,
    features: u64,
    state: Mutex<State>,
}

struct State {
    /// Rings that are set up, by their index within the card.
    rings: Vec<u16>,
    link: bool,
}

impl Kernel {
    /// Opens vhost-net for each queue of a tap.
    pub(super) fn open(taps: Vec<OwnedFd>) -> Result<Self, vhost::Error> {
        let pairs = taps.into_iter().map(|tap| Ok((VhostNet::open()?, tap))).collect::<Result<Vec<_>, _>>()?;
        let features = pairs.first().map_or(Ok(0), |(vhost, _)| vhost.features())? & KNOWN;
        Ok(Kernel { pairs, features, state: Mutex::new(State { rings: vec![], link: true }) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connects rings to their taps, or disconnects them.
    fn plug(&self, rings: &[u16], on: bool) -> io::Result<()> {
        rings.iter().try_for_each(|ring| {
            let (vhost, tap) = self.pairs.get(usize::from(ring / 2)).ok_or(io::ErrorKind::InvalidInput)?;
            vhost.plug(ring % 2, on.then_some(tap.as_fd()))
        })
    }

    fn set_up(&self, features: u64, memory: &[RamRegion], rings: &[Ring<'_>]) -> io::Result<()> {
        for ((vhost, _), pair) in self.pairs.iter().zip(0u16..) {
            let own = rings.iter().filter(|ring| ring.index / 2 == pair);
            let own: Vec<Ring<'_>> = own.map(|ring| Ring { index: ring.index % 2, ..*ring }).collect();
            if !own.is_empty() {
                vhost.set_up(features & self.features, memory, &own)?;
            }
        }
        Ok(())
    }
}

impl Server for Kernel {
    fn start(&self, features: u64, ram: &GuestRam, rings: &[Ring<'_>]) -> io::Result<()> {
        let memory: Vec<RamRegion> = ram.regions().collect();
        let indices: Vec<u16> = rings.iter().map(|ring| ring.index).collect();
        let mut state = self.state();
        let started = self.set_up(features, &memory, rings).and_then(|()| match state.link {
            true => self.plug(&indices, true),
            false => Ok(()),
        });
        match started {
            Ok(()) => state.rings = indices,
            // All or none: a ring that is being served cannot be set up again.
            Err(_) => indices.iter().for_each(|ring| _ = self.plug(&[*ring], false)),
        }
        started
    }

    fn stop(&self, rings: &[u16]) -> io::Result<Vec<u16>> {
        self.state().rings.clear();
        self.plug(rings, false)?;
        let position = |ring: &u16| {
            let (vhost, _) = self.pairs.get(usize::from(ring / 2)).ok_or(io::ErrorKind::InvalidInput)?;
            vhost.position(ring % 2)
        };
        rings.iter().map(position).collect()
    }
}

impl Elsewhere for Kernel {
    fn features(&self) -> u64 {
        self.features
    }

    fn pairs(&self) -> u16 {
        self.pairs.len() as u16
    }

    fn set_link(&self, up: bool) -> io::Result<()> {
        let mut state = self.state();
        if up != state.link {
            self.plug(&state.rings, up)?;
            state.link = up;
        }
        Ok(())
    }
}
