//! Network cards under a stock driver. Each test has the host's half, around vireo, and the guest's half.

use crate::common::net::{DHCP, GUEST, host_half};
use crate::common::{Run, image, on_host, vireo};

/// On an existing tap: pings, NET_MIB mebibytes (20) in each direction in large segments, a download by IPv6, and a
/// driver that is unloaded.
#[test]
fn a_tap_with_offloads() {
    let host = host_half(
        r#"
ip link del vm0 2>/dev/null || true
ip tuntap add vm0 mode tap vnet_hdr
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf /tmp/www; ip link del vm0' EXIT
ip addr add 192.168.77.1/24 dev vm0
ip addr add fd77::1/64 dev vm0 nodad
ip link set vm0 up
echo arrived >/tmp/www/note
(until busybox ping -c 1 -W 1 192.168.77.2 >/dev/null; do :; done
 echo "ping in: ok"; fetch 192.168.77.2 80) &
status=0
"$@" || status=$?
set -- $(sed -n 's/^ *vm0: *//p' /proc/net/dev)
echo "packets from the guest: $2"
echo "packets to the guest: ${10}"
exit $status
"#,
    );
    let guest = [
        GUEST,
        r#"
echo "address: $(cat /sys/class/net/eth0/address)"
ifconfig eth0 192.168.77.2 netmask 255.255.255.0 up
ping -c 2 -W 5 192.168.77.1 >/dev/null && echo "ping out: ok"
wget -q -O /www/data http://192.168.77.1:8000/data
echo "loaded: $(md5sum </www/data)"
ifconfig eth0 add fd77::2/64
until ping6 -c 1 -W 1 fd77::1 >/dev/null 2>&1; do sleep 0.1; done
echo "over IPv6: $(wget -q -O - 'http://[fd77::1]:8000/note')"
serve 192.168.77.1
rmmod virtio_net
modprobe virtio_net
ifconfig eth0 192.168.77.2 netmask 255.255.255.0 up
wget -q -O - http://192.168.77.1:8000/data | cmp - /www/data && echo "again: ok"
"#,
    ]
    .concat();
    let mib: u32 = std::env::var("NET_MIB").map_or(20, |mib| mib.parse().expect("NET_MIB must be a number"));
    let run = Run::new("bzImage-cloud", &guest).through(&host).env(&format!("MIB={mib}"));
    let ended = run.args(&["--net", "tap=vm0,mac=02:11:22:33:44:55", "--memory", "512M"]).run_to_end().success();
    assert_eq!(ended.fact("address"), "02:11:22:33:44:55");
    assert_eq!((ended.fact("ping in"), ended.fact("ping out"), ended.fact("again")), ("ok", "ok", "ok"), "{ended}");
    assert_eq!(ended.fact("over IPv6"), "arrived", "{ended}");
    assert_eq!((ended.fact("loaded"), ended.fact("fetched")), (ended.fact("sum"), ended.fact("sum")), "{ended}");
    // Data passes once from the guest and twice to it; each MiB is 700 packets of 1500 bytes.
    let packets = |name| ended.fact(name).parse::<u32>().unwrap();
    let (from, to) = (packets("packets from the guest"), packets("packets to the guest"));
    assert!(from < 400 * mib && to < 400 * mib, "{from} packets from the guest, {to} to it: no large segments");
}

