"""Peer members: exports of other people's servers, which die, hang, and of one that lies."""

import os
import shutil
import signal

import nbd
from harness import (
    BLOCK, BUSY, EXTENT, FAILED, MIB, NOT_FOUND, REFUSED, USAGE, Failed, Model, check, until,
)
from servers import (
    SIZE, Exported, Nbdkit, NbdServer, QemuNbd, Scripted, dies_and_returns, free_port,
)

BLOCKS = 64 * MIB // BLOCK


def _make(area, *members, options=()):
    """Creates and starts a mirror; its model."""
    words = [word for member in members for word in ("--member", member)]
    area.ctl("create", "m", *words, "--size", "64M")
    area.start(members, options=options)
    check(set(area.states()) == {"in-sync"}, f"states are {area.states()}")
    return Model(BLOCKS)


def _member(area, slot):
    return area.status()["members"][slot]


def nbdkit_dies_on_a_unix_socket(area):
    """nbdkit, unix."""
    dies_and_returns(area, Nbdkit(area, "peer"))


def nbdkit_dies_over_tcp(area):
    """nbdkit, TCP."""
    dies_and_returns(area, Nbdkit(area, "peer", tcp=True))


def qemu_nbd_dies_on_a_unix_socket(area):
    """qemu-nbd, unix."""
    dies_and_returns(area, QemuNbd(area, "peer"))


def qemu_nbd_dies_over_tcp(area):
    """qemu-nbd, TCP."""
    dies_and_returns(area, QemuNbd(area, "peer", tcp=True))


def nbd_server_dies_on_a_unix_socket(area):
    """nbd-server, unix."""
    dies_and_returns(area, NbdServer(area, "peer"))


def nbd_server_dies_over_tcp(area):
    """nbd-server, TCP."""
    dies_and_returns(area, NbdServer(area, "peer", tcp=True))


def our_server_dies_on_a_unix_socket(area):
    """mirrorctl export, unix."""
    dies_and_returns(area, Exported(area, "peer"))


def our_server_dies_over_tcp(area):
    """mirrorctl export, TCP."""
    dies_and_returns(area, Exported(area, "peer", tcp=True))


def a_mirror_of_peers_only(area):
    """No local member at all; found again by what was last seen."""
    servers = [Nbdkit(area, "a"), QemuNbd(area, "b", tcp=True), NbdServer(area, "c", tcp=True)]
    for server in servers:
        server.start()
    model = _make(area, *[server.address for server in servers])
    with area.client() as client:
        model.load(client, area.random, writes=1000)
        model.check(client)
    area.stop()
    area.ctl("start", "m", "--front", "nbd")
    check(area.states() == ["in-sync"] * 3, f"states are {area.states()}")
    with area.client() as client:
        model.check(client)
        model.load(client, area.random, writes=500, meanwhile=servers[0].kill)
        model.load(client, area.random, writes=500, meanwhile=servers[2].kill)
        check(area.states() == ["faulty", "in-sync", "faulty"], f"states are {area.states()}")
        model.check(client)


def a_daemon_that_died_leaves_ghosts(area):
    """After an unclean end the peer is used only by the operator's word (R13)."""
    local, server = area.file("local.img"), Nbdkit(area, "peer")
    server.start()
    model = _make(area, local, server.address)
    with area.client() as client:
        model.load(client, area.random, writes=2000, meanwhile=area.kill_daemons)
    said = area.start([local, server.address], code=REFUSED)
    for want in (server.address, "--peer-sessions-over", "slot 1"):
        check(want in said, f"{want} is not named: {said}")
    said = area.start([server.address], code=REFUSED)
    check("--peer-sessions-over" in said, f"the option is not named: {said}")
    area.start([local, server.address], options=("--peer-sessions-over",))
    check(area.states() == ["in-sync", "in-sync"], f"states are {area.states()}")
    with area.client() as client:
        area.wait_equal()
        model.check(client)
        model.load(client, area.random, writes=200)
        area.pull(0)
        model.check(client)
        area.put_back(local)
    area.stop()
    area.compare([local, server.backing])
    # A clean end needs nobody.
    area.start([local, server.address])
    check(area.states() == ["in-sync", "in-sync"], f"states are {area.states()}")


