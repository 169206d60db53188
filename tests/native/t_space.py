"""File systems under image files that run full (in memory, which only root can make)."""

import subprocess

import nbd
from harness import BLOCK, EXTENT, MIB, Model, check


def _make(area, paths):
    area.ctl("create", "m", "--member", paths[0], "--member", paths[1], "--size", "64M")
    area.start(paths)


def _fill(client, model, first, last):
    """Writes block runs until an error comes: the number of errors, which must be ENOSPC or EIO."""
    errors = 0
    for begin in range(first, last, 64):
        data = b"".join(model.issue(at) for at in range(begin, begin + 64))
        try:
            client.write(begin * BLOCK, data)
        except nbd.Refused as error:
            check(error.args[0] in (nbd.EIO, nbd.ENOSPC), f"error {error.args[0]}")
            errors += 1
            continue
        for at in range(begin, begin + 64):
            model.answered(at)
    return errors


def full_under_one_member(area):
    """That member is lost with the reason, nobody sees an error; with room it comes back."""
    place = area.mount(24)
    paths = [area.file("0.img"), str(place / "1.img")]
    _make(area, paths)
    model = Model(64 * MIB // BLOCK)
    with area.client() as client:
        errors = _fill(client, model, 0, 12 * EXTENT // BLOCK)
        check(errors == 0, f"{errors} writes failed although one member had room")
        check(area.states()[0] == "in-sync", f"states are {area.states()}")
        member = area.status()["members"][1]
        check(member["state"] == "faulty", f"the full member is {member['state']}")
        check("space" in member["reason"].lower(), f"the reason is: {member['reason']}")
        model.check(client)
        area.ctl("remove", "m", 1)
        _remount(place, 128)
        area.put_back(paths[1])
        model.check(client)
        area.pull(0)
        model.check(client)


def full_under_all_members(area):
    """The writer gets the error, nobody is dropped; what was acknowledged can be read."""
    place = area.mount(40)
    paths = [str(place / "0.img"), str(place / "1.img")]
    _make(area, paths)
    model = Model(64 * MIB // BLOCK)
    with area.client() as client:
        errors = _fill(client, model, 0, 12 * EXTENT // BLOCK)
        check(errors > 0, "no write failed on a full file system")
        check("in-sync" in area.states(), f"states are {area.states()}")
        model.check(client)
    area.kill_daemons()
    _remount(place, 256)
    area.start(paths)
    for slot, state in enumerate(area.states()):
        if state != "in-sync":
            area.put_back(paths[slot])
    with area.client() as client:
        area.ctl("clear-flush-error", "m", code=(0, 1, 3))
        model.check(client)
        check(_fill(client, model, 0, 12 * EXTENT // BLOCK) == 0, "writes fail although there is room")
        model.check(client)
    area.wait_equal()
    area.stop()
    area.compare(paths)


def full_at_creation(area):
    """No mirror and no file is left of a creation that did not fit."""
    place = area.mount(1)
    words = ["create", "x", "--member", area.file("a"), "--member", place / "b", "--size", "12T"]
    area.ctl(*words, code=(1, 3, 5))
    check(not (place / "b").exists(), "a useless file was left behind")


def _remount(place, mib):
    subprocess.run(["mount", "-o", f"remount,size={mib}m", str(place)], check=True)
