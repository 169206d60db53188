//! Failures that other mirrors have had, each as a test that this one does not have it.

use crate::double_faults::faults;
use crate::machine::Machine;
use crate::races::{gone, none, seeds, wr};
use mirror::control::MemberState;
use mirror::sim::Faults;
use mirror::{Errno, Host as _};
use std::cell::Cell;
use std::rc::Rc;

const SIZE: u64 = 64 << 20;

fn flush(machine: &Machine) -> Result<(), Errno> {
    let client = machine.client();
    machine.world.block_on(async move { client.flush().await })
}

/// ublkpp, 2026: a write is acknowledged before the superblock that says "degraded" is durable;
/// the power goes, the lost disk comes back first, and the write is missing. Here the watching
/// rules (R2) look at every answer, and the power is cut right at it.
#[test]
fn ublkpp_answer_before_the_degraded_superblock_is_durable() {
    for seed in seeds(40) {
        let mut machine = Machine::new(seed, 2, SIZE);
        machine.start();
        wr(&machine, 0, 65536);
        machine.disks[1].set_faults(gone());
        let answered = Rc::new(Cell::new(false));
        let (client, answer) = (machine.client(), answered.clone());
        machine.world.spawn_task(async move {
            client.write(4096, 4096, true).await.unwrap();
            answer.set(true);
        });
        assert!(machine.world.run(1_000_000, || answered.get()));
        machine.disks[1].set_faults(none());
        machine.cut_power();
        // The disk that was lost cannot start alone, and does not win when both are there.
        assert!(machine.start_on(&[1], false).is_err(), "seed {seed}");
        machine.start();
        machine.check_all(&format!("seed {seed}"));
    }
}

/// ublkpp, 2026: the clean stop is recorded while a write is failing, and the next start
/// believes that the copies are equal.
#[test]
fn ublkpp_clean_stop_beside_a_failing_write() {
    for seed in seeds(40) {
        let mut machine = Machine::new(seed, 2, SIZE);
        machine.start();
        wr(&machine, 0, 65536);
        let client = machine.client();
        machine
            .world
            .spawn_task(async move { _ = client.write(4096, 8192, false).await });
        machine.world.run(seed % 20, || false);
        machine.disks[1].set_faults(Faults {
            writes: true,
            ..none()
        });
        machine.world.run(seed % 7, || false);
        drop(machine.stop());
        machine.disks[1].set_faults(none());
        machine.start();
        machine.check_all(&format!("seed {seed}"));
        crate::play::bring_all_back(&mut machine);
        machine.compare_members();
    }
}

/// ublkpp, 2026: after an unclean stop two reads of one block disagree.
#[test]
fn ublkpp_reads_diverge_after_an_unclean_stop() {
    for seed in seeds(40) {
        let mut machine = Machine::new(seed, 2, SIZE);
        machine.start();
        wr(&machine, 0, 65536);
        let client = machine.client();
        machine
            .world
            .spawn_task(async move { _ = client.write(0, 65536, false).await });
        machine.world.run(10 + seed, || false);
        machine.cut_power();
        machine.start();
        let read = |machine: &Machine| {
            let client = machine.client();
            machine
                .world
                .block_on(async move { client.read_raw(0, 65536).await.unwrap() })
        };
        let first = read(&machine);
        for _ in 0..4 {
            assert!(read(&machine) == first, "seed {seed}");
        }
        // Nor when the one that was read from dies.
        machine.disks[(seed % 2) as usize].set_faults(gone());
        assert!(read(&machine) == first, "seed {seed}: after a loss");
    }
}

/// ublkpp, 2026: a stop in the middle of a resync leaves an array that cannot be assembled.
#[test]
fn ublkpp_stop_during_a_resync() {
    for seed in seeds(40) {
        let mut machine = Machine::new(seed, 2, SIZE);
        machine.start();
        for extent in 0..8 {
            wr(&machine, extent << 22, 65536);
        }
        machine.fail(1).unwrap();
        for extent in 0..8 {
            wr(&machine, (extent << 22) + 65536, 65536);
        }
        machine.re_add(1).unwrap();
        machine.world.run(seed * 2, || false);
        machine.stop().unwrap();
        machine.start();
        machine.check_all(&format!("seed {seed}"));
        machine.wait_in_sync();
        machine.compare_members();
    }
}

/// ublkpp: FLUSH is answered and never sent to the disks.
#[test]
fn ublkpp_flush_swallowed() {
    for seed in seeds(40) {
        let mut machine = Machine::new(seed, 2, SIZE);
        machine.start();
        wr(&machine, seed << 12, 4096);
        flush(&machine).unwrap();
        machine.cut_power_choosing(&mut |of| of - 1);
        machine.start();
        machine.check_all(&format!("seed {seed}"));
    }
}

/// ublkpp, 2026: requests beyond the end reach into what lies behind the data. The simulated
/// disk panics when it is asked for that.
#[test]
fn ublkpp_capacity_overrun() {
    let mut machine = Machine::new(1, 2, SIZE + 8192);
    machine.start();
    let client = machine.client();
    machine.world.block_on(async move {
        let end = SIZE + 8192;
        assert!(client.write(end - 4096, 8192, false).await.is_err());
        assert!(client.write(end, 512, false).await.is_err());
        assert!(client.write(u64::MAX - 511, 512, false).await.is_err());
        assert!(client.write_zeroes(end - 512, 1024, false).await.is_err());
        assert!(client.read_raw(end - 512, 1024).await.is_err());
        client.write(end - 4096, 4096, false).await.unwrap();
        client.read(end - 4096, 4096).await.unwrap();
    });
}

