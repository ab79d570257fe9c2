//! Devices that test suites expect from QEMU, at QEMU's ports and addresses. A machine has them only on request, so an
//! ordinary guest sees none of them.

use std::sync::Arc;

use super::Error;
use crate::bus::Bus;
use crate::config::MachineConfig;
use crate::devices::debug_exit::DebugExit;
use crate::devices::fw_cfg::FwCfg;
use crate::devices::testdev::{TestLines, TestMemory, TestPorts};
use crate::guest_event::GuestEvents;
use crate::kvm::Vm;
use crate::layout;
use crate::log_limit::LogLimit;
use crate::memory::GuestRam;

/// Adds the devices of `--debug-exit` and `--testdev` to the buses.
pub(super) fn add(
    config: &MachineConfig,
    vm: &Arc<Vm>,
    ram: &GuestRam,
    events: &GuestEvents,
    pio: &mut Bus,
    mmio: &mut Bus,
) -> Result<(), Error> {
    let mut port = |port: u16, len: u32, device| pio.insert(port.into(), len.into(), device);
    if config.debug_exit {
        port(layout::DEBUG_EXIT_PORT, layout::DEBUG_EXIT_LEN.into(), Arc::new(DebugExit::new(events.clone())))?;
    }
    if config.testdev {
        let vm = vm.clone();
        let warnings = LogLimit::default();
        let lines = TestLines::new(move |gsi, active| {
            if let Err(e) = vm.set_irq(gsi, active) {
                warnings.warn(format_args!("the test device cannot set interrupt line {gsi}: {e}"));
            }
        });
        // The number of vCPUs is at most 254.
        let cpus = config.cpu.count.try_into().unwrap_or(u16::MAX);
        port(layout::TESTDEV_PORT, layout::TESTDEV_LEN.into(), Arc::new(TestPorts::new(ram.clone())))?;
        port(layout::TESTDEV_IRQ_PORT, layout::IOAPIC_PINS, Arc::new(lines))?;
        port(layout::FW_CFG_PORT, layout::FW_CFG_LEN.into(), Arc::new(FwCfg::new(cpus, ram.size())))?;
        mmio.insert(layout::TESTDEV_MEMORY, layout::TESTDEV_MEMORY_LEN, Arc::new(TestMemory::new()))?;
    }
    Ok(())
}
