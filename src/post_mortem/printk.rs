//! The kernel's log, read from guest memory: the ring buffer of printk since Linux 5.10
//! (kernel/printk/printk_ringbuffer.h), and the buffer of records before that.
//!
//! Sizes and addresses that the guest states are bounded here. A value that makes no sense ends the reading, with the
//! lines read so far.

use std::collections::VecDeque;

use super::kernel::Kernel;

/// Largest number of descriptors of the ring that are read.
const DESCRIPTORS_MAX: u64 = 4096;
/// Largest number of bytes of an old buffer that are read.
const BUFFER_MAX: u64 = 1 << 20;
/// Number of bytes of one record that are shown; the kernel's own limit is about 1 KiB.
const TEXT_MAX: u64 = 4096;

/// Returns the last lines with their times, oldest first; `None` if no log is found.
pub fn last_lines(kernel: &Kernel<'_>, count: usize) -> Option<Vec<String>> {
    let lines = match Ring::find(kernel) {
        Some(ring) => ring.last_lines(count),
        None => last_records(kernel, count)?,
    };
    (!lines.is_empty()).then_some(lines)
}

/// Returns the lines of one record.
fn lines(time: u64, text: &[u8]) -> Vec<String> {
    let (seconds, micros) = (time / 1_000_000_000, time / 1000 % 1_000_000);
    let text = String::from_utf8_lossy(text);
    text.lines().map(|line| format!("[{seconds:5}.{micros:06}] {line}")).collect()
}

/// Location of the ring's parts: first addresses, then layouts.
struct Ring<'a> {
    kernel: &'a Kernel<'a>,
    descs: u64,
    infos: u64,
    data: u64,
    data_len: u64,
    /// Number of descriptors.
    count: u64,
    /// Numbers of the newest and of the oldest descriptor.
    head: u64,
    tail: u64,
    desc_len: u64,
    state: u64,
    begin: u64,
    next: u64,
    info_len: u64,
    time: u64,
    text_len: u64,
}

/// Mask of the number in a descriptor's state; the two bits above are its state.
const ID: u64 = (1 << 62) - 1;

impl<'a> Ring<'a> {
    fn find(k: &'a Kernel<'a>) -> Option<Self> {
        let ring = k.number::<8>(k.symbol("prb")?)?;
        let at = |base: u64, member: &str| base.checked_add(k.offset(member)?);
        let descs = at(ring, "printk_ringbuffer.desc_ring")?;
        let data = at(ring, "printk_ringbuffer.text_data_ring")?;
        let counter = k.offset("atomic_long_t.counter")?;
        let counted = |member: &str| k.number::<8>(at(descs, member)?.checked_add(counter)?);
        let power = |bits: u64| (bits <= 30).then(|| 1u64 << bits);
        let block = k.offset("prb_desc.text_blk_lpos")?;
        Some(Ring {
            kernel: k,
            descs: k.number::<8>(at(descs, "prb_desc_ring.descs")?)?,
            infos: k.number::<8>(at(descs, "prb_desc_ring.infos")?)?,
            data: k.number::<8>(at(data, "prb_data_ring.data")?)?,
            data_len: power(k.number::<4>(at(data, "prb_data_ring.size_bits")?)?)?,
            count: power(k.number::<4>(at(descs, "prb_desc_ring.count_bits")?)?)?,
            head: counted("prb_desc_ring.head_id")? & ID,
            tail: counted("prb_desc_ring.tail_id")? & ID,
            desc_len: k.size("prb_desc")?,
            state: k.offset("prb_desc.state_var")?.checked_add(counter)?,
            begin: block.checked_add(k.offset("prb_data_blk_lpos.begin")?)?,
            next: block.checked_add(k.offset("prb_data_blk_lpos.next")?)?,
            info_len: k.size("printk_info")?,
            time: k.offset("printk_info.ts_nsec")?,
            text_len: k.offset("printk_info.text_len")?,
        })
    }

    fn last_lines(&self, count: usize) -> Vec<String> {
        let mut found = VecDeque::new();
        let mut id = self.head;
        for _ in 0..self.count.min(DESCRIPTORS_MAX) {
            for line in self.record(id).unwrap_or_default().into_iter().rev() {
                found.push_front(line);
            }
            if found.len() >= count || id == self.tail {
                break;
            }
            id = id.wrapping_sub(1) & ID;
        }
        let surplus = found.len().saturating_sub(count);
        found.into_iter().skip(surplus).collect()
    }

