//! Disks that refuse writes, or hang over them: what they may have in their caches all the same,
//! what must still be known of the blocks afterwards, and who is lost.

use crate::checksums::{COOL, check, content, machine, rd, rot};
use crate::double_faults::faults;
use crate::machine::{Machine, path};
use crate::older_images::{seconds, states};
use crate::play::bring_all_back;
use crate::races::{flushes, none, seeds, wr};
use mirror::control::{MemberRef, MemberState};
use mirror::scrub_log::{Done, What};
use mirror::sim::{Faults, SimHost, WriteFault};
use mirror::{Errno, Host as _};
use std::time::Duration;

const WRITES: Faults = Faults {
    writes: true,
    reads: false,
    flushes: false,
    hang: false,
    gone: false,
};

pub(crate) fn refuse_writes(machine: &Machine) {
    faults(machine, WRITES);
}

pub(crate) fn write(machine: &Machine, offset: u64) -> Result<(), Errno> {
    let client = machine.client();
    machine
        .world
        .block_on(async move { client.write(offset, 4096, false).await })
}

/// An extent that could not be recorded as hot, and was called hot by a later commit: its
/// checksums are believed after a clean stop. With one member left nothing else tells rot.
#[test]
fn a_write_that_was_refused_takes_no_checksums_along() {
    for seed in seeds(24) {
        let mut machine = machine(seed, 2);
        machine.start();
        wr(&machine, 0, 65536);
        seconds(&machine, COOL);
        refuse_writes(&machine);
        assert!(write(&machine, 8 * 4096).is_err(), "seed {seed}");
        faults(&machine, none());
        if seed % 3 == 1 {
            write(&machine, 8 * 4096).unwrap();
        }
        if seed % 2 == 0 {
            seconds(&machine, COOL);
        }
        machine.fail(1).unwrap();
        machine.stop().unwrap();
        rot(&machine, 0, 3);
        machine.start();
        let read = rd(&machine, 3 * 4096, 4096);
        assert_eq!(read, Err(Errno::IO), "seed {seed}");
        rd(&machine, 4 * 4096, 4096).unwrap();
    }
}

/// Equalising is refused, and some caches have what was to be written: it is durable before the
/// extent is cool (R3, which the rules of the machine watch).
#[test]
fn what_equalising_left_in_caches_is_flushed() {
    for seed in seeds(200) {
        let mut machine = machine(seed, 3);
        machine.start();
        wr(&machine, 0, 65536);
        machine.cut_power();
        machine.start();
        refuse_writes(&machine);
        // The source of a copy goes while it is copied: then nobody else has it for certain.
        let mirror = machine.mirror();
        machine
            .world
            .spawn_task(async move { drop(mirror.fail(&MemberRef::Slot(0)).await) });
        seconds(&machine, 10);
        faults(&machine, none());
        seconds(&machine, 2 * COOL);
        rd(&machine, 0, 65536).unwrap();
    }
}

/// A copy that cannot be rewritten costs its member its place; the report says what was wrong.
#[test]
fn a_rewrite_that_fails_is_reported_with_what_was_wrong() {
    for seed in seeds(16) {
        let mut machine = machine(seed, 2 + (seed % 2) as usize);
        machine.start();
        wr(&machine, 0, 65536);
        seconds(&machine, COOL);
        let good = content(&machine, 1, 3);
        let at = machine.data_offset + 3 * 4096;
        let what = if seed % 4 < 2 {
            machine.disks[0].spoil(at + 512);
            What::Unreadable
        } else {
            rot(&machine, 0, 3);
            What::ChecksumFailed
        };
        machine.disks[0].set_write_fault(Some(WriteFault {
            offset: at,
            len: 4096,
            hangs: false,
        }));
        check(&machine, 0, true);
        assert_ne!(states(&machine)[0], MemberState::InSync, "seed {seed}");
        {
            let mirror = machine.mirror();
            let log = mirror.scrub_log();
            let found: Vec<_> = log.findings();
            assert_eq!(found.len(), 1, "seed {seed}: {found:?}");
            let found = found[0];
            assert_eq!(
                (found.slot, found.what, found.done),
                (Some(0), what, Done::MemberFailed),
                "seed {seed}"
            );
            assert_eq!(found.blocks, 3..4);
        }
        rd(&machine, 0, 65536).unwrap();
        assert_eq!(content(&machine, 1, 3), good);
    }
}

