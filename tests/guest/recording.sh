# shellcheck shell=bash
# Records what each member's disk is told, for a check of every moment at which the power could
# have been cut. A device of dm-log-writes lies under each member. What comes of it is checked
# outside the guest, where it is twenty times faster: host.sh hands the logs on.
#
# dm-log-writes tells what a disk held and what a flush covered, but two logs do not tell which of
# two disks was first. The kernel's trace does: completions on both devices, and what the test
# writes to the trace itself, carry numbers of one counter.

TRACING=/sys/kernel/tracing

# begin_recording NAME MIB LOG_MIB : of two disks with room for MIB of data, $LOGGED0 and $LOGGED1.
begin_recording() {
    local slot node number event devices=
    [ -n "${LOG_WRITES_DIR:-}" ] || fail "LOG_WRITES_DIR is not set: run this through host.sh"
    modprobe dm_log_writes ||
        fail "the kernel $(uname -r) has no module dm-log-writes (CONFIG_DM_LOG_WRITES)"
    [ -e $TRACING/trace_marker ] || mount -t tracefs none $TRACING
    RECORDING=$LOG_WRITES_DIR/$1
    mkdir "$RECORDING"
    LOGGED0=/dev/mapper/test-logged0 LOGGED1=/dev/mapper/test-logged1

    # Disks with a volatile cache that answer late and not at the same time, so that much is in
    # flight at any moment. They held something before, which must never show.
    nullb m0 $(($2 + 8)) cache_size=4 irqmode=2 completion_nsec=100000
    nullb m1 $(($2 + 8)) cache_size=4 irqmode=2 completion_nsec=300000
    nullb log0 "$3"
    nullb log1 "$3"
    python3 -IS "$GUEST_DIR/promises.py" fill /dev/m0 /dev/m1
    for slot in 0 1; do
        dmsetup create test-logged$slot --table \
            "0 $(blockdev --getsz /dev/m$slot) log-writes /dev/m$slot /dev/log$slot"
        dmsetup mknodes test-logged$slot
        node=$(realpath /dev/mapper/test-logged$slot)
        number=$((0x$(stat -c %t "$node") << 20 | 0x$(stat -c %T "$node")))
        devices+="${devices:+ || }dev == $number"
        echo "device $slot $((0x$(stat -c %t "$node"))),$((0x$(stat -c %T "$node")))"
    done >"$RECORDING/devices"
    echo "$2" >"$RECORDING/size_mib"
    blockdev --getsize64 /dev/m0 >"$RECORDING/member_bytes"

    echo 0 >$TRACING/tracing_on
    echo counter >$TRACING/trace_clock
    echo 16384 >$TRACING/buffer_size_kb
    for event in block_bio_queue block_bio_complete; do
        echo "$devices" >$TRACING/events/block/$event/filter
        echo 1 >$TRACING/events/block/$event/enable
    done
    echo >$TRACING/trace
    echo 1 >$TRACING/tracing_on
}

# step NAME : stands between what came before and what comes after.
step() { echo "step $1" >$TRACING/trace_marker; }

# end_recording : logs and trace are in the folder of the recording, which has a trace only then.
end_recording() {
    local slot event
    echo 0 >$TRACING/tracing_on
    for event in block_bio_queue block_bio_complete; do
        echo 0 >$TRACING/events/block/$event/enable
        echo 0 >$TRACING/events/block/$event/filter
    done
    ! grep -h '^overrun: [1-9]' $TRACING/per_cpu/cpu*/stats ||
        fail "the trace's buffer was too small"
    for slot in 0 1; do
        ! dmsetup status test-logged$slot | grep logging_disabled || fail "log $slot was too small"
        # Its end writes down what was never flushed, and how many entries there are.
        dmsetup remove test-logged$slot
        dd if=/dev/log$slot of="$RECORDING/log$slot" bs=128k conv=sparse status=none
    done
    grep -v '^#' $TRACING/trace >"$RECORDING/trace"
    echo 64 >$TRACING/buffer_size_kb
    ls -l "$RECORDING"
}
