#![allow(clippy::unwrap_used)]
use super::*;
use crate::create::first_superblock;
use crate::epochs;
use crate::superblock::{Epoch, HISTORY_MAX, LastStop};

fn stamp(sequence: u64) -> Stamp {
    Stamp {
        ordinal: 1,
        sequence,
    }
}

/// The superblock of the member in `own` of a mirror of three, all in-sync, at epoch 9 after 8, 7.
fn superblock(own: u8) -> Superblock {
    let epoch = |id: u128| Epoch {
        id,
        ordinal: u32::try_from(id).unwrap(),
    };
    let slots = (0..3).map(|slot| SlotRecord {
        member: Some(Uuid::from_u128(100 + slot)),
        state: SlotState::InSync,
        zeroed: true,
        address: format!("/dev/{slot}"),
        ..SlotRecord::empty()
    });
    let layout = crate::layout::Layout::for_size(1 << 30);
    Superblock {
        member: Uuid::from_u128(100 + u128::from(own)),
        event_count: 20,
        history: vec![epoch(8), epoch(7)],
        own_slot: own,
        last_stop: LastStop::Unclean,
        updated_secs: 50,
        ..first_superblock(Uuid::from_u128(1), "m", layout, epoch(9), slots.collect())
    }
}

fn seen(superblock: Superblock, effective: u128) -> Seen {
    Seen {
        path: format!("/dev/{}", superblock.own_slot),
        position: stamp(70),
        damaged: false,
        effective,
        completed: 60,
        superblock,
    }
}

#[test]
fn an_older_copy_is_marked_once() {
    let config = superblock(0);
    let older = Superblock {
        write_count: 77,
        event_count: 3,
        updated_secs: 5,
        ..superblock(1)
    };
    let plan = Plan {
        newest: 0,
        verdicts: vec![
            Verdict::InSync,
            Verdict::Full {
                reason: "older".into(),
            },
        ],
        lost: vec![(1, "older".into())],
    };
    let first = [seen(config.clone(), 9), seen(older, 9)];
    let marked = disown(&first, &plan);
    let [(1, marked)] = &marked[..] else {
        panic!("the older one: {marked:?}");
    };
    assert_eq!(marked.write_count, 78, "newer than its other copy");
    assert_eq!((marked.event_count, marked.updated_secs), (20, 50));
    assert_eq!((marked.own_slot, marked.member), (1, Uuid::from_u128(101)));
    assert_eq!(marked.own_record().state, SlotState::Stale);
    // The next start finds the mirror further on, and the copy marked.
    let later = Superblock {
        event_count: 31,
        updated_secs: 90,
        write_count: 500,
        ..config
    };
    let again = [seen(later, 9), seen(marked.clone(), 9)];
    assert_eq!(disown(&again, &plan), []);
}

#[test]
fn a_start_by_force_is_recorded_as_one() {
    let lost = || vec![(2, "not found".to_owned())];
    for (forced, lost, recorded) in [
        (true, lost(), true),
        (false, lost(), false),
        (true, Vec::new(), false),
    ] {
        let mut config = superblock(0);
        if lost.is_empty() {
            config.slots[2].state = SlotState::Faulty;
        }
        let seen = [seen(config.clone(), 9), seen(superblock(1), 9)];
        let plan = Plan {
            newest: 0,
            verdicts: vec![Verdict::InSync, Verdict::InSync],
            lost,
        };
        start(&mut config, &seen, &plan, forced, 10);
        assert_eq!(config.forced, recorded);
        let third = [SlotState::Faulty, SlotState::Missing][usize::from(!plan.lost.is_empty())];
        assert_eq!(config.slots[2].state, third);
        assert_eq!(config.epoch.id, 10, "somebody is not in-sync");
        assert_eq!(config.slots[0].state, SlotState::InSync);
    }
}

/// Who is lost by a start is stale when it is there, and is not to come back by delta.
#[test]
fn a_member_that_is_lost_and_there_is_stale() {
    let mut config = superblock(0);
    let seen = [seen(config.clone(), 9), seen(superblock(1), 9)];
    let full = Verdict::Full {
        reason: "older".into(),
    };
    let plan = Plan {
        newest: 0,
        verdicts: vec![Verdict::InSync, full],
        lost: vec![(1, "older".into()), (2, "not found".into())],
    };
    start(&mut config, &seen, &plan, false, 10);
    let states: Vec<SlotState> = config.slots.iter().map(|slot| slot.state).collect();
    let expected = [SlotState::InSync, SlotState::Stale, SlotState::Missing];
    assert_eq!(states, expected);
}

/// A member whose verdict is another one than in-sync is not made so by a start.
#[test]
fn a_start_makes_in_sync_whom_the_plan_calls_so() {
    let mut config = superblock(0);
    config.slots[1].state = SlotState::Stale;
    let seen = [seen(config.clone(), 9), seen(superblock(1), 9)];
    let plan = Plan {
        newest: 0,
        verdicts: vec![Verdict::InSync, Verdict::Delta { own_hot: true }],
        lost: Vec::new(),
    };
    start(&mut config, &seen, &plan, false, 10);
    assert_eq!(config.slots[1].state, SlotState::Stale);
}

