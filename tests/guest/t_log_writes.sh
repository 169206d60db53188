# Records a load (promises.py) during which a member is pulled and comes back, for power_cuts.py.
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/recording.sh"

size=80
begin_recording power_cuts $size 400
promised() { [ "$(stat -c %s "$WORK/count" 2>/dev/null || echo 0)" -ge "$1" ]; }

make_mirror logged --size ${size}M $LOGGED0 $LOGGED1
step started
python3 -IS "$GUEST_DIR/promises.py" load "$DEV" $size $TRACING/trace_marker "$WORK/count" &
load=$!
wait_for 600 promised 250
step pulling
pull logged 1
step pulled
wait_for 600 promised 400
step returning
mirrorctl re-add logged $LOGGED1
mirrorctl wait logged --timeout 60
step returned
[ "$(status_of logged last-resync.kind)" = delta ] || fail "the resync was not a delta"
wait_for 600 promised $(($(stat -c %s "$WORK/count") + 100))
kill -TERM $load
wait $load || fail "the load saw an error"
expect_status logged io.errors 0
step stopping
mirrorctl stop logged
step stopped
end_recording
