//! All tests that start vireo, but for the long ones, as one program: that links once, and whichever emulated host is free
//! takes the next test. One file per capability; `cargo test --test all net::` runs those of one.

mod common;
mod guests;

mod avx;
mod balloon;
mod bare_metal;
mod boot;
mod cli;
mod console;
mod crash;
mod disks;
mod doctor;
mod endings;
mod exec;
mod exec_bad;
mod first_boot;
mod firmware;
mod gdb;
mod hvc;
mod initramfs;
mod kernels;
mod mem;
mod net;
mod outputs;
mod pmem;
mod processor;
mod qemu;
mod shares;
mod vhost;
mod virtio;
mod vsock;
mod watch;
