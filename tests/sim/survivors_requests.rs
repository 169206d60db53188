//! Requests at the edges: write-zeroes and discards of odd ranges, reads of what is bad here and
//! there, members that are slow but not too slow.

use crate::machine::{Machine, superblock_on};
use crate::older_images::{seconds, states};
use crate::races::{fl, none, seeds, wr};
use mirror::control::MemberState;
use mirror::sim::{Faults, SimHost};
use mirror::{Errno, Host as _};
use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

/// The last extent is short, and ends within a block.
const SIZE: u64 = (60 << 20) + (1 << 20) + 512;
const MIB: u64 = 1 << 20;

/// A mirror with data in these ranges (start, end), durably.
fn written(seed: u64, members: usize, ranges: &[(u64, u64)]) -> Machine {
    let mut machine = Machine::new(seed, members, SIZE);
    machine.start();
    for &(start, end) in ranges {
        let mut at = start;
        while at < end {
            let len = (end - at).min(MIB);
            wr(&machine, at, len as usize);
            at += len;
        }
    }
    fl(&machine);
    machine
}

fn write_zeroes(machine: &Machine, range: Range<u64>, fua: bool) {
    let client = machine.client();
    let zeroes = async move {
        let len = range.end - range.start;
        client.write_zeroes(range.start, len, fua).await.unwrap();
    };
    machine.world.block_on(zeroes);
}

/// What a disk holds now, from the beginning of the device on.
fn on_disk(machine: &Machine, slot: usize, range: Range<u64>) -> Vec<u8> {
    let mut bytes = vec![0; (range.end - range.start) as usize];
    machine.disks[slot].read_now(machine.data_offset + range.start, &mut bytes);
    bytes
}

/// Where extents that are zeroed as a whole begin and end, for each range.
#[test]
fn zeroes_of_any_range_are_zeroes_there_and_nowhere_else() {
    let four = 4 * MIB;
    for (range, whole) in [
        // Parts of one extent, of more than one piece.
        (512..1024, 0..0),
        (4096..3 * MIB + 512, 0..0),
        (2 * MIB..four, 0..0),
        (four..five(), 0..0),
        // Parts of two with no whole one between.
        (3 * MIB..five(), 0..0),
        // With whole ones: one, two, and with parts before and after.
        (four..2 * four, four..2 * four),
        (four..3 * four, four..3 * four),
        (MIB + 512..2 * four, four..2 * four),
        (four..2 * four + 1536, four..2 * four),
        (MIB..3 * four + 4096, four..3 * four),
        // To the end of the device, whose last extent is short.
        (60 * MIB..SIZE, 60 * MIB..SIZE),
        (58 * MIB..SIZE, 60 * MIB..SIZE),
        (60 * MIB..SIZE - 512, 0..0),
        (0..SIZE, 0..SIZE),
    ] {
        let mut machine = written(0, 2, &[(0, 14 * MIB), (56 * MIB, SIZE)]);
        write_zeroes(&machine, range.clone(), true);
        for extent in (0..14 * MIB).step_by(4 << 20).chain([56 * MIB, 60 * MIB]) {
            let zeroes = machine.mirror().reads_as_zeroes(extent);
            assert_eq!(zeroes, whole.contains(&extent), "{range:?} at {extent}");
        }
        machine.check_all(&format!("{range:?}"));
        let client = machine.client();
        machine.world.block_on(async move {
            let mut at = 0;
            while at < SIZE {
                let len = (SIZE - at).min(MIB);
                client.read(at, len as usize).await.unwrap();
                at += len;
            }
        });
        machine.cut_power_choosing(&mut |ways| ways - 1);
        machine.start();
        machine.check_all(&format!("{range:?} after a power cut"));
        machine.compare_members();
    }
}

fn five() -> u64 {
    5 * MIB
}

/// Zeroes over what reads as zeroes leave the disks alone.
#[test]
fn zeroes_over_nothing_write_nothing() {
    let machine = written(0, 2, &[(0, MIB)]);
    let before = machine.mirror().status();
    write_zeroes(&machine, 9 * MIB..23 * MIB, true);
    let after = machine.mirror().status();
    assert_eq!(after.extents, before.extents);
    assert_eq!(after.io.extents_zeroed, before.io.extents_zeroed);
    assert_eq!(after.io.discards, before.io.discards + 1);
}

