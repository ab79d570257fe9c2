//! The initramfs that is packed for a guest as an [`Archive`]: whatever `--init`, `--busybox`, `--initramfs-dir`,
//! `--file` and `--module` ask for.
//!
//! The guest's first program is checked before it is packed. A program that could not start in the guest (built for
//! another machine, dynamically linked without its libraries, or a script whose interpreter was not packed) is refused,
//! because the guest's kernel would only report it as a panic.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::error::Problem;
use super::image::Image;
use super::initramfs::{self, Archive, HostFile, Piece};
use super::modules::{self, ModulesConfig};
use super::source::Data;
use super::{BootConfig, elf};
use crate::backend::unix::make_room_for_descriptors;

/// Path of the guest's list of modules: one path per line, in load order.
pub const MODULE_LIST: &str = "/vireo/modules";
/// Applets of a busybox that does not list them.
const APPLETS: &str = "ash awk cat chmod chroot cp cut date dd df dmesg echo env false find free grep head hostname \
                       ifconfig insmod ip kill less ln ls lsmod mkdir mknod mktemp modprobe more mount mv nc od ping \
                       poweroff printf ps pwd reboot rm rmdir rmmod route sed seq setsid sh sleep sort stat stty sync \
                       tail tar tee test touch tr true udhcpc umount uname vi wc which xargs yes";
/// Limit on the bytes of a busybox that are searched for its applets' names. A static one has 2 MiB.
const BUSYBOX_MAX: u64 = 16 << 20;
/// Longest name of an applet.
const APPLET_MAX: usize = 32;
/// Minimum number of [`APPLETS`] in a list of names that is accepted as the applets'.
const APPLETS_KNOWN: usize = 8;
/// Length of a script's first line that the kernel reads (BINPRM_BUF_SIZE).
const SCRIPT_HEAD: u64 = 256;

/// Content that is packed after the initrds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct InitramfsConfig {
    /// Program that becomes `/init`: a static executable or a script.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<PathBuf>,
    /// A static busybox for `/bin`, with its applets; a name without a slash is searched for in PATH and `/bin`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub busybox: Option<PathBuf>,
    /// Folders whose content goes into the root directory.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub dirs: Vec<PathBuf>,
    /// Single files.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<FileConfig>,
    /// Kernel modules.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub modules: Option<ModulesConfig>,
}

/// `--file HOST:GUEST`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileConfig {
    /// The file on the host.
    pub host: PathBuf,
    /// The file's path in the guest.
    pub guest: PathBuf,
}

impl FromStr for FileConfig {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.rsplit_once(':') {
            Some((host, guest)) if !host.is_empty() && guest.starts_with('/') => {
                Ok(FileConfig { host: host.into(), guest: guest.into() })
            }
            _ => Err("expected HOST:GUEST, with an absolute path for the guest"),
        }
    }
}

