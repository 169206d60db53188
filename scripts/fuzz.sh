#!/bin/bash
# Fuzz everything that is decoded, one target after the other.
#
# Usage: scripts/fuzz.sh SECONDS [TARGET...]
#
# Each target of fuzz/fuzz_targets gets SECONDS, beginning with the inputs in fuzz/corpus, and
# ends with a line `ok fuzz_TARGET` or `not ok fuzz_TARGET`. New inputs stay in the target
# folder, so that a later run goes on from there; the input of a crash goes to fuzz/artifacts.
set -euo pipefail

version=0.13.2
project=$(cd "$(dirname "$0")/.." && pwd)
tools=$project/.cache/cargo-fuzz
seconds=${1:?SECONDS}
shift
cd "$project"

export PATH="$tools/bin:$PATH"
if ! command -v cargo-fuzz >/dev/null; then
    # It only starts the compiler and the targets: no use in optimising it.
    cargo install --quiet cargo-fuzz --locked --debug --version "$version" --root "$tools"
fi
built=$(realpath -m "${CARGO_TARGET_DIR:-target}")/fuzz

# Without a sanitizer the stable compiler will do. Nothing of ours that decodes is unsafe code;
# what the targets look for are panics, wrong results, and memory beyond a limit, which they count
# themselves. RUSTC_BOOTSTRAP=1 cargo fuzz run TARGET does it with the address sanitizer.
fuzz() {
    local command=$1
    shift
    cargo fuzz "$command" --sanitizer none --codegen-units 16 --target-dir "$built" "$@"
}

if [ $# -eq 0 ]; then
    for source in fuzz/fuzz_targets/*.rs; do
        set -- "$@" "$(basename "$source" .rs)"
    done
fi
fuzz build
failed=0
for target in "$@"; do
    log=$built/$target.log found=$built/corpus/$target
    mkdir -p "$found"
    # An input may take 10 s; the whole process 1 GiB, as a backstop.
    if fuzz run "$target" "$found" "fuzz/corpus/$target" -- -max_total_time="$seconds" \
        -timeout=10 -rss_limit_mb=1024 -max_len=16384 >"$log" 2>&1; then
        echo "$target: $(grep '^Done ' "$log")"
        echo "ok fuzz_$target"
    else
        # What went wrong, and the command that shows it again.
        grep -m 1 -A 12 -E 'panicked at|ERROR: libFuzzer|^error' "$log" || tail -n 20 "$log"
        grep -E '^[[:space:]]*cargo fuzz run ' "$log" || true
        echo "All of it is in $log."
        echo "not ok fuzz_$target"
        failed=1
    fi
done
exit $failed
