#!/usr/bin/env python3
"""Make tables and a picture of the results under benches/out/raw.

Usage: benches/report.py [--readme | --parts] [RAW_DIR [OUT_DIR]]

Reads fio's JSON files named PLACE__SUBJECT__JOB__ROUND.json and results of our own named
PLACE__NAME.result.json. Writes OUT_DIR/bench.md and OUT_DIR/bench.svg and prints the tables.
A figure is the median of its rounds. Nothing is typed by hand: what was not measured is "-".
--readme also puts the tables into README.md, in the place of the last ones. --parts is for a run of
some parts only: it leaves out the figures that were not measured, and has a place of its own there.
"""

import datetime
import json
import os
import platform
import re
import statistics
import sys
from pathlib import Path

JOBS = {
    "randwrite-4k-qd1": "random write 4k QD1",
    "randwrite-4k-qd32": "random write 4k QD32",
    "randread-4k-qd32": "random read 4k QD32",
    "seqwrite-128k-qd8": "sequential write 128k QD8",
}
SUBJECTS = {
    "bare": "bare disk",
    "md-none": "md, no bitmap",
    "md-bitmap": "md, internal bitmap",
    "rublk-loop": "rublk loop, one disk",
    "quorum": "qemu quorum",
    "mirror": "ublk-mirror",
    "mirror-no-intent": "ublk-mirror, intent off",
    "mirror-no-sums": "ublk-mirror, checksums off",
    "mirror-tls": "ublk-mirror, TLS",
    "drbd": "DRBD, protocol C",
    "mirror-peer": "ublk-mirror, one peer",
}
COLORS = {
    "bare": "#9aa0a6",
    "md-none": "#e8a33d",
    "md-bitmap": "#c2571a",
    "rublk-loop": "#7e9c5b",
    "quorum": "#8a6fb0",
    "mirror": "#1f6fb2",
    "mirror-no-intent": "#8fc1e8",
    "mirror-no-sums": "#5aa5a0",
    "mirror-tls": "#3c4f76",
    "drbd": "#b5485d",
    "mirror-peer": "#1f6fb2",
}
PLACES = {
    "guest-6.12-2cpu": "kernel 6.12, two processors",
    "guest-6.12-counted": "kernel 6.12, one processor, counted instructions",
    "guest-7.2-2cpu": "kernel 7.2, two processors",
    "guest-7.2-counted": "kernel 7.2, one processor, counted instructions",
    "guest-6.12-peer": "kernel 6.12, two processors, one copy behind TCP (loopback)",
    "guest-7.2-peer": "kernel 7.2, two processors, one copy behind TCP (loopback)",
    "native": "NBD on this machine",
    "native-peer": "NBD on this machine, one copy behind TCP (loopback)",
}
WRITE32, READ32, WRITE1 = "randwrite-4k-qd32", "randread-4k-qd32", "randwrite-4k-qd1"
SEQUENTIAL = "seqwrite-128k-qd8"
WALL, COUNTED = "guest-6.12-2cpu", "guest-6.12-counted"
# (what, place, numerator, denominator, job, least ratio to reach)
RATIOS = [
    ("random write QD32, intent on / off", WALL, "mirror", "mirror-no-intent", WRITE32, 0.95),
    ("random write QD32, intent on / off", COUNTED, "mirror", "mirror-no-intent", WRITE32, 0.95),
    ("random write QD32 / md with internal bitmap", WALL, "mirror", "md-bitmap", WRITE32, 2.5),
    ("random write QD32 / md without bitmap", WALL, "mirror", "md-none", WRITE32, 0.9),
    ("random write QD32 / md with internal bitmap", COUNTED, "mirror", "md-bitmap", WRITE32, 1.0),
    ("random read QD32 / rublk's one-disk loop", WALL, "mirror", "rublk-loop", READ32, 0.95),
    ("random read QD32 / rublk's one-disk loop", COUNTED, "mirror", "rublk-loop", READ32, 0.95),
    ("random write QD1 / rublk's one-disk loop", COUNTED, "mirror", "rublk-loop", WRITE1, 0.9),
    ("random write QD32, checksums on / off", "native", "paired-mirror", "paired-mirror-no-sums", WRITE32, 0.97),
    ("sequential write 128k, checksums on / off", "native", "paired-mirror", "paired-mirror-no-sums", SEQUENTIAL, 0.95),
    ("random write QD32, checksums on / off", WALL, "mirror", "mirror-no-sums", WRITE32, 0.97),
    ("sequential write 128k, checksums on / off", WALL, "mirror", "mirror-no-sums", SEQUENTIAL, 0.95),
    ("random write QD32, checksums on / off", COUNTED, "mirror", "mirror-no-sums", WRITE32, 0.97),
    ("sequential write 128k, checksums on / off", COUNTED, "mirror", "mirror-no-sums", SEQUENTIAL, 0.95),
    ("random write QD32 / qemu's quorum", "native", "mirror", "quorum", WRITE32, 1.3),
    ("random read QD32 / qemu's quorum", "native", "mirror", "quorum", READ32, 1.3),
    ("random write QD32, one peer / DRBD", "guest-6.12-peer", "mirror-peer", "drbd", WRITE32, 1.5),
    ("random write QD32 / qemu's quorum with one NBD child", "native-peer", "mirror", "quorum", WRITE32, 1.3),
    ("sequential write 128k, TLS / plain text", "native-peer", "mirror-tls", "mirror", SEQUENTIAL, 0.7),
    (
        "uniform random write QD32 over 100 x the hot budget, no checksums, intent on / off",
        "native",
        "budget-mirror",
        "budget-mirror-no-intent",
        "uniform-randwrite-4k-qd32",
        0.8,
    ),
    (
        "the same, with checksums and intent / without either",
        "native",
        "budget-sums",
        "budget-mirror-no-intent",
        "uniform-randwrite-4k-qd32",
        0.8,
    ),
]


