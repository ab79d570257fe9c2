use std::os::fd::AsRawFd;

use super::*;
use crate::virtio::blk::{Blk, BlkConfig};
use crate::virtio::chain::Chain;
use crate::virtio::rng::{Rng, RngConfig};
use crate::virtio::testing::{EVENT_IDX, FakeDriver, FakeQueue, VERSION_1, inn, out};
use crate::virtio::{
    Activated, Context, DeviceId, Event, Fault, Handler, Progress, RING_FEATURES, Remote, Share, SharedMemory,
};

const RAM: u64 = 1 << 20;
const RING: u64 = 0x1000;
const B: u64 = 0x8_0000;
const RING_RESET: u64 = 1 << VIRTIO_F_RING_RESET;

fn ram() -> GuestRam {
    GuestRam::anonymous(RAM)
}

fn transport(ram: &GuestRam, device: impl VirtioDevice + 'static) -> MmioTransport {
    MmioTransport::new(Box::new(device), ram.clone(), IrqLine::new(6).unwrap()).unwrap()
}

fn rng(ram: &GuestRam) -> MmioTransport {
    transport(ram, Rng::new("rng0", &RngConfig::default()))
}

/// Three queues in two workers: the first two echo the length of their readable part, the third keeps every request.
struct Multi {
    info: DeviceInfo,
    config: [u8; 6],
    resets: u32,
}

impl Multi {
    fn new() -> Self {
        let shared_memory = vec![SharedMemory { id: 2, addr: 0x12_3456_7000, len: 0x3_0000_1000 }];
        let (id, name, features) = (DeviceId::Console, "multi".into(), RING_FEATURES | 1);
        let queue_sizes = vec![8, 8, 16];
        Multi { info: DeviceInfo { id, name, features, queue_sizes, shared_memory }, config: [1; 6], resets: 0 }
    }
}

struct Echo;

impl Handler for Echo {
    fn event(&mut self, event: Event, queues: &mut [Queue], cx: &Context<'_>) -> Result<Progress, Fault> {
        let Event::Kick(i) = event else { return Ok(Progress::Done) };
        let queue = queues.get_mut(i).ok_or(Fault::Device("no such queue"))?;
        queue.serve(cx.ram, |chain: &Chain| Ok(chain.reader(cx.ram).len() as u32))
    }
}

#[derive(Default)]
struct Keep(Vec<Chain>);

impl Handler for Keep {
    fn event(&mut self, _: Event, queues: &mut [Queue], cx: &Context<'_>) -> Result<Progress, Fault> {
        while let Some(chain) = queues.first_mut().map(|q| q.pop(cx.ram)).transpose()?.flatten() {
            self.0.push(chain);
        }
        Ok(Progress::Done)
    }

    fn drain(&mut self, queues: &mut [Queue], _: &Context<'_>) -> Result<Progress, Fault> {
        for chain in self.0.drain(..).rev() {
            if let [queue] = queues {
                queue.unpop(chain);
            }
        }
        Ok(Progress::Done)
    }
}

impl VirtioDevice for Multi {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::virtio::read_config_bytes(&self.config, offset, data);
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        for (i, byte) in data.iter().enumerate() {
            let at = usize::try_from(offset).ok().and_then(|o| o.checked_add(i));
            if let Some(to) = at.and_then(|at| self.config.get_mut(at)) {
                *to = *byte;
            }
        }
    }
    fn activate(&mut self, activation: Activation) -> io::Result<Activated> {
        let mut queues = activation.queues;
        let last = queues.split_off(2);
        Ok(Activated::Here(vec![
            Share { queues, handler: Box::new(Echo) },
            Share { queues: last, handler: Box::<Keep>::default() },
        ]))
    }
    fn reset(&mut self) {
        self.resets += 1;
        self.config = [1; 6];
    }
}

