#!/bin/bash
# All tests on real kernels, two guests at a time: a guest without hardware support leaves much of
# two processors idle.
#
# Usage: tests/guest/all.sh FAMILY...
#
# What each guest printed comes when it has ended. Exit status 0 if all passed.
set -uo pipefail

here=$(cd "$(dirname "$0")" && pwd)
[ $# -gt 0 ] || { echo "Usage: tests/guest/all.sh FAMILY..." >&2; exit 2; }

# Fetched once, before two guests ask for it at the same time.
"$here/../../scripts/vng-env.sh" >/dev/null || exit 1
for family in "$@"; do
    "$here/../../scripts/kernel.sh" "$family" >/dev/null || exit 1
done

area=$(mktemp -d "${TMPDIR:-/tmp}/ublk-mirror-guests.XXXXXX") || exit 1
trap 'rm -rf "$area"' EXIT
trap 'kill $(jobs -p) 2>/dev/null; exit 130' INT TERM

# run TITLE COMMAND... : in the background, as soon as fewer than two others run.
running=0 result=0
run() {
    local title=$1
    shift
    if [ $running -eq 2 ]; then
        wait -n || result=1
        running=$((running - 1))
    fi
    running=$((running + 1))
    (
        output=$(mktemp "$area/XXXXXX")
        "$@" >"$output" 2>&1 </dev/null
        code=$?
        # One write of the whole: that of another guest must not come in between.
        flock "$area" cat <(echo "=== guest tests, $title") "$output"
        exit $code
    ) &
}

# The longest first.
for family in "$@"; do
    run "kernel $family, first half" "$here/host.sh" --family "$family" --part 1
    run "kernel $family, second half" "$here/host.sh" --family "$family" --part 2
done
for family in "$@"; do
    run "kernel $family, host crash" "$here/host.sh" --family "$family" host_crash
    run "kernel $family, quickstart" "$here/../native/quickstart_in_guest.sh" "$family"
done
while [ $running -gt 0 ]; do
    wait -n || result=1
    running=$((running - 1))
done
exit $result
