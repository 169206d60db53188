#!/bin/bash
# Unpack a Debian kernel for the guest, without installing it.
#
# Usage: scripts/kernel.sh FAMILY        FAMILY is 6.12 or 7.2
#
# Prints the path of the kernel image on the last (and only) line of standard output. The kernel
# and its modules lie in .cache/kernel/FAMILY; a second run finds them there and downloads
# nothing. 6.12 comes from bookworm's security suite, 7.2 from trixie's backports (the newest
# 7.x there).
set -euo pipefail

usage() {
    sed -n '2,9p' "$0" | sed 's/^# \{0,1\}//' >&2
    exit 2
}

[ $# -eq 1 ] || usage
family=$1
case $family in
6.12) suites=(security:bookworm-security) pattern='^linux-image-6\.12\.[0-9][^ ]*-amd64$' ;;
7.2) suites=(main:trixie-backports) pattern='^linux-image-7\.[0-9][^ ]*-amd64$' ;;
*) usage ;;
esac

# shellcheck source=scripts/private-apt.sh
. "$(dirname "$0")/private-apt.sh"

dir=$CACHE_DIR/kernel/$family
find_image() { find "$dir/root/boot" -name 'vmlinuz-*' 2>/dev/null | head -n 1 || true; }

if [ -e "$dir/complete" ] && [ -n "$(find_image)" ]; then
    find_image
    exit 0
fi

private_apt_setup "kernel-$family" "${suites[@]}"
package=$(apt-cache "${PRIVATE_APT[@]}" --names-only search "$pattern" | cut -d' ' -f1 |
    grep -Ev -- '-(cloud|rt|dbg|unsigned)' | sort -V | tail -n 1 || true)
if [ -z "$package" ]; then
    echo "The archive has no package that matches $pattern in ${suites[*]}." >&2
    exit 1
fi
echo "unpacking $package" >&2
rm -rf "$dir"
mkdir -p "$dir/root"
(cd "$dir" && apt-get "${PRIVATE_APT[@]}" -q download "$package" >&2)
# Newer kernel packages hold no modules themselves but depend on a package that does.
modules=$(dpkg-deb -f "$dir"/"$package"_*.deb Depends | tr ',|' '\n\n' |
    grep -oE 'linux-(modules|binary)-[^ (]+' || true)
for extra in $modules; do
    (cd "$dir" && apt-get "${PRIVATE_APT[@]}" -q download "$extra" >&2)
done
for deb in "$dir"/*.deb; do
    dpkg-deb -x "$deb" "$dir/root"
done
# Modules under usr/lib (merged /usr) are found by virtme-ng under lib.
if [ ! -e "$dir/root/lib/modules" ] && [ -d "$dir/root/usr/lib/modules" ]; then
    ln -sfn usr/lib "$dir/root/lib"
fi
image=$(find_image)
if [ -z "$image" ]; then
    image=$(find "$dir/root" -name 'vmlinuz*' | head -n 1)
    [ -n "$image" ] || { echo "$package holds no kernel image." >&2; exit 1; }
    mkdir -p "$dir/root/boot"
    cp "$image" "$dir/root/boot/vmlinuz-${package#linux-image-}"
fi
release=$(basename "$(find_image)")
depmod -b "$dir/root" "${release#vmlinuz-}"
rm -f "$dir"/*.deb
touch "$dir/complete"
find_image
