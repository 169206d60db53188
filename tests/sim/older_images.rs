//! Older images of members, however few commits they lack, and what looks like one and is none:
//! damaged position pages, starts and joins that were cut off, a loss that was not recorded.

use crate::machine::{Machine, path, superblock_on};
use crate::races::{fl, gone, none, seeds, wr};
use mirror::control::MemberState;
use mirror::engine::Return;
use mirror::sim::{Faults, Observer, SimBuffer, SimDisk, SimHost};
use mirror::superblock::SlotState;
use mirror::{DiskRequest, Host as _};
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

const SIZE: u64 = 64 << 20;
/// The position page's copies.
const POSITION: [u64; 2] = [12288, 16384];

pub(crate) fn seconds(machine: &Machine, seconds: u64) {
    let host = SimHost(machine.world.clone());
    let sleep = async move { host.sleep(Duration::from_secs(seconds)).await };
    machine.world.block_on(sleep);
}

pub(crate) fn write_and_flush(machine: &Machine) {
    wr(machine, 0, 4096);
    fl(machine);
}

/// Nothing that was in a cache is left.
pub(crate) fn drop_all(ways: usize) -> usize {
    ways - 1
}

pub(crate) fn states(machine: &Machine) -> Vec<MemberState> {
    let members = machine.mirror().status().members;
    members.into_iter().map(|member| member.state).collect()
}

/// Starts with the image in its slot: it is told from the others, and nothing is read from it.
fn is_left_out(mut machine: Machine, slot: usize, image: SimDisk, what: &str) {
    machine.replace_disk(slot, image);
    machine.start();
    assert_ne!(states(&machine)[slot], MemberState::InSync, "{what}");
    machine.check_all(what);
}

/// An image of either member, taken after what comes `before`, with what comes `after` lost on it.
fn image_is_left_out(many: u64, before: impl Fn(&Machine, u64), after: impl Fn(&mut Machine, u64)) {
    for seed in seeds(many) {
        let slot = (seed % 2) as usize;
        let mut machine = Machine::new(seed, 2, SIZE);
        machine.start();
        before(&machine, seed);
        let image = machine.disks[slot].image();
        after(&mut machine, seed);
        is_left_out(machine, slot, image, &format!("seed {seed}"));
    }
}

#[test]
fn of_a_moment_ago() {
    let before = |machine: &Machine, _| {
        for _ in 0..3 {
            write_and_flush(machine);
            seconds(machine, 1);
        }
    };
    image_is_left_out(40, before, |machine, _| {
        write_and_flush(machine);
        seconds(machine, 3);
        machine.cut_power_choosing(&mut drop_all);
    });
}

/// A second's writes to an extent that is hot make one commit, however long ago that was.
#[test]
fn with_hardly_any_commit_since() {
    let before = |machine: &Machine, seed| {
        write_and_flush(machine);
        seconds(machine, if seed % 4 < 2 { 30 } else { 3 });
    };
    image_is_left_out(40, before, |machine, seed| {
        seconds(machine, if seed % 8 < 4 { 3600 } else { 0 });
        write_and_flush(machine);
        seconds(machine, 3);
        machine.cut_power_choosing(&mut drop_all);
    });
}

/// After a clean stop nothing is hot, so nothing would be equalised.
#[test]
fn beside_a_clean_stop() {
    let before = |machine: &Machine, _| {
        write_and_flush(machine);
        seconds(machine, 3);
    };
    image_is_left_out(40, before, |machine, seed| {
        write_and_flush(machine);
        seconds(machine, if seed % 4 < 2 { 3600 } else { 0 });
        machine.stop().unwrap();
    });
}

/// The last write before a crash made no commit, and nothing is written after the next start.
#[test]
fn from_before_a_start() {
    let before = |machine: &Machine, _| {
        write_and_flush(machine);
        seconds(machine, 5);
    };
    image_is_left_out(40, before, |machine, seed| {
        write_and_flush(machine);
        machine.cut_power_choosing(&mut drop_all);
        machine.start();
        seconds(machine, if seed % 4 < 2 { 3600 } else { 6 });
        machine.cut_power_choosing(&mut drop_all);
    });
}

