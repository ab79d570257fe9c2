//! A daemon for tests, with configurable answers.

use super::*;
use std::os::unix::net::UnixListener;
use std::sync::mpsc::{Receiver, channel};

/// Reaction of a daemon to a request.
pub enum Answer {
    /// Correct reaction: acknowledges the request, or answers with this payload.
    Good(Vec<u8>),
    /// Sends these bytes as they are.
    Raw(Vec<u8>),
    /// Does not answer.
    Silence,
    /// Closes the connection.
    End,
}

/// A daemon in a thread, which serves any number of connections one after the other.
pub struct FakeDaemon {
    pub path: PathBuf,
    /// Requests received, with their payloads, in order.
    pub requests: Receiver<(u32, Vec<u8>)>,
    _dir: tempfile::TempDir,
}

/// Returns the answer of a correct daemon with these features.
pub fn good(features: u64, request: u32, payload: &[u8]) -> Vec<u8> {
    match request {
        1 => (features | PROTOCOL_FEATURES).to_ne_bytes().to_vec(),
        15 => (OURS & !PROTOCOL_BACKEND_REQ | 1 << 1).to_ne_bytes().to_vec(),
        17 => 5u64.to_ne_bytes().to_vec(),
        11 => [&payload[..4], &7u32.to_ne_bytes()].concat(),
        24 => [&payload[..CONFIG_HEADER], &(0..payload.len() - CONFIG_HEADER).map(|i| i as u8).collect::<Vec<_>>()]
            .concat(),
        _ => 0u64.to_ne_bytes().to_vec(),
    }
}

impl FakeDaemon {
    pub fn start(mut answer: impl FnMut(u32, &[u8]) -> Answer + Send + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let (sender, requests) = channel();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut head = [0; HEADER];
                while stream.read_exact(&mut head).is_ok() {
                    let (request, flags, size) = parse(&head);
                    let mut payload = vec![0; size];
                    if stream.read_exact(&mut payload).is_err() {
                        break;
                    }
                    let asks = flags & NEED_REPLY != 0 || matches!(request, 1 | 11 | 15 | 17 | 24);
                    let reply = match answer(request, &payload) {
                        Answer::Good(_) if !asks => vec![],
                        Answer::Good(reply) => [&header(request, 5, reply.len())[..], &reply].concat(),
                        Answer::Raw(bytes) => bytes,
                        Answer::Silence => vec![],
                        Answer::End => break,
                    };
                    if sender.send((request, payload)).is_err() {
                        return;
                    }
                    let _ = io::Write::write_all(&mut stream, &reply);
                }
            }
        });
        FakeDaemon { path, requests, _dir: dir }
    }

    /// Starts a correct daemon with these features.
    pub fn good(features: u64) -> Self {
        Self::start(move |request, payload| Answer::Good(good(features, request, payload)))
    }

    /// Returns the requests received since the last call.
    pub fn seen(&self) -> Vec<u32> {
        self.requests.try_iter().map(|(request, _)| request).collect()
    }
}
