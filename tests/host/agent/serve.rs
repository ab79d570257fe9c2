//! The agent's side: the program that the emulated host boots into.

use crate::command::{Cgroup, Running};
use crate::note::{Control, Hello, Reply, Request};
use crate::programs::Programs;
use crate::terminal::set_window_size;
use crate::wire::{Ends, Link};
use crate::{DEADLINE, c, read_token};
use std::fs::File;
use std::io::{self, Read};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// Port of the agent inside the emulated host; outside it is a free one.
const PORT: u16 = 7777;
/// Seconds without a command after which the host powers itself off.
const IDLE_SECONDS: i64 = 20 * 60;

struct Agent {
    token: Vec<u8>,
    next_command: AtomicUsize,
    programs: Mutex<Programs>,
    running: AtomicUsize,
    last_use: AtomicI64,
}

pub(crate) fn serve(token: &PathBuf) -> io::Result<i32> {
    if std::process::id() == 1 {
        reap_orphans();
    }
    let agent = Arc::new(Agent {
        token: read_token(token)?,
        next_command: AtomicUsize::new(1),
        programs: Mutex::new(Programs::new()?),
        running: AtomicUsize::new(0),
        last_use: AtomicI64::new(wall_seconds()),
    });
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))?;
    let idle = agent.clone();
    thread::spawn(move || idle.power_off_when_idle());
    println!("host-agent: ready");
    for socket in listener.incoming() {
        let (agent, socket) = (agent.clone(), socket?);
        thread::spawn(move || {
            if let Err(error) = agent.connection(socket) {
                println!("host-agent: {error}");
            }
        });
    }
    Ok(0)
}

/// Waits for orphans: process 1 inherits every orphan of the host. The agent itself continues as its child, so that the
/// two kinds of waiting do not meet. Without an agent the host is useless: it powers off.
fn reap_orphans() {
    // SAFETY: no thread exists yet, so the child of fork may do everything the parent may.
    let agent = unsafe { c::fork() };
    if agent == 0 {
        return;
    }
    loop {
        let mut status = 0;
        // SAFETY: waits for any child and writes one integer.
        let pid = unsafe { c::waitpid(-1, &mut status, 0) };
        if pid == agent || pid < 0 {
            println!("host-agent: the agent ended with status {status:#x}");
            power_off();
        }
    }
}

fn power_off() -> ! {
    // SAFETY: no memory is involved; the call does not return when it succeeds.
    unsafe {
        c::sync();
        c::reboot(c::RB_POWER_OFF);
    }
    std::process::exit(1)
}

/// Returns the seconds of the real-time clock chip, which follows the machine outside. The kernel's own clocks leap
/// ahead while a host that counts instructions is idle.
fn wall_seconds() -> i64 {
    #[repr(C)]
    #[derive(Default)]
    struct RtcTime([i32; 9]);
    let mut rtc = RtcTime::default();
    let Ok(file) = File::open("/dev/rtc0") else {
        return 0;
    };
    // SAFETY: RTC_RD_TIME fills a struct rtc_time, nine ints, the first six laid out as in struct tm.
    if unsafe { c::ioctl(file.as_raw_fd(), c::RTC_RD_TIME, &mut rtc) } < 0 {
        return 0;
    }
    let [second, minute, hour, day, month, year, ..] = rtc.0.map(i64::from);
    // Only differences of minutes matter: a month may as well have 31 days; at worst an idle host lives longer.
    ((((year * 12 + month) * 31 + day) * 24 + hour) * 60 + minute) * 60 + second
}

impl Agent {
    fn power_off_when_idle(&self) {
        loop {
            thread::sleep(Duration::from_secs(20));
            let now = wall_seconds();
            if self.running.load(Ordering::SeqCst) > 0 {
                self.last_use.store(now, Ordering::SeqCst);
            } else if now - self.last_use.load(Ordering::SeqCst) > IDLE_SECONDS {
                println!("host-agent: idle for {IDLE_SECONDS} seconds, powering off");
                power_off();
            }
        }
    }

    fn connection(&self, mut socket: TcpStream) -> io::Result<()> {
        socket.set_read_timeout(Some(DEADLINE))?;
        let mut token = vec![0; self.token.len()];
        socket.read_exact(&mut token)?;
        if token != self.token {
            return Err(io::Error::other("a connection with a wrong token"));
        }
        let link = Arc::new(Link::new(socket)?);
        let hello = link.next_note(&mut Ends::default())?;
        link.reader.set_read_timeout(None)?;
        self.last_use.store(wall_seconds(), Ordering::SeqCst);
        link.note(&Reply::Here)?;
        match hello {
            Hello::Ping => Ok(()),
            Hello::Run(request) => {
                self.running.fetch_add(1, Ordering::SeqCst);
                let result = self.command(&link, &request);
                self.running.fetch_sub(1, Ordering::SeqCst);
                let _ = link.reader.shutdown(Shutdown::Both);
                result
            }
        }
    }

    fn command(&self, link: &Arc<Link>, request: &Request) -> io::Result<()> {
        self.programs.lock().unwrap().refresh(&request.programs);
        let group = Arc::new(Cgroup::new(self.next_command.fetch_add(1, Ordering::SeqCst))?);
        let mut running = match Running::start(request, &group) {
            Ok(running) => running,
            Err(error) => {
                let code = if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 };
                let name = String::from_utf8_lossy(&request.argv[0]);
                return link.note(&Reply::NotStarted(code, format!("{name}: {error}")));
            }
        };
        let (mut ends, output) = running.attach(link)?;
        let ended = Arc::new(AtomicBool::new(false));
        {
            let (link, group, ended) = (link.clone(), group.clone(), ended.clone());
            let (pid, pty) = (running.child.id() as i32, running.pty.clone());
            // Does what the client asks for while the command runs; when the client is gone, so is the command.
            thread::spawn(move || {
                while let Ok(control) = link.next_note(&mut ends) {
                    match (control, &pty) {
                        _ if ended.load(Ordering::SeqCst) => {} // the pid may belong to another process
                        // SAFETY: no memory is involved.
                        (Control::Signal(signal), _) => drop(unsafe { c::kill(-pid, signal) }),
                        (Control::WindowSize(rows, columns), Some(pty)) => {
                            set_window_size(pty.as_raw_fd(), rows, columns);
                        }
                        (Control::WindowSize(..), None) => {}
                    }
                }
                group.kill();
            });
        }
        let status = running.child.wait()?;
        ended.store(true, Ordering::SeqCst);
        group.kill(); // what the command left behind would hold the streams open
        for stream in output {
            let _ = stream.join();
        }
        group.remove();
        link.note(&Reply::Exited(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))))
    }
}
