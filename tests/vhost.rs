//! Devices whose queues are served elsewhere: in the kernel (vhost-net) and in other programs (vhost-user).

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use crate::common::net::{GUEST, host_half};
use crate::common::{Guest, Run, example, image, on_host, vireo};
use serde_json::Value;

/// With two queues: pings, downloads in each direction and in parallel, and a driver that is unloaded.
#[test]
fn the_kernel_moves_packets() {
    let host = host_half(
        r#"
head -c 1048576 /tmp/www/data >/tmp/www/part
ip link del vm3 2>/dev/null || true
ip tuntap add vm3 mode tap vnet_hdr multi_queue
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf /tmp/www; ip link del vm3' EXIT
ip addr add 192.168.83.1/24 dev vm3
ip link set vm3 up
(until busybox ping -c 1 -W 1 192.168.83.2 >/dev/null; do :; done
 echo "ping in: ok"; fetch 192.168.83.2 80
 echo "kernel threads: $(cat /proc/[0-9]*/comm 2>/dev/null | grep -c ^vhost-)") &
status=0
"$@" || status=$?
exit $status
"#,
    );
    let guest = [
        GUEST,
        r#"
echo "queues: $(ls -d /sys/class/net/eth0/queues/* | wc -l)"
ifconfig eth0 192.168.83.2 netmask 255.255.255.0 up
ping -c 2 -W 5 192.168.83.1 >/dev/null && echo "ping out: ok"
wget -q -O /www/data http://192.168.83.1:8000/data
echo "loaded: $(md5sum </www/data)"
head -c 1048576 /www/data >/www/part
for n in 1 2; do
    (wget -q -O - http://192.168.83.1:8000/part | cmp - /www/part && echo "stream $n: ok") &
done
wait
serve 192.168.83.1
rmmod virtio_net
modprobe virtio_net
ifconfig eth0 192.168.83.2 netmask 255.255.255.0 up
wget -q -O - http://192.168.83.1:8000/part | cmp - /www/part && echo "again: ok"
"#,
    ]
    .concat();
    let mib: u32 = std::env::var("NET_MIB").map_or(2, |mib| mib.parse().expect("NET_MIB must be a number"));
    let run = Run::new("bzImage-cloud", &guest).through(&host).env(&format!("MIB={mib}"));
    let ended = run.args(&["--net", "tap=vm3,vhost=on,queues=2", "--cpus", "2", "--memory", "512M"]);
    let ended = ended.run_to_end().success();
    assert_eq!((ended.fact("queues"), ended.fact("kernel threads")), ("4", "2"), "{ended}");
    assert_eq!((ended.fact("ping in"), ended.fact("ping out"), ended.fact("again")), ("ok", "ok", "ok"), "{ended}");
    assert_eq!((ended.fact("loaded"), ended.fact("fetched")), (ended.fact("sum"), ended.fact("sum")), "{ended}");
    (1..=2).for_each(|n| assert_eq!(ended.fact(&format!("stream {n}")), "ok"));
    assert_eq!(ended.stderr, "vireo: the guest powered off\n");
}

/// A machine that takes requests while it runs (`tests/common/live.rs`).
struct Live {
    guest: Guest,
    asked: usize,
    said_before: usize,
    console: String,
}

impl Live {
    /// Starts the machine of `args` with a guest that runs `script`, by the script `host`.
    fn start(dir: &tempfile::TempDir, script: &str, args: &[&str], host: &str) -> Self {
        let path = |name: &str| dir.path().join(name).display().to_string();
        let (config, console) = (path("config.json"), path("console"));
        let serial = format!("file:{console}");
        let printed =
            Run::new("bzImage-cloud", script).args(args).args(&["--serial", &serial, "--print-config"]).start();
        // The initrd is in the run's folder, which must stay.
        fs::copy(printed.dir.path().join("initrd"), path("initrd")).unwrap();
        let printed = printed.end();
        let mut machine: Value = serde_json::from_str(&printed.stdout).unwrap_or_else(|_| panic!("{printed}"));
        machine["boot"]["initrd"] = path("initrd").into();
        fs::write(&config, machine.to_string()).unwrap();
        let guest = on_host(&["env", "MIB=10", "bash", "-c", host, "bash", &example("live"), &config]);
        let said_before = guest.wait_for("ready.\n").lines().count();
        Live { guest, asked: 0, said_before, console }
    }

    fn ask(&mut self, request: &str) -> String {
        self.guest.send(format!("{request}\n").as_bytes());
        self.asked += 1;
        let at = self.said_before + self.asked;
        let said = self.guest.wait_until(|said| said.lines().count() >= at && said.ends_with('\n'));
        said.lines().nth(at - 1).unwrap().to_string()
    }

    fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.console).unwrap_or_default()).replace('\r', "")
    }

    fn wait_for(&self, text: &str) -> String {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let console = self.console();
            if console.contains(text) {
                return console;
            }
            assert!(Instant::now() < deadline, "'{text}' did not appear: {console}\n{}", self.guest.tails());
            thread::sleep(Duration::from_millis(100));
        }
    }
}

