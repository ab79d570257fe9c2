//! `vireo exec` compared with `vireo run` and QEMU, in instructions.
//!
//! `cargo build --release && cargo bench --bench exec` measures, in the emulated host that counts instructions (see
//! `boot.rs`), from exec of the monitor to its exit: `vireo run` of a stock kernel to an init that ends immediately,
//! and `vireo exec -- true` with the host's files as its root, also cold: with an empty cache, as in the first run of a
//! kernel. Then it measures the cost of a MiB of a command's output on its way to a pipe, as the difference between a
//! long and a short run: through exec, and through QEMU's virtio-serial.
//!
//! With `VNG=/path/to/vng` (virtme-ng: `python3 -m venv V && V/bin/pip install virtme-ng`; it needs the package
//! `udev`), it measures `true` under the full kernel by both, with this machine's files as the root. These come over
//! the network there, and waiting for them makes the clock leap, so the measure is the time that the processor was
//! busy.

#[path = "common/mod.rs"]
mod common;

use std::fs::{self, File};
use std::io;
use std::process::ExitCode;

use common::{Facts, REPO, STAGE, best, in_host, target, text, vireo};

/// Number of runs of each; the first warms up caches and does not count.
const RUNS: usize = 4;
/// MiB of output in a long run.
const MIB: u32 = 16;
/// Bytes of output in a short one.
const SHORT: u32 = 65536;

/// Script that runs in the emulated host after [`STAGE`], as `sh -c SCRIPT sh VIREO IMAGES MODULES INITRD RUNS MIB`.
const SCRIPT: &str = r#"
images=$2 modules=$3
cp "$images/bzImage-cloud" "$images/initrd-min.cpio" "$dir/work"
cp "$4" "$dir/work/initrd"
for applet in true pidof; do ln -s busybox "$dir/bin/$applet"; done
mkdir "$dir/work/modules"
( cd "$modules" && find lib/modules -type f \( -name 'modules.*' -o -path '*/drivers/virtio/*' -o -path '*/fs/fuse/*' \
    -o -path '*/overlayfs/*' -o -name 'virtio_console.ko*' \) -exec cp --parents {} "$dir/work/modules" \; )
cat >"$dir/work/measure" <<'MEASURE'
export XDG_CACHE_HOME=$PWD
runs=$1 mib=$2
cmdline='console=ttyS0 reboot=t panic=-1 quiet'
now() { /bin/date +%s%N; }
# While a guest needs the only processor, its kernel is not stored in the cache.
vireo-keep "$PWD/vireo" <bzImage-cloud || { echo "failed: the kernel is not kept"; exit 1; }
cold_exec() { rm -rf cold; XDG_CACHE_HOME=$PWD/cold vireo_exec true; }
vireo_exec() { vireo exec --kernel bzImage-cloud --modules modules --memory 256M -- "$@"; }
one_run() { vireo run --kernel bzImage-cloud --initrd initrd-min.cpio --memory 256M --cmdline "$cmdline"; }
# QEMU ends with its guest, whose init is the tests'; it has no vsock and the like, but it has the port
qemu_output() {
    qemu-system-x86_64 -enable-kvm -M microvm,rtc=on,x-option-roms=off,auto-kernel-cmdline=on -bios qboot.rom \
        -cpu host -m 256 -smp 1 \
        -nodefaults -no-user-config -display none -serial file:console -no-reboot -kernel bzImage-cloud -initrd initrd \
        -append "$cmdline vireo.modules=virtio_mmio,virtio_console bytes=$1" \
        -device virtio-serial-device -chardev file,id=out,path=/proc/self/fd/1 -device virtserialport,chardev=out,name=out
}
exec_output() { vireo_exec dd if=/dev/zero bs=64k count=$(($1 >> 16)); }
# measured NAME COMMAND...: prints the cost of the command from beginning to end
measured() {
    name=$1
    shift
    echo begin
    start=$(now)
    "$@" >output 2>errors </dev/null
    status=$?
    end=$(now)
    [ $status = 0 ] && echo "instructions $name $((end - start))"
}
# piped NAME BYTES COMMAND: the same into a pipe, until all output has arrived
piped() {
    rm -f pipe
    mkfifo pipe
    echo begin
    start=$(now)
    "$3" $2 >pipe 2>errors </dev/null &
    dd iflag=fullblock bs=64k count=$(($2 >> 16)) of=/dev/null <pipe 2>output
    end=$(now)
    # QEMU's guest waits for this, because QEMU discards what is on its way to the host when the guest powers off.
    kill -9 $(pidof qemu-system-x86_64) 2>/dev/null
    wait
    grep -q "^$(($2 >> 16))+0 records in" output && echo "instructions $1 $2 $((end - start))"
}
# Restarts a guest that was stuck because of the host, and was killed (see `in_host`).
restarts=0
surely() {
    until "$@"; do
        restarts=$((restarts + 1))
        echo "trying again: $*"
        tail -n 5 output errors console
        [ $restarts -le 10 ] || { echo "failed: $*"; exit 1; }
    done
}
n=0
while [ $n -lt $runs ]; do
    surely measured 'run boot' one_run
    surely measured 'exec boot' vireo_exec true
    surely measured 'cold boot' cold_exec
    sleep 0.2 # lets the process end that would have cached the kernel
    for bytes in 65536 $(((mib << 20) + 65536)); do
        surely piped exec-output $bytes exec_output
        surely piped qemu-output $bytes qemu_output
    done
    n=$((n + 1))
done
MEASURE
inside sh measure "$5" "$6"
"#;

