"""What t_log_repairs.sh has on its mirror and how it is spoilt, for it and for its check outside.

Usage: repairs.py fill DEVICE               writes every block of the first extents
       repairs.py spoil MEMBER SLOT         spoils blocks of one member's disk, under the daemon
"""

import json
import mmap
import os
import random
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from promises import BLOCK, EXTENT_BLOCKS, content

EXTENTS = 3
BLOCKS = EXTENTS * EXTENT_BLOCKS
# In each extent on each member; none is spoilt on both.
RUNS = 8
# The checksums of this extent are spoilt as well, on the first member.
PAGE = 1


def right(address):
    """What every block holds."""
    return content(address, 1 + address)


def _spoilt(chance, address):
    """What is found instead: noise, another block, what was there before, or one bit turned."""
    block = bytearray(right(address))
    kind = chance.randrange(4)
    if kind == 0:
        return chance.randbytes(BLOCK)
    if kind == 1:
        return right((address + 1 + chance.randrange(BLOCKS - 1)) % BLOCKS)
    if kind == 2:
        return content(address, 0)
    block[chance.randrange(BLOCK)] ^= 1 << chance.randrange(8)
    return bytes(block)


def damage():
    """For each slot what lies where instead, as runs of (first block, contents)."""
    chance = random.Random(4)
    slots = ([], [])
    for extent in range(EXTENTS):
        # Runs of up to four blocks, each in a place of its own.
        places = chance.sample(range(EXTENT_BLOCKS // 4), RUNS * len(slots))
        for at, place in enumerate(places):
            first = extent * EXTENT_BLOCKS + place * 4
            blocks = range(first, first + chance.randint(1, 4))
            slots[at % 2].append((first, [_spoilt(chance, address) for address in blocks]))
    return slots


def _write(path, parts):
    """Writes (start, data) past the page cache, and returns when all is durable."""
    file = os.open(path, os.O_WRONLY | os.O_DIRECT)
    for start, data in parts:
        buffer = mmap.mmap(-1, len(data))
        buffer[:] = data
        if os.pwrite(file, buffer, start) != len(data):
            sys.exit("short write")
    os.fsync(file)


def fill(path):
    """Every block of the first extents, in pieces that no layer splits."""
    piece = 16
    _write(
        path,
        (
            (first * BLOCK, b"".join(map(right, range(first, first + piece))))
            for first in range(0, BLOCKS, piece)
        ),
    )


def spoil(path, slot):
    """All that is to be spoilt on one member; prints how many blocks."""
    told = subprocess.run(
        ["mirrorctl", "examine", path, "--json"], check=True, capture_output=True
    ).stdout
    told = json.loads(told)
    runs = damage()[slot]
    parts = [(told["data-offset"] + first * BLOCK, b"".join(blocks)) for first, blocks in runs]
    if slot == 0:
        table = next(region for region in told["regions"] if region["kind"] == "checksums")
        parts.append((table["copy-a"] + PAGE * BLOCK, random.Random(5).randbytes(BLOCK)))
    _write(path, parts)
    print(sum(len(blocks) for _, blocks in runs))


if __name__ == "__main__":
    if sys.argv[1] == "fill":
        fill(sys.argv[2])
    else:
        spoil(sys.argv[2], int(sys.argv[3]))
