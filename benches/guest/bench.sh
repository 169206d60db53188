#!/bin/bash
# The measurements inside the guest.
#
# Usage: bench.sh PLACE OUT MODE [SUBJECT...]
#   PLACE   name of this setting in the report, such as guest-6.12-2cpu
#   OUT     folder for the results (fio's JSON, and *.result.json of our own)
#   MODE    wall: three interleaved rounds, and the tests that need wall time;
#           counted: one round of virtual time, because counted figures repeat
#           peer: one copy behind TCP on the loopback, beside DRBD, and with a network that takes time
#
# All subjects work on the same two null_blk disks with 20 us completion latency, memory backed,
# because metadata have to be readable. Jobs run on written extents.
set -euo pipefail

place=$1 out=$2 mode=$3
shift 3

# shellcheck source=tests/guest/lib.sh
. "$PROJECT_DIR/tests/guest/lib.sh"
# shellcheck source=tests/guest/damage.sh
. "$PROJECT_DIR/tests/guest/damage.sh"

# The kernel's DRBD is of the 8.4 line, and these are its words.
DRBD=/lib/drbd/drbdsetup-84
RUBLK=$PROJECT_DIR/.cache/rublk/bin/rublk
all=(bare md-none md-bitmap rublk-loop mirror mirror-no-intent mirror-no-sums)
[ "$mode" = peer ] && all=(drbd mirror-peer)
[ $# -gt 0 ] && all=("$@")
case $mode in
wall | peer) rounds=${BENCH_ROUNDS:-3} runtime=${BENCH_RUNTIME:-5} ;;
counted) rounds=1 runtime=${BENCH_RUNTIME:-500ms} ;;
*) fail "unknown mode $mode" ;;
esac
disk_mib=320 size_mib=256

latency=(irqmode=2 completion_nsec=20000 hw_queue_depth=128 submit_queues="$(nproc)")

disks() {
    nullb n0 "$1" "${latency[@]}"
    nullb n1 "$1" "${latency[@]}"
}

no_disks() {
    local name
    for name in n0 n1; do
        echo 0 >"$NULLB/$name/power"
        rmdir "$NULLB/$name"
    done
}

# set_up SUBJECT : sets TARGET to the block device to measure.
set_up() {
    case $1 in
    bare) TARGET=/dev/n0 ;;
    md-none | md-bitmap)
        local bitmap=internal
        [ "$1" = md-none ] && bitmap=none
        modprobe raid1
        mdadm --create /dev/md77 --run --metadata=1.2 --level=1 --raid-devices=2 \
            --assume-clean --bitmap=$bitmap /dev/n0 /dev/n1
        TARGET=/dev/md77
        ;;
    rublk-loop)
        "$WORK/bin/rublk" add loop --number 77 --file /dev/n0 --queue 1 --depth 128 >"$WORK/rublk.log" 2>&1
        TARGET=/dev/ublkb77
        wait_for 100 test -b $TARGET
        ;;
    drbd)
        # Both hosts are this one: two resources that are joined over the loopback. Protocol C; nothing
        # is copied at first, because both disks hold the same.
        local side port=7788 other=7789
        modprobe drbd
        for side in 0 1; do
            drbdmeta $side v08 "/dev/n$side" internal create-md --force >"$WORK/drbd.log" 2>&1
            "$DRBD" new-resource r$side
            "$DRBD" new-minor r$side $side 0
            "$DRBD" attach $side "/dev/n$side" "/dev/n$side" internal
            "$DRBD" connect r$side "ipv4:127.0.0.1:$port" "ipv4:127.0.0.1:$other" --protocol=C
            port=7789 other=7788
        done
        wait_for 100 drbd_is Connected
        "$DRBD" new-current-uuid 0 --clear-bitmap=yes
        wait_for 100 drbd_is UpToDate/UpToDate
        "$DRBD" primary 0
        TARGET=/dev/drbd0
        ;;
    mirror-peer)
        mirrorctl export /dev/n1 --listen 127.0.0.1:10809 --name data >"$WORK/export.log" 2>&1 &
        SERVER=$!
        wait_for 100 grep -q ready "$WORK/export.log"
        mirrorctl create bench --force --member /dev/n0 --member nbd://127.0.0.1/data
        mirrorctl start bench /dev/n0 nbd://127.0.0.1/data --front ublk --queue-depth 128
        find_device bench
        TARGET=$DEV
        ;;
    mirror | mirror-no-intent | mirror-no-sums)
        local options=(--front ublk --queue-depth 128) sums=()
        [ "$1" = mirror-no-sums ] && sums+=(--no-checksums)
        [ "$1" = mirror-no-intent ] && options+=(--no-intent-unsafe-for-benchmarks)
        mirrorctl create bench --force "${sums[@]}" --member /dev/n0 --member /dev/n1
        mirrorctl start bench "${options[@]}"
        find_device bench
        TARGET=$DEV
        ;;
    *) fail "unknown subject $1" ;;
    esac
}

