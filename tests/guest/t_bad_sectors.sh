# Sectors that cannot be read until they are written, on one member: a scrub finds and heals them,
# and so does a read. Nobody above sees an error, and the member stays. (Errors that no write
# heals: t_scrub_medium_errors.sh.)
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/damage.sh"

nullb m0 48
bad_disk 48
filled bad 16 scrub-only /dev/nbd0 /dev/m0

# go_bad BYTE SECTORS : of the device, on one member. The fault is real: the disk cannot read it.
go_bad() {
    local where
    where=$(offset_on /dev/nbd0 "$1")
    bad_sectors "$where" "$2"
    ! readable /dev/nbd0 $((where / 4096 * 4096)) || fail "the disk reads bad sectors"
}

# By a scrub: a block, one sector, sixteen blocks in a row, and a page of checksums.
go_bad $((1 << 20)) 8
go_bad $(((9 << 20) + 512)) 1
go_bad $((14 << 20)) 128
bad_sectors "$(table_on /dev/nbd0 1)" 8
[ "$(bad_sectors)" -eq 145 ] || fail "not all sectors went bad"
scrub_once bad
mirrorctl scrub report bad
[ "$(mirrorctl scrub report bad | grep -cE 'unreadable +rewritten +scrub')" -eq 3 ] ||
    fail "not all is in the report"
expect_scrub bad totals.rewritten-blocks 18
[ "$(scrub_of bad totals.page-unreadable-blocks)" -gt 0 ] || fail "$(mirrorctl scrub report bad)"
expect_scrub bad damaged-blocks 0
expect_status bad io.errors 0
expect_status bad state in-sync
# The page is written when its extent cools, at the latest with a stop.
[ "$(bad_sectors)" -le 8 ] || fail "$(bad_sectors) sectors are still bad"
for place in $((1 << 20)) $((9 << 20)) $((14 << 20)); do
    readable /dev/nbd0 "$(offset_on /dev/nbd0 $place)" || fail "byte $place is still bad"
done
same_as_written
mirrorctl stop bad
[ "$(bad_sectors)" -eq 0 ] || fail "the page of checksums is still bad"
compare_members /dev/nbd0 /dev/m0
mirrorctl check /dev/nbd0 /dev/m0

# By reads, which go to either member: until each bad place has been asked of the bad disk.
serve bad always
go_bad $((2 << 20)) 8
go_bad $(((7 << 20) + 2560)) 3
go_bad $((12 << 20)) 64
read_until_healed() {
    local place
    for place in 2 7 12; do
        dd if="$DEV" bs=4k skip=$((place << 8)) count=16 iflag=direct status=none |
            cmp - <(dd if="$WORK/content" bs=4k skip=$((place << 8)) count=16 status=none) ||
            fail "a read failed or was wrong at ${place} MiB"
    done
    [ "$(bad_sectors)" -eq 0 ]
}
wait_for 200 read_until_healed
mirrorctl scrub report bad
expect_scrub bad damaged-blocks 0
expect_scrub bad totals.rewritten-blocks 28
[ "$(status_of bad members.0.read-errors)" -gt 0 ] || fail "no read error was counted"
same_as_written
expect_status bad io.errors 0
expect_status bad state in-sync
mirrorctl stop bad
compare_members /dev/nbd0 /dev/m0
mirrorctl check /dev/nbd0 /dev/m0
