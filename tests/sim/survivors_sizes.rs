//! The largest and the smallest: maps of more than a mebibyte, devices that are no member, copies
//! of which one is older.

use crate::machine::{GARBAGE, Machine, path, superblock_on};
use crate::older_images::states;
use crate::races::{fl, none, wr};
use mirror::Host as _;
use mirror::control::MemberState;
use mirror::layout::{MEMBER_BYTES_MIN, PAGE_BYTES, RegionKind};
use mirror::sim::{Faults, SimDisk, SimHost};
use std::time::Duration;

const TIB: u64 = 1 << 40;
/// Its state map is longer than what one request reads or writes.
const HUGE: u64 = 17 * TIB;

fn written(places: &[u64], size: u64) -> Machine {
    let mut machine = Machine::new(1, 2, size);
    machine.start();
    for &place in places {
        wr(&machine, place, 4096);
    }
    fl(&machine);
    machine
}

#[test]
fn a_state_map_of_more_than_a_mebibyte_is_read_and_written_whole() {
    let places = [0, 3 * TIB, 15 * TIB, 16 * TIB, HUGE - 4096];
    let mut machine = written(&places, HUGE);
    machine.stop().unwrap();
    machine.start();
    let extents = machine.mirror().status().extents;
    assert_eq!((extents.hot, extents.cool), (0, places.len() as u64));
    assert_eq!(extents.unwritten, (HUGE >> 22) - places.len() as u64);
    machine.check_all("after a restart");
    machine.fail(1).unwrap();
    machine.add_new("new").unwrap();
    machine.wait_in_sync();
    machine.compare_members();
    machine.stop().unwrap();
    // The new disk alone.
    machine.start_on(&[1], true).unwrap();
    let extents = machine.mirror().status().extents;
    assert_eq!((extents.hot, extents.cool), (0, places.len() as u64));
    machine.check_all("from the new disk alone");
}

/// A disk that has stopped answering is not asked for each page of a large map.
#[test]
fn a_disk_that_hangs_holds_a_start_up_for_minutes_at_most() {
    let mut machine = written(&[0, 16 * TIB], HUGE);
    machine.stop().unwrap();
    let disk = machine.disks[1].clone();
    let host = SimHost(machine.world.clone());
    // The two reads of its superblock.
    let surveyed = disk.operations() + 2;
    let begun = host.now();
    let cut = machine.start_on_until(&[0, 1], false, |_| {
        if disk.operations() >= surveyed {
            disk.set_faults(Faults {
                hang: true,
                ..none()
            });
        }
        false
    });
    assert!(cut, "the start has ended");
    let took = host.now() - begun;
    assert!(took < Duration::from_secs(600), "{took:?}");
}

/// A member may be as small as a device can be; what is smaller is none, and is not read.
#[test]
fn the_smallest_device_is_a_member_and_a_smaller_one_is_not() {
    for (bytes, member) in [
        (MEMBER_BYTES_MIN, true),
        (MEMBER_BYTES_MIN - 4096, false),
        (4096, false),
    ] {
        let mut machine = written(&[0], 4 << 20);
        machine.stop().unwrap();
        let small = SimDisk::new(bytes, GARBAGE);
        let mut all = vec![0; bytes as usize];
        machine.disks[1].read_now(0, &mut all);
        small.write_now(0, &all);
        machine.replace_disk(1, small);
        let started = machine.start_on(&[0, 1], false);
        assert_eq!(started.is_ok(), member, "{bytes} bytes");
        if member {
            assert_eq!(states(&machine), [MemberState::InSync; 2]);
            machine.check_all(&path(1));
            continue;
        }
        machine.start_on(&[0], true).unwrap();
        let refused = machine.re_add(1).unwrap_err();
        assert!(refused.message.contains("no superblock"), "{refused}");
    }
}

/// One copy of a page is from before, on every member: the newer one counts, whichever it is.
#[test]
fn the_newer_copy_of_a_map_page_counts() {
    for older in [0, 1] {
        let mut machine = written(&[0], 64 << 20);
        machine.stop().unwrap();
        let layout = superblock_on(&machine.disks[0]).unwrap().layout;
        let region = *layout.find(RegionKind::State, 0).unwrap();
        let copies = [region.copy_a, region.copy_b];
        let mut before = vec![0; PAGE_BYTES as usize];
        machine.disks[0].read_now(copies[older], &mut before);
        machine.start();
        wr(&machine, 20 << 20, 4096);
        machine.stop().unwrap();
        for disk in &machine.disks {
            disk.write_now(copies[older], &before);
        }
        machine.start();
        let extents = machine.mirror().status().extents;
        assert_eq!((extents.hot, extents.cool), (0, 2), "copy {older}");
        machine.check_all("with an older copy");
        machine.stop().unwrap();
        // Both are equal again.
        for disk in &machine.disks {
            let mut now = [before.clone(), before.clone()];
            for (copy, now) in copies.iter().zip(&mut now) {
                disk.read_now(*copy, now);
            }
            assert!(now[0] == now[1] && now[0] != before, "copy {older}");
        }
    }
}

/// The maps of one member are older than those of the other one: the newer ones count, and both
/// hold them then.
#[test]
fn the_newer_maps_of_two_members_count() {
    for older in [0, 1] {
        let mut machine = written(&[0, 4 << 20], 64 << 20);
        machine.stop().unwrap();
        let layout = superblock_on(&machine.disks[0]).unwrap().layout;
        let region = *layout.find(RegionKind::State, 0).unwrap();
        let mut before = vec![0; PAGE_BYTES as usize];
        machine.disks[older].read_now(region.copy_a, &mut before);
        machine.start();
        wr(&machine, 20 << 20, 4096);
        machine.stop().unwrap();
        for copy in [region.copy_a, region.copy_b] {
            machine.disks[older].write_now(copy, &before);
        }
        machine.start();
        assert_eq!(states(&machine), [MemberState::InSync; 2]);
        let extents = machine.mirror().status().extents;
        assert_eq!((extents.hot, extents.cool), (0, 3), "member {older}");
        machine.cut_power_choosing(&mut |ways| ways - 1);
        machine.start_on(&[older], true).unwrap();
        let extents = machine.mirror().status().extents;
        assert_eq!(extents.cool, 3, "member {older}");
        machine.check_all("alone");
    }
}
