"""NBD servers that export peer members: nbdkit, qemu-nbd, nbd-server, our own, and one that
misbehaves.

Each has an `address` for mirrorctl, `start` (returns when it listens) and `kill` (SIGKILL, to all
of its processes, and waits). All but the last keep the disk in a file, `backing`. They end with
the area.
"""

import os
import shutil
import signal
import socket
import struct
import subprocess
import threading

import nbd
from harness import BINARIES, BLOCK, FAILED, MIB, PROJECT, CannotRun, Failed, Model, check, until

SIZE = 100 << 20
CERTIFICATES = str(PROJECT / "scripts" / "certificates.sh")


def free_port():
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def certificates(area, name="tls", client="client.example"):
    """A folder with certificates of an authority of its own."""
    if shutil.which("openssl") is None:
        raise CannotRun("openssl is not installed")
    folder = area.file(name)
    subprocess.run([CERTIFICATES, folder, "127.0.0.1,localhost", client], check=True, timeout=60)
    return folder


def _answers(where):
    family = socket.AF_INET if isinstance(where, tuple) else socket.AF_UNIX
    with socket.socket(family) as probe:
        try:
            probe.connect(where)
        except OSError:
            return False
        # A server that takes one client at a time is free again only after this one has left.
        probe.settimeout(5)
        try:
            return probe.recv(8) == b"NBDMAGIC"
        except OSError:
            return False


class Server:
    """A process, over TCP or a unix socket."""

    program = None
    # Whether it ends older sessions before it admits a new writer.
    fences = False

    def __init__(self, area, name, tcp=False, options=(), size=SIZE, tls=None):
        if not self._installed():
            raise CannotRun(f"{self.program} is not installed")
        # The folder of its certificates; then it takes nothing but TLS.
        self.tls = tls
        self.area, self.options = area, list(options)
        self.process = self.group = None
        self.backing = area.file(f"{name}.img")
        self.socket = area.file(f"{name}.socket")
        self.port = free_port() if tcp else None
        self.export = "m"
        with open(self.backing, "wb") as file:
            file.truncate(size)
        area.children.append(self)

    @classmethod
    def _installed(cls):
        return shutil.which(cls.program) is not None

    @property
    def address(self):
        """For mirrorctl."""
        if self.port is not None:
            return self.address_at(self.port)
        return f"nbd+unix:///{self.export}?socket={self.socket}"

    def address_at(self, port):
        """The same through another port of this machine."""
        if self.tls is None:
            return f"nbd://127.0.0.1:{port}/{self.export}"
        return f"nbds://127.0.0.1:{port}/{self.export}?tls-certificates={self.tls}"

    @property
    def where(self):
        """For a socket's connect()."""
        return ("127.0.0.1", self.port) if self.port is not None else self.socket

    def command(self):
        """How to run it in the foreground."""
        raise NotImplementedError

    def start(self):
        """Begins to serve what the backing file holds."""
        if self.port is None and os.path.exists(self.socket):
            os.unlink(self.socket)
        log = open(self.area.file("servers.log"), "ab")
        with log:
            self.process = subprocess.Popen(self.command(), stdin=subprocess.DEVNULL, stdout=log,
                                            stderr=log, start_new_session=True)
        self.group = self.process.pid
        until(lambda: self._lives() and self._listens(), f"{self.program} does not listen")

    def _listens(self):
        return _answers(self.where)

    def _lives(self):
        """Whether it runs; fails with what it said when it has ended."""
        if self.process.poll() is None:
            return True
        with open(self.area.file("servers.log"), encoding="utf-8", errors="replace") as said:
            raise Failed(f"{self.program} has ended: {said.read()[-500:]}")

    def signal(self, number):
        """Sends a signal to all of its processes."""
        os.killpg(self.group, number)

    def kill(self):
        """SIGKILL; returns when it has let go of everything."""
        if self.group is None:
            return
        group, self.group = self.group, None
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait(30)

        def gone():
            try:
                os.killpg(group, 0)
            except ProcessLookupError:
                return True
            return False

        # Processes that it started are init's to bury.
        until(gone, f"{self.program}'s processes do not end")


