# A member whose writes fail for a while (dm-flakey): it is lost, the other goes on, and after
# the disk has recovered it returns with a delta.
. "$(dirname "$0")/lib.sh"

nullb m0 160
nullb m1 160
modprobe dm_flakey
sectors=$(blockdev --getsz /dev/m1)
dmsetup create test-flakey --table "0 $sectors linear /dev/m1 0"
dmsetup mknodes test-flakey
flaky=/dev/mapper/test-flakey
make_mirror flaky /dev/m0 $flaky
fio_job --filename="$DEV" --rw=write --bs=1m --iodepth=4 --size=128m --fdatasync=32

set_table() {
    dmsetup load test-flakey --table "$1"
    dmsetup suspend --noflush test-flakey
    dmsetup resume test-flakey
}
fio_job --filename="$DEV" --rw=randwrite --bs=4k --iodepth=16 --size=96m --rate_iops=2500 \
    --fdatasync=64 --verify=crc32c --do_verify=1 --verify_fatal=1 >"$WORK/fio" 2>&1 &
fio=$!
wait_for 100 status_moves flaky
# Always down; writes fail, reads go on.
set_table "0 $sectors flakey /dev/m1 0 0 60 1 error_writes"
wait_for 100 status_is flaky state degraded
expect_status flaky members.1.state faulty
sleep 1
set_table "0 $sectors linear /dev/m1 0"
mirrorctl remove flaky 1
mirrorctl re-add flaky $flaky
mirrorctl wait flaky --timeout 120
wait $fio || { cat "$WORK/fio"; fail "fio found wrong data or an error"; }
[ "$(status_of flaky last-resync.kind)" = delta ] || fail "the resync was not a delta"
expect_status flaky io.errors 0
mirrorctl stop flaky
compare_members /dev/m0 /dev/m1
