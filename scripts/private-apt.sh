# shellcheck shell=bash
# A private apt, for suites that this machine does not use itself. Sourced by other scripts.
#
# Promise: package lists and archives of the private apt live under .cache/apt/NAME; the
# machine's own lists, pins and sources stay as they are. Archive addresses and keys come from
# the machine's apt sources (archive-sources.py). The machine's proxy and certificate settings
# under /etc/apt/apt.conf.d still hold.

PROJECT_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CACHE_DIR=$PROJECT_DIR/.cache

# private_apt_setup NAME main:SUITE|security:SUITE... : fills PRIVATE_APT and updates the lists
# if they are older than a day.
private_apt_setup() {
    local name=$1 dir
    shift
    dir=$CACHE_DIR/apt/$name
    mkdir -p "$dir/lists/partial" "$dir/cache/archives/partial"
    python3 "$PROJECT_DIR/scripts/archive-sources.py" "$@" >"$dir/new.sources"
    PRIVATE_APT=(
        -o Dir::Etc::SourceList=/dev/null
        -o "Dir::Etc::SourceParts=$dir/sources.d"
        -o Dir::Etc::Preferences=/dev/null
        -o Dir::Etc::PreferencesParts=/dev/null
        -o "Dir::State::Lists=$dir/lists"
        -o "Dir::Cache=$dir/cache"
        -o Dir::Cache::Archives=archives
        -o APT::Sandbox::User=root
        -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false
        -o Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false
        -o Acquire::Languages=none
        -o Acquire::Retries=3
    )
    mkdir -p "$dir/sources.d"
    if ! cmp -s "$dir/new.sources" "$dir/sources.d/private.sources" ||
        [ -z "$(find "$dir/updated" -mmin -1440 2>/dev/null)" ]; then
        mv "$dir/new.sources" "$dir/sources.d/private.sources"
        rm -f "$dir/updated"
        apt-get "${PRIVATE_APT[@]}" -q update >&2
        touch "$dir/updated"
    else
        rm -f "$dir/new.sources"
    fi
}
