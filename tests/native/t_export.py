"""Our own export server: one fenced writer, take-overs, stock clients, hostile ones."""

import contextlib
import os
import shutil
import socket
import subprocess

import nbd
from harness import (
    BLOCK, BUSY, FAILED, MIB, NOT_FOUND, REFUSED, USAGE, CannotRun, Failed, Model, check,
)
from servers import Exported, Nbdkit, free_port

BLOCKS = 64 * MIB // BLOCK


def _make(area, *members, options=()):
    """Creates and starts a mirror; its model."""
    words = [word for member in members for word in ("--member", member)]
    area.ctl("create", "m", *words, "--size", "64M")
    area.start(members, options=options)
    check(set(area.states()) == {"in-sync"}, f"states are {area.states()}")
    return Model(BLOCKS)


def _fenced_pair(area, tcp=False):
    """A local member and one of our server, and a model of their mirror, which runs."""
    local, server = area.file("local.img"), Exported(area, "peer", tcp=tcp)
    server.start()
    return local, server, _make(area, local, server.address)


@contextlib.contextmanager
def _second_host(area):
    """What is done within is done by another host: nothing is known of the first one's mirrors."""
    first, area.run_dir = area.run_dir, area.path / "second"
    try:
        yield
    finally:
        area.kill_daemons()
        area.run_dir = first


def _qemu_io(server, *commands, options=(), ok=True):
    if shutil.which("qemu-io") is None:
        raise CannotRun("qemu-io is not installed")
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(["qemu-io", "-f", "raw", *options, *words, server.address], capture_output=True,
                          text=True, timeout=60, check=False)
    said = done.stdout + done.stderr
    check((done.returncode == 0) == ok, f"qemu-io ended with {done.returncode}: {said}")
    return said


def stock_clients_use_an_export(area):
    """qemu-io and a plain client; the last one that begins to write is the writer."""
    server = Exported(area, "disk", tcp=True, options=["--any-writer"])
    server.start()
    _qemu_io(server, "write -P 1 0 1M", "write -f -P 2 1M 64k", "write -z 2M 1M", "discard 4M 1M",
             "flush", "read -P 1 0 1M", "read -P 2 1M 64k", "read -P 0 2M 1M")
    with nbd.Client(server.where, "m") as first:
        first.write(0, b"a" * BLOCK)
        with nbd.Client(server.where, "m") as second:
            check(second.read(0, BLOCK) == b"a" * BLOCK, "another session reads something else")
            first.write(0, b"b" * BLOCK, nbd.FUA)
            second.write(BLOCK, b"c" * BLOCK)
            try:
                first.write(0, b"d" * BLOCK)
                raise Failed("two sessions write")
            except nbd.Gone:
                pass
            check(second.read(0, 2 * BLOCK) == b"b" * BLOCK + b"c" * BLOCK, "a write is lost")
    server.stop()
    with open(server.backing, "rb") as file:
        check(file.read(2 * BLOCK) == b"b" * BLOCK + b"c" * BLOCK, "the file has not what was read")


def who_does_not_claim_may_look(area):
    """Without --any-writer a stock client reads; mirrorctl examines; nothing is written."""
    local, server, model = _fenced_pair(area)
    check(area.examine(server.address)["slot"] == 1, "its superblock is not shown")
    _qemu_io(server, "read 0 64k", options=["-r"])
    _qemu_io(server, "write 0 4k", ok=False)
    with nbd.Client(server.where, "m") as client:
        check(client.flags & nbd.FLAG_READ_ONLY, "it is not called read-only")
        try:
            client.write(32 * MIB, b"x" * BLOCK)
            raise Failed("who has not claimed writes")
        except nbd.Refused as refused:
            check(refused.args == (nbd.EPERM,), f"refused with {refused}")
    with area.client() as client:
        model.load(client, area.random, writes=500)
        model.check(client)
    check(area.states() == ["in-sync", "in-sync"], f"states are {area.states()}")
    area.stop()
    area.compare([local, server.backing])


def a_crash_needs_nobody_while_the_server_lives(area):
    """The daemon dies under load: the server that had its session has ended it, and says so (R13)."""
    local, server, model = _fenced_pair(area, tcp=True)
    check(not area.status()["members"][1]["unfenced"], "it is called unfenced")
    lines = area.ctl("status", "m").splitlines()
    check(any(server.address in line and line.endswith("  fenced") for line in lines),
          f"it is not called fenced: {lines}")
    for _ in range(3):
        with area.client() as client:
            model.load(client, area.random, writes=1500, depth=32, meanwhile=area.kill_daemons)
        area.start([local, server.address])
        check(area.states() == ["in-sync", "in-sync"], f"states are {area.states()}")
        with area.client() as client:
            area.wait_equal()
            model.check(client)
    with area.client() as client:
        area.pull(0)
        model.check(client)
        area.put_back(local)
    area.stop()
    area.compare([local, server.backing])


