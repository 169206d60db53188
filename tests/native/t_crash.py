"""Daemons that die, are asked to leave, or are started twice; members that come back too late."""

import os
import shutil
import signal
import time

from harness import BLOCK, BUSY, MIB, REFUSED, Model, check

BLOCKS = 64 * MIB // BLOCK


def _load_and_kill(area, model, number=signal.SIGKILL, depth=32):
    """Random writes until the daemon has got the signal in the middle of them."""
    [pid] = area.daemons()
    client = area.client()
    acked = model.load(
        client, area.random, writes=6000, depth=depth, meanwhile=lambda: os.kill(pid, number)
    )
    client.close()
    check(0 < acked < 6000, f"the daemon did not end under load ({acked} writes answered)")
    area.wait_for_end([pid])


def killed_under_load(area):
    """After SIGKILL, three times: what was acknowledged is there, and the copies become equal."""
    paths = area.make()
    model = Model(BLOCKS)
    for _ in range(3):
        _load_and_kill(area, model)
        area.start(paths)
        check(area.states() == ["in-sync", "in-sync"], f"states are {area.states()}")
        with area.client() as client:
            model.check(client)
            model.check(client)
    area.wait_equal()
    area.stop()
    area.compare(paths)


def killed_under_load_and_read_late(area):
    """Copies are made equal in the background although nobody reads."""
    paths = area.make()
    model = Model(BLOCKS)
    _load_and_kill(area, model)
    area.start(paths)
    area.wait_equal()
    area.stop()
    area.compare(paths)
    area.start(paths)
    with area.client() as client:
        model.check(client)


def killed_while_degraded(area):
    """SIGKILL while a member is away: it is put back by delta, with every acknowledged write."""
    paths = area.make()
    model = Model(BLOCKS)
    with area.client() as client:
        model.load(client, area.random, writes=2000)
        area.pull(1)
    _load_and_kill(area, model)
    area.start(paths)
    check(area.states() == ["in-sync", "faulty"], f"states are {area.states()}")
    with area.client() as client:
        resync = area.put_back(paths[1])
        check(resync["kind"] == "delta", f"a {resync['kind']} resync: {resync['reason']}")
        model.check(client)
        area.wait_equal()
        area.pull(0)
        model.check(client)
    area.stop()


def killed_while_resyncing(area):
    """SIGKILL soon after the re-add, under load: the resync is finished after the next start."""
    paths = area.make()
    model = Model(BLOCKS)
    with area.client() as client:
        for begin in range(0, BLOCKS, 256):
            model.write(client, begin, 256)
        area.pull(1)
        for begin in range(0, BLOCKS, 256):
            model.write(client, begin, 256)

        def killed():
            area.ctl("re-add", "m", paths[1])
            area.kill_daemons()

        model.load(client, area.random, writes=1500, depth=32, meanwhile=killed)
    area.start(paths)
    area.ctl("wait", "m", "--timeout", 90)
    with area.client() as client:
        model.check(client)
    area.wait_equal()
    area.stop()
    area.compare(paths)


def terminated_under_load(area):
    """SIGTERM is a clean stop, whatever is under way."""
    paths = area.make()
    model = Model(BLOCKS)
    _load_and_kill(area, model, signal.SIGTERM)
    for path in paths:
        check(area.examine(path)["last-stop"] == "clean", "SIGTERM left an unclean mirror")
    area.compare(paths)
    area.start(paths)
    with area.client() as client:
        model.check(client)


def a_second_daemon_is_refused(area):
    """By name, and with another run directory by the members themselves."""
    paths = area.make()
    said = area.start(paths, code=BUSY)
    check("already running" in said, f"not said why: {said}")
    first, area.run_dir = area.run_dir, area.path / "other"
    said = area.start(paths, code=BUSY)
    check("0.img" in said, f"the member is not named: {said}")
    area.run_dir = first
    with area.client() as client:
        client.write(0, bytes(BLOCK))
    check(area.states() == ["in-sync", "in-sync"], "the first daemon was disturbed")


