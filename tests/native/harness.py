"""What the native tests share: a mirror in a folder of its own, and an oracle of its content.

A test is a function that takes an `Area`. It passes when it returns, and it cannot be run here
when it raises `CannotRun` with the reason. Everything an area holds (daemons, files, mounts) is
gone when the test has ended.
"""

import json
import os
import random
import select
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import nbd

MIB = 1 << 20
BLOCK = 4096
EXTENT = 4 * MIB
PROJECT = Path(__file__).resolve().parents[2]
os.environ.setdefault("UBLK_MIRROR_RETURNS", "0")  # who is lost stays so until a test says otherwise
os.environ.setdefault("UBLK_MIRROR_SCRUB_DAYS", "0")  # on a slow machine a test takes long enough for a pass
BINARIES = Path(
    os.environ.get("UBLK_MIRROR_BIN")
    or Path(os.environ.get("CARGO_TARGET_DIR") or PROJECT / "target") / "release"
).absolute()
FAILED, USAGE, REFUSED, NOT_FOUND, BUSY = 1, 2, 3, 4, 5


class Failed(Exception):
    """The test has failed."""


class CannotRun(Exception):
    """This machine lacks what the test needs."""


def check(condition, message):
    """Fails the test with the message unless the condition holds."""
    if not condition:
        raise Failed(message)


