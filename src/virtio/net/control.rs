//! The control queue (5.1.6.5), which sets receive filters, the MAC address and the number of queue pairs in use.

use std::sync::Arc;

use virtio_bindings::virtio_net::*;

use super::{Mac, Shared};
use crate::memory::GuestRam;
use crate::virtio::chain::{Chain, Reader};
use crate::virtio::queue::Queue;
use crate::virtio::{Context, Event, Fault, Handler, Progress};

const RX: u8 = VIRTIO_NET_CTRL_RX as u8;
const RX_PROMISC: u8 = VIRTIO_NET_CTRL_RX_PROMISC as u8;
const RX_ALLMULTI: u8 = VIRTIO_NET_CTRL_RX_ALLMULTI as u8;
const MAC: u8 = VIRTIO_NET_CTRL_MAC as u8;
const MAC_TABLE_SET: u8 = VIRTIO_NET_CTRL_MAC_TABLE_SET as u8;
const MAC_ADDR_SET: u8 = VIRTIO_NET_CTRL_MAC_ADDR_SET as u8;
const MQ: u8 = VIRTIO_NET_CTRL_MQ as u8;
const MQ_VQ_PAIRS_SET: u8 = VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET as u8;

/// Serves the control queue, the first of its share, of a card whose other queues are served elsewhere.
pub(super) struct ControlQueue {
    shared: Arc<Shared>,
    features: u64,
}

impl ControlQueue {
    pub(super) fn new(shared: Arc<Shared>, features: u64) -> Self {
        ControlQueue { shared, features }
    }
}

impl Handler for ControlQueue {
    fn event(&mut self, event: Event, queues: &mut [Queue], cx: &Context<'_>) -> Result<Progress, Fault> {
        match (event, queues) {
            (Event::Kick(0), [queue, ..]) if self.features & 1 << VIRTIO_NET_F_CTRL_VQ != 0 => {
                queue.serve(cx.ram, |chain| request(&self.shared, chain, self.features, cx.ram))
            }
            _ => Ok(Progress::Done),
        }
    }
}

/// Executes one command and answers it. Returns the number of bytes written.
pub(super) fn request(shared: &Shared, chain: &Chain, features: u64, ram: &GuestRam) -> Result<u32, Fault> {
    let mut writer = chain.writer(ram);
    if writer.len() == 0 {
        return Err(Fault::Device("a network control command has no room for its answer"));
    }
    let done = command(shared, chain.reader(ram), features).is_some();
    writer.write(&[if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR } as u8])?;
    Ok(1)
}

/// Executes a command; `None` for an unknown or invalid one.
fn command(shared: &Shared, mut data: Reader<'_>, features: u64) -> Option<()> {
    let [class, command] = take(&mut data)?;
    match (class, command) {
        // The card forwards everything that its port delivers: filtering is best effort, and there is none (5.1.6.5.1).
        (RX, RX_PROMISC | RX_ALLMULTI) => {
            let [on] = take(&mut data)?;
            (on <= 1).then_some(())
        }
        // 5.1.6.5.2: two tables, unicast and multicast; filtering is best effort here too.
        (MAC, MAC_TABLE_SET) => (0..2).try_for_each(|_| {
            let entries = u64::from(u32::from_le_bytes(take(&mut data)?));
            data.take(entries * 6).ok().map(|_| ())
        }),
        (MAC, MAC_ADDR_SET) if features & 1 << VIRTIO_NET_F_CTRL_MAC_ADDR != 0 => {
            let mac = Mac(take(&mut data)?);
            mac.is_of_a_card().then(|| *shared.mac() = mac)
        }
        (MQ, MQ_VQ_PAIRS_SET) if features & 1 << VIRTIO_NET_F_MQ != 0 => {
            let pairs = u16::from_le_bytes(take(&mut data)?);
            if pairs == 0 || pairs > shared.max_pairs {
                return None;
            }
            shared.set_pairs(pairs);
            Some(())
        }
        _ => None,
    }
}

fn take<const N: usize>(data: &mut Reader<'_>) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    data.read(&mut bytes).ok()?;
    Some(bytes)
}
