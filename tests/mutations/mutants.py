#!/usr/bin/env python3
"""Builds all mutants of `dirty-map` and `mirror` into one copy of the sources and tries them.

Usage: tests/mutations/mutants.py build | trace
       tests/mutations/mutants.py hunt [--seconds S] [--again] [WORD...]
       tests/mutations/mutants.py report [--untried] [WORD...]

build    copies the tree, lets `cargo mutants --list` name the mutants, puts each of them behind
         a switch (mutant_switch.rs), compiles the tests, and records which test comes by which
         mutant. What does not compile so is left out and reported as `untried`.
trace    goes on with the recording where a `build` was stopped in it.
hunt     runs, for each mutant without a verdict, the tests that come by it, until one fails:
         cheap ones and those that caught a neighbour first. A mutant that got S seconds (default
         20) without being caught counts as `missed` when no test was left, else as `undecided`.
         With --again those that were not caught are tried again: after new tests, `build` first.
report   counts for each file, and what was missed, undecided or (--untried) left out.
WORD     only mutants whose name contains one of them (`engine/join.rs`, `make_exact`)

Stock cargo-mutants compiles the workspace once a mutant, and there are some 3000. This needs it
for the list only (`cargo install cargo-mutants`), and the Python packages `tree-sitter` and
`tree-sitter-rust`. Everything lies under MUTANTS_DIR (default .cache/mutants); verdicts outlive
a new build, as each mutant keeps its number. One test runs at a time, at the lowest priority.
"""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from math import ceil
from pathlib import Path

sys.dont_write_bytecode = True

from tree import ROOT, names, put, put_switch, with_switch

AREA = Path(os.environ.get("MUTANTS_DIR", ROOT / ".cache/mutants"))
TREE = AREA / "tree"
PACKAGES = ["dirty-map", "mirror"]
TESTS = ["-p", "dirty-map", "-p", "mirror", "-p", "ublk-mirror-tests", "--lib", "--test", "sim"]
ENVIRONMENT = dict(
    os.environ,
    CARGO_TARGET_DIR=str(AREA / "target"),
    # What mutants leave unused, or put into needless parentheses, is no error.
    RUSTFLAGS="--cap-lints allow",
    # The engine is compiled for every test binary: faster tests would not make up for that.
    CARGO_PROFILE_TEST_OPT_LEVEL="1",
    CARGO_PROFILE_TEST_DEBUG="0",
    # Short ones: what these find, the named cases find before.
    SIM_SEEDS="40",
    PROPTEST_CASES="32",
    ASSEMBLY_LENGTH="4",
    CRASH_SAMPLES="2",
    CRASH_SCHEDULES="1",
)
# What the compiler evaluates.
CONSTANTS = ["const_item", "static_item", "array_type", "const_block", "attribute_item"]
MEMORY_BYTES = 4 << 30
NICE = 19
# A test that takes longer, with the switches asked for the first time, is no use here.
TRACED_SECONDS = 5


# --- What is kept between runs: one JSON file each ---------------------------------------------


def load(name, default):
    path = AREA / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else default


def save(name, value):
    part = AREA / f"{name}.part"
    part.write_text(json.dumps(value))
    part.replace(AREA / f"{name}.json")


# --- Naming the mutants ------------------------------------------------------------------------


def listed():
    """All mutants, each with a number that it keeps as long as its name does."""
    words = ["cargo", "mutants", "--list", "--json"]
    for package in PACKAGES:
        words += ["-p", package]
    text = subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    numbers, times = load("numbers", {}), Counter()
    mutants = json.loads(text)
    for mutant in mutants:
        # Lines move; the how-manieth of its name in the file stays.
        name = re.sub(r":\d+:\d+: ", ": ", mutant["name"], count=1)
        times[name] += 1
        mutant["key"] = f"{name} #{times[name]}"
        mutant["number"] = numbers.setdefault(mutant["key"], len(numbers) + 1)
    save("numbers", numbers)
    return mutants


# --- Putting them into the sources -------------------------------------------------------------