tear_down() {
    udevadm settle --timeout=10
    case $1 in
    bare) ;;
    md-*)
        mdadm --stop /dev/md77
        mdadm --zero-superblock /dev/n0 /dev/n1
        ;;
    rublk-loop)
        "$WORK/bin/rublk" del --number 77
        wait_for 100 test ! -b /dev/ublkb77
        ;;
    drbd)
        "$DRBD" secondary 0
        "$DRBD" down r0
        "$DRBD" down r1
        dd if=/dev/zero of=/dev/n0 bs=1M count=1 seek=$((disk_mib - 1)) status=none
        dd if=/dev/zero of=/dev/n1 bs=1M count=1 seek=$((disk_mib - 1)) status=none
        ;;
    mirror-peer)
        mirrorctl stop bench
        kill $SERVER
        wait $SERVER || true
        mirrorctl destroy /dev/n0 /dev/n1 --force
        ;;
    mirror*)
        mirrorctl stop bench
        mirrorctl destroy /dev/n0 /dev/n1 --force
        ;;
    esac
}

# drbd_is WORD : whether DRBD says so of the first side.
drbd_is() { grep -q "^ *0: .*$1" /proc/drbd; }

fill() {
    fio --name=fill --filename="$TARGET" --direct=1 --ioengine=libaio --rw=write --bs=1m \
        --iodepth=4 --size="$1m" --end_fsync=1 --eta=never --output="$WORK/fill.log"
}

# measure SUBJECT JOB ROUND FIO_OPTIONS...
measure() {
    local subject=$1 job=$2 round=$3
    shift 3
    fio --name="$job" --filename="$TARGET" --direct=1 --ioengine=io_uring --eta=never \
        --random_generator=tausworthe64 --randrepeat=1 --norandommap \
        --output-format=json --output="$WORK/fio.json" "$@"
    cp "$WORK/fio.json" "$out/${place}__${subject}__${job}__$round.json"
    echo "$place $subject $job round $round: $(python3 -ISc '
import json, sys
job = json.load(open(sys.argv[1]))["jobs"][0]
iops = [job[way]["iops"] for way in ("read", "write")]
print(f"{max(iops):.0f} IOPS")' "$WORK/fio.json")"
}

four_jobs() {
    local subject=$1 round=$2
    local timed=(--time_based --runtime="$runtime" --ramp_time=0 --size="${size_mib}m")
    measure "$subject" randwrite-4k-qd1 "$round" --rw=randwrite --bs=4k --iodepth=1 "${timed[@]}"
    measure "$subject" randwrite-4k-qd32 "$round" --rw=randwrite --bs=4k --iodepth=32 "${timed[@]}"
    measure "$subject" randread-4k-qd32 "$round" --rw=randread --bs=4k --iodepth=32 "${timed[@]}"
    measure "$subject" seqwrite-128k-qd8 "$round" --rw=write --bs=128k --iodepth=8 "${timed[@]}"
}

# What first writes cost where the disk has no cheap write-zeroes: the same requests twice, first
# into unwritten extents.
first_writes() {
    local round=$1 random=(--rw=randwrite --bs=4k --iodepth=32 --size=192m --number_ios=2000)
    local sequential=(--rw=write --bs=128k --iodepth=8 --size=192m)
    no_disks && disks "$disk_mib"
    set_up mirror
    measure mirror first-randwrite "$round" "${random[@]}"
    fill 192
    measure mirror again-randwrite "$round" "${random[@]}"
    tear_down mirror
    no_disks && disks "$disk_mib"
    set_up mirror
    measure mirror first-seqwrite "$round" "${sequential[@]}"
    measure mirror again-seqwrite "$round" "${sequential[@]}"
    tear_down mirror
}

