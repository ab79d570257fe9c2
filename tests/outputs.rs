//! Files that a user names, in a folder that the guest can write to: links that it plants there divert vireo neither in
//! this run nor in the next, and no file is both an input and an output.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::guests::elf;
use crate::guests::vireo::{Ended, Kernel, Running, folder, vireo};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Fails the test unless vireo printed exactly one sentence, with these parts.
#[track_caller]
fn says(ended: Ended, code: i32, parts: &[&str]) {
    let ended = ended.expect(code);
    assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
    for part in parts {
        assert!(ended.stderr.contains(part), "'{part}' is not in: {}", ended.stderr);
    }
}

#[test]
fn what_is_planted_while_the_guest_runs_is_not_followed() {
    let (_folder, path) = folder();
    let (share, victim) = (path.join("share"), path.join("victim"));
    fs::create_dir(&share).unwrap();
    fs::write(&victim, "precious").unwrap();
    let kernel = Kernel::new(&elf(crate::guests::echo()));
    let names = ["end.json", "end.xml", "core", "log"];
    let files = names.map(|name| text(&share.join(name)).to_string());
    let outputs = ["--report", &files[0], "--junit", &files[1], "--vmcore", &files[2], "--console-log", &files[3]];
    let mut command = kernel.command(&[&["--share", text(&share), "--fail-on", "^a$"], &outputs[..]].concat());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut running = Running::spawn(command);
    running.stdout.wait_for("ready");
    let pid = running.child.id();
    fs::rename(&files[3], share.join("old-log")).unwrap();
    for name in names.map(String::from).into_iter().chain(names.map(|name| format!("{name}.{pid}.tmp"))) {
        symlink(&victim, share.join(name)).unwrap();
    }
    // The guest sends each byte back plus one: a line with an a.
    running.child.stdin.take().unwrap().write_all(b"`\t").unwrap();
    let ended = running.end().expect(73);
    assert!(ended.stderr.contains("log lies in ") && ended.stderr.contains("can change what is written there"));
    assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
    let report: serde_json::Value = serde_json::from_slice(&fs::read(&files[0]).unwrap()).unwrap();
    assert_eq!(report["outcome"], "refused");
    assert!(fs::read_to_string(&files[1]).unwrap().contains("<testsuites"));
    for (file, mode) in [(&files[0], 0o022), (&files[1], 0o022), (&files[2], 0o077)] {
        let found = fs::symlink_metadata(file).unwrap();
        assert!(found.is_file() && found.permissions().mode() & mode == 0, "{file}: {found:?}");
    }
    assert!(fs::read_to_string(share.join("old-log")).unwrap().contains("ready"));
}

#[test]
fn what_an_earlier_guest_planted_is_not_followed_either() {
    let (_folder, path) = folder();
    let (share, victims) = (path.join("share"), path.join("victims"));
    [&share, &victims].iter().for_each(|dir| fs::create_dir(dir).unwrap());
    fs::write(victims.join("file"), "precious").unwrap();
    symlink(victims.join("file"), share.join("file")).unwrap();
    symlink(&victims, share.join("dir")).unwrap();
    let run = |flag: &str, value: &str| {
        let mut command = vireo();
        command.args(["run", "--kernel", "missing", "--share", text(&share), flag, value]);
        Running::start(command).end()
    };
    for name in ["file", "dir/new"] {
        let path = text(&share.join(name)).to_string();
        for flag in ["--report", "--junit", "--vmcore", "--console-log", "--log-file"] {
            says(run(flag, &path), 125, &[&path, "is a symbolic link in", text(&share), "name its target instead"]);
        }
    }
    let file = text(&share.join("file")).to_string();
    for flag in ["--disk", "--initrd", "--pmem", "--init", "--busybox", "--initramfs-dir", "--modules-dir"] {
        says(run(flag, &file), 2, &[flag, &file, "a symbolic link in", "leads out of it"]);
    }
    let readonly = format!("{}/dir,readonly", text(&share));
    says(run("--share", &readonly), 2, &["--share", "leads out of it"]);
    assert_eq!(fs::read_to_string(victims.join("file")).unwrap(), "precious");
    assert_eq!(fs::read_dir(&victims).unwrap().count(), 1);
    // In a folder where no guest can create links, vireo follows the links that the user created.
    symlink(victims.join("report"), path.join("report")).unwrap();
    let kernel = Kernel::new(&elf(crate::guests::power_off()));
    let report = text(&path.join("report")).to_string();
    Running::start(kernel.command(&["--share", text(&share), "--report", &report])).end().expect(0);
    assert!(victims.join("report").is_file() && path.join("report").is_symlink());
}

