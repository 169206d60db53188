"""Networks that fail: the daemon on one host, its peers on others, and links between them that are cut.

Hosts are network namespaces (`netns.py`). After each cut: every request has been answered within the
deadline, what was acknowledged is there, the member comes back by what it missed, and in the end all
copies are the same.
"""

import json
import threading
import time
from types import SimpleNamespace

import nbd
from harness import BLOCK, BUSY, FAILED, MIB, REFUSED, Load, Model, check, until
from netns import (
    DATA_RESET, DATA_SILENT, RESET, SILENT, UNREACHABLE, Far, Network, longer_than,
)

SIZE = 16 * MIB
BLOCKS = SIZE // BLOCK
DEADLINE = 1
OPTIONS = ("--deadline", str(DEADLINE), "--returns", "60")
# What a busy machine adds to the deadline, at the most.
SLACK = 1


def _pair(area, options=OPTIONS):
    """A disk here, and one of another host: the mirror of both runs."""
    network = Network(area)
    here, there = network.host(), network.host()
    link = network.link(here, there)
    here.becomes(area)
    far, local = Far(area, there), area.file("local.img")
    far.start()
    members = [local, link.address(there)]
    area.ctl("create", "m", *(word for at in members for word in ("--member", at)), "--size", "16M")
    area.start(members, options=options)
    return SimpleNamespace(network=network, here=here, there=there, link=link, far=far, local=local,
                           peer=members[1], members=members, model=Model(BLOCKS), options=options)


def _are(area, *states):
    until(lambda: area.states() == list(states), f"states are not {states}")


def _is_back(area):
    """By itself, and by delta."""
    _are(area, "in-sync", "in-sync")
    resync = area.status()["last-resync"]
    check(resync["kind"] == "delta" and resync["finished"], f"{resync}")


def _in_time(load, errors=0):
    limit = DEADLINE + SLACK
    check(load.longest < limit, f"a request took {load.longest:.2f} s, the deadline is {DEADLINE} s")
    check(load.errors <= errors, f"{load.errors} requests failed")


def _are_alike(area, pair):
    """What was acknowledged is there, and both copies hold it."""
    with area.client() as client:
        pair.model.check(client)
    area.stop()
    pair.far.stop()
    said = area.ctl("check", pair.local, pair.far.backing)
    check("nothing is wrong" in said, said)
    area.compare([pair.local, pair.far.backing])


def a_silent_link_costs_the_deadline(area):
    """Under load, in each direction alone: nobody waits for longer."""
    pair = _pair(area)
    for towards in (pair.there, pair.here):
        with Load(area, pair.model) as load:
            load.goes_on()
            pair.link.cut(SILENT, towards)
            _are(area, "in-sync", "faulty")
            load.goes_on()
            pair.link.mend()
            _is_back(area)
            load.goes_on()
        _in_time(load)
    _are_alike(area, pair)


def a_link_that_refuses_costs_no_more(area):
    """Resets; a cable that is out."""
    pair = _pair(area)
    for how in (RESET, "cable"):
        with Load(area, pair.model) as load:
            load.goes_on()
            if how == "cable":
                pair.link.pull(pair.here)
            else:
                pair.link.cut(how)
            _are(area, "in-sync", "faulty")
            load.goes_on()
            pair.link.plug(pair.here)
            pair.link.mend()
            _is_back(area)
            load.goes_on()
        _in_time(load)
    _are_alike(area, pair)


def a_short_cut_is_noticed_by_nobody(area):
    """Whatever becomes of the connection: no member is lost, and what was asked is answered once."""
    pair = _pair(area, ("--deadline", "5"))
    events = area.status()["event-count"]
    with area.client() as client:
        # Its server knows nothing of the connection any more, and whoever waits is not told.
        pair.link.cut(DATA_RESET, pair.here)
        data = pair.model.issue(7)
        future = client.submit(nbd.WRITE, 7 * BLOCK, BLOCK, data)
        pair.link.until_caught()
        pair.link.mend()
        future.wait()
        pair.model.answered(7)
    check(area.status()["event-count"] == events, "a member was lost")
    with Load(area, pair.model) as load:
        # Not RESET: where no server seems to be, a member is lost at once.
        for how in (SILENT, UNREACHABLE, DATA_SILENT, DATA_RESET):
            for towards in (None, pair.here, pair.there):
                load.goes_on(20)
                pair.link.cut(how, towards)
                pair.link.until_caught()
                pair.link.mend()
        load.goes_on(200)
    check(load.errors == 0 and load.longest < 5, f"{load.errors} errors, {load.longest:.2f} s")
    check(area.status()["event-count"] == events, "a member was lost")
    _are_alike(area, pair)


