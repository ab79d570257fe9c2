//! The power button: an interrupt of the generic event device, which the DSDT turns into a notification.

use crate::irq::IrqLine;

/// Power button. A guest that listens (Linux: `button`, `evdev` and an init that acts) shuts down when it is pressed.
/// Nothing can be read back, so it is unknown whether the guest listens.
pub struct PowerButton {
    irq: IrqLine,
}

impl PowerButton {
    /// Creates a button on the line that belongs to [`crate::layout::GED_GSI`].
    pub fn new(irq: IrqLine) -> Self {
        PowerButton { irq }
    }

    /// Presses and releases the button.
    pub fn press(&self) {
        self.irq.trigger();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout;

    #[test]
    fn pressing_raises_the_interrupt() {
        let irq = IrqLine::new(layout::GED_GSI).unwrap();
        PowerButton::new(irq.clone()).press();
        assert_eq!(irq.take_count(), 1);
    }
}
