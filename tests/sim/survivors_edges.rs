//! Slots without a member, disks that cannot do what they say, the end of the device, little
//! memory, and the last member that nobody can do without.

use crate::machine::{GARBAGE, Machine, path, superblock_on};
use crate::older_images::{seconds, states};
use crate::races::{fl, gone, none, wr};
use mirror::control::{MemberRef, MemberState, MirrorState};
use mirror::sim::{Faults, SimDisk};
use mirror::superblock::{COPY_A_OFFSET, COPY_B_OFFSET, SlotRecord, SlotState, Superblock};
use mirror::{Disk as _, Errno};
use std::cell::Cell;
use std::rc::Rc;

const EXTENT: u64 = 4 << 20;
/// The last extent is short, and so is its last block.
const ODD: u64 = 5 * EXTENT + (1 << 20) + 4096 + 512;

/// Changes the superblocks of a mirror that has never been started.
fn with(mut machine: Machine, change: impl Fn(&mut Superblock)) -> Machine {
    for disk in &machine.disks {
        let mut superblock = superblock_on(disk).unwrap();
        change(&mut superblock);
        for offset in [COPY_A_OFFSET, COPY_B_OFFSET] {
            disk.write_now(offset, &superblock.encode());
        }
    }
    machine.start();
    machine
}

fn add(machine: &Machine, path: &str) -> (SimDisk, Result<String, mirror::ControlError>) {
    let (mirror, path) = (machine.mirror(), path.to_owned());
    let new = SimDisk::new(machine.disks[0].geometry().size_bytes, GARBAGE);
    machine.world.connect(&new);
    let disk = new.clone();
    let added = async move { mirror.add(path, disk, false, false).await };
    (new, machine.world.block_on(added))
}

/// Nothing is missed by nobody; a new disk takes an empty slot rather than that of a member that
/// may come back.
#[test]
fn an_empty_slot_is_nobodys_and_is_taken_first() {
    let machine = with(Machine::new(1, 2, 64 << 20), |superblock| {
        superblock.slots.push(SlotRecord::empty());
    });
    wr(&machine, 0, 65536);
    let status = machine.mirror().status();
    let empty = &status.members[2];
    assert_eq!((empty.state, empty.missed_bytes), (MemberState::Missing, 0));
    assert_eq!(empty.uuid, None);
    assert_eq!(status.state, MirrorState::Degraded);
    machine.fail(1).unwrap();
    let (new, added) = add(&machine, "new");
    assert!(added.as_ref().unwrap().contains("slot 2"), "{added:?}");
    let mirror = machine.mirror();
    let in_sync = || mirror.status().members[2].state == MemberState::InSync;
    assert!(machine.run_coarsely(in_sync));
    machine.re_add(1).unwrap();
    machine.wait_in_sync();
    let superblock = superblock_on(&new).unwrap();
    assert_eq!(superblock.own_slot, 2);
    assert!(
        superblock
            .slots
            .iter()
            .all(|slot| slot.state == SlotState::InSync)
    );
}

/// A disk with smaller blocks than the mirror's will do.
#[test]
fn a_disk_with_smaller_blocks_may_join() {
    let mut machine = with(Machine::new(1, 2, 64 << 20), |superblock| {
        superblock.logical_block_bytes = 4096;
    });
    wr(&machine, 0, 65536);
    let client = machine.client();
    machine.world.block_on(async move {
        assert_eq!(client.read(512, 4096).await, Err(Errno::INVALID));
        assert_eq!(client.read(4096, 512).await, Err(Errno::INVALID));
        client.read(4096, 4096).await.unwrap();
    });
    assert_eq!(machine.mirror().status().logical_block_bytes, 4096);
    machine.fail(1).unwrap();
    machine.add_new("new").unwrap();
    machine.wait_in_sync();
    machine.compare_members();
}

