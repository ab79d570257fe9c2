//! A simulated machine for the stub's tests, and a client that speaks the protocol.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::Duration;

use super::{Address, Guest, Server, Serving};
use crate::kvm::debug::{Answer, Cause, Control, Registers, Request, Trap};
use crate::layout::PAGE_SIZE;
use crate::machine::mailbox::Traps;
use crate::memory::GuestRam;

/// Address at which the simulated page tables map RAM.
pub const VIRTUAL: u64 = 0xFFFF_8000_0000_0000;
const RAM: u64 = 1 << 20;
/// Time limit that no wait reaches.
const DEADLINE: Duration = Duration::from_secs(60);

#[derive(Default)]
pub struct State {
    /// The running vCPUs; initially all.
    pub running: BTreeSet<u32>,
    pub registers: Vec<Registers>,
    pub controls: Vec<Control>,
    pub killed: bool,
    /// Number of times that the machine was stopped.
    pub pauses: u32,
    pub ended: bool,
    traps: Weak<Traps>,
}

/// A simulated machine, shared by the stub and its test.
#[derive(Clone)]
pub struct Fake(Arc<(GuestRam, Mutex<State>, Condvar)>);

impl Fake {
    pub fn new(vcpus: u32) -> Self {
        let registers = |vcpu| {
            let mut registers = Registers::default();
            registers.general.rip = VIRTUAL + 0x1000 * u64::from(vcpu);
            registers
        };
        let state = State {
            running: (0..vcpus).collect(),
            registers: (0..vcpus).map(registers).collect(),
            controls: vec![Control::default(); vcpus as usize],
            ..State::default()
        };
        Fake(Arc::new((GuestRam::anonymous(RAM), Mutex::new(state), Condvar::new())))
    }

    pub fn look<T>(&self, look: impl FnOnce(&mut State) -> T) -> T {
        look(&mut self.0.1.lock().unwrap())
    }

    /// Waits until `wanted` holds for the state.
    #[track_caller]
    pub fn wait(&self, what: &str, wanted: impl Fn(&State) -> bool) {
        let state = self.0.1.lock().unwrap();
        let (_state, late) = self.0.2.wait_timeout_while(state, DEADLINE, |state| !wanted(state)).unwrap();
        assert!(!late.timed_out(), "{what} does not come");
    }

    /// Makes running vCPUs trap simultaneously.
    pub fn traps(&self, hits: &[(u32, Cause)]) {
        self.look(|state| {
            let traps = state.traps.upgrade().expect("nobody debugs");
            for (vcpu, cause) in hits {
                assert!(state.running.remove(vcpu), "vCPU {vcpu} does not run");
                traps.push(Trap { vcpu: *vcpu, cause: *cause });
            }
        });
    }

    /// Makes one running vCPU trap.
    pub fn trap(&self, vcpu: u32, cause: Cause) {
        self.traps(&[(vcpu, cause)]);
    }

    pub fn byte(&self, phys: u64) -> u8 {
        self.0.0.read_obj(phys).unwrap()
    }
}

impl Guest for Fake {
    fn vcpus(&self) -> u32 {
        self.look(|state| state.registers.len() as u32)
    }

    fn ram(&self) -> &GuestRam {
        &self.0.0
    }

    fn attach(&self, traps: &Arc<Traps>) {
        self.look(|state| state.traps = Arc::downgrade(traps));
    }

    fn pause(&self) -> bool {
        self.look(|state| {
            state.running.clear();
            state.pauses += 1;
        });
        self.0.2.notify_all();
        self.look(|state| !state.ended)
    }

    fn resume(&self, only: Option<Vec<u32>>) -> bool {
        let all = 0..self.vcpus();
        self.look(|state| state.running = only.map_or(all.collect(), |only| only.into_iter().collect()));
        self.0.2.notify_all();
        true
    }

    fn debug(&self, vcpu: u32, request: Request) -> io::Result<Answer> {
        self.look(|state| {
            assert!(state.running.is_empty(), "{request:?} while {:?} run", state.running);
            let vcpu = vcpu as usize;
            Ok(match request {
                Request::Read => Answer::Registers(state.registers[vcpu].clone().into()),
                Request::Write(registers) => {
                    state.registers[vcpu] = *registers;
                    Answer::Done
                }
                // The second page is not mapped.
                Request::Translate(addr) => {
                    let phys = addr.checked_sub(VIRTUAL).filter(|phys| *phys < RAM && phys / PAGE_SIZE != 1);
                    Answer::Address(phys)
                }
                Request::Control(control) => {
                    state.controls[vcpu] = control;
                    Answer::Done
                }
            })
        })
    }

    fn kill(&self) {
        self.look(|state| state.killed = true);
        self.0.2.notify_all();
    }
}

/// A stub that serves a [`Fake`].
pub struct Stub {
    pub fake: Fake,
    serving: Option<Serving>,
    path: std::path::PathBuf,
    _dir: tempfile::TempDir,
}

impl Stub {
    pub fn new(vcpus: u32) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("gdb");
        let fake = Fake::new(vcpus);
        let server = Server::open(&Address::Unix(path.clone())).unwrap();
        let serving = server.serve(Box::new(fake.clone())).unwrap();
        Stub { fake, serving: Some(serving), path, _dir: dir }
    }

    pub fn connect(&self) -> Client {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        Client(stream)
    }

    /// Connects, and waits until all vCPUs have stopped.
    pub fn attach(&self) -> Client {
        loop {
            let mut client = self.connect();
            match client.ask("?").as_str() {
                // The previous client is still attached.
                "" => std::thread::yield_now(),
                answer => {
                    assert_eq!(answer, "T05thread:01;");
                    assert!(self.fake.look(|state| state.running.is_empty()));
                    return client;
                }
            }
        }
    }

    pub fn finish(&mut self, code: u8) {
        self.serving.take().unwrap().finish(code);
    }
}

impl Drop for Stub {
    fn drop(&mut self) {
        self.serving.take().into_iter().for_each(|serving| serving.finish(0));
    }
}

/// A client of the stub.
pub struct Client(UnixStream);

impl Client {
    pub fn raw(&mut self, bytes: &[u8]) {
        let _ = self.0.write_all(bytes);
    }

    pub fn send(&mut self, packet: &str) {
        let sum = packet.bytes().fold(0u8, u8::wrapping_add);
        self.raw(format!("${packet}#{sum:02x}").as_bytes());
    }

    /// Returns the next packet; `None` at the end of the connection.
    pub fn packet(&mut self) -> Option<String> {
        let mut byte = || {
            let mut byte = [0];
            match self.0.read(&mut byte) {
                Ok(0) => None,
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => None,
                n => n.map(|_| byte[0]).map(Some).expect("an answer in time"),
            }
        };
        while byte()? != b'$' {}
        let mut text: Vec<u8> = Vec::new();
        loop {
            match byte()? {
                b'#' => break,
                // A repetition of the last character.
                b'*' => {
                    let last = *text.last().unwrap();
                    let n = byte()? - 29;
                    text.extend(std::iter::repeat_n(last, n.into()));
                }
                other => text.push(other),
            }
        }
        byte().and_then(|_| byte())?;
        self.raw(b"+");
        Some(String::from_utf8(text).unwrap())
    }

    pub fn ask(&mut self, packet: &str) -> String {
        self.send(packet);
        self.packet().unwrap_or_default()
    }
}
