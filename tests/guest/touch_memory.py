"""Touches more memory than there is, and checks it each time it comes back.

Usage: touch_memory.py MIB COUNT_FILE

Writes every page of MIB mebibytes, then reads all back, round after round, with one byte a round to
COUNT_FILE; ends after the round in which COUNT_FILE.enough has appeared. Fails when a page does not
hold what was written to it.
"""

import mmap
import os
import struct
import sys

PAGE = 4096


def main(mib, count_file):
    """Rounds, until told."""
    memory = mmap.mmap(-1, mib << 20)
    pages = len(memory) // PAGE
    count = os.open(count_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    rounds = 0
    while not os.path.exists(count_file + ".enough"):
        rounds += 1
        for page in range(pages):
            memory[page * PAGE : page * PAGE + 16] = struct.pack("<QQ", rounds, page)
        for page in range(pages):
            found = struct.unpack_from("<QQ", memory, page * PAGE)
            if found != (rounds, page):
                sys.exit(f"page {page} holds {found} in round {rounds}")
        os.write(count, b".")
    print(f"{rounds} rounds over {mib} MiB")


main(int(sys.argv[1]), sys.argv[2])
