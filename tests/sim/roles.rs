//! Handing over and promotion, and the end of a split brain: who may go on alone, and what is
//! copied afterwards.

use crate::machine::{Machine, SimMirror, path, superblock_on};
use crate::older_images::seconds;
use crate::oracle::Caches;
use crate::races::{fl, wr};
use mirror::control::{MemberRef, MemberState, ResyncKind};
use mirror::engine::Return;
use mirror::sim::{Faults, SimHost};
use mirror::superblock::SlotState;
use mirror::{Host, Span, StartError, StartOptions};
use std::cell::RefCell;
use std::rc::Rc;

const SIZE: u64 = 64 << 20;
const EXTENT: u64 = 4 << 20;
const DISCARDS: Return = Return {
    full: false,
    discard_changes: true,
    dry_run: false,
};

impl Machine {
    /// Promotes the disks in `slots`: a start, also without those that have handed over.
    pub(crate) fn promote(&mut self, slots: &[usize]) -> Result<(), StartError> {
        let (candidates, host) = (self.candidates(slots), SimHost(self.world.clone()));
        let options = StartOptions {
            promote: true,
            ..self.options(false)
        };
        self.end_rules();
        let start = SimMirror::start(Rc::new(host), candidates, options);
        self.mirror = Some(self.world.block_on(start)?);
        Ok(())
    }

    /// Starts on some of the disks; `gone` disappears after so many operations.
    pub(crate) fn start_while_one_goes(
        &mut self,
        slots: &[usize],
        gone: usize,
        operations: u64,
    ) -> Result<(), StartError> {
        let (candidates, host) = (self.candidates(slots), SimHost(self.world.clone()));
        let started = Rc::new(RefCell::new(None));
        let (to, options) = (started.clone(), self.options(false));
        self.end_rules();
        self.world.spawn_task(async move {
            let start = SimMirror::start(Rc::new(host), candidates, options).await;
            *to.borrow_mut() = Some(start);
        });
        let disk = self.disks[gone].clone();
        let until = disk.operations() + operations;
        let is_over = || started.borrow().is_some();
        self.world
            .run(1_000_000, || is_over() || disk.operations() >= until);
        disk.set_faults(Faults {
            gone: true,
            ..Faults::default()
        });
        self.world.run(1_000_000, is_over);
        let started = started.borrow_mut().take();
        self.mirror = Some(started.unwrap()?);
        Ok(())
    }

    /// A clean stop that lets the member in `slot` go on alone.
    pub(crate) fn hand_over(&mut self, slot: u8) -> Result<String, mirror::ControlError> {
        let mirror = self.mirror.take().unwrap();
        let begun = self.oracle.borrow_mut().begin_flush();
        let result = self
            .world
            .block_on(async move { mirror.hand_over(slot).await });
        if result.is_ok() {
            self.oracle.borrow_mut().flushed(begun);
        }
        self.oracle.borrow_mut().crash(Caches::Kept);
        self.replace_machine();
        result
    }
}

/// A mirror that runs and has written something.
fn running(seed: u64, members: usize) -> Machine {
    let mut machine = if seed.is_multiple_of(3) {
        Machine::new(seed, members, SIZE)
    } else {
        Machine::with_checksums(seed, members, SIZE)
    };
    machine.start();
    for extent in 0..3 {
        wr(&machine, extent * EXTENT + 8192, 65536);
    }
    machine
}

/// A write that the oracle does not know of, on the side that is given up.
fn write_apart(machine: &Machine, offset: u64, len: usize) {
    let (mirror, host) = (machine.mirror(), SimHost(machine.world.clone()));
    machine.world.block_on(async move {
        let buffer = host.allocate(len);
        mirror::Buffer::fill(&buffer, |bytes| bytes.fill(0xa9));
        mirror
            .write(offset, Span::whole(buffer), true)
            .await
            .unwrap();
    });
}