class Instrumenter:
    """Rewrites one file: each mutant becomes a branch that a number chooses."""

    def __init__(self, text, mutants):
        import tree_sitter
        import tree_sitter_rust

        parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_rust.language()))
        self.source = text.encode()
        self.starts = [0]
        for line in text.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line.encode()))
        self.lines = text.splitlines(keepends=True)
        self.root = parser.parse(self.source).root_node
        self.branches = defaultdict(list)
        self.misfits = []
        for mutant in mutants:
            self.place(mutant)

    def offset(self, position):
        line, column = position["line"] - 1, position["column"] - 1
        return self.starts[line] + len(self.lines[line][:column].encode())

    def text(self, node):
        return self.source[node.start_byte:node.end_byte].decode()

    def place(self, mutant):
        start, end = (self.offset(mutant["span"][side]) for side in ("start", "end"))
        # What the span begins with; functions' and arms' spans hold more than one node.
        node = self.root.descendant_for_byte_range(start, min(start + 1, end))
        form = getattr(self, f"place_{mutant['genre']}", None)
        placed = node and form and not constant(node) and form(node, mutant)
        if placed:
            node, kind, text = placed
            self.branches[node.id].append((mutant["number"], kind, text))
        else:
            self.misfits.append(mutant["number"])

    def place_FnValue(self, node, mutant):
        if "impl " in mutant["function"]["return_type"]:
            # One function cannot return two types.
            return None
        function = above(node, "function_item")
        body = function and function.child_by_field_name("body")
        return (body, "entry", mutant["replacement"]) if body else None

    def place_BinaryOperator(self, node, mutant):
        whole = node.parent
        if whole.type not in ("binary_expression", "compound_assignment_expr"):
            return None
        before = self.source[whole.start_byte:node.start_byte].decode()
        after = self.source[node.end_byte:whole.end_byte].decode()
        return whole, "value", before + mutant["replacement"] + after

    def place_UnaryOperator(self, node, mutant):
        whole = above(node, "unary_expression")
        return (whole, "value", mutant["replacement"] + self.text(whole)[1:]) if whole else None

    def place_MatchArm(self, node, _mutant):
        arm = above(node, "match_arm")
        others = arm.parent.named_children if arm else []
        # An arm with a guard is none to the compiler: there must be one for all the rest.
        if not any(self.text(other).startswith("_ =>") for other in others):
            return None
        return arm.child_by_field_name("pattern"), "arm", ""

    def place_MatchArmGuard(self, node, mutant):
        pattern = above(node, "match_pattern")
        return (pattern, "guard", mutant["replacement"]) if pattern else None

    def place_StructField(self, node, _mutant):
        field = above(node, "field_initializer") or above(node, "shorthand_field_initializer")
        if not field:
            return None
        base = next(n for n in field.parent.children if n.type == "base_field_initializer")
        kind = self.text(field.parent.parent.child_by_field_name("name"))
        base = self.text(base)[2:].replace("Default::default()", f"{kind}::default()")
        value = field.child_by_field_name("value")
        if value is None:
            return field, "short", f"({base}).{self.text(field)}"
        return value, "value", f"({base}).{self.text(field.child_by_field_name('field'))}"

    def render(self, node):
        """The node's text, with every mutant in it."""
        branches, inner = self.branches.get(node.id, []), self.inner(node)
        if not branches:
            return inner
        kind = branches[0][1]
        if kind == "entry":
            exits = [f"if {on(n)} {{ {marked(n, f'return {text};')} }} " for n, _, text in branches]
            return "{ " + "".join(exits) + inner[1:]
        if kind in ("value", "short"):
            label = inner + ": " if kind == "short" else ""
            tests = [f"if {on(n)} {{ {marked(n, text)} }} else " for n, _, text in branches]
            return label + "(" + "".join(tests) + "{ " + inner + " })"
        return self.pattern(node, branches)

    def inner(self, node):
        parts, at = [], node.start_byte
        for child in node.children:
            parts += [self.source[at:child.start_byte].decode(), self.render(child)]
            at = child.end_byte
        return "".join(parts) + self.source[at:node.end_byte].decode()

    def pattern(self, node, branches):
        guard = node.child_by_field_name("condition")
        pattern, condition = self.text(node), "true"
        if guard:
            condition = self.render(guard)
            pattern = self.source[node.start_byte:guard.start_byte].decode()
            pattern = pattern.rstrip().removesuffix("if")
        for number, kind, text in branches:
            if kind == "arm" or text == "false":
                condition = f"({condition}) && {marked(number, '!' + on(number))}"
            else:
                condition = f"({condition}) || {marked(number, on(number))}"
        return f"{pattern} if {condition}"


def above(node, kind):
    """The nearest node of this kind that the node is, or lies in."""
    while node and node.type != kind:
        node = node.parent
    return node


def on(number):
    return f"::mutant_switch::on({number})"


def marked(number, text):
    """So that the compiler's message about it can be told to be about it."""
    return f"/*<{number}*/ {text} /*{number}>*/"


def constant(node):
    """Whether it is evaluated by the compiler, where nothing can be chosen."""
    while node:
        if node.type in CONSTANTS:
            return True
        if node.type == "function_item":
            modifiers = [n for n in node.children if n.type == "function_modifiers"]
            return any(c.type == "const" for n in modifiers for c in n.children)
        node = node.parent
    return False


