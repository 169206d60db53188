"""A disk in memory whose sectors can go bad: unreadable until they are written, as on a real one.

Usage: bad_disk.py serve DEVICE MIB SOCKET        serves DEVICE (/dev/nbdN) until it is killed
       bad_disk.py ask SOCKET [BYTE SECTORS]      these go bad too; prints how many are bad now

The kernel's NBD client makes a block device of it. scsi_debug's bad sectors stay bad whatever is
written to them, dm-dust is not in Debian's kernels, and null_blk refuses writes to its bad blocks
too. A read that meets a bad sector ends with EIO as a whole.
"""

import fcntl
import mmap
import os
import socket
import struct
import sys
import threading

SECTOR = 512
EIO = 5
REQUEST, REPLY = struct.Struct(">IHHQQI"), struct.Struct(">IIQ")
REQUEST_MAGIC, REPLY_MAGIC = 0x25609513, 0x67446698
READ, WRITE, DISCONNECT, FLUSH = 0, 1, 2, 3
# What a client learns in a handshake, which this one does not have: the flags' word, flush, FUA.
FLAGS = 1 | 4 | 8
SET_SOCK, SET_BLOCK_SIZE, DO_IT, SET_BLOCKS, SET_FLAGS = 0xAB00, 0xAB01, 0xAB03, 0xAB07, 0xAB0A


class Disk:
    """The content, and which sectors are bad."""

    def __init__(self, size):
        self.content = memoryview(mmap.mmap(-1, size))
        self.bad = set()
        self.lock = threading.Lock()

    def go_bad(self, start, count):
        """Sectors from byte `start` on; how many are bad now."""
        with self.lock:
            self.bad.update(range(start // SECTOR, start // SECTOR + count))
            return len(self.bad)

    def serve(self, connection):
        """Answers the kernel's requests, one after the other, until it closes."""
        head = bytearray(REQUEST.size)
        while take(connection, memoryview(head)):
            magic, _, kind, cookie, start, length = REQUEST.unpack(head)
            if magic != REQUEST_MAGIC or kind not in (READ, WRITE, FLUSH):
                return
            part = self.content[start : start + length]
            sectors = range(start // SECTOR, (start + length) // SECTOR)
            error = 0
            with self.lock:
                if kind == WRITE:
                    if not take(connection, part):
                        return
                    self.bad.difference_update(sectors)
                elif kind == READ and not self.bad.isdisjoint(sectors):
                    error = EIO
            connection.sendall(REPLY.pack(REPLY_MAGIC, error, cookie))
            if kind == READ and not error:
                connection.sendall(part)


def take(connection, into):
    """Fills `into`; false at the end."""
    while into:
        got = connection.recv_into(into)
        if got == 0:
            return False
        into = into[got:]
    return True


def attach(device, size, theirs):
    """Hands one end to the kernel and stays in it while the device is there."""
    # Not for writing: mirrorctl takes no disk that somebody else may write to.
    file = os.open(device, os.O_RDONLY)
    fcntl.ioctl(file, SET_BLOCK_SIZE, SECTOR)
    fcntl.ioctl(file, SET_BLOCKS, size // SECTOR)
    fcntl.ioctl(file, SET_FLAGS, FLAGS)
    fcntl.ioctl(file, SET_SOCK, theirs)
    fcntl.ioctl(file, DO_IT)


def serve(device, mib, path):
    """The server."""
    disk = Disk(mib << 20)
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        # Its death is what the kernel notices: this end must not be open anywhere else.
        ours.close()
        attach(device, mib << 20, theirs.fileno())
        os._exit(0)
    theirs.close()
    threading.Thread(target=disk.serve, args=(ours,), daemon=True).start()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        while True:
            with listener.accept()[0] as client:
                words = client.makefile("r", encoding="ascii").readline().split()
                count = disk.go_bad(*map(int, words or (0, 0)))
                client.sendall(f"{count}\n".encode("ascii"))


def ask(path, words):
    """One question."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        client.sendall(" ".join(words).encode("ascii") + b"\n")
        print(client.makefile("r", encoding="ascii").readline(), end="")


if sys.argv[1] == "serve":
    serve(sys.argv[2], int(sys.argv[3]), sys.argv[4])
else:
    ask(sys.argv[2], sys.argv[3:])
