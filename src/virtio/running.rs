//! An activated device, wherever its queues are served: starts and stops all of it in one step.

use std::io;
use std::time::Instant;

use super::queue::QueueState;
use super::worker::{DRAIN_DEADLINE, Positions, Stuck, Worker};
use super::{Activated, Activation, Remote, VirtioDevice};

/// Run state of a device.
pub(super) enum Run {
    /// Stopped; the transport has the queues.
    Stopped,
    /// Running in workers of this process, and in the kernel or another process if there is a remote.
    Running(Vec<Worker>, Option<Box<dyn Remote>>),
}

/// Reason why the queues did not come back.
#[derive(Debug)]
pub(super) enum Error {
    /// A worker has not stopped yet; the device continues to run.
    Stuck(Stuck),
    /// The queues are lost; the device is stopped.
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

    /// Stops the device and records its positions in the rings in `queues`.
    pub(super) fn stop(&mut self, deadline: Instant, queues: &mut [QueueState]) -> Result<(), Error> {
        let Run::Running(workers, remote) = self else { return Ok(()) };
        // A stuck worker still holds its queues: the device, its remote included, then stays `Running`.
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

/// Stops all workers simultaneously, and removes those that stopped from the list.
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