def another_server_needs_the_operators_word(area):
    """One that was started since, or is none of ours, does not know what became of the writes."""
    local, server, model = _fenced_pair(area)
    stock = Nbdkit(area, "stock")
    os.unlink(stock.backing)
    os.symlink(server.backing, stock.backing)

    def crashed_then(meets):
        with area.client() as client:
            model.load(client, area.random, writes=500, depth=32, meanwhile=area.kill_daemons)
        if server.group:
            server.stop()
        meets.start()
        said = area.start([local, meets.address], code=REFUSED)
        check("--peer-sessions-over" in said, f"the option is not named: {said}")
        area.start([local, meets.address], options=("--peer-sessions-over",))
        check(area.states() == ["in-sync", "in-sync"], f"states are {area.states()}")
        with area.client() as client:
            area.wait_equal()
            model.check(client)

    crashed_then(server)
    crashed_then(stock)
    with area.client() as client:
        model.load(client, area.random, writes=500, depth=32, meanwhile=area.kill_daemons)
    stock.kill()
    server.start()
    said = area.start([local, server.address], code=REFUSED)
    check("still be writing" in said, f"not said what it is about: {said}")
    area.start([local, server.address], options=("--peer-sessions-over",))
    with area.client() as client:
        model.check(client)
    area.stop()
    # After a clean stop any server will do.
    server.stop()
    server.start()
    area.start([local, server.address])
    area.stop()
    area.compare([local, server.backing])


def a_second_host_does_not_write_beside_the_first(area):
    """By mistake it is refused; told to take over it does, and the first host loses the member."""
    local, server, model = _fenced_pair(area)
    with area.client() as client:
        model.load(client, area.random, writes=500)
        with _second_host(area):
            options = ("--force",)
            said = area.start([server.address], options=options, code=BUSY)
            check("in use by session" in said, f"not said that it is in use: {said}")
            check("--take-over" in said, f"the way out is not named: {said}")
            area.ctl("destroy", server.address, "--force", code=BUSY)
        check(area.states() == ["in-sync", "in-sync"], f"states are {area.states()}")

        def take_over():
            with _second_host(area):
                area.start([server.address], options=(*options, "--take-over"))
                states = area.states()
                check(states[1] == "in-sync", f"the second host has {states}")
                with area.client() as other:
                    for number in range(64):
                        other.write(number * BLOCK, b"B" * BLOCK)
                        got = other.read(number * BLOCK, BLOCK)
                        check(got == b"B" * BLOCK, "a late write of the first host is there")
                # It has come so far, and does not end cleanly.

        acked = model.load(client, area.random, writes=3000, depth=32, meanwhile=take_over)
        check(acked == 3000, f"{acked} of 3000 writes were acknowledged")
        check(area.states() == ["in-sync", "faulty"], f"states are {area.states()}")
        model.check(client)
        said = area.ctl("re-add", "m", server.address, code=REFUSED)
        check("split brain" in said.lower(), f"not said what it is: {said}")
    area.stop()


def a_stopped_mirror_has_let_go_of_its_exports(area):
    """Who is told that it has stopped can start it on another host, at once."""
    local, server, _ = _fenced_pair(area)
    for _ in range(5):
        area.stop()
        after = area.examine(server.address)
        with nbd.Client(server.where, "m", claim=nbd.claim(1, False, after)) as client:
            check(not client.flags & nbd.FLAG_READ_ONLY, "who was granted may not write")
        area.start([local, server.address])


