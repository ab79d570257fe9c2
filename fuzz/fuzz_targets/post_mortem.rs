//! The memory of a guest that has ended: a kernel's note, page tables and printk buffer that are almost right.

#![no_main]

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use vireo::backend::output_file::OutputFile;
use vireo::kvm::dump::CpuState;
use vireo::memory::GuestRam;
use vireo::post_mortem::Remains;

const IMAGE: u64 = 0xFFFF_FFFF_8000_0000;
/// Physical address of the image, whose first pages are its page tables.
const PHYS: u64 = 1 << 20;
const NOTE: u64 = 3 << 20;
/// Offsets of things in the image.
const PRB: u64 = 0x1_0000;
const RING: u64 = 0x1_0100;
const DESCS: u64 = 0x1_1000;
const INFOS: u64 = 0x1_2000;
const DATA: u64 = 0x1_3000;
const OLD: u64 = 0x1_4000;
const TEXT: &str = "OSRELEASE=6.1.0\nNUMBER(phys_base)=1048576\nSYMBOL(swapper_pg_dir)=ffffffff80000000\n\
    SYMBOL(_stext)=ffffffff80000000\nSYMBOL(prb)=ffffffff80010000\nOFFSET(printk_ringbuffer.desc_ring)=0\n\
    OFFSET(printk_ringbuffer.text_data_ring)=48\nOFFSET(prb_desc_ring.count_bits)=0\nOFFSET(prb_desc_ring.descs)=8\n\
    OFFSET(prb_desc_ring.infos)=16\nOFFSET(prb_desc_ring.head_id)=24\nOFFSET(prb_desc_ring.tail_id)=32\nSIZE(prb_desc)=24\n\
    OFFSET(prb_desc.state_var)=0\nOFFSET(prb_desc.text_blk_lpos)=8\nOFFSET(prb_data_blk_lpos.begin)=0\n\
    OFFSET(prb_data_blk_lpos.next)=8\nSIZE(printk_info)=88\nOFFSET(printk_info.ts_nsec)=8\n\
    OFFSET(printk_info.text_len)=16\nOFFSET(prb_data_ring.size_bits)=0\nOFFSET(prb_data_ring.data)=8\n\
    OFFSET(atomic_long_t.counter)=0\n";
/// VMCOREINFO of kernels before 5.10.
const OLD_TEXT: &str = "OSRELEASE=5.4.0\nNUMBER(phys_base)=1048576\nSYMBOL(swapper_pg_dir)=ffffffff80000000\n\
    SYMBOL(_stext)=ffffffff80000000\nSYMBOL(log_buf)=ffffffff80014000\nSYMBOL(log_buf_len)=ffffffff80014008\n\
    SYMBOL(log_first_idx)=ffffffff8001400c\nSYMBOL(log_next_idx)=ffffffff80014010\nSIZE(printk_log)=16\n\
    OFFSET(printk_log.ts_nsec)=0\nOFFSET(printk_log.len)=8\nOFFSET(printk_log.text_len)=10\n";

fn put(ram: &GuestRam, at: u64, numbers: &[u64]) {
    let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    ram.write(PHYS + at, &bytes).unwrap();
}

fn guest(note: &str) -> GuestRam {
    let ram = GuestRam::anonymous(8 << 20);
    ram.write(NOTE, &[11u32, note.len() as u32, 0].map(u32::to_le_bytes).concat()).unwrap();
    ram.write(NOTE + 12, b"VMCOREINFO\0\0").unwrap();
    ram.write(NOTE + 24, note.as_bytes()).unwrap();
    put(&ram, 511 * 8, &[(PHYS + 0x1000) | 3]);
    put(&ram, 0x1000 + 510 * 8, &[(PHYS + 0x2000) | 3]);
    put(&ram, 0x2000, &[(PHYS + 0x3000) | 3]);
    (0..512).for_each(|page| put(&ram, 0x3000 + page * 8, &[(PHYS + page * 4096) | 3]));
    put(&ram, PRB, &[IMAGE + RING]);
    put(&ram, RING, &[3, IMAGE + DESCS, IMAGE + INFOS, 1, 0, 0, 8, IMAGE + DATA]);
    for n in 0..2u64 {
        put(&ram, DESCS + n * 24, &[n | 2 << 62, n * 16, n * 16 + 16]);
        put(&ram, INFOS + n * 88, &[n, 1_000_000 * n, 5]);
        put(&ram, DATA + n * 16, &[n, u64::from_le_bytes(*b"text\nabc")]);
    }
    put(&ram, OLD, &[IMAGE + OLD + 0x100, 64 | 0 << 32, 48]);
    for n in 0..2u64 {
        put(&ram, OLD + 0x100 + n * 24, &[1_000_000 * n, 24 | 5 << 16, u64::from_le_bytes(*b"text\nabc")]);
    }
    ram
}

fn run(data: &[u8]) -> Result<()> {
    let mut bytes = Unstructured::new(data);
    let ram = guest(if bytes.arbitrary()? { TEXT } else { OLD_TEXT });
    for _ in 0..bytes.int_in_range(0..=12u8)? {
        let (at, len) = match bytes.int_in_range(0..=4u8)? {
            0 => (NOTE, 2048),
            1 => (PHYS, 0x4000),
            2 => (PHYS + PRB, 0x200),
            3 => (PHYS + DESCS, 0x3000),
            _ => (PHYS + OLD, 0x200),
        };
        let at = at + bytes.int_in_range(0..=len - 8)?;
        match bytes.arbitrary()? {
            true => ram.write_obj(at, bytes.arbitrary::<u8>()?).unwrap(),
            false => ram.write_obj(at, bytes.arbitrary::<u64>()?).unwrap(),
        }
    }
    let mut cpu = CpuState::default();
    (cpu.regs.rip, cpu.sregs.cs.base) = (bytes.arbitrary()?, bytes.arbitrary()?);
    let cpus = [cpu];
    let remains =
        Remains { ram: &ram, cpus: &cpus, transcript: None, console_shown: bytes.arbitrary()?, panicked: false };
    let dir = bytes.ratio(1, 8)?.then(|| tempfile::tempdir_in("/dev/shm").unwrap());
    let core = dir.as_ref().map(|dir| OutputFile::private(&dir.path().join("core")).unwrap());
    let found = remains.look(core.as_ref(), || false);
    assert!(found.kernel_log.len() <= 1000 && found.kernel_log.iter().all(|line| !line.contains(char::is_control)));
    let _ = (found.text(true), found.text(false));
    Ok(())
}

fuzz_target!(|data: &[u8]| {
    let _ = run(data);
});
