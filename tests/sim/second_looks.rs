//! Second looks at blocks, and what must not come of them: rot that is believed, good copies that
//! are overwritten, errors that stay though the data is fine, resyncs without an end. Each was
//! possible once.

use crate::checksums::{COOL, check, content, machine, rd, rot, spoil};
use crate::machine::{Machine, superblock_on};
use crate::older_images::seconds;
use crate::races::{fl, gone, none, seeds, wr};
use crate::rot::repairing;
use crate::sums;
use dirty_map::Extent;
use mirror::control::MemberState;
use mirror::sim::{Faults, Observer, SimBuffer, SimDisk};
use mirror::{DiskRequest, Errno};
use std::cell::Cell;
use std::rc::Rc;

/// Only member 0 is ever at fault: one entry of its checksum table rots, then it is pulled.
#[test]
fn a_page_of_a_member_that_is_gone_is_not_believed() {
    let mut machine = machine(1, 2);
    machine.start();
    wr(&machine, 0, 65536);
    seconds(&machine, COOL);
    machine.stop().unwrap();
    let superblock = superblock_on(&machine.disks[0]).unwrap();
    let at = sums::page_offset(&superblock, Extent(0));
    let mut sector = [0; 512];
    machine.disks[0].read_now(at, &mut sector);
    sector[7 * 4] ^= 1;
    machine.disks[0].write_now(at, &sector);
    machine.start();
    rd(&machine, 9 * 4096, 4096).unwrap();
    machine.fail(0).unwrap();
    assert_eq!(rd(&machine, 7 * 4096, 4096), Ok(()), "first");
    seconds(&machine, 3600);
    assert_eq!(rd(&machine, 7 * 4096, 4096), Ok(()), "an hour later");
}

/// --check-reads scrub-only: rot on one member, a partial write, a scrub.
#[test]
fn a_part_is_checked_though_reads_are_not() {
    let mut bad = vec![];
    for seed in seeds(20) {
        let mut machine = machine(seed, 2);
        machine.without_read_checks();
        machine.start();
        wr(&machine, 0, 65536);
        seconds(&machine, COOL);
        let at = (seed % 2) as usize;
        rot(&machine, at, 3);
        let good = content(&machine, 1 - at, 3);
        wr(&machine, 3 * 4096 + 2048, 512);
        seconds(&machine, COOL);
        check(&machine, 0, true);
        if content(&machine, 1 - at, 3)[..2048] != good[..2048] {
            bad.push(seed);
        }
    }
    assert!(bad.is_empty(), "the good copy was overwritten: {bad:?}");
}

/// A resync has copied a damaged block; a scrub calls it right.
#[test]
fn what_a_resync_met_as_damaged_stays_so() {
    for restart in [true, false] {
        let mut machine = machine(2, 2);
        machine.start();
        wr(&machine, 0, 1 << 20);
        seconds(&machine, COOL);
        machine.fail(1).unwrap();
        rot(&machine, 0, 9);
        machine.add_new("new").unwrap();
        machine.wait_in_sync();
        assert_eq!(rd(&machine, 9 * 4096, 4096), Err(Errno::IO));
        seconds(&machine, COOL);
        if restart {
            machine.stop().unwrap();
            machine.start();
        }
        check(&machine, 0, true);
        assert_eq!(rd(&machine, 9 * 4096, 4096), Err(Errno::IO));
    }
}

