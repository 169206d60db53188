#!/bin/bash
# All tests. The guests, which leave much of two processors idle, run beside the rest; what they
# said comes when that has ended. The histories of the simulator are timed, and run alone.
#
# Usage: scripts/test.sh      (make test: the release binaries have to be there)
#
# Exit status 0 if all passed.
set -uo pipefail

cd "$(dirname "$0")/.."
guests=$(mktemp)
guests_said() {
    cat "$guests"
    rm -f "$guests"
}
trap guests_said EXIT
trap 'kill $(jobs -p) 2>/dev/null; exit 130' INT TERM

result=0
make test-guest >"$guests" 2>&1 </dev/null &
beside=$!
make --keep-going test-unit test-sim test-fuzz test-native || result=1
wait $beside || result=1
guests_said
trap - EXIT
make test-histories || result=1
exit $result
