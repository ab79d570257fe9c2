//! A shared folder. Beside it lies a file that no request may reach.

#![no_main]

use std::fs;
use std::sync::{LazyLock, Once};

use libfuzzer_sys::fuzz_target;
use vireo::virtio::fs::{Budget, Cache, Fs, FsConfig};
use vireo_fuzz::{Request, drive};

/// A FUSE request: opcode, node, body.
fn message(opcode: u32, node: u64, body: &[&[u8]]) -> Vec<u8> {
    let body = body.concat();
    let mut message = (40 + body.len() as u32).to_le_bytes().to_vec();
    message.extend(opcode.to_le_bytes());
    message.extend(7u64.to_le_bytes());
    message.extend(node.to_le_bytes());
    message.extend([0; 16]);
    message.extend(body);
    message
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Joins two 32-bit words in one of 64 bits.
const fn pair(low: u32, high: u32) -> u64 {
    low as u64 | (high as u64) << 32
}

/// Requests, each with room for its answer. Nodes 1 to 4 and handles 1 and 2 are the first that a guest gets.
static MESSAGES: LazyLock<Vec<(usize, Vec<u8>, Vec<u32>)>> = LazyLock::new(|| {
    let (out, wide) = (vec![16, 200], vec![16, 4096]);
    let read = |node, handle| message(15, node, &[&words(&[handle, 0, pair(4096, 0), 0, 0])]);
    let list = |opcode| message(opcode, 1, &[&words(&[1, 0, pair(4096, 0), 0, 0])]);
    vec![
        (1, message(26, 0, &[&words(&[pair(7, 36), pair(0x20000, u32::MAX)]), &[0; 48]]), out.clone()),
        (1, message(1, 1, &[b"file\0"]), out.clone()),
        (1, message(1, 1, &[b"dir\0"]), out.clone()),
        (1, message(1, 1, &[b"out\0"]), out.clone()),
        (1, message(1, 1, &[b"..\0"]), out.clone()),
        (1, message(1, 2, &[b"inner\0"]), out.clone()),
        (1, message(3, 2, &[&words(&[0, 1])]), out.clone()),
        (
            1,
            message(4, 2, &[&words(&[pair(8 | 1 | 64, 0), 1, 4096, 0, 0, 0, 0, 0, pair(0o644, 0), 0, 0])]),
            out.clone(),
        ),
        (1, message(5, 4, &[]), wide.clone()),
        (1, message(6, 1, &[b"link\0../secret\0"]), out.clone()),
        (1, message(8, 1, &[&words(&[pair(0o10644, 0), 0]), b"fifo\0"]), out.clone()),
        (1, message(9, 1, &[&words(&[pair(0o755, 0)]), b"dir2\0"]), out.clone()),
        (1, message(10, 1, &[b"file\0"]), out.clone()),
        (1, message(11, 1, &[b"dir\0"]), out.clone()),
        (1, message(12, 1, &[&words(&[3]), b"file\0moved\0"]), out.clone()),
        (1, message(45, 1, &[&words(&[1, 2]), b"file\0dir\0"]), out.clone()),
        (1, message(13, 1, &[&words(&[2]), b"hard\0"]), out.clone()),
        (1, message(14, 2, &[&words(&[pair(2, 0)])]), out.clone()),
        (1, read(2, 1), wide.clone()),
        (1, message(16, 2, &[&words(&[1, 100, pair(4, 0), 0, 0]), b"text"]), out.clone()),
        (1, message(17, 1, &[]), out.clone()),
        (1, message(18, 2, &[&words(&[1, 0, 0])]), out.clone()),
        (1, message(20, 2, &[&words(&[1, 0])]), out.clone()),
        (1, message(21, 2, &[&words(&[pair(1, 0)]), b"user.a\0b"]), out.clone()),
        (1, message(22, 2, &[&words(&[pair(100, 0)]), b"user.a\0"]), out.clone()),
        (1, message(23, 2, &[&words(&[pair(100, 0)])]), out.clone()),
        (1, message(24, 2, &[b"user.a\0"]), out.clone()),
        (1, message(25, 2, &[&words(&[1, 0, 0])]), out.clone()),
        (1, message(27, 1, &[&words(&[0])]), out.clone()),
        (1, list(28), wide.clone()),
        (1, list(44), wide.clone()),
        (1, message(29, 1, &[&words(&[1, 0, 0])]), out.clone()),
        (1, message(35, 1, &[&words(&[pair(2, 0o644), 0]), b"new\0"]), out.clone()),
        (1, message(34, 1, &[&words(&[4])]), out.clone()),
        (1, message(43, 2, &[&words(&[1, 0, 4096, 3])]), out.clone()),
        (1, message(46, 2, &[&words(&[1, 0, pair(3, 0)])]), out.clone()),
        (1, message(47, 2, &[&words(&[1, 0, 2, 1, 0, 100, 0])]), out.clone()),
        (1, message(38, 0, &[]), out.clone()),
        (0, message(2, 2, &[&words(&[1])]), vec![]),
        (0, message(42, 0, &[&words(&[pair(2, 0), 2, 1, 3, 1])]), vec![]),
    ]
});

/// Keeps every file small, whatever a request says.
fn limit_files() {
    static ONCE: Once = Once::new();
    let limit = libc::rlimit { rlim_cur: 8 << 20, rlim_max: 8 << 20 };
    // SAFETY: both calls read their arguments only.
    ONCE.call_once(|| unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        libc::setrlimit(libc::RLIMIT_FSIZE, &limit);
    });
}

fuzz_target!(|data: &[u8]| {
    limit_files();
    let Some((how, data)) = data.split_first() else { return };
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let (secret, share) = (dir.path().join("secret"), dir.path().join("share"));
    fs::write(&secret, "not yours").unwrap();
    fs::create_dir_all(share.join("dir")).unwrap();
    fs::write(share.join("file"), "yours").unwrap();
    fs::write(share.join("dir/inner"), "").unwrap();
    std::os::unix::fs::symlink("../secret", share.join("out")).unwrap();
    let config = FsConfig {
        path: share,
        readonly: how & 1 != 0,
        squash_uid: (how & 2 != 0).then_some(5),
        cache: if how & 4 != 0 { Cache::Always } else { Cache::Auto },
        ..FsConfig::default()
    };
    let requests: Vec<Request> =
        MESSAGES.iter().map(|(queue, readable, writable)| Request { queue: *queue, readable, writable }).collect();
    drive(&mut Fs::new(0, &config, &Budget::new(1000, 1)).unwrap(), &requests, data, &mut |_| {});
    assert_eq!(fs::read(&secret).unwrap(), b"not yours");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
});
