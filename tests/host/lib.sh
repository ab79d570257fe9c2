# Shared by the scripts beside it: where things are, how to fail, which host to use. Sourced, never run.

set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
repo=$(cd "$here/../.." && pwd -P)
state=$repo/target/host          # everything these scripts make; removing it is always safe after `down`
images=$state/images             # kernels and initramfs for guests
share=$state/share               # the one place the emulated host may write to, same path on both sides
agent=$state/host-agent
export PATH=$state/bin:$PATH     # QEMU, where the system's own is too old

hosts="a b"                      # the emulated hosts: two, so that two processors are used (see `up`)

is_host() { case " $hosts " in *" $1 "*) ;; *) return 1 ;; esac; }

# Succeeds if any of them is up, or the instruction-counting one.
any_up() {
    local name
    for name in $hosts icount; do
        if is_up $name; then return; fi
    done
    return 1
}

die() {
    echo "$(basename "$0"): $*" >&2
    exit 255
}

# Succeeds if the emulated host "$1" is up. QEMU inherits a lock on this file and keeps it for as long as it lives, so
# the answer survives crashes and reused process ids.
is_up() {
    [ -e "$state/$1/alive" ] && ! flock -ns "$state/$1/alive" true
}

# Stops the emulated host "$1", which is up. Nothing on it is worth a clean shutdown.
stop() {
    local pid
    pid=$(cat "$state/$1/pid")
    rm -f "$state/$1/port"
    kill "$pid"
    for _ in {1..100}; do
        is_up "$1" || return 0
        sleep 0.1
    done
    kill -KILL "$pid"
}

# Prints where Linux guests run: direct or emulated. VIREO_HOST decides; `auto` (the default) asks vireo whether this
# machine's /dev/kvm can run a Linux guest, and remembers the answer until the machine reboots.
host_kind() {
    case ${VIREO_HOST:-auto} in
        direct | emulated) echo "$VIREO_HOST"; return ;;
        auto) ;;
        *) die "VIREO_HOST is '$VIREO_HOST'; it must be auto, direct or emulated" ;;
    esac
    local boot cached kind
    boot=$(cat /proc/sys/kernel/random/boot_id)
    if read -r cached kind _ 2>/dev/null <"$state/kind" && [ "$cached" = "$boot" ]; then
        echo "$kind"
        return
    fi
    ask_doctor
    echo "$kind"
}

# Sets $kind to what the vireo binary says about this machine, and $why to the reason. Without a binary nothing is
# remembered.
ask_doctor() {
    local bin=${VIREO_BIN:-$repo/target/x86_64-unknown-linux-gnu/release/vireo} answer
    kind=emulated
    if [ ! -x "$bin" ]; then
        why="there is no vireo binary at $bin to ask (set VIREO_BIN, or build it)"
        return
    fi
    answer=$("$bin" doctor --json 2>/dev/null </dev/null) || true
    case $(tr -d ' \n' <<<"$answer") in
        *'"linux_guests":true'*) kind=direct why="vireo doctor says /dev/kvm here runs Linux guests" ;;
        *'"linux_guests":false'*) why="vireo doctor says /dev/kvm here cannot run Linux guests" ;;
        *) why="'$bin doctor --json' did not say whether Linux guests run here"; return ;;
    esac
    mkdir -p "$state"
    echo "$(cat /proc/sys/kernel/random/boot_id) $kind $why" >"$state/kind.$$"
    mv "$state/kind.$$" "$state/kind"
}
