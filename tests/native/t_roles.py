"""Two hosts and one mirror: handing over, promotion, split brain and its end.

Each host is an area with a run directory of its own. Host A serves the mirror from its own disk
and the export of B's; B is promoted from that disk.
"""

import json
import os

from harness import BLOCK, BUSY, MIB, REFUSED, USAGE, Host, Model, block, check
from servers import Exported, Nbdkit

SIZE = 64 * MIB
BLOCKS = SIZE // BLOCK


def _hosts(area, server_type=Exported):
    """The mirror runs on A, the area itself; its disk, B, and the server of B's disk."""
    other = Host(area)
    server = server_type(other, "disk")
    server.start()
    local = area.file("disk.img")
    area.ctl("create", "m", "--member", local, "--member", server.address, "--size", "64M")
    area.start([local, server.address])
    return local, other, server


def _export(host, path):
    """The export of a disk of `host`."""
    server = Exported(host, "export")
    server.backing = path
    server.start()
    return server


def _write(host, model, writes=200):
    with host.client() as client:
        model.load(client, host.random, writes=writes)
        client.flush()


def _check(host, model):
    with host.client() as client:
        model.check(client)


def a_mirror_is_handed_over_and_comes_back(area):
    """Demoted here, promoted there, without force; who was left behind gets what changed."""
    local, other, server = _hosts(area)
    model = Model(BLOCKS)
    _write(area, model)
    said = area.ctl("demote", "m")
    check("handed over to" in said and "promote" in said, said)
    # The host that has handed over does not start alone.
    said = area.start([local], code=REFUSED)
    check("may hold newer data" in said, said)
    server.stop()
    # Nothing but a promotion goes by it.
    said = other.start([server.backing], code=REFUSED)
    check("may hold newer data" in said, said)
    other.promote([server.backing])
    _check(other, model)
    _write(other, model, writes=50)
    back = _export(area, local)
    resync = other.put_back(back.address)
    check(resync["kind"] == "delta", f"{resync}")
    check(resync["copied-bytes"] <= 50 * BLOCK, f"{resync}")
    # And the other way round.
    other.ctl("demote", "m", "--to", "0")
    back.stop()
    said = area.ctl("promote", "m", local, "--front", "nbd")
    check("1 of 2" in said, said)
    _check(area, model)


def what_was_handed_over_is_not_when_both_have_started(area):
    """A start with everybody takes the permission away before it answers anything."""
    local, other, server = _hosts(area)
    model = Model(BLOCKS)
    _write(area, model)
    area.ctl("demote", "m")
    area.start([local, server.address])
    _write(area, model)
    area.kill_daemons()
    server.stop()
    said = other.promote([server.backing], code=REFUSED)
    check("may hold newer data" in said, said)


def a_promotion_needs_force_and_a_reason(area):
    """Nothing shows that the first host is gone; its member is not served without a word."""
    local, other, server = _hosts(area)
    model = Model(BLOCKS)
    _write(area, model)
    area.kill_daemons()
    said = other.promote([server.backing], code=(REFUSED, BUSY))
    check("in use" in said, said)
    server.stop()
    said = other.promote([server.backing], code=REFUSED)
    check("may hold newer data" in said, said)
    other.promote([server.backing], options=["--force"], code=USAGE)
    other.promote([server.backing], options=["--force", "--reason", "x" * 129], code=USAGE)
    other.promote([server.backing], options=["--reason", "without force"], code=USAGE)
    other.promote([server.backing], options=["--force", "--reason", "host A burnt"])
    _check(other, model)
    seen = other.examine(server.backing)
    check(seen["forced-reason"] == "host A burnt" and seen["forced-secs"] > 0, f"{seen}")
    # What the first host had under way is given up, and it comes back by itself knowing that.
    _write(other, model)
    resync = other.put_back(_export(area, local).address)
    check(resync["kind"] == "delta", f"{resync}")
    other.stop()


def a_split_brain_is_shown_and_ended(area):
    """Both went on alone; one is kept, the other's changes are saved, and only differences copied."""
    local, other, server = _hosts(area)
    both = Model(BLOCKS)
    _write(area, both)
    area.stop()
    server.stop()
    kept, lost = Model(BLOCKS), Model(BLOCKS)
    for model in (kept, lost):
        model.latest = list(both.latest)
        model.legal = [set(legal) for legal in both.legal]
    area.start([local], options=["--force"])
    _write(area, lost, writes=40)
    with area.client() as client:
        # In an extent that is in use on one side only.
        lost.write(client, BLOCKS - 1)
    area.stop()
    other.promote([server.backing], options=["--force", "--reason", "A is gone"])
    _write(other, kept, writes=40)
    back = _export(area, local)
    said = other.ctl("re-add", "m", back.address, code=REFUSED)
    check("split brain" in said and "mirrorctl resolve" in said, said)
    other.stop()
    said = other.start([server.backing, back.address], code=REFUSED)
    check("split brain" in said and "mirrorctl resolve" in said, said)
    said = other.ctl("resolve", "m", server.backing, back.address)
    check("split brain" in said and "A is gone" in said and "--keep" in said, said)
    sides = json.loads(other.ctl("--json", "resolve", "m", server.backing, back.address))
    check([side["slot"] for side in sides] == [1, 0], f"{sides}")
    check(all(side["changed-bytes"] >= 30 * BLOCK for side in sides), f"{sides}")
    saved = other.file("saved.img")
    said = other.ctl("resolve", "m", back.address, "--keep", server.backing, "--save", saved,
                     "--front", "nbd")
    check("saved.img" in said and "gives up" in said, said)
    check(os.stat(saved).st_size == SIZE and os.stat(saved).st_blocks * 512 < SIZE // 2, "not sparse")
    with open(saved, "rb") as file:
        file.seek(SIZE - BLOCK)
        check(file.read(BLOCK) == block(BLOCKS - 1, lost.latest[BLOCKS - 1]), "the lost change was not saved")
    other.ctl("wait", "m", "--timeout", 90)
    resync = other.status()["last-resync"]
    check(resync["kind"] == "delta" and resync["copied-bytes"] < SIZE // 2, f"{resync}")
    _check(other, kept)
    # What only the other side had in use is zero, also beside the first write to it.
    with other.client() as client:
        kept.write(client, BLOCKS - 2)
        kept.check(client)
        other.pull(1)
        kept.check(client)
        other.put_back(server.backing)
        client.flush()
    other.stop()
    other.compare([server.backing, local])


def nothing_is_handed_over_to_an_unfenced_server(area):
    """Nobody keeps an older session of it from writing."""
    local, _, server = _hosts(area, Nbdkit)
    said = area.ctl("demote", "m", code=REFUSED)
    check("cannot keep other writers away" in said, said)
    area.ctl("stop", "m")
    said = area.ctl("promote", "m", local, server.address, "--front", "nbd", code=REFUSED)
    check("promote with --force" in said, said)
    area.ctl("promote", "m", local, server.address, "--front", "nbd", "--force", "--reason", "seen")
    check(area.states() == ["in-sync", "in-sync"], f"{area.states()}")

