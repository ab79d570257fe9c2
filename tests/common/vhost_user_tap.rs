//! A vhost-user daemon that is a network card on a tap: it maps the guest's memory and makes the kernel's vhost-net
//! serve the rings there, so it does not touch any packet itself.
//!
//! `vhost-user-tap SOCKET TAP QUEUES` serves one client after the other, until it is killed.

#![allow(unsafe_code)] // descriptors that come over a socket

use std::error::Error;
use std::io::{self, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use vireo::backend::packet::{Offloads, Port};
use vireo::backend::tap::Tap;
use vireo::backend::vhost::{Ring, VhostNet};
use vireo::memory::RamRegion;
use vm_memory::mmap::MmapRegion;
use vmm_sys_util::eventfd::EventFd;

const PROTOCOL_FEATURES: u64 = 1 << 30;
/// Features: checksums and segmentation in both directions.
const OFFLOADS: u64 = 1 | 1 << 1 | 1 << 7 | 1 << 8 | 1 << 9 | 1 << 11 | 1 << 12 | 1 << 13;
/// Features: rings, mergeable buffers, virtio 1.0.
const KERNEL: u64 = 1 << 15 | 1 << 28 | 1 << 29 | 1 << 32;
/// Protocol features: several queues, and answers to everything.
const PROTOCOL: u64 = 1 | 1 << 3;
const NEED_REPLY: u32 = 1 << 3;

struct Message {
    request: u32,
    flags: u32,
    payload: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Message {
    /// Receives the next message; `None` at the end.
    fn receive(stream: &mut UnixStream) -> io::Result<Option<Self>> {
        let mut head = [0; 12];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let n = recvmsg(&stream, &mut [IoSliceMut::new(&mut head)], &mut control, RecvFlags::empty())?.bytes;
        if n == 0 {
            return Ok(None);
        }
        let mut fds = vec![];
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        stream.read_exact(&mut head[n..])?;
        let field = |i: usize| u32::from_ne_bytes(head[i..i + 4].try_into().unwrap());
        let mut payload = vec![0; field(8) as usize];
        stream.read_exact(&mut payload)?;
        Ok(Some(Message { request: field(0), flags: field(4), payload, fds }))
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_ne_bytes(self.payload[at..at + 4].try_into().unwrap())
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_ne_bytes(self.payload[at..at + 8].try_into().unwrap())
    }
}

#[derive(Default)]
struct VirtQueue {
    size: u16,
    base: u16,
    desc: u64,
    avail: u64,
    used: u64,
    kick: Option<EventFd>,
    call: Option<EventFd>,
    set_up: bool,
}

struct Client<'a> {
    pairs: &'a mut [(VhostNet, Tap)],
    features: u64,
    memory: Vec<(RamRegion, MmapRegion)>,
    queues: Vec<VirtQueue>,
}

impl Client<'_> {
    fn serve(&mut self, stream: &mut UnixStream) -> Result<(), Box<dyn Error>> {
        while let Some(mut message) = Message::receive(stream)? {
            let reply = self.obey(&mut message)?;
            let reply = match reply {
                None if message.flags & NEED_REPLY != 0 => 0u64.to_ne_bytes().to_vec(),
                None => continue,
                Some(reply) => reply,
            };
            let head = [message.request, 5, reply.len() as u32];
            stream.write_all(&[&head.map(u32::to_ne_bytes).concat()[..], &reply].concat())?;
        }
        Ok(())
    }

    fn obey(&mut self, message: &mut Message) -> Result<Option<Vec<u8>>, Box<dyn Error>> {
        let number = |n: u64| Ok(Some(n.to_ne_bytes().to_vec()));
        match message.request {
            1 => return number(self.pairs[0].0.features()? & KERNEL | OFFLOADS | PROTOCOL_FEATURES),
            15 => return number(PROTOCOL),
            17 => return number(2 * self.pairs.len() as u64),
            2 => self.set_features(message.u64(0))?,
            5 => self.set_memory(message)?,
            3 | 16 => {}
            _ => {}
        }
        if !(8..=18).contains(&message.request) || message.request > 13 && message.request < 18 {
            return Ok(None);
        }
        let index = (message.u32(0) & 0xFF) as usize;
        let queue = self.queues.get_mut(index).ok_or("no such queue")?;
        // SAFETY: the descriptor has no other owner.
        let mut event = || message.fds.pop().map(|fd| unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) });
        match message.request {
            8 => queue.size = message.u32(4) as u16,
            9 => (queue.desc, queue.used, queue.avail) = (message.u64(8), message.u64(16), message.u64(24)),
            10 => queue.base = message.u32(4) as u16,
            12 => queue.kick = event(),
            13 => queue.call = event(),
            11 => {
                self.enable(index, false)?;
                let queue = &mut self.queues[index];
                let base = match std::mem::take(&mut queue.set_up) {
                    true => self.pairs[index / 2].0.position((index % 2) as u16)?,
                    false => queue.base,
                };
                return Ok(Some([(index as u32).to_ne_bytes(), u32::from(base).to_ne_bytes()].concat()));
            }
            18 => self.enable(index, message.u32(4) == 1)?,
            _ => {}
        }
        Ok(None)
    }

    fn set_features(&mut self, features: u64) -> io::Result<()> {
        self.features = features;
        let has = |bit: u32| features & 1 << bit != 0;
        let offloads = Offloads { csum: has(1), tso4: has(7), tso6: has(8), ecn: has(9) };
        self.pairs[0].1.set_offloads(offloads)
    }

    fn set_memory(&mut self, message: &mut Message) -> Result<(), Box<dyn Error>> {
        self.memory.clear();
        for (i, fd) in message.fds.drain(..).enumerate() {
            let at =
                |field: usize| u64::from_ne_bytes(message.payload[8 + 32 * i + 8 * field..][..8].try_into().unwrap());
            let file = vm_memory::FileOffset::new(fd.into(), at(3));
            let mapping: MmapRegion = MmapRegion::from_file(file, at(1) as usize)?;
            self.memory.push((
                RamRegion { start: at(0), len: at(1), host_addr: mapping.as_ptr() as u64, readonly: false },
                mapping,
            ));
        }
        Ok(())
    }

    /// Starts or stops serving a queue.
    fn enable(&mut self, index: usize, on: bool) -> Result<(), Box<dyn Error>> {
        let (vhost, tap) = &mut self.pairs[index / 2];
        let queue = &mut self.queues[index];
        let number = (index % 2) as u16;
        if !on {
            return if queue.set_up { Ok(vhost.plug(number, None)?) } else { Ok(()) };
        }
        if !queue.set_up {
            let (kick, call) = (queue.kick.as_ref().ok_or("no kick")?, queue.call.as_ref().ok_or("no call")?);
            let (size, next_avail) = (queue.size, queue.base);
            let (desc, avail, used) = (queue.desc, queue.avail, queue.used);
            let ring = Ring { index: number, size, next_avail, desc, avail, used, kick, call };
            let memory: Vec<RamRegion> = self.memory.iter().map(|(region, _)| *region).collect();
            vhost.set_up(self.features & KERNEL, &memory, &[ring])?;
            queue.set_up = true;
        }
        // SAFETY: the descriptor is the tap's, which outlives the call.
        let tap = unsafe { BorrowedFd::borrow_raw(tap.fd()) };
        Ok(vhost.plug(number, Some(tap))?)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [socket, tap, queues] = &args[..] else { return Err("usage: vhost-user-tap SOCKET TAP QUEUES".into()) };
    let taps = Tap::open(tap, queues.parse()?)?;
    let mut pairs =
        taps.into_iter().map(|tap| Ok((VhostNet::open()?, tap))).collect::<Result<Vec<_>, Box<dyn Error>>>()?;
    let _ = std::fs::remove_file(socket);
    for stream in UnixListener::bind(socket)?.incoming() {
        let queues = (0..2 * pairs.len()).map(|_| VirtQueue::default()).collect();
        let mut client = Client { pairs: &mut pairs, features: 0, memory: vec![], queues };
        if let Err(e) = client.serve(&mut stream?) {
            eprintln!("vhost-user-tap: {e}");
        }
        for index in 0..client.queues.len() {
            client.enable(index, false)?;
        }
    }
    Ok(())
}
