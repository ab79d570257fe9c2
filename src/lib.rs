//! vireo: a KVM virtual machine monitor that boots stock Linux kernels and tells exactly how they ended.
//!
//! # Reading order
//!
//! The modules below stand in the order in which they are best read: what a user asks for ([`config`]), the machine
//! that is made of it ([`machine`]), and then, layer by layer, what the machine stands on.
//!
//! # The life of a VM
//!
//! [`machine::Machine::new`] opens and checks everything that the user named, so that every mistake is told before a
//! VM exists; [`machine::Machine::load`] fills guest memory; [`machine::Machine::run`] starts one thread per vCPU and
//! waits until the guest has ended, which it tells as an [`outcome::Outcome`]; of a guest that ended badly it tells what
//! [`post_mortem`] finds.
//!
//! # Layers
//!
//! Each imports only what stands to its right:
//! `cli > gdb, exec > control, doctor > machine > config, post_mortem > boot, vcpu > virtio, devices > backend,
//! rate_limiter > privileges, terminal, printable, child, thread_time, bus, irq, event, memory, kvm, layout, options, outcome`. Beside them stands `guest`, the init
//! that `vireo exec` boots into: it uses none of them but for where a kernel's modules are, and only `exec` knows its messages. A device imports neither `kvm`
//! nor the virtio transport nor `std::thread`.
//! `unsafe` is denied crate-wide and opened only in the few modules that talk to the kernel.

pub mod cli;
pub mod gdb;
pub mod control;
pub mod doctor;
pub mod exec;
pub mod guest;
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
pub mod event;
pub mod memory;
pub mod kvm;
pub mod layout;
pub mod log_limit;
pub mod options;
pub mod outcome;