    /// Returns the lines of the descriptor with this number, if it has any.
    fn record(&self, id: u64) -> Option<Vec<String>> {
        let k = self.kernel;
        let index = id % self.count;
        let desc = self.descs.checked_add(index.checked_mul(self.desc_len)?)?;
        let state = k.number::<8>(desc.checked_add(self.state)?)?;
        // State 1 is committed, 2 is finalized.
        if state & ID != id || !matches!(state >> 62, 1 | 2) {
            return None;
        }
        let begin = k.number::<8>(desc.checked_add(self.begin)?)?;
        let next = k.number::<8>(desc.checked_add(self.next)?)?;
        // An odd position marks a record without text.
        if begin & 1 != 0 {
            return None;
        }
        let (begin, next) = (begin % self.data_len, next % self.data_len);
        // A block that would not fit at the end starts at the beginning of the ring; each block starts with its number.
        let begin = if begin > next { 0 } else { begin }.checked_add(8)?;
        let info = self.infos.checked_add(index.checked_mul(self.info_len)?)?;
        let time = k.number::<8>(info.checked_add(self.time)?)?;
        let len = k.number::<2>(info.checked_add(self.text_len)?)?.min(next.saturating_sub(begin)).min(TEXT_MAX);
        let mut text = vec![0; len as usize];
        k.read(self.data.checked_add(begin)?, &mut text)?;
        Some(lines(time, &text))
    }
}

/// Returns the last lines of `log_buf` as it was from Linux 3.11 to 5.9: consecutive records, where a length of 0 means
/// that the next record is at the start.
fn last_records(k: &Kernel<'_>, count: usize) -> Option<Vec<String>> {
    let buffer = k.number::<8>(k.symbol("log_buf")?)?;
    let size = k.number::<4>(k.symbol("log_buf_len")?)?;
    let first = k.number::<4>(k.symbol("log_first_idx")?)?;
    let end = k.number::<4>(k.symbol("log_next_idx")?)?;
    let header = k.size("printk_log")?;
    let member = |name: &str| k.offset(&format!("printk_log.{name}"));
    let (time, len, text_len) = (member("ts_nsec")?, member("len")?, member("text_len")?);
    let mut found = VecDeque::new();
    let (mut at, mut read) = (first, 0);
    while at != end && at < size && read < BUFFER_MAX {
        let record = buffer.checked_add(at)?;
        let Some(len) = k.number::<2>(record.checked_add(len)?) else { break };
        if len == 0 {
            // Two zero lengths in a row are nonsense; counting them as bytes read ends the loop.
            (at, read) = (0, read + BUFFER_MAX / 4);
            continue;
        }
        if len < header {
            break;
        }
        let time = k.number::<8>(record.checked_add(time)?)?;
        let text_len = k.number::<2>(record.checked_add(text_len)?)?.min(len - header).min(TEXT_MAX);
        let mut text = vec![0; text_len as usize];
        k.read(record.checked_add(header)?, &mut text)?;
        for line in lines(time, &text) {
            found.push_back(line);
            if found.len() > count {
                found.pop_front();
            }
        }
        (at, read) = (at + len, read + len);
    }
    Some(found.into())
}

#[cfg(test)]
mod tests {
    use super::super::kernel::IMAGE_MAP;
    use super::super::kernel::testing::guest;
    use super::*;
    use crate::memory::GuestRam;
    use proptest::prelude::*;

    /// Location of the image in physical memory, then of the parts in the image.
    const PHYS: u64 = 1 << 20;
    const PRB: u64 = 0x1_0000;
    const RING: u64 = 0x1_0100;
    const DESCS: u64 = 0x1_1000;
    const INFOS: u64 = 0x1_2000;
    const DATA: u64 = 0x1_3000;
    /// Number of descriptors, then bytes of text.
    const COUNT: u64 = 8;
    const DATA_LEN: u64 = 256;

    fn put<const N: usize>(ram: &GuestRam, at: u64, numbers: [u64; N]) {
        ram.write(PHYS + at, &numbers.map(u64::to_le_bytes).concat()).unwrap();
    }