/// A discard reaches each disk, and there the whole extents of its range only.
#[test]
fn a_discard_tells_every_disk_of_whole_extents() {
    for range in [4 * MIB..8 * MIB, 3 * MIB..9 * MIB, 56 * MIB..SIZE] {
        let machine = written(0, 2, &[(0, 12 * MIB), (52 * MIB, SIZE)]);
        let all = 0..SIZE;
        let before: Vec<_> = (0..2)
            .map(|slot| on_disk(&machine, slot, all.clone()))
            .collect();
        let (mirror, discarded) = (machine.mirror(), range.clone());
        machine.world.block_on(async move {
            let len = discarded.end - discarded.start;
            mirror.discard(discarded.start, len).await.unwrap();
        });
        let start = range.start.next_multiple_of(4 << 20);
        let end = if range.end == SIZE { SIZE } else { 8 * MIB };
        for (slot, mut expected) in before.into_iter().enumerate() {
            // What the simulated disk shows of what it was told to forget.
            expected[start as usize..end as usize].fill(0xd5);
            assert!(
                on_disk(&machine, slot, all.clone()) == expected,
                "{range:?}"
            );
            assert_eq!(states(&machine)[slot], MemberState::InSync);
        }
        assert!(machine.mirror().reads_as_zeroes(start));
        assert!(machine.mirror().reads_as_zeroes(end - 512));
    }
}

/// A disk that does not answer a discard is lost for the stall; one more error is none.
#[test]
fn a_discard_without_an_answer_is_a_stall() {
    let machine = written(0, 2, &[(0, 12 * MIB)]);
    let hang = Rc::new(RefCell::new(false));
    let (client, done) = (machine.client(), hang.clone());
    machine.world.spawn_task(async move {
        client.mirror.discard(4 << 20, 4 << 20).await.unwrap();
        done.replace(true);
    });
    let disk = machine.disks[1].clone();
    let at = machine.data_offset + (4 << 20);
    assert!(machine.world.run(100_000, || disk.is_under_way(at, 4096)));
    disk.set_faults(Faults {
        hang: true,
        ..none()
    });
    assert!(machine.run_coarsely(|| *hang.borrow()));
    assert_eq!(states(&machine)[1], MemberState::Faulty);
    let reason = machine.mirror().status().members[1].reason.clone();
    assert!(reason.unwrap().contains("a discard got no answer"));
}

/// A discard that cannot be recorded is none: what was there is there, also for a member that
/// was away, and it is equal on all.
#[test]
fn a_discard_that_is_not_recorded_leaves_the_data() {
    for seed in seeds(10) {
        let mut machine = written(seed, 3, &[(0, 12 * MIB)]);
        machine.fail(2).unwrap();
        for disk in &machine.disks {
            disk.set_faults(Faults {
                writes: true,
                ..none()
            });
        }
        let mirror = machine.mirror();
        let result = machine
            .world
            .block_on(async move { mirror.discard(4 << 20, 4 << 20).await });
        assert_eq!(result, Err(Errno::IO));
        assert_eq!(machine.mirror().status().io.errors, 1);
        for disk in &machine.disks {
            disk.set_faults(none());
        }
        assert!(!machine.mirror().reads_as_zeroes(4 << 20));
        machine.check_all(&format!("seed {seed}"));
        seconds(&machine, 3);
        let missed = machine.mirror().status().members[2].missed_bytes;
        assert!(missed >= 4 << 20, "seed {seed}: {missed} bytes");
        wr(&machine, (4 << 20) + 8192, 4096);
        if seed % 2 == 0 {
            machine.cut_power_choosing(&mut |ways| ways - 1);
            machine.start();
        }
        machine.check_all(&format!("seed {seed}, in the end"));
        crate::play::bring_all_back(&mut machine);
        machine.compare_members();
    }
}

/// Sectors that are bad on one member are read from the other one, however they lie, and are
/// rewritten; what is bad on both is an error, of those sectors only.
#[test]
fn what_is_bad_here_is_read_there() {
    for (first, second, common) in [
        (vec![3], vec![], None),
        (vec![3, 1000], vec![900], None),
        (vec![0, 255, 1023], vec![1, 254, 512, 1022], None),
        (vec![5, 6, 7, 700], vec![4, 8, 699, 701], None),
        (vec![5, 44], vec![44, 9], Some(44)),
    ] {
        let mut machine = written(0, 2, &[(0, 3 * MIB)]);
        let begin = MIB + 8 * 512;
        let sector = |sector: u64| machine.data_offset + begin + sector * 512;
        for (disk, bad) in machine.disks.iter().zip([&first, &second]) {
            bad.iter().for_each(|&bad| disk.spoil(sector(bad)));
        }
        // Until no commit is under way.
        seconds(&machine, 3);
        let client = machine.client();
        let read = machine
            .world
            .block_on(async move { client.read(begin, 1024 * 512).await });
        assert_eq!(read, common.map_or(Ok(()), |_| Err(Errno::IO)));
        if let Some(common) = common {
            let client = machine.client();
            machine.world.block_on(async move {
                let before = (common * 512) as usize;
                client.read(begin, before).await.unwrap();
                let after = begin + (common + 1) * 512;
                client.read(after, 512 * 600).await.unwrap();
                let bad = client.read(begin + common * 512, 512).await;
                assert_eq!(bad, Err(Errno::IO));
            });
        }
        seconds(&machine, 2);
        // An idle mirror asks the first member first, so what is bad there is noticed.
        for &bad in first.iter().filter(|&&bad| Some(bad) != common) {
            assert!(
                !machine.disks[0].is_spoilt(sector(bad)),
                "sector {bad} is not rewritten"
            );
        }
        assert_eq!(states(&machine), [MemberState::InSync; 2]);
        if common.is_none() {
            machine.check_all("in the end");
            machine.compare_members();
        }
    }
}

