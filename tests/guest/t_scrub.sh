# Bytes that change on members' disks under the daemon, pages of checksums too: a scrub and reads
# heal them from the right side; nobody above sees an error while one good copy exists.
. "$(dirname "$0")/lib.sh"

MIB=48

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

same_as_written() {
    dd if="$DEV" bs=1M count=$MIB iflag=direct status=none | cmp - <(seeded scrub $MIB)
}

# filled NAME MEMBER... : a mirror with known content, all of it cool.
filled() {
    local name=$1
    make_mirror "$@"
    seeded scrub $MIB | dd of="$DEV" bs=1M oflag=direct iflag=fullblock status=none
    sync
    mirrorctl stop "$name"
    mirrorctl start "$name" --front ublk --check-reads "$CHECK" --scrub-days 0 \
        --error-budget unlimited
    find_device "$name"
}

# Two members, each of them bad in its turn; a block in another's place; a page of checksums.
CHECK=scrub-only
nullb m0 160
nullb m1 160
filled sweep /dev/m0 /dev/m1
spoil /dev/m0 "$(offset_on /dev/m0 $((5 << 20)))"
spoil /dev/m1 "$(offset_on /dev/m1 $((9 << 20)))"
spoil /dev/m1 "$(offset_on /dev/m1 $((9 << 20 | 8192)))"
dd if=/dev/m1 of=/dev/m1 bs=4096 count=1 iflag=skip_bytes,direct oflag=seek_bytes,direct \
    skip="$(offset_on /dev/m1 $((20 << 20)))" seek="$(offset_on /dev/m1 $((21 << 20)))" \
    conv=notrunc status=none
spoil /dev/m0 "$(table_on /dev/m0 7)"
scrub_once sweep
[ "$(scrub_of sweep totals.rewritten-blocks)" -eq 4 ] || fail "$(mirrorctl scrub report sweep)"
[ "$(scrub_of sweep totals.mended-blocks)" -ge 1000 ] || fail "$(mirrorctl scrub status sweep)"
[ "$(scrub_of sweep damaged-blocks)" -eq 0 ] || fail "$(mirrorctl scrub report sweep)"
mirrorctl scrub report sweep
mirrorctl scrub map sweep
same_as_written
expect_status sweep state in-sync
mirrorctl stop sweep
compare_members /dev/m0 /dev/m1
mirrorctl check /dev/m0 /dev/m1

# The same block on both: damaged, an error and not wrong data, until it is written again.
mirrorctl start sweep --front ublk --scrub-days 0
find_device sweep
spoil /dev/m0 "$(offset_on /dev/m0 $((3 << 20)))"
spoil /dev/m1 "$(offset_on /dev/m1 $((3 << 20)))"
scrub_once sweep
[ "$(scrub_of sweep damaged-blocks)" -eq 1 ] || fail "$(mirrorctl scrub report sweep)"
if dd if="$DEV" of=/dev/null bs=4096 count=1 skip=$((3 << 8)) iflag=direct status=none; then
    fail "a block without a good copy was read"
fi
seeded scrub $MIB | dd bs=1M skip=3 count=1 iflag=fullblock status=none |
    dd of="$DEV" bs=1M seek=3 oflag=direct iflag=fullblock status=none
same_as_written
[ "$(scrub_of sweep damaged-blocks)" -eq 0 ] || fail "still damaged: $(mirrorctl scrub report sweep)"
mirrorctl stop sweep
mirrorctl destroy /dev/m0 /dev/m1 --force

# Three members and reads alone: whoever is asked, what comes is what was written.
CHECK=always
nullb m2 160
filled three /dev/m0 /dev/m1 /dev/m2
for member in 0 1 2; do
    spoil "/dev/m$member" "$(offset_on "/dev/m$member" $((member * 8 + 6 << 20)))"
done
for _ in 1 2 3 4; do
    same_as_written
    fio_job --filename="$DEV" --rw=randread --bs=4k --iodepth=16 --size=${MIB}m --io_size=16m >"$WORK/fio"
done
expect_status three io.errors 0

# A member is lost and comes back while a scrub runs and writes go on.
fio --name=load --filename="$DEV" --direct=1 --ioengine=libaio --rw=randwrite --bs=4k --iodepth=8 \
    --size=${MIB}m --rate_iops=200 --time_based --runtime=20 --eta=never --output="$WORK/load" &
load=$!
mirrorctl scrub start three --once
pull three 1
mirrorctl re-add three /dev/m1
mirrorctl wait three --timeout 120
wait $load
scrub_once three
expect_status three state in-sync
[ "$(scrub_of three damaged-blocks)" -eq 0 ] || fail "$(mirrorctl scrub report three)"
mirrorctl stop three
compare_members /dev/m0 /dev/m1 /dev/m2
mirrorctl check /dev/m0 /dev/m1 /dev/m2
