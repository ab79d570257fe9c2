//! Remains of a Linux guest that ended badly: the last lines of its kernel's log although it was quiet, the registers
//! of every vCPU, and a core file with the guest's memory.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};

use crate::common::{Ended, Run};

/// A reader of core files, written from the specification rather than from the code that writes them.
struct Core {
    file: File,
    /// Name, type and descriptor of each note.
    notes: Vec<(String, u32, Vec<u8>)>,
    /// Offset, virtual address, physical address and length of each load segment.
    loads: Vec<[u64; 4]>,
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

impl Core {
    fn open(path: &str) -> Core {
        let file = File::open(path).unwrap_or_else(|e| panic!("{path}: {e}"));
        let bytes = |offset: u64, len: u64| {
            let mut bytes = vec![0; len as usize];
            file.read_exact_at(&mut bytes, offset).unwrap();
            bytes
        };
        let header = bytes(0, 64);
        assert_eq!((&header[..7], &header[16..20]), (&b"\x7FELF\x02\x01\x01"[..], &[4, 0, 62, 0][..]));
        let (mut notes, mut loads) = (Vec::new(), Vec::new());
        for index in 0..number(&header[56..58]) {
            let program = bytes(number(&header[32..40]) + 56 * index, 56);
            let field = |n: usize| number(&program[8 * n..8 * n + 8]);
            if number(&program[..4]) == 1 {
                assert_eq!(field(4), field(5));
                loads.push([field(1), field(2), field(3), field(4)]);
                continue;
            }
            let all = bytes(field(1), field(4));
            let mut rest = &all[..];
            while !rest.is_empty() {
                let [name, desc] = [0, 4].map(|at| number(&rest[at..at + 4]) as usize);
                let begin = 12 + name.next_multiple_of(4);
                let text = String::from_utf8(rest[12..12 + name - 1].to_vec()).unwrap();
                notes.push((text, number(&rest[8..12]) as u32, rest[begin..begin + desc].to_vec()));
                rest = &rest[begin + desc.next_multiple_of(4)..];
            }
        }
        Core { file, notes, loads }
    }

    /// Returns the bytes at an address, which is looked up in `field` of the loads (1 virtual, 2 physical).
    fn read(&self, field: usize, addr: u64, len: usize) -> Vec<u8> {
        let load = self.loads.iter().find(|load| load[field] <= addr && addr - load[field] < load[3]);
        let load = load.unwrap_or_else(|| panic!("{addr:#x} is in none of {:x?}", self.loads));
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, load[0] + addr - load[field]).unwrap();
        bytes
    }

    /// Returns the bytes at an address of the kernel, translated by page tables with four levels.
    fn read_mapped(&self, root: u64, addr: u64, len: usize) -> Vec<u8> {
        let mut table = root & !0xFFF;
        for shift in [39, 30, 21, 12] {
            let entry = number(&self.read(2, table + (addr >> shift & 511) * 8, 8));
            assert_eq!(entry & 1, 1, "{addr:#x} is not mapped at {shift}");
            table = entry & 0xF_FFFF_FFFF_F000;
            if shift == 12 || entry & 0x80 != 0 {
                return self.read(2, table & !((1 << shift) - 1) | addr & ((1 << shift) - 1), len);
            }
        }
        unreachable!()
    }

    /// Returns the general registers of each vCPU, in the order of `user_regs_struct`.
    fn registers(&self) -> Vec<Vec<u64>> {
        let statuses = self.notes.iter().filter(|note| note.0 == "CORE" && note.1 == 1);
        statuses.map(|(_, _, desc)| desc[112..328].chunks(8).map(number).collect()).collect()
    }
}

/// Returns the number that follows a register's name.
fn register(text: &str, name: &str) -> u64 {
    let found = text.split(&format!("{name} ")).nth(1).and_then(|rest| rest.split_whitespace().next());
    u64::from_str_radix(found.unwrap_or_else(|| panic!("no {name}: {text}")), 16).unwrap()
}

