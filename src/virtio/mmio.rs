//! The virtio-mmio transport, version 2 (4.2): the registers through which a driver finds a device, agrees on features
//! with it and sets up its queues.
//!
//! The transport owns the queues while the device is stopped, as the [`QueueState`]s in its register file. Everything
//! that touches queues of a running device (a queue enabled late, disabled or reset; pause; reset) is a stop, a change
//! of that file and, if the device is still meant to run, a start.
//!
//! Registers take only what 4.2.2.2 allows, 32-bit aligned accesses: any other read gives zeros, any other write is
//! ignored. Configuration space takes every width and alignment; behind its end are zeros.

mod state;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_RING_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::*;
use vmm_sys_util::eventfd::EventFd;

use super::control::{Control, ControlError, Reply};
use super::queue::{Queue, QueueState, SetupError};
use super::running::{self, Run};
use super::worker::{self, DRAIN_DEADLINE, Stuck};
use super::{Activation, DeviceInfo, Interrupt, StateError, VirtioDevice};
use crate::bus::BusDevice;
use crate::event::eventfd;
use crate::irq::IrqLine;
use crate::memory::GuestRam;

pub use state::MmioState;

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "vreo".
const VENDOR: u32 = 0x6F65_7276;
/// `QueueReset`, new in 1.2; virtio-bindings does not have it.
pub const QUEUE_RESET: u32 = 0x0C0;
/// Where `QueueNotify` is within the window: the machine registers [`MmioTransport::notify_fds`] there.
pub const NOTIFY: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;
/// Where `InterruptACK` is within the window: the machine has KVM collect writes to it, for an acknowledgement matters only
/// to the next read of `InterruptStatus`, and that exits and finds it.
pub const INTERRUPT_ACK: u64 = VIRTIO_MMIO_INTERRUPT_ACK as u64;

const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;
const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;

/// What the transport offers besides the device (6).
const TRANSPORT_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_F_RING_RESET;

/// Why a transport cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Out of file descriptors.
    #[error("cannot make the eventfds of {name}")]
    EventFd {
        /// The device.
        name: String,
        /// The OS error.
        source: io::Error,
    },
    /// Out of threads.
    #[error("cannot start threads for {name}")]
    Thread {
        /// The device.
        name: String,
        /// The OS error.
        source: io::Error,
    },
    /// The saved state does not fit the device.
    #[error(transparent)]
    State(#[from] StateError),
}

/// A device behind virtio-mmio registers. Put it on the MMIO bus, register the notify descriptors and the interrupt
/// line with KVM, and it runs when its driver says so.
pub struct MmioTransport {
    info: DeviceInfo,
    ram: GuestRam,
    /// Outside of the lock: its status register is the one exit of every interrupt.
    interrupt: Interrupt,
    kicks: Arc<[EventFd]>,
    /// The queues run where nobody sets `InterruptStatus`: it always tells of used buffers then.
    elsewhere: AtomicBool,
    inner: Mutex<Inner>,
}

struct Inner {
    device: Box<dyn VirtioDevice>,
    registers: Registers,
    run: Run,
    paused: bool,
    /// A worker did not stop in time: do not make a vCPU wait that long again.
    stuck: bool,
}

/// The register file, as far as it is not in [`Interrupt`].
#[derive(Default)]
struct Registers {
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    shm_sel: u32,
    /// Without `DEVICE_NEEDS_RESET`, which [`Interrupt`] knows.
    status: u32,
    queues: Vec<QueueState>,
}

impl MmioTransport {
    /// A freshly reset device. `line` is what it interrupts with.
    pub fn new(device: Box<dyn VirtioDevice>, ram: GuestRam, line: IrqLine) -> Result<Self, Error> {
        let info = device.info().clone();
        worker::prepare().map_err(|source| Error::Thread { name: info.name.clone(), source })?;
        let kicks = info.queue_sizes.iter().map(|_| eventfd()).collect::<io::Result<Vec<_>>>();
        let kicks = kicks.map_err(|source| Error::EventFd { name: info.name.clone(), source })?.into();
        let registers = Registers { queues: vec![QueueState::default(); info.queue_sizes.len()], ..Default::default() };
        let inner = Mutex::new(Inner { device, registers, run: Run::Stopped, paused: false, stuck: false });
        let (interrupt, elsewhere) = (Interrupt::new(line), AtomicBool::new(false));
        Ok(MmioTransport { info, ram, interrupt, kicks, elsewhere, inner })
    }

