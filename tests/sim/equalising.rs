//! Equalising after an unclean stop: what is answered then is durable on every member in-sync, whatever
//! a disk's cache has lost and told a daemon that is dead (R3, R5), and what fails meanwhile (R7).

use crate::checksums::{COOL, machine, rd};
use crate::double_faults::faults;
use crate::machine::superblock_on;
use crate::older_images::{drop_all, seconds, states};
use crate::races::{flushes, gone, none, seeds, wr};
use crate::refused_writes::{refuse_writes, write};
use mirror::control::MemberState;
use mirror::layout::RegionKind;
use mirror::sim::{SimDisk, WriteFault};
use std::cell::Cell;
use std::rc::Rc;

/// The daemon dies over equalising that was refused, and caches keep what it left there: the next
/// one answers what a power cut leaves (R5; seed 5140).
#[test]
fn what_is_answered_after_an_unclean_stop_is_durable() {
    let mut loose = 0;
    for seed in seeds(100) {
        let mut machine = machine(seed, 2 + (seed % 2) as usize);
        machine.start();
        wr(&machine, 0, 16384);
        machine.cut_power();
        // Equalising has not got far when the disks begin to refuse.
        machine.start();
        refuse_writes(&machine);
        assert!(write(&machine, 4096).is_err(), "seed {seed}");
        let data = (machine.data_offset, 16384);
        let is_loose = |disk: &SimDisk| {
            disk.settled(data.0, data.1).is_none() && !disk.is_under_way(data.0, data.1)
        };
        let any_loose = || machine.disks.iter().any(is_loose);
        loose += u32::from(machine.world.run(20_000, any_loose));
        machine.kill_daemon();
        faults(&machine, none());
        machine.start();
        machine.check_all("after the daemon's end");
        for (disk, state) in machine.disks.iter().zip(states(&machine)) {
            let answers = state == MemberState::InSync;
            assert!(!answers || !is_loose(disk), "seed {seed}");
        }
        machine.cut_power();
        machine.start();
        machine.check_all("after the power cut");
    }
    assert!(loose > 50, "{loose}");
}

/// The only in-sync member has crashed and has a bad sector: the blocks around it are made durable and
/// cool, and it is an error until it is written anew.
#[test]
fn a_bad_sector_of_an_only_member_holds_up_nothing() {
    for seed in seeds(20) {
        let mut machine = machine(seed, 2);
        machine.start();
        wr(&machine, 0, 65536);
        machine.fail(1).unwrap();
        wr(&machine, 8192, 65536);
        machine.cut_power();
        machine.disks[0].spoil(machine.data_offset + 5 * 4096);
        machine.start();
        let extents = || machine.mirror().status().extents;
        assert!(
            machine.run_coarsely(|| extents().unequalised_blocks == 0),
            "seed {seed}"
        );
        seconds(&machine, COOL);
        assert_eq!(extents().hot, 0, "seed {seed}");
        assert!(rd(&machine, 5 * 4096, 4096).is_err(), "seed {seed}");
        rd(&machine, 6 * 4096, 4096).unwrap();
        wr(&machine, 5 * 4096, 4096);
        rd(&machine, 0, 65536).unwrap();
    }
}

/// The only in-sync member is away for a while, as over a network: what was un-equalised is so still,
/// and durable before it is answered (R5).
#[test]
fn an_only_member_that_was_away_has_made_nothing_equal() {
    for seed in seeds(20) {
        let mut machine = machine(seed, 2);
        machine.start();
        wr(&machine, 0, 65536);
        machine.fail(1).unwrap();
        wr(&machine, 8192, 65536);
        machine.kill_daemon();
        machine.start();
        faults(&machine, gone());
        let unequal = || machine.mirror().status().extents.unequalised_blocks;
        let before = unequal();
        seconds(&machine, 5);
        assert!(before > 0 && unequal() == before, "seed {seed}");
        faults(&machine, none());
        assert!(machine.run_coarsely(|| unequal() == 0), "seed {seed}");
        let durable = machine.disks[0].settled(machine.data_offset, 65536);
        assert!(durable.is_some(), "seed {seed}");
    }
}

/// A disk fails a flush, and the daemon is killed before it has recorded that (R3, R5; seed 4467).
/// The next one takes the disk for one that has all, and its flush does not say it again: what it
/// answers is durable on that disk nevertheless.
#[test]
fn a_failed_flush_that_nobody_has_recorded() {
    let mut dropped = 0;
    for seed in seeds(100) {
        let members = 2 + (seed % 2) as usize;
        let mut machine = machine(seed, members);
        machine.start();
        wr(&machine, 0, 65536);
        seconds(&machine, COOL);
        wr(&machine, 4096, 16384);
        let failed = machine.disks[seed as usize / 2 % members].clone();
        failed.set_faults(flushes());
        let client = machine.client();
        machine
            .world
            .spawn_task(async move { client.flush().await.unwrap_or_default() });
        let at = machine.data_offset + 4096;
        // The flush has dropped something, and the loss is not recorded on another disk.
        let has_dropped = || failed.has_given_up(at, 16384);
        dropped += u32::from(machine.world.run(10_000, has_dropped));
        machine.kill_daemon();
        failed.set_faults(none());
        machine.start();
        seconds(&machine, 2 * COOL);
        machine.check_all("after the daemon's end");
        machine.cut_power();
        machine.start();
        machine.check_all("after the power cut");
    }
    assert!(dropped > 50, "{dropped}");
}

