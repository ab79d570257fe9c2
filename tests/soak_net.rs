//! Network tests that take too long for `make test`; `make soak` runs them.

mod common;

use common::net::{DHCP, GUEST};
use common::programs::{SHARE, with_hosts_programs};
use common::{Ended, Run};
use serde_json::Value;

/// Script in the guest, with the host's programs: pings `$PEER` and makes iperf3 send in each direction, first in turn,
/// then simultaneously, and in four streams. Each result is a line of JSON.
const FLOWS: &str = r#"
lost() { sed -n 's/.* \([0-9]*\)% packet loss.*/\1/p'; }
flow() {
    name=$1
    shift
    iperf3 -c $PEER -t 5 -i 0 -J "$@" >told || { cat told; exit 1; }
    echo "$name: $(tr -d '\n\t' <told)"
}
echo "lost: $(busybox ping -c 5 -W 5 $PEER | lost) %"
flow out
flow in -R
flow both --bidir
flow four -P 4
statistics=/sys/class/net/eth0/statistics
echo "errors: $(cat $statistics/rx_errors $statistics/tx_errors | tr '\n' ' ')"
# InCsumErrors; InErrs would also count the repeated answers of a handshake, which slow hosts send
echo "damaged: $(awk '/^Tcp: [0-9]/ { print $16 }' /proc/net/snmp)"
"#;

/// Script on the host: the servers that the guest talks to, on all of the host's addresses.
const SERVER: &str = r#"
iperf3 -s >/dev/null 2>&1 &
until grep -q ':1451 [0-9A-F]*:0000 0A ' /proc/net/tcp /proc/net/tcp6; do sleep 0.1; done
"#;

/// Script that creates a tap `vm0` with the host at 192.168.78.1, and removes it at the end.
const TAP: &str = r#"
set -e
ip link del vm0 2>/dev/null || true
ip tuntap add vm0 mode tap vnet_hdr multi_queue
trap 'kill $(jobs -p) 2>/dev/null || true; ip link del vm0' EXIT
ip addr add 192.168.78.1/24 dev vm0
ip link set vm0 up
"#;

/// Checks the guest's results: data went through in each flow and stream. The amount depends on the host more than on
/// anything else: it is small in an emulated host, where both vCPUs and both ends share one processor.
fn check_flows(ended: &Ended) {
    assert_eq!(ended.fact("lost"), "0 %", "{ended}");
    let sums = ["sum_received", "sum_received_bidir_reverse"];
    for (name, sums) in [("out", &sums[..1]), ("in", &sums[..1]), ("both", &sums[..]), ("four", &sums[..1])] {
        let told: Value = serde_json::from_str(ended.fact(name)).unwrap_or_else(|e| panic!("{name}: {e}: {ended}"));
        assert_eq!(told["error"], Value::Null, "{name}: {ended}");
        for sum in sums {
            let sum = &told["end"][sum];
            let (bytes, seconds) = (sum["bytes"].as_u64().unwrap_or(0), sum["seconds"].as_f64().unwrap_or(0.0));
            assert!(bytes >= 1 << 18 && seconds > 4.9, "{name}: {bytes} bytes in {seconds} s: {ended}");
            eprintln!("{name}: {:.1} MiB/s", bytes as f64 / seconds / f64::from(1 << 20));
        }
        let streams = told["end"]["streams"].as_array().unwrap();
        let moved = |stream: &Value| stream["receiver"]["bytes"].as_u64().is_some_and(|bytes| bytes > 0);
        assert!(streams.iter().all(moved), "{name}: a stream stood still: {ended}");
    }
    assert_eq!((ended.fact("errors"), ended.fact("damaged")), ("0 0 ", "0"), "{ended}");
}

/// A guest whose card is brought up by `connect`, which sets `$PEER`.
fn guest(connect: &str) -> Run {
    let script = [GUEST, connect, &with_hosts_programs(FLOWS)].concat();
    let run = Run::new("bzImage-cloud", &script).args(&SHARE).args(&["--memory", "512M"]);
    run.cmdline("console=ttyS0 quiet vireo.modules=virtio_mmio,virtiofs")
}

const ON_TAP: &str = "export PEER=192.168.78.1; ifconfig eth0 192.168.78.2 netmask 255.255.255.0 up\n";

#[test]
fn iperf3_over_a_tap() {
    let host = [TAP, SERVER, r#""$@""#].concat();
    let ended = guest(ON_TAP).through(&host).args(&["--net", "tap=vm0"]).run_to_end().success();
    check_flows(&ended);
}

/// With two queues, and two CPUs that use them.
#[test]
fn iperf3_over_queues_of_a_tap() {
    let host = [TAP, SERVER, r#""$@""#].concat();
    let run = guest(ON_TAP).through(&host).args(&["--net", "tap=vm0,queues=2", "--cpus", "2"]);
    check_flows(&run.run_to_end().success());
}

#[test]
fn iperf3_over_vhost() {
    let around = r#"
(until cat /proc/[0-9]*/comm 2>/dev/null | grep -q ^vhost-; do sleep 0.2; done; echo "the kernel: has a thread for it") &
"$@"
"#;
    let host = [TAP, SERVER, around].concat();
    let ended = guest(ON_TAP).through(&host).args(&["--net", "tap=vm0,vhost=on"]).run_to_end().success();
    assert_eq!(ended.fact("the kernel"), "has a thread for it");
    check_flows(&ended);
}

/// Script for an unprivileged process, which may ping if the kernel permits its group; that is the default of most
/// distributions.
const USER: &str = r#"
set -e
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
echo '0 2147483647' >/proc/sys/net/ipv4/ping_group_range
"#;

#[test]
fn iperf3_over_user_networking() {
    let host = [USER, SERVER, r#""$@""#].concat();
    let connect = [DHCP, "export PEER=$(cat /tmp/gateway)\n"].concat();
    let ended = guest(&connect).through(&host).args(&["--net", "user,map_gateway=on"]).run_to_end().success();
    check_flows(&ended);
}
