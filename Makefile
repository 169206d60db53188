# Everything a person types here: quickstart, build, test, fuzz, bench, lint, clean.
#
# Each target installs what it needs first (scripts/deps.sh: quick when it is there; needs root
# only when something is missing). CARGO_TARGET_DIR is honoured.

CARGO ?= cargo
# The kernel families that `make test` boots.
KERNELS ?= 6.12 7.2
# How long `make fuzz`, and `make test` in short, look at each target.
FUZZ_SECONDS ?= 600
FUZZ_SHORT_SECONDS ?= 5
FUZZ_TARGET_DIR = $(or $(CARGO_TARGET_DIR),target)/fuzz
# What `make test` plays in the simulator (`cargo sim --minutes 60` goes on for an hour), and how
# many actions the histories of three members have that assembly is tried on.
HISTORIES ?= 10000
ASSEMBLY_LENGTH ?= 5
CRASH_SAMPLES ?= 36
CRASH_SCHEDULES ?= 4
# What lint and doc leave out of a person's way is an error here.
export RUSTDOCFLAGS ?= -D warnings

# One part after the other, whatever make is told: their output is read by sections.
.NOTPARALLEL:

.PHONY: help deps quickstart build test test-unit test-sim test-histories test-fuzz test-native \
	test-guest fuzz bench lint fmt clippy doc clean

help:
	@echo "make quickstart   build, and show the main job on two image files"
	@echo "make build        release binaries: mirrorctl and the daemon ublk-mirror"
	@echo "make test         unit, simulator, native and real-kernel tests, some fuzzing"
	@echo "make fuzz         fuzz each decoder for FUZZ_SECONDS (600)"
	@echo "make bench        measure, and write tables and a picture to benches/out"
	@echo "make lint         formatting, clippy, documentation"
	@echo "make clean        remove what was built (kernels and tools in .cache too)"

deps:
	@scripts/deps.sh

build: deps
	$(CARGO) build --release -p ublk-target -p mirrorctl

quickstart: build
	scripts/quickstart.sh

# The histories of the simulator are timed.
test: test-unit test-sim test-histories test-fuzz test-native test-guest

test-unit: deps
	@echo "=== unit tests"
	ASSEMBLY_LENGTH=$(ASSEMBLY_LENGTH) \
		$(CARGO) test --workspace --exclude ublk-mirror-tests --no-fail-fast

test-sim: deps
	@echo "=== simulator and style tests"
	tests/mutations/run.py --check
	CRASH_SAMPLES=$(CRASH_SAMPLES) CRASH_SCHEDULES=$(CRASH_SCHEDULES) \
		$(CARGO) test --profile sim -p ublk-mirror-tests --no-fail-fast -- --nocapture

test-histories: deps
	@echo "=== histories"
	$(CARGO) sim --histories $(HISTORIES) && echo "ok histories" || { echo "not ok histories"; false; }

test-fuzz: deps
	@echo "=== fuzz"
	scripts/fuzz.sh $(FUZZ_SHORT_SECONDS)

test-native: build
	@echo "=== native tests"
	tests/native/run.py

test-guest: build
	tests/guest/all.sh $(KERNELS) 3>&1

fuzz: deps
	scripts/fuzz.sh $(FUZZ_SECONDS)

bench: build
	scripts/deps.sh --bench
	benches/native/bench.sh
	benches/guest/host.sh $(KERNELS)
	benches/report.py

lint: fmt clippy doc

fmt:
	$(CARGO) fmt --all --check
	cd fuzz && $(CARGO) fmt --check

clippy: deps
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	$(CARGO) clippy --manifest-path fuzz/Cargo.toml --target-dir $(FUZZ_TARGET_DIR) -- -D warnings

doc: deps
	$(CARGO) doc --workspace --no-deps --document-private-items

clean:
	$(CARGO) clean
	rm -rf .cache