/// A member that does not answer an equalising write is lost at the deadline (R13): nobody waits
/// longer, and what it does late strikes nothing.
#[test]
fn a_member_that_hangs_over_an_equalising_write_is_lost() {
    let mut lost = 0;
    for seed in seeds(40) {
        let mut machine = machine(seed, 2 + (seed % 2) as usize);
        machine.start();
        wr(&machine, 0, 65536);
        machine.cut_power();
        let fault = WriteFault {
            offset: machine.data_offset,
            len: 65536,
            hangs: true,
        };
        machine.disks[1].set_write_fault(Some(fault));
        machine.start();
        rd(&machine, 0, 65536).unwrap();
        let state = states(&machine)[1];
        lost += u32::from(state != MemberState::InSync);
        wr(&machine, 0, 65536);
        machine.disks[1].set_write_fault(None);
        seconds(&machine, 20);
        rd(&machine, 0, 65536).unwrap();
        assert_eq!(states(&machine)[0], MemberState::InSync, "seed {seed}");
        machine.stop().unwrap();
    }
    assert!(lost > 0, "no copy differed");
}

/// Equalising is refused while somebody reads: an answer is durable on every member, or it could
/// be another one after a crash (R5).
#[test]
fn a_read_is_not_answered_from_caches_alone() {
    let mut answered = 0;
    for seed in seeds(100) {
        let mut machine = machine(seed, 2);
        machine.start();
        wr(&machine, 0, 16384);
        machine.cut_power();
        machine.start();
        refuse_writes(&machine);
        for turn in 0..30 {
            if turn == 20 {
                faults(&machine, none());
            }
            if rd(&machine, 0, 16384).is_err() {
                continue;
            }
            answered += 1;
            let members = machine.disks.iter().zip(states(&machine));
            for (disk, _) in members.filter(|(_, state)| *state == MemberState::InSync) {
                let durable = disk.settled(machine.data_offset, 16384);
                assert!(durable.is_some(), "seed {seed}");
            }
        }
    }
    assert!(answered > 0, "no read was answered");
}

/// The only in-sync member has crashed, and takes neither flushes nor, in every other case, writes
/// any more: what it has is answered, and copied to a new disk (R8), once it writes again.
#[test]
fn an_only_member_that_does_not_flush_is_read() {
    for seed in seeds(40) {
        let mut machine = machine(seed, 2);
        machine.start();
        wr(&machine, 0, 65536);
        machine.fail(1).unwrap();
        wr(&machine, 8192, 65536);
        if seed % 4 < 2 {
            machine.kill_daemon();
        } else {
            machine.cut_power();
        }
        machine.start();
        let dying = Faults {
            flushes: true,
            writes: seed % 2 == 0,
            ..none()
        };
        machine.disks[0].set_faults(dying);
        for _ in 0..3 {
            rd(&machine, 0, 131_072).unwrap();
            seconds(&machine, 2);
        }
        if seed % 2 == 0 {
            machine.disks[0].set_faults(Faults {
                writes: false,
                ..dying
            });
        }
        let disk = machine.disks[1].clone();
        machine.re_add_disk(path(1), disk, true).unwrap();
        let back = || machine.mirror().status().members[1].state != MemberState::Resyncing;
        let ended = machine.run_coarsely(back);
        assert!(ended, "seed {seed} {:#?}", machine.mirror().status());
        assert_eq!(states(&machine)[1], MemberState::InSync, "seed {seed}");
    }
}

/// The first extent was written, and is discarded.
fn discard_first(machine: &mut Machine) {
    machine.start();
    wr(machine, 0, 65536);
    seconds(machine, COOL);
    let client = machine.client();
    let discard = async move { client.discard_extent(0).await };
    machine.world.block_on(discard).unwrap();
    seconds(machine, 3);
}

/// A write to the first extent is refused everywhere, then a member is lost over another extent,
/// and the first one cools; which member.
fn refuse_then_lose(machine: &Machine, seed: u64) -> usize {
    refuse_writes(machine);
    assert!(write(machine, 8 * 4096).is_err(), "seed {seed}");
    faults(machine, none());
    let gone = (seed % 2) as usize;
    machine.disks[gone].set_faults(WRITES);
    wr(machine, 5 << 22, 4096);
    assert_ne!(states(machine)[gone], MemberState::InSync, "seed {seed}");
    machine.disks[gone].set_faults(none());
    seconds(machine, COOL);
    gone
}

