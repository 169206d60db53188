#!/bin/bash
# Build rublk, the yardstick for a one-disk ublk target, into .cache/rublk.
set -euo pipefail

version=0.2.15
project=$(cd "$(dirname "$0")/../.." && pwd)
root=$project/.cache/rublk
[ -e "$root/version-$version" ] && [ -x "$root/bin/rublk" ] && exit 0
# The features left out belong to other targets than the loop.
cargo install --quiet rublk --locked --version "$version" --no-default-features --root "$root"
touch "$root/version-$version"
