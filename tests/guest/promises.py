"""A write load whose every step can be foretold, and what it has been promised at each step.

Usage: promises.py fill DISK...      fills disks with what must never show
       promises.py load DEVICE SIZE_MIB TRACE_MARKER COUNT_FILE      writes until SIGTERM

Each of WRITERS processes works through the steps of its own plan, which is drawn from its number
alone: plain writes and a flush, writes that are durable at once (FUA) and nothing else, zeroes and
whole-extent discards with a flush. When all calls of a step have returned, what it wrote is promised, and the
writer says so in the kernel's trace (`promised WRITER STEPS`), where the completions of the
members' I/O stand too. One byte a step goes to COUNT_FILE, for whoever waits for progress.

Each writer has extents of its own and comes to them one by one, so that first writes to unwritten
extents happen during the whole run. In an extent it uses a window of blocks and leaves the end of
the window alone.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import random
import signal
import struct
import sys

BLOCK = 4096
EXTENT_BLOCKS = 1024
WRITERS = 3
# Blocks of an extent that are looked at, and how many of them are ever written.
WINDOW = 32
USED = 24
# Steps until a writer goes on to its next extent.
STEPS_PER_EXTENT = 25
BLKDISCARD, BLKZEROOUT = 0x1277, 0x127F
# What a disk held before it became a member.
BEFORE = b"\xa5"
# System calls of asynchronous I/O, which libc does not wrap, and one of its commands.
IO_SETUP, IO_GETEVENTS, IO_SUBMIT = 206, 208, 209
IOCB_CMD_PWRITE = 1
IOCB = struct.Struct("<QIIHhIQQqQII")


def content(address, number):
    """The block with this number at this address; each sector tells what it is. 0 is zeroes."""
    if number == 0:
        return bytes(BLOCK)
    lines = (f"{address:010d}.{sector}.{number:010d}|" for sector in range(BLOCK // 512))
    return b"".join(line.encode().ljust(32, b"#") * 16 for line in lines)


def window_of(extent):
    """The first block that is looked at in this extent."""
    place = random.Random(extent).randrange(EXTENT_BLOCKS - WINDOW)
    return extent * EXTENT_BLOCKS + place


class Plan:
    """What one writer does, step by step: the same in the load and in its check."""

    def __init__(self, writer, size_mib):
        self.random = random.Random(writer)
        extents = list(range(writer, size_mib // 4 - 2, WRITERS))
        self.random.shuffle(extents)
        self.extents = extents
        self.steps = 0
        self.number = 0

    def next(self):
        """A step: its kind, and its writes as (first block, count, number); 0 is zeroes."""
        self.steps += 1
        known = min(1 + self.steps // STEPS_PER_EXTENT, len(self.extents))
        # The newest extent gets half of the writes.
        chance = self.random.random()
        extent = self.extents[known - 1 if chance < 0.5 else self.random.randrange(known)]
        first = window_of(extent)
        chance = self.random.random()
        if chance < 0.03:
            return "discard", [(extent * EXTENT_BLOCKS, EXTENT_BLOCKS, 0)]
        if chance < 0.10:
            start = self.random.randrange(USED - 4)
            return "zeroes", [(first + start, self.random.randint(1, 4), 0)]
        # Under way at the same time, so they must not overlap: each has a place of four blocks.
        writes = []
        for place in self.random.sample(range(USED // 4), self.random.randint(1, 6)):
            self.number += 1
            count = self.random.choice((1, 1, 1, 2, 4))
            start = place * 4 + self.random.randrange(5 - count)
            writes.append((first + start, count, self.number))
        return ("fua" if chance < 0.5 else "flush"), writes


class Device:
    """The block device, past the page cache."""

    def __init__(self, path):
        self.file = os.open(path, os.O_RDWR | os.O_DIRECT)
        self.buffer = mmap.mmap(-1, BLOCK * WINDOW)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.context = ctypes.c_ulong(0)
        self.call(IO_SETUP, 16, ctypes.byref(self.context))

    def call(self, number, *arguments):
        """A system call that must succeed."""
        longs = [word if not isinstance(word, int) else ctypes.c_long(word) for word in arguments]
        while True:
            result = self.libc.syscall(ctypes.c_long(number), *longs)
            if result >= 0:
                return result
            if ctypes.get_errno() != errno.EINTR:
                sys.exit(f"system call {number}: {os.strerror(ctypes.get_errno())}")

    def write_all(self, writes, flags):
        """Writes all at once and waits. After a synchronous write with RWF_DSYNC the kernel sends
        a flush of its own; after an asynchronous one it relies on FUA alone."""
        blocks, pointers = [], []
        at = 0
        for first, count, number in writes:
            data = b"".join(content(address, number) for address in range(first, first + count))
            self.buffer[at : at + len(data)] = data
            block = IOCB.pack(
                0, 0, flags, IOCB_CMD_PWRITE, 0, self.file,
                self.address + at, len(data), first * BLOCK, 0, 0, 0,
            )  # fmt: skip
            blocks.append(ctypes.create_string_buffer(block, len(block)))
            pointers.append(ctypes.addressof(blocks[-1]))
            at += len(data)
        table = (ctypes.c_void_p * len(pointers))(*pointers)
        if self.call(IO_SUBMIT, self.context, len(pointers), table) != len(pointers):
            sys.exit("not all writes were taken")
        events = (ctypes.c_longlong * (4 * len(pointers)))()
        # In one piece or, when a signal comes, in two.
        got = 0
        while got < len(pointers):
            place = ctypes.byref(events, got * 32)
            got += self.call(IO_GETEVENTS, self.context, 1, len(pointers) - got, place, None)
        results = sorted(events[index * 4 + 2] for index in range(len(pointers)))
        if results != sorted(count * BLOCK for _, count, _ in writes):
            sys.exit(f"writes ended with {results}")

    def range_command(self, command, first, count):
        """Zeroes or discards blocks."""
        fcntl.ioctl(self.file, command, struct.pack("<QQ", first * BLOCK, count * BLOCK))

    def perform(self, kind, writes):
        """One step; when it returns it is promised."""
        if kind in ("discard", "zeroes"):
            command = BLKDISCARD if kind == "discard" else BLKZEROOUT
            for first, count, _ in writes:
                self.range_command(command, first, count)
        else:
            self.write_all(writes, os.RWF_DSYNC if kind == "fua" else 0)
        if kind == "flush":
            os.fdatasync(self.file)
        elif kind != "fua":
            os.fsync(self.file)


def work(writer, path, size_mib, marker, count_file):
    """One writer; SIGTERM ends it after the step that is under way."""
    over = []
    signal.signal(signal.SIGTERM, lambda *_: over.append(True))
    plan, device = Plan(writer, size_mib), Device(path)
    marker = os.open(marker, os.O_WRONLY)
    count = os.open(count_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    while not over:
        device.perform(*plan.next())
        os.write(marker, f"promised {writer} {plan.steps}\n".encode())
        os.write(count, b".")


def fill(paths):
    """Fills disks with BEFORE."""
    buffer = mmap.mmap(-1, 1 << 20)
    buffer[:] = BEFORE * len(buffer)
    for path in paths:
        file = os.open(path, os.O_WRONLY | os.O_DIRECT)
        for at in range(0, os.lseek(file, 0, os.SEEK_END), len(buffer)):
            if os.pwrite(file, buffer, at) != len(buffer):
                sys.exit("short write")


def load(path, size_mib, marker, count_file):
    """All writers; fails when one of them does."""
    children = []
    for writer in range(WRITERS):
        child = os.fork()
        if child == 0:
            work(writer, path, size_mib, marker, count_file)
            os._exit(0)
        children.append(child)
    signal.signal(signal.SIGTERM, lambda *_: [os.kill(child, signal.SIGTERM) for child in children])
    failed = sum(os.waitpid(child, 0)[1] != 0 for child in children)
    sys.exit(f"{failed} writers failed" if failed else 0)


if __name__ == "__main__":
    if sys.argv[1] == "fill":
        fill(sys.argv[2:])
    else:
        load(sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5])
