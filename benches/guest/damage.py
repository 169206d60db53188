#!/usr/bin/env python3
"""Change blocks of a disk under whatever uses it.

Usage: damage.py PATH DATA_OFFSET BLOCKS COUNT PART PARTS

Of the BLOCKS blocks of 4 KiB from DATA_OFFSET on, PARTS x COUNT are drawn, always the same ones;
those of PART (from 0) become random bytes. Written past the page cache.
"""

import mmap
import os
import random
import sys

BLOCK = 4096


def main():
    """Damage one disk."""
    path = sys.argv[1]
    offset, blocks, count, part, parts = map(int, sys.argv[2:])
    drawn = random.Random(1).sample(range(blocks), parts * count)[part::parts]
    aligned = mmap.mmap(-1, BLOCK)
    disk = os.open(path, os.O_WRONLY | os.O_DIRECT)
    for block in drawn:
        aligned[:] = os.urandom(BLOCK)
        os.pwrite(disk, aligned, offset + block * BLOCK)
    os.close(disk)


main()