/// A part of the guest's folder has a second path, as in containers.
#[test]
fn links_are_found_by_way_of_a_bind_mount() {
    let (_folder, path) = folder();
    let [part, mount, victim] = ["share/part", "mount", "victim"].map(|name| path.join(name));
    [&part, &mount].iter().for_each(|dir| fs::create_dir_all(dir).unwrap());
    fs::write(&victim, "precious").unwrap();
    symlink(&victim, part.join("file")).unwrap();
    let run = vireo();
    let mut command = Command::new("unshare");
    command.args([
        "--user",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        r#"mount --bind "$1" "$2" && shift 2 && exec "$@""#,
    ]);
    command.args(["sh", text(&part), text(&mount)]).arg(run.get_program());
    command.args(["run", "--kernel", "missing", "--share", text(&path.join("share"))]);
    command.args(["--report", text(&mount.join("file"))]).stdout(Stdio::piped()).stderr(Stdio::piped());
    says(Running::spawn(command).end(), 125, &["is a symbolic link in", "share, where the guest can create links"]);
    assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
}

#[test]
fn consoles_in_a_guest_s_folder_follow_no_links() {
    let (_folder, path) = folder();
    let (share, victim) = (path.join("share"), path.join("victim"));
    fs::create_dir(&share).unwrap();
    fs::write(&victim, "precious").unwrap();
    symlink(&victim, share.join("planted")).unwrap();
    symlink(&victim, share.join("planted.out")).unwrap();
    let kernel = Kernel::new(&elf(crate::guests::power_off()));
    let planted = text(&share.join("planted")).to_string();
    for (kind, says) in
        [("file", "is a symbolic link in"), ("pipe", "is a symbolic link in"), ("socket", "not a socket")]
    {
        let serial = format!("{kind}:{planted}");
        let ended = Running::start(kernel.command(&["--share", text(&share), "--serial", &serial])).end();
        ended.expect(125).says(says);
    }
    assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
}

/// A qcow2 image over a base, which it names by its absolute path.
fn over(base: &Path, top: &Path) {
    let kernel = Kernel::new(&elf(crate::guests::power_off()));
    let format = if base.extension().is_some_and(|end| end == "qcow2") { "qcow2" } else { "raw" };
    let disk = format!("{},format={format},overlay={}", text(base), text(top));
    Running::start(kernel.command(&["--disk", &disk])).end().expect(0);
}

/// The numbers of the files that a process has open.
fn open_files(pid: u32) -> Vec<u64> {
    let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    open.filter_map(|fd| Some(fs::metadata(fd.path()).ok()?.ino())).collect()
}

#[test]
fn a_second_attempt_has_the_same_disk_and_base() {
    let kernel = Kernel::new(&elf(crate::guests::say_and_sleep()));
    for is_base in [false, true] {
        let (_folder, path) = folder();
        let (_elsewhere, elsewhere) = folder();
        let (file, top) = (path.join("disk"), elsewhere.join("top.qcow2"));
        File::create(&file).unwrap().set_len(1 << 20).unwrap();
        let mut disk = text(&file).to_string();
        if is_base {
            over(&file, &top);
            disk = format!("{},format=qcow2", text(&top));
        }
        let id = fs::metadata(&file).unwrap().ino();
        let arguments = ["--share", text(&path), "--disk", &disk, "--hang-timeout", "2s", "--retry-on-hang", "1"];
        let mut running = Running::start(kernel.command(&arguments));
        running.stdout.wait_for("up");
        fs::rename(&file, path.join("moved")).unwrap();
        File::create(path.join("other")).unwrap().set_len(1 << 20).unwrap();
        symlink(path.join("other"), &file).unwrap();
        running.stdout.wait_for("upup");
        let open = open_files(running.child.id());
        let other = fs::metadata(path.join("other")).unwrap().ino();
        assert!(open.contains(&id) && !open.contains(&other), "{open:?}");
        running.signal(libc::SIGQUIT);
        running.wait();
    }
}

