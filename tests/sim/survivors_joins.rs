//! Joins looked at closely: what they write to the joiner, what they record, what becomes of them
//! when a disk fails in the middle, and who may not join.

use crate::machine::{GARBAGE, Machine, path, superblock_on};
use crate::older_images::{drop_all, seconds, states, write_and_flush};
use crate::races::{fl, gone, none, seeds, wr};
use dirty_map::{Address, Kind, SECTOR_BYTES, Stamp};
use mirror::control::{ErrorKind, MemberRef, MemberState, ResyncKind};
use mirror::engine::Return;
use mirror::layout::RegionKind;
use mirror::sim::{Faults, SimDisk};
use mirror::superblock::{COPY_A_OFFSET, SlotState};

const SIZE: u64 = 64 << 20;
const MISSED_PAGE: u64 = 120 << 20;

/// The newest position that a disk's own position page names.
fn position_on(disk: &SimDisk) -> Stamp {
    let superblock = superblock_on(disk).unwrap();
    let region = *superblock.layout.find(RegionKind::Position, 0).unwrap();
    let decoded = [region.copy_a, region.copy_b].map(|copy| {
        let mut bytes = [0; SECTOR_BYTES];
        disk.read_now(copy, &mut bytes);
        let address = Address {
            kind: Kind::Position,
            slot: 0,
            index: 0,
        };
        dirty_map::decode(&bytes, address, superblock.tag()).map(|(stamp, _)| stamp)
    });
    decoded.into_iter().flatten().max().unwrap()
}

/// Three members; the third one is away and lacks one block in each of many pages of its map.
fn third_lacks(size: u64, pages: std::ops::Range<u64>) -> Machine {
    let mut machine = Machine::new(1, 3, size);
    machine.start();
    for page in pages.clone() {
        wr(&machine, page * MISSED_PAGE, 4096);
    }
    fl(&machine);
    machine.fail(2).unwrap();
    for page in pages {
        wr(&machine, page * MISSED_PAGE, 4096);
    }
    // Cool, and so recorded before anybody joins: what joins has it from its join alone.
    seconds(&machine, 30);
    assert_eq!(machine.mirror().status().extents.hot, 0);
    machine
}

/// The second member gets every map at its join: alone, it knows what the third one lacks.
fn joiner_knows_what_the_third_lacks(size: u64, pages: std::ops::Range<u64>, new: bool) {
    let mut machine = third_lacks(size, pages.clone());
    let lacks = (pages.end - pages.start) * 4096;
    let missed = |machine: &Machine| machine.mirror().status().members[2].missed_bytes;
    assert_eq!(missed(&machine), lacks);
    machine.fail(1).unwrap();
    wr(&machine, pages.start * MISSED_PAGE + (1 << 20), 4096);
    let message = if new {
        machine.add_new("new").unwrap()
    } else {
        machine.re_add(1).unwrap()
    };
    let words = if new {
        "resyncing (full)"
    } else {
        "resyncing (delta)"
    };
    assert!(message.contains(words), "{message}");
    let mirror = machine.mirror();
    let in_sync = || mirror.status().members[1].state == MemberState::InSync;
    assert!(machine.run_coarsely(in_sync));
    // The write at 1 MiB comes on top, and after the stop nothing is hot.
    let lacks = lacks + 4096;
    assert_eq!(missed(&machine), lacks);
    machine.stop().unwrap();
    machine.start_on(&[1], true).unwrap();
    assert_eq!(missed(&machine), lacks, "what the joiner knows");
    let third = machine.disks[2].clone();
    let back = machine.re_add_disk(path(2), third, false).unwrap();
    assert!(back.contains("delta"), "{back}");
    let mirror = machine.mirror();
    let in_sync = || mirror.status().members[2].state == MemberState::InSync;
    assert!(machine.run_coarsely(in_sync));
    let resync = mirror.status().last_resync.unwrap();
    assert_eq!(resync.copied_bytes, lacks);
    machine.check_all("after the third one's return");
}

