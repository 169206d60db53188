# 1,000 random 4 KiB writes while a member is away: exactly the changed blocks are copied.
. "$(dirname "$0")/lib.sh"

nullb m0 320
nullb m1 320
make_mirror idle /dev/m0 /dev/m1
fio_job --filename="$DEV" --rw=write --bs=1m --iodepth=4 --size=256m --end_fsync=1
blockdev --flushbufs "$DEV"
sync
pull idle 0
fio_job --filename="$DEV" --rw=randwrite --bs=4k --iodepth=8 --size=256m --io_size=4096000 \
    --end_fsync=1
mirrorctl re-add idle /dev/m0
mirrorctl wait idle --timeout 60
copied=$(status_of idle last-resync.copied-bytes)
zeroed=$(status_of idle last-resync.zeroed-bytes)
echo "copied $copied bytes, zeroed $zeroed bytes, for 4096000 changed"
[ "$copied" -ge 4096000 ] || fail "copied less than was changed"
[ "$copied" -le 4300800 ] || fail "copied more than 1.05 of what was changed"
mirrorctl stop idle
compare_members /dev/m0 /dev/m1
