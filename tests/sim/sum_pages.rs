//! Pages of checksums on their way to the members: stalls, losses, crashes and bad places there.

use crate::checksums::{COOL, machine, rd};
use crate::machine::{Machine, superblock_on};
use crate::older_images::{drop_all, seconds};
use crate::races::{fl, none, seeds, wr};
use crate::sums;
use dirty_map::Extent;
use mirror::engine::Return;
use mirror::sim::{Faults, Observer, SimBuffer, SimDisk, SimHost};
use mirror::{DiskRequest, Host as _};
use std::rc::Rc;

/// An extent is not called cool before the loss of a member that has not taken its page counts:
/// with the power gone in between, both members start.
#[test]
fn an_extent_is_cool_only_after_the_loss_of_who_lacks_its_page() {
    for seed in seeds(10) {
        for operations in 0..30 {
            let mut machine = machine(seed, 2);
            machine.start();
            wr(&machine, 0, 65536);
            seconds(&machine, COOL);
            wr(&machine, 8192, 4096);
            fl(&machine);
            let superblock = superblock_on(&machine.disks[1]).unwrap();
            let at = sums::page_offset(&superblock, Extent(0));
            let (first, second) = (machine.disks[0].clone(), machine.disks[1].clone());
            assert!(
                machine
                    .world
                    .run(1_000_000, || second.is_under_way(at, 4096))
            );
            second.set_faults(Faults {
                writes: true,
                ..none()
            });
            let begun = first.operations();
            machine
                .world
                .run(100_000, || first.operations() >= begun + operations);
            machine.cut_power_choosing(&mut drop_all);
            second.set_faults(none());
            machine.start();
            machine.stop().unwrap();
            sums::check(&machine, &format!("seed {seed}, {operations} operations"));
        }
    }
}

/// Nothing is written to a member that has been removed.
#[test]
fn a_removed_member_gets_no_pages() {
    let mut bad = 0;
    for seed in seeds(30) {
        let mut machine = machine(seed, 2);
        machine.start();
        for extent in 0..8 {
            wr(&machine, extent << 23, 4096);
        }
        seconds(&machine, COOL);
        machine.fail(1).unwrap();
        for extent in 0..8 {
            wr(&machine, (extent << 23) + 4096, 4096);
        }
        seconds(&machine, COOL);
        machine.re_add(1).unwrap();
        let superblock = superblock_on(&machine.disks[1]).unwrap();
        let at = sums::page_offset(&superblock, Extent(0));
        let disk = machine.disks[1].clone();
        assert!(
            machine
                .world
                .run(1_000_000, || disk.is_under_way(at, 64 * 4096))
        );
        machine.rules = None;
        machine.fail(1).unwrap();
        let mirror = machine.mirror();
        let member = mirror::control::MemberRef::Slot(1);
        let removed = machine
            .world
            .block_on(async move { mirror.remove(&member, false).await });
        let Ok(_) = removed else { continue };
        let table = |m: &Machine| {
            let mut b = vec![0; 64 * 4096];
            m.disks[1].read_now(at, &mut b);
            b
        };
        let before = table(&machine);
        seconds(&machine, 20);
        if table(&machine) != before {
            bad += 1;
        }
    }
    assert_eq!(bad, 0, "written to after it was removed");
}

/// An application's read does not wait for a joiner that hangs.
#[test]
fn a_read_does_not_wait_for_a_joiner() {
    let mut machine = machine(1, 2);
    machine.start();
    for extent in 0..8 {
        wr(&machine, extent << 22, 65536);
    }
    seconds(&machine, COOL);
    for extent in 0..8 {
        wr(&machine, (extent << 22) + 8192, 4096);
    }
    fl(&machine);
    machine.fail(1).unwrap();
    seconds(&machine, COOL);
    rd(&machine, 7 << 22, 4096).unwrap();
    rd(&machine, 6 << 22, 4096).unwrap();
    let superblock = superblock_on(&machine.disks[1]).unwrap();
    let at = sums::page_offset(&superblock, Extent(0));
    let (mirror, disk) = (machine.mirror(), machine.disks[1].clone());
    let back = async move { mirror.re_add("disk1".into(), disk, Return::DELTA).await };
    machine.world.spawn_task(async move {
        let _ = back.await;
    });
    let disk = machine.disks[1].clone();
    assert!(
        machine
            .world
            .run(1_000_000, || disk.is_under_way(at, 64 * 4096))
    );
    disk.set_faults(Faults {
        hang: true,
        ..none()
    });
    let host = SimHost(machine.world.clone());
    let begun = host.now();
    rd(&machine, 0, 4096).unwrap();
    let took = host.now() - begun;
    assert!(took < std::time::Duration::from_secs(6));
}

/// One page that cannot be written on the only in-sync member keeps one extent hot, no other.
#[test]
fn one_bad_page_holds_up_no_other() {
    struct Watch(u64);
    impl Observer for Watch {
        fn submitted(&self, disk: &SimDisk, request: &DiskRequest<SimBuffer>) {
            let bad = matches!(request, DiskRequest::Write { offset, span, .. }
                if *offset <= self.0 && self.0 < offset + span.len as u64);
            disk.set_faults(Faults {
                writes: bad,
                ..none()
            });
        }
        fn completed(&self, _: &SimDisk, _: &DiskRequest<SimBuffer>) {}
    }
    let mut machine = machine(1, 2);
    machine.start();
    machine.fail(1).unwrap();
    let superblock = superblock_on(&machine.disks[0]).unwrap();
    let at = sums::page_offset(&superblock, Extent(14));
    machine.rules = None;
    machine.disks[0].observe(Some(Rc::new(Watch(at))));
    wr(&machine, 0, 4096);
    for extent in 1..8 {
        wr(&machine, extent << 23, 4096);
    }
    seconds(&machine, 120);
    let hot = machine.mirror().status().extents.hot;
    machine.stop().unwrap();
    assert!(hot <= 1);
}
