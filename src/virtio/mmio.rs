//! The virtio-mmio transport, version 2 (4.2): the registers through which a driver finds a device, negotiates features
//! with it and sets up its queues.
//!
//! The transport owns the queues while the device is stopped, as [`QueueState`]s in its register file. Everything that
//! affects the queues of a running device (enabling a queue late, disabling or resetting one, pause, reset) is a stop,
//! a change of that file and, if the device is still meant to run, a start.
//!
//! Registers accept only what 4.2.2.2 allows, aligned 32-bit accesses: any other read returns zeros, any other write is
//! ignored. Configuration space accepts every width and alignment; past its end are zeros.

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
/// `QueueReset`, new in 1.2 and missing from virtio-bindings.
pub const QUEUE_RESET: u32 = 0x0C0;
/// Offset of `QueueNotify` within the window; the machine registers [`MmioTransport::notify_fds`] there.
pub const NOTIFY: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;
/// Offset of `InterruptACK` within the window. The machine makes KVM collect writes to it: an acknowledgement matters
/// only to the next read of `InterruptStatus`, which exits and finds it.
pub const INTERRUPT_ACK: u64 = VIRTIO_MMIO_INTERRUPT_ACK as u64;

const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;
const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;

/// Features that the transport adds to the device's (6).
const TRANSPORT_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_F_RING_RESET;

/// Reason why a transport cannot be created.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Out of file descriptors.
    #[error("cannot create eventfds for {name}")]
    EventFd {
        /// Name of the device.
        name: String,
        /// OS error.
        source: io::Error,
    },
    /// Out of threads.
    #[error("cannot start threads for {name}")]
    Thread {
        /// Name of the device.
        name: String,
        /// OS error.
        source: io::Error,
    },
    /// Saved state that does not fit the device.
    #[error(transparent)]
    State(#[from] StateError),
}

/// Device behind virtio-mmio registers. Once it is on the MMIO bus and its notify descriptors and its interrupt line
/// are registered with KVM, it runs as soon as its driver sets `DRIVER_OK`.
pub struct MmioTransport {
    info: DeviceInfo,
    ram: GuestRam,
    /// Outside of the lock: a read of its status register is the only exit of each interrupt.
    interrupt: Interrupt,
    kicks: Arc<[EventFd]>,
    /// Set while queues run where nobody sets `InterruptStatus`: it then always reports used buffers.
    elsewhere: AtomicBool,
    inner: Mutex<Inner>,
}

struct Inner {
    device: Box<dyn VirtioDevice>,
    registers: Registers,
    run: Run,
    paused: bool,
    /// Set if a worker did not stop in time, so that no vCPU waits that long again.
    stuck: bool,
}

/// Register file, except for what is in [`Interrupt`].
#[derive(Default)]
struct Registers {
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    shm_sel: u32,
    /// Status without `DEVICE_NEEDS_RESET`, which [`Interrupt`] keeps.
    status: u32,
    queues: Vec<QueueState>,
}

impl MmioTransport {
    /// Creates a freshly reset device that interrupts through `line`.
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

    /// Returns the fixed properties of the device.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// Returns one eventfd per queue, to be signalled by a write of the queue's index to [`NOTIFY`].
    pub fn notify_fds(&self) -> &[EventFd] {
        &self.kicks
    }

    /// Returns the interrupt of the device.
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// Stops the device: requests in flight finish, written data is flushed, the queues come back. The vCPUs must not
    /// run. Does nothing to a device that is not running. A device that needs longer, with a slow disk for example,
    /// continues to stop.
    pub fn pause(&self) -> Result<(), Stuck> {
        let mut inner = self.lock();
        inner.paused = true;
        let limit = if inner.stuck { Duration::ZERO } else { DRAIN_DEADLINE };
        self.halt(&mut inner, limit)
    }

