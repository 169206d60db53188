#!/bin/bash
# The main job on two image files: pull a member, put it back, and see that only what changed
# is copied.
#
# Usage: scripts/quickstart.sh [--keep] [--data MIB]
#
# Wants the release binaries (`make build`; `make quickstart` does both). Takes /dev/ublkbN where
# the kernel has ublk and this runs as root, else NBD on a unix socket. --data says how much of this
# machine's own files to write (default 200). All its files are in one temporary folder (below
# TMPDIR), which is removed at the end unless --keep is given. Ends with 0 only if every byte
# that was written has been read back, and prints the commands it ran.
set -euo pipefail

project=$(cd "$(dirname "$0")/.." && pwd)
binaries=${UBLK_MIRROR_BIN:-${CARGO_TARGET_DIR:-$project/target}/release}
case $binaries in /*) ;; *) binaries=$project/$binaries ;; esac
keep=no data_mib=200
while [ $# -gt 0 ]; do
    case $1 in
    --keep) keep=yes && shift ;;
    --data) data_mib=$2 && shift 2 ;;
    *) sed -n '2,12p' "$0" | sed 's/^# \{0,1\}//' >&2 && exit 2 ;;
    esac
done
for program in mirrorctl ublk-mirror; do
    if [ ! -x "$binaries/$program" ]; then
        echo "$binaries/$program is missing: run 'make build' first." >&2
        exit 1
    fi
done
export PATH=$binaries:$PATH:/usr/sbin:/sbin LC_ALL=C.UTF-8
for tool in qemu-io qemu-img python3 mkfs.ext4; do
    if ! command -v $tool >/dev/null; then
        echo "$tool is missing: run scripts/deps.sh as root first." >&2
        exit 1
    fi
done

area=$(mktemp -d "${TMPDIR:-/tmp}/ublk-mirror-demo.XXXXXX")
cd "$area"
export UBLK_MIRROR_RUN_DIR=$area/run
ran=()
finish() {
    local code=$?
    set +e
    cd /
    mountpoint -q "$area/mnt" && umount "$area/mnt"
    [ -e "$area/run/demo.sock" ] && timeout 30 mirrorctl stop demo --force >"$area/stop.log" 2>&1
    if [ $code -ne 0 ]; then
        echo "The quickstart FAILED (exit status $code). The daemon's last words:" >&2
        tail -n 20 "$area/run/demo.log" >&2
    fi
    if [ $keep = yes ]; then
        echo "All files are left in $area."
    else
        rm -rf "$area"
    fi
    exit $code
}
trap finish EXIT
trap 'exit 130' INT TERM

step() { printf '\n%s\n' "$*"; }

# run LINE : shows a line of shell, notes it for the end, and runs it.
run() {
    printf '  $ %s\n' "$1"
    ran+=("$1")
    eval "$1"
}

# status_value PATH : a value of the mirror's status, such as io.written-bytes.
status_value() {
    mirrorctl status demo --json | python3 -c '
import json, sys
value = json.load(sys.stdin)
for key in sys.argv[1].split("."):
    value = value[key]
print(value)' "$1"
}

data_offset() {
    mirrorctl examine a.img --json |
        python3 -c 'import json, sys; print(json.load(sys.stdin)["data-offset"])'
}

# real_data : about $data_mib MiB of this machine's own files in data.tar.
real_data() {
    # head ends tar early, which is no failure here.
    set +o pipefail
    run "tar -C /usr -cf - share lib 2>/dev/null | head -c ${data_mib}M >data.tar"
    set -o pipefail
}

# The writes: 1,000 different blocks of the data, chosen anew by each run.
make_changes() {
    run "shuf -i 0-$((data_mib * 256 - 1)) -n 1000 | awk '{print \"write -P\", 1 + NR % 255, \$1 * 4096, 4096}' >changes"
}

began=$SECONDS
step "1. Create a mirror of 1 GiB on two image files and start it"
run "export UBLK_MIRROR_RUN_DIR=\$PWD/run"
run "mirrorctl create demo --member a.img --member b.img --size 1G"
front=
[ "$(id -u)" -eq 0 ] || front=" --front nbd"
run "mirrorctl start demo a.img b.img$front"
device=$(status_value device)

case $device in
/dev/*)
    kind=ublk
    step "2. A filesystem on $device with real data"
    real_data
    run "mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 $device"
    run "mkdir mnt && mount $device mnt"
    run "cp data.tar mnt/ && sync -f mnt"
    target=mnt/data.tar
    ;;
*)
    kind=nbd
    step "2. Real data through $device"
    real_data
    run "truncate -s 1G data.tar # the rest of the device has to be zero"
    run "uri=nbd+unix:///?socket=run/demo.nbd"
    run "qemu-img convert -n -f raw -O raw data.tar \$uri"
    target=\$uri
    ;;
esac

step "3. Pull a member"
run "mirrorctl fail demo 1"
run "mirrorctl remove demo 1"

step "4. Change some of the data: 1,000 random writes of 4 KiB"
make_changes
before=$(status_value io.written-bytes)
run "qemu-io -f raw $target <changes >changes.log"
run "qemu-io -f raw data.tar <changes >changes.log # the same writes to the copy to compare with"
[ $kind = nbd ] || run "sync -f mnt"
written=$(($(status_value io.written-bytes) - before))
run "mirrorctl status demo"

step "5. Put it back"
run "mirrorctl re-add demo b.img"
run "mirrorctl wait demo --timeout 60"
summary=$(mirrorctl wait demo)
printf '\n  changed %s MiB in 1,000 writes (%s bytes reached the device in all)\n  %s\n' \
    "$(awk 'BEGIN {printf "%.1f", int(1000 * 4096 / 1048576 * 10) / 10}')" "$written" "$summary"

step "6. Stop, and compare both members byte by byte"
[ $kind = nbd ] || run "umount mnt"
run "mirrorctl stop demo"
run "cmp --ignore-initial=$(data_offset) a.img b.img && echo the members are the same"

step "7. Start again and verify everything that was written"
run "mirrorctl start demo a.img b.img$front"
device=$(status_value device)
if [ $kind = ublk ]; then
    run "mount $device mnt"
    run "cmp mnt/data.tar data.tar && echo every byte is there"
    run "umount mnt"
else
    run "qemu-img compare -f raw -F raw data.tar \$uri"
fi
run "mirrorctl stop demo"

printf '\nDone in %s s. The commands (in an empty folder, as root):\n' \
    "$((SECONDS - began))"
# shellcheck disable=SC2016
printf '  PATH=%s:$PATH\n' "$binaries"
printf '  %s\n' "${ran[@]}"
