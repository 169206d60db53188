# A disk with sectors that stay bad whatever is written to them: the sweep finds them, the rewrite does
# not read back, and the member is failed. Nobody above sees an error, and the mirror goes on.
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/damage.sh"

medium_disk 160
nullb m0 160
make_mirror medium "$SD" /dev/m0
seeded medium 32 | dd of="$DEV" bs=1M oflag=direct iflag=fullblock status=none
sync
mirrorctl stop medium
mirrorctl start medium --front ublk --scrub-days 0 --check-reads scrub-only
find_device medium

# Eight sectors that lie 8 MiB into the data.
medium_errors "$(offset_on "$SD" $((8 << 20)))" 8
mirrorctl scrub start medium --once
wait_for 600 status_is medium members.0.state faulty
wait_for 600 no_pass medium
mirrorctl scrub report medium | grep unreadable || fail "$(mirrorctl scrub report medium)"
expect_status medium io.errors 0
dd if="$DEV" bs=1M count=32 iflag=direct status=none | cmp - <(seeded medium 32)
medium_errors 0 0
mirrorctl stop medium
