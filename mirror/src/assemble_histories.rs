//! Every history of two members up to six actions and of three up to four: losses, returns, older images,
//! replacements, crashes inside rounds and resyncs, starts of any subset with and without force.
//! A model of what each disk holds judges what [`assemble`] and [`judge_return`] decide: no
//! stale or divergent copy ever serves, a delta leaves nothing out, and nobody is refused
//! without a reason that is true.
//!
//! The unit of data is a write. A disk *holds* a set of them; the last write of a run may be hot.

use super::*;
use crate::create::{CreateRequest, NewMember, plan};
use crate::superblock::{Loss, SlotRecord};
use std::collections::BTreeSet;
use uuid::Uuid;

type Writes = BTreeSet<u32>;

#[derive(Clone)]
struct Disk {
    superblock: Superblock,
    sequence: u64,
    holds: Writes,
    /// Its last write: its extent is hot there.
    hot: Option<u32>,
    /// Its copy of the missed maps, one a slot.
    missed: Vec<Writes>,
}

#[derive(Clone)]
struct Running {
    config: Superblock,
    sequence: u64,
    in_sync: Vec<usize>,
    missed: Vec<Writes>,
    holds: Writes,
}

#[derive(Clone)]
struct World {
    disks: Vec<Disk>,
    /// Of each disk as it was when the last run began.
    images: Vec<Disk>,
    running: Option<Running>,
    /// What has been acknowledged and not been given up by force.
    acknowledged: Writes,
    /// Somebody was started by force, or an older image was attached.
    tampered: bool,
    next: u32,
}

#[derive(Clone, Copy, Debug)]
enum Action {
    Lose(usize),
    CrashInRound(usize),
    Return(usize),
    CrashInResync(usize),
    Replace(usize),
    OlderImage(usize),
    Crash,
    /// Members present, one bit a slot.
    Start(usize),
    Force(usize),
}
use Action::{Crash, CrashInResync, CrashInRound, Force, Lose, OlderImage, Replace, Return, Start};

fn stamp(sequence: u64) -> Stamp {
    Stamp {
        ordinal: 0,
        sequence,
    }
}

impl World {
    fn new(members: usize) -> Self {
        let request = CreateRequest {
            name: "m".into(),
            members: (0..members)
                .map(|slot| NewMember {
                    path: format!("/dev/{slot}"),
                    size_bytes: 1 << 30,
                    logical_block_bytes: 512,
                    zeroed: true,
                })
                .collect(),
            size_bytes: Some(16 << 20),
            logical_block_bytes: None,
            random: (1..=20).collect(),
            now_secs: 0,
        };
        let plan = plan(&request).unwrap();
        let disk = |(slot, member): (usize, &crate::create::MemberPlan)| {
            let (_, bytes) = &member.superblocks[0];
            let superblock = Superblock::decode(bytes).unwrap();
            assert_eq!(usize::from(superblock.own_slot), slot);
            Disk {
                superblock,
                sequence: 1,
                holds: Writes::new(),
                hot: None,
                missed: vec![Writes::new(); members],
            }
        };
        let disks: Vec<Disk> = plan.members.iter().enumerate().map(disk).collect();
        Self {
            images: disks.clone(),
            disks,
            running: None,
            acknowledged: Writes::new(),
            tampered: false,
            next: 1,
        }
    }

    fn fresh(&mut self) -> u32 {
        self.next += 1;
        self.next
    }

    fn seen(&self, slot: usize) -> Seen {
        let disk = &self.disks[slot];
        Seen {
            path: format!("/dev/{slot}"),
            superblock: disk.superblock.clone(),
            position: stamp(disk.sequence),
        }
    }

    /// A write that is acknowledged; `also` receives it though it is not in-sync.
    fn write(&mut self, also: Option<usize>) {
        let write = self.fresh();
        let Some(run) = &mut self.running else { return };
        run.sequence += 3;
        run.holds.insert(write);
        for slot in 0..self.disks.len() {
            if run.in_sync.contains(&slot) || also == Some(slot) {
                self.disks[slot].holds.insert(write);
                self.disks[slot].hot = Some(write);
                self.disks[slot].sequence = run.sequence;
            } else {
                run.missed[slot].insert(write);
            }
        }
        for &slot in run.in_sync.iter().chain(&also) {
            self.disks[slot].missed.clone_from(&run.missed);
        }
        self.acknowledged.clone_from(&run.holds);
    }

    /// The configuration reaches these disks.
    fn round(&mut self, slots: &[usize]) {
        let Some(run) = &self.running else { return };
        for &slot in slots {
            let disk = &mut self.disks[slot];
            let member = run.config.slots[slot].member.unwrap();
            disk.superblock = Superblock {
                member,
                own_slot: u8::try_from(slot).unwrap(),
                write_count: disk.superblock.write_count + 1,
                ..run.config.clone()
            };
        }
    }

