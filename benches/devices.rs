//! Devices of vireo and of QEMU microvm, in instructions.
//!
//! `cargo build --release && cargo bench --bench devices` runs the same load in the same guest under both, in the
//! emulated host that counts instructions (see `boot.rs`), by the guest's clock: guest, KVM and monitor together. Disks
//! are files in the page cache, QEMU's with an iothread, `aio=io_uring` and the same cache mode; networks are taps with
//! a server on the host. `BENCH_PARTS=net,balloon` measures only these.

#[path = "common/mod.rs"]
mod common;

use std::fs::{self, File};
use std::io;
use std::process::ExitCode;

use common::{Facts, REPO, STAGE, best, in_host, target, text, vireo};

/// Loads on each disk: direction, order, bytes, depth.
const LOADS: [(&str, &str, u32, u32); 8] = [
    ("read", "seq", 131_072, 1),
    ("read", "seq", 131_072, 32),
    ("write", "seq", 131_072, 1),
    ("write", "seq", 131_072, 32),
    ("read", "rand", 4096, 1),
    ("read", "rand", 4096, 32),
    ("write", "rand", 4096, 1),
    ("write", "rand", 4096, 32),
];
const FORMATS: [&str; 2] = ["raw", "qcow2"];

/// Script in the guest: runs the command that follows a name on a line of the console, and answers with the name and
/// the command's output.
const GUEST: &str = "modprobe -a virtio_net af_packet 2>/dev/null
stty raw -echo
echo guest ready
while read -r name command; do
    [ \"$name\" = end ] && break
    echo \"result $name $($command)\"
done
";

/// Script that runs in the emulated host after [`STAGE`], as `sh -c SCRIPT sh VIREO IMAGES INITRD LOADS PARTS`.
const SCRIPT: &str = r#"
images=$2
cp "$images/bzImage-cloud" "$images/load" "$3" "$dir/work"
chmod +x "$dir/work/load"
ip link del bench0 2>/dev/null
ip tuntap add dev bench0 mode tap && ip addr add 10.9.0.1/24 dev bench0 && ip link set bench0 up
cat >"$dir/work/measure" <<'MEASURE'
export XDG_CACHE_HOME=$PWD
loads=$1 parts=,$2,
wanted() { case $parts in *,$1,*) ;; *) return 1 ;; esac; }
dd if=/dev/urandom of=/disks/raw bs=1M count=64 2>/dev/null
qemu-img convert -O qcow2 /disks/raw /disks/qcow2
cat /disks/raw /disks/qcow2 >/dev/null
echo 0 >/proc/sys/vm/dirty_writeback_centisecs # no background writes during a load
mkfifo in out
exec 3<>in 4<>out
restarts=0
fail() { echo "failed: $*"; kill -9 $vm; exit 1; }
# Waits for a line, for ten seconds of this host's clock, which leaps when nothing runs. Prints errors that come
# instead.
until_line() {
    while read -t 10 -r line <&4; do
        case $line in
            *"$1"*) return ;;
            *panic* | *"rror: "* | vireo:* | qemu*) echo "$monitor: $line" ;;
        esac
    done
    return 1
}
# begin MONITOR MEMORY OPTIONS [COMMAND]: the guest runs the command first
begin() {
    monitor=$1 memory=$2 options=$3 first=${4-}
    boot || again
}
boot() {
    case $monitor in
        qemu) qemu-system-x86_64 -enable-kvm -M microvm,rtc=on,x-option-roms=off,auto-kernel-cmdline=on -bios qboot.rom \
            -cpu host \
            -m $memory -smp 1 -nodefaults -no-user-config -display none -serial stdio -no-reboot -kernel bzImage-cloud \
            -initrd initrd -append 'console=ttyS0 reboot=t panic=-1 quiet' $options <&3 >&4 2>&1 & ;;
        vireo) vireo run --kernel bzImage-cloud --initrd initrd --memory ${memory}M \
            --cmdline 'console=ttyS0 reboot=t panic=-1 quiet' $options <&3 >&4 2>&1 & ;;
    esac
    vm=$!
    until_line 'guest ready' && { [ -z "$first" ] || try $first; }
}
# Counts a guest that was stuck because of the host, and was killed (see `in_host`).
stuck() {
    restarts=$((restarts + 1))
    [ $restarts -le 10 ] || fail "the guests get stuck over and over"
    echo "a guest of $monitor is stuck; starting it again"
    kill -9 $vm 2>/dev/null
    wait $vm
    while read -t 1 -r line <&3; do :; done
    while read -t 1 -r line <&4; do :; done
}
again() { stuck; boot || again; }
# try NAME COMMAND, ask NAME COMMAND: set $answer, and $exits to the number of MMIO exits in the meantime
try() {
    local before
    before=$(mmio_exits)
    echo "$*" >&3
    until_line "result $1" || return
    exits=$(($(mmio_exits) - before))
    answer=${line#*"result $1 "}
    answer=${answer%%[!0-9]*}
}
ask() {
    until try "$@"; do again; done
    [ "${answer:-0}" -gt 0 ] || fail "$*: no answer"
}
end() {
    echo end >&3
    wait $vm
}
mmio_exits() { cat /sys/kernel/debug/kvm/$vm-*/mmio_exits; }

disks() {
    for monitor in qemu vireo; do
        case $monitor in
            qemu)
                options='-object iothread,id=io'
                for format in raw qcow2; do
                    options="$options -drive if=none,id=$format,file=/disks/$format,format=$format,aio=io_uring,cache=writeback
                        -device virtio-blk-device,drive=$format,iothread=io"
                done ;;
            vireo) options='--disk /disks/raw --disk /disks/qcow2,format=qcow2' ;;
        esac
        begin $monitor 256 "$options"
        # QEMU fills its slots from the other end.
        for format in raw qcow2; do
            disk=/dev/vda
            case $monitor-$format in qemu-raw | vireo-qcow2) disk=/dev/vdb ;; esac
            for load in $loads; do
                IFS=,
                set -- $load
                unset IFS
                count=256
                [ $3 -gt 4096 ] || count=2048
                for round in 1 2 3; do
                    ask disk load disk $disk $1 $2 $3 $4 $count
                    echo "disk $monitor $format,$load $((answer / count))"
                done
                echo "mmio $monitor $format,$load $((exits * 1000 / count))"
            done
        done
        end
    done
}

