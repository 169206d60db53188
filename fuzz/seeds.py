#!/usr/bin/env python3
"""Make seeds for the fuzz targets from a real mirror and real clients.

Usage: fuzz/seeds.py BINARIES FOLDER

BINARIES holds mirrorctl and ublk-mirror; qemu-io and qemu-img are the NBD clients. A mirror of
two image files is created, written, loses a member and gets it back, and is stopped; meanwhile
its superblocks and map sectors are copied, and what clients send is recorded. Then mirrorctl
looks at exports of nbdkit and qemu-nbd, and what these send is recorded too. For each target
FOLDER/TARGET gets files that `cargo fuzz cmin` can then thin out. Needs no root.
"""

import glob
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time

COPIES, MAPS = (4096, 12288), (12288, 2 << 20)
SECTOR = 512


class Proxy:
    """Listens on one unix socket, forwards to another, and keeps what went each way."""

    def __init__(self, path, target):
        self.target, self.sent, self.received = target, [], []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            client, _ = self.listener.accept()
            server = socket.socket(socket.AF_UNIX)
            server.connect(self.target)
            for source, sink, log in ((client, server, self.sent),
                                      (server, client, self.received)):
                log.append(bytearray())
                threading.Thread(target=_copy, args=(source, sink, log[-1]), daemon=True).start()


def _copy(source, sink, log):
    while data := source.recv(1 << 16):
        log += data
        sink.sendall(data)
    try:
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # the other side was quicker


