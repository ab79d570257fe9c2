//! The other end of a guest's console.
//!
//! `talk PATH` connects its streams to a unix socket or a terminal and ends when the other side does. `talk --when
//! FILE` copies input to output, but reads nothing until that file exists; and its input, a pipe, holds next to
//! nothing.

#![allow(unsafe_code)] // the size of a pipe

use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

type Halves = (Box<dyn Read>, Box<dyn Write + Send>);

fn open(path: &str) -> io::Result<Halves> {
    if let Ok(stream) = UnixStream::connect(path) {
        return Ok((Box::new(stream.try_clone()?), Box::new(stream)));
    }
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    Ok((Box::new(file.try_clone()?), Box::new(file)))
}

fn stall(file: &str) -> io::Result<()> {
    // SAFETY: no memory is involved.
    if unsafe { libc::fcntl(0, libc::F_SETPIPE_SZ, 4096) } < 0 {
        return Err(io::Error::last_os_error());
    }
    while !Path::new(file).exists() {
        thread::sleep(Duration::from_millis(50));
    }
    io::copy(&mut io::stdin(), &mut io::stdout()).map(drop)
}

fn main() -> io::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let path = match &args[..] {
        [path] => path,
        [when, file] if when == "--when" => return stall(file),
        _ => return Err(io::Error::other("usage: talk PATH, or talk --when FILE")),
    };
    let (mut from, mut to) = open(path)?;
    println!("talking");
    thread::spawn(move || {
        // Passes bytes on as they come: io::copy would wait for more.
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = io::stdin().read(&mut buffer) {
            if to.write_all(&buffer[..n]).is_err() {
                return;
            }
        }
    });
    let mut buffer = [0; 4096];
    // A terminal whose other side is gone ends with EIO.
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        let mut stdout = io::stdout();
        stdout.write_all(&buffer[..n])?;
        stdout.flush()?;
    }
    Ok(())
}
