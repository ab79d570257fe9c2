//! Console device (5.3): a console (`hvc0`) and binary ports, each with a receive and a transmit queue.
//!
//! ```text
//! host ──▶ machine loop ──▶ HostPort (64 KiB) ──▶ receive queue      control queues: which ports exist, their
//! host ◀── Output (64 KiB, its own thread) ◀── transmit queue        names, whether they are open
//! ```
//!
//! Nothing here waits: a port whose buffer is full leaves its queue alone until there is room, and the other ports are
//! not affected. Input for a port that is not open in the guest stays with the host.

mod config;
mod host;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use super::chain::Chain;
use super::queue::BATCH;
use super::{
    Activated, Activation, Context, DeviceId, DeviceInfo, Event, Fault, Handler, Progress, RING_FEATURES, Share,
    StateError, VirtioDevice, queue::Queue,
};
use crate::backend::console_watch::ConsoleWatch;
use crate::backend::output::{self, Output};
use crate::event::{Interest, eventfd};
use crate::guest_event::{GuestEvent, GuestEvents};
use crate::log_limit::LogLimit;
use crate::memory::GuestRam;
pub use config::PortConfig;
pub use host::HostPort;
use host::{INPUT_LIMIT, Port, Shared, lock};

/// Feature bits (5.3.3).
const F_SIZE: u64 = 1 << 0;
const F_MULTIPORT: u64 = 1 << 1;

/// Control messages (5.3.6.2).
const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const RESIZE: u16 = 5;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// Messages that a port may have due, in the order in which they are sent. One bit each, so repeated requests of a
/// driver need no more memory. The name comes last: a program that finds a port by its name finds everything else
/// known.
const DUE: [(u8, u16); 5] = [
    (DUE_ADD, PORT_ADD),
    (DUE_CONSOLE, CONSOLE_PORT),
    (DUE_SIZE, RESIZE),
    (DUE_OPEN, PORT_OPEN),
    (DUE_NAME, PORT_NAME),
];
const DUE_ADD: u8 = 1 << 0;
const DUE_CONSOLE: u8 = 1 << 1;
const DUE_SIZE: u8 = 1 << 2;
const DUE_NAME: u8 = 1 << 3;
const DUE_OPEN: u8 = 1 << 4;

const QUEUE_SIZE: u16 = 64;
/// Size of a control message's fixed part in bytes: port, event, value.
const CONTROL: usize = 8;
/// Maximum length of a single write. Linux writes up to 64 KiB.
const MAX_WRITE: u64 = 1 << 20;
/// Bytes of output that may wait for a slow reader once the device stops: 16 MiB, more than Linux has in a ring.
const DRAIN_LIMIT: usize = 16 << 20;
/// Maximum number of ports of a device, including the console.
pub const MAX_PORTS: usize = 32;
const WAKE: u64 = 0;
const ROOM: u64 = 1;

/// Port to be created.
pub struct NewPort {
    /// Name of the port; the console has none.
    pub name: Option<String>,
    /// Destination of what the guest writes.
    pub output: Output,
}

/// Saved state of a console device: what the driver knows of its ports. Bytes in transit are not saved; they are the
/// host's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleState {
    ports: Vec<PortState>,
}

/// State of a port that the driver knows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PortState {
    /// Set once the driver has set the port up.
    ready: bool,
    /// Set while somebody in the guest has the port open.
    open: bool,
    /// Last connection state of the host's side that the driver was notified of.
    connected: bool,
    /// Messages that are due: see [`DUE`].
    due: u8,
}

/// Console device.
pub struct Console {
    info: DeviceInfo,
    shared: Arc<Shared>,
}

impl Console {
    /// Creates a device with these ports, at most [`MAX_PORTS`]; a driver that knows only one port uses the first.
    /// `events` receives what the console's text reveals, and news of room for more input.
    pub fn new(name: impl Into<String>, ports: Vec<NewPort>, events: &GuestEvents) -> io::Result<Self> {
        let count = ports.len().clamp(1, MAX_PORTS);
        let features = RING_FEATURES | F_SIZE | F_MULTIPORT;
        // 5.3.2: two queues for the first port, two for control messages, two for each other port.
        let queue_sizes = vec![QUEUE_SIZE; 2 * count + 2];
        let make = |NewPort { name, output }| Port {
            name,
            output,
            input: Mutex::default(),
            watch: Mutex::new(ConsoleWatch::new(events.clone())),
        };
        let ports: Vec<Port> = ports.into_iter().take(MAX_PORTS).map(make).collect();
        let state = Mutex::new(ConsoleState { ports: vec![PortState::default(); ports.len()] });
        let (wake, log) = (eventfd()?, LogLimit::default());
        let shared = Shared { ports, wake, events: events.clone(), size: Mutex::default(), state, log };
        let info =
            DeviceInfo { id: DeviceId::Console, name: name.into(), features, queue_sizes, shared_memory: vec![] };
        Ok(Console { info, shared: Arc::new(shared) })
    }

    /// Returns the host's side of each port, in order.
    pub fn host_ports(&self) -> Vec<HostPort> {
        (0..self.shared.ports.len()).map(|port| HostPort { shared: self.shared.clone(), port }).collect()
    }
}

