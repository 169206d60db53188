//! Crash enumeration: short scripts, a crash after every device operation, and for each every
//! subset of unflushed sectors where there are few, the extremes and a seeded sample where there
//! are many; at each point once more as a daemon that is killed while the disks keep their
//! caches. Then recovery, sometimes with another crash in the middle of it, all members brought
//! back, and the oracle.

use crate::machine::Machine;
use crate::play::{Bench, act, ask, bring_all_back};
use crate::script::{Action, Fault, Request, SIZE};
use mirror::control::MemberState;
use mirror::sim::{Faults, Rng, SimHost};
use mirror::{Host as _, sim::SimDisk};
use std::cell::Cell;
use std::collections::HashSet;
use std::rc::Rc;
use std::sync::Mutex;
use std::time::Duration;

/// Sectors of an extent.
const EXTENT: u64 = 8192;

#[derive(Clone, Copy)]
enum Step {
    Ask(Request),
    Do(Action),
    /// Until every member is in-sync, a minute at most.
    AllInSync,
}
use Action::{AllFaulty, Fail, Faulty, Replace, ReturnAll, Seconds};
use Request::{Discard, Flush, Fua, Read, Write, Zeroes};
use Step::{AllInSync, Ask, Do};

#[derive(Clone, Copy)]
struct Script {
    name: &'static str,
    members: usize,
    /// Played to the end first.
    before: &'static [Step],
    /// Played one after the other while the crashes come.
    steps: &'static [Step],
    /// Played beside `steps`.
    beside: &'static [Step],
    /// The disks cannot write zeroes by themselves.
    plain: bool,
    /// The last one keeps the order of intent and data.
    order: bool,
}

const BASE: Script = Script {
    name: "",
    members: 2,
    before: WRITTEN,
    steps: &[],
    beside: &[],
    plain: false,
    order: false,
};
const WRITTEN: &[Step] = &[Ask(Write(0, 16)), Ask(Write(EXTENT, 8)), Ask(Flush)];
const AWAY: &[Step] = &[
    Ask(Write(0, 128)),
    Ask(Flush),
    Do(Fail(1)),
    Ask(Write(16, 16)),
    Ask(Write(EXTENT, 8)),
];