class Nbdkit(Server):
    """nbdkit; `options` are what follows its socket, by default the file plugin."""

    program = "nbdkit"

    def command(self):
        at = ["-U", self.socket] if self.port is None else ["-i", "127.0.0.1", "-p", str(self.port)]
        if self.tls is not None:
            at += ["--tls=require", f"--tls-certificates={self.tls}", "--tls-verify-peer"]
        return ["nbdkit", "-f", *at, *(self.options or ["file", self.backing])]


class QemuNbd(Server):
    """qemu-nbd; persistent, for two clients at once."""

    program = "qemu-nbd"

    def command(self):
        at = ["-k", self.socket] if self.port is None else ["-b", "127.0.0.1", "-p", str(self.port)]
        if self.tls is not None:
            what = f"tls-creds-x509,id=tls,endpoint=server,verify-peer=yes,dir={self.tls}"
            at += ["--object", what, "--tls-creds", "tls"]
        return ["qemu-nbd", "-t", "-f", "raw", "-e", "2", "-x", self.export, *at, *self.options,
                self.backing]


class NbdServer(Server):
    """nbd-server, which goes into the background; a process for each client."""

    program = "nbd-server"

    def _lives(self):
        """It does when it has written its process id, whose number its group has too."""
        if self.process.poll():
            return super()._lives()
        try:
            with open(self.area.file("nbd-server.pid"), encoding="utf-8") as file:
                self.group = int(file.read())
        except (OSError, ValueError):
            return False
        return True

    def command(self):
        at = f"unixsock = {self.socket}" if self.port is None else f"port = {self.port}"
        path = self.area.file("nbd-server.conf")
        if self.tls is not None:
            at += (f"\nforce_tls = true\ncertfile = {self.tls}/server-cert.pem\n"
                   f"keyfile = {self.tls}/server-key.pem\ncacertfile = {self.tls}/ca-cert.pem")
        with open(path, "w", encoding="utf-8") as file:
            file.write(f"[generic]\n{at}\nlistenaddr = 127.0.0.1\n[{self.export}]\n"
                       f"exportname = {self.backing}\nflush = true\nfua = true\ntrim = true\n")
        pid = self.area.file("nbd-server.pid")
        if os.path.exists(pid):
            os.unlink(pid)
        return ["nbd-server", "-C", path, "-p", pid, *self.options]


class Exported(Server):
    """Our own export server; `options` are further words for mirrorctl."""

    program = "mirrorctl"
    fences = True

    @classmethod
    def _installed(cls):
        return True

    def command(self):
        at = f"unix:{self.socket}" if self.port is None else f"127.0.0.1:{self.port}"
        tls = [] if self.tls is None else ["--tls", self.tls]
        return [str(BINARIES / "mirrorctl"), "export", self.backing, "--listen", at,
                "--name", self.export, *tls, *self.options]

    def start(self):
        """The same; one that was killed keeps the disk until what it had under way is over."""
        def begins():
            try:
                Server.start(self)
            except Failed as failed:
                if f"{self.backing} is in use" in str(failed):
                    return False
                raise
            return True

        until(begins, "the disk is held by nobody and in use")

    def stop(self):
        """SIGTERM; returns when it has ended, which it has to do well."""
        self.process.terminate()
        check(self.process.wait(30) == 0, f"it ended with {self.process.returncode}")
        self.group = None