impl VirtioDevice for Console {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// `struct virtio_console_config` (5.3.4): `cols`, `rows`, `max_nr_ports`.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let (columns, rows) = *lock(&self.shared.size);
        let (c, r) = (columns.to_le_bytes(), rows.to_le_bytes());
        let n = (self.shared.ports.len() as u32).to_le_bytes();
        super::read_config_bytes(&[c[0], c[1], r[0], r[1], n[0], n[1], n[2], n[3]], offset, data);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<Activated> {
        let multiport = activation.features & F_MULTIPORT != 0;
        let size = *lock(&self.shared.size);
        let handler = Ports { shared: self.shared.clone(), multiport, told_size: size, buffer: Vec::new() };
        Ok(Activated::Here(vec![Share { queues: activation.queues, handler: Box::new(handler) }]))
    }

    fn reset(&mut self) {
        lock(&self.shared.state).ports.fill(PortState::default());
    }

    fn save(&self) -> Result<serde_json::Value, StateError> {
        serde_json::to_value(&*lock(&self.shared.state)).map_err(|e| StateError(e.to_string()))
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<(), StateError> {
        let name = &self.info.name;
        let saved = ConsoleState::deserialize(state)
            .map_err(|e| StateError(format!("the saved state of {name} is broken: {e}")))?;
        let (now, then) = (self.shared.ports.len(), saved.ports.len());
        if now != then {
            return Err(StateError(format!("{name} has {now} ports and had {then} when it was saved")));
        }
        *lock(&self.shared.state) = saved;
        Ok(())
    }
}

/// Purpose of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Receive(usize),
    Transmit(usize),
    ControlReceive,
    ControlTransmit,
}

impl Role {
    /// Returns the role of a queue, by its index (5.3.2).
    fn of(queue: usize) -> Role {
        match (queue, queue % 2) {
            (0, _) => Role::Receive(0),
            (1, _) => Role::Transmit(0),
            (2, _) => Role::ControlReceive,
            (3, _) => Role::ControlTransmit,
            (_, 0) => Role::Receive(queue / 2 - 1),
            _ => Role::Transmit(queue / 2 - 1),
        }
    }

    fn queue(self) -> usize {
        match self {
            Role::Receive(0) => 0,
            Role::Transmit(0) => 1,
            Role::ControlReceive => 2,
            Role::ControlTransmit => 3,
            Role::Receive(port) => 2 * port + 2,
            Role::Transmit(port) => 2 * port + 3,
        }
    }
}

/// Handler of all queues.
struct Ports {
    shared: Arc<Shared>,
    multiport: bool,
    /// Window size that a driver without control queues was last notified of.
    told_size: (u16, u16),
    /// Memory to reuse.
    buffer: Vec<u8>,
}

impl Handler for Ports {
    fn event(&mut self, event: Event, queues: &mut [Queue], cx: &Context<'_>) -> Result<Progress, Fault> {
        match event {
            Event::Start => {
                cx.watch(self.shared.wake.as_raw_fd(), WAKE, Interest::Read)?;
                for (port, token) in self.shared.ports.iter().zip(ROOM..) {
                    cx.watch(port.output.room().as_raw_fd(), token, Interest::Read)?;
                }
                self.host_changed(queues, cx)
            }
            Event::Kick(queue) => match Role::of(queue) {
                Role::Receive(port) => {
                    let progress = self.feed(port, queues, cx.ram)?;
                    self.tell_end(port, queues, cx.ram)?;
                    Ok(progress)
                }
                Role::Transmit(port) => self.transmit(port, output::LIMIT, queues, cx.ram),
                Role::ControlReceive => self.send_control(queues, cx.ram),
                Role::ControlTransmit => self.receive_control(queues, cx.ram),
            },
            Event::Ready(WAKE) => {
                let _ = self.shared.wake.read();
                self.host_changed(queues, cx)
            }
            Event::Ready(token) => {
                let port = usize::try_from(token - ROOM).unwrap_or(usize::MAX);
                let _ = self.shared.ports.get(port).map(|port| port.output.room().read());
                self.transmit(port, output::LIMIT, queues, cx.ram)
            }
        }
    }

    /// Empties the transmit rings, even without room for their contents: what the guest has written counts as sent, and
    /// a guest that ends does not wait until the host has it.
    fn drain(&mut self, queues: &mut [Queue], cx: &Context<'_>) -> Result<Progress, Fault> {
        for port in 0..self.shared.ports.len() {
            // Twice the size of a ring: a guest that keeps adding is not waited for.
            for _ in 0..2 {
                if self.transmit(port, DRAIN_LIMIT, queues, cx.ram)? == Progress::Done {
                    break;
                }
            }
        }
        Ok(Progress::Done)
    }
}

impl Ports {
    /// Returns whether input may be sent to a port: a driver throws away what comes too early (5.3.6.1).
    fn is_open(&self, port: usize) -> bool {
        if !self.multiport {
            return port == 0;
        }
        let state = lock(&self.shared.state);
        let is_console = self.shared.ports.get(port).is_some_and(|port| port.name.is_none());
        state.ports.get(port).is_some_and(|port| port.ready && (port.open || is_console))
    }