    /// What the device is.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// One eventfd per queue: what a write of the queue's index to [`NOTIFY`] shall signal.
    pub fn notify_fds(&self) -> &[EventFd] {
        &self.kicks
    }

    /// The interrupt of the device.
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// Stops the device: requests in flight finish, what was written is flushed, the queues come back. The vCPUs must
    /// not run. Does nothing to a device that is not running. One that needs longer, for a slow disk, goes on stopping.
    pub fn pause(&self) -> Result<(), Stuck> {
        let mut inner = self.lock();
        inner.paused = true;
        let limit = if inner.stuck { Duration::ZERO } else { DRAIN_DEADLINE };
        self.halt(&mut inner, limit)
    }

    /// Goes on after [`MmioTransport::pause`] or [`MmioTransport::from_state`]. What was due before is done now: kicks
    /// by looking into every queue, an interrupt by raising it again.
    pub fn resume(&self) {
        let mut inner = self.lock();
        inner.paused = false;
        // A pause that was too short for it: it must have stopped before it can start.
        if inner.stuck
            && self.status(&inner.registers) & NEEDS_RESET == 0
            && let Err(stuck) = self.halt(&mut inner, DRAIN_DEADLINE)
        {
            self.interrupt.needs_reset(&self.info.name, &stuck);
        }
        self.start(&mut inner);
        if self.interrupt.is_unread() {
            self.interrupt.line().trigger();
        }
    }

    /// What the guest wrote and the host did not keep: see [`VirtioDevice::unsaved`].
    pub fn unsaved(&self) -> Option<String> {
        self.lock().device.unsaved()
    }

    /// Asks the device for something, and tells its driver if that changed configuration space.
    pub fn control(&self, control: &Control) -> Result<Reply, ControlError> {
        let mut inner = self.lock();
        let reply = inner.device.control(control)?;
        if reply != Reply::ConfigChanged {
            return Ok(reply);
        }
        // 3.1.2: no interrupt before the driver is ready; until then it reads what it finds, and reads it again when half of
        // it has changed.
        if inner.registers.status & DRIVER_OK != 0 {
            self.interrupt.config_changed();
        } else {
            self.interrupt.new_generation();
        }
        Ok(Reply::Done)
    }

