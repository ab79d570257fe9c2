//! ACPI tables, which describe devices that a guest cannot find by probing.
//!
//! ```text
//! RSDP -> XSDT -> FADT -> DSDT    serial port, virtio slots, power button, pvpanic
//!              -> MADT            local APICs, IO-APIC
//! ```
//!
//! The machine is hardware-reduced (ACPI 6.5, 4.1): no SCI, no 8259. There are an 8254, a PM timer and a real-time
//! clock at the ports of a PC, but a Linux that uses kvmclock needs none of them and would lose time with each: 4.5 ms
//! of waiting while it checks the PM timer, and a dozen exits for reading the clock. So the tables announce these two
//! only to a guest that does not use kvmclock, as far as vireo can know that. (Linux uses them even on a
//! hardware-reduced machine if the tables announce them; Xen does not start without the clock.) Everything in the
//! tables costs boot time, because Linux interprets the DSDT. So there is no PCI root, hence no PCI scan; processors
//! are listed in the MADT only; and names that would repeat their default (`_STA` present, `_CCA` coherent on x86:
//! 6.2.17) are omitted.

use acpi_tables::aml::{
    self, Device, EISAName, IO, Interrupt, Memory32Fixed, Method, Name, Notify, PackageBuilder, Path, ResourceTemplate,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};

use super::Platform;
use super::table::{self, Error};
use crate::layout::{self, S5_SLEEP_TYPE};
use crate::memory::GuestRam;

const OEM_ID: [u8; 6] = *b"VIREO ";
const OEM_TABLE_ID: [u8; 8] = *b"VIREOVM ";
const OEM_REVISION: u32 = 1;

/// IAPC_BOOT_ARCH (ACPI 6.5, table 5.11): there are devices on a legacy bus that need a driver, here the serial port.
const BOOT_ARCH_LEGACY_DEVICES: u16 = 1 << 0;
/// IAPC_BOOT_ARCH: probing for VGA is useless.
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
/// IAPC_BOOT_ARCH: there is no CMOS RTC. The machine has one, but with this flag Linux does not read it: kvmclock has
/// the time.
const BOOT_ARCH_NO_CMOS_RTC: u16 = 1 << 5;

/// Writes all tables to [`layout::ACPI`] and returns the address of the RSDP.
pub fn write(ram: &GuestRam, platform: &Platform) -> Result<u64, Error> {
    let tables = build(platform, layout::ACPI)?;
    table::place(ram, "ACPI", &tables, layout::ACPI, layout::ACPI_END)?;
    Ok(layout::ACPI)
}

