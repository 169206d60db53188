"""The main job: create, write, lose a member, get it back, stop, start, verify."""

import os
import subprocess
import time

import nbd
from harness import BLOCK, EXTENT, MIB, REFUSED, CannotRun, Failed, Model, check, until

BLOCKS = 64 * MIB // BLOCK


def write_stop_start_verify(area):
    """What was written is there after a stop, on all members."""
    paths = area.make()
    model = Model(BLOCKS)
    with area.client() as client:
        check(client.size == 64 * MIB, f"the device has {client.size} bytes")
        wanted = nbd.FLAG_FLUSH | nbd.FLAG_FUA | nbd.FLAG_TRIM | nbd.FLAG_WRITE_ZEROES
        check(client.flags & wanted == wanted, f"the server offers only {client.flags:#x}")
        model.load(client, area.random, writes=2000)
        model.write(client, 100, 64, nbd.FUA)
        client.flush()
        model.check(client)
    area.stop()
    check(area.examine(paths[0])["last-stop"] == "clean", "the stop was not recorded as clean")
    area.compare(paths)
    area.start(paths)
    check(area.states() == ["in-sync", "in-sync"], f"states are {area.states()}")
    with area.client() as client:
        model.check(client)


def members_are_found_again(area):
    """A start without paths, and assemble --scan, find the members."""
    paths = area.make()
    area.stop()
    area.ctl("start", "m", "--front", "nbd")
    area.stop()
    os.mkdir(area.file("moved"))
    for path in paths:
        os.rename(path, os.path.join(area.file("moved"), os.path.basename(path)))
    area.ctl("assemble", "--scan", area.file("moved"), "--front", "nbd")
    check(area.states() == ["in-sync", "in-sync"], f"states are {area.states()}")


