"""TLS to peers: our server and other people's, their clients, and those who are not let in."""

import shutil
import subprocess

from harness import BLOCK, FAILED, MIB, NOT_FOUND, REFUSED, USAGE, CannotRun, Model, check
from servers import (
    CERTIFICATES, Between, Exported, Nbdkit, NbdServer, QemuNbd, certificates, dies_and_returns,
)

BLOCKS = 64 * MIB // BLOCK


def _mirror(area, server, address=None):
    """A local member and that one; the mirror runs."""
    local, address = area.file("local.img"), address or server.address
    server.start()
    area.ctl("create", "m", "--member", local, "--member", address, "--size", "64M")
    area.start([local, address])
    check(area.states() == ["in-sync", "in-sync"], f"states are {area.states()}")
    return local, Model(BLOCKS)


def our_server_dies_under_tls(area):
    """Lost under load, back by delta."""
    dies_and_returns(area, Exported(area, "peer", tcp=True, tls=certificates(area)))


def nbdkit_dies_under_tls(area):
    """nbdkit with its own TLS (GnuTLS), which wants a certificate of ours."""
    dies_and_returns(area, Nbdkit(area, "peer", tcp=True, tls=certificates(area)))


def qemu_nbd_dies_under_tls(area):
    """The same with qemu's."""
    dies_and_returns(area, QemuNbd(area, "peer", tcp=True, tls=certificates(area)))


def nbd_server_dies_under_tls(area):
    """The same with nbd-server's."""
    dies_and_returns(area, NbdServer(area, "peer", tcp=True, tls=certificates(area)))


def qemus_client_uses_an_export_over_tls(area):
    """qemu-io with its own TLS reads and writes; without TLS or without a certificate it does not."""
    if shutil.which("qemu-io") is None:
        raise CannotRun("qemu-io is not installed")
    folder = certificates(area)
    server = Exported(area, "disk", tcp=True, tls=folder, options=["--any-writer"])
    server.start()
    creds = f"tls-creds-x509,id=tls,endpoint=client,verify-peer=yes,dir={folder}"
    where = f"driver=nbd,host=127.0.0.1,port={server.port},export=m"

    def qemu_io(options, image):
        words = ["-c", "write -P 7 1M 8M", "-c", "flush", "-c", "read -P 7 1M 8M"]
        done = subprocess.run(["qemu-io", *options, "--image-opts", *words, image], check=False,
                              capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr

    code, said = qemu_io(["--object", creds], f"{where},tls-creds=tls")
    check(code == 0 and "read 8388608" in said, f"qemu-io ended with {code}: {said}")
    code, said = qemu_io([], where)
    check(code != 0 and "TLS" in said, f"qemu-io without TLS ended with {code}: {said}")
    server.stop()
    with open(server.backing, "rb") as disk:
        disk.seek(MIB)
        check(disk.read(8 * MIB) == b"\7" * (8 * MIB), "what was written is not on the disk")


def who_is_not_meant_is_not_let_in(area):
    """Another authority's clients, other names, no TLS; and servers that are not who was meant."""
    folder, other = certificates(area), certificates(area, "other")
    server = Exported(area, "peer", tcp=True, tls=folder, options=["--tls-client", "client.example"])
    server.start()

    def said(address, command="examine", code=FAILED):
        return area.ctl(command, address, code=code)

    plain = f"nbd://127.0.0.1:{server.port}/m"
    check("write nbds://" in said(plain), "plain text is not refused by name")
    secured = f"nbds://127.0.0.1:{server.port}/m?tls-certificates="
    check("is not signed by the authority" in said(secured + other), "another authority's server")
    check("ca-cert.pem cannot be read" in said(secured + "/absent"), "no certificates")
    # Ours is who the server is not told of, or has another authority's signature.
    stranger = certificates(area, "stranger", client="stranger.example")
    shutil.copy(f"{folder}/ca-cert.pem", stranger)
    check("authority that signed our certificate" in (answer := said(secured + stranger)), answer)
    subprocess.run(["cp", f"{folder}/ca-key.pem", f"{folder}/ca-cert.pem", stranger], check=True)
    subprocess.run([CERTIFICATES, stranger, "127.0.0.1", "stranger.example"], check=True, timeout=60)
    answer = said(secured + stranger)
    check("does not accept our certificate, or the name in it" in answer, answer)
    # Who is meant gets through: there is no superblock yet.
    check("TLS" not in said(secured + folder, code=NOT_FOUND), "the right client is refused")
    # A server whose certificate is another host's.
    elsewhere = area.file("elsewhere")
    shutil.copytree(folder, elsewhere)
    subprocess.run([CERTIFICATES, elsewhere, "elsewhere.example", "client.example"], check=True, timeout=60)
    wrong = Exported(area, "wrong", tcp=True, tls=elsewhere)
    wrong.start()
    answer = said(f"nbds://127.0.0.1:{wrong.port}/m?tls-certificates={folder}")
    check("not valid for name" in answer, answer)


def what_makes_no_sense_about_tls_is_refused(area):
    """Words that do not fit, folders that are not there."""
    disk, folder = area.file("disk.img"), certificates(area)
    with open(disk, "wb") as file:
        file.truncate(16 * MIB)

    def refused(*words, code):
        return area.ctl("export", disk, *words, code=code)

    answer = refused("--listen", "0.0.0.0:0", code=REFUSED)
    check("--tls FOLDER" in answer, answer)
    answer = refused("--listen", "127.0.0.1:0", "--tls", "/absent", code=FAILED)
    check("/absent/ca-cert.pem cannot be read" in answer, answer)
    answer = refused("--listen", f"unix:{area.file('s')}", "--tls", folder, code=USAGE)
    check("leave --tls out" in answer, answer)
    answer = refused("--listen", "127.0.0.1:0", "--tls", folder, "--tls-client", "a b", code=FAILED)
    check("a b is no name" in answer, answer)
    refused("--listen", "127.0.0.1:0", "--tls-client", "a", code=USAGE)
    answer = area.ctl("examine", "nbds+unix:///m?socket=/s", code=USAGE)
    check("nobody can listen in on" in answer, answer)


def a_connection_that_breaks_under_tls_is_taken_up_again(area):
    """Cut, and tampered with: another session takes over, and nobody notices."""
    server = Exported(area, "peer", tcp=True, tls=certificates(area))
    between = Between(area, server)
    local, model = _mirror(area, server, between.address)
    seen, rng = [], area.random

    def flips(data):
        """One byte of what passes next changes on the way."""
        between.tamper = None
        at = rng.randrange(len(data))
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1:]

    def breaks():
        between.cut(at_once=True)
        between.mend()

    def tampers():
        between.tamper = flips

    with area.client() as client:
        for number in range(10):
            before = between.connections
            acked = model.load(client, rng, writes=300, depth=32,
                               meanwhile=breaks if number % 2 else tampers)
            check(acked == 300, f"{acked} of 300 writes were acknowledged")
            client.flush()
            check(area.states() == ["in-sync", "in-sync"], f"states are {area.states()}")
            check(between.connections > before, "nothing was connected anew")
        # Nothing that is written can be read on the way.
        secret = b"nobody reads this on the way    " * (BLOCK // 32)
        between.tamper = lambda data: (seen.append(data), data)[1]
        client.write(0, secret)
        client.flush()
        between.tamper = None
        passed = b"".join(seen)
        check(len(passed) > BLOCK and secret[:32] not in passed, "it went in plain text")
    area.stop()
    area.compare([local, server.backing])


