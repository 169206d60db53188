//! Checksums of blocks: that they follow every write, every return and every start, and that what
//! rots is found and made good from the right side.

use crate::machine::{Machine, superblock_on};
use crate::older_images::{drop_all, seconds, states};
use crate::races::{fl, gone, none, seeds, wr};
use crate::rot::repairing;
use crate::sums;
use dirty_map::Extent;
use mirror::Errno;
use mirror::control::MemberState;
use mirror::engine::{CheckOptions, Checked, Return};
use mirror::sim::Faults;

pub(crate) const SIZE: u64 = 64 << 20;
/// How long until what was written is cool.
pub(crate) const COOL: u64 = 15;

/// A mirror with checksums, and memory for them.
pub(crate) fn machine(seed: u64, members: usize) -> Machine {
    Machine::with_checksums(seed, members, SIZE)
}

/// Flips a bit of a block on a disk, behind everybody's back.
pub(crate) fn rot(machine: &Machine, disk: usize, block: u64) {
    spoil(machine, disk, block * 4096 + 512, |sector| sector[100] ^= 4);
}

/// Changes a sector of a disk's data. The rules that watch the disks know nothing of that.
pub(crate) fn spoil(
    machine: &Machine,
    disk: usize,
    offset: u64,
    change: impl FnOnce(&mut [u8; 512]),
) {
    if let Some(rules) = &machine.rules {
        rules.end();
    }
    let mut sector = [0; 512];
    let at = machine.data_offset + offset;
    machine.disks[disk].read_now(at, &mut sector);
    change(&mut sector);
    machine.disks[disk].write_now(at, &sector);
}

pub(crate) fn content(machine: &Machine, disk: usize, block: u64) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    machine.disks[disk].read_now(machine.data_offset + block * 4096, &mut bytes);
    bytes
}

/// Reads through the mirror, held against the oracle.
pub(crate) fn rd(machine: &Machine, offset: u64, len: usize) -> Result<(), Errno> {
    let client = machine.client();
    machine
        .world
        .block_on(async move { client.read(offset, len).await })
}

pub(crate) fn check(machine: &Machine, extent: u32, repair: bool) -> Checked {
    let how = CheckOptions {
        repair,
        ..repairing(extent.is_multiple_of(2))
    };
    check_so(machine, extent, how)
}

pub(crate) fn check_so(machine: &Machine, extent: u32, how: CheckOptions) -> Checked {
    let mirror = machine.mirror();
    machine
        .world
        .block_on(async move { mirror.check_extent(Extent(extent), how).await })
        .unwrap()
}

/// After a stop every block of what was written has a checksum that fits, on every member.
pub(crate) fn all_known(machine: &mut Machine, extents: u64, what: &str) {
    machine.stop().unwrap();
    let tables = sums::check(machine, what);
    let members = machine.disks.len() as u64;
    assert_eq!(
        (tables.known, tables.unknown),
        (extents * members * 1024, 0),
        "{what}"
    );
}

#[test]
fn follow_writes_of_every_kind() {
    for seed in seeds(30) {
        let mut machine = machine(seed, 2);
        machine.start();
        wr(&machine, 0, 1 << 20);
        wr(&machine, 4096, 4096);
        // Parts of blocks, across an extent's end too.
        wr(&machine, 512, 512);
        wr(&machine, 10 * 4096 + 1024, 3 * 4096);
        wr(&machine, (4 << 20) - 1536, 4096);
        wr(&machine, (12 << 20) + 512, 1024);
        let client = machine.client();
        machine.world.block_on(async move {
            client
                .write_zeroes(8192 + 512, 9000 / 512 * 512, false)
                .await
                .unwrap();
        });
        if seed % 2 == 0 {
            seconds(&machine, COOL);
            wr(&machine, 512 * 77, 512);
            wr(&machine, 20 * 4096, 64 * 4096);
        }
        machine.check_all("follow");
        all_known(&mut machine, 3, &format!("seed {seed}"));
        machine.start();
        machine.check_all("after");
    }
}

