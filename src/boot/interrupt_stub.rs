//! Real-mode interrupt vectors, with handlers that acknowledge the interrupt and return, for multiboot kernels: they
//! may return to real mode and rely on the timer and the interrupt controllers as a BIOS leaves them.

use super::table::{self, Error};
use crate::layout;
use crate::memory::GuestRam;

const SEGMENT: u16 = (layout::INTERRUPT_STUB >> 4 & 0xF000) as u16;
const OFFSET: u16 = (layout::INTERRUPT_STUB & 0xFFFF) as u16;

#[rustfmt::skip]
const HANDLERS: [u8; 14] = [
    // Both interrupt controllers
    0x50,           // push ax
    0xB0, 0x20,     // mov al, 0x20: end of interrupt
    0xE6, 0xA0,     // out 0xA0, al
    0xEB, 0x03,     // jmp to the other one's
    // The first controller, 7 bytes from the beginning
    0x50,           // push ax
    0xB0, 0x20,     // mov al, 0x20
    0xE6, 0x20,     // out 0x20, al
    0x58,           // pop ax
    0xCF,           // iret: 13 bytes from the beginning
];
const SECOND: u16 = OFFSET;
const FIRST: u16 = OFFSET + 7;
const RETURN: u16 = OFFSET + 13;

/// Writes the vectors and the handlers.
pub fn write(ram: &GuestRam) -> Result<(), Error> {
    table::place(ram, "interrupt stub", &HANDLERS, layout::INTERRUPT_STUB, layout::INTERRUPT_STUB_END)?;
    let vectors = (0u16..256).flat_map(|vector| {
        let offset = match vector {
            0x08..=0x0F => FIRST,
            0x70..=0x77 => SECOND,
            _ => RETURN,
        };
        [offset, SEGMENT].map(u16::to_le_bytes).into_iter().flatten()
    });
    let vectors: Vec<u8> = vectors.collect();
    Ok(ram.write(layout::INTERRUPT_VECTORS, &vectors)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_vector_leads_to_a_handler_of_its_kind() {
        let ram = GuestRam::anonymous(0x10_0000);
        write(&ram).unwrap();
        let handler = |vector: u64| {
            let [offset, segment]: [u16; 2] = ram.read_obj(vector * 4).unwrap();
            let at = u64::from(segment) * 16 + u64::from(offset);
            assert!((layout::INTERRUPT_STUB..layout::INTERRUPT_STUB_END).contains(&at), "{vector:#x}: {at:#x}");
            ram.read_obj::<[u8; 14]>(at).unwrap()
        };
        for vector in 0..256 {
            let found = handler(vector);
            match vector {
                0x08..=0x0F => assert_eq!(found[..7], [0x50, 0xB0, 0x20, 0xE6, 0x20, 0x58, 0xCF]),
                0x70..=0x77 => {
                    assert_eq!(found[..7], [0x50, 0xB0, 0x20, 0xE6, 0xA0, 0xEB, 0x03]);
                    // The jump skips three bytes: the other handler's push and mov.
                    assert_eq!(found[10..14], [0xE6, 0x20, 0x58, 0xCF]);
                }
                _ => assert_eq!(found[0], 0xCF),
            }
        }
    }
}