    /// Handles news from the host: input, a connection or disconnection, or another window size.
    fn host_changed(&mut self, queues: &mut [Queue], cx: &Context<'_>) -> Result<Progress, Fault> {
        let size = *lock(&self.shared.size);
        if !self.multiport && std::mem::replace(&mut self.told_size, size) != size {
            cx.interrupt.config_changed();
        }
        let mut progress = Progress::Done;
        for port in 0..self.shared.ports.len() {
            if self.feed(port, queues, cx.ram)? == Progress::More {
                progress = Progress::More;
            }
        }
        match self.send_control(queues, cx.ram)? {
            Progress::Done => Ok(progress),
            Progress::More => Ok(Progress::More),
        }
    }

    /// Moves input to the guest as far as the guest has buffers for it.
    fn feed(&mut self, index: usize, queues: &mut [Queue], ram: &GuestRam) -> Result<Progress, Fault> {
        let queue = queues.get_mut(Role::Receive(index).queue());
        let (Some(port), Some(queue)) = (self.shared.ports.get(index), queue) else { return Ok(Progress::Done) };
        if !self.is_open(index) {
            return Ok(Progress::Done);
        }
        let mut input = lock(&port.input);
        let mut progress = Progress::More;
        for _ in 0..BATCH {
            if input.bytes.is_empty() {
                progress = Progress::Done;
                break;
            }
            let Some(chain) = queue.next(ram)? else {
                progress = Progress::Done;
                break;
            };
            let mut writer = chain.writer(ram);
            let bytes = input.bytes.make_contiguous();
            let len = writer.len().min(bytes.len() as u64) as usize;
            writer.write(bytes.get(..len).unwrap_or(&[]))?;
            input.bytes.drain(..len);
            queue.push_used(ram, chain, len as u32)?;
        }
        if input.room_wanted && input.bytes.len() <= INPUT_LIMIT / 2 {
            input.room_wanted = false;
            self.shared.events.post(GuestEvent::ConsoleInputRoom);
        }
        Ok(progress)
    }

    /// Reports a disconnect once the guest has read all remaining input.
    fn tell_end(&mut self, index: usize, queues: &mut [Queue], ram: &GuestRam) -> Result<(), Fault> {
        let Some(port) = self.shared.ports.get(index) else { return Ok(()) };
        let ended = {
            let input = lock(&port.input);
            !input.connected && input.bytes.is_empty()
        };
        let told = lock(&self.shared.state).ports.get(index).is_none_or(|port| !port.connected);
        if ended && !told { self.send_control(queues, ram).map(drop) } else { Ok(()) }
    }

    /// Moves output to the host while no more than `limit` bytes wait there.
    fn transmit(
        &mut self,
        index: usize,
        limit: usize,
        queues: &mut [Queue],
        ram: &GuestRam,
    ) -> Result<Progress, Fault> {
        let queue = queues.get_mut(Role::Transmit(index).queue());
        let (Some(port), Some(queue)) = (self.shared.ports.get(index), queue) else { return Ok(Progress::Done) };
        let mut progress = Progress::More;
        for _ in 0..BATCH {
            // If there is none now, the token of the port's room follows later.
            if !port.output.has_room(limit) {
                progress = Progress::Done;
                break;
            }
            let Some(chain) = queue.next(ram)? else {
                progress = Progress::Done;
                break;
            };
            let mut reader = chain.reader(ram);
            if reader.len() > MAX_WRITE {
                return Err(Fault::Device("a console write is longer than 1 MiB"));
            }
            self.buffer.resize(reader.len() as usize, 0);
            reader.read(&mut self.buffer)?;
            if port.name.is_none() {
                lock(&port.watch).scan(&self.buffer);
            }
            port.output.push(&self.buffer);
            queue.push_used(ram, chain, 0)?;
        }
        port.output.flush();
        Ok(progress)
    }

    /// Handles the driver's control messages (5.3.6.2) and answers them.
    fn receive_control(&mut self, queues: &mut [Queue], ram: &GuestRam) -> Result<Progress, Fault> {
        let Some(queue) = queues.get_mut(Role::ControlTransmit.queue()) else { return Ok(Progress::Done) };
        let progress = queue.serve(ram, |chain| {
            self.hear(chain, ram);
            Ok::<u32, Fault>(0)
        })?;
        for port in 0..self.shared.ports.len() {
            self.feed(port, queues, ram)?;
        }
        self.send_control(queues, ram)?;
        Ok(progress)
    }

    /// Handles one control message. It is ignored if it is too short, of an unknown kind, or for a port that does not
    /// exist.
    fn hear(&self, chain: &Chain, ram: &GuestRam) {
        let mut message = [0; CONTROL];
        if chain.reader(ram).read(&mut message).is_err() {
            return;
        }
        let [p0, p1, p2, p3, e0, e1, v0, v1] = message;
        let (id, event) = (u32::from_le_bytes([p0, p1, p2, p3]), u16::from_le_bytes([e0, e1]));
        let on = [v0, v1] != [0, 0];
        let mut state = lock(&self.shared.state);
        if event == DEVICE_READY {
            state.ports.iter_mut().filter(|_| on).for_each(|port| port.due |= DUE_ADD);
            return;
        }
        let id = usize::try_from(id).unwrap_or(usize::MAX);
        let (Some(port), Some(known)) = (state.ports.get_mut(id), self.shared.ports.get(id)) else { return };
        match event {
            PORT_READY if on => {
                port.ready = true;
                port.connected = lock(&known.input).connected;
                port.due |= if port.connected { DUE_OPEN } else { 0 };
                port.due |= if known.name.is_some() { DUE_NAME } else { DUE_CONSOLE };
                let size_known = *lock(&self.shared.size) != (0, 0);
                port.due |= if known.name.is_none() && size_known { DUE_SIZE } else { 0 };
            }
            PORT_READY => self.shared.log.debug(format_args!("the guest could not set up console port {id}")),
            PORT_OPEN => port.open = on,
            _ => {}
        }
    }