/// Two writes to parts of one block at once: the checksum is of both.
#[test]
fn of_a_block_written_in_parts_at_once() {
    for seed in seeds(60) {
        let mut machine = machine(seed, 2);
        machine.start();
        wr(&machine, 0, 8192);
        for part in 0..8 {
            let client = machine.client();
            machine.world.spawn_task(async move {
                client.write(part * 512, 512, false).await.unwrap();
            });
        }
        machine.world.run(20_000, || false);
        all_known(&mut machine, 1, &format!("seed {seed}"));
    }
}

#[test]
fn begin_anew_with_the_extent() {
    for seed in seeds(30) {
        let mut machine = machine(seed, 2);
        machine.start();
        wr(&machine, 0, 4 << 20);
        seconds(&machine, COOL);
        let client = machine.client();
        machine
            .world
            .block_on(async move { client.discard_extent(0).await.unwrap() });
        if seed % 2 == 0 {
            seconds(&machine, COOL);
        }
        wr(&machine, 4096 * 9 + 512, 512);
        if seed % 4 < 2 {
            seconds(&machine, COOL);
        }
        all_known(&mut machine, 1, &format!("seed {seed}"));
    }
}

/// What a crash leaves hot is compared, and has checksums again.
#[test]
fn are_known_again_after_a_crash() {
    for seed in seeds(40) {
        let mut machine = machine(seed, 2);
        machine.start();
        wr(&machine, 0, 4 << 20);
        seconds(&machine, if seed % 2 == 0 { COOL } else { 0 });
        wr(&machine, 8192, 65536);
        fl(&machine);
        wr(&machine, 1 << 20, 65536);
        machine.cut_power();
        machine.start();
        let mirror = machine.mirror();
        let equal = || mirror.status().extents.unequalised_blocks == 0;
        assert!(machine.run_coarsely(equal));
        all_known(&mut machine, 1, &format!("seed {seed}"));
    }
}

/// A read of what has rotted on either member is answered with what was written, and the bad copy
/// is written anew: in a hot extent, in a cool one, after a restart.
#[test]
fn a_read_finds_rot_and_heals_it() {
    for seed in seeds(60) {
        let members = 2 + (seed % 3 == 2) as usize;
        let mut machine = machine(seed, members);
        machine.start();
        wr(&machine, 0, 1 << 20);
        fl(&machine);
        if seed % 4 > 0 {
            seconds(&machine, COOL);
        }
        if seed % 4 > 2 {
            machine.stop().unwrap();
            machine.start();
        }
        let bad = (seed % members as u64) as usize;
        let good = content(&machine, bad, 7);
        rot(&machine, bad, 7);
        for _ in 0..8 * members {
            // Whoever is asked; parts of blocks too.
            rd(&machine, 7 * 4096, 4096).unwrap();
            rd(&machine, 7 * 4096 + 1024, 512).unwrap();
            rd(&machine, 0, 65536).unwrap();
            // Both members get their turn by what they have in flight.
            let client = machine.client();
            machine
                .world
                .spawn_task(async move { client.read(7 * 4096, 4096).await.unwrap() });
        }
        machine.world.run(20_000, || false);
        check(&machine, 0, true);
        assert_eq!(content(&machine, bad, 7), good, "seed {seed}");
        machine.compare_members();
        seconds(&machine, COOL);
        let checked = check(&machine, 0, true);
        assert_eq!((checked.findings, checked.blocks), (0, 1024), "seed {seed}");
    }
}

/// A write to a part of a block whose rest has rotted on one member.
#[test]
fn a_part_of_a_rotten_block_is_written() {
    for seed in seeds(40) {
        let mut machine = machine(seed, 2);
        machine.start();
        wr(&machine, 0, 65536);
        seconds(&machine, COOL);
        rot(&machine, (seed % 2) as usize, 3);
        wr(&machine, 3 * 4096 + 2048, 512);
        rd(&machine, 3 * 4096, 4096).unwrap();
        check(&machine, 0, true);
        seconds(&machine, COOL);
        check(&machine, 0, true);
        machine.compare_members();
        machine.check_all("after");
        all_known(&mut machine, 1, &format!("seed {seed}"));
    }
}