def a_flush_in_a_cut_costs_the_deadline(area):
    """Nothing but a flush and a FUA write is under way; what the daemon itself writes meanwhile adds
    nothing to it."""
    deadline = 2
    pair = _pair(area, ("--deadline", str(deadline), *OPTIONS[2:]))
    with area.client() as client:
        pair.model.load(client, area.random, writes=300)
        pair.link.cut(SILENT, pair.there)
        flush = client.submit(nbd.FLUSH)
        pair.model.write(client, 77, flags=nbd.FUA)
        flush.wait()
        took = time.monotonic() - flush.began
        check(took < deadline + SLACK, f"it took {took:.2f} s")
        check(area.states() == ["in-sync", "faulty"], f"{area.states()}")
        pair.link.mend()
        _is_back(area)
    _are_alike(area, pair)


class _Aside(threading.Thread):
    """A command that runs beside the test: `said()` waits for its end."""

    def __init__(self, command, *words, **keywords):
        super().__init__(daemon=True)
        self.command, self.words, self.keywords = command, words, keywords
        self.began, self.took, self.result, self.trouble = time.monotonic(), None, None, None
        self.start()

    def run(self):
        try:
            self.result = self.command(*self.words, **self.keywords)
        except Exception as trouble:  # said() raises it
            self.trouble = trouble
        self.took = time.monotonic() - self.began

    def said(self):
        """What it has returned."""
        self.join(120)
        if self.trouble is not None:
            raise self.trouble
        return self.result


def a_cut_while_connecting(area):
    """A return whose connection is not answered; a start, silent and refused."""
    pair = _pair(area)
    with Load(area, pair.model, depth=2) as load:
        load.goes_on()
        pair.link.cut(RESET)
        _are(area, "in-sync", "faulty")
        pair.link.cut(SILENT)
        pair.link.until_caught()
        load.goes_on()
        pair.link.mend()
        _is_back(area)
    _in_time(load)
    area.stop()
    for how in (RESET, UNREACHABLE, "cable"):
        if how == "cable":
            pair.link.pull(pair.here)
        else:
            pair.link.cut(how)
        starts = _Aside(area.start, pair.members, code=REFUSED)
        check("may hold newer data" in starts.said(), starts.said())
        check(starts.took < 3, f"a start took {starts.took:.1f} s to be refused")
        pair.link.plug(pair.here)
        pair.link.mend()
    pair.link.cut(SILENT)
    starts = _Aside(area.start, pair.members, options=OPTIONS)
    pair.link.until_caught()
    pair.link.mend()
    starts.said()
    check(area.states() == ["in-sync", "in-sync"], f"{area.states()}")
    _are_alike(area, pair)


def a_cut_in_the_handshake(area):
    """The greeting, the client's options, its claim do not arrive, or are answered with a reset."""
    pair = _pair(area, ("--deadline", str(DEADLINE)))
    with Load(area, pair.model, depth=2) as load:
        for towards, how in ((pair.here, DATA_SILENT), (pair.there, DATA_SILENT),
                             (pair.there, longer_than(100)), (pair.there, DATA_RESET)):
            load.goes_on()
            area.pull(1)
            pair.link.cut(how, towards)
            code = FAILED if how == DATA_RESET else 0
            returns = _Aside(area.ctl, "re-add", "m", pair.peer, code=code)
            pair.link.until_caught()
            if code:
                said = returns.said()
                check(pair.peer in said, f"not said who cannot be reached: {said}")
            pair.link.mend()
            returns.said()
            if code:
                area.ctl("re-add", "m", pair.peer)
            area.ctl("wait", "m", "--timeout", 90)
            _is_back(area)
    _in_time(load)
    _are_alike(area, pair)


def _timed_write(area, pair, number):
    """One write and a flush, within the deadline."""
    began = time.monotonic()
    with area.client() as client:
        pair.model.write(client, number)
        client.flush()
    took = time.monotonic() - began
    check(took < DEADLINE + SLACK, f"it took {took:.2f} s")


def a_cut_in_a_resync(area):
    """It is given up with the member, begins again when the link is back, and ends."""
    pair = _pair(area, (*OPTIONS, "--resync-floor", "1", "--resync-ceiling", "4"))
    missed = 2048
    area.pull(1)
    with area.client() as client:
        for begin in range(0, missed, 256):
            pair.model.write(client, begin, 256)
        # What is not flushed when a member is lost is missed by it once more.
        client.flush()
    area.ctl("re-add", "m", pair.peer)

    def copied():
        resync = area.status()["resync"]
        return resync and resync["copied-bytes"] >= MIB

    until(copied, "nothing is copied")
    pair.link.cut()
    _timed_write(area, pair, 1500)
    _are(area, "in-sync", "faulty")
    left = area.status()["members"][1]["missed-bytes"]
    check(left <= missed * BLOCK, f"{left} bytes are missed")
    pair.link.mend()
    _is_back(area)
    resync = area.status()["last-resync"]
    check(resync["copied-bytes"] <= left, f"{left} bytes were missed: {resync}")
    _are_alike(area, pair)


