//! Faults on every member at once, where the engine must neither drop anybody nor promise what
//! may be gone: while extents are zeroed, and while superblocks are written. Every one of these
//! failed once.

use crate::checksums::{self, COOL, check, rd, rot};
use crate::machine::Machine;
use crate::older_images::seconds;
use crate::races::{flushes, gone, none, seeds, wr};
use crate::rot::repairing;
use dirty_map::Extent;
use mirror::Errno;
use mirror::control::{MemberState, MemberStatus};
use mirror::sim::Faults;
use std::cell::Cell;
use std::rc::Rc;

const SIZE: u64 = 64 << 20;

/// A mirror on disks that cannot write zeroes by themselves.
fn plain_machine(seed: u64) -> Machine {
    let mut m = Machine::new(seed, 2, SIZE);
    for disk in &m.disks {
        disk.alter(|it| it.cheap_zeroes = false);
    }
    m.start();
    m
}

pub(crate) fn faults(m: &Machine, faults: Faults) {
    for disk in &m.disks {
        disk.set_faults(faults);
    }
}

/// The flush after zeroing an extent fails everywhere and drops what was written before: no
/// later FLUSH may answer well.
#[test]
fn a_flush_for_zeroes_that_fails_everywhere_is_a_failed_flush() {
    for seed in seeds(12) {
        let m = plain_machine(seed);
        wr(&m, 0, 65536);
        faults(&m, flushes());
        let c = m.client();
        let first = m
            .world
            .block_on(async move { c.write(20 << 20, 4096, false).await });
        assert!(first.is_err(), "seed {seed}");
        faults(&m, none());
        let c = m.client();
        let flushed = m.world.block_on(async move { c.flush().await });
        assert!(
            flushed.is_err(),
            "seed {seed}: what was dropped is promised"
        );
    }
}

/// Zeroes written ahead, a flush that fails everywhere and drops them, one that succeeds: the
/// extents are not ahead.
#[test]
fn zeroes_dropped_by_a_failed_flush_are_not_ahead() {
    for seed in seeds(12) {
        let mut m = plain_machine(seed);
        wr(&m, 0, 4096);
        // In the middle of zeroing in idle time.
        let mirror = m.mirror();
        let zeroing = || mirror.status().io.extents_zeroed_ahead >= seed % 3 * 4;
        assert!(m.world.run(10_000_000, zeroing));
        m.world.run(20 + seed * 11, || false);
        faults(&m, flushes());
        let c = m.client();
        let _: Result<(), Errno> = m.world.block_on(async move { c.flush().await });
        faults(&m, none());
        m.world.run(2000, || false);
        for extent in 1..16 {
            let c = m.client();
            let write = async move { c.write(extent << 22, 512, false).await };
            // It may have to be zeroed now, which an earlier failed flush refuses to promise.
            let _: Result<(), Errno> = m.world.block_on(write);
        }
        m.cut_power();
        m.start();
        let c = m.client();
        m.world.block_on(async move {
            for extent in 1..16_u64 {
                c.read((extent << 22) + 4096, 65536).await.unwrap();
            }
        });
    }
}

/// All members stall while an extent is zeroed: zeroes that arrive late must not strike what
/// was written meanwhile.
#[test]
fn late_zeroes_strike_no_later_write() {
    for seed in seeds(24) {
        let m = plain_machine(seed);
        wr(&m, 0, 4096);
        let hang = Faults {
            hang: true,
            ..none()
        };
        let c = m.client();
        // The first attempt meets the stall; an error is legal, wrong data never is.
        let first = async move {
            c.write(20 << 20, 4096, false).await.ok();
        };
        m.world.spawn_task(first);
        m.world.run(seed * 3, || false);
        faults(&m, hang);
        m.world.run(400, || false);
        faults(&m, none());
        let again = (5 + seed % 2) << 22;
        let c = m.client();
        let second = async move { c.write(again, 2 << 20, false).await };
        let _: Result<(), Errno> = m.world.block_on(second);
        m.world.run(3000, || false);
        let c = m.client();
        let read = async move { c.read(again, 2 << 20).await };
        let _: Result<(), Errno> = m.world.block_on(read);
    }
}

/// All members stall for longer than the deadline and then answer, one shortly after the other:
/// nobody is lost for it (R8).
#[test]
fn a_stall_of_all_members_loses_nobody() {
    for seed in seeds(40) {
        let mut machine = Machine::new(seed, 2 + (seed % 2) as usize, SIZE);
        machine.start();
        wr(&machine, 0, 65536);
        let hang = Faults {
            hang: true,
            ..none()
        };
        faults(&machine, hang);
        let written = Rc::new(Cell::new(0));
        for block in 0..4 {
            let (client, written) = (machine.client(), written.clone());
            machine.world.spawn_task(async move {
                client.write(block * 8192, 4096, false).await.unwrap();
                written.set(written.get() + 1);
            });
        }
        seconds(&machine, 20);
        faults(&machine, none());
        assert!(machine.world.run(1_000_000, || written.get() == 4));
        let status = machine.mirror().status();
        let lost = |m: &MemberStatus| m.state != MemberState::InSync;
        assert!(!status.members.iter().any(lost), "seed {seed}: {status:#?}");
    }
}