    /// Sends the driver the messages that are due, as far as it has buffers for them.
    fn send_control(&mut self, queues: &mut [Queue], ram: &GuestRam) -> Result<Progress, Fault> {
        let Some(queue) = queues.get_mut(Role::ControlReceive.queue()) else { return Ok(Progress::Done) };
        let mut state = lock(&self.shared.state);
        // Each port has at most a few messages due, so this is bounded.
        for (id, (port, known)) in (0u32..).zip(state.ports.iter_mut().zip(&self.shared.ports)) {
            let input = lock(&known.input);
            // A disconnect is reported only after the last byte of input was delivered.
            if port.ready && port.connected != input.connected && (input.connected || input.bytes.is_empty()) {
                port.connected = input.connected;
                port.due |= DUE_OPEN;
            }
            drop(input);
            for (bit, event) in DUE.into_iter().filter(|_| self.multiport) {
                if port.due & bit == 0 {
                    continue;
                }
                let Some(chain) = queue.next(ram)? else { return Ok(Progress::Done) };
                let message = self.message(id, event, port.connected, known);
                let mut writer = chain.writer(ram);
                if writer.len() < message.len() as u64 {
                    return Err(Fault::Device("a buffer for a console control message is too short for it"));
                }
                writer.write(&message)?;
                queue.push_used(ram, chain, message.len() as u32)?;
                port.due &= !bit;
            }
        }
        Ok(Progress::Done)
    }

