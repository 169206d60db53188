#!/usr/bin/env python3
"""Cuts the power of a recorded mirror at many moments, and checks what it is then.

Usage: tests/guest/power_cuts.py FOLDER

FOLDER holds what t_log_writes.sh left: a log of dm-log-writes for each member, and the kernel's
trace, whose numbers say what came before what on both. A moment is one at which a FUA write or a
flush ended on either member, or something was promised. On each member's image then is all that was durable; of what was
under way or in its volatile cache nothing (`strict`), or a lot drawn sector by sector (`lottery`).
A daemon is started on the images (here, over NBD: hundreds of starts would take hours in an
emulator), with both members or with one of them, and

- every block holds what was last promised, or what was written to it since; nothing else, and
  nothing that the disks held before there was a mirror;
- each in-sync member has all of that by itself;
- a member that has missed writes does not start alone;
- what has been read is not different later, and in the end the members are the same.

CUTS=N checks that many moments (default 150), SEED=N draws others. Prints `ok power_cuts` or
`not ok power_cuts`.
"""

import bisect
import functools
import mmap
import os
import random
import struct
import sys
import tempfile
import time
import traceback
from array import array
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "native"))

import harness
import promises

SECTOR = 512
MAGIC = 0x6A736677736872
SUPER = struct.Struct("<QQQI")
ENTRY = struct.Struct("<QQQQ")
FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8
NEVER = 1 << 62


class Io:
    """A write, flush or discard of one member's disk."""

    def __init__(self, flags, sector, count, queued):
        self.flags, self.sector, self.count, self.queued = flags, sector, count, queued
        self.completed = self.durable = NEVER
        self.data_at = None

    def key(self):
        """What the log and the trace both tell."""
        return (self.flags, self.sector, self.count)


class Trace:
    """The order of things: I/O of each member, promises and steps."""

    def __init__(self, path, devices):
        self.ios = [[], []]
        # (when, writer, steps of its plan that are promised)
        self.promises = []
        self.steps = {}
        open_ios = {}
        for line in path.read_text().splitlines():
            words = line.split()
            at = words.index(next(word for word in words if word.endswith(":") and word[0].isdigit()))
            when, event, rest = int(words[at][:-1]), words[at + 1], words[at + 2 :]
            if event == "tracing_mark_write:":
                if rest[0] == "step":
                    self.steps[rest[1]] = when
                else:
                    self.promises.append((when, int(rest[1]), int(rest[2])))
                continue
            flags = flags_of(rest[1])
            if flags is None:
                continue
            member = devices[rest[0]]
            key = (member, flags, int(rest[2]), int(rest[4]))
            if event == "block_bio_queue:":
                io = Io(*key[1:], when)
                self.ios[member].append(io)
                open_ios.setdefault(key, []).append(io)
            else:
                open_ios[key].pop(0).completed = when
                harness.check(rest[-1] == "[0]", f"a member's I/O failed: {line}")


def flags_of(letters):
    """The log's flags from the trace's letters; None for a read."""
    flags = FLUSH if letters[0] == "F" else 0
    letters = letters.removeprefix("F")
    if letters[0] == "R":
        return None
    if letters[0] == "D":
        flags |= DISCARD
    if "F" in letters:
        flags |= FUA
    return flags


class Log:
    """A log of dm-log-writes, joined with the trace."""

    def __init__(self, path, ios):
        self.file = open(path, "rb")
        self.bytes = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)
        magic, version, entries, sector_size = SUPER.unpack_from(self.bytes)
        harness.check(
            (magic, version, sector_size) == (MAGIC, 1, SECTOR), f"{path} is no log of writes"
        )
        ended = {}
        for io in sorted(ios, key=lambda io: io.completed):
            ended.setdefault(io.key(), []).append(io)
        self.entries = 0
        at = SECTOR
        # Writes that the next flush makes durable stand before it.
        cached = []
        for _ in range(entries):
            sector, count, flags, _ = ENTRY.unpack_from(self.bytes, at)
            data_at = at + SECTOR
            at = data_at + (0 if flags & DISCARD else count * SECTOR)
            if flags & MARK:
                continue
            self.entries += 1
            flags &= FLUSH | FUA | DISCARD
            io = ended[flags, sector, count].pop(0)
            if count and not flags & DISCARD:
                io.data_at = data_at
            if flags & FLUSH:
                for write in cached:
                    write.durable = io.completed
                cached = []
            if flags & (FLUSH | FUA):
                io.durable = io.completed
            else:
                cached.append(io)
        harness.check(not any(ended.values()), f"{path} lacks what the trace has")