    /// Creates a ring like that of Linux 6.1 with these records: state, time, text.
    fn ring(records: &[(u64, u64, &str)]) -> GuestRam {
        let ram = guest(&format!(
            "SYMBOL(prb)={:x}\nOFFSET(printk_ringbuffer.desc_ring)=0\nOFFSET(printk_ringbuffer.text_data_ring)=48\n\
             OFFSET(prb_desc_ring.count_bits)=0\nOFFSET(prb_desc_ring.descs)=8\nOFFSET(prb_desc_ring.infos)=16\n\
             OFFSET(prb_desc_ring.head_id)=24\nOFFSET(prb_desc_ring.tail_id)=32\nSIZE(prb_desc)=24\n\
             OFFSET(prb_desc.state_var)=0\nOFFSET(prb_desc.text_blk_lpos)=8\nOFFSET(prb_data_blk_lpos.begin)=0\n\
             OFFSET(prb_data_blk_lpos.next)=8\nSIZE(printk_info)=88\nOFFSET(printk_info.ts_nsec)=8\n\
             OFFSET(printk_info.text_len)=16\nOFFSET(prb_data_ring.size_bits)=0\nOFFSET(prb_data_ring.data)=8\n\
             OFFSET(atomic_long_t.counter)=0\n",
            IMAGE_MAP + PRB
        ));
        put(&ram, PRB, [IMAGE_MAP + RING]);
        // The numbers start just below their limit, as in a real kernel, so that they overflow soon.
        let first = ID - 1;
        let id = |n: usize| first.wrapping_add(n as u64) & ID;
        let tail = id(records.len().saturating_sub(COUNT as usize));
        put(&ram, RING, [3, IMAGE_MAP + DESCS, IMAGE_MAP + INFOS, id(records.len() - 1), tail, 0, 8, IMAGE_MAP + DATA]);
        let mut begin = 0u64;
        for (n, (state, time, text)) in records.iter().enumerate() {
            let len = (8 + text.len() as u64).next_multiple_of(8);
            let wraps = begin % DATA_LEN + len >= DATA_LEN;
            let next = if wraps { begin.next_multiple_of(DATA_LEN) + len } else { begin + len };
            let at = if wraps { 0 } else { begin % DATA_LEN };
            let index = id(n) % COUNT;
            put(&ram, DESCS + index * 24, [id(n) | state << 62, begin, next]);
            put(&ram, INFOS + index * 88, [n as u64, *time, text.len() as u64]);
            put(&ram, DATA + at, [id(n)]);
            ram.write(PHYS + DATA + at + 8, text.as_bytes()).unwrap();
            begin = next;
        }
        ram
    }

    fn last(ram: &GuestRam, count: usize) -> Option<Vec<String>> {
        last_lines(&Kernel::find(ram).unwrap(), count)
    }

    #[test]
    fn records_of_the_ring() {
        let ram = ring(&[
            (2, 0, "first"),
            (2, 1_000_000, "two\nlines"),
            (3, 2_000_000, "gone"),
            (0, 3_000_000, "half written"),
            (1, 61_000_007_999, "last"),
        ]);
        let all = ["[    0.000000] first", "[    0.001000] two", "[    0.001000] lines", "[   61.000007] last"];
        assert_eq!(last(&ram, 50).unwrap(), all);
        assert_eq!(last(&ram, 2).unwrap(), all[2..]);
    }

    #[test]
    fn numbers_and_text_wrap() {
        let texts: Vec<String> = (0..40).map(|n| format!("record {n} {}", "x".repeat(n))).collect();
        let records: Vec<_> = texts.iter().map(|text| (2, 0, text.as_str())).collect();
        let found = last(&ring(&records), 3).unwrap();
        let wanted: Vec<_> = texts[37..].iter().map(|text| format!("[    0.000000] {text}")).collect();
        assert_eq!(found, wanted);
    }

    #[test]
    fn records_of_an_old_buffer() {
        let ram = guest(&format!(
            "SYMBOL(log_buf)={:x}\nSYMBOL(log_buf_len)={:x}\nSYMBOL(log_first_idx)={:x}\nSYMBOL(log_next_idx)={:x}\n\
             SIZE(printk_log)=16\nOFFSET(printk_log.ts_nsec)=0\nOFFSET(printk_log.len)=8\n\
             OFFSET(printk_log.text_len)=10\n",
            IMAGE_MAP + PRB,
            IMAGE_MAP + PRB + 8,
            IMAGE_MAP + PRB + 12,
            IMAGE_MAP + PRB + 16
        ));
        put(&ram, PRB, [IMAGE_MAP + DATA, 128 | 64 << 32, 32]);
        for (at, time, text) in [(64, 0, "old"), (0, 1_500_000_000, "new")] {
            put(&ram, DATA + at, [time, 32 | 3 << 16]);
            ram.write(PHYS + DATA + at + 16, text.as_bytes()).unwrap();
        }
        assert_eq!(last(&ram, 50).unwrap(), ["[    0.000000] old", "[    1.500000] new"]);
        assert_eq!(last(&ram, 1).unwrap(), ["[    1.500000] new"]);
        // All lengths are 0.
        put(&ram, DATA, [0; 16]);
        assert_eq!(last(&ram, 50), None);
    }

    proptest! {
        #[test]
        fn rings_of_noise_end(place in 0usize..40, noise in any::<u64>()) {
            let ram = ring(&[(2, 0, "first"), (2, 0, "second")]);
            let at = [RING, DESCS, INFOS, PRB][place % 4] + place as u64 / 4 * 8;
            for noise in [noise, noise % 64, noise | 1 << 63, noise << 40] {
                put(&ram, at, [noise]);
                prop_assert!(last(&ram, 50).unwrap_or_default().len() <= 50);
            }
        }
    }
}
