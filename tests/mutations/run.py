#!/usr/bin/env python3
"""Breaks the engine in one place at a time and expects the suite to notice.

Usage: tests/mutations/run.py [--check] [--histories N] [NAME...]

--check       only look whether every mutation still applies exactly once
--histories   how many `cargo sim` plays of what the tests let through (default 1000)
NAME          only these

Works in a copy of the tree under MUTATION_DIR (default .cache/mutations), so nothing here is
touched. Stops at the first test or seed that fails: that is who caught it. A suite that does
not end within ten minutes, or does not compile, is an error and not a catch; the others are
tried all the same.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
AREA = Path(os.environ.get("MUTATION_DIR", ROOT / ".cache/mutations"))
LIMIT_SECONDS = 600
# Cheapest first; what an earlier one catches spares the later ones.
SUITES = [
    ["test", "--quiet", "-p", "ublk-mirror-tests", "--test", "sim"],
    ["test", "--quiet", "-p", "mirror", "-p", "dirty-map", "--lib"],
    ["sim", "--shrink-seconds", "0", "--histories"],
]
NETWORK_SUITES = [["test", "--quiet", "-p", "peer", "-p", "export", "-p", "ublk-target"]]
NETWORK_CRATES = ("peer/", "export/", "ublk-target/")
# Links and the export server are simulated too; the daemon's own parts are not.
SIMULATED_CRATES = ("peer/", "export/")


def suites_of(file):
    if not file.startswith(NETWORK_CRATES):
        return SUITES
    return NETWORK_SUITES + (SUITES if file.startswith(SIMULATED_CRATES) else [])


def load():
    with open(ROOT / "tests/mutations/mutations.toml", "rb") as file:
        return tomllib.load(file)["mutation"]


def misfits(mutations):
    for mutation in mutations:
        found = (ROOT / mutation["file"]).read_text().count(mutation["old"])
        if found != 1:
            yield f"{mutation['name']}: `old` occurs {found} times in {mutation['file']}"


def copy_tree():
    tree = AREA / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            # With the time of now: an older one would leave the last mutation's build in place.
            shutil.copy(ROOT / name, tree / name)
    return tree


def cargo(tree, arguments):
    environment = dict(os.environ, CARGO_TARGET_DIR=str(AREA / "target"))
    environment.pop("RUSTFLAGS", None)
    return subprocess.run(
        ["cargo", *arguments], cwd=tree, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LIMIT_SECONDS,
    )


class NoVerdict(Exception):
    """Neither caught nor survived."""


def catcher(tree, file, histories):
    """Who fails when `file` is mutated, or None when all is well."""
    for suite in suites_of(file):
        try:
            ran = cargo(tree, [*suite, str(histories)] if suite[0] == "sim" else suite)
        except subprocess.TimeoutExpired:
            raise NoVerdict(f"{' '.join(suite)} did not end within {LIMIT_SECONDS} s") from None
        if ran.returncode == 0:
            continue
        if "could not compile" in ran.stdout:
            raise NoVerdict("it does not compile:\n" + ran.stdout)
        tests = re.findall(r"^    (\w+(?:::\w+)+)$", ran.stdout, re.MULTILINE)
        failed = re.findall(r"FAILED: (seed \d+)", ran.stdout)
        names = sorted(set(tests)) or ([] if failed else ["a test that aborted"])
        return ", ".join(names[:2] + failed[:2])
    return None


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--histories", type=int, default=1000)
    parser.add_argument("names", nargs="*", metavar="NAME")
    asked = parser.parse_args()
    histories, names = asked.histories, asked.names
    mutations = load()
    broken = list(misfits(mutations))
    unknown = set(names) - {m["name"] for m in mutations}
    if broken or unknown:
        sys.exit("\n".join(broken + [f"there is no mutation {name}" for name in unknown]))
    if asked.check:
        print(f"ok mutations_apply ({len(mutations)})")
        return
    tree, survived, undecided = copy_tree(), [], []
    chosen = [m for m in mutations if not names or m["name"] in names]
    # A file for each kind of suites.
    for file in {m["file"].startswith(NETWORK_CRATES): m["file"] for m in chosen}.values():
        before = catcher(tree, file, histories)
        if before:
            sys.exit(f"the suite fails without any mutation: {before}")
    for mutation in chosen:
        began, path = time.monotonic(), tree / mutation["file"]
        original = path.read_text()
        path.write_text(original.replace(mutation["old"], mutation["new"]))
        try:
            caught = catcher(tree, mutation["file"], histories)
            verdict = f"caught by {caught}" if caught else "SURVIVED"
            survived += [] if caught else [mutation["name"]]
        except NoVerdict as why:
            verdict = f"ERROR: {why}"
            undecided.append(mutation["name"])
        path.write_text(original)
        seconds = time.monotonic() - began
        print(f"{mutation['rule']:4} {mutation['name']}: {verdict} ({seconds:.0f} s)", flush=True)
    caught = len(chosen) - len(survived) - len(undecided)
    print(f"{caught} caught, {len(survived)} survived, {len(undecided)} without a verdict")
    sys.exit(bool(survived or undecided))


if __name__ == "__main__":
    main()