def a_cut_in_a_scrub(area):
    """The pass loses the member as any request does, goes on, and finds nothing that is not so."""
    pair = _pair(area)
    with area.client() as client:
        for begin in range(0, BLOCKS, 256):
            pair.model.write(client, begin, 256)
    area.stop()
    area.start(pair.members, options=(*pair.options, "--scrub-ceiling", "8"))

    def scrub():
        return json.loads(area.ctl("scrub", "status", "m", "--json"))

    area.ctl("scrub", "start", "m")
    until(lambda: scrub()["pass"] and scrub()["pass"]["member-bytes"] > 2 * MIB, "nothing is scrubbed")
    pair.link.cut()
    # A pass waits for extents that are written to cool: nothing is written.
    with area.client() as client:
        began = time.monotonic()
        client.read(0, MIB)
        took = time.monotonic() - began
    check(took < DEADLINE, f"it took {took:.2f} s")
    _are(area, "in-sync", "faulty")
    check(scrub()["state"] == "running", "the pass has ended already")
    pair.link.mend()
    until(lambda: scrub()["passes"], "the pass does not end")
    _is_back(area)
    done = scrub()["passes"][0]
    check(done["findings"] == 0 and done["ending"] == "complete", f"{done}")
    _are_alike(area, pair)


def a_stop_in_a_cut(area):
    """It ends, without the member; who is here starts alone then, and the other one comes back."""
    pair = _pair(area)
    with area.client() as client:
        pair.model.load(client, area.random, writes=300)
    pair.link.cut()
    stops = _Aside(area.stop)
    stops.said()
    check(stops.took < 2 * (DEADLINE + SLACK), f"a stop took {stops.took:.1f} s")
    area.start([pair.local], options=OPTIONS)
    _timed_write(area, pair, 99)
    pair.link.mend()
    area.stop()
    # Its server has heard of no end.
    area.start(pair.members, options=(*OPTIONS, "--take-over"))
    resync = area.put_back(pair.peer)
    check(resync["kind"] == "delta", f"{resync}")
    _are_alike(area, pair)


def killed_on_either_side(area):
    """The server under load; the daemon under load; the daemon while nobody can tell its server."""
    pair = _pair(area)
    with Load(area, pair.model) as load:
        load.goes_on()
        pair.far.kill()
        _are(area, "in-sync", "faulty")
        load.goes_on()
        pair.far.start()
        resync = area.put_back(pair.peer)
        check(resync["kind"] == "delta", f"{resync}")
        load.goes_on()
    _in_time(load)
    with area.client() as client:
        pair.model.load(client, area.random, writes=800, depth=32, meanwhile=area.kill_daemons)
    area.start(pair.members, options=OPTIONS)
    check(area.states() == ["in-sync", "in-sync"], f"{area.states()}")

    def cut_and_kill():
        pair.link.cut()
        area.kill_daemons()

    with area.client() as client:
        pair.model.check(client)
        pair.model.load(client, area.random, writes=800, depth=32, meanwhile=cut_and_kill)
    pair.link.mend()
    # Its server has heard of no end, and lets nobody in who does not say that there is one.
    said = area.start(pair.members, options=OPTIONS, code=(0, BUSY))
    if area.daemons() == []:
        check("--take-over" in said, said)
        area.start(pair.members, options=(*OPTIONS, "--take-over"))
    check(area.states() == ["in-sync", "in-sync"], f"{area.states()}")
    area.wait_equal()
    _are_alike(area, pair)


def promoted_while_neither_sees_the_other(area):
    """Refused without force; then both have gone on, which is shown and ended when they meet."""
    pair = _pair(area)
    other = pair.far.host
    theirs = Model(BLOCKS)
    with area.client() as client:
        pair.model.load(client, area.random, writes=300)
        client.flush()
        theirs.latest = list(pair.model.latest)
        theirs.legal = [set(legal) for legal in pair.model.legal]
        pair.link.cut()
        acked = pair.model.load(client, area.random, writes=100)
        check(acked == 100, f"{acked} of 100 writes were acknowledged")
    pair.far.stop()
    said = other.promote([pair.far.backing], code=REFUSED)
    check("may hold newer data" in said, said)
    other.promote([pair.far.backing], options=["--force", "--reason", "A does not answer"])
    with other.client() as client:
        theirs.check(client)
        theirs.load(client, area.random, writes=100)
    other.stop()
    pair.far.start()
    pair.link.mend()
    until(lambda: "somebody else has gone on with it" in area.log(), "nothing is said of it")
    said = area.ctl("re-add", "m", pair.peer, code=REFUSED)
    check("split brain" in said and "mirrorctl resolve" in said, said)
    with area.client() as client:
        pair.model.check(client)
    area.stop()
    said = area.ctl("resolve", "m", *pair.members)
    check("split brain" in said and "A does not answer" in said, said)
    area.ctl("resolve", "m", pair.local, "--keep", pair.peer, "--front", "nbd")
    area.ctl("wait", "m", "--timeout", 90)
    check(area.status()["last-resync"]["kind"] == "delta", f"{area.status()}")
    pair.model = theirs
    _are_alike(area, pair)
