//! The bzImage file: setup header, protected-mode kernel, compressed payload (Documentation/arch/x86/boot.rst).

use serde::{Deserialize, Serialize};

use super::error::Problem;
use super::source::Data;

/// File offset of the setup header, and its offset in `boot_params`.
pub const SETUP_HEADER: usize = 0x1F1;
/// End of the space for the setup header in `boot_params`.
const SETUP_HEADER_END: usize = 0x290;
/// `loadflags` bit 0: the kernel is loaded at 1 MiB, not at 64 KiB.
const LOADED_HIGH: u8 = 1;
/// `xloadflags` bit 0: there is a 64-bit entry at 0x200.
const XLF_KERNEL_64: u16 = 1;
/// First protocol version with `payload_offset`, `pref_address` and `init_size`: Linux 2.6.31.
const PROTOCOL_UNPACK: u16 = 0x20A;
/// First protocol version with `xloadflags`: Linux 3.8.
const PROTOCOL_64: u16 = 0x20C;
/// Unit of `syssize`.
const PARAGRAPH: u64 = 16;
/// Highest initrd address of a kernel whose header does not have `initrd_addr_max`.
const INITRD_ADDR_MAX: u64 = 0x37FF_FFFF;
/// Longest command line of a kernel whose header does not have `cmdline_size`.
const CMDLINE_SIZE: u64 = 255;

/// The setup header as it is in the file, and as it goes into the zero page.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetupHeader(Vec<u8>);

impl SetupHeader {
    /// Returns the header's bytes, beginning at [`SETUP_HEADER`].
    pub fn bytes(&self) -> &[u8] {
        &self.0[..self.0.len().min(SETUP_HEADER_END - SETUP_HEADER)]
    }

    fn get<const N: usize>(&self, offset: usize) -> [u8; N] {
        let bytes = self.bytes().get(offset - SETUP_HEADER..).and_then(|b| b.first_chunk());
        bytes.copied().unwrap_or([0; N])
    }
    fn u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes(self.get(offset))
    }
    fn u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.get(offset))
    }

    /// Returns the boot protocol version, with the major version in the high byte.
    pub fn version(&self) -> u16 {
        self.u16(0x206)
    }

    /// Returns the length of the real-mode part, after which the protected-mode kernel begins.
    fn setup_len(&self) -> u64 {
        // 0 means 4, for ancient kernels.
        let sectors = if self.0[0] == 0 { 4 } else { self.0[0] };
        (u64::from(sectors) + 1) * 512
    }

    /// Returns the length of the protected-mode kernel, rounded up to whole paragraphs.
    fn kernel_len(&self) -> u64 {
        u64::from(self.u32(0x1F4)) * PARAGRAPH
    }

    /// Returns the highest address that the initrd may occupy.
    pub fn initrd_addr_max(&self) -> u64 {
        match self.u32(0x22C) {
            0 => INITRD_ADDR_MAX,
            max => max.into(),
        }
    }

    /// Returns the alignment that the kernel wants: a power of two of at least 2 MiB.
    pub fn kernel_alignment(&self) -> u64 {
        let alignment = u64::from(self.u32(0x230));
        if alignment.is_power_of_two() { alignment.max(2 << 20) } else { 2 << 20 }
    }

    /// Returns the longest command line without its NUL.
    pub fn cmdline_size(&self) -> u64 {
        match self.u32(0x238) {
            0 => CMDLINE_SIZE,
            size => size.into(),
        }
    }

    /// Returns the kernel's preferred load address.
    fn pref_address(&self) -> u64 {
        u64::from_le_bytes(self.get(0x258))
    }

    /// Returns the size of contiguous memory that the kernel needs at its address before it reads the memory map.
    pub fn init_size(&self) -> u64 {
        self.u32(0x260).into()
    }
}

/// A bzImage whose parts are known to exist.
#[derive(Debug)]
pub struct BzImage {
    /// The setup header.
    pub setup: SetupHeader,
    /// The kernel's version string.
    pub version: Option<String>,
    /// Offset and length of the protected-mode kernel.
    pub kernel: (u64, u64),
}