#[test]
fn a_second_attempt_opens_no_base_that_the_guest_wrote_into_its_image() {
    let (_folder, path) = folder();
    let [share, other] = ["share", "other"].map(|name| path.join(name));
    for folder in [&share, &other] {
        fs::create_dir(folder).unwrap();
        File::create(folder.join("base")).unwrap().set_len(1 << 20).unwrap();
    }
    let top = share.join("top.qcow2");
    over(&share.join("base"), &top);
    let kernel = Kernel::new(&elf(crate::guests::say_and_sleep()));
    let disk = format!("{},format=qcow2", text(&top));
    let arguments = ["--share", text(&share), "--disk", &disk, "--hang-timeout", "2s", "--retry-on-hang", "1"];
    let running = Running::start(kernel.command(&arguments));
    running.stdout.wait_for("up");
    let mut image = fs::read(&top).unwrap();
    let (from, to) = (share.join("base"), other.join("base"));
    let at = image.windows(text(&from).len()).position(|bytes| bytes == text(&from).as_bytes()).unwrap();
    image[at..at + text(&to).len()].copy_from_slice(text(&to).as_bytes());
    fs::write(&top, image).unwrap();
    running.end().expect(125).says("where the guest can write its name into");
}

#[test]
fn base_images_are_inputs() {
    let (_folder, path) = folder();
    let [share, outside] = ["share", "outside"].map(|name| path.join(name));
    [&share, &outside].iter().for_each(|dir| fs::create_dir(dir).unwrap());
    let (base, secret, middle) = (share.join("base.img"), outside.join("secret.img"), outside.join("middle.qcow2"));
    let top = path.join("top.qcow2");
    fs::write(&base, vec![7; 1 << 20]).unwrap();
    fs::write(&secret, vec![8; 1 << 20]).unwrap();
    over(&base, &middle);
    over(&middle, &top);
    let kernel = Kernel::new(&elf(crate::guests::power_off()));
    let run = |arguments: &[&str]| Running::start(kernel.command(arguments)).end();
    let disk = format!("{},format=qcow2", text(&top));
    for (below, flag) in [
        (&base, "--report"),
        (&base, "--junit"),
        (&base, "--vmcore"),
        (&base, "--console-log"),
        (&base, "--log-file"),
        (&middle, "--report"),
    ] {
        let ended = run(&["--disk", &disk, flag, text(below)]);
        says(ended, 2, &["base image", text(below), flag, "are the same file, which vireo would overwrite"]);
    }
    // Not opened, and not overwritten by the report of that.
    says(run(&["--disk", text(&middle), "--report", text(&base)]), 2, &["base image", "--report", "the same file"]);
    says(run(&["--disk", &disk, "--disk", text(&base)]), 2, &["base image", "are the same disk"]);
    run(&["--disk", &disk, "--share", text(&share)]).expect(0);
    assert!(fs::read(&base).unwrap() == vec![7; 1 << 20]);
    // What a guest plants.
    fs::rename(&base, share.join("kept")).unwrap();
    symlink("../outside/secret.img", &base).unwrap();
    let ended = run(&["--disk", &disk, "--share", text(&share)]);
    says(ended, 2, &["base image", text(&base), "a symbolic link in", "leads out of it"]);
    run(&["--disk", &disk, "--share", &format!("{},readonly", text(&share))]).expect(0);
    let own = share.join("own.qcow2");
    over(&secret, &own);
    let own = format!("{},format=qcow2", text(&own));
    says(run(&["--disk", &own, "--share", text(&share)]), 2, &["base image", text(&secret), "it is not in"]);
    run(&["--disk", &own, "--share", &format!("{},readonly", text(&share))]).expect(0);
}

