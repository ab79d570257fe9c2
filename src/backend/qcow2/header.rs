//! The header of a qcow2 image, read and checked before the format's driver sees it.
//!
//! Images come from strangers, and a guest may have written to them, while the driver (imago) expects an image that
//! QEMU created. So every field is checked here. A feature that is not supported is refused with its name and a remedy.
//! The driver reads [`Header::served`] instead of the header in the file. Fields and limits are those of QEMU's
//! docs/interop/qcow2.txt.

use std::fs::File;
use std::io;
use std::path::Path;

use super::read_at;

/// First bytes of every qcow2 image.
pub(crate) const MAGIC: &[u8; 4] = b"QFI\xFB";

/// Length in bytes of a header of version 2, and of the shortest header of version 3.
const V2_BYTES: usize = 72;
const V3_BYTES: usize = 104;
/// QEMU's limits of the tables that are kept in memory.
const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
const MAX_SNAPSHOTS: u32 = 65536;
/// Maximum length of a base image's name.
const MAX_NAME: u32 = 1023;

const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;
const KNOWN: u64 = DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION_TYPE | EXTENDED_L2;

/// Types of header extensions.
const END: u32 = 0;
const BASE_FORMAT: u32 = 0xE279_2ACA;
const FEATURE_NAMES: u32 = 0x6803_F857;

/// Place of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) offset: u64,
    /// Number of entries, of 8 bytes each.
    pub(super) entries: u64,
}

/// Name of a base image, and its format if the image states it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Base {
    pub(super) name: String,
    pub(super) format: Option<String>,
}

/// A checked header.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    pub(super) refcount_order: u32,
    pub(super) l1: Table,
    pub(super) refcounts: Table,
    pub(super) snapshots: u32,
    pub(super) base: Option<Base>,
    /// Feature bits that a writer without these features must clear.
    pub(super) autoclear: u64,
    /// True if compressed clusters are zstd frames rather than deflate streams.
    pub(super) zstd: bool,
    v2: [u8; V2_BYTES],
}

fn refuse<T>(why: impl Into<String>) -> io::Result<T> {
    Err(io::Error::new(io::ErrorKind::InvalidData, why.into()))
}

