//! Error budgets: a member that needs too many repairs is lost, and never the last one.

use crate::checksums::{COOL, check, content, machine, rd, rot};
use crate::older_images::{seconds, states};
use crate::races::{seeds, wr};
use mirror::budget::ErrorBudget;
use mirror::control::MemberState;

const BUDGET: ErrorBudget = ErrorBudget::Limited {
    blocks: 2,
    hours: 1,
};

#[test]
fn all_go_over_their_budgets_at_once_and_one_stays() {
    for seed in seeds(12) {
        let members = 2 + (seed % 2) as usize;
        let mut machine = machine(seed, members);
        machine.error_budget = BUDGET;
        machine.start();
        wr(&machine, 0, 1 << 20);
        seconds(&machine, COOL);
        let bad = |disk: usize| (disk as u64 * 3..).take(3);
        let good: Vec<_> = (0..3 * members as u64)
            .map(|block| content(&machine, 0, block))
            .collect();
        for disk in 0..members {
            bad(disk).for_each(|block| rot(&machine, disk, block));
        }
        let checked = check(&machine, 0, true);
        let count = 3 * members as u64;
        assert_eq!(
            (checked.repaired, checked.damaged),
            (count, 0),
            "seed {seed}"
        );
        let in_sync = |state: &&MemberState| **state == MemberState::InSync;
        let states = states(&machine);
        assert_eq!(
            states.iter().filter(in_sync).count(),
            1,
            "seed {seed}: {states:?}"
        );
        let last = states.iter().position(|state| in_sync(&state)).unwrap();
        for (block, good) in (0..).zip(&good) {
            assert_eq!(&content(&machine, last, block), good, "seed {seed}");
        }
        rd(&machine, 0, 1 << 20).unwrap();
        wr(&machine, 0, 4096);
    }
}

#[test]
fn what_is_within_the_budget_loses_nobody() {
    let mut machine = machine(1, 2);
    machine.error_budget = BUDGET;
    machine.start();
    wr(&machine, 0, 1 << 20);
    for _ in 0..3 {
        seconds(&machine, COOL);
        rot(&machine, 1, 5);
        rot(&machine, 1, 6);
        assert_eq!(check(&machine, 0, true).repaired, 2);
        assert_eq!(states(&machine), [MemberState::InSync; 2]);
        seconds(&machine, 2 * 3600);
    }
    rot(&machine, 1, 5);
    rot(&machine, 1, 6);
    rot(&machine, 1, 7);
    check(&machine, 0, true);
    assert_ne!(states(&machine)[1], MemberState::InSync);
}
