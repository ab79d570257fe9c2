//! One request queue: takes requests as fast as the rate limit allows, and executes them or passes them to the kernel.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Shared;
use super::request::{self, Request};
use super::ring::{Done, Ring};
use crate::event::Interest;
use crate::rate_limiter::Alarm;
use crate::virtio::chain::Chain;
use crate::virtio::queue::{BATCH, Queue};
use crate::virtio::{Context, Event, Fault, Handler, Progress};

const COMPLETIONS: u64 = 0;
const ALARM: u64 = 1;

/// Handler of one queue.
pub(super) struct QueueHandler {
    /// Dropped first: the kernel may still use the disk's file, and the number of a closed file may be reused for
    /// another.
    ring: Option<Ring>,
    shared: Arc<Shared>,
    /// Timer for when the rate limit lets more through.
    alarm: Option<Alarm>,
}

impl QueueHandler {
    pub(super) fn new(shared: Arc<Shared>, ring: Option<Ring>) -> io::Result<Self> {
        let alarm = shared.limiter.is_some().then(Alarm::new).transpose()?;
        Ok(QueueHandler { ring, shared, alarm })
    }

    fn serve(&mut self, queue: &mut Queue, cx: &Context<'_>) -> Result<Progress, Fault> {
        if self.alarm.as_ref().is_some_and(Alarm::is_set) {
            return Ok(Progress::Done);
        }
        queue.disable_notifications(cx.ram)?;
        for _ in 0..BATCH {
            let Some(chain) = queue.next(cx.ram)? else { return Ok(Progress::Done) };
            if !self.allowed(&chain, cx)? {
                queue.unpop(chain);
                return Ok(Progress::Done);
            }
            if self.begin(chain, queue, cx)? {
                break;
            }
        }
        Ok(Progress::More)
    }

    /// Returns whether the rate limit lets a request through now; if not, sets the alarm.
    fn allowed(&mut self, chain: &Chain, cx: &Context<'_>) -> io::Result<bool> {
        let (Some(limiter), Some(alarm)) = (&self.shared.limiter, &mut self.alarm) else { return Ok(true) };
        match limiter.take(request::cost(chain, cx.ram)) {
            Ok(()) => Ok(true),
            Err(wait) => alarm.set(wait).map(|()| false),
        }
    }

    /// Executes a request, or passes it to the kernel. Returns whether others should have their turn now.
    fn begin(&mut self, chain: Chain, queue: &mut Queue, cx: &Context<'_>) -> Result<bool, Fault> {
        let disk = &*self.shared.disk;
        let mut large = false;
        let result = match request::decode(&self.shared, &chain, cx.ram)? {
            Err(failed) => Err(failed),
            Ok(request) => match (&mut self.ring, request) {
                (Some(ring), Request::Read(buffers, offset)) if ring.takes(disk, &buffers, offset) => {
                    let (iov, len) = ring.vector(&buffers);
                    drop(buffers);
                    ring.read(chain, iov, len, offset);
                    return Ok(false);
                }
                (Some(ring), Request::Write(buffers, offset))
                    if !self.shared.writes_at_once && ring.takes(disk, &buffers, offset) =>
                {
                    let (iov, len) = ring.vector(&buffers);
                    drop(buffers);
                    ring.write(chain, iov, len, offset, self.shared.write_through.load(Ordering::Acquire));
                    return Ok(false);
                }
                (Some(ring), Request::Flush) if ring.has_room() => {
                    self.shared.dirty.store(false, Ordering::Release);
                    ring.flush(chain);
                    return Ok(false);
                }
                (_, request) => {
                    large = request.is_large();
                    self.shared.execute(request)
                }
            },
        };
        let written = self.shared.answer(&chain, cx.ram, result)?;
        queue.push_used(cx.ram, chain, written)?;
        Ok(large)
    }

    /// Submits collected requests to the kernel, and answers those that it has finished.
    fn turn(&mut self, queue: &mut Queue, cx: &Context<'_>) -> Result<(), Fault> {
        let Some(ring) = &mut self.ring else { return Ok(()) };
        ring.submit()?;
        while let Some(Done { chain, result, dirty }) = ring.next_done() {
            if dirty {
                self.shared.dirty.store(true, Ordering::Release);
            }
            let written = self.shared.answer(&chain, cx.ram, result.map_err(Into::into))?;
            queue.push_used(cx.ram, chain, written)?;
        }
        Ok(())
    }
}

impl Handler for QueueHandler {
    fn event(&mut self, event: Event, queues: &mut [Queue], cx: &Context<'_>) -> Result<Progress, Fault> {
        let [queue] = queues else { return Ok(Progress::Done) };
        match event {
            Event::Start => {
                if let Some(ring) = &self.ring {
                    cx.watch(ring.as_raw_fd(), COMPLETIONS, Interest::Read)?;
                }
                if let Some(alarm) = &self.alarm {
                    cx.watch(alarm.as_raw_fd(), ALARM, Interest::Read)?;
                }
                return Ok(Progress::Done);
            }
            Event::Ready(COMPLETIONS) => {
                self.turn(queue, cx)?;
                return Ok(Progress::Done);
            }
            Event::Ready(_) => self.alarm.iter_mut().for_each(Alarm::clear),
            Event::Kick(_) => {}
        }
        let progress = self.serve(queue, cx);
        // Also if the guest broke a rule: its earlier requests continue.
        self.turn(queue, cx)?;
        progress
    }

    /// Finishes requests in flight and flushes: written data must not be lost with the host once the VM is paused,
    /// saved or at its end.
    fn drain(&mut self, queues: &mut [Queue], cx: &Context<'_>) -> Result<Progress, Fault> {
        if let [queue] = queues {
            self.turn(queue, cx)?;
        }
        if self.ring.as_ref().is_some_and(|ring| ring.in_flight() > 0) {
            return Ok(Progress::More);
        }
        self.shared.flush_last();
        Ok(Progress::Done)
    }
}
