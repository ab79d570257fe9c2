//! File system device (5.11): a folder of the host, which the guest mounts by its tag
//! (`mount -t virtiofs TAG WHERE`). The requests are those of FUSE; the guest's kernel is the client, and it asks for
//! permission itself, by the owners and modes that it sees.
//!
//! # Whose files
//!
//! A monitor that runs as root makes files for whom the guest says, and changes owners. Then root of the guest can make
//! set-user-id programs in the folder: mount it `nosuid` on the host, or share it with nobody else there. Device nodes
//! are never made (but for the 0:0 of overlay file systems), and none is opened. A monitor of an ordinary user reaches
//! what that user reaches: files belong to that user whoever makes them in the guest, and owners cannot be changed. With
//! `squash_uid=N` all files look as if they belonged to user and group N, while everything is done as the monitor's user.
//!
//! # When
//!
//! Others may change the folder at the same time. How soon the guest sees that is `cache`: by default a second, and when
//! it opens a file; cached data of a file is kept over a new open only if the file is as it was. Locks (`flock`, `fcntl`)
//! hold among the guest's processes, not against the host.
//!
//! # How it is served
//!
//! There is a worker for the queue of urgent requests, those to forget files, and one for each request queue. What a
//! request asks for is done at once, by system calls that wait for nothing but the disk: nothing is opened but regular
//! files and directories, and those so that they do not wait for another; locks stay in the guest. A driver that knows
//! several queues (Linux from 6.10 on) uses as many as `queues` says, and then a slow `fsync` holds up one of them only.
//!
//! What the guest knows and has open outlives a pause. It is forgotten when the device is reset and when the folder is
//! unmounted or mounted anew. When the machine is saved, it is saved by name; what has none any more, though it is open, or
//! another one when the machine is restored, is lost for the guest. (See [`state`].)
//!
//! `wire` is the protocol; `inodes` and `handles` are what the guest knows and has open; `server` takes requests apart, and
//! `names`, `files`, `listing` and `attributes` do them. [`crate::backend::passthrough`] is the folder.

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

/// Entries of a queue. A request has as many pages as half of this, so that it fits without indirect descriptors too.
const QUEUE_SIZE: u16 = 512;
/// The most request queues a share may have.
const MAX_QUEUES: u16 = 16;
/// Bytes of the tag in configuration space (5.11.4).
const TAG_BYTES: usize = 36;

/// How long the guest believes what it saw of the folder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cache {
    /// Not at all; only the data of files that stay open.
    Never,
    /// A second; and data for as long as files do not change.
    #[default]
    Auto,
    /// Names until the guest forgets them, else as `Auto`: for overlayfs, which fails where a name becomes another file's.
    Names,
    /// For good: nobody else changes the folder.
    Always,
}

/// `--share`: a folder of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsConfig {
    /// The folder.
    pub path: PathBuf,
    /// What the guest mounts it by: 1 to 36 bytes; `share0`, `share1`, ... by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// Refuse changes.
    #[serde(default)]
    pub readonly: bool,
    /// Show all files as this user's and group's, and do everything as the monitor's own.
    #[serde(default, alias = "squash-uid", skip_serializing_if = "Option::is_none")]
    pub squash_uid: Option<u32>,
    /// What is mounted inside looks like part of the same file system: overlayfs takes nothing else to lie on.
    #[serde(default)]
    pub flat: bool,
    /// `never`, `auto`, `names` or `always`.
    #[serde(default)]
    pub cache: Cache,
    /// Request queues, 1 (the default) to 16, each with a thread.
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
    /// Checks all shares of a machine, as far as nothing need be opened for that. Displays as a sentence.
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
                return Err(format!("{queues} queues are not 1 to {MAX_QUEUES}, which a share can have"));
            }
            if share.squash_uid == Some(u32::MAX) {
                return Err("squash_uid: 4294967295 is no user".into());
            }
        }
        Ok(())
    }

    /// The tag of the share that is the machine's `index`th.
    pub fn tag(&self, index: usize) -> String {
        self.tag.clone().unwrap_or_else(|| format!("share{index}"))
    }
}

/// The device.
pub struct Fs {
    info: DeviceInfo,
    config: [u8; TAG_BYTES + 4],
    server: Arc<Server>,
}

impl Fs {
    /// Opens the folder. `index` is the share's place among the machine's, which share the budget.
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

/// Serves one queue. Requests are the same on all of them.
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