/// Both copies rotten: an error and never wrong data, across a restart, until written anew.
#[test]
fn no_good_copy_is_an_error_until_it_is_written() {
    for seed in seeds(40) {
        let mut machine = machine(seed, 2);
        machine.start();
        wr(&machine, 0, 65536);
        seconds(&machine, COOL);
        rot(&machine, 0, 3);
        spoil(&machine, 1, 3 * 4096, |sector| sector[8] ^= 1);
        let before = [content(&machine, 0, 3), content(&machine, 1, 3)];
        if seed % 2 == 0 {
            let checked = check(&machine, 0, true);
            assert_eq!((checked.damaged, checked.repaired), (1, 0), "seed {seed}");
        }
        assert_eq!(rd(&machine, 3 * 4096, 4096), Err(Errno::IO));
        assert_eq!(rd(&machine, 3 * 4096 + 512, 512), Err(Errno::IO));
        rd(&machine, 4 * 4096, 4096).unwrap();
        // A part of it changes nothing about the rest.
        if seed % 4 > 1 {
            let client = machine.client();
            let write = async move { client.write(3 * 4096 + 3584, 512, false).await };
            machine.world.block_on(write).unwrap();
            assert_eq!(rd(&machine, 3 * 4096, 4096), Err(Errno::IO));
        } else {
            assert_eq!([content(&machine, 0, 3), content(&machine, 1, 3)], before);
        }
        if seed % 8 > 3 {
            machine.stop().unwrap();
        } else {
            machine.cut_power_choosing(&mut drop_all);
        }
        machine.start();
        // A crash with the extent hot makes the copies equal, whichever is taken.
        if seed % 8 > 3 || seed % 4 < 2 {
            assert_eq!(rd(&machine, 3 * 4096, 4096), Err(Errno::IO), "seed {seed}");
        }
        wr(&machine, 3 * 4096, 4096);
        rd(&machine, 3 * 4096, 4096).unwrap();
        seconds(&machine, COOL);
        assert_eq!(check(&machine, 0, true).damaged, 0);
        all_known(&mut machine, 1, &format!("seed {seed}"));
    }
}

/// Content that was written to the wrong place, on one member.
#[test]
fn a_misdirected_write_is_found() {
    for seed in seeds(20) {
        let mut machine = machine(seed, 2);
        machine.start();
        wr(&machine, 0, 65536);
        seconds(&machine, COOL);
        let bad = (seed % 2) as usize;
        let (good, wrong) = (content(&machine, bad, 5), content(&machine, bad, 9));
        for (sector, part) in (0..).zip(wrong.as_chunks().0) {
            spoil(&machine, bad, 5 * 4096 + sector * 512, |s| *s = *part);
        }
        let checked = check(&machine, 0, true);
        assert_eq!((checked.findings, checked.repaired), (1, 1));
        assert_eq!(content(&machine, bad, 5), good);
        machine.check_all("after");
    }
}

/// A page that rots, loses a write, or cannot be read: the data stands, the page is mended.
#[test]
fn a_bad_page_is_mended_from_the_data() {
    for seed in seeds(60) {
        let mut machine = machine(seed, 2);
        machine.start();
        wr(&machine, 0, 4 << 20);
        seconds(&machine, COOL);
        machine.stop().unwrap();
        let bad = (seed % 2) as usize;
        let superblock = superblock_on(&machine.disks[bad]).unwrap();
        let at = sums::page_offset(&superblock, Extent(0));
        let both = seed % 3 == 2;
        match seed % 5 {
            0 => machine.disks[bad].write_now(at, &[0x77; 512]),
            1 => machine.disks[bad].write_now(at, &[0; 4096]),
            2 => machine.disks[bad].write_now(at + 512, &[1; 512]),
            3 => machine.disks[bad].spoil(at),
            _ => {
                machine.disks[bad].write_now(at, &[0x66; 4096]);
            }
        }
        if both {
            machine.disks[1 - bad].write_now(at + 1024, &[9; 512]);
        }
        machine.start();
        machine.check_all("with a bad page");
        seconds(&machine, COOL);
        let checked = check(&machine, 0, true);
        assert_eq!(checked.damaged, 0, "seed {seed}");
        let found = machine.mirror().scrub_log().findings().len();
        assert!(found > 0 || seed % 5 == 1 && !both, "seed {seed}");
        seconds(&machine, COOL);
        let checked = check(&machine, 0, true);
        assert_eq!((checked.findings, checked.blocks), (0, 1024), "seed {seed}");
        machine.check_all("after");
        all_known(&mut machine, 1, &format!("seed {seed}"));
    }
}

