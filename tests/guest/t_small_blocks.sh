# 512-byte logical blocks: single sectors are written at random and verified, and their
# neighbours in the same 4 KiB block stay as they were.
. "$(dirname "$0")/lib.sh"

nullb m0 96
nullb m1 96
make_mirror small --logical-block 512 /dev/m0 /dev/m1
[ "$(blockdev --getss "$DEV")" -eq 512 ] || fail "the logical block is not 512 bytes"
seeded small 16 >"$WORK/content"
dd if="$WORK/content" of="$DEV" bs=1M oflag=direct status=none
fio_job --filename="$DEV" --rw=randwrite --bs=512 --iodepth=16 --offset=16m --size=4m \
    --verify=crc32c --do_verify=1 --verify_fatal=1 --fdatasync=100
for sector in 3 8191 12345 20000; do
    seeded "sector$sector" 1 | head -c 512 >"$WORK/sector" || true
    dd if="$WORK/sector" of="$DEV" bs=512 seek=$sector oflag=direct status=none
    dd if="$WORK/sector" of="$WORK/content" bs=512 seek=$sector conv=notrunc status=none
done
dd if="$DEV" bs=1M count=16 iflag=direct status=none | cmp - "$WORK/content"

# Sectors change while a member is away; after its return it has them and their neighbours.
pull small 0
seeded away 1 | head -c 512 >"$WORK/sector" || true
dd if="$WORK/sector" of="$DEV" bs=512 seek=777 oflag=direct status=none
dd if="$WORK/sector" of="$WORK/content" bs=512 seek=777 conv=notrunc status=none
mirrorctl re-add small /dev/m0
mirrorctl wait small --timeout 60
dd if="$DEV" bs=1M count=16 iflag=direct status=none | cmp - "$WORK/content"
mirrorctl stop small
compare_members /dev/m0 /dev/m1