/// On taps that vireo creates: one with two queues and a smaller MTU, one without offloads and mergeable buffers, one
/// that is slow. The taps are removed with vireo.
#[test]
fn taps_that_vireo_makes() {
    let host = host_half(
        r#"
for n in 1 2 3; do ip link del vm$n 2>/dev/null || true; done
(for n in 1 2 3; do until ip addr add 192.168.8$n.1/24 dev vm$n 2>/dev/null; do sleep 0.05; done; done
 fetch 192.168.81.2 80) &
status=0
"$@" || status=$?
ls -d /sys/class/net/vm? 2>/dev/null || echo "taps: gone"
exit $status
"#,
    );
    let guest = [
        GUEST,
        r#"
for n in 1 2 3; do ifconfig eth$((n - 1)) 192.168.8$n.2 netmask 255.255.255.0 up; done
features() { cut -c16 /sys/class/net/eth$1/device/features; }
echo "mergeable: $(features 0) $(features 1)"
echo "mtu: $(cat /sys/class/net/eth0/mtu) $(cat /sys/class/net/eth1/mtu)"
echo "queues: $(ls -d /sys/class/net/eth0/queues/* | wc -l) $(ls -d /sys/class/net/eth1/queues/* | wc -l)"
wget -q -O /www/data http://192.168.82.1:8000/data
echo "loaded: $(md5sum </www/data)"
for n in 1 2 3 4; do
    (wget -q -O - http://192.168.81.1:8000/data | cmp - /www/data && echo "stream $n: ok") &
done
wait
begin=$(cut -d. -f1 /proc/uptime)
wget -q -O - http://192.168.83.1:8000/data | cmp - /www/data
echo "slow: $(($(cut -d. -f1 /proc/uptime) - begin))"
serve 192.168.81.1
"#,
    ]
    .concat();
    let run = Run::new("bzImage-cloud", &guest).through(&host).env("MIB=3");
    let nets = ["--net", "tap=vm1,queues=2,mtu=1400", "--net", "tap=vm2,offload=off,mrg_rxbuf=off"];
    let slow = "tap=vm3,rx_bandwidth=1M,rx_bandwidth_burst=128K,tx_ops=10000";
    let ended = run.args(&nets).args(&["--net", slow, "--cpus", "2"]).run_to_end().success();
    assert_eq!(ended.fact("mergeable"), "1 0", "{ended}");
    assert!(ended.fact("slow").parse::<u32>().unwrap() >= 2, "3 MiB at 1 MiB a second: {ended}");
    assert_eq!((ended.fact("mtu"), ended.fact("queues")), ("1400 1500", "4 2"), "{ended}");
    assert_eq!((ended.fact("loaded"), ended.fact("fetched")), (ended.fact("sum"), ended.fact("sum")), "{ended}");
    (1..=4).for_each(|n| assert_eq!(ended.fact(&format!("stream {n}")), "ok"));
    assert_eq!(ended.fact("taps"), "gone", "{ended}");
}

/// Without any privilege: an address by DHCP, connections out and in; then passt dies, and the guest's link goes down.
#[test]
fn user_networking() {
    let host = host_half(
        r#"
chmod 777 "$RUN"
chmod 666 "$RUN"/*
setpriv --reuid=4242 --regid=4242 --clear-groups "$@" <&0 &
vireo=$!
children() { cat /proc/$vireo/task/*/children; }
until grep -q ready /tmp/www/log; do sleep 0.2; done
until grep -q datagram /tmp/www/log; do
    { echo x >/dev/udp/127.0.0.1/9090; } 2>/dev/null || true
    sleep 0.3
done
fetch 127.0.0.1 8080
# A connection that ends with passt would keep the guest waiting.
until grep -q served /tmp/www/log; do sleep 0.2; done
passt=$(children)
echo "passt runs: $(ls -d $(printf '/proc/%s ' $passt) | wc -l)"
kill $passt
until [ -z "$(children)" ]; do sleep 0.1; done
status=0
wait $vireo || status=$?
echo "passt reaped: ok" # not into a line of the guest's console
exit $status
"#,
    );
    let guest = [
        GUEST,
        DHCP,
        r#"
echo "link: $(cat /sys/class/net/eth0/carrier)"
wget -q -O /www/data http://$(cat /tmp/gateway):8000/data
echo "loaded: $(md5sum </www/data)"
# No socket receives it, but the kernel has seen it.
tell $(cat /tmp/gateway) ready
refused() { awk '/^Udp: [0-9]/ { print $3 }' /proc/net/snmp; }
until [ $(refused) != 0 ]; do sleep 0.1; done
echo "datagram: ok"
tell $(cat /tmp/gateway) datagram
serve $(cat /tmp/gateway)
tell $(cat /tmp/gateway) served &
until [ "$(cat /sys/class/net/eth0/carrier)" = 0 ]; do sleep 0.1; done
echo "link then: 0"
"#,
    ]
    .concat();
    let mib: u32 = std::env::var("NET_MIB").map_or(3, |mib| mib.parse().expect("NET_MIB must be a number"));
    let run = Run::new("bzImage-cloud", &guest).through(&host).env(&format!("MIB={mib}"));
    let folder = format!("RUN={}", run.dir.path().display());
    let net = ["--net", "user,map_gateway=on,hostfwd=tcp:8080:80,hostfwd=udp:9090:90", "--memory", "512M"];
    let ended = run.env(&folder).args(&net).run_to_end().success();
    assert_eq!(ended.fact("datagram"), "ok", "{ended}");
    assert_eq!((ended.fact("address"), ended.fact("link")), ("10.0.2.15", "1"), "{ended}");
    assert_eq!((ended.fact("loaded"), ended.fact("fetched")), (ended.fact("sum"), ended.fact("sum")), "{ended}");
    let passt = (ended.fact("passt runs"), ended.fact("passt reaped"), ended.fact("link then"));
    assert_eq!(passt, ("1", "ok", "0"), "{ended}");
    assert!(ended.stderr.contains("net0: lost the network; link down in the guest: passt is gone"), "{ended}");
}

