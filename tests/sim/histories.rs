//! Random histories: clients, faults, an operator, crashes; the oracle judges every read.

use crate::machine::{Client, Machine, path};
use mirror::Errno;
use mirror::control::{MemberRef, MemberState};
use mirror::sim::{Faults, Rng};
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

const SIZE: u64 = 24 << 20;

fn seeds() -> (Vec<u64>, bool) {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    match number("SIM_SEED") {
        Some(seed) => {
            tracing_subscriber::fmt()
                .without_time()
                .with_max_level(tracing::Level::TRACE)
                .try_init()
                .ok();
            (vec![seed], true)
        }
        None => ((0..number("SIM_SEEDS").unwrap_or(100)).collect(), false),
    }
}

/// One client that keeps requesting until told to stop.
async fn work(client: Client, mut rng: Rng, requests: u64, ended: Rc<Cell<u64>>) {
    for _ in 0..requests {
        let extent = rng.below(SIZE >> 22);
        let sector = (extent << 13) + rng.below(64) * 8 + rng.below(2) * rng.below(8);
        let largest = if rng.one_in(8) { 64 } else { 4 };
        let blocks = 1 + rng.below(largest);
        let len = if rng.one_in(4) {
            512
        } else {
            (blocks * 4096) as usize
        };
        let offset = (sector * 512).min(SIZE - len as u64);
        // Errors are legal while disks are faulty; wrong data never is.
        let _: Result<(), Errno> = match rng.below(20) {
            0 => client.flush().await,
            1 => client.discard_extent(extent).await,
            2 => client.write_zeroes(offset, len as u64, rng.one_in(3)).await,
            3..=7 => client.read(offset, len).await,
            8 => client.write(offset, len, true).await,
            _ => client.write(offset, len, false).await,
        };
    }
    ended.set(ended.get() + 1);
}

/// One fault or operator's action.
async fn disturb(client: &Client, disks: &[mirror::sim::SimDisk], rng: &mut Rng) {
    let slot = rng.index(disks.len());
    let member = MemberRef::Slot(slot as u8);
    let none = Faults::default();
    match rng.below(8) {
        0 => drop(client.mirror.fail(&member).await),
        1 => drop(client.mirror.remove(&member, true).await),
        2 => disks[slot].set_faults(Faults {
            writes: true,
            ..none
        }),
        3 => disks[slot].set_faults(Faults {
            flushes: true,
            ..none
        }),
        4 => disks[slot].set_faults(Faults { hang: true, ..none }),
        5 => disks[slot].set_faults(Faults { gone: true, ..none }),
        6 => disks[slot].set_faults(Faults {
            reads: true,
            ..none
        }),
        _ => {}
    }
    mirror::Host::sleep(
        &mirror::sim::SimHost(client.world.clone()),
        Duration::from_secs(rng.below(12)),
    )
    .await;
    disks[slot].set_faults(none);
    for (slot, disk) in disks.iter().enumerate() {
        if client.mirror.status().members[slot].state != MemberState::InSync {
            drop(
                client
                    .mirror
                    .re_add(path(slot), disk.clone(), false, false)
                    .await,
            );
        }
    }
}

fn history(seed: u64, members: usize, verbose: bool) {
    let mut rng = Rng::new(seed ^ 0x5eed);
    let mut machine = Machine::new(seed, members, SIZE);
    // Zeroing by writing is slow to simulate; it goes through other code.
    let plain = rng.one_in(8);
    for disk in machine.disks.iter().skip(rng.index(2)).filter(|_| plain) {
        disk.without_cheap_zeroes();
    }
    for life in 0..4 {
        let started = machine.start_on(&(0..members).collect::<Vec<_>>(), false);
        assert!(
            started.is_ok(),
            "seed {seed}, life {life}: {}",
            started.unwrap_err()
        );
        machine.check_all(&format!("seed {seed}, start {life}"));
        let ended = Rc::new(Cell::new(0));
        for _ in 0..3 {
            let worker = work(
                machine.client(),
                Rng::new(rng.bits()),
                12 + rng.below(12),
                ended.clone(),
            );
            machine.world.spawn_task(worker);
        }
        let disturbances = rng.below(3);
        let (client, disks, mut own) = (
            machine.client(),
            machine.disks.clone(),
            Rng::new(rng.bits()),
        );
        let disturbed = ended.clone();
        machine.world.spawn_task(async move {
            for _ in 0..disturbances {
                disturb(&client, &disks, &mut own).await;
            }
            disturbed.set(disturbed.get() + 1);
        });
        let cut_short = rng.one_in(2);
        let limit = if cut_short {
            200 + rng.below(4000)
        } else {
            2_000_000
        };
        let done = ended.clone();
        let finished = machine.world.run(limit, || done.get() == 4);
        if verbose {
            eprintln!("life {life}: {finished} {:#?}", machine.mirror().status());
        }
        assert!(
            finished || cut_short,
            "seed {seed}, life {life} stands still"
        );
        for disk in &machine.disks {
            disk.set_faults(Faults::default());
        }
        match rng.below(4) {
            0 | 1 => machine.cut_power(),
            2 => machine.kill_daemon(),
            _ if !finished => machine.kill_daemon(),
            _ => drop(machine.stop()),
        }
    }
    finish(&mut machine, seed);
}

/// In the end all members come back, hold the same, and what they hold is legal.
fn finish(machine: &mut Machine, seed: u64) {
    machine.start();
    for slot in 0..machine.disks.len() {
        let mirror = machine.mirror();
        let resyncing = || {
            mirror
                .status()
                .members
                .iter()
                .all(|m| m.state != MemberState::Resyncing)
        };
        assert!(
            machine.world.run(10_000_000, resyncing),
            "seed {seed}: a resync stands still"
        );
        if mirror.status().members[slot].state != MemberState::InSync {
            let disk = machine.disks[slot].clone();
            if let Err(error) = machine.re_add_disk(path(slot), disk, true) {
                // It may have come back by itself meanwhile.
                assert!(error.message.contains("in service"), "seed {seed}: {error}");
            }
        }
    }
    machine.wait_in_sync();
    machine.check_all(&format!("seed {seed}, in the end"));
    let mirror = machine.mirror();
    machine.world.run(10_000_000, || {
        mirror.status().extents.unequalised_blocks == 0
    });
    machine.compare_members();
}

/// Runs every seed; a failure names its seed, which reproduces it.
fn run_all(members: usize) {
    let (seeds, verbose) = seeds();
    let mut failed = Vec::new();
    for seed in seeds {
        let run = std::panic::AssertUnwindSafe(|| history(seed, members, verbose));
        if std::panic::catch_unwind(run).is_err() {
            eprintln!("FAILED: SIM_SEED={seed}, {members} members");
            failed.push(seed);
        }
    }
    assert!(failed.is_empty(), "{members} members: seeds {failed:?}");
}

#[test]
fn two_members() {
    run_all(2);
}

#[test]
fn three_members() {
    run_all(3);
}
