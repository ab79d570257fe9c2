//! The firmware's tables, read by independent programs: iasl (package acpica-tools) and dmidecode.

use std::fs;
use std::path::Path;
use std::process::Command;

use ::vireo::boot::{Platform, acpi, smbios};
use ::vireo::layout;
use ::vireo::memory::GuestRam;

fn platform(cpus: u32, slots: u32) -> Platform {
    let uuid = *b"\x00\x11\x22\x33\x44\x55\x66\x77\x88\x99\xaa\xbb\xcc\xdd\xee\xff";
    Platform { cpus, acpi: true, uuid, virtio_slots: (0..slots).collect(), serial: true, clocks: true }
}

fn bytes(ram: &GuestRam, addr: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    ram.read(addr, &mut bytes).unwrap();
    bytes
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + N].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// Returns the table at an address, with the length in its header.
fn table(ram: &GuestRam, addr: u64) -> Vec<u8> {
    let len = number::<4>(&bytes(ram, addr, 8), 4);
    bytes(ram, addr, len as usize)
}

/// Returns the output of a program, which must succeed.
fn said(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}: run 'make setup'"));
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{command:?}: {text}");
    text
}

/// Disassembles a table; returns the source that iasl wrote.
fn disassembled(folder: &Path, name: &str, table: &[u8]) -> String {
    let path = folder.join(name);
    fs::write(&path, table).unwrap();
    let said = said(Command::new("iasl").arg("-d").arg(&path));
    for word in ["Warning", "Error", "Invalid", "checksum"] {
        assert!(!said.contains(word), "{name}: {said}");
    }
    fs::read_to_string(path.with_extension("dsl")).unwrap()
}

/// Returns the value that iasl shows for a field.
fn field<'a>(text: &'a str, name: &str) -> &'a str {
    let line = text.lines().find(|line| line.contains(&format!("{name} : ")));
    line.and_then(|line| line.rsplit_once(" : ")).unwrap_or_else(|| panic!("{name} is not in {text}")).1.trim()
}

#[test]
fn acpi_tables_are_read_by_iasl() {
    let folder = tempfile::tempdir().unwrap();
    for (cpus, slots) in [(1, 0), (254, layout::VIRTIO_SLOTS)] {
        let ram = GuestRam::anonymous(1 << 20);
        let rsdp = acpi::write(&ram, &platform(cpus, slots)).unwrap();
        let xsdt = table(&ram, number::<8>(&bytes(&ram, rsdp, 36), 24));
        let [fadt, madt] = [36, 44].map(|at| table(&ram, number::<8>(&xsdt, at)));
        let dsdt = table(&ram, number::<8>(&fadt, 140));
        disassembled(folder.path(), "xsdt.dat", &xsdt);
        let text = disassembled(folder.path(), "fadt.dat", &fadt);
        for (name, value) in [
            ("Hardware Reduced (V5)", "1"),
            ("Reset Register Supported (V2)", "1"),
            ("32-bit PM Timer (V1)", "1"),
            ("PM Timer Block Address", "00000608"),
            ("PM Timer Block Length", "04"),
            ("CMOS RTC Not Present (V5)", "0"),
            ("VGA Not Present (V4)", "1"),
            ("8042 Present on ports 60/64 (V2)", "0"),
            ("Value to cause reset", "01"),
        ] {
            assert_eq!(field(&text, name), value, "{name}");
        }
        let text = disassembled(folder.path(), "madt.dat", &madt);
        assert_eq!(text.matches("[Processor Local APIC]").count(), cpus as usize);
        assert_eq!(text.matches("[I/O APIC]").count(), 1);
        let text = disassembled(folder.path(), "dsdt.dat", &dsdt);
        assert_eq!(text.matches("\"LNRO0005\"").count(), slots as usize);
        // Compiles the source again: the compiler checks what the disassembler only shows.
        let path = folder.path().join("dsdt.dsl");
        let said = said(Command::new("iasl").arg("-oa").arg(&path));
        assert!(said.contains(" 0 Errors, 0 Warnings"), "{said}");
    }
}

#[test]
fn smbios_tables_are_read_by_dmidecode() {
    let ram = GuestRam::anonymous(1 << 20);
    smbios::write(&ram, &platform(1, 0)).unwrap();
    let mut dump = bytes(&ram, layout::SMBIOS, (layout::SMBIOS_END - layout::SMBIOS) as usize);
    // A dump begins with the entry point, which holds the offset of the structures in the dump.
    let start = number::<8>(&dump, 16) - layout::SMBIOS;
    dump[16..24].copy_from_slice(&start.to_le_bytes());
    let sum = dump[..24].iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    dump[5] = dump[5].wrapping_sub(sum);
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), &dump).unwrap();
    let path = std::env::join_paths(
        std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
            .chain(["/usr/sbin".into(), "/sbin".into()]),
    );
    let text = said(Command::new("dmidecode").env("PATH", path.unwrap()).arg("--from-dump").arg(file.path()));
    for word in [
        "SMBIOS 3.2.0 present.",
        "Vendor: vireo",
        "Address: 0xF0000",
        "ROM Size: 64 kB",
        "System is a virtual machine",
        "UUID: 00112233-4455-6677-8899-aabbccddeeff",
        "Wake-up Type: Power Switch",
        "End Of Table",
    ] {
        assert!(text.contains(word), "'{word}' is not in {text}");
    }
    for word in ["Wrong", "Invalid", "TRUNCATED", "checksum", "OUT OF SPEC"] {
        assert!(!text.contains(word), "{text}");
    }
}
