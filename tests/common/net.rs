//! Shell code for both halves of a network test.

/// Script that creates what both sides serve and check, `$1` MiB.
pub const HOST: &str = r#"
set -e
trap '' PIPE # from a connection that fails
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf /tmp/www' EXIT
rm -rf /tmp/www
mkdir -p /tmp/www
head -c ${MIB}M /dev/urandom >/tmp/www/data
echo "sum: $(md5sum </tmp/www/data)"
busybox httpd -f -vv -p 8000 -h /tmp/www 2>/tmp/www/log &
"#;

/// Script that fetches what the guest serves at `$1`, port `$2`, and then notifies the guest. (A static busybox's wget
/// does not work with the host's name service.)
pub const FETCH: &str = r#"
get() {
    exec 3<>/dev/tcp/$1/$2 || return 1
    printf 'GET /data HTTP/1.0\r\n\r\n' >&3
    read -r -t 5 _ answer _ <&3 || return 1
    while read -r line <&3 && [ "$line" != $'\r' ]; do :; done
    cat <&3 >/tmp/www/back
    [ "$answer" = 200 ]
}
fetch() {
    # Some versions of passt remember for ever a connection that was not answered.
    until grep -q listening /tmp/www/log; do sleep 0.2; done
    until get $1 $2 2>/dev/null; do sleep 0.2; done
    echo "fetched: $(md5sum </tmp/www/back)"
    echo >/tmp/www/finished
}
"#;

pub const GUEST: &str = r#"
set -e
modprobe virtio_net
modprobe af_packet || true # some kernels have it built in
ifconfig lo up
mkdir /www
# Makes $2 appear in the log of the host, at $1.
tell() {
    wget -q -O /dev/null http://$1:8000/$2 2>/dev/null || true
}
# Serves until the host, at $1, has fetched.
serve() {
    httpd -p 80 -h /www
    tell $1 listening
    until wget -q -O /dev/null http://$1:8000/finished 2>/dev/null; do sleep 0.2; done
}
"#;

/// Script in the guest that gets an address by DHCP; the gateway's address is in /tmp/gateway then.
pub const DHCP: &str = r#"
cat >/tmp/dhcp <<'EOF'
[ "$1" = bound ] || exit 0
ifconfig eth0 $ip netmask $subnet
route add default gw $router
echo $router >/tmp/gateway
echo "address: $ip"
EOF
chmod +x /tmp/dhcp
sed -i '1i #!/bin/sh' /tmp/dhcp
ifconfig eth0 up
udhcpc -q -n -f -i eth0 -s /tmp/dhcp >/dev/console 2>&1
"#;

/// Returns the host's half of a test, around vireo in `"$@"`: serve, fetch, and what `setup` contains.
pub fn host_half(setup: &str) -> String {
    format!("{HOST}{FETCH}{setup}")
}
