#!/bin/bash
# All tests on real kernels, two guests at a time: a guest without hardware support leaves much of
# two processors idle.
#
# Usage: tests/guest/all.sh FAMILY...
#
# What each guest printed comes when it has ended; when each begins and ends is said on descriptor 3
# if that is open. Exit status 0 if all passed.
set -uo pipefail
# A group of processes for each job, so that a signal can reach all of it.
set -m

here=$(cd "$(dirname "$0")" && pwd)
[ $# -gt 0 ] || { echo "Usage: tests/guest/all.sh FAMILY..." >&2; exit 2; }

result=0
# Fetched once, before two guests ask for it at the same time.
"$here/../../scripts/vng-env.sh" >/dev/null || exit 1
families=()
for family in "$@"; do
    if "$here/../../scripts/kernel.sh" "$family" >/dev/null; then
        families+=("$family")
    else
        echo "=== guest tests, kernel $family"
        echo "not ok kernel_$family (it could not be fetched)"
        result=1
    fi
done

progress() { { echo "guest: $*" >&3; } 2>/dev/null; }

area=$(mktemp -d "${TMPDIR:-/tmp}/ublk-mirror-guests.XXXXXX") || exit 1
trap 'rm -rf "$area"' EXIT
give_up() {
    local job
    for job in $(jobs -p); do
        kill -- -"$job" 2>/dev/null
    done
    wait
    # What was not printed yet.
    cat "$area"/*.log 2>/dev/null
    exit 130
}
trap give_up INT TERM

# run TITLE COMMAND... : in the background, as soon as fewer than two others run.
running=0
run() {
    local title=$1
    shift
    if [ $running -eq 2 ]; then
        wait -n || result=1
        running=$((running - 1))
    fi
    running=$((running + 1))
    (
        trap - EXIT
        output=$(mktemp "$area/XXXXXX.log")
        progress "$title begins"
        began=$SECONDS
        "$@" >"$output" 2>&1 </dev/null
        code=$?
        progress "$title has ended with $code after $((SECONDS - began)) s"
        # The whole at once: that of another guest must not come in between.
        flock "$area" cat <(echo "=== guest tests, $title") "$output" || code=1
        rm -f "$output"
        exit $code
    ) &
}

# The longest first.
for family in "${families[@]}"; do
    if [ "$family" != "${families[0]}" ] && [ -n "${CI:-}" ]; then
        run "kernel $family" "$here/host.sh" --family "$family"
        continue
    fi
    run "kernel $family, first half" "$here/host.sh" --family "$family" --part 1
    run "kernel $family, second half" "$here/host.sh" --family "$family" --part 2
    run "kernel $family, host crash" "$here/host.sh" --family "$family" host_crash
done
for family in "${families[@]:0:1}"; do
    run "kernel $family, quickstart" "$here/../native/quickstart_in_guest.sh" "$family"
done
while [ $running -gt 0 ]; do
    wait -n || result=1
    running=$((running - 1))
done
exit $result
