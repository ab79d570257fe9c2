//! A command in the emulated host: its process, its streams and the cgroup that ends with it.

use crate::c;
use crate::note::Request;
use crate::terminal::{open_pty, set_window_size, terminal_mode};
use crate::wire::{Ends, Link};
use std::ffi::{CString, OsString};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

pub(crate) struct Running {
    pub(crate) child: Child,
    pub(crate) pty: Option<Arc<OwnedFd>>,
}

impl Running {
    pub(crate) fn start(request: &Request, group: &Cgroup) -> io::Result<Running> {
        let argument = |bytes: &Vec<u8>| OsString::from_vec(bytes.clone());
        let mut command = Command::new(argument(&request.argv[0]));
        command.args(request.argv[1..].iter().map(argument));
        command.env_clear().envs(request.env.iter().map(|(key, value)| (argument(key), argument(value))));
        command.env("VIREO_HOST", "direct"); // in here, `tests/host/run` has nowhere else to go
        let cwd = PathBuf::from(argument(&request.cwd));
        command.current_dir(if cwd.is_dir() { cwd } else { "/".into() });
        let mut pty = None;
        if let Some((rows, columns)) = request.tty {
            let (master, terminal) = open_pty()?;
            set_window_size(master.as_raw_fd(), rows, columns);
            command.stdin(terminal.try_clone()?).stdout(terminal.try_clone()?).stderr(terminal);
            pty = Some(Arc::new(master));
        } else {
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        }
        let procs = CString::new(group.path.join("cgroup.procs").as_os_str().as_bytes())?;
        let has_pty = pty.is_some();
        let prepare = move || {
            // SAFETY: plain system calls only, as a child between fork and exec needs. Writing "0" moves the writer.
            unsafe {
                let file = c::open(procs.as_ptr(), c::O_WRONLY | c::O_CLOEXEC);
                if file < 0 || c::write(file, c"0".as_ptr().cast(), 1) != 1 || c::setsid() < 0 {
                    return Err(io::Error::last_os_error());
                }
                if has_pty && c::ioctl(0, c::TIOCSCTTY, 0) < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        };
        // SAFETY: `prepare` allocates nothing and takes no lock.
        unsafe { command.pre_exec(prepare) };
        Ok(Running { child: command.spawn()?, pty })
    }

    /// Connects the streams. Returns what feeds them, and the threads that must end before the command is over.
    pub(crate) fn attach(&mut self, link: &Arc<Link>) -> io::Result<(Ends, Vec<JoinHandle<()>>)> {
        let mut ends = Ends::default();
        if let Some(pty) = &self.pty {
            // On a terminal, a key ends the input. In raw mode it would be a character like any other.
            ends.deliver(link, 0, File::from(pty.try_clone()?), |mut terminal| {
                if terminal_mode(terminal.as_raw_fd()).is_some_and(|mode| mode.c_lflag & c::ICANON != 0) {
                    let _ = terminal.write_all(&[4]);
                }
            });
            let output = ends.forward(link, 1, File::from(pty.try_clone()?));
            return Ok((ends, vec![output]));
        }
        let no_pipe = || io::Error::other("a command without a pipe");
        ends.deliver(link, 0, self.child.stdin.take().ok_or_else(no_pipe)?, drop);
        let stdout = ends.forward(link, 1, self.child.stdout.take().ok_or_else(no_pipe)?);
        let stderr = ends.forward(link, 2, self.child.stderr.take().ok_or_else(no_pipe)?);
        Ok((ends, vec![stdout, stderr]))
    }
}

pub(crate) struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    pub(crate) fn new(number: usize) -> io::Result<Cgroup> {
        let path = PathBuf::from(format!("/sys/fs/cgroup/command-{number}"));
        fs::create_dir(&path)?;
        Ok(Cgroup { path })
    }

    pub(crate) fn kill(&self) {
        let _ = fs::write(self.path.join("cgroup.kill"), "1");
    }

    /// Removes the group. The kernel does that only once its last process has gone, which killing does not wait for.
    pub(crate) fn remove(&self) {
        for _ in 0..1000 {
            if fs::remove_dir(&self.path).is_ok() {
                return;
            }
            for child in fs::read_dir(&self.path).into_iter().flatten().flatten() {
                let _ = fs::remove_dir(child.path()); // groups that the command created
            }
            thread::sleep(Duration::from_millis(2));
        }
        println!("host-agent: {} is still in use", self.path.display());
    }
}
