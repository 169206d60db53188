# shellcheck shell=bash
# Helpers of the tests that damage members' disks under the daemon, and let scrubs look for it.

# bad_disk MIB : /dev/nbd0, a disk of which sectors can go bad until they are written.
bad_disk() {
    modprobe nbd nbds_max=1
    # It ends with clean_up, after whoever has the disk open.
    python3 -IS "$GUEST_DIR/bad_disk.py" serve /dev/nbd0 "$1" "$WORK/bad_disk" &
    echo $! >"$WORK/bad_disk.pid"
    wait_for 100 test -S "$WORK/bad_disk"
    wait_for 100 test -e /sys/block/nbd0/pid
}

# bad_sectors [BYTE SECTORS] : these go bad as well; prints how many are.
bad_sectors() { python3 -IS "$GUEST_DIR/bad_disk.py" ask "$WORK/bad_disk" "$@"; }

# readable PATH BYTE : the disk itself can read the 4 KiB there.
readable() {
    dd if="$1" of=/dev/null bs=4096 count=1 iflag=direct,skip_bytes skip="$2" status=none \
        2>/dev/null
}

# offset_on PATH BYTE : where a byte of the device lies on a member.
offset_on() {
    local start
    start=$(mirrorctl examine "$1" --json | python3 -ISc '
import json, sys
print(json.load(sys.stdin)["data-offset"])')
    echo $((start + $2))
}

# table_on PATH EXTENT : where an extent's page of checksums lies on a member.
table_on() {
    mirrorctl examine "$1" --json | python3 -ISc '
import json, sys
regions = json.load(sys.stdin)["regions"]
table = next(r for r in regions if r["kind"] == "checksums")
print(table["copy-a"] + int(sys.argv[1]) * 4096)' "$2"
}

# spoil PATH OFFSET : 4 KiB of something else, written under the daemon.
spoil() {
    head -c 4096 /dev/urandom |
        dd of="$1" bs=4096 count=1 seek="$2" oflag=seek_bytes,direct conv=notrunc status=none
}

# scrub_of NAME PATH : a value of the scrub's status.
scrub_of() {
    mirrorctl scrub status "$1" --json | python3 -ISc '
import json, sys
value = json.load(sys.stdin)
for key in sys.argv[1].split("."):
    value = value[int(key)] if isinstance(value, list) else value[key]
print(value)' "$2"
}

pass_ended() { [ "$(scrub_of "$1" passes.0.number 2>/dev/null || echo 0)" -ge "$2" ]; }

# scrub_once NAME : a whole pass, begun now.
scrub_once() {
    local number
    number=$(($(scrub_of "$1" totals.passes) + 1))
    mirrorctl scrub start "$1" --once
    wait_for 1200 pass_ended "$1" "$number"
}

# no_pass NAME : a condition for wait_for: no pass is under way.
no_pass() { [ "$(scrub_of "$1" pass)" = None ]; }

# expect_scrub NAME PATH VALUE
expect_scrub() {
    local got
    got=$(scrub_of "$1" "$2")
    [ "$got" = "$3" ] || fail "$2 is $got instead of $3: $(mirrorctl scrub report "$1")"
}

# spoil_at SLOT BYTE : of the device, on one member.
spoil_at() { spoil "/dev/m$1" "$(offset_on "/dev/m$1" "$2")"; }

# put_at SLOT BYTE SOURCE SOURCE_BYTE : a block of something else there.
put_at() {
    dd if="$3" of="/dev/m$1" bs=4096 count=1 skip="$4" seek="$(offset_on "/dev/m$1" "$2")" \
        iflag=skip_bytes oflag=seek_bytes,direct conv=notrunc status=none
}

# filled NAME MIB CHECK_READS MEMBER... : a mirror with $WORK/content, all of it cool.
filled() {
    local name=$1 mib=$2 check=$3
    shift 3
    make_mirror "$name" "$@"
    seeded "$name" "$mib" >"$WORK/content"
    dd if="$WORK/content" of="$DEV" bs=1M oflag=direct status=none
    sync
    mirrorctl stop "$name"
    serve "$name" "$check" --error-budget unlimited
}

# serve NAME CHECK_READS [OPTION...] : starts it anew; scrubs begin by command.
serve() {
    mirrorctl start "$1" --front ublk --scrub-days 0 --check-reads "$2" "${@:3}"
    find_device "$1"
}

# same_as_written : the device holds $WORK/content.
same_as_written() {
    dd if="$DEV" bs=1M count=$(($(stat -c %s "$WORK/content") >> 20)) iflag=direct status=none |
        cmp - "$WORK/content"
}
