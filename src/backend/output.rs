//! Console output on its way to the host: a bounded buffer and one thread that writes it.
//!
//! The thread does plain blocking writes, so every kind of destination works the same (terminal, pipe, file, socket),
//! nobody's descriptor is switched to non-blocking, and a reader that sleeps holds up only this thread. A vCPU that
//! pushed more than [`LIMIT`] waits in [`Output::wait_room`] before it enters the guest again; it never waits in the
//! middle of an exit, so pause, time limit and Ctrl-A X always get through.

use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use vmm_sys_util::eventfd::EventFd;

use crate::event;

/// Buffered bytes beyond which vCPUs wait: 64 KiB.
pub const LIMIT: usize = 64 << 10;

/// Bytes for which the thread is woken though no line is complete.
const CHUNK: usize = 1024;

/// Where output goes: something to write to, and its name for messages.
pub struct Destination {
    /// How messages call it: `stdout`, or a path.
    pub name: String,
    /// What is written to.
    pub writer: Box<dyn Write + Send>,
    /// Somebody watches: write each byte as it comes, not line by line.
    pub eager: bool,
    /// Whoever writes in the guest is told when nobody takes it any more ([`Output::has_failed`]), and whoever waits for
    /// the guest's end hears why ([`Output::lost`]); nobody else need be.
    pub told: bool,
}

/// A buffered, asynchronous writer. Cloning shares it.
#[derive(Clone)]
pub struct Output(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// The thread waits here for bytes.
    filled: Condvar,
    /// vCPUs wait here for room.
    drained: Condvar,
    /// Signalled when there is room for who asked for it.
    room: EventFd,
    /// Signalled when the buffer is empty after [`Output::close`].
    done: EventFd,
}

#[derive(Default)]
struct State {
    buffer: Vec<u8>,
    /// Bytes that the thread has taken but not yet written.
    in_flight: usize,
    /// Bytes that ever came.
    pushed: u64,
    closing: bool,
    /// The destination failed: everything is thrown away.
    broken: bool,
    /// It is broken because it failed, not because it leads nowhere.
    failed: bool,
    /// Why, if it was no reader that went and somebody wanted what came ([`Destination::told`]).
    lost: Option<String>,
    /// The thread sleeps and must be woken.
    idle: bool,
    /// [`Output::has_room`] said no.
    room_wanted: bool,
    /// Wake the thread for every byte.
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

    /// An output that throws everything away.
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

    /// Adds bytes; never waits. Unless somebody watches, the thread is woken only for whole lines or larger pieces:
    /// waking it for each of a UART's bytes would cost more than the bytes. The rest waits for [`Output::flush`].
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

    /// Has what was pushed written now, without waiting for it.
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

    /// How many bytes ever came.
    pub fn pushed(&self) -> u64 {
        self.lock().pushed
    }

    /// Whether what comes is thrown away because writing failed: nobody is there any more.
    pub fn has_failed(&self) -> bool {
        self.lock().failed
    }

    /// Why output did not reach whoever wanted it, if that was the host's fault: a sentence.
    pub fn lost(&self) -> Option<String> {
        self.lock().lost.clone()
    }

    /// Whether the buffer is over its limit.
    pub fn is_full(&self) -> bool {
        self.lock().pending() > LIMIT
    }

    /// Whether the buffer has no more than `limit` bytes. If it has, [`Output::room`] will be signalled when it is
    /// within [`LIMIT`].
    pub fn has_room(&self, limit: usize) -> bool {
        let mut state = self.lock();
        state.room_wanted = state.pending() > limit;
        !state.room_wanted
    }

    /// Readable when [`Output::has_room`] said no and would say yes now.
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

    /// Waits until there is room, or until `interrupted` says true after a [`Output::wake`].
    pub fn wait_room(&self, interrupted: impl Fn() -> bool) {
        let mut state = self.lock();
        while state.pending() > LIMIT && !interrupted() {
            state = self.0.drained.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets everyone in [`Output::wait_room`] look at their `interrupted` again.
    pub fn wake(&self) {
        // Under the lock, or a waiter between its look and its sleep would miss it.
        let _state = self.lock();
        self.0.drained.notify_all();
    }

    /// Declares that no more will come. [`Output::done`] is signalled when the last byte is out.
    pub fn close(&self) {
        let mut state = self.lock();
        state.closing = true;
        if state.broken {
            let _ = self.0.done.write(1);
        }
        self.0.filled.notify_one();
    }

    /// Readable once everything was written, or thrown away, after [`Output::close`].
    pub fn done(&self) -> &EventFd {
        &self.0.done
    }

    fn write_loop(&self, mut destination: Destination) {
        let mut chunk = Vec::new();
        loop {
            let mut state = self.lock();
            state.in_flight = 0;
            self.tell_room(&mut state);
            // Sleep until woken; what came in while the last chunk was written goes out at once.
            state.idle = state.buffer.is_empty();
            while state.idle && !state.closing {
                state = self.0.filled.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.buffer.is_empty() && state.closing {
                drop(state);
                // Who reads along hears of the end before anybody asks what was read.
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
                log::log!(level, "{name}: cannot write console output ({e}); it is thrown away from here on");
                // Of a pipe, and of a socket.
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

/// Like `write_all` and `flush`, but waits where somebody else made the descriptor non-blocking.
fn write_all(writer: &mut dyn Write, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match writer.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => bytes = &bytes[n..],
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            // There is no descriptor to wait on behind a `Write`; a millisecond is no load.
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
        // Who is gone takes everything.
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
