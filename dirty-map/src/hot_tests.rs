#![allow(clippy::unwrap_used)]
use super::*;
use crate::masks::MASK_BYTES;
use proptest::prelude::*;

const NOW: Duration = Duration::from_secs(100);
const QUIET: Duration = Duration::from_secs(10);

fn unsafe_blocks(hot: &HotExtents) -> BTreeSet<u64> {
    let mut all = BTreeSet::new();
    hot.for_each_unsafe(|_, run| all.extend(run));
    all
}

#[test]
fn a_block_is_in_u_until_a_flush_that_began_later_has_ended() {
    let mut hot = HotExtents::new(HOT_CAP_BYTES);
    hot.insert(Extent(1), NOW);
    hot.begin_write(Extent(1), NOW);
    assert!(
        unsafe_blocks(&hot).is_empty(),
        "in flight is the range locks' business"
    );
    hot.end_write(Extent(1), 1024..1026, NOW);
    hot.begin_flush();
    hot.begin_write(Extent(1), NOW);
    hot.end_write(Extent(1), 1025..1028, NOW);
    assert_eq!(unsafe_blocks(&hot), (1024..1028).collect());
    hot.end_flush(true);
    assert_eq!(
        unsafe_blocks(&hot),
        (1025..1028).collect(),
        "written while the flush ran"
    );
    hot.begin_flush();
    hot.end_flush(false);
    assert_eq!(
        unsafe_blocks(&hot),
        (1025..1028).collect(),
        "a failed flush empties nothing"
    );
    hot.begin_flush();
    hot.end_flush(true);
    assert!(unsafe_blocks(&hot).is_empty());
}

#[test]
fn an_extent_cools_when_nothing_speaks_against_it() {
    let mut hot = HotExtents::new(HOT_CAP_BYTES);
    hot.insert(Extent(7), NOW);
    hot.begin_write(Extent(7), NOW);
    let late = NOW + QUIET;
    assert!(hot.coolable(late, QUIET, 9).is_empty(), "a write in flight");
    hot.end_write(Extent(7), 7168..7169, NOW);
    assert!(
        hot.coolable(late, QUIET, 9).is_empty(),
        "an unflushed block"
    );
    assert!(hot.is_unflushed());
    hot.begin_flush();
    assert!(hot.coolable(late, QUIET, 9).is_empty(), "under a flush");
    hot.end_flush(true);
    assert!(!hot.is_unflushed());
    hot.set_unequalised(Extent(7), 7170..7171);
    assert!(hot.coolable(late, QUIET, 9).is_empty(), "un-equalised");
    hot.clear_unequalised(7170..7171);
    assert!(
        hot.coolable(late - Duration::from_secs(1), QUIET, 9)
            .is_empty(),
        "not quiet enough"
    );
    assert_eq!(hot.coolable(late, QUIET, 9), [Extent(7)]);
    hot.remove(Extent(7));
    assert!(hot.coolable(late, QUIET, 9).is_empty());
}

#[test]
fn the_longest_quiet_cool_first() {
    let mut hot = HotExtents::new(HOT_CAP_BYTES);
    for number in 0..5 {
        hot.insert(Extent(number), NOW + Duration::from_secs(number.into()));
    }
    // Written again: the oldest becomes the newest.
    let again = NOW + Duration::from_secs(6);
    hot.begin_write(Extent(0), again);
    hot.end_write(Extent(0), 0..0, again);
    let late = again + QUIET;
    assert_eq!(
        hot.coolable(late, QUIET, 3),
        [Extent(1), Extent(2), Extent(3)]
    );
    assert_eq!(hot.coolable(late, QUIET, 9).last(), Some(&Extent(0)));
}

#[test]
fn memory_stays_under_its_cap_and_errs_on_the_safe_side() {
    let cap = 2 * 1000 * ENTRY_BYTES;
    let mut hot = HotExtents::new(cap);
    hot.pool.cap = 64;
    for number in 0..1000 {
        let extent = Extent(number);
        assert!(!hot.is_full());
        hot.insert(extent, NOW);
        hot.begin_write(extent, NOW);
        hot.end_write(
            extent,
            extent.blocks().start..extent.blocks().start + 1,
            NOW,
        );
    }
    assert!(hot.is_full() && hot.memory_bytes() <= cap);
    let blocks = unsafe_blocks(&hot);
    for number in 0..1000 {
        assert!(blocks.contains(&Extent(number).blocks().start));
    }
    hot.begin_flush();
    hot.end_flush(true);
    assert!(unsafe_blocks(&hot).is_empty());
}

