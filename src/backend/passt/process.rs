//! The passt program: its command line, start and end.
//!
//! By default passt maps the gateway's address to the host's own loopback, so that a guest reaches services that were
//! bound to 127.0.0.1 to keep them private. This is off unless the user enables it. The host's name server, which is
//! also on the loopback where systemd-resolved or dnsmasq runs, then gets an address of its own ([`NAME_SERVER`]),
//! which only answers DNS.

use std::fs;
use std::io::{self, PipeReader, Read};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use log::debug;

use super::{Error, Forward};
use crate::child;

/// Address at which the guest reaches a name server on the host's loopback. Recent versions of passt announce it by
/// DHCP; in that case, Debian 12's version announces none.
pub const NAME_SERVER: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 53);

/// Configuration of a guest's network.
#[derive(Clone, Debug)]
pub struct Options {
    /// Ports to forward.
    pub forwards: Vec<Forward>,
    /// The guest's MAC address.
    pub mac: [u8; 6],
    /// MTU to announce by DHCP.
    pub mtu: u16,
    /// Makes the gateway's address lead to the host's loopback.
    pub map_gateway: bool,
}

impl Options {
    /// Builds the command line; `resolv_conf` is the text of the host's file.
    fn arguments(&self, resolv_conf: &str) -> Vec<String> {
        let mut arguments: Vec<String> = ["--foreground", "--quiet", "--stderr", "--fd", "0"].map(String::from).into();
        arguments.extend(self.forwards.iter().flat_map(Forward::option));
        arguments.extend(["--mtu".into(), self.mtu.to_string()]);
        if !self.map_gateway {
            arguments.push("--no-map-gw".into());
            if resolver_is_local(resolv_conf) {
                arguments.extend(["--dns-forward".into(), NAME_SERVER.to_string()]);
            }
        }
        arguments
    }
}

/// Returns true if the host's first IPv4 name server, to which passt forwards, is on the host's loopback. If there is
/// none, passt would forward to 0.0.0.0.
fn resolver_is_local(resolv_conf: &str) -> bool {
    let servers = resolv_conf.lines().filter_map(|line| line.strip_prefix("nameserver "));
    servers.filter_map(|server| server.trim().parse().ok()).next().is_some_and(|server: Ipv4Addr| server.is_loopback())
}

/// A passt process. It is ended and reaped when dropped, or earlier.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    stderr: PipeReader,
}

impl Process {
    pub(super) fn start(socket: OwnedFd, options: &Options) -> Result<Self, Error> {
        // A full pipe must not stop passt: text that does not fit is lost, and there may be nothing to read.
        let (stderr, its_stderr) = io::pipe().map_err(Error::Start)?;
        for end in [stderr.as_fd(), its_stderr.as_fd()] {
            rustix::io::ioctl_fionbio(end, true).map_err(|e| Error::Start(e.into()))?;
        }
        let mut command = Command::new("passt");
        let resolv_conf = fs::read("/etc/resolv.conf").unwrap_or_default();
        command.args(options.arguments(&String::from_utf8_lossy(&resolv_conf)));
        command.stdin(socket).stdout(Stdio::null()).stderr(its_stderr);
        // Ctrl-C on the terminal asks the guest to end, and the guest may need its network to do so.
        command.process_group(0);
        child::deliver_signals(&mut command);
        child::inherit_nothing(&mut command);
        let child = command.spawn().map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => Error::NotInstalled,
            _ => Error::Start(e),
        })?;
        debug!("passt runs as process {}", child.id());
        Ok(Process { child, stderr })
    }

    /// Ends the process and returns those of its messages that may be the reason.
    pub(super) fn last_words(&mut self) -> String {
        self.end();
        let mut text = vec![0; 64 << 10];
        let n = self.stderr.read(&mut text).unwrap_or(0);
        let text = String::from_utf8_lossy(text.get(..n).unwrap_or_default());
        let noise = |line: &&str| !line.is_empty() && !line.contains("syslog") && !line.contains("Don't run as root");
        let words: Vec<&str> = text.lines().map(str::trim).filter(noise).take(5).collect();
        if words.is_empty() { String::new() } else { format!(": {}", words.join("; ")) }
    }

    /// Kills the process, which holds nothing that a kill could damage.
    fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_loopback_is_closed_unless_it_is_opened() {
        let mut options = Options { forwards: vec![], mac: [2; 6], mtu: 1500, map_gateway: false };
        let usual = "--foreground --quiet --stderr --fd 0 --mtu 1500";
        let closed = format!("{usual} --no-map-gw");
        for (resolv_conf, expected) in [
            ("", closed.clone()),
            ("search example.org\nnameserver 192.0.2.53\nnameserver 127.0.0.1\n", closed.clone()),
            ("nameserver ::1\n", closed.clone()),
            ("# a resolver\nnameserver 127.0.0.53\noptions edns0\n", format!("{closed} --dns-forward 169.254.1.53")),
            ("nameserver ::1\nnameserver  127.0.0.1", format!("{closed} --dns-forward 169.254.1.53")),
        ] {
            assert_eq!(options.arguments(resolv_conf).join(" "), expected, "{resolv_conf}");
        }
        options.map_gateway = true;
        assert_eq!(options.arguments("nameserver 127.0.0.53").join(" "), usual);
    }
}
