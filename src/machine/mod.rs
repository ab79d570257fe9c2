//! The machine: [`Machine::new`] opens and checks everything, [`Machine::load`] fills guest memory, and
//! [`Machine::run`] starts the vCPUs and waits until the guest ends. Each step is written here from top to bottom; the
//! code that handles events of the running guest is in [`run`].

pub mod console;
mod device_memory;
pub mod mailbox;
pub mod run;
mod testing;

use std::io;
use std::sync::Arc;
use std::time::Instant;

use uuid::Uuid;

use crate::backend::console as host_console;
use crate::backend::mapped;
use crate::backend::passthrough;
use crate::backend::transcript::Transcript;
use crate::boot::keep::Unkept;
use crate::boot::{self, BootFiles, Platform, Protocol};
use crate::bus::{Bus, BusDevice, Overlap};
use crate::config::{self, Acpi, HostLimits, MachineConfig};
use crate::devices::i8042::I8042;
use crate::devices::pm_timer::PmTimer;
use crate::devices::power::Power;
use crate::devices::power_button::PowerButton;
use crate::devices::pvpanic::Pvpanic;
use crate::devices::rtc::Rtc;
use crate::devices::serial::SerialPort;
use crate::guest_event::GuestEvents;
use crate::irq::IrqLine;
use crate::kvm::cpuid::{Template, TemplateError};
use crate::kvm::ring::CoalescedRing;
use crate::kvm::{self, Kvm, Vm};
use crate::layout;
use crate::memory::{self, Backing, GuestRam};
use crate::options::Size;
use crate::report::{BootTiming, Mark};
use crate::vcpu::{self, Board, Vcpu};
use crate::virtio::balloon::Balloon;
use crate::virtio::blk::{self, Blk};
use crate::virtio::console::Console;
use crate::virtio::fs::{self, Fs};
use crate::virtio::mem::Mem;
use crate::virtio::mmio::MmioTransport;
use crate::virtio::net::{self, Net};
use crate::virtio::pmem::Pmem;
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{self, Vsock};
use crate::virtio::{self, VirtioDevice, vhost_user};
use device_memory::DeviceMemory;

