# Unreadable sectors on one member: the other copy answers, nobody above sees an error, and the
# member is not dropped for one bad place.
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

# Eight sectors that lie 8 MiB into the data.
data_offset=$(mirrorctl examine "$SD" --json | python3 -ISc '
import json, sys
def find(value):
    if isinstance(value, dict):
        for name in ("data-offset", "data-offset-bytes"):
            if name in value:
                return value[name]
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            found = find(inner)
            if found is not None:
                return found
print(find(json.load(sys.stdin)))')
echo $(((data_offset + (8 << 20)) / 512)) >/sys/module/scsi_debug/parameters/medium_error_start
echo 8 >/sys/module/scsi_debug/parameters/medium_error_count
echo 2 >/sys/bus/pseudo/drivers/scsi_debug/opts
# The fault is real: the disk itself cannot read the place.
if dd if="$SD" of=/dev/null bs=4096 count=1 iflag=direct,skip_bytes \
    skip=$((data_offset + (8 << 20))) status=none 2>/dev/null; then
    fail "scsi_debug gives no medium error"
fi

# Both members serve reads: after enough rounds the bad place has been asked of the bad disk.
for _ in 1 2 3 4; do
    dd if="$DEV" bs=64k count=512 iflag=direct status=none | cmp - <(seeded medium 32)
    fio_job --filename="$DEV" --rw=randread --bs=4k --iodepth=16 --offset=8m --size=64k \
        --io_size=1m >"$WORK/fio"
done
expect_status medium io.errors 0
[ "$(status_of medium members.0.read-errors)" -gt 0 ] || fail "no read error was counted"
echo 0 >/sys/bus/pseudo/drivers/scsi_debug/opts
mirrorctl stop medium
