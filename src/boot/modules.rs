//! Selection of the kernel modules that a guest needs, and their files on the host.
//!
//! ```text
//! names ── modules.dep (or, in an unpacked package, each module's .modinfo) ──> files in load order
//!   └────── modules.builtin, or else the kernel image itself ──> nothing to pack
//! ```
//!
//! A kernel only accepts modules of its own version, so modules of that version are searched for: first beside the
//! kernel's file, then among the host's own. None of the files is trusted: texts, modules and the depth of dependencies
//! are bounded.

mod directory;

use std::cell::OnceCell;
use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::File;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::Problem;
use super::image::Image;
use super::source::Data;
use super::unpack::{self, Compression};
use super::{elf, kernel};
use crate::options::Size;
use directory::{Directory, describe, first, places, walk};

pub use directory::above;

/// Largest text file of a modules directory. Distributions' files have 2 MiB.
const TEXT_MAX: u64 = 16 << 20;
/// Largest module, unpacked.
const MODULE_MAX: u64 = 128 << 20;
/// Limit on the sum of the unpacked modules, more than all of any kernel's: unpacked modules are held in memory.
const MODULES_LEN_MAX: u64 = 2 << 30;
/// Largest number of modules that are packed.
const MODULES_MAX: usize = 20_000;
/// Largest number of modules that are searched for ciphers and checksums. Kernels have less than 200.
const CRYPTO_MAX: usize = 1000;
/// Maximum depth of dependencies. Real kernels have less than ten.
const DEPTH_MAX: u32 = 40;
/// Entries of which a directory of modules has at least one.
const MARKS: [&str; 3] = ["modules.dep", "modules.builtin", "kernel"];
/// File name suffixes after `.ko`.
const SUFFIXES: [&str; 4] = ["", ".xz", ".zst", ".gz"];
/// The only module whose driver has another name in the kernel image, and that name.
const VIRTIO_MMIO: (&str, &str) = ("virtio_mmio", "virtio-mmio");

/// Kernel modules to pack.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModulesConfig {
    /// `/lib/modules/VERSION`, or a folder above it; searched for if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dir: Option<PathBuf>,
    /// Modules that the guest must have, unless they are built in.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub names: Vec<String>,
    /// Modules that are packed if they exist.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub optional: Vec<String>,
}

/// A module that is packed.
#[derive(Debug)]
pub struct Module {
    /// The module's path in the guest.
    pub guest: String,
    /// The module's file on the host.
    pub host: PathBuf,
    /// The module's content, unpacked.
    pub data: Data,
}

/// Reasons why modules cannot be packed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be used.
    #[error("kernel modules: cannot use {}", path.display())]
    File {
        /// Path of the file.
        path: PathBuf,
        /// The problem with the file.
        source: Problem,
    },
    /// The kernel does not have the driver built in, and no directory with its modules was found.
    #[error("kernel {version} has no {name} built in, and its modules were not found; looked in {places}")]
    NoModules {
        /// The kernel's version.
        version: String,
        /// Name of the missing module.
        name: String,
        /// Directories that were searched.
        places: String,
    },
    /// A module exists neither in the kernel nor as a file.
    #[error("kernel {version} has no module {name}: it is neither built in nor in {}", dir.display())]
    NoModule {
        /// The kernel's version.
        version: String,
        /// Name of the missing module.
        name: String,
        /// Directory of the kernel's modules.
        dir: PathBuf,
    },
    /// The directory has the modules of another kernel.
    #[error("the modules in {} are for kernel {found}, and this kernel is {version}", dir.display())]
    OtherVersion {
        /// The directory.
        dir: PathBuf,
        /// Version of the kernel that the modules are for.
        found: String,
        /// Version of the kernel that boots.
        version: String,
    },
    /// The dependencies are too deep.
    #[error("the dependencies of module {0} go deeper than {DEPTH_MAX}")]
    TooDeep(String),
}

