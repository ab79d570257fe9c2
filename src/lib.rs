//! vireo: a KVM virtual machine monitor that boots stock Linux kernels and reports exactly how they ended.
//!
//! # Reading order
//!
//! The modules below are listed layer by layer, from the command line ([`cli`]) down; that is a good reading order. A
//! shorter way begins at [`machine`], which builds and runs what [`config`] describes, and continues downward from
//! there through the parts that the machine rests on. `docs/architecture.md` has a drawing, the way of a disk write
//! through the files, and the steps of adding a device.
//!
//! # The life of a VM
//!
//! [`machine::Machine::new`] opens and checks everything that the user named, so every mistake is reported before a VM
//! exists. [`machine::Machine::load`] fills guest memory. [`machine::Machine::run`] starts one thread per vCPU, waits
//! until the guest has ended and returns that as an [`outcome::Outcome`]; for a guest that failed, it adds the findings
//! of [`post_mortem`].
//!
//! # Layers
//!
//! Each layer imports only layers to its right:
//! `cli > gdb, exec > control, doctor > machine > config, post_mortem > boot, vcpu > virtio, devices > backend,
//! rate_limiter > privileges, terminal, printable, child, thread_time, bus, irq, guest_event, event, memory, kvm,
//! layout, log_limit, options, report, outcome`. Beside them is `guest`, the init that `vireo exec` boots into: it uses
//! none of them except the search for a kernel's modules, and only `exec` knows its messages. A device imports neither
//! `kvm` nor the virtio transport nor `std::thread`. `unsafe` is denied crate-wide and allowed only in the few modules
//! that talk to the kernel.

pub mod cli;
pub mod gdb;
pub mod exec;
pub mod guest;
pub mod control;
pub mod doctor;
pub mod machine;
pub mod config;
pub mod post_mortem;
pub mod boot;
pub mod vcpu;
pub mod virtio;
pub mod devices;
pub mod backend;
pub mod rate_limiter;
pub mod privileges;
pub mod terminal;
pub mod printable;
pub mod child;
pub mod thread_time;
pub mod bus;
pub mod irq;
pub mod guest_event;
pub mod event;
pub mod memory;
pub mod kvm;
pub mod layout;
pub mod log_limit;
pub mod options;
pub mod report;
pub mod outcome;
