//! Superblocks: what lies at 4 KiB and 8 KiB of a member (R17), and the assembly decision over
//! what was read there.
//!
//! An input is copy A and then copy B; what is missing is zero. Whatever decodes has to be
//! sound, to survive encoding and the next epoch, and to be judged without a panic.
#![no_main]

use dirty_map::Stamp;
use libfuzzer_sys::fuzz_target;
use mirror::assemble::{AssembleOptions, Seen, assemble, judge_return};
use mirror::layout::MIRROR_BYTES_MAX;
use mirror::superblock::{COPY_BYTES, DECODED_BYTES_MAX, HISTORY_MAX, Superblock};
use ublk_mirror_fuzz::{padded, seal_superblock, within};

fuzz_target!(|data: &[u8]| {
    let (a, b) = data.split_at(data.len().min(COPY_BYTES));
    let (mut a, mut b) = (padded(a, COPY_BYTES), padded(b, COPY_BYTES));
    load(&a, &b);
    seal_superblock(&mut a);
    seal_superblock(&mut b);
    load(&a, &b);
    let found: Vec<_> = [&a, &b]
        .into_iter()
        .filter_map(|copy| Superblock::decode(copy).ok())
        .collect();
    found.iter().for_each(survives);
    judge(&found);
});

fn load(a: &[u8], b: &[u8]) {
    // Two copies are decoded at once.
    let loaded = within(2 * DECODED_BYTES_MAX, || Superblock::load(a, b));
    if let Ok(loaded) = loaded {
        assert!(loaded.needs_mending || a[16..] == b[16..] || reserved_differ(a, b));
        survives(&loaded.superblock);
    }
}

/// Bytes that decoding ignores may differ between copies that are equal otherwise.
fn reserved_differ(a: &[u8], b: &[u8]) -> bool {
    Superblock::decode(a) == Superblock::decode(b)
}

fn survives(superblock: &Superblock) {
    assert!(superblock.layout.is_sound());
    assert!(superblock.layout.member_bytes() <= 2 * MIRROR_BYTES_MAX);
    assert!(superblock.descends_from(superblock.epoch.id));
    let _ = superblock.own_record();
    // Far from where they would wrap.
    for count in [superblock.write_count, superblock.event_count] {
        assert!(count.checked_add(1 << 61).is_some());
    }
    let bytes = superblock.encode();
    let again = within(DECODED_BYTES_MAX, || Superblock::decode(&bytes));
    assert_eq!(again.as_ref(), Ok(superblock));
    let mut next = superblock.clone();
    next.begin_epoch(!superblock.epoch.id);
    assert!(next.history.len() <= HISTORY_MAX);
    assert!(next.descends_from(superblock.epoch.id));
    assert_eq!(Superblock::decode(&next.encode()).as_ref(), Ok(&next));
}

/// The verdict may be anything.
fn judge(found: &[Superblock]) {
    let seen: Vec<Seen> = found
        .iter()
        .enumerate()
        .map(|(index, superblock)| Seen {
            path: format!("disk{index}"),
            superblock: superblock.clone(),
            // Any position will do; this one the fuzzer can choose.
            position: Stamp {
                ordinal: superblock.epoch.ordinal,
                sequence: superblock.resync_cursor,
            },
            damaged: superblock.resync_cursor % 4 == 3,
            effective: superblock.history.last().map_or(0, |epoch| epoch.id),
            completed: superblock.updated_secs,
        })
        .collect();
    for (force, promote) in [(false, false), (false, true), (true, false)] {
        if let Ok(plan) = assemble(&seen, AssembleOptions { force, promote }) {
            assert_eq!(plan.verdicts.len(), seen.len());
            let config = &seen[plan.newest].superblock;
            for (slot, _) in &plan.lost {
                assert!(usize::from(*slot) < config.slots.len());
            }
        }
    }
    for member in &seen {
        let _ = judge_return(&found[0], member);
        let _ = mirror::split::changed_by(&found[0], member);
    }
}
