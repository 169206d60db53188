//! The table of cases: what is on the disks, and what must be decided.
#![allow(clippy::unwrap_used)]
use super::*;
use crate::create::first_superblock;
use crate::superblock::{Epoch, LastStop};
use uuid::Uuid;

/// A superblock of slot `own` with `states` of all slots, at the last of `epochs` (oldest
/// first).
pub(crate) fn superblock(
    own: u8,
    epochs: &[u128],
    states: &[SlotState],
    event_count: u64,
) -> Superblock {
    let ordinal = |index: usize| u32::try_from(index).unwrap();
    let mut history: Vec<Epoch> = epochs
        .iter()
        .enumerate()
        .map(|(index, &id)| Epoch {
            id,
            ordinal: ordinal(index),
        })
        .collect();
    history.reverse();
    let epoch = history.remove(0);
    let before = history.first().map_or(epoch.id, |parent| parent.id);
    let slots = states.iter().enumerate().map(|(slot, &state)| SlotRecord {
        member: Some(Uuid::from_u128(100 + slot as u128)),
        state,
        address: format!("/dev/{slot}"),
        loss: (!state.is_receiving()).then_some(Loss {
            epoch: before,
            position: Stamp {
                ordinal: 0,
                sequence: 50,
            },
            block_exact: true,
        }),
        ..SlotRecord::empty()
    });
    let layout = crate::layout::Layout::for_size(1 << 30);
    Superblock {
        member: Uuid::from_u128(100 + u128::from(own)),
        event_count,
        history,
        own_slot: own,
        last_stop: LastStop::Unclean,
        ..first_superblock(Uuid::from_u128(1), "m", layout, epoch, slots.collect())
    }
}

pub(crate) fn seen(superblock: Superblock, sequence: u64) -> Seen {
    let path = format!("/dev/{}", superblock.own_slot);
    Seen {
        path,
        superblock,
        position: Stamp {
            ordinal: 0,
            sequence,
        },
        effective: 0,
        completed: sequence - 1,
        damaged: false,
    }
}

use SlotState::{Faulty, InSync, Resyncing};
const BOTH: [SlotState; 2] = [InSync, InSync];
const FIRST: [SlotState; 2] = [InSync, Faulty];
const SECOND: [SlotState; 2] = [Faulty, InSync];

/// A verdict as one word, so that a table can hold it.
fn word(verdict: &Verdict) -> &'static str {
    match verdict {
        Verdict::InSync => "in-sync",
        Verdict::Delta { own_hot: false } => "delta",
        Verdict::Delta { own_hot: true } => "delta+hot",
        Verdict::Full { .. } => "full",
        Verdict::Refused { .. } => "refused",
    }
}

fn decide(members: &[Seen], force: bool) -> String {
    match assemble(
        members,
        AssembleOptions {
            force,
            ..AssembleOptions::default()
        },
    ) {
        Ok(plan) => plan.verdicts.iter().map(word).collect::<Vec<_>>().join(" "),
        Err(refusal) => match refusal {
            Refusal::NoMembers => "nobody".into(),
            Refusal::Foreign(..) => "foreign".into(),
            Refusal::SplitBrain { .. } => "split brain".into(),
            Refusal::MayBeOld { .. } => "may be old".into(),
            Refusal::Twice { .. } => "twice".into(),
            Refusal::NoSource(_) => "no source".into(),
            Refusal::Overwritten(_) => "overwritten".into(),
        },
    }
}

/// What was found, whether it is forced, and what must be decided.
type Case = (&'static str, Vec<Seen>, bool, &'static str);

