//! Maps of large devices, of many sectors and pages: what is set far out, what is damaged in one
//! place, what is read piece by piece.

use crate::machine::{GARBAGE, Machine, path, superblock_on};
use crate::races::{fl, wr};
use mirror::control::{MemberState, ResyncKind};
use mirror::layout::{PAGE_BYTES, Region, RegionKind};
use mirror::sim::SimDisk;
use mirror::superblock::{COPY_A_OFFSET, COPY_B_OFFSET, COPY_BYTES};

/// Blocks in a page of a missed map, in bytes of the device: 120 MiB.
const MISSED_PAGE: u64 = 120 << 20;
/// Extents in a page of the state map, in bytes of the device: 60 GiB.
const STATE_PAGE: u64 = 60 << 30;
/// Pages of the missed map, the last one not full; the last extent is short.
const SIZE: u64 = 5 * MISSED_PAGE + (6 << 20) + 8192;
/// Two pages of the state map, the second one not full.
const LARGE: u64 = STATE_PAGE + (37 << 30);

fn region(disk: &SimDisk, kind: RegionKind, slot: u8) -> Region {
    let layout = superblock_on(disk).unwrap().layout;
    *layout.find(kind, slot).unwrap()
}

/// Makes nonsense of a page of one copy of a region.
fn damage(disk: &SimDisk, kind: RegionKind, slot: u8, second_copy: bool, page: u64) {
    let region = region(disk, kind, slot);
    let copy = [region.copy_a, region.copy_b][usize::from(second_copy)];
    disk.write_now(copy + page * PAGE_BYTES, &[GARBAGE; PAGE_BYTES as usize]);
}

/// Makes a page of one copy of a region unreadable.
fn spoil(disk: &SimDisk, kind: RegionKind, slot: u8, second_copy: bool, page: u64) {
    let region = region(disk, kind, slot);
    let copy = [region.copy_a, region.copy_b][usize::from(second_copy)];
    disk.spoil(copy + page * PAGE_BYTES + 1024);
}

fn missed_bytes(machine: &Machine, slot: usize) -> u64 {
    machine.mirror().status().members[slot].missed_bytes
}

fn everywhere() -> Vec<u64> {
    // In each page of the missed map, at both sides of the seams between sectors (15 MiB) and
    // pages, and the short last block of all.
    let sector = MISSED_PAGE / 8;
    let mut places: Vec<u64> = (0..5).map(|page| page * MISSED_PAGE + 8192).collect();
    places.extend([sector - 4096, sector, MISSED_PAGE - 4096, MISSED_PAGE]);
    places.extend([3 * MISSED_PAGE + 5 * sector - 4096, 4 * MISSED_PAGE - 4096]);
    places.extend([5 * MISSED_PAGE + (1 << 20), SIZE - 8192]);
    places
}

/// A mirror whose second member has missed one block at each of `places` and nothing else, and
/// that was stopped cleanly after that.
fn stopped_without_the_second(seed: u64, size: u64, places: &[u64]) -> Machine {
    let mut machine = Machine::new(seed, 2, size);
    machine.start();
    for &place in places {
        wr(
            &machine,
            place & !0xffff,
            65536.min((size - (place & !0xffff)) as usize),
        );
    }
    fl(&machine);
    machine.fail(1).unwrap();
    for &place in places {
        wr(&machine, place, 4096);
    }
    machine.stop().unwrap();
    machine
}

fn comes_back_with(machine: &mut Machine, blocks: u64, what: &str) {
    assert_eq!(missed_bytes(machine, 1), blocks * 4096, "{what}");
    machine.re_add(1).unwrap();
    machine.wait_in_sync();
    let resync = machine.mirror().status().last_resync.unwrap();
    assert_eq!(resync.kind, ResyncKind::Delta, "{what}");
    assert_eq!(resync.copied_bytes, blocks * 4096, "{what}");
    machine.check_all(what);
    machine.compare_members();
}

