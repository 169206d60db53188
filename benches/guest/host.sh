#!/bin/bash
# Boot the guest and measure in it, for each kernel family on two processors and counted.
#
# Usage: benches/guest/host.sh [FAMILY...]        default: 6.12 7.2
#
# Builds rublk into .cache if it is not there; our own release binaries have to be there.
# Results go to benches/out/raw; benches/report.py makes tables of them. BENCH_SUBJECTS limits
# what is measured, BENCH_MODES (wall, counted, peer) how.
set -uo pipefail

project=$(cd "$(dirname "$0")/../.." && pwd)
raw=$project/benches/out/raw
mkdir -p "$raw"
families=("$@")
[ $# -gt 0 ] || families=(6.12 7.2)
read -ra subjects <<<"${BENCH_SUBJECTS:-}"
read -ra modes <<<"${BENCH_MODES:-wall counted peer}"

"$project/benches/guest/rublk.sh" || echo "going on without rublk" >&2

result=0
for family in "${families[@]}"; do
    for mode in "${modes[@]}"; do
        case $mode in
        wall) place=guest-$family-2cpu options=(--cpus 2) ;;
        counted) place=guest-$family-counted options=(--icount) ;;
        peer) place=guest-$family-peer options=(--cpus 2) ;;
        esac
        rm -f "$raw/${place}__"*
        "$project/scripts/guest.sh" --family "$family" "${options[@]}" --memory 4G \
            --timeout 3000 --rwdir "$raw" -- \
            "bash \$PROJECT_DIR/benches/guest/bench.sh $place $raw $mode ${subjects[*]}" ||
            { result=1 && echo "measuring $place FAILED" >&2; }
    done
done
exit $result