#[test]
fn a_joiner_gets_the_maps_of_the_others() {
    for new in [false, true] {
        // Pages one after the other, and with a gap.
        joiner_knows_what_the_third_lacks(6 * MISSED_PAGE, 0..5, new);
        joiner_knows_what_the_third_lacks(6 * MISSED_PAGE, 2..6, new);
    }
}

/// More pages one after the other than a write, or a step of a commit, takes at once.
#[test]
fn a_joiner_gets_maps_of_hundreds_of_pages() {
    joiner_knows_what_the_third_lacks(300 * MISSED_PAGE, 3..300, false);
}

/// What a join records of the joiner, on all members.
#[test]
fn a_join_is_recorded_as_what_it_is() {
    for full in [false, true] {
        let mut machine = Machine::new(1, 2, SIZE);
        machine.start();
        for extent in 0..8 {
            wr(&machine, extent << 22, 1 << 20);
        }
        machine.fail(1).unwrap();
        for extent in 0..8 {
            wr(&machine, extent << 22, 1 << 20);
        }
        let before = machine.disks.iter().map(position_on).max().unwrap();
        if full {
            machine.add_new("new").unwrap();
        } else {
            machine.re_add(1).unwrap();
        }
        for disk in &machine.disks {
            let record = superblock_on(disk).unwrap().slots[1].clone();
            assert_eq!(record.state, SlotState::Resyncing);
            assert_eq!(record.full, full);
            assert!(record.base.sequence > before.sequence, "{:?}", record.base);
        }
        let resync = machine.mirror().status().resync.unwrap();
        assert_eq!((resync.slot, resync.finished), (1, false));
        let kind = [ResyncKind::Delta, ResyncKind::Full][usize::from(full)];
        assert_eq!(resync.kind, kind);
        machine.wait_in_sync();
        assert!(machine.mirror().status().resync.is_none());
        machine.compare_members();
    }
}

/// The joiner fails while its superblock is written: it has not joined, and what it lacks is
/// known all the same.
#[test]
fn a_joiner_that_fails_in_its_round_returns_by_delta() {
    for seed in seeds(20) {
        let mut machine = Machine::new(seed, 2, SIZE);
        machine.start();
        write_and_flush(&machine);
        machine.fail(1).unwrap();
        write_and_flush(&machine);
        let (mirror, disk) = (machine.mirror(), machine.disks[1].clone());
        let answer = std::rc::Rc::new(std::cell::RefCell::new(None));
        let answered = answer.clone();
        machine.world.spawn_task(async move {
            let back = mirror.re_add(path(1), disk, Return::DELTA).await;
            answered.replace(Some(back));
        });
        let disk = machine.disks[1].clone();
        let in_round = || disk.is_under_way(COPY_A_OFFSET, 8192);
        assert!(machine.world.run(1_000_000, in_round));
        disk.set_faults(gone());
        assert!(machine.world.run(1_000_000, || answer.borrow().is_some()));
        let answer = answer.take().unwrap().unwrap_err();
        assert_eq!(answer.kind, ErrorKind::Failed);
        assert!(answer.message.contains("while it joined"), "{answer}");
        write_and_flush(&machine);
        assert_eq!(states(&machine)[1], MemberState::Faulty, "seed {seed}");
        disk.set_faults(none());
        machine.world.run(3000, || false);
        let back = machine.re_add(1).unwrap();
        assert!(back.contains("delta"), "{back}");
        machine.wait_in_sync();
        machine.check_all("after the second join");
        machine.compare_members();
        machine.stop().unwrap();
    }
}

