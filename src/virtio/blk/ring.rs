//! Requests that the kernel carries out while the guest continues (io_uring).
//!
//! A request in flight keeps its chain and the vector of pieces of guest memory that the kernel uses. Guest memory is
//! kept until the last request has finished, even if everything else is gone.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::{IoUring, Probe, opcode, squeue, types};
use vm_memory::bitmap::Bitmap;

use super::QUEUE_SIZE;
use crate::backend::Disk;
use crate::backend::vectored::Vector;
use crate::memory::{GuestRam, RamSlice};
use crate::virtio::chain::Chain;

/// Requests of a queue that the kernel has, or is about to get.
pub(super) struct Ring {
    uring: IoUring,
    file: RawFd,
    slots: Vec<Option<InFlight>>,
    free: Vec<u16>,
    /// Number of entries that wait for [`Ring::submit`].
    collected: usize,
    /// Vectors of finished requests, for reuse.
    spare: Vec<Vector>,
    /// Memory that the vectors point into.
    ram: GuestRam,
}

// SAFETY: the vectors' pointers lead into guest memory, which any thread may use and which `ram` keeps.
#[allow(unsafe_code)]
unsafe impl Send for Ring {}

struct InFlight {
    chain: Chain,
    /// Stays at its address until the kernel is finished with it: the Vec may move, its contents do not.
    vector: Vector,
    kind: Kind,
    /// Bytes to move, and bytes already moved.
    len: u64,
    done: u64,
    offset: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write { through: bool },
    Flush,
}

/// Finished request.
pub(super) struct Done {
    pub(super) chain: Chain,
    pub(super) result: io::Result<()>,
    /// Set if something may not be on the disk: a write that a flush in the meantime may have missed, or a failed
    /// flush.
    pub(super) dirty: bool,
}

/// Checks that requests to `disk` can use io_uring.
pub(super) fn probe(disk: &dyn Disk) -> io::Result<()> {
    if disk.fd().is_none() {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "its format is read and written piece by piece"));
    }
    checked(1).map(|_| ())
}

/// Creates a ring that supports all operations needed here.
fn checked(entries: u16) -> io::Result<IoUring> {
    // Completions are polled for anyway, so no thread is interrupted to run them. Optional: it needs Linux 5.19.
    let uring = IoUring::builder().setup_coop_taskrun().build(entries.into());
    let uring = uring.or_else(|_| IoUring::new(entries.into()))?;
    let mut known = Probe::new();
    uring.submitter().register_probe(&mut known)?;
    let needed = [opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE];
    if !needed.iter().all(|code| known.is_supported(*code)) {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "this kernel's io_uring lacks an operation"));
    }
    Ok(uring)
}

impl Ring {
    /// Creates a ring for one queue of a device on `disk`.
    pub(super) fn new(disk: &dyn Disk, ram: &GuestRam) -> io::Result<Self> {
        let fd = disk.fd().ok_or(io::ErrorKind::Unsupported)?;
        let uring = checked(QUEUE_SIZE)?;
        Ok(Ring {
            uring,
            file: fd.as_raw_fd(),
            slots: (0..QUEUE_SIZE).map(|_| None).collect(),
            free: (0..QUEUE_SIZE).rev().collect(),
            collected: 0,
            spare: Vec::new(),
            ram: ram.clone(),
        })
    }

