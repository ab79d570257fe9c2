//! State that the host and the device's worker share, and the host's side of a port.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::{ConsoleState, DUE_SIZE};
use crate::backend::console::Receiver;
use crate::backend::console_watch::ConsoleWatch;
use crate::backend::output::Output;
use crate::guest_event::GuestEvents;
use crate::log_limit::LogLimit;

/// Maximum bytes of input that wait here for the guest: 64 KiB.
pub(super) const INPUT_LIMIT: usize = 64 << 10;

pub(super) struct Shared {
    pub(super) ports: Vec<Port>,
    /// Wakes the worker when the host's side of a port has changed.
    pub(super) wake: EventFd,
    pub(super) events: GuestEvents,
    /// Columns and rows of the console's window; 0 while unknown.
    pub(super) size: Mutex<(u16, u16)>,
    pub(super) state: Mutex<ConsoleState>,
    pub(super) log: LogLimit,
}

pub(super) struct Port {
    pub(super) name: Option<String>,
    pub(super) output: Output,
    pub(super) input: Mutex<Input>,
    /// Watches the console's output.
    pub(super) watch: Mutex<ConsoleWatch>,
}

#[derive(Default)]
pub(super) struct Input {
    pub(super) bytes: VecDeque<u8>,
    /// Set if the host has more input.
    pub(super) room_wanted: bool,
    pub(super) connected: bool,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Host's side of a port.
pub struct HostPort {
    pub(super) shared: Arc<Shared>,
    pub(super) port: usize,
}

impl HostPort {
    /// Changes the input side, and wakes the worker if `change` asks for that.
    fn change<T>(&self, change: impl FnOnce(&mut Input) -> (T, bool)) -> Option<T> {
        let (result, wake) = change(&mut lock(&self.shared.ports.get(self.port)?.input));
        if wake {
            let _ = self.shared.wake.write(1);
        }
        Some(result)
    }
}

impl Receiver for HostPort {
    fn receive(&self, bytes: &[u8]) -> usize {
        let receive = |input: &mut Input| {
            let room = INPUT_LIMIT.saturating_sub(input.bytes.len()).min(bytes.len());
            input.bytes.extend(bytes.iter().take(room));
            input.room_wanted = room < bytes.len();
            (room, room > 0)
        };
        self.change(receive).unwrap_or(bytes.len())
    }

    /// Sets whether somebody is connected at the host's side. A port whose output has failed counts as disconnected;
    /// its closing notifies a writer in the guest (5.3.6.2). The console continues without a reader.
    fn connected(&self, connected: bool) {
        let gone = |port: &Port| port.name.is_some() && port.output.has_failed();
        let connected = connected && !self.shared.ports.get(self.port).is_some_and(gone);
        self.change(|input| ((), std::mem::replace(&mut input.connected, connected) != connected));
    }

    fn resize(&self, columns: u16, rows: u16) {
        if self.shared.ports.get(self.port).is_some_and(|port| port.name.is_none()) {
            let old = std::mem::replace(&mut *lock(&self.shared.size), (columns, rows));
            if old != (columns, rows) {
                let mut state = lock(&self.shared.state);
                if let Some(port) = state.ports.get_mut(self.port).filter(|port| port.ready) {
                    port.due |= DUE_SIZE;
                }
                drop(state);
                let _ = self.shared.wake.write(1);
            }
        }
    }
}
