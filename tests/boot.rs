//! Stock kernels of every format boot to user space and find the machine that was requested.

use std::fs;
use std::process::Command;

use crate::common::{Ended, Run, image, repo};

/// Script with which the guest reports facts about itself; each line is an [`Ended::fact`].
const FACTS: &str = r#"
echo "cpus: $(nproc)"
echo "release: $(uname -r)"
echo "cmdline: $(cat /proc/cmdline)"
echo "memory: $(sed -n 's/^MemTotal: *//p' /proc/meminfo)"
echo "text: $(grep -m 1 ' _text$' /proc/kallsyms | cut -d ' ' -f 1)"
echo "loadflags: $(od -An -tx1 -j529 -N1 /sys/kernel/boot_params/data)" # 0x211
echo "segments: $(head -c 4096 /proc/kcore | od -An -v -tx8 -w56 -j64 | cut -d ' ' -f 4,5 | tr '\n' ',')"
"#;

/// Boots `run` to user space, where it must find this many CPUs.
fn boots(run: Run, cpus: u32) -> Ended {
    let ended = run.args(&["--cpus", &cpus.to_string()]).run_to_end().success();
    assert_eq!(ended.fact("cpus"), cpus.to_string(), "{ended}");
    ended
}

/// Returns the address of the kernel's text and, from the RAM segments in /proc/kcore, that of its map of all RAM.
fn addresses(ended: &Ended) -> (u64, u64) {
    let hex =
        |text: &str| u64::from_str_radix(text, 16).unwrap_or_else(|_| panic!("'{text}' is not a number: {ended}"));
    let segments = ended.fact("segments").split(',').filter_map(|segment| segment.split_once(' '));
    let direct_map = segments.map(|(virt, phys)| (hex(virt), hex(phys))).find_map(|(virt, phys)| {
        (virt >> 47 == 0x1_FFFF && virt < 0xFFFF_FFFF_8000_0000 && phys < 1 << 40).then(|| virt - phys)
    });
    (hex(ended.fact("text")), direct_map.unwrap_or_else(|| panic!("no RAM in /proc/kcore: {ended}")))
}

const TEXT: u64 = 0xFFFF_FFFF_8100_0000;
const DIRECT_MAP: u64 = 0xFFFF_8880_0000_0000;

#[test]
fn cloud_kernel_with_1_2_and_4_cpus_each_at_other_addresses() {
    let mut seen = Vec::new();
    for cpus in [1, 2, 4] {
        let ended = boots(Run::new("bzImage-cloud", FACTS), cpus);
        // KASLR_FLAG: the guest also randomises its memory layout.
        let loadflags = u8::from_str_radix(ended.fact("loadflags").trim(), 16).unwrap();
        assert_eq!(loadflags & 2, 2, "{ended}");
        seen.push(addresses(&ended));
    }
    // By chance, one of the three boots may use the address of another, or the one that it was linked at; not all of
    // them.
    assert!(
        seen.iter().any(|(text, _)| *text != seen[0].0) && seen.iter().any(|(_, map)| *map != seen[0].1),
        "{seen:x?}"
    );
    assert!(seen.iter().any(|(text, _)| *text != TEXT) && seen.iter().any(|(_, map)| *map != DIRECT_MAP), "{seen:x?}");
}

#[test]
fn full_kernel_with_1_2_and_4_cpus() {
    for cpus in [1, 2, 4] {
        let ended = boots(Run::new("bzImage-full", FACTS), cpus);
        assert!(ended.fact("release").ends_with("-amd64") && !ended.fact("release").contains("cloud"), "{ended}");
    }
}

/// The machine as the guest sees it, with a kernel that runs where it was linked.
#[test]
fn the_machine_that_was_asked_for() {
    let uuid = "5f0c94b1-6b5d-4b9c-a1b7-2f6f8d1f3c11";
    let script = r#"
echo "uuid: $(cat /sys/class/dmi/id/product_uuid)"
echo "clock: $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
echo "topology: $(cd /sys/devices/system/cpu; for c in cpu?; do cat $c/topology/physical_package_id $c/topology/core_id $c/topology/thread_siblings_list; done | tr '\n' ' ')"
echo "flags: $(grep -m 1 ^flags /proc/cpuinfo)"
echo "x2apic: $(dmesg | grep -ci x2apic)"
echo "crng: $(dmesg | grep -c 'crng init done')"
echo "seed: $(dmesg | grep -c 'random: .*SMBIOS\|random: crng init done')"
echo "kvm: $(dmesg | grep 'Hypervisor detected')"
"#;
    // Odd spacing and quotes must arrive unchanged.
    let cmdline = "console=ttyS0  quiet nokaslr foo=\"a b\" vireo.modules=none  -- x";
    let run = Run::new("vmlinux-cloud", &format!("{FACTS}{script}")).cmdline(cmdline);
    let ended = boots(run.args(&["--uuid", uuid, "--cpu", "-sse4_2", "--memory", "512M"]), 2);
    assert_eq!(ended.fact("cmdline"), cmdline, "{ended}");
    assert_eq!(addresses(&ended), (TEXT, DIRECT_MAP), "{ended}");
    assert_eq!(ended.fact("uuid"), uuid, "{ended}");
    assert_eq!(ended.fact("clock"), "kvm-clock", "{ended}");
    assert!(ended.fact("kvm").contains("KVM"), "{ended}");
    assert_eq!(ended.fact("topology").trim(), "0 0 0 0 1 1", "one socket, two cores, one thread each: {ended}");
    let flags: Vec<&str> = ended.fact("flags").split_whitespace().collect();
    assert!(flags.contains(&"x2apic") && flags.contains(&"hypervisor") && flags.contains(&"sse4_1"), "{ended}");
    assert!(!flags.contains(&"sse4_2"), "{ended}");
    assert_ne!(ended.fact("x2apic"), "0", "{ended}");
    assert_ne!(ended.fact("crng"), "0", "{ended}");
    memory_is(&ended, 512);
}