/// A flush fails everywhere while a round for something else is being written: it must be
/// recorded by the next round, not forgotten by this one.
#[test]
fn a_flush_that_fails_during_a_round_is_recorded() {
    for seed in seeds(60) {
        let mut m = Machine::new(seed, 3, SIZE);
        m.start();
        wr(&m, 0, 8192);
        let (c, flusher) = (m.client(), m.client());
        faults(&m, flushes());
        m.disks[2].set_faults(gone());
        m.world
            .spawn_task(async move { c.write(4096, 4096, false).await.unwrap() });
        m.world.run(seed, || false);
        let failed = m.world.block_on(async move { flusher.flush().await });
        faults(&m, none());
        let c = m.client();
        let again = m.world.block_on(async move { c.flush().await });
        assert!(failed.is_err() && again.is_err(), "seed {seed}: at once");
        m.kill_daemon();
        m.start();
        let c = m.client();
        let again = m.world.block_on(async move { c.flush().await });
        assert!(again.is_err(), "seed {seed}: over a restart");
    }
}

/// A write is under way while a flush fails everywhere, and a disk that has it already drops it:
/// a later flush that works again must not promise it.
#[test]
fn a_write_under_way_while_a_flush_fails_is_not_promised() {
    for seed in seeds(150) {
        let mut m = Machine::new(seed, 2, SIZE);
        m.start();
        wr(&m, 0, 8192);
        faults(&m, flushes());
        let (writer, flusher) = (m.client(), m.client());
        m.world
            .spawn_task(async move { writer.write(65536, 4096, false).await.unwrap() });
        m.world.run(seed % 50, || false);
        let failed = m.world.block_on(async move { flusher.flush().await });
        assert!(failed.is_err(), "seed {seed}");
        faults(&m, none());
        m.world.run(200, || false);
        // What was written before it is written anew, as an application that was told would.
        wr(&m, 0, 8192);
        let c = m.client();
        let _: Result<(), Errno> = m.world.block_on(async move { c.flush().await });
        m.cut_power();
        m.start();
        m.check_all(&format!("seed {seed}"));
    }
}

/// After the operator has cleared the error, a power cut leaves the members equal.
#[test]
fn what_a_failed_flush_covered_is_equal_after_the_error_is_cleared() {
    for seed in seeds(60) {
        let mut m = Machine::new(seed, 2 + (seed % 2) as usize, SIZE);
        m.start();
        wr(&m, 0, 65536);
        faults(&m, flushes());
        let c = m.client();
        let failed = m.world.block_on(async move { c.flush().await });
        assert!(failed.is_err(), "seed {seed}");
        faults(&m, none());
        if seed % 4 < 2 {
            m.kill_daemon();
            m.start();
        }
        let c = m.client();
        m.world.block_on(async move { c.clear_flush_error().await });
        m.stop().unwrap();
        m.cut_power();
        m.start();
        m.check_all(&format!("seed {seed}"));
        m.compare_members();
    }
}

/// A round that fails everywhere has reached one member; the next one, without it, must say
/// what it says under another event count (seed 8114 of the histories).
#[test]
fn a_round_after_one_that_failed_is_told_from_it() {
    for seed in seeds(160) {
        let m = plain_machine(seed);
        wr(&m, 0, 65536);
        faults(&m, flushes());
        let c = m.client();
        m.world
            .spawn_task(async move { assert!(c.flush().await.is_err(), "seed {seed}") });
        // Into the round that records it.
        m.world.run(seed / 2 % 40, || false);
        faults(&m, gone());
        m.world.run(3000, || false);
        m.disks[(seed % 2) as usize].set_faults(none());
        m.world.run(3000, || false);
        // The rules look at every superblock.
        let c = m.client();
        let written = async move { c.write(4096, 4096, false).await };
        let _: Result<(), Errno> = m.world.block_on(written);
    }
}

/// The same while pages of checksums and extents are read by a scrub, whose requests are as old as
/// each other.
#[test]
fn a_stall_of_all_members_under_a_scrub_loses_nobody() {
    for seed in seeds(40) {
        let mut machine = Machine::new(seed, 2 + (seed % 2) as usize, SIZE);
        machine.start();
        for extent in 0..4 {
            wr(&machine, extent << 22, 65536);
        }
        seconds(&machine, COOL);
        let hang = Faults {
            hang: true,
            ..none()
        };
        faults(&machine, hang);
        let checked = Rc::new(Cell::new(0));
        for extent in 0..4 {
            let (mirror, checked) = (machine.mirror(), checked.clone());
            machine.world.spawn_task(async move {
                let at_once = extent % 2 == 0;
                let found = mirror
                    .check_extent(Extent(extent), repairing(at_once))
                    .await;
                assert_eq!(found.unwrap().findings, 0);
                checked.set(checked.get() + 1);
            });
        }
        seconds(&machine, 20);
        faults(&machine, none());
        assert!(machine.world.run(1_000_000, || checked.get() == 4));
        let status = machine.mirror().status();
        let lost = |m: &MemberStatus| m.state != MemberState::InSync;
        assert!(!status.members.iter().any(lost), "seed {seed}: {status:#?}");
    }
}