#[test]
fn linux_brings_it_up_and_gets_its_bytes() {
    for without in [0, EVENT_IDX, RING_FEATURES] {
        let ram = ram();
        let transport = rng(&ram);
        let mut driver = FakeDriver::new(&transport, &ram);
        assert_eq!(driver.get(VIRTIO_MMIO_DEVICE_ID), 4);
        driver.start(without, RING, 64);
        for i in 0..200 {
            driver.queues[0].add(&[inn(B, 100)]).unwrap();
            driver.queues[0].set_used_event(i);
            if i % 2 == 0 {
                driver.kick(0)
            } else {
                transport.notify_fds()[0].write(1).unwrap()
            }
            assert_eq!(driver.queues[0].wait_used().1, 100);
        }
        // The interrupt comes after the used index.
        let deadline = Instant::now() + Duration::from_secs(60);
        while driver.get(VIRTIO_MMIO_INTERRUPT_STATUS) != 1 {
            assert!(Instant::now() < deadline);
        }
        driver.set(VIRTIO_MMIO_INTERRUPT_ACK, 1);
        assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 15);
        transport.stop().unwrap();
        assert!(transport.interrupt().line().take_count() >= 1);
    }
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let ram = ram();
    let transport = rng(&ram);
    let mut driver = FakeDriver::new(&transport, &ram);
    let offered = driver.offered();
    assert_eq!(offered, VERSION_1 | RING_FEATURES | RING_RESET);
    for features in [0, RING_FEATURES, offered | 1, offered | 1 << 63, u64::MAX, offered & !VERSION_1] {
        assert!(!driver.negotiate(features), "{features:#x}");
        assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 3);
        // Without FEATURES_OK there is no DRIVER_OK either.
        driver.set(VIRTIO_MMIO_STATUS, 7);
        assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 3);
    }
    for features in [VERSION_1, offered] {
        assert!(driver.negotiate(features));
    }
    // The features are final: later writes change nothing, and words that do not exist hold nothing.
    driver.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
    driver.set(VIRTIO_MMIO_DRIVER_FEATURES, u32::MAX);
    driver.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 2);
    driver.set(VIRTIO_MMIO_DRIVER_FEATURES, u32::MAX);
    assert_eq!(transport.save().unwrap().driver_features, offered);
    driver.set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 2);
    assert_eq!(driver.get(VIRTIO_MMIO_DEVICE_FEATURES), 0);
}

#[test]
fn status_bits_come_in_order_and_stay() {
    let ram = ram();
    let transport = rng(&ram);
    let driver = FakeDriver::new(&transport, &ram);
    let status = |value: u32| {
        driver.set(VIRTIO_MMIO_STATUS, value);
        driver.get(VIRTIO_MMIO_STATUS)
    };
    assert_eq!(status(DRIVER), 0);
    assert_eq!(status(DRIVER_OK), 0);
    assert_eq!(status(FEATURES_OK | DRIVER_OK), 0);
    assert_eq!(status(ACKNOWLEDGE), 1);
    assert_eq!(status(ACKNOWLEDGE | FEATURES_OK), 1);
    assert_eq!(status(ACKNOWLEDGE | DRIVER | NEEDS_RESET | 0xFFFF_FF30), 3, "unknown bits and not the driver's");
    assert_eq!(status(ACKNOWLEDGE), 3, "bits are not taken back");
    assert_eq!(status(FAILED | 3), 0x83);
    assert_eq!(status(0), 0);
    assert_eq!(status(u32::MAX), 0x83, "VERSION_1 was not accepted");
}

#[test]
fn registers_take_aligned_words_only() {
    let ram = ram();
    let transport = rng(&ram);
    for width in [1, 2, 3, 4, 5, 8] {
        for offset in (0..0x200).chain([0xFF8, 0xFFF, u64::from(u32::MAX), u64::MAX]) {
            let mut data = vec![0xFF; width];
            transport.read(offset, &mut data);
            if offset < 0x100 && (width != 4 || offset % 4 != 0) {
                assert!(data.iter().all(|&b| b == 0), "{offset:#x} {width}");
            }
            if offset != u64::from(VIRTIO_MMIO_STATUS) {
                transport.write(offset, &vec![0xFF; width]);
            }
        }
    }
    let driver = FakeDriver::new(&transport, &ram);
    assert_eq!(driver.get(VIRTIO_MMIO_MAGIC_VALUE), MAGIC);
    assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 0);
}

