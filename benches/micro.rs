//! Operations that happen millions of times a second, each measured by itself. `cargo bench --bench micro [FILTER]`.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use vireo::boot::cache::Cache;
use vireo::boot::{BootConfig, BootFiles, Platform};
use vireo::bus::{Bus, BusDevice};
use vireo::memory::GuestRam;
use vireo::virtio::RING_FEATURES;
use vireo::virtio::chain::{Chain, Table};
use vireo::virtio::testing::{FakeQueue, inn, out};

const RAM: u64 = 64 << 20;
const RING: u64 = 0x1_0000;
const TABLE: u64 = 0x8_0000;
const BUFFERS: u64 = 0x100_0000;

struct Register;

impl BusDevice for Register {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        black_box((offset, data));
    }
}

fn bus(c: &mut Criterion) {
    let mut bus = Bus::new();
    let device: Arc<dyn BusDevice> = Arc::new(Register);
    for i in 0..24 {
        bus.insert(0xD000_0000 + i * 0x1000, 0x1000, device.clone()).unwrap();
    }
    let mut data = [0; 4];
    c.bench_function("bus/read", |b| b.iter(|| bus.read(black_box(0xD000_B060), &mut data)));
    c.bench_function("bus/write", |b| b.iter(|| bus.write(black_box(0xD000_B064), &[1, 0, 0, 0])));
    c.bench_function("bus/unclaimed", |b| b.iter(|| bus.read(black_box(0xE000_0000), &mut data)));
}

/// Measures a queue of 256 requests like virtio-blk's: header, 4 KiB, status.
fn queue(c: &mut Criterion) {
    let mut group = c.benchmark_group("queue");
    group.throughput(Throughput::Elements(256));
    for (name, indirect) in [("pop_and_push_used/direct", false), ("pop_and_push_used/indirect", true)] {
        let ram = GuestRam::anonymous(RAM);
        let fill = || {
            let mut driver = FakeQueue::new(&ram, RING, 1024);
            for i in 0..256 {
                let bufs = [out(BUFFERS, 16), inn(BUFFERS + 4096 * i, 4096), inn(BUFFERS + 16, 1)];
                let added = if indirect { driver.add_indirect(TABLE + 64 * i, &bufs) } else { driver.add(&bufs) };
                added.unwrap();
            }
            driver.device(RING_FEATURES)
        };
        group.bench_function(name, |b| {
            b.iter_batched_ref(
                fill,
                |queue| {
                    while let Some(chain) = queue.pop(&ram).unwrap() {
                        queue.push_used(&ram, chain, 4097).unwrap();
                        black_box(queue.needs_notification(&ram).unwrap());
                    }
                },
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

fn chain(c: &mut Criterion) {
    let mut group = c.benchmark_group("chain");
    let ram = GuestRam::anonymous(RAM);
    for segments in [3u64, 128] {
        for indirect in [false, true] {
            let mut driver = FakeQueue::new(&ram, RING, 256);
            let mut bufs = vec![out(BUFFERS, 16)];
            bufs.extend((0..segments - 2).map(|i| inn(BUFFERS + 4096 * (i + 1), 4096)));
            bufs.push(inn(BUFFERS + 16, 1));
            let head = if indirect { driver.add_indirect(TABLE, &bufs) } else { driver.add(&bufs) };
            let head = head.unwrap();
            let table = Table { addr: driver.desc, len: 256, indirect: true };
            let name = format!("walk/{segments}/{}", if indirect { "indirect" } else { "direct" });
            let mut spare = Some(Vec::new());
            group.bench_function(name, |b| {
                b.iter(|| {
                    let chain = Chain::walk(&ram, table, black_box(head), spare.take().unwrap()).unwrap();
                    black_box(chain.writer(&ram).len());
                    spare = Some(chain.into_segments());
                });
            });
        }
    }
    group.finish();
}

/// Measures a real kernel on its way from its file to guest memory: unpacked, then from the cache with and without
/// KASLR.
fn kernel(c: &mut Criterion) {
    let image = concat!(env!("CARGO_MANIFEST_DIR"), "/target/host/images/bzImage-cloud");
    assert!(std::path::Path::new(image).exists(), "{image} is missing: run 'make setup' first");
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::at(folder.path().join("cache")).unwrap();
    let platform = Platform { cpus: 1, acpi: true, uuid: [7; 16], virtio_slots: vec![0], serial: true, clocks: false };
    let mut group = c.benchmark_group("kernel");
    group.sample_size(10);
    // An image that was only just created can be cached a moment later.
    let file = std::fs::File::open(image).unwrap();
    std::thread::sleep(cache.settles_in(&file).unwrap());
    cache.keep(&file).unwrap();
    for (name, cmdline, cache) in [
        ("unpack_and_load", "quiet", None),
        ("cached_load", "quiet", Some(&cache)),
        ("cached_load_nokaslr", "quiet nokaslr", Some(&cache)),
    ] {
        let config = BootConfig { kernel: image.into(), cmdline: cmdline.into(), ..Default::default() };
        let load = |ram: GuestRam| {
            BootFiles::open_with(&config, ram.size(), cache).unwrap().load(&ram, &platform).unwrap();
            ram
        };
        load(GuestRam::anonymous(256 << 20));
        group
            .bench_function(name, |b| b.iter_batched(|| GuestRam::anonymous(256 << 20), load, BatchSize::PerIteration));
    }
}

criterion_group!(benches, bus, queue, chain, kernel);
criterion_main!(benches);
