//! Registers as gdb knows them: one table defines their order, names and types. The description for gdb, the bytes of a
//! `g` packet, and the effect of a `G` packet follow from it.

use std::fmt::Write;
use std::sync::LazyLock;

use gdbstub::arch::Arch;

use crate::kvm::debug::Registers;

/// x86-64 as a whole machine: the registers of programs, the bases of FS and GS, control registers.
pub enum X86 {}

impl Arch for X86 {
    type Usize = u64;
    type Registers = Block;
    type RegId = ();
    type BreakpointKind = usize;

    fn target_description_xml() -> Option<&'static str> {
        static XML: LazyLock<String> = LazyLock::new(description);
        Some(&XML)
    }
}

/// All registers, in the format of a `g` packet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Block(Vec<u8>);

impl gdbstub::arch::Registers for Block {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        0
    }

    fn gdb_serialize(&self, mut write_byte: impl FnMut(Option<u8>)) {
        self.0.iter().for_each(|byte| write_byte(Some(*byte)));
    }

    fn gdb_deserialize(&mut self, bytes: &[u8]) -> Result<(), ()> {
        self.0 = bytes.to_vec();
        Ok(())
    }
}

impl Block {
    /// Creates a block with the values of `registers`.
    pub fn new(registers: &Registers) -> Self {
        let mut bytes = Vec::new();
        each(&mut registers.clone(), &mut |_, _, _, value| bytes.extend_from_slice(value));
        Block(bytes)
    }

    /// Sets `registers` from the block. Refuses a block of another size, and changed segment selectors: loading a
    /// segment needs more than a selector.
    pub fn store(&self, registers: &mut Registers) -> Option<()> {
        let mut wanted = registers.clone();
        let mut rest = &self.0[..];
        let mut fits = true;
        each(&mut wanted, &mut |_, _, _, value| match rest.split_at_checked(value.len()) {
            Some((bytes, behind)) => {
                value.copy_from_slice(bytes);
                rest = behind;
            }
            None => fits = false,
        });
        let selectors = |r: &Registers| {
            let s = &r.special;
            [&s.cs, &s.ss, &s.ds, &s.es, &s.fs, &s.gs].map(|segment| segment.selector)
        };
        if !fits || !rest.is_empty() || selectors(&wanted) != selectors(registers) {
            return None;
        }
        *registers = wanted;
        Some(())
    }
}

/// Function that is called for each register: with its feature, name and type, and its value, which the function may
/// change.
type Visitor<'a> = dyn FnMut(&'static str, &str, &str, &mut [u8]) + 'a;

const CORE: &str = "org.gnu.gdb.i386.core";
const SSE: &str = "org.gnu.gdb.i386.sse";
const SEGMENTS: &str = "org.gnu.gdb.i386.segments";
const CONTROL: &str = "org.vireo.control";