/// A check that must not repair reports and writes nothing.
#[test]
fn a_check_only_writes_nothing() {
    let mut machine = machine(1, 2);
    machine.start();
    wr(&machine, 0, 65536);
    seconds(&machine, COOL);
    rot(&machine, 1, 3);
    let before = content(&machine, 1, 3);
    let checked = check(&machine, 0, false);
    assert_eq!((checked.findings, checked.repaired), (1, 0));
    seconds(&machine, COOL);
    assert_eq!(content(&machine, 1, 3), before);
    assert_eq!(check(&machine, 0, true).repaired, 1);
    assert!(content(&machine, 1, 3) != before);
}

/// A member that was lost while an extent was hot lacks no block of it, and its page is old: the
/// extent has cooled without it.
#[test]
fn a_member_returns_with_the_pages_of_what_cooled_without_it() {
    for seed in seeds(80) {
        let mut machine = machine(seed, 2);
        machine.start();
        for extent in 0..4 {
            wr(&machine, extent << 22, 65536);
        }
        seconds(&machine, COOL);
        for extent in 0..3 {
            wr(&machine, (extent << 22) + 8192, 4096);
        }
        fl(&machine);
        if seed % 2 == 0 {
            machine.fail(1).unwrap();
        } else {
            machine.disks[1].set_faults(gone());
            wr(&machine, 12 << 20, 4096);
            machine.disks[1].set_faults(none());
        }
        seconds(&machine, COOL);
        if seed % 4 > 1 {
            wr(&machine, 2 << 22, 4096);
        }
        machine.re_add(1).unwrap();
        if seed % 3 == 0 {
            // In the middle, and once more.
            machine.world.run(seed * 7, || false);
            machine.cut_power();
            machine.start();
            if states(&machine)[1] != MemberState::InSync {
                let _ = machine.re_add(1);
            }
        }
        machine.wait_in_sync();
        machine.check_all("after");
        let what = format!("seed {seed}");
        seconds(&machine, COOL);
        for extent in 0..4 {
            assert_eq!(check(&machine, extent, true).findings, 0, "{what}");
        }
        machine.stop().unwrap();
        sums::check(&machine, &what);
    }
}

/// The power goes while a member joins: by then its own map may call an extent cool.
#[test]
fn a_join_that_is_cut_off_leaves_no_old_page_behind() {
    for seed in seeds(120) {
        let mut machine = machine(seed, 2);
        machine.start();
        wr(&machine, 0, 65536);
        seconds(&machine, COOL);
        wr(&machine, 8192, 4096);
        fl(&machine);
        machine.fail(1).unwrap();
        seconds(&machine, COOL);
        let (mirror, disk) = (machine.mirror(), machine.disks[1].clone());
        let back = async move { mirror.re_add("disk1".into(), disk, Return::DELTA).await };
        machine.world.spawn_task(async move {
            let _ = back.await;
        });
        machine.world.run(seed * 3 + 1, || false);
        if seed % 2 == 0 {
            machine.cut_power_choosing(&mut drop_all);
        } else {
            machine.cut_power();
        }
        machine.start();
        if states(&machine)[1] != MemberState::InSync {
            let _ = machine.re_add(1);
        }
        machine.wait_in_sync();
        machine.check_all("after");
        machine.stop().unwrap();
        sums::check(&machine, &format!("seed {seed}"));
    }
}

