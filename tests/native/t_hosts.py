"""Three hosts, and two hosts with two links between them, as in `t_partitions.py`."""

import json
import shutil
import subprocess
from types import SimpleNamespace

from harness import BLOCK, FAILED, MIB, CannotRun, Load, Model, check, until
from netns import LOSSY, RESET, SILENT, UNREACHABLE, Far, Network

SIZE = 16 * MIB
BLOCKS = SIZE // BLOCK
DEADLINE = 1
OPTIONS = ("--deadline", str(DEADLINE), "--returns", "60")
SLACK = 1


def _begin(area, members, options=OPTIONS):
    area.ctl("create", "m", *(word for at in members for word in ("--member", at)), "--size", "16M")
    area.start(members, options=options)


def _three(area, local=True):
    """A host that has the mirror, with a member or none, and two that have one each."""
    network = Network(area)
    here, *nodes = (network.host() for _ in range(3))
    links = [network.link(here, node) for node in nodes]
    here.becomes(area)
    fars = [Far(area, node) for node in nodes]
    for far in fars:
        far.start()
    paths = [area.file("local.img")] if local else []
    _begin(area, paths + [link.address(node) for link, node in zip(links, nodes)])
    return SimpleNamespace(here=here, nodes=nodes, links=links, fars=fars, model=Model(BLOCKS),
                           disks=paths + [far.backing for far in fars])


def _are(area, *states):
    until(lambda: area.states() == list(states), f"states are not {states}")


def _are_alike(area, it):
    with area.client() as client:
        it.model.check(client)
    area.stop()
    for far in it.fars:
        far.stop()
    said = area.ctl("check", *it.disks)
    check("nothing is wrong" in said, said)
    area.compare(it.disks)


def one_of_three_hosts_after_the_other(area):
    """Each is cut off, in one direction and in both; who is left goes on, and both come back."""
    it = _three(area)
    (first, second), (_, far) = it.links, it.nodes
    with Load(area, it.model) as load:
        load.goes_on()
        first.cut(SILENT)
        _are(area, "in-sync", "faulty", "in-sync")
        load.goes_on()
        second.cut(SILENT, far)
        _are(area, "in-sync", "faulty", "faulty")
        load.goes_on()
        second.mend()
        first.mend()
        _are(area, "in-sync", "in-sync", "in-sync")
        load.goes_on()
    check(load.errors == 0 and load.longest < DEADLINE + SLACK, f"{load.errors} errors, {load.longest:.2f} s")
    _are_alike(area, it)


def all_peers_are_cut(area):
    """Nobody is lost for what all share: requests fail some time, and are served when a link is back."""
    it = _three(area, local=False)
    with Load(area, it.model) as load:
        load.goes_on()
        for link in it.links:
            link.cut(UNREACHABLE)
        until(lambda: load.errors, "nothing fails")
        for link in it.links:
            link.mend()
        until(lambda: _serves(area, load), "nothing is served")
        _are(area, "in-sync", "in-sync")
    check(load.longest < 6 * DEADLINE, f"a request took {load.longest:.2f} s to fail")
    _are_alike(area, it)


def _serves(area, load):
    """A hundred requests in a row do not fail."""
    if area.status()["flush-error"]:
        # Nobody knows what became of the flush: the operator's word.
        area.ctl("clear-flush-error", "m", code=(0, FAILED))
    before = load.errors
    load.goes_on()
    return load.errors == before


def _fio(area, seconds):
    """fio writes the second half and reads it back meanwhile and at the end: the process."""
    uri = f"nbd+unix:///m?socket={area.run_dir}/m.nbd"
    command = ["fio", "--name=v", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bs=4k",
               f"--offset={SIZE // 2}", f"--size={SIZE // 2}", "--iodepth=8", "--verify=crc32c",
               "--verify_backlog=64", "--verify_fatal=1", "--time_based", f"--runtime={seconds}",
               "--output-format=json"]
    if shutil.which("fio") is None:
        raise CannotRun("fio is not installed")
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            cwd=area.path)


def another_link_is_taken_when_one_is_cut(area):
    """Under fio with verify and a load that is checked: no request takes 3 s, none is lost."""
    network = Network(area)
    here, there = network.host(), network.host()
    links = [network.link(here, there) for _ in range(2)]
    here.becomes(area)
    far, local = Far(area, there), area.file("local.img")
    far.start()
    addresses = [link.address(there) for link in links]
    _begin(area, [local, addresses[0]], ("--path", addresses[1]))
    events = area.status()["event-count"]
    # Half of the device is fio's.
    model = Model(BLOCKS // 2)
    fio = _fio(area, 4)
    area.children.append(fio)
    with Load(area, model) as load:
        cuts = ((0, SILENT, here), (1, SILENT, there), (0, RESET, None))
        for number, how, towards in cuts:
            load.goes_on(50)
            links[number].cut(how, towards)
            links[number].until_caught()
            load.goes_on(50)
            links[number].mend()
        said, _ = fio.communicate(timeout=60)
    check(fio.returncode == 0, f"fio ended with {fio.returncode}: {said[-500:]}")
    job = json.loads(said[said.index("{"):])["jobs"][0]
    longest = max(load.longest, *(job[kind]["clat_ns"]["max"] / 1e9 for kind in ("read", "write")))
    check(job["error"] == 0 and job["write"]["total_ios"] > 0, f"{job['error']}")
    check(load.errors == 0 and longest < 3, f"{load.errors} errors, a request took {longest:.2f} s")
    check(area.status()["event-count"] == events, "a member was lost")
    print(f"    three cuts: the longest request took {longest:.2f} s")
    it = SimpleNamespace(model=model, fars=[far], disks=[local, far.backing])
    _are_alike(area, it)


def a_bad_link_loses_nothing(area):
    """One packet in twenty is lost in each direction; and, where the kernel can, late, twice, and out
    of order."""
    it = _three(area)
    for link in it.links:
        link.trouble("delay", "2ms", "1ms", "reorder", "20%", "duplicate", "5%")
        link.cut(LOSSY)
    with Load(area, it.model) as load:
        load.goes_on(300)
    for link in it.links:
        link.mend()
    until(lambda: set(area.states()) == {"in-sync"}, "who was lost does not come back")
    check(load.errors == 0 and load.longest < DEADLINE + SLACK, f"{load.errors} errors, {load.longest:.2f} s")
    _are_alike(area, it)