#[test]
fn a_second_attempt_packs_the_same_folder() {
    let (_folder, path) = folder();
    let (packed, outside) = (path.join("share/root"), path.join("outside"));
    [&packed, &outside].iter().for_each(|dir| fs::create_dir_all(dir).unwrap());
    fs::write(packed.join("file"), "mine").unwrap();
    // What the machine has no room for: it would not start again.
    File::create(outside.join("large")).unwrap().set_len(1 << 30).unwrap();
    let kernel = Kernel::new(&elf(crate::guests::say_and_sleep()));
    let share = path.join("share");
    let arguments = ["--share", text(&share), "--initramfs-dir", text(&packed), "--hang-timeout", "2s"];
    let mut running = Running::start(kernel.command(&[&arguments[..], &["--retry-on-hang", "1"]].concat()));
    running.stdout.wait_for("up");
    fs::rename(&packed, share.join("moved")).unwrap();
    symlink(&outside, &packed).unwrap();
    running.stdout.wait_for("upup");
    running.signal(libc::SIGQUIT);
    running.wait();
}

/// A package of modules, or what a guest made of one, brings nothing that lies elsewhere.
#[test]
fn modules_come_from_their_folder() {
    let (_folder, path) = folder();
    let (modules, kernel) = (path.join("modules"), Kernel::new(&elf(crate::guests::power_off())));
    fs::create_dir_all(modules.join("kernel")).unwrap();
    fs::write(path.join("secret"), "precious").unwrap();
    symlink(path.join("secret"), modules.join("kernel/a.ko")).unwrap();
    fs::write(modules.join("kernel/b.ko"), "precious").unwrap();
    fs::write(modules.join("modules.dep"), "kernel/a.ko:\nkernel/b.ko:\n../secret.ko:\n").unwrap();
    for (name, part) in [
        ("a", "a symbolic link leads out of "),
        ("b", "it is not a 64-bit ELF file"),
        ("secret", "it names a file outside this directory: ../secret.ko"),
    ] {
        let ended = Running::start(kernel.command(&["--modules-dir", text(&modules), "--modules", name])).end();
        says(ended, 125, &["kernel modules: cannot use ", text(&modules), part]);
    }
    let dep = modules.join("modules.dep");
    let before = fs::read(&dep).unwrap();
    for output in ["--console-log", "--report"] {
        let ended = Running::start(kernel.command(&["--modules-dir", text(&modules), output, text(&dep)])).end();
        says(ended, 2, &[output, "is one of the files in --modules-dir"]);
        let ended = Running::start(kernel.command(&["--modules-dir", text(&dep), output, text(&dep)])).end();
        says(ended, 2, &[output, "--modules-dir", "are the same file"]);
    }
    assert_eq!(fs::read(&dep).unwrap(), before);
}

/// Modules that exec finds beside a kernel are shared if they are there, and no folder that a link puts in their place.
#[test]
fn modules_beside_a_kernel_are_shared_and_nothing_else() {
    let (_folder, path) = folder();
    let (root, package, private) = (path.join("root"), path.join("package"), path.join("private"));
    [&root, &private, &package.join("lib"), &package.join("usr/lib/modules")]
        .iter()
        .for_each(|dir| fs::create_dir_all(dir).unwrap());
    fs::write(package.join("bz"), "").unwrap();
    let shares = || {
        let mut command = vireo();
        command.args(["exec", "--print-config", "--root", text(&root), "--kernel", text(&package.join("bz"))]);
        let ended = Running::start(command).end().expect(0);
        String::from_utf8(ended.stdout).unwrap()
    };
    let ours = package.join("usr/lib/modules").canonicalize().unwrap();
    symlink("../usr/lib/modules", package.join("lib/modules")).unwrap();
    assert!(shares().contains(&format!("\"{}\"", text(&ours))), "{}", shares());
    fs::remove_file(package.join("lib/modules")).unwrap();
    symlink(&private, package.join("lib/modules")).unwrap();
    assert!(shares().contains(&format!("\"{}\"", text(&ours))) && !shares().contains("private"), "{}", shares());
}