#[test]
fn queues_that_do_not_exist_are_nothing() {
    let ram = ram();
    let transport = rng(&ram);
    let mut driver = FakeDriver::new(&transport, &ram);
    driver.negotiate(driver.offered());
    for sel in [1, 2, 0xFFFF, 0x1_0000, u32::MAX] {
        driver.set(VIRTIO_MMIO_QUEUE_SEL, sel);
        for register in [VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_READY, QUEUE_RESET] {
            driver.set(register, 1);
        }
        assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
        assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_READY), 0);
        assert_eq!(driver.get(QUEUE_RESET), 0);
        driver.kick(sel);
    }
    assert_eq!(transport.save().unwrap().queues, [QueueState::default()]);
}

#[test]
fn queue_registers_are_fixed_while_ready_and_before_features() {
    let ram = ram();
    let transport = rng(&ram);
    let mut driver = FakeDriver::new(&transport, &ram);
    driver.set(VIRTIO_MMIO_QUEUE_NUM, 8);
    assert_eq!(transport.save().unwrap().queues[0].size, 0);
    driver.negotiate(driver.offered());
    let queue = FakeQueue::new(&ram, RING, 8);
    driver.enable(0, &queue);
    driver.set(VIRTIO_MMIO_QUEUE_NUM, 4);
    driver.set(VIRTIO_MMIO_QUEUE_DESC_HIGH, 4);
    assert_eq!(transport.save().unwrap().queues[0], queue.state());
    driver.set(VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_READY), 0);
    driver.set(VIRTIO_MMIO_QUEUE_NUM, 0x1_0004);
    assert_eq!(transport.save().unwrap().queues[0].size, 0);
}

