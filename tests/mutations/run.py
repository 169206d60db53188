#!/usr/bin/env python3
"""Breaks the engine in one place at a time and expects the suite to notice.

Usage: tests/mutations/run.py [--check] [--record] [--histories N] [NAME...]

--check       only look whether every mutation still applies exactly once, in a function
--record      write into mutations.toml who caught what (`by`), to be asked first the next time
--histories   how many `cargo sim` plays of what the tests let through (default 1000)
NAME          only these

All mutations are compiled at once: a function that has some begins with a branch for each of
them, which is the whole function once more with that one change, and MUTANT=N chooses
(mutant_switch.rs). One that cannot be compiled so says `alone = true` and is compiled by itself.

Works in a copy of the tree under MUTATION_DIR (default .cache/mutations), so nothing here is
touched. Stops at the first test or seed that fails: that is who caught it. A suite that does
not end within ten minutes, or does not compile, is an error and not a catch; the others are
tried all the same.
"""

import argparse
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections import defaultdict
from pathlib import Path

sys.dont_write_bytecode = True

from tree import ROOT, names, put, put_switch, with_switch

AREA = Path(os.environ.get("MUTATION_DIR", ROOT / ".cache/mutations"))
TREE = AREA / "tree"
LIST = ROOT / "tests/mutations/mutations.toml"
LIMIT_SECONDS = 600
MEMORY_BYTES = 12 << 30
ENGINE_TESTS = ["-p", "ublk-mirror-tests", "-p", "mirror", "-p", "dirty-map", "--test", "sim", "--lib"]
NETWORK_TESTS = ["-p", "peer", "-p", "export", "-p", "ublk-target"]
NETWORK_CRATES = ("peer/", "export/", "ublk-target/")
# Links and the export server are simulated too; the daemon's own parts are not.
SIMULATED_TESTS = [*NETWORK_TESTS, "-p", "ublk-mirror-tests", "--test", "sim", "--lib", "--bin", "ublk-mirror"]
SIMULATED_CRATES = ("peer/", "export/")
SIMULATOR = ["-p", "ublk-mirror-tests", "--bin", "sim", "--profile", "sim"]
ENVIRONMENT = dict(
    os.environ,
    CARGO_TARGET_DIR=str(AREA / "target"),
    # What a mutation leaves unused is no error.
    RUSTFLAGS="--cap-lints allow",
    # As .cargo/config.toml has it for what cargo runs.
    MALLOC_MMAP_THRESHOLD_="1073741824",
    MALLOC_TRIM_THRESHOLD_="1073741824",
)


# --- Where mutations go ------------------------------------------------------------------------


def load():
    return tomllib.loads(LIST.read_text())["mutation"]


def body_around(text, place):
    """The inside of the body of the function around `place`, as a range; None outside of any, and
    in one that the compiler may evaluate. Knows Rust as rustfmt prints it."""
    heads = re.finditer(r"^( *)(?:pub(?:\([^)]*\))? )?((?:const |async |unsafe )*)fn \w+", text, re.M)
    for head in reversed([head for head in heads if head.start() <= place]):
        start = re.compile(r"\{$", re.M).search(text, head.end()).end() + 1
        end = re.compile(rf"^{head[1]}\}}$", re.M).search(text, start).start()
        if start <= place < end:
            return None if "const" in head[2] else (start, end)
    return None


def misfits(mutations):
    for mutation in mutations:
        text = (ROOT / mutation["file"]).read_text()
        found = text.count(mutation["old"])
        if found != 1:
            yield f"{mutation['name']}: `old` occurs {found} times in {mutation['file']}"
        elif not mutation.get("alone") and not body_around(text, text.index(mutation["old"].lstrip())):
            yield f"{mutation['name']}: `old` is in no function; say `alone = true`"


def merged(text, mutations):
    """The source with a branch for each of these (by number) at the begin of its function."""
    bodies = defaultdict(list)
    for number, mutation in mutations.items():
        old, new = mutation["old"], mutation["new"]
        place = text.index(old)
        start, end = body_around(text, text.index(old.lstrip(), place))
        if place < start or place + len(old) > end:
            sys.exit(f"{mutation['name']}: `old` leaves its function; say `alone = true`")
        changed = text[start:place] + new + text[place + len(old):end]
        bodies[start, end].append(f"if mutant_switch::on({number}) {{\n{changed}}} else ")
    for (start, end), branches in sorted(bodies.items(), reverse=True):
        text = text[:start] + "".join(branches) + "{\n" + text[start:end] + "}\n" + text[end:]
    return text


def put_tree(mutations):
    """The tree, with these mutations (by number) and the switch as one more crate."""
    files = defaultdict(dict)
    for number, mutation in mutations.items():
        files[mutation["file"]][number] = mutation
    manifests = {f"{file.split('/')[0]}/Cargo.toml" for file in files}
    for name in names():
        content = (ROOT / name).read_bytes()
        if name in manifests:
            content = with_switch(content)
        if name in files:
            content = merged(content.decode(), files[name]).encode()
        put(TREE / name, content)
    put_switch(TREE)


# --- Compiling and running ---------------------------------------------------------------------


class NoVerdict(Exception):
    """Neither caught nor survived."""


def compiled(command, words):
    """The programs that cargo makes of this: name, path, and where it expects to be started."""
    ran = subprocess.run(
        ["cargo", command, *words, "--message-format", "json"], cwd=TREE, env=ENVIRONMENT,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )
    messages = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    if ran.returncode != 0:
        said = (m["message"]["rendered"] for m in messages if "message" in m)
        raise NoVerdict("it does not compile:\n" + "".join(said))
    made = [
        m for m in messages
        if m.get("executable") and (command != "test" or m["profile"]["test"])
    ]
    return [(m["target"]["name"], m["executable"], Path(m["manifest_path"]).parent) for m in made]


