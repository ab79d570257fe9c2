//! The host's half of the tests of sockets; tests/host/vsock.c is the guest's.
//!
//! `vsock-peer PATH bulk`: megabytes both ways and back, half closes, readers that do not read.
//! `vsock-peer PATH many COUNT`: COUNT simultaneous connections in each direction.
//! `vsock-peer PATH ping PORT`: a line and its answer.
//!
//! Prints `serving` when it listens for the guest, and a line for each check that succeeds; it ends at the first that
//! fails.

use std::fs;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Output of `seq 1000000 2320000`: 10 MiB.
fn numbers() -> Vec<u8> {
    (1_000_000..=2_320_000u32).flat_map(|n| format!("{n}\n").into_bytes()).collect()
}

fn sum(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn connect(path: &str, port: u32) -> Result<UnixStream> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(Duration::from_secs(100)))?;
    stream.set_write_timeout(Some(Duration::from_secs(100)))?;
    writeln!(stream, "CONNECT {port}")?;
    let mut answer = Vec::new();
    while answer.last() != Some(&b'\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte).map_err(|e| format!("no answer from port {port}: {e}"))?;
        answer.extend(byte);
    }
    if answer.starts_with(b"OK ") { Ok(stream) } else { Err(String::from_utf8_lossy(&answer).into()) }
}

fn ping(stream: &UnixStream, text: &str) -> Result<()> {
    let mut stream = stream;
    stream.write_all(text.as_bytes())?;
    let mut answer = vec![0; text.len()];
    stream.read_exact(&mut answer)?;
    if answer == text.as_bytes() { Ok(()) } else { Err(format!("expected {text}, got {answer:?}").into()) }
}

/// Writes until nothing more is accepted for a second.
fn stuff(mut stream: &UnixStream) -> Result<usize> {
    stream.set_nonblocking(true)?;
    let (mut sent, mut since) = (0, Instant::now());
    while since.elapsed() < Duration::from_secs(1) {
        match stream.write(&[b's'; 16 << 10]) {
            Ok(n) => (sent, since) = (sent + n, Instant::now()),
            Err(e) if e.kind() == ErrorKind::WouldBlock => thread::sleep(Duration::from_millis(20)),
            Err(e) => return Err(e.into()),
        }
        if sent > 8 << 20 {
            return Err("some buffer is unbounded".into());
        }
    }
    Ok(sent)
}

/// Returns the processor time that the device's thread in the vireo with this socket has used, in hundredths of a
/// second.
fn device_ticks(path: &str) -> Result<u64> {
    for process in fs::read_dir("/proc")? {
        let process = process?.path();
        let command = fs::read(process.join("cmdline")).unwrap_or_default();
        // Other programs may also have vireo and the socket among their arguments.
        let mut words = command.split(|&byte| byte == 0);
        if !words.next().is_some_and(|program| program.ends_with(b"vireo"))
            || !words.any(|word| word.ends_with(format!("path={path}").as_bytes()))
        {
            continue;
        }
        for thread in fs::read_dir(process.join("task"))? {
            let stat = fs::read_to_string(thread?.path().join("stat"))?;
            if let Some((_, fields)) = stat.split_once(" (vsock) ") {
                return Ok(fields.split(' ').skip(11).take(2).map(|ticks| ticks.parse().unwrap_or(0)).sum());
            }
        }
    }
    Err("there is no vireo with a vsock thread".into())
}

fn bulk(path: &str) -> Result<()> {
    let numbers = numbers();
    let listener = UnixListener::bind(format!("{path}_81"))?;
    println!("serving");
    let from_guest = thread::spawn(move || -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        listener.accept()?.0.read_to_end(&mut all)?;
        Ok(all)
    });
    let mut refused = UnixStream::connect(path)?;
    writeln!(refused, "CONNECT 99")?;
    println!("refused: {}", refused.read(&mut [0])?);

    // Neither a program that reads nothing from us nor one that we do not read from blocks other connections.
    let deaf = connect(path, 4)?;
    let mut endless = connect(path, 3)?;
    let stuffed = stuff(&deaf)?;
    println!("stuffed: {}", stuffed > 128 << 10);
    let before = device_ticks(path)?;
    thread::sleep(Duration::from_secs(1));
    println!("at rest: {}", device_ticks(path)? - before < 10);
    let echo = connect(path, 1)?;
    for n in 0..50 {
        ping(&echo, &format!("ping {n}\n"))?;
    }
    println!("pings: 50");

    let mut summed = connect(path, 2)?;
    summed.write_all(&numbers)?;
    summed.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    summed.read_to_string(&mut answer)?;
    println!("to the guest: {}", answer.split_whitespace().next() == Some(&sum(&numbers)));
    println!("from the guest: {}", from_guest.join().map_err(|_| "a thread failed")?? == numbers);
    ping(&echo, "still there\n")?;
    let mut late = vec![0; 1 << 20];
    endless.read_exact(&mut late)?;
    println!("late: {}", late.chunks(2).all(|line| line == b"y\n"));
    Ok(())
}

fn many(path: &str, count: usize) -> Result<()> {
    let listener = UnixListener::bind(format!("{path}_82"))?;
    println!("serving");
    let served = thread::spawn(move || -> io::Result<usize> {
        let guests: io::Result<Vec<UnixStream>> = (0..count).map(|_| Ok(listener.accept()?.0)).collect();
        let mut lines = 0;
        for guest in guests? {
            let mut line = String::new();
            BufReader::new(&guest).read_line(&mut line)?;
            (&guest).write_all(line.as_bytes())?;
            lines += 1;
            // Stays open until the guest closes it.
            thread::spawn(move || (&guest).read(&mut [0]));
        }
        Ok(lines)
    });
    println!("served: {}", served.join().map_err(|_| "a thread failed")??);
    let clients: Vec<UnixStream> = (0..count).map(|_| connect(path, 1)).collect::<Result<_>>()?;
    for (n, client) in clients.iter().enumerate().rev() {
        ping(client, &format!("client {n}\n"))?;
    }
    println!("clients: {}", clients.len());
    Ok(())
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        [path, "bulk"] => bulk(path),
        [path, "many", count] => many(path, count.parse()?),
        [path, "ping", port] => {
            ping(&connect(path, port.parse()?)?, "hello\n")?;
            println!("answered");
            Ok(())
        }
        _ => Err("usage: vsock-peer PATH bulk, many COUNT or ping PORT".into()),
    }
}