/// A server at 127.0.0.1 of the host is out of reach until map_gateway=on exposes it at the gateway's address, which
/// answers pings in either case. (Packets to 127.0.0.1 itself: `no_frame_reaches_the_hosts_loopback`.)
#[test]
fn the_hosts_loopback_is_closed() {
    let host = host_half(
        r#"
sysctl -q -w net.ipv4.ping_group_range="0 2147483647"
echo of-the-host >/tmp/www/secret
busybox httpd -f -p 127.0.0.1:8001 -h /tmp/www &
"$@"
"#,
    );
    let guest = [
        GUEST,
        DHCP,
        r#"
fetch() { timeout 8 wget -q -O - http://$1:8001/secret 2>/dev/null || echo nothing; }
ping -c 1 -W 5 $(cat /tmp/gateway) >/dev/null && echo "closed, ping: ok"
echo "closed, gateway: $(fetch $(cat /tmp/gateway))"
ifconfig eth0 down
sed -i "s/eth0/eth1/" /tmp/dhcp
ifconfig eth1 up
udhcpc -q -n -f -i eth1 -s /tmp/dhcp >/dev/console 2>&1
ping -c 1 -W 5 $(cat /tmp/gateway) >/dev/null && echo "open, ping: ok"
echo "open, gateway: $(fetch $(cat /tmp/gateway))"
"#,
    ]
    .concat();
    let run = Run::new("bzImage-cloud", &guest).through(&host).env("MIB=1");
    let ended = run.args(&["--net", "user", "--net", "user,map_gateway=on"]).run_to_end().success();
    assert_eq!((ended.fact("closed, ping"), ended.fact("open, ping")), ("ok", "ok"), "{ended}");
    assert_eq!(ended.fact("closed, gateway"), "nothing", "{ended}");
    assert_eq!(ended.fact("open, gateway"), "of-the-host", "{ended}");
}

/// The host's name server is on its loopback, like systemd-resolved's; commands of exec still resolve names.
#[test]
fn a_name_server_on_the_hosts_loopback() {
    let host = r#"set -e
answer='use IO::Socket::INET; $| = 1;
my $socket = IO::Socket::INET->new(LocalAddr => "127.0.0.53", LocalPort => 53, Proto => "udp") or die "$!";
print "ready\n";
while (my $from = $socket->recv(my $question, 512)) {
    my ($id, $rest) = unpack("a2 x10 a*", $question);
    my ($name) = $rest =~ /^(.*?\0....)/s;
    my $answer = $name =~ /\0\0\x01..$/s ? pack("n n n N n C4", 0xC00C, 1, 1, 60, 4, 192, 0, 2, 99) : "";
    $socket->send($id . pack("n5", 0x8180, 1, $answer ne "", 0, 0) . $name . $answer);
}'
perl -e "$answer" >/tmp/resolver.log &
trap "kill $!; umount /etc/resolv.conf" EXIT
echo nameserver 127.0.0.53 >/tmp/resolv.conf
mount --bind /tmp/resolv.conf /etc/resolv.conf
until grep -q ready /tmp/resolver.log; do sleep 0.1; done
"$@""#;
    let run = Run::exec(&["getent", "ahostsv4", "secret.test"]).through(host);
    let ended = run.args(&["--net", "user"]).run_to_end();
    assert_eq!(ended.code(), 0, "{ended}");
    assert!(ended.stdout.starts_with("192.0.2.99 "), "{ended}");
}

/// Mistakes that a user can make, and passt's behaviour when vireo is killed.
#[test]
fn what_cannot_be_is_said() {
    let (vireo, kernel) = (vireo().display().to_string(), image("bzImage-cloud").display().to_string());
    let script = r#"
as_user() { setpriv --reuid=4242 --regid=4242 --clear-groups "$@"; }
ip link del vm5 2>/dev/null; ip link del vm6 2>/dev/null; ip link del vm7 2>/dev/null
ip tuntap add vm5 mode tap user 1
ip tuntap add vm6 mode tap user 4242 multi_queue
ip tuntap add vm7 mode tun
run() { "$@" run --kernel "$kernel" --net "$net" </dev/null 2>&1; echo "status $?"; }
vireo=$1 kernel=$2
net=tap=nosuch run as_user "$vireo"
net=tap=vm5 run as_user "$vireo"
net=tap=vm5,queues=2 run "$vireo"
net=tap=vm7 run "$vireo"
net=tap=eth0 run "$vireo"
net=user,hostfwd=tcp:0.0.0.0:7777:80 run "$vireo"
net=user PATH=/nowhere run /usr/bin/env "$vireo"
net=user,queues=2 run "$vireo"
setpriv --reuid=4242 --regid=4242 --clear-groups "$vireo" run --kernel "$kernel" --net tap=vm6,queues=2 --net user --cmdline reboot=t </dev/null >/dev/null 2>&1 &
until [ -n "$(cat /proc/$!/task/*/children)" ]; do sleep 0.1; done
sleep 1
net=tap=vm6 run "$vireo" | head -n 1
passt=$(cat /proc/$!/task/*/children)
echo "passt there: $(ls -d /proc/$passt | wc -l)"
kill -9 $!
for n in $(seq 100); do [ -e /proc/$passt ] || break; sleep 0.1; done
echo "passt left: $(ls -d /proc/$passt 2>/dev/null | wc -l)"
ip link del vm5; ip link del vm6; ip link del vm7
"#;
    let ended = on_host(&["bash", "-c", script, "bash", &vireo, &kernel]).end();
    for text in [
        "vireo: there is no tap nosuch, and creating one needs CAP_NET_ADMIN; to create it as root: \
         ip tuntap add nosuch mode tap user $USER vnet_hdr && ip link set nosuch up\nstatus 125\n",
        "vireo: cannot open tap vm5 (it belongs to another user; create it with 'user $USER' to own it): \
         Operation not permitted (os error 1)\nstatus 125\n",
        "vireo: tap vm5 has a single queue; to create one with several: \
         ip tuntap add vm5 mode tap user $USER vnet_hdr multi_queue\nstatus 125\n",
        "vireo: vm7 is a network interface, but not a tap\nstatus 125\n",
        "vireo: eth0 is a network interface, but not a tap\nstatus 125\n",
        "vireo: cannot forward tcp:0.0.0.0:7777:80: port 7777 of the host cannot be bound: \
         Address already in use (os error 98)\nstatus 125\n",
        "vireo: passt, which user networking needs, is not installed (package passt)\nstatus 125\n",
        "vireo: --net: 'queues' is for tap only\n",
        "passt there: 1\npasst left: 0\n",
    ] {
        assert!(ended.stdout.contains(text), "{text}\n---\n{ended}");
    }
}
