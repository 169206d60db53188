"""Members that cannot be used, and names and sizes that make no sense."""

import fcntl
import os
import socket
import subprocess

from harness import (BLOCK, BUSY, FAILED, MIB, NOT_FOUND, REFUSED, USAGE, CannotRun, Model, check)


def _file(area, name, mib=64, content=b""):
    path = area.file(name)
    with open(path, "wb") as file:
        file.write(content)
        file.truncate(mib * MIB)
    return path


def _create(area, first, second, *options, code):
    said = area.ctl("create", "x", "--member", first, "--member", second, *options, code=code)
    check(code == 0 or os.path.basename(second) in said, f"{second} is not named: {said}")
    return said


def _untouched(path, content):
    with open(path, "rb") as file:
        check(file.read(len(content)) == content, f"{path} was written to")


def a_missing_member(area):
    """Create without a size, start and re-add name the file that is not there."""
    good, absent = _file(area, "good"), area.file("absent")
    said = area.ctl("create", "x", "--member", good, "--member", absent, code=USAGE)
    check("--size" in said, f"not said that a size is needed: {said}")
    check("absent" in area.start([absent], code=NOT_FOUND), "the file is not named")
    paths = area.make()
    area.pull(1)
    check("absent" in area.ctl("re-add", "m", absent, code=NOT_FOUND), "the file is not named")
    area.stop()
    os.rename(paths[1], absent)
    area.start(paths, code=NOT_FOUND)
    area.start(paths[:1])


def a_member_too_small(area):
    """Below 16 MiB, below the size asked for, and as a new disk of a running mirror."""
    good, small = _file(area, "good"), _file(area, "small", 8)
    said = _expect_any(area, "create", "x", "--member", good, "--member", small)
    check("small" in said, f"the small file is not named: {said}")
    medium = _file(area, "medium", 32)
    said = _expect_any(area, "create", "x", "--member", good, "--member", medium, "--size", "60M")
    check("medium" in said, f"the small file is not named: {said}")
    area.make()
    area.pull(1)
    said = _expect_any(area, "add", "m", medium)
    check("medium" in said or "small" in said, f"not said what is wrong: {said}")


def _expect_any(area, *words):
    """The command fails, with any of the documented codes; what it said."""
    return area.ctl(*words, code=(FAILED, USAGE, REFUSED, NOT_FOUND, BUSY))


def a_read_only_member(area):
    """A file on a read-only file system is refused by create, start and re-add."""
    place = area.mount(256)
    names = [str(place / "ro0"), area.file("rw1")]
    for name in names:
        with open(name, "wb") as file:
            file.truncate(64 * MIB)
    area.ctl("create", "m", "--member", names[0], "--member", names[1])
    spare = str(place / "ro2")
    with open(spare, "wb") as file:
        file.truncate(64 * MIB)
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    check("ro2" in _expect_any(area, "create", "x", "--member", _file(area, "g"),
                               "--member", spare), "the read-only file is not named")
    check("ro0" in _expect_any(area, "start", "m", *names, "--front", "nbd"),
          "the read-only member is not named")
    area.start(names[1:], options=("--force",))
    check("ro0" in _expect_any(area, "re-add", "m", names[0]), "the read-only member is not named")
    check(area.states() == ["missing", "in-sync"], f"states are {area.states()}")


def a_foreign_member(area):
    """A file system is named and left alone; another mirror's member too; --force takes both."""
    good, ext4 = _file(area, "good"), _file(area, "ext4", 80)
    if subprocess.run(["mkfs.ext4", "-q", "-F", ext4], check=False).returncode != 0:
        raise CannotRun("mkfs.ext4 is missing")
    with open(ext4, "rb") as file:
        before = file.read(MIB)
    said = _create(area, good, ext4, code=REFUSED)
    check("ext4" in said, f"not said what it holds: {said}")
    _create(area, good, ext4, "--force", "--dry-run", code=0)
    _untouched(ext4, before)
    paths = area.make()
    said = area.ctl("add", "m", ext4, code=REFUSED)
    _untouched(ext4, before)
    area.pull(1)
    area.ctl("add", "m", ext4, code=REFUSED)
    _expect_any(area, "re-add", "m", ext4)
    _untouched(ext4, before)
    _create(area, good, paths[1], code=REFUSED)
    other = [area.file("o0"), area.file("o1")]
    area.ctl("create", "other", "--member", other[0], "--member", other[1], "--size", "64M")
    area.ctl("re-add", "m", other[0], code=REFUSED)
    area.ctl("add", "m", other[0], code=REFUSED)
    area.ctl("add", "m", ext4, "--force")
    area.ctl("wait", "m", "--timeout", 60)
    area.stop()
    said = area.start([paths[0], other[1]], code=REFUSED)
    check("different mirrors" in said, f"not said why: {said}")


