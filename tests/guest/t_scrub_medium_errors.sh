# A disk with sectors that stay bad whatever is written to them: the sweep finds them, the rewrite does
# not read back, and the member is failed. Nobody above sees an error, and the mirror goes on.
. "$(dirname "$0")/lib.sh"

modprobe scsi_debug dev_size_mb=160 delay=0 per_host_store=1
disk_of_scsi_debug() {
    local path
    for path in /sys/bus/pseudo/drivers/scsi_debug/adapter*/host*/target*/*:*/block/*; do
        [ -e "$path" ] && SD=/dev/$(basename "$path") && [ -b "$SD" ] && return 0
    done
    return 1
}
wait_for 100 disk_of_scsi_debug
udevadm settle
nullb m0 160
make_mirror medium "$SD" /dev/m0
seeded medium 32 | dd of="$DEV" bs=1M oflag=direct iflag=fullblock status=none
sync
mirrorctl stop medium
mirrorctl start medium --front ublk --scrub-days 0 --check-reads scrub-only
find_device medium

idle() { [ "$(mirrorctl scrub status medium --json | python3 -ISc '
import json, sys
print(json.load(sys.stdin)["pass"] is None)')" = True ]; }

# Eight sectors that lie 8 MiB into the data.
data_offset=$(mirrorctl examine "$SD" --json | python3 -ISc '
import json, sys
print(json.load(sys.stdin)["data-offset"])')
echo $(((data_offset + (8 << 20)) / 512)) >/sys/module/scsi_debug/parameters/medium_error_start
echo 8 >/sys/module/scsi_debug/parameters/medium_error_count
echo 2 >/sys/bus/pseudo/drivers/scsi_debug/opts
mirrorctl scrub start medium --once
wait_for 600 status_is medium members.0.state faulty
wait_for 600 idle
mirrorctl scrub report medium | grep unreadable || fail "$(mirrorctl scrub report medium)"
expect_status medium io.errors 0
dd if="$DEV" bs=1M count=32 iflag=direct status=none | cmp - <(seeded medium 32)
echo 0 >/sys/bus/pseudo/drivers/scsi_debug/opts
mirrorctl stop medium
