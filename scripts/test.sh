#!/bin/bash
# All tests. The guests, which leave much of two processors idle, run beside the rest; what they
# said comes when that has ended. The histories of the simulator are timed, and run alone.
#
# Usage: scripts/test.sh      (make test: the release binaries have to be there)
#
# Exit status 0 if all passed.
set -uo pipefail
# A group of processes for each job, so that a signal can reach all of it.
set -m

cd "$(dirname "$0")/.."
guests=$(mktemp)
trap 'rm -f "$guests"' EXIT
give_up() {
    local job
    for job in $(jobs -p); do
        kill -- -"$job" 2>/dev/null
    done
    wait
    cat "$guests"
    exit 130
}
trap give_up INT TERM

# Each in the background: a signal is looked at only when nothing in the foreground runs.
result=0
make test-guest 3>&1 >"$guests" 2>&1 </dev/null &
beside=$!
make --keep-going test-unit test-sim test-fuzz test-native </dev/null &
wait $! || result=1
wait $beside || result=1
cat "$guests"
make test-histories </dev/null &
wait $! || result=1
exit $result