/// Error while assembling a machine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration asks for something impossible.
    #[error(transparent)]
    Config(#[from] config::Error),
    /// KVM failed.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// `--cpu` cannot be satisfied.
    #[error(transparent)]
    Cpuid(#[from] TemplateError),
    /// Kernel, initrd or command line cannot be used.
    #[error(transparent)]
    Boot(#[from] boot::Error),
    /// The firmware tables cannot be built.
    #[error(transparent)]
    Table(#[from] boot::table::Error),
    /// RAM cannot be set up.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// The host's end of a console or port cannot be opened.
    #[error(transparent)]
    Console(#[from] host_console::Error),
    /// A disk cannot be used.
    #[error(transparent)]
    Disk(#[from] blk::Error),
    /// The vsock device cannot be set up.
    #[error(transparent)]
    Vsock(#[from] vsock::Error),
    /// A network card cannot be set up.
    #[error(transparent)]
    Net(#[from] net::Error),
    /// A file for persistent memory cannot be used.
    #[error("pmem")]
    Pmem(#[from] mapped::Error),
    /// The guest-physical address space is too small for a device's memory.
    #[error("{what}: no guest address space left for {size} on this host")]
    NoAddresses {
        /// Name of the device.
        what: String,
        /// Size of its memory.
        size: Size,
    },
    /// The host could not provide guest memory at the moment when the guest used it.
    #[error("the host could not provide memory that the guest used ({0})")]
    MemoryGone(String, #[source] kvm::Error),
    /// A shared folder cannot be used.
    #[error(transparent)]
    Share(#[from] passthrough::Error),
    /// A device that a daemon serves cannot be used.
    #[error(transparent)]
    VhostUser(#[from] vhost_user::Error),
    /// A virtio transport cannot be set up.
    #[error(transparent)]
    Virtio(#[from] virtio::mmio::Error),
    /// The configuration has too many virtio devices.
    #[error("{0} virtio devices are more than the {max} that a machine can have", max = layout::VIRTIO_SLOTS)]
    TooManyDevices(usize),
    /// The address layout contradicts itself: a bug in vireo.
    #[error(transparent)]
    Layout(#[from] Overlap),
    /// The host refused a resource.
    #[error("cannot set up {0}")]
    Host(&'static str, #[source] io::Error),
}

/// Name of the balloon for [`crate::control::Controller::device`].
pub const BALLOON: &str = "balloon";

/// Name of the virtio-mem device for [`crate::control::Controller::device`].
pub const MEMORY: &str = "mem";

/// Returns a function for `map_err` that names what the host refused.
fn host(what: &'static str) -> impl Fn(io::Error) -> Error {
    move |e| Error::Host(what, e)
}

/// A machine that is not running yet.
pub struct Machine {
    config: MachineConfig,
    boot: Option<BootFiles>,
    /// Kernel that the cache does not hold yet; it is cached while the guest runs.
    unkept: Option<Unkept>,
    platform: Platform,
    ram: GuestRam,
    vcpus: Vec<Vcpu>,
    board: Arc<Board>,
    /// The serial port, followed by the ports of the virtio console.
    lines: Vec<console::Line>,
    devices: Vec<Arc<MmioTransport>>,
    power_button: PowerButton,
    timing: BootTiming,
    kernel: String,
    // Must be the last field: dropping it destroys the VM that the fields above belong to.
    vm: Arc<Vm>,
}

impl Machine {
    /// Opens and checks everything that the configuration names, and only then creates the VM. `start` is the time at
    /// which the process started; boot timing counts from it. A `transcript` records what the consoles print.
    pub fn new(config: MachineConfig, transcript: Option<Transcript>, start: Instant) -> Result<Self, Error> {
        let mut timing = BootTiming::new(start);
        config.validate()?;
        let kvm = Kvm::open(kvm::DEV_KVM)?;
        let cpuid = Template::new(&kvm, &config.cpu.features.parse().unwrap_or_default())?;
        let limits = HostLimits { max_vcpus: kvm.max_vcpus(), phys_bits: cpuid.phys_bits() };
        config.validate_host(limits)?;
        let events = GuestEvents::new().map_err(host("an eventfd"))?;
        transcript.iter().for_each(|transcript| transcript.tell(&events));
        let transcript = transcript.as_ref();
        let (virtio_console, mut lines) = console::open_virtio(&config, &events, transcript)?.unzip();
        let mut device_memory = DeviceMemory::new(config.memory.size, limits.phys_bits);
        let devices = open_devices(&config, virtio_console, &mut device_memory)?;
        let mut platform = platform(&config, devices.len())?;
        let mut boot_config = with_what_devices_need(&config, &platform)?;
        let without_kvmclock = !cpuid.has_kvmclock() || declines_kvmclock(&config.boot.cmdline);
        if without_kvmclock {
            boot_config.linux_parameter = tsc_parameter(&kvm, &config.boot.cmdline);
        }
        let boot = BootFiles::open(&boot_config, config.memory.size.0)?;
        let (input, output) = console::open(&config.serial, "the serial console", transcript)?;
        let ram = GuestRam::with_areas(&config.effective_memory(), device_memory.into_areas())?;

        let protocol = boot.describe().protocol;
        platform.clocks = without_kvmclock || protocol != Protocol::Linux64;
        let vm = Arc::new(kvm.create_vm()?);
        vm.map_ram(&ram)?;
        let vcpus = create_vcpus(&vm, &cpuid, &config)?;
        if let Some(boot_cpu) = vcpus.first() {
            program_legacy(&vm, boot_cpu, &config, protocol)?;
        }
        let ring = coalesce(&vm, &vcpus, &platform.virtio_slots)?;

        let serial_irq = irq_line(&vm, layout::SERIAL_GSI)?;
        let serial = Arc::new(SerialPort::new(serial_irq, output.clone(), events.clone()));
        let mut all_lines = vec![console::Line { input, receiver: serial.clone(), output: output.clone() }];
        all_lines.append(lines.get_or_insert_default());
        let power_button = PowerButton::new(irq_line(&vm, layout::GED_GSI)?);
        let mut pio = pio_bus(&events, serial.clone())?;
        let (mut mmio, devices) = mmio_bus(&vm, &ram, devices)?;
        testing::add(&config, &vm, &ram, &events, &mut pio, &mut mmio)?;
        let board = Arc::new(Board { pio, mmio, ring, events, output, ram: ram.clone() });
        timing.mark(Mark::KvmReady);

        let kernel = boot.describe().to_string();
        Ok(Machine {
            config,
            boot: Some(boot),
            unkept: None,
            platform,
            ram,
            vcpus,
            board,
            lines: all_lines,
            devices,
            power_button,
            timing,
            kernel,
            vm,
        })
    }

    /// Fills guest memory and sets the boot processor's registers.
    pub fn load(&mut self) -> Result<(), Error> {
        let Some(mut boot) = self.boot.take() else { return Ok(()) };
        self.unkept = boot.take_unkept();
        let entry = boot.load(&self.ram, &self.platform)?;
        if let Some(boot_cpu) = self.vcpus.first() {
            boot_cpu.set_registers(|reset| entry.registers(reset))?;
        }
        log::info!("booting {}", self.kernel);
        self.timing.mark(Mark::KernelLoaded);
        Ok(())
    }

    /// Returns the guest's memory.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Returns a description of the detected kernel.
    pub fn kernel(&self) -> &str {
        &self.kernel
    }
}

/// Creates every virtio device of the configuration in slot order, with its files opened and locked and its memory
/// placed.
fn open_devices(
    config: &MachineConfig,
    console: Option<Console>,
    memory: &mut DeviceMemory,
) -> Result<Vec<Box<dyn VirtioDevice>>, Error> {
    let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
    for (i, disk) in config.disks.iter().enumerate() {
        devices.push(Box::new(Blk::new(format!("disk{i}"), disk)?));
    }
    for (i, net) in config.nets.iter().enumerate() {
        devices.push(Box::new(Net::new(format!("net{i}"), net)?));
    }
    for (i, pmem) in config.pmems.iter().enumerate() {
        let file = pmem.open()?;
        let what = format!("pmem {}", pmem.path.display());
        let start = memory.place(&what, file.memory_len(), file.backing())?;
        devices.push(Box::new(Pmem::new(format!("pmem{i}"), file, start)));
    }
    let descriptors = if config.shares.is_empty() { 0 } else { passthrough::raise_descriptor_limit() };
    let budget = fs::Budget::new(descriptors, config.shares.len());
    for (i, share) in config.shares.iter().enumerate() {
        devices.push(Box::new(Fs::new(i, share, &budget)?));
    }
    for (i, device) in config.vhost_user.iter().enumerate() {
        devices.push(vhost_user::open(format!("vhost-user{i}"), device)?);
    }
    if let Some(rng) = &config.rng {
        devices.push(Box::new(Rng::new("rng", rng)));
    }
    if let Some(vsock) = &config.vsock {
        devices.push(Box::new(Vsock::new("vsock", vsock)?));
    }
    if let Some(balloon) = &config.balloon {
        devices.push(Box::new(Balloon::new(BALLOON, balloon, config.most_memory())));
    }
    if let Some(mem) = &config.virtio_mem {
        let addr = memory.place("--virtio-mem", mem.size.0, Backing::Pluggable)?;
        devices.push(Box::new(Mem::new(MEMORY, mem, addr)));
    }
    if let Some(console) = console {
        devices.push(Box::new(console));
    }
    if devices.len() > layout::VIRTIO_SLOTS as usize {
        return Err(Error::TooManyDevices(devices.len()));
    }
    Ok(devices)
}

/// Returns the boot configuration with the additions that the devices need. Without ACPI, a kernel learns its devices
/// from the command line; with ACPI, the user's command line is unchanged. If modules are packed, the devices' drivers
/// are packed too, as far as they are modules.
fn with_what_devices_need(config: &MachineConfig, platform: &Platform) -> Result<boot::BootConfig, Error> {
    let mut boot = config.boot.clone();
    if let Some(modules) = boot.initramfs.as_mut().and_then(|packed| packed.modules.as_mut()) {
        let is_wanted = |name: &&str| !modules.names.iter().chain(&modules.optional).any(|other| other == name);
        let drivers: Vec<String> =
            config.device_modules().into_iter().filter(is_wanted).map(ToString::to_string).collect();
        modules.optional.extend(drivers);
    }
    if !platform.acpi && !platform.virtio_slots.is_empty() {
        let parameters = boot::mptable::virtio_mmio_cmdline(platform)?;
        boot.cmdline = format!("{} {parameters}", boot.cmdline).trim_start().to_string();
    }
    Ok(boot)
}

/// Returns the part of the platform description that does not depend on the kernel.
fn platform(config: &MachineConfig, devices: usize) -> Result<Platform, Error> {
    Ok(Platform {
        cpus: config.cpu.count,
        acpi: config.acpi == Acpi::On,
        uuid: config.uuid.map_or_else(random_uuid, Ok)?.into_bytes(),
        virtio_slots: (0..devices as u32).collect(),
        serial: true,
        clocks: false,
    })
}

/// Programs the PC's interrupt controllers and timer as far as the kernel may rely on that. A multiboot kernel finds
/// them as a BIOS leaves them. A kernel without ACPI programs them itself, except the local APIC's pins.
fn program_legacy(vm: &Vm, boot_cpu: &Vcpu, config: &MachineConfig, protocol: Protocol) -> Result<(), Error> {
    if config.acpi == Acpi::Off || protocol == Protocol::Multiboot {
        boot_cpu.connect_pic()?;
    }
    if protocol == Protocol::Multiboot {
        vm.program_timer()?;
    }
    Ok(())
}

/// Returns whether the command line stops Linux from using kvmclock, or asks for the PM timer.
fn declines_kvmclock(cmdline: &str) -> bool {
    cmdline.split_whitespace().any(|word| matches!(word, "nopv" | "no-kvmclock" | "clocksource=acpi_pm"))
}

/// Returns a parameter with the TSC frequency for a Linux that would otherwise measure it, unless the user names one.
/// The measurement fails on a busy host and on one that is itself a virtual machine; the guest then has no clock and
/// waits forever for time to pass.
fn tsc_parameter(kvm: &Kvm, cmdline: &str) -> Option<String> {
    const NAME: &str = "tsc_early_khz=";
    let named = cmdline.split_whitespace().any(|word| word.starts_with(NAME));
    if named { None } else { kvm.tsc_khz().map(|khz| format!("{NAME}{khz}")) }
}

/// Returns a random UUID. The uuid crate's own generator is avoided: it panics when the host has no random numbers for
/// it.
fn random_uuid() -> Result<Uuid, Error> {
    Ok(uuid::Builder::from_random_bytes(boot::kaslr::random()?).into_uuid())
}

fn create_vcpus(vm: &Vm, cpuid: &Template, config: &MachineConfig) -> Result<Vec<Vcpu>, Error> {
    vcpu::install_kick_handler().map_err(host("the vCPU signal"))?;
    let count = config.cpu.count;
    let vcpus: Vec<Vcpu> = (0..count).map(|id| Vcpu::new(vm, id, count, cpuid)).collect::<Result<_, _>>()?;
    Ok(vcpus)
}

/// Makes KVM collect writes that need no answer: bytes that the UART transmits, addresses of the absent PCI bus, and
/// acknowledgements of virtio interrupts. Reads follow all of them; these exit and drain the ring.
fn coalesce(vm: &Vm, vcpus: &[Vcpu], virtio_slots: &[u32]) -> Result<Option<CoalescedRing>, Error> {
    let ports = [(layout::SERIAL_PORT, 1), (layout::PCI_CONFIG_ADDRESS, 4)];
    let acks = virtio_slots.iter().map(|slot| virtio_slot(*slot) + virtio::mmio::INTERRUPT_ACK);
    let ports = ports.into_iter().filter(|(port, len)| vm.coalesce_port(*port, *len)).count();
    let acks = acks.filter(|addr| vm.coalesce_mmio(*addr)).count();
    match vcpus.first() {
        Some(vcpu) if ports + acks > 0 => {
            CoalescedRing::new(vcpu.fd()).map(Some).map_err(host("the ring of coalesced writes"))
        }
        _ => Ok(None),
    }
}

/// Returns the address of a virtio slot's registers.
fn virtio_slot(slot: u32) -> u64 {
    layout::VIRTIO_MMIO + u64::from(slot) * layout::VIRTIO_MMIO_SIZE
}

fn irq_line(vm: &Vm, gsi: u32) -> Result<IrqLine, Error> {
    let line = IrqLine::new(gsi).map_err(host("an eventfd"))?;
    vm.connect_irq(&line)?;
    Ok(line)
}

fn pio_bus(events: &GuestEvents, serial: Arc<SerialPort>) -> Result<Bus, Error> {
    let i8042 = Arc::new(I8042::new(events.clone()));
    let devices: [(u16, u16, Arc<dyn BusDevice>); 6] = [
        (layout::I8042_DATA, layout::I8042_LEN, i8042),
        (layout::SERIAL_PORT, layout::SERIAL_PORT_LEN, serial),
        (layout::PVPANIC_PORT, 1, Arc::new(Pvpanic::new(events.clone()))),
        (layout::POWER_BLOCK, layout::POWER_BLOCK_LEN, Arc::new(Power::new(events.clone()))),
        (layout::PM_TIMER_PORT, layout::PM_TIMER_LEN, Arc::new(PmTimer::new())),
        (layout::RTC_PORT, layout::RTC_LEN, Arc::new(Rtc::new())),
    ];
    let mut pio = Bus::new();
    for (port, len, device) in devices {
        pio.insert(u64::from(port), u64::from(len), device)?;
    }
    Ok(pio)
}

fn mmio_bus(
    vm: &Vm,
    ram: &GuestRam,
    devices: Vec<Box<dyn VirtioDevice>>,
) -> Result<(Bus, Vec<Arc<MmioTransport>>), Error> {
    let mut mmio = Bus::new();
    let mut transports = Vec::new();
    for (slot, device) in (0u32..).zip(devices) {
        let addr = virtio_slot(slot);
        let line = irq_line(vm, layout::VIRTIO_GSI + slot)?;
        let transport = Arc::new(MmioTransport::new(device, ram.clone(), line)?);
        for (queue, fd) in (0u32..).zip(transport.notify_fds()) {
            vm.connect_kick(fd, addr + virtio::mmio::NOTIFY, queue)?;
        }
        mmio.insert(addr, layout::VIRTIO_MMIO_SIZE, transport.clone())?;
        transports.push(transport);
    }
    Ok((mmio, transports))
}
