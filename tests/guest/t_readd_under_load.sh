# A member is pulled in the middle of a write load and comes back under it; nothing is wrong
# afterwards, and little more was copied than was changed meanwhile.
. "$(dirname "$0")/lib.sh"

nullb m0 320
nullb m1 320
make_mirror load /dev/m0 /dev/m1

# Written once before, so that all extents are in use.
fio_job --filename="$DEV" --rw=write --bs=1m --iodepth=4 --size=200m --fdatasync=64
# Each block once, at a steady pace; the flushes bound what is not flushed at the loss.
fio_job --filename="$DEV" --rw=randwrite --bs=4k --iodepth=16 --size=160m --rate_iops=3000 \
    --fdatasync=64 --verify=crc32c --do_verify=1 --verify_fatal=1 >"$WORK/fio" 2>&1 &
fio=$!
wait_for 100 status_moves load
sleep 2
before=$(status_of load io.written-bytes)
pull load 1
expect_status load state degraded
sleep 3
mirrorctl re-add load /dev/m1
after=$(status_of load io.written-bytes)
mirrorctl wait load --timeout 120
expect_status load state in-sync
kill -0 $fio || fail "fio ended before the member was back: the load was too short"
wait $fio || { cat "$WORK/fio"; fail "fio found wrong data or an error"; }
grep -q 'err= 0' "$WORK/fio"

copied=$(status_of load last-resync.copied-bytes)
kind=$(status_of load last-resync.kind)
changed=$((after - before))
echo "copied $copied bytes for $changed changed ($kind)"
[ "$kind" = delta ] || fail "the resync was $kind"
[ "$copied" -gt 0 ] || fail "nothing was copied"
# Beside what changed: what was not flushed yet at the loss (at most 64 writes and the depth).
[ "$copied" -le $((changed * 6 / 5 + 80 * 4096)) ] || fail "copied too much"
mirrorctl stop load
compare_members /dev/m0 /dev/m1
