//! Flags that describe a machine's processors, memory and devices, for every command that creates a machine.

use clap::Args;

use super::set;
use crate::config::{CpuConfig, MachineConfig};
use crate::memory::MemoryConfig;
use crate::virtio::balloon::BalloonConfig;
use crate::virtio::blk::BlkConfig;
use crate::virtio::mem::MemConfig;
use crate::virtio::net::NetConfig;
use crate::virtio::pmem::PmemConfig;
use crate::virtio::rng::RngConfig;
use crate::virtio::vhost_user::VhostUserConfig;
use crate::virtio::vsock::VsockConfig;

/// Flags that `run` and `exec` share.
#[derive(Args)]
pub struct DeviceArgs {
    /// RAM: SIZE[,hugepages=2M|thp|off][,shared=on|off][,prefault=on|off] [default: 256M for run, 512M for exec]
    #[arg(long, value_name = "SIZE", allow_negative_numbers = true)]
    memory: Option<MemoryConfig>,
    /// vCPUs: N[,affinity=0-3 or 0:2:4] [default: 1]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    cpus: Option<CpuConfig>,
    /// CPU features to add or hide: +name,-name, with names from /proc/cpuinfo
    #[arg(long, value_name = "LIST", allow_hyphen_values = true)]
    cpu: Option<String>,
    /// Disk: PATH[,readonly][,id=NAME][,format=raw|qcow2][,overlay=tmp|FILE][,direct=on][,queues=N]
    /// [,engine=auto|io_uring|sync][,bandwidth=SIZE][,ops=N]; bandwidth and ops are per second, bandwidth_burst and
    /// ops_burst are the burst sizes; may be repeated
    #[arg(long, value_name = "PATH")]
    disk: Vec<BlkConfig>,
    /// Network card: tap=NAME[,queues=N][,vhost=on][,offload=off] or user[,hostfwd=tcp:8080:80]... [,map_gateway=on]
    /// (the gateway's address reaches the host's 127.0.0.1); both also take [,mac=MAC][,mtu=N][,mrg_rxbuf=off] and the
    /// limits per second rx_bandwidth=SIZE, rx_ops=N (packets), tx_bandwidth= and tx_ops=, with burst sizes
    /// rx_bandwidth_burst= and so on (rx is towards the guest); may be repeated; exec configures the first one by DHCP
    #[arg(long, value_name = "HOW")]
    net: Vec<NetConfig>,
    /// File as persistent memory, /dev/pmem0 in the guest: PATH[,size=SIZE][,readonly][,overlay=tmp]; may be repeated
    #[arg(long, value_name = "PATH")]
    pmem: Vec<PmemConfig>,
    /// Device served by a daemon: socket=PATH,type=fs|blk|net[,queues=N], for fs also ,tag=NAME, for net also
    /// [,mac=MAC][,mtu=N]; the daemon gets access to the guest's memory; may be repeated
    #[arg(long, value_name = "socket=PATH,type=KIND")]
    vhost_user: Vec<VhostUserConfig>,
    /// Virtio random number generator: [bandwidth=SIZE[,bandwidth_burst=SIZE]], SIZE being per second
    #[arg(long, value_name = "LIMIT", num_args = 0..=1, default_missing_value = "")]
    rng: Option<RngConfig>,
    /// Sockets between host and guest: cid=N,path=SOCKET; a guest's connection to CID 2, port P, goes to SOCKET_P
    #[arg(long, value_name = "cid=N,path=SOCKET")]
    vsock: Option<VsockConfig>,
    /// Memory balloon: [SIZE][,deflate_on_oom][,stats=TIME][,free_page_reporting][,free_page_hinting]
    #[arg(long, value_name = "SIZE", num_args = 0..=1, default_missing_value = "0", require_equals = false)]
    balloon: Option<BalloonConfig>,
    /// Memory that can be added while the guest runs: SIZE[,requested=SIZE][,block=SIZE]; SIZE is the maximum
    #[arg(long, value_name = "SIZE")]
    virtio_mem: Option<MemConfig>,
}

impl DeviceArgs {
    /// Applies the flags to a machine: lists grow, other values are replaced.
    pub fn apply(&self, config: &mut MachineConfig) {
        set(&mut config.memory, &self.memory);
        set(&mut config.cpu, &self.cpus);
        set(&mut config.cpu.features, &self.cpu);
        config.disks.extend_from_slice(&self.disk);
        config.nets.extend_from_slice(&self.net);
        config.pmems.extend_from_slice(&self.pmem);
        config.vhost_user.extend_from_slice(&self.vhost_user);
        config.rng = self.rng.clone().or(config.rng.take());
        config.vsock = self.vsock.clone().or(config.vsock.take());
        config.balloon = self.balloon.clone().or(config.balloon.take());
        config.virtio_mem = self.virtio_mem.clone().or(config.virtio_mem.take());
    }
}
