//! Legacy devices, one file each. What a guest writes to them becomes a [`crate::event::GuestEvent`].

pub mod i8042;
pub mod power;
pub mod power_button;
pub mod pvpanic;
pub mod serial;