#[test]
fn who_was_handed_over_to_goes_on_alone_and_the_others_come_back_by_delta() {
    for seed in 0..12 {
        let mut machine = running(seed, 2 + seed as usize % 2);
        let others: Vec<usize> = (0..machine.disks.len()).filter(|&slot| slot != 1).collect();
        wr(&machine, 5 * EXTENT, 4096);
        machine.hand_over(1).unwrap();
        for slots in [&others[..], &[1][..]] {
            let refused = machine.start_on(slots, false).unwrap_err();
            assert!(refused.to_string().contains("may hold newer"), "{refused}");
        }
        let refused = machine.promote(&others).unwrap_err();
        assert!(refused.to_string().contains("may hold newer"), "{refused}");
        machine.promote(&[1]).unwrap();
        machine.check_all("after a promotion");
        wr(&machine, EXTENT + 4096, 4096);
        for slot in others {
            machine.re_add(slot).unwrap();
            let mirror = machine.mirror();
            let back = || mirror.status().members[slot].state == MemberState::InSync;
            assert!(machine.run_coarsely(back), "slot {slot} is not back");
            let resync = machine.mirror().status().last_resync.unwrap();
            assert_eq!(resync.kind, ResyncKind::Delta);
            assert!(resync.copied_bytes <= 8192, "{resync:?}");
        }
        machine.check_all("with all back");
        machine.compare_members();
    }
}

/// Cut off anywhere, handing over leaves a mirror that starts with everybody, and whoever may go
/// on alone holds everything.
#[test]
fn handing_over_that_is_cut_off_leaves_one_mirror() {
    let mut promoted = 0;
    for cut in 0..80 {
        let mut machine = running(cut, 2);
        let mirror = machine.mirror();
        machine.world.spawn_task(async move {
            let _ = mirror.hand_over(1).await;
        });
        let begun = machine.operations();
        machine
            .world
            .run(1_000_000, || machine.operations() >= begun + cut);
        machine.cut_power();
        if machine.promote(&[1]).is_ok() {
            promoted += 1;
        } else {
            machine.start();
        }
        machine.check_all(&format!("cut after {cut}"));
        wr(&machine, 0, 4096);
    }
    assert!(promoted > 0 && promoted < 80, "{promoted} were promoted");
}

/// A start with everybody is cut off anywhere, or loses the member that was handed over to: that
/// one never goes on alone with what is older than what was acknowledged.
#[test]
fn a_start_takes_the_permission_before_it_answers() {
    let mut started = 0;
    for cut in 0..60 {
        let mut machine = running(cut, 2);
        machine.hand_over(1).unwrap();
        if cut % 3 == 0 {
            machine.start_cut_short(cut / 3);
            machine.cut_power();
            // Nothing was answered: either is right.
            if machine.promote(&[1]).is_err() {
                machine.start();
            }
        } else {
            if machine.start_while_one_goes(&[0, 1], 1, cut).is_err() {
                continue;
            }
            wr(&machine, 0, 4096);
            fl(&machine);
            machine.cut_power();
            machine.disks[1].set_faults(Faults::default());
            started += 1;
            let refused = machine.promote(&[1]).unwrap_err();
            assert!(refused.to_string().contains("may hold newer"), "{refused}");
            machine.start_on(&[0], false).unwrap();
        }
        machine.check_all(&format!("cut after {cut}"));
    }
    assert!(started > 0, "no start got through");
}

/// Two that went on alone; the second gives up what it has changed, also when it crashed, and in
/// extents that only it has in use.
fn parted(seed: u64) -> Machine {
    let mut machine = running(seed, 2);
    if seed.is_multiple_of(5) {
        // What an earlier join has left in the records is no hindrance.
        machine.fail(1).unwrap();
        wr(&machine, 7 * EXTENT, 4096);
        machine.re_add(1).unwrap();
        machine.wait_in_sync();
    }
    machine.stop().unwrap();
    machine.start_on(&[1], true).unwrap();
    let mirror = machine.mirror();
    machine
        .world
        .block_on(async move { mirror.discard(0, EXTENT).await.unwrap() });
    write_apart(&machine, EXTENT + 16384, 4096);
    write_apart(&machine, 9 * EXTENT + 4096, 4096);
    if seed.is_multiple_of(2) {
        machine.stop().unwrap();
    } else {
        // What is under way when its power goes belongs to it as well.
        write_apart(&machine, 2 * EXTENT + 8192, 65536);
        let disk = machine.disks[1].clone();
        machine.kill_daemon();
        machine.replace_disk(1, disk.reopen());
    }
    machine.start_on(&[0], true).unwrap();
    wr(&machine, 32768, 4096);
    fl(&machine);
    let refused = machine.re_add(1).unwrap_err();
    assert!(refused.message.contains("split brain"), "{refused}");
    machine
}