def a_lost_peer_does_not_return_by_itself(area):
    """Neither while the mirror runs nor at its next start, though its server is back."""
    local, server = area.file("local.img"), Nbdkit(area, "peer", tcp=True)
    server.start()
    model = _make(area, local, server.address)
    with area.client() as client:
        model.load(client, area.random, writes=300, meanwhile=server.kill)
        server.start()
        model.load(client, area.random, writes=300)
        check(area.states() == ["in-sync", "faulty"], f"states are {area.states()}")
    area.stop()
    area.start([local, server.address])
    check(area.states() == ["in-sync", "faulty"], f"states are {area.states()}")
    with area.client() as client:
        model.check(client)
        resync = area.put_back(server.address)
        check(resync["kind"] == "delta", f"a {resync['kind']} resync")
    area.stop()
    area.compare([local, server.backing])


def a_peer_that_is_not_there_is_waited_for(area):
    """No start without a peer that may be newer; --force does, and it comes back."""
    local, server = area.file("local.img"), QemuNbd(area, "peer", tcp=True)
    server.start()
    model = _make(area, local, server.address)
    with area.client() as client:
        model.load(client, area.random, writes=300)
    area.stop()
    server.kill()
    said = area.start([local, server.address], code=REFUSED)
    check("slot 1" in said and "cannot be reached" in said, f"not said: {said}")
    area.start([local, server.address], options=("--force",))
    check(area.states() == ["in-sync", "missing"], f"states are {area.states()}")
    with area.client() as client:
        model.load(client, area.random, writes=200)
        server.start()
        resync = area.put_back(server.address)
        check(resync["kind"] == "delta", f"a {resync['kind']} resync: {resync['reason']}")
    area.stop()
    area.compare([local, server.backing])


def peers_are_found_by_what_a_member_says(area):
    """Without hints, the superblock of a local member leads to the peer; a scan does as well."""
    os.mkdir(area.file("disks"))
    local, server = area.file("disks/local.img"), Nbdkit(area, "peer")
    server.start()
    _make(area, local, server.address)
    area.stop()
    for words in (("start", "m", "--scan"), ("assemble", "--scan")):
        shutil.rmtree(area.run_dir)
        area.ctl(*words, area.file("disks"), "--front", "nbd")
        check(area.states() == ["in-sync", "in-sync"], f"states are {area.states()}")
        area.stop()
    shutil.rmtree(area.run_dir)
    area.ctl("assemble", "--scan", server.address, local, "--front", "nbd")
    check(area.states() == ["in-sync", "in-sync"], f"states are {area.states()}")


def a_server_that_hangs_costs_the_deadline(area):
    """It is lost, the mirror goes on, and its connection is let go of when it is removed."""
    local, server = area.file("local.img"), Nbdkit(area, "peer", tcp=True)
    server.start()
    model = _make(area, local, server.address, options=("--deadline", "2"))
    with area.client() as client:
        model.load(client, area.random, writes=500)
        server.signal(signal.SIGSTOP)
        acked = model.load(client, area.random, writes=1000, depth=32)
        check(acked == 1000, f"{acked} of 1000 writes were acknowledged")
        check(area.states() == ["in-sync", "faulty"], f"states are {area.states()}")
        check(_member(area, 1)["orphans"] > 0, "nothing is outstanding")
        server.kill()
        until(lambda: _member(area, 1)["orphans"] == 0, "the orphans do not end with the server")
        server.start()
        resync = area.put_back(server.address)
        check(resync["kind"] == "delta", f"a {resync['kind']} resync")
        model.check(client)
    area.stop()
    area.compare([local, server.backing])


def _misbehaves(area, how, act, reads=False):
    """A server that lies is lost, durably, and comes back when it serves well again."""
    server, local = Scripted(area, "peer"), area.file("local.img")
    held = local
    if reads:
        # A member of this machine would be asked instead.
        other = Exported(area, "other")
        other.start()
        local, held = other.address, other.backing
    model = _make(area, server.address, local, options=("--deadline", "2"))
    with area.client() as client:
        model.load(client, area.random, writes=500)
        client.flush()
        server.misbehave(how)
        act(model, client)
        check(server.done.is_set(), "the server had no occasion")
        until(lambda: area.states() == ["faulty", "in-sync"], f"states are {area.states()}")
        asked = server.asked
        model.check(client)
        model.load(client, area.random, writes=300)
        check(how == "silent" or server.asked == asked, "the lost member was asked something")
        model.check(client)
        if how == "silent":
            check(_member(area, 0)["orphans"] > 0, "nothing is outstanding")
            # Its connection lives, and what was asked may still happen.
            server.how = None
            said = area.ctl("re-add", "m", server.address, code=BUSY)
            check("owes" in said, f"not said that it owes answers: {said}")
            area.ctl("remove", "m", server.address)
        server.behave()
    area.kill_daemons()
    area.start([local])
    check(area.states()[1] == "in-sync", f"states are {area.states()}")
    with area.client() as client:
        model.check(client)
        resync = area.put_back(server.address)
        check(resync["kind"] == "delta", f"a {resync['kind']} resync: {resync['reason']}")
        area.pull(1)
        model.check(client)
        area.put_back(local)
    area.stop()
    copy = area.file("copy.img")
    with open(copy, "wb") as file:
        file.write(server.data)
    area.compare([copy, held])