# What a network that takes time costs random writes: their rate beside what it would be if each
# write took what it takes without, and one round trip more.
distances() {
    local delay_us rtt_us base slow
    set_up mirror-peer
    fill "$size_mib"
    local job=(--rw=randwrite --bs=4k --iodepth=32 --size="${size_mib}m" --time_based)
    modprobe sch_netem
    measure mirror-peer distance-0 1 "${job[@]}" --runtime="$runtime"
    base=$(iops)
    for delay_us in 100 1000 10000; do
        rtt_us=$((2 * delay_us))
        tc qdisc add dev lo root netem limit 100000 delay ${delay_us}us
        measure mirror-peer distance-$rtt_us 1 "${job[@]}" --runtime="$runtime"
        slow=$(iops)
        tc qdisc del dev lo root
        result "distance-$rtt_us" rtt_us $rtt_us iops "$slow" iops_without "$base"
    done
    tear_down mirror-peer
}

# iops : of what was measured last.
iops() {
    python3 -ISc '
import json, sys
print(json.load(open(sys.argv[1]))["jobs"][0]["write"]["iops"])' "$WORK/fio.json"
}

sectors_written() { awk '{print $7}' "/sys/block/$1/stat"; }

now_ms() { date +%s%3N; }

changes() {
    fio --name=changes --filename="$TARGET" --direct=1 --ioengine=io_uring --rw=randwrite \
        --bs=4k --iodepth=8 --size="$1m" --io_size=$((1000 * 4096)) --end_fsync=1 --eta=never \
        --output="$WORK/changes.log"
}

# result NAME KEY VALUE... : a result of our own, as JSON.
result() {
    local name=$1
    shift
    python3 -ISc '
import json, sys
pairs = sys.argv[2:]
values = {pairs[i]: float(pairs[i + 1]) for i in range(0, len(pairs), 2)}
json.dump(values, open(sys.argv[1], "w"))' "$out/${place}__$name.result.json" "$@"
    echo "$place $name: $*"
}

# 1,000 random 4 KiB writes while a member of 1 GiB is away.
re_add() {
    local subject=$1 mib=960 before began ended copied zeroed=0 changed=$((1000 * 4096))
    disks 1024
    set_up "$subject"
    fill $mib
    sync
    case $subject in
    md-bitmap)
        # Let md take the bits of the fill away first, so that only the changes count.
        sleep 12
        mdadm /dev/md77 --fail /dev/n1 --remove /dev/n1
        changes $mib
        before=$(sectors_written n1) began=$(now_ms)
        mdadm /dev/md77 --re-add /dev/n1
        # --wait ends with 1 when nothing is left to wait for.
        mdadm --wait /dev/md77 || true
        ended=$(now_ms)
        [ "$(cat /sys/block/md77/md/degraded)" -eq 0 ] || fail "md is still degraded"
        copied=$((($(sectors_written n1) - before) * 512))
        ;;
    mirror)
        pull bench 1
        changes $mib
        before=$(sectors_written n1) began=$(now_ms)
        mirrorctl re-add bench /dev/n1
        mirrorctl wait bench --timeout 120
        ended=$(now_ms)
        copied=$(status_of bench last-resync.copied-bytes)
        zeroed=$(status_of bench last-resync.zeroed-bytes)
        ;;
    esac
    result "readd-$subject" changed "$changed" copied "$copied" zeroed "$zeroed" \
        member_written $((($(sectors_written n1) - before) * 512)) ms $((ended - began))
    tear_down "$subject"
    no_disks
}

# A member pulled in the middle of a random write load, and back under it.
re_add_under_load() {
    local before after fio
    disks "$disk_mib"
    set_up mirror
    fill "$size_mib"
    fio --name=load --filename="$TARGET" --direct=1 --ioengine=io_uring --rw=randwrite --bs=4k \
        --iodepth=32 --size="${size_mib}m" --rate_iops=2500 --fdatasync=256 --time_based \
        --runtime=60 --eta=never --output="$WORK/load.log" &
    fio=$!
    wait_for 100 status_moves bench
    sleep 1
    before=$(status_of bench io.written-bytes)
    pull bench 1
    sleep 3
    # Until the member receives writes again; blocks written twice count once.
    local missed
    missed=$(status_of bench members.1.missed-bytes)
    mirrorctl re-add bench /dev/n1
    after=$(status_of bench io.written-bytes)
    mirrorctl wait bench --timeout 120
    kill -INT $fio
    wait $fio || true
    result readd-under-load changed $((after - before)) missed "$missed" \
        copied "$(status_of bench last-resync.copied-bytes)" \
        zeroed "$(status_of bench last-resync.zeroed-bytes)" \
        ms "$(status_of bench last-resync.elapsed-ms)"
    tear_down mirror
    no_disks
}