#[test]
fn an_extent_that_cooled_and_returned_within_a_tick_is_found_once() {
    let mut hot = HotExtents::new(HOT_CAP_BYTES);
    hot.insert(Extent(3), NOW);
    hot.remove(Extent(3));
    hot.insert(Extent(3), NOW);
    assert_eq!(hot.coolable(NOW + QUIET, QUIET, 9), [Extent(3)]);
}

#[test]
fn what_is_hot_is_counted() {
    let mut hot = HotExtents::new(HOT_CAP_BYTES);
    assert!(hot.is_empty() && !hot.contains(Extent(3)));
    for number in [3, 5, 9] {
        hot.insert(Extent(number), NOW);
    }
    assert!(!hot.is_empty() && hot.len() == 3);
    assert!(hot.contains(Extent(5)) && !hot.contains(Extent(4)));
    hot.set_unequalised_all(Extent(5));
    hot.set_unequalised(Extent(9), 9 * 1024..9 * 1024 + 3);
    assert_eq!(hot.unequalised_blocks(), 1027);
    assert!(!hot.is_unequalised(0..0) && !hot.is_unequalised(5 * 1024..5 * 1024));
    hot.clear_unequalised(0..0);
    // What is forgotten with its extent is not counted any more.
    hot.remove(Extent(5));
    assert_eq!((hot.unequalised_blocks(), hot.len()), (3, 2));
    assert_eq!(hot.next_unequalised(None), Some(9 * 1024..9 * 1024 + 3));
}

#[test]
fn the_middle_of_an_extent_is_not_the_whole() {
    let mut hot = HotExtents::new(HOT_CAP_BYTES);
    hot.insert(Extent(0), NOW);
    hot.set_unequalised(Extent(0), 400..624);
    assert_eq!(hot.unequalised_blocks(), 224);
    hot.set_unequalised_all(Extent(0));
    hot.clear_unequalised(400..624);
    assert_eq!(hot.unequalised_blocks(), 800);
}

#[test]
fn a_whole_extent_is_taken_out_without_memory_too() {
    let mut hot = HotExtents::new(0);
    hot.insert(Extent(2), NOW);
    hot.set_unequalised(Extent(2), 2048..2049);
    assert_eq!(hot.unequalised_blocks(), 1024, "no memory to be exact");
    hot.clear_unequalised(2048..2049);
    assert_eq!(hot.unequalised_blocks(), 1024, "nor here");
    hot.clear_unequalised(Extent(2).blocks());
    assert_eq!(hot.unequalised_blocks(), 0);
}

#[test]
fn quiet_begins_when_the_last_write_ends() {
    let mut hot = HotExtents::new(HOT_CAP_BYTES);
    hot.insert(Extent(1), NOW);
    hot.begin_write(Extent(1), NOW);
    let ended = NOW + Duration::from_secs(4);
    hot.end_write(Extent(1), 1024..1024, ended);
    assert!(
        hot.coolable(ended + QUIET - Duration::from_secs(1), QUIET, 9)
            .is_empty()
    );
    assert_eq!(hot.coolable(ended + QUIET, QUIET, 9), [Extent(1)]);
    // A write without blocks leaves nothing to flush.
    assert!(!hot.is_unflushed());
}

#[test]
fn consecutive_extents_spread_over_a_table() {
    use std::hash::BuildHasher;
    let spread = BuildHasherDefault::<NumberHasher>::default();
    let hashes: Vec<u64> = (0..4096).map(|n| spread.hash_one(Extent(n))).collect();
    // A table goes by the lowest bits, and by the highest seven within a group.
    let low: BTreeSet<u64> = hashes.iter().map(|hash| hash % 4096).collect();
    let high: BTreeSet<u64> = hashes.iter().map(|hash| hash >> 57).collect();
    assert!(
        low.len() > 2000 && high.len() == 128,
        "{} {}",
        low.len(),
        high.len()
    );
}