/// While it was resyncing; nothing was written after the resync.
#[test]
fn from_within_a_resync() {
    for seed in seeds(40) {
        let mut machine = Machine::new(seed, 2, SIZE);
        machine.start();
        write_and_flush(&machine);
        machine.fail(1).unwrap();
        write_and_flush(&machine);
        seconds(&machine, 30);
        machine.re_add(1).unwrap();
        let image = machine.disks[1].image();
        machine.wait_in_sync();
        seconds(&machine, if seed % 2 == 0 { 3600 } else { 3 });
        machine.cut_power_choosing(&mut drop_all);
        is_left_out(machine, 1, image, &format!("seed {seed}"));
    }
}

/// A position page that is damaged in both copies says nothing about its member's age.
#[test]
fn a_damaged_position_page_is_no_age() {
    for seed in seeds(20) {
        let mut machine = Machine::new(seed, 2, SIZE);
        machine.start();
        for extent in 0..8 {
            wr(&machine, extent << 22, 1 << 20);
        }
        let resyncing = seed % 2 == 1;
        if resyncing {
            machine.fail(1).unwrap();
        }
        for _ in 0..6 {
            wr(&machine, 8192, 4096);
            seconds(&machine, 1);
        }
        if resyncing {
            machine.re_add(1).unwrap();
        }
        machine.cut_power_choosing(&mut drop_all);
        for sector in 0..8 {
            for page in POSITION {
                machine.disks[0].spoil(page + sector * 512);
            }
        }
        machine.start();
        assert_eq!(states(&machine)[0], MemberState::InSync, "seed {seed}");
        machine.check_all(&format!("seed {seed}"));
        machine.wait_in_sync();
        machine.compare_members();
    }
}

/// Starts that are cut off do not age the member that their commits did not reach, nor one whose
/// resync a crash had ended.
#[test]
fn starts_that_were_cut_off_are_no_age() {
    for seed in seeds(60) {
        let mut machine = Machine::new(seed, 2, SIZE);
        machine.start();
        for extent in 0..4 {
            wr(&machine, extent << 22, 65536);
        }
        if seed % 2 == 1 {
            machine.fail(1).unwrap();
            wr(&machine, 8192, 4096);
            machine.re_add(1).unwrap();
        }
        machine.cut_power_choosing(&mut drop_all);
        for cut in 0..6 {
            // What it writes reaches the first disk only.
            machine.disks[1].observe(Some(Rc::new(HangsWhenWritten)));
            machine.start_cut_short(14 + (seed / 2 + cut) % 15);
            machine.disks[1].observe(None);
            machine.disks[1].set_faults(none());
            machine.cut_power_choosing(&mut drop_all);
        }
        machine.start();
        machine.check_all(&format!("seed {seed}"));
        machine.wait_in_sync();
        machine.compare_members();
    }
}

/// Starts by force do not make older images as new as the one that was left out, however often
/// they are cut off.
#[test]
fn starts_that_were_cut_off_are_no_progress() {
    for seed in seeds(40) {
        let mut machine = Machine::new(seed, 3, SIZE);
        machine.start();
        write_and_flush(&machine);
        seconds(&machine, 3);
        let images = [0, 1].map(|slot| machine.disks[slot].image());
        write_and_flush(&machine);
        seconds(&machine, 5);
        machine.cut_power_choosing(&mut drop_all);
        for (slot, image) in images.into_iter().enumerate() {
            machine.replace_disk(slot, image);
        }
        for _ in 0..8 {
            let round = |machine: &Machine| {
                let mut disks = machine.disks.iter();
                disks.any(|disk| disk.is_under_way(4096, 4096))
            };
            assert!(!machine.start_on_until(&[0, 1], true, round));
            machine.cut_power_choosing(&mut drop_all);
        }
        machine.start();
        assert_eq!(states(&machine)[2], MemberState::InSync, "seed {seed}");
        machine.check_all(&format!("seed {seed}"));
    }
}

