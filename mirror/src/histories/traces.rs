//! Histories worth a name: those that once went wrong, and those whose outcome is less than one
//! might wish for.

use super::Action::{
    Crash, CrashInForce, CrashInReplace, CrashInReturn, CrashInRound, CrashInStart, Force, Lose,
    LoseTwo, OlderImage, Replace, Return, Start,
};
use super::model::{Image, Slots, World};
use super::{Action, Cut, Stop, act};
use crate::assemble::Verdict;
use Image::{Begun, Changed};

/// Slots as sets.
const A: Slots = 1;
const B: Slots = 2;
const C: Slots = 4;

fn after(members: usize, actions: &[Action]) -> World {
    let mut world = World::new(members);
    for &action in actions {
        assert_eq!(act(&mut world, action), Ok(true), "{action:?}");
    }
    world
}

/// Which of these disks start in-sync, or what is said.
fn start(world: &World, present: Slots) -> Result<Slots, String> {
    match world.decide(present).unwrap() {
        Some(decision) if !decision.forced => Ok(decision.in_sync),
        _ => Err(world.refusal(present).unwrap()),
    }
}

fn refused(world: &World, present: Slots, parts: &[&str]) {
    let words = start(world, present).unwrap_err();
    assert!(parts.iter().all(|part| words.contains(part)), "{words}");
}

fn returns(world: &World, slot: usize, part: &str) {
    let words = world.verdict(slot).refusal();
    let words = words.unwrap_or_else(|| "delta".into());
    assert!(words.contains(part), "{words}");
}

#[test]
fn disks_lost_one_after_the_other_with_nearly_equal_events() {
    // mdadm's issue 22: of three disks the third is lost, then the second, then all stops. There
    // the disk that was lost first could win by its event count, and the last one be refused.
    let mut world = after(3, &[Lose(2), Lose(1), Crash(None)]);
    for (present, missing) in [(C, "/dev/0"), (B, "/dev/0"), (B | C, "/dev/0")] {
        refused(
            &world,
            present,
            &[missing, "may hold newer data", "--force"],
        );
    }
    assert_eq!(start(&world, A), Ok(A));
    for present in [A | B, A | C, A | B | C] {
        assert_eq!(
            start(&world, present),
            Ok(A),
            "the last one wins beside any other"
        );
    }
    let events = |world: &World, slot: usize| {
        let superblock = world.disks[slot].superblock.as_ref();
        superblock.unwrap().event_count
    };
    assert!(events(&world, 0) - events(&world, 2) <= 2);
    assert_eq!(act(&mut world, Start(A | B | C)), Ok(true));
    for slot in [1, 2] {
        returns(&world, slot, "delta");
        assert_eq!(act(&mut world, Return(slot)), Ok(true));
    }
}

#[test]
fn a_member_that_an_older_image_does_not_know_is_not_mixed_with_it() {
    // B is put back to before A had returned, and goes on alone: A's epoch looks like a round
    // that was cut off, but A's maps name it as effective.
    let alone = [CrashInRound(0, B), Start(B), Return(0), CrashInRound(0, B)];
    let world = after(2, &[&alone[..], &[OlderImage(1, Begun), Start(B)]].concat());
    returns(&world, 0, "split brain: /dev/0 went on without this mirror");
}

#[test]
fn the_loss_of_a_member_that_an_older_image_does_not_know_was_effective() {
    let interrupted = CrashInReturn(0, Stop::Resync(false));
    let before = [Lose(0), Lose(1), interrupted, OlderImage(2, Begun)];
    let world = after(3, &[&before[..], &[Force(C)]].concat());
    returns(&world, 1, "split brain: /dev/1 went on without this mirror");
}

#[test]
fn a_member_further_ahead_than_it_was_lost_is_not_given_a_delta() {
    // No epoch tells them apart: B was put back within the one that both are in.
    let world = after(2, &[Crash(None), OlderImage(1, Begun), Force(B)]);
    returns(&world, 0, "/dev/0 went on after this mirror had lost it");
}

#[test]
fn a_round_that_has_reached_the_joiner_was_effective() {
    // The new disk in A knows that it joined, B was put back to before: B's missed map for A is
    // another disk's.
    let joined = CrashInReplace(0, Stop::Joined);
    let world = after(2, &[Lose(0), joined, OlderImage(1, Changed)]);
    refused(
        &world,
        A | B,
        &["/dev/1 is an older copy", "start with it alone"],
    );
}

#[test]
fn older_copies_do_not_overtake_by_starting() {
    // A and B were put back and are started by force; crashes keep the start's epoch from B.
    // Had the starts gone on above C's position, B would look like C's equal. C was left out.
    let images = [Crash(None), OlderImage(0, Begun), OlderImage(1, Begun)];
    let starts = [
        CrashInForce(A | B, Cut::Round(A)),
        CrashInStart(A | B | C, Cut::Round(A)),
    ];
    let mut world = after(3, &[&images[..], &starts[..]].concat());
    assert_eq!(act(&mut world, Force(B | C)), Ok(true));
    returns(&world, 2, "--full");
}

