# Discard and write-zeroes: what was discarded reads as zeroes, before and after a restart and on
# a member that was away meanwhile; what was not keeps its content.
. "$(dirname "$0")/lib.sh"

zeroes() { cmp -n "$3" -i "$2" "$1" /dev/zero; }
content() { cmp -n "$3" -i "$2" "$1" "$WORK/content"; }

nullb m0 192
nullb m1 192
make_mirror discard /dev/m0 /dev/m1
mib=$((1 << 20))
seeded discard 128 >"$WORK/content"
dd if="$WORK/content" of="$DEV" bs=1M oflag=direct status=none

# Extents 2 to 5 in full (8 to 24 MiB), then a part of an extent as zeroes (40 to 41 MiB).
blkdiscard -o $((8 * mib)) -l $((16 * mib)) "$DEV"
blkdiscard -z -o $((40 * mib)) -l $mib "$DEV"
check() {
    blockdev --flushbufs "$DEV"
    content "$DEV" 0 $((8 * mib))
    zeroes "$DEV" $((8 * mib)) $((16 * mib))
    content "$DEV" $((24 * mib)) $((16 * mib))
    zeroes "$DEV" $((40 * mib)) $mib
    content "$DEV" $((41 * mib)) $((23 * mib))
}
check
[ "$(status_of discard extents.discarded)" -ge 4 ] || fail "no extent is discarded"
mirrorctl stop discard
mirrorctl start discard /dev/m0 /dev/m1
find_device discard
check

# A discarded extent is used again: the rest of it stays zero.
dd if="$WORK/content" of="$DEV" bs=4k count=1 seek=$((12 * mib / 4096)) oflag=direct status=none
zeroes "$DEV" $((12 * mib + 4096)) $((4 * mib - 4096))

# Discards while a member is away reach it when it returns.
pull discard 1
blkdiscard -o $((64 * mib)) -l $((8 * mib)) "$DEV"
blkdiscard -z -o $((76 * mib)) -l $((2 * mib)) "$DEV"
mirrorctl re-add discard /dev/m1
mirrorctl wait discard --timeout 60
pull discard 0
blockdev --flushbufs "$DEV"
zeroes "$DEV" $((64 * mib)) $((8 * mib))
zeroes "$DEV" $((76 * mib)) $((2 * mib))
content "$DEV" $((78 * mib)) $((50 * mib))
# The whole device.
blkdiscard "$DEV"
zeroes "$DEV" 0 $((128 * mib))
mirrorctl stop discard
