//! Entropy device (5.4): fills the driver's buffers with random bytes from the host's kernel.

use std::io;
use std::os::fd::AsRawFd;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_memory::bitmap::Bitmap;

use super::queue::{BATCH, Queue};
use super::{
    Activated, Activation, Context, DeviceId, DeviceInfo, Event, Fault, Handler, Progress, RING_FEATURES, Share,
    VirtioDevice,
};
use crate::event::Interest;
use crate::memory::RamSlice;
use crate::options::{self, Size};
use crate::rate_limiter::{Alarm, Limits, RateLimiter};

/// Maximum number of bytes per request. The driver accepts fewer than it asked for (5.4.6.1); this only bounds our
/// work.
pub const MAX_REQUEST: u64 = 64 << 10;

/// `--rng`: an entropy device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RngConfig {
    /// Maximum bytes per second; unlimited by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Size>,
    /// Burst in bytes, for `bandwidth`; one second's worth by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth_burst: Option<Size>,
}

impl RngConfig {
    /// Checks the options; an error is a sentence.
    pub fn validate(&self) -> Result<(), &'static str> {
        if self.bandwidth.is_none() && self.bandwidth_burst.is_some() {
            return Err("bandwidth_burst needs bandwidth");
        }
        if self.limits().is_zero() {
            return Err("a bandwidth or burst of 0 would let nothing through");
        }
        Ok(())
    }

    fn limits(&self) -> Limits {
        Limits::new(self.bandwidth, self.bandwidth_burst, None, None)
    }
}

impl FromStr for RngConfig {
    type Err = options::Error;

    fn from_str(text: &str) -> Result<Self, options::Error> {
        if text.is_empty() { Ok(Self::default()) } else { options::from_str(text, None) }
    }
}

/// Entropy device. It has no state of its own.
pub struct Rng {
    info: DeviceInfo,
    limiter: Option<Arc<RateLimiter>>,
}

impl Rng {
    /// Creates a device called `name`.
    pub fn new(name: impl Into<String>, config: &RngConfig) -> Self {
        let limits = config.limits();
        Rng {
            limiter: limits.any().then(|| Arc::new(RateLimiter::new(limits))),
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

    /// Reads nothing: there is no configuration space (5.4.4).
    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, activation: Activation) -> io::Result<Activated> {
        let alarm = self.limiter.is_some().then(Alarm::new).transpose()?;
        let source = Source { limiter: self.limiter.clone(), alarm };
        Ok(Activated::Here(vec![Share { queues: activation.queues, handler: Box::new(source) }]))
    }
}

const ALARM: u64 = 0;

#[derive(Default)]
struct Source {
    limiter: Option<Arc<RateLimiter>>,
    /// Timer for when the rate limit lets more through.
    alarm: Option<Alarm>,
}

impl Source {
    fn serve(&mut self, queue: &mut Queue, cx: &Context<'_>) -> Result<Progress, Fault> {
        queue.disable_notifications(cx.ram)?;
        for _ in 0..BATCH {
            if self.alarm.as_ref().is_some_and(Alarm::is_set) {
                return Ok(Progress::Done);
            }
            let Some(chain) = queue.next(cx.ram)? else { return Ok(Progress::Done) };
            let mut writer = chain.writer(cx.ram);
            let len = writer.len().min(MAX_REQUEST);
            for slice in writer.take(len)?.slices() {
                fill(&slice?)?;
            }
            queue.push_used(cx.ram, chain, len as u32)?;
            if let (Some(limiter), Some(alarm)) = (&self.limiter, &mut self.alarm) {
                // The next request waits until the limit has made up for this one.
                limiter.charge(len).or_else(|wait| alarm.set(wait))?;
            }
        }
        Ok(Progress::More)
    }
}

impl Handler for Source {
    fn event(&mut self, event: Event, queues: &mut [Queue], cx: &Context<'_>) -> Result<Progress, Fault> {
        let [queue] = queues else { return Ok(Progress::Done) };
        match (event, &mut self.alarm) {
            (Event::Start, Some(alarm)) => {
                cx.watch(alarm.as_raw_fd(), ALARM, Interest::Read)?;
                return Ok(Progress::Done);
            }
            (Event::Start, None) => return Ok(Progress::Done),
            (Event::Ready(_), Some(alarm)) => alarm.clear(),
            _ => {}
        }
        self.serve(queue, cx)
    }
}

/// Fills guest memory with random bytes.
#[allow(unsafe_code)]
fn fill(slice: &RamSlice<'_>) -> io::Result<()> {
    let mut done = 0;
    while done < slice.len() {
        let rest = slice.offset(done).map_err(io::Error::other)?;
        // SAFETY: the kernel writes at most `rest.len()` bytes at the start of `rest`, which is mapped guest memory. It
        // outlives the call, and nothing holds a reference into it.
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

    /// Submits one request and returns the number of bytes that came back.
    fn request(ram: &GuestRam, bufs: &[crate::virtio::testing::Buf]) -> Result<u32, Fault> {
        let mut driver = FakeQueue::new(ram, 0x1000, 8);
        let mut queues = [driver.device(RING_FEATURES)];
        driver.add(bufs).unwrap();
        Loopback::new(ram).deliver(&mut Source::default(), &mut queues, Event::Kick(0))?;
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
    fn a_limit_delays_without_spinning() {
        let ram = GuestRam::anonymous(1 << 20);
        let mut rng = Rng::new("rng0", &"bandwidth=1000,bandwidth_burst=100".parse().unwrap());
        let mut driver = FakeQueue::new(&ram, 0x1000, 8);
        let mut wire = Loopback::new(&ram);
        let queues = vec![driver.device(RING_FEATURES)];
        let interrupt = wire.interrupt.clone();
        let activation = Activation { ram: ram.clone(), features: RING_FEATURES, queues, kicks: [].into(), interrupt };
        let Ok(Activated::Here(mut shares)) = rng.activate(activation) else { panic!() };
        let [Share { queues, handler }] = &mut shares[..] else { panic!() };
        wire.deliver(&mut **handler, queues, Event::Start).unwrap();
        let start = std::time::Instant::now();
        for _ in 0..5 {
            driver.add(&[inn(B, 100)]).unwrap();
            wire.deliver(&mut **handler, queues, Event::Kick(0)).unwrap();
        }
        let mut events = 0;
        for _ in 0..5 {
            while driver.take_used().is_none() {
                events += wire.deliver_ready(&mut **handler, queues, std::time::Duration::from_secs(5)).unwrap();
            }
        }
        // The burst passes immediately; each further request, once the limit has made up for the one before it.
        assert!(start.elapsed().as_millis() >= 300, "{:?}", start.elapsed());
        assert!(events <= 5, "{events}");
    }

    #[test]
    fn options() {
        assert!("".parse::<RngConfig>().is_ok());
        let check = |text: &str| text.parse::<RngConfig>().unwrap().validate();
        assert_eq!(check("bandwidth=1K,bandwidth_burst=64K"), Ok(()));
        assert_eq!(check("bandwidth_burst=64K"), Err("bandwidth_burst needs bandwidth"));
        assert!(check("bandwidth=0").is_err() && check("bandwidth=1,bandwidth_burst=0").is_err());
        assert!("rate=1".parse::<RngConfig>().unwrap_err().to_string().contains("unknown key 'rate'"));
        let mut rng = Rng::new("rng0", &RngConfig::default());
        let state = rng.save().unwrap();
        rng.restore(&state).unwrap();
        assert!(rng.restore(&serde_json::json!({"x": 1})).is_err());
    }
}