/// A damaged block is written anew while a flush fails everywhere.
#[test]
fn a_write_beside_a_failed_flush_ends_the_damage() {
    let mut bad = vec![];
    for seed in seeds(40) {
        let mut machine = machine(seed, 2);
        machine.start();
        wr(&machine, 0, 65536);
        seconds(&machine, COOL);
        rot(&machine, 0, 3);
        spoil(&machine, 1, 3 * 4096, |sector| sector[8] ^= 1);
        assert_eq!(rd(&machine, 3 * 4096, 4096), Err(Errno::IO));
        wr(&machine, 8 * 4096, 4096);
        for d in &machine.disks {
            d.set_faults(Faults {
                flushes: true,
                ..none()
            });
        }
        let (w, f) = (machine.client(), machine.client());
        let done = Rc::new(Cell::new(0));
        let (d1, d2) = (done.clone(), done.clone());
        machine.world.spawn_task(async move {
            w.write(3 * 4096, 4096, false).await.unwrap();
            d1.set(d1.get() + 1);
        });
        machine.world.spawn_task(async move {
            let _ = f.flush().await;
            d2.set(d2.get() + 1);
        });
        assert!(machine.world.run(1_000_000, || done.get() == 2));
        for d in &machine.disks {
            d.set_faults(none());
        }
        let client = machine.client();
        machine
            .world
            .block_on(async move { client.clear_flush_error().await });
        seconds(&machine, 60);
        check(&machine, 0, true);
        if rd(&machine, 3 * 4096, 4096) != Ok(()) {
            bad.push(seed);
        }
    }
    assert!(bad.is_empty(), "EIO stays: {bad:?}");
}

/// What could not be read for a moment is called damaged for ever.
#[test]
fn the_log_forgets_damage_that_has_healed() {
    let mut machine = machine(1, 2);
    machine.start();
    wr(&machine, 0, 65536);
    seconds(&machine, COOL);
    for disk in &machine.disks {
        disk.spoil(machine.data_offset + 3 * 4096);
    }
    assert_eq!(check(&machine, 0, true).damaged, 1);
    for disk in &machine.disks {
        disk.heal_all();
    }
    rd(&machine, 3 * 4096, 4096).unwrap();
    let checked = check(&machine, 0, true);
    assert_eq!(checked.findings, 0);
    let mirror = machine.mirror();
    let damaged = format!("{:?}", mirror.scrub_log().damaged_runs());
    assert_eq!(damaged, "[]");
}

/// One copy rots; the other member is out for a minute.
#[test]
fn the_error_ends_when_the_good_copy_is_back() {
    let mut machine = machine(1, 2);
    machine.start();
    wr(&machine, 0, 65536);
    seconds(&machine, COOL);
    rot(&machine, 0, 3);
    machine.fail(1).unwrap();
    assert_eq!(rd(&machine, 3 * 4096, 4096), Err(Errno::IO));
    machine.re_add(1).unwrap();
    machine.wait_in_sync();
    seconds(&machine, 600);
    assert_eq!(rd(&machine, 3 * 4096, 4096), Ok(()));
}

/// And a write to a part of it then makes the damage real.
#[test]
fn a_part_of_what_has_healed_is_written() {
    let mut machine = machine(1, 2);
    machine.start();
    wr(&machine, 0, 65536);
    seconds(&machine, COOL);
    rot(&machine, 0, 3);
    machine.fail(1).unwrap();
    assert_eq!(rd(&machine, 3 * 4096, 4096), Err(Errno::IO));
    machine.re_add(1).unwrap();
    machine.wait_in_sync();
    wr(&machine, 3 * 4096 + 2048, 512);
    seconds(&machine, COOL);
    check(&machine, 0, true);
    machine.stop().unwrap();
    machine.start();
    assert_eq!(rd(&machine, 3 * 4096, 4096), Ok(()));
}

/// The absent member's copy fits, and a resync overwrites it with what is damaged.
#[test]
fn a_resync_takes_the_right_copy_from_where_it_is() {
    let mut machine = machine(1, 2);
    machine.start();
    wr(&machine, 0, 65536);
    seconds(&machine, COOL);
    wr(&machine, 3 * 4096, 4096);
    let good = content(&machine, 1, 3);
    machine.disks[1].set_faults(gone());
    wr(&machine, 12 * 4096, 4096);
    machine.disks[1].set_faults(none());
    rot(&machine, 0, 3);
    machine.re_add(1).unwrap();
    machine.wait_in_sync();
    assert_eq!(content(&machine, 1, 3), good);
}

