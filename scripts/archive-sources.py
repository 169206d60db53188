#!/usr/bin/env python3
"""Print apt sources for other suites of the archives that this machine already uses.

Usage: archive-sources.py main:SUITE|security:SUITE ...

The address, the components and the signing key come from the machine's own apt sources
(/etc/apt/sources.list and /etc/apt/sources.list.d), so the project names no archive. "main" is
the archive that serves this release, "security" the one that serves its security updates.
"""

import glob
import re
import sys

SOURCES_LIST = "/etc/apt/sources.list"
SOURCES_PARTS = "/etc/apt/sources.list.d"


def release_names():
    """The names under which this release may stand in the sources."""
    names = {"stable", "oldstable", "testing"}
    with open("/etc/os-release", encoding="utf-8") as release:
        for line in release:
            if line.startswith("VERSION_CODENAME="):
                names.add(line.split("=", 1)[1].strip().strip('"'))
    return names


def one_line_entries(path):
    """Entries of the classic format: deb [options] uri suite component ..."""
    entry = re.compile(r"^deb\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)\s+(.+?)\s*(?:#.*)?$")
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            match = entry.match(line.strip())
            if match:
                options = dict(
                    option.split("=", 1)
                    for option in (match.group(1) or "").split()
                    if "=" in option
                )
                yield {
                    "uris": [match.group(2)],
                    "suites": [match.group(3)],
                    "components": match.group(4),
                    "signed-by": options.get("signed-by"),
                    "trusted": options.get("trusted"),
                }


def deb822_entries(path):
    """Entries of the stanza format (deb822)."""
    with open(path, encoding="utf-8") as text:
        stanzas = re.split(r"\n\s*\n", text.read())
    for stanza in stanzas:
        fields, name = {}, None
        for line in stanza.splitlines():
            if line.startswith("#") or not line.strip():
                continue
            if line[0] in " \t" and name:
                fields[name] += "\n" + line
            elif ":" in line:
                name, value = line.split(":", 1)
                name = name.strip().lower()
                fields[name] = value.strip()
        if "deb" not in fields.get("types", "").split() or fields.get("enabled") == "no":
            continue
        yield {
            "uris": fields.get("uris", "").split(),
            "suites": fields.get("suites", "").split(),
            "components": fields.get("components", "main"),
            "signed-by": fields.get("signed-by"),
            "trusted": fields.get("trusted"),
        }


def machine_entries():
    """All entries of this machine, in apt's order."""
    for path in glob.glob(SOURCES_LIST) + sorted(glob.glob(SOURCES_PARTS + "/*.list")):
        yield from one_line_entries(path)
    for path in sorted(glob.glob(SOURCES_PARTS + "/*.sources")):
        yield from deb822_entries(path)


def find_archive(kind, names):
    """The machine's entry for the release itself or for its security updates."""
    if kind == "main":
        wanted = names
    else:
        wanted = {name + end for name in names for end in ("-security", "/updates")}
    for entry in machine_entries():
        if wanted & set(entry["suites"]) and entry["uris"]:
            return entry
    sys.exit(
        f"The apt sources of this machine name no {kind} archive of its Debian release; "
        "add one to /etc/apt/sources.list.d and run this again."
    )


def main(arguments):
    """Print one stanza for each argument."""
    names = release_names()
    for argument in arguments:
        kind, _, suite = argument.partition(":")
        if kind not in ("main", "security") or not suite:
            sys.exit(f"{argument}: expected main:SUITE or security:SUITE.")
        entry = find_archive(kind, names)
        print("Types: deb")
        print("URIs: " + " ".join(entry["uris"]))
        print("Suites: " + suite)
        print("Components: main")
        for field, title in (("signed-by", "Signed-By"), ("trusted", "Trusted")):
            if entry[field]:
                print(f"{title}: {entry[field]}")
        print()


main(sys.argv[1:])