/// Calls `visit` for all registers in gdb's order (gdb/features/i386/64bit-*.xml); gdb's register numbers are positions
/// in it.
#[inline(never)]
fn each(r: &mut Registers, visit: &mut Visitor) {
    let (g, s, x) = (&mut r.general, &mut r.special, &mut r.float);
    let general = [
        ("rax", &mut g.rax),
        ("rbx", &mut g.rbx),
        ("rcx", &mut g.rcx),
        ("rdx", &mut g.rdx),
        ("rsi", &mut g.rsi),
        ("rdi", &mut g.rdi),
        ("rbp", &mut g.rbp),
        ("rsp", &mut g.rsp),
        ("r8", &mut g.r8),
        ("r9", &mut g.r9),
        ("r10", &mut g.r10),
        ("r11", &mut g.r11),
        ("r12", &mut g.r12),
        ("r13", &mut g.r13),
        ("r14", &mut g.r14),
        ("r15", &mut g.r15),
        ("rip", &mut g.rip),
    ];
    for (name, value) in general {
        let kind = match name {
            "rbp" | "rsp" => "data_ptr",
            "rip" => "code_ptr",
            _ => "int64",
        };
        wide(visit, (CORE, name, kind), value);
    }
    half(visit, "eflags", "i386_eflags", &mut g.rflags, 0);
    let segments = [
        ("cs", &mut s.cs),
        ("ss", &mut s.ss),
        ("ds", &mut s.ds),
        ("es", &mut s.es),
        ("fs", &mut s.fs),
        ("gs", &mut s.gs),
    ];
    for (name, segment) in segments {
        short(visit, name, &mut segment.selector);
    }
    for (value, name) in x.fpr.iter_mut().zip(["st0", "st1", "st2", "st3", "st4", "st5", "st6", "st7"]) {
        visit(CORE, name, "i387_ext", &mut value[..10]);
    }
    short(visit, "fctrl", &mut x.fcw);
    short(visit, "fstat", &mut x.fsw);
    let mut tags = full_tags(x.ftwx);
    short(visit, "ftag", &mut tags);
    x.ftwx = short_tags(tags);
    half(visit, "fiseg", "int", &mut x.last_ip, 32);
    half(visit, "fioff", "int", &mut x.last_ip, 0);
    half(visit, "foseg", "int", &mut x.last_dp, 32);
    half(visit, "fooff", "int", &mut x.last_dp, 0);
    short(visit, "fop", &mut x.last_opcode);
    for (i, value) in x.xmm.iter_mut().enumerate() {
        visit(SSE, &format!("xmm{i}"), "vec128", value);
    }
    let mut mxcsr = x.mxcsr.to_le_bytes();
    visit(SSE, "mxcsr", "int", &mut mxcsr);
    x.mxcsr = u32::from_le_bytes(mxcsr);
    let bases = [("fs_base", &mut s.fs.base), ("gs_base", &mut s.gs.base)];
    bases.into_iter().for_each(|(name, value)| wide(visit, (SEGMENTS, name, "int64"), value));
    let control = [
        ("cr0", &mut s.cr0),
        ("cr2", &mut s.cr2),
        ("cr3", &mut s.cr3),
        ("cr4", &mut s.cr4),
        ("cr8", &mut s.cr8),
        ("efer", &mut s.efer),
    ];
    control.into_iter().for_each(|(name, value)| wide(visit, (CONTROL, name, "int64"), value));
}