/// Pauses in the middle of a transfer lose nothing, and the cable can be pulled.
#[test]
fn the_kernel_pauses_and_the_cable_is_pulled() {
    let host = host_half(
        r#"
ip link del vm4 2>/dev/null || true
ip tuntap add vm4 mode tap vnet_hdr
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf /tmp/www; ip link del vm4' EXIT
ip addr add 192.168.84.1/24 dev vm4
ip link set vm4 up
echo ready.
"$@"
"#,
    );
    let guest = [
        GUEST,
        r#"
ifconfig eth0 192.168.84.2 netmask 255.255.255.0 up
carrier() { cat /sys/class/net/eth0/carrier; }
echo transfers
for n in 1 2 3 4 5 6; do echo "loaded: $(wget -q -O - http://192.168.84.1:8000/data | md5sum)"; done
echo transferred
until [ $(carrier) = 0 ]; do sleep 0.1; done
ping -c 1 -W 1 192.168.84.1 >/dev/null 2>&1 || echo no link
until [ $(carrier) = 1 ]; do sleep 0.1; done
echo "after: $(wget -q -O - http://192.168.84.1:8000/data | md5sum)"
"#,
    ]
    .concat();
    let dir = crate::common::scratch();
    let mut live = Live::start(&dir, &guest, &["--net", "tap=vm4,vhost=on"], &host);
    live.wait_for("transfers\n");
    let mut pauses = 0;
    while !live.console().contains("transferred\n") {
        assert_eq!(live.ask("pause"), "paused: true");
        thread::sleep(Duration::from_millis(100));
        assert_eq!(live.ask("resume"), "resumed: true");
        thread::sleep(Duration::from_millis(300));
        pauses += 1;
        assert!(pauses < 200, "{}", live.console());
    }
    assert!(pauses > 2, "only {pauses} pauses");
    assert_eq!(live.ask("link net0 down"), "link: net0 down");
    live.wait_for("no link\n");
    assert_eq!(live.ask("pause"), "paused: true");
    assert_eq!(live.ask("resume"), "resumed: true");
    assert_eq!(live.ask("link net0 up"), "link: net0 up");
    assert!(live.ask("link rng up").contains("no device rng"));
    let console = live.wait_for("ended with status");
    let ended = live.guest.end();
    let sum = ended.fact("sum");
    assert_eq!(console.matches(&format!("loaded: {sum}\n")).count(), 6, "{console}");
    assert!(console.contains(&format!("after: {sum}\n")) && console.contains("ended with status 0"), "{console}");
}

/// A daemon's disk, with two queues: written data is in its file, and the driver can be unloaded.
#[test]
fn a_daemons_disk() {
    let host = r#"
set -e
truncate -s 64M /tmp/disk
trap 'kill $(jobs -p) 2>/dev/null || true; rm -f /tmp/disk /tmp/blk.sock' EXIT
qemu-storage-daemon --blockdev driver=file,node-name=f,filename=/tmp/disk --export \
    type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path=/tmp/blk.sock,writable=on,num-queues=2 &
until [ -S /tmp/blk.sock ]; do sleep 0.05; done
"$0" run --kernel /dev/null --vhost-user socket=/tmp/blk.sock,type=blk,queues=3 2>&1 </dev/null || true
"$0" run --kernel /dev/null --vhost-user socket=/tmp/blk.sock,type=net 2>&1 </dev/null || true
"$@"
PATH=$PATH:/usr/sbin:/sbin
e2fsck -fn /tmp/disk
echo "in the file: $(debugfs -R 'cat /sum' /tmp/disk)"
"#;
    let script = r#"set -e
echo "queues: $(ls /sys/block/vda/mq | wc -l)"
mke2fs -q /dev/vda >/dev/null
mount -t ext4 /dev/vda /mnt
dd if=/dev/urandom of=/mnt/random bs=64k count=64 2>/dev/null
md5sum </mnt/random | tee /mnt/sum
umount /mnt
rmmod virtio_blk
modprobe virtio_blk
mount -t ext4 /dev/vda /mnt
echo "sum: $(md5sum </mnt/random)"
umount /mnt
"#;
    let run = Run::new("bzImage-cloud", script).through_with(host, &vireo().display().to_string());
    let run = run.args(&["--vhost-user", "socket=/tmp/blk.sock,type=blk,queues=2", "--cpus", "2"]);
    let ended = run.run_to_end().success();
    assert_eq!((ended.fact("queues"), ended.fact("in the file")), ("2", ended.fact("sum")), "{ended}");
    for text in [
        "vireo: the vhost-user daemon at /tmp/blk.sock does not serve type=blk: it serves 2 queues, but 3 are needed\n",
        "vireo: the vhost-user daemon at /tmp/blk.sock does not serve type=net: it offers features (0x40) that no such \
         device has\n",
    ] {
        assert!(ended.stdout.contains(text), "{text}\n---\n{ended}");
    }
}