/// The join's round fails on the only in-sync member: the joiner has not joined, is not written
/// to, and comes back when the round can be recorded.
#[test]
fn a_join_that_cannot_be_recorded_is_none() {
    for seed in seeds(20) {
        let mut machine = Machine::new(seed, 2, SIZE);
        machine.start();
        write_and_flush(&machine);
        machine.fail(1).unwrap();
        write_and_flush(&machine);
        let (mirror, disk) = (machine.mirror(), machine.disks[1].clone());
        let answer = std::rc::Rc::new(std::cell::RefCell::new(None));
        let answered = answer.clone();
        machine.world.spawn_task(async move {
            let back = mirror.re_add(path(1), disk, Return::DELTA).await;
            answered.replace(Some(back));
        });
        let first = machine.disks[0].clone();
        let joining = || first.is_under_way(COPY_A_OFFSET, 8192);
        assert!(machine.world.run(1_000_000, joining));
        first.set_faults(Faults {
            writes: true,
            ..none()
        });
        assert!(machine.world.run(1_000_000, || answer.borrow().is_some()));
        let answer = answer.take().unwrap();
        first.set_faults(none());
        let error = answer.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Failed, "{error}");
        let state = states(&machine)[1];
        assert_ne!(state, MemberState::Resyncing, "seed {seed}: {error}");
        seconds(&machine, 3);
        machine.re_add(1).unwrap();
        machine.wait_in_sync();
        machine.check_all("after the second join");
        machine.compare_members();
    }
}

/// A full resync of a former member is cut off before its maps are whole: it is not taken for
/// one that returns by delta.
#[test]
fn a_full_resync_that_was_cut_off_is_no_delta() {
    for cut in 0..60 {
        let mut machine = Machine::new(cut, 2, SIZE);
        machine.start();
        for extent in 0..4 {
            wr(&machine, extent << 22, 65536);
        }
        machine.stop().unwrap();
        // Each goes on alone: a split brain, which the operator ends by a full resync.
        machine.start_on(&[1], true).unwrap();
        let (client, world) = (machine.client(), machine.world.clone());
        world.block_on(async move {
            let other = client.mirror.clone();
            let span = mirror::Span {
                buffer: mirror::Host::allocate(&mirror::sim::SimHost(client.world.clone()), 4096),
                start: 0,
                len: 4096,
            };
            other.write(8192, span, true).await.unwrap();
        });
        machine.stop().unwrap();
        machine.start_on(&[0], true).unwrap();
        wr(&machine, 65536, 4096);
        fl(&machine);
        let refused = machine.re_add(1).unwrap_err();
        assert_eq!(refused.kind, ErrorKind::Refused, "{refused}");
        assert!(refused.message.contains("split brain"), "{refused}");
        let (mirror, disk) = (machine.mirror(), machine.disks[1].clone());
        machine.world.spawn_task(async move {
            let _ = mirror.re_add(path(1), disk, Return::FULL).await;
        });
        let begun = machine.disks[1].operations();
        let disk = machine.disks[1].clone();
        machine
            .world
            .run(1_000_000, || disk.operations() >= begun + 4 + cut / 2);
        if cut % 2 == 0 {
            machine.cut_power_choosing(&mut drop_all);
        } else {
            machine.cut_power();
        }
        // One copy of it is whole at every moment.
        assert!(
            superblock_on(&machine.disks[1]).is_some(),
            "cut after {cut}"
        );
        machine.start_on(&[0], true).unwrap();
        if machine.re_add(1).is_err() {
            machine
                .re_add_disk(path(1), machine.disks[1].clone(), true)
                .unwrap();
        }
        machine.wait_in_sync();
        machine.check_all(&format!("cut after {cut}"));
        machine.compare_members();
    }
}

/// One resync at a time; afterwards the next one may come.
#[test]
fn while_one_resyncs_no_other_joins() {
    let mut machine = Machine::new(1, 3, SIZE);
    machine.start();
    for extent in 0..8 {
        wr(&machine, extent << 22, 1 << 20);
    }
    machine.fail(1).unwrap();
    machine.fail(2).unwrap();
    for extent in 0..8 {
        wr(&machine, extent << 22, 1 << 20);
    }
    machine.re_add(1).unwrap();
    assert_eq!(states(&machine)[1], MemberState::Resyncing);
    let busy = machine.re_add(2).unwrap_err();
    assert_eq!(busy.kind, ErrorKind::Busy, "{busy}");
    let busy = machine.add_new("new").unwrap_err();
    assert_eq!(busy.kind, ErrorKind::Busy, "{busy}");
    let mirror = machine.mirror();
    let in_sync = || mirror.status().members[1].state == MemberState::InSync;
    assert!(machine.run_coarsely(in_sync));
    machine.re_add(2).unwrap();
    machine.wait_in_sync();
    machine.compare_members();
}