const SCRIPTS: &[Script] = &[
    Script {
        name: "first write",
        before: &[],
        steps: &[Ask(Write(8, 8))],
        ..BASE
    },
    Script {
        name: "first write, disks without cheap zeroes",
        before: &[],
        steps: &[Ask(Write(8, 8)), Ask(Flush)],
        plain: true,
        ..BASE
    },
    Script {
        name: "write",
        steps: &[Ask(Write(0, 8)), Ask(Write(8, 1))],
        ..BASE
    },
    Script {
        name: "write, flush",
        steps: &[Ask(Write(0, 8)), Ask(Flush)],
        ..BASE
    },
    Script {
        name: "overlapping writes, read and flush beside",
        steps: &[Ask(Write(0, 8)), Ask(Write(4, 8)), Ask(Flush)],
        beside: &[Ask(Write(6, 4)), Ask(Read(0, 16)), Ask(Flush)],
        ..BASE
    },
    Script {
        name: "FUA",
        steps: &[Ask(Fua(0, 8)), Ask(Fua(0, 2))],
        ..BASE
    },
    Script {
        name: "cooling",
        steps: &[Ask(Write(0, 8)), Do(Seconds(14))],
        ..BASE
    },
    Script {
        name: "cooling beside writes",
        steps: &[Do(Seconds(14))],
        beside: &[
            Do(Seconds(10)),
            Ask(Write(0, 1)),
            Do(Seconds(1)),
            Ask(Write(EXTENT, 1)),
            Do(Seconds(1)),
            Ask(Write(0, 1)),
        ],
        ..BASE
    },
    Script {
        name: "cooling while a member is away",
        before: AWAY,
        steps: &[Do(Seconds(13)), Ask(Write(16, 2)), Do(Seconds(13))],
        ..BASE
    },
    Script {
        name: "a loss with writes in flight",
        steps: &[Do(Faulty(1, Fault::Gone, 2)), Ask(Flush)],
        beside: &[Ask(Write(EXTENT, 4)), Ask(Write(8, 8)), Ask(Write(0, 8))],
        ..BASE
    },
    Script {
        name: "the first member is lost",
        steps: &[Do(Faulty(0, Fault::Writes, 1)), Ask(Flush)],
        beside: &[Ask(Write(0, 8)), Ask(Write(8, 8))],
        ..BASE
    },
    Script {
        name: "a stall",
        steps: &[Do(Faulty(1, Fault::Hang, 8)), Do(ReturnAll)],
        beside: &[Ask(Write(0, 8)), Ask(Write(8, 8)), Ask(Flush)],
        ..BASE
    },
    Script {
        name: "a flush fails on one",
        steps: &[Do(Faulty(1, Fault::Flushes, 2)), Do(ReturnAll), AllInSync],
        beside: &[Ask(Write(0, 8)), Ask(Flush), Ask(Write(8, 8))],
        ..BASE
    },
    Script {
        name: "a flush fails on all",
        steps: &[
            Do(AllFaulty(Fault::Flushes, 2)),
            Ask(Write(0, 16)),
            Ask(Flush),
            Do(Action::ClearFlushError),
            Ask(Flush),
        ],
        beside: &[Ask(Write(0, 8)), Ask(Flush), Ask(Write(8, 8))],
        ..BASE
    },
    Script {
        name: "a write fails on all",
        steps: &[
            Do(AllFaulty(Fault::Writes, 1)),
            Ask(Read(0, 16)),
            Ask(Flush),
        ],
        beside: &[Ask(Write(0, 8)), Ask(Write(8, 8))],
        ..BASE
    },
    Script {
        name: "delta resync",
        before: AWAY,
        steps: &[Do(ReturnAll), AllInSync],
        beside: &[Ask(Write(16, 8))],
        ..BASE
    },
    Script {
        name: "full resync",
        before: AWAY,
        steps: &[Do(Replace(1)), AllInSync],
        beside: &[Ask(Write(16, 8))],
        ..BASE
    },
    Script {
        name: "twice away",
        before: AWAY,
        steps: &[
            Do(ReturnAll),
            Do(Fail(1)),
            Ask(Write(24, 8)),
            Do(ReturnAll),
            AllInSync,
        ],
        ..BASE
    },
    Script {
        name: "lost in the middle of a resync",
        members: 3,
        before: AWAY,
        steps: &[
            Do(ReturnAll),
            Do(Faulty(0, Fault::Writes, 1)),
            Do(ReturnAll),
            AllInSync,
        ],
        beside: &[Ask(Write(16, 8)), Ask(Write(0, 8))],
        ..BASE
    },
    Script {
        name: "away while the source goes",
        members: 3,
        before: &[Ask(Write(0, 16)), Ask(Flush), Do(Fail(2)), Ask(Write(8, 8))],
        steps: &[Do(ReturnAll), Do(Faulty(0, Fault::Gone, 1)), Ask(Flush)],
        beside: &[Ask(Write(0, 8))],
        ..BASE
    },
    Script {
        name: "rounds with three",
        members: 3,
        steps: &[
            Do(Fail(2)),
            Ask(Write(0, 8)),
            Do(Fail(1)),
            Ask(Write(8, 8)),
            Ask(Flush),
        ],
        ..BASE
    },
    Script {
        name: "three, all back",
        members: 3,
        before: &[
            Ask(Write(0, 16)),
            Do(Fail(2)),
            Ask(Write(0, 8)),
            Do(Fail(1)),
            Ask(Write(8, 8)),
        ],
        steps: &[Do(ReturnAll), AllInSync, Do(ReturnAll), AllInSync],
        ..BASE
    },
    Script {
        name: "discard of an extent",
        steps: &[Ask(Discard(0)), Ask(Write(8, 8))],
        ..BASE
    },
    Script {
        name: "discard while a member is away",
        before: AWAY,
        steps: &[Ask(Discard(0)), Ask(Write(8, 8)), Do(ReturnAll), AllInSync],
        ..BASE
    },
    Script {
        name: "write-zeroes of parts",
        steps: &[Ask(Zeroes(1, 8)), Ask(Zeroes(0, EXTENT + 2))],
        ..BASE
    },
    Script {
        name: "write-zeroes of parts, disks without cheap zeroes",
        steps: &[Ask(Zeroes(1, 8)), Ask(Flush)],
        plain: true,
        ..BASE
    },
    Script {
        name: "intent and data travel together",
        before: &[],
        steps: &[Ask(Write(8, 8)), Ask(Flush)],
        beside: &[Ask(Write(EXTENT, 8))],
        order: true,
        ..BASE
    },
    Script {
        name: "intent and data travel together, three, garbage on the disks",
        members: 3,
        before: &[],
        steps: &[Ask(Write(8, 8)), Ask(Write(EXTENT - 4, 8))],
        plain: true,
        order: true,
        ..BASE
    },
    Script {
        name: "intent and data travel together after cooling",
        steps: &[Do(Seconds(14)), Ask(Write(0, 8)), Ask(Write(EXTENT, 8))],
        order: true,
        ..BASE
    },
    Script {
        name: "the intent fails on who keeps order",
        before: &[],
        steps: &[Do(Faulty(1, Fault::Writes, 1)), Ask(Flush)],
        beside: &[Ask(Write(8, 8)), Ask(Write(EXTENT, 8))],
        order: true,
        ..BASE
    },
];

