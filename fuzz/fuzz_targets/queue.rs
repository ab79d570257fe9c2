//! Chains directly from memory: the fuzzer decides every descriptor, ring and index.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vireo::memory::GuestRam;
use vireo::virtio::queue::{Queue, QueueState};

// The input is the parameters of the ring, then its memory.
fuzz_target!(|data: &[u8]| {
    let Some((head, memory)) = data.split_at_checked(8) else { return };
    let ram = GuestRam::anonymous(64 << 10);
    let _ = ram.write(0, &memory[..memory.len().min(64 << 10)]);
    let at = |i: usize| u64::from(head[i]) * 16;
    let state = QueueState {
        ready: true,
        size: 1 << (head[0] & 7),
        desc: at(1),
        avail: at(2),
        used: at(3),
        next_avail: head[4].into(),
        next_used: head[5].into(),
    };
    let features = u64::from(head[6]) << 28;
    let Ok(mut queue) = Queue::new(0, state, 64, features, &ram) else { return };
    for _ in 0..256 {
        let Ok(Some(chain)) = queue.pop(&ram) else { break };
        let (mut reader, mut writer) = (chain.reader(&ram), chain.writer(&ram));
        let (readable, writable) = (reader.len(), writer.len());
        assert_eq!(readable, chain.readable().iter().map(|s| u64::from(s.len)).sum::<u64>());
        for segment in chain.readable().iter().chain(chain.writable()) {
            assert!(segment.len > 0 && ram.contains(segment.addr, segment.len.into()));
        }
        let mut bytes = vec![0; readable.min(1000) as usize];
        reader.read(&mut bytes).unwrap();
        bytes.truncate(writable.min(1000) as usize);
        writer.write(&bytes).unwrap();
        if queue.push_used(&ram, chain, 1).is_err() || queue.needs_notification(&ram).is_err() {
            break;
        }
    }
});