    /// Returns whether one more request fits.
    pub(super) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Returns whether a request to `disk` with these buffers can be begun.
    pub(super) fn takes(&self, disk: &dyn Disk, buffers: &[RamSlice<'_>], offset: u64) -> bool {
        self.has_room() && disk.takes(buffers, offset)
    }

    /// Returns the number of requests begun and not yet taken from [`Ring::next_done`].
    pub(super) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Returns the kernel's form of some buffers, and their length in bytes.
    pub(super) fn vector(&mut self, buffers: &[RamSlice<'_>]) -> (Vector, u64) {
        let mut vector = self.spare.pop().unwrap_or_default();
        vector.fill(buffers);
        (vector, buffers.iter().map(|b| b.len() as u64).sum())
    }

    /// Begins to fill the buffers of `vector`, which are those of `chain`.
    pub(super) fn read(&mut self, chain: Chain, vector: Vector, len: u64, offset: u64) {
        self.begin(InFlight { chain, vector, kind: Kind::Read, len, done: 0, offset });
    }

    /// Begins to write the buffers of `vector`, which are those of `chain`; with `through`, to the disk itself.
    pub(super) fn write(&mut self, chain: Chain, vector: Vector, len: u64, offset: u64, through: bool) {
        self.begin(InFlight { chain, vector, kind: Kind::Write { through }, len, done: 0, offset });
    }

    /// Begins to flush everything that was finished before.
    pub(super) fn flush(&mut self, chain: Chain) {
        self.begin(InFlight { chain, vector: Vector::default(), kind: Kind::Flush, len: 0, done: 0, offset: 0 });
    }

    fn begin(&mut self, request: InFlight) {
        let Some(slot) = self.free.pop() else { return };
        let entry = entry(self.file, &request).user_data(slot.into());
        if let Some(place) = self.slots.get_mut(usize::from(slot)) {
            *place = Some(request);
        }
        self.push(&entry);
    }

    #[allow(unsafe_code)]
    fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: the entry's vector stays in `slots` until its completion is taken, and so does its length. It points
        // to mapped guest memory, which `ram` keeps at least as long; nothing holds a reference into that. The file is
        // the disk's, which the handler that owns this ring keeps.
        let full = unsafe { self.uring.submission().push(entry) };
        // There is an entry for each slot, but a request that is continued may find others waiting.
        if full.is_err() {
            let _ = self.submit();
            // SAFETY: as above.
            let _ = unsafe { self.uring.submission().push(entry) };
        }
        self.collected += 1;
    }

    /// Submits the collected entries to the kernel.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        while self.collected > 0 {
            match self.uring.submit() {
                Ok(n) => self.collected = self.collected.saturating_sub(n.max(1)),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // The kernel wants completions taken first; the rest is submitted after that.
                Err(e)
                    if matches!(e.raw_os_error(), Some(libc::EBUSY | libc::EAGAIN))
                        && self.in_flight() > self.collected =>
                {
                    return Ok(());
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Returns the next request that is completely finished.
    pub(super) fn next_done(&mut self) -> Option<Done> {
        loop {
            let completion = self.uring.completion().next()?;
            let (slot, result) = (completion.user_data() as usize, completion.result());
            let Some(mut request) = self.slots.get_mut(slot).and_then(Option::take) else { continue };
            match request.advance(result) {
                Some(result) => {
                    self.free.push(slot as u16);
                    if request.kind == Kind::Read {
                        self.mark_dirty(&request.chain);
                    }
                    self.spare.push(request.vector);
                    let dirty = match request.kind {
                        Kind::Read => false,
                        Kind::Write { .. } => true,
                        Kind::Flush => result.is_err(),
                    };
                    return Some(Done { chain: request.chain, result, dirty });
                }
                // Only a part was moved: continue after it.
                None => {
                    let entry = entry(self.file, &request).user_data(slot as u64);
                    if let Some(place) = self.slots.get_mut(slot) {
                        *place = Some(request);
                    }
                    self.push(&entry);
                    let _ = self.submit();
                }
            }
        }
    }

    /// Marks the pages of guest memory that the kernel wrote as dirty, even if the request failed in the end.
    fn mark_dirty(&self, chain: &Chain) {
        for slice in chain.writer(&self.ram).slices().flatten() {
            slice.bitmap().mark_dirty(0, slice.len());
        }
    }
}

impl AsRawFd for Ring {
    /// Readable while a finished request has not been taken. Requests that finish while they are submitted, as most to
    /// a page cache do, are taken right afterwards and wake nobody.
    fn as_raw_fd(&self) -> RawFd {
        self.uring.as_raw_fd()
    }
}

impl InFlight {
    /// Records the kernel's result; returns `None` if there is more to do.
    fn advance(&mut self, result: i32) -> Option<io::Result<()>> {
        let moved = match u64::try_from(result) {
            Err(_) if -result == libc::EINTR => return None,
            Err(_) => return Some(Err(io::Error::from_raw_os_error(-result))),
            Ok(moved) => moved,
        };
        self.done += moved;
        if self.kind == Kind::Flush || self.done >= self.len {
            return Some(Ok(()));
        }
        if moved == 0 {
            return Some(Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file has become shorter")));
        }
        self.vector.advance(moved as usize);
        None
    }
}

fn entry(file: RawFd, request: &InFlight) -> squeue::Entry {
    let rest = request.vector.rest();
    let (file, iov, count) = (types::Fd(file), rest.as_ptr(), rest.len() as u32);
    let offset = request.offset + request.done;
    match request.kind {
        Kind::Read => opcode::Readv::new(file, iov, count).offset(offset).build(),
        Kind::Write { through } => {
            let flags = if through { libc::RWF_DSYNC } else { 0 };
            opcode::Writev::new(file, iov, count).offset(offset).rw_flags(flags).build()
        }
        Kind::Flush => opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build(),
    }
}

impl Drop for Ring {
    /// Waits until the kernel is finished with guest memory and the vectors before they are freed.
    fn drop(&mut self) {
        let _ = self.submit();
        while self.in_flight() > 0 {
            if self.uring.submit_and_wait(1).is_err_and(|e| e.kind() != io::ErrorKind::Interrupted) {
                // Never seen; a leak is better than memory freed while the kernel uses it.
                std::mem::forget(std::mem::take(&mut self.slots));
                std::mem::forget(self.ram.clone());
                return;
            }
            while self.next_done().is_some() {}
        }
    }
}