# data_offset SUBJECT : bytes before the data on a member.
data_offset() {
    case $1 in
    md-*) echo $(($(mdadm --examine /dev/n0 | awk '/Data Offset/ {print $4}') * 512)) ;;
    mirror) offset_on /dev/n0 0 ;;
    esac
}

# md_does ACTION : has md check or repair, and waits.
md_does() {
    echo "$1" >/sys/block/md77/md/sync_action
    mdadm --wait /dev/md77 || true
}

# different A B : how many blocks of 4 KiB differ, of two files of the same length.
different() {
    { cmp -l "$1" "$2" || true; } | awk '{b[int(($1 - 1) / 4096)] = 1} END {print length(b)}'
}

# The same blocks changed on the disks of md and of ours, a hundred on each: how many are found,
# and how many are as they were written after a repair.
damage() {
    local subject=$1 mib=64 count=100 offset member found
    disks "$disk_mib"
    set_up "$subject"
    seeded damage $mib >"$WORK/written"
    dd if="$WORK/written" of="$TARGET" bs=1M oflag=direct status=none
    if [ "$subject" = mirror ]; then
        # All of it cool: what is hot a scrub leaves for later.
        mirrorctl stop bench
        mirrorctl start bench --front ublk --error-budget unlimited
        find_device bench
        TARGET=$DEV
    fi
    offset=$(data_offset "$subject")
    for member in 0 1; do
        "$PROJECT_DIR/benches/guest/damage.py" "/dev/n$member" "$offset" $((mib * 256)) $count $member 2
    done
    case $subject in
    md-none)
        md_does check
        found=$(($(cat /sys/block/md77/md/mismatch_cnt) / 8))
        md_does repair
        ;;
    mirror)
        scrub_once bench
        found=$(scrub_of bench passes.0.findings)
        ;;
    esac
    dd if="$TARGET" of="$WORK/read" bs=1M count=$mib iflag=direct status=none
    for member in 0 1; do
        dd if="/dev/n$member" of="$WORK/side$member" bs=1M count=$mib iflag=direct,skip_bytes \
            skip="$offset" status=none
    done
    result "damage-$subject" changed $((2 * count)) found "$found" \
        wrong "$(different "$WORK/read" "$WORK/written")" \
        unequal "$(different "$WORK/side0" "$WORK/side1")"
    rm "$WORK/written" "$WORK/read" "$WORK"/side?
    tear_down "$subject"
    no_disks
}

enter_guest
uname -r >"$out/$place.kernel"
subjects=()
for subject in "${all[@]}"; do
    if [ "$subject" = drbd ] && ! [ -x $DRBD ]; then
        echo "drbd-utils are not installed: DRBD's column stays empty"
        continue
    fi
    if [ "$subject" = rublk-loop ]; then
        [ -x "$RUBLK" ] || { echo "rublk is not built: its column stays empty" && continue; }
        cp "$RUBLK" "$WORK/bin/rublk"
    fi
    subjects+=("$subject")
done

disks "$disk_mib"
for round in $(seq "$rounds"); do
    for subject in "${subjects[@]}"; do
        set_up "$subject"
        fill "$size_mib"
        four_jobs "$subject" "$round"
        tear_down "$subject"
    done
    [[ " ${subjects[*]} " == *" mirror "* ]] && first_writes "$round"
done
[ "$mode" = peer ] && distances
no_disks
if [ "$mode" = wall ]; then
    for subject in md-bitmap mirror; do
        [[ " ${subjects[*]} " == *" $subject "* ]] && re_add "$subject"
    done
    [[ " ${subjects[*]} " == *" mirror "* ]] && re_add_under_load
    for subject in md-none mirror; do
        [[ " ${subjects[*]} " == *" $subject "* ]] && damage "$subject"
    done
fi
echo "measured: $place"