fn gives_up(machine: &Machine) -> Result<String, mirror::ControlError> {
    let (mirror, disk) = (machine.mirror(), machine.disks[1].clone());
    machine
        .world
        .block_on(async move { mirror.re_add(path(1), disk, DISCARDS).await })
}

#[test]
fn who_gives_up_its_changes_gets_only_what_differs() {
    for seed in 0..12 {
        let machine = &mut parted(seed);
        gives_up(machine).unwrap();
        machine.wait_in_sync();
        let resync = machine.mirror().status().last_resync.unwrap();
        assert_eq!(resync.kind, ResyncKind::Delta);
        // What one side has discarded, and a block of each, or what was hot when the power went.
        let most = EXTENT + if seed % 2 == 0 { 8192 } else { 3 * EXTENT };
        assert!(
            resync.copied_bytes + resync.zeroed_bytes <= most,
            "{resync:?}"
        );
        machine.check_all("after the split brain");
        // Beside a first write into what only the other side had in use there are zeroes.
        wr(machine, 9 * EXTENT + 65536, 4096);
        machine.check_all("beside a first write");
        machine.fail(0).unwrap();
        machine.check_all("from the one that gave up");
        let (mirror, host) = (machine.mirror(), SimHost(machine.world.clone()));
        let zero = machine.world.block_on(async move {
            let buffer = host.allocate(8192);
            let span = Span::whole(buffer);
            mirror.read(9 * EXTENT, span.clone()).await.unwrap();
            let mut zero = false;
            span.read(|bytes| zero = bytes.iter().all(|&byte| byte == 0));
            zero
        });
        assert!(zero, "the other side's data shows");
    }
}

/// Its writes since the image are in no map of either side.
#[test]
fn who_was_put_back_before_it_went_on_alone_gets_everything() {
    for (seed, restored) in [(1, 0), (2, 1), (4, 0), (5, 1)] {
        let mut machine = running(seed, 2);
        machine.stop().unwrap();
        let image = machine.disks[restored].image();
        machine.start();
        for write in 0..6 {
            wr(&machine, EXTENT + write * 65536, 4096);
            fl(&machine);
            seconds(&machine, 2);
        }
        machine.stop().unwrap();
        let other = 1 - restored;
        if other == 1 {
            machine.start_on(&[1], true).unwrap();
            write_apart(&machine, 9 * EXTENT, 4096);
            machine.stop().unwrap();
            machine.replace_disk(0, image);
            machine.start_on(&[0], true).unwrap();
        } else {
            machine.start_on(&[0], true).unwrap();
            wr(&machine, 10 * EXTENT, 4096);
            machine.stop().unwrap();
            let newest = machine.disks[0].clone();
            machine.replace_disk(1, image);
            machine.start_on(&[1], true).unwrap();
            for write in 0..12 {
                write_apart(&machine, 9 * EXTENT + write * 65536, 4096);
                seconds(&machine, 2);
            }
            machine.stop().unwrap();
            machine.replace_disk(0, newest);
            machine.start_on(&[0], true).unwrap();
        }
        let refused = gives_up(&machine).unwrap_err();
        assert!(refused.message.contains("put back"), "{refused}");
        machine
            .re_add_disk(path(1), machine.disks[1].clone(), true)
            .unwrap();
        machine.wait_in_sync();
        machine.compare_members();
    }
}

