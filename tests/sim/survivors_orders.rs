//! Operators' orders and what they are told: every answer says what has been done, and to whom.

use crate::machine::{Machine, path, superblock_on};
use crate::older_images::{seconds, states, write_and_flush};
use crate::races::{fl, flushes, none, wr};
use mirror::ControlError;
use mirror::control::{ErrorKind, MemberRef, MemberState, MirrorState};
use mirror::sim::Faults;
use mirror::superblock::SlotState;

const SIZE: u64 = 64 << 20;

fn started(members: usize) -> Machine {
    let mut machine = Machine::new(1, members, SIZE);
    machine.start();
    wr(&machine, 0, 65536);
    machine
}

fn fail(machine: &Machine, member: MemberRef) -> Result<String, ControlError> {
    let mirror = machine.mirror();
    machine
        .world
        .block_on(async move { mirror.fail(&member).await })
}

fn remove(machine: &Machine, member: MemberRef, force: bool) -> Result<String, ControlError> {
    let mirror = machine.mirror();
    machine
        .world
        .block_on(async move { mirror.remove(&member, force).await })
}

fn clear_flush_error(machine: &Machine) -> Result<String, ControlError> {
    let mirror = machine.mirror();
    machine
        .world
        .block_on(async move { mirror.clear_flush_error().await })
}

fn hanging() -> Faults {
    Faults {
        hang: true,
        ..none()
    }
}

#[test]
fn a_member_is_named_by_its_slot_or_its_path() {
    let machine = started(3);
    let unknown = fail(&machine, MemberRef::Path("elsewhere".into())).unwrap_err();
    assert_eq!(unknown.kind, ErrorKind::NotFound);
    assert!(unknown.message.contains("disk0, disk1, disk2"), "{unknown}");
    let beyond = fail(&machine, MemberRef::Slot(3)).unwrap_err();
    assert_eq!(beyond.kind, ErrorKind::NotFound, "{beyond}");
    let done = fail(&machine, MemberRef::Path(path(1))).unwrap();
    assert!(
        done.starts_with("disk1 (slot 1) is out of service"),
        "{done}"
    );
    assert_eq!(states(&machine)[1], MemberState::Faulty);
    let done = fail(&machine, MemberRef::Slot(2)).unwrap();
    assert!(
        done.starts_with("disk2 (slot 2) is out of service"),
        "{done}"
    );
    let last = fail(&machine, MemberRef::Slot(0)).unwrap_err();
    assert_eq!(last.kind, ErrorKind::Refused);
    assert!(last.message.starts_with("disk0 is the last"), "{last}");
    // Nothing of the refusal stays: it is in service, and the others come back.
    machine.re_add(1).unwrap();
    let mirror = machine.mirror();
    machine.run_coarsely(|| mirror.status().members[1].state == MemberState::InSync);
    assert_eq!(states(&machine)[..2], [MemberState::InSync; 2]);
    fail(&machine, MemberRef::Slot(0)).unwrap();
}

#[test]
fn only_what_is_out_of_service_is_removed_without_force() {
    let machine = started(2);
    let refused = remove(&machine, MemberRef::Slot(1), false).unwrap_err();
    assert_eq!(refused.kind, ErrorKind::Refused);
    assert!(
        refused.message.starts_with("disk1 is in service"),
        "{refused}"
    );
    assert_eq!(states(&machine)[1], MemberState::InSync);
    fail(&machine, MemberRef::Slot(1)).unwrap();
    let removed = remove(&machine, MemberRef::Slot(1), false).unwrap();
    assert!(
        removed.starts_with("disk1 (slot 1) is removed"),
        "{removed}"
    );
    assert!(!machine.mirror().status().members[1].attached);
    machine.re_add(1).unwrap();
    machine.wait_in_sync();
    let removed = remove(&machine, MemberRef::Slot(1), true).unwrap();
    assert!(
        removed.starts_with("disk1 (slot 1) is removed"),
        "{removed}"
    );
    assert_eq!(states(&machine)[1], MemberState::Missing);
    let record = superblock_on(&machine.disks[0]).unwrap().slots[1].clone();
    assert_eq!(record.state, SlotState::Missing);
    assert!(record.loss.unwrap().block_exact);
}

