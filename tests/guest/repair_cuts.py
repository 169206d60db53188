#!/usr/bin/env python3
"""Cuts the power of a recorded mirror at many moments of a scrub that repairs.

Usage: tests/guest/repair_cuts.py FOLDER

FOLDER holds what t_log_repairs.sh left (see power_cuts.py). Blocks were spoilt on either member,
none on both, so at each moment every block has a right copy and nothing else may be read:

- `reads`: with both members each block reads as it is right, twice, and after a scrub too;
- `scrub`: nothing is read before a scrub has ended; it leaves nothing that is wrong on either
  member's disk, and `mirrorctl check` finds nothing;
- `alone`: one member answers what is right on its disk (or an error, where it alone has checksums
  that were spoilt); of what is not, it tells an error or, of an extent that was hot or has no
  checksums, what is there.

CUTS=N checks that many moments (default 24), SEED=N draws others. Prints `ok repair_cuts` or
`not ok repair_cuts`.
"""

import os
import random
import sys
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent))

import power_cuts
import repairs
from power_cuts import harness
from promises import EXTENT_BLOCKS
from repairs import BLOCK, BLOCKS, PAGE

RIGHT = b"".join(map(repairs.right, range(BLOCKS)))
WAYS = ("reads", "scrub", "alone")
OPTIONS = ["--scrub-days", "0", "--error-budget", "unlimited"]
PIECE = 16 * BLOCK


def blocks_of(content):
    """Its blocks, one after the other."""
    return [content[at : at + BLOCK] for at in range(0, len(content), BLOCK)]


class Cut:
    """One moment, and the mirror that is made of it."""

    def __init__(self, area, recording, moment, chance, way):
        self.area, self.recording, self.moment, self.way = area, recording, moment, way
        self.lottery = chance if chance.random() < 0.6 else None
        self.slots = [chance.randrange(2)] if way == "alone" else [0, 1]
        self.both = [area.file(f"{slot}.img") for slot in (0, 1)]
        self.paths = [self.both[slot] for slot in self.slots]
        # Copies, on both disks, that are wrong at this moment.
        self.wrong = 0

    def __str__(self):
        kind = "strict" if self.lottery is None else "lottery"
        return f"moment {self.moment} ({kind}, {self.way}, members {self.slots})"

    def check(self):
        """Raises Failed when something is wrong."""
        right = blocks_of(RIGHT)
        contents = []
        for path, disk in zip(self.both, self.recording.disks, strict=True):
            Path(path).write_bytes(disk.after_cut(self.lottery))
            contents.append(self.on_disk(path))
            pairs = zip(blocks_of(contents[-1]), right, strict=True)
            self.wrong += sum(have != want for have, want in pairs)
        getattr(self, self.way)(contents)
        self.area.kill_daemons()

    def on_disk(self, path):
        """The data on a member's own disk."""
        with open(path, "rb") as file:
            file.seek(self.area.examine(path)["data-offset"])
            return file.read(len(RIGHT))

    def start(self, *options):
        """Starts what was found."""
        self.area.start(self.paths, "logged", [*OPTIONS, *options])

    def must_be_right(self, content, what):
        """Every block."""
        pairs = zip(blocks_of(content), blocks_of(RIGHT), strict=True)
        wrong = [address for address, (have, want) in enumerate(pairs) if have != want]
        harness.check(not wrong, f"{what}: {len(wrong)} wrong blocks, first {wrong[:5]}")

    def read(self):
        """All blocks through the mirror."""
        with self.area.client("logged") as client:
            answers = [
                client.submit(harness.nbd.READ, at, PIECE) for at in range(0, len(RIGHT), PIECE)
            ]
            return b"".join(answer.wait() for answer in answers)

    def reads(self, _):
        """Reads alone, which heal what they meet, then a scrub of the rest."""
        self.start()
        for _ in range(2):
            self.must_be_right(self.read(), "a read")
        self.scrub()
        self.must_be_right(self.read(), "a read after the scrub")

    def scrub(self, *_):
        """All extents cool, then a pass; then both disks by themselves."""
        if self.way == "scrub":
            self.start("--check-reads", "scrub-only")
        self.area.wait_equal("logged")
        self.area.stop("logged")
        self.start("--check-reads", "scrub-only")
        number = self.scrub_status()["totals"]["passes"] + 1
        self.area.ctl("scrub", "start", "logged", "--once")
        harness.until(
            lambda: self.scrub_status()["totals"]["passes"] >= number, "the pass does not end", 60
        )
        status = self.scrub_status()
        harness.check(status["damaged-blocks"] == 0, f"damaged: {status}")
        harness.check(status["passes"][0]["left-out-extents"] == 0, f"left out: {status}")
        self.must_be_right(self.read(), "a read after the scrub")
        self.area.stop("logged")
        for path in self.paths:
            self.must_be_right(self.on_disk(path), f"the disk {path}")
        self.area.ctl("check", *self.paths)
        self.start()

    def scrub_status(self):
        """The scrub's document."""
        return harness.json.loads(self.area.ctl("scrub", "status", "logged", "--json"))

    def alone(self, contents):
        """One member: whatever is right on its disk is answered, unless its checksum may be wrong."""
        self.start("--force")
        with self.area.client("logged") as client:
            answers = [
                client.submit(harness.nbd.READ, address * BLOCK, BLOCK) for address in range(BLOCKS)
            ]
            pairs = zip(blocks_of(contents[self.slots[0]]), blocks_of(RIGHT), answers, strict=True)
            for address, (have, want, answer) in enumerate(pairs):
                try:
                    got = answer.wait()
                except harness.nbd.Refused:
                    spoilt_page = self.slots == [0] and address // EXTENT_BLOCKS == PAGE
                    harness.check(
                        have != want or spoilt_page, f"block {address} is right and cannot be read"
                    )
                else:
                    harness.check(got == have, f"block {address} reads as nothing that there is")


def check_all(folder, area, seed):
    """Cuts the power at every moment of the sample; what was done, in words."""
    recording = power_cuts.Recorded(folder)
    moments = sorted(recording.durable_since(recording.trace.steps["scrubbing"]))
    count = min(int(os.environ.get("CUTS") or 24), len(moments))
    chosen = [moments[at * (len(moments) - 1) // max(count - 1, 1)] for at in range(count)]
    chance = random.Random(seed)
    wrong = []
    for at, moment in enumerate(chosen):
        recording.advance(moment)
        cut = Cut(area, recording, moment, chance, WAYS[at % len(WAYS)])
        try:
            cut.check()
        except Exception as error:
            raise harness.Failed(f"{cut}: {error}") from error
        wrong.append(cut.wrong)
    # Or nothing was cut off in the middle.
    middle = sum(0 < count < max(wrong) for count in wrong)
    harness.check(middle >= len(wrong) // 4, f"copies that were wrong at the cuts: {wrong}")
    return (
        f"{len(chosen)} of {len(moments)} moments, {middle} in the middle of the repairs; "
        f"at most {max(wrong)} copies wrong"
    )


if __name__ == "__main__":
    sys.exit(power_cuts.run("repair_cuts", check_all, sys.argv[1]))