class Disk:
    """A member's disk at a moment, which only moves forwards."""

    def __init__(self, log, ios, size):
        self.log = log
        self.image = bytearray(promises.BEFORE * size)
        # When the durable content of each sector was written.
        self.stamps = array("Q", bytes(8 * (size // SECTOR)))
        self.by_queue = sorted(ios, key=lambda io: io.queued)
        self.next = 0
        self.pending = []

    def advance(self, moment):
        """Takes in what has become durable."""
        while self.next < len(self.by_queue) and self.by_queue[self.next].queued <= moment:
            self.pending.append(self.by_queue[self.next])
            self.next += 1
        durable = [io for io in self.pending if io.durable <= moment]
        self.pending = [io for io in self.pending if io.durable > moment]
        for io in sorted(durable, key=lambda io: io.completed):
            self.put(self.image, io, range(io.count))
            for sector in range(io.sector, io.sector + io.count):
                self.stamps[sector] = max(self.stamps[sector], io.completed)

    def put(self, image, io, sectors):
        """Sectors of an I/O, but for those that something later has overwritten durably."""
        if io.flags & DISCARD and io.sector // 8192 % 2:
            # Some discards zero, as most disks do; after the others a disk holds what it held.
            for sector in sectors:
                if self.stamps[io.sector + sector] < io.completed:
                    start = (io.sector + sector) * SECTOR
                    image[start : start + SECTOR] = bytes(SECTOR)
        if io.data_at is None:
            return
        whole = len(sectors) == io.count
        if whole and max(self.stamps[io.sector : io.sector + io.count]) < io.completed:
            start, length = io.sector * SECTOR, io.count * SECTOR
            image[start : start + length] = self.log.bytes[io.data_at : io.data_at + length]
            return
        for sector in sectors:
            if self.stamps[io.sector + sector] < io.completed:
                start, at = (io.sector + sector) * SECTOR, io.data_at + sector * SECTOR
                image[start : start + SECTOR] = self.log.bytes[at : at + SECTOR]

    def after_cut(self, chance):
        """What the disk holds after a power cut; `chance` draws what the cache kept, if given."""
        if chance is None:
            return self.image
        image = bytearray(self.image)
        for io in sorted(self.pending, key=lambda io: io.completed):
            lot = chance.random()
            if lot < 0.35:
                continue
            sectors = range(io.count)
            if lot > 0.7:
                # Torn, in at most 16 places.
                edges = sorted(chance.randrange(io.count + 1) for _ in range(chance.randint(1, 16)))
                sectors = [at for at in sectors if bisect.bisect(edges, at) % 2]
            self.put(image, io, sectors)
        return image


@functools.lru_cache(maxsize=100_000)
def content(address, number):
    """A block's content, made once."""
    return promises.content(address, number)


class Promises:
    """What each block may hold at a moment, which only moves forwards."""

    def __init__(self, trace, size_mib):
        self.said = trace.promises
        self.next = 0
        self.plans = [promises.Plan(writer, size_mib) for writer in range(promises.WRITERS)]
        # The step that each writer may have begun.
        self.begun = [plan.next()[1] for plan in self.plans]
        self.numbers = {}
        self.steps = 0

    def advance(self, moment):
        """Takes in what has been promised."""
        while self.next < len(self.said) and self.said[self.next][0] <= moment:
            _, writer, steps = self.said[self.next]
            harness.check(self.plans[writer].steps == steps, "a promise is missing in the trace")
            for first, count, number in self.begun[writer]:
                self.numbers.update(dict.fromkeys(range(first, first + count), number))
            self.begun[writer] = self.plans[writer].next()[1]
            self.next += 1
            self.steps += 1

    def legal(self):
        """Block addresses to the numbers they may hold, beside 0 for all that are not named."""
        legal = {address: {number} for address, number in self.numbers.items()}
        for writes in self.begun:
            for first, count, number in writes:
                for address in range(first, first + count):
                    legal.setdefault(address, {0}).add(number)
        return legal


def wrong_blocks(windows, legal):
    """Says what is wrong with blocks that were read, as a list of sentences."""
    wrong = []
    for extent, data in enumerate(windows):
        first = promises.window_of(extent)
        for index in range(promises.WINDOW):
            address = first + index
            block = data[index * promises.BLOCK : (index + 1) * promises.BLOCK]
            numbers = legal.get(address, {0})
            wanted = [content(address, number) for number in numbers]
            if block in wanted:
                continue
            # A write that was under way may have reached some sectors and not others.
            for at in range(0, promises.BLOCK, SECTOR):
                sector = block[at : at + SECTOR]
                if not any(sector == want[at : at + SECTOR] for want in wanted):
                    wrong.append(f"block {address}, byte {at}: {sector[:32]!r}, legal are {numbers}")
                    break
    return wrong


class Recorded:
    """Both members' logs, and their disks at a moment, which only moves forwards."""

    def __init__(self, folder):
        lines = [line.split() for line in (folder / "devices").read_text().splitlines()]
        self.trace = Trace(folder / "trace", {number: int(slot) for _, slot, number in lines})
        self.size_mib = int((folder / "size_mib").read_text())
        member_bytes = int((folder / "member_bytes").read_text())
        logs = [Log(folder / f"log{slot}", ios) for slot, ios in enumerate(self.trace.ios)]
        self.disks = [
            Disk(log, ios, member_bytes) for log, ios in zip(logs, self.trace.ios, strict=True)
        ]

    def advance(self, moment):
        """Takes in what has become durable."""
        for disk in self.disks:
            disk.advance(moment)

    def durable_since(self, moment):
        """When something became durable on either member after a moment."""
        return {
            io.completed
            for ios in self.trace.ios
            for io in ios
            if io.flags & (FLUSH | FUA) and moment < io.completed < NEVER
        }


class Recording(Recorded):
    """The load's recording, and what was promised."""

    def __init__(self, folder):
        super().__init__(folder)
        self.promises = Promises(self.trace, self.size_mib)
        for slot, ios in enumerate(self.trace.ios):
            discards = any(io.flags & DISCARD for io in ios)
            harness.check(discards, f"no discard reached the disk of slot {slot}")

    def advance(self, moment):
        """Takes in what has become durable, and what has been promised."""
        super().advance(moment)
        self.promises.advance(moment)

    def moments(self):
        """When something became durable or was promised, since there has been a mirror."""
        ends = self.durable_since(self.trace.steps["started"])
        return sorted(ends | {when for when, _, _ in self.trace.promises})

    def sample(self, count):
        """The first and the last moment, half of the rest around changes of the members."""
        moments = self.moments()
        steps = self.trace.steps
        change = [
            moment
            for moment in moments
            if steps["pulling"] < moment < steps["pulled"]
            or steps["returning"] < moment < steps["returned"]
            or moment > steps["stopping"]
        ]
        chosen = {moments[0], moments[-1]}
        for group, share in ((change, count // 2), (moments, count)):
            missing = share - len(chosen)
            if missing > 0:
                step = max(1.0, len(group) / missing)
                chosen.update(group[int(at * step)] for at in range(min(missing, len(group))))
        return moments, sorted(chosen)

    def ways(self, moment):
        """Which members may be started at a moment, with the expected result."""
        steps = self.trace.steps
        ways = [([0, 1], True), ([0, 1], True), ([0], True)]
        if moment < steps["pulling"] or moment > steps["returned"]:
            ways.append(([1], True))
        elif steps["pulled"] < moment < steps["returning"]:
            ways.append(([1], False))
        return ways


class Cut:
    """One moment, and the mirror that is made of it."""

    def __init__(self, area, recording, moment, chance):
        self.area, self.recording, self.moment = area, recording, moment
        self.lottery = chance if chance.random() < 0.6 else None
        self.members, self.starts = chance.choice(recording.ways(moment))
        self.settle = chance.random() < 0.3

    def __str__(self):
        kind = "strict" if self.lottery is None else "lottery"
        return f"moment {self.moment} ({kind}, members {self.members})"

    def read(self):
        """The windows of all extents."""
        with self.area.client("logged") as client:
            length = promises.WINDOW * promises.BLOCK
            answers = [
                client.submit(harness.nbd.READ, promises.window_of(extent) * promises.BLOCK, length)
                for extent in range(self.recording.size_mib // 4)
            ]
            return [answer.wait() for answer in answers]

    def check(self):
        """Raises Failed when something is wrong."""
        paths = []
        for slot, disk in enumerate(self.recording.disks):
            image = disk.after_cut(self.lottery)
            if slot in self.members:
                paths.append(self.area.file(f"{slot}.img"))
                with open(paths[-1], "wb") as file:
                    file.write(image)
        if not self.starts:
            self.area.start(paths, "logged", code=harness.REFUSED)
            return
        options = ["--force"] if len(paths) == 1 else []
        self.area.start(paths, "logged", options)
        first = self.read()
        wrong = wrong_blocks(first, self.recording.promises.legal())
        harness.check(not wrong, "\n".join(wrong[:10]))
        if self.settle:
            self.check_settled(paths, first)
        self.area.kill_daemons()

    def check_settled(self, paths, first):
        """Nothing changes when the copies are made equal, and a lost member's return is right."""
        self.area.wait_equal("logged")
        harness.check(self.read() == first, "what was read is different now")
        if len(paths) < 2:
            return
        if self.area.states("logged")[1] == "faulty":
            self.area.ctl("re-add", "logged", paths[1])
        self.area.ctl("wait", "logged", "--timeout", 60)
        self.area.pull(0, "logged")
        harness.check(self.read() == first, "the second member is different")


def check_all(folder, area, seed):
    """Cuts the power at every moment of the sample; what was done, in words."""
    recording = Recording(folder)
    moments, chosen = recording.sample(int(os.environ.get("CUTS") or 150))
    chance = random.Random(seed)
    counts = {"lottery": 0, "one member": 0, "refused": 0, "settled": 0}
    for moment in chosen:
        recording.advance(moment)
        cut = Cut(area, recording, moment, chance)
        try:
            cut.check()
        except Exception as error:
            raise harness.Failed(f"{cut}: {error}") from error
        counts["lottery"] += cut.lottery is not None
        counts["one member"] += len(cut.members) == 1
        counts["refused"] += not cut.starts
        counts["settled"] += cut.settle
    told = ", ".join(f"{name} {count}" for name, count in counts.items())
    return (
        f"{len(chosen)} of {len(moments)} moments ({told}), "
        f"{recording.promises.steps} steps promised"
    )


def run(name, check, folder):
    """Runs a check of a recording, `check(folder, area, seed)`, which returns what it has done."""
    seed = int(os.environ.get("SEED") or 1)
    began = time.monotonic()
    # Images in memory where that takes direct I/O: the disk below makes no difference here.
    if not os.environ.get("TMPDIR") and takes_direct_io("/dev/shm"):
        tempfile.tempdir = "/dev/shm"
    area = harness.Area(seed)
    try:
        said = check(Path(folder), area, seed)
        print(f"    {said}")
        print(f"ok {name} ({time.monotonic() - began:.0f} s)")
        return 0
    except Exception:
        print(f"not ok {name} with SEED={seed}")
        print("    " + traceback.format_exc().strip().replace("\n", "\n    "))
        print("    " + area.log()[-2000:].replace("\n", "\n    "))
        return 1
    finally:
        area.close()


def takes_direct_io(folder):
    """Whether files there can be opened past the page cache."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            os.close(os.open(file.name, os.O_RDWR | os.O_DIRECT))
            return True
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(run("power_cuts", check_all, sys.argv[1]))
