//! Named cases: one situation each, from every interleaving that a few seeds give.

use crate::machine::{GARBAGE, Machine, path};
use mirror::control::{MemberRef, MemberState};
use mirror::sim::Faults;

const SIZE: u64 = 64 << 20;
const SEEDS: u64 = 20;

fn write(machine: &Machine, offset: u64, len: usize) {
    let client = machine.client();
    machine
        .world
        .block_on(async move { client.write(offset, len, false).await.unwrap() });
}

fn flush(machine: &Machine) {
    let client = machine.client();
    machine
        .world
        .block_on(async move { client.flush().await.unwrap() });
}

fn read(machine: &Machine, offset: u64, len: usize) {
    let client = machine.client();
    machine
        .world
        .block_on(async move { client.read(offset, len).await.unwrap() });
}

fn state(machine: &Machine, slot: usize) -> MemberState {
    machine.mirror().status().members[slot].state
}

#[test]
fn unwritten_reads_as_zeroes_whatever_the_disks_held() {
    for seed in 0..SEEDS {
        let mut machine = Machine::new(seed, 2, SIZE);
        machine.start();
        read(&machine, 0, 1 << 20);
        write(&machine, 8192, 512);
        read(&machine, 0, 1 << 20);
        read(&machine, (4 << 20) - 4096, 8192);
    }
}

#[test]
fn a_clean_stop_keeps_everything() {
    for seed in 0..SEEDS {
        let mut machine = Machine::new(seed, 2, SIZE);
        machine.start();
        write(&machine, 4096, 65536);
        machine.stop().unwrap();
        machine.start();
        let extents = machine.mirror().status().extents;
        assert_eq!((extents.hot, extents.cool), (0, 1));
        machine.check_all("after a clean stop");
        machine.compare_members();
    }
}

#[test]
fn a_member_away_gets_only_the_changed_blocks() {
    for seed in 0..SEEDS {
        let mut machine = Machine::new(seed, 2, SIZE);
        machine.start();
        for extent in 0..8 {
            write(&machine, extent << 22, 1 << 20);
        }
        flush(&machine);
        machine.fail(1).unwrap();
        for extent in 0..8 {
            write(&machine, (extent << 22) + 8192, 4096);
        }
        machine.re_add(1).unwrap();
        machine.wait_in_sync();
        let resync = machine.mirror().status().last_resync.unwrap();
        assert_eq!(resync.copied_bytes, 8 * 4096, "exactly the changed blocks");
        machine.compare_members();
        machine.check_all("after a delta");
    }
}

#[test]
fn losing_a_member_under_writes_loses_nothing() {
    for seed in 0..SEEDS {
        let mut machine = Machine::new(seed, 2, SIZE);
        machine.start();
        write(&machine, 0, 1 << 20);
        for task in 0..4_u64 {
            let client = machine.client();
            machine.world.spawn_task(async move {
                for round in 0..10 {
                    client
                        .write((task * 10 + round) * 4096, 4096, false)
                        .await
                        .unwrap();
                }
            });
        }
        machine.world.run(seed * 7, || false);
        machine.disks[1].set_faults(Faults {
            writes: true,
            ..Faults::default()
        });
        let mirror = machine.mirror();
        machine
            .world
            .run(1_000_000, || mirror.status().io.writes == 41);
        write(&machine, 1 << 20, 4096);
        assert_eq!(state(&machine, 1), MemberState::Faulty);
        machine.disks[1].set_faults(Faults::default());
        machine.re_add(1).unwrap();
        machine.wait_in_sync();
        machine.check_all("after the return");
        machine.compare_members();
    }
}

#[test]
fn a_stalled_member_is_lost_and_its_buffer_is_not_reused() {
    for seed in 0..SEEDS {
        let mut machine = Machine::new(seed, 2, SIZE);
        machine.start();
        write(&machine, 0, 65536);
        machine.disks[0].set_faults(Faults {
            hang: true,
            ..Faults::default()
        });
        write(&machine, 4096, 4096);
        read(&machine, 0, 65536);
        assert_eq!(state(&machine, 0), MemberState::Faulty);
        let refused = machine.re_add(0).map(|_| ()).unwrap_err();
        assert!(refused.message.contains("owes answers"), "{refused}");
        machine.disks[0].set_faults(Faults::default());
        let mirror = machine.mirror();
        machine
            .world
            .run(100_000, || !mirror.status().members[0].attached);
        machine.re_add(0).unwrap();
        machine.wait_in_sync();
        machine.check_all("after the stall");
        machine.compare_members();
    }
}