#[test]
fn an_older_copy_that_was_left_out_does_not_start_alone_later() {
    // When it was put back B was in-sync alone, and so says its superblock.
    let before = [Lose(0), Return(0), Crash(None), OlderImage(1, Changed)];
    let alone = after(2, &before);
    assert_eq!(
        start(&alone, B),
        Ok(B),
        "nothing here tells that A has returned since"
    );
    let met = after(2, &[&before[..], &[Start(A | B), Crash(None)]].concat());
    refused(&met, B, &["slot 0", "/dev/0", "--force"]);
}

#[test]
fn an_older_copy_that_was_left_out_does_not_serve_beside_one_that_was_lost() {
    // B was lost in the middle of the round that lost A, and C was put back to before it. Each
    // for itself is in-sync by what it says, and together they prove that the round was cut off.
    // But C has met A since.
    let before = [LoseTwo(0, 1), Return(0), Crash(None), OlderImage(2, Begun)];
    let met = after(3, &[&before[..], &[Start(A | C), Crash(None)]].concat());
    refused(&met, B | C, &["slot 0", "/dev/0", "--force"]);
    // Nothing it says of the others' losses goes with its own maps.
    let mut forced = met.clone();
    assert_eq!(act(&mut forced, Force(C)), Ok(true));
    for slot in [0, 1] {
        returns(&forced, slot, "--full");
    }
}

#[test]
fn of_two_older_copies_that_were_left_out_one_may_serve_by_force() {
    let before = [
        Lose(0),
        CrashInReturn(0, Stop::Finish(B)),
        OlderImage(0, Changed),
        OlderImage(2, Changed),
    ];
    let met = after(3, &[&before[..], &[Start(A | B | C), Crash(None)]].concat());
    refused(&met, A | C, &["slot 1", "/dev/1", "--force"]);
    let decision = met.decide(A | C).unwrap().unwrap();
    assert!(decision.forced);
    assert_eq!(decision.in_sync.count_ones(), 1, "they differ");
}

#[test]
fn a_join_that_was_cut_off_is_taken_up_again_by_delta() {
    let lost = [Crash(None), Force(B)];
    for stop in [
        Stop::Exact(B),
        Stop::Maps,
        Stop::Round(B),
        Stop::Joined,
        Stop::Resync(false),
    ] {
        let mut world = after(
            2,
            &[&lost[..], &[CrashInReturn(0, stop), Start(B)]].concat(),
        );
        returns(&world, 0, "delta");
        assert_eq!(act(&mut world, Return(0)), Ok(true), "{stop:?}");
    }
}

#[test]
fn starts_cut_off_one_after_the_other_make_nobody_an_older_copy() {
    let cut_off = [
        CrashInStart(A | B, Cut::Round(A)),
        CrashInStart(A | B, Cut::Round(A)),
        CrashInStart(A | B, Cut::Round(A)),
    ];
    let world = after(3, &[&[Lose(2), Crash(None)], &cut_off[..]].concat());
    assert_eq!(start(&world, A | B), Ok(A | B));
}

#[test]
fn more_starts_than_the_history_holds_refuse_nobody() {
    let joined = [Lose(1), CrashInReturn(1, Stop::Resync(false))];
    let maps_written = [Lose(1), CrashInReturn(1, Stop::Maps)];
    for before in [joined, maps_written] {
        let mut world = after(2, &before);
        world.untouched = false; // the delta is given up
        for _ in 0..50 {
            for action in [Start(A), Crash(None)] {
                assert_eq!(act(&mut world, action), Ok(true), "{before:?}");
            }
        }
        assert_eq!(start(&world, A | B), Ok(A), "{before:?}");
        assert_eq!(act(&mut world, Start(A | B)), Ok(true));
        returns(&world, 1, "longer ago than the mirror's history");
    }
}

#[test]
fn a_replaced_disk_does_not_come_back_by_itself() {
    let world = after(2, &[Lose(0), Replace(0), Lose(0), OlderImage(0, Begun)]);
    assert!(matches!(world.verdict(0), Verdict::Refused { .. }));
    returns(&world, 0, "slot 0 now belongs to another disk");
}

#[test]
fn what_was_written_alone_before_an_older_image_is_not_missed() {
    // A was lost, B went on alone, and B is put back to before that. What is here is what a
    // restored backup of B beside a good A looks like, and that has to start: the only good
    // member must not be refused. To tell the two apart A would have to know that it was lost.
    let world = after(2, &[Lose(0), Crash(None), OlderImage(1, Begun)]);
    assert_eq!(start(&world, A | B), Ok(A));
    refused(&world, A, &["/dev/1", "may hold newer data"]);
}

#[test]
fn a_past_that_all_members_were_put_back_to_is_taken_for_the_present() {
    // Only a witness that was not put back could tell; there is none among these disks.
    let images = [OlderImage(0, Begun), OlderImage(1, Begun)];
    let world = after(2, &[&[Crash(None)], &images[..]].concat());
    assert_eq!(start(&world, A | B), Ok(A | B));
}