/// Returns the modules that `config` asks for and their dependencies, in load order, for the kernel `image` from the
/// file `kernel`.
pub fn find(config: &ModulesConfig, kernel: &Path, image: &Image) -> Result<Vec<Module>, Error> {
    if config.names.is_empty() && config.optional.is_empty() {
        return Ok(Vec::new());
    }
    let version = release(image).unwrap_or_default();
    // A kernel with everything built in needs no modules, but a directory that the user named must exist.
    let places = places(config, kernel, &version)?;
    let Some(dir) = first(&places, config)? else {
        let missing = config.names.iter().find(|name| !built_in(image, name));
        let Some(name) = missing.cloned() else { return Ok(Vec::new()) };
        let places = describe(&places, config);
        let version = if version.is_empty() { "of unknown version".into() } else { version };
        return Err(Error::NoModules { version, name, places });
    };
    let texts = Texts::read(dir)?;
    let mut search = Search::new(dir, &version, &texts);
    for name in &config.names {
        if !search.visit(name, 0)? && !built_in(image, name) {
            return Err(Error::NoModule { version, name: name.clone(), dir: dir.path() });
        }
    }
    for name in &config.optional {
        match search.visit(name, 0) {
            Ok(_) | Err(Error::NoModule { .. }) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(search.found)
}

/// Returns the kernel's `uname -r`, if it can be part of a path.
fn release(image: &Image) -> Option<String> {
    let version = image.info.version.clone().or_else(|| kernel::find_version(image))?;
    let release = version.split(' ').next().unwrap_or_default();
    let fits = !release.starts_with('.') && !release.contains('/') && release.len() < 200;
    fits.then(|| release.to_string())
}

/// Returns the directories that may hold modules of `version`, if `dir` is their directory or one above it; best first.
pub(crate) fn below(dir: &Path, version: &OsStr) -> Vec<PathBuf> {
    let above = [dir.to_path_buf(), dir.join("lib/modules"), dir.join("usr/lib/modules")];
    above.iter().map(|above| above.join(version)).chain([dir.to_path_buf()]).collect()
}

/// Returns whether `dir` is a directory of modules.
pub(crate) fn is_directory(dir: &Path) -> bool {
    MARKS.iter().any(|name| dir.join(name).exists())
}

/// Returns whether the kernel image contains the name of the driver. Images that the guest unpacks cannot be searched;
/// for these the answer is yes, and the user is expected to know.
fn built_in(image: &Image, name: &str) -> bool {
    let name = name.replace('-', "_");
    let name = if name == VIRTIO_MMIO.0 { VIRTIO_MMIO.1 } else { &name };
    let needle = [name.as_bytes(), b"\0"].concat();
    // The search is fast if it looks for a byte that is rare in kernels.
    let rare = needle.iter().position(|b| b"vxz".contains(b)).unwrap_or(0);
    image.packed || image.find(&needle, rare, |_| true).is_ok_and(|found| found)
}

/// The text files of a modules directory.
struct Texts {
    /// Content of modules.dep, or an equivalent made by walking the directory.
    dep: String,
    /// True if `dep` was made by walking; then dependencies are read from the modules.
    walked: bool,
    softdep: String,
    builtin: String,
    alias: String,
}

impl Texts {
    fn read(dir: &Directory) -> Result<Texts, Error> {
        let text = |name: &str| {
            let read = dir.has(name).map_err(Problem::Open).and_then(|has| match has {
                true => read_text(dir.file(name)?),
                false => Ok(String::new()),
            });
            read.map_err(|source| Error::File { path: dir.path().join(name), source })
        };
        let (dep, walked) = match text("modules.dep")? {
            dep if dep.is_empty() => (walk(dir)?, true),
            dep => (dep, false),
        };
        Ok(Texts {
            dep,
            walked,
            softdep: text("modules.softdep")?,
            builtin: text("modules.builtin")?,
            alias: text("modules.alias")?,
        })
    }
}

fn read_text((file, len): (File, u64)) -> Result<String, Problem> {
    if len > TEXT_MAX {
        return Err(Problem::Damaged(format!("it is too large ({len} bytes)")));
    }
    String::from_utf8(Data::File(file, len).bytes(0, len)?).map_err(|_| Problem::Damaged("it is not UTF-8 text".into()))
}

/// Returns whether a file of this name in a directory of modules is one of its lists or a module.
pub fn is_file(name: &OsStr) -> bool {
    name.to_str().is_some_and(|name| name.starts_with("modules.") || stem(name).is_some())
}

/// Returns the name of the module at `path`.
fn stem(path: &str) -> Option<&str> {
    let name = path.rsplit('/').next()?;
    let (stem, suffix) = name.split_once(".ko")?;
    SUFFIXES.contains(&suffix).then_some(stem)
}

/// Returns the key of a module's name in maps; `-` and `_` are the same in names.
fn key(name: &str) -> String {
    name.replace('-', "_")
}

/// A line of modules.dep.
#[derive(Clone, Copy)]
struct Line<'a> {
    name: &'a str,
    path: &'a str,
    depends: &'a str,
}

/// State of following dependencies. Each list is read once, because an attacker may have made it long.
struct Search<'a> {
    dir: &'a Directory,
    version: &'a str,
    texts: &'a Texts,
    lines: Vec<Line<'a>>,
    /// Indexes into `lines`, by [`key`].
    by_name: HashMap<String, usize>,
    softdeps: HashMap<String, Vec<&'a str>>,
    builtin: OnceCell<HashSet<String>>,
    aliases: Option<HashMap<String, Vec<String>>>,
    /// Keys that were looked up, and whether there is such a module.
    visited: HashMap<String, bool>,
    /// Names that were visited, so that each module is packed once and circles end.
    seen: HashSet<&'a str>,
    /// Modules in load order.
    found: Vec<Module>,
    /// Sum of their lengths.
    len: u64,
}