#[test]
fn a_bad_sector_is_read_elsewhere_and_rewritten() {
    for seed in 0..SEEDS {
        let mut machine = Machine::new(seed, 2, SIZE);
        machine.start();
        write(&machine, 0, 65536);
        flush(&machine);
        let at = machine.data_offset + 8192;
        for disk in &machine.disks[..1] {
            disk.spoil(at);
        }
        for _ in 0..8 {
            read(&machine, 8192, 4096);
        }
        let disk = machine.disks[0].clone();
        assert!(
            machine.world.run(100_000, || !disk.is_spoilt(at)),
            "rewritten"
        );
        assert_eq!(state(&machine, 0), MemberState::InSync);
        machine.compare_members();
    }
}

#[test]
fn the_last_member_is_never_dropped() {
    for seed in 0..SEEDS {
        let mut machine = Machine::new(seed, 2, SIZE);
        machine.start();
        write(&machine, 0, 4096);
        machine.fail(1).unwrap();
        let refused = machine.fail(0).unwrap_err();
        assert!(refused.message.contains("last in-sync"), "{refused}");
        machine.disks[0].set_faults(Faults {
            writes: true,
            ..Faults::default()
        });
        let client = machine.client();
        let result = machine
            .world
            .block_on(async move { client.write(0, 4096, false).await });
        assert!(result.is_err());
        assert_eq!(state(&machine, 0), MemberState::InSync);
        machine.disks[0].set_faults(Faults::default());
        write(&machine, 0, 4096);
        read(&machine, 0, 4096);
    }
}

#[test]
fn a_fault_that_all_share_drops_nobody() {
    for seed in 0..SEEDS {
        let mut machine = Machine::new(seed, 3, SIZE);
        machine.start();
        write(&machine, 0, 65536);
        flush(&machine);
        for disk in &machine.disks {
            disk.set_faults(Faults {
                writes: true,
                ..Faults::default()
            });
        }
        let client = machine.client();
        let result = machine
            .world
            .block_on(async move { client.write(4096, 8192, false).await });
        assert!(result.is_err());
        for disk in &machine.disks {
            disk.set_faults(Faults::default());
        }
        for slot in 0..3 {
            assert_eq!(state(&machine, slot), MemberState::InSync);
        }
        read(&machine, 0, 65536);
        let mirror = machine.mirror();
        assert!(
            machine
                .world
                .run(1_000_000, || mirror.status().extents.unequalised_blocks
                    == 0)
        );
        machine.compare_members();
    }
}

#[test]
fn a_flush_that_fails_everywhere_is_never_forgotten() {
    for seed in 0..SEEDS {
        let mut machine = Machine::new(seed, 2, SIZE);
        machine.start();
        write(&machine, 0, 8192);
        for disk in &machine.disks {
            disk.set_faults(Faults {
                flushes: true,
                ..Faults::default()
            });
        }
        let client = machine.client();
        assert!(
            machine
                .world
                .block_on(async move { client.flush().await })
                .is_err()
        );
        for disk in &machine.disks {
            disk.set_faults(Faults::default());
        }
        let client = machine.client();
        assert!(
            machine
                .world
                .block_on(async move { client.flush().await })
                .is_err()
        );
        machine.kill_daemon();
        machine.start();
        assert!(machine.mirror().status().flush_error, "across restarts");
        let client = machine.client();
        assert!(
            machine
                .world
                .block_on(async move { client.write(0, 512, true).await })
                .is_err()
        );
    }
}

#[test]
fn rewriting_the_blocks_of_a_failed_flush_lifts_it() {
    let mut machine = Machine::new(1, 2, SIZE);
    machine.start();
    write(&machine, 0, 8192);
    for disk in &machine.disks {
        disk.set_faults(Faults {
            flushes: true,
            ..Faults::default()
        });
    }
    let client = machine.client();
    assert!(
        machine
            .world
            .block_on(async move { client.flush().await })
            .is_err()
    );
    for disk in &machine.disks {
        disk.set_faults(Faults::default());
    }
    write(&machine, 0, 8192);
    flush(&machine);
    assert!(!machine.mirror().status().flush_error);
}

#[test]
fn one_member_alone_does_not_start_unless_forced_and_then_wins() {
    for seed in 0..SEEDS {
        let mut machine = Machine::new(seed, 2, SIZE);
        machine.start();
        write(&machine, 0, 4096);
        machine.stop().unwrap();
        let refused = machine.start_on(&[1], false).unwrap_err();
        assert!(
            refused.to_string().contains("may hold newer data"),
            "{refused}"
        );
        machine.start_on(&[1], true).unwrap();
        write(&machine, 4096, 4096);
        machine.stop().unwrap();
        let refused = machine.start_on(&[0], false).unwrap_err();
        assert!(
            refused.to_string().contains("may hold newer data"),
            "{refused}"
        );
        machine.start();
        machine.wait_in_sync();
        machine.check_all("after the forced start");
        machine.compare_members();
    }
}