/// A static program that does nothing for ever.
fn endless_program() -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let mut bytes = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    bytes.extend([BASE + HEADERS, 64, 0].map(u64::to_le_bytes).concat());
    bytes.extend([0, 0, 64, 56, 1, 64, 0, 0].map(u16::to_le_bytes).concat());
    bytes.extend([1, 5].map(u32::to_le_bytes).concat());
    bytes.extend([0, BASE, BASE, HEADERS + 2, HEADERS + 2, 0x1000].map(u64::to_le_bytes).concat());
    // A jump to itself.
    bytes.extend([0xEB, 0xFE]);
    bytes
}

/// A program to pack is not run here.
#[test]
fn a_busybox_is_packed_and_not_run() {
    let (_folder, path) = folder();
    // Whatever it is asked for, it never ends.
    let (busybox, kernel) = (path.join("busybox"), Kernel::new(&elf(crate::guests::power_off())));
    fs::write(&busybox, endless_program()).unwrap();
    fs::set_permissions(&busybox, fs::Permissions::from_mode(0o755)).unwrap();
    Running::start(kernel.command(&["--busybox", text(&busybox)])).end().expect(0);
}

#[test]
fn no_file_is_overwritten_that_is_needed() {
    let (_folder, path) = folder();
    let at = |name: &str| text(&path.join(name)).to_string();
    for name in ["disk", "initrd", "config"] {
        fs::write(path.join(name), vec![b'{'; 4096]).unwrap();
    }
    fs::hard_link(path.join("disk"), path.join("hard")).unwrap();
    symlink("disk", path.join("soft")).unwrap();
    let kernel = Kernel::new(&elf(crate::guests::power_off()));
    let image = fs::read(kernel.path()).unwrap();
    let itself = text(kernel.path()).to_string();
    let (disk, hard, soft, initrd, new) = (at("disk"), at("hard"), at("soft"), at("initrd"), at("new"));
    let to_file = format!("file:{disk}");
    let overlay = format!("{initrd},format=raw,overlay={new}");
    for (words, flags) in [
        ([&["--disk", &disk, "--vmcore", &disk][..]], ["--disk", "--vmcore"]),
        ([&["--disk", &disk, "--vmcore", &hard]], ["--disk", "--vmcore"]),
        ([&["--disk", &soft, "--report", &disk]], ["--disk", "--report"]),
        ([&["--disk", &disk, "--serial", &to_file]], ["--disk", "--serial"]),
        ([&["--disk", &disk, "--log-file", &disk]], ["--disk", "--log-file"]),
        ([&["--pmem", &disk, "--junit", &disk]], ["--pmem", "--junit"]),
        ([&["--initrd", &initrd, "--console-log", &initrd]], ["--initrd", "--console-log"]),
        ([&["--report", &itself]], ["--kernel", "--report"]),
        ([&["--report", &new, "--junit", &new]], ["--report", "--junit"]),
        ([&["--disk", &overlay, "--report", &new]], ["overlay", "--report"]),
    ] {
        let ended = Running::start(kernel.command(words[0])).end();
        says(ended, 2, &[flags[0], flags[1], "are the same file"]);
    }
    let config = at("config");
    let machine = vireo().args(["run", "--kernel", &itself, "--print-config"]).output().unwrap().stdout;
    fs::write(&config, &machine).unwrap();
    let mut command = vireo();
    command.args(["run", "--config", &config, "--report", &config]);
    says(Running::start(command).end(), 2, &["--config", "--report"]);
    // Whether this host has a kernel or not.
    let mut command = vireo();
    command.args(["exec", "--disk", &disk, "--report", &disk, "--", "true"]);
    says(Running::start(command).end(), 2, &["--disk", "--report", "are the same file"]);
    let ended = Running::start(kernel.command(&["--disk", &disk, "--disk", &hard])).end();
    says(ended, 2, &["--disk", "are the same disk", "readonly"]);
    let readonly = [format!("{disk},readonly"), format!("{hard},readonly")];
    Running::start(kernel.command(&["--disk", &readonly[0], "--disk", &readonly[1]])).end().expect(0);
    assert_eq!(fs::read(&disk).unwrap(), vec![b'{'; 4096]);
    assert_eq!(fs::read(&initrd).unwrap(), vec![b'{'; 4096]);
    assert_eq!((fs::read(kernel.path()).unwrap(), fs::read(&config).unwrap()), (image, machine));
    assert!(!path.join("new").exists());
}