def instrument(mutants, left_out):
    """Rewrites the tree's files; more mutants that do not fit are added to `left_out`."""
    files = defaultdict(list)
    for mutant in mutants:
        files[mutant["file"]].append(mutant)
    for file, those in files.items():
        those = [mutant for mutant in those if mutant["number"] not in left_out]
        made = Instrumenter((ROOT / file).read_text(), those)
        left_out.update(made.misfits)
        put(TREE / file, made.render(made.root).encode())


# --- Compiling ---------------------------------------------------------------------------------


def copy_tree(mutants):
    """Everything but what is instrumented, with the switch as one more crate."""
    for name in set(names()) - {mutant["file"] for mutant in mutants}:
        content = (ROOT / name).read_bytes()
        if name in [f"{package}/Cargo.toml" for package in PACKAGES]:
            content = with_switch(content)
        put(TREE / name, content)
    put_switch(TREE)


def cargo(*words):
    """The compiler's messages, and whether it was content."""
    ran = subprocess.run(
        ["cargo", *words, "--message-format", "json"], cwd=TREE, env=ENVIRONMENT,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )
    messages = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    return ran.returncode == 0, messages


def blamed(spans):
    return set().union(*(culprits(span) for span in spans))


def culprits(span):
    """The mutants that a message's span lies in or next to, in an instrumented file."""
    if not (TREE / span["file_name"]).is_file():
        return set()
    text = (TREE / span["file_name"]).read_bytes()
    start, end = span["byte_start"], span["byte_end"]
    inside = set()
    for mark in re.finditer(rb"/\*<(\d+)\*/.*?/\*\1>\*/", text, re.DOTALL):
        if mark.start() < end and start < mark.end():
            inside.add(int(mark[1]))
    if inside:
        return inside
    line = text[text.rfind(b"\n", 0, start) + 1:text.find(b"\n", end)]
    return {int(number) for number in re.findall(rb"/\*<(\d+)\*/", line)}


def compile_what_compiles(mutants):
    """The test binaries by name, each with the directory that it runs in."""
    # What did not compile the last time will not now; without that file all are tried again.
    left_out = set(load("left_out", []))
    while True:
        instrument(mutants, left_out)
        save("left_out", sorted(left_out))
        content, messages = cargo("test", "--no-run", *TESTS)
        if content:
            made = [m for m in messages if m.get("executable") and m["profile"]["test"]]
            homes = {m["executable"]: str(Path(m["manifest_path"]).parent) for m in made}
            return {m["target"]["name"]: [m["executable"], homes[m["executable"]]] for m in made}
        details = [m["message"] for m in messages if "message" in m]
        spans = [span for d in details if d["level"] == "error" for span in d["spans"]]
        found = blamed([s for s in spans if s["is_primary"]]) - left_out or blamed(spans) - left_out
        if not found:
            said = "".join(d["rendered"] for d in details)
            sys.exit("no mutant can be blamed for this:\n" + said)
        left_out |= found
        print(f"{len(left_out)} do not fit or do not compile", flush=True)


def build():
    AREA.mkdir(parents=True, exist_ok=True)
    mutants = listed()
    copy_tree(mutants)
    save("traces_complete", False)
    save("binaries", compile_what_compiles(mutants))
    save("mutants", mutants)
    trace()


# --- Running tests -----------------------------------------------------------------------------


def run_test(binaries, case, seconds, **variables):
    """Whether the test passes, and the processor's time that it takes; None when more than
    `seconds`, or when it does not end."""
    binary, name = case.split(" ")
    executable, home = binaries[binary]

    def limit():
        resource.setrlimit(resource.RLIMIT_CPU, (ceil(seconds), ceil(seconds) + 1))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        os.nice(NICE)

    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    ran = subprocess.Popen(
        [executable, "--exact", name], cwd=home, env=dict(ENVIRONMENT, **variables),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True, preexec_fn=limit,
    )
    try:
        ran.wait(20 * seconds)
    except subprocess.TimeoutExpired:
        os.killpg(ran.pid, signal.SIGKILL)
        ran.wait()
    took = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    ended = ran.returncode not in (-signal.SIGKILL, -signal.SIGXCPU)
    return (ran.returncode == 0 if ended else None), took


def test_cases(binaries):
    for binary, (executable, home) in sorted(binaries.items()):
        text = subprocess.run([executable, "--list"], cwd=home, stdout=subprocess.PIPE, text=True)
        for name in re.findall(r"^(\S+): test$", text.stdout, re.MULTILINE):
            yield f"{binary} {name}"


