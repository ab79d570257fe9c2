//! Clients, one after another: bytes from the socket go to gdbstub, and its answers go back. While the machine runs,
//! its traps and its end are awaited as well.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::time::Duration;

use gdbstub::conn::Connection;
use gdbstub::stub::state_machine::GdbStubStateMachine as Stub;
use gdbstub::stub::{DisconnectReason, GdbStubBuilder};
use log::Level;

use super::debuggee::{Debuggee, Stop};
use super::{End, Guest, Listener, Served};
use crate::event::{Interest, Poller};
use crate::log_limit::LogLimit;

/// Longest packet: all registers, or the memory that gdb writes in one packet.
const PACKET_MAX: usize = 4096;
/// Longest answer. A client that asks for more memory does not get it.
const ANSWER_MAX: usize = 64 << 10;

/// Delay before the stub tries again to accept a client.
const RETRY: Duration = Duration::from_millis(100);

const LISTEN: u64 = 0;
const CLIENT: u64 = 1;
const TRAP: u64 = 2;
const END: u64 = 3;

/// Serves until the machine ends (`None`), or until waiting for events fails.
pub(super) fn serve(listener: &Listener, guest: &dyn Guest, end: &End) -> Served {
    let mut poller = Poller::new()?;
    poller.add(listener.as_raw_fd(), LISTEN, Interest::Read)?;
    poller.add(end.fd.as_raw_fd(), END, Interest::Read)?;
    let (sessions, failures) = (LogLimit::default(), LogLimit::default());
    let mut retry = None;
    loop {
        let ready: Vec<u64> = poller.wait(retry)?.collect();
        if ready.contains(&END) {
            return Err(None);
        }
        if retry.take().is_some() {
            poller.modify(listener.as_raw_fd(), LISTEN, Interest::Read)?;
        }
        match listener.accept() {
            Ok(Some(stream)) => {
                sessions.log(Level::Info, "gdb: a debugger is attached");
                match debug(stream, listener, guest, end) {
                    Ok(what) => sessions.log(Level::Info, format_args!("gdb: {what}")),
                    Err(e) => {
                        failures.warn(format_args!("gdb: the debugger was disconnected, the guest continues: {e}"))
                    }
                }
            }
            Ok(None) => {}
            Err(e) => {
                failures.warn(format_args!("gdb: cannot accept a debugger: {e}"));
                // The listener stays ready if a client cannot be accepted, for example for lack of descriptors.
                poller.modify(listener.as_raw_fd(), LISTEN, Interest::None)?;
                retry = Some(RETRY);
            }
        }
    }
}

/// Lets a client debug the machine.
fn debug(stream: File, listener: &Listener, guest: &dyn Guest, end: &End) -> io::Result<&'static str> {
    let Some(mut debuggee) = Debuggee::attach(guest)? else { return Ok("the guest has ended") };
    let events = Events::new(&stream, &debuggee, listener, end);
    let finished = events.and_then(|events| converse(stream, events, &mut debuggee));
    match finished {
        Ok(DisconnectReason::Kill) => {
            guest.kill();
            Ok("killed")
        }
        // There is nothing to detach from.
        Ok(DisconnectReason::TargetExited(_) | DisconnectReason::TargetTerminated(_)) => Ok("the guest has ended"),
        Ok(DisconnectReason::Disconnect) => {
            debuggee.detach();
            Ok("detached")
        }
        Err(e) => {
            debuggee.detach();
            Err(e)
        }
    }
}

