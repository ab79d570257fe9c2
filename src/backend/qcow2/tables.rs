//! The tables of a qcow2 image, checked before the format's driver uses them.
//!
//! An image that is only read needs a sound first-level table: the driver checks everything else when it uses it. An
//! image that is written to is checked as a whole. Every cluster in use must be counted, or the driver would allocate
//! it a second time. A table's clusters must have no other use, or a guest could change tables by writing to its disk.
//! Clusters that the driver writes in place must have only one user.
//!
//! A monitor that was killed leaves clusters in use that are not counted: imago writes an entry of the first level
//! before the count of the table that it refers to. Such clusters are counted here, as QEMU does for images that were
//! not closed.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::header::{Header, Table};
use super::storage::Piece;
use super::{read_at, write_at};

/// Maximum number of clusters in a file that is written to: the check takes a byte of memory for each.
const MAX_CLUSTERS: u64 = 1 << 28;

/// Bits of an entry of the first level: the table's offset, reserved bits, and "no other reference".
const OFFSET: u64 = 0x00FF_FFFF_FFFF_FE00;
const L1_RESERVED: u64 = 0x7F00_0000_0000_01FF;
const COPIED: u64 = 1 << 63;
/// Bits of an entry of the second level, for a cluster that is not compressed.
const L2_RESERVED: u64 = 0x3F00_0000_0000_01FE;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
/// Reserved bits of an entry of the reference count table.
const REFCOUNTS_RESERVED: u64 = 0xFF00_0000_0000_01FF;

/// Reads and checks the tables, and adds missing reference counts. Returns the tables that the driver keeps in memory,
/// as they were when checked. `end` is the size of the file.
pub(super) fn check(file: &File, header: &Header, end: u64, writable: bool) -> io::Result<Vec<Piece>> {
    let read = |table: Table| read_at(file, table.offset, (table.entries * 8) as usize);
    let l1 = read(header.l1)?;
    let mut check = Check { clusters: end.div_ceil(header.cluster()), ..Check::new(file, header) };
    if !writable {
        for entry in entries(&l1) {
            check.table_at(entry, L1_RESERVED, "a second-level table")?;
        }
        return Ok(vec![(header.l1.offset, l1)]);
    }
    if check.clusters > MAX_CLUSTERS {
        return broken(format!(
            "its file has {} clusters, but vireo writes only to images of at most {MAX_CLUSTERS}; use larger clusters: \
             'qemu-img convert -O qcow2 -o cluster_size=2M'",
            check.clusters
        ));
    }
    check.notes = vec![0; check.clusters as usize];
    let refcounts = read(header.refcounts)?;
    check.reference_counts(&refcounts)?;
    for (at, bytes) in [(0, 1), (header.l1.offset, l1.len() as u64), (header.refcounts.offset, refcounts.len() as u64)]
    {
        check.tables(at, bytes)?;
    }
    let tables = l1_tables(&mut check, &l1)?;
    for (table, copied) in tables {
        check.second_level(table, copied)?;
    }
    check.shares()?;
    check.count_missing()?;
    Ok(vec![(header.l1.offset, l1), (header.refcounts.offset, refcounts)])
}

/// Notes all second-level tables, before any of their entries is examined.
fn l1_tables(check: &mut Check<'_>, l1: &[u8]) -> io::Result<Vec<(u64, bool)>> {
    let mut tables = Vec::new();
    for entry in entries(l1) {
        let Some(offset) = check.table_at(entry, L1_RESERVED, "a second-level table")? else { continue };
        check.tables(offset, 1)?;
        let copied = entry & COPIED != 0;
        if copied {
            check.alone(offset)?;
        }
        tables.push((offset, copied));
    }
    Ok(tables)
}

fn entries(table: &[u8]) -> impl Iterator<Item = u64> {
    table.chunks_exact(8).filter_map(|entry| entry.try_into().ok()).map(u64::from_be_bytes)
}

/// Parts of a table of `len` bytes that the file system has stored, each with its offset in the file. What is left out are
/// zeros: a small file may have very many tables that are nothing but holes.
fn allocated(file: &File, offset: u64, len: u64) -> impl Iterator<Item = (u64, io::Result<Vec<u8>>)> {
    let end = offset + len;
    let mut at = offset;
    std::iter::from_fn(move || {
        // An error other than "no more data" means that the file system does not know: all is data then.
        let seek = |at: SeekFrom| rustix::fs::seek(file, at);
        let data = match seek(SeekFrom::Data(at)) {
            Err(Errno::NXIO) => end,
            found => found.unwrap_or(at),
        };
        if at >= end || data >= end {
            return None;
        }
        let hole = seek(SeekFrom::Hole(data)).unwrap_or(end).clamp(data + 1, end);
        // Whole entries, of a byte or eight.
        let (from, to) = (data & !7, hole.next_multiple_of(8).min(end));
        at = to;
        Some((from, read_at(file, from, (to - from) as usize)))
    })
}