#[rustfmt::skip] // one case a line
fn table() -> Vec<Case> {
    let a = |epochs: &[u128], states: &[SlotState], events, sequence| seen(superblock(0, epochs, states, events), sequence);
    let b = |epochs: &[u128], states: &[SlotState], events, sequence| seen(superblock(1, epochs, states, events), sequence);
    let joining = [InSync, Resyncing];
    vec![
        ("both, equal", vec![a(&[1], &BOTH, 1, 9), b(&[1], &BOTH, 1, 9)], false, "in-sync in-sync"),
        ("one commit in flight", vec![a(&[1], &BOTH, 1, 9), b(&[1], &BOTH, 1, 8)], false, "in-sync in-sync"),
        ("a restored backup", vec![a(&[1], &BOTH, 1, 90), b(&[1], &BOTH, 1, 8)], false, "in-sync full"),
        ("only one of two", vec![a(&[1], &BOTH, 1, 9)], false, "may be old"),
        ("only one of two, forced", vec![a(&[1], &BOTH, 1, 9)], true, "in-sync"),
        ("the survivor alone", vec![a(&[1, 2], &FIRST, 2, 60)], false, "in-sync"),
        ("the lost one alone", vec![b(&[1], &BOTH, 1, 50)], false, "may be old"),
        ("survivor and lost", vec![a(&[1, 2], &FIRST, 2, 60), b(&[1], &BOTH, 1, 50)], false, "in-sync delta"),
        ("lost, a commit more", vec![a(&[1, 2], &FIRST, 2, 60), b(&[1], &BOTH, 1, 51)], false, "in-sync delta+hot"),
        ("lost, older image", vec![a(&[1, 2], &FIRST, 2, 60), b(&[1], &BOTH, 1, 49)], false, "in-sync full"),
        ("round cut off on one", vec![a(&[1, 2], &BOTH, 2, 9), b(&[1], &BOTH, 1, 9)], false, "in-sync in-sync"),
        ("round cut off, alone", vec![a(&[1, 2], &BOTH, 2, 9)], false, "may be old"),
        ("split brain", vec![a(&[1, 2], &FIRST, 2, 60), b(&[1, 3], &SECOND, 2, 60)], false, "split brain"),
        ("split brain, forced", vec![a(&[1, 2], &FIRST, 2, 60), b(&[1, 3], &SECOND, 2, 60)], true, "split brain"),
        ("more events never win", vec![a(&[1, 2], &FIRST, 2, 60), b(&[1], &BOTH, 900, 50)], false, "in-sync delta"),
        ("no loss on record", vec![a(&[1, 2, 3], &joining, 3, 60), b(&[1, 2, 3], &joining, 3, 60)], false, "in-sync full"),
        ("nobody", vec![], false, "nobody"),
        ("one twice", vec![a(&[1], &BOTH, 1, 9), a(&[1], &BOTH, 1, 9)], false, "twice"),
    ]
}

#[test]
fn the_table() {
    for (name, members, force, want) in table() {
        assert_eq!(decide(&members, force), want, "{name}");
        // The order in which members are found decides nothing.
        let reversed: Vec<Seen> = members.into_iter().rev().collect();
        let words: Vec<&str> = want.split(' ').rev().collect();
        let got = decide(&reversed, force);
        assert!(
            got == want || got == words.join(" "),
            "{name}, reversed: {got}"
        );
    }
}

#[test]
fn members_lost_one_after_the_other_do_not_win_with_nearly_equal_events() {
    // The case of mdadm's issue 22: three disks, C lost, then B; C and B come back together
    // without A.
    let all = [InSync; 3];
    let c = superblock(2, &[1], &all, 5);
    let b = superblock(1, &[1, 2], &[InSync, InSync, Faulty], 6);
    let mut a = superblock(0, &[1, 2, 3], &[InSync, Faulty, Faulty], 7);
    a.slots[1].loss.as_mut().unwrap().position.sequence = 60;
    assert_eq!(
        decide(&[seen(b.clone(), 60), seen(c.clone(), 50)], false),
        "may be old"
    );
    let back = decide(&[seen(a, 70), seen(b, 60), seen(c, 50)], false);
    assert!(back.starts_with("in-sync delta"), "{back}");
}

#[test]
fn a_member_lost_longer_ago_than_the_history_reaches_is_recognised() {
    let epochs: Vec<u128> = (1..60).collect();
    let mut a = superblock(0, &epochs, &FIRST, 60);
    a.history.truncate(crate::superblock::HISTORY_MAX);
    a.slots[1].loss.as_mut().unwrap().epoch = 1;
    let b = superblock(1, &[1], &BOTH, 1);
    assert_eq!(decide(&[seen(a, 90), seen(b, 50)], false), "in-sync delta");
}

#[test]
fn a_stranger_is_refused() {
    let mine = superblock(0, &[1], &BOTH, 1);
    let mut other = superblock(1, &[1], &BOTH, 1);
    other.mirror = Uuid::from_u128(2);
    assert_eq!(
        decide(&[seen(mine.clone(), 1), seen(other.clone(), 1)], false),
        "foreign"
    );
    assert_eq!(word(&judge_return(&mine, &seen(other, 1))), "refused");
    let mut replaced = superblock(1, &[1], &BOTH, 1);
    replaced.member = Uuid::from_u128(999);
    assert_eq!(word(&judge_return(&mine, &seen(replaced, 1))), "refused");
}

#[test]
fn reasons_are_sentences_that_name_the_disk() {
    let members = [
        seen(superblock(0, &[1, 2], &FIRST, 2), 60),
        seen(superblock(1, &[1, 3], &SECOND, 2), 60),
    ];
    let refusal = assemble(&members, AssembleOptions::default())
        .unwrap_err()
        .to_string();
    for part in [
        "split brain",
        "/dev/0",
        "/dev/1",
        "event 2",
        "mirrorctl resolve",
    ] {
        assert!(refusal.contains(part), "{part}: {refusal}");
    }
}
