//! Boot time of stock kernels in vireo and in QEMU microvm, in instructions.
//!
//! `cargo build --release && cargo bench --bench boot` runs both in the emulated host that counts instructions
//! (`tests/host/up --icount`): one instruction is one nanosecond of its clock, whatever else the machine does. The
//! clock runs from exec of the monitor to its exit: monitor, KVM and guest. Idle time counts, and `rep movs` counts
//! once per byte. Wall time is shown beside it. vireo is measured with its kernel in the cache, and cold: with an empty
//! cache, as in the first boot of a kernel.

#[path = "common/mod.rs"]
mod common;

use std::process::ExitCode;

use common::{Facts, REPO, STAGE, best, in_host, target, text, vireo};

const KERNELS: [&str; 2] = ["vmlinux-cloud", "bzImage-cloud"];
/// Cost of each in Firecracker 1.17-dev without seccomp, in billions of instructions: measured once, in an emulated
/// host of this kind (Debian 12's 6.1 in QEMU 10.0) with the same files, guest size and command line. It lets the guest
/// unpack a bzImage. `make setup` does not fetch it, so it is not run here.
const FIRECRACKER: [f64; 2] = [1.62, 1.79];
/// Number of runs of each pair; the first warms up caches and does not count.
const RUNS: usize = 6;

/// Script that runs in the emulated host after [`STAGE`], as `sh -c SCRIPT sh VIREO IMAGES RUNS`, and prints one fact
/// per line: `begin`, then `<fact> <monitor> <kernel> <number>`, or `failed ...`.
const SCRIPT: &str = r#"
vireo=$1 images=$2 runs=$3
cp "$images"/vmlinux-cloud "$images"/bzImage-cloud "$images"/initrd-min.cpio "$dir/work"
monitors=qemu
[ -z "$vireo" ] || monitors='qemu vireo cold'
cat >"$dir/work/measure" <<'MEASURE'
monitors=$1 runs=$2
trace=/sys/kernel/tracing

cmdline='console=ttyS0 reboot=t panic=-1 quiet'
boot() {
    export XDG_CACHE_HOME=$PWD
    case $1 in
        qemu) set -- qemu-system-x86_64 -enable-kvm -M microvm,rtc=on,x-option-roms=off,auto-kernel-cmdline=on \
            -bios qboot.rom -cpu host -m 256 -smp 1 -nodefaults -no-user-config -display none -serial stdio -no-reboot \
            -kernel "$2" -initrd initrd-min.cpio -append "$cmdline" ;;
        cold)
            rm -rf cold
            export XDG_CACHE_HOME=$PWD/cold
            set -- vireo run --kernel "$2" --initrd initrd-min.cpio --memory 256M --cmdline "$cmdline"
            ;;
        vireo) set -- vireo run --kernel "$2" --initrd initrd-min.cpio --memory 256M --cmdline "$cmdline" ;;
        nokaslr) set -- vireo run --kernel "$2" --initrd initrd-min.cpio --memory 256M --cmdline "$cmdline nokaslr" ;;
    esac
    start=$(/bin/date +%s%N)
    "$@" >console 2>&1 </dev/null
    status=$?
    end=$(/bin/date +%s%N)
    if [ $status != 0 ] || ! grep -q 'init running' console; then
        echo "status $status: $*"
        tail -n 20 console
        return 1
    fi
}
# A guest that was stuck, for which the host is to blame, was killed (see `in_host`) and is started again.
restarts=0
surely() {
    until "$@"; do
        restarts=$((restarts + 1))
        echo "once more: $*"
        [ $restarts -le 10 ] || { echo "failed: $*"; exit 1; }
        echo begin
    done
}

for kernel in vmlinux-cloud bzImage-cloud; do
    # While a guest needs the only processor, its kernel is not stored in the cache.
    case $monitors in *vireo*) vireo-keep "$PWD/vireo" <$kernel || { echo "failed: $kernel is not kept"; exit 1; } ;; esac
    n=0
    while [ $n -lt "$runs" ]; do
        for monitor in $monitors; do
            echo begin
            surely boot $monitor $kernel
            echo "instructions $monitor $kernel $((end - start))"
            sleep 0.2 # lets the process end that would have cached the kernel of a cold boot
        done
        n=$((n + 1))
    done
done

