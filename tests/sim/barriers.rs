//! A member that keeps the order of intent and data by itself: what is written into an extent that
//! has just become hot waits for that member's answer to the intent no more, and a crash or a
//! failure of the intent is as harmless as ever (R1).

use crate::checksums::COOL;
use crate::machine::{GARBAGE, Machine, superblock_on};
use crate::older_images::{drop_all, seconds, states};
use crate::races::{gone, none, seeds, wr};
use mirror::control::MemberState;
use mirror::host::Disk as _;
use mirror::layout::RegionKind;
use mirror::sim::WriteFault;
use std::cell::Cell;
use std::rc::Rc;

const SIZE: u64 = 64 << 20;
/// An extent that nobody has written to.
const FRESH: u64 = 20 << 20;

/// A mirror whose last member keeps order, with an extent in use.
fn machine(seed: u64, members: usize) -> Machine {
    let mut machine = Machine::new(seed, members, SIZE);
    machine.disks[members - 1].keep_order();
    machine.start();
    wr(&machine, 0, 4096);
    machine
}

/// Writes of the last member's state map get no answer, or fail.
fn intent_fault(machine: &Machine, hangs: bool) -> WriteFault {
    let superblock = superblock_on(&machine.disks[0]).unwrap();
    let region = superblock.layout.find(RegionKind::State, 0).unwrap();
    WriteFault {
        offset: region.copy_a,
        len: region.len,
        hangs,
    }
}

/// Begins to write a block there; what came of it.
fn begin_write(machine: &Machine, offset: u64) -> Rc<Cell<Option<bool>>> {
    let (client, ended) = (machine.client(), Rc::new(Cell::new(None)));
    let told = ended.clone();
    machine.world.spawn_task(async move {
        told.set(Some(client.write(offset, 4096, false).await.is_ok()));
    });
    ended
}

/// Whether the first member has something at `offset`.
fn has_reached_the_first(machine: &Machine, offset: u64) -> bool {
    let mut bytes = [0; 4096];
    machine.disks[0].read_now(machine.data_offset + offset, &mut bytes);
    bytes.iter().any(|byte| *byte != 0 && *byte != GARBAGE)
}

/// The last member owes the answer to the intent: the data are on their way to all, and wait before
/// that disk. A member that keeps no order holds them up everywhere.
#[test]
fn intent_and_data_travel_together() {
    for seed in seeds(40) {
        for order in [true, false] {
            let mut machine = machine(seed, 2);
            machine.stop().unwrap();
            machine.disks[1].alter(|geometry| geometry.keeps_order = order);
            machine.start();
            let last = machine.disks[1].clone();
            last.set_write_fault(Some(intent_fault(&machine, true)));
            let ended = begin_write(&machine, FRESH);
            seconds(&machine, 1);
            assert_eq!(has_reached_the_first(&machine, FRESH), order, "seed {seed}");
            let data = machine.data_offset + FRESH;
            assert!(!last.is_under_way(data, 4096), "seed {seed}");
            assert_eq!(ended.get(), None, "seed {seed}");
            last.set_write_fault(None);
            assert!(machine.world.run(100_000, || ended.get().is_some()));
            assert_eq!(ended.get(), Some(true), "seed {seed}");
            assert_eq!(states(&machine), [MemberState::InSync; 2], "seed {seed}");
            machine.check_all("written");
            machine.compare_members();
        }
    }
}