/// A disk that owes answers is not let go of, and is counted.
#[test]
fn a_member_that_owes_answers_is_busy() {
    let machine = started(2);
    machine.disks[1].set_faults(hanging());
    wr(&machine, 8192, 4096);
    assert_eq!(states(&machine)[1], MemberState::Faulty);
    let status = machine.mirror().status().members[1].clone();
    assert!(status.attached && status.orphans > 0, "{status:?}");
    let busy = remove(&machine, MemberRef::Slot(1), false).unwrap_err();
    assert_eq!(busy.kind, ErrorKind::Busy, "{busy}");
    let busy = machine.re_add(1).unwrap_err();
    assert_eq!(busy.kind, ErrorKind::Busy, "{busy}");
    machine.disks[1].set_faults(none());
    let mirror = machine.mirror();
    assert!(machine.run_coarsely(|| !mirror.status().members[1].attached));
    assert_eq!(mirror.status().members[1].orphans, 0);
    remove(&machine, MemberRef::Slot(1), false).unwrap();
    machine.re_add(1).unwrap();
    machine.wait_in_sync();
    machine.compare_members();
}

/// What the operator takes out is flushed first, so that it comes back with nothing to copy.
#[test]
fn a_member_taken_out_on_purpose_misses_nothing() {
    let machine = started(2);
    machine.fail(1).unwrap();
    assert_eq!(machine.mirror().status().members[1].missed_bytes, 0);
    machine.re_add(1).unwrap();
    machine.wait_in_sync();
    let resync = machine.mirror().status().last_resync.unwrap();
    assert_eq!((resync.copied_bytes, resync.zeroed_bytes), (0, 0));
    machine.compare_members();
}

#[test]
fn a_failed_flush_is_cleared_by_order() {
    let machine = started(2);
    let nothing = clear_flush_error(&machine).unwrap();
    assert!(nothing.contains("nothing to clear"), "{nothing}");
    for disk in &machine.disks {
        disk.set_faults(flushes());
    }
    let client = machine.client();
    let failed = machine.world.block_on(async move { client.flush().await });
    assert!(failed.is_err());
    assert!(machine.mirror().status().flush_error);
    for disk in &machine.disks {
        disk.set_faults(Faults {
            writes: true,
            ..none()
        });
    }
    let failed = clear_flush_error(&machine).unwrap_err();
    assert_eq!(failed.kind, ErrorKind::Failed);
    assert!(failed.message.contains("nothing is cleared"), "{failed}");
    assert!(machine.mirror().status().flush_error);
    for disk in &machine.disks {
        disk.set_faults(none());
    }
    seconds(&machine, 5);
    let client = machine.client();
    machine.world.block_on(async move {
        client.clear_flush_error().await;
        client.flush().await.unwrap();
    });
    assert!(!machine.mirror().status().flush_error);
    let nothing = clear_flush_error(&machine).unwrap();
    assert!(nothing.contains("nothing to clear"), "{nothing}");
}

/// What the failed flush covered is on every member, durably, before the error is cleared.
#[test]
fn what_a_failed_flush_covered_is_written_again_before_it_is_cleared() {
    for seed in 0..20 {
        let mut machine = Machine::new(seed, 2, SIZE);
        machine.start();
        wr(&machine, 0, 65536);
        wr(&machine, 9 << 22, 65536);
        for disk in &machine.disks {
            disk.set_faults(flushes());
        }
        let client = machine.client();
        let failed = machine.world.block_on(async move { client.flush().await });
        assert!(failed.is_err());
        for disk in &machine.disks {
            disk.set_faults(none());
        }
        clear_flush_error(&machine).unwrap();
        for offset in [0, 9 << 22] {
            let copies: Vec<_> = machine
                .disks
                .iter()
                .map(|disk| disk.settled(machine.data_offset + offset, 65536))
                .collect();
            assert!(copies[0].is_some() && copies[0] == copies[1], "seed {seed}");
        }
    }
}