#[test]
fn reasons_stay_until_they_are_acknowledged_and_a_late_acknowledgement_takes_no_newer_one() {
    let ram = ram();
    let transport = rng(&ram);
    let driver = FakeDriver::new(&transport, &ram);
    transport.interrupt().used_buffers();
    transport.interrupt().config_changed();
    for _ in 0..2 {
        assert_eq!(driver.get(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG);
    }
    transport.interrupt().used_buffers();
    driver.set(VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG);
    assert_eq!(driver.get(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_VRING);
    assert_eq!(transport.interrupt().line().take_count(), 3);
    // A reason that was read is saved, and is reported again after a restore; a pause alone repeats nothing.
    transport.pause().unwrap();
    let state = transport.save().unwrap();
    assert_eq!(state.interrupt_status, VIRTIO_MMIO_INT_VRING);
    transport.resume();
    assert_eq!(transport.interrupt().line().take_count(), 0);
    let device = Box::new(Rng::new("rng0", &RngConfig::default()));
    let restored = MmioTransport::from_state(device, ram.clone(), IrqLine::new(5).unwrap(), &state);
    let restored = restored.unwrap();
    restored.resume();
    assert_eq!(restored.interrupt().line().take_count(), 1);
    driver.set(VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_VRING);
    assert_eq!(driver.get(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
}

/// Device whose two configuration bytes are always equal.
struct Twins {
    info: DeviceInfo,
    byte: u8,
}

impl VirtioDevice for Twins {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::virtio::read_config_bytes(&[self.byte; 2], offset, data);
    }
    fn control(&mut self, _: &Control) -> Result<Reply, ControlError> {
        self.byte = self.byte.wrapping_add(1);
        Ok(Reply::ConfigChanged)
    }
    fn activate(&mut self, _: Activation) -> io::Result<Activated> {
        Ok(Activated::Here(vec![]))
    }
}

/// An unchanged generation vouches for what was read in between (2.5.1), also before the driver is ready.
#[test]
fn configuration_is_never_torn() {
    let ram = ram();
    let transport = transport(&ram, Twins { info: Multi::new().info, byte: 0 });
    let driver = FakeDriver::new(&transport, &ram);
    std::thread::scope(|scope| {
        let changes = scope.spawn(|| (0..20_000).for_each(|_| _ = transport.control(&Control::SetLink(true)).unwrap()));
        while !changes.is_finished() {
            let before = driver.get(VIRTIO_MMIO_CONFIG_GENERATION);
            let [mut first, mut second] = [[0], [0]];
            transport.read(0x100, &mut first);
            transport.read(0x101, &mut second);
            if driver.get(VIRTIO_MMIO_CONFIG_GENERATION) == before {
                assert_eq!(first, second);
            }
        }
    });
}

#[test]
fn a_wrong_queue_needs_a_reset_and_a_reset_mends_it() {
    let ram = ram();
    let transport = rng(&ram);
    let mut driver = FakeDriver::new(&transport, &ram);
    driver.negotiate(driver.offered());
    let mut wrong = FakeQueue::new(&ram, RING, 8);
    wrong.used = RAM - 16;
    driver.enable(0, &wrong);
    driver.set(VIRTIO_MMIO_STATUS, 15);
    assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 15 | NEEDS_RESET);
    assert_eq!(driver.get(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_CONFIG);
    assert_eq!(transport.interrupt().line().take_count(), 1);
    driver.start(0, RING, 8);
    assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 15);
    assert_eq!(driver.get(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    driver.queues[0].add(&[inn(B, 1)]).unwrap();
    driver.kick(0);
    driver.queues[0].wait_used();
}

#[test]
fn a_bad_chain_needs_a_reset_and_a_reset_mends_it() {
    let ram = ram();
    let transport = rng(&ram);
    let mut driver = FakeDriver::new(&transport, &ram);
    for _ in 0..3 {
        driver.start(0, RING, 8);
        driver.queues[0].add(&[inn(RAM, 1)]).unwrap();
        driver.kick(0);
        driver.wait_status(NEEDS_RESET);
        let generation = driver.get(VIRTIO_MMIO_CONFIG_GENERATION);
        assert_ne!(driver.get(VIRTIO_MMIO_INTERRUPT_STATUS) & VIRTIO_MMIO_INT_CONFIG, 0);
        driver.start(0, RING, 8);
        driver.queues[0].add(&[inn(B, 10)]).unwrap();
        driver.kick(0);
        assert_eq!(driver.queues[0].wait_used().1, 10);
        assert_eq!(driver.get(VIRTIO_MMIO_CONFIG_GENERATION), generation);
    }
}

#[test]
fn several_workers_share_a_device() {
    let ram = ram();
    let transport = transport(&ram, Multi::new());
    let mut driver = FakeDriver::new(&transport, &ram);
    driver.start(0, RING, 16);
    assert_eq!(driver.queues.iter().map(|q| q.size).collect::<Vec<_>>(), [8, 8, 16]);
    for (i, len) in [(0, 10), (1, 20), (0, 30)] {
        driver.queues[i].add(&[out(B, len)]).unwrap();
        driver.kick(i as u32);
        assert_eq!(driver.queues[i].wait_used().1, len);
    }
    // The third queue never completes a request, but returns what it took.
    driver.queues[2].add(&[out(B, 1)]).unwrap();
    driver.kick(2);
    transport.pause().unwrap();
    let positions = transport.save().unwrap().queues.iter().map(|q| (q.next_avail, q.next_used)).collect::<Vec<_>>();
    assert_eq!(positions, [(2, 2), (1, 1), (0, 0)]);
}

#[test]
fn a_queue_is_reset_alone() {
    let ram = ram();
    let transport = transport(&ram, Multi::new());
    let mut driver = FakeDriver::new(&transport, &ram);
    driver.start(0, RING, 8);
    for i in [0, 1] {
        driver.queues[i].add(&[out(B, 5)]).unwrap();
        driver.kick(i as u32);
        driver.queues[i].wait_used();
    }
    driver.set(VIRTIO_MMIO_QUEUE_SEL, 1);
    driver.set(QUEUE_RESET, 1);
    assert_eq!((driver.get(QUEUE_RESET), driver.get(VIRTIO_MMIO_QUEUE_READY)), (0, 0));
    // The first queue continues where it was; the second is silent until it is set up again, elsewhere and smaller.
    driver.queues[0].add(&[out(B, 6)]).unwrap();
    driver.kick(0);
    assert_eq!(driver.queues[0].wait_used().1, 6);
    driver.queues[1] = FakeQueue::new(&ram, 0x2_0000, 4);
    driver.queues[1].add(&[out(B, 7)]).unwrap();
    driver.kick(1);
    driver.enable(1, &driver.queues[1]);
    assert_eq!(driver.queues[1].wait_used().1, 7);
    assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 15);

    // Without the feature the register does nothing.
    driver.start(RING_RESET, RING, 8);
    driver.set(VIRTIO_MMIO_QUEUE_SEL, 1);
    driver.set(QUEUE_RESET, 1);
    assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_READY), 1);
}

#[test]
fn configuration_space_takes_every_width() {
    let ram = ram();
    let transport = transport(&ram, Multi::new());
    let base = u64::from(VIRTIO_MMIO_CONFIG);
    transport.write(base, &[9; 2]);
    let read = |offset, width: usize| {
        let mut data = vec![0xFF; width];
        transport.read(base + offset, &mut data);
        data
    };
    assert_eq!(read(0, 2), [1, 1], "nobody has said that it is a driver");
    let mut driver = FakeDriver::new(&transport, &ram);
    driver.negotiate(driver.offered());
    transport.write(base + 4, &[2, 3, 4, 5]);
    transport.write(base + 0xEFF, &[1]);
    assert_eq!(read(1, 1), [1]);
    assert_eq!(read(3, 2), [1, 2]);
    assert_eq!(read(0, 8), [1, 1, 1, 1, 2, 3, 0, 0]);
    assert_eq!(read(5, 4), [3, 0, 0, 0]);
    assert_eq!(read(0xEFF, 1), [0]);
    driver.negotiate(driver.offered());
    assert_eq!(read(4, 1), [1], "the device was reset");
}

#[test]
fn shared_memory_is_found_by_id() {
    let ram = ram();
    let transport = transport(&ram, Multi::new());
    let driver = FakeDriver::new(&transport, &ram);
    let region = |id| {
        driver.set(VIRTIO_MMIO_SHM_SEL, id);
        [
            driver.get(VIRTIO_MMIO_SHM_LEN_LOW),
            driver.get(VIRTIO_MMIO_SHM_LEN_HIGH),
            driver.get(VIRTIO_MMIO_SHM_BASE_LOW),
            driver.get(VIRTIO_MMIO_SHM_BASE_HIGH),
        ]
    };
    assert_eq!(region(2), [0x1000, 3, 0x3456_7000, 0x12]);
    for id in [0, 1, 3, 258, u32::MAX] {
        assert_eq!(region(id), [u32::MAX; 4]);
    }
}

#[test]
fn pause_save_restore_and_on() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let config: BlkConfig = file.path().display().to_string().parse().unwrap();
    let ram = ram();
    let transport_1 = transport(&ram, Blk::new("blk0", &config).unwrap());
    let mut driver = FakeDriver::new(&transport_1, &ram);
    driver.start(0, RING, 64);
    let read = [out(B, 16), inn(B + 512, 512), inn(B + 4096, 1)];
    driver.queues[0].add(&read).unwrap();
    driver.kick(0);
    driver.queues[0].wait_used();
    assert!(transport_1.save().is_err(), "it runs");
    transport_1.pause().unwrap();
    // Pending at the time of the snapshot: a request that was not seen and an interrupt that was not acknowledged.
    driver.queues[0].add(&read).unwrap();
    driver.kick(0);
    transport_1.interrupt().used_buffers();
    let state = transport_1.save().unwrap();
    assert_eq!((state.queues[0].next_avail, state.queues[0].next_used), (1, 1));
    let state: MmioState = serde_json::from_str(&serde_json::to_string(&state).unwrap()).unwrap();
    let FakeDriver { features, queues, .. } = driver;
    drop(transport_1);

    let line = IrqLine::new(6).unwrap();
    let blk = Blk::new("blk0", &config).unwrap();
    let restored = MmioTransport::from_state(Box::new(blk), ram.clone(), line.clone(), &state).unwrap();
    assert_eq!(restored.save().unwrap(), state);
    assert_eq!(line.take_count(), 0);
    restored.resume();
    let mut driver = FakeDriver { device: &restored, ram: ram.clone(), features, queues };
    driver.queues[0].wait_used();
    assert!(line.take_count() >= 1);
    assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 15);
    for _ in 0..5 {
        restored.pause().unwrap();
        restored.resume();
        driver.queues[0].add(&read).unwrap();
        driver.kick(0);
        driver.queues[0].wait_used();
    }
    assert_eq!(ram.read_obj::<u8>(B + 4096).unwrap(), 0);
}

