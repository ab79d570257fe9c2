use super::testing::{Answer, FakeDaemon, good};
use super::*;
use crate::backend::place::WritableFolders;
use crate::event::eventfd;
use crate::memory::{GuestRam, MemoryConfig};
use crate::options::Size;
use proptest::prelude::*;

const FEATURES: u64 = 1 << 32 | 1 << 29;

fn ram() -> GuestRam {
    GuestRam::new(&MemoryConfig { size: Size(1 << 20), shared: true, ..MemoryConfig::default() }).unwrap()
}

fn start(frontend: &mut Frontend, ram: &GuestRam) -> io::Result<()> {
    let (kick, call) = (eventfd().unwrap(), eventfd().unwrap());
    let (index, size, next_avail) = (1, 8, 3);
    let (desc, avail, used) = (0x1000, 0x2000, 0x3000);
    let ring = Ring { index, size, next_avail, desc, avail, used, kick: &kick, call: &call };
    frontend.start(u64::MAX, &ram.shared_regions().unwrap(), &[ring])?;
    frontend.enable([(1, true)])
}

fn connect(path: &Path) -> Result<Frontend, Error> {
    Frontend::connect(&Place::find(path, &WritableFolders::none()).unwrap())
}

#[test]
fn a_good_daemon_is_told_everything() {
    let daemon = FakeDaemon::good(FEATURES);
    let mut frontend = connect(&daemon.path).unwrap();
    assert_eq!((frontend.features(), frontend.max_queues()), (FEATURES, Some(5)));
    assert_eq!(frontend.config(4).unwrap(), [0, 1, 2, 3]);
    frontend.set_config(32, &[1]).unwrap();
    let _ = daemon.seen();
    start(&mut frontend, &ram()).unwrap();
    let told: Vec<(u32, Vec<u8>)> = daemon.requests.try_iter().collect();
    assert_eq!(told.iter().map(|(request, _)| *request).collect::<Vec<_>>(), [2, 5, 8, 10, 9, 13, 12, 18]);
    assert_eq!(told[0].1, (FEATURES | PROTOCOL_FEATURES).to_ne_bytes(), "nothing that it did not offer");
    let numbers = |bytes: &[u8]| bytes.chunks(8).map(|c| u64::from_ne_bytes(c.try_into().unwrap())).collect::<Vec<_>>();
    assert_eq!(numbers(&told[1].1), [1, 0, 1 << 20, 0, 0], "one region, at its guest address");
    assert_eq!(numbers(&told[4].1), [1, 0x1000, 0x3000, 0x2000, 0]);
    assert_eq!(frontend.stop(&[1]).unwrap(), [7]);
    frontend.look().unwrap();
}

#[test]
fn who_is_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let refused = |path: &Path| connect(path).unwrap_err().to_string();
    let shown = path.display();
    assert_eq!(refused(&path), format!("cannot connect to the vhost-user socket {shown} (is the daemon running?)"));
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(refused(&path).ends_with("(nothing listens there; has the daemon ended?)"));
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "").unwrap();
    assert_eq!(refused(&path), format!("{shown} is not a socket"));
}

/// Runs a daemon that misbehaves at one request; returns the resulting error.
fn misbehaves(at: u32, answer: fn() -> Answer) -> String {
    let daemon = FakeDaemon::start(move |request, payload| match request == at {
        true => answer(),
        false => Answer::Good(good(FEATURES, request, payload)),
    });
    let sentence = |e: &dyn std::error::Error| format!("{e}: {}", e.source().map_or(String::new(), |e| e.to_string()));
    let mut frontend = match connect(&daemon.path) {
        Ok(frontend) => frontend,
        Err(e) => return sentence(&e),
    };
    let result = frontend.config(8).and_then(|_| start(&mut frontend, &ram())).and_then(|()| frontend.stop(&[1]));
    let why = result.unwrap_err().to_string();
    if why.contains("is gone") {
        // Later calls fail without waiting.
        let look = frontend.look().unwrap_err().to_string();
        let again = start(&mut frontend, &ram()).unwrap_err().to_string();
        assert!([look, again].iter().all(|why| why.contains("is gone")));
    }
    why
}

#[test]
fn no_daemon_is_waited_for_for_ever() {
    std::thread::scope(|scope| {
        for at in [1, 15, 5, 24, 11] {
            scope.spawn(move || assert!(misbehaves(at, || Answer::Silence).contains("it does not answer"), "{at}"));
            // A truncated answer.
            let half = || Answer::Raw(vec![5, 0, 0]);
            scope.spawn(move || assert!(misbehaves(at, half).contains("it does not answer"), "{at}"));
            assert!(misbehaves(at, || Answer::End).contains("it has closed the connection"), "{at}");
        }
    });
}