impl<'a> Search<'a> {
    fn new(dir: &'a Directory, version: &'a str, texts: &'a Texts) -> Self {
        let line = |line: &'a str| {
            let (path, depends) = line.split_once(':')?;
            Some(Line { name: stem(path)?, path, depends })
        };
        let lines: Vec<Line<'a>> = texts.dep.lines().filter_map(line).collect();
        let mut by_name = HashMap::new();
        for (n, line) in lines.iter().enumerate() {
            by_name.entry(key(line.name)).or_insert(n);
        }
        let mut softdeps: HashMap<String, Vec<&'a str>> = HashMap::new();
        for line in texts.softdep.lines() {
            if let Some((module, rest)) = line.strip_prefix("softdep ").and_then(|rest| rest.split_once(' ')) {
                softdeps.entry(key(module)).or_default().extend(before(rest));
            }
        }
        Search {
            dir,
            version,
            texts,
            lines,
            by_name,
            softdeps,
            builtin: OnceCell::new(),
            aliases: None,
            visited: HashMap::new(),
            seen: HashSet::new(),
            found: Vec::new(),
            len: 0,
        }
    }

    fn line(&self, key: &str) -> Option<Line<'a>> {
        self.by_name.get(key).and_then(|n| self.lines.get(*n)).copied()
    }

    fn is_builtin(&self, key: &str) -> bool {
        let all = || self.texts.builtin.lines().filter_map(stem).map(self::key).collect();
        self.builtin.get_or_init(all).contains(key)
    }

    /// Takes the module `name` after everything that it needs. Returns whether it exists, possibly built in.
    fn visit(&mut self, name: &str, depth: u32) -> Result<bool, Error> {
        let key = key(name);
        if let Some(found) = self.visited.get(&key) {
            return Ok(*found);
        }
        // A circle of dependencies returns here, to a module that exists.
        self.visited.insert(key.clone(), true);
        if let Some(line) = self.line(&key) {
            return self.take(line, depth).map(|()| true);
        }
        if self.is_builtin(&key) {
            return Ok(true);
        }
        let mut any = false;
        for target in self.alias(&key)? {
            // Several modules may have the same alias; all of them are taken.
            if let Some(line) = self.line(&self::key(&target)) {
                self.take(line, depth)?;
                any = true;
            }
        }
        self.visited.insert(key, any);
        Ok(any)
    }

    /// Returns the path of a module relative to the directory. Some versions of depmod write absolute paths.
    fn inside<'p>(&self, path: &'p str) -> Result<&'p str, Error> {
        let installed = Path::new("/lib/modules").join(self.version);
        let stripped = [installed, self.dir.path()].into_iter().find_map(|dir| Path::new(path).strip_prefix(dir).ok());
        let inside = stripped.filter(|_| path.starts_with('/')).and_then(Path::to_str).unwrap_or(path);
        if Path::new(inside).components().all(|step| matches!(step, Component::Normal(_))) {
            return Ok(inside);
        }
        let source = Problem::Damaged(format!("it names a file outside this directory: {path}"));
        Err(Error::File { path: self.dir.path().join("modules.dep"), source })
    }

    fn take(&mut self, line: Line<'a>, depth: u32) -> Result<(), Error> {
        if self.seen.contains(line.name) {
            return Ok(());
        }
        if depth > DEPTH_MAX || self.seen.len() > MODULES_MAX {
            return Err(Error::TooDeep(line.name.into()));
        }
        self.seen.insert(line.name);
        let path = self.inside(line.path)?;
        let (dir, host) = (self.dir.path(), self.dir.join(path).path());
        let of_file = |source| Error::File { path: host.clone(), source };
        let data = open(self.dir, path).map_err(of_file)?;
        self.len += data.len();
        if self.len > MODULES_LEN_MAX {
            let max = Size(MODULES_LEN_MAX);
            return Err(of_file(Problem::Unsuitable(format!(
                "with it the modules would have more than {max} together"
            ))));
        }
        // A file that is not a module must not reach the guest.
        let info = modinfo(&data).map_err(of_file)?;
        if self.texts.walked || dir.file_name().is_none_or(|name| name != self.version) {
            self.check_version(&info)?;
        }
        let softdeps = match self.texts.walked {
            true => values(&info, "softdep").flat_map(before).collect::<Vec<_>>(),
            false => self.softdeps.get(&key(line.name)).cloned().unwrap_or_default(),
        };
        for softdep in softdeps {
            self.visit(softdep, depth + 1)?; // optional: a kernel also works without it
        }
        // Dependencies in modules.dep are files, in reverse load order; those in a module are names.
        let depends: Vec<&str> = match self.texts.walked {
            true => {
                values(&info, "depends").flat_map(|names| names.split(',')).filter(|name| !name.is_empty()).collect()
            }
            false => line.depends.split_ascii_whitespace().rev().filter_map(stem).collect(),
        };
        for name in depends {
            if !self.visit(name, depth + 1)? {
                return Err(Error::NoModule { version: self.version.into(), name: name.into(), dir });
            }
        }
        let (path, _) = path.rsplit_once(".ko").unwrap_or((path, ""));
        let guest = format!("/lib/modules/{}/{path}.ko", self.version);
        self.found.push(Module { guest, host, data });
        Ok(())
    }

    /// Returns the modules that have this alias.
    fn alias(&mut self, key: &str) -> Result<Vec<String>, Error> {
        if self.aliases.is_none() {
            self.aliases = Some(self.read_aliases()?);
        }
        Ok(self.aliases.as_ref().and_then(|aliases| aliases.get(key)).cloned().unwrap_or_default())
    }

    /// Reads all aliases. Without modules.alias only ciphers and checksums are searched, because these are what other
    /// modules name by alias.
    fn read_aliases(&self) -> Result<HashMap<String, Vec<String>>, Error> {
        let mut aliases: HashMap<String, Vec<String>> = HashMap::new();
        if !self.texts.walked {
            let lines = self.texts.alias.lines().filter_map(|line| line.strip_prefix("alias ")?.rsplit_once(' '));
            lines.for_each(|(alias, module)| aliases.entry(key(alias)).or_default().push(module.into()));
            return Ok(aliases);
        }
        let mut len = 0;
        for line in self.lines.iter().filter(|line| line.path.contains("/crypto/")).take(CRYPTO_MAX) {
            let info = open(self.dir, line.path).and_then(|data| modinfo(&data));
            let info = info.map_err(|source| Error::File { path: self.dir.join(line.path).path(), source })?;
            len += info.len() as u64;
            for alias in values(&info, "alias").take_while(|_| len <= TEXT_MAX) {
                aliases.entry(key(alias)).or_default().push(line.name.into());
            }
        }
        Ok(aliases)
    }

    /// Fails if the module is for another version: the guest's kernel would refuse it without a clear message.
    fn check_version(&self, info: &str) -> Result<(), Error> {
        let found = values(info, "vermagic").next().and_then(|magic| magic.split(' ').next());
        match found {
            Some(found) if !self.version.is_empty() && found != self.version => {
                Err(Error::OtherVersion { dir: self.dir.path(), found: found.into(), version: self.version.into() })
            }
            _ => Ok(()),
        }
    }
}

