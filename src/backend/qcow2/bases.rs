//! Paths of base images, found before any image is opened: base images are inputs, as the files that the user names.

use std::io::{self, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::MAX_DEPTH;
use super::header::{Base, Header};
use crate::backend::held;
use crate::backend::image::{Format, open_unlocked};

/// Returns the path of the base image that the image at `image` refers to by `name`.
pub(super) fn path_of(image: &Path, name: &str) -> PathBuf {
    image.parent().unwrap_or(Path::new("")).join(name)
}

/// Returns the paths of all images below the one at `path`, and keeps these files open if inputs are kept. `format` is
/// the format that the user named. An image that cannot be read ends the list: opening it reports the error later.
///
/// # Errors
///
/// Fails with the path of a base image that a guest may have put there.
pub fn bases(path: &Path, format: Option<Format>) -> Result<Vec<PathBuf>, (PathBuf, io::Error)> {
    let mut found = Vec::new();
    let mut image = path.to_path_buf();
    while format != Some(Format::Raw)
        && found.len() < MAX_DEPTH
        && let Some(base) = base_of(&image)
    {
        let below = path_of(&image, &base.name);
        found.push(below.clone());
        // A base that is not opened is an input, too: the report of the refusal must not replace it.
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

/// Returns the base image that the header of the image at `path` names.
fn base_of(path: &Path) -> Option<Base> {
    let (file, _) = open_unlocked(path, true, false, false).ok()?;
    let end = (&file).seek(SeekFrom::End(0)).ok()?;
    Header::read(&file, path, end, false).ok()?.base
}