/// Returns the tables as they lie in memory from `base` on, the RSDP first.
fn build(platform: &Platform, base: u64) -> Result<Vec<u8>, Error> {
    let mut tables = Tables { base, bytes: vec![0; Rsdp::len()] };
    let dsdt = tables.append(&dsdt(platform)?);
    let fadt = tables.append(&fadt(platform, dsdt));
    let madt = tables.append(&madt(platform)?);
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = tables.append(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    tables.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    Ok(tables.bytes)
}

/// A sequence of tables.
struct Tables {
    base: u64,
    bytes: Vec<u8>,
}

impl Tables {
    /// Adds a table at the next multiple of 16 and returns its guest-physical address.
    fn append(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let addr = self.base + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        addr
    }
}

/// Creates a table from a header and a body that is already serialized.
fn sdt(signature: &[u8; 4], revision: u8, body: &[u8]) -> Sdt {
    const HEADER: u32 = 36;
    let mut sdt = Sdt::new(*signature, HEADER, revision, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    sdt.append_slice(body);
    sdt
}

/// Fixed description table (ACPI 6.5, 5.2.9).
fn fadt(platform: &Platform, dsdt: u64) -> impl Aml {
    let port = |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into());
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        // Set means that the button is not fixed hardware but a device in the DSDT, or does not exist.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.reset_reg = port(layout::RESET_PORT);
    fadt.reset_value = layout::RESET_VALUE;
    fadt.sleep_control_reg = port(layout::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(layout::SLEEP_STATUS_PORT);
    let legacy = if platform.serial { BOOT_ARCH_LEGACY_DEVICES } else { 0 };
    // Bit 1 (8042) stays clear: port 0x64 accepts a reset command, but there is no keyboard to wait for.
    let no_clock = if platform.clocks { 0 } else { BOOT_ARCH_NO_CMOS_RTC };
    fadt.iapc_boot_arch = (legacy | BOOT_ARCH_NO_VGA | no_clock).into();
    if platform.clocks {
        fadt.pm_tmr_blk = u32::from(layout::PM_TIMER_PORT).into();
        fadt.pm_tmr_len = layout::PM_TIMER_LEN as u8;
        fadt.x_pm_tmr_blk =
            GAS::new(AddressSpace::SystemIo, 32, 0, AccessSize::DwordAccess, layout::PM_TIMER_PORT.into());
        // The timer has 32 bits, not 24.
        fadt = fadt.flag(Flags::TmrValExt);
    }
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"vireo\0\0\0").into();
    fadt.finalize()
}

/// Multiple APIC description table (ACPI 6.5, 5.2.12). Its flags stay 0: no PCAT_COMPAT, so no 8259 to disable.
fn madt(platform: &Platform) -> Result<Sdt, Error> {
    let mut body = Vec::new();
    body.dword(layout::LAPIC as u32);
    body.dword(0);
    for id in table::apic_ids(platform)? {
        ProcessorLocalApic::new(id, id, EnabledStatus::Enabled).to_aml_bytes(&mut body);
    }
    // KVM's IO-APIC has 0 in its id register after reset.
    IoApic::new(0, layout::IOAPIC as u32, 0).to_aml_bytes(&mut body);
    Ok(sdt(b"APIC", 6, &body))
}

/// Differentiated system description table: devices that cannot be found by probing.
fn dsdt(platform: &Platform) -> Result<Sdt, Error> {
    let mut devices = Vec::new();
    if platform.serial {
        serial(&mut devices);
    }
    for window in table::virtio_windows(platform)? {
        virtio(&mut devices, &window);
    }
    pvpanic(&mut devices);
    power_button(&mut devices);

    let mut s5 = PackageBuilder::new();
    s5.add_element(&S5_SLEEP_TYPE);
    let mut body = Vec::new();
    Name::new(Path::new("_S5_"), &s5).to_aml_bytes(&mut body);
    body.vec(&aml::Scope::raw(Path::new("\\_SB_"), devices));
    Ok(sdt(b"DSDT", 2, &body))
}

/// An edge-triggered, active-high, exclusive interrupt.
fn interrupt(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

/// COM1, a 16550.
fn serial(devices: &mut Vec<u8>) {
    let hid = Name::new(Path::new("_HID"), &EISAName::new("PNP0501"));
    let io = IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 1, layout::SERIAL_PORT_LEN as u8);
    let irq = interrupt(layout::SERIAL_GSI);
    let crs = Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&io, &irq]));
    Device::new(Path::new("COM1"), vec![&hid, &crs]).to_aml_bytes(devices);
}

/// A virtio-mmio device, with the id that Linux, QEMU and the UEFI Forum's registry agreed upon.
fn virtio(devices: &mut Vec<u8>, window: &table::Window) {
    let hid = Name::new(Path::new("_HID"), &"LNRO0005");
    let uid = Name::new(Path::new("_UID"), &window.slot);
    // The compile-time checks in `layout` keep all windows below the IO-APIC.
    let memory = Memory32Fixed::new(true, window.base as u32, layout::VIRTIO_MMIO_SIZE as u32);
    let irq = interrupt(window.gsi);
    let crs = Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&memory, &irq]));
    let path = Path::new(&format!("VR{:02X}", window.slot));
    Device::new(path, vec![&hid, &uid, &crs]).to_aml_bytes(devices);
}

/// QEMU's pvpanic, for which stock kernels have a driver (`docs/specs/pvpanic`).
fn pvpanic(devices: &mut Vec<u8>) {
    let hid = Name::new(Path::new("_HID"), &"QEMU0001");
    let io = IO::new(layout::PVPANIC_PORT, layout::PVPANIC_PORT, 1, 1);
    let crs = Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&io]));
    Device::new(Path::new("PVPN"), vec![&hid, &crs]).to_aml_bytes(devices);
}

