//! The names of base images, before any of them is opened: they are inputs like those that the user names.

use std::io::{self, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::MAX_DEPTH;
use super::header::{Base, Header};
use crate::backend::held;
use crate::backend::image::{Format, open_unlocked};

/// The path of the base image that the image at `image` calls `name`.
pub(super) fn path_of(image: &Path, name: &str) -> PathBuf {
    image.parent().unwrap_or(Path::new("")).join(name)
}

/// The paths of all images below the one at `path`, which is kept if it must be; they are kept like it. `format` is what
/// the user says that it is. What cannot be read ends the list, for whoever opens the image has a sentence for that. An
/// error is a base which a guest may have put there, and its path.
pub fn bases(path: &Path, format: Option<Format>) -> Result<Vec<PathBuf>, (PathBuf, io::Error)> {
    let mut found = Vec::new();
    let mut image = path.to_path_buf();
    while format != Some(Format::Raw)
        && found.len() < MAX_DEPTH
        && let Some(base) = base_of(&image)
    {
        let below = path_of(&image, &base.name);
        found.push(below.clone());
        // One that is not opened is an input all the same: no report of the refusal shall replace it.
        if format.is_none() {
            break;
        }
        match held::keep_base(&image, &below) {
            Err(e) if e.raw_os_error().is_none() => return Err((below, e)),
            Ok(()) if base.format.as_deref() == Some("qcow2") => image = below,
            _ => break,
        }
    }
    Ok(found)
}

/// What the image at `path` says of its base.
fn base_of(path: &Path) -> Option<Base> {
    let (file, _) = open_unlocked(path, true, false, false).ok()?;
    let end = (&file).seek(SeekFrom::End(0)).ok()?;
    Header::read(&file, path, end, false).ok()?.base
}
