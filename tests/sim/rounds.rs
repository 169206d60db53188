//! What is left of rounds that were cut off, or in which a member failed, or that failed again and
//! again: nobody who holds everything is refused for it.

use crate::machine::{Machine, superblock_on};
use crate::older_images::{drop_all, seconds, states, write_and_flush};
use crate::races::{gone, none, seeds, wr};
use mirror::Host as _;
use mirror::control::{MemberState, ResyncKind};
use mirror::sim::{Faults, SimHost};
use mirror::superblock::SlotState;
use std::time::Duration;

const SIZE: u64 = 64 << 20;

/// Runs until the first member calls the second one in-sync and that one's own superblock is
/// being written.
fn run_into_the_last_round(machine: &Machine) {
    let last_round = || {
        let first = superblock_on(&machine.disks[0]);
        first.is_some_and(|s| s.slots[1].state == SlotState::InSync)
            && machine.disks[1].is_under_way(4096, 8192)
    };
    assert!(machine.world.run(5_000_000, last_round));
}

/// A mirror whose second member is being resynced, wholly or by delta.
fn resyncing(seed: u64, full: bool) -> Machine {
    let mut machine = Machine::new(seed, 2, SIZE);
    machine.start();
    write_and_flush(&machine);
    machine.fail(1).unwrap();
    write_and_flush(&machine);
    if full {
        machine.add_new("disk9").unwrap();
    } else {
        machine.re_add(1).unwrap();
    }
    machine
}

/// The power goes in the round that ends a resync. Two minutes later only the member is left that
/// the round had not reached.
#[test]
fn the_last_copy_after_a_round_that_was_cut_off() {
    for seed in seeds(30) {
        let mut machine = resyncing(seed, seed % 2 == 0);
        run_into_the_last_round(&machine);
        machine.cut_power_choosing(&mut drop_all);
        machine.start();
        assert_eq!(states(&machine)[1], MemberState::InSync, "seed {seed}");
        seconds(&machine, 60);
        write_and_flush(&machine);
        seconds(&machine, 60);
        if seed % 4 < 2 {
            machine.cut_power_choosing(&mut drop_all);
            machine.start_on(&[1], true).unwrap();
            machine.check_all(&format!("seed {seed}"));
            continue;
        }
        // Or it fails for a moment.
        machine.disks[1].set_faults(gone());
        write_and_flush(&machine);
        machine.world.run(3000, || false);
        machine.disks[1].set_faults(none());
        machine.world.run(3000, || false);
        machine.re_add(1).unwrap();
        machine.wait_in_sync();
        machine.compare_members();
    }
}

/// A member fails for a moment in the round that ends its full resync: what it lacks is known.
#[test]
fn a_member_that_fails_at_the_end_of_a_full_resync_returns_by_delta() {
    for seed in seeds(40) {
        let machine = resyncing(seed, true);
        run_into_the_last_round(&machine);
        let disk = machine.disks[1].clone();
        disk.set_faults(gone());
        machine.world.run(3000, || false);
        disk.set_faults(none());
        machine.world.run(3000, || false);
        let back = machine.re_add_disk("disk9".into(), disk, false);
        back.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        machine.wait_in_sync();
        machine.compare_members();
    }
}

/// One step, in which copy B of the first member's superblock fails if it is being written: it
/// arrives, whole or in part, with an error.
fn step_with_failing_second_copies(machine: &Machine) {
    machine.disks[0].set_faults(Faults {
        writes: machine.disks[0].is_under_way(8192, 4096),
        ..none()
    });
    machine.world.step();
}

/// For a minute and a half no round succeeds on the last survivor, for a loss and for the end of
/// a resync by turns. Every epoch that was tried would be one of the history.
#[test]
fn rounds_that_fail_by_turns_leave_the_history_alone() {
    for seed in seeds(6) {
        let mut machine = Machine::new(seed, 3, SIZE);
        machine.start();
        wr(&machine, 0, 65536);
        machine.fail(2).unwrap();
        wr(&machine, 8192, 65536);
        machine.re_add(2).unwrap();
        machine.disks[1].set_faults(gone());
        let client = machine.client();
        machine
            .world
            .spawn_task(async move { _ = client.write(16384, 4096, false).await });
        let host = SimHost(machine.world.clone());
        let until = host.now() + Duration::from_secs(90);
        while host.now() < until {
            step_with_failing_second_copies(&machine);
        }
        let ordinal = superblock_on(&machine.disks[0]).unwrap().epoch.ordinal;
        assert!(ordinal < 20, "seed {seed}: {ordinal} epochs");
        machine.cut_power();
        machine
            .disks
            .iter()
            .for_each(|disk| disk.set_faults(none()));
        machine.start();
        machine.world.run(20_000, || false);
        assert_eq!(states(&machine)[2], MemberState::InSync, "seed {seed}");
        machine.check_all(&format!("seed {seed}"));
        crate::play::bring_all_back(&mut machine);
        machine.compare_members();
    }
}

/// For some seconds the last in-sync member takes no map commit, and the one that is resyncing
/// does. Neither is older for it.
#[test]
fn commits_that_fail_beside_a_resync_age_nobody() {
    for seed in seeds(30) {
        let mut machine = Machine::new(seed, 2, SIZE);
        machine.start();
        for extent in 0..8 {
            wr(&machine, extent << 22, 1 << 20);
        }
        machine.fail(1).unwrap();
        for extent in 0..8 {
            wr(&machine, (extent << 22) + 8192, 4096);
        }
        machine.re_add(1).unwrap();
        machine.disks[0].set_faults(Faults {
            writes: true,
            ..none()
        });
        seconds(&machine, seed % 10);
        if seed % 2 == 0 {
            machine.kill_daemon();
        } else {
            machine.cut_power();
        }
        machine.disks[0].set_faults(none());
        machine.start();
        machine.world.run(20_000, || false);
        machine.check_all(&format!("seed {seed}"));
        crate::play::bring_all_back(&mut machine);
        let resync = machine.mirror().status().last_resync;
        assert!(
            resync.is_none_or(|resync| resync.kind == ResyncKind::Delta),
            "seed {seed}"
        );
        machine.compare_members();
    }
}

/// No round succeeds on the last in-sync member, but what it was sent has arrived there: each
/// attempt is newer on the disk than the one before, whatever of that was written.
#[test]
fn rounds_tried_again_are_newer_than_what_arrived_of_them() {
    for seed in seeds(20) {
        let mut machine = Machine::new(seed, 2, SIZE);
        machine.start();
        wr(&machine, 0, 65536);
        machine.disks[1].set_faults(gone());
        let client = machine.client();
        machine
            .world
            .spawn_task(async move { _ = client.write(8192, 4096, false).await });
        let host = SimHost(machine.world.clone());
        let until = host.now() + Duration::from_secs(20);
        let mut counts = Vec::new();
        while host.now() < until {
            step_with_failing_second_copies(&machine);
            let count = superblock_on(&machine.disks[0]).map(|s| s.write_count);
            if counts.last() != count.as_ref() {
                counts.extend(count);
            }
        }
        machine
            .disks
            .iter()
            .for_each(|disk| disk.set_faults(none()));
        assert!(counts.len() > 3, "seed {seed}: {counts:?}");
        assert!(counts.is_sorted(), "seed {seed}: {counts:?}");
    }
}
