#!/bin/bash
# All tests on a real kernel: one boot for the tests of this folder, three for the host crash.
#
# Usage: tests/guest/host.sh [--family F] [--all] [--part 1|2] [NAME...]
#
# Builds nothing: the release binaries have to be there. With names only those tests are run
# (host_crash is one). --part leaves out every second test and the host crash. Without names and
# without --all, families other than the default have only the tests that are about the kernel more
# than about the mirror; and with CI in the environment the two longest are left out, and for those
# families the longer ones and the host crash as well. Exit status 0 if all passed.
set -uo pipefail

here=$(cd "$(dirname "$0")" && pwd)
family=6.12 all=no part=
while [[ ${1:-} == --* ]]; do
    case $1 in
    --family) family=${2:-} && shift ;;
    --part) part=${2:-} && shift ;;
    --all) all=yes ;;
    *) sed -n '2,10s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
    esac
    shift
done
names=() left_out=() crash=no
kernels=" discard fio_verify readd_under_load scsi_delete small_blocks unclean_stop "
[ -z "${CI:-}" ] || kernels=" discard fio_verify small_blocks unclean_stop "
longest=" bad_sectors scrub_three "
for name in "$@"; do
    if [ "$name" = host_crash ]; then
        crash=yes
    else
        names+=("$name")
    fi
done
if [ $# -eq 0 ]; then
    [ -n "$part" ] || crash=yes
    [ $all = yes ] || [ "$family" = 6.12 ] || [ -z "${CI:-}" ] || crash=no
    number=0
    for test in "$here"/t_*.sh; do
        test=$(basename "${test#"$here/t_"}" .sh)
        if [ $all = no ]; then
            if { [ "$family" != 6.12 ] && [[ $kernels != *" $test "* ]]; } ||
                { [ -n "${CI:-}" ] && [[ $longest == *" $test "* ]]; }; then
                left_out+=("$test")
                continue
            fi
        fi
        number=$((number + 1))
        [ -n "$part" ] && [ $((number % 2)) -ne $((part % 2)) ] || names+=("$test")
    done
fi

[ ${#left_out[@]} -eq 0 ] || echo "left out without --all: ${left_out[*]}"

area=$(mktemp -d "${TMPDIR:-/tmp}/ublk-mirror-logs.XXXXXX") || exit 1
trap 'rm -rf "$area"' EXIT
result=0
if [ ${#names[@]} -gt 0 ]; then
    "$here/../../scripts/guest.sh" --family "$family" --timeout 2700 --rwdir "$area" -- \
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