/// However busy it is, the member of this machine is asked, and the one behind the network only
/// for what that one cannot say.
#[test]
fn reads_do_not_travel() {
    for far in [0, 1] {
        let mut machine = Machine::new(0, 2, SIZE);
        machine.disks[far].alter(|it| it.behind_network = true);
        machine.start();
        (0..4).for_each(|at| wr(&machine, at * MIB, MIB as usize));
        fl(&machine);
        seconds(&machine, 30);
        let before = machine.disks[far].operations();
        for at in 0..64 {
            let client = machine.client();
            let read = async move { client.read(at * 65536, 65536).await.unwrap() };
            machine.world.spawn_task(read);
        }
        seconds(&machine, 1);
        assert_eq!(
            machine.disks[far].operations(),
            before,
            "slot {far} was asked"
        );
        machine.disks[1 - far].spoil(machine.data_offset + MIB);
        let client = machine.client();
        let read = machine
            .world
            .block_on(async move { client.read(MIB, 4096).await });
        assert_eq!(read, Ok(()));
        assert!(
            machine.disks[far].operations() > before,
            "slot {far} was not asked"
        );
    }
}

/// A repair of more than one piece, that ends in the short block at the end of the device.
#[test]
fn one_bad_sector_of_a_large_read_is_one_block() {
    let mut machine = written(0, 2, &[(57 * MIB, SIZE)]);
    let at = machine.data_offset + SIZE - 512;
    // An idle mirror asks the first member first.
    machine.disks[0].spoil(at);
    let client = machine.client();
    machine.world.block_on(async move {
        let len = 2 * MIB + 512 + 4096;
        client.read(SIZE - len, len as usize).await.unwrap();
    });
    seconds(&machine, 1);
    assert!(!machine.disks[0].is_spoilt(at));
    let member = machine.mirror().status().members[0].clone();
    // The read, and the second look.
    assert_eq!(member.read_errors, 2);
    assert_eq!(
        member.repaired_blocks, 1,
        "what could be read stays as it is"
    );
    machine.check_all("in the end");
    machine.compare_members();
}

/// A member is not lost for an answer that comes within the deadline of five seconds, and it is
/// soon after, whether it is a write, a flush, a read or a commit that waits.
#[test]
fn only_after_the_deadline_is_a_member_lost() {
    for (millis, lost) in [(4900, false), (5800, true)] {
        for phase in 0..8 {
            for request in 0..3 {
                let machine = written(0, 2, &[(0, MIB)]);
                let host = SimHost(machine.world.clone());
                let wait = move |millis| host.sleep(Duration::from_millis(millis));
                machine.world.block_on(wait(phase * 85 + 3));
                for disk in &machine.disks[1..] {
                    disk.set_faults(Faults {
                        hang: true,
                        ..none()
                    });
                }
                let client = machine.client();
                machine.world.spawn_task(async move {
                    match request {
                        0 => client.write(0, 4096, false).await.unwrap(),
                        1 => client.flush().await.unwrap(),
                        _ => client.write(20 << 20, 4096, false).await.unwrap(),
                    }
                });
                machine.world.block_on(wait(millis));
                for disk in &machine.disks {
                    disk.set_faults(none());
                }
                machine.world.run(2000, || false);
                let is_lost = states(&machine)[1] != MemberState::InSync;
                assert_eq!(
                    is_lost, lost,
                    "request {request}, {millis} ms, phase {phase}"
                );
            }
        }
    }
}

/// A range beyond the device or off the blocks is refused before anything is done.
#[test]
fn ranges_that_do_not_fit_are_refused() {
    let machine = written(0, 2, &[(0, MIB)]);
    let client = machine.client();
    let operations = machine.operations();
    machine.world.block_on(async move {
        let mirror = client.mirror.clone();
        let beyond = Err(Errno::NO_SPACE);
        assert_eq!(client.read(SIZE, 512).await, beyond);
        assert_eq!(mirror.discard(SIZE - 512, 1024).await, beyond);
        assert_eq!(mirror.write_zeroes(0, SIZE + 512, false).await, beyond);
        let odd = Err(Errno::INVALID);
        assert_eq!(mirror.discard(u64::MAX - 511, 1024).await, odd);
        assert_eq!(mirror.write_zeroes(256, 512, false).await, odd);
        assert_eq!(mirror.write_zeroes(512, 256, false).await, odd);
        assert_eq!(mirror.discard(0, 0).await, Ok(()));
        assert_eq!(mirror.write_zeroes(SIZE, 0, true).await, Ok(()));
        assert_eq!(client.read(SIZE, 0).await, Ok(()));
    });
    assert_eq!(machine.operations(), operations);
    let superblock = superblock_on(&machine.disks[0]).unwrap();
    assert_eq!(superblock.layout.size_bytes, SIZE);
}