def an_older_epoch_is_refused(area):
    """Claims by hand, of what the disk said before and after a loss."""
    local, server, model = _fenced_pair(area)
    before = area.examine(server.address)
    with area.client() as client:
        area.pull(0)
        model.load(client, area.random, writes=100)
    area.stop()
    after = area.examine(server.address)
    check(before["epoch"] != after["epoch"], "the epoch is the same")

    def refused(seen, why):
        try:
            nbd.Client(server.where, "m", claim=nbd.claim(1, True, seen))
            raise Failed("the claim was granted")
        except nbd.Refused as said:
            check(why in said.args[1], f"{why!r} is not in {said.args[1]!r}")

    refused(before, "older")
    refused(None, "look again")
    other = dict(after, epoch={"id": "0" * 31 + "1"})
    refused(other, "split brain")
    with nbd.Client(server.where, "m", claim=nbd.claim(1, False, after)) as client:
        check(not client.flags & nbd.FLAG_READ_ONLY, "who was granted may not write")
        client.write(99 * MIB, b"x" * BLOCK)
        refused(before, "older")
        client.write(99 * MIB, b"y" * BLOCK)
    area.start([server.address])
    with area.client() as client:
        model.check(client)
        area.put_back(local)
    area.stop()
    area.compare([local, server.backing])


def a_disk_in_use_is_not_exported(area):
    """Nor used while it is exported; and not beyond this machine unless asked for."""
    paths = area.make()
    words = ["export", paths[0], "--listen", f"unix:{area.file('s')}"]
    said = area.ctl(*words, code=BUSY)
    check(paths[0] in said and "in use" in said, f"not said: {said}")
    area.stop()
    server = Exported(area, "peer")
    os.replace(paths[0], server.backing)
    server.start()
    area.start([server.backing, paths[1]], code=(BUSY, REFUSED, FAILED))
    again = ["export", server.backing, "--listen", f"unix:{area.file('s')}"]
    area.ctl(*again, code=BUSY)
    area.ctl("export", paths[1], "--listen", f"unix:{server.socket}", code=BUSY)
    said = area.ctl("export", paths[1], "--listen", f"0.0.0.0:{free_port()}", code=REFUSED)
    check("--tls" in said and "--plain-text-on-network" in said, f"not said: {said}")
    area.ctl("export", paths[1], "--listen", "nowhere", code=USAGE)
    area.ctl("export", area.file("none"), "--listen", "127.0.0.1:0", code=NOT_FOUND)
    area.ctl("export", server.address, "--listen", "127.0.0.1:0", code=USAGE)
    area.start([server.address, paths[1]])
    check(area.states() == ["in-sync", "in-sync"], f"states are {area.states()}")


def hostile_clients_cost_nobody_else(area):
    """Garbage, silence in crowds, and one that takes no replies, beside a mirror at work."""
    local, server, model = _fenced_pair(area, tcp=True)

    def connect():
        return socket.create_connection(server.where, 30)

    with area.client() as client, contextlib.ExitStack() as crowd:
        slow = crowd.enter_context(connect())
        slow.recv(18)
        slow.sendall(b"\0\0\0\3IHAVEOPT\0\0\0\7\0\0\0\6\0\0\0\0\0\0")
        read = b"\x25\x60\x95\x13" + bytes(4) + bytes(16) + b"\0\4\0\0"
        slow.settimeout(1)
        with contextlib.suppress(OSError):
            for _ in range(100_000):
                slow.sendall(read * 100)
        for _ in range(40):
            # Each is held open; the server makes room.
            crowd.enter_context(connect())
        for _ in range(20):
            with connect() as other, contextlib.suppress(OSError):
                other.sendall(area.random.randbytes(4096))
                while other.recv(4096):
                    pass
        acked = model.load(client, area.random, writes=2000, depth=32)
        check(acked == 2000, f"{acked} of 2000 writes were acknowledged")
        model.check(client)
        check(area.states() == ["in-sync", "in-sync"], f"states are {area.states()}")
        area.examine(server.address)
        with open(f"/proc/{server.process.pid}/status", encoding="utf-8") as status:
            peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
        check(peak < 160 << 10, f"it has used {peak} KiB")
    area.stop()
    area.compare([local, server.backing])


def a_server_that_is_stopped_comes_back(area):
    """SIGTERM under load, then SIGKILL: the member is lost, and returns as a delta."""
    local, server, model = _fenced_pair(area)
    with area.client() as client:
        for end in (server.stop, server.kill):
            model.load(client, area.random, writes=2000, depth=32, meanwhile=end)
            check(area.states() == ["in-sync", "faulty"], f"states are {area.states()}")
            server.start()
            resync = area.put_back(server.address)
            check(resync["kind"] == "delta", f"a {resync['kind']} resync: {resync['reason']}")
        area.pull(0)
        model.check(client)
        area.put_back(local)
    area.stop()
    server.stop()
    check(not os.path.exists(server.socket), "its socket is still there")
    area.compare([local, server.backing])