def _write(area):
    return lambda model, client: model.load(client, area.random, writes=500)


def a_server_that_sends_garbage_is_lost(area):
    """Bytes that are no reply."""
    _misbehaves(area, "garbage", _write(area))


def a_server_that_closes_in_a_reply_is_lost(area):
    """Half of a read's data; the read is answered by the other member."""
    _misbehaves(area, "half", lambda model, client: model.check(client), reads=True)


def a_server_that_answers_twice_is_lost(area):
    """The second reply to a write."""
    _misbehaves(area, "twice", _write(area))


def a_server_that_closes_is_lost(area):
    """The end of the connection, in the middle of a load."""
    _misbehaves(area, "close", _write(area))


def a_server_that_never_answers_is_lost(area):
    """The deadline; what is outstanding ends when the operator lets go of the member."""
    _misbehaves(area, "silent", _write(area))


def a_server_that_fails_writes_is_lost(area):
    """An error is an answer: the connection lives, the member is lost."""
    local, trigger = area.file("local.img"), area.file("fail")
    server = Nbdkit(area, "peer")
    server.options = ["--filter=error", "file", server.backing, "error=EIO",
                      "error-pwrite-rate=100%", f"error-file={trigger}"]
    server.start()
    model = _make(area, local, server.address)
    with area.client() as client:
        model.load(client, area.random, writes=200)
        with open(trigger, "wb"):
            pass
        model.load(client, area.random, writes=200)
        check(area.states() == ["in-sync", "faulty"], f"states are {area.states()}")
        os.unlink(trigger)
        area.put_back(server.address)
        model.check(client)
    area.stop()
    area.compare([local, server.backing])


