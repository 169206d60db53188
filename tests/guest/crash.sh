#!/bin/bash
# The host of a mirror crashes (the emulator is killed) under a write load; what fsync had
# promised must be there after the next boot. A second time while a member is coming back.
#
# Usage: tests/guest/crash.sh [--family F]
#
# Runs outside the guest. Prints `ok host_crash` or `not ok host_crash`.
set -uo pipefail

here=$(cd "$(dirname "$0")" && pwd)
guest=$here/../../scripts/guest.sh
family=6.12
[ "${1:-}" = --family ] && family=$2

area=$(mktemp -d "${TMPDIR:-/tmp}/ublk-mirror-crash.XXXXXX") || exit 1
began=$SECONDS
trap 'rm -rf "$area"' EXIT
truncate -s 160M "$area/a.img" "$area/b.img"
mkdir "$area/logs"

give_up() {
    echo "not ok host_crash ($1)"
    sed 's/^/    /' "$area"/*.out | tail -n 60
    exit 1
}

boot() {
    local step=$1
    "$guest" --family "$family" --memory 1G --timeout 400 --rwdir "$area/logs" \
        --drive "$area/a.img" --drive "$area/b.img" --pidfile "$area/$step.pid" -- \
        "bash \$PROJECT_DIR/tests/guest/crash_guest.sh $step $area/logs" >"$area/$step.out" 2>&1
}

noted_bytes() { cat "$area"/logs/promised."$1".* 2>/dev/null | wc -c; }

# boot_and_kill STEP ROUND FILE : kills the emulator once the load of this round has been promised
# 100 batches since FILE (if any) appeared.
boot_and_kill() {
    local step=$1 round=$2 file=$3 tries=0 base= runner
    boot "$step" &
    runner=$!
    while kill -0 $runner 2>/dev/null; do
        if [ -z "$file" ] || [ -e "$file" ]; then
            base=${base:-$(noted_bytes "$round")}
            if [ $(($(noted_bytes "$round") - base)) -ge 12800 ]; then
                kill -KILL "$(cat "$area/$step.pid")"
                wait $runner
                [ $? -eq 125 ] || give_up "step $step: the guest was not killed under load"
                return 0
            fi
        fi
        tries=$((tries + 1))
        [ $tries -le 4000 ] || break
        sleep 0.1
    done
    wait $runner
    give_up "step $step ended by itself with $?"
}

boot_and_kill create 1 ""
boot_and_kill degrade 2 "$area/logs/returned"
boot check || give_up "step check failed with $?"
grep -h 'promised blocks' "$area"/degrade.out "$area"/check.out | sed 's/^/    /'
echo "ok host_crash ($((SECONDS - began)) s)"
