//! Checks of a member behind a network by the checksums of its blocks: its data stay where they are
//! while all is as it should be, and whatever rots, there or here, is found and made good as ever.

use crate::checksums::{COOL, check, content, machine, rot, spoil};
use crate::machine::{Machine, superblock_on};
use crate::older_images::{seconds, states};
use crate::races::{seeds, wr};
use crate::rot::repairing;
use crate::sums;
use dirty_map::Extent;
use mirror::DiskRequest;
use mirror::control::MemberState;
use mirror::sim::{Faults, Observer, SimBuffer, SimDisk};
use std::cell::Cell;
use std::rc::Rc;

/// Bytes of data that were read from a disk.
struct Reads {
    data_offset: u64,
    bytes: Cell<u64>,
}

impl Observer for Reads {
    fn submitted(&self, _: &SimDisk, request: &DiskRequest<SimBuffer>) {
        if let DiskRequest::Read { offset, span } = request
            && *offset >= self.data_offset
        {
            self.bytes.set(self.bytes.get() + span.len as u64);
        }
    }

    fn completed(&self, _: &SimDisk, _: &DiskRequest<SimBuffer>) {}
}

impl Reads {
    fn of(machine: &Machine, disk: usize) -> Rc<Self> {
        let reads = Rc::new(Self {
            data_offset: machine.data_offset,
            bytes: Cell::new(0),
        });
        machine.disks[disk].observe(Some(reads.clone()));
        reads
    }
}

/// A mirror of which all but the first members tell checksums, with two cool extents.
fn cool(seed: u64, members: usize) -> Machine {
    let mut machine = machine(seed, members);
    for disk in &machine.disks[1..] {
        disk.tell_sums(seed);
    }
    machine.start();
    for extent in 0..2 {
        for part in 0..4 {
            wr(&machine, extent * (4 << 20) + part * (1 << 20), 1 << 20);
        }
    }
    seconds(&machine, COOL);
    machine
}

#[test]
fn what_is_right_does_not_travel() {
    let mut by_sums = 0;
    for seed in seeds(20) {
        let mut machine = cool(seed, 3);
        let reads = Reads::of(&machine, 1);
        for extent in [0, 1] {
            let before = reads.bytes.get();
            let checked = check(&machine, extent, true);
            assert_eq!((checked.blocks, checked.findings), (1024, 0));
            let unread = reads.bytes.get() == before;
            // What was read in vain counts as well.
            let in_vain = checked.member_bytes - 3 * (4 << 20);
            assert!(!unread || in_vain == 0, "{in_vain} bytes in vain");
            by_sums += u32::from(unread);
        }
        machine.check_all("after");
    }
    // Now and then there are none to be had, and everything is read.
    assert!((30..40).contains(&by_sums), "{by_sums} of 40 extents");
}

#[test]
fn rot_on_either_side_is_found_and_made_good() {
    for seed in seeds(30) {
        let machine = cool(seed, 2);
        let (at, block) = ((seed % 2) as usize, seed * 31 % 1024);
        let good = content(&machine, 1 - at, block);
        rot(&machine, at, block);
        let checked = check(&machine, 0, false);
        assert_eq!((checked.findings, checked.repaired), (1, 0), "seed {seed}");
        assert_ne!(content(&machine, at, block), good);
        let checked = check(&machine, 0, true);
        assert_eq!((checked.findings, checked.repaired), (1, 1), "seed {seed}");
        assert_eq!(content(&machine, at, block), good, "seed {seed}");
        assert_eq!(check(&machine, 0, true).findings, 0);
        assert_eq!(states(&machine), [MemberState::InSync; 2]);
    }
}

/// Both copies rot, each in its way: there is nothing to take, and nothing is overwritten.
#[test]
fn what_fits_nowhere_is_damage() {
    let machine = cool(1, 2);
    for disk in [0, 1] {
        spoil(&machine, disk, 77 * 4096, |sector| sector[disk] ^= 1);
    }
    let checked = check(&machine, 0, true);
    assert_eq!((checked.damaged, checked.repaired), (1, 0));
    assert_eq!(check(&machine, 1, true).findings, 0);
}

