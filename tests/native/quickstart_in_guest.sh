#!/bin/bash
# Runs the quickstart on a kernel that has ublk, where it takes /dev/ublkbN.
#
# Usage: tests/native/quickstart_in_guest.sh [FAMILY]
#
# Prints `ok quickstart` or `not ok quickstart` after its output.
set -uo pipefail

project=$(cd "$(dirname "$0")/../.." && pwd)
family=${1:-6.12}
began=$SECONDS
# The guest's /tmp is a layer in memory over 9p, which takes no direct I/O; a tmpfs does.
if output=$("$project/scripts/guest.sh" --family "$family" --timeout 900 -- \
    'mkdir -p /run/quickstart && mount -t tmpfs -o size=90% tmpfs /run/quickstart &&
     TMPDIR=/run/quickstart $PROJECT_DIR/scripts/quickstart.sh --data 32' 2>&1) &&
    grep -q ' started on /dev/ublkb' <<<"$output"; then
    echo "ok quickstart ($((SECONDS - began)) s, kernel $family)"
else
    sed 's/^/    /' <<<"$output"
    echo "not ok quickstart ($((SECONDS - began)) s, kernel $family)"
    exit 1
fi