def delta_copies_what_changed(area):
    """1,000 random 4 KiB writes while a member is away: 3.9 MiB are copied, not more."""
    paths = area.make(size="256M")
    model = Model(256 * MIB // BLOCK)
    with area.client() as client:
        for begin in range(0, 32 * 1024, 256):
            model.write(client, begin, 256)
        client.flush()
        area.pull(1)
        changed = area.random.sample(range(32 * 1024), 1000)
        for number in changed:
            model.write(client, number)
        check(area.status()["members"][1]["missed-bytes"] == 1000 * BLOCK, "missed is not exact")
        resync = area.put_back(paths[1])
        check(resync["kind"] == "delta", f"a {resync['kind']} resync: {resync['reason']}")
        moved = resync["copied-bytes"] + resync["zeroed-bytes"]
        check(
            1000 * BLOCK <= moved <= 1.05 * 1000 * BLOCK,
            f"{moved} bytes were copied for {1000 * BLOCK} changed",
        )
        model.check(client)
    area.stop()
    area.compare(paths)


def pulled_and_put_back_under_load(area):
    """A member goes and comes back while writes are under way; copied stays near changed."""
    paths = area.make()
    model = Model(BLOCKS)
    with area.client() as client:
        model.load(client, area.random, writes=4000)
        model.load(client, area.random, writes=3000, depth=32, meanwhile=lambda: area.pull(0))
        check(area.states() == ["faulty", "in-sync"], f"states are {area.states()}")

        def back():
            area.ctl("re-add", "m", paths[0])

        model.load(client, area.random, writes=3000, depth=32, meanwhile=back)
        area.ctl("wait", "m", "--timeout", 90)
        check(area.status()["last-resync"]["kind"] == "delta", "not a delta")
        model.check(client)
    area.stop()
    area.compare(paths)


def extents_first_used_meanwhile(area):
    """Extents first written, and discarded ones, while a member is away are right on it later."""
    paths = area.make()
    model = Model(BLOCKS)
    per_extent = EXTENT // BLOCK
    with area.client() as client:
        model.write(client, 5 * per_extent, 256)
        client.flush()
        area.pull(1)
        model.write(client, 2 * per_extent + 7)
        client.trim(5 * EXTENT, EXTENT)
        for number in range(5 * per_extent, 6 * per_extent):
            model.legal[number] = {0}
        area.put_back(paths[1])
        model.check(client)
    area.stop()
    area.start(paths)
    with area.client() as client:
        model.check(client)
        area.pull(0)
        model.check(client)


def a_new_disk_takes_an_empty_slot(area):
    """A full resync copies the written extents only, and the new member alone has all."""
    paths = area.make(size="256M")
    model = Model(256 * MIB // BLOCK)
    with area.client() as client:
        for begin in range(0, 2048, 256):
            model.write(client, begin, 256)
        area.pull(1)
        fresh = area.file("fresh.img")
        with open(fresh, "wb") as file:
            file.truncate(os.path.getsize(paths[1]))
        area.ctl("add", "m", fresh, "--dry-run")
        check(area.states() == ["in-sync", "faulty"], "--dry-run did something")
        area.ctl("add", "m", fresh)
        area.ctl("wait", "m", "--timeout", 90)
        resync = area.status()["last-resync"]
        moved = resync["copied-bytes"] + resync["zeroed-bytes"]
        check(resync["kind"] == "full", f"a {resync['kind']} resync")
        check(moved <= 3 * EXTENT, f"{moved} bytes were copied for two written extents")
        area.pull(0)
        model.check(client)


def three_members(area):
    """Two of three may go; the last one serves all."""
    paths = area.make(members=3)
    model = Model(BLOCKS)
    with area.client() as client:
        model.load(client, area.random, writes=500)
        area.pull(0)
        model.load(client, area.random, writes=500)
        area.pull(2)
        model.load(client, area.random, writes=500)
        model.check(client)
        for path in (paths[2], paths[0]):
            # One at a time: while one is resyncing the mirror takes no other.
            area.ctl("re-add", "m", path)
            until(lambda: area.status()["state"] != "resyncing", "the resync does not end", 60)
        area.ctl("wait", "m", "--timeout", 90)
        model.check(client)
    area.stop()
    area.compare(paths)


def the_last_member_is_not_failed(area):
    """The last in-sync member stays."""
    area.make()
    area.pull(0)
    area.ctl("fail", "m", 1, code=REFUSED)
    check(area.states() == ["faulty", "in-sync"], f"states are {area.states()}")


def sectors_zeroes_and_discards(area):
    """512-byte writes, write-zeroes and discards of odd ranges read back right."""
    paths = area.make(options=("--logical-block", "512"))
    size = 16 * MIB
    image = bytearray(size)
    with area.client() as client:
        for _ in range(300):
            offset = area.random.randrange(size // 512) * 512
            length = min(area.random.choice([512, 1024, 3584, 4096, 66048]), size - offset)
            action = area.random.randrange(10)
            if action < 7:
                data = area.random.randbytes(512) * (length // 512)
                client.write(offset, data)
                image[offset:offset + length] = data
            else:
                client.zero(offset, length, area.random.choice([0, nbd.NO_HOLE, nbd.FUA]))
                image[offset:offset + length] = bytes(length)
        check(client.read(0, size) == image, "the device differs from what was written")
        client.trim(0, 2 * EXTENT)
        got = client.read(0, size)
        check(got[2 * EXTENT:] == image[2 * EXTENT:], "a discard changed what it did not name")
        check(not any(got[:2 * EXTENT]), "discarded extents do not read as zeroes")
        client.write(512, b"x" * 512)
        got = client.read(0, EXTENT)
        check(got[:512] + got[1024:] == bytes(EXTENT - 512), "old data after a discard")
        for offset, length in [(client.size, 512), (client.size - 512, 1024), (256, 512)]:
            future = client.submit(nbd.READ, offset, length)
            try:
                future.wait()
            except nbd.Refused as error:
                check(error.args[0] in (nbd.EINVAL, nbd.ENOSPC), f"error {error.args[0]}")
            else:
                if offset != 256:
                    raise Failed(f"a read of {length} bytes at {offset} was answered")
    area.stop()
    area.compare(paths)


def a_tool_of_others_reads_and_writes(area):
    """qemu-io and fio with verify, over the unix socket; TCP where it was asked for."""
    paths = area.make()
    area.stop()
    area.start(paths, options=("--nbd-tcp", "127.0.0.1:0"))
    uri = f"nbd+unix:///?socket={area.run_dir}/m.nbd"
    _tool(area, "qemu-io", "-f", "raw", uri, "-c", "write -P 7 1M 64k", "-c", "flush",
          "-c", "read -P 7 1M 64k")
    if "nbd" not in _tool(area, "fio", "--enghelp"):
        raise CannotRun("fio was built without its nbd engine")
    _tool(area, "fio", "--name=v", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bs=4k",
          "--iodepth=16", "--size=32m", "--verify=crc32c", "--do_verify=1", "--eta=never")
    area.stop()
    area.compare(paths)


def _tool(area, *command):
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False,
                              cwd=area.path)
    except FileNotFoundError as error:
        raise CannotRun(f"{command[0]} is not installed") from error
    check(done.returncode == 0, f"{command[0]} failed: {done.stdout[-800:]}{done.stderr[-800:]}")
    return done.stdout


def without_root(area):
    """All of it works for a user who is not root, given a run directory."""
    if os.geteuid() == 0:
        os.chmod(area.path, 0o777)
        area.wrapper = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    paths = area.make()
    model = Model(BLOCKS)
    if os.geteuid() == 0:
        check(os.stat(paths[0]).st_uid == 65534, "the test did not give up being root")
    with area.client() as client:
        model.load(client, area.random, writes=300)
        area.pull(1)
        model.load(client, area.random, writes=100)
        area.put_back(paths[1])
        model.check(client)
    area.stop()
    area.compare(paths)


def idle_extents_cool(area):
    """About ten seconds after the last write no extent is hot."""
    area.make()
    model = Model(BLOCKS)
    with area.client() as client:
        model.load(client, area.random, writes=100)
        check(area.status()["extents"]["hot"] > 0, "no extent is hot after writes")
        began = time.monotonic()
        until(lambda: area.status()["extents"]["hot"] == 0, "extents stay hot", 40)
        check(time.monotonic() - began > 3, "extents were cooled while they were in use")
        model.check(client)


def a_huge_mirror_starts_at_once(area):
    """12 TiB on sparse files take I/O, redundantly, within a second of the start."""
    began = time.monotonic()
    paths = area.make(size="12T")
    with area.client() as client:
        client.write(11 << 40, b"far" + bytes(4093))
        took = time.monotonic() - began
        check(client.read(11 << 40, BLOCK)[:3] == b"far", "the end of the device was lost")
    check(area.states() == ["in-sync", "in-sync"], f"states are {area.states()}")
    # A second is what the bench asks of a quiet machine; a busy one gets five.
    check(took < 5, f"create, start and the first write took {took:.1f} s")
    area.stop()
    area.start(paths)