/// A daemon's folder; the daemon is killed, and its successor serves the driver after that is loaded again.
#[test]
fn a_daemons_folder() {
    let host = r#"
set -e
rm -rf /tmp/shared /tmp/kill
mkdir /tmp/shared
trap 'kill $(cat /tmp/pid) 2>/dev/null || true; rm -rf /tmp/shared /tmp/fs.sock' EXIT
echo 'from the host' >/tmp/shared/file
for virtiofsd in /usr/lib/qemu/virtiofsd /usr/libexec/virtiofsd; do [ ! -x $virtiofsd ] || break; done
start() {
    $virtiofsd --socket-path=/tmp/fs.sock -o source=/tmp/shared -o sandbox=chroot 2>/dev/null &
    echo $! >/tmp/pid
    until [ -S /tmp/fs.sock ]; do sleep 0.05; done
}
start
(until [ -e /tmp/kill ]; do sleep 0.05; done
 kill -9 $(cat /tmp/pid)
 rm -f /tmp/fs.sock /tmp/kill
 start
 touch /tmp/shared/restarted
 echo the daemon is there again) &
"$@"
echo "on the host: $(md5sum </tmp/shared/random)"
"#;
    let script = r#"set -e
modprobe virtiofs
mount -t virtiofs work /mnt
cat /mnt/file
dd if=/dev/urandom of=/mnt/random bs=64k count=64 2>/dev/null
umount /mnt
rmmod virtiofs
modprobe virtiofs
mount -t virtiofs work /mnt
echo "sum: $(md5sum </mnt/random)"
umount /mnt # once the daemon is dead, this would wait for it
echo unmounted
read go
rmmod virtiofs
modprobe virtiofs
mount -t virtiofs work /mnt
[ -e /mnt/restarted ]
echo "again: $(cat /mnt/file)"
umount /mnt
"#;
    let run = Run::new("bzImage-cloud", script).through(host);
    let run = run.args(&["--vhost-user", "socket=/tmp/fs.sock,type=fs,tag=work"]);
    let mut guest = run.start();
    guest.wait_for("unmounted");
    on_host(&["touch", "/tmp/kill"]).end();
    guest.wait_for_stderr(
        "vireo: vhost-user0 stopped; its driver must reset it: the host failed: the vhost-user daemon at \
         /tmp/fs.sock is gone: it has closed the connection\n",
    );
    guest.wait_for("the daemon is there again\n");
    guest.send(b"go\n");
    let ended = guest.end().success();
    assert!(ended.stdout.contains("\nfrom the host\n"), "{ended}");
    assert_eq!((ended.fact("on the host"), ended.fact("again")), (ended.fact("sum"), "from the host"), "{ended}");
}