/// A disk that says that it zeroes by itself and then cannot is written zeroes to.
#[test]
fn a_disk_that_cannot_zero_after_all_is_written_to() {
    for both in [false, true] {
        let mut machine = Machine::new(1, 2, ODD);
        machine.start();
        machine.disks[0].alter(|it| it.cheap_zeroes = false);
        if both {
            machine.disks[1].alter(|it| it.cheap_zeroes = false);
        }
        for place in [0, 3 * EXTENT, ODD - 512] {
            wr(&machine, place, 512);
        }
        assert_eq!(states(&machine), [MemberState::InSync; 2]);
        let client = machine.client();
        machine.world.block_on(async move {
            client.read(0, 1 << 20).await.unwrap();
            client.read(4 * EXTENT - (1 << 20), 1 << 20).await.unwrap();
            client
                .read(5 * EXTENT, (ODD - 5 * EXTENT) as usize)
                .await
                .unwrap();
        });
        machine.check_all("after the first writes");
        machine.compare_members();
    }
}

/// Whatever is done at the end of the device, what lies behind it on a disk is left alone.
#[test]
fn nothing_is_written_behind_the_end() {
    for cheap in [false, true] {
        let mut machine = Machine::new(1, 2, ODD);
        if !cheap {
            machine
                .disks
                .iter()
                .for_each(|disk| disk.alter(|it| it.cheap_zeroes = false));
        }
        machine.start();
        wr(&machine, ODD - 512, 512);
        wr(&machine, ODD - 8192 - 512, 8192);
        machine.kill_daemon();
        machine.start();
        let mirror = machine.mirror();
        let equal = || mirror.status().extents.unequalised_blocks == 0;
        assert!(machine.run_coarsely(equal));
        machine.fail(1).unwrap();
        machine.add_new("new").unwrap();
        machine.wait_in_sync();
        let client = machine.client();
        machine.world.block_on(async move {
            client.write_zeroes(ODD - 4608, 4096, false).await.unwrap();
            client.read(ODD - 65536 - 512, 65536 + 512).await.unwrap();
        });
        seconds(&machine, 30);
        machine.check_all("in the end");
        machine.compare_members();
        for (slot, background) in [(0, GARBAGE), (1, 0x5c)] {
            let mut behind = vec![0; 1 << 20];
            machine.disks[slot].read_now(machine.data_offset + ODD, &mut behind);
            assert!(behind.iter().all(|&byte| byte == background), "slot {slot}");
        }
    }
}

/// Copies that differ at the short end of the device after an unclean stop are made equal.
#[test]
fn the_short_end_is_equalised() {
    for seed in 0..20 {
        let mut machine = Machine::new(seed, 2, ODD);
        machine.start();
        wr(&machine, ODD - 16384 - 512, 16896);
        fl(&machine);
        let client = machine.client();
        machine.world.spawn_task(async move {
            let _ = client.write(ODD - 16384 - 512, 16896, false).await;
        });
        let at = machine.data_offset + ODD - 512;
        let disk = machine.disks[0].clone();
        assert!(machine.world.run(10_000, || disk.is_under_way(at, 512)));
        machine.cut_power();
        machine.start();
        let mirror = machine.mirror();
        let equal = || mirror.status().extents.unequalised_blocks == 0;
        assert!(machine.run_coarsely(equal), "seed {seed}");
        machine.check_all(&format!("seed {seed}"));
        machine.compare_members();
    }
}

/// With memory for a few hot extents no more than a few are hot, however many are written to.
#[test]
fn extents_cool_when_memory_is_short() {
    // This seed has little memory.
    let mut machine = Machine::new(3, 2, 64 << 20);
    machine.start();
    for round in 0..2 {
        for extent in 0..16 {
            wr(&machine, extent * EXTENT + round * 8192, 4096);
            let hot = machine.mirror().status().extents.hot;
            assert!(hot <= 8, "{hot} are hot");
        }
    }
    machine.check_all("in the end");
    machine.compare_members();
}

/// Of the last member every answer is waited for, also that to a discard.
#[test]
fn the_last_member_may_take_its_time_for_a_discard() {
    let mut machine = Machine::new(1, 2, 64 << 20);
    machine.start();
    for extent in 0..4 {
        wr(&machine, extent * EXTENT, 65536);
    }
    machine.fail(1).unwrap();
    let client = machine.client();
    machine
        .world
        .block_on(async move { client.discard_extent(0).await.unwrap() });
    let done = Rc::new(Cell::new(false));
    let (client, ended) = (machine.client(), done.clone());
    machine.world.spawn_task(async move {
        client.discard_extent(2).await.unwrap();
        ended.set(true);
    });
    let disk = machine.disks[0].clone();
    let at = machine.data_offset + 2 * EXTENT;
    assert!(machine.world.run(100_000, || disk.is_under_way(at, 4096)));
    disk.set_faults(Faults {
        hang: true,
        ..none()
    });
    seconds(&machine, 20);
    assert!(!done.get(), "answered without the last member");
    disk.set_faults(none());
    assert!(machine.run_coarsely(|| done.get()));
    assert_eq!(states(&machine)[0], MemberState::InSync);
    machine.check_all("in the end");
}

