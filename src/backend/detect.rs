//! Recognition of image formats, by an image's first and last bytes and by its name.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{AlignedBuffer, qcow2};

/// A format that vireo does not read.
#[derive(Debug, PartialEq, Eq)]
pub struct Foreign {
    /// Name of the format.
    pub name: &'static str,
    /// Name of the format in `qemu-img`.
    pub driver: &'static str,
}

/// Format of an image according to its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// No known mark: the image may be a raw disk.
    Unmarked,
    Qcow2,
    Foreign(&'static Foreign),
}

/// Marks of foreign formats: offset in the first page, and the bytes found there.
static MARKS: [(usize, &[u8], Foreign); 11] = [
    (0, b"KDMV", Foreign { name: "VMDK", driver: "vmdk" }),
    (0, b"COWD", Foreign { name: "VMDK", driver: "vmdk" }),
    (0, b"# Disk DescriptorFile", Foreign { name: "VMDK", driver: "vmdk" }),
    (0x40, b"\x7f\x10\xda\xbe", Foreign { name: "VDI", driver: "vdi" }),
    (0, b"conectix", VHD),
    (0, b"vhdxfile", Foreign { name: "VHDX", driver: "vhdx" }),
    (0, b"QED\0", Foreign { name: "QED", driver: "qed" }),
    (0, b"WithoutFreeSpace", Foreign { name: "Parallels", driver: "parallels" }),
    (0, b"WithouFreSpacExt", Foreign { name: "Parallels", driver: "parallels" }),
    (0, b"LUKS\xba\xbe", Foreign { name: "LUKS", driver: "luks" }),
    (0, b"SKUL\xba\xbe", Foreign { name: "LUKS", driver: "luks" }),
];
const VHD: Foreign = Foreign { name: "VHD", driver: "vpc" };
/// A VHD of a fixed size, which is a raw disk followed by a footer.
static FIXED_VHD: Foreign = VHD;

/// Returns the format of an image according to its bytes. The file may be open for direct I/O only.
pub(super) fn content(file: &File) -> io::Result<Content> {
    let mut page = AlignedBuffer::new(4096);
    let n = file.read_at(page.as_mut_slice(), 0)?;
    let start = page.as_mut_slice().get(..n).unwrap_or_default();
    if start.starts_with(qcow2::MAGIC) {
        return Ok(Content::Qcow2);
    }
    let marked = |(at, mark, _): &&(usize, &[u8], Foreign)| start.get(*at..).is_some_and(|rest| rest.starts_with(mark));
    if let Some((_, _, foreign)) = MARKS.iter().find(marked) {
        return Ok(Content::Foreign(foreign));
    }
    // Direct I/O reads whole blocks; the last block may be incomplete.
    let end = (&mut &*file).seek(SeekFrom::End(0))?;
    let Some(last) = end.checked_sub(512) else { return Ok(Content::Unmarked) };
    let n = file.read_at(page.as_mut_slice(), last - last % 4096)?;
    let rest = page.as_mut_slice().get((last % 4096) as usize..n).unwrap_or_default();
    Ok(if rest.starts_with(b"conectix") { Content::Foreign(&FIXED_VHD) } else { Content::Unmarked })
}

/// Returns true if the name of an image says that it is qcow2.
pub(super) fn is_named_qcow2(path: &Path) -> bool {
    let extension = path.extension().and_then(|extension| extension.to_str());
    extension.is_some_and(|extension| ["qcow2", "qcow"].iter().any(|name| extension.eq_ignore_ascii_case(name)))
}
