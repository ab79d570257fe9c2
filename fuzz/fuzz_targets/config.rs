//! Input that users, files and clients write: options of all devices, machine descriptions, the messages between `exec`
//! and the init in its guest. Accepted input must survive being written and read again.

#![no_main]

use std::str::FromStr;

use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use serde::de::DeserializeOwned;
use vireo::backend::passt::Forward;
use vireo::boot::pack::FileConfig;
use vireo::config::{CpuConfig, HostLimits, MachineConfig};
use vireo::exec::{Folder, RootFrom};
use vireo::guest::protocol::{Order, Report, Request};
use vireo::options::{Size, Span};
use vireo::virtio::balloon::BalloonConfig;
use vireo::virtio::blk::BlkConfig;
use vireo::virtio::console::PortConfig;
use vireo::virtio::fs::FsConfig;
use vireo::virtio::mem::MemConfig;
use vireo::virtio::net::{Mac, NetConfig};
use vireo::virtio::pmem::PmemConfig;
use vireo::virtio::rng::RngConfig;
use vireo::virtio::vhost_user::VhostUserConfig;
use vireo::virtio::vsock::VsockConfig;

/// Checks that a value that is written as JSON and read again is the same.
fn round<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(value: &T) {
    let text = serde_json::to_string(value).expect("a value can be written");
    assert_eq!(&serde_json::from_str::<T>(&text).expect(&text), value);
}

fn option<T: FromStr + Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(text: &str) -> Option<T> {
    let value = text.parse().ok()?;
    round(&value);
    Some(value)
}

fn json<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(text: &str) -> Option<T> {
    let value = serde_json::from_str(text).ok()?;
    round(&value);
    Some(value)
}

fuzz_target!(|data: &[u8]| {
    let Some((kind, text)) = data.split_first() else { return };
    let Ok(text) = std::str::from_utf8(text) else { return };
    match kind % 20 {
        0 => _ = option::<BlkConfig>(text).map(|config| config.validate().is_ok()),
        1 => _ = option::<NetConfig>(text).map(|config| config.validate().is_ok()),
        2 => _ = option::<FsConfig>(text),
        3 => _ = option::<MemConfig>(text),
        4 => _ = option::<PmemConfig>(text),
        5 => _ = option::<RngConfig>(text),
        6 => _ = option::<VhostUserConfig>(text).map(|config| config.validate().is_ok()),
        7 => _ = option::<VsockConfig>(text).map(|config| config.validate().is_ok()),
        8 => _ = option::<BalloonConfig>(text),
        9 => _ = option::<PortConfig>(text),
        10 => _ = option::<CpuConfig>(text).map(|config| config.pins().is_ok()),
        11 => _ = text.parse::<Size>().map(|size| size.to_string().parse::<Size>().unwrap().0 == size.0),
        12 => _ = text.parse::<Span>().map(|span| span.to_string()),
        13 => _ = (text.parse::<Forward>().map(|f| f.to_string()), text.parse::<Mac>().map(|mac| mac.to_string())),
        14 => _ = (text.parse::<Folder>().is_ok(), text.parse::<RootFrom>().is_ok()),
        15 => _ = text.parse::<FileConfig>().is_ok(),
        16 => {
            let Some(config) = json::<MachineConfig>(text) else { return };
            let _ = config.validate();
            let _ = config.validate_host(HostLimits { max_vcpus: 4, phys_bits: 46 });
            let _ = (config.most_memory(), config.effective_memory());
        }
        17 => _ = json::<Request>(text),
        18 => _ = json::<Order>(text),
        _ => _ = json::<Report>(text),
    }
});
