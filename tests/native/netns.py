"""Hosts that are network namespaces of this machine, and links between them that can be cut.

Nothing of it is in the machine's own namespace, and nothing has a name that others could have too:
a namespace is held by a process that ends with this one, and with the last process in it go its ends
of the links and its rules.
"""

import os
import shutil
import subprocess

from harness import CannotRun, Failed, Host, until
from servers import Exported

PORT = 10809
# What becomes of packets that arrive, as nftables says it. Nothing; a reset or "unreachable" for who
# has sent them; the same for those that carry data, so that a connection comes up; one in twenty lost.
SILENT = "drop"
RESET = "tcp flags & rst == 0 reject with tcp reset"
UNREACHABLE = "meta l4proto tcp reject with icmp type host-unreachable"
DATA_SILENT = "tcp flags & psh == psh drop"
DATA_RESET = "tcp flags & psh == psh reject with tcp reset"
LOSSY = "numgen random mod 20 == 0 drop"


def longer_than(length):
    """Packets of more bytes are lost."""
    return f"meta length > {length} drop"


def _run(command, said=None):
    done = subprocess.run(command, input=said, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode != 0:
        raise Failed(f"'{' '.join(command)}' ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


class Network:
    """Hosts and the links between them; they end with the area."""

    def __init__(self, area):
        for program in ("unshare", "nsenter", "ip", "nft"):
            if shutil.which(program) is None:
                raise CannotRun(f"{program} is not installed")
        if os.geteuid() != 0:
            raise CannotRun("only root can make network namespaces")
        self.nodes, self.links = [], []
        area.children.append(self)

    def host(self):
        """One more."""
        self.nodes.append(Node())
        return self.nodes[-1]

    def link(self, one, other):
        """A cable between two hosts."""
        self.links.append(Link(one, other, len(self.links)))
        return self.links[-1]

    def kill(self):
        """Lets go of all."""
        for node in self.nodes:
            node.holder.kill()
            node.holder.wait(30)


class Node:
    """A host: what is run with `enter` before it is run there."""

    def __init__(self):
        # It ends when its input does, which is with this process if not before.
        self.holder = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE,
                                       stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        self.namespace = f"/proc/{self.holder.pid}/ns/net"
        self.enter = ["nsenter", f"--net={self.namespace}", "--"]
        self.rules = {}
        own = os.readlink("/proc/self/ns/net")

        def is_there():
            if self.holder.poll() is not None:
                raise CannotRun(f"no network namespace is to be had: {self.holder.stderr.read()}")
            return os.readlink(self.namespace) != own

        until(is_there, "there is no network namespace")
        self.run("ip", "link", "set", "lo", "up")

    def run(self, *command, said=None):
        """Runs a command there: what it printed."""
        return _run([*self.enter, *command], said)

    def receives(self, device, what):
        """What becomes of what arrives at a device from now on; with none all arrives."""
        self.rules[device] = what
        rules = [f'iifname "{name}" {_counted(rule)}\n' for name, rule in self.rules.items() if rule]
        chain = f"chain arrives {{\ntype filter hook input priority 0\n{''.join(rules)}}}"
        # In one go: no packet passes while there are no rules.
        anew = f"table inet cut\ndelete table inet cut\ntable inet cut {{\n{chain}\n}}\n"
        self.run("nft", "-f", "-", said=anew)

    def caught(self):
        """How many packets the rules of now have caught."""
        if not self.rules:
            return 0
        words = self.run("nft", "list", "table", "inet", "cut").split()
        return sum(int(words[at + 1]) for at, word in enumerate(words) if word == "packets")

    def listens(self):
        """Whether anybody there listens on the port."""
        with open(f"/proc/{self.holder.pid}/net/tcp", encoding="ascii") as table:
            lines = [line.split() for line in table.readlines()[1:]]
        return any(line[1].endswith(f":{PORT:04X}") and line[3] == "0A" for line in lines)

    def becomes(self, host):
        """Everything that an area does is done there."""
        host.wrapper = self.enter
        return host


def _counted(rule):
    """The verdict is the last part of a rule, and what is counted comes before it."""
    verdict = "reject" if "reject" in rule else "drop"
    match, _, rest = rule.partition(verdict)
    return f"{match}counter {verdict}{rest}"


class Link:
    """A veth pair between two hosts."""

    def __init__(self, one, other, number):
        self.device = f"link{number}"
        self.at = {one: f"192.0.2.{4 * number + 1}", other: f"192.0.2.{4 * number + 2}"}
        one.run("ip", "link", "add", self.device, "type", "veth", "peer", "name", self.device,
                "netns", str(other.holder.pid))
        for node, address in self.at.items():
            node.run("ip", "address", "add", f"{address}/30", "dev", self.device)
            node.run("ip", "link", "set", self.device, "up")

    def cut(self, how=SILENT, towards=None):
        """What becomes of packets, in one direction or in both."""
        for node in [towards] if towards else self.at:
            node.receives(self.device, how)

    def mend(self):
        """All arrives."""
        for node in self.at:
            node.receives(self.device, None)

    def pull(self, node):
        """The cable is out."""
        node.run("ip", "link", "set", self.device, "down")

    def plug(self, node):
        """It is in again."""
        node.run("ip", "link", "set", self.device, "up")

    def until_caught(self):
        """Until a rule has caught something."""
        until(lambda: any(node.caught() for node in self.at), "nothing was sent")

    def trouble(self, *words):
        """netem on both ends, where the kernel has it."""
        for node in self.at:
            command = [*node.enter, "tc", "qdisc", "replace", "dev", self.device, "root", "netem", *words]
            if subprocess.run(command, capture_output=True, timeout=30, check=False).returncode != 0:
                print(f"    this kernel has no netem: tried without {' '.join(words)}")
                return

    def address(self, node):
        """Of the export of a host, for mirrorctl."""
        return f"nbd://{self.at[node]}/m"


class Far(Exported):
    """Our own export server on another host, which is an area of its own."""

    def __init__(self, area, node, name="peer"):
        self.node, self.host = node, node.becomes(Host(area))
        super().__init__(self.host, name, options=["--plain-text-on-network"])

    def command(self):
        words = super().command()
        words[words.index("--listen") + 1] = f"0.0.0.0:{PORT}"
        return [*self.node.enter, *words]

    def _listens(self):
        return self.node.listens()