def until(condition, what, seconds=30):
    """Waits for a condition that another process brings about."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= end:
            raise Failed(f"waited {seconds} s in vain: {what}")
        time.sleep(0.02)


class Area:
    """A folder, the mirrors whose members lie in it, and the daemons that serve them."""

    def __init__(self, seed):
        self.path = Path(tempfile.mkdtemp(prefix="ublk-mirror-native."))
        self.run_dir = self.path / "run"
        self.random = random.Random(seed)
        self.mounts = []
        self.wrapper = []
        # Whatever else ends with the area: has a kill().
        self.children = []

    def close(self):
        """Ends every daemon of this area and removes all."""
        self.kill_daemons()
        troubles = []
        for child in self.children:
            try:
                child.kill()
            except Exception as trouble:  # the others end all the same
                troubles.append(trouble)
        for mount in reversed(self.mounts):
            subprocess.run(["umount", "-l", mount], check=False)
        shutil.rmtree(self.path, ignore_errors=True)
        if troubles:
            raise troubles[0]

    def daemons(self):
        """Process ids of the daemons that serve this area."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if words[0].endswith(b"ublk-mirror") and str(self.run_dir).encode() in words:
                found.append(int(entry.name))
        return found

    def kill_daemons(self):
        """SIGKILL, and waits until they have gone."""
        pids = self.daemons()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self.wait_for_end(pids)

    @staticmethod
    def wait_for_end(pids):
        """Until these processes have let go of their files."""
        for pid in pids:
            try:
                handle = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            ended = select.select([handle], [], [], 30)[0]
            os.close(handle)
            check(ended, f"process {pid} has not ended within 30 s")

    def file(self, name):
        """The path of a file in the area."""
        return str(self.path / name)

    def ctl(self, *words, code=0):
        """Runs mirrorctl, which has to end with this exit code (or one of these); what it said."""
        codes = code if isinstance(code, tuple) else (code,)
        command = [*self.wrapper, str(BINARIES / "mirrorctl"), "--run-dir", str(self.run_dir)]
        command += [str(word) for word in words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        said = (done.stdout + done.stderr).strip()
        shown = " ".join(command[3 + len(self.wrapper):])
        if done.returncode not in codes:
            raise Failed(f"'{shown}' ended with {done.returncode}, not {code}: {said}\n{self.log()}")
        check(said, f"'{shown}' said nothing")
        return done.stdout if done.returncode == 0 else said

    def log(self):
        """The end of the daemons' logs."""
        logs = [path.read_text(errors="replace")[-1500:] for path in self.run_dir.glob("*.log")]
        return "\n".join(logs)

    def make(self, members=2, size="64M", name="m", options=()):
        """Creates a mirror on files 0.img, 1.img, ... and starts it; its member paths."""
        paths = [self.file(f"{index}.img") for index in range(members)]
        words = [word for path in paths for word in ("--member", path)]
        self.ctl("create", name, *words, "--size", size, *options)
        self.start(paths, name)
        return paths

    def start(self, paths, name="m", options=(), code=0):
        """Starts a mirror on NBD; what mirrorctl said."""
        return self.ctl("start", name, *paths, "--front", "nbd", *options, code=code)

    def stop(self, name="m"):
        """Stops it."""
        self.ctl("stop", name)

    def client(self, name="m"):
        """A connection to its device."""
        return nbd.Client(str(self.run_dir / f"{name}.nbd"))

    def status(self, name="m"):
        """The status document."""
        return json.loads(self.ctl("status", name, "--json"))

    def states(self, name="m"):
        """The members' states in the order of slots."""
        return [member["state"] for member in self.status(name)["members"]]

    def pull(self, slot, name="m"):
        """Takes a member out and lets go of its file."""
        self.ctl("fail", name, slot)
        self.ctl("remove", name, slot)

    def put_back(self, path, options=(), name="m"):
        """Re-adds a member and waits; the resync's document."""
        self.ctl("re-add", name, path, *options)
        self.ctl("wait", name, "--timeout", 90)
        return self.status(name)["last-resync"]

    def wait_equal(self, name="m"):
        """After an unclean stop: until all copies have been made equal."""
        until(
            lambda: self.status(name)["extents"]["unequalised-blocks"] == 0,
            "the copies are not equal yet",
            60,
        )

    def examine(self, path):
        """The superblock's document."""
        return json.loads(self.ctl("examine", path, "--json"))

    def compare(self, paths):
        """All data areas are the same, byte for byte (for members that were new files)."""
        document = self.examine(paths[0])
        offset, size = document["data-offset"], document["size-bytes"]
        first = None
        for path in paths:
            with open(path, "rb") as file:
                file.seek(offset)
                data = file.read(size)
            check(len(data) == size, f"{path} ends before its data area does")
            if first is None:
                first = data
            elif data != first:
                at = next(
                    at for at in range(0, size, BLOCK)
                    if data[at:at + BLOCK] != first[at:at + BLOCK]
                )
                raise Failed(f"{path} differs from {paths[0]}, first at byte {at} of the device")

    def mount(self, size_mib, options=""):
        """A small file system in memory, which only root can make."""
        if os.geteuid() != 0:
            raise CannotRun("only root can mount a small file system")
        path = tempfile.mkdtemp(dir=self.path)
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m{options}", "tmpfs", path]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise CannotRun(f"mounting a tmpfs failed: {done.stderr.strip()}")
        self.mounts.append(path)
        return Path(path)


class Host(Area):
    """Another host, which ends with the first one's area."""

    def __init__(self, area):
        super().__init__(area.random.random())
        area.children.append(self)

    def kill(self):
        """Ends it."""
        self.close()

    def promote(self, paths, options=(), code=0):
        """What mirrorctl said."""
        return self.ctl("promote", "m", *paths, "--front", "nbd", *options, code=code)


def block(number, version):
    """The content of a block at a version; version 0 is zeroes."""
    if version == 0:
        return bytes(BLOCK)
    return f"{number:012d}.{version:010d}|".encode().ljust(32, b"#") * (BLOCK // 32)


class Model:
    """The contents that each block may legally have."""

    def __init__(self, blocks):
        self.latest = [0] * blocks
        self.legal = [{0} for _ in range(blocks)]

    def issue(self, number):
        """A new version is on its way: the old one and the new are legal; its content."""
        self.latest[number] += 1
        self.legal[number].add(self.latest[number])
        return block(number, self.latest[number])

    def answered(self, number):
        """The latest version was acknowledged: only that is legal now."""
        self.legal[number] = {self.latest[number]}

    def write(self, client, number, count=1, flags=0):
        """Writes new versions of neighbouring blocks and waits."""
        data = b"".join(self.issue(at) for at in range(number, number + count))
        client.write(number * BLOCK, data, flags)
        for at in range(number, number + count):
            self.answered(at)

    def check(self, client):
        """Every block reads as one of its legal versions, which is then the only one."""
        step = 256
        for begin in range(0, len(self.legal), step):
            count = min(step, len(self.legal) - begin)
            data = client.read(begin * BLOCK, count * BLOCK)
            for index in range(count):
                self.saw(begin + index, data[index * BLOCK:(index + 1) * BLOCK])

    def saw(self, number, got):
        """A block reads so: it has to be one of its legal versions, which is then the only one."""
        fits = [version for version in self.legal[number] if got == block(number, version)]
        check(
            fits,
            f"block {number} holds {got[:32]!r}, "
            f"legal are the versions {sorted(self.legal[number])}",
        )
        self.legal[number] = set(fits)

    def load(self, client, rng, seconds=None, writes=None, depth=16, meanwhile=None):
        """Random writes, `depth` in flight, until the time, the count or the connection ends.

        A block has one write in flight at most. Now and then a flush. `meanwhile` is called
        once after a third of the time or count. Returns the number of acknowledged writes.
        """
        flying, acked, issued = [], 0, 0
        began = time.monotonic()

        def share():
            if writes is not None:
                return issued / writes
            return (time.monotonic() - began) / seconds

        try:
            while share() < 1:
                number = rng.randrange(len(self.legal))
                if any(number == other for other, _ in flying):
                    continue
                data = self.issue(number)
                flying.append((number, client.submit(nbd.WRITE, number * BLOCK, BLOCK, data)))
                issued += 1
                if issued % 200 == 0:
                    flying.append((None, client.submit(nbd.FLUSH)))
                while len(flying) >= depth:
                    acked += self._land(flying)
                if meanwhile is not None and share() > 1 / 3:
                    meanwhile()
                    meanwhile = None
            while flying:
                acked += self._land(flying)
        except nbd.Gone:
            while flying:
                try:
                    acked += self._land(flying)
                except nbd.Gone:
                    pass
        return acked

    def _land(self, flying):
        number, future = flying.pop(0)
        future.wait()
        if number is None:
            return 0
        self.answered(number)
        return 1


class Load:
    """Random writes and verified reads of the first blocks in the background, `depth` in flight, now
    and then a flush; each answer is timed. It ends when it is left."""

    def __init__(self, area, model, depth=8, blocks=1024, name="m"):
        self.model, self.depth, self.blocks = model, depth, blocks
        self.random = random.Random(area.random.random())
        self.client = area.client(name)
        # Answers, the errors among them, and the longest time that one took.
        self.answers = self.errors = 0
        self.longest = 0.0
        self.over, self.trouble = threading.Event(), None
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, kind, *_):
        self.over.set()
        self.thread.join(60)
        self.client.close()
        if kind is None:
            check(not self.thread.is_alive(), "requests are never answered")
            self._look()

    def _look(self):
        if self.trouble is not None:
            raise Failed(f"the load has ended: {self.trouble!r}") from self.trouble

    def goes_on(self, answers=100, seconds=30):
        """Until so many more requests have been answered."""
        wanted = self.answers + answers

        def are_in():
            self._look()
            return self.answers >= wanted

        until(are_in, f"{answers} more answers", seconds)

    def _run(self):
        flying = []
        try:
            while not self.over.is_set():
                self._ask(flying)
                while len(flying) >= self.depth:
                    self._land(*flying.pop(0))
            while flying:
                self._land(*flying.pop(0))
        except Exception as trouble:  # whoever waits for it says so
            self.trouble = trouble

    def _ask(self, flying):
        number = self.random.randrange(self.blocks)
        kind = self.random.choices((nbd.WRITE, nbd.READ, nbd.FLUSH), (70, 29, 1))[0]
        if kind == nbd.FLUSH:
            flying.append((kind, None, self.client.submit(kind)))
        elif all(number != other for _, other, _ in flying):
            data = self.model.issue(number) if kind == nbd.WRITE else b""
            flying.append((kind, number, self.client.submit(kind, number * BLOCK, BLOCK, data)))

    def _land(self, kind, number, future):
        try:
            data = future.wait()
            if kind == nbd.WRITE:
                self.model.answered(number)
            elif kind == nbd.READ:
                self.model.saw(number, data)
        except nbd.Refused:
            self.errors += 1
        self.longest = max(self.longest, future.ended - future.began)
        self.answers += 1
