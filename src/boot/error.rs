//! What can be wrong with the files that a user names.

use std::io;
use std::path::PathBuf;

use crate::memory::OutOfRam;
use crate::options::Size;

/// Why a machine cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel image.
    #[error("cannot boot {}", path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Problem,
    },
    /// The initial RAM disk.
    #[error("cannot use the initrd {}", path.display())]
    Initrd {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Problem,
    },
    /// All that is loaded as the initrd together.
    #[error("cannot load the initramfs")]
    Initramfs(#[source] Problem),
    /// What was to be packed.
    #[error(transparent)]
    Pack(#[from] super::pack::Error),
    /// The command line is longer than the kernel or the memory map allows.
    #[error("the kernel command line has {length} bytes; this kernel takes at most {limit}")]
    CmdlineTooLong {
        /// Its length in bytes.
        length: usize,
        /// The longest that works.
        limit: u64,
    },
    /// A NUL would cut the command line short.
    #[error("the kernel command line contains a NUL byte at offset {offset}; remove it")]
    CmdlineNul {
        /// Where it is.
        offset: usize,
    },
    /// The host has no random numbers.
    #[error("cannot get random numbers from the host")]
    Random(#[source] io::Error),
    /// Something does not fit where it belongs; placement was checked before, so this machine's RAM is not the one
    /// that was planned for.
    #[error("cannot write the boot structures")]
    OutOfRam(#[from] OutOfRam),
    /// ACPI, SMBIOS or MP tables.
    #[error("cannot write the firmware tables")]
    Table(#[from] super::table::Error),
}

/// What is wrong with one file.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// `open` failed.
    #[error("cannot open it")]
    Open(#[source] io::Error),
    /// `read` failed.
    #[error("cannot read it")]
    Read(#[source] io::Error),
    /// Somebody truncated it.
    #[error("it has become shorter than the {0} bytes that it had")]
    Shrunk(u64),
    /// Not a regular file.
    #[error("this is {0}, not a file")]
    NotAFile(&'static str),
    /// Nothing that vireo can boot.
    #[error(
        "this is {0}; vireo boots x86-64 bzImage, vmlinux (also gzip, zstd, xz, lz4 or bzip2 compressed), PVH \
         ELF and multiboot files"
    )]
    NotAKernel(String),
    /// It ends too early.
    #[error("truncated: {what} needs {needs} bytes, has {has}")]
    Truncated {
        /// The file or the part of it that is meant.
        what: &'static str,
        /// How many bytes it should have.
        needs: u64,
        /// How many it has.
        has: u64,
    },
    /// A header contradicts itself.
    #[error("damaged: {0}")]
    Damaged(String),
    /// A sound file that this machine cannot boot: a sentence that says why.
    #[error("{0}")]
    Unsuitable(String),
    /// A boot protocol from before what is needed.
    #[error("boot protocol {}.{:02} is too old; vireo needs {} or newer", version >> 8, version & 0xFF, needs)]
    TooOld {
        /// The kernel's protocol version, as in its setup header.
        version: u16,
        /// The version that would work and whence it comes.
        needs: &'static str,
    },
    /// Decompression failed.
    #[error("its {format} data cannot be unpacked")]
    Unpack {
        /// Name of the compression.
        format: &'static str,
        /// What the decompressor says.
        source: io::Error,
    },
    /// More data than announced or than any kernel has.
    #[error("its {format} data unpacks to more than {limit}")]
    TooLarge {
        /// Name of the compression.
        format: &'static str,
        /// How much was expected at most.
        limit: Size,
    },
    /// The entry asked for does not exist.
    #[error("this is {found}; --boot {mode} needs {needs}")]
    NoEntry {
        /// What the file is.
        found: String,
        /// The mode asked for.
        mode: &'static str,
        /// What would work.
        needs: &'static str,
    },
    /// The machine is too small.
    #[error("it needs {needs} of memory or more, the machine has {has}")]
    Memory {
        /// Total machine memory that would work.
        needs: Size,
        /// What the machine has.
        has: Size,
    },
    /// It cannot be placed below the MMIO hole or below the kernel's own limit, whatever the memory size.
    #[error("it has {size} bytes; at most {limit} fit below the kernel's limit, whatever the memory size")]
    NoPlace {
        /// Its size.
        size: u64,
        /// The largest that works.
        limit: u64,
    },
    /// An access outside of RAM.
    #[error(transparent)]
    OutOfRam(#[from] OutOfRam),
}

impl Problem {
    /// Says which kernel file this is about.
    pub fn of_kernel(self, path: impl Into<PathBuf>) -> Error {
        Error::Kernel { path: path.into(), source: self }
    }

    /// Says which initrd this is about.
    pub fn of_initrd(self, path: impl Into<PathBuf>) -> Error {
        Error::Initrd { path: path.into(), source: self }
    }
}