/// The lost member returns, and has the right checksums without the other one.
fn return_with_checksums(machine: &mut Machine, gone: usize, seed: u64) {
    bring_all_back(machine);
    let checked = check(machine, 0, true);
    assert_eq!(checked.findings, 0, "seed {seed}");
    machine.fail((1 - gone) as u8).unwrap();
    rd(machine, 0, 65536).unwrap();
}

/// A discarded extent cannot be recorded as begun anew; a member is lost over something else, and
/// the extent cools. The member lacks the checksums of zeroes when it returns, until it gets them.
#[test]
fn an_extent_that_could_not_begin_cools_without_a_member() {
    for seed in seeds(24) {
        let mut machine = machine(seed, 2);
        discard_first(&mut machine);
        let gone = refuse_then_lose(&machine, seed);
        return_with_checksums(&mut machine, gone, seed);
    }
}

/// The same where there was no memory to call the extent hot, the first time.
#[test]
fn an_extent_without_room_is_remembered() {
    for seed in seeds(24) {
        // Every fourth seed has memory for three extents.
        let mut machine = machine(seed * 4 + 3, 2);
        discard_first(&mut machine);
        for extent in 1..4 {
            wr(&machine, extent << 22, 4096);
        }
        let gone = refuse_then_lose(&machine, seed);
        refuse_writes(&machine);
        assert!(write(&machine, 8 * 4096).is_err(), "seed {seed}");
        faults(&machine, none());
        seconds(&machine, COOL);
        return_with_checksums(&mut machine, gone, seed);
    }
}

/// An extent whose begin was refused cools in the very moment in which it is written: it is hot
/// on every disk before the data is there (R1, which the rules of the machine watch).
#[test]
fn an_extent_cools_while_it_is_recorded_as_hot() {
    for seed in seeds(120) {
        let mut machine = machine(seed, 2);
        machine.start();
        for extent in 0..3 {
            wr(&machine, extent << 22, 4096);
        }
        seconds(&machine, COOL);
        refuse_writes(&machine);
        for extent in 0..3 {
            assert!(write(&machine, extent << 22).is_err(), "seed {seed}");
        }
        faults(&machine, none());
        for second in 8..14 {
            for extent in 0..3_u64 {
                let client = machine.client();
                let host = SimHost(machine.world.clone());
                machine.world.spawn_task(async move {
                    host.sleep(Duration::from_secs(second)).await;
                    client.write(extent << 22, 4096, false).await.unwrap();
                });
            }
        }
        seconds(&machine, 2 * COOL);
        machine.compare_members();
    }
}

/// A discard that was refused: what is known of the blocks is as before.
#[test]
fn a_discard_that_was_refused_takes_no_checksums_along() {
    for seed in seeds(24) {
        let mut machine = machine(seed, 2);
        machine.start();
        wr(&machine, 0, 65536);
        seconds(&machine, COOL);
        if seed % 3 == 1 {
            wr(&machine, 9 * 4096, 4096);
        }
        refuse_writes(&machine);
        let client = machine.client();
        let discard = async move { client.discard_extent(0).await };
        assert!(machine.world.block_on(discard).is_err(), "seed {seed}");
        faults(&machine, none());
        machine.fail(1).unwrap();
        seconds(&machine, COOL);
        machine.stop().unwrap();
        rot(&machine, 0, 3);
        machine.start();
        let read = rd(&machine, 3 * 4096, 4096);
        assert_eq!(read, Err(Errno::IO), "seed {seed}");
    }
}

/// A flush fails everywhere while blocks are equalised whose equalising was refused before: they
/// are not equal for having been found so (R7; R3 is watched by the rules of the machine).
#[test]
fn a_flush_that_fails_while_blocks_are_equalised() {
    for seed in seeds(400) {
        let mut machine = machine(seed, 2 + (seed % 2) as usize);
        machine.start();
        wr(&machine, 0, 65536);
        machine.cut_power();
        machine.start();
        refuse_writes(&machine);
        let mirror = machine.mirror();
        if seed % 2 == 1 {
            machine
                .world
                .spawn_task(async move { drop(mirror.fail(&MemberRef::Slot(0)).await) });
        }
        machine.world.run(20 + seed * 7, || false);
        faults(&machine, flushes());
        machine.world.run(200 + seed * 5, || false);
        faults(&machine, none());
        seconds(&machine, 2 * COOL);
        let client = machine.client();
        machine
            .world
            .block_on(async move { client.clear_flush_error().await });
        seconds(&machine, 2 * COOL);
        rd(&machine, 0, 65536).unwrap();
        machine.stop().unwrap();
    }
}