#[test]
fn two_members_that_went_on_alone_are_a_split_brain() {
    let mut machine = Machine::new(5, 2, SIZE);
    machine.start();
    write(&machine, 0, 4096);
    machine.stop().unwrap();
    machine.start_on(&[0], true).unwrap();
    machine.stop().unwrap();
    machine.start_on(&[1], true).unwrap();
    machine.stop().unwrap();
    let refused = machine.start_on(&[0, 1], false).unwrap_err();
    assert!(refused.to_string().contains("split brain"), "{refused}");
    machine.start_on(&[0], true).unwrap();
    let refused = machine.re_add(1).unwrap_err();
    assert!(refused.message.contains("split brain"), "{refused}");
    machine
        .re_add_disk(path(1), machine.disks[1].clone(), true)
        .unwrap();
    machine.wait_in_sync();
    machine.compare_members();
}

#[test]
fn an_older_image_of_a_member_is_not_believed() {
    for seed in 0..SEEDS {
        let mut machine = Machine::new(seed, 2, SIZE);
        machine.start();
        write(&machine, 0, 65536);
        machine.stop().unwrap();
        let backup = machine.disks[1].image();
        machine.start();
        for round in 0..6 {
            write(&machine, round << 22, 4096);
        }
        machine.stop().unwrap();
        machine.disks[1] = backup;
        machine.kill_daemon();
        machine.start();
        assert_ne!(state(&machine, 1), MemberState::InSync);
        machine.check_all("with a restored backup present");
        let refused = machine.re_add(1).unwrap_err();
        assert!(refused.message.contains("--full"), "{refused}");
        machine
            .re_add_disk(path(1), machine.disks[1].clone(), true)
            .unwrap();
        machine.wait_in_sync();
        machine.compare_members();
    }
}

#[test]
fn a_new_disk_gets_the_written_extents() {
    for seed in 0..SEEDS {
        let mut machine = Machine::new(seed, 2, SIZE);
        machine.start();
        write(&machine, 0, 1 << 20);
        write(&machine, 20 << 20, 4096);
        machine.fail(1).unwrap();
        let fresh = mirror::sim::SimDisk::new(128 << 20, 0x33);
        machine.world.connect(&fresh);
        machine.disks[1] = fresh.clone();
        let mirror = machine.mirror();
        machine
            .world
            .block_on(async move { mirror.add(path(1), fresh, false, false).await })
            .unwrap();
        machine.wait_in_sync();
        let resync = machine.mirror().status().last_resync.unwrap();
        assert_eq!(
            resync.copied_bytes + resync.zeroed_bytes,
            8 << 20,
            "two extents"
        );
        machine.compare_members();
        write(&machine, 40 << 20, 4096);
        machine.compare_members();
        machine.fail(0).unwrap();
        read(&machine, 40 << 20, 1 << 20);
        machine.check_all("from the new disk alone");
    }
}

#[test]
fn discarded_extents_read_as_zeroes_before_and_after_crashes() {
    for seed in 0..SEEDS {
        let mut machine = Machine::new(seed, 2, SIZE);
        machine.start();
        write(&machine, 4 << 20, 1 << 20);
        let client = machine.client();
        machine
            .world
            .block_on(async move { client.discard_extent(1).await.unwrap() });
        read(&machine, 4 << 20, 1 << 20);
        machine.cut_power();
        machine.start();
        machine.check_all("after a discard and a power cut");
        write(&machine, (4 << 20) + 4096, 4096);
        machine.check_all("written again after a discard");
        machine.compare_members();
    }
}

#[test]
fn a_sequential_writer_finds_extents_zeroed() {
    let mut machine = Machine::new(1, 2, SIZE);
    for disk in &machine.disks {
        disk.alter(|it| it.cheap_zeroes = false);
    }
    machine.start();
    for extent in 0..12 {
        for part in 0..4 {
            write(&machine, (extent << 22) + (part << 20), 1 << 20);
        }
    }
    let io = machine.mirror().status().io;
    assert!(io.extents_zeroed_ahead >= 4, "{io:?}");
    machine.check_all("in the end");
    machine.compare_members();
}

