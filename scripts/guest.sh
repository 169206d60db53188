#!/bin/bash
# Boot a Debian kernel over this machine's root filesystem and run one command in it.
#
# Usage: scripts/guest.sh [options] -- COMMAND
#   --family F     kernel family, 6.12 (default) or 7.2
#   --cpus N       processors (default 2)
#   --memory M     memory (default 3G)
#   --icount       one processor that counts instructions: virtual time is the number of
#                  instructions, so measured figures repeat on a busy machine
#   --timeout S    end the guest after S seconds (default 600)
#   --rwdir DIR    let the guest write to DIR, under the same path (may be repeated)
#   --drive FILE   attach a raw image as /dev/vda, /dev/vdb ... (may be repeated)
#   --pidfile F    where the emulator writes its process id
#
# COMMAND is a line of bash. The root filesystem is visible read-only with a writable layer in
# memory, so whatever the guest changes elsewhere is gone afterwards. In the guest, PATH begins
# with the folder of the project's release binaries (UBLK_MIRROR_BIN, or CARGO_TARGET_DIR/release,
# or target/release), and PROJECT_DIR and GUEST_FAMILY are set.
#
# The exit status is the command's; 124 when the time is over; 125 when the guest ended without
# a result (a kernel crash, or a killed emulator). Emulation is in software: nested KVM is not
# there on the machines that this has to run on.
set -uo pipefail

project=$(cd "$(dirname "$0")/.." && pwd)
family=6.12 cpus=2 memory=3G limit=600 icount=no pidfile=
rwdirs=() drives=()

usage() {
    sed -n '2,23p' "$0" | sed 's/^# \{0,1\}//' >&2
    exit 2
}

while [ $# -gt 0 ]; do
    case $1 in
    --family) family=$2 && shift 2 ;;
    --cpus) cpus=$2 && shift 2 ;;
    --memory) memory=$2 && shift 2 ;;
    --timeout) limit=$2 && shift 2 ;;
    --rwdir) rwdirs+=("$(realpath "$2")") && shift 2 ;;
    --drive) drives+=("$(realpath "$2")") && shift 2 ;;
    --pidfile) pidfile=$2 && shift 2 ;;
    --icount) icount=yes cpus=1 && shift ;;
    --) shift && break ;;
    *) usage ;;
    esac
done
[ $# -ge 1 ] || usage

kernel=$("$project/scripts/kernel.sh" "$family") || exit 125
venv_bin=$("$project/scripts/vng-env.sh") || exit 125
binaries=${UBLK_MIRROR_BIN:-${CARGO_TARGET_DIR:-$project/target}/release}

exchange=$(mktemp -d "${TMPDIR:-/tmp}/ublk-mirror-guest.XXXXXX") || exit 125
pidfile=${pidfile:-$exchange/qemu.pid}
finish() {
    # The emulator ends with the command; this is for the ways out that are not regular.
    local pid
    # First who would start it yet: the time limit passes the signal on.
    pid=$(cat "$exchange/timeout.pid" 2>/dev/null) && kill "$pid" 2>/dev/null
    pid=$(cat "$pidfile" 2>/dev/null)
    if [ -n "$pid" ] && grep -q qemu "/proc/$pid/comm" 2>/dev/null; then
        kill -KILL "$pid" 2>/dev/null
    fi
    rm -rf "$exchange"
}
trap finish EXIT
trap 'exit 130' INT TERM

{
    printf 'export PROJECT_DIR=%q GUEST_FAMILY=%q UBLK_MIRROR_BIN=%q\n' \
        "$project" "$family" "$binaries"
    # shellcheck disable=SC2016
    echo 'export PATH=$UBLK_MIRROR_BIN:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'
    echo 'export HOME=/root LC_ALL=C.UTF-8'
    printf '%s\n' "$*"
} >"$exchange/command"

options=(--run "$kernel" --disable-kvm --cpus "$cpus" --memory "$memory" --rwdir "$exchange")
for dir in "${rwdirs[@]}"; do
    options+=(--rwdir "$dir")
done
qemu="-pidfile $pidfile"
for drive in "${drives[@]}"; do
    qemu+=" -drive file=$drive,format=raw,if=virtio,cache=writeback,discard=unmap"
done
[ "$icount" = yes ] && qemu+=" -icount shift=0,sleep=off"

# The pipe is needed: the emulator opens its standard output by name, which would truncate a file.
# In the background, because a signal is looked at only when nothing in the foreground runs.
{
    PATH=$venv_bin:$PATH timeout --kill-after=10 "$limit" \
        vng "${options[@]}" --qemu-opts="$qemu" -- \
        "cd /; bash $exchange/command; echo \$? >$exchange/code; sync" </dev/null &
    echo $! >"$exchange/timeout.pid"
    wait $!
    ended=$?
    rm -f "$exchange/timeout.pid"
    echo $ended >"$exchange/ended"
} 2>&1 | cat &
wait $!
ended=$(cat "$exchange/ended")

if [ -s "$exchange/code" ]; then
    exit "$(cat "$exchange/code")"
fi
if [ $ended -eq 124 ] || [ $ended -eq 137 ]; then
    echo "The guest was ended after $limit seconds." >&2
    exit 124
fi
echo "The guest ended without a result (the emulator's exit status was $ended)." >&2
exit 125
