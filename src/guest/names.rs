//! Names that the host changes while the guest runs.
//!
//! overlayfs takes what it lies on for unchanging. A name that was missing once is missing for good; and when a share says
//! that a name is another file's now, every walk through it fails with ESTALE. So the share has its names believed until
//! they are forgotten (`cache=names`), and they are forgotten here: once a second, and before a line that was typed
//! reaches the terminal. What a process uses keeps its name until then; everything else is looked up again.
//!
//! There is no system call for that, but reconfiguring a file system without any change has the kernel drop the directory
//! entries that nobody uses. Data in the page cache stays.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::mount::{FsPickFlags, fsconfig_reconfigure, fspick};

use super::{Result, cannot};

/// How long a name is believed.
const PERIOD: Duration = Duration::from_secs(1);

/// Mounts whose names are forgotten.
#[derive(Clone, Default)]
pub(super) struct Names(Arc<Vec<OwnedFd>>);

impl Names {
    /// Those of the mounts at `places`, each before what it lies on.
    pub fn of(places: &[&Path]) -> Result<Self> {
        let open = |place: &&Path| {
            rustix::fs::open(*place, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                .map_err(cannot(format!("open {}", place.display())))
        };
        Ok(Names(Arc::new(places.iter().map(open).collect::<Result<_>>()?)))
    }

    /// Forgets all names that nobody uses.
    pub fn forget(&self) {
        for mount in &*self.0 {
            // A mount that is frozen or gone is left alone.
            let _ = fspick(mount, c"", FsPickFlags::FSPICK_EMPTY_PATH | FsPickFlags::FSPICK_CLOEXEC)
                .and_then(fsconfig_reconfigure);
        }
    }

    /// Forgets them again and again, in a thread of its own.
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