/// A new disk takes the slot of the member that is gone, and only a disk that fits.
#[test]
fn a_new_disk_has_to_fit_and_takes_the_slot_that_is_free() {
    let mut machine = Machine::new(1, 3, SIZE);
    machine.start();
    wr(&machine, 0, 1 << 20);
    let full = machine.add_new("new").unwrap_err();
    assert!(full.message.contains("every slot"), "{full}");
    machine.fail(2).unwrap();
    let need = superblock_on(&machine.disks[0])
        .unwrap()
        .layout
        .member_bytes();
    let add = |size: u64, path: &str, dry_run: bool| {
        let (mirror, disk) = (machine.mirror(), SimDisk::new(size, GARBAGE));
        machine.world.connect(&disk);
        let (path, given) = (path.to_owned(), disk.clone());
        let added = machine
            .world
            .block_on(async move { mirror.add(path, given, false, dry_run).await });
        (disk, added)
    };
    let small = add(need - 4096, "new", false).1.unwrap_err();
    assert_eq!(small.kind, ErrorKind::Refused, "{small}");
    assert!(small.message.contains("use a larger device"), "{small}");
    let taken = add(need, &path(1), false).1.unwrap_err();
    assert!(taken.message.contains("in service already"), "{taken}");
    let (disk, said) = add(need, "new", true);
    let said = said.unwrap();
    assert!(said.contains("slot 2"), "{said}");
    assert!(superblock_on(&disk).is_none(), "only said");
    assert_eq!(states(&machine)[2], MemberState::Faulty);
    let (disk, added) = add(need, "new", false);
    let added = added.unwrap();
    assert!(added.contains("slot 2"), "{added}");
    machine.disks[2] = disk;
    machine.wait_in_sync();
    machine.compare_members();
    // It is one of this mirror now: not to be overwritten by mistake.
    machine.fail(2).unwrap();
    let mirror = machine.mirror();
    let disk = machine.disks[2].clone();
    let again = machine
        .world
        .block_on(async move { mirror.add("again".into(), disk, false, false).await });
    let again = again.unwrap_err();
    assert!(
        again.message.contains("is a member of the mirror 'm'"),
        "{again}"
    );
}

/// What `--dry-run` says is what would be done, and nothing is done.
#[test]
fn a_dry_run_only_says() {
    let mut machine = Machine::new(1, 2, SIZE);
    machine.start();
    write_and_flush(&machine);
    machine.fail(1).unwrap();
    write_and_flush(&machine);
    let (mirror, disk) = (machine.mirror(), machine.disks[1].clone());
    let dry = Return {
        dry_run: true,
        ..Return::FULL
    };
    let said = machine
        .world
        .block_on(async move { mirror.re_add(path(1), disk, dry).await })
        .unwrap();
    assert!(said.contains("by delta resync"), "{said}");
    assert_eq!(states(&machine)[1], MemberState::Faulty);
    machine.re_add(1).unwrap();
    machine.wait_in_sync();
    let (mirror, member) = (machine.mirror(), MemberRef::Path(path(0)));
    let message = machine
        .world
        .block_on(async move { mirror.remove(&member, false).await })
        .unwrap_err()
        .message;
    assert!(message.contains("fail` it first"), "{message}");
    let twice = machine.re_add(1).unwrap_err();
    assert!(twice.message.contains("in service already"), "{twice}");
    let otherwise = machine
        .re_add_disk("other".into(), machine.disks[1].clone(), true)
        .unwrap_err();
    assert!(
        otherwise.message.contains("a member in service"),
        "{otherwise}"
    );
}