#[test]
fn vireo_gains_no_privileges_and_cannot_be_read_by_others() {
    let (_folder, path) = folder();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    let fifo = path.join("config");
    let made = Command::new("mkfifo").args(["-m", "666"]).arg(&fifo).status().unwrap();
    assert!(made.success());
    // Runs as an ordinary user: root owns such a user's process in /proc only if the process cannot be dumped.
    let words = ["run", "--config", text(&fifo)];
    let mut command = vireo();
    if rustix::process::geteuid().is_root() {
        let program = command.get_program().to_owned();
        let copy = path.join("vireo");
        fs::copy(&program, &copy).unwrap();
        command = Command::new("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--"]).arg(copy);
    }
    command.args(words);
    let running = Running::start(command);
    // This open waits until vireo reads the FIFO.
    let mut config = File::options().write(true).open(&fifo).unwrap();
    let proc = format!("/proc/{}", running.child.id());
    let status = fs::read_to_string(format!("{proc}/status")).unwrap();
    assert!(status.contains("\nNoNewPrivs:\t1\n"), "{status}");
    assert_eq!(fs::metadata(format!("{proc}/environ")).unwrap().uid(), 0);
    config.write_all(b"{").unwrap();
    drop(config);
    running.end().expect(125);
}

/// A matrix in a folder of its own; the words follow its file's name.
fn matrix(path: &Path, file: &str, words: &[&str]) -> Ended {
    fs::write(path.join("m.toml"), file).unwrap();
    let mut command = vireo();
    command.current_dir(path).args(["exec", "--matrix", "m.toml"]).args(words).args(["--", "true"]);
    Running::start(command).end()
}

#[test]
fn a_matrix_overwrites_nothing_that_its_runs_need() {
    let (_folder, path) = folder();
    fs::write(path.join("k"), elf(crate::guests::power_off())).unwrap();
    let kept = ["k", "disk", "run.log", "top.qcow2"];
    ["disk", "run.log"].iter().for_each(|name| fs::write(path.join(name), vec![b'x'; 1 << 20]).unwrap());
    over(&path.join("disk"), &path.join("top.qcow2"));
    let before = kept.map(|name| fs::read(path.join(name)).unwrap());
    for (file, words, parts) in [
        ("disk = 'disk'", &["--report", "disk"][..], ["--report disk", "--disk disk of the run run"]),
        ("", &["--junit", "k"], ["--junit k", "--kernel k of the run run"]),
        ("console-log = 'm.toml'", &[], ["--matrix m.toml", "--console-log m.toml of the run run"]),
        ("log-file = 'm.toml'", &[], ["--matrix m.toml", "--log-file m.toml of the run run"]),
        ("disk = 'run.log'", &["--output-dir", "."], ["--output-dir ./run.log", "--disk run.log of the run run"]),
        ("console-log = 'new/run.log'", &["--output-dir", "new"], ["--output-dir new/run.log", "--console-log"]),
        ("disk = 'top.qcow2,format=qcow2'", &["--report", "disk"], ["--report disk", "base image"]),
        (
            "[configs.a]\nconsole-log = 'new'\n[configs.b]\nvmcore = 'new'",
            &[],
            ["--console-log new of the run a", "--vmcore new of the run b"],
        ),
        (
            "[configs.a]\ndisk = 'disk'\n[configs.b]\nconsole-log = 'disk'",
            &[],
            ["--disk disk of the run a", "--console-log disk of the run b"],
        ),
    ] {
        let file = format!("kernel = 'k'\n{file}\n");
        says(matrix(&path, &file, words), 2, &[&parts[..], &["are the same file"]].concat());
        assert_eq!(fs::read_to_string(path.join("m.toml")).unwrap(), file);
        assert!(kept.map(|name| fs::read(path.join(name)).unwrap()) == before, "{file}");
        assert!(!path.join("new").exists(), "{file}");
    }
}

