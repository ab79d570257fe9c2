//! The interrupt controllers (8259) and the timer (8254) of a PC, in KVM.
//!
//! Every machine has the timer. Guests without kvmclock use it to measure the frequency of their TSC. Linux does so
//! before it learns from the ACPI tables that there is no such timer, and does not use the timer afterwards.

use kvm_bindings::{
    KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_SPEAKER_DUMMY, kvm_irqchip, kvm_pit_channel_state,
    kvm_pit_config, kvm_pit_state2, kvm_reinject_control,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::{Error, Vm, failed};

/// `_IO(KVMIO, 0x71)`; the kvm-ioctls crate has no function for it.
const KVM_REINJECT_CONTROL: libc::c_ulong = 0xAE71;

/// First interrupt vector of each 8259 as a BIOS programs it, and the interrupts that the BIOS leaves masked: all but
/// the timer and the cascade between the two controllers.
const PICS: [(u32, u8, u8); 2] = [(KVM_IRQCHIP_PIC_MASTER, 0x08, !0b101), (KVM_IRQCHIP_PIC_SLAVE, 0x70, 0xFF)];

/// State of the timer as a BIOS programs it: it counts 65,536 ticks of 1.193182 MHz repeatedly, 18.2 times a second
/// (8254 data sheet: mode 2, low byte then high byte).
const TICKS: kvm_pit_channel_state =
    kvm_pit_channel_state { count: 0x1_0000, mode: 2, rw_mode: 3, read_state: 3, write_state: 3, gate: 1, ..CHANNEL };
const CHANNEL: kvm_pit_channel_state = kvm_pit_channel_state {
    count: 0,
    latched_count: 0,
    count_latched: 0,
    status_latched: 0,
    status: 0,
    read_state: 0,
    write_state: 0,
    write_latch: 0,
    rw_mode: 0,
    mode: 0,
    bcd: 0,
    gate: 0,
    count_load_time: 0,
};

/// Creates the timer. Lost ticks are not reinjected: to do so, KVM would watch each acknowledgement, and then could not
/// use AMD's AVIC. No system of the last fifteen years derives its time from counting ticks.
#[allow(unsafe_code)]
pub(super) fn create_timer(vm: &VmFd) -> Result<(), Error> {
    let config = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(config).map_err(failed("KVM_CREATE_PIT2"))?;
    let control = kvm_reinject_control { pit_reinject: 0, ..Default::default() };
    // SAFETY: the request takes a pointer to this structure, which KVM only reads.
    match unsafe { ioctl_with_ref(vm, KVM_REINJECT_CONTROL, &control) } {
        0 => Ok(()),
        _ => Err(Error::Ioctl("KVM_REINJECT_CONTROL", std::io::Error::last_os_error())),
    }
}

impl Vm {
    /// Programs the interrupt controllers and the timer as a BIOS leaves them. A multiboot kernel may rely on that
    /// (Multiboot specification 0.6.96, 3.2).
    pub fn program_timer(&self) -> Result<(), Error> {
        for (chip_id, vector, masked) in PICS {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            self.fd.get_irqchip(&mut chip).map_err(failed("KVM_GET_IRQCHIP"))?;
            set_pic(&mut chip, vector, masked);
            self.fd.set_irqchip(&chip).map_err(failed("KVM_SET_IRQCHIP"))?;
        }
        let mut timer: kvm_pit_state2 = self.fd.get_pit2().map_err(failed("KVM_GET_PIT2"))?;
        timer.channels[0] = TICKS;
        self.fd.set_pit2(&timer).map_err(failed("KVM_SET_PIT2"))
    }
}

#[allow(unsafe_code)]
fn set_pic(chip: &mut kvm_irqchip, vector: u8, masked: u8) {
    // SAFETY: KVM_GET_IRQCHIP filled this member, as the caller's `chip_id` is that of an 8259; it consists of bytes.
    let pic = unsafe { &mut chip.chip.pic };
    (pic.irq_base, pic.imr) = (vector, masked);
    // State after a complete initialisation, including its fourth word.
    (pic.init_state, pic.init4) = (0, 1);
}
