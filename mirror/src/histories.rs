//! Every history of two and of three members up to some length: losses, returns, older images,
//! replacements, crashes inside rounds, joins, resyncs and starts, and starts of any subset of
//! the members with and without force. No stale or divergent copy ever serves, no delta leaves
//! anything out, nobody is refused without reason, and every refusal says what to do.
//!
//! Histories that lead to the same world have the same continuations, so the worlds are
//! explored once each, breadth first, and the histories are counted along the way. Two worlds
//! are the same when they differ only in names: of epochs, of members, of slots (the order of
//! members decides nothing, which every start checks), of sequences that lie equally far apart,
//! and of events counted in different epochs.
//!
//! `ASSEMBLY_LENGTH=N` sets the length for three members; with `ASSEMBLY_STARTS=whole` no start
//! is cut off, so that there is memory for one action more.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test")]

mod join;
mod key;
mod model;
mod start;

use join::{Stop, Who};
use key::key;
use model::{Image, Slots, Violation, World};
use start::Cut;
use std::collections::HashMap;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Lose(usize),
    /// In one round, which was tried again because the second failed in it.
    LoseTwo(usize, usize),
    /// The slot that is lost, and who holds the new superblock.
    CrashInRound(usize, Slots),
    Return(usize),
    CrashInReturn(usize, Stop),
    /// After a split brain, without its changes.
    GiveUp(usize),
    CrashInGiveUp(usize, Stop),
    Replace(usize),
    CrashInReplace(usize, Stop),
    OlderImage(usize, Image),
    /// With a write and a commit that reached one member only.
    Crash(Option<usize>),
    /// A clean stop, after which that member may be promoted alone.
    HandOver(usize),
    /// Members present, one bit a slot.
    Start(Slots),
    CrashInStart(Slots, Cut),
    Force(Slots),
    CrashInForce(Slots, Cut),
    Promote(Slots),
    CrashInPromotion(Slots, Cut),
}
use Action::*;

fn act(world: &mut World, action: Action) -> Result<bool, Violation> {
    match action {
        Lose(slot) => Ok(world.lose_one(slot, None)),
        LoseTwo(first, second) => Ok(world.lose_two(first, second)),
        CrashInRound(slot, reached) => Ok(world.lose_one(slot, Some(reached))),
        Return(slot) => world.join(slot, Who::Returns, Stop::Done),
        CrashInReturn(slot, stop) => world.join(slot, Who::Returns, stop),
        GiveUp(slot) => world.join(slot, Who::GivesUp, Stop::Done),
        CrashInGiveUp(slot, stop) => world.join(slot, Who::GivesUp, stop),
        Replace(slot) => world.join(slot, Who::New, Stop::Done),
        CrashInReplace(slot, stop) => world.join(slot, Who::New, stop),
        OlderImage(slot, image) => Ok(world.older_image(slot, image)),
        Crash(reached) => Ok(world.crash(reached)),
        HandOver(slot) => Ok(world.hand_over(slot)),
        Start(present) => start(world, present, (false, false), None),
        CrashInStart(present, reached) => start(world, present, (false, false), Some(reached)),
        Force(present) => start(world, present, (true, false), None),
        CrashInForce(present, reached) => start(world, present, (true, false), Some(reached)),
        Promote(present) => start(world, present, (false, true), None),
        CrashInPromotion(present, reached) => start(world, present, (false, true), Some(reached)),
    }
}

/// A start that is forced or promoted, or neither, if it has to be.
fn start(
    world: &mut World,
    present: Slots,
    how: (bool, bool),
    cut_off: Option<Cut>,
) -> Result<bool, Violation> {
    let decision = world.decide(present)?;
    let decision = decision.filter(|it| (it.forced, it.promoted) == how);
    Ok(decision.is_some_and(|decision| world.begin(&decision, cut_off)))
}

/// All but starts.
fn actions(members: usize, two_hosts: bool) -> Vec<Action> {
    let mut all = vec![Crash(None)];
    for slot in 0..members {
        let sets = 1..model::one(members);
        all.extend([Lose(slot), Return(slot), Replace(slot), Crash(Some(slot))]);
        all.extend([Image::Begun, Image::Changed].map(|image| OlderImage(slot, image)));
        all.extend((0..members).map(|second| LoseTwo(slot, second)));
        all.extend(sets.clone().map(|reached| CrashInRound(slot, reached)));
        let rounds = sets.flat_map(|r| [Stop::Exact(r), Stop::Round(r), Stop::Finish(r)]);
        let stops = [Stop::Maps, Stop::Joined].into_iter();
        let stops = stops.chain([false, true].map(Stop::Resync));
        let stops: Vec<Stop> = stops.chain(rounds).collect();
        let crashes = |crash: fn(usize, Stop) -> Action| stops.iter().map(move |&s| crash(slot, s));
        all.extend(crashes(CrashInReturn).chain(crashes(CrashInReplace)));
        if two_hosts {
            all.extend([HandOver(slot), GiveUp(slot)]);
            all.extend(crashes(CrashInGiveUp));
        }
    }
    all
}