/// Reads a big-endian number. Missing bytes, as past the end of the file, are zero.
fn number<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(number(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(number(bytes, at))
}

impl Header {
    /// Reads and checks the header of `file`, whose size is `end`. Error messages call the file `path` in remedies.
    pub(super) fn read(file: &File, path: &Path, end: u64, writable: bool) -> io::Result<Self> {
        let start = read_at(file, 0, 4096)?;
        if !start.starts_with(MAGIC) {
            return refuse("it does not begin like a qcow2 image");
        }
        let version = u32_at(&start, 4);
        let cluster_bits = u32_at(&start, 20);
        match version {
            2 | 3 => {}
            1 => return refuse(format!("it has the old qcow format; {}", convert("qcow", path, ""))),
            _ => return refuse(format!("it has version {version} of the format; only 2 and 3 are supported")),
        }
        if !(9..=21).contains(&cluster_bits) {
            return refuse(format!("its clusters of 2^{cluster_bits} bytes are not in the range 512 bytes to 2M"));
        }
        // The header, its extensions and the base's name all lie in the first cluster.
        let first = read_at(file, 0, 1 << cluster_bits)?;
        let Some(v2) = first.first_chunk().copied() else { return refuse("it is too short") };
        let (length, features, autoclear, refcount_order) = if version == 2 {
            (V2_BYTES, 0, 0, 4)
        } else {
            let length = u32_at(&first, 100) as usize;
            if length < V3_BYTES || length > first.len() || !length.is_multiple_of(8) {
                return refuse(format!("its header cannot be {length} bytes long"));
            }
            (length, u64_at(&first, 72), u64_at(&first, 88), u32_at(&first, 96))
        };
        if refcount_order > 6 {
            return refuse(format!("its reference counts of 2^{refcount_order} bits are larger than 64 bits"));
        }
        let extensions = Extensions::read(&first, length)?;
        check_features(features, &extensions, path, writable)?;
        check_encryption(u32_at(&first, 32), path)?;
        let compression = if length > V3_BYTES { first.get(V3_BYTES).copied().unwrap_or(0) } else { 0 };
        let zstd = match (features & COMPRESSION_TYPE != 0, compression) {
            (false, 0) => false,
            (true, 1) => true,
            (_, kind) => return refuse(format!("its compression type {kind} is unknown or not announced")),
        };
        let header = Header {
            version,
            cluster_bits,
            refcount_order,
            l1: Table { offset: u64_at(&first, 40), entries: u32_at(&first, 36).into() },
            refcounts: Table {
                offset: u64_at(&first, 48),
                entries: u64::from(u32_at(&first, 56)) << (cluster_bits - 3),
            },
            snapshots: u32_at(&first, 60),
            base: base(&first, length, extensions.base_format)?,
            autoclear,
            zstd,
            v2,
        };
        header.check_places(u64_at(&first, 24), u64_at(&first, 64), end)?;
        Ok(header)
    }

    /// Checks the size of the disk against its tables, and the places of all tables.
    fn check_places(&self, size: u64, snapshots_at: u64, end: u64) -> io::Result<()> {
        let (cluster, snapshots) = (self.cluster(), self.snapshots);
        // An L2 table fills one cluster with 8-byte entries, each for one cluster.
        let covered = u128::from(self.l1.entries) << (2 * self.cluster_bits - 3);
        if size > i64::MAX as u64 || u128::from(size) > covered {
            return refuse(format!("its first-level table does not cover the {size} bytes of the disk"));
        }
        let in_file = |what: &str, table: Table, max: u64| {
            let bytes = table.entries * 8;
            if bytes > max {
                return refuse(format!("its {what} is larger than {} MiB", max >> 20));
            }
            // The last cluster of a file may be incomplete.
            let last = end.checked_next_multiple_of(cluster).unwrap_or(u64::MAX);
            let inside = table.offset.checked_add(bytes).is_some_and(|table_end| table_end <= last);
            if !inside || table.offset < cluster || !table.offset.is_multiple_of(cluster) {
                return refuse(format!("its {what} at {:#x} is misplaced", table.offset));
            }
            Ok(())
        };
        if self.l1.entries > 0 {
            in_file("first-level table", self.l1, MAX_L1_BYTES)?;
        } else if self.l1.offset != 0 {
            in_file("first-level table", Table { entries: 1, ..self.l1 }, MAX_L1_BYTES)?;
        }
        if self.refcounts.entries == 0 {
            return refuse("its reference counts are broken: their table has no clusters");
        }
        in_file("table of reference counts", self.refcounts, MAX_REFCOUNT_TABLE_BYTES)?;
        if snapshots > MAX_SNAPSHOTS {
            return refuse(format!("it claims to have {snapshots} snapshots"));
        }
        if snapshots > 0 {
            in_file("table of snapshots", Table { offset: snapshots_at, entries: 1 }, MAX_L1_BYTES)?;
        }
        Ok(())
    }

    /// Size of a cluster in bytes.
    pub(super) fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Returns the bytes that the driver reads instead of the file's first bytes. The fields of version 2 are as in the
    /// file, because the driver writes them back. Of version 3, no feature is set, as none remains that concerns the
    /// driver. There are no header extensions.
    pub(super) fn served(&self) -> Vec<u8> {
        let mut bytes = self.v2.to_vec();
        if self.version > 2 {
            bytes.extend([0; 24]);
            bytes.extend(self.refcount_order.to_be_bytes());
            bytes.extend((V3_BYTES as u32).to_be_bytes());
            bytes.extend([0; 8]);
        }
        bytes
    }
}

/// Returns advice with a command that rewrites the image.
fn convert(format: &str, path: &Path, options: &str) -> String {
    let path = path.display();
    format!("'qemu-img convert -f {format} -O qcow2{options} {path} {path}.new' converts it for vireo")
}

fn check_features(features: u64, extensions: &Extensions, path: &Path, writable: bool) -> io::Result<()> {
    let repair = format!("'qemu-img check -r all {}' repairs it", path.display());
    let unknown = features & !KNOWN;
    if unknown != 0 {
        let bit = unknown.trailing_zeros();
        let name = extensions.feature_name(bit);
        return refuse(format!("it needs a feature that vireo does not have: incompatible feature {bit}{name}"));
    }
    // Reading uses only data that is sound even if dirty: only reference counts may be wrong.
    if features & DIRTY != 0 && writable {
        return refuse(format!("it was not closed cleanly and its reference counts may be wrong (dirty); {repair}"));
    }
    if features & CORRUPT != 0 {
        return refuse(format!("it is marked as corrupt; {repair}"));
    }
    if features & EXTERNAL_DATA != 0 {
        let convert = convert("qcow2", path, "");
        return refuse(format!("its data is in another file (data_file), which is not supported; {convert}"));
    }
    if features & EXTENDED_L2 != 0 {
        let convert = convert("qcow2", path, " -o extended_l2=off");
        return refuse(format!("it has subclusters (extended_l2), which are not supported; {convert}"));
    }
    Ok(())
}

fn check_encryption(method: u32, path: &Path) -> io::Result<()> {
    let name = match method {
        0 => return Ok(()),
        1 => "AES",
        2 => "LUKS",
        _ => return refuse(format!("it is encrypted by an unknown method ({method})")),
    };
    let path = path.display();
    refuse(format!(
        "it is encrypted ({name}), which is not supported; 'qemu-img convert --object secret,id=key,file=KEYFILE \
         --image-opts driver=qcow2,file.filename={path},encrypt.key-secret=key -O qcow2 {path}.new' decrypts it"
    ))
}

/// Returns the name and format of the base image, if there is one.
fn base(first: &[u8], length: usize, format: Option<String>) -> io::Result<Option<Base>> {
    let (offset, len) = (u64_at(first, 8), u32_at(first, 16));
    if offset == 0 {
        return Ok(None);
    }
    let name = usize::try_from(offset).ok().filter(|_| (1..=MAX_NAME).contains(&len));
    // The driver expects the name to end before the cluster does.
    let name = name.filter(|at| *at >= length && at.saturating_add(len as usize) < first.len());
    let name = name.and_then(|at| first.get(at..at + len as usize));
    match name.map(|name| String::from_utf8(name.to_vec())) {
        Some(Ok(name)) if !name.contains('\0') => Ok(Some(Base { name, format })),
        Some(_) => refuse("the name of its base image is not text"),
        None => refuse("the name of its base image is misplaced"),
    }
}

/// Relevant contents of the header extensions.
#[derive(Default)]
struct Extensions {
    base_format: Option<String>,
    names: Vec<u8>,
}

impl Extensions {
    /// Reads the extensions from `at` on, up to their end mark, the base's name or the end of the cluster.
    fn read(first: &[u8], mut at: usize) -> io::Result<Self> {
        let name = usize::try_from(u64_at(first, 8)).unwrap_or(usize::MAX);
        let end = if name == 0 { first.len() } else { name.min(first.len()) };
        let mut found = Extensions::default();
        while at + 8 <= end {
            let (kind, len) = (u32_at(first, at), u32_at(first, at + 4) as usize);
            if kind == END {
                return Ok(found);
            }
            at += 8;
            let Some(data) = at.checked_add(len).filter(|e| *e <= end).and_then(|e| first.get(at..e)) else {
                return refuse(format!("its header extension {kind:#x} of {len} bytes is too long"));
            };
            match kind {
                BASE_FORMAT => match String::from_utf8(data.to_vec()) {
                    Ok(format) if found.base_format.as_ref().is_none_or(|before| *before == format) => {
                        found.base_format = Some(format);
                    }
                    _ => return refuse("the format of its base image is given twice or is not text"),
                },
                FEATURE_NAMES => found.names = data.to_vec(),
                _ => {}
            }
            at = at.saturating_add(len.next_multiple_of(8));
        }
        Ok(found)
    }

    /// Returns the image's own name for an incompatible feature, to be shown: ` (name)`, or nothing.
    fn feature_name(&self, bit: u32) -> String {
        let entry = self.names.chunks_exact(48).find(|entry| matches!(entry, [0, b, ..] if u32::from(*b) == bit));
        let text = entry.and_then(|entry| entry.get(2..)).unwrap_or_default();
        let text = text.iter().take_while(|byte| **byte != 0);
        let text: String = text.filter(|byte| matches!(byte, b' '..=b'~')).map(|byte| char::from(*byte)).collect();
        if text.is_empty() { text } else { format!(" ({text})") }
    }
}