#[test]
fn saved_state_is_not_trusted() {
    let ram = ram();
    let good = {
        let transport = rng(&ram);
        FakeDriver::new(&transport, &ram).start(0, RING, 8);
        transport.pause().unwrap();
        transport.save().unwrap()
    };
    let restore = |state: &MmioState| {
        let device = Box::new(Rng::new("rng0", &RngConfig::default()));
        MmioTransport::from_state(device, ram.clone(), IrqLine::new(6).unwrap(), state)
    };
    let refused = |state| restore(&state).err().unwrap().to_string();
    assert_eq!(
        refused(MmioState { device_id: 2, ..good.clone() }),
        "the saved state of rng0 is that of a device with id 2, not 4"
    );
    assert!(refused(MmioState { queues: vec![], ..good.clone() }).contains("has 0 queues, not 1"));
    assert!(refused(MmioState { driver_features: u64::MAX, ..good.clone() }).contains("does not offer"));
    assert!(refused(MmioState { device: serde_json::json!(1), ..good.clone() }).contains("keeps no state"));
    // Values that a driver could have written are checked when the device starts.
    let mut outside = good.clone();
    outside.queues[0].desc = RAM;
    outside.status = !NEEDS_RESET;
    let transport = restore(&outside).unwrap();
    transport.resume();
    assert_eq!(transport.save().unwrap().status, 0x8F | NEEDS_RESET);
    let mut positions = good;
    positions.queues[0].next_avail = 999;
    let transport = restore(&positions).unwrap();
    transport.resume();
    assert_eq!(transport.save().unwrap().status, 0x0F | NEEDS_RESET);
}

