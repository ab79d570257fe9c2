//! A client of the gdb stub that almost speaks the protocol, with a machine that only pretends.

#![no_main]

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use vireo::gdb::{Address, Guest, Server};
use vireo::kvm::debug::{Answer, Cause, Registers, Request, Trap};
use vireo::machine::mailbox::Traps;
use vireo::memory::GuestRam;

const VCPUS: u32 = 2;
const RAM: u64 = 64 << 10;
const BASE: u64 = 0xFFFF_8000_0000_0000;

struct Fake {
    ram: GuestRam,
    registers: Mutex<Vec<Registers>>,
    traps: Mutex<Weak<Traps>>,
}

impl Guest for Fake {
    fn vcpus(&self) -> u32 {
        VCPUS
    }
    fn ram(&self) -> &GuestRam {
        &self.ram
    }
    fn attach(&self, traps: &Arc<Traps>) {
        *self.traps.lock().unwrap() = Arc::downgrade(traps);
    }
    fn pause(&self) -> bool {
        true
    }
    /// Resumes the machine, which soon stops again.
    fn resume(&self, only: Option<Vec<u32>>) -> bool {
        let vcpu = only.as_ref().and_then(|only| only.first()).copied().unwrap_or(0);
        assert!(vcpu < VCPUS);
        if let Some(traps) = self.traps.lock().unwrap().upgrade() {
            traps.push(Trap { vcpu, cause: Cause::Step });
        }
        true
    }
    fn debug(&self, vcpu: u32, request: Request) -> io::Result<Answer> {
        let mut registers = self.registers.lock().unwrap();
        let registers = &mut registers[vcpu as usize];
        Ok(match request {
            Request::Read => Answer::Registers(registers.clone().into()),
            Request::Write(new) => {
                *registers = *new;
                Answer::Done
            }
            Request::Translate(addr) => Answer::Address(addr.checked_sub(BASE).filter(|phys| *phys < RAM)),
            Request::Control(_) => Answer::Done,
        })
    }
    fn kill(&self) {}
}

const PACKETS: [&str; 24] = [
    "qSupported:multiprocess+;swbreak+;hwbreak+;vContSupported+",
    "?",
    "g",
    "Hg1",
    "Hc-1",
    "qfThreadInfo",
    "m",
    "mffff800000000000,40",
    "Mffff800000000000,4:01020304",
    "Z0,ffff800000000010,1",
    "z0,ffff800000000010,1",
    "Z1,ffff800000000020,1",
    "Z2,ffff800000000030,4",
    "vCont;c",
    "vCont;s:1;c:2",
    "vCont?",
    "qRcmd,6d656d20",
    "qXfer:features:read:target.xml:0,1000",
    "qThreadExtraInfo,1",
    "T2",
    "QStartNoAckMode",
    "P0=00",
    "G00",
    "D",
];

/// Packets of a client, one after the other.
fn talk(bytes: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let mut talk = Vec::new();
    for _ in 0..20 {
        if bytes.is_empty() {
            break;
        }
        let mut packet = bytes.choose(&PACKETS)?.as_bytes().to_vec();
        for _ in 0..bytes.int_in_range(0..=2u8)? {
            let at = bytes.int_in_range(0..=packet.len() - 1)?;
            packet[at] = bytes.arbitrary()?;
        }
        match bytes.int_in_range(0..=9u8)? {
            0 => talk.extend(bytes.bytes(usize::min(20, bytes.len()))?),
            1 => talk.push(3),
            2 => packet.extend(std::iter::repeat_n(b'0', bytes.int_in_range(0..=5000)?)),
            _ => {}
        }
        let sum = packet.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        talk.push(b'$');
        talk.extend(&packet);
        talk.extend(format!("#{sum:02x}+").as_bytes());
    }
    Ok(talk)
}

fn run(data: &[u8]) -> Result<()> {
    let talk = talk(&mut Unstructured::new(data))?;
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("gdb");
    let registers = Mutex::new(vec![Registers::default(); VCPUS as usize]);
    let ram = GuestRam::anonymous(RAM);
    let fake = Fake { ram: ram.clone(), registers, traps: Mutex::default() };
    let serving = Server::open(&Address::Unix(path.clone())).unwrap().serve(Box::new(fake)).unwrap();
    let mut client = UnixStream::connect(&path).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut writer = client.try_clone().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let _ = writer.write_all(&talk);
            let _ = writer.shutdown(Shutdown::Write);
        });
        let mut answers = [0; 4096];
        loop {
            match client.read(&mut answers) {
                Ok(0) => break,
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => break,
                // The fuzzer's own alarm.
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => panic!("the stub does not answer and does not end: {e}"),
            }
        }
    });
    serving.finish(0);
    Ok(())
}

fuzz_target!(
    init: vireo_fuzz::ignore_broken_pipes(),
    |data: &[u8]| {
        let _ = run(data);
    }
);
