//! The MP table (Intel MultiProcessor Specification 1.4): processors and interrupts of a machine without ACPI; and the
//! kernel parameters that replace the DSDT.

use super::Platform;
use super::table::{self, Error};
use crate::layout;
use crate::memory::GuestRam;

/// Length of the floating pointer structure (MP 1.4, 4.1); the configuration table follows it.
const POINTER_LEN: u64 = 16;
/// Length of the configuration table header (4.2).
const HEADER_LEN: usize = 44;
/// Specification revision 1.4.
const SPEC_REVISION: u8 = 4;
/// Version registers of an integrated local APIC and of KVM's IO-APIC.
const LAPIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;
/// Id of KVM's IO-APIC after reset. Processor ids are a separate name space (Linux), as on every xAPIC system.
const IOAPIC_ID: u8 = 0;
const ISA_BUS_ID: u8 = 0;

// Entry types (4.3).
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

// Interrupt types (4.3.4).
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;
/// Destination of local interrupt entries: the LINTn pin of every processor.
const ALL_LAPICS: u8 = 0xFF;

/// Writes the floating pointer and the configuration table to [`layout::MP_TABLE`].
pub fn write(ram: &GuestRam, platform: &Platform) -> Result<(), Error> {
    let config = layout::MP_TABLE + POINTER_LEN;
    let mut pointer = [0; POINTER_LEN as usize];
    pointer[..4].copy_from_slice(b"_MP_");
    pointer[4..8].copy_from_slice(&(config as u32).to_le_bytes());
    pointer[8] = 1; // Length in paragraphs.
    pointer[9] = SPEC_REVISION;
    pointer[10] = table::checksum(&pointer);
    let mut bytes = pointer.to_vec();
    bytes.extend(configuration(platform)?);
    table::place(ram, "MP", &bytes, layout::MP_TABLE, layout::MP_TABLE_END)
}

fn configuration(platform: &Platform) -> Result<Vec<u8>, Error> {
    let (count, entries) = entries(platform)?;
    let mut table = Vec::with_capacity(HEADER_LEN + entries.len());
    table.extend(b"PCMP");
    table.extend(((HEADER_LEN + entries.len()) as u16).to_le_bytes());
    table.extend([SPEC_REVISION, 0]); // The checksum is filled in below.
    table.extend(b"VIREO   ");
    table.extend(b"VIREO VM    ");
    table.extend([0; 6]); // No OEM table.
    table.extend(count.to_le_bytes());
    table.extend((layout::LAPIC as u32).to_le_bytes());
    table.extend([0; 4]); // No extended table.
    table.extend(entries);
    table[7] = table::checksum(&table);
    Ok(table)
}

/// Returns all entries and their number, sorted by type as the specification demands.
fn entries(platform: &Platform) -> Result<(u16, Vec<u8>), Error> {
    let mut out = Vec::new();
    let mut count = 0u16;
    let mut push = |entry: &[u8]| {
        out.extend(entry);
        count += 1;
    };
    for id in table::apic_ids(platform)? {
        let flags = if id == 0 { 0b11 } else { 0b01 }; // Enabled; the first one boots.
        // A family 6 signature and the feature flags FPU and APIC; kernels get the real values from CPUID.
        push(&[PROCESSOR, id, LAPIC_VERSION, flags, 0, 6, 0, 0, 0x01, 0x02, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    }
    push(&[BUS, ISA_BUS_ID, b'I', b'S', b'A', b' ', b' ', b' ']);
    let [a, b, c, d] = (layout::IOAPIC as u32).to_le_bytes();
    push(&[IO_APIC, IOAPIC_ID, IOAPIC_VERSION, 1, a, b, c, d]);
    // Flags 0 mean as the bus has it: edge-triggered, active high. Pins above 15 cannot really be ISA interrupts, but
    // this entry gives a virtio slot on such a pin the number that its kernel parameter names.
    for pin in 0..layout::IOAPIC_PINS as u8 {
        push(&[IO_INTERRUPT, INT, 0, 0, ISA_BUS_ID, pin, IOAPIC_ID, pin]);
    }
    push(&[LOCAL_INTERRUPT, EXT_INT, 0, 0, ISA_BUS_ID, 0, 0, 0]); // From the 8259 to the boot processor.
    push(&[LOCAL_INTERRUPT, NMI, 0, 0, ISA_BUS_ID, 0, ALL_LAPICS, 1]);
    Ok((count, out))
}

/// Returns the kernel parameters that announce the virtio slots in place of a DSDT (Linux
/// `CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES`), separated by spaces; empty without devices.
pub fn virtio_mmio_cmdline(platform: &Platform) -> Result<String, Error> {
    let size = layout::VIRTIO_MMIO_SIZE / 1024;
    let windows = table::virtio_windows(platform)?;
    let devices = windows.iter().map(|w| format!("virtio_mmio.device={size}K@{:#x}:{}", w.base, w.gsi));
    Ok(devices.collect::<Vec<_>>().join(" "))
}

#[cfg(test)]
mod tests {
    use super::super::table::tests::{bytes, platform, sum};
    use super::*;

    #[test]
    fn table_reads_back() {
        for cpus in [1, 2, 254] {
            let ram = GuestRam::anonymous(0x10_0000);
            write(&ram, &platform(cpus, 0)).unwrap();
            let pointer = bytes(&ram, layout::MP_TABLE, 16);
            assert_eq!((&pointer[..4], sum(&pointer), pointer[8]), (&b"_MP_"[..], 0, 1));
            let at = u64::from(u32::from_le_bytes(pointer[4..8].try_into().unwrap()));
            let header = bytes(&ram, at, HEADER_LEN);
            let len = usize::from(u16::from_le_bytes([header[4], header[5]]));
            let table = bytes(&ram, at, len);
            assert_eq!((&table[..4], sum(&table)), (&b"PCMP"[..], 0));
            assert_eq!(table[36..40], 0xFEE0_0000u32.to_le_bytes());

            let mut by_type = [0u32; 5];
            let mut rest = &table[HEADER_LEN..];
            while let [kind, ..] = *rest {
                if kind == PROCESSOR {
                    assert_eq!(u32::from(rest[1]), by_type[0]);
                    assert_eq!(rest[3] & 2 != 0, rest[1] == 0);
                }
                by_type[usize::from(kind)] += 1;
                rest = &rest[if kind == PROCESSOR { 20 } else { 8 }..];
            }
            assert_eq!(by_type, [cpus, 1, 1, 24, 2]);
            assert_eq!(u32::from(u16::from_le_bytes([table[34], table[35]])), by_type.iter().sum::<u32>());
        }
    }

    #[test]
    fn command_line_names_each_slot() {
        assert_eq!(virtio_mmio_cmdline(&platform(1, 0)).unwrap(), "");
        let two = virtio_mmio_cmdline(&Platform { virtio_slots: vec![0, 17], ..platform(1, 0) }).unwrap();
        assert_eq!(two, "virtio_mmio.device=4K@0xd0000000:6 virtio_mmio.device=4K@0xd0011000:23");
        assert!(virtio_mmio_cmdline(&Platform { virtio_slots: vec![18], ..platform(1, 0) }).is_err());
    }
}
