//! Runs commands in the emulated host as if they ran here.
//!
//! `host-agent serve` is what the emulated host boots into; `host-agent run` is its client, used by `tests/host/run`.
//! Each command has one TCP connection (QEMU's port forwarding accepts few at a time). It begins with the token and a
//! [`Hello`]; then both sides send frames: an operation, a stream (0, 1, 2), a length, and that many bytes.
//!
//! ```text
//! Data    the next bytes of a stream; an empty frame is its end
//! Ack     a Data frame was written to where it belongs. A sender has at most WINDOW frames that are not acknowledged,
//!         so a stream that is not read stops its own sender, and neither fills memory nor holds up the other streams
//! Broken  the stream is not read any more: the sender's pipe breaks
//! Note    Control from the client (signals), Reply from the agent (the exit status, after all data)
//! ```
//!
//! The command and all its descendants live in a cgroup of their own, so that none of them outlives the command or the
//! connection.

#![allow(unsafe_code)] // cgroups, terminals, signals and process groups are system calls

mod note;
mod wire;
mod serve;
mod command;
mod programs;
mod terminal;
mod client;
mod c;

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Time limit for everything that should take milliseconds: a connection's first message, a stream's connection.
const DEADLINE: Duration = Duration::from_secs(20);
/// Exit status when the emulated host, not the command, failed.
const LOST: i32 = 255;

const USAGE: &str = "usage: host-agent serve TOKEN-FILE
       host-agent ping --port N --token FILE
       host-agent run --port N --token FILE [--tty] [--env KEY=VALUE] [--program PATH] -- COMMAND [ARGUMENT...]";

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let verb = args.next().unwrap_or_default();
    let result = match verb.to_str() {
        Some("serve") => serve::serve(&args.next().unwrap_or_default().into()),
        Some("ping") => client::Options::parse(args).and_then(|options| client::ping(&options)),
        Some("run") => client::Options::parse(args).and_then(|options| client::run(&options)),
        _ => Err(io::Error::other(USAGE)),
    };
    match result {
        Ok(code) => ExitCode::from(code as u8),
        Err(error) => {
            eprintln!("host-agent: {error}");
            ExitCode::from(LOST as u8)
        }
    }
}

/// Reads the token. Any user of the machine can connect to a port of localhost, but only a user who can read the token
/// file can run commands.
fn read_token(path: &PathBuf) -> io::Result<Vec<u8>> {
    let token = std::fs::read(path).map_err(|error| io::Error::other(format!("{}: {error}", path.display())))?;
    if token.len() < 32 {
        return Err(io::Error::other(format!("{} holds no token", path.display())));
    }
    Ok(token)
}