fn broken<T>(why: impl Into<String>) -> io::Result<T> {
    Err(io::Error::new(io::ErrorKind::InvalidData, why.into()))
}

/// Bits of a note about a cluster: its reference count (0, once, more), and its uses.
const ONCE: u8 = 1;
const MORE: u8 = 2;
const TABLE: u8 = 4;
const DATA: u8 = 8;
const PACKED: u8 = 16;

struct Check<'a> {
    file: &'a File,
    header: &'a Header,
    /// Number of clusters in the file; the last one may be incomplete.
    clusters: u64,
    notes: Vec<u8>,
    /// Offsets of the reference count blocks, by the first cluster that each counts.
    blocks: BTreeMap<u64, u64>,
    /// Number of pieces of compressed data in each cluster; empty if no cluster is compressed.
    pieces: Vec<u32>,
    /// Clusters that are used once but not counted.
    missing: Vec<u64>,
}

impl<'a> Check<'a> {
    fn new(file: &'a File, header: &'a Header) -> Self {
        let (notes, blocks, pieces, missing) = (Vec::new(), BTreeMap::new(), Vec::new(), Vec::new());
        Check { file, header, clusters: 0, notes, blocks, pieces, missing }
    }

    fn per_block(&self) -> u64 {
        (self.header.cluster() * 8) >> self.header.refcount_order
    }

    /// Returns the offset in a table's entry, which must be that of a cluster in the file; `None` for an empty entry.
    fn table_at(&self, entry: u64, reserved: u64, what: &str) -> io::Result<Option<u64>> {
        let offset = entry & OFFSET;
        if entry & reserved != 0 || offset & (self.header.cluster() - 1) != 0 {
            return broken(format!("its entry {entry:#018x} for {what} makes no sense"));
        }
        if offset >> self.header.cluster_bits >= self.clusters {
            return broken(format!("{what} at {offset:#x} is past the end of the file"));
        }
        Ok((offset != 0).then_some(offset))
    }

    /// Notes the reference counts of all clusters in the file.
    fn reference_counts(&mut self, table: &[u8]) -> io::Result<()> {
        let (cluster, order) = (self.header.cluster(), self.header.refcount_order);
        let per_block = self.per_block();
        for (n, entry) in entries(table).enumerate() {
            match self.table_at(entry, REFCOUNTS_RESERVED, "a block of reference counts")? {
                Some(offset) => _ = self.blocks.insert(n as u64 * per_block, offset),
                None if n == 0 => return broken("its reference counts are broken: the first block is missing"),
                None => {}
            }
        }
        for (first, offset) in self.blocks.range(..self.clusters) {
            for (at, block) in allocated(self.file, *offset, cluster) {
                let block = block?;
                let counts = (block.len() as u64 * 8) >> order;
                let first = first + (((at - offset) * 8) >> order);
                let notes = self.notes.get_mut(first as usize..).unwrap_or_default();
                for (n, note) in notes.iter_mut().take(counts as usize).enumerate() {
                    *note |= match count(&block, n, order) {
                        0 => 0,
                        1 => ONCE,
                        _ => MORE,
                    };
                }
            }
        }
        let blocks: Vec<u64> = self.blocks.values().copied().collect();
        blocks.into_iter().try_for_each(|offset| self.tables(offset, 1))
    }

    fn note(&mut self, cluster: u64) -> io::Result<&mut u8> {
        let there = usize::try_from(cluster).ok().and_then(|n| self.notes.get_mut(n));
        there.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a cluster is past the end of the file"))
    }

    /// Notes that a table occupies all clusters of these bytes. They must have no other use.
    fn tables(&mut self, offset: u64, bytes: u64) -> io::Result<()> {
        let bits = self.header.cluster_bits;
        for cluster in offset >> bits..(offset + bytes).div_ceil(1 << bits) {
            self.refer(cluster, TABLE)?;
        }
        Ok(())
    }

    /// Notes a use of a cluster. Only pieces of compressed data may share a cluster with each other.
    fn refer(&mut self, cluster: u64, what: u8) -> io::Result<()> {
        let note = self.note(cluster)?;
        let others = *note & (TABLE | DATA | PACKED);
        let counted = *note & (ONCE | MORE) != 0;
        *note |= what | if counted { 0 } else { ONCE };
        if others != 0 && !(what == PACKED && others == PACKED) {
            return broken(format!("cluster {cluster} of its file is used for two things"));
        }
        if !counted {
            // The number of references from compressed data and snapshots is not known.
            if what == PACKED || self.header.snapshots > 0 {
                return broken(format!("its reference counts are broken: cluster {cluster} is in use and not counted"));
            }
            self.missing.push(cluster);
        }
        Ok(())
    }