/// With little memory for hot extents they cool early, but not under a repair that is still being
/// written (the rules look at every one that cools).
#[test]
fn an_extent_does_not_cool_under_a_repair() {
    // These seeds have little memory.
    for seed in (3..400).step_by(4) {
        let mut machine = Machine::new(seed, 2, SIZE);
        machine.start();
        write(&machine, 0, 65536);
        let bad = (seed / 4 % 2) as usize;
        machine.disks[bad].spoil(machine.data_offset + 8192);
        let flusher = machine.client();
        machine
            .world
            .block_on(async move { flusher.flush().await.unwrap() });
        for extent in 1..8 {
            let (reader, writer) = (machine.client(), machine.client());
            machine
                .world
                .spawn_task(async move { reader.read(0, 65536).await.unwrap() });
            machine.world.run(seed % 23, || false);
            machine
                .world
                .spawn_task(async move { writer.write(extent << 22, 4096, false).await.unwrap() });
        }
        machine.world.run(5000, || false);
        machine.check_all(&format!("seed {seed}"));
        machine.compare_members();
    }
}

/// What has been zeroed ahead on a disk is not zero on the one that takes its slot.
#[test]
fn a_new_disk_is_not_zeroed_ahead_like_the_old_one() {
    for seed in 0..4 {
        let mut machine = Machine::new(seed, 2, SIZE);
        for disk in &machine.disks {
            disk.alter(|it| it.cheap_zeroes = false);
        }
        machine.start();
        write(&machine, 0, 4096);
        let mirror = machine.mirror();
        let zeroed = || mirror.status().io.extents_zeroed_ahead == (SIZE >> 22) - 1;
        assert!(machine.world.run(10_000_000, zeroed), "nothing is ahead");
        machine.fail(1).unwrap();
        machine.add_new("new").unwrap();
        machine.disks[1].alter(|it| it.cheap_zeroes = false);
        machine.wait_in_sync();
        write(&machine, 7 << 22, 4096);
        // Only the new disk is left to be read from.
        machine.fail(0).unwrap();
        for _ in 0..4 {
            read(&machine, 7 << 22, 1 << 20);
        }
        machine.check_all("in the end");
    }
}

#[test]
fn extents_are_zeroed_in_idle_time() {
    for seed in 0..3 {
        let mut machine = Machine::new(seed, 2, SIZE);
        for disk in &machine.disks {
            disk.alter(|it| it.cheap_zeroes = false);
        }
        machine.start();
        for extent in [0, 5, 10] {
            write(&machine, extent << 22, 4096);
        }
        let zeroed_first = machine.mirror().status().io.extents_zeroed;
        assert_eq!(zeroed_first, 3, "one at a time, while nothing is ahead");
        // Idle: the other extents are zeroed.
        let mirror = machine.mirror();
        let zeroed = || mirror.status().io.extents_zeroed_ahead == (SIZE >> 22) - 3;
        assert!(machine.world.run(10_000_000, zeroed), "nothing is ahead");
        write(&machine, 14 << 22, 4096);
        let io = machine.mirror().status().io;
        assert_eq!(
            io.extents_zeroed, zeroed_first,
            "the first write pays no zeroing"
        );
        read(&machine, 14 << 22, 1 << 20);
        // What a member that was away holds is not known any more: zeroed again, before the
        // write or with it.
        let times = || {
            let io = machine.mirror().status().io;
            io.extents_zeroed + io.extents_zeroed_ahead
        };
        let before = times();
        machine.fail(1).unwrap();
        machine.disks[1].write_now(machine.data_offset + (15 << 22), &[GARBAGE; 4096]);
        machine.re_add(1).unwrap();
        machine.wait_in_sync();
        write(&machine, (15 << 22) + 8192, 4096);
        assert!(times() > before, "the member that was away was spared");
        read(&machine, 15 << 22, 1 << 20);
        machine.check_all("in the end");
        machine.compare_members();
    }
}

/// A member that could come back by itself stays out when the operator fails it first, now and
/// at the next start.
#[test]
fn a_member_failed_while_it_is_away_stays_out() {
    for seed in 0..20 {
        let mut machine = Machine::new(seed, 2, SIZE);
        machine.start();
        write(&machine, 0, 4096);
        let mirror = machine.mirror();
        let removed = async move { mirror.remove(&MemberRef::Slot(1), true).await.unwrap() };
        machine.world.block_on(removed);
        machine.stop().unwrap();
        machine.start();
        machine.fail(1).unwrap();
        for life in 0..2 {
            machine.world.run(5000, || false);
            assert_eq!(
                state(&machine, 1),
                MemberState::Faulty,
                "seed {seed}, life {life}"
            );
            machine.stop().unwrap();
            machine.start();
        }
    }
}