#[derive(Clone, Debug)]
enum Step {
    Write(u32, u64, u64),
    BeginFlush,
    EndFlush(bool),
    Unequal(u32, u64, u64),
    Equal(u64, u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = || (0u32..4, 0u64..1024, 1u64..1025);
    let step = prop_oneof![
        range().prop_map(|(e, s, l)| Step::Write(e, s, l)),
        Just(Step::BeginFlush),
        any::<bool>().prop_map(Step::EndFlush),
        range().prop_map(|(e, s, l)| Step::Unequal(e, s, l)),
        (0u64..4096, 1u64..4096).prop_map(|(s, l)| Step::Equal(s, l)),
    ];
    proptest::collection::vec(step, 0..60)
}

proptest! {
    #[test]
    fn agrees_with_plain_sets(steps in steps(), masks in 0usize..20) {
        // With few masks the sets may be larger than exact, never smaller.
        let exact = masks > 12;
        let mut hot = HotExtents::new(2 * masks * MASK_BYTES);
        let (mut unflushed, mut flushing, mut unequal) =
            (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        for number in 0..4 {
            hot.insert(Extent(number), NOW);
        }
        let clip = |extent: u32, start: u64, len: u64| {
            let own = Extent(extent).blocks();
            own.start + start..(own.start + start + len).min(own.end)
        };
        for step in steps {
            match step {
                Step::Write(extent, start, len) => {
                    let blocks = clip(extent, start, len);
                    hot.begin_write(Extent(extent), NOW);
                    hot.end_write(Extent(extent), blocks.clone(), NOW);
                    unflushed.extend(blocks);
                }
                Step::BeginFlush => {
                    hot.begin_flush();
                    flushing.append(&mut unflushed);
                }
                Step::EndFlush(true) => {
                    hot.end_flush(true);
                    flushing.clear();
                }
                Step::EndFlush(false) => {
                    hot.end_flush(false);
                    unflushed.append(&mut flushing);
                }
                Step::Unequal(extent, start, len) => {
                    let blocks = clip(extent, start, len);
                    hot.set_unequalised(Extent(extent), blocks.clone());
                    unequal.extend(blocks);
                }
                Step::Equal(start, len) => {
                    hot.clear_unequalised(start..start + len);
                    unequal.retain(|block| !(start..start + len).contains(block));
                }
            }
        }
        let have = unsafe_blocks(&hot);
        let want: BTreeSet<u64> =
            unflushed.iter().chain(&flushing).chain(&unequal).copied().collect();
        prop_assert!(have.is_superset(&want));
        for block in 0..4096 {
            prop_assert!(hot.is_unequalised(block..block + 1) || !unequal.contains(&block));
        }
        if exact {
            for (start, len) in [(0, 4096), (1000, 100), (2047, 2), (3072, 1024)] {
                let any = (start..start + len).any(|block| unequal.contains(&block));
                prop_assert_eq!(hot.is_unequalised(start..start + len), any);
            }
            for block in 0..4096 {
                prop_assert_eq!(hot.is_unequalised(block..block + 1), unequal.contains(&block));
            }
            prop_assert_eq!(have, want);
            prop_assert_eq!(hot.unequalised_blocks(), unequal.len() as u64);
            let mut found = BTreeSet::new();
            let mut from = None;
            while let Some(run) = hot.next_unequalised(from) {
                from = Some(run.end);
                found.extend(run);
            }
            prop_assert_eq!(found, unequal);
        }
    }
}

#[test]
fn memory_is_counted() {
    let mut hot = HotExtents::new(HOT_CAP_BYTES);
    assert_eq!(hot.memory_bytes(), 0);
    hot.insert(Extent(1), NOW);
    hot.insert(Extent(2), NOW);
    assert_eq!(hot.memory_bytes(), 2 * ENTRY_BYTES);
    for extent in [1, 2] {
        hot.begin_write(Extent(extent), NOW);
    }
    hot.end_write(Extent(1), 1024..1025, NOW);
    assert_eq!(hot.memory_bytes(), 2 * ENTRY_BYTES + MASK_BYTES);
    hot.end_write(Extent(2), 2048..3072, NOW);
    assert_eq!(hot.memory_bytes(), 2 * ENTRY_BYTES + MASK_BYTES, "no mask");
    hot.set_unequalised(Extent(2), 2050..2060);
    assert_eq!(hot.memory_bytes(), 2 * ENTRY_BYTES + 2 * MASK_BYTES);
}

#[test]
fn all_of_u_may_differ_after_a_failed_flush() {
    let mut hot = HotExtents::new(HOT_CAP_BYTES);
    for extent in [1, 2] {
        hot.insert(Extent(extent), NOW);
        hot.begin_write(Extent(extent), NOW);
    }
    hot.end_write(Extent(1), 1024..1026, NOW);
    hot.begin_flush();
    hot.end_write(Extent(2), 2050..2051, NOW);
    hot.end_flush(false);
    hot.unflushed_to_unequalised();
    assert_eq!(hot.unequalised_blocks(), 3);
    let unequal: Vec<u64> = (0..4096)
        .filter(|&block| hot.is_unequalised(block..block + 1))
        .collect();
    assert_eq!(unequal, [1024, 1025, 2050]);
}

#[test]
fn only_what_is_at_rest_is_coolable() {
    let mut hot = HotExtents::new(HOT_CAP_BYTES);
    assert!(!hot.is_coolable(Extent(1)), "not hot");
    hot.insert(Extent(1), NOW);
    assert!(hot.is_coolable(Extent(1)), "however short the time");
    hot.begin_write(Extent(1), NOW);
    assert!(!hot.is_coolable(Extent(1)), "in flight");
    hot.end_write(Extent(1), 1024..1025, NOW);
    assert!(!hot.is_coolable(Extent(1)), "in U");
    hot.begin_flush();
    assert!(!hot.is_coolable(Extent(1)), "under a flush");
    hot.end_flush(true);
    assert!(hot.is_coolable(Extent(1)));
    hot.set_unequalised(Extent(1), 1024..1025);
    assert!(!hot.is_coolable(Extent(1)), "un-equalised");
    hot.clear_unequalised(1024..1025);
    assert!(hot.is_coolable(Extent(1)));
}

/// Clearing up to the end of an extent leaves the next one alone, its memory included.
#[test]
fn what_is_equal_ends_with_its_extent() {
    let mut hot = HotExtents::new(HOT_CAP_BYTES);
    for extent in [1, 2] {
        hot.insert(Extent(extent), NOW);
        hot.set_unequalised_all(Extent(extent));
    }
    let before = hot.memory_bytes();
    hot.clear_unequalised(1024..2048);
    assert_eq!(hot.unequalised_blocks(), 1024);
    assert_eq!(hot.memory_bytes(), before, "both are sets without a mask");
    hot.clear_unequalised(2048..2049);
    assert_eq!(hot.memory_bytes(), before + MASK_BYTES);
}

#[test]
fn an_extent_takes_one_place_however_often_it_is_written() {
    let mut hot = HotExtents::new(HOT_CAP_BYTES);
    (0..100).for_each(|extent| hot.insert(Extent(extent), NOW));
    let places = |hot: &HotExtents| {
        let in_buckets: usize = hot.buckets.iter().map(|bucket| bucket.1.len()).sum();
        in_buckets + hot.ripe.len()
    };
    let mut now = NOW;
    for second in 0..200_u32 {
        now += Duration::from_secs(1);
        // Each third extent is written each second, the others every 7 seconds.
        for extent in (0..100).filter(|it| it % 3 == 0 || it % 7 == second % 7) {
            hot.begin_write(Extent(extent), now);
            hot.end_write(Extent(extent), 0..0, now);
        }
        // The quiet time changes, too.
        let quiet = if second % 50 < 25 { QUIET } else { 6 * QUIET };
        assert_eq!(hot.coolable(now, quiet, 1000), []);
        assert_eq!(places(&hot), 100);
    }
    let last = |extent: &Extent| hot.entries[extent].last_write;
    let mut order: Vec<Extent> = (0..100).map(Extent).collect();
    order.sort_by_key(|extent| (last(extent), *extent));
    assert_eq!(hot.coolable(now + QUIET, QUIET, 1000), order);
}
