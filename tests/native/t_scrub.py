"""Bytes that change under the daemon: a scrub finds them and heals them from the right side."""

import json
import xml.etree.ElementTree as ElementTree

import nbd
from harness import BLOCK, BUSY, EXTENT, NOT_FOUND, Model, check, until

SIZE = 64 << 20
PER_EXTENT = EXTENT // BLOCK
BY_COMMAND = ("--scrub-days", "0", "--check-reads", "scrub-only")


def _written(area, members=2, options=BY_COMMAND):
    """A mirror with cool data in extents 0, 1 and 9 that is served: paths and model."""
    paths = area.make(members)
    area.stop()
    model = Model(SIZE // BLOCK)
    # A clean stop cools what was written.
    area.start(paths, options=options)
    with area.client() as client:
        for extent in (0, 1, 9):
            for begin in range(0, PER_EXTENT, 256):
                model.write(client, extent * PER_EXTENT + begin, 256)
        client.flush()
    area.stop()
    area.start(paths, options=options)
    return paths, model


def _spoil(area, path, number, blocks=1):
    """Changes blocks of the device on one member, behind the daemon's back."""
    offset = area.examine(path)["data-offset"] + number * BLOCK
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(area.random.randbytes(blocks * BLOCK))


def _scrub(area):
    return json.loads(area.ctl("scrub", "status", "m", "--json"))


def _pass(area, *options):
    """A pass from begin to end: its document."""
    before = _scrub(area)["passes"][:1]
    number = before[0]["number"] if before else 0
    area.ctl("scrub", "start", "m", *options)

    def ended():
        passes = _scrub(area)["passes"]
        return passes and passes[0]["number"] > number and passes[0]

    return until(ended, "the pass does not end", 120)


def _findings(area):
    return json.loads(area.ctl("scrub", "report", "m", "--json"))["findings"]


def healed_from_the_right_side(area):
    """One block spoilt on each of three members: each is rewritten where it was spoilt."""
    paths, model = _written(area, members=3)
    spoilt = {0: 5, 1: PER_EXTENT + 7, 2: 9 * PER_EXTENT + 1023}
    for slot, number in spoilt.items():
        _spoil(area, paths[slot], number)
    done = _pass(area, "--check-only")
    check(done["findings"] > 0 and done["repaired-blocks"] == 0, f"the check says {done}")
    check(all(f["done"] == "check-only" for f in _findings(area)), f"{_findings(area)}")
    done = _pass(area)
    check(done["repaired-blocks"] == 3 and done["damaged-blocks"] == 0, f"the pass says {done}")
    mended = [f for f in _findings(area) if f["done"] == "rewritten"]
    where = {f["slot"]: f["offset"] // BLOCK for f in mended}
    check(where == spoilt, f"rewritten {where}, spoilt {spoilt}")
    check(all(f["what"] == "checksum-failed" for f in mended), f"{mended}")
    check([f["path"] for f in sorted(mended, key=lambda f: f["slot"])] == paths, f"{mended}")
    done = _pass(area)
    check(done["findings"] == 0, f"a second pass says {done}")
    said = area.ctl("status", "m")
    check("3 blocks repaired since creation" in said, said)
    with area.client() as client:
        model.check(client)
    area.stop()
    area.compare(paths)


def damaged_on_both_reads_as_an_error(area):
    """No copy fits: nothing is overwritten, it reads as an error, until it is written again."""
    paths, model = _written(area)
    number = PER_EXTENT + 100
    for path in paths:
        _spoil(area, path, number)
    done = _pass(area)
    check(done["damaged-blocks"] == 1 and done["repaired-blocks"] == 0, f"the pass says {done}")
    said = area.ctl("scrub", "report", "m")
    check("DAMAGED" in said and f"icheck {number}" in said, said)
    check("DAMAGED BLOCKS: 1" in area.ctl("status", "m"), "status does not say it")
    for again in (False, True):
        with area.client() as client:
            try:
                client.read(number * BLOCK, BLOCK)
                check(False, "damaged bytes were returned")
            except nbd.Refused:
                pass
            if again:
                model.write(client, number)
                model.check(client)
        if not again:
            # A start knows it again.
            area.stop()
            area.start(paths, options=BY_COMMAND)
            check(_scrub(area)["damaged-blocks"] == 1, f"{_scrub(area)}")
    check(_scrub(area)["damaged-blocks"] == 0, f"{_scrub(area)}")
    check(_findings(area)[-1]["done"] == "written-again", f"{_findings(area)}")


def over_the_error_budget(area):
    """A member that needs too much rewritten is failed, with the reason; the last is not."""
    options = (*BY_COMMAND, "--error-budget", "3/1")
    paths, model = _written(area, options=options)
    _spoil(area, paths[1], 10, 3)
    _pass(area)
    check(area.states() == ["in-sync", "in-sync"], f"{area.states()}")
    _spoil(area, paths[1], 20)
    _pass(area)
    until(lambda: area.states()[1] == "faulty", f"it is not failed: {area.states()}")
    reason = area.status()["members"][1]["reason"]
    check("error budget of 3" in reason, reason)
    with area.client() as client:
        model.check(client)
    area.put_back(paths[1])
    check(area.states() == ["in-sync", "in-sync"], f"{area.states()}")


def commands_and_restarts(area):
    """Pause outlives the daemon; so do the passes and what was found."""
    paths, _ = _written(area)
    _spoil(area, paths[0], 3)
    _pass(area)
    area.ctl("scrub", "cancel", "m", code=NOT_FOUND)
    area.ctl("scrub", "pause", "m")
    area.stop()
    area.start(paths, options=BY_COMMAND)
    status = _scrub(area)
    check(status["state"] == "paused" and status["kept"], f"{status}")
    check(len(status["passes"]) == 1 and status["totals"]["rewritten-blocks"] == 1, f"{status}")
    check(len(_findings(area)) == 1, f"{_findings(area)}")
    area.kill_daemons()
    area.start(paths, options=BY_COMMAND)
    check(_scrub(area)["totals"]["rewritten-blocks"] == 1, f"{_scrub(area)}")
    area.ctl("scrub", "resume", "m")
    check(_pass(area, "--days", 30)["findings"] == 0, "what is healed is found again")
    check(_scrub(area)["days"] == 30, f"{_scrub(area)}")


def a_pass_begins_by_itself(area):
    """Without a command, on a mirror that is written to."""
    paths, _ = _written(area, options=("--scrub-days", "1"))
    until(lambda: _scrub(area)["passes"], "no pass has begun and ended", 120)
    check(_scrub(area)["next-at-secs"] > 0, f"{_scrub(area)}")
    del paths


def the_map_is_a_picture(area):
    """In the terminal and as a file that a parser accepts."""
    paths, _ = _written(area)
    _spoil(area, paths[0], 3)
    for path in paths:
        _spoil(area, path, 9 * PER_EXTENT)
    _pass(area)
    text = area.ctl("scrub", "map", "m")
    check(all(len(line) <= 80 for line in text.splitlines()), text)
    check("+░·······X······" in text, text)
    file = area.file("map.svg")
    area.ctl("scrub", "map", "m", "--svg", file)
    root = ElementTree.parse(file).getroot()
    check(root.tag.endswith("svg"), root.tag)
    cells = json.loads(area.ctl("scrub", "map", "m", "--json"))
    check(sum(run["cells"] for run in cells["runs"]) == 16, f"{cells}")


def one_pass_at_a_time(area):
    """A check-only pass is not begun while a pass that repairs is under way."""
    paths, _ = _written(area, options=(*BY_COMMAND, "--scrub-ceiling", "1"))
    area.ctl("scrub", "start", "m")
    until(lambda: _scrub(area)["pass"], "the pass has not begun")
    area.ctl("scrub", "start", "m", "--check-only", code=BUSY)
    area.ctl("scrub", "cancel", "m")
    until(lambda: _scrub(area)["passes"][:1], "the pass is not cancelled")
    check(_scrub(area)["passes"][0]["ending"] == "cancelled", f"{_scrub(area)}")
    del paths