fn client_of(
    machine: &Machine,
    bench: &Rc<Bench>,
    steps: &'static [Step],
) -> impl Future<Output = ()> + use<> {
    let (client, bench) = (machine.client(), bench.clone());
    async move {
        for &step in steps {
            match step {
                // Errors are legal while a disk is faulty; wrong data never is.
                Ask(request) => drop(ask(&client, request).await.is_ok()),
                Do(action) => act(&client, &bench, action).await,
                AllInSync => {
                    let all = || {
                        let members = client.mirror.status().members;
                        members.iter().all(|m| m.state == MemberState::InSync)
                    };
                    for _ in 0..60 {
                        if all() {
                            break;
                        }
                        SimHost(client.world.clone())
                            .sleep(Duration::from_secs(1))
                            .await;
                    }
                }
            }
        }
    }
}

/// All sequences of choices, one after the other.
#[derive(Default)]
struct Choices {
    /// What was chosen, of how many.
    made: Vec<(usize, usize)>,
    at: usize,
}

impl Choices {
    fn choose(&mut self, of: usize) -> usize {
        if self.at == self.made.len() {
            self.made.push((0, of));
        }
        self.at += 1;
        self.made[self.at - 1].0
    }

    /// How many sequences there are, as far as can be counted.
    fn ways(&self) -> usize {
        self.made
            .iter()
            .fold(1_usize, |ways, &(_, of)| ways.saturating_mul(of))
    }

    /// Turns to the next sequence; false after the last.
    fn advance(&mut self) -> bool {
        self.at = 0;
        while let Some((chosen, of)) = self.made.pop() {
            if chosen + 1 < of {
                self.made.push((chosen + 1, of));
                return true;
            }
        }
        false
    }
}

/// What the enumeration of a script has seen.
struct Visited {
    states: HashSet<u64>,
    rng: Rng,
    samples: usize,
    name: String,
}

impl Visited {
    /// Every way in which the machine may crash now.
    fn crash(&mut self, machine: &Machine, bench: &Bench, operations: u64) {
        let mut killed = machine.fork(bench.all_disks(), self.rng.bits());
        killed.kill_daemon();
        self.visit(killed, bench, &format!("killed after {operations}"));
        let mut choices = Choices::default();
        for way in 0.. {
            let mut fork = machine.fork(bench.all_disks(), self.rng.bits());
            let last = if choices.ways() <= self.samples {
                fork.cut_power_choosing(&mut |of| choices.choose(of));
                !choices.advance()
            } else {
                match way {
                    0 => fork.cut_power_choosing(&mut |of| of - 1),
                    1 => fork.cut_power_choosing(&mut |of| of.saturating_sub(2)),
                    _ => fork.cut_power_choosing(&mut |of| self.rng.index(of)),
                }
                way >= self.samples
            };
            self.visit(fork, bench, &format!("crash after {operations}, way {way}"));
            if last {
                return;
            }
        }
    }

