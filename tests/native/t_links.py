"""Connections to our own server that break, hang, and are taken up again."""

import time

import nbd
from harness import BLOCK, MIB, Host, Model, check, until
from servers import Between, Exported, Nbdkit

BLOCKS = 64 * MIB // BLOCK


def _mirror(area, server, options=()):
    """A local member and one behind a network that can be cut; the mirror runs."""
    local, between = area.file("local.img"), Between(area, server)
    server.start()
    area.ctl("create", "m", "--member", local, "--member", between.address, "--size", "64M")
    area.start([local, between.address], options=options)
    return local, between, Model(BLOCKS)


def _load(area, model, client, meanwhile, peer="in-sync", writes=600):
    """Every write is acknowledged, whatever happens to the peer, which is then in this state."""
    acked = model.load(client, area.random, writes=writes, depth=32, meanwhile=meanwhile)
    check(acked == writes, f"{acked} of {writes} writes were acknowledged")
    check(area.states() == ["in-sync", peer], f"states are {area.states()}")


def a_connection_that_breaks_is_taken_up_again(area):
    """Twenty times under load: nothing is lost, nobody notices, the member stays in-sync."""
    server = Exported(area, "peer")
    local, between, model = _mirror(area, server)
    with area.client() as client:
        for number in range(20):
            before = between.connections

            def breaks():
                between.cut(at_once=number % 3 != 0)
                between.mend()

            _load(area, model, client, breaks, writes=300)
            check(between.connections > before, "nothing was connected anew")
        client.flush()
        model.check(client)
        area.pull(0)
        model.check(client)
        area.put_back(local)
    area.stop()
    area.compare([local, server.backing])


def a_connection_is_not_taken_up_beside_another_writer(area):
    """Who has written in between is not written over: the member is lost instead."""
    server = Exported(area, "peer")
    local, between, model = _mirror(area, server)
    with area.client() as client:
        model.load(client, area.random, writes=200)
        seen = area.examine(server.address)

        def other_writes():
            between.cut()
            with nbd.Client(server.where, "m", claim=nbd.claim(7, True, seen)) as other:
                other.write(99 * MIB, b"x" * BLOCK)
            between.mend()

        _load(area, model, client, other_writes, "faulty")
        model.check(client)
        area.put_back(between.address)
        model.check(client)
    area.stop()
    area.compare([local, server.backing])


def a_server_that_was_started_anew_has_lost_its_cache(area):
    """The same, when it is back before the connection is."""
    server = Exported(area, "peer")
    local, between, model = _mirror(area, server)
    with area.client() as client:
        def restart():
            between.cut()
            server.kill()
            server.start()
            between.mend()

        _load(area, model, client, restart, "faulty")
        area.put_back(between.address)
        model.check(client)
    area.stop()
    area.compare([local, server.backing])


def a_connection_that_hangs_costs_the_deadline(area):
    """What was given up is not asked again when the network is back (R13)."""
    server = Exported(area, "peer")
    local, between, model = _mirror(area, server, options=("--deadline", "2"))
    with area.client() as client:
        _load(area, model, client, between.hold, "faulty")
        area.ctl("remove", "m", "1")
        between.cut(at_once=True)
        between.let_go()
        area.put_back(between.address)
        check(area.states() == ["in-sync", "in-sync"], f"states are {area.states()}")
        model.load(client, area.random, writes=300)
        model.check(client)
    area.stop()
    area.compare([local, server.backing])


def a_network_that_is_down_for_longer_costs_the_member(area):
    """Connecting goes on for the deadline, and no longer."""
    server = Exported(area, "peer")
    local, between, model = _mirror(area, server, options=("--deadline", "2"))
    with area.client() as client:
        _load(area, model, client, between.cut, "faulty", writes=300)
        between.mend()
        area.ctl("remove", "m", "1")
        area.put_back(between.address)
        model.check(client)
    area.stop()
    area.compare([local, server.backing])


