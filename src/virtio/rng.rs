//! Entropy device (5.4): fills what the driver offers with random bytes from the host's kernel.

use std::io;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use vm_memory::bitmap::Bitmap;

use super::{
    Activated, Activation, Context, DeviceId, DeviceInfo, Event, Fault, Handler, Progress, RING_FEATURES, Share,
    VirtioDevice, queue::Queue,
};
use crate::memory::RamSlice;
use crate::options;

/// How many bytes a request gets at most. The driver takes what it gets (5.4.6.1), so this only bounds our work.
pub const MAX_REQUEST: u64 = 64 << 10;

/// `--rng`: an entropy device. Nothing about it can be chosen yet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RngConfig {}

impl FromStr for RngConfig {
    type Err = options::Error;

    fn from_str(text: &str) -> Result<Self, options::Error> {
        if text.is_empty() { Ok(Self::default()) } else { options::from_str(text, None) }
    }
}

/// The device. It has no state of its own.
pub struct Rng {
    info: DeviceInfo,
}

impl Rng {
    /// A device called `name`.
    pub fn new(name: impl Into<String>, _config: &RngConfig) -> Self {
        Rng {
            info: DeviceInfo {
                id: DeviceId::Rng,
                name: name.into(),
                features: RING_FEATURES,
                queue_sizes: vec![64],
                shared_memory: vec![],
            },
        }
    }
}

impl VirtioDevice for Rng {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// There is no configuration space (5.4.4).
    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, activation: Activation) -> io::Result<Activated> {
        Ok(Activated::Here(vec![Share { queues: activation.queues, handler: Box::new(Source) }]))
    }
}

struct Source;

impl Handler for Source {
    fn event(&mut self, event: Event, queues: &mut [Queue], cx: &Context<'_>) -> Result<Progress, Fault> {
        let (Event::Kick(_), [queue]) = (event, queues) else { return Ok(Progress::Done) };
        queue.serve(cx.ram, |chain| {
            let mut writer = chain.writer(cx.ram);
            let len = writer.len().min(MAX_REQUEST);
            for slice in writer.take(len)?.slices() {
                fill(&slice?)?;
            }
            Ok(len as u32)
        })
    }
}

/// Fills guest memory with random bytes.
#[allow(unsafe_code)]
fn fill(slice: &RamSlice<'_>) -> io::Result<()> {
    let mut done = 0;
    while done < slice.len() {
        let rest = slice.offset(done).map_err(io::Error::other)?;
        // SAFETY: the kernel writes at most `rest.len()` bytes at the start of `rest`, which is mapped guest memory that
        // outlives the call and that nothing holds a reference into.
        let n = unsafe { libc::getrandom(rest.ptr_guard_mut().as_ptr().cast(), rest.len(), 0) };
        match usize::try_from(n) {
            Ok(n) => {
                rest.bitmap().mark_dirty(0, n);
                done += n;
            }
            Err(_) => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => {}
                e => return Err(e),
            },
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestRam;
    use crate::virtio::testing::{FakeQueue, Loopback, inn, out};

    const B: u64 = 0x8_0000;

    /// Makes one request and returns how many bytes came back.
    fn request(ram: &GuestRam, bufs: &[crate::virtio::testing::Buf]) -> Result<u32, Fault> {
        let mut driver = FakeQueue::new(ram, 0x1000, 8);
        let mut queues = [driver.device(RING_FEATURES)];
        driver.add(bufs).unwrap();
        Loopback::new(ram).deliver(&mut Source, &mut queues, Event::Kick(0))?;
        Ok(driver.take_used().unwrap().1)
    }

    #[test]
    fn fills_exactly_what_is_offered() {
        let ram = GuestRam::anonymous(1 << 20);
        assert_eq!(request(&ram, &[inn(B, 64), inn(B + 64, 1), inn(B + 65, 1000)]).unwrap(), 1065);
        let mut data = [0; 1066];
        ram.read(B, &mut data).unwrap();
        assert!(data[..64].iter().any(|&b| b != 0));
        assert!(data[65..1065].iter().collect::<std::collections::HashSet<_>>().len() > 50);
        assert_eq!(data[1065], 0);
    }

    #[test]
    fn requests_are_bounded() {
        let ram = GuestRam::anonymous(4 << 20);
        assert_eq!(request(&ram, &[inn(B, 3 << 20)]).unwrap(), MAX_REQUEST as u32);
        assert_eq!(ram.read_obj::<[u8; 16]>(B + MAX_REQUEST).unwrap(), [0; 16]);
    }

    #[test]
    fn odd_requests_are_answered() {
        let ram = GuestRam::anonymous(1 << 20);
        assert_eq!(request(&ram, &[inn(B, 0)]).unwrap(), 0);
        assert_eq!(request(&ram, &[out(B, 100)]).unwrap(), 0);
        assert_eq!(request(&ram, &[out(B, 100), inn(B, 3)]).unwrap(), 3);
        assert!(request(&ram, &[inn(1 << 20, 1)]).is_err());
    }

    #[test]
    fn options() {
        assert!("".parse::<RngConfig>().is_ok());
        assert!("rate=1".parse::<RngConfig>().unwrap_err().to_string().contains("unknown key 'rate'"));
        let mut rng = Rng::new("rng0", &RngConfig::default());
        let state = rng.save().unwrap();
        rng.restore(&state).unwrap();
        assert!(rng.restore(&serde_json::json!({"x": 1})).is_err());
    }
}