/// ZFS 5806: what works on the disks that are there clears the dirty state of one that is not.
/// Here: equalising, cooling and flushing while a member is away.
#[test]
fn zfs_5806_dirty_state_of_an_absent_disk_is_cleared() {
    for seed in seeds(20) {
        let mut machine = Machine::new(seed, 3, SIZE);
        machine.start();
        wr(&machine, 0, 1 << 20);
        machine.fail(2).unwrap();
        wr(&machine, 65536, 65536);
        machine.kill_daemon();
        machine.start();
        let mirror = machine.mirror();
        let quiet = || {
            let status = mirror.status();
            status.extents.hot == 0 && status.extents.unequalised_blocks == 0
        };
        assert!(machine.run_coarsely(quiet), "seed {seed}");
        let missed = mirror.status().members[2].missed_bytes;
        assert!(missed >= 65536, "seed {seed}: {missed} missed bytes");
        flush(&machine).unwrap();
        machine.re_add(2).unwrap();
        machine.wait_in_sync();
        machine.compare_members();
    }
}

/// SPDK: the repair of a bad sector overwrites a newer write. In every other history the disks
/// are bad in different places of what is read.
#[test]
fn spdk_read_repair_overwrites_a_newer_write() {
    for seed in seeds(60) {
        let mut machine = Machine::new(seed, 2, SIZE);
        machine.start();
        wr(&machine, 0, 65536);
        let bad = (seed % 2) as usize;
        let other = if seed % 4 < 2 { bad } else { 1 - bad };
        machine.disks[bad].spoil(machine.data_offset + 8192);
        machine.disks[other].spoil(machine.data_offset + 16384);
        machine.disks[other].spoil(machine.data_offset + 8192 + 512);
        for _ in 0..3 {
            let (reader, writer) = (machine.client(), machine.client());
            machine
                .world
                .spawn_task(async move { reader.read(0, 65536).await.unwrap() });
            machine
                .world
                .spawn_task(async move { writer.write(8192, 12288, false).await.unwrap() });
        }
        machine.world.run(5000, || false);
        machine.check_all(&format!("seed {seed}"));
        machine.compare_members();
    }
}

/// md: the copy of a resync, read before a write and written after it, brings old data back.
#[test]
fn md_write_versus_recovery() {
    for seed in seeds(60) {
        let mut machine = Machine::new(seed, 2, SIZE);
        machine.start();
        wr(&machine, 0, 1 << 20);
        machine.fail(1).unwrap();
        wr(&machine, 0, 1 << 20);
        machine.re_add(1).unwrap();
        let written = Rc::new(Cell::new(0));
        for block in 0..24_u64 {
            let (client, written) = (machine.client(), written.clone());
            machine.world.spawn_task(async move {
                let at = (block * 37 % 256) << 12;
                client.write(at, 4096, false).await.unwrap();
                written.set(written.get() + 1);
            });
        }
        machine.wait_in_sync();
        assert!(machine.world.run(1_000_000, || written.get() == 24));
        machine.compare_members();
        machine.check_all(&format!("seed {seed}"));
    }
}

/// DRBD: a resync meets an error and latches for ever. Here the member is lost, or the source
/// recovers; either way another attempt ends.
#[test]
fn drbd_resync_that_latches() {
    for seed in seeds(40) {
        let mut machine = Machine::new(seed, 2, SIZE);
        machine.start();
        wr(&machine, 0, 1 << 20);
        machine.fail(1).unwrap();
        wr(&machine, 0, 1 << 20);
        machine.re_add(1).unwrap();
        machine.world.run(seed * 3, || false);
        let reads = Faults {
            reads: true,
            ..none()
        };
        let hang = Faults {
            hang: true,
            ..none()
        };
        machine.disks[0].set_faults(reads);
        machine.disks[1].set_faults(if seed % 2 == 0 { hang } else { none() });
        machine.world.run(3000, || false);
        faults(&machine, none());
        machine.world.run(3000, || false);
        crate::play::bring_all_back(&mut machine);
        let members = machine.mirror().status().members;
        assert!(members.iter().all(|m| m.state == MemberState::InSync));
        machine.compare_members();
    }
}

/// A resync keeps the operator's ceiling, and goes on at its floor whatever the applications do.
#[test]
fn a_resync_is_paced() {
    for (ceiling, busy, seconds) in [(1 << 20, false, 7..12), (u64::MAX, true, 0..60)] {
        let mut machine = Machine::new(2, 2, 64 << 20);
        machine.resync_limits.ceiling = ceiling;
        machine.resync_limits.floor = 1 << 20;
        machine.start();
        machine.fail(1).unwrap();
        for extent in 0..2 {
            wr(&machine, extent << 22, 4 << 20);
        }
        machine.re_add(1).unwrap();
        if busy {
            let client = machine.client();
            let host = mirror::sim::SimHost(machine.world.clone());
            machine.world.spawn_task(async move {
                while client.write(48 << 20, 4096, false).await.is_ok() {
                    host.sleep(std::time::Duration::from_millis(3)).await;
                }
            });
        }
        machine.wait_in_sync();
        let resync = machine.mirror().status().last_resync.unwrap();
        assert_eq!(resync.copied_bytes, 8 << 20);
        let took = resync.elapsed_ms / 1000;
        assert!(seconds.contains(&took), "{took} s");
    }
}