#[test]
fn missed_bits_of_every_page_survive_a_restart() {
    for seed in 0..2 {
        let places = everywhere();
        let mut machine = stopped_without_the_second(seed, SIZE, &places);
        machine.start();
        comes_back_with(&mut machine, places.len() as u64, "after a restart");
    }
}

/// One copy of a page is nonsense; the start makes it good again from the other one, so that the
/// next start can do without that.
#[test]
fn a_damaged_copy_of_a_map_page_is_made_good() {
    let places = everywhere();
    for (kind, slot, pages) in [
        (RegionKind::Position, 0, vec![0]),
        (RegionKind::State, 0, vec![0]),
        (RegionKind::Summary, 1, vec![0]),
        (RegionKind::Missed, 1, vec![0, 1, 3, 5]),
    ] {
        for page in pages {
            let what = format!("{kind:?} page {page}");
            let mut machine = stopped_without_the_second(1, SIZE, &places);
            for second_copy in [false, true] {
                damage(&machine.disks[0], kind, slot, second_copy, page);
                machine.start();
                assert_eq!(
                    missed_bytes(&machine, 1),
                    places.len() as u64 * 4096,
                    "{what}"
                );
                machine.stop().unwrap();
            }
            machine.start();
            comes_back_with(&mut machine, places.len() as u64, &what);
        }
    }
}

/// Both copies of a page of the missed map are nonsense: all its blocks are missed, and those of
/// the others are what they were.
#[test]
fn a_page_that_is_lost_is_missed_as_a_whole() {
    let places = everywhere();
    for page in [0, 1, 5] {
        let mut machine = stopped_without_the_second(1, SIZE, &places);
        for second_copy in [false, true] {
            damage(&machine.disks[0], RegionKind::Missed, 1, second_copy, page);
        }
        machine.start();
        let begin = page * MISSED_PAGE;
        let end = (begin + MISSED_PAGE).min(SIZE.next_multiple_of(4 << 20));
        let elsewhere = |place: &&u64| !(begin..end).contains(place);
        let others = places.iter().filter(elsewhere).count() as u64;
        let missed = missed_bytes(&machine, 1);
        assert_eq!(missed, end - begin + others * 4096, "page {page}");
        machine.re_add(1).unwrap();
        machine.wait_in_sync();
        machine.check_all("after the return");
        machine.compare_members();
    }
}

/// Both copies of the summary are nonsense: what is on the pages counts all the same.
#[test]
fn without_a_summary_every_page_is_looked_at() {
    let places = everywhere();
    let mut machine = stopped_without_the_second(1, SIZE, &places);
    for second_copy in [false, true] {
        damage(&machine.disks[0], RegionKind::Summary, 1, second_copy, 0);
    }
    machine.start();
    // Each of its six pages has been written, so nothing is missed beyond what was.
    comes_back_with(&mut machine, places.len() as u64, "without a summary");
}

/// Unreadable sectors: in the first page of one copy and in the second page of the other one, on
/// every member. Each page can be read somewhere.
#[test]
fn pages_that_cannot_be_read_are_taken_from_the_other_copy() {
    for swapped in [false, true] {
        let mut machine = Machine::new(1, 2, LARGE);
        machine.start();
        let places = [
            0,
            9 << 30,
            STATE_PAGE - (4 << 20),
            STATE_PAGE,
            LARGE - 65536,
        ];
        for place in places {
            wr(&machine, place, 65536);
        }
        machine.stop().unwrap();
        for disk in &machine.disks {
            spoil(disk, RegionKind::State, 0, swapped, 0);
            spoil(disk, RegionKind::State, 0, !swapped, 1);
        }
        machine.start();
        let extents = machine.mirror().status().extents;
        assert_eq!((extents.hot, extents.cool), (0, places.len() as u64));
        machine.check_all("with unreadable map pages");
        machine.compare_members();
        for place in places {
            wr(&machine, place, 65536);
        }
        machine.stop().unwrap();
        for disk in &machine.disks {
            let region = region(disk, RegionKind::State, 0);
            for copy in [region.copy_a, region.copy_b] {
                let pages = [copy + 1024, copy + PAGE_BYTES + 1024];
                assert!(
                    !pages.into_iter().any(|at| disk.is_spoilt(at)),
                    "not rewritten"
                );
            }
        }
        machine.start();
        machine.check_all("after the next start");
    }
}

