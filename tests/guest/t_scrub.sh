# Bytes that change on two members' disks under the daemon, pages of checksums too: a scrub heals
# them from the right side; what is spoilt on both is an error and no wrong data.
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/damage.sh"

# Two members, each of them bad in its turn; a block in another's place, and one whose write was
# lost; pages of checksums on one and on both.
nullb m0 48
nullb m1 48
filled sweep 32 scrub-only /dev/m0 /dev/m1
spoil_at 0 $((5 << 20))
spoil_at 1 $((9 << 20))
spoil_at 1 $((9 << 20 | 8192))
put_at 1 $((21 << 20)) /dev/m1 "$(offset_on /dev/m1 $((20 << 20)))"
put_at 0 $((25 << 20)) /dev/zero 0
spoil /dev/m0 "$(table_on /dev/m0 3)"
spoil /dev/m0 "$(table_on /dev/m0 7)"
spoil /dev/m1 "$(table_on /dev/m1 7)"
scrub_once sweep
expect_scrub sweep totals.checksum-failed-blocks 5
expect_scrub sweep totals.rewritten-blocks 5
[ "$(scrub_of sweep totals.mended-blocks)" -ge 2048 ] || fail "$(mirrorctl scrub status sweep)"
expect_scrub sweep damaged-blocks 0
mirrorctl scrub report sweep
mirrorctl scrub map sweep
same_as_written
expect_status sweep state in-sync
mirrorctl stop sweep
compare_members /dev/m0 /dev/m1
mirrorctl check /dev/m0 /dev/m1

# The same block on both: damaged, an error and not wrong data, until it is written again.
serve sweep always
spoil_at 0 $((3 << 20))
spoil_at 1 $((3 << 20))
scrub_once sweep
expect_scrub sweep damaged-blocks 1
if dd if="$DEV" of=/dev/null bs=4096 count=1 skip=$((3 << 8)) iflag=direct status=none; then
    fail "a block without a good copy was read"
fi
dd if="$WORK/content" of="$DEV" bs=1M skip=3 seek=3 count=1 oflag=direct status=none
same_as_written
expect_scrub sweep damaged-blocks 0
expect_status sweep state in-sync
mirrorctl stop sweep
compare_members /dev/m0 /dev/m1
