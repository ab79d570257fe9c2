//! A guest's driver that sends single requests to a share of a folder of the host.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use proptest::prelude::*;

use super::inodes::Limits;
use super::server::MAX_TRANSFER;
use super::wire::{IN_HEADER, OUT_HEADER, Out, ROOT, fattr, fopen, init, op};
use super::*;
use crate::memory::GuestRam;
use crate::virtio::testing::{Buf, FakeQueue, Loopback, inn, out};

const RAM: u64 = 16 << 20;
const REQUEST: u64 = 0x10_0000;
const ANSWER: u64 = 0x80_0000;
const SIZE: u16 = 16;

struct Guest {
    dir: tempfile::TempDir,
    device: Fs,
    ram: GuestRam,
    wire: Loopback,
    driver: FakeQueue,
    queues: Vec<Queue>,
    handler: Box<dyn Handler>,
}

/// `fuse_entry_out`.
#[derive(Debug, PartialEq)]
struct Found {
    id: u64,
    valid: u64,
    size: u64,
    mode: u32,
    uid: u32,
    flags: u32,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// `fuse_attr`: size, mode, uid, flags.
fn attr(bytes: &[u8]) -> (u64, u32, u32, u32) {
    assert_eq!(bytes.len(), 88);
    (u64_at(bytes, 8), u32_at(bytes, 60), u32_at(bytes, 68), u32_at(bytes, 84))
}

fn found(bytes: &[u8]) -> Found {
    let (size, mode, uid, flags) = attr(&bytes[40..128]);
    Found { id: u64_at(bytes, 0), valid: u64_at(bytes, 16), size, mode, uid, flags }
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn name(text: &str) -> Vec<u8> {
    [text.as_bytes(), b"\0"].concat()
}

fn header(len: usize, opcode: u32, nodeid: u64) -> Vec<u8> {
    let mut out = Out::default();
    // Requests come from the guest's root, which need not be the host user that owns the files.
    out.u32(len as u32).u32(opcode).u64(77).u64(nodeid).u32(0).u32(0).u32(1).u32(0).done().0
}

/// Budget of a process with many descriptors.
fn budget(shares: usize) -> Budget {
    Budget::new(1 << 20, shares)
}

/// Pool of sixteen descriptors.
fn few_descriptors() -> Arc<super::budget::Pool> {
    Budget::new(8 * 16, 1).known
}

impl Guest {
    fn new(options: &str) -> Self {
        Self::with_budget(options, &budget(1))
    }

    fn with_budget(options: &str, budget: &Budget) -> Self {
        let mut guest = Self::on_folder(options, budget);
        let offered = u32::MAX;
        let answer = guest.call(op::INIT, 0, &words(&[7, 38, 131_072, offered])).unwrap();
        assert_eq!(answer.len(), 64);
        assert_eq!((u32_at(&answer, 0), u32_at(&answer, 4), u32_at(&answer, 8)), (7, 38, 131_072));
        let flags = u32_at(&answer, 12);
        assert!(flags & init::MAX_PAGES != 0 && flags & init::HANDLE_KILLPRIV_V2 != 0);
        assert_eq!((u32_at(&answer, 20), u32_at(&answer, 28)), (MAX_TRANSFER, 256), "max_write, max_pages");
        guest
    }

    fn before_init(options: &str) -> Self {
        Self::on_folder(options, &budget(1))
    }

    fn on_folder(options: &str, budget: &Budget) -> Self {
        let dir = tempfile::tempdir().unwrap();
        if let Some(folder) = options.strip_prefix('/') {
            fs::create_dir(dir.path().join(folder)).unwrap();
        }
        let config: FsConfig = format!("{}{options}", dir.path().display()).parse().unwrap();
        let mut device = Fs::new(0, &config, budget).unwrap();
        let ram = GuestRam::anonymous(RAM);
        let driver = FakeQueue::new(&ram, 0x1000, SIZE);
        let wire = Loopback::new(&ram);
        let (handler, queues) = Self::activate(&mut device, &ram, &wire, &driver);
        let mut guest = Guest { dir, device, ram, wire, driver, queues, handler };
        guest.wire.deliver(&mut *guest.handler, &mut guest.queues, Event::Start).unwrap();
        guest
    }

    fn activate(
        device: &mut Fs,
        ram: &GuestRam,
        wire: &Loopback,
        driver: &FakeQueue,
    ) -> (Box<dyn Handler>, Vec<Queue>) {
        let urgent = Queue::disabled(0, driver.state());
        let (features, kicks) = (RING_FEATURES, vec![].into());
        let queues = vec![urgent, driver.device(features)];
        let activation = Activation { ram: ram.clone(), features, queues, kicks, interrupt: wire.interrupt.clone() };
        let Ok(Activated::Here(mut shares)) = device.activate(activation) else { panic!("it does not start") };
        assert_eq!(shares.len(), 2);
        let Share { handler, queues } = shares.remove(1);
        (handler, queues)
    }

    fn server(&self) -> &Server {
        &self.device.server
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Puts arbitrary bytes into a chain and serves it.
    fn raw(&mut self, request: &[u8], room: &[Buf]) -> Result<u32, Fault> {
        self.ram.write(REQUEST, request).unwrap();
        let mut bufs = vec![out(REQUEST, request.len() as u32)];
        bufs.extend(room);
        self.driver.add(&bufs).unwrap();
        self.wire.deliver(&mut *self.handler, &mut self.queues, Event::Kick(0))?;
        Ok(self.driver.take_used().unwrap().1)
    }

    /// Sends a request; returns its answer without the header, or the error number.
    fn call_with_room(&mut self, opcode: u32, nodeid: u64, args: &[u8], room: u32) -> Result<Vec<u8>, i32> {
        let request = [header(IN_HEADER + args.len(), opcode, nodeid), args.to_vec()].concat();
        let len = self.raw(&request, &[inn(ANSWER, 7), inn(ANSWER + 7, 9 + room)]).unwrap() as usize;
        let mut answer = vec![0; len];
        self.ram.read(ANSWER, &mut answer).unwrap();
        assert_eq!((u32_at(&answer, 0) as usize, u64_at(&answer, 8)), (len, 77));
        match u32_at(&answer, 4) as i32 {
            0 => Ok(answer.split_off(OUT_HEADER)),
            error => {
                assert!((-4095..0).contains(&error) && len == OUT_HEADER, "{error}");
                Err(-error)
            }
        }
    }

    fn call(&mut self, opcode: u32, nodeid: u64, args: &[u8]) -> Result<Vec<u8>, i32> {
        self.call_with_room(opcode, nodeid, args, 1 << 16)
    }

    fn lookup(&mut self, dir: u64, text: &str) -> Result<Found, i32> {
        self.call(op::LOOKUP, dir, &name(text)).map(|answer| found(&answer))
    }

    fn forget(&mut self, id: u64, lookups: u64) {
        let request = [header(IN_HEADER + 8, op::FORGET, id), lookups.to_le_bytes().to_vec()].concat();
        assert_eq!(self.raw(&request, &[]).unwrap(), 0);
    }

    fn open(&mut self, id: u64, flags: i32) -> Result<u64, i32> {
        self.call(op::OPEN, id, &words(&[flags as u32, 0])).map(|answer| u64_at(&answer, 0))
    }

    fn create(&mut self, dir: u64, text: &str, flags: i32, mode: u32) -> Result<(Found, u64), i32> {
        let args = [words(&[(flags | libc::O_CREAT) as u32, mode, 0, 0]), name(text)].concat();
        self.call(op::CREATE, dir, &args).map(|answer| (found(&answer), u64_at(&answer, 128)))
    }

    fn write(&mut self, handle: u64, offset: u64, flags: u32, write_flags: u32, data: &[u8]) -> Result<u32, i32> {
        let mut args = Out::default();
        args.u64(handle).u64(offset).u32(data.len() as u32).u32(write_flags).u64(0).u32(flags).u32(0).bytes(data);
        self.call(op::WRITE, 0, &args.0).map(|answer| u32_at(&answer, 0))
    }

    fn read(&mut self, handle: u64, offset: u64, size: u32) -> Result<Vec<u8>, i32> {
        let args = Out::default().u64(handle).u64(offset).u32(size).u32(0).u64(0).u64(0).done().0;
        self.call(op::READ, 0, &args)
    }

    fn setattr(&mut self, id: u64, valid: u32, change: impl FnOnce(&mut Vec<u8>)) -> Result<Vec<u8>, i32> {
        let mut args = vec![0; 88];
        args[..4].copy_from_slice(&valid.to_le_bytes());
        change(&mut args);
        self.call(op::SETATTR, id, &args)
    }

    fn getattr(&mut self, id: u64) -> Result<(u64, u32, u32, u32), i32> {
        self.call(op::GETATTR, id, &[0; 16]).map(|answer| attr(&answer[16..]))
    }

    /// Reads the names in a directory, in pieces of `size` bytes.
    fn list(&mut self, handle: u64, opcode: u32, id: u64, size: u32) -> Vec<(String, u64)> {
        let (mut names, mut position) = (Vec::new(), 0);
        loop {
            let args = Out::default().u64(handle).u64(position).u32(size).zeros(20).done().0;
            let answer = self.call(opcode, id, &args).unwrap();
            let mut rest = answer.as_slice();
            if rest.is_empty() {
                return names;
            }
            while !rest.is_empty() {
                let plus = if opcode == op::READDIRPLUS { 128 } else { 0 };
                let (id, entry) = (if plus > 0 { u64_at(rest, 0) } else { 0 }, &rest[plus..]);
                let len = u32_at(entry, 16) as usize;
                names.push((String::from_utf8(entry[24..24 + len].to_vec()).unwrap(), id));
                position = u64_at(entry, 8);
                rest = &rest[plus + (24 + len).next_multiple_of(8)..];
            }
        }
    }
}

#[test]
fn options_and_configuration_space() {
    let config: FsConfig = "/srv,tag=data,readonly,squash-uid=5,cache=always,queues=3".parse().unwrap();
    let same: FsConfig = serde_json::from_str(
        r#"{"path":"/srv","tag":"data","readonly":true,"squash_uid":5,"cache":"always","queues":3}"#,
    )
    .unwrap();
    assert_eq!(config, same);
    let error = "/srv,x=1".parse::<FsConfig>().unwrap_err().to_string();
    assert!(error.starts_with("unknown key 'x'; valid keys are path, tag, readonly, squash"), "{error}");
    let check = |texts: &[&str]| {
        let shares: Vec<FsConfig> = texts.iter().map(|text| text.parse().unwrap()).collect();
        FsConfig::validate(&shares).err().unwrap_or_default()
    };
    assert_eq!(check(&["/a", "/b", "/c,tag=x"]), "");
    assert_eq!(check(&["/a", "/b,tag=share0"]), "the tag 'share0' is given twice");
    let unnamed = FsConfig { tag: Some(String::new()), ..config };
    assert_eq!(FsConfig::validate(&[unnamed]).unwrap_err(), "the tag '' is not 1 to 36 bytes long");
    let long = "x".repeat(37);
    assert_eq!(check(&[&format!("/a,tag={long}")]), format!("the tag '{long}' is not 1 to 36 bytes long"));
    assert_eq!(check(&["/a,queues=17"]), "queues=17: a share can have 1 to 16");

    let guest = Guest::new(",tag=abc,queues=2");
    let mut space = [0xFF; 48];
    guest.device.read_config(0, &mut space);
    assert_eq!((&space[..4], &space[35..41]), (&b"abc\0"[..], &[0, 2, 0, 0, 0, 0xFF][..]));
    assert_eq!(guest.device.info().queue_sizes, [512; 3]);
}

#[test]
fn a_guest_begins_with_init() {
    let mut guest = Guest::before_init("");
    assert_eq!(guest.getattr(ROOT), Err(libc::ENOTCONN));
    assert_eq!(guest.call(op::INIT, 0, &words(&[6, 38, 0, 0])), Err(libc::EPROTO));
    assert_eq!(guest.call(op::INIT, 0, &words(&[7, 26, 0, 0])), Err(libc::EPROTO));
    assert_eq!(guest.call(op::INIT, 0, &words(&[7])), Err(libc::EINVAL));
    let newer = guest.call(op::INIT, 0, &words(&[8, 0, 0, 0])).unwrap();
    assert_eq!((u32_at(&newer, 0), newer.len()), (7, 64));
    assert_eq!(guest.getattr(ROOT), Err(libc::ENOTCONN), "a refused INIT mounts nothing");
    let older = guest.call(op::INIT, 0, &words(&[7, 31, 0, init::MAX_PAGES])).unwrap();
    assert_eq!((u32_at(&older, 4), u32_at(&older, 12)), (31, init::MAX_PAGES));
    assert_eq!(guest.getattr(ROOT).unwrap().1 & libc::S_IFMT, libc::S_IFDIR);
    let (_, handle) = guest.create(ROOT, "file", libc::O_RDWR, 0o600).unwrap();
    assert_eq!(guest.server().counts(), (2, 1, 1));
    guest.call(op::DESTROY, 0, &[]).unwrap();
    assert_eq!(guest.server().counts(), (1, 0, 0));
    assert_eq!(guest.device.save().unwrap(), serde_json::json!({ "mounted": null }));
    guest.call(op::INIT, 0, &words(&[7, 38, 0, 0])).unwrap();
    assert_eq!(guest.read(handle, 0, 10), Err(libc::EBADF));
}

#[test]
fn looking_up_counts_and_forgetting_forgets() {
    let mut guest = Guest::new("");
    fs::create_dir(guest.path("dir")).unwrap();
    fs::write(guest.path("dir/file"), "12345").unwrap();
    let dir = guest.lookup(ROOT, "dir").unwrap();
    assert_eq!((dir.mode & libc::S_IFMT, dir.valid), (libc::S_IFDIR, 1));
    let file = guest.lookup(dir.id, "file").unwrap();
    assert_eq!((file.size, file.mode & libc::S_IFMT), (5, libc::S_IFREG));
    assert_eq!(guest.lookup(dir.id, "file").unwrap(), file, "the same file has the same number");
    assert_eq!(guest.getattr(file.id).unwrap().0, 5);
    guest.forget(file.id, 1);
    assert!(guest.getattr(file.id).is_ok());
    guest.forget(file.id, 1);
    assert_eq!(guest.getattr(file.id), Err(libc::ESTALE));
    let again = guest.lookup(dir.id, "file").unwrap();
    assert!(again.id > file.id, "numbers are not used again");
    // Forgets more than was looked up, and files that do not exist.
    guest.forget(again.id, u64::MAX);
    for id in [0, ROOT, 12345, u64::MAX] {
        guest.forget(id, u64::MAX);
    }
    assert!(guest.getattr(ROOT).is_ok());
    let both = Out::default().u32(1000).u32(0).u64(dir.id).u64(1).u64(ROOT).u64(5).u64(9).done().0;
    let request = [header(IN_HEADER + both.len(), op::BATCH_FORGET, 0), both].concat();
    assert_eq!(guest.raw(&request, &[]).unwrap(), 0);
    assert_eq!(guest.server().counts(), (1, 0, 0));
    // The guest may cache a missing name, as number 0.
    let missing = guest.call(op::LOOKUP, ROOT, &name("missing")).unwrap();
    assert_eq!((u64_at(&missing, 0), u64_at(&missing, 16), missing.len()), (0, 1, 128));
    assert_eq!(Guest::new(",cache=never").lookup(ROOT, "missing"), Err(libc::ENOENT));
    assert_eq!(guest.lookup(file.id, "x"), Err(libc::ESTALE));
}

#[test]
fn no_name_leads_out() {
    let mut guest = Guest::new("");
    symlink("/etc", guest.path("out")).unwrap();
    fs::write(guest.path("file"), "").unwrap();
    let link = guest.lookup(ROOT, "out").unwrap();
    assert_eq!(link.mode & libc::S_IFMT, libc::S_IFLNK);
    assert_eq!(guest.call(op::READLINK, link.id, &[]).unwrap(), b"/etc");
    assert_eq!(guest.lookup(link.id, "passwd"), Err(libc::ENOTDIR));
    assert_eq!(guest.open(link.id, libc::O_RDONLY), Err(libc::ENXIO));
    assert_eq!(guest.call(op::OPENDIR, link.id, &words(&[0, 0])), Err(libc::ENOTDIR));
    assert_eq!(guest.create(ROOT, "out", libc::O_RDWR, 0o600).unwrap_err(), libc::ELOOP);
    let file = guest.lookup(ROOT, "file").unwrap();
    for bad in ["", ".", "..", "/", "a/b", "../x", "/etc/passwd", "out/passwd"] {
        assert_eq!(guest.lookup(ROOT, bad), Err(libc::EINVAL), "{bad}");
        let text = name(bad);
        let with = |words: Vec<u8>| [words, text.clone()].concat();
        for (opcode, args) in [
            (op::MKDIR, with(words(&[0o700, 0]))),
            (op::MKNOD, with(words(&[libc::S_IFREG, 0, 0, 0]))),
            (op::CREATE, with(words(&[0, 0o600, 0, 0]))),
            (op::SYMLINK, [text.clone(), name("target")].concat()),
            (op::LINK, with(file.id.to_le_bytes().to_vec())),
            (op::UNLINK, text.clone()),
            (op::RMDIR, text.clone()),
            (op::RENAME, [ROOT.to_le_bytes().to_vec(), name("file"), text.clone()].concat()),
            (op::RENAME, [ROOT.to_le_bytes().to_vec(), text.clone(), name("other")].concat()),
            (op::RENAME2, [ROOT.to_le_bytes().to_vec(), words(&[1, 0]), name("file"), text.clone()].concat()),
        ] {
            assert_eq!(guest.call(opcode, ROOT, &args), Err(libc::EINVAL), "{opcode} {bad}");
        }
    }
    // A name without its NUL, and a link without its target.
    assert_eq!(guest.call(op::LOOKUP, ROOT, b"file"), Err(libc::EINVAL));
    assert_eq!(guest.call(op::SYMLINK, ROOT, b"one\0two"), Err(libc::EINVAL));
    assert_eq!(guest.lookup(ROOT, &"x".repeat(256)), Err(libc::ENAMETOOLONG));
    assert_eq!(fs::read_dir(guest.dir.path()).unwrap().count(), 2);
}

#[test]
fn files_are_made_read_and_written() {
    let mut guest = Guest::new("");
    let (file, handle) = guest.create(ROOT, "file", libc::O_RDWR, 0o666).unwrap();
    assert_eq!(file.mode, libc::S_IFREG | 0o666, "the umask is the guest's");
    assert_eq!(guest.write(handle, 0, 0, 0, b"hello, world"), Ok(12));
    assert_eq!(guest.read(handle, 7, 100).unwrap(), b"world");
    assert_eq!(guest.read(handle, 100, 100).unwrap(), b"");
    assert_eq!(fs::read(guest.path("file")).unwrap(), b"hello, world");
    // O_APPEND writes at the end, whatever offset the guest gives, except writes from the guest's cache.
    assert_eq!(guest.write(handle, 3, libc::O_APPEND as u32, 0, b"!!"), Ok(2));
    assert_eq!(guest.write(handle, 0, libc::O_APPEND as u32, 1, b"H"), Ok(1));
    assert_eq!(guest.write(handle, 1, libc::O_SYNC as u32, 4, b"E"), Ok(1));
    assert_eq!(fs::read(guest.path("file")).unwrap(), b"HEllo, world!!");
    assert_eq!(guest.create(ROOT, "file", libc::O_RDWR | libc::O_EXCL, 0o600).unwrap_err(), libc::EEXIST);
    let (same, second) = guest.create(ROOT, "file", libc::O_RDONLY | libc::O_TRUNC, 0o600).unwrap();
    assert_eq!((same.id, same.valid), (file.id, 1));
    assert_eq!(fs::metadata(guest.path("file")).unwrap().len(), 0);
    assert_eq!(guest.write(second, 0, 0, 0, b"x"), Err(libc::EBADF), "open for reading");
    let third = guest.open(file.id, libc::O_WRONLY).unwrap();
    assert_eq!(guest.read(third, 0, 1), Err(libc::EBADF));
    for handle in [handle, second, third] {
        let args = Out::default().u64(handle).zeros(16).done().0;
        guest.call(op::RELEASE, file.id, &args).unwrap();
        assert_eq!(guest.call(op::RELEASE, file.id, &args), Err(libc::EBADF));
    }
    assert_eq!(guest.server().counts().2, 0);
    let fsync = |handle: u64| Out::default().u64(handle).u32(1).u32(0).done().0;
    let handle = guest.open(file.id, libc::O_RDWR).unwrap();
    guest.call(op::FSYNC, file.id, &fsync(handle)).unwrap();
    let fallocate = |mode: u32, len: u64| Out::default().u64(handle).u64(0).u64(len).u32(mode).u32(0).done().0;
    assert_eq!(guest.call(op::FALLOCATE, file.id, &fallocate(0x40, 100)), Err(libc::EOPNOTSUPP));
    assert_eq!(guest.call(op::FALLOCATE, file.id, &fallocate(0, u64::MAX)), Err(libc::EINVAL));
    guest.call(op::FALLOCATE, file.id, &fallocate(0, 100)).unwrap();
    assert_eq!(guest.getattr(file.id).unwrap().0, 100);
    guest.write(handle, 0, 0, 0, &[1; 100]).unwrap();
    let lseek = |offset: u64, whence: i32| Out::default().u64(handle).u64(offset).u32(whence as u32).u32(0).done().0;
    assert_eq!(guest.call(op::LSEEK, file.id, &lseek(0, libc::SEEK_HOLE)).map(|a| u64_at(&a, 0)), Ok(100));
    assert_eq!(guest.call(op::LSEEK, file.id, &lseek(100, libc::SEEK_DATA)), Err(libc::ENXIO));
    for (offset, whence) in [(0, libc::SEEK_SET), (0, libc::SEEK_END), (0, 99), (u64::MAX, libc::SEEK_DATA)] {
        assert!(guest.call(op::LSEEK, file.id, &lseek(offset, whence)).is_err());
    }
    let copy =
        |to: u64, flags: u64| Out::default().u64(handle).u64(0).u64(0).u64(handle).u64(to).u64(50).u64(flags).done().0;
    let copied = guest.call(op::COPY_FILE_RANGE, file.id, &copy(200, 0)).unwrap();
    assert_eq!((u32_at(&copied, 0), guest.getattr(file.id).unwrap().0), (50, 250));
    assert_eq!(guest.call(op::COPY_FILE_RANGE, file.id, &copy(200, 1)), Err(libc::EINVAL));
    assert!(guest.call(op::COPY_FILE_RANGE, file.id, &copy(u64::MAX, 0)).is_err());
    assert_eq!(guest.call(op::IOCTL, file.id, &[0; 32]), Err(libc::ENOTTY));
    for unknown in [0, 7, 31, 32, 33, 34, 25, 53, 4096, u32::MAX] {
        assert_eq!(guest.call(unknown, file.id, &[0; 48]), Err(libc::ENOSYS), "{unknown}");
    }
}

#[test]
fn what_cannot_be_opened_is_not_known() {
    let mut guest = Guest::new("");
    fs::create_dir(guest.path("dir")).unwrap();
    symlink("/etc", guest.path("link")).unwrap();
    let before = guest.server().counts();
    assert_eq!(guest.create(ROOT, "dir", libc::O_RDWR, 0o600).unwrap_err(), libc::EISDIR);
    assert_eq!(guest.create(ROOT, "link", libc::O_RDWR, 0o600).unwrap_err(), libc::ELOOP);
    assert_eq!(guest.server().counts(), before);
    // The error does not forget a file that the guest knew before.
    let dir = guest.lookup(ROOT, "dir").unwrap();
    assert_eq!(guest.create(ROOT, "dir", libc::O_RDWR, 0o600).unwrap_err(), libc::EISDIR);
    guest.getattr(dir.id).unwrap();
    guest.forget(dir.id, 1);
    assert_eq!(guest.server().counts(), before);
}

#[test]
fn sizes_and_offsets_of_the_guest_are_checked() {
    let mut guest = Guest::new("");
    let (file, handle) = guest.create(ROOT, "file", libc::O_RDWR, 0o600).unwrap();
    guest.write(handle, 0, 0, 0, &[7; 1000]).unwrap();
    for size in [MAX_TRANSFER + 1, u32::MAX, 1 << 31] {
        assert_eq!(guest.read(handle, 0, size), Err(libc::EINVAL));
    }
    assert_eq!(guest.read(handle, 0, 1 << 17), Err(libc::EINVAL), "more than there is room for");
    for offset in [u64::MAX, 1 << 63, i64::MAX as u64] {
        assert!(guest.read(handle, offset, 100).is_err());
        assert!(guest.write(handle, offset, 0, 0, b"xx").is_err());
    }
    // The stated size is less or more than the data.
    for said in [999u32, 2000, MAX_TRANSFER, MAX_TRANSFER + 1, u32::MAX] {
        let args = Out::default().u64(handle).u64(0).u32(said).u32(0).u64(0).u64(0).bytes(&[8; 1000]).done().0;
        let wanted = if said == 999 { Ok(999) } else { Err(libc::EINVAL) };
        assert_eq!(guest.call(op::WRITE, file.id, &args).map(|a| u32_at(&a, 0)), wanted);
    }
    assert_eq!(guest.getattr(file.id).unwrap().0, 1000);
    for size in [u64::MAX, 1 << 63] {
        let truncated = guest.setattr(file.id, fattr::SIZE, |args| args[16..24].copy_from_slice(&size.to_le_bytes()));
        assert_eq!(truncated, Err(libc::EINVAL));
    }
    // Handles of the wrong kind, and unknown ones.
    let dir = u64_at(&guest.call(op::OPENDIR, ROOT, &words(&[0, 0])).unwrap(), 0);
    assert_eq!(guest.read(dir, 0, 10), Err(libc::EISDIR));
    assert_eq!(guest.write(dir, 0, 0, 0, b"x"), Err(libc::EISDIR));
    let readdir = |handle: u64, size: u32| Out::default().u64(handle).u64(0).u32(size).zeros(20).done().0;
    assert_eq!(guest.call(op::READDIR, ROOT, &readdir(handle, 4096)), Err(libc::ENOTDIR));
    assert_eq!(guest.call(op::READDIR, ROOT, &readdir(99, 4096)), Err(libc::EBADF));
    assert_eq!(guest.call(op::READDIR, ROOT, &readdir(dir, 10)).unwrap(), b"", "no room for one");
    assert_eq!(guest.call_with_room(op::READDIR, ROOT, &readdir(dir, u32::MAX), 30).unwrap().len() / 31, 0);
    assert_eq!(guest.open(ROOT, libc::O_RDONLY), Err(libc::EISDIR));
    assert_eq!(guest.open(99, libc::O_RDONLY), Err(libc::ESTALE));
}

#[test]
fn headers_are_checked() {
    let mut guest = Guest::new("");
    // Lengths that differ from the message's.
    for len in [0, 39, 41, 57, u32::MAX as usize] {
        let request = [header(len, op::GETATTR, ROOT), vec![0; 16]].concat();
        assert_eq!(guest.raw(&request, &[inn(ANSWER, 200)]).unwrap(), 16);
        assert_eq!(guest.ram.read_obj::<i32>(ANSWER + 4).unwrap(), -libc::EINVAL, "{len}");
    }
    // Arguments cut off at any point.
    for opcode in (0..60).filter(|op| ![op::FORGET, op::BATCH_FORGET, op::INTERRUPT, op::DESTROY].contains(op)) {
        for len in 0..40 {
            let _ = guest.call(opcode, ROOT, &vec![0; len]);
            let _ = guest.call(opcode, 5, &vec![0xFF; len]);
        }
    }
    guest.call(op::INIT, 0, &words(&[7, 38, 0, 0])).unwrap();
    // Without enough room for the answer the request fails; without room for its header the device does.
    assert_eq!(guest.call_with_room(op::GETATTR, ROOT, &[0; 16], 103), Err(libc::EINVAL));
    assert!(guest.call_with_room(op::GETATTR, ROOT, &[0; 16], 104).is_ok());
    assert_eq!(guest.call(op::SETXATTR, ROOT, &vec![0; 80_000]), Err(libc::E2BIG));
    let request = [header(56, op::GETATTR, ROOT), vec![0; 16]].concat();
    for room in [vec![], vec![inn(ANSWER, 15)]] {
        let mut guest = Guest::new("");
        assert!(matches!(guest.raw(&request, &room), Err(Fault::Device(_))));
    }
    assert!(matches!(Guest::new("").raw(&request[..39], &[inn(ANSWER, 100)]), Err(Fault::Device(_))));
}

#[test]
fn directories_are_listed_in_pieces() {
    let mut guest = Guest::new("");
    let mut all: Vec<String> = (0..500).map(|n| format!("{n:x>0$}", n % 90 + 1)).collect();
    all.iter().for_each(|name| fs::write(guest.path(name), "").unwrap());
    all.extend([".".to_string(), "..".to_string()]);
    all.sort();
    all.dedup();
    let open = |guest: &mut Guest| u64_at(&guest.call(op::OPENDIR, ROOT, &words(&[0, 0])).unwrap(), 0);
    let (one, two) = (open(&mut guest), open(&mut guest));
    for (size, opcode) in [(4096, op::READDIR), (300, op::READDIR), (1 << 16, op::READDIR), (4096, op::READDIRPLUS)] {
        let mut names: Vec<String> = guest.list(one, opcode, ROOT, size).into_iter().map(|(name, _)| name).collect();
        names.sort();
        assert_eq!(names, all, "{size}");
    }
    // READDIRPLUS gives the number of each entry except `.` and `..`.
    let plus = guest.list(one, op::READDIRPLUS, ROOT, 4096);
    for (name, id) in &plus {
        assert_eq!(*id == 0, name == "." || name == "..");
    }
    let known = guest.server().counts().0;
    assert_eq!(known, all.len() - 1);
    let (name, id) = plus.iter().find(|(_, id)| *id != 0).unwrap();
    assert_eq!(guest.lookup(ROOT, name).unwrap().id, *id);
    guest.forget(*id, 2);
    assert!(guest.getattr(*id).is_ok());
    guest.forget(*id, 1);
    assert_eq!(guest.getattr(*id), Err(libc::ESTALE));
    // Reads two handles alternately; then seeks one of them.
    let mut at = [0, 0];
    let mut names = [vec![], vec![]];
    loop {
        let mut ended = true;
        for (i, handle) in [one, two].into_iter().enumerate() {
            let args = Out::default().u64(handle).u64(at[i]).u32(1024).zeros(20).done().0;
            let answer = guest.call(op::READDIR, ROOT, &args).unwrap();
            let mut rest = answer.as_slice();
            while !rest.is_empty() {
                ended = false;
                let len = u32_at(rest, 16) as usize;
                names[i].push(rest[24..24 + len].to_vec());
                at[i] = u64_at(rest, 8);
                rest = &rest[(24 + len).next_multiple_of(8)..];
            }
        }
        if ended {
            break;
        }
    }
    assert_eq!((names[0].len(), &names[0]), (all.len(), &names[1]));
    let args = |position: u64| Out::default().u64(one).u64(position).u32(4096).zeros(20).done().0;
    for position in [u64::MAX, 1 << 63, 3, 1 << 40] {
        let _ = guest.call(op::READDIR, ROOT, &args(position));
    }
    guest.call(op::FSYNCDIR, ROOT, &Out::default().u64(one).u64(0).done().0).unwrap();
    guest.call(op::SYNCFS, ROOT, &[0; 8]).unwrap();
}

/// An empty directory stands in for each of the host kernel's own file systems, whatever a driver requests.
#[test]
fn the_kernels_interfaces_are_empty_directories() {
    let config = FsConfig { path: "/".into(), ..FsConfig::default() };
    let mut guest = Guest::new("");
    guest.device = Fs::new(0, &config, &budget(1)).unwrap();
    (guest.handler, guest.queues) = Guest::activate(&mut guest.device, &guest.ram, &guest.wire, &guest.driver);
    guest.driver = FakeQueue::new(&guest.ram, 0x1000, SIZE);
    (guest.handler, guest.queues) = Guest::activate(&mut guest.device, &guest.ram, &guest.wire, &guest.driver);
    guest.call(op::INIT, 0, &words(&[7, 38, 0, u32::MAX])).unwrap();
    for text in ["proc", "sys"] {
        let dir = guest.lookup(ROOT, text).unwrap();
        assert_eq!((dir.mode, dir.uid, dir.size), (libc::S_IFDIR | 0o555, 0, 0));
        assert_eq!(guest.getattr(dir.id).unwrap().1, libc::S_IFDIR | 0o555);
        for inside in ["self", "kcore", "kernel", "1"] {
            assert_eq!(guest.lookup(dir.id, inside).map(|found| found.id), Ok(0), "nothing is there");
        }
        let handle = guest.call(op::OPENDIR, dir.id, &[0; 8]).map(|a| u64_at(&a, 0)).unwrap();
        for opcode in [op::READDIR, op::READDIRPLUS] {
            assert!(guest.list(handle, opcode, dir.id, 4096).is_empty());
        }
        assert_eq!(guest.read(handle, 0, 100), Err(libc::EISDIR));
        assert_eq!(guest.open(dir.id, libc::O_RDONLY), Err(libc::EISDIR));
        assert_eq!(guest.create(dir.id, "new", libc::O_RDWR, 0o644), Err(libc::EROFS));
        assert_eq!(guest.setattr(dir.id, fattr::MODE, |_| ()), Err(libc::EROFS));
        let made = guest.call(op::MKDIR, dir.id, &[words(&[0o777, 0]), name("new")].concat());
        assert_eq!(made, Err(libc::EROFS));
        let moved = [dir.id.to_le_bytes().to_vec(), name("etc"), name("etc")].concat();
        assert_eq!(guest.call(op::RENAME, ROOT, &moved), Err(libc::EROFS));
        assert_eq!(guest.call(op::STATFS, dir.id, &[]).map(|answer| u32_at(&answer, 40)), Ok(4096));
        assert_eq!(guest.call(op::LISTXATTR, dir.id, &words(&[100, 0])), Ok(vec![]));
        assert_eq!(guest.call(op::GETXATTR, dir.id, &[words(&[9, 0]), name("user.x")].concat()), Err(libc::ENODATA));
        guest.call(op::SYNCFS, dir.id, &[0; 8]).unwrap();
        guest.call(op::FSYNCDIR, dir.id, &Out::default().u64(handle).u64(0).done().0).unwrap();
    }
    // Device nodes are visible, but never opened.
    let dev = guest.lookup(ROOT, "dev").unwrap();
    let null = guest.lookup(dev.id, "null").unwrap();
    assert_eq!(null.mode & libc::S_IFMT, libc::S_IFCHR);
    for flags in [libc::O_RDONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_PATH, libc::O_RDONLY | libc::O_DIRECTORY] {
        assert_eq!(guest.open(null.id, flags), Err(libc::ENXIO));
    }
}

#[test]
fn names_are_made_moved_and_removed() {
    let mut guest = Guest::new("");
    let dir = guest.call(op::MKDIR, ROOT, &[words(&[0o777, 0]), name("dir")].concat()).map(|a| found(&a)).unwrap();
    assert_eq!(dir.mode, libc::S_IFDIR | 0o777);
    let fifo = [words(&[libc::S_IFIFO | 0o622, 0, 0, 0]), name("fifo")].concat();
    let fifo = guest.call(op::MKNOD, dir.id, &fifo).map(|a| found(&a)).unwrap();
    assert_eq!(fifo.mode, libc::S_IFIFO | 0o622);
    assert_eq!(guest.open(fifo.id, libc::O_RDONLY), Err(libc::ENXIO));
    assert_eq!(guest.create(dir.id, "fifo", libc::O_RDONLY, 0o600).unwrap_err(), libc::ENXIO);
    for device in [libc::S_IFCHR | 0o666, libc::S_IFBLK | 0o666] {
        let args = [words(&[device, 0x103, 0, 0]), name("device")].concat();
        assert_eq!(guest.call(op::MKNOD, dir.id, &args), Err(libc::EPERM));
    }
    let link = [name("link"), name("../target of it")].concat();
    let link = guest.call(op::SYMLINK, dir.id, &link).map(|a| found(&a)).unwrap();
    assert_eq!(guest.call(op::READLINK, link.id, &[]).unwrap(), b"../target of it");
    assert!(guest.call(op::READLINK, dir.id, &[]).is_err());
    let (file, handle) = guest.create(ROOT, "file", libc::O_RDWR, 0o600).unwrap();
    let hard = [file.id.to_le_bytes().to_vec(), name("hard")].concat();
    assert_eq!(guest.call(op::LINK, dir.id, &hard).map(|a| found(&a).id), Ok(file.id));
    assert_eq!(fs::metadata(guest.path("dir/hard")).unwrap().nlink(), 2);
    let rename = |to: u64, from: &str, new: &str| [to.to_le_bytes().to_vec(), name(from), name(new)].concat();
    guest.call(op::RENAME, ROOT, &rename(dir.id, "file", "moved")).unwrap();
    let rename2 = |flags: u32, from: &str, new: &str| {
        [ROOT.to_le_bytes().to_vec(), words(&[flags, 0]), name(from), name(new)].concat()
    };
    assert_eq!(guest.call(op::RENAME2, dir.id, &rename2(1, "moved", "dir")), Err(libc::EEXIST));
    assert_eq!(guest.call(op::RENAME2, dir.id, &rename2(0x80, "moved", "x")), Err(libc::EINVAL));
    assert_eq!(guest.call(op::RMDIR, ROOT, &name("dir")), Err(libc::ENOTEMPTY));
    assert_eq!(guest.call(op::UNLINK, ROOT, &name("dir")), Err(libc::EISDIR));
    for text in ["moved", "hard", "link", "fifo"] {
        guest.call(op::UNLINK, dir.id, &name(text)).unwrap();
    }
    guest.call(op::RMDIR, ROOT, &name("dir")).unwrap();
    // An open file works without a name.
    assert_eq!(guest.write(handle, 0, 0, 0, b"still"), Ok(5));
    assert_eq!(guest.read(handle, 0, 10).unwrap(), b"still");
    assert_eq!(guest.getattr(file.id).unwrap().0, 5);
    assert_eq!(fs::read_dir(guest.dir.path()).unwrap().count(), 0);
}

#[test]
fn attributes_are_changed() {
    let mut guest = Guest::new("");
    let (file, handle) = guest.create(ROOT, "file", libc::O_RDWR, 0o644).unwrap();
    guest.setattr(file.id, fattr::MODE, |args| args[68..72].copy_from_slice(&0o100_751u32.to_le_bytes())).unwrap();
    assert_eq!(guest.getattr(file.id).unwrap().1, 0o100_751);
    let size = |size: u64| move |args: &mut Vec<u8>| args[16..24].copy_from_slice(&size.to_le_bytes());
    let answer = guest.setattr(file.id, fattr::SIZE | fattr::KILL_SUIDGID, size(77)).unwrap();
    assert_eq!((answer.len(), attr(&answer[16..]).0), (104, 77));
    let by_handle = move |args: &mut Vec<u8>| {
        size(5)(args);
        args[8..16].copy_from_slice(&handle.to_le_bytes());
    };
    guest.setattr(file.id, fattr::SIZE | fattr::FH, by_handle).unwrap();
    assert_eq!(guest.getattr(file.id).unwrap().0, 5);
    assert_eq!(guest.setattr(file.id, fattr::SIZE | fattr::FH, size(1)), Err(libc::EBADF));
    let times = |args: &mut Vec<u8>| {
        args[32..40].copy_from_slice(&1000u64.to_le_bytes());
        args[40..48].copy_from_slice(&2000u64.to_le_bytes());
        args[56..60].copy_from_slice(&5u32.to_le_bytes());
    };
    guest.setattr(file.id, fattr::ATIME | fattr::MTIME, times).unwrap();
    let meta = fs::metadata(guest.path("file")).unwrap();
    assert_eq!((meta.atime(), meta.atime_nsec(), meta.mtime()), (1000, 5, 2000));
    guest.setattr(file.id, fattr::MTIME | fattr::MTIME_NOW, |_| {}).unwrap();
    let meta = fs::metadata(guest.path("file")).unwrap();
    assert!(meta.atime() == 1000 && meta.mtime() > 1_000_000_000);
    let bad = |args: &mut Vec<u8>| args[56..60].copy_from_slice(&2_000_000_000u32.to_le_bytes());
    assert_eq!(guest.setattr(file.id, fattr::ATIME, bad), Err(libc::EINVAL));
    // Changing the owner to the present one is allowed.
    let own = rustix::process::geteuid().as_raw();
    let owner = |uid: u32| move |args: &mut Vec<u8>| args[76..80].copy_from_slice(&uid.to_le_bytes());
    guest.setattr(file.id, fattr::UID, owner(own)).unwrap();
    guest.setattr(file.id, fattr::UID, owner(u32::MAX)).unwrap();
    let statfs = guest.call(op::STATFS, file.id, &[]).unwrap();
    assert_eq!(statfs.len(), 80);
    assert!(u64_at(&statfs, 0) > 0 && u32_at(&statfs, 44) >= 200);
}

#[test]
fn squashed_files_seem_to_belong_to_one() {
    let mut guest = Guest::new(",squash_uid=4711");
    let (file, _) = guest.create(ROOT, "file", libc::O_RDWR, 0o644).unwrap();
    assert_eq!(file.uid, 4711);
    assert_eq!(guest.getattr(ROOT).unwrap().2, 4711);
    assert_eq!(fs::metadata(guest.path("file")).unwrap().uid(), rustix::process::geteuid().as_raw());
    let owner = |uid: u32| move |args: &mut Vec<u8>| args[76..80].copy_from_slice(&uid.to_le_bytes());
    guest.setattr(file.id, fattr::UID, owner(4711)).unwrap();
    assert_eq!(guest.setattr(file.id, fattr::UID, owner(0)), Err(libc::EPERM));
}

#[test]
fn nothing_changes_in_a_read_only_share() {
    let mut guest = Guest::new(",readonly");
    fs::write(guest.path("file"), "content").unwrap();
    let file = guest.lookup(ROOT, "file").unwrap();
    let handle = guest.open(file.id, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(handle, 0, 100).unwrap(), b"content");
    for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_TRUNC] {
        assert_eq!(guest.open(file.id, flags), Err(libc::EROFS));
    }
    assert_eq!(guest.write(handle, 0, 0, 0, b"x"), Err(libc::EROFS));
    assert_eq!(guest.setattr(file.id, fattr::MODE, |_| {}), Err(libc::EROFS));
    assert_eq!(guest.create(ROOT, "file", libc::O_RDONLY, 0o600).unwrap_err(), libc::EROFS);
    let text = name("new");
    let with = |words: Vec<u8>| [words, text.clone()].concat();
    for (opcode, args) in [
        (op::MKDIR, with(words(&[0o700, 0]))),
        (op::MKNOD, with(words(&[libc::S_IFREG, 0, 0, 0]))),
        (op::SYMLINK, [text.clone(), name("target")].concat()),
        (op::LINK, with(file.id.to_le_bytes().to_vec())),
        (op::UNLINK, name("file")),
        (op::RMDIR, name("file")),
        (op::RENAME, [ROOT.to_le_bytes().to_vec(), name("file"), text.clone()].concat()),
        (op::SETXATTR, [words(&[1, 0, 0, 0]), name("user.x"), b"x".to_vec()].concat()),
        (op::TMPFILE, with(words(&[libc::O_RDWR as u32, 0o600, 0, 0]))),
        (op::REMOVEXATTR, name("user.x")),
        (op::FALLOCATE, vec![0; 32]),
        (op::COPY_FILE_RANGE, vec![0; 56]),
    ] {
        assert_eq!(guest.call(opcode, ROOT, &args), Err(libc::EROFS), "{opcode}");
    }
    // Syncing a read-only share succeeds without being tried. (Trying would fail: a FIFO cannot be opened for it.)
    rustix::fs::mknodat(rustix::fs::CWD, guest.path("fifo"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let fifo = guest.lookup(ROOT, "fifo").unwrap();
    guest.call(op::SYNCFS, fifo.id, &[0; 8]).unwrap();
    guest.call(op::FSYNC, file.id, &Out::default().u64(handle).u64(0).done().0).unwrap();
    fs::remove_file(guest.path("fifo")).unwrap();
    let names: Vec<_> = fs::read_dir(guest.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["file"]);
    assert_eq!(fs::read(guest.path("file")).unwrap(), b"content");
}

#[test]
fn data_is_kept_while_a_file_is_as_it_was() {
    let old = |path: &PathBuf| {
        let file = fs::File::options().write(true).open(path).unwrap();
        file.set_modified(std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000)).unwrap();
    };
    let opened = |guest: &mut Guest, id| u32_at(&guest.call(op::OPEN, id, &words(&[0, 0])).unwrap(), 8);
    let mut guest = Guest::new("");
    fs::write(guest.path("file"), "content").unwrap();
    old(&guest.path("file"));
    let file = guest.lookup(ROOT, "file").unwrap();
    for _ in 0..2 {
        assert_eq!(opened(&mut guest, file.id), 0, "changed a moment ago");
    }
    std::thread::sleep(std::time::Duration::from_millis(1200));
    assert_eq!(opened(&mut guest, file.id), 0);
    assert_eq!(opened(&mut guest, file.id), fopen::KEEP_CACHE);
    fs::write(guest.path("file"), "another").unwrap();
    assert_eq!(opened(&mut guest, file.id), 0);
    for (options, flags) in [(",cache=never", 0), (",cache=always", fopen::KEEP_CACHE)] {
        let mut guest = Guest::new(options);
        fs::write(guest.path("file"), "content").unwrap();
        let file = guest.lookup(ROOT, "file").unwrap();
        assert_eq!(file.valid, if flags == 0 { 0 } else { 86400 });
        for _ in 0..2 {
            assert_eq!(opened(&mut guest, file.id), flags);
        }
    }
}

#[test]
fn descriptors_are_closed_and_opened_again() {
    let mut guest = Guest::new("");
    fs::create_dir(guest.path("dir")).unwrap();
    for n in 0..100 {
        fs::write(guest.path(&format!("dir/{n}")), format!("file {n}")).unwrap();
    }
    guest.server().set_limits(Limits { files: 1000, descriptors: few_descriptors() });
    let dir = guest.lookup(ROOT, "dir").unwrap();
    let open = guest.lookup(dir.id, "0").unwrap();
    let handle = guest.open(open.id, libc::O_RDWR).unwrap();
    let files: Vec<Found> = (0..100).map(|n| guest.lookup(dir.id, &n.to_string()).unwrap()).collect();
    let (known, held, _) = guest.server().counts();
    assert_eq!(known, 102);
    assert!(held <= 18, "{held}");
    for (n, file) in files.iter().enumerate() {
        assert_eq!(guest.getattr(file.id).unwrap().0, 5 + n.to_string().len() as u64);
    }
    assert!(guest.server().counts().1 <= 18);
    // Files that the guest moves are found again, and so are the files in a directory that it moves.
    let rename = [ROOT.to_le_bytes().to_vec(), name("dir"), name("moved")].concat();
    guest.call(op::RENAME, ROOT, &rename).unwrap();
    let rename = [ROOT.to_le_bytes().to_vec(), name("50"), name("here")].concat();
    guest.call(op::RENAME, dir.id, &rename).unwrap();
    for round in 0..2 {
        for file in &files {
            assert!(guest.getattr(file.id).is_ok(), "{round}");
        }
    }
    // A file that the host puts in another's place is not mistaken for it; an open file stays the same.
    fs::rename(guest.path("moved/7"), guest.path("moved/8")).unwrap();
    fs::remove_file(guest.path("moved/0")).unwrap();
    assert!(files[20..60].iter().all(|file| guest.getattr(file.id).is_ok()));
    assert_eq!(guest.getattr(files[8].id), Err(libc::ESTALE));
    assert_eq!(guest.getattr(files[7].id), Err(libc::ESTALE));
    assert_eq!(guest.lookup(dir.id, "8").unwrap().id, files[7].id);
    assert!(guest.getattr(files[7].id).is_ok());
    assert_eq!(guest.getattr(files[0].id).unwrap().0, 6);
    assert_eq!(guest.read(handle, 0, 100).unwrap(), b"file 0");
}

/// A bounded number of files is remembered, however many the guest looks up and never forgets: those it used last.
#[test]
fn what_is_known_is_bounded() {
    let mut guest = Guest::new("");
    (0..300).for_each(|n| fs::write(guest.path(&n.to_string()), "content").unwrap());
    guest.server().set_limits(Limits { files: 100, descriptors: few_descriptors() });
    let open = guest.lookup(ROOT, "0").unwrap();
    let handle = guest.open(open.id, libc::O_RDONLY).unwrap();
    let files: Vec<Found> = (1..300).map(|n| guest.lookup(ROOT, &n.to_string()).unwrap()).collect();
    assert_eq!(guest.server().counts().0, 100);
    assert_eq!(guest.getattr(files[0].id), Err(libc::ESTALE));
    let again = guest.lookup(ROOT, "1").unwrap();
    assert!(again.id > files[298].id, "numbers are not used again");
    assert!(files[230..].iter().all(|file| guest.getattr(file.id).is_ok()));
    // Open files are not forgotten, and the guest may forget files that the device no longer knows.
    assert_eq!(guest.getattr(open.id).unwrap().0, 7);
    assert_eq!(guest.read(handle, 0, 100).unwrap(), b"content");
    files.iter().for_each(|file| guest.forget(file.id, 1));
    assert_eq!(guest.server().counts().0, 3, "the root, the open file, and the file that was looked up again");
    // If all files are open, none can be forgotten to make room.
    guest.server().set_limits(Limits { files: 3, descriptors: few_descriptors() });
    guest.open(again.id, libc::O_RDONLY).unwrap();
    assert_eq!(guest.lookup(ROOT, "7"), Err(libc::ENFILE));
}

/// One of several shares does not take the descriptors of all.
#[test]
fn shares_have_a_budget_together() {
    let budget = Budget::new(8 * 64, 4);
    let mut guests: Vec<Guest> = (0..4).map(|_| Guest::with_budget("", &budget)).collect();
    for guest in &guests {
        (0..200).for_each(|n| fs::write(guest.path(&n.to_string()), "").unwrap());
    }
    for guest in &mut guests {
        for n in 0..200 {
            guest.lookup(ROOT, &n.to_string()).unwrap();
        }
    }
    let held: Vec<usize> = guests.iter().map(|guest| guest.server().counts().1).collect();
    assert!(held.iter().sum::<usize>() <= 64 + 3 * 16 && held[1..].iter().all(|held| *held >= 14), "{held:?}");
    // The first share took too many while it was alone; it gives some back when it works again.
    for n in 0..200 {
        guests[0].lookup(ROOT, &n.to_string()).unwrap();
    }
    assert!(guests[0].server().counts().1 <= 18, "{}", guests[0].server().counts().1);
    // Open files are limited in the same way.
    let mut opened = Vec::new();
    for guest in &mut guests {
        let file = guest.lookup(ROOT, "0").unwrap();
        opened.push((0..100).take_while(|_| guest.open(file.id, libc::O_RDONLY).is_ok()).count());
    }
    assert_eq!(opened, [64, 16, 16, 16]);
}

#[test]
fn files_outlive_a_pause_but_no_reset() {
    let mut guest = Guest::new("");
    let (file, handle) = guest.create(ROOT, "file", libc::O_RDWR, 0o644).unwrap();
    guest.write(handle, 0, 0, 0, b"content").unwrap();
    guest.wire.drain(&mut *guest.handler, &mut guest.queues).unwrap();
    guest.driver = FakeQueue::new(&guest.ram, 0x1000, SIZE);
    (guest.handler, guest.queues) = Guest::activate(&mut guest.device, &guest.ram, &guest.wire, &guest.driver);
    assert_eq!(guest.read(handle, 0, 100).unwrap(), b"content");
    assert_eq!(guest.getattr(file.id).unwrap().0, 7);
    guest.device.reset();
    assert_eq!(guest.getattr(file.id), Err(libc::ENOTCONN));
    guest.call(op::INIT, 0, &words(&[7, 38, 0, u32::MAX])).unwrap();
    assert_eq!(guest.getattr(file.id), Err(libc::ESTALE));
    assert_eq!(guest.read(handle, 0, 100), Err(libc::EBADF));
    assert_eq!(guest.server().counts(), (1, 0, 0));
}

/// Another device on the same folder takes over the saved state.
#[test]
fn files_are_saved_by_name() {
    let mut guest = Guest::new("");
    fs::create_dir(guest.path("dir")).unwrap();
    let dir = guest.lookup(ROOT, "dir").unwrap();
    let (file, handle) = guest.create(dir.id, "file", libc::O_RDWR, 0o644).unwrap();
    guest.write(handle, 0, 0, 0, b"content").unwrap();
    let (gone, gone_handle) = guest.create(dir.id, "gone", libc::O_RDWR, 0o644).unwrap();
    guest.call(op::UNLINK, dir.id, &name("gone")).unwrap();
    let reading = guest.open(file.id, libc::O_RDONLY).unwrap();
    let listing = u64_at(&guest.call(op::OPENDIR, dir.id, &words(&[0, 0])).unwrap(), 0);
    let state = guest.device.save().unwrap();
    let state: serde_json::Value = serde_json::from_str(&state.to_string()).unwrap();

    let config: FsConfig = guest.dir.path().display().to_string().parse().unwrap();
    guest.device = Fs::new(0, &config, &budget(1)).unwrap();
    guest.device.restore(&state).unwrap();
    guest.driver = FakeQueue::new(&guest.ram, 0x1000, SIZE);
    (guest.handler, guest.queues) = Guest::activate(&mut guest.device, &guest.ram, &guest.wire, &guest.driver);
    assert_eq!(guest.read(handle, 0, 100).unwrap(), b"content");
    assert_eq!(guest.write(handle, 0, 0, 0, b"C"), Ok(1));
    assert_eq!(guest.write(reading, 0, 0, 0, b"C"), Err(libc::EBADF));
    assert_eq!(guest.getattr(file.id).unwrap().0, 7);
    assert_eq!(guest.lookup(ROOT, "dir").unwrap().id, dir.id);
    assert_eq!(guest.lookup(dir.id, "file").unwrap().id, file.id);
    assert_eq!(guest.list(listing, op::READDIR, dir.id, 4096).len(), 3);
    assert_eq!(guest.getattr(gone.id), Err(libc::ESTALE));
    assert_eq!(guest.read(gone_handle, 0, 100), Err(libc::EBADF));
    let (new, new_handle) = guest.create(ROOT, "new", libc::O_RDWR, 0o644).unwrap();
    assert!(new.id > gone.id && new_handle > listing);

    // Invalid states.
    let broken = |change: fn(&mut serde_json::Value)| {
        let mut state = state.clone();
        change(&mut state["mounted"]);
        let mut device = Fs::new(0, &config, &budget(1)).unwrap();
        device.restore(&state).unwrap_err().to_string()
    };
    let text = broken(|state| state["files"][0]["name"] = serde_json::json!(b"../x".as_slice()));
    assert!(text.starts_with("the saved state of share0 has an invalid file "), "{text}");
    assert!(broken(|state| state["files"][0]["name"] = serde_json::json!([0])).contains("invalid file"));
    assert!(broken(|state| state["files"][0]["id"] = 1.into()).contains("has an invalid file 1"));
    assert!(broken(|state| state["files"][0]["id"] = u64::MAX.into()).contains("invalid file"));
    assert!(broken(|state| state["next_handle"] = 1.into()).contains("open, but the next handle is 1"));
    assert!(broken(|state| state["x"] = 1.into()).contains("is broken"));
    // A file that is its own parent cannot be found.
    let mut circle = state.clone();
    for file in circle["mounted"]["files"].as_array_mut().unwrap() {
        file["parent"] = file["id"].clone();
    }
    guest.device.reset();
    guest.device.restore(&circle).unwrap();
    assert_eq!(guest.getattr(file.id), Err(libc::ESTALE));
}

#[test]
fn extended_attributes() {
    let mut guest = Guest::new("");
    let (file, _) = guest.create(ROOT, "file", libc::O_RDWR, 0o644).unwrap();
    let set = |len: u32, key: &str| [words(&[len, 0, 0, 0]), name(key), b"value".to_vec()].concat();
    let get = |size: u32, key: &str| [words(&[size, 0]), name(key)].concat();
    assert_eq!(guest.call(op::SETXATTR, file.id, &set(5, "security.ima")), Err(libc::EOPNOTSUPP));
    assert_eq!(guest.call(op::SETXATTR, file.id, &set(6, "user.x")), Err(libc::EINVAL), "more than there is");
    if guest.call(op::SETXATTR, file.id, &set(5, "user.x")) == Err(libc::EOPNOTSUPP) {
        return; // not on this file system
    }
    assert_eq!(guest.call(op::GETXATTR, file.id, &get(0, "user.x")).map(|a| u32_at(&a, 0)), Ok(5));
    assert_eq!(guest.call(op::GETXATTR, file.id, &get(u32::MAX, "user.x")).unwrap(), b"value");
    assert_eq!(guest.call(op::GETXATTR, file.id, &get(4, "user.x")), Err(libc::ERANGE));
    assert_eq!(guest.call(op::LISTXATTR, file.id, &words(&[0, 0])).map(|a| u32_at(&a, 0)), Ok(7));
    assert_eq!(guest.call(op::LISTXATTR, file.id, &words(&[6, 0])), Err(libc::ERANGE));
    assert_eq!(guest.call(op::LISTXATTR, file.id, &words(&[100, 0])).unwrap(), b"user.x\0");
    guest.call(op::REMOVEXATTR, file.id, &name("user.x")).unwrap();
    assert_eq!(guest.call(op::GETXATTR, file.id, &get(100, "user.x")), Err(libc::ENODATA));
}

/// A file without a name can be used and can get a name; while it has none it is not saved.
#[test]
fn a_file_without_a_name() {
    let mut guest = Guest::new("");
    let tmpfile = |flags: i32, mode: u32| [words(&[flags as u32, mode, 0o022, 0]), name("ignored")].concat();
    let made = guest.call(op::TMPFILE, ROOT, &tmpfile(libc::O_RDWR, libc::S_IFREG | 0o666));
    let (file, handle) = match made {
        Err(libc::EOPNOTSUPP) => return, // not on this file system
        made => made.map(|answer| (found(&answer), u64_at(&answer, 128))).unwrap(),
    };
    assert_eq!(file.mode, libc::S_IFREG | 0o644);
    assert_eq!(fs::read_dir(guest.dir.path()).unwrap().count(), 0);
    assert_eq!(guest.write(handle, 0, 0, 0, b"content"), Ok(7));
    assert_eq!(guest.read(handle, 0, 100).unwrap(), b"content");
    assert_eq!(guest.device.save().unwrap()["mounted"]["files"].as_array().unwrap().len(), 0);
    let link = |to: &str| [file.id.to_le_bytes().to_vec(), name(to)].concat();
    assert_eq!(guest.call(op::LINK, ROOT, &link("named")).map(|answer| found(&answer).id), Ok(file.id));
    assert_eq!(fs::read(guest.path("named")).unwrap(), b"content");
    assert_eq!(guest.device.save().unwrap()["mounted"]["files"].as_array().unwrap().len(), 1);
    // A file that must not get a name.
    let made = guest.call(op::TMPFILE, ROOT, &tmpfile(libc::O_WRONLY | libc::O_EXCL, 0o600)).unwrap();
    assert_eq!(guest.call(op::LINK, ROOT, &[&made[..8], &name("other")].concat()), Err(libc::ENOENT));
    assert_eq!(guest.call(op::TMPFILE, ROOT, &tmpfile(libc::O_RDONLY, 0o600)), Err(libc::EINVAL));
    assert_eq!(guest.call(op::TMPFILE, file.id, &tmpfile(libc::O_RDWR, 0o600)), Err(libc::ENOTDIR));
}

#[test]
fn the_time_of_birth() {
    let mut guest = Guest::new("");
    let (file, handle) = guest.create(ROOT, "file", libc::O_RDWR, 0o640).unwrap();
    guest.write(handle, 0, 0, 0, b"content").unwrap();
    let statx = |flags: u32, handle: u64| Out::default().u32(flags).u32(0).u64(handle).u32(0).u32(0xFFF).done().0;
    let by_node = guest.call(op::STATX, file.id, &statx(0, 0)).unwrap();
    let by_handle = guest.call(op::STATX, file.id, &statx(1, handle)).unwrap();
    assert_eq!((by_node.len(), &by_node), (32 + 256, &by_handle));
    let metadata = fs::metadata(guest.path("file")).unwrap();
    let stat = &by_node[32..];
    assert_eq!((u64_at(stat, 32), u64_at(stat, 40), u32_at(stat, 28)), (metadata.ino(), 7, libc::S_IFREG | 0o640));
    assert_eq!(u64_at(stat, 112), metadata.mtime() as u64);
    match metadata.created() {
        Ok(created) => {
            let since = created.duration_since(std::time::UNIX_EPOCH).unwrap();
            assert_eq!(
                (u32_at(stat, 0), u64_at(stat, 80), u32_at(stat, 88)),
                (0xFFF, since.as_secs(), since.subsec_nanos())
            );
        }
        Err(_) => assert_eq!(u32_at(stat, 0), 0x7FF),
    }
    assert_eq!(guest.call(op::STATX, file.id, &statx(1, 99)), Err(libc::EBADF));
    assert_eq!(guest.call(op::STATX, file.id, &[]), Err(libc::EINVAL));
}

/// The host keeps access control lists; a directory's default list replaces the umask.
#[test]
fn access_control_lists() {
    const DEFAULT: &str = "system.posix_acl_default";
    // Version 2; then the entries of user, group and others: tag, permissions, ID.
    let entry = |tag: u16, bits: u16| [&tag.to_le_bytes()[..], &bits.to_le_bytes(), &u32::MAX.to_le_bytes()].concat();
    let list = [2u32.to_le_bytes().to_vec(), entry(1, 7), entry(4, 7), entry(32, 0)].concat();
    let set = |key: &str| [words(&[list.len() as u32, 0, 1, 0]), name(key), list.clone()].concat();
    let get = |key: &str| [words(&[100, 0]), name(key)].concat();
    let mut guest = Guest::new("");
    let make = |guest: &mut Guest, dir, text: &str| {
        let args = [words(&[0o777, 0o022]), name(text)].concat();
        guest.call(op::MKDIR, dir, &args).map(|answer| found(&answer)).unwrap()
    };
    if !passthrough::has_own_umask() {
        return; // not in this container
    }
    let dir = make(&mut guest, ROOT, "dir");
    assert_eq!(dir.mode, libc::S_IFDIR | 0o755, "the umask of the guest's process");
    if guest.call(op::SETXATTR, dir.id, &set(DEFAULT)) == Err(libc::EOPNOTSUPP) {
        return; // not on this file system
    }
    assert_eq!(guest.call(op::GETXATTR, dir.id, &get(DEFAULT)).unwrap(), list);
    assert_eq!(guest.call(op::LISTXATTR, dir.id, &words(&[100, 0])).unwrap(), name(DEFAULT));
    assert_eq!(make(&mut guest, dir.id, "in").mode, libc::S_IFDIR | 0o770, "the list");
    guest.call(op::REMOVEXATTR, dir.id, &name(DEFAULT)).unwrap();
    assert_eq!(make(&mut guest, dir.id, "after").mode, libc::S_IFDIR | 0o755);
    // The features agreed on survive a restore.
    let state = guest.device.save().unwrap();
    assert_eq!((&state["mounted"]["access_lists"], &state["mounted"]["setxattr_flags"]), (&true.into(), &true.into()));
    // Lists are not offered with squashed owners, below an overlay, or to a guest that does not ask for them.
    for options in [",squash_uid=5", ",flat"] {
        let mut guest = Guest::new(options);
        assert_eq!(guest.call(op::SETXATTR, ROOT, &set(DEFAULT)), Err(libc::EOPNOTSUPP), "{options}");
    }
}

#[test]
fn urgent_requests_and_several_queues_are_served_alike() {
    let mut guest = Guest::new(",queues=2");
    fs::write(guest.path("file"), "").unwrap();
    let file = guest.lookup(ROOT, "file").unwrap();
    let ram = guest.ram.clone();
    let mut urgent = FakeQueue::new(&ram, 0x4000, SIZE);
    let (features, kicks) = (RING_FEATURES, vec![].into());
    let queues = vec![urgent.device(features), guest.driver.device(features), Queue::disabled(2, guest.driver.state())];
    let activation = Activation { ram, features, queues, kicks, interrupt: guest.wire.interrupt.clone() };
    let Ok(Activated::Here(mut shares)) = guest.device.activate(activation) else { panic!("it does not start") };
    assert_eq!(shares.len(), 3);
    let request = [header(IN_HEADER + 8, op::FORGET, file.id), 1u64.to_le_bytes().to_vec()].concat();
    guest.ram.write(REQUEST, &request).unwrap();
    urgent.add(&[out(REQUEST, request.len() as u32)]).unwrap();
    let Share { handler, queues } = &mut shares[0];
    guest.wire.deliver(&mut **handler, queues, Event::Kick(0)).unwrap();
    assert_eq!(urgent.take_used().unwrap().1, 0);
    assert_eq!(guest.server().counts().0, 1);
}

/// Generates a request: mostly a plausible one, from a guest that knows some files and has some open.
fn request() -> impl Strategy<Value = (u32, u64, Vec<u8>)> {
    let opcode = prop_oneof![12 => 1..54u32, 1 => any::<u32>()];
    let id = || prop_oneof![8 => 0..12u64, 1 => any::<u64>()];
    let text = prop_oneof![
        6 => prop::sample::select(vec!["a", "b", "c", "dir", "link"]).prop_map(name),
        1 => prop::sample::select(vec!["", ".", "..", "../outside", "a/b", "/"]).prop_map(name),
        1 => prop::collection::vec(any::<u8>(), 0..20),
    ];
    let word = || prop_oneof![4 => Just(0u64), 4 => 0..0x1000u64, 2 => 0..(1u64 << 33), 1 => any::<u64>()];
    (opcode, id(), prop::collection::vec(word(), 0..12), id(), text).prop_map(
        |(opcode, nodeid, words, handle, text)| {
            let mut args: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            // The place of the handle in most requests.
            if let Some(first) = args.first_chunk_mut() {
                *first = if (14..48).contains(&opcode) { handle.to_le_bytes() } else { words[0].to_le_bytes() };
            }
            let fixed = match opcode {
                op::MKNOD | op::CREATE | op::TMPFILE | op::RENAME2 | op::SETXATTR => 16,
                op::MKDIR | op::RENAME | op::LINK | op::GETXATTR => 8,
                op::LOOKUP | op::UNLINK | op::RMDIR | op::SYMLINK | op::REMOVEXATTR => 0,
                _ => return (opcode, nodeid, args),
            };
            args.resize(fixed, 0);
            let twice = [text.clone(), text].concat();
            (opcode, nodeid, [args, twice].concat())
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Every request is answered, and nothing outside the folder changes.
    #[test]
    fn any_request_is_answered(
        requests in prop::collection::vec(request(), 1..60),
        flips in prop::collection::vec((0..60usize, 0..100usize, 0..8u8), 0..3),
    ) {
        let mut guest = Guest::before_init("/share");
        guest.call(op::INIT, 0, &words(&[7, 38, 0, u32::MAX])).unwrap();
        let outside = guest.path("outside");
        fs::write(&outside, "untouched").unwrap();
        fs::set_permissions(&outside, fs::Permissions::from_mode(0o640)).unwrap();
        guest.create(ROOT, "a", libc::O_RDWR, 0o600).unwrap();
        guest.call(op::MKDIR, ROOT, &[words(&[0o700, 0]), name("dir")].concat()).unwrap();
        guest.call(op::SYMLINK, ROOT, &[name("link"), name("../outside")].concat()).unwrap();
        for (i, (opcode, nodeid, args)) in requests.iter().enumerate() {
            let mut message = [header(IN_HEADER + args.len(), *opcode, *nodeid), args.clone()].concat();
            for &(which, at, bit) in &flips {
                if which == i && let Some(byte) = message.get_mut(at) {
                    *byte ^= 1 << bit;
                }
            }
            // A sparse file of any size does no harm, but FALLOCATE would really fill the disk, and SYNCFS would delay
            // other processes.
            if [op::FALLOCATE, op::SYNCFS].contains(&u32_at(&message, 4)) {
                continue;
            }
            let answered = guest.raw(&message, &[inn(ANSWER, 5000)]).unwrap();
            prop_assert!(answered == 0 || (16..=5000).contains(&answered));
        }
        prop_assert_eq!(fs::read(&outside).unwrap(), b"untouched");
        let meta = fs::metadata(&outside).unwrap();
        prop_assert_eq!((meta.permissions().mode() & 0o7777, meta.nlink()), (0o640, 1));
        prop_assert_eq!(fs::read_dir(guest.dir.path()).unwrap().count(), 2);
    }
}
