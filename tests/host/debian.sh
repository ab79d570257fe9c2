# Packages of any Debian release, fetched by apt into a folder: apt keeps its lists, its cache and its idea of what is
# installed (nothing) below $state/apt, so it needs no privileges and leaves the system alone. Sourced by setup.

debian_keyring=/usr/share/keyrings/debian-archive-keyring
own_keyring=$state/apt/keyring$debian_keyring

# A mirror from the system's own list of sources, so that a mirror nearby is used where one is configured. The sources
# of security updates and of other systems have other endings.
debian_mirror() {
    local mirror
    mirror=${VIREO_DEBIAN_MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Identifier: Packages' 2>/dev/null |
        grep -m 1 '^http.*/debian/$' || true)}
    echo "${mirror:-http://deb.debian.org/debian}"
}

# in_debian RELEASE apt-get|apt-cache ARGUMENT...
in_debian() {
    local release=$1 tool=$2
    shift 2
    $tool -c "$state/apt/$release/apt.conf" "$@"
}

# use_debian RELEASE MIRROR KEYRING: writes the configuration of that release's apt.
use_debian() {
    local dir=$state/apt/$1
    mkdir -p "$dir"/lists/partial "$dir"/cache/archives/partial
    : >"$dir/status"
    echo "deb [signed-by=$3] $2 $1 main" >"$dir/sources.list"
    cat >"$dir/apt.conf" <<CONF
Dir::State "$dir";
Dir::State::lists "$dir/lists";
Dir::State::status "$dir/status";
Dir::Cache "$dir/cache";
Dir::Cache::pkgcache "pkgcache.bin";
Dir::Cache::srcpkgcache "srcpkgcache.bin";
Dir::Etc::sourcelist "$dir/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
APT::Architecture "amd64";
APT::Architectures { "amd64"; };
APT::Install-Recommends "false";
APT::Sandbox::User "$(id -un)";
APT::Update::Post-Invoke "";
APT::Update::Post-Invoke-Success "";
APT::Update::Error-Mode "any";
Acquire::Languages "none";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled "false";
Debug::NoLocking "true";
CONF
}

# update_debian RELEASE: fetches the list of that release's packages, once in a run of setup. A release leaves the
# mirrors for the archive some years after its end. Keys of new releases reach a system with updates of Debian's
# keyring, so the keyring from the system's own sources is tried if the installed one does not suffice.
updated=" "
update_debian() {
    case $updated in *" $1 "*) return ;; esac
    local log=$state/apt/$1.log
    echo "setup: fetching the list of packages of Debian $1" >&2
    mkdir -p "$state/apt"
    : >"$log"
    if update_by "$debian_keyring" "$1" ||
        { grep -qe NO_PUBKEY -e 'no keyring' "$log" && newest_keyring && update_by "$own_keyring" "$1"; }; then
        updated+="$1 "
        return
    fi
    cat "$log" >&2
    die "could not fetch the list of packages of Debian $1. Is the network available? VIREO_DEBIAN_MIRROR=URL selects
    another mirror. If a key is missing (NO_PUBKEY), install a newer version of the package debian-archive-keyring"
}

# update_by KEYRING RELEASE
update_by() {
    local keyring mirror
    for keyring in "$1".{gpg,pgp}; do
        [ -r "$keyring" ] || continue
        for mirror in "$(debian_mirror)" http://archive.debian.org/debian; do
            use_debian "$2" "$mirror" "$keyring"
            if in_debian "$2" apt-get -q update >>"$state/apt/$2.log" 2>&1; then return; fi
        done
        return 1
    done
    echo "there is no keyring $1.gpg" >>"$state/apt/$2.log"
    return 1
}

newest_keyring() {
    rm -rf "$state/apt/keyring"
    mkdir -p "$state/apt/keyring"
    (cd "$state/apt/keyring" && apt-get -q -o APT::Sandbox::User="$(id -un)" download debian-archive-keyring &&
        dpkg-deb -x ./*.deb .) >>"$state/apt/keyring.log" 2>&1
}

# debian_closure RELEASE PACKAGE...: the packages and all that they depend on.
debian_closure() { in_debian "$1" apt-get -qq -s install "${@:2}" | sed -n 's/^Inst \([^ ]*\) .*/\1/p'; }

# unpack_debian RELEASE FOLDER PACKAGE...: fetches exactly these packages and unpacks them into the folder.
unpack_debian() {
    local release=$1 folder=$2 debs=$2.debs package
    shift 2
    mkdir -p "$folder" "$debs"
    (cd "$debs" && in_debian "$release" apt-get -q download "$@" >&2) || die "could not download from Debian $release: $*"
    for package in "$debs"/*.deb; do dpkg-deb -x "$package" "$folder"; done
    rm -r "$debs"
}