/// Script that runs in the emulated host, as `sh -c SCRIPT sh VIREO VNG KERNEL RUNS`.
const BESIDE_VNG: &str = r#"
vireo=$1 vng=$2 kernel=$3
export HOME=/tmp XDG_CACHE_HOME=/tmp PATH=${vng%/*}:$PATH:/usr/sbin:/sbin # vng starts other programs of its package
cd /tmp
busy() { read -r _ user nice system _ _ irq softirq _ </proc/stat; echo $((user + nice + system + irq + softirq)); }
# measured NAME COMMAND...: measures in hundredths of a second
measured() {
    name=$1
    shift
    echo begin
    start=$(busy)
    "$@" >output 2>errors </dev/null
    status=$?
    end=$(busy)
    if [ $status = 0 ]; then
        echo "instructions $name $(((end - start) * 10000000))"
    else
        echo "$name ended with $status"
        tail -n 5 output errors
    fi
}
while sleep 5; do echo "the clock moves"; done &
trap 'kill $!' EXIT
for n in $(seq "$4"); do
    measured 'exec full' "$vireo" exec --kernel "$kernel" --modules "${kernel%/boot/*}" --memory 512M -- true
    # Without --verbose, vng ends with 255 here.
    measured 'vng full' "$vng" --verbose --force-9p -r "$kernel" --memory 512M --user root -- true
done
"#;

/// Script in QEMU's guest: writes as many bytes to the port as the command line says.
const GUEST: &str = "for word in $(cat /proc/cmdline); do case $word in bytes=*) bytes=${word#bytes=} ;; esac; done
until [ -e /dev/vport0p1 ]; do sleep 0.01; done
dd if=/dev/zero bs=64k count=$((bytes >> 16)) >/dev/vport0p1
read forever
";

fn main() -> ExitCode {
    common::exit("exec", bench())
}

fn bench() -> Result<(), String> {
    let vireo = vireo();
    if !vireo.exists() {
        return Err(format!("there is no {}: run `cargo build --release` first", vireo.display()));
    }
    let (images, share) = (format!("{REPO}/target/host/images"), format!("{REPO}/target/host/share/bench"));
    let (initrd, modules) = (format!("{share}/initrd-output"), format!("{REPO}/target/host/kernel-cloud"));
    fs::create_dir_all(&share).and_then(|()| write_initrd(&images, &initrd)).map_err(|e| format!("{initrd}: {e}"))?;
    let (vireo, mut facts) = (vireo.display().to_string(), Facts::new());
    let args = [&vireo, &images, &modules, &initrd, &RUNS.to_string(), &MIB.to_string()];
    in_host(&["--icount"], &format!("{STAGE}{SCRIPT}"), &args.map(String::as_str), &mut facts)?;
    if let Some(vng) = std::env::var_os("VNG") {
        let kernel = fs::read_dir(format!("{REPO}/target/host/kernel-full/boot"))
            .map_err(|e| format!("kernel-full: {e}"))?
            .filter_map(|entry| Some(entry.ok()?.path().display().to_string()))
            .find(|path| path.contains("/vmlinuz-"))
            .ok_or("there is no kernel in kernel-full")?;
        let args = [&vireo, &vng.display().to_string(), &kernel, &RUNS.to_string()];
        in_host(&["--icount"], BESIDE_VNG, &args.map(String::as_str), &mut facts)?;
    }
    print(&facts);
    Ok(())
}

/// Writes the tests' guest, with its script.
fn write_initrd(images: &str, initrd: &str) -> io::Result<()> {
    fs::copy(format!("{images}/initrd-busybox.cpio"), initrd)?;
    let script = cpio::NewcBuilder::new("test.sh").mode(0o100_755);
    let file = File::options().append(true).open(initrd)?;
    cpio::write_cpio([(script, io::Cursor::new(GUEST.as_bytes()))].into_iter(), file).map(|_| ())
}

fn print(facts: &Facts) {
    let boot = |monitor| best(facts, "instructions", monitor, "boot").map(|value| value / 1e6);
    let output = |monitor: &str| {
        let get = |bytes: u32| best(facts, "instructions", monitor, &bytes.to_string());
        Some((get((MIB << 20) + SHORT)? - get(SHORT)?) / f64::from(MIB) / 1e3)
    };
    let (run, exec, cold) = (boot("run"), boot("exec"), boot("cold"));
    let (ours, qemu) = (output("exec-output"), output("qemu-output"));
    println!("\nBest of {}, instructions", RUNS - 1);
    println!("{:<44}{:>10}", "vireo run to an init that ends, M", text(run, 0));
    println!("{:<44}{:>10}", "vireo exec -- true, M", text(exec, 0));
    println!("{:<44}{:>10}", "the same with an empty cache, M", text(cold, 0));
    println!("{:<44}{:>10}", "a MiB of output, QEMU virtio-serial, K", text(qemu, 0));
    println!("{:<44}{:>10}", "a MiB of output, vireo exec, K", text(ours, 0));
    for (monitor, name) in [("exec", "vireo exec"), ("vng", "virtme-ng")] {
        if let Some(value) = best(facts, "instructions", monitor, "full") {
            println!("{:<44}{:>10}", format!("{name}, full kernel, host's files, M"), text(Some(value / 1e6), 0));
        }
    }
    println!("\n{:<58}{:>9}{:>9}", "", "here", "target");
    target("exec -- true, times run to an init that ends", exec.zip(run).map(|(exec, run)| exec / run), 1.4, 2);
    target("exec -- true, first run, times later ones", cold.zip(exec).map(|(cold, exec)| cold / exec), 1.25, 2);
    // 0.8 of the throughput is 1.25 times the work.
    target("a MiB of output, times QEMU's instructions", ours.zip(qemu).map(|(ours, qemu)| ours / qemu), 1.25, 2);
}
