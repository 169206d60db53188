# Unreadable sectors on one member: the other copy answers, nobody above sees an error, and the
# member is not dropped for one bad place.
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/damage.sh"

medium_disk 160
nullb m0 160
make_mirror medium "$SD" /dev/m0
seeded medium 32 | dd of="$DEV" bs=1M oflag=direct iflag=fullblock status=none
sync

# Eight sectors that lie 8 MiB into the data.
bad=$(offset_on "$SD" $((8 << 20)))
medium_errors "$bad" 8
# The fault is real: the disk itself cannot read the place.
! readable "$SD" "$bad" || fail "scsi_debug gives no medium error"

# Both members serve reads: after enough rounds the bad place has been asked of the bad disk.
for _ in 1 2 3 4; do
    dd if="$DEV" bs=64k count=512 iflag=direct status=none | cmp - <(seeded medium 32)
    fio_job --filename="$DEV" --rw=randread --bs=4k --iodepth=16 --offset=8m --size=64k \
        --io_size=1m >"$WORK/fio"
done
expect_status medium io.errors 0
[ "$(status_of medium members.0.read-errors)" -gt 0 ] || fail "no read error was counted"
medium_errors 0 0
mirrorctl stop medium