/// Reasons why an initramfs cannot be packed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be added.
    #[error(transparent)]
    Archive(#[from] initramfs::Error),
    /// The kernel modules cannot be added.
    #[error(transparent)]
    Modules(#[from] modules::Error),
    /// The first program could not start in the guest.
    #[error("{} cannot be the guest's init: {what}", path.display())]
    Init {
        /// Path of the program.
        path: PathBuf,
        /// Reason why it could not start.
        what: String,
    },
    /// No busybox was found, or none that works.
    #[error("--busybox: {0}")]
    Busybox(String),
}

/// Opens everything that `config` names for the kernel `image`, and packs it.
pub fn pack(boot: &BootConfig, config: &InitramfsConfig, image: &Image) -> Result<Vec<Piece>, Error> {
    make_room_for_descriptors(4096);
    let mut archive = Archive::new();
    for dir in &config.dirs {
        archive.tree(dir, Path::new("/"))?;
    }
    if config.init.is_some() || !config.dirs.is_empty() {
        base(&mut archive)?;
    }
    if let Some(path) = &config.busybox {
        busybox(&mut archive, path)?;
    }
    if let Some(modules) = &config.modules {
        add_modules(&mut archive, modules::find(modules, &boot.kernel, image)?)?;
    }
    for FileConfig { host, guest } in &config.files {
        let file = open(host)?;
        let mode = mode(&file);
        archive.file(guest, mode, file)?;
    }
    if let Some(path) = &config.init {
        let file = open(path)?;
        // The content of initrds is not known, so with an initrd any path may exist.
        let has = |path: &Path| !boot.initrd.is_empty() || archive.contains(path);
        check_init(&file, has).map_err(|what| Error::Init { path: path.clone(), what })?;
        archive.file(Path::new("/init"), 0o755, file)?;
    }
    Ok(archive.finish()?)
}

fn open(path: &Path) -> Result<HostFile, Error> {
    Ok(HostFile::open(path).map_err(|source| initramfs::Error::Host { path: path.into(), source })?)
}

fn mode(file: &HostFile) -> u32 {
    use std::os::unix::fs::MetadataExt;
    file.file.metadata().map_or(0o644, |metadata| metadata.mode() & 0o777)
}

/// Adds the basics that every first program needs: a console to write to, and mount points.
fn base(archive: &mut Archive) -> Result<(), Error> {
    for dir in ["/dev", "/proc", "/sys"] {
        archive.directory(Path::new(dir), 0o755)?;
    }
    for (path, mode, device) in [("/dev/console", 0o600, (5, 1)), ("/dev/null", 0o666, (1, 3))] {
        if !archive.contains(Path::new(path)) {
            archive.device(Path::new(path), libc::S_IFCHR | mode, device)?;
        }
    }
    Ok(())
}

fn add_modules(archive: &mut Archive, modules: Vec<modules::Module>) -> Result<(), Error> {
    let mut list = String::new();
    for module in modules {
        list.push_str(&module.guest);
        list.push('\n');
        let guest = Path::new(&module.guest);
        match module.data {
            Data::Memory(bytes) => archive.bytes(guest, 0o644, &bytes)?,
            Data::Pages(pages) => archive.bytes(guest, 0o644, &pages)?,
            Data::File(file, len) => archive.file(guest, 0o644, HostFile { file, len, path: module.host })?,
        }
    }
    Ok(archive.bytes(Path::new(MODULE_LIST), 0o644, list.as_bytes())?)
}

/// Adds the busybox, and a link for each applet whose name is free.
fn busybox(archive: &mut Archive, path: &Path) -> Result<(), Error> {
    let path = find_busybox(path).ok_or_else(|| {
        Error::Busybox(format!("there is no {} in PATH; install busybox-static, or name a file", path.display()))
    })?;
    let file = open(&path)?;
    let refused = |what: &str| Error::Busybox(format!("{} {what}", path.display()));
    match program(&file) {
        Ok(Program::Static) => {}
        Ok(Program::Dynamic(_)) => {
            return Err(refused("is linked dynamically; a static one is needed (Debian's package busybox-static)"));
        }
        Ok(Program::Script(_)) => return Err(refused("is a script")),
        Err(what) => return Err(refused(&what)),
    }
    let data = Data::File(file.file.try_clone().map_err(|e| refused(&e.to_string()))?, file.len);
    let content = data.head(BUSYBOX_MAX).map_err(|e| refused(&e.to_string()))?;
    archive.file(Path::new("/bin/busybox"), 0o755, file)?;
    for applet in applets(&content).iter().filter(|name| **name != b"busybox") {
        let link = Path::new("/bin").join(std::ffi::OsStr::from_bytes(applet));
        if !archive.contains(&link) {
            archive.symlink(&link, Path::new("busybox"))?;
        }
    }
    // Scripts everywhere begin with `#!/usr/bin/env`.
    let env = Path::new("/usr/bin/env");
    if archive.contains(env) { Ok(()) } else { Ok(archive.symlink(env, Path::new("/bin/busybox"))?) }
}

/// Returns the file that `--busybox` means. A name without a slash is searched in PATH.
pub fn find_busybox(name: &Path) -> Option<PathBuf> {
    if name.as_os_str().as_bytes().contains(&b'/') {
        return Some(name.into());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let candidates = std::env::split_paths(&path).chain(["/bin".into(), "/usr/bin".into()]);
    let mut candidates = candidates.map(|dir: PathBuf| dir.join(name));
    candidates.find(|path| path.is_file())
}

/// Returns the names of a busybox's applets. vireo never runs a program to pack on the host, so it searches the file for the
/// table `applet_names`, which is a sorted sequence of strings. Without such a table it returns the usual applets.
fn applets(content: &[u8]) -> Vec<&[u8]> {
    let plain = |name: &[u8]| {
        (1..=APPLET_MAX).contains(&name.len())
            && name[0] != b'.'
            && name.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-+[".contains(b))
    };
    let (mut longest, mut run) = (Vec::new(), Vec::new());
    // The empty string at the end ends the last sequence.
    for text in content.split(|b| *b == 0).chain([&b""[..]]) {
        if !plain(text) || run.last().is_some_and(|last| *last >= text) {
            if run.len() > longest.len() {
                std::mem::swap(&mut longest, &mut run);
            }
            run.clear();
        }
        if plain(text) {
            run.push(text);
        }
    }
    let usual = APPLETS.split_ascii_whitespace().map(str::as_bytes);
    let known = usual.clone().filter(|name| longest.binary_search(name).is_ok()).count();
    if known < APPLETS_KNOWN { usual.collect() } else { longest }
}

/// Kind of a program.
enum Program {
    Static,
    /// Dynamically linked, with the loader that starts it.
    Dynamic(PathBuf),
    /// A script, with the interpreter after `#!`.
    Script(PathBuf),
}

fn program(file: &HostFile) -> Result<Program, String> {
    let cannot = |e: Problem| e.to_string();
    let data = Data::File(file.file.try_clone().map_err(|e| e.to_string())?, file.len);
    let head = data.head(SCRIPT_HEAD).map_err(cannot)?;
    if let Some(line) = head.strip_prefix(b"#!") {
        let line = line.split(|b| *b == b'\n').next().unwrap_or_default().trim_ascii();
        let interpreter = line.split(|b| matches!(b, b' ' | b'\t')).next().unwrap_or_default();
        if !interpreter.is_empty() {
            return Ok(Program::Script(std::ffi::OsStr::from_bytes(interpreter).into()));
        }
    }
    if !elf::is_elf(&head) {
        return Err("it is neither an ELF program nor a script that begins with #!".into());
    }
    match elf::interpreter(&data) {
        Ok(Some(loader)) => Ok(Program::Dynamic(std::ffi::OsStr::from_bytes(&loader).into())),
        Ok(None) => Ok(Program::Static),
        Err(Problem::NotAKernel(found)) => Err(format!("it is {found}; guests run x86-64 programs")),
        Err(e) => Err(cannot(e)),
    }
}

/// Fails with advice unless the guest could start this program. `has` returns whether a path will exist in the guest.
fn check_init(file: &HostFile, has: impl Fn(&Path) -> bool) -> Result<(), String> {
    match program(file)? {
        Program::Dynamic(loader) if !has(&loader) => Err(format!(
            "it is linked dynamically and needs {}, which is not in the initramfs; link it statically (cc -static), or \
             add its libraries with --initramfs-dir",
            loader.display()
        )),
        Program::Script(interpreter) if !has(&interpreter) => Err(format!(
            "it is a script for {}, which is not in the initramfs; --busybox adds /bin/sh, --initramfs-dir any other",
            interpreter.display()
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{self, Files};
    use super::*;

    fn refusal(files: &Files, content: &[u8], prepare: impl FnOnce(&mut Archive)) -> String {
        let file = HostFile::open(&files.write("init", content)).unwrap();
        let mut archive = Archive::new();
        prepare(&mut archive);
        check_init(&file, |path| archive.contains(path)).err().unwrap_or_default()
    }

    /// Returns a program with a loader, or without.
    fn program(loader: Option<&[u8]>) -> Vec<u8> {
        let mut bytes = testing::elf64(0, &[], &[]);
        if let Some(loader) = loader {
            // The file's only program header becomes a PT_INTERP.
            bytes[64..68].copy_from_slice(&3u32.to_le_bytes());
            bytes[72..80].copy_from_slice(&120u64.to_le_bytes());
            bytes[96..104].copy_from_slice(&(loader.len() as u64).to_le_bytes());
            bytes.truncate(120);
            bytes.extend(loader);
        }
        bytes
    }

    #[test]
    fn programs_that_could_not_start_are_refused_with_what_helps() {
        let files = Files::new();
        let shell = |archive: &mut Archive| archive.bytes(Path::new("/bin/sh"), 0o755, b"").unwrap();
        assert_eq!(refusal(&files, &program(None), |_| ()), "");
        let loader = b"/lib64/ld-linux-x86-64.so.2\0";
        let said = refusal(&files, &program(Some(loader)), |_| ());
        assert!(
            said.starts_with("it is linked dynamically and needs /lib64/ld-linux-x86-64.so.2, which is not"),
            "{said}"
        );
        let merged = |archive: &mut Archive| {
            archive.symlink(Path::new("/lib64"), Path::new("usr/lib64")).unwrap();
            archive.bytes(Path::new("/usr/lib64/ld-linux-x86-64.so.2"), 0o755, b"").unwrap();
        };
        assert_eq!(refusal(&files, &program(Some(loader)), merged), "");
        for line in ["#!/bin/sh\n", "#! /bin/sh -e\necho", "#!/bin/sh"] {
            assert_eq!(refusal(&files, line.as_bytes(), shell), "");
            let said = refusal(&files, line.as_bytes(), |_| ());
            assert!(said.starts_with("it is a script for /bin/sh, which is not in the initramfs; --busybox"), "{said}");
        }
        let mut foreign = program(None);
        foreign[18] = 183;
        assert_eq!(refusal(&files, &foreign, |_| ()), "it is an ELF file for arm64; guests run x86-64 programs");
        for nothing in [&b""[..], b"#!\n", b"echo"] {
            assert!(refusal(&files, nothing, shell).starts_with("it is neither an ELF program nor a script"));
        }
        assert!(refusal(&files, &program(Some(loader))[..70], shell).starts_with("truncated: "));
    }

    #[test]
    fn busybox_brings_its_applets_where_names_are_free() {
        let mut archive = Archive::new();
        archive.bytes(Path::new("/usr/bin/ls"), 0o755, b"other").unwrap();
        archive.symlink(Path::new("/bin"), Path::new("usr/bin")).unwrap();
        busybox(&mut archive, Path::new("busybox")).unwrap();
        // The busybox of the tests can be trusted to list its applets.
        let listed = std::process::Command::new("busybox").arg("--list").output().unwrap().stdout;
        let listed = String::from_utf8(listed).unwrap();
        let content = std::fs::read(find_busybox(Path::new("busybox")).unwrap()).unwrap();
        assert_eq!(applets(&content), listed.lines().map(str::as_bytes).collect::<Vec<_>>());
        assert!(listed.lines().all(|name| archive.contains(&Path::new("/bin").join(name))));
        for name in ["/bin/busybox", "/bin/sh", "/bin/ls", "/usr/bin/env"] {
            assert!(archive.contains(Path::new(name)), "{name}");
        }
        let files = Files::new();
        let mut said = |path: &Path| busybox(&mut archive, path).unwrap_err().to_string();
        let dynamic = program(Some(b"/lib/ld.so\0"));
        assert!(said(&files.write("dynamic", &dynamic)).contains("is linked dynamically; a static one is needed"));
        assert!(said(&files.write("script", b"#!/bin/sh\n")).ends_with("/script is a script"));
        assert!(said(Path::new("no-such-box")).starts_with("--busybox: there is no no-such-box in PATH; install"));
        assert!(said(&files.path("gone")).starts_with("cannot pack "));
    }

    #[test]
    fn applets_are_read_and_not_asked_for() {
        let files = Files::new();
        let mut bytes = program(None);
        bytes.extend(b"zz\0ok\0.\0..\0[\0[[\0ash\0cat\0cp\0dd\0ip\0ls\0mount\0sh\0test.1\0Usage\0vi\0\0yes");
        let listed = applets(&bytes);
        let names: [&[u8]; 11] = [b"[", b"[[", b"ash", b"cat", b"cp", b"dd", b"ip", b"ls", b"mount", b"sh", b"test.1"];
        assert_eq!(listed, names);
        let mut archive = Archive::new();
        busybox(&mut archive, &files.write("box", &bytes)).unwrap();
        assert!(archive.contains(Path::new("/bin/test.1")) && !archive.contains(Path::new("/bin/vi")));
        // Files with another list, or without one.
        for other in [&b"a\0b\0c\0d\0e\0f\0g\0h\0i\0"[..], b"", &[0; 100], &[b'a'; 100]] {
            let usual = applets(other);
            assert!(usual.contains(&&b"sh"[..]) && usual.len() > 50, "{usual:?}");
        }
    }

    #[test]
    fn files_are_named_here_and_there() {
        let parsed = |text: &str| text.parse::<FileConfig>().map(|f| (f.host, f.guest));
        assert_eq!(parsed("a:b:/etc/c"), Ok(("a:b".into(), "/etc/c".into())));
        for bad in ["", "a", "a:", ":/b", "a:b"] {
            assert!(parsed(bad).is_err(), "{bad}");
        }
    }
}
