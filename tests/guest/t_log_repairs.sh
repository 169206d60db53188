# Records a scrub that repairs blocks of both members, each spoilt in places of its own, and a page
# of checksums (repairs.py), for repair_cuts.py.
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/damage.sh"
. "$(dirname "$0")/recording.sh"

repairs() { python3 -SB "$GUEST_DIR/repairs.py" "$@"; }

size=16
begin_recording repair_cuts $size 48
make_mirror logged --size ${size}M $LOGGED0 $LOGGED1
repairs fill "$DEV"
mirrorctl stop logged
mirrorctl start logged --front ublk --scrub-days 0 --error-budget unlimited
find_device logged
spoilt=$(($(repairs spoil $LOGGED0 0) + $(repairs spoil $LOGGED1 1)))
step scrubbing
scrub_once logged
step scrubbed
expect_scrub logged totals.rewritten-blocks $spoilt
expect_scrub logged damaged-blocks 0
step stopping
mirrorctl stop logged
step stopped
end_recording
