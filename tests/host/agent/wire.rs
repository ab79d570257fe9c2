//! A connection: frames, and the threads that carry the streams over it.

use crate::note::Note;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

const DATA: u8 = 0;
const ACK: u8 = 1;
const BROKEN: u8 = 2;
const NOTE: u8 = 3;

const WINDOW: usize = 8;
const CHUNK: usize = 64 << 10;

/// One end of a connection.
pub(crate) struct Link {
    pub(crate) reader: TcpStream,
    writer: Mutex<TcpStream>,
}

impl Link {
    pub(crate) fn new(socket: TcpStream) -> io::Result<Link> {
        socket.set_nodelay(true)?;
        Ok(Link { reader: socket.try_clone()?, writer: Mutex::new(socket) })
    }

    fn send(&self, operation: u8, stream: usize, bytes: &[u8]) -> io::Result<()> {
        let mut frame = vec![operation, stream as u8];
        frame.extend((bytes.len() as u32).to_le_bytes());
        frame.extend(bytes);
        self.writer.lock().unwrap().write_all(&frame)
    }

    fn receive(&self) -> io::Result<(u8, usize, Vec<u8>)> {
        let mut header = [0; 6];
        (&self.reader).read_exact(&mut header)?;
        let [operation, stream, length @ ..] = header;
        let length = u32::from_le_bytes(length) as usize;
        if length > 8 << 20 || stream > 2 {
            return Err(io::Error::other("a frame that makes no sense"));
        }
        let mut bytes = vec![0; length];
        (&self.reader).read_exact(&mut bytes)?;
        Ok((operation, stream.into(), bytes))
    }

    pub(crate) fn note(&self, note: &impl Note) -> io::Result<()> {
        self.send(NOTE, 0, &note.to_bytes())
    }

    /// Passes frames to the streams they belong to, until a note comes or the connection ends.
    pub(crate) fn next_note<T: Note>(&self, ends: &mut Ends) -> io::Result<T> {
        loop {
            let (operation, stream, bytes) = self.receive()?;
            match operation {
                DATA => drop(ends.incoming[stream].as_ref().map(|chunks| chunks.send(bytes))),
                ACK => drop(ends.window[stream].as_ref().map(|window| window.send(()))),
                BROKEN => ends.window[stream] = None,
                _ => return T::from_bytes(bytes),
            }
        }
    }
}

/// Channels to the threads that serve the streams. Dropping it ends them.
#[derive(Default)]
pub(crate) struct Ends {
    incoming: [Option<Sender<Vec<u8>>>; 3],
    window: [Option<Sender<()>>; 3],
}

impl Ends {
    /// Starts sending what `from` delivers. If the stream breaks, `from` is dropped and so closed.
    pub(crate) fn forward(
        &mut self,
        link: &Arc<Link>,
        stream: usize,
        mut from: impl Read + Send + 'static,
    ) -> JoinHandle<()> {
        let (sender, window) = channel();
        (0..WINDOW).for_each(|_| sender.send(()).unwrap());
        self.window[stream] = Some(sender);
        let link = link.clone();
        thread::spawn(move || {
            let mut buffer = vec![0; CHUNK];
            while window.recv().is_ok() {
                let bytes = loop {
                    match from.read(&mut buffer) {
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                        result => break result.unwrap_or(0), // a pseudo-terminal ends with EIO
                    }
                };
                if link.send(DATA, stream, &buffer[..bytes]).is_err() || bytes == 0 {
                    return;
                }
            }
        })
    }

    /// Starts writing what arrives to `to`; then calls `at_end` with it.
    pub(crate) fn deliver<W: Write + Send + 'static>(
        &mut self,
        link: &Arc<Link>,
        stream: usize,
        mut to: W,
        at_end: impl FnOnce(W) + Send + 'static,
    ) -> JoinHandle<()> {
        let (sender, chunks) = channel::<Vec<u8>>();
        self.incoming[stream] = Some(sender);
        let link = link.clone();
        thread::spawn(move || {
            while let Ok(chunk) = chunks.recv()
                && !chunk.is_empty()
            {
                if to.write_all(&chunk).is_err() {
                    let _ = link.send(BROKEN, stream, &[]);
                    return;
                }
                let _ = link.send(ACK, stream, &[]);
            }
            at_end(to);
        })
    }
}
