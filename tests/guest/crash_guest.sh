#!/bin/bash
# The crash test's part inside the guest; crash.sh boots it and kills the machine.
#
# Usage: crash_guest.sh STEP LOG_DIR
#   create    a mirror of /dev/vda and /dev/vdb, then the write load
#   degrade   verify; then the load, and under it a member is pulled and comes back
#   check     verify, wait until all is in-sync, compare the members
# LOG_DIR lies outside the guest. `create` and `degrade` are meant not to end by themselves.
. "$(dirname "$0")/lib.sh"

step=$1 log_dir=$2
enter_guest

verify_all() {
    mirrorctl assemble --scan /dev/vda /dev/vdb
    find_device crash
    mirrorctl status crash
    # Twice: what has been read once must not change when the copies are made equal.
    python3 -IS "$GUEST_DIR/crash.py" verify "$DEV" "$log_dir" | tee "$WORK/first"
    wait_for 1200 no_longer_equalising crash
    python3 -IS "$GUEST_DIR/crash.py" verify "$DEV" "$log_dir" >"$WORK/second"
    cmp "$WORK/first" "$WORK/second" || fail "a block changed between two reads"
}

case $step in
create)
    make_mirror crash /dev/vda /dev/vdb
    python3 -IS "$GUEST_DIR/crash.py" load "$DEV" "$log_dir" 1
    ;;
degrade)
    verify_all
    expect_status crash state in-sync
    python3 -IS "$GUEST_DIR/crash.py" load "$DEV" "$log_dir" 2 &
    load=$!
    wait_for 100 status_moves crash
    pull crash 1
    sleep 2
    mirrorctl re-add crash /dev/vdb
    touch "$log_dir/returned"
    wait $load
    ;;
check)
    verify_all
    mirrorctl wait crash --timeout 120
    expect_status crash state in-sync
    mirrorctl stop crash
    compare_members /dev/vda /dev/vdb
    ;;
*) fail "unknown step $step" ;;
esac