    fn message(&self, id: u32, event: u16, connected: bool, port: &Port) -> Vec<u8> {
        let value = u16::from(event != PORT_OPEN || connected);
        let mut message = [&id.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat();
        match (event, &port.name) {
            (PORT_NAME, Some(name)) => message.extend(name.bytes()),
            (RESIZE, _) => {
                // The order of 5.3.6.2 and of later releases of Linux 6.1. Earlier Linux expects the rows first.
                let (columns, rows) = *lock(&self.shared.size);
                message.extend([columns.to_le_bytes(), rows.to_le_bytes()].concat());
            }
            _ => {}
        }
        message
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::console::Receiver;
    use crate::backend::output::{Destination, LIMIT};
    use crate::guest_event::PanicSource;
    use crate::irq::IrqLine;
    use crate::virtio::mmio::MmioTransport;
    use crate::virtio::testing::{FakeDriver, FakeQueue, Loopback, inn, out};
    use proptest::prelude::*;
    use std::io::{PipeReader, Read};

    const RAM: u64 = 8 << 20;
    const DATA: u64 = 1 << 20;
    const SIZE: u16 = QUEUE_SIZE;

    struct Setup {
        ram: GuestRam,
        device: Console,
        host: Vec<HostPort>,
        readers: Vec<PipeReader>,
        events: GuestEvents,
        drivers: Vec<FakeQueue>,
        wire: Loopback,
        share: Share,
    }

    fn output() -> (PipeReader, Output) {
        let (reader, writer) = io::pipe().unwrap();
        let output =
            Output::new(Destination { name: "pipe".into(), writer: Box::new(writer), eager: false, told: false })
                .unwrap();
        (reader, output)
    }

    /// Creates a console and two ports, `red` and `blue`.
    fn device(events: &GuestEvents) -> (Console, Vec<PipeReader>) {
        let (readers, outputs): (Vec<_>, Vec<_>) = (0..3).map(|_| output()).unzip();
        let names = [None, Some("red".to_string()), Some("blue".to_string())];
        let ports = names.into_iter().zip(outputs).map(|(name, output)| NewPort { name, output });
        (Console::new("console", ports.collect(), events).unwrap(), readers)
    }

    fn setup(without: u64) -> Setup {
        let ram = GuestRam::anonymous(RAM);
        let events = GuestEvents::new().unwrap();
        let (mut device, readers) = device(&events);
        let count = device.info().queue_sizes.len() as u64;
        let drivers: Vec<_> = (0..count).map(|n| FakeQueue::new(&ram, 0x1000 * (n + 1), SIZE)).collect();
        let (wire, features) = (Loopback::new(&ram), device.info().features & !without);
        let queues = drivers.iter().map(|d| d.device(features)).collect();
        let (ram2, interrupt) = (ram.clone(), wire.interrupt.clone());
        let activation = Activation { ram: ram2, features, queues, kicks: vec![].into(), interrupt };
        let Ok(Activated::Here(mut shares)) = device.activate(activation) else { panic!() };
        let share = shares.remove(0);
        let host = device.host_ports();
        let mut s = Setup { ram, device, host, readers, events, drivers, wire, share };
        s.deliver(Event::Start).unwrap();
        s
    }

    impl Setup {
        fn deliver(&mut self, event: Event) -> Result<(), Fault> {
            self.wire.deliver(&mut *self.share.handler, &mut self.share.queues, event)
        }

        fn add(&mut self, role: Role, bufs: &[crate::virtio::testing::Buf]) -> bool {
            self.drivers[role.queue()].add(bufs).is_some()
        }

        fn kick(&mut self, role: Role) -> Result<(), Fault> {
            self.deliver(Event::Kick(role.queue()))
        }

        /// Sends a control message from the driver.
        fn say(&mut self, id: u32, event: u16, value: u16) {
            self.ram.write_obj(DATA, u64::from(id) | u64::from(event) << 32 | u64::from(value) << 48).unwrap();
            assert!(self.add(Role::ControlTransmit, &[out(DATA, 8)]));
            self.kick(Role::ControlTransmit).unwrap();
            assert_eq!(self.drivers[3].take_used().unwrap().1, 0);
        }

        /// Provides buffers for control messages, and returns the messages that came.
        fn heard(&mut self) -> Vec<(u32, u16, u16, Vec<u8>)> {
            let at = |n: u64| DATA + 0x1000 + 0x100 * n;
            let mut heads = std::collections::HashMap::new();
            while let Some(head) = self.drivers[2].add(&[inn(at(heads.len() as u64), 0x100)]) {
                heads.insert(head, at(heads.len() as u64));
            }
            self.kick(Role::ControlReceive).unwrap();
            let mut messages = vec![];
            while let Some((head, len)) = self.drivers[2].take_used() {
                let mut bytes = vec![0; len as usize];
                // Buffers of earlier rounds lie at the same addresses, in the same order.
                self.ram.read(heads.get(&head).copied().unwrap(), &mut bytes).unwrap();
                let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
                messages.push((u32::from(half(0)), half(4), half(6), bytes[8..].to_vec()));
            }
            // Unused buffers are taken back, for the next round.
            let fresh = FakeQueue::new(&self.ram, 0x3000, SIZE);
            self.share.queues[2] = fresh.device(0);
            self.drivers[2] = fresh;
            messages
        }

        fn open_all(&mut self) {
            self.say(0, DEVICE_READY, 1);
            for port in 0..3 {
                self.say(port, PORT_READY, 1);
                self.say(port, PORT_OPEN, 1);
            }
            self.heard();
        }

        /// Gives a port's receive queue a buffer of `len` bytes and returns the bytes that came in it.
        fn receive(&mut self, port: usize, len: u32) -> Option<Vec<u8>> {
            let role = Role::Receive(port);
            let at = DATA + 0x10_0000 * (port as u64 + 1);
            self.add(role, &[inn(at, len)]);
            self.kick(role).unwrap();
            let (_, len) = self.drivers[role.queue()].take_used()?;
            let mut bytes = vec![0; len as usize];
            self.ram.read(at, &mut bytes).unwrap();
            Some(bytes)
        }

        fn transmit(&mut self, port: usize, bytes: &[u8]) -> Result<bool, Fault> {
            let role = Role::Transmit(port);
            self.ram.write(DATA, bytes).unwrap();
            assert!(self.add(role, &[out(DATA, bytes.len() as u32)]));
            self.kick(role)?;
            Ok(self.drivers[role.queue()].take_used().is_some())
        }
    }

    #[test]
    fn queues_have_their_roles() {
        for queue in 0..64 {
            assert_eq!(Role::of(queue).queue(), queue);
        }
        assert_eq!([4, 5, 6].map(Role::of), [Role::Receive(1), Role::Transmit(1), Role::Receive(2)]);
    }

    #[test]
    fn a_driver_hears_which_ports_there_are() {
        let mut s = setup(0);
        s.host[0].resize(80, 25);
        s.host[0].connected(true);
        assert_eq!(s.heard(), []);
        s.say(0, DEVICE_READY, 1);
        assert_eq!(s.heard(), [0, 1, 2].map(|id| (id, PORT_ADD, 1, vec![])));
        s.say(0, PORT_READY, 1);
        let size = vec![80, 0, 25, 0];
        let console = [(CONSOLE_PORT, vec![]), (RESIZE, size), (PORT_OPEN, vec![])];
        assert_eq!(s.heard(), console.map(|(event, more)| (0, event, 1, more)));
        s.say(2, PORT_READY, 1);
        assert_eq!(s.heard(), [(2, PORT_NAME, 1, b"blue".to_vec())]);
        // Connections, disconnections and changes of the window size.
        s.host[2].connected(true);
        s.host[0].resize(100, 0x123);
        s.host[1].connected(true);
        s.host[1].resize(1, 1);
        s.deliver(Event::Ready(WAKE)).unwrap();
        assert_eq!(s.heard(), [(0, RESIZE, 1, vec![100, 0, 0x23, 1]), (2, PORT_OPEN, 1, vec![])]);
        s.host[2].connected(false);
        assert_eq!(s.heard(), [(2, PORT_OPEN, 0, vec![])]);
    }

    #[test]
    fn a_reader_that_has_gone_is_told_of_but_not_to_the_console() {
        let mut s = setup(0);
        s.open_all();
        (0..2).for_each(|port| s.host[port].connected(true));
        s.deliver(Event::Ready(WAKE)).unwrap();
        assert_eq!(s.heard(), [0, 1].map(|port| (port, PORT_OPEN, 1, vec![])));
        s.readers.clear();
        for port in 0..2 {
            assert!(s.transmit(port, b"nobody").unwrap());
        }
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while !s.device.shared.ports[..2].iter().all(|port| port.output.has_failed()) {
            assert!(std::time::Instant::now() < deadline, "the outputs do not fail");
            std::thread::yield_now();
        }
        (0..2).for_each(|port| s.host[port].connected(true));
        s.deliver(Event::Ready(WAKE)).unwrap();
        assert_eq!(s.heard(), [(1, PORT_OPEN, 0, vec![])]);
        // What is written nevertheless is discarded.
        assert!(s.transmit(1, b"still").unwrap());
    }

    #[test]
    fn a_full_ring_is_emptied_at_the_end_at_once() {
        let mut s = setup(0);
        s.open_all();
        let transmit = Role::Transmit(1);
        while s.add(transmit, &[out(DATA, 16)]) {}
        let poller = crate::event::Poller::new().unwrap();
        let cx = Context::new(&s.ram, &s.wire.interrupt, &poller);
        assert_eq!(s.share.handler.drain(&mut s.share.queues, &cx).unwrap(), Progress::Done);
        let used = std::iter::from_fn(|| s.drivers[transmit.queue()].take_used()).count();
        assert_eq!(used, usize::from(SIZE));
    }

    #[test]
    fn the_end_is_told_with_the_last_byte() {
        let mut s = setup(0);
        s.open_all();
        s.host[1].connected(true);
        s.deliver(Event::Ready(WAKE)).unwrap();
        assert_eq!(s.heard(), [(1, PORT_OPEN, 1, vec![])]);
        s.host[1].receive(b"last");
        s.host[1].connected(false);
        s.deliver(Event::Ready(WAKE)).unwrap();
        assert!(s.add(Role::ControlReceive, &[inn(DATA + 0x1000, 0x100)]));
        s.kick(Role::ControlReceive).unwrap();
        assert_eq!(s.drivers[2].take_used(), None, "there is still something to read");
        assert_eq!(s.receive(1, 100).unwrap(), b"last");
        assert!(s.drivers[2].take_used().is_some(), "without anybody asking");
    }

    #[test]
    fn input_waits_until_somebody_reads_and_nothing_is_lost() {
        let mut s = setup(0);
        assert_eq!(s.host[1].receive(b"early"), 5);
        assert_eq!(s.receive(1, 100), None);
        s.open_all();
        assert_eq!(s.drivers[Role::Receive(1).queue()].take_used().unwrap().1, 5);
        let data: Vec<u8> = (0..200_000u32).map(|n| (n / 7) as u8).collect();
        let (mut sent, mut got) = (0, vec![]);
        s.host[1].connected(true);
        while got.len() < data.len() {
            sent += s.host[1].receive(&data[sent..]);
            // The driver is notified of the disconnect only after the last byte was delivered.
            s.host[1].connected(sent < data.len());
            assert!(sent - got.len() <= INPUT_LIMIT);
            s.deliver(Event::Ready(WAKE)).unwrap();
            let state = lock(&s.device.shared.state).ports[1].clone();
            assert!(state.connected || sent == data.len() && got.len() + 4093 >= data.len(), "{state:?}");
            let told_room = std::iter::from_fn(|| s.events.take()).any(|e| e == GuestEvent::ConsoleInputRoom);
            assert!(!told_room || sent < data.len());
            got.extend(s.receive(1, 4093).unwrap());
        }
        assert!(got == data);
        s.deliver(Event::Ready(WAKE)).unwrap();
        assert_eq!(s.heard().last(), Some(&(1, PORT_OPEN, 0, vec![])));
        // Closed again: new input stays in the host's buffer.
        s.say(1, PORT_OPEN, 0);
        s.host[1].receive(b"later");
        s.deliver(Event::Ready(WAKE)).unwrap();
        assert_eq!(s.receive(1, 100), None);
        s.say(1, PORT_OPEN, 1);
        assert_eq!(s.drivers[Role::Receive(1).queue()].take_used().unwrap().1, 5);
    }

    #[test]
    fn room_for_input_is_told() {
        let mut s = setup(0);
        s.open_all();
        assert_eq!(s.host[1].receive(&[1; 2 * INPUT_LIMIT]), INPUT_LIMIT);
        assert_eq!(s.host[1].receive(&[1]), 0);
        s.receive(1, 1000).unwrap();
        assert_eq!(s.events.take(), None);
        s.receive(1, INPUT_LIMIT as u32 / 2).unwrap();
        assert_eq!(s.events.take(), Some(GuestEvent::ConsoleInputRoom));
        assert_eq!(s.receive(1, INPUT_LIMIT as u32).unwrap().len(), INPUT_LIMIT / 2 - 1000);
        assert_eq!(s.events.take(), None, "nobody asked again");
    }

    #[test]
    fn a_port_that_nobody_reads_holds_only_itself_up() {
        let mut s = setup(0);
        s.open_all();
        let chunk: Vec<u8> = (0..30_000u32).map(|n| n as u8).collect();
        let mut written = 0;
        // The pipe takes some chunks, the buffer takes some, and then no more are taken.
        while s.transmit(1, &chunk).unwrap() {
            written += 1;
            assert!(written * chunk.len() < 4 * LIMIT);
        }
        assert!(s.transmit(2, b"still here").unwrap());
        let mut got = [0; 10];
        s.readers[2].read_exact(&mut got).unwrap();
        assert_eq!(&got, b"still here");
        assert_eq!(s.share.queues[Role::Transmit(1).queue()].in_flight(), 0);
        let mut all = vec![0; chunk.len() * (written + 1)];
        let (head, tail) = all.split_at_mut(chunk.len() * written);
        s.readers[1].read_exact(head).unwrap();
        let limit = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while s.drivers[Role::Transmit(1).queue()].take_used().is_none() {
            assert!(std::time::Instant::now() < limit);
            s.deliver(Event::Ready(ROOM + 1)).unwrap();
        }
        // The last chunk was overwritten by then, but its length is right.
        s.readers[1].read_exact(tail).unwrap();
        assert!(all.chunks(chunk.len()).take(written).all(|part| part == chunk));
    }

    #[test]
    fn last_words_are_written_while_stopping() {
        let mut s = setup(0);
        s.ram.write(DATA, b"bye").unwrap();
        s.add(Role::Transmit(2), &[out(DATA, 1), out(DATA + 1, 2)]);
        let Share { handler, queues } = &mut s.share;
        s.wire.drain(&mut **handler, queues).unwrap();
        let mut got = [0; 3];
        s.readers[2].read_exact(&mut got).unwrap();
        assert_eq!(&got, b"bye");
    }

    #[test]
    fn what_is_in_the_ring_at_the_end_is_written_to_a_slow_reader() {
        let mut s = setup(0);
        let chunk = vec![7; 30_000];
        let mut written = 1;
        while s.transmit(1, &chunk).unwrap() {
            written += 1;
        }
        while s.add(Role::Transmit(1), &[out(DATA, chunk.len() as u32)]) {
            written += 1;
        }
        let Share { handler, queues } = &mut s.share;
        s.wire.drain(&mut **handler, queues).unwrap();
        let mut all = vec![0; written * chunk.len()];
        s.readers[1].read_exact(&mut all).unwrap();
        assert!(all.iter().all(|byte| *byte == 7));
    }

    #[test]
    fn a_panic_on_the_console_is_seen_and_one_on_a_port_is_not() {
        let mut s = setup(0);
        s.transmit(1, b"Kernel panic - not syncing: x\n").unwrap();
        assert_eq!(s.events.take(), None);
        s.transmit(0, b"[ 1.0] Kernel panic - ").unwrap();
        s.transmit(0, b"not syncing: x\n").unwrap();
        assert_eq!(s.events.take(), Some(GuestEvent::ConsoleFirstByte));
        assert_eq!(s.events.take(), Some(GuestEvent::Panicked(PanicSource::Console)));
    }

    #[test]
    fn odd_messages_are_ignored() {
        let mut s = setup(0);
        for (id, event, value) in
            [(0, DEVICE_READY, 0), (3, PORT_READY, 1), (u32::MAX, PORT_OPEN, 1), (0, 99, 1), (1, PORT_READY, 0)]
        {
            s.say(id, event, value);
        }
        s.add(Role::ControlTransmit, &[out(DATA, 7)]);
        s.add(Role::ControlTransmit, &[inn(DATA, 8)]);
        s.add(Role::ControlTransmit, &[out(DATA, 0)]);
        s.kick(Role::ControlTransmit).unwrap();
        assert_eq!(s.heard(), []);
        // Each message is sent once, however often it is requested.
        (0..100).for_each(|_| s.say(0, DEVICE_READY, 1));
        assert_eq!(s.heard().len(), 3);
    }

    #[test]
    fn a_short_buffer_for_a_control_message_and_an_endless_write_are_faults() {
        let mut s = setup(0);
        s.say(1, PORT_READY, 1);
        s.add(Role::ControlReceive, &[inn(DATA, 10)]);
        let fault = s.kick(Role::ControlReceive).unwrap_err().to_string();
        assert_eq!(fault, "a buffer for a console control message is too short for it");
        let mut s = setup(0);
        s.add(Role::Transmit(0), &[out(DATA, (1 << 20) + 1)]);
        assert_eq!(s.kick(Role::Transmit(0)).unwrap_err().to_string(), "a console write is longer than 1 MiB");
        let mut s = setup(0);
        s.host[0].receive(b"ls");
        s.say(0, PORT_READY, 1);
        assert_eq!(s.receive(0, 0), Some(vec![]), "room for nothing");
        assert_eq!(s.receive(0, 1).unwrap(), b"l");
        assert_eq!(s.receive(0, 10).unwrap(), b"s");
    }

    #[test]
    fn a_driver_that_knows_one_port_has_a_console() {
        let mut s = setup(F_MULTIPORT);
        s.host[0].receive(b"ls");
        s.host[1].receive(b"secret");
        s.host[0].resize(80, 25);
        let before = s.wire.interrupt.line().take_count();
        s.deliver(Event::Ready(WAKE)).unwrap();
        assert_eq!(s.wire.interrupt.line().take_count(), before + 1);
        assert_eq!(s.receive(0, 10).unwrap(), b"ls");
        assert_eq!(s.receive(1, 10), None);
        let mut config = [0xFF; 10];
        s.device.read_config(0, &mut config);
        assert_eq!(config, [80, 0, 25, 0, 3, 0, 0, 0, 0xFF, 0xFF]);
    }

    #[test]
    fn linux_brings_it_up_through_registers() {
        let events = GuestEvents::new().unwrap();
        let (device, mut readers) = device(&events);
        let host = device.host_ports();
        let ram = GuestRam::anonymous(RAM);
        let transport = MmioTransport::new(Box::new(device), ram.clone(), IrqLine::new(5).unwrap()).unwrap();
        let mut driver = FakeDriver::new(&transport, &ram);
        driver.start(0, 0x1000, SIZE);
        assert_eq!(driver.queues.len(), 8);
        ram.write(DATA, b"hello").unwrap();
        driver.queues[5].add(&[out(DATA, 5)]).unwrap();
        driver.kick(5);
        driver.queues[5].wait_used();
        let mut got = [0; 5];
        readers[1].read_exact(&mut got).unwrap();
        assert_eq!(&got, b"hello");
        // A device that was paused and resumed remembers what the driver knows.
        ram.write_obj(DATA, u64::from(PORT_READY) << 32 | 1 << 48).unwrap();
        driver.queues[3].add(&[out(DATA, 8)]).unwrap();
        driver.kick(3);
        driver.queues[3].wait_used();
        transport.pause().unwrap();
        host[0].receive(b"ls");
        driver.queues[0].add(&[inn(DATA, 100)]).unwrap();
        transport.resume();
        assert_eq!(driver.queues[0].wait_used().1, 2);
    }

    #[test]
    fn state_is_saved_and_checked() {
        let mut s = setup(0);
        s.say(1, PORT_READY, 1);
        let state = s.device.save().unwrap();
        s.device.reset();
        assert_ne!(s.device.save().unwrap(), state);
        s.device.restore(&state).unwrap();
        assert_eq!(s.device.save().unwrap(), state);
        let bad = serde_json::json!({"ports": []});
        assert!(s.device.restore(&bad).unwrap_err().to_string().contains("3 ports and had 0"));
        assert!(s.device.restore(&serde_json::json!({"ports": 3})).is_err());
    }

    /// Step of a test: a buffer of some length for a queue, input for a port, or a control message.
    #[derive(Clone, Debug)]
    enum Step {
        Buffer(usize, u32),
        Input(usize, usize),
        Say(u32, u16, u16),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..8usize, prop_oneof![9 => 8..2000u32, 1 => 0..8u32]).prop_map(|(q, len)| Step::Buffer(q, len)),
            2 => (0..3usize, 0..5000usize).prop_map(|(port, len)| Step::Input(port, len)),
            2 => (0..4u32, 0..9u16, 0..2u16).prop_map(|(id, event, value)| Step::Say(id, event, value)),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, cases: 64, ..ProptestConfig::default() })]

        /// Checks that the guest gets input from its beginning, each byte once and in order, whatever its driver does.
        #[test]
        fn input_stays_in_order(
            steps in prop::collection::vec(step(), 1..60),
            flips in prop_oneof![2 => Just(vec![]), 1 => prop::collection::vec((0x1000..0x8200u64, 0..8u8), 1..4)],
        ) {
            let mut s = setup(0);
            let (mut sent, mut got) = ([0usize; 3], [0usize; 3]);
            let mut buffers = std::collections::HashMap::new();
            let mut at = DATA + 0x1000;
            let cut = steps.len() / 2;
            for (i, step) in steps.into_iter().enumerate() {
                if i == cut {
                    for &(at, bit) in &flips {
                        let byte: u8 = s.ram.read_obj(at).unwrap();
                        s.ram.write_obj(at, byte ^ 1 << bit).unwrap();
                    }
                }
                let result = match step {
                    Step::Buffer(queue, len) => {
                        let writes = matches!(Role::of(queue), Role::Receive(_) | Role::ControlReceive);
                        let buf = if writes { inn(at, len) } else { out(at, len) };
                        if let Some(head) = s.drivers[queue].add(&[buf]) {
                            buffers.insert((queue, head), at);
                        }
                        at += u64::from(len);
                        s.deliver(Event::Kick(queue))
                    }
                    Step::Input(port, len) => {
                        let bytes: Vec<u8> = (sent[port]..sent[port] + len).map(|n| (n % 251) as u8).collect();
                        sent[port] += s.host[port].receive(&bytes);
                        s.deliver(Event::Ready(WAKE))
                    }
                    Step::Say(id, event, value) => {
                        let word = u64::from(id) | u64::from(event) << 32 | u64::from(value) << 48;
                        s.ram.write_obj(DATA, word).unwrap();
                        s.add(Role::ControlTransmit, &[out(DATA, 8)]);
                        s.kick(Role::ControlTransmit)
                    }
                };
                // The only fault that these drivers can cause is a short control buffer.
                if let Err(fault) = result {
                    prop_assert!(!flips.is_empty() || fault.to_string().contains("too short"), "{fault}");
                    return Ok(());
                }
                if i >= cut && !flips.is_empty() {
                    continue;
                }
                for queue in 0..8 {
                    while let Some((head, len)) = s.drivers[queue].take_used() {
                        let (Role::Receive(port), Some(at)) = (Role::of(queue), buffers.remove(&(queue, head))) else {
                            continue;
                        };
                        for n in 0..u64::from(len) {
                            let byte: u8 = s.ram.read_obj(at + n).unwrap();
                            prop_assert_eq!(usize::from(byte), got[port] % 251);
                            got[port] += 1;
                        }
                        prop_assert!(got[port] <= sent[port]);
                    }
                }
            }
        }
    }
}