#[test]
fn the_status_says_what_is() {
    let mut machine = started(2);
    let status = machine.mirror().status();
    assert_eq!(status.state, MirrorState::InSync);
    assert_eq!((status.size_bytes, status.logical_block_bytes), (SIZE, 512));
    assert_eq!(machine.mirror().size_bytes(), SIZE);
    assert_eq!(machine.mirror().logical_block_bytes(), 512);
    assert_eq!(status.extents.hot_budget, 16384);
    let members: Vec<_> = status
        .members
        .iter()
        .map(|m| (m.slot, m.attached))
        .collect();
    assert_eq!(members, [(0, true), (1, true)]);
    let client = machine.client();
    machine.world.block_on(async move {
        client.read(0, 8192).await.unwrap();
        client.flush().await.unwrap();
        client.write_zeroes(0, 4096, false).await.unwrap();
        client.discard_extent(5).await.unwrap();
        client.mirror.discard(4 << 20, 4096).await.unwrap();
        client
            .mirror
            .write_zeroes(SIZE, 512, false)
            .await
            .unwrap_err();
        client.read_raw(SIZE - 512, 1024).await.unwrap_err();
        client.read_raw(256, 512).await.unwrap_err();
        client.read_raw(512, 256).await.unwrap_err();
    });
    let io = machine.mirror().status().io;
    assert_eq!((io.reads, io.read_bytes), (1, 8192));
    assert_eq!((io.writes, io.written_bytes), (1, 65536));
    assert_eq!((io.flushes, io.discards), (1, 3));
    assert!(io.map_commits > 0);
    assert_eq!(io.extents_zeroed, 1);
    machine.fail(1).unwrap();
    wr(&machine, 8192, 8192);
    let status = machine.mirror().status();
    assert_eq!(status.state, MirrorState::Degraded);
    assert_eq!(status.members[1].missed_bytes, 8192);
    assert_eq!(
        status.members[1].reason.as_deref(),
        Some("failed by the operator")
    );
    for extent in 2..10 {
        wr(&machine, extent << 22, 1 << 20);
    }
    let missed = machine.mirror().status().members[1].missed_bytes;
    // Each extent that was used for the first time without it is missed as a whole.
    assert_eq!(missed, 8192 + (8 << 22));
    machine.re_add(1).unwrap();
    let status = machine.mirror().status();
    assert_eq!(status.state, MirrorState::Resyncing);
    assert_eq!(status.resync.unwrap().remaining_bytes, missed);
    machine.wait_in_sync();
    let status = machine.mirror().status();
    assert_eq!(status.state, MirrorState::InSync);
    assert_eq!(status.members[1].reason, None);
    let resync = status.last_resync.unwrap();
    assert_eq!((resync.slot, resync.finished), (1, true));
    assert_eq!(resync.remaining_bytes, 0);
    assert!(resync.elapsed_ms > 0 && resync.stalled.is_none());
    assert_eq!(resync.copied_bytes, 8192 + (8 << 20));
    assert_eq!(resync.zeroed_bytes, 8 * (3 << 20));
    machine.compare_members();
    machine.stop().unwrap();
}

/// A resync that moves nothing for a while says so, and why; and no more when it goes on.
#[test]
fn a_resync_that_stands_still_is_reported() {
    let machine = started(2);
    for extent in 0..8 {
        wr(&machine, extent << 22, 1 << 20);
    }
    fl(&machine);
    machine.fail(1).unwrap();
    for extent in 0..8 {
        wr(&machine, extent << 22, 1 << 20);
    }
    machine.disks[0].set_faults(Faults {
        reads: true,
        ..none()
    });
    machine.re_add(1).unwrap();
    let stalled = || {
        let resync = machine.mirror().status().resync;
        resync.and_then(|resync| resync.stalled)
    };
    seconds(&machine, 5);
    assert_eq!(states(&machine)[1], MemberState::Resyncing);
    assert_eq!(stalled(), None, "too early to say");
    seconds(&machine, 8);
    let says = stalled().unwrap();
    assert!(says.contains("nothing could be copied lately"), "{says}");
    machine.disks[0].set_faults(none());
    machine.wait_in_sync();
    let resync = machine.mirror().status().last_resync.unwrap();
    assert_eq!(resync.stalled, None);
    machine.compare_members();
}

/// A stop while a member resyncs: the next start goes on with it.
#[test]
fn a_resync_goes_on_after_a_stop() {
    for seed in 0..6 {
        let mut machine = Machine::new(seed, 2, SIZE);
        machine.start();
        for extent in 0..8 {
            wr(&machine, extent << 22, 1 << 20);
        }
        machine.fail(1).unwrap();
        for extent in 0..8 {
            wr(&machine, extent << 22, 1 << 20);
        }
        machine.re_add(1).unwrap();
        machine.world.run(seed * 30, || false);
        machine.stop().unwrap();
        machine.start();
        let mirror = machine.mirror();
        let in_sync = || mirror.status().members[1].state == MemberState::InSync;
        assert!(machine.run_coarsely(in_sync), "seed {seed}");
        machine.compare_members();
        write_and_flush(&machine);
        machine.check_all("in the end");
    }
}
