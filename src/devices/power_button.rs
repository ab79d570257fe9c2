//! The power button: an interrupt of the generic event device, which the DSDT turns into a notification.

use crate::irq::IrqLine;

/// The power button. A guest that listens (Linux: `button`, `evdev` and an init that acts) shuts down when it is
/// pressed; there is nothing to read back, so whether it listens cannot be known.
pub struct PowerButton {
    irq: IrqLine,
}

impl PowerButton {
    /// A button on the line that belongs to [`crate::layout::GED_GSI`].
    pub fn new(irq: IrqLine) -> Self {
        PowerButton { irq }
    }

    /// Presses and releases it.
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