/// A new disk gets the checksums with the blocks, while they change.
#[test]
fn a_new_disk_gets_them() {
    for seed in seeds(30) {
        let mut machine = machine(seed, 2);
        machine.start();
        for extent in 0..4 {
            wr(&machine, extent << 22, 1 << 20);
        }
        seconds(&machine, if seed % 2 == 0 { COOL } else { 0 });
        machine.fail(1).unwrap();
        machine.add_new("new").unwrap();
        for extent in 0..5 {
            wr(&machine, (extent << 22) + 12288, 8192);
            machine.world.run(seed * 5, || false);
        }
        machine.wait_in_sync();
        machine.check_all("after");
        all_known(&mut machine, 5, &format!("seed {seed}"));
    }
}

/// A resync comes to its end over a block that has no good copy, and the new copy is known to be
/// as bad.
#[test]
fn a_resync_copies_what_is_damaged_as_damaged() {
    for seed in seeds(20) {
        let mut machine = machine(seed, 2);
        machine.start();
        wr(&machine, 0, 1 << 20);
        seconds(&machine, COOL);
        machine.fail(1).unwrap();
        rot(&machine, 0, 9);
        machine.add_new("new").unwrap();
        machine.wait_in_sync();
        assert_eq!(rd(&machine, 9 * 4096, 4096), Err(Errno::IO));
        rd(&machine, 10 * 4096, 65536).unwrap();
        machine.stop().unwrap();
        machine.start();
        assert_eq!(rd(&machine, 9 * 4096, 4096), Err(Errno::IO));
        wr(&machine, 9 * 4096, 4096);
        rd(&machine, 9 * 4096, 4096).unwrap();
    }
}

/// Copies that a crash left different: the one that fits is taken, whichever member has it.
#[test]
fn are_asked_when_copies_differ_after_a_crash() {
    for seed in seeds(60) {
        let members = 2 + (seed % 3 == 2) as usize;
        let mut machine = machine(seed, members);
        machine.start();
        wr(&machine, 0, 1 << 20);
        seconds(&machine, COOL);
        // Another block of the extent makes it hot.
        wr(&machine, 200 * 4096, 4096);
        let bad = (seed % members as u64) as usize;
        let good = content(&machine, bad, 7);
        machine.cut_power();
        rot(&machine, bad, 7);
        if seed % 2 == 0 {
            // Its neighbours are judged though one sector cannot be read.
            machine.disks[1 - bad.min(1)].spoil(machine.data_offset + 8 * 4096);
        }
        machine.start();
        let mirror = machine.mirror();
        let equal = || mirror.status().extents.unequalised_blocks == 0;
        assert!(machine.run_coarsely(equal), "seed {seed}");
        assert_eq!(content(&machine, bad, 7), good, "seed {seed}");
        machine.check_all("after");
        machine.compare_members();
    }
}

/// What has been hot for a minute is judged too.
#[test]
fn of_an_extent_that_stays_hot_are_stored() {
    for seed in seeds(20) {
        let mut machine = machine(seed, 2);
        machine.start();
        wr(&machine, 0, 65536);
        for _ in 0..14 {
            seconds(&machine, 5);
            wr(&machine, 100 * 4096, 4096);
            fl(&machine);
        }
        let bad = (seed % 2) as usize;
        let good = content(&machine, bad, 7);
        machine.cut_power();
        rot(&machine, bad, 7);
        machine.start();
        machine.check_all("after");
        assert_eq!(content(&machine, bad, 7), good, "seed {seed}");
    }
}

/// A member that fails a rewrite is failed; the last one is not.
#[test]
fn a_member_that_fails_a_rewrite_is_lost() {
    let mut machine = machine(3, 2);
    machine.start();
    wr(&machine, 0, 65536);
    seconds(&machine, COOL);
    rot(&machine, 1, 3);
    machine.disks[1].set_faults(Faults {
        writes: true,
        ..none()
    });
    check(&machine, 0, true);
    let mirror = machine.mirror();
    let lost = || mirror.status().members[1].state == MemberState::Faulty;
    assert!(machine.world.run(100_000, lost));
    machine.world.run(20_000, || false);
    rd(&machine, 3 * 4096, 4096).unwrap();
    // It gets the block when it comes back.
    machine.disks[1].set_faults(none());
    machine.re_add(1).unwrap();
    machine.wait_in_sync();
    machine.compare_members();
}