/// A disk fails a write of its map, which is in its cache all the same, and the daemon is killed before
/// it has recorded that. The next one writes without another intent where that map says hot, as it has
/// made the map's copies equal: the power goes, and this disk alone starts (R1).
#[test]
fn a_failed_map_write_that_nobody_has_recorded() {
    let mut cached = 0;
    for seed in seeds(100) {
        let mut machine = machine(seed, 2);
        machine.start();
        wr(&machine, 0, 65536);
        seconds(&machine, COOL);
        let superblock = superblock_on(&machine.disks[0]).unwrap();
        let map = *superblock.layout.find(RegionKind::State, 0).unwrap();
        let disk = machine.disks[0].clone();
        disk.set_write_fault(Some(WriteFault {
            offset: map.copy_a,
            len: map.len,
            hangs: false,
        }));
        let client = machine.client();
        machine.world.spawn_task(async move {
            client.write(4096, 4096, false).await.unwrap_or_default();
        });
        let is_cached = || {
            let under_way = disk.is_under_way(map.copy_a, map.len);
            !under_way && disk.settled(map.copy_a, map.len).is_none()
        };
        cached += u32::from(machine.world.run(10_000, is_cached));
        machine.kill_daemon();
        disk.set_write_fault(None);
        machine.start();
        wr(&machine, 4096, 16384);
        machine.cut_power_choosing(&mut drop_all);
        machine.start_on(&[0], true).unwrap();
        machine.check_all("on the one disk");
    }
    assert!(cached > 20, "{cached}");
}

/// A flush fails everywhere while an extent is equalised, of which a write has just made a part equal:
/// what equalising leaves alone there is in caches, and suspect like all that the flush covered (R7).
#[test]
fn a_flush_that_fails_while_a_part_is_equal_already() {
    let mut in_time = 0;
    for seed in seeds(60) {
        let mut machine = machine(seed, 2 + (seed % 2) as usize);
        machine.start();
        (0..4).for_each(|at| wr(&machine, at << 20, 1 << 20));
        machine.cut_power();
        machine.start();
        let (client, ended) = (machine.client(), Rc::new(Cell::new(false)));
        let told = ended.clone();
        machine.world.spawn_task(async move {
            let part = client.write(1 << 20, 1 << 20, false).await;
            told.set(part.is_ok());
        });
        assert!(machine.world.run(100_000, || ended.get()), "seed {seed}");
        // Equalising has left that part alone, and writes what comes after it.
        let after = machine.data_offset + (2 << 20);
        let is_past = || machine.disks[0].is_under_way(after, 1 << 20);
        let unequal = || machine.mirror().status().extents.unequalised_blocks;
        if unequal() != 768 || !machine.world.run(100_000, is_past) {
            continue;
        }
        faults(&machine, flushes());
        let client = machine.client();
        machine
            .world
            .spawn_task(async move { client.flush().await.unwrap_or_default() });
        let has_failed = || machine.mirror().status().flush_error;
        in_time += u32::from(machine.world.run(100_000, has_failed) && unequal() > 0);
        faults(&machine, none());
        machine.run_coarsely(|| unequal() == 0);
        let client = machine.client();
        machine
            .world
            .block_on(async move { client.clear_flush_error().await });
        seconds(&machine, 2 * COOL);
        machine.check_all("after the flush error");
        machine.cut_power();
        machine.start();
        machine.check_all("after the power cut");
    }
    assert!(in_time > 5, "{in_time}");
}

/// Every member refuses a write, and some caches have it: what is read then is durable on all (R5).
#[test]
fn what_a_refused_write_left_in_caches_is_not_answered_from_there() {
    let mut loose = 0;
    for seed in seeds(200) {
        let mut machine = machine(seed, 2);
        machine.start();
        wr(&machine, 0, 16384);
        seconds(&machine, 2);
        refuse_writes(&machine);
        assert!(write(&machine, 4096).is_err(), "seed {seed}");
        faults(&machine, none());
        let at = machine.data_offset + 4096;
        let is_loose = |disk: &SimDisk| disk.settled(at, 4096).is_none();
        loose += u32::from(machine.disks.iter().any(is_loose));
        rd(&machine, 4096, 4096).unwrap();
        assert!(!machine.disks.iter().any(is_loose), "seed {seed}");
    }
    assert!(loose > 20, "{loose}");
}
