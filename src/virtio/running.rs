//! A device that is activated, wherever its queues are served: starting and stopping all of it at once.

use std::io;
use std::time::Instant;

use super::queue::QueueState;
use super::worker::{DRAIN_DEADLINE, Positions, Stuck, Worker};
use super::{Activated, Activation, Remote, VirtioDevice};

/// Whether and where a device runs.
pub(super) enum Run {
    /// The transport has the queues.
    Stopped,
    /// In workers of this process, and in the kernel or another process.
    Running(Vec<Worker>, Option<Box<dyn Remote>>),
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
        let (mut remote, shares) = match device.activate(activation)? {
            Activated::Here(shares) => (None, shares),
            Activated::Elsewhere(remote, shares) => (Some(remote), shares),
        };
        let single = shares.len() == 1;
        let mut workers = Vec::with_capacity(shares.len());
        for (i, share) in shares.into_iter().enumerate() {
            let name = if single { name.clone() } else { format!("{name}.{i}") };
            match Worker::spawn(name, share, ram.clone(), interrupt.clone(), kicks.clone()) {
                Ok(worker) => workers.push(worker),
                Err(e) => {
                    let _ = stop(&mut workers, Instant::now() + DRAIN_DEADLINE, &mut []);
                    let _ = remote.as_mut().map(|remote| remote.stop());
                    return Err(e);
                }
            }
        }
        Ok(Run::Running(workers, remote))
    }

    /// Stops the device and notes in `queues` where it was in the rings.
    pub(super) fn stop(&mut self, deadline: Instant, queues: &mut [QueueState]) -> Result<(), Error> {
        let Run::Running(workers, remote) = self else { return Ok(()) };
        // A worker that is stuck still holds its queues, and then all of the device goes on.
        stop(workers, deadline, queues).map_err(Error::Stuck)?;
        let stopped = remote.as_mut().map_or(Ok(vec![]), |remote| remote.stop());
        *self = Run::Stopped;
        note(stopped.map_err(Error::Lost)?, queues);
        Ok(())
    }

    pub(super) fn is_stopped(&self) -> bool {
        matches!(self, Run::Stopped)
    }

    pub(super) fn is_elsewhere(&self) -> bool {
        matches!(self, Run::Running(_, Some(_)))
    }
}

fn note(positions: Positions, queues: &mut [QueueState]) {
    for (index, state) in positions {
        if let Some(queue) = queues.get_mut(usize::from(index)) {
            *queue = state;
        }
    }
}

/// Stops all workers together. Those that stopped leave the list.
fn stop(workers: &mut Vec<Worker>, deadline: Instant, queues: &mut [QueueState]) -> Result<(), Stuck> {
    workers.iter().for_each(Worker::request_stop);
    let mut result = Ok(());
    workers.retain(|worker| match worker.wait_stopped(deadline) {
        Ok(positions) => {
            note(positions, queues);
            false
        }
        Err(stuck) => {
            result = Err(stuck);
            true
        }
    });
    result
}
