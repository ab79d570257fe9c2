//! The legacy LZ4 frame, in which kernels are packed: independent blocks of up to 8 MiB, each preceded by its length.
//! Each block is unpacked directly to its destination, whereas a frame reader would need a buffer in between.
//! (doc/lz4_Frame_format.md, "Legacy frame")

use std::io::{self, ErrorKind, Read};

use lz4_flex::block::{DecompressError, decompress_into};

use super::Filled;

/// Magic number of the legacy frame.
pub const LEGACY: [u8; 4] = 0x184C_2102u32.to_le_bytes();
/// Unpacked size of each block but the last.
const BLOCK: usize = 8 << 20;
/// Largest packed size of a block: random content grows by 1/255.
const PACKED_MAX: usize = BLOCK + BLOCK / 255 + 16;

/// Unpacks all blocks of `input` into `output`.
pub fn unpack_blocks(mut input: impl Read, output: &mut [u8]) -> io::Result<Filled> {
    let mut packed = Vec::new();
    let mut at = 0;
    loop {
        let mut word = [0; 4];
        match read_up_to(&mut input, &mut word)? {
            0 => return Ok(Filled::Bytes(at as u64)),
            4 => {}
            _ => return Err(ErrorKind::UnexpectedEof.into()),
        }
        // Frames may follow one another.
        if word == LEGACY {
            continue;
        }
        let len = u32::from_le_bytes(word) as usize;
        if len > PACKED_MAX {
            return Err(io::Error::new(ErrorKind::InvalidData, format!("a block claims to have {len} bytes")));
        }
        packed.resize(len, 0);
        input.read_exact(&mut packed)?;
        let space = (output.len() - at).min(BLOCK);
        match decompress_into(&packed, &mut output[at..at + space]) {
            Ok(len) => at += len,
            Err(DecompressError::OutputTooSmall { .. }) if space < BLOCK => return Ok(Filled::Overflow),
            Err(e) => return Err(io::Error::new(ErrorKind::InvalidData, e)),
        }
    }
}

/// Fills `buffer`, or less if the input ends before.
fn read_up_to(input: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut at = 0;
    while at < buffer.len() {
        match input.read(&mut buffer[at..]) {
            Ok(0) => break,
            Ok(n) => at += n,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a packed block of one repeated byte.
    fn block(byte: u8, len: usize) -> Vec<u8> {
        let packed = lz4_flex::block::compress(&vec![byte; len]);
        [&(packed.len() as u32).to_le_bytes()[..], &packed].concat()
    }

    fn unpack(parts: &[&[u8]], size: usize) -> Result<(Filled, Vec<u8>), String> {
        let mut output = vec![7; size];
        let filled = unpack_blocks(&parts.concat()[..], &mut output).map_err(|e| e.to_string())?;
        Ok((filled, output))
    }

    #[test]
    fn blocks_and_frames_follow_each_other() {
        let (one, two) = (block(1, BLOCK), block(2, 99));
        let (filled, output) = unpack(&[&LEGACY, &one, &two, &LEGACY, &two], BLOCK + 200).unwrap();
        assert_eq!(filled, Filled::Bytes(BLOCK as u64 + 198));
        assert!(output[..BLOCK].iter().all(|b| *b == 1) && output[BLOCK..BLOCK + 198].iter().all(|b| *b == 2));
        assert_eq!(output[BLOCK + 198..], [7, 7]);
        assert_eq!(unpack(&[&LEGACY], 0).unwrap().0, Filled::Bytes(0));
    }

    #[test]
    fn bounds_hold() {
        let one = block(1, 100);
        assert_eq!(unpack(&[&LEGACY, &one], 99).unwrap().0, Filled::Overflow);
        assert_eq!(unpack(&[&LEGACY, &one, &one], 100).unwrap().0, Filled::Overflow);
        assert!(unpack(&[&LEGACY, &one[..9]], 100).is_err());
        assert!(unpack(&[&LEGACY, &one, &[1, 0]], 100).is_err());
        assert!(unpack(&[&LEGACY, &block(1, BLOCK + 1)], 2 * BLOCK).is_err(), "no block has more");
        let error = unpack(&[&LEGACY, &u32::MAX.to_le_bytes(), &[0; 99]], 100).unwrap_err();
        assert_eq!(error, "a block claims to have 4294967295 bytes");
    }
}