    /// The end: like [`MmioTransport::pause`], and nothing starts it again.
    pub fn stop(&self) -> Result<(), Stuck> {
        self.pause()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn offered(&self) -> u64 {
        self.info.features | TRANSPORT_FEATURES
    }

    /// 2.2, 6.1: nothing that was not offered, and VERSION_1.
    fn acceptable(&self, features: u64) -> bool {
        features & !self.offered() == 0 && features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    fn status(&self, registers: &Registers) -> u32 {
        registers.status | if self.interrupt.is_reset_needed() { NEEDS_RESET } else { 0 }
    }

    /// Lets the device run, if its driver and the machine want that and it does not yet. What the driver did wrong
    /// ends in `DEVICE_NEEDS_RESET`.
    fn start(&self, inner: &mut Inner) {
        let status = self.status(&inner.registers);
        if inner.paused || status & (DRIVER_OK | NEEDS_RESET) != DRIVER_OK || !inner.run.is_stopped() {
            return;
        }
        let started = self.queues(&inner.registers).map_err(|e| e.to_string()).and_then(|queues| {
            let activation = Activation {
                ram: self.ram.clone(),
                features: inner.registers.driver_features,
                queues,
                kicks: self.kicks.clone(),
                interrupt: self.interrupt.clone(),
            };
            Run::start(&mut *inner.device, activation).map_err(|e| e.to_string())
        });
        match started {
            Ok(run) => inner.run = run,
            Err(e) => self.interrupt.needs_reset(&self.info.name, e),
        }
        if inner.run.is_elsewhere() {
            self.elsewhere.store(true, Ordering::SeqCst);
            // One that came before this was known would have been taken for none.
            self.interrupt.line().trigger();
        }
    }

    fn queues(&self, registers: &Registers) -> Result<Vec<Queue>, QueueError> {
        let queues = registers.queues.iter().zip(&self.info.queue_sizes).zip(0u16..);
        queues
            .map(|((&state, &max), i)| match state.ready {
                true => Queue::new(i, state, max, registers.driver_features, &self.ram)
                    .map_err(|source| QueueError { index: i, source }),
                false => Ok(Queue::disabled(i, state)),
            })
            .collect()
    }

    /// Stops the device and takes its queues back. One that does not stop within `limit` is stuck, and may be stopped
    /// again.
    fn halt(&self, inner: &mut Inner, limit: Duration) -> Result<(), Stuck> {
        let stopped = inner.run.stop(Instant::now() + limit, &mut inner.registers.queues);
        self.elsewhere.store(inner.run.is_elsewhere(), Ordering::SeqCst);
        match stopped {
            Ok(()) => {
                inner.stuck = false;
                Ok(())
            }
            // The other side is gone, and with it what was in flight.
            Err(running::Error::Lost(e)) => {
                self.interrupt.needs_reset(&self.info.name, format_args!("it did not give its queues back: {e}"));
                Ok(())
            }
            Err(running::Error::Stuck(stuck)) => {
                inner.stuck = true;
                Err(stuck)
            }
        }
    }

    /// The same for the driver, who cannot go on with a device that is stuck.
    fn halt_for_driver(&self, inner: &mut Inner) -> Result<(), Stuck> {
        let limit = if inner.stuck { Duration::ZERO } else { DRAIN_DEADLINE };
        self.halt(inner, limit).inspect_err(|stuck| self.interrupt.needs_reset(&self.info.name, stuck))
    }

    /// 2.1, 4.2.2: zero resets; otherwise bits are only added, each after those that come before it.
    fn write_status(&self, inner: &mut Inner, value: u32) {
        if value == 0 {
            return self.reset(inner);
        }
        let old = inner.registers.status;
        if value & old != old {
            return;
        }
        let mut status = old | value & FAILED;
        for (bit, before) in [(ACKNOWLEDGE, 0), (DRIVER, ACKNOWLEDGE), (FEATURES_OK, DRIVER), (DRIVER_OK, FEATURES_OK)]
        {
            // 3.1.1: the driver sees a refusal by reading the bit back.
            let refused = bit == FEATURES_OK && !self.acceptable(inner.registers.driver_features);
            if value & bit != 0 && status & before == before && !refused {
                status |= bit;
            }
        }
        inner.registers.status = status;
        if status & !old & DRIVER_OK != 0 {
            self.start(inner);
        }
    }

    /// 2.4: back to the beginning. A device that is stuck stays: its status goes on to read as not zero.
    fn reset(&self, inner: &mut Inner) {
        if self.halt_for_driver(inner).is_err() {
            return;
        }
        inner.device.reset();
        inner.registers.status = 0;
        inner.registers.driver_features = 0;
        inner.registers.queues.fill(QueueState::default());
        self.interrupt.reset();
    }

    /// Changes a queue's registers; a running device is stopped for that and started again.
    fn change_queue(&self, inner: &mut Inner, change: impl FnOnce(&mut QueueState)) {
        if self.halt_for_driver(inner).is_err() {
            return;
        }
        if let Some(queue) = inner.registers.selected_mut() {
            change(queue);
        }
        self.start(inner);
    }

    fn read_register(&self, register: u32) -> u32 {
        // Lock-free: this is read in the guest's interrupt handler.
        if register == VIRTIO_MMIO_INTERRUPT_STATUS {
            let elsewhere = if self.elsewhere.load(Ordering::SeqCst) { VIRTIO_MMIO_INT_VRING } else { 0 };
            return self.interrupt.read_reasons() | elsewhere;
        }
        let inner = self.lock();
        let registers = &inner.registers;
        let selected = registers.queues.get(registers.queue_sel as usize);
        let shm = self.info.shared_memory.iter().find(|r| u32::from(r.id) == registers.shm_sel);
        match register {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.info.id as u32,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => match registers.device_features_sel {
                0 => self.offered() as u32,
                1 => (self.offered() >> 32) as u32,
                _ => 0,
            },
            VIRTIO_MMIO_QUEUE_NUM_MAX => {
                self.info.queue_sizes.get(registers.queue_sel as usize).map_or(0, |&size| size.into())
            }
            VIRTIO_MMIO_QUEUE_READY => selected.is_some_and(|q| q.ready).into(),
            // A queue reset is over when the write returns, unless the device is stuck in it.
            QUEUE_RESET => (inner.stuck && selected.is_some_and(|q| q.ready)).into(),
            VIRTIO_MMIO_STATUS => self.status(registers),
            VIRTIO_MMIO_SHM_LEN_LOW => shm.map_or(u32::MAX, |r| r.len as u32),
            VIRTIO_MMIO_SHM_LEN_HIGH => shm.map_or(u32::MAX, |r| (r.len >> 32) as u32),
            VIRTIO_MMIO_SHM_BASE_LOW => shm.map_or(u32::MAX, |r| r.addr as u32),
            VIRTIO_MMIO_SHM_BASE_HIGH => shm.map_or(u32::MAX, |r| (r.addr >> 32) as u32),
            VIRTIO_MMIO_CONFIG_GENERATION => self.interrupt.generation(),
            _ => 0,
        }
    }

    fn write_register(&self, register: u32, value: u32) {
        // Lock-free: the end of the guest's interrupt handler, and kicks.
        if register == VIRTIO_MMIO_INTERRUPT_ACK {
            return self.interrupt.acknowledge(value);
        }
        if register == VIRTIO_MMIO_QUEUE_NOTIFY {
            let _ = self.kicks.get(value as usize).map(|kick| kick.write(1));
            return;
        }
        let mut inner = self.lock();
        let status = inner.registers.status;
        match register {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => inner.registers.device_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => inner.registers.driver_features_sel = value,
            // 3.1.1: features are settled by FEATURES_OK.
            VIRTIO_MMIO_DRIVER_FEATURES if status & (DRIVER | FEATURES_OK) == DRIVER => {
                let Registers { driver_features_sel, driver_features, .. } = &mut inner.registers;
                match driver_features_sel {
                    0 => set_low(driver_features, value),
                    1 => set_high(driver_features, value),
                    _ => {}
                }
            }
            VIRTIO_MMIO_QUEUE_SEL => inner.registers.queue_sel = value,
            VIRTIO_MMIO_SHM_SEL => inner.registers.shm_sel = value,
            VIRTIO_MMIO_STATUS => self.write_status(&mut inner, value),
            // 3.1.1: queues come after the features.
            _ if status & (FEATURES_OK | FAILED) == FEATURES_OK => self.write_queue(&mut inner, register, value),
            _ => {}
        }
    }

    /// Registers of the selected queue; 4.2.2.2: those that describe it are fixed while it is ready.
    fn write_queue(&self, inner: &mut Inner, register: u32, value: u32) {
        let resettable = inner.registers.driver_features & 1 << VIRTIO_F_RING_RESET != 0;
        let Some(queue) = inner.registers.selected_mut() else { return };
        match register {
            VIRTIO_MMIO_QUEUE_READY if value <= 1 && queue.ready != (value == 1) => {
                self.change_queue(inner, |queue| queue.ready = value == 1);
            }
            QUEUE_RESET if value == 1 && resettable => self.change_queue(inner, |queue| *queue = QueueState::default()),
            _ if queue.ready => {}
            // What does not fit is no power of two up to the maximum either, and neither is 0.
            VIRTIO_MMIO_QUEUE_NUM => queue.size = u16::try_from(value).unwrap_or(0),
            VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut queue.desc, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut queue.desc, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut queue.avail, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut queue.avail, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut queue.used, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut queue.used, value),
            _ => {}
        }
    }
}

impl BusDevice for MmioTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match u32::try_from(offset) {
            Ok(register) if register < VIRTIO_MMIO_CONFIG => {
                if let (Ok(data), 0) = (<&mut [u8; 4]>::try_from(data), register % 4) {
                    *data = self.read_register(register).to_le_bytes();
                }
            }
            _ => self.lock().device.read_config(offset - u64::from(VIRTIO_MMIO_CONFIG), data),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match u32::try_from(offset) {
            Ok(register) if register < VIRTIO_MMIO_CONFIG => {
                if let (Ok(data), 0) = (<[u8; 4]>::try_from(data), register % 4) {
                    self.write_register(register, u32::from_le_bytes(data));
                }
            }
            _ => {
                let mut inner = self.lock();
                // 3.1.1: only who has announced itself as a driver configures.
                if inner.registers.status & DRIVER != 0 {
                    inner.device.write_config(offset - u64::from(VIRTIO_MMIO_CONFIG), data);
                }
            }
        }
    }
}

impl Registers {
    fn selected_mut(&mut self) -> Option<&mut QueueState> {
        self.queues.get_mut(self.queue_sel as usize)
    }
}

/// A queue that its driver set up wrongly.
#[derive(Debug, thiserror::Error)]
#[error("queue {index} cannot be used, {source}")]
struct QueueError {
    index: u16,
    source: SetupError,
}

fn set_low(value: &mut u64, low: u32) {
    *value = *value & !u64::from(u32::MAX) | u64::from(low);
}

fn set_high(value: &mut u64, high: u32) {
    *value = *value & u64::from(u32::MAX) | u64::from(high) << 32;
}

#[cfg(test)]
mod tests;