class Between:
    """The network before a server: passes on what it gets until it is told not to.

    `cut()` closes what there is, and what comes is refused until `mend()` unless `at_once`;
    `hold()` passes nothing on any more and closes nothing, and `let_go()` ends that. `tamper(data)`,
    where it is set, is asked what becomes of what passes.
    """

    def __init__(self, area, server, name="between"):
        self.server, self.lock, self.ends = server, threading.Lock(), []
        self.open, self.flows, self.connections = True, threading.Event(), 0
        self.tamper = None
        # Bytes that came through, in both directions.
        self.passed = 0
        self.flows.set()
        if server.port is None:
            path = area.file(f"{name}.socket")
            self.address = f"nbd+unix:///{server.export}?socket={path}"
            self.family, at = socket.AF_UNIX, path
        else:
            self.family, at = socket.AF_INET, ("127.0.0.1", 0)
        self.listener = socket.socket(self.family)
        self.listener.bind(at)
        self.listener.listen()
        if server.port is not None:
            self.address = server.address_at(self.listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()
        area.children.append(self)

    def cut(self, at_once=False):
        """Every connection is closed."""
        with self.lock:
            self.open = at_once
            for end in self.ends:
                _close(end)
            self.ends.clear()

    def cut_last(self):
        """The newest connection is closed, and no other."""
        with self.lock:
            for end in self.ends[-2:]:
                _close(end)
            del self.ends[-2:]

    def mend(self):
        """Connections are passed on again."""
        self.open = True

    def hold(self):
        """Nothing arrives any more."""
        self.flows.clear()

    def let_go(self):
        """What was held arrives."""
        self.flows.set()

    def kill(self):
        """Closes everything."""
        self.let_go()
        _close(self.listener)
        self.cut()

    def _accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            server = socket.socket(self.family)
            with self.lock:
                # Closed in the handshake, as by a network that is down a moment later.
                if not self.open:
                    _close(client)
                    continue
                server.connect(self.server.where)
                self.ends += [client, server]
                self.connections += 1
            for ends in ((client, server), (server, client)):
                threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    def _pass_on(self, source, target):
        try:
            while data := source.recv(1 << 16):
                self.flows.wait()
                if self.tamper is not None:
                    data = self.tamper(data)
                with self.lock:
                    self.passed += len(data)
                target.sendall(data)
        except OSError:
            pass
        _close(source)
        _close(target)


def _close(end):
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    end.close()


class Scripted:
    """A server in this process that keeps the disk in memory and misbehaves when it is told to.

    `misbehave(how)` begins with the next request that fits: `garbage` answers a request with
    noise, `half` closes in the middle of a read's data, `twice` answers a write twice, `silent`
    answers nothing any more, `close` closes. `asked` counts requests.
    """

    FLAGS = 1 | nbd.FLAG_FLUSH | nbd.FLAG_FUA | nbd.FLAG_TRIM | nbd.FLAG_WRITE_ZEROES

    def __init__(self, area, name, size=SIZE, flags=FLAGS, sizes=None, greeting=None):
        self.flags, self.sizes, self.data = flags, sizes, bytearray(size)
        self.greeting = greeting or b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3)
        self.socket = area.file(f"{name}.socket")
        self.address = f"nbd+unix:///?socket={self.socket}"
        self.how, self.done, self.asked = None, threading.Event(), 0
        self.lock, self.connections = threading.Lock(), []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.socket)
        self.listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()
        area.children.append(self)

    def start(self):
        """It serves from the beginning."""

    def kill(self):
        """Closes everything."""
        # A close alone does not wake who waits in accept.
        try:
            self.listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.listener.close()
        self.behave()

    def misbehave(self, how):
        """From the next request on that fits."""
        self.done.clear()
        self.how = how

    def behave(self):
        """Serves well again, those who connect anew."""
        self.how = None
        with self.lock:
            for connection in self.connections:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
            self.connections.clear()

    def _accept(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with self.lock:
                self.connections.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        try:
            with connection:
                self._handshake(connection)
                while self._request(connection):
                    pass
        except (OSError, EOFError):
            pass

    @staticmethod
    def _take(connection, length):
        data = b""
        while len(data) < length:
            part = connection.recv(length - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def _handshake(self, connection):
        connection.sendall(self.greeting)
        self._take(connection, 4)

        def reply(kind, data=b""):
            head = struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data))
            connection.sendall(head + data)

        while True:
            _, option, length = struct.unpack(">8sII", self._take(connection, 16))
            self._take(connection, length)
            if option == nbd.OPT_GO:
                break
            reply(1 << 31 | 1)
        reply(3, struct.pack(">HQH", 0, len(self.data), self.flags))
        if self.sizes:
            reply(3, struct.pack(">HIII", 3, *self.sizes))
        reply(1)

    def _request(self, connection):
        _, flags, kind, cookie, offset, length = struct.unpack(
            ">IHHQQI", self._take(connection, 28))
        payload = self._take(connection, length) if kind == nbd.WRITE else b""
        if kind == nbd.DISCONNECT:
            return False
        self.asked += 1
        known = self.FLAGS if kind != nbd.WRITE or flags == 0 else self.flags & nbd.FLAG_FUA
        check(known, "FUA was sent to a server that does not know it")
        how = self.how
        if how == "silent":
            self.done.set()
            return True
        if how == "close":
            self.done.set()
            return False
        if how == "garbage":
            self.done.set()
            connection.sendall(b"\xa5" * 16)
            return True
        if kind == nbd.WRITE:
            self.data[offset:offset + length] = payload
        elif kind == nbd.WRITE_ZEROES:
            self.data[offset:offset + length] = bytes(length)
        answer = struct.pack(">IIQ", 0x67446698, 0, cookie)
        if kind == nbd.READ:
            data = bytes(self.data[offset:offset + length])
            if how == "half":
                self.done.set()
                connection.sendall(answer + data[:length // 2])
                return False
            answer += data
        elif kind == nbd.WRITE and how == "twice":
            self.done.set()
            answer += answer
        connection.sendall(answer)
        return True


def dies_and_returns(area, server):
    """The whole story: written, the server dies under load, comes back, delta, compared."""
    local = area.file("local.img")
    server.start()
    area.ctl("create", "m", "--member", local, "--member", server.address, "--size", "64M")
    area.start([local, server.address])
    check(area.states() == ["in-sync", "in-sync"], f"states are {area.states()}")
    model = Model(64 * MIB // BLOCK)
    with area.client() as client:
        model.load(client, area.random, writes=2000)
        client.flush()
        acked = model.load(client, area.random, writes=3000, depth=32, meanwhile=server.kill)
        check(acked == 3000, f"{acked} of 3000 writes were acknowledged")
        check(area.states() == ["in-sync", "faulty"], f"states are {area.states()}")
        members = area.status()["members"]
        flags = [member["unfenced"] for member in members]
        check(flags == [False, not server.fences], f"unfenced is {flags}")
        said = area.ctl("status", "m")
        word = "  fenced; " if server.fences else "  unfenced; "
        check(word in said, f"status does not say{word}: {said}")
        # Only what changed meanwhile is copied.
        for number in area.random.sample(range(64 * MIB // BLOCK), 500):
            model.write(client, number)
        area.ctl("re-add", "m", server.address, code=FAILED)
        server.start()
        missed = area.status()["members"][1]["missed-bytes"]
        check(500 * BLOCK <= missed <= 3000 * BLOCK, f"{missed} bytes are missed")
        resync = area.put_back(server.address)
        check(resync["kind"] == "delta", f"a {resync['kind']} resync: {resync['reason']}")
        moved = resync["copied-bytes"] + resync["zeroed-bytes"]
        check(missed <= moved <= 1.05 * missed, f"{moved} bytes moved, {missed} were missed")
        # The peer alone has everything.
        area.pull(0)
        model.check(client)
        model.load(client, area.random, writes=200)
        area.put_back(local)
        model.load(client, area.random, writes=500, meanwhile=server.kill)
    # The loss is durable: the local member alone starts, unasked.
    area.kill_daemons()
    area.start([local])
    check(area.states() == ["in-sync", "faulty"], f"states are {area.states()}")
    with area.client() as client:
        model.check(client)
        server.start()
        area.put_back(server.address)
    area.stop()
    check(area.examine(server.address)["last-stop"] == "clean", "the stop was not recorded")
    area.compare([local, server.backing])
