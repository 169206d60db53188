"""Damaged superblocks and map sectors: another copy serves, or it is said; never silence."""

import nbd
from harness import BLOCK, EXTENT, FAILED, MIB, NOT_FOUND, REFUSED, Model, check

SIZE = 64 * MIB
PER_EXTENT = EXTENT // BLOCK
COPIES = {"a": 4096, "b": 8192}


def _scribble(area, path, offset, length):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(area.random.randbytes(length))


def _regions(area, path, kind, slot=0):
    found = [r for r in area.examine(path)["regions"] if r["kind"] == kind and r["slot"] == slot]
    check(len(found) == 1, f"{len(found)} regions {kind} of slot {slot}")
    return found[0]


def _damage_map(area, path, kind, copies, slot=0):
    region = _regions(area, path, kind, slot)
    for copy in copies:
        _scribble(area, path, region[f"copy-{copy}"], region["len"])


def _written(area, options=()):
    """A mirror with data in extents 0, 1 and 9 that was stopped: paths and model."""
    paths = area.make(options=options)
    model = Model(SIZE // BLOCK)
    with area.client() as client:
        for extent in (0, 1, 9):
            for begin in range(0, PER_EXTENT, 256):
                model.write(client, extent * PER_EXTENT + begin, 256)
        client.flush()
    area.stop()
    return paths, model


def _verified(area, paths, model):
    check(area.states() == ["in-sync", "in-sync"], f"states are {area.states()}")
    with area.client() as client:
        model.check(client)
        model.load(client, area.random, writes=100)
    area.wait_equal()
    area.stop()
    area.compare(paths)


def one_superblock_copy(area):
    """Either copy, on one member or all: the other serves, and the damaged one is mended."""
    paths, model = _written(area)
    for copy, members in (("a", paths[:1]), ("b", paths[1:]), ("a", paths), ("b", paths)):
        for path in members:
            _scribble(area, path, COPIES[copy], 4096)
            check("valid" not in area.examine(path)[f"copy-{copy}"], "the damage is not shown")
        area.start(paths)
        _verified(area, paths, model)
        for path in members:
            check("valid" in area.examine(path)[f"copy-{copy}"], f"copy {copy} was not mended")


def both_superblock_copies(area):
    """On one member: refused with its name, and the other starts by force; on all: refused."""
    paths, model = _written(area)
    refusals = (FAILED, NOT_FOUND, REFUSED)
    for copy in "ab":
        _scribble(area, paths[1], COPIES[copy] + 100, 3000)
    said = area.ctl("examine", paths[1], code=FAILED)
    check("damaged" in said, f"not said that it is damaged: {said}")
    said = area.start(paths, code=refusals)
    check("1.img" in said, f"the damaged member is not named: {said}")
    area.start(paths[:1], options=("--force",))
    with area.client() as client:
        model.check(client)
    area.ctl("re-add", "m", paths[1], code=refusals)
    area.ctl("remove", "m", 1, code=(0, *refusals))
    area.ctl("add", "m", paths[1], "--force")
    area.ctl("wait", "m", "--timeout", 60)
    area.stop()
    for path in paths:
        for copy in "ab":
            _scribble(area, path, COPIES[copy] + 100, 3000)
    said = area.start(paths, code=refusals)
    check("img" in said, f"no member is named: {said}")


def a_torn_superblock_update(area):
    """Copy A is newer than copy B, and each half of A's update."""
    paths, model = _written(area)
    with open(paths[0], "rb") as file:
        file.seek(COPIES["a"])
        old = file.read(8192)
    area.start(paths)
    _verified(area, paths, model)
    with open(paths[0], "r+b") as file:
        file.seek(COPIES["b"])
        file.write(old[4096:])
    area.start(paths)
    _verified(area, paths, model)
    with open(paths[0], "r+b") as file:
        file.seek(COPIES["a"])
        file.write(old[:512])
    area.start(paths)
    _verified(area, paths, model)


def state_map_one_copy(area):
    """Each copy in turn, on both members: the other copy serves and the first is mended."""
    paths, model = _written(area)
    for copy in ("a", "b", "a"):
        for path in paths:
            _damage_map(area, path, "state", copy)
        area.start(paths)
        check(area.status()["extents"]["unwritten"] == 13, "extents are no longer unwritten")
        area.stop()
    area.start(paths)
    model_extents = area.status()["extents"]
    check(model_extents["unwritten"] == 13, f"extents: {model_extents}")
    _verified(area, paths, model)


def state_map_on_one_member(area):
    """Both copies on one member: taken from the other, whichever it is."""
    paths, model = _written(area)
    for path in paths:
        _damage_map(area, path, "state", "ab")
        area.start(paths)
        check(area.states() == ["in-sync", "in-sync"], f"states are {area.states()}")
        check(area.status()["extents"]["unwritten"] == 13, "extents are no longer unwritten")
        area.stop()
    area.start(paths)
    _verified(area, paths, model)


def state_map_everywhere(area):
    """Both copies on all: not started until --force; then the data are there."""
    paths, model = _written(area)
    for path in paths:
        _damage_map(area, path, "state", "ab")
    said = area.start(paths, code=3)
    check("--force" in str(said), f"the refusal does not say what to do: {said}")
    area.start(paths, options=("--force",))
    with area.client() as client:
        model.check(client)
    area.wait_equal()
    area.stop()
    area.compare(paths)


def _pulled_and_stopped(area):
    """Member 1 lacks 40 blocks; stopped: paths, model."""
    paths, model = _written(area)
    area.start(paths)
    with area.client() as client:
        area.pull(1)
        for number in area.random.sample(range(2 * PER_EXTENT), 40):
            model.write(client, number)
    area.stop()
    return paths, model


def _returned(area, paths, model):
    area.start(paths)
    with area.client() as client:
        resync = area.put_back(paths[1])
        model.check(client)
        area.pull(0)
        model.check(client)
    return resync["copied-bytes"] + resync["zeroed-bytes"]


def missed_map_one_copy(area):
    """One copy of the missed map and its summary: still exactly what changed is copied."""
    paths, model = _pulled_and_stopped(area)
    _damage_map(area, paths[0], "missed", "a", 1)
    _damage_map(area, paths[0], "summary", "b", 1)
    moved = _returned(area, paths, model)
    check(moved == 40 * BLOCK, f"{moved} bytes were copied for 40 blocks")


def missed_map_both_copies(area):
    """Both copies on the only member that has it: all is missed, so all written is copied."""
    paths, model = _pulled_and_stopped(area)
    _damage_map(area, paths[0], "missed", "ab", 1)
    moved = _returned(area, paths, model)
    check(moved >= 3 * EXTENT, f"only {moved} bytes were copied")


def missed_summary_both_copies(area):
    """Without its summary no page of the missed map can be taken as never written."""
    paths, model = _pulled_and_stopped(area)
    _damage_map(area, paths[0], "summary", "ab", 1)
    moved = _returned(area, paths, model)
    check(moved >= 40 * BLOCK, f"only {moved} bytes were copied")


def position_pages(area):
    """A damaged position page on one member: said or mended, and the data are right."""
    paths, model = _written(area)
    _damage_map(area, paths[1], "position", "a")
    area.start(paths)
    _verified(area, paths, model)
    _damage_map(area, paths[1], "position", "ab")
    area.start(paths)
    with area.client() as client:
        model.check(client)
        if area.states()[1] != "in-sync":
            area.put_back(paths[1], options=("--full",))
        model.check(client)
        area.pull(0)
        model.check(client)
