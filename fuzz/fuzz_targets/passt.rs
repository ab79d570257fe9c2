//! The stream of frames from and to a slow passt that sends anything.

#![no_main]

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use vireo::backend::packet::{HEADER, MAX_FRAME, MIN_FRAME, Port, Received};
use vireo::backend::passt::Passt;
use vireo::memory::{GuestRam, RamSlice};

const RAM: u64 = 1 << 20;
const STEPS: usize = 100;

/// Returns some of guest memory, in pieces.
fn slices<'a>(ram: &'a GuestRam, bytes: &mut Unstructured<'_>, total: u64) -> Result<Vec<RamSlice<'a>>> {
    let (mut slices, mut at, mut left) = (Vec::new(), bytes.int_in_range(0..=0x8_0000u64)?, total);
    while left > 0 && slices.len() < 8 {
        let len = if slices.len() == 7 { left } else { bytes.int_in_range(1..=left)? };
        slices.push(ram.slice(at, len).unwrap());
        (at, left) = (at + len, left - len);
    }
    Ok(slices)
}

/// Checks that the wire from the guest carries whole frames, whatever was refused in between.
fn check(wire: &[u8], whole: bool) {
    let mut rest = wire;
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        let length = u32::from_be_bytes(*length) as usize;
        assert!((MIN_FRAME..=MAX_FRAME).contains(&length), "invalid frame length in the stream");
        let Some(frame) = after.get(..length) else { break };
        let to_loopback = frame[12..14] == [8, 0] && frame.get(30) == Some(&127);
        assert!(!to_loopback, "a frame for the loopback");
        rest = &after[length..];
    }
    assert!(!whole || rest.is_empty());
}

fn run(data: &[u8]) -> Result<()> {
    let mut bytes = Unstructured::new(data);
    let (ours, mut its) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    its.set_nonblocking(true).unwrap();
    let ram = GuestRam::anonymous(RAM);
    let (mut passt, mut wire, mut gone) = (Passt::over(ours), Vec::new(), false);
    let mut take = |its: &mut UnixStream, most: usize| {
        let mut some = vec![0; most];
        let n = its.read(&mut some).unwrap_or(0);
        wire.extend_from_slice(&some[..n]);
    };
    for _ in 0..STEPS {
        match bytes.int_in_range(0..=7u8)? {
            0 => {
                let len = bytes.int_in_range(0..=64)?;
                let _ = its.write(bytes.bytes(usize::min(len, bytes.len()))?);
            }
            1 | 2 => {
                let len = bytes.int_in_range(MIN_FRAME..=MAX_FRAME + 1)?;
                let _ = its.write(&[&(len as u32).to_be_bytes()[..], &vec![7; len]].concat());
            }
            3 | 4 => {
                let room = bytes.int_in_range(HEADER as u64..=0x1_0100)?;
                match passt.receive(&slices(&ram, &mut bytes, room)?) {
                    Ok(Received::Packet(len)) => assert!(len <= room as usize && len >= HEADER + MIN_FRAME && !gone),
                    Ok(Received::NoRoom(len)) => {
                        assert!(len > room as usize);
                        if bytes.arbitrary()? {
                            passt.skip();
                        }
                    }
                    Err(e) => gone |= e.kind() == ErrorKind::InvalidData,
                }
            }
            5 => {
                let len = bytes.int_in_range(MIN_FRAME as u64..=MAX_FRAME as u64)?;
                let frame = slices(&ram, &mut bytes, len)?;
                let head = bytes.bytes(usize::min(54, bytes.len()))?;
                vireo::backend::packet::copy_to_guest(&head[..head.len().min(len as usize)], &frame);
                let _ = passt.send(&[0; HEADER], &frame);
            }
            6 => take(&mut its, bytes.int_in_range(1..=100_000)?),
            _ => _ = passt.flush(),
        }
    }
    loop {
        let flushed = passt.flush().is_ok();
        take(&mut its, 1 << 20);
        if flushed {
            break;
        }
    }
    take(&mut its, 1 << 20);
    check(&wire, true);
    Ok(())
}

fuzz_target!(|data: &[u8]| {
    let _ = run(data);
});
