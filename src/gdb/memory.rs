//! The guest's memory by the addresses of a vCPU, and the breakpoint instructions in it: who reads sees what they stand
//! for, who writes changes that.

use std::io;
use std::sync::Arc;

use super::Guest;
use crate::kvm::debug::{Answer, Request};
use crate::layout::PAGE_SIZE;
use crate::memory::{GuestRam, OutOfRam};

/// `int3`.
const BREAKPOINT: u8 = 0xCC;
/// More than anybody needs.
const BREAKPOINTS_MAX: usize = 1024;

/// A breakpoint instruction in the guest's memory.
#[derive(Clone, Copy, Debug)]
struct Planted {
    addr: u64,
    phys: u64,
    original: u8,
}

/// The breakpoint instructions: few.
#[derive(Default)]
pub struct Breakpoints(Vec<Planted>);

/// Where a vCPU's page tables lead.
pub fn translate(guest: &dyn Guest, vcpu: u32, addr: u64) -> io::Result<u64> {
    match guest.debug(vcpu, Request::Translate(addr))? {
        Answer::Address(Some(phys)) => Ok(phys),
        _ => Err(io::Error::from_raw_os_error(libc::EFAULT)),
    }
}

fn no_ram(_: OutOfRam) -> io::Error {
    io::Error::from_raw_os_error(libc::EFAULT)
}

/// The parts of `addr..addr + len`, one for each page: linear address and length. It ends where addresses end.
fn pages(addr: u64, len: usize) -> impl Iterator<Item = (u64, usize)> {
    let (mut at, mut left) = (Some(addr), len);
    std::iter::from_fn(move || {
        let start = at.filter(|_| left > 0)?;
        let part = left.min((PAGE_SIZE - start % PAGE_SIZE) as usize);
        left -= part;
        at = start.checked_add(part as u64);
        Some((start, part))
    })
}

impl Breakpoints {
    /// Their linear addresses.
    pub fn addresses(&self) -> Arc<[u64]> {
        self.0.iter().map(|planted| planted.addr).collect()
    }

    /// Reads as much as can be read, at least a byte.
    pub fn read(&self, guest: &dyn Guest, vcpu: u32, addr: u64, data: &mut [u8]) -> io::Result<usize> {
        let mut done = 0;
        for (start, len) in pages(addr, data.len()) {
            let Some(part) = data.get_mut(done..done + len) else { break };
            let read = translate(guest, vcpu, start).and_then(|phys| self.read_phys(guest.ram(), phys, part));
            match read {
                Ok(()) => done += len,
                Err(e) if done == 0 => return Err(e),
                Err(_) => break,
            }
        }
        Ok(done)
    }

    /// Reads by guest-physical address.
    pub fn read_phys(&self, ram: &GuestRam, phys: u64, data: &mut [u8]) -> io::Result<()> {
        ram.read(phys, data).map_err(no_ram)?;
        for planted in &self.0 {
            if let Some(byte) = place(planted.phys, phys, data.len()).and_then(|at| data.get_mut(at)) {
                *byte = planted.original;
            }
        }
        Ok(())
    }

    /// Writes all, or, if some of it is nowhere, nothing.
    pub fn write(&mut self, guest: &dyn Guest, vcpu: u32, addr: u64, mut data: &[u8]) -> io::Result<()> {
        let parts = pages(addr, data.len()).map(|(start, len)| Ok((translate(guest, vcpu, start)?, len)));
        let parts: Vec<(u64, usize)> = parts.collect::<io::Result<_>>()?;
        if parts.iter().map(|(_, len)| len).sum::<usize>() != data.len() {
            return Err(io::Error::from_raw_os_error(libc::EFAULT));
        }
        for (phys, len) in &parts {
            guest.ram().slice(*phys, *len as u64).map_err(no_ram)?;
        }
        for (phys, len) in parts {
            let Some((part, rest)) = data.split_at_checked(len) else { break };
            let mut with_breakpoints = part.to_vec();
            for planted in &mut self.0 {
                let at = place(planted.phys, phys, len);
                if let Some((at, new)) = at.and_then(|at| Some((at, part.get(at)?))) {
                    planted.original = *new;
                    with_breakpoints[at] = BREAKPOINT;
                }
            }
            guest.ram().write(phys, &with_breakpoints).map_err(no_ram)?;
            data = rest;
        }
        Ok(())
    }

    /// Plants one. Doing so twice is doing it once.
    pub fn insert(&mut self, guest: &dyn Guest, vcpu: u32, addr: u64) -> io::Result<()> {
        if self.0.iter().any(|planted| planted.addr == addr) {
            return Ok(());
        }
        if self.0.len() >= BREAKPOINTS_MAX {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        let phys = translate(guest, vcpu, addr)?;
        let mut original = [0];
        self.read_phys(guest.ram(), phys, &mut original)?;
        guest.ram().write(phys, &[BREAKPOINT]).map_err(no_ram)?;
        self.0.push(Planted { addr, phys, original: original[0] });
        Ok(())
    }

    /// Takes one away, unless the guest has put something else there; false if there is none.
    pub fn remove(&mut self, ram: &GuestRam, addr: u64) -> bool {
        let Some(at) = self.0.iter().position(|planted| planted.addr == addr) else { return false };
        let planted = self.0.swap_remove(at);
        let mut now = [0];
        let ours = ram.read(planted.phys, &mut now).is_ok() && now == [BREAKPOINT];
        if ours && !self.0.iter().any(|other| other.phys == planted.phys) {
            let _ = ram.write(planted.phys, &[planted.original]);
        }
        true
    }

    /// Takes all away.
    pub fn clear(&mut self, ram: &GuestRam) {
        while let Some(Planted { addr, .. }) = self.0.first().copied() {
            self.remove(ram, addr);
        }
    }
}

/// Where `phys` is in `start..start + len`.
fn place(phys: u64, start: u64, len: usize) -> Option<usize> {
    let at = usize::try_from(phys.checked_sub(start)?).ok()?;
    (at < len).then_some(at)
}
