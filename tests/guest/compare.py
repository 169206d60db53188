"""Compare the data areas of two or more members of a mirror.

Usage: compare.py MEMBER MEMBER...

Where the data lie comes from `mirrorctl examine --json`. Reads past the page cache. Says which
extents differ, and ends with 1 if any does.
"""

import json
import mmap
import os
import subprocess
import sys

EXTENT = 4 << 20


def find_key(value, names):
    """The first value under one of these names, however deep."""
    if isinstance(value, dict):
        for name in names:
            if name in value:
                return value[name]
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            found = find_key(inner, names)
            if found is not None:
                return found
    return None


def data_area(path):
    """Offset and length of the data on this member, in bytes."""
    text = subprocess.run(
        ["mirrorctl", "examine", path, "--json"], check=True, capture_output=True
    ).stdout
    document = json.loads(text)
    offset = find_key(document, ("data-offset", "data-offset-bytes"))
    size = find_key(document, ("size-bytes", "size"))
    if offset is None or size is None:
        sys.exit(f"{path}: examine tells no data-offset or size-bytes")
    return offset, size


def main(paths):
    """Compare all with the first."""
    areas = [data_area(path) for path in paths]
    if len(set(areas)) != 1:
        sys.exit(f"the members disagree about the data area: {areas}")
    offset, size = areas[0]
    files = [os.open(path, os.O_RDONLY | os.O_DIRECT) for path in paths]
    buffers = [mmap.mmap(-1, EXTENT) for _ in paths]
    different = []
    for extent in range((size + EXTENT - 1) // EXTENT):
        length = min(EXTENT, size - extent * EXTENT)
        for file, buffer in zip(files, buffers):
            got = os.preadv(file, [memoryview(buffer)[:length]], offset + extent * EXTENT)
            if got != length:
                sys.exit(f"short read of {got} bytes in extent {extent}")
        # Slices, not views: two bytes objects are compared by memcmp, views item by item.
        first = buffers[0][:length]
        for path, buffer in zip(paths[1:], buffers[1:]):
            if buffer[:length] != first:
                blocks = [
                    block
                    for block in range(0, length, 4096)
                    if buffer[block : block + 4096] != buffers[0][block : block + 4096]
                ]
                different.append((extent, path, len(blocks), blocks[0] // 4096))
    for extent, path, count, block in different[:20]:
        print(f"extent {extent}: {count} blocks of {path} differ, the first is block {block}")
    if different:
        sys.exit(f"{len(different)} extents differ")
    print(f"{len(paths)} members are the same over {size >> 20} MiB")


main(sys.argv[1:])