/// The power goes again and again in the course of a join.
#[test]
fn a_join_that_is_cut_off_anywhere_is_a_join_or_none() {
    for cut in 0..160 {
        let mut machine = Machine::new(cut, 2, SIZE);
        machine.start();
        for extent in 0..4 {
            wr(&machine, extent << 22, 65536);
        }
        fl(&machine);
        if cut % 4 < 2 {
            machine.fail(1).unwrap();
        } else {
            // Its loss is recorded by a start without it, which does not know what it lacks.
            machine.kill_daemon();
            machine.start_on(&[0], true).unwrap();
            // Commits that it lacks.
            wr(&machine, 20 << 20, 4096);
            seconds(&machine, 3);
        }
        for extent in 0..4 {
            wr(&machine, (extent << 22) + 8192, 4096);
        }
        let (mirror, disk) = (machine.mirror(), machine.disks[1].clone());
        machine.world.spawn_task(async move {
            let _ = mirror.re_add(path(1), disk, Return::DELTA).await;
        });
        let begun = machine.operations();
        machine
            .world
            .run(1_000_000, || machine.operations() >= begun + 20 + cut / 2);
        if cut % 2 == 0 {
            machine.cut_power_choosing(&mut drop_all);
        } else {
            machine.cut_power();
        }
        machine.start();
        machine.check_all(&format!("cut {cut}"));
        // It comes back by itself if it had joined.
        seconds(&machine, 3);
        let state = states(&machine)[1];
        if !matches!(state, MemberState::InSync | MemberState::Resyncing) {
            let back = machine.re_add(1).unwrap();
            assert!(back.contains("delta"), "cut {cut}: {back}");
        }
        machine.wait_in_sync();
        machine.compare_members();
    }
}

/// A full resync of an older copy is cut off while its maps are written: they name a newer
/// position than it has come to, and it is an older copy all the same (R16).
#[test]
fn an_older_copy_stays_one_when_its_full_resync_is_cut_off() {
    let mut looks_newer = 0;
    for cut in 0..80 {
        let mut machine = Machine::new(cut, 2, SIZE);
        machine.start();
        write_and_flush(&machine);
        seconds(&machine, 3);
        let image = machine.disks[1].image();
        for extent in 0..4 {
            wr(&machine, extent << 22, 65536);
            seconds(&machine, 2);
        }
        machine.fail(1).unwrap();
        machine.replace_disk(1, image);
        let older = position_on(&machine.disks[1]);
        let refused = machine.re_add(1).unwrap_err();
        assert!(refused.message.contains("older"), "{refused}");
        let (mirror, disk) = (machine.mirror(), machine.disks[1].clone());
        machine.world.spawn_task(async move {
            let _ = mirror.re_add(path(1), disk, Return::FULL).await;
        });
        let begun = machine.disks[1].operations();
        let disk = machine.disks[1].clone();
        machine
            .world
            .run(1_000_000, || disk.operations() >= begun + 4 + cut / 2);
        if cut % 2 == 0 {
            machine.cut_power_choosing(&mut drop_all);
        } else {
            machine.cut_power();
        }
        let joins = superblock_on(&machine.disks[0]).unwrap().slots[1].state;
        let newer = superblock_on(&machine.disks[1]).is_some()
            && position_on(&machine.disks[1]).sequence > older.sequence;
        machine.start_on(&[0], true).unwrap();
        if joins != SlotState::Resyncing {
            looks_newer += u64::from(newer);
            let refused = machine.re_add(1).unwrap_err();
            assert_eq!(refused.kind, ErrorKind::Refused, "cut {cut}: {refused}");
            let disk = machine.disks[1].clone();
            machine.re_add_disk(path(1), disk, true).unwrap();
        } else if machine.re_add(1).is_err() {
            let disk = machine.disks[1].clone();
            machine.re_add_disk(path(1), disk, true).unwrap();
        }
        machine.wait_in_sync();
        machine.check_all(&format!("cut {cut}"));
        machine.compare_members();
    }
    assert!(
        looks_newer > 5,
        "{looks_newer}: hardly one was cut off where it matters"
    );
}
