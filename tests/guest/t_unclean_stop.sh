# The daemon is killed under load. A start afterwards takes what is left of the device away,
# makes the copies equal, and everything that was flushed is there.
. "$(dirname "$0")/lib.sh"

nullb m0 160
nullb m1 160
make_mirror killed /dev/m0 /dev/m1
seeded killed 32 | dd of="$DEV" bs=1M oflag=direct iflag=fullblock conv=fdatasync status=none

fio_job --filename="$DEV" --rw=randwrite --bs=4k --iodepth=32 --offset=32m --size=64m \
    --time_based --runtime=60 >"$WORK/fio" 2>&1 &
fio=$!
wait_for 100 status_moves killed
pid=$(status_of killed daemon-pid)
kill -KILL "$pid"
wait_for 100 test ! -e "/proc/$pid/exe"
# fio's requests wait in the device until it is taken away.
timeout 60 mirrorctl start killed /dev/m0 /dev/m1
find_device killed
kill -KILL $fio 2>/dev/null || true
wait $fio || true
cmp -n $((32 << 20)) "$DEV" <(seeded killed 32)
wait_for 600 no_longer_equalising killed
expect_status killed state in-sync
cmp -n $((32 << 20)) "$DEV" <(seeded killed 32)
mirrorctl stop killed
compare_members /dev/m0 /dev/m1