    /// The configuration without the member in `slot`; false if it is the last one.
    fn take_out(&mut self, slot: usize) -> bool {
        let (epoch, lost) = (u128::from(self.fresh()) << 96, self.seen(slot));
        let Some(run) = &mut self.running else {
            return false;
        };
        if !run.in_sync.contains(&slot) || run.in_sync.len() < 2 {
            return false;
        }
        run.in_sync.retain(|&other| other != slot);
        run.config.slots[slot].state = SlotState::Faulty;
        run.config.slots[slot].loss = Some(Loss {
            epoch: lost.superblock.epoch.id,
            position: lost.position,
            block_exact: true,
        });
        run.config.begin_epoch(epoch);
        run.config.event_count += 1;
        true
    }

    /// The member in `slot` joins; false if it may not.
    fn join(&mut self, slot: usize, new: bool) -> bool {
        let (epoch, seen) = (u128::from(self.fresh()) << 96, self.seen(slot));
        let uuid = Uuid::from_u128(u128::from(self.fresh()) << 64);
        let Some(run) = &mut self.running else {
            return false;
        };
        if run.in_sync.contains(&slot) {
            return false;
        }
        let verdict = judge_return(&run.config, &seen);
        let disk = &mut self.disks[slot];
        let record = &mut run.config.slots[slot];
        let full = match verdict {
            _ if new => {
                disk.holds.clear();
                *record = SlotRecord {
                    member: Some(uuid),
                    loss: Some(Loss {
                        epoch,
                        position: stamp(run.sequence + 2),
                        block_exact: false,
                    }),
                    ..SlotRecord::empty()
                };
                true
            }
            Verdict::Delta { own_hot } => {
                if let Some(hot) = disk.hot.filter(|_| own_hot) {
                    run.missed[slot].insert(hot);
                }
                false
            }
            Verdict::Full { .. } => true,
            Verdict::InSync | Verdict::Refused { .. } => return false,
        };
        if full {
            run.missed[slot] = &run.holds | &disk.holds;
        }
        run.sequence += 2;
        record.state = SlotState::Resyncing;
        record.base = stamp(run.sequence);
        record.full = full;
        run.config.begin_epoch(epoch);
        run.config.event_count += 1;
        disk.sequence = run.sequence;
        let receiving: Vec<usize> = run.in_sync.iter().copied().chain([slot]).collect();
        self.round(&receiving);
        self.write(Some(slot));
        true
    }

    /// The resync ends: what was missed has been copied.
    fn finish(&mut self, slot: usize) {
        let Some(run) = &mut self.running else { return };
        let disk = &mut self.disks[slot];
        let missed = std::mem::take(&mut run.missed[slot]);
        for write in missed {
            if run.holds.contains(&write) {
                disk.holds.insert(write);
            } else {
                disk.holds.remove(&write);
            }
        }
        assert_eq!(
            disk.holds, run.holds,
            "the resync of slot {slot} left something out"
        );
        run.config.slots[slot].state = SlotState::InSync;
        run.config.slots[slot].full = false;
        run.config.event_count += 1;
        run.in_sync.push(slot);
        let receiving = run.in_sync.clone();
        self.round(&receiving);
        self.write(None);
    }

    fn start(&mut self, present: usize, force: bool) -> bool {
        let slots: Vec<usize> = (0..self.disks.len())
            .filter(|slot| present >> slot & 1 == 1)
            .collect();
        let seen: Vec<Seen> = slots.iter().map(|&slot| self.seen(slot)).collect();
        let plan = match assemble(&seen, AssembleOptions { force }) {
            Ok(plan) => plan,
            Err(refusal) => {
                let all_here = slots.len() == self.disks.len();
                let right = match refusal {
                    Refusal::MayBeOld { .. } | Refusal::NoSource(_) => !all_here || self.tampered,
                    Refusal::SplitBrain { .. } => self.tampered,
                    _ => false,
                };
                assert!(right, "refused for no reason: {refusal}");
                return false;
            }
        };
        let verdicts = slots.iter().zip(&plan.verdicts);
        let in_sync: Vec<usize> = verdicts
            .filter(|(_, verdict)| **verdict == Verdict::InSync)
            .map(|(&slot, _)| slot)
            .collect();
        let holds = self.disks[in_sync[0]].holds.clone();
        if force {
            // What only an absent member held is given up.
            // Somebody who is not here may go on alone, not knowing of this.
            self.tampered |= present + 1 != 1 << self.disks.len();
            self.acknowledged.clone_from(&holds);
        }
        for &slot in &in_sync {
            assert_eq!(self.disks[slot].holds, holds, "slots {in_sync:?} differ");
        }
        let complete = |slot: &usize| self.disks[*slot].holds.is_superset(&self.acknowledged);
        if !complete(&in_sync[0]) {
            // Nobody can tell when every disk that is here has been rolled back.
            let known = slots.iter().any(complete) || !self.tampered;
            assert!(!known, "a stale member serves: {in_sync:?}");
            self.acknowledged.clone_from(&holds);
        }
        self.begin(&plan, &seen, in_sync, holds);
        true
    }

