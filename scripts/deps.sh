#!/bin/bash
# Install what building, testing and measuring this project needs, beside Rust.
#
# Usage: scripts/deps.sh [--check] [--bench]
#
# For Debian 12 or 13, as root. Quick when everything is there: then nothing is asked of the
# archive. --check only says what is missing (exit status 1 if anything is); --bench adds what is
# measured beside.
set -euo pipefail

# shellcheck source=scripts/private-apt.sh
. "$(dirname "$0")/private-apt.sh"

build=(g++ gcc libc6-dev libclang-dev make pkg-config)
tests=(busybox-static dmsetup e2fsprogs fio iproute2 kmod mdadm nbd-server nbdkit nftables openssl
    procps psmisc python3 python3-venv qemu-system-x86 qemu-utils sqlite3 udev util-linux xfsprogs)

others=(drbd-utils libnbd-bin)

check=no bench=no
for option in "$@"; do
    case $option in
    --check) check=yes ;;
    --bench) bench=yes ;;
    *)
        echo "deps.sh knows no $option" >&2
        exit 2
        ;;
    esac
done
[ $bench = yes ] && tests+=("${others[@]}")

is_installed() {
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

missing=()
for package in "${build[@]}" "${tests[@]}"; do
    is_installed "$package" || missing+=("$package")
done
if ! command -v cargo >/dev/null; then
    echo "cargo is not in PATH: install Rust (the version in Cargo.toml's rust-version)." >&2
    exit 1
fi
[ ${#missing[@]} -gt 0 ] || exit 0
if [ $check = yes ]; then
    echo "missing packages: ${missing[*]}"
    exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "These packages are missing; install them as root: ${missing[*]}" >&2
    exit 1
fi

export DEBIAN_FRONTEND=noninteractive
install=(apt-get install -y -q --no-install-recommends)
apt-get -q update

# qemu's packages depend on each other by exact version. Where one of them was installed from
# another suite (a backport), the rest has to come from that suite too.
present=
for package in qemu-utils qemu-system-common qemu-system-x86; do
    if is_installed "$package"; then
        present=$(dpkg-query -W -f '${Version}' "$package")
    fi
done
offered=$(apt-cache policy qemu-system-x86 | sed -n 's/^ *Candidate: //p')
rest=() qemu=()
for package in "${missing[@]}"; do
    case $package in
    qemu-*) qemu+=("$package") ;;
    *) rest+=("$package") ;;
    esac
done
if [ ${#qemu[@]} -gt 0 ] && { [ -z "$present" ] || [ "$present" = "$offered" ]; }; then
    rest+=("${qemu[@]}")
    qemu=()
fi
if [ ${#rest[@]} -gt 0 ]; then
    "${install[@]}" "${rest[@]}"
fi
if [ ${#qemu[@]} -gt 0 ]; then
    # shellcheck source=/dev/null
    codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
    private_apt_setup "backports-$codename" "main:$codename" "main:$codename-backports" \
        "security:$codename-security"
    "${install[@]}" "${PRIVATE_APT[@]}" -t "$codename-backports" "${qemu[@]/%/=$present}"
fi
