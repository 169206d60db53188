# A SCSI disk is deleted from the system while it is written to; nobody above notices, and after
# a rescan it comes back with a delta.
. "$(dirname "$0")/lib.sh"

modprobe scsi_debug dev_size_mb=160 delay=0 num_tgts=1 max_luns=1 per_host_store=1
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
make_mirror gone /dev/m0 "$SD"
fio_job --filename="$DEV" --rw=write --bs=1m --iodepth=4 --size=128m --fdatasync=32

fio_job --filename="$DEV" --rw=randwrite --bs=4k --iodepth=16 --size=96m --rate_iops=2500 \
    --fdatasync=64 --verify=crc32c --do_verify=1 --verify_fatal=1 >"$WORK/fio" 2>&1 &
fio=$!
wait_for 100 status_moves gone
host=$(echo /sys/bus/pseudo/drivers/scsi_debug/adapter*/host*)
echo 1 >"/sys/block/$(basename "$SD")/device/delete"
wait_for 100 status_is gone state degraded
sleep 1
# A device that is gone for good is let go, so that the same disk can come back under a name.
mirrorctl remove gone 1
echo "- - -" >"/sys/class/scsi_host/$(basename "$host")/scan"
wait_for 100 disk_of_scsi_debug
udevadm settle
mirrorctl re-add gone "$SD"
mirrorctl wait gone --timeout 120
wait $fio || { cat "$WORK/fio"; fail "fio found wrong data or an error"; }
[ "$(status_of gone last-resync.kind)" = delta ] || fail "the resync was not a delta"
expect_status gone io.errors 0
mirrorctl stop gone
compare_members /dev/m0 "$SD"
