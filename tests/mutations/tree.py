"""The copy of the sources that mutations and mutants are built into."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def names():
    """The files of the project, those that are not committed yet included."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True,
    ).stdout.splitlines()
    return [name for name in listed if (ROOT / name).is_file()]


def put(path, content):
    """An unchanged file keeps its time, and the compiler what it made of it."""
    if not path.is_file() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def put_switch(tree):
    """The switch (mutant_switch.rs), as one more crate."""
    put(tree / "mutant-switch/src/lib.rs", (ROOT / "tests/mutations/mutant_switch.rs").read_bytes())
    manifest = b'[package]\nname = "mutant-switch"\nversion = "0.1.0"\nedition = "2024"\n'
    put(tree / "mutant-switch/Cargo.toml", manifest)


def with_switch(manifest):
    """The manifest of a crate that uses it."""
    needs = b'[dependencies]\nmutant-switch = { path = "../mutant-switch" }\n'
    return manifest.replace(b"[dependencies]\n", needs, 1)
