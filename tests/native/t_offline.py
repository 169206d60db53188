"""check and repair on the members that a real daemon has written."""

import json

from harness import BLOCK, BUSY, EXTENT, MIB, Model, check

SIZE = 64 * MIB
PER_EXTENT = EXTENT // BLOCK
MENDABLE, DAMAGED = 10, 13


def _written(area, members=2):
    """A running mirror with data in extents 0, 1 and 9: paths and model."""
    paths = area.make(members=members)
    model = Model(SIZE // BLOCK)
    with area.client() as client:
        for extent in (0, 1, 9):
            for begin in range(0, PER_EXTENT, 256):
                model.write(client, extent * PER_EXTENT + begin, 256)
        client.flush()
    return paths, model


def _document(area, command, paths, code=0):
    """The document of a command that ends with this code; the sentence follows it."""
    said = area.ctl("--json", command, *paths, code=code)
    return json.JSONDecoder().raw_decode(said)[0]


def _change(area, path, number):
    """Changes one byte of a block."""
    at = area.examine(path)["data-offset"] + number * BLOCK + area.random.randrange(BLOCK)
    with open(path, "r+b") as file:
        file.seek(at)
        before = file.read(1)[0]
        file.seek(at)
        file.write(bytes([before ^ 1 << area.random.randrange(8)]))


def _verified(area, paths, model):
    """A start on the members shows what was written, and nothing is found afterwards."""
    area.start(paths)
    with area.client() as client:
        model.check(client)
    area.wait_equal()
    area.stop()
    area.ctl("check", *paths)
    area.compare(paths)


def check_refuses_a_running_mirror(area):
    """Its members, and one that it has let go of."""
    paths, model = _written(area)
    for command in ("check", "repair"):
        said = area.ctl(command, *paths, code=BUSY)
        check("in use" in said, f"not said that it is in use: {said}")
    area.pull(1)
    for command in ("check", "repair"):
        said = area.ctl(command, paths[1], code=BUSY)
        check("mirrorctl stop m" in said, f"not said what to do: {said}")
    area.put_back(paths[1])
    area.stop()
    document = _document(area, "check", paths)
    check(document["blocks"]["checked"] == 3 * PER_EXTENT, f"checked {document['blocks']}")
    _verified(area, paths, model)


def check_finds_nothing_after_a_kill(area):
    """Under load, again and again: what a crash leaves is no damage, before and after a repair."""
    paths, model = _written(area, members=3)
    for _ in range(4):
        with area.client() as client:
            model.load(client, area.random, seconds=1, meanwhile=area.kill_daemons)
        for command in ("check", "repair", "check"):
            document = _document(area, command, paths)
            check(document["mirror"]["last-stop"] == "unclean", "the stop was clean")
            check(document["extents"]["hot"] > 0, "no extent is hot")
        area.start(paths)
        with area.client() as client:
            model.check(client)
    area.wait_equal()
    area.stop()
    _verified(area, paths, model)


def repair_heals_what_was_changed(area):
    """Bytes changed on either member, found and healed; on both, found and left."""
    paths, model = _written(area)
    area.stop()
    # Whatever checksums the daemon did not store are filled in.
    area.ctl("repair", *paths)
    document = _document(area, "check", paths)
    check(document["blocks"]["without-checksum"] == 0, "a checksum is not known")
    numbers = area.random.sample(range(PER_EXTENT), 60)
    for index, number in enumerate(numbers):
        _change(area, paths[index % 2], number)
    document = _document(area, "check", paths, code=MENDABLE)
    counts = document["counts"]
    check(counts == {"checksum-failed": 60}, f"found {counts}")
    document = _document(area, "repair", paths)
    check(document["mended"] == 60, f"mended {document['mended']}")
    _verified(area, paths, model)
    _change(area, paths[0], numbers[0])
    _change(area, paths[1], numbers[0])
    for command in ("check", "repair", "check"):
        document = _document(area, command, paths, code=DAMAGED)
        found = [(f["kind"], f["offset"]) for f in document["findings"]]
        check(found == [("damaged", numbers[0] * BLOCK)], f"found {found}")