def a_busy_member(area):
    """A file that another program has locked, and one of a running mirror."""
    good, busy = _file(area, "good"), _file(area, "busy")
    with open(busy, "r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        _create(area, good, busy, "--force", code=BUSY)
    paths = area.make()
    _create(area, good, paths[0], "--force", code=BUSY)
    check("0.img" in area.ctl("destroy", paths[0], "--force", code=BUSY),
          "the member is not named")
    area.stop()
    with open(paths[1], "r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        said = _expect_any(area, "start", "m", *paths, "--front", "nbd", "--deadline", "2")
        check("1.img" in said, f"the locked member is not named: {said}")
    area.start(paths)


def a_half_written_member(area):
    """A member cut short, and a creation that ended before the second superblock."""
    paths = area.make()
    model = Model(64 * MIB // BLOCK)
    with area.client() as client:
        model.load(client, area.random, writes=300)
    area.stop()
    whole = os.path.getsize(paths[1])
    os.truncate(paths[1], whole // 2)
    said = _expect_any(area, "start", "m", *paths, "--front", "nbd")
    check("1.img" in said, f"the member cut short is not named: {said}")
    area.start(paths[:1], options=("--force",))
    check("1.img" in _expect_any(area, "re-add", "m", paths[1]), "the member is not named")
    with area.client() as client:
        model.check(client)
    area.stop()
    os.truncate(paths[1], whole)

    half = [area.file("h0"), area.file("h1")]
    area.ctl("create", "h", "--member", half[0], "--member", half[1], "--size", "64M")
    with open(half[1], "r+b") as file:
        file.seek(4096)
        file.write(bytes(8192))
    said = _expect_any(area, "start", "h", *half, "--front", "nbd")
    check("h1" in said or "slot 1" in said, f"the half-made member is not named: {said}")


def names_and_sizes_that_make_no_sense(area):
    """Each is refused as a usage error, and no file is made."""
    members = ["--member", area.file("a"), "--member", area.file("b")]
    for name in ("", ".", "..", "a/b", "/", "x" * 65, "a b", "a\nb", "-x", "ü" * 40):
        area.ctl("create", "--size", "64M", *members, "--", name, code=USAGE)
    for size in ("0", "1", "4095", "-5", "10X", "1.0.0G", "2000P", "16E", "999999999999999999999G"):
        _expect_any(area, "create", "x", *members, f"--size={size}")
    for option in ("--logical-block=1024", "--logical-block=0", "--logical-block=x"):
        area.ctl("create", "x", *members, "--size", "64M", option, code=USAGE)
    nine = [word for n in range(9) for word in ("--member", area.file(f"n{n}"))]
    area.ctl("create", "x", *nine, "--size", "64M", code=USAGE)
    area.ctl("create", "x", *members[:2], "--size", "64M", code=USAGE)
    area.ctl("create", "x", *members[:2], *members[:2], "--size", "64M", code=USAGE)
    left = sorted(path.name for path in area.path.iterdir() if path.name != "run")
    check(not left, f"refused creations left files behind: {left}")
    area.ctl("status", "nobody", code=NOT_FOUND)
    paths = area.make()
    area.ctl("fail", "m", 7, code=NOT_FOUND)
    area.ctl("fail", "m", "/nowhere", code=NOT_FOUND)
    _expect_any(area, "re-add", "m", paths[0])
    check(area.states() == ["in-sync", "in-sync"], "a refused command did something")


def control_requests_that_make_no_sense(area):
    """Each is answered with an error or cut off, and the daemon goes on."""
    area.make()

    def ask(line):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(30)
            client.connect(str(area.run_dir / "m.sock"))
            try:
                client.sendall(line)
                client.shutdown(socket.SHUT_WR)
                return client.makefile("rb").read()
            except (BrokenPipeError, ConnectionResetError):
                return b""

    for line in (b"\n", b"{}\n", b"[" * 1000 + b"\n", b'{"request":"stop"}\n', b"\xff\n"):
        said = ask(line)
        check(b'"kind":"usage"' in said, f"{line[:30]} is answered with {said}")
    padding = b'{"request":"status","unknown":"%s"}\n'
    check(b'"reply":"status"' in ask(padding % (b"x" * 60_000)), "a long request is not answered")
    # Decoding takes many times a line's length of memory, so lines have a limit.
    check(ask(padding % (b"x" * 70_000)) == b"", "a request above the limit is answered")
    check(area.states() == ["in-sync", "in-sync"], "the daemon does not go on")


def destroy_wants_to_be_asked_twice(area):
    """A running mirror is not destroyed; a stopped one loses its superblocks only."""
    paths = area.make()
    _expect_any(area, "destroy", "m", "--force")
    area.stop()
    area.ctl("destroy", "m", "--dry-run")
    area.examine(paths[0])
    area.ctl("destroy", *paths, "--force")
    for path in paths:
        area.ctl("examine", path, code=NOT_FOUND)