/// An entry of a table of checksums rots, and a sector behind the network goes bad.
#[test]
fn what_cannot_be_told_is_read() {
    for seed in seeds(10) {
        let mut machine = cool(seed, 2);
        machine.stop().unwrap();
        let superblock = superblock_on(&machine.disks[1]).unwrap();
        let at = sums::page_offset(&superblock, Extent(0));
        let mut sector = [0; 512];
        machine.disks[1].read_now(at, &mut sector);
        sector[7 * 4] ^= 1;
        machine.disks[1].write_now(at, &sector);
        machine.start();
        let checked = check(&machine, 0, true);
        assert_eq!((checked.findings, checked.repaired), (1, 1), "the table");
        machine.disks[1].spoil(machine.data_offset + (4 << 20) + 9 * 4096);
        let checked = check(&machine, 1, true);
        assert_eq!((checked.findings, checked.repaired), (1, 1), "the sector");
        seconds(&machine, COOL);
        for extent in [0, 1] {
            assert_eq!(check(&machine, extent, true).findings, 0);
        }
    }
}

/// Writes go on while extents are checked: nothing is taken for rot.
#[test]
fn a_write_on_its_way_is_not_rot() {
    for seed in seeds(20) {
        let mut machine = cool(seed, 2);
        let (client, mirror) = (machine.client(), machine.mirror());
        let written = Rc::new(Cell::new(false));
        let done = written.clone();
        machine.world.spawn_task(async move {
            for number in 0..100 {
                let offset = (seed + number * 37) % 1024 * 4096;
                client.write(offset, 4096, false).await.unwrap();
            }
            done.set(true);
        });
        let how = repairing(seed % 2 == 0);
        let how = mirror::engine::CheckOptions {
            hot_too: seed % 3 == 0,
            ..how
        };
        let checked = machine
            .world
            .block_on(async move { mirror.check_extent(Extent(0), how).await })
            .unwrap();
        assert_eq!(checked.findings, 0, "seed {seed}");
        assert!(machine.world.run(1_000_000, || written.get()));
        machine.check_all("after");
    }
}

/// From the first read of data on these disks hang.
struct HangAtRead {
    data_offset: u64,
    disks: Vec<SimDisk>,
}

impl HangAtRead {
    fn hang(&self, hang: bool) {
        for disk in &self.disks {
            disk.set_faults(Faults {
                hang,
                ..Faults::default()
            });
        }
    }
}

impl Observer for HangAtRead {
    fn submitted(&self, _: &SimDisk, request: &DiskRequest<SimBuffer>) {
        if let DiskRequest::Read { offset, .. } = request {
            self.hang(*offset >= self.data_offset);
        }
    }

    fn completed(&self, _: &SimDisk, _: &DiskRequest<SimBuffer>) {}
}

/// All hang, for longer than the deadline: that nobody has answered yet costs nobody his place. When
/// only the one that is read hangs, it is lost, as by any other check.
#[test]
fn a_stall_that_all_share_loses_nobody() {
    for (seed, all) in (0..10).map(|seed| (seed, seed % 2 == 0)) {
        let machine = cool(seed, 2);
        let hanging = Rc::new(HangAtRead {
            data_offset: machine.data_offset,
            disks: machine.disks[..if all { 2 } else { 1 }].to_vec(),
        });
        machine.disks[0].observe(Some(hanging.clone()));
        let (mirror, ended) = (machine.mirror(), Rc::new(Cell::new(false)));
        let done = ended.clone();
        machine.world.spawn_task(async move {
            let _ = mirror.check_extent(Extent(0), repairing(true)).await;
            done.set(true);
        });
        seconds(&machine, 60);
        machine.disks[0].observe(None);
        hanging.hang(false);
        assert!(machine.world.run(1_000_000, || ended.get()));
        let lost = states(&machine)[0] != MemberState::InSync;
        assert_eq!(lost, !all, "seed {seed}: {:?}", states(&machine));
    }
}