/// Returns whether `head` begins a Linux/x86 boot image of any age.
pub fn is_bzimage(head: &[u8]) -> bool {
    head.get(0x1FE..0x200) == Some(&[0x55, 0xAA]) && head.get(0x202..0x206) == Some(b"HdrS")
}

impl BzImage {
    /// Reads and checks the header in `data`, for which [`is_bzimage`] holds.
    pub fn parse(data: &Data) -> Result<BzImage, Problem> {
        // The header ends as many bytes after 0x202 as the byte at 0x201 (the jump instruction's offset) says.
        let end = 0x202 + u64::from(data.bytes(0x201, 1)?[0]);
        let end = end.clamp(0x238, SETUP_HEADER_END as u64);
        let mut setup = SetupHeader(data.bytes(SETUP_HEADER as u64, end - SETUP_HEADER as u64)?);
        if setup.version() < PROTOCOL_UNPACK {
            return Err(Problem::TooOld { version: setup.version(), needs: "2.10 (Linux 2.6.31)" });
        }
        // Bytes after the header's end are code.
        let space = SETUP_HEADER_END - SETUP_HEADER;
        setup.0.truncate(space);
        if setup.get::<1>(0x211)[0] & LOADED_HIGH == 0 {
            return Err(Problem::NotAKernel("a zImage, which is loaded low".into()));
        }
        let (setup_len, mut kernel_len) = (setup.setup_len(), setup.kernel_len());
        let missing = (setup_len + kernel_len).saturating_sub(data.len());
        if missing < PARAGRAPH.min(kernel_len) {
            kernel_len -= missing; // the file ends within the last paragraph
        }
        data.check(setup_len, kernel_len)?;
        let version = version(data, u64::from(setup.u16(0x20E)), setup_len);
        Ok(BzImage { kernel: (setup_len, kernel_len), version, setup })
    }

    /// Returns offset and length of the payload: the compressed vmlinux, followed by its size. Programs other than
    /// Linux that use this format (memtest86+) have no payload.
    pub fn payload(&self) -> Result<Option<(u64, u64)>, Problem> {
        let (offset, len) = (u64::from(self.setup.u32(0x248)), u64::from(self.setup.u32(0x24C)));
        if len == 0 {
            return Ok(None);
        }
        if offset + len > self.kernel.1 || len < 8 {
            let kernel = self.kernel.1;
            return Err(Problem::Damaged(format!("a payload at {offset}..+{len} in a kernel of {kernel} bytes")));
        }
        Ok(Some((self.kernel.0 + offset, len)))
    }

    /// Returns whether the image has the 64-bit entry, so that it can boot without being unpacked.
    pub fn has_entry64(&self) -> bool {
        self.setup.version() >= PROTOCOL_64 && self.setup.u16(0x236) & XLF_KERNEL_64 != 0
    }

    /// Returns the memory range and the entry of a kernel that the guest unpacks: start, end and entry.
    pub fn packed_range(&self) -> Result<(u64, u64, u64), Problem> {
        let start = self.setup.pref_address().max(crate::layout::HIGH_RAM);
        let len = self.setup.init_size().max(self.kernel.1);
        let end = start.checked_add(len);
        let end = end.ok_or_else(|| Problem::Damaged(format!("a preferred address of {start:#x}")))?;
        Ok((start, end, start + 0x200))
    }
}

/// Returns the string that `kernel_version` points to, if it looks like a version. The pointer counts from 0x200.
fn version(data: &Data, pointer: u64, setup_len: u64) -> Option<String> {
    let offset = pointer + 0x200;
    if pointer == 0 || offset >= setup_len {
        return None;
    }
    let bytes = data.bytes(offset, (setup_len - offset).min(256)).ok()?;
    printable(&bytes)
}

/// Returns the NUL-terminated text at the start of `bytes`, up to its first blank.
pub fn printable(bytes: &[u8]) -> Option<String> {
    let text = bytes.split(|b| *b == 0 || *b == b' ').next()?;
    let ok = !text.is_empty() && text.len() < 128 && text.iter().all(u8::is_ascii_graphic);
    ok.then(|| String::from_utf8_lossy(text).into_owned())
}