def a_member_that_may_be_newer_is_waited_for(area):
    """No start without a member that was in-sync; --force does, and the other comes back."""
    paths = area.make()
    model = Model(BLOCKS)
    with area.client() as client:
        model.load(client, area.random, writes=500)
    area.stop()
    said = area.start(paths[:1], code=REFUSED)
    check("slot 1" in said and "--force" in said, f"the absent member is not named: {said}")
    area.start(paths[:1], options=("--force",))
    check(area.states() == ["in-sync", "missing"], f"states are {area.states()}")
    with area.client() as client:
        model.load(client, area.random, writes=200)
        resync = area.put_back(paths[1])
        check(resync["kind"] == "delta", f"a {resync['kind']} resync: {resync['reason']}")
        model.check(client)
    area.stop()
    area.compare(paths)


def a_stale_member_never_starts_alone(area):
    """The one that was lost first is not started alone, with both present it does not win."""
    paths = area.make()
    model = Model(BLOCKS)
    with area.client() as client:
        model.load(client, area.random, writes=300)
        area.pull(1)
        model.load(client, area.random, writes=300)
    area.stop()
    area.start(paths[1:], code=REFUSED)
    area.start(list(reversed(paths)))
    check(area.states() == ["in-sync", "faulty"], f"states are {area.states()}")
    with area.client() as client:
        model.check(client)
        area.put_back(paths[1])
        area.pull(0)
        model.check(client)


def split_brain_is_shown_and_not_decided(area):
    """Both members went on alone, by force: refused with both histories."""
    paths = area.make()
    area.stop()
    ours = Model(BLOCKS)
    for path in paths:
        area.start([path], options=("--force",))
        with area.client() as client:
            (ours if path == paths[0] else Model(BLOCKS)).load(client, area.random, writes=50)
        area.stop()
    said = area.start(paths, code=REFUSED)
    check("split brain" in said, f"not named a split brain: {said}")
    for path in paths:
        check(path in said, f"{path} is not named: {said}")
    area.start(paths[:1], options=("--force",))
    area.ctl("re-add", "m", paths[1], code=REFUSED)
    resync = area.put_back(paths[1], options=("--full",))
    check(resync["kind"] == "full", f"a {resync['kind']} resync")
    with area.client() as client:
        ours.check(client)
    area.stop()
    area.compare(paths)


def a_restored_backup_is_an_older_copy(area):
    """A member replaced by its copy of an hour ago gets a full resync and is never read."""
    paths = area.make()
    model = Model(BLOCKS)
    with area.client() as client:
        model.load(client, area.random, writes=300)
    area.stop()
    shutil.copyfile(paths[1], area.file("backup"))
    area.start(paths)
    with area.client() as client:
        began = time.monotonic()
        while time.monotonic() - began < 3:  # positions are recorded once a second
            model.load(client, area.random, writes=50)
    area.stop()
    shutil.copyfile(area.file("backup"), paths[1])
    said = area.ctl("check", *paths, code=11)
    check("cannot be used" in said and "older copy" in said, f"check says: {said}")
    area.start(paths)
    with area.client() as client:
        model.check(client)
        if area.states()[1] != "in-sync":
            area.put_back(paths[1], options=("--full",))
        resync = area.status()["last-resync"]
        check(resync and resync["kind"] == "full", f"not a full resync: {resync}")
        model.check(client)
        area.pull(0)
        model.check(client)


def a_clone_of_a_member_is_refused(area):
    """Two files with one member uuid: neither is used."""
    paths = area.make()
    area.stop()
    shutil.copyfile(paths[1], area.file("clone"))
    said = area.start([*paths, area.file("clone")], code=REFUSED)
    check("clone" in said and paths[1] in said, f"the two are not named: {said}")
    area.start(paths)