    fn begin(&mut self, plan: &Plan, seen: &[Seen], in_sync: Vec<usize>, holds: Writes) {
        self.images.clone_from(&self.disks);
        let mut config = seen[plan.newest].superblock.clone();
        let ahead = in_sync
            .iter()
            .map(|&slot| self.disks[slot].sequence)
            .max()
            .unwrap();
        let newest = in_sync
            .iter()
            .copied()
            .max_by_key(|&slot| self.disks[slot].sequence)
            .unwrap();
        let mut missed = self.disks[newest].missed.clone();
        for (slot, _) in &plan.lost {
            let here = seen.iter().any(|s| s.superblock.own_slot == *slot);
            let slack = if here { 0 } else { COMMITS_IN_FLIGHT_MAX };
            let record = &mut config.slots[usize::from(*slot)];
            record.state = SlotState::Missing;
            record.loss = Some(Loss {
                epoch: config.epoch.id,
                position: stamp(ahead.saturating_sub(slack)),
                block_exact: false,
            });
            missed[usize::from(*slot)].clear();
        }
        // R12: what may be hot here is missed by everybody else.
        for (slot, missed) in missed.iter_mut().enumerate() {
            if !in_sync.contains(&slot) {
                missed.extend(in_sync.iter().filter_map(|&slot| self.disks[slot].hot));
            }
        }
        if !plan.lost.is_empty() {
            config.begin_epoch(u128::from(self.fresh()) << 96);
        }
        config.event_count += 1;
        let sequence = seen.iter().map(|s| s.position.sequence).max().unwrap() + 1;
        self.running = Some(Running {
            config,
            sequence,
            in_sync: in_sync.clone(),
            missed,
            holds,
        });
        self.round(&in_sync);
        self.write(None);
    }

    /// Does it, if it can be done now.
    fn act(&mut self, action: Action) -> bool {
        match action {
            Start(present) if self.running.is_none() => self.start(present, false),
            Force(present) if self.running.is_none() => self.start(present, true),
            OlderImage(slot) if self.running.is_none() => {
                self.disks[slot] = self.images[slot].clone();
                self.tampered = true;
                true
            }
            _ if self.running.is_none() => false,
            Start(_) | Force(_) | OlderImage(_) => false,
            Crash => self.running.take().is_some(),
            Lose(slot) => {
                let lost = self.take_out(slot);
                let left = self.running.as_ref().map(|run| run.in_sync.clone());
                if lost {
                    self.round(&left.unwrap_or_default());
                    self.write(None);
                }
                lost
            }
            CrashInRound(slot) => {
                let lost = self.take_out(slot);
                let left = self
                    .running
                    .as_ref()
                    .map(|run| run.in_sync.clone())
                    .unwrap_or_default();
                if lost {
                    // One of those that stay has it; with a single one the round is complete.
                    self.round(&left[..1]);
                    self.running = None;
                }
                lost
            }
            Return(slot) | Replace(slot) => {
                let joined = self.join(slot, matches!(action, Replace(_)));
                if joined {
                    self.finish(slot);
                }
                joined
            }
            CrashInResync(slot) => {
                let joined = self.join(slot, false);
                if joined {
                    self.running = None;
                }
                joined
            }
        }
    }
}

fn actions(members: usize) -> Vec<Action> {
    let by_slot = [
        Lose,
        CrashInRound,
        Return,
        CrashInResync,
        Replace,
        OlderImage,
    ];
    let mut all: Vec<Action> = by_slot
        .iter()
        .flat_map(|make| (0..members).map(make))
        .collect();
    all.push(Crash);
    all.extend((1..1 << members).flat_map(|present| [Start(present), Force(present)]));
    all
}

/// Follows every history of `left` more actions; returns how many there were.
fn explore(world: &World, actions: &[Action], left: usize, path: &mut Vec<Action>) -> u64 {
    let mut histories = 1;
    for &action in actions.iter().filter(|_| left > 0) {
        let mut next = world.clone();
        path.push(action);
        let step = std::panic::AssertUnwindSafe(|| next.act(action));
        match std::panic::catch_unwind(step) {
            Ok(true) => histories += explore(&next, actions, left - 1, path),
            Ok(false) => {}
            Err(_) => panic!("after {path:?}"),
        }
        path.pop();
    }
    histories
}

fn explore_all(members: usize, length: usize) {
    let mut world = World::new(members);
    assert!(world.act(Start((1 << members) - 1)));
    let histories = explore(&world, &actions(members), length, &mut Vec::new());
    assert!(histories > 1000, "{histories}");
    eprintln!("{histories} histories of {members} members, up to {length} actions");
}

#[test]

fn all_histories_of_two_members() {
    explore_all(2, 6);
}

#[test]
fn all_histories_of_three_members() {
    explore_all(3, 4);
}