fn strings(ended: &Ended, key: &str) -> Vec<String> {
    let array = ended.report[key].as_array().unwrap_or_else(|| panic!("no {key}: {ended}"));
    array.iter().map(|text| text.as_str().unwrap().to_string()).collect()
}

/// Checks that a core file contains what the report does; returns it with the registers' texts.
fn core(ended: &Ended, path: &str, cpus: usize) -> (Core, Vec<String>) {
    assert_eq!(ended.report["vmcore"].as_str(), Some(path), "{ended}");
    let (core, texts) = (Core::open(path), strings(ended, "registers"));
    let registers = core.registers();
    assert_eq!((registers.len(), texts.len()), (cpus, cpus), "{ended}");
    for (registers, text) in registers.iter().zip(&texts) {
        assert_eq!((registers[16], registers[19]), (register(text, "rip"), register(text, "rsp")), "{text}");
        assert!(ended.stderr.contains(text), "{ended}");
    }
    let info = core.notes.iter().find(|note| note.0 == "VMCOREINFO").unwrap_or_else(|| panic!("no note: {ended}"));
    assert!(info.2.starts_with(b"OSRELEASE="), "{ended}");
    (core, texts)
}

#[test]
fn a_panic_leaves_log_registers_and_core() {
    let script = "grep -w linux_banner /proc/kallsyms; echo c >/proc/sysrq-trigger";
    // The run's own folder is removed with the run.
    let dir = crate::common::scratch();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let args = ["--vmcore", &path("core"), "--memory", "160M", "--serial", &format!("file:{}", path("console"))];
    let ended = Run::new("bzImage-cloud", script).args(&args).run_to_end().expect(70, "panicked");
    let console = fs::read_to_string(path("console")).unwrap();

    let (core, texts) = core(&ended, &path("core"), 1);
    let banner =
        console.lines().find_map(|line| line.split_whitespace().next().filter(|_| line.contains("linux_banner")));
    let banner = u64::from_str_radix(banner.unwrap_or_else(|| panic!("no address: {console}")), 16).unwrap();
    let text = core.read_mapped(register(&texts[0], "cr3"), banner, 14);
    assert_eq!(text, b"Linux version ", "by page tables");
    assert_eq!(core.read(1, banner, 14), text, "by the image's addresses");
    let metadata = fs::metadata(path("core")).unwrap();
    assert!(metadata.len() > 160 << 20 && metadata.blocks() * 512 < metadata.len() * 3 / 4, "{metadata:?}");

    let log = strings(&ended, "kernel_log");
    assert_eq!(log.len(), 50, "{log:#?}");
    assert!(log.iter().all(|line| line.starts_with('[')), "{log:#?}");
    assert!(log.iter().any(|line| line.contains("] sysrq: Trigger a crash")), "{log:#?}");
    assert!(log.iter().any(|line| line.contains("] Kernel panic - not syncing: sysrq")), "{log:#?}");
    assert!(
        ended.stderr.contains(&format!("the last lines of the guest's log:\n{}\nvCPU 0: ", log.join("\n"))),
        "{ended}"
    );
}

#[test]
fn a_guest_that_only_waits_leaves_registers_of_every_vcpu() {
    let run = Run::new("bzImage-cloud", "sleep 1000").args(&["--cpus", "2", "--hang-timeout", "2s"]);
    let ended = run.run_to_end().expect(72, "hung");
    let texts = strings(&ended, "registers");
    assert_eq!(texts.len(), 2, "{ended}");
    for (n, text) in texts.iter().enumerate() {
        assert!(text.starts_with(&format!("vCPU {n}: CPL ")), "{text}");
        assert!(text.contains(", halted\n") && register(text, "rip") > 1 << 63, "{text}");
    }
    // A quiet guest's log is reported even though its console was shown.
    let log = strings(&ended, "kernel_log");
    assert!(
        !log.is_empty() && ended.stderr.contains(&format!("the last lines of the guest's log:\n{}", log[0])),
        "{ended}"
    );
}
