# Clean stop, start, refusal to start alone what may be old, and --force.
. "$(dirname "$0")/lib.sh"

nullb m0 128
nullb m1 128
make_mirror again /dev/m0 /dev/m1
seeded again 16 | dd of="$DEV" bs=1M oflag=direct iflag=fullblock status=none
expect_failure 5 mirrorctl start again /dev/m0 /dev/m1
mirrorctl stop again
[ ! -b "$DEV" ] || fail "$DEV is still there after the stop"
mirrorctl start again /dev/m0 /dev/m1
find_device again
cmp -n $((16 << 20)) "$DEV" <(seeded again 16)
expect_status again extents.unequalised-blocks 0

# Slot 1 goes on alone; slot 0 then is old and must not start by itself.
pull again 0
seeded newer 16 | dd of="$DEV" bs=1M oflag=direct iflag=fullblock status=none
mirrorctl stop again
expect_failure 3 mirrorctl start again /dev/m0
mirrorctl start again /dev/m0 /dev/m1
find_device again
cmp -n $((16 << 20)) "$DEV" <(seeded newer 16)
mirrorctl stop again
