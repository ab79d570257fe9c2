//! File system device (5.11): shares a folder of the host, which the guest mounts by its tag
//! (`mount -t virtiofs TAG DIRECTORY`). Requests are FUSE requests; the guest's kernel is the client and checks
//! permissions itself, by the owners and modes that it sees.
//!
//! # File ownership
//!
//! A monitor that runs as root creates files as the user that the guest names, and can change owners. The guest's root
//! can then create set-user-id programs in the folder: mount it `nosuid` on the host, or share it with no other user
//! there. Device nodes are never created (except the 0:0 whiteouts of overlay file systems) and never opened. A monitor
//! that runs as an ordinary user reaches what that user can reach: new files belong to that user, whichever guest user
//! creates them, and owners cannot be changed. With `squash_uid=N` all files appear to belong to user and group N,
//! while the monitor's user performs every operation.
//!
//! # Caching
//!
//! Other processes may change the folder at the same time. `cache` decides how soon the guest sees such changes: by
//! default after one second, and when it opens a file. The guest keeps cached data of a file across a new open only if
//! the file has not changed. Locks (`flock`, `fcntl`) are shared among the guest's processes, but not with the host.
//!
//! # Request processing
//!
//! One worker serves the high-priority queue, which carries requests to forget files, and one worker serves each
//! request queue. Each request is completed immediately, by system calls that wait only for the disk: only regular
//! files and directories are opened, without waiting for other processes, and locks stay in the guest. A driver that
//! supports several queues (Linux 6.10 and later) uses as many as `queues` says; then a slow `fsync` delays only one of
//! them.
//!
//! The files that the guest knows and has open survive a pause. They are forgotten when the device is reset and when
//! the guest unmounts the folder or mounts it again. A snapshot saves them by name. The guest loses a file whose name,
//! when the machine is restored, is gone or belongs to another file, even if it has the file open. (See [`state`].)
//!
//! `wire` is the protocol; `inodes` holds the files that the guest knows and `handles` those that it has open; `server`
//! parses requests, and `names`, `files`, `listing` and `attributes` perform them. [`crate::backend::passthrough`] is
//! the host's folder.

mod attributes;
mod budget;
mod files;
mod handles;
mod inodes;
mod listing;
mod names;
mod server;
pub mod state;
#[cfg(test)]
mod tests;
mod wire;

use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{
    Activated, Activation, Context, DeviceId, DeviceInfo, Event, Fault, Handler, Progress, RING_FEATURES, Share,
    StateError, VirtioDevice, queue::Queue,
};
use crate::backend::passthrough;
use crate::options;
pub use budget::Budget;
use server::Server;
use state::FsState;

/// Number of descriptors per queue. A request has at most half as many pages, so it fits even without indirect
/// descriptors.
const QUEUE_SIZE: u16 = 512;
/// Maximum number of request queues of a share.
const MAX_QUEUES: u16 = 16;
/// Size of the tag in configuration space (5.11.4).
const TAG_BYTES: usize = 36;

/// Lifetime of what the guest may cache of the folder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cache {
    /// No caching, except of the data of files that stay open.
    Never,
    /// Names and attributes for one second; data until the file changes.
    #[default]
    Auto,
    /// Names until the guest forgets them, all else as in `Auto`. For overlayfs, which fails when a name comes to mean
    /// another file.
    Names,
    /// Everything, without limit: only the guest changes the folder.
    Always,
}

/// `--share`: a folder of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsConfig {
    /// Path of the folder on the host.
    pub path: PathBuf,
    /// Name by which the guest mounts the folder: 1 to 36 bytes; the default is `share0`, `share1`, ...
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// Refuses all changes.
    #[serde(default)]
    pub readonly: bool,
    /// User and group ID that all files appear to have, while the monitor's own user performs every operation.
    #[serde(default, alias = "squash-uid", skip_serializing_if = "Option::is_none")]
    pub squash_uid: Option<u32>,
    /// Presents file systems mounted inside the folder as part of the folder's own, as overlayfs requires of its
    /// layers.
    #[serde(default)]
    pub flat: bool,
    /// Caching policy: `never`, `auto`, `names` or `always`.
    #[serde(default)]
    pub cache: Cache,
    /// Number of request queues, 1 (the default) to 16, each with its own thread.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
}