#[inline(never)]
fn wide(visit: &mut Visitor, (feature, name, kind): (&'static str, &str, &str), value: &mut u64) {
    let mut bytes = value.to_le_bytes();
    visit(feature, name, kind, &mut bytes);
    *value = u64::from_le_bytes(bytes);
}

/// Visits 32 bits of `value`, from bit `shift` on.
#[inline(never)]
fn half(visit: &mut Visitor, name: &str, kind: &str, value: &mut u64, shift: u32) {
    let mut bytes = ((*value >> shift) as u32).to_le_bytes();
    visit(CORE, name, kind, &mut bytes);
    *value = *value & !(u64::from(u32::MAX) << shift) | u64::from(u32::from_le_bytes(bytes)) << shift;
}

/// Visits a 16-bit register, which gdb stores in 32 bits.
#[inline(never)]
fn short(visit: &mut Visitor, name: &str, value: &mut u16) {
    let mut bytes = u32::from(*value).to_le_bytes();
    visit(CORE, name, "int", &mut bytes);
    *value = u32::from_le_bytes(bytes) as u16;
}

/// Converts the tags of FXSAVE to the full tag word, which has two bits for each register, 3 for an empty one; FXSAVE
/// stores one bit, 0 for an empty register.
fn full_tags(short: u8) -> u16 {
    (0..8).filter(|i| short >> i & 1 == 0).map(|i| 3 << (2 * i)).sum()
}

fn short_tags(full: u16) -> u8 {
    (0..8).filter(|i| full >> (2 * i) & 3 != 3).map(|i| 1 << i).sum()
}

/// Definitions of types that gdb needs before their use.
const TYPES: [(&str, &str); 2] = [
    (
        CORE,
        r#"<flags id="i386_eflags" size="4"><field name="CF" start="0" end="0"/><field name="" start="1" end="1"/><field name="PF" start="2" end="2"/><field name="AF" start="4" end="4"/><field name="ZF" start="6" end="6"/><field name="SF" start="7" end="7"/><field name="TF" start="8" end="8"/><field name="IF" start="9" end="9"/><field name="DF" start="10" end="10"/><field name="OF" start="11" end="11"/><field name="NT" start="14" end="14"/><field name="RF" start="16" end="16"/><field name="VM" start="17" end="17"/><field name="AC" start="18" end="18"/><field name="VIF" start="19" end="19"/><field name="VIP" start="20" end="20"/><field name="ID" start="21" end="21"/></flags>"#,
    ),
    (
        SSE,
        r#"<vector id="v4f" type="ieee_single" count="4"/><vector id="v2d" type="ieee_double" count="2"/><vector id="v16i8" type="int8" count="16"/><vector id="v8i16" type="int16" count="8"/><vector id="v4i32" type="int32" count="4"/><vector id="v2i64" type="int64" count="2"/><union id="vec128"><field name="v4_float" type="v4f"/><field name="v2_double" type="v2d"/><field name="v16_int8" type="v16i8"/><field name="v8_int16" type="v8i16"/><field name="v4_int32" type="v4i32"/><field name="v2_int64" type="v2i64"/><field name="uint128" type="uint128"/></union>"#,
    ),
];

fn description() -> String {
    let mut xml = String::from(
        r#"<?xml version="1.0"?><!DOCTYPE target SYSTEM "gdb-target.dtd"><target version="1.0"><architecture>i386:x86-64</architecture>"#,
    );
    let mut open = "";
    each(&mut Registers::default(), &mut |feature, name, kind, value| {
        if feature != open {
            xml += if open.is_empty() { "" } else { "</feature>" };
            let _ = write!(xml, r#"<feature name="{feature}">"#);
            TYPES.iter().filter(|(of, _)| *of == feature).for_each(|(_, types)| xml += types);
            open = feature;
        }
        let _ = write!(xml, r#"<reg name="{name}" bitsize="{}" type="{kind}"/>"#, value.len() * 8);
    });
    xml + "</feature></target>"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_register_makes_the_round_trip() {
        let mut registers = Registers::default();
        let mut next = 0u8;
        // At most 127 per byte, so that 16-bit registers, which gdb stores in 32 bits, do not overflow.
        each(&mut registers, &mut |_, _, _, value| {
            for byte in value.iter_mut().take(2) {
                *byte = next & 0x7F;
                next = next.wrapping_add(1);
            }
        });
        let block = Block::new(&registers);
        let mut copy = Registers::default();
        assert_eq!(block.store(&mut copy), None, "other segments");
        let (to, from) = (&mut copy.special, &registers.special);
        [to.cs.selector, to.ss.selector, to.ds.selector] = [from.cs.selector, from.ss.selector, from.ds.selector];
        [to.es.selector, to.fs.selector, to.gs.selector] = [from.es.selector, from.fs.selector, from.gs.selector];
        assert_eq!(block.store(&mut copy), Some(()));
        assert_eq!(copy, registers);
        for wrong in [&block.0[1..], &[&block.0[..], &[0]].concat(), &[]] {
            assert_eq!(Block(wrong.to_vec()).store(&mut copy), None);
        }
        // 17 registers of 8 bytes, 7 of 4; 8 of 10, 8 of 4; 16 of 16 and one of 4; 2 and 6 of 8.
        assert_eq!(block.0.len(), 17 * 8 + 7 * 4 + 8 * 10 + 8 * 4 + 16 * 16 + 4 + 8 * 8);
    }

    #[test]
    fn tags_are_translated() {
        assert_eq!((full_tags(0), full_tags(0xFF), full_tags(0b1000_0001)), (0xFFFF, 0, 0x3FFC));
        (0..=255).for_each(|tags| assert_eq!(short_tags(full_tags(tags)), tags));
    }

    #[test]
    fn the_description_has_all_features_and_each_register_once() {
        let xml = X86::target_description_xml().unwrap();
        assert_eq!(xml.matches("<feature ").count(), 4);
        assert_eq!(xml.matches("</feature>").count(), 4);
        for name in ["rax", "rip", "eflags", "gs", "st7", "fop", "xmm15", "mxcsr", "gs_base", "cr3", "efer"] {
            assert_eq!(xml.matches(&format!(r#"<reg name="{name}" "#)).count(), 1, "{name}");
        }
    }
}
