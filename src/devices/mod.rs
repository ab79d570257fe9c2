//! Legacy devices, one file each. Guest writes to them become [`crate::guest_event::GuestEvent`]s.

pub mod debug_exit;
pub mod fw_cfg;
pub mod i8042;
pub mod power;
pub mod power_button;
pub mod pm_timer;
pub mod pvpanic;
pub mod rtc;
pub mod serial;
pub mod testdev;
