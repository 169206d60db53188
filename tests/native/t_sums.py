"""A scrub of a peer behind our own server moves checksums of its blocks, and not the data."""

import json

from harness import BLOCK, MIB, Model, check, until
from servers import Between, Exported, certificates

SIZE = 64 * MIB
PART = 256
BY_COMMAND = ("--scrub-days", "0", "--check-reads", "scrub-only")


def _pass(area, *options):
    """A pass from begin to end: its document."""
    def passes():
        return json.loads(area.ctl("scrub", "status", "m", "--json"))["passes"]

    number = max((done["number"] for done in passes()), default=0)
    area.ctl("scrub", "start", "m", *options)
    until(lambda: passes() and passes()[0]["number"] > number, "the pass does not end", 120)
    return passes()[0]


def _spoil(path, offset):
    """Changes one byte behind everybody's back."""
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def _full(area, server):
    """A local member and a peer, all written and cool: the local one's path, the network, the model."""
    local, between, model = area.file("local.img"), Between(area, server), Model(SIZE // BLOCK)
    server.start()
    members = [local, between.address]
    area.ctl("create", "m", *(word for at in members for word in ("--member", at)), "--size", "64M")
    area.start(members, options=BY_COMMAND)
    with area.client() as client:
        for begin in range(0, SIZE // BLOCK, PART):
            model.write(client, begin, PART)
        client.flush()
    # A clean stop cools what was written.
    area.stop()
    area.start(members, options=BY_COMMAND)
    return local, between, model


def a_scrub_of_a_peer_moves_checksums(area):
    """Less than 1 % of the data; and one byte that has changed, there or here, is found and healed."""
    _moves_checksums(area, Exported(area, "peer"))


def a_scrub_over_tls_moves_checksums(area):
    """The same, where both connections have TLS."""
    _moves_checksums(area, Exported(area, "peer", tcp=True, tls=certificates(area)))


def _moves_checksums(area, server):
    local, between, model = _full(area, server)
    data_offset = area.examine(local)["data-offset"]
    for options in (("--check-only",), ()):
        before = between.passed
        done = _pass(area, *options)
        moved = between.passed - before
        print(f"    {moved} bytes moved for {SIZE} on each member: {100 * moved / SIZE:.2f} %")
        check(done["findings"] == 0 and done["member-bytes"] == 2 * SIZE, f"the pass says {done}")
        check(moved < SIZE // 100, f"{moved} bytes were moved for {SIZE}")
    for slot, path, number in ((1, server.backing, 5000), (0, local, 9000)):
        _spoil(path, data_offset + number * BLOCK + 77)
        before = between.passed
        done = _pass(area)
        check((done["findings"], done["repaired-blocks"], done["damaged-blocks"]) == (1, 1, 0),
              f"the pass says {done}")
        found = json.loads(area.ctl("scrub", "report", "m", "--json"))["findings"][-1]
        check((found["slot"], found["offset"], found["done"]) == (slot, number * BLOCK, "rewritten"),
              f"found {found}")
        check(between.passed - before < 4 * MIB, "all was read over one block")
    check(_pass(area)["findings"] == 0, "something is left")
    with area.client() as client:
        model.check(client)
    area.stop()
    area.compare([local, server.backing])


def a_scrub_goes_on_without_checksums(area):
    """The second connection breaks: all is read, and nobody is lost."""
    server = Exported(area, "peer")
    local, between, model = _full(area, server)
    first = between.connections
    done = _pass(area)
    check(between.connections == first + 1, "there is no second connection")
    peer = area.status()["members"][1]
    check(not peer["scrub-reads-all"], f"checksums are to be had, and status says {peer}")
    # The newest one is that for checksums.
    between.cut_last()
    _spoil(server.backing, area.examine(local)["data-offset"] + 700 * BLOCK)
    before = between.passed
    done = _pass(area)
    check((done["findings"], done["repaired-blocks"]) == (1, 1), f"the pass says {done}")
    check(between.passed - before > SIZE // 2, "where do the checksums come from?")
    flags = [member["scrub-reads-all"] for member in area.status()["members"]]
    check(flags == [False, True], f"scrub-reads-all is {flags}")
    said = area.ctl("status", "m")
    check("  fenced; scrub reads all" in said, f"status does not say that all is read: {said}")
    check(area.states() == ["in-sync", "in-sync"], f"{area.states()}")
    with area.client() as client:
        model.check(client)
    area.stop()
    area.compare([local, server.backing])
