# Records what each member's disk was told, for a check of every moment at which the power could
# have been cut. A device of dm-log-writes lies under each member; the load is promises.py; a
# member is pulled and comes back meanwhile. What comes of it is checked outside the guest, where
# it is twenty times faster: host.sh hands the logs to power_cuts.py.
#
# dm-log-writes tells what a disk held and what a flush covered, but two logs do not tell which of
# two disks was first. The kernel's trace does: completions on both devices, the promises and the
# steps below carry numbers of one counter.
. "$(dirname "$0")/lib.sh"

[ -n "${LOG_WRITES_DIR:-}" ] || fail "LOG_WRITES_DIR is not set: run this through host.sh"
modprobe dm_log_writes ||
    fail "the kernel $(uname -r) has no module dm-log-writes (CONFIG_DM_LOG_WRITES)"
size=80
tracing=/sys/kernel/tracing
[ -e $tracing/trace_marker ] || mount -t tracefs none $tracing

# Disks with a volatile cache that answer late and not at the same time, so that much is in
# flight at any moment. They held something before, which must never show.
nullb m0 $((size + 8)) cache_size=4 irqmode=2 completion_nsec=100000
nullb m1 $((size + 8)) cache_size=4 irqmode=2 completion_nsec=300000
nullb log0 400
nullb log1 400
python3 -IS "$GUEST_DIR/promises.py" fill /dev/m0 /dev/m1
devices=
for slot in 0 1; do
    dmsetup create test-logged$slot --table \
        "0 $(blockdev --getsz /dev/m$slot) log-writes /dev/m$slot /dev/log$slot"
    dmsetup mknodes test-logged$slot
    node=$(realpath /dev/mapper/test-logged$slot)
    number=$((0x$(stat -c %t "$node") << 20 | 0x$(stat -c %T "$node")))
    devices+="${devices:+ || }dev == $number"
    echo "device $slot $((0x$(stat -c %t "$node"))),$((0x$(stat -c %T "$node")))"
done >"$LOG_WRITES_DIR/devices"

echo $size >"$LOG_WRITES_DIR/size_mib"
blockdev --getsize64 /dev/m0 >"$LOG_WRITES_DIR/member_bytes"

echo 0 >$tracing/tracing_on
echo counter >$tracing/trace_clock
echo 16384 >$tracing/buffer_size_kb
for event in block_bio_queue block_bio_complete; do
    echo "$devices" >$tracing/events/block/$event/filter
    echo 1 >$tracing/events/block/$event/enable
done
echo >$tracing/trace
echo 1 >$tracing/tracing_on
step() { echo "step $1" >$tracing/trace_marker; }
promised() { [ "$(stat -c %s "$WORK/count" 2>/dev/null || echo 0)" -ge "$1" ]; }

make_mirror logged --size ${size}M /dev/mapper/test-logged0 /dev/mapper/test-logged1
step started
python3 -IS "$GUEST_DIR/promises.py" load "$DEV" $size $tracing/trace_marker "$WORK/count" &
load=$!
wait_for 600 promised 250
step pulling
pull logged 1
step pulled
wait_for 600 promised 400
step returning
mirrorctl re-add logged /dev/mapper/test-logged1
mirrorctl wait logged --timeout 60
step returned
[ "$(status_of logged last-resync.kind)" = delta ] || fail "the resync was not a delta"
wait_for 600 promised $(($(stat -c %s "$WORK/count") + 100))
kill -TERM $load
wait $load || fail "the load saw an error"
expect_status logged io.errors 0
step stopping
mirrorctl stop logged
step stopped

echo 0 >$tracing/tracing_on
for event in block_bio_queue block_bio_complete; do
    echo 0 >$tracing/events/block/$event/enable
    echo 0 >$tracing/events/block/$event/filter
done
! grep -h '^overrun: [1-9]' $tracing/per_cpu/cpu*/stats || fail "the trace's buffer was too small"
grep -v '^#' $tracing/trace >"$LOG_WRITES_DIR/trace"
echo 64 >$tracing/buffer_size_kb
for slot in 0 1; do
    ! dmsetup status test-logged$slot | grep logging_disabled || fail "log $slot was too small"
    # Its end writes down what was never flushed, and how many entries there are.
    dmsetup remove test-logged$slot
    dd if=/dev/log$slot of="$LOG_WRITES_DIR/log$slot" bs=128k conv=sparse status=none
done
ls -l "$LOG_WRITES_DIR"