/// A control-method power button (ACPI 6.5, 4.8.2.2.1.2) and the generic event device (5.6.9) that presses it.
fn power_button(devices: &mut Vec<u8>) {
    const PRESSED: u8 = 0x80;
    let hid = Name::new(Path::new("_HID"), &EISAName::new("PNP0C0C"));
    Device::new(Path::new("PWRB"), vec![&hid]).to_aml_bytes(devices);

    let hid = Name::new(Path::new("_HID"), &"ACPI0013");
    let irq = interrupt(layout::GED_GSI);
    let crs = Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&irq]));
    let button = Path::new("PWRB");
    let notify = Notify::new(&button, &PRESSED);
    // There is only one interrupt, so the method ignores its argument, the interrupt's number.
    let event = Method::new(Path::new("_EVT"), 1, true, vec![&notify]);
    Device::new(Path::new("GED_"), vec![&hid, &crs, &event]).to_aml_bytes(devices);
}

#[cfg(test)]
mod tests {
    use super::super::table::tests::{bytes, platform, sum};
    use super::*;

    fn u32_at(data: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(data[at..at + 4].try_into().unwrap())
    }

    fn u64_at(data: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(data[at..at + 8].try_into().unwrap())
    }

    /// Reads the table at `addr` by the length in its header, and verifies its checksum.
    fn table_at(ram: &GuestRam, addr: u64, signature: &[u8]) -> Vec<u8> {
        let len = u32_at(&bytes(ram, addr, 36), 4) as usize;
        assert!(addr >= layout::ACPI && addr + len as u64 <= layout::ACPI_END && addr.is_multiple_of(16));
        let table = bytes(ram, addr, len);
        assert_eq!(&table[..4], signature);
        assert_eq!(sum(&table), 0);
        table
    }

    /// Walks from the RSDP to (FADT, MADT, DSDT) as a kernel does.
    fn walk(ram: &GuestRam, rsdp: u64) -> (Vec<u8>, Vec<u8>, Vec<u8>) {
        let rsdp = bytes(ram, rsdp, 36);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!((rsdp[15], sum(&rsdp[..20]), sum(&rsdp)), (2, 0, 0));
        let xsdt = table_at(ram, u64_at(&rsdp, 24), b"XSDT");
        assert_eq!(xsdt.len(), 36 + 2 * 8);
        let fadt = table_at(ram, u64_at(&xsdt, 36), b"FACP");
        let madt = table_at(ram, u64_at(&xsdt, 44), b"APIC");
        let dsdt = table_at(ram, u64_at(&fadt, 140), b"DSDT");
        (fadt, madt, dsdt)
    }

    fn count(haystack: &[u8], needle: &[u8]) -> usize {
        haystack.windows(needle.len()).filter(|w| *w == needle).count()
    }

    #[test]
    fn largest_and_smallest_machines_read_back() {
        for (cpus, slots) in [(1, 0), (4, 3), (254, layout::VIRTIO_SLOTS)] {
            let ram = GuestRam::anonymous(0x10_0000);
            let rsdp = write(&ram, &platform(cpus, slots)).unwrap();
            let (_, madt, dsdt) = walk(&ram, rsdp);
            assert_eq!(u32_at(&madt, 36), 0xFEE0_0000);
            let mut structures = &madt[44..];
            let mut ids = Vec::new();
            while let [kind, len, ..] = *structures {
                match kind {
                    0 => {
                        assert_eq!((len, u32_at(structures, 4)), (8, 1));
                        ids.push(u32::from(structures[3]));
                    }
                    1 => assert_eq!((len, u32_at(structures, 4), u32_at(structures, 8)), (12, 0xFEC0_0000, 0)),
                    _ => panic!("structure type {kind}"),
                }
                structures = &structures[usize::from(len)..];
            }
            assert!(ids.iter().copied().eq(0..cpus));
            assert_eq!(count(&dsdt, b"LNRO0005\0"), slots as usize);
            for slot in 0..slots {
                let base = (layout::VIRTIO_MMIO as u32 + slot * 0x1000).to_le_bytes();
                let window = [&[0x86, 9, 0, 1][..], &base, &[0, 0x10, 0, 0]].concat();
                assert_eq!(count(&dsdt, &window), 1, "slot {slot}");
                let irq = [&[0x89, 6, 0, 0b0011, 1][..], &(6 + slot).to_le_bytes()].concat();
                assert_eq!(count(&dsdt, &irq), 1, "slot {slot}");
            }
        }
    }