/// The intent fails on the member that keeps order, after the data were sent: they never reach its
/// disk, it is lost before the answer, and comes back.
#[test]
fn what_a_failed_intent_was_to_cover_is_refused() {
    for seed in seeds(40) {
        let members = 2 + (seed % 2) as usize;
        let mut machine = machine(seed, members);
        let last = machine.disks[members - 1].clone();
        last.set_write_fault(Some(intent_fault(&machine, true)));
        let ended = begin_write(&machine, FRESH);
        let sent = || has_reached_the_first(&machine, FRESH) && last.in_flight() > 0;
        assert!(machine.world.run(100_000, sent), "seed {seed}");
        last.set_write_fault(Some(intent_fault(&machine, false)));
        assert!(machine.world.run(100_000, || ended.get().is_some()));
        assert_eq!(ended.get(), Some(true), "seed {seed}");
        assert_eq!(
            states(&machine)[members - 1],
            MemberState::Faulty,
            "seed {seed}"
        );
        let mut bytes = [0; 4096];
        last.read_now(machine.data_offset + FRESH, &mut bytes);
        let untouched = |byte: &u8| *byte == 0 || *byte == GARBAGE;
        assert!(bytes.iter().all(untouched), "seed {seed}");
        last.set_write_fault(None);
        machine.replace_disk(members - 1, last.reopen());
        machine.re_add(members - 1).unwrap();
        machine.wait_in_sync();
        machine.check_all("back");
        machine.compare_members();
    }
}

/// After the data were sent the other member dies, and the intent fails on the one that keeps order:
/// the writer has an error, and the extent is recorded anew before it is written to again.
#[test]
fn an_intent_that_fails_on_all_is_recorded_anew() {
    for seed in seeds(40) {
        let mut machine = machine(seed, 2);
        let last = machine.disks[1].clone();
        last.set_write_fault(Some(intent_fault(&machine, true)));
        let ended = begin_write(&machine, FRESH);
        let sent = || has_reached_the_first(&machine, FRESH);
        assert!(machine.world.run(100_000, sent), "seed {seed}");
        machine.disks[0].set_faults(gone());
        // A flush notices who has died, and waits for no intent.
        let client = machine.client();
        machine.world.spawn_task(async move {
            let _ = client.flush().await;
        });
        let noticed = || states(&machine)[0] != MemberState::InSync;
        assert!(machine.world.run(100_000, noticed), "seed {seed}");
        last.set_write_fault(Some(intent_fault(&machine, false)));
        assert!(machine.world.run(200_000, || ended.get().is_some()));
        assert_eq!(ended.get(), Some(false), "seed {seed}");
        last.set_write_fault(None);
        seconds(&machine, 3);
        // R1 is checked with each write that the disk is given.
        let again = begin_write(&machine, FRESH);
        assert!(machine.world.run(1_000_000, || again.get().is_some()));
        assert_eq!(again.get(), Some(true), "seed {seed}");
        machine.disks[0].set_faults(none());
        machine.cut_power();
        machine.start();
        machine.check_all("after a power cut");
    }
}

/// A write begins in another extent while a commit is under way. What it makes hot is no part of that
/// commit: the peer, which lacks it at the power cut, would have another page of the same sequence
/// (R1; seed 3125).
#[test]
fn what_becomes_hot_during_a_commit_waits_for_the_next() {
    let mut met = 0;
    for seed in seeds(400) {
        let mut machine = machine(seed, 2);
        let (one, other) = (1 << 22, 2 << 22);
        wr(&machine, one, 4096);
        wr(&machine, other, 4096);
        seconds(&machine, COOL);
        let intent = intent_fault(&machine, false);
        let at = machine.data_offset + other;
        let before = machine.disks[0].settled(at, 4096);
        begin_write(&machine, one);
        machine.world.run(1 + seed % 40, || false);
        let client = machine.client();
        machine.world.spawn_task(async move {
            client.write(other, 4096, true).await.unwrap_or_default();
        });
        let ahead = || {
            let now = machine.disks[0].settled(at, 4096);
            let owes = machine.disks[1].is_under_way(intent.offset, intent.len);
            now.is_some() && now != before && owes
        };
        if !machine.world.run(5000, ahead) {
            continue;
        }
        met += 1;
        machine.cut_power_choosing(&mut drop_all);
        machine.start();
        machine.check_all(&format!("seed {seed}"));
        machine.wait_in_sync();
        machine.compare_members();
    }
    assert!(met > 5, "{met}");
}