def trace():
    """Which test comes by which mutants, and in how many seconds. Tests that were asked before
    are not asked again: remove `traces.json` when much has changed."""
    binaries, traces, path = load("binaries", {}), load("traces", {}), AREA / "trace"
    for case in test_cases(binaries):
        if case in traces:
            continue
        path.unlink(missing_ok=True)
        passed, took = run_test(binaries, case, TRACED_SECONDS, MUTANT_TRACE=str(path))
        if passed is False:
            sys.exit(f"{case} fails without a mutant")
        known = path.exists() and passed
        numbers = [int(n) for n in path.read_text().split()] if known else []
        traces[case] = {"seconds": took, "numbers": numbers}
        save("traces", traces)
    save("traces_complete", True)
    print(f"{len(traces)} tests, {sum(t['seconds'] for t in traces.values()):.0f} s")


# --- Hunting -----------------------------------------------------------------------------------


class Hunt:
    def __init__(self, seconds):
        self.binaries, self.traces = load("binaries", {}), load("traces", {})
        self.seconds = seconds
        self.reach = defaultdict(list)
        for case, traced in self.traces.items():
            for number in traced["numbers"]:
                self.reach[number].append(case)
        self.catches = defaultdict(Counter)

    def order(self, mutant):
        """What catches most for its time comes first."""
        function = (mutant.get("function") or {}).get("function_name")
        near, file = self.catches[mutant["file"], function], self.catches[mutant["file"]]

        def cost(case):
            likely = 1 + 20 * near[case] + 2 * file[case]
            return (self.traces[case]["seconds"] + 0.005) / likely

        return sorted(self.reach[mutant["number"]], key=cost)

    def attempt(self, mutant):
        cases, left = self.order(mutant), self.seconds
        for case in cases:
            if left < 0:
                return "undecided", ""
            patience, number = 2 + 8 * self.traces[case]["seconds"], mutant["number"]
            passed, took = run_test(self.binaries, case, patience, MUTANT=str(number))
            left -= took
            if not passed:
                function = (mutant.get("function") or {}).get("function_name")
                self.catches[mutant["file"], function][case] += 1
                self.catches[mutant["file"]][case] += 1
                return ("caught" if passed is False else "timeout"), case
        return ("missed" if cases else "unreached"), ""


def chosen(words):
    mutants = load("mutants", [])
    return [m for m in mutants if not words or any(w in m["name"] for w in words)]


def hunt(words, seconds, again):
    verdicts, left_out = load("verdicts", {}), set(load("left_out", []))
    hunting, told = Hunt(seconds), time.monotonic()
    final = ["caught", "timeout"] + ([] if again else ["missed", "unreached", "undecided"])
    for mutant in chosen(words):
        key = mutant["key"]
        if mutant["number"] in left_out or verdicts.get(key, [""])[0] in final:
            continue
        verdicts[key] = hunting.attempt(mutant)
        if verdicts[key][0] not in ("caught", "timeout"):
            print(f"{verdicts[key][0]}: {mutant['name']}", flush=True)
        if time.monotonic() - told > 5:
            save("verdicts", verdicts)
            told = time.monotonic()
    save("verdicts", verdicts)


def report(words, untried):
    verdicts, left_out = load("verdicts", {}), set(load("left_out", []))
    counts = defaultdict(Counter)
    for mutant in chosen(words):
        verdict = verdicts.get(mutant["key"], ["not yet"])[0]
        if mutant["number"] in left_out:
            verdict = "untried"
        counts[mutant["file"]][verdict] += 1
        counts["all"][verdict] += 1
        if verdict in ("missed", "unreached", "undecided") or untried and verdict == "untried":
            print(f"{verdict}: {mutant['name']}")
    for file, count in counts.items():
        print(f"{file}: " + ", ".join(f"{n} {verdict}" for verdict, n in sorted(count.items())))


def main():
    words = sys.argv[1:]
    seconds = 20
    if "--seconds" in words:
        at = words.index("--seconds")
        seconds = float(words[at + 1])
        del words[at:at + 2]
    flags = {word for word in words if word.startswith("--")}
    words = [word for word in words if word not in flags]
    if words[:1] == ["build"] and len(words) == 1:
        build()
    elif words[:1] == ["trace"] and len(words) == 1:
        trace()
    elif words[:1] == ["hunt"]:
        if not load("traces_complete", False):
            sys.exit("not every test has been traced; run `mutants.py trace` first")
        hunt(words[1:], seconds, "--again" in flags)
    elif words[:1] == ["report"]:
        report(words[1:], "--untried" in flags)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
