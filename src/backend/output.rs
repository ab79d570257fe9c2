//! Console output on its way to the host: a bounded buffer and one thread that writes it.
//!
//! The thread does plain blocking writes. Therefore every kind of destination works alike (terminal, pipe, file,
//! socket), no descriptor has to be made non-blocking, and a reader that sleeps holds up only this thread. A vCPU that
//! pushed more than [`LIMIT`] waits in [`Output::wait_room`] before it enters the guest again; it never waits in the
//! middle of an exit, so pause, time limit and Ctrl-A X always get through.

use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use vmm_sys_util::eventfd::EventFd;

use crate::event;

/// Buffered bytes beyond which vCPUs wait: 64 KiB.
pub const LIMIT: usize = 64 << 10;

/// Number of buffered bytes for which the thread is woken even without a complete line.
const CHUNK: usize = 1024;

/// Destination of output: a writer, and its name for messages.
pub struct Destination {
    /// Name in messages: `stdout`, or a path.
    pub name: String,
    /// Writer that receives the output.
    pub writer: Box<dyn Write + Send>,
    /// Writes each byte as it comes, not line by line, because somebody may be watching.
    pub eager: bool,
    /// Reports failures instead of logging a warning: the writing program in the guest learns that its output is no
    /// longer taken ([`Output::has_failed`]), and the caller that waits for the guest's end learns the reason
    /// ([`Output::lost`]).
    pub told: bool,
}

/// A buffered, asynchronous writer. Clones share it.
#[derive(Clone)]
pub struct Output(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// Condition on which the thread waits for bytes.
    filled: Condvar,
    /// Condition on which vCPUs wait for room.
    drained: Condvar,
    /// Signalled when there is room after [`Output::has_room`] returned false.
    room: EventFd,
    /// Signalled when the buffer is empty after [`Output::close`].
    done: EventFd,
}

#[derive(Default)]
struct State {
    buffer: Vec<u8>,
    /// Bytes that the thread has taken but not yet written.
    in_flight: usize,
    /// Total number of bytes ever pushed.
    pushed: u64,
    closing: bool,
    /// The destination failed or there is none: everything is discarded.
    broken: bool,
    /// Output is discarded because the destination failed, not because there is none.
    failed: bool,
    /// Reason why output was lost, if the failure matters ([`Destination::told`]) and was not a reader that closed.
    lost: Option<String>,
    /// True while the thread sleeps and must be woken.
    idle: bool,
    /// True after [`Output::has_room`] returned false.
    room_wanted: bool,
    /// Wakes the thread for every byte.
    eager: bool,
}

impl State {
    fn pending(&self) -> usize {
        self.buffer.len() + self.in_flight
    }
}

impl Output {
    /// Starts the thread that writes to `destination`.
    pub fn new(destination: Destination) -> io::Result<Self> {
        let output = Output(Arc::new(Shared {
            state: Mutex::new(State { eager: destination.eager, ..State::default() }),
            filled: Condvar::new(),
            drained: Condvar::new(),
            room: event::eventfd()?,
            done: event::eventfd()?,
        }));
        let thread_output = output.clone();
        thread::Builder::new()
            .name("console".into())
            .stack_size(64 << 10)
            .spawn(move || thread_output.write_loop(destination))?;
        Ok(output)
    }

