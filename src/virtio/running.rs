//! A device that is activated, wherever its queues are served: starting and stopping all of it at once.

use std::io;
use std::time::Instant;

use super::queue::QueueState;
use super::worker::{DRAIN_DEADLINE, Stuck, Worker};
use super::{Activated, Activation, Remote, VirtioDevice};

/// Whether and where a device runs.
pub(super) enum Run {
    /// The transport has the queues.
    Stopped,
    /// In workers of this process.
    Here(Vec<Worker>),
    /// In the kernel or another process.
    Elsewhere(Box<dyn Remote>),
}

/// Why the queues did not come back.
#[derive(Debug)]
pub(super) enum Error {
    /// Not yet; the device goes on to run.
    Stuck(Stuck),
    /// Never; the device is stopped.
    Lost(io::Error),
}

impl Run {
    /// Activates a device and starts its workers: all or none.
    pub(super) fn start(device: &mut dyn VirtioDevice, activation: Activation) -> io::Result<Self> {
        let name = device.info().name.clone();
        let (ram, interrupt) = (activation.ram.clone(), activation.interrupt.clone());
        let kicks = activation.kicks.clone();
        let shares = match device.activate(activation)? {
            Activated::Here(shares) => shares,
            Activated::Elsewhere(remote) => return Ok(Run::Elsewhere(remote)),
        };
        let single = shares.len() == 1;
        let mut workers = Vec::with_capacity(shares.len());
        for (i, share) in shares.into_iter().enumerate() {
            let name = if single { name.clone() } else { format!("{name}.{i}") };
            match Worker::spawn(name, share, ram.clone(), interrupt.clone(), kicks.clone()) {
                Ok(worker) => workers.push(worker),
                Err(e) => {
                    let _ = stop(&mut workers, Instant::now() + DRAIN_DEADLINE, &mut []);
                    return Err(e);
                }
            }
        }
        Ok(Run::Here(workers))
    }

    /// Stops the device and notes in `queues` where it was in the rings.
    pub(super) fn stop(&mut self, deadline: Instant, queues: &mut [QueueState]) -> Result<(), Error> {
        let result = match self {
            Run::Stopped => Ok(()),
            Run::Here(workers) => stop(workers, deadline, queues).map_err(Error::Stuck),
            Run::Elsewhere(remote) => match remote.stop() {
                Ok(states) => {
                    queues.iter_mut().zip(states).for_each(|(queue, state)| *queue = state);
                    Ok(())
                }
                Err(e) => Err(Error::Lost(e)),
            },
        };
        if !matches!(result, Err(Error::Stuck(_))) {
            *self = Run::Stopped;
        }
        result
    }

    pub(super) fn is_stopped(&self) -> bool {
        matches!(self, Run::Stopped)
    }

    pub(super) fn is_elsewhere(&self) -> bool {
        matches!(self, Run::Elsewhere(_))
    }
}

/// Stops all workers together. Those that stopped leave the list.
fn stop(workers: &mut Vec<Worker>, deadline: Instant, queues: &mut [QueueState]) -> Result<(), Stuck> {
    workers.iter().for_each(Worker::request_stop);
    let mut result = Ok(());
    workers.retain(|worker| match worker.wait_stopped(deadline) {
        Ok(positions) => {
            for (index, state) in positions {
                if let Some(queue) = queues.get_mut(usize::from(index)) {
                    *queue = state;
                }
            }
            false
        }
        Err(stuck) => {
            result = Err(stuck);
            true
        }
    });
    result
}