/// The device's last block is short, in an extent begun anew.
#[test]
fn a_short_last_block_has_no_sum_of_zeroes() {
    for members in [2, 1] {
        let mut machine = Machine::with_checksums(1, 2, (8 << 20) + 4096 + 1536);
        machine.start();
        if members == 1 {
            machine.fail(1).unwrap();
        }
        wr(&machine, 8 << 20, 512);
        let read = rd(&machine, (8 << 20) + 4096, 1536);
        let found = format!("{:?}", machine.mirror().scrub_log().findings());
        assert_eq!((read, found.as_str()), (Ok(()), "[]"), "{members}");
    }
}

/// A sector of the survivor cannot be read: what the returning member has of it fits, and is taken.
/// What only the survivor had holds up the resync until it can be read, or is written.
#[test]
fn a_resync_over_an_unreadable_block() {
    for returns in [true, false] {
        let mut machine = machine(1, 2);
        machine.start();
        wr(&machine, 0, 1 << 20);
        seconds(&machine, COOL);
        machine.fail(1).unwrap();
        machine.disks[0].spoil(machine.data_offset + 9 * 4096);
        if returns {
            machine
                .re_add_disk("disk1".into(), machine.disks[1].clone(), true)
                .unwrap();
            machine.wait_in_sync();
            continue;
        }
        machine.add_new("new").unwrap();
        seconds(&machine, 60);
        let status = machine.mirror().status();
        assert_eq!(status.members[1].state, MemberState::Resyncing);
        assert_eq!(status.members[1].missed_bytes, 4096);
        wr(&machine, 9 * 4096, 4096);
        machine.wait_in_sync();
        machine.check_all("after");
        machine.compare_members();
    }
}

struct HangOn {
    armed: Cell<bool>,
    page: u64,
}
impl Observer for HangOn {
    fn submitted(&self, disk: &SimDisk, request: &DiskRequest<SimBuffer>) {
        if let DiskRequest::Read { offset, span } = request
            && *offset == self.page
            && span.len == 4096
            && self.armed.replace(false)
        {
            disk.set_faults(Faults {
                hang: true,
                ..none()
            });
        }
    }
    fn completed(&self, _: &SimDisk, _: &DiskRequest<SimBuffer>) {}
}

/// A bad sector in the table, then the disk hangs over the page alone.
#[test]
fn a_page_that_stalls_when_it_is_read_alone() {
    let mut machine = machine(1, 2);
    machine.start();
    wr(&machine, 0, 65536);
    wr(&machine, 4 << 20, 65536);
    seconds(&machine, COOL);
    let superblock = superblock_on(&machine.disks[1]).unwrap();
    let at = sums::page_offset(&superblock, Extent(0));
    if let Some(rules) = &machine.rules {
        rules.end();
    }
    wr(&machine, 0, 4096);
    wr(&machine, 4 << 20, 4096);
    fl(&machine);
    machine.disks[1].spoil(at + 4096);
    machine.disks[1].observe(Some(Rc::new(HangOn {
        armed: Cell::new(true),
        page: at,
    })));
    seconds(&machine, 60);
    rd(&machine, 0, 4096).unwrap();
}

/// No member takes writes; one copy is rotten, the other is right.
#[test]
fn a_rotten_block_is_read_when_nothing_can_be_written() {
    let mut bad = vec![];
    for seed in seeds(10) {
        let mut machine = machine(seed, 2);
        machine.start();
        wr(&machine, 0, 65536);
        seconds(&machine, COOL);
        rot(&machine, (seed % 2) as usize, 3);
        for d in &machine.disks {
            d.set_faults(Faults {
                writes: true,
                ..none()
            });
        }
        if rd(&machine, 3 * 4096, 4096) != Ok(()) {
            bad.push(seed);
        }
    }
    assert!(bad.is_empty(), "{bad:?}");
}

