//! All tests that start vireo, except the long ones, as one program: it links once, and each test takes whichever
//! emulated host is free. There is one file per capability; `cargo test --test all net::` runs the tests of one.

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