def limits_of_a_server_are_kept(area):
    """No FUA, no WRITE_ZEROES, no TRIM, blocks of 4096, payloads of 64 KiB: all works."""
    local, server = area.file("local.img"), Nbdkit(area, "peer")
    server.options = ["--filter=fua", "--filter=nozero", "--filter=blocksize-policy",
                      "file", server.backing, "zeromode=none",
                      "blocksize-minimum=4096", "blocksize-preferred=8192",
                      "blocksize-maximum=64K", "blocksize-error-policy=error"]
    server.start()
    model = _make(area, local, server.address)
    check(area.status()["logical-block-bytes"] == 4096, "the server's smallest request is larger")
    with area.client() as client:
        model.load(client, area.random, writes=500)
        for begin in range(1, 4096, 512):
            model.write(client, begin, 384, nbd.FUA)
        client.zero(3 * EXTENT + 5 * BLOCK, MIB)
        zeroed = range(3 * EXTENT // BLOCK + 5, 3 * EXTENT // BLOCK + 5 + MIB // BLOCK)
        for number in zeroed:
            model.legal[number] = {0}
        check(area.states() == ["in-sync", "in-sync"], f"states are {area.states()}")
        area.pull(0)
        model.check(client)
        area.put_back(local)
    area.stop()
    area.compare([local, server.backing])
    # The same without FUA from our own server, which looks at the flags.
    area.ctl("destroy", "m")
    plain = Scripted(area, "plain", flags=1 | nbd.FLAG_FLUSH, sizes=(512, 512, 4096))
    model = _make(area, local, plain.address)
    with area.client() as client:
        model.write(client, 7, 200, nbd.FUA)
        area.pull(0)
        model.check(client)


def exports_that_cannot_hold_a_member_are_refused(area):
    """Read-only, without FLUSH, too small, of large blocks, none of that name; nothing is made."""
    local = area.file("local.img")

    def refused(address, code, *wants):
        words = ["create", "m", "--member", local, "--member", address, "--size", "64M"]
        said = area.ctl(*words, code=code)
        for want in wants:
            check(want in said, f"{want!r} is not in: {said}")
        check(not os.path.exists(local), "an image file was left")

    server = Nbdkit(area, "read-only")
    server.options = ["-r", "file", server.backing]
    server.start()
    refused(server.address, REFUSED, server.address, "read-only")
    said = area.ctl("examine", server.address, code=NOT_FOUND)
    check("not a member" in said, f"it cannot even be looked at: {said}")
    server = Nbdkit(area, "no-flush")
    server.options = ["eval", f"get_size=echo {SIZE}", "pread=head -c $3 /dev/zero",
                      "pwrite=cat >/dev/null"]
    server.start()
    refused(server.address, REFUSED, server.address, "FLUSH")
    for size in (MIB, 40 * MIB):
        server = QemuNbd(area, f"small-{size}", size=size)
        server.start()
        refused(server.address, USAGE, server.address)
    server = Scripted(area, "large-blocks", sizes=(8192, 8192, MIB))
    refused(server.address, REFUSED, "8192")
    server = NbdServer(area, "named", tcp=True)
    server.start()
    refused(server.address + "x", NOT_FOUND, "no such export")
    refused(f"nbd://127.0.0.1:{free_port()}/m", FAILED, "cannot be reached")
    refused("nbds+unix:///m?socket=/s", USAGE, "TLS")
    refused("nbds://127.0.0.1/m?tls-certificates=/absent", FAILED, "TLS needs the certificates")
    refused("nbd://127.0.0.1/" + "e" * 128, USAGE, "128")
    server = Scripted(area, "other", greeting=b"SSH-2.0-OpenSSH_9.2p1 Debian-2")
    refused(server.address, FAILED, server.address, "no NBD server")


def what_a_peer_holds_is_not_overwritten_unasked(area):
    """Signatures are probed by reading; two ways to one disk are found out."""
    local, server = area.file("local.img"), Nbdkit(area, "peer", tcp=True)
    server.start()
    with open(server.backing, "r+b") as file:
        file.seek(0x438)
        file.write(b"\x53\xef")
    words = ["create", "m", "--member", local, "--member", server.address, "--size", "64M"]
    said = area.ctl(*words, code=REFUSED)
    check("ext4" in said and server.address in said, f"not named: {said}")
    area.ctl(*words, "--force")
    said = area.ctl(*words[:2], "--member", area.file("x.img"), *words[4:], code=REFUSED)
    check("slot 1" in said, f"the member of another mirror is not named: {said}")
    area.start([local, server.address])
    # A mirror that runs with an export cannot be told over NBD, but that it may.
    said = area.ctl("destroy", server.address, code=REFUSED)
    check("--force" in said and "running" in said, f"not refused for that: {said}")
    area.stop()
    area.ctl("destroy", server.address)
    area.ctl("examine", server.address, code=NOT_FOUND)
    twin = server.address.replace("127.0.0.1", "localhost")
    said = area.ctl("create", "t", "--member", twin, "--member", server.address, "--size", "64M",
                    code=REFUSED)
    check("same disk" in said, f"not said that they are one: {said}")


def a_peer_takes_an_empty_slot(area):
    """`add` with an address: a full resync of what is written, and the peer alone has it."""
    paths = area.make()
    server = QemuNbd(area, "peer")
    server.start()
    model = Model(BLOCKS)
    with area.client() as client:
        model.load(client, area.random, writes=500)
        area.pull(1)
        os.unlink(paths[1])
        area.ctl("add", "m", server.address, "--dry-run")
        area.ctl("add", "m", server.address)
        area.ctl("wait", "m", "--timeout", 90)
        check(_member(area, 1)["unfenced"], "not shown as unfenced")
        check(_member(area, 1)["scrub-reads-all"], "who tells it checksums?")
        area.pull(0)
        model.check(client)
        area.put_back(paths[0])
        area.ctl("fail", "m", server.address)
        area.ctl("remove", "m", server.address)
        check(not _member(area, 1)["attached"], "its connection is still there")
        area.put_back(server.address)
    area.stop()
    area.compare([paths[0], server.backing])
    if area.examine(server.address)["slots"][1]["address"] != server.address:
        raise Failed("the address is not in the superblock")