#[test]
fn what_fails_for_one_run_of_a_matrix_is_that_one_s_end() {
    let (_folder, path) = folder();
    fs::write(path.join("k"), elf(crate::guests::power_off())).unwrap();
    ["od", "outside", "w"].iter().for_each(|name| fs::create_dir(path.join(name)).unwrap());
    symlink("../outside", path.join("od/b")).unwrap();
    fs::write(path.join("outside/precious"), "precious").unwrap();
    symlink("../outside/precious", path.join("w/planted")).unwrap();
    let file = "kernel = 'k'\njobs = 1\n[kernels.a]\nshare = ['w:/w:rw']\n[kernels.b]\n[kernels.c]\n[kernels.d]\n\
                console-log = 'w/planted'\n[configs.x]\n";
    let ended = matrix(&path, file, &["--output-dir", "od", "--report", "all.json", "--junit", "all.xml"]);
    let report: serde_json::Value = serde_json::from_slice(&fs::read(path.join("all.json")).unwrap()).unwrap();
    let runs: Vec<_> = report["runs"].as_array().unwrap().iter().collect();
    let detail = |n: usize| runs[n]["detail"].as_str().unwrap();
    for (n, name, reported) in [(0, "a/x", true), (1, "b/x", false), (2, "c/x", true), (3, "d/x", true)] {
        assert_eq!((&runs[n]["name"], &runs[n]["outcome"]), (&name.into(), &"failed".into()), "{report:#}");
        assert_eq!(runs[n]["report"].is_object(), reported, "{report:#}");
        assert_eq!(path.join(format!("od/{name}.json")).exists(), reported, "{report:#}");
    }
    // These ran, and told that this kernel is none for a command.
    assert!(detail(0).contains("no virtio_mmio") && detail(2).contains("no virtio_mmio"), "{report:#}");
    assert!(detail(1).starts_with("cannot write od/b/x.log: 'b' is no directory"), "{report:#}");
    // What one run's guest can write to is no place of the caller's to another run, either.
    assert!(detail(3).contains("is a symbolic link in"), "{report:#}");
    assert!(fs::read_to_string(path.join("all.xml")).unwrap().contains("tests=\"4\" failures=\"0\" errors=\"4\""));
    assert!(ended.stdout.ends_with(b"4 runs, 4 failed\n"), "{}", String::from_utf8_lossy(&ended.stdout));
    assert_eq!(fs::read_dir(path.join("outside")).unwrap().count(), 1);
    assert_eq!(fs::read_to_string(path.join("outside/precious")).unwrap(), "precious");
}

#[test]
fn no_folder_is_made_where_a_planted_link_leads() {
    let (_folder, path) = folder();
    fs::write(path.join("k"), elf(crate::guests::power_off())).unwrap();
    ["share", "outside"].iter().for_each(|name| fs::create_dir(path.join(name)).unwrap());
    symlink("../outside", path.join("share/out")).unwrap();
    let file = "kernel = 'k'\nshare = ['share:/s:rw']\n";
    let ended = matrix(&path, file, &["--output-dir", "share/out/new/deep", "--report", "all.json"]);
    says(ended, 125, &["cannot write share/out/new/deep", "a symbolic link in", "leads out of it"]);
    assert_eq!(fs::read_dir(path.join("outside")).unwrap().count(), 0);
    let report: serde_json::Value = serde_json::from_slice(&fs::read(path.join("all.json")).unwrap()).unwrap();
    assert_eq!(report["outcome"], "failed");
    matrix(&path, file, &["--output-dir", "share/new/deep"]).expect(125);
    assert!(path.join("share/new/deep/run.json").is_file());
}

#[test]
fn a_report_keeps_the_mode_of_the_one_it_replaces() {
    let (_folder, path) = folder();
    let kernel = Kernel::new(&elf(crate::guests::power_off()));
    let report = path.join("end.json");
    fs::write(&report, "before").unwrap();
    fs::set_permissions(&report, fs::Permissions::from_mode(0o600)).unwrap();
    Running::start(kernel.command(&["--report", text(&report)])).end().expect(0);
    assert!(fs::read_to_string(&report).unwrap().contains("powered-off"));
    assert_eq!(fs::metadata(&report).unwrap().permissions().mode() & 0o7777, 0o600);
}
