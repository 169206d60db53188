#!/bin/bash
# A Python environment of the project's own that holds virtme-ng.
#
# Usage: scripts/vng-env.sh
#
# Prints the folder of its commands; vng must be run with that folder first in PATH, because it
# starts helpers by name.
set -euo pipefail

version=1.42
project=$(cd "$(dirname "$0")/.." && pwd)
venv=$project/.cache/venv
stamp=$venv/virtme-ng-$version

# Its commands name the folder they were made in: after a move they do not run.
if [ ! -e "$stamp" ] || ! "$venv/bin/vng" --version >/dev/null 2>&1; then
    rm -rf "$venv"
    python3 -m venv "$venv" >&2
    "$venv/bin/pip" install -q "virtme-ng==$version" >&2
    touch "$stamp"
fi
echo "$venv/bin"
