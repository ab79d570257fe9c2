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

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::Problem;
use super::image::Image;
use super::source::{self, Data};
use super::unpack::{self, Compression};
use super::{elf, kernel};

/// Largest text file of a modules directory. Distributions' files have 2 MiB.
const TEXT_MAX: u64 = 16 << 20;
/// Largest module, unpacked.
const MODULE_MAX: u64 = 128 << 20;
/// Largest number of modules that are packed.
const MODULES_MAX: usize = 20_000;
/// Largest number of files in a directory without modules.dep, which may be a kernel's source.
const FILES_MAX: u32 = 1 << 20;
/// Maximum depth of dependencies. Real kernels have less than ten.
const DEPTH_MAX: u32 = 40;
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
    if let Some(dir) = &config.dir {
        // A kernel with everything built in needs no modules, but a directory that the user named must exist.
        source::folder(dir).map_err(|source| Error::File { path: dir.clone(), source })?;
    }
    let version = release(image).unwrap_or_default();
    let places = places(config, kernel, &version);
    let Some(dir) = places.iter().find(|dir| is_directory(dir)) else {
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
            return Err(Error::NoModule { version, name: name.clone(), dir: dir.clone() });
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

/// Returns directories that may contain the modules, best first.
fn places(config: &ModulesConfig, kernel: &Path, version: &str) -> Vec<PathBuf> {
    let roots = |root: &Path| ["lib/modules", "usr/lib/modules"].map(|dir| root.join(dir).join(version));
    if let Some(dir) = &config.dir {
        // If the version is unknown, only the directory itself can be meant.
        return if version.is_empty() { vec![dir.clone()] } else { below(dir, version.as_ref()) };
    }
    if version.is_empty() {
        return Vec::new();
    }
    let mut places = Vec::new();
    let kernel = kernel.canonicalize().unwrap_or_else(|_| kernel.into());
    if let Some(beside) = kernel.parent() {
        // /usr/lib/modules/VERSION/vmlinuz, and boot/vmlinuz of an unpacked package.
        places.extend(beside.ends_with(version).then(|| beside.to_path_buf()));
        places.extend([beside, beside.parent().unwrap_or(beside)].into_iter().flat_map(roots));
    }
    for place in roots(Path::new("/")) {
        if !places.contains(&place) {
            places.push(place);
        }
    }
    places
}

/// Returns the existing directories named `modules` near this kernel's file, and the host's own, that may contain its
/// version; best first.
pub fn above(kernel: &Path) -> Vec<PathBuf> {
    let roots = |root: &Path| ["lib/modules", "usr/lib/modules"].map(|dir| root.join(dir));
    let kernel = kernel.canonicalize().unwrap_or_else(|_| kernel.into());
    let beside = kernel.parent().unwrap_or(Path::new("/"));
    // The kernel is /usr/lib/modules/VERSION/vmlinuz.
    let mut places: Vec<PathBuf> =
        beside.parent().filter(|dir| dir.ends_with("lib/modules")).map(Path::to_path_buf).into_iter().collect();
    for place in [beside, beside.parent().unwrap_or(beside), Path::new("/")].into_iter().flat_map(roots) {
        let place = place.canonicalize().unwrap_or(place);
        if place.is_dir() && !places.contains(&place) {
            places.push(place);
        }
    }
    places
}

/// Returns the directories that may hold modules of `version`, if `dir` is their directory or one above it; best first.
pub(crate) fn below(dir: &Path, version: &OsStr) -> Vec<PathBuf> {
    let above = [dir.to_path_buf(), dir.join("lib/modules"), dir.join("usr/lib/modules")];
    above.iter().map(|above| above.join(version)).chain([dir.to_path_buf()]).collect()
}

/// Returns whether `dir` is a directory of modules.
pub(crate) fn is_directory(dir: &Path) -> bool {
    ["modules.dep", "modules.builtin", "kernel"].iter().any(|name| dir.join(name).exists())
}

/// Describes the searched places, and another version that the directory given by the user contains instead.
fn describe(places: &[PathBuf], config: &ModulesConfig) -> String {
    let mut text = places.iter().map(|place| place.display().to_string()).collect::<Vec<_>>().join(", ");
    if places.is_empty() {
        text.push_str("no directory, since the kernel's version is unknown");
    }
    for dir in config.dir.iter().flat_map(|dir| [dir.clone(), dir.join("lib/modules"), dir.join("usr/lib/modules")]) {
        let mut others = source::folder(&dir).unwrap_or_default().into_iter();
        if let Some(version) = others.find(|name| is_directory(&dir.join(name))) {
            text.push_str(&format!(" (modules of kernel {} are there)", version.display()));
            break;
        }
    }
    text
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
    fn read(dir: &Path) -> Result<Texts, Error> {
        let text = |name: &str| {
            let path = dir.join(name);
            if !path.exists() {
                return Ok(String::new());
            }
            read_text(&path).map_err(|source| Error::File { path, source })
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

fn read_text(path: &Path) -> Result<String, Problem> {
    let (file, len) = source::open(path)?;
    if len > TEXT_MAX {
        return Err(Problem::Damaged(format!("it is too large ({len} bytes)")));
    }
    String::from_utf8(Data::File(file, len).bytes(0, len)?).map_err(|_| Problem::Damaged("it is not UTF-8 text".into()))
}

/// Returns the paths of all modules below `dir`, one per line.
fn walk(dir: &Path) -> Result<String, Error> {
    let mut text = String::new();
    let mut folders = vec![PathBuf::new()];
    let mut count = 0u32;
    while let Some(folder) = folders.pop() {
        let path = dir.join(&folder);
        for entry in source::folder(&path).map_err(|source| Error::File { path: path.clone(), source })? {
            let name = folder.join(&entry);
            let Some(relative) = name.to_str().filter(|path| !path.contains(['\n', ':'])) else { continue };
            match path.join(&entry).symlink_metadata() {
                Ok(metadata) if metadata.is_dir() => folders.push(name),
                Ok(metadata) if metadata.is_file() && stem(relative).is_some() => text.extend([relative, ":\n"]),
                _ => {}
            }
            count += 1;
            if count > FILES_MAX {
                let source = Problem::Damaged("it contains more files than any kernel's modules".into());
                return Err(Error::File { path: dir.into(), source });
            }
        }
    }
    Ok(text)
}

/// Returns the name of the module at `path`.
fn stem(path: &str) -> Option<&str> {
    let name = path.rsplit('/').next()?;
    let (stem, suffix) = name.split_once(".ko")?;
    SUFFIXES.contains(&suffix).then_some(stem)
}

/// Returns whether two module names are equal; `-` and `_` are the same in them.
fn same_name(a: &str, b: &str) -> bool {
    let same = |b: u8| if b == b'-' { b'_' } else { b };
    a.len() == b.len() && a.bytes().map(same).eq(b.bytes().map(same))
}

/// A line of modules.dep.
#[derive(Clone, Copy)]
struct Line<'a> {
    name: &'a str,
    path: &'a str,
    depends: &'a str,
}

/// State of following dependencies.
struct Search<'a> {
    dir: &'a Path,
    version: &'a str,
    texts: &'a Texts,
    lines: Vec<Line<'a>>,
    /// Names that were visited, so that each module is packed once and circles end.
    seen: Vec<&'a str>,
    /// Modules in load order.
    found: Vec<Module>,
}

impl<'a> Search<'a> {
    fn new(dir: &'a Path, version: &'a str, texts: &'a Texts) -> Self {
        let line = |line: &'a str| {
            let (path, depends) = line.split_once(':')?;
            Some(Line { name: stem(path)?, path, depends })
        };
        let lines = texts.dep.lines().filter_map(line).collect();
        Search { dir, version, texts, lines, seen: Vec::new(), found: Vec::new() }
    }

    /// Takes the module `name` after everything that it needs. Returns whether it exists, possibly built in.
    fn visit(&mut self, name: &str, depth: u32) -> Result<bool, Error> {
        if let Some(line) = self.lines.iter().find(|line| same_name(line.name, name)) {
            return self.take(*line, depth).map(|()| true);
        }
        if self.texts.builtin.lines().any(|line| stem(line).is_some_and(|builtin| same_name(builtin, name))) {
            return Ok(true);
        }
        let mut any = false;
        for target in self.alias(name)? {
            // Several modules may have the same alias; all of them are taken.
            if let Some(line) = self.lines.iter().find(|line| same_name(line.name, &target)) {
                self.take(*line, depth)?;
                any = true;
            }
        }
        Ok(any)
    }

    fn take(&mut self, line: Line<'a>, depth: u32) -> Result<(), Error> {
        if self.seen.contains(&line.name) {
            return Ok(());
        }
        if depth > DEPTH_MAX || self.seen.len() > MODULES_MAX {
            return Err(Error::TooDeep(line.name.into()));
        }
        self.seen.push(line.name);
        let host = self.dir.join(line.path);
        let of_file = |source| Error::File { path: host.clone(), source };
        let data = open(&host).map_err(of_file)?;
        let named_so = self.dir.file_name().is_some_and(|name| name == self.version);
        let info = match self.texts.walked || !named_so {
            true => modinfo(&data).map_err(of_file)?,
            false => String::new(),
        };
        self.check_version(&info)?;
        let softdeps = match self.texts.walked {
            true => values(&info, "softdep").flat_map(before).collect::<Vec<_>>(),
            false => self.softdeps(line.name),
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
                let (version, dir) = (self.version.into(), self.dir.into());
                return Err(Error::NoModule { version, name: name.into(), dir });
            }
        }
        let (path, _) = line.path.rsplit_once(".ko").unwrap_or((line.path, ""));
        let guest = format!("/lib/modules/{}/{path}.ko", self.version);
        self.found.push(Module { guest, host, data });
        Ok(())
    }

    /// Returns the modules that modules.softdep wants loaded before `name`.
    fn softdeps(&self, name: &str) -> Vec<&'a str> {
        let lines = self.texts.softdep.lines().filter_map(|line| line.strip_prefix("softdep ")?.split_once(' '));
        lines.filter(|(module, _)| same_name(module, name)).flat_map(|(_, rest)| before(rest)).collect()
    }

    /// Returns the modules that have the alias `name`. Without modules.alias only ciphers and checksums are searched,
    /// because these are what other modules name by alias.
    fn alias(&self, name: &str) -> Result<Vec<String>, Error> {
        if !self.texts.walked {
            let lines = self.texts.alias.lines().filter_map(|line| line.strip_prefix("alias ")?.rsplit_once(' '));
            return Ok(lines.filter(|(alias, _)| same_name(alias, name)).map(|(_, module)| module.into()).collect());
        }
        let mut modules = Vec::new();
        for line in self.lines.iter().filter(|line| line.path.contains("/crypto/")) {
            let path = self.dir.join(line.path);
            let info = open(&path).and_then(|data| modinfo(&data)).map_err(|source| Error::File { path, source })?;
            if values(&info, "alias").any(|alias| same_name(alias, name)) {
                modules.push(line.name.to_string());
            }
        }
        Ok(modules)
    }

    /// Fails if the module is for another version: the guest's kernel would refuse it without a clear message.
    fn check_version(&self, info: &str) -> Result<(), Error> {
        let found = values(info, "vermagic").next().and_then(|magic| magic.split(' ').next());
        match found {
            Some(found) if !self.version.is_empty() && found != self.version => {
                Err(Error::OtherVersion { dir: self.dir.into(), found: found.into(), version: self.version.into() })
            }
            _ => Ok(()),
        }
    }
}

/// Returns a module's content, unpacked if necessary.
fn open(path: &Path) -> Result<Data, Problem> {
    let (file, len) = source::open(path)?;
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