def load(raw):
    """All measurements: {place: {subject: {job: [(iops, bytes_per_second, p99_us, p99_us_of_writes)]}}} and ours."""
    runs, results = {}, {}
    for path in sorted(raw.glob("*.json")):
        if path.name.endswith(".result.json"):
            place, name = path.name.removesuffix(".result.json").split("__")
            results.setdefault(place, {})[name] = json.loads(path.read_text())
            continue
        place, subject, job, _ = path.name.removesuffix(".json").split("__")
        # fio prints notes before its JSON when it has any.
        text = path.read_text()
        document = json.loads(text[text.index("{") :])
        fio = document["jobs"][0]
        if fio.get("error"):
            sys.exit(f"{path.name}: fio reports error {fio['error']}.")
        way = max(fio["read"], fio["write"], key=lambda side: side["total_ios"])
        late, late_writes = (
            side["clat_ns"].get("percentile", {}).get("99.000000", 0) / 1000 for side in (way, fio["write"])
        )
        runs.setdefault(place, {}).setdefault(subject, {}).setdefault(job, []).append(
            (way["iops"], way["bw_bytes"], late, late_writes)
        )
    return runs, results


def median(runs, place, subject, job, field=0):
    """The median over the rounds, or None."""
    rounds = runs.get(place, {}).get(subject, {}).get(job)
    return statistics.median(one[field] for one in rounds) if rounds else None


def ratio(above, below):
    """Their ratio, or None where one is missing."""
    return above / below if above is not None and below else None


def show(value, digits=2):
    """A number for a table."""
    return "-" if value is None else f"{value:,.{digits}f}"


def verdict(value, bar, at_most=False):
    """Whether a figure reaches its bar."""
    if value is None:
        return "not measured"
    reached = value <= bar if at_most else value >= bar
    return "reached" if reached else "**missed**"


def table(head, rows):
    """A Markdown table, columns aligned for reading as text."""
    rows = [head] + rows
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = []
    for number, row in enumerate(rows):
        cells = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("| " + " | ".join(cells) + " |")
        if number == 0:
            marks = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
            lines.append("| " + " | ".join(marks) + " |")
    return "\n".join(lines)


def subjects_of(runs, place):
    """The subjects measured in a place, in the report's order."""
    return [subject for subject in SUBJECTS if runs.get(place, {}).get(subject, {}).keys() & JOBS.keys()]


def place_section(runs, place, kernel):
    """IOPS of each subject, and ratios of ours to the others."""
    subjects = subjects_of(runs, place)
    rounds = max(len(one) for subject in subjects for one in runs[place][subject].values())
    rows = [
        [title] + [show(median(runs, place, subject, job), 0) for subject in subjects]
        for job, title in JOBS.items()
    ]
    parts = [
        f"## {PLACES.get(place, place)}",
        f"IOPS, median of {rounds} round{'s' if rounds > 1 else ''}" + (f"; kernel {kernel}." if kernel else "."),
        table(["job"] + [SUBJECTS[subject] for subject in subjects], rows),
    ]
    others = [subject for subject in subjects if subject != "mirror"]
    if "mirror" in subjects and others:
        rows = [
            [title]
            + [
                show(ratio(median(runs, place, "mirror", job), median(runs, place, other, job)))
                for other in others
            ]
            for job, title in JOBS.items()
        ]
        parts += [
            "ublk-mirror (intent and checksums on) over each of the others:",
            table(["job"] + [SUBJECTS[other] for other in others], rows),
        ]
    return "\n\n".join(parts)


