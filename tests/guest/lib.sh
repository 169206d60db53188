# shellcheck shell=bash
# Helpers of the tests that run on a real kernel, inside the guest. Sourced by t_*.sh.
#
# A test is a bash script under `set -e`: it passes when it exits with 0. What it leaves behind
# (mirrors, mounts, devices) is taken away by run.sh through `clean_up`. The work area $WORK is
# in memory.

set -euo pipefail

WORK=${WORK:-/run/guest-tests}
NULLB=/sys/kernel/config/nullb
export UBLK_MIRROR_RUN_DIR=$WORK/run
# Where a test takes more than a minute, a pass would begin by itself and find what it has prepared.
export UBLK_MIRROR_SCRUB_DAYS=0
export PATH=$WORK/bin:$PATH
GUEST_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() {
    echo "FAILED: $*" >&2
    exit 1
}

# expect_failure CODE COMMAND... : the command must fail with this exit status and say something.
expect_failure() {
    local want=$1 got=0 text
    shift
    text=$("$@" 2>&1) || got=$?
    [ "$got" -eq "$want" ] || fail "'$*' ended with $got instead of $want: $text"
    [ -n "$text" ] || fail "'$*' failed without a word"
}

# nullb NAME MIB [ATTRIBUTE=VALUE...] : a disk in memory whose content can be read back.
nullb() {
    local name=$1 mib=$2 setting
    shift 2
    modprobe null_blk nr_devices=0
    mountpoint -q /sys/kernel/config || mount -t configfs none /sys/kernel/config
    mkdir "$NULLB/$name"
    echo "$mib" >"$NULLB/$name/size"
    for setting in memory_backed=1 blocksize=512 discard=1 submit_queues=1 irqmode=0 "$@"; do
        echo "${setting#*=}" >"$NULLB/$name/${setting%%=*}"
    done
    echo 1 >"$NULLB/$name/power"
    wait_for 50 test -b "/dev/$name"
}

# wait_for TENTHS COMMAND... : until the command succeeds.
wait_for() {
    local tenths=$1
    shift
    while ! "$@"; do
        tenths=$((tenths - 1))
        [ "$tenths" -gt 0 ] || fail "waited in vain for: $*"
        sleep 0.1
    done
}

# Once in a boot: the work area in memory, with the programs in it, because programs that page in
# over the shared root filesystem would blur every timing.
enter_guest() {
    local program
    mkdir -p "$WORK"
    mount -t tmpfs -o size=80% tmpfs "$WORK"
    mkdir -p "$WORK/bin" "$WORK/logs"
    for program in ublk-mirror mirrorctl; do
        if ! cp "$UBLK_MIRROR_BIN/$program" "$WORK/bin/"; then
            fail "$UBLK_MIRROR_BIN/$program is missing: run cargo build --release first."
        fi
    done
    modprobe ublk_drv
}

# make_mirror NAME [create's options] [--deadline S] MEMBER... : creates and starts; sets DEV.
make_mirror() {
    local name=$1 arguments=() start=()
    shift
    while [ $# -gt 0 ]; do
        case $1 in
        --deadline) start+=("$1" "$2") && shift 2 ;;
        --size | --logical-block) arguments+=("$1" "$2") && shift 2 ;;
        --*) arguments+=("$1") && shift ;;
        *) arguments+=(--member "$1") && shift ;;
        esac
    done
    mirrorctl create "$name" "${arguments[@]}"
    mirrorctl start "$name" --front ublk "${start[@]}"
    find_device "$name"
}

# find_device NAME : sets DEV to where the running mirror is found.
find_device() {
    DEV=$(status_of "$1" device)
    wait_for 50 test -b "$DEV"
}

# status_of NAME PATH : a value of the status, such as `state` or `members.1.missed-bytes`.
status_of() {
    mirrorctl status "$1" --json | python3 -ISc '
import json, sys
value = json.load(sys.stdin)
for key in sys.argv[1].split("."):
    if isinstance(value, list):
        value = value[int(key)]
    else:
        value = value[key]
print(value if not isinstance(value, bool) else str(value).lower())' "$2"
}

# expect_status NAME PATH VALUE
expect_status() {
    local got
    got=$(status_of "$1" "$2")
    [ "$got" = "$3" ] || fail "$2 is $got instead of $3: $(mirrorctl status "$1")"
}

# pull NAME SLOT : the member is gone for the mirror, and its device is let go.
pull() {
    mirrorctl fail "$1" "$2"
    mirrorctl remove "$1" "$2"
}

# status_is NAME PATH VALUE : a condition for wait_for.
status_is() {
    [ "$(status_of "$1" "$2")" = "$3" ]
}

# stallable_members MIB : /dev/m0, and STALLABLE, a member that can stop answering.
stallable_members() {
    nullb m0 "$1"
    nullb m1 "$1"
    dmsetup create test-stall --table "0 $(blockdev --getsz /dev/m1) linear /dev/m1 0"
    dmsetup mknodes test-stall
    STALLABLE=/dev/mapper/test-stall
}

# stall, end_stall : requests to STALLABLE wait in its queue meanwhile.
stall() { dmsetup suspend --noflush --nolockfs test-stall; }
end_stall() { dmsetup resume test-stall; }