/// Checks that the guest has `mib` MiB of memory, some of which its kernel keeps for itself.
fn memory_is(ended: &Ended, mib: u64) {
    let kib: u64 = ended.fact("memory").trim_end_matches(" kB").parse().unwrap();
    let least = mib * 1024 / 100 * 85 - (40 << 10).min(mib * 1024 / 2);
    assert!(kib > least && kib < mib * 1024, "{mib} MiB: {ended}");
}

#[test]
fn through_the_kernels_own_decompressor() {
    let ended = boots(Run::new("bzImage-cloud", FACTS).args(&["--boot", "bzimage", "--memory", "3584M"]), 2);
    // The last 512 MiB lie above the MMIO hole.
    memory_is(&ended, 3584);
}

#[test]
fn through_pvh() {
    let run = Run::new("vmlinux-cloud", FACTS).args(&["--boot", "pvh", "--memory", "256M,shared=on"]);
    memory_is(&boots(run, 1), 256);
}

/// Returns the path of vmlinux, packed by a filter command; the file is created once for all runs of the tests.
fn packed(name: &str, command: &str) -> String {
    let (folder, kernel) = (repo("target/host/packed"), image("vmlinux-cloud"));
    fs::create_dir_all(&folder).unwrap();
    let file = folder.join(name);
    let newer = |a: &std::path::Path, b: &std::path::Path| {
        let time = |path: &std::path::Path| fs::metadata(path).and_then(|m| m.modified()).ok();
        time(a) > time(b)
    };
    if !newer(&file, &kernel) {
        let partial = folder.join(format!("{name}.new"));
        let script = format!("{command} <'{}' >'{}'", kernel.display(), partial.display());
        assert!(Command::new("sh").args(["-c", &script]).status().unwrap().success(), "{command} failed");
        fs::rename(partial, &file).unwrap();
    }
    file.display().to_string()
}

// Each test uses another kind of memory, which saves boots.

#[test]
fn gzip_and_a_cache_that_cannot_be_written() {
    let kernel = packed("gzip", "gzip -1");
    boots(Run::new(&kernel, FACTS).env("XDG_CACHE_HOME=/proc/nowhere"), 1);
}

#[test]
fn zstd_without_huge_pages() {
    boots(Run::new(&packed("zstd", "zstd -qc"), FACTS).args(&["--memory", "256M,hugepages=off"]), 1);
}

#[test]
fn xz_with_huge_pages() {
    boots(Run::new(&packed("xz", "xz -0"), FACTS).args(&["--memory", "256M,hugepages=thp"]), 1);
}

/// Uses the host's own pool of huge pages, which is enlarged for this test if it is too small.
#[test]
fn in_huge_pages_of_the_pool() {
    let wrapper = "pool=/proc/sys/vm/nr_hugepages; before=$(cat $pool)
[ $before -ge 128 ] || echo 128 >$pool
[ $(cat $pool) -ge 128 ] || { echo 'cannot reserve 128 huge pages: run sysctl vm.nr_hugepages=128' >&2; exit 99; }
\"$@\"
code=$?
[ $before -ge 128 ] || echo $before >$pool
exit $code";
    let run = Run::new("vmlinux-cloud", FACTS).args(&["--memory", "256M,hugepages=2M"]).through(wrapper);
    memory_is(&boots(run, 1), 256);
}

#[test]
fn lz4_in_prefaulted_memory() {
    boots(Run::new(&packed("lz4", "lz4 -qc"), FACTS).args(&["--memory", "256M,prefault=on"]), 1);
}

#[test]
fn legacy_lz4_in_shared_memory() {
    boots(Run::new(&packed("lz4-legacy", "lz4 -qcl"), FACTS).args(&["--memory", "256M,shared=on"]), 1);
}

/// Boots near the minimum for Debian's cloud kernel: its image needs 62M, which vireo enforces; below 80M the kernel
/// lacks memory even for an initramfs of one small program, and this initramfs is larger.
#[test]
fn bzip2_in_little_memory() {
    let ended = boots(Run::new(&packed("bzip2", "bzip2 -1"), FACTS).args(&["--memory", "96M"]), 1);
    memory_is(&ended, 96);
}

/// The full kernel reads MP tables; the cloud kernel is built without them. Neither accepts `virtio_mmio.device=`, so
/// the disk only shows on the command line.
#[test]
fn without_acpi() {
    let run = Run::new("bzImage-full", FACTS).args(&["--acpi", "off"]);
    fs::write(run.path("disk"), [b'x'; 4096]).unwrap();
    let disk = run.path("disk");
    let ended = run.args(&["--disk", &disk, "--cpus", "2"]).run_to_end();
    assert!(ended.stdout.contains("/test.sh ended with status 0"), "{ended}");
    assert_eq!(ended.fact("cpus"), "2", "{ended}");
    assert!(ended.fact("cmdline").starts_with("console=ttyS0 quiet virtio_mmio.device="), "{ended}");
}