/// Device whose queues run elsewhere.
struct Vhost(DeviceInfo);

struct Kernel(Vec<QueueState>);

impl Remote for Kernel {
    fn stop(&mut self) -> io::Result<Vec<(u16, QueueState)>> {
        self.0.iter_mut().for_each(|q| (q.next_avail, q.next_used) = (q.next_avail + 5, q.next_used + 5));
        Ok((0..).zip(self.0.clone()).collect())
    }
}

impl VirtioDevice for Vhost {
    fn info(&self) -> &DeviceInfo {
        &self.0
    }
    fn read_config(&self, _: u64, _: &mut [u8]) {}
    fn activate(&mut self, activation: Activation) -> io::Result<Activated> {
        assert!(activation.interrupt.line().fd().as_raw_fd() >= 0 && activation.kicks.len() == 2);
        Ok(Activated::Elsewhere(Box::new(Kernel(activation.queues.iter().map(Queue::state).collect())), vec![]))
    }
}

#[test]
fn queues_may_run_elsewhere() {
    let ram = ram();
    let info = DeviceInfo { queue_sizes: vec![8, 8], ..Multi::new().info };
    let transport = transport(&ram, Vhost(info));
    let mut driver = FakeDriver::new(&transport, &ram);
    assert_eq!(driver.get(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    driver.start(0, RING, 8);
    driver.set(VIRTIO_MMIO_INTERRUPT_ACK, 1);
    assert_eq!(driver.get(VIRTIO_MMIO_INTERRUPT_STATUS), 1, "nobody else sets it");
    for round in 1..3 {
        transport.pause().unwrap();
        assert!(transport.save().unwrap().queues.iter().all(|q| q.next_used == 5 * round && q.ready));
        transport.resume();
    }
    driver.set(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(driver.get(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
}

#[test]
fn resets_race_with_requests() {
    let ram = ram();
    let transport = rng(&ram);
    let mut driver = FakeDriver::new(&transport, &ram);
    for round in 0..200 {
        driver.start(0, RING, 64);
        for _ in 0..round % 60 {
            driver.queues[0].add(&[inn(B, 64)]).unwrap();
            driver.kick(0);
        }
    }
    driver.queues[0].wait_used();
    driver.set(VIRTIO_MMIO_STATUS, 0);
    let used = || ram.load_u16(driver.queues[0].used + 2, Ordering::SeqCst).unwrap();
    let before = used();
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(used(), before, "a reset device touches nothing");
}

/// Device that finishes nothing until it is allowed to.
struct Slow(DeviceInfo, Arc<AtomicBool>, Arc<AtomicBool>);

/// Handler with two flags: one allows it to finish, the other reports that it has taken a request.
struct Waiting(Arc<AtomicBool>, Arc<AtomicBool>, Vec<Chain>);

impl Handler for Waiting {
    fn event(&mut self, _: Event, queues: &mut [Queue], cx: &Context<'_>) -> Result<Progress, Fault> {
        while let Some(chain) = queues.first_mut().map(|q| q.pop(cx.ram)).transpose()?.flatten() {
            self.2.push(chain);
            self.1.store(true, Ordering::SeqCst);
        }
        // Makes the loop call again and ask for draining.
        Ok(if self.2.is_empty() { Progress::Done } else { Progress::More })
    }

    fn drain(&mut self, queues: &mut [Queue], cx: &Context<'_>) -> Result<Progress, Fault> {
        while !self.0.load(Ordering::SeqCst) && !self.2.is_empty() {
            std::thread::sleep(Duration::from_millis(1));
        }
        for chain in self.2.drain(..) {
            if let [queue] = queues {
                queue.push_used(cx.ram, chain, 1)?;
            }
        }
        Ok(Progress::Done)
    }
}

impl VirtioDevice for Slow {
    fn info(&self) -> &DeviceInfo {
        &self.0
    }
    fn read_config(&self, _: u64, _: &mut [u8]) {}
    fn activate(&mut self, activation: Activation) -> io::Result<Activated> {
        let handler = Box::new(Waiting(self.1.clone(), self.2.clone(), vec![]));
        Ok(Activated::Here(vec![Share { queues: activation.queues, handler }]))
    }
}

/// Creates a slow device, with the flag that lets it finish and the flag that reports a taken request.
fn slow(ram: &GuestRam) -> (MmioTransport, Arc<AtomicBool>, Arc<AtomicBool>) {
    let info = DeviceInfo { queue_sizes: vec![8], name: "slow".into(), ..Multi::new().info };
    let [finish, taken] = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
    (transport(ram, Slow(info, finish.clone(), taken.clone())), finish, taken)
}

/// Adds a request and waits until it is taken: the device cannot be stuck before that.
fn ask(driver: &mut FakeDriver<'_>, taken: &AtomicBool) {
    driver.queues[0].add(&[inn(B, 1)]).unwrap();
    driver.kick(0);
    let deadline = Instant::now() + DRAIN_DEADLINE;
    while !taken.swap(false, Ordering::SeqCst) {
        assert!(Instant::now() < deadline, "the request is not taken");
        std::thread::yield_now();
    }
}

#[test]
fn a_stuck_device_is_named_and_reset_when_it_lets_go() {
    let ram = ram();
    let (transport, finish, taken) = slow(&ram);
    let mut driver = FakeDriver::new(&transport, &ram);
    driver.start(0, RING, 8);
    ask(&mut driver, &taken);
    driver.set(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 15 | NEEDS_RESET, "the reset is not over");
    let begin = Instant::now();
    assert!(transport.pause().unwrap_err().to_string().starts_with("slow did not finish its requests within "));
    assert!(begin.elapsed() < DRAIN_DEADLINE, "nobody waits that long twice");
    assert!(transport.save().is_err());
    finish.store(true, Ordering::SeqCst);
    driver.queues[0].wait_used();
    transport.resume();
    let deadline = Instant::now() + DRAIN_DEADLINE;
    while driver.get(VIRTIO_MMIO_STATUS) != 0 {
        assert!(Instant::now() < deadline);
        driver.set(VIRTIO_MMIO_STATUS, 0);
    }
    finish.store(true, Ordering::SeqCst);
    driver.start(0, RING, 8);
    assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 15);
}

/// Checks that a pause does not lose a disk that takes long to flush.
#[test]
fn a_pause_that_was_too_short_is_survived() {
    let ram = ram();
    let (transport, finish, taken) = slow(&ram);
    let mut driver = FakeDriver::new(&transport, &ram);
    driver.start(0, RING, 8);
    ask(&mut driver, &taken);
    // As if it had been paused once before: the pause does not wait long.
    transport.lock().stuck = true;
    transport.pause().unwrap_err();
    assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 15);
    finish.store(true, Ordering::SeqCst);
    transport.resume();
    assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 15);
    assert!(driver.queues[0].take_used().is_some());
    ask(&mut driver, &taken);
    transport.pause().unwrap();
    assert!(driver.queues[0].take_used().is_some());
}

mod random {
    use super::*;
    use proptest::prelude::*;

    /// Accesses mostly as drivers make them, sometimes arbitrary.
    fn access() -> impl Strategy<Value = (u64, u64, usize, bool)> {
        let register = prop_oneof![
            8 => prop::sample::select(vec![0u64, 0x10, 0x14, 0x20, 0x24, 0x30, 0x34, 0x38, 0x44, 0x50, 0x60, 0x64, 0x70,
                0x80, 0x84, 0x90, 0x94, 0xA0, 0xA4, 0xAC, 0xB0, 0xC0, 0xFC, 0x100]),
            1 => 0..0x1000u64,
        ];
        let value = prop_oneof![
            6 => prop::sample::select(vec![0u64, 1, 2, 3, 8, 11, 15, 0x1000, 0x2000, 0x3000, 64]),
            1 => any::<u64>(),
        ];
        let width = prop_oneof![20 => Just(4), 1 => 1..=8usize];
        (register, value, width, any::<bool>())
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_access_is_survived(accesses in prop::collection::vec(access(), 1..120), accept in any::<bool>()) {
            let ram = ram();
            let transport = transport(&ram, Multi::new());
            let mut driver = FakeDriver::new(&transport, &ram);
            if accept {
                driver.negotiate(driver.offered());
            }
            for (register, value, width, write) in accesses {
                let mut data = value.to_le_bytes();
                match write {
                    true => transport.write(register, &data[..width]),
                    false => transport.read(register, &mut data[..width]),
                }
            }
            driver.start(0, RING, 8);
            driver.queues[0].add(&[out(B, 9)]).unwrap();
            driver.kick(0);
            prop_assert_eq!(driver.queues[0].wait_used().1, 9);
            transport.stop().unwrap();
        }
    }
}
