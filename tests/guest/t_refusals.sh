# Verbs that destroy refuse block devices that are in use or hold something.
. "$(dirname "$0")/lib.sh"

nullb m0 64
nullb m1 64
nullb m2 64
nullb m3 8
mkfs.ext4 -q -F /dev/m0
expect_failure 3 mirrorctl create refuse --member /dev/m0 --member /dev/m1
mirrorctl create refuse --member /dev/m0 --member /dev/m1 --force --dry-run
blkid -p /dev/m0 | grep -q ext4 || fail "--dry-run wrote to the disk"

# Mounted: not even with --force.
mkdir -p "$WORK/mnt"
mount /dev/m0 "$WORK/mnt"
if mirrorctl create refuse --member /dev/m0 --member /dev/m1 --force; then
    fail "a mounted disk was overwritten"
fi
umount "$WORK/mnt"
e2fsck -f -n /dev/m0

# Too small; too few; the same disk twice.
for members in "/dev/m1 /dev/m3" "/dev/m1" "/dev/m1 /dev/m1"; do
    arguments=()
    for member in $members; do
        arguments+=(--member "$member")
    done
    if mirrorctl create refuse "${arguments[@]}" 2>"$WORK/said"; then
        fail "created a mirror of: $members"
    fi
    [ -s "$WORK/said" ] || fail "refused without a word: $members"
done

make_mirror refuse --force /dev/m0 /dev/m1
# A member of a running mirror: for another mirror, and for a second daemon.
if mirrorctl create other --member /dev/m1 --member /dev/m2 --force; then
    fail "a running mirror's member was overwritten"
fi
if mirrorctl start refuse /dev/m0 /dev/m1 --run-dir "$WORK/other-run"; then
    fail "a second daemon was started on the same members"
fi
# The device is open: a stop is refused.
exec 9<"$DEV"
expect_failure 5 mirrorctl stop refuse
exec 9<&-
mirrorctl stop refuse
expect_failure 3 mirrorctl create other --member /dev/m1 --member /dev/m2
mirrorctl destroy /dev/m0 /dev/m1 --dry-run
mirrorctl examine /dev/m1
mirrorctl destroy /dev/m0 /dev/m1 --force
if mirrorctl examine /dev/m1; then
    fail "the superblock is still there"
fi

# A read-only disk.
blockdev --setro /dev/m2
if mirrorctl create other --member /dev/m1 --member /dev/m2 --force; then
    fail "a read-only disk was taken"
fi