/// Speaks the protocol, from the first packet to the last.
fn converse(stream: File, mut events: Events, debuggee: &mut Debuggee) -> io::Result<DisconnectReason> {
    let wire = Wire { stream, answer: Vec::new() };
    let stub = GdbStubBuilder::new(wire).packet_buffer_size(PACKET_MAX).build().map_err(io::Error::other)?;
    let broken = |e| io::Error::other(format!("{e}"));
    let mut stub = stub.run_state_machine(debuggee).map_err(broken)?;
    loop {
        stub = match stub {
            Stub::Idle(idle) => match events.next(debuggee)? {
                Event::Byte(byte) => idle.incoming_data(debuggee, byte),
                Event::Gone => return Ok(DisconnectReason::Disconnect),
                // A client that is not waiting cannot be notified of the end.
                Event::Ended(code) => return Ok(DisconnectReason::TargetExited(code)),
                Event::Trapped => Ok(idle.into()),
            },
            Stub::Running(running) => match debuggee.trapped() {
                Some(stop) => running.report_stop(debuggee, stop),
                None => match events.next(debuggee)? {
                    Event::Byte(byte) => running.incoming_data(debuggee, byte),
                    Event::Gone => return Ok(DisconnectReason::Disconnect),
                    Event::Ended(code) => running.report_stop(debuggee, Stop::Exited(code)),
                    Event::Trapped => Ok(running.into()),
                },
            },
            Stub::CtrlCInterrupt(interrupt) => {
                let stop = debuggee.interrupt();
                interrupt.interrupt_handled(debuggee, Some(stop))
            }
            Stub::Disconnected(disconnected) => {
                let reason = disconnected.get_reason();
                if reason == DisconnectReason::Kill {
                    // gdbstub leaves out this answer; a client that does not expect it ignores it.
                    let _ = events.stream.write_all(b"$OK#9a");
                }
                return Ok(reason);
            }
        }
        .map_err(broken)?;
    }
}

/// The connection back to the client.
struct Wire {
    stream: File,
    answer: Vec<u8>,
}

impl Connection for Wire {
    type Error = io::Error;

    // gdbstub calls these functions in hundreds of places.
    #[inline(never)]
    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.write_all(&[byte])
    }

    #[inline(never)]
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.answer.len() + bytes.len() > ANSWER_MAX {
            return Err(io::Error::other("it asked for too much at once"));
        }
        self.answer.extend_from_slice(bytes);
        Ok(())
    }

    #[inline(never)]
    fn flush(&mut self) -> io::Result<()> {
        self.stream.write_all(&self.answer)?;
        self.answer.clear();
        Ok(())
    }
}

/// Events that a session waits for.
enum Event {
    /// A byte from the client.
    Byte(u8),
    /// The client closed the connection.
    Gone,
    /// A vCPU may have stopped.
    Trapped,
    /// vireo is about to end with this exit code.
    Ended(u8),
}

struct Events<'a> {
    poller: Poller,
    stream: File,
    input: VecDeque<u8>,
    listener: &'a Listener,
    end: &'a End,
}

impl<'a> Events<'a> {
    fn new(stream: &File, debuggee: &Debuggee, listener: &'a Listener, end: &'a End) -> io::Result<Self> {
        let poller = Poller::new()?;
        let stream = stream.try_clone()?;
        let (client, traps) = (stream.as_raw_fd(), debuggee.traps.fd().as_raw_fd());
        let fds = [(client, CLIENT), (traps, TRAP), (listener.as_raw_fd(), LISTEN), (end.fd.as_raw_fd(), END)];
        fds.into_iter().try_for_each(|(fd, token)| poller.add(fd, token, Interest::Read))?;
        Ok(Events { poller, stream, input: VecDeque::new(), listener, end })
    }

    fn next(&mut self, debuggee: &mut Debuggee) -> io::Result<Event> {
        loop {
            if let Some(byte) = self.input.pop_front() {
                return Ok(Event::Byte(byte));
            }
            let ready: Vec<u64> = self.poller.wait(None)?.collect();
            if ready.contains(&END) {
                return Ok(Event::Ended(self.end.code.load(Ordering::Acquire)));
            }
            if ready.contains(&LISTEN) {
                // The connection is closed immediately: that is better than a second gdb that waits in vain.
                if let Err(e) = self.listener.accept() {
                    log::debug!("gdb: cannot turn away another debugger: {e}");
                    // The listener stays ready, so the other debugger waits for the end of this session.
                    self.poller.modify(self.listener.as_raw_fd(), LISTEN, Interest::None)?;
                }
            }
            if ready.contains(&TRAP) {
                debuggee.collect();
                return Ok(Event::Trapped);
            }
            if ready.contains(&CLIENT) {
                let mut bytes = [0; PACKET_MAX];
                match self.stream.read(&mut bytes) {
                    Ok(0) => return Ok(Event::Gone),
                    Ok(n) => self.input.extend(&bytes[..n]),
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(Event::Gone),
                    Err(e) => return Err(e),
                }
            }
        }
    }
}
