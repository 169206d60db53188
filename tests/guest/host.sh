#!/bin/bash
# All tests on a real kernel: one boot for the tests of this folder, three for the host crash.
#
# Usage: tests/guest/host.sh [--family F] [NAME...]
#
# Builds nothing: the release binaries have to be there. With names only those tests are run
# (host_crash is one). Without names, families other than the default leave out the tests in which
# the kernel has little part and that take minutes. Exit status 0 if all passed.
set -uo pipefail

here=$(cd "$(dirname "$0")" && pwd)
family=6.12
if [ "${1:-}" = --family ]; then
    family=$2
    shift 2
fi
names=() crash=no
long=(bad_sectors log_repairs scrub scrub_three)
if [ $# -eq 0 ]; then
    crash=yes
    if [ "$family" != 6.12 ]; then
        for test in "$here"/t_*.sh; do
            test=$(basename "${test#"$here/t_"}" .sh)
            [[ " ${long[*]} " == *" $test "* ]] || names+=("$test")
        done
    fi
fi
for name in "$@"; do
    if [ "$name" = host_crash ]; then
        crash=yes
    else
        names+=("$name")
    fi
done

area=$(mktemp -d "${TMPDIR:-/tmp}/ublk-mirror-logs.XXXXXX") || exit 1
trap 'rm -rf "$area"' EXIT
result=0
if [ $# -eq 0 ] || [ ${#names[@]} -gt 0 ]; then
    "$here/../../scripts/guest.sh" --family "$family" --timeout 2400 --rwdir "$area" -- \
        "LOG_WRITES_DIR=$area bash \$PROJECT_DIR/tests/guest/run.sh ${names[*]}" || result=1
    # The second half of t_log_*.sh, which would take an hour inside.
    for trace in "$area"/*/trace; do
        [ -e "$trace" ] || continue
        "$here/$(basename "${trace%/trace}").py" "${trace%/trace}" || result=1
    done
fi
if [ $crash = yes ]; then
    "$here/crash.sh" --family "$family" || result=1
fi
[ $result -eq 0 ] && echo "guest tests on kernel $family: all passed" ||
    echo "guest tests on kernel $family: FAILED"
exit $result