    /// Checks that a cluster that is written in place is not counted more than once.
    fn alone(&mut self, offset: u64) -> io::Result<()> {
        let cluster = offset >> self.header.cluster_bits;
        if *self.note(cluster)? & MORE != 0 {
            return broken(format!("cluster {cluster} of its file is shared, but marked as not shared"));
        }
        Ok(())
    }

    /// Counts the clusters that are in use but not counted, once everything else is known to be sound.
    fn count_missing(&mut self) -> io::Result<()> {
        let mut missing = std::mem::take(&mut self.missing);
        missing.sort_unstable();
        if let Some(first) = missing.first() {
            log::warn!(
                "cluster {first} of a qcow2 image, and {} more, were not counted as in use; now they are",
                missing.len() - 1
            );
        }
        let (per_block, order) = (self.per_block(), self.header.refcount_order);
        for together in missing.chunk_by(|a, b| a / per_block == b / per_block) {
            let first = together.first().map_or(0, |cluster| cluster / per_block * per_block);
            let Some(offset) = self.blocks.get(&first) else {
                return broken(format!("its reference counts are broken: those from cluster {first} on are missing"));
            };
            let mut block = read_at(self.file, *offset, self.header.cluster() as usize)?;
            together.iter().for_each(|cluster| count_once(&mut block, (cluster - first) as usize, order));
            write_at(self.file, *offset, &block)?;
        }
        if missing.is_empty() { Ok(()) } else { self.file.sync_data() }
    }

    fn second_level(&mut self, table: u64, copied: bool) -> io::Result<()> {
        for (_, part) in allocated(self.file, table, self.header.cluster()) {
            self.second_level_part(&part?, copied)?;
        }
        Ok(())
    }

    fn second_level_part(&mut self, part: &[u8], copied: bool) -> io::Result<()> {
        let bits = self.header.cluster_bits;
        for entry in entries(part) {
            if entry & COMPRESSED != 0 {
                self.compressed(entry)?;
                continue;
            }
            // Version 2 has no zero clusters.
            let zero = if self.header.version == 2 { 0 } else { ZERO };
            let Some(offset) = self.table_at(entry & !zero, L2_RESERVED | ZERO, "a cluster")? else { continue };
            self.refer(offset >> bits, DATA)?;
            // Marks in a shared table do not count: the driver copies the table before it writes, and drops them.
            if copied && entry & COPIED != 0 {
                self.alone(offset)?;
            }
        }
        Ok(())
    }

    fn compressed(&mut self, entry: u64) -> io::Result<()> {
        let (offset, len) = compressed_range(entry, self.header.cluster_bits);
        if entry & COPIED != 0 || offset + len > u64::MAX >> 8 {
            return broken(format!("its entry {entry:#018x} for a compressed cluster makes no sense"));
        }
        if self.pieces.is_empty() {
            self.pieces = vec![0; self.notes.len()];
        }
        let bits = self.header.cluster_bits;
        for cluster in offset >> bits..=(offset + len - 1) >> bits {
            self.refer(cluster, PACKED)?;
            let pieces = self.pieces.get_mut(cluster as usize);
            pieces.into_iter().for_each(|pieces| *pieces = pieces.saturating_add(1));
        }
        Ok(())
    }

    /// Checks that clusters with compressed data are counted for each piece; otherwise they would be freed too early.
    fn shares(&self) -> io::Result<()> {
        for (first, offset) in self.blocks.range(..self.clusters) {
            let pieces = self.pieces.get(*first as usize..).unwrap_or_default();
            let pieces = pieces.get(..self.per_block() as usize).unwrap_or(pieces);
            // A single piece has a count already.
            if pieces.iter().all(|pieces| *pieces <= 1) {
                continue;
            }
            let block = read_at(self.file, *offset, self.header.cluster() as usize)?;
            for (n, pieces) in pieces.iter().enumerate() {
                if u64::from(*pieces) > count(&block, n, self.header.refcount_order) {
                    let cluster = first + n as u64;
                    return broken(format!("its reference counts are broken: cluster {cluster} has {pieces} users"));
                }
            }
        }
        Ok(())
    }
}