#[test]
fn a_call_has_one_deadline_however_many_messages_it_has() {
    for (at, what) in [(10, "start"), (18, "enable"), (11, "stop")] {
        let daemon = FakeDaemon::start(move |request, payload| {
            if request == at {
                std::thread::sleep(Duration::from_millis(25));
            }
            Answer::Good(good(FEATURES, request, payload))
        });
        let mut frontend = connect(&daemon.path).unwrap();
        // A stop has twice this time. Each answer comes within it, but all of them together do not.
        frontend.patience = Duration::from_millis(100);
        let (kick, call) = (eventfd().unwrap(), eventfd().unwrap());
        let ring = |index| Ring { index, size: 8, next_avail: 0, desc: 0, avail: 0, used: 0, kick: &kick, call: &call };
        let (indices, rings): (Vec<u16>, Vec<Ring<'_>>) = (0..32).map(|i| (i, ring(i))).unzip();
        let why = match what {
            "start" => frontend.start(0, &ram().shared_regions().unwrap(), &rings).unwrap_err(),
            "enable" => frontend.enable(indices.iter().map(|i| (*i, true))).unwrap_err(),
            _ => frontend.stop(&indices).unwrap_err(),
        };
        assert!(why.to_string().contains("it does not answer"), "{what}: {why}");
        assert!(frontend.broken().is_some(), "{what}");
    }
}

#[test]
fn answers_have_a_shape() {
    for at in [1, 15, 17, 5, 9, 18, 24, 11] {
        let wrong = misbehaves(at, || Answer::Raw(header(77, 5, 0).to_vec()));
        assert!(wrong.contains("its answer does not match the request"), "{at}: {wrong}");
        let long = misbehaves(at, || Answer::Good(vec![0; 4000]));
        assert!(long.contains("its answer is too long"), "{at}: {long}");
        let empty = misbehaves(at, || Answer::Good(vec![]));
        assert!(!empty.is_empty(), "{at}");
    }
    for at in [5, 8, 12] {
        let refused = misbehaves(at, || Answer::Good(1u64.to_ne_bytes().to_vec()));
        assert!(refused.contains(" refuses Set"), "{refused}");
    }
    let lost = misbehaves(11, || Answer::Good([1u32.to_ne_bytes(), 65_536u32.to_ne_bytes()].concat()));
    assert!(lost.contains("it reported an invalid position in a ring"), "{lost}");
}

#[test]
fn who_speaks_unasked_is_not_believed() {
    let daemon = FakeDaemon::start(|request, payload| match request {
        18 => Answer::Raw([&header(18, 5, 8)[..], &[0; 8], b"more"].concat()),
        _ => Answer::Good(good(FEATURES, request, payload)),
    });
    let mut frontend = connect(&daemon.path).unwrap();
    frontend.look().unwrap();
    start(&mut frontend, &ram()).unwrap();
    assert!(frontend.look().unwrap_err().to_string().contains("it sent an answer without a request"));
}

#[test]
fn requests_of_the_daemon() {
    let (ours, mut its) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let mut channel = Channel { stream: ours, buffer: vec![] };
    assert!(!channel.take(Instant::now()).unwrap());
    let mut say = |bytes: &[u8]| io::Write::write_all(&mut its, bytes).unwrap();
    say(&header(CONFIG_CHANGE, 9, 0)[..5]);
    assert!(!channel.take(Instant::now()).unwrap());
    say(&header(CONFIG_CHANGE, 9, 0)[5..]);
    assert!(channel.take(Instant::now()).unwrap());
    say(&[&header(3, 9, 4)[..], &[1; 4]].concat());
    assert!(!channel.take(Instant::now()).unwrap());
    say(&header(CONFIG_CHANGE, 1, MAX_REQUEST + 1));
    assert!(channel.take(Instant::now()).is_err());
    let mut answers = [0; 40];
    its.read_exact(&mut answers).unwrap();
    assert_eq!((&answers[..12], answers[12], answers[32]), (&header(CONFIG_CHANGE, 5, 8)[..], 0, 1));
    drop(its);
    assert!(channel.take(Instant::now()).is_err());
}

#[test]
fn shared_memory_cannot_be_cut_off() {
    let ram = ram();
    let region = ram.shared_regions().unwrap()[0];
    let file = std::fs::File::from(region.file.try_clone_to_owned().unwrap());
    assert!(file.set_len(0).is_err() && file.set_len(2 << 20).is_err());
    assert!(GuestRam::anonymous(1 << 20).shared_regions().is_none());
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 64, ..ProptestConfig::default() })]

    /// Answers with flipped bits or appended bytes are survived, within the time limit.
    #[test]
    fn any_answer_is_survived(
        flips in prop::collection::vec((0..24usize, 0..8u8, any::<bool>()), 1..30),
        tail in prop::collection::vec(any::<u8>(), 0..4),
    ) {
        let mut step = 0;
        let daemon = FakeDaemon::start(move |request, payload| {
            let answer = good(FEATURES, request, payload);
            let mut bytes = [&header(request, 5, answer.len())[..], &answer].concat();
            step += 1;
            if let Some((at, bit, true)) = flips.get(step) {
                if let Some(byte) = bytes.get_mut(*at) {
                    *byte ^= 1 << bit;
                }
                bytes.extend(&tail);
            }
            // Answers that are not waited for must not be sent.
            if matches!(request, 2 | 3 | 16) && step < 4 { Answer::Silence } else { Answer::Raw(bytes) }
        });
        if let Ok(mut frontend) = connect(&daemon.path) {
            let _ = frontend.config(60);
            let _ = start(&mut frontend, &ram());
            let _ = frontend.stop(&[1]);
            let _ = frontend.look();
        }
    }
}