impl FromStr for FsConfig {
    type Err = options::Error;

    fn from_str(text: &str) -> Result<Self, options::Error> {
        options::from_str(text, Some("path"))
    }
}

impl FsConfig {
    /// Checks all shares of a machine, as far as that is possible without opening anything. The error displays as a
    /// sentence.
    pub fn validate(shares: &[FsConfig]) -> Result<(), String> {
        for (i, share) in shares.iter().enumerate() {
            let tag = share.tag(i);
            if tag.is_empty() || tag.len() > TAG_BYTES || tag.contains('\0') {
                return Err(format!("the tag '{}' is not 1 to {TAG_BYTES} bytes long", tag.escape_debug()));
            }
            if shares.iter().take(i).enumerate().any(|(j, other)| other.tag(j) == tag) {
                return Err(format!("the tag '{tag}' is given twice"));
            }
            if let Some(queues) = share.queues.filter(|n| !(1..=MAX_QUEUES).contains(n)) {
                return Err(format!("queues={queues}: a share can have 1 to {MAX_QUEUES}"));
            }
            if share.squash_uid == Some(u32::MAX) {
                return Err("squash_uid: 4294967295 is not a valid user ID".into());
            }
        }
        Ok(())
    }

    /// Returns the tag of this share, which is the machine's `index`th.
    pub fn tag(&self, index: usize) -> String {
        self.tag.clone().unwrap_or_else(|| format!("share{index}"))
    }
}

/// The file system device.
pub struct Fs {
    info: DeviceInfo,
    config: [u8; TAG_BYTES + 4],
    server: Arc<Server>,
}

impl Fs {
    /// Opens the folder. `index` is the share's number within the machine; all shares use one budget.
    pub fn new(index: usize, config: &FsConfig, budget: &Budget) -> Result<Self, passthrough::Error> {
        let queues = config.queues.unwrap_or(1);
        // 5.11.4: the tag, padded with zeros, and the number of request queues.
        let mut space = [0; TAG_BYTES + 4];
        let (tag, number) = space.split_at_mut(TAG_BYTES);
        tag.iter_mut().zip(config.tag(index).bytes()).for_each(|(to, from)| *to = from);
        number.copy_from_slice(&u32::from(queues).to_le_bytes());
        Ok(Fs {
            info: DeviceInfo {
                id: DeviceId::Fs,
                name: format!("share{index}"),
                features: RING_FEATURES,
                queue_sizes: vec![QUEUE_SIZE; 1 + usize::from(queues)],
                shared_memory: vec![],
            },
            config: space,
            server: Arc::new(Server::new(config, budget)?),
        })
    }
}

impl VirtioDevice for Fs {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_config_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<Activated> {
        self.server.set_guest_ram(activation.ram.size());
        let share = |queue| Share { queues: vec![queue], handler: Box::new(Requests(self.server.clone())) };
        Ok(Activated::Here(activation.queues.into_iter().map(share).collect()))
    }

    fn reset(&mut self) {
        self.server.clear();
    }

    fn save(&self) -> Result<serde_json::Value, StateError> {
        let failed = |e: &dyn std::fmt::Display| StateError(format!("{} cannot be saved: {e}", self.info.name));
        let state = self.server.save().map_err(|e| failed(&e))?;
        serde_json::to_value(state).map_err(|e| failed(&e))
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<(), StateError> {
        let name = &self.info.name;
        let state =
            FsState::deserialize(state).map_err(|e| StateError(format!("the saved state of {name} is broken: {e}")))?;
        self.server.restore(state).map_err(|e| StateError(format!("the saved state of {name} {e}")))
    }
}

/// Serves one queue. All queues carry the same requests.
struct Requests(Arc<Server>);

impl Handler for Requests {
    fn event(&mut self, event: Event, queues: &mut [Queue], cx: &Context<'_>) -> Result<Progress, Fault> {
        match (event, queues) {
            (Event::Start, _) => {
                passthrough::ignore_file_size_limit()?;
                passthrough::take_own_umask();
                Ok(Progress::Done)
            }
            (Event::Kick(_), [queue]) => queue.serve(cx.ram, |chain| self.0.serve(chain, cx.ram)),
            _ => Ok(Progress::Done),
        }
    }
}
