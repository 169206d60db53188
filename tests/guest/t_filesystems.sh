# ext4 and XFS on a mirror: make, mount, write, fsync, unmount, check, mount again, read back.
. "$(dirname "$0")/lib.sh"

# XFS wants at least 300 MiB.
nullb m0 320
nullb m1 320
make_mirror fs /dev/m0 /dev/m1
mkdir -p "$WORK/mnt"
modprobe -a ext4 xfs

for kind in ext4 xfs; do
    case $kind in
    ext4) mkfs.ext4 -q -F "$DEV" && check=(e2fsck -f -n) ;;
    xfs) mkfs.xfs -q -f "$DEV" && check=(xfs_repair -n) ;;
    esac
    mount "$DEV" "$WORK/mnt"
    seeded "$kind" 24 >"$WORK/mnt/data"
    sync -f "$WORK/mnt/data"
    umount "$WORK/mnt"
    "${check[@]}" "$DEV"
    mount "$DEV" "$WORK/mnt"
    cmp "$WORK/mnt/data" <(seeded "$kind" 24)
    umount "$WORK/mnt"
done

expect_status fs state in-sync
mirrorctl stop fs
compare_members /dev/m0 /dev/m1

# After a clean stop the mirror is found by its members alone, and the data are still there.
mirrorctl assemble --scan /dev/m0 /dev/m1
find_device fs
mount "$DEV" "$WORK/mnt"
cmp "$WORK/mnt/data" <(seeded xfs 24)
umount "$WORK/mnt"
mirrorctl stop fs
