//! The guest's memory at a vCPU's linear addresses, and the breakpoint instructions in it: reads return the original
//! bytes in their place, and writes change the original bytes.

use std::io;
use std::sync::Arc;

use super::Guest;
use crate::kvm::debug::{Answer, Request};
use crate::layout::PAGE_SIZE;
use crate::memory::{GuestRam, OutOfRam};

/// The `int3` instruction.
const BREAKPOINT: u8 = 0xCC;
/// Largest number of breakpoints, more than anybody needs.
const BREAKPOINTS_MAX: usize = 1024;

/// A breakpoint instruction in the guest's memory.
#[derive(Clone, Copy, Debug)]
struct Planted {
    addr: u64,
    phys: u64,
    original: u8,
}

/// All breakpoint instructions; there are only a few.
#[derive(Default)]
pub struct Breakpoints(Vec<Planted>);

/// Translates a linear address by a vCPU's page tables.
pub fn translate(guest: &dyn Guest, vcpu: u32, addr: u64) -> io::Result<u64> {
    match guest.debug(vcpu, Request::Translate(addr))? {
        Answer::Address(Some(phys)) => Ok(phys),
        _ => Err(io::Error::from_raw_os_error(libc::EFAULT)),
    }
}

fn no_ram(_: OutOfRam) -> io::Error {
    io::Error::from_raw_os_error(libc::EFAULT)
}

/// Splits `addr..addr + len` into one part per page: linear address and length. Stops at the end of the address space.
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
    /// Returns the linear addresses.
    pub fn addresses(&self) -> Arc<[u64]> {
        self.0.iter().map(|planted| planted.addr).collect()
    }

    /// Reads as many bytes as possible, at least one.
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

    /// Writes everything; or nothing, if a part of it is not mapped.
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

    /// Inserts a breakpoint instruction. Inserting it twice has no further effect.
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

    /// Removes a breakpoint, unless the guest has overwritten it; returns false if it does not exist.
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

    /// Removes all breakpoints.
    pub fn clear(&mut self, ram: &GuestRam) {
        while let Some(Planted { addr, .. }) = self.0.first().copied() {
            self.remove(ram, addr);
        }
    }
}

/// Returns the position of `phys` in `start..start + len`.
fn place(phys: u64, start: u64, len: usize) -> Option<usize> {
    let at = usize::try_from(phys.checked_sub(start)?).ok()?;
    (at < len).then_some(at)
}