def another_way_is_taken_when_one_fails(area):
    """Closed for good, or silent: no write waits for three seconds, none is lost."""
    server = Exported(area, "peer")
    other, elsewhere = Between(area, server, "other"), Exported(area, "elsewhere")
    elsewhere.start()
    # What another server exports is none of the ways, and is left alone.
    options = ("--path", elsewhere.address, "--path", other.address)
    local, between, model = _mirror(area, server, options=options)
    with area.client() as client:
        for trouble, way in ((between.cut, other), (other.hold, between), (between.hold, other)):
            before = way.connections
            between.mend()
            other.let_go()
            trouble()
            longest = 0
            for _ in range(500):
                began = time.monotonic()
                model.write(client, area.random.randrange(BLOCKS))
                longest = max(longest, time.monotonic() - began)
            check(longest < 3, f"a write took {longest:.1f} s")
            check(way.connections > before, "the other way was not taken")
            check(area.states() == ["in-sync", "in-sync"], f"states are {area.states()}")
        between.let_go()
        model.check(client)
        area.pull(0)
        model.check(client)
        area.put_back(local)
    area.stop()
    area.compare([local, server.backing])
    with nbd.Client(elsewhere.where, "m", claim=nbd.claim(1)) as client:
        check(client.read(0, BLOCK) == bytes(BLOCK), "another server's disk was written")


def an_unfenced_connection_is_not_taken_up_again(area):
    """A server of others cannot say what became of the old one."""
    server = Nbdkit(area, "peer")
    local, between, model = _mirror(area, server)
    with area.client() as client:
        def breaks():
            between.cut(at_once=True)

        _load(area, model, client, breaks, "faulty", writes=300)
        area.put_back(between.address)
        model.check(client)
    area.stop()
    area.compare([local, server.backing])


def _is_back(area):
    return area.states() == ["in-sync", "in-sync"]


def a_member_comes_back_when_its_network_does(area):
    """By itself, by what it missed; not when only the operator can know that it may."""
    server = Exported(area, "peer")
    local, between, model = _mirror(area, server, options=("--deadline", "1", "--returns", "3"))
    with area.client() as client:
        _load(area, model, client, between.cut, "faulty", writes=300)
        between.mend()
        until(lambda: _is_back(area), "it does not come back")
        check(area.status()["last-resync"]["kind"] == "delta", f"{area.status()}")
        model.check(client)
        # A server that was started anew may not be the only one there is.
        between.cut()
        server.kill()
        model.load(client, area.random, writes=50)
        check(area.states() == ["in-sync", "faulty"], f"states are {area.states()}")
        server.start()
        between.mend()
        until(lambda: "does not return by itself" in area.log(), "nothing is said of it")
        area.put_back(between.address)
        model.check(client)
    area.stop()
    area.compare([local, server.backing])


def a_network_that_comes_and_goes_is_damped(area):
    """So many returns a minute and no more."""
    server = Exported(area, "peer")
    local, between, model = _mirror(area, server, options=("--deadline", "1", "--returns", "2"))
    with area.client() as client:
        for _ in range(2):
            _load(area, model, client, between.cut, "faulty", writes=300)
            between.mend()
            until(lambda: _is_back(area), "it does not come back")
        _load(area, model, client, between.cut, "faulty", writes=300)
        between.mend()
        until(lambda: "has come back too often" in area.log(), "it is not held back")
        check(area.states() == ["in-sync", "faulty"], f"states are {area.states()}")
        area.put_back(between.address)
        model.check(client)
    area.stop()
    area.compare([local, server.backing])


def a_member_that_another_host_has_taken_over_is_left_to_it(area):
    """Who returns by itself looks first, and ends nobody's session."""
    server = Exported(area, "peer")
    local, between, model = _mirror(area, server, options=("--deadline", "1", "--returns", "3"))
    other = Host(area)
    with area.client() as client:
        model.load(client, area.random, writes=100)
        between.cut()
        other.promote([server.address], options=["--force", "--reason", "test", "--take-over"])
        _load(area, model, client, lambda: None, "faulty", writes=100)
        between.mend()
        until(lambda: "somebody else has gone on with it" in area.log(), "nothing is said of it")
        model.check(client)
    with other.client() as client:
        client.write(0, b"x" * BLOCK)
        client.flush()
    states = other.states()
    check(states == ["missing", "in-sync"], f"states there are {states}")
    area.stop()
    other.stop()
