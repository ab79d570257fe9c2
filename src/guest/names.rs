//! Names that change on the host while the guest runs.
//!
//! overlayfs assumes that its lower layer does not change. A name that was missing once is missing forever, and once a
//! share reports that a name is now another file, every walk through that name fails with ESTALE. So the share declares
//! names valid until they are forgotten (`cache=names`), and this module makes the guest forget them: once a second,
//! and before a typed line reaches the terminal. A name that a process uses is kept; all others are looked up again.
//!
//! There is no system call for this, but reconfiguring a file system without any change makes the kernel drop the
//! directory entries that are not in use. Data in the page cache stays.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::mount::{FsPickFlags, fsconfig_reconfigure, fspick};

use super::{Result, cannot};

/// Longest time for which a name is considered valid.
const PERIOD: Duration = Duration::from_secs(1);

/// Mounts whose names are forgotten.
#[derive(Clone, Default)]
pub(super) struct Names(Arc<Vec<OwnedFd>>);

impl Names {
    /// Opens the mounts at `places`. An overlay must come before its lower layer.
    pub fn of(places: &[&Path]) -> Result<Self> {
        let open = |place: &&Path| {
            rustix::fs::open(*place, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                .map_err(cannot(format!("open {}", place.display())))
        };
        Ok(Names(Arc::new(places.iter().map(open).collect::<Result<_>>()?)))
    }

    /// Forgets all names that are not in use.
    pub fn forget(&self) {
        for mount in &*self.0 {
            // A mount that is frozen or gone is skipped.
            let _ = fspick(mount, c"", FsPickFlags::FSPICK_EMPTY_PATH | FsPickFlags::FSPICK_CLOEXEC)
                .and_then(fsconfig_reconfigure);
        }
    }

    /// Forgets the names periodically, in a separate thread.
    pub fn keep_forgetting(&self) -> Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        let names = self.clone();
        let work = move || loop {
            thread::sleep(PERIOD);
            names.forget();
        };
        let thread = thread::Builder::new().name("names".into()).stack_size(64 << 10).spawn(work);
        thread.map(drop).map_err(cannot("start a thread"))
    }
}
