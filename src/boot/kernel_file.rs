//! File format of a cached kernel: a header page (JSON after magic number, length and checksum); the kernel's memory
//! image in whole pages, so that it can be mapped into a guest; and the kernel's relocations.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

use super::image::{Image, ImageInfo, Piece};
use super::kaslr;
use crate::layout::{MMIO_HOLE, PAGE_SIZE};

/// Magic number of a kernel file; its last byte is the version of the format.
const MAGIC: [u8; 8] = *b"vireo-k2";
/// Space for the header in a kernel file.
pub(super) const HEADER: u64 = 16 << 10;
/// Pieces with a gap smaller than this between them are merged.
const GAP_MAX: u64 = 1 << 20;

/// The header of a kernel file.
#[derive(Serialize, Deserialize)]
pub(super) struct Header {
    pub(super) key: String,
    pub(super) info: ImageInfo,
    pub(super) relocations: Option<[u32; 3]>,
    pub(super) relocations_at: u64,
    pub(super) len: u64,
    pub(super) crc: u32,
}

impl Header {
    /// Returns whether every number in the header is one that [`super::cache::Cache::keep`] could have written.
    pub(super) fn is_sound(&self) -> bool {
        let page = |n: u64| n.is_multiple_of(PAGE_SIZE);
        let info = &self.info;
        let mut end = info.start;
        let pieces = info.pieces.iter().all(|piece| {
            let sound = page(piece.paddr | piece.offset | piece.len)
                && piece.paddr >= end
                && piece.offset >= HEADER
                && piece.len <= MMIO_HOLE
                && piece.offset.checked_add(piece.len).is_some_and(|end| end <= self.relocations_at);
            end = piece.paddr.saturating_add(piece.len);
            sound
        });
        let inside = |entry: u64| (info.start..info.end).contains(&entry);
        pieces
            && page(info.start | info.end)
            && end <= info.end
            && info.start < info.end
            && info.end <= MMIO_HOLE
            && info.entry64.is_none_or(inside)
            && info.pvh.is_none_or(|entry| inside(entry.into()))
            && self.relocations_at <= self.len
            && self.len - self.relocations_at <= kaslr::TABLES_MAX
    }
}

/// Rounds pieces to whole pages, merges neighbours, and places them one after another in the file.
pub(super) fn chunks(pieces: &[Piece]) -> Vec<Piece> {
    let mut chunks: Vec<Piece> = Vec::new();
    for piece in pieces {
        let start = piece.paddr / PAGE_SIZE * PAGE_SIZE;
        let end = (piece.paddr + piece.len).next_multiple_of(PAGE_SIZE);
        match chunks.last_mut() {
            Some(last) if start < last.paddr + last.len + GAP_MAX => last.len = end - last.paddr,
            _ => chunks.push(Piece { paddr: start, offset: 0, len: end - start }),
        }
    }
    let mut offset = HEADER;
    for chunk in &mut chunks {
        chunk.offset = offset;
        offset += chunk.len;
    }
    chunks
}

/// Writer that counts the bytes of the file and computes their checksum.
struct Summing<'a> {
    file: &'a File,
    crc: flate2::Crc,
    written: u64,
}

impl Write for Summing<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let n = self.file.write_at(buffer, HEADER + self.written)?;
        self.crc.update(&buffer[..n]);
        self.written += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes everything after the header and returns its checksum.
pub(super) fn write_data(file: &File, chunks: &[Piece], image: &Image, relocations: &[u8]) -> io::Result<u32> {
    let summing = Summing { file, crc: flate2::Crc::new(), written: 0 };
    let mut out = BufWriter::with_capacity(256 << 10, summing);
    let mut pieces = image.info.pieces.iter().peekable();
    for chunk in chunks {
        let mut at = chunk.paddr;
        while let Some(piece) = pieces.next_if(|piece| piece.paddr < chunk.paddr + chunk.len) {
            io::copy(&mut io::repeat(0).take(piece.paddr - at), &mut out)?;
            let mut reader = image.data.reader(piece.offset, piece.len).map_err(io::Error::other)?;
            if io::copy(&mut reader, &mut out)? != piece.len {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
            }
            at = piece.paddr + piece.len;
        }
        io::copy(&mut io::repeat(0).take(chunk.paddr + chunk.len - at), &mut out)?;
    }
    out.write_all(relocations)?;
    let summing = out.into_inner().map_err(io::IntoInnerError::into_error)?;
    Ok(summing.crc.sum())
}

pub(super) fn write_header(file: &File, header: &Header) -> io::Result<()> {
    let json = serde_json::to_vec(header)?;
    let mut bytes = MAGIC.to_vec();
    bytes.extend((json.len() as u32).to_le_bytes());
    bytes.extend(crc(&json).to_le_bytes());
    bytes.extend(json);
    if bytes.len() as u64 > HEADER {
        return Err(io::Error::other("its header is too large"));
    }
    file.write_all_at(&bytes, 0)
}

pub(super) fn read_header(file: &File) -> io::Result<Header> {
    let mut fixed = [0; 16];
    file.read_exact_at(&mut fixed, 0)?;
    let word = |at: usize| u32::from_le_bytes([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]]);
    let (len, sum) = (word(8), word(12));
    if fixed[..8] != MAGIC || u64::from(len) > HEADER {
        return Err(damaged("bad magic number"));
    }
    let mut json = vec![0; len as usize];
    file.read_exact_at(&mut json, 16)?;
    if crc(&json) != sum {
        return Err(damaged("bad header checksum"));
    }
    Ok(serde_json::from_slice(&json)?)
}

fn crc(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}

/// Reads `start..end` of a file in blocks.
pub(super) fn for_each_block(file: &File, start: u64, end: u64, mut each: impl FnMut(&[u8])) -> io::Result<()> {
    let mut buffer = vec![0; 128 << 10];
    let mut at = start;
    while at < end {
        let want = (end - at).min(buffer.len() as u64) as usize;
        file.read_exact_at(&mut buffer[..want], at)?;
        each(&buffer[..want]);
        at += want as u64;
    }
    Ok(())
}

pub(super) fn checksum(file: &File, start: u64, end: u64) -> io::Result<u32> {
    let mut crc = flate2::Crc::new();
    for_each_block(file, start, end, |block| crc.update(block))?;
    Ok(crc.sum())
}

pub(super) fn damaged(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbouring_pieces_share_pages() {
        let piece = |paddr, len| Piece { paddr, offset: 7, len };
        let joined = chunks(&[piece(0x100_0000, 10), piece(0x100_0800, 0x1000), piece(0x200_0001, 1)]);
        let chunk = |paddr, offset, len| Piece { paddr, offset, len };
        assert_eq!(joined, [chunk(0x100_0000, HEADER, 0x2000), chunk(0x200_0000, HEADER + 0x2000, 0x1000)]);
    }
}
