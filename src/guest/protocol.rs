//! Protocol between `vireo exec` and the init in its guest.
//!
//! ```text
//! /vireo/request.json  ──▶ the whole request, packed into the initramfs
//! port vireo.control   ──▶ orders, one line of JSON each: a signal, a terminal's new size
//!                      ◀── reports, one line of JSON each: started, ended, or why not
//! port vireo.stdin     ──▶ the command's input, unchanged; the port is closed at its end
//! port vireo.stdout    ◀── the command's output, unchanged
//! port vireo.stderr    ◀── its error output, unchanged; absent when both go to the same place
//! ```
//!
//! The last report is sent when everything that the command wrote is in the ports' rings. It is a line like any other:
//! the host empties the rings before it releases the guest.

use std::ffi::{OsStr, OsString};
use std::net::Ipv4Addr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use serde::{Deserialize, Serialize};

/// Path of the request in the guest.
pub const REQUEST: &str = "/vireo/request.json";
/// Path of the list of modules: one path per line, in load order.
pub const MODULES: &str = "/vireo/modules";
/// Port for orders and reports.
pub const CONTROL: &str = "vireo.control";
/// Port of the command's standard input.
pub const STDIN: &str = "vireo.stdin";
/// Port of the command's standard output.
pub const STDOUT: &str = "vireo.stdout";
/// Port of the command's standard error.
pub const STDERR: &str = "vireo.stderr";
/// Tag of the share, or serial number of the disk, that is the root.
pub const ROOT: &str = "root";
/// Prefix, after the time, of the init's lines in the kernel's log; it writes there what it cannot report otherwise.
pub const LOG_NAME: &str = "vireo-init: ";
/// Longest line on the control port, in bytes.
pub const LINE_MAX: usize = 64 << 10;

/// Byte string that need not be UTF-8: an argument, a path.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Bytes {
    /// Valid UTF-8, the usual case.
    Text(String),
    /// Bytes that are not valid UTF-8.
    Raw(Vec<u8>),
    /// Empty string.
    #[default]
    Empty,
}

impl From<&OsStr> for Bytes {
    fn from(text: &OsStr) -> Self {
        text.to_str().map_or_else(|| Bytes::Raw(text.as_bytes().into()), |text| Bytes::Text(text.into()))
    }
}

impl From<Bytes> for OsString {
    fn from(bytes: Bytes) -> Self {
        match bytes {
            Bytes::Text(text) => text.into(),
            Bytes::Raw(bytes) => OsString::from_vec(bytes),
            Bytes::Empty => OsString::new(),
        }
    }
}

/// Task of the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Command and its arguments; empty for a shell.
    pub command: Vec<Bytes>,
    /// Complete environment of the command.
    pub env: Vec<(Bytes, Bytes)>,
    /// Directory in which the command starts.
    pub cwd: Bytes,
    /// Fail if that directory cannot be entered; otherwise the command starts in the root then.
    pub cwd_given: bool,
    /// Keep the HOME of the environment, because the user set it; otherwise it is replaced if it cannot be used.
    pub home_given: bool,
    /// Columns and rows of the command's terminal; `None` gives it pipes.
    pub terminal: Option<(u16, u16)>,
    /// Send both outputs to the same place; on a terminal, standard error goes to it too.
    pub merged: bool,
    /// Root file system.
    pub root: Root,
    /// Shared folders to mount.
    pub mounts: Vec<Mount>,
    /// Directories in the guest that may be or contain the kernel's modules, which programs look for in /lib/modules.
    pub modules: Vec<Bytes>,
    /// Set up the network card by DHCP.
    pub network: bool,
    /// Name server to use if DHCP announces none.
    pub name_server: Option<Ipv4Addr>,
}

/// Kind of root file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Root {
    /// Shared folder with the tag [`ROOT`]; writes go to memory unless it is `writable`.
    Share {
        /// Let writes reach the host.
        writable: bool,
    },
    /// Disk with the serial number [`ROOT`]; writes go to memory unless it is `writable`.
    Disk {
        /// Let writes reach the image.
        writable: bool,
    },
    /// Initramfs itself.
    Initramfs,
}

/// Shared folder to mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mount {
    /// Tag of the share.
    pub tag: String,
    /// Mount point.
    pub path: Bytes,
    /// Mount it writable.
    pub writable: bool,
}

/// Order from the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// Send a signal to the command.
    Signal(i32),
    /// Set the columns and rows of the command's terminal.
    Resize(u16, u16),
}

/// Report from the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Report {
    /// The command runs.
    Started,
    /// The command starts in the root, because its directory cannot be entered (`errno`).
    StartsInRoot(i32),
    /// The command did not start, for this reason given by the kernel (`errno`).
    NotStarted(i32),
    /// The command did not start, because its directory cannot be entered (`errno`).
    NoCwd(i32),
    /// The guest could not be prepared; the text is a sentence.
    NotReady(String),
    /// The command exited with this code.
    Exited(u8),
    /// The command was killed by this signal.
    Signalled(i32),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_text_survives() {
        for bytes in [&b"plain"[..], b"", b"\xff\xfe/x", "ä".as_bytes()] {
            let text = OsStr::from_bytes(bytes);
            let json = serde_json::to_string(&Bytes::from(text)).unwrap();
            let back: OsString = serde_json::from_str::<Bytes>(&json).unwrap().into();
            assert_eq!(back, text, "{json}");
        }
    }

    #[test]
    fn reports_are_lines() {
        let line = serde_json::to_string(&Report::NotReady("a\nb".into())).unwrap();
        assert!(!line.contains('\n'), "{line}");
        assert_eq!(serde_json::from_str::<Report>(&line).unwrap(), Report::NotReady("a\nb".into()));
        assert_eq!(serde_json::from_str::<Order>("{\"signal\":15}").unwrap(), Order::Signal(15));
        assert!(serde_json::from_str::<Report>("{\"exited\":256}").is_err());
    }
}