networks() {
    ./load serve 5001 &
    server=$!
    for monitor in qemu vireo; do
        for vhost in off on; do
            case $monitor in
                qemu) options="-netdev tap,id=n,ifname=bench0,script=no,downscript=no,vhost=$vhost
                    -device virtio-net-device,netdev=n" ;;
                vireo) options="--net tap=bench0,vhost=$vhost" ;;
            esac
            begin $monitor 256 "$options" 'up ifconfig eth0 10.9.0.2 netmask 255.255.255.0 up'
            for round in 1 2 3; do
                for load in send receive; do
                    ask net load $load 10.9.0.1 5001 64
                    echo "net $monitor $load,vhost=$vhost $((answer / 64))"
                done
            done
            end
        done
    done
    kill $server
}

# Costs of the monitor itself when it gives 1 GiB back: its threads except the vCPU's, and its system calls for that.
cpu() {
    for task in /proc/$vm/task/*; do
        case $(cat $task/comm) in vcpu* | CPU*) ;; *) cat $task/schedstat ;; esac
    done | awk '{ sum += $1 } END { printf "%.0f", sum }'
}
trace=/sys/kernel/tracing
echo 16384 >$trace/buffer_size_kb
mkfifo monitor.in monitor.out
exec 5<>monitor.in 6<>monitor.out
balloon() {
    begin $1 1536 "$2" 'fill sh /fill'
    echo >$trace/trace
    echo 1 >$trace/events/syscalls/sys_enter_madvise/enable
    before=$(cpu)
    [ $1 = vireo ] || echo 'balloon 512' >&5
    try balloon sh /balloon || return
    echo "balloon $1 CPU $(($(cpu) - before))"
    echo 0 >$trace/events/syscalls/sys_enter_madvise/enable
    echo "balloon $1 madvise $(grep -c 'sys_madvise(' $trace/trace)"
    end
}
balloons() {
    for monitor in qemu vireo; do
        case $monitor in
            qemu) options='-device virtio-balloon-device -chardev pipe,id=monitor,path=monitor -mon chardev=monitor
                -name guest,debug-threads=on' ;;
            vireo) options='--balloon 1G' ;;
        esac
        until balloon $monitor "$options"; do stuck; done
    done
}

wanted disk && disks
wanted net && networks
wanted balloon && balloons
rm /disks/raw /disks/qcow2
MEASURE
inside sh measure "$4" "$5"
"#;

/// Script that touches all of the memory that the balloon will take, and frees it.
const FILL: &str = "mount -t tmpfs -o size=1100m none /mnt
dd if=/dev/zero of=/mnt/file bs=1M count=1100 2>/dev/null
umount /mnt
echo 1
";

/// Script that waits until the balloon has the memory.
const BALLOON: &str = "total() { sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo; }
before=$(total)
modprobe virtio_balloon
until [ $(total) -le $((before - 1048576)) ]; do sleep 0.1; done
echo 1
";

fn main() -> ExitCode {
    common::exit("devices", bench())
}

fn bench() -> Result<(), String> {
    let vireo = vireo();
    if !vireo.exists() {
        return Err(format!("there is no {}: run `cargo build --release` first", vireo.display()));
    }
    let (images, share) = (format!("{REPO}/target/host/images"), format!("{REPO}/target/host/share/bench"));
    let initrd = format!("{share}/initrd");
    fs::create_dir_all(&share).and_then(|()| write_initrd(&images, &initrd)).map_err(|e| format!("{initrd}: {e}"))?;
    let loads: Vec<String> = LOADS.map(|load| name(&load)).into();
    let mut facts = Facts::new();
    let parts = std::env::var("BENCH_PARTS").unwrap_or_else(|_| "disk,net,balloon".into());
    let (vireo, loads) = (vireo.display().to_string(), loads.join(" "));
    in_host(&["--icount"], &format!("{STAGE}{SCRIPT}"), &[&vireo, &images, &initrd, &loads, &parts], &mut facts)?;
    print(&facts);
    Ok(())
}

fn name((direction, order, block, depth): &(&str, &str, u32, u32)) -> String {
    format!("{direction},{order},{block},{depth}")
}

/// Writes the tests' guest, with the load program and its script.
fn write_initrd(images: &str, initrd: &str) -> io::Result<()> {
    fs::copy(format!("{images}/initrd-busybox.cpio"), initrd)?;
    let load = fs::read(format!("{images}/load"))?;
    let files: [(&str, &[u8]); 4] = [
        ("test.sh", GUEST.as_bytes()),
        ("fill", FILL.as_bytes()),
        ("balloon", BALLOON.as_bytes()),
        ("bin/load", &load),
    ];
    let entries = files.map(|(name, content)| (cpio::NewcBuilder::new(name).mode(0o100_755), io::Cursor::new(content)));
    cpio::write_cpio(entries.into_iter(), File::options().append(true).open(initrd)?).map(|_| ())
}

fn print(facts: &Facts) {
    println!("\n{:<34}{:>12}{:>12}{:>8}", "", "QEMU", "vireo", "ratio");
    let row = |fact: &str, case: &str, what: &str, per: f64| {
        let get = |monitor| best(facts, fact, monitor, case).map(|value| value / per);
        let (qemu, ours) = (get("qemu"), get("vireo"));
        let ratio = qemu.zip(ours).map(|(qemu, ours)| ours / qemu);
        println!("{what:<34}{:>12}{:>12}{:>8}", text(qemu, 0), text(ours, 0), text(ratio, 2));
        ratio
    };
    let measured = |fact: &str| facts.keys().any(|(name, ..)| name == fact);
    let (mut worst, mut worst_deep, mut exits): (f64, f64, f64) = (0.0, 0.0, 0.0);
    for format in FORMATS.into_iter().filter(|_| measured("disk")) {
        for load in &LOADS {
            let (direction, order, block, depth) = load;
            let case = format!("{format},{}", name(load));
            let small = *block == 4096;
            let per = if small { "4K" } else { "MiB" };
            let what = format!("{format} {order} {direction}, depth {depth}, a {per}");
            let ratio = row("disk", &case, &what, if small { 1.0 } else { f64::from(*block) / 1048576.0 });
            worst = worst.max(ratio.unwrap_or(f64::INFINITY));
            if *depth > 1 {
                exits = exits.max(best(facts, "mmio", "vireo", &case).unwrap_or(f64::INFINITY));
                if small {
                    worst_deep = worst_deep.max(ratio.unwrap_or(f64::INFINITY));
                }
            }
        }
    }
    let mut worst_net: f64 = 0.0;
    for (vhost, port) in [("off", "tap"), ("on", "vhost")].into_iter().filter(|_| measured("net")) {
        for (load, what) in [("send", "guest to host"), ("receive", "host to guest")] {
            let ratio = row("net", &format!("{load},vhost={vhost}"), &format!("{port}, {what}, a MiB"), 1.0);
            worst_net = worst_net.max(ratio.unwrap_or(f64::INFINITY));
        }
    }
    if measured("balloon") {
        row("balloon", "CPU", "1 GiB to the balloon, M", 1e6);
        row("balloon", "madvise", "  calls of madvise for it", 1.0);
    }
    println!("\n{:<58}{:>9}{:>9}", "", "here", "target");
    if measured("disk") {
        target("disks, share of QEMU's instructions, at most", Some(worst), 1.0, 2);
        target("disks, 4K at depth 32, at most", Some(worst_deep), 0.8, 2);
        target("disks, MMIO exits per 1000 requests at depth 32", Some(exits), 65.0, 0);
    }
    if measured("net") {
        target("networks, share of QEMU's instructions, at most", Some(worst_net), 1.0, 2);
    }
}
