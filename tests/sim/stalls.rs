//! Disks that do not answer, in the middle of requests that go to one member alone.

use crate::checksums::COOL;
use crate::machine::Machine;
use crate::older_images::{seconds, states, write_and_flush};
use crate::races::{none, seeds, wr};
use mirror::Host as _;
use mirror::control::MemberState;
use mirror::sim::{Faults, SimHost};
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

const SIZE: u64 = 64 << 20;

fn hang(machine: &Machine, slots: std::ops::Range<usize>, hang: bool) {
    for disk in &machine.disks[slots] {
        disk.set_faults(Faults { hang, ..none() });
    }
}

/// Begins `count` reads and says how many have ended and when the last one did.
fn read_in_the_background(machine: &Machine, count: u64) -> Rc<Cell<(u64, Duration)>> {
    let ended = Rc::new(Cell::new((0, Duration::ZERO)));
    for at in 0..count {
        let (client, ended) = (machine.client(), ended.clone());
        machine.world.spawn_task(async move {
            client.read(at << 22, 4096).await.unwrap();
            let now = SimHost(client.world.clone()).now();
            ended.set((ended.get().0 + 1, now));
        });
    }
    ended
}

/// A controller hangs with all its disks, while nothing but reads is asked of them, of extents whose
/// checksums are at hand, have to be read, or are none.
#[test]
fn a_stall_that_all_share_loses_nobody_over_reads() {
    for seed in seeds(40) {
        let members = 2 + (seed % 2) as usize;
        let mut machine = Machine::with_checksums(seed, members, SIZE);
        machine.start();
        for extent in 0..6 {
            wr(&machine, extent << 22, 65536);
        }
        seconds(&machine, COOL);
        wr(&machine, 0, 4096);
        // What was asked in the first stall is no answer to the second one.
        for _ in 0..2 {
            hang(&machine, 0..members, true);
            let ended = read_in_the_background(&machine, 6);
            seconds(&machine, 7 + seed % 20);
            assert_eq!(ended.get().0, 0, "seed {seed}");
            hang(&machine, 0..members, false);
            seconds(&machine, 1);
            assert_eq!(ended.get().0, 6, "seed {seed}");
            let all = states(&machine);
            assert!(
                all.iter().all(|state| *state == MemberState::InSync),
                "seed {seed}: {all:?}"
            );
        }
    }
}

/// The same over a discard of many extents; then one disk alone hangs, and the discard waits once
/// for it and not at each extent.
#[test]
fn discards_meet_a_stall_once() {
    for seed in seeds(20) {
        let members = 2 + (seed % 2) as usize;
        let mut machine = Machine::new(seed, members, SIZE);
        machine.start();
        let discard = |machine: &Machine| {
            let (client, ended) = (machine.client(), Rc::new(Cell::new(false)));
            let told = ended.clone();
            machine.world.spawn_task(async move {
                client.mirror.discard(0, 40 << 20).await.unwrap();
                told.set(true);
            });
            ended
        };
        for hanging in [members, 1] {
            for extent in 0..10 {
                wr(&machine, extent << 22, 65536);
            }
            let ended = discard(&machine);
            let discarding = || {
                let data = machine.data_offset;
                machine.disks[0].is_under_way(data, 40 << 20)
            };
            assert!(machine.world.run(1_000_000, discarding), "seed {seed}");
            hang(&machine, 0..hanging, true);
            seconds(&machine, 20);
            let lost = states(&machine)[0] != MemberState::InSync;
            assert_eq!(lost, hanging == 1, "seed {seed}");
            assert_eq!(ended.get(), hanging == 1, "seed {seed}");
            hang(&machine, 0..hanging, false);
            seconds(&machine, 1);
            assert!(ended.get(), "seed {seed}");
        }
    }
}

/// A copy of a superblock that cannot be read does not make its member mute: the other copy is
/// asked for.
#[test]
fn a_bad_sector_does_not_make_a_member_mute() {
    for seed in seeds(20) {
        let mut machine = Machine::new(seed, 2, SIZE);
        machine.start();
        write_and_flush(&machine);
        seconds(&machine, COOL);
        machine.disks[1].spoil(4096);
        hang(&machine, 0..1, true);
        let ended = read_in_the_background(&machine, 8);
        seconds(&machine, 20);
        assert_eq!(ended.get().0, 8, "seed {seed}");
        assert_eq!(states(&machine)[0], MemberState::Faulty, "seed {seed}");
    }
}

/// One disk hangs: a read that waits for it has its answer from another within the deadline.
#[test]
fn a_stall_of_one_is_over_at_the_deadline() {
    for seed in seeds(40) {
        let members = 2 + (seed % 2) as usize;
        let mut machine = Machine::new(seed, members, SIZE);
        machine.start();
        write_and_flush(&machine);
        seconds(&machine, COOL);
        hang(&machine, 0..1, true);
        let begun = SimHost(machine.world.clone()).now();
        // Enough that some of them go to each member.
        let ended = read_in_the_background(&machine, 8);
        seconds(&machine, 20);
        let (count, last) = ended.get();
        assert_eq!(count, 8, "seed {seed}");
        let took = last.checked_sub(begun).unwrap();
        assert!(took < Duration::from_millis(5100), "seed {seed}: {took:?}");
        assert_eq!(states(&machine)[0], MemberState::Faulty, "seed {seed}");
        hang(&machine, 0..1, false);
        seconds(&machine, 1);
        machine.re_add(0).unwrap();
        machine.wait_in_sync();
        machine.compare_members();
    }
}

/// One disk hangs, and the other has only errors to give: neither proves anything of the first,
/// which answers in the end.
#[test]
fn errors_do_not_condemn_a_disk_that_hangs() {
    for seed in seeds(20) {
        let mut machine = Machine::new(seed, 2, SIZE);
        machine.start();
        write_and_flush(&machine);
        seconds(&machine, COOL);
        hang(&machine, 0..1, true);
        machine.disks[1].set_faults(Faults {
            reads: true,
            ..none()
        });
        let ended = read_in_the_background(&machine, 8);
        seconds(&machine, 20);
        assert_eq!(states(&machine)[0], MemberState::InSync, "seed {seed}");
        hang(&machine, 0..2, false);
        seconds(&machine, 1);
        assert_eq!(ended.get().0, 8, "seed {seed}");
    }
}