def cost_of_bitmaps(runs):
    """What recording intent costs each system."""
    rows = []
    for place in PLACES:
        md = ratio(median(runs, place, "md-bitmap", WRITE32), median(runs, place, "md-none", WRITE32))
        ours = ratio(
            median(runs, place, "mirror", WRITE32), median(runs, place, "mirror-no-intent", WRITE32)
        )
        if md is not None or ours is not None:
            rows.append([PLACES[place], show(md), show(ours)])
    if not rows:
        return ""
    head = ["random write QD32, intent on / off", "md", "ublk-mirror"]
    return "## What the intent record costs\n\n" + table(head, rows)


def figures(runs, results, measured_only):
    """The figures to reach, with what was measured."""
    rows = []
    for what, place, above, below, job, bar in RATIOS:
        value = ratio(median(runs, place, above, job), median(runs, place, below, job))
        newer = None
        if place.startswith("guest-6.12"):
            newer_place = place.replace("6.12", "7.2")
            newer = ratio(median(runs, newer_place, above, job), median(runs, newer_place, below, job))
        rows.append(
            [f"{what} ({PLACES[place].removeprefix('kernel 6.12, ')})", f"at least {bar:.2f}",
             show(value), verdict(value, bar), show(newer)]
        )
    for what, name, field, bar in (
        ("bytes copied after a brief removal / bytes changed", "readd-mirror", "changed", 1.05),
        ("the same, pulled under a random write load", "readd-under-load", "changed", 1.2),
    ):
        values = []
        for place in (WALL, "guest-7.2-2cpu"):
            got = results.get(place, {}).get(name)
            values.append(ratio(got["copied"], got[field]) if got else None)
        rows.append([what, f"at most {bar:.2f}", show(values[0]), verdict(values[0], bar, True), show(values[1])])
    for what, name in (
        ("an idle sweep / one thread that reads both members in sequence, files on a disk", "sweep-disk"),
        ("the same, files in memory", "sweep-memory"),
    ):
        got = results.get("native", {}).get(name)
        value = ratio(got["members_ms"], got["sweep_ms"]) if got else None
        rows.append([what, "at least 0.90", show(value), verdict(value, 0.9), "-"])
    for rtt_us in (200, 2000, 20000):
        got = results.get("guest-6.12-peer", {}).get(f"distance-{rtt_us}")
        # 32 at once, each with a round trip more.
        value = ratio(got["iops"], 32 / (32 / got["iops_without"] + rtt_us / 1e6)) if got else None
        what = f"random write QD32, one peer {rtt_us / 1000:g} ms away / what a round trip more would leave"
        rows.append([what, "at least 0.90", show(value), verdict(value, 0.9), "-"])
    for where, network in (("native-link", "over a network of 1 Gbit/s"), ("native-peer", "over the loopback")):
        got = results.get(where, {}).get("resync")
        value = ratio(got["nbdcopy_ms"], got["resync_ms"]) if got else None
        what = f"a full resync of a peer / nbdcopy to the same server, {network}"
        rows.append([what, "at least 0.90", show(value), verdict(value, 0.9), "-"])
    for what, field in (("reads", 2), ("writes", 3)):
        value = ratio(*(median(runs, "native", who, "mixed-4k", field) for who in ("scrubbed", "scrubbed-not")))
        what = f"p99 of {what} at half of what the mirror can do, with a scrub / without"
        rows.append([what, "at most 1.10", show(value), verdict(value, 1.1, True), "-"])
    for what, name in (
        ("create and start a mirror of 12 TiB, until a write is answered, ms", "big-create"),
        ("start after a clean stop, 12 TiB written, ms", "big-start"),
    ):
        got = results.get("native", {}).get(name)
        value = got["ms"] if got else None
        if name == "big-start" and got:
            what += f" ({got['written_extents']:,.0f} extents)"
        rows.append([what, "under 1,000", show(value, 0), verdict(value, 999.5, True), "-"])
    if measured_only:
        rows = [row for row in rows if row[2] != show(None)]
    head = ["figure", "to reach", "measured", "", "kernel 7.2"]
    return "## Figures to reach\n\n" + table(head, rows)


