//! Crash enumeration: short scripts, a power cut after every device operation, and for each
//! every subset of unflushed sectors where there are few, a seeded sample where there are many.
//! Then recovery, with a second crash somewhere in it, and the oracle.

use crate::machine::{Client, Machine, path};
use mirror::Host as _;
use mirror::control::MemberState;
use mirror::sim::{Faults, Rng, SimDisk, SimHost};
use std::cell::Cell;
use std::collections::HashSet;
use std::rc::Rc;
use std::time::Duration;

const SIZE: u64 = 24 << 20;
const EXTENT: u64 = 4 << 20;

#[derive(Clone, Copy)]
enum Step {
    /// Offset and length.
    Write(u64, usize),
    Fua(u64, usize),
    Zeroes(u64, u64),
    /// An extent.
    Discard(u64),
    Flush,
    Seconds(u64),
    /// A slot.
    Fail(u8),
    Vanish(usize),
    Return(usize),
    AllInSync,
}
use Step::{AllInSync, Discard, Fail, Flush, Fua, Return, Seconds, Vanish, Write, Zeroes};

struct Script {
    name: &'static str,
    members: usize,
    /// Played to the end first.
    before: &'static [Step],
    /// Played one after the other while the crashes come.
    steps: &'static [Step],
    /// Played beside `steps`.
    beside: &'static [Step],
}

const WRITTEN: &[Step] = &[Write(0, 8192), Write(EXTENT, 4096), Flush];
const AWAY: &[Step] = &[
    Write(0, 65536),
    Flush,
    Fail(1),
    Write(8192, 8192),
    Write(EXTENT, 4096),
];

const SCRIPTS: &[Script] = &[
    Script {
        name: "first write",
        members: 2,
        before: &[],
        steps: &[Write(4096, 4096)],
        beside: &[],
    },
    Script {
        name: "write",
        members: 2,
        before: WRITTEN,
        steps: &[Write(0, 4096), Write(4096, 512)],
        beside: &[],
    },
    Script {
        name: "write, flush",
        members: 2,
        before: WRITTEN,
        steps: &[Write(0, 4096), Flush],
        beside: &[],
    },
    Script {
        name: "FUA",
        members: 2,
        before: WRITTEN,
        steps: &[Fua(0, 4096), Fua(0, 1024)],
        beside: &[],
    },
    Script {
        name: "cooling",
        members: 2,
        before: WRITTEN,
        steps: &[Write(0, 4096), Seconds(14)],
        beside: &[],
    },
    Script {
        name: "cooling beside writes",
        members: 2,
        before: WRITTEN,
        steps: &[Seconds(14)],
        beside: &[
            Seconds(10),
            Write(0, 512),
            Seconds(1),
            Write(EXTENT, 512),
            Seconds(1),
            Write(0, 512),
        ],
    },
    Script {
        name: "a loss with writes in flight",
        members: 2,
        before: WRITTEN,
        steps: &[Vanish(1), Write(0, 4096), Flush],
        beside: &[Write(EXTENT, 2048), Write(4096, 4096)],
    },
    Script {
        name: "the first member is lost",
        members: 2,
        before: WRITTEN,
        steps: &[Vanish(0), Write(0, 4096), Flush],
        beside: &[],
    },
    Script {
        name: "delta resync",
        members: 2,
        before: AWAY,
        steps: &[Return(1), AllInSync],
        beside: &[Write(8192, 4096)],
    },
    Script {
        name: "twice away",
        members: 2,
        before: AWAY,
        steps: &[Return(1), Fail(1), Write(12288, 4096), Return(1), AllInSync],
        beside: &[],
    },
    Script {
        name: "away while the source goes",
        members: 3,
        before: &[Write(0, 8192), Flush, Fail(2), Write(4096, 4096)],
        steps: &[Return(2), Vanish(0), Write(0, 4096), Flush],
        beside: &[],
    },
    Script {
        name: "a round with three",
        members: 3,
        before: WRITTEN,
        steps: &[
            Vanish(2),
            Write(0, 4096),
            Vanish(1),
            Write(4096, 4096),
            Flush,
        ],
        beside: &[],
    },
    Script {
        name: "discard of an extent",
        members: 2,
        before: WRITTEN,
        steps: &[Discard(0), Write(4096, 4096)],
        beside: &[],
    },
    Script {
        name: "write-zeroes of parts",
        members: 2,
        before: WRITTEN,
        steps: &[Zeroes(512, 4096), Zeroes(0, EXTENT + 1024)],
        beside: &[],
    },
];