/// A disk that answers nothing from the first write on.
struct HangsWhenWritten;

impl Observer for HangsWhenWritten {
    fn submitted(&self, disk: &SimDisk, request: &DiskRequest<SimBuffer>) {
        if matches!(request, DiskRequest::Write { .. }) {
            disk.set_faults(Faults {
                hang: true,
                ..none()
            });
        }
    }

    fn completed(&self, _: &SimDisk, _: &DiskRequest<SimBuffer>) {}
}

/// Counts the writes that a disk is given.
#[derive(Default)]
struct Writes(Cell<u64>);

impl Observer for Writes {
    fn submitted(&self, _: &SimDisk, request: &DiskRequest<SimBuffer>) {
        if matches!(request, DiskRequest::Write { .. }) {
            self.0.set(self.0.get() + 1);
        }
    }

    fn completed(&self, _: &SimDisk, _: &DiskRequest<SimBuffer>) {}
}

/// The power goes while a returning member's maps are overwritten, and its cache loses what was
/// written first.
#[test]
fn a_join_that_was_cut_off_is_no_age() {
    for seed in seeds(80) {
        let mut machine = Machine::new(seed, 2, SIZE);
        machine.start();
        wr(&machine, 0, 4096);
        machine.fail(1).unwrap();
        for at in 0..8 {
            wr(&machine, (at % 4) << 22, 4096);
            seconds(&machine, 2);
        }
        let writes = Rc::new(Writes::default());
        machine.disks[1].observe(Some(writes.clone()));
        let (mirror, disk) = (machine.mirror(), machine.disks[1].clone());
        let back = async move { _ = mirror.re_add(path(1), disk, Return::DELTA).await };
        machine.world.spawn_task(back);
        assert!(
            machine
                .world
                .run(1_000_000, || writes.0.get() > seed / 4 % 10)
        );
        machine.disks[1].observe(None);
        let mut asked = 0;
        machine.cut_power_choosing(&mut |ways| {
            asked += 1;
            if asked <= seed % 5 * 8 { ways - 1 } else { 0 }
        });
        machine.start();
        if matches!(
            states(&machine)[1],
            MemberState::Faulty | MemberState::Stale
        ) {
            // It had not joined yet, and does so when asked; else it has by itself.
            machine.world.run(1000, || false);
            let back = machine.re_add(1);
            let returned = [MemberState::Resyncing, MemberState::InSync];
            assert!(
                back.is_ok() || returned.contains(&states(&machine)[1]),
                "seed {seed}: {back:?}"
            );
        }
        machine.wait_in_sync();
        machine.compare_members();
    }
}

/// A member vanishes and the others go on committing, but the power goes before its loss is on
/// any superblock.
#[test]
fn a_loss_that_was_not_recorded_is_no_age() {
    for seed in seeds(30) {
        let mut machine = Machine::new(seed, 3, SIZE);
        machine.start();
        wr(&machine, 0, 4096);
        machine.fail(2).unwrap();
        wr(&machine, 8192, 4096);
        let (mirror, disk) = (machine.mirror(), machine.disks[2].clone());
        let back = async move { _ = mirror.re_add(path(2), disk, Return::DELTA).await };
        machine.world.spawn_task(back);
        let joined = |disk: &SimDisk| {
            let superblock = superblock_on(disk);
            superblock.is_some_and(|s| s.slots[2].state == SlotState::Resyncing)
        };
        let disks = machine.disks.clone();
        let holds = || joined(&disks[2]) && !disks[2].is_under_way(4096, 8192);
        assert!(machine.world.run(1_000_000, holds), "seed {seed}");
        machine.disks[1].set_faults(gone());
        let recording = || disks[0].is_under_way(4096, 4096);
        assert!(machine.world.run(1_000_000, recording), "seed {seed}");
        machine.cut_power_choosing(&mut drop_all);
        machine.disks[1].set_faults(none());
        machine.start();
        assert_eq!(states(&machine)[1], MemberState::InSync, "seed {seed}");
        machine.wait_in_sync();
        machine.compare_members();
    }
}
