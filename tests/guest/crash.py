"""The write load of the crash test, and the check of what it was promised.

Usage: crash.py load DEVICE LOG_DIR ROUND     writes until it is killed
       crash.py verify DEVICE LOG_DIR         checks; prints a digest of all it read

Each of WRITERS processes writes random blocks of a region of its own past the page cache, in
batches that end with fdatasync. Only then the batch is noted in LOG_DIR, which lies outside the
guest and so outlives it. A block carries its address, a number that only grows, and a checksum.
Legal after a crash: every noted block holds the noted number or a later one, whole and at its
place; a block that was never noted may also be all zero.
"""

import glob
import hashlib
import mmap
import os
import random
import struct
import sys
import zlib

BLOCK = 4096
WRITERS = 4
REGION_BLOCKS = 4096
BATCH = 8
NUMBERS_PER_ROUND = 1 << 32
HEADER = struct.Struct("<8sQQI")
NOTE = struct.Struct("<QQ")
MAGIC = b"crashblk"


def content(address, number):
    """The block with this number at this address."""
    filler = struct.pack("<QQ", address, number) * ((BLOCK - HEADER.size) // 16 + 1)
    filler = filler[: BLOCK - HEADER.size]
    return HEADER.pack(MAGIC, address, number, zlib.crc32(filler)) + filler


def write_forever(device, log_dir, round_number, writer):
    """One writer; ends only with the guest."""
    chooser = random.Random(round_number * WRITERS + writer)
    file = os.open(device, os.O_WRONLY | os.O_DIRECT)
    log = os.open(
        f"{log_dir}/promised.{round_number}.{writer}", os.O_WRONLY | os.O_CREAT | os.O_APPEND
    )
    buffer = mmap.mmap(-1, BLOCK)
    number = round_number * NUMBERS_PER_ROUND
    while True:
        notes = b""
        for _ in range(BATCH):
            number += 1
            address = writer * REGION_BLOCKS + chooser.randrange(REGION_BLOCKS)
            buffer[:] = content(address, number)
            if os.pwrite(file, buffer, address * BLOCK) != BLOCK:
                sys.exit("short write")
            notes += NOTE.pack(address, number)
        os.fdatasync(file)
        os.write(log, notes)


def load(device, log_dir, round_number):
    """All writers; ends with 1 when one of them gets an error."""
    for writer in range(WRITERS):
        if os.fork() == 0:
            write_forever(device, log_dir, round_number, writer)
    _, status = os.wait()
    sys.exit(f"a writer ended with status {status}")


def promised(log_dir):
    """The highest noted number of each block."""
    highest = {}
    for path in glob.glob(f"{log_dir}/promised.*"):
        with open(path, "rb") as log:
            notes = log.read()
        # The last note may be cut short by the crash.
        for at in range(0, len(notes) - NOTE.size + 1, NOTE.size):
            address, number = NOTE.unpack_from(notes, at)
            highest[address] = max(number, highest.get(address, 0))
    return highest


def verify(device, log_dir):
    """Every block of every region."""
    highest = promised(log_dir)
    if not highest:
        sys.exit("nothing was promised: the load did not run")
    file = os.open(device, os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, 1 << 20)
    digest = hashlib.sha256()
    wrong = []
    for start in range(0, WRITERS * REGION_BLOCKS, len(buffer) // BLOCK):
        if os.preadv(file, [buffer], start * BLOCK) != len(buffer):
            sys.exit("short read")
        digest.update(buffer)
        for address in range(start, start + len(buffer) // BLOCK):
            at = (address - start) * BLOCK
            block = buffer[at : at + BLOCK]
            least = highest.get(address)
            if block.count(0) == BLOCK:
                if least is not None:
                    wrong.append(f"block {address}: zero, {least} was promised")
                continue
            _, found_address, number, _ = HEADER.unpack_from(block)
            if found_address != address or block != content(address, number):
                wrong.append(f"block {address}: torn or misplaced content")
            elif number < (least or 0):
                wrong.append(f"block {address}: holds {number}, {least} was promised")
    for line in wrong[:20]:
        print(line, file=sys.stderr)
    if wrong:
        sys.exit(f"{len(wrong)} of {len(highest)} promised blocks are wrong")
    print(f"{len(highest)} promised blocks are there, digest {digest.hexdigest()[:16]}")


if sys.argv[1] == "load":
    load(sys.argv[2], sys.argv[3], int(sys.argv[4]))
else:
    verify(sys.argv[2], sys.argv[3])