case $monitors in *vireo*) more=nokaslr ;; esac
echo 65536 >$trace/buffer_size_kb
echo 0 >$trace/options/overwrite # the first entry is among the first events
traced() {
    for event in $3; do echo 1 >$trace/events/$event/enable; done
    echo >$trace/trace
    surely boot $1 $2
    for event in $3; do echo 0 >$trace/events/$event/enable; done
    cat $trace/trace
    echo >$trace/trace
}
for kernel in vmlinux-cloud bzImage-cloud; do
    for monitor in $monitors $more; do
        [ $monitor = nokaslr ] || [ $monitor = cold ] ||
            echo "exits $monitor $kernel $(traced $monitor $kernel kvm/kvm_userspace_exit | grep -c 'kvm_userspace_exit:')"
        # microseconds of this host's clock: thousands of instructions; without KVM_CREATE_VM (0xAE01), which mostly
        # waits
        traced $monitor $kernel 'sched/sched_process_exec kvm/kvm_entry syscalls/sys_enter_ioctl syscalls/sys_exit_ioctl' \
            >events
        awk -v who="$monitor $kernel" '
            { for (i = 1; i < NF; i++) if ($(i + 1) ~ /^(sched_process_exec:|kvm_entry:|sys_ioctl)/) time = $i + 0 }
            /sched_process_exec:.*(qemu-system|vireo)/ { exec = time; create = 0 }
            /sys_ioctl\(.*cmd: (0x)?0*ae01,/ { begin = time }
            /sys_ioctl -> / && begin { create += time - begin; begin = 0 }
            / kvm_entry:/ { printf "first-entry %s %d\n", who, (time - exec - create) * 1e9; exit }' events
    done
done
MEASURE
inside sh measure "$monitors" "$runs"
"#;

/// Script that runs in the other emulated host, whose clock is the machine's: Pss in KiB of everything except guest
/// RAM, once a 128 MiB guest waits at its shell; then the same with one of each device, all of them used.
const MEMORY_SCRIPT: &str = r#"
vireo=$1 images=$2
dir=$(mktemp -d /tmp/boot.XXXXXX)
cd "$dir" || exit
export XDG_CACHE_HOME=$dir
ln -s "$vireo" vireo-keep
./vireo-keep "$dir/vireo" <"$images/bzImage-cloud" || echo "failed: the kernel is not kept"
trap 'ip link del bench1 2>/dev/null; rm -r "$dir"' EXIT
until_console() {
    tries=0
    until grep -q "$1" console; do
        tries=$((tries + 1))
        [ $tries -lt 600 ] && kill -0 $vm || { echo "failed: the guest does not say $1"; tail console; kill -9 $vm; exit 1; }
        sleep 0.1
    done
}
# memory NAME MODULES COMMAND OPTION...: the guest runs the command first
memory() {
    name=$1 modules=$2 command=$3
    shift 3
    rm -f input
    mkfifo input
    exec 3<>input
    "$vireo" run --kernel "$images/bzImage-cloud" --initrd "$images/initrd-busybox.cpio" --memory 128M \
        --cmdline "console=ttyS0 quiet vireo.modules=$modules" "$@" <input >console 2>&1 &
    vm=$!
    until_console BusyBox
    echo "$command; echo used-\$((40 + 2))" >&3
    until_console used-42
    # Guest RAM is 131072 KiB of adjacent mappings; persistent memory is a mapping of its file.
    awk -v name="$name" '/^[0-9a-f]+-/ { n++; split($1, range, "-"); start[n] = range[1]; end[n] = range[2]; file[n] = $6 }
        /^Size:/ { size[n] = $2 } /^Pss:/ { pss[n] = $2; total += $2 }
        END {
            for (i = 1; i <= n; i++) if (file[i] ~ /\/pmem$/) total -= pss[i]
            for (i = 1; i <= n; i++) {
                sum = ram = 0
                for (j = i; j <= n && sum < 131072 && (j == i || start[j] == end[j - 1]); j++) {
                    sum += size[j]
                    ram += pss[j]
                }
                if (sum == 131072 && ram > most) most = ram
            }
            if (most > 16384) print name, "vireo bzImage-cloud", total - most
            else print "failed: which mappings are guest RAM?"
        }' /proc/$vm/smaps
    kill -9 $vm
    wait $vm 2>/dev/null || :
}
memory pss virtio_mmio,virtio_blk,virtio_rng :
truncate -s 16M disk pmem
mkdir share
seq 1000 >share/file
ip tuntap add dev bench1 mode tap && ip addr add 10.9.1.1/24 dev bench1 && ip link set bench1 up
memory pss-devices virtio_mmio,virtio_blk,virtio_net,virtio_rng,virtio_console,virtio_balloon,virtiofs,virtio_pmem,nd_pmem,\
virtio_mem,vmw_vsock_virtio_transport \
    'dd if=/dev/vda of=/dev/null bs=64k; dd if=/dev/zero of=/dev/vda bs=64k; dd if=/dev/zero of=/dev/pmem0 bs=64k
    dd if=/dev/hwrng of=/dev/null bs=1k count=64; ip addr add 10.9.1.2/24 dev eth0; ip link set eth0 up; ping -c 3 10.9.1.1
    mkdir -p /mnt; mount -t virtiofs share /mnt; ls /mnt; cat /mnt/file /mnt/file >/mnt/copy
    cat /mnt/copy >$(ls -d /dev/vport*p1)' \
    --disk disk --net tap=bench1 --vsock "cid=3,path=$dir/vsock" --console null --console-port port,to=file:port \
    --balloon 1M,free_page_reporting --share share,tag=share --pmem pmem --virtio-mem 256M,requested=0 --rng
"#;

fn main() -> ExitCode {
    common::exit("boot", bench())
}

fn bench() -> Result<(), String> {
    let vireo = vireo();
    let binary = vireo.metadata();
    let images = format!("{REPO}/target/host/images");
    let path = binary.as_ref().map(|_| vireo.display().to_string()).unwrap_or_default();
    let mut facts = Facts::new();
    in_host(&["--icount"], &format!("{STAGE}{SCRIPT}"), &[&path, &images, &RUNS.to_string()], &mut facts)?;

    println!("\nBest of {}, instructions from exec to exit (billions); wall seconds", RUNS - 1);
    let heading = ["Firecracker*", "QEMU", "vireo", "ratio", "cold"];
    print!("{:<15}", "");
    heading.iter().for_each(|name| print!("{name:>13}"));
    println!("   {:>6}{:>7}{:>6}", "QEMU", "vireo", "cold");
    for (kernel, firecracker) in KERNELS.into_iter().zip(FIRECRACKER) {
        let best = |fact, monitor| best(&facts, fact, monitor, kernel);
        let (qemu, ours) = (best("instructions", "qemu"), best("instructions", "vireo"));
        let ratio = qemu.zip(ours).map(|(qemu, ours)| ours / qemu);
        let giga = |value: Option<f64>| text(value.map(|value| value / 1e9), 3);
        let wall = |monitor| text(best("wall", monitor), 1);
        print!("{kernel:<15}{firecracker:>13.2}");
        for value in [giga(qemu), giga(ours), text(ratio, 3), giga(best("instructions", "cold"))] {
            print!("{value:>13}");
        }
        println!("   {:>6}{:>7}{:>6}", wall("qemu"), wall("vireo"), wall("cold"));
    }
    println!("* measured earlier, see benches/boot.rs");
    println!("\n{:<15}{:>22}{:>34}", "", "exits to user space", "exec to first KVM_RUN (millions)");
    for kernel in KERNELS {
        let get = |fact, monitor| best(&facts, fact, monitor, kernel);
        let mega = |monitor| text(get("first-entry", monitor).map(|value| value / 1e6), 1);
        let exits = |monitor| text(get("exits", monitor), 0);
        println!(
            "{kernel:<15}  QEMU {:>5} vireo {:>5}         QEMU {:>6} vireo {:>6}",
            exits("qemu"),
            exits("vireo"),
            mega("qemu"),
            mega("vireo")
        );
    }
    let binary = binary
        .map_err(|error| format!("{}: {error}; run `cargo build --release` first to compare vireo", vireo.display()))?;

    in_host(&[], MEMORY_SCRIPT, &[&path, &images], &mut facts)?;
    println!("\n{:<58}{:>9}{:>9}", "", "here", "target");
    let ratio = |kernel| {
        let get = |monitor| best(&facts, "instructions", monitor, kernel);
        Some(get("vireo")? / get("qemu")?)
    };
    let ours = |fact, kernel| best(&facts, fact, "vireo", kernel);
    let mega = |value: Option<f64>| value.map(|value| value / 1e6);
    let [vmlinux, bzimage] = KERNELS;
    target("vmlinux, share of QEMU's instructions", ratio(vmlinux), 0.75, 3);
    target("bzImage, share of QEMU's instructions", ratio(bzimage), 0.66, 3);
    let cold = |kernel| best(&facts, "instructions", "cold", kernel).map(|value| value / 1e9);
    target("bzImage, first boot, G instructions", cold(bzimage), 1.70, 3);
    target("vmlinux, first boot, G instructions", cold(vmlinux), 1.62, 3);
    target("vmlinux, exits to user space", ours("exits", vmlinux), 250.0, 0);
    target("bzImage, exits to user space", ours("exits", bzimage), 250.0, 0);
    let nokaslr = |kernel| mega(best(&facts, "first-entry", "nokaslr", kernel));
    target("bzImage with KASLR, exec to KVM_RUN, M instructions", mega(ours("first-entry", bzimage)), 70.0, 1);
    target("bzImage with nokaslr, exec to KVM_RUN, M instructions", nokaslr(bzimage), 20.0, 1);
    target("vmlinux with nokaslr, exec to KVM_RUN, M instructions", nokaslr(vmlinux), 20.0, 1);
    let pss = ours("pss", bzimage).map(|value| value / 1024.0);
    target("memory beside a 128 MiB guest's RAM (Pss), MiB", pss, 4.0, 2);
    let devices = ours("pss-devices", bzimage).map(|value| value / 1024.0);
    target("the same with one of each device, MiB", devices, 6.0, 2);
    target("size of the binary, MiB", Some(binary.len() as f64 / 1048576.0), 8.0, 2);
    Ok(())
}