/// One sector of a block is bad on one member, another on the other, in a few blocks of each MiB:
/// together they hold it, and a look at the whole extent finds that as well.
#[test]
fn blocks_bad_on_both_members_are_put_together_in_a_whole_extent() {
    for at_once in [false, true] {
        let mut machine = Machine::new(1, 2, SIZE);
        machine.start();
        wr(&machine, 0, 4 << 20);
        seconds(&machine, COOL);
        for block in (0..1024).step_by(100) {
            for (sector, disk) in machine.disks.iter().enumerate() {
                disk.spoil(machine.data_offset + block * 4096 + sector as u64 * 512);
            }
        }
        let mirror = machine.mirror();
        let check = async move { mirror.check_extent(Extent(0), repairing(at_once)).await };
        let checked = machine.world.block_on(check).unwrap();
        assert_eq!((checked.repaired, checked.damaged), (11, 0), "{checked:?}");
    }
}

/// A part of an extent that no member can read does not hide what is wrong in the others.
#[test]
fn a_part_that_cannot_be_read_does_not_hide_the_rest() {
    for at_once in [false, true] {
        let mut machine = Machine::with_checksums(1, 2, SIZE);
        machine.start();
        wr(&machine, 0, 4 << 20);
        seconds(&machine, COOL);
        // The second MiB of both, and a block of the third one of the first.
        for disk in &machine.disks {
            for sector in 2048..4096 {
                disk.spoil(machine.data_offset + sector * 512);
            }
        }
        crate::checksums::rot(&machine, 0, 600);
        let mirror = machine.mirror();
        let check = async move { mirror.check_extent(Extent(0), repairing(at_once)).await };
        let checked = machine.world.block_on(check).unwrap();
        assert!(checked.failed.is_some(), "{checked:?}");
        assert_eq!(checked.repaired, 1, "{checked:?}");
    }
}

/// A look that repairs nothing does not end damage either, though one copy has become right.
#[test]
fn only_a_repair_ends_damage() {
    let mut machine = Machine::with_checksums(1, 2, SIZE);
    machine.start();
    wr(&machine, 0, 65536);
    seconds(&machine, COOL);
    let right = crate::checksums::content(&machine, 0, 3);
    crate::checksums::rot(&machine, 0, 3);
    // In another way: of two that agree it would be the checksum that is wrong.
    crate::checksums::spoil(&machine, 1, 3 * 4096, |sector| sector[7] ^= 1);
    let check = |repair| crate::checksums::check(&machine, 0, repair);
    assert_eq!(check(true).damaged, 1);
    machine.disks[0].write_now(machine.data_offset + 3 * 4096, &right);
    check(false);
    let damaged = || machine.mirror().scrub_log().damaged_runs().len();
    assert_eq!(damaged(), 1);
    seconds(&machine, COOL);
    check(true);
    assert_eq!(damaged(), 0);
}

/// Nobody can read the rest of a block, and one copy of it has rotted: what is known of the block is
/// not given up for a part of it.
#[test]
fn a_part_of_a_block_that_nobody_can_read_is_not_written() {
    for seed in seeds(20) {
        let mut machine = checksums::machine(seed, 2);
        machine.start();
        wr(&machine, 0, 65536);
        seconds(&machine, COOL);
        rd(&machine, 0, 4096).unwrap();
        rot(&machine, (seed % 2) as usize, 3);
        let fault = if seed % 4 < 2 {
            Faults {
                hang: true,
                ..Faults::default()
            }
        } else {
            Faults {
                reads: true,
                ..Faults::default()
            }
        };
        faults(&machine, fault);
        let client = machine.client();
        let written = async move { client.write(3 * 4096 + 2048, 512, false).await };
        let done = Rc::new(Cell::new(false));
        let end = done.clone();
        machine.world.spawn_task(async move {
            _ = written.await;
            end.set(true);
        });
        seconds(&machine, 4);
        faults(&machine, Faults::default());
        machine.world.run(1_000_000, || done.get());
        let heard = rd(&machine, 3 * 4096, 4096);
        assert!(heard.is_ok() || fault.reads, "seed {seed}: {heard:?}");
        wr(&machine, 3 * 4096, 4096);
        seconds(&machine, COOL);
        check(&machine, 0, true);
        machine.compare_members();
        machine.check_all("after");
    }
}