/// Returns a module's content, unpacked if necessary.
fn open(dir: &Directory, name: &str) -> Result<Data, Problem> {
    let (file, len) = dir.file(name)?;
    if len > MODULE_MAX {
        return Err(Problem::Damaged(format!("it is too large ({len} bytes)")));
    }
    let data = Data::File(file, len);
    match Compression::detect(&data.head(16)?) {
        Some(format) => Ok(Data::Memory(unpack::unpack_within(format, data.reader(0, len)?, MODULE_MAX)?)),
        None => Ok(data),
    }
}

/// Returns a module's information about itself: `key=value` fields, each ended by a NUL.
fn modinfo(data: &Data) -> Result<String, Problem> {
    let section = elf::section(data, b".modinfo")?;
    let section = section.ok_or_else(|| Problem::Damaged("it has no .modinfo section".into()))?;
    Ok(String::from_utf8_lossy(&section).into_owned())
}

fn values<'a>(info: &'a str, key: &str) -> impl Iterator<Item = &'a str> {
    info.split('\0').filter_map(move |field| field.strip_prefix(key)?.strip_prefix('='))
}

/// Returns the modules of a soft dependency that are loaded first: `a` and `b` in `pre: a b post: c`.
fn before(text: &str) -> impl Iterator<Item = &str> {
    let words = text.split_ascii_whitespace().skip_while(|word| *word != "pre:").skip(1);
    words.take_while(|word| *word != "post:")
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use proptest::prelude::*;

    use super::super::BootMode;
    use super::super::image::Piece;
    use super::super::testing::{self, Files};
    use super::*;

    const VERSION: &str = "6.1.0-test";

    /// Returns a module file with the given information.
    fn ko(info: &[&str]) -> Vec<u8> {
        let info = info.iter().flat_map(|field| [field, "\0"]).collect::<String>();
        let names = "\0.modinfo\0.shstrtab\0";
        let (info_at, names_at) = (64u64, 64 + info.len() as u64);
        let table_at = names_at + names.len() as u64;
        let mut out = vec![0; 64];
        out[..6].copy_from_slice(b"\x7fELF\x02\x01");
        out[40..48].copy_from_slice(&table_at.to_le_bytes());
        out[58..64].copy_from_slice(&[64, 0, 3, 0, 2, 0]);
        out.extend(info.bytes().chain(names.bytes()));
        for (name, at, len) in [(0u32, 0, 0), (1, info_at, info.len()), (10, names_at, names.len())] {
            let start = out.len();
            out.resize(start + 64, 0);
            out[start..start + 4].copy_from_slice(&name.to_le_bytes());
            out[start + 24..start + 32].copy_from_slice(&at.to_le_bytes());
            out[start + 32..start + 40].copy_from_slice(&(len as u64).to_le_bytes());
        }
        out
    }

    fn image() -> Image {
        let bytes = testing::bzimage(Compression::Gzip, &testing::linux(0));
        kernel::examine(Data::Memory(bytes), BootMode::Auto).unwrap()
    }

    /// Files below an unpacked package's root.
    struct Package(Files);

    impl Package {
        fn new() -> Package {
            Package(Files::new())
        }

        fn dir(&self) -> PathBuf {
            self.0.path("lib/modules").join(VERSION)
        }

        fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
            let path = self.dir().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }

        /// Finds the needed modules, which are beside the kernel; returns their names in the guest.
        fn find(&self, names: &str, optional: &str) -> Result<Vec<String>, Error> {
            fs::create_dir_all(self.0.path("boot")).unwrap();
            self.find_for(&ModulesConfig { dir: None, names: list(names), optional: list(optional) }, &image())
        }

        fn find_for(&self, config: &ModulesConfig, image: &Image) -> Result<Vec<String>, Error> {
            let found = find(config, &self.0.path("boot/vmlinuz"), image)?;
            let below = format!("/lib/modules/{VERSION}/kernel/");
            Ok(found.into_iter().map(|module| module.guest.strip_prefix(&below).unwrap().to_string()).collect())
        }
    }

    fn list(names: &str) -> Vec<String> {
        names.split_whitespace().map(String::from).collect()
    }

    /// Returns a package of a few modules, with the texts that depmod creates or without.
    fn package(depmod: bool) -> Package {
        let package = Package::new();
        let magic = format!("vermagic={VERSION} SMP mod_unload");
        let write = |path: &str, info: &[&str]| package.write(path, ko(&[info, &[&magic]].concat()));
        write("kernel/drivers/virtio/virtio.ko", &["depends="]);
        write("kernel/drivers/virtio/virtio_ring.ko", &["depends=virtio"]);
        write("kernel/drivers/virtio/virtio_mmio.ko", &["alias=platform:x", "depends=virtio,virtio_ring"]);
        write("kernel/fs/check-fs.ko", &["softdep=pre: crc32c nothing post: virtio", "depends=virtio-ring"]);
        write("kernel/crypto/crc32c_generic.ko", &["alias=crc32c", "alias=crypto-crc32c"]);
        let packed = testing::compress(Compression::Gzip, &ko(&["depends=check_fs", &magic]));
        package.write("kernel/fs/packed.ko.gz", packed);
        package.write("modules.builtin", "kernel/drivers/virtio/virtio_console.ko\n");
        if depmod {
            package.write(
                "modules.dep",
                "kernel/drivers/virtio/virtio.ko:\nkernel/drivers/virtio/virtio_ring.ko: kernel/drivers/virtio/virtio.ko\n\
                 kernel/drivers/virtio/virtio_mmio.ko: kernel/drivers/virtio/virtio_ring.ko kernel/drivers/virtio/virtio.ko\n\
                 kernel/fs/check-fs.ko: kernel/drivers/virtio/virtio_ring.ko kernel/drivers/virtio/virtio.ko\n\
                 kernel/crypto/crc32c_generic.ko:\nkernel/fs/packed.ko.gz: kernel/fs/check-fs.ko\n",
            );
            package.write("modules.softdep", "# made\nsoftdep check_fs pre: crc32c nothing post: virtio\n");
            package.write("modules.alias", "# made\nalias crc32c crc32c_generic\nalias pci:v* virtio\n");
        }
        package
    }

    #[test]
    fn modules_come_behind_what_they_need() {
        for depmod in [true, false] {
            let package = package(depmod);
            let mmio = ["drivers/virtio/virtio.ko", "drivers/virtio/virtio_ring.ko", "drivers/virtio/virtio_mmio.ko"];
            assert_eq!(package.find("virtio-mmio virtio_mmio", "").unwrap(), mmio);
            let packed = &mmio[..2].iter().chain(&["fs/check-fs.ko", "fs/packed.ko"]).copied().collect::<Vec<_>>();
            let packed = [&["crypto/crc32c_generic.ko"][..], packed].concat();
            assert_eq!(package.find("packed", "").unwrap(), packed, "depmod: {depmod}");
            assert_eq!(package.find("virtio_console", "virtiofs virtio").unwrap(), mmio[..1]);
            let module = &find(
                &ModulesConfig { names: list("packed"), ..Default::default() },
                &package.0.path("boot/vmlinuz"),
                &image(),
            )
            .unwrap()[4];
            assert!(module.data.head(4).unwrap() == b"\x7fELF" && module.host.ends_with("packed.ko.gz"));
            let error = package.find("virtio_mmio virtiofs", "").unwrap_err().to_string();
            let place = package.dir().canonicalize().unwrap();
            let text =
                format!("kernel 6.1.0-test has no module virtiofs: it is neither built in nor in {}", place.display());
            assert_eq!(error, text);
        }
    }

    #[test]
    fn directories_are_taken_by_every_name_and_other_versions_are_named() {
        let package = package(false);
        let config = |dir| ModulesConfig { dir: Some(dir), names: list("virtio_ring"), optional: Vec::new() };
        let dir = package.dir();
        for dir in [&dir, dir.parent().unwrap(), &package.0.path("")] {
            assert_eq!(package.find_for(&config(dir.into()), &image()).unwrap().len(), 2, "{}", dir.display());
        }
        let renamed = package.0.path("mine");
        fs::rename(&dir, &renamed).unwrap();
        assert_eq!(package.find_for(&config(renamed.clone()), &image()).unwrap().len(), 2);
        let mut other = image();
        other.info.version = Some("6.2.0 (builder)".into());
        let error = package.find_for(&config(renamed.clone()), &other).unwrap_err().to_string();
        assert!(error.ends_with("/mine are for kernel 6.1.0-test, and this kernel is 6.2.0"), "{error}");
        fs::rename(&renamed, &dir).unwrap();
        let error = package.find_for(&config(package.0.path("")), &other).unwrap_err().to_string();
        assert!(
            error.starts_with("kernel 6.2.0 has no virtio_ring built in, and its modules were not found; looked in ")
        );
        assert!(error.ends_with(" (modules of kernel 6.1.0-test are there)"), "{error}");
    }

    #[test]
    fn without_modules_the_kernel_itself_is_asked() {
        let package = Package::new();
        let config = ModulesConfig { names: list("virtio_mmio overlay"), ..Default::default() };
        let mut image = image();
        let error = package.find_for(&config, &image).unwrap_err().to_string();
        let place = package.dir().display().to_string();
        assert!(
            error.starts_with("kernel 6.1.0-test has no virtio_mmio built in") && error.contains(&place),
            "{error}"
        );
        let mut bytes = image.data.bytes(0, image.data.len()).unwrap();
        bytes.extend(vec![b'v'; 600_000]);
        bytes.extend(b"virtio-mmio\0");
        image.data = Data::Memory(bytes.clone());
        let error = package.find_for(&config, &image).unwrap_err().to_string();
        assert!(error.contains("has no virtio_mmio built in"), "what is not loaded does not count: {error}");
        image.info.pieces.push(Piece { paddr: 0, offset: 0, len: 1 << 20 });
        let error = package.find_for(&config, &image).unwrap_err().to_string();
        assert!(error.contains("has no overlay built in"), "{error}");
        bytes.extend(b"overlay\0");
        image.data = Data::Memory(bytes);
        assert!(package.find_for(&config, &image).unwrap().is_empty());
        for strange in ["", "../..", "a/b (x)"] {
            image.info.version = Some(strange.into());
            image.data = Data::Memory(Vec::new());
            let error = package.find_for(&config, &image).unwrap_err().to_string();
            assert!(error.ends_with("looked in no directory, since the kernel's version is unknown"), "{error}");
        }
    }

    #[test]
    fn links_lead_to_nothing_outside() {
        let package = package(true);
        let (dir, elsewhere) = (package.dir(), Files::new());
        let outside = elsewhere.path("");
        fs::write(outside.join("secret.ko"), ko(&["depends="])).unwrap();
        fs::write(outside.join("modules.dep"), "kernel/secret.ko:\n").unwrap();
        let named = |dir: PathBuf| {
            let config = ModulesConfig { dir: Some(dir), names: list("virtio_ring"), optional: Vec::new() };
            package.find_for(&config, &image())
        };
        // A link that stays in the package.
        fs::create_dir(package.0.path("usr")).unwrap();
        fs::rename(package.0.path("lib"), package.0.path("usr/lib")).unwrap();
        symlink("usr/lib", package.0.path("lib")).unwrap();
        let ring = dir.join("kernel/drivers/virtio/virtio_ring.ko");
        fs::rename(&ring, dir.join("ring")).unwrap();
        symlink(dir.join("ring"), &ring).unwrap();
        assert_eq!(named(package.0.path("")).unwrap().len(), 2);
        assert_eq!(package.find("virtio_ring", "").unwrap().len(), 2);
        // Links that leave it: a module, a list, the directory.
        let out = |target: &Path, link: &Path| {
            let old = link.file_name().and_then(OsStr::to_str).unwrap();
            fs::rename(link, package.0.path(&format!("{old}.old"))).unwrap();
            symlink(target, link).unwrap();
            for error in [named(package.0.path("")), package.find("virtio_ring", "")] {
                let error = testing::chain(&error.unwrap_err());
                let found = error.contains("virtio_ring built in, and its modules were not found");
                assert!(found || error.contains("a symbolic link leads out of "), "{error}");
            }
        };
        out(&outside.join("secret.ko"), &ring);
        assert!(above(&package.0.path("boot/vmlinuz")).iter().any(|(dir, _)| dir.starts_with(package.0.path(""))));
        fs::rename(dir.join("modules.dep"), dir.join("old.dep")).unwrap();
        fs::write(dir.join("modules.dep"), "").unwrap();
        out(&outside.join("modules.dep"), &dir.join("modules.dep"));
        out(&outside, &package.0.path("lib/modules"));
        assert!(!above(&package.0.path("boot/vmlinuz")).iter().any(|(dir, _)| dir.starts_with(package.0.path(""))));
    }

    #[test]
    fn lists_name_files_of_the_directory_and_those_are_modules() {
        let package = package(true);
        let (secret, dir) = (package.0.write("secret.ko", b"precious"), package.dir());
        let find = |path: &str, name: &str| {
            package.write("modules.dep", format!("{path}:\n"));
            package.find(name, "").map_err(|e| testing::chain(&e))
        };
        for path in ["../../../secret.ko", "kernel/../../../../secret.ko", secret.to_str().unwrap(), "/etc/secret.ko"] {
            let error = find(path, "secret").unwrap_err();
            assert!(error.contains("/modules.dep: ") && error.ends_with(path), "{error}");
        }
        let known = "kernel/drivers/virtio/virtio.ko";
        let installed = format!("/lib/modules/{VERSION}/{known}");
        let real = dir.canonicalize().unwrap().join(known);
        for path in [known, &installed, real.to_str().unwrap()] {
            assert_eq!(find(path, "virtio").unwrap(), ["drivers/virtio/virtio.ko"], "{path}");
        }
        package.write("kernel/secret.ko", "precious");
        assert!(find("kernel/secret.ko", "secret").unwrap_err().ends_with("it is not a 64-bit ELF file"));
        package.write("kernel/secret.ko.gz", testing::compress(Compression::Gzip, &[b'x'; 1000]));
        assert!(find("kernel/secret.ko.gz", "secret").unwrap_err().ends_with("it is not a 64-bit ELF file"));
        package.write("kernel/huge.ko.zst", b"\x28\xb5\x2f\xfd\x00\x68");
        File::options().write(true).open(dir.join("kernel/huge.ko.zst")).unwrap().set_len(1 << 41).unwrap();
        assert!(find("kernel/huge.ko.zst", "huge").unwrap_err().contains("it is too large (2199023255552 bytes)"));
    }

    #[test]
    fn long_lists_are_gone_through_once() {
        let package = Package::new();
        package.write("kernel/a.ko", ko(&[]));
        let many = 100_000;
        let filler: String = (0..many).map(|n| format!("kernel/m{n}.ko:\n")).collect();
        let depends = "kernel/x.ko ".repeat(many);
        package.write("modules.dep", format!("{filler}kernel/a.ko: {depends}\n"));
        package.write("modules.alias", format!("{}alias x m1\n", "alias y z\n".repeat(many)));
        package.write("modules.softdep", format!("softdep a pre: {}\n", "y q ".repeat(many)));
        package.write("kernel/m1.ko", ko(&[]));
        assert_eq!(package.find("a", "").unwrap(), ["m1.ko", "a.ko"]);
    }

    #[test]
    fn circles_end_and_chains_are_bounded() {
        let package = Package::new();
        let name = |n: usize| format!("kernel/m{n}.ko");
        let mut dep = String::from("kernel/a.ko: kernel/b.ko\nkernel/b.ko: kernel/a.ko\n");
        for n in 0..200 {
            dep += &format!("{}: {}\n", name(n), name(n + 1));
            package.write(&name(n), ko(&[]));
        }
        ["kernel/a.ko", "kernel/b.ko"].iter().for_each(|name| package.write(name, ko(&[])));
        package.write("modules.dep", dep);
        assert_eq!(package.find("a", "").unwrap(), ["b.ko", "a.ko"]);
        assert!(matches!(package.find("m0", ""), Err(Error::TooDeep(_))));
        package.write("modules.dep", "kernel/a.ko: kernel/gone.ko\nkernel/none.ko:\n");
        assert!(package.find("a", "").unwrap_err().to_string().contains("has no module gone"));
        assert!(package.find("", "a").unwrap().is_empty());
        assert!(matches!(package.find("none", ""), Err(Error::File { source: Problem::Open(_), .. })));
        package.write("modules.dep", [0xFF, 0xFE, b':']);
        assert!(package.find("a", "").unwrap_err().to_string().ends_with("/modules.dep"));
    }

    proptest! {
        #[test]
        fn damaged_modules_never_panic(flips in proptest::collection::vec((0usize..400, 0u8..8), 0..6), keep in 0usize..400) {
            let mut bytes = ko(&["depends=a,b", "softdep=pre: c", "vermagic=6.1.0-test SMP"]);
            for (at, bit) in flips {
                let at = at % bytes.len();
                bytes[at] ^= 1 << bit;
            }
            bytes.truncate(keep);
            let _ = modinfo(&Data::Memory(bytes));
        }
    }
}