    /// Continues after [`MmioTransport::pause`] or [`MmioTransport::from_state`]. Catches up on what was due before: on
    /// kicks by looking into every queue, on an interrupt by raising it again.
    pub fn resume(&self) {
        let mut inner = self.lock();
        inner.paused = false;
        // The pause was too short for the device: it must have stopped before it can start.
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

    /// Describes guest writes that the host did not keep: see [`VirtioDevice::unsaved`].
    pub fn unsaved(&self) -> Option<String> {
        self.lock().device.unsaved()
    }

    /// Passes a request to the device, and notifies its driver if configuration space changed.
    pub fn control(&self, control: &Control) -> Result<Reply, ControlError> {
        let mut inner = self.lock();
        let reply = inner.device.control(control)?;
        if reply != Reply::ConfigChanged {
            return Ok(reply);
        }
        // 3.1.2: no interrupt before the driver is ready. Until then it reads the current values, and reads them again
        // if they changed in between.
        if inner.registers.status & DRIVER_OK != 0 {
            self.interrupt.config_changed();
        } else {
            self.interrupt.new_generation();
        }
        Ok(Reply::Done)
    }

    /// Stops the device for good: like [`MmioTransport::pause`], but nothing starts it again.
    pub fn stop(&self) -> Result<(), Stuck> {
        self.pause()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn offered(&self) -> u64 {
        self.info.features | TRANSPORT_FEATURES
    }

    /// Returns whether a driver may accept `features` (2.2, 6.1): nothing that was not offered, and VERSION_1.
    fn acceptable(&self, features: u64) -> bool {
        features & !self.offered() == 0 && features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    fn status(&self, registers: &Registers) -> u32 {
        registers.status | if self.interrupt.is_reset_needed() { NEEDS_RESET } else { 0 }
    }

    /// Starts the device, if its driver and the machine want it to run and it does not yet. Mistakes of the driver lead
    /// to `DEVICE_NEEDS_RESET`.
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
            // An interrupt from before `elsewhere` was set may have been read as one without a reason.
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

    /// Stops the device and takes its queues back. A device that does not stop within `limit` is stuck; stopping it may
    /// be tried again.
    fn halt(&self, inner: &mut Inner, limit: Duration) -> Result<(), Stuck> {
        let stopped = inner.run.stop(Instant::now() + limit, &mut inner.registers.queues);
        self.elsewhere.store(inner.run.is_elsewhere(), Ordering::SeqCst);
        match stopped {
            Ok(()) => {
                inner.stuck = false;
                Ok(())
            }
            // The other side is gone, and with it the requests in flight.
            Err(running::Error::Lost(e)) => {
                self.interrupt.needs_reset(&self.info.name, format_args!("it did not return its queues: {e}"));
                Ok(())
            }
            Err(running::Error::Stuck(stuck)) => {
                inner.stuck = true;
                Err(stuck)
            }
        }
    }

    /// Stops the device for its driver, which cannot continue with a stuck device.
    fn halt_for_driver(&self, inner: &mut Inner) -> Result<(), Stuck> {
        let limit = if inner.stuck { Duration::ZERO } else { DRAIN_DEADLINE };
        self.halt(inner, limit).inspect_err(|stuck| self.interrupt.needs_reset(&self.info.name, stuck))
    }

    /// Writes `Status` (2.1, 4.2.2): zero resets; otherwise bits are only added, each after those that precede it.
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

    /// Resets the device (2.4). A stuck device is not reset: its status continues to read as not zero.
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

    /// Changes a queue's registers; a running device is stopped for the change and started again.
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
        // Lock-free: the guest's interrupt handler reads this.
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
            // A queue reset is complete when the write returns, unless the device is stuck in it.
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
        // Lock-free: written at the end of the guest's interrupt handler, and for kicks.
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
            // 3.1.1: FEATURES_OK makes the features final.
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
            // 3.1.1: queues are set up after the features.
            _ if status & (FEATURES_OK | FAILED) == FEATURES_OK => self.write_queue(&mut inner, register, value),
            _ => {}
        }
    }

    /// Writes a register of the selected queue; those that describe it are fixed while it is ready (4.2.2.2).
    fn write_queue(&self, inner: &mut Inner, register: u32, value: u32) {
        let resettable = inner.registers.driver_features & 1 << VIRTIO_F_RING_RESET != 0;
        let Some(queue) = inner.registers.selected_mut() else { return };
        match register {
            VIRTIO_MMIO_QUEUE_READY if value <= 1 && queue.ready != (value == 1) => {
                self.change_queue(inner, |queue| queue.ready = value == 1);
            }
            QUEUE_RESET if value == 1 && resettable => self.change_queue(inner, |queue| *queue = QueueState::default()),
            _ if queue.ready => {}
            // A value that does not fit is not a power of two up to the maximum either, and neither is 0.
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
                // 3.1.1: only a driver that has announced itself may configure the device.
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

/// Queue that its driver set up wrongly.
#[derive(Debug, thiserror::Error)]
#[error("queue {index} cannot be used: {source}")]
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
