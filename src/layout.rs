//! Every guest-physical address, I/O port and GSI in one place, each with its size and its end.
//!
//! ```text
//!          0 ─ 0x0009_FC00   RAM: boot structures below, then free for the guest
//! 0x0009_FC00 ─ 0x000A_0000   EBDA, reserved
//! 0x000A_0000 ─ 0x000E_0000   legacy VGA hole: RAM that the e820 map does not offer
//! 0x000E_0000 ─ 0x0010_0000   ACPI, SMBIOS, MP table, reset stub: reserved
//! 0x0010_0000 ─ 0xC000_0000   RAM: kernel, initrd at the top
//! 0xC000_0000 ─ 0x1_0000_0000 the 32-bit MMIO hole: virtio slots, IO-APIC, local APICs
//! 0x1_0000_0000 ─             RAM that did not fit below the hole; after it, from the next multiple of 2 GiB on,
//!                             the memory of devices that are memory
//! ```

/// One page, 4 KiB.
pub const PAGE_SIZE: u64 = 4096;

/// Real-mode interrupt vectors.
pub const INTERRUPT_VECTORS: u64 = 0;
/// BIOS data area: the segment of the EBDA.
pub const BDA_EBDA_SEGMENT: u64 = 0x40E;
/// BIOS data area: KiB of memory below the EBDA.
pub const BDA_MEMORY_SIZE: u64 = 0x413;
/// GDT that the boot processor starts with (boot protocol and PVH entries).
pub const GDT: u64 = 0x500;
/// End of the GDT area.
pub const GDT_END: u64 = 0x600;
/// PVH `hvm_start_info`, followed by its module list and memory map (Xen PVH ABI).
pub const PVH_START_INFO: u64 = 0x6000;
/// End of the PVH area.
pub const PVH_END: u64 = 0x7000;
/// Linux `boot_params`, the "zero page" (Documentation/arch/x86/zero-page.rst).
pub const ZERO_PAGE: u64 = 0x7000;
/// End of the zero page.
pub const ZERO_PAGE_END: u64 = 0x8000;
/// `setup_data` list: the RNG seed.
pub const SETUP_DATA: u64 = 0x8000;
/// End of the `setup_data` area.
pub const SETUP_DATA_END: u64 = 0x9000;
/// Identity-mapping page tables: one PML4, one PDPT, four page directories of 2 MiB pages (4 GiB).
pub const PAGE_TABLES: u64 = 0x9000;
/// End of the page tables.
pub const PAGE_TABLES_END: u64 = 0xF000;
/// Kernel command line, NUL-terminated.
pub const CMDLINE: u64 = 0x2_0000;
/// Largest command line with its NUL; a kernel may accept less (`cmdline_size`).
pub const CMDLINE_MAX: u64 = 0x1_0000;

/// Multiboot information, its module and its memory map; the module's string follows on the next page.
pub const MULTIBOOT_INFO: u64 = 0x3_0000;
/// The string of the multiboot module: a path of at most a page.
pub const MULTIBOOT_STRING: u64 = 0x3_1000;
/// End of the multiboot area.
pub const MULTIBOOT_END: u64 = 0x3_2000;

/// Extended BIOS data area; conventional memory ends here.
pub const EBDA: u64 = 0x9_FC00;
/// End of the EBDA and of the first 640 KiB.
pub const EBDA_END: u64 = 0xA_0000;

/// Firmware tables (RSDP first), up to [`ACPI_END`].
pub const ACPI: u64 = 0xE_0000;
/// End of the ACPI area.
pub const ACPI_END: u64 = 0xF_0000;
/// SMBIOS entry point and structures.
pub const SMBIOS: u64 = 0xF_0000;
/// End of the SMBIOS area.
pub const SMBIOS_END: u64 = 0xF_1000;
/// MP floating pointer and configuration table (`--acpi off`).
pub const MP_TABLE: u64 = 0xF_1000;
/// End of the MP table area.
pub const MP_TABLE_END: u64 = 0xF_4000;
/// Firmware's interrupt handlers, for multiboot kernels.
pub const INTERRUPT_STUB: u64 = 0xF_FF00;
/// End of the interrupt handlers.
pub const INTERRUPT_STUB_END: u64 = 0xF_FFF0;
/// Real-mode reset vector, FFFF:0000. A stub there turns the jump of a hardware-reduced `reboot` into a reset.
pub const RESET_STUB: u64 = 0xF_FFF0;
/// End of the reset stub and of the first MiB.
pub const RESET_STUB_END: u64 = 0x10_0000;

/// Start of the memory for the kernel: 1 MiB.
pub const HIGH_RAM: u64 = 0x10_0000;

/// Start of the 32-bit MMIO hole: RAM below the hole ends here at the latest.
pub const MMIO_HOLE: u64 = 0xC000_0000;
/// End of the MMIO hole: RAM that did not fit below the hole continues here.
pub const MMIO_HOLE_END: u64 = 0x1_0000_0000;

/// First virtio-mmio register window.
pub const VIRTIO_MMIO: u64 = 0xD000_0000;
/// Size of one virtio-mmio window (register file and device configuration).
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// Number of virtio devices that a machine has room for: one per remaining IO-APIC pin.
pub const VIRTIO_SLOTS: u32 = IOAPIC_PINS - VIRTIO_GSI;

