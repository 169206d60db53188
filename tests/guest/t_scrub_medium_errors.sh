# A disk that gives medium errors and can rewrite the bad places: the sweep finds them, the copy is
# rewritten and read back, and nobody above sees an error. One that cannot is failed, and the
# mirror goes on.
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

passes() {
    mirrorctl scrub status medium --json | python3 -ISc '
import json, sys
print(json.load(sys.stdin)["totals"][sys.argv[1]])' "$1"
}
idle() { [ "$(mirrorctl scrub status medium --json | python3 -ISc '
import json, sys
print(json.load(sys.stdin)["pass"] is None)')" = True ]; }

# The next reads of the disk fail, whatever they ask for: those of the first pieces as a whole, and
# of some of their blocks alone. Then it works again.
mountpoint -q /sys/kernel/debug || mount -t debugfs none /sys/kernel/debug
inject() {
    local file
    for file in /sys/kernel/debug/scsi_debug/*/error; do
        echo "2 $1 $2 0 0 0x2 0x3 0x11 0x0" >"$file"
    done
}
inject -12 0x28
mirrorctl scrub start medium --once
wait_for 600 idle
mirrorctl scrub report medium
[ "$(passes unreadable-blocks)" -gt 0 ] || fail "no medium error was found: $(mirrorctl scrub status medium)"
[ "$(passes rewritten-blocks)" -gt 0 ] || fail "nothing was rewritten: $(mirrorctl scrub status medium)"
expect_status medium state in-sync
expect_status medium io.errors 0
dd if="$DEV" bs=1M count=32 iflag=direct status=none | cmp - <(seeded medium 32)

# Eight sectors that stay bad whatever is written to them.
data_offset=$(mirrorctl examine "$SD" --json | python3 -ISc '
import json, sys
print(json.load(sys.stdin)["data-offset"])')
echo $(((data_offset + (8 << 20)) / 512)) >/sys/module/scsi_debug/parameters/medium_error_start
echo 8 >/sys/module/scsi_debug/parameters/medium_error_count
echo 2 >/sys/bus/pseudo/drivers/scsi_debug/opts
mirrorctl scrub start medium --once
wait_for 600 status_is medium members.0.state faulty
wait_for 600 idle
mirrorctl scrub report medium
expect_status medium io.errors 0
dd if="$DEV" bs=1M count=32 iflag=direct status=none | cmp - <(seeded medium 32)
echo 0 >/sys/bus/pseudo/drivers/scsi_debug/opts
mirrorctl stop medium