async fn play(client: Client, disks: Vec<SimDisk>, steps: &'static [Step]) {
    let host = SimHost(client.world.clone());
    for &step in steps {
        // Errors are legal while a disk is away; wrong data never is.
        match step {
            Write(offset, len) => drop(client.write(offset, len, false).await),
            Fua(offset, len) => drop(client.write(offset, len, true).await),
            Zeroes(offset, len) => drop(client.write_zeroes(offset, len, false).await),
            Discard(extent) => drop(client.discard_extent(extent).await),
            Flush => drop(client.flush().await),
            Seconds(count) => host.sleep(Duration::from_secs(count)).await,
            Fail(slot) => {
                let member = mirror::control::MemberRef::Slot(slot);
                drop(client.mirror.fail(&member).await);
            }
            Vanish(slot) => disks[slot].set_faults(Faults {
                gone: true,
                ..Faults::default()
            }),
            Return(slot) => {
                disks[slot].set_faults(Faults::default());
                let disk = disks[slot].clone();
                drop(client.mirror.re_add(path(slot), disk, false, false).await);
            }
            AllInSync => {
                let all = || {
                    let members = client.mirror.status().members;
                    members.iter().all(|m| m.state == MemberState::InSync)
                };
                for _ in 0..60 {
                    if all() {
                        break;
                    }
                    host.sleep(Duration::from_secs(1)).await;
                }
            }
        }
    }
}

/// The machine at the moment after `operations` of the script's; true when it had ended before.
fn interrupted(script: &Script, seed: u64, operations: u64) -> (Machine, bool) {
    let mut machine = Machine::new(seed, script.members, SIZE);
    machine.start();
    let before = play(machine.client(), machine.disks.clone(), script.before);
    machine.world.block_on(before);
    let left = Rc::new(Cell::new(2));
    for steps in [script.steps, script.beside] {
        let (playing, left) = (
            play(machine.client(), machine.disks.clone(), steps),
            left.clone(),
        );
        machine.world.spawn_task(async move {
            playing.await;
            left.set(left.get() - 1);
        });
    }
    let begun = machine.operations();
    let reached = || left.get() == 0 || machine.operations() - begun >= operations;
    assert!(
        machine.world.run(2_000_000, reached),
        "{} stands still",
        script.name
    );
    (machine, left.get() == 0)
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

/// Starts again, with a crash in the first start if `twice` says after how many operations,
/// and looks at everything.
fn recover(machine: &mut Machine, twice: Option<u64>, what: &str) {
    for disk in &machine.disks {
        disk.set_faults(Faults::default());
    }
    if let Some(operations) = twice {
        machine.start_cut_short(operations);
        machine.cut_power();
    }
    let started = machine.start_on(&(0..machine.disks.len()).collect::<Vec<_>>(), false);
    assert!(started.is_ok(), "{what}: {}", started.unwrap_err());
    machine.check_all(what);
    let mirror = machine.mirror();
    let equal = || mirror.status().extents.unequalised_blocks == 0;
    assert!(machine.world.run(1_000_000, equal), "{what}: never equal");
    machine.compare_members();
}

fn samples() -> usize {
    let text = std::env::var("CRASH_SAMPLES").ok();
    text.and_then(|text| text.parse().ok()).unwrap_or(6)
}

/// Crashes in `script` after every operation; returns the states visited.
fn enumerate(script: &Script) -> HashSet<u64> {
    let mut states = HashSet::new();
    let mut rng = Rng::new(1);
    for operations in 0.. {
        let (mut choices, mut done, mut few) = (Choices::default(), 0, true);
        loop {
            let (mut machine, ended) = interrupted(script, operations, operations);
            if few {
                machine.cut_power_choosing(&mut |of| choices.choose(of));
                few = done > 0 || choices.ways() <= samples();
            } else {
                machine.cut_power_choosing(&mut |of| rng.index(of));
            }
            let state = machine
                .disks
                .iter()
                .fold(operations, |all, disk| all.rotate_left(9) ^ disk.digest());
            if states.insert(state) {
                let what = format!("{}, crash after {operations}, way {done}", script.name);
                let twice = rng.one_in(3).then(|| rng.below(60));
                recover(&mut machine, twice, &what);
            }
            done += 1;
            let more = !few || choices.advance();
            if !more || done >= samples() {
                if ended {
                    return states;
                }
                break;
            }
        }
    }
    states
}

#[test]
fn after_every_operation() {
    let threads: Vec<_> = (0..2)
        .map(|half| {
            std::thread::spawn(move || {
                let own = SCRIPTS.iter().skip(half).step_by(2);
                own.map(|script| {
                    let states = enumerate(script).len();
                    eprintln!("{states:8} states: {}", script.name);
                    states
                })
                .sum::<usize>()
            })
        })
        .collect();
    let visited: usize = threads
        .into_iter()
        .map(|thread| thread.join().unwrap())
        .sum();
    eprintln!("{visited:8} states visited");
    assert!(visited > SCRIPTS.len() * 10, "the scripts do nothing");
}
