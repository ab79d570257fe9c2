//! Errors in the files that a user names.

use std::io;
use std::path::PathBuf;

use crate::memory::OutOfRam;
use crate::options::Size;

/// Reasons why a machine cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel image cannot be booted.
    #[error("cannot boot {}", path.display())]
    Kernel {
        /// The kernel's file.
        path: PathBuf,
        /// The problem with the file.
        source: Problem,
    },
    /// The initial RAM disk cannot be used.
    #[error("cannot use the initrd {}", path.display())]
    Initrd {
        /// The initrd's file.
        path: PathBuf,
        /// The problem with the file.
        source: Problem,
    },
    /// The initrds and the packed initramfs together cannot be loaded.
    #[error("cannot load the initramfs")]
    Initramfs(#[source] Problem),
    /// The initramfs cannot be packed.
    #[error(transparent)]
    Pack(#[from] super::pack::Error),
    /// The command line is longer than the kernel or the memory layout allows.
    #[error("the kernel command line has {length} bytes; this kernel takes at most {limit}")]
    CmdlineTooLong {
        /// Length of the command line in bytes.
        length: usize,
        /// Longest length that is possible.
        limit: u64,
    },
    /// The command line contains a NUL, which would cut it short.
    #[error("the kernel command line contains a NUL byte at offset {offset}; remove it")]
    CmdlineNul {
        /// Offset of the NUL.
        offset: usize,
    },
    /// The host provides no random numbers.
    #[error("cannot get random numbers from the host")]
    Random(#[source] io::Error),
    /// A boot structure does not fit into RAM. Placement was checked before, so this machine's RAM is not the RAM that
    /// the placement was planned for.
    #[error("cannot write the boot structures")]
    OutOfRam(#[from] OutOfRam),
    /// ACPI, SMBIOS or MP tables cannot be written.
    #[error("cannot write the firmware tables")]
    Table(#[from] super::table::Error),
}

/// A problem with one file.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// `open` failed.
    #[error("cannot open it")]
    Open(#[source] io::Error),
    /// `read` failed.
    #[error("cannot read it")]
    Read(#[source] io::Error),
    /// The file was truncated in the meantime.
    #[error("it has shrunk; it had {0} bytes when it was opened")]
    Shrunk(u64),
    /// Not a regular file.
    #[error("this is {0}, not a file")]
    NotAFile(&'static str),
    /// Not a file that vireo can boot.
    #[error(
        "this is {0}; vireo boots x86-64 bzImage, vmlinux (also gzip, zstd, xz, lz4 or bzip2 compressed), PVH \
         ELF and multiboot files"
    )]
    NotAKernel(String),
    /// The file or a part of it ends too early.
    #[error("truncated: {what} needs {needs} bytes, has {has}")]
    Truncated {
        /// The file, or the part of it that is too short.
        what: &'static str,
        /// Number of bytes that are needed.
        needs: u64,
        /// Number of bytes that exist.
        has: u64,
    },
    /// A header contradicts itself.
    #[error("damaged: {0}")]
    Damaged(String),
    /// A valid file that this machine cannot boot, with a sentence that gives the reason.
    #[error("{0}")]
    Unsuitable(String),
    /// The kernel's boot protocol is older than vireo needs.
    #[error("boot protocol {}.{:02} is too old; vireo needs {} or newer", version >> 8, version & 0xFF, needs)]
    TooOld {
        /// The kernel's protocol version, as in its setup header.
        version: u16,
        /// Oldest version that works, and the Linux version that introduced it.
        needs: &'static str,
    },
    /// Decompression failed.
    #[error("its {format} data cannot be unpacked")]
    Unpack {
        /// Name of the compression.
        format: &'static str,
        /// Error of the decompressor.
        source: io::Error,
    },
    /// The data unpacks to more than announced, or to more than any kernel has.
    #[error("its {format} data unpacks to more than {limit}")]
    TooLarge {
        /// Name of the compression.
        format: &'static str,
        /// Largest size that was expected.
        limit: Size,
    },
    /// The requested entry does not exist.
    #[error("this is {found}; --boot {mode} needs {needs}")]
    NoEntry {
        /// Format of the file.
        found: String,
        /// The requested mode.
        mode: &'static str,
        /// Kind of file or entry that the mode needs.
        needs: &'static str,
    },
    /// The machine has too little memory.
    #[error("it needs at least {needs} of memory; the machine has {has}")]
    Memory {
        /// Total machine memory that would be enough.
        needs: Size,
        /// Memory of the machine.
        has: Size,
    },
    /// The file cannot be placed below the MMIO hole or below the kernel's own limit, whatever the memory size.
    #[error("it has {size} bytes; at most {limit} fit below the kernel's limit, whatever the memory size")]
    NoPlace {
        /// Size of the file.
        size: u64,
        /// Largest size that can be placed.
        limit: u64,
    },
    /// An access outside RAM.
    #[error(transparent)]
    OutOfRam(#[from] OutOfRam),
}

impl Problem {
    /// Attributes this problem to the kernel file at `path`.
    pub fn of_kernel(self, path: impl Into<PathBuf>) -> Error {
        Error::Kernel { path: path.into(), source: self }
    }

    /// Attributes this problem to the initrd at `path`.
    pub fn of_initrd(self, path: impl Into<PathBuf>) -> Error {
        Error::Initrd { path: path.into(), source: self }
    }
}
