//! Save and restore of the transport.

use serde::{Deserialize, Serialize};

use super::{ACKNOWLEDGE, DRIVER, DRIVER_OK, Error, FAILED, FEATURES_OK, Inner, MmioTransport, NEEDS_RESET, Registers};
use crate::irq::IrqLine;
use crate::memory::GuestRam;
use crate::virtio::queue::QueueState;
use crate::virtio::{StateError, VirtioDevice};

/// State of a transport and its device, saved while paused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MmioState {
    /// `DeviceID`.
    pub device_id: u32,
    /// `Status`.
    pub status: u32,
    /// `DeviceFeaturesSel`.
    pub device_features_sel: u32,
    /// `DriverFeaturesSel`.
    pub driver_features_sel: u32,
    /// Features that the driver accepted, both words.
    pub driver_features: u64,
    /// `QueueSel`.
    pub queue_sel: u32,
    /// `SHMSel`.
    pub shm_sel: u32,
    /// `InterruptStatus`.
    pub interrupt_status: u32,
    /// `ConfigGeneration`.
    pub config_generation: u32,
    /// Registers and positions of the queues.
    pub queues: Vec<QueueState>,
    /// State that the device itself keeps.
    pub device: serde_json::Value,
}

impl MmioTransport {
    /// Creates a paused device from saved state. `device` is new, and was created from the same configuration.
    pub fn from_state(
        device: Box<dyn VirtioDevice>,
        ram: GuestRam,
        line: IrqLine,
        state: &MmioState,
    ) -> Result<Self, Error> {
        let transport = Self::new(device, ram, line)?;
        transport.restore(state.clone())?;
        Ok(transport)
    }

    /// Returns the complete state of a paused device.
    pub fn save(&self) -> Result<MmioState, StateError> {
        let inner = self.lock();
        if !inner.run.is_stopped() {
            return Err(StateError(format!("{} cannot be saved while it runs", self.info.name)));
        }
        let Inner { device, registers, run: _, paused: _, stuck: _ } = &*inner;
        let Registers {
            device_features_sel,
            driver_features_sel,
            driver_features,
            queue_sel,
            shm_sel,
            status: _,
            ref queues,
        } = *registers;
        Ok(MmioState {
            device_id: self.info.id as u32,
            status: self.status(registers),
            device_features_sel,
            driver_features_sel,
            driver_features,
            queue_sel,
            shm_sel,
            interrupt_status: self.interrupt.saved_reasons(),
            config_generation: self.interrupt.generation(),
            queues: queues.clone(),
            device: device.save()?,
        })
    }

    fn restore(&self, state: MmioState) -> Result<(), StateError> {
        let MmioState {
            device_id,
            status,
            device_features_sel,
            driver_features_sel,
            driver_features,
            queue_sel,
            shm_sel,
            interrupt_status,
            config_generation,
            queues,
            device,
        } = state;
        let name = &self.info.name;
        let refuse = |what: String| Err(StateError(format!("the saved state of {name} {what}")));
        if device_id != self.info.id as u32 {
            return refuse(format!("is that of a device with id {device_id}, not {}", self.info.id as u32));
        }
        if queues.len() != self.info.queue_sizes.len() {
            return refuse(format!("has {} queues, not {}", queues.len(), self.info.queue_sizes.len()));
        }
        if status & (FEATURES_OK | DRIVER_OK) != 0 && !self.acceptable(driver_features) {
            return refuse(format!("has features {driver_features:#x}, which the device does not offer"));
        }
        let mut inner = self.lock();
        inner.device.restore(&device)?;
        let status = status & (ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED | NEEDS_RESET);
        inner.registers = Registers {
            device_features_sel,
            driver_features_sel,
            driver_features,
            queue_sel,
            shm_sel,
            status: status & !NEEDS_RESET,
            queues,
        };
        inner.paused = true;
        self.interrupt.restore(interrupt_status, config_generation, status & NEEDS_RESET != 0);
        Ok(())
    }
}