    /// Creates an output that discards everything.
    pub fn discard() -> io::Result<Self> {
        Ok(Output(Arc::new(Shared {
            state: Mutex::new(State { broken: true, ..State::default() }),
            filled: Condvar::new(),
            drained: Condvar::new(),
            room: event::eventfd()?,
            done: event::eventfd()?,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds bytes; never waits. Unless the destination is eager, the thread is woken only for whole lines or larger
    /// pieces: waking it for each of a UART's bytes would cost more than the bytes. The rest waits for
    /// [`Output::flush`].
    pub fn push(&self, bytes: &[u8]) {
        let mut state = self.lock();
        state.pushed += bytes.len() as u64;
        if state.broken {
            return;
        }
        state.buffer.extend_from_slice(bytes);
        if state.eager || bytes.contains(&b'\n') || state.buffer.len() >= CHUNK {
            self.wake_writer(&mut state);
        }
    }

    /// Makes the thread write all pushed bytes now; does not wait for it.
    pub fn flush(&self) {
        let mut state = self.lock();
        if !state.buffer.is_empty() {
            self.wake_writer(&mut state);
        }
    }

    fn wake_writer(&self, state: &mut State) {
        if state.idle {
            state.idle = false;
            self.0.filled.notify_one();
        }
    }

    /// Total number of bytes ever pushed.
    pub fn pushed(&self) -> u64 {
        self.lock().pushed
    }

    /// Returns true if output is discarded because writing failed: the destination is gone.
    pub fn has_failed(&self) -> bool {
        self.lock().failed
    }

    /// Returns a sentence on why output did not reach its destination, if that was the host's fault.
    pub fn lost(&self) -> Option<String> {
        self.lock().lost.clone()
    }

    /// Returns true if the buffer is over [`LIMIT`].
    pub fn is_full(&self) -> bool {
        self.lock().pending() > LIMIT
    }

    /// Returns true if the buffer holds no more than `limit` bytes. If it holds more, [`Output::room`] is signalled
    /// once it is within [`LIMIT`].
    pub fn has_room(&self, limit: usize) -> bool {
        let mut state = self.lock();
        state.room_wanted = state.pending() > limit;
        !state.room_wanted
    }

    /// Eventfd that becomes readable once there is room after [`Output::has_room`] returned false.
    pub fn room(&self) -> &EventFd {
        &self.0.room
    }

    fn tell_room(&self, state: &mut State) {
        self.0.drained.notify_all();
        if state.room_wanted && state.pending() <= LIMIT {
            state.room_wanted = false;
            let _ = self.0.room.write(1);
        }
    }

    /// Waits until there is room, or until `interrupted` returns true after a call of [`Output::wake`].
    pub fn wait_room(&self, interrupted: impl Fn() -> bool) {
        let mut state = self.lock();
        while state.pending() > LIMIT && !interrupted() {
            state = self.0.drained.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Makes every thread in [`Output::wait_room`] check its `interrupted` again.
    pub fn wake(&self) {
        // Hold the lock, or a waiter between its check and its sleep would miss the notification.
        let _state = self.lock();
        self.0.drained.notify_all();
    }

    /// Declares that no more bytes will be pushed. [`Output::done`] is signalled when the last byte is written.
    pub fn close(&self) {
        let mut state = self.lock();
        state.closing = true;
        if state.broken {
            let _ = self.0.done.write(1);
        }
        self.0.filled.notify_one();
    }

    /// Eventfd that is readable once everything was written or discarded after [`Output::close`].
    pub fn done(&self) -> &EventFd {
        &self.0.done
    }

    fn write_loop(&self, mut destination: Destination) {
        let mut chunk = Vec::new();
        loop {
            let mut state = self.lock();
            state.in_flight = 0;
            self.tell_room(&mut state);
            // Sleep until woken; bytes that arrived while the last chunk was written are written immediately.
            state.idle = state.buffer.is_empty();
            while state.idle && !state.closing {
                state = self.0.filled.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.buffer.is_empty() && state.closing {
                drop(state);
                // Close the destination first: a reader must see the end before anyone asks what it has read.
                drop(destination);
                let _ = self.0.done.write(1);
                return;
            }
            state.idle = false;
            chunk.clear();
            std::mem::swap(&mut chunk, &mut state.buffer);
            state.in_flight = chunk.len();
            drop(state);
            if let Err(e) = write_all(&mut *destination.writer, &chunk) {
                let Destination { name, told, .. } = destination;
                let level = if told { log::Level::Debug } else { log::Level::Warn };
                log::log!(level, "{name}: cannot write console output ({e}); further output is discarded");
                // The former comes from a pipe, the latter from a socket.
                let gone = matches!(e.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset);
                let lost = told && !gone;
                let lost = lost.then(|| format!("cannot write the command's output to {name}: {e}"));
                let mut state = self.lock();
                let State { closing, room_wanted, pushed, .. } = *state;
                *state = State { broken: true, failed: true, lost, closing, room_wanted, pushed, ..State::default() };
                self.tell_room(&mut state);
                if state.closing {
                    let _ = self.0.done.write(1);
                }
                return;
            }
        }
    }
}

/// Like `write_all` and `flush`, but waits where another process made the descriptor non-blocking.
fn write_all(writer: &mut dyn Write, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match writer.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => bytes = &bytes[n..],
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            // A `Write` offers no descriptor to wait on; polling every millisecond costs little.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => thread::sleep(std::time::Duration::from_millis(1)),
            Err(e) => return Err(e),
        }
    }
    writer.flush()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::AsRawFd;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    fn done_within(output: &Output, time: Duration) -> bool {
        let mut poller = event::Poller::new().unwrap();
        poller.add(output.done().as_raw_fd(), 0, event::Interest::Read).unwrap();
        poller.wait(Some(time)).unwrap().count() == 1
    }

    #[test]
    fn everything_comes_out_in_order_even_to_a_slow_reader() {
        let (mut reader, writer) = io::pipe().unwrap();
        let output =
            Output::new(Destination { name: "pipe".into(), writer: Box::new(writer), eager: false, told: false })
                .unwrap();
        let text: Vec<u8> = (0..1_000_000u32).map(|i| i as u8).collect();
        let pusher = {
            let (output, text) = (output.clone(), text.clone());
            thread::spawn(move || {
                for piece in text.chunks(777) {
                    output.wait_room(|| false);
                    output.push(piece);
                }
                output.close();
            })
        };
        assert!(!done_within(&output, Duration::from_millis(50)), "a full pipe holds it up");
        let mut got = Vec::new();
        reader.read_to_end(&mut got).unwrap();
        pusher.join().unwrap();
        assert_eq!(got, text);
        assert!(done_within(&output, Duration::from_secs(60)));
    }

    #[test]
    fn a_waiting_vcpu_can_be_interrupted() {
        let (_reader, writer) = io::pipe().unwrap();
        let output =
            Output::new(Destination { name: "pipe".into(), writer: Box::new(writer), eager: false, told: false })
                .unwrap();
        output.push(&vec![b'x'; 1 << 20]);
        let stop = Arc::new(AtomicBool::new(false));
        let waiter = {
            let (output, stop) = (output.clone(), stop.clone());
            thread::spawn(move || output.wait_room(|| stop.load(Ordering::SeqCst)))
        };
        assert!(output.is_full());
        stop.store(true, Ordering::SeqCst);
        output.wake();
        waiter.join().unwrap();
    }

    #[test]
    fn room_is_told_to_who_asked_for_it() {
        let (mut reader, writer) = io::pipe().unwrap();
        let output =
            Output::new(Destination { name: "pipe".into(), writer: Box::new(writer), eager: false, told: false })
                .unwrap();
        assert!(output.has_room(LIMIT));
        output.push(&vec![b'x'; 1 << 20]);
        assert!(!output.has_room(LIMIT));
        assert!(output.room().read().is_err());
        io::Read::read_exact(&mut reader, &mut vec![0; 1 << 20]).unwrap();
        let limit = std::time::Instant::now() + Duration::from_secs(60);
        while output.room().read().is_err() {
            assert!(std::time::Instant::now() < limit);
        }
        assert!(output.has_room(LIMIT));
        // A reader that has closed leaves room for everything.
        output.push(&vec![b'x'; 1 << 20]);
        assert!(!output.has_room(LIMIT));
        drop(reader);
        while output.room().read().is_err() {
            assert!(std::time::Instant::now() < limit);
        }
    }

    #[test]
    fn a_reader_that_is_gone_costs_output_not_the_guest() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let output =
            Output::new(Destination { name: "pipe".into(), writer: Box::new(writer), eager: false, told: false })
                .unwrap();
        for _ in 0..100 {
            output.push(&[0; 4096]);
            output.wait_room(|| false);
        }
        output.close();
        assert!(done_within(&output, Duration::from_secs(60)));
    }

    #[test]
    fn a_full_disk_is_no_reason_to_hang_but_may_be_one_to_fail() {
        for told in [false, true] {
            let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
            let output = Output::new(Destination { name: "here".into(), writer: Box::new(full), eager: false, told });
            let output = output.unwrap();
            assert_eq!(output.lost(), None);
            output.push(b"lost");
            output.close();
            assert!(done_within(&output, Duration::from_secs(60)));
            let why = "cannot write the command's output to here: No space left on device (os error 28)";
            assert_eq!(output.lost().as_deref(), told.then_some(why));
        }
        let (reader, writer) = std::os::unix::net::UnixStream::pair().unwrap();
        drop(reader);
        let gone = Destination { name: "here".into(), writer: Box::new(writer), eager: true, told: true };
        let output = Output::new(gone).unwrap();
        output.push(b"for nobody");
        output.close();
        assert!(done_within(&output, Duration::from_secs(60)));
        assert_eq!((output.has_failed(), output.lost()), (true, None));
    }
}