/// Reads beside others that need other pages: more than the cache holds.
#[test]
fn pages_that_make_room_before_they_are_asked() {
    let mut bad = vec![];
    for seed in seeds(60) {
        let mut machine = machine(seed, 2);
        machine.start();
        for extent in 0..6 {
            wr(&machine, extent << 22, 65536);
        }
        seconds(&machine, COOL);
        machine.stop().unwrap();
        machine.start();
        rot(&machine, 0, 7);
        let good = content(&machine, 1, 7);
        let wrong = Rc::new(Cell::new(0));
        for _ in 0..4 {
            for extent in 0..6_u64 {
                let (client, wrong, good) = (machine.client(), wrong.clone(), good.clone());
                machine.world.spawn_task(async move {
                    let read = client.read_raw((extent << 22) + 7 * 4096, 4096).await;
                    if extent == 0 && read.unwrap() != good {
                        wrong.set(wrong.get() + 1);
                    }
                });
            }
        }
        machine.world.run(20_000, || false);
        if wrong.get() > 0 {
            bad.push((seed, wrong.get()));
        }
    }
    assert!(bad.is_empty(), "wrong data: {bad:?}");
}

/// A read is answered before the loss of the member that did not take the repair counts.
#[test]
fn two_reads_agree_over_a_crash_after_a_repair() {
    let mut bad = vec![];
    for seed in seeds(40) {
        let mut machine = machine(seed, 2);
        machine.start();
        wr(&machine, 0, 65536);
        fl(&machine);
        rot(&machine, 0, 7);
        machine.disks[0].set_faults(Faults {
            writes: true,
            ..none()
        });
        let client = machine.client();
        let first = machine
            .world
            .block_on(async move { client.read_raw(7 * 4096, 4096).await });
        machine.cut_power();
        machine.disks[0].set_faults(none());
        machine.start_on(&[0, 1], true).unwrap();
        let client = machine.client();
        let second = machine
            .world
            .block_on(async move { client.read_raw(7 * 4096, 4096).await });
        if first.is_ok() && second.is_ok() && first != second {
            bad.push(seed);
        }
    }
    assert!(bad.is_empty(), "two reads disagree: {bad:?}");
}

/// A page that no member can read for a moment is taken to say nothing for good.
#[test]
fn a_page_unreadable_for_a_moment() {
    let mut machine = machine(1, 2);
    machine.start();
    wr(&machine, 0, 65536);
    seconds(&machine, COOL);
    machine.stop().unwrap();
    machine.start();
    let superblock = superblock_on(&machine.disks[1]).unwrap();
    let at = sums::page_offset(&superblock, Extent(0));
    for disk in &machine.disks {
        disk.spoil(at);
    }
    rd(&machine, 9 * 4096, 4096).unwrap();
    for disk in &machine.disks {
        disk.heal_all();
    }
    seconds(&machine, 3600);
    rot(&machine, 0, 7);
    for _ in 0..8 {
        rd(&machine, 7 * 4096, 4096).unwrap();
    }
}

/// Like T16, and a partial write, and a scrub.
#[test]
fn a_part_is_written_after_a_page_was_unreadable() {
    let mut machine = machine(1, 2);
    machine.start();
    wr(&machine, 0, 65536);
    seconds(&machine, COOL);
    machine.stop().unwrap();
    machine.start();
    let superblock = superblock_on(&machine.disks[1]).unwrap();
    let at = sums::page_offset(&superblock, Extent(0));
    for disk in &machine.disks {
        disk.spoil(at);
    }
    rd(&machine, 9 * 4096, 4096).unwrap();
    for disk in &machine.disks {
        disk.heal_all();
    }
    rot(&machine, 0, 7);
    let good = content(&machine, 1, 7);
    wr(&machine, 7 * 4096 + 2048, 512);
    seconds(&machine, COOL);
    check(&machine, 0, true);
    assert!(content(&machine, 1, 7)[..2048] == good[..2048]);
}

/// A member that is not the first has the bad entry; it is not lost. Control for T1.
#[test]
fn a_bad_entry_beside_a_good_one() {
    let mut machine = machine(1, 2);
    machine.start();
    wr(&machine, 0, 65536);
    seconds(&machine, COOL);
    machine.stop().unwrap();
    let superblock = superblock_on(&machine.disks[0]).unwrap();
    let at = sums::page_offset(&superblock, Extent(0));
    let mut sector = [0; 512];
    machine.disks[0].read_now(at, &mut sector);
    sector[7 * 4] ^= 1;
    machine.disks[0].write_now(at, &sector);
    machine.start();
    rd(&machine, 9 * 4096, 4096).unwrap();
    rd(&machine, 7 * 4096, 4096).unwrap();
}