/// A daemon's network card (`tests/common/vhost_user_tap.rs`), with two queues.
#[test]
fn a_daemons_network() {
    let host = host_half(
        r#"
ip link del vm9 2>/dev/null || true
"$0" /tmp/net.sock vm9 2 &
until [ -S /tmp/net.sock ]; do sleep 0.05; done
ip addr add 192.168.89.1/24 dev vm9
fetch 192.168.89.2 80 &
status=0
"$@" || status=$?
exit $status
"#,
    );
    let guest = [
        GUEST,
        r#"
echo "address: $(cat /sys/class/net/eth0/address)"
echo "mtu: $(cat /sys/class/net/eth0/mtu)"
echo "queues: $(ls -d /sys/class/net/eth0/queues/* | wc -l)"
ifconfig eth0 192.168.89.2 netmask 255.255.255.0 up
wget -q -O /www/data http://192.168.89.1:8000/data
echo "loaded: $(md5sum </www/data)"
serve 192.168.89.1
rmmod virtio_net
modprobe virtio_net
ifconfig eth0 192.168.89.2 netmask 255.255.255.0 up
wget -q -O - http://192.168.89.1:8000/data | cmp - /www/data && echo "again: ok"
"#,
    ]
    .concat();
    let run = Run::new("bzImage-cloud", &guest).through_with(&host, &example("vhost-user-tap")).env("MIB=3");
    let device = "socket=/tmp/net.sock,type=net,queues=2,mac=02:11:22:33:44:66,mtu=1400";
    let ended = run.args(&["--vhost-user", device, "--cpus", "2"]).run_to_end().success();
    assert_eq!(ended.fact("address"), "02:11:22:33:44:66");
    assert_eq!((ended.fact("queues"), ended.fact("mtu"), ended.fact("again")), ("4", "1400", "ok"), "{ended}");
    assert_eq!((ended.fact("loaded"), ended.fact("fetched")), (ended.fact("sum"), ended.fact("sum")), "{ended}");
}

/// Mistakes that a user can make.
#[test]
fn what_cannot_be_is_said() {
    let (vireo, kernel) = (vireo().display().to_string(), image("bzImage-cloud").display().to_string());
    let script = r#"
ip link del vm8 2>/dev/null
ip tuntap add vm8 mode tap user 4242
run() { "$@" run --kernel "$kernel" $device </dev/null 2>&1; echo "status $?"; }
vireo=$1 kernel=$2
chmod 600 /dev/vhost-net
device="--net tap=vm8,vhost=on" run setpriv --reuid=4242 --regid=4242 --clear-groups "$vireo"
mv /dev/vhost-net /dev/vhost-net.away
device="--net tap=vm8,vhost=on" run "$vireo"
mv /dev/vhost-net.away /dev/vhost-net
chmod 666 /dev/vhost-net
device="--net tap=vm8,vhost=on,rx_bandwidth=1M" run "$vireo"
ip link del vm8
device="--vhost-user socket=/tmp/none.sock,type=blk" run "$vireo"
device="--vhost-user socket=/etc/passwd,type=blk" run "$vireo"
# A listener that says nothing.
"$vireo" run --kernel "$kernel" --initrd "$3" --serial null --console-port a,to=socket:/tmp/silent.sock >/dev/null 2>&1 &
until [ -S /tmp/silent.sock ]; do sleep 0.05; done
device="--vhost-user socket=/tmp/silent.sock,type=net" run "$vireo"
kill -9 $!
wait $! # its socket exists until then
device="--vhost-user socket=/tmp/silent.sock,type=net" run "$vireo"
rm -f /tmp/silent.sock
"#;
    let initrd = image("initrd-busybox.cpio").display().to_string();
    let ended = on_host(&["bash", "-c", script, "bash", &vireo, &kernel, &initrd]).end();
    for text in [
        "vireo: cannot open /dev/vhost-net (root owns it; try the group kvm, or \
         'setfacl -m u:$USER:rw /dev/vhost-net' as root): Permission denied (os error 13)\nstatus 125\n",
        "vireo: cannot open /dev/vhost-net (is the kernel's vhost_net module loaded? try 'modprobe vhost_net'): \
         No such file or directory (os error 2)\nstatus 125\n",
        "vireo: --net: vhost=on has no rate limits: the kernel moves the packets (tc can limit the tap)\n",
        "vireo: cannot connect to the vhost-user socket /tmp/none.sock (is the daemon running?): No such file or \
         directory (os error 2)\nstatus 125\n",
        "vireo: /etc/passwd is not a socket\nstatus 125\n",
        "vireo: cannot use the vhost-user daemon at /tmp/silent.sock: it does not answer\nstatus 125\n",
        "vireo: cannot connect to the vhost-user socket /tmp/silent.sock (nothing listens there; has the daemon \
         ended?): Connection refused (os error 111)\nstatus 125\n",
    ] {
        assert!(ended.stdout.contains(text), "{text}\n---\n{ended}");
    }
}
