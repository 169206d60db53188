//! The table of cases: what the two sides say, and whether what differs is known.
#![allow(clippy::unwrap_used)]
use super::*;
use crate::assemble::tests::{seen, superblock};
use SlotState::{Faulty, InSync, Missing, Resyncing};

const HERE: [SlotState; 2] = [InSync, Missing];
const THERE: [SlotState; 2] = [Missing, InSync];

/// This mirror, which went on from epoch 1 without slot 1.
fn here() -> Superblock {
    superblock(0, &[1, 20], &HERE, 5)
}

/// The member in slot 1, which went on from epoch 1 as well.
fn there() -> Seen {
    seen(superblock(1, &[1, 30], &THERE, 7), 90)
}

#[test]
fn what_each_has_changed_is_counted_from_a_common_epoch() {
    assert_eq!(changed_by(&here(), &there()), Ok(vec![0]));
}

#[test]
fn every_doubt_is_said() {
    type Change = fn(&mut Superblock, &mut Seen);
    let doubts: [(&str, Change); 15] = [
        ("not on record as a whole", |here, _| {
            here.slots[1].loss = None
        }),
        ("not on record as a whole", |here, _| {
            here.slots[1].state = Resyncing
        }),
        ("not on record as a whole", |here, _| {
            here.slots[1].base.ordinal = 1
        }),
        ("not on record as a whole", |_, there| {
            there.superblock.member = uuid::Uuid::from_u128(9);
        }),
        ("does not know the epoch", |here, _| {
            here.slots[1].loss.as_mut().unwrap().epoch = 20;
        }),
        ("put back", |here, _| {
            here.slots[1].loss.as_mut().unwrap().position.sequence = 52
        }),
        ("put back", |_, there| {
            there.superblock.slots[0]
                .loss
                .as_mut()
                .unwrap()
                .position
                .sequence = 48;
        }),
        ("has joined others", |_, there| {
            there.superblock.slots[1].base.ordinal = 1
        }),
        ("cut off", |_, there| there.superblock.slots[1].full = true),
        ("cut off", |_, there| {
            there.superblock.slots[1].state = SlotState::Stale
        }),
        ("cut off", |_, there| there.effective = 20),
        ("slot 0 is not on record", |_, there| {
            there.superblock.slots[0].state = Resyncing;
        }),
        ("slot 0 is not on record", |_, there| {
            there.superblock.slots[0].base.ordinal = 1
        }),
        ("slot 0 is not on record", |here, _| {
            here.slots[0].member = Some(uuid::Uuid::from_u128(9));
        }),
        ("nobody who", |here, _| here.slots[0].base.ordinal = 1),
    ];
    for (number, (words, change)) in doubts.into_iter().enumerate() {
        let (mut here, mut there) = (here(), there());
        change(&mut here, &mut there);
        let why = changed_by(&here, &there).unwrap_err();
        assert!(why.contains(words), "{number}: {why}");
    }
}

/// A commit that was under way may have reached the other one besides: of one whose position was
/// known for certain it tells when it has been put back, be it by one commit.
#[test]
fn a_commit_under_way_may_lie_between() {
    for (exact_here, exact_there, allowed) in [
        (true, true, [false, true, false]),
        (true, false, [false, true, true]),
        (false, true, [true, true, false]),
        (false, false, [true, true, true]),
    ] {
        for (position, allowed) in (49..).zip(allowed) {
            let (mut here, mut there) = (here(), there());
            here.slots[1].loss.as_mut().unwrap().block_exact = exact_here;
            let loss = there.superblock.slots[0].loss.as_mut().unwrap();
            loss.block_exact = exact_there;
            loss.position.sequence = position;
            let found = changed_by(&here, &there);
            assert_eq!(
                found.is_ok(),
                allowed,
                "{exact_here} {exact_there} {position}"
            );
        }
    }
}

/// Each that is in-sync here counts for itself; who is lost here, or has joined since, does not.
#[test]
fn the_changes_count_from_the_loss_of_everyone() {
    let mut here = superblock(0, &[1, 20], &[InSync, Missing, InSync], 5);
    let there = seen(superblock(1, &[1, 30], &[Faulty, InSync, Missing], 7), 90);
    assert_eq!(changed_by(&here, &there), Ok(vec![0, 2]));
    here.slots[2].base.ordinal = 1;
    assert_eq!(changed_by(&here, &there), Ok(vec![0]));
    here.slots[2].base.ordinal = 0;
    here.slots[2].state = Faulty;
    assert_eq!(changed_by(&here, &there), Ok(vec![0]));
}
