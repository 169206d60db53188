# fio writes at random with sizes from 4 to 64 KiB, reads everything back and verifies it.
. "$(dirname "$0")/lib.sh"

nullb m0 256
nullb m1 256
make_mirror verify /dev/m0 /dev/m1
fio_job --filename="$DEV" --rw=randwrite --bsrange=4k-64k --iodepth=16 --size=96m \
    --verify=crc32c --do_verify=1 --verify_fatal=1 --fdatasync=200
expect_status verify io.errors 0
expect_status verify state in-sync
mirrorctl stop verify
compare_members /dev/m0 /dev/m1
