#!/bin/bash
# Runs the tests of this folder, inside the guest.
#
# Usage: run.sh [NAME...]      NAME is that of a test without t_ and .sh; all without one
#
# Prints `ok NAME` or `not ok NAME` with the end of the test's output, then `N passed, N failed`.
# A test that leaves a kernel warning behind has failed. Exit status 0 if all passed.
set -uo pipefail

# shellcheck source=tests/guest/lib.sh
. "$(dirname "$0")/lib.sh"
set +e

limit=${GUEST_TEST_TIMEOUT:-900}
enter_guest
echo "kernel $(uname -r), $(nproc) processors"

passed=0 failed=0 broken=()
if [ $# -gt 0 ]; then
    tests=("${@/#/$GUEST_DIR/t_}")
    tests=("${tests[@]/%/.sh}")
else
    tests=("$GUEST_DIR"/t_*.sh)
fi
for test in "${tests[@]}"; do
    name=$(basename "$test" .sh)
    name=${name#t_}
    log=$WORK/logs/$name
    dmesg -C
    began=$SECONDS
    timeout --kill-after=10 "$limit" bash "$test" >"$log" 2>&1 </dev/null
    code=$?
    [ $code -eq 124 ] && echo "FAILED: not done after $limit seconds" >>"$log"
    if dmesg | grep -E 'BUG:|WARNING:|Oops|general protection|blocked for more than' >>"$log"; then
        code=1
    fi
    if [ $code -eq 0 ]; then
        passed=$((passed + 1))
        echo "ok $name ($((SECONDS - began)) s)"
    else
        failed=$((failed + 1))
        broken+=("$name")
        echo "not ok $name (exit status $code, $((SECONDS - began)) s)"
        tail -n 40 "$log" | sed 's/^/    /'
        for daemon_log in "$UBLK_MIRROR_RUN_DIR"/*.log; do
            [ -s "$daemon_log" ] || continue
            echo "    --- $(basename "$daemon_log")"
            tail -n 20 "$daemon_log" | sed 's/^/    /'
        done
        echo "    --- kernel"
        dmesg | tail -n 10 | sed 's/^/    /'
    fi
    (clean_up) >>"$log" 2>&1
done
echo "$passed passed, $failed failed${broken[*]:+: ${broken[*]}}"
[ $failed -eq 0 ] && [ $passed -gt 0 ]