def tests_of(file):
    if file.startswith(SIMULATED_CRATES):
        return SIMULATED_TESTS
    return NETWORK_TESTS if file.startswith(NETWORK_CRATES) else ENGINE_TESTS


def limit():
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def first_failure(program, arguments, number):
    """Runs it until it says that something failed: what; None when all is well."""
    name, path, home = program
    ran = subprocess.Popen(
        [path, *arguments], cwd=home, env=dict(ENVIRONMENT, MUTANT=str(number), RUST_BACKTRACE="0"),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True, preexec_fn=limit,
    )
    late = threading.Event()

    def end():
        late.set()
        os.killpg(ran.pid, signal.SIGKILL)

    timer = threading.Timer(LIMIT_SECONDS, end)
    timer.start()
    try:
        for line in ran.stdout:
            found = re.match(r"(?:test (\S+) \.\.\. FAILED|FAILED: (seed \d+))", line)
            if found:
                os.killpg(ran.pid, signal.SIGKILL)
                return f"{name} {found[1]}" if found[1] else found[2]
        if ran.wait() == 0:
            return None
    finally:
        timer.cancel()
        ran.stdout.close()
        ran.wait()
    if late.is_set():
        raise NoVerdict(f"{name} did not end within {LIMIT_SECONDS} s")
    return f"{name}: a test that aborted"


class Suite:
    """The programs that look for what is wrong, compiled from the tree as it is."""

    def __init__(self, file, histories):
        self.file, self.histories = file, histories
        # The fullest one first: what it catches spares the others.
        programs = compiled("test", ["--no-run", *tests_of(file)])
        self.programs = sorted(programs, key=lambda program: program[0] != "sim")
        self.simulator = None

    def by_tests(self, number, known=None):
        """The test that fails when this one is on; `known` did so the last time, and is asked
        first."""
        if known and " " in known:
            name, test = known.split(" ", 1)
            for program in self.programs:
                if program[0] == name and first_failure(program, ["--exact", test], number):
                    return known
        for program in self.programs:
            found = first_failure(program, ["--test-threads", "2"], number)
            if found:
                return found
        return None

    def by_histories(self, number):
        """The history that fails when this one is on, where there are some."""
        if tests_of(self.file) is NETWORK_TESTS:
            return None
        histories = ["--shrink-seconds", "0", "--histories", str(self.histories)]
        if not self.simulator:
            (self.simulator,) = compiled("build", SIMULATOR)
            if before := first_failure(self.simulator, histories, 0):
                sys.exit(f"a history fails without any mutation: {before}")
        return first_failure(self.simulator, histories, number)


def record(name, by):
    """Notes who caught it, after the mutation's `file`."""
    text = LIST.read_text()
    pattern = rf'(name = "{re.escape(name)}"\n(?:rule = .*\n)?file = .*\n)(?:by = .*\n)?'
    LIST.write_text(re.sub(pattern, lambda found: f'{found[1]}by = "{by}"\n', text, count=1))


def attempt(suite, number, mutation, options):
    """One line about it; what came of it in a word."""
    began = time.monotonic()
    try:
        asked = suite()
        by = asked.by_tests(number, mutation.get("by")) or asked.by_histories(number)
        verdict, word = (f"caught by {by}", "caught") if by else ("SURVIVED", "survived")
        if by and options.record:
            record(mutation["name"], by)
    except NoVerdict as why:
        verdict, word = f"ERROR: {why}", "without a verdict"
    seconds = time.monotonic() - began
    print(f"{mutation['rule']:4} {mutation['name']}: {verdict} ({seconds:.0f} s)", flush=True)
    return word


def run(chosen, options):
    counts = dict.fromkeys(["caught", "survived", "without a verdict"], 0)
    together = {number: m for number, m in chosen.items() if not m.get("alone")}
    put_tree(together)
    # One suite for each kind of tests.
    for tests in {str(tests_of(m["file"])) for m in together.values()}:
        those = {n: m for n, m in together.items() if str(tests_of(m["file"])) == tests}
        try:
            suite = Suite(next(iter(those.values()))["file"], options.histories)
        except NoVerdict as why:
            sys.exit(f"with all mutations in it, {why}")
        if before := suite.by_tests(0):
            sys.exit(f"the suite fails without any mutation: {before}")
        for number, mutation in those.items():
            counts[attempt(lambda: suite, number, mutation, options)] += 1
    for number, mutation in chosen.items():
        if number not in together:
            put_tree({})
            text = (ROOT / mutation["file"]).read_text()
            put(TREE / mutation["file"], text.replace(mutation["old"], mutation["new"]).encode())
            alone = lambda file=mutation["file"]: Suite(file, options.histories)
            counts[attempt(alone, number, mutation, options)] += 1
    print(", ".join(f"{count} {word}" for word, count in counts.items()))
    return counts


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--histories", type=int, default=1000)
    parser.add_argument("names", nargs="*", metavar="NAME")
    options = parser.parse_args()
    mutations = load()
    broken = list(misfits(mutations))
    unknown = set(options.names) - {m["name"] for m in mutations}
    if broken or unknown:
        sys.exit("\n".join(broken + [f"there is no mutation {name}" for name in unknown]))
    if options.check:
        print(f"ok mutations_apply ({len(mutations)})")
        return
    wanted = enumerate(mutations, start=1)
    chosen = {n: m for n, m in wanted if not options.names or m["name"] in options.names}
    counts = run(chosen, options)
    sys.exit(counts["caught"] != len(chosen))


if __name__ == "__main__":
    main()
