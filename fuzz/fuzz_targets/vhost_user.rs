//! The frontend of vhost-user, with a daemon that may answer and request anything.
//!
//! The answers to a call are in the socket before it is made, and nothing waits for more, so nothing here takes time.

#![no_main]

use std::fs::File;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::LazyLock;
use std::time::Duration;

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use vireo::backend::vhost::Ring;
use vireo::backend::vhost_user::Frontend;
use vireo::event::eventfd;
use vireo::memory::{GuestRam, MemoryConfig};
use vireo::options::Size;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Feature bit: protocol features exist.
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// Protocol features: several queues, every message acknowledged, requests of the daemon's own, configuration space.
const MQ: u64 = 1 << 0;
const REPLY_ACK: u64 = 1 << 3;
const BACKEND_REQ: u64 = 1 << 5;
const CONFIG: u64 = 1 << 9;
/// Maximum number of calls.
const STEPS: usize = 50;

static RAM: LazyLock<GuestRam> = LazyLock::new(|| {
    GuestRam::new(&MemoryConfig { size: Size(1 << 20), shared: true, ..MemoryConfig::default() }).unwrap()
});

/// The other side, and the bytes that decide what it does.
struct Daemon<'a> {
    stream: UnixStream,
    bytes: Unstructured<'a>,
    acknowledges: bool,
}

impl Daemon<'_> {
    /// Returns a good daemon's answers to greetings.
    fn greeting(&mut self) -> Result<Vec<(u32, Vec<u8>)>> {
        let features = self.bytes.arbitrary::<u64>()? ^ PROTOCOL_FEATURES;
        let protocol = self.bytes.arbitrary::<u64>()? ^ (MQ | REPLY_ACK | BACKEND_REQ | CONFIG);
        let mut answers = vec![(1, number(features))];
        if features & PROTOCOL_FEATURES != 0 {
            answers.push((15, number(protocol)));
            self.acknowledges = protocol & REPLY_ACK != 0;
            if protocol & MQ != 0 {
                answers.push((17, number(self.bytes.arbitrary()?)));
            }
            answers.extend(self.acknowledgement(3));
            if protocol & BACKEND_REQ != 0 {
                answers.extend(self.acknowledgement(21));
            }
        }
        Ok(answers)
    }

    fn acknowledgement(&self, request: u32) -> Option<(u32, Vec<u8>)> {
        self.acknowledges.then(|| (request, number(0)))
    }

    /// Sends almost these answers.
    fn answer(&mut self, answers: impl IntoIterator<Item = (u32, Vec<u8>)>) -> Result<()> {
        let mut all = Vec::new();
        for (request, payload) in answers {
            all.extend([request, 5, payload.len() as u32].iter().flat_map(|word| word.to_ne_bytes()));
            all.extend(payload);
        }
        for _ in 0..self.bytes.int_in_range(0..=3u8)? {
            if let Some(last) = all.len().checked_sub(1) {
                let at = self.bytes.int_in_range(0..=last)?;
                all[at] = self.bytes.arbitrary()?;
            }
        }
        match self.bytes.int_in_range(0..=15u8)? {
            15 => all.truncate(self.bytes.int_in_range(0..=all.len())?),
            14 => all.extend(self.some()?),
            13 => {
                let _ = self.stream.write_all(&all);
                let _ = self.stream.shutdown(Shutdown::Write);
                return Ok(());
            }
            _ => {}
        }
        let _ = self.stream.write_all(&all);
        Ok(())
    }

    fn some(&mut self) -> Result<Vec<u8>> {
        let len = self.bytes.int_in_range(0..=64)?;
        Ok(self.bytes.bytes(usize::min(len, self.bytes.len()))?.to_vec())
    }

    /// Takes all messages; returns the first descriptor that came with them.
    fn hear(&self) -> Option<File> {
        let mut first = None;
        while let Ok((1.., file)) = self.stream.recv_with_fd(&mut [0; 4096]) {
            first = first.or(file);
        }
        first
    }
}

