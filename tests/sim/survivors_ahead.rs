//! What is zeroed ahead of its use, and what need not be zeroed at all; resyncs of many blocks.

use crate::machine::{Machine, superblock_on};
use crate::older_images::seconds;
use crate::races::{fl, wr};
use mirror::Disk as _;
use mirror::control::MemberState;
use mirror::sim::SimDisk;
use mirror::superblock::{COPY_A_OFFSET, COPY_B_OFFSET};
use std::collections::BTreeSet;

const EXTENT: u64 = 4 << 20;

/// On disks that have to be written zeroes to.
fn plain(seed: u64, extents: u64) -> Machine {
    let mut machine = Machine::new(seed, 2, extents * EXTENT);
    for disk in &machine.disks {
        disk.alter(|it| it.cheap_zeroes = false);
    }
    machine.start();
    machine
}

/// On disks that were all zero and are known to have been.
fn zeroed(seed: u64, cheap: bool) -> Machine {
    let mut machine = Machine::new(seed, 2, 16 * EXTENT);
    for slot in 0..2 {
        let old = machine.disks[slot].clone();
        let new = SimDisk::new(old.geometry().size_bytes, 0);
        let mut maps = vec![0; machine.data_offset as usize];
        old.read_now(0, &mut maps);
        new.write_now(0, &maps);
        let mut superblock = superblock_on(&old).unwrap();
        superblock
            .slots
            .iter_mut()
            .for_each(|slot| slot.zeroed = true);
        for offset in [COPY_A_OFFSET, COPY_B_OFFSET] {
            new.write_now(offset, &superblock.encode());
        }
        if !cheap {
            new.alter(|it| it.cheap_zeroes = false);
        }
        machine.replace_disk(slot, new);
    }
    machine.start();
    machine
}

fn ahead(machine: &Machine) -> u64 {
    machine.mirror().status().io.extents_zeroed_ahead
}

/// Runs until so many extents have been zeroed ahead, and a little further, within the second
/// that nothing is idle in.
fn becomes(machine: &Machine, expected: u64) {
    let mirror = machine.mirror();
    let there = || mirror.status().io.extents_zeroed_ahead >= expected;
    assert!(machine.world.run(20_000, there), "{}", ahead(machine));
    assert_eq!(ahead(machine), expected);
}

#[test]
fn eight_extents_are_zeroed_ahead_of_a_sequential_writer() {
    let machine = plain(1, 64);
    wr(&machine, 0, 4096);
    assert_eq!(ahead(&machine), 0);
    wr(&machine, EXTENT, 4096);
    becomes(&machine, 8);
    // Three, four, and of the next window half is there: not worth a step.
    for extent in 2..5 {
        wr(&machine, extent * EXTENT, 4096);
        assert_eq!(ahead(&machine), 8);
    }
    wr(&machine, 5 * EXTENT, 4096);
    becomes(&machine, 12);
    assert_eq!(machine.mirror().status().io.extents_zeroed, 2);
    // At the end of the device there are fewer.
    wr(&machine, 57 * EXTENT, 4096);
    wr(&machine, 58 * EXTENT, 4096);
    becomes(&machine, 17);
    machine.compare_members();
}

#[test]
fn the_stock_of_zeroed_extents_is_bounded() {
    let mut machine = Machine::new(1, 2, 1100 * EXTENT);
    machine.disks[1].alter(|it| it.cheap_zeroes = false);
    machine.start();
    wr(&machine, 3 * EXTENT, 4096);
    let mirror = machine.mirror();
    let full = || mirror.status().io.extents_zeroed_ahead >= 1024;
    assert!(machine.run_coarsely(full), "{}", ahead(&machine));
    seconds(&machine, 10);
    assert_eq!(ahead(&machine), 1024);
    // What is used is replaced, by those that come next.
    for extent in [0, 500, 1000] {
        wr(&machine, extent * EXTENT, 4096);
    }
    seconds(&machine, 10);
    assert_eq!(ahead(&machine), 1027);
}

/// While requests come there is no idle time.
#[test]
fn nothing_is_zeroed_for_the_stock_while_there_are_requests() {
    let machine = plain(1, 64);
    wr(&machine, 0, 4096);
    for round in 0..40 {
        let client = machine.client();
        let request = async move {
            match round % 4 {
                0 => client.read(0, 4096).await.unwrap(),
                1 => client.write(0, 4096, false).await.unwrap(),
                2 => client.flush().await.unwrap(),
                _ => client.mirror.discard(0, 4096).await.unwrap(),
            }
        };
        machine.world.block_on(request);
        let host = mirror::sim::SimHost(machine.world.clone());
        let wait = async move {
            mirror::Host::sleep(&host, std::time::Duration::from_millis(500)).await;
        };
        machine.world.block_on(wait);
        assert_eq!(ahead(&machine), 0, "round {round}");
    }
    seconds(&machine, 10);
    assert_eq!(ahead(&machine), 63);
}

#[test]
fn what_is_known_to_be_zero_is_not_zeroed() {
    for cheap in [false, true] {
        let mut machine = zeroed(1, cheap);
        seconds(&machine, 10);
        wr(&machine, 0, 4096);
        wr(&machine, 5 * EXTENT, 4096);
        let io = machine.mirror().status().io;
        assert_eq!((io.extents_zeroed, io.extents_zeroed_ahead), (0, 0));
        // Once it has been discarded, what is there is not known any more.
        let client = machine.client();
        machine
            .world
            .block_on(async move { client.discard_extent(5).await.unwrap() });
        wr(&machine, 5 * EXTENT + 8192, 4096);
        assert_eq!(machine.mirror().status().io.extents_zeroed, 1);
        machine.check_all("in the end");
        machine.compare_members();
    }
}

/// Where one of two has to be written zeroes to, that one is; the other one zeroes by itself.
#[test]
fn each_member_is_zeroed_as_it_can_be() {
    let mut machine = Machine::new(1, 2, 16 * EXTENT);
    machine.disks[1].alter(|it| it.cheap_zeroes = false);
    machine.start();
    wr(&machine, EXTENT, 4096);
    seconds(&machine, 10);
    assert_eq!(ahead(&machine), 15);
    wr(&machine, 9 * EXTENT, 4096);
    // The first one had not been zeroed ahead.
    assert_eq!(machine.mirror().status().io.extents_zeroed, 2);
    machine.check_all("in the end");
    machine.compare_members();
}

/// Missed bits are cleared in batches of 256 MiB: what a restart in the middle resumes from.
#[test]
fn a_long_resync_makes_progress_that_lasts() {
    let mut machine = Machine::new(1, 2, 100 * EXTENT);
    machine.start();
    for extent in 0..100 {
        wr(&machine, extent * EXTENT, 4096);
    }
    fl(&machine);
    machine.fail(1).unwrap();
    machine.add_new("new").unwrap();
    let mirror = machine.mirror();
    let mut seen = BTreeSet::new();
    let in_sync = || {
        let member = &mirror.status().members[1];
        seen.insert(member.missed_bytes);
        member.state == MemberState::InSync
    };
    assert!(machine.world.run(5_000_000, in_sync));
    let seen: Vec<u64> = seen.into_iter().collect();
    let [0, between, all] = seen[..] else {
        panic!("in two batches: {seen:?}");
    };
    assert_eq!(all, 100 * EXTENT);
    let batch = all - between;
    assert!((256 << 20..260 << 20).contains(&batch), "{batch}");
    let resync = mirror.status().last_resync.unwrap();
    assert_eq!(resync.copied_bytes, 100 << 20);
    assert_eq!(resync.zeroed_bytes, 300 << 20);
    machine.compare_members();
}
