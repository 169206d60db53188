# Bytes that change on three members' disks under the daemon: reads and a scrub heal them, nobody
# above sees an error. A member is lost and comes back under a scrub.
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/damage.sh"

# Three members and reads alone: whoever is asked, what comes is what was written. One block is
# spoilt on two of them.
nullb m0 48
nullb m1 48
nullb m2 48
filled three 32 always /dev/m0 /dev/m1 /dev/m2
for member in 0 1 2; do
    spoil_at $member $((member * 8 + 6 << 20))
done
spoil_at 0 $((30 << 20))
spoil_at 2 $((30 << 20))
for _ in 1 2; do
    same_as_written
    fio_job --filename="$DEV" --rw=randread --bs=4k --iodepth=16 --size=32m \
        --io_size=4m >"$WORK/fio"
done
expect_status three io.errors 0
[ "$(scrub_of three totals.found-by-reads-blocks)" -gt 0 ] || fail "$(mirrorctl scrub status three)"

# The same by a pass, which also finds what no read has met.
for member in 0 1 2; do
    spoil_at $member $((member * 8 + 7 << 20))
done
scrub_once three
expect_scrub three totals.checksum-failed-blocks 8
expect_scrub three totals.rewritten-blocks 8
expect_scrub three damaged-blocks 0

# A member is lost and comes back while a scrub runs and the first extents are written all the time,
# which are hot then: the pass waits for them in the end. Meanwhile the others are spoilt on a member
# that stays and on the one that is away; nothing that is hot or was missed is taken for damage.
fio --name=load --filename="$DEV" --direct=1 --ioengine=libaio --rw=randwrite --bs=4k --iodepth=8 \
    --size=12m --rate_iops=200 --time_based --runtime=900 --eta=never --output="$WORK/load" &
load=$!
wait_for 100 status_moves three
mirrorctl scrub start three --once --ceiling 1
pull three 1
spoil_at 2 $((24 << 20))
spoil_at 1 $((28 << 20))
wait_for 100 status_moves three
mirrorctl re-add three /dev/m1
mirrorctl wait three --timeout 120
! no_pass three || fail "the scrub was over before the member had come back"
expect_status three last-resync.kind delta
kill -TERM $load
wait $load || true
grep -q 'err= 0' "$WORK/load" || fail "the load saw an error: $(cat "$WORK/load")"
mirrorctl scrub start three --once --ceiling 0
wait_for 1200 no_pass three
scrub_once three
expect_scrub three totals.checksum-failed-blocks 10
expect_scrub three totals.rewritten-blocks 10
expect_scrub three totals.copies-differ-blocks 0
expect_scrub three damaged-blocks 0
expect_status three io.errors 0
expect_status three state in-sync
mirrorctl stop three
compare_members /dev/m0 /dev/m1 /dev/m2
mirrorctl check /dev/m0 /dev/m1 /dev/m2