    #[test]
    fn fixed_table_tells_of_reset_sleep_and_absent_hardware() {
        let ram = GuestRam::anonymous(0x10_0000);
        let rsdp = write(&ram, &platform(1, 0)).unwrap();
        let (fadt, ..) = walk(&ram, rsdp);
        assert_eq!(fadt.len(), 276);
        assert_eq!(fadt[8], 6);
        assert_eq!(u32_at(&fadt, 112), 1 << 20 | 1 << 10 | 1 << 5 | 1 << 4 | 1);
        assert_eq!(u16::from_le_bytes([fadt[109], fadt[110]]), 0b10_0101);
        let register = |at: usize| (fadt[at], fadt[at + 1], fadt[at + 3], u64_at(&fadt, at + 4));
        assert_eq!(register(116), (1, 8, 1, 0x602));
        assert_eq!(fadt[128], layout::RESET_VALUE);
        assert_eq!(register(244), (1, 8, 1, 0x600));
        assert_eq!(register(256), (1, 8, 1, 0x601));
    }

    #[test]
    fn clocks_are_named_for_guests_that_need_them() {
        let with = |clocks| {
            let ram = GuestRam::anonymous(0x10_0000);
            let rsdp = write(&ram, &Platform { clocks, ..platform(1, 0) }).unwrap();
            walk(&ram, rsdp).0
        };
        let no_clock = |fadt: &[u8]| fadt[109] >> 5 & 1;
        assert_eq!((no_clock(&with(false)), no_clock(&with(true))), (1, 0));
        // PM_TMR_BLK, PM_TMR_LEN, TMR_VAL_EXT, X_PM_TMR_BLK (ACPI 6.5, table 5.9).
        let fields = |fadt: &[u8]| (u32_at(fadt, 76), fadt[91], u32_at(fadt, 112) >> 8 & 1, fadt[208..220].to_vec());
        assert_eq!(fields(&with(false)), (0, 0, 0, vec![0; 12]));
        assert_eq!(fields(&with(true)), (0x608, 4, 1, vec![1, 32, 0, 3, 8, 6, 0, 0, 0, 0, 0, 0]));
    }

    #[test]
    fn devices_appear_only_when_they_exist() {
        let with = |serial| {
            let ram = GuestRam::anonymous(0x10_0000);
            let rsdp = write(&ram, &Platform { serial, ..platform(1, 0) }).unwrap();
            walk(&ram, rsdp)
        };
        let (fadt, _, dsdt) = with(false);
        assert_eq!((fadt[109] & 1, count(&dsdt, b"COM1")), (0, 0));
        let (fadt, _, dsdt) = with(true);
        assert_eq!((fadt[109] & 1, count(&dsdt, b"COM1")), (1, 1));
        assert_eq!((count(&dsdt, b"QEMU0001"), count(&dsdt, b"ACPI0013"), count(&dsdt, b"_EVT")), (1, 1, 1));
    }

    #[test]
    fn impossible_machines_are_refused() {
        let ram = GuestRam::anonymous(0x10_0000);
        assert!(matches!(write(&ram, &platform(255, 0)), Err(Error::Cpus { cpus: 255 })));
        assert!(matches!(write(&ram, &platform(1, 19)), Err(Error::Slot { slot: 18 })));
        assert!(matches!(write(&GuestRam::anonymous(0x1000), &platform(1, 0)), Err(Error::OutOfRam(_))));
    }
}