def re_adds(results):
    """What came back cost, md beside ours."""
    rows = []
    titles = {
        "readd-md-bitmap": "md, internal bitmap",
        "readd-mirror": "ublk-mirror",
        "readd-under-load": "ublk-mirror, pulled and back under a write load",
    }
    for place, title in PLACES.items():
        for name, subject in titles.items():
            got = results.get(place, {}).get(name)
            if got:
                rows.append(
                    [f"{subject} ({title})", show(got["changed"] / 2**20, 1), show(got["copied"] / 2**20, 1),
                     show(got["zeroed"] / 2**20, 1), show(ratio(got["copied"], got["changed"])),
                     show(got["ms"] / 1000, 1)]
                )
    if not rows:
        return ""
    head = ["re-add", "changed, MiB", "copied, MiB", "zeroed, MiB", "copied / changed", "seconds"]
    note = (
        "1,000 random 4 KiB writes over 960 MiB while a member of 1 GiB is away. What md copied is what"
        " the returning disk was written; what ublk-mirror copied is its own count."
    )
    return "## A member comes back\n\n" + note + "\n\n" + table(head, rows)


def damages(results):
    """Blocks changed under the system: who finds them, and which copy wins."""
    rows = []
    titles = {"damage-md-none": "md, check and repair", "damage-mirror": "ublk-mirror, scrub"}
    for place, title in PLACES.items():
        for name, subject in titles.items():
            got = results.get(place, {}).get(name)
            if got:
                rows.append(
                    [f"{subject} ({title})", show(got["changed"], 0), show(got["found"], 0),
                     show(got["changed"] - got["wrong"], 0), show(got["wrong"], 0), show(got["unequal"], 0)]
                )
    if not rows:
        return ""
    head = ["silent damage", "blocks changed", "found", "right after it", "wrong after it", "unequal after it"]
    note = (
        "Half of the blocks were changed on the first disk and half on the second. What md found is its"
        " mismatch_cnt in blocks of 4 KiB."
    )
    return "## Which copy wins\n\n" + note + "\n\n" + table(head, rows)


def first_writes(runs):
    """Unwritten against written extents on a disk without cheap write-zeroes."""
    rows = []
    for place, title in PLACES.items():
        for job, what in (("randwrite", "random write 4k QD32"), ("seqwrite", "sequential write 128k QD8")):
            first = median(runs, place, "mirror", f"first-{job}")
            again = median(runs, place, "mirror", f"again-{job}")
            if first is not None or again is not None:
                rows.append([f"{what} ({title})", show(first, 0), show(again, 0), show(ratio(first, again))])
    if not rows:
        return ""
    head = ["first writes, no cheap write-zeroes", "unwritten, IOPS", "written, IOPS", "ratio"]
    return "## First writes\n\n" + table(head, rows)


def budget_state(runs, results):
    """What the daemon said at the end of the runs over the budget, and what checksums cost there."""
    rows = []
    for subject, what in (
        ("budget-mirror-no-intent", "intent off"),
        ("budget-mirror", "intent on"),
        ("budget-sums", "intent on, checksums"),
    ):
        got = results.get("native", {}).get(f"{subject}-state")
        if got:
            iops = median(runs, "native", subject, "uniform-randwrite-4k-qd32")
            numbers = (iops, got["hot"], got["budget"], got["writes"], got["map_commits"])
            rows.append([what, *(show(number, 0) for number in numbers)])
    if not rows:
        return ""
    head = ["uniform random write QD32", "IOPS", "hot at the end", "budget", "writes", "map commits"]
    return "## Over the budget of hot extents\n\n" + table(head, rows)


def machine():
    """Date and machine, as found."""
    model = platform.processor() or "unknown processor"
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        model = re.search(r"^model name\s*:\s*(.+)$", text, re.M).group(1)
    except (OSError, AttributeError):
        pass
    kernel = platform.release().split("-")[0]
    today = datetime.date.today().isoformat()
    return (
        f"Printed by `make bench` on {today}, {os.cpu_count()} x {model}, kernel {kernel};"
        " the guests are emulated in software, so compare within a table, not across."
    )


