"""A small NBD client: many requests in flight on one connection.

Speaks the fixed newstyle handshake with OPT_GO and simple replies, as the NBD project's
doc/proto.md says. `Client` sends a request and returns at once with a `Future`; a thread takes
the replies. When the connection ends every outstanding request ends with `Gone`.
"""

import socket
import struct
import threading
import time

READ, WRITE, DISCONNECT, FLUSH, TRIM, WRITE_ZEROES = 0, 1, 2, 3, 4, 6
FUA, NO_HOLE = 1, 2

FLAG_READ_ONLY = 1 << 1
FLAG_FLUSH, FLAG_FUA, FLAG_TRIM, FLAG_WRITE_ZEROES = 1 << 2, 1 << 3, 1 << 5, 1 << 6

EPERM, EIO, EINVAL, ENOSPC = 1, 5, 22, 28

OPT_GO, OPT_CLAIM = 7, 0x554D434C

_REPLY_ACK, _REPLY_INFO, _INFO_EXPORT = 1, 3, 0


class Gone(Exception):
    """The connection ended before the answer came."""


class Refused(Exception):
    """The server answered with an error; args[0] is its number."""


def claim(owner, take_over=False, seen=None):
    """A claim for `Client`; seen is the document of `mirrorctl examine`, or none."""
    words = struct.pack(">BB", 1, take_over) + owner.to_bytes(16, "big")
    if seen is None:
        return words + b"\0"
    words += b"\1" + bytes.fromhex(seen["mirror-uuid"].replace("-", ""))
    history = [epoch["id"] for epoch in seen["history"]]
    words += bytes.fromhex(seen["epoch"]["id"]) + bytes([len(history)])
    return words + b"".join(bytes.fromhex(epoch) for epoch in history)


class Future:
    """An answer that will come."""

    def __init__(self, length):
        self.began, self.ended = time.monotonic(), None
        self.length = length
        self.done = threading.Event()
        self.error = None
        self.data = b""

    def end(self, error=None):
        """It has come, or never will."""
        self.error = self.error or error
        self.ended = time.monotonic()
        self.done.set()

    def wait(self, seconds=60):
        """The data of a read; raises Refused or Gone."""
        if not self.done.wait(seconds):
            raise TimeoutError(f"no answer within {seconds} s")
        if self.error is None:
            return self.data
        raise self.error


class Client:
    """One connection to an export."""

    def __init__(self, path, export="", seconds=30, claim=None):
        """Connects: path is that of a unix socket, or (host, port); claim is what follows the
        export's name in a claim (see `claim`)."""
        if isinstance(path, tuple):
            self.socket = socket.create_connection(path, seconds)
        else:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(seconds)
            self.socket.connect(path)
        self.size = self.flags = 0
        self._handshake(export.encode(), claim)
        self.socket.settimeout(None)
        self.lock = threading.Lock()
        self.waiting = {}
        self.cookie = 0
        self.ended = False
        self.taker = threading.Thread(target=self._take_replies, daemon=True)
        self.taker.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _receive(self, length):
        parts = []
        while length > 0:
            part = self.socket.recv(min(length, 1 << 20))
            if not part:
                raise Gone("the server closed the connection")
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def _handshake(self, export, claim):
        magic, option_magic, flags = struct.unpack(">8s8sH", self._receive(18))
        if magic != b"NBDMAGIC" or option_magic != b"IHAVEOPT":
            raise Gone("this is no NBD server")
        self.socket.sendall(struct.pack(">I", flags & 3))
        name = struct.pack(">I", len(export)) + export
        if claim is not None:
            self._option(OPT_CLAIM, name + claim)
        self._option(OPT_GO, name + struct.pack(">H", 0))

    def _option(self, option, body):
        self.socket.sendall(b"IHAVEOPT" + struct.pack(">II", option, len(body)) + body)
        while True:
            _, _, kind, length = struct.unpack(">QIII", self._receive(20))
            body = self._receive(length)
            if kind == _REPLY_ACK:
                return
            if kind & 1 << 31:
                raise Refused(kind & ~(1 << 31), body.decode(errors="replace"))
            if kind == _REPLY_INFO and struct.unpack(">H", body[:2])[0] == _INFO_EXPORT:
                self.size, self.flags = struct.unpack(">QH", body[2:12])

    def _take_replies(self):
        try:
            while True:
                magic, error, cookie = struct.unpack(">IIQ", self._receive(16))
                if magic != 0x67446698:
                    raise Gone(f"a reply begins with {magic:#x}")
                with self.lock:
                    future = self.waiting.pop(cookie)
                if error:
                    future.error = Refused(error)
                elif future.length:
                    future.data = self._receive(future.length)
                future.end()
        except (OSError, Gone, KeyError) as error:
            with self.lock:
                self.ended = True
                futures = list(self.waiting.values())
                self.waiting.clear()
            for future in futures:
                future.end(Gone(str(error)))

    def submit(self, kind, offset=0, length=0, data=b"", flags=0):
        """Sends a request; the answer is awaited with the future's wait()."""
        future = Future(length if kind == READ else 0)
        with self.lock:
            if self.ended:
                raise Gone("the connection has ended")
            self.cookie += 1
            self.waiting[self.cookie] = future
            header = struct.pack(
                ">IHHQQI", 0x25609513, flags, kind, self.cookie, offset, length
            )
        try:
            self.socket.sendall(header + data)
        except OSError as error:
            future.end(Gone(str(error)))
        return future

    def read(self, offset, length):
        """Bytes of the device."""
        return self.submit(READ, offset, length).wait()

    def write(self, offset, data, flags=0):
        """Writes and waits."""
        self.submit(WRITE, offset, len(data), data, flags).wait()

    def flush(self):
        """Waits until everything answered is on stable storage."""
        self.submit(FLUSH).wait()

    def trim(self, offset, length):
        """Discards."""
        self.submit(TRIM, offset, length).wait()

    def zero(self, offset, length, flags=0):
        """Writes zeroes."""
        self.submit(WRITE_ZEROES, offset, length, flags=flags).wait()

    def close(self):
        """Leaves in an orderly way."""
        try:
            self.socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, DISCONNECT, 0, 0, 0))
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.socket.close()
        self.taker.join(5)