fn number(n: u64) -> Vec<u8> {
    n.to_ne_bytes().to_vec()
}

/// Makes one call and checks what it returns.
fn step(frontend: &mut Frontend, daemon: &mut Daemon<'_>, channel: &mut Option<File>) -> Result<()> {
    match daemon.bytes.int_in_range(0..=7u8)? {
        0 => {
            let len = daemon.bytes.int_in_range(0..=300)?;
            let sent: usize = len.min(256);
            let head = [0, sent as u32, 0].map(u32::to_ne_bytes).concat();
            daemon.answer([(24, [head, vec![7; sent]].concat())])?;
            let config = frontend.config(len);
            assert!(config.is_err() || config.unwrap().len() == sent);
        }
        1 => {
            let (offset, data) = (daemon.bytes.arbitrary()?, daemon.some()?);
            daemon.answer(daemon.acknowledgement(25))?;
            let _ = frontend.set_config(offset, &data);
        }
        2 => {
            let rings = daemon.bytes.int_in_range(0..=3u16)?;
            let (kick, call) = (eventfd().unwrap(), eventfd().unwrap());
            let ring =
                |index| Ring { index, size: 8, next_avail: 3, desc: 0, avail: 0, used: 0, kick: &kick, call: &call };
            let each = (0..rings).flat_map(|_| [8, 10, 9, 13, 12]);
            let answers: Vec<_> =
                [2, 5].into_iter().chain(each).filter_map(|request| daemon.acknowledgement(request)).collect();
            daemon.answer(answers)?;
            let rings: Vec<Ring<'_>> = (0..rings).map(ring).collect();
            let _ = frontend.start(daemon.bytes.arbitrary()?, &RAM.shared_regions().unwrap(), &rings);
        }
        3 => {
            let answers: Vec<_> = [18, 18].into_iter().filter_map(|request| daemon.acknowledgement(request)).collect();
            daemon.answer(answers)?;
            let _ = frontend.enable([(0, true), (1, false)]);
        }
        4 => {
            let next: u16 = daemon.bytes.arbitrary()?;
            let at = |ring: u32| (11, [ring, next.into()].map(u32::to_ne_bytes).concat());
            daemon.answer([at(0), at(1)])?;
            let stopped = frontend.stop(&[0, 1]);
            assert!(stopped.is_err() || stopped.unwrap().len() == 2);
        }
        5 => {
            // An answer to no request.
            daemon.answer([])?;
        }
        _ => {
            let request = match daemon.bytes.arbitrary()? {
                true => [2, 9, 0u32].map(u32::to_ne_bytes).concat(),
                false => daemon.some()?,
            };
            let _ = channel.as_mut().map(|channel| channel.write(&request));
            let _ = frontend.config_changed();
        }
    }
    Ok(())
}

fn run(data: &[u8]) -> Result<()> {
    let (ours, its) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    its.set_nonblocking(true).unwrap();
    let mut daemon = Daemon { stream: its, bytes: Unstructured::new(data), acknowledges: false };
    let greeting = daemon.greeting()?;
    daemon.answer(greeting)?;
    let Ok(mut frontend) = Frontend::over(ours, Path::new("daemon"), Duration::ZERO) else { return Ok(()) };
    let mut channel = daemon.hear();
    for _ in 0..STEPS {
        if daemon.bytes.is_empty() {
            break;
        }
        step(&mut frontend, &mut daemon, &mut channel)?;
        daemon.hear();
        let sound = frontend.look().is_ok();
        assert_eq!(sound, frontend.broken().is_none());
        if !sound {
            // A broken daemon is not asked again.
            assert!(frontend.config(8).is_err() && frontend.enable([]).is_ok() && frontend.stop(&[0]).is_err());
            assert!(daemon.hear().is_none());
        }
    }
    Ok(())
}

fuzz_target!(
    init: vireo_fuzz::ignore_broken_pipes(),
    |data: &[u8]| {
        let _ = run(data);
    }
);
