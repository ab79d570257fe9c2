//! The kernel's log, read from guest memory: the ring of printk since Linux 5.10 (kernel/printk/printk_ringbuffer.h),
//! and the buffer of records before that.
//!
//! What the guest says of sizes and places is bounded here; what makes no sense ends the reading, with the lines that
//! there are until then.

use std::collections::VecDeque;

use super::kernel::Kernel;

/// Descriptors of the ring that are looked at.
const DESCRIPTORS_MAX: u64 = 4096;
/// Bytes of an old buffer that are looked at.
const BUFFER_MAX: u64 = 1 << 20;
/// Bytes of one record that are shown; the kernel's own limit is about 1 KiB.
const TEXT_MAX: u64 = 4096;

/// The last lines with their times, oldest first; `None` if no log is found.
pub fn last_lines(kernel: &Kernel<'_>, count: usize) -> Option<Vec<String>> {
    let lines = match Ring::find(kernel) {
        Some(ring) => ring.last_lines(count),
        None => last_records(kernel, count)?,
    };
    (!lines.is_empty()).then_some(lines)
}

/// The lines of one record.
fn lines(time: u64, text: &[u8]) -> Vec<String> {
    let (seconds, micros) = (time / 1_000_000_000, time / 1000 % 1_000_000);
    let text = String::from_utf8_lossy(text);
    text.lines().map(|line| format!("[{seconds:5}.{micros:06}] {line}")).collect()
}

/// Where the parts of the ring are: fixed addresses, then layouts.
struct Ring<'a> {
    kernel: &'a Kernel<'a>,
    descs: u64,
    infos: u64,
    data: u64,
    data_len: u64,
    /// How many descriptors there are.
    count: u64,
    /// The newest and the oldest descriptor's number.
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

/// Bits of a descriptor's number; the two above are its state.
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

    /// The lines of the descriptor with this number, if it has any.
    fn record(&self, id: u64) -> Option<Vec<String>> {
        let k = self.kernel;
        let index = id % self.count;
        let desc = self.descs.checked_add(index.checked_mul(self.desc_len)?)?;
        let state = k.number::<8>(desc.checked_add(self.state)?)?;
        // 1 is committed, 2 finalized.
        if state & ID != id || !matches!(state >> 62, 1 | 2) {
            return None;
        }
        let begin = k.number::<8>(desc.checked_add(self.begin)?)?;
        let next = k.number::<8>(desc.checked_add(self.next)?)?;
        // An odd position stands for a record without text.
        if begin & 1 != 0 {
            return None;
        }
        let (begin, next) = (begin % self.data_len, next % self.data_len);
        // A block that would not fit at the end begins at the start; each begins with its number.
        let begin = if begin > next { 0 } else { begin }.checked_add(8)?;
        let info = self.infos.checked_add(index.checked_mul(self.info_len)?)?;
        let time = k.number::<8>(info.checked_add(self.time)?)?;
        let len = k.number::<2>(info.checked_add(self.text_len)?)?.min(next.saturating_sub(begin)).min(TEXT_MAX);
        let mut text = vec![0; len as usize];
        k.read(self.data.checked_add(begin)?, &mut text)?;
        Some(lines(time, &text))
    }
}

/// The last lines of `log_buf` as it was from Linux 3.11 to 5.9: records one behind the other, a length of 0 for going on
/// at the start.
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
            // Twice in a row is nonsense, and ends by what was read.
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