/// Cut off anywhere: it never comes back by less than what differs, and never starts by itself.
#[test]
fn giving_up_that_is_cut_off_begins_again() {
    let mut again = 0;
    for cut in 0..80 {
        let mut machine = parted(cut);
        let (mirror, disk) = (machine.mirror(), machine.disks[1].clone());
        machine.world.spawn_task(async move {
            let _ = mirror.re_add(path(1), disk, DISCARDS).await;
        });
        let begun = machine.disks[1].operations();
        let disk = machine.disks[1].clone();
        machine
            .world
            .run(1_000_000, || disk.operations() >= begun + cut / 2);
        machine.cut_power();
        assert!(
            superblock_on(&machine.disks[1]).is_some(),
            "cut after {cut}"
        );
        machine.start_on(&[0], true).unwrap();
        if machine.mirror().status().members[1].state != MemberState::InSync
            && machine.re_add(1).is_err()
        {
            again += 1;
            let how = Return {
                full: true,
                ..DISCARDS
            };
            let (mirror, disk) = (machine.mirror(), machine.disks[1].clone());
            let back = machine
                .world
                .block_on(async move { mirror.re_add(path(1), disk, how).await });
            back.unwrap();
        }
        machine.wait_in_sync();
        machine.check_all(&format!("cut after {cut}"));
        machine.compare_members();
    }
    assert!(
        again > 0 && again < 80,
        "{again} times it had to begin again"
    );
}

/// A full resync that was cut off has overwritten the member's maps: it serves no more.
#[test]
fn who_was_given_up_does_not_start_alone() {
    let mut refusals = 0;
    for cut in 0..40 {
        let mut machine = parted(cut);
        let (mirror, disk) = (machine.mirror(), machine.disks[1].clone());
        machine.world.spawn_task(async move {
            let _ = mirror.re_add(path(1), disk, Return::FULL).await;
        });
        let written = machine.disks[1].operations();
        let disk = machine.disks[1].clone();
        machine
            .world
            .run(1_000_000, || disk.operations() >= written + cut);
        machine.cut_power();
        let marked = superblock_on(&machine.disks[1]).unwrap();
        let own = marked.own_record();
        if own.full && own.state == SlotState::InSync {
            refusals += 1;
            let refused = machine.start_on(&[1], true).unwrap_err();
            assert!(refused.to_string().contains("cut off"), "{refused}");
            let refused = machine.start_on(&[1], false).unwrap_err();
            assert!(refused.to_string().contains("cut off"), "{refused}");
        }
    }
    assert!(refusals > 0, "no cut came between");
}

/// Once a member may go on alone nobody loses it any more: those that stay would start without it.
#[test]
fn after_handing_over_there_is_no_round() {
    for seed in 0..6 {
        let machine = running(seed, 2);
        let mirror = machine.mirror();
        let handing = mirror.clone();
        machine
            .world
            .block_on(async move { handing.hand_over(1).await })
            .unwrap();
        machine.world.spawn_task(async move {
            let _ = mirror.fail(&MemberRef::Slot(1)).await;
        });
        machine.world.run(10_000, || false);
        let here = superblock_on(&machine.disks[0]).unwrap();
        assert_eq!(here.slots[1].state, SlotState::InSync, "seed {seed}");
        assert!(superblock_on(&machine.disks[1]).unwrap().handed_over);
    }
}

/// Who is away may return by itself; not who was failed, also not after a restart.
#[test]
fn who_was_failed_waits_for_the_operator() {
    let mut machine = running(1, 2);
    machine.stop().unwrap();
    machine.start_on(&[0], true).unwrap();
    assert_eq!(machine.mirror().may_return(), [path(1)]);
    machine.re_add(1).unwrap();
    machine.wait_in_sync();
    assert!(machine.mirror().may_return().is_empty());
    machine.fail(1).unwrap();
    assert!(machine.mirror().may_return().is_empty());
    machine.stop().unwrap();
    machine.start_on(&[0], false).unwrap();
    assert!(machine.mirror().may_return().is_empty());
}