/// A loss that the last survivor cannot record: writes are refused, reads go on; when it can be
/// recorded, all goes on.
#[test]
fn what_cannot_be_recorded_is_not_answered_well() {
    let mut machine = Machine::new(1, 2, 64 << 20);
    machine.start();
    wr(&machine, 0, 65536);
    let first = machine.disks[0].clone();
    let data = machine.data_offset;
    let client = machine.client();
    let answer = Rc::new(Cell::new(None));
    let answered = answer.clone();
    machine.disks[1].set_faults(gone());
    machine.world.spawn_task(async move {
        answered.set(Some(client.write(0, 4096, false).await));
    });
    // From the moment on that the data are on the first disk, it takes no superblock.
    let host = mirror::sim::SimHost(machine.world.clone());
    let until = mirror::Host::now(&host) + std::time::Duration::from_secs(3);
    while mirror::Host::now(&host) < until {
        let superblock = first.is_under_way(COPY_A_OFFSET, 8192);
        first.set_faults(Faults {
            writes: superblock,
            ..none()
        });
        machine.world.step();
    }
    assert!(!first.is_under_way(data, 4096));
    assert_eq!(answer.get(), Some(Err(Errno::IO)));
    assert_eq!(machine.mirror().status().state, MirrorState::WriteBlocked);
    let client = machine.client();
    let refused = machine.world.block_on(async move {
        client.read(0, 65536).await.unwrap();
        client.mirror.discard(0, EXTENT).await
    });
    assert_eq!(refused, Err(Errno::IO));
    first.set_faults(none());
    let mirror = machine.mirror();
    let degraded = || mirror.status().state == MirrorState::Degraded;
    assert!(machine.run_coarsely(degraded));
    wr(&machine, 0, 4096);
    machine.disks[1].set_faults(none());
    machine.world.run(2000, || false);
    machine.re_add(1).unwrap();
    machine.wait_in_sync();
    machine.check_all("in the end");
    machine.compare_members();
}

/// Nobody to start: none given, or none that is a member.
#[test]
fn a_start_without_members_says_so() {
    use mirror::control::ErrorKind;
    let mut machine = Machine::new(1, 2, 64 << 20);
    let nobody = machine.world.block_on({
        let host = Rc::new(mirror::sim::SimHost(machine.world.clone()));
        let options = machine.options(false);
        async move { crate::machine::SimMirror::start(host, Vec::new(), options).await }
    });
    assert_eq!(
        nobody.err().map(|error| error.kind()),
        Some(ErrorKind::NotFound)
    );
    for slot in 0..2 {
        let size = machine.disks[slot].geometry().size_bytes;
        machine.replace_disk(slot, SimDisk::new(size, GARBAGE));
    }
    let mut other = Machine::new(2, 2, 64 << 20);
    machine.replace_disk(0, other.disks[0].clone());
    let refused = machine.start_on(&[0], false).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Refused);
    other.start();
    let refused = other.re_add_disk(path(1), SimDisk::new(64 << 20, GARBAGE), true);
    assert!(refused.is_err());
    let member = MemberRef::Path(path(7));
    let mirror = other.mirror();
    let unknown = other
        .world
        .block_on(async move { mirror.fail(&member).await })
        .unwrap_err();
    assert_eq!(unknown.kind, ErrorKind::NotFound);
}

#[test]
fn memory_is_as_long_as_it_was_asked_for() {
    use mirror::{Buffer as _, Host as _};
    let machine = Machine::new(1, 2, 64 << 20);
    let host = mirror::sim::SimHost(machine.world.clone());
    let (some, none) = (host.allocate(8192), host.allocate(0));
    assert_eq!((some.len(), some.is_empty()), (8192, false));
    assert_eq!((none.len(), none.is_empty()), (0, true));
}