    fn visit(&mut self, mut machine: Machine, bench: &Bench, what: &str) {
        machine.settle_slots(bench.slots());
        let digests = machine.disks.iter().map(SimDisk::digest);
        let state = digests.fold(0_u64, |all, digest| all.rotate_left(9) ^ digest);
        if !self.states.insert(state) {
            return;
        }
        let what = format!("{}, {what}", self.name);
        let twice = self.rng.one_in(3).then(|| self.rng.below(60));
        if let Some(operations) = twice {
            machine.start_cut_short(operations);
            machine.cut_power();
        }
        let all: Vec<usize> = (0..machine.disks.len()).collect();
        let started = machine.start_on(&all, false);
        assert!(started.is_ok(), "{what}: {}", started.unwrap_err());
        machine.check_all(&what);
        bring_all_back(&mut machine);
        machine.check_all(&what);
        let mirror = machine.mirror();
        let equal = || mirror.status().extents.unequalised_blocks == 0;
        assert!(machine.run_coarsely(equal), "{what}: never equal");
        machine.compare_members();
    }
}

/// Crashes after every operation of `script`.
fn enumerate(script: &Script, schedule: u64, samples: usize) -> HashSet<u64> {
    let mut visited = Visited {
        states: HashSet::new(),
        rng: Rng::new(schedule ^ 0xc7a5),
        samples,
        name: format!("{} (schedule {schedule})", script.name),
    };
    let mut machine = Machine::new(schedule, script.members, SIZE);
    if script.plain {
        machine
            .disks
            .iter()
            .for_each(|disk| disk.alter(|it| it.cheap_zeroes = false));
    }
    if script.order {
        machine.disks[script.members - 1].keep_order();
    }
    machine.start();
    let bench = Rc::new(Bench::of(&machine));
    machine
        .world
        .block_on(client_of(&machine, &bench, script.before));
    let left = Rc::new(Cell::new(2));
    for steps in [script.steps, script.beside] {
        let (playing, left) = (client_of(&machine, &bench, steps), left.clone());
        machine.world.spawn_task(async move {
            playing.await;
            left.set(left.get() - 1);
        });
    }
    let mut operations = machine.operations();
    let begun = operations;
    visited.crash(&machine, &bench, 0);
    while left.get() > 0 {
        let moved = || machine.operations() != operations || left.get() == 0;
        let going_on = machine.world.run(2_000_000, moved);
        assert!(going_on, "{} stands still", visited.name);
        if machine.operations() != operations {
            operations = machine.operations();
            visited.crash(&machine, &bench, operations - begun);
        }
    }
    for disk in bench.all_disks() {
        disk.set_faults(Faults::default());
    }
    visited.states
}

fn number(name: &str, default: u64) -> u64 {
    let text = std::env::var(name).ok();
    text.and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// `CRASH_SAMPLES` ways at each operation (default 6), for `CRASH_SCHEDULES` interleavings of
/// each script (default 1).
#[test]
fn after_every_operation() {
    let samples = number("CRASH_SAMPLES", 6) as usize;
    let schedules = 0..number("CRASH_SCHEDULES", 1);
    let work: Vec<_> = schedules
        .flat_map(|schedule| SCRIPTS.iter().map(move |script| (script, schedule)))
        .collect();
    let (next, all) = (Mutex::new(work.into_iter()), Mutex::new(HashSet::new()));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let Some((script, schedule)) = next.lock().unwrap().next() else {
                        return;
                    };
                    let states = enumerate(script, schedule, samples);
                    eprintln!("{:8} states: {}", states.len(), script.name);
                    all.lock().unwrap().extend(states);
                }
            });
        }
    });
    let visited = all.into_inner().unwrap().len();
    eprintln!("{visited:8} distinct states visited");
    assert!(visited > SCRIPTS.len() * 10, "the scripts do nothing");
}
