//! Output of a guest as its readers see it: the transcript with patterns and a log, and the watch for tell-tale lines;
//! and typed input as the terminal's escapes see it.

#![no_main]

use std::time::{Duration, Instant};

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use vireo::backend::console_watch::ConsoleWatch;
use vireo::backend::transcript::{LINES, Patterns, Transcript};
use vireo::guest_event::GuestEvents;
use vireo::terminal::Escapes;

fn run(data: &[u8]) -> Result<()> {
    let mut bytes = Unstructured::new(data);
    let pattern = |text: &str| vec![text.parse().unwrap()];
    let patterns = Patterns { expect: pattern("login: $"), fail_on: pattern("(?i)panic|BUG") };
    let log = tempfile::tempfile_in("/dev/shm").unwrap();
    let start = Instant::now();
    let transcript = Transcript::new(start, Some(log), patterns);
    let events = GuestEvents::new().unwrap();
    transcript.tell(&events);
    let (mut console, mut port) = (transcript.destination(None), transcript.destination(None));
    let (mut watch, mut escapes, mut typed) = (ConsoleWatch::new(events), Escapes::default(), Vec::new());
    let mut verdict = None;
    while !bytes.is_empty() {
        let text: &[u8] = match bytes.int_in_range(0..=7u8)? {
            0 => b"[    1.000000] Kernel panic - not syncing: x\r\n",
            1 => b"\xE2\x80\xAE\x1b[2Jlogin: ",
            2 => &[b'x'; 9000],
            3 => b"\n",
            _ => {
                let len = bytes.int_in_range(0..=40)?;
                bytes.bytes(usize::min(len, bytes.len()))?
            }
        };
        let to = if bytes.arbitrary()? { &mut console } else { &mut port };
        assert!(to.writer.write(text).unwrap() <= text.len());
        watch.scan(text);
        escapes.filter(text, &mut typed);
        transcript.look(start + Duration::from_millis(bytes.arbitrary::<u16>()?.into()));
        // The first verdict stands.
        assert!(verdict.is_none() || verdict == transcript.verdict());
        verdict = transcript.verdict();
        assert!(transcript.last_lines().len() <= LINES);
        assert!(transcript.last_lines().iter().map(String::len).sum::<usize>() < LINES * (64 << 10));
    }
    drop((console, port));
    let _ = transcript.last_lines();
    Ok(())
}

fuzz_target!(|data: &[u8]| {
    let _ = run(data);
});
