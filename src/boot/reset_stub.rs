//! Stub in the sixteen bytes at the real-mode reset vector. On a hardware-reduced machine, a plain `reboot` of Linux
//! uses neither the reset register nor the keyboard controller but jumps to FFFF:0000, where a PC has its firmware.

use super::table::{self, Error};
use crate::layout;
use crate::memory::GuestRam;

const PORT: [u8; 2] = layout::RESET_PORT.to_le_bytes();

#[rustfmt::skip]
const STUB: [u8; 10] = [
    0xFA,                       // cli
    0xBA, PORT[0], PORT[1],     // mov dx, RESET_PORT
    0xB0, layout::RESET_VALUE,  // mov al, RESET_VALUE
    0xEE,                       // out dx, al
    0xF4,                       // hlt
    0xEB, 0xFD,                 // jmp back to hlt
];

/// Writes the stub to [`layout::RESET_STUB`].
pub fn write(ram: &GuestRam) -> Result<(), Error> {
    table::place(ram, "reset stub", &STUB, layout::RESET_STUB, layout::RESET_STUB_END)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stub_lies_at_the_reset_vector() {
        let ram = GuestRam::anonymous(0x10_0000);
        write(&ram).unwrap();
        assert_eq!(ram.read_obj::<u32>(0xF_FFF0).unwrap(), u32::from_le_bytes([0xFA, 0xBA, 0x02, 0x06]));
    }
}
