//! SMBIOS 3 tables (DMTF DSP0134): manufacturer and UUID of the machine, as `/sys/class/dmi/id` shows them.

use super::Platform;
use super::table::{self, Error};
use crate::layout;
use crate::memory::GuestRam;

/// Length of the 64-bit entry point (DSP0134 3.2, 5.2.2). The structures follow at the next multiple of 16.
const ENTRY_POINT_LEN: usize = 24;
const STRUCTURES: u64 = layout::SMBIOS + 32;

/// Writes the entry point and its structures to [`layout::SMBIOS`], where a kernel's scan for the entry point begins.
pub fn write(ram: &GuestRam, platform: &Platform) -> Result<(), Error> {
    let mut bytes = entry_point(structures(platform).len() as u32).to_vec();
    bytes.resize((STRUCTURES - layout::SMBIOS) as usize, 0);
    bytes.extend(structures(platform));
    table::place(ram, "SMBIOS", &bytes, layout::SMBIOS, layout::SMBIOS_END)
}

fn entry_point(structures_len: u32) -> [u8; ENTRY_POINT_LEN] {
    let mut entry = [0; ENTRY_POINT_LEN];
    entry[..5].copy_from_slice(b"_SM3_");
    // Length, version 3.2.0, entry point revision 1.
    entry[6..11].copy_from_slice(&[ENTRY_POINT_LEN as u8, 3, 2, 0, 1]);
    entry[12..16].copy_from_slice(&structures_len.to_le_bytes());
    entry[16..24].copy_from_slice(&STRUCTURES.to_le_bytes());
    entry[5] = table::checksum(&entry);
    entry
}

fn structures(platform: &Platform) -> Vec<u8> {
    let mut out = Vec::new();

    // Type 0, platform firmware information (7.1).
    let mut firmware = vec![1, 2]; // Vendor and version, by number of their string.
    firmware.extend(0xF000u16.to_le_bytes()); // Start segment: 64 KiB at 0xF0000.
    firmware.extend([0, 0]); // No release date, 64 KiB.
    firmware.extend((1u64 << 3).to_le_bytes()); // "Characteristics are not supported".
    firmware.extend([0, 1 << 4]); // Extension byte 2: these tables describe a virtual machine.
    firmware.extend([0xFF; 4]); // Releases of firmware and embedded controller: none.
    firmware.extend([0, 0]); // Extended ROM size: none.
    structure(&mut out, 0, &firmware, &["vireo", env!("CARGO_PKG_VERSION")]);

    // Type 1, system information (7.2).
    let mut system = vec![1, 2, 3, 0]; // Manufacturer, product, version; no serial number.
    system.extend(wire_uuid(platform.uuid));
    system.push(6); // Wake-up type: power switch.
    system.extend([0, 0]); // No SKU, no family.
    structure(&mut out, 1, &system, &["vireo", "vireo", env!("CARGO_PKG_VERSION")]);

    // Type 127, end of table (7.45).
    structure(&mut out, 127, &[], &[]);
    out
}

/// Appends one structure: header, formatted area, strings, and a NUL after the last string. A structure without strings
/// ends with two NULs (6.1.3).
fn structure(out: &mut Vec<u8>, kind: u8, formatted: &[u8], strings: &[&str]) {
    let handle = u16::from(kind).to_le_bytes();
    out.extend([kind, 4 + formatted.len() as u8, handle[0], handle[1]]);
    out.extend(formatted);
    for string in strings {
        out.extend(string.as_bytes());
        out.push(0);
    }
    if strings.is_empty() {
        out.push(0);
    }
    out.push(0);
}

/// Returns a UUID in SMBIOS's byte order: the first three fields are little-endian (7.2.1), but big-endian in text
/// form.
fn wire_uuid(uuid: [u8; 16]) -> [u8; 16] {
    let mut wire = uuid;
    wire[..4].reverse();
    wire[4..6].reverse();
    wire[6..8].reverse();
    wire
}

#[cfg(test)]
mod tests {
    use super::super::table::tests::{bytes, platform, sum};
    use super::*;

    #[test]
    fn structures_read_back() {
        let ram = GuestRam::anonymous(0x10_0000);
        write(&ram, &platform(1, 0)).unwrap();
        let entry = bytes(&ram, layout::SMBIOS, ENTRY_POINT_LEN);
        assert_eq!((&entry[..5], sum(&entry), entry[6]), (&b"_SM3_"[..], 0, 24));
        let len = u32::from_le_bytes(entry[12..16].try_into().unwrap()) as usize;
        let at = u64::from_le_bytes(entry[16..24].try_into().unwrap());
        let table = bytes(&ram, at, len);

        let mut rest = &table[..];
        let mut seen = Vec::new();
        while let [kind, len, ..] = *rest {
            let (formatted, strings) = rest.split_at(usize::from(len));
            let end = strings.windows(2).position(|w| w == [0, 0]).unwrap() + 2;
            if kind == 1 {
                let uuid = b"\x33\x22\x11\x00\x55\x44\x77\x66\x88\x99\xaa\xbb\xcc\xdd\xee\xff";
                assert_eq!(&formatted[8..24], uuid);
                assert_eq!(formatted.len(), 0x1B);
                assert!(strings.starts_with(b"vireo\0vireo\0"));
            }
            if kind == 0 {
                assert_eq!((formatted.len(), formatted[0x13] & 1 << 4), (0x1A, 1 << 4));
                assert_eq!(formatted[6..8], [0x00, 0xF0], "the segment F000");
            }
            seen.push(kind);
            rest = &strings[end..];
        }
        assert_eq!(seen, [0, 1, 127]);
    }
}