def svg(runs):
    """One panel a place: bars of each subject relative to the place's yardstick."""
    places = [place for place in PLACES if subjects_of(runs, place)]
    if not places:
        return None
    width, panel, left, bars_height, top = 980, 250, 70, 150, 56
    height = top + panel * len(places)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    used = [s for s in SUBJECTS if any(s in subjects_of(runs, place) for place in places)]
    for number, subject in enumerate(used):
        x = 20 + number * 137
        out.append(f'<rect x="{x}" y="14" width="12" height="12" fill="{COLORS[subject]}"/>')
        out.append(f'<text x="{x + 16}" y="24">{SUBJECTS[subject]}</text>')
    for number, place in enumerate(places):
        out += svg_panel(runs, place, top + number * panel, (width, left, bars_height))
    out.append("</svg>")
    return "\n".join(out) + "\n"


def svg_panel(runs, place, y, shape):
    """The bars of one place."""
    width, left, bars_height = shape
    subjects = subjects_of(runs, place)
    yardstick = "bare" if "bare" in subjects else subjects[0]
    ratios = {
        (job, subject): ratio(median(runs, place, subject, job), median(runs, place, yardstick, job))
        for job in JOBS
        for subject in subjects
    }
    highest = max([1.0] + [value for value in ratios.values() if value is not None])
    base = y + 30 + bars_height
    out = [
        f'<text x="20" y="{y + 16}" font-weight="bold">{PLACES[place]}: IOPS over {SUBJECTS[yardstick]}</text>'
    ]
    for step in range(5):
        value = highest * step / 4
        line = base - bars_height * step / 4
        out.append(f'<line x1="{left}" y1="{line:.1f}" x2="{width - 20}" y2="{line:.1f}" stroke="#ddd"/>')
        out.append(f'<text x="{left - 8}" y="{line + 4:.1f}" text-anchor="end">{value:.2f}</text>')
    group = (width - 20 - left) / len(JOBS)
    bar = min(32.0, (group - 24) / len(subjects))
    for place_in_row, (job, title) in enumerate(JOBS.items()):
        x = left + group * place_in_row + 12
        for column, subject in enumerate(subjects):
            value = ratios[(job, subject)]
            if value is None:
                continue
            tall = bars_height * value / highest
            at = x + column * bar
            out.append(
                f'<rect x="{at:.1f}" y="{base - tall:.1f}" width="{bar - 2:.1f}" height="{tall:.1f}" '
                f'fill="{COLORS[subject]}"/>'
            )
            out.append(
                f'<text x="{at + bar / 2 - 1:.1f}" y="{base - tall - 3:.1f}" text-anchor="middle" '
                f'font-size="9">{value:.2f}</text>'
            )
        out.append(f'<text x="{x + group / 2 - 12:.1f}" y="{base + 18}" text-anchor="middle">{title}</text>')
    return out


def into_readme(text, place):
    """Replace the tables in this place of README.md, one heading level further down."""
    readme = Path(__file__).resolve().parent.parent / "README.md"
    begin, end = f"<!-- {place}: begin -->\n", f"<!-- {place}: end -->\n"
    before, rest = readme.read_text(encoding="utf-8").split(begin)
    body = text.removeprefix("# Benchmarks\n\n").replace("\n## ", "\n### ")
    readme.write_text(before + begin + body + end + rest.split(end)[1], encoding="utf-8")


def main(arguments):
    """Write the report and print it."""
    places = [place for option, place in (("--readme", "tables"), ("--parts", "parts")) if option in arguments]
    arguments = [argument for argument in arguments if argument not in ("--readme", "--parts")]
    here = Path(__file__).resolve().parent / "out"
    raw = Path(arguments[0]) if arguments else here / "raw"
    out = Path(arguments[1]) if len(arguments) > 1 else here
    runs, results = load(raw)
    if not runs and not results:
        sys.exit(f"There are no results under {raw}: run `make bench` first.")
    parts = ["# Benchmarks", machine(), figures(runs, results, "parts" in places)]
    for place in PLACES:
        if subjects_of(runs, place):
            noted = raw / f"{place}.kernel"
            kernel = noted.read_text(encoding="utf-8").strip() if noted.exists() else ""
            parts.append(place_section(runs, place, kernel))
    parts += [cost_of_bitmaps(runs), re_adds(results), damages(results), first_writes(runs), budget_state(runs, results)]
    text = "\n\n".join(part for part in parts if part) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.md").write_text(text, encoding="utf-8")
    picture = svg(runs)
    if picture:
        (out / "bench.svg").write_text(picture, encoding="utf-8")
    for place in places:
        into_readme(text, place)
    print(text)


main(sys.argv[1:])