# return_member NAME : the stalled member comes back once it has answered what it held (R13).
return_member() {
    mirrorctl remove "$1" 1
    wait_for 100 mirrorctl re-add "$1" "$STALLABLE"
    mirrorctl wait "$1" --timeout 60
    expect_status "$1" state in-sync
    expect_status "$1" last-resync.kind delta
}

# medium_disk MIB : SD, a disk of scsi_debug.
medium_disk() {
    modprobe scsi_debug "dev_size_mb=$1" delay=0 per_host_store=1
    wait_for 100 disk_of_scsi_debug
    udevadm settle
}

disk_of_scsi_debug() {
    local path
    for path in /sys/bus/pseudo/drivers/scsi_debug/adapter*/host*/target*/*:*/block/*; do
        [ -e "$path" ] && SD=/dev/$(basename "$path") && [ -b "$SD" ] && return 0
    done
    return 1
}

# medium_errors BYTE SECTORS : from this byte of SD on these sectors cannot be read, whatever is
# written to them; no sectors: all is well again.
medium_errors() {
    echo $(($1 / 512)) >/sys/module/scsi_debug/parameters/medium_error_start
    echo "$2" >/sys/module/scsi_debug/parameters/medium_error_count
    echo $(($2 > 0 ? 2 : 0)) >/sys/bus/pseudo/drivers/scsi_debug/opts
}

# cgroup NAME MEMORY : for run_in NAME COMMAND..., which may use no more memory than that.
cgroup() {
    if ! mountpoint -q "$WORK/cgroup"; then
        mkdir -p "$WORK/cgroup"
        mount -t cgroup2 none "$WORK/cgroup"
    fi
    echo +memory >"$WORK/cgroup/cgroup.subtree_control"
    mkdir "$WORK/cgroup/test-$1"
    echo "$2" >"$WORK/cgroup/test-$1/memory.max"
}

run_in() (
    echo "$BASHPID" >"$WORK/cgroup/test-$1/cgroup.procs"
    shift
    exec "$@"
)

# no_longer_equalising NAME : after an unclean stop, all copies have been made equal.
no_longer_equalising() {
    status_is "$1" extents.unequalised-blocks 0
}

# compare_members PATH PATH... : the data areas are the same, byte for byte. For members that
# were all zero when the mirror was created.
compare_members() {
    python3 -IS "$GUEST_DIR/compare.py" "$@"
}

# pseudo-random content that repeats: seeded NAME MIB
seeded() {
    openssl enc -aes-128-ctr -nosalt -pass "pass:$1" -pbkdf2 -in /dev/zero 2>/dev/null |
        head -c "$(($2 << 20))" || true
}

# fio_job OPTIONS... : direct I/O with a short report; fails on the first error.
fio_job() {
    fio --name=job --direct=1 --ioengine=libaio --group_reporting --exitall_on_error \
        --eta=never --random_generator=tausworthe64 "$@"
}

# Whatever the test left behind. Never fails.
clean_up() {
    set +e
    local mount device entry
    for device in $(dmsetup ls 2>/dev/null | awk '/^test-/ {print $1}'); do
        dmsetup resume "$device"
    done
    for device in $(awk '/^\/dev\/ublkb/ {print $1}' /proc/swaps); do
        timeout 60 swapoff "$device"
    done
    for mount in $(awk -v work="$WORK/" \
        'index($2, work) == 1 && $3 != "cgroup2" {print $2}' /proc/mounts | sort -r); do
        umount "$mount" || umount -l "$mount"
    done
    for entry in "$UBLK_MIRROR_RUN_DIR"/*.sock; do
        [ -e "$entry" ] && timeout 20 mirrorctl stop "$(basename "$entry" .sock)" --force
    done
    killall -q -KILL ublk-mirror
    for entry in "$WORK"/cgroup/test-*/; do
        [ -d "$entry" ] || continue
        echo 1 >"$entry/cgroup.kill"
        (wait_for 100 rmdir "$entry" 2>/dev/null)
    done
    for device in $(dmsetup ls 2>/dev/null | awk '/^test-/ {print $1}'); do
        timeout 20 dmsetup remove --force "$device"
    done
    for device in $(losetup -ln -O NAME 2>/dev/null); do
        losetup -d "$device"
    done
    if [ -e "$WORK/bad_disk.pid" ]; then
        # The kernel lets go of the disk when its server has gone.
        kill -KILL "$(cat "$WORK/bad_disk.pid")"
        (wait_for 100 test ! -e /sys/block/nbd0/pid)
        timeout 20 rmmod nbd
    fi
    if [ -d /sys/module/scsi_debug ]; then
        udevadm settle --timeout=5
        timeout 20 rmmod scsi_debug
    fi
    for entry in "$NULLB"/*/; do
        [ -d "$entry" ] && echo 0 >"$entry/power" && rmdir "$entry"
    done
    find "$WORK" -mindepth 1 -maxdepth 1 ! -name bin ! -name logs ! -name cgroup -exec rm -rf {} +
    set -e
}

# status_moves NAME : a condition for wait_for: writes arrive at the mirror.
status_moves() {
    local first
    first=$(status_of "$1" io.writes)
    sleep 0.2
    [ "$(status_of "$1" io.writes)" -gt "$first" ]
}