#[test]
fn what_is_known_to_be_zero_is_forgotten_where_it_may_not_be() {
    for (full, new, parted, zeroed) in [
        (false, false, false, true),
        (false, false, true, false),
        (true, false, false, false),
        (true, true, false, false),
    ] {
        let mut config = superblock(0);
        let joins = Join {
            slot: 1,
            member: Uuid::from_u128(500),
            address: "/dev/x".into(),
            new,
            full,
            parted,
            base: stamp(80),
        };
        join(&mut config, &joins, 10);
        let record = &config.slots[1];
        assert_eq!((record.zeroed, record.full), (zeroed, full));
        assert_eq!(record.member, Some(Uuid::from_u128(500)));
        assert_eq!(record.state, SlotState::Resyncing);
        assert_eq!(record.base, stamp(80));
        assert_eq!(record.loss.is_some(), new);
        // A delta after a full resync that was cut off is one still.
        let delta = Join {
            full: false,
            new: false,
            ..joins
        };
        join(&mut config, &delta, 11);
        assert_eq!(config.slots[1].full, full);
        resynced(&mut config, 1);
        assert!(!config.slots[1].full);
    }
}

#[test]
fn ages_count_back_from_the_present_epoch() {
    let config = superblock(0);
    let ages = [9, 8, 7, 6].map(|epoch| epochs::age(&config, epoch));
    assert_eq!(ages, [0, 1, 2, usize::MAX]);
    assert_eq!(epochs::short(0x1234_5678 << 96), "12345678");
    let words = "epoch 00000000 (event 20) after 00000000 after 00000000";
    assert_eq!(epochs::history(&config), words);
}

/// What a history that is full has forgotten is known by its age, of one that did not claim to
/// be in-sync.
#[test]
fn an_epoch_that_the_history_has_forgotten_is_known_by_its_age() {
    let known = |claims: bool, entries: usize, ordinal: u32| {
        let mut config = superblock(0);
        config.history = (0..entries)
            .map(|back| Epoch {
                id: 1000 + back as u128,
                ordinal: 500 - u32::try_from(back).unwrap(),
            })
            .collect();
        let mut member = superblock(1);
        member.history.clear();
        member.epoch = Epoch { id: 5, ordinal };
        if !claims {
            member.slots[1].state = SlotState::Resyncing;
        }
        let member = seen(member, 0);
        let stands: Vec<_> = epochs::Stand::all_of(&member, 0).collect();
        assert_eq!(stands.len(), 1);
        stands[0].is_known(&config, None)
    };
    let oldest = 500 - u32::try_from(HISTORY_MAX).unwrap() + 1;
    assert!(known(false, HISTORY_MAX, oldest - 1));
    assert!(!known(false, HISTORY_MAX, oldest), "it would be there");
    assert!(!known(true, HISTORY_MAX, oldest - 1), "went on by itself");
    assert!(!known(false, HISTORY_MAX - 1, 0), "the history is whole");
    assert!(!known(false, 0, 0));
}

/// Rounds that were cut off are counted back by members that should have their epoch and do not,
/// unless a member proves that the epoch was effective.
#[test]
fn rounds_that_were_cut_off_are_counted_back() {
    let mut config = superblock(0);
    config.epoch = config.history.remove(0);
    // The member has gone one epoch further, in which the others were in-sync.
    let member = superblock(1);
    let count =
        |member: Superblock, effective| epochs::cut_off_without(&config, &seen(member, effective));
    assert_eq!(count(member.clone(), 8), 1);
    assert_eq!(count(member.clone(), 0), 1);
    assert_eq!(count(member.clone(), 9), 0, "its maps name it");
    let mut alone = member.clone();
    for slot in &mut alone.slots {
        slot.state = SlotState::Faulty;
    }
    assert_eq!(count(alone, 8), 0, "nobody should have it");
    let mut joining = member.clone();
    joining.slots[1].state = SlotState::Resyncing;
    assert_eq!(count(joining.clone(), 8), 0, "a round reaches it last");
    joining.epoch.id = 33;
    assert_eq!(count(joining, 33), 0);
    // A witness that is not in-sync by the mirror's own record is none.
    let mut others = config.clone();
    others.slots[0].state = SlotState::Faulty;
    others.slots[1].state = SlotState::Faulty;
    others.slots[2].state = SlotState::Faulty;
    assert_eq!(
        epochs::cut_off_without(&others, &seen(member.clone(), 8)),
        0
    );
    others.slots[2].state = SlotState::InSync;
    assert_eq!(epochs::cut_off_without(&others, &seen(member, 8)), 1);
}