/// Every world that one more action leads to.
fn after(world: &World, actions: &[Action]) -> Result<Vec<(Action, World)>, (Action, Violation)> {
    let mut found = Vec::new();
    let stopped = world.running.is_none();
    for &action in actions {
        if stopped && !matches!(action, OlderImage(..)) {
            continue;
        }
        let mut next = world.clone();
        if act(&mut next, action).map_err(|violation| (action, violation))? {
            found.push((action, next));
        }
    }
    for present in (1..model::one(world.members)).filter(|_| stopped) {
        let decision = world.decide(present);
        let Some(decision) = decision.map_err(|violation| (Start(present), violation))? else {
            continue;
        };
        let sets = 0..model::one(world.members);
        let cuts = sets.flat_map(|r| [Cut::Round(r), Cut::Commit(r)]);
        let cuts = cuts.filter(|_| world.starts_are_cut_off);
        for cut_off in std::iter::once(None).chain(cuts.map(Some)) {
            let mut next = world.clone();
            if next.begin(&decision, cut_off) {
                let action = match (decision.forced, decision.promoted, cut_off) {
                    (_, true, None) => Promote(present),
                    (_, true, Some(reached)) => CrashInPromotion(present, reached),
                    (false, _, None) => Start(present),
                    (false, _, Some(reached)) => CrashInStart(present, reached),
                    (true, _, None) => Force(present),
                    (true, _, Some(reached)) => CrashInForce(present, reached),
                };
                found.push((action, next));
            }
        }
    }
    for (_, next) in &mut found {
        next.tidy();
    }
    Ok(found)
}

/// Worlds by the order in which they were reached.
#[derive(Default)]
struct Explored {
    /// From which one each was reached, and how; none for the first.
    from: Vec<Option<(u32, Action)>>,
    /// For each that was looked at, the worlds that one more action leads to.
    after: Vec<Vec<u32>>,
    histories: u64,
}

impl Explored {
    fn path(&self, mut at: u32) -> Vec<Action> {
        let mut path = Vec::new();
        while let Some((from, action)) = self.from[at as usize] {
            path.push(action);
            at = from;
        }
        path.reverse();
        path
    }

    /// How many histories there are up to `length` actions.
    fn count(&mut self, length: usize) {
        let mut ending = vec![0; self.from.len()];
        (ending[0], self.histories) = (1, 1);
        for _ in 0..length {
            let mut longer = vec![0; self.from.len()];
            for (after, count) in self.after.iter().zip(&ending) {
                for &next in after {
                    longer[next as usize] += count;
                }
            }
            ending = longer;
            self.histories += ending.iter().sum::<u64>();
        }
    }
}

fn explore(members: usize, length: usize, two_hosts: bool) -> Explored {
    let actions = actions(members, two_hosts);
    let mut first = World::new(members);
    let starts = std::env::var("ASSEMBLY_STARTS");
    first.starts_are_cut_off = !starts.is_ok_and(|starts| starts == "whole");
    let mut known = HashMap::from([(key(&first), 0)]);
    let mut explored = Explored::default();
    explored.from.push(None);
    let mut frontier = vec![first];
    for left in (0..length).rev() {
        let mut reached = Vec::new();
        for world in frontier {
            let at = u32::try_from(explored.after.len()).unwrap();
            let found = after(&world, &actions).unwrap_or_else(|(action, violation)| {
                panic!("{violation}, after {:?}, {action:?}", explored.path(at))
            });
            let mut numbers = Vec::with_capacity(found.len());
            for (action, next) in found {
                let new = u32::try_from(explored.from.len()).unwrap();
                let number = *known.entry(key(&next)).or_insert(new);
                if number == new {
                    explored.from.push(Some((at, action)));
                    if left > 0 {
                        reached.push(next);
                    }
                }
                numbers.push(number);
            }
            explored.after.push(numbers);
        }
        frontier = reached;
    }
    explored.count(length);
    explored
}

fn explore_all(members: usize, length: usize, two_hosts: bool) {
    let explored = explore(members, length, two_hosts);
    eprintln!(
        "{members} members{}, up to {length} actions: {} worlds, {} histories",
        if two_hosts { " on two hosts" } else { "" },
        explored.from.len(),
        explored.histories
    );
    assert!(explored.histories > 1000);
}

#[test]
fn all_histories_of_two_members() {
    explore_all(2, 7, false);
}

/// How long histories of three members are.
fn length() -> usize {
    let length = std::env::var("ASSEMBLY_LENGTH");
    length.map_or(5, |text| text.parse().unwrap())
}

#[test]
fn all_histories_of_three_members() {
    explore_all(3, length(), false);
}

/// Also with hosts that hand the mirror over and are promoted, and with a split brain's end.
#[test]
fn all_histories_of_two_hosts() {
    explore_all(2, length() + 1, true);
    explore_all(3, length() - 1, true);
}

mod traces;