/// Alignment of each device's memory: the largest unit in which Linux adds memory (its `memory_block_size`, 128 MiB to
/// 2 GiB), so that no two devices share a unit.
pub const DEVICE_MEMORY_ALIGN: u64 = 2 << 30;

/// IO-APIC registers.
pub const IOAPIC: u64 = 0xFEC0_0000;
/// Local APIC registers (xAPIC mode).
pub const LAPIC: u64 = 0xFEE0_0000;
/// One page that KVM uses for its real-mode identity map on Intel hosts.
pub const KVM_IDENTITY_MAP: u64 = 0xFFFB_C000;
/// Three pages that KVM uses for its real-mode TSS on Intel hosts.
pub const KVM_TSS: u64 = 0xFFFB_D000;

/// Pins of the in-kernel IO-APIC.
pub const IOAPIC_PINS: u32 = 24;
/// GSI of the first serial port.
pub const SERIAL_GSI: u32 = 4;
/// GSI of the ACPI generic event device (power button).
pub const GED_GSI: u32 = 5;
/// GSI of virtio slot 0; slot `n` has `VIRTIO_GSI + n`.
pub const VIRTIO_GSI: u32 = 6;

/// First of the eight ports of the first serial port (COM1).
pub const SERIAL_PORT: u16 = 0x3F8;
/// Number of ports of a serial port.
pub const SERIAL_PORT_LEN: u16 = 8;
/// i8042 data port. Reads 0.
pub const I8042_DATA: u16 = 0x60;
/// i8042 command and status port. Reads 0; writing 0xFE resets.
pub const I8042_COMMAND: u16 = 0x64;
/// Number of ports from the i8042's data port to its command port; the ports in between are not its own.
pub const I8042_LEN: u16 = 5;
/// PCI configuration address port. There is no PCI; the port exists only so that writes to it are coalesced.
pub const PCI_CONFIG_ADDRESS: u16 = 0xCF8;
/// First of the four ports of isa-debug-exit (QEMU's `hw/misc/debugexit.c`), at the address that its users agreed on.
pub const DEBUG_EXIT_PORT: u16 = 0xF4;
/// Number of ports of the debug exit.
pub const DEBUG_EXIT_LEN: u16 = 4;
/// First port of pc-testdev: an echo, the page to flush, and the echo again.
pub const TESTDEV_PORT: u16 = 0xE0;
/// Number of ports from [`TESTDEV_PORT`] on.
pub const TESTDEV_LEN: u16 = 12;
/// pc-testdev's interrupt lines, one port for each pin of the IO-APIC.
pub const TESTDEV_IRQ_PORT: u16 = 0x2000;
/// pc-testdev's memory.
pub const TESTDEV_MEMORY: u64 = 0xFF00_0000;
/// Length of pc-testdev's memory.
pub const TESTDEV_MEMORY_LEN: u64 = 0x1_0000;
/// fw_cfg: the selector port, followed by the data port (QEMU's `docs/specs/fw_cfg`).
pub const FW_CFG_PORT: u16 = 0x510;
/// Number of fw_cfg's ports.
pub const FW_CFG_LEN: u16 = 2;
/// pvpanic event port (QEMU's `docs/specs/pvpanic`).
pub const PVPANIC_PORT: u16 = 0x505;
/// First port of the power block; the four that follow are its registers.
pub const POWER_BLOCK: u16 = 0x600;
/// Length of the power block in ports.
pub const POWER_BLOCK_LEN: u16 = 8;
/// ACPI sleep control register (ACPI 6.5, 4.8.3.7).
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// Sleep type in the DSDT's `\_S5`; written to the sleep control register, it means "off".
pub const S5_SLEEP_TYPE: u8 = 5;
/// ACPI sleep status register (ACPI 6.5, 4.8.3.7).
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// ACPI reset register; writing [`RESET_VALUE`] resets.
pub const RESET_PORT: u16 = 0x602;
/// Value that triggers a reset when written to the reset register.
pub const RESET_VALUE: u8 = 1;
/// Boot timer: a guest reports that its init is running by writing [`BOOT_TIMER_INIT_STARTED`] here.
pub const BOOT_TIMER_PORT: u16 = 0x607;
/// Value that init writes to [`BOOT_TIMER_PORT`].
pub const BOOT_TIMER_INIT_STARTED: u8 = 123;

/// ACPI PM timer, four ports (ACPI 6.5, 4.8.3.3).
pub const PM_TIMER_PORT: u16 = 0x608;
/// Number of the PM timer's ports.
pub const PM_TIMER_LEN: u16 = 4;
/// Real-time clock: the index port, followed by the data port.
pub const RTC_PORT: u16 = 0x70;
/// Number of the real-time clock's ports.
pub const RTC_LEN: u16 = 2;

const _: () = assert!(VIRTIO_SLOTS >= 16);
const _: () = assert!(VIRTIO_MMIO + VIRTIO_SLOTS as u64 * VIRTIO_MMIO_SIZE <= IOAPIC);
const _: () = assert!(CMDLINE + CMDLINE_MAX <= MULTIBOOT_INFO && MULTIBOOT_END <= EBDA);