/// Returns the offset of compressed data and its maximum length in bytes (at least 1).
pub(super) fn compressed_range(entry: u64, cluster_bits: u32) -> (u64, u64) {
    let offset_bits = 70 - cluster_bits;
    let descriptor = entry & ((1 << 62) - 1);
    let offset = descriptor & ((1 << offset_bits) - 1) & (u64::MAX >> 8);
    (offset, ((descriptor >> offset_bits) + 1) * 512 - offset % 512)
}

/// Returns reference count `n` of a block, which has 2^`order` bits; counts smaller than a byte start at its lowest
/// bits.
fn count(block: &[u8], n: usize, order: u32) -> u64 {
    let byte = |n: usize| block.get(n).copied().unwrap_or(0);
    if order < 3 {
        let per_byte = 8 >> order;
        let shift = (n % per_byte) << order;
        return u64::from(byte(n / per_byte) >> shift & ((1 << (1 << order)) - 1));
    }
    let bytes = 1 << (order - 3);
    (0..bytes).fold(0, |value, i| value << 8 | u64::from(byte(n * bytes + i)))
}

/// Changes a count of 0 to 1.
fn count_once(block: &mut [u8], n: usize, order: u32) {
    let (byte, bit) = if order < 3 {
        let per_byte = 8 >> order;
        (n / per_byte, (n % per_byte) << order)
    } else {
        let bytes = 1 << (order - 3);
        (n * bytes + bytes - 1, 0)
    };
    if let Some(byte) = block.get_mut(byte) {
        *byte |= 1 << bit;
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn counts_of_every_width() {
        let block = [0b1110_0100, 2, 3, 4, 5, 6, 7, 8];
        assert_eq!((0..8).map(|n| count(&block, n, 0)).collect::<Vec<_>>(), [0, 0, 1, 0, 0, 1, 1, 1]);
        assert_eq!((0..4).map(|n| count(&block, n, 1)).collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert_eq!((0..3).map(|n| count(&block, n, 2)).collect::<Vec<_>>(), [4, 14, 2]);
        assert_eq!(count(&block, 1, 3), 2);
        assert_eq!(count(&block, 1, 4), 0x304);
        assert_eq!(count(&block, 1, 5), 0x0506_0708);
        assert_eq!(count(&block, 0, 6), 0xE402_0304_0506_0708);
        assert_eq!(count(&block, 1, 6), 0, "past the end");
        for order in 0..=6 {
            let mut block = [0; 64];
            count_once(&mut block, 5, order);
            assert_eq!(
                (0..8).map(|n| count(&block, n, order)).collect::<Vec<_>>(),
                [0, 0, 0, 0, 0, 1, 0, 0],
                "{order}"
            );
        }
    }

    #[test]
    fn where_compressed_data_is() {
        // 64 KiB clusters: 54 bits of offset, 8 of additional sectors.
        assert_eq!(compressed_range(COMPRESSED | 2 << 54 | 0x12_3456, 16), (0x12_3456, 3 * 512 - 0x56));
        assert_eq!(compressed_range(COMPRESSED | 0x200, 9), (0x200, 512));
        assert_eq!(compressed_range(u64::MAX, 21), ((1 << 49) - 1, (1 << 13) * 512 - 511));
    }

    #[test]
    fn holes_of_tables_are_not_read() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 40).unwrap();
        let parts = |offset, len| {
            let part = |(at, bytes): (u64, io::Result<Vec<u8>>)| (at, bytes.unwrap());
            allocated(&file, offset, len).map(part).collect::<Vec<_>>()
        };
        assert_eq!(parts(1 << 21, 1 << 39), []);
        file.write_all_at(&[7; 8], (1 << 30) + 4096).unwrap();
        file.write_all_at(&[9; 8], (1 << 31) - 8).unwrap();
        let found = parts(1 << 30, 1 << 30);
        let read: usize = found.iter().map(|(_, bytes)| bytes.len()).sum();
        assert!(read < 1 << 21, "{read}");
        let byte = |at: u64| {
            let part = found.iter().find(|(from, bytes)| (*from..from + bytes.len() as u64).contains(&at));
            part.map_or(0, |(from, bytes)| bytes[(at - from) as usize])
        };
        let at = [(1 << 30) + 4095, (1 << 30) + 4096, (1 << 30) + 4104, (1 << 31) - 9, (1 << 31) - 8, (1 << 31) - 1];
        assert_eq!(at.map(byte), [0, 7, 0, 0, 9, 9]);
        // The end of a table is kept to, whatever is after it.
        assert_eq!(
            parts((1 << 31) - (1 << 16), (1 << 16) - 8)
                .iter()
                .map(|(_, b)| b.iter().filter(|b| **b == 9).count())
                .sum::<usize>(),
            0
        );
    }
}