/// With no copy of a sector of the state map left, the start is refused; by force, the sector's
/// extents count as written and the others are what they were.
#[test]
fn a_lost_sector_of_the_state_map_needs_force() {
    for page in [0, 1] {
        let mut machine = Machine::new(1, 2, LARGE);
        machine.start();
        let places = [
            0,
            9 << 30,
            STATE_PAGE - (4 << 20),
            STATE_PAGE,
            LARGE - 65536,
        ];
        for place in places {
            wr(&machine, place, 65536);
        }
        machine.stop().unwrap();
        for disk in &machine.disks {
            for second_copy in [false, true] {
                damage(disk, RegionKind::State, 0, second_copy, page);
            }
        }
        let refused = machine.start_on(&[0, 1], false).unwrap_err();
        assert!(refused.to_string().contains("--force"), "{refused}");
        machine.start_on(&[0, 1], true).unwrap();
        let extents = machine.mirror().status().extents;
        let in_page = if page == 0 {
            STATE_PAGE >> 22
        } else {
            (LARGE - STATE_PAGE) >> 22
        };
        let elsewhere = |place: &&u64| **place / STATE_PAGE != page;
        let others = places.iter().filter(elsewhere).count() as u64;
        assert_eq!(
            (extents.hot, extents.cool),
            (in_page, others),
            "page {page}"
        );
        machine.check_all("by force");
    }
}

/// One copy of a member's superblock is nonsense, then the other one: the first start has made
/// the first one good.
#[test]
fn a_damaged_superblock_copy_is_made_good() {
    for order in [
        [COPY_A_OFFSET, COPY_B_OFFSET],
        [COPY_B_OFFSET, COPY_A_OFFSET],
    ] {
        let mut machine = Machine::new(1, 2, 64 << 20);
        machine.start();
        wr(&machine, 0, 65536);
        machine.stop().unwrap();
        for offset in order {
            for disk in &machine.disks {
                disk.write_now(offset, &[GARBAGE; COPY_BYTES]);
            }
            // Not one operation beyond the survey: what a start that goes on writes does not count.
            let made_good = |machine: &Machine| {
                let copies = |disk: &SimDisk| {
                    let mut copy = vec![0; COPY_BYTES];
                    disk.read_now(offset, &mut copy);
                    copy[0] != GARBAGE
                };
                machine.disks.iter().all(copies)
            };
            let ended = machine.start_on_until(&[0, 1], false, made_good);
            assert!(!ended && made_good(&machine), "at {offset}");
            machine.cut_power_choosing(&mut |_| 0);
        }
        machine.start();
        machine.check_all("after both");
    }
}

/// A device that has become smaller than its superblock says is left out, one that is just large
/// enough is not.
#[test]
fn a_member_that_has_shrunk_is_left_out() {
    for lacking in [0, 1 << 20] {
        let mut machine = Machine::new(1, 2, 64 << 20);
        machine.start();
        wr(&machine, 0, 65536);
        machine.stop().unwrap();
        let layout = superblock_on(&machine.disks[1]).unwrap().layout;
        let need = layout.member_bytes();
        let shrunk = SimDisk::new(need - lacking, GARBAGE);
        let mut bytes = vec![0; (layout.data_offset + (4 << 20)) as usize];
        machine.disks[1].read_now(0, &mut bytes);
        shrunk.write_now(0, &bytes);
        machine.replace_disk(1, shrunk);
        let started = machine.start_on(&[0, 1], false);
        if lacking == 0 {
            started.unwrap();
            let members = machine.mirror().status().members;
            assert_eq!(members[1].state, MemberState::InSync);
            machine.check_all(&path(1));
        } else {
            assert!(started.is_err(), "a member in-sync is missing");
        }
    }
}