/// A discard, reuse, loss and a return of members around reads and scrubs: no panic, no
/// deadlock, no false damage.
#[test]
fn everything_at_once() {
    for seed in seeds(60) {
        let mut machine = machine(seed, 3);
        machine.start();
        (0..3).for_each(|extent| wr(&machine, extent << 22, 1 << 20));
        seconds(&machine, COOL);
        rot(&machine, (seed % 3) as usize, 5);
        rot(&machine, (seed % 3) as usize, 1024 + 9);
        let left = Rc::new(Cell::new(0));
        for n in 0..30_u64 {
            let (client, left, mirror) = (machine.client(), left.clone(), machine.mirror());
            left.set(left.get() + 1);
            let extent = n % 3;
            machine.world.spawn_task(async move {
                match n % 6 {
                    0 => client.read(extent << 22, 65536).await.unwrap(),
                    1 => {
                        let extent = Extent(extent as u32);
                        let _ = mirror.check_extent(extent, repairing(n % 4 == 1)).await;
                    }
                    2 => client
                        .write((extent << 22) + 5 * 4096 + 512, 8192, n % 2 == 0)
                        .await
                        .unwrap(),
                    3 if extent != 1 => client.discard_extent(extent).await.unwrap(),
                    4 => client
                        .read((extent << 22) + 4096 * 5 + 1024, 4096)
                        .await
                        .unwrap(),
                    _ => client
                        .write((extent << 22) + 40 * 4096 - 512, 1024, false)
                        .await
                        .unwrap(),
                }
                left.set(left.get() - 1);
            });
        }
        machine.world.run(seed * 13 % 400, || false);
        let victim = ((seed + seed / 3 % 3) % 3) as usize;
        let hang = Faults {
            hang: true,
            ..none()
        };
        machine.disks[victim].set_faults(if seed % 2 == 0 { hang } else { gone() });
        assert!(
            machine.world.run(1_000_000, || left.get() == 0),
            "deadlock, seed {seed}"
        );
        machine.disks[victim].set_faults(none());
        machine.world.run(30_000, || false);
        for extent in 0..3 {
            let checked = check(&machine, extent, true);
            assert_eq!(checked.damaged, 0, "seed {seed}");
        }
        machine.check_all("after");
        if machine.mirror().status().members[victim].state != MemberState::InSync {
            machine.re_add(victim).unwrap();
            machine.wait_in_sync();
        }
        seconds(&machine, COOL);
        for extent in 0..3 {
            let checked = check(&machine, extent, true);
            assert!(checked.damaged == 0 && !checked.skipped_hot, "seed {seed}");
        }
        machine.check_all("scrubbed");
        machine.stop().unwrap();
        sums::check(&machine, "storm");
    }
}

/// Damage that a scrub has found is an error after a restart too, though reads are not checked;
/// and what was written anew since is none.
#[test]
fn damage_is_known_after_a_restart() {
    for seed in seeds(8) {
        let mut machine = machine(seed, 2);
        machine.without_read_checks();
        machine.start();
        wr(&machine, 0, 65536);
        seconds(&machine, COOL);
        rot(&machine, 0, 3);
        spoil(&machine, 1, 3 * 4096, |sector| sector[8] ^= 1);
        assert_eq!(check(&machine, 0, true).damaged, 1);
        if seed % 2 == 0 {
            machine.stop().unwrap();
            machine.start();
            assert_eq!(rd(&machine, 3 * 4096, 4096), Err(Errno::IO));
        }
        seconds(&machine, COOL);
        wr(&machine, 3 * 4096, 4096);
        fl(&machine);
        // The log's note of it may be gone with the power.
        machine.cut_power();
        machine.start();
        rd(&machine, 3 * 4096, 4096).unwrap();
    }
}