class Seeds:
    """Files for each target, each content once."""

    def __init__(self, folder):
        self.folder, self.known = folder, set()

    def add(self, target, content):
        """Keeps an input."""
        if not content or (target, bytes(content)) in self.known:
            return
        self.known.add((target, bytes(content)))
        os.makedirs(f"{self.folder}/{target}", exist_ok=True)
        name = f"{self.folder}/{target}/real-{len(self.known):03}"
        with open(name, "wb") as file:
            file.write(content)

    def add_member(self, path):
        """Superblocks and a few map sectors of each kind."""
        with open(path, "rb") as file:
            image = file.read(MAPS[1])
        self.add("superblock", image[slice(*COPIES)].rstrip(b"\0"))
        for at in range(MAPS[0], MAPS[1], SECTOR):
            sector = image[at:at + SECTOR]
            is_first_position = sector[6] == 4 and not any(sector[8:12])
            if sector[4:6] != b"UM" or not (any(sector[32:]) or is_first_position):
                continue
            kind = bytes([sector[6] - 1])
            address = kind + sector[7:8] + sector[8:12] + sector[12:16]
            self.add("map_sector", address + (4000).to_bytes(4, "little") + sector.rstrip(b"\0"))

    def add_stream(self, stream, size):
        """An NBD connection: its negotiation, and its requests without the data of reads."""
        at = 4
        while stream[at:at + 8] == b"IHAVEOPT":
            at += 16 + int.from_bytes(stream[at + 12:at + 16], "big")
        self.add("nbd_negotiation", stream[:at])
        for block in (b"\0", b"\1"):
            self.add("nbd_request", (size // SECTOR).to_bytes(8, "little") + block
                     + stream[at:at + (16 << 10)])


    def add_server(self, stream):
        """What an NBD server has sent: its part of the handshake, and each way to answer."""
        at, kind = 18, 0
        while kind != 1 and kind < 1 << 31 and len(stream) >= at + 20:
            kind = int.from_bytes(stream[at + 12:at + 16], "big")
            at += 20 + int.from_bytes(stream[at + 16:at + 20], "big")
        self.add("peer_handshake", stream[:at])
        if len(stream) >= at + 16:
            reply = bytes(stream[at:at + 16])
            ask = b"\x00\x00\x10"
            self.add("peer_reply", ask + b"\x01" + reply)
            self.add("peer_reply", ask * 2 + b"\x01" + reply + b"\x01" + reply)


def look_at_servers(binaries, area, seeds):
    """Exports good and bad, as mirrorctl meets them."""
    disk, real = f"{area}/export", f"{area}/server"
    with open(disk, "wb") as file:
        file.truncate(64 << 20)
    nbdkit = ["nbdkit", "-f", "-U", real]
    servers = [
        [*nbdkit, "file", disk],
        [*nbdkit, "-r", "file", disk],
        [*nbdkit, "--filter=blocksize-policy", "memory", "64M", "blocksize-minimum=4096",
         "blocksize-preferred=64K", "blocksize-maximum=1M"],
        [*nbdkit, "--filter=exportname", "memory", "1M", "exportname-strict=true",
         "exportname=other"],
        ["qemu-nbd", "-t", "-f", "raw", "-x", "m", "-k", real, disk],
        ["qemu-nbd", "-t", "-f", "raw", "-x", "other", "-D", "a disk", "-k", real, disk],
    ]
    for number, command in enumerate(servers):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
            while not os.path.exists(real):
                time.sleep(0.05)
            proxy = Proxy(f"{area}/seen{number}", real)
            address = f"nbd+unix:///m?socket={area}/seen{number}"
            subprocess.run([f"{binaries}/mirrorctl", "examine", address], check=False)
            server.kill()
        if os.path.exists(real):
            os.unlink(real)
        for stream in proxy.received:
            seeds.add_server(bytes(stream))


def main():
    """One mirror's life."""
    binaries, folder = sys.argv[1:]
    seeds = Seeds(folder)
    with tempfile.TemporaryDirectory(prefix="mirror-") as area:
        real, seen = f"{area}/real", f"{area}/seen"
        os.mkdir(seen, 0o700)
        members = [f"{area}/disk{slot}" for slot in range(2)]

        def ctl(run_dir, *words):
            subprocess.run([f"{binaries}/mirrorctl", *words, "--run-dir", run_dir], check=False,
                           stdout=subprocess.DEVNULL)

        def keep_members():
            for member in members:
                seeds.add_member(member)

        size = 64 << 20
        subprocess.run([f"{binaries}/mirrorctl", "create", "m", "--member", members[0],
                        "--member", members[1], "--size", str(size)], check=True)
        keep_members()
        ctl(real, "start", "m", *members, "--front", "nbd")
        control = [path for path in glob.glob(f"{real}/m.*") if path.endswith((".sock", ".ctl"))]
        control = Proxy(f"{seen}/{os.path.basename(control[0])}", control[0])
        nbd = Proxy(f"{seen}/m.nbd", f"{real}/m.nbd")
        address = f"nbd+unix:///?socket={seen}/m.nbd"
        subprocess.run(["qemu-img", "info", address], check=True, stdout=subprocess.DEVNULL)

        def write(*commands):
            words = [word for command in commands for word in ("-c", command)]
            subprocess.run(["qemu-io", "-f", "raw", *words, address], check=True,
                           stdout=subprocess.DEVNULL)

        write("write 0 4k", "write -f 4M 4k", "write -z 8M 64k", "write -zu 9M 64k",
              "discard 0 4k", "flush", "read 0 4k", "read 63M 4k")
        keep_members()
        for words in (["status"], ["fail", "m", "1"], ["status"], ["remove", "m", members[1]]):
            ctl(seen, *(words if len(words) > 1 else [*words, "m"]))
        write("write 12M 8k", "write 40M 4k", "flush")
        keep_members()
        for words in (["re-add", "m", "absent"], ["add", "m", members[1], "--dry-run"],
                      ["re-add", "m", members[1], "--full", "--dry-run"], ["status", "m"],
                      ["re-add", "m", members[1]], ["wait", "m", "--timeout", "60"],
                      ["remove", "m", "1", "--force"], ["clear-flush-error", "m"],
                      ["stop", "m"]):
            ctl(seen, *words)
            keep_members()
        for stream in nbd.sent:
            seeds.add_stream(bytes(stream), size)
        for line in control.sent:
            seeds.add("control_request", line)
        for line in control.received:
            seeds.add("control_reply", line)
        look_at_servers(binaries, area, seeds)


if __name__ == "__main__":
    main()
