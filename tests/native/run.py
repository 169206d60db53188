#!/usr/bin/env python3
"""End-to-end tests over NBD on this machine's own kernel.

Usage: tests/native/run.py [NAME...]

Wants the release binaries (UBLK_MIRROR_BIN, or CARGO_TARGET_DIR/release, or target/release).
Prints `ok NAME` or `not ok NAME`, and at the end `N passed, N failed`. A test that cannot be run
here is named with the reason; with CI in the environment that is a failure.
"""

import os
import sys
import time
import traceback
import zlib

sys.dont_write_bytecode = True

import harness
import t_crash
import t_damage
import t_export
import t_hosts
import t_input
import t_life
import t_links
import t_offline
import t_partitions
import t_peer
import t_roles
import t_scrub
import t_space
import t_sums
import t_tls

MODULES = [t_life, t_crash, t_input, t_damage, t_offline, t_space, t_scrub, t_peer, t_export, t_links,
           t_roles, t_sums, t_tls, t_partitions, t_hosts]


def tests():
    """All tests by name, in order."""
    found = {}
    for module in MODULES:
        for name, value in vars(module).items():
            if callable(value) and value.__module__ == module.__name__ and name[0] != "_":
                found[name] = value
    return found


def run(name, test):
    """Runs one test: True, False, or None when it cannot be run here."""
    seed = int(os.environ.get("SEED") or zlib.crc32(name.encode()))
    area = harness.Area(seed)
    began = time.monotonic()
    verdict, why = True, ""
    try:
        test(area)
    except harness.CannotRun as reason:
        verdict, why = None, str(reason)
    except Exception:  # whatever it is, the other tests go on
        verdict, why = False, traceback.format_exc()
    finally:
        try:
            area.close()
        except Exception as error:
            verdict, why = False, f"{why}\ncleaning up: {error}"
    seconds = f"({time.monotonic() - began:.1f} s)"
    if verdict:
        print(f"ok {name} {seconds}", flush=True)
    elif verdict is None:
        mark = "not ok" if os.environ.get("CI") else "cannot run"
        print(f"{mark} {name}: {why}", flush=True)
    else:
        print(f"not ok {name} {seconds} with SEED={seed}", flush=True)
        print("    " + why.strip().replace("\n", "\n    "), flush=True)
    return verdict


def main(names):
    """Runs the tests of these names, or all."""
    for program in ("mirrorctl", "ublk-mirror"):
        if not (harness.BINARIES / program).exists():
            sys.exit(f"{harness.BINARIES / program} is missing: run 'make build' first.")
    known = tests()
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"There is no test named {unknown[0]}; there are: {', '.join(known)}.")
    verdicts = [run(name, known[name]) for name in names or known]
    passed, unable = verdicts.count(True), verdicts.count(None)
    failed = verdicts.count(False) + (unable if os.environ.get("CI") else 0)
    if unable:
        print(f"{unable} could not be run on this machine")
    print(f"{passed} passed, {failed} failed")
    sys.exit(1 if failed or not passed else 0)


main(sys.argv[1:])
