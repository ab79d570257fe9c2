//! What `vireo exec` and the init in its guest tell each other.
//!
//! ```text
//! /vireo/request.json  ──▶ the whole request, packed into the initramfs
//! port vireo.control   ──▶ orders, a line of JSON each: a signal, a window's new size
//!                      ◀── reports, a line of JSON each: started, ended, or why not
//! port vireo.stdin     ──▶ the command's input as it is; the port is closed when it ends
//! port vireo.stdout    ◀── its output as it is
//! port vireo.stderr    ◀── its other output as it is; not there when both go to the same place
//! ```
//!
//! The last report comes when everything that the command wrote is in the ports' rings, and is a line like any other: the
//! host empties the rings before it lets go of the guest.

use std::ffi::{OsStr, OsString};
use std::net::Ipv4Addr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use serde::{Deserialize, Serialize};

/// Where the request is in the guest.
pub const REQUEST: &str = "/vireo/request.json";
/// Where the modules' paths are, one a line, in the order in which they are loaded.
pub const MODULES: &str = "/vireo/modules";
/// The port for orders and reports.
pub const CONTROL: &str = "vireo.control";
/// The port of the command's input.
pub const STDIN: &str = "vireo.stdin";
/// The port of the command's output.
pub const STDOUT: &str = "vireo.stdout";
/// The port of the command's other output.
pub const STDERR: &str = "vireo.stderr";
/// The tag of the folder, and the serial number of the disk, that is the root.
pub const ROOT: &str = "root";
/// What the lines of the guest's init in the kernel's log begin with, after the time: what it could not tell otherwise.
pub const LOG_NAME: &str = "vireo-init: ";
/// Longest line on the control port, in bytes.
pub const LINE_MAX: usize = 64 << 10;

/// Bytes that need not be UTF-8: an argument, a path.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Bytes {
    /// Nearly always.
    Text(String),
    /// Otherwise.
    Raw(Vec<u8>),
    /// Nothing.
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

/// What the guest is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// The command and its arguments; without any, a shell.
    pub command: Vec<Bytes>,
    /// All of its environment.
    pub env: Vec<(Bytes, Bytes)>,
    /// Where it starts.
    pub cwd: Bytes,
    /// Without that place it does not start; otherwise it starts in the root then.
    pub cwd_given: bool,
    /// The environment's HOME is what the user asked for; otherwise another one will do if it cannot be used.
    pub home_given: bool,
    /// Columns and rows of the terminal that it gets; otherwise pipes.
    pub terminal: Option<(u16, u16)>,
    /// Both outputs are one; on a terminal, the other one is not elsewhere.
    pub merged: bool,
    /// What its file system is.
    pub root: Root,
    /// Folders of the host in it.
    pub mounts: Vec<Mount>,
    /// Where the kernel's modules may be in it, or above which folder: programs look for them in /lib/modules.
    pub modules: Vec<Bytes>,
    /// The network card is set up, by DHCP.
    pub network: bool,
    /// Name server to use when DHCP announces none.
    pub name_server: Option<Ipv4Addr>,
}

/// What the root file system is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Root {
    /// A shared folder ([`ROOT`]); what is written goes to memory unless it is `writable`.
    Share {
        /// Writes reach the host.
        writable: bool,
    },
    /// A disk ([`ROOT`]); the same.
    Disk {
        /// Writes reach the image.
        writable: bool,
    },
    /// The initramfs itself.
    Initramfs,
}

/// A shared folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mount {
    /// Its tag.
    pub tag: String,
    /// Where it goes.
    pub path: Bytes,
    /// It may be written to.
    pub writable: bool,
}

/// What the host wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// A signal for the command.
    Signal(i32),
    /// Columns and rows of its terminal.
    Resize(u16, u16),
}

/// What the guest tells.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Report {
    /// The command runs.
    Started,
    /// It starts in the root, for the place where it was to start cannot be entered (`errno`).
    StartsInRoot(i32),
    /// It does not, for this reason of the kernel's (`errno`).
    NotStarted(i32),
    /// It does not, for the place where it was to start cannot be entered (`errno`).
    NoCwd(i32),
    /// The guest could not be made ready: a sentence.
    NotReady(String),
    /// The command exited with this code.
    Exited(u8),
    /// It was killed by this signal.
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
